//! From gradients to new parameters: averages over data-parallel ranks, the global norm, clipping, and AdamW on flat memory,
//! whole on every rank or divided over the data-parallel ranks (Rajbhandari et al., "ZeRO", arXiv 1910.02054, stage 1).

use std::ops::Range;

use kiln_cluster::{Op, chunk};
use kiln_core::{Error, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::parameters::{Parameters, Spec};
use crate::ranks::Ranks;
use crate::real::Real;

/// Settings of AdamW (Loshchilov and Hutter, arXiv 1711.05101).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamW {
    /// β₁ and β₂: how much of the running means a step keeps.
    pub betas: (f64, f64),
    /// Added to the root of the mean squared gradient.
    pub epsilon: f64,
    /// How strongly a step pulls matrices to zero.
    pub weight_decay: f64,
    /// Gradients of a larger global norm are scaled down to it; 0 does not clip.
    pub clip: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { betas: (0.9, 0.95), epsilon: 1e-8, weight_decay: 0.1, clip: 1.0 }
    }
}

/// Running means of gradients and their squares.
#[derive(Debug, Clone)]
pub struct Moments<T> {
    /// Which part of the flat memory they are of: all of it, or this data-parallel rank's share.
    pub range: Range<usize>,
    /// m
    pub first: Vec<T>,
    /// v
    pub second: Vec<T>,
}

impl<T: Real> Moments<T> {
    /// Zeros, for all parameters or for this rank's share.
    pub fn new(parameters: usize, distributed: bool, ranks: &Ranks) -> Self {
        let range = match distributed {
            true => chunk(parameters, ranks.data.size(), ranks.data.rank()),
            false => 0..parameters,
        };
        Self { first: vec![T::ZERO; range.len()], second: vec![T::ZERO; range.len()], range }
    }
}

/// Completes the gradients: adds up those of the word embedding of first and last stage, and those of all data-parallel
/// ranks, in buckets of at most `bucket` bytes from the last parameter to the first, but for what is `reduced` already. With `distributed` only this rank's
/// share of the sums is right afterwards.
///
/// The loss of every micro-batch is already divided by the tokens of the whole batch, so that sums are means.
///
/// # Errors
/// When a rank is lost.
pub fn reduce_gradients<T: Real>(
    parameters: &mut Parameters<T>,
    distributed: bool,
    bucket: usize,
    reduced: &[Range<usize>],
    ranks: &Ranks,
) -> Result<()> {
    if let Some(group) = &ranks.embedding {
        let word = parameters.id("embedding.word");
        group.all_reduce(parameters.gradient_mut(word), Op::Sum)?;
    }
    let data = &ranks.data;
    if data.size() == 1 {
        return Ok(());
    }
    if distributed {
        let mine = chunk(parameters.gradients.len(), data.size(), data.rank());
        let mut sums = vec![T::ZERO; mine.len()];
        data.reduce_scatter(&parameters.gradients, &mut sums, Op::Sum)?;
        parameters.gradients[mine].copy_from_slice(&sums);
        return Ok(());
    }
    for range in buckets(&parameters.specs, reduced, (bucket / size_of::<T>()).max(1)) {
        data.all_reduce(&mut parameters.gradients[range], Op::Sum)?;
    }
    Ok(())
}

/// Neighbouring parameters of at most `elements` elements together, from last to first; a larger one alone. What is reduced
/// already is left out.
fn buckets(specs: &[Spec], reduced: &[Range<usize>], elements: usize) -> Vec<Range<usize>> {
    let mut buckets: Vec<Range<usize>> = Vec::new();
    let is_left = |spec: &&Spec| !reduced.iter().any(|range| range.contains(&spec.range.start));
    for spec in specs.iter().rev().filter(is_left) {
        match buckets.last_mut() {
            Some(bucket) if bucket.start == spec.range.end && bucket.end - spec.range.start <= elements => {
                bucket.start = spec.range.start;
            }
            _ => buckets.push(spec.range.clone()),
        }
    }
    buckets
}

/// The Euclidean norm of the whole network's gradient. Parameters that several ranks have count once.
///
/// # Errors
/// When a rank is lost.
pub fn gradient_norm<T: Real>(
    parameters: &Parameters<T>,
    moments: &Moments<T>,
    distributed: bool,
    ranks: &Ranks,
) -> Result<f64> {
    let mine = |spec: &Spec| {
        let (start, end) = (spec.range.start.max(moments.range.start), spec.range.end.min(moments.range.end));
        let part = &parameters.gradients[start.min(end)..end];
        part.iter().map(|&g| g.wide() * g.wide()).sum::<f64>()
    };
    let mut squares = [parameters.specs.iter().filter(|spec| spec.counted).map(mine).sum::<f64>()];
    if ranks.model.size() > 1 {
        ranks.model.all_reduce(&mut squares, Op::Sum)?;
    }
    if distributed && ranks.data.size() > 1 {
        ranks.data.all_reduce(&mut squares, Op::Sum)?;
    }
    Ok(squares[0].sqrt())
}

impl AdamW {
    /// Makes sure that the settings make sense.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<()> {
        for (name, value) in [("--beta1", self.betas.0), ("--beta2", self.betas.1)] {
            if !(0.0..1.0).contains(&value) {
                return Err(Error::usage(format!("{name} is {value}, but must be at least 0 and below 1")));
            }
        }
        if !(self.epsilon.is_finite() && self.epsilon > 0.0) {
            return Err(Error::usage(format!("--eps is {}, but must be above 0", self.epsilon)));
        }
        for (name, value) in [("--weight-decay", self.weight_decay), ("--clip", self.clip)] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::usage(format!("{name} is {value}, but must be at least 0")));
            }
        }
        Ok(())
    }

    /// What gradients of such a norm are multiplied by.
    pub fn clip_factor(&self, norm: f64) -> f64 {
        if self.clip == 0.0 { 1.0 } else { (self.clip / (norm + 1e-6)).min(1.0) }
    }

    /// Updates the parameters; `step` counts from 1. Where the state is divided, the shares are gathered afterwards.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn step<T: Real>(
        &self,
        parameters: &mut Parameters<T>,
        moments: &mut Moments<T>,
        (step, lr, scale): (usize, f64, f64),
        ranks: &Ranks,
    ) -> Result<()> {
        let whole = moments.range.len() == parameters.values.len();
        for spec in &parameters.specs {
            let start = spec.range.start.max(moments.range.start);
            let end = spec.range.end.min(moments.range.end);
            if start >= end {
                continue;
            }
            let at = start - moments.range.start..end - moments.range.start;
            let decay = if spec.decayed { self.weight_decay } else { 0.0 };
            self.update(
                &mut parameters.values[start..end],
                &parameters.gradients[start..end],
                &mut moments.first[at.clone()],
                &mut moments.second[at],
                (step, lr, scale, decay),
            );
        }
        if !whole {
            let (size, len) = (ranks.data.size(), parameters.values.len());
            let counts: Vec<usize> = (0..size).map(|rank| chunk(len, size, rank).len()).collect();
            let mine = parameters.values[moments.range.clone()].to_vec();
            ranks.data.all_gather_v(&mine, &counts, &mut parameters.values)?;
        }
        parameters.refresh();
        Ok(())
    }

    /// One parameter, or part of one: `w ← (1 - lr λ) w - lr m̂ / (√v̂ + ε)`.
    fn update<T: Real>(
        &self,
        values: &mut [T],
        gradients: &[T],
        first: &mut [T],
        second: &mut [T],
        (step, lr, scale, decay): (usize, f64, f64, f64),
    ) {
        const TASK: usize = 16 * 1024;
        let (beta1, beta2) = self.betas;
        let correction = |beta: f64| 1.0 - beta.powi(step as i32);
        let (b1, b2) = (T::of(beta1), T::of(beta2));
        let (a1, a2) = (T::of(1.0 - beta1), T::of(1.0 - beta2));
        let rate = T::of(lr / correction(beta1));
        let root = T::of(1.0 / correction(beta2).sqrt());
        let (scale, keep, epsilon) = (T::of(scale), T::of(1.0 - lr * decay), T::of(self.epsilon));
        let tasks = values
            .par_chunks_mut(TASK)
            .zip(gradients.par_chunks(TASK))
            .zip(first.par_chunks_mut(TASK).zip(second.par_chunks_mut(TASK)));
        tasks.for_each(|((values, gradients), (first, second))| {
            for (((w, &g), m), v) in values.iter_mut().zip(gradients).zip(first).zip(second) {
                let g = g * scale;
                *m = b1 * *m + a1 * g;
                *v = b2 * *v + a2 * g * g;
                *w = keep * *w - rate * *m / (v.root() * root + epsilon);
            }
        });
    }
}
