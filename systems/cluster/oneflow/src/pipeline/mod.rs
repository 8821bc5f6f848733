//! Pipelines: a graph in consecutive stages, each on ranks of its own, through which pieces flow.
//!
//! [`cut()`] divides the operations so that stages have much the same work, and gives every stage the reverse mode of its own
//! part: the gradient of what it hands on comes back from the stage that read it. Each stage is a logical graph and is
//! compiled like any other. Between stages, what one actor has written is pulled by the actor that reads it ([`link`]), as
//! soon as that has a free register. With `k` registers behind every actor a stage is up to `k` micro-batches ahead of the
//! gradients that it waits for; among actors that can act, that with the oldest piece does, so that one forward and one
//! backward pass alternate (1F1B) without a schedule.

mod cut;
mod link;
mod train;

use std::collections::BTreeMap;

use kiln_cluster::Communicator;
use kiln_core::{Error, Result};

pub use cut::{Edge, Pins, Stage, Stages, cut};
pub use link::{Address, Arriving, Departing, Pull, pulls};
pub use train::{Flow, run, train};

use crate::compile::Compiler;
use crate::execute::Links;
use crate::physical::{Physical, Work};
use crate::sbp::{NdSbp, Placement, Region, coordinate};

/// Stages, compiled, with the ranks that they run on: those of the first stage come first.
pub struct Pipeline {
    /// The stages and the edges between them.
    pub stages: Stages,
    /// What each device of a stage does.
    pub physical: Vec<Physical>,
    /// The devices of a stage.
    pub mesh: Vec<usize>,
    /// Bytes of every edge between stages, for one piece.
    pub edge_bytes: Vec<u64>,
}

/// Which node of a stage sends an edge, and which receives it, with the form that it has there.
struct End {
    node: usize,
    sbp: NdSbp,
}

impl Pipeline {
    /// Compiles stages for a mesh that each of them has. `prepare` sets what a compiler of a stage is told.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn compile(
        stages: Stages,
        placement: &Placement,
        prepare: impl Fn(Compiler, &Stage) -> Result<Compiler>,
    ) -> Result<Self> {
        let physical = stages
            .stages
            .iter()
            .map(|stage| {
                let compiler = Compiler::new(stage.logical.clone()).arriving(stage.arriving_ports());
                let mut physical = prepare(compiler, stage)?.compile(placement)?;
                physical.defer_gradients();
                physical.give_queues(&stage.arrives, &stage.departs);
                Ok(physical)
            })
            .collect::<Result<Vec<Physical>>>()?;
        let mut pipeline = Self { stages, physical, mesh: placement.mesh.clone(), edge_bytes: Vec::new() };
        for number in 0..pipeline.stages.edges.len() {
            let edge = &pipeline.stages.edges[number];
            let moved = pipeline.pulls(number)?.iter().map(|pull| pull.region.elements()).sum::<usize>();
            let bytes = moved * edge.dtype.size();
            pipeline.edge_bytes.push(bytes as u64);
        }
        Ok(pipeline)
    }

    /// Devices of a stage.
    pub fn width(&self) -> usize {
        self.mesh.iter().product()
    }

    /// Devices of all stages.
    pub fn ranks(&self) -> usize {
        self.width() * self.physical.len()
    }

    /// Bytes that all devices together send for one piece: within stages, and between them.
    pub fn bytes(&self) -> u64 {
        self.physical.iter().map(Physical::bytes).sum::<u64>() + self.edge_bytes.iter().sum::<u64>()
    }

    /// Bytes that they send besides for one step: gradients that were added up.
    pub fn step_bytes(&self) -> u64 {
        self.physical.iter().map(Physical::step_bytes).sum()
    }

    fn ends(&self, number: usize) -> Result<(End, End)> {
        let edge = &self.stages.edges[number];
        let end = |stage: usize, departs: bool| -> Result<End> {
            let nodes = self.physical[stage].nodes.iter().enumerate();
            let stage_of = &self.stages.stages[stage];
            let mut found = nodes.filter_map(|(node, of)| match of.work {
                Work::Output(port) if departs && stage_of.departs[port] == Some(number) => {
                    Some((node, of.inputs[0]))
                }
                Work::Input(port) if !departs && stage_of.arrives[port] == Some(number) => {
                    Some((node, of.outputs[0]))
                }
                _ => None,
            });
            let (node, value) = found
                .next()
                .ok_or_else(|| Error::work(format!("{} has no end in stage {stage}", edge.name)))?;
            Ok(End { node, sbp: self.physical[stage].values[value].sbp.clone() })
        };
        Ok((end(edge.from, true)?, end(edge.to, false)?))
    }

    /// What is pulled for an edge, by places in the meshes of both stages.
    fn pulls(&self, number: usize) -> Result<Vec<Pull>> {
        let (from, to) = self.ends(number)?;
        pulls(&self.stages.edges[number].shape, (&from.sbp, &self.mesh), (&to.sbp, &self.mesh))
    }

    /// The ends of the edges of one rank of `world`, which talk over two groups of all ranks.
    ///
    /// # Errors
    /// When an edge has no ends.
    pub fn links<'a>(
        &self,
        world: usize,
        control: &'a Communicator,
        payload: &'a Communicator,
    ) -> Result<Links<'a>> {
        let width = self.width();
        let (stage, place) = (world / width, world % width);
        let here = coordinate(&self.mesh, place);
        let mut links = Links {
            first_rank: stage * width,
            arriving: BTreeMap::new(),
            departing: BTreeMap::new(),
            late: Vec::new(),
            control: Some(control),
        };
        let port_of = |ports: &[Option<usize>], number: usize| {
            let port = ports.iter().position(|edge| *edge == Some(number));
            port.ok_or_else(|| Error::work("an edge between stages has no port"))
        };
        for (number, edge) in self.stages.edges.iter().enumerate() {
            let (from, to) = self.ends(number)?;
            let at = |stage: usize, end: &End, place: usize| {
                Address::new(stage * width + place, self.physical[stage].nodes[end.node].queue, end.node)
            };
            let (pulls, tag) = (self.pulls(number)?, number as u32);
            let region = |end: &End| Region::local(&edge.shape, &self.mesh, &end.sbp, &here);
            if edge.from == stage {
                let mine = pulls.iter().filter(|pull| pull.from == place);
                let parts = mine.map(|pull| (at(edge.to, &to, pull.to), pull.region.clone())).collect();
                let (own, region) = (at(stage, &from, place), region(&from));
                links.departing.insert(
                    port_of(&self.stages.stages[stage].departs, number)?,
                    Departing { name: edge.name.clone(), control, payload, tag, own, region, parts },
                );
            }
            if edge.to == stage {
                let mine = pulls.iter().filter(|pull| pull.to == place);
                let parts = mine.map(|pull| (at(edge.from, &from, pull.from), pull.region.clone())).collect();
                let (own, region) = (at(stage, &to, place), region(&to));
                let port = port_of(&self.stages.stages[stage].arrives, number)?;
                let (name, dtype) = (edge.name.clone(), edge.dtype);
                links
                    .arriving
                    .insert(port, Arriving { name, control, payload, tag, own, region, parts, dtype });
                if edge.backward {
                    links.late.push(port);
                }
            }
        }
        Ok(links)
    }
}
