//! The implicit function on prepared tensors, without noise, output scale or base: what the reference computes.

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use kiln_core::{Error, HostTensor, Result, TensorFile};
use kiln_nn::Linear;
use serde::{Deserialize, Serialize};

use crate::arch::{Arch, NetConfig, Size};
use crate::coords::{DIMENSIONS, WeightCoords, encoded_width};
use crate::family::{norms, reconstruction};
use crate::inr::{InrConfig, Mlp, crop};
use crate::objective::{Goal, Run};

/// What a `config.json` of prepared tensors holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ForwardConfig {
    /// What sizes are divided by.
    pub norm: f64,
    /// Frequencies of the encoding.
    pub num_freqs: usize,
    /// Hidden width.
    pub hidden: usize,
    /// Layers before the last.
    pub num_layers: usize,
    /// Numbers of the largest kernel.
    pub kmax: usize,
    /// The network, as a chain.
    pub net: Arch,
    /// Its classes.
    pub classes: usize,
    /// The widths to write.
    pub widths: Vec<usize>,
}

/// Writes the networks of all widths and runs them on `x`: `w<width>.coords`, `.encoding`, `.raw`, `.param.<name>` and
/// `.logits`, and for the first width `recon.loss` against `recon.gt0`, `recon.gt1`, … where the file has them, and
/// `reg.loss`.
///
/// # Errors
/// Names the first tensor that is missing or does not fit.
pub fn recompute(mut file: TensorFile, config: &ForwardConfig, device: &Device) -> Result<TensorFile> {
    let x = file.take_float::<4>("x", device)?;
    let [_, channels, height, width] = x.dims();
    let net = NetConfig {
        goal: Goal::Classify,
        arch: config.net.clone(),
        image: [channels, height, width],
        classes: config.classes,
    };
    net.check()?;
    let first = *config.widths.first().ok_or_else(|| Error::usage("the configuration names no widths"))?;
    let count = net.build(Size::new(first))?.graph.tensors().len();
    let inr = InrConfig {
        hidden: config.hidden,
        layers: config.num_layers,
        frequencies: config.num_freqs,
        ..InrConfig::new(count, config.kmax, config.norm)
    };
    inr.check()?;
    let mlps = (0..count).map(|index| mlp(&mut file, index, &inr, device)).collect::<Result<Vec<_>>>()?;
    let mut output = TensorFile::new();
    for &size in &config.widths {
        let written = write(&mlps, &net, &inr, size, &x, &mut output, device)?;
        if size == first {
            let given =
                (0..count).map_while(|i| file.get(&format!("recon.gt{i}"))?.as_floats().map(<[f32]>::to_vec));
            let given: Vec<Vec<f32>> = given.collect();
            let fits = given.iter().zip(&written).filter(|(given, w)| given.len() == w.dims()[0]).count();
            if fits == count {
                output
                    .insert("recon.loss", HostTensor::from_tensor(reconstruction(&written, &given, device)));
            }
            output.insert("reg.loss", HostTensor::from_tensor(norms(&written)));
        }
    }
    Ok(output)
}

/// The perceptron of one tensor, from weights `[out, in]`.
fn mlp(file: &mut TensorFile, index: usize, config: &InrConfig, device: &Device) -> Result<Mlp> {
    let mut linear = |part: &str, inputs: usize, outputs: usize| -> Result<Linear> {
        let name = format!("inr.{index}.{part}");
        let weight = file.take_float::<2>(&format!("{name}.weight"), device)?;
        let bias = file.take_float::<1>(&format!("{name}.bias"), device)?;
        if weight.dims() != [outputs, inputs] || bias.dims() != [outputs] {
            let found = format!("{name}.weight is {:?} and its bias {:?}", weight.dims(), bias.dims());
            return Err(Error::input(file.source().display(), found)
                .hint(format!("the configuration asks for [{outputs}, {inputs}]")));
        }
        Ok(Linear { weight: Param::from_tensor(weight.transpose()), bias: Some(Param::from_tensor(bias)) })
    };
    let hidden = config.hidden;
    let input = linear("in", encoded_width(config.frequencies), hidden)?;
    let blocks = 0..config.layers - 1;
    let layers = blocks.clone().map(|j| linear(&format!("res{j}"), hidden, hidden)).collect::<Result<_>>()?;
    let output = linear("out", hidden, config.taps)?;
    let scale =
        |j| Ok(Param::from_tensor(file.take_float::<1>(&format!("inr.{index}.res{j}.scale"), device)?));
    Ok(Mlp { input, blocks: layers, scales: blocks.map(scale).collect::<Result<_>>()?, output })
}

fn write(
    mlps: &[Mlp],
    net: &NetConfig,
    inr: &InrConfig,
    width: usize,
    x: &Tensor<4>,
    output: &mut TensorFile,
    device: &Device,
) -> Result<Vec<Tensor<1>>> {
    let built = net.build(Size::new(width))?;
    let specs = built.graph.tensors();
    let (mut coords, mut encodings, mut raws, mut tensors) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (index, spec) in specs.iter().enumerate() {
        let own = WeightCoords::of(index, specs.len(), spec);
        let kernels = own.rows.len();
        let encoded = own.encode(inr.norm, inr.frequencies);
        let encoding = HostTensor::float([kernels, encoded_width(inr.frequencies)], encoded.clone());
        let fan_ins = HostTensor::float([kernels, 1], own.fan_ins());
        let on_device = |host: &HostTensor| host.to_tensor::<2>(device).expect("a matrix of floats");
        let raw = mlps[index].forward(on_device(&encoding)) / on_device(&fan_ins);
        let tensor = crop(raw.clone(), spec).reshape([spec.numel()]);
        coords.extend(own.rows.iter().flatten().map(|&x| x as f32));
        encodings.extend(encoded);
        let values = HostTensor::from_tensor(tensor.clone()).as_floats().unwrap_or_default().to_vec();
        output.insert(format!("w{width}.param.{}", spec.name), HostTensor::float(spec.shape.clone(), values));
        raws.push(raw);
        tensors.push(tensor);
    }
    let rows = coords.len() / DIMENSIONS;
    output.insert(format!("w{width}.coords"), HostTensor::float([rows, DIMENSIONS], coords));
    let columns = encoded_width(inr.frequencies);
    output.insert(format!("w{width}.encoding"), HostTensor::float([rows, columns], encodings));
    output.insert(format!("w{width}.raw"), HostTensor::from_tensor(Tensor::cat(raws, 0)));
    let run = Run { goal: net.goal, built: &built, parameters: &tensors, norms: &[] };
    let logits = run.output(x.clone())?;
    let [images, classes, ..] = logits.dims();
    output.insert(format!("w{width}.logits"), HostTensor::from_tensor(logits.reshape([images, classes])));
    Ok(tensors)
}
