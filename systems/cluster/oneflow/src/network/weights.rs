//! Which constants of a graph are weights, and what they are called.

use std::collections::{BTreeSet, HashMap};

use burn::backend::ir::{
    IrVisitorMut, ModuleOperationIr as Module, OperationIr, TensorId, TensorIr, TensorStatus,
};
use burn::tensor::TensorData;
use kiln_compiler::Graph;
use kiln_core::{HostTensor, TensorFile};

use super::fresh_values;

/// A constant that is trained.
#[derive(Debug, Clone)]
pub(crate) struct Weight {
    /// Its name.
    pub name: String,
    /// The constant.
    pub constant: TensorId,
    /// Its extents.
    pub shape: Vec<usize>,
    /// Whether the file has it with rows and columns exchanged.
    pub transposed: bool,
}

impl Weight {
    /// Puts a value in its place in a file of weights, in the layout that it has there.
    pub fn write(&self, value: &TensorData, file: &mut TensorFile) {
        let shape = file.get(&self.name).map_or_else(|| self.shape.clone(), |before| before.shape.clone());
        let values: Vec<f32> = value.iter::<f32>().collect();
        let values =
            if self.transposed { exchanged(&values, value.shape()[0], value.shape()[1]) } else { values };
        file.insert(&self.name, HostTensor::float(shape, values));
    }
}

/// The weights of a graph in a file.
pub(crate) struct Matched {
    pub weights: Vec<Weight>,
    /// Tensors of the file that hold the same numbers.
    pub alike: Vec<String>,
    /// Constants that hold what a weight's constant holds: the latter, and the former.
    pub repeated: Vec<(TensorId, TensorId)>,
    /// Tensors that the graph reads with rows and columns exchanged and as they are.
    pub both_ways: Vec<String>,
}

/// Rows become columns.
fn exchanged(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Running statistics are measured, not trained.
fn is_statistic(name: &str) -> bool {
    ["running_mean", "running_var"].iter().any(|end| name.ends_with(end))
}

/// Finds the constants that hold the numbers of a file's tensors, in the same order or with rows and columns exchanged.
pub(crate) fn match_weights(graph: &Graph, file: &TensorFile) -> Matched {
    let statistics = statistics(graph);
    let mut by_values: HashMap<Vec<u32>, Vec<(&String, bool)>> = HashMap::new();
    for (name, tensor) in file.iter().filter(|(name, _)| !is_statistic(name)) {
        let Some(values) = tensor.as_floats() else { continue };
        by_values.entry(bits(values)).or_default().push((name, false));
        if let &[rows, columns] = &tensor.shape[..]
            && rows > 1
            && columns > 1
        {
            by_values.entry(bits(&exchanged(values, rows, columns))).or_default().push((name, true));
        }
    }
    let (mut weights, mut alike) = (Vec::<Weight>::new(), BTreeSet::new());
    let (mut repeated, mut both_ways) = (Vec::new(), Vec::new());
    for (&constant, data) in &graph.constants {
        if !data.dtype().is_float() || statistics.contains(&constant) {
            continue;
        }
        let values: Vec<f32> = data.iter::<f32>().collect();
        let Some(found) = by_values.get(&bits(&values)) else { continue };
        // A symmetric matrix is itself in both orders.
        let names: BTreeSet<&String> = found.iter().map(|(name, _)| *name).collect();
        if names.len() > 1 {
            alike.extend(names.into_iter().cloned());
            continue;
        }
        let (name, transposed) = found[0];
        match weights.iter().find(|weight| weight.name == *name) {
            Some(before) if before.transposed == transposed && before.shape == data.shape().to_vec() => {
                repeated.push((before.constant, constant));
            }
            Some(_) => both_ways.push(name.clone()),
            None => {
                let shape = data.shape().to_vec();
                weights.push(Weight { name: name.clone(), constant, shape, transposed });
            }
        }
    }
    Matched { weights, alike: alike.into_iter().collect(), repeated, both_ways }
}

/// Constants that hold the same become one.
pub(crate) fn merge(graph: &mut Graph, repeated: &[(TensorId, TensorId)]) {
    let kept: HashMap<TensorId, TensorId> = repeated.iter().map(|&(kept, other)| (other, kept)).collect();
    let mut rename = Rename(kept);
    graph.operations.iter_mut().for_each(|operation| operation.visit_mut(&mut rename));
    graph.constants.retain(|id, _| !rename.0.contains_key(id));
}

struct Rename(HashMap<TensorId, TensorId>);

impl IrVisitorMut for Rename {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if let Some(&kept) = self.0.get(&tensor.id) {
            tensor.id = kept;
            tensor.status = TensorStatus::ReadOnly;
        }
    }
}

/// The same file with other numbers in some of its tensors.
pub(crate) fn distinct(file: &TensorFile, names: &[String]) -> TensorFile {
    let mut traced = file.clone();
    for (number, name) in names.iter().enumerate() {
        let Some(tensor) = file.get(name) else { continue };
        let count = tensor.shape.iter().product();
        traced.insert(name, HostTensor::float(tensor.shape.clone(), fresh_values(count, number as u64)));
    }
    traced
}

/// Constants of a graph that look like weights: more than one float, none so low that it masks, no statistics of batch norm.
pub(super) fn of_graph(graph: &Graph) -> Vec<Weight> {
    /// Scores of what attention must not see are below this.
    const MASKS: f32 = -1e3;
    let statistics = statistics(graph);
    let is_weight = |(id, data): &(&TensorId, &TensorData)| {
        data.dtype().is_float()
            && data.num_elements() > 1
            && !statistics.contains(id)
            && data.iter::<f32>().all(|value| value.is_finite() && value > MASKS)
    };
    let named = |(&constant, data): (&TensorId, &TensorData)| Weight {
        name: format!("%{}", constant.value()),
        constant,
        shape: data.shape().to_vec(),
        transposed: false,
    };
    graph.constants.iter().filter(is_weight).map(named).collect()
}

/// Means and variances of batch norm.
fn statistics(graph: &Graph) -> BTreeSet<TensorId> {
    let of = |operation: &OperationIr| match operation {
        OperationIr::Module(Module::BatchNorm(op)) => vec![op.mean.id, op.variance.id],
        _ => Vec::new(),
    };
    graph.operations.iter().flat_map(of).collect()
}
