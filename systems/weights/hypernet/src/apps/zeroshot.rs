//! Classes that were never seen: a hypernetwork makes a classifier's row of weights from what is known of the class.
//!
//! Digits are described by strokes; seven are trained on, three are not. Baseline: the same row as a linear function of
//! the attributes, which is what bilinear zero-shot models learn (Romera-Paredes and Torr 2015).

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use kiln_core::{Context, Error, Result, Table as Sheet};
use kiln_data::{Table, TableOptions};
use kiln_nn::LinearConfig;

use crate::apps::{Findings, Parts, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::data::numbers;
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, OutputScheme};
use crate::target::Target;
use crate::training::{Fit, Labelled, accuracy, cross_entropy, fit, probabilities};

/// Names of the strokes.
pub const STROKES: [&str; 10] = [
    "top",
    "upper left",
    "upper right",
    "middle",
    "lower left",
    "lower right",
    "bottom",
    "loop above",
    "loop below",
    "upright",
];

/// Strokes of the digits 0 to 9: the seven segments as they are written by hand, loops, and an upright stem.
const DIGITS: [[f32; 10]; 10] = [
    [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0],
    [0.0, 0.0, 0.5, 0.5, 0.0, 0.5, 0.0, 0.0, 0.0, 1.0],
    [1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0],
    [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, 0.5, 1.0, 0.5, 1.0, 0.0, 0.0, 0.0, 0.5],
    [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0],
    [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.0],
    [1.0, 0.0, 1.0, 0.5, 0.0, 0.5, 0.0, 0.0, 0.0, 0.5],
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0],
    [1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.5, 1.0, 0.0, 0.0],
];

/// Shares of the steps that are tried, and how often some of the seen classes are left out to choose among them.
const STOPS: [f64; 4] = [0.05, 0.2, 0.5, 1.0];
const FOLDS: usize = 2;

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Groups of classes that are not seen, each group in a run of its own.
    pub unseen: Vec<Vec<usize>>,
    /// Optimisation steps.
    pub steps: usize,
    /// Attributes of the classes, `[classes][width]`.
    pub attributes: Vec<Vec<f32>>,
}

impl Default for Config {
    fn default() -> Self {
        let attributes = DIGITS.iter().map(|row| row.to_vec()).collect();
        Self { unseen: vec![vec![1, 4, 9], vec![2, 5, 8], vec![0, 3, 6]], steps: 600, attributes }
    }
}

/// A row of weights for every class from its attributes.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
enum Rows {
    Hyper(HyperNet),
    Linear(kiln_nn::Linear),
}

impl Rows {
    /// `[classes, pixels + 1]`
    fn make(&self, attributes: Tensor<2>) -> Result<Tensor<2>> {
        match self {
            Self::Hyper(hyper) => Ok(hyper.generate(&Condition::given(attributes))?.flat),
            Self::Linear(linear) => Ok(linear.forward(attributes)),
        }
    }
}

/// Figures of one method, one for every group of unseen classes.
#[derive(Debug, Clone, Default)]
struct Figures {
    unseen: Vec<f64>,
    harmonic: Vec<f64>,
}

/// Learns from the seen classes, and names images of the unseen ones.
///
/// # Errors
/// When a class lacks attributes, or a training fails or is stopped.
pub fn run(config: &Config, parts: &Parts, cx: &Context) -> Result<(Findings, f64)> {
    let width = config.attributes.first().map_or(0, Vec::len);
    let rows = config.attributes.len();
    if rows != parts.classes || width == 0 || config.attributes.iter().any(|row| row.len() != width) {
        let message = format!("there are {rows} rows of attributes, must be {} of one width", parts.classes);
        return Err(Error::usage(message).hint("one row for every class"));
    }
    for unseen in &config.unseen {
        if unseen.is_empty() || unseen.len() + 2 > parts.classes {
            let message = format!("{} of {} classes cannot be unseen", unseen.len(), parts.classes);
            return Err(
                Error::usage(message).hint("at least one is unseen, and at least two are learned from")
            );
        }
    }
    let pixels = parts.train.width;
    let (mut hyper, mut linear) = (Figures::default(), Figures::default());
    for (number, unseen) in config.unseen.iter().enumerate() {
        cx.note(format!("unseen classes {unseen:?}"));
        let cx = &Context { seed: cx.seed + number as u64, ..cx.clone() };
        let row = Target::mlp(&[pixels, 1]);
        let hyper_config = HyperNetConfig::new(row.spec()?)
            .with_conditioning([Conditioning::Given { dim: width }])
            .with_scheme(OutputScheme::Once)
            .with_arch(Arch::Mlp(vec![32]));
        let course = Course { config, parts, cx };
        let linear_rows = || {
            Ok(Rows::Linear(kiln_nn::initialise(&cx.device, &mut cx.rng("linear", 0), |device| {
                LinearConfig::new(width, pixels + 1).init(device)
            })))
        };
        course.judge(|| Ok(Rows::Hyper(hyper_config.draw(cx, "hypernet")?)), unseen, &mut hyper)?;
        course.judge(linear_rows, unseen, &mut linear)?;
    }
    let mut table = Sheet::new(
        format!("Classes that were never seen, by their attributes: {}", parts.name),
        &["method", "accuracy among the unseen", "harmonic mean of seen and unseen, among all"],
    );
    for (name, figures) in [("hypernetwork", &hyper), ("linear map of the attributes", &linear)] {
        table.row([
            name.to_string(),
            Spread::of(&figures.unseen).text(),
            Spread::of(&figures.harmonic).text(),
        ]);
    }
    let notes = vec![format!(
        "Unseen classes: the groups {:?}, at most {} steps each; how many is chosen by leaving out classes that are seen.",
        config.unseen, config.steps
    )];
    Ok((Findings { table, plots: Vec::new(), notes }, Spread::of(&hyper.unseen).mean))
}

/// Classes with their attributes and rows, and how what is learned from some of them does on others.
struct Course<'a> {
    config: &'a Config,
    parts: &'a Parts,
    cx: &'a Context,
}

impl Course<'_> {
    /// The attributes of classes, `[classes, width]`.
    fn attributes(&self, classes: &[usize]) -> Tensor<2> {
        let rows = classes.iter().flat_map(|&class| self.config.attributes[class].clone());
        let values: Vec<f32> = rows.collect();
        let width = values.len() / classes.len();
        Tensor::from_data(TensorData::new(values, [classes.len(), width]), &self.cx.device)
    }

    /// Learns from these classes.
    fn learn(&self, rows: Rows, classes: &[usize], steps: usize) -> Result<Rows> {
        let train = self.parts.train.of_classes(classes);
        fit(rows, Fit::new(steps, 2e-3), self.cx, |rows, step| {
            let (x, y) = train.draw(64, &mut self.cx.rng("batch", step as u64)).tensors(&self.cx.device);
            Ok(cross_entropy(logits(rows.make(self.attributes(classes))?, x), y))
        })
    }

    /// Accuracy on rows of the classes `tested`, told apart among `classes`.
    fn accuracy(&self, rows: &Rows, data: &Labelled, classes: &[usize], tested: &[usize]) -> Result<f64> {
        let data = data.of_classes(tested);
        let (x, _) = data.tensors(&self.cx.device);
        let p = probabilities(logits(rows.make(self.attributes(classes))?, x));
        let place = |&y: &usize| classes.iter().position(|&class| class == tested[y]).unwrap_or(0);
        Ok(accuracy(&p, &data.y.iter().map(place).collect::<Vec<_>>()))
    }

    /// How long to learn: as long as serves best for classes that are seen but, twice, left out.
    fn steps(&self, draw: &impl Fn() -> Result<Rows>, seen: &[usize], unseen: usize) -> Result<usize> {
        let left_out = unseen.min((seen.len() - 2) / 2).max(1);
        let mut best = (f64::NEG_INFINITY, self.config.steps);
        for share in STOPS {
            let steps = ((self.config.steps as f64 * share) as usize).max(1);
            let mut sum = 0.0;
            for fold in seen.chunks(left_out).take(FOLDS) {
                let others: Vec<usize> = seen.iter().copied().filter(|class| !fold.contains(class)).collect();
                let rows = self.learn(draw()?, &others, steps)?;
                sum += self.accuracy(&rows, &self.parts.train, fold, fold)?;
            }
            if sum > best.0 {
                best = (sum, steps);
            }
        }
        Ok(best.1)
    }

    fn judge(&self, draw: impl Fn() -> Result<Rows>, unseen: &[usize], figures: &mut Figures) -> Result<()> {
        let all: Vec<usize> = (0..self.parts.classes).collect();
        let seen: Vec<usize> = all.iter().copied().filter(|class| !unseen.contains(class)).collect();
        let steps = self.steps(&draw, &seen, unseen.len())?;
        let rows = self.learn(draw()?, &seen, steps)?;
        let test = &self.parts.test;
        figures.unseen.push(self.accuracy(&rows, test, unseen, unseen)?);
        let of_seen = self.accuracy(&rows, test, &all, &seen)?;
        let of_unseen = self.accuracy(&rows, test, &all, unseen)?;
        figures.harmonic.push(2.0 * of_seen * of_unseen / (of_seen + of_unseen).max(1e-12));
        Ok(())
    }
}

/// Scores of images `[1, rows, pixels]` with a row of weights for every class, `[1, rows, classes]`.
fn logits(weights: Tensor<2>, x: Tensor<3>) -> Tensor<3> {
    let [classes, _] = weights.dims();
    let [_, rows, pixels] = x.dims();
    let row = Target::mlp(&[pixels, 1]);
    row.forward(weights, x.expand([classes, rows, pixels])).reshape([1, classes, rows]).swap_dims(1, 2)
}

/// Reads a table of attributes: a row of numbers for each class. They are told apart by the column of their names, where
/// there is one, and come in the order of the classes otherwise.
///
/// # Errors
/// Names the row and column that holds no number, or the classes that are lacking.
pub fn read_attributes(path: &Path, column: &str, classes: &[String]) -> Result<Vec<Vec<f32>>> {
    let mut table = Table::read(path, TableOptions::default())?;
    let names = table.take(column).ok();
    let columns: Vec<Vec<f64>> =
        table.columns().iter().map(|column| numbers(path, column)).collect::<Result<_>>()?;
    let row = |row: usize| columns.iter().map(|column| column[row] as f32).collect::<Vec<f32>>();
    let Some(names) = names else {
        if table.rows() != classes.len() {
            let found = format!("has attributes of {} classes, must be {}", table.rows(), classes.len());
            return Err(Error::input(path.display(), found).hint(format!(
                "one row for each of {}, or name them in a column \"{column}\"",
                classes.join(", ")
            )));
        }
        return Ok((0..table.rows()).map(row).collect());
    };
    let place = |class: &String| {
        (0..names.len()).find(|&row| names.text(row).as_ref() == Some(class)).map(row).ok_or_else(|| {
            Error::input(path.display(), format!("has no attributes of the class \"{class}\""))
                .hint(format!("one row for each of {}", classes.join(", ")))
        })
    };
    classes.iter().map(place).collect()
}
