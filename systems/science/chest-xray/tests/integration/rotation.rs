//! A trained U-Net finds in a turned phantom the turned lungs.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_chest_xray::UNetConfig;
use kiln_chest_xray::augment::Transform;
use kiln_chest_xray::dataset::Images;
use kiln_chest_xray::image::{Cxr, Fit, Norm};
use kiln_chest_xray::masks::{Mask, MaskMetrics};
use kiln_chest_xray::phantom::draw;
use kiln_chest_xray::train::{Fall, SegmentTask, find_lungs, training};
use kiln_core::Context;
use kiln_nn::{initialise, train};

const SIZE: usize = 64;
const WIDTH: usize = 6;
const EPOCHS: usize = 16;

/// Phantoms and the masks of their lungs.
fn phantoms(name: &str, count: u64, cx: &Context) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
    let drawn = (0..count).map(|number| draw(number % 2 == 1, false, SIZE, &mut cx.rng(name, number)));
    drawn.map(|phantom| (phantom.pixels, phantom.lungs.to_plane())).unzip()
}

fn images(planes: Vec<Vec<f32>>) -> Images {
    let labels = vec![false; planes.len()];
    Images::of(planes, &labels, Cxr { size: SIZE, fit: Fit::Stretch, norm: Norm::Zscore })
}

#[test]
fn segmentation_of_a_turned_phantom_is_the_turned_segmentation() {
    let cx = Context::for_tests("");
    let (planes, masks) = phantoms("learn", 96, &cx);
    let all: Vec<usize> = (0..planes.len()).collect();
    let learnt = images(planes);
    let mut task = SegmentTask::new(&learnt, &masks, [&all, &all[..2]], 8, true, &cx);
    let recipe = training(EPOCHS * task.steps_per_epoch(), 4e-3, Fall::Cosine);
    let config = UNetConfig::new(WIDTH);
    let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device));
    let unet = train(model, &mut task, &recipe, None, false, &cx).unwrap().last;

    let (planes, truth) = phantoms("test", 24, &cx);
    let some: Vec<usize> = (0..planes.len()).collect();
    let found = find_lungs(&unet, &images(planes.clone()), &some, &cx).unwrap();
    let dice = |a: &[Mask], b: &[Mask]| {
        MaskMetrics::mean(&a.iter().zip(b).map(|(a, b)| MaskMetrics::of(a, b)).collect::<Vec<_>>())
            .unwrap()
            .dice
    };
    let truth: Vec<Mask> = truth.iter().map(|plane| Mask::of(plane, [SIZE; 2])).collect();
    println!("Dice {:.4}", dice(&found, &truth));
    for rotation in [-12.0, -6.0, 6.0, 12.0] {
        let turn = Transform { rotation, ..Transform::NONE };
        let turned = images(planes.iter().map(|plane| turn.image(plane, SIZE)).collect());
        let of_turned = find_lungs(&unet, &turned, &some, &cx).unwrap();
        let turned_found: Vec<Mask> =
            found.iter().map(|mask| Mask::of(&turn.mask(&mask.to_plane(), SIZE), [SIZE; 2])).collect();
        let same = dice(&of_turned, &turned_found);
        println!("turned by {rotation}: {same:.4}");
        assert!(same >= 0.97, "turned by {rotation} degrees: Dice {same}");
    }
}
