//! The verbs of `kiln stitch`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::io::{BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kiln_core::testing::Desk;
use kiln_core::{HostTensor, System, TensorFile};
use kiln_stitch::Stitch;
use kiln_stitch::budget::Budgets;
use kiln_stitch::checkpoint::open;
use kiln_stitch::serve::Server;
use serde_json::{Value, json};

/// Options of an anchor that trains in milliseconds.
const TINY: &str = "--depth 2 --heads 2 --steps 6 --batch 4 --eval-every 3 --lr 0.01";

/// A desk with forty images of 4 x 4 pixels in two classes: bright above or bright below.
fn desk() -> Desk {
    let desk = Desk::new(&Stitch);
    let pixels: Vec<String> = (0..16).map(|pixel| format!("p{pixel}")).collect();
    let mut text = format!("{},label\n", pixels.join(","));
    for image in 0..40 {
        for pixel in 0..16 {
            let bright = (pixel < 8) == (image % 2 == 0);
            text += &format!("{},", if bright { 12 + image % 4 } else { image * pixel % 5 });
        }
        text += if image % 2 == 0 { "up\n" } else { "down\n" };
    }
    desk.write("data.csv", text);
    desk
}

/// With the anchors `s/` and `l/`.
fn desk_with_anchors() -> Desk {
    let desk = desk();
    desk.json(&format!("anchor --width 4 {TINY} --data @data.csv --out @s"));
    desk.json(&format!("anchor --width 8 {TINY} --data @data.csv --out @l"));
    desk
}

/// And with the stitchable network `m/`.
fn desk_with_model() -> Desk {
    let desk = desk_with_anchors();
    desk.json("init --anchors @l,@s --data @data.csv --to @m");
    desk
}

fn weights(desk: &Desk, model: &str) -> Vec<u8> {
    fs::read(desk.path(model).join("model.safetensors")).unwrap()
}

#[test]
fn forward_gives_the_layers_and_logits_of_the_reference() {
    let desk = Desk::new(&Stitch);
    desk.json(
        "forward --weights %stitch_vit.safetensors --arch %stitch_vit.json --x-key x --to @o.safetensors",
    );
    let found = TensorFile::read(&desk.path("o.safetensors")).unwrap();
    let golden = TensorFile::read("tests/data/stitch_vit.safetensors".as_ref()).unwrap();
    for name in ["logits.anchor2", "logits.stitch0-1.0.1", "logits.stitch1-2.3.3", "stitch1-2.1.bias"] {
        let values = |file: &TensorFile| file.get(name).unwrap().as_floats().unwrap().to_vec();
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 + 1e-4 * b.abs();
        assert!(values(&found).iter().zip(&values(&golden)).all(close), "{name}");
    }
    desk.assert_refused(
        "forward --weights %stitch_vit.safetensors --arch %stitch_vit.json --x-key y --to @o.safetensors",
        "tensor \"y\" is missing",
    );
    let mut missing = golden;
    missing.take("anchor1.blocks.2.fc1.bias").unwrap();
    missing.write(&desk.path("missing.safetensors")).unwrap();
    desk.assert_refused(
        "forward --weights @missing.safetensors --arch %stitch_vit.json --to @p.safetensors",
        "\"blocks.2.mlp.fc1.bias\" is missing",
    );
    assert!(!desk.path("p.safetensors").exists());
}

#[test]
fn a_space_has_the_costs_of_the_paper_without_a_model() {
    let desk = desk();
    let line = "space --depths 12,12,12 --widths 192,384,768 --heads 3,6,12 --image 3,224,224 --patch 16 --classes 1000";
    let found = desk.json(&format!("{line} --out @space.csv"));
    assert_eq!((&found["num_configs"], &found["num_layers"]), (&json!(67), &json!(22)));
    // The paper gives 1.26 and 17.6 GFLOPs for DeiT-Ti and DeiT-B, and timm 5.7 and 86.6 million parameters.
    let figure = |id: usize, name: &str| found["configs"][id][name].as_f64().unwrap();
    assert!((figure(0, "flops") / 1e9 - 1.26).abs() < 0.01 && (figure(2, "flops") / 1e9 - 17.6).abs() < 0.05);
    assert_eq!((figure(0, "params"), figure(2, "params")), (5_717_416.0, 86_567_656.0));
    assert_eq!(found["configs"][3]["name"], "s0>s1@0>1");
    assert_eq!(fs::read_to_string(desk.path("space.csv")).unwrap().lines().count(), 68);

    let bare = desk.json("space --depths 12,12,12 --include-m0");
    assert_eq!((&bare["num_configs"], &bare["configs"][5]["flops"]), (&json!(71), &Value::Null));
    desk.assert_refused("space --depths 12", "1 anchor cannot be stitched");
    desk.assert_refused("space --depths 1,1", "no block of one anchor");
    desk.assert_refused("space --depths 2,2 --kernel 0", "--kernel lies between");
    desk.assert_refused("space --depths 2,2 --widths 4", "do not belong together");
    desk.assert_refused("space --depths 2,99999", "between 1 and 4096 blocks");
}

#[test]
fn a_stopped_run_goes_on_to_the_same_weights() {
    let desk = desk_with_anchors();
    let options = "--data @data.csv --steps 6 --batch 4 --eval-every 3 --distill soft --sampling sandwich --init random";
    for (line, more, model) in [
        (format!("anchor --width 4 {TINY} --data @data.csv"), "anchor --data @data.csv", "a"),
        (format!("train --anchors @s,@l {options}"), "train --data @data.csv", "t"),
    ] {
        desk.json(&format!("{line} --out @{model}"));
        desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
        let refusal = desk.refusal(&format!("{line} --out @{model}2"));
        assert!(refusal.contains("--resume"), "{refusal}");
        desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
        desk.json(&format!("{more} --resume @{model}2"));
        assert_eq!(weights(&desk, model), weights(&desk, &format!("{model}2")));
        desk.assert_refused(&format!("{line} --out @{model}"), "already holds a training run");
    }
    let parts = ["checkpoint.safetensors", "loss.svg", "train_log.csv", "teacher/config.json"];
    assert!(parts.iter().all(|part| desk.path("t").join(part).exists()));
    desk.assert_refused("train --data @data.csv --resume @t --kernel 3", "cannot be used with");
}

#[test]
fn every_network_is_scored_and_the_best_within_a_budget_predicts() {
    let desk = desk_with_model();
    let before = desk.json("predict --model @m --data @data.csv --budget-mflops 1000 --out @p.csv");
    assert_eq!(before["name"], "s1", "without scores the dearest counts as the best");
    desk.assert_refused("predict --model @m --data @data.csv --budget-ms 5 --out @q.csv", "eval --latency");
    let found = desk.json("eval --model @m --data @data.csv --latency");
    let scores = found["scores"].as_array().unwrap();
    assert_eq!(scores.len(), 2 + 2);
    assert!(scores.iter().all(|score| score["latency_ms"].as_f64().unwrap() > 0.0));
    let parts = ["scores.csv", "scores.svg", "scores.png", "scores.html"];
    assert!(parts.iter().all(|part| desk.path("m").join(part).exists()));
    let page = fs::read_to_string(desk.path("m/scores.html")).unwrap();
    assert!(["s0&gt;s1@0&gt;1", "ms a batch", "<svg"].iter().all(|part| page.contains(part)));
    let table = fs::read_to_string(desk.path("m/scores.csv")).unwrap();
    assert!(table.starts_with("config,name,flops,params,latency_ms,acc\n0,s0,"), "{table}");

    let best = scores.iter().map(|score| score["acc"].as_f64().unwrap()).fold(0.0, f64::max);
    let chosen = desk.json("predict --model @m --data @data.csv --budget-ms 1e9 --out @p.csv");
    assert_eq!(scores[chosen["config"].as_u64().unwrap() as usize]["acc"], best);
    let text = fs::read_to_string(desk.path("p.csv")).unwrap();
    assert!(text.starts_with("row,pred,p_down,p_up\n") && text.lines().count() == 41, "{text}");
    for line in text.lines().skip(1) {
        let p: Vec<f32> = line.split(',').skip(2).map(|cell| cell.parse().unwrap()).collect();
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{line}");
    }
    let least = desk.json("predict --model @m --data @data.csv --budget-mflops 1e-9 --out @p.csv");
    assert_eq!((&least["name"], &least["over_budget"]), (&json!("s0"), &json!(true)));
    let strict = "predict --model @m --data @data.csv --budget-mflops 1e-9 --strict --out @q.csv";
    desk.assert_refused(strict, "even the cheapest network");
    desk.assert_refused("predict --model @m --data @data.csv --budget-ms=-1 --out @q.csv", "buys nothing");
    desk.assert_refused("predict --model @m --data @data.csv --config 4 --out @q.csv", "from 0 to 3");
    desk.write("others.csv", table.replace("s0>s1@0>1", "s0>s1@7>8"));
    desk.assert_refused(
        "predict --model @m --data @data.csv --scores @others.csv --out @q.csv",
        "row 3 says that configuration 2 is s0>s1@7>8",
    );
    assert!(!desk.path("q.csv").exists());
}

#[test]
fn a_network_on_its_own_is_captured_with_the_cost_that_the_space_says() {
    let desk = desk_with_anchors();
    let image = "--depth 1,2,1 --steps 2 --batch 4 --lr 0.01 --data @data.csv";
    desk.json(&format!("anchor --family resnet --width 2 {image} --out @r2"));
    desk.json(&format!("anchor --family resnet --width 4 {image} --out @r4"));
    desk.json(&format!("anchor --family swin --width 4 --heads 2 --window 2 {image} --out @w4"));
    desk.json(&format!("anchor --family swin --width 8 --heads 2 --window 2 {image} --out @w8"));
    for (number, anchors) in ["@s,@l", "@r2,@r4", "@w4,@w8", "@r2,@w8"].into_iter().enumerate() {
        desk.json(&format!("init --anchors {anchors} --data @data.csv --to @m{number}"));
        let space = desk.json(&format!("space --anchors {anchors}"));
        for line in space["configs"].as_array().unwrap() {
            let to = format!("e{number}-{}", line["config"]);
            let exported =
                desk.json(&format!("export --model @m{number} --config {} --to @{to}", line["config"]));
            assert_eq!(exported["name"], line["name"]);
            let network = Stitch.network(&desk.path(&to), &desk.cx).unwrap();
            let graph = kiln_compiler::capture(network).unwrap();
            let counted: u64 = graph.operations.iter().map(|op| macs(&json!(op))).sum();
            assert_eq!(json!(counted), line["flops"], "{anchors}: {}", line["name"]);
        }
    }
    desk.assert_refused("predict --model @e0-2 --data @data.csv --out @p.csv", "holds a single network");
    let error = Stitch.network(&desk.path("m0"), &desk.cx).err().unwrap();
    assert!(error.hint_text().unwrap().contains("kiln stitch export"));
}

/// Multiplications that are added up in an operation of a captured graph, by the extents of its tensors.
fn macs(operation: &Value) -> u64 {
    let extents = |tensor: &Value| -> Vec<u64> {
        tensor["shape"]["dims"].as_array().unwrap().iter().map(|dim| dim.as_u64().unwrap()).collect()
    };
    let numel = |tensor: &Value| extents(tensor).iter().product::<u64>();
    let matmul = &operation["Float"][1]["Matmul"];
    let (conv, attention) = (&operation["Module"]["Conv2d"], &operation["Module"]["Attention"]);
    if matmul.is_object() {
        numel(&matmul["out"]) * extents(&matmul["lhs"]).last().unwrap()
    } else if conv.is_object() {
        numel(&conv["out"]) * extents(&conv["weight"])[1..].iter().product::<u64>()
    } else if attention.is_object() {
        2 * numel(&attention["query"]) * extents(&attention["key"])[2]
    } else {
        0
    }
}

#[test]
fn batch_norms_are_calibrated_after_training_and_on_demand() {
    let desk = desk();
    let options = "--family resnet --depth 1,2,1 --steps 4 --batch 4 --lr 0.01 --data @data.csv";
    desk.json(&format!("anchor --width 2 {options} --out @s"));
    desk.json(&format!("anchor --width 4 {options} --out @l"));
    let norms = |model: &str| TensorFile::read(&desk.path(model).join("norms.safetensors")).unwrap();
    desk.json("init --anchors @s,@l --data @data.csv --to @i");
    assert!(
        !norms("i").names().any(|name| name.starts_with("0.") || name.starts_with("1.")),
        "the anchors keep theirs"
    );

    let train = "train --anchors @s,@l --data @data.csv --steps 6 --warmup 1 --batch 4 --lr 0.01";
    desk.json(&format!("{train} --out @m"));
    let found = norms("m");
    assert!((0..3).all(|id| found.get(&format!("{id}.0.running_mean")).is_some()));
    desk.json("export --model @m --config 2 --to @e");
    let single = TensorFile::read(&desk.path("e/model.safetensors")).unwrap();
    assert_eq!(single.get("parts.0.bn1.running_mean"), found.get("2.0.running_mean"));
    let accuracy = |desk: &Desk| desk.json("eval --model @m --data @data.csv")["scores"].clone();
    let before = accuracy(&desk);
    desk.json("calibrate --model @m --data @data.csv");
    assert_ne!(
        norms("m").get("2.0.running_mean"),
        found.get("2.0.running_mean"),
        "more images than training has"
    );

    // Statistics that belong to earlier weights are gone until training ends, but not where none begins.
    desk.assert_refused("train --data @data.csv --limit 20 --resume @m --steps 8", "images");
    assert!(desk.path("m/norms.safetensors").exists());
    desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
    desk.refusal("train --data @data.csv --resume @m --steps 8");
    assert!(!desk.path("m/norms.safetensors").exists());
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    assert_eq!(before.as_array().unwrap().len(), accuracy(&desk).as_array().unwrap().len());
    desk.json("train --data @data.csv --resume @m --steps 8");

    let whole = norms("m");
    for (name, tensor, words) in [
        ("2.0.running_var", HostTensor::float([2], vec![1.0, -1.0]), "\"2.0.running_var\" holds numbers"),
        ("2.0.running_mean", HostTensor::float([2], vec![f32::NAN, 0.0]), "norms.safetensors"),
        ("2.0.running_mean", HostTensor::float([3], vec![0.0; 3]), "\"2.0.running_mean\""),
        ("99.0.running_mean", HostTensor::float([2], vec![0.0; 2]), "belongs to no batch norm"),
        ("0.99.running_mean", HostTensor::float([2], vec![0.0; 2]), "belongs to no batch norm"),
    ] {
        let mut file = whole.clone();
        file.insert(name, tensor);
        file.write(&desk.path("m/norms.safetensors")).unwrap();
        desk.assert_refused("predict --model @m --data @data.csv --config 2 --out @p.csv", words);
    }
    desk.write("m/norms.safetensors", "cut off");
    let refusal = desk.refusal("predict --model @m --data @data.csv --config 2 --out @p.csv");
    assert!(refusal.contains("norms.safetensors"), "{refusal}");
    desk.json("calibrate --model @m --data @data.csv");
    desk.json("predict --model @m --data @data.csv --config 2 --out @p.csv");
    let transformers = desk_with_model();
    transformers.assert_refused("calibrate --model @m --data @data.csv", "has no batch norms");
}

#[test]
fn every_request_gets_an_answer_by_the_network_that_it_can_afford() {
    let desk = desk_with_model();
    image::GrayImage::from_fn(4, 4, |_, y| image::Luma([if y < 2 { 250 } else { 5 }]))
        .save(desk.path("up.png"))
        .unwrap();
    image::RgbImage::new(4, 4).save(desk.path("red.png")).unwrap();
    let (config, net) = open(&desk.path("m"), &desk.cx).unwrap();
    let budgets = Budgets::open(&desk.path("m"), None, net.space()).unwrap();
    let at = |name: &str| desk.path(name).display().to_string();
    let requests = [
        json!({ "image": at("up.png"), "budget_mflops": 1e-9 }).to_string(),
        json!({ "image": at("up.png") }).to_string(),
        json!({ "image": at("up.png"), "config": "s0>s1@0>1" }).to_string(),
        String::new(),
        "no JSON".into(),
        json!({ "image": at("up.png"), "budget": 3 }).to_string(),
        json!({ "image": at("up.png"), "config": 9 }).to_string(),
        json!({ "image": at("up.png"), "config": 1, "budget_ms": 3 }).to_string(),
        json!({ "image": at("nothing.png") }).to_string(),
        json!({ "image": at("red.png") }).to_string(),
        json!({ "image": at("data.csv") }).to_string(),
    ];
    let server = Server { config: &config, net: &net, budgets: &budgets, strict: false };
    desk.cx.take_printed();
    assert_eq!(server.run(Cursor::new(requests.join("\n")), &desk.cx).unwrap(), 10);
    let printed = desk.cx.take_printed();
    let answers: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&answers[0]["name"], &answers[0]["over_budget"]), (&json!("s0"), &json!(true)));
    assert_eq!((&answers[1]["name"], &answers[2]["name"]), (&json!("s1"), &json!("s0>s1@0>1")));
    let sum: f64 =
        answers[1]["probabilities"].as_object().unwrap().values().map(|p| p.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-5);
    let words = [
        "not a request",
        "unknown field",
        "no configuration 9",
        "one of",
        "cannot read",
        "[3, 4, 4]",
        "is no PNG",
    ];
    for (answer, words) in answers[3..].iter().zip(words) {
        assert!(answer["error"].as_str().unwrap().contains(words), "{answer}");
    }
    let strict = Server { strict: true, ..server };
    strict.run(Cursor::new(requests[0].clone()), &desk.cx).unwrap();
    assert!(desk.cx.take_printed().contains("even the cheapest"));
    let error = strict.run(BufReader::new(Silent(desk.cx.interrupt_flag())), &desk.cx).unwrap_err();
    assert!(error.to_string().contains("stopped after 0 requests"), "{error}");
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    let long = vec![b'x'; (1 << 20) + 1];
    assert!(strict.run(Cursor::new(long), &desk.cx).unwrap_err().to_string().contains("longer than"));
}

/// Input that never comes; the user loses patience as soon as it is waited for.
struct Silent(Arc<AtomicBool>);

impl Read for Silent {
    fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
        self.0.store(true, Ordering::Relaxed);
        loop {
            std::thread::park();
        }
    }
}

#[test]
fn training_takes_all_its_options_and_compares_with_distillation() {
    let desk = desk_with_anchors();
    desk.json("anchor --width 6 --depth 2 --heads 2 --epochs 0 --data @data.csv --out @w");
    desk.json("anchor --width 6 --depth 2 --heads 2 --epochs 0 --weights @w/model.safetensors --data @data.csv --out @x");
    assert_eq!(weights(&desk, "w"), weights(&desk, "x"));
    for likeness in ["", "--prune-by residual"] {
        desk.json(&format!(
            "init --anchors @s,@w,@l --prune-space 2 {likeness} --data @data.csv --to @pruned"
        ));
        assert_eq!(desk.json("space --model @pruned")["num_configs"], 3 + 2);
    }
    let trained = desk.json(
        "train --anchors @s,@w,@l --data @data.csv --limit 30 --test @data.csv --steps 4 --batch 4 --init random \
         --distill hard --teacher @l --freeze-anchors --rank 2 --prune-space 3 --pairs all --out @m",
    );
    assert!(trained["test_accuracy"].as_f64().is_some());
    let (s, m) = (weights(&desk, "s"), desk.path("m"));
    let file = TensorFile::read(&m.join("model.safetensors")).unwrap();
    let before = TensorFile::from_bytes(&s, "s").unwrap();
    assert_eq!(file.get("anchors.0.head.weight"), before.get("head.weight"), "frozen");
    let found = desk.json(
        "eval --model @m --data @data.csv --compare distill --train-data @data.csv --compare-steps 3 --out @e.csv",
    );
    assert_eq!(found["scores"].as_array().unwrap().len(), 3 + 3);
    assert_eq!(found["rivals"][0]["flops"], found["scores"][0]["flops"]);
    desk.json("train --from @m --data @data.csv --steps 2 --batch 4 --out @n");
}

#[test]
fn anchors_that_do_not_belong_together_are_refused_by_name() {
    let desk = desk_with_anchors();
    let text = fs::read_to_string(desk.path("data.csv")).unwrap();
    desk.write("east.csv", text.replace("up", "east"));
    desk.json(&format!("anchor --width 8 {TINY} --data @east.csv --out @east"));
    desk.json(&format!("anchor --width 8 {TINY} --patch 2 --data @data.csv --out @patch"));
    desk.json(&format!("anchor --width 8 {TINY} --data @data.csv --limit 17 --out @scaled"));
    let init = |anchors: &str, words: &str| {
        desk.assert_refused(&format!("init --anchors {anchors} --data @data.csv --to @no"), words);
    };
    init("@s,@east", "has the classes down, up");
    init("@s,@patch", "positions");
    init("@s,@scaled", "has pixels scaled by");
    desk.json(&format!("anchor --width 8 {TINY} --data @data.csv --limit 17 --like @s --out @like"));
    desk.json("init --anchors @s,@like --data @data.csv --to @joined");
    init("@s,@s", "are the same anchor");
    init("@s", "one anchor cannot be stitched");
    init("@s,@missing", "cannot read");
    fs::write(desk.path("l/config.json"), r#"{"kind": "stitch", "model": "anchor"}"#).unwrap();
    init("@s,@l", "does not describe such a model");
    assert!(!desk.path("no").exists());

    let anchor = |options: &str, words: &str| {
        desk.assert_refused(&format!("anchor {options} --data @data.csv --out @no"), words);
    };
    anchor("--width 5 --heads 2", "2 heads do not divide a width of 5");
    anchor("--patch 3", "do not fill");
    anchor("--depth 1,2", "a vit has no stages");
    anchor("--width 99999999999", "impossible");
    anchor("--limit 0", "leaves no images");
    anchor("--limit 1", "one image is too few");
    anchor("--val-fraction 2", "not between 0 and 1");
    anchor("--lr=-1", "learning rate");
    anchor("--batch 0", "--batch must be at least 1");
    anchor("--family swin --depth 1,1,1,1 --heads 2", "cannot be merged");
    assert!(!desk.path("no").exists());
}

#[test]
fn a_damaged_model_is_refused_with_its_place() {
    let desk = desk_with_model();
    let config = fs::read_to_string(desk.path("m/config.json")).unwrap();
    let predict = "predict --model @m --data @data.csv --out @p.csv";
    for (from, to, words) in [
        ("\"before\": 1", "\"before\": 7", "impossible space"),
        ("\"before\": 1", "\"before\": -1", "does not describe such a model"),
        ("\"layer\": 0", "\"layer\": 9", "impossible space"),
        ("\"width\": 8", "\"width\": 70000", "impossible network"),
        ("\"width\": 8", "\"width\": 16", "expected floats of shape"),
        ("\"depth\": 2", "\"depth\": 1000000000", "impossible network"),
        ("\"std\": [", "\"std\": [1.0, ", "\"scaling\" is wrong"),
        ("\"anchors\": [\n        0\n      ]", "\"anchors\": [\n        5\n      ]", "impossible space"),
    ] {
        let broken = config.replacen(from, to, 1);
        assert_ne!(broken, config, "{from}");
        desk.write("m/config.json", broken);
        desk.assert_refused(predict, words);
    }
    desk.write("m/config.json", config);
    let whole = weights(&desk, "m");
    desk.write("m/model.safetensors", &whole[..whole.len() / 2]);
    desk.assert_refused(predict, "model.safetensors");
    assert!(!desk.path("p.csv").exists());
}
