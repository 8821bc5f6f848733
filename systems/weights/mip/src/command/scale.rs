//! The verbs on models that segment images at a scale of one's choice.

use std::fs;

use image::GrayImage;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use kiln_data::{ImageOptions, Images};
use kiln_nn::TrainRun;
use serde_json::json;

use super::DataArgs;
use super::apply::{EvalArgs, PredictArgs};
use super::shape::ShapeArgs;
use super::train::{PROBED, Recipe, split};
use crate::checkpoint::{KIND, ScaleConfig, TaskKind, open_scale};
use crate::classify::Sampling;
use crate::encoding::Range;
use crate::probing::Probed;
use crate::scale::{Quality, ScaleTask, Scans, check, probe, quality, segment, stems};
use crate::unet::UNetConfig;

/// Images and masks for a model.
fn read(data: &DataArgs, config: &ScaleConfig) -> Result<Scans> {
    let scans = Scans::read(&data.data)?;
    fits(data, config, &scans.images)?;
    Ok(scans)
}

fn fits(data: &DataArgs, config: &ScaleConfig, images: &Images) -> Result<()> {
    if images.shape[0] != config.image[0] {
        return Err(Error::input(
            data.data.display(),
            format!("the images have {} channels", images.shape[0]),
        )
        .hint(format!("the model was trained on {}", config.image[0])));
    }
    Ok(())
}

/// What a new model of these images and masks will be.
pub(super) fn configure(
    data: &DataArgs,
    shape: &ShapeArgs,
    sampling: Sampling,
) -> Result<(ScaleConfig, Scans)> {
    let scans = Scans::read(&data.data)?;
    let config = ScaleConfig {
        task: TaskKind::Scale,
        network: UNetConfig { inputs: scans.images.shape[0], outputs: 1 },
        mip: shape.unet(TaskKind::Scale)?,
        sampling,
        image: scans.images.shape,
    };
    Ok((config, scans))
}

/// Trains a network whose weights depend on the factor by which images shrink.
pub(super) fn train(run: &TrainRun<Recipe>, data: &DataArgs, cx: &Context) -> Result<()> {
    let recipe = &run.recipe;
    let (config, scans) = if run.resumed {
        let config: ScaleConfig = run.folder.config(KIND)?;
        let scans = read(data, &config)?;
        (config, scans)
    } else {
        configure(data, &recipe.shape, recipe.gamma_sampling)?
    };
    check(&scans)?;
    let [valid, train] = split(scans.len(), recipe.val_fraction, cx)?;
    let (train, valid) = (scans.select(&train), scans.select(&valid));
    let training = recipe.training(run.steps);
    training.check()?;
    let model = config.draw(None, cx)?;
    run.save(|folder| folder.save_config(KIND, &config))?;
    cx.note(format!("{} weights depend on the factor; {} images", model.spec().numel(), train.len()));
    let probed = train.select(&(0..train.len().min(PROBED)).collect::<Vec<_>>());
    let probes = recipe.probes(run, |net| probe(net, &probed, cx));
    let condition = |step: usize| config.sampling.draw(1, &mut cx.rng("step", step as u64))[0].to_string();
    let task = ScaleTask { train: &train, valid: &valid, sampling: config.sampling, batch: recipe.batch, cx };
    let mut task = Probed::new(task, 1, probes, condition, cx);
    let trained = run.train(model, &mut task, &training, &format!("--data {}", data.data.display()), cx)?;
    task.finish(&trained.last, trained.log.len())?;
    let summary = run.finish(&trained, "loss per image")?;
    cx.emit(&summary, |summary| {
        format!("{}model in {}\n", summary.to_text("an image"), summary.model.display())
    })
}

/// Writes a mask as PNG for every image and factor.
pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (config, model) = open_scale(&args.model, cx)?;
    let with_masks = args.data.data.join("images");
    let folder = if with_masks.is_dir() { with_masks } else { args.data.data.clone() };
    let images = Images::read(&folder, &ImageOptions { unlabelled: true, ..ImageOptions::default() })?;
    fits(&args.data, &config, &images)?;
    let names = match folder.is_dir() {
        true => stems(&folder)?,
        false => (1..=images.len()).map(|number| number.to_string()).collect(),
    };
    let [_, height, width] = images.shape;
    let conditions = args.gamma.conditions(&[Range::unit("gamma")], cx)?;
    for gamma in &conditions {
        let masks = segment(&model, &images, gamma[0], cx)?;
        let out = args.out.join(format!("gamma-{:.3}", gamma[0]));
        fs::create_dir_all(&out).map_err(Error::io("create", &out))?;
        for (name, mask) in names.iter().zip(masks.chunks(height * width)) {
            let white = |at: usize| if mask[at] { 255u8 } else { 0 };
            let picture = GrayImage::from_fn(width as u32, height as u32, |x, y| {
                image::Luma([white(y as usize * width + x as usize)])
            });
            let mut bytes = std::io::Cursor::new(Vec::new());
            picture
                .write_to(&mut bytes, image::ImageFormat::Png)
                .map_err(|e| Error::work("cannot write a mask as PNG").caused_by(e))?;
            write_atomic(&out.join(format!("{name}.png")), &bytes.into_inner())?;
        }
    }
    let result = json!({ "out": args.out, "images": images.len(), "conditions": conditions.len() });
    cx.emit(&result, |_| {
        format!(
            "masks of {} images at {} factors in {}\n",
            images.len(),
            conditions.len(),
            args.out.display()
        )
    })
}

/// Accuracy and cost over the factor.
pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (config, model) = open_scale(&args.model, cx)?;
    let scans = read(&args.data, &config)?;
    let conditions = args.gamma.conditions(&[Range::unit("gamma")], cx)?;
    let bar = cx.progress(conditions.len() as u64, "segmenting");
    let mut points: Vec<(f64, Quality)> = Vec::new();
    for gamma in &conditions {
        points.push((gamma[0].into(), quality(&model, &scans, gamma[0], cx)?));
        bar.inc(1);
    }
    if let Some(out) = &args.out {
        let mut text = String::from("gamma,dice,iou,operations\n");
        for (gamma, q) in &points {
            text += &format!("{gamma},{},{},{}\n", q.dice, q.iou, q.operations);
        }
        write_atomic(out, text.as_bytes())?;
        Plot::lines("Accuracy over cost", "million operations an image", "Dice")
            .log_x()
            .series(
                "γ from 0 to 1",
                points.iter().map(|(_, q)| (q.operations as f64 / 1e6, q.dice)).collect(),
            )
            .save(&out.with_extension("svg"))?;
    }
    let lines: Vec<_> =
        points.iter().map(|(gamma, quality)| json!({ "gamma": gamma, "quality": quality })).collect();
    cx.emit(&json!({ "images": scans.len(), "conditions": lines }), |_| {
        let mut text = String::from("gamma    Dice    IoU     million operations\n");
        for (gamma, q) in &points {
            text +=
                &format!("{gamma:<8.3} {:<7.4} {:<7.4} {:.3}\n", q.dice, q.iou, q.operations as f64 / 1e6);
        }
        text
    })
}
