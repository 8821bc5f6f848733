//! Plain networks: weights of one size, trained directly or written by the implicit function.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Error, HostTensor, Result, TensorFile};
use kiln_nn::{BatchNorm, BatchNormConfig};
use rand::{Rng, RngExt};

use crate::arch::{Built, NetConfig, Size};
use crate::graph::{ChannelGraph, TensorSpec};
use crate::objective::Run;

/// Added to the variance of a batch norm.
const BN_EPSILON: f32 = 1e-5;

/// A network with its weights in main memory: a flat vector for each tensor of its graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Plain {
    /// Its family.
    pub config: NetConfig,
    /// Its place there.
    pub size: Size,
    /// Weight and bias of each layer in turn.
    pub tensors: Vec<Vec<f32>>,
}

impl Plain {
    /// Takes the tensors of a network out of a file. Layers may have a batch norm (`<layer>.norm.weight`, `.bias`,
    /// `.running_mean`, `.running_var`), which is folded into them.
    ///
    /// # Errors
    /// Names the first tensor that is missing, misshapen, not finite or left over.
    pub fn from_file(config: NetConfig, size: Size, mut file: TensorFile) -> Result<Self> {
        let graph = config.build(size)?.graph;
        if file.names().any(|name| name.starts_with("tensors.")) {
            return Err(Error::input(file.source().display(), "holds a training run that has not ended")
                .hint("continue it: kiln neumeta pretrain --data DATA --resume DIR"));
        }
        let mut tensors = Vec::new();
        for layer in graph.layers() {
            let name = |part: &str| format!("{}.{part}", layer.name);
            let outputs = layer.outputs.channels;
            let mut weight = take(&mut file, &name("weight"), &layer.weight_shape())?;
            let has_norm = file.get(&name("norm.weight")).is_some();
            // A convolution before a batch norm needs no bias.
            let mut bias = match file.get(&name("bias")) {
                None if has_norm => vec![0.0; outputs],
                _ => take(&mut file, &name("bias"), &[outputs])?,
            };
            if has_norm {
                for part in ["running_mean", "running_var"] {
                    if file.get(&name(&format!("norm.{part}"))).is_none() {
                        let found = format!("{}.norm has no \"{part}\"", layer.name);
                        return Err(Error::input(file.source().display(), found).hint(
                            "a batch norm is folded with its running statistics: save the network in full",
                        ));
                    }
                }
                let mut part = |part: &str| take(&mut file, &name(&format!("norm.{part}")), &[outputs]);
                let norm = BatchStatistics {
                    scale: part("weight")?,
                    shift: part("bias")?,
                    mean: part("running_mean")?,
                    variance: part("running_var")?,
                };
                fold_batch_norm(&mut weight, &mut bias, &norm, BN_EPSILON);
            }
            tensors.extend([weight, bias]);
        }
        let stray = file.names().find(|name| !name.ends_with("num_batches_tracked")).map(str::to_string);
        if let Some(name) = stray {
            return Err(Error::input(
                file.source().display(),
                format!("tensor \"{name}\" has no place in {}", config.arch),
            )
            .hint("is it the right --arch and --width?"));
        }
        Ok(Self { config, size, tensors })
    }

    /// The tensors by name, with their shapes.
    ///
    /// # Errors
    /// When there is no network of that size.
    pub fn to_file(&self) -> Result<TensorFile> {
        let mut file = TensorFile::new();
        for (spec, values) in self.config.build(self.size)?.graph.tensors().into_iter().zip(&self.tensors) {
            file.insert(spec.name, HostTensor::float(spec.shape, values.clone()));
        }
        Ok(file)
    }

    /// The tensors on a device.
    pub fn parameters(&self, device: &Device) -> Vec<Tensor<1>> {
        self.tensors.iter().map(|values| vector(values, device)).collect()
    }
}

/// A vector on a device.
pub(crate) fn vector(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

fn take(file: &mut TensorFile, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
    let source = file.source().display().to_string();
    let found = file.take(name)?;
    let place = format!("{source}: tensor \"{name}\"");
    if found.shape != shape {
        return Err(Error::input(place, format!("has the shape {:?}, expected {shape:?}", found.shape))
            .hint("is it the right --arch and --width?"));
    }
    let values = found.as_floats().ok_or_else(|| Error::input(&place, "holds integers"))?;
    match values.iter().position(|x| !x.is_finite()) {
        Some(at) => Err(Error::input(place, format!("element {at} is {}", values[at]))
            .hint("the network was saved after its training failed")),
        None => Ok(values.to_vec()),
    }
}

/// A batch norm as it is after training, one number a channel.
#[derive(Debug, Clone, PartialEq)]
pub struct BatchStatistics {
    /// γ
    pub scale: Vec<f32>,
    /// β
    pub shift: Vec<f32>,
    /// The running mean.
    pub mean: Vec<f32>,
    /// The running variance.
    pub variance: Vec<f32>,
}

/// Folds a batch norm into the layer before it: `w γ / √(var + ε)` and `(b - mean) γ / √(var + ε) + β` for each output.
///
/// # Panics
/// When the outputs differ in number.
pub fn fold_batch_norm(weight: &mut [f32], bias: &mut [f32], norm: &BatchStatistics, epsilon: f32) {
    let width = weight.len() / bias.len();
    for (channel, (kernel, bias)) in weight.chunks_mut(width).zip(bias).enumerate() {
        let factor = norm.scale[channel] / (norm.variance[channel] + epsilon).sqrt();
        kernel.iter_mut().for_each(|w| *w *= factor);
        *bias = (*bias - norm.mean[channel]) * factor + norm.shift[channel];
    }
}

/// A network whose weights are trained directly.
#[derive(Module, Debug)]
pub struct Trainable {
    /// Weight and bias of each layer in turn, flat.
    pub tensors: Vec<Param<Tensor<1>>>,
    /// Of the layers that have one.
    pub norms: Vec<BatchNorm>,
}

impl Trainable {
    /// Draws weights uniformly with the variance `2 / fan_in` of He et al. (2015); biases are 0.
    pub fn draw(graph: &ChannelGraph, device: &Device, rng: &mut impl Rng) -> Self {
        let tensors = graph.tensors();
        let mut draw = |spec: &TensorSpec| {
            let [outputs, inputs, taps] = spec.extents();
            let bound = if spec.shape.len() == 1 { 0.0 } else { (6.0 / (inputs * taps) as f32).sqrt() };
            let values: Vec<f32> =
                (0..outputs * inputs * taps).map(|_| bound * (2.0 * rng.random::<f32>() - 1.0)).collect();
            Param::from_tensor(vector(&values, device))
        };
        let tensors = tensors.iter().map(&mut draw).collect();
        let normed = graph.layers().iter().filter(|layer| layer.norm);
        let norms = normed.map(|layer| BatchNormConfig::new(layer.outputs.channels).init(device)).collect();
        Self { tensors, norms }
    }

    /// A network that begins with given weights and has no batch norms.
    pub fn from_plain(plain: &Plain, device: &Device) -> Self {
        let tensors = plain.parameters(device).into_iter().map(Param::from_tensor).collect();
        Self { tensors, norms: Vec::new() }
    }

    /// Its weights.
    pub fn parameters(&self) -> Vec<Tensor<1>> {
        self.tensors.iter().map(Param::val).collect()
    }

    /// The network ready to compute.
    pub fn run<'a>(&'a self, config: &NetConfig, built: &'a Built, parameters: &'a [Tensor<1>]) -> Run<'a> {
        Run { goal: config.goal, built, parameters, norms: &self.norms }
    }

    /// The network as it is in inference, with its batch norms folded.
    ///
    /// # Errors
    /// When there is no network of that size.
    pub fn to_plain(&self, config: &NetConfig, size: Size) -> Result<Plain> {
        let graph = config.build(size)?.graph;
        let host = |x: Tensor<1>| -> Vec<f32> {
            x.into_data().try_to_vec().expect("networks are in single precision")
        };
        let mut tensors: Vec<Vec<f32>> = self.parameters().into_iter().map(host).collect();
        let normed = graph.layers().iter().enumerate().filter(|(_, layer)| layer.norm);
        for ((index, _), norm) in normed.zip(&self.norms) {
            let statistics = BatchStatistics {
                scale: host(norm.gamma.val()),
                shift: host(norm.beta.val()),
                mean: host(norm.running_mean.value_sync()),
                variance: host(norm.running_var.value_sync()),
            };
            let (weight, bias) = tensors.split_at_mut(2 * index + 1);
            fold_batch_norm(&mut weight[2 * index], &mut bias[0], &statistics, BN_EPSILON);
        }
        Ok(Plain { config: config.clone(), size, tensors })
    }
}
