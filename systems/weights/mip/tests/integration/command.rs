//! The verbs of `kiln mip`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::atomic::Ordering;

use burn::tensor::Tensor;
use kiln_core::testing::Desk;
use kiln_core::{HostTensor, System, TensorFile};
use kiln_mip::Mip;

/// Options of a model that trains in milliseconds.
const TINY: &str = "--arch mlp:4 --hidden 4,6 --batch 4 --eval-every 3 --lr 0.01";

/// A desk with twelve images of 3 x 3 pixels in two classes: bright above or bright below.
fn desk() -> Desk {
    let desk = Desk::new(&Mip);
    let mut text = String::from("a,b,c,d,e,f,g,h,i,label\n");
    for i in 0..12 {
        let row = if i % 2 == 0 { "9,9,9,5,5,5,0,0,0,up" } else { "0,0,0,5,5,5,9,9,9,down" };
        text += &format!("{}{}\n", i % 5, &row[1..]);
    }
    desk.write("data.csv", text);
    desk
}

fn trained() -> Desk {
    let desk = desk();
    desk.json(&format!("train --data @data.csv {TINY} --steps 6 --out @m"));
    desk
}

fn floats(file: &TensorFile, name: &str) -> Vec<f32> {
    file.get(name).unwrap().as_floats().unwrap().to_vec()
}

#[test]
fn forward_gives_the_encoding_and_weights_of_the_reference() {
    let desk = Desk::new(&Mip);
    desk.json(
        "forward --weights %mip_forward.safetensors --gamma %mip_forward.safetensors:gamma --to @o.npz",
    );
    let golden = TensorFile::read("tests/data/mip_forward.safetensors".as_ref()).unwrap();
    let found = kiln_data::read_npz(&desk.path("o.npz")).unwrap();
    for name in ["encoded", "theta"] {
        let (found, expected) = (floats(&found, name), floats(&golden, name));
        assert_eq!(found.len(), expected.len());
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs() + 1e-6), "{name}");
    }
    desk.assert_refused(
        "forward --weights %mip_forward.safetensors --gamma %mip_forward.safetensors --to @o.npz",
        "names no tensor",
    );
    desk.assert_refused(
        "forward --encoding none --weights %mip_forward.safetensors --gamma %mip_forward.safetensors:gamma --to @o.npz",
        "it must take 3 numbers",
    );
}

#[test]
fn a_stopped_run_goes_on_to_the_same_weights() {
    let desk = trained();
    desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
    let refusal = desk.refusal(&format!("train --data @data.csv {TINY} --steps 6 --out @parts"));
    assert!(refusal.contains("kiln mip train --data"), "{refusal}");
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    desk.json("train --data @data.csv --resume @parts");
    let weights = |model: &str| fs::read(desk.path(model).join("model.safetensors")).unwrap();
    assert_eq!(weights("m"), weights("parts"));
}

#[test]
fn predictions_are_probabilities_for_every_condition_and_row() {
    let desk = trained();
    let result = desk.json("predict --model @m --data @data.csv --gamma-grid 3 --out @p.csv");
    assert_eq!(result["rows"], 36);
    let text = fs::read_to_string(desk.path("p.csv")).unwrap();
    assert!(text.starts_with("gamma,row,pred,p_down,p_up\n"), "{text}");
    for line in text.lines().skip(1) {
        let p: Vec<f32> = line.split(',').skip(3).map(|cell| cell.parse().unwrap()).collect();
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{line}");
    }
    let mean = desk.json("predict --model @m --data @data.csv --samples 4 --out @s.csv");
    assert_eq!(mean["rows"], 12);
    let found = desk.json("eval --model @m --data @data.csv --gamma-grid 3 --samples 2 --out @e.csv");
    assert_eq!(found["conditions"].as_array().unwrap().len(), 3);
    assert!(found["mean_of_samples"]["ece"].as_f64().unwrap() <= 1.0);
    assert!(desk.path("e.svg").exists() && desk.path("e.csv").exists());
}

#[test]
fn a_network_for_one_condition_predicts_as_the_hypernetwork_does_there() {
    let desk = trained();
    let exported = desk.json("export --model @m --gamma 0.5 --to @plain");
    assert_eq!(exported["gamma"][0], 0.5);
    let file = TensorFile::read(&desk.path("plain/model.safetensors")).unwrap();
    let mut names: Vec<&str> = file.names().collect();
    names.sort_unstable();
    assert_eq!(
        names,
        ["net.layers.0.bias", "net.layers.0.weight", "net.layers.1.bias", "net.layers.1.weight"]
    );
    // Converted again without a change, it is that network whatever the condition: θ0 are its weights.
    desk.json("convert --arch mlp:4 --hidden 4 --weights @plain/model.safetensors --data @data.csv --out @c");
    let converted = TensorFile::read(&desk.path("c/model.safetensors")).unwrap();
    assert_eq!(floats(&file, "net.layers.0.weight"), floats(&converted, "base.net.layers.0.weight"));
    desk.assert_refused("predict --model @plain --data @data.csv --out @p.csv", "for one condition");
}

#[test]
fn proportionality_is_measured_and_drawn() {
    let desk = desk();
    let found = desk.json("analyze --data @data.csv --arch mlp:4 --param default --out @a.json");
    assert!((found["all_weights"]["slope"].as_f64().unwrap() - 1.0).abs() < 1e-4);
    assert!(desk.path("a.svg").exists() && desk.path("a.json").exists());
    desk.assert_refused("analyze --data @data.csv --gammas 0,1 --out @b.json", "positive conditions");
}

#[test]
fn an_ablation_has_a_line_for_every_setting_and_arm() {
    let desk = desk();
    let lines = desk.json("ablate --axes optim,encoding --seeds 1 --steps 4 --data @data.csv --out @ab");
    assert_eq!(lines.as_array().unwrap().len(), (2 + 3) * 4);
    assert_eq!(fs::read_to_string(desk.path("ab/ablation.csv")).unwrap().lines().count(), 21);
    assert_eq!(lines[0]["steps_least"], lines[0]["steps_most"]);
}

#[test]
fn what_does_not_fit_is_named() {
    let desk = trained();
    for (line, words) in [
        ("train --data @data.csv --out @x --select conv*", "no parameter matches \"conv*\""),
        ("train --data @data.csv --out @x --arch lenet", "too small for lenet"),
        ("train --data @data.csv --out @x --arch vgg", "choose mlp:32-32, lenet or resnet8"),
        ("train --data @data.csv --out @x --gamma-dim 2 --range a=0:1", "1 ranges for 2 components"),
        ("train --data @data.csv --out @x --range a=1:0", "low below high"),
        ("train --data @data.csv --out @x --hidden 0", "make no hypernetwork"),
        ("train --data @data.csv --out @m --steps 6", "already holds a training run"),
        ("train --data @none.csv --out @x", "none.csv"),
        ("predict --model @m --data @data.csv --gamma 0.1,0.2 --out @p.csv", "has 2 values, must have 1"),
        ("predict --model @m --data @data.csv --samples 0 --out @p.csv", "draws no network"),
        ("eval --model @m --data @data.csv --gamma-grid 1", "at least two conditions"),
        (
            "convert --param default --weights @m/model.safetensors --data @data.csv --out @x",
            "no place for trained weights",
        ),
        ("convert --arch mlp:5 --weights @m/model.safetensors --data @data.csv --out @x", "is missing"),
    ] {
        desk.assert_refused(line, words);
    }
    desk.write("one.csv", "a,b,label\n1,2,x\n3,4,x\n");
    desk.assert_refused("train --data @one.csv --out @x", "at least two classes");
    desk.write("other.csv", "a,b,label\n1,2,up\n3,4,down\n");
    desk.assert_refused("eval --model @m --data @other.csv", "the model was trained on [1, 3, 3]");
    assert!(!desk.path("x").exists());
}

#[test]
fn weights_that_do_not_depend_on_the_condition_are_left_as_they_are() {
    let desk = desk();
    desk.json(&format!(
        "train --data @data.csv {TINY} --steps 2 --select net.layers.0.* --freeze-base --out @f"
    ));
    let a = TensorFile::read(&desk.path("f/model.safetensors")).unwrap();
    let HostTensor { shape, .. } = a.get("hyper.output.weight").unwrap();
    assert_eq!(shape[0], 9 * 4 + 4);
    desk.json("export --model @f --gamma 0.1 --to @p1");
    desk.json("export --model @f --gamma 0.9 --to @p2");
    let weights = |model: &str| TensorFile::read(&desk.path(model).join("model.safetensors")).unwrap();
    let (one, other) = (weights("p1"), weights("p2"));
    assert_eq!(floats(&one, "net.layers.1.weight"), floats(&other, "net.layers.1.weight"));
    assert_ne!(floats(&one, "net.layers.0.weight"), floats(&other, "net.layers.0.weight"));
}

/// Exports a U-Net for a condition and runs it: `[inputs, outputs, height, width]`.
fn captured(desk: &Desk, model: &str, [inputs, outputs, height, width]: [usize; 4]) {
    desk.json(&format!("export --model @{model} --gamma 0.4 --to @one"));
    let network = Mip.network(&desk.path("one"), &desk.cx).unwrap();
    assert_eq!(network.inputs()[0].shape, [1, inputs, height, width]);
    let x = Tensor::<4>::ones([1, inputs, height, width], &desk.cx.device);
    let y = network.forward(vec![x.into_dispatch()]).remove(0);
    assert_eq!(Tensor::<4>::from_dispatch(y).dims(), [1, outputs, height, width]);
    assert_eq!(network.outputs()[0].shape, [1, outputs, height, width]);
    desk.assert_refused("eval --model @one --data @data.csv", "for one condition");
}

#[test]
fn registration_is_trained_swept_and_written_as_images() {
    let desk = Desk::new(&Mip);
    let header: Vec<String> = (0..25).map(|i| format!("p{i}")).collect();
    let mut text = header.join(",") + ",label\n";
    for i in 0..12 {
        let row: Vec<String> = (0..25).map(|p| ((p * 7 + i * 3) % 16).to_string()).collect();
        text += &format!("{},{}\n", row.join(","), i % 2);
    }
    desk.write("data.csv", text);
    let options = "--task register --hidden 4 --batch 3 --eval-every 2 --val-fraction 0.4";
    desk.json(&format!("train --data @data.csv {options} --steps 4 --out @r"));
    let swept = desk.json("eval --model @r --data @data.csv --gamma-grid 3 --pairs 5 --out @e.csv");
    let before = swept["conditions"][0]["quality"]["difference_before"].as_f64().unwrap();
    assert!(before > 0.0 && desk.path("e.svg").exists());
    desk.json("predict --model @r --data @data.csv --gamma 0.5 --pairs 2 --out @moved");
    assert!(desk.path("moved/gamma-0.500.png").exists());
    let fields = kiln_data::read_npz(&desk.path("moved/fields.npz")).unwrap();
    assert_eq!(fields.get("field_gamma_0.500").unwrap().shape, [2, 2, 5, 5]);
    captured(&desk, "r", [2, 2, 5, 5]);
    desk.assert_refused(
        "train --task register --gamma-dim 2 --data @data.csv --out @x",
        "one number between 0 and 1",
    );
    desk.write("small.csv", "a,b,label\n1,2,x\n3,4,x\n");
    desk.assert_refused("train --task register --data @small.csv --out @x", "cannot be registered");
}

#[test]
fn the_network_of_the_reference_gives_its_logits_loss_and_gradients() {
    let desk = Desk::new(&Mip);
    let line = "forward --weights %mip_forward.safetensors --gamma %mip_forward.safetensors:gamma";
    desk.json(&format!("{line} --layout %layout.json --x --target --to @o.safetensors"));
    let golden = TensorFile::read("tests/data/mip_forward.safetensors".as_ref()).unwrap();
    let found = TensorFile::read(&desk.path("o.safetensors")).unwrap();
    let names: Vec<&str> = golden.names().filter(|name| name.starts_with("grad.hyper.")).collect();
    assert!(names.len() >= 4);
    for name in ["logits", "loss"].into_iter().chain(names) {
        let relative = if name.starts_with("grad") { 1e-4 } else { 1e-5 };
        let (found, expected) = (floats(&found, name), floats(&golden, name));
        assert_eq!(found.len(), expected.len(), "{name}");
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= relative * b.abs() + 1e-6, "{name}: {a}, should be {b}");
        }
    }
    desk.write("layout.json", "{\"output_order\": [[\"conv1.weight\", [4, 1, 3, 3]]]}");
    desk.assert_refused(
        &format!("{line} --layout @layout.json --x --target --to @p.npz"),
        "no \"fc1.weight\"",
    );
    desk.assert_refused(&format!("{line} --layout @data.csv --x --target --to @p.npz"), "data.csv");
}

#[test]
fn gradient_descent_and_a_condition_for_each_image_are_resumed_too() {
    let desk = desk();
    let options =
        format!("--data @data.csv {TINY} --steps 6 --optim sgd --per-sample --output-init hyperfan");
    desk.json(&format!("train {options} --out @whole"));
    desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
    desk.refusal(&format!("train {options} --out @parts"));
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    desk.json("train --data @data.csv --resume @parts");
    let weights = |model: &str| fs::read(desk.path(model).join("model.safetensors")).unwrap();
    assert_eq!(weights("whole"), weights("parts"));
    desk.json(&format!("train --data @data.csv {TINY} --steps 6 --out @shared"));
    assert_ne!(weights("whole"), weights("shared"));
    desk.assert_refused(
        &format!("train --data @data.csv {TINY} --batch-norm --per-sample --out @x"),
        "leave --batch-norm out",
    );
    assert!(!desk.path("x").exists());
}

#[test]
fn segmentation_is_trained_swept_and_written_as_masks() {
    let desk = Desk::new(&Mip);
    let scans = kiln_mip::scale::Scans::discs(6, &mut kiln_core::random_stream(0, "test", 0));
    let mut file = TensorFile::new();
    file.insert("x", HostTensor::float([6, 32, 32], scans.images.pixels.clone()));
    file.insert("mask", HostTensor::float([6, 32, 32], scans.masks.clone()));
    kiln_data::write_npz(&desk.path("scans.npz"), &file).unwrap();
    let options = "--task scale --hidden 4 --batch 2 --eval-every 2 --val-fraction 0.4";
    desk.json(&format!("train --data @scans.npz {options} --steps 3 --out @s"));
    let swept = desk.json("eval --model @s --data @scans.npz --gamma-grid 3 --out @e.csv");
    let cost = |at: usize| swept["conditions"][at]["quality"]["operations"].as_u64().unwrap();
    assert!(cost(0) < cost(1) && cost(1) < cost(2) && desk.path("e.svg").exists());
    desk.json("predict --model @s --data @scans.npz --gamma 0.5 --out @masks");
    // The masks that were written, beside images of their size, are data again.
    for (from, to) in [("masks/gamma-0.500", "again/masks"), ("masks/gamma-0.500", "again/images")] {
        fs::create_dir_all(desk.path(to)).unwrap();
        for number in 1..=6 {
            let name = format!("{number}.png");
            fs::copy(desk.path(from).join(&name), desk.path(to).join(&name)).unwrap();
        }
    }
    assert_eq!(desk.json("eval --model @s --data @again --gamma-grid 2")["images"], 6);
    fs::remove_file(desk.path("again/masks/3.png")).unwrap();
    desk.assert_refused("eval --model @s --data @again --gamma-grid 2", "has no mask for \"3\"");
    file.insert("mask", HostTensor::float([6, 32, 32], vec![0.0; 6 * 1024]));
    kiln_data::write_npz(&desk.path("empty.npz"), &file).unwrap();
    desk.assert_refused(
        &format!("train --data @empty.npz {options} --out @x"),
        "no pixel of the masks is an object",
    );
    file.insert("mask", HostTensor::float([6, 32], vec![0.0; 6 * 32]));
    kiln_data::write_npz(&desk.path("bad.npz"), &file).unwrap();
    desk.assert_refused(&format!("train --data @bad.npz {options} --out @x"), "expected [6, 32, 32]");
    assert!(!desk.path("x").exists());
    captured(&desk, "s", [1, 1, 32, 32]);
}
