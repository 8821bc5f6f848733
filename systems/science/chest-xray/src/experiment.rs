//! The reference experiment: a hospital's marker gives the diagnosis away in training and not at test. Networks that see whole
//! images learn the marker; networks that see lungs alone cannot.

use std::time::Instant;

use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};
use kiln_nn::{Outcome, TrainConfig, initialise, train};
use rayon::prelude::*;

use crate::bilinear::resize_plane;
use crate::cam::{Faithfulness, Layer, Map, score_cam};
use crate::dataset::Images;
use crate::image::{Cxr, Fit, Norm, segmented, zscore};
use crate::masks::{Mask, MaskMetrics};
use crate::metrics::{DECISION, Metrics, Scored, roc};
use crate::networks::{Classifier, ClassifierConfig, Net, Segmenter, UNet, UNetConfig};
use crate::phantom::{draw, draw_marker};
use crate::train::{Augment, ClassifyTask, Fall, SegmentTask, find_lungs, judge, probability, training};

/// How often the marker is right in training, and at test, where it tells nothing.
const SHORTCUT: f64 = 0.9;
const CHANCE: f64 = 0.5;
/// Images of a step.
const BATCH: usize = 16;
/// Rows and columns of the thumbnails that the simplest baseline sees.
const THUMBNAIL: usize = 16;
/// What counts as more where the paper says only that there is more.
const ADVANTAGE: f64 = 0.05;

/// Everything that differs between scales.
struct Plan {
    /// Rows and columns of images.
    size: usize,
    /// Images that classifiers learn from, and are tested on.
    train: usize,
    test: usize,
    /// Images that U-Nets learn from, channels of their first level, and passes.
    lungs: usize,
    unet_width: usize,
    unet_epochs: usize,
    /// Dice that both must reach.
    dice: f64,
    /// Classifiers and factors of their widths.
    networks: Vec<(Net, f64)>,
    epochs: usize,
    lr: f64,
    /// How many of them run without the shortcut too.
    controls: usize,
    /// Test images whose decisions are explained.
    explained: usize,
    /// The network that is tested on every part of its images once.
    folded: Option<(Net, f64)>,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        let quick = Self {
            size: 64,
            train: 300,
            test: 240,
            lungs: 64,
            unet_width: 4,
            unet_epochs: 8,
            dice: 0.90,
            networks: vec![(Net::Resnet18, 0.125), (Net::Squeezenet11, 0.25)],
            epochs: 8,
            lr: 1e-3,
            controls: 1,
            explained: 12,
            folded: None,
        };
        match scale {
            Scale::Smoke => {
                let networks = vec![(Net::Resnet18, 0.0625)];
                Self {
                    train: 24,
                    test: 24,
                    lungs: 12,
                    unet_width: 2,
                    unet_epochs: 1,
                    networks,
                    epochs: 1,
                    explained: 2,
                    ..quick
                }
            }
            Scale::Quick => quick,
            Scale::Full => Self {
                size: 96,
                train: 800,
                test: 400,
                lungs: 240,
                unet_width: 8,
                unet_epochs: 14,
                dice: 0.95,
                networks: Net::PAPER.map(|net| (net, width_of(net))).to_vec(),
                epochs: 10,
                lr: 1e-3,
                controls: Net::PAPER.len(),
                explained: 40,
                folded: Some((Net::Mobilenet, 0.5)),
            },
        }
    }
}

/// Factors by which networks become small enough for two cores and small images.
fn width_of(net: Net) -> f64 {
    match net {
        Net::Resnet18 => 0.25,
        Net::Mobilenet => 0.5,
        Net::Squeezenet | Net::Squeezenet11 => 0.5,
        _ => 0.125,
    }
}

/// Phantoms with their true lungs.
struct Cohort {
    images: Images,
    lungs: Vec<Mask>,
}

impl Cohort {
    /// As many with tuberculosis as without.
    fn draw(name: &str, count: usize, shortcut: f64, size: usize, cx: &Context) -> Self {
        let phantoms: Vec<_> = (0..count)
            .into_par_iter()
            .map(|number| {
                let is_tb = number % 2 == 1;
                let marker =
                    draw_marker(is_tb, shortcut, &mut cx.rng(&format!("{name} markers"), number as u64));
                draw(is_tb, marker, size, &mut cx.rng(name, number as u64))
            })
            .collect();
        let labels: Vec<bool> = phantoms.iter().map(|phantom| phantom.is_tb()).collect();
        let cxr = Cxr { size, fit: Fit::Stretch, norm: Norm::Zscore };
        let (planes, lungs) = phantoms.into_iter().map(|phantom| (phantom.pixels, phantom.lungs)).unzip();
        Self { images: Images::of(planes, &labels, cxr), lungs }
    }

    fn all(&self) -> Vec<usize> {
        (0..self.images.len()).collect()
    }

    /// The images with black outside the lungs that a network finds.
    fn segmented(&self, unet: &UNet, cx: &Context) -> Result<Images> {
        let found = find_lungs(unet, &self.images, &self.all(), cx)?;
        let mut images = self.images.clone();
        for (index, lungs) in found.iter().enumerate() {
            images.set_plane(index, &segmented(&images.plane(index), lungs, false));
        }
        Ok(images)
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    let test = Cohort::draw("test", plan.test, CHANCE, plan.size, cx);
    let unet = report_lungs(&mut report, &plan, &test, cx)?;
    report_classifiers(&mut report, &plan, &test, &unet, cx)?;
    if let Some((net, width)) = plan.folded {
        report_folds(&mut report, &plan, net, width, &unet, cx)?;
    }
    report.notes.push(
        "Maps are made of activations in the middle of the networks, an eighth of the image in rows and columns; of the last, \
         2 x 2 are left of 64 x 64 pixels. Score-CAM weighs activation maps by a softmax over differences of probabilities, \
         which hardly differ: the map is close to the mean of all, those that answer to the black around the lungs included."
            .into(),
    );
    report.notes.push(format!(
        "Radiographs are phantoms of {0} x {0} pixels; lesions are easy to see. A marker outside the lungs is there with \
         probability {SHORTCUT} in tuberculous and {1:.1} in normal images to learn from, and with {CHANCE} in all images to \
         be tested on. Networks are narrow versions of the published ones and begin with random weights. {2}",
        plan.size,
        1.0 - SHORTCUT,
        crate::NOTICE_SENTENCE
    ));
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Part 1: both U-Nets. Returns the original one.
fn report_lungs(report: &mut Report, plan: &Plan, test: &Cohort, cx: &Context) -> Result<UNet> {
    let cohort = Cohort::draw("lungs", plan.lungs, CHANCE, plan.size, cx);
    let masks: Vec<Vec<f32>> = cohort.lungs.iter().map(Mask::to_plane).collect();
    let all = cohort.all();
    let mut table = Table::new(
        "Lungs in phantoms that were held out, mean over images",
        &["network", "Dice", "IoU", "pixel accuracy", "least Dice", "seconds to train"],
    );
    let mut networks = Vec::new();
    let mut worst = f64::INFINITY;
    for (net, name) in [(Segmenter::Unet, "U-Net"), (Segmenter::UnetModified, "modified U-Net")] {
        let clock = Instant::now();
        let mut task = SegmentTask::new(&cohort.images, &masks, [&all, &all[..2]], 8, false, cx);
        let steps = plan.unet_epochs * task.steps_per_epoch();
        let config = UNetConfig { width: plan.unet_width, net };
        let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device));
        let trained = train(model, &mut task, &training(steps, 4e-3, Fall::Cosine), None, false, cx)?;
        if trained.outcome == Outcome::Interrupted {
            return Err(Error::interrupted("stopped before the U-Nets were trained"));
        }
        let seconds = clock.elapsed().as_secs_f64();
        let found = find_lungs(&trained.last, &test.images, &test.all(), cx)?;
        let metrics: Vec<MaskMetrics> =
            found.iter().zip(&test.lungs).map(|(a, b)| MaskMetrics::of(a, b)).collect();
        let Some(mean) = MaskMetrics::mean(&metrics) else { continue };
        let least = metrics.iter().map(|m| m.dice).fold(1.0, f64::min);
        table.row([
            name.to_string(),
            format!("{:.4}", mean.dice),
            format!("{:.4}", mean.iou),
            format!("{:.4}", mean.accuracy),
            format!("{least:.3}"),
            format!("{seconds:.1}"),
        ]);
        worst = worst.min(mean.dice);
        networks.push(trained.last);
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        "Both U-Nets find the lungs",
        "accuracy 98.6 %, Dice 96.2 % (modified U-Net)",
        worst,
        "mean Dice on held-out phantoms, the lower of the two",
        Threshold::AtLeast(plan.dice),
    ));
    Ok(networks.swap_remove(0))
}

/// One way to see images.
#[derive(Clone, Copy, PartialEq)]
enum Sees {
    Whole,
    Lungs,
}

/// A trained network and how it did at test.
struct Run {
    model: Classifier,
    scores: Vec<Scored>,
    seconds: f64,
    milliseconds: f64,
}

impl Run {
    fn accuracy(&self) -> f64 {
        Metrics::of(&self.scores, DECISION).accuracy.unwrap_or(f64::NAN)
    }
}

fn learn(plan: &Plan, (net, width): (Net, f64), images: &Images, test: &Images, cx: &Context) -> Result<Run> {
    let all: Vec<usize> = (0..images.len()).collect();
    let clock = Instant::now();
    let model = fit(plan, (net, width), images, &all, cx)?;
    let seconds = clock.elapsed().as_secs_f64();
    let clock = Instant::now();
    let everything: Vec<usize> = (0..test.len()).collect();
    let scores = score(&model, test, &everything, cx)?;
    let milliseconds = 1e3 * clock.elapsed().as_secs_f64() / test.len() as f64;
    Ok(Run { model, scores, seconds, milliseconds })
}

fn fit(
    plan: &Plan,
    (net, width): (Net, f64),
    images: &Images,
    chosen: &[usize],
    cx: &Context,
) -> Result<Classifier> {
    let config = ClassifierConfig { width, size: plan.size, ..ClassifierConfig::new(net, 2) };
    config.check()?;
    let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device));
    let mut task = ClassifyTask::new(images, [chosen, &chosen[..2]], BATCH, Augment::None, false, cx);
    let steps = plan.epochs * task.steps_per_epoch();
    // Networks without batch norm die when they are pushed at once.
    let recipe = TrainConfig { warmup: steps / 8, ..training(steps, plan.lr, Fall::Cosine) };
    let trained = train(model, &mut task, &recipe, None, false, cx)?;
    match trained.outcome {
        Outcome::Interrupted => Err(Error::interrupted("stopped before the classifiers were trained")),
        _ => Ok(trained.last),
    }
}

fn score(model: &Classifier, images: &Images, chosen: &[usize], cx: &Context) -> Result<Vec<Scored>> {
    let margins = judge(model, images, chosen, cx)?;
    let scored = |(&index, margin): (&usize, f64)| Scored {
        image: images.entries[index].name.clone(),
        is_tb: images.is_tb(index),
        p_tb: probability(margin),
    };
    Ok(chosen.iter().zip(margins).map(scored).collect())
}

/// Parts 2 to 4: whole images against lungs, with the shortcut and without.
fn report_classifiers(
    report: &mut Report,
    plan: &Plan,
    test: &Cohort,
    unet: &UNet,
    cx: &Context,
) -> Result<()> {
    let test_lungs = test.segmented(unet, cx)?;
    let mut table = Table::new(
        "Whole images against segmented lungs at test, where the marker tells nothing",
        &[
            "network",
            "marker in training",
            "sees",
            "accuracy",
            "sensitivity",
            "specificity",
            "AUC",
            "train, s",
            "ms an image",
        ],
    );
    let mut curves = Plot::lines("ROC at test, trained with the marker", "1 - specificity", "sensitivity");
    let mut bars: Vec<(String, [f64; 2])> = Vec::new();
    let (mut advantages, mut controls, mut attention) = (Vec::new(), Vec::new(), Vec::new());
    let bar = cx.progress(2 * (plan.networks.len() + plan.controls) as u64, "training classifiers");
    for (shortcut, networks) in
        [(SHORTCUT, &plan.networks[..]), (CHANCE, &plan.networks[..plan.controls.min(plan.networks.len())])]
    {
        let cohort = Cohort::draw("train", plan.train, shortcut, plan.size, cx);
        let cohort_lungs = cohort.segmented(unet, cx)?;
        let told = if shortcut == SHORTCUT { "gives the label away" } else { "tells nothing" };
        for &(net, width) in networks {
            let mut runs = Vec::new();
            for sees in [Sees::Whole, Sees::Lungs] {
                let (images, tested) = match sees {
                    Sees::Whole => (&cohort.images, &test.images),
                    Sees::Lungs => (&cohort_lungs, &test_lungs),
                };
                let run = learn(plan, (net, width), images, tested, cx)?;
                let what = if sees == Sees::Whole { "whole image" } else { "lungs" };
                add_row(
                    &mut table,
                    net.name(),
                    told,
                    what,
                    &run.scores,
                    Some((run.seconds, run.milliseconds)),
                );
                if shortcut == SHORTCUT {
                    curves = curves.series(format!("{}, {what}", net.name()), roc(&run.scores));
                }
                runs.push(run);
                bar.inc(1);
            }
            let [whole, lungs] = [runs[0].accuracy(), runs[1].accuracy()];
            if shortcut == SHORTCUT {
                advantages.push(lungs - whole);
                bars.push((net.name().into(), [whole, lungs]));
                attention.push(explain(report, plan, test, &test_lungs, net, &runs, cx));
            } else {
                controls.push((lungs - whole).abs());
            }
        }
        for (what, images, tested) in
            [("whole image", &cohort.images, &test.images), ("lungs", &cohort_lungs, &test_lungs)]
        {
            let scores = logistic_baseline(images, tested);
            add_row(&mut table, "logistic regression, 16 x 16", told, what, &scores, None);
        }
    }
    report.tables.push(table);
    report.plots.push(curves.series("chance", vec![(0.0, 0.0), (1.0, 1.0)]));
    let column = |which: usize| bars.iter().map(|(_, values)| values[which]).collect::<Vec<_>>();
    report.plots.push(Plot::bars(
        "Accuracy at test, trained with the marker",
        "accuracy",
        bars.iter().map(|(name, _)| name.clone()),
        [("whole image", column(0)), ("segmented lungs", column(1))],
    ));
    let least = advantages.iter().copied().fold(f64::INFINITY, f64::min);
    let most = controls.iter().copied().fold(0.0, f64::max);
    let mean = |of: fn(&[f64; 2]) -> f64| attention.iter().map(of).sum::<f64>() / attention.len() as f64;
    let [whole, lungs] = [mean(|a| a[0]), mean(|a| a[1])];
    report.claims.extend([
        Claim::new(
            "Networks that see lungs alone decide better where the marker misleads",
            "accuracy 97.07 % with whole images, 99.9 % with segmented lungs",
            least,
            "accuracy of segmented above whole, the least over networks",
            Threshold::AtLeast(ADVANTAGE),
        ),
        Claim::new(
            "Networks that see lungs alone decide from the lungs",
            "Score-CAM lies in the lungs",
            lungs,
            "share of Score-CAM inside the true lungs, mean over networks",
            Threshold::AtLeast(0.8),
        ),
        Claim::new(
            "More so than networks that see whole images",
            "Score-CAM of whole images lies outside of the lungs too",
            lungs - whole,
            "share of Score-CAM inside the lungs, segmented above whole",
            Threshold::AtLeast(0.1),
        ),
        Claim::new(
            "Without a misleading marker both see as much",
            "not in the paper (control)",
            most,
            "distance of the accuracies of segmented and whole, the largest over networks",
            Threshold::AtMost(0.03),
        ),
    ]);
    Ok(())
}

fn add_row(
    table: &mut Table,
    name: &str,
    told: &str,
    what: &str,
    scores: &[Scored],
    clock: Option<(f64, f64)>,
) {
    let m = Metrics::of(scores, DECISION);
    let shown = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.3}"));
    table.row([
        name.to_string(),
        told.to_string(),
        what.to_string(),
        shown(m.accuracy),
        shown(m.tb.sensitivity),
        shown(m.tb.specificity),
        shown(m.auc),
        clock.map_or_else(|| "-".into(), |(seconds, _)| format!("{seconds:.1}")),
        clock.map_or_else(|| "-".into(), |(_, milliseconds)| format!("{milliseconds:.2}")),
    ]);
}

/// Where Score-CAM of tuberculous test images lies. Returns the mean share inside the true lungs, for whole and segmented.
fn explain(
    report: &mut Report,
    plan: &Plan,
    test: &Cohort,
    test_lungs: &Images,
    net: Net,
    runs: &[Run],
    cx: &Context,
) -> [f64; 2] {
    let ill: Vec<usize> =
        test.all().into_iter().filter(|&index| test.images.is_tb(index)).take(plan.explained).collect();
    let area = ill.iter().map(|&index| test.lungs[index].fraction()).sum::<f64>() / ill.len() as f64;
    let mut table = Table::new(
        format!(
            "Score-CAM of {} for tuberculosis, {} test images (lungs are {area:.2} of an image)",
            net.name(),
            ill.len()
        ),
        &[
            "sees",
            "share of the map in the lungs",
            "map, rows x columns",
            "area under deletion",
            "area under insertion",
        ],
    );
    let mut shares = [f64::NAN; 2];
    for (which, (run, images)) in runs.iter().zip([&test.images, test_lungs]).enumerate() {
        let mut sum = vec![0.0; plan.size * plan.size];
        let (mut inside, mut counted) = (0.0, 0);
        let (mut deletion, mut insertion) = (0.0, 0.0);
        let mut shape = [0, 0];
        for &index in &ill {
            let plane = images.plane(index);
            let x = images.cxr.to_tensor([&plane[..]], &cx.device);
            let map: Map = score_cam(&run.model, x.clone(), 1, Layer::Middle, None).map;
            shape = map.shape;
            sum.iter_mut().zip(map.over([plan.size; 2])).for_each(|(sum, value)| *sum += f64::from(value));
            if let Some(share) = map.lung_fraction(&test.lungs[index]) {
                inside += share;
                counted += 1;
            }
            let curves = Faithfulness::of(&run.model, &x, 1, &map);
            deletion += Faithfulness::area(&curves.deletion);
            insertion += Faithfulness::area(&curves.insertion);
        }
        shares[which] = inside / f64::from(counted);
        let n = ill.len() as f64;
        let what = ["whole image", "lungs"][which];
        table.row([
            what.to_string(),
            format!("{:.3}", shares[which]),
            format!("{} x {}", shape[0], shape[1]),
            format!("{:.3}", deletion / n),
            format!("{:.3}", insertion / n),
        ]);
        let mean: Vec<f32> = sum.iter().map(|&value| (value / n) as f32).collect();
        let coarse = resize_plane(&mean, [plan.size; 2], [32, 32]);
        // Row 0 of a heat map is at the bottom.
        let cells = coarse.chunks(32).rev().flatten().map(|&value| value.into()).collect();
        report.plots.push(Plot::heat_map(
            format!("Mean Score-CAM of {}, {what}", net.name()),
            "left to right",
            "bottom to top",
            32,
            cells,
        ));
    }
    report.tables.push(table);
    shares
}

/// The mobile network tested on every fifth of its images once.
fn report_folds(
    report: &mut Report,
    plan: &Plan,
    net: Net,
    width: f64,
    unet: &UNet,
    cx: &Context,
) -> Result<()> {
    const FOLDS: usize = 5;
    let cohort = Cohort::draw("folds", plan.train, CHANCE, plan.size, cx);
    let lungs = cohort.segmented(unet, cx)?;
    let mut table = Table::new(
        format!("{FOLDS}-fold cross-validation of {}, the marker telling nothing", net.name()),
        &["sees", "accuracy", "± (95 %)", "sensitivity", "specificity", "AUC"],
    );
    for (what, images) in [("whole image", &cohort.images), ("lungs", &lungs)] {
        let folds = images.folds(FOLDS, &mut cx.rng("folds", 0))?;
        let mut scores = Vec::new();
        for fold in 0..FOLDS {
            let (test, rest): (Vec<usize>, Vec<usize>) =
                cohort.all().into_iter().partition(|&index| folds[index] == fold);
            let model = fit(plan, (net, width), images, &rest, cx)?;
            scores.extend(score(&model, images, &test, cx)?);
        }
        let m = Metrics::of(&scores, DECISION);
        let shown = |value: Option<f64>| value.map_or_else(|| "-".into(), |value| format!("{value:.3}"));
        table.row([
            what.to_string(),
            shown(m.accuracy),
            shown(m.accuracy_ci95),
            shown(m.tb.sensitivity),
            shown(m.tb.specificity),
            shown(m.auc),
        ]);
    }
    report.tables.push(table);
    Ok(())
}

/// Logistic regression on thumbnails, by gradient descent with momentum on standardised pixels.
fn logistic_baseline(images: &Images, test: &Images) -> Vec<Scored> {
    const STEPS: usize = 300;
    const RATE: f64 = 0.05;
    const DECAY: f64 = 1e-3;
    let size = images.cxr.size;
    let features = |images: &Images| -> Vec<Vec<f64>> {
        let thumbnail = |index: usize| {
            let plane = zscore(&resize_plane(&images.plane(index), [size; 2], [THUMBNAIL; 2]));
            plane.into_iter().map(f64::from).collect()
        };
        (0..images.len()).into_par_iter().map(thumbnail).collect()
    };
    let rows = features(images);
    let margin = |w: &[f64], row: &[f64]| w[row.len()] + w.iter().zip(row).map(|(w, x)| w * x).sum::<f64>();
    let mut w = vec![0.0; THUMBNAIL * THUMBNAIL + 1];
    let mut velocity = vec![0.0; w.len()];
    for _ in 0..STEPS {
        let mut gradient: Vec<f64> = w.iter().map(|w| DECAY * w).collect();
        for (index, row) in rows.iter().enumerate() {
            let error =
                (probability(margin(&w, row)) - f64::from(u8::from(images.is_tb(index)))) / rows.len() as f64;
            gradient.iter_mut().zip(row).for_each(|(g, x)| *g += error * x);
            gradient[THUMBNAIL * THUMBNAIL] += error;
        }
        for ((w, v), g) in w.iter_mut().zip(&mut velocity).zip(gradient) {
            *v = 0.9 * *v - RATE * g;
            *w += *v;
        }
    }
    let scored = |(index, row): (usize, Vec<f64>)| Scored {
        image: test.entries[index].name.clone(),
        is_tb: test.is_tb(index),
        p_tb: probability(margin(&w, &row)),
    };
    features(test).into_iter().enumerate().map(scored).collect()
}
