//! The part of the network that one rank has of one pipeline stage: forward and backward passes of micro-batches.

use burn::tensor::{Device, Tensor};
use clap::ValueEnum;
use kiln_core::Result;
use kiln_ops::Activation;
use serde::{Deserialize, Serialize};

use crate::attention::{CoreSaved, Heads};
use crate::dropout::{DropoutKey, Site};
use crate::embedding::{VocabParallelEmbedding, vocab_parallel_cross_entropy};
use crate::layers::{
    ColumnParallelLinear, ColumnSaved, Norm, NormSaved, RowParallelLinear, RowSaved, add, add_residual,
    residual_gradient,
};
use crate::model::GptConfig;
use crate::parameters::Parameters;
use crate::ranks::Ranks;
use crate::real::{self, Real};

/// What is computed a second time in the backward pass instead of being kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing
    #[default]
    None,
    /// All of a layer: only its input is kept
    Full,
    /// The attention core, which grows with the square of the length
    Selective,
}

/// Some samples of a batch that go through the pipeline together.
#[derive(Debug, Clone)]
pub struct MicroBatch {
    /// `[samples, time]`
    pub inputs: Vec<u32>,
    /// `[samples, time]`, the tokens that follow
    pub targets: Vec<u32>,
    /// How many there are.
    pub samples: usize,
    /// What decides their dropout.
    pub dropout: DropoutKey,
}

/// What all stages must know of the training.
#[derive(Debug, Clone, Copy)]
pub struct StageOptions {
    /// What is not kept.
    pub recompute: Recompute,
    /// Share of a target's probability that is spread over all tokens.
    pub label_smoothing: f64,
    /// Tokens of the whole batch, over which the loss is a mean.
    pub count: f64,
    /// Whether a backward pass is the last that adds to the gradients of its stage.
    pub is_last: bool,
}

/// What a stage is given and passes on.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a tensor's handle is moved once a layer")]
pub enum Flow {
    /// The tokens themselves, before the first stage.
    Tokens,
    /// Activations `[tokens, hidden]`.
    Activations(Tensor<2>),
}

/// One layer's parts.
#[derive(Debug, Clone, Copy)]
struct Layer {
    number: usize,
    /// Its first parameter.
    first: usize,
    ln1: Norm,
    qkv: ColumnParallelLinear,
    dense: RowParallelLinear,
    ln2: Norm,
    fc1: ColumnParallelLinear,
    fc2: RowParallelLinear,
}

/// What the backward pass of a layer needs.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a tensor's handle is moved once a layer")]
enum LayerSaved {
    /// All of it.
    Whole(Box<Activations>),
    /// The input alone, from which the rest is computed again.
    Input(Tensor<2>),
}

#[derive(Debug)]
struct Activations {
    ln1: NormSaved,
    qkv: ColumnSaved,
    core: Core,
    dense: RowSaved,
    ln2: NormSaved,
    fc1: ColumnSaved,
    fc2: RowSaved,
}

/// The attention core's state, or what it is computed from.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a tensor's handle is moved once a layer")]
enum Core {
    Kept(CoreSaved),
    Input(Tensor<2>),
}

impl Layer {
    fn new<T: Real>(number: usize, parameters: &Parameters<T>) -> Self {
        let name = |part: &str| format!("layers.{number}.{part}");
        Self {
            number,
            first: parameters.id(&name("ln1.weight")),
            ln1: Norm::new(&name("ln1"), parameters),
            qkv: ColumnParallelLinear::new(&name("attention.qkv"), Activation::Identity, parameters),
            dense: RowParallelLinear::new(&name("attention.dense"), parameters),
            ln2: Norm::new(&name("ln2"), parameters),
            fc1: ColumnParallelLinear::new(&name("mlp.fc1"), Activation::GeluTanh, parameters),
            fc2: RowParallelLinear::new(&name("mlp.fc2"), parameters),
        }
    }

    /// `x += dense(attention(ln1(x)))`, then `x += fc2(gelu(fc1(ln2(x))))`.
    fn forward<T: Real>(
        &self,
        x: Tensor<2>,
        micro: &MicroBatch,
        context: &Context<'_>,
        parameters: &Parameters<T>,
    ) -> Result<(Tensor<2>, Activations)> {
        let heads = context.heads(self.number, micro);
        let (u, ln1) = self.ln1.forward(x.clone(), parameters);
        let (attended, qkv) = self.qkv.forward(u, parameters);
        let (attention, core) = heads.forward::<T>(&attended, &micro.dropout);
        let core = match context.options.recompute {
            Recompute::Selective => Core::Input(attended),
            Recompute::None | Recompute::Full => Core::Kept(core),
        };
        let (y, dense) = self.dense.forward(attention, parameters, context.ranks)?;
        let factors = context.factors::<T>(Site::Attention, self.number, micro);
        let x = add_residual(&x, y, parameters.values_of(self.dense.bias), factors.as_deref());

        let (u, ln2) = self.ln2.forward(x.clone(), parameters);
        let (inner, fc1) = self.fc1.forward(u, parameters);
        let (y, fc2) = self.fc2.forward(inner, parameters, context.ranks)?;
        let factors = context.factors::<T>(Site::Mlp, self.number, micro);
        let x = add_residual(&x, y, parameters.values_of(self.fc2.bias), factors.as_deref());
        Ok((x, Activations { ln1, qkv, core, dense, ln2, fc1, fc2 }))
    }

    fn backward<T: Real>(
        &self,
        saved: Activations,
        upstream: Tensor<2>,
        micro: &MicroBatch,
        context: &Context<'_>,
        parameters: &mut Parameters<T>,
    ) -> Result<Tensor<2>> {
        let factors = context.factors::<T>(Site::Mlp, self.number, micro);
        let y = residual_gradient(&upstream, self.fc2.bias, factors.as_deref(), parameters);
        let inner = self.fc2.backward(saved.fc2, y, parameters);
        let u = self.fc1.backward(saved.fc1, inner, parameters, context.ranks)?;
        let upstream = add::<T>(&upstream, self.ln2.backward(saved.ln2, u, parameters));

        let factors = context.factors::<T>(Site::Attention, self.number, micro);
        let y = residual_gradient(&upstream, self.dense.bias, factors.as_deref(), parameters);
        let attention = self.dense.backward(saved.dense, y, parameters);
        let heads = context.heads(self.number, micro);
        let core = match saved.core {
            Core::Kept(core) => core,
            Core::Input(qkv) => heads.forward::<T>(&qkv, &micro.dropout).1,
        };
        let u = self.qkv.backward(saved.qkv, heads.backward(core, attention), parameters, context.ranks)?;
        Ok(add::<T>(&upstream, self.ln1.backward(saved.ln1, u, parameters)))
    }
}

/// What layers need besides their parameters.
struct Context<'a> {
    config: &'a GptConfig,
    options: StageOptions,
    ranks: &'a Ranks,
    device: Device,
}

impl Context<'_> {
    fn heads(&self, layer: usize, micro: &MicroBatch) -> Heads {
        let each = self.config.heads / self.ranks.layout.tensor;
        let first = self.ranks.at.tensor * each;
        Heads {
            batch: micro.samples,
            time: micro.inputs.len() / micro.samples,
            heads: first..first + each,
            dim: self.config.hidden / self.config.heads,
            layer,
        }
    }

    /// Dropout of an activation that all tensor ranks have.
    fn factors<T: Real>(&self, site: Site, layer: usize, micro: &MicroBatch) -> Option<Vec<T>> {
        let elements = micro.inputs.len() / micro.samples * self.config.hidden;
        (micro.dropout.probability > 0.0)
            .then(|| micro.dropout.factors(site, layer, micro.samples, 0..1, elements, &self.device))
    }
}

/// One chunk of a rank.
#[derive(Debug)]
pub struct Stage {
    config: GptConfig,
    first: Option<(VocabParallelEmbedding, usize)>,
    layers: Vec<Layer>,
    last: Option<(Norm, VocabParallelEmbedding)>,
}

/// What the backward pass of a stage needs.
#[derive(Debug)]
pub struct StageSaved {
    layers: Vec<LayerSaved>,
    head: Option<HeadSaved>,
}

#[derive(Debug)]
struct HeadSaved {
    norm: NormSaved,
    x: Tensor<2>,
    /// The gradient of the logits.
    logits: Tensor<2>,
}

/// What a forward pass gives.
#[derive(Debug)]
pub struct Forward {
    /// For the next stage; none after the last.
    pub output: Option<Tensor<2>>,
    /// This micro-batch's share of the batch's mean loss, on the last stage.
    pub loss: Option<f64>,
    /// For the backward pass.
    pub saved: StageSaved,
    /// The first layer whose output is not all numbers; the number of layers stands for the output layer.
    pub broken_layer: Option<usize>,
}

impl Stage {
    /// Chunk `chunk` of a rank.
    pub fn new<T: Real>(config: &GptConfig, ranks: &Ranks, chunk: usize, parameters: &Parameters<T>) -> Self {
        let stage = ranks.stage(chunk);
        let embedding = || VocabParallelEmbedding::new(parameters, ranks.at.tensor);
        Self {
            config: config.clone(),
            first: (stage == 0).then(|| (embedding(), parameters.id("embedding.position"))),
            layers: ranks.layout.layers_of(stage, config.layers).map(|n| Layer::new(n, parameters)).collect(),
            last: (stage + 1 == ranks.layout.stages())
                .then(|| (Norm::new("final_ln", parameters), embedding())),
        }
    }

    fn context<'a, T: Real>(
        &'a self,
        options: StageOptions,
        ranks: &'a Ranks,
        parameters: &Parameters<T>,
    ) -> Context<'a> {
        Context { config: &self.config, options, ranks, device: parameters.device().clone() }
    }

    /// Takes a micro-batch through the stage.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn forward<T: Real>(
        &self,
        input: Flow,
        micro: &MicroBatch,
        options: StageOptions,
        ranks: &Ranks,
        parameters: &Parameters<T>,
    ) -> Result<Forward> {
        let context = self.context(options, ranks, parameters);
        let mut x = match (input, &self.first) {
            (Flow::Activations(x), _) => x,
            (Flow::Tokens, Some((embedding, position))) => {
                self.embed(embedding, *position, micro, &context, parameters)?
            }
            (Flow::Tokens, None) => unreachable!("only the first stage is given tokens"),
        };
        let mut broken_layer = None;
        let mut layers = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let input = (options.recompute == Recompute::Full).then(|| x.clone());
            let (output, saved) = layer.forward(x, micro, &context, parameters)?;
            layers.push(match input {
                Some(input) => LayerSaved::Input(input),
                None => LayerSaved::Whole(Box::new(saved)),
            });
            x = output;
            if broken_layer.is_none() && !all_numbers::<T>(&x) {
                broken_layer = Some(layer.number);
            }
        }
        let Some((norm, embedding)) = &self.last else {
            let saved = StageSaved { layers, head: None };
            return Ok(Forward { output: Some(x), loss: None, saved, broken_layer });
        };
        let (x, norm) = norm.forward(x, parameters);
        let mut logits = embedding.logits(x.clone(), parameters);
        let loss_options = embedding.loss_options(parameters, options.label_smoothing, options.count);
        let loss = vocab_parallel_cross_entropy(&mut logits, &micro.targets, &loss_options, ranks)?;
        if !loss.is_finite() {
            broken_layer = broken_layer.or(Some(self.config.layers));
        }
        let tokens = micro.targets.len();
        let width = logits.len() / tokens;
        let logits = real::tensor(logits, [tokens, width], parameters.device());
        let head = Some(HeadSaved { norm, x, logits });
        Ok(Forward { output: None, loss: Some(loss), saved: StageSaved { layers, head }, broken_layer })
    }

    /// The gradient of the stage's input, none for the first; parameters' gradients are added to what is there.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn backward<T: Real>(
        &self,
        saved: StageSaved,
        upstream: Option<Tensor<2>>,
        micro: &MicroBatch,
        options: StageOptions,
        ranks: &Ranks,
        parameters: &mut Parameters<T>,
    ) -> Result<Option<Tensor<2>>> {
        let context = self.context(options, ranks, parameters);
        let mut gradient = match (upstream, saved.head, &self.last) {
            (None, Some(head), Some((norm, embedding))) => {
                let x = embedding.logits_backward(head.x, head.logits, parameters, ranks)?;
                norm.backward(head.norm, x, parameters)
            }
            (Some(upstream), ..) => upstream,
            _ => unreachable!("every stage but the last is given a gradient"),
        };
        for (layer, saved) in self.layers.iter().zip(saved.layers).rev() {
            let saved = match saved {
                LayerSaved::Whole(saved) => *saved,
                LayerSaved::Input(x) => layer.forward(x, micro, &context, parameters)?.1,
            };
            gradient = layer.backward(saved, gradient, micro, &context, parameters)?;
            if options.is_last {
                parameters.finish(layer.first, layer.fc2.bias);
            }
        }
        let Some((embedding, position)) = &self.first else { return Ok(Some(gradient)) };
        let mut gradient: Vec<T> = real::into_vec(gradient);
        if let Some(factors) = context.factors::<T>(Site::Embedding, 0, micro) {
            for (g, &f) in gradient.iter_mut().zip(&factors) {
                *g = *g * f;
            }
        }
        let text = micro.inputs.len() / micro.samples * self.config.hidden;
        let positions = parameters.gradient_mut(*position);
        for text in gradient.chunks_exact(text) {
            for (sum, &x) in positions.iter_mut().zip(text) {
                *sum += x;
            }
        }
        embedding.backward(&micro.inputs, &gradient, parameters);
        Ok(None)
    }

    /// Word and position vectors, and dropout.
    fn embed<T: Real>(
        &self,
        embedding: &VocabParallelEmbedding,
        position: usize,
        micro: &MicroBatch,
        context: &Context<'_>,
        parameters: &Parameters<T>,
    ) -> Result<Tensor<2>> {
        let mut x = embedding.forward(&micro.inputs, parameters, context.ranks)?;
        let text = micro.inputs.len() / micro.samples * self.config.hidden;
        for text in x.chunks_exact_mut(text) {
            for (x, &p) in text.iter_mut().zip(parameters.values_of(position)) {
                *x += p;
            }
        }
        if let Some(factors) = context.factors::<T>(Site::Embedding, 0, micro) {
            for (x, &f) in x.iter_mut().zip(&factors) {
                *x = *x * f;
            }
        }
        Ok(real::tensor(x, [micro.inputs.len(), self.config.hidden], &context.device))
    }
}

/// Whether a tensor has neither NaN nor infinities.
fn all_numbers<T: Real>(x: &Tensor<2>) -> bool {
    // Without a branch in the inner loop, which then takes many elements at a time.
    real::read(x, |x: &[T]| x.chunks(64).all(|part| part.iter().fold(true, |all, x| all & x.is_number())))
}
