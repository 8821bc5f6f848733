//! The verbs of `kiln eeg`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use kiln_core::testing::Desk;
use kiln_core::{HostTensor, TensorFile};
use kiln_data::{read_npz_as, write_npz};
use kiln_eeg::Eeg;

/// A desk with recordings of both sites, those of site a prepared.
fn desk() -> Desk {
    let desk = Desk::new(&Eeg);
    let simulate = "--recordings 16 --seconds 4 --channels C3,O1";
    desk.json(&format!("simulate --site a {simulate} --out @a"));
    desk.json(&format!("simulate --site b {simulate} --out @b"));
    for site in ["a", "b"] {
        desk.json(&format!(
            "prepare --in @{site} --layout csv --labels @{site}/labels.csv --channels C3,O1 --tmin 0 --out @p{site}"
        ));
    }
    desk
}

const TINY: &str = "--window 200 --epochs 1 --batch 4 --width 0.1";

#[test]
fn a_network_is_trained_judged_used_and_carried_to_another_site() {
    let desk = desk();
    let trained = desk.json(&format!("train --data @pa {TINY} --out @m"));
    assert!(trained["parameters"].as_u64().unwrap() > 0);
    assert!(desk.path("m/loss.svg").exists());

    let found = desk.json("predict --model @m --in @b/b00000.edf @a --out @p");
    assert_eq!(found["predictions"].as_array().unwrap().len(), 17);
    let text = fs::read_to_string(desk.path("p/predictions.csv")).unwrap();
    assert!(text.starts_with("recording,p_pathological,label,windows\nb00000,"), "{text}");
    assert_eq!(fs::read_to_string(desk.path("p/windows.csv")).unwrap().lines().count(), 1 + 17 * 2);

    let judged = desk.json("eval --model @m --data @pa --all --out @metrics.json");
    assert_eq!(judged["n"], 16);
    assert!(desk.path("metrics.json").exists() && desk.path("metrics.svg").exists());
    let groups = judged["groups"].as_array().unwrap();
    assert!(groups.iter().any(|group| group["group"].as_str().unwrap().starts_with("sex ")), "{judged}");
    let area = judged["auc"].as_f64().unwrap();
    let interval = judged["intervals_95"]["auc"].as_array().unwrap();
    assert!(interval[0].as_f64().unwrap() <= area && area <= interval[1].as_f64().unwrap());
    // The same windows judged from their table, and from the recordings themselves.
    let again = desk.json("predict --model @m --data @pa --out @q");
    assert_eq!(again["predictions"].as_array().unwrap().len(), 16);
    let table = desk.json("eval --windows @q/windows.csv --out @w.json");
    assert_eq!(table["auc"], judged["auc"]);
    let raw = desk.json("eval --model @m --data @a --labels @a/labels.csv --all --out @r.json");
    assert_eq!(raw["auc"], judged["auc"]);

    let moved = desk.json(
        "transfer --source @m --data @pb --protocol fine-tune,linear-probe,freeze:1,discriminative,joint --subset 4 --seeds 2 \
         --epochs 1 --batch 4 --source-data @pa --out @t",
    );
    assert_eq!(moved["rows"].as_array().unwrap().len(), 7);
    assert!(moved["rows"][2]["source_balanced_accuracy"].as_f64().is_some());
    assert!(desk.path("t/transfer.svg").exists() && desk.path("t/results.csv").exists());
    desk.json("predict --model @t/fine-tune/seed-0 --in @b/b00001.edf --relevance --out @p2");
    assert!(desk.path("p2/relevance/b00001.png").exists());
    assert_eq!(fs::read_to_string(desk.path("p2/relevance/b00001.csv")).unwrap().lines().count(), 1 + 2 * 5);
    desk.assert_refused("predict --model @m --in @none.edf --out @x", "none.edf");
    assert!(!desk.path("x").exists());

    let calibrated = desk.json("calibrate --model @m --data @pa --out @c");
    assert!(calibrated["after"]["nll"].as_f64().unwrap() <= calibrated["before"]["nll"].as_f64().unwrap());
    let judged_again = desk.json("eval --model @c --data @pa --all --out @metrics2.json");
    assert!(judged_again["n"] == 16);
    let shifted = desk.json("shift --a @pa --b @pb --model @m --out @shift.svg");
    assert_eq!(shifted["bands"].as_array().unwrap().len(), 2 * 5);
    let site = shifted["site_balanced_accuracy"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&site) && desk.path("shift.svg").exists());

    let alike = desk.json("cka --a @m --b @m --data @pb --out @cka.svg");
    for block in 0..2 {
        assert!((alike["cka"][block][block].as_f64().unwrap() - 1.0).abs() < 1e-9);
    }
    assert!(desk.path("cka.json").exists());
    let scaled =
        desk.json("scale --data @pa --subsets 4,6,8 --seeds 2 --window 200 --width 0.1 --epochs 1 --out @s");
    assert!(scaled["models"][0]["power_law"]["c"].as_f64().is_some());
    assert!(desk.path("s/scale.svg").exists());
}

#[test]
fn every_network_is_trained_in_both_modes() {
    let desk = desk();
    for (number, model) in ["shallow", "deep4 --window 350", "tcn --depth 2", "eegnet"].iter().enumerate() {
        let window = if model.contains("--window") { "" } else { "--window 200" };
        for cropped in ["", "--cropped"] {
            let out = format!("@m{number}{cropped}");
            let line = format!(
                "train --data @pa --model {model} {window} --epochs 1 --batch 4 --width 0.2 {cropped}"
            );
            if model.starts_with("deep4") {
                desk.assert_refused(&format!("{line} --out {out}"), "at least 441");
                continue;
            }
            desk.json(&format!("{line} --out {out}"));
            desk.json(&format!("eval --model {out} --data @pa --out @e.json"));
        }
    }
}

#[test]
fn forward_gives_the_outputs_of_the_reference() {
    let desk = Desk::new(&Eeg);
    for (model, name, config) in [
        (
            "shallow",
            "shallow_cropped",
            r#"{"n_chans": 5, "n_outputs": 2, "n_times": 400, "final_conv_length": 17}"#,
        ),
        (
            "deep4",
            "deep4_trial",
            r#"{"n_chans": 6, "n_times": 600, "final_conv_length": "auto", "n_filters_time": 8, "n_filters_spat": 8,
                "n_filters_2": 12, "n_filters_3": 16, "n_filters_4": 20, "n_blocks": 3}"#,
        ),
        ("tcn", "tcn", r#"{"n_chans": 7, "n_filters": 11, "kernel_size": 4}"#),
        ("eegnet", "eegnet", r#"{"n_chans": 9, "n_outputs": 2, "n_times": 333}"#),
    ] {
        desk.write("c.json", config);
        desk.json(&format!(
            "forward --model {model} --config @c.json --weights %{name}_weights.safetensors --input %{name}_io.safetensors \
             --out @o.safetensors"
        ));
        let golden = TensorFile::read(format!("tests/data/{name}_io.safetensors").as_ref()).unwrap();
        let found = TensorFile::read(&desk.path("o.safetensors")).unwrap();
        for output in ["output0", "output1"] {
            let (found, expected) = (found.get(output).unwrap(), golden.get(output).unwrap());
            assert_eq!(found.shape, expected.shape, "{name}");
            let pairs = found.as_floats().unwrap().iter().zip(expected.as_floats().unwrap());
            assert!(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max) <= 1e-4, "{name}");
        }
    }
    let line = "forward --model eegnet --weights %eegnet_weights.safetensors --input %eegnet_io.safetensors --out @x.npz";
    for (config, words) in [
        (r#"{"n_chans": 8, "n_times": 333}"#, "conv_spatial.weight"),
        (r#"{"n_chans": 9, "n_times": 333, "f3": 1}"#, "f3"),
        (r#"{"n_chans": 9, "n_times": 10}"#, "too short"),
        ("[]", "does not describe this network"),
    ] {
        desk.write("c.json", config);
        desk.assert_refused(&format!("{line} --config @c.json"), words);
    }
    assert!(!desk.path("x.npz").exists());
}

#[test]
fn a_recording_is_described_and_converted() {
    let desk = Desk::new(&Eeg);
    let found = desk.json("info --in %tuab_like.edf");
    assert_eq!((found["format"].as_str(), found["seconds"].as_f64()), (Some("EDF"), Some(12.0)));
    assert_eq!(found["signals"].as_array().unwrap().len(), 21);
    assert!(found["signals"][0]["std"].as_f64().unwrap() > 0.0);
    let made = desk.json("convert --in %tuab_like.edf --tmin 2 --tmax 11 --out @a.npz");
    assert_eq!((made["samples"].as_u64(), made["channels"][4].as_str()), (Some(900), Some("CZ")));
    let arrays = read_npz_as(&desk.path("a.npz"), |bytes| Ok(bytes.len())).unwrap();
    assert_eq!((arrays["eeg"], arrays["channels"]), (128 + 21 * 900 * 4, 128 + 21 * 3 * 4));
    for (line, words) in [
        ("convert --in %tuab_like.edf --out @x.npz", "lasts 12.0 s, and the first 60 s are left out"),
        ("convert --in %tuab_like.edf --tmin 0 --channels C3,POZ --out @x.npz", "lacks the channels POZ"),
        ("convert --in %tuab_like.edf --tmin 5 --tmax 5 --out @x.npz", "is empty"),
        ("convert --in %tuab_like.edf --tmin 0 --rate 0 --out @x.npz", "--rate 0"),
        ("info --in %window_probs.csv", "neither as EDF nor as BDF"),
        ("info --in @none.edf", "none.edf"),
    ] {
        desk.assert_refused(line, words);
    }
    assert!(!desk.path("x.npz").exists());
}

#[test]
fn segments_of_arrays_are_learned_from() {
    let desk = Desk::new(&Eeg);
    let mut file = TensorFile::new();
    for (name, pace) in [("A", 0.2f32), ("B", 0.7)] {
        let values = (0..10 * 400).map(|i| (i as f32 * pace).sin() * 50.0 + (i % 13) as f32).collect();
        file.insert(name, HostTensor::float([10, 400], values));
    }
    write_npz(&desk.path("x.npz"), &file).unwrap();
    desk.write("l.csv", "path,label\nA,rest\nB,seizure\n");
    let data = "--data @x.npz --array A,B --labels @l.csv --positive seizure --rate 100";
    desk.json(&format!("train {data} --normalise none --epochs 1 --batch 4 --width 0.1 --out @m"));
    let judged = desk.json(&format!("eval --model @m {data} --out @e.json"));
    assert_eq!((judged["n"].as_u64(), judged["skipped"].as_array().unwrap().len()), (Some(20), 0));
    for (line, words) in [
        ("train --data @x.npz --array A --labels @l.csv --out @n", "does not say how fast"),
        ("train --data @x.npz --rate 100 --labels @l.csv --out @n", "name them with --array"),
        ("train --data @x.npz --array C --rate 100 --out @n", "\"C\" is missing"),
        (
            "train --data @x.npz --array A,B --rate 100 --labels @l.csv --out @n",
            "the label \"rest\" is unknown",
        ),
        ("train --data @x.npz --array A,B --rate 100 --out @n", "no labelled recordings"),
        (
            "train --data @x.npz --array A --rate 100 --labels @l.csv --positive seizure --out @n",
            "there is no \"B\"",
        ),
    ] {
        desk.assert_refused(line, words);
    }
    assert!(!desk.path("n").exists());
}

#[test]
fn layouts_of_the_corpora_are_found() {
    let desk = desk();
    let copy = |from: &str, to: &str| {
        let to = desk.path(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(desk.path(from), to).unwrap();
    };
    for (number, place) in [
        "t/train/normal/01_tcp_ar/aaaaaaaa_s001_t000.edf",
        "t/train/normal/01_tcp_ar/aaaaaaaa_s002_t000.edf",
        "t/train/abnormal/01_tcp_ar/aaaaaaab_s001_t000.edf",
        "t/eval/abnormal/01_tcp_ar/aaaaaaac_s001_t000.edf",
        "n/normal/train/0000001.edf",
        "n/abnormal/eval/0000002.edf",
    ]
    .iter()
    .enumerate()
    {
        copy(&format!("a/a{number:05}.edf"), place);
    }
    let options = "--tmin 0 --channels C3,O1";
    let found = desk.json(&format!("prepare --in @t --layout tuab {options} --out @pt"));
    assert_eq!((found["recordings"].as_u64(), found["pathological"].as_u64()), (Some(4), Some(2)));
    let found = desk.json(&format!("prepare --in @t --layout tuab --unique-subjects {options} --out @pu"));
    assert_eq!(found["recordings"], 3);
    desk.write("n/Labels.csv", "recordname,label,age,gender,loc\n0000001.edf,normal,31,male,train\n");
    desk.json(&format!("prepare --in @n --layout nmt {options} --out @pn"));
    let index = fs::read_to_string(desk.path("pn/index.csv")).unwrap();
    assert!(index.contains("0000001,0,0000001,31.0,male,train"), "{index}");

    copy("a/a00000.edf", "t/eval/normal/01_tcp_ar/aaaaaaab_s009_t000.edf");
    desk.assert_refused(&format!("prepare --in @t --layout tuab {options} --out @x"), "aaaaaaab");
    let found = desk.json(&format!("prepare --in @t --layout tuab --drop-common {options} --out @pd"));
    assert_eq!(found["recordings"], 3);
    assert!(!desk.path("x").exists());
}

#[test]
fn what_cannot_be_prepared_is_listed_and_the_rest_goes_on() {
    let desk = desk();
    let whole = fs::read(desk.path("a/a00000.edf")).unwrap();
    fs::write(desk.path("a/cut.edf"), &whole[..300]).unwrap();
    fs::write(desk.path("a/half.edf"), &whole[..whole.len() * 2 / 3]).unwrap();
    fs::write(desk.path("a/none.edf"), "not a recording").unwrap();
    let labels = fs::read_to_string(desk.path("a/labels.csv")).unwrap();
    let more = "cut.edf,normal,x1,30,F,train\nhalf.edf,abnormal,x2,30,F,train\nnone.edf,normal,x3,,,train\n\
                absent.edf,normal,x4,30,F,train\n";
    desk.write("l.csv", labels.clone() + more);
    let options = "--tmin 0 --channels C3,O1";
    let found = desk.json(&format!("prepare --in @a --labels @l.csv {options} --out @p"));
    assert_eq!((found["recordings"].as_u64(), found["skipped"].as_u64()), (Some(17), Some(3)));
    let skipped = fs::read_to_string(desk.path("p/skipped.csv")).unwrap();
    assert!(skipped.contains("cut.edf") && skipped.contains("row 20 of the labels"), "{skipped}");
    for (table, words) in [
        ("path,label\na00000.edf,ill\n", "row 1: the label \"ill\" is unknown"),
        ("file,label\na00000.edf,normal\n", "has no path"),
        ("path,label,split\na00000.edf,normal,dev\n", "the split \"dev\" is unknown"),
        ("path,label,age\na00000.edf,normal,old\n", "the age \"old\" is no number"),
        ("path,label\nb.edf,normal\n", "names 1 files, none of which"),
        ("path,label\nnone.edf,normal\n", "none of 1 recordings can be prepared"),
        (
            "path,label,subject,split\na00000.edf,0,s,train\na00001.edf,1,s,eval\n",
            "in training and evaluation: s",
        ),
    ] {
        desk.write("bad.csv", table);
        desk.assert_refused(&format!("prepare --in @a --labels @bad.csv {options} --out @x"), words);
        assert!(!desk.path("x").exists(), "{words}");
    }
    for (line, words) in [
        ("prepare --in @a --out @x", "need a table of labels"),
        ("prepare --in @a --labels @l.csv --tmin 0 --out @pa", "already holds prepared recordings"),
        ("prepare --in @p/recordings --layout tuab --out @x", "holds no recordings"),
        ("train --data @pa --tmin 3 --out @x", "is prepared already"),
        ("train --data @pa --window 5000 --out @x", "as long as a window of 5000"),
        ("train --data @pa --window 50 --out @x", "too short for this network"),
        ("train --data @pa --subset 99 --out @x", "--subset 99 of"),
        ("train --data @pa --augment blur --out @x", "no augmentation"),
        ("train --data @pa --depth 3 --window 200 --out @x", "only a tcn"),
        ("train --data @pa --width 0 --out @x", "--width 0"),
        ("train --data @none --out @x", "neither a folder"),
        ("eval --windows @a/labels.csv --out @x", "recording"),
        ("cka --a @pa --b @pa --data @pa", "config.json"),
    ] {
        desk.assert_refused(line, words);
    }
    assert!(!desk.path("x").exists());
    desk.write("w.csv", "recording,window,label,p_pathological\nr,0,1,1.5\n");
    desk.assert_refused("eval --windows @w.csv --out @x", "row 1: the probability is \"1.5\"");
    desk.write("w.csv", "recording,window,label,p_pathological\nr,0,1,0.5\nr,1,0,0.5\n");
    desk.assert_refused("eval --windows @w.csv --out @x", "row 2: r has two labels");
    // A model does not take what was prepared otherwise, nor damaged files.
    desk.json(&format!("train --data @pa {TINY} --out @m"));
    desk.json("prepare --in @a --labels @a/labels.csv --tmin 0 --channels C3 --out @one");
    desk.assert_refused("eval --model @m --data @one --out @x", "has the channels C3");
    desk.assert_refused("transfer --source @m --data @pb --subset 99 --out @x", "a subset of 99");
    desk.assert_refused("transfer --source @m --data @pb --protocol joint --out @x", "--source-data");
    desk.assert_refused("transfer --source @m --data @pb --protocol magic --out @x", "no protocol \"magic\"");
    desk.assert_refused(
        "transfer --source @m --data @pb --protocol freeze:7 --subset 4 --out @y",
        "leaves nothing",
    );
    let file = desk.path("pa/recordings/a00000.safetensors");
    let bytes = fs::read(&file).unwrap();
    fs::write(&file, &bytes[..bytes.len() - 4]).unwrap();
    desk.assert_refused("eval --model @m --data @pa --all --out @x", "a00000.safetensors");
}

#[test]
fn a_recording_is_judged_while_it_grows() {
    let desk = desk();
    desk.json(&format!("train --data @pa {TINY} --out @m"));
    let whole = fs::read(desk.path("b/b00000.edf")).unwrap();
    let predicted = desk.json("predict --model @m --in @b/b00000.edf --out @p");
    let expected = &predicted["predictions"][0]["p_pathological"];

    // While it is made, the header has no number of records.
    let mut begun = whole.clone();
    begun[236..244].copy_from_slice(b"-1      ");
    begun.truncate(whole.len() - (whole.len() - 256 * 3) / 4 - 1);
    desk.write("r.edf", begun);
    let found = desk.json("follow --model @m --in @r.edf --patience 0 --out @begun");
    assert_eq!(found["timeline"].as_array().unwrap().len(), 1);
    assert!(found["timeline"][0]["windows"].as_u64() < predicted["predictions"][0]["windows"].as_u64());

    let (recording, timeline) = (desk.path("r.edf"), desk.path("f/timeline.csv"));
    let recorder = std::thread::spawn(move || {
        while !timeline.exists() {
            std::thread::yield_now();
        }
        fs::write(recording, whole).unwrap();
    });
    let found = desk.json("follow --model @m --in @r.edf --every 0 --patience 600 --out @f");
    recorder.join().unwrap();
    let timeline = found["timeline"].as_array().unwrap();
    assert_eq!(timeline.len(), 2);
    assert_eq!(&timeline[1]["p_pathological"], expected);
    assert!(desk.path("f/timeline.svg").exists());

    desk.write("text.edf", "no recording");
    desk.assert_refused("follow --model @m --in @text.edf --patience 0 --out @x", "text.edf");
    desk.assert_refused("follow --model @m --in @none.edf --out @x", "none.edf");
    desk.assert_refused("follow --model @m --in @r.edf --patience=-1 --out @x", "--patience is -1");
    assert!(!desk.path("x").exists());
}
