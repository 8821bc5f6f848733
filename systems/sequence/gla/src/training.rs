//! Training a language model on a text: batches, validation, and what the gates came to.

use burn::tensor::{Int, Tensor, TensorData};
use kiln_core::{Context, Plot, Result, Table};
use kiln_data::{Corpus, Windows};
use kiln_nn::{LanguageModel, Task, next_token_loss, score_windows};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::lm::Lm;

/// Validation reads at most so many tokens of the held-out text, so that it stays short beside training.
const VALIDATION_TOKENS: usize = 16_384;

/// Next-token prediction on random windows of a text.
pub struct LanguageTask<'a> {
    /// What is trained on.
    pub train: &'a Corpus,
    /// What is validated on.
    pub valid: &'a Corpus,
    /// Tokens a window.
    pub seq_len: usize,
    /// Windows a batch.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
}

impl LanguageTask<'_> {
    /// Where a state begins anew when the windows at `starts` lie one after another in one row: at each
    /// window, and at each document inside one. The length of the row comes last.
    fn document_offsets(&self, starts: &[usize]) -> Vec<usize> {
        let documents = &self.train.documents;
        let mut offsets = Vec::with_capacity(starts.len() + 1);
        for (row, &start) in starts.iter().enumerate() {
            let place = row * self.seq_len;
            offsets.push(place);
            let first = documents.partition_point(|&document| document <= start);
            let inside = documents[first..].iter().take_while(|&&document| document < start + self.seq_len);
            offsets.extend(inside.map(|document| place + document - start));
        }
        offsets.push(starts.len() * self.seq_len);
        offsets
    }
}

impl Task<Lm> for LanguageTask<'_> {
    fn loss(&mut self, model: &Lm, step: usize) -> Result<(Tensor<1>, usize)> {
        let windows = Windows { corpus: &self.train.ids, seq_len: self.seq_len, batch: self.batch };
        let starts = windows.starts(&mut self.cx.rng("batch", step as u64));
        let (inputs, targets) = windows.read(&starts);
        let device = self.cx.device.clone().autodiff();
        let tokens = self.batch * self.seq_len;
        let ids = |ids: Vec<i64>, shape: [usize; 2]| -> Tensor<2, Int> {
            Tensor::from_data(TensorData::new(ids, shape), &device)
        };
        let loss = match model {
            // Of several documents none may leave its traces in the state of the next.
            Lm::Gla(model) if self.train.documents.len() > 1 => {
                let logits = model.forward_packed(ids(inputs, [1, tokens]), &self.document_offsets(&starts));
                next_token_loss(logits, ids(targets, [1, tokens]))
            }
            _ => {
                let shape = [self.batch, self.seq_len];
                next_token_loss(model.forward(ids(inputs, shape)), ids(targets, shape))
            }
        };
        Ok((loss, tokens))
    }

    fn validate(&mut self, model: &Lm) -> Result<f64> {
        let ids = &self.valid.ids[..self.valid.ids.len().min(VALIDATION_TOKENS + 1)];
        Ok(score_windows(model, ids, self.seq_len)?.nll_nats)
    }

    fn settings(&self) -> Map<String, Value> {
        let settings =
            [("seq_len", self.seq_len), ("batch", self.batch), ("train_tokens", self.train.ids.len())];
        settings.into_iter().map(|(name, value)| (name.to_string(), value.into())).collect()
    }
}

/// How long one head remembers.
#[derive(Debug, Clone, Serialize)]
pub struct HeadMemory {
    /// From 0, counted from the embedding.
    pub layer: usize,
    /// From 0.
    pub head: usize,
    /// Tokens after which half of a channel is forgotten, from each channel's mean log decay: the median channel.
    pub median_half_life: f64,
    /// The channel that forgets first.
    pub shortest_half_life: f64,
    /// The channel that forgets last; infinite where a gate never closes.
    pub longest_half_life: f64,
    /// All channels.
    #[serde(skip)]
    half_lives: Vec<f64>,
}

/// Half-lives of every head of a GLA model on a text; none for architectures without a gate.
///
/// Reads at most the first `VALIDATION_TOKENS` tokens.
pub fn head_memory(model: &Lm, ids: &[u32], cx: &Context) -> Vec<HeadMemory> {
    let Lm::Gla(model) = model else { return Vec::new() };
    let ids = &ids[..ids.len().min(VALIDATION_TOKENS)];
    let decays = model.log_decays(kiln_nn::ids_to_tensor(ids, &cx.device));
    let mut heads = Vec::new();
    for (layer, g) in decays.into_iter().enumerate() {
        let [_, count, _, key] = g.dims();
        let means: Vec<f64> = g.mean_dim(2).into_data().iter::<f64>().collect();
        for head in 0..count {
            let mut half_lives: Vec<f64> = means[head * key..(head + 1) * key]
                .iter()
                .map(|&g| if g < 0.0 { -std::f64::consts::LN_2 / g } else { f64::INFINITY })
                .collect();
            half_lives.sort_by(f64::total_cmp);
            heads.push(HeadMemory {
                layer,
                head,
                median_half_life: half_lives[key / 2],
                shortest_half_life: half_lives[0],
                longest_half_life: half_lives[key - 1],
                half_lives,
            });
        }
    }
    heads
}

/// The heads' half-lives as a table.
pub fn memory_table(heads: &[HeadMemory]) -> Table {
    let mut table = Table::new(
        "Memory of each head: half-life of its channels in tokens",
        &["layer", "head", "shortest", "median", "longest"],
    );
    for head in heads {
        table.row([
            head.layer.to_string(),
            head.head.to_string(),
            format!("{:.1}", head.shortest_half_life),
            format!("{:.1}", head.median_half_life),
            format!("{:.1}", head.longest_half_life),
        ]);
    }
    table
}

/// The half-lives of all channels, one curve a head: which fraction of its channels forgets half within so
/// many tokens.
pub fn memory_plot(heads: &[HeadMemory]) -> Plot {
    let mut plot = Plot::lines(
        "Effective memory of each head",
        "half-life in tokens",
        "fraction of channels at or below",
    )
    .log_x();
    for head in heads {
        let count = head.half_lives.len() as f64;
        let points = head.half_lives.iter().enumerate().map(|(i, &t)| (t, (i + 1) as f64 / count)).collect();
        plot = plot.series(format!("layer {} head {}", head.layer, head.head), points);
    }
    plot
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_begin_anew_at_windows_and_at_documents_inside_them() {
        let corpus = Corpus { ids: vec![0; 30], documents: vec![0, 4, 10, 25] };
        let cx = Context::new();
        let task = LanguageTask { train: &corpus, valid: &corpus, seq_len: 8, batch: 3, cx: &cx };
        assert_eq!(task.document_offsets(&[0, 4, 18]), [0, 4, 8, 14, 16, 23, 24]);
    }
}
