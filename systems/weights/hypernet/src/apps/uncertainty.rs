//! Networks that know what they do not know: noise in, and the weights are a distribution.
//!
//! The loss is the mean cross-entropy of a few draws, with two further terms that make it a variational bound up to
//! constants: a Gaussian prior on the weights, and their entropy, which keeps the draws apart. The entropy is estimated
//! from the distance of each draw to its nearest neighbour (Kozachenko and Leonenko). Baselines: one network, one with
//! dropout that stays on (Gal and Ghahramani, arXiv 1506.02142), and an ensemble of five.

use burn::tensor::Tensor;
use kiln_core::{Context, Plot, Result, Table};
use kiln_data::{ImageOptions, Images, digits, roc_auc, shared_dir};

use crate::apps::continual::entropy;
use crate::apps::{Findings, Parts, Spread};
use crate::conditioning::{Condition, Conditioning, NoiseLaw};
use crate::generator::Arch;
use crate::hypernet::{HyperNetConfig, OutputScheme};
use crate::target::{Layer, Target};
use crate::training::{Fit, Labelled, Plain, accuracy, cross_entropy, fit, normals, probabilities};

/// Classes that are trained on; the others are strange to the networks.
const KNOWN: [u8; 8] = [0, 1, 2, 3, 4, 5, 6, 7];
const STRANGE: [u8; 2] = [8, 9];
/// Images of clothes.
const CLOTHES: usize = 500;
/// Width of the noise.
const NOISE: usize = 8;
/// Draws a step.
const DRAWS: usize = 5;
/// Standard deviation of the prior of a weight.
const PRIOR: f64 = 0.3;
/// Networks of the ensemble.
const ENSEMBLE: usize = 5;
/// Probability that dropout drops a unit.
const DROPOUT: f64 = 0.2;

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Optimisation steps.
    pub steps: usize,
    /// Draws that a prediction averages.
    pub samples: usize,
    /// Factor of prior and entropy; 1 is the bound itself.
    pub temper: f64,
    /// Repetitions.
    pub seeds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { steps: 1000, samples: 20, temper: 0.05, seeds: 1 }
    }
}

/// How good a distribution over classes is.
#[derive(Debug, Clone, Copy)]
pub struct Quality {
    /// Share of rows whose likeliest class is right.
    pub accuracy: f64,
    /// Mean negative log-likelihood, nats.
    pub nll: f64,
    /// Expected calibration error over 15 bins.
    pub ece: f64,
}

/// Mean negative log-likelihood in nats.
pub fn mean_nll(probabilities: &[f32], classes: &[usize]) -> f64 {
    let width = probabilities.len() / classes.len();
    let nll = |(row, &class): (&[f32], &usize)| -f64::from(row[class]).max(1e-12).ln();
    probabilities.chunks(width).zip(classes).map(nll).sum::<f64>() / classes.len() as f64
}

/// Expected calibration error: how far accuracy and confidence are apart in bins of equal width, weighted by the rows in
/// them (Guo et al., arXiv 1706.04599).
pub fn calibration_error(probabilities: &[f32], classes: &[usize], bins: usize) -> f64 {
    let width = probabilities.len() / classes.len();
    let mut sums = vec![(0.0f64, 0.0f64); bins];
    for (row, &class) in probabilities.chunks(width).zip(classes) {
        let best = kiln_nn::likeliest(row);
        let confidence = f64::from(row[best]);
        let bin = &mut sums[((confidence * bins as f64) as usize).min(bins - 1)];
        bin.0 += confidence;
        bin.1 += f64::from(u8::from(best == class));
    }
    sums.iter().map(|(confidence, right)| (confidence - right).abs()).sum::<f64>() / classes.len() as f64
}

/// Rows of known classes, and rows of which a network should not be sure.
#[derive(Debug, Clone)]
pub struct Known {
    /// Rows of known classes.
    pub parts: Parts,
    /// Names and rows of what is strange.
    pub strange: Vec<(String, Labelled)>,
}

impl Known {
    /// Digits 0 to 7; strange are 8 and 9, and clothes where the shared data are.
    ///
    /// # Errors
    /// When a file there is damaged.
    pub fn bundled() -> Result<Self> {
        let mut strange = vec![("8 and 9".to_string(), Labelled::digits(digits::test(), &STRANGE))];
        let clothes = shared_dir().map(|dir| dir.join("data/fashion-mnist/t10k-images-idx3-ubyte.gz"));
        if let Some(path) = clothes.filter(|path| path.exists()) {
            let images = Images::read(&path, &ImageOptions { unlabelled: true, ..ImageOptions::default() })?;
            let images = images.select(&(0..images.len().min(CLOTHES)).collect::<Vec<_>>());
            let x: Vec<f32> =
                (0..images.len()).flat_map(|i| shrunk(images.image(i), images.shape[1])).collect();
            let y = vec![0; images.len()];
            strange.push(("Fashion-MNIST".to_string(), Labelled { width: digits::PIXELS, x, y }));
        }
        Ok(Self { parts: Parts::digits(&KNOWN), strange })
    }
}

/// A square image as 8 × 8 pixels, each the mean of the area that it covers.
fn shrunk(image: &[f32], side: usize) -> Vec<f32> {
    const SIDE: usize = 8;
    let step = side as f32 / SIDE as f32;
    let share = |new: usize, old: usize| {
        let (from, to) = (new as f32 * step, (new + 1) as f32 * step);
        ((to.min(old as f32 + 1.0) - from.max(old as f32)) / step).max(0.0)
    };
    let pixel = |row: usize, column: usize| -> f32 {
        let of_row =
            |old: usize| -> f32 { (0..side).map(|at| share(column, at) * image[old * side + at]).sum() };
        (0..side)
            .map(|old| share(row, old))
            .enumerate()
            .filter(|(_, s)| *s > 0.0)
            .map(|(old, s)| s * of_row(old))
            .sum()
    };
    (0..SIDE * SIDE).map(|at| pixel(at / SIDE, at % SIDE)).collect()
}

/// Compares four ways to a distribution over classes.
///
/// # Errors
/// When the configuration makes no sense, or a training fails or is stopped.
pub fn run(config: &Config, images: &Known, cx: &Context) -> Result<(Findings, [f64; 2])> {
    if config.samples == 0 {
        return Err(kiln_core::Error::usage("a prediction needs at least one draw").hint("raise --samples"));
    }
    let mut all: Vec<Vec<Judged>> = Vec::new();
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("uncertainty, seed {}", cx.seed));
        all.push(vec![
            judge("hypernetwork", images, hyper(config, images, cx)?),
            judge("one network", images, ensemble(1, config, images, cx)?),
            judge("dropout", images, dropout(config, images, cx)?),
            judge("ensemble of 5", images, ensemble(ENSEMBLE, config, images, cx)?),
        ]);
    }
    let mut columns = ["method", "accuracy", "NLL", "calibration error"].map(String::from).to_vec();
    columns.extend(images.strange.iter().map(|(name, _)| format!("AUROC of entropy, {name}")));
    let mut table = Table::new(
        format!("Knowing what one does not know: {} ({} draws)", images.parts.name, config.samples),
        &columns.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    let spread = |method: usize, pick: fn(&Quality) -> f64| {
        Spread::of(&all.iter().map(|methods| pick(&methods[method].quality)).collect::<Vec<_>>())
    };
    for (number, judged) in all[0].iter().enumerate() {
        let mut cells = vec![
            judged.name.to_string(),
            spread(number, |q| q.accuracy).text(),
            spread(number, |q| q.nll).text(),
            spread(number, |q| q.ece).text(),
        ];
        for set in 0..images.strange.len() {
            let areas: Vec<f64> = all.iter().map(|methods| methods[number].areas[set]).collect();
            cells.push(Spread::of(&areas).text());
        }
        table.row(cells);
    }
    let mut plot = Plot::lines("Entropy of the prediction", "nats", "share of rows at or below");
    let kinds = || std::iter::once("known").chain(images.strange.iter().map(|(name, _)| name.as_str()));
    for Judged { name, entropies, .. } in &all[0][..2] {
        for (kind, values) in kinds().zip(entropies) {
            let mut values = values.clone();
            values.sort_by(f64::total_cmp);
            let count = values.len() as f64;
            let points = values.iter().enumerate().map(|(i, &v)| (v, (i + 1) as f64 / count)).collect();
            plot = plot.series(format!("{name}, {kind}"), points);
        }
    }
    let notes = vec![format!(
        "Uncertainty: {} steps, seeds: {}; the hypernetwork's prior has deviation {PRIOR}, prior and entropy count {} times.",
        config.steps, config.seeds, config.temper
    )];
    let nll = [spread(0, |q| q.nll).mean, spread(1, |q| q.nll).mean];
    Ok((Findings { table, plots: vec![plot], notes }, nll))
}

/// One method.
struct Judged {
    name: &'static str,
    quality: Quality,
    /// Of known test rows, and of each kind of strange rows.
    entropies: Vec<Vec<f64>>,
    /// Area under the ROC curve of the entropy, each kind of strange rows against known ones.
    areas: Vec<f64>,
}

/// Probabilities of known test rows, and of each kind of strange rows.
type Predictions = Vec<Vec<f32>>;

fn judge(name: &'static str, images: &Known, found: Predictions) -> Judged {
    let classes = images.parts.classes;
    let entropies = |p: &Vec<f32>| p.chunks(classes).map(entropy).collect::<Vec<f64>>();
    let entropies: Vec<Vec<f64>> = found.iter().map(entropies).collect();
    let (known, y) = (&found[0], &images.parts.test.y);
    let quality = Quality {
        accuracy: accuracy(known, y),
        nll: mean_nll(known, y),
        ece: calibration_error(known, y, 15),
    };
    // How often a strange row has a higher entropy than a known one.
    let area = |strange: &Vec<f64>| {
        let scores = entropies[0].iter().map(|&e| (false, e)).chain(strange.iter().map(|&e| (true, e)));
        roc_auc(scores).unwrap_or(f64::NAN)
    };
    let areas = entropies[1..].iter().map(area).collect();
    Judged { name, quality, entropies, areas }
}

impl Known {
    fn target(&self) -> Target {
        Target::mlp(&[self.parts.train.width, 32, self.parts.classes])
    }

    /// The known test rows, and each kind of strange ones.
    fn judged(&self) -> impl Iterator<Item = &Labelled> {
        std::iter::once(&self.parts.test).chain(self.strange.iter().map(|(_, rows)| rows))
    }
}

/// The mean of the probabilities of several sets of weights `[sets, N]`.
fn averaged(target: &Target, theta: Tensor<2>, rows: &Labelled, cx: &Context) -> Vec<f32> {
    let sets = theta.dims()[0];
    let (x, _) = rows.tensors(&cx.device);
    let [_, count, width] = x.dims();
    mean_of_sets(&probabilities(target.forward(theta, x.expand([sets, count, width]))), sets)
}

fn mean_of_sets(all: &[f32], sets: usize) -> Vec<f32> {
    let size = all.len() / sets;
    (0..size).map(|i| (0..sets).map(|set| all[set * size + i]).sum::<f32>() / sets as f32).collect()
}

fn hyper(config: &Config, images: &Known, cx: &Context) -> Result<Predictions> {
    const BATCH: usize = 64;
    let target = images.target();
    let hyper_config = HyperNetConfig::new(target.spec()?)
        .with_conditioning([Conditioning::Noise { dim: NOISE, law: NoiseLaw::Normal }])
        .with_scheme(OutputScheme::Heads { by_layer: true })
        .with_arch(Arch::Mlp(vec![32, 32]));
    let rows = images.parts.train.len() as f64;
    let count = target.spec()?.numel() as f64;
    let noise = |stream: &str, number: usize, draws| {
        Condition::noise(normals(draws, NOISE, &mut cx.rng(stream, number as u64), &cx.device))
    };
    let hyper = fit(hyper_config.draw(cx, "hypernet")?, Fit::new(config.steps, 2e-3), cx, |hyper, step| {
        let sets: Vec<Labelled> = (0..DRAWS)
            .map(|draw| images.parts.train.draw(BATCH, &mut cx.rng("batch", (step * DRAWS + draw) as u64)))
            .collect();
        let (x, y) = crate::training::stack(&sets, &cx.device);
        let theta = hyper.generate(&noise("noise", step, DRAWS))?.flat;
        let prior = theta.clone().square().sum() / (2.0 * PRIOR * PRIOR * DRAWS as f64);
        let bound = prior - nearest_log_distance(&theta) * count;
        Ok(cross_entropy(target.forward(theta, x), y) + bound * (config.temper / rows))
    })?;
    let theta = hyper.generate(&noise("draws", 0, config.samples))?.flat;
    Ok(images.judged().map(|rows| averaged(&target, theta.clone(), rows, cx)).collect())
}

/// The mean over draws of the logarithm of the distance to the nearest other draw.
pub(crate) fn nearest_log_distance(theta: &Tensor<2>) -> Tensor<1> {
    let [draws, _] = theta.dims();
    let square = theta.clone().square().sum_dim(1); // [draws, 1]
    let products = theta.clone().matmul(theta.clone().transpose());
    let distances = square.clone() + square.transpose() - products * 2.0;
    // No draw is its own neighbour.
    let far = Tensor::<2>::eye(draws, &theta.device()) * 1e9;
    (distances + far).min_dim(1).clamp_min(1e-9).log().mean() * 0.5
}

fn ensemble(sets: usize, config: &Config, images: &Known, cx: &Context) -> Result<Predictions> {
    let target = images.target();
    let nets =
        fit(Plain::new(&target, sets, cx, "plain")?, Fit::new(config.steps, 2e-3), cx, |nets, step| {
            let batches: Vec<Labelled> = (0..sets)
                .map(|set| images.parts.train.draw(64, &mut cx.rng("batch", (step * DRAWS + set) as u64)))
                .collect();
            let (x, y) = crate::training::stack(&batches, &cx.device);
            // The sum over networks, so that each learns as fast as one alone.
            Ok(cross_entropy(target.forward(nets.theta.val(), x), y) * sets as f64)
        })?;
    Ok(images.judged().map(|rows| averaged(&target, nets.theta.val(), rows, cx)).collect())
}

fn dropout(config: &Config, images: &Known, cx: &Context) -> Result<Predictions> {
    let mut target = images.target();
    target.layers.insert(2, Layer::Dropout { prob: DROPOUT });
    let net = fit(Plain::new(&target, 1, cx, "plain")?, Fit::new(config.steps, 2e-3), cx, |net, step| {
        let (x, y) =
            images.parts.train.draw(64, &mut cx.rng("batch", (step * DRAWS) as u64)).tensors(&cx.device);
        Ok(cross_entropy(target.forward_dropping(net.theta.val(), x, step as u64), y))
    })?;
    let averaged = |rows: &Labelled| {
        let (x, _) = rows.tensors(&cx.device);
        let draws = (0..config.samples as u64)
            .flat_map(|draw| probabilities(target.forward_dropping(net.theta.val(), x.clone(), draw)));
        mean_of_sets(&draws.collect::<Vec<_>>(), config.samples)
    };
    Ok(images.judged().map(averaged).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qualities_by_hand() {
        let p = [0.8f32, 0.2, 0.4, 0.6];
        assert!((mean_nll(&p, &[0, 0]) - (-(0.8f64.ln()) - 0.4f64.ln()) / 2.0).abs() < 1e-6);
        // One right with confidence 0.8, one wrong with 0.6, in bins of their own.
        assert!((calibration_error(&p, &[0, 0], 15) - (0.2 + 0.6) / 2.0).abs() < 1e-6);
        assert_eq!(mean_of_sets(&p, 2), [0.6, 0.4]);
    }

    #[test]
    fn a_shrunk_image_has_the_means_of_the_areas() {
        let even = shrunk(&[0.5; 28 * 28], 28);
        assert!(even.len() == 64 && even.iter().all(|x| (x - 0.5).abs() < 1e-5));
        let rows: Vec<f32> = (0..16 * 16).map(|at| (at / 16) as f32).collect();
        let found = shrunk(&rows, 16);
        assert!((found[0] - 0.5).abs() < 1e-5 && (found[63] - 14.5).abs() < 1e-5);
    }

    #[test]
    fn the_nearest_neighbour_is_another_draw() {
        let theta =
            Tensor::<2>::from_floats([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]], &burn::tensor::Device::flex());
        let found = nearest_log_distance(&theta).into_scalar::<f32>();
        let expected = (0.0 + 18f32.sqrt().ln() + 0.0) / 3.0;
        assert!((found - expected).abs() < 1e-4, "{found} {expected}");
    }
}
