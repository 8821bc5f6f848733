//! `kiln hypernet app` and `compare`

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use kiln_core::{Context, Error, ModelFolder, Result, write_atomic};
use serde_json::json;

use crate::apps::hyperlstm::{self, Characters};
use crate::apps::text::{self, TextTask};
use crate::apps::uncertainty::Known;
use crate::apps::{
    Findings, Parts, causal, compare, continual, nlp, prune, rl, transfer, uncertainty, zeroshot,
};
use crate::data::{Coded, Coding, Columns, Rows};
use crate::model::split;
use crate::target::Target;
use crate::training::Labelled;

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Optimisation steps
    #[arg(long, default_value_t = 800)]
    steps: usize,
    /// Rows of each class and task
    #[arg(long, value_delimiter = ',', default_value = "5,20,100")]
    rows: Vec<usize>,
    /// Repetitions
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Folder for plots
    #[arg(long)]
    out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct AppArgs {
    #[command(subcommand)]
    app: App,
}

#[derive(Debug, Subcommand)]
#[allow(clippy::large_enum_variant, reason = "there is one")]
enum App {
    /// Tasks that come one after another; baselines: fine-tuning, elastic weight consolidation, joint training
    Continual(ContinualArgs),
    /// Effects of a treatment on each unit; baselines: TARNet, T-learner, S-learner
    Causal(CausalArgs),
    /// A new domain from a few rows; baselines: one network for all domains, and the same fine-tuned
    Transfer(TransferArgs),
    /// Weights as a distribution; baselines: one network, dropout that stays on, an ensemble of five
    Uncertainty(UncertaintyArgs),
    /// A smaller network, by masks that the hypernetwork makes or by evolved widths; baseline: magnitude pruning
    Prune(PruneArgs),
    /// Policies for worlds that differ; baseline: one policy that sees the description of the world
    Rl(RlArgs),
    /// Texts of several tasks with one frozen encoder; baselines: adapters of each task, a shared head
    Nlp(NlpArgs),
    /// Characters of a text, by an LSTM whose weights another changes at every step; baseline: an LSTM
    Hyperlstm(HyperlstmArgs),
    /// Classes that were never seen, from their description; baseline: a linear map of the attributes
    Zeroshot(ZeroshotArgs),
}

impl AppArgs {
    /// Runs the application.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.app {
            App::Continual(args) => args.run(cx),
            App::Causal(args) => args.run(cx),
            App::Transfer(args) => args.run(cx),
            App::Uncertainty(args) => args.run(cx),
            App::Prune(args) => args.run(cx),
            App::Rl(args) => args.run(cx),
            App::Nlp(args) => args.run(cx),
            App::Hyperlstm(args) => args.run(cx),
            App::Zeroshot(args) => args.run(cx),
        }
    }
}

/// How often a study is repeated.
#[derive(Debug, Args)]
struct Repeats {
    /// Repetitions, each with a seed of its own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
}

/// A user's labelled rows in place of the digits.
#[derive(Debug, Args)]
struct OwnArgs {
    /// Rows of your own instead: a table, .npz, IDX, or a folder with one folder a class; a fifth is for tests
    #[arg(long)]
    data: Option<PathBuf>,
    /// Column of the classes
    #[arg(long, default_value = "label")]
    target_col: String,
}

impl OwnArgs {
    /// The user's rows, if there are any.
    fn parts(&self, cx: &Context) -> Result<Option<Own>> {
        self.data.as_deref().map(|path| Own::read(path, &self.target_col, None, cx)).transpose()
    }
}

/// A user's rows: one set, or one for every task.
struct Own {
    sets: Vec<Parts>,
    classes: Vec<String>,
}

impl Own {
    fn read(path: &Path, label: &str, task: Option<&str>, cx: &Context) -> Result<Self> {
        const LEAST: usize = 5;
        let columns = Columns { label: label.into(), task: task.map(str::to_string), given: Vec::new() };
        let rows = Rows::read(path, &columns, None, true)?;
        let coding = Coding::of(&rows, columns, path)?;
        let coded = coding.encode(&rows, path)?;
        let width = coding.features.len();
        let names = match coding.tasks.len() {
            0 => vec![path.display().to_string()],
            _ => coding.tasks.clone(),
        };
        let mut sets = Vec::new();
        for (number, name) in names.into_iter().enumerate() {
            let is_of = |row: &usize| coded.tasks.get(*row).is_none_or(|&task| task == number);
            let of_task: Vec<usize> = (0..coded.len()).filter(is_of).collect();
            if of_task.len() < LEAST {
                let found = format!("\"{name}\" has {} rows, needs at least {LEAST}", of_task.len());
                return Err(Error::input(path.display(), found));
            }
            let (train, test) = split(&coded.select(&of_task), 0.2, cx);
            let labelled = |rows: Coded| Labelled { width, x: rows.x, y: rows.y };
            let classes = coding.classes.len();
            sets.push(Parts { name, train: labelled(train), test: labelled(test), classes });
        }
        Ok(Self { sets, classes: coding.classes })
    }

    /// The places of classes among all of them.
    fn places(&self, names: &[String]) -> Result<Vec<usize>> {
        let place = |name: &String| {
            self.classes.iter().position(|class| class == name).ok_or_else(|| {
                Error::usage(format!("there is no class \"{name}\""))
                    .hint(format!("there are {}", self.classes.join(", ")))
            })
        };
        names.iter().map(place).collect()
    }

    fn single(mut self) -> Parts {
        self.sets.swap_remove(0)
    }
}

#[derive(Debug, Args)]
struct ContinualArgs {
    /// Digits of each task; the first of a pair has the label 0
    #[arg(long, default_value = "0/1,2/3,4/5,6/7,8/9")]
    task_pairs: String,
    #[command(flatten)]
    own: OwnArgs,
    /// Column of the tasks
    #[arg(long, default_value = "task")]
    task_col: String,
    /// How strongly the weights of earlier tasks are kept
    #[arg(long, default_value_t = 0.01)]
    beta: f64,
    /// Also keep them as they would be after the next step
    #[arg(long)]
    look_ahead: bool,
    /// Optimisation steps of each task
    #[arg(long, default_value_t = 400)]
    steps_per_task: usize,
    #[command(flatten)]
    repeats: Repeats,
    /// Folder for plots
    #[arg(long)]
    out: Option<PathBuf>,
}

impl ContinualArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        let tasks = match &self.own.data {
            Some(path) => Own::read(path, &self.own.target_col, Some(&self.task_col), cx)?.sets,
            None => continual::digit_tasks(&self.task_pairs)?,
        };
        let config = continual::Config {
            target: Target::mlp(&[tasks[0].train.width, 32, tasks[0].classes]),
            beta: self.beta,
            look_ahead: self.look_ahead,
            steps: self.steps_per_task,
            seeds: self.repeats.seeds,
            ..continual::Config::new()
        };
        show(&[continual::run(&config, &tasks, cx)?.0], self.out.as_deref(), cx)
    }
}

#[derive(Debug, Args)]
struct CausalArgs {
    /// A table of your own; IHDP, or units of its kind, otherwise
    #[arg(long)]
    data: Option<PathBuf>,
    /// Column of the treatment, 0 or 1
    #[arg(long, default_value = "treatment")]
    treatment: String,
    /// Column of the outcome
    #[arg(long, default_value = "y_factual")]
    outcome: String,
    /// Columns of covariates; all others by default
    #[arg(long, value_delimiter = ',')]
    features: Vec<String>,
    /// Replications of IHDP
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3))]
    replications: u64,
    /// Optimisation steps
    #[arg(long, default_value_t = 1000)]
    steps: usize,
    /// Also make heads with noise, so that each effect has a deviation: over so many draws
    #[arg(long, value_name = "DRAWS")]
    samples: Option<usize>,
    /// CSV file for the effect on each unit of your table
    #[arg(long, requires = "data")]
    out: Option<PathBuf>,
}

impl CausalArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        let config = causal::Config { steps: self.steps, samples: self.samples, ..causal::Config::default() };
        let Some(path) = &self.data else {
            let (sets, what) = causal::bundled(self.replications as usize, cx)?;
            return show(&[causal::run(&config, &sets, &what, cx)?.0], None, cx);
        };
        let units = causal::Units::read(path, &self.treatment, &self.outcome, &self.features)?;
        let (findings, all) = causal::run(&config, &[units], &path.display().to_string(), cx)?;
        if let Some(out) = &self.out {
            let mut columns: Vec<(String, &Vec<f64>)> = Vec::new();
            for estimate in &all[0] {
                columns.push((estimate.learner.into(), &estimate.effects));
                let deviations = estimate.deviations.as_ref();
                columns.extend(deviations.map(|values| (format!("{}: deviation", estimate.learner), values)));
            }
            let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
            let mut csv = format!("row,{}\n", names.join(","));
            for row in 0..all[0][0].effects.len() {
                let cells: Vec<String> =
                    columns.iter().map(|(_, values)| format!("{:.6}", values[row])).collect();
                csv += &format!("{},{}\n", row + 1, cells.join(","));
            }
            write_atomic(out, csv.as_bytes())?;
        }
        show(&[findings], None, cx)
    }
}

#[derive(Debug, Args)]
struct TransferArgs {
    /// Degrees that digits are turned by
    #[arg(long, value_delimiter = ',', default_value = "0,30,60,90", conflicts_with = "data")]
    angles: Vec<f64>,
    #[command(flatten)]
    own: OwnArgs,
    /// Column of the domains
    #[arg(long, default_value = "domain")]
    domain_col: String,
    /// Which of the domains is new: the number of an angle, from 0, or a name in the column of domains
    #[arg(long, default_value = "2")]
    held_out: String,
    /// Labelled rows of the new domain
    #[arg(long, default_value_t = 20)]
    labelled: usize,
    /// Optimisation steps on the known domains
    #[arg(long, default_value_t = 1500)]
    steps: usize,
    #[command(flatten)]
    repeats: Repeats,
}

impl TransferArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        if self.labelled == 0 {
            return Err(Error::usage("--labelled must be at least 1"));
        }
        let domains = match &self.own.data {
            Some(path) => Own::read(path, &self.own.target_col, Some(&self.domain_col), cx)?.sets,
            None => transfer::turned_digits(&self.angles),
        };
        let names: Vec<&str> = domains.iter().map(|domain| domain.name.as_str()).collect();
        let by_name = names.iter().position(|name| *name == self.held_out);
        let held_out = by_name.or_else(|| self.held_out.parse().ok()).ok_or_else(|| {
            Error::usage(format!("there is no domain \"{}\"", self.held_out))
                .hint(format!("there are {}", names.join(", ")))
        })?;
        let config = transfer::Config {
            held_out,
            labelled: self.labelled,
            steps: [self.steps, transfer::Config::default().steps[1]],
            seeds: self.repeats.seeds,
        };
        show(&[transfer::run(&config, &domains, cx)?.0], None, cx)
    }
}

#[derive(Debug, Args)]
struct UncertaintyArgs {
    #[command(flatten)]
    own: OwnArgs,
    /// Classes of your rows that networks shall not know
    #[arg(long, value_delimiter = ',', requires = "data")]
    unknown: Vec<String>,
    /// Optimisation steps
    #[arg(long, default_value_t = 1000)]
    steps: usize,
    /// Draws that a prediction averages
    #[arg(long, default_value_t = 20)]
    samples: usize,
    #[command(flatten)]
    repeats: Repeats,
    /// Folder for plots
    #[arg(long)]
    out: Option<PathBuf>,
}

impl UncertaintyArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        let config = uncertainty::Config {
            steps: self.steps,
            samples: self.samples,
            seeds: self.repeats.seeds,
            ..uncertainty::Config::default()
        };
        let known = match self.own.parts(cx)? {
            None => Known::bundled()?,
            Some(own) => {
                let unknown = own.places(&self.unknown)?;
                let known: Vec<usize> = (0..own.classes.len()).filter(|c| !unknown.contains(c)).collect();
                if known.len() < 2 {
                    return Err(Error::usage(format!("{} classes are left to know", known.len()))
                        .hint("name fewer with --unknown"));
                }
                let parts = own.single();
                // Strange are all rows of an unknown class: none of them is learned from.
                let all = Labelled::join(&[parts.train.clone(), parts.test.clone()]).of_classes(&unknown);
                let strange = (!unknown.is_empty()).then(|| (self.unknown.join(", "), all));
                let of_known = |rows: &Labelled| rows.of_classes(&known);
                let (train, test) = (of_known(&parts.train), of_known(&parts.test));
                if train.is_empty() || test.is_empty() {
                    return Err(Error::usage("too few rows of known classes are left"));
                }
                let parts = Parts { name: parts.name, train, test, classes: known.len() };
                Known { parts, strange: strange.into_iter().collect() }
            }
        };
        show(&[uncertainty::run(&config, &known, cx)?.0], self.out.as_deref(), cx)
    }
}

#[derive(Debug, Args)]
struct PruneArgs {
    #[command(flatten)]
    own: OwnArgs,
    /// Shares of the hidden units to remove
    #[arg(long, value_delimiter = ',', default_value = "0.5,0.75")]
    removed: Vec<f64>,
    /// Optimisation steps
    #[arg(long, default_value_t = 1500)]
    steps: usize,
    /// Steps of fine-tuning what stays
    #[arg(long, default_value_t = 300)]
    fine_tune: usize,
    #[command(flatten)]
    repeats: Repeats,
}

impl PruneArgs {
    fn run(self, cx: &Context) -> Result<()> {
        let parts = match self.own.parts(cx)? {
            Some(own) => own.single(),
            None => Parts::digits(&prune::DIGITS),
        };
        let config = prune::Config {
            removed: self.removed,
            steps: [self.steps, self.fine_tune],
            seeds: self.repeats.seeds,
        };
        show(&[prune::run(&config, &parts, cx)?.0], None, cx)
    }
}

#[derive(Debug, Args)]
struct RlArgs {
    /// Family of worlds
    #[arg(long, value_enum, default_value = "cartpole")]
    world: rl::World,
    /// Steps of the evolution strategy
    #[arg(long, default_value_t = 150)]
    steps: usize,
    /// Unseen worlds that policies are judged in
    #[arg(long, default_value_t = 100)]
    test_worlds: usize,
    /// Worlds of your own to judge in: a table with half_length (m) and gravity (m/s²), or angle (degrees)
    #[arg(long, conflicts_with = "test_worlds")]
    worlds: Option<PathBuf>,
    #[command(flatten)]
    repeats: Repeats,
    /// Folder for plots
    #[arg(long)]
    out: Option<PathBuf>,
}

impl RlArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        let config = rl::Config {
            world: self.world,
            steps: self.steps,
            test_worlds: self.test_worlds,
            worlds: self.worlds.as_deref().map(|path| self.world.read(path)).transpose()?,
            seeds: self.repeats.seeds,
        };
        show(&[rl::run(&config, cx)?.0], self.out.as_deref(), cx)
    }
}

#[derive(Debug, Args)]
struct NlpArgs {
    /// Texts of your own, once for every task: a table or .jsonl; a fifth of each is for tests
    #[arg(long)]
    data: Vec<PathBuf>,
    /// Column or field of the texts
    #[arg(long, default_value = "text")]
    text_col: String,
    /// Column or field of the classes
    #[arg(long, default_value = "label")]
    target_col: String,
    /// Optimisation steps of the encoder
    #[arg(long, default_value_t = 600)]
    encoder_steps: usize,
    /// Optimisation steps of each method
    #[arg(long, default_value_t = 600)]
    steps: usize,
    #[command(flatten)]
    repeats: Repeats,
}

impl NlpArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        let config = nlp::Config {
            steps: [self.encoder_steps, self.steps],
            seeds: self.repeats.seeds,
            ..nlp::Config::default()
        };
        let read = |path: &PathBuf| TextTask::read(path, &self.text_col, &self.target_col, cx);
        let tasks = match self.data.is_empty() {
            true => text::bundled(cx)?,
            false => self.data.iter().map(read).collect::<Result<_>>()?,
        };
        show(&[nlp::run(&config, &tasks, cx)?.0], None, cx)
    }
}

#[derive(Debug, Args)]
struct HyperlstmArgs {
    /// A text of your own; Shakespeare otherwise
    #[arg(long)]
    data: Option<PathBuf>,
    /// Optimisation steps
    #[arg(long, default_value_t = 600)]
    steps: usize,
    /// Units of the large LSTM
    #[arg(long, default_value_t = 96)]
    hidden: usize,
    /// Units of the small one
    #[arg(long, default_value_t = 24)]
    small: usize,
    /// Folder for plots
    #[arg(long)]
    out: Option<PathBuf>,
}

impl HyperlstmArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        if self.hidden == 0 || self.small == 0 {
            return Err(Error::usage("--hidden and --small must be at least 1"));
        }
        let config = hyperlstm::Config {
            hidden: [self.hidden, self.small],
            steps: self.steps,
            ..hyperlstm::Config::default()
        };
        let text = match &self.data {
            Some(path) => {
                let text = fs::read(path).map_err(Error::io("read", path))?;
                Characters::of_text(&text, &path.display().to_string())?
            }
            None => Characters::bundled(),
        };
        show(&[hyperlstm::run(&config, &text, cx)?.0], self.out.as_deref(), cx)
    }
}

#[derive(Debug, Args)]
struct ZeroshotArgs {
    #[command(flatten)]
    own: OwnArgs,
    /// Table with a row of attributes for every class; strokes of the digits by default
    #[arg(long)]
    attributes: Option<PathBuf>,
    /// Classes of your rows that are not learned from
    #[arg(long, value_delimiter = ',', requires = "data")]
    unseen: Vec<String>,
    /// Optimisation steps
    #[arg(long, default_value_t = 600)]
    steps: usize,
}

impl ZeroshotArgs {
    fn run(&self, cx: &Context) -> Result<()> {
        let mut config = zeroshot::Config { steps: self.steps, ..zeroshot::Config::default() };
        let own = self.own.parts(cx)?;
        let classes: Vec<String> = match &own {
            Some(own) => own.classes.clone(),
            None => (0..10).map(|digit: u8| digit.to_string()).collect(),
        };
        match &self.attributes {
            Some(path) => {
                config.attributes = zeroshot::read_attributes(path, &self.own.target_col, &classes)?;
            }
            None if own.is_some() => {
                return Err(Error::usage("--data needs --attributes")
                    .hint("a table with a row of numbers for every class"));
            }
            None => {}
        }
        let parts = match own {
            Some(own) => {
                if self.unseen.is_empty() {
                    return Err(Error::usage("--data needs --unseen")
                        .hint(format!("name some of the classes {}", classes.join(", "))));
                }
                config.unseen = vec![own.places(&self.unseen)?];
                own.single()
            }
            None => Parts::digits(&prune::DIGITS),
        };
        show(&[zeroshot::run(&config, &parts, cx)?.0], None, cx)
    }
}

/// Prints what an application came to, and saves its plots.
fn show(findings: &[Findings], out: Option<&Path>, cx: &Context) -> Result<()> {
    let mut saved = Vec::new();
    if let Some(folder) = out {
        ModelFolder::new(folder).create()?;
        for plot in findings.iter().flat_map(|findings| &findings.plots) {
            let path = folder.join(format!("{}.svg", plot.file_stem()));
            plot.save(&path)?;
            saved.push(path);
        }
    }
    cx.emit(&json!({ "findings": findings, "plots": saved }), |_| {
        let mut text = String::new();
        for findings in findings {
            text += &format!("{}\n{}", findings.table.title, findings.table.to_text());
            for note in &findings.notes {
                text += &format!("{note}\n");
            }
            text += "\n";
        }
        for path in &saved {
            text += &format!("plot in {}\n", path.display());
        }
        text
    })
}

/// Compares hypernetworks with plain networks.
pub(super) fn run_compare(args: &CompareArgs, cx: &Context) -> Result<()> {
    if args.rows.is_empty() || args.rows.contains(&0) {
        return Err(Error::usage("--rows must be at least 1"));
    }
    let config = compare::Config {
        steps: args.steps,
        rows: args.rows.clone(),
        seeds: args.seeds,
        ..compare::Config::default()
    };
    let (one, _) = compare::compression(&config, cx)?;
    let (many, _) = compare::sharing(&config, cx)?;
    show(&[one, many], args.out.as_deref(), cx)
}
