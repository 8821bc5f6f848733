//! How well a language model predicts a text.

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Error, Result};
use serde::Serialize;

use crate::lm::{check_ids, model_device};
use crate::{LanguageModel, ids_to_tensor, token_nll};

/// Independent windows are read together up to about so many tokens, which bounds memory.
const TOKENS_AT_ONCE: usize = 1024;

/// The loss on a text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Score {
    /// Tokens whose probability was measured.
    pub tokens_scored: usize,
    /// Mean negative log-likelihood, nats a token.
    pub nll_nats: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// All bits over the bytes that the scored tokens stand for; absent until those are known.
    pub bits_per_byte: Option<f64>,
}

/// The loss with a given number of tokens in view.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ContextScore {
    /// Tokens read, the scored ones' predecessors included.
    pub context: usize,
    /// The loss of the last of them.
    #[serde(flatten)]
    pub score: Score,
}

impl Score {
    fn new(nats: &[f64]) -> Result<Self> {
        let nll_nats = nats.iter().sum::<f64>() / nats.len() as f64;
        if !nll_nats.is_finite() {
            return Err(Error::work(format!("the loss on the text is {nll_nats}"))
                .hint("the model's weights have gone wrong; use an earlier checkpoint"));
        }
        Ok(Self { tokens_scored: nats.len(), nll_nats, perplexity: nll_nats.exp(), bits_per_byte: None })
    }

    /// With [`bits_per_byte`](Self::bits_per_byte), for scored tokens that stand for `bytes` bytes.
    pub fn over_bytes(self, bytes: usize) -> Self {
        let bits = self.nll_nats * self.tokens_scored as f64 / std::f64::consts::LN_2;
        Self { bits_per_byte: Some(bits / bytes as f64), ..self }
    }
}

/// Scores every token but the first, each with all tokens before it in view: the text is read `piece` tokens
/// at a time with the state carried over, so that memory does not grow with the text beyond what the state
/// itself does.
///
/// # Errors
/// When there are fewer than two tokens, an id is outside the vocabulary, or the loss is not finite.
pub fn score_carried<M: LanguageModel>(model: &M, ids: &[u32], piece: usize) -> Result<Score> {
    check_text(model, ids, 2)?;
    check_at_least_one("piece", piece)?;
    let device = model_device(model);
    let mut state = model.initial_state(1, &device);
    let mut nats = Vec::with_capacity(ids.len() - 1);
    let mut start = 0;
    while start + 1 < ids.len() {
        let end = (start + piece).min(ids.len() - 1);
        let (logits, next) = model.forward_with_state(ids_to_tensor(&ids[start..end], &device), state);
        state = next;
        nats.extend(to_f64(token_nll(logits, ids_to_tensor(&ids[start + 1..=end], &device))));
        start = end;
    }
    Score::new(&nats)
}

/// Scores every token but the first; the text is read in windows of `window` tokens that know nothing of each
/// other.
///
/// # Errors
/// As [`score_carried`].
pub fn score_windows<M: LanguageModel>(model: &M, ids: &[u32], window: usize) -> Result<Score> {
    check_text(model, ids, 2)?;
    check_at_least_one("window", window)?;
    let device = model_device(model);
    let whole = (ids.len() - 1) / window;
    let starts: Vec<usize> = (0..whole).map(|number| number * window).collect();
    let mut nats = window_nats(model, ids, &starts, window, window, &device);
    let rest = ids.len() - 1 - whole * window;
    if rest > 0 {
        nats.extend(window_nats(model, ids, &[whole * window], rest, rest, &device));
    }
    Score::new(&nats)
}

/// Scores the same tokens with different numbers of tokens in view, one score for each of `lengths`.
///
/// The text is divided into windows as long as the longest length; scored are the last `scored` tokens of
/// each, read after the `length - scored` tokens before them.
///
/// # Errors
/// As [`score_carried`], and when a length is shorter than `scored` or the text shorter than the longest.
pub fn score_context_lengths<M: LanguageModel>(
    model: &M,
    ids: &[u32],
    lengths: &[usize],
    scored: usize,
) -> Result<Vec<ContextScore>> {
    check_at_least_one("number of scored tokens", scored)?;
    let longest = lengths.iter().copied().max().unwrap_or(0);
    if let Some(length) = lengths.iter().find(|&&length| length < scored) {
        return Err(Error::usage(format!("a context of {length} tokens has no {scored} tokens to score"))
            .hint("ask for longer contexts"));
    }
    check_text(model, ids, longest + 1)?;
    let device = model_device(model);
    let ends: Vec<usize> = (1..).map(|number| number * longest).take_while(|&end| end < ids.len()).collect();
    let at_length = |&length: &usize| {
        let starts: Vec<usize> = ends.iter().map(|end| end - length).collect();
        let score = Score::new(&window_nats(model, ids, &starts, length, scored, &device))?;
        Ok(ContextScore { context: length, score })
    };
    lengths.iter().map(at_length).collect()
}

/// The negative log-likelihoods of the last `scored` targets of windows of `length` tokens.
fn window_nats<M: LanguageModel>(
    model: &M,
    ids: &[u32],
    starts: &[usize],
    length: usize,
    scored: usize,
    device: &Device,
) -> Vec<f64> {
    let batch = (TOKENS_AT_ONCE / length).max(1);
    let rows = |starts: &[usize], from: usize, length: usize| -> Tensor<2, Int> {
        let values: Vec<i64> = starts
            .iter()
            .flat_map(|start| &ids[start + from..start + from + length])
            .map(|&id| id.into())
            .collect();
        Tensor::from_data(TensorData::new(values, [starts.len(), length]), device)
    };
    starts
        .chunks(batch)
        .flat_map(|starts| {
            let logits = model.forward(rows(starts, 0, length)).narrow(1, length - scored, scored);
            to_f64(token_nll(logits, rows(starts, length - scored + 1, scored)))
        })
        .collect()
}

fn to_f64(nats: Tensor<2>) -> Vec<f64> {
    nats.into_data().iter::<f64>().collect()
}

fn check_text<M: LanguageModel>(model: &M, ids: &[u32], needed: usize) -> Result<()> {
    if ids.len() < needed {
        let found = format!("has {} tokens, but at least {needed} are needed", ids.len());
        return Err(Error::input("text", found).hint("give more text or ask for shorter contexts"));
    }
    check_ids(ids, model.vocab_size(), "text")
}

fn check_at_least_one(what: &str, value: usize) -> Result<()> {
    if value == 0 { Err(Error::usage(format!("the {what} is 0, but must be at least 1"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::test_module;
    use crate::{Llama, LlamaConfig, next_token_loss};

    const IDS: [u32; 14] = [3, 1, 4, 1, 5, 0, 2, 6, 5, 3, 5, 1, 0, 2];

    fn model() -> Llama {
        let config = LlamaConfig::new(7, 8, 1, 2).with_intermediate_size(Some(8));
        test_module(|device| config.init(device))
    }

    /// The mean loss of the last `scored` targets of `ids` in one pass.
    fn loss(model: &Llama, ids: &[u32], scored: usize) -> f64 {
        let device = Device::flex();
        let time = ids.len() - 1;
        let logits = model.forward(ids_to_tensor(&ids[..time], &device)).narrow(1, time - scored, scored);
        next_token_loss(logits, ids_to_tensor(&ids[time + 1 - scored..], &device)).into_scalar::<f32>().into()
    }

    fn assert_close(a: f64, b: f64) {
        assert!((a - b).abs() < 1e-5, "{a} {b}");
    }

    #[test]
    fn carried_pieces_score_as_one_whole_pass() {
        let model = model();
        for piece in [1, 5, 13, 100] {
            let score = score_carried(&model, &IDS, piece).unwrap();
            assert_eq!(score.tokens_scored, 13);
            assert_close(score.nll_nats, loss(&model, &IDS, 13));
        }
    }

    #[test]
    fn windows_are_scored_apart() {
        let model = model();
        let score = score_windows(&model, &IDS, 5).unwrap();
        let parts = [(0, 5), (5, 5), (10, 3)];
        let sum: f64 = parts.iter().map(|&(at, n)| n as f64 * loss(&model, &IDS[at..=at + n], n)).sum();
        assert_eq!(score.tokens_scored, 13);
        assert_close(score.nll_nats, sum / 13.0);
    }

    #[test]
    fn every_context_length_scores_the_same_tokens() {
        let model = model();
        let scores = score_context_lengths(&model, &IDS, &[2, 6], 2).unwrap();
        // Windows end before tokens 6 and 12; the targets are 5, 6 and 11, 12.
        let expected = |length: usize| {
            let at = |end: usize| loss(&model, &IDS[end - length..=end], 2);
            (at(6) + at(12)) / 2.0
        };
        for (score, length) in scores.iter().zip([2, 6]) {
            assert_eq!((score.context, score.score.tokens_scored), (length, 4));
            assert_close(score.score.nll_nats, expected(length));
        }
    }

    #[test]
    fn bits_count_over_bytes() {
        let score = Score::new(&[2.0f64.ln(), 8.0f64.ln()]).unwrap().over_bytes(8);
        assert_close(score.perplexity, 4.0);
        assert_close(score.bits_per_byte.unwrap(), 0.5);
    }

    #[test]
    fn texts_that_cannot_be_scored_are_refused() {
        let model = model();
        let message = |result: Result<Score>| result.unwrap_err().to_string();
        assert!(message(score_carried(&model, &[1], 4)).contains("at least 2"));
        assert!(message(score_carried(&model, &[1, 9], 4)).contains("token id 9 at 1"));
        assert!(message(score_windows(&model, &IDS, 0)).contains("window is 0"));
        let error = score_context_lengths(&model, &IDS, &[14], 2).unwrap_err().to_string();
        assert!(error.contains("at least 15"), "{error}");
        let error = score_context_lengths(&model, &IDS, &[2], 3).unwrap_err().to_string();
        assert!(error.contains("no 3 tokens"), "{error}");
    }
}
