//! Dropout.

use burn::tensor::{Tensor, TensorData};
use burn_flex::FlexTensor;

use crate::blocks::{BLOCK, changed, in_place};
use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::simd;

/// Sets every element to 0 with the given probability and multiplies the others by `1 / (1 - probability)`
/// (Srivastava et al., JMLR 15, 2014).
///
/// Which elements these are depends on the seed and on their positions alone. Nothing is kept of them for the
/// backward pass, which draws them again.
///
/// # Shapes
/// - x, output: any
///
/// # Panics
/// When the probability is not in `[0, 1)`.
pub fn dropout<const D: usize>(x: Tensor<D>, probability: f64, seed: u64) -> Tensor<D> {
    assert!((0.0..1.0).contains(&probability), "dropout needs a probability in [0, 1), not {probability}");
    let dropout = Dropout::new(probability, seed);
    if !runs_natively(&x) {
        let mut factors = vec![1.0; x.shape().num_elements()];
        dropout.scale_all(&mut factors);
        let factors = TensorData::new(factors, x.shape());
        let factors = Tensor::from_data(factors, (&x.device(), x.dtype()));
        return x * factors;
    }
    Tensor::from_dispatch(apply(&dropout, [x.into_dispatch()]))
}

#[derive(Debug, Clone)]
struct Dropout {
    /// An element is dropped when its random bits are below.
    threshold: u32,
    /// What other elements are multiplied by.
    scale: f32,
    seed: u64,
}

impl Dropout {
    fn new(probability: f64, seed: u64) -> Self {
        let threshold = (probability * 2f64.powi(32)) as u32;
        Self { threshold, scale: (1.0 / (1.0 - probability)) as f32, seed }
    }

    /// Multiplies every element by 0 or by the scale.
    fn scale_all(&self, values: &mut [f32]) {
        in_place(values, 1, |first, values| self.scale_block(first, values));
    }

    /// Of elements from place `first` on, all in one block.
    fn scale_block(&self, first: usize, values: &mut [f32]) {
        let key = mix64(self.seed ^ mix64((first / BLOCK) as u64));
        let (low, high) = (key as u32, (key >> 32) as u32);
        simd(
            #[inline(always)]
            || {
                for (i, x) in ((first % BLOCK) as u32..).zip(values.iter_mut()) {
                    let factor = if mix32(i ^ low, high) < self.threshold { 0.0 } else { self.scale };
                    // A product, so that NaN stays.
                    *x *= factor;
                }
            },
        );
    }

    fn of(&self, x: &FlexTensor) -> FlexTensor {
        let values = changed(&floats(x), 1, |first, values| self.scale_block(first, values));
        tensor(values, x.layout().shape().clone())
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
fn mix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Random bits for position `x`: the finaliser of MurmurHash3 twice, with a key in between.
#[inline(always)]
fn mix32(x: u32, key: u32) -> u32 {
    finalise(finalise(x) ^ key)
}

#[inline(always)]
fn finalise(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
    let x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
    x ^ (x >> 16)
}

impl Function<1> for Dropout {
    type Saved = ();

    fn forward(&self, [x]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        (self.of(&x), ())
    }

    fn backward(&self, (): (), upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.of(&upstream))]
    }
}
