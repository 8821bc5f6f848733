//! The verbs of `kiln hypernet`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::Path;

use kiln_core::testing::Desk;
use kiln_core::{HostTensor, Scale, System, TensorFile};
use kiln_data::write_npz;
use kiln_hypernet::Hypernet;
use serde_json::Value;

/// Options of a model that trains in milliseconds.
const TINY: &str = "--target mlp:2-4-2 --hidden 6 --emb-dim 3 --chunk 8 --steps 6 --batch 8 --eval-every 3";

fn desk() -> Desk {
    Desk::new(&Hypernet)
}

/// A desk with `rows.csv`: two features, a task, a dose and a class.
fn desk_with_rows() -> Desk {
    let desk = desk();
    let mut text = "a,b,writer,dose,label\n".to_string();
    for i in 0..40 {
        let (a, b) = (f64::from(i % 7) - 3.0, f64::from(i % 5) - 2.0);
        let writer = ["anna", "ben"][i as usize % 2];
        let label = ["no", "yes"][usize::from(if writer == "anna" { a > 0.0 } else { b > 0.0 })];
        text += &format!("{a},{b},{writer},{}.5,{label}\n", i % 3);
    }
    desk.write("rows.csv", text);
    desk
}

#[test]
fn the_golden_file_gives_the_golden_weights() {
    let desk = desk();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/hypernet_outputs.safetensors");
    let result = desk.json(&format!("forward --weights {} --to @theta.safetensors", golden.display()));
    assert_eq!(result["tensors"].as_array().unwrap().len(), 6);
    let (found, expected) =
        (TensorFile::read(&desk.path("theta.safetensors")).unwrap(), TensorFile::read(&golden).unwrap());
    for name in ["once.theta", "heads.theta", "comp.theta", "chunk.theta", "chunk.y", "reg.value"] {
        let (found, expected) = (found.get(name).unwrap(), expected.get(name).unwrap());
        assert_eq!(found.shape, expected.shape, "{name}");
        for (a, b) in found.as_floats().unwrap().iter().zip(expected.as_floats().unwrap()) {
            assert!((a - b).abs() <= 1e-6 + 1e-5 * b.abs(), "{name}: {a}, should be {b}");
        }
    }
}

#[test]
fn every_conditioning_trains_predicts_and_scores() {
    let desk = desk_with_rows();
    for (name, options, columns) in [
        ("task", "--cond task --task-col writer", 6),
        ("noise", "--cond noise --scheme once", 6),
        ("even-noise", "--cond noise --noise uniform", 6),
        ("given", "--cond given --cond-cols dose --arch rnn", 6),
        ("data", "--cond data --arch attention --scheme layers", 6),
        ("both", "--cond task,noise --task-col writer --scheme component --arch cnn", 8),
    ] {
        // Columns that are no features to this model are left out of the table.
        let table = fs::read_to_string(desk.path("rows.csv")).unwrap();
        let keep: Vec<&str> = ["a", "b", "label"]
            .into_iter()
            .chain(options.contains("writer").then_some("writer"))
            .chain(options.contains("dose").then_some("dose"))
            .collect();
        let heads: Vec<&str> = table.lines().next().unwrap().split(',').collect();
        let line = |line: &str| {
            let cells: Vec<&str> = line.split(',').collect();
            let kept = heads.iter().zip(cells).filter(|(head, _)| keep.contains(head)).map(|(_, cell)| cell);
            kept.collect::<Vec<_>>().join(",")
        };
        let rows: Vec<String> = table.lines().map(line).collect();
        desk.write(&format!("{name}.csv"), rows.join("\n"));
        let result = desk.json(&format!("train --data @{name}.csv {options} {TINY} --out @{name}"));
        assert_eq!(result["steps"], 6, "{name}");
        let score = desk.json(&format!("eval --model @{name} --data @{name}.csv --samples 3"));
        assert_eq!(score["rows"], 40, "{name}");
        desk.json(&format!("predict --model @{name} --data @{name}.csv --samples 3 --out @{name}-p.csv"));
        let text = fs::read_to_string(desk.path(&format!("{name}-p.csv"))).unwrap();
        assert!(text.starts_with("row,class,p_no,p_yes"), "{text}");
        let draws = usize::from(options.contains("noise"));
        assert_eq!(text.lines().count(), 41);
        assert_eq!(text.lines().nth(1).unwrap().split(',').count(), 5 + 2 * draws, "{name} {columns}");
    }
    desk.json("generate --model @task --task ben --to @ben.safetensors");
    let weights = TensorFile::read(&desk.path("ben.safetensors")).unwrap();
    assert_eq!(weights.get("fc1.weight").unwrap().shape, [4, 2]);
    assert_eq!(weights.metadata["classes"], "[\"no\",\"yes\"]");
    assert_eq!(serde_json::from_str::<Vec<f32>>(&weights.metadata["mean"]).unwrap().len(), 2);
    desk.json("generate --model @given --given -0.5 --to @w.safetensors");
    desk.json("predict --model @task --data @task.csv --task anna --out @anna.csv");
}

#[test]
fn a_resumed_run_ends_as_one_that_was_never_interrupted() {
    let desk = desk_with_rows();
    let options = format!("--data @rows.csv --cond task,given --task-col writer --cond-cols dose {TINY}");
    desk.json(&format!("train {options} --out @whole"));
    desk.cx.interrupted.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = desk.run(&format!("train {options} --out @parts")).unwrap_err();
    assert!(error.hint_text().unwrap().contains("kiln hypernet train --data"));
    desk.cx.interrupted.store(false, std::sync::atomic::Ordering::Relaxed);
    desk.json("train --data @rows.csv --resume @parts");
    let weights = |folder: &str| fs::read(desk.path(folder).join("model.safetensors")).unwrap();
    assert!(weights("whole") == weights("parts"));
}

#[test]
fn a_trained_network_is_changed_for_every_task_and_stays_itself() {
    let desk = desk_with_rows();
    let three = TINY.replace("mlp:2-4-2", "mlp:3-4-2");
    desk.json(&format!("train --data @rows.csv --cond task --task-col writer {three} --out @t"));
    desk.json("generate --model @t --task ben --to @ben.safetensors");
    let line = format!(
        "train --data @rows.csv --cond task --task-col writer {three} --lora 1 --emb-l2 0.01 --spectral"
    );
    desk.json(&format!("{line} --base @ben.safetensors --out @l"));
    let (base, model) = (
        TensorFile::read(&desk.path("ben.safetensors")).unwrap(),
        TensorFile::read(&desk.path("l/model.safetensors")).unwrap(),
    );
    let first = base.get("fc1.weight").unwrap().as_floats().unwrap().to_vec();
    assert_eq!(model.get("base").unwrap().as_floats().unwrap()[..first.len()], first);
    assert_eq!(desk.json("eval --model @l --data @rows.csv")["rows"], 40);
    desk.json("train --data @rows.csv --resume @l --steps 8");
    desk.assert_refused(&format!("{line} --base @none.safetensors --out @x"), "none.safetensors");
    desk.write("other.csv", "a,b,dose,writer,label\n1,2,0,ben,maybe\n2,1,0,anna,never\n");
    let other = line.replace("@rows.csv", "@other.csv");
    desk.assert_refused(&format!("{other} --base @ben.safetensors --out @x"), "knows the classes no, yes");
    let wide = line.replace("mlp:3-4-2", "mlp:3-5-2");
    desk.assert_refused(
        &format!("{wide} --base @ben.safetensors --out @x"),
        "\"fc1.weight\" has the shape [4, 3]",
    );
    assert!(!desk.path("x").exists());
}

#[test]
fn a_new_task_is_learned_and_the_others_are_kept() {
    let desk = desk_with_rows();
    desk.json(&format!(
        "train --data @rows.csv --cond task,given --task-col writer --cond-cols dose {TINY} --out @m"
    ));
    desk.assert_refused("add-task --model @m --data @rows.csv --out @n", "depends on more than the task");
    let table = fs::read_to_string(desk.path("rows.csv")).unwrap();
    desk.json(&format!(
        "train --data @rows.csv --cond task --task-col writer --target mlp:3-4-2 {} --out @t",
        TINY.trim_start_matches("--target mlp:2-4-2")
    ));
    desk.assert_refused("add-task --model @t --data @rows.csv --out @n", "holds 0 new tasks");
    desk.write("more.csv", table.replace("anna", "cleo"));
    let strong = desk.json("add-task --model @t --data @more.csv --beta 1000 --steps 20 --out @strong");
    assert_eq!((&strong["task"], &strong["rows"]), (&Value::from("cleo"), &Value::from(20)));
    let weak = desk.json("add-task --model @t --data @more.csv --beta 0 --steps 20 --out @weak");
    let moved = |result: &Value| result["moved_weights_of_others"].as_f64().unwrap();
    assert!(moved(&strong) < 0.2 * moved(&weak), "{strong} {weak}");
    assert_eq!(desk.json("eval --model @strong --data @more.csv")["tasks"].as_array().unwrap().len(), 2);
    desk.assert_refused("add-task --model @t --data @more.csv --out @strong", "already holds a model");
}

#[test]
fn applications_run_on_tables_of_ones_own() {
    let desk = desk_with_rows();
    let found = desk.json("app continual --data @rows.csv --task-col writer --steps-per-task 2 --out @plots");
    assert_eq!(found["findings"][0]["table"]["rows"].as_array().unwrap().len(), 5);
    assert!(desk.path("plots/continual-learning.svg").exists());

    let mut text = "drug,days,age,weight\n".to_string();
    for i in 0..60 {
        text += &format!("{},{},{},{}\n", i % 2, 3 * (i % 2) + i % 7, i % 7, i % 4);
    }
    desk.write("trial.csv", &text);
    desk.json("app causal --data @trial.csv --treatment drug --outcome days --steps 3 --out @effects.csv");
    let effects = fs::read_to_string(desk.path("effects.csv")).unwrap();
    assert!(effects.starts_with("row,hypernetwork,TARNet,T-learner,S-learner\n1,"), "{effects}");
    assert_eq!(effects.lines().count(), 61);
    let noisy = "app causal --data @trial.csv --treatment drug --outcome days --steps 3 --samples";
    desk.json(&format!("{noisy} 4 --out @noisy.csv"));
    let noisy_effects = fs::read_to_string(desk.path("noisy.csv")).unwrap();
    assert!(
        noisy_effects
            .lines()
            .next()
            .unwrap()
            .ends_with("hypernetwork with noise,hypernetwork with noise: deviation")
    );
    for (line, other) in noisy_effects.lines().zip(effects.lines()).skip(1) {
        assert!(line.starts_with(other), "the others are what they are without noise");
        assert!(line.rsplit(',').next().unwrap().parse::<f64>().unwrap() > 0.0, "draws differ");
    }
    desk.assert_refused(&format!("{noisy} 0 --out @no.csv"), "0 samples");
    desk.assert_refused("app causal --data @trial.csv --treatment x --outcome days", "no column \"x\"");
    desk.assert_refused(
        "app causal --data @trial.csv --treatment age --outcome days",
        "row 3: the treatment \"age\" is 2",
    );
    desk.write("arm.csv", text.replace("\n1,", "\n0,"));
    desk.assert_refused(
        "app causal --data @arm.csv --treatment drug --outcome days",
        "60 untreated and 0 treated",
    );

    let found = desk.json("app continual --steps-per-task 2 --task-pairs 0/1,2/3 --look-ahead");
    assert_eq!(found["findings"][0]["table"]["rows"].as_array().unwrap().len(), 6);
    desk.json("app transfer --data @rows.csv --domain-col writer --held-out ben --labelled 4 --steps 2");
    desk.assert_refused(
        "app transfer --data @rows.csv --domain-col writer --held-out zoe",
        "there is no domain \"zoe\"; there are anna, ben",
    );
    desk.write(
        "kinds.csv",
        (0..60).fold("a,b,label\n".to_string(), |text, i| {
            text + &format!("{},{},{}\n", i % 7, i % 5, ["x", "y", "z"][i % 3])
        }),
    );
    let found = desk.json("app uncertainty --data @kinds.csv --unknown z --steps 2 --samples 2");
    assert_eq!(found["findings"][0]["table"]["columns"][4], "AUROC of entropy, z");
    desk.assert_refused("app uncertainty --data @kinds.csv --unknown y,z", "1 classes are left to know");
    desk.json("app prune --data @kinds.csv --steps 2 --fine-tune 1 --removed 0.5");
    desk.write("kind.csv", "label,round,long\nz,1,0\nx,0,1\ny,1,1\n");
    desk.json("app zeroshot --data @kinds.csv --attributes @kind.csv --unseen z --steps 2");
    desk.assert_refused("app zeroshot --data @kinds.csv --unseen z", "--data needs --attributes");
    desk.assert_refused("app zeroshot --data @kinds.csv --attributes @kind.csv --unseen w", "no class \"w\"");
    desk.write("worlds.csv", "angle\n10\n-30\n");
    desk.json("app rl --world reacher --steps 1 --worlds @worlds.csv");
    desk.assert_refused("app rl --worlds @worlds.csv", "has no column \"half_length\"");

    desk.write("strokes.csv", "round,long\n1,0\n0,1\n");
    desk.assert_refused("app zeroshot --attributes @strokes.csv", "attributes of 2 classes, must be 10");
    desk.json("app transfer --angles 0,90 --held-out 1 --labelled 5 --steps 5");
    let found = desk.json("app rl --world reacher --steps 1 --test-worlds 2");
    assert_eq!(found["findings"][0]["table"]["rows"].as_array().unwrap().len(), 2);
    desk.json("app prune --steps 2 --fine-tune 1 --removed 0.9");
    desk.assert_refused("app prune --removed 1", "the share 1 of units to remove is not between 0 and 1");
    desk.assert_refused("app rl --test-worlds 0", "at least one world");
    desk.assert_refused("app transfer --held-out 4", "cannot be held out of 4");
    desk.assert_refused("app uncertainty --samples 0", "at least one draw");
    desk.assert_refused("app continual --task-pairs 0/1,2", "no list of tasks");
}

#[test]
fn texts_of_ones_own_are_read_from_tables_and_json_lines() {
    let desk = desk();
    let mut table = "text,label\n".to_string();
    let mut lines = String::new();
    for i in 0..20 {
        let (word, label) = [("fine", "yes"), ("poor", "no")][i % 2];
        table += &format!("\"a {word} thing, number {i}\",{label}\n");
        lines += &format!("{{\"text\": \"where is {word} {i}\", \"label\": {}}}\n", i % 2);
    }
    desk.write("reviews.csv", table);
    desk.write("questions.jsonl", &lines);
    let line = "app nlp --encoder-steps 2 --steps 2";
    let found = desk.json(&format!("{line} --data @reviews.csv --data @questions.jsonl"));
    let columns = &found["findings"][0]["table"]["columns"];
    assert_eq!((&columns[2], &columns[3]), (&Value::from("reviews"), &Value::from("questions")));
    desk.assert_refused(&format!("{line} --data @reviews.csv"), "at least two tasks");
    desk.write("bad.jsonl", lines.replacen("\"label\": 1", "\"class\": 1", 1));
    desk.assert_refused(
        &format!("{line} --data @bad.jsonl --data @reviews.csv"),
        "row 2: has nothing in \"label\"",
    );
    desk.write("few.csv", "text,label\na,x\nb,x\nc,x\nd,x\ne,y\n");
    desk.assert_refused(&format!("{line} --data @few.csv --data @reviews.csv"), "the class \"y\" has 1 rows");
    desk.write("short.txt", "to be or not");
    desk.assert_refused("app hyperlstm --data @short.txt", "has 12 bytes, needs at least 2000");
    desk.write("long.txt", "to be or not to be, ".repeat(150));
    let found = desk.json("app hyperlstm --data @long.txt --steps 1 --hidden 4 --small 2 --out @plots");
    assert_eq!(found["findings"][0]["table"]["rows"].as_array().unwrap().len(), 2);
}

#[test]
fn images_are_rows_of_pixels() {
    let desk = desk();
    let mut file = TensorFile::new();
    let pixels: Vec<i64> = (0..8 * 4).map(|i| (i * 37) % 256).collect();
    file.insert("x", HostTensor::int([8, 2, 2], pixels));
    file.insert("y", HostTensor::int([8], vec![0, 1, 0, 1, 0, 1, 0, 1]));
    write_npz(&desk.path("images.npz"), &file).unwrap();
    let options = TINY.replace("mlp:2-4-2", "mlp:4-4-2") + " --cond noise";
    desk.json(&format!("train --data @images.npz {options} --out @m"));
    assert_eq!(desk.json("eval --model @m --data @images.npz")["rows"], 8);
    // As an IDX pair.
    let idx = |code: u8, extents: &[u32], bytes: &[u8]| {
        let mut all = vec![0, 0, code, extents.len() as u8];
        extents.iter().for_each(|extent| all.extend(extent.to_be_bytes()));
        [&all[..], bytes].concat()
    };
    let bytes: Vec<u8> = (0..8 * 4).map(|i| ((i * 37) % 256) as u8).collect();
    desk.write("a-images-idx3-ubyte", idx(8, &[8, 2, 2], &bytes));
    desk.write("a-labels-idx1-ubyte", idx(8, &[8], &[0, 1, 0, 1, 0, 1, 0, 1]));
    desk.json(&format!("train --data @a-images-idx3-ubyte {options} --out @i"));
    desk.assert_refused(
        &format!("train --data @a-images-idx3-ubyte {} --out @t", options.replace("noise", "task")),
        "have neither tasks nor descriptors",
    );
}

#[test]
fn all_cells_of_the_table_can_be_made_and_advice_is_given() {
    let desk = desk();
    let table = desk.json("table --target mlp:6-5-3 --hidden 4 --out @cells.csv");
    assert_eq!(table["rows"].as_array().unwrap().len(), 64);
    assert_eq!(fs::read_to_string(desk.path("cells.csv")).unwrap().lines().count(), 65);
    let advice = desk.json("advise --tasks 20 --samples 50 --params 19210");
    assert_eq!((&advice["conditioning"], &advice["scheme"]), (&Value::from("task"), &Value::from("chunk")));
    desk.write("net.json", "{\"input\": [1, 4, 4], \"layers\": [{\"conv\": {\"channels\": 2, \"kernel\": 3}}, \"relu\", {\"linear\": {\"outputs\": 3}}]}");
    desk.json("table --target @net.json");
    desk.write(
        "wide.json",
        "{\"input\": [1, 4, 4], \"layers\": [{\"conv\": {\"channels\": 2, \"kernel\": 9}}]}",
    );
    desk.assert_refused("table --target @wide.json", "is larger than the image, 4 x 4");
}

#[test]
fn data_that_cannot_be_used_are_named_with_their_row() {
    let desk = desk_with_rows();
    desk.write("nan.csv", "a,b,task,label\n1,2,x,0\n1,nan,x,1\n");
    desk.write("word.csv", "a,b,task,label\n1,two,x,0\n1,3,x,1\n");
    desk.write("one.csv", "a,b,task,label\n1,2,x,0\n1,2,x,0\n");
    desk.write("empty.csv", "a,b,task,label\n");
    for (line, words) in [
        ("--data @nan.csv", "row 2: column \"b\" has no value"),
        ("--data @word.csv", "row 1: \"two\" in column \"b\" is not a finite number"),
        ("--data @one.csv", "has 1 classes, needs at least two"),
        ("--data @empty.csv", "empty.csv"),
        ("--data @none.csv", "none.csv"),
        ("--data @rows.idx", "rows.idx"),
        (
            "--data @rows.csv --task-col who",
            "has no column \"who\"; its columns are a, b, writer, dose, label",
        ),
        ("--data @rows.csv --task-col writer", "the target takes 2 numbers, the data have 3 features"),
        ("--data @rows.csv --cond given", "--cond given needs --cond-cols"),
        ("--data @rows.csv --cond-cols dose", "--cond-cols needs --cond given"),
        (
            "--data @rows.csv --task-col writer --cond task,given --cond-cols dose --predict fc9.*",
            "no parameter matches",
        ),
    ] {
        desk.assert_refused(&format!("train {line} {TINY} --out @m"), words);
        assert!(!desk.path("m").exists(), "{line} left a model behind");
    }
    let zero = TINY.replace("--chunk 8", "--chunk 0");
    let given = "--data @rows.csv --cond task,given --task-col writer --cond-cols dose";
    desk.assert_refused(&format!("train {given} {zero} --out @m"), "a chunk must hold at least one number");
    desk.json(&format!("train {given} {TINY} --out @m"));
    desk.assert_refused(&format!("train {given} {TINY} --out @m"), "already holds a training run");
    desk.write("dora.csv", "a,b,writer,dose,label\n1,2,dora,1,yes\n");
    desk.assert_refused(
        "eval --model @m --data @dora.csv",
        "row 1: the task \"dora\" is unknown; the model knows anna, ben",
    );
    desk.assert_refused(
        "predict --model @m --data @rows.csv --samples 0 --out @p.csv",
        "--samples must be at least 1",
    );
    desk.assert_refused(
        "generate --model @m --task anna --to @w.safetensors",
        "--given has 0 numbers, needs 1",
    );
    desk.write("short.csv", "a,writer,dose,label\n1,anna,1,yes\n");
    desk.assert_refused("eval --model @m --data @short.csv", "has no column \"b\"; its columns are a");
    let config = fs::read_to_string(desk.path("m/config.json")).unwrap();
    fs::write(desk.path("m/config.json"), config.replace("\"yes\"", "\"yes\", \"maybe\"")).unwrap();
    desk.assert_refused(
        "eval --model @m --data @rows.csv",
        "config.json: the target has 2 outputs, the data have 3 classes",
    );
}

#[test]
fn an_npz_file_is_read_like_a_table() {
    let desk = desk();
    let mut file = TensorFile::new();
    file.insert(
        "x",
        HostTensor::float([6, 2], vec![0.0, 1.0, 1.0, 0.0, 0.5, 1.0, 1.0, 1.0, 0.0, 0.0, 0.2, 0.1]),
    );
    file.insert("y", HostTensor::int([6], vec![0, 1, 0, 1, 0, 1]));
    file.insert("task", HostTensor::int([6], vec![3, 3, 10, 10, 3, 10]));
    write_npz(&desk.path("rows.npz"), &file).unwrap();
    desk.json(&format!("train --data @rows.npz {TINY} --out @m"));
    let tasks = desk.json("eval --model @m --data @rows.npz")["tasks"].clone();
    assert_eq!((&tasks[0]["task"], &tasks[1]["task"]), (&Value::from("3"), &Value::from("10")));
    file.insert("y", HostTensor::int([5], vec![0, 1, 0, 1, 0]));
    write_npz(&desk.path("bad.npz"), &file).unwrap();
    desk.assert_refused(
        "eval --model @m --data @bad.npz",
        "\"y\" has the shape [5], must be 6 whole numbers",
    );
}

#[test]
fn the_experiment_reports_every_claim_and_a_model_is_captured() {
    let desk = desk_with_rows();
    let report = Hypernet.experiment(Scale::Smoke, &desk.cx).unwrap();
    assert_eq!(report.claims.len(), 17);
    assert_eq!(report.tables.len(), 12);
    desk.json(&format!(
        "train --data @rows.csv --cond task --task-col writer --target mlp:3-4-2 {} --out @t",
        TINY.trim_start_matches("--target mlp:2-4-2")
    ));
    let network = Hypernet.network(&desk.path("t"), &desk.cx).unwrap();
    assert_eq!(network.outputs()[0].shape, [2, 1, 2]);
    let x = burn::tensor::Tensor::<2>::zeros([1, 3], &desk.cx.device).into_dispatch();
    assert_eq!(network.forward(vec![x]).len(), 1);
}
