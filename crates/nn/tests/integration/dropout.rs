//! Dropout follows the seed of the device; alone in its process, since all threads share one generator.

use burn::tensor::{Device, Tensor};
use kiln_nn::DropoutConfig;

#[test]
fn the_seed_of_the_device_decides_what_is_dropped() {
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
