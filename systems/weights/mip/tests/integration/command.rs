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
    // The same conditions as NumPy saves them.
    let gamma = golden.get("gamma").unwrap();
    let shape = format!("({}, {})", gamma.shape[0], gamma.shape[1]);
    let header = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
    let header = format!("{header:<117}\n");
    let values: Vec<u8> = floats(&golden, "gamma").iter().flat_map(|x| x.to_le_bytes()).collect();
    desk.write("gamma.npy", [&b"\x93NUMPY\x01\x00\x76\x00"[..], header.as_bytes(), &values].concat());
    desk.json("forward --weights %mip_forward.safetensors --gamma @gamma.npy --to @again.npz");
    let again = kiln_data::read_npz(&desk.path("again.npz")).unwrap();
    assert_eq!(floats(&again, "theta"), floats(&found, "theta"));
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
fn proportionality_is_measured_in_the_course_of_training_too() {
    let desk = desk();
    for (norm, lines) in [("none", 4), ("batch", 4), ("weight", 4), ("layer", 4)] {
        let options = format!("--data @data.csv {TINY} --norm {norm} --steps 6");
        desk.json(&format!("train {options} --probe-every 2 --out @{norm}"));
        let text = fs::read_to_string(desk.path(norm).join("proportionality.csv")).unwrap();
        let of = |quantity: &str| text.lines().filter(|line| line.contains(quantity)).count();
        assert_eq!((of(",gradient,"), of(",all weights,")), (lines, lines), "{text}");
        assert!(text.lines().nth(1).unwrap().starts_with("0,weights,all weights,"), "{text}");
        assert!(desk.path(norm).join("proportionality.svg").exists());
        // Measuring changes nothing.
        desk.json(&format!("train {options} --out @plain-{norm}"));
        let weights = |model: &str| fs::read(desk.path(model).join("model.safetensors")).unwrap();
        assert_eq!(weights(norm), weights(&format!("plain-{norm}")), "{norm}");
    }
    // A longer run goes on with the lines of the shorter one.
    desk.json("train --data @data.csv --resume @none --steps 8");
    let text = fs::read_to_string(desk.path("none").join("proportionality.csv")).unwrap();
    let steps: Vec<&str> = text
        .lines()
        .filter(|line| line.contains(",gradient,"))
        .map(|line| line.split(',').next().unwrap())
        .collect();
    assert_eq!(steps, ["0", "2", "4", "6", "8"]);
}

#[test]
fn what_is_dropped_in_training_follows_the_seed_and_nothing_is_later() {
    let desk = desk();
    let weights = |model: &str| fs::read(desk.path(model).join("model.safetensors")).unwrap();
    for model in ["once", "again"] {
        desk.json(&format!("train --control dropout --data @data.csv {TINY} --steps 4 --out @{model}"));
    }
    desk.json(&format!("train --control smoothing --data @data.csv {TINY} --steps 4 --out @other"));
    assert_eq!(weights("once"), weights("again"));
    assert_ne!(weights("once"), weights("other"));
    let table = |out: &str| {
        desk.json(&format!("predict --model @once --data @data.csv --gamma 1 --out @{out}"));
        fs::read_to_string(desk.path(out)).unwrap()
    };
    assert_eq!(table("a.csv"), table("b.csv"));
}

#[test]
fn own_weights_learn_at_a_rate_of_their_own() {
    let desk = desk();
    let train = |rate: &str, out: &str| {
        desk.json(&format!("train --data @data.csv {TINY} --steps 2 {rate} --out @{out}"));
        TensorFile::read(&desk.path(out).join("checkpoint.safetensors")).unwrap()
    };
    let (frozen, same) = (train("--base-lr 0", "zero"), train("--base-lr 0.01", "same"));
    let default = train("", "default");
    let base = "model.base.net.layers.0.weight";
    let names: Vec<&str> = default.names().filter(|name| name.contains("net.layers.0.weight")).collect();
    assert!(default.get(base).is_some(), "{names:?}");
    assert_eq!(floats(&same, base), floats(&default, base));
    assert_ne!(floats(&frozen, base), floats(&default, base));
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
        ("train --data @data.csv --out @x --arch unet", "add --task register or --task scale"),
        ("train --data @data.csv --out @x --task register --arch lenet", "cannot be registered"),
        ("train --data @data.csv --out @x --probe-every 0", "at least 1"),
        (
            "train --data @data.csv --out @x --task register --per-sample",
            "leave --control and --per-sample out",
        ),
        ("train --data @data.csv --out @x --control dropout --per-sample", "leave --per-sample out"),
        ("train --data @data.csv --out @x --task bayes --control smoothing", "leave --control out"),
        ("train --data @data.csv --out @x --range site=cat:a,b", "which nothing draws"),
        ("train --data @data.csv --out @x --select type:Conv2d", "there are Linear"),
        ("train --data @data.csv --out @x --base-lr=-1", "base.*"),
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
    desk.write("rows.csv", "a,b,label\n1,2,x\n3,4,y\n");
    desk.assert_refused("train --data @rows.csv --out @x", "cannot be turned");
    desk.json(&format!("train --data @rows.csv --control smoothing {TINY} --steps 1 --out @rows"));
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

/// A desk where a row of bright pixels is called by its place in the north, and the other way round in the south; the dose
/// says nothing.
fn desk_with_sites() -> Desk {
    let desk = Desk::new(&Mip);
    let mut images = String::from("a,b,c,d,e,f,g,h,i,label\n");
    let mut sites = String::from("site,dose\n");
    for i in 0..40 {
        let (above, north) = (i % 2 == 0, i % 4 < 2);
        let pixels = if above { "9,9,9,5,5,5,0,0,0" } else { "0,0,0,5,5,5,9,9,9" };
        images += &format!("{},{}\n", pixels, if above == north { "up" } else { "down" });
        sites += &format!("{},{}\n", if north { "north" } else { "south" }, 1 + i % 3);
    }
    desk.write("data.csv", images);
    desk.write("sites.csv", sites);
    desk
}

#[test]
fn a_category_of_each_image_decides_what_it_is() {
    let desk = desk_with_sites();
    let options = "--arch mlp:8 --hidden 8,8 --batch 16 --lr 0.02 --eval-every 50";
    let trained =
        desk.json(&format!("train --data @data.csv --conditions @sites.csv {options} --steps 150 --out @m"));
    assert_eq!(trained["accuracy"], 1.0);
    let own = desk.json("eval --model @m --data @data.csv --conditions @sites.csv --out @own.csv");
    let names: Vec<&str> = own["conditions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|line| line["condition"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["own", "site=north", "site=south"]);
    assert_eq!(own["conditions"][0]["scores"]["accuracy"], 1.0);
    // Half of all images are right where all are taken for northern ones: a grid goes through the categories.
    let grid = desk.json("eval --model @m --data @data.csv --gamma-grid 2 --out @grid.csv");
    let grid = grid["conditions"].as_array().unwrap();
    assert_eq!(grid.len(), 2 * 2);
    assert!(grid.iter().all(|line| line["scores"]["accuracy"] == 0.5), "{grid:?}");
    assert!(fs::read_to_string(desk.path("grid.csv")).unwrap().contains("\nsouth;3,0.5,"));
    assert!(desk.path("own.svg").exists() && desk.path("grid.svg").exists());

    desk.json("predict --model @m --data @data.csv --gamma north,2 --out @north.csv");
    desk.json("export --model @m --gamma south,2 --to @south");
    desk.json("predict --model @m --data @data.csv --conditions @sites.csv --out @own-p.csv");
    let column = |file: &str| -> Vec<String> {
        let text = fs::read_to_string(desk.path(file)).unwrap();
        text.lines().skip(1).map(|line| line.split(',').nth(2).unwrap().to_string()).collect()
    };
    let labels: Vec<String> =
        (0..40).map(|i| if (i % 2 == 0) == (i % 4 < 2) { "up" } else { "down" }.to_string()).collect();
    assert_eq!(column("own-p.csv"), labels);
    assert_eq!(column("north.csv")[..2], ["up", "down"]);

    for (line, words) in [
        ("predict --model @m --data @data.csv --gamma east,1 --out @x.csv", "there are north, south"),
        (
            "predict --model @m --data @data.csv --gamma north,much --out @x.csv",
            "dose = much is not a number",
        ),
        ("predict --model @m --data @data.csv --samples 3 --out @x.csv", "which nothing draws"),
        ("export --model @m --gamma north --to @x", "give one for each of: site, dose"),
        (
            "train --data @data.csv --out @x --conditions @data.csv --range b=cat:5",
            "with different categories",
        ),
        ("train --data @data.csv --out @x --conditions @sites.csv --range place=0:1", "there are site, dose"),
        ("train --data @data.csv --out @x --conditions @sites.csv --norm batch", "choose another --norm"),
        ("train --data @data.csv --resume @m --steps 160", "give --conditions as it was given"),
    ] {
        desk.assert_refused(line, words);
    }
    let rows = fs::read_to_string(desk.path("sites.csv")).unwrap();
    desk.write("east.csv", rows.replacen("south", "east", 1));
    desk.assert_refused("eval --model @m --data @data.csv --conditions @east.csv", "east.csv, row 3");
    desk.write("gap.csv", rows.replacen("north,1", "north,", 1));
    desk.assert_refused("eval --model @m --data @data.csv --conditions @gap.csv", "gap.csv, row 1");
    desk.write("short.csv", "site,dose\nnorth,1\n");
    desk.assert_refused("eval --model @m --data @data.csv --conditions @short.csv", "1 rows for 40 images");
    desk.write("sites-only.csv", "site\nnorth\n");
    assert!(!desk.path("x").exists() && !desk.path("x.csv").exists());
    // With categories in an order of one's own, and a scale.
    let ranges = "--range site=cat:south,north --range dose=1:100:log";
    desk.json(&format!(
        "train --data @data.csv --conditions @sites.csv {ranges} {options} --steps 2 --out @o"
    ));
    let config = fs::read_to_string(desk.path("o").join("config.json")).unwrap();
    assert!(config.find("\"south\"").unwrap() < config.find("\"north\"").unwrap(), "{config}");
    desk.json("train --data @data.csv --conditions @sites.csv --resume @o --steps 3");
}

#[test]
fn a_bayesian_network_is_one_with_noise_and_weights_go_into_a_file_alone() {
    let desk = desk();
    desk.json(&format!("train --task bayes --gamma-dim 3 --data @data.csv {TINY} --steps 4 --out @b"));
    assert!(fs::read_to_string(desk.path("b").join("config.json")).unwrap().contains("\"noise\""));
    desk.json("predict --model @b --data @data.csv --samples 3 --out @p.csv");
    let text = fs::read_to_string(desk.path("p.csv")).unwrap();
    assert!(text.starts_with("gamma,row,pred,p_down,p_up,entropy\nmean,1,"), "{text}");
    desk.json("export --model @b --gamma 0.1,0.2,0.3 --to @one.safetensors");
    desk.json("export --model @b --gamma 0.1,0.2,0.3 --to @one");
    let file = TensorFile::read(&desk.path("one.safetensors")).unwrap();
    let folder = TensorFile::read(&desk.path("one/model.safetensors")).unwrap();
    assert_eq!(floats(&file, "net.layers.0.weight"), floats(&folder, "net.layers.0.weight"));
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
fn pairs_of_ones_own_are_registered_and_label_maps_tell_their_overlap() {
    let desk = Desk::new(&Mip);
    // A square, and the same square one pixel further to the right.
    let plane = |pair: usize, shift: usize| {
        let inside = |row: usize, column: usize| {
            (2..5).contains(&row) && (1 + pair % 3 + shift..4 + pair % 3 + shift).contains(&column)
        };
        (0..64).map(|i| i64::from(inside(i / 8, i % 8))).collect::<Vec<_>>()
    };
    let stack = |shift: usize| (0..6).flat_map(|pair| plane(pair, shift)).collect::<Vec<i64>>();
    let (mut pairs, mut maps) = (TensorFile::new(), TensorFile::new());
    for (name, shift) in [("moving", 0), ("fixed", 1)] {
        let grey = stack(shift).iter().map(|x| x * 200).collect();
        pairs.insert(name, HostTensor::int([6, 8, 8], grey));
        maps.insert(name, HostTensor::int([6, 8, 8], stack(shift)));
    }
    kiln_data::write_npz(&desk.path("pairs.npz"), &pairs).unwrap();
    kiln_data::write_npz(&desk.path("maps.npz"), &maps).unwrap();
    let options = "--task register --hidden 4 --batch 3 --eval-every 2 --val-fraction 0.4";
    desk.json(&format!("train --data @pairs.npz {options} --steps 4 --probe-every 2 --out @r"));
    assert!(desk.path("r/proportionality.csv").exists());
    let swept = desk.json("eval --model @r --data @pairs.npz --maps @maps.npz --gamma-grid 2 --out @e.csv");
    assert_eq!(swept["pairs"], 6);
    let quality = &swept["conditions"][0]["quality"];
    // Squares of 3 x 3 that share 2 columns: 2 · 6 / 18.
    assert!((quality["dice_before"].as_f64().unwrap() - 2.0 / 3.0).abs() < 1e-9, "{quality}");
    assert!(quality["dice"].as_f64().unwrap() <= 1.0);
    assert!(
        fs::read_to_string(desk.path("e.csv"))
            .unwrap()
            .starts_with("gamma,difference,difference_before,roughness,folded,dice,dice_before\n")
    );
    desk.json("predict --model @r --data @pairs.npz --gamma 0.5 --out @moved");
    let fields = kiln_data::read_npz(&desk.path("moved/fields.npz")).unwrap();
    assert_eq!(fields.get("field_gamma_0.500").unwrap().shape, [6, 2, 8, 8]);
    desk.json("analyze --model @r --data @pairs.npz --out @a.json");
    maps.insert("fixed", HostTensor::int([5, 8, 8], vec![0; 320]));
    kiln_data::write_npz(&desk.path("few.npz"), &maps).unwrap();
    desk.assert_refused("eval --model @r --data @pairs.npz --maps @few.npz", "11 maps for 12 images");
    // Folders of pictures do as well, and their maps.
    for part in ["moving", "fixed"] {
        for folder in ["pictures", "labels"] {
            fs::create_dir_all(desk.path(folder).join(part)).unwrap();
            let values = pairs.get(part).unwrap().as_ints().unwrap()[..64].iter();
            let grey: Vec<u8> =
                values.map(|&x| if folder == "labels" { (x / 200) as u8 } else { x as u8 }).collect();
            let picture = image::GrayImage::from_raw(8, 8, grey).unwrap();
            picture.save(desk.path(folder).join(part).join("one.png")).unwrap();
        }
    }
    let swept = desk.json("eval --model @r --data @pictures --maps @labels --gamma 0");
    let before = swept["conditions"][0]["quality"]["dice_before"].as_f64().unwrap();
    assert!((before - 2.0 / 3.0).abs() < 1e-9, "{before}");
    fs::rename(desk.path("pictures/fixed/one.png"), desk.path("pictures/fixed/two.png")).unwrap();
    desk.assert_refused("eval --model @r --data @pictures --gamma 0", "has no partner for \"one\"");
}

#[test]
fn a_trained_unet_becomes_a_conditioned_one() {
    let desk = Desk::new(&Mip);
    let scans = kiln_mip::scale::Scans::discs(4, &mut kiln_core::random_stream(0, "test", 0));
    let mut file = TensorFile::new();
    file.insert("x", HostTensor::float([4, 32, 32], scans.images.pixels.clone()));
    file.insert("mask", HostTensor::float([4, 32, 32], scans.masks.clone()));
    kiln_data::write_npz(&desk.path("scans.npz"), &file).unwrap();
    let train = "train --task scale --arch unet --data @scans.npz --hidden 4 --batch 2";
    desk.json(&format!("{train} --eval-every 2 --val-fraction 0.5 --steps 2 --probe-every 1 --out @s"));
    let probed = fs::read_to_string(desk.path("s/proportionality.csv")).unwrap();
    assert_eq!(probed.lines().filter(|line| line.contains(",activations,")).count(), 3 * 7);
    desk.json("export --model @s --gamma 0.5 --to @u.safetensors");
    let convert = "convert --arch unet --hidden 4 --weights @u.safetensors --data @scans.npz";
    let converted = desk.json(&format!("{convert} --task scale --out @c"));
    assert_eq!(converted["conditioned"].as_array().unwrap().len(), 7);
    let (plain, base) = (
        TensorFile::read(&desk.path("u.safetensors")).unwrap(),
        TensorFile::read(&desk.path("c/model.safetensors")).unwrap(),
    );
    assert_eq!(floats(&plain, "out.weight"), floats(&base, "base.out.weight"));
    desk.json("eval --model @c --data @scans.npz --gamma-grid 2");
    desk.json("analyze --model @c --data @scans.npz --out @a.json");
    desk.assert_refused("analyze --model @c --out @a.json", "name some with --data");
    desk.assert_refused(&format!("{convert} --out @x"), "--task register or --task scale");
    desk.assert_refused(&format!("{convert} --task scale --gamma-dim 2 --out @x"), "one factor");
    desk.assert_refused(&format!("{convert} --task scale --norm batch --out @x"), "no batch norms");
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
        &format!("train --data @data.csv {TINY} --norm batch --per-sample --out @x"),
        "choose another --norm",
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
