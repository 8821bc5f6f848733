//! The classifiers with weights of its own for every image: what one condition for each sample needs. No layer loops over
//! the images: linear layers are one batched product, convolutions one with a group of channels for every image.

use std::collections::BTreeMap;

use burn::tensor::Tensor;
use burn::tensor::ops::{ConvOptions, MaxPoolOptions};
use kiln_core::{Error, Result};
use kiln_nn::{WeightSpec, functional};
use kiln_ops::max_pool2d;

use crate::arch::{Classifier, Net};
use crate::convert::MipHyper;

/// The parameters of a network for every condition of a batch.
struct Each {
    /// Shape of one and values of all, `[batch, numel]`
    tensors: BTreeMap<String, (Vec<usize>, Tensor<2>)>,
    batch: usize,
}

impl Each {
    /// Those in `theta [batch, weights]`; the others are the network's own, the same for all.
    fn new(model: &MipHyper<Classifier>, theta: &Tensor<2>) -> Result<Self> {
        let batch = theta.dims()[0];
        let all = WeightSpec::of(&model.base);
        let own = all.read(&model.base)?;
        let mut tensors = BTreeMap::new();
        let mut start = 0;
        for param in all.params() {
            let values = own.clone().narrow(0, start, param.len()).unsqueeze_dim::<2>(0);
            tensors.insert(param.name.clone(), (param.shape.clone(), values.expand([batch, param.len()])));
            start += param.len();
        }
        let mut start = 0;
        for param in model.spec().params() {
            let values = theta.clone().narrow(1, start, param.len());
            tensors.insert(param.name.clone(), (param.shape.clone(), values));
            start += param.len();
        }
        Ok(Self { tensors, batch })
    }

    fn get<const D: usize>(&self, name: String) -> Result<Tensor<D>> {
        let (shape, values) = self
            .tensors
            .get(&name)
            .ok_or_else(|| Error::work(format!("the network has no parameter \"{name}\"")))?;
        let shape: Vec<usize> = std::iter::once(self.batch).chain(shape.iter().copied()).collect();
        let shape: [usize; D] =
            shape.try_into().map_err(|_| Error::work(format!("\"{name}\" has not {} axes", D - 1)))?;
        Ok(values.clone().reshape(shape))
    }

    /// `[batch, 1, in]` to `[batch, 1, out]`
    fn linear(&self, name: &str, x: Tensor<3>) -> Result<Tensor<3>> {
        let (weight, bias) = (self.get(format!("{name}.weight"))?, self.get(format!("{name}.bias"))?);
        Ok(functional::linear(x, weight, Some(bias)))
    }

    /// `[batch, in, height, width]` to `[batch, out, height', width']`, with a border of half the kernel.
    fn conv(&self, name: &str, x: Tensor<4>, stride: usize) -> Result<Tensor<4>> {
        let (weight, bias) = (self.get::<5>(format!("{name}.weight"))?, self.get(format!("{name}.bias"))?);
        let border = weight.dims()[3] / 2;
        let options = ConvOptions::new([stride; 2], [border; 2], [1, 1], 1);
        Ok(functional::conv2d(x.unsqueeze_dim::<5>(1), weight, Some(bias), options).squeeze_dim(1))
    }
}

/// Logits of images, each by the network of its own condition.
///
/// # Shapes
/// - theta: `[images, weights]`, as [`MipHyper::generate`] gives it
/// - x: `[images, channels, height, width]`
/// - output: `[images, classes]`
///
/// # Errors
/// When the network has batch norms, which look at other images.
pub fn forward(model: &MipHyper<Classifier>, theta: &Tensor<2>, x: Tensor<4>) -> Result<Tensor<2>> {
    let act = model.base.activation();
    let each = Each::new(model, theta)?;
    if each.tensors.keys().any(|name| name.contains("norm")) {
        return Err(Error::usage("batch norms look at images with other weights")
            .hint("choose another --norm where every image has its condition"));
    }
    let perceptron = |place: &str, layers: usize, x: Tensor<4>| -> Result<Tensor<2>> {
        let mut x = x.flatten::<2>(1, 3).unsqueeze_dim::<3>(1);
        for layer in 0..layers {
            x = each.linear(&format!("{place}.layers.{layer}"), x)?;
            if layer + 1 < layers {
                x = act.apply(x);
            }
        }
        Ok(x.squeeze_dim(1))
    };
    match &model.base.net {
        Net::Mlp(mlp) => perceptron("net", mlp.layers.len(), x),
        Net::Lenet(lenet) => {
            let pool = |x| max_pool2d(x, MaxPoolOptions::new([2, 2]));
            let x = pool(act.apply(each.conv("net.conv1", x, 1)?));
            let x = pool(act.apply(each.conv("net.conv2", x, 1)?));
            perceptron("net.head", lenet.layers(), x)
        }
        Net::Resnet8(resnet) => {
            let mut x = act.apply(each.conv("net.stem", x, 1)?);
            for (number, stride) in resnet.strides().into_iter().enumerate() {
                let place = format!("net.blocks.{number}");
                let inner = act.apply(each.conv(&format!("{place}.conv1"), x.clone(), stride)?);
                let inner = each.conv(&format!("{place}.conv2"), inner, 1)?;
                let shortcut = match stride {
                    1 => x,
                    _ => each.conv(&format!("{place}.shortcut"), x, stride)?,
                };
                x = act.apply(inner + shortcut);
            }
            let means = x.flatten::<3>(2, 3).mean_dim(2).swap_dims(1, 2); // [images, 1, channels]
            Ok(each.linear("net.fc", means)?.squeeze_dim(1))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MipConfig;
    use crate::arch::{Arch, ClassifierConfig};
    use crate::hypernet::Nonlinearity;
    use burn::tensor::{Device, TensorData};
    use kiln_core::random_stream;
    use rand::RngExt;

    #[test]
    fn images_with_weights_of_their_own_give_what_each_gives_alone() {
        let device = Device::flex();
        let mut rng = random_stream(0, "test", 0);
        let pixels: Vec<f32> = (0..3 * 81).map(|_| rng.random()).collect();
        let x = Tensor::<4>::from_data(TensorData::new(pixels, [3, 1, 9, 9]), &device);
        let gammas = Tensor::<2>::from_floats([[0.1], [0.6], [1.0]], &device);
        for (arch, select) in [(Arch::Mlp(vec![6]), "*"), (Arch::Lenet, "net.conv*"), (Arch::Resnet8, "*")] {
            let config = ClassifierConfig {
                arch,
                image: [1, 9, 9],
                classes: 4,
                activation: Nonlinearity::LeakyRelu,
                batch_norm: false,
            };
            let config_hyper = MipConfig::new(1).with_hidden(&[8]).with_select(&[select]);
            let net = kiln_nn::initialise(&device, &mut rng, |device| config.init(device));
            let model = config_hyper.draw(net, &mut rng, &device).unwrap();
            let together = forward(&model, &model.generate(gammas.clone()).unwrap(), x.clone()).unwrap();
            for row in 0..3 {
                let gamma = gammas.clone().narrow(0, row, 1).squeeze_dim::<1>(0);
                let alone = model.instantiate(gamma).unwrap().forward(x.clone().narrow(0, row, 1));
                let apart = (alone.clone() - together.clone().narrow(0, row, 1)).abs().max();
                assert!(apart.into_scalar::<f32>() < 1e-4, "{:?} {row}", config.arch);
            }
        }
    }
}
