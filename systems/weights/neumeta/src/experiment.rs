//! The reference experiment: one family against networks trained for each width and against pruning.

use std::time::Instant;

use burn::module::Module;
use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::{ImageOptions, Images, digits, shared_dir};
use kiln_nn::{Outcome, TrainConfig, train};

use crate::arch::{Arch, NetConfig, Size};
use crate::coords::NoiseOn;
use crate::data::{Samples, halved, scenes};
use crate::family::{BaseTerm, Family, FamilyConfig, KernelCrop, reconstruction};
use crate::inr::{Inr, InrConfig};
use crate::network::{Plain, Trainable};
use crate::objective::{Goal, Run};
use crate::prune::{Importance, prune};
use crate::shp::ShpSolver;
use crate::smooth::{CliquePermuter, Order, SmoothReport};
use crate::training::{FamilyTask, Objective, Recipe, WarmTask};

/// Width of the full networks.
const FULL: usize = 16;
/// Widths that are never trained.
const UNSEEN: [usize; 3] = [5, 9, 13];
/// A canvas on which things are to be found.
const CANVAS: usize = 32;

/// Everything that differs between scales.
struct Plan {
    images: usize,
    test: usize,
    goals: &'static [Goal],
    /// Steps of a plain network.
    pretrain: usize,
    /// Steps after pruning, in the line of pruned networks that are tuned.
    tune: usize,
    /// Steps of the warm start of a function without a base.
    warm: usize,
    /// Steps of a family.
    joint: usize,
    /// Steps of a family without a base; 0 leaves it out.
    joint_alone: usize,
    hidden: usize,
    frequencies: usize,
    draws: usize,
    /// Whether each part of the method is taken away in turn, and unseen widths are judged.
    ablations: bool,
    /// Widths at which networks are trained on their own.
    own: &'static [usize],
}

impl Plan {
    fn at(scale: Scale) -> Self {
        let quick = Self {
            images: 4000,
            test: 2000,
            goals: &[Goal::Classify],
            pretrain: 700,
            tune: 40,
            warm: 300,
            joint: 300,
            joint_alone: 150,
            hidden: 64,
            frequencies: 4,
            draws: 8,
            ablations: false,
            own: &[8, 4],
        };
        match scale {
            Scale::Smoke => Self {
                images: 200,
                test: 100,
                pretrain: 16,
                tune: 2,
                warm: 4,
                joint: 4,
                joint_alone: 4,
                draws: 2,
                own: &[8],
                ..quick
            },
            Scale::Quick => quick,
            Scale::Full => Self {
                images: 16_000,
                test: 4000,
                goals: &[Goal::Classify, Goal::Segment, Goal::Generate],
                pretrain: 1500,
                tune: 200,
                warm: 1000,
                joint: 3000,
                joint_alone: 3000,
                draws: 16,
                ablations: true,
                own: &[12, 8, 4],
                ..quick
            },
        }
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    let (things, source) = things(&plan, cx)?;
    for &goal in plan.goals {
        let study = Study::prepare(goal, &plan, &things, cx)?;
        study.report(&mut report)?;
    }
    report.notes.push(format!(
        "{source}; {FULL} channels in the full network's first stage. With a base, the function is added to the \
         ordered weights of the full network, averaged over the same relative place; without, it writes all of a weight, as \
         published. \
         The paper trains for about 90 000 steps."
    ));
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Images to train on and to test with, and what they are.
fn things(plan: &Plan, cx: &Context) -> Result<([Images; 2], String)> {
    let embedded = |part: digits::Digits| Images {
        shape: [1, 8, 8],
        pixels: part.pixels.to_vec(),
        labels: part.labels.iter().map(|&label| label.into()).collect(),
        classes: (0..10).map(|digit| digit.to_string()).collect(),
        white: 16.0,
    };
    let folder = shared_dir().map(|shared| shared.join("data/fashion-mnist"));
    let Some(folder) = folder.filter(|folder| folder.join("t10k-images-idx3-ubyte.gz").exists()) else {
        cx.note("no shared data: the experiment uses the digits that come with Kiln");
        return Ok(([embedded(digits::train()), embedded(digits::test())], "Digits of 8 x 8 pixels".into()));
    };
    let read = |name: &str, count: usize| -> Result<Images> {
        let images = Images::read(&folder.join(name), &ImageOptions::default())?;
        Ok(halved(&images.select(&(0..count.min(images.len())).collect::<Vec<_>>())))
    };
    let train = read("train16k-images-idx3-ubyte.gz", plan.images)?;
    let test = read("t10k-images-idx3-ubyte.gz", plan.test)?;
    let source =
        format!("Fashion-MNIST, {} images of 14 x 14 pixels, {} for the test", train.len(), test.len());
    Ok(([train, test], source))
}

/// A goal with its data and its full network.
struct Study<'a> {
    plan: &'a Plan,
    cx: &'a Context,
    net: NetConfig,
    train: Samples,
    test: Samples,
    recipe: Recipe,
    full: Plain,
    ordered: Plain,
    smooth: SmoothReport,
}

/// How a family differs from the method as a whole.
#[derive(Clone, Copy)]
struct Variant {
    base: BaseTerm,
    noise: f64,
    order: Option<Order>,
    warm: usize,
    joint: usize,
}

impl<'a> Study<'a> {
    fn prepare(goal: Goal, plan: &'a Plan, things: &[Images; 2], cx: &'a Context) -> Result<Self> {
        let [train, test] = things;
        let samples = |images: &Images, stream: &str| match goal {
            Goal::Segment => scenes(images, CANVAS, images.len() / 4, &mut cx.rng(stream, 0)),
            _ => Samples { images: images.clone(), masks: Vec::new() },
        };
        let (train, test) = (samples(train, "train scenes"), samples(test, "test scenes"));
        let (arch, classes) = match goal {
            Goal::Classify => ("small", things[0].classes.len()),
            Goal::Segment => ("unet", things[0].classes.len() + 1),
            Goal::Generate => ("vae", 0),
        };
        let arch: Arch = arch.parse().map_err(Error::usage)?;
        let net = NetConfig { goal, arch, image: train.images.shape, classes };
        // A canvas has five times the pixels of a picture.
        let steps = if goal == Goal::Segment { plan.pretrain / 4 } else { plan.pretrain };
        let recipe = Recipe { steps, lr: 5e-3, batch: 64 };
        let full = recipe.train(&net, Size::new(FULL), (&train, &few(&test)), cx)?;
        let (ordered, smooth) = CliquePermuter::default().permute(&full, cx)?;
        Ok(Self { plan, cx, net, train, test, recipe, full, ordered, smooth })
    }

    fn score(&self, plain: &Plain) -> Result<f64> {
        let built = plain.config.build(plain.size)?;
        let parameters = plain.parameters(&self.cx.device);
        let run = Run { goal: self.net.goal, built: &built, parameters: &parameters, norms: &[] };
        run.score(&self.test, self.cx)
    }

    /// How much better than another a score is, in points (of a hundred) or in hundredths of a squared error.
    fn advantage(&self, score: f64, other: f64) -> f64 {
        let sign = if self.net.goal.more_is_better() { 1.0 } else { -1.0 };
        100.0 * sign * (score - other)
    }

    fn whole(&self) -> Variant {
        let plan = self.plan;
        let share = if self.net.goal == Goal::Segment { 4 } else { 1 };
        Variant {
            base: BaseTerm::Interp,
            noise: 1.0,
            order: Some(Order::Shortest),
            warm: 0,
            joint: plan.joint / share,
        }
    }

    /// Trains a family.
    fn family(&self, variant: Variant) -> Result<(Family, Inr)> {
        let (plan, cx) = (self.plan, self.cx);
        let base = match variant.order {
            None => self.full.clone(),
            Some(Order::Shortest) => self.ordered.clone(),
            Some(order) => CliquePermuter { solver: ShpSolver::default(), order }.permute(&self.full, cx)?.0,
        };
        let config = FamilyConfig {
            net: self.net.clone(),
            full: FULL,
            widths: (4..=FULL).filter(|width| !UNSEEN.contains(width)).collect(),
            depths: Vec::new(),
            kernels: Vec::new(),
            kernel_crop: KernelCrop::Flat,
            inr: InrConfig {
                hidden: plan.hidden,
                frequencies: plan.frequencies,
                ..Family::inr_config(&self.net, FULL)?
            },
            base: variant.base,
            output_scale: true,
            noise: variant.noise,
            noise_on: NoiseOn::Outputs,
        };
        let family = Family::new(config, base)?;
        let mut inr = family.draw(&cx.device, &mut cx.rng("inr", 0));
        if variant.warm > 0 {
            let config = steps(variant.warm, 2e-3);
            inr = ended(train(inr, &mut WarmTask { family: &family, cx }, &config, None, false, cx)?)?;
            // The average begins with what was learned.
            inr.update_average(0.0);
            inr = inr.valid();
        }
        let objective = Objective::default();
        let valid = few(&self.test);
        let mut task = FamilyTask {
            family: &family,
            objective: &objective,
            steps: variant.joint,
            train: &self.train,
            valid: &valid,
            cx,
        };
        let lr = if variant.base == BaseTerm::Interp { 1e-3 } else { 3e-4 };
        let inr = ended(train(inr, &mut task, &steps(variant.joint, lr), None, false, cx)?)?;
        Ok((family, inr.averaged()?))
    }

    fn sampled(&self, family: &Family, inr: &Inr, widths: &[usize]) -> Result<Vec<f64>> {
        let of =
            |&width: &usize| self.score(&family.sample(inr, Size::new(width), self.plan.draws, self.cx)?);
        widths.iter().map(of).collect()
    }

    fn report(&self, report: &mut Report) -> Result<()> {
        let widths = [FULL, 3 * FULL / 4, FULL / 2, FULL / 4];
        let goal = self.net.goal;
        let full = self.score(&self.full)?;
        self.report_smoothness(report);

        let (family, inr) = self.family(self.whole())?;
        let ours = self.sampled(&family, &inr, &widths)?;
        let mut lines: Vec<(String, Vec<Option<f64>>)> =
            vec![("NeuMeta on a base".into(), ours.iter().copied().map(Some).collect())];
        if self.plan.joint_alone > 0 {
            let whole = self.whole();
            let joint = self.plan.joint_alone * whole.joint / self.plan.joint;
            let (family, inr) =
                self.family(Variant { base: BaseTerm::None, warm: self.plan.warm, joint, ..whole })?;
            let found = self.sampled(&family, &inr, &widths)?;
            lines.push(("NeuMeta as published".into(), found.into_iter().map(Some).collect()));
        }
        let untouched =
            self.sampled(&family, &family.draw(&self.cx.device, &mut self.cx.rng("inr", 0)), &widths)?;
        lines.push(("the base alone, not trained".into(), untouched.into_iter().map(Some).collect()));
        let own = |&width: &usize| -> Result<Option<f64>> {
            match width {
                FULL => Ok(Some(full)),
                _ if self.plan.own.contains(&width) => {
                    let valid = few(&self.test);
                    let plain =
                        self.recipe.train(&self.net, Size::new(width), (&self.train, &valid), self.cx)?;
                    Ok(Some(self.score(&plain)?))
                }
                _ => Ok(None),
            }
        };
        let own: Vec<Option<f64>> = widths.iter().map(own).collect::<Result<_>>()?;
        lines.push(("trained for its width".into(), own.clone()));
        let mut pruned = Vec::new();
        for importance in Importance::ALL {
            let (mut plain, mut tuned) = (Vec::new(), Vec::new());
            for &width in &widths {
                let small = prune(&self.full, width, importance, &self.train, self.cx)?;
                plain.push(self.score(&small)?);
                let recipe = Recipe { steps: self.plan.tune, lr: 1e-3, ..self.recipe };
                let model = Trainable::from_plain(&small, &self.cx.device);
                let valid = few(&self.test);
                let small = recipe.continue_from(
                    model,
                    &self.net,
                    Size::new(width),
                    (&self.train, &valid),
                    self.cx,
                )?;
                tuned.push(Some(self.score(&small)?));
            }
            let name = importance.name();
            lines.push((format!("pruned by {name}"), plain.iter().copied().map(Some).collect()));
            lines.push((format!("pruned by {name}, {} steps of tuning", self.plan.tune), tuned));
            pruned.push(plain);
        }
        self.report_lines(report, &widths, &lines);
        self.report_compression(report, full, &ours, &own, &pruned[0]);
        if self.plan.ablations && goal == Goal::Classify {
            self.report_unseen(report, &family, &inr)?;
        }
        Ok(())
    }

    fn report_smoothness(&self, report: &mut Report) {
        let (smooth, name) = (&self.smooth, self.net.arch.to_string());
        report.claims.extend([
            Claim::new(
                format!("Ordering channels leaves the outputs as they are ({name})"),
                "the function is the same",
                smooth.output_change,
                "largest change over the largest output",
                Threshold::AtMost(1e-5),
            ),
            Claim::new(
                format!("And makes the weights smoother ({name})"),
                "lower total variation",
                100.0 * (1.0 - smooth.variation_after / smooth.variation_before),
                "% less total variation",
                Threshold::AtLeast(10.0),
            ),
        ]);
        let mut table = Table::new(
            format!("Length of the path through the channels ({name})"),
            &["first tensor", "channels", "as trained", "ordered"],
        );
        for clique in &smooth.cliques {
            table.row([
                clique.name.clone(),
                clique.channels.to_string(),
                format!("{:.1}", clique.before),
                format!("{:.1}", clique.after),
            ]);
        }
        report.tables.push(table);
    }

    fn report_lines(&self, report: &mut Report, widths: &[usize], lines: &[(String, Vec<Option<f64>>)]) {
        let heads: Vec<String> = widths
            .iter()
            .map(|width| format!("width {width} ({} % less)", 100 - 100 * width / FULL))
            .collect();
        let columns: Vec<&str> = std::iter::once("network").chain(heads.iter().map(String::as_str)).collect();
        let (goal, metric) = (self.net.goal.name(), self.net.goal.metric());
        let mut table = Table::new(format!("To {goal}: {metric} on the test set"), &columns);
        let mut plot = Plot::lines(format!("To {goal}, over the width"), "width", metric);
        for (name, scores) in lines {
            let cells = scores.iter().map(|score| score.map_or("–".into(), |score| format!("{score:.4}")));
            table.row(std::iter::once(name.clone()).chain(cells));
            // Six lines can be told apart.
            if !["tuning", "L2", "random"].iter().any(|word| name.contains(word)) {
                let points = widths.iter().zip(scores).filter_map(|(&w, score)| Some((w as f64, (*score)?)));
                plot = plot.series(name.clone(), points.collect());
            }
        }
        report.tables.push(table);
        report.plots.push(plot);
    }

    fn report_compression(
        &self,
        report: &mut Report,
        full: f64,
        ours: &[f64],
        own: &[Option<f64>],
        pruned: &[f64],
    ) {
        let name = self.net.goal.name();
        let unit = match self.net.goal {
            Goal::Generate => "hundredths of a squared error",
            _ => "points",
        };
        let quarter = self.plan.ablations;
        report.claims.push(Claim::new(
            format!("To {name}: the whole network is as good as the trained one"),
            "equal",
            self.advantage(ours[0], full),
            unit,
            Threshold::AtLeast(if unit == "points" { -3.0 } else { -0.3 }),
        ));
        if self.net.goal == Goal::Generate {
            // Points have no meaning for squared errors: a quarter of the width must lose less than pruning does.
            report.claims.push(Claim::new(
                format!("To {name}: at 75 % compression better than L1 pruning"),
                "far better",
                self.advantage(ours[3], pruned[3]),
                unit,
                Threshold::AtLeast(0.0),
            ));
            return;
        }
        let (place, percent, margin) = if quarter { (3, 75, 15.0) } else { (2, 50, 10.0) };
        report.claims.push(Claim::new(
            format!("To {name}: at {percent} % compression better than L1 pruning"),
            "far better",
            self.advantage(ours[place], pruned[place]),
            unit,
            Threshold::AtLeast(margin),
        ));
        if let (true, Some(own)) = (quarter, own[3]) {
            report.claims.push(Claim::new(
                format!("To {name}: at 75 % compression close to a network trained for that width"),
                "as good",
                self.advantage(ours[3], own),
                unit,
                Threshold::AtLeast(-10.0),
            ));
            let gap = -self.advantage(ours[3], full);
            report.notes.push(format!(
                "The paper loses nothing at 75 % compression; here, to {name}, {gap:.1} points: {}.",
                if gap <= 0.0 { "reached" } else { "not reached" }
            ));
        }
    }

    /// Widths that were never trained, and what the parts of the method do for them.
    fn report_unseen(&self, report: &mut Report, family: &Family, inr: &Inr) -> Result<()> {
        let beside: Vec<usize> = UNSEEN.iter().flat_map(|width| [width - 1, width + 1]).collect();
        let mean = |scores: Vec<f64>| scores.iter().sum::<f64>() / scores.len() as f64;
        let unseen = mean(self.sampled(family, inr, &UNSEEN)?);
        let seen = mean(self.sampled(family, inr, &beside)?);
        report.claims.push(Claim::new(
            "Widths that were never trained are as good as their neighbours",
            "no visible gap",
            self.advantage(unseen, seen),
            "points",
            Threshold::AtLeast(-5.0),
        ));
        let mut table = Table::new(
            "Parts of the method",
            &["variant", "whole network", "75 % compression", "unseen widths"],
        );
        let mut row = |name: &str, family: &Family, inr: &Inr| -> Result<f64> {
            let found = self.sampled(family, inr, &[FULL, FULL / 4])?;
            let unseen = mean(self.sampled(family, inr, &UNSEEN)?);
            table.row([
                name.to_string(),
                format!("{:.4}", found[0]),
                format!("{:.4}", found[1]),
                format!("{unseen:.4}"),
            ]);
            Ok(unseen)
        };
        row("all of it", family, inr)?;
        let whole = self.whole();
        let variants = [
            ("without noise", Variant { noise: 0.0, ..whole }),
            ("channels as trained", Variant { order: None, ..whole }),
            ("channels in random order", Variant { order: Some(Order::Random), ..whole }),
        ];
        let mut found = Vec::new();
        for (name, variant) in variants {
            let (family, inr) = self.family(variant)?;
            found.push(row(name, &family, &inr)?);
        }
        report.tables.push(table);
        report.claims.extend([
            Claim::new(
                "Noise on coordinates helps widths that were never trained",
                "better with noise",
                self.advantage(unseen, found[0]),
                "points",
                Threshold::AtLeast(0.0),
            ),
            Claim::new(
                "Weights in order are reconstructed better than in a random one",
                "smoother is easier",
                self.warm_loss(Order::Random)? / self.warm_loss(Order::Shortest)?,
                "loss in random order over that in the shortest",
                Threshold::AtLeast(1.0),
            ),
        ]);
        Ok(())
    }

    /// The reconstruction loss of a function without a base after its warm start, relative to the weights' mean square.
    fn warm_loss(&self, order: Order) -> Result<f64> {
        let (family, inr) = self.family(Variant {
            base: BaseTerm::None,
            noise: 0.0,
            order: Some(order),
            warm: self.plan.warm,
            joint: 1,
        })?;
        let device = &self.cx.device;
        let written = family.sample(&inr, family.full(), 1, self.cx)?.parameters(device);
        Ok(reconstruction(&written, &family.base.tensors, device).into_scalar::<f32>().into())
    }
}

fn steps(steps: usize, lr: f64) -> TrainConfig {
    TrainConfig {
        steps,
        lr,
        warmup: steps / 20,
        min_lr_ratio: 0.05,
        weight_decay: 0.0,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    }
}

fn ended(trained: kiln_nn::Trained<Inr>) -> Result<Inr> {
    match trained.outcome {
        Outcome::Interrupted => Err(Error::interrupted("stopped while a family was trained")),
        _ => Ok(trained.last),
    }
}

/// The first of the samples, for the one validation at the end of a run.
fn few(samples: &Samples) -> Samples {
    samples.select(&(0..samples.len().min(256)).collect::<Vec<_>>())
}
