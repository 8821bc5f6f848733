//! The groups that a rank belongs to.

use kiln_cluster::{Communicator, Mesh, Op};
use kiln_core::{Error, Result};

use crate::layout::{Coordinate, ParallelLayout};
use crate::real::Real;

/// One rank's place in a layout, and its groups.
pub struct Ranks {
    /// How ranks share the network.
    pub layout: ParallelLayout,
    /// Where this one stands.
    pub at: Coordinate,
    /// All ranks.
    pub world: Communicator,
    /// Those that share this rank's layers.
    pub tensor: Communicator,
    /// Those that have the same part of other layers, from first to last.
    pub pipe: Communicator,
    /// Those that have the same part of the same layers.
    pub data: Communicator,
    /// All that together have one whole network.
    pub model: Communicator,
    /// First and last pipeline rank, which share the word embedding; none on others and where they are one.
    pub embedding: Option<Communicator>,
}

impl Ranks {
    /// Divides all ranks into groups; every rank must call this.
    ///
    /// # Errors
    /// When there are not t · p · d ranks, or one is lost.
    pub fn new(layout: &ParallelLayout, world: Communicator) -> Result<Self> {
        if world.size() != layout.ranks() {
            return Err(Error::usage(format!(
                "there are {} ranks, but --tensor {} times --pipeline {} times --data-parallel {} is {}",
                world.size(),
                layout.tensor,
                layout.pipeline,
                layout.data,
                layout.ranks()
            ))
            .hint("start as many processes as the layout has ranks"));
        }
        let at = layout.coordinate(world.rank());
        let mesh = Mesh::new(&[("pipe", layout.pipeline), ("data", layout.data), ("tensor", layout.tensor)])?;
        let key = world.rank() as i64;
        let model = world.split(Some(at.data), key)?.ok_or_else(|| Error::work("every rank has a group"))?;
        let ends = layout.pipeline > 1 && (at.pipe == 0 || at.pipe == layout.pipeline - 1);
        let embedding = world.split(ends.then_some(at.data * layout.tensor + at.tensor), key)?;
        Ok(Self {
            layout: layout.clone(),
            at,
            tensor: mesh.along(&world, "tensor")?,
            pipe: mesh.along(&world, "pipe")?,
            data: mesh.along(&world, "data")?,
            model,
            embedding,
            world,
        })
    }

    /// The stage of one of this rank's chunks.
    pub fn stage(&self, chunk: usize) -> usize {
        chunk * self.layout.pipeline + self.at.pipe
    }

    /// Adds up over the tensor group.
    pub(crate) fn tensor_sum<T: Real>(&self, values: &mut [T]) -> Result<()> {
        if self.tensor.size() == 1 { Ok(()) } else { self.tensor.all_reduce(values, Op::Sum) }
    }
}
