//! A published system, as the binary sees it.

use std::path::Path;

use serde::Serialize;

use crate::{Context, Error, Network, Report, Result};

/// What `kiln list` and `kiln show` print about a system.
#[derive(Debug, Clone, Serialize)]
pub struct Card {
    /// The name on the command line and of the crate (`kiln-<slug>`).
    pub slug: &'static str,
    /// The folder it lives in under `systems/`.
    pub family: &'static str,
    /// The system's name in words.
    pub title: &'static str,
    /// Authors, title and identifier of the publication.
    pub paper: &'static str,
    /// Year of publication.
    pub year: u16,
    /// The paper's main claim, in one sentence.
    pub claim: &'static str,
    /// What a user does with it, in one line.
    pub purpose: &'static str,
}

/// How large the reference experiment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Scale {
    /// Only checks that everything is connected: a second or two, claims are not expected to hold.
    Smoke,
    /// About twenty seconds: what the tour runs.
    Quick,
    /// The figures that the README reports: minutes.
    Full,
}

impl Scale {
    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Smoke => "smoke",
            Self::Quick => "quick",
            Self::Full => "full",
        }
    }
}

/// A published system that Kiln implements.
pub trait System: Sync {
    /// Name, source and claim.
    fn card(&self) -> Card;

    /// The verbs of `kiln <slug>`.
    fn command(&self) -> clap::Command;

    /// Runs one of the verbs.
    fn execute(&self, args: &clap::ArgMatches, cx: &Context) -> Result<()>;

    /// The reference experiment: method beside baseline, claims computed from both.
    fn experiment(&self, scale: Scale, cx: &Context) -> Result<Report>;

    /// Rebuilds a trained model from its folder, so that other systems can capture it.
    ///
    /// # Errors
    /// By default, that the system trains no network.
    fn network(&self, model: &Path, _cx: &Context) -> Result<Box<dyn Network>> {
        Err(Error::input(model.display(), format!("{} models cannot be captured", self.card().slug)))
    }
}
