//! Repeatable initial parameters.

use std::cell::Cell;
use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use kiln_core::random_stream;
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

thread_local! {
    /// The seed of this thread's training step, and how often it was drawn from.
    static STEP: Cell<Option<(u64, u64)>> = const { Cell::new(None) };
}

/// While it lives, dropout on this thread draws from a stream of its own, whatever other threads do.
pub(crate) struct StepDraws(());

impl StepDraws {
    /// Starts the stream, and seeds the generator that layers draw from which know nothing of it.
    pub(crate) fn seeded(device: &Device, rng: &mut impl Rng) -> Self {
        let seed = rng.random();
        let _guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
        device.seed(seed);
        STEP.set(Some((seed, 0)));
        Self(())
    }

    /// The next seed of this thread's step; `None` outside of one.
    pub(crate) fn next() -> Option<u64> {
        let (seed, drawn) = STEP.get()?;
        STEP.set(Some((seed, drawn + 1)));
        Some(random_stream(seed, "dropout", drawn).random())
    }
}

impl Drop for StepDraws {
    fn drop(&mut self) {
        STEP.set(None);
    }
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

    #[test]
    fn a_step_draws_what_its_seed_says_while_other_threads_draw_too() {
        let device = Device::flex();
        let draw = |seed| {
            let _draws = StepDraws::seeded(&device, &mut random_stream(seed, "train", 0));
            [StepDraws::next(), StepDraws::next()]
        };
        let alone = draw(1);
        let beside = std::thread::scope(|scope| {
            let other = scope.spawn(|| draw(2));
            let mine = draw(1);
            assert_ne!(other.join().unwrap(), mine);
            mine
        });
        assert_eq!(beside, alone);
        assert!(alone[0].is_some() && alone[0] != alone[1] && StepDraws::next().is_none());
    }
}
