//! Rounding that is learnt: each weight goes up or down, whichever together disturb a layer's results least.
//!
//! Source: Markus Nagel, Rana Ali Amjad, Mart van Baalen, Christos Louizos, Tijmen Blankevoort, "Up or Down? Adaptive Rounding for
//! Post-Training Quantization" (AdaRound), arXiv 2004.10568, eq. 21–25. With rows `w` in units of their scale, `V` learnt by
//! Adam, ζ = 1.1 and γ = -0.1:
//!
//! ```text
//! h = clamp(σ(V) (ζ - γ) + γ, 0, 1),   w̃ = clamp(⌊w⌋ + h, -Q, Q)
//! min  E‖(w̃ - w) x‖² + λ Σ (1 - |2 h - 1|^β)                    β falls from 20 to 2
//! ```
//!
//! The first term is a quadratic form of the error with `G = E[x xᵀ]`, which is all that is kept of the inputs: a step costs
//! one product with `G`, whatever the number of examples. Inputs are those of the network in floats, and the activation after the layer
//! is left out, which the paper's asymmetric form includes.

use kiln_ops::gemm::{Out, gemm_parallel};
use kiln_ops::{Mat, gemm};
use rand::RngExt;
use rayon::prelude::*;

use crate::quantiser::largest;
use crate::unit::{Unit, Weights, Work};

const ZETA: f32 = 1.1;
const GAMMA: f32 = -0.1;

/// λ; the first term is divided by the mean square of an input.
const WEIGHT: f32 = 0.01;

/// β at the beginning and at the end.
const BETA: (f32, f32) = (20.0, 2.0);

/// The share of the steps without the second term.
const WARM_UP: f32 = 0.2;

/// Adam's step. The paper's is a fifth of it, with twenty times as many steps.
const RATE: f32 = 0.05;

/// Inputs of a unit that are looked at, in all.
const INPUTS: usize = 4096;

/// `E[x xᵀ]` of what the rows of a unit are multiplied by: one matrix for each group of a convolution.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    /// `[groups, inner, inner]`
    sums: Vec<f32>,
    groups: usize,
    inner: usize,
    seen: usize,
}

impl Gram {
    /// Of nothing yet; `None` for a unit without rows that are multiplied.
    pub fn new(unit: &Unit) -> Option<Self> {
        let groups = match unit.work {
            Work::Conv(window) => window.groups,
            Work::Linear => 1,
            _ => return None,
        };
        let inner = unit.weight.len() / unit.shape[0].max(1);
        Some(Self { sums: vec![0.0; groups * inner * inner], groups, inner, seen: 0 })
    }

    /// Looks at a unit's input `x` of extents `shape`, one of `batches`: all rows, or some places of images drawn at random.
    pub fn observe(
        &mut self,
        unit: &Unit,
        x: &[f32],
        shape: &[usize],
        batches: usize,
        rng: &mut impl rand::Rng,
    ) {
        let wanted = INPUTS.div_ceil(batches.max(1));
        let (inner, groups) = (self.inner, self.groups);
        // `[groups, count, inner]`
        let (patches, count) = match unit.work {
            Work::Conv(window) => {
                let [channels, height, width] = [shape[1], shape[2], shape[3]];
                let out = |axis: usize| {
                    let reach = window.dilation[axis] * (window.kernel[axis] - 1) + 1;
                    (window.image[axis] + 2 * window.padding[axis] - reach) / window.stride[axis] + 1
                };
                let mut patches = vec![0.0; groups * wanted * inner];
                for at in 0..wanted {
                    let image = rng.random_range(0..shape[0]);
                    let place = [rng.random_range(0..out(0)), rng.random_range(0..out(1))];
                    for channel in 0..channels {
                        let (group, channel_in) =
                            (channel / (channels / groups), channel % (channels / groups));
                        for tap in 0..window.kernel[0] * window.kernel[1] {
                            let taps = [tap / window.kernel[1], tap % window.kernel[1]];
                            let source = [0, 1].map(|axis| {
                                (place[axis] * window.stride[axis] + taps[axis] * window.dilation[axis])
                                    .checked_sub(window.padding[axis])
                            });
                            if let [Some(row), Some(column)] = source
                                && row < height
                                && column < width
                            {
                                let to = (group * wanted + at) * inner
                                    + channel_in * window.kernel[0] * window.kernel[1]
                                    + tap;
                                patches[to] =
                                    x[((image * channels + channel) * height + row) * width + column];
                            }
                        }
                    }
                }
                (patches, wanted)
            }
            _ => {
                let rows = x.len() / inner;
                let chosen: Vec<f32> = (0..wanted.min(rows))
                    .map(|at| if rows <= wanted { at } else { rng.random_range(0..rows) })
                    .flat_map(|row| x[row * inner..][..inner].iter().copied())
                    .collect();
                (chosen, wanted.min(rows))
            }
        };
        self.seen += count;
        for (sums, patches) in self.sums.chunks_mut(inner * inner).zip(patches.chunks((count * inner).max(1)))
        {
            let patches = Mat::new(patches, count, inner);
            gemm_parallel(sums, inner, Out::Add, patches.t(), patches);
        }
    }

    /// `Σ_rows d G dᵀ` of errors `d`, `[rows, inner]`, per input that was seen.
    pub fn error(&self, errors: &[f32]) -> f64 {
        let turned = self.times(errors);
        let product = errors.iter().zip(&turned).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        product / self.seen.max(1) as f64
    }

    /// `d G`, rows of each group by its own matrix.
    fn times(&self, errors: &[f32]) -> Vec<f32> {
        let inner = self.inner;
        let mut out = vec![0.0; errors.len()];
        let part = (errors.len() / self.groups).max(1);
        let rows = part / inner;
        if self.groups == 1 {
            gemm_parallel(
                &mut out,
                inner,
                Out::Set,
                Mat::new(errors, rows, inner),
                Mat::new(&self.sums, inner, inner),
            );
            return out;
        }
        out.par_chunks_mut(part)
            .zip(errors.par_chunks(part))
            .zip(self.sums.par_chunks(inner * inner))
            .for_each(|((out, errors), sums)| {
                gemm(out, inner, Out::Set, Mat::new(errors, rows, inner), Mat::new(sums, inner, inner));
            });
        out
    }
}

/// Turns the rounding of `weights` to what `steps` steps learn; a row that they make worse keeps the nearest.
pub fn learn(unit: &Unit, weights: &Weights, gram: &Gram, steps: usize) -> Weights {
    let most = largest(weights.bits.into()) as f32;
    let width = weights.width();
    let scale = |at: usize| weights.scales[at / width];
    let exact: Vec<f32> = unit.weight.iter().enumerate().map(|(at, w)| w / scale(at)).collect();
    // A group or row is multiplied by its scale again, so that errors of different scales weigh what they are worth.
    let mean_square = (0..gram.groups * gram.inner)
        .map(|i| gram.sums[i / gram.inner * gram.inner * gram.inner + i % gram.inner * (gram.inner + 1)])
        .sum::<f32>()
        / (gram.groups * gram.inner) as f32;
    if mean_square <= 0.0 || mean_square.is_nan() {
        return weights.clone();
    }
    let largest_scale = weights.scales.iter().copied().fold(f32::MIN_POSITIVE, f32::max);
    let relative = |at: usize| scale(at) / largest_scale;

    let mut v: Vec<f32> = exact.iter().map(|w| start(w - w.floor())).collect();
    let (mut mean, mut square) = (vec![0f32; v.len()], vec![0f32; v.len()]);
    for step in 0..steps {
        let progress = step as f32 / steps as f32;
        let (soft, slopes): (Vec<f32>, Vec<f32>) = v.iter().map(|&v| rounding(v)).unzip();
        let at = |i: usize| (exact[i].floor() + soft[i]).clamp(-most, most) - exact[i];
        let errors: Vec<f32> = (0..v.len()).map(|i| at(i) * relative(i)).collect();
        let turned = gram.times(&errors);
        let share = 2.0 / mean_square;
        let beta = (progress > WARM_UP).then(|| {
            let left = (1.0 - progress) / (1.0 - WARM_UP);
            BETA.1 + (BETA.0 - BETA.1) * left
        });
        let [fast, slow] = [0.9f32, 0.999].map(|decay| 1.0 - decay.powi(step as i32 + 1));
        v.par_iter_mut().zip(&mut mean).zip(&mut square).enumerate().for_each(|(i, ((v, mean), square))| {
            let clamped = (exact[i].floor() + soft[i]).abs() > most;
            let mut slope = if clamped { 0.0 } else { share * turned[i] * relative(i) };
            if let Some(beta) = beta {
                let side = 2.0 * soft[i] - 1.0;
                slope -= WEIGHT * 2.0 * beta * side.abs().powf(beta - 1.0) * side.signum();
            }
            let slope = slope * slopes[i];
            *mean = 0.9 * *mean + 0.1 * slope;
            *square = 0.999 * *square + 0.001 * slope * slope;
            *v -= RATE * (*mean / fast) / ((*square / slow).sqrt() + 1e-8);
        });
    }
    let learnt =
        |i: usize| (exact[i].floor() + if rounding(v[i]).0 >= 0.5 { 1.0 } else { 0.0 }).clamp(-most, most);
    let learnt: Vec<i8> = (0..v.len()).map(|i| learnt(i) as i8).collect();
    better_rows(unit, weights, Weights { q: learnt, ..weights.clone() }, gram)
}

/// Of two roundings the better one for each row.
fn better_rows(unit: &Unit, one: &Weights, mut other: Weights, gram: &Gram) -> Weights {
    let by_row = |weights: &Weights| -> Vec<f64> {
        let errors: Vec<f32> = weights.values().iter().zip(&unit.weight).map(|(q, w)| q - w).collect();
        let turned = gram.times(&errors);
        let rows = errors.chunks(gram.inner).zip(turned.chunks(gram.inner));
        rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum()).collect()
    };
    let (before, after) = (by_row(one), by_row(&other));
    for (row, (before, after)) in before.iter().zip(&after).enumerate() {
        if after > before || after.is_nan() {
            let at = row * gram.inner..(row + 1) * gram.inner;
            other.q[at.clone()].copy_from_slice(&one.q[at]);
        }
    }
    other
}

/// `h` and its slope in `V`.
fn rounding(v: f32) -> (f32, f32) {
    let sigmoid = 1.0 / (1.0 + (-v).exp());
    let h = sigmoid * (ZETA - GAMMA) + GAMMA;
    if (0.0..=1.0).contains(&h) {
        (h, sigmoid * (1.0 - sigmoid) * (ZETA - GAMMA))
    } else {
        (h.clamp(0.0, 1.0), 0.0)
    }
}

/// The `V` for which `h` is this.
fn start(h: f32) -> f32 {
    -((ZETA - GAMMA) / (h - GAMMA) - 1.0).ln()
}

#[cfg(test)]
mod tests {
    use burn::backend::ir::TensorId;
    use kiln_ops::quantised::Ends;

    use super::*;
    use crate::quantiser::Calibrator;
    use crate::unit::Scales;

    /// A linear layer whose inputs depend on each other, so that errors of neighbours can cancel out.
    fn layer(inner: usize, outputs: usize) -> (Unit, Gram) {
        let mut rng = kiln_core::random_stream(0, "adaround", 0);
        let unit = Unit {
            name: "linear0".into(),
            work: Work::Linear,
            input: TensorId::new(0),
            second: None,
            output: TensorId::new(1),
            shape: vec![outputs, inner],
            weight: (0..inner * outputs).map(|_| rng.random::<f32>() - 0.5).collect(),
            bias: vec![0.0; outputs],
            ends: Ends::OPEN,
            tops: Vec::new(),
            multiplications: inner * outputs,
            elements: inner + outputs,
        };
        let mut gram = Gram::new(&unit).unwrap();
        let x: Vec<f32> = (0..200)
            .flat_map(|_| {
                let common = rng.random::<f32>();
                (0..inner).map(|_| common + 0.3 * rng.random::<f32>()).collect::<Vec<f32>>()
            })
            .collect();
        gram.observe(&unit, &x, &[200, inner], 1, &mut rng);
        (unit, gram)
    }

    #[test]
    fn learnt_rounding_disturbs_results_less_than_the_nearest_and_moves_by_one_step_at_most() {
        let (unit, gram) = layer(24, 10);
        let nearest = Weights::of(&unit, 4, Calibrator::Mse, Scales::Row);
        let learnt = learn(&unit, &nearest, &gram, 500);
        let error = |weights: &Weights| {
            let errors: Vec<f32> = weights.values().iter().zip(&unit.weight).map(|(q, w)| q - w).collect();
            gram.error(&errors)
        };
        assert!(error(&learnt) < 0.5 * error(&nearest), "{} and {}", error(&learnt), error(&nearest));
        assert!(learnt.q.iter().zip(&nearest.q).all(|(a, b)| (a - b).abs() <= 1));
        assert_eq!(learnt.scales, nearest.scales);
        assert!(learnt.q.iter().all(|q| q.abs() <= 7));
    }

    #[test]
    fn without_inputs_the_nearest_stays() {
        let (unit, _) = layer(4, 3);
        let nearest = Weights::of(&unit, 4, Calibrator::Mse, Scales::Row);
        assert_eq!(learn(&unit, &nearest, &Gram::new(&unit).unwrap(), 20), nearest);
    }

    #[test]
    fn the_rounding_starts_where_the_weights_are() {
        for h in [0.0, 0.25, 0.5, 0.99] {
            assert!((rounding(start(h)).0 - h).abs() < 1e-5);
        }
    }
}
