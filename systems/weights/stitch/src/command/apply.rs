//! `calibrate`, `eval`, `predict`, `export` and `serve`.

use std::io::BufReader;
use std::path::PathBuf;

use burn::module::Module;
use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, ModelFolder, Report, Result, System, html, write_atomic};
use kiln_data::{ImageOptions, Images};
use kiln_nn::{TrainConfig, likeliest, train};
use serde_json::json;

use super::DataArgs;
use crate::Stitch;
use crate::anchor::Anchor;
use crate::budget::{Budgets, SCORES_FILE, Wanted};
use crate::checkpoint::{self, SnConfig, draw_anchor};
use crate::data::{Batches, split};
use crate::evaluate::{self, Measure, Rival, Score, latencies, predict as classify, scores, write_scores};
use crate::family::AnchorNet;
use crate::norms::NORMS_FILE;
use crate::serve::{Server, over_budget};
use crate::snnet::SnNet;
use crate::training::{Distill, SingleTask, Teacher};

/// What stitches are compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compare {
    /// The smallest anchor, trained anew with the largest as its teacher
    Distill,
}

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
}

pub(super) fn calibrate(args: &CalibrateArgs, cx: &Context) -> Result<()> {
    let (config, mut net) = checkpoint::open_shared(&args.model, cx)?;
    let images = args.data.read_for(&config.interface, config.image(), true)?;
    net.calibrate(0..net.space().len(), &images, &config.interface.scaling, cx)?;
    let count = net.calibrated();
    if count == 0 {
        return Err(Error::usage(format!("{} has no batch norms to calibrate", args.model.display()))
            .hint("networks of other families normalise every image by itself"));
    }
    checkpoint::save_norms(&ModelFolder::new(&args.model), &net)?;
    cx.emit(&json!({ "model": args.model, "networks": count }), |_| {
        format!("{count} networks have batch norms' statistics of their own, in {NORMS_FILE}\n")
    })
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    /// Also measure how long each network takes on this machine
    #[arg(long)]
    latency: bool,
    /// Images of a timed batch
    #[arg(long, default_value_t = 1, requires = "latency")]
    latency_batch: usize,
    /// Train something else for comparison
    #[arg(long, value_enum, requires = "train_data")]
    compare: Option<Compare>,
    /// Images that it is trained on
    #[arg(long, requires = "compare")]
    train_data: Option<PathBuf>,
    /// IDX file of their labels, where it is not beside them
    #[arg(long, requires = "train_data")]
    train_labels: Option<PathBuf>,
    /// Steps that it is trained for
    #[arg(long, default_value_t = 1000, requires = "compare")]
    compare_steps: usize,
    /// Its learning rate
    #[arg(long, default_value_t = 1e-3, requires = "compare")]
    compare_lr: f64,
    /// CSV file to write, with a plot beside it as .svg and .png and both in one page as .html [default: scores.csv in
    /// the model folder]
    #[arg(long)]
    out: Option<PathBuf>,
}

pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (config, net) = checkpoint::open(&args.model, cx)?;
    let images = args.data.read_for(&config.interface, config.image(), false)?;
    let scaling = &config.interface.scaling;
    let mut found = evaluate::evaluate(&net, &images, scaling, cx)?;
    if args.latency {
        if args.latency_batch == 0 {
            return Err(Error::usage("--latency-batch 0 times nothing"));
        }
        let batch: Vec<usize> = (0..args.latency_batch).map(|index| index % images.len()).collect();
        let times = latencies(&net, scaling.tensor(&images, &batch, &cx.device), cx)?;
        found.iter_mut().zip(times).for_each(|(score, ms)| score.latency_ms = Some(ms));
    }
    let rivals: Vec<Rival> = match args.compare {
        Some(Compare::Distill) => vec![distilled(args, &config, &net, &images, cx)?],
        None => Vec::new(),
    };
    let out = args.out.clone().unwrap_or_else(|| args.model.join(SCORES_FILE));
    write_scores(&out, &found)?;
    let plot = evaluate::plot("Accuracy over cost", net.space(), &found, &rivals, Measure::MegaFlops)?;
    plot.save(&out.with_extension("svg"))?;
    plot.save(&out.with_extension("png"))?;
    let front: Vec<usize> =
        evaluate::pareto(&found, Measure::MegaFlops)?.front().iter().map(|point| point.id).collect();
    let mut report = Report::on_data(System::card(&Stitch));
    report.plots.push(plot);
    if args.latency {
        let title = "Accuracy over time";
        report.plots.push(evaluate::plot(title, net.space(), &found, &[], Measure::Milliseconds)?);
    }
    report.tables.push(evaluate::listing(&found, &rivals, &front));
    report.notes.push(format!(
        "{} on {} images of {}.",
        args.model.display(),
        images.len(),
        args.data.data.display()
    ));
    let page = html::page("Networks of a stitched model", &[report])?;
    write_atomic(&out.with_extension("html"), page.as_bytes())?;
    let result = json!({
        "images": images.len(), "out": out, "scores": found, "pareto": front, "rivals": rivals,
    });
    cx.emit(&result, |_| {
        let mut text =
            String::from("   config  name                      MFLOPs     parameters  ms        accuracy\n");
        for Score { config, name, flops, params, latency_ms, acc } in &found {
            let mark = if front.contains(config) { '*' } else { ' ' };
            let ms = latency_ms.map_or("-".into(), |ms| format!("{ms:.3}"));
            let mega = *flops as f64 / 1e6;
            text += &format!("{mark}  {config:<7} {name:<25} {mega:<10.3} {params:<11} {ms:<9} {acc:.4}\n");
        }
        for Rival { name, flops, acc } in &rivals {
            text += &format!("   {name:<33} {:<32.3} {acc:.4}\n", *flops as f64 / 1e6);
        }
        text + &format!("* on the Pareto front; table in {}, plot and page beside it\n", out.display())
    })
}

/// The smallest anchor, trained anew with the largest as its teacher.
fn distilled(
    args: &EvalArgs,
    config: &SnConfig,
    net: &SnNet<AnchorNet>,
    test: &Images,
    cx: &Context,
) -> Result<Rival> {
    let path = args.train_data.as_ref().ok_or_else(|| Error::usage("--compare needs --train-data"))?;
    let options = ImageOptions {
        labels: args.train_labels.clone(),
        target: args.data.target.clone(),
        white: Some(config.interface.white),
        unlabelled: false,
    };
    let images = config.interface.fit(Images::read(path, &options)?, config.image(), path)?;
    let (train_images, valid) = split(&images, 0.1, cx)?;
    let scaling = &config.interface.scaling;
    let teacher =
        Teacher { net: net.anchors[net.anchors.len() - 1].clone(), distill: Distill::Soft, temperature: 1.0 };
    let mut task = SingleTask {
        batches: Batches::new(&train_images, scaling, 64, cx),
        valid: &valid,
        scaling,
        teacher: Some(teacher),
        cx,
    };
    let training = TrainConfig {
        steps: args.compare_steps,
        lr: args.compare_lr,
        warmup: 50.min(args.compare_steps / 2),
        min_lr_ratio: 0.02,
        weight_decay: 0.05,
        ..TrainConfig::default()
    };
    let trained = train(draw_anchor(&config.networks[0], cx), &mut task, &training, None, false, cx)?;
    if trained.outcome == kiln_nn::Outcome::Interrupted {
        return Err(Error::interrupted("stopped while a network was trained for comparison"));
    }
    let probabilities = classify(test, scaling, cx, |x| Ok(trained.model.forward(x)))?;
    Ok(Rival {
        name: "s0 distilled from scratch".into(),
        flops: config.networks[0].outline().total().flops,
        acc: scores(&probabilities, &test.labels).accuracy,
    })
}

/// Which network is to work.
#[derive(Debug, Args)]
struct ChoiceArgs {
    /// The id or the name of a network
    #[arg(long, conflicts_with_all = ["budget_mflops", "budget_ms"])]
    config: Option<String>,
    /// The best network that costs at most so many millions of FLOPs an image
    #[arg(long, value_name = "MFLOPS", conflicts_with = "budget_ms")]
    budget_mflops: Option<f64>,
    /// The best network that takes at most so many milliseconds a batch, as `eval --latency` measured it
    #[arg(long, value_name = "MS")]
    budget_ms: Option<f64>,
}

impl ChoiceArgs {
    fn wanted(&self) -> Wanted {
        match (&self.config, self.budget_mflops, self.budget_ms) {
            (Some(name), ..) => Wanted::Named(name.clone()),
            (None, Some(budget), _) => Wanted::Within(budget, Measure::MegaFlops),
            (None, None, Some(budget)) => Wanted::Within(budget, Measure::Milliseconds),
            (None, None, None) => Wanted::Best,
        }
    }
}

/// What is known of the networks.
#[derive(Debug, Args)]
struct BudgetArgs {
    /// Accuracies and latencies, as `eval` writes them [default: scores.csv in the model folder]
    #[arg(long, value_name = "FILE")]
    scores: Option<PathBuf>,
    /// Refuse a budget below the cheapest network instead of taking that
    #[arg(long)]
    strict: bool,
}

impl BudgetArgs {
    fn open(&self, model: &std::path::Path, net: &SnNet<AnchorNet>, cx: &Context) -> Result<Budgets> {
        let budgets = Budgets::open(model, self.scores.as_deref(), net.space())?;
        if !budgets.are_known() {
            cx.note("no scores yet, so that the dearest network within a budget counts as the best: run kiln stitch eval");
        }
        Ok(budgets)
    }
}

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    choice: ChoiceArgs,
    #[command(flatten)]
    budget: BudgetArgs,
    /// CSV file to write: row, pred, and a probability for each class
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (config, mut net) = checkpoint::open(&args.model, cx)?;
    let wanted = args.choice.wanted();
    let budgets = match wanted {
        // A name needs no scores, and no remark that there are none.
        Wanted::Named(_) => Budgets::open(&args.model, args.budget.scores.as_deref(), net.space())?,
        _ => args.budget.open(&args.model, &net, cx)?,
    };
    let chosen = budgets.choose(&wanted, net.space())?;
    if chosen.over_budget && args.budget.strict {
        return Err(over_budget());
    }
    if chosen.over_budget {
        cx.note("warning: even the cheapest network costs more than the budget; it is taken");
    }
    let interface = &config.interface;
    let images = args.data.read_for(interface, config.image(), true)?;
    net.set_config(chosen.id)?;
    let rows = classify(&images, &interface.scaling, cx, |x| Ok(net.forward(x)))?;
    let failed = |e: csv::Error| Error::work(format!("cannot write {}", args.out.display())).caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let head = ["row", "pred"].map(String::from).into_iter();
    writer
        .write_record(head.chain(interface.classes.iter().map(|class| format!("p_{class}"))))
        .map_err(failed)?;
    for (number, row) in rows.iter().enumerate() {
        let first = [(number + 1).to_string(), interface.classes[likeliest(row)].clone()];
        writer.write_record(first.into_iter().chain(row.iter().map(f32::to_string))).map_err(failed)?;
    }
    let text = writer
        .into_inner()
        .map_err(|e| Error::work(format!("cannot write {}", args.out.display())).caused_by(e.into_error()))?;
    write_atomic(&args.out, &text)?;
    let configuration = net.space().configuration(chosen.id)?;
    let (name, flops) = (configuration.name(), net.space().cost(configuration).flops);
    let result = json!({
        "out": args.out, "rows": rows.len(), "config": chosen.id, "name": name, "flops": flops,
        "over_budget": chosen.over_budget,
    });
    cx.emit(&result, |_| {
        let mega = flops as f64 / 1e6;
        format!(
            "{} predictions by {name}, {mega:.3} MFLOPs an image, in {}\n",
            rows.len(),
            args.out.display()
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// The id or the name of a network
    #[arg(long)]
    config: String,
    /// Model folder to write
    #[arg(long)]
    to: PathBuf,
}

pub(super) fn export(args: &ExportArgs, cx: &Context) -> Result<()> {
    let (config, net) = checkpoint::open(&args.model, cx)?;
    let id = net.space().find(&args.config)?;
    let single = checkpoint::export(&config, &net, id, &args.to)?;
    let name = net.space().configuration(id)?.name();
    let result = json!({ "model": args.to, "config": id, "name": name, "params": single.num_params() });
    cx.emit(&result, |_| format!("{name} with {} parameters in {}\n", single.num_params(), args.to.display()))
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// Read requests from standard input
    #[arg(long, required = true)]
    stdin: bool,
    #[command(flatten)]
    budget: BudgetArgs,
}

pub(super) fn serve(args: &ServeArgs, cx: &Context) -> Result<()> {
    let (config, net) = checkpoint::open(&args.model, cx)?;
    let budgets = args.budget.open(&args.model, &net, cx)?;
    let server = Server { config: &config, net: &net, budgets: &budgets, strict: args.budget.strict };
    let count = server.run(BufReader::new(std::io::stdin()), cx)?;
    cx.note(format!("{count} requests answered"));
    Ok(())
}
