//! Writing the physical graph for the signatures that were chosen.

use std::collections::HashMap;

use burn::backend::ir::{
    ActivationOperationIr as Activation, BinaryOpIr, FloatOperationIr as Float,
    NumericOperationIr as Numeric, OperationIr, ReduceDimOpIr, TensorId, TensorIr, TensorStatus, UnaryOpIr,
};
use kiln_core::{Error, Result};

use super::Compiler;
use super::plan::{Plan, Role};
use crate::boxing::{Collective, Router, Step};
use crate::graph::Logical;
use crate::physical::{COMPUTE, LOADER, NETWORK, Node, Value, Work};
use crate::sbp::{NdSbp, Reduction, Sbp};
use crate::select::{Choice, Edge, Node as Item};
use crate::signature::{NdSignature, Signature};

/// Writes the physical graph.
pub(super) struct Writer<'a> {
    plan: &'a Plan,
    logical: &'a Logical,
    router: &'a mut Router,
    pub values: Vec<Value>,
    pub nodes: Vec<Node>,
    /// The value of an edge in a form.
    of: HashMap<(usize, NdSbp), usize>,
    /// The form in which an edge was written.
    written: HashMap<usize, NdSbp>,
    next: u64,
}

impl<'a> Writer<'a> {
    pub fn new(compiler: &'a Compiler, plan: &'a Plan, router: &'a mut Router) -> Self {
        let logical = &compiler.logical;
        let next = logical.next_id();
        Self {
            plan,
            logical,
            router,
            values: Vec::new(),
            nodes: Vec::new(),
            of: HashMap::new(),
            written: HashMap::new(),
            next,
        }
    }

    pub fn write(&mut self, chosen: &[usize]) -> Result<()> {
        let mut updates = Vec::new();
        // A gradient is brought to its variable's form as soon as it is there, so that this goes on beside what follows.
        let mut awaited: HashMap<usize, NdSbp> = HashMap::new();
        for (at, role) in self.plan.roles.iter().enumerate() {
            if let Role::Variable(variable) = role {
                let item = &self.plan.problem.nodes[at];
                let form = item.choices[chosen[at]].inputs[0].clone();
                awaited.insert(item.inputs[0], form.clone());
                updates.push((*variable, item.inputs[0], form));
            }
        }
        for (at, role) in self.plan.roles.iter().enumerate() {
            let item = &self.plan.problem.nodes[at];
            let choice = &item.choices[chosen[at]];
            let name = item.name.clone();
            let inputs = match role {
                Role::Variable(_) => Vec::new(),
                _ => {
                    let read = item.inputs.iter().zip(&choice.inputs);
                    read.map(|(&edge, form)| self.read(edge, form)).collect::<Result<Vec<_>>>()?
                }
            };
            match role {
                Role::Hint => {
                    self.written.insert(item.outputs[0], choice.outputs[0].clone());
                    self.of.insert((item.outputs[0], choice.outputs[0].clone()), inputs[0]);
                    continue;
                }
                Role::Operation(number) => {
                    let operation = &self.logical.graph.operations[*number];
                    let signature = &self.plan.signatures[at][chosen[at]];
                    if signature.0.iter().any(|one| one.in_parts) {
                        self.write_in_parts(operation, signature, inputs[0], item.outputs[0])?;
                    } else {
                        let outputs = self.outputs(&item.outputs, &choice.outputs);
                        let work = Work::Compute(Box::new(operation.clone()), signature.clone());
                        self.nodes.push(Node { name, work, inputs, outputs, queue: COMPUTE });
                    }
                }
                Role::Variable(number) => {
                    self.push(name, Work::Variable(*number), inputs, item, choice, COMPUTE)
                }
                Role::Input(number) => self.push(name, Work::Input(*number), inputs, item, choice, LOADER),
                Role::Constant(id) => self.push(name, Work::Constant(*id), inputs, item, choice, COMPUTE),
                Role::Output(number) => self.push(name, Work::Output(*number), inputs, item, choice, COMPUTE),
            }
            for edge in &item.outputs {
                if let Some(form) = awaited.get(edge).cloned() {
                    self.read(*edge, &form)?;
                }
            }
        }
        for (variable, edge, form) in updates {
            let name = format!("update {}", self.logical.variables[variable].name);
            let inputs = vec![self.read(edge, &form)?];
            self.nodes.push(Node {
                name,
                work: Work::Update(variable),
                inputs,
                outputs: Vec::new(),
                queue: COMPUTE,
            });
        }
        Ok(())
    }

    fn push(
        &mut self,
        name: String,
        work: Work,
        inputs: Vec<usize>,
        item: &Item,
        choice: &Choice,
        queue: usize,
    ) {
        let outputs = self.outputs(&item.outputs, &choice.outputs);
        self.nodes.push(Node { name, work, inputs, outputs, queue });
    }

    fn outputs(&mut self, edges: &[usize], forms: &[NdSbp]) -> Vec<usize> {
        edges.iter().zip(forms).map(|(&edge, form)| self.output(edge, form)).collect()
    }

    /// A new value: an edge in the form in which it is written.
    fn output(&mut self, edge: usize, form: &NdSbp) -> usize {
        self.written.insert(edge, form.clone());
        self.value_of(edge, form)
    }

    fn value_of(&mut self, edge: usize, form: &NdSbp) -> usize {
        let Edge { name, shape, dtype } = self.plan.problem.edges[edge].clone();
        self.values.push(Value { name, shape, dtype, sbp: form.clone() });
        self.of.insert((edge, form.clone()), self.values.len() - 1);
        self.values.len() - 1
    }

    /// The value of an edge in a form, converted where it is not there yet.
    fn read(&mut self, edge: usize, form: &NdSbp) -> Result<usize> {
        if let Some(&value) = self.of.get(&(edge, form.clone())) {
            return Ok(value);
        }
        let from = self.written.get(&edge).cloned();
        let from = from.ok_or_else(|| Error::work("a tensor is read before it is written"))?;
        let Edge { shape, dtype, .. } = &self.plan.problem.edges[edge];
        let path = self.router.path(shape, dtype.size(), &from, form)?;
        let source = self.of[&(edge, from.clone())];
        let target = self.value_of(edge, form);
        self.nodes.push(boxing(&self.values, source, target, path));
        Ok(target)
    }

    /// The operations into which one is taken apart that normalises over a split axis: with the maximum and the sum over
    /// all parts between them.
    fn write_in_parts(
        &mut self,
        operation: &OperationIr,
        signature: &NdSignature,
        input: usize,
        edge: usize,
    ) -> Result<()> {
        let OperationIr::Activation(Activation::Softmax(op) | Activation::LogSoftmax(op)) = operation else {
            return Err(Error::work("an operation cannot be computed in parts"));
        };
        let logarithm = matches!(operation, OperationIr::Activation(Activation::LogSoftmax(_)));
        let (axis, dtype) = (op.axis, op.input.dtype);
        let x = TensorIr { status: TensorStatus::ReadOnly, ..op.input.clone() };
        let shape = x.shape.to_vec();
        let mut row = shape.clone();
        row[axis] = 1;
        let forms: Vec<Sbp> = signature.0.iter().map(|one| one.inputs[0]).collect();
        let split: Vec<bool> = signature.0.iter().map(|one| one.in_parts).collect();
        let with = |kind: Sbp| {
            NdSbp(forms.iter().zip(&split).map(|(&form, &split)| if split { kind } else { form }).collect())
        };
        let (whole, of_row) = (NdSbp(forms.clone()), with(Sbp::B));
        let name = self.plan.problem.edges[edge].name.clone();
        let intermediate = |writer: &mut Self, what: &str, shape: &[usize], sbp: NdSbp| {
            writer.values.push(Value { name: format!("{name} {what}"), shape: shape.to_vec(), dtype, sbp });
            writer.values.len() - 1
        };
        let signed = |inputs: &[&NdSbp], output: &NdSbp| {
            let one = |at: usize| Signature {
                inputs: inputs.iter().map(|nd| nd.0[at]).collect(),
                outputs: vec![output.0[at]],
                in_parts: false,
            };
            NdSignature((0..forms.len()).map(one).collect())
        };
        let reduce = |writer: &mut Self,
                      x: &TensorIr,
                      value: usize,
                      kind: Reduction,
                      what: &str|
         -> Result<(TensorIr, usize)> {
            let id = writer.fresh();
            let reduced = ReduceDimOpIr::create(x.clone(), axis, 1, || id);
            let out = read_only(&reduced.out);
            let operation = match kind {
                Reduction::Max => Numeric::MaxDim(reduced),
                _ => Numeric::SumDim(reduced),
            };
            let partial = with(Sbp::P(kind));
            let found = intermediate(writer, what, &row, partial.clone());
            writer.compute(
                what,
                OperationIr::NumericFloat(dtype, operation),
                signed(&[&whole], &partial),
                vec![value],
                found,
            );
            let total = intermediate(writer, what, &row, of_row.clone());
            let path = writer.router.path(&row, dtype.size(), &partial, &of_row)?;
            let node = boxing(&writer.values, found, total, path);
            writer.nodes.push(node);
            Ok((out, total))
        };

        let (maximum, largest) = reduce(self, &x, input, Reduction::Max, "maximum")?;
        let id = self.fresh();
        let shifted = BinaryOpIr::create(x.clone(), maximum, || id);
        let below = read_only(&shifted.out);
        let value = intermediate(self, "shifted", &shape, whole.clone());
        let rowed = signed(&[&whole, &of_row], &whole);
        self.compute(
            "shift",
            OperationIr::NumericFloat(dtype, Numeric::Sub(shifted)),
            rowed.clone(),
            vec![input, largest],
            value,
        );
        let id = self.fresh();
        let powers = UnaryOpIr::create(below.clone(), || id);
        let power = read_only(&powers.out);
        let raised = intermediate(self, "exponentials", &shape, whole.clone());
        let single = signed(&[&whole], &whole);
        self.compute(
            "exponentials",
            OperationIr::Float(dtype, Float::Exp(powers)),
            single,
            vec![value],
            raised,
        );
        let (sum, total) = reduce(self, &power, raised, Reduction::Sum, "sum")?;
        let out = self.output(edge, &whole);
        if logarithm {
            let id = self.fresh();
            let log = UnaryOpIr::create(sum, || id);
            let logged = read_only(&log.out);
            let level = intermediate(self, "logarithm", &row, of_row.clone());
            let on_rows = signed(&[&of_row], &of_row);
            self.compute(
                "logarithm",
                OperationIr::Float(dtype, Float::Log(log)),
                on_rows,
                vec![total],
                level,
            );
            let last = BinaryOpIr::create(below, logged, || op.out.id);
            self.compute(
                "log-softmax",
                OperationIr::NumericFloat(dtype, Numeric::Sub(last)),
                rowed,
                vec![value, level],
                out,
            );
        } else {
            let last = BinaryOpIr::create(power, sum, || op.out.id);
            self.compute(
                "softmax",
                OperationIr::NumericFloat(dtype, Numeric::Div(last)),
                rowed,
                vec![raised, total],
                out,
            );
        }
        Ok(())
    }

    fn fresh(&mut self) -> TensorId {
        self.next += 1;
        TensorId::new(self.next - 1)
    }

    fn compute(
        &mut self,
        name: &str,
        operation: OperationIr,
        signature: NdSignature,
        inputs: Vec<usize>,
        output: usize,
    ) {
        let work = Work::Compute(Box::new(operation), signature);
        self.nodes.push(Node { name: name.into(), work, inputs, outputs: vec![output], queue: COMPUTE });
    }
}

fn read_only(tensor: &TensorIr) -> TensorIr {
    TensorIr { status: TensorStatus::ReadOnly, ..tensor.clone() }
}

fn boxing(values: &[Value], source: usize, target: usize, path: Vec<Step>) -> Node {
    let (from, to) = (&values[source], &values[target]);
    // Cutting and zero-filling need nobody else.
    let talks = path.iter().any(|step| !matches!(step.collective(), Collective::Slice | Collective::Place));
    Node {
        name: format!("{} {} → {}", to.name, from.sbp, to.sbp),
        work: Work::Boxing(path),
        inputs: vec![source],
        outputs: vec![target],
        queue: if talks { NETWORK } else { COMPUTE },
    }
}
