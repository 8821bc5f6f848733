//! The problem that the parametrisation removes (§3 of the paper): the weights that a hypernetwork makes, what passes
//! through them and the gradients scale with the condition.

use burn::module::{Module, ModuleDisplay, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};
use kiln_core::{Error, Plot, Result};
use kiln_nn::{ParamSpec, WeightSpec};
use serde::Serialize;

use crate::convert::MipHyper;

/// How something depends on the condition.
#[derive(Debug, Clone, Serialize)]
pub struct Dependence {
    /// What was measured.
    pub name: String,
    /// Its size at each condition.
    pub sizes: Vec<f64>,
    /// Slope of its logarithm over that of the condition: 1 is fully proportional, 0 invariant.
    pub slope: f64,
    /// Pearson's correlation of size and condition.
    pub correlation: f64,
    /// The largest size over the smallest.
    pub ratio: f64,
}

impl Dependence {
    fn new(name: impl Into<String>, gammas: &[f64], sizes: Vec<f64>) -> Self {
        let logarithms = |values: &[f64]| values.iter().map(|x| x.ln()).collect::<Vec<_>>();
        let (x, y) = (logarithms(gammas), logarithms(&sizes));
        let largest = sizes.iter().copied().fold(f64::MIN, f64::max);
        let smallest = sizes.iter().copied().fold(f64::MAX, f64::min);
        Self {
            name: name.into(),
            slope: covariance(&x, &y) / covariance(&x, &x),
            correlation: covariance(gammas, &sizes)
                / (covariance(gammas, gammas) * covariance(&sizes, &sizes)).sqrt(),
            ratio: largest / smallest,
            sizes,
        }
    }
}

fn covariance(x: &[f64], y: &[f64]) -> f64 {
    let count = x.len() as f64;
    let (mean_x, mean_y) = (x.iter().sum::<f64>() / count, y.iter().sum::<f64>() / count);
    x.iter().zip(y).map(|(x, y)| (x - mean_x) * (y - mean_y)).sum::<f64>() / count
}

/// What [`measure`] found.
#[derive(Debug, Clone, Serialize)]
pub struct ProportionalityReport {
    /// The conditions; each number stands for all components that are numbers, and categories are the first.
    pub gammas: Vec<f64>,
    /// Standard deviation of each tensor that is made.
    pub weights: Vec<Dependence>,
    /// Standard deviation of all weights that are made.
    pub all_weights: Dependence,
    /// Root mean square of what each layer of the network puts out.
    pub activations: Vec<Dependence>,
    /// Norm of the gradient with respect to the hypernetwork's parameters.
    pub gradient: Dependence,
}

/// What a network computed on a probe.
pub struct Probe {
    /// Root mean squares of what its layers put out.
    pub activations: Vec<Tensor<1>>,
    /// A loss.
    pub loss: Tensor<1>,
}

/// Measures how weights, activations and gradients depend on the condition. `probe` runs a network on data.
///
/// # Errors
/// When there are fewer than two conditions, or one is not positive.
pub fn measure<M: Module + ModuleDisplay>(
    model: &MipHyper<M>,
    gamma_dim: usize,
    gammas: &[f64],
    device: &Device,
    probe: impl Fn(&M) -> Probe,
) -> Result<ProportionalityReport> {
    if gammas.len() < 2 || !gammas.iter().all(|g| g.is_finite() && *g > 0.0) {
        return Err(Error::usage("proportionality is measured over two or more positive conditions"));
    }
    if gamma_dim > 0 && model.hyper.diagonal(1.0, gamma_dim).iter().all(|component| *component == 0.0) {
        return Err(Error::usage("no component of the condition is a number")
            .hint("proportionality is about numbers: categories have no size"));
    }
    let model = model.clone().train();
    let (mut weights, mut all, mut activations, mut gradients) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for &gamma in gammas {
        let condition = Tensor::<1>::from_floats(model.hyper.diagonal(gamma, gamma_dim).as_slice(), device);
        let theta = model.generate(condition.clone().unsqueeze_dim::<2>(0))?.squeeze_dim::<1>(0);
        let values: Vec<f32> = theta.into_data().iter().collect();
        all.push(deviation(&values));
        weights.push(by_tensor(&values, model.spec()));
        let Probe { activations: sizes, loss } = probe(&model.instantiate(condition)?);
        let sizes: Vec<f64> = sizes.into_iter().map(|size| size.into_scalar::<f32>().into()).collect();
        activations.push(sizes);
        let mut norm = GradientNorm { gradients: &loss.backward(), squares: 0.0 };
        model.hyper.visit(&mut norm);
        gradients.push(norm.squares.sqrt());
    }
    let column = |rows: &[Vec<f64>], index: usize| rows.iter().map(|row| row[index]).collect();
    let names = model.spec().params().iter().map(|param| param.name.as_str());
    Ok(ProportionalityReport {
        gammas: gammas.to_vec(),
        weights: names
            .enumerate()
            .map(|(index, name)| Dependence::new(name, gammas, column(&weights, index)))
            .collect(),
        all_weights: Dependence::new("all weights", gammas, all),
        activations: (0..activations[0].len())
            .map(|index| Dependence::new(format!("layer {}", index + 1), gammas, column(&activations, index)))
            .collect(),
        gradient: Dependence::new("gradient", gammas, gradients),
    })
}

/// Deviation of each tensor's part of the weights.
fn by_tensor(mut theta: &[f32], spec: &WeightSpec) -> Vec<f64> {
    let part = |param: &ParamSpec| {
        let (part, rest) = theta.split_at(param.len());
        theta = rest;
        deviation(part)
    };
    spec.params().iter().map(part).collect()
}

fn deviation(values: &[f32]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
    (values.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count).sqrt()
}

struct GradientNorm<'a> {
    gradients: &'a Gradients,
    squares: f64,
}

impl ModuleVisitor for GradientNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad(self.gradients) {
            self.squares += f64::from(gradient.powi_scalar(2).sum().into_scalar::<f32>());
        }
    }
}

impl ProportionalityReport {
    /// Everything that was measured: all weights, those of each tensor, what each layer puts out, the gradient.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, &Dependence)> {
        let named = |kind: &'static str| move |found| (kind, found);
        let weights = [&self.all_weights].into_iter().chain(&self.weights).map(named("weights"));
        weights.chain(self.activations.iter().map(named("activations"))).chain([("gradient", &self.gradient)])
    }

    /// Sizes over the condition, relative to the largest condition's.
    pub fn plot(&self) -> Plot {
        let line = |dependence: &Dependence| {
            let last = dependence.sizes.last().copied().unwrap_or(1.0);
            self.gammas.iter().zip(&dependence.sizes).map(|(&gamma, size)| (gamma, size / last)).collect()
        };
        let plot = Plot::lines("Sizes over the condition", "γ", "size, relative to the last").log_x().log_y();
        let plot =
            plot.series("all weights", line(&self.all_weights)).series("gradient", line(&self.gradient));
        self.activations.iter().fold(plot, |plot, layer| plot.series(layer.name.clone(), line(layer)))
    }
}
