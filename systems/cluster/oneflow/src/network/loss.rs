//! Losses behind an output of a graph.

use burn::backend::ir::{
    ActivationOperationIr as Activation, NumericOperationIr as Numeric, OperationIr, ReduceOpIr, TensorIr,
};
use burn::tensor::DType;
use kiln_compiler::builder::{Builder, Fit};
use kiln_compiler::{Boundary, Graph};
use kiln_core::{Error, Port, PortKind, Result};

use crate::graph::Logical;

/// What becomes small.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Loss {
    /// Classes, whole numbers: the logarithm of the odds of the right one
    CrossEntropy,
    /// Yes or no, 1 or 0: the logarithm of the odds of the right one
    Binary,
    /// Numbers: the square of the difference
    Squared,
}

/// What holds what is to be predicted: `y`, or `target` where an input of the network is called so.
pub(super) fn target_of(graph: &Graph) -> &'static str {
    if graph.inputs.iter().any(|input| input.port.name == "y") { "target" } else { "y" }
}

impl Loss {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::CrossEntropy => "cross-entropy",
            Self::Binary => "binary",
            Self::Squared => "squared",
        }
    }

    /// The same graph with one output, `loss`, `[1]`: the mean over the batch; what is to be predicted is its last input, of
    /// the output's shape, with a class axis of length one.
    ///
    /// # Errors
    /// When the output's shape does not fit the loss.
    pub(super) fn behind(self, graph: &Graph, output: usize) -> Result<Graph> {
        let logical = Logical { graph: graph.clone(), variables: Vec::new() };
        let tensors = logical.tensors();
        let boundary = &graph.outputs[output];
        let wrong = |found: String| Error::usage(format!("output \"{}\": {found}", boundary.port.name));
        let scores = tensors[&boundary.tensor].clone();
        if !scores.dtype.is_float() {
            return Err(wrong("whole numbers have no gradient".into()));
        }
        let mut builder = Builder::new(logical.next_id());
        builder.operations.clone_from(&graph.operations);
        let mut shape = scores.shape.to_vec();
        let class_axis = self.class_axis(&shape);
        if let Some(axis) = class_axis {
            shape[axis] = 1;
        }
        let kind = if self == Self::CrossEntropy { PortKind::Int } else { PortKind::Float };
        let dtype = if self == Self::CrossEntropy { DType::I64 } else { scores.dtype };
        let target = builder.provided(&shape, dtype);
        let before = Before::of(graph, &scores);
        let loss = self.write(&mut builder, scores, &target, class_axis, before).map_err(&wrong)?;
        let name = target_of(graph).into();
        let mut graph = graph.clone();
        graph.operations = builder.operations;
        graph.constants.extend(builder.constants);
        graph.inputs.push(Boundary { port: Port { name, kind, shape }, tensor: target.id });
        let port = Port { name: "loss".into(), kind: PortKind::Float, shape: vec![1] };
        graph.outputs = vec![Boundary { port, tensor: loss.id }];
        Ok(graph)
    }

    /// The axis of classes: the last.
    pub(super) fn class_axis(self, shape: &[usize]) -> Option<usize> {
        (self == Self::CrossEntropy).then(|| shape.len().saturating_sub(1))
    }

    fn write(
        self,
        b: &mut Builder,
        scores: TensorIr,
        target: &TensorIr,
        class_axis: Option<usize>,
        before: Before,
    ) -> Fit<TensorIr> {
        match (self, class_axis) {
            (Self::CrossEntropy, Some(axis)) => {
                // Probabilities, and logarithms of them, have scores behind them.
                let certain = match before {
                    Before::LogSoftmax(along) if along == axis => scores,
                    Before::Softmax(x, along) if along == axis => {
                        b.along(&x, axis, Activation::LogSoftmax)?
                    }
                    _ => b.along(&scores, axis, Activation::LogSoftmax)?,
                };
                let picked = b.gather(&certain, axis, target)?;
                let mean = mean(b, &picked)?;
                b.unary(&mean, Numeric::Neg)
            }
            (Self::Binary, _) => {
                // −log σ(x) for 1, −log σ(−x) for 0.
                let x = if let Before::Sigmoid(x) = before { x } else { scores };
                let certain = b.activation(&x, Activation::LogSigmoid)?;
                let minus = b.unary(target, Numeric::Neg)?;
                let other = b.add_scalar(&minus, 1.0)?;
                let against = b.mul(&other, &x)?;
                let each = b.sub(&against, &certain)?;
                mean(b, &each)
            }
            _ => {
                let apart = b.sub(&scores, target)?;
                let square = b.mul(&apart, &apart)?;
                mean(b, &square)
            }
        }
    }
}

/// The operation that an output comes from, with what it reads.
enum Before {
    Softmax(TensorIr, usize),
    LogSoftmax(usize),
    Sigmoid(TensorIr),
    Other,
}

impl Before {
    fn of(graph: &Graph, scores: &TensorIr) -> Self {
        let writer =
            graph.operations.iter().find(|operation| operation.outputs().any(|out| out.id == scores.id));
        let read = |tensor: &TensorIr| TensorIr {
            status: burn::backend::ir::TensorStatus::ReadOnly,
            ..tensor.clone()
        };
        match writer {
            Some(OperationIr::Activation(Activation::Softmax(op))) => Self::Softmax(read(&op.input), op.axis),
            Some(OperationIr::Activation(Activation::LogSoftmax(op))) => Self::LogSoftmax(op.axis),
            Some(OperationIr::Activation(Activation::Sigmoid(op))) => Self::Sigmoid(read(&op.input)),
            _ => Self::Other,
        }
    }
}

fn mean(b: &mut Builder, x: &TensorIr) -> Fit<TensorIr> {
    let (x, dtype) = (x.clone(), x.dtype);
    b.other(|id| OperationIr::NumericFloat(dtype, Numeric::Mean(ReduceOpIr::create(x, || id))))
}
