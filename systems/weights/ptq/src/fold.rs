//! A batch norm after a layer is part of the layer: `γ (w x + b - μ) / √(v + ε) + β = (k w) x + (b - μ) k + β` with
//! `k = γ / √(v + ε)`.

/// Statistics and parameters of a batch norm, one number a channel.
#[derive(Debug, Clone, Copy)]
pub struct BatchNorm<'a> {
    /// γ
    pub gamma: &'a [f64],
    /// β
    pub beta: &'a [f64],
    /// μ
    pub mean: &'a [f64],
    /// v
    pub variance: &'a [f64],
    /// ε
    pub epsilon: f64,
}

impl BatchNorm<'_> {
    /// What each channel is multiplied by and what is added to it: `k` and `β - μ k`.
    pub fn affine(&self) -> (Vec<f64>, Vec<f64>) {
        let factors: Vec<f64> = self
            .gamma
            .iter()
            .zip(self.variance)
            .map(|(gamma, v)| gamma / (v + self.epsilon).sqrt())
            .collect();
        let terms = self.beta.iter().zip(self.mean).zip(&factors).map(|((beta, mean), k)| beta - mean * k);
        let terms = terms.collect();
        (factors, terms)
    }
}

/// Puts `factor y + term` of each channel's output into a layer's weights `[channels, ..]` and bias.
pub fn fold(weights: &mut [f64], bias: &mut [f64], factors: &[f64], terms: &[f64]) {
    let width = weights.len() / bias.len().max(1);
    for (channel, row) in weights.chunks_mut(width.max(1)).enumerate() {
        row.iter_mut().for_each(|w| *w *= factors[channel]);
        bias[channel] = bias[channel] * factors[channel] + terms[channel];
    }
}
