//! Operations that work along axes, move them, or pick and add rows by number.

use burn::backend::ir::{
    BaseOperationIr as Base, FloatOperationIr as Float, ModuleOperationIr as Module,
    NumericOperationIr as Numeric, OperationIr, PadModeIr, TensorIr,
};
use burn::tensor::{IndexingUpdateOp, Slice};

use super::{Signature, is_zero};
use crate::sbp::{Reduction, Sbp};

/// The axis along which an operation works.
pub fn worked_axis(operation: &OperationIr) -> Option<usize> {
    use burn::backend::ir::ActivationOperationIr as Activation;
    match operation {
        OperationIr::Activation(
            Activation::Softmax(op) | Activation::LogSoftmax(op) | Activation::Softmin(op),
        ) => Some(op.axis),
        OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric) => match numeric {
            Numeric::CumSum(op) | Numeric::CumProd(op) | Numeric::CumMin(op) | Numeric::CumMax(op) => {
                Some(op.axis)
            }
            Numeric::ProdDim(op)
            | Numeric::MaxAbsDim(op)
            | Numeric::ArgMax(op)
            | Numeric::ArgMin(op)
            | Numeric::ArgTopK(op)
            | Numeric::TopK(op) => Some(op.axis),
            Numeric::TopKWithIndices(op) => Some(op.dim),
            Numeric::MaxDimWithIndices(op) | Numeric::MinDimWithIndices(op) => Some(op.dim),
            Numeric::Sort(op) | Numeric::ArgSort(op) => Some(op.dim),
            Numeric::SortWithIndices(op) => Some(op.dim),
            _ => None,
        },
        OperationIr::BaseBool(Base::AllDim(op) | Base::AnyDim(op)) => Some(op.axis),
        OperationIr::BaseFloat(Base::AllDim(op) | Base::AnyDim(op)) => Some(op.axis),
        OperationIr::BaseInt(Base::AllDim(op) | Base::AnyDim(op)) => Some(op.axis),
        OperationIr::Float(_, Float::Cross(op)) => Some(op.dim),
        _ => None,
    }
}

/// Every axis but the one that is worked along.
pub fn along(operation: &OperationIr) -> Vec<Signature> {
    let (Some(worked), Some(input)) = (worked_axis(operation), operation.inputs().next()) else {
        return Vec::new();
    };
    let (operands, results) = (operation.inputs().count(), operation.outputs().count());
    let splittable = (0..input.shape.rank()).filter(|&axis| axis != worked && input.shape[axis] > 1);
    splittable
        .filter(|&axis| {
            operation
                .inputs()
                .chain(operation.outputs())
                .all(|tensor| tensor.shape[axis] == input.shape[axis])
        })
        .map(|axis| Signature::plain(vec![Sbp::S(axis); operands], vec![Sbp::S(axis); results]))
        .collect()
}

/// The axes that a reduction reduces; all where it leaves one element.
pub fn reduced_axes(operation: &OperationIr) -> Vec<usize> {
    let (OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric)) = operation else {
        return Vec::new();
    };
    match numeric {
        Numeric::SumDim(op) | Numeric::MeanDim(op) | Numeric::MaxDim(op) | Numeric::MinDim(op) => {
            vec![op.axis]
        }
        Numeric::SumDims(op) => op.axes.clone(),
        Numeric::Sum(op) | Numeric::Mean(op) | Numeric::Max(op) | Numeric::Min(op) => {
            (0..op.input.shape.rank()).collect()
        }
        _ => Vec::new(),
    }
}

pub fn reduce(operation: &OperationIr, reduction: Reduction) -> Vec<Signature> {
    let Some(input) = operation.inputs().next() else { return Vec::new() };
    let reduced = reduced_axes(operation);
    // Means of whole numbers are rounded, and the largest few are no single maximum.
    match operation {
        OperationIr::NumericInt(_, Numeric::Mean(_) | Numeric::MeanDim(_)) => return Vec::new(),
        OperationIr::NumericFloat(_, Numeric::MaxDim(op) | Numeric::MinDim(op))
            if op.accumulator_len != 1 =>
        {
            return Vec::new();
        }
        _ => {}
    }
    let splittable = (0..input.shape.rank()).filter(|&axis| input.shape[axis] > 1);
    let mut found: Vec<Signature> = splittable
        .map(|axis| {
            let output = if reduced.contains(&axis) { Sbp::P(reduction) } else { Sbp::S(axis) };
            Signature::plain(vec![Sbp::S(axis)], vec![output])
        })
        .collect();
    let form = Sbp::P(reduction);
    found.push(Signature::plain(vec![form], vec![form]));
    found
}

/// An axis of the result, and where every operand has it.
type Moved = (usize, Vec<Option<usize>>);

pub fn moves(operation: &OperationIr) -> Vec<Signature> {
    let (OperationIr::BaseFloat(_)
    | OperationIr::BaseInt(_)
    | OperationIr::BaseBool(_)
    | OperationIr::NumericFloat(..)
    | OperationIr::NumericInt(..)) = operation
    else {
        return Vec::new();
    };
    let (Some(output), operands) = (operation.outputs().next(), operation.inputs().count()) else {
        return Vec::new();
    };
    let splits = moved_axes(operation).into_iter().filter(|(axis, _)| output.shape[*axis] > 1);
    let mut found: Vec<Signature> = splits
        .map(|(axis, places)| {
            Signature::plain(
                places.into_iter().map(|place| place.map_or(Sbp::B, Sbp::S)).collect(),
                vec![Sbp::S(axis)],
            )
        })
        .collect();
    // What only moves does so before or after a reduction alike; a border of zeros adds nothing to sums.
    let kinds: &[Reduction] = match operation {
        OperationIr::NumericFloat(_, Numeric::Pad(op)) | OperationIr::NumericInt(_, Numeric::Pad(op)) => {
            match &op.mode {
                PadModeIr::Constant(value) if is_zero(value) => &[Reduction::Sum],
                _ => &[],
            }
        }
        _ => &[Reduction::Sum, Reduction::Max, Reduction::Min],
    };
    found
        .extend(kinds.iter().map(|&kind| Signature::plain(vec![Sbp::P(kind); operands], vec![Sbp::P(kind)])));
    found
}

fn moved_axes(operation: &OperationIr) -> Vec<Moved> {
    let same = |rank: usize, keep: &dyn Fn(usize) -> bool| -> Vec<Moved> {
        (0..rank).filter(|&axis| keep(axis)).map(|axis| (axis, vec![Some(axis)])).collect()
    };
    match operation {
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => match base
        {
            Base::Reshape(op) => reshaped_axes(&op.input.shape, &op.out.shape)
                .into_iter()
                .map(|(from, to)| (to, vec![Some(from)]))
                .collect(),
            Base::SwapDims(op) => {
                let swapped = |axis| match axis {
                    axis if axis == op.dim1 => op.dim2,
                    axis if axis == op.dim2 => op.dim1,
                    axis => axis,
                };
                (0..op.out.shape.rank()).map(|axis| (axis, vec![Some(swapped(axis))])).collect()
            }
            Base::Permute(op) => {
                op.axes.iter().enumerate().map(|(to, &from)| (to, vec![Some(from)])).collect()
            }
            Base::Flip(op) => same(op.out.shape.rank(), &|axis| !op.axes.contains(&axis)),
            Base::Expand(op) => {
                let extra = op.out.shape.rank() - op.input.shape.rank();
                let place = |axis: usize| {
                    axis.checked_sub(extra).filter(|&from| op.input.shape[from] == op.out.shape[axis])
                };
                (0..op.out.shape.rank()).map(|axis| (axis, vec![place(axis)])).collect()
            }
            Base::Slice(op) => {
                same(op.out.shape.rank(), &|axis| is_whole(&op.ranges, axis, op.tensor.shape[axis]))
            }
            Base::SliceAssign(op) => (0..op.out.shape.rank())
                .filter(|&axis| is_whole(&op.ranges, axis, op.tensor.shape[axis]))
                .map(|axis| (axis, vec![Some(axis); 2]))
                .collect(),
            Base::RepeatDim(op) => same(op.out.shape.rank(), &|axis| axis != op.dim),
            Base::Cat(op) => (0..op.out.shape.rank())
                .filter(|&axis| axis != op.dim)
                .map(|axis| (axis, vec![Some(axis); op.tensors.len()]))
                .collect(),
            Base::Unfold(op) => same(op.input.shape.rank(), &|axis| axis != op.dim),
            _ => Vec::new(),
        },
        OperationIr::NumericFloat(_, Numeric::Pad(op)) | OperationIr::NumericInt(_, Numeric::Pad(op)) => {
            same(op.out.shape.rank(), &|axis| op.padding.get(axis).is_none_or(|pad| *pad == (0, 0)))
        }
        _ => Vec::new(),
    }
}

/// Whether a slice takes an axis in full.
pub fn is_whole(ranges: &[Slice], axis: usize, size: usize) -> bool {
    ranges.get(axis).is_none_or(|range| {
        range.start == 0 && range.step == 1 && range.end.is_none_or(|end| end == size as isize)
    })
}

/// Axes that begin the same group of factors before and after a reshape.
fn reshaped_axes(from: &[usize], to: &[usize]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let (mut i, mut j) = (0, 0);
    loop {
        while i < from.len() && from[i] == 1 {
            i += 1;
        }
        while j < to.len() && to[j] == 1 {
            j += 1;
        }
        if i == from.len() || j == to.len() {
            return found;
        }
        found.push((i, j));
        let (mut before, mut after) = (from[i], to[j]);
        (i, j) = (i + 1, j + 1);
        while before != after {
            if before < after {
                let Some(size) = from.get(i) else { return found };
                before *= size;
                i += 1;
            } else {
                let Some(size) = to.get(j) else { return found };
                after *= size;
                j += 1;
            }
        }
    }
}

/// The tensor that is picked from or put into, its indices and the axis.
pub fn indexed(operation: &OperationIr) -> Option<(&TensorIr, &TensorIr, usize)> {
    match operation {
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => match base
        {
            Base::Select(op) => Some((&op.tensor, &op.indices, op.dim)),
            Base::Gather(op) => Some((&op.tensor, &op.indices, op.dim)),
            Base::SelectAssign(op) => Some((&op.tensor, &op.indices, op.dim)),
            Base::Scatter(op) => Some((&op.tensor, &op.indices, op.dim)),
            _ => None,
        },
        OperationIr::Module(Module::Embedding(op)) => Some((&op.weights, &op.indices, 0)),
        OperationIr::Module(Module::EmbeddingBackward(op)) => Some((&op.weights, &op.indices, 0)),
        _ => None,
    }
}

/// Axes other than the indexed one that indices of as many axes share with the tensor, or that they do not have.
fn beside(tensor: &TensorIr, indices: &TensorIr, dim: usize, rows: bool) -> Vec<(usize, Sbp)> {
    (0..tensor.shape.rank())
        .filter(|&axis| axis != dim && tensor.shape[axis] > 1)
        .filter(|&axis| rows || indices.shape[axis] == tensor.shape[axis])
        .map(|axis| (axis, if rows { Sbp::B } else { Sbp::S(axis) }))
        .collect()
}

fn is_rows(operation: &OperationIr) -> bool {
    matches!(
        operation,
        OperationIr::BaseFloat(Base::Select(_) | Base::SelectAssign(_))
            | OperationIr::BaseInt(Base::Select(_) | Base::SelectAssign(_))
            | OperationIr::BaseBool(Base::Select(_) | Base::SelectAssign(_))
    )
}

pub fn pick(operation: &OperationIr) -> Vec<Signature> {
    let Some((tensor, indices, dim)) = indexed(operation) else { return Vec::new() };
    let rows = is_rows(operation);
    let mut found: Vec<Signature> = beside(tensor, indices, dim, rows)
        .into_iter()
        .map(|(axis, of_indices)| Signature::plain(vec![Sbp::S(axis), of_indices], vec![Sbp::S(axis)]))
        .collect();
    if tensor.shape[dim] > 1 {
        found.push(Signature::plain(vec![Sbp::S(dim), Sbp::B], vec![Sbp::SUM]));
    }
    let of_indices = if rows { 0 } else { dim };
    if indices.shape[of_indices] > 1 {
        found.push(Signature::plain(vec![Sbp::B, Sbp::S(of_indices)], vec![Sbp::S(dim)]));
    }
    found.push(Signature::plain(vec![Sbp::SUM, Sbp::B], vec![Sbp::SUM]));
    found
}

pub fn put(operation: &OperationIr) -> Vec<Signature> {
    let Some((tensor, indices, dim)) = indexed(operation) else { return Vec::new() };
    let rows = is_rows(operation);
    let mut found: Vec<Signature> = beside(tensor, indices, dim, rows)
        .into_iter()
        .map(|(axis, of_indices)| {
            Signature::plain(vec![Sbp::S(axis), of_indices, Sbp::S(axis)], vec![Sbp::S(axis)])
        })
        .collect();
    let adds = match operation {
        OperationIr::BaseFloat(Base::SelectAssign(op)) | OperationIr::BaseInt(Base::SelectAssign(op)) => {
            op.update == IndexingUpdateOp::Add
        }
        OperationIr::BaseFloat(Base::Scatter(op)) | OperationIr::BaseInt(Base::Scatter(op)) => {
            op.update == IndexingUpdateOp::Add
        }
        _ => false,
    };
    if adds {
        if tensor.shape[dim] > 1 {
            found.push(Signature::plain(vec![Sbp::S(dim), Sbp::B, Sbp::B], vec![Sbp::S(dim)]));
        }
        let of_indices = if rows { 0 } else { dim };
        if indices.shape[of_indices] > 1 {
            found.push(Signature::plain(vec![Sbp::SUM, Sbp::S(of_indices), Sbp::S(dim)], vec![Sbp::SUM]));
        }
        found.push(Signature::plain(vec![Sbp::SUM, Sbp::B, Sbp::SUM], vec![Sbp::SUM]));
    }
    found
}
