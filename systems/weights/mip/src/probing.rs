//! Proportionality in the course of training, and losses that are no numbers.

use std::collections::BTreeSet;
use std::path::PathBuf;

use burn::module::{Module, ModuleDisplay};
use burn::tensor::Tensor;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use kiln_nn::Task;
use serde_json::{Map, Value};

use crate::convert::MipHyper;
use crate::proportionality::{Probe, ProportionalityReport, measure};

/// Where proportionality is measured.
pub const GAMMAS: [f64; 7] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

/// A line of `proportionality.csv`, without its step.
const HEADER: &str = "step,quantity,name,slope,correlation,largest_over_smallest,size_at_0.01,size_at_0.02,size_at_0.05,\
                      size_at_0.1,size_at_0.2,size_at_0.5,size_at_1";

/// A task that is measured before the first of every so many steps, and told apart when its loss is no number.
pub struct Probed<'a, T, M: Module> {
    task: T,
    /// Components of a condition.
    gamma_dim: usize,
    probes: Option<Probes<'a, M>>,
    /// The condition of a step, for messages.
    condition: Box<dyn Fn(usize) -> String + 'a>,
    cx: &'a Context,
}

/// What is measured, when, and where it is written.
pub struct Probes<'a, M: Module> {
    /// Steps between measurements.
    pub every: usize,
    /// Folder of `proportionality.csv` and `.svg`.
    pub folder: PathBuf,
    /// Runs a network on data.
    pub probe: Box<dyn Fn(&M) -> Probe + 'a>,
    lines: Vec<Line>,
    begun: bool,
}

/// How one quantity depended on the condition after so many steps.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    step: usize,
    quantity: String,
    name: String,
    slope: f64,
    /// The line of the table.
    text: String,
}

impl<'a, M: Module> Probes<'a, M> {
    /// Measures every `every` steps, at least 1, into a folder.
    pub fn new(every: usize, folder: PathBuf, probe: impl Fn(&M) -> Probe + 'a) -> Self {
        Self { every, folder, probe: Box::new(probe), lines: Vec::new(), begun: false }
    }

    /// Keeps what an earlier part of the run measured before `step`.
    fn begin(&mut self, step: usize) -> Result<()> {
        self.begun = true;
        let path = self.folder.join("proportionality.csv");
        if step == 0 || !path.exists() {
            return Ok(());
        }
        let text = std::fs::read_to_string(&path).map_err(Error::io("read", &path))?;
        for (number, line) in text.lines().enumerate().skip(1) {
            let mut cells = line.split(',');
            let mut cell = || cells.next().unwrap_or_default();
            let (at, quantity, name, slope) = (cell().parse(), cell(), cell(), cell().parse());
            let (Ok(at), Ok(slope)) = (at, slope) else {
                return Err(Error::input(path.display(), format!("line {} is malformed", number + 1))
                    .hint("was it edited? take it away, and the run goes on without what it held"));
            };
            if at < step {
                let (quantity, name) = (quantity.into(), name.into());
                self.lines.push(Line { step: at, quantity, name, slope, text: line.into() });
            }
        }
        Ok(())
    }

    fn add(&mut self, step: usize, report: &ProportionalityReport) {
        for (quantity, found) in report.all() {
            let figures = [found.slope, found.correlation, found.ratio];
            let cells = figures.iter().chain(&found.sizes).map(f64::to_string).collect::<Vec<_>>().join(",");
            let text = format!("{step},{quantity},{},{cells}", found.name);
            let (quantity, name) = (quantity.into(), found.name.clone());
            self.lines.push(Line { step, quantity, name, slope: found.slope, text });
        }
    }

    fn write(&self) -> Result<()> {
        let lines: Vec<&str> = self.lines.iter().map(|line| line.text.as_str()).collect();
        std::fs::create_dir_all(&self.folder).map_err(Error::io("create", &self.folder))?;
        let text = format!("{HEADER}\n{}\n", lines.join("\n"));
        write_atomic(&self.folder.join("proportionality.csv"), text.as_bytes())?;
        let shown = |line: &&Line| line.quantity != "weights" || line.name == "all weights";
        let names: BTreeSet<&str> = self.lines.iter().filter(shown).map(|line| line.name.as_str()).collect();
        let plot =
            Plot::lines("Dependence on the condition", "step", "log-log slope: 1 proportional, 0 none");
        let slopes = |name: &str| {
            let of = self.lines.iter().filter(|line| line.name == name);
            of.map(|line| (line.step as f64, line.slope)).collect()
        };
        names
            .into_iter()
            .fold(plot, |plot, name| plot.series(name, slopes(name)))
            .save(&self.folder.join("proportionality.svg"))
    }
}

impl<'a, T, M: Module + ModuleDisplay> Probed<'a, T, M> {
    /// A task whose `condition` of a step can be told; `probes` says what is measured, where anything is.
    pub fn new(
        task: T,
        gamma_dim: usize,
        probes: Option<Probes<'a, M>>,
        condition: impl Fn(usize) -> String + 'a,
        cx: &'a Context,
    ) -> Self {
        Self { task, gamma_dim, probes, condition: Box::new(condition), cx }
    }

    /// Measures after the last of all steps.
    ///
    /// # Errors
    /// As [`measure`], and when a file cannot be written.
    pub fn finish(&mut self, model: &MipHyper<M>, steps: usize) -> Result<()> {
        self.measure(model, steps)
    }

    fn measure(&mut self, model: &MipHyper<M>, step: usize) -> Result<()> {
        let Some(probes) = &mut self.probes else { return Ok(()) };
        if !probes.begun {
            probes.begin(step)?;
        }
        let report = measure(model, self.gamma_dim, &GAMMAS, &self.cx.device, |net| (probes.probe)(net))?;
        probes.add(step, &report);
        probes.write()
    }
}

impl<T: Task<MipHyper<M>>, M: Module + ModuleDisplay> Task<MipHyper<M>> for Probed<'_, T, M> {
    fn loss(&mut self, model: &MipHyper<M>, step: usize) -> Result<(Tensor<1>, usize)> {
        if self.probes.as_ref().is_some_and(|probes| step.is_multiple_of(probes.every)) {
            self.measure(&model.valid(), step)?;
        }
        let (loss, count) = self.task.loss(model, step)?;
        let value = loss.clone().into_scalar::<f32>();
        if value.is_finite() {
            return Ok((loss, count));
        }
        let condition = (self.condition)(step);
        Err(Error::work(format!("the loss of step {} is {value}, under the condition {condition}", step + 1))
            .hint("the last checkpoint is kept; a lower learning rate or --clip 1 may help"))
    }

    fn validate(&mut self, model: &MipHyper<M>) -> Result<f64> {
        self.task.validate(model)
    }

    fn settings(&self) -> Map<String, Value> {
        self.task.settings()
    }
}
