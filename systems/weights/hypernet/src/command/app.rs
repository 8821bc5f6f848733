//! `kiln hypernet app` and `compare`

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use kiln_core::{Context, Error, ModelFolder, Result, write_atomic};
use serde_json::json;

use crate::apps::hyperlstm::{self, Characters};
use crate::apps::text::{self, TextTask};
use crate::apps::{Findings, causal, compare, continual, nlp, prune, rl, transfer, uncertainty, zeroshot};
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
    #[arg(long, default_value_t = 1)]
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
enum App {
    /// Tasks that come one after another; baselines: fine-tuning, elastic weight consolidation, joint training
    Continual {
        /// Digits of each task; the first of a pair has the label 0
        #[arg(long, default_value = "0/1,2/3,4/5,6/7,8/9")]
        task_pairs: String,
        /// Tasks of your own instead: a .csv or .npz file; a fifth of each is for tests
        #[arg(long)]
        data: Option<PathBuf>,
        /// Column of the classes
        #[arg(long, default_value = "label")]
        target_col: String,
        /// Column of the tasks
        #[arg(long, default_value = "task")]
        task_col: String,
        /// How strongly the weights of earlier tasks are kept
        #[arg(long, default_value_t = 0.01)]
        beta: f64,
        /// Optimisation steps of each task
        #[arg(long, default_value_t = 400)]
        steps_per_task: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Folder for plots
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Effects of a treatment on each unit; baselines: TARNet, T-learner, S-learner
    Causal {
        /// A .csv table of your own; IHDP, or units of its kind, otherwise
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
        /// CSV file for the effect on each unit of your table
        #[arg(long, requires = "data")]
        out: Option<PathBuf>,
    },
    /// A new domain from a few rows; baselines: one network for all domains, and the same fine-tuned
    Transfer {
        /// Degrees that digits are turned by
        #[arg(long, value_delimiter = ',', default_value = "0,30,60,90")]
        angles: Vec<f64>,
        /// Which of them is new, from 0
        #[arg(long, default_value_t = 2)]
        held_out: usize,
        /// Labelled rows of the new domain
        #[arg(long, default_value_t = 20)]
        labelled: usize,
        /// Optimisation steps on the known domains
        #[arg(long, default_value_t = 1500)]
        steps: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
    },
    /// Weights as a distribution; baselines: one network, dropout that stays on, an ensemble of five
    Uncertainty {
        /// Optimisation steps
        #[arg(long, default_value_t = 1000)]
        steps: usize,
        /// Draws that a prediction averages
        #[arg(long, default_value_t = 20)]
        samples: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Folder for plots
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// A smaller network, by masks that the hypernetwork makes; baseline: magnitude pruning
    Prune {
        /// Shares of the hidden units to remove
        #[arg(long, value_delimiter = ',', default_value = "0.5,0.75")]
        removed: Vec<f64>,
        /// Optimisation steps
        #[arg(long, default_value_t = 1500)]
        steps: usize,
        /// Steps of fine-tuning what stays
        #[arg(long, default_value_t = 300)]
        fine_tune: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
    },
    /// Policies for worlds that differ; baseline: one policy that sees the description of the world
    Rl {
        /// Family of worlds
        #[arg(long, value_enum, default_value = "cartpole")]
        world: rl::World,
        /// Steps of the evolution strategy
        #[arg(long, default_value_t = 150)]
        steps: usize,
        /// Unseen worlds that policies are judged in
        #[arg(long, default_value_t = 100)]
        test_worlds: usize,
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
        /// Folder for plots
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Texts of several tasks with one frozen encoder; baselines: adapters of each task, a shared head
    Nlp {
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
        /// Repetitions
        #[arg(long, default_value_t = 1)]
        seeds: u64,
    },
    /// Characters of a text, by an LSTM whose weights another changes at every step; baseline: an LSTM
    Hyperlstm {
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
    },
    /// Digits that were never seen, from their description; baseline: a linear map of the attributes
    Zeroshot {
        /// CSV file with a row of attributes for every digit; strokes by default
        #[arg(long)]
        attributes: Option<PathBuf>,
        /// Optimisation steps
        #[arg(long, default_value_t = 600)]
        steps: usize,
    },
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
    if args.rows.is_empty() || args.rows.contains(&0) || args.seeds == 0 {
        return Err(Error::usage("--rows and --seeds must be at least 1"));
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

impl AppArgs {
    /// Runs the application.
    pub fn run(self, cx: &Context) -> Result<()> {
        let at_least_one = |seeds: u64| match seeds {
            0 => Err(Error::usage("--seeds must be at least 1")),
            seeds => Ok(seeds),
        };
        match self.app {
            App::Continual { task_pairs, data, target_col, task_col, beta, steps_per_task, seeds, out } => {
                let mut config = continual::Config {
                    beta,
                    steps: steps_per_task,
                    seeds: at_least_one(seeds)?,
                    ..continual::Config::new()
                };
                let tasks = match data {
                    Some(path) => own_tasks(&path, target_col, task_col, cx)?,
                    None => continual::digit_tasks(&task_pairs)?,
                };
                let classes = tasks.iter().flat_map(|task| &task.train.y).max().map_or(0, |last| last + 1);
                config.target = Target::mlp(&[tasks[0].train.width, 32, classes]);
                show(&[continual::run(&config, &tasks, cx)?.0], out.as_deref(), cx)
            }
            App::Causal { data, treatment, outcome, features, replications, steps, out } => {
                let config = causal::Config { steps, ..causal::Config::default() };
                let Some(path) = data else {
                    let (sets, what) = causal::bundled(replications as usize, cx)?;
                    return show(&[causal::run(&config, &sets, &what, cx)?.0], None, cx);
                };
                let units = causal::Units::read(&path, &treatment, &outcome, &features)?;
                let name = path.display().to_string();
                let (findings, all) = causal::run(&config, &[units], &name, cx)?;
                if let Some(out) = out {
                    let mut csv =
                        format!("row,{}\n", all[0].iter().map(|e| e.learner).collect::<Vec<_>>().join(","));
                    for row in 0..all[0][0].effects.len() {
                        let effects: Vec<String> =
                            all[0].iter().map(|e| format!("{:.6}", e.effects[row])).collect();
                        csv += &format!("{},{}\n", row + 1, effects.join(","));
                    }
                    write_atomic(&out, csv.as_bytes())?;
                }
                show(&[findings], None, cx)
            }
            App::Transfer { angles, held_out, labelled, steps, seeds } => {
                if labelled == 0 {
                    return Err(Error::usage("--labelled must be at least 1"));
                }
                let config = transfer::Config {
                    angles,
                    held_out,
                    labelled,
                    steps: [steps, transfer::Config::default().steps[1]],
                    seeds: at_least_one(seeds)?,
                };
                show(&[transfer::run(&config, cx)?.0], None, cx)
            }
            App::Uncertainty { steps, samples, seeds, out } => {
                let config = uncertainty::Config {
                    steps,
                    samples,
                    seeds: at_least_one(seeds)?,
                    ..uncertainty::Config::default()
                };
                show(&[uncertainty::run(&config, cx)?.0], out.as_deref(), cx)
            }
            App::Prune { removed, steps, fine_tune, seeds } => {
                let config =
                    prune::Config { removed, steps: [steps, fine_tune], seeds: at_least_one(seeds)? };
                show(&[prune::run(&config, cx)?.0], None, cx)
            }
            App::Rl { world, steps, test_worlds, seeds, out } => {
                let config = rl::Config { world, steps, test_worlds, seeds: at_least_one(seeds)? };
                show(&[rl::run(&config, cx)?.0], out.as_deref(), cx)
            }
            App::Nlp { data, text_col, target_col, encoder_steps, steps, seeds } => {
                let config = nlp::Config {
                    steps: [encoder_steps, steps],
                    seeds: at_least_one(seeds)?,
                    ..nlp::Config::default()
                };
                let read = |path: &PathBuf| TextTask::read(path, &text_col, &target_col, cx);
                let tasks = match data.is_empty() {
                    true => text::bundled(cx)?,
                    false => data.iter().map(read).collect::<Result<_>>()?,
                };
                show(&[nlp::run(&config, &tasks, cx)?.0], None, cx)
            }
            App::Hyperlstm { data, steps, hidden, small, out } => {
                if hidden == 0 || small == 0 {
                    return Err(Error::usage("--hidden and --small must be at least 1"));
                }
                let config =
                    hyperlstm::Config { hidden: [hidden, small], steps, ..hyperlstm::Config::default() };
                let text = match data {
                    Some(path) => {
                        let text = fs::read(&path).map_err(Error::io("read", &path))?;
                        Characters::of_text(&text, &path.display().to_string())?
                    }
                    None => Characters::bundled(),
                };
                show(&[hyperlstm::run(&config, &text, cx)?.0], out.as_deref(), cx)
            }
            App::Zeroshot { attributes, steps } => {
                let mut config = zeroshot::Config { steps, ..zeroshot::Config::default() };
                if let Some(path) = attributes {
                    config.attributes = zeroshot::read_attributes(&path)?;
                }
                show(&[zeroshot::run(&config, cx)?.0], None, cx)
            }
        }
    }
}

/// Tasks of a user's table, a fifth of each for tests.
fn own_tasks(path: &Path, label: String, task: String, cx: &Context) -> Result<Vec<continual::TaskData>> {
    let columns = Columns { label, task: Some(task), given: Vec::new() };
    let rows = Rows::read(path, &columns, None, true)?;
    let coding = Coding::of(&rows, columns, path)?;
    let coded = coding.encode(&rows, path)?;
    let width = coding.features.len();
    let mut tasks = Vec::new();
    for (number, name) in coding.tasks.iter().enumerate() {
        let of_task: Vec<usize> = (0..coded.len()).filter(|&row| coded.tasks[row] == number).collect();
        if of_task.len() < 5 {
            return Err(Error::input(
                path.display(),
                format!("task \"{name}\" has {} rows, needs at least 5", of_task.len()),
            ));
        }
        let (train, test) = split(&coded.select(&of_task), 0.2, cx);
        let labelled = |rows: Coded| Labelled { width, x: rows.x, y: rows.y };
        tasks.push(continual::TaskData { train: labelled(train), test: labelled(test) });
    }
    Ok(tasks)
}
