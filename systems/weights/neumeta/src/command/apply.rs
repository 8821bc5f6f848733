//! Verbs that use a family or a network: `sample`, `predict` and `generate`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use image::{DynamicImage, GrayImage, ImageFormat, RgbImage};
use kiln_core::{Context, Error, ModelFolder, Result, write_atomic};
use kiln_nn::likeliest;
use serde::Serialize;
use serde_json::json;

use super::{DataArgs, widths};
use crate::arch::Size;
use crate::checkpoint::{self, Labels, PlainConfig};
use crate::data::Samples;
use crate::family::Family;
use crate::inr::Inr;
use crate::network::Plain;
use crate::objective::{Goal, Run};

/// Most draws that weights are averaged over.
const MAX_DRAWS: usize = 100_000;

/// Which network of a family.
#[derive(Debug, Clone, Copy, Args)]
pub(super) struct SizeArgs {
    /// Width of the network
    #[arg(long)]
    pub width: Option<usize>,
    /// Blocks of each stage of a residual network
    #[arg(long)]
    pub depth: Option<usize>,
    /// Cut larger kernels down to this extent
    #[arg(long)]
    pub kernel: Option<usize>,
    /// Sets of weights that are averaged, all but the first at coordinates moved by noise
    #[arg(long, default_value_t = 50)]
    pub draws: usize,
}

impl SizeArgs {
    pub fn size(&self, width: usize) -> Size {
        Size { width, depth: self.depth, kernel: self.kernel }
    }

    /// The network: of a family the one of this size, else the one in the folder.
    pub fn open(&self, model: &Path, cx: &Context) -> Result<(Plain, Labels)> {
        if is_plain(model)? {
            if self.width.is_some() || self.depth.is_some() || self.kernel.is_some() {
                return Err(Error::usage(format!(
                    "{} holds one network, whose size is its own",
                    model.display()
                ))
                .hint("leave --width, --depth and --kernel out, or name a family"));
            }
            return checkpoint::open_plain(model);
        }
        let width = self.width.ok_or_else(|| {
            Error::usage(format!("{} holds a family", model.display()))
                .hint("choose a network of it with --width")
        })?;
        let (family, inr, labels) = checkpoint::open_family(model, cx)?;
        Ok((self.sample(&family, &inr, width, cx)?, labels))
    }

    pub fn sample(&self, family: &Family, inr: &Inr, width: usize, cx: &Context) -> Result<Plain> {
        if self.draws > MAX_DRAWS {
            return Err(Error::usage(format!("--draws {} is beyond reason", self.draws))
                .hint(format!("at most {MAX_DRAWS}; 50 to 100 are enough")));
        }
        family.sample(inr, self.size(width), self.draws, cx)
    }
}

pub(super) fn is_plain(model: &Path) -> Result<bool> {
    Ok(ModelFolder::new(model).config_value()?.get("inr").is_none())
}

pub(super) fn score(plain: &Plain, samples: &Samples, cx: &Context) -> Result<f64> {
    let (built, parameters) = (plain.config.build(plain.size)?, plain.parameters(&cx.device));
    Run { goal: plain.config.goal, built: &built, parameters: &parameters, norms: &[] }.score(samples, cx)
}

pub(super) fn numel(plain: &Plain) -> usize {
    plain.tensors.iter().map(Vec::len).sum()
}

#[derive(Debug, Args)]
pub(super) struct SampleArgs {
    /// Model folder of a family
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    size: SizeArgs,
    /// Choose the largest width whose network has at most so many parameters
    #[arg(long, conflicts_with = "width")]
    max_params: Option<usize>,
    /// Write a network for each of these widths, and a table of them
    #[arg(long, value_name = "WIDTHS", conflicts_with_all = ["width", "max_params"])]
    ladder: Option<String>,
    /// Pictures to measure a ladder with
    #[arg(long, requires = "ladder")]
    data: Option<PathBuf>,
    /// IDX file of their labels
    #[arg(long, requires = "data")]
    labels: Option<PathBuf>,
    /// CSV column of their labels
    #[arg(long, requires = "data")]
    target: Option<String>,
    /// Folder of their masks
    #[arg(long, requires = "data")]
    masks: Option<PathBuf>,
    /// Model folder to write, or a .safetensors, which gets its configuration beside it
    #[arg(long)]
    to: PathBuf,
}

/// One rung of a ladder.
#[derive(Serialize)]
struct Rung {
    width: usize,
    parameters: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
}

pub(super) fn sample(args: &SampleArgs, cx: &Context) -> Result<()> {
    let (family, inr, labels) = checkpoint::open_family(&args.model, cx)?;
    if let Some(ladder) = &args.ladder {
        return sample_ladder(args, &widths(ladder).map_err(Error::usage)?, (&family, &inr, &labels), cx);
    }
    let width = match (args.size.width, args.max_params) {
        (Some(width), _) => width,
        (None, Some(most)) => family.width_within(most, args.size.depth, args.size.kernel)?,
        (None, None) => {
            return Err(
                Error::usage("which network is not said").hint("give --width, --max-params or --ladder")
            );
        }
    };
    let plain = args.size.sample(&family, &inr, width, cx)?;
    match args.to.extension().is_some_and(|extension| extension == "safetensors") {
        false => checkpoint::save_plain(&args.to, &plain, &labels)?,
        true => {
            plain.to_file()?.write(&args.to)?;
            let config = PlainConfig { net: plain.config.clone(), size: plain.size, labels };
            let text = serde_json::to_vec_pretty(&config)
                .map_err(|e| Error::work("cannot write the configuration as JSON").caused_by(e))?;
            write_atomic(&args.to.with_extension("json"), &text)?;
        }
    }
    let result = json!({ "model": args.to, "width": width, "parameters": numel(&plain) });
    cx.emit(&result, |_| {
        format!("{} parameters, width {}, in {}\n", numel(&plain), plain.size, args.to.display())
    })
}

fn sample_ladder(
    args: &SampleArgs,
    ladder: &[usize],
    (family, inr, labels): (&Family, &Inr, &Labels),
    cx: &Context,
) -> Result<()> {
    let net = &family.config.net;
    let samples = match &args.data {
        None => None,
        Some(data) => {
            let data = DataArgs {
                data: data.clone(),
                labels: args.labels.clone(),
                target: args.target.clone(),
                masks: args.masks.clone(),
            };
            Some(data.read(net.goal, Some((net, labels)), false)?)
        }
    };
    for &width in ladder {
        family.check(args.size.size(width), cx)?;
    }
    let mut rungs = Vec::new();
    let mut table = format!("width,parameters,{}\n", net.goal.metric());
    for &width in ladder {
        let plain = args.size.sample(family, inr, width, cx)?;
        checkpoint::save_plain(&args.to.join(format!("w{width}")), &plain, labels)?;
        let score = samples.as_ref().map(|samples| score(&plain, samples, cx)).transpose()?;
        let rung = Rung { width, parameters: numel(&plain), score };
        table += &format!("{width},{},{}\n", rung.parameters, score.map_or(String::new(), |s| s.to_string()));
        rungs.push(rung);
    }
    write_atomic(&args.to.join("ladder.csv"), table.as_bytes())?;
    cx.emit(&rungs, |rungs| {
        let mut text = format!("width  parameters  {}\n", net.goal.metric());
        for rung in rungs {
            let score = rung.score.map_or("–".into(), |score| format!("{score:.4}"));
            text += &format!("{:>5}  {:>10}  {score}\n", rung.width, rung.parameters);
        }
        text + &format!("networks and table in {}\n", args.to.display())
    })
}

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Model folder of a family or of a plain network
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    size: SizeArgs,
    #[command(flatten)]
    data: DataArgs,
    /// CSV file to write: row, pred, and a probability for each class; otherwise a folder of PNG files
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (plain, labels) = args.size.open(&args.model, cx)?;
    let net = &plain.config;
    let samples = args.data.read(net.goal, Some((net, &labels)), true)?;
    let (built, parameters) = (net.build(plain.size)?, plain.parameters(&cx.device));
    let run = Run { goal: net.goal, built: &built, parameters: &parameters, norms: &[] };
    let found = run.predict(&samples, cx)?;
    match net.goal {
        Goal::Classify => write_classes(&args.out, &found, &labels.class_names)?,
        Goal::Segment => {
            let mask = |row: &Vec<f32>| {
                row.chunks(net.classes).map(|pixel| likeliest(pixel) as f32 / 255.0).collect()
            };
            let masks: Vec<Vec<f32>> = found.iter().map(mask).collect();
            write_pictures(&args.out, &masks, [1, net.image[1], net.image[2]])?;
        }
        Goal::Generate => write_pictures(&args.out, &found, net.image)?,
    }
    let result = json!({ "out": args.out, "rows": found.len() });
    cx.emit(&result, |_| format!("{} predictions in {}\n", found.len(), args.out.display()))
}

fn write_classes(out: &Path, rows: &[Vec<f32>], classes: &[String]) -> Result<()> {
    let failed = |e: csv::Error| Error::work(format!("cannot write {}", out.display())).caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let head = ["row".to_string(), "pred".to_string()];
    writer
        .write_record(head.into_iter().chain(classes.iter().map(|class| format!("p_{class}"))))
        .map_err(failed)?;
    for (number, row) in rows.iter().enumerate() {
        let first = [(number + 1).to_string(), classes[likeliest(row)].clone()];
        writer.write_record(first.into_iter().chain(row.iter().map(f32::to_string))).map_err(failed)?;
    }
    let text = writer
        .into_inner()
        .map_err(|e| Error::work(format!("cannot write {}", out.display())).caused_by(e.into_error()))?;
    write_atomic(out, &text)
}

/// Writes pictures as `0001.png`, `0002.png`, …
fn write_pictures(folder: &Path, pictures: &[Vec<f32>], shape: [usize; 3]) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    for (number, picture) in pictures.iter().enumerate() {
        write_atomic(&folder.join(format!("{:04}.png", number + 1)), &png(picture, shape)?)?;
    }
    Ok(())
}

/// A picture `[channels, height, width]` of brightness 0 to 1 as a PNG file.
pub(super) fn png(picture: &[f32], [channels, height, width]: [usize; 3]) -> Result<Vec<u8>> {
    let byte = |x: f32| (x.clamp(0.0, 1.0) * 255.0).round() as u8;
    let at =
        |channel: usize, x: u32, y: u32| byte(picture[(channel * height + y as usize) * width + x as usize]);
    let (wide, tall) = (width as u32, height as u32);
    let picture: DynamicImage = match channels {
        3 => RgbImage::from_fn(wide, tall, |x, y| image::Rgb([0, 1, 2].map(|channel| at(channel, x, y))))
            .into(),
        _ => GrayImage::from_fn(wide, tall, |x, y| image::Luma([at(0, x, y)])).into(),
    };
    let mut bytes = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|e| Error::work("cannot write a picture as PNG").caused_by(e))?;
    Ok(bytes.into_inner())
}

/// Pictures side by side in rows of `columns`, with a line of black between them.
fn sheet(
    pictures: &[Vec<f32>],
    [channels, height, width]: [usize; 3],
    columns: usize,
) -> (Vec<f32>, [usize; 3]) {
    let rows = pictures.len().div_ceil(columns);
    let (tall, wide) = (rows * (height + 1) + 1, columns * (width + 1) + 1);
    let mut sheet = vec![0.0; channels * tall * wide];
    for (number, picture) in pictures.iter().enumerate() {
        let (top, left) = (1 + number / columns * (height + 1), 1 + number % columns * (width + 1));
        for (line, row) in picture.chunks(width).enumerate() {
            let (channel, y) = (line / height, line % height);
            sheet[(channel * tall + top + y) * wide + left..][..width].copy_from_slice(row);
        }
    }
    (sheet, [channels, tall, wide])
}

#[derive(Debug, Args)]
pub(super) struct GenerateArgs {
    /// Model folder of a family or of a plain network that generates
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    size: SizeArgs,
    /// Pictures to draw
    #[arg(long, default_value_t = 64)]
    n: usize,
    /// PNG file to write
    #[arg(long)]
    to: PathBuf,
}

pub(super) fn generate(args: &GenerateArgs, cx: &Context) -> Result<()> {
    /// Most pictures of a sheet.
    const MOST: usize = 4096;
    if !(1..=MOST).contains(&args.n) {
        return Err(
            Error::usage(format!("--n {} makes no sheet", args.n)).hint(format!("ask for 1 to {MOST}"))
        );
    }
    let (plain, _) = args.size.open(&args.model, cx)?;
    let (built, parameters) = (plain.config.build(plain.size)?, plain.parameters(&cx.device));
    let run = Run { goal: plain.config.goal, built: &built, parameters: &parameters, norms: &[] };
    let pictures = run.generate(args.n, &cx.device, &mut cx.rng("generate", 0))?;
    let columns = (args.n as f64).sqrt().ceil() as usize;
    let (sheet, shape) = sheet(&pictures, plain.config.image, columns);
    write_atomic(&args.to, &png(&sheet, shape)?)?;
    let result = json!({ "to": args.to, "pictures": args.n });
    cx.emit(&result, |_| format!("{} pictures in {}\n", args.n, args.to.display()))
}
