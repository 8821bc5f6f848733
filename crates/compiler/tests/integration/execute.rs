//! Graphs run as their networks do, before and after passes.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::LazyLock;

use burn::backend::DispatchTensor;
use burn::module::{Module, Param};
use burn::nn::conv::{Conv2d, Conv2dConfig};
use burn::nn::{LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::tensor::activation::{gelu, softmax};
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use kiln_compiler::{Graph, GraphPass, capture};
use kiln_core::{Network, Port, PortKind};

/// A bit of everything: a convolution, a norm, attention by hand, a table that is looked up, and needless work.
#[derive(Module, Debug)]
struct Mixed {
    conv: Conv2d,
    norm: LayerNorm,
    out: Linear,
    table: Param<Tensor<2>>,
}

#[derive(Clone)]
struct Trained(Mixed);

/// One draw for all tests: Burn's generator is shared between threads.
static TRAINED: LazyLock<Trained> = LazyLock::new(Trained::new);

impl Trained {
    fn new() -> Self {
        let device = Device::flex();
        let table = Tensor::random([5, 6], Distribution::Normal(0.0, 1.0), &device);
        Self(Mixed {
            conv: Conv2dConfig::new([2, 6], [3, 3]).init(&device),
            norm: LayerNormConfig::new(6).init(&device),
            out: LinearConfig::new(6, 3).init(&device),
            table: Param::from_tensor(table),
        })
    }

    fn run(&self, x: Tensor<4>, ids: Tensor<2, Int>) -> Tensor<3> {
        let table = self.0.table.val();
        let rows = table.clone().select(0, ids.clone().reshape([8])).reshape([2, 4, 6]);
        let again = table.clone().select(0, ids.reshape([8])).reshape([2, 4, 6]);
        let _unused = table.exp();
        let maps = gelu(self.0.conv.forward(x)).reshape([2, 6, 4]).swap_dims(1, 2) + rows + again;
        let x = self.0.norm.forward(maps);
        let scores = softmax(x.clone().matmul(x.clone().transpose()) / 6f64.sqrt(), 2);
        let mixed = scores.matmul(x.clone());
        self.0.out.forward(mixed.clone() * mixed + x)
    }
}

impl Network for Trained {
    fn kind(&self) -> &str {
        "mixed"
    }

    fn inputs(&self) -> Vec<Port> {
        vec![
            Port { name: "x".into(), kind: PortKind::Float, shape: vec![2, 2, 4, 4] },
            Port { name: "ids".into(), kind: PortKind::Int, shape: vec![2, 4] },
        ]
    }

    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "y".into(), kind: PortKind::Float, shape: vec![2, 4, 3] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.0 = self.0.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let mut inputs = inputs.into_iter();
        let (x, ids) = (inputs.next().unwrap(), inputs.next().unwrap());
        vec![self.run(Tensor::from_dispatch(x), Tensor::from_dispatch(ids)).into_dispatch()]
    }
}

fn inputs() -> (Vec<TensorData>, Tensor<3>) {
    let device = Device::flex();
    let x = Tensor::<4>::random([2, 2, 4, 4], Distribution::Normal(0.0, 1.0), &device);
    let ids = Tensor::<2, Int>::from_data(TensorData::new(vec![0i64, 1, 2, 3, 4, 3, 2, 1], [2, 4]), &device);
    let y = TRAINED.run(x.clone(), ids.clone());
    (vec![x.into_data(), ids.into_data()], y)
}

fn assert_computes(graph: &Graph, inputs: &[TensorData], expected: &Tensor<3>) {
    let found = graph.run(inputs).unwrap().remove(0);
    let found = Tensor::<3>::from_data(found, &Device::flex());
    let gap = (found - expected.clone()).abs().max().into_scalar::<f32>();
    assert!(gap < 1e-5, "{gap}");
}

#[test]
fn a_graph_computes_what_its_network_computes_as_often_as_it_is_asked() {
    let graph = capture(Box::new(TRAINED.clone())).unwrap();
    graph.verify().unwrap();
    for _ in 0..2 {
        let (inputs, expected) = inputs();
        assert_computes(&graph, &inputs, &expected);
    }
}

#[test]
fn passes_in_any_order_keep_the_outputs_and_a_second_time_change_nothing() {
    let whole = capture(Box::new(TRAINED.clone())).unwrap();
    let (inputs, expected) = inputs();
    let [fold, cse, dce] = GraphPass::ALL;
    for order in [
        [fold, cse, dce],
        [fold, dce, cse],
        [cse, fold, dce],
        [cse, dce, fold],
        [dce, fold, cse],
        [dce, cse, fold],
    ] {
        let mut graph = whole.clone();
        order.iter().for_each(|pass| pass.apply(&mut graph).unwrap());
        assert_computes(&graph, &inputs, &expected);
        let once = graph.clone();
        order.iter().for_each(|pass| pass.apply(&mut graph).unwrap());
        order.iter().for_each(|pass| pass.apply(&mut graph).unwrap());
        assert!(graph.operations.len() <= once.operations.len());
        assert_computes(&graph, &inputs, &expected);
    }
    let count = |graph: &Graph, name: &str| graph.operation_counts().unwrap().get(name).copied().unwrap_or(0);
    let mut graph = whole.clone();
    GraphPass::ALL.iter().for_each(|pass| pass.apply(&mut graph).unwrap());
    assert_eq!((count(&whole, "Exp"), count(&graph, "Exp")), (1, 0));
    assert_eq!((count(&whole, "Select"), count(&graph, "Select")), (2, 1));
    assert!(graph.operations.len() < whole.operations.len() - 3);
    for pass in GraphPass::ALL {
        let before = graph.clone();
        pass.apply(&mut graph).unwrap();
        assert_eq!(graph, before, "{pass:?}");
        assert_eq!(GraphPass::parse(&pass.name()).unwrap(), pass);
    }
    assert!(GraphPass::parse("fuse").unwrap_err().to_string().contains("no pass \"fuse\""));
}

#[test]
fn drawings_show_every_operation_and_mark_the_output() {
    let graph = capture(Box::new(TRAINED.clone())).unwrap();
    let svg = graph.to_svg().unwrap();
    for (name, count) in graph.operation_counts().unwrap() {
        if name != "Drop" {
            assert_eq!(svg.matches(&format!(">{name}</text>")).count(), count, "{name}");
        }
    }
    assert_eq!(svg.matches("#c0392b").count(), 1);
}

#[test]
fn inputs_that_do_not_fit_and_graphs_that_do_not_hold_are_refused() {
    let mut graph = capture(Box::new(TRAINED.clone())).unwrap();
    let (inputs, _) = inputs();
    let refusal = |inputs: &[TensorData]| graph.run(inputs).unwrap_err().to_string();
    assert!(refusal(&inputs[..1]).contains("1 inputs for a graph of 2"));
    let swapped = [inputs[1].clone(), inputs[0].clone()];
    assert!(
        refusal(&swapped).contains("input \"x\": is I32[2, 4], must be F32[2, 2, 4, 4]"),
        "{}",
        refusal(&swapped)
    );
    let mut damaged = graph.clone();
    let x = damaged.inputs.remove(0);
    damaged.constants.insert(x.tensor, TensorData::zeros::<f32, _>([3]));
    let refusal = GraphPass::FoldConstants.apply(&mut damaged).unwrap_err().to_string();
    assert!(refusal.contains("of the mixed graph does not fit its operands"), "{refusal}");
    graph.operations.swap(0, 9);
    assert!(GraphPass::Dce.apply(&mut graph).unwrap_err().to_string().contains("before it is there"));
}
