//! Whether a hypernetwork fits a problem, and which cell of the taxonomy: the review's reasons as rules.

use kiln_core::{Error, Result};
use serde::Serialize;

/// A problem.
#[derive(Debug, Clone, Copy)]
pub struct Problem {
    /// Related tasks.
    pub tasks: usize,
    /// Rows of each task.
    pub samples: usize,
    /// N, the weights of the network that would solve one task.
    pub params: usize,
    /// Whether the data change over time, or weights should follow the input.
    pub changing_data: bool,
    /// Whether predictions must tell how sure they are.
    pub uncertainty: bool,
    /// Whether tasks will come that have only a description.
    pub described_tasks: bool,
    /// Whether few parameters may be stored.
    pub compression: bool,
}

/// A cell of the taxonomy, and why.
#[derive(Debug, Clone, Serialize)]
pub struct Advice {
    /// Whether a hypernetwork is worth its cost at all.
    pub use_hypernetwork: bool,
    /// The value of `--cond`.
    pub conditioning: &'static str,
    /// The value of `--scheme`.
    pub scheme: &'static str,
    /// The value of `--arch`.
    pub arch: &'static str,
    /// Reasons, most important first.
    pub reasons: Vec<String>,
    /// Weights of the output layer of each scheme for a hidden layer of 32 and chunks of 256, without biases.
    pub output_parameters: Vec<(&'static str, usize)>,
}

/// Width of the hidden layer, chunk, and width of embeddings that counts are for.
const HIDDEN: usize = 32;
const CHUNK: usize = 256;
const EMBEDDING: usize = 8;
/// Above this many weights one output layer for all of them is larger than most networks.
const LARGE: usize = 2000;
/// With fewer rows a task than this a network of its own learns badly.
const FEW: usize = 500;

/// Recommends a cell.
///
/// # Errors
/// When the problem has no tasks, rows or weights.
pub fn advise(problem: &Problem) -> Result<Advice> {
    if problem.tasks == 0 || problem.samples == 0 || problem.params == 0 {
        return Err(Error::usage("a problem has at least one task, one row and one weight"));
    }
    let mut reasons = Vec::new();
    let conditioning = if problem.described_tasks {
        reasons.push(
            "new tasks come with a description only: weights made from it need no training (zero-shot)"
                .to_string(),
        );
        "given"
    } else if problem.changing_data {
        reasons.push("weights that are made from the data adapt to each input (dynamic outputs)".to_string());
        "data"
    } else if problem.tasks > 1 {
        let sharing = match problem.samples < FEW {
            true => {
                "each has few rows, and an embedding for each task lets them share what they have in common"
            }
            false => {
                "an embedding for each task costs little, though each has enough rows for a network of its own"
            }
        };
        reasons.push(format!("{} related tasks: {sharing} (soft weight sharing)", problem.tasks));
        "task"
    } else if problem.uncertainty {
        reasons.push(
            "noise as input makes the weights a distribution, and predictions tell how sure they are".into(),
        );
        "noise"
    } else {
        "task"
    };
    if problem.uncertainty && conditioning != "noise" {
        reasons.push("for uncertainty add noise to the conditioning: --cond may be a list".into());
    }
    let large = problem.params > LARGE || problem.compression;
    let scheme = if large { "chunk" } else { "once" };
    reasons.push(match large {
        true => format!(
            "for {} weights, one output layer for all would be {} numbers: make them in chunks",
            problem.params,
            HIDDEN * problem.params
        ),
        false => format!("{} weights are few enough for one output layer", problem.params),
    });
    let arch = if conditioning == "data" { "attention" } else { "mlp" };
    if arch == "attention" {
        reasons.push("attention takes a support set of any size".into());
    }
    if problem.compression {
        reasons.push(
            "to store few parameters, lower --hidden and --chunk until the model is small enough".into(),
        );
    }
    let use_hypernetwork = problem.described_tasks
        || problem.changing_data
        || problem.uncertainty
        || problem.compression
        || problem.tasks > 1 && problem.samples < FEW;
    if !use_hypernetwork {
        reasons.insert(
            0,
            "none of the review's reasons applies: a plain network costs less and is easier to train".into(),
        );
    }
    let chunks = problem.params.div_ceil(CHUNK);
    Ok(Advice {
        use_hypernetwork,
        conditioning,
        scheme,
        arch,
        reasons,
        output_parameters: vec![
            ("plain network", problem.params),
            ("once", HIDDEN * problem.params),
            ("heads", HIDDEN * problem.params),
            ("chunk", HIDDEN * CHUNK + EMBEDDING * chunks),
        ],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Problem = Problem {
        tasks: 1,
        samples: 10_000,
        params: 1000,
        changing_data: false,
        uncertainty: false,
        described_tasks: false,
        compression: false,
    };

    #[test]
    fn advice_follows_the_reviews_reasons() {
        let advice = |problem| advise(&problem).unwrap();
        assert!(!advice(PLAIN).use_hypernetwork);
        let many = advice(Problem { tasks: 20, samples: 50, ..PLAIN });
        assert_eq!((many.use_hypernetwork, many.conditioning, many.scheme), (true, "task", "once"));
        assert_eq!(advice(Problem { uncertainty: true, ..PLAIN }).conditioning, "noise");
        assert_eq!(advice(Problem { changing_data: true, ..PLAIN }).arch, "attention");
        assert_eq!(advice(Problem { described_tasks: true, ..PLAIN }).conditioning, "given");
        assert_eq!(advice(Problem { params: 19_210, compression: true, ..PLAIN }).scheme, "chunk");
        assert!(advise(&Problem { tasks: 0, ..PLAIN }).is_err());
    }
}
