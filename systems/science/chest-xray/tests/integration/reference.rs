//! Metrics, mask metrics and activation maps beside the reference.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use kiln_chest_xray::cam::{Layer, grad_cam, score_cam, score_cam_of};
use kiln_chest_xray::image::{Cxr, Fit, Norm, segmented};
use kiln_chest_xray::masks::{Mask, MaskMetrics};
use kiln_chest_xray::networks::Classifier;
use kiln_chest_xray::networks::{fill, formula};
use kiln_chest_xray::{ChestXray, ResNetConfig};
use kiln_core::TensorFile;
use kiln_core::testing::Desk;
use kiln_data::{Picture, shared_dir};
use serde_json::Value;

fn json(path: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn assert_same(found: &Value, expected: &Value, what: &str) {
    match (found, expected) {
        (Value::Object(found), Value::Object(expected)) => {
            for (key, value) in expected {
                assert_same(&found[key], value, &format!("{what}.{key}"));
            }
        }
        _ => {
            let (found, expected) = (found.as_f64().unwrap(), expected.as_f64().unwrap());
            assert!((found - expected).abs() <= 1e-9, "{what} is {found}, not {expected}");
        }
    }
}

#[test]
fn decisions_are_judged_as_the_reference_does() {
    let desk = Desk::new(&ChestXray);
    let found = desk.json("eval --scores %scores.csv --out @m.json");
    assert_same(&found, &json("tests/data/metrics_expected.json"), "eval");
    assert!(desk.path("m.roc.svg").exists() && desk.path("m.reliability.svg").exists());
    let [low, high] = [0, 1].map(|end| found["intervals_95"]["auc"][end].as_f64().unwrap());
    assert!(low < found["auc"].as_f64().unwrap() && found["auc"].as_f64().unwrap() < high);
}

#[test]
fn masks_are_judged_as_the_reference_does() {
    let Some(shared) = shared_dir() else {
        println!("skipped: no shared data");
        return;
    };
    let path = shared.join("data/chest-xray-samples/lung_masks/1-mask.png");
    let picture = Picture::read(&path).unwrap();
    let [_, height, width] = picture.shape;
    let truth = Mask::of(&picture.to_grey(), [height, width]);
    let rolled = |at: usize| {
        let (y, x) = ((at / width + height - 3) % height, (at % width + 4) % width);
        truth.lung[y * width + x]
    };
    let found = Mask { lung: (0..height * width).map(rolled).collect(), ..truth.clone() };
    let metrics = serde_json::to_value(MaskMetrics::of(&truth, &found)).unwrap();
    let mut expected = json("tests/data/mask_metrics_expected.json");
    expected.as_object_mut().unwrap().retain(|key, _| ["dice", "iou", "accuracy"].contains(&key.as_str()));
    assert_same(&metrics, &expected, "masks");
    // The same by the command.
    let desk = Desk::new(&ChestXray);
    Picture::grey(height, width, found.to_plane()).write_png(&desk.path("rolled.png")).unwrap();
    let said = desk.json(&format!("mask-eval --pred @rolled.png --truth {}", path.display()));
    assert_same(&said, &expected, "mask-eval");
}

fn resnet() -> (Classifier, Tensor<4>) {
    let device = Device::flex();
    let network = Classifier::ResNet(fill(ResNetConfig::resnet18(2).init(&device)).unwrap());
    let values: Vec<f32> = formula(3 * 64 * 64, 7).map(|s| s as f32).collect();
    (network, Tensor::from_data(TensorData::new(values, [1, 3, 64, 64]), &device))
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() <= 1e-4 * largest, "{what}: {found:?} is not {expected:?}");
    }
}

#[test]
fn activation_maps_are_those_of_the_reference() {
    let golden = TensorFile::read(Path::new("tests/data/cam_resnet18.safetensors")).unwrap();
    let expected = |name: &str| golden.get(name).unwrap().as_floats().unwrap().to_vec();
    let (network, x) = resnet();
    let activations = network.activations(x.clone());
    let values: Vec<f32> = activations.clone().into_data().iter().collect();
    assert_close(&values, &expected("layer4"), "activations");
    let map = grad_cam(&network, x.clone(), 1).unwrap();
    let raw: Vec<f32> = expected("gradcam_raw").iter().map(|value| value.max(0.0)).collect();
    assert_close(&map.values, &raw, "Grad-CAM");
    let found = score_cam_of(&network, x, activations, 1, (0..24).collect());
    assert_close(&found.scores, &expected("scorecam_scores"), "Score-CAM scores");
    assert_close(&found.map.values, &expected("scorecam_first24"), "Score-CAM");
}

#[test]
fn nothing_explains_an_image_without_lungs() {
    let (network, _) = resnet();
    let plane: Vec<f32> = formula(64 * 64, 7).map(|s| s.abs() as f32).collect();
    let none = Mask { height: 64, width: 64, lung: vec![false; 64 * 64] };
    let all = Mask { lung: vec![true; 64 * 64], ..none.clone() };
    for norm in [Norm::Zscore, Norm::Imagenet] {
        let cxr = Cxr { size: 64, fit: Fit::Stretch, norm };
        let seen = |lungs: &Mask| cxr.to_tensor([&segmented(&plane, lungs, false)[..]], &Device::flex());
        for layer in [Layer::Last, Layer::Middle] {
            let blank = score_cam(&network, seen(&none), 1, layer, Some(8));
            assert!(blank.map.values.iter().all(|&value| value == 0.0) && blank.channels.len() == 8);
            assert_eq!(blank.map.lung_fraction(&all), None);
            assert!(
                score_cam(&network, seen(&all), 1, layer, Some(8))
                    .map
                    .values
                    .iter()
                    .any(|&value| value > 0.0)
            );
        }
        let blank = grad_cam(&network, seen(&none), 1).unwrap();
        assert!(blank.values.iter().all(|&value| value == 0.0));
    }
}

#[test]
fn fewer_maps_are_the_most_varied() {
    let (network, x) = resnet();
    let some = score_cam(&network, x, 1, Layer::Last, Some(8));
    let lungs = Mask { height: 64, width: 64, lung: vec![true; 64 * 64] };
    assert!((some.map.lung_fraction(&lungs).unwrap() - 1.0).abs() < 1e-9);
    assert!(some.channels.is_sorted() && some.scores.len() == 8);
}
