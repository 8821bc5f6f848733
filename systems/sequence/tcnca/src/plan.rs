//! Which filters see a wanted number of steps, and what they cost.

use kiln_core::{Error, Result, Table};
use serde::Serialize;

use crate::tcn::TcnConfig;

/// Kernels and dilation factors that are considered.
const KERNELS: [usize; 9] = [2, 3, 5, 7, 9, 13, 17, 25, 33];
const DILATIONS: [usize; 5] = [1, 2, 3, 4, 8];
/// More blocks in a mixer are hard to train.
const MAX_BLOCKS: usize = 16;

/// A TCN that sees enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Candidate {
    /// K
    pub kernel: usize,
    /// f
    pub dilation: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// R, steps in view.
    pub receptive_field: usize,
    /// Parameters of one mixer.
    pub parameters: usize,
    /// Multiplications a step of one mixer.
    pub operations: usize,
    /// Numbers that a stream keeps.
    pub state: usize,
}

/// The TCNs of `channels` that see at least `context` steps with at most `budget` multiplications a step, the cheapest first;
/// those that another beats in both multiplications and state are left out.
///
/// # Errors
/// When there is none.
pub fn plan(
    channels: usize,
    context: usize,
    budget: Option<usize>,
    bidirectional: bool,
) -> Result<Vec<Candidate>> {
    let mut candidates = Vec::new();
    for kernel in KERNELS.into_iter().filter(|kernel| !(bidirectional && kernel.is_multiple_of(2))) {
        for dilation in DILATIONS {
            let config = TcnConfig::new(channels).with_filters(kernel, dilation, 1);
            let Ok(config) = config.with_receptive_field(context) else { continue };
            if config.blocks <= MAX_BLOCKS {
                candidates.push(Candidate::of(&config)?);
            }
        }
    }
    let costs: Vec<(usize, usize)> = candidates.iter().map(Candidate::cost).collect();
    let beaten = |(operations, state): (usize, usize)| {
        costs.iter().any(|other| other.0 <= operations && other.1 <= state && *other != (operations, state))
    };
    candidates.retain(|c| budget.is_none_or(|budget| c.operations <= budget) && !beaten(c.cost()));
    candidates.sort_by_key(Candidate::cost);
    if candidates.is_empty() {
        let message = format!("no filters see {context} steps within the budget");
        return Err(Error::usage(message).hint("raise --budget or ask for fewer steps"));
    }
    Ok(candidates)
}

impl Candidate {
    /// What a candidate is judged by.
    fn cost(&self) -> (usize, usize) {
        (self.operations, self.state)
    }

    fn of(config: &TcnConfig) -> Result<Self> {
        let TcnConfig { channels, kernel, dilation, blocks, .. } = *config;
        let receptive_field = config.receptive_field()?;
        Ok(Self {
            kernel,
            dilation,
            blocks,
            receptive_field,
            parameters: blocks * channels * (kernel + channels + 2),
            operations: blocks * channels * (kernel + channels),
            state: (receptive_field - 1) * channels,
        })
    }
}

/// The candidates as a table.
pub fn table(channels: usize, candidates: &[Candidate]) -> Table {
    let mut table = Table::new(
        format!("Filters of a TCN with {channels} channels"),
        &["K", "f", "blocks", "steps in view", "parameters", "multiplications a step", "state"],
    );
    for c in candidates {
        let cells = [c.kernel, c.dilation, c.blocks, c.receptive_field, c.parameters, c.operations, c.state];
        table.row(cells.map(|cell| cell.to_string()));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_see_enough_within_the_budget_and_none_is_beaten() {
        let all = plan(64, 1000, None, false).unwrap();
        assert!(all.iter().all(|c| c.receptive_field >= 1000 && c.blocks <= MAX_BLOCKS), "{all:?}");
        assert!(
            all.windows(2)
                .all(|pair| pair[0].operations <= pair[1].operations && pair[0].state > pair[1].state)
        );
        let few = plan(64, 1000, Some(all[0].operations), false).unwrap();
        assert_eq!(few, all[..1]);
        assert!(plan(64, 1000, Some(10), false).is_err());
        assert!(plan(8, 50, None, true).unwrap().iter().all(|c| c.kernel % 2 == 1));
    }
}
