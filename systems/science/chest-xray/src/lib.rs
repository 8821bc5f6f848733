//! Tuberculosis in chest X-rays: lung segmentation, nine classifiers, and what they look at.
//!
//! Source: Tawsifur Rahman et al., "Reliable Tuberculosis Detection using Chest X-ray with Deep Learning, Segmentation and
//! Visualization", IEEE Access 8, 2020, arXiv 2007.14895. A radiograph becomes a plane of numbers ([`image`]); a U-Net
//! ([`networks`]) finds the lungs, and what is left of its mask ([`masks`]) blacks out everything else; a convolutional
//! network gives the probability of tuberculosis; and its last activations `A_k` tell on what that rests ([`cam`]):
//!
//! ```text
//! p = softmax(f(x ∘ mask))
//! Score-CAM = ReLU(Σ_k α_k A_k),   α = softmax_k(softmax(f(x ∘ Â_k))_c - softmax(f(0))_c),   Â_k from 0 to 1
//! lung attention fraction = Σ map inside the lungs / Σ map
//! ```
//!
//! ```
//! # use burn::tensor::{Device, Tensor};
//! # use kiln_chest_xray::{ResNetConfig, UNetConfig};
//! # let device = Device::flex();
//! let network = ResNetConfig::resnet18(2).init(&device);
//! let activations = network.activations(Tensor::zeros([1, 3, 64, 64], &device)); // [1, 512, 2, 2]
//! let logits = network.head(activations); // [1, 2]
//! let lungs = UNetConfig::new(8).with_modified(true).init(&device).forward(Tensor::zeros([1, 1, 64, 64], &device));
//! # assert_eq!((logits.dims(), lungs.dims()), ([1, 2], [1, 1, 64, 64]));
//! ```
//!
//! For research use: this is not a medical device.

pub mod augment;
pub mod bilinear;
pub mod cam;
pub mod checkpoint;
mod command;
pub mod dataset;
mod experiment;
pub mod image;
pub mod masks;
pub mod metrics;
pub mod networks;
pub mod overlay;
pub mod phantom;
pub mod train;
pub mod tsne;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use cam::{grad_cam, score_cam};
pub use image::Cxr;
pub use networks::{
    Classifier, ClassifierConfig, DenseNetConfig, InceptionConfig, MobileNetConfig, Net, ResNetConfig,
    SqueezeNetConfig, UNetConfig, VggConfig,
};

/// What every output says.
pub const NOTICE: &str = "for research use, not a medical device";
/// The same as a sentence of its own.
pub const NOTICE_SENTENCE: &str = "For research use, not a medical device.";

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct ChestXray;

impl System for ChestXray {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "science",
            title: "Tuberculosis detection from chest X-rays",
            paper: "Tawsifur Rahman et al., \"Reliable Tuberculosis Detection using Chest X-ray with Deep Learning, \
                    Segmentation and Visualization\", arXiv 2007.14895",
            year: 2020,
            claim: "Networks that see segmented lungs alone detect tuberculosis better than those that see whole images, \
                    and decide from the lungs.",
            purpose: "Find tuberculosis in chest X-rays from the lungs alone, and see on what a decision rests; \
                      for research use",
        }
    }

    fn command(&self) -> clap::Command {
        command::Command::command()
    }

    fn execute(&self, args: &clap::ArgMatches, cx: &Context) -> Result<()> {
        let command = command::Command::from_arg_matches(args).map_err(|e| Error::usage(e.to_string()))?;
        command.run(cx)
    }

    fn experiment(&self, scale: Scale, cx: &Context) -> Result<Report> {
        experiment::run(self.card(), scale, cx)
    }

    fn network(&self, model: &Path, cx: &Context) -> Result<Box<dyn Network>> {
        Ok(Box::new(checkpoint::Trained::open(model, cx)?))
    }
}
