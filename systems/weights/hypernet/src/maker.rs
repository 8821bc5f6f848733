//! A generator with its output layers: from codes to some tensors of the target, or to all of them.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use kiln_core::{Error, Result};
use kiln_nn::{Linear, LinearConfig, ParamSpec};

use crate::conditioning::Code;
use crate::generator::{Arch, Embeddings, Generator, Pieces};
use crate::hypernet::{HyperNetConfig, Init, OutputScheme, layer_of};

/// Standard deviation of biases that share an output layer with weights, as a part of the least of those; at exactly 0
/// they could not be learned.
const SHARED_BIAS: f64 = 0.01;

/// Makes tensors of the target.
#[derive(Module, Debug)]
pub struct Maker {
    /// Of the pieces, `[pieces, emb_dim]`
    pub embeddings: Option<Param<Tensor<2>>>,
    /// From codes to features of every piece.
    pub generator: Generator,
    /// From features to weights.
    pub heads: Vec<Linear>,
    /// Fixed factors of what is made, `[1, made]`, where the output layer is shared between tensors.
    #[module(skip)]
    scale: Option<Tensor<2>>,
    /// What is made for each tensor.
    #[module(skip)]
    pieces: Vec<Piece>,
    #[module(skip)]
    scheme: OutputScheme,
}

impl Maker {
    /// A maker of the tensors `made`, whose output layers are still to be drawn.
    ///
    /// # Errors
    /// When the scheme or the architecture makes no sense.
    pub(crate) fn new(config: &HyperNetConfig, made: &[ParamSpec], device: &Device) -> Result<Self> {
        if config.arch.width() == 0 || matches!(&config.arch, Arch::Mlp(widths) if widths.contains(&0)) {
            return Err(
                Error::usage("the generator has a layer of width 0").hint("--hidden must be at least 1")
            );
        }
        let pieces: Vec<Piece> = made.iter().map(|param| Piece::of(param, config.lora)).collect();
        let count: usize = pieces.iter().map(Piece::len).sum();
        let (asked, sizes) = match config.scheme {
            OutputScheme::Once => (Pieces { count: 1, embedding: 0 }, vec![count]),
            OutputScheme::Heads { by_layer } => {
                (Pieces { count: 1, embedding: 0 }, head_sizes(made, &pieces, by_layer))
            }
            OutputScheme::Component { emb_dim } => {
                let largest = pieces.iter().map(Piece::len).max().unwrap_or(0);
                (Pieces { count: made.len(), embedding: emb_dim }, vec![largest])
            }
            OutputScheme::Chunk { chunk: 0, .. } => {
                return Err(Error::usage("a chunk must hold at least one number").hint("raise --chunk"));
            }
            OutputScheme::Chunk { chunk, emb_dim } => {
                (Pieces { count: count.div_ceil(chunk), embedding: emb_dim }, vec![chunk])
            }
        };
        let embedded = matches!(config.scheme, OutputScheme::Component { .. } | OutputScheme::Chunk { .. });
        if embedded && asked.embedding == 0 {
            return Err(Error::usage("pieces need embeddings of at least one number").hint("raise --emb-dim"));
        }
        let is_constant = config.init == Init::Mip;
        let dims: Vec<usize> = config.conditioning.iter().map(|part| part.code_width(is_constant)).collect();
        let normal = Initializer::Normal { mean: 0.0, std: 1.0 };
        Ok(Self {
            embeddings: embedded.then(|| normal.init([asked.count, asked.embedding], device)),
            generator: Generator::new(&config.arch, &dims, &asked, config.spectral, device),
            heads: sizes
                .iter()
                .map(|&size| LinearConfig::new(config.arch.width(), size).init(device))
                .collect(),
            scale: None,
            pieces,
            scheme: config.scheme,
        })
    }

    /// The elements of the tensors one after another, `[batch, elements]`.
    pub fn forward(&self, code: &Code) -> Tensor<2> {
        let made = self.outputs(self.features(code));
        let made = match &self.scale {
            None => made,
            Some(scale) => made * scale.clone(),
        };
        if self.pieces.iter().any(|piece| matches!(piece, Piece::Factors { .. })) {
            self.multiplied(made)
        } else {
            made
        }
    }

    /// Features of every piece, `[batch, pieces, width]`.
    fn features(&self, code: &Code) -> Tensor<3> {
        // Before C for chunks, after it for tensors.
        let embeddings = self.embeddings.as_ref().map(|embeddings| match self.scheme {
            OutputScheme::Component { .. } => Embeddings::After(embeddings.val()),
            _ => Embeddings::Before(embeddings.val()),
        });
        self.generator.forward(code, embeddings)
    }

    /// Features `[batch, pieces, width]` to the numbers that are made, `[batch, made]`.
    fn outputs(&self, features: Tensor<3>) -> Tensor<2> {
        let batch = features.dims()[0];
        match self.scheme {
            OutputScheme::Once | OutputScheme::Heads { .. } => {
                let features = features.squeeze_dim::<2>(1);
                Tensor::cat(self.heads.iter().map(|head| head.forward(features.clone())).collect(), 1)
            }
            OutputScheme::Component { .. } => {
                let x = self.heads[0].forward(features); // [batch, tensors, largest]
                let crop = |(number, piece): (usize, &Piece)| {
                    x.clone().narrow(1, number, 1).narrow(2, 0, piece.len()).squeeze_dim::<2>(1)
                };
                Tensor::cat(self.pieces.iter().enumerate().map(crop).collect(), 1)
            }
            OutputScheme::Chunk { .. } => {
                let count: usize = self.pieces.iter().map(Piece::len).sum();
                let x = self.heads[0].forward(features); // [batch, chunks, chunk]
                x.reshape([batch as isize, -1]).narrow(1, 0, count)
            }
        }
    }

    /// Factors to the changes that they stand for.
    fn multiplied(&self, made: Tensor<2>) -> Tensor<2> {
        let mut at = 0;
        let parts = self.pieces.iter().map(|piece| {
            let part = made.clone().narrow(1, at, piece.len());
            at += piece.len();
            piece.multiplied(part)
        });
        Tensor::cat(parts.collect(), 1)
    }

    /// Draws the output layers with a standard deviation of `factor` √(2 / width).
    pub(crate) fn draw(&mut self, factor: f64, device: &Device) {
        self.draw_heads(factor * (2.0 / self.width()).sqrt(), device);
    }

    /// Draws the output layers by hyperfan-in (Chang et al. 2020). How large the features are is measured on codes drawn
    /// at random, `probes`, where the paper assumes it; `largest_fan_in` is that of all tensors that the network makes.
    pub(crate) fn draw_hyperfan(
        &mut self,
        made: &[ParamSpec],
        probes: &Code,
        largest_fan_in: usize,
        device: &Device,
    ) {
        let std = (self.width() * self.mean_square_feature(probes)).sqrt().recip();
        self.draw_heads(std, device);
        self.scale_by_fan_in(made, largest_fan_in, device);
    }

    /// Width of the features.
    fn width(&self) -> f64 {
        self.heads[0].weight.val().dims()[0] as f64
    }

    fn draw_heads(&mut self, std: f64, device: &Device) {
        for head in &mut self.heads {
            let [inputs, outputs] = head.weight.val().dims();
            let weight = Tensor::random([inputs, outputs], Distribution::Normal(0.0, std), device);
            head.weight = Param::from_tensor(weight);
            head.bias = Some(Param::from_tensor(Tensor::zeros([outputs], device)));
        }
    }

    /// Scales the output layers, or where tensors share one what comes out, to a variance of 2 / fan-in.
    fn scale_by_fan_in(&mut self, made: &[ParamSpec], largest_fan_in: usize, device: &Device) {
        let shared = self.embeddings.is_some();
        let factor = |param: &ParamSpec| match param.fan_in() {
            Some(fan_in) => (2.0 / fan_in as f64).sqrt(),
            None if shared => SHARED_BIAS * (2.0 / largest_fan_in as f64).sqrt(),
            None => 0.0,
        };
        let scale: Vec<f32> =
            made.iter().flat_map(|param| std::iter::repeat_n(factor(param) as f32, param.len())).collect();
        if shared {
            let count = scale.len();
            self.scale = Some(Tensor::from_data(TensorData::new(scale, [1, count]), device));
            return;
        }
        let mut start = 0;
        for head in &mut self.heads {
            let [inputs, outputs] = head.weight.val().dims();
            let scale = TensorData::new(scale[start..start + outputs].to_vec(), [1, outputs]);
            let weight = head.weight.val() * Tensor::<2>::from_data(scale, device).expand([inputs, outputs]);
            head.weight = Param::from_tensor(weight);
            start += outputs;
        }
    }

    /// The mean square of a feature over codes.
    fn mean_square_feature(&self, codes: &Code) -> f64 {
        let square: f32 = self.features(codes).square().mean().into_scalar();
        f64::from(square).max(1e-6)
    }
}

/// What the generator makes for one tensor.
#[derive(Debug, Clone)]
enum Piece {
    /// All its elements.
    Whole(usize),
    /// Two factors of a matrix.
    Factors { rows: usize, columns: usize, rank: usize },
}

impl Piece {
    fn of(param: &ParamSpec, rank: Option<usize>) -> Self {
        let whole = Self::Whole(param.len());
        let ([rows, rest @ ..], Some(rank)) = (&param.shape[..], rank) else { return whole };
        let factors = Self::Factors { rows: *rows, columns: rest.iter().product(), rank };
        if factors.len() < param.len() { factors } else { whole }
    }

    /// Numbers that are made.
    fn len(&self) -> usize {
        match *self {
            Self::Whole(count) => count,
            Self::Factors { rows, columns, rank } => rank * (rows + columns),
        }
    }

    /// What they come to, `[batch, elements of the tensor]`.
    fn multiplied(&self, made: Tensor<2>) -> Tensor<2> {
        let Self::Factors { rows, columns, rank } = *self else { return made };
        let batch = made.dims()[0];
        let left = made.clone().narrow(1, 0, rows * rank).reshape([batch, rows, rank]);
        let right = made.narrow(1, rows * rank, rank * columns).reshape([batch, rank, columns]);
        (kiln_ops::matmul(left, right) / rank as f64).reshape([batch, rows * columns])
    }
}

/// Lengths of the output layers: of every tensor, or of all tensors of a layer (`fc1.weight` and `fc1.bias`).
fn head_sizes(params: &[ParamSpec], pieces: &[Piece], by_layer: bool) -> Vec<usize> {
    let mut pieces = pieces.iter().map(Piece::len);
    let groups = params.chunk_by(|a, b| by_layer && layer_of(a) == layer_of(b));
    groups.map(|group| pieces.by_ref().take(group.len()).sum()).collect()
}
