//! The verbs of `kiln gla`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use burn::tensor::Tensor;
use half::{bf16, f16};
use kiln_core::testing::Desk;
use kiln_core::{ErrorKind, HostTensor, ModelFolder, OutputMode, Result, TensorFile};
use kiln_data::{Corpus, Tokenizer};
use kiln_gla::training::LanguageTask;
use kiln_gla::{Gla, Lm, checkpoint};
use kiln_nn::{Outcome, Task, TrainConfig, train};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};

/// Options of a model that trains in milliseconds.
const TINY: &str = "--d-model 16 --layers 1 --heads 2 --seq-len 32 --batch 2 --warmup 2";

fn desk() -> Desk {
    Desk::new(&Gla)
}

/// A desk on which lies `text.txt` with `bytes` bytes of text.
fn desk_with_text(bytes: usize) -> Desk {
    let desk = desk();
    desk.write("text.txt", b"the cat sat on the mat; ".repeat(bytes.div_ceil(24)).split_at(bytes).0);
    desk
}

fn tensors(desk: &Desk, name: &str) -> TensorFile {
    TensorFile::read(&desk.path(name)).unwrap()
}

/// A copy of the golden model of newer layout with `config.json` changed.
fn golden_copy(desk: &Desk, name: &str, change: impl FnOnce(&mut Map<String, Value>)) -> ModelFolder {
    let folder = ModelFolder::new(desk.path(name));
    folder.create().unwrap();
    let text = fs::read_to_string(golden("model_split_mlp/config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    change(&mut config);
    fs::write(folder.file("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
    fs::copy(golden("model_split_mlp/model.safetensors"), folder.file("model.safetensors")).unwrap();
    folder
}

/// The logits of a model folder on the golden ids.
fn golden_logits(desk: &Desk, model: &str) -> HostTensor {
    desk.run(&format!("logits --model {model} --ids %model_fused_mlp/io.safetensors --out @l.safetensors"))
        .unwrap();
    desk.cx.take_printed();
    tensors(desk, "l.safetensors").take("logits").unwrap()
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(name)
}

fn ids(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

/// Largest difference of two float tensors of one shape.
fn difference(a: &HostTensor, b: &HostTensor) -> f32 {
    assert_eq!(a.shape, b.shape);
    let pairs = a.as_floats().unwrap().iter().zip(b.as_floats().unwrap());
    pairs.map(|(a, b)| (a - b).abs()).fold(0.0, |worst, d| if d > worst || d.is_nan() { d } else { worst })
}

// Training.

#[test]
fn training_writes_a_model_its_log_and_what_resuming_needs() {
    let mut desk = desk_with_text(600);
    let result = desk.json(&format!("train --text @text.txt --out @m --steps 4 --eval-every 2 {TINY}"));
    assert_eq!(result["steps"], 4);
    assert!(result["best_val_loss"].as_f64().unwrap() < 6.0);
    let config = ModelFolder::new(desk.path("m")).config_value().unwrap();
    assert_eq!((&config["kind"], &config["model_type"]), (&json!("gla"), &json!("gla")));
    assert_eq!(config["hidden_size"], 16);
    let read = |name: &str| fs::read_to_string(desk.path("m").join(name)).unwrap();
    let log = read("train_log.csv");
    assert!(log.starts_with("step,tokens,loss,val_loss,lr,grad_norm,seconds\n1,64,"));
    assert_eq!(log.lines().count(), 5);
    assert_eq!(serde_json::from_str::<Value>(&read("train.json")).unwrap()["seq_len"], 32);
    assert!(read("loss.svg").contains("</svg>") && read("memory.svg").contains("</svg>"));
    assert!(desk.path("m/model.safetensors").exists() && !desk.path("m/tokenizer.json").exists());

    desk.cx.seed = 1;
    desk.run(&format!("train --text @text.txt --out @n --steps 4 --eval-every 2 {TINY}")).unwrap();
    desk.cx.take_printed();
    let weights = |name: &str| fs::read(desk.path(name).join("model.safetensors")).unwrap();
    assert_ne!(weights("m"), weights("n"));
}

#[test]
fn every_architecture_trains_scores_and_writes() {
    let desk = desk_with_text(600);
    for arch in ["gla", "llama", "mamba", "retnet", "linear"] {
        desk.json(&format!("train --arch {arch} --text @text.txt --out @{arch} --steps 2 {TINY}"));
        let score = desk.json(&format!("eval --model @{arch} --text @text.txt"));
        assert_eq!(score["tokens_scored"], 599);
        let words = format!("generate --model @{arch} --prompt the --greedy --max-tokens 3");
        assert_eq!(desk.json(&words)["ids"].as_array().unwrap().len(), 3);
        let info = desk.json(&format!("info --model @{arch} --text @text.txt"));
        assert_eq!((info["kind"].as_str(), info["arch"].as_str()), (Some("gla"), Some(arch)));
        assert!(info["parameters"].as_u64().unwrap() > 8000);
    }
}

/// The task of `kiln gla train`, at which somebody presses Ctrl-C in step `after`.
struct Interrupted<'a> {
    task: LanguageTask<'a>,
    after: usize,
}

impl Task<Lm> for Interrupted<'_> {
    fn loss(&mut self, model: &Lm, step: usize) -> Result<(Tensor<1>, usize)> {
        if step + 1 == self.after {
            self.task.cx.interrupt_flag().store(true, Ordering::Relaxed);
        }
        self.task.loss(model, step)
    }

    fn validate(&mut self, model: &Lm) -> Result<f64> {
        self.task.validate(model)
    }

    fn settings(&self) -> Map<String, Value> {
        Task::<Lm>::settings(&self.task)
    }
}

#[test]
fn an_interrupted_run_resumes_to_the_result_of_an_uninterrupted_one() {
    let desk = desk_with_text(600);
    let options = format!("--text @text.txt --valid @text.txt --steps 9 --eval-every 3 --lr 0.001 {TINY}");
    desk.json(&format!("train --out @whole {options}"));

    // Ctrl-C before the first step …
    desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
    let error = desk.run(&format!("train --out @parts {options}")).unwrap_err();
    assert_eq!((error.kind(), error.exit_code()), (ErrorKind::Interrupted, 130));
    assert!(error.hint_text().unwrap().contains("--resume"));
    // … and again in step 4 …
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    let folder = ModelFolder::new(desk.path("parts"));
    let corpus = Corpus::read(&desk.path("text.txt"), &Tokenizer::Byte).unwrap();
    let task = LanguageTask { train: &corpus, valid: &corpus, seq_len: 32, batch: 2, cx: &desk.cx };
    let config =
        TrainConfig { steps: 9, warmup: 2, eval_every: 3, checkpoint_every: 3, ..Default::default() };
    let model = checkpoint::read_config(&folder).unwrap().init(&desk.cx);
    let mut task = Interrupted { task, after: 4 };
    let trained = train(model, &mut task, &config, Some(&folder), true, &desk.cx).unwrap();
    assert_eq!((trained.outcome, trained.log.len()), (Outcome::Interrupted, 4));
    // … and then nothing more.
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    assert_eq!(desk.json("train --text @text.txt --valid @text.txt --resume @parts")["steps"], 9);

    let weights = |run: &str| fs::read(desk.path(run).join("model.safetensors")).unwrap();
    assert_eq!(weights("whole"), weights("parts"));
    let (whole, parts) =
        (tensors(&desk, "whole/checkpoint.safetensors"), tensors(&desk, "parts/checkpoint.safetensors"));
    assert!(whole.names().eq(parts.names()));
    assert!(whole.names().all(|name| whole.get(name) == parts.get(name)));

    // A finished run may go on longer; what shaped it may not change.
    let longer = desk.json("train --text @text.txt --valid @text.txt --resume @parts --steps 10");
    assert_eq!(longer["steps"], 10);
    desk.assert_refused("train --text @text.txt --resume @parts --lr 0.1", "cannot be used with");
    fs::write(desk.path("other.txt"), vec![b'a'; 700]).unwrap();
    let refusal = desk.refusal("train --text @other.txt --valid @text.txt --resume @parts --steps 12");
    assert!(refusal.contains("train_tokens = 600, not 700"), "{refusal}");
    desk.assert_refused(
        "train --text @text.txt --resume @nowhere",
        "only a folder that `kiln gla train` wrote",
    );
}

#[test]
fn training_can_start_from_a_trained_model_and_with_a_tokenizer() {
    let desk = desk_with_text(600);
    let tokenizer = json!({
        "version": "1.0",
        "pre_tokenizer": { "type": "Whitespace" },
        "model": {
            "type": "WordLevel", "unk_token": "?",
            "vocab": { "?": 0, "the": 1, "cat": 2, "sat": 3, "on": 4, "mat": 5, ";": 6 },
        },
    });
    fs::write(desk.path("words.json"), tokenizer.to_string()).unwrap();
    desk.json(&format!("train --tokenizer @words.json --text @text.txt --out @m --steps 2 {TINY}"));
    assert_eq!(ModelFolder::new(desk.path("m")).config_value().unwrap()["vocab_size"], 7);
    let written = desk.json("generate --model @m --prompt cat --greedy --max-tokens 4");
    assert!(ids(&written["ids"]).iter().all(|&id| id < 7));
    // 600 bytes are 25 rounds of 7 words.
    let score = desk.json("eval --model @m --text @text.txt");
    assert_eq!(score["tokens_scored"], 174);
    desk.json(&format!(
        "train --init-from @m --tokenizer @words.json --text @text.txt --out @n --steps 1 {TINY}"
    ));

    let refusal = desk.refusal(&format!("train --init-from @m --text @text.txt --out @o --steps 1 {TINY}"));
    assert!(refusal.contains("text.txt: holds token id 116, the model's vocabulary has 7"), "{refusal}");
    fs::write(desk.path("latin1.txt"), b"caf\xe9".repeat(100)).unwrap();
    let refusal =
        desk.refusal(&format!("train --tokenizer @words.json --text @latin1.txt --out @o --steps 1 {TINY}"));
    assert!(refusal.contains("latin1.txt: text: is not UTF-8: byte 3 is 0xe9"), "{refusal}");
    assert!(!desk.path("o").exists(), "a refused run leaves no folder");
}

#[test]
fn any_bytes_are_text_for_the_byte_tokenizer() {
    let desk = desk();
    let bytes: Vec<u8> = (0..600u32).map(|i| (i * i % 251) as u8).collect();
    fs::write(desk.path("binary"), bytes).unwrap();
    desk.json(&format!("train --text @binary --out @m --steps 1 {TINY}"));
    assert_eq!(desk.json("eval --model @m --text @binary --window 50")["tokens_scored"], 599);
}

#[test]
fn training_refuses_what_cannot_work_before_it_writes() {
    let desk = desk_with_text(600);
    fs::write(desk.path("empty.txt"), "").unwrap();
    fs::write(desk.path("short.txt"), vec![b'a'; 40]).unwrap();
    for (options, words) in [
        ("--text @empty.txt", "empty.txt: holds no text"),
        ("--text @short.txt", "short.txt: has 40 tokens, but at least 66 are needed"),
        ("--text @text.txt --valid @empty.txt", "empty.txt: holds no text"),
        (
            "--text @text.txt --valid @short.txt --seq-len 50",
            "short.txt: has 40 tokens, but at least 51 are needed",
        ),
        ("--text @nowhere.txt", "cannot read"),
        ("--text @text.txt --heads 3", "3 heads do not divide the key width 8"),
        ("--text @text.txt --kv-heads 3", "3 key/value heads do not divide 2 heads"),
        ("--text @text.txt --chunk 60", "a chunk of 60 rows cannot be cut into sub-blocks of 16"),
        ("--text @text.txt --sub-chunk 0", "sub-blocks of 0"),
        ("--text @text.txt --arch llama --heads 3", "3 heads do not divide width 16"),
        ("--text @text.txt --steps 0", "0 steps"),
        ("--text @text.txt --lr nan", "the learning rate is NaN"),
        ("--text @text.txt --tau 0", "temperature tau is 0"),
        ("--text @text.txt --batch 0", "must be at least 1"),
        ("--text @text.txt --batch 1000000000000", "is too large; at most 16777216 tokens"),
        ("--text @text.txt --seq-len 18446744073709551615", "is too large; at most 16777216 tokens"),
        ("--text @text.txt --d-model 0", "must all be at least 1"),
        ("--text @text.txt --arch llama --layers 0", "must all be at least 1"),
        ("--text @text.txt --d-model 1000000000", "would have more than 4e18 parameters"),
        ("--text @text.txt --val-fraction 1", "--val-fraction 1 is not in [0, 1)"),
        ("--text @text.txt --val-fraction 0.99", "the training part of"),
        ("--text @text.txt --tokenizer @nowhere.json", "give \"byte\" or the path of a tokenizer.json"),
        ("--text @text.txt --tokenizer @text.txt", "is not a tokenizer in the Hugging Face format"),
        ("--text @text.txt --init-from @nowhere", "nowhere/config.json"),
        ("--text @text.txt --feature-map cosine", "expected relu, elu+1, silu or none"),
    ] {
        // No option may be given twice.
        let given = |option: &str| options.contains(option.split(' ').next().unwrap_or(option));
        let tiny = TINY.split("--").filter(|option| !option.is_empty() && !given(&format!("--{option}")));
        let tiny: String = tiny.map(|option| format!("--{option}")).collect();
        desk.assert_refused(&format!("train {options} --out @m {tiny}"), words);
        assert!(!desk.path("m").exists(), "{options}");
    }
    desk.assert_refused("train --text @text.txt", "--out");
}

#[test]
fn training_refuses_a_folder_in_use_and_one_that_cannot_be_made() {
    let desk = desk_with_text(600);
    desk.json(&format!("train --text @text.txt --out @m --steps 1 {TINY}"));
    let before = fs::read(desk.path("m/config.json")).unwrap();
    let again = format!("train --text @text.txt --out @m --steps 1 {TINY} --short-conv");
    desk.assert_refused(&again, "already holds a training run; continue it with --resume");
    assert_eq!(fs::read(desk.path("m/config.json")).unwrap(), before);
    desk.assert_refused(
        &format!("train --text @text.txt --out @text.txt/m --steps 1 {TINY}"),
        "cannot create",
    );
}

#[test]
fn a_loss_that_is_no_number_stops_training_and_keeps_the_last_good_checkpoint() {
    let desk = desk_with_text(600);
    let line = format!(
        "train --text @text.txt --out @m --steps 12 --eval-every 1 --checkpoint-every 1 --lr 1e30 --clip 0 {TINY}"
    );
    let error = desk.run(&line).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Work, "{error}");
    assert!(error.to_string().contains(" step "), "{error}");
    let kept = tensors(&desk, "m/checkpoint.safetensors");
    assert!(
        kept.names().all(|name| kept
            .get(name)
            .unwrap()
            .as_floats()
            .is_none_or(|v| v.iter().all(|x| x.is_finite())))
    );
}

// Scores, logits and text.

#[test]
fn eval_gives_the_golden_likelihood_whole_and_in_windows() {
    let desk = desk();
    let text = fs::read_to_string(golden("model_fused_mlp/expected.json")).unwrap();
    let expected =
        serde_json::from_str::<Value>(&text).unwrap()["mean_nll_nats_model_fused_mlp"].as_f64().unwrap();
    for options in ["", "--context 0", "--window 31", "--context 1000"] {
        let score = desk
            .json(&format!("eval --model %model_fused_mlp --ids %model_fused_mlp/io.safetensors {options}"));
        assert_eq!(score["tokens_scored"], 62);
        let nll = score["nll_nats"].as_f64().unwrap();
        assert!((nll - expected).abs() <= 1e-3, "{options}: {nll} against {expected}");
        assert!((score["perplexity"].as_f64().unwrap() - nll.exp()).abs() < 1e-6 * nll.exp());
        assert!((score["bits_per_byte"].as_f64().unwrap() - nll / 2f64.ln()).abs() < 1e-9);
    }
    let short = desk.json("eval --model %model_fused_mlp --ids %model_fused_mlp/io.safetensors --window 3");
    assert!((short["nll_nats"].as_f64().unwrap() - expected).abs() > 1e-3, "what is not in view has no say");
}

#[test]
fn eval_gives_a_row_for_every_context_length() {
    let desk = desk_with_text(400);
    let rows = desk.json("eval --model %model_split_mlp --text @text.txt --lengths 8,16,32");
    let contexts: Vec<u64> =
        rows.as_array().unwrap().iter().map(|row| row["context"].as_u64().unwrap()).collect();
    assert_eq!(contexts, [8, 16, 32]);
    // Twelve windows of 32 fit; the last 8 tokens of each are scored.
    assert!(
        rows.as_array().unwrap().iter().all(|row| row["tokens_scored"] == 96 && row["nll_nats"].is_number())
    );
    desk.assert_refused(
        "eval --model %model_split_mlp --text @text.txt --lengths 500",
        "at least 501 are needed",
    );
    desk.assert_refused("eval --model %model_split_mlp --text @text.txt --lengths 0", "must be at least 1");
    desk.assert_refused("eval --model %model_split_mlp --text @text.txt --window 0", "window is 0");
    let rows_of_ids = "eval --model %model_split_mlp --ids %model_split_mlp/io.safetensors --lengths 8";
    desk.assert_refused(rows_of_ids, "--lengths needs one text");
}

#[test]
fn logits_are_the_golden_ones_in_both_layouts() {
    let desk = desk();
    let reference =
        TensorFile::read(&golden("model_fused_mlp/io.safetensors")).unwrap().take("logits").unwrap();
    let fused = golden_logits(&desk, "%model_fused_mlp");
    assert!(difference(&fused, &reference) <= 2e-3);
    assert_eq!(fused, golden_logits(&desk, "%model_split_mlp"));

    fs::write(desk.path("abc"), "abc").unwrap();
    let told = desk.json("logits --model %model_split_mlp --text @abc --out @abc.safetensors");
    assert_eq!(told["logits"], json!([1, 3, 256]));
    assert_eq!(tensors(&desk, "abc.safetensors").get("logits").unwrap().shape, [1, 3, 256]);
}

#[test]
fn token_ids_must_be_tokens_of_the_model() {
    let desk = desk();
    let write = |name: &str, ids: HostTensor| {
        let mut file = TensorFile::new();
        file.insert("input_ids", ids);
        file.write(&desk.path(name)).unwrap();
    };
    write("high", HostTensor::int([1, 3], vec![1, 2, 256]));
    write("low", HostTensor::int([1, 2], vec![-1, 2]));
    write("flat", HostTensor::int([2], vec![1, 2]));
    write("floats", HostTensor::float([1, 2], vec![1.0, 2.0]));
    write("none", HostTensor::int([0, 2], vec![]));
    for (name, words) in [
        ("high", "token id 256 at 2 is outside the vocabulary of 256"),
        ("low", "token id -1 at 0"),
        ("flat", "has shape [2], expected integers [rows, time]"),
        ("floats", "expected integers [rows, time]"),
        ("none", "\"input_ids\" is empty"),
        ("nowhere", "cannot read"),
    ] {
        for verb in ["eval", "logits --out @l.safetensors"] {
            desk.assert_refused(&format!("{verb} --model %model_split_mlp --ids @{name}"), words);
        }
    }
    assert!(!desk.path("l.safetensors").exists());
    write("single", HostTensor::int([1, 1], vec![5]));
    desk.assert_refused("eval --model %model_split_mlp --ids @single", "at least 2 are needed");
    desk.assert_refused("eval --model %model_split_mlp --ids @single --text @single", "cannot be used with");
    desk.assert_refused("eval --model %model_split_mlp", "--text");
    let beyond = "logits --model %model_split_mlp --ids @single --out @single/l.safetensors";
    desk.assert_refused(beyond, "cannot write into");
}

#[test]
fn greedy_text_is_the_golden_one_in_one_go_and_with_a_saved_state() {
    let desk = desk();
    let mut io = TensorFile::read(&golden("model_fused_mlp/io.safetensors")).unwrap();
    let expected: Vec<u64> =
        io.take("greedy_ids").unwrap().as_ints().unwrap().iter().map(|&id| id as u64).collect();
    let bytes: Vec<u8> = expected.iter().map(|&id| id as u8).collect();
    let (prompt, continuation) = expected.split_at(32);
    fs::write(desk.path("prompt"), &bytes[..prompt.len()]).unwrap();
    let start = "generate --model %model_fused_mlp --greedy --prompt-file @prompt";
    assert_eq!(ids(&desk.json(&format!("{start} --max-tokens 24"))["ids"]), continuation);

    for first in [0, 1, 10] {
        let begun = desk.json(&format!("{start} --max-tokens {first} --state-out @state"));
        let rest = desk.json(&format!(
            "generate --model %model_fused_mlp --greedy --state-in @state --max-tokens {}",
            24 - first
        ));
        assert_eq!([ids(&begun["ids"]), ids(&rest["ids"])].concat(), continuation, "after {first} tokens");
    }

    // A prompt may be read in two halves, too.
    fs::write(desk.path("half"), &bytes[..20]).unwrap();
    fs::write(desk.path("rest"), &bytes[20..32]).unwrap();
    desk.json("generate --model %model_fused_mlp --prompt-file @half --max-tokens 0 --state-out @state");
    let rest = desk.json(
        "generate --model %model_fused_mlp --greedy --state-in @state --prompt-file @rest --max-tokens 24",
    );
    assert_eq!(ids(&rest["ids"]), continuation);
}

#[test]
fn the_state_of_short_convolutions_and_shared_heads_is_saved_too() {
    let desk = desk_with_text(600);
    let options = "--short-conv --kv-heads 1 --feature-map silu";
    desk.json(&format!("train --text @text.txt --out @m --steps 3 --lr 0.01 {options} {TINY}"));
    let start = "generate --model @m --greedy --prompt the";
    let whole = ids(&desk.json(&format!("{start} --max-tokens 12"))["ids"]);
    let begun = ids(&desk.json(&format!("{start} --max-tokens 5 --state-out @state"))["ids"]);
    let rest = ids(&desk.json("generate --model @m --greedy --state-in @state --max-tokens 7")["ids"]);
    assert_eq!([begun, rest].concat(), whole);

    let other = "generate --model %model_split_mlp --state-in @state";
    desk.assert_refused(
        other,
        "has floats of shape [1, 2, 4, 8], expected floats of the shape [1, 2, 12, 24]",
    );
    desk.assert_refused(
        "generate --model @m --state-in @text.txt",
        "is it a complete file in the safetensors format?",
    );
    desk.json(&format!("train --arch llama --text @text.txt --out @llama --steps 1 {TINY}"));
    desk.assert_refused(
        "generate --model @llama --prompt a --state-out @s",
        "grows with the text and is not kept",
    );
}

#[test]
fn generation_streams_stops_and_starts_from_a_line_break_when_nothing_is_given() {
    let mut desk = desk();
    let generate = "generate --model %model_split_mlp --greedy --max-tokens 12";
    let nothing = desk.json(generate);
    fs::write(desk.path("newline"), "\n").unwrap();
    assert_eq!(nothing, desk.json(&format!("{generate} --prompt-file @newline")));

    desk.cx.output = OutputMode::Quiet;
    let text = nothing["text"].as_str().unwrap();
    for stream in ["", "--stream"] {
        desk.run(&format!("{generate} {stream}")).unwrap();
        assert_eq!(desk.cx.take_printed(), format!("{text}\n"));
    }
    let stop = text.chars().skip(2).find(char::is_ascii_graphic).unwrap();
    let before = text.split(stop).next().unwrap();
    for stream in ["", "--stream"] {
        desk.run(&format!("{generate} --stop {stop} {stream}")).unwrap();
        assert_eq!(desk.cx.take_printed(), format!("{before}\n"));
    }
}

#[test]
fn sampling_repeats_with_the_seed_and_refuses_what_makes_no_sense() {
    let mut desk = desk();
    let line = "generate --model %model_split_mlp --prompt a --max-tokens 20 --temperature 2";
    let first = desk.json(line);
    assert_eq!(first, desk.json(line));
    desk.cx.seed = 5;
    assert_ne!(first, desk.json(line));
    for (options, words) in [
        ("--temperature 0", "the temperature is 0, but must be above 0"),
        ("--top-p 1.5", "top-p is 1.5"),
        ("--repetition-penalty=-1", "the repetition penalty is -1"),
        ("--prompt-file @nowhere", "cannot read"),
        ("--prompt a --prompt-file @nowhere", "cannot be used with"),
    ] {
        desk.assert_refused(&format!("generate --model %model_split_mlp {options}"), words);
    }
}

// Model folders.

#[test]
fn half_precision_checkpoints_give_the_logits_of_the_rounded_weights() {
    let desk = desk();
    let weights = TensorFile::read(&golden("model_split_mlp/model.safetensors")).unwrap();
    for dtype in [Dtype::F16, Dtype::BF16] {
        let round = |x: f32| match dtype {
            Dtype::F16 => (f16::from_f32(x).to_le_bytes(), f16::from_f32(x).to_f32()),
            _ => (bf16::from_f32(x).to_le_bytes(), bf16::from_f32(x).to_f32()),
        };
        let mut bytes = Vec::new();
        let mut wide = TensorFile::new();
        for name in weights.names() {
            let HostTensor { shape, .. } = weights.get(name).unwrap();
            let values = weights.get(name).unwrap().as_floats().unwrap();
            bytes.push((name, shape, values.iter().flat_map(|&x| round(x).0).collect::<Vec<u8>>()));
            wide.insert(name, HostTensor::float(shape.clone(), values.iter().map(|&x| round(x).1).collect()));
        }
        let views = bytes
            .iter()
            .map(|(name, shape, bytes)| (*name, TensorView::new(dtype, shape.to_vec(), bytes).unwrap()));
        let half = golden_copy(&desk, "half", |_| ());
        fs::write(half.file("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        wide.write(&golden_copy(&desk, "wide", |_| ()).file("model.safetensors")).unwrap();
        let found = golden_logits(&desk, "@half");
        assert_eq!(found, golden_logits(&desk, "@wide"));
        let worst = difference(&found, &golden_logits(&desk, "%model_split_mlp"));
        assert!(worst > 0.0 && worst < 0.5, "{dtype:?} differs by {worst}");
    }
}

/// Moves a folder's weights into two shards, every other tensor into the second.
fn shard(folder: &ModelFolder) {
    let mut weights = TensorFile::read(&folder.file("model.safetensors")).unwrap();
    let names: Vec<String> = weights.names().map(str::to_string).collect();
    let mut map = Map::new();
    for (number, skip) in [(1, 0), (2, 1)] {
        let shard = format!("model-0000{number}-of-00002.safetensors");
        let mut file = TensorFile::new();
        for name in names.iter().skip(skip).step_by(2) {
            file.insert(name, weights.take(name).unwrap());
            map.insert(name.clone(), shard.clone().into());
        }
        file.write(&folder.file(&shard)).unwrap();
    }
    fs::remove_file(folder.file("model.safetensors")).unwrap();
    let index = json!({ "metadata": {}, "weight_map": map });
    fs::write(folder.file("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn a_sharded_checkpoint_is_the_single_file() {
    let desk = desk();
    let folder = golden_copy(&desk, "shards", |_| ());
    shard(&folder);
    assert_eq!(golden_logits(&desk, "@shards"), golden_logits(&desk, "%model_split_mlp"));
    fs::remove_file(folder.file("model-00002-of-00002.safetensors")).unwrap();
    desk.assert_refused("info --model @shards", "model-00002-of-00002.safetensors");
}

#[test]
fn models_convert_to_kilns_layout_and_back() {
    let desk = desk();
    let folder = golden_copy(&desk, "apart", |config| {
        config.insert("fuse_norm".into(), false.into());
    });
    let mut weights = TensorFile::read(&folder.file("model.safetensors")).unwrap();
    for layer in 0..2 {
        let attn = format!("model.layers.{layer}.attn");
        weights.rename(&format!("{attn}.g_norm_swish_gate.weight"), format!("{attn}.g_norm.weight"));
    }
    weights.write(&folder.file("model.safetensors")).unwrap();

    let expected = golden_logits(&desk, "%model_fused_mlp");
    for (from, original) in [("%model_fused_mlp", "%model_split_mlp"), ("@apart", "@apart")] {
        desk.json(&format!("convert --from {from} --to @kiln"));
        desk.json("convert --from @kiln --to @fla --layout fla");
        desk.json("convert --from @fla --to @again");
        for model in [from, "@kiln", "@fla", "@again"] {
            assert_eq!(golden_logits(&desk, model), expected, "{from} as {model}");
        }
        let config = |model: &str| ModelFolder::new(desk.path(model)).config_value().unwrap();
        assert_eq!(config("kiln")["kind"], "gla");
        assert!(config("fla").get("kind").is_none());
        assert_eq!(config("fla")["model_type"], "gla");
        assert_eq!(config("kiln"), config("again"));
        // The newer public layout comes back tensor by tensor.
        let original = match original.strip_prefix('@') {
            Some(name) => tensors(&desk, &format!("{name}/model.safetensors")),
            None => TensorFile::read(&golden("model_split_mlp/model.safetensors")).unwrap(),
        };
        let written = tensors(&desk, "fla/model.safetensors");
        assert!(written.names().eq(original.names()));
        assert!(written.names().all(|name| written.get(name) == original.get(name)));
    }
    fs::write(desk.path("file"), "").unwrap();
    desk.assert_refused("convert --from @kiln --to @file/m", "cannot create");
}

#[test]
fn only_models_of_another_layout_are_converted_to_it() {
    let desk = desk_with_text(600);
    desk.json(&format!("train --arch retnet --text @text.txt --out @m --steps 1 {TINY}"));
    desk.assert_refused("convert --from @m --to @fla --layout fla", "is a retnet model; only GLA models");
    assert!(!desk.path("fla").exists());
}

#[test]
fn folders_that_are_no_gla_model_are_refused_by_name() {
    let desk = desk();
    desk.assert_refused("info --model @nowhere", "nowhere/config.json");
    let change = |name: &'static str, value: Value| {
        golden_copy(&desk, name, |config| {
            config.insert(name.into(), value);
        });
    };
    change("kind", json!("tcnca"));
    change("model_type", json!("mamba2"));
    change("attn", json!({ "layers": [1] }));
    change("num_heads", json!(5));
    change("chunk", json!(60));
    change("hidden_size", json!("wide"));
    change("vocab_size", json!(0));
    change("tie_word_embeddings", json!(true));
    change("num_hidden_layers", json!(3));
    change("intermediate_size", json!(81));
    change("norm_eps", json!(0));
    change("clamp_min", json!(0.5));
    for (name, words) in [
        ("kind", "kind/config.json: is a model of kind \"tcnca\", not \"gla\""),
        ("model_type", "model_type/config.json: has model_type \"mamba2\", expected \"gla\""),
        ("attn", "attn/config.json: \"attn\" asks for layers with softmax attention"),
        ("num_heads", "num_heads/config.json: 5 heads do not divide the key width 24"),
        ("chunk", "chunk/config.json: a chunk of 60 rows cannot be cut into sub-blocks of 16"),
        ("hidden_size", "hidden_size/config.json: does not describe a GLA checkpoint: invalid type: string"),
        ("vocab_size", "must all be at least 1"),
        ("norm_eps", "the epsilon of the norms is 0, must be above 0"),
        ("clamp_min", "clamp_min is 0.5, must be ≤ 0"),
        ("tie_word_embeddings", "\"lm_head.weight\" has no place in this network"),
        ("num_hidden_layers", "\"model.layers.2.attn_norm.weight\" is missing"),
        ("intermediate_size", "has floats of shape [80, 48], expected floats of shape [81, 48]"),
    ] {
        desk.assert_refused(&format!("info --model @{name}"), words);
    }
}

#[test]
fn sizes_that_only_the_configuration_claims_take_no_memory() {
    let desk = desk();
    for (name, size) in [("vocab_size", 1_000_000_000u64), ("intermediate_size", 500_000_000)] {
        golden_copy(&desk, name, |config| {
            config.insert(name.into(), size.into());
        });
        desk.assert_refused(
            &format!("info --model @{name}"),
            &format!("expected floats of shape [{size}, 48]"),
        );
    }
}

#[test]
fn broken_weights_are_named() {
    let desk = desk();
    let folder = golden_copy(&desk, "m", |_| ());
    let path = folder.file("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for length in [0, 100, whole.len() / 2, whole.len() - 4] {
        fs::write(&path, &whole[..length]).unwrap();
        let refusal = desk.refusal("info --model @m");
        assert!(refusal.contains("m/model.safetensors: "), "{length}: {refusal}");
        assert!(refusal.contains("is it a complete file"), "{length}: {refusal}");
    }
    let weights = TensorFile::read(&golden("model_split_mlp/model.safetensors")).unwrap();
    let with = |name: &str, tensor: HostTensor| {
        let mut weights = weights.clone();
        weights.insert(name, tensor);
        weights.write(&path).unwrap();
    };
    with("model.norm.weight", HostTensor::float([47], vec![1.0; 47]));
    desk.assert_refused(
        "info --model @m",
        "\"model.norm.weight\": has floats of shape [47], expected floats of shape [48]",
    );
    let mut values = vec![1.0; 48];
    values[3] = f32::NAN;
    with("model.norm.weight", HostTensor::float([48], values));
    desk.assert_refused("info --model @m", "\"model.norm.weight\": element 3 is not a finite number");
    with("model.layers.0.attn.extra", HostTensor::float([1], vec![0.0]));
    desk.assert_refused("info --model @m", "\"model.layers.0.attn.extra\" has no place in this network");
    fs::remove_file(&path).unwrap();
    desk.assert_refused("info --model @m", "cannot read");
}

#[test]
fn info_tells_sizes_and_draws_how_long_heads_remember() {
    let desk = desk_with_text(600);
    let info = desk.json("info --model %model_split_mlp --text @text.txt --prune-report @memory.svg");
    // Two layers of 2 heads with 12 × 24 states in f32; a Transformer's cache has 2 × 48 numbers a layer and token.
    assert_eq!(info["state_bytes_per_sequence"], 2 * 2 * 12 * 24 * 4);
    assert_eq!(
        info["transformer_kv_cache_bytes"][0],
        json!({ "tokens": 2048, "bytes": 2048 * 2 * 2 * 48 * 4 })
    );
    assert_eq!(info["head_memory"].as_array().unwrap().len(), 4);
    assert!(fs::read_to_string(desk.path("memory.svg")).unwrap().contains("</svg>"));
    desk.assert_refused("info --model %model_split_mlp --prune-report @m.svg", "--text");
}

// The operator.

#[test]
fn every_form_of_the_operator_gives_the_golden_result_and_gradients() {
    let desk = desk();
    for (form, options) in
        [("recurrent", ""), ("parallel", ""), ("chunk", ""), ("chunk", "--chunk 16 --sub-chunk 8")]
    {
        desk.json(&format!("op --in %op_b2h3t37.safetensors --form {form} {options} --out @out.safetensors"));
        let found = tensors(&desk, "out.safetensors");
        let reference = TensorFile::read(&golden("op_b2h3t37.safetensors")).unwrap();
        assert!(found.names().eq(["dg", "dh0", "dk", "dq", "dv", "ht", "o"]));
        for name in found.names() {
            let expected = reference.get(name).unwrap();
            let scale = expected.as_floats().unwrap().iter().fold(1f32, |scale, x| scale.max(x.abs()));
            let worst = difference(found.get(name).unwrap(), expected) / scale;
            let bound = if name.starts_with('d') { 1e-3 } else { 2e-4 };
            assert!(worst <= bound, "{form} {options}: {name} differs by {worst}");
        }
    }
}

#[test]
fn the_operator_needs_neither_a_state_nor_gradients() {
    let desk = desk();
    let mut file = TensorFile::read(&golden("op_b2h3t37.safetensors")).unwrap();
    for name in ["h0", "dht", "do"] {
        file.take(name).unwrap();
    }
    file.write(&desk.path("in.safetensors")).unwrap();
    let told = desk.json("op --in @in.safetensors --out @out.safetensors");
    assert_eq!(told["tensors"], json!(["ht", "o"]));
}

#[test]
fn the_operator_refuses_what_it_is_not_defined_for() {
    let desk = desk();
    let reference = TensorFile::read(&golden("op_b1h1t1.safetensors")).unwrap();
    let [key, value] = ["k", "v"].map(|name| reference.get(name).unwrap().shape[3]);
    let with = |name: &str, shape: [usize; 4], x: f32| {
        let mut file = reference.clone();
        file.insert(name, HostTensor::float(shape, vec![x; shape.iter().product()]));
        file.write(&desk.path("in.safetensors")).unwrap();
    };
    let refused = |words: &str| {
        desk.assert_refused("op --in @in.safetensors --out @out.safetensors", words);
        assert!(!desk.path("out.safetensors").exists());
    };
    with("g", [1, 1, 1, key], 0.1);
    refused("element 0 of \"g\" is 0.1, must be ≤ 0");
    with("g", [1, 1, 1, key], f32::NAN);
    refused("element 0 of \"g\" is NaN");
    with("g", [1, 1, 2, key], -0.1);
    refused("tensor \"g\" has shape [1, 1, 2,");
    with("v", [1, 1, 1, value + 1], 0.1);
    refused("has shape");
    with("q", [0, 1, 1, key], 0.1);
    refused("no extent may be 0");
    with("k", [1, 1, 1, key], f32::INFINITY);
    refused("element 0 of \"k\" is inf, must be a finite number");
    with("g", [1, 1, 1, key], f32::NEG_INFINITY);
    refused("element 0 of \"g\" is -inf");
    with("k", [1, 1, 1, key], f32::MAX);
    refused("does not fit the range of f32");
    let mut file = reference.clone();
    file.take("q").unwrap();
    file.write(&desk.path("in.safetensors")).unwrap();
    refused("tensor \"q\" is missing");
    file.insert("q", HostTensor::float([1], vec![1.0]));
    file.write(&desk.path("in.safetensors")).unwrap();
    refused("floats with 4 axes");
    let bad_chunk = "op --in %op_b1h1t1.safetensors --out @out.safetensors --chunk 20";
    desk.assert_refused(bad_chunk, "a chunk of 20 rows cannot be cut into sub-blocks of 16");
    desk.assert_refused(
        "op --in %op_b1h1t1.safetensors --out @out.safetensors --form diagonal",
        "invalid value",
    );
}
