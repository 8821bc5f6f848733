//! Burn's tensors between ranks.

use burn::tensor::{DType, Tensor, TensorData};
use half::{bf16, f16};
use kiln_core::{Error, Result};

use crate::communicator::Communicator;
use crate::element::{Element, Op};

impl Communicator {
    /// Reduces a tensor over all ranks: of the same shape and type on each, without a place in any autodiff graph. On
    /// the CPU its memory is reused when nothing else holds it.
    ///
    /// # Errors
    /// When the type does not travel between ranks, a rank is lost or late, or the ranks' calls differ.
    pub fn all_reduce_tensor<const D: usize>(&self, tensor: Tensor<D>, op: Op) -> Result<Tensor<D>> {
        if self.size() == 1 {
            return Ok(tensor);
        }
        let (device, dtype) = (tensor.device(), tensor.dtype());
        let data = tensor.into_data();
        let reduced = match dtype {
            DType::F32 => self.reduce_data::<f32>(data, op),
            DType::F64 => self.reduce_data::<f64>(data, op),
            DType::F16 => self.reduce_data::<f16>(data, op),
            DType::BF16 => self.reduce_data::<bf16>(data, op),
            DType::I32 => self.reduce_data::<i32>(data, op),
            DType::I64 => self.reduce_data::<i64>(data, op),
            DType::U8 => self.reduce_data::<u8>(data, op),
            DType::U32 => self.reduce_data::<u32>(data, op),
            DType::U64 => self.reduce_data::<u64>(data, op),
            other => Err(Error::usage(format!("ranks do not exchange tensors of {other:?}"))),
        }?;
        Ok(Tensor::from_data(reduced, (&device, dtype)))
    }

    fn reduce_data<T: Element + burn::tensor::Element>(
        &self,
        data: TensorData,
        op: Op,
    ) -> Result<TensorData> {
        let shape = data.shape().clone();
        let wrong = |e| Error::work(format!("the tensor cannot be read: {e:?}"));
        let mut values: Vec<T> = data.try_into_vec().map_err(wrong)?;
        self.all_reduce(&mut values, op)?;
        Ok(TensorData::new(values, shape))
    }
}
