//! Where a weight lies in its network, and how that is told to the implicit function.

use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::graph::TensorSpec;

/// Numbers of a coordinate.
pub const DIMENSIONS: usize = 6;

/// Which numbers of a coordinate noise is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NoiseOn {
    /// All six, as the reference does
    All,
    /// The places of output and input channel
    Channels,
    /// The place of the output channel
    Outputs,
}

impl NoiseOn {
    fn dimensions(self) -> std::ops::Range<usize> {
        match self {
            Self::All => 0..DIMENSIONS,
            Self::Channels => 1..3,
            Self::Outputs => 1..2,
        }
    }
}

/// Coordinates `(l, o, c, L, C_out, C_in)` of all kernels of a tensor: its number, output and input channel, and how
/// many there are of each. Rows run over `o`, then `c`.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightCoords {
    /// `[kernels, 6]`
    pub rows: Vec<[f64; DIMENSIONS]>,
}

impl WeightCoords {
    /// Those of tensor number `index` of `count`. A tensor of one axis has `c = 0` and `C_in = 1`.
    pub fn of(index: usize, count: usize, spec: &TensorSpec) -> Self {
        let [outputs, inputs, _] = spec.extents();
        let row = |o, c| [index, o, c, count, outputs, inputs].map(|x: usize| x as f64);
        Self { rows: (0..outputs).flat_map(|o| (0..inputs).map(move |c| row(o, c))).collect() }
    }

    /// Moves the chosen numbers by up to half of `amount` in either direction (§3.4).
    pub fn jitter(&mut self, amount: f64, on: NoiseOn, rng: &mut impl Rng) {
        for row in &mut self.rows {
            for x in &mut row[on.dimensions()] {
                *x += (rng.random::<f64>() - 0.5) * amount;
            }
        }
    }

    /// What the implicit function sees: `u = (l/L, o/C_out, c/C_in, L/N, C_out/N, C_in/N)`, then for each frequency `f`
    /// and each of the six `sin(2^f π u)` and `cos(2^f π u)`.
    ///
    /// The highest argument is 2^15 π: sines are taken in double precision, and of twice the angle by
    /// `sin 2x = 2 sin x cos x`, `cos 2x = cos² x - sin² x`, which loses a binary digit each time.
    ///
    /// # Shapes
    /// - output: `[kernels, 6 + 12 frequencies]`, row by row
    pub fn encode(&self, norm: f64, frequencies: usize) -> Vec<f32> {
        let width = encoded_width(frequencies);
        let mut encoded = vec![0.0; self.rows.len() * width];
        encoded.par_chunks_mut(width).with_min_len(64).zip(&self.rows).for_each(|(out, row)| {
            let [l, o, c, layers, outputs, inputs] = *row;
            // Normalising all by N first cancels in the ratios.
            let u = [l / layers, o / outputs, c / inputs, layers / norm, outputs / norm, inputs / norm];
            for (out, u) in out.iter_mut().zip(u) {
                *out = u as f32;
            }
            let mut turns = u.map(|u| (std::f64::consts::PI * u).sin_cos());
            for band in out[DIMENSIONS..].chunks_mut(2 * DIMENSIONS) {
                for (pair, (sin, cos)) in band.chunks_mut(2).zip(&mut turns) {
                    (pair[0], pair[1]) = (*sin as f32, *cos as f32);
                    (*sin, *cos) = (2.0 * *sin * *cos, *cos * *cos - *sin * *sin);
                }
            }
        });
        encoded
    }

    /// `C_in` of each kernel, with its noise.
    pub fn fan_ins(&self) -> Vec<f32> {
        self.rows.iter().map(|row| row[DIMENSIONS - 1] as f32).collect()
    }
}

/// Numbers that a coordinate becomes.
pub fn encoded_width(frequencies: usize) -> usize {
    DIMENSIONS + 2 * DIMENSIONS * frequencies
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sines_of_doubled_angles_are_exact_to_the_highest_frequency() {
        let coords = WeightCoords { rows: vec![[3.37, 13.219, 7.77, 22.3, 64.1, 31.9]] };
        let encoded = coords.encode(64.0, 16);
        let u = 13.219 / 64.1;
        for f in 0..16 {
            let angle = 2f64.powi(f) * std::f64::consts::PI * u;
            let at = DIMENSIONS + 2 * DIMENSIONS * f as usize + 2;
            assert!((f64::from(encoded[at]) - angle.sin()).abs() < 1e-6, "frequency {f}");
            assert!((f64::from(encoded[at + 1]) - angle.cos()).abs() < 1e-6, "frequency {f}");
        }
    }

    #[test]
    fn noise_moves_only_what_it_should_by_at_most_half() {
        let spec = TensorSpec { name: "w".into(), shape: vec![4, 3, 3, 3] };
        let plain = WeightCoords::of(2, 6, &spec);
        assert_eq!((plain.rows.len(), plain.rows[5]), (12, [2.0, 1.0, 2.0, 6.0, 4.0, 3.0]));
        let mut noisy = plain.clone();
        noisy.jitter(1.0, NoiseOn::Channels, &mut kiln_core::random_stream(0, "test", 0));
        for (a, b) in plain.rows.iter().zip(&noisy.rows) {
            assert!((1..3).all(|d| a[d] != b[d] && (a[d] - b[d]).abs() <= 0.5));
            assert!([0, 3, 4, 5].iter().all(|&d| a[d] == b[d]));
        }
    }
}
