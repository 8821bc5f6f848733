//! The verbs of `kiln kronecker-attention`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::PathBuf;

use kiln_core::testing::Desk;
use kiln_core::{HostTensor, TensorFile};
use kiln_data::{read_npz, write_npz};
use kiln_kronecker_attention::Kronecker;
use serde_json::Value;

/// Options of a model that trains in milliseconds.
const TINY: &str = "--dim 16 --heads 2 --steps 4 --batch 4 --warmup 1 --eval-every 2";

#[test]
fn run_op_gives_the_golden_output_and_an_error_within_its_certificate() {
    let desk = Desk::new(&Kronecker);
    let exact = desk.json("run-op --in %order2_n9_d4.npz --impl exact --out @o.npz");
    assert_eq!((exact["impl"].as_str(), exact["order"].as_u64()), (Some("exact"), Some(2)));
    let golden =
        read_npz(&PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/order2_n9_d4.npz")))
            .unwrap();
    let (found, expected) = (read_npz(&desk.path("o.npz")).unwrap(), golden.get("O").unwrap().clone());
    let found = found.get("O").unwrap();
    assert_eq!(found.shape, expected.shape);
    let pairs = found.as_floats().unwrap().iter().zip(expected.as_floats().unwrap());
    assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-5), "{pairs:?}");

    let poly = desk.json("run-op --in %order2_n9_d4.npz --impl poly --compare --out @p.safetensors");
    assert_eq!(poly["impl"], "poly");
    assert!(poly["error"].as_f64().unwrap() <= poly["certificate"].as_f64().unwrap() + 1e-6, "{poly}");
    assert!(TensorFile::read(&desk.path("p.safetensors")).unwrap().get("O").is_some());
    let one = desk.json("run-op --in %order2_n9_d4.npz --order 1 --causal --scale 1/sqrt(d) --out @q.npz");
    assert_eq!((one["order"].as_u64(), one["impl"].as_str()), (Some(1), Some("exact")));
}

#[test]
fn a_plan_tells_both_costs_and_draws_the_trade_off() {
    let desk = Desk::new(&Kronecker);
    let plan = desk.json("plan --in %order2_n9_d4.npz --trade-off @entries.svg");
    assert_eq!(plan["order"], 2);
    assert!(plan["rank"].as_u64() < plan["taylor_rank"].as_u64(), "{plan}");
    assert!(plan["balanced_entry"].as_f64() <= plan["largest_entry"].as_f64());
    assert_eq!(plan["trade_off"].as_array().unwrap().len(), 4);
    assert!(fs::read_to_string(desk.path("entries.svg")).unwrap().starts_with("<svg"));
}

#[test]
fn match3_instances_are_made_and_solved() {
    let desk = Desk::new(&Kronecker);
    let made = desk.json("match3 --n 6 --modulus 11 --count 20 --convention any --out @m.jsonl");
    assert_eq!(made["instances"], 20);
    let lines = fs::read_to_string(desk.path("m.jsonl")).unwrap();
    let as_instances = lines.replace("\"tokens\"", "\"x\"").replace("\"labels\"", "\"truth\"");
    desk.write("x.jsonl", &as_instances);
    let solved = desk.json("match3 --solve @x.jsonl --convention any");
    for object in solved.as_array().unwrap() {
        assert_eq!(object["labels"], object["truth"], "{object}");
    }
    desk.run("match3 --solve %match3_cases.json --out @solved.jsonl").unwrap();
    let solved = fs::read_to_string(desk.path("solved.jsonl")).unwrap();
    for line in solved.lines() {
        let object: Value = serde_json::from_str(line).unwrap();
        assert_eq!(object["labels"], object["match_distinct"]);
    }
}

#[test]
fn every_format_is_trained_on_evaluated_predicted_and_explained() {
    let desk = Desk::new(&Kronecker);
    desk.run("match3 --n 5 --modulus 7 --count 24 --out @ids.jsonl").unwrap();
    desk.write("words.csv", "t0,t1,t2,label\na,b,c,yes\nb,b,,no\nc,a,a,yes\na,,,no\nb,c,a,yes\nc,c,c,no\n");
    let mut arrays = TensorFile::new();
    arrays.insert("x", HostTensor::float([6, 4, 2], (0..48).map(|i| (i as f32).sin()).collect()));
    arrays.insert("y", HostTensor::int([6], vec![0, 1, 2, 0, 1, 2]));
    arrays.insert("mask", HostTensor::int([6, 4], (0..24).map(|i| i64::from(i % 4 < 2 + i % 3)).collect()));
    write_npz(&desk.path("vectors.npz"), &arrays).unwrap();
    for (data, options, rows) in [
        ("ids.jsonl", "--task token --input fourier:7", 24 * 5),
        ("ids.jsonl", "--task token --attention pair --layers 2", 24 * 5),
        ("words.csv", "--task sequence --positions --val-fraction 0.3", 6),
        ("vectors.npz", "--task sequence --input numeric --order 3 --val-fraction 0.3", 6),
        ("vectors.npz", "--task sequence --input numeric --impl auto --val-fraction 0.3", 6),
    ] {
        let _ = fs::remove_dir_all(desk.path("m"));
        // The words and classes of six rows must all be in the part that is learned from, too.
        let trained = desk.json(&format!("train --data @{data} {options} {TINY} --out @m"));
        assert_eq!(trained["steps"], 4);
        for name in ["config.json", "model.safetensors", "train_log.csv", "loss.svg"] {
            assert!(desk.path("m").join(name).exists(), "{name} after {options}");
        }
        let scores = desk.json(&format!("eval --model @m --data @{data}"));
        assert!((0.0..=1.0).contains(&scores["accuracy"].as_f64().unwrap()));
        desk.json(&format!("predict --model @m --data @{data} --explain 2 --out @labels.csv"));
        let csv = fs::read_to_string(desk.path("labels.csv")).unwrap();
        assert!(csv.starts_with("row,position,label,probability,tuples\n"), "{csv}");
        assert_eq!(csv.lines().count(), 1 + rows);
    }
}

#[test]
fn pairs_are_drawn() {
    let desk = Desk::new(&Kronecker);
    desk.run("match3 --n 5 --modulus 7 --count 24 --out @ids.jsonl").unwrap();
    desk.run(&format!("train --data @ids.jsonl --input fourier:7 {TINY} --out @m")).unwrap();
    let drawn = desk.json("plot --model @m --data @ids.jsonl --row 2 --token 4 --out @pairs.png");
    assert_eq!(drawn["strongest"].as_array().unwrap().len(), 5);
    assert!(desk.path("pairs.png").exists());
    desk.assert_refused("plot --model @m --data @ids.jsonl --row 25 --out @x.svg", "--row 25 is not 1 to 24");
    desk.assert_refused(
        "plot --model @m --data @ids.jsonl --token 5 --out @x.svg",
        "--token 5 is not below 5",
    );
}

#[test]
fn a_resumed_run_ends_as_one_that_was_never_interrupted() {
    let desk = Desk::new(&Kronecker);
    desk.run("match3 --n 5 --modulus 7 --count 24 --out @ids.jsonl").unwrap();
    let train = |rest: &str| desk.run(&format!("train --data @ids.jsonl {rest}")).unwrap();
    let options =
        "--input fourier:7 --dim 16 --heads 2 --batch 4 --warmup 1 --eval-every 3 --checkpoint-every 1";
    train(&format!("{options} --steps 6 --out @whole"));
    // Ctrl-C before the first step: the schedule is that of the whole run.
    desk.cx.interrupted.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(desk.run(&format!("train --data @ids.jsonl {options} --steps 6 --out @parts")).is_err());
    desk.cx.interrupted.store(false, std::sync::atomic::Ordering::Relaxed);
    train("--resume @parts");
    let weights = |folder: &str| fs::read(desk.path(folder).join("model.safetensors")).unwrap();
    assert!(weights("whole") == weights("parts"));
}

#[test]
fn matrices_that_do_not_fit_are_named() {
    let desk = Desk::new(&Kronecker);
    let save = |name: &str, matrices: &[(&str, [usize; 2])], spoilt: Option<f32>| {
        let mut file = TensorFile::new();
        for (matrix, shape) in matrices {
            let mut values = vec![0.5; shape[0] * shape[1]];
            if let (Some(value), "K1") = (spoilt, *matrix) {
                values[3] = value;
            }
            file.insert(*matrix, HostTensor::float(*shape, values));
        }
        write_npz(&desk.path(name), &file).unwrap();
    };
    let good = [("Q", [4, 3]), ("K1", [4, 3]), ("K2", [5, 3]), ("V1", [4, 2]), ("V2", [5, 2])];
    save("good.npz", &good, None);
    save("lacking.npz", &good[..4], None);
    save("width.npz", &[("Q", [4, 3]), ("K1", [4, 2]), ("V1", [4, 2])], None);
    save("rows.npz", &[("Q", [4, 3]), ("K1", [4, 3]), ("V1", [6, 2])], None);
    save("nan.npz", &good, Some(f32::NAN));
    desk.write("garbage.npz", "PK and nothing else");
    for (file, words) in [
        ("lacking.npz", "holds 2 key matrices (K1, K2, ..) and 1 value matrices"),
        ("width.npz", "\"Q\" 1x4x3 and \"K1\" 1x4x2 must have the same batch and width"),
        ("rows.npz", "\"K1\" 1x4x3 and \"V1\" 1x6x2 must have the same batch and number of rows"),
        ("nan.npz", "\"K1\" is NaN at row 1, column 0"),
        ("garbage.npz", "is no zip archive"),
        ("none.npz", "cannot read"),
        ("good.txt", "ends neither in .npz nor in .safetensors"),
    ] {
        desk.assert_refused(&format!("run-op --in @{file} --out @o.npz"), words);
        assert!(!desk.path("o.npz").exists());
    }
    let op = |options: &str| format!("run-op --in @good.npz --out @o.npz {options}");
    desk.assert_refused(&op("--scale x"), "--scale x is neither 1/d");
    desk.assert_refused(&op("--order 3"), "order 3 needs Q, K1 to K3");
    desk.assert_refused(&op("--impl exact --max-ops 10"), "are more than --max-ops");
    desk.assert_refused(&op("--impl poly --causal"), "cannot be causal");
    desk.assert_refused(&op("--impl poly --scale 50"), "are too large");
    desk.assert_refused(&op("--impl poly --degree 1 --scale 5"), "degree 1 certifies nothing");
    desk.assert_refused(&op("--impl poly --degree 4 --max-rank 20"), "needs 35 monomials");
    desk.assert_refused(&op("--impl poly --degree 13"), "degree 13 is above 12");
}

#[test]
fn tuples_of_more_than_four_tokens_must_be_forced_unless_they_are_cheap() {
    let desk = Desk::new(&Kronecker);
    let mut file = TensorFile::new();
    for name in ["Q", "K1", "K2", "K3", "K4", "K5", "V1", "V2", "V3", "V4", "V5"] {
        file.insert(name, HostTensor::float([3, 2], vec![0.5, -0.5, 0.25, 1.0, -1.0, 0.0]));
    }
    write_npz(&desk.path("five.npz"), &file).unwrap();
    let op = |options: &str| format!("run-op --in @five.npz --out @o.npz {options}");
    desk.assert_refused(&op("--impl exact"), "order 5 costs n^6 times the width: 2.9e3 multiplications");
    desk.assert_refused(&op("--impl poly --compare"), "order 5 costs");
    desk.run(&op("--impl exact --force")).unwrap();
    desk.run(&op("--impl poly")).unwrap();
}

#[test]
fn data_that_cannot_be_used_are_named_with_their_row() {
    let desk = Desk::new(&Kronecker);
    desk.write("empty.jsonl", "\n");
    desk.write("broken.jsonl", "{\"tokens\": [1, 2], \"labels\": [0, 1]}\n{\"tokens\": [1,");
    desk.write(
        "short.jsonl",
        "{\"tokens\": [1, 2], \"labels\": [0, 1]}\n{\"tokens\": [1, 2], \"labels\": [0]}",
    );
    desk.write("one-class.jsonl", "{\"tokens\": [1], \"labels\": [0]}\n{\"tokens\": [2], \"labels\": [0]}");
    desk.write("large.jsonl", "{\"tokens\": [1], \"labels\": [0]}\n{\"tokens\": [9], \"labels\": [1]}");
    desk.write(
        "mixed.jsonl",
        "{\"tokens\": [[1.0, 2.0]], \"labels\": [0]}\n{\"tokens\": [[3.0]], \"labels\": [1]}",
    );
    desk.write("columns.csv", "a,b\n1,2\n");
    desk.write("gap.csv", "t0,t1,label\n1,2,0\n,2,1\n");
    for (data, options, words) in [
        ("empty.jsonl", "", "holds no sequences"),
        ("broken.jsonl", "", "line 2: is not valid JSON"),
        ("short.jsonl", "", "sequence 2: has 1 labels, must have 2"),
        ("one-class.jsonl", "", "at least two classes"),
        (
            "large.jsonl",
            "--input fourier:7",
            "sequence 2: token 0 is Symbol(\"9\"), must be a whole number below the modulus 7",
        ),
        ("mixed.jsonl", "--input numeric", "sequence 2: token 0 has 1 numbers, must have 2"),
        ("mixed.jsonl", "", "is a vector, but symbols are embedded"),
        ("columns.csv", "", "has no column t0; its columns are a, b"),
        ("gap.csv", "--task sequence", "row 2: has a gap or no tokens"),
        ("none.jsonl", "", "cannot read"),
        ("short.jsonl", "--input other", "--input other is neither"),
        ("large.jsonl", "--heads 3", "3 heads do not divide"),
        (
            "large.jsonl",
            "--order 5",
            "order 5 costs n^6 times the width: 3.2e1 tuples a token of the longest",
        ),
        ("large.jsonl", "--order 9 --force", "order 9 is above 8"),
        ("large.jsonl", "--order 0", "order 0 is not 1 to 8"),
        ("large.jsonl", "--dropout 1", "the dropout 1 is not in [0, 1)"),
        ("large.jsonl", "--batch 0", "--batch must be at least 1"),
    ] {
        desk.assert_refused(&format!("train --data @{data} {options} --steps 2 --out @m"), words);
        assert!(!desk.path("m").exists(), "{data} left a model behind");
    }
    desk.assert_refused("match3 --n 4 --modulus 1 --out @x.jsonl", "--modulus at least 2");
    desk.write("bad.json", "[{\"M\": 5, \"x\": [1, 7]}]");
    desk.assert_refused("match3 --solve @bad.json", "token 1 is 7, must be below the modulus 5");

    desk.run("match3 --n 5 --modulus 7 --count 24 --out @ids.jsonl").unwrap();
    desk.run(&format!("train --data @ids.jsonl {TINY} --out @m")).unwrap();
    desk.assert_refused(&format!("train --data @ids.jsonl {TINY} --out @m"), "already holds a training run");
    desk.write("new.jsonl", "{\"tokens\": [1, 77]}");
    desk.assert_refused(
        "predict --model @m --data @new.jsonl --out @p.csv",
        "token 1 is \"77\", which is not in the vocabulary",
    );
    desk.write("label.jsonl", "{\"tokens\": [1, 2], \"labels\": [0, \"maybe\"]}");
    desk.assert_refused(
        "eval --model @m --data @label.jsonl",
        "has the label \"maybe\", which the model does not know",
    );
    let config = fs::read_to_string(desk.path("m").join("config.json")).unwrap();
    let spoilt = config.replacen("\"classes\": 2", "\"classes\": 3", 1);
    assert_ne!(config, spoilt);
    fs::write(desk.path("m").join("config.json"), spoilt).unwrap();
    desk.assert_refused("eval --model @m --data @ids.jsonl", "\"network\" and \"coding\" differ");
    fs::write(desk.path("m").join("config.json"), config).unwrap();
    desk.write("unlabelled.jsonl", "{\"tokens\": [1, 2]}");
    desk.assert_refused("eval --model @m --data @unlabelled.jsonl", "has 0 labels, must have 2");
}
