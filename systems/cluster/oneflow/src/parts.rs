//! Parts of tensors in memory: cut out of the whole, and put together again.

use burn::tensor::{BoolStore, DType, TensorData};
use kiln_core::{Error, Result};

use crate::sbp::{NdSbp, Region, copy_box};

/// The part of a whole tensor in a region.
pub fn cut(data: &TensorData, region: &Region) -> Result<TensorData> {
    let whole = Region::whole(data.shape());
    if *region == whole {
        return Ok(data.clone());
    }
    /// One arm a type.
    macro_rules! by_type {
        ($($dtype:pat => $type:ty),+) => {
            match data.dtype() {
                $($dtype => {
                    let values = data.as_slice::<$type>().map_err(|e| Error::work(format!("a tensor cannot be read: {e:?}")))?;
                    let mut out = vec![<$type>::default(); region.elements()];
                    copy_box(values, &whole, &mut out, region, region);
                    Ok(TensorData::new(out, region.size.clone()))
                })+
                DType::Bool(store) => {
                    let mut out = vec![0u8; region.elements()];
                    copy_box(data.as_bytes(), &whole, &mut out, region, region);
                    Ok(bools(out, &region.size, store))
                }
                other => Err(Error::work(format!("tensors of {other:?} cannot be split"))),
            }
        };
    }
    by_type!(DType::F32 => f32, DType::F64 => f64, DType::I64 => i64, DType::I32 => i32)
}

fn bools(bytes: Vec<u8>, shape: &[usize], store: BoolStore) -> TensorData {
    let (bytes, shape, _) = TensorData::new(bytes, shape.to_vec()).into_parts();
    TensorData::from_bytes(bytes, shape, DType::Bool(store))
}

/// The whole of a tensor from the parts of all devices, in rank order.
///
/// # Errors
/// When parts have another type or size than their form says, or are partial.
pub fn assemble(shape: &[usize], mesh: &[usize], sbp: &NdSbp, parts: &[TensorData]) -> Result<TensorData> {
    let whole = Region::whole(shape);
    let first = parts.first().ok_or_else(|| Error::work("there are no parts to assemble"))?;
    if sbp.is_partial() {
        return Err(Error::work(format!("{sbp} has no parts that can be put side by side")));
    }
    /// One arm a type.
    macro_rules! by_type {
        ($($dtype:pat => $type:ty),+) => {
            match first.dtype() {
                $($dtype => {
                    let mut out = vec![<$type>::default(); whole.elements()];
                    for (index, part) in parts.iter().enumerate() {
                        let region = Region::local(shape, mesh, sbp, &crate::sbp::coordinate(mesh, index));
                        let values = part.as_slice::<$type>().map_err(|e| Error::work(format!("a part cannot be read: {e:?}")))?;
                        copy_box(values, &region, &mut out, &whole, &region);
                    }
                    Ok(TensorData::new(out, shape.to_vec()))
                })+
                DType::Bool(store) => {
                    let mut out = vec![0u8; whole.elements()];
                    for (index, part) in parts.iter().enumerate() {
                        let region = Region::local(shape, mesh, sbp, &crate::sbp::coordinate(mesh, index));
                        copy_box(part.as_bytes(), &region, &mut out, &whole, &region);
                    }
                    Ok(bools(out, shape, store))
                }
                other => Err(Error::work(format!("tensors of {other:?} cannot be put together"))),
            }
        };
    }
    by_type!(DType::F32 => f32, DType::F64 => f64, DType::I64 => i64, DType::I32 => i32)
}
