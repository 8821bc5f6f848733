//! Stages give what one device gives, send what was predicted, and report a peer that is lost.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_cluster::{ClusterArgs, Communicator, run_over_loopback, run_threads};
use kiln_core::{Context, Result};
use kiln_oneflow::case::Examples;
use kiln_oneflow::optimiser::{Kind, Optimiser};
use kiln_oneflow::parts::cut as part;
use kiln_oneflow::pipeline::{Flow, Pipeline, cut, run, train};
use kiln_oneflow::sbp::Region;
use kiln_oneflow::train::Trained;
use kiln_oneflow::{Case, Compiler, Logical, Parallel, Placement, Run};

const BATCH: usize = 8;
const STEPS: usize = 10;

fn cases() -> Vec<Case> {
    vec![
        Case::Mlp { inputs: 64, hidden: 12, classes: 10 },
        Case::SoftmaxHead { inputs: 12, embedding: 8, classes: 50 },
        Case::WideDeep { rows: 60, width: 4, hidden: 12 },
        Case::HybridGpt { vocab: 256, seq: 6, hidden: 8, heads: 4, layers: 2 },
    ]
}

fn optimiser() -> Optimiser {
    Optimiser { kind: Kind::Sgd, lr: 0.05 }
}

/// Ten steps on one device.
fn single(case: &Case) -> Trained {
    let placement = Placement::mesh(&[1]).unwrap();
    let logical = case.logical(BATCH, &case.initial(1)).unwrap();
    let physical = Compiler::new(logical.clone()).compile(&placement).unwrap();
    let examples = Examples::generated(case);
    let run = Run { pieces: STEPS, registers: None, optimiser: optimiser(), ..Run::default() };
    let feed = |step: usize| Ok(examples.batch(case, BATCH, 1, step as u64));
    let ranks = run_threads(1, |world| {
        kiln_oneflow::train::train(&physical, &logical, &world, &run, &feed, &Context::new(), &|_| {})
    });
    ranks.unwrap().remove(0)
}

fn pipeline(case: &Case, stages: usize, mesh: &[usize], parallel: Parallel, batch: usize) -> Pipeline {
    let placement = Placement::mesh(mesh).unwrap();
    let objective = case.objective(batch).unwrap();
    let logical = Logical::training(&objective, "loss", &case.initial(1)).unwrap();
    let stages = cut(&objective, &logical.variables, Some("loss"), stages, &[]).unwrap();
    Pipeline::compile(stages, &placement, |compiler, _| Ok(compiler.parallel(parallel, &placement))).unwrap()
}

type Ranks<'a> = &'a dyn Fn(usize, &(dyn Fn(Communicator) -> Result<Trained> + Sync)) -> Result<Vec<Trained>>;

fn staged(case: &Case, pipeline: &Pipeline, micro_batches: usize, registers: usize, ranks: Ranks) -> Trained {
    let examples = Examples::generated(case);
    let options = Run {
        pieces: micro_batches,
        registers: Some(registers),
        optimiser: optimiser(),
        checked: true,
        traced: true,
        ..Run::default()
    };
    let flow = Flow { steps: STEPS, first: 0, run: options };
    let feed = |piece: usize| {
        let whole = examples.batch(case, BATCH, 1, (piece / micro_batches) as u64);
        let cut =
            |data| part(data, &Region::whole(data.shape()).split(0, micro_batches, piece % micro_batches));
        whole.iter().map(cut).collect()
    };
    let body = |world: Communicator| train(pipeline, &world, &flow, &feed, &Context::new(), &|_| {});
    let mut trained = ranks(pipeline.ranks(), &body).unwrap_or_else(|e| panic!("{case:?}: {e}"));
    let sent: u64 = trained.iter().map(|rank| rank.bytes_sent).sum();
    let predicted = pipeline.bytes() * micro_batches as u64 + pipeline.step_bytes();
    assert_eq!(sent, predicted * STEPS as u64, "{case:?}");
    trained.swap_remove(0)
}

fn assert_alike(case: &Case, found: &Trained, single: &Trained, place: &str) {
    for (a, b) in found.losses.iter().zip(&single.losses) {
        assert!(
            (a - b).abs() <= 1e-4 * b.abs(),
            "{case:?} {place}: {:?}, must be {:?}",
            found.losses,
            single.losses
        );
    }
    assert_eq!(
        (found.losses.len(), found.variables.len()),
        (STEPS, single.variables.len()),
        "{case:?} {place}"
    );
    for expected in &single.variables {
        let variable = found.variables.iter().find(|variable| variable.name == expected.name).unwrap();
        for (x, y) in variable.value.iter::<f32>().zip(expected.value.iter::<f32>()) {
            assert!((x - y).abs() <= 1e-4, "{case:?} {place}: {} is {x}, must be {y}", expected.name);
        }
        assert_eq!(variable.kept.len(), 1);
    }
}

#[test]
fn stages_train_as_one_device_does_with_any_micro_batches_and_registers() {
    for case in cases() {
        let single = single(&case);
        for (stages, micro_batches, registers) in [(1, 4, 2), (2, 1, 1), (2, 4, 1), (2, 4, 2), (3, 8, 3)] {
            let pipeline = pipeline(&case, stages, &[1], Parallel::Auto, BATCH / micro_batches);
            let found = staged(&case, &pipeline, micro_batches, registers, &|n, body| run_threads(n, body));
            assert_alike(
                &case,
                &found,
                &single,
                &format!("{stages} stages, {micro_batches} micro-batches, {registers} registers"),
            );
        }
    }
}

#[test]
fn stages_of_several_devices_convert_between_their_forms() {
    for case in cases() {
        let single = single(&case);
        for parallel in [Parallel::Auto, Parallel::Data, Parallel::Model] {
            let pipeline = pipeline(&case, 2, &[2], parallel, BATCH / 2);
            let found = staged(&case, &pipeline, 2, 2, &|n, body| run_threads(n, body));
            assert_alike(&case, &found, &single, &format!("{parallel:?}"));
        }
    }
}

#[test]
fn stages_talk_over_tcp() {
    let case = Case::HybridGpt { vocab: 256, seq: 6, hidden: 8, heads: 4, layers: 2 };
    let single = single(&case);
    let pipeline = pipeline(&case, 2, &[2], Parallel::Auto, BATCH / 4);
    let ranks = |n: usize, body: &(dyn Fn(Communicator) -> Result<Trained> + Sync)| {
        run_over_loopback(n, &ClusterArgs::default(), body)
    };
    assert_alike(&case, &staged(&case, &pipeline, 4, 2, &ranks), &single, "tcp");
}

#[test]
fn weights_that_two_stages_read_have_the_gradients_of_both() {
    use kiln_compiler::builder::Builder;
    use kiln_compiler::{Boundary, Graph};
    use kiln_core::{Port, PortKind};
    // loss = mean((x w) w), the same w twice
    let mut builder = Builder::new(0);
    let x = builder.provided(&[4, 3], burn::tensor::DType::F32);
    let w = builder.provided(&[3, 3], burn::tensor::DType::F32);
    let hidden = builder.matmul(&x, &w).unwrap();
    let squared = builder.mul(&hidden, &hidden).unwrap();
    let y = builder.matmul(&squared, &w).unwrap();
    let rows = builder.reduce(&y, 0, burn::backend::ir::NumericOperationIr::SumDim).unwrap();
    let loss = builder.reduce(&rows, 1, burn::backend::ir::NumericOperationIr::SumDim).unwrap();
    let port = |name: &str, shape: &[usize]| Port {
        name: name.into(),
        kind: PortKind::Float,
        shape: shape.to_vec(),
    };
    let graph = Graph {
        kind: "tied".into(),
        inputs: vec![
            Boundary { port: port("x", &[4, 3]), tensor: x.id },
            Boundary { port: port("w", &[3, 3]), tensor: w.id },
        ],
        outputs: vec![Boundary { port: port("loss", &[1, 1]), tensor: loss.id }],
        operations: builder.operations,
        constants: builder.constants,
    };
    let value =
        burn::tensor::TensorData::new((0..9).map(|at| at as f32 / 10.0 - 0.3).collect::<Vec<_>>(), [3, 3]);
    let x =
        burn::tensor::TensorData::new((0..12).map(|at| (at % 5) as f32 / 5.0).collect::<Vec<_>>(), [4, 3]);
    let values = [("w".to_string(), value)].into();
    let logical = Logical::training(&graph, "loss", &values).unwrap();
    let whole = graph.gradient("loss", &["w"]).unwrap();
    let expected = whole.run(&[x.clone(), logical.variables[0].value.clone()]).unwrap();

    let placement = Placement::mesh(&[1]).unwrap();
    let cut_by = |pins: &[(String, usize)]| cut(&graph, &logical.variables, Some("loss"), 2, pins);
    let refusal = cut_by(&[("w".into(), 0), ("loss".into(), 0)]).unwrap_err().to_string();
    assert!(refusal.contains("no 2 consecutive stages fit w=0, loss=0"), "{refusal}");
    let refusal = cut_by(&[("v".into(), 0)]).unwrap_err().to_string();
    assert!(refusal.contains("no operation makes or reads a tensor \"v\""), "{refusal}");
    let refusal = cut_by(&[("w".into(), 2)]).unwrap_err().to_string();
    assert!(refusal.contains("the last of 2 stages is 1"), "{refusal}");
    let named = |tensor: &burn::backend::ir::TensorIr| format!("%{}", tensor.id.value());
    let stages = cut_by(&[(named(&hidden), 0), (named(&y), 1)]).unwrap();
    assert!(stages.edges.iter().any(|edge| edge.name == "w to stage 1"), "{:?}", stages.edges);
    let pipeline = Pipeline::compile(stages, &placement, |compiler, _| Ok(compiler)).unwrap();
    let options = Run { pieces: 1, optimiser: Optimiser { kind: Kind::Sgd, lr: 1.0 }, ..Run::default() };
    let flow = Flow { steps: 1, first: 0, run: options };
    let mut trained = run_threads(2, |world| {
        train(&pipeline, &world, &flow, &|_| Ok(vec![x.clone()]), &Context::new(), &|_| {})
    })
    .unwrap();
    let after = trained.swap_remove(0).variables.remove(0).value;
    let before = logical.variables[0].value.iter::<f32>();
    for ((after, before), gradient) in after.iter::<f32>().zip(before).zip(expected[1].iter::<f32>()) {
        assert!(
            (before - after - gradient).abs() < 1e-5,
            "{before} became {after}, the gradient is {gradient}"
        );
    }
}

#[test]
fn a_forward_pass_flows_through_stages() {
    let case = Case::HybridGpt { vocab: 64, seq: 6, hidden: 8, heads: 2, layers: 2 };
    let mut file = kiln_core::TensorFile::new();
    for (name, value) in case.initial(3) {
        file.insert(name, kiln_core::HostTensor::float(value.shape().to_vec(), value.iter().collect()));
    }
    let logical = Logical::of(case.predictor(4, file).unwrap().graph().unwrap()).unwrap();
    let tokens = burn::tensor::TensorData::new((0..24).map(|at| at % 64).collect::<Vec<i64>>(), [4, 6]);
    let expected = logical.graph.run(std::slice::from_ref(&tokens)).unwrap();
    for (stages, mesh) in [(2, vec![1]), (3, vec![1]), (2, vec![2])] {
        let placement = Placement::mesh(&mesh).unwrap();
        let cut = cut(&logical.graph, &[], None, stages, &[]).unwrap();
        let pipeline = Pipeline::compile(cut, &placement, |compiler, _| Ok(compiler)).unwrap();
        let options = Run { pieces: 5, checked: true, ..Run::default() };
        let ranks = run_threads(pipeline.ranks(), |world| {
            run(&pipeline, &world, &options, &|_| Ok(vec![tokens.clone()]))
        })
        .unwrap();
        let sent: u64 = ranks.iter().map(|(_, done)| done.bytes_sent).sum();
        assert_eq!(sent, 5 * pipeline.bytes());
        for (x, y) in ranks[0].0[0].iter::<f32>().zip(expected[0].iter::<f32>()) {
            assert!((x - y).abs() < 1e-5, "{stages} stages: {x}, must be {y}");
        }
    }
}

#[test]
fn a_stage_that_fails_ends_the_work_of_all() {
    let case = Case::Mlp { inputs: 64, hidden: 12, classes: 10 };
    let pipeline = pipeline(&case, 2, &[1], Parallel::Auto, 4);
    let examples = Examples::generated(&case);
    let flow = Flow { steps: 3, first: 0, run: Run { pieces: 2, optimiser: optimiser(), ..Run::default() } };
    let refusal = run_threads(2, |world| {
        let rank = world.rank();
        let feed = |piece: usize| {
            if rank == 1 && piece == 3 {
                return Err(kiln_core::Error::work("the disk is full"));
            }
            Ok(examples.batch(&case, 4, 1, piece as u64))
        };
        train(&pipeline, &world, &flow, &feed, &Context::new(), &|_| {})
    })
    .unwrap_err();
    assert!(refusal.to_string().contains("the disk is full"), "{refusal}");
}
