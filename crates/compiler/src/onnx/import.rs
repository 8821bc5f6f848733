//! From a file's nodes to a graph.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use burn::backend::ir::{TensorIr, TensorStatus};
use burn::tensor::{DType, TensorData};
use kiln_core::{Error, Port, PortKind, Result};
use prost::Message;

use super::OnnxOptions;
use super::operators::{self, Rule};
use super::proto::{
    AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, attribute,
};
use super::tensor;
use crate::builder::{Builder, Fit};
use crate::{Boundary, Graph, GraphPass, quiet};

/// The oldest set of operators whose meanings are known here.
const OLDEST: i64 = 9;
/// The newest.
const NEWEST: i64 = 22;

impl Graph {
    /// Reads an ONNX file. Numbers that stand in other files are looked for in its folder.
    ///
    /// # Errors
    /// When the file is damaged, has operators that are not known (all are named), a node's operands do not fit it, or
    /// an option names a size that is not there.
    pub fn from_onnx(path: &Path, options: &OnnxOptions) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io("read", path))?;
        let folder = path.parent().unwrap_or(Path::new(""));
        import(&bytes, Some(folder), options, &path.display().to_string())
    }

    /// Reads the bytes of an ONNX file that has all its numbers in itself.
    ///
    /// # Errors
    /// As [`from_onnx`](Self::from_onnx).
    pub fn from_onnx_bytes(bytes: &[u8], options: &OnnxOptions) -> Result<Self> {
        import(bytes, None, options, "the ONNX model")
    }
}

fn import(bytes: &[u8], folder: Option<&Path>, options: &OnnxOptions, file: &str) -> Result<Graph> {
    let wrong = |found: String| Error::input(file, found);
    let model =
        ModelProto::decode(bytes).map_err(|e| wrong("is not a complete ONNX file".into()).caused_by(e))?;
    let Some(proto) = model.graph else { return Err(wrong("is not an ONNX file: it holds no graph".into())) };
    let opset = model.opset_import.iter().find(|set| set.domain.is_empty() || set.domain == "ai.onnx");
    let opset = opset.map_or(1, |set| set.version);
    if !(OLDEST..=NEWEST).contains(&opset) {
        return Err(wrong(format!("has operators of set {opset}"))
            .hint(format!("sets {OLDEST} to {NEWEST} are read; export the model again with another one")));
    }
    let rules = rules(&proto).map_err(|unknown| {
        wrong(format!("has operators that are not known: {unknown}"))
            .hint(format!("known are: {}", operators::known_operators().join(", ")))
    })?;

    let mut builder = Builder::new(0);
    builder.known = true;
    // A node that is a constant is a parameter by another way of writing.
    let constants = proto.node.iter().filter_map(constant_node);
    let initializers =
        proto.initializer.iter().map(|tensor| (tensor.name.as_str(), tensor)).chain(constants).collect();
    let mut importer = Importer { builder, opset, folder, initializers, values: HashMap::new() };
    let inputs = importer.inputs(&proto, options).map_err(|(found, hint)| wrong(found).hint(hint))?;
    let mut unsure = None;
    for at in order(&proto).map_err(wrong)? {
        let node = &proto.node[at];
        let called = called(node, at);
        let results = quiet::catch_panic(|| rules[at](&mut importer, node)).and_then(|results| results);
        let results = results.map_err(|found| {
            let shapes = importer.shapes(node);
            wrong(format!("{called}: {found}")).hint(format!("its inputs are {shapes}"))
        })?;
        for (name, value) in node.output.iter().zip(results).filter(|(name, _)| !name.is_empty()) {
            let id = value.id;
            if importer.values.insert(name.clone(), value).is_some_and(|before| before.id != id) {
                return Err(wrong(format!("{called} computes \"{name}\", which is there already")));
            }
        }
        unsure = unsure
            .or(node.output.iter().find(|name| !name.is_empty() && !importer.values.contains_key(*name)));
    }
    if let Some(name) = unsure {
        return Err(wrong(format!("an output \"{name}\" of a node is not computed here")));
    }
    let outputs = importer.outputs(&proto).map_err(wrong)?;
    let kind = if model.producer_name == "kiln" { proto.name } else { "onnx".into() };
    let Builder { operations, constants, .. } = importer.builder;
    let mut graph = Graph { kind, inputs, outputs, operations, constants };
    GraphPass::Dce.apply(&mut graph)?;
    Ok(graph)
}

/// The tensor of a node that is one, under its name.
fn constant_node(node: &NodeProto) -> Option<(&str, &TensorProto)> {
    let tensor = find(node, "value").and_then(|attribute| attribute.t.as_ref())?;
    let name = node.output.first()?;
    (node.op_type == "Constant").then_some((name.as_str(), tensor))
}

/// How a node is called in messages.
fn called(node: &NodeProto, at: usize) -> String {
    let name = if node.name.is_empty() { format!("number {at}") } else { format!("\"{}\"", node.name) };
    format!("node {name} ({})", node.op_type)
}

/// What is done with each node, or all operators for which that is not known.
fn rules(proto: &GraphProto) -> Result<Vec<Rule>, String> {
    let mut unknown = BTreeMap::<String, Vec<String>>::new();
    let mut rules = Vec::new();
    for (at, node) in proto.node.iter().enumerate() {
        match operators::rule(&node.domain, &node.op_type) {
            Some(rule) => rules.push(rule),
            None => {
                let domain = if node.domain.is_empty() { String::new() } else { format!("{}.", node.domain) };
                let name = if node.name.is_empty() { format!("number {at}") } else { node.name.clone() };
                unknown.entry(format!("{domain}{}", node.op_type)).or_default().push(name);
            }
        }
    }
    let told = |(operator, nodes): (String, Vec<String>)| format!("{operator} (nodes {})", nodes.join(", "));
    if unknown.is_empty() {
        Ok(rules)
    } else {
        Err(unknown.into_iter().map(told).collect::<Vec<_>>().join("; "))
    }
}

/// The nodes in an order in which each comes after what it reads; the file's own where that is one.
fn order(proto: &GraphProto) -> Result<Vec<usize>, String> {
    let mut producer = HashMap::new();
    for (at, node) in proto.node.iter().enumerate() {
        producer.extend(node.output.iter().filter(|name| !name.is_empty()).map(|name| (name.as_str(), at)));
    }
    let given: BTreeSet<&str> = (proto.initializer.iter().map(|tensor| tensor.name.as_str()))
        .chain(proto.input.iter().map(|input| input.name.as_str()))
        .collect();
    let mut readers = vec![Vec::new(); proto.node.len()];
    let mut waits_for = vec![0; proto.node.len()];
    for (at, node) in proto.node.iter().enumerate() {
        for name in node.input.iter().filter(|name| !name.is_empty() && !given.contains(name.as_str())) {
            let Some(&from) = producer.get(name.as_str()) else {
                return Err(format!("{} reads \"{name}\", which nothing provides", called(node, at)));
            };
            readers[from].push(at);
            waits_for[at] += 1;
        }
    }
    let mut ready: BTreeSet<usize> = (0..proto.node.len()).filter(|&at| waits_for[at] == 0).collect();
    let mut sorted = Vec::new();
    while let Some(at) = ready.pop_first() {
        sorted.push(at);
        for &reader in &readers[at] {
            waits_for[reader] -= 1;
            if waits_for[reader] == 0 {
                ready.insert(reader);
            }
        }
    }
    match waits_for.iter().position(|&count| count > 0) {
        Some(at) => Err(format!("{} depends on its own result", called(&proto.node[at], at))),
        None => Ok(sorted),
    }
}

/// A graph in the making, and what the file's names stand for so far.
pub struct Importer<'a> {
    pub builder: Builder,
    /// The version of the set of operators.
    pub opset: i64,
    folder: Option<&'a Path>,
    initializers: HashMap<&'a str, &'a TensorProto>,
    values: HashMap<String, TensorIr>,
}

impl<'a> Importer<'a> {
    /// The graph's inputs; an error comes with a hint.
    fn inputs(
        &mut self,
        proto: &GraphProto,
        options: &OnnxOptions,
    ) -> Result<Vec<Boundary>, (String, String)> {
        let mut open = BTreeSet::new();
        let mut inputs = Vec::new();
        for input in &proto.input {
            // Old files list their parameters among the inputs.
            if self.initializers.contains_key(input.name.as_str()) {
                continue;
            }
            let name = &input.name;
            let (dtype, dims) = typed(input).map_err(|found| {
                (format!("input \"{name}\" {found}"), "inputs are tensors of numbers".into())
            })?;
            let mut shape = Vec::new();
            for (axis, dim) in dims.into_iter().enumerate() {
                shape.push(match dim {
                    Size::Fixed(size) => size,
                    Size::Open(label) => {
                        let place = format!("{name}.{axis}");
                        let size =
                            options.dims.get(&place).or(label.as_ref().and_then(|l| options.dims.get(l)));
                        open.extend(label);
                        open.insert(place);
                        size.copied().unwrap_or(1)
                    }
                });
            }
            // Truth values come in as whole numbers.
            let kind = if dtype.is_float() { PortKind::Float } else { PortKind::Int };
            let tensor = self.builder.provided(&shape, if dtype.is_bool() { DType::I64 } else { dtype });
            inputs.push(Boundary { port: Port { name: name.clone(), kind, shape }, tensor: tensor.id });
            let value = self.builder.cast(&tensor, dtype).map_err(|found| (found, String::new()))?;
            self.values.insert(name.clone(), value);
        }
        match options.dims.keys().find(|name| !open.contains(*name)) {
            Some(name) if open.is_empty() => {
                Err((format!("has no open size \"{name}\""), "all sizes are fixed in the file".into()))
            }
            Some(name) => {
                let open: Vec<String> = open.into_iter().collect();
                Err((format!("has no open size \"{name}\""), format!("open are: {}", open.join(", "))))
            }
            None => Ok(inputs),
        }
    }

    /// The graph's outputs. Truth values become whole numbers.
    fn outputs(&mut self, proto: &GraphProto) -> Fit<Vec<Boundary>> {
        let mut outputs = Vec::new();
        for output in &proto.output {
            let name = &output.name;
            let mut value =
                self.value(name)?.ok_or_else(|| format!("output \"{name}\" is computed by no node"))?;
            if value.dtype.is_bool() {
                value = self.builder.cast(&value, DType::I64)?;
            }
            let kind = if value.dtype.is_float() { PortKind::Float } else { PortKind::Int };
            let port = Port { name: name.clone(), kind, shape: value.shape.to_vec() };
            outputs.push(Boundary { port, tensor: value.id });
        }
        if outputs.is_empty() { Err("has no outputs".into()) } else { Ok(outputs) }
    }

    /// What a name stands for.
    pub fn value(&mut self, name: &str) -> Fit<Option<TensorIr>> {
        if let Some(value) = self.values.get(name) {
            return Ok(Some(value.clone()));
        }
        let Some(proto) = self.initializers.get(name) else { return Ok(None) };
        let data = tensor::read(proto, self.folder).map_err(|found| format!("\"{name}\" {found}"))?;
        let value = self.builder.constant(data);
        self.values.insert(name.into(), value.clone());
        Ok(Some(value))
    }

    /// An input of a node that may be left out.
    pub fn maybe(&mut self, node: &NodeProto, at: usize) -> Fit<Option<TensorIr>> {
        match node.input.get(at) {
            Some(name) if !name.is_empty() => self.value(name),
            _ => Ok(None),
        }
    }

    /// An input of a node.
    pub fn input(&mut self, node: &NodeProto, at: usize) -> Fit<TensorIr> {
        self.maybe(node, at)?.ok_or_else(|| format!("lacks input {at}"))
    }

    /// All inputs of a node.
    pub fn all(&mut self, node: &NodeProto) -> Fit<Vec<TensorIr>> {
        (0..node.input.len()).map(|at| self.input(node, at)).collect()
    }

    /// An input with the integer type that it has in the file, where it is a parameter.
    pub fn narrow(&mut self, node: &NodeProto, at: usize) -> Fit<TensorIr> {
        let proto = node.input.get(at).and_then(|name| self.initializers.get(name.as_str()));
        let small =
            |data: &TensorData| matches!(data.dtype(), DType::I8 | DType::U8 | DType::I16 | DType::U16);
        if let Some(proto) = proto {
            let data = tensor::read_narrow(proto, self.folder)
                .map_err(|found| format!("\"{}\" {found}", proto.name))?;
            if small(&data) {
                return Ok(self.builder.constant(data));
            }
        }
        self.input(node, at)
    }

    /// The file's type of a parameter; `None` of something that is computed.
    pub fn file_type(&self, node: &NodeProto, at: usize) -> Option<i32> {
        let name = node.input.get(at)?;
        self.initializers.get(name.as_str()).map(|proto| proto.data_type)
    }

    /// Whole numbers that have to be known.
    pub fn known(&self, tensor: &TensorIr) -> Fit<Vec<i64>> {
        let data =
            self.builder.value(tensor).ok_or("depends on its inputs where fixed numbers are needed")?;
        Ok(data.iter::<i64>().collect())
    }

    /// The only number of a tensor that is known.
    pub fn number(&self, tensor: &TensorIr) -> Option<f64> {
        let data = self.builder.value(tensor)?;
        (tensor.shape.num_elements() == 1).then(|| data.iter::<f64>().next()).flatten()
    }

    /// Whole numbers from an attribute, or, in newer sets of operators, from an input.
    pub fn ints_of(&mut self, node: &NodeProto, attribute: &str, at: usize) -> Fit<Option<Vec<i64>>> {
        if let Some(found) = find(node, attribute) {
            return Ok(Some(if found.ints.is_empty() && found.kind == attribute::INT {
                vec![found.i]
            } else {
                found.ints.clone()
            }));
        }
        match self.maybe(node, at)? {
            Some(tensor) => self.known(&tensor).map(Some),
            None => Ok(None),
        }
    }

    /// A tensor in an attribute.
    pub fn tensor_of(&mut self, proto: &TensorProto) -> Fit<TensorIr> {
        let data = tensor::read(proto, self.folder).map_err(|found| format!("its value {found}"))?;
        Ok(self.builder.constant(data))
    }

    fn shapes(&mut self, node: &NodeProto) -> String {
        let described = (0..node.input.len()).map(|at| match self.maybe(node, at) {
            Ok(Some(TensorIr { shape, dtype, status: TensorStatus::ReadOnly, .. })) => {
                let dtype = if dtype.is_bool() { "bool".into() } else { format!("{dtype:?}").to_lowercase() };
                format!("{dtype}{:?}", shape.to_vec())
            }
            _ => "-".into(),
        });
        described.collect::<Vec<_>>().join(", ")
    }
}

/// An attribute of a node.
pub fn find<'n>(node: &'n NodeProto, name: &str) -> Option<&'n AttributeProto> {
    node.attribute.iter().find(|attribute| attribute.name == name)
}

enum Size {
    Fixed(usize),
    Open(Option<String>),
}

/// Element type and sizes of an input.
fn typed(input: &ValueInfoProto) -> Fit<(DType, Vec<Size>)> {
    let tensor = input.r#type.as_ref().and_then(|kind| kind.tensor_type.as_ref()).ok_or("is not a tensor")?;
    let dtype = tensor::graph_type(tensor.elem_type)
        .ok_or_else(|| format!("has elements of type {}, which are not read", tensor.elem_type))?;
    let shape = tensor.shape.as_ref().ok_or("has no shape")?;
    let sizes = shape.dim.iter().map(|dim| match (dim.dim_value, &dim.dim_param) {
        (Some(size), _) if size >= 0 => Ok(Size::Fixed(size as usize)),
        (Some(-1) | None, label) => Ok(Size::Open(label.clone().filter(|label| !label.is_empty()))),
        (Some(size), _) => Err(format!("has an axis of size {size}")),
    });
    Ok((dtype, sizes.collect::<Fit<_>>()?))
}
