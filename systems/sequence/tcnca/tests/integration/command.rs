//! The verbs of `kiln tcnca`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::PathBuf;

use kiln_core::testing::Desk;
use kiln_core::{HostTensor, System, TensorFile};
use kiln_data::write_npz;
use kiln_tcnca::Tcnca;

/// Options of a model that trains in milliseconds.
const TINY: &str = "--dim 8 --layers 1 --z-dim 4 --h-dim 8 --ffn-dim 8 --kernel 3 --dilation 2 --blocks 2 --chunk 8 \
                    --batch 4 --steps 4 --warmup 1 --eval-every 2";

#[test]
fn a_language_model_is_trained_resumed_scored_and_continued() {
    let desk = Desk::new(&Tcnca);
    desk.write("a.txt", "to be or not to be. ".repeat(40));
    let trained = desk.json(&format!("train --task lm --text @a.txt --seq-len 16 {TINY} --out @m"));
    assert_eq!(trained["steps"], 4);
    assert!(trained["test"]["bits_per_byte"].as_f64().unwrap() > 0.0, "{trained}");
    assert!(desk.path("m/loss.svg").exists());

    // Four steps and two more.
    desk.json("train --text @a.txt --resume @m --steps 6");
    let steps =
        |model: &str| fs::read_to_string(desk.path(model).join("train_log.csv")).unwrap().lines().count();
    assert_eq!(steps("m"), 7);
    let score = |model: &str, mode: &str| desk.json(&format!("eval --model @{model} --text @a.txt {mode}"));
    let stream = score("m", "--mode stream");
    assert_eq!(stream["bytes"], 799);
    // Windows of the whole text know as much as a stream.
    let window = score("m", "--mode context --context 799");
    let apart = window["nll_nats"].as_f64().unwrap() - stream["nll_nats"].as_f64().unwrap();
    assert!(apart.abs() < 1e-5, "{window} {stream}");

    desk.json("logits --model @m --text @a.txt --out @logits.safetensors");
    let logits = TensorFile::read(&desk.path("logits.safetensors")).unwrap();
    assert_eq!(logits.get("logits").unwrap().shape, [1, 800, 256]);
    let text = desk.json("generate --model @m --prompt to --max-tokens 5");
    assert_eq!(text["ids"].as_array().unwrap().len(), 5);
}

#[test]
fn a_saved_state_goes_on_as_if_nothing_had_happened() {
    let desk = Desk::new(&Tcnca);
    desk.write("a.txt", "to be or not to be. ".repeat(40));
    for (model, options) in
        [("m", "--mixer tcn"), ("e", "--mixer ema --ema-truncation 9 --variant simplified")]
    {
        desk.json(&format!("train --text @a.txt --seq-len 16 {TINY} {options} --out @{model}"));
        let start = format!("generate --model @{model} --greedy --prompt tobeornot");
        let whole = desk.json(&format!("{start} --max-tokens 12"))["ids"].clone();
        for first in [0, 5] {
            let begun = desk.json(&format!("{start} --max-tokens {first} --state-out @state"))["ids"].clone();
            let rest = desk.json(&format!(
                "generate --model @{model} --greedy --state-in @state --max-tokens {}",
                12 - first
            ));
            let joined =
                [begun.as_array().unwrap().clone(), rest["ids"].as_array().unwrap().clone()].concat();
            assert_eq!(&joined, whole.as_array().unwrap(), "{options}, {first}");
        }
    }
    let state = TensorFile::read(&desk.path("state")).unwrap();
    assert_eq!(state.get("layers.0.ema.past").unwrap().shape, [1, 9, 8]);
    desk.assert_refused("generate --model @m --state-in @state", "the state was saved with another model");
    desk.assert_refused("generate --model @m --state-in @a.txt", "safetensors format");
}

#[test]
fn golden_logits_come_out_of_the_command() {
    let desk = Desk::new(&Tcnca);
    desk.json("logits --model %model_full --ids %model_full/io.safetensors --out @l.npz");
    let found = kiln_data::read_npz(&desk.path("l.npz")).unwrap();
    let io = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/model_full/io.safetensors");
    let expected = TensorFile::read(&PathBuf::from(io)).unwrap();
    let [found, expected] =
        [&found, &expected].map(|file| file.get("logits").unwrap().as_floats().unwrap().to_vec());
    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-3));
}

#[test]
fn every_format_of_sequences_is_trained_on_predicted_and_scored() {
    let desk = Desk::new(&Tcnca);
    let rows = |line: fn(usize) -> String| (0..24).map(line).collect::<String>();
    desk.write(
        "t.csv",
        format!(
            "text,label\n{}",
            rows(|i| format!("\"word {}\",{}\n", "ab".repeat(i % 5 + 1), ["no", "yes"][i % 2]))
        ),
    );
    desk.write("n.csv", format!("a,b,c,label\n{}", rows(|i| format!("{i},{},1,{}\n", i * i, i % 3))));
    desk.write("k.jsonl", rows(|i| format!("{{\"tokens\": [{}, 7, \"x\"], \"label\": {}}}\n", i % 4, i % 2)));
    desk.write(
        "v.jsonl",
        rows(|i| format!("{{\"values\": [[{i}, 1.5], [0, 2]], \"label\": \"c{}\"}}\n", i % 2)),
    );
    let mut arrays = TensorFile::new();
    let values: Vec<f32> = (0..24 * 10).map(|i| (i as f32).sin()).collect();
    arrays.insert("x", HostTensor::float([24, 5, 2], values));
    arrays.insert("y", HostTensor::int([24], (0..24).map(|i| i % 2).collect()));
    write_npz(&desk.path("a.npz"), &arrays).unwrap();
    for i in 0..24u8 {
        let folder = desk.path("pictures").join(["cat", "dog"][usize::from(i % 2)]);
        fs::create_dir_all(&folder).unwrap();
        let picture = image::RgbImage::from_fn(3, 2, |x, y| image::Rgb([i * 9, x as u8 * 40, y as u8]));
        picture.save(folder.join(format!("{i}.png"))).unwrap();
    }
    for (name, options) in [
        ("t.csv", "--class-weights"),
        ("t.csv", "--tokens word --causal --truncate --max-len 2"),
        ("n.csv", "--variant simplified"),
        ("k.jsonl", "--mixer ema --attention laplace"),
        ("v.jsonl", "--bias simple --tcn-conv full"),
        ("a.npz", "--causal --patience 9"),
        ("pictures", "--mixer ema --variant full"),
    ] {
        let folder = format!("m{}", options.len());
        let trained =
            desk.json(&format!("train --task classify --data @{name} {options} {TINY} --out @{folder}"));
        assert!(trained["validation"]["accuracy"].is_number(), "{trained}");
        assert!(desk.path(&format!("{folder}/confusion.svg")).exists());
        let scores = desk.json(&format!("eval --model @{folder} --data @{name} --confusion @c.png"));
        assert_eq!(scores["sequences"], 24);
        desk.json(&format!("predict --model @{folder} --data @{name} --out @p.csv"));
        let written = fs::read_to_string(desk.path("p.csv")).unwrap();
        assert_eq!(written.lines().count(), 25, "{written}");
        assert!(written.starts_with("row,label,p_"), "{written}");
        if options == "--causal --patience 9" {
            desk.json(&format!("predict --model @{folder} --data @{name} --mode stream --out @s.csv"));
            let streamed = fs::read_to_string(desk.path("s.csv")).unwrap();
            let numbers = |text: &str| -> Vec<f64> {
                text.split([',', '\n']).filter_map(|cell| cell.parse().ok()).collect()
            };
            let (streamed, whole) = (numbers(&streamed), numbers(&written));
            assert!(streamed.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-5), "{streamed:?} {whole:?}");
        }
    }
}

#[test]
fn listops_and_recall_are_made_learned_and_scored() {
    let desk = Desk::new(&Tcnca);
    let shape = "--min-len 10 --max-len 30 --max-depth 3 --max-args 4";
    desk.json(&format!("listops --n 30 {shape} --out @l.csv"));
    let first = fs::read(desk.path("l.csv")).unwrap();
    desk.json(&format!("listops --n 30 {shape} --out @l.csv"));
    assert_eq!(first, fs::read(desk.path("l.csv")).unwrap());
    assert_eq!(desk.cx.take_printed(), "");
    let mut matches = Tcnca.command().get_matches_from(["tcnca", "listops", "--solve", "[SM 9 [MED 1 4 ] ]"]);
    Tcnca.execute(&matches, &desk.cx).unwrap();
    assert!(desk.cx.take_printed().contains("\"value\": 1"));
    matches = Tcnca.command().get_matches_from(["tcnca", "listops", "--solve", "[SM 9 ( ]"]);
    let error = Tcnca.execute(&matches, &desk.cx).unwrap_err().to_string();
    assert!(error.contains("symbol 3 is \"(\""), "{error}");
    desk.json(&format!("train --task listops --data @l.csv {TINY} --out @l"));

    desk.json("recall-data --n 20 --length 8 --values 3 --out @r.jsonl");
    let trained = desk.json(&format!("train --task recall --seq-len 8 --values 3 {TINY} --out @r"));
    assert!(trained["accuracy"].as_f64().unwrap() <= 1.0);
    let scored = desk.json("eval --model @r --data @r.jsonl");
    assert_eq!(scored["sequences"], 20);
}

#[test]
fn plans_timings_and_operators_run_on_their_own() {
    let desk = Desk::new(&Tcnca);
    let plans = desk.json("plan --context 500 --dim 16");
    assert!(plans.as_array().unwrap().iter().all(|plan| plan["receptive_field"].as_u64().unwrap() >= 500));
    desk.json("bench --lengths 64,100 --dim 8 --blocks 2 --out @speed.csv");
    assert_eq!(fs::read_to_string(desk.path("speed.csv")).unwrap().lines().count(), 3);
    assert!(desk.path("speed.svg").exists());

    desk.json("op --kind conv --dilation 9 --in %dilated_conv.safetensors --out @y.safetensors");
    desk.json("op --kind ema --bidirectional --in %mega_ema_bidir_d5n2_l33.safetensors --out @e.safetensors");
    for (file, golden, names) in [
        ("y.safetensors", "dilated_conv.safetensors", &[("y", "y_dil9")][..]),
        ("e.safetensors", "mega_ema_bidir_d5n2_l33.safetensors", &[("y", "y"), ("dx", "dx")]),
    ] {
        let found = TensorFile::read(&desk.path(file)).unwrap();
        let golden = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data")).join(golden);
        let golden = TensorFile::read(&golden).unwrap();
        for (name, expected) in names {
            let pairs = found.get(name).unwrap().as_floats().unwrap().iter();
            let pairs = pairs.zip(golden.get(expected).unwrap().as_floats().unwrap());
            assert!(pairs.clone().all(|(a, b)| (a - b).abs() < 1e-4), "{file}: {name}");
        }
    }
}

#[test]
fn bad_input_is_named_and_leaves_nothing_behind() {
    let desk = Desk::new(&Tcnca);
    desk.write("short.txt", "too short");
    desk.write("text.txt", "some text. ".repeat(50));
    desk.write("empty.csv", "text,label\n\"\",a\nb,b\n");
    desk.write("words.csv", "other,label\nx,a\ny,b\n");
    desk.write("unlabelled.csv", "text,label\nx,a\ny,\n");
    desk.write("one.csv", "text,label\nx,a\n");
    desk.write("same.csv", "text,label\nx,a\ny,a\n");
    desk.write("broken.jsonl", "{\"text\": \"x\", \"label\": 1}\n{\"text\": ");
    desk.write("uneven.jsonl", "{\"values\": [[1, 2], [3]], \"label\": 1}\n");
    desk.write("good.csv", format!("text,label\n{}", "abc,no\nde,yes\n".repeat(6)));
    let train = |options: &str| format!("train --task classify {TINY} --out @x {options}");
    for (line, words) in [
        (
            format!("train --task lm --text @short.txt --seq-len 64 {TINY} --out @x"),
            "has 9 tokens, but at least 73",
        ),
        (format!("train --task lm {TINY} --out @x"), "--text is needed"),
        (train(""), "--data is needed"),
        (train("--data @missing.csv"), "cannot read"),
        (train("--data @text.txt"), "neither .csv, .jsonl, .npz nor a folder"),
        (train("--data @empty.csv"), "row 1: is empty"),
        (train("--data @words.csv"), "column \"other\" is \"x\", not a number"),
        (train("--data @unlabelled.csv"), "row 2: has no label"),
        (train("--data @one.csv"), "holds one sequence"),
        (train("--data @same.csv"), "at least two classes"),
        (train("--data @broken.jsonl"), "line 2: is not valid JSON"),
        (train("--data @uneven.jsonl"), "lists of equally many"),
        (train("--data @good.csv --max-len 2"), "has 3 steps, more than --max-len 2"),
        (train("--data @good.csv").replace("--kernel 3", "--kernel 4"), "the kernel 4 is even"),
        (train("--data @good.csv").replace("--blocks 2", "--blocks 60"), "reach too far"),
        (train("--data @good.csv").replace("--dilation 2", "--dilation 0"), "dilation is 0"),
        (train("--data @good.csv").replace("--chunk 8", "--chunk=-1"), "invalid value '-1'"),
        (
            train("--data @good.csv --bias simple").replace("--chunk 8", "--chunk 0"),
            "chunks of a given length",
        ),
        (train("--data @good.csv").replace("--z-dim 4", "--z-dim 3"), "even z width"),
        (train("--data @good.csv --mixer tcn,ema"), "2 mixers do not fit 1 layers"),
        (train("--data @good.csv --mixer rnn"), "neither tcn nor ema"),
        (train("--data @good.csv --dropout 1"), "not in [0, 1)"),
        (train("--data @good.csv --max-len 9999999"), "--batch 4 of --max-len 9999999 is too large"),
        ("train --text @text.txt --resume @x".into(), "only a folder that `kiln tcnca train` wrote"),
        (format!("train --task recall --seq-len 7 {TINY} --out @x"), "come in pairs"),
        ("plan --context 100000 --dim 8 --budget 10".into(), "within the budget"),
        ("bench --lengths 0 --dim 8".into(), "at least 1"),
        ("op --kind ema --in %dilated_conv.safetensors --out @o.npz".into(), "\"delta\""),
        ("op --kind conv --in @text.txt --out @o.npz".into(), "neither in .npz nor in .safetensors"),
        ("eval --model %model_full --data @good.csv".into(), "give --text"),
        ("predict --model %model_full --data @good.csv --out @p.csv".into(), "is a language model"),
        ("generate --model @nowhere --prompt a".into(), "cannot read"),
        ("listops --n 3 --min-len 9 --max-len 3 --out @l.csv".into(), "no list has 9 to 3"),
    ] {
        desk.assert_refused(&line, words);
        assert!(!desk.path("x").exists() && !desk.path("o.npz").exists(), "{line} left something behind");
    }

    // Against a trained model.
    desk.json(&train("--data @good.csv").replace("@x", "@c"));
    desk.write("strange.csv", "text,label\nabc,maybe\n");
    desk.assert_refused(
        "eval --model @c --data @strange.csv",
        "label \"maybe\", which the model does not know",
    );
    desk.assert_refused("eval --model @c --text @text.txt", "give --data");
    desk.assert_refused(
        "predict --model @c --data @good.csv --mode stream --out @p.csv",
        "train with --causal",
    );
    desk.assert_refused("logits --model @c --text @text.txt --out @l.npz", "is a classifier");
    desk.assert_refused(&train("--data @good.csv").replace("@x", "@c"), "already holds a training run");
    let config = fs::read_to_string(desk.path("c/config.json")).unwrap();
    desk.write("c/config.json", config.replace("\"classes\": 2", "\"classes\": 5"));
    desk.assert_refused("eval --model @c --data @good.csv", "do not fit together");
    desk.write("c/config.json", config.replace("\"layers\": 1", "\"layers\": 2"));
    desk.assert_refused("eval --model @c --data @good.csv", "layers.1");
    desk.write("c/config.json", config.replace("\"kernel\": 3", "\"kernel\": 9999999999999"));
    desk.assert_refused("eval --model @c --data @good.csv", "config.json");
}
