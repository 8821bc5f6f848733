//! Where and at which frequencies a recording says what it says: gradient times input.
//!
//! The evidence is the difference of the two classes' log-probabilities. To first order it is `Σ x g` over channels and time,
//! with the gradient `g` at the input `x`; by Parseval's theorem the sum over time is one over frequencies,
//! `Σ_f Re(X_f conj(G_f)) / n`, which is cut into bands.

use burn::module::Module;
use burn::tensor::Tensor;
use kiln_core::{Context, Error, Result};
use rustfft::FftPlanner;
use rustfft::num_complex::Complex;

use crate::model::Model;
use crate::shift::BANDS;
use crate::windows::WindowSet;

/// Windows that pass through a network at once.
const AT_ONCE: usize = 32;

/// What each channel's bands contribute to the evidence for pathology, `[channels][bands]`, in the mean over windows; negative
/// where they speak for normal.
///
/// # Errors
/// When a recording cannot be read.
pub fn relevance(model: &Model, windows: &WindowSet, rate: f64, cx: &Context) -> Result<Vec<Vec<f64>>> {
    // Nothing learns: batch norms keep their statistics, dropout drops nothing.
    let model = model.clone().freeze();
    let device = cx.device.clone().autodiff();
    let length = windows.length;
    let forward = FftPlanner::new().plan_fft_forward(length);
    let spectrum = |signal: &[f32]| {
        let mut spectrum: Vec<Complex<f64>> = signal.iter().map(|&x| Complex::new(x.into(), 0.0)).collect();
        forward.process(&mut spectrum);
        spectrum
    };
    let mut sums = vec![vec![0.0; BANDS.len()]; windows.channels()];
    let all: Vec<usize> = (0..windows.len()).collect();
    for chunk in all.chunks(AT_ONCE) {
        let samples = windows.samples(chunk)?;
        let x = windows.to_tensor(samples.clone(), &device).require_grad();
        let logits: Tensor<3> = model.forward(x.clone()).mean_dim(2);
        let evidence = logits.clone().narrow(1, 1, 1) - logits.narrow(1, 0, 1);
        let gradients = evidence.sum().backward();
        let gradient =
            x.grad(&gradients).ok_or_else(|| Error::work("the network does not depend on its input"))?;
        let gradient: Vec<f32> = gradient.into_data().iter().collect();
        for (place, (x, g)) in samples.chunks(length).zip(gradient.chunks(length)).enumerate() {
            let (x, g) = (spectrum(x), spectrum(g));
            let row = &mut sums[place % windows.channels()];
            for (sum, (_, [low, high])) in row.iter_mut().zip(BANDS) {
                let band = (1..length.div_ceil(2))
                    .filter(|&at| (low..high).contains(&(at as f64 * rate / length as f64)));
                // Twice, for the negative frequencies.
                *sum += band.map(|at| 2.0 * (x[at] * g[at].conj()).re).sum::<f64>() / length as f64;
            }
        }
    }
    let count = windows.len().max(1) as f64;
    sums.iter_mut().flatten().for_each(|sum| *sum /= count);
    Ok(sums)
}
