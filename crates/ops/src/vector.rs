//! Elementary functions that compile to vector code inside a loop; see [`simd`](crate::simd()).

/// `a * b + c` in one rounding where the machine can, in two where that would call a library function.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` to within 2 ulp; results below the smallest normal number are 0, NaN stays NaN.
///
/// Cody–Waite reduction `x = n ln 2 + r`, then the Taylor polynomial of degree 7 on `|r| ≤ ln 2 / 2`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to the nearest integer
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const LOWEST: f32 = -87.336_54; // ln of the smallest normal number
    const HIGHEST: f32 = 88.722_84; // ln of the largest finite number

    let shifted = fma(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma(n, -LN2_LOW, fma(n, -LN2_HIGH, x));
    let mut p = 1.0 / 5040.0;
    p = fma(p, r, 1.0 / 720.0);
    p = fma(p, r, 1.0 / 120.0);
    p = fma(p, r, 1.0 / 24.0);
    p = fma(p, r, 1.0 / 6.0);
    p = fma(p, r, 0.5);
    p = fma(p, r, 1.0);
    p = fma(p, r, 1.0);
    // 2ⁿ in two factors: n = 128 is not representable in one.
    let n = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = n >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) << 23) as u32);
    let value = p * power(half) * power(n.wrapping_sub(half));
    if x < LOWEST {
        0.0
    } else if x > HIGHEST {
        f32::INFINITY
    } else {
        value
    }
}

/// The logistic function `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// `tanh x` to within 3 ulp.
///
/// An odd minimax polynomial near 0, where `1 - 2 / (e^2x + 1)` would cancel; that form elsewhere.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    const NEAR_ZERO: f32 = 0.625;
    let t = x * x;
    let mut p = -5.621_573_4e-3;
    p = fma(p, t, 2.055_686_4e-2);
    p = fma(p, t, -5.371_058_3e-2);
    p = fma(p, t, 1.333_099_8e-1);
    p = fma(p, t, -3.333_325_5e-1);
    let near = fma(x * t, p, x);
    let size = x.abs();
    let far = (1.0 - 2.0 / (exp(2.0 * size) + 1.0)).copysign(x);
    // Written so that NaN takes the first branch and stays NaN.
    if size >= NEAR_ZERO { far } else { near }
}

/// The error function to within 6 ulp, never beyond ±1.
///
/// `x P(x²) / Q(x²)` with a minimax ratio of polynomials up to where erf rounds to 1.
#[inline(always)]
pub fn erf(x: f32) -> f32 {
    const ONE: f32 = 3.95;
    // NaN stays NaN, as it would not with min and max.
    let x = if x > ONE { ONE } else { x };
    let x = if x < -ONE { -ONE } else { x };
    let t = x * x;
    let mut p = 2.025_871_5e-6;
    p = fma(p, t, 2.846_811_8e-4);
    p = fma(p, t, 3.808_06e-3);
    p = fma(p, t, 5.287_515_3e-2);
    p = fma(p, t, 1.915_485_2e-1);
    p = fma(p, t, std::f32::consts::FRAC_2_SQRT_PI);
    let mut q = 3.783_107e-5;
    q = fma(q, t, 1.170_692_5e-3);
    q = fma(q, t, 1.505_490_3e-2);
    q = fma(q, t, 1.145_588_3e-1);
    q = fma(q, t, 5.030_881e-1);
    q = fma(q, t, 1.0);
    let y = x * p / q;
    let y = if y > 1.0 { 1.0 } else { y };
    if y < -1.0 { -1.0 } else { y }
}

/// The natural logarithm of a normal positive number to within 2 ulp; of 0 it is -∞, of ∞ it is ∞, of a
/// negative number NaN.
#[inline(always)]
pub fn ln(x: f32) -> f32 {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // x = 2ⁿ (1 + f) with 1 + f in [√½, √2)
    let bits = x.to_bits().wrapping_sub(SQRT_HALF);
    let n = ((bits as i32) >> 23) as f32;
    let f = f32::from_bits((bits & 0x007f_ffff).wrapping_add(SQRT_HALF)) - 1.0;
    // ln(1 + f) = f - f²/2 + f³ p(f)
    let mut p = 7.037_288e-2;
    p = fma(p, f, -1.151_442_8e-1);
    p = fma(p, f, 1.167_706_3e-1);
    p = fma(p, f, -1.242_017_1e-1);
    p = fma(p, f, 1.424_932e-1);
    p = fma(p, f, -1.666_805_7e-1);
    p = fma(p, f, 2.000_071_5e-1);
    p = fma(p, f, -2.499_999_4e-1);
    p = fma(p, f, 3.333_333e-1);
    let square = f * f;
    let tail = fma(n, LN2_LOW, fma(f * square, p, -0.5 * square));
    let value = fma(n, LN2_HIGH, f + tail);
    if x == f32::INFINITY {
        x
    } else if x > 0.0 {
        value
    } else if x == 0.0 {
        f32::NEG_INFINITY
    } else {
        f32::NAN
    }
}

/// `ln(1 + x)` for `x ≥ 0` to within 3 ulp.
#[inline(always)]
pub fn ln_1p(x: f32) -> f32 {
    // What rounding 1 + x loses is added to first order.
    let rounded = 1.0 + x;
    let lost = x - (rounded - 1.0);
    ln(rounded) + lost / rounded
}

/// `ln(1 + e^x)` without overflow.
#[inline(always)]
pub fn softplus(x: f32) -> f32 {
    x.max(0.0) + ln_1p(exp(-x.abs()))
}

/// Results that a reduction keeps side by side, so that it compiles to vector code in which no operation waits
/// for the one before it.
const STRANDS: usize = 64;

/// Combines `f` of all elements with `join`, in an order that depends on their number alone.
#[inline(always)]
pub fn fold(values: &[f32], start: f32, f: impl Fn(f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let (body, tail) = values.as_chunks::<STRANDS>();
    let mut strands = [start; STRANDS];
    for chunk in body {
        for strand in 0..STRANDS {
            strands[strand] = join(strands[strand], f(chunk[strand]));
        }
    }
    let last = padded::<STRANDS>(tail);
    for strand in 0..STRANDS {
        let with_last = join(strands[strand], f(last[strand]));
        strands[strand] = if strand < tail.len() { with_last } else { strands[strand] };
    }
    joined(strands, join)
}

/// The sum of `term(x)` over a slice, in an order that depends on its length alone.
#[inline(always)]
pub fn sum_of(values: &[f32], term: impl Fn(f32) -> f32) -> f32 {
    fold(
        values,
        0.0,
        term,
        #[inline(always)]
        |a, b| a + b,
    )
}

/// The scalar product of two slices of equal length, for short ones.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    dot_in_strands::<16>(a, b)
}

/// The scalar product of two slices of equal length, for those of hundreds of elements.
#[inline(always)]
pub fn long_dot(a: &[f32], b: &[f32]) -> f32 {
    dot_in_strands::<STRANDS>(a, b)
}

#[inline(always)]
fn dot_in_strands<const N: usize>(a: &[f32], b: &[f32]) -> f32 {
    let (a_body, a_tail) = a.as_chunks::<N>();
    let (b_body, b_tail) = b.as_chunks::<N>();
    let mut sums = [0.0f32; N];
    for (a, b) in a_body.iter().zip(b_body) {
        for strand in 0..N {
            sums[strand] = fma(a[strand], b[strand], sums[strand]);
        }
    }
    let (a_last, b_last) = (padded::<N>(a_tail), padded::<N>(b_tail));
    for strand in 0..N {
        sums[strand] = fma(a_last[strand], b_last[strand], sums[strand]);
    }
    joined(
        sums,
        #[inline(always)]
        |a, b| a + b,
    )
}

/// What is left of a slice, with zeros after it. Strands are only ever named by constants of an unrolled loop: an index
/// that depends on the length of the tail would keep them in memory instead of registers.
#[inline(always)]
fn padded<const N: usize>(tail: &[f32]) -> [f32; N] {
    let mut padded = [0.0; N];
    padded[..tail.len()].copy_from_slice(tail);
    padded
}

/// Combines the strands, a multiple of 16 of them: first into 16, then halves at a time.
#[inline(always)]
fn joined<const N: usize>(strands: [f32; N], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut rest = [0.0; 16];
    rest.copy_from_slice(&strands[..16]);
    for strand in 16..N {
        rest[strand % 16] = join(rest[strand % 16], strands[strand]);
    }
    for strand in 0..8 {
        rest[strand] = join(rest[strand], rest[strand + 8]);
    }
    for strand in 0..4 {
        rest[strand] = join(rest[strand], rest[strand + 4]);
    }
    join(join(rest[0], rest[2]), join(rest[1], rest[3]))
}

/// Asks for a slice that will be read soon, so that it is in the cache by then; a hint without effect on results.
#[inline(always)]
pub fn prefetch(slice: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    for line in slice.chunks(64 / size_of::<f32>()) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        #[allow(unsafe_code)]
        // SAFETY: SSE, which has the instruction, is part of every x86-64; the address lies in the slice, and nothing is
        // read or written as far as the program can tell.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = slice;
}

/// `y += a x`.
#[inline(always)]
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, &x) in y.iter_mut().zip(x) {
        *y = fma(a, x, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd;

    fn ulps(a: f32, b: f32) -> u32 {
        a.to_bits().abs_diff(b.to_bits())
    }

    #[test]
    fn exp_is_within_two_ulp_over_its_range() {
        let points: Vec<f32> = (0..200_000).map(|i| -87.3 + i as f32 * (176.0 / 200_000.0)).collect();
        let mut values = points.clone();
        simd(
            #[inline(always)]
            || values.iter_mut().for_each(|v| *v = exp(*v)),
        );
        for (x, y) in points.into_iter().zip(values) {
            let exact = f64::from(x).exp() as f32;
            assert!(ulps(y, exact) <= 2, "exp({x}) = {y}, should be {exact}");
        }
    }

    #[test]
    fn exp_is_right_at_the_edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-180.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
    }

    /// The largest distance of `f` from the exact `g` over `lowest..highest`, in ulp.
    fn worst(f: fn(f32) -> f32, g: impl Fn(f64) -> f64, lowest: f32, highest: f32) -> u32 {
        let points = (0..=100_000).map(|i| lowest + (highest - lowest) * (i as f32 / 1e5));
        points.map(|x| ulps(f(x), g(x.into()) as f32)).max().unwrap()
    }

    #[test]
    fn elementary_functions_are_within_their_bounds() {
        assert!(worst(tanh, f64::tanh, 1e-3, 12.0) <= 3);
        assert!(worst(tanh, f64::tanh, -12.0, -1e-3) <= 3);
        assert!(worst(ln, f64::ln, 1e-30, 1e-3) <= 2);
        assert!(worst(ln, f64::ln, 1e-3, 100.0) <= 2);
        assert!(worst(ln, f64::ln, 100.0, 1e38) <= 2);
        assert!(worst(ln_1p, f64::ln_1p, 0.0, 3.0) <= 3);
        assert!(worst(sigmoid, |x| 1.0 / (1.0 + (-x).exp()), -80.0, 30.0) <= 4);
        assert!(worst(softplus, |x| x.max(0.0) + (-x.abs()).exp().ln_1p(), -80.0, 80.0) <= 4);
    }

    #[test]
    fn the_error_function_is_that_of_its_series() {
        // erf x = 2/√π Σ (-1)ⁿ x²ⁿ⁺¹ / (n! (2n + 1)), which f64 sums well up to 4.
        let series = |x: f64| {
            let mut term = x;
            let mut sum = x;
            for n in 1..120 {
                term *= -x * x / f64::from(n);
                sum += term / f64::from(2 * n + 1);
            }
            sum * 2.0 / std::f64::consts::PI.sqrt()
        };
        assert!(worst(erf, series, 1e-4, 4.2) <= 6);
        assert!(worst(erf, series, -4.2, -1e-4) <= 6);
        assert_eq!((erf(0.0), erf(10.0), erf(f32::NEG_INFINITY)), (0.0, 1.0, -1.0));
    }

    #[test]
    fn nan_stays_nan_and_infinities_have_their_limits() {
        assert!([tanh, erf, ln, sigmoid, softplus].iter().all(|f| f(f32::NAN).is_nan()));
        assert_eq!([f32::NEG_INFINITY, f32::INFINITY].map(tanh), [-1.0, 1.0]);
        assert_eq!([f32::NEG_INFINITY, f32::INFINITY].map(sigmoid), [0.0, 1.0]);
        assert_eq!([f32::NEG_INFINITY, f32::INFINITY].map(softplus), [0.0, f32::INFINITY]);
        assert_eq!([0.0, f32::INFINITY].map(ln), [f32::NEG_INFINITY, f32::INFINITY]);
        assert!(ln(-1.0).is_nan());
    }

    #[test]
    fn dot_and_axpy_agree_with_plain_sums_for_every_tail() {
        for n in 0..150 {
            let a: Vec<f32> = (0..n).map(|i| i as f32 * 0.25 - 3.0).collect();
            let b: Vec<f32> = (0..n).map(|i| 1.0 - i as f32 * 0.125).collect();
            let exact: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert!((dot(&a, &b) - exact).abs() <= 1e-4 * exact.abs().max(1.0));
            assert!((long_dot(&a, &b) - exact).abs() <= 1e-4 * exact.abs().max(1.0));
            assert_eq!(sum_of(&a, |x| 2.0 * x), 2.0 * a.iter().sum::<f32>());
            let mut y = b.clone();
            axpy(2.0, &a, &mut y);
            assert!(y.iter().zip(a.iter().zip(&b)).all(|(&y, (&a, &b))| y == 2.0 * a + b));
        }
    }
}
