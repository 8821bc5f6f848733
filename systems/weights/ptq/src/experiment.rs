//! The reference experiment: networks that Kiln trains, quantised by several orders of their units and for several targets.
//! The search sees one half of the held-out examples, the figures come from the other.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use kiln_compiler::capture;
use kiln_core::{Card, Claim, Context, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::{ImageOptions, Images, digits, shared_dir};
use kiln_nn::{TrainConfig, initialise, train};

use crate::arch::{Arch, ClassifierConfig, Input};
use crate::checkpoint::Trained;
use crate::curvature::Trace;
use crate::data::{Examples, learnt_texts};
use crate::latency::{Profile, compiled_seconds, measure};
use crate::program::Program;
use crate::quantise::{Metric, QuantConfig, Quantiser, SearchPlan, sample, score};
use crate::search::{Bits, Order, Trials};
use crate::training::ClassifyTask;

/// The target whose configuration is run and timed.
const MAIN_TARGET: f64 = 0.99;

/// Everything that differs between scales.
struct Plan {
    epochs: f64,
    targets: &'static [f64],
    /// Random orders.
    random: u64,
    /// Whether curvature alone is tried.
    hessian: bool,
    calibration: usize,
    /// Examples on which sensitivities are measured, and random directions at most.
    sensitivity: (usize, usize),
    runs: usize,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                epochs: 0.5,
                targets: &[MAIN_TARGET],
                random: 1,
                hessian: false,
                calibration: 16,
                sensitivity: (16, 1),
                runs: 3,
            },
            Scale::Quick => Self {
                epochs: 16.0,
                targets: &[0.999, MAIN_TARGET, 0.97],
                random: 2,
                hessian: true,
                calibration: 128,
                sensitivity: (32, 2),
                runs: 50,
            },
            Scale::Full => Self {
                epochs: 3.0,
                targets: &[0.9999, 0.999, MAIN_TARGET, 0.97],
                random: 3,
                hessian: true,
                calibration: 256,
                sensitivity: (256, 64),
                runs: 50,
            },
        }
    }
}

/// A network to be trained, with its data.
struct Subject {
    name: &'static str,
    config: ClassifierConfig,
    /// Times that every example is seen, over those of the plan.
    longer: f64,
    train: Examples,
    /// Held out: one half for the search, the other for the figures.
    test: Examples,
}

/// The embedded digits, half of them held out: with fewer, one image would decide about the accuracy that is allowed to be lost.
fn halved_digits(cx: &Context) -> (Examples, Examples) {
    let (train, test) = (digits::train(), digits::test());
    let all = Examples::of_images(Images {
        shape: [1, 8, 8],
        pixels: [train.pixels, test.pixels].concat(),
        labels: [train.labels, test.labels].concat().into_iter().map(usize::from).collect(),
        classes: (0..10).map(|digit| digit.to_string()).collect(),
        white: 16.0,
    });
    let learnt = sample(all.len(), all.len() / 2, "digits", cx);
    let held_out: Vec<usize> = (0..all.len()).filter(|index| learnt.binary_search(index).is_err()).collect();
    (all.select(&learnt), all.select(&held_out))
}

/// Fashion-MNIST, 12,000 images to train on and 3,000 held out; where it is not at hand, the digits.
fn garments(shared: Option<&Path>, cx: &Context) -> Result<(Examples, Examples)> {
    let Some(folder) =
        shared.map(|shared| shared.join("data/fashion-mnist")).filter(|folder| folder.is_dir())
    else {
        return Ok(halved_digits(cx));
    };
    let read = |name: &str, count: usize, stream: &str| -> Result<Examples> {
        let images = Images::read(&folder.join(name), &ImageOptions::default())?;
        Ok(Examples::of_images(images.select(&sample(images.len(), count, stream, cx))))
    };
    Ok((
        read("train16k-images-idx3-ubyte.gz", 12_000, "fashion train")?,
        read("t10k-images-idx3-ubyte.gz", 3_000, "fashion test")?,
    ))
}

fn subjects(scale: Scale, cx: &Context) -> Result<Vec<Subject>> {
    let network = |arch, train: &Examples| {
        let shape = [train.shape[0], train.shape[1], train.shape[2]];
        ClassifierConfig::new(arch, Input::Image(shape), train.classes.len())
    };
    if scale != Scale::Full {
        let (train, test) = halved_digits(cx);
        let config = ClassifierConfig { width: 0.25, ..network(Arch::Mobilenet, &train) };
        return Ok(vec![Subject { name: "mobilenetv2-s, digits", config, longer: 1.0, train, test }]);
    }
    let shared = shared_dir();
    let (train, test) = garments(shared.as_deref(), cx)?;
    let mut all = vec![
        Subject {
            name: "resnet-s",
            config: network(Arch::Resnet, &train),
            longer: 1.0,
            train: train.clone(),
            test: test.clone(),
        },
        Subject { name: "mobilenetv2-s", config: network(Arch::Mobilenet, &train), longer: 1.0, train, test },
    ];
    if let Some(folder) =
        shared.map(|shared| shared.join("data/sentiment-and-question")).filter(|folder| folder.is_dir())
    {
        let (config, train, test) =
            learnt_texts(&folder.join("trec_train.csv.gz"), &folder.join("trec_test.csv.gz"), 32)?;
        all.push(Subject { name: "bert-s", config, longer: 4.0, train, test });
    }
    Ok(all)
}

/// What an order of units came to at each target.
struct Course {
    name: String,
    /// Accuracy on the untouched half over that of the network as it was; per cent of the modelled latency saved; bits.
    at: Vec<(f64, f64, Bits)>,
    /// Every configuration that was tried: modelled milliseconds and accuracy in the search.
    tried: Vec<(f64, f64)>,
}

impl Course {
    /// Per cent of the modelled latency saved, the mean over all targets.
    fn saved(&self) -> f64 {
        self.at.iter().map(|(_, saved, _)| saved).sum::<f64>() / self.at.len() as f64
    }
}

/// Where the time goes.
struct Clock {
    last: Instant,
    laps: Vec<(&'static str, f64)>,
}

impl Default for Clock {
    fn default() -> Self {
        Self { last: Instant::now(), laps: Vec::new() }
    }
}

impl Clock {
    /// Ends a part of the work.
    fn lap(&mut self, what: &'static str) {
        self.laps.push((what, self.last.elapsed().as_secs_f64()));
        self.last = Instant::now();
    }

    fn table(&self, name: &str) -> Table {
        let mut table = Table::new(format!("{name}: where the time went"), &["work", "seconds"]);
        for (what, seconds) in &self.laps {
            table.row([(*what).into(), format!("{seconds:.1}")]);
        }
        table
    }
}

/// How many probes the traces took, and how many are known to 5 %.
fn probed(traces: &[Trace]) -> String {
    let moved: Vec<&Trace> = traces.iter().filter(|trace| trace.probes > 0).collect();
    let probes: usize = moved.iter().map(|trace| trace.probes).sum();
    let known = moved.iter().filter(|trace| trace.error < 0.05 * trace.mean.abs()).count();
    let negative = moved.iter().filter(|trace| trace.mean < 0.0).count();
    format!(
        "{:.0} probes a unit, {known} of {} standard errors below 5 %, {negative} traces below 0",
        probes as f64 / moved.len().max(1) as f64,
        moved.len()
    )
}

/// What one network came to.
struct Outcome {
    augmented: f64,
    hessian: Option<f64>,
    random: f64,
    kept: f64,
    measured_saving: f64,
    size: f64,
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let profile = Profile::measure();
    let mut report = Report::new(card, scale, cx.seed);
    let mut outcomes = Vec::new();
    for subject in subjects(scale, cx)? {
        outcomes.push(study(&subject, &plan, &profile, &mut report, cx)?);
    }
    let mean =
        |value: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(value).sum::<f64>() / outcomes.len() as f64;
    let least = |value: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(value).fold(f64::INFINITY, f64::min);
    let most = |value: &dyn Fn(&Outcome) -> f64| outcomes.iter().map(value).fold(f64::NEG_INFINITY, f64::max);
    report.claims.push(Claim::new(
        format!("At target {MAIN_TARGET}, accuracy is kept on examples that the search has not seen"),
        "99 % to 99.99 % of the baseline",
        least(&|o| o.kept),
        "of the accuracy as it was, the least of all networks",
        Threshold::AtLeast(0.98),
    ));
    if outcomes.iter().all(|outcome| outcome.hessian.is_some()) {
        report.claims.push(Claim::new(
            "Augmented scores save more of the modelled latency than curvature alone",
            "25.48 %, 21.69 % and 33.28 % saved, more than by Hessians alone",
            mean(&|o| o.augmented - o.hessian.unwrap_or(f64::NAN)),
            "points, the mean over targets and networks",
            Threshold::AtLeast(0.0),
        ));
        report.claims.push(Claim::new(
            "They are nowhere behind by more than a point",
            "not stated",
            least(&|o| o.augmented - o.hessian.unwrap_or(f64::NAN)),
            "points, the least of all networks",
            Threshold::AtLeast(-1.0),
        ));
    }
    report.claims.push(Claim::new(
        "Augmented scores save more than random orders",
        "not stated",
        mean(&|o| o.augmented - o.random),
        "points, the mean over targets and networks",
        Threshold::AtLeast(0.0),
    ));
    let fast = outcomes.iter().filter(|outcome| outcome.measured_saving >= 15.0).count();
    report.claims.push(Claim::new(
        format!(
            "Whole numbers are faster: at least 15 % of the measured latency is saved at target {MAIN_TARGET}"
        ),
        "25.48 %, 21.69 % and 33.28 % on other hardware",
        fast as f64 / outcomes.len() as f64,
        "of the networks",
        Threshold::AtLeast(2.0 / 3.0),
    ));
    report.claims.push(Claim::new(
        "Weights take less room",
        "not stated",
        most(&|o| o.size),
        "of the bytes at 16 bits, the most of all networks",
        Threshold::AtMost(0.6),
    ));
    report.notes.push(
        "The held-out examples are halved: the search sees one half, and kept accuracy is that of the other, computed in \
         whole numbers. \"16 bits\" is the same program with float kernels and weights rounded to sixteen bits; beside it \
         stands the network as Kiln compiles it for floats."
            .into(),
    );
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

fn study(
    subject: &Subject,
    plan: &Plan,
    profile: &Profile,
    report: &mut Report,
    cx: &Context,
) -> Result<Outcome> {
    let Subject { name, config, longer, train: examples, test } = subject;
    let mut clock = Clock::default();
    let half = test.len() / 2;
    let searched = test.select(&(0..half).collect::<Vec<_>>());
    let untouched = test.select(&(half..test.len()).collect::<Vec<_>>());
    let mut task = ClassifyTask { train: examples, valid: &searched, batch: 64, cx };
    let steps = ((plan.epochs * longer * task.steps_per_epoch() as f64) as usize).max(4);
    let training = TrainConfig {
        steps,
        lr: if config.arch == Arch::Bert { 5e-4 } else { 3e-3 },
        warmup: steps / 10,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    };
    let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device));
    let trained = train(model, &mut task, &training, None, false, cx)?;
    clock.lap("training");
    let graph = capture(Box::new(Trained::new(*config, trained.last)))?;

    let calibration = examples.select(&sample(examples.len(), plan.calibration, "calibration", cx));
    let labelled = examples.select(&sample(examples.len(), plan.sensitivity.0, "sensitivity", cx));
    let quantiser =
        Quantiser::calibrate(Program::new(graph.clone())?, &calibration, QuantConfig::default(), cx)?;
    clock.lap("calibration");
    let sensitivities = quantiser.sensitivities(&labelled, plan.sensitivity.1, true, cx)?;
    clock.lap("sensitivities");
    let units = quantiser.program.units.len();
    let sixteen: Bits = vec![16; units];
    let baseline = score(&quantiser.float_logits(&untouched)?, &untouched.labels, Metric::Accuracy);
    let mut judged: BTreeMap<Bits, f64> = BTreeMap::new();
    let mut judge = |bits: &Bits| -> Result<f64> {
        if let Some(&accuracy) = judged.get(bits) {
            return Ok(accuracy);
        }
        let accuracy = score(&quantiser.real_logits(bits, &untouched)?, &untouched.labels, Metric::Accuracy);
        judged.insert(bits.clone(), accuracy);
        Ok(accuracy)
    };
    let saved = |bits: &Bits| {
        let [before, after] = [&sixteen, bits].map(|bits| quantiser.latency(profile, bits));
        100.0 * (1.0 - after / before)
    };

    let mut orders = vec![("augmented".to_string(), Order::Augmented, 0)];
    if plan.hessian {
        orders.push(("curvature alone".into(), Order::Hessian, 0));
    }
    orders.extend((0..plan.random).map(|draw| (format!("random {}", draw + 1), Order::Random, draw)));
    let mut courses = Vec::new();
    let mut trials = Trials::default();
    for (name, order, draw) in orders {
        trials = trials.for_another();
        let mut at = Vec::new();
        for &target in plan.targets {
            let search = SearchPlan { target, order, draw, ..SearchPlan::default() };
            let found = quantiser.search(&sensitivities, &searched, &search, &mut trials, cx, |_| Ok(()))?;
            let accuracy = judge(&found.bits)?;
            at.push((accuracy / baseline, saved(&found.bits), found.bits));
        }
        let tried =
            trials.tried.iter().map(|tried| (1e3 * quantiser.latency(profile, &tried.bits), tried.metric));
        courses.push(Course { name, at, tried: tried.collect() });
    }

    clock.lap("searches");
    let mut table = Table::new(
        format!("{name}: {units} units, accuracy {baseline:.4} as it was"),
        &["order", "target", "units at 16, 8, 4 bits", "modelled latency saved", "accuracy kept"],
    );
    for course in &courses {
        for (target, (kept, saved, bits)) in plan.targets.iter().zip(&course.at) {
            let count = |wanted: u8| bits.iter().filter(|&&bits| bits == wanted).count();
            table.row([
                course.name.clone(),
                target.to_string(),
                format!("{}, {}, {}", count(16), count(8), count(4)),
                format!("{saved:.1} %"),
                format!("{kept:.4}"),
            ]);
        }
    }
    for uniform in [8, 4] {
        let bits: Bits = vec![uniform; units];
        let accuracy = judge(&bits)?;
        table.row([
            format!("all at {uniform} bits"),
            "none".into(),
            if uniform == 8 { format!("0, {units}, 0") } else { format!("0, 0, {units}") },
            format!("{:.1} %", saved(&bits)),
            format!("{:.4}", accuracy / baseline),
        ]);
    }
    report.tables.push(table);

    let main = plan.targets.iter().position(|&target| target == MAIN_TARGET).unwrap_or(0);
    let (kept, _, bits) = &courses[0].at[main];
    let time = |bits: &Bits| measure(&quantiser.program, &quantiser.real(bits), &untouched, plan.runs);
    let (plain, quantised) = (time(&sixteen)?, time(bits)?);
    let compiled = compiled_seconds(&graph, &untouched, plan.runs)?;
    let (bytes, bytes_of_16) = quantiser.bytes(bits);
    let milliseconds = |seconds: f64| format!("{:.3} ms", 1e3 * seconds);
    let mut timing = Table::new(
        format!("{name}: one example at target {MAIN_TARGET}, median of {} runs", plan.runs),
        &["path", "latency", "bytes of weights"],
    );
    timing.row(["16 bits".into(), milliseconds(plain.median), bytes_of_16.to_string()]);
    timing.row(["chosen bits, in whole numbers".into(), milliseconds(quantised.median), bytes.to_string()]);
    timing.row(["compiled in floats".into(), milliseconds(compiled), String::new()]);
    report.tables.push(timing);
    clock.lap("runs");
    report.tables.push(clock.table(name));
    report.notes.push(format!("{name}: {}, {}", sensitivities.method, probed(&sensitivities.traces)));

    let mut plot =
        Plot::points(format!("{name}: configurations that were tried"), "modelled latency, ms", "accuracy");
    for course in &courses {
        plot = plot.series(course.name.clone(), course.tried.clone());
    }
    report.plots.push(plot);
    let positive = sensitivities.four.pair.iter().flatten().map(|d| d.max(0.0)).collect();
    report.plots.push(Plot::heat_map(
        format!("{name}: what pairs of units lose beyond the sum, 4 bits"),
        "unit",
        "unit",
        units,
        positive,
    ));
    let random: Vec<f64> =
        courses.iter().filter(|c| c.name.starts_with("random")).map(Course::saved).collect();
    Ok(Outcome {
        augmented: courses[0].saved(),
        hessian: plan.hessian.then(|| courses[1].saved()),
        random: random.iter().sum::<f64>() / random.len() as f64,
        kept: *kept,
        measured_saving: 100.0 * (1.0 - quantised.median / plain.median),
        size: bytes as f64 / bytes_of_16 as f64,
    })
}
