//! `kiln mip analyze` and `kiln mip ablate`

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Result, write_atomic};
use kiln_data::{ImageOptions, Images, digits};

use super::shape::ShapeArgs;
use super::train::PROBED;
use crate::ablation::{self, Axis};
use crate::checkpoint::{self, TaskKind};
use crate::classify::{Control, Sampling};
use crate::experiment::{digit_images, probe};
use crate::proportionality::{ProportionalityReport, measure};
use crate::register;
use crate::scale::{self, Scans};

#[derive(Debug, Args)]
pub(super) struct AnalyzeArgs {
    /// Model folder; without it an untrained network is measured
    #[arg(long)]
    model: Option<PathBuf>,
    /// Images to pass through it; by default, for a classifier, the digits that come with Kiln
    #[arg(long)]
    data: Option<PathBuf>,
    #[command(flatten)]
    shape: ShapeArgs,
    /// Conditions, the same for all components
    #[arg(long, value_delimiter = ',', default_value = "0.01,0.02,0.05,0.1,0.2,0.5,1")]
    gammas: Vec<f64>,
    /// JSON file to write; a plot goes beside it
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct AblateArgs {
    /// What is varied, one after another
    #[arg(
        long,
        value_enum,
        value_delimiter = ',',
        default_value = "activation,norm,dim,arch,optim,encoding"
    )]
    axes: Vec<Axis>,
    /// Seeds of each run
    #[arg(long, default_value_t = 3)]
    seeds: u64,
    /// Steps of each run
    #[arg(long, default_value_t = 700)]
    steps: usize,
    /// Learning rate of Adam; gradient descent takes ten times as much
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Images; by default the digits that come with Kiln
    #[arg(long)]
    data: Option<PathBuf>,
    /// Folder to write: ablation.csv and a plot of the losses for each axis
    #[arg(long)]
    out: PathBuf,
}

/// Measures how weights, activations and gradients scale with the condition.
pub(super) fn analyze(args: &AnalyzeArgs, cx: &Context) -> Result<()> {
    let report = match &args.model {
        Some(model) => match checkpoint::task(model)? {
            TaskKind::Classify => classifier(args, cx)?,
            TaskKind::Register => registration(args, model, cx)?,
            TaskKind::Scale => segmentation(args, model, cx)?,
        },
        None => classifier(args, cx)?,
    };
    let json = serde_json::to_vec_pretty(&report)
        .map_err(|e| Error::work(format!("cannot write {}", args.out.display())).caused_by(e))?;
    write_atomic(&args.out, &json)?;
    report.plot().save(&args.out.with_extension("svg"))?;
    cx.emit(&report, |report| {
        let mut text = String::from("quantity                 slope   largest/smallest\n");
        for d in [&report.all_weights].into_iter().chain(&report.activations).chain([&report.gradient]) {
            text += &format!("{:<24} {:<7.3} {:.3}\n", d.name, d.slope, d.ratio);
        }
        text + &format!(
            "1 is proportional to the condition, 0 independent of it; all of it in {}\n",
            args.out.display()
        )
    })
}

fn classifier(args: &AnalyzeArgs, cx: &Context) -> Result<ProportionalityReport> {
    let images = match &args.data {
        Some(data) => Images::read(data, &ImageOptions::default())?,
        None => digit_images(digits::test()),
    };
    let (config, model) = match &args.model {
        Some(path) => checkpoint::open(path, cx)?,
        None => {
            let config = args.shape.config(&images, Control::Rotation, Sampling::Uniform, None)?;
            let model = config.draw(None, cx)?;
            (config, model)
        }
    };
    if images.shape != config.network.image {
        let found = format!("the images are {:?}, channels first", images.shape);
        return Err(Error::usage(found)
            .hint(format!("the model takes {:?}: name others with --data", config.network.image)));
    }
    let images = images.select(&first(images.len()));
    measure(&model, config.ranges.len(), &args.gammas, &cx.device, |net| probe(net, &images, cx))
}

fn registration(args: &AnalyzeArgs, path: &Path, cx: &Context) -> Result<ProportionalityReport> {
    let (config, model) = checkpoint::open_register(path, cx)?;
    let data = data(args)?;
    let images = match register::read_pairs(data)? {
        Some(images) => images,
        None => Images::read(data, &ImageOptions { white: Some(config.white), ..ImageOptions::default() })?,
    };
    register::check(&images)?;
    if images.shape[1..] != config.image {
        return Err(Error::input(data.display(), format!("the images are {:?}", &images.shape[1..]))
            .hint(format!("the model was trained on {:?}, height first", config.image)));
    }
    let pairs = register::draw_pairs(&images, PROBED / 4, &mut cx.rng("pairs", 0));
    measure(&model, 1, &args.gammas, &cx.device, |net| register::probe(net, &images, &pairs, cx))
}

fn segmentation(args: &AnalyzeArgs, path: &Path, cx: &Context) -> Result<ProportionalityReport> {
    let (config, model) = checkpoint::open_scale(path, cx)?;
    let data = data(args)?;
    let scans = Scans::read(data)?;
    if scans.images.shape[0] != config.image[0] {
        let found = format!("the images have {} channels", scans.images.shape[0]);
        return Err(
            Error::input(data.display(), found).hint(format!("the model was trained on {}", config.image[0]))
        );
    }
    let scans = scans.select(&first(scans.len()));
    measure(&model, 1, &args.gammas, &cx.device, |net| scale::probe(net, &scans, cx))
}

fn data(args: &AnalyzeArgs) -> Result<&Path> {
    args.data.as_deref().ok_or_else(|| {
        Error::usage("there are no images to pass through the model").hint("name some with --data")
    })
}

/// The first of so many images, as many as are looked at.
fn first(count: usize) -> Vec<usize> {
    (0..count.min(PROBED)).collect()
}

/// Compares the parametrisations.
pub(super) fn ablate(args: &AblateArgs, cx: &Context) -> Result<()> {
    if args.seeds == 0 || args.steps < 2 {
        return Err(Error::usage("an ablation needs at least one seed and two steps"));
    }
    let images = match &args.data {
        Some(data) => Images::read(data, &ImageOptions::default())?,
        None => digit_images(digits::train()),
    };
    std::fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    let grid = ablation::Grid { steps: args.steps, seeds: args.seeds, lr: args.lr };
    let lines = ablation::run(&args.axes, &grid, &images, cx)?;
    let mut writer = csv::Writer::from_writer(Vec::new());
    let failed = |e: csv::Error| Error::work("cannot write ablation.csv").caused_by(e);
    for line in &lines {
        writer.serialize(&line.summary).map_err(failed)?;
    }
    let text = writer
        .into_inner()
        .map_err(|e| Error::work("cannot write ablation.csv").caused_by(e.into_error()))?;
    write_atomic(&args.out.join("ablation.csv"), &text)?;
    for plot in ablation::plots(&lines) {
        plot.save(&args.out.join(plot.file_stem()).with_extension("svg"))?;
    }
    let summaries: Vec<_> = lines.iter().map(|line| &line.summary).collect();
    cx.emit(&summaries, |summaries| {
        let mut text = String::from("axis         setting      arm             steps   ratio   diverged\n");
        for s in summaries.iter() {
            text += &format!(
                "{:<12} {:<12} {:<15} {:<7.0} {:<7.2} {}\n",
                s.axis, s.setting, s.arm, s.steps, s.convergence_ratio, s.diverged
            );
        }
        text + &format!("curves and table in {}\n", args.out.display())
    })
}
