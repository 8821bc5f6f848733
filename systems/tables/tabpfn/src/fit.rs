//! Prior fitting: training the network on synthetic tables (Hollmann et al., §3; Müller et al., arXiv 2112.10510).
//!
//! Every step draws data sets, shows the network the labelled part of each and scores what it says of the rest. The
//! loss is the expected surprise of the posterior predictive distribution: the lower it is, the closer the network is
//! to Bayesian inference under the prior.

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Context, Error, OutputMode, Result};
use kiln_data::write_csv;
use kiln_nn::Task;
use kiln_ops::{CrossEntropyOptions, cross_entropy};
use rand::RngExt;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::calibration::Calibrate;
use crate::classifier::ClassifierOptions;
use crate::evaluate::{Labelled, Method, Protocol, evaluate};
use crate::examples;
use crate::metrics::Scores;
use crate::network::{TabPfn, TabPfnConfig};
use crate::prior::{DataSet, Extents, PriorBag};

/// Fewest labelled rows of a data set.
const FEWEST_LABELLED: usize = 16;
/// Batches that wait ready while the network learns from one.
const AHEAD: usize = 2;
/// Steps' worth of data sets that validation scores.
const VALIDATION_BATCHES: usize = 16;

/// What the network is shown.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct FitConfig {
    /// Rows of a data set in most steps. In a quarter of them data sets are longer and fewer: a quarter of those again
    /// twice as long as the others.
    pub rows: usize,
    /// Data sets of a step.
    pub batch: usize,
    /// What they are drawn from.
    #[serde(flatten)]
    pub prior: PriorBag,
}

impl FitConfig {
    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.rows < 2 * FEWEST_LABELLED {
            return Err(Error::usage(format!("data sets of {} rows are too short", self.rows))
                .hint(format!("they need at least {}", 2 * FEWEST_LABELLED)));
        }
        if self.batch == 0 {
            return Err(Error::usage("a step needs at least one data set"));
        }
        self.prior.check()
    }
}

/// Data sets of the same length, as the network takes them.
struct Batch {
    /// `[batch, rows, max_features]`
    x: TensorData,
    /// `[batch, rows]`
    y: Vec<usize>,
    batch: usize,
    rows: usize,
    labelled: usize,
}

impl Batch {
    /// Draws the data sets of step `step` of a stream.
    fn draw(
        fit: &FitConfig,
        network: &TabPfnConfig,
        stream: &str,
        step: usize,
        cx: &Context,
    ) -> Result<Self> {
        let mut rng = cx.rng(stream, step as u64);
        let doublings = (0..2).take_while(|_| rng.random_range(0..4) == 0).count();
        let rows = fit.rows << doublings;
        let batch = (fit.batch >> doublings).max(1);
        let labelled = rng.random_range(FEWEST_LABELLED..=rows - FEWEST_LABELLED);
        let TabPfnConfig { max_features, max_classes, .. } = *network;
        let extents = Extents { rows, labelled, max_features, max_classes };
        let mut x = Vec::with_capacity(batch * rows * max_features);
        let mut y = Vec::with_capacity(batch * rows);
        for _ in 0..batch {
            let set = fit.prior.sample(&extents, &mut rng)?;
            pad_columns(&set, max_features, &mut x);
            y.extend(set.y);
        }
        Ok(Self { x: TensorData::new(x, [batch, rows, max_features]), y, batch, rows, labelled })
    }

    /// Mean surprise of the rows without labels, and how many there are.
    fn loss(self, model: &TabPfn, device: &Device) -> (Tensor<1>, usize) {
        let Self { x, y, batch, rows, labelled } = self;
        let rows_of = |part: std::ops::Range<usize>| -> Vec<usize> {
            y.chunks(rows).flat_map(|labels| labels[part.clone()].iter().copied()).collect()
        };
        let known: Vec<f32> = rows_of(0..labelled).into_iter().map(|class| class as f32).collect();
        let known = Tensor::<2>::from_data(TensorData::new(known, [batch, labelled]), device);
        let asked: Vec<i64> = rows_of(labelled..rows).into_iter().map(|class| class as i64).collect();
        let count = asked.len();
        let asked = Tensor::<1, Int>::from_data(TensorData::new(asked, [count]), device);
        let logits = model.forward(Tensor::from_data(x, device), known);
        let logits = logits.reshape([count, model.config().max_classes]);
        (cross_entropy(logits, asked, &CrossEntropyOptions::default()).mean(), count)
    }
}

/// Appends the columns of a data set, scaled up as they are fewer and padded with zeros.
fn pad_columns(set: &DataSet, max_features: usize, x: &mut Vec<f32>) {
    let scale = max_features as f32 / set.features as f32;
    for row in set.x.chunks(set.features) {
        x.extend(row.iter().map(|value| value * scale));
        x.resize(x.len() + max_features - set.features, 0.0);
    }
}

/// Prior fitting as the training loop sees it. A thread draws the data sets of coming steps meanwhile.
pub struct PriorFitting {
    fit: FitConfig,
    network: TabPfnConfig,
    cx: Context,
    ahead: Option<(usize, Receiver<Result<Batch>>)>,
    watched: Option<RealTables>,
}

impl PriorFitting {
    /// A run before its first step.
    pub fn new(fit: FitConfig, network: TabPfnConfig, cx: &Context) -> Self {
        Self { fit, network, cx: cx.clone(), ahead: None, watched: None }
    }

    /// Also predicts the tables that come with Kiln at every validation, and writes how well into a CSV file: what no step
    /// has learned from.
    ///
    /// # Errors
    /// When a file from an earlier part of the run is malformed.
    pub fn watching(mut self, path: PathBuf) -> Result<Self> {
        self.watched = Some(RealTables::new(path)?);
        Ok(self)
    }

    /// The batch of a step, which is ready when steps are asked for one after the other.
    fn batch(&mut self, step: usize) -> Result<Batch> {
        let ahead = self.ahead.take().filter(|(next, _)| *next == step);
        let receiver = ahead.map_or_else(|| self.draw_ahead(step), |(_, receiver)| receiver);
        let batch =
            receiver.recv().map_err(|e| Error::work("no data sets are drawn any more").caused_by(e))?;
        self.ahead = Some((step + 1, receiver));
        batch
    }

    /// Draws the batches from step `first` on, until nobody receives them.
    fn draw_ahead(&self, first: usize) -> Receiver<Result<Batch>> {
        let (sender, receiver) = sync_channel(AHEAD);
        let (fit, network, cx) = (self.fit, self.network.clone(), self.cx.clone());
        thread::spawn(move || {
            let mut batches = (first..).map(|step| Batch::draw(&fit, &network, "prior", step, &cx));
            while batches.next().is_some_and(|batch| sender.send(batch).is_ok()) {}
        });
        receiver
    }
}

impl Task<TabPfn> for PriorFitting {
    fn loss(&mut self, model: &TabPfn, step: usize) -> Result<(Tensor<1>, usize)> {
        let batch = self.batch(step)?;
        Ok(batch.loss(model, &self.cx.device))
    }

    fn validate(&mut self, model: &TabPfn) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for index in 0..VALIDATION_BATCHES {
            let batch = Batch::draw(&self.fit, &self.network, "validation", index, &self.cx)?;
            let (loss, rows) = batch.loss(model, &self.cx.device);
            sum += f64::from(loss.into_scalar::<f32>()) * rows as f64;
            count += rows;
        }
        let steps = self.ahead.as_ref().map_or(0, |(next, _)| *next);
        if let Some(watched) = &mut self.watched {
            watched.score(model, steps, &self.cx)?;
        }
        Ok(sum / count as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        let value = serde_json::json!({ "network": self.network, "prior": self.fit });
        value.as_object().cloned().unwrap_or_default()
    }
}

/// Real tables, and how well each was predicted after how many steps.
struct RealTables {
    path: PathBuf,
    tables: Vec<Labelled>,
    lines: Vec<WatchLine>,
}

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct WatchLine {
    /// Steps done.
    step: usize,
    /// The table.
    table: String,
    /// Share of the rows whose class is right.
    accuracy: f64,
    /// One class against one.
    roc_auc: f64,
}

impl RealTables {
    fn new(path: PathBuf) -> Result<Self> {
        let malformed =
            |e: csv::Error| Error::input(path.display(), "is not the file that this run wrote").caused_by(e);
        let lines = match path.exists() {
            true => csv::Reader::from_path(&path).map_err(malformed)?.deserialize().collect::<Result<_, _>>(),
            false => Ok(Vec::new()),
        };
        let lines = lines.map_err(malformed)?;
        let table = |name| Labelled::new(name, examples::table(name)?, examples::TARGET);
        Ok(Self { tables: examples::names().map(table).collect::<Result<_>>()?, lines, path })
    }

    /// Predicts one half of every table from the other with two members.
    fn score(&mut self, model: &TabPfn, step: usize, cx: &Context) -> Result<()> {
        // A resumed run repeats what came after its checkpoint.
        self.lines.retain(|line| line.step < step);
        let options = ClassifierOptions {
            members: Some(2),
            allow_large: true,
            many_class: true,
            // It is the network that is watched.
            calibrate: Calibrate::Off,
            ..ClassifierOptions::default()
        };
        let protocol = Protocol { splits: 1, ..Protocol::default() };
        let quiet = Context { output: OutputMode::Quiet, ..cx.clone() };
        for table in &self.tables {
            let outcomes = evaluate(model, table, &[Method::TabPfn], options, &protocol, &quiet)?;
            let Scores { accuracy, roc_auc, .. } = outcomes[0].mean;
            self.lines.push(WatchLine { step, table: table.name.clone(), accuracy, roc_auc });
        }
        write_csv(&self.path, &self.lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::Param;
    use burn::nn::Initializer;

    #[test]
    fn a_network_that_knows_nothing_is_surprised_by_the_logarithm_of_the_classes() {
        let cx = Context::for_tests("unused");
        let network =
            TabPfnConfig { max_features: 5, max_classes: 7, emsize: 8, layers: 1, heads: 2, hidden: 8 };
        let mut model = network.init(&cx.device);
        model.decoder.2.weight = Initializer::Zeros.init([8, 7], &cx.device);
        model.decoder.2.bias = Some(Param::from_tensor(Tensor::zeros([7], &cx.device)));
        let fit = FitConfig { rows: 32, batch: 2, prior: PriorBag::default() };
        let loss = PriorFitting::new(fit, network, &cx).validate(&model).unwrap();
        assert!((loss - 7f64.ln()).abs() < 1e-5, "{loss}");
    }

    #[test]
    fn a_step_has_the_same_data_sets_whether_they_were_drawn_ahead_or_not() {
        let cx = Context::for_tests("unused");
        let network =
            TabPfnConfig { max_features: 5, max_classes: 3, emsize: 8, layers: 1, heads: 2, hidden: 8 };
        let fit = FitConfig { rows: 32, batch: 2, prior: PriorBag::default() };
        let mut fitting = PriorFitting::new(fit, network.clone(), &cx);
        let in_order: Vec<Batch> = (0..3).map(|step| fitting.batch(step).unwrap()).collect();
        let again = PriorFitting::new(fit, network, &cx).batch(2).unwrap();
        assert_eq!((&in_order[2].x, &in_order[2].y), (&again.x, &again.y));
        assert!(in_order[1].y != again.y || in_order[1].x != again.x);
    }
}
