//! From a budget to a network.

use std::path::Path;

use kiln_core::{Error, Result};

use crate::evaluate::{Measure, Score, pareto, read_scores};
use crate::pareto::{Pareto, Point};
use crate::space::StitchSpace;

/// The name of the file of scores in a model folder.
pub const SCORES_FILE: &str = "scores.csv";

/// Which network is wanted.
#[derive(Debug, Clone, PartialEq)]
pub enum Wanted {
    /// The one with this id or name.
    Named(String),
    /// The best within so many of the units of the measure.
    Within(f64, Measure),
    /// The best.
    Best,
}

/// The network that was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chosen {
    /// Its id.
    pub id: usize,
    /// Whether it costs more than the budget, because all do.
    pub over_budget: bool,
}

/// What is known of the networks of a space, for choosing among them.
#[derive(Debug, Clone)]
pub struct Budgets {
    scores: Option<Vec<Score>>,
    /// FLOPs of every network.
    flops: Vec<f64>,
}

impl Budgets {
    /// With the scores in `file`, or in the model folder, or none where that has none.
    ///
    /// # Errors
    /// As [`read_scores`].
    pub fn open(model: &Path, file: Option<&Path>, space: &StitchSpace) -> Result<Self> {
        let inside = model.join(SCORES_FILE);
        let file = file.or_else(|| inside.exists().then_some(&inside));
        let flops = space.configurations().iter().map(|c| space.cost(c).flops as f64 / 1e6).collect();
        Ok(Self { scores: file.map(|file| read_scores(file, space)).transpose()?, flops })
    }

    /// Whether accuracies are known; where they are not, the dearest network counts as the best.
    pub fn are_known(&self) -> bool {
        self.scores.is_some()
    }

    /// Chooses a network.
    ///
    /// # Errors
    /// When there is none with this name, the budget makes no sense, or it is in a measure that nobody measured.
    pub fn choose(&self, wanted: &Wanted, space: &StitchSpace) -> Result<Chosen> {
        let (budget, measure) = match wanted {
            Wanted::Named(text) => return Ok(Chosen { id: space.find(text)?, over_budget: false }),
            Wanted::Within(budget, _) if budget.is_nan() || *budget <= 0.0 => {
                return Err(Error::usage(format!("a budget of {budget} buys nothing"))
                    .hint("budgets are positive numbers"));
            }
            Wanted::Within(budget, measure) => (*budget, *measure),
            Wanted::Best => (f64::INFINITY, Measure::MegaFlops),
        };
        let choice = self.among(measure)?.select(budget);
        Ok(Chosen { id: choice.point.id, over_budget: choice.over_budget })
    }

    fn among(&self, measure: Measure) -> Result<Pareto> {
        match (&self.scores, measure) {
            (Some(scores), _) => pareto(scores, measure),
            (None, Measure::MegaFlops) => {
                let points = self.flops.iter().enumerate();
                Pareto::new(points.map(|(id, &cost)| Point { id, cost, accuracy: cost }).collect())
            }
            (None, Measure::Milliseconds) => {
                Err(Error::usage("nobody has measured how long the networks take on this machine")
                    .hint("measure it with `kiln stitch eval --latency`, or give a budget in FLOPs"))
            }
        }
    }
}
