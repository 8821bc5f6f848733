//! The verbs on models that register images.

use std::fs;

use burn::tensor::Tensor;
use image::GrayImage;
use kiln_core::{Context, Error, HostTensor, Plot, Result, TensorFile, write_atomic};
use kiln_data::{Images, write_npz};
use kiln_nn::TrainRun;
use serde_json::json;

use super::{DataArgs, EvalArgs, PredictArgs, Recipe, split};
use crate::checkpoint::{KIND, RegisterConfig, TaskKind, open_register};
use crate::encoding::Range;
use crate::register::{Quality, RegisterTask, Registered, check, draw_pairs, quality, register, tensors};
use crate::unet::{OUTPUT_INIT, UNetConfig, WEIGHTS};

/// Images that a model can register.
fn read(data: &DataArgs, config: &RegisterConfig) -> Result<Images> {
    let images = data.read(Some(config.white), false)?;
    check(&images)?;
    if images.shape[1..] != config.image {
        return Err(Error::input(data.data.display(), format!("the images are {:?}", &images.shape[1..]))
            .hint(format!("the model was trained on {:?}, height first", config.image)));
    }
    Ok(images)
}

/// Trains a network whose weights depend on how smooth the deformation shall be.
pub(super) fn train(run: &TrainRun<Recipe>, data: &DataArgs, cx: &Context) -> Result<()> {
    let recipe = &run.recipe;
    let (config, images) = if run.resumed {
        let config: RegisterConfig = run.folder.config(KIND)?;
        let images = read(data, &config)?;
        (config, images)
    } else {
        if recipe.shape.gamma_dim != 1 || !recipe.shape.range.is_empty() {
            return Err(Error::usage("the condition of registration is one number between 0 and 1")
                .hint("leave --gamma-dim and --range out"));
        }
        let images = data.read(None, false)?;
        check(&images)?;
        let config = RegisterConfig {
            task: TaskKind::Register,
            network: UNetConfig { inputs: 2, outputs: 2 },
            mip: recipe.shape.mip(WEIGHTS, OUTPUT_INIT)?,
            sampling: recipe.gamma_sampling,
            image: [images.shape[1], images.shape[2]],
            white: images.white,
        };
        (config, images)
    };
    let (train, valid) = split(&images, recipe.val_fraction, cx)?;
    for part in [&train, &valid] {
        check(part)?;
    }
    let training = recipe.training(run.steps);
    training.check()?;
    let model = config.draw(cx)?;
    run.save(|folder| folder.save_config(KIND, &config))?;
    cx.note(format!("{} weights depend on the condition; {} images", model.spec().numel(), train.len()));
    let mut task =
        RegisterTask { train: &train, valid: &valid, sampling: config.sampling, batch: recipe.batch, cx };
    let trained = run.train(model, &mut task, &training, &format!("--data {}", data.data.display()), cx)?;
    let summary = run.finish(&trained, "loss per pair")?;
    cx.emit(&summary, |summary| {
        format!("{}model in {}\n", summary.to_text("a pair"), summary.model.display())
    })
}

/// Writes moved images as PNG and displacements as NPZ.
pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (config, model) = open_register(&args.model, cx)?;
    let images = read(&args.data, &config)?;
    if args.pairs == 0 {
        return Err(Error::usage("--pairs 0 registers nothing"));
    }
    let conditions = args.gamma.conditions(&[Range::unit("gamma")], cx)?;
    let pairs = draw_pairs(&images, args.pairs, &mut cx.rng("pairs", 0));
    fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    let [moving, fixed] = tensors(&images, &pairs, &cx.device);
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
    let images = read(&args.data, &config)?;
    if args.pairs == 0 {
        return Err(Error::usage("--pairs 0 registers nothing"));
    }
    let pairs = draw_pairs(&images, args.pairs, &mut cx.rng("pairs", 0));
    let conditions = args.gamma.conditions(&[Range::unit("gamma")], cx)?;
    let bar = cx.progress(conditions.len() as u64, "registering");
    let mut points: Vec<(f64, Quality)> = Vec::new();
    for gamma in &conditions {
        points.push((gamma[0].into(), quality(&model, &images, &pairs, gamma[0], cx)?));
        bar.inc(1);
    }
    if let Some(out) = &args.out {
        let mut text = String::from("gamma,difference,difference_before,roughness,folded\n");
        for (gamma, q) in &points {
            text +=
                &format!("{gamma},{},{},{},{}\n", q.difference, q.difference_before, q.roughness, q.folded);
        }
        write_atomic(out, text.as_bytes())?;
        let line = |value: fn(&Quality) -> f64| points.iter().map(|(gamma, q)| (*gamma, value(q))).collect();
        Plot::lines("Registration over the condition", "γ", "relative to before; per pixel")
            .series("difference, relative", line(|q| q.difference / q.difference_before))
            .series("roughness", line(|q| q.roughness))
            .series("folded share", line(|q| q.folded))
            .save(&out.with_extension("svg"))?;
    }
    let lines: Vec<_> =
        points.iter().map(|(gamma, quality)| json!({ "gamma": gamma, "quality": quality })).collect();
    cx.emit(&json!({ "pairs": pairs.len(), "conditions": lines }), |_| {
        let mut text = String::from("gamma    difference  before   roughness  folded\n");
        for (gamma, q) in &points {
            text += &format!(
                "{gamma:<8.3} {:<11.5} {:<8.5} {:<10.4} {:.4}\n",
                q.difference, q.difference_before, q.roughness, q.folded
            );
        }
        text
    })
}
