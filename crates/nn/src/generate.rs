//! Drawing text from a language model, one token at a time.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use burn::tensor::Tensor;
use kiln_core::{Error, Result};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::lm::{check_ids, model_device};
use crate::{LanguageModel, ids_to_tensor};

/// A prompt is read in pieces of so many tokens, which bounds the memory of its logits.
const PIECE: usize = 1024;

/// How the next token is drawn from the logits.
///
/// In this order: the repetition penalty, the temperature, the `top_k` cut, the `top_p` cut.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Logits are divided by it; above 0.
    pub temperature: f64,
    /// Only so many of the likeliest tokens stay; 0 keeps all.
    pub top_k: usize,
    /// Only the likeliest tokens that together reach this probability stay; 1 keeps all.
    pub top_p: f64,
    /// Takes the likeliest token; temperature and cuts then do nothing.
    pub greedy: bool,
    /// Makes tokens of the prompt and the output less likely (Keskar et al., "CTRL", arXiv 1909.05858): their
    /// logits are divided by it if positive, multiplied if negative. 1 does nothing.
    pub repetition_penalty: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.8, top_k: 0, top_p: 1.0, greedy: false, repetition_penalty: 1.0 }
    }
}

impl Sampling {
    /// Makes sure that the settings make sense.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<()> {
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::usage(format!(
                "the temperature is {}, but must be above 0",
                self.temperature
            ))
            .hint("--greedy always takes the likeliest token"));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::usage(format!("top-p is {}, but must be above 0 and at most 1", self.top_p)));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            let found = self.repetition_penalty;
            return Err(Error::usage(format!("the repetition penalty is {found}, but must be above 0"))
                .hint("1 leaves the logits as they are"));
        }
        Ok(())
    }

    /// Draws a token; `seen` are those of the prompt and the output.
    ///
    /// # Errors
    /// When a logit is not a number or infinite.
    pub fn draw(&self, logits: &[f32], seen: &BTreeSet<u32>, rng: &mut impl Rng) -> Result<u32> {
        if let Some(token) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(Error::work(format!("the logit of token {token} is {}", logits[token]))
                .hint("the model's weights have gone wrong; use an earlier checkpoint"));
        }
        let mut candidates: Vec<(u32, f64)> = (0..).zip(logits.iter().map(|&logit| logit.into())).collect();
        for &token in seen {
            if let Some((_, logit)) = candidates.get_mut(token as usize) {
                let penalty = self.repetition_penalty;
                *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
            }
        }
        // Likeliest first; of equals the lowest id, so that results do not depend on the sort.
        candidates.sort_by(|(id_a, a), (id_b, b)| b.total_cmp(a).then(id_a.cmp(id_b)));
        let Some(&(likeliest, highest)) = candidates.first() else {
            return Err(Error::work("the model has an empty vocabulary"));
        };
        if self.greedy {
            return Ok(likeliest);
        }
        if self.top_k > 0 {
            candidates.truncate(self.top_k);
        }
        for (_, weight) in &mut candidates {
            *weight = ((*weight - highest) / self.temperature).exp();
        }
        if self.top_p < 1.0 {
            let enough = self.top_p * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut reached = 0.0;
            candidates.retain(|(_, weight)| {
                let keep = reached < enough;
                reached += weight;
                keep
            });
        }
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut left = rng.random::<f64>() * total;
        for &(token, weight) in &candidates {
            left -= weight;
            if left < 0.0 {
                return Ok(token);
            }
        }
        Ok(likeliest) // rounding has eaten the last candidate's share
    }
}

/// Continues `prompt`: reads it, then draws up to `max_tokens` tokens, each shown to `on_token`, which
/// may end the generation.
///
/// Returns the new tokens and the state, which has read every token of prompt and output except the very
/// last: to continue exactly, give that last token as the next prompt together with the state.
///
/// # Errors
/// When the sampling makes no sense, the prompt is empty or has an id outside the vocabulary, or the
/// logits are not finite.
pub fn generate<M: LanguageModel>(
    model: &M,
    prompt: &[u32],
    mut state: M::State,
    sampling: &Sampling,
    max_tokens: usize,
    rng: &mut impl Rng,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<(Vec<u32>, M::State)> {
    sampling.check()?;
    check_ids(prompt, model.vocab_size(), "prompt")?;
    let Some((last, all_but_last)) = prompt.split_last() else {
        return Err(Error::usage("the prompt is empty").hint("begin with the tokenizer's start token"));
    };
    let device = model_device(model);
    let mut seen: BTreeSet<u32> = prompt.iter().copied().collect();
    let mut output = Vec::new();
    for piece in all_but_last.chunks(PIECE) {
        state = model.forward_with_state(ids_to_tensor(piece, &device), state).1;
    }
    if max_tokens == 0 {
        return Ok((output, state));
    }
    let mut unread = *last;
    loop {
        let (logits, next) = model.forward_with_state(ids_to_tensor(&[unread], &device), state);
        state = next;
        let token = sampling.draw(&last_logits(logits), &seen, rng)?;
        seen.insert(token);
        output.push(token);
        if on_token(token).is_break() || output.len() == max_tokens {
            return Ok((output, state));
        }
        unread = token;
    }
}

/// The logits after the last position of one row, `[1, time, vocab]`.
fn last_logits(logits: Tensor<3>) -> Vec<f32> {
    let [_, time, _] = logits.dims();
    let last = logits.narrow(1, time - 1, 1).into_data().convert::<f32>();
    last.try_to_vec().expect("converted to f32 just above")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::test_module;
    use crate::{Llama, LlamaConfig};
    use burn::tensor::Device;
    use kiln_core::random_stream;

    /// Which tokens come up in 500 draws.
    fn drawn(sampling: Sampling, logits: &[f32], seen: &[u32]) -> BTreeSet<u32> {
        sampling.check().unwrap();
        let seen = seen.iter().copied().collect();
        let mut rng = random_stream(0, "draw", 0);
        (0..500).map(|_| sampling.draw(logits, &seen, &mut rng).unwrap()).collect()
    }

    /// Probabilities 0.5, 0.3, 0.15 and 0.05 of tokens 2, 0, 3 and 1.
    fn logits() -> Vec<f32> {
        [0.3f32, 0.05, 0.5, 0.15].map(f32::ln).to_vec()
    }

    const PLAIN: Sampling =
        Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, greedy: false, repetition_penalty: 1.0 };

    #[test]
    fn cuts_keep_the_likeliest() {
        assert_eq!(drawn(PLAIN, &logits(), &[]), [0, 1, 2, 3].into());
        assert_eq!(drawn(Sampling { top_k: 2, ..PLAIN }, &logits(), &[]), [0, 2].into());
        // 0.5 alone does not reach 0.6, with 0.3 it does; 0.81 needs three.
        assert_eq!(drawn(Sampling { top_p: 0.6, ..PLAIN }, &logits(), &[]), [0, 2].into());
        assert_eq!(drawn(Sampling { top_p: 0.81, ..PLAIN }, &logits(), &[]), [0, 2, 3].into());
        assert_eq!(drawn(Sampling { top_p: 0.01, ..PLAIN }, &logits(), &[]), [2].into());
        assert_eq!(drawn(Sampling { greedy: true, ..PLAIN }, &logits(), &[]), [2].into());
        assert_eq!(drawn(Sampling { temperature: 0.01, ..PLAIN }, &logits(), &[]), [2].into());
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let mut rng = random_stream(0, "draw", 1);
        let draws = 20_000;
        let hits =
            (0..draws).filter(|_| PLAIN.draw(&logits(), &BTreeSet::new(), &mut rng).unwrap() == 0).count();
        // Standard deviation sqrt(0.3 * 0.7 / 20000) = 0.0032.
        assert!((hits as f64 / f64::from(draws) - 0.3).abs() < 0.013, "{hits}");
    }

    #[test]
    fn the_penalty_lowers_positive_and_negative_logits() {
        let greedy = Sampling { greedy: true, repetition_penalty: 2.0, ..PLAIN };
        assert_eq!(drawn(greedy, &[3.0, 2.0], &[0]), [1].into()); // 1.5 < 2
        assert_eq!(drawn(greedy, &[-1.0, -1.5], &[0]), [1].into()); // -2 < -1.5
        assert_eq!(drawn(greedy, &[5.0, 2.0], &[0]), [0].into()); // 2.5 > 2
        assert_eq!(drawn(greedy, &[1.0, 1.0], &[]), [0].into()); // of equals the first
    }

    #[test]
    fn bad_settings_and_bad_logits_are_refused() {
        for bad in [
            Sampling { temperature: 0.0, ..PLAIN },
            Sampling { top_p: 0.0, ..PLAIN },
            Sampling { top_p: 1.1, ..PLAIN },
            Sampling { top_p: f64::NAN, ..PLAIN },
            Sampling { repetition_penalty: 0.0, ..PLAIN },
        ] {
            assert!(bad.check().is_err(), "{bad:?}");
        }
        let draw = PLAIN.draw(&[0.0, f32::NAN], &BTreeSet::new(), &mut random_stream(0, "draw", 0));
        assert!(draw.unwrap_err().to_string().contains("token 1 is NaN"));
    }

    fn model() -> Llama {
        let config = LlamaConfig::new(7, 8, 1, 2).with_intermediate_size(Some(8));
        test_module(|device| config.init(device))
    }

    fn greedily(
        model: &Llama,
        prompt: &[u32],
        state: <Llama as LanguageModel>::State,
        count: usize,
    ) -> (Vec<u32>, <Llama as LanguageModel>::State) {
        let sampling = Sampling { greedy: true, repetition_penalty: 1.5, ..PLAIN };
        let mut rng = random_stream(0, "draw", 0);
        generate(model, prompt, state, &sampling, count, &mut rng, |_| ControlFlow::Continue(())).unwrap()
    }

    #[test]
    fn cached_generation_takes_the_tokens_of_whole_forward_passes() {
        let model = model();
        let device = Device::flex();
        let (output, _) = greedily(&model, &[3, 1], model.initial_state(1, &device), 6);
        let sampling = Sampling { greedy: true, repetition_penalty: 1.5, ..PLAIN };
        let mut text = vec![3, 1];
        for _ in 0..6 {
            let logits = last_logits(model.forward(ids_to_tensor(&text, &device)));
            let seen = text.iter().copied().collect();
            text.push(sampling.draw(&logits, &seen, &mut random_stream(0, "draw", 0)).unwrap());
        }
        assert_eq!(output, text[2..]);
    }

    #[test]
    fn the_state_has_read_everything_but_the_last_token() {
        let model = model();
        let device = Device::flex();
        let start = || model.initial_state(1, &device);
        for count in [0, 3] {
            let (output, state) = greedily(&model, &[3, 1, 4], start(), count);
            let text: Vec<u32> = [3, 1, 4].into_iter().chain(output).collect();
            let continued =
                model.forward_with_state(ids_to_tensor(&text[text.len() - 1..], &device), state).0;
            let whole = model.forward(ids_to_tensor(&text, &device));
            let (continued, whole) = (last_logits(continued), last_logits(whole));
            assert!(
                continued.iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-4),
                "{continued:?} {whole:?}"
            );
        }
    }

    #[test]
    fn the_reader_can_end_it_and_bad_prompts_are_refused() {
        let model = model();
        let go = |prompt: &[u32]| {
            let state = model.initial_state(1, &Device::flex());
            let mut rng = random_stream(0, "draw", 0);
            generate(&model, prompt, state, &PLAIN, 5, &mut rng, |_| ControlFlow::Break(()))
                .map(|(out, _)| out)
        };
        assert_eq!(go(&[0]).unwrap().len(), 1);
        assert!(go(&[]).unwrap_err().to_string().contains("empty"));
        assert!(go(&[1, 7]).unwrap_err().to_string().contains("token id 7"));
    }
}
