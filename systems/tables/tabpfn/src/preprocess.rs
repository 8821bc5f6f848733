//! From raw columns to the network's input, in the order of the paper's appendix: every column is scaled with its mean and
//! standard deviation, perhaps brought nearer to a normal distribution (Yeo-Johnson), and its outliers are drawn in; all
//! with what is seen of the labelled rows only. Missing values stay NaN, which the network reads as 0, the mean.

use kiln_data::Matrix;
use serde::{Deserialize, Serialize};

/// Scaled values are cut off here.
const LARGEST: f64 = 100.0;
/// Values further from the mean than so many standard deviations are outliers.
const SIGMAS: f64 = 4.0;
/// A column with a smaller variance has no Yeo-Johnson likelihood.
const TINIEST_VARIANCE: f64 = f64::MIN_POSITIVE;

/// Mean and standard deviation of the values that are there; `degrees` is taken from their number in the variance.
fn moments(values: impl Iterator<Item = f64> + Clone, degrees: f64) -> (f64, f64) {
    let present = || values.clone().filter(|x| !x.is_nan());
    let count = present().count() as f64;
    let mean = present().sum::<f64>() / count;
    let variance = present().map(|x| (x - mean).powi(2)).sum::<f64>() / (count - degrees);
    (mean, variance.sqrt())
}

/// Scaling to mean 0 and standard deviation 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ZScore {
    /// Mean of the labelled rows.
    pub mean: f64,
    /// Their standard deviation (with n - 1), and 1e-6.
    pub std: f64,
}

impl ZScore {
    /// Measures a column of the labelled rows. One that is present in a single row has the deviation 0.
    pub fn fit(column: &[f64]) -> Self {
        let (mean, std) = moments(column.iter().copied(), 1.0);
        Self { mean, std: if std.is_nan() { 1e-6 } else { std + 1e-6 } }
    }

    /// A scaled value, cut off at ±100.
    pub fn apply(&self, x: f64) -> f64 {
        ((x - self.mean) / self.std).clamp(-LARGEST, LARGEST)
    }
}

/// Whether a column has fewer than two different values.
pub fn is_constant(column: &[f64]) -> bool {
    let mut present = column.iter().filter(|x| !x.is_nan());
    present.next().is_none_or(|first| present.all(|x| x == first))
}

/// The power transform of Yeo and Johnson (2000), and the scaling of what it gives.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct YeoJohnson {
    /// The exponent.
    pub lambda: f64,
    /// Mean of the transformed labelled rows.
    pub mean: f64,
    /// Their standard deviation (with n); 1 for a constant column.
    pub std: f64,
}

impl YeoJohnson {
    /// Chooses the exponent of the greatest likelihood; `None` where the search or what it finds is not finite.
    pub fn fit(column: &[f64]) -> Option<Self> {
        let present: Vec<f64> = column.iter().copied().filter(|x| !x.is_nan()).collect();
        let lambda = brent(|lambda| -log_likelihood(&present, lambda))?;
        let transformed: Vec<f64> = present.iter().map(|&x| yeo_johnson(x, lambda)).collect();
        let (mean, std) = moments(transformed.iter().copied(), 0.0);
        let std = if std == 0.0 { 1.0 } else { std };
        [lambda, mean, std].iter().all(|x| x.is_finite()).then_some(Self { lambda, mean, std })
    }

    /// A transformed and scaled value; finite even where the power is not.
    pub fn apply(&self, x: f64) -> f64 {
        let scaled = (yeo_johnson(x, self.lambda) - self.mean) / self.std;
        scaled.clamp(-f64::from(f32::MAX), f64::from(f32::MAX))
    }
}

/// The Yeo-Johnson transform: ((x + 1)^λ - 1) / λ for x ≥ 0 and -((1 - x)^(2 - λ) - 1) / (2 - λ) below, with logarithms
/// where the divisor is 0.
pub fn yeo_johnson(x: f64, lambda: f64) -> f64 {
    // (e^(λ ln(1 + x)) - 1) / λ keeps its digits where λ is small.
    let power = |log: f64, exponent: f64| match exponent.abs() < f64::EPSILON {
        true => log,
        false => (exponent * log).exp_m1() / exponent,
    };
    match x >= 0.0 {
        true => power(x.ln_1p(), lambda),
        false => -power((-x).ln_1p(), 2.0 - lambda),
    }
}

/// The logarithm of the likelihood of a normal distribution behind the transform, up to a constant.
fn log_likelihood(values: &[f64], lambda: f64) -> f64 {
    let transformed: Vec<f64> = values.iter().map(|&x| yeo_johnson(x, lambda)).collect();
    let (_, std) = moments(transformed.iter().copied(), 0.0);
    let variance = std * std;
    if variance.is_nan() || variance < TINIEST_VARIANCE {
        return f64::NEG_INFINITY;
    }
    let jacobian: f64 = values.iter().map(|x| x.signum() * x.abs().ln_1p()).sum();
    -0.5 * values.len() as f64 * variance.ln() + (lambda - 1.0) * jacobian
}

/// The place of a minimum of `f` by Brent's method, from a bracket that grows out of (-2, 2) as SciPy's does; `None` where
/// there is no bracket.
fn brent(f: impl Fn(f64) -> f64) -> Option<f64> {
    const TOLERANCE: f64 = 1.48e-8;
    const GOLDEN: f64 = 0.381_966;
    const TINY: f64 = 1e-11;
    let [mut a, middle, mut b] = bracket(&f)?;
    let (mut x, mut w, mut v) = (middle, middle, middle);
    let (mut fx, mut fw, mut fv) = (f(x), f(x), f(x));
    if a > b {
        std::mem::swap(&mut a, &mut b);
    }
    let (mut step, mut before) = (0.0f64, 0.0f64);
    for _ in 0..500 {
        let tolerance = TOLERANCE * x.abs() + TINY;
        let centre = 0.5 * (a + b);
        if (x - centre).abs() < 2.0 * tolerance - 0.5 * (b - a) {
            break;
        }
        let golden = |x: f64| if x >= centre { a - x } else { b - x };
        if before.abs() <= tolerance {
            before = golden(x);
            step = GOLDEN * before;
        } else {
            // The minimum of the parabola through the three best points.
            let r = (x - w) * (fx - fv);
            let mut q = (x - v) * (fx - fw);
            let mut p = (x - v) * q - (x - w) * r;
            q = 2.0 * (q - r);
            if q > 0.0 {
                p = -p;
            }
            q = q.abs();
            let last = before;
            before = step;
            if p > q * (a - x) && p < q * (b - x) && p.abs() < (0.5 * q * last).abs() {
                step = p / q;
                let u = x + step;
                if u - a < 2.0 * tolerance || b - u < 2.0 * tolerance {
                    step = if centre >= x { tolerance } else { -tolerance };
                }
            } else {
                before = golden(x);
                step = GOLDEN * before;
            }
        }
        let u = if step.abs() < tolerance { x + tolerance.copysign(step) } else { x + step };
        let fu = f(u);
        if fu > fx {
            *(if u < x { &mut a } else { &mut b }) = u;
            if fu <= fw || w == x {
                (v, fv, w, fw) = (w, fw, u, fu);
            } else if fu <= fv || v == x || v == w {
                (v, fv) = (u, fu);
            }
        } else {
            *(if u >= x { &mut a } else { &mut b }) = x;
            (v, fv, w, fw, x, fx) = (w, fw, x, fx, u, fu);
        }
    }
    Some(x)
}

/// Three points of which the middle one is the lowest, downhill from -2 and 2.
fn bracket(f: &impl Fn(f64) -> f64) -> Option<[f64; 3]> {
    const GOLDEN: f64 = 1.618_034;
    const FURTHEST: f64 = 110.0;
    let (mut a, mut b) = (-2.0, 2.0);
    let (mut fa, mut fb) = (f(a), f(b));
    if fa < fb {
        (a, b, fa, fb) = (b, a, fb, fa);
    }
    let mut c = b + GOLDEN * (b - a);
    let mut fc = f(c);
    for _ in 0..1000 {
        if fc >= fb {
            return [fa, fb, fc].iter().any(|y| y.is_finite()).then_some([a, b, c]);
        }
        let (r, q) = ((b - a) * (fb - fc), (b - c) * (fb - fa));
        let divisor = q - r;
        let divisor = if divisor.abs() < 1e-21 { 2e-21 } else { 2.0 * divisor };
        let mut next = b - ((b - c) * q - (b - a) * r) / divisor;
        let limit = b + FURTHEST * (c - b);
        let mut fnext;
        if (next - c) * (b - next) > 0.0 {
            fnext = f(next);
            if fnext < fc {
                return Some([b, next, c]);
            }
            if fnext > fb {
                return Some([a, b, next]);
            }
            next = c + GOLDEN * (c - b);
            fnext = f(next);
        } else if (next - limit) * (limit - c) >= 0.0 {
            next = limit;
            fnext = f(next);
        } else if (next - limit) * (c - next) > 0.0 {
            fnext = f(next);
            if fnext < fc {
                (b, c) = (c, next);
                next = c + GOLDEN * (c - b);
                (fb, fc) = (fc, fnext);
                fnext = f(next);
            }
        } else {
            next = c + GOLDEN * (c - b);
            fnext = f(next);
        }
        (a, b, c) = (b, c, next);
        (fa, fb, fc) = (fb, fc, fnext);
    }
    None
}

/// The band outside which values are drawn in.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct OutlierRule {
    /// Values below are outliers.
    pub lower: f64,
    /// Values above are outliers.
    pub upper: f64,
}

impl OutlierRule {
    /// Mean ± 4 standard deviations of the labelled rows that are not themselves outside that band.
    pub fn fit(column: &[f64]) -> Self {
        let band = |values: &mut dyn Iterator<Item = f64>| {
            let values: Vec<f64> = values.collect();
            let (mean, std) = moments(values.iter().copied(), 1.0);
            let std = if std.is_nan() { 0.0 } else { std };
            Self { lower: mean - SIGMAS * std, upper: mean + SIGMAS * std }
        };
        let first = band(&mut column.iter().copied());
        band(&mut column.iter().copied().filter(|&x| !(x < first.lower || x > first.upper)))
    }

    /// The value itself within the band, and logarithmically near its edge outside.
    pub fn apply(&self, x: f64) -> f64 {
        if x.is_nan() {
            return x;
        }
        let x = x.max(self.lower - x.abs().ln_1p());
        x.min(self.upper + x.abs().ln_1p())
    }
}

/// What the columns go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Scaling and outliers only
    None,
    /// The power transform in between
    Power,
}

/// The steps of one column.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Steps {
    column: usize,
    scale: ZScore,
    power: Option<YeoJohnson>,
    outliers: OutlierRule,
}

/// Everything that happens to a table before the network sees it, as measured on the labelled rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Preprocessor {
    steps: Vec<Steps>,
    max_features: usize,
}

impl Preprocessor {
    /// Measures the labelled rows `[rows, columns]`; `max_features` is the width of the network's input.
    ///
    /// # Panics
    /// When more columns vary than the network takes.
    pub fn fit(labelled: &Matrix, mode: Mode, max_features: usize) -> Self {
        let steps = (0..labelled.columns).filter_map(|column| {
            let mut values = labelled.column(column);
            let scale = ZScore::fit(&values);
            values.iter_mut().for_each(|x| *x = scale.apply(*x));
            if is_constant(&values) {
                return None;
            }
            let power = match mode {
                Mode::None => None,
                Mode::Power => YeoJohnson::fit(&values),
            };
            if let Some(power) = &power {
                values.iter_mut().for_each(|x| *x = power.apply(*x));
            }
            Some(Steps { column, scale, power, outliers: OutlierRule::fit(&values) })
        });
        let steps: Vec<Steps> = steps.collect();
        assert!(steps.len() <= max_features, "the network takes {max_features} columns, not {}", steps.len());
        Self { steps, max_features }
    }

    /// Which columns of the table are used: those that vary.
    pub fn columns(&self) -> Vec<usize> {
        self.steps.iter().map(|steps| steps.column).collect()
    }

    /// The rows as the network wants them, apart from rotation and padding: `[rows, used columns]`.
    pub fn apply(&self, table: &Matrix) -> Matrix {
        // Few columns weigh as much as many.
        let weight = self.max_features as f64 / self.steps.len() as f64;
        let value = |row: usize, steps: &Steps| {
            let x = steps.scale.apply(table.at(row, steps.column));
            let x = steps.power.map_or(x, |power| power.apply(x));
            weight * steps.outliers.apply(x)
        };
        let values = (0..table.rows).flat_map(|row| self.steps.iter().map(move |steps| value(row, steps)));
        Matrix::new(table.rows, self.steps.len(), values.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn assert_near(found: f64, expected: f64, tolerance: f64) {
        assert!((found - expected).abs() <= tolerance, "{found}, should be {expected}");
    }

    #[test]
    fn scaling_uses_n_minus_1_and_cuts_off_at_100() {
        let scale = ZScore::fit(&[1.0, 3.0, f64::NAN]);
        assert_near(scale.apply(3.0), 1.0 / (2f64.sqrt() + 1e-6), 1e-12);
        assert_eq!((scale.apply(1e9), scale.apply(-1e9)), (100.0, -100.0));
        assert!(scale.apply(f64::NAN).is_nan());
    }

    #[test]
    fn columns_without_two_values_are_constant() {
        assert!(is_constant(&[2.0, f64::NAN, 2.0]) && is_constant(&[f64::NAN]) && is_constant(&[]));
        assert!(!is_constant(&[2.0, f64::NAN, 1.0]));
    }

    #[test]
    fn yeo_johnson_is_the_identity_at_1_and_logarithmic_at_0_and_2() {
        for x in [-3.0, -0.5, 0.0, 0.25, 7.0] {
            assert_near(yeo_johnson(x, 1.0), x, 1e-14);
        }
        assert_near(yeo_johnson(3.0, 0.0), 4f64.ln(), 1e-14);
        assert_near(yeo_johnson(-3.0, 2.0), -4f64.ln(), 1e-14);
        assert_near(yeo_johnson(3.0, 1e-12), 4f64.ln(), 1e-10);
        assert_near(yeo_johnson(3.0, 2.0), (16.0 - 1.0) / 2.0, 1e-12);
        assert_near(yeo_johnson(-3.0, 0.5), -(4f64.powf(1.5) - 1.0) / 1.5, 1e-12);
    }

    #[test]
    fn the_search_finds_minima_inside_and_outside_the_first_bracket() {
        for minimum in [-30.0, -1.0, 0.3, 25.0] {
            assert_near(brent(|x| (x - minimum).powi(2) + 1.0).unwrap(), minimum, 1e-6);
            assert_near(brent(|x| (x - minimum).abs().powf(1.5)).unwrap(), minimum, 1e-5);
        }
        assert_eq!(brent(|_| f64::INFINITY), None);
    }

    #[test]
    fn columns_that_have_no_power_transform_stay_as_they_are() {
        assert_eq!(YeoJohnson::fit(&[1.0, 1.0, 1.0]), None);
        assert_eq!(YeoJohnson::fit(&[f64::NAN]), None);
        let far = YeoJohnson { lambda: 500.0, mean: 0.0, std: 1.0 };
        assert!(far.apply(100.0).is_finite());
    }

    #[test]
    fn outliers_are_drawn_in_and_the_rest_left_alone() {
        let mut column: Vec<f64> = (0..100).map(|i| f64::from(i % 10)).collect();
        column.push(1000.0);
        let rule = OutlierRule::fit(&column);
        assert!(rule.upper < 20.0, "{rule:?}");
        assert_eq!(rule.apply(5.0), 5.0);
        assert_near(rule.apply(1000.0), rule.upper + 1001f64.ln(), 1e-12);
        assert_near(rule.apply(-1000.0), rule.lower - 1001f64.ln(), 1e-12);
        assert!(rule.apply(f64::NAN).is_nan());
    }

    #[test]
    fn constant_columns_are_left_out_and_few_columns_weigh_as_much_as_many() {
        let table = Matrix::from_columns(3, &[vec![5.0; 3], vec![1.0, 2.0, 3.0], vec![f64::NAN, 7.0, 9.0]]);
        let preprocessor = Preprocessor::fit(&table, Mode::None, 10);
        assert_eq!(preprocessor.columns(), [1, 2]);
        let applied = preprocessor.apply(&table);
        assert_near(applied.at(2, 0), 5.0 / (1.0 + 1e-6), 1e-9);
        assert!(applied.at(0, 1).is_nan());
    }
}
