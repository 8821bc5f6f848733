//! How sure the communities are: partitions drawn from the posterior by Metropolis–Hastings.
//!
//! The target over partitions without names for their groups is `B! exp(−DL)`, as the description length counts each of
//! the B! namings apart. A step picks a node and moves it to another group or to one of its own, all with equal chances.

use kiln_core::{Context, Error, Result};
use rand::{Rng, RngExt};
use serde::Serialize;

use super::state::{Reach, State};
use crate::graph::Graph;

/// What the sampled partitions say.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Posterior {
    /// `[N, N]` row by row: how often two nodes were in one group.
    pub together: Vec<f64>,
    /// How often a partition had 0, 1, 2, … groups.
    pub group_counts: Vec<f64>,
    /// Samples that were kept, one a sweep.
    pub samples: usize,
}

/// Draws partitions, starting from a good one: a fifth of the sweeps for warming up, then one sample a sweep. The counts of
/// edges are described flat.
///
/// # Errors
/// When there is nothing to draw, or the user stops.
pub fn sample(
    graph: &Graph,
    start: &[usize],
    degree_corrected: bool,
    sweeps: usize,
    cx: &Context,
) -> Result<Posterior> {
    if sweeps == 0 {
        return Err(
            Error::usage("no sweeps draw nothing").hint("give at least 1 sweep; 1000 are a good start")
        );
    }
    let nodes = graph.len();
    let mut rng = cx.rng("posterior", u64::from(degree_corrected));
    let mut state = State::new(graph, start, degree_corrected);
    let mut reach = Reach::default();
    let (mut together, mut group_counts) = (vec![0.0; nodes * nodes], vec![0.0; nodes + 1]);
    let bar = cx.progress(sweeps as u64, "samples");
    let warm_up = sweeps / 5;
    for sweep in 0..sweeps + warm_up {
        if cx.interrupted() {
            return Err(Error::interrupted("the sampling was stopped"));
        }
        (0..nodes).for_each(|_| step(&mut state, &mut reach, &mut rng));
        if sweep < warm_up {
            continue;
        }
        bar.inc(1);
        group_counts[state.count()] += 1.0;
        let groups = state.groups();
        for (row, &group) in together.chunks_mut(nodes).zip(groups) {
            row.iter_mut()
                .zip(groups)
                .for_each(|(cell, other)| *cell += f64::from(u8::from(group == *other)));
        }
    }
    let share = 1.0 / sweeps as f64;
    together.iter_mut().chain(&mut group_counts).for_each(|cell| *cell *= share);
    Ok(Posterior { together, group_counts, samples: sweeps })
}

fn step(state: &mut State, reach: &mut Reach, rng: &mut impl Rng) {
    let node = rng.random_range(0..state.graph().len());
    let (from, count) = (state.groups()[node], state.count());
    let alone = state.size(from) == 1;
    // The other groups, and one of its own unless it has that already.
    let choices = if alone { count - 1 } else { count };
    if choices == 0 {
        return;
    }
    let choice = rng.random_range(0..choices);
    let to = if choice >= from { choice + 1 } else { choice };
    state.reach(node, reach);
    let begins = to == count;
    let after = count + usize::from(begins) - usize::from(alone);
    let choices_back = if begins { after - 1 } else { after };
    // B! changes by a factor of B when a group begins or ends.
    let names = match after.cmp(&count) {
        std::cmp::Ordering::Greater => (after as f64).ln(),
        std::cmp::Ordering::Less => -(count as f64).ln(),
        std::cmp::Ordering::Equal => 0.0,
    };
    let log_ratio = -state.delta(node, to, reach) + names + (choices as f64 / choices_back as f64).ln();
    if log_ratio >= 0.0 || rng.random::<f64>() < log_ratio.exp() {
        state.apply(node, to, reach);
    }
}

impl Posterior {
    /// For every node, the mean over its group of how often it was with the others; 1 for a group of its own.
    pub fn confidence(&self, groups: &[usize]) -> Vec<f64> {
        let nodes = groups.len();
        (0..nodes)
            .map(|i| {
                let others = (0..nodes).filter(|&j| j != i && groups[j] == groups[i]);
                let shares: Vec<f64> = others.map(|j| self.together[i * nodes + j]).collect();
                if shares.is_empty() { 1.0 } else { shares.iter().sum::<f64>() / shares.len() as f64 }
            })
            .collect()
    }
}
