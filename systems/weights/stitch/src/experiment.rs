//! The reference experiment: three vision transformers stitched to many networks, beside the anchors alone, random
//! stitching layers and, at full scale, networks of widths between.

use std::time::Instant;

use kiln_core::{Card, Claim, Context, MemoryGauge, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::Images;
use kiln_nn::{TrainConfig, train};
use rand::RngExt;

use crate::anchor::Anchor;
use crate::checkpoint::draw_anchor;
use crate::data::{Batches, Scaling, embedded_digits, fashion, first};
use crate::evaluate::{Measure, Rival, Score, evaluate, pareto, plot, predict, scores};
use crate::family::{AnchorConfig, AnchorNet, ResnetConfig, VitConfig};
use crate::snnet::{SnNet, SnNetConfig};
use crate::space::StitchSpace;
use crate::training::{JointTask, Sampling, SingleTask};

/// Width and heads of each anchor.
const ANCHORS: [(usize, usize); 3] = [(16, 2), (32, 2), (64, 4)];
/// Widths between, trained alone at full scale.
const BETWEEN: [(usize, usize); 2] = [(24, 2), (48, 4)];
/// Images that stitching layers are fitted to.
const INIT_IMAGES: usize = 100;
const ANCHOR_LR: f64 = 1e-3;
const JOINT_LR: f64 = 3e-4;

/// Everything that differs between scales.
struct Plan {
    train_images: usize,
    test_images: usize,
    depth: usize,
    anchor_steps: usize,
    joint_steps: usize,
    /// Times that the network is switched.
    switches: usize,
    /// Whether the arms and baselines of the full experiment run.
    full: bool,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                train_images: 200,
                test_images: 100,
                depth: 3,
                anchor_steps: 3,
                joint_steps: 3,
                switches: 20,
                full: false,
            },
            Scale::Quick => Self {
                train_images: 6000,
                test_images: 1500,
                depth: 4,
                anchor_steps: 300,
                joint_steps: 500,
                switches: 1000,
                full: false,
            },
            // Six and eight passes over 16,000 images.
            Scale::Full => Self {
                train_images: 16_000,
                test_images: 10_000,
                depth: 6,
                anchor_steps: 1500,
                joint_steps: 2000,
                switches: 1000,
                full: true,
            },
        }
    }
}

/// The task of an experiment.
struct Task {
    name: &'static str,
    train: Images,
    test: Images,
    scaling: Scaling,
}

impl Task {
    /// Fashion-MNIST where it is at hand, the embedded digits elsewhere.
    fn load(plan: &Plan) -> Result<Self> {
        let (name, (train, test)) = match fashion()? {
            Some(images) => ("Fashion-MNIST", images),
            None => ("the embedded digits of 8 x 8 pixels", embedded_digits()),
        };
        let train = first(&train, plan.train_images);
        Ok(Self { name, scaling: Scaling::of(&train), train, test: first(&test, plan.test_images) })
    }

    /// A vision transformer with sixteen patches.
    fn vit(&self, (width, heads): (usize, usize), depth: usize) -> AnchorConfig {
        let (image, classes) = (self.train.shape, self.train.classes.len());
        AnchorConfig::Vit(VitConfig { image, patch: image[1] / 4, width, depth, heads, classes })
    }

    fn train_single(&self, config: &AnchorConfig, steps: usize, cx: &Context) -> Result<AnchorNet> {
        let mut task = SingleTask::<AnchorNet> {
            batches: Batches::new(&self.train, &self.scaling, 64, cx),
            valid: &self.test,
            scaling: &self.scaling,
            teacher: None,
            cx,
        };
        let net = draw_anchor(config, cx);
        Ok(train(net, &mut task, &training(steps, ANCHOR_LR), None, false, cx)?.last)
    }

    fn train_joint(
        &self,
        net: SnNet<AnchorNet>,
        frozen: bool,
        steps: usize,
        cx: &Context,
    ) -> Result<SnNet<AnchorNet>> {
        let net = if frozen { net.freeze_anchors() } else { net };
        let mut task = JointTask::<AnchorNet> {
            batches: Batches::new(&self.train, &self.scaling, 64, cx),
            valid: &self.test,
            scaling: &self.scaling,
            sampling: Sampling::Uniform,
            frozen,
            teacher: None,
            cx,
        };
        Ok(train(net, &mut task, &training(steps, JOINT_LR), None, false, cx)?.last)
    }

    fn accuracy(&self, net: &AnchorNet, cx: &Context) -> Result<f64> {
        let probabilities = predict(&self.test, &self.scaling, cx, |x| Ok(net.forward(x)))?;
        Ok(scores(&probabilities, &self.test.labels).accuracy)
    }

    fn evaluate(&self, net: &SnNet<AnchorNet>, cx: &Context) -> Result<Vec<Score>> {
        evaluate(net, &self.test, &self.scaling, cx)
    }

    /// Fits stitching layers to the first training images.
    fn fit(&self, net: &mut SnNet<AnchorNet>, cx: &Context) -> Result<()> {
        let chosen: Vec<usize> = (0..self.train.len().min(INIT_IMAGES)).collect();
        net.fit(self.scaling.tensor(&self.train, &chosen, &cx.device), cx).map(|_| ())
    }
}

/// Only the last step is evaluated, so that its weights are the result.
fn training(steps: usize, lr: f64) -> TrainConfig {
    TrainConfig {
        steps,
        lr,
        warmup: 50.min(steps / 2),
        min_lr_ratio: 0.02,
        weight_decay: 0.05,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let task = Task::load(&plan)?;
    let mut report = Report::new(card, scale, cx.seed);
    let configs: Vec<AnchorConfig> = ANCHORS.iter().map(|&size| task.vit(size, plan.depth)).collect();
    let anchors = configs.iter().map(|config| task.train_single(config, plan.anchor_steps, cx));
    let anchors: Vec<AnchorNet> = anchors.collect::<Result<_>>()?;

    let random = SnNetConfig::new(anchors).draw(&mut cx.rng("stitches", 0), &cx.device)?;
    let before_random = task.evaluate(&random, cx)?;
    let mut fitted = random.clone();
    task.fit(&mut fitted, cx)?;
    let before = task.evaluate(&fitted, cx)?;
    let net = task.train_joint(fitted.clone(), false, plan.joint_steps, cx)?;
    let after = task.evaluate(&net, cx)?;

    report_start(&mut report, &before_random, &before, net.space());
    report_between(&mut report, &plan, &before, &after, net.space())?;
    report_no_harm(&mut report, &before, &after);
    report_switching(&mut report, &net, &task, plan.switches, cx)?;
    report_memory(&mut report, net.space());
    let rivals = if plan.full { rivals(&task, &plan, cx)? } else { Vec::new() };
    report.plots.insert(
        0,
        plot("After joint training: accuracy over cost", net.space(), &after, &rivals, Measure::MegaFlops)?,
    );
    report_networks(&mut report, &before_random, &before, &after);
    if plan.full {
        report_arms(&mut report, &task, &plan, [random, fitted], &after, cx)?;
        report_resnet(&mut report, &task, cx)?;
    }
    report.notes.push(format!(
        "Data: {}, {} training and {} test images. Vision transformers of depth {} with 16 patches and widths 16, 32 and 64, \
         {} steps each; then {} steps of all networks together, one drawn at random a step.",
        task.name,
        task.train.len(),
        task.test.len(),
        plan.depth,
        plan.anchor_steps,
        plan.joint_steps
    ));
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

fn points(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count)
}

/// The scores of the networks that join exactly these anchors.
fn between<'a>(
    scores: &'a [Score],
    space: &'a StitchSpace,
    pair: [usize; 2],
) -> impl Iterator<Item = &'a Score> {
    scores.iter().filter(move |score| space.configurations()[score.config].anchors == pair)
}

fn stitches<'a>(scores: &'a [Score], space: &'a StitchSpace) -> impl Iterator<Item = &'a Score> {
    scores.iter().filter(|score| !space.configurations()[score.config].is_anchor())
}

/// Claim A: how good stitches are before any of them is trained.
fn report_start(report: &mut Report, random: &[Score], fitted: &[Score], space: &StitchSpace) {
    let accuracy = |scores: &[Score]| mean(stitches(scores, space).map(|score| score.acc));
    report.claims.push(Claim::new(
        "Before training, least squares put stitches ahead of random layers",
        "least-squares initialisation is what makes stitches learn fast",
        100.0 * (accuracy(fitted) - accuracy(random)),
        "points of mean accuracy",
        Threshold::AtLeast(20.0),
    ));
    let line = |scores: &[Score]| {
        stitches(scores, space).map(|score| (score.flops as f64 / 1e6, 100.0 * score.acc)).collect()
    };
    report.plots.push(
        Plot::points("Stitches before training", "MFLOPs an image", "accuracy, %")
            .series("random layers", line(random))
            .series("least squares", line(fitted)),
    );
}

/// Claim B: stitches lie between their anchors.
fn report_between(
    report: &mut Report,
    plan: &Plan,
    alone: &[Score],
    after: &[Score],
    space: &StitchSpace,
) -> Result<()> {
    let paper = "stitches interpolate between the anchors in cost and accuracy";
    // Behind the anchor `reference` as it was before the joint training.
    let lead = |pair: [usize; 2], reference: usize| {
        100.0 * (mean(between(after, space, pair).map(|score| score.acc)) - alone[reference].acc)
    };
    if !plan.full {
        report.claims.push(Claim::new(
            "Stitches of the middle and the large anchor against the small anchor alone",
            paper,
            lead([1, 2], 0),
            "points of mean accuracy",
            Threshold::AtLeast(-6.0),
        ));
        return Ok(());
    }
    let front: Vec<usize> = pareto(after, Measure::MegaFlops)?.front().iter().map(|point| point.id).collect();
    let on_front = |pair: [usize; 2]| {
        let [low, high] = pair.map(|anchor| &after[anchor]);
        let below_segment = |score: &Score| {
            let share = (score.flops - low.flops) as f64 / (high.flops - low.flops) as f64;
            100.0 * (low.acc + share * (high.acc - low.acc) - score.acc)
        };
        let candidates = between(after, space, pair).filter(|score| front.contains(&score.config));
        candidates.map(below_segment).fold(f64::INFINITY, f64::min)
    };
    for pair in [[0, 1], [1, 2]] {
        let anchors = format!("s{} and s{}", pair[0], pair[1]);
        if on_front(pair).is_infinite() {
            report
                .notes
                .push(format!("No stitch of {anchors} is on the Pareto front, so that none has a distance."));
        }
        report.claims.extend([
            Claim::new(
                format!("Stitches of {anchors} against s{} alone", pair[0]),
                paper,
                lead(pair, pair[0]),
                "points of mean accuracy",
                Threshold::AtLeast(-2.0),
            ),
            Claim::new(
                format!("On the Pareto front, the best stitch of {anchors} against the line between them"),
                paper,
                on_front(pair),
                "points below the line",
                Threshold::AtMost(0.5),
            ),
        ]);
    }
    let column = |value: fn(&Score) -> f64| after.iter().map(value).collect::<Vec<_>>();
    report.claims.push(Claim::new(
        "Accuracy rises with cost",
        paper,
        spearman(&column(|score| score.flops as f64), &column(|score| score.acc)),
        "rank correlation over all networks",
        Threshold::AtLeast(0.6),
    ));
    Ok(())
}

/// Claim C: what the anchors lose by sharing their weights.
fn report_no_harm(report: &mut Report, alone: &[Score], after: &[Score]) {
    let change = |anchor: usize| 100.0 * (after[anchor].acc - alone[anchor].acc);
    report.claims.push(Claim::new(
        "The anchor that loses most by the joint training",
        "anchors keep their accuracy, or lose a little",
        (0..ANCHORS.len()).map(change).fold(f64::INFINITY, f64::min),
        "points of accuracy",
        Threshold::AtLeast(-1.5),
    ));
}

/// Claim D: what it costs to switch from network to network.
fn report_switching(
    report: &mut Report,
    net: &SnNet<AnchorNet>,
    task: &Task,
    switches: usize,
    cx: &Context,
) -> Result<()> {
    let mut net = net.clone();
    let mut rng = cx.rng("switches", 0);
    let ids: Vec<usize> = (0..switches).map(|_| rng.random_range(0..net.space().len())).collect();
    let image = task.scaling.tensor(&task.test, &[0], &cx.device);
    let mut run = |ids: &[usize]| -> Result<[f64; 2]> {
        let [mut switching, mut computing] = [0.0; 2];
        for &id in ids {
            let begun = Instant::now();
            net.set_config(id)?;
            let switched = Instant::now();
            net.forward(image.clone()).into_data();
            switching += (switched - begun).as_secs_f64();
            computing += switched.elapsed().as_secs_f64();
        }
        Ok([switching, computing])
    };
    // Some before, for the memory that the allocator keeps.
    run(&ids[..switches / 10])?;
    let gauge = MemoryGauge::start();
    let (times, growth) = match gauge {
        Some(gauge) => gauge.peak(|| run(&ids)),
        None => (run(&ids), None),
    };
    let [switching, computing] = times?;
    report.claims.push(Claim::new(
        format!("Switching among networks {switches} times, one image each"),
        "networks are switched at run time at no cost",
        100.0 * switching / computing,
        "% of the time of the forward passes",
        Threshold::AtMost(1.0),
    ));
    match growth {
        Some(bytes) => report.claims.push(Claim::new(
            "Memory that this takes beyond the network",
            "none",
            bytes as f64 / (1 << 20) as f64,
            "MiB",
            Threshold::AtMost(1.0),
        )),
        None => report.notes.push("This system does not tell how much memory a process had at most.".into()),
    }
    Ok(())
}

/// One stitchable network against as many separate ones.
fn report_memory(report: &mut Report, space: &StitchSpace) {
    let costs =
        || space.configurations().iter().map(|configuration| (configuration, space.cost(configuration)));
    let anchors: u64 = costs().filter(|(c, _)| c.is_anchor()).map(|(_, cost)| cost.params).sum();
    let separate: u64 = costs().map(|(_, cost)| cost.params).sum();
    let layers: usize = (0..space.layers().len())
        .map(|layer| {
            let [inputs, outputs] = space.layer_widths(layer);
            (inputs + 1) * outputs
        })
        .sum();
    let mut table = Table::new("Parameters", &["what", "numbers", "over the anchors"]);
    for (what, count) in [
        ("the anchors".to_string(), anchors),
        (format!("the stitchable network, {} networks in one", space.len()), anchors + layers as u64),
        (format!("{} separate networks", space.len()), separate),
    ] {
        table.row([what, count.to_string(), format!("{:.2}", count as f64 / anchors as f64)]);
    }
    report.tables.push(table);
}

/// Every network.
fn report_networks(report: &mut Report, random: &[Score], fitted: &[Score], after: &[Score]) {
    let mut table = Table::new(
        "Every network",
        &["network", "MFLOPs", "parameters", "random layers", "least squares", "after joint training"],
    );
    for ((random, fitted), after) in random.iter().zip(fitted).zip(after) {
        table.row([
            after.name.clone(),
            format!("{:.3}", after.flops as f64 / 1e6),
            after.params.to_string(),
            points(random.acc),
            points(fitted.acc),
            points(after.acc),
        ]);
    }
    report.tables.push(table);
}

/// Networks of widths between the anchors', each trained alone for as long as an anchor.
fn rivals(task: &Task, plan: &Plan, cx: &Context) -> Result<Vec<Rival>> {
    let rival = |&(width, heads): &(usize, usize)| {
        let config = task.vit((width, heads), plan.depth);
        let net = task.train_single(&config, plan.anchor_steps, cx)?;
        Ok(Rival {
            name: format!("width {width}, trained alone"),
            flops: config.outline().total().flops,
            acc: task.accuracy(&net, cx)?,
        })
    };
    BETWEEN.iter().map(rival).collect()
}

/// What least squares and training the anchors contribute: the joint training without one of them.
fn report_arms(
    report: &mut Report,
    task: &Task,
    plan: &Plan,
    [random, fitted]: [SnNet<AnchorNet>; 2],
    after: &[Score],
    cx: &Context,
) -> Result<()> {
    let space = fitted.space().clone();
    let mut table = Table::new(
        "Joint training, by what is left out: mean accuracy",
        &["arm", "stitches of s0 and s1", "stitches of s1 and s2", "anchors"],
    );
    let mut add = |name: &str, scores: &[Score]| {
        let pair = |pair| points(mean(between(scores, &space, pair).map(|score| score.acc)));
        let anchors = points(mean(scores[..ANCHORS.len()].iter().map(|score| score.acc)));
        table.row([name.into(), pair([0, 1]), pair([1, 2]), anchors]);
    };
    add("everything", after);
    let net = task.train_joint(random, false, plan.joint_steps, cx)?;
    add("without least squares", &task.evaluate(&net, cx)?);
    let net = task.train_joint(fitted, true, plan.joint_steps, cx)?;
    add("anchors frozen", &task.evaluate(&net, cx)?);
    report.tables.push(table);
    Ok(())
}

/// The same with residual networks, whose middle stage is stitched.
fn report_resnet(report: &mut Report, task: &Task, cx: &Context) -> Result<()> {
    const STEPS: [usize; 2] = [600, 800];
    let config = |width| {
        let (image, classes) = (task.train.shape, task.train.classes.len());
        AnchorConfig::Resnet(ResnetConfig { image, patch: 2, width, depths: vec![1, 4, 1], classes })
    };
    let anchors = [8, 16, 32].map(|width| task.train_single(&config(width), STEPS[0], cx));
    let anchors = anchors.into_iter().collect::<Result<Vec<_>>>()?;
    let random = SnNetConfig::new(anchors).draw(&mut cx.rng("stitches", 1), &cx.device)?;
    let before_random = task.evaluate(&random, cx)?;
    let mut net = random;
    task.fit(&mut net, cx)?;
    let before = task.evaluate(&net, cx)?;
    let mut net = task.train_joint(net, false, STEPS[1], cx)?;
    let after = task.evaluate(&net, cx)?;
    net.calibrate(0..net.space().len(), &task.train, &task.scaling, cx)?;
    let own = task.evaluate(&net, cx)?;
    let space = net.space();
    let mut table = Table::new(
        "Residual networks of widths 8, 16 and 32 (no threshold): mean accuracy",
        &[
            "networks",
            "random layers",
            "least squares",
            "after joint training",
            "with batch norms' statistics of their own",
        ],
    );
    let row = |of: &dyn Fn(&[Score]) -> f64| {
        [&before_random, &before, &after, &own].map(|scores| points(of(scores)))
    };
    let mut add = |name: &str, cells: [String; 4]| {
        table.row([name.to_string()].into_iter().chain(cells));
    };
    for (anchor, name) in ["s0", "s1", "s2"].into_iter().enumerate() {
        add(name, row(&|scores| scores[anchor].acc));
    }
    for (pair, name) in [([0, 1], "stitches of s0 and s1"), ([1, 2], "stitches of s1 and s2")] {
        add(name, row(&|scores| mean(between(scores, space, pair).map(|score| score.acc))));
    }
    report.tables.push(table);
    report.plots.push(plot("Residual networks: accuracy over cost", space, &own, &[], Measure::MegaFlops)?);
    Ok(())
}

/// The correlation of ranks (Spearman); equal values share the mean of their ranks.
fn spearman(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |values: &[f64]| -> Vec<f64> {
        let rank = |x: &f64| {
            let below = values.iter().filter(|y| *y < x).count();
            let equal = values.iter().filter(|y| *y == x).count();
            below as f64 + (equal as f64 - 1.0) / 2.0
        };
        values.iter().map(rank).collect()
    };
    let centred = |values: Vec<f64>| {
        let middle = mean(values.iter().copied());
        values.into_iter().map(|value| value - middle).collect::<Vec<_>>()
    };
    let (a, b) = (centred(ranks(a)), centred(ranks(b)));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rank_correlation_by_hand() {
        assert!((spearman(&[1.0, 2.0, 3.0], &[10.0, 100.0, 1000.0]) - 1.0).abs() < 1e-12);
        assert!((spearman(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        // Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: 4.5 / sqrt(4.5 * 5).
        let found = spearman(&[1.0, 2.0, 2.0, 3.0], &[1.0, 2.0, 3.0, 4.0]);
        assert!((found - 4.5 / 22.5f64.sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_smallest_experiment_repeats() {
        let run = || {
            let cx = Context::for_tests("unused");
            let report = run(kiln_core::System::card(&crate::Stitch), Scale::Smoke, &cx).unwrap();
            report.tables.iter().flat_map(|table| table.rows.clone()).collect::<Vec<_>>()
        };
        assert_eq!(run(), run());
    }
}
