//! The verbs of `kiln stitch`.

mod anchor;
mod apply;
mod train;
mod training;

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};
use kiln_core::{Context, Error, Result, write_atomic};
use kiln_data::{ImageOptions, Images, read_tensors, write_tensors};
use serde_json::json;

use crate::anchor::{Cost, Extent, Grid, Outline};
use crate::checkpoint::{AnchorModel, Interface, anchor_config, open_anchor, open_untrained};
use crate::data::first;
use crate::family::{AnchorConfig, VitConfig};
use crate::golden;
use crate::space::{SpaceConfig, StitchSpace};

/// `kiln stitch …`
#[derive(Debug, Parser)]
#[command(
    name = "stitch",
    about = "Join trained networks of several sizes into many of sizes between, and switch among them at any moment"
)]
#[command(after_help = "Examples:
  kiln stitch anchor --width 16 --data photos/ --out small/
  kiln stitch anchor --width 32 --data photos/ --out large/
  kiln stitch train --anchors small/,large/ --data photos/ --out m/
  kiln stitch eval --model m/ --data test/ --latency
  kiln stitch predict --model m/ --data new/ --budget-ms 2 --out p.csv")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train an anchor: a network of one size
    #[command(after_help = "Examples:
  kiln stitch anchor --family vit --width 32 --depth 6 --heads 2 --patch 7 --data fashion/train-images-idx3-ubyte.gz --out s32/
  kiln stitch anchor --family resnet --width 16 --depth 2,3,2 --data photos/ --out r16/
  kiln stitch anchor --width 192 --depth 12 --heads 3 --patch 16 --data photos/ --weights deit.safetensors --epochs 0 --out ti/
  kiln stitch anchor --data photos/ --resume s32/      after Ctrl-C or a crash")]
    Anchor(anchor::AnchorArgs),
    /// List the networks that anchors can be stitched to, with their costs
    #[command(after_help = "Examples:
  kiln stitch space --anchors s16/,s32/,s64/ --out space.csv
  kiln stitch space --model m/
  kiln stitch space --depths 12,12,12
  kiln stitch space --depths 12,12,12 --widths 192,384,768 --heads 3,6,12 --image 3,224,224 --patch 16 --classes 1000")]
    Space(SpaceArgs),
    /// Stitch anchors by least squares, without training
    #[command(after_help = "Examples:
  kiln stitch init --anchors s16/,s32/ --data photos/ --init-images 100 --to m/
  kiln stitch init --anchors s16/,s32/,s64/ --data photos/ --prune-space 8 --to m/
  kiln stitch train --from m/ --data photos/ --out trained/")]
    Init(train::InitArgs),
    /// Train all stitched networks together
    #[command(after_help = "Examples:
  kiln stitch train --anchors s16/,s32/,s64/ --data photos/ --steps 2000 --lr 1e-4 --out m/
  kiln stitch train --anchors s16/,s32/ --data photos/ --distill soft --out m/      the largest anchor teaches
  kiln stitch train --anchors s16/,s32/ --data photos/ --freeze-anchors --rank 4 --out m/
  kiln stitch train --data photos/ --resume m/      after Ctrl-C or a crash")]
    Train(train::TrainArgs),
    /// Recompute what batch norms subtract and divide by, for every network of its own; training does it by itself
    #[command(after_help = "Examples:
  kiln stitch calibrate --model m/ --data photos/      after training was stopped, or for images of another camera
Only networks with batch norms (resnet) have something to recompute.")]
    Calibrate(apply::CalibrateArgs),
    /// Accuracy and cost of every network, as a table and a plot
    #[command(after_help = "Examples:
  kiln stitch eval --model m/ --data test/ --latency
  kiln stitch eval --model m/ --data test/ --compare distill --train-data photos/ --out s.csv
By default the table is scores.csv in the model folder, where `predict` and `serve` look for it.")]
    Eval(apply::EvalArgs),
    /// Classify images with the best network within a budget
    #[command(after_help = "Examples:
  kiln stitch predict --model m/ --data new/ --budget-mflops 1.5 --out p.csv
  kiln stitch predict --model m/ --data new/ --budget-ms 2 --scores here.csv --out p.csv
  kiln stitch predict --model m/ --data new/ --config 's0>s1@2>3' --out p.csv")]
    Predict(apply::PredictArgs),
    /// Write one network as a model folder of its own
    #[command(after_help = "Examples:
  kiln stitch export --model m/ --config 's0>s1@2>3' --to one/
  kiln export --model one/ --out graph/")]
    Export(apply::ExportArgs),
    /// Answer requests, each with a network of its own, one JSON document a line
    #[command(after_help = "Examples:
  echo '{\"image\": \"a.png\", \"budget_mflops\": 1.5}' | kiln stitch serve --model m/ --stdin
A request has budget_mflops, budget_ms or config (an id or a name); with none of them the best network answers.")]
    Serve(apply::ServeArgs),
    /// Stitch anchors from prepared tensors and run every network
    #[command(after_help = "Examples:
  kiln stitch forward --weights anchors.safetensors --arch anchors.json --x-key x --to out.safetensors
Anchors are anchor0.patch_embed.weight, anchor0.blocks.0.qkv.weight, ..; the JSON has dims, heads, depth and so on.")]
    Forward(ForwardArgs),
}

/// The images to work on.
#[derive(Debug, Args)]
struct DataArgs {
    /// Images: a folder with one folder a class, IDX, .npz, .npy or .csv
    #[arg(long)]
    data: PathBuf,
    /// File of labels of IDX or .npy images, where it is not beside them
    #[arg(long)]
    labels: Option<PathBuf>,
    /// CSV column of labels; by default the last
    #[arg(long)]
    target: Option<String>,
    /// Use only the first images
    #[arg(long, value_name = "COUNT")]
    limit: Option<usize>,
}

impl DataArgs {
    fn read(&self, white: Option<f64>, unlabelled: bool) -> Result<Images> {
        let options =
            ImageOptions { labels: self.labels.clone(), target: self.target.clone(), white, unlabelled };
        let images = Images::read(&self.data, &options)?;
        match self.limit {
            Some(0) => Err(Error::usage("--limit 0 leaves no images")),
            Some(count) => Ok(first(&images, count)),
            None => Ok(images),
        }
    }

    /// Images for a trained model.
    fn read_for(&self, interface: &Interface, shape: [usize; 3], unlabelled: bool) -> Result<Images> {
        interface.fit(self.read(Some(interface.white), unlabelled)?, shape, &self.data)
    }

    /// How the data were given, for hints.
    fn shown(&self) -> String {
        format!("--data {}", self.data.display())
    }
}

#[derive(Debug, Args)]
struct SpaceArgs {
    /// Model folders of anchors
    #[arg(long, value_delimiter = ',', required_unless_present_any = ["depths", "model"], conflicts_with = "depths")]
    anchors: Vec<PathBuf>,
    /// Model folder of a stitchable network, whose own space is listed
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "anchors", "depths", "kernel", "stride", "include_m0", "direction", "pairs", "max_anchors",
    ])]
    model: Option<PathBuf>,
    /// Numbers of blocks, instead of anchors
    #[arg(long, value_delimiter = ',')]
    depths: Vec<usize>,
    /// Widths of vision transformers of these depths, for their costs
    #[arg(long, value_delimiter = ',', requires = "depths")]
    widths: Vec<usize>,
    /// Their heads
    #[arg(long, value_delimiter = ',', requires = "widths")]
    heads: Vec<usize>,
    /// Their images: channels, height, width
    #[arg(long, value_delimiter = ',', default_value = "3,224,224")]
    image: Vec<usize>,
    /// The side of their patches
    #[arg(long, default_value_t = 16)]
    patch: usize,
    /// Their classes
    #[arg(long, default_value_t = 1000)]
    classes: usize,
    #[command(flatten)]
    space: SpaceConfig,
    /// CSV file to write
    #[arg(long)]
    out: Option<PathBuf>,
}

impl SpaceArgs {
    /// The anchors, and whether their costs are known.
    fn outlines(&self) -> Result<(Vec<Outline>, bool)> {
        if !self.anchors.is_empty() {
            let configs = self.anchors.iter().map(|path| Ok(anchor_config(path)?.0.outline()));
            let mut outlines: Vec<Outline> = configs.collect::<Result<_>>()?;
            outlines.sort_by_key(|outline| outline.total().flops);
            return Ok((outlines, true));
        }
        if self.depths.iter().any(|&depth| depth == 0 || depth > 1 << 12) {
            return Err(Error::usage(format!("depths {:?} are impossible", self.depths))
                .hint("an anchor has between 1 and 4096 blocks"));
        }
        if self.widths.is_empty() {
            return Ok((self.depths.iter().map(|&depth| bare(depth)).collect(), false));
        }
        if self.widths.len() != self.depths.len()
            || !(self.heads.is_empty() || self.heads.len() == self.depths.len())
        {
            return Err(Error::usage(format!(
                "{} depths, {} widths and {} heads do not belong together",
                self.depths.len(),
                self.widths.len(),
                self.heads.len()
            ))
            .hint("give one width for each depth, and one number of heads or none"));
        }
        let image = <[usize; 3]>::try_from(&self.image[..])
            .map_err(|_| Error::usage("--image needs channels, height and width, such as 3,224,224"))?;
        let vit = |index: usize| {
            let config = AnchorConfig::Vit(VitConfig {
                image,
                patch: self.patch,
                width: self.widths[index],
                depth: self.depths[index],
                heads: self.heads.get(index).copied().unwrap_or(1),
                classes: self.classes,
            });
            config.check()?;
            Ok(config.outline())
        };
        Ok(((0..self.depths.len()).map(vit).collect::<Result<_>>()?, true))
    }
}

/// An anchor of which only the number of blocks is known.
fn bare(depth: usize) -> Outline {
    Outline {
        image: [1; 3],
        classes: 2,
        stages: vec![0; depth],
        extents: vec![Extent { channels: 1, grid: Grid::Tokens(1) }; depth + 1],
        embed: Cost::default(),
        blocks: vec![Cost::default(); depth],
        head: Cost::default(),
    }
}

#[derive(Debug, Args)]
struct ForwardArgs {
    /// Tensors of the anchors and the images, .safetensors or .npz
    #[arg(long)]
    weights: PathBuf,
    /// JSON file that describes the anchors
    #[arg(long)]
    arch: PathBuf,
    /// The tensor of images
    #[arg(long, default_value = "x")]
    x_key: String,
    /// File to write: stitching layers and logits, .safetensors or .npz
    #[arg(long)]
    to: PathBuf,
}

impl Command {
    /// Does what the command line asks for.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Anchor(args) => anchor::anchor(args, cx),
            Verb::Space(args) => run_space(&args, cx),
            Verb::Init(args) => train::init(&args, cx),
            Verb::Train(args) => train::train(args, cx),
            Verb::Calibrate(args) => apply::calibrate(&args, cx),
            Verb::Eval(args) => apply::eval(&args, cx),
            Verb::Predict(args) => apply::predict(&args, cx),
            Verb::Export(args) => apply::export(&args, cx),
            Verb::Serve(args) => apply::serve(&args, cx),
            Verb::Forward(args) => run_forward(&args, cx),
        }
    }
}

/// Reads anchors in the order of their cost and makes sure that they belong together.
fn read_anchors(paths: &[PathBuf], cx: &Context) -> Result<Vec<AnchorModel>> {
    let mut anchors: Vec<(&Path, AnchorModel)> =
        paths.iter().map(|path| Ok((path.as_path(), open_anchor(path, cx)?))).collect::<Result<_>>()?;
    if anchors.len() < 2 {
        return Err(Error::usage("one anchor cannot be stitched").hint("name several, with commas between"));
    }
    let weights = |path: &Path| std::fs::read(path.join("model.safetensors")).ok();
    for (place, path) in paths.iter().enumerate() {
        let twin = paths[..place].iter().find(|other| weights(other) == weights(path));
        if let Some(twin) = twin {
            let found = format!("{} and {} are the same anchor", twin.display(), path.display());
            return Err(Error::usage(found).hint("anchors differ in size: name each once"));
        }
    }
    let (first, rest) = (&anchors[0], &anchors[1..]);
    for (path, anchor) in rest {
        let differs = |what: &str, a: String, b: String| {
            let found = format!("{} has {what} {a}, {} has {b}", first.0.display(), path.display());
            Err(Error::usage(found).hint("anchors must be trained for the same task, on the same data"))
        };
        let (a, b) = (&first.1.interface, &anchor.interface);
        if a.classes != b.classes {
            return differs("the classes", a.classes.join(", "), b.classes.join(", "));
        }
        let image = |anchor: &AnchorModel| format!("{:?}", anchor.network.outline().image);
        if image(&first.1) != image(anchor) {
            return differs("images of", image(&first.1), image(anchor));
        }
        if a.scaling != b.scaling || a.white != b.white {
            let shown = |i: &Interface| format!("{:?} and {:?}", i.scaling.mean, i.scaling.std);
            let error = differs("pixels scaled by", shown(a), shown(b));
            return error.map_err(|e| e.hint("train one of them again with --like the other"));
        }
    }
    let cost = |anchor: &AnchorModel| anchor.network.outline().total().flops;
    let sorted = anchors.is_sorted_by_key(|(_, anchor)| cost(anchor));
    anchors.sort_by_key(|(_, anchor)| cost(anchor));
    if !sorted {
        let order: Vec<String> = anchors.iter().map(|(path, _)| path.display().to_string()).collect();
        cx.note(format!("anchors in the order of their cost: {}", order.join(", ")));
    }
    Ok(anchors.into_iter().map(|(_, anchor)| anchor).collect())
}

fn run_space(args: &SpaceArgs, cx: &Context) -> Result<()> {
    let (space, costs_known) = match &args.model {
        Some(model) => (open_untrained(model, cx)?.1.space().clone(), true),
        None => {
            let (outlines, costs_known) = args.outlines()?;
            (StitchSpace::new(outlines, &args.space)?, costs_known)
        }
    };
    let mut csv = String::from("config,name,layers,flops,params\n");
    let mut text = String::from("config  name                      MFLOPs     parameters\n");
    let mut lines = Vec::new();
    for (id, configuration) in space.configurations().iter().enumerate() {
        let (name, cost) = (configuration.name(), costs_known.then(|| space.cost(configuration)));
        let layers: Vec<usize> = configuration.cuts.iter().map(|cut| cut.layer).collect();
        let shown = |value: Option<String>| value.unwrap_or_default();
        let joined: Vec<String> = layers.iter().map(usize::to_string).collect();
        csv += &format!(
            "{id},{},{},{},{}\n",
            if name.contains(',') { format!("\"{name}\"") } else { name.clone() },
            joined.join(";"),
            shown(cost.map(|cost| cost.flops.to_string())),
            shown(cost.map(|cost| cost.params.to_string()))
        );
        text += &format!(
            "{id:<7} {name:<25} {:<10} {}\n",
            shown(cost.map(|cost| format!("{:.3}", cost.flops as f64 / 1e6))),
            shown(cost.map(|cost| cost.params.to_string()))
        );
        let (flops, params) = (cost.map(|cost| cost.flops), cost.map(|cost| cost.params));
        lines.push(json!({
            "config": id, "name": name, "anchors": configuration.anchors,
            "cuts": configuration.cuts.iter().map(|cut| [cut.after, cut.before]).collect::<Vec<_>>(),
            "layers": layers, "flops": flops, "params": params,
        }));
    }
    if let Some(out) = &args.out {
        write_atomic(out, csv.as_bytes())?;
    }
    let result = json!({ "configs": lines, "num_configs": space.len(), "num_layers": space.layers().len() });
    cx.emit(&result, |_| {
        text + &format!("{} networks with {} stitching layers\n", space.len(), space.layers().len())
    })
}

fn run_forward(args: &ForwardArgs, cx: &Context) -> Result<()> {
    let arch = golden::Arch::read(&args.arch)?;
    let found = golden::forward(&arch, read_tensors(&args.weights)?, &args.x_key, cx)?;
    write_tensors(&args.to, &found)?;
    let names: Vec<&str> = found.names().collect();
    cx.emit(&json!({ "out": args.to, "tensors": names }), |_| {
        format!("{} tensors in {}\n", names.len(), args.to.display())
    })
}
