//! Trained models: folders on disk, the one that Kiln ships, and published checkpoints.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result, TensorFile};

use crate::network::{TabPfn, TabPfnConfig};

/// The slug, and the kind of model folders.
pub const KIND: &str = "tabpfn";

/// Reads a model folder. A `config.json` that names no kind is read too, as the reference implementation writes it.
///
/// # Errors
/// When it is missing, of another kind, or damaged.
pub fn open(path: &Path, cx: &Context) -> Result<TabPfn> {
    let folder = ModelFolder::new(path);
    let config = match folder.config_value()?.get("kind") {
        Some(_) => folder.config(KIND)?,
        None => read_config(&folder.file("config.json"))?,
    };
    config.check()?;
    folder.weights()?.into_module(config.init(&cx.device))
}

/// Reads a configuration in the names of the reference implementation.
fn read_config(path: &Path) -> Result<TabPfnConfig> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::input(path.display(), "does not describe such a model").caused_by(e))
}

/// The network that Kiln trained and ships; `model/README.md` tells how.
///
/// # Errors
/// When the crate was built with a damaged file.
pub fn built_in(cx: &Context) -> Result<TabPfn> {
    let config: TabPfnConfig = serde_json::from_str(include_str!("../model/config.json"))
        .map_err(|e| Error::work("the shipped configuration is damaged").caused_by(e))?;
    let bytes = include_bytes!("../model/model.safetensors");
    TensorFile::from_bytes(bytes, "the shipped model")?.into_module(config.init(&cx.device))
}

/// Writes a model folder.
///
/// # Errors
/// When a file cannot be written.
pub fn save(model: &TabPfn, folder: &ModelFolder) -> Result<()> {
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(model))?;
    folder.save_config(KIND, model.config())
}

/// A published checkpoint as a model. Heads do not show in the weights: they come from `config`, a JSON file, or are
/// 4; all else is read off the shapes and compared with `config` where there is one.
///
/// # Errors
/// When a tensor is missing, left over or misshapen, or the configuration does not fit.
pub fn import(weights: &Path, config: Option<&Path>, cx: &Context) -> Result<TabPfn> {
    let mut file = without_wrapper(TensorFile::read(weights)?);
    let config = match config {
        Some(path) => read_config(path)?,
        None => config_of(&mut file)?,
    };
    config.check()?;
    file.into_module(config.init(&cx.device))
}

/// Drops the prefix that data-parallel training leaves, and the weights of the loss.
fn without_wrapper(mut file: TensorFile) -> TensorFile {
    let mut bare = TensorFile::from_source(file.source());
    bare.insert_section("", file.take_section("module."));
    bare.insert_section("", file);
    bare.take_section("criterion.");
    bare
}

/// Reads the configuration off the shapes of the weights.
fn config_of(file: &mut TensorFile) -> Result<TabPfnConfig> {
    let mut shape = |name: &str| -> Result<[usize; 2]> {
        let tensor = file.take(name)?;
        let shape = <[usize; 2]>::try_from(&tensor.shape[..]).map_err(|_| {
            Error::input(file.source().display(), format!("tensor \"{name}\" has shape {:?}", tensor.shape))
                .hint("expected a matrix: is it a checkpoint of TabPFN version 1?")
        })?;
        file.insert(name, tensor);
        Ok(shape)
    };
    let [emsize, max_features] = shape("encoder.weight")?;
    let [hidden, _] = shape("decoder.0.weight")?;
    let [max_classes, _] = shape("decoder.2.weight")?;
    let is_layer = |i: &usize| {
        let name = format!("transformer_encoder.layers.{i}.linear1.weight");
        file.get(&name).is_some()
    };
    let layers = (0..).take_while(is_layer).count();
    Ok(TabPfnConfig { max_features, max_classes, emsize, layers, heads: 4, hidden })
}

/// Rows of the example inputs, with a label and without; a captured graph has them fixed.
const EXAMPLE_ROWS: [usize; 2] = [32, 8];

/// A network from a labelled table and further rows to logits, for capture.
pub(crate) struct Captured {
    model: TabPfn,
}

impl Captured {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        Ok(Self { model: open(path, cx)? })
    }
}

impl Network for Captured {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let [labelled, asked] = EXAMPLE_ROWS;
        let port = |name: &str, shape| Port { name: name.into(), kind: PortKind::Float, shape };
        vec![
            port("x", vec![1, labelled + asked, self.model.config().max_features]),
            port("y", vec![1, labelled]),
        ]
    }

    fn outputs(&self) -> Vec<Port> {
        let shape = vec![1, EXAMPLE_ROWS[1], self.model.config().max_classes];
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        self.model = self.model.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let mut inputs = inputs.into_iter();
        let (Some(x), Some(y)) = (inputs.next(), inputs.next()) else { return Vec::new() };
        vec![self.model.forward(Tensor::from_dispatch(x), Tensor::from_dispatch(y)).into_dispatch()]
    }
}
