//! The verbs of `kiln ptq`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;

use burn::tensor::TensorData;
use kiln_compiler::loops::{Buffer, Elements, read_buffers, write_buffers};
use kiln_compiler::{Graph, OnnxOptions};
use kiln_core::testing::Desk;
use kiln_ptq::Ptq;
use kiln_ptq::arrays;

/// A network that trains in a second.
const TINY: &str = "--arch mobilenetv2-s --width 0.125 --batch 8 --eval-every 30";

/// What makes a search short.
const SHORT: &str = "--calib @data.csv --calib-count 16 --examples 16 --probes 1";

/// A desk with images of 6 x 6 pixels in two classes: bright above or below.
fn desk() -> Desk {
    let desk = Desk::new(&Ptq);
    let names: String = (0..36).map(|p| format!("p{p},")).collect();
    let pixel = |i: usize, p: usize| {
        let bright = (p < 18) == i.is_multiple_of(2);
        (if bright { 200 } else { 20 }) + (i * 7 + p * 13) % 50
    };
    let row = |i: usize| {
        let pixels: String = (0..36).map(|p| format!("{},", pixel(i, p))).collect();
        format!("{pixels}{}\n", ["up", "down"][i % 2])
    };
    desk.write("data.csv", format!("{names}label\n{}", (0..60).map(row).collect::<String>()));
    desk
}

fn trained() -> Desk {
    let desk = desk();
    let result = desk.json(&format!("train --data @data.csv {TINY} --steps 90 --out @m"));
    assert!(result["accuracy"].as_f64().unwrap() > 0.8, "{result}");
    desk
}

#[test]
fn a_network_is_quantised_run_compared_and_evaluated() {
    let desk = trained();
    let line = format!("quantize --model @m {SHORT} --valid @data.csv --target 0.95 --out @q");
    let result = desk.json(&line);
    assert!(result["at_8_bits"].as_u64().unwrap() + result["at_4_bits"].as_u64().unwrap() > 0, "{result}");
    assert!(result["bytes"][1].as_u64() < result["bytes"][0].as_u64(), "{result}");
    for file in [
        "config.json",
        "units.json",
        "sensitivity.json",
        "pareto.csv",
        "pareto.svg",
        "search.csv",
        "pairs.svg",
        "layers.csv",
        "layers.json",
        "report.html",
    ] {
        assert!(desk.path("q").join(file).exists(), "{file}");
    }
    // The folder computes what the search measured.
    let eval = desk.json("eval --model @q --data @data.csv");
    assert_eq!(eval["accuracy"], result["metric"]);
    assert!(desk.json("eval --model @m --data @data.csv")["accuracy"].as_f64().unwrap() > 0.8);
    // Predicting needs no labels, and gives the same as npz and as csv.
    desk.json("predict --model @q --input @data.csv --out @p.csv");
    desk.json("predict --model @q --input @data.csv --out @p.npz");
    let logits = &arrays::read(&desk.path("p.npz")).unwrap()["y"];
    let table = fs::read_to_string(desk.path("p.csv")).unwrap();
    assert!(logits.shape == [60, 2] && table.starts_with("row,pred,p_down,p_up\n"), "{table}");
    for (row, line) in logits.values.chunks(2).zip(table.lines().skip(1)) {
        assert_eq!(line.split(',').nth(1), Some(["down", "up"][usize::from(row[1] > row[0])]));
    }
    let compared = desk.json("compare @m/ @q/ --data @data.csv --count 8");
    assert!(compared["output_db"].as_f64().unwrap() > 3.0, "{compared}");
    // With labels it tells what each layer costs, and writes a report.
    let compared = desk.json("compare @m/ @q/ --data @data.csv --out @report");
    let layers = compared["layers"].as_array().unwrap();
    let quantised = |layer: &&serde_json::Value| layer["weight"] != 16;
    assert!(
        layers.iter().filter(quantised).all(|layer| layer["alone"].is_f64() && layer["restored"].is_f64())
    );
    assert!(
        layers.iter().filter(quantised).all(|layer| (0.0..0.5).contains(&layer["clipped"].as_f64().unwrap()))
    );
    let table = fs::read_to_string(desk.path("report/layers.csv")).unwrap();
    assert_eq!(table.lines().count(), layers.len() + 1, "{table}");
    assert!(fs::read_to_string(desk.path("report/report.html")).unwrap().contains("conv0"));
    let same = desk.json("compare @q/ @q/ --data @data.csv --count 2");
    assert_eq!(same["output_max"], 0.0);
    assert!(desk.json("bench --model @q --data @data.csv --runs 2 --batch 4")["bytes"].as_u64().unwrap() > 0);

    // As a file for other runtimes, and as a graph that takes several examples at once.
    desk.json("export --model @q --to @q.onnx");
    let graph = Graph::from_onnx(&desk.path("q.onnx"), &OnnxOptions::default()).unwrap();
    assert_eq!(graph.inputs[0].port.shape, [1, 1, 6, 6]);
    desk.json("export --model @q --to @four.onnx --opset 21");
    let four = Graph::from_onnx(&desk.path("four.onnx"), &OnnxOptions::default()).unwrap();
    assert_eq!(four.inputs[0].port.shape, [1, 1, 6, 6]);
    desk.assert_refused("export --model @q --to @graph4 --opset 21", "is for .onnx files");
    desk.json("export --model @q --to @graph --batch 4");
    assert_eq!(Graph::load(&desk.path("graph")).unwrap().inputs[0].port.shape, [4, 1, 6, 6]);
    desk.assert_refused("export --model @q --to @none.onnx --batch 0", "0 examples at once");
    desk.assert_refused("export --model @m --to @none.onnx", "is not quantised");
    assert!(!desk.path("none.onnx").exists());

    // The same command knows every configuration already; another is refused.
    let again = desk.json(&line);
    assert_eq!((&again["metric"], &again["evaluations"]), (&result["metric"], &result["evaluations"]));
    desk.assert_refused(&line.replace("0.95", "0.9"), "a search with other settings");
    desk.assert_refused(
        "quantize --model @q --calib @data.csv --valid @data.csv --out @x",
        "quantised already",
    );
}

#[test]
fn damaged_folders_are_refused_with_the_place() {
    let desk = trained();
    desk.json(&format!("quantize --model @m {SHORT} --no-pairs --valid @data.csv --target 0.9 --out @q"));
    let path = desk.path("q/units.json");
    let text = fs::read_to_string(&path).unwrap();
    for (from, to, words) in [
        ("\"groups\": 1,", "\"groups\": 0,", "of a kind that Kiln does not know"),
        ("\"tops\": []", "\"tops\": [1.0]", "of a kind that Kiln does not know"),
        ("\"work\": \"conv\"", "\"work\": \"fold\"", "of a kind that Kiln does not know"),
        ("\"steps\": [", "\"steps\": [ 99,", "do not fit"),
        ("\"units\"", "\"unit\"", "does not describe the units"),
    ] {
        fs::write(&path, text.replacen(from, to, 1)).unwrap();
        desk.assert_refused("eval --model @q --data @data.csv", words);
    }
    for (from, to, words) in [
        ("\"weight\": ", "\"weight\": 1", "must have 16, 8 or 4"),
        ("\"scales\": 1", "\"scales\": 7", "7 scales a row"),
    ] {
        fs::write(&path, text.replace(from, to)).unwrap();
        desk.assert_refused("eval --model @q --data @data.csv", words);
    }
    fs::write(&path, &text).unwrap();
    let weights = desk.path("q/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    desk.assert_refused("eval --model @q --data @data.csv", "model.safetensors");
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let desk = trained();
    let line = format!("quantize --model @m {SHORT} --valid @data.csv --out @q");
    desk.assert_refused(&format!("{line} --target 1.5"), "not above 0 and at most 1");
    desk.assert_refused(&format!("{line} --bits 16,5"), "not one of 16, 8 and 4");
    desk.assert_refused(&format!("{line} --pin conv99=8"), "there are: conv0");
    desk.assert_refused(&format!("{line} --max-drop 300%"), "must be a share");
    desk.assert_refused(&line.replace("@m ", "@none "), "none");
    let (names, row): (String, String) = ((0..9).map(|p| format!("p{p},")).collect(), "1,".repeat(9));
    desk.write("small.csv", format!("{names}label\n{row}up\n{row}down\n"));
    desk.assert_refused(
        &line.replace("--valid @data.csv", "--valid @small.csv"),
        "the model was made for [1, 6, 6]",
    );
    let text = fs::read_to_string(desk.path("data.csv")).unwrap();
    desk.write("other.csv", text.replace("down", "sideways"));
    desk.assert_refused(&line.replace("--valid @data.csv", "--valid @other.csv"), "the model knows down, up");
    assert!(!desk.path("q").exists());
    // Pinned units keep their bits, and a target that nothing reaches leaves the network as it is.
    let result = desk.json(&format!("{line} --no-pairs --target 0.9 --bits 16,8 --pin conv0=16"));
    assert_eq!(result["at_4_bits"], 0);
    let config = fs::read_to_string(desk.path("q/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(config["bits"][0], serde_json::json!(["conv0", 16]));
}

#[test]
fn bytes_gains_and_tensors_decide_where_they_are_asked_to() {
    let desk = trained();
    let line = format!("quantize --model @m {SHORT} --no-pairs --valid @data.csv --latency model");
    let all = desk.json(&format!("{line} --target 0.01 --bits 16,8 --out @all"));
    let [most, least] = [0, 1].map(|at| all["bytes"][at].as_u64().unwrap());
    assert!(all["measured_seconds"].is_null());
    let budget = (most + least) / 2;
    let result = desk.json(&format!("{line} --max-bytes {budget} --out @b"));
    let found = result["bytes"][1].as_u64().unwrap();
    assert!(found <= budget && found > least && result["at_4_bits"] == 0, "{result}");
    assert_eq!(
        (&result["evaluations"], &result["target"]),
        (&serde_json::json!(1), &serde_json::Value::Null)
    );
    desk.assert_refused(&format!("{line} --max-bytes 10 --out @x"), "at the least");
    assert!(!desk.path("x").exists());
    desk.assert_refused(&format!("{line} --max-bytes 1k --target 0.9 --out @x"), "cannot be used with");
    desk.assert_refused(&format!("{line} --max-bytes many --out @x"), "such as 500000, 500k or 1.5M");

    let result = desk.json(&format!(
        "{line} --granularity tensor --per-gain --target 0.9 --pin conv0.weight=16 --pin conv1=8 --out @t"
    ));
    assert!(
        result["by_tensor"] == true && result["units"].as_u64().unwrap() > all["units"].as_u64().unwrap()
    );
    let config: serde_json::Value =
        serde_json::from_str(&fs::read_to_string(desk.path("t/config.json")).unwrap()).unwrap();
    assert_eq!(config["bits"][0], serde_json::json!(["conv0.weight", 16]));
    assert_eq!(config["bits"][2], serde_json::json!(["conv1.weight", 8]));
    assert_eq!(config["bits"][3], serde_json::json!(["conv1.input", 8]));
    assert_eq!(desk.json("eval --model @t --data @data.csv")["accuracy"], result["metric"]);
    desk.assert_refused(&format!("{line} --pin conv0.weight=8 --out @x"), "there are: conv0");
}

#[test]
fn equalised_corrected_and_learnt_networks_are_kept() {
    let desk = trained();
    let line =
        format!("quantize --model @m {SHORT} --no-pairs --valid @data.csv --latency model --target 0.8");
    let result = desk.json(&format!(
        "{line} --equalize --bias-correct --adaround 20 --scales tensor --calibrator percentile --out @q"
    ));
    assert!(result["at_8_bits"].as_u64().unwrap() + result["at_4_bits"].as_u64().unwrap() > 0, "{result}");
    assert_eq!(desk.json("eval --model @q --data @data.csv")["accuracy"], result["metric"]);
    // The network as it was is equalised too, before both are compared.
    let compared = desk.json("compare @m/ @q/ --data @data.csv --count 8");
    assert!(compared["output_db"].as_f64().unwrap() > 3.0, "{compared}");
    desk.json("export --model @q --to @q.onnx");
    let result = desk.json(&format!("{line} --group 32 --out @g"));
    assert_eq!(desk.json("eval --model @g --data @data.csv")["accuracy"], result["metric"]);
    desk.assert_refused(&format!("{line} --group 48 --out @x"), "must be 32 or 64");
    desk.assert_refused(&format!("{line} --adaround 0 --out @x"), "learns nothing");
}

#[test]
fn texts_are_learnt_and_quantised() {
    let desk = Desk::new(&Ptq);
    let row = |i: usize| {
        let word = ["splendid", "dreadful"][i % 2];
        format!("{},\"a {word} film , number {i} of its kind\"\n", ["good", "bad"][i % 2])
    };
    desk.write("texts.csv", format!("label,text\n{}", (0..40).map(row).collect::<String>()));
    desk.json(
        "train --arch bert-s --width 0.125 --length 10 --batch 8 --lr 0.005 --data @texts.csv --steps 60 --out @m",
    );
    desk.json(
        "quantize --model @m --calib @texts.csv --valid @texts.csv --calib-count 8 --examples 8 --probes 1 --no-pairs \
         --target 0.9 --out @q",
    );
    let eval = desk.json("eval --model @q --data @texts.csv");
    assert!(eval["accuracy"].as_f64().unwrap() > 0.6, "{eval}");
    desk.json("predict --model @q --input @texts.csv --out @p.csv");
    desk.assert_refused("train --arch resnet-s --data @texts.csv --out @x", "holds words");
    desk.write("empty.csv", "label,text\ngood,\n");
    desk.assert_refused("predict --model @q --input @empty.csv --out @e.csv", "row 1 has no text");
    assert!(!desk.path("e.csv").exists());
}

#[test]
fn arrays_and_perceptrons_give_the_reference_values() {
    let desk = Desk::new(&Ptq);
    let reference = arrays::read("tests/data/quantizers.npz".as_ref()).unwrap();
    let write = |file: &str, shape: &[usize], values: &[f64]| {
        let buffer = Buffer { shape: shape.to_vec(), elements: Elements::F64(values.to_vec()) };
        write_buffers(&desk.path(file), &[("w".to_string(), buffer)].into()).unwrap();
    };
    write("w.npz", &reference["w/x"].shape, &reference["w/x"].values);
    desk.json("quant-array --input @w.npz --bits 4 --axis 0 --out @q.npz");
    let found = arrays::read(&desk.path("q.npz")).unwrap();
    assert_eq!(found["q"].values, reference["w/perch4_q"].values);
    desk.json("quant-array --input @w.npz --bits 8 --scheme asym --out @q.npz");
    let found = arrays::read(&desk.path("q.npz")).unwrap();
    assert_eq!(found["q"].values, reference["w/asym8_q"].values);
    write("bad.npz", &[2], &[1.0, f64::NAN]);
    desk.assert_refused("quant-array --input @bad.npz --out @x.npz", "element 1 is NaN");
    let result = desk.json("sensitivity-mlp --input %sensitivity_mlp.json --bits 8 --exact-trace");
    let text = fs::read_to_string("tests/data/sensitivity_mlp.json").unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let near = |a: &serde_json::Value, b: &serde_json::Value| {
        (a.as_f64().unwrap() - b.as_f64().unwrap()).abs() < 1e-6
    };
    assert!((0..4).all(|l| near(&result["trace"][l], &expected["trace"][l])), "{result}");
    desk.write("bad.json", text.replacen("\"Y\": [", "\"Y\": [7, ", 1));
    desk.assert_refused("sensitivity-mlp --input @bad.json", "inputs X and");
}

#[test]
fn an_onnx_model_is_quantised_and_keeps_its_answers() {
    let desk = Desk::new(&Ptq);
    let onnx = Path::new("../../../crates/compiler/tests/data/tiny.onnx").canonicalize().unwrap();
    // Striped images, labelled with the answers of the model itself.
    let count = 24;
    let pixel = |i: usize| ((i / 784 * 31 + i % 784 * (1 + i / 784 % 5)) % 97) as f32 / 48.0 - 1.0;
    let x: Vec<f32> = (0..count * 784).map(pixel).collect();
    let answer = |x: &[f32]| {
        let data = TensorData::new(x.to_vec(), [1, 1, 28, 28]);
        let graph = Graph::from_onnx(&onnx, &OnnxOptions::default()).unwrap();
        let y: Vec<f32> = graph.run(&[data]).unwrap()[0].iter::<f32>().collect();
        (0..y.len()).max_by(|a, b| y[*a].total_cmp(&y[*b])).unwrap() as i64
    };
    let y: Vec<i64> = x.chunks(784).map(answer).collect();
    let arrays = [
        ("x".to_string(), Buffer { shape: vec![count, 1, 28, 28], elements: Elements::F32(x) }),
        ("y".to_string(), Buffer { shape: vec![count], elements: Elements::I64(y) }),
    ];
    write_buffers(&desk.path("data.npz"), &arrays.into()).unwrap();
    let line = format!(
        "quantize --model {} --calib @data.npz --valid @data.npz --examples 8 --probes 1 --no-pairs --target 0.9 --out @q",
        onnx.display()
    );
    let result = desk.json(&line);
    assert!(result["metric"].as_f64().unwrap() >= 0.9, "{result}");
    assert!(result["at_8_bits"].as_u64().unwrap() + result["at_4_bits"].as_u64().unwrap() > 0, "{result}");
    assert_eq!(desk.json("eval --model @q --data @data.npz")["accuracy"], result["metric"]);
}

#[test]
fn weights_of_other_libraries_are_quantised_and_misfits_are_named() {
    let desk = Desk::new(&Ptq);
    let line = "quantize --model %mobilenet_v2.safetensors --arch mobilenet_v2 --image 32 --calib @x.npz --valid @x.npz \
                --examples 2 --probes 1 --no-pairs --latency model --metric loss --target 0.5 --out @q";
    let io = read_buffers("tests/data/mobilenet_v2_io.npz".as_ref()).unwrap();
    let labels = Buffer { shape: vec![2], elements: Elements::I64(vec![0, 1]) };
    write_buffers(&desk.path("x.npz"), &[("x".into(), io["x"].clone()), ("y".into(), labels)].into())
        .unwrap();
    let result = desk.json(line);
    assert!(result["at_8_bits"].as_u64().unwrap() + result["at_4_bits"].as_u64().unwrap() > 0, "{result}");
    desk.json("eval --model %mobilenet_v2.safetensors --arch mobilenet_v2 --image 32 --data @x.npz");
    let compare = "compare %mobilenet_v2.safetensors @q/ --arch mobilenet_v2 --image 32 --data @x.npz";
    assert!(desk.json(compare)["output_db"].as_f64().unwrap() > 0.0);
    let refused = |line: &str, words: &str| desk.assert_refused(&line.replace("@q", "@x"), words);
    refused(&line.replace(" --arch mobilenet_v2", " --arch resnet18"), "\"conv1.weight\"");
    refused(&line.replace(" --arch mobilenet_v2 --image 32", ""), "--arch belongs to weights");
    refused(&line.replace("--image 32", "--image 33"), "reads [3, 33, 33]");
    assert!(!desk.path("x").exists());
}
