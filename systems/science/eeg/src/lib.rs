//! EEG pathology detection with transfer between sites.
//!
//! Source: Mohammad-Javad Darvishi-Bayazi et al., "Amplifying Pathological Detection in EEG Signaling Pathways through
//! Cross-Dataset Transfer Learning", Computers in Biology and Medicine 169, 2024, arXiv 2309.10910. A recording
//! `[channels, samples]` is prepared in the same way at every site ([`pipeline`]) and cut into windows; a convolutional
//! network ([`model`]) gives each window logits of two classes, and a recording is pathological when the mean probability
//! of its windows is at least a half ([`metrics`]). What one site teaches is carried to another with few labels
//! ([`transfer`]):
//!
//! ```text
//! loss = -log p(label | window),   log p = mean over predictions of log softmax(f(window))
//! gain = balanced accuracy(adapted) - balanced accuracy(scratch),   negative where its interval lies below 0
//! ```
//!
//! ```
//! # use burn::tensor::{Device, Tensor};
//! # use kiln_eeg::ShallowNetConfig;
//! # let device = Device::flex();
//! let network = ShallowNetConfig::new(21, 2, 600).init(&device);
//! let logits = network.trace(Tensor::zeros([1, 21, 600], &device), &mut |_| {});
//! # assert_eq!(logits.dims(), [1, 2, 1]);
//! ```

pub mod asr;
pub mod augment;
pub mod calibrate;
pub mod channels;
pub mod checkpoint;
pub mod cka;
mod command;
pub mod dataset;
mod experiment;
pub mod filter;
pub mod layout;
pub mod metrics;
pub mod model;
pub mod pipeline;
pub mod prepare;
pub mod relevance;
pub mod resample;
pub mod scaling;
pub mod shift;
pub mod simulate;
pub mod train;
pub mod transfer;
pub mod windows;

use std::path::Path;

use clap::{CommandFactory, FromArgMatches};
use kiln_core::{Card, Context, Error, Network, Report, Result, Scale, System};

pub use model::{Deep4Config, EegNetConfig, ModelConfig, ShallowNetConfig, TcnConfig};
pub use pipeline::Pipeline;
pub use transfer::Protocol;

/// The system, as the binary sees it.
#[derive(Debug, Clone, Copy)]
pub struct Eeg;

impl System for Eeg {
    fn card(&self) -> Card {
        Card {
            slug: checkpoint::KIND,
            family: "science",
            title: "EEG pathology with cross-dataset transfer",
            paper: "Mohammad-Javad Darvishi-Bayazi et al., \"Amplifying Pathological Detection in EEG Signaling Pathways \
                    through Cross-Dataset Transfer Learning\", arXiv 2309.10910",
            year: 2023,
            claim: "Networks that learned on a large EEG corpus of one site decide better at another site with few labels \
                    than networks that learn there from scratch.",
            purpose: "Tell normal from pathological EEG recordings, and carry that from one site to another",
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

/// The README's example compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
