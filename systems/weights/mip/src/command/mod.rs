//! The verbs of `kiln mip`.

mod apply;
mod convert;
mod forward;
mod register;
mod scale;
mod shape;
mod study;
mod train;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use kiln_core::{Context, Error, Result};
use kiln_data::{Column, ImageOptions, Images, Table, TableOptions};

use crate::checkpoint::Config;
use crate::encoding::{Range, conditions};

/// Conditions that a grid has at most.
const MOST_CONDITIONS: usize = 10_000;

/// `kiln mip …`
#[derive(Debug, Parser)]
#[command(
    name = "mip",
    about = "Networks whose weights depend on a condition, and learn as fast as ordinary ones"
)]
#[command(after_help = "Examples:
  kiln mip train --data digits.csv --control rotation --out m/
  kiln mip eval --model m/ --data digits.csv --gamma-grid 11 --out accuracy.csv
  kiln mip export --model m/ --gamma 0.3 --to plain/")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Train a classifier whose weights depend on a condition
    #[command(after_help = "Examples:
  kiln mip train --data digits.csv --control rotation --out m/
  kiln mip train --data photos/ --arch lenet --control smoothing --range smooth=0:0.5 --out m/
  kiln mip train --data digits.csv --task bayes --gamma-dim 8 --out bayes/
  kiln mip train --data scans.csv --conditions sites.csv --out m/      each image's own site, dose, ..: a row an image
  kiln mip train --data fashion/ --task register --out r/
  kiln mip train --data scans/ --task scale --out s/      scans/images/*.png with scans/masks/*.png
  kiln mip train --data digits.csv --resume m/      after Ctrl-C or a crash")]
    Train(train::TrainArgs),
    /// Classify images under one condition or several
    #[command(after_help = "Examples:
  kiln mip predict --model m/ --data new.csv --gamma 0.3 --out p.csv
  kiln mip predict --model m/ --data new.csv --gamma-grid 11 --out p.csv
  kiln mip predict --model bayes/ --data new.csv --samples 20 --out p.csv
  kiln mip predict --model m/ --data new.csv --conditions sites.csv --out p.csv
  kiln mip predict --model m/ --data new.csv --gamma north,0.5 --out p.csv      a category by its name
  kiln mip predict --model r/ --data fashion/ --gamma 0.1 --out moved/      images and displacements
  kiln mip predict --model s/ --data scans/images --gamma 0.4 --out masks/")]
    Predict(apply::PredictArgs),
    /// Accuracy, likelihood and calibration over the condition
    #[command(after_help = "Examples:
  kiln mip eval --model m/ --data test.csv --gamma-grid 11 --out accuracy.csv
  kiln mip eval --model m/ --data test.csv --conditions sites.csv
  kiln mip eval --model r/ --data scans/ --maps labels/ --out sweep.csv      registration: Dice of label maps
The plot is written beside the table, as .svg.")]
    Eval(apply::EvalArgs),
    /// Write the network for one condition as an ordinary model folder
    #[command(after_help = "Examples:
  kiln mip export --model m/ --gamma 0.3 --to plain/
  kiln mip export --model m/ --gamma 0.3 --to plain.safetensors
  kiln export --model plain/ --out graph/")]
    Export(apply::ExportArgs),
    /// Make a conditioned network of a trained one, which behaves the same at first
    #[command(after_help = "Examples:
  kiln mip convert --arch lenet --weights lenet.safetensors --data digits.csv --select 'net.conv*.weight' --out m/
  kiln mip convert --arch unet --task scale --weights unet.safetensors --data scans/ --out s/
Weights come from `kiln mip export` or have the same names; --data gives image size and classes.")]
    Convert(convert::ConvertArgs),
    /// Measure how weights, activations and gradients scale with the condition
    #[command(after_help = "Examples:
  kiln mip analyze --model m/ --data digits.csv --gammas 0.01,0.1,0.5,1 --out report.json
  kiln mip analyze --arch mlp:32-32 --param default --out report.json")]
    Analyze(study::AnalyzeArgs),
    /// Compare the parametrisations over activations, norms, inputs, architectures and optimisers
    #[command(after_help = "Examples:
  kiln mip ablate --axes activation,optim --seeds 3 --out ablation/
  kiln mip ablate --axes activation,norm,dim,arch,optim,encoding --steps 700 --seeds 3 --out ablation/")]
    Ablate(study::AblateArgs),
    /// Run a bare hypernetwork on prepared tensors
    #[command(after_help = "Examples:
  kiln mip forward --weights hyper.safetensors --gamma gamma.safetensors:gamma --to theta.safetensors
  kiln mip forward --weights w.safetensors --gamma w.safetensors:gamma --layout layout.json --x --target --to out.safetensors
The weights are hyper.hidden0.weight [out, in] and .bias, .., hyper.output.weight and .bias.")]
    Forward(forward::ForwardArgs),
}

/// The images to work on.
#[derive(Debug, Args)]
struct DataArgs {
    /// Images: a folder with one folder a class, IDX, .npz, .npy or .csv; to register also folders moving/ and fixed/, to
    /// segment images/ and masks/
    #[arg(long)]
    data: PathBuf,
    /// File of labels of IDX or .npy images, where it is not beside them
    #[arg(long)]
    labels: Option<PathBuf>,
    /// CSV column of labels; by default the last
    #[arg(long)]
    target: Option<String>,
}

impl DataArgs {
    fn read(&self, white: Option<f64>, unlabelled: bool) -> Result<Images> {
        let options =
            ImageOptions { labels: self.labels.clone(), target: self.target.clone(), white, unlabelled };
        Images::read(&self.data, &options)
    }

    /// Images that a trained model can classify.
    fn read_for(&self, config: &Config, unlabelled: bool) -> Result<Images> {
        let images = self.read(Some(config.white), unlabelled)?;
        if images.shape != config.network.image {
            let found = format!("the images are {:?}, channels first", images.shape);
            return Err(Error::input(self.data.display(), found)
                .hint(format!("the model was trained on {:?}", config.network.image)));
        }
        images.with_classes(&config.classes, &self.data)
    }
}

/// Conditions of images, one row each in their order.
#[derive(Debug, Args)]
struct ConditionsArgs {
    /// CSV with the condition of every image, a row each: the columns are its components, words are categories
    #[arg(long, value_name = "FILE")]
    conditions: Option<PathBuf>,
}

impl ConditionsArgs {
    /// The columns of the file, for so many images.
    fn read(&self, images: usize) -> Result<Option<Vec<Column>>> {
        let Some(path) = &self.conditions else { return Ok(None) };
        let table = Table::read(path, TableOptions::default())?;
        if table.rows() != images {
            let found = format!("has {} rows for {images} images", table.rows());
            return Err(Error::input(path.display(), found).hint("a row is the condition of an image"));
        }
        Ok(Some(table.columns().to_vec()))
    }

    /// The conditions of images for a model with these components.
    fn conditions(
        &self,
        images: usize,
        ranges: &[Range],
        clamp: bool,
        cx: &Context,
    ) -> Result<Option<Vec<Vec<f32>>>> {
        let Some(columns) = self.read(images)? else { return Ok(None) };
        let path = self.conditions.clone().unwrap_or_default();
        let chosen = ranges.iter().map(|range| {
            columns.iter().find(|column| column.name == range.name).ok_or_else(|| {
                let names: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
                Error::input(path.display(), format!("has no column \"{}\"", range.name))
                    .hint(format!("there are {}", names.join(", ")))
            })
        });
        let chosen = chosen.collect::<Result<Vec<_>>>()?;
        let rows: Vec<Vec<String>> = (0..images)
            .map(|row| chosen.iter().map(|column| column.text(row).unwrap_or_default()).collect())
            .collect();
        let place = |row: usize| format!("{}, row {}", path.display(), row + 1);
        conditions(&rows, ranges, clamp, place, cx).map(Some)
    }
}

/// One condition or several.
#[derive(Debug, Args)]
struct GammaArgs {
    /// A condition, its components between commas, in the units of training; a category by its name
    #[arg(long, value_delimiter = ',', conflicts_with = "gamma_grid", allow_hyphen_values = true)]
    gamma: Option<Vec<String>>,
    /// So many conditions evenly from one end to the other, the same for all components that are numbers, and all
    /// categories [default: 11]
    #[arg(long, value_name = "COUNT")]
    gamma_grid: Option<usize>,
    /// Move values beyond the range to its end
    #[arg(long)]
    clamp: bool,
}

impl GammaArgs {
    /// Conditions: numbers between 0 and 1, places of categories.
    fn conditions(&self, ranges: &[Range], cx: &Context) -> Result<Vec<Vec<f32>>> {
        if let Some(values) = &self.gamma {
            return one_condition(values, ranges, self.clamp, cx).map(|condition| vec![condition]);
        }
        let count = self.gamma_grid.unwrap_or(11);
        if count < 2 {
            return Err(Error::usage("a grid needs at least two conditions"));
        }
        let has_numbers = ranges.iter().any(Range::is_number);
        let places: Vec<f32> = match has_numbers {
            true => (0..count).map(|i| i as f32 / (count - 1) as f32).collect(),
            false => vec![0.0],
        };
        let combinations =
            ranges.iter().try_fold(places.len(), |n, range| n.checked_mul(range.categories.len().max(1)));
        if combinations.is_none_or(|n| n > MOST_CONDITIONS) {
            return Err(Error::usage("there are too many combinations of categories")
                .hint(format!("at most {MOST_CONDITIONS} conditions are looked at: name one with --gamma")));
        }
        let mut all: Vec<Vec<f32>> = vec![Vec::new()];
        for range in ranges.iter().filter(|range| !range.is_number()) {
            let with_each = |combination: &Vec<f32>| {
                let place = |place| [combination.clone(), vec![place as f32]].concat();
                (0..range.categories.len()).map(place).collect::<Vec<_>>()
            };
            all = all.iter().flat_map(with_each).collect();
        }
        let filled = |categories: &[f32], place: f32| {
            let mut categories = categories.iter().copied();
            let component = |range: &Range| match range.is_number() {
                true => place,
                false => categories.next().unwrap_or_default(),
            };
            ranges.iter().map(component).collect::<Vec<f32>>()
        };
        Ok(all
            .iter()
            .flat_map(|combination| places.iter().map(|&place| filled(combination, place)))
            .collect())
    }
}

/// The condition of these words and numbers.
fn one_condition(values: &[String], ranges: &[Range], clamp: bool, cx: &Context) -> Result<Vec<f32>> {
    let found = conditions(&[values.to_vec()], ranges, clamp, |_| "the condition".into(), cx)?;
    Ok(found.into_iter().next().unwrap_or_default())
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::Train(args) => train::run(args, cx),
            Verb::Predict(args) => apply::predict(&args, cx),
            Verb::Eval(args) => apply::eval(&args, cx),
            Verb::Export(args) => apply::export(&args, cx),
            Verb::Convert(args) => convert::run(&args, cx),
            Verb::Analyze(args) => study::analyze(&args, cx),
            Verb::Ablate(args) => study::ablate(&args, cx),
            Verb::Forward(args) => forward::run(&args, cx),
        }
    }
}
