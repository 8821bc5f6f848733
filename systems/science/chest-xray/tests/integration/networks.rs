//! The networks beside the reference: names, shapes, parameter counts and outputs.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::Device;
use kiln_chest_xray::ChestXray;
use kiln_chest_xray::networks::{ClassifierConfig, Net, torchvision_name};
use kiln_core::TensorFile;
use kiln_core::testing::Desk;
use serde_json::Value;

fn golden(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(format!("tests/data/{name}")).unwrap()).unwrap()
}

const UNETS: [(&str, &str); 2] = [("unet", "unet_w8"), ("unet-modified", "unet_modified_w8")];

#[test]
fn parameters_have_the_names_shapes_and_numbers_of_the_reference() {
    let desk = Desk::new(&ChestXray);
    let (counts, states) = (golden("parameter_counts.json"), golden("state_order.json"));
    for (net, counts) in counts.as_object().unwrap().iter().filter(|(net, _)| !net.starts_with("unet")) {
        for classes in [2, 1000] {
            let found = desk.json(&format!("params --net {net} --classes {classes} --names"));
            assert_eq!(found["parameters"], counts[format!("params_{classes}")], "{net}");
            if classes == 2 {
                assert_eq!(found["state"], states[net], "{net}");
            }
        }
    }
    for (net, name) in UNETS {
        let wide = desk.json(&format!("params --net {net}"));
        assert_eq!(wide["parameters"], counts[net.replace('-', "_")]["params_w64"], "{net}");
        let narrow = desk.json(&format!("params --net {net} --width 8 --names"));
        assert_eq!(narrow["parameters"], counts[net.replace('-', "_")]["params_w8"], "{net}");
        assert_eq!(narrow["state"], states[name], "{net}");
    }
}

#[test]
fn forward_gives_the_outputs_of_the_reference() {
    let desk = Desk::new(&ChestXray);
    let expected = TensorFile::read("tests/data/forward.safetensors".as_ref()).unwrap();
    let counts = golden("parameter_counts.json");
    let shape = |net: &str| -> String {
        let shape = counts[net]["input"].as_array().unwrap();
        shape.iter().map(Value::to_string).collect::<Vec<_>>().join(",")
    };
    let classifiers = counts.as_object().unwrap().keys().filter(|net| !net.starts_with("unet"));
    let runs = classifiers.map(|net| (net.as_str(), net.clone(), shape(net)));
    let runs = runs.chain(UNETS.map(|(net, name)| (net, name.to_string(), "2,1,48,80".to_string())));
    for (net, name, shape) in runs {
        desk.json(&format!("forward --net {net} --width 8 --input-shape {shape} --out @o.safetensors"));
        let found = TensorFile::read(&desk.path("o.safetensors")).unwrap();
        let (found, expected) =
            (found.get("logits").unwrap(), expected.get(&format!("{name}/logits")).unwrap());
        assert_eq!(found.shape, expected.shape, "{net}");
        let (found, expected) = (found.as_floats().unwrap(), expected.as_floats().unwrap());
        let largest = expected.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(off <= 1e-4 * largest, "{net}: {found:?} is not {expected:?}");
    }
    desk.assert_refused("forward --net vgg19 --input-shape 1,1,64,64 --out @x.safetensors", "3 channels");
    desk.assert_refused("forward --net unet --input-shape 1,1,40,64 --out @x.safetensors", "divisible by 16");
    desk.assert_refused("forward --net inception --input-shape 1,3,64,64 --out @x.safetensors", "75 to 4096");
    desk.assert_refused("params --net alexnet", "there are resnet18");
}

#[test]
fn weights_of_every_network_find_their_places() {
    let device = Device::flex();
    for net in Net::PAPER.into_iter().chain([Net::Squeezenet11]) {
        let config = |classes| ClassifierConfig { width: 0.0625, ..ClassifierConfig::new(net, classes) };
        let mut file = TensorFile::from_module(&config(1000).init(&device));
        for name in file.names().map(str::to_string).collect::<Vec<_>>() {
            file.rename(&name, torchvision_name(&name));
        }
        let heads: Vec<String> = file
            .names()
            .filter(|name| net.head().iter().any(|head| name.starts_with(head)))
            .map(String::from)
            .collect();
        let (all, file) = (file.names().count(), file);
        let (_, transfer) = config(2).transfer(config(2).init(&device), file).unwrap();
        assert_eq!((transfer.loaded, &transfer.redrawn), (all - heads.len(), &heads), "{}", net.name());
        assert!(heads.len() == if net == Net::Inception { 4 } else { 2 } && transfer.skipped.is_empty());
    }
}
