//! Carrying out a boxing path: the collectives behind its steps, over the lines of a mesh.

use burn::tensor::{BoolStore, DType, TensorData};
use burn_flex::FlexTensor;
use kiln_cluster::{Communicator, Element, Op};
use kiln_core::{Error, Result};

use crate::boxing::Step;
use crate::sbp::{NdSbp, Reduction, Region, Sbp, copy_box};

/// A rank's place in the mesh, with a group of ranks for every axis.
pub struct Lines {
    mesh: Vec<usize>,
    coordinate: Vec<usize>,
    lines: Vec<Communicator>,
}

impl Lines {
    /// Makes the groups; all ranks of `world` call it, which are as many as the mesh has devices.
    ///
    /// # Errors
    /// When there are more or fewer ranks, or one is lost.
    pub fn new(world: &Communicator, mesh: &[usize]) -> Result<Self> {
        let devices: usize = mesh.iter().product();
        if world.size() != devices {
            return Err(Error::usage(format!(
                "the mesh {mesh:?} has {devices} devices, and there are {} ranks",
                world.size()
            )));
        }
        let coordinate = crate::sbp::coordinate(mesh, world.rank());
        let mut lines = Vec::with_capacity(mesh.len());
        for axis in 0..mesh.len() {
            // Ranks on one line differ in this axis alone.
            let line = coordinate.iter().zip(mesh).enumerate().fold(0, |color, (other, (&at, &extent))| {
                if other == axis { color * extent } else { color * extent + at }
            });
            let group = world.split(Some(line), world.rank() as i64)?;
            lines.push(group.ok_or_else(|| Error::work("a rank is in none of the groups of its mesh"))?);
        }
        Ok(Self { mesh: mesh.to_vec(), coordinate, lines })
    }

    /// The mesh.
    pub fn mesh(&self) -> &[usize] {
        &self.mesh
    }

    /// This rank's place.
    pub fn coordinate(&self) -> &[usize] {
        &self.coordinate
    }

    /// Bytes that this rank has sent over all lines.
    pub fn bytes_sent(&self) -> u64 {
        self.lines.iter().map(|line| line.traffic().total().bytes_sent).sum()
    }

    /// The local tensor after a path of steps that begins at `from`. All ranks call it in the same order.
    ///
    /// # Errors
    /// When a rank is lost or late, or the element type cannot travel.
    pub fn convert(
        &self,
        local: FlexTensor,
        shape: &[usize],
        from: &NdSbp,
        path: &[Step],
    ) -> Result<FlexTensor> {
        let mut state = from.clone();
        let mut local = local;
        for step in path {
            let mut others = state.clone();
            others.0[step.axis] = Sbp::B;
            let piece = Region::local(shape, &self.mesh, &others, &self.coordinate);
            let place =
                Place { line: &self.lines[step.axis], index: self.coordinate[step.axis], shape: piece.size };
            local = place.take(local, step)?;
            state.0[step.axis] = step.to;
        }
        Ok(local)
    }
}

/// A rank's place in a sub-group and the sub-group's tensor.
struct Place<'a> {
    line: &'a Communicator,
    index: usize,
    shape: Vec<usize>,
}

impl Place<'_> {
    fn take(&self, local: FlexTensor, step: &Step) -> Result<FlexTensor> {
        match local.dtype() {
            DType::F32 => self.take_as::<f32>(local, step),
            DType::F64 => self.take_as::<f64>(local, step),
            DType::I64 => self.take_as::<i64>(local, step),
            DType::I32 => self.take_as::<i32>(local, step),
            DType::Bool(store) => {
                let bytes = FlexTensor::from_data(as_bytes(local));
                let taken = self.take_as::<u8>(bytes, step)?;
                Ok(from_bytes(taken, store))
            }
            other => Err(Error::work(format!("tensors of {other:?} do not travel between ranks"))
                .hint("f32, f64, i32, i64 and bool do")),
        }
    }

    fn take_as<T: Number>(&self, local: FlexTensor, step: &Step) -> Result<FlexTensor> {
        let local = if local.is_contiguous() { local } else { local.to_contiguous() };
        let values: &[T] =
            local.as_slice().ok_or_else(|| Error::work("a local tensor is not laid out as its type says"))?;
        let whole = Region::whole(&self.shape);
        let ranks = self.line.size();
        let part = |axis: usize, index: usize| whole.clone().split(axis, ranks, index);
        let mine = |sbp: Sbp| sbp.axis().map_or_else(|| whole.clone(), |axis| part(axis, self.index));
        let (before, after) = (mine(step.from), mine(step.to));
        let mut out = vec![T::default(); after.elements()];
        match (step.from, step.to) {
            (Sbp::S(i), Sbp::S(j)) => {
                let sent: Vec<Region> = (0..ranks).map(|rank| before.intersect(&part(j, rank))).collect();
                let received: Vec<Region> = (0..ranks).map(|rank| part(i, rank).intersect(&after)).collect();
                let parts = self.exchange(values, &before, &sent, &received)?;
                let mut at = 0;
                for region in &received {
                    copy_box(&parts[at..at + region.elements()], region, &mut out, &after, region);
                    at += region.elements();
                }
            }
            (Sbp::S(i), Sbp::B) => {
                let parts: Vec<Region> = (0..ranks).map(|rank| part(i, rank)).collect();
                let counts: Vec<usize> = parts.iter().map(Region::elements).collect();
                // Along the first axis that is longer than one, parts lie one behind the other as they are.
                if self.shape[..i].iter().all(|&size| size == 1) {
                    self.line.all_gather_v(values, &counts, &mut out)?;
                } else {
                    let mut all = vec![T::default(); counts.iter().sum()];
                    self.line.all_gather_v(values, &counts, &mut all)?;
                    let mut at = 0;
                    for (region, count) in parts.iter().zip(counts) {
                        copy_box(&all[at..at + count], region, &mut out, &whole, region);
                        at += count;
                    }
                }
            }
            (Sbp::B, Sbp::S(_)) => copy_box(values, &whole, &mut out, &after, &after),
            (Sbp::P(reduction), Sbp::S(j)) => {
                let sent: Vec<Region> = (0..ranks).map(|rank| part(j, rank)).collect();
                let received = vec![after.clone(); ranks];
                let parts = self.exchange(values, &before, &sent, &received)?;
                let count = after.elements();
                out.copy_from_slice(&parts[..count]);
                // In the order of ranks, so that a run repeats to the bit.
                for rank in 1..ranks {
                    let others = &parts[rank * count..(rank + 1) * count];
                    out.iter_mut().zip(others).for_each(|(a, b)| *a = T::reduce(*a, *b, reduction));
                }
            }
            (Sbp::P(reduction), Sbp::B) => {
                out.copy_from_slice(values);
                self.line.all_reduce(&mut out, op(reduction))?;
            }
            (Sbp::S(_), Sbp::P(reduction)) => {
                out.fill(T::neutral(reduction));
                copy_box(values, &before, &mut out, &whole, &before);
            }
            (Sbp::B, Sbp::P(reduction)) => {
                if self.index == 0 {
                    return Ok(local);
                }
                out.fill(T::neutral(reduction));
            }
            (Sbp::B, Sbp::B) | (Sbp::P(_), Sbp::P(_)) => return Ok(local),
        }
        Ok(FlexTensor::from_data(TensorData::new(out, after.size)))
    }

    /// Sends a box to every rank and receives one from each.
    fn exchange<T: Number>(
        &self,
        values: &[T],
        from: &Region,
        sent: &[Region],
        received: &[Region],
    ) -> Result<Vec<T>> {
        let counts = |regions: &[Region]| regions.iter().map(Region::elements).collect::<Vec<_>>();
        let (send_counts, receive_counts) = (counts(sent), counts(received));
        let mut send = vec![T::default(); send_counts.iter().sum()];
        let mut at = 0;
        for (region, &count) in sent.iter().zip(&send_counts) {
            copy_box(values, from, &mut send[at..at + count], region, region);
            at += count;
        }
        let mut into = vec![T::default(); receive_counts.iter().sum()];
        self.line.all_to_all_v(&send, &send_counts, &mut into, &receive_counts)?;
        Ok(into)
    }
}

fn op(reduction: Reduction) -> Op {
    match reduction {
        Reduction::Sum => Op::Sum,
        Reduction::Max => Op::Max,
        Reduction::Min => Op::Min,
    }
}

fn as_bytes(local: FlexTensor) -> TensorData {
    let data = local.into_data();
    let (bytes, shape, _) = data.into_parts();
    TensorData::new(bytes.to_vec(), shape)
}

fn from_bytes(local: FlexTensor, store: BoolStore) -> FlexTensor {
    let (bytes, shape, _) = local.into_data().into_parts();
    FlexTensor::from_data(TensorData::from_bytes(bytes, shape, DType::Bool(store)))
}

/// The numbers that tensors hold.
trait Number: Element + burn::tensor::Element + Default {
    fn neutral(reduction: Reduction) -> Self;
    fn reduce(a: Self, b: Self, reduction: Reduction) -> Self;
}

macro_rules! number {
    ($type:ty, $least:expr, $most:expr, $add:expr) => {
        impl Number for $type {
            fn neutral(reduction: Reduction) -> Self {
                match reduction {
                    Reduction::Sum => Self::default(),
                    Reduction::Max => $least,
                    Reduction::Min => $most,
                }
            }

            fn reduce(a: Self, b: Self, reduction: Reduction) -> Self {
                match reduction {
                    Reduction::Sum => $add(a, b),
                    Reduction::Max => <$type as Element>::larger(a, b),
                    Reduction::Min => <$type as Element>::smaller(a, b),
                }
            }
        }
    };
}

number!(f32, f32::NEG_INFINITY, f32::INFINITY, |a, b| a + b);
number!(f64, f64::NEG_INFINITY, f64::INFINITY, |a, b| a + b);
number!(i64, i64::MIN, i64::MAX, i64::wrapping_add);
number!(i32, i32::MIN, i32::MAX, i32::wrapping_add);
number!(u8, u8::MIN, u8::MAX, u8::wrapping_add);
