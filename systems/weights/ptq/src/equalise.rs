//! Equalisation across layers: where one unit alone reads another's result, a channel can be made smaller on one side and
//! larger on the other without changing what the network computes, so that all channels fill the range that they share.
//!
//! Source: Markus Nagel, Mart van Baalen, Tijmen Blankevoort, Max Welling, "Data-Free Quantization Through Weight Equalization and
//! Bias Correction", arXiv 1906.04721, §4.1. With the ranges `r¹_i` of the first unit's row and `r²_i` of the second's weights
//! for channel `i`:
//!
//! ```text
//! s_i = √(r¹_i / r²_i),   W¹_i ← W¹_i / s_i,   b_i ← b_i / s_i,   W²_i ← s_i W²_i          (eq. 11)
//! ```
//!
//! That needs `f(s x) = s f(x)` in between, which ReLU has. The paper makes ReLU of every ReLU6; here its end moves with
//! the channel, to `6 / s_i` ([`Unit::tops`]), and the network stays what it was.

use std::collections::BTreeMap;

use crate::program::Program;
use crate::unit::{Unit, Work};

/// Times that all pairs are gone through at most.
const ROUNDS: usize = 40;

/// Scales nearer to 1 than this change nothing more.
const SETTLED: f32 = 1e-3;

impl Program {
    /// Equalises the weights of all pairs of units between which nothing else reads or happens; how many pairs there are.
    pub fn equalise(&mut self) -> usize {
        let pairs = self.neighbours();
        for _ in 0..ROUNDS {
            let mut moved = 0f32;
            for &(first, second) in &pairs {
                let scales = scales(&self.units[first], &self.units[second]);
                moved = scales.iter().fold(moved, |most, s| most.max((s - 1.0).abs()));
                shrink(&mut self.units[first], &scales);
                grow(&mut self.units[second], &scales);
            }
            if moved < SETTLED {
                break;
            }
        }
        pairs.len()
    }

    /// Units of which the second alone reads what the first makes, channel by channel.
    fn neighbours(&self) -> Vec<(usize, usize)> {
        let mut readers: BTreeMap<_, usize> = BTreeMap::new();
        for id in self.all_reads().chain(self.outputs.iter().map(|output| output.tensor)) {
            *readers.entry(id).or_default() += 1;
        }
        let mut pairs = Vec::new();
        for (second, unit) in self.units.iter().enumerate() {
            let Some(first) = self.units.iter().position(|other| other.output == unit.input) else {
                continue;
            };
            let before = &self.units[first];
            let scalable = before.ends.least == 0.0 || before.ends.least == f32::NEG_INFINITY;
            if readers.get(&unit.input) == Some(&1) && scalable && fits(before, unit) {
                pairs.push((first, second));
            }
        }
        pairs
    }
}

/// Whether the second unit's input channels are the first one's rows.
fn fits(first: &Unit, second: &Unit) -> bool {
    match (first.work, second.work) {
        (Work::Conv(_), Work::Conv(window)) => second.shape[1] * window.groups == first.shape[0],
        (Work::Linear, Work::Linear) => second.shape[1] == first.shape[0],
        _ => false,
    }
}

/// Calls `see` with the place of every weight of a unit and the input channel that it multiplies.
fn by_input_channel(unit: &Unit, mut see: impl FnMut(usize, usize)) {
    let (groups, taps) = match unit.work {
        Work::Conv(window) => (window.groups, window.kernel[0] * window.kernel[1]),
        _ => (1, 1),
    };
    let [rows, inputs] = [unit.shape[0], unit.shape[1]];
    for row in 0..rows {
        let group = row / (rows / groups).max(1);
        for at in 0..inputs * taps {
            see(row * inputs * taps + at, group * inputs + at / taps);
        }
    }
}

/// `√(r¹ / r²)` of every channel; 1 where one of both is 0, and nothing would ever bring it back.
fn scales(first: &Unit, second: &Unit) -> Vec<f32> {
    let width = first.weight.len() / first.shape[0].max(1);
    let before = first.weight.chunks(width.max(1)).map(|row| row.iter().fold(0f32, |m, w| m.max(w.abs())));
    let mut after = vec![0f32; first.shape[0]];
    by_input_channel(second, |at, channel| after[channel] = after[channel].max(second.weight[at].abs()));
    let scale = |(before, after): (f32, &f32)| {
        let scale = (before / after).sqrt();
        if scale.is_finite() && scale > 0.0 { scale } else { 1.0 }
    };
    before.zip(&after).map(scale).collect()
}

fn shrink(unit: &mut Unit, scales: &[f32]) {
    let width = unit.weight.len() / unit.shape[0].max(1);
    for (row, s) in unit.weight.chunks_mut(width.max(1)).zip(scales) {
        row.iter_mut().for_each(|w| *w /= s);
    }
    unit.bias.iter_mut().zip(scales).for_each(|(b, s)| *b /= s);
    if unit.tops.is_empty() && unit.ends.most.is_finite() {
        unit.tops = vec![unit.ends.most; unit.shape[0]];
        unit.ends.most = f32::INFINITY;
    }
    unit.tops.iter_mut().zip(scales).for_each(|(top, s)| *top /= s);
}

fn grow(unit: &mut Unit, scales: &[f32]) {
    let mut weight = std::mem::take(&mut unit.weight);
    by_input_channel(unit, |at, channel| weight[at] *= scales[channel]);
    unit.weight = weight;
}
