//! What is drawn from the generator that all threads share; in a program of its own, where nothing else draws from it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::Mutex;

use burn::tensor::{Device, Tensor};
use kiln_core::random_stream;
use kiln_nn::{DropoutConfig, initialise};

/// Held by the test that draws.
static GENERATOR: Mutex<()> = Mutex::new(());

#[test]
fn initial_parameters_are_drawn_as_burns() {
    let _alone = GENERATOR.lock().unwrap();
    let draw = || random_stream(3, "init", 0);
    let device = Device::flex();
    let burn = initialise(&device, &mut draw(), |d| burn::nn::LinearConfig::new(4, 6).init(d));
    let kiln = initialise(&device, &mut draw(), |d| kiln_nn::LinearConfig::new(4, 6).init(d));
    burn.weight.val().into_data().assert_eq(&kiln.weight.val().into_data(), true);
    burn.bias.unwrap().val().into_data().assert_eq(&kiln.bias.unwrap().val().into_data(), true);
}

#[test]
fn the_seed_of_the_device_decides_what_is_dropped() {
    let _alone = GENERATOR.lock().unwrap();
    let device = Device::flex();
    let dropout = DropoutConfig::new(0.5).init();
    let dropped = |seed: u64| {
        device.seed(seed);
        let ones = Tensor::<1>::ones([1000], &device.clone().autodiff());
        let [first, second] = [dropout.forward(ones.clone()), dropout.forward(ones)];
        [first, second].map(|x| x.into_data().iter::<f32>().collect::<Vec<_>>())
    };
    let [first, second] = dropped(3);
    assert_ne!(first, second, "every call draws anew");
    assert_eq!(dropped(3), [first.clone(), second]);
    assert_ne!(dropped(4)[0], first);
}
