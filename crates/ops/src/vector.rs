//! Elementary functions that compile to vector code inside a loop, and the dispatch that chooses how wide.

/// Runs `kernel` compiled for the widest instruction set of this machine (AVX-512, AVX2 with FMA, NEON,
/// or the target's baseline), chosen at run time.
///
/// Only what is inlined into the closure profits: mark it and the functions it calls `#[inline(always)]`.
#[inline]
pub fn simd<R>(kernel: impl FnOnce() -> R) -> R {
    /// A closure may be left out of line; this call may not.
    struct Inlined<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Inlined<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    pulp::Arch::new().dispatch(Inlined(kernel))
}

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

/// The scalar product of two slices of equal length.
#[inline(always)]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let (a_body, a_tail) = a.as_chunks::<LANES>();
    let (b_body, b_tail) = b.as_chunks::<LANES>();
    let mut sums = [0.0f32; LANES];
    for (a, b) in a_body.iter().zip(b_body) {
        for lane in 0..LANES {
            sums[lane] = fma(a[lane], b[lane], sums[lane]);
        }
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            sums[lane] += sums[lane + width];
        }
        width /= 2;
    }
    a_tail.iter().zip(b_tail).fold(sums[0], |sum, (&a, &b)| fma(a, b, sum))
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

    #[test]
    fn dot_and_axpy_agree_with_plain_sums_for_every_tail() {
        for n in 0..40 {
            let a: Vec<f32> = (0..n).map(|i| i as f32 * 0.25 - 3.0).collect();
            let b: Vec<f32> = (0..n).map(|i| 1.0 - i as f32 * 0.125).collect();
            let exact: f32 = a.iter().zip(&b).map(|(a, b)| a * b).sum();
            assert!((dot(&a, &b) - exact).abs() <= 1e-4 * exact.abs().max(1.0));
            let mut y = b.clone();
            axpy(2.0, &a, &mut y);
            assert!(y.iter().zip(a.iter().zip(&b)).all(|(&y, (&a, &b))| y == 2.0 * a + b));
        }
    }
}
