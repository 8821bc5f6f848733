//! The paper's ablation: each setting under all four parametrisations (§5 and appendix).

use clap::ValueEnum;
use kiln_core::{Context, Plot, Result};
use kiln_data::Images;
use serde::Serialize;

use crate::arch::{Arch, ClassifierConfig};
use crate::arms::{Arm, Course, Optimiser, median};
use crate::classify::{ClassifyTask, Control, Sampling};
use crate::convert::{MipConfig, Parametrisation};
use crate::encoding::Encoding;
use crate::hypernet::Nonlinearity;

/// Training has come far enough at this share of the loss of a guess, the logarithm of the number of classes: of ten classes, at
/// 0.8 as in the experiment. (The first loss of a hypernetwork hangs on its draw.)
const TARGET: f64 = 0.35;

/// What is varied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Axis {
    /// What follows the hypernetwork's hidden layers
    Activation,
    /// A batch norm in the network, a layer norm in the hypernetwork, a weight norm of what it makes, or none
    Norm,
    /// Components of a condition, of which only the first means anything
    Dim,
    /// Hidden layers of the hypernetwork
    Arch,
    /// What makes a step of a gradient
    Optim,
    /// How the condition enters, where it does not as it is; a layer norm leaves something only of several components
    Encoding,
}

/// How long, how often and how fast.
#[derive(Debug, Clone, Copy)]
pub struct Grid {
    /// Steps of a run.
    pub steps: usize,
    /// Runs of each cell.
    pub seeds: u64,
    /// Learning rate of Adam.
    pub lr: f64,
}

/// One setting of an axis: its name, and what it changes.
struct Setting {
    axis: Axis,
    name: String,
    change: Box<dyn Fn(&mut Arm)>,
}

impl Axis {
    fn name(self) -> &'static str {
        match self {
            Self::Activation => "activation",
            Self::Norm => "norm",
            Self::Dim => "dim",
            Self::Arch => "arch",
            Self::Optim => "optim",
            Self::Encoding => "encoding",
        }
    }

    fn settings(self) -> Vec<Setting> {
        let setting =
            |name: &str, change: Box<dyn Fn(&mut Arm)>| Setting { axis: self, name: name.into(), change };
        match self {
            Self::Activation => [
                ("relu", Nonlinearity::Relu),
                ("leaky_relu", Nonlinearity::LeakyRelu),
                ("gelu", Nonlinearity::Gelu),
                ("silu", Nonlinearity::Silu),
                ("tanh", Nonlinearity::Tanh),
            ]
            .map(|(name, activation)| {
                setting(name, Box::new(move |arm| arm.mip.hypernet.activation = activation))
            })
            .into(),
            Self::Norm => vec![
                setting("none", Box::new(|_| {})),
                setting("batch", Box::new(|arm| arm.network.batch_norm = true)),
                setting("layer", Box::new(|arm| arm.mip.hypernet.layer_norm = true)),
                setting("weight", Box::new(|arm| arm.mip.weight_norm = true)),
            ],
            Self::Dim => [1, 2, 4, 8, 16]
                .map(|k| setting(&k.to_string(), Box::new(move |arm| arm.mip.hypernet.gamma_dim = k)))
                .into(),
            Self::Arch => [vec![16], vec![16, 128], vec![16, 64, 128], vec![64; 5]]
                .map(|hidden| {
                    let name = hidden.iter().map(usize::to_string).collect::<Vec<_>>().join("-");
                    setting(&name, Box::new(move |arm| arm.mip.hypernet.hidden = hidden.clone()))
                })
                .into(),
            Self::Encoding => [
                ("cos_sin", Encoding::CosSin, 1),
                ("one_minus", Encoding::OneMinus, 1),
                ("layer_norm", Encoding::LayerNorm, 4),
            ]
            .map(|(name, encoding, k)| {
                let change = move |arm: &mut Arm| {
                    arm.mip.hypernet.gamma_dim = k;
                    if arm.mip.hypernet.encoding != Encoding::None {
                        arm.mip.hypernet.encoding = encoding;
                    }
                };
                setting(name, Box::new(change))
            })
            .into(),
            Self::Optim => vec![
                setting("adam", Box::new(|_| {})),
                setting(
                    "sgd",
                    Box::new(|arm| {
                        arm.optimiser = Optimiser::Sgd;
                        arm.lr *= 10.0;
                    }),
                ),
            ],
        }
    }
}

/// The runs of one setting under one parametrisation.
pub struct Line {
    /// What they came to.
    pub summary: Summary,
    /// Smoothed losses of each run.
    curves: Vec<Vec<f64>>,
}

/// A line of `ablation.csv`.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// What was varied.
    pub axis: &'static str,
    /// To what.
    pub setting: String,
    /// Under which parametrisation.
    pub arm: String,
    /// Median over seeds of the steps until the smoothed loss is 0.35 of that of a guess; a run that never is counts with all
    /// its steps.
    pub steps: f64,
    /// The fewest of any seed.
    pub steps_least: f64,
    /// And the most.
    pub steps_most: f64,
    /// The default's steps over these.
    pub convergence_ratio: f64,
    /// Median of the last smoothed loss.
    pub final_loss: f64,
    /// Runs in which a loss was infinite, no number, or more than ten times the first.
    pub diverged: usize,
}

/// Runs the grid, axis by axis.
///
/// # Errors
/// When a setting does not suit the images.
pub fn run(axes: &[Axis], grid: &Grid, images: &Images, cx: &Context) -> Result<Vec<Line>> {
    let settings: Vec<Setting> = axes.iter().flat_map(|axis| axis.settings()).collect();
    let arms =
        [Parametrisation::Default, Parametrisation::Encode, Parametrisation::Residual, Parametrisation::Mip];
    let bar = cx.progress(settings.len() as u64 * arms.len() as u64 * grid.seeds, "training");
    let mut lines = Vec::new();
    for setting in &settings {
        let mut default_steps = f64::NAN;
        for parametrisation in arms {
            let courses = (0..grid.seeds)
                .map(|seed| {
                    let course = train(setting, parametrisation, grid, images, seed, cx);
                    bar.inc(1);
                    course
                })
                .collect::<Result<Vec<_>>>()?;
            let target = TARGET * (images.classes.len() as f64).ln();
            let line = summarise(setting, parametrisation, &courses, (grid, target), &mut default_steps);
            lines.push(line);
        }
    }
    Ok(lines)
}

fn train(
    setting: &Setting,
    parametrisation: Parametrisation,
    grid: &Grid,
    images: &Images,
    seed: u64,
    cx: &Context,
) -> Result<Course> {
    let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
    let mut arm = Arm {
        network: ClassifierConfig {
            arch: Arch::Mlp(vec![32, 32]),
            image: images.shape,
            classes: images.classes.len(),
            activation: Nonlinearity::LeakyRelu,
            batch_norm: false,
        },
        mip: MipConfig::new(1).with_parametrisation(parametrisation),
        optimiser: Optimiser::Adam,
        lr: grid.lr,
        steps: grid.steps,
    };
    (setting.change)(&mut arm);
    let mut task = ClassifyTask {
        train: images,
        valid: images,
        control: Control::Rotation,
        sampling: Sampling::Uniform,
        gamma_dim: arm.mip.hypernet.gamma_dim,
        batch: 64,
        per_sample: false,
        given: None,
        cx,
    };
    arm.train(&mut task, cx)
}

fn summarise(
    setting: &Setting,
    parametrisation: Parametrisation,
    courses: &[Course],
    (grid, target): (&Grid, f64),
    default_steps: &mut f64,
) -> Line {
    let steps = |course: &Course| course.steps_to(target).unwrap_or(grid.steps) as f64;
    let each: Vec<f64> = courses.iter().map(steps).collect();
    let steps = median(&each);
    if parametrisation == Parametrisation::Default {
        *default_steps = steps;
    }
    let curves: Vec<Vec<f64>> = courses.iter().map(Course::smoothed).collect();
    let last: Vec<f64> = curves.iter().filter_map(|curve| curve.last().copied()).collect();
    let arm =
        parametrisation.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string());
    Line {
        summary: Summary {
            axis: setting.axis.name(),
            setting: setting.name.clone(),
            arm,
            steps,
            steps_least: each.iter().copied().fold(f64::INFINITY, f64::min),
            steps_most: each.iter().copied().fold(0.0, f64::max),
            convergence_ratio: *default_steps / steps,
            final_loss: median(&last),
            diverged: courses.iter().filter(|course| course.diverged).count(),
        },
        curves,
    }
}

/// For every setting the loss of each arm: the median over seeds, within the range of all.
pub fn plots(lines: &[Line]) -> Vec<Plot> {
    let same =
        |a: &Line, b: &Line| (a.summary.axis, &a.summary.setting) == (b.summary.axis, &b.summary.setting);
    lines
        .chunk_by(same)
        .map(|arms| {
            let Summary { axis, setting, .. } = &arms[0].summary;
            let plot = Plot::lines(format!("{axis} {setting}"), "step", "training loss, nats").log_y();
            arms.iter().fold(plot, |plot, line| {
                let length = line.curves.iter().map(Vec::len).min().unwrap_or(0);
                let at = |step: usize| line.curves.iter().map(|curve| curve[step]).collect::<Vec<_>>();
                let steps = || (0..length).step_by(5);
                let range = |step: usize| {
                    at(step).into_iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), loss| {
                        (least.min(loss), most.max(loss))
                    })
                };
                plot.band(
                    line.summary.arm.clone(),
                    steps().map(|step| (step as f64, median(&at(step)))).collect(),
                    steps().map(|step| (step as f64, range(step).0, range(step).1)).collect(),
                )
            })
        })
        .collect()
}
