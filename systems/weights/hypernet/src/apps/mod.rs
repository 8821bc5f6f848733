//! Applications that the review lists, each beside the networks that one would use without a hypernetwork.

pub mod causal;
pub mod compare;
pub mod continual;
pub mod hyperlstm;
pub mod nlp;
pub mod prune;
pub mod rl;
pub mod text;
pub mod transfer;
pub mod uncertainty;
pub mod zeroshot;

use kiln_core::{Plot, Table};
use kiln_data::digits;
use serde::Serialize;

use crate::training::Labelled;

/// Labelled rows for training and for tests.
#[derive(Debug, Clone)]
pub struct Parts {
    /// What they are called.
    pub name: String,
    /// For training.
    pub train: Labelled,
    /// For tests.
    pub test: Labelled,
    /// How many classes there are.
    pub classes: usize,
}

impl Parts {
    /// The digits whose classes are listed; the first gets the label 0, and so on.
    pub fn digits(classes: &[u8]) -> Self {
        Self {
            name: "digits".into(),
            train: Labelled::digits(digits::train(), classes),
            test: Labelled::digits(digits::test(), classes),
            classes: classes.len(),
        }
    }
}

/// What an application came to.
#[derive(Debug, Clone, Serialize)]
pub struct Findings {
    /// Methods and their figures.
    pub table: Table,
    /// Pictures.
    #[serde(skip)]
    pub plots: Vec<Plot>,
    /// What the reader must know to judge the figures.
    pub notes: Vec<String>,
}

/// Mean and standard deviation over repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    /// Mean.
    pub mean: f64,
    /// Standard deviation, with n in the denominator.
    pub deviation: f64,
}

impl Spread {
    /// Of these values.
    pub fn of(values: &[f64]) -> Self {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        Self { mean, deviation: variance.sqrt() }
    }

    /// `0.9812 ± 0.0021`, or the mean alone where there is one value.
    pub fn text(&self) -> String {
        match self.deviation {
            0.0 => format!("{:.4}", self.mean),
            deviation => format!("{:.4} ± {deviation:.4}", self.mean),
        }
    }
}
