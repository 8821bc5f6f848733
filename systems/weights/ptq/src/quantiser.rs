//! From numbers to whole numbers of a few bits: the quantisers and how their ranges are chosen. All rounding goes to the
//! nearest, halves to the even one.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The smallest range: a constant tensor is not divided by zero.
const LEAST_RANGE: f64 = 1e-12;

/// Largest number of `bits` bits with a sign: `2^(bits - 1) - 1`.
pub fn largest(bits: u32) -> i32 {
    (1 << (bits - 1)) - 1
}

/// `q = clamp(round(x / s), -Q, Q)`: for weights.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Symmetric {
    /// The difference of neighbours.
    pub scale: f64,
    /// How many bits.
    pub bits: u32,
}

impl Symmetric {
    /// So that `range` is the largest number.
    pub fn of_range(range: f64, bits: u32) -> Self {
        Self { scale: range.max(LEAST_RANGE) / f64::from(largest(bits)), bits }
    }

    /// The whole number of one number.
    pub fn quantise(&self, x: f64) -> i32 {
        let most = f64::from(largest(self.bits));
        (x / self.scale).round_ties_even().clamp(-most, most) as i32
    }

    /// What a whole number stands for.
    pub fn value(&self, q: i32) -> f64 {
        f64::from(q) * self.scale
    }
}

/// `q = clamp(round(x / s) + z, 0, 2^bits - 1)`: for activations.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Asymmetric {
    /// The difference of neighbours.
    pub scale: f64,
    /// What stands for 0.
    pub zero: i32,
    /// How many bits.
    pub bits: u32,
}

impl Asymmetric {
    /// So that numbers from `low` to `high`, and 0, are within.
    pub fn of_range(low: f64, high: f64, bits: u32) -> Self {
        let most = f64::from((1u32 << bits) - 1);
        let (low, high) = (low.min(0.0), high.max(0.0));
        let scale = (high - low).max(LEAST_RANGE) / most;
        Self { scale, zero: (-low / scale).round_ties_even().clamp(0.0, most) as i32, bits }
    }

    /// The whole number of one number.
    pub fn quantise(&self, x: f64) -> i32 {
        let most = f64::from((1u32 << self.bits) - 1);
        ((x / self.scale).round_ties_even() + f64::from(self.zero)).clamp(0.0, most) as i32
    }

    /// What a whole number stands for.
    pub fn value(&self, q: i32) -> f64 {
        f64::from(q - self.zero) * self.scale
    }

    /// The same for the integer kernels, of eight or four bits.
    pub fn affine(&self) -> kiln_ops::quantised::Affine {
        let most = ((1u32 << self.bits.min(8)) - 1) as u8;
        kiln_ops::quantised::Affine {
            scale: self.scale as f32,
            zero: self.zero.clamp(0, most.into()) as u8,
            most,
        }
    }
}

/// How the range of a tensor is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Calibrator {
    /// The largest size that occurs
    Minmax,
    /// The size that 99.9 % of the numbers do not exceed
    Percentile,
    /// The cut with the smallest mean squared error
    #[default]
    Mse,
    /// A running mean of the largest sizes of batches
    Ema,
}

/// The share of numbers that [`Calibrator::Percentile`] keeps.
pub const PERCENTILE: f64 = 0.999;

/// What an older batch weighs in [`Calibrator::Ema`].
const EMA: f64 = 0.95;

/// Cuts that [`best_clip`] tries.
const CUTS: usize = 100;

/// The largest size.
pub fn largest_size(x: &[f64]) -> f64 {
    x.iter().fold(0.0, |most, x| most.max(x.abs()))
}

/// The size that a share of the numbers does not exceed, interpolated linearly between neighbours.
pub fn size_quantile(x: &[f64], share: f64) -> f64 {
    if x.is_empty() {
        return 0.0;
    }
    let mut sizes: Vec<f64> = x.iter().map(|x| x.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    let place = share * (sizes.len() - 1) as f64;
    let (below, part) = (place as usize, place.fract());
    let above = (below + 1).min(sizes.len() - 1);
    sizes[below] + part * (sizes[above] - sizes[below])
}

/// Of a hundred cuts `m i / 100` of the largest size `m`, the first with the smallest mean squared error, and that error.
pub fn best_clip(x: &[f64], bits: u32) -> (f64, f64) {
    let most = largest_size(x);
    let mut best = (most, f64::INFINITY);
    for i in 1..=CUTS {
        let clip = most * i as f64 / CUTS as f64;
        let quantiser = Symmetric::of_range(clip, bits);
        let error: f64 = x.iter().map(|&x| (quantiser.value(quantiser.quantise(x)) - x).powi(2)).sum();
        let error = error / x.len().max(1) as f64;
        if error < best.1 {
            best = (clip, error);
        }
    }
    best
}

/// The range of weights that are all known.
pub fn weight_range(x: &[f64], bits: u32, calibrator: Calibrator) -> f64 {
    match calibrator {
        Calibrator::Minmax | Calibrator::Ema => largest_size(x),
        Calibrator::Percentile => size_quantile(x, PERCENTILE),
        Calibrator::Mse => best_clip(x, bits).0,
    }
}

/// Weights as whole numbers with one scale a row, or one in all.
#[derive(Debug, Clone, PartialEq)]
pub struct Rows {
    /// The whole numbers, in the order of the weights.
    pub q: Vec<i32>,
    /// The scale of each row.
    pub scales: Vec<f64>,
}

impl Rows {
    /// Quantises `rows` rows, each with a range of its own.
    ///
    /// # Panics
    /// When the weights are not so many whole rows.
    pub fn of(weights: &[f64], rows: usize, bits: u32, calibrator: Calibrator) -> Self {
        assert!(rows > 0 && weights.len().is_multiple_of(rows), "weights must be whole rows");
        let mut result = Self { q: Vec::with_capacity(weights.len()), scales: Vec::with_capacity(rows) };
        for row in weights.chunks((weights.len() / rows).max(1)) {
            let quantiser = Symmetric::of_range(weight_range(row, bits, calibrator), bits);
            result.q.extend(row.iter().map(|&x| quantiser.quantise(x)));
            result.scales.push(quantiser.scale);
        }
        result
    }

    /// What the whole numbers stand for.
    pub fn values(&self) -> Vec<f64> {
        let width = (self.q.len() / self.scales.len().max(1)).max(1);
        self.q
            .chunks(width)
            .zip(&self.scales)
            .flat_map(|(row, s)| row.iter().map(move |&q| f64::from(q) * s))
            .collect()
    }
}

/// Bins of an [`Observer`].
const BINS: usize = 2048;

/// Watches the numbers that pass a place in a network, and chooses a range for them. Memory does not grow with what it sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Observer {
    low: f64,
    high: f64,
    /// Running means of each batch's ends.
    mean_ends: Option<[f64; 2]>,
    /// How many numbers have a size in each bin; a bin is `width` wide.
    bins: Vec<u64>,
    width: f64,
}

impl Default for Observer {
    fn default() -> Self {
        Self { low: f64::INFINITY, high: f64::NEG_INFINITY, mean_ends: None, bins: vec![0; BINS], width: 0.0 }
    }
}

impl Observer {
    /// Looks at a batch.
    pub fn observe(&mut self, x: &[f32]) {
        let ends =
            x.iter().fold([f32::INFINITY, f32::NEG_INFINITY], |[low, high], &x| [low.min(x), high.max(x)]);
        let [low, high] = ends.map(f64::from);
        if low > high {
            return;
        }
        self.low = self.low.min(low);
        self.high = self.high.max(high);
        self.mean_ends = Some(match self.mean_ends {
            None => [low, high],
            Some([l, h]) => [EMA * l + (1.0 - EMA) * low, EMA * h + (1.0 - EMA) * high],
        });
        self.count(x, low.abs().max(high.abs()));
    }

    /// Adds sizes to the histogram, whose bins double in width until the largest fits.
    fn count(&mut self, x: &[f32], most: f64) {
        if most == 0.0 {
            self.bins[0] += x.len() as u64;
            return;
        }
        if self.width == 0.0 {
            self.width = most / BINS as f64;
        }
        while most > self.width * BINS as f64 {
            for at in 0..BINS / 2 {
                self.bins[at] = self.bins[2 * at] + self.bins[2 * at + 1];
            }
            self.bins[BINS / 2..].fill(0);
            self.width *= 2.0;
        }
        let inverse = (1.0 / self.width) as f32;
        for &x in x {
            self.bins[((x.abs() * inverse) as usize).min(BINS - 1)] += 1;
        }
    }

    /// The ends of what was seen; nothing where it saw nothing.
    pub fn ends(&self) -> Option<[f64; 2]> {
        (self.low <= self.high).then_some([self.low, self.high])
    }

    /// The quantiser for what was seen.
    pub fn quantiser(&self, bits: u32, calibrator: Calibrator) -> Asymmetric {
        let [low, high] = self.ends().unwrap_or([0.0, 0.0]);
        let clip = match calibrator {
            Calibrator::Minmax => return Asymmetric::of_range(low, high, bits),
            Calibrator::Ema => {
                let [low, high] = self.mean_ends.unwrap_or([0.0, 0.0]);
                return Asymmetric::of_range(low, high, bits);
            }
            Calibrator::Percentile => self.quantile(PERCENTILE),
            Calibrator::Mse => self.best_clip(bits),
        };
        Asymmetric::of_range(low.max(-clip), high.min(clip), bits)
    }

    /// The size that a share of the numbers does not exceed, to within a bin.
    fn quantile(&self, share: f64) -> f64 {
        let wanted = share * self.bins.iter().sum::<u64>() as f64;
        let mut seen = 0.0;
        for (at, &count) in self.bins.iter().enumerate() {
            let next = seen + count as f64;
            if next >= wanted && count > 0 {
                return self.width * (at as f64 + (wanted - seen) / count as f64);
            }
            seen = next;
        }
        self.width * BINS as f64
    }

    /// Of a hundred cuts the first with the smallest mean squared error, the numbers of a bin taken as its middle.
    ///
    /// The steps are those of the range that the cut leaves, so that a tensor without negative numbers has twice as many.
    fn best_clip(&self, bits: u32) -> f64 {
        let most = self.low.abs().max(self.high.abs());
        let mut best = (most, f64::INFINITY);
        for i in 1..=CUTS {
            let clip = most * i as f64 / CUTS as f64;
            let step = (self.high.min(clip).max(0.0) - self.low.max(-clip).min(0.0)).max(LEAST_RANGE)
                / f64::from((1u32 << bits) - 1);
            let error: f64 = self
                .bins
                .iter()
                .enumerate()
                .filter(|(_, count)| **count > 0)
                .map(|(at, &count)| {
                    let size = self.width * (at as f64 + 0.5);
                    // Within the range rounding errors are spread evenly over a step.
                    let error = if size > clip { (size - clip).powi(2) } else { step * step / 12.0 };
                    count as f64 * error
                })
                .sum();
            if error < best.1 {
                best = (clip, error);
            }
        }
        best.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(batches: &[&[f32]]) -> Observer {
        let mut observer = Observer::default();
        batches.iter().for_each(|batch| observer.observe(batch));
        observer
    }

    #[test]
    fn the_order_of_batches_does_not_change_ranges() {
        let (a, b, c): (&[f32], &[f32], &[f32]) = (&[0.5, -0.25, 0.1], &[3.0, 0.2], &[-7.0, 1.0, 0.0]);
        let (one, other) = (seen(&[a, b, c]), seen(&[b, a, c]));
        assert_eq!(one.quantiser(8, Calibrator::Minmax), other.quantiser(8, Calibrator::Minmax));
        assert_eq!(one.ends(), Some([-7.0, 3.0]));
    }

    #[test]
    fn a_constant_or_unseen_tensor_is_not_divided_by_zero() {
        for calibrator in [Calibrator::Minmax, Calibrator::Percentile, Calibrator::Mse, Calibrator::Ema] {
            for observer in [seen(&[&[0.0; 9]]), Observer::default()] {
                let quantiser = observer.quantiser(8, calibrator);
                assert!(quantiser.scale > 0.0 && quantiser.quantise(0.0) == quantiser.zero);
            }
        }
    }

    #[test]
    fn outliers_are_cut_off_by_percentile_and_error() {
        let mut values: Vec<f32> = (0..20_000).map(|i| (i % 1000) as f32 / 1000.0).collect();
        values[7] = 500.0;
        let observer = seen(&[&values]);
        let exact = size_quantile(&values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>(), PERCENTILE);
        let percentile = observer.quantiser(8, Calibrator::Percentile);
        assert!((percentile.scale * 255.0 - exact).abs() < 500.0 / 2048.0, "{percentile:?} and {exact}");
        // One number of twenty thousand is worth less than the finer steps of all others.
        assert!(observer.quantiser(4, Calibrator::Mse).scale * 15.0 < 400.0);
        assert_eq!(observer.quantiser(8, Calibrator::Minmax).scale * 255.0, 500.0);
    }
}
