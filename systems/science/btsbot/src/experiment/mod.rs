//! The reference experiment: a simulated survey, three networks, a filter of cuts beside them, and requests to a server.

mod requests;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::{roc_curve, shared_dir};
use kiln_nn::{TrainConfig, train as run_training};
use rand::RngExt;

use crate::checkpoint::{Config, new_model};
use crate::dataset::Dataset;
use crate::features::{FEATURES, FeatureOptions};
use crate::metrics::{AlertMetrics, ScannerTimes, delay, labelled};
use crate::model::{MmCnn, MmCnnConfig, Mode};
use crate::page::{completeness, completeness_table};
use crate::policy::{Policy, PolicyResult, apply, judged};
use crate::scores::{Scored, Source, sources};
use crate::shift::{LARGEST_DIFFERENCE, Sample, compare};
use crate::simulate::{self, Kind, Season, Simulated};
use crate::train::{AlertTask, predict, training};

/// Everything that differs between scales.
struct Plan {
    /// Repetitions, each with sources and networks of its own.
    seeds: u64,
    /// Sources to learn from and to validate with,
    learn: usize,
    /// and to judge by, in each of two seasons.
    test: usize,
    /// Alerts of a source that are learned from,
    most: usize,
    /// and that are judged.
    most_judged: usize,
    epochs: usize,
    network: MmCnnConfig,
    batch: usize,
    lr: f64,
    /// Sources whose packets are written and watched.
    watched: usize,
    /// By how much a baseline may be better than both inputs together: in the small experiment, what one draw of sources
    /// and networks differs from another.
    margin: f64,
    /// Least area under the curve.
    auc: f64,
    /// Least completeness and purity, where they are claimed.
    policy: Option<[f64; 2]>,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        let small = MmCnnConfig { kernel: 3, ..MmCnnConfig::new().with_channels([8, 16]).with_side(31) };
        let gentle = |network: MmCnnConfig| MmCnnConfig { conv_dropout: [0.1, 0.1], ..network };
        match scale {
            Scale::Smoke => Self {
                seeds: 1,
                learn: 48,
                test: 48,
                most: 2,
                most_judged: 4,
                epochs: 1,
                network: gentle(small.with_channels([2, 4])),
                batch: 16,
                lr: 1e-3,
                watched: 6,
                margin: 0.01,
                auc: 0.93,
                policy: None,
            },
            Scale::Quick => Self {
                seeds: 1,
                learn: 240,
                test: 240,
                most: 8,
                most_judged: 12,
                epochs: 16,
                network: gentle(small),
                batch: 32,
                lr: 2e-3,
                watched: 24,
                margin: 0.01,
                auc: 0.93,
                policy: None,
            },
            Scale::Full => Self {
                seeds: 2,
                learn: 3000,
                test: 900,
                most: 6,
                most_judged: 100,
                epochs: 10,
                network: gentle(small.with_channels([16, 32])),
                batch: 64,
                lr: 1e-3,
                watched: 60,
                margin: 0.002,
                auc: 0.97,
                policy: Some([0.98, 0.90]),
            },
        }
    }
}

/// Modes in the order of the tables.
const MODES: [Mode; 3] = [Mode::MmCnn, Mode::UmCnn, Mode::UmNn];
/// What the survey's cuts are called.
const CUTS: &str = "cuts";

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    let mut runs = Vec::new();
    for seed in 0..plan.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        runs.push(Repetition::run(&plan, cx)?);
    }
    let policy = Policy::parse("bts_p1")?;
    report_survey(&mut report, &runs[0]);
    report_modes(&mut report, &plan, &runs)?;
    report_policies(&mut report, &plan, &policy, &runs)?;
    if scale == Scale::Full {
        report_speed(&mut report, &policy, &runs, cx)?;
    }
    report_shift(&mut report, &policy, &runs, cx)?;
    requests::report(&mut report, &plan, &policy, &runs[0], cx)?;
    match shared_dir() {
        Some(shared) if scale != Scale::Smoke => {
            report_real(&mut report, &shared.join("data/ztf-alerts"), &runs[0], cx)?;
        }
        _ => report.notes.push("Real alerts are not at hand, and were left out.".into()),
    }
    report.notes.push(format!(
        "All sources but the real ones are simulated: the public training data are tens of gigabytes. {} sources are learned \
         from ({} alerts of each at most), {} others judged, of the same kinds. Networks see {} x {} pixels with {:?} filters of {} x {}, in place of \
         63 x 63 and [32, 64] of 5 x 5, and drop a tenth of the channels in place of half, so that this takes as long as it does.",
        plan.learn, plan.most, plan.test, plan.network.side, plan.network.side, plan.network.channels,
        plan.network.kernel, plan.network.kernel
    ));
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// One survey to learn from, one to judge by, and one of another season.
struct Repetition {
    tested: Vec<Simulated>,
    recent: Sample,
    models: Vec<MmCnn>,
    config: Config,
    /// Scored alerts by method: the networks, then the cuts.
    scored: Vec<(&'static str, Vec<Scored>)>,
}

impl Repetition {
    fn run(plan: &Plan, cx: &Context) -> Result<Self> {
        let side = plan.network.side;
        let season = Season::default();
        let learned = simulate::sources(plan.learn, &season, "learn", cx);
        let tested = simulate::sources(plan.test, &season, "test", cx);
        // The same sources, so that seasons are compared and not luck.
        let recent = simulate::sources(plan.test, &Season::worse(), "test", cx);
        let train_data = simulate::dataset(&learned, side, plan.most, cx)?;
        let data = simulate::dataset(&tested, side, plan.most_judged, cx)?;
        let recent = simulate::dataset(&recent, side, plan.most_judged, cx)?;
        let config = Config::new(plan.network.clone(), FeatureOptions::default());
        let (mut models, mut scored) = (Vec::new(), Vec::new());
        let all: Vec<usize> = (0..data.len()).collect();
        for mode in MODES {
            let model = learn(plan, &plan.network.clone().with_mode(mode), &train_data, cx)?;
            let scores = predict(&model, &data, &all, 1.0, cx)?;
            scored.push((mode.name(), data.scored(&all, &scores)));
            models.push(model);
        }
        let cuts: Vec<f64> = data.features.iter().map(cut_score).collect();
        scored.push((CUTS, data.scored(&all, &cuts)));
        let recent_all: Vec<usize> = (0..recent.len()).collect();
        let recent = Sample::of(&recent, &predict(&models[0], &recent, &recent_all, 1.0, cx)?);
        Ok(Self { tested, recent, models, config, scored })
    }
}

fn learn(plan: &Plan, network: &MmCnnConfig, data: &Dataset, cx: &Context) -> Result<MmCnn> {
    let all: Vec<usize> = (0..data.len()).collect();
    let [train, valid, _] = data.split(&all, [0.9, 0.1, 0.0], &mut cx.rng("split", 0));
    let mut task = AlertTask::new(data, &train, &valid, plan.batch, cx)?;
    let per_epoch = task.steps_per_epoch();
    let config = TrainConfig {
        eval_every: per_epoch,
        warmup: per_epoch,
        min_lr_ratio: 0.02,
        ..training(plan.epochs * per_epoch, plan.lr)
    };
    let trained = run_training(new_model(network, cx), &mut task, &config, None, false, cx)?;
    if cx.interrupted() {
        return Err(Error::interrupted("stopped before the networks were trained"));
    }
    Ok(trained.model)
}

/// The survey's cuts: a real alert, not on a star, brighter than 19, of a source known for less than 60 days.
fn cut_score(features: &[f32; 25]) -> f64 {
    let of = |name: &str| FEATURES.iter().position(|f| *f == name).map_or(f32::NAN, |at| features[at]);
    let is_star = of("sgscore1") > 0.76 && (0.0..2.0).contains(&of("distpsnr1"));
    f64::from(u8::from(of("new_drb") > 0.9 && !is_star && of("magpsf") < 19.0 && of("age") < 60.0))
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Of every run, one figure; NaN where it is undefined, which no claim then survives.
fn figures(runs: &[Repetition], of: impl Fn(&Repetition) -> Option<f64>) -> Vec<f64> {
    runs.iter().map(|run| of(run).unwrap_or(f64::NAN)).collect()
}

fn scored_by<'a>(run: &'a Repetition, method: &str) -> &'a [Scored] {
    run.scored.iter().find(|(name, _)| *name == method).map_or(&[], |(_, alerts)| alerts)
}

/// What was observed.
fn report_survey(report: &mut Report, run: &Repetition) {
    let mut table =
        Table::new("The survey that is judged", &["kind", "sources", "alerts", "brightest, median"]);
    for kind in Kind::ALL {
        let of: Vec<&Simulated> = run.tested.iter().filter(|source| source.kind == kind).collect();
        let alerts: usize = of.iter().map(|source| source.alerts.len()).sum();
        let mut brightest: Vec<f64> = of
            .iter()
            .map(|source| source.alerts.iter().map(|alert| alert.magpsf).fold(f64::INFINITY, f64::min))
            .collect();
        brightest.sort_by(f64::total_cmp);
        let median = brightest.get(brightest.len() / 2).copied().unwrap_or(f64::NAN);
        table.row([
            kind.name().to_string(),
            of.len().to_string(),
            alerts.to_string(),
            format!("{median:.2}"),
        ]);
    }
    report.tables.push(table);
    let mut plot = Plot::points("Light curves, one of each kind", "days", "magnitude").reversed_y();
    for kind in Kind::ALL {
        let longest =
            run.tested.iter().filter(|source| source.kind == kind).max_by_key(|source| source.alerts.len());
        if let Some(source) = longest {
            let from =
                run.tested.iter().flat_map(|s| s.alerts.first()).map(|a| a.jd).fold(f64::INFINITY, f64::min);
            let curve = source.alerts.iter().map(|alert| (alert.jd - from, alert.magpsf)).collect();
            plot = plot.series(kind.name(), curve);
        }
    }
    report.plots.push(plot);
}

/// Claim 1: both inputs are better than either.
fn report_modes(report: &mut Report, plan: &Plan, runs: &[Repetition]) -> Result<()> {
    let auc_of = |method: &'static str| figures(runs, |run| AlertMetrics::of(scored_by(run, method)).auc);
    let mut table =
        Table::new("Alerts: mean over seeds", &["method", "AUC", "balanced accuracy", "precision", "recall"]);
    for method in MODES.map(Mode::name).into_iter().chain([CUTS]) {
        let figure = |of: fn(&AlertMetrics) -> Option<f64>| {
            mean(&figures(runs, |run| of(&AlertMetrics::of(scored_by(run, method)))))
        };
        table.row([
            method.to_string(),
            format!("{:.4}", figure(|m| m.auc)),
            format!("{:.4}", figure(|m| m.balanced_accuracy)),
            format!("{:.4}", figure(|m| m.precision)),
            format!("{:.4}", figure(|m| m.recall)),
        ]);
    }
    report.tables.push(table);
    let mut plot =
        Plot::lines("ROC over alerts", "share of other alerts", "share of alerts of bright transients");
    for (name, alerts) in &runs[0].scored {
        plot = plot.series(*name, roc_curve(labelled(alerts)));
    }
    report.plots.push(plot);
    let [both, images, metadata] = MODES.map(|mode| mean(&auc_of(mode.name())));
    report.claims.extend([
        Claim::new(
            "Images and metadata together are at least as good as either alone",
            "the multi-modal network is best",
            both - images.max(metadata),
            "AUC above that of the better baseline",
            Threshold::AtLeast(-plan.margin),
        ),
        Claim::new(
            "Alerts of bright transients are told from others",
            "told by sources, see below; no AUC is taken from it",
            both,
            "AUC over alerts",
            Threshold::AtLeast(plan.auc),
        ),
    ]);
    Ok(())
}

/// What a policy comes to with a method's scores.
fn policy_result(policy: &Policy, run: &Repetition, method: &str) -> Result<PolicyResult> {
    let sources = sources(scored_by(run, method))?;
    Ok(apply(policy, &judged(&sources, &[])))
}

/// Claim 2: bright transients are found, and little else.
fn report_policies(report: &mut Report, plan: &Plan, policy: &Policy, runs: &[Repetition]) -> Result<()> {
    let mut table = Table::new(
        format!("Sources: {policy} and the other policies, mean over seeds"),
        &["method", "policy", "completeness", "purity"],
    );
    let mut claimed = [f64::NAN; 2];
    for method in MODES.map(Mode::name).into_iter().chain([CUTS]) {
        for policy in Policy::standard() {
            let results: Vec<PolicyResult> =
                runs.iter().map(|run| policy_result(&policy, run, method)).collect::<Result<_>>()?;
            let of = |figure: fn(&PolicyResult) -> Option<f64>| {
                mean(&results.iter().map(|result| figure(result).unwrap_or(f64::NAN)).collect::<Vec<_>>())
            };
            let both = [of(|r| r.completeness), of(|r| r.purity)];
            if method == Mode::MmCnn.name() && policy.name == "bts_p1" {
                claimed = both;
            }
            if method == Mode::MmCnn.name() || policy.name == "bts_p1" {
                table.row([
                    method.to_string(),
                    policy.name.clone(),
                    format!("{:.3}", both[0]),
                    format!("{:.3}", both[1]),
                ]);
            }
        }
    }
    report.tables.push(table);
    let all = sources(scored_by(&runs[0], Mode::MmCnn.name()))?;
    report.tables.push(completeness_table(policy, &judged(&all, &[])));
    report.plots.push(completeness(policy, &judged(&all, &[])));
    if let Some([least_complete, least_pure]) = plan.policy {
        report.claims.extend([
            Claim::new(
                "Bright transients become targets",
                "all bright transients of the test split",
                claimed[0],
                "completeness of bts_p1",
                Threshold::AtLeast(least_complete),
            ),
            Claim::new(
                "Targets are bright transients",
                "93 % of the sources selected in October 2023 were real and extragalactic",
                claimed[1],
                "purity of bts_p1",
                Threshold::AtLeast(least_pure),
            ),
        ]);
    }
    Ok(())
}

/// Hours between the looks of a simulated person,
const LOOKS: f64 = 12.0;
/// and how often they see what is there.
const ATTENTION: f64 = 0.95;

/// When a person who looks twice a night at all candidates brighter than 19 with two detections saves each source.
fn scanner(sources: &[Source<'_>], cx: &Context) -> ScannerTimes {
    let mut rng = cx.rng("scanner", 0);
    let mut times = BTreeMap::new();
    for source in sources.iter().filter(|source| source.label == Some(true)) {
        let last = source.alerts.last().map_or(0.0, |alert| alert.jd) + 3.0;
        let mut look = (source.alerts[0].jd * 24.0 / LOOKS).ceil() * LOOKS / 24.0;
        while look < last {
            let seen: Vec<_> = source.alerts.iter().filter(|alert| alert.jd <= look).collect();
            let is_candidate = seen.len() >= 2 && seen.last().is_some_and(|alert| alert.magpsf < 19.0);
            if is_candidate && rng.random_bool(ATTENTION) {
                times.insert(source.id.to_string(), [Some(look), Some(look)]);
                break;
            }
            look += LOOKS / 24.0;
        }
    }
    times
}

/// Claim 3: not later than a person.
fn report_speed(report: &mut Report, policy: &Policy, runs: &[Repetition], cx: &Context) -> Result<()> {
    let mut hours = Vec::new();
    for run in runs {
        let all = sources(scored_by(run, Mode::MmCnn.name()))?;
        let judged = judged(&all, &[]);
        hours.extend(delay(policy, &judged, &scanner(&judged, cx), 0).hours);
    }
    report.plots.push(Plot::histogram(
        "Triggers after a simulated person's saving",
        "hours (negative: before)",
        &hours,
        30,
    ));
    report.claims.push(Claim::new(
        "Triggers come no later than a person",
        "about an hour before people",
        mean(&hours),
        "hours after a simulated person, mean",
        Threshold::AtMost(0.0),
    ));
    Ok(())
}

/// Claim 4: another season changes little.
fn report_shift(report: &mut Report, policy: &Policy, runs: &[Repetition], cx: &Context) -> Result<()> {
    let mut differences = Vec::new();
    let mut table = Table::new(
        "A season with a limit 0.3 magnitudes brighter and images 15 % wider",
        &["seed", "AUC before", "AUC after", "difference, 95 % over sources", "completeness", "purity"],
    );
    for (number, run) in runs.iter().enumerate() {
        let before = Sample { alerts: scored_by(run, Mode::MmCnn.name()).to_vec(), ..Sample::default() };
        let shift = compare(&before, &run.recent, policy, &mut cx.rng("shift", number as u64))?;
        let shown = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.3}"));
        let interval = shift.auc.interval.map_or("-".into(), |[low, high]| format!("{low:.3} to {high:.3}"));
        let pair = |pair: [Option<f64>; 2]| format!("{} → {}", shown(pair[0]), shown(pair[1]));
        table.row([
            (cx.seed + number as u64).to_string(),
            shown(shift.auc.a),
            shown(shift.auc.b),
            format!("{} ({interval})", shown(shift.auc.difference)),
            pair([shift.completeness.a, shift.completeness.b]),
            pair([shift.purity.a, shift.purity.b]),
        ]);
        differences.push(shift.auc.difference.unwrap_or(f64::NAN));
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        "Another season changes little",
        "no significant shift on newer alerts",
        mean(&differences).abs(),
        "difference of AUC",
        Threshold::AtMost(LARGEST_DIFFERENCE),
    ));
    Ok(())
}

/// What the network that learned from a simulation says of two real sources; nothing is claimed of it.
fn report_real(report: &mut Report, folder: &Path, run: &Repetition, cx: &Context) -> Result<()> {
    let (triplets, candidates) =
        (folder.join("bts_example_triplets.npz"), folder.join("bts_example_candidates.csv"));
    let (data, _) = Dataset::read(&triplets, &candidates, run.config.network.side)?;
    let all: Vec<usize> = (0..data.len()).collect();
    let scored = data.scored(&all, &predict(&run.models[0], &data, &all, 1.0, cx)?);
    let mut table = Table::new(
        "Two real sources, by the network that has only seen simulations",
        &["source", "bright transient", "alerts", "mean score", "target by bts_p1"],
    );
    let policy = Policy::parse("bts_p1")?;
    let mut plot = Plot::points("Scores of two real sources", "days", "score");
    for source in sources(&scored)? {
        let mean = source.alerts.iter().map(|alert| alert.score).sum::<f64>() / source.alerts.len() as f64;
        let is_target = policy.trigger(&source.alerts).is_some();
        let word = |yes: bool| if yes { "yes" } else { "no" };
        table.row([
            source.id.to_string(),
            word(source.label == Some(true)).into(),
            source.alerts.len().to_string(),
            format!("{mean:.3}"),
            word(is_target).into(),
        ]);
        let from = source.alerts[0].jd;
        let name = if source.label == Some(true) { "a bright transient" } else { "no bright transient" };
        let name = format!("{}, {name}", source.id);
        plot = plot.series(name, source.alerts.iter().map(|alert| (alert.jd - from, alert.score)).collect());
    }
    report.tables.push(table);
    report.plots.push(plot);
    Ok(())
}
