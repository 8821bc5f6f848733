//! The verbs on models that register images.

use std::fs;

use burn::tensor::Tensor;
use image::GrayImage;
use kiln_core::{Context, Error, HostTensor, Plot, Result, TensorFile, write_atomic};
use kiln_data::{Images, write_npz};
use kiln_nn::TrainRun;
use serde_json::json;

use super::DataArgs;
use super::apply::{EvalArgs, PredictArgs};
use super::shape::ShapeArgs;
use super::train::{PROBED, Recipe, split};
use crate::checkpoint::{KIND, RegisterConfig, TaskKind, open_register};
use crate::classify::Sampling;
use crate::encoding::Range;
use crate::label_maps::LabelMaps;
use crate::probing::Probed;
use crate::register::{
    Pair, Quality, RegisterTask, Registered, check, draw_pairs, own_pairs, probe, quality, read_pairs,
    register, tensors,
};
use crate::unet::UNetConfig;

/// Images to register: pairs of one's own, or images whose pairs are drawn within classes.
pub(super) struct Pictures {
    images: Images,
    /// Whether every class is a pair.
    are_pairs: bool,
}

impl Pictures {
    fn read(data: &DataArgs, white: Option<f64>) -> Result<Self> {
        let (images, are_pairs) = match read_pairs(&data.data)? {
            Some(pairs) => (pairs, true),
            None => (data.read(white, false)?, false),
        };
        check(&images)?;
        Ok(Self { images, are_pairs })
    }

    /// Images that a model can register.
    fn read_for(data: &DataArgs, config: &RegisterConfig) -> Result<Self> {
        let pictures = Self::read(data, Some(config.white))?;
        if pictures.images.shape[1..] != config.image {
            let found = format!("the images are {:?}", &pictures.images.shape[1..]);
            return Err(Error::input(data.data.display(), found)
                .hint(format!("the model was trained on {:?}, height first", config.image)));
        }
        Ok(pictures)
    }

    /// The pairs that verbs look at: all of one's own, or so many drawn.
    fn pairs(&self, count: usize, cx: &Context) -> Result<Vec<Pair>> {
        match (self.are_pairs, count) {
            (true, _) => Ok(own_pairs(&self.images)),
            (false, 0) => Err(Error::usage("--pairs 0 registers nothing")),
            (false, count) => Ok(draw_pairs(&self.images, count, &mut cx.rng("pairs", 0))),
        }
    }

    /// Training images and those held out; pairs stay together.
    fn split(&self, share: f64, cx: &Context) -> Result<[Images; 2]> {
        let pairs = self.images.classes.len();
        let parts = match self.are_pairs {
            true => split(pairs, share, cx)?.map(|part| {
                let fixed: Vec<usize> = part.iter().map(|pair| pairs + pair).collect();
                [part, fixed].concat()
            }),
            false => split(self.images.len(), share, cx)?,
        };
        let [valid, train] = parts.map(|part| self.images.select(&part));
        for part in [&train, &valid] {
            check(part)?;
        }
        Ok([train, valid])
    }
}

/// What a new model of these images will be, and the images.
pub(super) fn configure(
    data: &DataArgs,
    shape: &ShapeArgs,
    sampling: Sampling,
) -> Result<(RegisterConfig, Pictures)> {
    let pictures = Pictures::read(data, None)?;
    let images = &pictures.images;
    let config = RegisterConfig {
        task: TaskKind::Register,
        network: UNetConfig { inputs: 2, outputs: 2 },
        mip: shape.unet(TaskKind::Register)?,
        sampling,
        image: [images.shape[1], images.shape[2]],
        white: images.white,
    };
    Ok((config, pictures))
}

/// Trains a network whose weights depend on how smooth the deformation shall be.
pub(super) fn train(run: &TrainRun<Recipe>, data: &DataArgs, cx: &Context) -> Result<()> {
    let recipe = &run.recipe;
    let (config, pictures) = if run.resumed {
        let config: RegisterConfig = run.folder.config(KIND)?;
        let pictures = Pictures::read_for(data, &config)?;
        (config, pictures)
    } else {
        configure(data, &recipe.shape, recipe.gamma_sampling)?
    };
    let [train, valid] = pictures.split(recipe.val_fraction, cx)?;
    let training = recipe.training(run.steps);
    training.check()?;
    let model = config.draw(None, cx)?;
    run.save(|folder| folder.save_config(KIND, &config))?;
    cx.note(format!("{} weights depend on the condition; {} images", model.spec().numel(), train.len()));
    let probed = draw_pairs(&train, PROBED / 4, &mut cx.rng("probed pairs", 0));
    let probes = recipe.probes(run, |net| probe(net, &train, &probed, cx));
    let condition = |step: usize| config.sampling.draw(1, &mut cx.rng("step", step as u64))[0].to_string();
    let task =
        RegisterTask { train: &train, valid: &valid, sampling: config.sampling, batch: recipe.batch, cx };
    let mut task = Probed::new(task, 1, probes, condition, cx);
    let trained = run.train(model, &mut task, &training, &format!("--data {}", data.data.display()), cx)?;
    task.finish(&trained.last, trained.log.len())?;
    let summary = run.finish(&trained, "loss per pair")?;
    cx.emit(&summary, |summary| {
        format!("{}model in {}\n", summary.to_text("a pair"), summary.model.display())
    })
}

/// Writes moved images as PNG and displacements as NPZ.
pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (config, model) = open_register(&args.model, cx)?;
    let pictures = Pictures::read_for(&args.data, &config)?;
    let (images, pairs) = (&pictures.images, pictures.pairs(args.pairs, cx)?);
    let conditions = args.gamma.conditions(&[Range::unit("gamma")], cx)?;
    fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    let [moving, fixed] = tensors(images, &pairs, &cx.device);
    let mut fields = TensorFile::new();
    for gamma in &conditions {
        let net = model.instantiate(Tensor::<1>::from_floats(gamma.as_slice(), &cx.device))?;
        let Registered { moved, field } = register(&net, moving.clone(), fixed.clone());
        let sheet =
            [moving.clone(), moved, fixed.clone()].map(|x| x.into_data().iter::<f32>().collect::<Vec<_>>());
        let png = sheet_png(&sheet, config.image)
            .map_err(|e| Error::work("cannot write the images as PNG").caused_by(e))?;
        write_atomic(&args.out.join(format!("gamma-{:.3}.png", gamma[0])), &png)?;
        fields.insert(format!("field_gamma_{:.3}", gamma[0]), HostTensor::from_tensor(field));
    }
    write_npz(&args.out.join("fields.npz"), &fields)?;
    let result = json!({ "out": args.out, "pairs": pairs.len(), "conditions": conditions.len() });
    cx.emit(&result, |_| {
        format!(
            "{} pairs under {} conditions in {}: moving, moved and fixed image in a row\n",
            pairs.len(),
            conditions.len(),
            args.out.display()
        )
    })
}

/// One row for each pair, its images side by side.
fn sheet_png(columns: &[Vec<f32>; 3], [height, width]: [usize; 2]) -> image::ImageResult<Vec<u8>> {
    let pairs = columns[0].len() / (height * width);
    let sheet = GrayImage::from_fn((3 * width) as u32, (pairs * height) as u32, |x, y| {
        let (x, y) = (x as usize, y as usize);
        let pixel = columns[x / width][y * width + x % width];
        image::Luma([(pixel.clamp(0.0, 1.0) * 255.0).round() as u8])
    });
    let mut bytes = std::io::Cursor::new(Vec::new());
    sheet.write_to(&mut bytes, image::ImageFormat::Png)?;
    Ok(bytes.into_inner())
}

/// Likeness, smoothness and folds over the condition.
pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (config, model) = open_register(&args.model, cx)?;
    let pictures = Pictures::read_for(&args.data, &config)?;
    let (images, pairs) = (&pictures.images, pictures.pairs(args.pairs, cx)?);
    let conditions = args.gamma.conditions(&[Range::unit("gamma")], cx)?;
    let maps = match &args.maps {
        Some(path) => Some(LabelMaps::read(path, images, pictures.are_pairs)?),
        None => None,
    };
    let bar = cx.progress(conditions.len() as u64, "registering");
    let mut points: Vec<(f64, Quality)> = Vec::new();
    for gamma in &conditions {
        points.push((gamma[0].into(), quality(&model, images, &pairs, maps.as_ref(), gamma[0], cx)?));
        bar.inc(1);
    }
    if let Some(out) = &args.out {
        let heads = if maps.is_some() { ",dice,dice_before" } else { "" };
        let mut text = format!("gamma,difference,difference_before,roughness,folded{heads}\n");
        for (gamma, q) in &points {
            let overlaps = [q.dice, q.dice_before].into_iter().flatten().map(|dice| format!(",{dice}"));
            let overlaps: String = overlaps.collect();
            text += &format!(
                "{gamma},{},{},{},{}{overlaps}\n",
                q.difference, q.difference_before, q.roughness, q.folded
            );
        }
        write_atomic(out, text.as_bytes())?;
        let line = |value: fn(&Quality) -> f64| points.iter().map(|(gamma, q)| (*gamma, value(q))).collect();
        let mut plot = Plot::lines("Registration over the condition", "γ", "relative to before; per pixel")
            .series("difference, relative", line(|q| q.difference / q.difference_before))
            .series("roughness", line(|q| q.roughness))
            .series("folded share", line(|q| q.folded));
        if maps.is_some() {
            plot = plot.series("Dice", line(|q| q.dice.unwrap_or(f64::NAN)));
        }
        plot.save(&out.with_extension("svg"))?;
    }
    let lines: Vec<_> =
        points.iter().map(|(gamma, quality)| json!({ "gamma": gamma, "quality": quality })).collect();
    cx.emit(&json!({ "pairs": pairs.len(), "conditions": lines }), |_| {
        let heads = if maps.is_some() { "  Dice    before" } else { "" };
        let mut text = format!("gamma    difference  before   roughness  folded{heads}\n");
        for (gamma, q) in &points {
            text += &format!(
                "{gamma:<8.3} {:<11.5} {:<8.5} {:<10.4} {:.4}",
                q.difference, q.difference_before, q.roughness, q.folded
            );
            if let (Some(dice), Some(before)) = (q.dice, q.dice_before) {
                text += &format!("  {dice:.4}  {before:.4}");
            }
            text += "\n";
        }
        text
    })
}
