//! Model folders: Kiln's own, and public GLA checkpoints in the Hugging Face layout, which differ only in
//! details of naming.

use std::fs;
use std::path::Path;

use kiln_core::{Context, Error, HostTensor, ModelFolder, Result, TensorFile};
use kiln_data::Tokenizer;
use serde_json::Value;

use crate::lm::{Lm, LmConfig};

/// The `kind` in `config.json`.
pub const KIND: &str = "gla";

/// A trained model with everything needed to use it.
#[derive(Debug, Clone)]
pub struct Trained {
    /// How it is built.
    pub config: LmConfig,
    /// The network, without autodiff.
    pub model: Lm,
    /// How its text was cut.
    pub tokenizer: Tokenizer,
}

/// Opens a model folder that Kiln or the reference implementation wrote.
///
/// # Errors
/// When a file is missing or broken, the folder holds another kind of model, or a tensor does not fit.
pub fn open(path: &Path, cx: &Context) -> Result<Trained> {
    let folder = ModelFolder::new(path);
    let config = read_config(&folder)?;
    let mut weights = folder.weights()?;
    if config.gla().is_some() {
        use_own_names(&mut weights)?;
    }
    let model = weights.into_module(config.build(&cx.device))?;
    Ok(Trained { config, model, tokenizer: Tokenizer::open(&folder)? })
}

/// Reads the configuration of a model folder.
///
/// # Errors
/// When it is missing, of another kind, or its numbers do not fit together.
pub fn read_config(folder: &ModelFolder) -> Result<LmConfig> {
    let value = folder.config_value()?;
    let place = folder.file("config.json");
    let config: LmConfig = match (value.get("kind"), value.get("model_type").and_then(Value::as_str)) {
        (Some(_), _) => folder.config(KIND)?,
        (None, Some("gla")) => serde_json::from_value(value)
            .map_err(|e| Error::input(place.display(), "does not describe a GLA checkpoint").caused_by(e))?,
        (None, found) => {
            let found = found.unwrap_or("none");
            return Err(Error::input(
                place.display(),
                format!("has model_type \"{found}\", expected \"gla\""),
            )
            .hint("Kiln reads its own model folders and public GLA checkpoints"));
        }
    };
    config.check().map_err(|e| {
        let error = Error::input(place.display(), &e);
        match e.hint_text() {
            Some(hint) => error.hint(hint),
            None => error,
        }
    })?;
    Ok(config)
}

/// Writes `config.json`, `tokenizer.json` where there is one, and optionally the weights.
///
/// # Errors
/// When the folder cannot be written.
pub fn save(
    folder: &ModelFolder,
    config: &LmConfig,
    tokenizer: &Tokenizer,
    model: Option<&Lm>,
) -> Result<()> {
    folder.create()?;
    folder.save_config(KIND, config)?;
    tokenizer.save(folder)?;
    match model {
        Some(model) => folder.save_weights(&TensorFile::from_module(model)),
        None => Ok(()),
    }
}

/// Copies a checkpoint into Kiln's names (`kind` is written) or into the reference's.
///
/// Kiln's names are those of newer public checkpoints, so the way back only leaves out `kind` and, where
/// the configuration asks for it, renames the norm per head.
///
/// # Errors
/// When the source cannot be read, is no GLA model (for the reference's layout), or the target not written.
pub fn convert(from: &Path, to: &Path, reference_layout: bool, cx: &Context) -> Result<()> {
    let Trained { config, model, tokenizer } = open(from, cx)?;
    let target = ModelFolder::new(to);
    if !reference_layout {
        return save(&target, &config, &tokenizer, Some(&model));
    }
    let LmConfig::Gla(gla) = &config else {
        let found = format!("is a {} model", config.arch().name());
        return Err(Error::input(from.display(), found).hint("only GLA models have a layout elsewhere"));
    };
    target.create()?;
    tokenizer.save(&target)?;
    let json = serde_json::to_vec_pretty(&config)
        .map_err(|e| Error::work("cannot write the configuration as JSON").caused_by(e))?;
    let mut weights = TensorFile::from_module(&model);
    if !gla.fuse_norm {
        for layer in 0..gla.num_hidden_layers {
            let attn = format!("model.layers.{layer}.attn");
            weights.rename(&format!("{attn}.g_norm_swish_gate.weight"), format!("{attn}.g_norm.weight"));
        }
    }
    target.save_weights(&weights)?;
    kiln_core::write_atomic(&target.file("config.json"), &json)
}

/// Renames the tensors of a public checkpoint to Kiln's names: one norm name, gate and up rows apart.
fn use_own_names(weights: &mut TensorFile) -> Result<()> {
    let names: Vec<String> = weights.names().map(str::to_string).collect();
    for name in &names {
        if let Some(attn) = name.strip_suffix(".g_norm.weight") {
            weights.rename(name, format!("{attn}.g_norm_swish_gate.weight"));
        }
        if let Some(mlp) = name.strip_suffix(".gate_proj.weight") {
            let up = format!("{mlp}.up_proj.weight");
            if weights.get(&up).is_none() {
                split_gate_and_up(weights, name, up)?;
            }
        }
    }
    Ok(())
}

/// Older checkpoints stack the gate's rows on those of the up projection in one `[2 · hidden, d]` matrix.
fn split_gate_and_up(weights: &mut TensorFile, gate: &str, up: String) -> Result<()> {
    let both = weights.take(gate)?;
    let (&[rows, d], Some(values)) = (&both.shape[..], both.as_floats()) else {
        return Err(Error::input(
            weights.source().display(),
            format!("tensor \"{gate}\" has shape {:?}, expected floats [2 · hidden, d]", both.shape),
        ));
    };
    if rows % 2 != 0 {
        let found = format!("tensor \"{gate}\" has {rows} rows, expected gate and up rows, an even number");
        return Err(Error::input(weights.source().display(), found));
    }
    let (gate_rows, up_rows) = values.split_at(rows / 2 * d);
    let (gate_rows, up_rows) = (gate_rows.to_vec(), up_rows.to_vec());
    weights.insert(gate, HostTensor::float([rows / 2, d], gate_rows));
    weights.insert(up, HostTensor::float([rows / 2, d], up_rows));
    Ok(())
}

/// Reads token ids, one sequence a row: `input_ids [rows, time]` of a safetensors file.
///
/// # Errors
/// When the file is broken or an id is outside the vocabulary.
pub fn read_ids(path: &Path, vocab_size: usize) -> Result<(Vec<i64>, [usize; 2])> {
    let mut file = TensorFile::read(path)?;
    let ids = file.take("input_ids")?;
    let (&[rows, time], Some(values)) = (&ids.shape[..], ids.as_ints()) else {
        let found = format!("tensor \"input_ids\" has shape {:?}, expected integers [rows, time]", ids.shape);
        return Err(Error::input(path.display(), found));
    };
    if let Some(at) = values.iter().position(|id| !(0..vocab_size as i64).contains(id)) {
        let found = format!("token id {} at {at} is outside the vocabulary of {vocab_size}", values[at]);
        return Err(Error::input(path.display(), found));
    }
    if rows * time == 0 {
        return Err(Error::input(path.display(), "\"input_ids\" is empty"));
    }
    Ok((values.to_vec(), [rows, time]))
}

/// Bytes on disk of everything in a folder's `model.safetensors` or shards.
///
/// # Errors
/// When the folder cannot be read.
pub fn weight_bytes(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        if entry.path().extension().is_some_and(|e| e == "safetensors")
            && entry.file_name() != "checkpoint.safetensors"
        {
            bytes += entry.metadata().map_err(Error::io("read", entry.path()))?.len();
        }
    }
    Ok(bytes)
}
