//! Whether a signature is sound: an operation on parts of its operands, put together, against the operation on the whole.

use burn::backend::ir::OperationIr;
use burn::tensor::{DType, TensorData};
use burn_flex::{Flex, FlexDevice, FlexTensor};
use burn_router::TensorInterpreter;
use kiln_core::{Error, Result};
use rand::{Rng, RngExt};

use crate::execute::compute;
use crate::local::localise;
use crate::parts::{assemble, cut};
use crate::random::{draw, random};
use crate::sbp::{NdSbp, Reduction, Region, Sbp, coordinate};
use crate::signature::NdSignature;

/// The results of an operation on whole operands.
///
/// # Errors
/// When it does not fit them.
pub fn on_whole(operation: &OperationIr, inputs: &[TensorData]) -> Result<Vec<TensorData>> {
    let copies = NdSignature(vec![crate::signature::Signature::broadcast(operation)]);
    device(operation, &copies, &[1], &[0], inputs.to_vec())
}

/// The results of an operation of which every device of a mesh computes a part. Partial operands are random parts.
///
/// # Errors
/// When an operation does not fit its operands.
pub fn on_parts(
    operation: &OperationIr,
    signature: &NdSignature,
    mesh: &[usize],
    inputs: &[TensorData],
    rng: &mut impl Rng,
) -> Result<Vec<TensorData>> {
    let devices: usize = mesh.iter().product();
    let mut local: Vec<Vec<TensorData>> = vec![Vec::new(); devices];
    for (at, input) in inputs.iter().enumerate() {
        for (device, part) in scatter(input, &signature.input(at), mesh, rng)?.into_iter().enumerate() {
            local[device].push(part);
        }
    }
    let mut results: Vec<Vec<TensorData>> = Vec::new();
    for (index, inputs) in local.into_iter().enumerate() {
        let found = device(operation, signature, mesh, &coordinate(mesh, index), inputs)?;
        results.resize(found.len(), Vec::new());
        found.into_iter().enumerate().for_each(|(at, part)| results[at].push(part));
    }
    let shapes = operation.outputs().map(|out| out.shape.to_vec());
    shapes
        .zip(results)
        .enumerate()
        .map(|(at, (shape, parts))| gather(&shape, mesh, &signature.output(at), parts))
        .collect()
}

fn device(
    operation: &OperationIr,
    signature: &NdSignature,
    mesh: &[usize],
    coordinate: &[usize],
    inputs: Vec<TensorData>,
) -> Result<Vec<TensorData>> {
    if let (Some(distribution), Some(out)) = (random(operation), operation.outputs().next()) {
        let region = Region::local(&out.shape, mesh, &signature.output(0), coordinate);
        return Ok(vec![draw(&out.shape, out.dtype, &region, distribution, 5).into_data()]);
    }
    let local = localise(operation, signature, mesh, coordinate);
    let inputs = inputs.into_iter().map(FlexTensor::from_data).collect();
    let results =
        compute(&mut TensorInterpreter::<Flex>::new(FlexDevice), &local, inputs).map_err(Error::work)?;
    Ok(results.into_iter().map(FlexTensor::into_data).collect())
}

/// The parts of a tensor on every device; partial ones at random.
///
/// # Errors
/// When the elements cannot be split.
pub fn scatter(
    whole: &TensorData,
    sbp: &NdSbp,
    mesh: &[usize],
    rng: &mut impl Rng,
) -> Result<Vec<TensorData>> {
    // Partial tensors by the place on the axes that make them so, the last the fastest.
    let mut values = vec![whole.clone()];
    for (form, &extent) in sbp.0.iter().zip(mesh) {
        if let Sbp::P(kind) = form {
            values = values.iter().flat_map(|value| apart(value, extent, *kind, rng)).collect();
        }
    }
    (0..mesh.iter().product())
        .map(|index| {
            let at = coordinate(mesh, index);
            let partial = sbp.0.iter().zip(mesh).zip(&at).filter(|((form, _), _)| form.reduction().is_some());
            let place = partial.fold(0, |place, ((_, extent), at)| place * extent + at);
            cut(&values[place], &Region::local(whole.shape(), mesh, sbp, &at))
        })
        .collect()
}

/// Random tensors whose reduction is `whole`.
fn apart(whole: &TensorData, parts: usize, kind: Reduction, rng: &mut impl Rng) -> Vec<TensorData> {
    let values: Vec<f64> = whole.iter::<f64>().collect();
    let integer = !whole.dtype().is_float();
    let mut found = vec![vec![0.0; values.len()]; parts];
    for (at, &value) in values.iter().enumerate() {
        let keeper = rng.random_range(0..parts);
        let mut rest = value;
        for (part, found) in found.iter_mut().enumerate() {
            let draw = if integer { f64::from(rng.random_range(0..4u8)) } else { rng.random_range(0.0..1.0) };
            found[at] = match kind {
                Reduction::Sum => draw,
                Reduction::Max => value - draw,
                Reduction::Min => value + draw,
            };
            if kind == Reduction::Sum && part != keeper {
                rest -= draw;
            }
        }
        found[keeper][at] = if kind == Reduction::Sum { rest } else { value };
    }
    let shape = whole.shape().to_vec();
    found
        .into_iter()
        .map(|values| TensorData::new(values, shape.clone()).convert_dtype(whole.dtype()))
        .collect()
}

/// The whole of a tensor from the parts of all devices, partial ones reduced.
///
/// # Errors
/// When parts do not have the shape that their form says.
pub fn gather(shape: &[usize], mesh: &[usize], sbp: &NdSbp, parts: Vec<TensorData>) -> Result<TensorData> {
    let mut parts = parts;
    let mut form = sbp.clone();
    // The last axis is reduced first.
    for axis in (0..mesh.len()).rev() {
        let Sbp::P(kind) = form.0[axis] else { continue };
        let before = parts.clone();
        for (index, part) in parts.iter_mut().enumerate() {
            let mut place = coordinate(mesh, index);
            let others = (0..mesh[axis]).map(|at| {
                place[axis] = at;
                place.iter().zip(mesh).fold(0, |index, (at, extent)| index * extent + at)
            });
            let others: Vec<usize> = others.collect();
            *part = reduced(others.iter().map(|&other| &before[other]), kind);
        }
        form.0[axis] = Sbp::B;
    }
    assemble(shape, mesh, &form, &parts)
}

fn reduced<'a>(parts: impl Iterator<Item = &'a TensorData>, kind: Reduction) -> TensorData {
    let mut total: Option<(Vec<f64>, Vec<usize>, DType)> = None;
    for part in parts {
        let values: Vec<f64> = part.iter::<f64>().collect();
        total = Some(match total {
            None => (values, part.shape().to_vec(), part.dtype()),
            Some((total, shape, dtype)) => {
                let join = |(a, b): (f64, f64)| match kind {
                    Reduction::Sum => a + b,
                    Reduction::Max => a.max(b),
                    Reduction::Min => a.min(b),
                };
                (total.into_iter().zip(values).map(join).collect(), shape, dtype)
            }
        });
    }
    let (values, shape, dtype) = total.unwrap_or((Vec::new(), vec![0], DType::F32));
    TensorData::new(values, shape).convert_dtype(dtype)
}
