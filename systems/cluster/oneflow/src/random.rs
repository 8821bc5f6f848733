//! Random numbers that do not depend on how a tensor is split.

use burn::backend::ir::{FloatOperationIr as Float, NumericOperationIr as Numeric, OperationIr};
use burn::tensor::{DType, Distribution, TensorData};
use burn_flex::FlexTensor;

use crate::sbp::Region;

/// The distribution that an operation draws from.
pub(crate) fn random(operation: &OperationIr) -> Option<Distribution> {
    match operation {
        OperationIr::Float(_, Float::Random(op)) => Some(op.distribution),
        OperationIr::NumericInt(_, Numeric::IntRandom(op)) => Some(op.distribution),
        _ => None,
    }
}

/// Mixes numbers into one, as SplitMix64 does.
fn mixed(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

pub(crate) fn key(seed: u64, tensor: u64, piece: u64) -> u64 {
    mixed(mixed(mixed(seed) ^ tensor) ^ piece)
}

/// Random numbers that depend on their place in the whole tensor, so that every way to split it draws the same.
pub(crate) fn draw(
    shape: &[usize],
    dtype: DType,
    region: &Region,
    distribution: Distribution,
    key: u64,
) -> FlexTensor {
    let uniform = |number: u64| (mixed(key ^ number) >> 11) as f64 / (1u64 << 53) as f64;
    let one = |number: u64| match distribution {
        Distribution::Default => uniform(2 * number),
        Distribution::Uniform(low, high) => low + (high - low) * uniform(2 * number),
        Distribution::Bernoulli(share) => f64::from(u8::from(uniform(2 * number) < share)),
        // Box and Muller's method.
        Distribution::Normal(mean, deviation) => {
            let (radius, angle) = (1.0 - uniform(2 * number), uniform(2 * number + 1));
            mean + deviation * (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
        }
    };
    let mut index = region.start.clone();
    let mut values = Vec::with_capacity(region.elements());
    for _ in 0..region.elements() {
        let number = index.iter().zip(shape).fold(0u64, |at, (&i, &size)| at * size as u64 + i as u64);
        values.push(one(number));
        for axis in (0..index.len()).rev() {
            index[axis] += 1;
            if index[axis] < region.start[axis] + region.size[axis] {
                break;
            }
            index[axis] = region.start[axis];
        }
    }
    FlexTensor::from_data(TensorData::new(values, region.size.clone()).convert_dtype(dtype))
}
