//! Verbs that train: `pretrain`, `smooth` and `train`.

use std::path::PathBuf;

use burn::module::Module;
use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, ModelFolder, Result, TensorFile};
use kiln_nn::{Outcome, TrainConfig, TrainRun, TrainSummary};
use serde::{Deserialize, Serialize};

use super::{DataArgs, numbers, widths};
use crate::arch::{Arch, NetConfig, Size};
use crate::checkpoint::{self, Labels, PlainConfig};
use crate::coords::NoiseOn;
use crate::family::{BaseTerm, Family, FamilyConfig, KernelCrop};
use crate::inr::{Inr, InrConfig};
use crate::network::{Plain, Trainable};
use crate::objective::{Goal, Run};
use crate::shp::ShpSolver;
use crate::smooth::{CliquePermuter, Order, SmoothReport};
use crate::training::{FamilyTask, Objective, PlainTask, WarmTask};

const PRETRAIN: &str = "neumeta pretrain";
const TRAIN: &str = "neumeta train";
/// Where a warm start keeps its run, in the folder of the family.
const WARM: &str = "warm";

#[derive(Debug, Args)]
pub(super) struct PretrainArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    /// Steps of the whole run [default: 1000]
    #[arg(long)]
    steps: Option<usize>,
    #[command(flatten)]
    recipe: PretrainRecipe,
}

/// What besides data, steps and seed decides a plain network.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct PretrainRecipe {
    /// What is learned
    #[arg(long, value_enum, default_value = "classify", conflicts_with = "resume")]
    task: Goal,
    /// The network: small, lenet, resnet20, unet, vae, or layers as in "conv1(cin->w,3x3)+relu; fc(w->classes)"
    /// [default: lenet, unet or vae]
    #[arg(long, conflicts_with = "resume")]
    arch: Option<Arch>,
    /// Its width
    #[arg(long, default_value_t = 32, conflicts_with = "resume")]
    width: usize,
    /// Pictures of a step
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-3, conflicts_with = "resume")]
    lr: f64,
    #[command(flatten)]
    #[serde(flatten)]
    pace: Pace,
}

/// When a run is judged and kept.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Pace {
    /// Share of the pictures that is held out for validation
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 200, conflicts_with = "resume")]
    checkpoint_every: usize,
    /// Largest norm of the gradients; 0 leaves them
    #[arg(long, default_value_t = 1.0, conflicts_with = "resume")]
    clip: f64,
    /// Largest size of each number of the gradients before that, as the paper clips them (at 10); 0 leaves them
    #[arg(long, default_value_t = 0.0, conflicts_with = "resume")]
    #[serde(default)]
    clip_value: f64,
}

impl Pace {
    fn training(&self, steps: usize, lr: f64) -> TrainConfig {
        TrainConfig {
            steps,
            lr,
            warmup: steps / 20,
            min_lr_ratio: 0.02,
            weight_decay: 0.0,
            clip_norm: self.clip,
            clip_value: self.clip_value,
            eval_every: self.eval_every,
            checkpoint_every: self.checkpoint_every,
            ..TrainConfig::default()
        }
    }
}

fn check_batch(batch: usize) -> Result<()> {
    if batch == 0 { Err(Error::usage("--batch must be at least 1")) } else { Ok(()) }
}

/// What `pretrain` prints.
#[derive(Serialize)]
struct PretrainResult {
    #[serde(flatten)]
    summary: TrainSummary,
    metric: &'static str,
    /// Of the folded network, on the pictures held out.
    score: f64,
    parameters: usize,
}

pub(super) fn pretrain(args: PretrainArgs, cx: &Context) -> Result<()> {
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(PRETRAIN, folder, args.steps)?,
        (None, Some(out)) => TrainRun::begin(PRETRAIN, out, args.steps.unwrap_or(1000), args.recipe, cx),
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let recipe = &run.recipe;
    check_batch(recipe.batch)?;
    let (config, samples) = if run.resumed {
        let config: PlainConfig = run.folder.config(checkpoint::KIND)?;
        let samples = args.data.read(config.net.goal, Some((&config.net, &config.labels)), false)?;
        (config, samples)
    } else {
        let samples = args.data.read(recipe.task, None, false)?;
        let arch = match (&recipe.arch, recipe.task) {
            (Some(arch), _) => arch.clone(),
            (None, Goal::Classify) => "lenet".parse().map_err(Error::usage)?,
            (None, Goal::Segment) => Arch::Unet,
            (None, Goal::Generate) => Arch::Vae,
        };
        let class_names = match recipe.task {
            Goal::Classify => samples.images.classes.clone(),
            Goal::Segment => (0..samples.mask_classes()).map(|class| class.to_string()).collect(),
            Goal::Generate => Vec::new(),
        };
        let net =
            NetConfig { goal: recipe.task, arch, image: samples.images.shape, classes: class_names.len() };
        let labels = Labels { class_names, white: samples.images.white };
        (PlainConfig { net, size: Size::new(recipe.width), labels }, samples)
    };
    let PlainConfig { net, size, labels } = &config;
    let built = net.build(*size)?;
    let (train, valid) = samples.split(recipe.pace.val_fraction, cx)?;
    let training = recipe.pace.training(run.steps, recipe.lr);
    training.check()?;
    let model = Trainable::draw(&built.graph, &cx.device, &mut cx.rng("draw", size.width as u64));
    run.save(|folder| checkpoint::save_plain_config(folder, net, *size, labels))?;
    cx.note(format!(
        "{} weights and biases; {} pictures, {} held out",
        built.graph.numel(),
        train.len(),
        valid.len()
    ));
    let mut task =
        PlainTask { config: net, built: &built, train: &train, valid: &valid, batch: recipe.batch, cx };
    let trained = run.train(model, &mut task, &training, &args.data.words(), cx)?;
    let summary = run.finish(&trained, "nats")?;
    let plain = trained.model.to_plain(net, *size)?;
    checkpoint::save_plain(run.folder.path(), &plain, labels)?;
    let parameters = plain.parameters(&cx.device);
    let network = Run { goal: net.goal, built: &built, parameters: &parameters, norms: &[] };
    let result = PretrainResult {
        summary,
        metric: net.goal.metric(),
        score: network.score(&valid, cx)?,
        parameters: built.graph.numel(),
    };
    cx.emit(&result, |PretrainResult { summary, metric, score, .. }| {
        format!(
            "{}{metric} {score:.4} on the pictures held out\nmodel in {}\n",
            summary.to_text("nats"),
            summary.model.display()
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct SmoothArgs {
    /// Model folder of a plain network, or its weights as .safetensors
    #[arg(long)]
    weights: PathBuf,
    /// The network, where the weights are a file
    #[arg(long)]
    arch: Option<Arch>,
    /// Its width
    #[arg(long, requires = "arch")]
    width: Option<usize>,
    /// Channels, height and width of its pictures, such as 1x28x28
    #[arg(long, requires = "arch", value_parser = extents)]
    image: Option<[usize; 3]>,
    /// Its classes
    #[arg(long, requires = "arch", default_value_t = 0)]
    classes: usize,
    /// Model folder or .safetensors to write
    #[arg(long)]
    to: PathBuf,
}

fn extents(text: &str) -> std::result::Result<[usize; 3], String> {
    let parts: Option<Vec<usize>> = text.split('x').map(|part| part.parse().ok()).collect();
    parts.and_then(|parts| parts.try_into().ok()).ok_or_else(|| {
        format!("\"{text}\" is no size of pictures: write channels x height x width, as 1x28x28")
    })
}

pub(super) fn smooth(args: &SmoothArgs, cx: &Context) -> Result<()> {
    if args.weights.is_dir() {
        let (plain, labels) = checkpoint::open_plain(&args.weights)?;
        let (ordered, report) = CliquePermuter::default().permute(&plain, cx)?;
        checkpoint::save_plain(&args.to, &ordered, &labels)?;
        return emit_smooth(&report, args, cx);
    }
    let (Some(arch), Some(width), Some(image)) = (&args.arch, args.width, args.image) else {
        return Err(Error::usage(format!("what network {} belongs to is not known", args.weights.display()))
            .hint(
                "give --arch, --width and --image, and --classes where it has any; or name a model folder",
            ));
    };
    let goal = match arch {
        Arch::Unet => Goal::Segment,
        Arch::Vae => Goal::Generate,
        _ => Goal::Classify,
    };
    let net = NetConfig { goal, arch: arch.clone(), image, classes: args.classes };
    let plain = Plain::from_file(net, Size::new(width), TensorFile::read(&args.weights)?)?;
    let (ordered, report) = CliquePermuter::default().permute(&plain, cx)?;
    ordered.to_file()?.write(&args.to)?;
    emit_smooth(&report, args, cx)
}

fn emit_smooth(report: &SmoothReport, args: &SmoothArgs, cx: &Context) -> Result<()> {
    cx.emit(report, |report| {
        let mut text = String::from("tensor                   channels  path as found  in order\n");
        for clique in &report.cliques {
            text += &format!(
                "{:<24} {:>8}  {:>13.2}  {:>8.2}\n",
                clique.name, clique.channels, clique.before, clique.after
            );
        }
        text + &format!(
            "total variation {:.2}, was {:.2}; outputs differ by {:.1e} of the largest\nin {}\n",
            report.variation_after,
            report.variation_before,
            report.output_change,
            args.to.display()
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    #[command(flatten)]
    data: DataArgs,
    /// Model folder of the full network, from `kiln neumeta pretrain`
    #[arg(long, value_name = "DIR", required_unless_present = "resume")]
    base: Option<PathBuf>,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "base"])]
    resume: Option<PathBuf>,
    /// Steps of the whole run, the warm start not counted [default: 2000]
    #[arg(long)]
    steps: Option<usize>,
    #[command(flatten)]
    recipe: TrainRecipe,
}

/// In which order a family finds the channels of its full network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Channels {
    /// Neighbours alike
    Shortest,
    /// At random: an ablation
    Random,
    /// As they are: an ablation
    Given,
}

/// What the output of the function is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum OutputScale {
    /// The spread of each tensor of the full network
    Spread,
    /// Nothing, as published
    None,
}

/// What besides data, steps and seed decides a family.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct TrainRecipe {
    /// Widths that are trained, as 8-32 or 8,12,16 [default: a quarter of the full width to all of it]
    #[arg(long, value_name = "WIDTHS", conflicts_with = "resume")]
    widths: Option<String>,
    /// Depths that are trained, blocks in each stage of a residual network [default: its own]
    #[arg(long, value_name = "DEPTHS", conflicts_with = "resume")]
    depths: Option<String>,
    /// Kernel sizes that are trained, as 1,3,5: larger kernels are cut down to them [default: whole kernels]
    #[arg(long, value_name = "KERNELS", conflicts_with = "resume")]
    #[serde(default)]
    kernels: Option<String>,
    /// What a smaller kernel takes of what is written for a coordinate [default: fold with --kernels, else flat]
    #[arg(long, value_enum, conflicts_with = "resume")]
    #[serde(default)]
    kernel_crop: Option<KernelCrop>,
    /// What the function is added to; none is the published method, which needs a long training
    #[arg(long, value_enum, default_value = "interp", conflicts_with = "resume")]
    base_term: BaseTerm,
    /// Order of the channels of the full network
    #[arg(long, value_enum, default_value = "shortest", conflicts_with = "resume")]
    order: Channels,
    /// How far coordinates are moved at random, half of it in each direction
    #[arg(long, default_value_t = 1.0, conflicts_with = "resume")]
    noise: f64,
    /// Which numbers of a coordinate are moved
    #[arg(long, value_enum, default_value = "outputs", conflicts_with = "resume")]
    noise_on: NoiseOn,
    /// What the reconstruction of the full network counts
    #[arg(long, default_value_t = 1.0, conflicts_with = "resume")]
    recon: f64,
    /// What the norms of the weights count
    #[arg(long, default_value_t = 1e-4, conflicts_with = "resume")]
    reg: f64,
    /// What the distance from the full network's answers counts
    #[arg(long, default_value_t = 0.0, conflicts_with = "resume")]
    kd: f64,
    /// Share of the steps that train the full width
    #[arg(long, default_value_t = 0.25, conflicts_with = "resume")]
    full_share: f64,
    /// Share of the tensors that learn in each step
    #[arg(long, default_value_t = 1.0, conflicts_with = "resume")]
    ratio: f64,
    /// Hand layers to the function one after another, the last first
    #[arg(long, conflicts_with = "resume")]
    blockwise: bool,
    /// Frequencies of the encoding
    #[arg(long, default_value_t = 16, conflicts_with = "resume")]
    num_freqs: usize,
    /// Hidden width of the function
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    hidden: usize,
    /// Its layers before the last
    #[arg(long, default_value_t = 4, conflicts_with = "resume")]
    layers: usize,
    /// Make it a plain perceptron, without residual blocks: an ablation
    #[arg(long, conflicts_with = "resume")]
    plain_mlp: bool,
    /// What its output is multiplied by
    #[arg(long, value_enum, default_value = "spread", conflicts_with = "resume")]
    output_scale: OutputScale,
    /// Steps that only reconstruct the full network, before all others
    #[arg(long, default_value_t = 0, conflicts_with = "resume")]
    warm_steps: usize,
    /// Highest learning rate of those
    #[arg(long, default_value_t = 2e-3, conflicts_with = "resume")]
    warm_lr: f64,
    /// Highest learning rate; after a warm start at most 3e-4
    #[arg(long, default_value_t = 1e-3, conflicts_with = "resume")]
    lr: f64,
    /// Share of the averaged parameters that each step keeps
    #[arg(long, default_value_t = 0.995, conflicts_with = "resume")]
    ema: f64,
    /// Pictures of a step
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    batch: usize,
    #[command(flatten)]
    #[serde(flatten)]
    pace: Pace,
}

impl TrainRecipe {
    fn objective(&self) -> Result<Objective> {
        let within =
            |name: &str, value: f64, most: f64| match value.is_finite() && (0.0..=most).contains(&value) {
                true => Ok(()),
                false => Err(Error::usage(format!("{name} {value} is out of range"))
                    .hint(format!("it must be a number from 0 to {most}"))),
            };
        within("--recon", self.recon, 1e9)?;
        within("--reg", self.reg, 1e9)?;
        within("--kd", self.kd, 1e9)?;
        within("--full-share", self.full_share, 1.0)?;
        within("--ratio", self.ratio, 1.0)?;
        within("--ema", self.ema, 0.999_999)?;
        check_batch(self.batch)?;
        Ok(Objective {
            recon: self.recon,
            reg: self.reg,
            kd: self.kd,
            ema: self.ema,
            full_share: self.full_share,
            ratio: self.ratio,
            blockwise: self.blockwise,
            batch: self.batch,
        })
    }

    fn family(&self, plain: Plain, cx: &Context) -> Result<Family> {
        let (net, full) = (plain.config.clone(), plain.size.width);
        if plain.size != Size::new(full) {
            return Err(Error::usage(format!("the base is a network of width {}", plain.size))
                .hint("a family is made from a network of full depth with whole kernels"));
        }
        let trained = match &self.widths {
            Some(text) => widths(text).map_err(Error::usage)?,
            None => (full.div_ceil(4)..=full).collect(),
        };
        if let Some(wide) = trained.iter().find(|&&width| width > full) {
            return Err(Error::usage(format!("--widths goes to {wide}, the full network's is {full}"))
                .hint("train a wider full network, or fewer widths"));
        }
        let chosen = |text: &Option<String>, what| match text {
            Some(text) => numbers(text, what).map_err(Error::usage),
            None => Ok(Vec::new()),
        };
        let (depths, kernels) = (chosen(&self.depths, "depths")?, chosen(&self.kernels, "kernels")?);
        for &depth in &depths {
            net.build(Size { depth: Some(depth), ..Size::new(full) })?;
        }
        for &kernel in &kernels {
            net.build(Size { kernel: Some(kernel), ..Size::new(full) })?;
        }
        let permuter = |order| CliquePermuter { solver: ShpSolver::default(), order };
        let base = match self.order {
            Channels::Given => plain,
            Channels::Shortest => permuter(Order::Shortest).permute(&plain, cx)?.0,
            Channels::Random => permuter(Order::Random).permute(&plain, cx)?.0,
        };
        let inr = InrConfig {
            hidden: self.hidden,
            layers: self.layers,
            frequencies: self.num_freqs,
            residual: !self.plain_mlp,
            ..Family::inr_config(&net, full)?
        };
        let config = FamilyConfig {
            net,
            full,
            widths: trained,
            depths,
            kernel_crop: self.kernel_crop.unwrap_or(match kernels.is_empty() {
                true => KernelCrop::Flat,
                false => KernelCrop::Fold,
            }),
            kernels,
            inr,
            base: self.base_term,
            output_scale: self.output_scale == OutputScale::Spread,
            noise: self.noise,
            noise_on: self.noise_on,
        };
        Family::new(config, base)
    }
}

/// How good a network of the family is.
#[derive(Serialize)]
struct Score {
    #[serde(flatten)]
    size: Size,
    score: f64,
}

/// What `train` prints.
#[derive(Serialize)]
struct TrainResult {
    #[serde(flatten)]
    summary: TrainSummary,
    metric: &'static str,
    /// On the pictures held out: of the narrowest trained network, of the full one, and of that with the fewest blocks
    /// and the smallest kernels that were trained.
    scores: Vec<Score>,
    /// Of the full network that the family was made from.
    base_score: f64,
}

pub(super) fn train(args: TrainArgs, cx: &Context) -> Result<()> {
    let mut run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(TRAIN, folder, args.steps)?,
        (None, Some(out)) => TrainRun::begin(TRAIN, out, args.steps.unwrap_or(2000), args.recipe, cx),
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let objective = run.recipe.objective()?;
    let training = run.recipe.pace.training(run.steps, run.recipe.lr);
    training.check()?;
    let (family, labels) = match &args.base {
        Some(base) if !run.resumed => {
            let (plain, labels) = checkpoint::open_plain(base)?;
            (run.recipe.family(plain, cx)?, labels)
        }
        _ => checkpoint::open_base(run.folder.path())?,
    };
    let net = &family.config.net;
    let samples = args.data.read(net.goal, Some((net, &labels)), false)?;
    let (train, valid) = samples.split(run.recipe.pace.val_fraction, cx)?;
    run.save(|folder| checkpoint::save_family(folder, &family, &labels))?;
    let inr = warm_start(&run, &family, &args.data.words(), cx)?;
    cx.note(format!(
        "{} parameters write networks of {} weights and fewer; {} pictures, {} held out",
        inr.mlps.num_params(),
        net.build(family.full())?.graph.numel(),
        train.len(),
        valid.len()
    ));
    // A run that was stopped during its warm start has no checkpoint of its own yet.
    let begun = run.folder.file("checkpoint.safetensors").exists();
    run.resumed &= begun;
    let steps = run.steps;
    let mut task =
        FamilyTask { family: &family, objective: &objective, steps, train: &train, valid: &valid, cx };
    let trained = run.train(inr, &mut task, &training, &args.data.words(), cx)?;
    let summary = run.finish(&trained, "nats")?;
    let inr = trained.model.averaged()?;
    let score = |plain: &Plain| {
        let (built, parameters) = (net.build(plain.size)?, plain.parameters(&cx.device));
        Run { goal: net.goal, built: &built, parameters: &parameters, norms: &[] }.score(&valid, cx)
    };
    let at = |size| Ok(Score { size, score: score(&family.sample(&inr, size, 1, cx)?)? });
    let mut ends = family.judged();
    ends.remove(1);
    ends.dedup();
    let result = TrainResult {
        summary,
        metric: net.goal.metric(),
        scores: ends.into_iter().map(at).collect::<Result<_>>()?,
        base_score: score(&family.base)?,
    };
    cx.emit(&result, |TrainResult { summary, metric, scores, base_score }| {
        let mut text = summary.to_text("nats");
        for Score { size, score } in scores {
            text += &format!("{metric} {score:.4} at width {size}\n");
        }
        text + &format!(
            "{metric} {base_score:.4} of the network it was made from\nfamily in {}\n",
            summary.model.display()
        )
    })
}

/// The function before the family is trained: as drawn, or after steps that reconstruct the full network.
fn warm_start(run: &TrainRun<TrainRecipe>, family: &Family, data: &str, cx: &Context) -> Result<Inr> {
    let recipe = &run.recipe;
    let inr = family.draw(&cx.device, &mut cx.rng("inr", 0));
    if recipe.warm_steps == 0 {
        return Ok(inr);
    }
    let folder = ModelFolder::new(run.folder.file(WARM));
    let begun = folder.file("checkpoint.safetensors").exists();
    let training = recipe.pace.training(recipe.warm_steps, recipe.warm_lr);
    let mut task = WarmTask { family, cx };
    let trained = kiln_nn::train(inr, &mut task, &training, Some(&folder), begun, cx)?;
    if trained.outcome == Outcome::Interrupted {
        let place = run.folder.path().display();
        return Err(Error::interrupted(format!(
            "stopped after step {} of the warm start",
            trained.log.len()
        ))
        .hint(format!("continue with `kiln {TRAIN} {data} --resume {place}`")));
    }
    // The average begins with what was learned.
    trained.last.update_average(0.0);
    Ok(trained.last.valid())
}
