//! Trained models: folders on disk, the one that Kiln ships, and published checkpoints.

use std::path::Path;

use kiln_core::{Context, Error, ModelFolder, Result, TensorFile};

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
