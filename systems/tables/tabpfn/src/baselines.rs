//! The usual classifiers for small tables, beside which TabPFN is measured. All see columns that are scaled with the
//! training rows and whose missing values are the mean, and all give probabilities.

use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use kiln_data::Matrix;
use rand::seq::{IndexedRandom, SliceRandom, index};
use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use smartcore::linalg::basic::arrays::Array;
use smartcore::linalg::basic::matrix::DenseMatrix;
use smartcore::linear::logistic_regression as smart_logistic;
use smartcore::metrics::distance::euclidian::Euclidian;
use smartcore::neighbors::knn_classifier as smart_knn;

use crate::ensemble::softmax;
use crate::metrics::log_loss;
use crate::preprocess::ZScore;
use crate::trees::{Binned, Growth, Targets, Tree};

/// A baseline by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Baseline {
    /// Multinomial logistic regression
    Logreg,
    /// The five nearest neighbours
    Knn,
    /// Gradient-boosted trees
    Gbdt,
    /// A random forest
    Rf,
}

impl Baseline {
    /// All, in the order of the option.
    pub const ALL: [Self; 4] = [Self::Logreg, Self::Knn, Self::Gbdt, Self::Rf];

    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Logreg => "logistic regression",
            Self::Knn => "kNN (5)",
            Self::Gbdt => "boosted trees",
            Self::Rf => "random forest",
        }
    }

    /// Learns from labelled rows with the usual settings and gives the probabilities of others, `[rows, classes]`.
    ///
    /// # Errors
    /// When the labelled rows are of one class.
    pub fn predict(
        self,
        train: &Matrix,
        labels: &[usize],
        classes: usize,
        test: &Matrix,
        cx: &Context,
    ) -> Result<Matrix> {
        let (train, test) = standardise(train, test);
        match self {
            Self::Logreg => Ok(LogisticRegression::fit(&train, labels, classes)?.predict_proba(&test)),
            Self::Knn => Knn::fit(&train, labels, classes)?.predict_proba(&test),
            Self::Gbdt => {
                let config = BoostingConfig::default();
                let fitted =
                    GradientBoosting::fit(&train, labels, classes, &config, &mut cx.rng("boosting", 0));
                Ok(fitted.predict_proba(&test))
            }
            Self::Rf => Ok(RandomForest::fit(&train, labels, classes, cx).predict_proba(&test)),
        }
    }
}

/// Both tables scaled with the first one's means and deviations; missing values become 0.
pub fn standardise(train: &Matrix, test: &Matrix) -> (Matrix, Matrix) {
    let scales: Vec<ZScore> = (0..train.columns).map(|column| ZScore::fit(&train.column(column))).collect();
    let scaled = |table: &Matrix| {
        let value = |(place, &x): (usize, &f64)| match scales[place % table.columns].apply(x) {
            x if x.is_nan() => 0.0,
            x => x,
        };
        let values = table.values.iter().enumerate().map(value).collect();
        Matrix::new(table.rows, table.columns, values)
    };
    (scaled(train), scaled(test))
}

fn dense(table: &Matrix) -> Result<DenseMatrix<f64>> {
    DenseMatrix::new(table.rows, table.columns, table.values.clone(), false).map_err(failed)
}

fn failed(e: smartcore::error::Failed) -> Error {
    Error::work("a baseline has failed").caused_by(e.to_string())
}

fn as_numbers(labels: &[usize]) -> Vec<u32> {
    labels.iter().map(|&label| label as u32).collect()
}

/// Multinomial logistic regression with a ridge penalty.
pub struct LogisticRegression {
    /// `[classes, columns + 1]`, the intercept last; of classes that do not occur all -∞.
    weights: Vec<Vec<f64>>,
}

impl LogisticRegression {
    /// Factor of half the squared weights in the loss: scikit-learn's `C = 1`. Without it, separable classes have no
    /// solution.
    const PENALTY: f64 = 1.0;

    /// Learns from scaled rows.
    ///
    /// # Errors
    /// When they are of one class.
    pub fn fit(train: &Matrix, labels: &[usize], classes: usize) -> Result<Self> {
        let parameters = smart_logistic::LogisticRegressionParameters::default().with_alpha(Self::PENALTY);
        let fitted = smart_logistic::LogisticRegression::fit(&dense(train)?, &as_numbers(labels), parameters)
            .map_err(failed)?;
        let weights_of = |row: usize| -> Vec<f64> {
            let coefficients = (0..train.columns).map(|column| *fitted.coefficients().get((row, column)));
            coefficients.chain([*fitted.intercept().get((row, 0))]).collect()
        };
        let absent = [vec![0.0; train.columns], vec![f64::NEG_INFINITY]].concat();
        let mut weights = vec![absent; classes];
        match fitted.classes()[..] {
            // Of two classes the weights are those of the second against the first.
            [first, second] => {
                weights[first as usize] = vec![0.0; train.columns + 1];
                weights[second as usize] = weights_of(0);
            }
            ref several => {
                for (row, &class) in several.iter().enumerate() {
                    weights[class as usize] = weights_of(row);
                }
            }
        }
        Ok(Self { weights })
    }

    /// Probabilities `[rows, classes]`.
    pub fn predict_proba(&self, test: &Matrix) -> Matrix {
        let mut values = Vec::with_capacity(test.rows * self.weights.len());
        for row in 0..test.rows {
            let logit = |weights: &Vec<f64>| {
                let products = test.row(row).iter().zip(weights).map(|(x, w)| x * w);
                products.sum::<f64>() + weights[test.columns]
            };
            let mut logits: Vec<f64> = self.weights.iter().map(logit).collect();
            softmax(&mut logits);
            values.extend(logits);
        }
        Matrix::new(test.rows, self.weights.len(), values)
    }
}

type SmartKnn = smart_knn::KNNClassifier<f64, u32, DenseMatrix<f64>, Vec<u32>, Euclidian<f64>>;

/// The shares of the classes among the nearest rows.
pub struct Knn {
    fitted: SmartKnn,
    /// The classes that occur, in the order of the answers.
    occurring: Vec<usize>,
    classes: usize,
}

impl Knn {
    const NEIGHBOURS: usize = 5;

    /// Keeps the scaled rows.
    ///
    /// # Errors
    /// When there are none.
    pub fn fit(train: &Matrix, labels: &[usize], classes: usize) -> Result<Self> {
        let parameters =
            smart_knn::KNNClassifierParameters::default().with_k(Self::NEIGHBOURS.min(train.rows));
        let fitted = SmartKnn::fit(&dense(train)?, &as_numbers(labels), parameters).map_err(failed)?;
        let mut occurring = labels.to_vec();
        occurring.sort_unstable();
        occurring.dedup();
        Ok(Self { fitted, occurring, classes })
    }

    /// Probabilities `[rows, classes]`.
    ///
    /// # Errors
    /// When a distance is not a number.
    pub fn predict_proba(&self, test: &Matrix) -> Result<Matrix> {
        let shares = self.fitted.predict_proba(&dense(test)?).map_err(failed)?;
        let mut values = vec![0.0; test.rows * self.classes];
        for (row, shares) in values.chunks_exact_mut(self.classes).zip(shares) {
            for (&class, share) in self.occurring.iter().zip(shares) {
                row[class] = share;
            }
        }
        Ok(Matrix::new(test.rows, self.classes, values))
    }
}

/// Trees on random rows and columns whose leaves' shares are averaged (Breiman 2001).
pub struct RandomForest {
    trees: Vec<Tree>,
    classes: usize,
}

impl RandomForest {
    const TREES: u64 = 100;

    /// Learns from rows without missing values.
    pub fn fit(train: &Matrix, labels: &[usize], classes: usize, cx: &Context) -> Self {
        let table = Binned::new(train);
        let growth = Growth {
            max_depth: usize::MAX,
            min_weight: 1.0,
            lambda: 0.0,
            columns_per_node: Some(((train.columns as f64).sqrt() as usize).max(1)),
        };
        let columns: Vec<usize> = (0..train.columns).collect();
        let grow = |tree: u64| {
            let mut rng = cx.rng("forest", tree);
            let mut drawn = vec![0.0; train.rows];
            (0..train.rows).for_each(|_| drawn[rng.random_range(0..train.rows)] += 1.0);
            let mut gradients = vec![0.0; train.rows * classes];
            for (row, &label) in labels.iter().enumerate() {
                gradients[row * classes + label] = -drawn[row];
            }
            let rows = (0..train.rows as u32).filter(|&row| drawn[row as usize] > 0.0).collect();
            let targets = Targets { outputs: classes, gradients: &gradients, hessians: &drawn };
            Tree::grow(&table, &targets, rows, &columns, &growth, &mut rng)
        };
        Self { trees: (0..Self::TREES).into_par_iter().map(grow).collect(), classes }
    }

    /// Probabilities `[rows, classes]`.
    pub fn predict_proba(&self, test: &Matrix) -> Matrix {
        let mut values = vec![0.0; test.rows * self.classes];
        for (row, shares) in values.chunks_exact_mut(self.classes).enumerate() {
            for tree in &self.trees {
                for (share, value) in shares.iter_mut().zip(tree.values(test.row(row))) {
                    *share += value / self.trees.len() as f64;
                }
            }
        }
        Matrix::new(test.rows, self.classes, values)
    }
}

/// Settings of boosted trees; the defaults are XGBoost's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BoostingConfig {
    /// Rounds, each with one tree a class (one in all for two classes).
    pub rounds: usize,
    /// Most splits on the way to a leaf.
    pub depth: usize,
    /// Factor of what a tree adds.
    pub learning_rate: f64,
    /// Ridge penalty on leaves.
    pub lambda: f64,
    /// Least sum of second derivatives in a leaf.
    pub min_weight: f64,
    /// Share of the rows that a tree sees.
    pub rows: f64,
    /// Share of the columns that a tree sees.
    pub columns: f64,
}

impl Default for BoostingConfig {
    fn default() -> Self {
        Self {
            rounds: 100,
            depth: 6,
            learning_rate: 0.3,
            lambda: 1.0,
            min_weight: 1.0,
            rows: 1.0,
            columns: 1.0,
        }
    }
}

impl BoostingConfig {
    /// Random settings within the ranges that are usually searched.
    pub fn draw(rng: &mut impl Rng) -> Self {
        let mut log_uniform = |low: f64, high: f64| rng.random_range(low.ln()..=high.ln()).exp();
        let (learning_rate, lambda, min_weight) =
            (log_uniform(0.02, 0.3), log_uniform(0.1, 10.0), log_uniform(0.5, 8.0));
        Self {
            rounds: *[50, 100, 200, 300].choose(rng).expect("there are four"),
            depth: rng.random_range(2..=8),
            learning_rate,
            lambda,
            min_weight,
            rows: rng.random_range(0.5..=1.0),
            columns: rng.random_range(0.5..=1.0),
        }
    }
}

/// Gradient-boosted trees with the softmax loss and its second derivatives (Chen and Guestrin 2016).
pub struct GradientBoosting {
    /// Trees of each round: one a class, or one for the second of two.
    rounds: Vec<Vec<Tree>>,
    learning_rate: f64,
    classes: usize,
}

impl GradientBoosting {
    /// Learns from rows without missing values.
    pub fn fit(
        train: &Matrix,
        labels: &[usize],
        classes: usize,
        config: &BoostingConfig,
        rng: &mut impl Rng,
    ) -> Self {
        let table = Binned::new(train);
        let growth = Growth {
            max_depth: config.depth,
            min_weight: config.min_weight,
            lambda: config.lambda,
            columns_per_node: None,
        };
        let mut model = Self { rounds: Vec::new(), learning_rate: config.learning_rate, classes };
        let mut margins = Matrix::new(train.rows, classes, vec![0.0; train.rows * classes]);
        for _ in 0..config.rounds {
            let rows = share(train.rows, config.rows, rng);
            let columns = share(train.columns, config.columns, rng);
            let seeds: Vec<u64> = model.boosted().map(|_| rng.random()).collect();
            let mut probabilities = margins.clone();
            probabilities.values.chunks_exact_mut(classes).for_each(softmax);
            // Softmax of several margins has twice the curvature of the logistic function, in XGBoost's terms.
            let curvature = if classes == 2 { 1.0 } else { 2.0 };
            let grow = |(class, seed): (usize, u64)| {
                let p = |row: usize| probabilities.at(row, class);
                let target = |row: usize| if labels[row] == class { 1.0 } else { 0.0 };
                let gradients: Vec<f64> = (0..train.rows).map(|row| p(row) - target(row)).collect();
                let hessians: Vec<f64> =
                    (0..train.rows).map(|row| (curvature * p(row) * (1.0 - p(row))).max(1e-16)).collect();
                let targets = Targets { outputs: 1, gradients: &gradients, hessians: &hessians };
                let rows = rows.iter().map(|&row| row as u32).collect();
                let rng = &mut kiln_core::random_stream(seed, "tree", 0);
                Tree::grow(&table, &targets, rows, &columns, &growth, rng)
            };
            let work: Vec<(usize, u64)> = model.boosted().zip(seeds).collect();
            let trees: Vec<Tree> = work.into_par_iter().map(grow).collect();
            for row in 0..train.rows {
                model.add(&trees, train.row(row), &mut margins.values[row * classes..(row + 1) * classes]);
            }
            model.rounds.push(trees);
        }
        model
    }

    /// The classes that have trees of their own.
    fn boosted(&self) -> std::ops::Range<usize> {
        usize::from(self.classes == 2)..self.classes
    }

    /// Adds what a round says about a row.
    fn add(&self, trees: &[Tree], row: &[f64], margins: &mut [f64]) {
        for (class, tree) in self.boosted().zip(trees) {
            margins[class] += self.learning_rate * tree.values(row)[0];
        }
    }

    /// Probabilities `[rows, classes]`.
    pub fn predict_proba(&self, test: &Matrix) -> Matrix {
        let mut values = vec![0.0; test.rows * self.classes];
        for (row, margins) in values.chunks_exact_mut(self.classes).enumerate() {
            for trees in &self.rounds {
                self.add(trees, test.row(row), margins);
            }
            softmax(margins);
        }
        Matrix::new(test.rows, self.classes, values)
    }

    /// Learns with the best of `settings` random settings (the defaults are the first), by the log-loss of 5-fold
    /// cross-validation.
    ///
    /// # Errors
    /// When the user asks to stop.
    pub fn tune(
        train: &Matrix,
        labels: &[usize],
        classes: usize,
        settings: usize,
        cx: &Context,
    ) -> Result<(Self, BoostingConfig)> {
        const FOLDS: usize = 5;
        let mut rng = cx.rng("tuning", 0);
        let mut rows: Vec<usize> = (0..train.rows).collect();
        rows.shuffle(&mut rng);
        let progress = cx.progress((settings * FOLDS) as u64, "tuning boosted trees");
        let mut best = (f64::INFINITY, BoostingConfig::default());
        for setting in 0..settings {
            let config =
                if setting == 0 { BoostingConfig::default() } else { BoostingConfig::draw(&mut rng) };
            let mut loss = 0.0;
            for fold in 0..FOLDS {
                if cx.interrupted() {
                    return Err(Error::interrupted("the tuning was stopped"));
                }
                let in_fold = |place: &usize| place % FOLDS == fold;
                let (held_out, seen): (Vec<usize>, Vec<usize>) = (0..rows.len()).partition(in_fold);
                let [held_out, seen] = [held_out, seen]
                    .map(|places| -> Vec<usize> { places.into_iter().map(|place| rows[place]).collect() });
                let labels_of = |rows: &[usize]| rows.iter().map(|&row| labels[row]).collect::<Vec<_>>();
                let model =
                    Self::fit(&train.select_rows(&seen), &labels_of(&seen), classes, &config, &mut rng);
                let probabilities = model.predict_proba(&train.select_rows(&held_out));
                loss += log_loss(&probabilities, &labels_of(&held_out)) * held_out.len() as f64;
                progress.inc(1);
            }
            if loss < best.0 {
                best = (loss, config);
            }
        }
        Ok((Self::fit(train, labels, classes, &best.1, &mut rng), best.1))
    }
}

/// A random share of `0..count`, at least one.
fn share(count: usize, share: f64, rng: &mut impl Rng) -> Vec<usize> {
    if share >= 1.0 {
        return (0..count).collect();
    }
    let amount = ((count as f64 * share).round() as usize).clamp(1, count);
    index::sample(rng, count, amount).into_vec()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{accuracy, roc_auc};

    /// Mean accuracy and area on iris over several halvings.
    fn on_iris(baseline: Baseline) -> (f64, f64) {
        let cx = Context::for_tests(".");
        let (table, labels) = crate::examples::iris().expect("the table is part of the crate");
        let splits = 5;
        let (mut right, mut area) = (0.0, 0.0);
        for split in 0..splits {
            let mut rows: Vec<usize> = (0..table.rows).collect();
            rows.shuffle(&mut cx.rng("split", split));
            let (train, test) = rows.split_at(75);
            let labels_of = |rows: &[usize]| rows.iter().map(|&row| labels[row]).collect::<Vec<_>>();
            let probabilities = baseline
                .predict(&table.select_rows(train), &labels_of(train), 3, &table.select_rows(test), &cx)
                .unwrap();
            let sums = (0..probabilities.rows).map(|row| probabilities.row(row).iter().sum::<f64>());
            assert!(sums.into_iter().all(|sum| (sum - 1.0).abs() < 1e-9));
            right += accuracy(&probabilities, &labels_of(test)) / splits as f64;
            area += roc_auc(&probabilities, &labels_of(test)) / splits as f64;
        }
        (right, area)
    }

    #[test]
    fn every_baseline_is_sound_on_iris() {
        for (baseline, least) in
            [(Baseline::Logreg, 0.94), (Baseline::Knn, 0.93), (Baseline::Gbdt, 0.92), (Baseline::Rf, 0.92)]
        {
            let (accuracy, area) = on_iris(baseline);
            assert!(accuracy >= least && area >= 0.97, "{baseline:?}: accuracy {accuracy}, area {area}");
        }
    }

    #[test]
    fn classes_without_training_rows_get_no_probability() {
        let cx = Context::for_tests(".");
        let train = Matrix::new(6, 1, vec![0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        for baseline in Baseline::ALL {
            for (labels, absent) in [([0, 0, 0, 2, 2, 2], 1), ([1, 1, 2, 2, 3, 3], 0)] {
                let p = baseline.predict(&train, &labels, 4, &train, &cx).unwrap();
                assert!(p.column(absent).iter().all(|&p| p < 0.3), "{baseline:?} {labels:?}");
                assert!(p.at(5, labels[5]) > p.at(5, absent), "{baseline:?} {labels:?}");
            }
        }
    }

    #[test]
    fn tuning_is_not_worse_than_the_defaults_on_noise() {
        let cx = Context::for_tests(".");
        let mut rng = cx.rng("noise", 0);
        let draw = |rng: &mut rand_chacha::ChaCha8Rng| {
            let x = Matrix::new(80, 3, (0..240).map(|_| rng.random_range(-1.0..1.0)).collect());
            let labels: Vec<usize> =
                (0..80).map(|row| usize::from(x.at(row, 0) + rng.random_range(-1.0..1.0) > 0.0)).collect();
            (x, labels)
        };
        let (train, labels) = draw(&mut rng);
        let (test, test_labels) = draw(&mut rng);
        let (tuned, config) = GradientBoosting::tune(&train, &labels, 2, 6, &cx).unwrap();
        let plain = GradientBoosting::fit(&train, &labels, 2, &BoostingConfig::default(), &mut rng);
        let loss = |model: &GradientBoosting| log_loss(&model.predict_proba(&test), &test_labels);
        assert_ne!(config, BoostingConfig::default());
        assert!(loss(&tuned) < loss(&plain), "{} against {}", loss(&tuned), loss(&plain));
    }
}
