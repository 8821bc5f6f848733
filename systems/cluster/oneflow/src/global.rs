//! Global tensors that are computed at once: every operation brings its operands into the forms that cost least.

use std::collections::HashMap;

use burn::backend::ir::{ActivationOperationIr as Activation, TensorId, TensorIr};
use burn::tensor::TensorData;
use burn_flex::{Flex, FlexDevice, FlexTensor};
use burn_router::TensorInterpreter;
use kiln_compiler::builder::Builder;
use kiln_compiler::operation_name;
use kiln_core::{Error, Result};

use crate::boxing::Router;
use crate::exchange::Lines;
use crate::execute::compute;
use crate::local::localise;
use crate::sbp::{NdSbp, Region};
use crate::signature::{NdSignature, on_mesh};

/// A tensor on the devices of a mesh, seen from one of them.
#[derive(Clone)]
pub struct GlobalTensor<'m> {
    lines: &'m Lines,
    shape: Vec<usize>,
    sbp: NdSbp,
    local: FlexTensor,
}

impl<'m> GlobalTensor<'m> {
    /// From what every device has of it.
    ///
    /// # Errors
    /// When the form does not fit the shape and the mesh, or the local tensor not the form.
    pub fn from_local(lines: &'m Lines, local: TensorData, shape: &[usize], sbp: NdSbp) -> Result<Self> {
        sbp.check("a global tensor", shape, lines.mesh())?;
        let region = Region::local(shape, lines.mesh(), &sbp, lines.coordinate());
        if local.shape().to_vec() != region.size {
            let found = format!("a local tensor has the shape {:?}", local.shape().to_vec());
            return Err(Error::work(format!("{found}; {sbp} of {shape:?} has {:?} here", region.size)));
        }
        Ok(Self { lines, shape: shape.to_vec(), sbp, local: FlexTensor::from_data(local) })
    }

    /// From the whole, which every device has.
    ///
    /// # Errors
    /// When the form does not fit, or is partial.
    pub fn from_whole(lines: &'m Lines, whole: &TensorData, sbp: NdSbp) -> Result<Self> {
        let copies = NdSbp::broadcast(lines.mesh().len());
        Self::from_local(lines, whole.clone(), whole.shape(), copies)?.to_global(&sbp)
    }

    /// The same tensor in another form. All devices call it.
    ///
    /// # Errors
    /// When the form does not fit, or a rank is lost.
    pub fn to_global(&self, sbp: &NdSbp) -> Result<Self> {
        sbp.check("a global tensor", &self.shape, self.lines.mesh())?;
        let path =
            Router::new(self.lines.mesh()).path(&self.shape, self.local.dtype().size(), &self.sbp, sbp)?;
        let local = self.lines.convert(self.local.clone(), &self.shape, &self.sbp, &path)?;
        Ok(Self { sbp: sbp.clone(), local, ..self.clone() })
    }

    /// What this device has of it.
    pub fn to_local(&self) -> TensorData {
        self.local.clone().into_data()
    }

    /// Its form.
    pub fn sbp(&self) -> &NdSbp {
        &self.sbp
    }

    /// Extents of the whole.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The matrix product.
    ///
    /// # Errors
    /// As [`compute`](Self::compute).
    pub fn matmul(&self, other: &Self) -> Result<Self> {
        Self::compute(&[self, other], |builder, x| builder.matmul(&x[0], &x[1]))
    }

    /// The sum.
    ///
    /// # Errors
    /// As [`compute`](Self::compute).
    pub fn add(&self, other: &Self) -> Result<Self> {
        Self::compute(&[self, other], |builder, x| builder.add(&x[0], &x[1]))
    }

    /// The positive part.
    ///
    /// # Errors
    /// As [`compute`](Self::compute).
    pub fn relu(&self) -> Result<Self> {
        Self::compute(&[self], |builder, x| builder.activation(&x[0], Activation::Relu))
    }

    /// What a builder writes for operands, computed by all devices, which call it with the same. Of the signatures of every
    /// operation, that which brings its operands into form with the fewest bytes is taken, and of these the one that
    /// divides the work most.
    ///
    /// # Errors
    /// When the operation does not fit its operands, or a rank is lost.
    pub fn compute(
        operands: &[&Self],
        write: impl FnOnce(&mut Builder, &[TensorIr]) -> std::result::Result<TensorIr, String>,
    ) -> Result<Self> {
        let first = operands.first().ok_or_else(|| Error::work("an operation needs an operand"))?;
        let mut builder = Builder::new(0);
        let tensors: Vec<TensorIr> =
            operands.iter().map(|operand| builder.provided(&operand.shape, operand.local.dtype())).collect();
        let result = write(&mut builder, &tensors).map_err(Error::work)?;
        let given = tensors.iter().zip(operands).map(|(tensor, operand)| (tensor.id, (*operand).clone()));
        let mut values: HashMap<TensorId, Self> = given.collect();
        let mesh = first.lines.mesh();
        let copies = NdSbp::broadcast(mesh.len());
        for (&id, data) in &builder.constants {
            values.insert(id, Self::from_local(first.lines, data.clone(), data.shape(), copies.clone())?);
        }
        let mut router = Router::new(mesh);
        for operation in &builder.operations {
            let lost = || Error::work("an operation reads what nothing wrote");
            let inputs: Vec<Self> = operation
                .inputs()
                .map(|tensor| values.get(&tensor.id).cloned().ok_or_else(lost))
                .collect::<Result<_>>()?;
            let cost = |signature: &NdSignature, router: &mut Router| {
                let read = inputs.iter().enumerate().map(|(at, input)| {
                    router.cost(&input.shape, input.local.dtype().size(), &input.sbp, &signature.input(at))
                });
                let bytes = read.sum::<Option<f64>>()?;
                Some((bytes, signature.0.iter().filter(|one| !one.divides()).count()))
            };
            let possible =
                on_mesh(operation, mesh)?.into_iter().filter(|one| one.0.iter().all(|axis| !axis.in_parts));
            let best = possible
                .filter_map(|signature| Some((cost(&signature, &mut router)?, signature)))
                .min_by(|((a, i), _), ((b, j), _)| a.total_cmp(b).then(i.cmp(j)));
            let (_, signature) = best.ok_or_else(|| Error::work("no signature fits the operands"))?;
            let formed =
                inputs.iter().enumerate().map(|(at, input)| Ok(input.to_global(&signature.input(at))?.local));
            let formed = formed.collect::<Result<Vec<_>>>()?;
            let local = localise(operation, &signature, mesh, first.lines.coordinate());
            let name = operation_name(operation)?;
            let results = compute(&mut TensorInterpreter::<Flex>::new(FlexDevice), &local, formed)
                .map_err(|found| Error::work(format!("{name} does not fit its operands: {found}")))?;
            for (at, (tensor, local)) in operation.outputs().zip(results).enumerate() {
                let value = Self {
                    lines: first.lines,
                    shape: tensor.shape.to_vec(),
                    sbp: signature.output(at),
                    local,
                };
                values.insert(tensor.id, value);
            }
        }
        values.remove(&result.id).ok_or_else(|| Error::work("the operation has no result"))
    }

    /// The whole, on every device. All of them call it.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn to_whole(&self) -> Result<TensorData> {
        Ok(self.to_global(&NdSbp::broadcast(self.lines.mesh().len()))?.to_local())
    }
}
