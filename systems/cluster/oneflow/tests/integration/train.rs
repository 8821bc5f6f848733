//! Cases in any parallel train as on one device, and send what was predicted.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_cluster::run_threads;
use kiln_core::Context;
use kiln_oneflow::case::Examples;
use kiln_oneflow::optimiser::{Kind, Optimiser};
use kiln_oneflow::train::{Trained, train};
use kiln_oneflow::{Case, Compiler, Parallel, Placement, Run};

fn cases() -> Vec<Case> {
    vec![
        Case::Mlp { inputs: 64, hidden: 12, classes: 10 },
        Case::SoftmaxHead { inputs: 12, embedding: 8, classes: 50 },
        Case::WideDeep { rows: 60, width: 4, hidden: 12 },
        Case::HybridGpt { vocab: 256, seq: 6, hidden: 8, heads: 4, layers: 1 },
    ]
}

/// What rank 0 has after some steps, and whether as many bytes were sent as predicted.
fn trained(case: &Case, mesh: &[usize], parallel: Parallel, registers: Option<usize>) -> Trained {
    const BATCH: usize = 8;
    const STEPS: usize = 4;
    let placement = Placement::mesh(mesh).unwrap();
    let logical = case.logical(BATCH, &case.initial(1)).unwrap();
    let physical = Compiler::new(logical.clone()).parallel(parallel, &placement).compile(&placement).unwrap();
    let examples = Examples::generated(case);
    let optimiser = Optimiser { kind: Kind::Adam, lr: 1e-3 };
    let run = Run { pieces: STEPS, registers, optimiser, checked: true, ..Run::default() };
    let feed = |step: usize| Ok(examples.batch(case, BATCH, 1, step as u64));
    let mut ranks = run_threads(placement.len(), |world| {
        train(&physical, &logical, &world, &run, &feed, &Context::new(), &|_| {})
    })
    .unwrap_or_else(|e| panic!("{case:?} {mesh:?} {parallel:?}: {e}"));
    let sent: u64 = ranks.iter().map(|rank| rank.bytes_sent).sum();
    assert_eq!(sent, physical.bytes() * STEPS as u64, "{case:?} {mesh:?} {parallel:?}");
    ranks.swap_remove(0)
}

#[test]
fn every_case_trains_alike_in_any_parallel_on_any_mesh() {
    for case in cases() {
        let single = trained(&case, &[1], Parallel::Auto, None);
        for mesh in [&[2][..], &[3], &[2, 2]] {
            for parallel in [Parallel::Data, Parallel::Model, Parallel::Auto] {
                // Without actors, with one register and with two: on one mesh, for it is the same on all.
                let registers = if mesh == [2] { &[None, Some(1), Some(2)][..] } else { &[Some(2)] };
                for &registers in registers {
                    let place = format!("{case:?} {mesh:?} {parallel:?} {registers:?}");
                    let found = trained(&case, mesh, parallel, registers);
                    for (a, b) in found.losses.iter().zip(&single.losses) {
                        assert!(
                            (a - b).abs() <= 1e-4 * b.abs(),
                            "{place}: {:?}, must be {:?}",
                            found.losses,
                            single.losses
                        );
                    }
                    for (a, b) in found.variables.iter().zip(&single.variables) {
                        let largest = b.value.iter::<f32>().fold(1e-6f32, |most, x| most.max(x.abs()));
                        for (x, y) in a.value.iter::<f32>().zip(b.value.iter::<f32>()) {
                            // Adam's first steps are the signs of gradients; where these are rounding, so are the steps.
                            assert!(
                                (x - y).abs() <= 1e-3 * largest + 8e-3,
                                "{place}: {} is {x}, must be {y}",
                                a.name
                            );
                        }
                        assert_eq!(a.kept.len(), 2);
                    }
                }
            }
        }
    }
}

#[test]
fn the_choice_moves_no_more_than_data_or_model_parallel() {
    for case in cases() {
        for mesh in [&[2][..], &[4], &[2, 2]] {
            let placement = Placement::mesh(mesh).unwrap();
            let logical = case.logical(8, &case.initial(0)).unwrap();
            let bytes = |parallel: Parallel| {
                Compiler::new(logical.clone())
                    .parallel(parallel, &placement)
                    .compile(&placement)
                    .unwrap()
                    .bytes()
            };
            let (auto, data, model) = (bytes(Parallel::Auto), bytes(Parallel::Data), bytes(Parallel::Model));
            assert!(auto <= data.min(model), "{case:?} {mesh:?}: {auto}, data {data}, model {model}");
        }
    }
}

#[test]
fn small_batches_of_a_transformer_are_divided_by_columns_then_rows() {
    let case = Case::HybridGpt { vocab: 64, seq: 4, hidden: 64, heads: 4, layers: 1 };
    let logical = case.logical(1, &case.initial(0)).unwrap();
    let placement = Placement::mesh(&[2]).unwrap();
    let physical = Compiler::new(logical).compile(&placement).unwrap();
    let stored = physical.stored();
    let form = |name: &str| stored.iter().find(|(known, ..)| known == name).unwrap().2.to_string();
    for part in ["query", "key", "value", "up"] {
        assert_eq!(form(&format!("layers.0.{part}.weight")), "S1", "{part}");
    }
    for part in ["attention", "down"] {
        assert_eq!(form(&format!("layers.0.{part}.weight")), "S0", "{part}");
    }
}
