//! `kiln chest-xray train-seg`, `segment` and `mask-eval`

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use burn::module::Module;
use clap::Args;
use kiln_core::{Context, Error, Result};
use kiln_data::{Picture, write_csv};
use kiln_nn::{TrainRun, initialise};
use rand::seq::SliceRandom;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{ImagesArgs, picture_path, shown, write_json};
use crate::NOTICE;
use crate::checkpoint::{Config, KIND, SegmentConfig, fold_name, open_segmenter};
use crate::dataset::{Entry, Images, Labels, list};
use crate::image::{Cxr, Fit, Norm, Radiograph, find, segmented};
use crate::masks::{LEAST_LUNG, MOST_GREY, Mask, MaskMetrics, grey_share};
use crate::networks::{Segmenter, UNetConfig};
use crate::overlay::overlay;
use crate::train::{Fall, SegmentTask, find_lungs, training};

/// The command whose runs a model folder keeps.
const TRAIN: &str = "chest-xray train-seg";

#[derive(Debug, Args)]
pub(super) struct TrainSegArgs {
    /// Folder of radiographs
    #[arg(long)]
    images: PathBuf,
    /// Folder of masks, white where there is lung
    #[arg(long)]
    masks: PathBuf,
    /// Model folder to write
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the runs in this folder
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    #[command(flatten)]
    recipe: Recipe,
}

/// What besides data and seed decides the outcome.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// Which network
    #[arg(long, value_enum, default_value = "unet", conflicts_with = "resume")]
    net: Segmenter,
    /// Channels of the first level
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    width: usize,
    /// Rows and columns of images, divisible by 16
    #[arg(long, default_value_t = 256, conflicts_with = "resume")]
    size: usize,
    /// How images become squares
    #[arg(long, value_enum, default_value = "stretch", conflicts_with = "resume")]
    fit: Fit,
    /// Passes through the images
    #[arg(long, default_value_t = 50, conflicts_with = "resume")]
    epochs: usize,
    /// Images of a step
    #[arg(long, default_value_t = 16, conflicts_with = "resume")]
    batch: usize,
    /// Learning rate at the beginning; it falls to a tenth when the validation loss has not fallen for half the patience
    #[arg(long, default_value_t = 1e-3, conflicts_with = "resume")]
    lr: f64,
    /// Epochs without a lower validation loss after which a run stops
    #[arg(long, default_value_t = 8, conflicts_with = "resume")]
    patience: usize,
    /// Parts of which each is tested on once; with 1, a fifth is tested on and there is one model
    #[arg(long, default_value_t = 1, conflicts_with = "resume")]
    folds: usize,
    /// Turn, move and scale images and their masks in training
    #[arg(long, conflicts_with = "resume")]
    augment: bool,
}

fn stem(path: &Path) -> String {
    path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Whether a file is a mask by its name.
fn is_named_mask(path: &Path) -> bool {
    let stem = stem(path);
    stem.ends_with("-mask") || stem.ends_with("_mask")
}

/// The name of a mask without what says that it is one.
fn plain_stem(path: &Path) -> String {
    let stem = stem(path);
    stem.strip_suffix("-mask").or(stem.strip_suffix("_mask")).unwrap_or(&stem).to_string()
}

/// Images with the mask of each.
fn read_pairs(images: &Path, masks: &Path, cxr: Cxr, cx: &Context) -> Result<(Images, Vec<Vec<f32>>)> {
    let mut by_name = HashMap::new();
    for path in find(masks)? {
        let plain = plain_stem(&path);
        // In a folder that holds both, the named ones are masks.
        if is_named_mask(&path) || !by_name.contains_key(&plain) {
            by_name.insert(plain, path);
        }
    }
    let entries: Vec<Entry> =
        list(images, &Labels::default())?.into_iter().filter(|entry| !is_named_mask(&entry.path)).collect();
    let paths: Vec<&PathBuf> = entries
        .iter()
        .map(|entry| {
            by_name.get(&stem(&entry.path)).filter(|mask| **mask != entry.path).ok_or_else(|| {
                Error::input(masks.display(), format!("holds no mask for {}", entry.name))
                    .hint("a mask has the name of its image, also with -mask or _mask behind it")
            })
        })
        .collect::<Result<_>>()?;
    let found = Images::read(entries.clone(), cxr, cx)?;
    let read = |(path, (entry, shape)): (&&PathBuf, (&Entry, &[usize; 2]))| {
        let mask = Radiograph::read(path)?;
        if [mask.height, mask.width] != *shape {
            let [height, width] = *shape;
            return Err(Error::input(path.display(), format!("is {} x {} pixels", mask.height, mask.width))
                .hint(format!("its image {} is {height} x {width}", entry.name)));
        }
        let square = cxr.square(&mask.pixels, *shape);
        Ok(Mask::of(&square, [cxr.size; 2]).to_plane())
    };
    let masks = paths
        .par_iter()
        .zip(found.entries.par_iter().zip(&found.shapes))
        .map(read)
        .collect::<Result<Vec<_>>>()?;
    Ok((found, masks))
}

#[derive(Serialize)]
struct FoldRow {
    fold: usize,
    steps: usize,
    test_images: usize,
    dice: f64,
    iou: f64,
    accuracy: f64,
}

/// How well the mask of one image fits.
#[derive(Serialize)]
struct MaskRow {
    image: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    fold: Option<usize>,
    dice: f64,
    iou: f64,
    accuracy: f64,
}

pub(super) fn train(args: TrainSegArgs, cx: &Context) -> Result<()> {
    let out = args.resume.clone().or(args.out.clone()).unwrap_or_default();
    let folder_of =
        |fold: usize, folds: usize| if folds == 1 { out.clone() } else { out.join(fold_name(fold + 1)) };
    let mut recipe = args.recipe.clone();
    let mut seed = cx.seed;
    if args.resume.is_some() {
        let first = if out.join("train.json").exists() { out.clone() } else { out.join(fold_name(1)) };
        let run = TrainRun::<Recipe>::resume(TRAIN, &first, None)?;
        (recipe, seed) = (run.recipe, run.seed);
    }
    let cx = &Context { seed, ..cx.clone() };
    let cxr = Cxr { size: recipe.size, fit: recipe.fit, norm: Norm::Zscore };
    let config = SegmentConfig { network: UNetConfig { width: recipe.width, net: recipe.net }, cxr };
    config.check()?;
    if recipe.batch == 0 || recipe.epochs == 0 || !(1..=100).contains(&recipe.folds) {
        return Err(Error::usage("--batch and --epochs must be at least 1, --folds between 1 and 100"));
    }
    let (images, masks) = read_pairs(&args.images, &args.masks, cxr, cx)?;
    if images.len() < 3 {
        return Err(Error::input(args.images.display(), format!("holds {} images with masks", images.len()))
            .hint("at least 3 are needed: to train on, to validate with and to test on"));
    }
    let mut order: Vec<usize> = (0..images.len()).collect();
    order.shuffle(&mut cx.rng("folds", 0));
    let parts = if recipe.folds == 1 { 5.min(images.len()) } else { recipe.folds };
    if parts > images.len() {
        return Err(Error::usage(format!("{} images cannot be divided into {parts} folds", images.len())));
    }
    // An image goes where its original does.
    let original = images.groups();
    let mut part = vec![0; images.len()];
    order.iter().enumerate().for_each(|(place, &index)| part[index] = place % parts);
    let (mut rows, mut image_rows) = (Vec::new(), Vec::new());
    for fold in 0..recipe.folds {
        let (test, rest): (Vec<usize>, Vec<usize>) =
            order.iter().partition(|&&index| part[original[index]] == fold);
        let kept: HashSet<usize> =
            rest.iter().take((rest.len() / 10).max(1)).map(|&index| original[index]).collect();
        let (valid, train): (Vec<usize>, Vec<usize>) =
            rest.iter().partition(|&&index| kept.contains(&original[index]));
        if test.is_empty() || train.is_empty() {
            return Err(Error::input(
                args.images.display(),
                "holds too few images that are no copies of others",
            )
            .hint("use fewer folds, or more images"));
        }
        let folder = folder_of(fold, recipe.folds);
        let mut run = match args.resume.is_some() && folder.join("train.json").exists() {
            true => TrainRun::<Recipe>::resume(TRAIN, &folder, None)?,
            false => TrainRun::begin(TRAIN, &folder, 1, recipe.clone(), cx),
        };
        let mut task = SegmentTask::new(&images, &masks, [&train, &valid], recipe.batch, recipe.augment, cx);
        let per_epoch = task.steps_per_epoch();
        if !run.resumed {
            run.steps = recipe.epochs * per_epoch;
        }
        let mut plan = training(run.steps, recipe.lr, Fall::OnPlateaus(recipe.patience / 2));
        (plan.eval_every, plan.checkpoint_every) = (per_epoch, per_epoch);
        plan.patience = Some(recipe.patience);
        plan.check()?;
        let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.network.init(device));
        run.save(|folder| folder.save_config(KIND, &Config::Segment(config.clone())))?;
        if fold == 0 {
            cx.note(format!("{} parameters, {} images; {NOTICE}", model.num_params(), images.len()));
        }
        let words = format!("--images {} --masks {}", args.images.display(), args.masks.display());
        let trained = run.train(model, &mut task, &plan, &words, cx)?;
        let summary = run.finish(&trained, "cross-entropy + Dice loss")?;
        let lungs = find_lungs(&trained.model, &images, &test, cx)?;
        let truth = |&index: &usize| Mask::of(&masks[index], [cxr.size; 2]);
        let metrics: Vec<MaskMetrics> =
            lungs.iter().zip(&test).map(|(found, index)| MaskMetrics::of(found, &truth(index))).collect();
        image_rows.extend(test.iter().zip(&metrics).map(|(&index, metrics)| {
            let image = images.entries[index].name.clone();
            MaskRow {
                image,
                fold: Some(fold + 1),
                dice: metrics.dice,
                iou: metrics.iou,
                accuracy: metrics.accuracy,
            }
        }));
        if let Some(mean) = MaskMetrics::mean(&metrics) {
            let MaskMetrics { dice, iou, accuracy } = mean;
            rows.push(FoldRow {
                fold: fold + 1,
                steps: summary.steps,
                test_images: test.len(),
                dice,
                iou,
                accuracy,
            });
        }
    }
    let result = json!({ "model": out, "folds": rows, "note": NOTICE });
    write_json(&out.join("test.json"), &result)?;
    write_csv(&out.join("test.csv"), &image_rows)?;
    cx.emit(&result, |_| {
        let line = |row: &FoldRow| {
            format!(
                "fold {}: Dice {:.4}, IoU {:.4}, accuracy {:.4} on {} images that were held out, after {} steps\n",
                row.fold, row.dice, row.iou, row.accuracy, row.test_images, row.steps
            )
        };
        rows.iter().map(line).collect::<String>() + &format!("models in {}\n", out.display())
    })
}

#[derive(Debug, Args)]
pub(super) struct SegmentArgs {
    /// Model that `train-seg` wrote
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    images: ImagesArgs,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Cut segmented images to the lungs
    #[arg(long)]
    crop: bool,
}

#[derive(Serialize)]
struct QualityRow {
    image: String,
    lung_fraction: f64,
    warnings: String,
}

pub(super) fn segment(args: &SegmentArgs, cx: &Context) -> Result<()> {
    let (config, model) = open_segmenter(&args.model, cx)?;
    let images = Images::read(args.images.list()?, config.cxr, cx)?;
    let all: Vec<usize> = (0..images.len()).collect();
    let lungs = find_lungs(&model, &images, &all, cx)?;
    let bar = cx.progress(images.len() as u64, "writing");
    let write = |index: usize| {
        let (entry, shape) = (&images.entries[index], images.shapes[index]);
        let path = |kind: &str| picture_path(&args.out.join(kind), &entry.name);
        // In the image's own size.
        let mask = Mask::of(&config.cxr.unsquare(&lungs[index].to_plane(), shape), shape);
        let image = Radiograph::read(&entry.path)?;
        Picture::grey(shape[0], shape[1], mask.to_plane()).write_png(&path("masks")?)?;
        let cut = segmented(&image.pixels, &mask, args.crop);
        Picture::grey(shape[0], shape[1], cut).write_png(&path("segmented")?)?;
        overlay(&images.plane(index), config.cxr.size, None, Some(&lungs[index]))
            .write_png(&path("outlines")?)?;
        let mut warnings = images.warnings[index].clone();
        warnings.extend(lung_warning(&mask));
        bar.inc(1);
        Ok(QualityRow {
            image: entry.name.clone(),
            lung_fraction: mask.fraction(),
            warnings: warnings.join("; "),
        })
    };
    let rows = all.into_par_iter().map(write).collect::<Result<Vec<_>>>()?;
    write_csv(&args.out.join("quality.csv"), &rows)?;
    let flagged = rows.iter().filter(|row| !row.warnings.is_empty()).count();
    cx.emit(&json!({ "out": args.out, "images": rows, "flagged": flagged, "note": NOTICE }), |_| {
        format!(
            "{} masks in {}, {flagged} images flagged in quality.csv; {NOTICE}\n",
            rows.len(),
            args.out.display()
        )
    })
}

/// What is said of an image in which there is too little lung.
pub(super) fn lung_warning(mask: &Mask) -> Option<String> {
    (mask.fraction() < LEAST_LUNG).then(|| {
        format!(
            "no lungs found ({:.1} % of the image): a lateral view, or no chest X-ray?",
            100.0 * mask.fraction()
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct MaskEvalArgs {
    /// Folder of masks to judge, or one
    #[arg(long)]
    pred: PathBuf,
    /// Folder of true masks with the same names, or one
    #[arg(long)]
    truth: PathBuf,
    /// JSON file to write
    #[arg(long)]
    out: Option<PathBuf>,
}

pub(super) fn eval(args: &MaskEvalArgs, cx: &Context) -> Result<()> {
    let (pred, truth) = (find(&args.pred)?, find(&args.truth)?);
    let pairs: Vec<(PathBuf, PathBuf)> = match (&pred[..], &truth[..]) {
        ([a], [b]) => vec![(a.clone(), b.clone())],
        _ => {
            let by_name: HashMap<String, PathBuf> =
                truth.iter().map(|path| (plain_stem(path), path.clone())).collect();
            let find = |path: &PathBuf| {
                by_name.get(&plain_stem(path)).map(|truth| (path.clone(), truth.clone())).ok_or_else(|| {
                    Error::input(args.truth.display(), format!("holds no mask for {}", path.display()))
                        .hint("masks are paired by their names")
                })
            };
            pred.iter().map(find).collect::<Result<_>>()?
        }
    };
    let judge = |(pred, truth): &(PathBuf, PathBuf)| {
        let read = |path: &Path| {
            let image = Radiograph::read(path)?;
            let grey = grey_share(&image.pixels);
            if grey > MOST_GREY {
                cx.note(format!(
                    "{}: {:.0} % of its pixels are neither black nor white; is it a mask?",
                    path.display(),
                    100.0 * grey
                ));
            }
            Ok::<_, Error>(Mask::of(&image.pixels, [image.height, image.width]))
        };
        let (found, expected) = (read(pred)?, read(truth)?);
        if (found.height, found.width) != (expected.height, expected.width) {
            return Err(Error::input(
                pred.display(),
                format!("is {} x {} pixels", found.height, found.width),
            )
            .hint(format!("{} is {} x {}", truth.display(), expected.height, expected.width)));
        }
        Ok(MaskMetrics::of(&found, &expected))
    };
    let metrics = pairs.par_iter().map(judge).collect::<Result<Vec<_>>>()?;
    let mean = MaskMetrics::mean(&metrics);
    let mut result = json!({ "images": metrics.len() });
    if let (Value::Object(result), Some(mean)) = (&mut result, &mean) {
        result.extend([
            ("dice".to_string(), mean.dice.into()),
            ("iou".to_string(), mean.iou.into()),
            ("accuracy".to_string(), mean.accuracy.into()),
        ]);
    }
    let row = |((pred, _), metrics): (&(PathBuf, PathBuf), &MaskMetrics)| MaskRow {
        image: pred
            .strip_prefix(&args.pred)
            .ok()
            .filter(|name| name.as_os_str() != "")
            .unwrap_or(pred)
            .display()
            .to_string(),
        fold: None,
        dice: metrics.dice,
        iou: metrics.iou,
        accuracy: metrics.accuracy,
    };
    result["each"] = json!(pairs.iter().zip(&metrics).map(row).collect::<Vec<_>>());
    if let Some(out) = &args.out {
        write_json(out, &result)?;
    }
    cx.emit(&result, |_| {
        format!(
            "{} masks: mean Dice {}, IoU {}, accuracy {}\n",
            metrics.len(),
            shown(mean.map(|m| m.dice)),
            shown(mean.map(|m| m.iou)),
            shown(mean.map(|m| m.accuracy))
        )
    })
}
