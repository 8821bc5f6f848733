//! Networks that are no case studies: captured, trained on any mesh, written back.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::backend::ir::{DimOpIr, NumericOperationIr as Numeric, OperationIr};
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{DType, Device, Tensor, TensorData, activation};
use kiln_cluster::run_threads;
use kiln_compiler::builder::Builder;
use kiln_compiler::{Boundary, Graph};
use kiln_core::testing::Desk;
use kiln_core::{HostTensor, Port, PortKind, System, TensorFile};
use kiln_data::{read_tensors, write_tensors};
use kiln_oneflow::network::Loss;
use kiln_oneflow::optimiser::{Kind, Optimiser};
use kiln_oneflow::{Case, GlobalModule, OneFlow, Parallel, Placement, Run};

const CASE: Case = Case::Mlp { inputs: 6, hidden: 8, classes: 3 };
const ROWS: usize = 40;

/// A desk with examples, an untrained classifier as a graph for 8 examples, and the same as a model.
fn desk() -> Desk {
    let mut desk = Desk::new(&OneFlow);
    desk.cx.networks = Some(|path, cx| OneFlow.network(path, cx));
    let mut rows = TensorFile::new();
    let x: Vec<f32> = (0..ROWS * 6).map(|at| ((at * 7) % 11) as f32 / 11.0).collect();
    rows.insert("x", HostTensor::float([ROWS, 6], x));
    rows.insert("y", HostTensor::int([ROWS], (0..ROWS as i64).map(|at| at % 3).collect()));
    write_tensors(&desk.path("rows.npz"), &rows).unwrap();
    rows.insert("y", HostTensor::float([ROWS, 3], (0..ROWS * 3).map(|at| (at % 5) as f32 / 5.0).collect()));
    write_tensors(&desk.path("numbers.npz"), &rows).unwrap();
    let mut weights = TensorFile::new();
    for (name, value) in CASE.initial(1) {
        weights.insert(name, HostTensor::float(value.shape().to_vec(), value.iter().collect()));
    }
    CASE.predictor(8, weights).unwrap().graph().unwrap().save(&desk.path("graph")).unwrap();
    desk.json("train --case mlp --inputs 6 --hidden 8 --classes 3 --batch 8 --steps 1 --data @rows.npz --mesh 1 --out @model");
    desk
}

fn losses(desk: &Desk, folder: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(desk.path(folder).join("log.csv")).unwrap();
    text.lines().skip(1).map(|line| line.split_once(',').unwrap().1.parse().unwrap()).collect()
}

fn assert_near(a: &[f64], b: &[f64], place: &str) {
    assert_eq!(a.len(), b.len(), "{place}");
    for (x, y) in a.iter().zip(b) {
        assert!((x - y).abs() <= 1e-4 * y.abs(), "{place}: {a:?}, must be {b:?}");
    }
}

#[test]
fn graphs_and_models_train_on_any_mesh_as_on_one_device() {
    let desk = desk();
    let more = "--optimiser sgd --lr 0.05 --steps 10";
    for (source, batch) in [("--graph @graph", ""), ("--model @model", "--batch 8")] {
        for data in ["rows", "numbers"] {
            let line = |out: &str, mesh: &str| {
                format!("train {source} {batch} --data @{data}.npz {more} --mesh {mesh} --out @{out}")
            };
            let name = |at: &str| format!("{}-{data}-{at}", &source[2..7]);
            desk.json(&line(&name("one"), "1"));
            let single = losses(&desk, &name("one"));
            assert!(single[9] < single[0], "{single:?}");
            for (at, mesh) in ["2", "2 --sbp data", "3 --sbp model", "2x2", "1 --stages 2", "2 --stages 2"]
                .iter()
                .enumerate()
            {
                let out = name(&at.to_string());
                let shown = desk.json(&line(&out, mesh));
                assert_eq!(shown["bytes_sent"], shown["bytes_predicted"], "{mesh}");
                assert_near(&losses(&desk, &out), &single, &format!("{source} {data} {mesh}"));
            }
        }
    }
    // Micro-batches of a graph's size make a batch of several.
    desk.json(&format!("train --model @model --batch 16 --data @rows.npz {more} --mesh 1 --out @whole"));
    desk.json(&format!("train --model @model --batch 16 --micro-batches 2 --stages 2 --data @rows.npz {more} --mesh 1 --out @parts"));
    assert_near(&losses(&desk, "parts"), &losses(&desk, "whole"), "micro-batches");
}

#[test]
fn what_was_trained_is_planned_run_predicted_and_resumed() {
    let desk = desk();
    let line = |out: &str, steps: usize, more: &str| {
        format!("train --graph @graph --data @rows.npz --mesh 2 --steps {steps} --out @{out} {more}")
    };
    desk.json(&line("whole", 12, ""));
    desk.json(&line("parts", 5, "--stages 2"));
    desk.json(&line("parts", 12, "--resume"));
    assert_near(&losses(&desk, "parts"), &losses(&desk, "whole"), "resumed");
    let graph = Graph::load(&desk.path("whole")).unwrap();
    assert_eq!(graph.inputs, Graph::load(&desk.path("graph")).unwrap().inputs);
    let predicted = desk.json("predict --graph @whole --data @rows.npz --out @scores.npz");
    assert_eq!(predicted["rows"], ROWS);
    assert!(predicted["accuracy"].as_f64().is_some());
    assert_eq!(read_tensors(&desk.path("scores.npz")).unwrap().get("scores").unwrap().shape, [ROWS, 3]);
    desk.json("plan --graph @whole --mesh 2x2");
    let planned = desk.json("plan --graph @whole --mesh 2 --stages 2");
    assert_eq!(planned["ranks"], 4);
    let run = desk.json("run --graph @whole --mesh 2 --stages 2 --pieces 3 --check --trace @t.svg");
    assert!(run["difference"].as_f64().unwrap() < 1e-5, "{run}");
    assert_eq!(run["bytes_sent"], run["bytes_predicted"]);

    // A model is written as a model of its own system.
    desk.json("train --model @model --data @rows.npz --batch 4 --steps 3 --mesh 2 --out @trained");
    assert_eq!(desk.json("predict --model @trained --data @rows.npz")["rows"], ROWS);
    let (before, after) = (
        TensorFile::read(&desk.path("model/model.safetensors")).unwrap(),
        TensorFile::read(&desk.path("trained/model.safetensors")).unwrap(),
    );
    for (name, tensor) in before.iter() {
        assert_eq!(after.get(name).unwrap().shape, tensor.shape);
        assert_ne!(after.get(name).unwrap().as_floats(), tensor.as_floats(), "{name}");
    }
    desk.json(
        "train --model @model --data @rows.npz --batch 4 --steps 3 --mesh 2 --freeze hidden --out @frozen",
    );
    let frozen = TensorFile::read(&desk.path("frozen/model.safetensors")).unwrap();
    assert_eq!(
        frozen.get("hidden.weight").unwrap().as_floats(),
        before.get("hidden.weight").unwrap().as_floats()
    );
    assert_ne!(
        frozen.get("head.weight").unwrap().as_floats(),
        before.get("head.weight").unwrap().as_floats()
    );
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let desk = desk();
    let line = |data: &str, more: &str| format!("train --graph @graph --data @{data} --out @bad {more}");
    let write = |name: &str, x: HostTensor, y: Option<HostTensor>| {
        let mut rows = TensorFile::new();
        rows.insert("x", x);
        if let Some(y) = y {
            rows.insert("y", y);
        }
        write_tensors(&desk.path(name), &rows).unwrap();
    };
    let x = |width: usize| HostTensor::float([4, width], vec![0.5; 4 * width]);
    write("classes.npz", x(6), Some(HostTensor::int([4], vec![0, 1, 3, 2])));
    desk.assert_refused(&line("classes.npz", ""), "\"y\" is 3 in row 2, but there are 3 classes");
    write("wide.npz", x(7), Some(HostTensor::int([4], vec![0; 4])));
    desk.assert_refused(&line("wide.npz", ""), "\"x\" has the shape [4, 7]");
    write("lost.npz", x(6), None);
    desk.assert_refused(&line("lost.npz", ""), "has no array \"y\"");
    write("short.npz", x(6), Some(HostTensor::int([3], vec![0; 3])));
    desk.assert_refused(&line("short.npz", ""), "but there are 4 rows");
    write("few.npz", x(6), Some(HostTensor::float([4, 2], vec![0.0; 8])));
    desk.assert_refused(&line("few.npz", ""), "\"y\" has the shape [4, 2]");
    write(
        "broken.npz",
        HostTensor::float([4, 6], vec![f32::NAN; 24]),
        Some(HostTensor::int([4], vec![0; 4])),
    );
    desk.assert_refused(&line("broken.npz", ""), "\"x\" is NaN in row 0");
    write("floats.npz", x(6), Some(HostTensor::float([4], vec![1.0; 4])));
    desk.assert_refused(&line("floats.npz", "--loss cross-entropy"), "holds floats");
    desk.assert_refused(&line("rows.npz", "--batch 9"), "written for 8 examples at once");
    desk.assert_refused(&line("rows.npz", "--freeze nothing"), "no weight's name begins with \"nothing\"");
    desk.assert_refused(
        "train --model @model --data @rows.npz --freeze hidden --freeze head --out @bad",
        "nothing is left to train",
    );
    desk.assert_refused(&line("rows.npz", "--output odds"), "no output \"odds\"");
    desk.assert_refused(&line("rows.npz", "--resume"), "nothing to go on from");
    desk.assert_refused(&line("rows.npz", "--stages 99"), "--stages is 99");
    desk.assert_refused(&line("rows.npz", "--stages 40"), "cannot be cut into 40 stages");
    desk.assert_refused(&line("rows.npz", "--stages 2 --registers 0"), "--registers of at least 1");
    desk.assert_refused(&line("rows.npz", "--stage x=0"), "no use without --stages");
    desk.assert_refused(&line("rows.npz", "--micro-batches 0"), "--micro-batches is 0");
    desk.assert_refused(&line("rows.npz", "--case mlp"), "one of --case, --model and --graph");
    desk.assert_refused("train --graph @graph --out @bad", "--data is needed");
    desk.assert_refused("train --case mlp --micro-batches 3 --out @bad", "64 cannot be cut into 3");
    desk.assert_refused("train --case mlp --loss squared --out @bad", "for --model and --graph");
    assert!(!desk.path("bad/graph.json").exists());

    // A product along an axis has no derivative here.
    let mut builder = Builder::new(0);
    let input = builder.provided(&[4, 6], DType::F32);
    let weight = builder.constant(TensorData::new(vec![0.5f32; 36], [6, 6]));
    let hidden = builder.matmul(&input, &weight).unwrap();
    let product = |id| {
        OperationIr::NumericFloat(DType::F32, Numeric::CumProd(DimOpIr::create(hidden.clone(), 1, || id)))
    };
    let out = builder.other(product).unwrap();
    let port = |name: &str| Port { name: name.into(), kind: PortKind::Float, shape: vec![4, 6] };
    let graph = Graph {
        kind: "odd".into(),
        inputs: vec![Boundary { port: port("x"), tensor: input.id }],
        outputs: vec![Boundary { port: port("out"), tensor: out.id }],
        operations: builder.operations,
        constants: builder.constants,
    };
    graph.save(&desk.path("odd")).unwrap();
    write("odd.npz", x(6), Some(HostTensor::float([4, 6], vec![0.0; 24])));
    desk.assert_refused("train --graph @odd --data @odd.npz --out @bad", "without a derivative: CumProd");
}

#[derive(Module, Debug)]
struct Net {
    hidden: Linear,
    head: Linear,
}

impl Net {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.head.forward(activation::relu(self.hidden.forward(x)))
    }
}

#[test]
fn a_burn_module_runs_and_trains_on_a_placement() {
    let device = Device::flex();
    let net =
        Net { hidden: LinearConfig::new(5, 7).init(&device), head: LinearConfig::new(7, 3).init(&device) };
    let x = TensorData::new((0..20).map(|at| at as f32 / 20.0).collect::<Vec<_>>(), [4, 5]);
    let expected: Vec<f32> = net.forward(Tensor::from_data(x.clone(), &device)).into_data().iter().collect();
    let y = TensorData::new(vec![0i64, 1, 2, 0], [4, 1]);
    let mut losses: Vec<Vec<f32>> = Vec::new();
    for (mesh, parallel) in
        [(vec![1], Parallel::Auto), (vec![2], Parallel::Data), (vec![2, 2], Parallel::Auto)]
    {
        let placement = Placement::mesh(&mesh).unwrap();
        let mut module =
            GlobalModule::wrap(net.clone(), [4, 5], Net::forward, &placement).unwrap().parallel(parallel);
        let outputs = run_threads(placement.len(), |world| module.forward(&world, &x)).unwrap();
        for output in outputs {
            for (a, b) in output.iter::<f32>().zip(&expected) {
                assert!((a - b).abs() < 1e-5, "{mesh:?}: {a}, must be {b}");
            }
        }
        let run = Run { pieces: 5, optimiser: Optimiser { kind: Kind::Sgd, lr: 0.1 }, ..Run::default() };
        let feed = |_: usize| Ok(vec![x.clone(), y.clone()]);
        let trained =
            run_threads(placement.len(), |world| module.train(&world, Loss::CrossEntropy, &run, &feed))
                .unwrap();
        losses.push(trained[0].losses.clone());
        module.set(&trained[0].variables);
        let after = module.weights().into_module(net.clone()).unwrap();
        assert_ne!(
            after.head.weight.val().into_data().iter::<f32>().collect::<Vec<_>>(),
            net.head.weight.val().into_data().iter::<f32>().collect::<Vec<_>>()
        );
    }
    for found in &losses[1..] {
        for (a, b) in found.iter().zip(&losses[0]) {
            assert!((a - b).abs() <= 1e-4 * b.abs(), "{losses:?}");
        }
    }
}
