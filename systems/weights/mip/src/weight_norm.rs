//! Weight norm (Salimans and Kingma, NeurIPS 2016, arXiv 1602.07868) of weights that a hypernetwork makes: of what it makes
//! only the direction counts, and the length of each output's weights is learned apart.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use kiln_core::Result;
use kiln_nn::{ParamSpec, WeightSpec};

/// Added to squared lengths.
const EPSILON: f64 = 1e-12;

/// A tensor of `values [batch, numel]` with the weights of an output in a row, `[batch, outputs, inputs]`; `None` for a bias.
fn rows(param: &ParamSpec, values: Tensor<2>) -> Option<Tensor<3>> {
    param.fan_in()?;
    let batch = values.dims()[0];
    Some(match is_transposed(param) {
        true => values.reshape([batch, param.shape[0], param.shape[1]]).swap_dims(1, 2),
        false => values.reshape([batch, param.shape[0], param.len() / param.shape[0]]),
    })
}

/// Whether outputs are the last axis.
fn is_transposed(param: &ParamSpec) -> bool {
    param.holder == "Linear" && param.shape.len() == 2
}

fn lengths(rows: Tensor<3>) -> Tensor<3> {
    (rows.powi_scalar(2).sum_dim(2) + EPSILON).sqrt()
}

/// What lengths begin as, one for every tensor that has weights: those that the network has of its own.
///
/// # Errors
/// When the network lacks a tensor.
pub(crate) fn own_lengths<M: Module>(module: &M, spec: &WeightSpec) -> Result<Vec<Param<Tensor<1>>>> {
    let values = spec.read(module)?.unsqueeze_dim::<2>(0);
    let mut start = 0;
    let found = spec.params().iter().filter_map(|param| {
        let part = values.clone().narrow(1, start, param.len());
        start += param.len();
        Some(Param::from_tensor(lengths(rows(param, part)?).flatten::<1>(0, 2)))
    });
    Ok(found.collect())
}

/// Weights `[batch, numel]` with every output's brought to its length.
pub(crate) fn normalised(theta: Tensor<2>, spec: &WeightSpec, own: &[Param<Tensor<1>>]) -> Tensor<2> {
    let (batch, mut start, mut wanted) = (theta.dims()[0], 0, own.iter());
    let parts = spec.params().iter().map(|param| {
        let part = theta.clone().narrow(1, start, param.len());
        start += param.len();
        let Some((rows, length)) = rows(param, part.clone()).and_then(|rows| Some((rows, wanted.next()?)))
        else {
            return part;
        };
        let length = length.val();
        let outputs = length.dims()[0];
        let scaled = rows.clone() / lengths(rows) * length.reshape([1, outputs, 1]);
        let scaled = if is_transposed(param) { scaled.swap_dims(1, 2) } else { scaled };
        scaled.reshape([batch, param.len()])
    });
    Tensor::cat(parts.collect(), 1)
}

#[cfg(test)]
mod tests {
    use crate::MipConfig;
    use burn::tensor::{Device, Tensor};
    use kiln_nn::LinearConfig;

    #[test]
    fn only_the_direction_of_what_is_made_counts() {
        let device = Device::flex();
        let net = LinearConfig::new(3, 2).init(&device);
        let config = MipConfig { weight_norm: true, ..MipConfig::new(1).with_hidden(&[4]) };
        let model = config.init(net.clone(), &device).unwrap();
        assert_eq!(model.lengths.len(), 1, "the bias has none");
        let columns = |weight: Tensor<2>| -> Vec<f32> {
            weight.powi_scalar(2).sum_dim(0).sqrt().into_data().iter().collect()
        };
        let own = columns(net.weight.val());
        for gamma in [0.1, 0.9] {
            let made = model.instantiate(Tensor::from_floats([gamma], &device)).unwrap();
            for (own, made) in own.iter().zip(columns(made.weight.val())) {
                assert!((own - made).abs() < 1e-5, "{own} {made}");
            }
        }
    }
}
