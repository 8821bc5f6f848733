//! Tensor attention, exactly: `O_i = Σ p_i(j_1..j_r) V1[j_1] ⊙ … ⊙ Vr[j_r]`, where `p_i` is the softmax over all
//! tuples `(j_1..j_r)` of the scores `s Σ_c Q_ic K1_{j_1 c} … Kr_{j_r c}` (paper, Definition 1.1 for r = 2).
//!
//! [`tensor_attention`] never holds the weights of all tuples: it takes blocks of queries and of *prefixes*
//! `(j_1..j_{r-1})`, whose scores against all last keys are one matrix product, and keeps a running softmax.
//! The backward pass computes the blocks again from each query's log-sum-exp.
//! [`tensor_attention_direct`] is the definition written down, for other devices and as a reference.

use std::sync::Arc;

use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Tensor, TensorData};

use crate::kernel::{Exact, Masks};
use kiln_ops::{apply, runs_natively};

/// Most tokens in a tuple that [`tensor_attention`] computes: its cost grows as n^{r+1}.
pub const MAX_ORDER: usize = 8;

/// What attention needs besides queries, keys and values.
#[derive(Debug, Clone)]
pub struct AttentionOptions {
    /// Factor of the scores; the paper's is `1 / d`.
    pub scale: f64,
    /// Whether query `i` sees only tuples whose indices are all at most `i`.
    pub causal: bool,
    /// For every key matrix which of its rows may be seen, `[batch, rows]`; `None` sees all.
    pub key_masks: Vec<Option<Tensor<2, Bool>>>,
}

impl AttentionOptions {
    /// All tuples, with a scale.
    pub fn new(scale: f64) -> Self {
        Self { scale, causal: false, key_masks: Vec::new() }
    }

    /// Query `i` sees only tuples whose indices are all at most `i`.
    pub fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// Rows that may be seen, the same for every key matrix.
    pub fn masked(mut self, mask: Tensor<2, Bool>, order: usize) -> Self {
        self.key_masks = vec![Some(mask); order];
        self
    }
}

/// Exact tensor attention in time O(n^{r+1} d) and memory O(n).
///
/// A query that may see no tuple gets 0.
///
/// # Shapes
/// - q: `[batch, heads, queries, width]`
/// - keys: r tensors `[batch, heads, rows, width]`, each with its own number of rows
/// - values: r tensors `[batch, heads, rows, value width]`
/// - output: `[batch, heads, queries, value width]`
///
/// # Panics
/// When the shapes do not fit, or r is not 1 to [`MAX_ORDER`].
pub fn tensor_attention(
    q: Tensor<4>,
    keys: &[Tensor<4>],
    values: &[Tensor<4>],
    options: &AttentionOptions,
) -> Tensor<4> {
    check(&q, keys, values);
    if !runs_natively(&q) {
        return tensor_attention_direct(q, keys, values, options);
    }
    let masks = options.key_masks.iter().map(|mask| mask.as_ref().map(read_mask)).collect();
    let exact = Exact { scale: options.scale as f32, causal: options.causal, masks: Arc::new(Masks(masks)) };
    let inputs: Vec<_> =
        std::iter::once(&q).chain(keys).chain(values).map(|x| x.clone().into_dispatch()).collect();
    let fixed = "check() has counted them";
    Tensor::from_dispatch(match keys.len() {
        1 => apply::<3, _>(&exact, inputs.try_into().expect(fixed)),
        2 => apply::<5, _>(&exact, inputs.try_into().expect(fixed)),
        3 => apply::<7, _>(&exact, inputs.try_into().expect(fixed)),
        4 => apply::<9, _>(&exact, inputs.try_into().expect(fixed)),
        5 => apply::<11, _>(&exact, inputs.try_into().expect(fixed)),
        6 => apply::<13, _>(&exact, inputs.try_into().expect(fixed)),
        7 => apply::<15, _>(&exact, inputs.try_into().expect(fixed)),
        _ => apply::<17, _>(&exact, inputs.try_into().expect(fixed)),
    })
}

fn read_mask(mask: &Tensor<2, Bool>) -> Vec<bool> {
    mask.clone().into_data().iter::<bool>().collect()
}

/// The definition, with the weights of all tuples in memory.
///
/// Shapes as for [`tensor_attention`].
///
/// # Panics
/// When the shapes do not fit, or r is not 1 to [`MAX_ORDER`].
pub fn tensor_attention_direct(
    q: Tensor<4>,
    keys: &[Tensor<4>],
    values: &[Tensor<4>],
    options: &AttentionOptions,
) -> Tensor<4> {
    check(&q, keys, values);
    let scores = tuple_scores(q.clone(), keys, options.scale);
    let Some(hidden) = hidden_tuples(&q, keys, options) else {
        return softmax(scores, 3).matmul(kronecker_rows(values));
    };
    let hidden = hidden.expand(scores.dims());
    let weights = softmax(scores.mask_fill(hidden.clone(), f32::MIN), 3).mask_fill(hidden, 0.0);
    weights.matmul(kronecker_rows(values))
}

/// The scores of all tuples, the last index fastest: `[batch, heads, queries, rows_1 · … · rows_r]`.
pub fn tuple_scores(q: Tensor<4>, keys: &[Tensor<4>], scale: f64) -> Tensor<4> {
    q.matmul(kronecker_rows(keys).swap_dims(2, 3)).mul_scalar(scale)
}

/// The products of all tuples of rows, the last index fastest: `[batch, heads, rows_1 · … · rows_r, width]`.
fn kronecker_rows(factors: &[Tensor<4>]) -> Tensor<4> {
    let product = |a: Tensor<4>, b: &Tensor<4>| {
        let ([batch, heads, rows_a, width], rows_b) = (a.dims(), b.dims()[2]);
        let pairs = a.unsqueeze_dim::<5>(3) * b.clone().unsqueeze_dim::<5>(2);
        pairs.reshape([batch, heads, rows_a * rows_b, width])
    };
    factors[1..].iter().fold(factors[0].clone(), product)
}

/// Which tuples a query may not see, `[batch, 1, queries, tuples]`; `None` if it sees all.
fn hidden_tuples(q: &Tensor<4>, keys: &[Tensor<4>], options: &AttentionOptions) -> Option<Tensor<4, Bool>> {
    if !options.causal && options.key_masks.iter().all(Option::is_none) {
        return None;
    }
    let [batch, _, queries, _] = q.dims();
    let rows: Vec<usize> = keys.iter().map(|k| k.dims()[2]).collect();
    let masks: Vec<Option<Vec<bool>>> =
        options.key_masks.iter().map(|mask| mask.as_ref().map(read_mask)).collect();
    let tuples: usize = rows.iter().product();
    let hidden: Vec<bool> = (0..batch * queries * tuples)
        .map(|at| {
            let (row, query, mut rest) = (at / (queries * tuples), at / tuples % queries, at % tuples);
            (0..rows.len()).rev().any(|l| {
                let index = rest % rows[l];
                rest /= rows[l];
                let masked = masks.get(l).and_then(Option::as_ref).is_some_and(|m| !m[row * rows[l] + index]);
                masked || options.causal && index > query
            })
        })
        .collect();
    Some(Tensor::from_data(TensorData::new(hidden, [batch, 1, queries, tuples]), &q.device()))
}

fn check(q: &Tensor<4>, keys: &[Tensor<4>], values: &[Tensor<4>]) {
    let order = keys.len();
    assert!(
        (1..=MAX_ORDER).contains(&order),
        "tensor attention has 1 to {MAX_ORDER} key matrices, not {order}"
    );
    assert_eq!(keys.len(), values.len(), "there must be as many value matrices as key matrices");
    let [batch, heads, _, width] = q.dims();
    let value_width = values[0].dims()[3];
    for (l, (k, v)) in keys.iter().zip(values).enumerate() {
        let rows = k.dims()[2];
        assert_eq!(k.dims(), [batch, heads, rows, width], "key matrix {} must fit the queries", l + 1);
        assert_eq!(v.dims(), [batch, heads, rows, value_width], "value matrix {} must fit its keys", l + 1);
    }
}
