//! Dropout.

use burn::config::Config;
use burn::module::{Flag, Module, Param};
use burn::tensor::{Device, Distribution, Int, Tensor};
use kiln_ops::dropout;

use crate::init::StepDraws;

/// Configuration of a [`Dropout`].
#[derive(Config, Debug)]
pub struct DropoutConfig {
    /// The probability that an element is dropped.
    pub prob: f64,
}

impl DropoutConfig {
    /// The layer.
    ///
    /// # Panics
    /// When the probability is not in `[0, 1)`.
    pub fn init(&self) -> Dropout {
        assert!((0.0..1.0).contains(&self.prob), "dropout needs a probability in [0, 1), not {}", self.prob);
        Dropout { prob: self.prob, training: Param::from_bool(true) }
    }
}

/// Sets elements to 0 at random and multiplies the others by `1 / (1 - prob)`, on autodiff devices; elsewhere
/// the identity.
///
/// In a step of [`train`](crate::train) the seed of every pass follows from that of the step, whatever other threads do;
/// elsewhere it comes from the device's generator, so that a seeded device repeats it.
#[derive(Module, Debug)]
pub struct Dropout {
    /// The probability that an element is dropped.
    pub prob: f64,
    /// Whether the layer drops anything; cleared when a module is frozen.
    pub training: Param<Flag>,
}

impl Dropout {
    /// The input with elements dropped.
    ///
    /// # Shapes
    /// - input, output: any
    pub fn forward<const D: usize>(&self, input: Tensor<D>) -> Tensor<D> {
        let device = input.device();
        if !self.training.is_enabled() || !device.is_autodiff() || self.prob == 0.0 {
            return input;
        }
        let seed = StepDraws::next().unwrap_or_else(|| drawn_from(&device));
        dropout(input, self.prob, seed)
    }
}

/// A seed from the device's generator.
fn drawn_from(device: &Device) -> u64 {
    // Below 2³⁰, which every device's integers can hold.
    let halves = Tensor::<1, Int>::random([2], Distribution::Uniform(0.0, 2f64.powi(30)), device);
    let halves = halves.into_data().iter::<u64>().collect::<Vec<_>>();
    halves[0] << 32 | halves[1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Module;
    use burn::nn;

    #[derive(Module, Debug)]
    struct Net {
        dropout: Dropout,
    }

    fn values(x: Tensor<2>) -> Vec<f32> {
        x.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn it_drops_on_autodiff_devices_unless_frozen() {
        let dropout = DropoutConfig::new(0.5).init();
        let device = Device::flex();
        let ones = Tensor::<2>::ones([30, 30], &device);
        assert_eq!(values(dropout.forward(ones.clone())), values(ones));
        let ones = Tensor::<2>::ones([30, 30], &device.autodiff());
        let dropped = values(dropout.forward(ones.clone()));
        assert!(dropped.iter().all(|&x| x == 0.0 || x == 2.0));
        let count = dropped.iter().filter(|&&x| x == 0.0).count();
        assert!((350..550).contains(&count), "{count} of 900");
        assert_eq!(values(dropout.clone().freeze().forward(ones.clone())), values(ones.clone()));
        assert_eq!(values(DropoutConfig::new(0.0).init().forward(ones.clone())), values(ones));
    }

    #[test]
    fn it_is_configured_and_frozen_as_burns() {
        let ours = DropoutConfig::new(0.25).init();
        let burns = nn::DropoutConfig::new(0.25).init();
        assert_eq!(ours.prob, burns.prob);
        assert_eq!(ours.training.is_enabled(), burns.training.is_enabled());
        let (ours, burns) = (Net { dropout: ours }.freeze(), burns.freeze());
        assert_eq!(ours.dropout.training.is_enabled(), burns.training.is_enabled());
    }
}
