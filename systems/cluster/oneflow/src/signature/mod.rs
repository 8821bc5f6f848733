//! Which SBP an operation may read, and what it writes then (§3.1, table 1): one row a kind of Burn's operations.
//!
//! Most rows are an index notation. In `"*mk *kn > *mn"` every letter is an axis, `*` stands for all others, aligned from
//! the right, and `_` for an axis that is never split. Splitting a letter splits it wherever it stands; operands without it
//! are copies; results without it are partial sums. An operand after `+` is added, so where the result is partial it is
//! partial too. Beside the notation stand forms of operands under which the operation is linear: `PB` says that partial
//! sums of the first operand and copies of the second give partial sums.

mod axes;
mod notation;
mod table;

use std::collections::BTreeSet;

use burn::backend::ir::{BaseOperationIr as Base, OperationIr, ScalarIr, TensorIr};
use kiln_core::Result;
use serde::Serialize;

use crate::sbp::{NdSbp, Reduction, Sbp};
use axes::{along, moves, pick, put, reduce};
use notation::by_notation;

pub(crate) use axes::{indexed, is_whole, reduced_axes, worked_axis};
pub use table::{Row, TABLE, law_of};

/// A legal way to compute an operation on one axis of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Signature {
    /// One an operand.
    pub inputs: Vec<Sbp>,
    /// One a result.
    pub outputs: Vec<Sbp>,
    /// Whether the axis that the operation normalises over is split: it is computed in parts with reductions between them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub in_parts: bool,
}

impl Signature {
    /// Everything as copies, which any operation allows.
    pub fn broadcast(operation: &OperationIr) -> Self {
        Self::plain(vec![Sbp::B; operation.inputs().count()], vec![Sbp::B; operation.outputs().count()])
    }

    fn plain(inputs: Vec<Sbp>, outputs: Vec<Sbp>) -> Self {
        Self { inputs, outputs, in_parts: false }
    }

    /// Whether every device does a part of the work.
    pub fn divides(&self) -> bool {
        self.inputs.iter().chain(&self.outputs).any(|sbp| sbp.axis().is_some())
    }
}

impl std::fmt::Display for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let joined = |forms: &[Sbp]| forms.iter().map(Sbp::to_string).collect::<Vec<_>>().join(",");
        write!(f, "({}) -> {}", joined(&self.inputs), joined(&self.outputs))?;
        if self.in_parts { f.write_str(" in parts") } else { Ok(()) }
    }
}

/// What a kind of operation allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Law {
    /// Index notation, and forms under which the operation is linear.
    Index(&'static str, &'static [&'static str]),
    /// Works along one axis, which stays whole: all others may be split, in operands and results alike.
    Along(&'static [&'static str]),
    /// The same, and with the axis split the operation is computed in parts.
    Normalise,
    /// Reduces axes; splits of them become partial results.
    Reduce(Reduction),
    /// Moves elements without computing.
    Move,
    /// Picks rows or elements by whole numbers.
    Pick,
    /// Adds rows or elements into others by whole numbers.
    Put,
    /// Makes a tensor out of nothing.
    Make,
}

impl std::fmt::Display for Law {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let linear = |f: &mut std::fmt::Formatter<'_>, forms: &[&str]| {
            forms.iter().try_for_each(|forms| write!(f, "; linear in {forms}"))
        };
        match self {
            Self::Index(notation, forms) => {
                f.write_str(notation)?;
                linear(f, forms)
            }
            Self::Along(forms) => {
                f.write_str("works along an axis, others are split")?;
                linear(f, forms)
            }
            Self::Normalise => {
                f.write_str("works along an axis, others are split; a split of that one is computed in parts")
            }
            Self::Reduce(reduction) => {
                write!(f, "reduces: a split of a reduced axis gives {}", Sbp::P(*reduction))
            }
            Self::Move => f.write_str("moves elements: a split goes where its axis goes; P stays P"),
            Self::Pick => {
                f.write_str("picks by number: rows split give P, other axes and the numbers' split stay")
            }
            Self::Put => f.write_str("adds by number: rows and other axes split stay, split numbers give P"),
            Self::Make => f.write_str("made in place: any axis may be split"),
        }
    }
}

/// All legal signatures of an operation on one axis of the mesh; copies last.
///
/// # Errors
/// When the operation has no name.
pub fn signatures(operation: &OperationIr) -> Result<Vec<Signature>> {
    let kind = kiln_compiler::operation_name(operation)?;
    let mut found = law_of(&kind).map_or_else(Vec::new, |law| by_law(operation, &kind, law));
    // Truth values and whole numbers of comparisons have no sums.
    let truth = |tensor: &TensorIr| tensor.dtype.is_bool();
    found.retain(|signature| {
        let inputs = operation.inputs().zip(&signature.inputs);
        inputs
            .chain(operation.outputs().zip(&signature.outputs))
            .all(|(tensor, sbp)| !(truth(tensor) && sbp.reduction().is_some()))
    });
    found.push(Signature::broadcast(operation));
    Ok(found)
}

fn by_law(operation: &OperationIr, kind: &str, law: Law) -> Vec<Signature> {
    match law {
        Law::Index(notation, linear) => {
            let mut found = by_notation(operation, notation);
            if is_linear(operation, kind) {
                found.extend(linear.iter().map(|forms| partial(operation, forms)));
            }
            found
        }
        Law::Along(linear) => {
            let mut found = along(operation);
            found.extend(linear.iter().map(|forms| partial(operation, forms)));
            found
        }
        Law::Normalise => {
            let mut found = along(operation);
            if let Some(axis) = worked_axis(operation) {
                let split = vec![Sbp::S(axis)];
                found.push(Signature { inputs: split.clone(), outputs: split, in_parts: true });
            }
            found
        }
        Law::Reduce(reduction) => reduce(operation, reduction),
        Law::Move => moves(operation),
        Law::Pick => pick(operation),
        Law::Put => put(operation),
        Law::Make => {
            let rank = operation.outputs().next().map_or(0, |out| out.shape.rank());
            (0..rank).map(|axis| Signature::plain(Vec::new(), vec![Sbp::S(axis)])).collect()
        }
    }
}

/// Whether the forms of the row hold for this operation too: whole numbers are rounded when they are divided, and what is
/// filled in must be zero.
fn is_linear(operation: &OperationIr, kind: &str) -> bool {
    match operation {
        OperationIr::NumericInt(..) => !matches!(kind, "Div" | "DivScalar"),
        OperationIr::BaseFloat(Base::MaskFill(op)) | OperationIr::BaseInt(Base::MaskFill(op)) => {
            is_zero(&op.value)
        }
        OperationIr::BaseFloat(Base::Cast(_)) => true,
        OperationIr::BaseInt(Base::Cast(_)) => false,
        _ => true,
    }
}

fn is_zero(value: &ScalarIr) -> bool {
    value.elem::<f64>() == 0.0
}

/// `PB`: partial sums of the first operand, copies of the second, partial sums of the result. Operands that are not there
/// fall away.
fn partial(operation: &OperationIr, forms: &str) -> Signature {
    let forms = forms.chars().chain(std::iter::repeat('B'));
    let inputs = operation.inputs().zip(forms).map(|(_, form)| if form == 'P' { Sbp::SUM } else { Sbp::B });
    Signature::plain(inputs.collect(), vec![Sbp::SUM; operation.outputs().count()])
}

/// A signature on every axis of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NdSignature(pub Vec<Signature>);

impl NdSignature {
    /// What operand `index` must be.
    pub fn input(&self, index: usize) -> NdSbp {
        NdSbp(self.0.iter().map(|signature| signature.inputs[index]).collect())
    }

    /// What result `index` is.
    pub fn output(&self, index: usize) -> NdSbp {
        NdSbp(self.0.iter().map(|signature| signature.outputs[index]).collect())
    }
}

impl std::fmt::Display for NdSignature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let axes: Vec<String> = self.0.iter().map(Signature::to_string).collect();
        f.write_str(&axes.join(" | "))
    }
}

/// All legal signatures of an operation on a mesh: any combination of those of one axis, where a reshape's pieces still
/// begin where pieces of its result do.
///
/// # Errors
/// As [`signatures`].
pub fn on_mesh(operation: &OperationIr, mesh: &[usize]) -> Result<Vec<NdSignature>> {
    let single = signatures(operation)?;
    let mut found = vec![NdSignature(Vec::new())];
    for _ in mesh {
        let longer = found.iter().flat_map(|shorter| {
            single.iter().map(|signature| {
                let mut longer = shorter.clone();
                longer.0.push(signature.clone());
                longer
            })
        });
        found = longer.collect();
    }
    found.retain(|signature| is_sound(operation, mesh, signature));
    Ok(found)
}

/// Whether the pieces of an operation's operands fit those of its results. A reshape that splits an axis into factors or
/// joins some needs pieces whose number divides both axes; where something is added to partial results, no piece may be
/// empty, as then nothing would be computed that it could be added to.
fn is_sound(operation: &OperationIr, mesh: &[usize], signature: &NdSignature) -> bool {
    let pieces_of = |index: usize, axis: usize| -> usize {
        let splits = signature.0.iter().zip(mesh).filter(|(one, _)| one.inputs[index] == Sbp::S(axis));
        splits.map(|(_, n)| n).product()
    };
    let added =
        |one: &Signature| one.inputs.contains(&Sbp::SUM) && one.inputs.iter().any(|sbp| sbp.axis().is_some());
    let empty = |(index, tensor): (usize, &TensorIr)| {
        (0..tensor.shape.rank()).any(|axis| pieces_of(index, axis) > tensor.shape[axis])
    };
    if signature.0.iter().any(added) && operation.inputs().enumerate().any(empty) {
        return false;
    }
    let (OperationIr::BaseFloat(Base::Reshape(op))
    | OperationIr::BaseInt(Base::Reshape(op))
    | OperationIr::BaseBool(Base::Reshape(op))) = operation
    else {
        return true;
    };
    let splits = signature.0.iter().filter_map(|one| Some((one.inputs[0].axis()?, one.outputs[0].axis()?)));
    let axes: BTreeSet<(usize, usize)> = splits.collect();
    axes.into_iter().all(|(from, to)| {
        let (before, after) = (op.input.shape[from], op.out.shape[to]);
        let pieces = pieces_of(0, from);
        before == after || (before % pieces == 0 && after % pieces == 0)
    })
}
