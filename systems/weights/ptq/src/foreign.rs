//! Networks of other libraries from their weights: ResNet (He et al., arXiv 1512.03385) and MobileNetV2 (Sandler et al.,
//! arXiv 1801.04381) under the names of torchvision, BERT (Devlin et al., arXiv 1810.04805) under those of Hugging Face.
//!
//! A file holds numbers with names; what is done with them is written here, operation by operation, into a graph. Channels and
//! classes are as many as the weights have, so that networks of other widths can be read too; how many blocks there are, and
//! their strides, is the network's.

use burn::backend::ir::{
    ActivationOperationIr, AdaptiveAvgPool2dOpIr, BatchNormOpIr, Conv2dOpIr, Conv2dOptionsIr,
    FloatOperationIr, LayerNormOpIr, LinearOpIr, MaxPool2dOpIr, ModuleOperationIr, NumericOperationIr,
    ScalarIr, TensorIr,
};
use burn::tensor::{DType, TensorData};
use clap::ValueEnum;
use kiln_compiler::builder::{Builder, Fit};
use kiln_compiler::{Boundary, Graph};
use kiln_core::{Error, HostTensor, Port, PortKind, Result, TensorFile, Values};
use serde::{Deserialize, Serialize};

/// Which network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Foreign {
    /// torchvision's
    Resnet18,
    /// torchvision's
    Resnet34,
    /// torchvision's
    Resnet50,
    /// torchvision's
    Resnet101,
    /// torchvision's
    Resnet152,
    /// torchvision's
    #[value(name = "mobilenet_v2")]
    MobilenetV2,
    /// Hugging Face's BertForSequenceClassification
    Bert,
}

/// What the weights do not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extents {
    /// Height and width of images.
    pub image: usize,
    /// Tokens of a text.
    pub length: usize,
    /// Attention heads; one for every 64 of the width if not given.
    pub heads: Option<usize>,
}

/// ε of batch norms.
const NORM_EPSILON: f64 = 1e-5;

/// ε of BERT's layer norms.
const LAYER_EPSILON: f64 = 1e-12;

/// Width of an attention head of BERT.
const HEAD: usize = 64;

/// What is added to the score of a padding token, whose number is 0.
const HIDDEN: f64 = -1e4;

/// Expansion, blocks and stride of MobileNetV2's stages (table 2).
const INVERTED: [(usize, usize, usize); 7] =
    [(1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1)];

impl Foreign {
    /// The network as a graph, for one example at a time.
    ///
    /// # Errors
    /// Names the tensor that is missing, has a shape that does not fit the others, is not finite, or belongs to no part of it.
    pub fn graph(self, weights: TensorFile, extents: Extents) -> Result<Graph> {
        let mut net = Net { builder: Builder::new(0), weights, arch: self.name() };
        let (input, output) = match self {
            Self::Resnet18 => net.resnet([2, 2, 2, 2], false, extents.image)?,
            Self::Resnet34 => net.resnet([3, 4, 6, 3], false, extents.image)?,
            Self::Resnet50 => net.resnet([3, 4, 6, 3], true, extents.image)?,
            Self::Resnet101 => net.resnet([3, 4, 23, 3], true, extents.image)?,
            Self::Resnet152 => net.resnet([3, 8, 36, 3], true, extents.image)?,
            Self::MobilenetV2 => net.mobilenet(extents.image)?,
            Self::Bert => net.bert(extents)?,
        };
        // Counters of training, and numbers that are the places themselves.
        let counter = |name: &str| name.ends_with("num_batches_tracked") || name.ends_with("position_ids");
        if let Some(name) = net.weights.names().find(|name| !counter(name)) {
            return Err(net.wrong(format!("holds \"{name}\", which is no part of {}", net.arch)));
        }
        let kind = if self == Self::Bert { PortKind::Int } else { PortKind::Float };
        let boundary = |name: &str, kind, tensor: &TensorIr| Boundary {
            port: Port { name: name.into(), kind, shape: tensor.shape.to_vec() },
            tensor: tensor.id,
        };
        let name = if self == Self::Bert { "tokens" } else { "images" };
        let Builder { operations, constants, .. } = net.builder;
        let (inputs, outputs) =
            (vec![boundary(name, kind, &input)], vec![boundary("logits", PortKind::Float, &output)]);
        let graph = Graph { kind: net.arch, inputs, outputs, operations, constants };
        graph.verify()?;
        Ok(graph)
    }

    /// As on the command line.
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// A network in the making.
struct Net {
    builder: Builder,
    weights: TensorFile,
    arch: String,
}

impl Net {
    fn wrong(&self, found: String) -> Error {
        Error::input(self.weights.source().display(), found).hint(format!(
            "--arch {} expects the names and shapes of the library that it comes from",
            self.arch
        ))
    }

    /// An operation that does not fit is an input that does not, such as images that are too small.
    fn fit<T>(&self, made: Fit<T>) -> Result<T> {
        made.map_err(|found| Error::usage(format!("{} cannot be built: {found}", self.arch)))
    }

    /// A tensor of floats; extents that are not given may be any.
    fn take(&mut self, name: &str, expected: &[Option<usize>]) -> Result<TensorIr> {
        let HostTensor { shape, values } = self.weights.take(name)?;
        let fits = shape.len() == expected.len()
            && shape
                .iter()
                .zip(expected)
                .all(|(&found, wanted)| found > 0 && wanted.is_none_or(|w| w == found));
        if !fits {
            let extents = expected.iter().map(|e| e.map_or("any".into(), |e| e.to_string()));
            let expected = extents.collect::<Vec<String>>().join(", ");
            return Err(self.wrong(format!("\"{name}\" has the shape {shape:?}, must have [{expected}]")));
        }
        let Values::Float(values) = values else {
            return Err(self.wrong(format!("\"{name}\" holds whole numbers, must hold floats")));
        };
        if values.iter().any(|x| !x.is_finite()) {
            return Err(self.wrong(format!("\"{name}\" has a number that is not finite")));
        }
        Ok(self.builder.constant(TensorData::new(values, shape)))
    }

    /// Whether the file has such a tensor still.
    fn has(&self, name: &str) -> bool {
        self.weights.get(name).is_some()
    }

    /// A convolution without bias and its batch norm.
    fn conv(
        &mut self,
        x: TensorIr,
        [conv, norm]: [&str; 2],
        kernel: usize,
        stride: usize,
        by_channel: bool,
    ) -> Result<TensorIr> {
        let channels = x.shape[1];
        let inputs = if by_channel { 1 } else { channels };
        let outputs = by_channel.then_some(channels);
        let weight =
            self.take(&format!("{conv}.weight"), &[outputs, Some(inputs), Some(kernel), Some(kernel)])?;
        let outputs = weight.shape[0];
        let options = Conv2dOptionsIr {
            stride: [stride; 2],
            padding: [(kernel / 2, kernel / 2); 2],
            dilation: [1; 2],
            groups: if by_channel { channels } else { 1 },
        };
        let y = self
            .builder
            .module(|id| ModuleOperationIr::Conv2d(Conv2dOpIr::create(x, weight, None, options, || id)));
        let y = self.fit(y)?;
        let mut of = |part: &str| self.take(&format!("{norm}.{part}"), &[Some(outputs)]);
        let (gamma, beta) = (of("weight")?, of("bias")?);
        let (mean, variance) = (of("running_mean")?, of("running_var")?);
        let y = self.builder.module(|id| {
            let operation =
                BatchNormOpIr::create(y, gamma, beta, mean, variance, ScalarIr::Float(NORM_EPSILON), || id);
            ModuleOperationIr::BatchNorm(operation)
        });
        self.fit(y)
    }

    /// A linear layer, whose file has its weights as `[out, in]`.
    fn linear(&mut self, x: &TensorIr, name: &str) -> Result<TensorIr> {
        let inner = x.shape[x.shape.rank() - 1];
        let weight = self.take(&format!("{name}.weight"), &[None, Some(inner)])?;
        let outputs = weight.shape[0];
        let bias = self.take(&format!("{name}.bias"), &[Some(outputs)])?;
        let rows: Vec<f32> =
            self.builder.value(&weight).map(|data| data.iter::<f32>().collect()).unwrap_or_default();
        self.builder.constants.remove(&weight.id);
        let columns =
            (0..rows.len()).map(|at| rows[at % outputs * inner + at / outputs]).collect::<Vec<f32>>();
        let weight = self.builder.constant(TensorData::new(columns, [inner, outputs]));
        let x = x.clone();
        let y = self
            .builder
            .module(|id| ModuleOperationIr::Linear(LinearOpIr::create(x, weight, Some(bias), || id)));
        self.fit(y)
    }

    fn relu(&mut self, x: &TensorIr) -> Result<TensorIr> {
        let y = self.builder.activation(x, ActivationOperationIr::Relu);
        self.fit(y)
    }

    fn images(&mut self, stem: &str, side: usize) -> Result<TensorIr> {
        let shape = self.weights.get(stem).map(|stem| stem.shape.clone()).unwrap_or_default();
        let channels = shape.get(1).copied().unwrap_or(3);
        if side == 0 || side > 1 << 14 {
            return Err(Error::usage(format!("--image {side} is not between 1 and 16384")));
        }
        Ok(self.builder.provided(&[1, channels, side, side], DType::F32))
    }

    /// The mean over all pixels and a linear layer.
    fn head(&mut self, x: TensorIr, name: &str) -> Result<TensorIr> {
        let channels = x.shape[1];
        let pooled = self.builder.module(|id| {
            ModuleOperationIr::AdaptiveAvgPool2d(AdaptiveAvgPool2dOpIr::create(x, [1, 1], || id))
        });
        let pooled = self.fit(pooled)?;
        let flat = self.builder.reshape(&pooled, &[1, channels]);
        let flat = self.fit(flat)?;
        self.linear(&flat, name)
    }

    /// Input and logits of a residual network; with bottlenecks a block has three convolutions instead of two.
    fn resnet(&mut self, blocks: [usize; 4], bottleneck: bool, side: usize) -> Result<(TensorIr, TensorIr)> {
        let input = self.images("conv1.weight", side)?;
        let x = self.conv(input.clone(), ["conv1", "bn1"], 7, 2, false)?;
        let x = self.relu(&x)?;
        let x = self.builder.module(|id| {
            let pool = MaxPool2dOpIr::create(x, [3; 2], [2; 2], [1; 2], [1; 2], false, || id);
            ModuleOperationIr::MaxPool2d(pool)
        });
        let mut x = self.fit(x)?;
        for (stage, count) in blocks.into_iter().enumerate() {
            for block in 0..count {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                x = self.residual(x, &format!("layer{}.{block}", stage + 1), stride, bottleneck)?;
            }
        }
        Ok((input, self.head(x, "fc")?))
    }

    fn residual(&mut self, x: TensorIr, name: &str, stride: usize, bottleneck: bool) -> Result<TensorIr> {
        // torchvision's bottlenecks stride in the middle.
        let plan: &[(usize, usize)] =
            if bottleneck { &[(1, 1), (3, stride), (1, 1)] } else { &[(3, stride), (3, 1)] };
        let mut y = x.clone();
        for (at, &(kernel, stride)) in plan.iter().enumerate() {
            let [conv, norm] = ["conv", "bn"].map(|part| format!("{name}.{part}{}", at + 1));
            y = self.conv(y, [&conv, &norm], kernel, stride, false)?;
            if at + 1 < plan.len() {
                y = self.relu(&y)?;
            }
        }
        let beside = if self.has(&format!("{name}.downsample.0.weight")) {
            let [conv, norm] = [0, 1].map(|part| format!("{name}.downsample.{part}"));
            self.conv(x, [&conv, &norm], 1, stride, false)?
        } else {
            x
        };
        if y.shape != beside.shape {
            let [found, expected] = [&y, &beside].map(|tensor| tensor.shape.to_vec());
            return Err(self.wrong(format!(
                "block \"{name}\" makes {found:?} of {expected:?} and has no \"{name}.downsample.0.weight\""
            )));
        }
        let sum = self.builder.add(&y, &beside);
        let sum = self.fit(sum)?;
        self.relu(&sum)
    }

    /// Input and logits of MobileNetV2.
    fn mobilenet(&mut self, side: usize) -> Result<(TensorIr, TensorIr)> {
        let input = self.images("features.0.0.weight", side)?;
        let x = self.conv(input.clone(), ["features.0.0", "features.0.1"], 3, 2, false)?;
        let mut x = self.relu6(&x)?;
        let mut number = 1;
        for (expansion, count, stride) in INVERTED {
            for block in 0..count {
                let stride = if block == 0 { stride } else { 1 };
                x = self.inverted(x, &format!("features.{number}.conv"), expansion, stride)?;
                number += 1;
            }
        }
        let [conv, norm] = [0, 1].map(|part| format!("features.{number}.{part}"));
        let x = self.conv(x, [&conv, &norm], 1, 1, false)?;
        let x = self.relu6(&x)?;
        Ok((input, self.head(x, "classifier.1")?))
    }

    fn relu6(&mut self, x: &TensorIr) -> Result<TensorIr> {
        let y = self.builder.clamp(x, 0.0, 6.0);
        self.fit(y)
    }

    fn inverted(&mut self, x: TensorIr, name: &str, expansion: usize, stride: usize) -> Result<TensorIr> {
        let (mut y, mut at) = (x.clone(), 0);
        if expansion > 1 {
            y = self.conv(y, [&format!("{name}.0.0"), &format!("{name}.0.1")], 1, 1, false)?;
            y = self.relu6(&y)?;
            at = 1;
        }
        y = self.conv(y, [&format!("{name}.{at}.0"), &format!("{name}.{at}.1")], 3, stride, true)?;
        y = self.relu6(&y)?;
        y = self.conv(y, [&format!("{name}.{}", at + 1), &format!("{name}.{}", at + 2)], 1, 1, false)?;
        if stride == 1 && y.shape == x.shape {
            let sum = self.builder.add(&x, &y);
            y = self.fit(sum)?;
        }
        Ok(y)
    }

    /// Input and logits of BERT; token 0 fills texts up.
    fn bert(&mut self, extents: Extents) -> Result<(TensorIr, TensorIr)> {
        let length = extents.length;
        let prefix = if self.weights.names().any(|name| name.starts_with("bert.")) { "bert." } else { "" };
        let table = self.take(&format!("{prefix}embeddings.word_embeddings.weight"), &[None, None])?;
        let d = table.shape[1];
        let heads = extents.heads.unwrap_or((d / HEAD).max(1));
        if heads == 0 || !d.is_multiple_of(heads) {
            return Err(Error::usage(format!("--heads {heads} does not divide the width {d}")));
        }
        let places = self.places(prefix, length, d)?;
        let input = self.builder.provided(&[1, length], DType::I64);
        let ids = self.builder.reshape(&input, &[length]);
        let ids = self.fit(ids)?;
        let rows = self.builder.select(&table, 0, &ids);
        let rows = self.fit(rows)?;
        let x = self.builder.reshape(&rows, &[1, length, d]);
        let x = self.fit(x)?;
        let x = self.builder.add(&x, &places);
        let x = self.fit(x)?;
        let mut x = self.layer_norm(x, &format!("{prefix}embeddings.LayerNorm"))?;
        let mask = self.mask(&input, length);
        let mask = self.fit(mask)?;
        let mut blocks = 0;
        while self.has(&format!("{prefix}encoder.layer.{blocks}.attention.self.query.weight")) {
            x = self.block(x, &format!("{prefix}encoder.layer.{blocks}"), heads, &mask)?;
            blocks += 1;
        }
        if blocks == 0 {
            let name = format!("{prefix}encoder.layer.0.attention.self.query.weight");
            return Err(self.wrong(format!("has no tensor \"{name}\"")));
        }
        let first = self.builder.narrow(&x, 1, 0, 1);
        let first = self.fit(first)?;
        let first = self.builder.reshape(&first, &[1, d]);
        let first = self.fit(first)?;
        let pooled = self.linear(&first, &format!("{prefix}pooler.dense"))?;
        let pooled = self.builder.float(&pooled, FloatOperationIr::Tanh);
        let pooled = self.fit(pooled)?;
        Ok((input, self.linear(&pooled, "classifier")?))
    }

    /// The vectors of the first places, with that of the first kind of token, `[1, length, d]`.
    fn places(&mut self, prefix: &str, length: usize, d: usize) -> Result<TensorIr> {
        let places =
            self.take(&format!("{prefix}embeddings.position_embeddings.weight"), &[None, Some(d)])?;
        let kinds =
            self.take(&format!("{prefix}embeddings.token_type_embeddings.weight"), &[None, Some(d)])?;
        if length == 0 || length > places.shape[0] {
            return Err(Error::usage(format!("--length {length} is not between 1 and {}", places.shape[0])));
        }
        let numbers = |tensor: &TensorIr| -> Vec<f32> {
            self.builder.value(tensor).map(|data| data.iter::<f32>().collect()).unwrap_or_default()
        };
        let (rows, kind) = (numbers(&places), numbers(&kinds));
        let sums = rows[..length * d].chunks(d).flat_map(|row| row.iter().zip(&kind).map(|(a, b)| a + b));
        let sums = TensorData::new(sums.collect::<Vec<f32>>(), [1, length, d]);
        self.builder.constants.remove(&places.id);
        self.builder.constants.remove(&kinds.id);
        Ok(self.builder.constant(sums))
    }

    /// What hides padding from attention, `[1, 1, 1, length]`.
    fn mask(&mut self, ids: &TensorIr, length: usize) -> Fit<TensorIr> {
        let padding = self.builder.compare_scalar(ids, 1.0, NumericOperationIr::LowerElem)?;
        let padding = self.builder.cast(&padding, DType::F32)?;
        let hidden = self.builder.mul_scalar(&padding, HIDDEN)?;
        self.builder.reshape(&hidden, &[1, 1, 1, length])
    }

    fn layer_norm(&mut self, x: TensorIr, name: &str) -> Result<TensorIr> {
        let d = x.shape[x.shape.rank() - 1];
        let scale = self.take(&format!("{name}.weight"), &[Some(d)])?;
        let shift = self.take(&format!("{name}.bias"), &[Some(d)])?;
        let y = self.builder.module(|id| {
            let norm = LayerNormOpIr::create(x, scale, Some(shift), LAYER_EPSILON, || id);
            ModuleOperationIr::LayerNorm(norm)
        });
        self.fit(y)
    }

    /// Attention and a feed-forward layer, each followed by the norm of its sum with its input.
    fn block(&mut self, x: TensorIr, name: &str, heads: usize, mask: &TensorIr) -> Result<TensorIr> {
        let part = |part: &str| format!("{name}.attention.self.{part}");
        let (q, k) = (self.linear(&x, &part("query"))?, self.linear(&x, &part("key"))?);
        let v = self.linear(&x, &part("value"))?;
        let attended = self.attention([q, k, v], heads, mask);
        let attended = self.fit(attended)?;
        let attended = self.linear(&attended, &format!("{name}.attention.output.dense"))?;
        let sum = self.builder.add(&attended, &x);
        let sum = self.fit(sum)?;
        let x = self.layer_norm(sum, &format!("{name}.attention.output.LayerNorm"))?;
        let wide = self.linear(&x, &format!("{name}.intermediate.dense"))?;
        let wide = self.builder.activation(&wide, ActivationOperationIr::Gelu);
        let wide = self.fit(wide)?;
        let y = self.linear(&wide, &format!("{name}.output.dense"))?;
        if y.shape != x.shape {
            let d = x.shape[2];
            let found = y.shape[2];
            return Err(self.wrong(format!("\"{name}.output.dense.weight\" has {found} rows, must have {d}")));
        }
        let sum = self.builder.add(&y, &x);
        let sum = self.fit(sum)?;
        self.layer_norm(sum, &format!("{name}.output.LayerNorm"))
    }

    /// `softmax(q kᵀ / √(d / heads) + mask) v`, from `[1, length, d]` to the same.
    fn attention(&mut self, parts: [TensorIr; 3], heads: usize, mask: &TensorIr) -> Fit<TensorIr> {
        let [length, d] = [parts[0].shape[1], parts[0].shape[2]];
        let dim = d / heads;
        let mut split = |x: &TensorIr, axes: &[usize]| {
            let x = self.builder.reshape(x, &[1, length, heads, dim])?;
            self.builder.permute(&x, axes)
        };
        let [q, k, v] = &parts;
        let (q, k, v) = (split(q, &[0, 2, 1, 3])?, split(k, &[0, 2, 3, 1])?, split(v, &[0, 2, 1, 3])?);
        let scores = self.builder.matmul(&q, &k)?;
        let scores = self.builder.mul_scalar(&scores, (dim as f64).powf(-0.5))?;
        let scores = self.builder.add(&scores, mask)?;
        let shares = self.builder.along(&scores, 3, ActivationOperationIr::Softmax)?;
        let attended = self.builder.matmul(&shares, &v)?;
        let attended = self.builder.permute(&attended, &[0, 2, 1, 3])?;
        self.builder.reshape(&attended, &[1, length, d])
    }
}
