//! MEGA's multi-headed damped EMA (Ma et al., "Mega: Moving Average Equipped Gated Attention", arXiv 2209.10655), the mixer
//! that the TCN takes the place of.
//!
//! Per channel, with N states and `p = σ(δ)`, `q = 1 - p σ(α)`:
//!
//! ```text
//! h_t = q h_{t-1} + p β x_t        o_t = Σ_n γ_n h_{t,n} / √N        y_t = silu(o_t + ω x_t)
//! ```
//!
//! Over a whole sequence that is a convolution with `k_l = Σ_n γ_n p_n β_n q_n^l / √N`, by FFT.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Error, Result};
use kiln_ops::vector::fma;
use kiln_ops::{Activation, activate, apply, irfft, rfft, runs_natively, simd};

use crate::long_conv::{LongConv, PowerKernel, fft_length};

/// Configuration of a [`MultiHeadEma`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MultiHeadEmaConfig {
    /// Width of input and output, D.
    pub channels: usize,
    /// States a channel, N.
    pub states: usize,
    /// Whether a second EMA runs backwards over the sequence.
    pub bidirectional: bool,
    /// Steps after which the kernel is cut off, if at all.
    pub truncation: Option<usize>,
}

impl MultiHeadEmaConfig {
    /// A causal EMA with 16 states a channel.
    pub fn new(channels: usize) -> Self {
        Self { channels, states: 16, bidirectional: false, truncation: None }
    }

    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.states == 0 {
            return Err(Error::usage("an EMA needs at least one state a channel"));
        }
        if self.truncation == Some(0) {
            return Err(Error::usage("an EMA cut off after 0 steps sees nothing"));
        }
        Ok(())
    }

    /// Draws the parameters as the reference does.
    pub fn init(&self, device: &Device) -> MultiHeadEma {
        let Self { channels, states, bidirectional, .. } = *self;
        let rows = if bidirectional { 2 * channels } else { channels };
        let normal = |std| Initializer::Normal { mean: 0.0, std };
        // +1, -1, +1, ..
        let signs: Vec<f32> = (0..states).map(|n| if n.is_multiple_of(2) { 1.0 } else { -1.0 }).collect();
        let signs = Tensor::<3>::from_data(TensorData::new(signs, [1, states, 1]), device);
        let beta: Param<Tensor<3>> = normal(0.02).init([rows, states, 1], device);
        MultiHeadEma {
            delta: normal(0.2).init([rows, states, 1], device),
            alpha: normal(0.2).init([rows, states, 1], device),
            beta: beta.map(|beta| beta + signs),
            gamma: normal(1.0).init([rows, states], device),
            omega: normal(1.0).init([channels], device),
            config: *self,
        }
    }
}

/// The damped EMA. Where it runs both ways, the first D rows of its parameters are those of the forward direction.
#[derive(Module, Debug)]
pub struct MultiHeadEma {
    /// δ `[D or 2 D, N, 1]`
    pub delta: Param<Tensor<3>>,
    /// α `[D or 2 D, N, 1]`
    pub alpha: Param<Tensor<3>>,
    /// β `[D or 2 D, N, 1]`
    pub beta: Param<Tensor<3>>,
    /// γ `[D or 2 D, N]`
    pub gamma: Param<Tensor<2>>,
    /// ω `[D]`
    pub omega: Param<Tensor<1>>,
    #[module(skip)]
    config: MultiHeadEmaConfig,
}

/// What a causal EMA remembers.
#[derive(Debug, Clone)]
pub struct EmaState {
    /// `[batch, D, N]`
    pub h: Tensor<3>,
    /// The last inputs of a truncated EMA, `[batch, truncation, D]`.
    pub past: Option<Tensor<3>>,
}

impl MultiHeadEma {
    /// The configuration it was made with.
    pub fn config(&self) -> &MultiHeadEmaConfig {
        &self.config
    }

    /// p, and `1 - q`, `[rows, N]`.
    fn rates(&self) -> (Tensor<2>, Tensor<2>) {
        let [p, a] =
            [&self.delta, &self.alpha].map(|x| activate(x.val().squeeze_dim::<2>(2), Activation::Sigmoid));
        (p.clone(), p * a)
    }

    /// γ / √N
    fn readout(&self) -> Tensor<2> {
        self.gamma.val() / (self.config.states as f64).sqrt()
    }

    /// The convolution's kernel `[D or 2 D, length]`, from lag 0 on.
    pub fn kernel(&self, length: usize) -> Tensor<2> {
        let (p, damping) = self.rates();
        let coefficients = p * self.beta.val().squeeze_dim::<2>(2) * self.readout();
        // Where p σ(α) rounds to 1, the logarithm and its gradient must stay finite.
        let rates = damping.clamp_max(1.0 - f64::from(f32::EPSILON) / 2.0).neg().log1p(); // ln q
        if runs_natively(&coefficients) {
            let inputs = [coefficients.into_dispatch(), rates.into_dispatch()];
            return Tensor::from_dispatch(apply(&PowerKernel { length }, inputs));
        }
        let lags = Tensor::<1, burn::tensor::Int>::arange(0..length as i64, &rates.device()).float();
        let powers = (rates.unsqueeze_dim::<3>(2) * lags.unsqueeze::<3>()).exp(); // [rows, N, length]
        (coefficients.unsqueeze_dim::<3>(2) * powers).sum_dim(1).squeeze_dim::<2>(1)
    }

    /// Mixes whole sequences. `kept [batch, time, 1]` is 1 for steps and 0 for padding.
    ///
    /// # Shapes
    /// - x, output: `[batch, time, channels]`
    pub fn forward(&self, x: Tensor<3>, kept: Option<&Tensor<3>>) -> Tensor<3> {
        let x = match kept {
            Some(kept) => x * kept.clone(),
            None => x,
        };
        let [_, time, channels] = x.dims();
        let length = self.config.truncation.map_or(time, |most| most.min(time));
        let kernel = self.kernel(length);
        let (kernel, after) = match self.config.bidirectional {
            true => (kernel.clone().narrow(0, 0, channels), Some(kernel.narrow(0, channels, channels))),
            false => (kernel, None),
        };
        if !runs_natively(&x) {
            return convolve_composed(x, kernel, after, self.omega.val());
        }
        let after = after
            .map_or_else(|| Tensor::<2>::empty([0, 0], &x.device()).into_dispatch(), Tensor::into_dispatch);
        let inputs = [x.into_dispatch(), kernel.into_dispatch(), after, self.omega.val().into_dispatch()];
        Tensor::from_dispatch(apply(&LongConv, inputs))
    }

    /// The state before a sequence: zeros.
    pub fn initial_state(&self, batch: usize, device: &Device) -> EmaState {
        let MultiHeadEmaConfig { channels, states, truncation, .. } = self.config;
        let past = truncation.map(|steps| Tensor::zeros([batch, steps, channels], device));
        EmaState { h: Tensor::zeros([batch, channels, states], device), past }
    }

    /// The recurrence, continuing from `state`, whose size does not depend on how much was read; only a causal EMA can.
    ///
    /// # Shapes
    /// - x, output: `[batch, time, channels]`
    pub fn forward_with_state(&self, x: Tensor<3>, state: EmaState) -> (Tensor<3>, EmaState) {
        let (p, damping) = self.rates();
        let (q, input) = (damping.neg() + 1.0, p * self.beta.val().squeeze_dim::<2>(2));
        let skip = x.clone() * self.omega.val().unsqueeze::<3>();
        let native = runs_natively(&x) && !x.device().is_autodiff();
        let run = |x, input, h| match native {
            true => scan(x, [q.clone(), input, self.readout()], h),
            false => recurrence(x, [q.clone(), input, self.readout()], h),
        };
        let (mut o, mut h) = run(x.clone(), input.clone(), state.h);
        let past = state.past.map(|past| {
            // A step is forgotten when it is `reach` steps old: all is linear, so what is left of it is taken away.
            let (reach, time) = (past.dims()[1], x.dims()[1]);
            let seen = Tensor::cat(vec![past, x], 1);
            let left = input * q.clone().powi_scalar(reach as i64);
            let (o_old, h_old) = run(seen.clone().slice_dim(1, ..time), left, h.zeros_like());
            o = o.clone() - o_old;
            h = h.clone() - h_old;
            seen.slice_dim(1, time..)
        });
        (activate(o + skip, Activation::Silu), EmaState { h, past })
    }

    /// One step of the recurrence.
    ///
    /// # Shapes
    /// - x, output: `[batch, channels]`
    pub fn step(&self, x: Tensor<2>, state: EmaState) -> (Tensor<2>, EmaState) {
        let (y, state) = self.forward_with_state(x.unsqueeze_dim(1), state);
        (y.squeeze_dim(1), state)
    }
}

/// `silu(k * x + ω ⊙ x)` out of transforms, for devices without a kernel and for capture.
fn convolve_composed(
    x: Tensor<3>,
    kernel: Tensor<2>,
    after: Option<Tensor<2>>,
    omega: Tensor<1>,
) -> Tensor<3> {
    let [batch, time, channels] = x.dims();
    let length = kernel.dims()[1];
    let n = fft_length(time + length);
    let padded = |rows: Tensor<2>, n: usize| {
        let [rows_count, length] = rows.dims();
        Tensor::cat(vec![rows.clone(), Tensor::zeros([rows_count, n - length], &rows.device())], 1)
    };
    let rows = padded(x.clone().swap_dims(1, 2).reshape([batch * channels, time]), n);
    let (x_re, x_im) = rfft(rows, 1);
    let [x_re, x_im] = [x_re, x_im].map(|part| part.reshape([batch as isize, channels as isize, -1]));
    let (mut k_re, mut k_im) = rfft(padded(kernel, n), 1);
    if let Some(after) = after {
        // The spectrum of reversed real numbers is the conjugate.
        let (re, im) = rfft(padded(after, n), 1);
        (k_re, k_im) = (k_re + re, k_im - im);
    }
    let (k_re, k_im) = (k_re.unsqueeze::<3>(), k_im.unsqueeze::<3>());
    let re = x_re.clone() * k_re.clone() - x_im.clone() * k_im.clone();
    let im = x_re * k_im + x_im * k_re;
    let o = irfft(re, im, n, 2).narrow(2, 0, time).swap_dims(1, 2);
    activate(o + x * omega.unsqueeze::<3>(), Activation::Silu)
}

/// The recurrence `h_t = q h_{t-1} + i x_t`, `o_t = Σ_n r_n h_{t,n}` step by step, differentiable on every device.
fn recurrence(x: Tensor<3>, [q, input, readout]: [Tensor<2>; 3], state: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
    let [q, input, readout] = [q, input, readout].map(|x| x.unsqueeze::<3>());
    let mut state = state;
    let outputs = (0..x.dims()[1]).map(|t| {
        let x = x.clone().narrow(1, t, 1).swap_dims(1, 2); // [batch, D, 1]
        state = state.clone() * q.clone() + x * input.clone();
        (state.clone() * readout.clone()).sum_dim(2).swap_dims(1, 2)
    });
    let o = Tensor::cat(outputs.collect(), 1);
    (o, state)
}

/// The same on the CPU, without gradients.
fn scan(x: Tensor<3>, coefficients: [Tensor<2>; 3], state: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
    let ([batch, time, channels], [_, _, states], device) = (x.dims(), state.dims(), x.device());
    // Channels side by side: `[N, D]` coefficients, `[batch, N, D]` states.
    let values = |x: Tensor<3>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
    let [q, input, readout] = coefficients.map(|x| values(x.transpose().unsqueeze::<3>()));
    let (x, mut state) = (values(x), values(state.swap_dims(1, 2)));
    let mut o = vec![0.0; x.len()];
    for b in 0..batch {
        let state = &mut state[b * states * channels..][..states * channels];
        let sequence = b * time * channels..(b + 1) * time * channels;
        let steps = o[sequence.clone()].chunks_exact_mut(channels).zip(x[sequence].chunks_exact(channels));
        simd(
            #[inline(always)]
            || {
                for (o, x) in steps {
                    for n in 0..states {
                        let at = n * channels..(n + 1) * channels;
                        let (q, input, readout) = (&q[at.clone()], &input[at.clone()], &readout[at.clone()]);
                        let h = &mut state[at];
                        for c in 0..channels {
                            h[c] = fma(q[c], h[c], input[c] * x[c]);
                            o[c] = fma(readout[c], h[c], o[c]);
                        }
                    }
                }
            },
        );
    }
    let state =
        Tensor::<3>::from_data(TensorData::new(state, [batch, states, channels]), &device).swap_dims(1, 2);
    (Tensor::from_data(TensorData::new(o, [batch, time, channels]), &device), state)
}
