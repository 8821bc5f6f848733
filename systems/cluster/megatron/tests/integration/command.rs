//! The verbs from the command line, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_core::testing::Desk;
use kiln_core::{HostTensor, TensorFile};
use kiln_megatron::Megatron;

const SMALL: &str = "--layers 2 --hidden 16 --heads 2 --seq 16 --batch 4 --micro-batch 2 --dropout 0.1";

fn desk() -> Desk {
    let desk = Desk::new(&Megatron);
    desk.write("a.txt", "to be or not to be, that is the question. ".repeat(30));
    desk
}

fn losses(desk: &Desk, folder: &str) -> Vec<String> {
    let text = std::fs::read_to_string(desk.path(folder).join("log.csv")).unwrap();
    text.lines().skip(1).map(|row| row.split(',').take(4).collect::<Vec<_>>().join(",")).collect()
}

/// A `.npy` file of ids.
fn npy(ids: &[u16], shape: &str) -> Vec<u8> {
    let header = format!("{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}");
    let padded = format!("{header:<117}\n");
    let mut bytes = b"\x93NUMPY\x01\x00\x76\x00".to_vec();
    bytes.extend(padded.bytes());
    bytes.extend(ids.iter().flat_map(|id| id.to_le_bytes()));
    bytes
}

#[test]
fn a_model_is_trained_resumed_scored_and_continued() {
    let desk = desk();
    let summary =
        desk.json(&format!("train --data @a.txt --out @whole {SMALL} --steps 8 --tensor 2 --save-every 4"));
    assert_eq!((summary["ranks"].as_u64(), summary["steps"].as_u64()), (Some(2), Some(8)));
    for file in ["config.json", "model.safetensors", "log.csv", "schedule.svg", "train.json"] {
        assert!(desk.path("whole").join(file).exists(), "{file}");
    }
    let whole = losses(&desk, "whole");
    assert_eq!(whole.len(), 8);

    // The last checkpoint lost, the run goes on from the one before as if nothing had happened.
    std::fs::remove_dir_all(desk.path("whole/checkpoints/step-00000008")).unwrap();
    desk.json(&format!(
        "train --data @a.txt --out @whole {SMALL} --steps 8 --tensor 2 --save-every 4 --resume"
    ));
    assert_eq!(losses(&desk, "whole"), whole);

    let score = desk.json("eval --model @whole --data @a.txt");
    assert!(
        score["nll_nats"].as_f64().unwrap() < 5.7 && score["bits_per_byte"].as_f64().is_some(),
        "{score}"
    );
    let parts = desk.json("eval --model @whole/checkpoints/step-00000008 --data @a.txt");
    assert_eq!(score, parts);
    let text = desk.json("generate --model @whole --prompt question --max-tokens 30 --greedy");
    assert_eq!(text["ids"].as_array().unwrap().len(), 30);
}

#[test]
fn any_layout_goes_on_where_another_stopped() {
    let desk = desk();
    let line =
        |out: &str, more: &str| format!("train --data @a.txt --out @{out} {SMALL} --save-every 3 {more}");
    desk.json(&line("one", "--steps 6"));
    desk.json(&line("two", "--steps 3 --constant-lr --pipeline 2"));
    desk.json(&line("two", "--steps 6 --constant-lr --tensor 2 --data-parallel 2 --micro-batch 1 --distributed-optimizer true --resume").replacen("--micro-batch 2 ", "", 1));
    assert_eq!(losses(&desk, "two").len(), 6);
    desk.assert_refused(
        &line("two", "--steps 9 --lr 1e-3 --constant-lr --resume"),
        "lr 0.0003, but 0.001 is asked for",
    );
    desk.assert_refused(&line("two", "--steps 2 --constant-lr --resume"), "beyond --steps 2");
    desk.assert_refused(&line("three", "--steps 2 --resume"), "holds no finished checkpoint");
    desk.assert_refused(
        &line("two", "--steps 9 --constant-lr --vocab 300 --resume"),
        "has vocab 256, but 300",
    );
    let shard = desk.path("two/checkpoints/step-00000006/rank_0_1.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    desk.assert_refused(
        &line("two", "--steps 9 --constant-lr --resume"),
        "rank_0_1.safetensors: is not what was written",
    );
    std::fs::remove_file(&shard).unwrap();
    desk.assert_refused(&line("two", "--steps 9 --constant-lr --resume"), "rank_0_1.safetensors");
}

#[test]
fn all_kinds_of_text_are_read() {
    let desk = desk();
    desk.write(
        "a.jsonl",
        "{\"body\": \"to be or not to be, that is the question\"}\n\n{\"body\": \"whether it is nobler\"}\n",
    );
    let train = |more: &str| format!("train --out @m {SMALL} --steps 2 {more}");
    desk.json(&train(
        "--data @a.jsonl --text-field body --tokenizer char --schedule interleaved --pipeline 2",
    ));
    let text = desk.json("generate --model @m --prompt not --max-tokens 25");
    let text = text["text"].as_str().unwrap().replace("<unknown>", "");
    assert!(text.chars().all(|c| "to be or not to be, that is the question\nwhlr".contains(c)), "{text}");
    std::fs::create_dir(desk.path("texts")).unwrap();
    desk.write("texts/a.txt", [255u8, 254, 0, 1].repeat(20));
    desk.json(&train("--data @texts --no-shuffle --recompute full"));
    desk.write("ids.npy", npy(&(0..200).map(|i| i % 37).collect::<Vec<u16>>(), "(200,)"));
    desk.json(&train("--data @ids.npy --vocab 40"));
    desk.write("rows.npy", npy(&(0..2 * 4 * 17).map(|i| i % 40).collect::<Vec<u16>>(), "(2, 4, 17)"));
    desk.json(&train("--tokens @rows.npy --vocab 40 --constant-lr"));
    let score = desk.json("eval --model @m --tokens @rows.npy --logits @l.safetensors");
    assert_eq!(score["tokens_scored"], 2 * 4 * 16);
    assert_eq!(
        TensorFile::read(&desk.path("l.safetensors")).unwrap().get("logits").unwrap().shape,
        [8, 16, 40]
    );
    desk.json("train --out @n --init @m --tokens @rows.npy --seq 16 --batch 4 --micro-batch 2 --steps 1");

    desk.assert_refused(&train("--data @none.txt"), "none.txt");
    desk.write("short.txt", "short");
    desk.assert_refused(&train("--data @short.txt"), "has 5 tokens, but samples of 16 need at least 17");
    desk.write("empty.txt", "");
    desk.assert_refused(&train("--data @empty.txt"), "holds no text");
    desk.assert_refused(
        &train("--data @a.jsonl"),
        "line 1: has no text in \"text\"; --text-field names the field; there are: body",
    );
    desk.assert_refused(
        &train("--data @ids.npy --vocab 30"),
        "token id 30 at 30 is outside the vocabulary of 30",
    );
    desk.assert_refused(&train("--tokens @ids.npy"), "has the shape [200]");
    desk.assert_refused(
        &train("--tokens @rows.npy --steps 3").replacen("--steps 2", "", 1),
        "expected at least [3, 4, 17]",
    );
    desk.write("cut.npy", npy(&[1, 2, 3], "(200,)"));
    desk.assert_refused(&train("--data @cut.npy"), "cut.npy");
    desk.assert_refused(
        "train --data @a.txt --out @n --init @m --hidden 32 --seq 16",
        "--hidden is 32, but the network of --init has 16",
    );
    desk.write("latin.txt", [b'a', 0xe9, b'b']);
    desk.assert_refused(&train("--data @latin.txt --tokenizer char"), "is not UTF-8");
}

#[test]
fn impossible_runs_are_refused() {
    let desk = desk();
    let train = |more: &str| format!("train --data @a.txt --out @m {SMALL} --steps 2 {more}");
    for (more, words) in [
        ("--tensor 3", "--tensor 3 does not divide heads 2; use --tensor 2"),
        ("--pipeline 3", "2 layers are not divisible by the 3 stages"),
        ("--data-parallel 3", "the batch of 4 is not divisible by 6"),
        ("--chunks 2", "need the interleaved schedule"),
        ("--lr 0", "--lr is 0"),
        ("--beta1 1", "--beta1 is 1"),
        ("--min-lr 1", "--min-lr 1 is not between 0 and --lr"),
        ("--save-every 0", "at least 1"),
        ("--stage-layers 1,2 --pipeline 2", "adds up to 3 layers"),
    ] {
        desk.assert_refused(&train(more), words);
        assert!(!desk.path("m").exists(), "{more}");
    }
    desk.assert_refused("eval --model @none --data @a.txt", "none");
}

#[test]
fn models_are_resharded_and_damaged_ones_refused() {
    let desk = desk();
    desk.json(&format!("train --data @a.txt --out @m {SMALL} --steps 2"));
    desk.json("reshard --model @m --tensor 2 --pipeline 2 --out @parts");
    assert!(desk.path("parts/rank_1_1.safetensors").exists() && desk.path("parts/COMPLETE").exists());
    desk.json("reshard --model @parts --out @again");
    let bytes = |folder: &str| std::fs::read(desk.path(folder).join("model.safetensors")).unwrap();
    assert_eq!(bytes("m"), bytes("again"));
    desk.json("reshard --model @again --to gpt2-hf --out @gpt2");
    desk.json("reshard --model @gpt2 --from gpt2-hf --out @back");
    assert_eq!(bytes("m"), bytes("back"));
    desk.assert_refused("reshard --model @m --tensor 3 --out @x", "--tensor 3 does not divide");
    desk.assert_refused("reshard --model @m --tensor 2 --out @parts", "holds a checkpoint already");
    desk.assert_refused("reshard --model @m --from gpt2-hf --out @x", "has no \"model_type\": \"gpt2\"");

    let mut weights = TensorFile::read(&desk.path("m/model.safetensors")).unwrap();
    weights.insert("final_ln.bias", HostTensor::float([16], vec![f32::NAN; 16]));
    weights.write(&desk.path("m/model.safetensors")).unwrap();
    desk.assert_refused("eval --model @m --data @a.txt", "\"final_ln.bias\" is NaN at 0");
    weights.insert("final_ln.bias", HostTensor::float([15], vec![0.0; 15]));
    weights.write(&desk.path("m/model.safetensors")).unwrap();
    desk.assert_refused("eval --model @m --data @a.txt", "has the shape [15], expected floats [16]");
    std::fs::remove_file(desk.path("parts/COMPLETE")).unwrap();
    desk.assert_refused("eval --model @parts --data @a.txt", "never finished");
}

#[test]
fn schedules_plans_and_figures_are_printed() {
    let desk = desk();
    let schedule =
        desk.json("schedule --pipeline 4 --microbatches 8 --chunks 2 --kind interleaved --svg @s.svg");
    assert_eq!((schedule["makespan"].as_f64(), schedule["bubble"].as_f64()), (Some(28.5), Some(0.1875)));
    assert!(std::fs::read_to_string(desk.path("s.svg")).unwrap().starts_with("<svg"));
    desk.assert_refused(
        "schedule --pipeline 4 --microbatches 6 --chunks 2 --kind interleaved",
        "use 4 or 8 micro-batches",
    );
    desk.assert_refused("schedule --pipeline 2 --microbatches 99999999", "more than");
    desk.assert_refused("schedule --pipeline 2 --microbatches 2 --forward 0", "--forward is 0");

    let plans = desk.json("plan --model gpt3-175b --gpus 1024 --global-batch 1536 --top 3");
    assert_eq!(plans["plans"].as_array().unwrap().len(), 3);
    assert!(plans["plans"][0]["tensor"].as_u64().unwrap() <= 8);
    desk.write(
        "c.toml",
        "gpus = 16\ngpus_per_node = 4\npeak_tflops = 312\nmemory_gb = 40\nhbm_gbps = 1500\nintra_gbps = 300\ninter_gbps = 12\nlatency_us = 10\n",
    );
    desk.json("plan --layers 24 --hidden 2048 --heads 16 --cluster @c.toml --global-batch 64");
    desk.write("d.toml", "gpus = 16\n");
    desk.assert_refused(
        "plan --model gpt2-xl --cluster @d.toml --global-batch 64",
        "d.toml: does not describe a cluster",
    );
    desk.assert_refused("plan --model gpt2-xl --cluster moon --global-batch 64", "presets are a100-selene");
    desk.assert_refused("plan --model gpt9 --global-batch 64", "there is no model \"gpt9\"");
    desk.assert_refused("plan --model gpt3-175b --gpus 8 --global-batch 64", "no division fits");

    assert_eq!(desk.json("perf --table 1").as_array().unwrap().len(), 10);
    desk.json("perf --figure recompute --out @figures");
    assert!(desk.path("figures/recompute.svg").exists() && desk.path("figures/recompute.csv").exists());
    desk.assert_refused("perf --table 2", "2 is not in 1..=1");
}
