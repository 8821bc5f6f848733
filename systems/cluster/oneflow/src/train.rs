//! Training a logical graph on the ranks of a mesh.

use std::time::Instant;

use burn::tensor::TensorData;
use kiln_cluster::{Communicator, Op};
use kiln_core::{Context, Error, Result};

use crate::actor::Course;
use crate::execute::{Feed, Rank, Run};
use crate::graph::{Logical, Variable};
use crate::physical::Physical;

/// What some steps of training gave.
#[derive(Debug)]
pub struct Trained {
    /// The loss of every step.
    pub losses: Vec<f32>,
    /// The variables afterwards, whole, with what the optimiser keeps.
    pub variables: Vec<Variable>,
    /// Bytes that this rank sent in the steps.
    pub bytes_sent: u64,
    /// Bytes of registers that this rank held at once at most.
    pub peak_bytes: usize,
    /// Seconds of all steps together.
    pub seconds: f64,
    /// Whether the user asked to stop before the end.
    pub stopped: bool,
    /// What this rank's actors did in the last steps.
    pub course: Option<Course>,
}

/// Steps between two looks at whether the user wants to stop.
const STRETCH: usize = 10;

/// Trains as this rank. All ranks of `world` call it; `run.pieces` is the number of steps, and the graph's first output the
/// loss. `seen` is called with the losses of every stretch of steps, on rank 0.
///
/// # Errors
/// When the loss is no number, or as [`Rank::run`].
pub fn train(
    physical: &Physical,
    logical: &Logical,
    world: &Communicator,
    run: &Run,
    feed: &Feed<'_>,
    cx: &Context,
    seen: &(dyn Fn(&[f32]) + Sync),
) -> Result<Trained> {
    let rank = Rank::new(physical, logical, world)?;
    let mut losses: Vec<f32> = Vec::with_capacity(run.pieces);
    let (mut bytes_sent, mut peak_bytes, mut stopped, mut course) = (0, 0, false, None);
    let begun = Instant::now();
    while losses.len() < run.pieces && !stopped {
        let pieces = STRETCH.min(run.pieces - losses.len());
        let done = rank.run(&Run { pieces, first: run.first + losses.len(), ..run.clone() }, feed)?;
        let before = losses.len();
        for outputs in &done.outputs {
            let loss =
                outputs.first().and_then(scalar).ok_or_else(|| Error::work("the graph has no loss"))?;
            if !loss.is_finite() {
                return Err(Error::work(format!(
                    "the loss of step {} is {loss}",
                    run.first + losses.len() + 1
                ))
                .hint("take a smaller --lr"));
            }
            losses.push(loss);
        }
        bytes_sent += done.bytes_sent;
        peak_bytes = peak_bytes.max(done.peak_bytes);
        course = done.course;
        if world.rank() == 0 {
            seen(&losses[before..]);
        }
        // All ranks stop at the same step.
        let mut flag = [i32::from(cx.interrupted())];
        world.all_reduce(&mut flag, Op::Max)?;
        stopped = flag[0] > 0;
    }
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Trained { losses, variables: rank.variables()?, bytes_sent, peak_bytes, seconds, stopped, course })
}

fn scalar(data: &TensorData) -> Option<f32> {
    data.iter::<f32>().next()
}
