//! Files that are not as they should be, and numbers that stand elsewhere.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::TensorData;
use prost::Message;

use super::OnnxOptions;
use super::proto::{
    AttributeProto, DimensionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto,
    StringStringEntryProto, TensorProto, TensorShapeProto, TensorTypeProto, TypeProto, ValueInfoProto,
    data_type,
};
use crate::Graph;

fn node(operator: &str, name: &str, inputs: &[&str], output: &str) -> NodeProto {
    NodeProto {
        op_type: operator.into(),
        name: name.into(),
        input: inputs.iter().map(|name| name.to_string()).collect(),
        output: vec![output.into()],
        ..NodeProto::default()
    }
}

fn value(name: &str, shape: &[i64]) -> ValueInfoProto {
    let dim = shape.iter().map(|&size| match size {
        -1 => DimensionProto { dim_value: None, dim_param: Some("batch".into()) },
        size => DimensionProto { dim_value: Some(size), dim_param: None },
    });
    let shape = Some(TensorShapeProto { dim: dim.collect() });
    let tensor_type = Some(TensorTypeProto { elem_type: data_type::FLOAT, shape });
    ValueInfoProto { name: name.into(), r#type: Some(TypeProto { tensor_type }) }
}

fn floats(name: &str, shape: &[i64], values: &[f32]) -> TensorProto {
    TensorProto {
        name: name.into(),
        dims: shape.to_vec(),
        data_type: data_type::FLOAT,
        float_data: values.to_vec(),
        ..TensorProto::default()
    }
}

/// Nodes from `x` to `y`.
fn model(x: &[i64], node: Vec<NodeProto>, initializer: Vec<TensorProto>) -> ModelProto {
    let (input, output) = (vec![value("x", x)], vec![value("y", &[])]);
    ModelProto {
        ir_version: 8,
        producer_name: "test".into(),
        graph: Some(GraphProto { node, name: "g".into(), initializer, input, output }),
        opset_import: vec![OperatorSetIdProto { domain: String::new(), version: 17 }],
    }
}

fn read(model: &ModelProto) -> Result<Graph, String> {
    Graph::from_onnx_bytes(&model.encode_to_vec(), &OnnxOptions::default())
        .map_err(|error| format!("{error}\n{}", error.hint_text().unwrap_or("")))
}

fn run(graph: &Graph, x: Vec<f32>) -> Vec<f32> {
    let shape = graph.inputs[0].port.shape.clone();
    graph.run(&[TensorData::new(x, shape)]).unwrap()[0].iter::<f32>().collect()
}

#[test]
fn all_operators_that_are_not_known_are_named_with_their_nodes() {
    let nodes = vec![
        node("Relu", "a", &["x"], "b"),
        node("LSTM", "memory", &["b"], "c"),
        node("Relu", "d", &["c"], "e"),
        node("Einsum", "", &["e"], "f"),
        node("LSTM", "more", &["f"], "y"),
    ];
    let said = read(&model(&[2], nodes, vec![])).unwrap_err();
    assert!(said.contains("Einsum (nodes number 3); LSTM (nodes memory, more)"), "{said}");
}

#[test]
fn nodes_may_stand_in_any_order_but_not_in_a_circle() {
    let late = vec![node("Neg", "second", &["a"], "y"), node("Exp", "first", &["x"], "a")];
    assert_eq!(run(&read(&model(&[2], late, vec![])).unwrap(), vec![0.0, 1.0]), [-1.0, -1f32.exp()]);
    let circle = vec![
        node("Add", "one", &["x", "b"], "a"),
        node("Neg", "two", &["a"], "b"),
        node("Neg", "", &["b"], "y"),
    ];
    let said = read(&model(&[2], circle, vec![])).unwrap_err();
    assert!(said.contains("node \"one\" (Add) depends on its own result"), "{said}");
    let nothing = vec![node("Neg", "n", &["z"], "y")];
    let said = read(&model(&[2], nothing, vec![])).unwrap_err();
    assert!(said.contains("node \"n\" (Neg) reads \"z\", which nothing provides"), "{said}");
}

#[test]
fn a_node_that_does_not_fit_its_operands_is_named_with_their_shapes() {
    let nodes = vec![node("MatMul", "product", &["x", "w"], "y")];
    let said = read(&model(&[2, 3], nodes, vec![floats("w", &[4, 1], &[1.0; 4])])).unwrap_err();
    assert!(said.contains("node \"product\" (MatMul): [2, 3] and [4, 1] have no matrix product"), "{said}");
    assert!(said.contains("its inputs are f32[2, 3], f32[4, 1]"), "{said}");
    let nodes = vec![node("Conv", "c", &["x", "w"], "y")];
    let said = read(&model(&[1, 1, 2, 2], nodes, vec![floats("w", &[1, 1, 3, 3], &[1.0; 9])])).unwrap_err();
    assert!(said.contains("its window of 3 does not fit into 2 along axis 2"), "{said}");
}

#[test]
fn shapes_beyond_all_measure_are_refused_before_anything_is_allocated() {
    let mut shape = TensorProto { int64_data: vec![1 << 40, 1 << 20], ..floats("s", &[2], &[]) };
    shape.data_type = data_type::INT64;
    let said = read(&model(&[1], vec![node("Expand", "e", &["x", "s"], "y")], vec![shape])).unwrap_err();
    assert!(said.contains("is too large"), "{said}");
    let short = floats("w", &[1 << 40], &[1.0]);
    let said = read(&model(&[1], vec![node("Add", "a", &["x", "w"], "y")], vec![short])).unwrap_err();
    assert!(said.contains("\"w\" has 4 bytes of elements"), "{said}");
    let said = read(&model(&[1], vec![node("Neg", "a", &["x"], "y")], vec![floats("w", &[-1], &[])]));
    assert!(said.is_ok(), "what nothing reads does not matter");
}

#[test]
fn open_sizes_are_one_unless_they_are_given() {
    let bytes = model(&[-1, 2], vec![node("Neg", "", &["x"], "y")], vec![]).encode_to_vec();
    let shape = |name: &str| {
        let dims = [(name.to_string(), 3)].into_iter().filter(|(name, _)| !name.is_empty()).collect();
        Graph::from_onnx_bytes(&bytes, &OnnxOptions { dims }).map(|graph| graph.outputs[0].port.shape.clone())
    };
    assert_eq!(shape("").unwrap(), [1, 2]);
    assert_eq!(shape("batch").unwrap(), [3, 2]);
    assert_eq!(shape("x.0").unwrap(), [3, 2]);
    assert_eq!(shape("x.1").unwrap_err().hint_text(), Some("open are: batch, x.0"));
}

#[test]
fn numbers_beside_the_model_are_read_within_their_bounds_and_from_its_folder_only() {
    let folder = tempfile::tempdir().unwrap();
    let numbers: Vec<u8> = [9f32, 1.0, 2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
    std::fs::write(folder.path().join("numbers.bin"), numbers).unwrap();
    let open = |location: &str, offset: &str, length: &str| {
        let entry = |key: &str, value: &str| StringStringEntryProto { key: key.into(), value: value.into() };
        let external_data =
            vec![entry("location", location), entry("offset", offset), entry("length", length)];
        let weight = TensorProto { external_data, data_location: 1, ..floats("w", &[2], &[]) };
        let model = model(&[2], vec![node("Add", "a", &["x", "w"], "y")], vec![weight]);
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, model.encode_to_vec()).unwrap();
        Graph::from_onnx(&path, &OnnxOptions::default()).map_err(|error| error.to_string())
    };
    assert_eq!(run(&open("numbers.bin", "4", "8").unwrap(), vec![1.0, 1.0]), [2.0, 3.0]);
    let bytes = std::fs::read(folder.path().join("model.onnx")).unwrap();
    let alone = Graph::from_onnx_bytes(&bytes, &OnnxOptions::default()).unwrap_err().to_string();
    assert!(alone.contains("no folder to look in"), "{alone}");
    for (location, offset, length, words) in [
        ("numbers.bin", "8", "8", "which has 12"),
        ("numbers.bin", "18446744073709551615", "8", "which has 12"),
        ("numbers.bin", "4", "12", "another length"),
        ("numbers.bin", "four", "8", "\"four\" as its offset"),
        ("../numbers.bin", "0", "8", "not in the model's folder"),
        ("/etc/hostname", "0", "8", "not in the model's folder"),
        ("none.bin", "0", "8", "cannot be read"),
    ] {
        let said = open(location, offset, length).unwrap_err();
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn half_bytes_are_unpacked_the_lower_one_first_and_signed() {
    let weight =
        |data_type: i32| TensorProto { raw_data: vec![0x8f, 0x07], data_type, ..floats("w", &[3], &[]) };
    let scale = floats("s", &[], &[0.5]);
    let nodes = || vec![node("DequantizeLinear", "", &["w", "s"], "d"), node("Add", "", &["x", "d"], "y")];
    let signed = model(&[3], nodes(), vec![weight(data_type::INT4), scale.clone()]);
    assert_eq!(run(&read(&signed).unwrap(), vec![0.0; 3]), [-0.5, -4.0, 3.5]);
    let unsigned = model(&[3], nodes(), vec![weight(data_type::UINT4), scale]);
    assert_eq!(run(&read(&unsigned).unwrap(), vec![0.0; 3]), [7.5, 4.0, 3.5]);
}

#[test]
fn shape_arithmetic_leaves_no_operation_behind() {
    let axis = |at: i64| AttributeProto { name: "axis".into(), i: at, kind: 2, ..AttributeProto::default() };
    let ints = |name: &str, shape: &[i64], values: &[i64]| TensorProto {
        int64_data: values.to_vec(),
        data_type: data_type::INT64,
        ..floats(name, shape, &[])
    };
    let mut gather = node("Gather", "", &["shape", "first"], "n");
    gather.attribute.push(axis(0));
    let mut concat = node("Concat", "", &["rows", "rest"], "to");
    concat.attribute.push(axis(0));
    let nodes = vec![
        node("Shape", "", &["x"], "shape"),
        gather,
        node("Unsqueeze", "", &["n", "zero"], "rows"),
        concat,
        node("Reshape", "", &["x", "to"], "y"),
    ];
    let numbers = vec![ints("first", &[], &[0]), ints("zero", &[1], &[0]), ints("rest", &[1], &[-1])];
    let graph = read(&model(&[2, 3, 4], nodes, numbers)).unwrap();
    assert_eq!((graph.operations.len(), graph.constants.len()), (1, 0));
    assert_eq!(graph.outputs[0].port.shape, [2, 12]);
}
