//! How good the networks of a space are, and how fast.

use std::fs;
use std::path::Path;
use std::time::Instant;

use burn::module::ModuleDisplay;
use burn::tensor::{Tensor, activation};
use kiln_core::{Context, Error, Plot, Result, Table};
use kiln_data::{Images, write_csv};
use kiln_nn::likeliest;
use serde::{Deserialize, Serialize};

use crate::anchor::Anchor;
use crate::data::Scaling;
use crate::pareto::{Pareto, Point};
use crate::snnet::SnNet;
use crate::space::StitchSpace;

/// Images that pass through a network at once when nothing is learned.
const AT_ONCE: usize = 256;
/// Times that a network is timed, after one run that is not.
const REPETITIONS: usize = 15;

/// Class probabilities of images, `[image][class]`.
///
/// # Errors
/// As `forward`, and when a logit is not finite.
pub fn predict(
    images: &Images,
    scaling: &Scaling,
    cx: &Context,
    forward: impl Fn(Tensor<4>) -> Result<Tensor<2>>,
) -> Result<Vec<Vec<f32>>> {
    let mut all = Vec::with_capacity(images.len());
    let indices: Vec<usize> = (0..images.len()).collect();
    for chunk in indices.chunks(AT_ONCE) {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped while images were classified"));
        }
        let logits = forward(scaling.tensor(images, chunk, &cx.device))?;
        let classes = logits.dims()[1];
        let values: Vec<f32> = activation::softmax(logits, 1).into_data().iter().collect();
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::work("the network gives logits that are not finite")
                .hint("its training went wrong: train it again with a lower learning rate"));
        }
        all.extend(values.chunks(classes).map(<[f32]>::to_vec));
    }
    Ok(all)
}

/// How well probabilities agree with labels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// Share of images whose likeliest class is right.
    pub accuracy: f64,
    /// Mean negative log-likelihood of the labels, in nats.
    pub nll: f64,
}

/// Compares probabilities with labels.
pub fn scores(probabilities: &[Vec<f32>], labels: &[usize]) -> Agreement {
    let pairs = || probabilities.iter().zip(labels);
    let count = labels.len() as f64;
    let surprise = |p: f32| -f64::from(p.max(f32::MIN_POSITIVE)).ln();
    Agreement {
        accuracy: pairs().filter(|(row, label)| likeliest(row) == **label).count() as f64 / count,
        nll: pairs().map(|(row, &label)| surprise(row[label])).sum::<f64>() / count,
    }
}

/// What is known of one network of a space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Its id.
    pub config: usize,
    /// Its name.
    pub name: String,
    /// Multiplications that are added up, for one image.
    pub flops: u64,
    /// Trained numbers.
    pub params: u64,
    /// Median milliseconds of a batch, where it was timed.
    pub latency_ms: Option<f64>,
    /// Share of the test images that it classifies rightly.
    pub acc: f64,
}

/// Accuracy of every network of a space.
///
/// # Errors
/// As [`predict`].
pub fn evaluate<A: Anchor + ModuleDisplay>(
    net: &SnNet<A>,
    images: &Images,
    scaling: &Scaling,
    cx: &Context,
) -> Result<Vec<Score>> {
    let bar = cx.progress(net.space().len() as u64, "networks");
    let space = net.space();
    let score = |(config, configuration)| {
        let probabilities = predict(images, scaling, cx, |x| net.forward_with(config, x))?;
        bar.inc(1);
        let cost = space.cost(configuration);
        Ok(Score {
            config,
            name: configuration.name(),
            flops: cost.flops,
            params: cost.params,
            latency_ms: None,
            acc: scores(&probabilities, &images.labels).accuracy,
        })
    };
    space.configurations().iter().enumerate().map(score).collect()
}

/// Median milliseconds of every network for a batch of images. The networks take turns, so that whatever else the machine
/// does falls on all of them.
///
/// # Errors
/// When the user stopped it.
pub fn latencies<A: Anchor + ModuleDisplay>(
    net: &SnNet<A>,
    batch: Tensor<4>,
    cx: &Context,
) -> Result<Vec<f64>> {
    let count = net.space().len();
    let bar = cx.progress((count * (REPETITIONS + 1)) as u64, "timing");
    let mut times = vec![Vec::with_capacity(REPETITIONS); count];
    for round in 0..=REPETITIONS {
        for (id, times) in times.iter_mut().enumerate() {
            if cx.interrupted() {
                return Err(Error::interrupted("stopped while networks were timed"));
            }
            let begun = Instant::now();
            net.forward_with(id, batch.clone())?.into_data();
            if round > 0 {
                times.push(1e3 * begun.elapsed().as_secs_f64());
            }
            bar.inc(1);
        }
    }
    Ok(times.into_iter().map(median).collect())
}

/// The middle of some figures, the upper of two.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Writes scores as CSV: `config,name,flops,params,latency_ms,acc`.
///
/// # Errors
/// When the file cannot be written.
pub fn write_scores(path: &Path, scores: &[Score]) -> Result<()> {
    write_csv(path, scores)
}

/// Reads scores of the networks of a space.
///
/// # Errors
/// When the file cannot be read or belongs to another space.
pub fn read_scores(path: &Path, space: &StitchSpace) -> Result<Vec<Score>> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    let mut scores: Vec<Score> = Vec::new();
    for (row, record) in csv::Reader::from_reader(&text[..]).deserialize().enumerate() {
        let score: Score = record.map_err(|e| {
            Error::input(path.display(), format!("row {} is not one of scores", row + 1))
                .caused_by(e)
                .hint("expected config,name,flops,params,latency_ms,acc as `kiln stitch eval` writes it")
        })?;
        let name = space.configurations().get(score.config).map(crate::space::Configuration::name);
        if name.as_ref() != Some(&score.name) {
            let found = format!("row {} says that configuration {} is {}", row + 1, score.config, score.name);
            return Err(Error::input(path.display(), found)
                .hint("the file belongs to another model: write it anew with `kiln stitch eval`"));
        }
        let finite = score.acc.is_finite() && score.latency_ms.is_none_or(f64::is_finite);
        if !finite {
            return Err(Error::input(
                path.display(),
                format!("row {} has a figure that is no number", row + 1),
            ));
        }
        scores.push(score);
    }
    if scores.is_empty() {
        return Err(Error::input(path.display(), "holds no scores")
            .hint("expected config,name,flops,params,latency_ms,acc as `kiln stitch eval` writes it"));
    }
    Ok(scores)
}

/// What a budget is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Millions of FLOPs.
    MegaFlops,
    /// Milliseconds.
    Milliseconds,
}

impl Score {
    /// The cost in units of the measure, where it is known.
    pub fn cost(&self, measure: Measure) -> Option<f64> {
        match measure {
            Measure::MegaFlops => Some(self.flops as f64 / 1e6),
            Measure::Milliseconds => self.latency_ms,
        }
    }
}

/// The networks among which a budget chooses.
///
/// # Errors
/// When latencies are asked for that nobody measured.
pub fn pareto(scores: &[Score], measure: Measure) -> Result<Pareto> {
    let point = |score: &Score| {
        let cost = score.cost(measure).ok_or_else(|| {
            Error::usage(format!("the latency of configuration {} was not measured", score.config))
                .hint("measure it on this machine with `kiln stitch eval --latency`")
        })?;
        Ok(Point { id: score.config, cost, accuracy: score.acc })
    };
    Pareto::new(scores.iter().map(point).collect::<Result<_>>()?)
}

/// A network that does not belong to the space, for comparison.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rival {
    /// What it is.
    pub name: String,
    /// Multiplications that are added up, for one image.
    pub flops: u64,
    /// Share of the test images that it classifies rightly.
    pub acc: f64,
}

/// Every network in a table; those whose ids are on the `front` are marked.
pub fn listing(scores: &[Score], rivals: &[Rival], front: &[usize]) -> Table {
    let columns =
        ["config", "network", "MFLOPs", "parameters", "ms a batch", "accuracy, %", "on the Pareto front"];
    let mut table = Table::new("Every network", &columns);
    let (mega, percent) =
        (|flops: u64| format!("{:.3}", flops as f64 / 1e6), |acc| format!("{:.2}", 100.0 * acc));
    for Score { config, name, flops, params, latency_ms, acc } in scores {
        table.row([
            config.to_string(),
            name.clone(),
            mega(*flops),
            params.to_string(),
            latency_ms.map_or(String::new(), |ms| format!("{ms:.3}")),
            percent(*acc),
            if front.contains(config) { "yes" } else { "" }.into(),
        ]);
    }
    for Rival { name, flops, acc } in rivals {
        let none = String::new;
        table.row([none(), name.clone(), mega(*flops), none(), none(), percent(*acc), none()]);
    }
    table
}

/// Accuracy over cost: anchors, stitches, and which of them nothing dominates.
///
/// # Errors
/// As [`pareto`].
pub fn plot(
    title: &str,
    space: &StitchSpace,
    scores: &[Score],
    rivals: &[Rival],
    measure: Measure,
) -> Result<Plot> {
    let front: Vec<usize> = pareto(scores, measure)?.front().iter().map(|point| point.id).collect();
    let points = |wanted: &dyn Fn(usize, bool) -> bool| -> Vec<(f64, f64)> {
        let chosen = scores.iter().filter(|score| {
            let anchor = space.configurations().get(score.config).is_some_and(|c| c.is_anchor());
            wanted(score.config, anchor)
        });
        chosen.filter_map(|score| Some((score.cost(measure)?, 100.0 * score.acc))).collect()
    };
    let x = match measure {
        Measure::MegaFlops => "MFLOPs an image",
        Measure::Milliseconds => "ms a batch",
    };
    let groups = [
        ("stitches", points(&|id, anchor| !anchor && !front.contains(&id))),
        ("stitches on the Pareto front", points(&|id, anchor| !anchor && front.contains(&id))),
        ("anchors", points(&|id, anchor| anchor && !front.contains(&id))),
        ("anchors on the Pareto front", points(&|id, anchor| anchor && front.contains(&id))),
    ];
    let mut plot = Plot::points(title, x, "accuracy, %");
    for (name, points) in groups.into_iter().filter(|(_, points)| !points.is_empty()) {
        plot = plot.series(name, points);
    }
    if measure == Measure::MegaFlops {
        for rival in rivals {
            plot = plot.series(&rival.name, vec![(rival.flops as f64 / 1e6, 100.0 * rival.acc)]);
        }
    }
    Ok(plot)
}
