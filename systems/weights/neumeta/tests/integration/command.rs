//! The verbs of `kiln neumeta`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;
use std::sync::atomic::Ordering;

use image::GrayImage;
use kiln_core::testing::Desk;
use kiln_core::{HostTensor, TensorFile};
use kiln_neumeta::NeuMeta;

/// Options of networks that train in milliseconds.
const NET: &str = "--arch conv(cin->w,3x3)+relu+avgpool2;fc(w->classes) --width 4 --batch 4 --eval-every 3";
const FUNCTION: &str = "--widths 2,4 --hidden 4 --layers 2 --num-freqs 2 --batch 4 --eval-every 3";

/// A desk with twelve pictures of 3 x 3 pixels in two classes: bright above or bright below.
fn desk() -> Desk {
    let desk = Desk::new(&NeuMeta);
    let mut text = String::from("a,b,c,d,e,f,g,h,i,label\n");
    for i in 0..12 {
        let row = if i % 2 == 0 { "9,9,9,5,5,5,0,0,0,up" } else { "0,0,0,5,5,5,9,9,9,down" };
        text += &format!("{}{}\n", i % 5, &row[1..]);
    }
    desk.write("data.csv", text);
    desk
}

fn pretrained() -> Desk {
    let desk = desk();
    desk.json(&format!("pretrain --data @data.csv {NET} --steps 6 --out @full"));
    desk
}

fn trained() -> Desk {
    let desk = pretrained();
    desk.json(&format!("train --base @full --data @data.csv {FUNCTION} --steps 6 --out @family"));
    desk
}

fn weights(desk: &Desk, model: &str) -> Vec<u8> {
    fs::read(desk.path(model).join("model.safetensors")).unwrap()
}

#[test]
fn stopped_runs_go_on_to_the_same_weights() {
    let desk = trained();
    let stop = |on| desk.cx.interrupt_flag().store(on, Ordering::Relaxed);
    stop(true);
    let refusal = desk.refusal(&format!("pretrain --data @data.csv {NET} --steps 6 --out @parts"));
    assert!(refusal.contains("kiln neumeta pretrain --data"), "{refusal}");
    stop(false);
    desk.assert_refused("eval --model @parts --data @data.csv", "a training run that has not ended");
    desk.json("pretrain --data @data.csv --resume @parts");
    assert_eq!(weights(&desk, "full"), weights(&desk, "parts"));

    for warm in ["", "--warm-steps 5 --base-term none"] {
        desk.json(&format!(
            "train --base @full --data @data.csv {FUNCTION} {warm} --steps 6 --out @whole{}",
            warm.len()
        ));
        stop(true);
        let refusal = desk.refusal(&format!(
            "train --base @full --data @data.csv {FUNCTION} {warm} --steps 6 --out @half{}",
            warm.len()
        ));
        assert!(refusal.contains("--resume"), "{refusal}");
        stop(false);
        desk.json(&format!("train --data @data.csv --resume @half{}", warm.len()));
        assert_eq!(
            weights(&desk, &format!("whole{}", warm.len())),
            weights(&desk, &format!("half{}", warm.len()))
        );
    }
    assert_eq!(weights(&desk, "family"), weights(&desk, "whole0"));
}

#[test]
fn a_sampled_network_is_judged_as_the_family_is_there() {
    let desk = trained();
    let sampled = desk.json("sample --model @family --width 3 --draws 4 --to @small");
    assert_eq!(sampled["parameters"], 3 * 9 + 3 + 3 * 2 + 2);
    let small = desk.json("eval --model @small --data @data.csv");
    let family = desk.json("eval --model @family --data @data.csv --widths 2-4 --draws 4 --out @e.csv");
    assert_eq!(family["lines"][0]["scores"][1], small["score"]);
    let table = fs::read_to_string(desk.path("e.csv")).unwrap();
    assert!(table.starts_with("width,trained,family\n2,true,") && table.contains("\n3,false,"), "{table}");
    assert!(desk.path("e.svg").exists());
    // The same network as a file of its own, by its number of parameters.
    let again = desk.json("sample --model @family --max-params 40 --draws 4 --to @s.safetensors");
    assert_eq!(again["width"], 3);
    assert_eq!(fs::read(desk.path("s.safetensors")).unwrap(), weights(&desk, "small"));
    assert!(fs::read_to_string(desk.path("s.json")).unwrap().contains("\"width\": 3"));
    desk.assert_refused("sample --model @family --max-params 3 --to @x", "the narrowest has 14");
}

/// A desk with a network whose layers have kernels of 5 and 3, and a family that was trained at kernels of 1, 3 and 5.
fn of_kernels() -> Desk {
    let desk = desk();
    let net = NET.replace("conv(cin->w,3x3)+relu", "a(cin->w,5x5)+relu;b(w->w,3x3)+relu");
    desk.json(&format!("pretrain --data @data.csv {net} --steps 6 --out @full"));
    desk.json(&format!(
        "train --base @full --data @data.csv {FUNCTION} --kernels 1,3,5 --steps 6 --out @family"
    ));
    desk
}

#[test]
fn kernels_are_trained_stopped_and_resumed_to_the_same_weights() {
    let desk = of_kernels();
    let config = fs::read_to_string(desk.path("family/config.json")).unwrap();
    assert!(config.contains("\"kernel_crop\": \"fold\""), "{config}");
    let stop = |on| desk.cx.interrupt_flag().store(on, Ordering::Relaxed);
    let train = format!("train --base @full --data @data.csv {FUNCTION} --kernels 1,3,5 --steps 6");
    stop(true);
    assert!(desk.refusal(&format!("{train} --out @parts")).contains("--resume"));
    stop(false);
    let found = desk.json("train --data @data.csv --resume @parts");
    assert_eq!(weights(&desk, "family"), weights(&desk, "parts"));
    // The narrowest, the full one, and that with the smallest kernels.
    let sizes: Vec<_> = found["scores"].as_array().unwrap().iter().map(|score| &score["kernel"]).collect();
    assert!(sizes.len() == 3 && sizes[0].is_null() && sizes[1].is_null() && sizes[2] == 1, "{found}");
    for crop in ["flat", "middle"] {
        desk.json(&format!("{train} --kernel-crop {crop} --out @{crop}"));
        assert_ne!(weights(&desk, "family"), weights(&desk, crop));
    }
}

#[test]
fn networks_of_every_kernel_are_sampled_judged_and_drawn() {
    let desk = of_kernels();
    let count = |kernel: usize| {
        let name = format!("@k{kernel}");
        let found =
            desk.json(&format!("sample --model @family --width 3 --kernel {kernel} --draws 2 --to {name}"));
        found["parameters"].as_u64().unwrap() as usize
    };
    let expected = |a: usize, b: usize| 3 * a + 3 + 9 * b + 3 + 3 * 2 + 2;
    assert_eq!([1, 3, 5].map(count), [expected(1, 1), expected(9, 9), expected(25, 9)]);
    let config = fs::read_to_string(desk.path("k5/config.json")).unwrap();
    assert!(!config.contains("\"kernel\""), "whole kernels need no word: {config}");
    let line =
        "eval --model @family --data @data.csv --widths 3,4 --draws 2 --baselines --out @e.csv --kernels";
    let found = desk.json(&format!("{line} all"));
    let lines = found["lines"].as_array().unwrap();
    assert_eq!(lines.len(), 3 + 3 * 3);
    assert_eq!((&lines[1]["name"], &lines[1]["kernel"]), (&"family kernel 3".into(), &3.into()));
    for (place, kernel) in [1, 3, 5].into_iter().enumerate() {
        let alone = desk.json(&format!("eval --model @k{kernel} --data @data.csv"));
        assert_eq!(lines[place]["scores"][0], alone["score"]);
    }
    // Pruning to the full width leaves the full network, and whole kernels are not cut.
    let whole = lines.iter().find(|line| line["name"] == "pruned by L1 kernel 5").unwrap();
    assert_eq!(whole["scores"][1], found["full_network"]);
    let table = fs::read_to_string(desk.path("e.csv")).unwrap();
    assert!(
        table.starts_with("width,trained,family kernel 1,family kernel 3,family kernel 5,pruned"),
        "{table}"
    );
    assert!(desk.path("e.svg").exists() && desk.path("e-kernels.svg").exists());
    let drawn = desk.json("plot --model @family --tensor a.weight --kernels 1,5 --widths 2,4 --to @plots");
    assert_eq!(drawn["variation"].as_array().unwrap().len(), 2);
    // Kernels of 1 above those of 5, which stand a line apart: squares of 6 pixels, 8 between panels.
    let picture = image::open(desk.path("plots/a-weight.png")).unwrap().into_luma8();
    assert_eq!(picture.dimensions(), (3 * 8 + 2 * 6 * 6, 3 * 8 + 4 * 6 + 4 * 6 * 6));
    for (line, words) in [
        ("sample --model @family --width 3 --kernel 7 --to @x", "kernels of 7"),
        ("eval --model @family --data @data.csv --kernels 3,7", "at most the largest of it: 1, 3, 5"),
        ("eval --model @family --data @data.csv --kernels 3 --kernel 3", "cannot be used with"),
        ("eval --model @family --data @data.csv --depths all", "trained at its own depths only"),
        ("eval --model @family --data @data.csv --kernels 5-3", "no list of kernels"),
        ("plot --model @family --tensor a.weight --kernels 2 --to @x", "kernels of 2"),
        ("train --base @full --data @data.csv --kernels 3,7 --out @x", "there is no a(cin->w,5x5)"),
        ("train --base @full --data @data.csv --kernels 2 --out @x", "kernels of 2"),
        ("train --base @k3 --data @data.csv --out @x", "a network of width 3, kernel 3"),
    ] {
        desk.assert_refused(line, words);
    }
    assert!(!desk.path("x").exists());
}

#[test]
fn a_ladder_has_a_network_and_a_line_for_each_width() {
    let desk = trained();
    let rungs = desk.json("sample --model @family --ladder 2,4 --data @data.csv --draws 2 --to @ladder");
    assert_eq!(rungs.as_array().unwrap().len(), 2);
    assert!(rungs[1]["score"].as_f64().unwrap() <= 1.0);
    assert_eq!(fs::read_to_string(desk.path("ladder/ladder.csv")).unwrap().lines().count(), 3);
    assert!(desk.path("ladder/w2/model.safetensors").exists());
}

#[test]
fn baselines_stand_beside_the_family_and_stop_at_the_full_width() {
    let desk = trained();
    let found = desk.json(
        "eval --model @family --data @data.csv --widths 2,4,5 --draws 1 --train-data @data.csv --tune-steps 2 \
         --own-steps 2",
    );
    let lines = found["lines"].as_array().unwrap();
    assert_eq!(lines.len(), 1 + 4 * 2 + 1);
    assert_eq!(lines[1]["scores"][1], found["full_network"]);
    assert!(lines[1]["scores"][2].is_null() && lines[0]["scores"][2].is_f64());
    let few = desk.json("eval --model @family --data @data.csv --widths 4 --draws 1 --baselines");
    assert_eq!(few["lines"].as_array().unwrap().len(), 4);
}

#[test]
fn predictions_are_probabilities_of_a_family_or_of_a_network() {
    let desk = trained();
    desk.json("predict --model @family --width 4 --draws 2 --data @data.csv --out @p.csv");
    let text = fs::read_to_string(desk.path("p.csv")).unwrap();
    assert!(text.starts_with("row,pred,p_down,p_up\n"), "{text}");
    for line in text.lines().skip(1) {
        let p: Vec<f32> = line.split(',').skip(2).map(|cell| cell.parse().unwrap()).collect();
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{line}");
    }
    assert_eq!(desk.json("predict --model @full --data @data.csv --out @q.csv")["rows"], 12);
    desk.assert_refused(
        "predict --model @family --data @data.csv --out @r.csv",
        "choose a network of it with --width",
    );
    desk.assert_refused(
        "predict --model @full --width 2 --data @data.csv --out @r.csv",
        "whose size is its own",
    );
}

#[test]
fn smoothing_a_folder_or_a_file_gives_the_same_network() {
    let desk = pretrained();
    let report = desk.json("smooth --weights @full --to @ordered");
    assert!(report["output_change"].as_f64().unwrap() < 1e-5);
    assert!(report["variation_after"].as_f64() <= report["variation_before"].as_f64());
    let arch = "--arch conv(cin->w,3x3)+relu+avgpool2;fc(w->classes) --width 4 --image 1x3x3 --classes 2";
    desk.json(&format!("smooth --weights @full/model.safetensors {arch} --to @o.safetensors"));
    assert_eq!(fs::read(desk.path("o.safetensors")).unwrap(), weights(&desk, "ordered"));
    desk.assert_refused(
        "smooth --weights @full/model.safetensors --to @x.safetensors",
        "give --arch, --width and --image",
    );
    let wide = arch.replace("width 4", "width 5");
    desk.assert_refused(
        &format!("smooth --weights @full/model.safetensors {wide} --to @x.safetensors"),
        "tensor \"conv.weight\": has the shape [4, 1, 3, 3], expected [5, 1, 3, 3]",
    );
    let mut file = TensorFile::read(&desk.path("full/model.safetensors")).unwrap();
    file.insert("conv.norm.weight", HostTensor::float([4], vec![1.0; 4]));
    file.write(&desk.path("normed.safetensors")).unwrap();
    desk.assert_refused(
        &format!("smooth --weights @normed.safetensors {arch} --to @x.safetensors"),
        "conv.norm has no \"running_mean\"",
    );
    let mut file = TensorFile::read(&desk.path("full/model.safetensors")).unwrap();
    file.insert("fc.bias", HostTensor::float([2], vec![0.0, f32::NAN]));
    file.write(&desk.path("nan.safetensors")).unwrap();
    desk.assert_refused(
        &format!("smooth --weights @nan.safetensors {arch} --to @x.safetensors"),
        "tensor \"fc.bias\": element 1 is NaN",
    );
    assert!(!desk.path("x.safetensors").exists());
}

#[test]
fn a_path_is_printed_and_written() {
    let desk = Desk::new(&NeuMeta);
    desk.write("cities.csv", "x,y\n0,0\n5,0\n1,0\n9,1\n");
    let found = desk.json("shp --cities @cities.csv --to @path.csv");
    assert_eq!(found["length"], 10.0);
    let path: Vec<u64> =
        found["path"].as_array().unwrap().iter().map(|city| city.as_u64().unwrap()).collect();
    assert!(path == [0, 2, 1, 3] || path == [3, 1, 2, 0]);
    assert_eq!(fs::read_to_string(desk.path("path.csv")).unwrap().lines().count(), 5);
    let golden = desk.json("shp --cities %neumeta.safetensors:shp.cities");
    let file = TensorFile::read(Path::new("tests/data/neumeta.safetensors")).unwrap();
    let optimum = f64::from(file.get("shp.optimal_length").unwrap().as_floats().unwrap()[0]);
    assert!((golden["length"].as_f64().unwrap() / optimum - 1.0).abs() < 1e-5);
    desk.write("table.csv", "a,b,c\n0,1,5\n1,0,2\n5,2,0\n");
    assert_eq!(desk.json("shp --cities @table.csv --metric table")["length"], 3.0);
    desk.assert_refused(
        "shp --cities @cities.csv --metric table",
        "the table of distances is 4 x 2, not square",
    );
    desk.write("skew.csv", "a,b\n0,1\n2,0\n");
    desk.assert_refused("shp --cities @skew.csv --metric table", "the same in both directions");
    desk.write("words.csv", "a,b\n0,x\n2,y\n");
    desk.assert_refused("shp --cities @words.csv", "column \"b\" holds words");
    desk.assert_refused("shp --cities %neumeta.safetensors", "names no tensor");
    desk.assert_refused("shp --cities %neumeta.safetensors:none", "tensor \"none\" is missing");
}

#[test]
fn prepared_tensors_are_run_and_those_that_do_not_fit_are_named() {
    let desk = Desk::new(&NeuMeta);
    let found = desk.json("forward --weights %neumeta.safetensors --config %config.json --to @out.npz");
    assert_eq!(found["tensors"].as_array().unwrap().len(), 3 * 10 + 2);
    let config = fs::read_to_string("tests/data/config.json").unwrap();
    desk.write("wide.json", config.replace("\"hidden\": 12", "\"hidden\": 13"));
    desk.assert_refused(
        "forward --weights %neumeta.safetensors --config @wide.json --to @x.npz",
        "inr.0.in.weight is [12, 54]",
    );
    desk.write("chain.json", config.replace("fc(2w->classes)", "fc(3w->classes)"));
    desk.assert_refused(
        "forward --weights %neumeta.safetensors --config @chain.json --to @x.npz",
        "does not take what comes before it",
    );
}

#[test]
fn weights_are_drawn_over_widths() {
    let desk = trained();
    let found = desk.json("plot --model @family --tensor conv.weight --to @plots");
    assert_eq!(found["widths"].as_array().unwrap().len(), 2);
    assert!(
        desk.path("plots/conv-weight.png").exists() && desk.path("plots/conv-weight-variation.svg").exists()
    );
    desk.assert_refused(
        "plot --model @family --tensor conv --to @x",
        "it has conv.weight, conv.bias, fc.weight, fc.bias",
    );
}

/// Twelve grey pictures of 8 x 8 pixels with masks of their bright halves.
fn pictures(desk: &Desk) {
    fs::create_dir_all(desk.path("pictures")).unwrap();
    fs::create_dir_all(desk.path("masks")).unwrap();
    for i in 0..12u32 {
        let inside = |x: u32| x >= i % 6 && x < i % 6 + 3;
        let picture =
            GrayImage::from_fn(8, 8, |x, y| image::Luma([if inside(x) { 200 } else { (y * 3) as u8 }]));
        let mask = GrayImage::from_fn(8, 8, |x, _| image::Luma([u8::from(inside(x))]));
        picture.save(desk.path(&format!("pictures/{i:02}.png"))).unwrap();
        mask.save(desk.path(&format!("masks/{i:02}.png"))).unwrap();
    }
}

#[test]
fn segmentation_writes_masks_and_refuses_those_that_do_not_fit() {
    let desk = Desk::new(&NeuMeta);
    pictures(&desk);
    let data = "--data @pictures --masks @masks";
    let full =
        desk.json(&format!("pretrain --task segment {data} --width 2 --batch 2 --steps 3 --out @full"));
    assert_eq!(full["metric"], "mean IoU");
    desk.json(&format!(
        "train --base @full {data} --widths 1-2 --hidden 4 --num-freqs 2 --batch 2 --steps 3 --out @family"
    ));
    desk.json("predict --model @family --width 1 --draws 1 --data @pictures --out @found");
    let mask = image::open(desk.path("found/0012.png")).unwrap().into_luma8();
    assert!(mask.dimensions() == (8, 8) && mask.pixels().all(|pixel| pixel.0[0] < 2));
    desk.assert_refused("pretrain --task segment --data @pictures --out @x", "masks are needed");
    GrayImage::new(8, 7).save(desk.path("masks/03.png")).unwrap();
    desk.assert_refused(&format!("pretrain --task segment {data} --out @x"), "03.png: is 8 x 7 pixels");
    GrayImage::from_pixel(8, 8, image::Luma([9])).save(desk.path("masks/03.png")).unwrap();
    desk.assert_refused(
        &format!("eval --model @full {data}"),
        "03.png: has the class 9; classes are the pixels' values, 0 to 1",
    );
    fs::remove_file(desk.path("masks/05.png")).unwrap();
    desk.assert_refused(&format!("pretrain --task segment {data} --out @x"), "05.png");
    GrayImage::new(9, 9).save(desk.path("pictures/20.png")).unwrap();
    desk.assert_refused(&format!("pretrain --task segment {data} --out @x"), "all images must have one size");
    assert!(!desk.path("x").exists());
}

#[test]
fn an_autoencoder_draws_a_sheet() {
    let desk = Desk::new(&NeuMeta);
    pictures(&desk);
    desk.json("pretrain --task generate --data @pictures --width 2 --batch 2 --steps 3 --out @full");
    desk.json(
        "train --base @full --data @pictures --widths 1-2 --hidden 4 --num-freqs 2 --batch 2 --steps 3 --kd 0.1 \
         --out @family",
    );
    desk.json("generate --model @family --width 2 --draws 1 --n 5 --to @sheet.png");
    // Two rows of three, a line between them.
    assert_eq!(image::open(desk.path("sheet.png")).unwrap().into_luma8().dimensions(), (28, 19));
    desk.json("predict --model @full --data @pictures --out @back");
    assert!(desk.path("back/0012.png").exists());
    desk.assert_refused("generate --model @full --n 0 --to @x.png", "makes no sheet");
}

#[test]
fn every_part_of_the_method_can_be_taken_away() {
    let desk = pretrained();
    for (number, options) in [
        "--base-term none --output-scale none --plain-mlp --noise 0",
        "--order random --noise-on all --blockwise",
        "--order given --ratio 0.5 --kd 0.1 --reg 0 --recon 0 --noise-on channels",
    ]
    .iter()
    .enumerate()
    {
        let found = desk.json(&format!(
            "train --base @full --data @data.csv {FUNCTION} {options} --steps 3 --out @f{number}"
        ));
        assert_eq!(found["steps"], 3);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let desk = trained();
    for (line, words) in [
        ("pretrain --data @data.csv --out @x --arch vgg", "choose small, lenet, resnet20"),
        ("pretrain --data @data.csv --out @x --arch small", "3 x 3 pixels are too small for small"),
        ("pretrain --data @data.csv --out @x --task generate --arch lenet", "no network to generate with"),
        ("pretrain --data @data.csv --out @x --arch fc(cin->classes) --width 0", "no network of width 0"),
        (
            "pretrain --data @data.csv --out @x --batch 0 --arch fc(cin->classes)",
            "--batch must be at least 1",
        ),
        ("pretrain --data @none.csv --out @x", "none.csv"),
        ("pretrain --data @data.csv --arch fc(cin->classes) --out @full", "already holds a training run"),
        ("train --base @family --data @data.csv --out @x", "holds a family, not one network"),
        (
            "train --base @full --data @data.csv --widths 2-5 --out @x",
            "--widths goes to 5, the full network's is 4",
        ),
        ("train --base @full --data @data.csv --widths 5-2 --out @x", "is no list of widths"),
        ("train --base @full --data @data.csv --depths 1 --out @x", "has no depth to choose"),
        ("train --base @full --data @data.csv --hidden 0 --out @x", "--hidden 0 makes no implicit function"),
        ("train --base @full --data @data.csv --noise=-1 --out @x", "is no number of at least 0"),
        ("train --base @full --data @data.csv --ratio 2 --out @x", "a number from 0 to 1"),
        ("sample --model @full --width 2 --to @x", "holds one network, not a family"),
        ("sample --model @family --width 0 --to @x", "there is no network of width 0"),
        ("sample --model @family --width 7 --to @x", "widths are 1 to 6, and 4 is the full one"),
        ("sample --model @family --width 2 --kernel 2 --to @x", "with kernels of 2"),
        ("sample --model @family --width 2 --kernel 5 --to @x", "at most the largest of it: 1, 3"),
        ("sample --model @family --width 2 --draws 0 --to @x", "--draws 0 writes no network"),
        ("sample --model @family --to @x", "give --width, --max-params or --ladder"),
        ("generate --model @full --to @x", "a network to classify draws no pictures"),
    ] {
        desk.assert_refused(line, words);
    }
    desk.write("other.csv", "a,b,label\n1,2,up\n3,4,down\n");
    desk.assert_refused("eval --model @family --data @other.csv", "the model was trained on [1, 3, 3]");
    assert!(!desk.path("x").exists());
    // A family whose function was damaged, and one whose configuration asks for more than there is.
    let path = desk.path("family/model.safetensors");
    let whole = TensorFile::read(&path).unwrap();
    let mut file = whole.clone();
    file.insert("mlps.0.output.bias", HostTensor::float([9], vec![f32::NAN; 9]));
    file.write(&path).unwrap();
    desk.assert_refused("sample --model @family --width 2 --to @x", "mlps.0.output.bias");
    whole.write(&path).unwrap();
    let config = fs::read_to_string(desk.path("family/config.json")).unwrap();
    desk.write("family/config.json", config.replace("\"hidden\": 4", "\"hidden\": 8000"));
    desk.assert_refused("sample --model @family --width 2 --to @x", "config.json describes one of");
    assert!(!desk.path("x").exists());
}
