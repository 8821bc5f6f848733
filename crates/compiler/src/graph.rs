//! The graph and its printed form.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;

use burn::backend::ir::{IrVisitorMut, OperationIr, ScalarIr, TensorId, TensorIr};
use burn::tensor::{DType, TensorData};
use kiln_core::{Error, Port, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An input or output of a graph: the network's port and the tensor behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Boundary {
    /// Name, element kind and shape.
    #[serde(flatten)]
    pub port: Port,
    /// The tensor's number in the graph.
    pub tensor: TensorId,
}

/// A network's computation: operations in execution order between inputs and outputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Graph {
    /// The slug of the system whose network it is.
    pub kind: String,
    /// What is fed in, in order.
    pub inputs: Vec<Boundary>,
    /// What comes out, in order.
    pub outputs: Vec<Boundary>,
    /// Burn's operations; each names the tensors it reads and writes, with shapes and element types.
    pub operations: Vec<OperationIr>,
    /// Parameters and other values that the operations read, by the tensor's number.
    pub constants: BTreeMap<TensorId, TensorData>,
}

impl Graph {
    /// One line an input, constant, operation and output:
    /// `%7: f32[4, 8] = Matmul(%0, %1)`.
    ///
    /// # Errors
    /// When an operation has no representation as JSON, from which its name and attributes are read.
    pub fn to_text(&self) -> Result<String> {
        let mut text = String::new();
        for Boundary { port, tensor } in &self.inputs {
            let kind = if port.kind == kiln_core::PortKind::Float { "f32" } else { "i64" };
            let _ = writeln!(text, "%{}: {kind}{:?} = input \"{}\"", tensor.value(), port.shape, port.name);
        }
        for (id, data) in &self.constants {
            let place = typed(*id, data.dtype(), data.shape());
            let _ = writeln!(text, "{place} = constant");
        }
        for operation in &self.operations {
            let (name, attributes) = name_and_attributes(operation)?;
            let results: Vec<String> = operation.outputs().map(typed_tensor).collect();
            let inputs = operation.inputs().map(|tensor| format!("%{}", tensor.id.value()));
            let arguments: Vec<String> =
                inputs.chain(attributes.into_iter().map(|(name, value)| format!("{name}={value}"))).collect();
            let _ = writeln!(text, "{} = {name}({})", results.join(", "), arguments.join(", "));
        }
        for Boundary { port, tensor } in &self.outputs {
            let _ = writeln!(text, "output \"{}\" = %{}", port.name, tensor.value());
        }
        Ok(text)
    }

    /// How often each operation occurs, by name.
    ///
    /// # Errors
    /// As [`to_text`](Self::to_text).
    pub fn operation_counts(&self) -> Result<BTreeMap<String, usize>> {
        let mut counts = BTreeMap::new();
        for operation in &self.operations {
            *counts.entry(name_and_attributes(operation)?.0).or_default() += 1;
        }
        Ok(counts)
    }
}

fn typed_tensor(tensor: &TensorIr) -> String {
    typed(tensor.id, tensor.dtype, &tensor.shape)
}

fn typed(id: TensorId, dtype: DType, shape: &[usize]) -> String {
    let dtype = match dtype {
        DType::Bool(_) => "bool".into(),
        other => format!("{other:?}").to_lowercase(),
    };
    format!("%{}: {dtype}{shape:?}", id.value())
}

/// The name under which an operation is printed: that of the innermost variant, such as `Matmul`.
///
/// # Errors
/// As [`Graph::to_text`].
pub fn operation_name(operation: &OperationIr) -> Result<String> {
    Ok(name_and_attributes(operation)?.0)
}

/// The innermost variant's name, and the fields that are not tensors.
///
/// Burn's operations are enums in enums (`NumericFloat(F32, Add(BinaryOpIr { … }))`); their JSON form,
/// `{"NumericFloat": ["F32", {"Add": {…}}]}`, can be walked without knowing each of them.
pub(crate) fn name_and_attributes(operation: &OperationIr) -> Result<(String, Vec<(String, String)>)> {
    let mut value = serde_json::to_value(operation)
        .map_err(|e| Error::work("an operation cannot be written as JSON").caused_by(e))?;
    let mut name = String::new();
    loop {
        // The element type beside an operation is the one of its tensors.
        if let Value::Array(parts) = value {
            value = parts.into_iter().next_back().unwrap_or_default();
        }
        match value {
            Value::Object(mut object) if is_variant(&object) => {
                let Some((variant, inner)) = object.iter_mut().next() else { break };
                name.clone_from(variant);
                value = inner.take();
            }
            Value::Object(fields) => {
                if let Some(Value::String(custom)) = fields.get("id") {
                    name.clone_from(custom);
                }
                let mut not_finite = NotFinite::default();
                operation.clone().visit_mut(&mut not_finite);
                let attributes = fields
                    .into_iter()
                    .filter(|(key, value)| key != "id" && !is_tensor(value))
                    .map(|(key, value)| (key, attribute(&value, &mut not_finite)));
                return Ok((name, attributes.collect()));
            }
            _ => break,
        }
    }
    Ok((name, Vec::new()))
}

/// Scalars that are not finite, which JSON cannot hold.
#[derive(Default)]
struct NotFinite(VecDeque<f64>);

impl IrVisitorMut for NotFinite {
    fn visit_scalar_mut(&mut self, scalar: &mut ScalarIr) {
        if let ScalarIr::Float(value) = scalar
            && !value.is_finite()
        {
            self.0.push_back(*value);
        }
    }
}

/// An attribute as it is printed; scalars (`{"Float": 0.5}`) without their type.
fn attribute(value: &Value, not_finite: &mut NotFinite) -> String {
    match value.get("Float").or(value.get("Int")).or(value.get("UInt")).or(value.get("Bool")) {
        Some(Value::Null) => not_finite.0.pop_front().unwrap_or(f64::NAN).to_string(),
        Some(scalar) => scalar.to_string(),
        None => value.to_string(),
    }
}

/// Variants are written `{"Name": …}`; fields begin with a small letter.
fn is_variant(object: &serde_json::Map<String, Value>) -> bool {
    object.len() == 1 && object.keys().all(|key| key.starts_with(char::is_uppercase))
}

/// Whether a field holds tensors, or an optional tensor that is absent.
fn is_tensor(value: &Value) -> bool {
    match value {
        Value::Object(object) => object.contains_key("status") && object.contains_key("dtype"),
        Value::Array(items) => !items.is_empty() && items.iter().all(is_tensor),
        other => other.is_null(),
    }
}
