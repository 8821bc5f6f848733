//! Repeatable initial parameters.

use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use rand::{Rng, RngExt};

/// Held while something depends on the generator that all threads share.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Builds a module whose initial parameters depend on `rng` alone.
///
/// Burn draws a parameter when it is first used, from one generator that all threads share. Here the
/// generator is seeded and every parameter drawn at once, in the order of the module's fields, while no
/// other thread does the same; a thread that draws from Burn directly meanwhile would still disturb it.
///
/// ```
/// # use burn::{nn::LinearConfig, tensor::Device};
/// let cx = kiln_core::Context::new();
/// let layer = kiln_nn::initialise(&cx.device, &mut cx.rng("init", 0), |device| {
///     LinearConfig::new(4, 2).init(device)
/// });
/// ```
pub fn initialise<M: Module>(device: &Device, rng: &mut impl Rng, init: impl FnOnce(&Device) -> M) -> M {
    let _guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    device.seed(rng.random());
    let module = init(device);
    module.visit(&mut Draw);
    module
}

/// Seeds the generator that layers such as dropout draw from.
pub(crate) fn seed_device(device: &Device, rng: &mut impl Rng) {
    let _guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    device.seed(rng.random());
}

/// Looks at every parameter, which makes Burn draw it.
struct Draw;

impl ModuleVisitor for Draw {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        param.val();
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        param.val();
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        param.val();
    }
}

/// A module for tests, the same in every run.
#[cfg(test)]
pub(crate) fn test_module<M: Module>(init: impl FnOnce(&Device) -> M) -> M {
    initialise(&Device::flex(), &mut kiln_core::random_stream(0, "test", 0), init)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::LinearConfig;
    use kiln_core::random_stream;

    #[test]
    fn the_same_stream_gives_the_same_parameters_and_another_does_not() {
        let device = Device::flex();
        let weights = |seed| {
            let mut rng = random_stream(seed, "init", 0);
            let layer = initialise(&device, &mut rng, |device| LinearConfig::new(3, 2).init(device));
            layer.weight.val().into_data().try_to_vec::<f32>().unwrap()
        };
        assert_eq!(weights(1), weights(1));
        assert_ne!(weights(1), weights(2));
    }
}
