//! `kiln hypernet add-task`

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, ModelFolder, Result, TensorFile};
use rand::RngExt;
use serde_json::json;

use super::predict::score;
use crate::conditioning::Conditioning;
use crate::data::Rows;
use crate::hypernet::OutputRegularizer;
use crate::model::{self, KIND};
use crate::training::{Fit, cross_entropy, fit};

#[derive(Debug, Args)]
pub(super) struct AddTaskArgs {
    /// Model folder, conditioned on tasks
    #[arg(long)]
    model: PathBuf,
    /// .csv or .npz file of labelled rows of the new task
    #[arg(long)]
    data: PathBuf,
    /// How strongly the weights of the other tasks are kept
    #[arg(long, default_value_t = 0.01)]
    beta: f64,
    /// Optimisation steps
    #[arg(long, default_value_t = 400)]
    steps: usize,
    /// Learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Folder for the model with the new task
    #[arg(long)]
    out: PathBuf,
}

/// Learns one more task without forgetting the others.
pub(super) fn run(args: &AddTaskArgs, cx: &Context) -> Result<()> {
    const BATCH: usize = 64;
    let (mut config, hyper) = model::open(&args.model, cx)?;
    let [Conditioning::Task { tasks: known, .. }] = config.hyper.conditioning[..] else {
        return Err(Error::input(args.model.display(), "depends on more than the task")
            .hint("tasks are added to models trained with --cond task"));
    };
    let folder = ModelFolder::new(&args.out);
    if folder.file("config.json").exists() {
        return Err(Error::usage(format!("{} already holds a model", args.out.display()))
            .hint("choose another --out"));
    }
    let rows = Rows::read(&args.data, &config.coding.columns, Some(&config.coding.features), true)?;
    let new: BTreeSet<&String> =
        rows.tasks.iter().filter(|task| !config.coding.tasks.contains(task)).collect();
    let [name] = new.iter().collect::<Vec<_>>()[..] else {
        return Err(Error::input(
            args.data.display(),
            format!("holds {} new tasks, must hold one", new.len()),
        )
        .hint(format!("the model knows {}", config.coding.tasks.join(", "))));
    };
    let name = (*name).clone();
    config.coding.tasks.push(name.clone());
    let coded = config.coding.encode(&rows, &args.data)?;
    let coded = coded.select(&(0..coded.len()).filter(|&row| coded.tasks[row] == known).collect::<Vec<_>>());

    let hyper = hyper.add_task()?;
    config.hyper = hyper.config().clone();
    let before = OutputRegularizer::snapshot(&hyper, known)?;
    let hyper = fit(hyper, Fit::new(args.steps, args.lr), cx, |hyper, step| {
        let mut rng = cx.rng("batch", step as u64);
        let group = (0..BATCH).map(|_| rng.random_range(0..coded.len())).collect();
        let batch = coded.batch(&[group], &config.hyper.conditioning, ("noise", 0), cx);
        let theta = hyper.generate(&batch.condition)?.flat;
        let loss = cross_entropy(config.target.forward(theta, batch.x), batch.y);
        Ok(loss + before.value(hyper)? * args.beta)
    })?;
    let moved = f64::from(before.value(&hyper)?.into_scalar::<f32>()).sqrt();
    let scores = score(&config, &hyper, &coded, 1, cx)?;
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(&hyper))?;
    folder.save_config(KIND, &config)?;
    let result = json!({
        "model": args.out, "task": name, "rows": coded.len(), "accuracy_on_them": scores.accuracy,
        "moved_weights_of_others": moved,
    });
    cx.emit(&result, |_| {
        format!(
            "task {name} learned: accuracy {:.4} on its {} rows; weights of the other tasks moved by {moved:.4} \
             (Euclidean); model in {}\n",
            scores.accuracy,
            coded.len(),
            args.out.display()
        )
    })
}
