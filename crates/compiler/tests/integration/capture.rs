//! A small network with a mask, captured, printed, saved and loaded.

use burn::backend::DispatchTensor;
use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::activation::relu;
use burn::tensor::{Bool, DType, Device, Tensor};
use kiln_compiler::{Graph, capture};
use kiln_core::{Network, Port, PortKind};

#[derive(Module, Debug)]
struct Mlp {
    hidden: Linear,
    out: Linear,
}

#[derive(Clone)]
struct Trained(Mlp);

impl Trained {
    fn new() -> Self {
        let device = Device::flex();
        Self(Mlp {
            hidden: LinearConfig::new(3, 8).init(&device),
            out: LinearConfig::new(8, 2).init(&device),
        })
    }

    fn run(&self, x: Tensor<2>) -> Tensor<2> {
        let y = self.0.out.forward(relu(self.0.hidden.forward(x)));
        let mask = Tensor::<2, Bool>::tril_mask([4, 2], 0, &y.device());
        y.mask_fill(mask, f32::NEG_INFINITY)
    }
}

impl Network for Trained {
    fn kind(&self) -> &str {
        "mlp"
    }

    fn inputs(&self) -> Vec<Port> {
        vec![Port { name: "x".into(), kind: PortKind::Float, shape: vec![4, 3] }]
    }

    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape: vec![4, 2] }]
    }

    fn move_to(&mut self, device: &Device) {
        self.0 = self.0.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let inputs = inputs.into_iter().map(Tensor::from_dispatch);
        inputs.map(|x| self.run(x).into_dispatch()).collect()
    }
}

#[test]
fn a_network_becomes_operations_between_ports_with_its_parameters_as_constants() {
    let network = Trained::new();
    let weight = network.0.hidden.weight.val().into_data();
    let graph = capture(Box::new(network)).unwrap();

    let counts = graph.operation_counts().unwrap();
    assert_eq!((counts["Matmul"], counts["Relu"], counts["MaskFill"]), (2, 1, 1), "{counts:?}");
    assert!(!counts.contains_key("Init"), "{counts:?}");
    assert_eq!(graph.inputs[0].tensor.value(), 0);
    assert_eq!(graph.outputs[0].port.name, "logits");

    let last = graph.operations.last().unwrap().outputs().next().unwrap();
    assert_eq!((last.id, last.dtype), (graph.outputs[0].tensor, DType::F32));
    assert_eq!(last.shape.to_vec(), [4, 2]);

    let mut shapes: Vec<Vec<usize>> = graph
        .constants
        .values()
        .filter(|data| data.dtype() == DType::F32)
        .map(|data| data.shape().to_vec())
        .collect();
    shapes.sort();
    assert_eq!(shapes, [vec![2], vec![3, 8], vec![8], vec![8, 2]]);
    assert!(graph.constants.values().any(|data| *data == weight));
}

#[test]
fn two_captures_of_a_network_are_equal() {
    let network = Trained::new();
    let graph = capture(Box::new(network.clone())).unwrap();
    assert_eq!(graph, capture(Box::new(network)).unwrap());
}

#[test]
fn printing_shows_shapes_operands_and_attributes() {
    let text = capture(Box::new(Trained::new())).unwrap().to_text().unwrap();
    assert!(text.starts_with("%0: f32[4, 3] = input \"x\"\n"), "{text}");
    assert!(text.contains(": f32[3, 8] = constant"), "{text}");
    assert!(text.contains(": f32[4, 8] = Matmul(%0, %"), "{text}");
    assert!(text.contains(", value=-inf)\n"), "{text}");
    assert!(text.ends_with(&format!("output \"logits\" = %{}\n", last_number(&text))), "{text}");
}

fn last_number(text: &str) -> &str {
    let line = text.lines().rfind(|line| line.starts_with('%')).expect("a graph has operations");
    line.trim_start_matches('%').split(':').next().expect("split gives at least one part")
}

#[test]
fn a_saved_graph_with_an_infinite_scalar_loads_equal() {
    let dir = tempfile::tempdir().unwrap();
    let graph = capture(Box::new(Trained::new())).unwrap();
    graph.save(dir.path()).unwrap();
    assert!(std::fs::read_to_string(dir.path().join("graph.json")).unwrap().contains("-inf"));
    assert_eq!(Graph::load(dir.path()).unwrap(), graph);
}

#[test]
fn broken_folders_are_refused_with_the_file_named() {
    let dir = tempfile::tempdir().unwrap();
    let error = |place: &std::path::Path| Graph::load(place).unwrap_err().to_string();
    assert!(error(dir.path()).contains("graph.json"));

    capture(Box::new(Trained::new())).unwrap().save(dir.path()).unwrap();
    let constants = dir.path().join("constants.safetensors");
    let whole = std::fs::read(&constants).unwrap();
    std::fs::write(&constants, &whole[..whole.len() - 1]).unwrap();
    assert!(error(dir.path()).contains("constants.safetensors"));
    std::fs::write(&constants, b"\x02\0\0\0\0\0\0\0{}").unwrap();
    assert!(error(dir.path()).contains("is read before it is there"));
    std::fs::write(dir.path().join("graph.json"), "{}").unwrap();
    assert!(error(dir.path()).contains("graph.json"));
}
