//! Trained models on disk: anchors, stitchable networks, and single networks taken from them.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor};
use kiln_core::{Context, Error, ModelFolder, Network, Port, PortKind, Result, TensorFile};
use kiln_data::Images;
use kiln_nn::initialise;
use serde::{Deserialize, Serialize};

use crate::data::Scaling;
use crate::family::{AnchorConfig, AnchorNet};
use crate::norms::NORMS_FILE;
use crate::snnet::{SnNet, Stitched};
use crate::space::{Configuration, Cut, Joint, StitchSpace};

/// The slug, and the kind of model folders.
pub const KIND: &str = "stitch";

/// What a model takes and gives.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Interface {
    /// What the classes are called.
    pub classes: Vec<String>,
    /// The value of white in tables of pixels.
    pub white: f64,
    /// How pixels are scaled.
    pub scaling: Scaling,
}

/// What `config.json` holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "model", rename_all = "snake_case")]
pub enum Config {
    /// An anchor.
    Anchor {
        /// The network.
        network: AnchorConfig,
        /// What it takes and gives.
        #[serde(flatten)]
        interface: Interface,
    },
    /// A stitchable network.
    Stitchable(SnConfig),
    /// One network of a space.
    Stitched {
        /// The anchors that it is made of.
        networks: Vec<AnchorConfig>,
        /// Its cuts, among these anchors.
        cuts: Vec<Cut>,
        /// What it takes and gives.
        #[serde(flatten)]
        interface: Interface,
    },
}

/// What `config.json` holds of a stitchable network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnConfig {
    /// The anchors, in the order of their cost.
    pub networks: Vec<AnchorConfig>,
    /// The stitching layers.
    pub layers: Vec<Joint>,
    /// All networks, each at the place of its id.
    pub configurations: Vec<Configuration>,
    /// The rank of what is trained of the stitching layers; all of them where it is absent.
    pub rank: Option<usize>,
    /// What it takes and gives.
    #[serde(flatten)]
    pub interface: Interface,
}

impl Interface {
    fn check(&self, network: &AnchorConfig, place: &Path) -> Result<()> {
        let outline = network.outline();
        if self.classes.len() != outline.classes || !(self.white.is_finite() && self.white > 0.0) {
            return Err(damaged(place, "\"classes\" or \"white\" do not fit the network"));
        }
        self.scaling.check(outline.image[0]).map_err(|e| damaged(place, "\"scaling\" is wrong").caused_by(e))
    }

    /// Gives images the model's numbering of classes.
    ///
    /// # Errors
    /// When they have another size or a class that the model does not know.
    pub fn fit(&self, images: Images, shape: [usize; 3], place: &Path) -> Result<Images> {
        if images.shape != shape {
            let found = format!("the images are {:?}, channels first", images.shape);
            let colours = if images.shape[0] == shape[0] { "" } else { ": convert between grey and colour" };
            return Err(Error::input(place.display(), found)
                .hint(format!("the model was trained on {shape:?}{colours}")));
        }
        images.with_classes(&self.classes, place)
    }
}

impl SnConfig {
    /// The configuration of a network.
    pub fn of(
        net: &SnNet<AnchorNet>,
        networks: Vec<AnchorConfig>,
        interface: Interface,
        rank: Option<usize>,
    ) -> Self {
        Self {
            networks,
            layers: net.space().layers().to_vec(),
            configurations: net.space().configurations().to_vec(),
            rank,
            interface,
        }
    }

    /// Channels, height and width of an image.
    pub fn image(&self) -> [usize; 3] {
        self.networks[0].outline().image
    }

    /// The network with weights yet to be filled in.
    fn net(&self, cx: &Context) -> Result<SnNet<AnchorNet>> {
        let outlines = self.networks.iter().map(AnchorConfig::outline).collect();
        let space = StitchSpace::from_parts(outlines, self.configurations.clone(), self.layers.clone())?;
        let anchors = self.networks.iter().map(|network| network.init(&cx.device)).collect();
        SnNet::over(anchors, space, self.rank, &cx.device)
    }
}

fn damaged(place: &Path, what: &str) -> Error {
    Error::input(place.join("config.json").display(), what)
        .hint("was it edited by hand? train the model again")
}

/// What the folder holds instead of what was asked for.
fn other(place: &Path, wanted: &str, found: &Config) -> Error {
    let (what, hint) = match found {
        Config::Anchor { .. } => {
            ("an anchor", "`kiln stitch train --anchors` makes a stitchable network of several")
        }
        Config::Stitchable(_) => (
            "a stitchable network",
            "take one network out of it: kiln stitch export --model DIR --config ID --to DIR",
        ),
        Config::Stitched { .. } => {
            ("a single network", "it was taken out of a stitchable one, which is needed here")
        }
    };
    Error::input(place.display(), format!("holds {what}, not {wanted}")).hint(hint)
}

fn read_config(path: &Path) -> Result<Config> {
    let config: Config = ModelFolder::new(path).config(KIND)?;
    let (networks, interface) = match &config {
        Config::Anchor { network, interface } => (std::slice::from_ref(network), interface),
        Config::Stitchable(SnConfig { networks, interface, .. })
        | Config::Stitched { networks, interface, .. } => (&networks[..], interface),
    };
    for network in networks {
        network.check().map_err(|e| damaged(path, "describes an impossible network").caused_by(e))?;
        interface.check(network, path)?;
    }
    Ok(config)
}

/// An anchor with its configuration.
#[derive(Debug, Clone)]
pub struct AnchorModel {
    /// Its configuration.
    pub network: AnchorConfig,
    /// What it takes and gives.
    pub interface: Interface,
    /// The network.
    pub net: AnchorNet,
}

/// Writes an anchor's `config.json`.
///
/// # Errors
/// When it cannot be written.
pub fn save_anchor_config(folder: &ModelFolder, network: &AnchorConfig, interface: &Interface) -> Result<()> {
    folder.save_config(KIND, &Config::Anchor { network: network.clone(), interface: interface.clone() })
}

/// Reads an anchor's `config.json`.
///
/// # Errors
/// When the folder holds something else or is damaged.
pub fn anchor_config(path: &Path) -> Result<(AnchorConfig, Interface)> {
    match read_config(path)? {
        Config::Anchor { network, interface } => Ok((network, interface)),
        found => Err(other(path, "an anchor", &found)),
    }
}

/// Reads an anchor.
///
/// # Errors
/// When the folder is missing, holds something else or is damaged.
pub fn open_anchor(path: &Path, cx: &Context) -> Result<AnchorModel> {
    let (network, interface) = anchor_config(path)?;
    let net = ModelFolder::new(path).weights()?.into_module(network.init(&cx.device))?;
    Ok(AnchorModel { network, interface, net })
}

/// Draws an anchor.
pub fn draw_anchor(network: &AnchorConfig, cx: &Context) -> AnchorNet {
    initialise(&cx.device, &mut cx.rng("init", 0), |device| network.init(device))
}

/// Writes a stitchable network.
///
/// # Errors
/// When a file cannot be written.
pub fn save(folder: &ModelFolder, config: &SnConfig, net: &SnNet<AnchorNet>) -> Result<()> {
    folder.create()?;
    take_norms(folder)?;
    folder.save_weights(&TensorFile::from_module(net))?;
    folder.save_config(KIND, &Config::Stitchable(config.clone()))?;
    save_norms(folder, net)
}

/// Writes the statistics of batch norms that networks have for themselves, where there are any.
///
/// # Errors
/// When the file cannot be written.
pub fn save_norms(folder: &ModelFolder, net: &SnNet<AnchorNet>) -> Result<()> {
    let statistics = net.save_statistics();
    match statistics.names().next() {
        Some(_) => statistics.write(&folder.file(NORMS_FILE)),
        None => Ok(()),
    }
}

/// Takes the statistics of batch norms out of the folder, where there are any: they belong to weights that change.
///
/// # Errors
/// When they cannot be read or removed.
pub fn take_norms(folder: &ModelFolder) -> Result<Option<Vec<u8>>> {
    let file = folder.file(NORMS_FILE);
    if !file.exists() {
        return Ok(None);
    }
    let norms = std::fs::read(&file).map_err(Error::io("read", &file))?;
    std::fs::remove_file(&file).map_err(Error::io("remove", &file))?;
    Ok(Some(norms))
}

/// Writes a stitchable network's `config.json`.
///
/// # Errors
/// When it cannot be written.
pub fn save_config(folder: &ModelFolder, config: &SnConfig) -> Result<()> {
    folder.save_config(KIND, &Config::Stitchable(config.clone()))
}

/// Reads a stitchable network without its weights.
///
/// # Errors
/// When the folder is missing, holds something else or is damaged.
pub fn open_untrained(path: &Path, cx: &Context) -> Result<(SnConfig, SnNet<AnchorNet>)> {
    match read_config(path)? {
        Config::Stitchable(config) => {
            let net =
                config.net(cx).map_err(|e| damaged(path, "describes an impossible space").caused_by(e))?;
            Ok((config, net))
        }
        found => Err(other(path, "a stitchable network", &found)),
    }
}

/// Reads a stitchable network whose networks share the statistics of batch norms, as they do in training.
///
/// # Errors
/// As [`open_untrained`], and when weights are missing or do not fit.
pub fn open_shared(path: &Path, cx: &Context) -> Result<(SnConfig, SnNet<AnchorNet>)> {
    let (config, net) = open_untrained(path, cx)?;
    let net = ModelFolder::new(path).weights()?.into_module(net)?;
    Ok((config, net))
}

/// Reads a stitchable network.
///
/// # Errors
/// As [`open_shared`], and when statistics of batch norms are there but damaged.
pub fn open(path: &Path, cx: &Context) -> Result<(SnConfig, SnNet<AnchorNet>)> {
    let (config, mut net) = open_shared(path, cx)?;
    let norms = ModelFolder::new(path).file(NORMS_FILE);
    if norms.exists() {
        let hint = "compute the file anew with `kiln stitch calibrate`";
        let file = TensorFile::read(&norms).map_err(|e| e.hint(hint))?;
        net.load_statistics(file, cx).map_err(|e| e.hint(hint))?;
    }
    Ok((config, net))
}

/// A single network with its interface.
#[derive(Debug, Clone)]
pub struct SingleModel {
    /// What it takes and gives.
    pub interface: Interface,
    /// Channels, height and width of an image.
    pub image: [usize; 3],
    /// The network.
    pub net: Stitched<AnchorNet>,
}

/// Takes one network out of a stitchable one, as a folder of its own; an anchor becomes an anchor again.
///
/// # Errors
/// When there is none with this id, or a file cannot be written.
pub fn export(
    config: &SnConfig,
    net: &SnNet<AnchorNet>,
    id: usize,
    to: &Path,
) -> Result<Stitched<AnchorNet>> {
    let configuration = net.space().configuration(id)?;
    let single = net.export(id)?;
    let folder = ModelFolder::new(to);
    folder.create()?;
    let networks: Vec<AnchorConfig> =
        configuration.anchors.iter().map(|&anchor| config.networks[anchor].clone()).collect();
    if let ([network], [part]) = (&networks[..], &single.parts[..]) {
        folder.save_weights(&TensorFile::from_module(part))?;
        save_anchor_config(&folder, network, &config.interface)?;
        return Ok(single);
    }
    folder.save_weights(&TensorFile::from_module(&single))?;
    let cuts = configuration.cuts.iter().enumerate().map(|(layer, cut)| Cut { layer, ..*cut }).collect();
    let config = Config::Stitched { networks, cuts, interface: config.interface.clone() };
    folder.save_config(KIND, &config)?;
    Ok(single)
}

/// The space whose only network, besides the anchors, has these cuts from each anchor to the next.
fn space_of_one(networks: &[AnchorConfig], cuts: Vec<Cut>) -> Result<StitchSpace> {
    let outlines = networks.iter().map(AnchorConfig::outline).collect();
    let layers = (0..cuts.len()).map(|front| Joint { front, rear: front + 1, number: 0 }).collect();
    let single = Configuration { anchors: (0..networks.len()).collect(), cuts };
    let configurations = (0..networks.len()).map(Configuration::anchor).chain([single]).collect();
    StitchSpace::from_parts(outlines, configurations, layers)
}

/// Reads a single network: one taken out of a stitchable one, or an anchor.
///
/// # Errors
/// When the folder is missing, holds something else or is damaged.
pub fn open_single(path: &Path, cx: &Context) -> Result<SingleModel> {
    match read_config(path)? {
        Config::Anchor { network, .. } => {
            let image = network.outline().image;
            let AnchorModel { interface, net, .. } = open_anchor(path, cx)?;
            Ok(SingleModel { interface, image, net: Stitched::whole(net) })
        }
        Config::Stitched { networks, cuts, interface } => {
            let space = space_of_one(&networks, cuts)
                .map_err(|e| damaged(path, "describes an impossible network").caused_by(e))?;
            let anchor = |index: usize| networks[index].init(&cx.device);
            let net = Stitched::init(&space.configurations()[networks.len()], &space, anchor, &cx.device);
            let net = ModelFolder::new(path).weights()?.into_module(net)?;
            Ok(SingleModel { interface, image: space.outlines()[0].image, net })
        }
        found => Err(other(path, "a single network", &found)),
    }
}

/// A single network for capture.
pub(crate) struct Plain(SingleModel);

impl Plain {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        open_single(path, cx).map(Self)
    }
}

impl Network for Plain {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        let [channels, height, width] = self.0.image;
        vec![Port { name: "images".into(), kind: PortKind::Float, shape: vec![1, channels, height, width] }]
    }

    fn outputs(&self) -> Vec<Port> {
        let classes = self.0.interface.classes.len();
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape: vec![1, classes] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.0.net = self.0.net.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        inputs.into_iter().map(|x| self.0.net.forward(Tensor::from_dispatch(x)).into_dispatch()).collect()
    }
}
