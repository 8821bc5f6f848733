//! The next-token loss, in nats.

use burn::tensor::{Int, Tensor};
use kiln_ops::{CrossEntropyOptions, cross_entropy};

/// Mean negative log-likelihood of the targets, in nats a token.
///
/// # Shapes
/// - logits: `[batch, time, vocab]`
/// - targets: `[batch, time]`
/// - output: `[1]`
pub fn next_token_loss(logits: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<1> {
    token_nll(logits, targets).mean()
}

/// Negative log-likelihood of every target, in nats.
///
/// # Shapes
/// - logits: `[batch, time, vocab]`
/// - targets: `[batch, time]`
/// - output: `[batch, time]`
pub fn token_nll(logits: Tensor<3>, targets: Tensor<2, Int>) -> Tensor<2> {
    let [batch, time, vocab] = logits.dims();
    let rows = batch * time;
    let losses = cross_entropy(
        logits.reshape([rows, vocab]),
        targets.reshape([rows]),
        &CrossEntropyOptions::default(),
    );
    losses.reshape([batch, time])
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn nll_is_the_log_of_the_softmax_even_for_huge_logits() {
        let device = Device::flex();
        // Probabilities of the first row: 1/4, 3/4; of the second: 1, 0 up to e^-1000.
        let ln3 = 3f32.ln();
        let logits = Tensor::<3>::from_floats([[[0.0, ln3], [1000.0, 0.0]]], &device);
        let targets = Tensor::<2, Int>::from_ints([[0, 1]], &device);
        let nll = token_nll(logits.clone(), targets.clone()).into_data().try_to_vec::<f32>().unwrap();
        assert!((nll[0] - 4f32.ln()).abs() < 1e-6 && (nll[1] - 1000.0).abs() < 1e-3, "{nll:?}");
        let mean = next_token_loss(logits, targets).into_scalar::<f32>();
        assert!((mean - (4f32.ln() + 1000.0) / 2.0).abs() < 1e-3);
    }
}
