//! Options that describe a network and its hypernetwork.

use std::fmt;
use std::str::FromStr;

use clap::{Args, ValueEnum};
use kiln_core::{Error, Result};
use kiln_data::{Column, Images};
use serde::{Deserialize, Serialize};

use crate::arch::{Arch, ClassifierConfig};
use crate::checkpoint::{Config, TaskKind, numbers_of_categories};
use crate::classify::{Control, Sampling};
use crate::convert::{MipConfig, Parametrisation};
use crate::encoding::Range;
use crate::hypernet::{HyperNetConfig, Nonlinearity, OutputInit};

/// A network by its name: that of a classifier, or `unet`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub(super) enum Named {
    /// A classifier.
    Classifier(Arch),
    /// The U-Net of registration and segmentation.
    UNet,
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        match text {
            "unet" => Ok(Self::UNet),
            _ => text.parse().map(Self::Classifier).map_err(|e: String| e + "; unet to register or segment"),
        }
    }
}

impl fmt::Display for Named {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Classifier(arch) => arch.fmt(f),
            Self::UNet => f.write_str("unet"),
        }
    }
}

impl From<Named> for String {
    fn from(named: Named) -> Self {
        named.to_string()
    }
}

impl TryFrom<String> for Named {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// What is normalised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Norm {
    /// Nothing
    #[default]
    None,
    /// What the layers of the network put out, over the images of a step
    Batch,
    /// What the hidden layers of the hypernetwork put out
    Layer,
    /// The weights that are made: of them only the direction counts
    Weight,
}

/// The network and its hypernetwork.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
pub(super) struct ShapeArgs {
    /// The network: mlp:32-32, lenet or resnet8; to register or segment it is a unet [default: mlp:32-32]
    #[arg(long)]
    #[serde(default)]
    arch: Option<Named>,
    /// What follows each of its layers
    #[arg(long, value_enum, default_value = "leaky_relu")]
    act: Nonlinearity,
    /// What is normalised
    #[arg(long, value_enum, default_value = "none")]
    #[serde(default)]
    pub norm: Norm,
    /// How its weights depend on the condition
    #[arg(long, value_enum, default_value = "mip")]
    param: Parametrisation,
    /// Components of a condition
    #[arg(long, default_value_t = 1)]
    pub gamma_dim: usize,
    /// The components in your own units: name=low:high or name=low:high:log, of columns of --conditions also
    /// name=cat:a,b,c
    #[arg(long, value_name = "RANGE")]
    pub range: Vec<Range>,
    /// Parameters that depend on the condition: names with * for any characters, re:EXPRESSION or type:Conv2d; by default all
    /// of a classifier, and all but the biases of networks over images, whose few numbers would be drawn large
    #[arg(long, value_delimiter = ',')]
    select: Vec<String>,
    /// Hidden widths of the hypernetwork
    #[arg(long, value_delimiter = ',', default_value = "16,64,128")]
    hidden: Vec<usize>,
    /// How its output layer is drawn; by default hyperfan for networks over images, and for a classifier fan_out where
    /// weights are added to a network's own, fan_in otherwise
    #[arg(long, value_enum)]
    output_init: Option<OutputInit>,
    /// Make its output layer of two matrices with so many numbers between them
    #[arg(long)]
    rank: Option<usize>,
    /// Leave the network's own weights as they are
    #[arg(long)]
    freeze_base: bool,
}

impl ShapeArgs {
    /// The parametrisation of a condition with so many components and categories; `all` are the parameters that depend on it
    /// unless others are named, and `drawn` is how the output layer is drawn unless it is said.
    fn mip(
        &self,
        (gamma_dim, categories): (usize, Vec<usize>),
        all: &str,
        drawn: OutputInit,
    ) -> Result<MipConfig> {
        let hypernet = HyperNetConfig {
            encoding: self.param.encoding(),
            output_init: self.output_init.unwrap_or(drawn),
            hidden: self.hidden.clone(),
            layer_norm: self.norm == Norm::Layer,
            rank: self.rank,
            categories,
            ..HyperNetConfig::new(gamma_dim)
        };
        hypernet.check()?;
        Ok(MipConfig {
            select: if self.select.is_empty() { vec![all.into()] } else { self.select.clone() },
            hypernet,
            additive: self.param.is_additive(),
            freeze_base: self.freeze_base,
            weight_norm: self.norm == Norm::Weight,
        })
    }

    /// The network of a classifier.
    pub fn classifier(&self) -> Result<Arch> {
        match &self.arch {
            None => Ok(Arch::Mlp(vec![32, 32])),
            Some(Named::Classifier(arch)) => Ok(arch.clone()),
            Some(Named::UNet) => {
                Err(Error::usage("a U-Net tells no classes").hint("add --task register or --task scale"))
            }
        }
    }

    /// The parametrisation of a U-Net, whose condition is one number.
    pub fn unet(&self, task: TaskKind) -> Result<MipConfig> {
        let (name, meaning) = match task {
            TaskKind::Register => ("registration", "one number between 0 and 1"),
            _ => ("segmentation", "one factor between 0 and 1"),
        };
        if self.gamma_dim != 1 || !self.range.is_empty() {
            return Err(Error::usage(format!("the condition of {name} is {meaning}"))
                .hint("leave --gamma-dim and --range out"));
        }
        if let Some(Named::Classifier(arch)) = &self.arch {
            return Err(Error::usage(format!("{arch} makes no image, as {name} needs it"))
                .hint("leave --arch out, or choose unet"));
        }
        if self.norm == Norm::Batch {
            return Err(Error::usage("the U-Net has no batch norms").hint("choose --norm layer or weight"));
        }
        self.mip((1, Vec::new()), crate::unet::WEIGHTS, crate::unet::OUTPUT_INIT)
    }

    /// The components of a condition whose values are in columns: as `--range` names them, otherwise words are categories in
    /// their order, and numbers from the least to the largest.
    fn ranges_of(&self, columns: &[Column]) -> Result<Vec<Range>> {
        let unknown = self.range.iter().find(|range| columns.iter().all(|column| column.name != range.name));
        if let Some(Range { name, .. }) = unknown {
            let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
            return Err(Error::usage(format!("--conditions has no column \"{name}\""))
                .hint(format!("there are {}", names.join(", "))));
        }
        let range = |column: &Column| {
            if let Some(range) = self.range.iter().find(|range| range.name == column.name) {
                return Ok(range.clone());
            }
            let mut words: Vec<String> = (0..column.len()).filter_map(|row| column.text(row)).collect();
            let numbers: Vec<f64> = words.iter().filter_map(|word| word.parse().ok()).collect();
            let (low, high) = numbers
                .iter()
                .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), &x| (low.min(x), high.max(x)));
            let are_numbers = numbers.len() == words.len();
            words.sort();
            words.dedup();
            if words.len() < 2 {
                return Err(Error::usage(format!(
                    "column \"{}\" of --conditions has one value",
                    column.name
                ))
                .hint("a condition that never changes conditions nothing: take the column away"));
            }
            Ok(match are_numbers {
                true => Range { low, high, ..Range::unit(column.name.clone()) },
                false => Range::of_categories(column.name.clone(), words),
            })
        };
        columns.iter().map(range).collect()
    }

    /// What a classifier of these images will be; `columns` are the conditions of the images where they have their own.
    pub fn config(
        &self,
        images: &Images,
        control: Control,
        sampling: Sampling,
        columns: Option<&[Column]>,
    ) -> Result<Config> {
        let arch = self.classifier()?;
        let ranges = match (columns, self.range.len()) {
            (Some(columns), _) => self.ranges_of(columns)?,
            (None, 0) => (1..=self.gamma_dim).map(|i| Range::unit(format!("gamma{i}"))).collect(),
            (None, n) if n == self.gamma_dim => self.range.clone(),
            (None, n) => {
                return Err(Error::usage(format!("there are {n} ranges for {} components", self.gamma_dim))
                    .hint("give --range once for each component of --gamma-dim"));
            }
        };
        if let (None, Some(range)) = (columns, ranges.iter().find(|range| !range.is_number())) {
            return Err(Error::usage(format!(
                "{} is one of several categories, which nothing draws",
                range.name
            ))
            .hint("say with --conditions FILE which category each image has"));
        }
        let network = ClassifierConfig {
            arch,
            image: images.shape,
            classes: images.classes.len(),
            activation: self.act,
            batch_norm: self.norm == Norm::Batch,
        };
        network.check()?;
        if control == Control::Rotation && images.shape[1] == 1 {
            return Err(Error::usage("rows of numbers are no images, and cannot be turned")
                .hint("choose another --control, or say with --conditions what weights depend on"));
        }
        let components = (ranges.len(), numbers_of_categories(&ranges));
        Ok(Config {
            task: TaskKind::Classify,
            network,
            mip: self.mip(components, "*", self.param.output_init())?,
            control,
            sampling,
            ranges,
            classes: images.classes.clone(),
            white: images.white,
        })
    }
}
