//! The reference experiment: rotated digits under the four parametrisations.

use std::time::Instant;

use burn::tensor::Tensor;
use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::{ImageOptions, Images, digits, shared_dir};
use kiln_nn::{Outcome, Task, TrainConfig, initialise, train};

use crate::arch::{Arch, Classifier, ClassifierConfig};
use crate::arms::{Arm, Course, Optimiser, follow, median};
use crate::classify::{ClassifyTask, Control, Sampling, labels, predict, scores};
use crate::convert::{MipConfig, MipHyper, Parametrisation};
use crate::hypernet::{Nonlinearity, OutputInit};
use crate::proportionality::{Probe, ProportionalityReport, measure};
use crate::register::RegisterTask;
use crate::scale::{PlainScaleTask, Quality, ScaleTask, Scans, quality, quality_plainly};
use crate::unet::{CLIP, OUTPUT_INIT, UNet, UNetConfig, WEIGHTS};

/// A run is as fast as its smoothed loss comes below this.
const TARGET: f64 = 0.8;
/// Where accuracy is measured.
const CONDITIONS: [f32; 6] = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0];
/// Where proportionality is measured.
const SMALL_AND_LARGE: [f64; 7] = [0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

const ARMS: [Parametrisation; 4] =
    [Parametrisation::Default, Parametrisation::Encode, Parametrisation::Residual, Parametrisation::Mip];

/// Everything that differs between scales.
struct Plan {
    steps: usize,
    /// Seeds of the default and of the whole parametrisation.
    seeds: u64,
    /// Seeds of those between.
    seeds_between: u64,
    learning_rates: &'static [f64],
    /// Learning rates of gradient descent, which is reported without a threshold.
    descent: &'static [f64],
    /// Steps and seeds of that: many seeds, as whether a run diverges hangs on the draw.
    descent_runs: (usize, u64),
    /// Steps and seeds of registration and of segmentation; none where they are left out.
    images: Option<(usize, u64)>,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                steps: 60,
                seeds: 1,
                seeds_between: 1,
                learning_rates: &[1e-3],
                descent: &[1e-2],
                descent_runs: (60, 1),
                images: Some((2, 1)),
            },
            Scale::Quick => {
                Self { steps: 700, seeds: 3, descent: &[], images: None, ..Self::at(Scale::Smoke) }
            }
            Scale::Full => Self {
                steps: 1500,
                seeds: 5,
                seeds_between: 5,
                learning_rates: &[1e-3, 3e-4],
                descent: &[3e-3, 1e-2, 3e-2, 1e-1],
                descent_runs: (500, 20),
                images: Some((600, 3)),
            },
        }
    }
}

/// The embedded digits, those that are trained on by custom or the others.
pub(crate) fn digit_images(part: digits::Digits) -> Images {
    Images {
        shape: [1, 8, 8],
        pixels: part.pixels.to_vec(),
        labels: part.labels.iter().map(|&label| label.into()).collect(),
        classes: (0..10).map(|digit| digit.to_string()).collect(),
        white: 16.0,
    }
}

/// The network of the experiment: 64-32-32-10.
pub(crate) fn network() -> ClassifierConfig {
    ClassifierConfig {
        arch: Arch::Mlp(vec![32, 32]),
        image: [1, 8, 8],
        classes: 10,
        activation: Nonlinearity::LeakyRelu,
        batch_norm: false,
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let (train, test) = (digit_images(digits::train()), digit_images(digits::test()));
    let mut report = Report::new(card, scale, cx.seed);
    report_proportionality(&mut report, &test, cx)?;
    for &lr in plan.learning_rates {
        report_speed(&mut report, &plan, lr, &train, &test, cx)?;
    }
    report_descent(&mut report, &plan, &train, cx)?;
    if let Some((steps, seeds)) = plan.images {
        report_registration(&mut report, (steps, seeds), &train, cx)?;
        report_segmentation(&mut report, (steps, seeds), cx)?;
    }
    report.notes.push(
        "The condition turns the image by 90 γ degrees; one condition a step. Networks that make all of a weight are drawn \
         with fan-in, those that add to weights with fan-out for each tensor. In registration and segmentation biases do not depend on \
         the condition, what is added is drawn by hyperfan-in, and the default has the better of fan-in and hyperfan-in."
            .into(),
    );
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Part 1: how sizes depend on the condition before training.
fn report_proportionality(report: &mut Report, test: &Images, cx: &Context) -> Result<()> {
    let sizes = |parametrisation| untrained_proportionality(parametrisation, test, cx);
    let (default, mip) = (sizes(Parametrisation::Default)?, sizes(Parametrisation::Mip)?);
    report.claims.extend([
        Claim::new(
            "Without the parametrisation, weights are proportional to the condition",
            "exactly, for ReLU and LeakyReLU without biases",
            (default.all_weights.slope - 1.0).abs(),
            "distance of the log-log slope from 1",
            Threshold::AtMost(0.01),
        ),
        Claim::new(
            "Their size and the condition are correlated",
            "1",
            default.all_weights.correlation,
            "Pearson's correlation",
            Threshold::AtLeast(0.999),
        ),
        Claim::new(
            "With it, weights have the same size for every condition",
            "constant",
            mip.all_weights.ratio,
            "largest over smallest, γ from 0.01 to 1",
            Threshold::AtMost(1.2),
        ),
    ]);
    let mut table = Table::new(
        "Log-log slope of sizes over the condition, before training",
        &["quantity", "default", "MIP"],
    );
    let lines = |found: &ProportionalityReport| {
        let all = [&found.all_weights].into_iter().chain(&found.activations).chain([&found.gradient]);
        all.map(|d| (d.name.clone(), d.slope)).collect::<Vec<_>>()
    };
    for ((name, before), (_, after)) in lines(&default).into_iter().zip(lines(&mip)) {
        table.row([name, format!("{before:.3}"), format!("{after:.3}")]);
    }
    report.tables.push(table);
    let line = |found: &ProportionalityReport| {
        let last = found.gradient.sizes.last().copied().unwrap_or(1.0);
        found.gammas.iter().zip(&found.gradient.sizes).map(|(&g, size)| (g, size / last)).collect()
    };
    report.plots.push(
        Plot::lines("Gradient over the condition, before training", "γ", "norm, relative to γ = 1")
            .log_x()
            .log_y()
            .series("default", line(&default))
            .series("MIP", line(&mip)),
    );
    Ok(())
}

fn untrained_proportionality(
    parametrisation: Parametrisation,
    test: &Images,
    cx: &Context,
) -> Result<ProportionalityReport> {
    let mut rng = cx.rng("proportionality", 0);
    let net = initialise(&cx.device, &mut rng, |device| network().init(device));
    let model = MipConfig::new(1).with_parametrisation(parametrisation).draw(net, &mut rng, &cx.device)?;
    measure(&model, 1, &SMALL_AND_LARGE, &cx.device, |net| probe(net, test, cx))
}

/// Runs a classifier on images as they are.
pub(crate) fn probe(net: &Classifier, images: &Images, cx: &Context) -> Probe {
    let (logits, activations) = net.traced(Control::Smoothing.input(images, 0.0, &cx.device));
    let loss: Tensor<1> =
        kiln_ops::cross_entropy(logits, labels(images, &cx.device), &Default::default()).mean();
    Probe { activations, loss }
}

/// The runs of one arm, one a seed.
fn train_arm(
    parametrisation: Parametrisation,
    (optimiser, lr): (Optimiser, f64),
    (steps, seeds): (usize, u64),
    train: &Images,
    cx: &Context,
) -> Result<Vec<Course>> {
    let arm = Arm {
        network: network(),
        mip: MipConfig::new(1).with_parametrisation(parametrisation),
        optimiser,
        lr,
        steps,
    };
    (0..seeds)
        .map(|seed| {
            let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
            let mut task = ClassifyTask {
                train,
                valid: train,
                control: Control::Rotation,
                sampling: Sampling::Uniform,
                gamma_dim: 1,
                batch: 64,
                per_sample: false,
                given: None,
                cx,
            };
            arm.train(&mut task, cx)
        })
        .collect()
}

fn name(parametrisation: Parametrisation) -> &'static str {
    match parametrisation {
        Parametrisation::Default => "default",
        Parametrisation::Encode => "encoding only",
        Parametrisation::Residual => "additive only",
        Parametrisation::Mip => "MIP",
    }
}

/// Part 2: how fast each arm learns with Adam, and how well.
fn report_speed(
    report: &mut Report,
    plan: &Plan,
    lr: f64,
    train: &Images,
    test: &Images,
    cx: &Context,
) -> Result<()> {
    let mut table = Table::new(
        format!("Rotated digits, Adam, learning rate {lr}: medians over seeds"),
        &[
            "arm",
            "seeds",
            "steps to a loss of 0.8",
            "test accuracy",
            "variation of the gradient's norm",
            "diverged",
        ],
    );
    let mut plot =
        Plot::lines(format!("Training loss, learning rate {lr}"), "step", "nats, mean of 50 steps").log_y();
    let mut accuracy_plot = Plot::lines(format!("Test accuracy, learning rate {lr}"), "γ", "accuracy");
    let (mut speeds, mut accuracies, mut mip_diverged) = (Vec::new(), Vec::new(), 0);
    for parametrisation in ARMS {
        let between = matches!(parametrisation, Parametrisation::Encode | Parametrisation::Residual);
        let seeds = if between { plan.seeds_between } else { plan.seeds };
        let courses = train_arm(parametrisation, (Optimiser::Adam, lr), (plan.steps, seeds), train, cx)?;
        // A run that never comes so far counts as one that came there with its last step: a lower bound.
        let steps = |course: &Course| course.steps_to(TARGET).unwrap_or(plan.steps) as f64;
        let steps = median(&courses.iter().map(steps).collect::<Vec<_>>());
        let curves =
            courses.iter().map(|course| accuracy_curve(course, test, cx)).collect::<Result<Vec<_>>>()?;
        let mean = |curve: &Vec<f64>| curve.iter().sum::<f64>() / curve.len() as f64;
        let accuracy = median(&curves.iter().map(mean).collect::<Vec<_>>());
        let variation = median(&courses.iter().map(Course::gradient_variation).collect::<Vec<_>>());
        let diverged = courses.iter().filter(|course| course.diverged).count();
        table.row([
            name(parametrisation).to_string(),
            seeds.to_string(),
            format!("{steps:.0}"),
            format!("{accuracy:.3}"),
            format!("{variation:.2}"),
            diverged.to_string(),
        ]);
        let smoothed = courses[0].smoothed();
        plot = plot.series(
            name(parametrisation),
            smoothed.iter().enumerate().step_by(5).map(|(step, &loss)| (step as f64, loss)).collect(),
        );
        accuracy_plot = accuracy_plot.series(
            name(parametrisation),
            CONDITIONS.iter().zip(&curves[0]).map(|(&gamma, &accuracy)| (gamma.into(), accuracy)).collect(),
        );
        if parametrisation == Parametrisation::Mip {
            mip_diverged = diverged;
        }
        speeds.push(steps);
        accuracies.push(accuracy);
    }
    let last = ARMS.len() - 1;
    report.claims.extend([
        Claim::new(
            format!("The parametrisation learns faster (learning rate {lr})"),
            "considerably fewer steps",
            speeds[0] / speeds[last],
            "median steps of the default over those of MIP",
            Threshold::AtLeast(1.3),
        ),
        Claim::new(
            format!("And no worse (learning rate {lr})"),
            "equal or better",
            accuracies[last] - accuracies[0],
            "test accuracy above the default's",
            Threshold::AtLeast(-0.03),
        ),
        Claim::new(
            format!("No run of it diverges (learning rate {lr})"),
            "stable",
            mip_diverged as f64,
            "runs",
            Threshold::AtMost(0.0),
        ),
    ]);
    report.tables.push(table);
    report.plots.extend([plot, accuracy_plot]);
    Ok(())
}

/// Accuracy on the test images at every one of the conditions.
fn accuracy_curve(course: &Course, test: &Images, cx: &Context) -> Result<Vec<f64>> {
    let at = |&gamma: &f32| {
        let probabilities = predict(&course.model, Control::Rotation, test, &[gamma], cx)?;
        Ok(scores(&probabilities, &test.labels).accuracy)
    };
    CONDITIONS.iter().map(at).collect()
}

/// Part 3: gradient descent with momentum, where the paper is silent about this task.
fn report_descent(report: &mut Report, plan: &Plan, train: &Images, cx: &Context) -> Result<()> {
    if plan.descent.is_empty() {
        return Ok(());
    }
    let runs = plan.descent_runs;
    let mut table = Table::new(
        format!("Gradient descent with momentum, {} steps, {} seeds (no threshold)", runs.0, runs.1),
        &[
            "learning rate",
            "arm",
            "runs to a loss of 0.8",
            "their median steps",
            "diverged",
            "never came back",
        ],
    );
    for &lr in plan.descent {
        for parametrisation in ARMS {
            let courses = train_arm(parametrisation, (Optimiser::Sgd, lr), runs, train, cx)?;
            let steps: Vec<f64> = courses
                .iter()
                .filter_map(|course| course.steps_to(TARGET))
                .map(|steps| steps as f64)
                .collect();
            let count =
                |of: fn(&Course) -> bool| courses.iter().filter(|course| of(course)).count().to_string();
            table.row([
                lr.to_string(),
                name(parametrisation).into(),
                steps.len().to_string(),
                if steps.is_empty() { "-".into() } else { format!("{:.0}", median(&steps)) },
                count(|course| course.diverged),
                count(|course| course.losses.iter().any(|loss| !loss.is_finite())),
            ]);
        }
    }
    report.tables.push(table);
    Ok(())
}

/// Learning rate of hypernetworks for U-Nets, the paper's. A step of Adam moves a weight that is made of 128 features by 30
/// to 100 times as much as one that is learned itself; at 1e-3 that is half of what these weights are.
const UNET_LR: f64 = 3e-4;
/// Learning rate of U-Nets without a hypernetwork, the best for them of 1e-3, 1e-2 and 5e-2.
const PLAIN_LR: f64 = 1e-2;

/// Trains a U-Net, whose weights but not biases depend on the condition. The default is drawn with fan-in and with
/// hyperfan-in, and the run with the lower last loss counts; the parametrisation has one draw.
fn train_unet<T: Task<MipHyper<UNet>>>(
    config: UNetConfig,
    parametrisation: Parametrisation,
    mut task: impl FnMut() -> T,
    steps: usize,
    cx: &Context,
) -> Result<Course<UNet>> {
    let mut train = |output_init: OutputInit| {
        let mut rng = cx.rng("arm", 0);
        let net = initialise(&cx.device, &mut rng, |device| config.init(device));
        let mut mip = MipConfig::new(1).with_select(&[WEIGHTS]).with_parametrisation(parametrisation);
        mip.hypernet.output_init = output_init;
        let model = mip.draw(net, &mut rng, &cx.device)?;
        follow(model, &mut task(), (Optimiser::Adam, UNET_LR, CLIP), steps, cx)
    };
    let first = train(OUTPUT_INIT)?;
    if parametrisation != Parametrisation::Default {
        return Ok(first);
    }
    let second = train(OutputInit::FanIn)?;
    Ok(if last_loss(&second) < last_loss(&first) { second } else { first })
}

/// The last smoothed loss of a run; infinite for one that ended in no number.
fn last_loss(course: &Course<UNet>) -> f64 {
    let last = course.smoothed().last().copied();
    last.filter(|loss| loss.is_finite()).unwrap_or(f64::INFINITY)
}

/// Images to register: the digits, and Fashion-MNIST where the shared data are, with the pairs of a step.
fn registered(train: &Images) -> Result<Vec<(&'static str, Images, usize)>> {
    const FASHION: usize = 2000;
    let mut sets = vec![("digits", train.clone(), 64)];
    let fashion = shared_dir().map(|dir| dir.join("data/fashion-mnist/train16k-images-idx3-ubyte.gz"));
    if let Some(path) = fashion.filter(|path| path.exists()) {
        let images = Images::read(&path, &ImageOptions::default())?;
        let some: Vec<usize> = (0..images.len().min(FASHION)).collect();
        sets.push(("Fashion-MNIST", images.select(&some), 8));
    }
    Ok(sets)
}

/// Part 4: how fast registration is learned.
fn report_registration(
    report: &mut Report,
    (steps, seeds): (usize, u64),
    train: &Images,
    cx: &Context,
) -> Result<()> {
    let mut table = Table::new(
        format!("Registration, Adam, learning rate {UNET_LR}, {steps} steps: medians over seeds"),
        &[
            "images",
            "seeds",
            "last loss, default",
            "last loss, MIP",
            "steps of MIP to the default's last loss",
        ],
    );
    for (name, images, batch) in registered(train)? {
        // The larger images take long.
        let seeds = if name == "digits" { seeds } else { 1 };
        let mut figures = [Vec::new(), Vec::new(), Vec::new()];
        for seed in 0..seeds {
            let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
            let task =
                || RegisterTask { train: &images, valid: &images, sampling: Sampling::Uniform, batch, cx };
            let course = |parametrisation| {
                train_unet(UNetConfig { inputs: 2, outputs: 2 }, parametrisation, task, steps, cx)
            };
            let (default, mip) = (course(Parametrisation::Default)?, course(Parametrisation::Mip)?);
            let reached = mip.steps_to(last_loss(&default)).unwrap_or(steps);
            let found = [last_loss(&default), last_loss(&mip), reached as f64];
            for (values, value) in figures.iter_mut().zip(found) {
                values.push(value);
            }
        }
        let [default, mip, reached] = figures.map(|values| median(&values));
        table.row([
            name.to_string(),
            seeds.to_string(),
            format!("{default:.4}"),
            format!("{mip:.4}"),
            format!("{reached:.0}"),
        ]);
        report.claims.push(Claim::new(
            format!("The parametrisation learns registration faster ({name})"),
            "considerably fewer steps",
            steps as f64 / reached,
            "steps of the default over those of MIP to the same loss",
            Threshold::AtLeast(1.3),
        ));
    }
    report.tables.push(table);
    Ok(())
}

/// Part 5: segmentation at every scale, and what it costs.
fn report_segmentation(report: &mut Report, (steps, seeds): (usize, u64), cx: &Context) -> Result<()> {
    const BATCH: usize = 16;
    const LINES: [&str; 4] = ["default", "MIP", "one plain network", "a plain network for each scale"];
    let mut curves: [Vec<Vec<Quality>>; 4] = Default::default();
    for seed in 0..seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        let train = Scans::discs(400, &mut cx.rng("discs", 0));
        let test = Scans::discs(100, &mut cx.rng("discs", 1));
        let task =
            || ScaleTask { train: &train, valid: &train, sampling: Sampling::Uniform, batch: BATCH, cx };
        for (curves, parametrisation) in
            curves.iter_mut().zip([Parametrisation::Default, Parametrisation::Mip])
        {
            let course = train_unet(UNetConfig { inputs: 1, outputs: 1 }, parametrisation, task, steps, cx)?;
            let at = |&gamma: &f32| quality(&course.model, &test, gamma, cx);
            curves.push(CONDITIONS.iter().map(at).collect::<Result<_>>()?);
        }
        let one = train_plainly(PlainScaleTask { images: task(), factor: None }, steps, cx)?;
        curves[2].push(CONDITIONS.iter().map(|&gamma| quality_plainly(&one, &test, gamma, cx)).collect());
        let own = |&gamma: &f32| {
            let net = train_plainly(PlainScaleTask { images: task(), factor: Some(gamma) }, steps, cx)?;
            Ok(quality_plainly(&net, &test, gamma, cx))
        };
        curves[3].push(CONDITIONS.iter().map(own).collect::<Result<_>>()?);
    }
    let dice = |curves: &[Vec<Quality>], at: usize| {
        median(&curves.iter().map(|curve| curve[at].dice).collect::<Vec<_>>())
    };
    let heads = ["γ", "million operations an image"].into_iter().chain(LINES).collect::<Vec<_>>();
    let mut table =
        Table::new(format!("Segmentation of discs, {steps} steps: median Dice over {seeds} seeds"), &heads);
    let mut plot = Plot::lines("Accuracy over cost", "million operations an image", "Dice").log_x();
    let millions = |at: usize| curves[0][0][at].operations as f64 / 1e6;
    for (at, gamma) in CONDITIONS.iter().enumerate() {
        let cells = curves.iter().map(|curves| format!("{:.3}", dice(curves, at)));
        table.row([gamma.to_string(), format!("{:.2}", millions(at))].into_iter().chain(cells));
    }
    for (name, curves) in LINES.into_iter().zip(&curves) {
        plot = plot.series(name, (0..CONDITIONS.len()).map(|at| (millions(at), dice(curves, at))).collect());
    }
    let mean = |curves: &[Vec<Quality>]| {
        (0..CONDITIONS.len()).map(|at| dice(curves, at)).sum::<f64>() / CONDITIONS.len() as f64
    };
    report.claims.extend([
        Claim::new(
            "One hypernetwork segments at every scale",
            "accurately",
            mean(&curves[1]),
            "mean Dice over scales",
            Threshold::AtLeast(0.5),
        ),
        Claim::new(
            "And as well as networks for one scale each",
            "equal",
            mean(&curves[1]) - mean(&curves[3]),
            "mean Dice above theirs",
            Threshold::AtLeast(-0.05),
        ),
    ]);
    report.tables.push(table);
    report.plots.push(plot);
    report.notes.push(format!(
        "Registration and segmentation: hypernetworks with Adam at {UNET_LR}, plain networks with Adam at {PLAIN_LR}, \
         gradients clipped at a norm of {CLIP}, the same images and factors in every step."
    ));
    Ok(())
}

/// Trains a U-Net without a hypernetwork.
fn train_plainly(mut task: PlainScaleTask, steps: usize, cx: &Context) -> Result<UNet> {
    let config = UNetConfig { inputs: 1, outputs: 1 };
    let net = initialise(&cx.device, &mut cx.rng("arm", 0), |device| config.init(device));
    let training = TrainConfig {
        steps,
        lr: PLAIN_LR,
        warmup: 0,
        min_lr_ratio: 1.0,
        weight_decay: 0.0,
        clip_norm: CLIP,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    };
    let trained = train(net, &mut task, &training, None, false, cx)?;
    match trained.outcome {
        Outcome::Interrupted => Err(Error::interrupted("stopped while a network was trained")),
        _ => Ok(trained.last),
    }
}
