//! How error falls with the number of recordings: a power law `a + b n^-c`.

use rand::{Rng, RngExt};
use serde::Serialize;

/// Exponents that are tried.
const EXPONENTS: std::ops::RangeInclusive<u32> = 1..=60;
/// Step between them.
const EXPONENT_STEP: f64 = 0.05;
/// Draws of the bootstrap.
const DRAWS: usize = 300;

/// The law, and what it says of more recordings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PowerLaw {
    /// The error that more recordings do not take away.
    pub a: f64,
    /// What one recording leaves above it.
    pub b: f64,
    /// How fast that falls.
    pub c: f64,
}

impl PowerLaw {
    /// The error with `n` recordings.
    pub fn at(&self, n: f64) -> f64 {
        self.a + self.b * n.powf(-self.c)
    }

    /// The law that lies nearest to points (recordings, error) in squares, with `a` and `b` at least 0; absent with fewer than
    /// three different numbers of recordings.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let mut sizes: Vec<f64> = points.iter().map(|&(n, _)| n).collect();
        sizes.sort_by(f64::total_cmp);
        sizes.dedup();
        if sizes.len() < 3 {
            return None;
        }
        let fits = EXPONENTS.map(|step| {
            let c = f64::from(step) * EXPONENT_STEP;
            let law = with_exponent(points, c);
            (points.iter().map(|&(n, error)| (law.at(n) - error).powi(2)).sum::<f64>(), law)
        });
        fits.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, law)| law)
    }
}

/// The best `a` and `b` for an exponent: a line over `n^-c`, or one of its ends.
fn with_exponent(points: &[(f64, f64)], c: f64) -> PowerLaw {
    let count = points.len() as f64;
    let mean =
        |of: &dyn Fn(f64, f64) -> f64| points.iter().map(|&(n, e)| of(n.powf(-c), e)).sum::<f64>() / count;
    let (x, y) = (mean(&|x, _| x), mean(&|_, y| y));
    let (xx, xy) = (mean(&|x, _| x * x), mean(&|x, y| x * y));
    let b = if xx > x * x { (xy - x * y) / (xx - x * x) } else { 0.0 };
    let a = y - b * x;
    match (a >= 0.0, b >= 0.0) {
        (true, true) => PowerLaw { a, b, c },
        (_, false) => PowerLaw { a: y.max(0.0), b: 0.0, c },
        (false, true) => PowerLaw { a: 0.0, b: (xy / xx).max(0.0), c },
    }
}

/// A 95 % interval of the law's error with `n` recordings: runs are drawn anew, as many of each size as there are.
pub fn interval(points: &[(f64, f64)], n: f64, rng: &mut impl Rng) -> Option<[f64; 2]> {
    let draws = (0..DRAWS).filter_map(|_| {
        let drawn: Vec<(f64, f64)> = points
            .iter()
            .map(|&(size, _)| {
                let same: Vec<&(f64, f64)> = points.iter().filter(|(other, _)| *other == size).collect();
                *same[rng.random_range(0..same.len())]
            })
            .collect();
        PowerLaw::fit(&drawn).map(|law| law.at(n))
    });
    crate::metrics::percentiles(draws.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_law_is_found_again() {
        let law = PowerLaw { a: 0.1, b: 0.8, c: 0.5 };
        let points: Vec<(f64, f64)> = [5.0, 10.0, 20.0, 40.0, 100.0].map(|n| (n, law.at(n))).into();
        let found = PowerLaw::fit(&points).unwrap();
        assert!(
            (found.a - law.a).abs() < 1e-6
                && (found.b - law.b).abs() < 1e-6
                && (found.c - law.c).abs() < 1e-9
        );
        let [low, high] = interval(&points, 1000.0, &mut kiln_core::random_stream(0, "law", 0)).unwrap();
        assert!((low - law.at(1000.0)).abs() < 1e-6 && (high - low).abs() < 1e-6);
        assert!(PowerLaw::fit(&points[..2]).is_none());
    }

    #[test]
    fn an_error_that_does_not_fall_is_constant() {
        let found = PowerLaw::fit(&[(1.0, 0.4), (2.0, 0.45), (4.0, 0.5)]).unwrap();
        assert!(found.b == 0.0 && (found.a - 0.45).abs() < 1e-9);
    }
}
