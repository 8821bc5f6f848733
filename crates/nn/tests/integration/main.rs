//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod attention_layers;
mod burn_layers;
mod conv_layers;
mod functional;
mod weights;

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use kiln_core::random_stream;

/// Normal values, the same in every run. `Tensor::random` would take them from the generator that all threads share,
/// and so change what another test draws from it.
fn random<const D: usize>(name: &str, shape: [usize; D], device: &Device) -> Tensor<D> {
    let mut rng = random_stream(0, name, 0);
    let values = TensorData::random::<f32, _, _>(shape, Distribution::Normal(0.0, 1.0), &mut rng);
    Tensor::from_data(values, device)
}
