//! What can be sent, and how it is reduced.

use std::fmt;

use clap::ValueEnum;
use half::{bf16, f16};

#[cfg(target_endian = "big")]
compile_error!("messages are little-endian, and ranks send what lies in memory");

/// How the values of all ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum)]
pub enum Op {
    /// The sum; whole numbers wrap.
    Sum,
    /// The largest; a NaN on any rank stays.
    Max,
    /// The smallest; a NaN on any rank stays.
    Min,
    /// The product; whole numbers wrap.
    Prod,
    /// The sum divided by the number of ranks; whole numbers are rounded towards zero.
    Avg,
}

impl Op {
    pub(crate) const ALL: [Self; 5] = [Self::Sum, Self::Max, Self::Min, Self::Prod, Self::Avg];
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Sum => "sum",
            Op::Max => "max",
            Op::Min => "min",
            Op::Prod => "prod",
            Op::Avg => "avg",
        })
    }
}

/// The types that travel between ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ElementKind {
    /// [`f32`]
    F32 = 1,
    /// [`f64`]
    F64,
    /// [`f16`]
    F16,
    /// [`bf16`]
    Bf16,
    /// [`i32`]
    I32,
    /// [`i64`]
    I64,
    /// [`u8`]
    U8,
    /// [`u32`]
    U32,
    /// [`u64`]
    U64,
}

impl ElementKind {
    pub(crate) const ALL: [Self; 9] =
        [Self::F32, Self::F64, Self::F16, Self::Bf16, Self::I32, Self::I64, Self::U8, Self::U32, Self::U64];
}

impl fmt::Display for ElementKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F64 => "f64",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
            Self::I32 => "i32",
            Self::I64 => "i64",
            Self::U8 => "u8",
            Self::U32 => "u32",
            Self::U64 => "u64",
        })
    }
}

/// A number that ranks exchange: `f32 f64 f16 bf16 i32 i64 u8 u32 u64`.
///
/// Reductions compute in [`Wide`](Self::Wide), which is `f32` for the half precisions and the type itself for
/// the others, and round once at the end of a reduction step.
pub trait Element: bytemuck::Pod + Send + Sync + fmt::Debug + PartialEq + 'static {
    /// The type as a value.
    const KIND: ElementKind;
    /// What sums are kept in.
    type Wide: Copy + Send + Sync + 'static;
    /// The value as an accumulator.
    fn widen(self) -> Self::Wide;
    /// The accumulator rounded.
    fn narrow(wide: Self::Wide) -> Self;
    /// `a + b`
    fn sum(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// `a · b`
    fn product(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// The larger, or a NaN.
    fn larger(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// The smaller, or a NaN.
    fn smaller(a: Self::Wide, b: Self::Wide) -> Self::Wide;
    /// `a / ranks`
    fn share(a: Self::Wide, ranks: usize) -> Self::Wide;
}

macro_rules! float {
    ($type:ty, $kind:ident, $wide:ty, $widen:expr, $narrow:expr) => {
        impl Element for $type {
            const KIND: ElementKind = ElementKind::$kind;
            type Wide = $wide;
            #[inline(always)]
            fn widen(self) -> $wide {
                $widen(self)
            }
            #[inline(always)]
            fn narrow(wide: $wide) -> Self {
                $narrow(wide)
            }
            #[inline(always)]
            fn sum(a: $wide, b: $wide) -> $wide {
                a + b
            }
            #[inline(always)]
            fn product(a: $wide, b: $wide) -> $wide {
                a * b
            }
            #[inline(always)]
            fn larger(a: $wide, b: $wide) -> $wide {
                if a >= b || a.is_nan() { a } else { b }
            }
            #[inline(always)]
            fn smaller(a: $wide, b: $wide) -> $wide {
                if a <= b || a.is_nan() { a } else { b }
            }
            #[inline(always)]
            fn share(a: $wide, ranks: usize) -> $wide {
                a / ranks as $wide
            }
        }
    };
}

macro_rules! whole {
    ($type:ty, $kind:ident) => {
        impl Element for $type {
            const KIND: ElementKind = ElementKind::$kind;
            type Wide = $type;
            #[inline(always)]
            fn widen(self) -> $type {
                self
            }
            #[inline(always)]
            fn narrow(wide: $type) -> Self {
                wide
            }
            #[inline(always)]
            fn sum(a: $type, b: $type) -> $type {
                a.wrapping_add(b)
            }
            #[inline(always)]
            fn product(a: $type, b: $type) -> $type {
                a.wrapping_mul(b)
            }
            #[inline(always)]
            fn larger(a: $type, b: $type) -> $type {
                a.max(b)
            }
            #[inline(always)]
            fn smaller(a: $type, b: $type) -> $type {
                a.min(b)
            }
            #[inline(always)]
            fn share(a: $type, ranks: usize) -> $type {
                // In 128 bits, since 300 ranks are not a `u8`.
                (a as i128 / ranks as i128) as $type
            }
        }
    };
}

float!(f32, F32, f32, |x| x, |x| x);
float!(f64, F64, f64, |x| x, |x| x);
float!(f16, F16, f32, f16::to_f32, f16::from_f32);
float!(bf16, Bf16, f32, bf16::to_f32, bf16::from_f32);
whole!(i32, I32);
whole!(i64, I64);
whole!(u8, U8);
whole!(u32, U32);
whole!(u64, U64);

/// `into[i] = into[i] ∘ other[i]`, one step of a reduction.
pub(crate) fn combine<T: Element>(into: &mut [T], other: &[T], op: Op) {
    pairs(into, other, op, |a, b, f| T::narrow(f(a.widen(), b.widen())));
}

/// `into[i] = other[i] ∘ into[i]`: the same where the other side comes first.
pub(crate) fn combine_before<T: Element>(into: &mut [T], other: &[T], op: Op) {
    pairs(into, other, op, |a, b, f| T::narrow(f(b.widen(), a.widen())));
}

/// `sum[i] = sum[i] ∘ other[i]` without rounding to `T`.
pub(crate) fn accumulate<T: Element>(sum: &mut [T::Wide], other: &[T], op: Op) {
    pairs(sum, other, op, |a, b, f| f(a, b.widen()));
}

/// Applies `step` to every pair, with the function of `op` chosen outside of the loop.
#[inline(always)]
fn pairs<A: Copy, T: Element>(
    into: &mut [A],
    other: &[T],
    op: Op,
    step: impl Fn(A, T, fn(T::Wide, T::Wide) -> T::Wide) -> A,
) {
    debug_assert_eq!(into.len(), other.len());
    macro_rules! each {
        ($f:expr) => {
            for (a, &b) in into.iter_mut().zip(other) {
                *a = step(*a, b, $f);
            }
        };
    }
    match op {
        Op::Sum | Op::Avg => each!(T::sum),
        Op::Max => each!(T::larger),
        Op::Min => each!(T::smaller),
        Op::Prod => each!(T::product),
    }
}

/// Divides by the number of ranks where the operation is the average.
pub(crate) fn finish<T: Element>(values: &mut [T], op: Op, ranks: usize) {
    if op == Op::Avg {
        for value in values {
            *value = T::narrow(T::share(value.widen(), ranks));
        }
    }
}

/// The accumulators rounded into `into`, divided by the number of ranks where the operation is the average.
pub(crate) fn finish_wide<T: Element>(sum: &[T::Wide], into: &mut [T], op: Op, ranks: usize) {
    for (value, &wide) in into.iter_mut().zip(sum) {
        *value = T::narrow(if op == Op::Avg { T::share(wide, ranks) } else { wide });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_on_either_side_stays() {
        for op in [Op::Sum, Op::Max, Op::Min, Op::Prod] {
            for (a, b) in [(f32::NAN, 1.0), (1.0, f32::NAN)] {
                let mut into = [a];
                combine(&mut into, &[b], op);
                assert!(into[0].is_nan(), "{op} {a} {b}");
            }
        }
    }

    #[test]
    fn half_precision_sums_are_rounded_once() {
        // 2048 + 1 + 1 in f16: each single addition is lost, the sum in f32 is not.
        let mut sum = [2048.0f32];
        accumulate(&mut sum, &[f16::ONE], Op::Sum);
        accumulate(&mut sum, &[f16::ONE], Op::Sum);
        let mut into = [f16::ZERO];
        finish_wide(&sum, &mut into, Op::Sum, 3);
        assert_eq!(into[0], f16::from_f32(2050.0));
    }

    #[test]
    fn averages_of_whole_numbers_round_towards_zero_even_over_many_ranks() {
        let mut values = [250u8];
        finish(&mut values, Op::Avg, 300);
        assert_eq!(values, [0]);
        let mut values = [-7i64];
        finish(&mut values, Op::Avg, 2);
        assert_eq!(values, [-3]);
    }
}
