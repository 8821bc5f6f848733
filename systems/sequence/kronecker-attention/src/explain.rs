//! Which tuples of tokens a trained model looks at.

use burn::tensor::activation::softmax;
use kiln_core::Context;
use serde::Serialize;

use crate::attention::tuple_scores;
use crate::data::{Coding, Sequence};
use crate::model::KroneckerTransformer;

/// The weights of one query of the first block, averaged over heads.
#[derive(Debug, Clone)]
pub struct QueryWeights {
    /// Tokens in a tuple.
    pub order: usize,
    /// Tokens with the blank before them.
    pub tokens: usize,
    /// Weights of all tuples, the last index fastest; index 0 is the blank.
    pub weights: Vec<f32>,
}

/// A tuple and its weight. `None` is the blank that the model has learned to look at when nothing fits.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tuple {
    /// Places of tokens, from 0.
    pub places: Vec<Option<usize>>,
    /// Between 0 and 1.
    pub weight: f32,
}

impl QueryWeights {
    /// The weights of every query of one sequence.
    pub fn of(
        model: &KroneckerTransformer,
        coding: &Coding,
        sequence: &Sequence,
        cx: &Context,
    ) -> Vec<QueryWeights> {
        let (tokens, mask) = coding.encode(&[sequence], &cx.device);
        let (x, _) = model.embed(tokens, mask);
        let attention = &model.blocks[0].attention;
        let options = attention.options(None);
        let (q, keys, _) = attention.project(x.clone(), &x);
        let order = keys.len();
        // One query at a time: the weights of all would be n times as many.
        (1..x.dims()[1])
            .map(|i| {
                let q = q.clone().narrow(2, i, 1);
                let n = if options.causal { i + 1 } else { x.dims()[1] };
                let keys: Vec<_> = keys.iter().map(|key| key.clone().narrow(2, 0, n)).collect();
                let scores = tuple_scores(q, &keys, options.scale);
                let weights = softmax(scores, 3).mean_dim(1);
                QueryWeights { order, tokens: n, weights: weights.into_data().iter::<f32>().collect() }
            })
            .collect()
    }

    /// The tuples with the highest weights. The same tokens in another order count as one.
    pub fn strongest(&self, count: usize) -> Vec<Tuple> {
        let mut sums = std::collections::BTreeMap::<Vec<usize>, f32>::new();
        for (number, weight) in self.weights.iter().enumerate() {
            let mut rest = number;
            let mut places: Vec<usize> = (0..self.order)
                .map(|_| {
                    let place = rest % self.tokens;
                    rest /= self.tokens;
                    place
                })
                .collect();
            places.sort_unstable();
            *sums.entry(places).or_default() += weight;
        }
        let mut tuples: Vec<(Vec<usize>, f32)> = sums.into_iter().collect();
        tuples.sort_by(|a, b| b.1.total_cmp(&a.1));
        tuples.truncate(count);
        let tuple = |(places, weight): (Vec<usize>, f32)| Tuple {
            places: places.into_iter().map(|place| place.checked_sub(1)).collect(),
            weight,
        };
        tuples.into_iter().map(tuple).collect()
    }
}
