//! The units of a graph, with the batch norms, biases and clamps folded into them that follow.

use std::collections::BTreeMap;

use burn::backend::ir::{
    ActivationOperationIr, BaseOperationIr, BatchNormOpIr, FloatOperationIr, ModuleOperationIr,
    NumericOperationIr, OperationIr, TensorId, TensorIr,
};
use burn::tensor::DType;
use kiln_compiler::Graph;
use kiln_ops::quantised::Ends;

use crate::fold::{BatchNorm, fold};
use crate::program::Step;
use crate::unit::{Unit, Window, Work};

/// Finds units while it goes through a graph.
pub(crate) struct Builder<'a> {
    graph: &'a Graph,
    /// How many operations and outputs read a tensor.
    readers: BTreeMap<TensorId, usize>,
    pub units: Vec<Unit>,
    pub steps: Vec<Step>,
    /// The unit whose result a tensor is, as long as nothing else reads it.
    open: BTreeMap<TensorId, usize>,
}

impl<'a> Builder<'a> {
    pub fn new(graph: &'a Graph) -> Self {
        let mut readers = BTreeMap::new();
        let read = graph.operations.iter().flat_map(|operation| operation.inputs().map(|tensor| tensor.id));
        for id in read.chain(graph.outputs.iter().map(|output| output.tensor)) {
            *readers.entry(id).or_default() += 1;
        }
        Self { graph, readers, units: Vec::new(), steps: Vec::new(), open: BTreeMap::new() }
    }

    pub fn add(&mut self, operation: &OperationIr) {
        if self.absorb(operation) || matches!(operation, OperationIr::Drop(_)) {
            return;
        }
        match self.unit(operation) {
            Some(unit) => {
                self.note_open(unit.output, self.units.len());
                self.steps.push(Step::Unit(self.units.len()));
                self.units.push(unit);
            }
            None => self.steps.push(Step::Plain(Box::new(operation.clone()))),
        }
    }

    fn note_open(&mut self, tensor: TensorId, unit: usize) {
        if self.readers.get(&tensor) == Some(&1) {
            self.open.insert(tensor, unit);
        }
    }

    /// A constant's numbers.
    fn floats(&self, id: TensorId) -> Option<Vec<f32>> {
        let data = self.graph.constants.get(&id)?;
        (data.dtype() == DType::F32).then(|| data.iter::<f32>().collect())
    }

    /// The unit that an operation is.
    fn unit(&self, operation: &OperationIr) -> Option<Unit> {
        let named = |what: &str| format!("{what}{}", self.units.len());
        match operation {
            OperationIr::Module(ModuleOperationIr::Conv2d(conv)) => {
                let options = &conv.options;
                let weight = self.floats(conv.weight.id)?;
                let [outputs, _, height, width] = conv.weight.shape.to_vec()[..] else { return None };
                if options.padding.iter().any(|(before, after)| before != after) {
                    return None;
                }
                let bias = match &conv.bias {
                    Some(bias) => self.floats(bias.id)?,
                    None => vec![0.0; outputs],
                };
                let pixels: usize = conv.out.shape.iter().skip(2).product();
                let [_, _, image_height, image_width] = conv.x.shape.to_vec()[..] else { return None };
                let window = Window {
                    kernel: [height, width],
                    stride: options.stride,
                    padding: options.padding.map(|(before, _)| before),
                    dilation: options.dilation,
                    groups: options.groups,
                    image: [image_height, image_width],
                };
                Some(Unit {
                    name: named("conv"),
                    work: Work::Conv(window),
                    input: conv.x.id,
                    second: None,
                    output: conv.out.id,
                    multiplications: pixels * weight.len(),
                    shape: conv.weight.shape.to_vec(),
                    elements: conv.x.shape.num_elements() + conv.out.shape.num_elements(),
                    weight,
                    bias,
                    ends: Ends::OPEN,
                    tops: Vec::new(),
                })
            }
            OperationIr::Float(_, FloatOperationIr::Matmul(product)) => {
                let extents = product.rhs.shape.to_vec();
                let (outer, [inner, outputs]) = extents.split_at_checked(extents.len().checked_sub(2)?)?
                else {
                    return None;
                };
                let (inner, outputs) = (*inner, *outputs);
                let elements = product.lhs.shape.num_elements() + product.out.shape.num_elements();
                let multiplications = product.out.shape.num_elements() * inner;
                let unit = |name, work, second, weight: Vec<f32>, shape| Unit {
                    name: named(name),
                    work,
                    input: product.lhs.id,
                    second,
                    output: product.out.id,
                    multiplications,
                    shape,
                    elements,
                    bias: if weight.is_empty() { Vec::new() } else { vec![0.0; outputs] },
                    weight,
                    ends: Ends::OPEN,
                    tops: Vec::new(),
                };
                if let Some(weight) = self.floats(product.rhs.id) {
                    if outer.iter().any(|&extent| extent != 1) {
                        return None;
                    }
                    return Some(unit(
                        "linear",
                        Work::Linear,
                        None,
                        transposed(&weight, inner),
                        vec![outputs, inner],
                    ));
                }
                if self.graph.constants.contains_key(&product.lhs.id)
                    || product.lhs.shape.iter().take(outer.len()).ne(outer)
                {
                    return None;
                }
                Some(unit("product", Work::Product, Some(product.rhs.id), Vec::new(), vec![inner, outputs]))
            }
            OperationIr::Module(ModuleOperationIr::Linear(linear)) => {
                let weight = self.floats(linear.weight.id)?;
                let [inner, outputs] = linear.weight.shape.to_vec()[..] else { return None };
                let bias = match &linear.bias {
                    Some(bias) => self.floats(bias.id)?,
                    None => vec![0.0; outputs],
                };
                Some(Unit {
                    name: named("linear"),
                    work: Work::Linear,
                    input: linear.x.id,
                    second: None,
                    output: linear.out.id,
                    multiplications: linear.out.shape.num_elements() * inner,
                    shape: vec![outputs, inner],
                    elements: linear.x.shape.num_elements() + linear.out.shape.num_elements(),
                    weight: transposed(&weight, inner),
                    bias,
                    ends: Ends::OPEN,
                    tops: Vec::new(),
                })
            }
            OperationIr::BaseFloat(BaseOperationIr::Select(select)) if select.dim == 0 => {
                let weight = self.floats(select.tensor.id)?;
                let [rows, width] = select.tensor.shape.to_vec()[..] else { return None };
                Some(Unit {
                    name: named("table"),
                    work: Work::Table,
                    input: select.indices.id,
                    second: None,
                    output: select.out.id,
                    multiplications: 0,
                    shape: vec![rows, width],
                    elements: select.out.shape.num_elements(),
                    weight,
                    bias: Vec::new(),
                    ends: Ends::OPEN,
                    tops: Vec::new(),
                })
            }
            _ => None,
        }
    }

    /// Folds a batch norm, a bias or a clamp into the unit whose result it alone reads.
    fn absorb(&mut self, operation: &OperationIr) -> bool {
        let absorbed = match operation {
            OperationIr::Module(ModuleOperationIr::BatchNorm(norm)) => self.absorb_norm(norm),
            OperationIr::NumericFloat(_, NumericOperationIr::Add(add)) => self
                .absorb_bias(&add.lhs, &add.rhs, &add.out)
                .or_else(|| self.absorb_bias(&add.rhs, &add.lhs, &add.out)),
            OperationIr::Activation(ActivationOperationIr::Relu(relu)) => {
                self.absorb_ends(relu.input.id, relu.out.id, 0.0, f32::INFINITY)
            }
            OperationIr::NumericFloat(_, NumericOperationIr::Clamp(clamp)) => {
                self.absorb_ends(clamp.tensor.id, clamp.out.id, clamp.min.elem(), clamp.max.elem())
            }
            OperationIr::NumericFloat(_, NumericOperationIr::ClampMin(clamp)) => {
                self.absorb_ends(clamp.lhs.id, clamp.out.id, clamp.rhs.elem(), f32::INFINITY)
            }
            _ => None,
        };
        absorbed.is_some()
    }

    fn absorb_norm(&mut self, norm: &BatchNormOpIr) -> Option<()> {
        let at = *self.open.get(&norm.x.id)?;
        let numbers = |id| Some(self.floats(id)?.into_iter().map(f64::from).collect::<Vec<f64>>());
        let (gamma, beta) = (numbers(norm.gamma.id)?, numbers(norm.beta.id)?);
        let (mean, variance) = (numbers(norm.mean.id)?, numbers(norm.variance.id)?);
        let epsilon = norm.epsilon.elem();
        let norm_of = BatchNorm { gamma: &gamma, beta: &beta, mean: &mean, variance: &variance, epsilon };
        let (factors, terms) = norm_of.affine();
        let unit = &mut self.units[at];
        // Channels are the second axis: those of a linear layer's rows only where there is no third.
        let fits = match unit.work {
            Work::Conv(_) => true,
            Work::Linear => norm.x.shape.num_dims() == 2,
            _ => false,
        };
        if !fits || unit.ends != Ends::OPEN || unit.bias.len() != factors.len() {
            return None;
        }
        let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        let (mut weight, mut bias) = (wide(&unit.weight), wide(&unit.bias));
        fold(&mut weight, &mut bias, &factors, &terms);
        unit.weight = weight.iter().map(|&x| x as f32).collect();
        unit.bias = bias.iter().map(|&x| x as f32).collect();
        self.move_output(norm.x.id, norm.out.id);
        Some(())
    }

    fn absorb_bias(&mut self, x: &TensorIr, bias: &TensorIr, out: &TensorIr) -> Option<()> {
        let at = *self.open.get(&x.id)?;
        let values = self.floats(bias.id)?;
        let unit = &mut self.units[at];
        let axis = match unit.work {
            Work::Conv(_) => 1,
            Work::Linear => x.shape.num_dims() - 1,
            _ => return None,
        };
        // All other extents of the bias are 1, from the right on.
        let ranks = [x.shape.num_dims(), bias.shape.num_dims()];
        let at_axis = (axis + ranks[1]).checked_sub(ranks[0])?;
        let per_channel = bias.shape.iter().enumerate().all(|(i, &extent)| i == at_axis || extent == 1);
        if !per_channel || values.len() != unit.bias.len() || unit.ends != Ends::OPEN {
            return None;
        }
        unit.bias.iter_mut().zip(&values).for_each(|(to, value)| *to += value);
        self.move_output(x.id, out.id);
        Some(())
    }

    fn absorb_ends(&mut self, x: TensorId, out: TensorId, least: f32, most: f32) -> Option<()> {
        let at = *self.open.get(&x)?;
        let unit = &mut self.units[at];
        if matches!(unit.work, Work::Table) {
            return None;
        }
        unit.ends = Ends { least: unit.ends.least.max(least), most: unit.ends.most.min(most) };
        self.move_output(x, out);
        Some(())
    }

    fn move_output(&mut self, from: TensorId, to: TensorId) {
        if let Some(unit) = self.open.remove(&from) {
            self.units[unit].output = to;
            self.note_open(to, unit);
        }
    }
}

/// `[inner, outputs]` as `[outputs, inner]`.
fn transposed(weight: &[f32], inner: usize) -> Vec<f32> {
    let outputs = weight.len() / inner.max(1);
    (0..weight.len()).map(|at| weight[at % inner * outputs + at / inner]).collect()
}
