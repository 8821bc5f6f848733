//! The verbs of `kiln connectome`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::atomic::Ordering;

use kiln_connectome::Connectome;
use kiln_core::TensorFile;
use kiln_core::testing::Desk;

/// Options of a fit that takes little time.
const TINY: &str = "--rank 2 --inits 1 --sweeps 15";

fn desk() -> Desk {
    let desk = Desk::new(&Connectome);
    desk.json("simulate --animals 3 --neurons 12 --frames 80 --motifs 2 --out @demo");
    desk
}

/// A recording of neurons as sines of their own frequencies.
fn csv(neurons: &[&str], frames: usize) -> String {
    let mut text = format!("time_s,{}\n", neurons.join(","));
    for t in 0..frames {
        let value =
            |i: usize| (0.3 * t as f64 * (1.0 + 0.2 * i as f64)).sin() + 0.01 * (t * (i + 3) % 7) as f64;
        let cells: Vec<String> = (0..neurons.len()).map(|i| value(i).to_string()).collect();
        text += &format!("{},{}\n", t as f64 * 0.5, cells.join(","));
    }
    text
}

#[test]
fn an_atlas_is_fitted_read_again_compared_and_asked_about_silencing() {
    let desk = desk();
    let atlas = desk.json(&format!("fit --traces @demo {TINY} --out @a"));
    assert_eq!(atlas["motifs"].as_array().unwrap().len(), 2);
    assert_eq!(atlas["neurons"].as_array().unwrap().len(), 12);
    for name in [
        "atlas.html",
        "atlas.json",
        "config.json",
        "motifs/motif-1.svg",
        "motifs/motif-2.graphml",
        "motifs/motif-1.csv",
    ] {
        assert!(desk.path("a").join(name).exists(), "{name}");
    }
    desk.json("atlas --model @a --out @again");
    let page = |folder: &str| fs::read_to_string(desk.path(folder).join("atlas.json")).unwrap();
    let near = |text: String| -> Vec<f64> {
        serde_json::from_str::<serde_json::Value>(&text).unwrap()["motifs"][0]["time_factor"]
            .as_array()
            .unwrap()
            .iter()
            .map(|x| x.as_f64().unwrap())
            .collect()
    };
    assert!(near(page("a")).iter().zip(near(page("again"))).all(|(a, b)| (a - b).abs() < 1e-6));
    let same = desk.json("compare --a @a --b @a");
    assert!(
        same.as_array()
            .unwrap()
            .iter()
            .all(|c| c["a"] == c["b"] && c["similarity"].as_f64().unwrap() > 0.999),
        "{same}"
    );
    let effects = desk.json("silence --model @a --neuron N03 --out @effects.csv");
    assert_eq!(effects["neurons"].as_array().unwrap().len(), 11);
    assert_eq!(fs::read_to_string(desk.path("effects.csv")).unwrap().lines().count(), 12);
    desk.assert_refused("silence --model @a --neuron AWBL", "no neuron \"AWBL\"");
    desk.assert_refused("silence --model @a --neuron éa", "12 neurons, among them N01");
    desk.assert_refused("atlas --model @demo", "config.json");
}

#[test]
fn a_rank_is_chosen_among_several() {
    let desk = desk();
    let atlas = desk.json("fit --traces @demo --rank auto --ranks 1..3 --inits 2 --sweeps 10 --out @a");
    assert_eq!(atlas["ranks"].as_array().unwrap().len(), 3);
    assert!((1..=3).contains(&atlas["motifs"].as_array().unwrap().len()));
}

#[test]
fn a_tensor_is_factorised_as_in_the_fit_from_either_layout() {
    let desk = desk();
    desk.json("affinity --traces @demo --out @pairs.safetensors");
    desk.json("affinity --traces @demo --layout matrix --out @matrix.npz");
    let pairs = TensorFile::read(&desk.path("pairs.safetensors")).unwrap();
    assert_eq!(pairs.get("tensor").unwrap().shape, [80, 3, 66]);
    assert_eq!(pairs.metadata["neurons"].split(',').count(), 12);
    let a = desk.json("ntf --tensor @pairs.safetensors --rank 2 --inits 2 --sweeps 10 --out @a");
    let b = desk.json("ntf --tensor @matrix.npz --rank 2 --inits 2 --sweeps 10 --out @b");
    assert_eq!(a["relative_error"], b["relative_error"]);
    let again =
        desk.json("ntf --tensor @pairs.safetensors --init @a/factors.safetensors --sweeps 1 --out @c");
    assert!(again["relative_error"].as_f64().unwrap() <= a["relative_error"].as_f64().unwrap() + 1e-6);
    let c =
        desk.json("ntf --tensor @pairs.safetensors --out-of-core --rank 2 --inits 2 --sweeps 10 --out @c");
    assert_eq!(a["relative_error"], c["relative_error"]);
    desk.assert_refused("ntf --tensor @pairs.safetensors --rank 81 --out @x", "choose a rank from 1 to 66");
    desk.assert_refused(
        "ntf --tensor @a/factors.safetensors --out-of-core --rank 2 --out @x",
        "\"tensor\" is missing",
    );
    desk.assert_refused(
        "ntf --tensor @pairs.safetensors --solver direct --loss gamma --rank 2 --out @x",
        "pairs.safetensors: the entry [",
    );
}

/// A fit that finds one of its starts on disk ends as one that made them all.
#[test]
fn a_fit_that_was_stopped_goes_on_to_the_same_atlas() {
    let desk = desk();
    let fit = "fit --traces @demo --rank auto --ranks 2..3 --inits 2 --sweeps 10";
    let whole = desk.json(&format!("{fit} --out @a"));
    assert!(!desk.path("a/starts").exists());
    let stop = desk.cx.interrupt_flag();
    stop.store(true, Ordering::Relaxed);
    desk.assert_refused(&format!("{fit} --out @b"), "go on with --resume");
    stop.store(false, Ordering::Relaxed);
    assert!(desk.path("b/starts").exists());
    desk.assert_refused("fit --traces @demo --rank 3 --resume @b", "other traces or settings");
    let resumed = desk.json(&format!("{fit} --resume @b"));
    assert_eq!(whole["motifs"], resumed["motifs"]);
    assert!(!desk.path("b/starts").exists());
    desk.assert_refused(&format!("{fit} --resume @b"), "only a fit that was stopped goes on");
    let scratch = desk.json(&format!("{fit} --scratch @demo --out @c"));
    assert_eq!(scratch["motifs"].as_array().unwrap().len(), whole["motifs"].as_array().unwrap().len());
    assert_eq!(fs::read_dir(desk.path("demo")).unwrap().count(), 2, "nothing stays in the scratch folder");
}

#[test]
fn communities_of_the_golden_graph_are_scored_and_found() {
    let desk = Desk::new(&Connectome);
    let scored = desk.json("communities --edges %g2_edges.csv --partition %g2_labels.csv --out @s");
    let dc = scored["description_length_nats"]["dc"].as_f64().unwrap();
    assert!((dc - 3510.0704428283934).abs() < 1e-5, "{dc}");
    let found = desk.json("communities --edges %g2_edges.csv --model ndc --flat --posterior 20 --out @f");
    assert!(found["description_length_nats"].as_f64().unwrap() <= 3410.2013, "{found}");
    let table = fs::read_to_string(desk.path("f/communities.csv")).unwrap();
    assert!(table.starts_with("node,community,confidence\n") && table.lines().count() == 81, "{table}");
    assert!(desk.path("f/dl.json").exists());
}

#[test]
fn isolated_nodes_are_none() {
    let desk = Desk::new(&Connectome);
    desk.write("e.csv", "source,target,weight\na,b,1\nb,c,2\na,c,1\nc,d,0\n");
    desk.json("communities --edges @e.csv --out @c");
    assert!(fs::read_to_string(desk.path("c/communities.csv")).unwrap().contains("d,none"));
}

#[test]
fn recordings_of_other_rates_lengths_and_gaps_are_brought_together() {
    let desk = Desk::new(&Connectome);
    fs::create_dir(desk.path("w")).unwrap();
    desk.write("w/one.csv", csv(&["A", "B", "C"], 90));
    // A constant neuron, one with a long gap, and half the frames.
    let two: String = csv(&["A", "B", "D", "E"], 60)
        .lines()
        .enumerate()
        .map(|(row, line)| {
            let mut cells: Vec<&str> = line.split(',').collect();
            if row > 0 {
                cells[3] = "7";
            }
            if (10..20).contains(&row) {
                cells[4] = "";
            }
            cells.join(",") + "\n"
        })
        .collect();
    desk.write("w/two.csv", two);
    desk.write("events.csv", "start,end,label\n5,8,salt\n");
    let atlas = desk.json("fit --traces @w --events @events.csv --rank 1 --inits 1 --sweeps 5 --out @a");
    assert_eq!(atlas["neurons"], serde_json::json!(["A", "B", "C"]));
    assert_eq!(atlas["frames"], 60);
    assert_eq!(atlas["spans"][0]["label"], "salt");
}

#[test]
fn nwb_is_read_packed_or_not_with_either_clock() {
    let desk = Desk::new(&Connectome);
    for (file, neurons) in [("gzip.nwb", ["AVAL", "AVAR", "RIML"]), ("plain.nwb", ["roi0", "roi1", "roi2"])] {
        let found = desk.json(&format!("affinity --traces %{file} --out @a.safetensors"));
        assert_eq!(found["neurons"], serde_json::json!(neurons));
        assert_eq!(found["shape"], serde_json::json!([80, 1, 3]));
    }
    let affinity = TensorFile::read(&desk.path("a.safetensors")).unwrap();
    // The same sines as numbers: contiguous floats with a rate are read in the right order.
    desk.write(
        "plain.csv",
        (0..80).fold("time_s,roi0,roi1,roi2\n".to_string(), |text, t| {
            let value = |i: i32| (0.3 * 0.5 * f64::from(t) * (1.0 + 0.2 * f64::from(i))).sin();
            text + &format!("{},{},{},{}\n", 0.5 * f64::from(t), value(0), value(1), value(2))
        }),
    );
    desk.json("affinity --traces @plain.csv --out @b.safetensors");
    let other = TensorFile::read(&desk.path("b.safetensors")).unwrap();
    let values = |file: &TensorFile| file.get("tensor").unwrap().as_floats().unwrap().to_vec();
    assert!(values(&affinity).iter().zip(values(&other)).all(|(a, b)| (a - b).abs() < 1e-3));
}

#[test]
fn what_does_not_fit_is_named() {
    let desk = desk();
    desk.write("short.csv", csv(&["A", "B"], 10));
    desk.write("twice.csv", "time_s,A,A\n0,1,2\n1,2,3\n");
    desk.write("words.csv", "time_s,A,B\n0,1,x\n1,2,3\n");
    desk.write("back.csv", "time_s,A,B\n0,1,2\n3,1,3\n2,1,4\n");
    desk.write("still.csv", "time_s,A,B\n0,1,2\n1,1,2\n2,1,2\n");
    desk.write("untimed.csv", "A,B\n1,2\n");
    desk.write("broken.nwb", "this is no HDF5");
    desk.write("negative.csv", "source,target,weight\na,b,-1\n");
    desk.write("loop.csv", "source,target,weight\na,a,1\n");
    desk.write("nan.csv", "source,target,weight\na,b,\n");
    desk.write("empty.csv", "source,target,weight\na,b,0\n");
    fs::create_dir(desk.path("apart")).unwrap();
    desk.write("apart/one.csv", csv(&["A", "B"], 60));
    desk.write("apart/two.csv", csv(&["C", "D"], 60));
    let fit = |what: &str| format!("fit --traces {what} {TINY} --out @x");
    for (line, words) in [
        (fit("@short.csv"), "fewer than the 17"),
        (fit("@twice.csv"), "both named \"A\""),
        (fit("@words.csv"), "\"x\" is no number"),
        (fit("@back.csv"), "from 3 to 2 s"),
        (fit("@still.csv"), "no neuron is left"),
        (fit("@untimed.csv"), "no column \"time_s\""),
        (fit("@broken.nwb"), "cannot be read as HDF5"),
        (fit("@apart"), "no two animals"),
        (fit("@nothing"), "nothing"),
        ("fit --traces @demo --rank 67 --inits 1 --out @x".into(), "rank 67"),
        ("fit --traces @demo --rank 2 --sigma 0 --out @x".into(), "makes no filter"),
        ("fit --traces @demo --rank 2 --rate 0 --out @x".into(), "no rate"),
        ("fit --traces @demo --ranks 5..2 --out @x".into(), "no range of ranks"),
        ("communities --edges @negative.csv --out @x".into(), "weight -1"),
        ("communities --edges @loop.csv --out @x".into(), "joins a node with itself"),
        ("communities --edges @nan.csv --out @x".into(), "weight"),
        ("communities --edges @empty.csv --out @x".into(), "weight 0"),
        ("simulate --neurons 3 --out @x".into(), "too few"),
    ] {
        desk.assert_refused(&line, words);
        assert!(!desk.path("x").exists(), "{line}");
    }
}

#[test]
fn damaged_tensors_and_atlases_are_errors() {
    let desk = desk();
    desk.json(&format!("fit --traces @demo {TINY} --out @a"));
    desk.json("affinity --traces @demo --out @t.safetensors");
    let whole = fs::read(desk.path("t.safetensors")).unwrap();
    for cut in [0, 9, whole.len() / 2] {
        desk.write("cut.safetensors", &whole[..cut]);
        desk.assert_refused("ntf --tensor @cut.safetensors --rank 2 --out @x", "cut.safetensors");
    }
    let model = fs::read(desk.path("a/model.safetensors")).unwrap();
    desk.write("a/model.safetensors", &model[..model.len() - 100]);
    desk.assert_refused("silence --model @a --neuron N03", "model.safetensors");
}
