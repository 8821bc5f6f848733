//! Losses, gradients, logits and trained weights of an independent float64 implementation, in every layout; schedules and the
//! analytic model.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::tensor::Device;
use kiln_cluster::run_threads;
use kiln_core::{Context, HostTensor, TensorFile};
use kiln_data::shared_dir;
use kiln_megatron::layout::ParallelLayout;
use kiln_megatron::model::GptConfig;
use kiln_megatron::optimiser::AdamW;
use kiln_megatron::perf::{Cluster, PerfModel, table1};
use kiln_megatron::ranks::Ranks;
use kiln_megatron::real::Real;
use kiln_megatron::schedule::{Kind, Schedule};
use kiln_megatron::stage::Recompute;
use kiln_megatron::trace::Trace;
use kiln_megatron::trainer::{TrainOptions, Trainer};
use kiln_nn::{LanguageModel, ids_to_tensor};
use safetensors::SafeTensors;
use serde_json::Value;

/// A file of reference values.
struct Golden {
    config: GptConfig,
    batch: usize,
    seq: usize,
    steps: usize,
    floats: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    tokens: Vec<u32>,
}

impl Golden {
    fn read(name: &str, heads: usize, layers: usize) -> Option<Self> {
        let Some(path) = golden(name) else {
            println!("skipped: no shared data");
            return None;
        };
        let bytes = std::fs::read(path).unwrap();
        let mut floats = BTreeMap::new();
        let (mut tokens, mut shape) = (Vec::new(), Vec::new());
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let data = view.data().as_chunks::<8>().0;
            if name == "tokens" {
                tokens = data.iter().map(|&b| i64::from_le_bytes(b) as u32).collect();
                shape = view.shape().to_vec();
            } else {
                let values = data.iter().map(|&b| f64::from_le_bytes(b)).collect();
                floats.insert(name, (view.shape().to_vec(), values));
            }
        }
        let word = &floats["w.embedding.word"].0;
        let positions = floats["w.embedding.position"].0[0];
        let config = GptConfig::new(layers, word[1], heads, word[0]).with_max_seq(positions);
        Some(Self { config, batch: shape[1], seq: shape[2] - 1, steps: shape[0], floats, tokens })
    }

    fn rows(&self, step: usize) -> &[u32] {
        let len = self.batch * (self.seq + 1);
        &self.tokens[step * len..][..len]
    }

    fn weight<T: Real>(&self, name: &str) -> Option<Vec<T>> {
        let (_, values) = self.floats.get(&format!("w.{name}"))?;
        Some(values.iter().map(|&x| T::of(x)).collect())
    }
}

fn golden(name: &str) -> Option<PathBuf> {
    shared_dir().map(|dir| dir.join("golden/megatron").join(name)).filter(|path| path.exists())
}

/// What a run gave.
#[derive(Default)]
struct Run {
    losses: Vec<f64>,
    norms: Vec<f64>,
    gradients: BTreeMap<String, Vec<f64>>,
    weights: BTreeMap<String, Vec<f64>>,
}

/// Parts of one rank: pipeline and tensor coordinates, specs and values.
type Parts = (usize, Vec<(kiln_megatron::parameters::Spec, Vec<f64>)>);

fn assemble(parts: &[Parts], tensor: usize) -> BTreeMap<String, Vec<f64>> {
    let mut whole: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (rank, specs) in parts {
        for (spec, part) in specs {
            let values =
                whole.entry(spec.name.clone()).or_insert_with(|| vec![f64::NAN; spec.whole.iter().product()]);
            // What several ranks have must be the same on all of them.
            let mut again = values.clone();
            spec.place(part, &mut again, *rank, tensor);
            for (old, new) in values.iter().zip(&again) {
                assert!(
                    old.is_nan() || (old - new).abs() <= 1e-6 * (1.0 + old.abs()),
                    "{}: {old} {new}",
                    spec.name
                );
            }
            *values = again;
        }
    }
    whole
}

fn train<T: Real>(golden: &Golden, layout: &ParallelLayout, options: &TrainOptions) -> Run {
    let results = run_threads(layout.ranks(), |comm| {
        let cx = Context::for_tests("unused");
        let ranks = Ranks::new(layout, comm)?;
        let mut trainer = Trainer::<T>::new(&golden.config, options, ranks, |name| golden.weight(name), &cx)?;
        let parts = |trainer: &Trainer<T>, values: &[T]| -> Parts {
            let specs = trainer.parameters.specs.iter();
            let part = |range: std::ops::Range<usize>| values[range].iter().map(|x| x.wide()).collect();
            (trainer.ranks.at.tensor, specs.map(|s| (s.clone(), part(s.range.clone()))).collect())
        };
        let (mut losses, mut norms, mut gradients) = (Vec::new(), Vec::new(), None);
        for step in 0..golden.steps {
            let result = trainer.train_step(golden.rows(step), 1e-2)?;
            losses.push(result.loss);
            norms.push(result.grad_norm);
            // With a divided optimiser only a share of the sums is there.
            if step == 0 && !options.distributed_optimiser {
                gradients = Some(parts(&trainer, &trainer.parameters.gradients));
            }
        }
        Ok((losses, norms, gradients, parts(&trainer, &trainer.parameters.values)))
    })
    .unwrap();
    let mut run = Run { losses: results[0].0.clone(), norms: results[0].1.clone(), ..Run::default() };
    assert!(results.iter().all(|result| result.0 == run.losses), "all ranks know the same loss");
    let gradients: Vec<Parts> = results.iter().filter_map(|result| result.2.clone()).collect();
    run.gradients = assemble(&gradients, layout.tensor);
    let weights: Vec<Parts> = results.into_iter().map(|result| result.3).collect();
    run.weights = assemble(&weights, layout.tensor);
    run
}

fn options(golden: &Golden, micro_batch: usize) -> TrainOptions {
    TrainOptions { optimiser: AdamW::default(), ..TrainOptions::new(golden.batch, micro_batch, golden.seq) }
}

fn assert_golden(golden: &Golden, run: &Run, [first, later, relative]: [f64; 3], what: &str) {
    for (step, (found, expected)) in run.losses.iter().zip(&golden.floats["losses"].1).enumerate() {
        let tolerance = if step == 0 { first } else { later };
        assert!(
            (found - expected).abs() <= tolerance * expected,
            "{what}: loss of step {step} is {found}, should be {expected}"
        );
    }
    for (step, (found, expected)) in run.norms.iter().zip(&golden.floats["grad_norms"].1).enumerate() {
        let tolerance = if step == 0 { relative } else { 50.0 * later };
        assert!(
            (found - expected).abs() <= tolerance * expected,
            "{what}: norm of step {step} is {found}, should be {expected}"
        );
    }
    for (name, found) in &run.gradients {
        assert_close(
            found,
            &golden.floats[&format!("g.{name}")].1,
            relative,
            &format!("{what}: gradient of {name}"),
        );
    }
    for (name, (_, expected)) in &golden.floats {
        if let Some(name) = name.strip_prefix("final.") {
            assert_close(
                &run.weights[name],
                expected,
                100.0 * later,
                &format!("{what}: {name} after all steps"),
            );
        }
    }
}

fn assert_close(found: &[f64], expected: &[f64], relative: f64, what: &str) {
    let largest = expected.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() <= relative * largest,
            "{what} at {at}: {a}, should be {b} (largest {largest})"
        );
    }
}

const SINGLE: [f64; 3] = [2e-6, 2e-4, 2e-5];
const DOUBLE: [f64; 3] = [1e-10, 1e-10, 1e-10];

/// t, p, d, v, micro-batch.
const SMALL: [[usize; 5]; 12] = [
    [1, 1, 1, 1, 8],
    [1, 1, 1, 2, 1],
    [2, 1, 1, 1, 2],
    [3, 1, 1, 1, 2],
    [6, 1, 1, 1, 2],
    [1, 2, 1, 1, 1],
    [1, 4, 1, 1, 2],
    [1, 2, 1, 2, 1],
    [1, 1, 2, 1, 2],
    [2, 2, 1, 1, 2],
    [2, 2, 2, 2, 1],
    [3, 2, 1, 2, 2],
];
const ODD: [[usize; 5]; 7] = [
    [1, 1, 1, 1, 3],
    [5, 1, 1, 1, 1],
    [1, 2, 1, 1, 1],
    [1, 3, 1, 1, 1],
    [1, 6, 1, 1, 1],
    [1, 1, 3, 3, 1],
    [5, 3, 1, 1, 1],
];

fn kinds(v: usize, p: usize, m: usize) -> Vec<Kind> {
    match v {
        1 if m.is_multiple_of(p) => vec![Kind::Gpipe, Kind::OneForwardOneBackward, Kind::Interleaved],
        1 => vec![Kind::Gpipe, Kind::OneForwardOneBackward],
        _ => vec![Kind::Interleaved],
    }
}

fn every_layout<T: Real>(golden: &Golden, layouts: &[[usize; 5]], tolerance: [f64; 3]) {
    for &[t, p, d, v, b] in layouts {
        for kind in kinds(v, p, golden.batch / d / b) {
            let options = TrainOptions { schedule: kind, ..options(golden, b) };
            let layout = ParallelLayout::new(t, p, d).with_chunks(v);
            let run = train::<T>(golden, &layout, &options);
            assert_golden(golden, &run, tolerance, &format!("t {t} p {p} d {d} v {v} b {b} {kind:?}"));
        }
    }
}

#[test]
fn every_layout_trains_as_the_reference_in_single_precision() {
    let Some(small) = Golden::read("gpt_small.safetensors", 6, 4) else { return };
    every_layout::<f32>(&small, &SMALL, SINGLE);
    let odd = Golden::read("gpt_odd.safetensors", 5, 6).unwrap();
    every_layout::<f32>(&odd, &ODD, SINGLE);
}

#[test]
fn every_layout_trains_as_the_reference_in_double_precision() {
    let Some(small) = Golden::read("gpt_small.safetensors", 6, 4) else { return };
    every_layout::<f64>(&small, &SMALL, DOUBLE);
    let odd = Golden::read("gpt_odd.safetensors", 5, 6).unwrap();
    every_layout::<f64>(&odd, &ODD, DOUBLE);
}

#[test]
fn a_divided_optimiser_trains_as_the_reference() {
    let Some(small) = Golden::read("gpt_small.safetensors", 6, 4) else { return };
    for [t, p, d, v] in [[1, 1, 2, 1], [2, 2, 2, 1]] {
        let options = TrainOptions { distributed_optimiser: true, ..options(&small, 1) };
        let layout = ParallelLayout::new(t, p, d).with_chunks(v);
        assert_golden(&small, &train::<f64>(&small, &layout, &options), DOUBLE, "divided");
    }
}

#[test]
fn recomputation_and_scatter_gather_change_no_bit() {
    let Some(small) = Golden::read("gpt_small.safetensors", 6, 4) else { return };
    let layout = ParallelLayout::new(2, 2, 1);
    for dropout in [0.0, 0.1] {
        let mut golden = Golden {
            config: small.config.clone().with_dropout(dropout),
            ..Golden::read("gpt_small.safetensors", 6, 4).unwrap()
        };
        golden.steps = 2;
        let run = |recompute, scatter_gather| {
            let run = train::<f32>(
                &golden,
                &layout,
                &TrainOptions { recompute, scatter_gather, ..options(&golden, 2) },
            );
            (run.losses, run.weights)
        };
        let plain = run(Recompute::None, false);
        for (recompute, scatter_gather) in [
            (Recompute::Full, false),
            (Recompute::Selective, false),
            (Recompute::None, true),
            (Recompute::Full, true),
        ] {
            assert_eq!(
                run(recompute, scatter_gather),
                plain,
                "{recompute:?} {scatter_gather} dropout {dropout}"
            );
        }
    }
}

#[test]
fn dropout_does_not_depend_on_the_layout() {
    let Some(mut golden) = Golden::read("gpt_small.safetensors", 6, 4) else { return };
    golden.config.dropout = 0.2;
    let losses =
        |t, p, d, b| train::<f64>(&golden, &ParallelLayout::new(t, p, d), &options(&golden, b)).losses;
    let single = losses(1, 1, 1, 8);
    assert!((single[0] - golden.floats["losses"].1[0]).abs() > 1e-4, "something is dropped");
    for (t, p, d, b) in [(2, 1, 1, 4), (1, 2, 1, 1), (1, 1, 2, 2), (3, 2, 2, 2)] {
        for (a, b) in losses(t, p, d, b).iter().zip(&single) {
            assert!((a - b).abs() < 1e-9, "{a} {b}");
        }
    }
}

#[test]
fn the_loss_does_not_depend_on_the_padding() {
    let Some(mut golden) = Golden::read("gpt_small.safetensors", 6, 4) else { return };
    golden.steps = 1;
    for (multiple, t) in [(1, 1), (7, 2), (128, 3)] {
        golden.config.vocab_multiple = multiple;
        let run = train::<f64>(&golden, &ParallelLayout::new(t, 1, 1), &options(&golden, 4));
        assert!((run.losses[0] - golden.floats["losses"].1[0]).abs() < 1e-11);
    }
}

#[test]
fn the_network_on_one_device_gives_the_reference_logits() {
    for (name, heads, layers) in [("gpt_small.safetensors", 6, 4), ("gpt_odd.safetensors", 5, 6)] {
        let Some(golden) = Golden::read(name, heads, layers) else { return };
        let mut file = TensorFile::new();
        for (name, (shape, values)) in &golden.floats {
            if let Some(name) = name.strip_prefix("w.") {
                file.insert(
                    name,
                    HostTensor::float(shape.clone(), values.iter().map(|&x| x as f32).collect()),
                );
            }
        }
        let device = Device::flex();
        let model = file.into_module(golden.config.empty(&device)).unwrap();
        let (_, expected) = &golden.floats["logits"];
        let text = golden.seq * golden.config.vocab;
        for (sample, row) in golden.rows(0).chunks_exact(golden.seq + 1).enumerate() {
            let expected = &expected[sample * text..][..text];
            let logits = |pieces: &[usize]| {
                let mut state = model.initial_state(1, &device);
                let (mut found, mut at) = (Vec::new(), 0);
                for &piece in pieces {
                    let (logits, next) =
                        model.forward_with_state(ids_to_tensor(&row[at..at + piece], &device), state);
                    found.extend(logits.into_data().iter::<f64>());
                    (state, at) = (next, at + piece);
                }
                found
            };
            assert_close(&logits(&[golden.seq]), expected, 2e-5, "whole");
            assert_close(&logits(&[3, 1, golden.seq - 4]), expected, 2e-5, "in pieces");
        }
    }
}

#[test]
fn schedules_and_their_times_are_exact() {
    let text = include_str!("../data/schedules.json");
    let cases: Vec<Value> = serde_json::from_str(text).unwrap();
    for case in cases {
        let number = |key: &str| case[key].as_u64().unwrap() as usize;
        let kind: Kind = serde_json::from_value(case["kind"].clone()).unwrap();
        let schedule = Schedule::new(kind, number("p"), number("m"), number("v")).unwrap();
        for rank in 0..number("p") {
            let order: Vec<String> = schedule.operations(rank).iter().map(ToString::to_string).collect();
            assert_eq!(Value::from(order), case["order"][rank], "{schedule:?} rank {rank}");
            assert_eq!(
                schedule.peak_in_flight(rank) as u64,
                case["peak_chunks_in_flight"][rank].as_u64().unwrap()
            );
        }
        let trace = Trace::simulate(&schedule, 1.0, 2.0).unwrap();
        let close = |found: f64, key: &str| {
            assert!((found - case[key].as_f64().unwrap()).abs() < 1e-12, "{schedule:?} {key}")
        };
        close(trace.makespan(), "makespan");
        close(trace.bubble(), "bubble");
        close(schedule.bubble(), "formula");
    }
}

#[test]
fn no_schedule_waits_for_ever() {
    for p in 1..=8 {
        for m in 1..=16 {
            for v in 1..=4 {
                for kind in [Kind::Gpipe, Kind::OneForwardOneBackward, Kind::Interleaved] {
                    let Ok(schedule) = Schedule::new(kind, p, m, v) else { continue };
                    let trace = Trace::simulate(&schedule, 1.0, 2.0).unwrap();
                    assert_eq!(trace.spans.len(), 2 * p * m * v);
                    assert!(
                        (trace.bubble() - schedule.bubble()).abs() < 1e-9,
                        "{schedule:?}: {}",
                        trace.bubble()
                    );
                }
            }
        }
    }
}

#[test]
fn the_analytic_model_gives_the_reference_figures() {
    let golden: Value = serde_json::from_str(include_str!("../data/perf_model.json")).unwrap();
    let rows = golden["rows"].as_array().unwrap();
    assert_eq!(rows.len(), table1().len());
    for (row, expected) in table1().into_iter().zip(rows) {
        let figure = |key: &str| expected[key].as_f64().unwrap();
        let close = |found: f64, key: &str, relative: f64| {
            assert!(
                (found / figure(key) - 1.0).abs() < relative,
                "{key}: {found}, should be {}",
                figure(key)
            );
        };
        close(row.shape.parameters(), "exact_params", 1e-12);
        close(row.shape.operations(row.division.batch as f64, true), "exact_flops", 1e-12);
        let iteration = PerfModel::new(Cluster::a100_selene(row.gpus), row.shape).iteration(&row.division);
        close(iteration.tflops, "model_tflops_per_gpu", 1e-3);
        close(iteration.seconds, "model_iteration_s", 1e-3);
        assert_eq!(row.paper_tflops, figure("paper_tflops_per_gpu"));
    }
}
