//! Registers of other ranks: what an actor has written is pulled by the actor that reads it.
//!
//! The writer tells every reader that it has a piece (`req`). A reader acts when it has a free register; it then asks for its
//! part (`pull`), receives it, and says that it is done (`ack`). The writer's register is free again when all readers have
//! acknowledged. So the reader's free registers are the writer's credit, and nothing arrives for which there is no room.

use std::time::Instant;

use burn::tensor::{BoolStore, DType, TensorData};
use burn_flex::FlexTensor;
use kiln_cluster::{Communicator, Element};
use kiln_core::{Error, Result};

use crate::actor::begins_now;
use crate::parts::cut;
use crate::sbp::{NdSbp, Region, Sbp, coordinate, copy_box};

/// An actor of any rank: 24 bits of rank, 8 of queue, 32 of its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address(pub u64);

impl Address {
    /// Of the actor with a number, on a queue of a rank.
    pub fn new(rank: usize, queue: usize, actor: usize) -> Self {
        Self((rank as u64) << 40 | (queue as u64 & 0xff) << 32 | (actor as u64 & 0xffff_ffff))
    }

    /// The rank.
    pub fn rank(self) -> usize {
        (self.0 >> 40) as usize
    }

    /// The queue.
    pub fn queue(self) -> usize {
        (self.0 >> 32 & 0xff) as usize
    }

    /// The actor's number on its rank.
    pub fn actor(self) -> usize {
        (self.0 & 0xffff_ffff) as usize
    }
}

/// A box of a tensor that one device has and another needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pull {
    /// Place in the mesh of those who have it.
    pub from: usize,
    /// Place in the mesh of those who need it.
    pub to: usize,
    /// Which part of the whole tensor.
    pub region: Region,
}

/// What is pulled when a tensor goes to other devices: the whole of it for every copy there (the disjoint column of table 2).
/// Of copies, each reader takes another.
///
/// # Errors
/// When a form is partial: partial tensors are reduced where they are, before they go.
pub fn pulls(
    shape: &[usize],
    (from, from_mesh): (&NdSbp, &[usize]),
    (to, to_mesh): (&NdSbp, &[usize]),
) -> Result<Vec<Pull>> {
    if from.is_partial() || to.is_partial() {
        return Err(Error::usage(format!("{from} cannot go to other devices as {to}: partial tensors stay"))
            .hint("S or B on both sides"));
    }
    let (writers, readers): (usize, usize) = (from_mesh.iter().product(), to_mesh.iter().product());
    let mut pulls = Vec::new();
    for reader in 0..readers {
        let needed = Region::local(shape, to_mesh, to, &coordinate(to_mesh, reader));
        for writer in 0..writers {
            let place = coordinate(from_mesh, writer);
            let mut copies = from.0.iter().zip(from_mesh).zip(&place).filter(|((sbp, _), _)| **sbp == Sbp::B);
            if !copies.all(|((_, extent), at)| *at == reader % extent) {
                continue;
            }
            let region = Region::local(shape, from_mesh, from, &place).intersect(&needed);
            if region.elements() > 0 {
                pulls.push(Pull { from: writer, to: reader, region });
            }
        }
    }
    Ok(pulls)
}

/// The end of an edge where it is written.
pub struct Departing<'a> {
    pub(super) name: String,
    pub(super) control: &'a Communicator,
    pub(super) payload: &'a Communicator,
    pub(super) tag: u32,
    pub(super) own: Address,
    /// What this rank has.
    pub(super) region: Region,
    /// Who reads which part of it.
    pub(super) parts: Vec<(Address, Region)>,
}

/// The end of an edge where it is read.
pub struct Arriving<'a> {
    pub(super) name: String,
    pub(super) control: &'a Communicator,
    pub(super) payload: &'a Communicator,
    pub(super) tag: u32,
    pub(super) own: Address,
    /// What this rank needs.
    pub(super) region: Region,
    /// Who writes which part of it.
    pub(super) parts: Vec<(Address, Region)>,
    pub(super) dtype: DType,
}

/// To whom, from whom, and of which piece a message is.
type Message = [u64; 3];

impl Departing<'_> {
    /// Hands a piece to everyone who reads it; returns when all are done with the register.
    ///
    /// # Errors
    /// When a reader is lost, or something else is asked for.
    pub fn offer(&self, value: FlexTensor, piece: usize) -> Result<()> {
        let (data, begun) = (value.into_data(), Instant::now());
        for (reader, _) in &self.parts {
            let req: Message = [reader.0, self.own.0, piece as u64];
            self.control.send(reader.rank(), self.tag, &req)?;
        }
        for (number, (reader, region)) in self.parts.iter().enumerate() {
            self.expect(*reader, piece)?;
            if number == 0 {
                begins_now(begun);
            }
            let part = part_of(&data, &self.region, region)?;
            send(self.payload, reader.rank(), self.tag, &part)?;
        }
        self.parts.iter().try_for_each(|(reader, _)| self.expect(*reader, piece))
    }

    /// A `pull` or an `ack`.
    fn expect(&self, reader: Address, piece: usize) -> Result<()> {
        receive(self.control, reader, self.tag, [self.own.0, reader.0, piece as u64], &self.name)
    }
}

impl Arriving<'_> {
    /// Takes a piece from those who wrote it.
    ///
    /// # Errors
    /// When a writer is lost, or offers something else.
    pub fn pull(&self, piece: usize) -> Result<FlexTensor> {
        let data = match self.dtype {
            DType::F32 => self.pull_as::<f32>(piece)?,
            DType::F64 => self.pull_as::<f64>(piece)?,
            DType::I64 => self.pull_as::<i64>(piece)?,
            DType::I32 => self.pull_as::<i32>(piece)?,
            DType::Bool(store) => as_bools(self.pull_as::<u8>(piece)?, store),
            other => return Err(not_travelling(other)),
        };
        Ok(FlexTensor::from_data(data))
    }

    fn pull_as<T: Element + burn::tensor::Element + Default>(&self, piece: usize) -> Result<TensorData> {
        let (mut out, begun) = (vec![T::default(); self.region.elements()], Instant::now());
        for (number, (writer, region)) in self.parts.iter().enumerate() {
            let (rank, message) = (writer.rank(), [writer.0, self.own.0, piece as u64]);
            receive(self.control, *writer, self.tag, [self.own.0, writer.0, piece as u64], &self.name)?;
            if number == 0 {
                begins_now(begun);
            }
            self.control.send(rank, self.tag, &message)?;
            let part: Vec<T> = self.payload.irecv(rank, self.tag, region.elements())?.wait()?;
            copy_box(&part, region, &mut out, &self.region, region);
            self.control.send(rank, self.tag, &message)?;
        }
        Ok(TensorData::new(out, self.region.size.clone()))
    }
}

fn receive(control: &Communicator, from: Address, tag: u32, expected: Message, name: &str) -> Result<()> {
    let mut found: Message = [0; 3];
    control.recv(from.rank(), tag, &mut found)?;
    if found == expected {
        return Ok(());
    }
    let told = |[to, from, piece]: Message| {
        let (to, from) = (Address(to), Address(from));
        format!("piece {piece} from actor {} of rank {} to actor {}", from.actor(), from.rank(), to.actor())
    };
    Err(Error::work(format!("{name}: a message is about {}, expected {}", told(found), told(expected))))
}

/// A box of what a rank has.
fn part_of(data: &TensorData, has: &Region, part: &Region) -> Result<TensorData> {
    let start = part.start.iter().zip(&has.start).map(|(part, has)| part - has).collect();
    cut(data, &Region { start, size: part.size.clone() })
}

fn send(payload: &Communicator, to: usize, tag: u32, data: &TensorData) -> Result<()> {
    let unread = |e| Error::work(format!("a tensor cannot be read: {e:?}"));
    match data.dtype() {
        DType::F32 => payload.send(to, tag, data.as_slice::<f32>().map_err(unread)?),
        DType::F64 => payload.send(to, tag, data.as_slice::<f64>().map_err(unread)?),
        DType::I64 => payload.send(to, tag, data.as_slice::<i64>().map_err(unread)?),
        DType::I32 => payload.send(to, tag, data.as_slice::<i32>().map_err(unread)?),
        DType::Bool(_) => payload.send(to, tag, data.as_bytes()),
        other => Err(not_travelling(other)),
    }
}

fn not_travelling(dtype: DType) -> Error {
    Error::work(format!("tensors of {dtype:?} do not travel between stages"))
        .hint("f32, f64, i32, i64 and bool do")
}

fn as_bools(bytes: TensorData, store: BoolStore) -> TensorData {
    let (bytes, shape, _) = bytes.into_parts();
    TensorData::from_bytes(bytes, shape, DType::Bool(store))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boxing::bytes_to_others;

    #[test]
    fn as_many_bytes_are_pulled_as_the_table_says() {
        let shape = [7, 5];
        let forms = [Sbp::S(0), Sbp::S(1), Sbp::B];
        for (p1, p2) in [(1, 1), (1, 3), (3, 1), (2, 2), (2, 3), (3, 2)] {
            for from in forms {
                for to in forms {
                    let found =
                        pulls(&shape, (&NdSbp(vec![from]), &[p1]), (&NdSbp(vec![to]), &[p2])).unwrap();
                    let moved: usize = found.iter().map(|pull| pull.region.elements()).sum();
                    assert_eq!(
                        moved as f64,
                        bytes_to_others(from, to, p1, p2, 35.0),
                        "{from} {p1} to {to} {p2}"
                    );
                }
            }
        }
    }

    #[test]
    fn partial_tensors_do_not_go_to_others() {
        let refusal = pulls(&[4], (&NdSbp(vec![Sbp::SUM]), &[2]), (&NdSbp(vec![Sbp::B]), &[2])).unwrap_err();
        assert!(refusal.to_string().contains("partial tensors stay"), "{refusal}");
    }

    #[test]
    fn addresses_hold_rank_queue_and_actor() {
        let address = Address::new(70_000, 9, 123_456_789);
        assert_eq!((address.rank(), address.queue(), address.actor()), (70_000, 9, 123_456_789));
    }
}
