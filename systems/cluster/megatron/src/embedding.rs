//! The word embedding that a tensor group shares row by row, and the loss that is computed from its logits without ever
//! gathering them (Shoeybi et al., arXiv 1909.08053, §3).

use burn::tensor::Tensor;
use kiln_cluster::Op;
use kiln_core::Result;
use kiln_ops::matmul;
use rayon::prelude::*;

use crate::parameters::Parameters;
use crate::ranks::Ranks;
use crate::real::{self, Real};

/// A table of vectors, of which rank k of the tensor group has the rows `[k V'/t, (k + 1) V'/t)`.
#[derive(Debug, Clone, Copy)]
pub struct VocabParallelEmbedding {
    word: usize,
    /// First row that this rank has, and how many of its rows are token ids rather than padding.
    first: usize,
    used: usize,
}

impl VocabParallelEmbedding {
    /// The rows of `embedding.word` that this rank has.
    pub fn new<T: Real>(parameters: &Parameters<T>, tensor: usize) -> Self {
        let word = parameters.id("embedding.word");
        let spec = &parameters.specs[word];
        let first = tensor * spec.shape[0];
        Self { word, first, used: spec.whole[0].saturating_sub(first).min(spec.shape[0]) }
    }

    fn row(&self, id: u32) -> Option<usize> {
        (id as usize).checked_sub(self.first).filter(|&row| row < self.used)
    }

    /// The vectors of tokens; rows of other ranks count 0 until all are added up.
    ///
    /// # Shapes
    /// - output: `[tokens, width]`
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn forward<T: Real>(&self, ids: &[u32], parameters: &Parameters<T>, ranks: &Ranks) -> Result<Vec<T>> {
        let table = parameters.values_of(self.word);
        let width = parameters.specs[self.word].shape[1];
        let mut vectors = vec![T::ZERO; ids.len() * width];
        for (vector, &id) in vectors.chunks_exact_mut(width).zip(ids) {
            if let Some(row) = self.row(id) {
                vector.copy_from_slice(&table[row * width..][..width]);
            }
        }
        ranks.tensor_sum(&mut vectors)?;
        Ok(vectors)
    }

    /// Adds the gradients of the tokens' vectors to those of the table.
    pub fn backward<T: Real>(&self, ids: &[u32], upstream: &[T], parameters: &mut Parameters<T>) {
        let width = parameters.specs[self.word].shape[1];
        let gradients = parameters.gradient_mut(self.word);
        for (vector, &id) in upstream.chunks_exact(width).zip(ids) {
            if let Some(row) = self.row(id) {
                for (sum, &x) in gradients[row * width..][..width].iter_mut().zip(vector) {
                    *sum += x;
                }
            }
        }
    }

    /// Logits of this rank's rows, -∞ for padding: the output layer, whose weight is the table.
    ///
    /// # Shapes
    /// - x: `[tokens, width]`
    /// - output: `[tokens, V'/t]`
    pub fn logits<T: Real>(&self, x: Tensor<2>, parameters: &Parameters<T>) -> Vec<T> {
        let table = parameters.matrix(self.word);
        let rows = table.dims()[0];
        let mut logits: Vec<T> = real::into_vec(matmul(x, table.transpose()));
        if self.used < rows {
            for row in logits.chunks_exact_mut(rows) {
                row[self.used..].fill(T::LOWEST);
            }
        }
        logits
    }

    /// The gradient of the input of [`logits`](Self::logits), given that of the logits; ends with f's all-reduce.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn logits_backward<T: Real>(
        &self,
        x: Tensor<2>,
        upstream: Tensor<2>,
        parameters: &mut Parameters<T>,
        ranks: &Ranks,
    ) -> Result<Tensor<2>> {
        let d_x = matmul(upstream.clone(), parameters.matrix(self.word));
        parameters.add_gradient(self.word, &matmul(upstream.transpose(), x));
        let (dims, device) = (d_x.dims(), d_x.device());
        let mut values: Vec<T> = real::into_vec(d_x);
        ranks.tensor_sum(&mut values)?;
        Ok(real::tensor(values, dims, &device))
    }
}

/// Cross entropy of logits that a tensor group shares by columns; three numbers a token are exchanged, never the logits.
///
/// With m the largest logit of a row and S the sum of `e^(z - m)`, both over all ranks, the loss is `ln S - (z_target - m)`,
/// with smoothing α `(1 - α) (ln S - (z_target - m)) + α (ln S - mean of z - m)`. The logits are replaced by their gradient
/// for the mean of `count` tokens' losses: softmax minus the target's distribution, over `count`.
///
/// # Shapes
/// - logits: `[tokens, V'/t]`, -∞ for padding
/// - targets: `[tokens]`, ids in `[first, first + V'/t)` are this rank's
/// - output: sum of the losses over `count`
///
/// # Errors
/// When a rank is lost.
pub fn vocab_parallel_cross_entropy<T: Real>(
    logits: &mut [T],
    targets: &[u32],
    options: &CrossEntropyOptions,
    ranks: &Ranks,
) -> Result<f64> {
    let tokens = targets.len();
    let width = logits.len() / tokens.max(1);
    let &CrossEntropyOptions { first, vocab, label_smoothing, count } = options;
    let local = |id: u32| (id as usize).checked_sub(first).filter(|&column| column < width);
    let largest = |row: &[T]| row.iter().fold(T::LOWEST, |m, &z| if z > m { z } else { m });
    let mut shifts: Vec<T> = logits.par_chunks_exact(width).map(largest).collect();
    if ranks.tensor.size() > 1 {
        ranks.tensor.all_reduce(&mut shifts, Op::Max)?;
    }

    // Sums of exponentials, the shifted target logits, and with smoothing the sums of all shifted logits.
    let parts = if label_smoothing > 0.0 { 3 } else { 2 };
    let mut sums = vec![T::ZERO; parts * tokens];
    let used = vocab.saturating_sub(first).min(width);
    let found: Vec<[T; 3]> = logits
        .par_chunks_exact_mut(width)
        .zip(&shifts)
        .zip(targets)
        .map(|((row, &shift), &target)| {
            let at_target = local(target).map_or(T::ZERO, |column| row[column] - shift);
            let all = if parts == 3 { row[..used].iter().map(|&z| z - shift).sum() } else { T::ZERO };
            [T::exp_all(row, shift), at_target, all]
        })
        .collect();
    for (token, found) in found.iter().enumerate() {
        for part in 0..parts {
            sums[part * tokens + token] = found[part];
        }
    }
    ranks.tensor_sum(&mut sums)?;

    let smoothing = label_smoothing / vocab as f64;
    let mut loss = 0.0;
    for token in 0..tokens {
        let log_sum = sums[token].wide().ln();
        let on_target = log_sum - sums[tokens + token].wide();
        loss += if parts == 3 {
            let evenly = log_sum - sums[2 * tokens + token].wide() / vocab as f64;
            (1.0 - label_smoothing) * on_target + label_smoothing * evenly
        } else {
            on_target
        };
    }

    let scale = 1.0 / count;
    logits.par_chunks_exact_mut(width).zip(&sums[..tokens]).zip(targets).for_each(
        |((row, &sum), &target)| {
            let factor = T::of(scale / sum.wide());
            for p in row.iter_mut() {
                *p = *p * factor;
            }
            if parts == 3 {
                for p in &mut row[..used] {
                    *p = *p - T::of(smoothing * scale);
                }
            }
            if let Some(column) = local(target) {
                row[column] = row[column] - T::of((1.0 - label_smoothing) * scale);
            }
        },
    );
    Ok(loss * scale)
}

/// What [`vocab_parallel_cross_entropy`] must know besides logits and targets.
#[derive(Debug, Clone, Copy)]
pub struct CrossEntropyOptions {
    /// The token id of this rank's first column.
    pub first: usize,
    /// Token ids in all.
    pub vocab: usize,
    /// α: the share of the target's probability that is spread over all ids.
    pub label_smoothing: f64,
    /// Tokens of the whole batch, over which the loss is a mean.
    pub count: f64,
}

impl VocabParallelEmbedding {
    /// Options for the loss of this table's logits.
    pub fn loss_options<T: Real>(
        &self,
        parameters: &Parameters<T>,
        label_smoothing: f64,
        count: f64,
    ) -> CrossEntropyOptions {
        let vocab = parameters.specs[self.word].whole[0];
        CrossEntropyOptions { first: self.first, vocab, label_smoothing, count }
    }
}
