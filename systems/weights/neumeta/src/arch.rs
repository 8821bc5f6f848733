//! The families: how a network of a given width, depth and kernel is built.

use std::fmt;
use std::str::FromStr;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::graph::{ChannelGraph, NodeId};
use crate::objective::Goal;

/// The chain behind `lenet`.
const LENET: &str = "conv1(cin->w,3x3)+relu+avgpool2; conv2(w->2w,5x5)+relu+avgpool2; \
                     conv3(2w->4w,5x5)+relu+global mean; fc(4w->classes)";
/// The chain behind `small`.
const SMALL: &str = "conv1(cin->w,3x3)+relu+avgpool2; conv2(w->2w,3x3)+relu+avgpool2; \
                     conv3(2w->4w,3x3)+relu+global mean; fc(4w->classes)";
/// Numbers that a picture is squeezed into by `vae`.
pub const LATENT: usize = 8;
/// Most channels or kernel rows that a description may ask for.
const MAX_EXTENT: usize = 4096;

/// One network of a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Hidden channels of the first stage; of the last in a residual network.
    pub width: usize,
    /// Blocks of each stage of a residual network; by default all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<usize>,
    /// Extent that larger kernels are cut down to; by default all are whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<usize>,
}

impl Size {
    /// All blocks and whole kernels.
    pub fn new(width: usize) -> Self {
        Self { width, depth: None, kernel: None }
    }

    fn kernel(&self, full: usize) -> usize {
        self.kernel.map_or(full, |kernel| kernel.min(full))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.width)?;
        self.depth.map_or(Ok(()), |depth| write!(f, ", depth {depth}"))?;
        self.kernel.map_or(Ok(()), |kernel| write!(f, ", kernel {kernel}"))
    }
}

/// A kind of network by its name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Arch {
    /// Layers one after another, each with a width: `lenet`, `small`, or a description such as
    /// `conv1(cin->w,3x3)+relu+avgpool2; fc(w->classes)`.
    Chain {
        /// What it is called.
        name: String,
        /// Its layers.
        stages: Vec<Stage>,
    },
    /// A residual network of three stages with so many blocks each: `resnet20` has 3.
    Resnet {
        /// Blocks of each stage.
        blocks: usize,
    },
    /// A U-Net of three levels.
    Unet,
    /// A variational autoencoder.
    Vae,
}

/// A layer or operation of a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// A convolution.
    Conv {
        /// Its name.
        name: String,
        /// Its outputs.
        outputs: Outputs,
        /// Extent of its kernel.
        kernel: usize,
    },
    /// A linear layer.
    Linear {
        /// Its name.
        name: String,
        /// Its outputs.
        outputs: Outputs,
    },
    /// `max(x, 0)`
    Relu,
    /// The mean over 2 x 2 pixels.
    Halve,
    /// The mean over all pixels.
    Mean,
}

/// How many outputs a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outputs {
    /// So many times the width.
    Widths(usize),
    /// One a class.
    Classes,
}

impl FromStr for Arch {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let blocks = |name: &str| {
            let layers: usize = name.strip_prefix("resnet")?.parse().ok()?;
            ((8..=110).contains(&layers) && layers % 6 == 2).then(|| (layers - 2) / 6)
        };
        match text {
            "lenet" => Ok(Self::Chain { name: text.into(), stages: chain(LENET)? }),
            "small" => Ok(Self::Chain { name: text.into(), stages: chain(SMALL)? }),
            "unet" => Ok(Self::Unet),
            "vae" => Ok(Self::Vae),
            _ if text.contains("->") => Ok(Self::Chain { name: text.into(), stages: chain(text)? }),
            _ => blocks(text).map(|blocks| Self::Resnet { blocks }).ok_or_else(|| {
                format!(
                    "there is no network \"{text}\": choose small, lenet, resnet20 (or 8, 14, .. 110), unet or vae, or \
                     describe one such as \"conv1(cin->w,3x3)+relu+avgpool2; fc(w->classes)\""
                )
            }),
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain { name, .. } => f.write_str(name),
            Self::Resnet { blocks } => write!(f, "resnet{}", 6 * blocks + 2),
            Self::Unet => f.write_str("unet"),
            Self::Vae => f.write_str("vae"),
        }
    }
}

impl From<Arch> for String {
    fn from(arch: Arch) -> Self {
        arch.to_string()
    }
}

impl TryFrom<String> for Arch {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// Reads stages joined by `+` or `;`.
fn chain(text: &str) -> std::result::Result<Vec<Stage>, String> {
    let stages: Vec<Stage> =
        text.split(['+', ';']).map(|part| stage(part.trim())).collect::<std::result::Result<_, _>>()?;
    let mut before: Option<Outputs> = None;
    for (part, stage) in text.split(['+', ';']).zip(&stages) {
        if let Stage::Conv { outputs, .. } | Stage::Linear { outputs, .. } = stage {
            let inputs = part.split_once('(').and_then(|(_, rest)| rest.split_once("->")).map_or("", |x| x.0);
            let fits = match before {
                None => inputs.trim() == "cin",
                Some(before) => parse_outputs(inputs.trim()) == Some(before),
            };
            if !fits {
                return Err(format!("\"{}\" does not take what comes before it", part.trim()));
            }
            before = Some(*outputs);
        }
    }
    let last = stages.iter().rposition(|stage| matches!(stage, Stage::Linear { .. }));
    match last {
        Some(at) if at + 1 == stages.len() && before == Some(Outputs::Classes) => Ok(stages),
        _ => Err("a chain must end with a linear layer to the classes, such as fc(w->classes)".into()),
    }
}

fn parse_outputs(text: &str) -> Option<Outputs> {
    match text {
        "classes" => Some(Outputs::Classes),
        "w" => Some(Outputs::Widths(1)),
        _ => {
            let times = text.strip_suffix('w')?.parse().ok()?;
            (1..=MAX_EXTENT).contains(&times).then_some(Outputs::Widths(times))
        }
    }
}

fn stage(text: &str) -> std::result::Result<Stage, String> {
    let unknown = || {
        format!(
            "\"{text}\" is no layer: write name(in->out,3x3), fc(in->classes), relu, avgpool2 or global mean"
        )
    };
    match text {
        "relu" => return Ok(Stage::Relu),
        "avgpool2" => return Ok(Stage::Halve),
        "global mean" => return Ok(Stage::Mean),
        _ => {}
    }
    let (name, rest) = text.split_once('(').ok_or_else(unknown)?;
    let mut parts = rest.strip_suffix(')').ok_or_else(unknown)?.split(',').map(str::trim);
    let (_, outputs) = parts.next().and_then(|flow| flow.split_once("->")).ok_or_else(unknown)?;
    let outputs = parse_outputs(outputs.trim()).ok_or_else(unknown)?;
    let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    if !is_name {
        return Err(format!("\"{name}\" is no name for a layer"));
    }
    let Some(kernel) = parts.next() else {
        return Ok(Stage::Linear { name: name.into(), outputs });
    };
    let number = |text: &str| text.parse::<usize>().ok();
    let sides = kernel.split_once('x').and_then(|(a, b)| Some((number(a)?, number(b)?)));
    let kernel = match sides {
        Some((a, b)) if a == b && a % 2 == 1 && a <= 15 => a,
        _ => return Err(format!("the kernel {kernel} of {name} is not square and odd, at most 15x15")),
    };
    match parts.next() {
        None => {}
        Some(padding) if padding == format!("pad{}", kernel / 2) => {}
        Some(padding) => {
            return Err(format!("{name} has \"{padding}\"; only pad{} keeps the size", kernel / 2));
        }
    }
    Ok(Stage::Conv { name: name.into(), outputs, kernel })
}

/// A family of networks for one task.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetConfig {
    /// What they are for.
    pub goal: Goal,
    /// Their kind.
    pub arch: Arch,
    /// Channels, height and width of a picture.
    pub image: [usize; 3],
    /// Classes; without meaning to an autoencoder.
    pub classes: usize,
}

/// A network of the family, with the nodes that are fed and read.
#[derive(Debug, Clone)]
pub struct Built {
    /// The network.
    pub graph: ChannelGraph,
    /// Pictures.
    pub image: NodeId,
    /// Logits of classes, or of brightness, `[images, outputs, height, width]`.
    pub output: NodeId,
    /// What an autoencoder has in its middle.
    pub latent: Option<Latent>,
}

/// The middle of an autoencoder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latent {
    /// Means, then log-variances, `[images, 2 LATENT, 1, 1]`.
    pub statistics: NodeId,
    /// Standard normal noise, `[images, LATENT, 1, 1]`.
    pub noise: NodeId,
    /// The draw, `[images, LATENT, 1, 1]`.
    pub code: NodeId,
}

impl NetConfig {
    /// Checks that the network suits task and pictures.
    ///
    /// # Errors
    /// Tells what does not.
    pub fn check(&self) -> Result<()> {
        let fits = match self.goal {
            Goal::Classify => matches!(self.arch, Arch::Chain { .. } | Arch::Resnet { .. }),
            Goal::Segment => self.arch == Arch::Unet,
            Goal::Generate => self.arch == Arch::Vae,
        };
        if !fits {
            let goal = self.goal.name();
            return Err(Error::usage(format!("{} is no network to {goal} with", self.arch))
                .hint("classify with small, lenet or resnet20, segment with unet, generate with vae"));
        }
        if self.goal != Goal::Generate && self.classes < 2 {
            return Err(Error::usage(format!("there must be at least two classes, not {}", self.classes))
                .hint("with a single class there is nothing to learn"));
        }
        let halvings = match &self.arch {
            Arch::Chain { stages, .. } => {
                stages.iter().filter(|stage| **stage == Stage::Halve).count() as u32
            }
            _ => 2,
        };
        let [channels, height, width] = self.image;
        if channels == 0
            || height < 2usize.saturating_pow(halvings)
            || width < 2usize.saturating_pow(halvings)
        {
            return Err(Error::usage(format!(
                "pictures of {width} x {height} pixels are too small for {}",
                self.arch
            ))
            .hint(format!("it halves them {halvings} times")));
        }
        if channels.max(height).max(width).max(self.classes) > MAX_EXTENT {
            return Err(Error::usage(format!(
                "{:?} with {} classes is beyond reason",
                self.image, self.classes
            ))
            .hint(format!("no extent may exceed {MAX_EXTENT}")));
        }
        Ok(())
    }

    /// Blocks of each stage of the whole network, where it has any.
    pub fn depth(&self) -> Option<usize> {
        match self.arch {
            Arch::Resnet { blocks } => Some(blocks),
            _ => None,
        }
    }

    /// Extent of the largest kernel that can be cut down, where there is any; those around the code of an autoencoder
    /// are as large as what is left of the picture, and stay so.
    pub fn kernel(&self) -> Option<usize> {
        let largest = match &self.arch {
            Arch::Chain { stages, .. } => stages.iter().fold(1, |largest, stage| match stage {
                Stage::Conv { kernel, .. } => largest.max(*kernel),
                _ => largest,
            }),
            Arch::Resnet { .. } | Arch::Unet | Arch::Vae => 3,
        };
        (largest > 1).then_some(largest)
    }

    /// The size with nothing said that says nothing: all blocks, or whole kernels.
    pub fn plainly(&self, size: Size) -> Size {
        Size {
            depth: size.depth.filter(|_| size.depth != self.depth()),
            kernel: size.kernel.filter(|_| size.kernel != self.kernel()),
            ..size
        }
    }

    /// Builds the network of a size.
    ///
    /// # Errors
    /// When there is none of that size.
    pub fn build(&self, size: Size) -> Result<Built> {
        self.check()?;
        if !(1..=MAX_EXTENT).contains(&size.width) {
            return Err(Error::usage(format!("there is no network of width {}", size.width))
                .hint(format!("widths are 1 to {MAX_EXTENT}")));
        }
        match (size.depth, self.depth()) {
            (Some(depth), Some(blocks)) if depth == 0 || depth > blocks => {
                return Err(Error::usage(format!("there is no {} of depth {depth}", self.arch))
                    .hint(format!("depths are 1 to {blocks}")));
            }
            (Some(_), None) => {
                return Err(Error::usage(format!("{} has no depth to choose", self.arch))
                    .hint("only residual networks have"));
            }
            _ => {}
        }
        match (size.kernel, self.kernel()) {
            (Some(_), None) => {
                return Err(Error::usage(format!("{} has no kernel to choose", self.arch))
                    .hint("only convolutions of 3 x 3 and more have"));
            }
            (Some(kernel), Some(largest)) if kernel % 2 == 0 || kernel > largest => {
                let sizes: Vec<String> = (1..=largest).step_by(2).map(|kernel| kernel.to_string()).collect();
                return Err(Error::usage(format!("there is no {} with kernels of {kernel}", self.arch))
                    .hint(format!("kernels are odd and at most the largest of it: {}", sizes.join(", "))));
            }
            _ => {}
        }
        let mut graph = ChannelGraph::new();
        let image = graph.input(self.image[0]);
        let (output, latent) = match &self.arch {
            Arch::Chain { stages, .. } => (self.chain(&mut graph, image, stages, size), None),
            Arch::Resnet { blocks } => {
                (self.resnet(&mut graph, image, size.depth.unwrap_or(*blocks), size), None)
            }
            Arch::Unet => (self.unet(&mut graph, image, size), None),
            Arch::Vae => self.vae(&mut graph, image, size),
        };
        graph.fix(output);
        Ok(Built { graph, image, output, latent })
    }

    fn chain(&self, graph: &mut ChannelGraph, image: NodeId, stages: &[Stage], size: Size) -> NodeId {
        let count = |outputs: Outputs| match outputs {
            Outputs::Widths(times) => times * size.width,
            Outputs::Classes => self.classes,
        };
        stages.iter().fold(image, |x, stage| match stage {
            Stage::Conv { name, outputs, kernel } => {
                graph.conv(name, x, count(*outputs), size.kernel(*kernel), 1)
            }
            Stage::Linear { name, outputs } => {
                let x = graph.mean(x);
                graph.linear(name, x, count(*outputs))
            }
            Stage::Relu => graph.relu(x),
            Stage::Halve => graph.halve(x),
            Stage::Mean => graph.mean(x),
        })
    }

    /// He et al. 2016 for small pictures: a quarter, a half and the whole of the width in three stages.
    fn resnet(&self, graph: &mut ChannelGraph, image: NodeId, blocks: usize, size: Size) -> NodeId {
        let kernel = size.kernel(3);
        let widths = [size.width.div_ceil(4), size.width.div_ceil(2), size.width];
        let conv = |graph: &mut ChannelGraph, name: &str, x, outputs, kernel, stride| {
            let y = graph.conv(name, x, outputs, kernel, stride);
            graph.normed(y)
        };
        let stem = conv(graph, "stem", image, widths[0], kernel, 1);
        let mut x = graph.relu(stem);
        for (stage, &outputs) in widths.iter().enumerate() {
            for block in 0..blocks {
                let name = |part: &str| format!("stage{}.{block}.{part}", stage + 1);
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let inner = conv(graph, &name("conv1"), x, outputs, kernel, stride);
                let inner = graph.relu(inner);
                let inner = conv(graph, &name("conv2"), inner, outputs, kernel, 1);
                let around = match stride {
                    1 => x,
                    _ => conv(graph, &name("shortcut"), x, outputs, 1, stride),
                };
                let sum = graph.add(around, inner);
                x = graph.relu(sum);
            }
        }
        let means = graph.mean(x);
        graph.linear("fc", means, self.classes)
    }

    fn unet(&self, graph: &mut ChannelGraph, image: NodeId, size: Size) -> NodeId {
        let (width, kernel) = (size.width, size.kernel(3));
        let conv = |graph: &mut ChannelGraph, name: &str, x, outputs| {
            let y = graph.conv(name, x, outputs, kernel, 1);
            graph.relu(y)
        };
        let first = conv(graph, "down1", image, width);
        let half = graph.halve(first);
        let second = conv(graph, "down2", half, 2 * width);
        let quarter = graph.halve(second);
        let third = conv(graph, "middle", quarter, 4 * width);
        let x = graph.enlarge(third, second);
        let x = graph.concat(x, second);
        let x = conv(graph, "up2", x, 2 * width);
        let x = graph.enlarge(x, first);
        let x = graph.concat(x, first);
        let x = conv(graph, "up1", x, width);
        graph.conv("head", x, self.classes, 1, 1)
    }

    /// Kingma and Welling 2014, with convolutions. The layers around the code have kernels as large as what is left of
    /// the picture there, so that a coordinate stands for all of it.
    fn vae(&self, graph: &mut ChannelGraph, image: NodeId, size: Size) -> (NodeId, Option<Latent>) {
        let (width, kernel) = (size.width, size.kernel(3));
        let [channels, height, breadth] = self.image;
        let rest = [height / 4, breadth / 4];
        let conv = |graph: &mut ChannelGraph, name: &str, x, outputs| {
            let y = graph.conv(name, x, outputs, kernel, 1);
            graph.relu(y)
        };
        let first = conv(graph, "encode1", image, width);
        let half = graph.halve(first);
        let second = conv(graph, "encode2", half, 2 * width);
        let quarter = graph.halve(second);
        let statistics = graph.gather("statistics", quarter, 2 * LATENT, rest);
        let noise = graph.input(LATENT);
        let code = graph.draw(statistics, noise);
        let x = graph.spread("spread", code, 2 * width, rest);
        let x = graph.relu(x);
        let x = graph.enlarge_to(x, [height / 2, breadth / 2]);
        let x = conv(graph, "decode2", x, 2 * width);
        let x = graph.enlarge_to(x, [height, breadth]);
        let x = conv(graph, "decode1", x, width);
        let output = graph.conv("picture", x, channels, kernel, 1);
        (output, Some(Latent { statistics, noise, code }))
    }
}
