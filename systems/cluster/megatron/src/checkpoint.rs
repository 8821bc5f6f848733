//! Networks and training states on disk, whole or in the parts of a layout.
//!
//! A model folder has `config.json` and one `model.safetensors`. A training checkpoint has the layout and the step in its
//! `config.json`, one `rank_<p>_<t>.safetensors` of weights for every pipeline and tensor rank, `optimiser_<p>_<t>.safetensors`
//! with the running means, and last of all `COMPLETE`, which lists the SHA-256 of every file: without it a checkpoint was never
//! finished. Any checkpoint can be read into any layout.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use kiln_core::{
    Context, Error, HostTensor, ModelFolder, Network, Port, PortKind, Result, TensorFile, write_atomic,
};
use kiln_data::Tokenizer;
use kiln_nn::LanguageModel;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Int, Tensor};

use crate::layout::ParallelLayout;
use crate::model::{Gpt, GptConfig};
use crate::parameters::{Spec, specs};
use crate::real::Real;
use crate::trainer::Trainer;

/// The `kind` in `config.json`.
pub const KIND: &str = "megatron";
/// Made last in a checkpoint.
const COMPLETE: &str = "COMPLETE";
/// Checkpoints that are kept.
const KEPT: usize = 2;
/// The folder of checkpoints in a model folder.
const CHECKPOINTS: &str = "checkpoints";

/// `config.json` of a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckpointConfig {
    /// The network.
    #[serde(flatten)]
    pub network: GptConfig,
    /// How ranks shared it.
    pub layout: ParallelLayout,
    /// Steps made.
    pub step: usize,
    /// Samples of the data that were used.
    pub samples: usize,
    /// The seed from which, with the step, all randomness follows.
    pub seed: u64,
}

/// A whole training state: parameters and running means by name, in the order of a model folder.
#[derive(Debug, Clone)]
pub struct Whole {
    /// The network.
    pub config: GptConfig,
    /// How ranks shared it, where it was in parts.
    pub layout: Option<ParallelLayout>,
    /// Steps made, samples used, and the seed; none for a model folder.
    pub progress: Option<(usize, usize, u64)>,
    /// Parameters.
    pub weights: TensorFile,
    /// Running means of gradients and of their squares, where there are any.
    pub moments: Option<[TensorFile; 2]>,
}

/// Every rank's share of the pipeline and of the tensor group, with its name in files.
fn places(layout: &ParallelLayout) -> impl Iterator<Item = (usize, usize, String)> + '_ {
    (0..layout.pipeline).flat_map(|p| (0..layout.tensor).map(move |t| (p, t, format!("{p}_{t}"))))
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn floats<'a>(file: &'a TensorFile, name: &str) -> Result<&'a [f32]> {
    file.get(name).and_then(HostTensor::as_floats).ok_or_else(|| {
        Error::input(file.source().display(), format!("tensor \"{name}\" is missing or no floats"))
    })
}

impl Whole {
    /// A network with its first parameters.
    pub fn initial(config: &GptConfig, seed: u64) -> Self {
        Self {
            config: config.clone(),
            layout: None,
            progress: None,
            weights: config.initial(seed),
            moments: None,
        }
    }

    /// Reads a model folder, or a checkpoint after checking the sum of every file.
    ///
    /// # Errors
    /// When a file is missing, altered or malformed, or a tensor does not fit the network; names it.
    pub fn read(path: &Path) -> Result<Self> {
        let folder = ModelFolder::new(path);
        if folder.file(COMPLETE).exists() {
            return Self::read_parts(&folder);
        }
        let config = read_config(&folder)?;
        if folder.config_value()?.get("layout").is_some() {
            return Err(Error::input(
                path.display(),
                "is a checkpoint that was never finished: COMPLETE is missing",
            )
            .hint("use an earlier checkpoint"));
        }
        let weights = folder.weights()?;
        check_weights(&config, &weights)?;
        Ok(Self { config, layout: None, progress: None, weights, moments: None })
    }

    fn read_parts(folder: &ModelFolder) -> Result<Self> {
        let complete = folder.file(COMPLETE);
        let malformed = || Error::input(complete.display(), "does not list the files of a checkpoint");
        let text = fs::read(&complete).map_err(Error::io("read", &complete))?;
        let sums: BTreeMap<String, String> =
            serde_json::from_slice(&text).map_err(|e| malformed().caused_by(e))?;
        let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        for (name, sum) in sums {
            if name.contains(['/', '\\']) {
                return Err(malformed());
            }
            let path = folder.file(&name);
            let bytes = fs::read(&path).map_err(|e| {
                Error::io("read", &path)(e).hint("the checkpoint has lost a part; use an earlier one")
            })?;
            if sha256(&bytes) != sum {
                return Err(Error::input(path.display(), "is not what was written: its SHA-256 is another")
                    .hint("the file was altered or damaged; use an earlier checkpoint"));
            }
            files.insert(name, bytes);
        }
        let config: CheckpointConfig = folder.config(KIND)?;
        config.network.check()?;
        config.layout.check(&config.network)?;
        let mut take = |name: String| {
            let path = folder.file(&name);
            let bytes =
                files.remove(&name).ok_or_else(|| Error::input(path.display(), "is missing in COMPLETE"))?;
            TensorFile::from_bytes(&bytes, path)
        };
        let mut parts = Vec::new();
        let mut moments: [Vec<TensorFile>; 2] = Default::default();
        for (_, _, place) in places(&config.layout) {
            parts.push(take(format!("rank_{place}.safetensors"))?);
            if let Ok(mut file) = take(format!("optimiser_{place}.safetensors")) {
                moments[0].push(file.take_section("m."));
                moments[1].push(file.take_section("v."));
            }
        }
        let weights = join(&config.network, &config.layout, &parts)?;
        check_weights(&config.network, &weights)?;
        let moments = match moments[0].len() == parts.len() {
            true => {
                let [m, v] = moments.map(|parts| join(&config.network, &config.layout, &parts));
                Some([m?, v?])
            }
            false => None,
        };
        Ok(Self {
            config: config.network,
            layout: Some(config.layout),
            progress: Some((config.step, config.samples, config.seed)),
            weights,
            moments,
        })
    }

    /// One whole parameter.
    pub fn weight<T: Real>(&self, name: &str) -> Option<Vec<T>> {
        widened(&self.weights, name)
    }

    /// Gives a trainer the state that its optimiser had.
    ///
    /// # Errors
    /// When a running mean is missing.
    pub fn restore<T: Real>(&self, trainer: &mut Trainer<T>) -> Result<()> {
        if let Some((step, ..)) = self.progress {
            trainer.step = step;
        }
        let Some(whole) = &self.moments else { return Ok(()) };
        let (tensor, ranks) = (trainer.ranks.at.tensor, trainer.ranks.layout.tensor);
        let range = trainer.moments.range.clone();
        let cut = |file: &TensorFile| -> Result<Vec<T>> {
            let mut all: Vec<T> = Vec::with_capacity(trainer.parameters.values.len());
            for spec in &trainer.parameters.specs {
                let values = widened::<T>(file, &spec.name).ok_or_else(|| {
                    Error::input(
                        file.source().display(),
                        format!("the state of \"{}\" is missing", spec.name),
                    )
                })?;
                all.extend(spec.cut(&values, tensor, ranks));
            }
            Ok(all[range.clone()].to_vec())
        };
        let [first, second] = [cut(&whole[0])?, cut(&whole[1])?];
        (trainer.moments.first, trainer.moments.second) = (first, second);
        Ok(())
    }

    /// Writes a model folder: one file of weights, and the configuration.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_model(&self, folder: &ModelFolder) -> Result<()> {
        folder.create()?;
        folder.save_config(KIND, &self.config)?;
        folder.save_weights(&self.weights)
    }

    /// Writes a checkpoint in the parts of a layout.
    ///
    /// # Errors
    /// When the network cannot be shared so, or the folder not be written.
    pub fn write_parts(&self, folder: &ModelFolder, layout: &ParallelLayout) -> Result<()> {
        layout.check(&self.config)?;
        folder.create()?;
        let mut sums = BTreeMap::new();
        for (pipe, tensor, place) in places(layout) {
            let specs = specs(&self.config, layout, pipe, tensor);
            let split = |file: &TensorFile, prefix: &str, part: &mut TensorFile| -> Result<()> {
                for spec in &specs {
                    let values = spec.cut(floats(file, &spec.name)?, tensor, layout.tensor);
                    part.insert(
                        format!("{prefix}{}", spec.name),
                        HostTensor::float(spec.shape.clone(), values),
                    );
                }
                Ok(())
            };
            let mut part = TensorFile::new();
            split(&self.weights, "", &mut part)?;
            write_part(folder, &format!("rank_{place}.safetensors"), &part, &mut sums)?;
            if let Some([m, v]) = &self.moments {
                let mut part = TensorFile::new();
                split(m, "m.", &mut part)?;
                split(v, "v.", &mut part)?;
                write_part(folder, &format!("optimiser_{place}.safetensors"), &part, &mut sums)?;
            }
        }
        let (step, samples, seed) = self.progress.unwrap_or_default();
        let config =
            CheckpointConfig { network: self.config.clone(), layout: layout.clone(), step, samples, seed };
        complete(folder, &config, sums)
    }
}

fn widened<T: Real>(file: &TensorFile, name: &str) -> Option<Vec<T>> {
    Some(file.get(name)?.as_floats()?.iter().map(|&x| T::of(x.into())).collect())
}

/// Joins the parts of all ranks, in the order of [`places`], into whole tensors.
fn join(config: &GptConfig, layout: &ParallelLayout, parts: &[TensorFile]) -> Result<TensorFile> {
    let mut wholes: BTreeMap<String, (Vec<usize>, Vec<f32>)> = BTreeMap::new();
    for ((pipe, tensor, _), part) in places(layout).zip(parts) {
        for spec in specs(config, layout, pipe, tensor) {
            let found = part.get(&spec.name).filter(|found| found.shape == spec.shape);
            let values = found.and_then(HostTensor::as_floats).ok_or_else(|| {
                Error::input(
                    part.source().display(),
                    format!("tensor \"{}\" is missing or has another shape than {:?}", spec.name, spec.shape),
                )
            })?;
            let (_, whole) = wholes
                .entry(spec.name.clone())
                .or_insert_with(|| (spec.whole.clone(), vec![0.0; spec.whole.iter().product()]));
            spec.place(values, whole, tensor, layout.tensor);
        }
    }
    let mut file = TensorFile::new();
    for (name, (shape, values)) in wholes {
        file.insert(name, HostTensor::float(shape, values));
    }
    Ok(file)
}

/// Makes sure that the weights are the network's, and numbers.
fn check_weights(config: &GptConfig, weights: &TensorFile) -> Result<()> {
    let place = weights.source().display().to_string();
    let names = config.names();
    for (name, shape) in &names {
        let found = weights.get(name).ok_or_else(|| {
            Error::input(&place, format!("tensor \"{name}\" is missing"))
                .hint("is it the file of another network?")
        })?;
        let values = found.as_floats().filter(|_| found.shape == *shape).ok_or_else(|| {
            Error::input(
                &place,
                format!("tensor \"{name}\" has the shape {:?}, expected floats {shape:?}", found.shape),
            )
        })?;
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(Error::input(&place, format!("tensor \"{name}\" is {} at {at}", values[at])));
        }
    }
    match weights.names().find(|name| names.iter().all(|(known, _)| known != name)) {
        Some(name) => Err(Error::input(&place, format!("tensor \"{name}\" has no place in this network"))),
        None => Ok(()),
    }
}

fn write_part(
    folder: &ModelFolder,
    name: &str,
    part: &TensorFile,
    sums: &mut BTreeMap<String, String>,
) -> Result<()> {
    let path = folder.file(name);
    part.write(&path)?;
    sums.insert(name.into(), sha256(&fs::read(&path).map_err(Error::io("read", &path))?));
    Ok(())
}

/// Writes `config.json` and then the list that makes the checkpoint valid.
fn complete(
    folder: &ModelFolder,
    config: &CheckpointConfig,
    mut sums: BTreeMap<String, String>,
) -> Result<()> {
    folder.save_config(KIND, config)?;
    let path = folder.file("config.json");
    sums.insert("config.json".into(), sha256(&fs::read(&path).map_err(Error::io("read", &path))?));
    let list = serde_json::to_vec_pretty(&sums)
        .map_err(|e| Error::work("cannot write the list of files as JSON").caused_by(e))?;
    write_atomic(&folder.file(COMPLETE), &list)
}

/// Writes a checkpoint of a running training; every rank must call this. Older ones than the two newest are removed.
///
/// # Errors
/// When the folder cannot be written, or a rank is lost.
pub fn save<T: Real>(trainer: &Trainer<T>, model: &Path) -> Result<()> {
    let folder = ModelFolder::new(model.join(CHECKPOINTS).join(format!("step-{:08}", trainer.step)));
    let ranks = &trainer.ranks;
    let first = ranks.world.rank() == 0;
    if first {
        // Left over from a run that ended in the middle of this.
        if folder.path().exists() {
            fs::remove_dir_all(folder.path()).map_err(Error::io("remove", folder.path()))?;
        }
        folder.create()?;
    }
    ranks.world.barrier()?;
    let moments = whole_moments(trainer)?;
    let mut sums = BTreeMap::new();
    if ranks.at.data == 0 {
        let place = format!("{}_{}", ranks.at.pipe, ranks.at.tensor);
        let mut part = TensorFile::new();
        insert(&mut part, "", &trainer.parameters.specs, &trainer.parameters.values);
        write_part(&folder, &format!("rank_{place}.safetensors"), &part, &mut sums)?;
        let mut part = TensorFile::new();
        insert(&mut part, "m.", &trainer.parameters.specs, &moments[0]);
        insert(&mut part, "v.", &trainer.parameters.specs, &moments[1]);
        write_part(&folder, &format!("optimiser_{place}.safetensors"), &part, &mut sums)?;
    }
    let sums = gather_sums(trainer, sums)?;
    if first {
        let config = CheckpointConfig {
            network: trainer.config.clone(),
            layout: ranks.layout.clone(),
            step: trainer.step,
            samples: trainer.step * trainer.options.batch,
            seed: trainer.options.seed,
        };
        complete(&folder, &config, sums)?;
        remove_old(model)?;
    }
    ranks.world.barrier()
}

/// The running means of all of a rank's parameters, gathered where they are divided.
fn whole_moments<T: Real>(trainer: &Trainer<T>) -> Result<[Vec<T>; 2]> {
    let moments = &trainer.moments;
    let (len, data) = (trainer.parameters.values.len(), &trainer.ranks.data);
    if moments.range.len() == len {
        return Ok([moments.first.clone(), moments.second.clone()]);
    }
    let counts: Vec<usize> =
        (0..data.size()).map(|rank| kiln_cluster::chunk(len, data.size(), rank).len()).collect();
    let mut whole = [vec![T::ZERO; len], vec![T::ZERO; len]];
    data.all_gather_v(&moments.first, &counts, &mut whole[0])?;
    data.all_gather_v(&moments.second, &counts, &mut whole[1])?;
    Ok(whole)
}

fn insert<T: Real>(file: &mut TensorFile, prefix: &str, specs: &[Spec], values: &[T]) {
    for spec in specs {
        let part = values[spec.range.clone()].iter().map(|&x| x.wide() as f32).collect();
        file.insert(format!("{prefix}{}", spec.name), HostTensor::float(spec.shape.clone(), part));
    }
}

/// The sums of all ranks' files, on the first rank.
fn gather_sums<T: Real>(
    trainer: &Trainer<T>,
    sums: BTreeMap<String, String>,
) -> Result<BTreeMap<String, String>> {
    const LEN: usize = 512;
    let world = &trainer.ranks.world;
    let mut text = serde_json::to_vec(&sums).map_err(|e| Error::work("cannot write JSON").caused_by(e))?;
    text.resize(LEN, b' ');
    let mut all = vec![0u8; if world.rank() == 0 { LEN * world.size() } else { 0 }];
    world.gather(&text, &mut all, 0)?;
    let mut together = BTreeMap::new();
    for part in all.chunks_exact(LEN) {
        let part: BTreeMap<String, String> = serde_json::from_slice(part)
            .map_err(|e| Error::work("a rank sent no list of files").caused_by(e))?;
        together.extend(part);
    }
    Ok(together)
}

/// The finished checkpoints of a model folder, oldest first.
pub fn finished(model: &Path) -> Result<Vec<PathBuf>> {
    let folder = model.join(CHECKPOINTS);
    let mut found = Vec::new();
    for (path, complete) in all_checkpoints(&folder)? {
        if complete {
            found.push(path);
        }
    }
    Ok(found)
}

/// Every checkpoint, oldest first, and whether it was finished.
fn all_checkpoints(folder: &Path) -> Result<Vec<(PathBuf, bool)>> {
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if path.is_dir() && path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("step-")) {
            let complete = path.join(COMPLETE).exists();
            found.push((path, complete));
        }
    }
    found.sort();
    Ok(found)
}

fn remove_old(model: &Path) -> Result<()> {
    let mut finished = finished(model)?;
    finished.truncate(finished.len().saturating_sub(KEPT));
    for path in finished {
        // First the list, so that what is left of an interrupted removal does not count as finished.
        let list = path.join(COMPLETE);
        fs::remove_file(&list).map_err(Error::io("remove", &list))?;
        fs::remove_dir_all(&path).map_err(Error::io("remove", &path))?;
    }
    Ok(())
}

/// Reads the network's extents from a model folder or checkpoint.
///
/// # Errors
/// When the file is missing, of another kind, or its numbers do not fit together.
pub fn read_config(folder: &ModelFolder) -> Result<GptConfig> {
    let config: GptConfig = folder.config(KIND)?;
    let place = folder.file("config.json");
    config.check().map_err(|e| Error::input(place.display(), e))?;
    Ok(config)
}

/// A trained network on one device, with what is needed to use it.
pub struct Trained {
    /// Extents.
    pub config: GptConfig,
    /// The network.
    pub model: Gpt,
    /// How its texts are cut.
    pub tokenizer: Tokenizer,
}

impl Trained {
    /// Opens a model folder, or a checkpoint in parts.
    ///
    /// # Errors
    /// As [`Whole::read`], and when the tokenizer is missing or has another vocabulary.
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        let whole = Whole::read(path)?;
        // The tokenizer of a checkpoint lies in the model folder around it.
        let inside = ModelFolder::new(path);
        let around = path.ancestors().nth(2).map(ModelFolder::new);
        let folder = match around {
            Some(around) if whole.layout.is_some() && !inside.file("tokenizer.json").exists() => around,
            _ => inside,
        };
        if whole.config.tokenizer != "bytes" && !folder.file("tokenizer.json").exists() {
            return Err(Error::input(
                folder.path().display(),
                "has no tokenizer.json, which config.json asks for",
            ));
        }
        let tokenizer = Tokenizer::open(&folder)?;
        let model = whole.weights.into_module(whole.config.empty(&cx.device))?;
        Ok(Self { config: whole.config, model, tokenizer })
    }
}

/// Tokens of the example with which a network is captured.
const EXAMPLE: usize = 16;

impl Network for Trained {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let shape = vec![1, self.config.max_seq.min(EXAMPLE)];
        vec![Port { name: "ids".into(), kind: PortKind::Int, shape }]
    }

    fn outputs(&self) -> Vec<Port> {
        let shape = vec![1, self.config.max_seq.min(EXAMPLE), self.config.vocab];
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        self.model = self.model.clone().to_device(device);
    }

    fn forward(&self, mut inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let ids = Tensor::<2, Int>::from_dispatch(inputs.remove(0));
        vec![self.model.forward(ids).into_dispatch()]
    }
}

/// Reads a GPT-2 checkpoint of Hugging Face's layout.
///
/// # Errors
/// When a file is missing or the model is of another type.
pub fn read_gpt2(path: &Path) -> Result<Whole> {
    let folder = ModelFolder::new(path);
    let place = folder.file("config.json");
    let value = folder.config_value()?;
    if value.get("model_type").and_then(Value::as_str) != Some("gpt2") {
        return Err(Error::input(place.display(), "has no \"model_type\": \"gpt2\""));
    }
    let number = |key: &str| {
        let found = value.get(key).and_then(Value::as_u64).map(|n| n as usize);
        found.ok_or_else(|| Error::input(place.display(), format!("has no number \"{key}\"")))
    };
    let mut config =
        GptConfig::new(number("n_layer")?, number("n_embd")?, number("n_head")?, number("vocab_size")?)
            .with_max_seq(number("n_positions")?);
    config.tokenizer = if folder.file("tokenizer.json").exists() { "tokenizer.json" } else { "bytes" }.into();
    config.check()?;
    let mut from = folder.weights()?;
    let mut weights = TensorFile::from_source(from.source());
    for (name, shape) in config.names() {
        let theirs = gpt2_name(&name);
        let mut found = match from.get(&theirs) {
            Some(_) => from.take(&theirs)?,
            None => from.take(theirs.trim_start_matches("transformer."))?,
        };
        if name.contains(".attention.") || name.contains(".mlp.") {
            found = gpt2_layer(&name, found, &config, false);
        }
        if found.shape != shape {
            return Err(Error::input(
                from.source().display(),
                format!("\"{theirs}\" does not give the shape {shape:?}, but {:?}", found.shape),
            ));
        }
        weights.insert(name, found);
    }
    check_weights(&config, &weights)?;
    Ok(Whole { config, layout: None, progress: None, weights, moments: None })
}

/// Writes a network in Hugging Face's GPT-2 layout.
///
/// # Errors
/// When the folder cannot be written.
pub fn write_gpt2(whole: &Whole, folder: &ModelFolder) -> Result<()> {
    folder.create()?;
    let config = &whole.config;
    let mut weights = TensorFile::new();
    weights.metadata.insert("format".into(), "pt".into());
    for (name, _) in config.names() {
        let mut found =
            whole.weights.get(&name).cloned().ok_or_else(|| Error::work(format!("\"{name}\" is missing")))?;
        if name.contains(".attention.") || name.contains(".mlp.") {
            found = gpt2_layer(&name, found, config, true);
        }
        weights.insert(gpt2_name(&name), found);
    }
    folder.save_weights(&weights)?;
    let json = serde_json::json!({
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new",
        "n_layer": config.layers, "n_embd": config.hidden, "n_head": config.heads, "vocab_size": config.vocab,
        "n_positions": config.max_seq, "n_ctx": config.max_seq, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": true,
        "attn_pdrop": config.dropout, "embd_pdrop": config.dropout, "resid_pdrop": config.dropout,
    });
    let bytes =
        serde_json::to_vec_pretty(&json).map_err(|e| Error::work("cannot write JSON").caused_by(e))?;
    write_atomic(&folder.file("config.json"), &bytes)
}

fn gpt2_name(name: &str) -> String {
    let renamed = [
        ("embedding.word", "wte.weight"),
        ("embedding.position", "wpe.weight"),
        ("layers.", "h."),
        ("final_ln.", "ln_f."),
        (".ln1.", ".ln_1."),
        (".ln2.", ".ln_2."),
        (".attention.qkv.", ".attn.c_attn."),
        (".attention.dense.", ".attn.c_proj."),
        (".mlp.fc1.", ".mlp.c_fc."),
        (".mlp.fc2.", ".mlp.c_proj."),
    ];
    format!(
        "transformer.{}",
        renamed.iter().fold(name.to_string(), |name, (from, to)| name.replace(from, to))
    )
}

/// A linear layer's tensor from one layout to the other: GPT-2 has its weights as `[in, out]`, and all queries before all
/// keys before all values.
fn gpt2_layer(name: &str, tensor: HostTensor, config: &GptConfig, to_gpt2: bool) -> HostTensor {
    let Some(values) = tensor.as_floats() else { return tensor };
    let (outputs, inputs) = match tensor.shape[..] {
        [rows, columns] if to_gpt2 => (rows, columns),
        [rows, columns] => (columns, rows),
        _ => (values.len(), 1),
    };
    // Where the output that we call `o` is in GPT-2's order.
    let dim = config.hidden / config.heads;
    let theirs = |o: usize| match name.contains(".qkv.") {
        true => (o / dim % 3) * config.hidden + o / (3 * dim) * dim + o % dim,
        false => o,
    };
    let mut moved = vec![0.0; values.len()];
    for o in 0..outputs {
        for i in 0..inputs {
            let (ours, other) = (o * inputs + i, i * outputs + theirs(o));
            match to_gpt2 {
                true => moved[other] = values[ours],
                false => moved[ours] = values[other],
            }
        }
    }
    let shape = match tensor.shape.len() {
        2 if to_gpt2 => vec![inputs, outputs],
        2 => vec![outputs, inputs],
        _ => vec![outputs],
    };
    HostTensor::float(shape, moved)
}
