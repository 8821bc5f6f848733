//! Rows of a table by their numbers, one by one or pooled.

use std::sync::Arc;

use burn::tensor::{Int, Tensor};
use burn_flex::FlexTensor;

use crate::flex::{floats, tensor};
use crate::function::{Function, apply, runs_natively};
use crate::rows::{Ids, Kind, add_rows, for_rows, scatter};
use crate::segment::{index_select, segment_mean, segment_sum};
use crate::simd;
use crate::vector::prefetch;

/// So many rows ahead of their use are asked for from memory.
const AHEAD: usize = 16;

/// The rows of a table with the given numbers.
///
/// # Shapes
/// - weight: `[table, width]`
/// - ids: `[batch, time]`
/// - output: `[batch, time, width]`
///
/// # Panics
/// On the CPU when an id is not below `table`.
pub fn embedding(weight: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    let ([_, width], [batch, time]) = (weight.dims(), ids.dims());
    index_select(weight, ids.reshape([batch * time])).reshape([batch, time, width])
}

/// How the rows of a bag become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Their sum.
    Sum,
    /// Their mean.
    Mean,
}

/// The sum or mean of the rows of a table in every bag of row numbers; 0 for an empty bag.
///
/// Bag `i` holds `ids[offsets[i]..offsets[i + 1]]`, the last one all that is left.
///
/// # Shapes
/// - weight: `[table, width]`
/// - ids: `[n]`
/// - offsets: `[bags]`
/// - output: `[bags, width]`
///
/// # Panics
/// When the offsets do not start at 0, fall or exceed `n`; on the CPU when an id is not below `table`.
pub fn embedding_bag(
    weight: Tensor<2>,
    ids: Tensor<1, Int>,
    offsets: Tensor<1, Int>,
    pooling: Pooling,
) -> Tensor<2> {
    let ([table, _], [n]) = (weight.dims(), ids.dims());
    let starts = starts(offsets, n);
    if !runs_natively(&weight) {
        let bags = starts.len() - 1;
        let bag_of_each: Vec<i64> =
            (0..bags).flat_map(|bag| vec![bag as i64; starts[bag + 1] - starts[bag]]).collect();
        let segments = Tensor::from_data(bag_of_each.as_slice(), &ids.device());
        let rows = index_select(weight, ids);
        return match pooling {
            Pooling::Sum => segment_sum(rows, segments, bags),
            Pooling::Mean => segment_mean(rows, segments, bags),
        };
    }
    let ids = Ids::new(ids, table, Kind::Row);
    let function = EmbeddingBag { ids, starts, pooling, table };
    Tensor::from_dispatch(apply(&function, [weight.into_dispatch()]))
}

/// Where each bag starts, and the end of the last.
fn starts(offsets: Tensor<1, Int>, n: usize) -> Arc<[usize]> {
    let offsets = offsets.into_data();
    let starts: Arc<[usize]> = offsets
        .iter::<i64>()
        .map(|offset| usize::try_from(offset).unwrap_or(usize::MAX))
        .chain([n])
        .collect();
    assert!(
        starts[0] == 0 && starts.is_sorted() || starts.len() == 1,
        "the offsets of bags must rise from 0 to at most {n}, the number of ids"
    );
    starts
}

/// A function of the table.
#[derive(Debug, Clone)]
struct EmbeddingBag {
    ids: Ids,
    /// One more than there are bags.
    starts: Arc<[usize]>,
    pooling: Pooling,
    /// Rows of the table.
    table: usize,
}

impl EmbeddingBag {
    /// What the rows of a bag are multiplied by.
    fn factor(&self, bag: usize) -> f32 {
        match self.pooling {
            Pooling::Sum => 1.0,
            Pooling::Mean => 1.0 / (self.starts[bag + 1] - self.starts[bag]) as f32,
        }
    }
}

impl Function<1> for EmbeddingBag {
    type Saved = ();

    fn forward(&self, [weight]: [FlexTensor; 1]) -> (FlexTensor, ()) {
        let width = weight.layout().shape()[1];
        let bags = self.starts.len() - 1;
        let (table, ids) = (floats(&weight), &self.ids[..]);
        let table_row = |id: i64| &table[id as usize * width..(id as usize + 1) * width];
        let mut output = vec![0.0; bags * width];
        for_rows(&mut output, width, |first, rows| {
            simd(
                #[inline(always)]
                || {
                    for (bag, row) in (first..).zip(rows.chunks_exact_mut(width)) {
                        let factor = self.factor(bag);
                        add_rows(
                            row,
                            (self.starts[bag]..self.starts[bag + 1]).map(
                                #[inline(always)]
                                |position| {
                                    if let Some(&later) = ids.get(position + AHEAD) {
                                        prefetch(table_row(later));
                                    }
                                    (table_row(ids[position]), factor)
                                },
                            ),
                        );
                    }
                },
            );
        });
        (tensor(output, [bags, width]), ())
    }

    fn backward(&self, (): (), upstream: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let width = upstream.layout().shape()[1];
        let upstream = floats(&upstream);
        let mut bag_of_each = vec![0; self.ids.len()];
        for (bag, ends) in self.starts.windows(2).enumerate() {
            bag_of_each[ends[0]..ends[1]].fill(bag);
        }
        let mut gradient = vec![0.0; self.table * width];
        scatter(&mut gradient, width, &self.ids, |position| {
            let bag = bag_of_each[position];
            (&upstream[bag * width..(bag + 1) * width], self.factor(bag))
        });
        [Some(tensor(gradient, [self.table, width]))]
    }
}
