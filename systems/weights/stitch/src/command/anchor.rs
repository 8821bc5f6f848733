//! `kiln stitch anchor`

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, ModelFolder, Result, TensorFile};
use kiln_data::{Images, read_tensors};
use kiln_nn::TrainRun;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::DataArgs;
use super::training::{TestArgs, TrainResult, TrainingArgs};
use crate::anchor::Anchor;
use crate::checkpoint::{Interface, anchor_config, draw_anchor, save_anchor_config};
use crate::data::{Batches, Scaling, split};
use crate::evaluate::{predict, scores};
use crate::family::{AnchorConfig, AnchorNet, ResnetConfig, SwinConfig, VitConfig};
use crate::training::SingleTask;

/// The command whose runs a model folder keeps.
const ANCHOR: &str = "stitch anchor";

/// Which networks there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Family {
    /// A vision transformer
    Vit,
    /// Residual blocks of convolutions, in stages
    Resnet,
    /// A transformer with attention in shifted windows, in stages
    Swin,
}

/// The size of an anchor.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct ShapeArgs {
    /// What kind of network
    #[arg(long, value_enum, default_value = "vit")]
    family: Family,
    /// Width of a token, or channels of the first stage
    #[arg(long, default_value_t = 32)]
    width: usize,
    /// Number of blocks; for networks in stages one number for each stage, such as 2,4,2
    #[arg(long, value_delimiter = ',')]
    depth: Vec<usize>,
    /// Heads of attention, of networks in stages in the first
    #[arg(long, default_value_t = 2)]
    heads: usize,
    /// Side of a patch in pixels, or the step of a resnet's first convolution [default: a quarter of the height for
    /// vit, otherwise 1]
    #[arg(long)]
    patch: Option<usize>,
    /// Side of a window in tokens, at most
    #[arg(long, default_value_t = 7)]
    window: usize,
}

impl ShapeArgs {
    fn config(&self, images: &Images) -> Result<AnchorConfig> {
        let (image, classes, Self { width, heads, window, .. }) =
            (images.shape, images.classes.len(), self.clone());
        let depths = if self.depth.is_empty() { vec![2, 4, 2] } else { self.depth.clone() };
        let config = match (self.family, &self.depth[..]) {
            (Family::Vit, [] | [_]) => AnchorConfig::Vit(VitConfig {
                image,
                patch: self.patch.unwrap_or((image[1] / 4).max(1)),
                width,
                depth: self.depth.first().copied().unwrap_or(6),
                heads,
                classes,
            }),
            (Family::Vit, depths) => {
                return Err(Error::usage(format!("a vit has no stages, but --depth names {}", depths.len()))
                    .hint("give one number, or choose --family resnet or swin"));
            }
            (Family::Resnet, _) => AnchorConfig::Resnet(ResnetConfig {
                image,
                patch: self.patch.unwrap_or(1),
                width,
                depths,
                classes,
            }),
            (Family::Swin, _) => {
                let patch = self.patch.unwrap_or(1);
                AnchorConfig::Swin(SwinConfig { image, patch, width, depths, heads, window, classes })
            }
        };
        config.check()?;
        Ok(config)
    }
}

#[derive(Debug, Args)]
pub(super) struct AnchorArgs {
    #[command(flatten)]
    data: DataArgs,
    #[command(flatten)]
    test: TestArgs,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "out", "family", "width", "depth", "heads", "patch", "window", "weights", "like", "epochs", "lr", "batch",
        "min_lr_ratio", "warmup", "weight_decay", "clip", "val_fraction", "eval_every", "checkpoint_every",
    ])]
    resume: Option<PathBuf>,
    /// Times that every image is seen; 0 writes the network as it is
    #[arg(long, default_value_t = 5)]
    epochs: usize,
    /// Steps of the whole run, instead of epochs
    #[arg(long)]
    steps: Option<usize>,
    /// Weights to begin with, .safetensors or .npz, named as `timm` or Kiln does
    #[arg(long)]
    weights: Option<PathBuf>,
    /// Scale pixels and number classes as this anchor does, where it was trained on other images
    #[arg(long, value_name = "DIR")]
    like: Option<PathBuf>,
    #[command(flatten)]
    recipe: AnchorRecipe,
}

/// What besides data, steps and seed decides how an anchor turns out.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct AnchorRecipe {
    #[command(flatten)]
    #[serde(flatten)]
    shape: ShapeArgs,
    /// Highest learning rate
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    #[command(flatten)]
    #[serde(flatten)]
    training: TrainingArgs,
}

/// Trains a network of one size, or writes one as it is.
pub(super) fn anchor(args: AnchorArgs, cx: &Context) -> Result<()> {
    let resumed = args
        .resume
        .as_ref()
        .map(|folder| TrainRun::<AnchorRecipe>::resume(ANCHOR, folder, args.steps))
        .transpose()?;
    let recipe: AnchorRecipe = resumed.as_ref().map_or(args.recipe, |run| run.recipe.clone());
    let (network, interface, images) = match &args.resume {
        Some(folder) => {
            let (network, interface) = anchor_config(folder)?;
            let images = args.data.read_for(&interface, network.outline().image, false)?;
            (network, interface, images)
        }
        None => {
            let (interface, images) = match &args.like {
                Some(like) => {
                    let (network, interface) = anchor_config(like)?;
                    let images = args.data.read_for(&interface, network.outline().image, false)?;
                    (interface, images)
                }
                None => {
                    let images = args.data.read(None, false)?;
                    let (classes, white) = (images.classes.clone(), images.white);
                    (Interface { classes, white, scaling: Scaling::of(&images) }, images)
                }
            };
            (recipe.shape.config(&images)?, interface, images)
        }
    };
    let shape = network.outline().image;
    let test = args.test.read(&interface, shape, args.data.target.as_ref())?;
    if resumed.is_none() && args.epochs == 0 && args.steps.is_none() {
        let net = begin_with(args.weights.as_ref(), &network, cx)?;
        let out = args.out.as_deref().ok_or_else(|| Error::usage("--out is needed"))?;
        return write_untrained(net, (&network, &interface), out, (&images, test.as_ref()), cx);
    }
    let batches_per_epoch = |images: usize| (images / recipe.training.batch.clamp(1, images)).max(1);
    let seed = resumed.as_ref().map_or(cx.seed, |run| run.seed);
    let (train, valid) = split(&images, recipe.training.val_fraction, &Context { seed, ..cx.clone() })?;
    let run = match (resumed, &args.out) {
        (Some(run), _) => run,
        (None, Some(out)) => {
            let steps = args.steps.unwrap_or(args.epochs * batches_per_epoch(train.len()));
            TrainRun::begin(ANCHOR, out, steps, recipe.clone(), cx)
        }
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let training = recipe.training.config(run.steps, recipe.lr)?;
    let net = begin_with(args.weights.as_ref(), &network, cx)?;
    run.save(|folder| save_anchor_config(folder, &network, &interface))?;
    let total = network.outline().total();
    cx.note(format!(
        "{} parameters, {:.3} MFLOPs an image; {} images, {} held out",
        total.params,
        total.flops as f64 / 1e6,
        train.len(),
        valid.len()
    ));
    let scaling = &interface.scaling;
    let mut task = SingleTask {
        batches: Batches::new(&train, scaling, recipe.training.batch, cx),
        valid: &valid,
        scaling,
        teacher: None,
        cx,
    };
    let trained = run.train(net, &mut task, &training, &args.data.shown(), cx)?;
    let accuracy = |images: &Images| accuracy(&trained.model, images, scaling, cx);
    let result = TrainResult {
        summary: run.finish(&trained, "nats per image")?,
        accuracy: accuracy(&valid)?,
        test_accuracy: test.as_ref().map(accuracy).transpose()?,
    };
    cx.emit(&result, |TrainResult { summary, accuracy, test_accuracy }| {
        let test = test_accuracy.map_or(String::new(), |a| format!("accuracy {a:.4} on the test images\n"));
        format!(
            "{}accuracy {accuracy:.4} on the images held out\n{test}model in {}\n",
            summary.to_text("nats an image"),
            summary.model.display()
        )
    })
}

/// The network with the weights of a file, or with random ones.
fn begin_with(weights: Option<&PathBuf>, network: &AnchorConfig, cx: &Context) -> Result<AnchorNet> {
    let net = draw_anchor(network, cx);
    match weights {
        Some(path) => read_tensors(path)?.into_module(net),
        None => Ok(net),
    }
}

/// Writes an anchor as it is.
fn write_untrained(
    net: AnchorNet,
    (network, interface): (&AnchorConfig, &Interface),
    out: &Path,
    (images, test): (&Images, Option<&Images>),
    cx: &Context,
) -> Result<()> {
    let folder = ModelFolder::new(out);
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(&net))?;
    save_anchor_config(&folder, network, interface)?;
    let accuracy = accuracy(&net, test.unwrap_or(images), &interface.scaling, cx)?;
    let result = json!({ "model": out, "params": network.outline().total().params, "accuracy": accuracy });
    cx.emit(&result, |_| format!("accuracy {accuracy:.4} without training\nmodel in {}\n", out.display()))
}

fn accuracy(net: &AnchorNet, images: &Images, scaling: &Scaling, cx: &Context) -> Result<f64> {
    let probabilities = predict(images, scaling, cx, |x| Ok(net.forward(x)))?;
    Ok(scores(&probabilities, &images.labels).accuracy)
}
