//! Networks and families on disk.

use std::path::Path;

use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result, TensorFile};
use serde::{Deserialize, Serialize};

use crate::arch::{NetConfig, Size};
use crate::family::{Family, FamilyConfig};
use crate::inr::Inr;
use crate::network::Plain;
use crate::objective::Run;

/// The slug, and the kind of model folders.
pub const KIND: &str = "neumeta";
/// The full network of a family, in its folder.
const BASE: &str = "base.safetensors";

/// What `config.json` of a plain network holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlainConfig {
    /// The family.
    #[serde(flatten)]
    pub net: NetConfig,
    /// Its place there.
    pub size: Size,
    /// How pictures and classes are written.
    #[serde(flatten)]
    pub labels: Labels,
}

/// How pictures and classes are written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Labels {
    /// What the classes are called.
    pub class_names: Vec<String>,
    /// The value of white in tables of pixels.
    pub white: f64,
}

/// What `config.json` of a family holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FamilyFile {
    /// The family.
    #[serde(flatten)]
    pub family: FamilyConfig,
    /// How pictures and classes are written.
    #[serde(flatten)]
    pub labels: Labels,
}

fn is_family(folder: &ModelFolder) -> Result<bool> {
    Ok(folder.config_value()?.get("inr").is_some())
}

/// Writes a plain network into a folder.
///
/// # Errors
/// When it cannot be written.
pub fn save_plain(path: &Path, plain: &Plain, labels: &Labels) -> Result<()> {
    let folder = ModelFolder::new(path);
    folder.create()?;
    folder.save_weights(&plain.to_file()?)?;
    save_plain_config(&folder, &plain.config, plain.size, labels)
}

/// Writes what is known of a plain network before it is trained.
///
/// # Errors
/// When it cannot be written.
pub fn save_plain_config(folder: &ModelFolder, net: &NetConfig, size: Size, labels: &Labels) -> Result<()> {
    folder.save_config(KIND, &PlainConfig { net: net.clone(), size, labels: labels.clone() })
}

/// Reads a plain network.
///
/// # Errors
/// When the folder is missing, of another kind, or damaged.
pub fn open_plain(path: &Path) -> Result<(Plain, Labels)> {
    let folder = ModelFolder::new(path);
    if is_family(&folder)? {
        return Err(Error::input(path.display(), "holds a family, not one network")
            .hint("write one first: kiln neumeta sample --model DIR --width 20 --to DIR2"));
    }
    let config: PlainConfig = folder.config(KIND)?;
    let plain = Plain::from_file(config.net, config.size, folder.weights()?)?;
    Ok((plain, config.labels))
}

/// Writes what a family begins with: configuration and full network.
///
/// # Errors
/// When it cannot be written.
pub fn save_family(folder: &ModelFolder, family: &Family, labels: &Labels) -> Result<()> {
    family.base.to_file()?.write(&folder.file(BASE))?;
    folder.save_config(KIND, &FamilyFile { family: family.config.clone(), labels: labels.clone() })
}

/// Reads a family without its implicit function.
///
/// # Errors
/// When the folder is missing, of another kind, or damaged.
pub fn open_base(path: &Path) -> Result<(Family, Labels)> {
    let folder = ModelFolder::new(path);
    if !is_family(&folder)? {
        return Err(Error::input(path.display(), "holds one network, not a family")
            .hint("train a family from it: kiln neumeta train --base DIR --data DATA --out DIR2"));
    }
    let FamilyFile { family, labels } = folder.config(KIND)?;
    if family.widths.is_empty() {
        return Err(Error::input(folder.file("config.json").display(), "names no widths")
            .hint("was it edited by hand? train the family again"));
    }
    let base =
        Plain::from_file(family.net.clone(), Size::new(family.full), TensorFile::read(&folder.file(BASE))?)?;
    let expected = Family::inr_config(&family.net, family.full)?;
    if (family.inr.tensors, family.inr.taps) != (expected.tensors, expected.taps) {
        return Err(Error::input(folder.file("config.json").display(), "\"inr\" does not fit the network")
            .hint("was it edited by hand? train the family again"));
    }
    Ok((Family::new(family, base)?, labels))
}

/// Reads a family and the average of its implicit function.
///
/// # Errors
/// When the folder is missing, of another kind, or damaged.
pub fn open_family(path: &Path, cx: &Context) -> Result<(Family, Inr, Labels)> {
    let (family, labels) = open_base(path)?;
    let weights = ModelFolder::new(path).weights()?;
    // Before anything is drawn: a configuration from outside must not fill the memory.
    let own = weights.names().filter(|name| name.starts_with("mlps.")).filter_map(|name| weights.get(name));
    let (found, expected) =
        (own.map(|tensor| tensor.shape.iter().product::<usize>()).sum::<usize>(), family.config.inr.numel());
    if found != expected {
        let message =
            format!("holds a function of {found} parameters, config.json describes one of {expected}");
        return Err(Error::input(weights.source().display(), message).hint(
            "does config.json belong to these weights? was the training stopped before its first validation?",
        ));
    }
    let inr = weights.into_module(family.draw(&cx.device, &mut cx.rng("init", 0)))?;
    Ok((family, inr.averaged()?, labels))
}

/// A plain network for capture, from pictures to logits.
pub(crate) struct Captured {
    plain: Plain,
    parameters: Vec<Tensor<1>>,
}

impl Captured {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        let (plain, _) = open_plain(path)?;
        let parameters = plain.parameters(&cx.device);
        Ok(Self { plain, parameters })
    }
}

impl Network for Captured {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let [channels, height, width] = self.plain.config.image;
        vec![Port { name: "images".into(), kind: PortKind::Float, shape: vec![1, channels, height, width] }]
    }

    fn outputs(&self) -> Vec<Port> {
        use crate::objective::Goal;
        let NetConfig { goal, image: [channels, height, width], classes, .. } = self.plain.config;
        let shape = match goal {
            Goal::Classify => vec![1, classes, 1, 1],
            Goal::Segment => vec![1, classes, height, width],
            Goal::Generate => vec![1, channels, height, width],
        };
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        self.parameters = self.plain.parameters(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let built = self.plain.config.build(self.plain.size).expect("the network was built when it was read");
        let run =
            Run { goal: self.plain.config.goal, built: &built, parameters: &self.parameters, norms: &[] };
        let output =
            |x| run.output(Tensor::from_dispatch(x)).expect("pictures are all that the network needs");
        inputs.into_iter().map(|x| output(x).into_dispatch()).collect()
    }
}
