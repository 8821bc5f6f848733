//! Running and training the stages of a pipeline on the ranks of a world.

use std::time::Instant;

use burn::tensor::TensorData;
use kiln_cluster::{Communicator, Op};
use kiln_core::{Context, Error, Result};

use super::Pipeline;
use crate::execute::{Done, Feed, Rank, Run};
use crate::graph::Variable;
use crate::train::Trained;

/// How pieces flow.
#[derive(Debug, Clone)]
pub struct Flow {
    /// Steps, each of so many micro-batches as `run` has pieces.
    pub steps: usize,
    /// The number of the first step.
    pub first: usize,
    /// Micro-batches of a step, registers and optimiser.
    pub run: Run,
}

/// A rank's place in the pipeline, and what it talks over.
struct Seat {
    stage: usize,
    group: Communicator,
    control: Communicator,
    payload: Communicator,
}

impl Seat {
    fn take(pipeline: &Pipeline, world: &Communicator) -> Result<Self> {
        if world.size() != pipeline.ranks() {
            let found = format!("{} stages of {} devices", pipeline.physical.len(), pipeline.width());
            return Err(Error::usage(format!(
                "{found} need {} ranks, and there are {}",
                pipeline.ranks(),
                world.size()
            )));
        }
        let stage = world.rank() / pipeline.width();
        let group = |color: usize| {
            let group = world.split(Some(color), world.rank() as i64)?;
            group.ok_or_else(|| Error::work("a rank is in none of the groups of its pipeline"))
        };
        Ok(Self { stage, group: group(stage)?, control: group(0)?, payload: group(0)? })
    }

    fn sent(&self) -> u64 {
        self.payload.traffic().total().bytes_sent
    }
}

/// Runs pieces through the stages as this rank; all ranks of `world` call it. What is returned has the outputs of the last
/// piece, whole, on rank 0; other ranks have none.
///
/// # Errors
/// As [`Rank::run`].
pub fn run(
    pipeline: &Pipeline,
    world: &Communicator,
    options: &Run,
    feed: &Feed<'_>,
) -> Result<(Vec<TensorData>, Done)> {
    let seat = Seat::take(pipeline, world)?;
    let stage = &pipeline.stages.stages[seat.stage];
    let links = pipeline.links(world.rank(), &seat.control, &seat.payload)?;
    let rank = Rank::new(&pipeline.physical[seat.stage], &stage.logical, &seat.group)?.linked(links);
    let mut done = rank.run(options, &|piece| stage.inputs(feed(piece)?))?;
    done.bytes_sent += seat.sent();
    let last = done.outputs.pop().unwrap_or_default();
    let count = pipeline.stages.stages.iter().flat_map(|stage| stage.given.iter().flatten()).count();
    let mut outputs: Vec<Option<TensorData>> = vec![None; count];
    for (number, of) in pipeline.stages.stages.iter().enumerate() {
        for (port, output) in of.given.iter().enumerate() {
            let Some(output) = *output else { continue };
            let whole = match number == seat.stage {
                true => Some(rank.output(
                    port,
                    last.get(port).cloned().ok_or_else(|| Error::work("an output is missing"))?,
                )?),
                false => None,
            };
            outputs[output] = to_first(world, number * pipeline.width(), whole)?;
        }
    }
    Ok((outputs.into_iter().flatten().collect(), done))
}

/// Trains the stages as this rank. All ranks of `world` call it; the loss is the first output of the whole graph. `feed` gives
/// the inputs of a micro-batch by its number, `seen` is called with the loss of every step on rank 0. The variables, whole,
/// are on rank 0 alone afterwards.
///
/// # Errors
/// When the loss is no number, or as [`Rank::run`].
pub fn train(
    pipeline: &Pipeline,
    world: &Communicator,
    flow: &Flow,
    feed: &Feed<'_>,
    cx: &Context,
    seen: &(dyn Fn(f32) + Sync),
) -> Result<Trained> {
    let seat = Seat::take(pipeline, world)?;
    let stage = &pipeline.stages.stages[seat.stage];
    let links = pipeline.links(world.rank(), &seat.control, &seat.payload)?;
    let rank = Rank::new(&pipeline.physical[seat.stage], &stage.logical, &seat.group)?.linked(links);
    // The loss is told by the first rank of its stage.
    let tells = stage.given.contains(&Some(0)) && seat.group.rank() == 0;
    let micro_batches = flow.run.pieces;
    let mut trained = Trained {
        losses: Vec::new(),
        variables: Vec::new(),
        bytes_sent: 0,
        peak_bytes: 0,
        seconds: 0.0,
        stopped: false,
        course: None,
    };
    let (begun, before) = (Instant::now(), rank.lines().bytes_sent());
    while trained.losses.len() < flow.steps && !trained.stopped {
        let step = flow.first + trained.losses.len();
        let options = Run { first: step * micro_batches, accumulated: true, ..flow.run.clone() };
        let done = rank.run(&options, &|piece| stage.inputs(feed(piece)?))?;
        rank.step(&options.optimiser, step, micro_batches)?;
        let of_piece = |outputs: &Vec<TensorData>| outputs.first().and_then(|loss| loss.iter::<f32>().next());
        let sum: f32 = done.outputs.iter().filter_map(of_piece).sum();
        // Everyone knows the loss, and all ranks stop at the same step.
        let mut told =
            [if tells { sum / micro_batches as f32 } else { 0.0 }, f32::from(u8::from(cx.interrupted()))];
        world.all_reduce(&mut told, Op::Sum)?;
        let [loss, interrupted] = told;
        if !loss.is_finite() {
            return Err(
                Error::work(format!("the loss of step {} is {loss}", step + 1)).hint("take a smaller --lr")
            );
        }
        trained.losses.push(loss);
        trained.stopped = interrupted > 0.0;
        trained.peak_bytes = trained.peak_bytes.max(done.peak_bytes);
        trained.course = done.course;
        if world.rank() == 0 {
            seen(loss);
        }
    }
    trained.seconds = begun.elapsed().as_secs_f64();
    trained.bytes_sent = rank.lines().bytes_sent() - before + seat.sent();
    let own = rank.variables()?;
    for (number, of) in pipeline.stages.stages.iter().enumerate() {
        for (place, variable) in of.logical.variables.iter().enumerate() {
            let mine = (number == seat.stage).then(|| &own[place]);
            let first = number * pipeline.width();
            let value = to_first(world, first, mine.map(|variable| variable.value.clone()))?;
            let mut kept = Vec::new();
            for at in 0..flow.run.optimiser.kept() {
                kept.extend(to_first(
                    world,
                    first,
                    mine.and_then(|variable| variable.kept.get(at).cloned()),
                )?);
            }
            trained.variables.extend(value.map(|value| Variable { value, kept, ..variable.clone() }));
        }
    }
    Ok(trained)
}

/// A tensor of floats or whole numbers that a rank has, on rank 0; others get nothing.
fn to_first(world: &Communicator, from: usize, data: Option<TensorData>) -> Result<Option<TensorData>> {
    /// Apart from the tags of edges, which count from 0.
    const TAG: u32 = 1 << 30;
    match (world.rank(), data) {
        (0, Some(data)) if from == 0 => Ok(Some(data)),
        (0, _) if from > 0 => {
            let mut head = [0u64; 2];
            world.recv(from, TAG, &mut head)?;
            let mut shape = vec![0u64; head[0] as usize];
            world.recv(from, TAG, &mut shape)?;
            let shape: Vec<usize> = shape.into_iter().map(|size| size as usize).collect();
            let count = shape.iter().product();
            Ok(Some(if head[1] == 0 {
                TensorData::new(world.irecv::<f32>(from, TAG, count)?.wait()?, shape)
            } else {
                TensorData::new(world.irecv::<i64>(from, TAG, count)?.wait()?, shape)
            }))
        }
        (rank, Some(data)) if rank == from => {
            let shape: Vec<u64> = data.shape().iter().map(|&size| size as u64).collect();
            let is_float = data.dtype().is_float();
            world.send(0, TAG, &[shape.len() as u64, u64::from(!is_float)])?;
            world.send(0, TAG, &shape)?;
            if is_float {
                world.send(0, TAG, &data.iter::<f32>().collect::<Vec<_>>())?;
            } else {
                world.send(0, TAG, &data.iter::<i64>().collect::<Vec<_>>())?;
            }
            Ok(None)
        }
        _ => Ok(None),
    }
}
