//! The TCN mixer: residual blocks of dilated convolutions, whose reach grows exponentially with their number.
//!
//! ```text
//! x_0 = y        x_{b+1} = x_b + PW_b(silu(DW_b(x_b)))        DW_b(x)[t] = bias + Σ_j w_j ⊙ x[t - (K-1-j) f^b]
//! ```
//!
//! DW is a depthwise convolution with K taps and dilation f^b, PW a linear map of the channels.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Tensor};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_nn::Linear;
use kiln_ops::dilated_conv::Taps;
use kiln_ops::{Activation, DilatedConvOptions, activate, apply, conv1d, dilated_conv, runs_natively};
use serde::{Deserialize, Serialize};

use crate::tcn_kernel::FusedBlock;

/// A reach beyond this is a slip of the pen.
const MAX_RECEPTIVE_FIELD: usize = 1 << 32;

/// Which channels a filter sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TcnConv {
    /// Its own channel
    #[default]
    Depthwise,
    /// All channels
    Full,
}

/// Configuration of a [`Tcn`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcnConfig {
    /// Width of input and output, D.
    pub channels: usize,
    /// Taps of a filter, K.
    pub kernel: usize,
    /// Factor f by which the dilation grows from block to block.
    pub dilation: usize,
    /// Number of blocks.
    pub blocks: usize,
    /// Which channels a filter sees.
    pub conv: TcnConv,
    /// Whether an output sees as much after it as before it, instead of nothing after it.
    pub bidirectional: bool,
}

impl TcnConfig {
    /// Causal blocks with K = 17 and f = 4, three of them: 337 steps in view.
    pub fn new(channels: usize) -> Self {
        Self { channels, kernel: 17, dilation: 4, blocks: 3, conv: TcnConv::Depthwise, bidirectional: false }
    }

    /// Other filters: K taps, dilation factor f, and so many blocks.
    pub fn with_filters(mut self, kernel: usize, dilation: usize, blocks: usize) -> Self {
        (self.kernel, self.dilation, self.blocks) = (kernel, dilation, blocks);
        self
    }

    /// As many blocks as it takes to have at least `steps` in view.
    ///
    /// # Errors
    /// When no number of blocks does.
    pub fn with_receptive_field(mut self, steps: usize) -> Result<Self> {
        for blocks in 1..=64 {
            self.blocks = blocks;
            if self.receptive_field()? >= steps {
                return Ok(self);
            }
            if self.kernel < 2 {
                break;
            }
        }
        let message =
            format!("kernel {} with dilation {} never sees {steps} steps", self.kernel, self.dilation);
        Err(Error::usage(message).hint("a larger kernel or dilation sees further"))
    }

    /// R, the number of steps that an output sees: `1 + (K-1) (f^blocks - 1) / (f - 1)`, or `1 + (K-1) blocks` for f = 1.
    ///
    /// # Errors
    /// When a number makes no sense or the reach fits no machine.
    pub fn receptive_field(&self) -> Result<usize> {
        let Self { kernel, dilation, blocks, .. } = *self;
        for (name, value) in [("kernel", kernel), ("dilation", dilation), ("number of blocks", blocks)] {
            if value == 0 {
                return Err(Error::usage(format!("the {name} is 0, must be at least 1")));
            }
        }
        let mut reach = 1usize;
        for block in 0..blocks {
            let span = dilation.checked_pow(block as u32).and_then(|d| d.checked_mul(kernel - 1));
            let next = span.and_then(|span| reach.checked_add(span)).filter(|r| *r <= MAX_RECEPTIVE_FIELD);
            reach = next.ok_or_else(|| {
                Error::usage(format!(
                    "kernel {kernel}, dilation {dilation} and {blocks} blocks reach too far"
                ))
                .hint(format!("at most {MAX_RECEPTIVE_FIELD} steps make sense; use fewer blocks"))
            })?;
        }
        Ok(reach)
    }

    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        self.receptive_field()?;
        if self.bidirectional && self.kernel.is_multiple_of(2) {
            return Err(Error::usage(format!("the kernel {} is even, so it has no middle", self.kernel))
                .hint("networks that look both ways need an odd kernel; --causal looks back only"));
        }
        Ok(())
    }

    /// Draws the parameters.
    pub fn init(&self, device: &Device) -> Tcn {
        let normal = |std| Initializer::Normal { mean: 0.0, std };
        let Self { channels, kernel, .. } = *self;
        let seen = if self.conv == TcnConv::Full { channels } else { 1 };
        let block = |_| TcnBlock {
            dw: Filters {
                weight: normal(1.0 / ((kernel * seen) as f64).sqrt()).init([channels, seen, kernel], device),
                bias: Initializer::Zeros.init([channels], device),
            },
            pw: linear(channels, channels, device),
        };
        Tcn { blocks: (0..self.blocks).map(block).collect(), config: *self }
    }
}

/// A linear layer that keeps the variance, without bias yet, as all of this network's are. With MEGA's deviation of 0.02, which
/// suits widths of hundreds, narrow networks hardly begin to learn.
pub(crate) fn linear(d_input: usize, d_output: usize, device: &Device) -> Linear {
    let std = (d_input as f64).sqrt().recip();
    Linear {
        weight: Initializer::Normal { mean: 0.0, std }.init([d_input, d_output], device),
        bias: Some(Initializer::Zeros.init([d_output], device)),
    }
}

/// Blocks of dilated convolutions.
#[derive(Module, Debug)]
pub struct Tcn {
    /// The blocks, nearest steps first.
    pub blocks: Vec<TcnBlock>,
    #[module(skip)]
    config: TcnConfig,
}

/// `x + PW(silu(DW(x)))`
#[derive(Module, Debug)]
pub struct TcnBlock {
    /// The convolution.
    pub dw: Filters,
    /// The map of the channels.
    pub pw: Linear,
}

/// The filters of a convolution.
#[derive(Module, Debug)]
pub struct Filters {
    /// `[channels, 1, kernel]`, or `[channels, channels, kernel]` where a filter sees all channels; the last tap is the
    /// latest step
    pub weight: Param<Tensor<3>>,
    /// `[channels]`
    pub bias: Param<Tensor<1>>,
}

/// What a causal [`Tcn`] remembers: for every block its last `(K-1) f^b` inputs, `[batch, steps, channels]`.
pub type TcnState = Vec<Tensor<3>>;

impl Tcn {
    /// The configuration it was made with.
    pub fn config(&self) -> &TcnConfig {
        &self.config
    }

    /// Mixes whole sequences. `kept [batch, time, 1]` is 1 for steps and 0 for padding, which counts as the end of a
    /// sequence: every block sees zeros there.
    ///
    /// # Shapes
    /// - x, output: `[batch, time, channels]`
    pub fn forward(&self, x: Tensor<3>, kept: Option<&Tensor<3>>) -> Tensor<3> {
        self.blocks.iter().enumerate().fold(x, |x, (b, block)| {
            let x = match kept {
                Some(kept) => x * kept.clone(),
                None => x,
            };
            block.forward(x, self.options(b))
        })
    }

    /// As [`forward`](Self::forward), continuing from `state`; only causal mixers can.
    pub fn forward_with_state(&self, x: Tensor<3>, state: TcnState) -> (Tensor<3>, TcnState) {
        let mut next = Vec::with_capacity(state.len());
        let mut x = x;
        for (b, (block, before)) in self.blocks.iter().zip(state).enumerate() {
            let seen = Tensor::cat(vec![before, x.clone()], 1);
            let options = DilatedConvOptions { padding: [0, 0], ..self.options(b) };
            let steps = x.dims()[1];
            x = x + block.hidden(seen.clone(), options);
            next.push(seen.slice_dim(1, steps..));
        }
        (x, next)
    }

    /// The state before a sequence.
    pub fn initial_state(&self, batch: usize, device: &Device) -> TcnState {
        let span = |b| (self.config.kernel - 1) * self.config.dilation.pow(b as u32);
        (0..self.blocks.len())
            .map(|b| Tensor::zeros([batch, span(b), self.config.channels], device))
            .collect()
    }

    fn options(&self, block: usize) -> DilatedConvOptions {
        let TcnConfig { kernel, dilation, bidirectional, .. } = self.config;
        let dilation = dilation.pow(block as u32);
        match bidirectional {
            true => DilatedConvOptions::centred(kernel, dilation),
            false => DilatedConvOptions::causal(kernel, dilation),
        }
    }
}

impl TcnBlock {
    fn forward(&self, x: Tensor<3>, options: DilatedConvOptions) -> Tensor<3> {
        let [channels, seen, kernel] = self.dw.weight.lazy_shape().dims();
        if seen != 1 || !runs_natively(&x) {
            return x.clone() + self.hidden(x, options);
        }
        let taps = Taps { first: -(options.padding[0] as isize), step: options.dilation as isize };
        let filters = self.dw.weight.val().reshape([channels, kernel]);
        let pw_bias = self.pw.bias.as_ref().expect("the map of the channels has a bias").val();
        let inputs = [
            x.into_dispatch(),
            filters.into_dispatch(),
            self.dw.bias.val().into_dispatch(),
            self.pw.weight.val().into_dispatch(),
            pw_bias.into_dispatch(),
        ];
        Tensor::from_dispatch(apply(&FusedBlock { taps }, inputs))
    }

    /// `PW(silu(DW(x)))`
    fn hidden(&self, x: Tensor<3>, options: DilatedConvOptions) -> Tensor<3> {
        let weight = self.dw.weight.val();
        let bias = Some(self.dw.bias.val());
        let [channels, seen, kernel] = weight.dims();
        let u = if seen == 1 {
            dilated_conv(x, weight.reshape([channels, kernel]), bias, options)
        } else {
            let [before, after] = options.padding;
            let options = ConvOptions::new_with_padding([1], [(before, after)], [options.dilation], 1);
            conv1d(x.swap_dims(1, 2), weight, bias, options).swap_dims(1, 2)
        };
        self.pw.forward(activate(u, Activation::Silu))
    }
}
