//! HyperLSTM (Ha, Dai, Le, "HyperNetworks", ICLR 2017, arXiv 1609.09106, §3.2 and appendix A.2.2): a small LSTM that scales
//! the weights of a larger one anew at every step.
//!
//! With the token's row `x_t` of a table and gates `i, f, o, g` of width H, the small LSTM sees what the large one knows:
//!
//! ```text
//! ĥ_t, ĉ_t = lstm(x̂_t + Ŵ [h_{t-1}, ĥ_{t-1}], ĉ_{t-1})
//! gates    = (1 + d_x) x_t + (1 + d_h) W h_{t-1} + d_b        d_* = D_* (Z_* ĥ_t), for each gate on its own
//! ```
//!
//! Scaling the rows of a weight is the paper's way to make weights of size 4H² from 4H numbers. The 1 is ours: at first the
//! network is an ordinary LSTM, which is also the baseline, widened until it has as many parameters.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Int, Tensor, TensorData, activation};
use kiln_core::{Context, Error, Plot, Result, Table};
use kiln_data::{Windows, shakespeare};
use kiln_nn::{
    Embedding, EmbeddingConfig, LanguageModel, Linear, LinearConfig, initialise, next_token_loss,
    score_carried,
};
use kiln_ops::matmul;

use crate::apps::Findings;
use crate::training::{Fit, fit};

/// Scalings for each gate: of the token's row, of the recurrent weights, and what is added.
const SCALINGS: usize = 3;
const GATES: usize = 4;
/// Tokens that a text is scored by at a time.
const PIECE: usize = 512;
/// Steps over which the curve of the loss is averaged.
const SMOOTHING: usize = 20;

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Units of the large LSTM, and of the small one.
    pub hidden: [usize; 2],
    /// Width of the codes between the small one and the scalings.
    pub code: usize,
    /// Optimisation steps.
    pub steps: usize,
    /// Windows of a step, and tokens of a window.
    pub batch: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Learning rates that each network is given; the one with the lower validation loss counts.
    pub rates: Vec<f64>,
    /// Bytes of the test text that are scored.
    pub scored: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            hidden: [96, 24],
            code: 4,
            steps: 600,
            batch: 32,
            window: 48,
            rates: vec![2e-3, 6e-3],
            scored: 20_000,
        }
    }
}

/// Text as places in a list of the bytes that occur in it.
#[derive(Debug, Clone)]
pub struct Characters {
    /// Those that occur; any other is the first.
    pub known: Vec<u8>,
    /// For training, validation and tests.
    pub parts: [Vec<u32>; 3],
}

impl Characters {
    /// The embedded Shakespeare.
    pub fn bundled() -> Self {
        Self::new([shakespeare::train(), shakespeare::valid(), shakespeare::test()])
    }

    /// A text of one's own: nine tenths for training, the rest for validation and tests.
    ///
    /// # Errors
    /// When there are too few bytes.
    pub fn of_text(text: &[u8], place: &str) -> Result<Self> {
        const LEAST: usize = 2000;
        if text.len() < LEAST {
            return Err(Error::input(place, format!("has {} bytes, needs at least {LEAST}", text.len())));
        }
        let (train, rest) = text.split_at(text.len() * 9 / 10);
        let (valid, test) = rest.split_at(rest.len() / 2);
        Ok(Self::new([train, valid, test]))
    }

    fn new(parts: [&[u8]; 3]) -> Self {
        let known: std::collections::BTreeSet<u8> = parts[0].iter().copied().collect();
        let known: Vec<u8> = known.into_iter().collect();
        let number = |byte: &u8| known.binary_search(byte).unwrap_or(0) as u32;
        let parts = parts.map(|part| part.iter().map(number).collect());
        Self { known, parts }
    }
}

/// A language model over characters: an LSTM whose weights another scales, or one that is left alone.
#[derive(Module, Debug)]
pub struct CharLstm {
    /// What a token adds to the gates, `[vocab, 4 hidden]`
    pub input: Embedding,
    /// What the state adds to the gates, `[hidden, 4 hidden]`
    pub recurrent: Linear,
    /// To the logits.
    pub output: Linear,
    /// What scales them.
    pub hyper: Option<Scaler>,
    vocab: usize,
    hidden: usize,
}

/// The small LSTM.
#[derive(Module, Debug)]
pub struct Scaler {
    /// What a token adds to its gates, `[vocab, 4 small]`
    pub input: Embedding,
    /// What both states add to its gates, `[hidden + small, 4 small]`
    pub recurrent: Linear,
    /// Its state to codes, `[small, 12 code]`
    pub codes: Linear,
    /// Codes to scalings, `[12, code, hidden]`
    pub scalings: Param<Tensor<3>>,
    small: usize,
}

/// What an LSTM remembers: h and c, `[batch, hidden]` each, of the large one and of the small one.
#[derive(Debug, Clone)]
pub struct State {
    large: (Tensor<2>, Tensor<2>),
    small: Option<(Tensor<2>, Tensor<2>)>,
}

impl CharLstm {
    /// Draws the parameters; `small` is the width of the small LSTM and of its codes.
    pub fn new(vocab: usize, hidden: usize, small: Option<(usize, usize)>, device: &Device) -> Self {
        let table = |width: usize| {
            let mut table = EmbeddingConfig::new(vocab, GATES * width)
                .with_initializer(Initializer::Normal { mean: 0.0, std: 0.1 })
                .init(device);
            // Gates begin by keeping what is remembered: 1 is added to f.
            let keep: Vec<f32> = (0..GATES * width).map(|i| f32::from(u8::from(i / width == 1))).collect();
            let keep = Tensor::<2>::from_data(TensorData::new(keep, [1, GATES * width]), device);
            table.weight = Param::from_tensor(table.weight.val() + keep);
            table
        };
        let recurrent = |from: usize, to: usize| {
            LinearConfig::new(from, GATES * to)
                .with_bias(false)
                .with_initializer(Initializer::Normal { mean: 0.0, std: (from as f64).sqrt().recip() })
                .init(device)
        };
        let scaler = |(small, code): (usize, usize)| Scaler {
            input: table(small),
            recurrent: recurrent(hidden + small, small),
            codes: LinearConfig::new(small, SCALINGS * GATES * code).init(device),
            scalings: Initializer::Normal { mean: 0.0, std: 0.1 / code as f64 }
                .init([SCALINGS * GATES, code, hidden], device),
            small,
        };
        Self {
            input: table(hidden),
            recurrent: recurrent(hidden, hidden),
            output: LinearConfig::new(hidden, vocab).init(device),
            hyper: small.map(scaler),
            vocab,
            hidden,
        }
    }

    /// One step; `x` is what the token adds to the gates, and to those of the small LSTM.
    fn step(&self, x: Tensor<2>, x_small: Option<Tensor<2>>, state: State) -> State {
        let State { large: (h, c), small } = state;
        let (Some(hyper), Some(x_small), Some((h_small, c_small))) = (&self.hyper, x_small, small) else {
            return State { large: cell(x + self.recurrent.forward(h), c), small: None };
        };
        let both = Tensor::cat(vec![h.clone(), h_small], 1);
        let small = cell(x_small + hyper.recurrent.forward(both), c_small);
        let [of_x, of_h, added] = hyper.scale(small.0.clone());
        let gates = x.clone() + x * of_x + added;
        let recurrent = self.recurrent.forward(h);
        let gates = gates + recurrent.clone() + recurrent * of_h;
        State { large: cell(gates, c), small: Some(small) }
    }
}

impl Scaler {
    /// `d_x`, `d_h` and `d_b`, `[batch, 4 hidden]` each.
    fn scale(&self, h: Tensor<2>) -> [Tensor<2>; SCALINGS] {
        let batch = h.dims()[0];
        let weight = self.scalings.val();
        let [sets, code, hidden] = weight.dims();
        let codes = self.codes.forward(h).reshape([batch, sets, code]).swap_dims(0, 1);
        let all = matmul(codes, weight).swap_dims(0, 1).reshape([batch, sets * hidden]);
        [0, 1, 2].map(|part| all.clone().narrow(1, part * GATES * hidden, GATES * hidden))
    }
}

/// h and c after a step, from the gates `i, f, o, g`.
fn cell(gates: Tensor<2>, c: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let width = c.dims()[1];
    let open = activation::sigmoid(gates.clone().narrow(1, 0, 3 * width));
    let part = |at: usize| open.clone().narrow(1, at * width, width);
    let c = part(1) * c + part(0) * activation::tanh(gates.narrow(1, 3 * width, width));
    (part(2) * activation::tanh(c.clone()), c)
}

impl LanguageModel for CharLstm {
    type State = State;

    fn vocab_size(&self) -> usize {
        self.vocab
    }

    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let state = self.initial_state(ids.dims()[0], &ids.device());
        self.forward_with_state(ids, state).0
    }

    fn initial_state(&self, batch: usize, device: &Device) -> State {
        let zeros =
            |width: usize| (Tensor::zeros([batch, width], device), Tensor::zeros([batch, width], device));
        State { large: zeros(self.hidden), small: self.hyper.as_ref().map(|hyper| zeros(hyper.small)) }
    }

    fn forward_with_state(&self, ids: Tensor<2, Int>, mut state: State) -> (Tensor<3>, State) {
        let time = ids.dims()[1];
        let x = self.input.forward(ids.clone());
        let x_small = self.hyper.as_ref().map(|hyper| hyper.input.forward(ids));
        let at = |x: &Tensor<3>, step: usize| x.clone().narrow(1, step, 1).squeeze_dim::<2>(1);
        let mut states = Vec::with_capacity(time);
        for step in 0..time {
            state = self.step(at(&x, step), x_small.as_ref().map(|x| at(x, step)), state);
            states.push(state.large.0.clone());
        }
        (self.output.forward(Tensor::stack(states, 1)), state)
    }
}

/// A network after training with one learning rate.
struct Candidate {
    /// Bits a character on the validation text.
    loss: f64,
    net: CharLstm,
    rate: f64,
    curve: Vec<(f64, f64)>,
}

/// A trained network.
struct Learned {
    parameters: usize,
    rate: f64,
    /// Bits a character on the test text.
    bits: f64,
    /// Training loss in bits.
    curve: Vec<(f64, f64)>,
}

/// Trains both networks on a text; bits a character of the HyperLSTM and of the LSTM on the test part.
///
/// # Errors
/// When the text is too short, or a training fails or is stopped.
pub fn run(config: &Config, text: &Characters, cx: &Context) -> Result<(Findings, [f64; 2])> {
    let [hidden, small] = config.hidden;
    if text.parts.iter().any(|part| part.len() <= config.window) || config.rates.is_empty() {
        return Err(Error::usage(format!("a part of the text has at most {} characters", config.window))
            .hint("give more text or shorter windows"));
    }
    let vocab = text.known.len();
    let sizes = Some((small, config.code));
    let wanted = CharLstm::new(vocab, hidden, sizes, &cx.device).num_params();
    let parameters = |hidden: usize| vocab * GATES * hidden + GATES * hidden * hidden + (hidden + 1) * vocab;
    let wide = (hidden..).find(|&width| parameters(width) >= wanted).unwrap_or(hidden);
    let hyper = learn(config, (hidden, sizes), text, cx)?;
    let plain = learn(config, (wide, None), text, cx)?;
    let mut table = Table::new(
        format!("Characters of a text ({} for training, {vocab} different ones)", text.parts[0].len()),
        &["network", "units", "parameters", "learning rate", "bits a character, test"],
    );
    for (name, units, learned) in
        [("HyperLSTM", format!("{hidden} and {small}"), &hyper), ("LSTM", wide.to_string(), &plain)]
    {
        table.row([
            name.to_string(),
            units,
            learned.parameters.to_string(),
            learned.rate.to_string(),
            format!("{:.3}", learned.bits),
        ]);
    }
    let notes = vec![format!(
        "Characters: {} steps of {} windows of {} characters; {} characters of the test text are scored, each with all \
         before it in view; of the learning rates {:?} each network has the one with the lower validation loss.",
        config.steps,
        config.batch,
        config.window,
        config.scored.min(text.parts[2].len()),
        config.rates
    )];
    let bits = [hyper.bits, plain.bits];
    let plot = Plot::lines("Learning to predict characters", "step", "bits a character, training")
        .series("HyperLSTM", hyper.curve)
        .series("LSTM", plain.curve);
    Ok((Findings { table, plots: vec![plot], notes }, bits))
}

fn learn(
    config: &Config,
    (hidden, small): (usize, Option<(usize, usize)>),
    text: &Characters,
    cx: &Context,
) -> Result<Learned> {
    let vocab = text.known.len();
    let [train, valid, test] = &text.parts;
    let bits = |net: &CharLstm, part: &[u32]| -> Result<f64> {
        let part = &part[..part.len().min(config.scored)];
        Ok(score_carried(net, part, PIECE)?.nll_nats / std::f64::consts::LN_2)
    };
    let mut best: Option<Candidate> = None;
    for &rate in &config.rates {
        let name = if small.is_some() { "HyperLSTM" } else { "LSTM" };
        cx.note(format!("{name} of {hidden} units, learning rate {rate}"));
        let net = initialise(&cx.device, &mut cx.rng("char lstm", 0), |device| {
            CharLstm::new(vocab, hidden, small, device)
        });
        let windows = Windows { corpus: train, seq_len: config.window, batch: config.batch };
        let mut losses = Vec::new();
        let net = fit(net, Fit::new(config.steps, rate), cx, |net, step| {
            let (inputs, targets) = windows.batch(&mut cx.rng("windows", step as u64));
            let shape = [config.batch, config.window];
            let ids = |values| Tensor::<2, Int>::from_data(TensorData::new(values, shape), &cx.device);
            let loss = next_token_loss(net.forward(ids(inputs)), ids(targets));
            losses.push(f64::from(loss.clone().into_scalar::<f32>()) / std::f64::consts::LN_2);
            Ok(loss)
        })?;
        let loss = bits(&net, valid)?;
        if best.as_ref().is_none_or(|best| loss < best.loss) {
            let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
            let curve = losses.chunks(SMOOTHING).enumerate();
            let curve = curve.map(|(i, part)| ((i * SMOOTHING + part.len()) as f64, mean(part))).collect();
            best = Some(Candidate { loss, net, rate, curve });
        }
    }
    let Candidate { net, rate, curve, .. } = best.expect("there is at least one learning rate");
    Ok(Learned { parameters: net.num_params(), rate, bits: bits(&net, test)?, curve })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(small: Option<(usize, usize)>) -> CharLstm {
        initialise(&Device::flex(), &mut kiln_core::random_stream(0, "test", 0), |device| {
            CharLstm::new(7, 6, small, device)
        })
    }

    fn ids(values: &[i64]) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len()]), &Device::flex())
    }

    fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
        x.into_data().try_to_vec().unwrap()
    }

    #[test]
    fn a_text_in_pieces_gives_the_logits_of_the_whole() {
        for small in [None, Some((3, 2))] {
            let net = net(small);
            let whole = floats(net.forward(ids(&[0, 5, 2, 6])));
            let state = net.initial_state(1, &Device::flex());
            let (first, state) = net.forward_with_state(ids(&[0, 5]), state);
            let (second, _) = net.forward_with_state(ids(&[2, 6]), state);
            let parts = [floats(first), floats(second)].concat();
            assert!(whole.iter().zip(&parts).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }

    #[test]
    fn without_scalings_it_is_the_lstm_and_with_them_weights_change_at_every_step() {
        let mut hyper = net(Some((3, 2)));
        let made = floats(hyper.forward(ids(&[1, 1, 1])));
        let zeros = hyper.hyper.as_ref().unwrap().scalings.val().zeros_like();
        if let Some(scaler) = &mut hyper.hyper {
            scaler.scalings = Param::from_tensor(zeros);
        }
        let left = floats(hyper.forward(ids(&[1, 1, 1])));
        hyper.hyper = None;
        let plain = floats(hyper.forward(ids(&[1, 1, 1])));
        assert_eq!(left, plain);
        assert_ne!(made, plain);
    }

    #[test]
    fn the_gradient_along_itself_is_its_norm() {
        use kiln_nn::WeightSpec;
        let net = net(Some((3, 2)));
        let spec = WeightSpec::of(&net);
        let phi = spec.read(&net).unwrap();
        let loss = |phi: Tensor<1>| {
            let net = spec.split(phi).unwrap().fill(&net).unwrap();
            next_token_loss(net.forward(ids(&[0, 5, 2, 6])), ids(&[5, 2, 6, 1]))
        };
        let leaf = Tensor::from_inner(phi.clone()).require_grad();
        let gradient = leaf.grad(&loss(leaf.clone()).backward()).unwrap();
        let norm = gradient.clone().square().sum().sqrt();
        let direction = gradient / norm.clone();
        let at = |step: f64| loss(phi.clone() + direction.clone() * step).into_scalar::<f32>();
        let (found, expected) = (norm.into_scalar::<f32>(), (at(1e-2) - at(-1e-2)) / 2e-2);
        assert!((found - expected).abs() < 0.02 * found, "{found} {expected}");
    }
}
