//! `kiln stitch init` and `train`

use std::path::PathBuf;

use burn::module::Module;
use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, ErrorKind, ModelFolder, Result, TensorFile, write_atomic};
use kiln_data::Images;
use kiln_nn::TrainRun;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::training::{TestArgs, TrainResult, TrainingArgs};
use super::{DataArgs, read_anchors};
use crate::checkpoint::{
    Interface, SnConfig, open_anchor, open_shared, open_untrained, save, save_anchor_config, save_config,
    save_norms, take_norms,
};
use crate::data::{Batches, Scaling, sample, split};
use crate::family::{AnchorConfig, AnchorNet};
use crate::norms::NORMS_FILE;
use crate::snnet::{CutFit, SnNet, SnNetConfig};
use crate::space::SpaceConfig;
use crate::training::{Distill, JointTask, Sampling, Teacher};

/// The command whose runs a model folder keeps.
const TRAIN: &str = "stitch train";
/// The folder of the teacher within that of a run.
const TEACHER: &str = "teacher";

/// How stitching layers begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Start {
    /// With the least-squares solution
    Ls,
    /// At random
    Random,
}

/// The space, and how its layers begin.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct BuildArgs {
    #[command(flatten)]
    #[serde(flatten)]
    space: SpaceConfig,
    /// Images that stitching layers are fitted to
    #[arg(long, default_value_t = 100)]
    init_images: usize,
    /// Train only a product of this rank beside each stitching layer
    #[arg(long)]
    rank: Option<usize>,
    /// Keep only so many stitches, in each class of cost the one whose front gives what is likest to what its rear takes
    #[arg(long, value_name = "COUNT")]
    prune_space: Option<usize>,
    /// What counts as like
    #[arg(long, value_enum, default_value = "cka", requires = "prune_space")]
    #[serde(default)]
    prune_by: Likeness,
}

/// How alike what a front gives and what a rear takes are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Likeness {
    /// Their centred kernel alignment
    #[default]
    Cka,
    /// The share of the variance that least squares explains
    Residual,
}

impl BuildArgs {
    /// Joins anchors; with `images`, fits the layers to them.
    fn build(
        &self,
        anchors: &[PathBuf],
        images: impl FnOnce(&Interface, [usize; 3]) -> Result<Images>,
        start: Start,
        cx: &Context,
    ) -> Result<(SnConfig, SnNet<AnchorNet>, Images, Vec<CutFit>)> {
        let models = read_anchors(anchors, cx)?;
        let (networks, interface): (Vec<_>, _) =
            (models.iter().map(|model| model.network.clone()).collect(), models[0].interface.clone());
        let images = images(&interface, networks[0].outline().image)?;
        if self.init_images == 0 {
            return Err(Error::usage("--init-images 0 leaves nothing to fit stitching layers to"));
        }
        let config = SnNetConfig::new(models.into_iter().map(|model| model.net).collect());
        let config = config.with_space(self.space.clone()).with_rank(self.rank);
        let mut net = config.draw(&mut cx.rng("stitches", 0), &cx.device)?;
        let mut fits = Vec::new();
        if start == Start::Ls || self.prune_space.is_some() {
            let random = net.stitches.clone();
            let chosen = sample(&images, self.init_images, &mut cx.rng("init images", 0));
            let all: Vec<usize> = (0..chosen.len()).collect();
            let chosen = interface.scaling.tensor(&chosen, &all, &cx.device);
            fits = net.fit(chosen.clone(), cx)?;
            warn_of_few_rows(&net, &fits, cx);
            if start == Start::Random {
                net.stitches = random;
            }
            if let Some(count) = self.prune_space {
                let merits = match self.prune_by {
                    Likeness::Cka => net.alignments(chosen, cx)?,
                    Likeness::Residual => fits.iter().map(|fit| (fit.cut, -fit.residual)).collect(),
                };
                net = net.prune(count, &merits);
            }
        }
        Ok((SnConfig::of(&net, networks, interface, self.rank), net, images, fits))
    }
}

/// Says where there are fewer rows than unknowns.
fn warn_of_few_rows(net: &SnNet<AnchorNet>, fits: &[CutFit], cx: &Context) {
    let few = fits.iter().find(|fit| fit.rows < net.space().layer_widths(fit.cut.layer)[0] + 1);
    if let Some(fit) = few {
        cx.note(format!(
            "warning: {} rows of activations do not determine {} weights a channel; the smallest solution is taken \
             (--init-images takes more images)",
            fit.rows,
            net.space().layer_widths(fit.cut.layer)[0] + 1
        ));
    }
}

#[derive(Debug, Args)]
pub(super) struct InitArgs {
    /// Model folders of anchors
    #[arg(long, value_delimiter = ',', required = true)]
    anchors: Vec<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    build: BuildArgs,
    /// Model folder to write
    #[arg(long)]
    to: PathBuf,
}

pub(super) fn init(args: &InitArgs, cx: &Context) -> Result<()> {
    let images = |interface: &Interface, shape| args.data.read_for(interface, shape, true);
    let (config, mut net, images, fits) = args.build.build(&args.anchors, images, Start::Ls, cx)?;
    // The anchors are as they were, and so are their statistics.
    let stitches = net.anchors.len()..net.space().len();
    net.calibrate(stitches, &images, &config.interface.scaling, cx)?;
    save(&ModelFolder::new(&args.to), &config, &net)?;
    let name = |fit: &CutFit| format!("{}>{}", fit.cut.after, fit.cut.before);
    let lines: Vec<_> = fits
        .iter()
        .map(|fit| json!({ "cut": name(fit), "rows": fit.rows, "rank": fit.rank, "residual": fit.residual }))
        .collect();
    let result = json!({
        "model": args.to, "networks": net.space().len(), "layers": net.space().layers().len(), "fits": lines,
    });
    cx.emit(&result, |_| {
        let worst = fits.iter().map(|fit| fit.residual).fold(0.0, f64::max);
        format!(
            "{} networks with {} stitching layers; at worst {:.1} % of what a rear takes is not explained\nmodel in {}\n",
            net.space().len(),
            net.space().layers().len(),
            100.0 * worst,
            args.to.display()
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct TrainArgs {
    /// Model folders of anchors
    #[arg(long, value_delimiter = ',', required_unless_present_any = ["resume", "from"])]
    anchors: Vec<PathBuf>,
    /// Model folder that `kiln stitch init` wrote, instead of anchors
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "anchors", "kernel", "stride", "include_m0", "direction", "pairs", "max_anchors", "init", "init_images",
        "rank", "prune_space", "prune_by",
    ])]
    from: Option<PathBuf>,
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    test: TestArgs,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "out", "anchors", "from", "kernel", "stride", "include_m0", "direction", "pairs", "max_anchors", "init",
        "init_images", "rank", "prune_space", "prune_by", "sampling", "distill", "temperature", "teacher", "freeze_anchors", "lr",
        "batch", "min_lr_ratio", "warmup", "weight_decay", "clip", "val_fraction", "eval_every", "checkpoint_every",
    ])]
    resume: Option<PathBuf>,
    /// Steps of the whole run [default: 2000]
    #[arg(long)]
    steps: Option<usize>,
    /// Anchor that teaches, instead of the largest one
    #[arg(long, value_name = "DIR")]
    teacher: Option<PathBuf>,
    #[command(flatten)]
    recipe: JointRecipe,
}

/// What besides data, steps and seed decides how a joint training turns out.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct JointRecipe {
    #[command(flatten)]
    #[serde(flatten)]
    build: BuildArgs,
    /// How stitching layers begin
    #[arg(long, value_enum, default_value = "ls")]
    init: Start,
    /// Which networks a step trains
    #[arg(long, value_enum, default_value = "uniform")]
    sampling: Sampling,
    /// What a teacher adds to the loss
    #[arg(long, value_enum, default_value = "none")]
    distill: Distill,
    /// What logits are divided by in a soft distillation
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Train only the stitching layers
    #[arg(long)]
    freeze_anchors: bool,
    /// Highest learning rate, a tenth of the anchors' by default
    #[arg(long, default_value_t = 1e-4)]
    lr: f64,
    #[command(flatten)]
    #[serde(flatten)]
    training: TrainingArgs,
}

pub(super) fn train(args: TrainArgs, cx: &Context) -> Result<()> {
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(TRAIN, folder, args.steps)?,
        (None, Some(out)) => TrainRun::begin(TRAIN, out, args.steps.unwrap_or(2000), args.recipe, cx),
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let recipe = &run.recipe;
    if !(recipe.temperature.is_finite() && recipe.temperature > 0.0) {
        return Err(Error::usage(format!("a temperature of {} is not positive", recipe.temperature)));
    }
    if args.teacher.is_some() && recipe.distill == Distill::None {
        return Err(
            Error::usage("--teacher has nothing to teach").hint("say how with --distill hard or soft")
        );
    }
    let training = recipe.training.config(run.steps, recipe.lr)?;
    let read = |interface: &Interface, shape| args.data.read_for(interface, shape, false);
    let (config, net, images) = if run.resumed {
        let (config, net) = open_untrained(run.folder.path(), cx)?;
        let images = read(&config.interface, config.image())?;
        (config, net, images)
    } else if let Some(from) = &args.from {
        let (config, net) = open_shared(from, cx)?;
        let images = read(&config.interface, config.image())?;
        (config, net, images)
    } else {
        let (config, net, images, _) = recipe.build.build(&args.anchors, read, recipe.init, cx)?;
        (config, net, images)
    };
    let test = args.test.read(&config.interface, config.image(), args.data.target.as_ref())?;
    let (train, valid) = split(&images, recipe.training.val_fraction, cx)?;
    let teacher = teacher(&run, args.teacher.as_ref(), &config, &net, cx)?;
    run.save(|folder| {
        if let Some((teacher, network)) = &teacher {
            let inside = ModelFolder::new(folder.file(TEACHER));
            inside.create()?;
            inside.save_weights(&TensorFile::from_module(&teacher.net))?;
            save_anchor_config(&inside, network, &config.interface)?;
        }
        save_config(folder, &config)
    })?;
    cx.note(format!(
        "{} networks of {} anchors and {} stitching layers, {} parameters; {} images, {} held out",
        net.space().len(),
        net.anchors.len(),
        net.stitches.len(),
        net.num_params(),
        train.len(),
        valid.len()
    ));
    let net = if recipe.freeze_anchors { net.freeze_anchors() } else { net };
    let scaling = &config.interface.scaling;
    let mut task = JointTask {
        batches: Batches::new(&train, scaling, recipe.training.batch, cx),
        valid: &valid,
        scaling,
        sampling: recipe.sampling,
        frozen: recipe.freeze_anchors,
        teacher: teacher.map(|(teacher, _)| teacher),
        cx,
    };
    // Statistics of earlier weights must not outlive them, but they do where nothing is trained.
    let norms = take_norms(&run.folder)?;
    let trained = run.train(net, &mut task, &training, &args.data.shown(), cx);
    if let (Err(error), Some(norms)) = (&trained, norms)
        && error.kind() == ErrorKind::Usage
    {
        write_atomic(&run.folder.file(NORMS_FILE), &norms)?;
    }
    let mut trained = trained?;
    let summary = run.finish(&trained, "nats per image")?;
    let first = if recipe.freeze_anchors { trained.model.anchors.len() } else { 0 };
    trained.model.calibrate(first..trained.model.space().len(), &train, scaling, cx)?;
    save_norms(&run.folder, &trained.model)?;
    let mean = |images: &Images| mean_accuracy(&trained.model, images, scaling, cx);
    let result =
        TrainResult { summary, accuracy: mean(&valid)?, test_accuracy: test.as_ref().map(mean).transpose()? };
    cx.emit(&result, |TrainResult { summary, accuracy, test_accuracy }| {
        let test =
            test_accuracy.map_or(String::new(), |a| format!("mean accuracy {a:.4} on the test images\n"));
        format!(
            "{}mean accuracy of all networks {accuracy:.4} on the images held out\n{test}model in {}\n",
            summary.to_text("nats an image"),
            summary.model.display()
        )
    })
}

/// Whom the networks learn from: what the folder of a resumed run keeps, the anchor that was named, or the largest one.
fn teacher(
    run: &TrainRun<JointRecipe>,
    named: Option<&PathBuf>,
    config: &SnConfig,
    net: &SnNet<AnchorNet>,
    cx: &Context,
) -> Result<Option<(Teacher<AnchorNet>, AnchorConfig)>> {
    let JointRecipe { distill, temperature, .. } = run.recipe;
    if distill == Distill::None {
        return Ok(None);
    }
    let kept = run.folder.file(TEACHER);
    let path = if run.resumed { Some(&kept) } else { named };
    let (teacher, network) = match path {
        Some(path) => {
            let model = open_anchor(path, cx)?;
            if model.interface != config.interface || model.network.outline().image != config.image() {
                return Err(Error::input(path.display(), "was trained for another task than the anchors")
                    .hint("a teacher takes the same images, scaled the same, and knows the same classes"));
            }
            (model.net, model.network)
        }
        None => {
            let last = net.anchors.len() - 1;
            (net.anchors[last].clone(), config.networks[last].clone())
        }
    };
    Ok(Some((Teacher { net: teacher, distill, temperature }, network)))
}

fn mean_accuracy(net: &SnNet<AnchorNet>, images: &Images, scaling: &Scaling, cx: &Context) -> Result<f64> {
    let all = crate::evaluate::evaluate(net, images, scaling, cx)?;
    Ok(all.iter().map(|score| score.acc).sum::<f64>() / all.len() as f64)
}
