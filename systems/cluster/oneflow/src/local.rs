//! What one device computes of an operation: the same operation on its parts of the operands.

use burn::backend::ir::{
    BaseOperationIr as Base, BinaryOpIr, BoolOperationIr, ClampOpIr, IrVisitorMut, MaskFillOpIr,
    ModuleOperationIr as Module, NumericOperationIr as Numeric, OperationIr, ReduceDimOpIr, ReduceOpIr,
    ScalarIr, ScalarOpIr, ShapeOpIr, TensorId, TensorIr, TensorStatus,
};
use burn::tensor::{BoolStore, DType, Shape, Slice};

use crate::sbp::{NdSbp, Region, Sbp};
use crate::signature::{NdSignature, indexed, is_whole, reduced_axes};

const BOOL: DType = DType::Bool(BoolStore::Native);

/// Operations on local tensors, whose operands are numbered from 0 on and its results after them.
#[derive(Debug, Clone)]
pub struct Local {
    /// In execution order; none where there is nothing to compute.
    pub operations: Vec<OperationIr>,
    /// The operands.
    pub inputs: Vec<TensorIr>,
    /// The results.
    pub outputs: Vec<TensorIr>,
    /// What the results are filled with where no element has to be computed.
    pub fill: f64,
}

/// The part of an operation that the device at a coordinate of the mesh computes.
pub fn localise(
    operation: &OperationIr,
    signature: &NdSignature,
    mesh: &[usize],
    coordinate: &[usize],
) -> Local {
    let region = |tensor: &TensorIr, sbp: &NdSbp| Region::local(&tensor.shape, mesh, sbp, coordinate);
    let inputs: Vec<Region> =
        operation.inputs().enumerate().map(|(at, tensor)| region(tensor, &signature.input(at))).collect();
    let outputs: Vec<Region> =
        operation.outputs().enumerate().map(|(at, tensor)| region(tensor, &signature.output(at))).collect();
    let mut renumber = Renumber {
        shapes: inputs.iter().chain(&outputs).map(|region| region.size.clone()).collect(),
        next: 0,
    };
    let mut local = operation.clone();
    local.visit_mut(&mut renumber);
    set_ranges(&mut local, operation);

    let mut writer = Writer { operations: Vec::new(), next: (inputs.len() + outputs.len()) as u64 };
    let operands: Vec<TensorIr> = local.inputs().cloned().collect();
    let results: Vec<TensorIr> = local.outputs().cloned().collect();
    let nothing = outputs.iter().all(|region| region.elements() == 0)
        || inputs.iter().any(|region| region.elements() == 0);
    if !nothing {
        writer.write(operation, local, &inputs);
    }
    let partial = (0..outputs.len()).flat_map(|at| signature.output(at).0).find_map(Sbp::reduction);
    let fill = partial.map_or(0.0, |reduction| reduction.neutral());
    Local { operations: writer.operations, inputs: operands, outputs: results, fill }
}

/// Numbers tensors by their place and gives them local shapes.
struct Renumber {
    shapes: Vec<Vec<usize>>,
    next: usize,
}

impl IrVisitorMut for Renumber {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        tensor.id = TensorId::new(self.next as u64);
        tensor.shape = Shape::from(self.shapes[self.next].clone());
        tensor.status = TensorStatus::ReadOnly;
        self.next += 1;
    }
}

/// Slices that take an axis in full take what there is of it.
fn set_ranges(local: &mut OperationIr, global: &OperationIr) {
    let (OperationIr::BaseFloat(to) | OperationIr::BaseInt(to) | OperationIr::BaseBool(to)) = local else {
        return;
    };
    let (OperationIr::BaseFloat(from) | OperationIr::BaseInt(from) | OperationIr::BaseBool(from)) = global
    else {
        return;
    };
    let (tensor, here, ranges) = match (from, to) {
        (Base::Slice(from), Base::Slice(to)) => (&from.tensor, &to.tensor, &mut to.ranges),
        (Base::SliceAssign(from), Base::SliceAssign(to)) => (&from.tensor, &to.tensor, &mut to.ranges),
        _ => return,
    };
    let whole: Vec<bool> =
        (0..tensor.shape.rank()).map(|axis| is_whole(ranges, axis, tensor.shape[axis])).collect();
    for (axis, range) in ranges.iter_mut().enumerate() {
        if whole[axis] {
            *range = Slice::from(0..here.shape[axis]);
        }
    }
}

/// Adds operations that number their results after everything there is.
struct Writer {
    operations: Vec<OperationIr>,
    next: u64,
}

impl Writer {
    fn fresh(&mut self) -> TensorId {
        self.next += 1;
        TensorId::new(self.next - 1)
    }

    /// Adds an operation; its result as later ones read it.
    fn push(&mut self, operation: OperationIr) -> TensorIr {
        let out = operation.outputs().next().expect("every operation here has a result");
        let out = TensorIr { status: TensorStatus::ReadOnly, ..out.clone() };
        self.operations.push(operation);
        out
    }

    fn write(&mut self, global: &OperationIr, local: OperationIr, inputs: &[Region]) {
        if let Some((tensor, _, dim)) = indexed(global)
            && inputs[0].size[dim] < tensor.shape[dim]
        {
            self.write_rows(local, dim, inputs[0].start[dim]);
        } else if let Some(count) = mean_count(global, inputs) {
            self.write_mean(local, count);
        } else {
            self.operations.push(local);
        }
    }

    /// Rows that lie elsewhere are read as zeros, and nothing is added to them.
    fn write_rows(&mut self, mut local: OperationIr, dim: usize, start: usize) {
        let Some((tensor, indices, _)) = indexed(&local) else { return };
        let (rows, indices) = (tensor.shape[dim], indices.clone());
        let (first, below) = (ScalarIr::Int(start as i64), ScalarIr::Int(0));
        let last = ScalarIr::Int(rows as i64 - 1);
        let int = indices.dtype;
        let id = self.fresh();
        let moved = self.push(OperationIr::NumericInt(
            int,
            Numeric::SubScalar(ScalarOpIr::create(indices, first, || id)),
        ));
        let id = self.fresh();
        let under = ScalarOpIr::create_comparison(moved.clone(), below, BOOL, || id);
        let under = self.push(OperationIr::NumericInt(int, Numeric::LowerElem(under)));
        let id = self.fresh();
        let over = ScalarOpIr::create_comparison(moved.clone(), last, BOOL, || id);
        let over = self.push(OperationIr::NumericInt(int, Numeric::GreaterElem(over)));
        let id = self.fresh();
        let elsewhere =
            self.push(OperationIr::Bool(BoolOperationIr::Or(BinaryOpIr::create(under, over, || id))));
        let id = self.fresh();
        let kept = self
            .push(OperationIr::NumericInt(int, Numeric::Clamp(ClampOpIr::create(moved, below, last, || id))));

        replace_indices(&mut local, &kept);
        match value_of(&mut local) {
            Some(value) => {
                let before = TensorIr { status: TensorStatus::ReadOnly, ..value.clone() };
                let masked = self.zero_where(&before, &elsewhere, dim, None);
                if let Some(value) = value_of(&mut local) {
                    *value = masked;
                }
                self.operations.push(local);
            }
            None => {
                let Some(out) = local.outputs().next().cloned() else { return };
                let id = self.fresh();
                let mut rename = RenameOutput { from: out.id, to: id };
                local.visit_mut(&mut rename);
                let picked = self.push(local);
                self.zero_where(&picked, &elsewhere, dim, Some(out.id));
            }
        }
    }

    /// Zeros in the rows along `dim` for which the mask holds; the mask is that of elements where it has as many axes.
    fn zero_where(&mut self, x: &TensorIr, mask: &TensorIr, dim: usize, out: Option<TensorId>) -> TensorIr {
        let mut shape = vec![1; x.shape.rank()];
        let ids = mask.shape.rank();
        if mask.shape == x.shape {
            shape.clone_from_slice(&mask.shape);
        } else if ids == 1 && x.shape[dim] == mask.shape[0] {
            shape[dim] = mask.shape[0];
        } else {
            shape[..ids].clone_from_slice(&mask.shape);
        }
        let id = self.fresh();
        let reshaped = ShapeOpIr::reshape(mask.clone(), Shape::from(shape), || id);
        let mask = self.push(OperationIr::BaseBool(Base::Reshape(reshaped)));
        let id = self.fresh();
        let expanded = ShapeOpIr::expand(mask, x.shape.clone(), || id);
        let mask = self.push(OperationIr::BaseBool(Base::Expand(expanded)));
        let id = out.unwrap_or_else(|| self.fresh());
        let zero = if x.dtype.is_float() { ScalarIr::Float(0.0) } else { ScalarIr::Int(0) };
        let filled = Base::MaskFill(MaskFillOpIr::create(x.clone(), mask, zero, || id));
        self.push(if x.dtype.is_float() {
            OperationIr::BaseFloat(filled)
        } else {
            OperationIr::BaseInt(filled)
        })
    }

    /// A mean over more elements than are here: their sum, divided by the number of all.
    fn write_mean(&mut self, local: OperationIr, count: usize) {
        let OperationIr::NumericFloat(dtype, numeric) = &local else { return };
        let id = self.fresh();
        let (sum, out) = match numeric {
            Numeric::Mean(op) => (Numeric::Sum(ReduceOpIr::create(op.input.clone(), || id)), op.out.id),
            Numeric::MeanDim(op) => {
                let sum = ReduceDimOpIr::create(op.input.clone(), op.axis, 1, || id);
                (Numeric::SumDim(sum), op.out.id)
            }
            _ => return,
        };
        let dtype = *dtype;
        let sum = self.push(OperationIr::NumericFloat(dtype, sum));
        let divided = ScalarOpIr::create(sum, ScalarIr::Float(count as f64), || out);
        self.push(OperationIr::NumericFloat(dtype, Numeric::DivScalar(divided)));
    }
}

struct RenameOutput {
    from: TensorId,
    to: TensorId,
}

impl IrVisitorMut for RenameOutput {
    fn visit_tensor_mut(&mut self, tensor: &mut TensorIr) {
        if tensor.id == self.from {
            tensor.id = self.to;
        }
    }
}

/// How many elements a mean is over, where a device does not have all of them.
fn mean_count(global: &OperationIr, inputs: &[Region]) -> Option<usize> {
    let OperationIr::NumericFloat(_, Numeric::Mean(_) | Numeric::MeanDim(_)) = global else { return None };
    let tensor = global.inputs().next()?;
    let axes = reduced_axes(global);
    let here: usize = axes.iter().map(|&axis| inputs[0].size[axis]).product();
    let all: usize = axes.iter().map(|&axis| tensor.shape[axis]).product();
    (here < all).then_some(all)
}

fn replace_indices(local: &mut OperationIr, indices: &TensorIr) {
    let indices = indices.clone();
    match local {
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => match base
        {
            Base::Select(op) => op.indices = indices,
            Base::Gather(op) => op.indices = indices,
            Base::SelectAssign(op) => op.indices = indices,
            Base::Scatter(op) => op.indices = indices,
            _ => {}
        },
        OperationIr::Module(Module::Embedding(op)) => op.indices = indices,
        OperationIr::Module(Module::EmbeddingBackward(op)) => op.indices = indices,
        _ => {}
    }
}

/// What is added by number.
fn value_of(local: &mut OperationIr) -> Option<&mut TensorIr> {
    match local {
        OperationIr::BaseFloat(Base::SelectAssign(op)) | OperationIr::BaseInt(Base::SelectAssign(op)) => {
            Some(&mut op.value)
        }
        OperationIr::BaseFloat(Base::Scatter(op)) | OperationIr::BaseInt(Base::Scatter(op)) => {
            Some(&mut op.value)
        }
        OperationIr::Module(Module::EmbeddingBackward(op)) => Some(&mut op.out_grad),
        _ => None,
    }
}
