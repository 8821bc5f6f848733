//! The verbs of `kiln btsbot`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use kiln_btsbot::names::to_public;
use kiln_btsbot::{Btsbot, Mode};
use kiln_core::testing::Desk;
use kiln_core::{HostTensor, TensorFile};
use kiln_data::{read_npy, write_npz};

const TINY: &str = "--config @c.json --crop 15 --epochs 2 --batch 16 --lr 1e-3 --n-max 3";

/// A desk with a simulated survey, its arrays, and settings of a tiny network.
fn desk() -> Desk {
    let desk = Desk::new(&Btsbot);
    desk.write("c.json", r#"{"channels": [2, 3], "kernel": 3, "meta_hidden": [8, 8]}"#);
    desk.json("simulate --sources 24 --out @survey");
    desk.json("extract --packets @survey/packets --labels @survey/sources.csv --out @arrays");
    desk
}

const ARRAYS: &str = "--triplets @arrays/triplets.npy --candidates @arrays/candidates.csv";

#[test]
fn a_survey_is_simulated_learned_scored_and_judged() {
    let desk = desk();
    let alerts = read_npy(&desk.path("arrays/triplets.npy")).unwrap();
    let rows = fs::read_to_string(desk.path("arrays/candidates.csv")).unwrap().lines().count() - 1;
    assert_eq!(alerts.shape, [rows, 63, 63, 3]);
    let packets = fs::read_dir(desk.path("survey/packets")).unwrap().count();
    let lost =
        fs::read_to_string(desk.path("arrays/rejected.csv")).unwrap().lines().count().saturating_sub(1);
    assert_eq!(rows + lost, packets);

    for model in ["mm_cnn", "um_cnn", "um_nn"] {
        let trained = desk.json(&format!("train {ARRAYS} {TINY} --model {model} --out @{model}"));
        assert!(trained["summary"]["best_val_loss"].as_f64().unwrap() > 0.0);
        desk.json(&format!("predict --model @{model} {ARRAYS} --out @{model}.csv"));
    }
    assert!(desk.path("mm_cnn/loss.svg").exists());
    let curve = fs::read_to_string(desk.path("mm_cnn/accuracy.csv")).unwrap();
    assert!(curve.starts_with("step,accuracy,val_accuracy\n") && curve.lines().count() > 1, "{curve}");
    // Under the names of the public package, and back.
    let mut weights = TensorFile::read(&desk.path("mm_cnn/model.safetensors")).unwrap();
    to_public(&mut weights, Mode::MmCnn);
    assert!(weights.get("conv_layers.0.weight").is_some());
    weights.write(&desk.path("public.safetensors")).unwrap();
    desk.json("import --weights @public.safetensors --crop 15 --out @imported");
    desk.json(&format!("predict --model @imported {ARRAYS} --out @imported.csv"));
    let text = |name: &str| fs::read_to_string(desk.path(name)).unwrap();
    assert_eq!(text("imported.csv"), text("mm_cnn.csv"));
    desk.assert_refused(
        "import --weights @public.safetensors --crop 15 --out @imported",
        "already holds a model",
    );
    desk.assert_refused("import --weights @public.safetensors --crop 63 --out @x", "comb_fc.0.weight");
    // The same alerts from packets: the same scores, in the order of the files.
    let found = desk.json("predict --model @mm_cnn --packets @survey/packets --negative --out @p.csv");
    assert_eq!(found["scored"], rows);
    let by_candid = |name: &str| {
        let text = fs::read_to_string(desk.path(name)).unwrap();
        let mut rows: Vec<(String, f64)> = text
            .lines()
            .skip(1)
            .map(|line| {
                let cells: Vec<&str> = line.split(',').collect();
                (cells[1].to_string(), cells[5].parse().unwrap())
            })
            .collect();
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        rows
    };
    for ((a, x), (b, y)) in by_candid("mm_cnn.csv").iter().zip(by_candid("p.csv")) {
        assert!(*a == b && (x - y).abs() < 1e-4, "{a} {x}, {b} {y}");
    }
    // And from an archive.
    let file = fs::File::create(desk.path("night.tar.gz")).unwrap();
    let mut archive = tar::Builder::new(flate2::write::GzEncoder::new(file, flate2::Compression::fast()));
    archive.append_dir_all("night", desk.path("survey/packets")).unwrap();
    archive.into_inner().unwrap().finish().unwrap();
    let packed = desk
        .json("predict --model @mm_cnn --packets @night.tar.gz --negative --out @q.csv --embeddings @e.npz");
    assert_eq!(packed["scored"], rows);
    for ((a, x), (b, y)) in by_candid("q.csv").iter().zip(by_candid("p.csv")) {
        assert!(*a == b && (x - y).abs() < 1e-4, "{a} {x}, {b} {y}");
    }
    let embeddings = kiln_data::read_npz(&desk.path("e.npz")).unwrap();
    assert_eq!(embeddings.get("embeddings").unwrap().shape, [rows, 8]);
    let calibrated = desk.json(&format!("calibrate --model @mm_cnn {ARRAYS} --out @calibrated"));
    assert!(calibrated["after"]["nll"].as_f64() <= calibrated["before"]["nll"].as_f64());
    desk.json(&format!("predict --model @calibrated {ARRAYS} --out @r.csv"));
    let judged = desk.json(&format!("eval --model @mm_cnn {ARRAYS} --out @e"));
    assert_eq!(judged["metrics"]["alerts"]["alerts"], rows);
    let page = fs::read_to_string(desk.path("e/report.html")).unwrap();
    assert!(
        page.contains("bts_p1")
            && desk.path("e/metrics.json").exists()
            && desk.path("e/policies.json").exists()
    );
    desk.write("times.csv", "objectId,save_jd,trigger_jd\nZTF26aaaaaaa,2461050.5,\n");
    desk.json("eval --scores @mm_cnn.csv --scanner-times @times.csv --out @e2");
    let again = desk.json("policy --scores @mm_cnn.csv --policy n=1,score=0,mag=25 --out @policies.json");
    assert_eq!(again["n=1,score=0,mag=25"]["completeness"], 1.0);
    let shift = desk.json("shift --a @mm_cnn.csv --b @mm_cnn.csv --out @shift");
    assert_eq!(shift["auc"]["difference"], 0.0);
    // Watched, but for nobody.
    let watched =
        desk.json("watch --model @mm_cnn --packets @survey/packets --store @w.redb --once --out @w");
    assert_eq!(watched["round"]["packets"], packets);
    let again = desk.json("watch --model @mm_cnn --packets @survey/packets --store @w.redb --once --out @w");
    assert_eq!((&again["round"]["packets"], &again["round"]["triggered"]), (&0.into(), &0.into()));
    let scores = fs::read_to_string(desk.path("w/scores.csv")).unwrap().lines().count() - 1;
    assert_eq!(watched["round"]["scored"], scores);
    assert_eq!(
        watched["round"]["scored"].as_u64().unwrap() + watched["round"]["rejected"].as_u64().unwrap(),
        packets as u64
    );
}

#[test]
fn packets_are_shown_also_those_that_no_network_would_see() {
    let desk = Desk::new(&Btsbot);
    let shown = desk.json("show --packet %packets_edge/short_63x50.avro --out @a.png");
    assert_eq!(
        (&shown["objectId"], shown["features"].as_object().unwrap().len()),
        (&"ZTF20aaelulu".into(), 25)
    );
    assert!(fs::read(desk.path("a.png")).unwrap().starts_with(b"\x89PNG"));
    let shown = desk.json("show --packet %packets_edge/all_nan_template.avro --out @b.png");
    assert!(shown["problems"][0].as_str().unwrap().contains("template stamp has no pixel"));
    let extracted = desk.json("extract --packets %packets_edge --out @x");
    assert_eq!((&extracted["alerts"], extracted["rejected"].as_array().unwrap().len()), (&2.into(), 2));
}

#[test]
fn forward_refuses_other_shapes() {
    let desk = Desk::new(&Btsbot);
    let mut io = TensorFile::new();
    io.insert("input_triplet", HostTensor::float([1, 4, 9, 9], vec![0.0; 324]));
    io.insert("input_meta", HostTensor::float([1, 25], vec![0.0; 25]));
    write_npz(&desk.path("io.npz"), &io).unwrap();
    write_npz(&desk.path("w.npz"), &io).unwrap();
    desk.assert_refused("forward --weights @w.npz --input @io.npz --out @o.npz", "[1, 4, 9, 9]");
    assert!(!desk.path("o.npz").exists());
}

#[test]
fn bad_input_is_named_and_the_rest_goes_on() {
    let desk = desk();
    desk.json(&format!("train {ARRAYS} {TINY} --epochs 1 --out @m").replace("--epochs 2 ", ""));
    // A folder with a whole packet, a copy of it, half of one, another survey's, and none at all.
    let packets = desk.path("mixed");
    fs::create_dir(&packets).unwrap();
    let first = fs::read_dir(desk.path("survey/packets")).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(first).unwrap();
    fs::write(packets.join("a.avro"), &whole).unwrap();
    fs::write(packets.join("b.avro"), &whole).unwrap();
    fs::write(packets.join("c.avro"), &whole[..whole.len() / 2]).unwrap();
    fs::write(packets.join("d.avro"), b"SIMPLE").unwrap();
    let renamed: Vec<u8> = String::from_utf8_lossy(&whole).contains("magpsf").then(|| whole.clone()).unwrap();
    let renamed = replace(&renamed, b"\"magpsf\"", b"\"magXXX\"");
    fs::write(packets.join("e.avro"), renamed).unwrap();
    let found = desk.json("predict --model @m --packets @mixed --negative --out @s.csv");
    assert_eq!((&found["scored"], found["rejected"].as_array().unwrap().len()), (&1.into(), 4));
    let text = found["rejected"].to_string();
    for words in ["candid of an alert in", "ends too early", "no Avro file", "no candidate.magpsf"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    fs::create_dir(desk.path("empty")).unwrap();
    desk.assert_refused("predict --model @m --packets @empty --out @x.csv", "holds no packets");
    desk.assert_refused("watch --model @m --packets @none --store @x.redb --once", "is no folder");

    let candidates = fs::read_to_string(desk.path("arrays/candidates.csv")).unwrap();
    let lines: Vec<&str> = candidates.lines().collect();
    desk.write("short.csv", lines[..lines.len() - 1].join("\n"));
    desk.assert_refused(
        "predict --model @m --triplets @arrays/triplets.npy --candidates @short.csv --out @x.csv",
        "rows, but",
    );
    desk.write("lacking.csv", candidates.replacen("sgscore2", "sgscoreX", 1));
    desk.assert_refused(
        "predict --model @m --triplets @arrays/triplets.npy --candidates @lacking.csv --out @x.csv",
        "no column sgscore2",
    );
    desk.write("labels.csv", "objectId,jd,label,magpsf,score\na,1,2,18,0.5\n");
    desk.assert_refused("policy --scores @labels.csv --out @x.json", "labels are 0 or 1");
    desk.write("one.csv", "objectId,jd,label,magpsf,score\na,1,1,18,0.5\na,2,1,18,0.7\n");
    let one = desk.json("eval --scores @one.csv --out @one");
    assert!(one["metrics"]["alerts"]["auc"].is_null());
    assert!(one["metrics"]["alerts"]["auc_reason"].as_str().unwrap().contains("one class"));
    let mut wrong = TensorFile::new();
    wrong.insert("triplets", HostTensor::float([1, 61, 61, 4], vec![0.0; 61 * 61 * 4]));
    write_npz(&desk.path("wrong.npz"), &wrong).unwrap();
    desk.assert_refused(
        "predict --model @m --triplets @wrong.npz --candidates @one.csv --out @x.csv",
        "[1, 61, 61, 4]",
    );
    assert!(!desk.path("x.csv").exists() && !desk.path("x.json").exists());
    // A row without a feature is lost alone.
    let column = lines[0].split(',').position(|name| name == "scorr").unwrap();
    let mut cells: Vec<&str> = lines[1].split(',').collect();
    cells[column] = "nan";
    let damaged =
        [lines[0].to_string(), cells.join(",")].into_iter().chain(lines[2..].iter().map(ToString::to_string));
    desk.write("nan.csv", damaged.collect::<Vec<_>>().join("\n"));
    let found =
        desk.json("predict --model @m --triplets @arrays/triplets.npy --candidates @nan.csv --out @s.csv");
    assert!(found["rejected"][0]["reason"].as_str().unwrap().contains("no scorr"));
    assert_eq!(found["scored"].as_u64().unwrap() as usize, lines.len() - 2);
}

fn replace(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|window| window == from).unwrap();
    [&bytes[..at], to, &bytes[at + from.len()..]].concat()
}
