//! The reference experiment: transfer between two simulated sites, and real EEG where it is at hand.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::{read_npz, shared_dir};

use crate::channels::Channels;
use crate::checkpoint::stride;
use crate::cka::{alignments, representations};
use crate::dataset::{About, Dataset, Recording};
use crate::metrics::{Metrics, Outcome, by_recording, paired_difference, roc};
use crate::model::{Arch, Model, ModelConfig, TcnConfig};
use crate::pipeline::{Normalise, Pipeline};
use crate::prepare::from_arrays;
use crate::resample::Resampler;
use crate::scaling::PowerLaw;
use crate::simulate::{Site, Subject, record};
use crate::train::{LEARNING_RATE, predict};
use crate::transfer::{Protocol, Target, new_model};
use crate::windows::WindowSet;

/// Electrodes of the simulated recordings.
const CHANNELS: [&str; 4] = ["C3", "C4", "O1", "O2"];
/// Samples a second.
const RATE: f64 = 100.0;
/// Samples of a window,
const WINDOW: usize = 300;
/// and windows of a recording.
const WINDOWS: usize = 4;
/// Windows of a step.
const BATCH: usize = 32;
/// Recordings of the target site when labels are few, and when they are not.
const FEW: usize = 10;
const MANY: usize = 80;
/// What counts as a difference where the paper says only that there is one.
const LEAST: f64 = 0.001;
/// Samples a second of the Bonn segments.
const BONN_RATE: f64 = 173.61;
/// Samples of their windows: six seconds.
const BONN_WINDOW: usize = 600;

/// Everything that differs between scales.
struct Plan {
    /// Repetitions, each with people, networks and subsets of its own.
    seeds: u64,
    /// Recordings of the source site.
    source: usize,
    /// Recordings that are judged at each site.
    test: usize,
    source_epochs: usize,
    target_epochs: usize,
    /// Ways that are compared with few labels.
    protocols: &'static [Protocol],
    /// Whether the larger network is compared too.
    tcn: bool,
    /// Passes through the Bonn segments; none where they are left out.
    bonn_epochs: Option<usize>,
    /// Whether they are also a site to carry a network to.
    bonn_transfer: bool,
}

const ALL: [Protocol; 7] = [
    Protocol::Scratch,
    Protocol::ZeroShot,
    Protocol::LinearProbe,
    Protocol::FineTune,
    Protocol::Freeze(1),
    Protocol::Discriminative,
    Protocol::Joint,
];

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                seeds: 1,
                source: 24,
                test: 16,
                source_epochs: 1,
                target_epochs: 1,
                protocols: &[Protocol::Scratch, Protocol::ZeroShot, Protocol::FineTune],
                tcn: false,
                bonn_epochs: None,
                bonn_transfer: false,
            },
            Scale::Quick => Self {
                seeds: 3,
                source: 100,
                test: 240,
                source_epochs: 6,
                target_epochs: 8,
                protocols: &[
                    Protocol::Scratch,
                    Protocol::ZeroShot,
                    Protocol::LinearProbe,
                    Protocol::FineTune,
                ],
                tcn: false,
                bonn_epochs: Some(12),
                bonn_transfer: false,
            },
            Scale::Full => Self {
                seeds: 10,
                protocols: &ALL,
                tcn: true,
                bonn_epochs: Some(30),
                bonn_transfer: true,
                ..Self::at(Scale::Quick)
            },
        }
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    let shallow = ModelConfig::new(Arch::Shallow, CHANNELS.len(), 2, WINDOW);
    let sites = Sites::draw(&plan, cx)?;
    let sources = report_source(&mut report, &plan, &shallow, &sites, cx)?;
    let gain = report_transfer(&mut report, &plan, &shallow, &sites, &sources, cx)?;
    if plan.tcn {
        report_tcn(&mut report, &plan, &sites, gain, cx)?;
    }
    report_alignment(&mut report, &sites, &sources, cx)?;
    match (plan.bonn_epochs, shared_dir()) {
        (Some(epochs), Some(shared)) => {
            let path = shared.join("data/eeg-samples/bonn.npz");
            report_bonn(&mut report, &path, epochs, plan.bonn_transfer, cx)?;
        }
        (Some(_), None) => {
            report.notes.push("Real EEG (the Bonn segments) is not at hand, and was left out.".into())
        }
        (None, _) => {}
    }
    report.notes.push(format!(
        "Sites are simulated: {} recordings of the source, {} judged at each site, {WINDOWS} windows of {WINDOW} samples of \
         {} channels each. Recordings to judge by are the same in all runs, and of the same people at both sites; intervals are over them, and over no other \
         source of chance. The corpora of the paper (TUAB, NMT) need a licence: `kiln eeg prepare` takes them as they come.",
        plan.source,
        plan.test,
        CHANNELS.len()
    ));
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Recordings of both sites. Those to learn from come first, with both classes in turn.
struct Sites {
    source: Dataset,
    target: Dataset,
    source_pool: Vec<usize>,
    target_pool: Vec<usize>,
    source_test: Vec<usize>,
    target_test: Vec<usize>,
}

impl Sites {
    /// Each site has people of its own to learn from. Those who are judged are the same at both, so that the sites' machines
    /// are compared and not their people.
    fn draw(plan: &Plan, cx: &Context) -> Result<Self> {
        // Twice as many as one run learns from: every seed draws others.
        let target_pool = MANY.min(plan.source) * 2;
        let source = simulated(Site::A, plan.source * 2, plan.test, cx)?;
        let target = simulated(Site::B, target_pool, plan.test, cx)?;
        let all = |data: &Dataset| (0..data.recordings.len()).collect::<Vec<_>>();
        let (a, b) = (all(&source), all(&target));
        Ok(Self {
            source_pool: a[..plan.source * 2].to_vec(),
            source_test: a[plan.source * 2..].to_vec(),
            target_pool: b[..target_pool].to_vec(),
            target_test: b[target_pool..].to_vec(),
            source,
            target,
        })
    }
}

/// Recordings of a site, half of them pathological, prepared as any: first those of the site's own people, then of those who
/// go to both sites.
fn simulated(site: Site, own: usize, both: usize, cx: &Context) -> Result<Dataset> {
    let channels: Vec<String> = CHANNELS.map(String::from).into();
    let pipeline = Pipeline { tmin: 0.0, channels: Channels::Named(channels.clone()), ..Pipeline::default() };
    let resamplers = Resampler::of_all(&[RATE; CHANNELS.len()], pipeline.rate)?;
    let one = |number: usize| {
        let mut rng = cx.rng(&format!("{site:?}"), number as u64);
        let subject = match number.checked_sub(own) {
            None => Subject::draw(number % 2 == 1, &mut rng),
            Some(number) => Subject::draw(number % 2 == 1, &mut cx.rng("people", number as u64)),
        };
        let eeg = record(site, &subject, &channels, WINDOW * WINDOWS, RATE, &mut rng);
        let prepared = pipeline.apply(channels.clone(), eeg, &resamplers, Vec::new())?;
        let id = format!("{site:?}{number}");
        let about =
            About { id, label: Some(subject.pathological), subject: None, age: None, sex: None, split: None };
        Ok(Arc::new(Recording::new(about, prepared.eeg, CHANNELS.len())))
    };
    let recordings = (0..own + both).map(one).collect::<Result<Vec<_>>>()?;
    Ok(Dataset { channels, pipeline, recordings })
}

/// The context of one repetition.
fn repetition(seed: u64, cx: &Context) -> Context {
    Context { seed: cx.seed + seed, ..cx.clone() }
}

/// Windows of the first recordings of an order that the seed draws: fewer are part of more.
fn subset(data: &Dataset, pool: &[usize], size: usize, network: &ModelConfig, cx: &Context) -> WindowSet {
    let order = data.nested(pool, &mut cx.rng("subset", 0));
    WindowSet::for_training(data, &order[..size.min(order.len())], network.n_times(), stride(network))
}

fn judge(
    model: &Model,
    network: &ModelConfig,
    data: &Dataset,
    test: &[usize],
    cx: &Context,
) -> Result<Vec<Outcome>> {
    let windows = WindowSet::for_evaluation(data, test, network.n_times(), stride(network));
    Ok(by_recording(&predict(model, &windows, 128, 1.0, cx)?))
}

fn learn(windows: &WindowSet, epochs: usize) -> Target<'_> {
    Target { train: windows, valid: None, source: None, batch: BATCH, epochs, lr: LEARNING_RATE }
}

/// Balanced accuracy; NaN where it is undefined, which no claim then survives.
fn score(outcomes: &[Outcome]) -> f64 {
    Metrics::of(outcomes).balanced_accuracy.unwrap_or(f64::NAN)
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

fn scores(runs: &[Vec<Outcome>]) -> Vec<f64> {
    runs.iter().map(|run| score(run)).collect()
}

/// Mean and range over seeds.
fn spread(values: &[f64]) -> String {
    let (low, high) =
        values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
    format!("{:.3} ({low:.3} to {high:.3})", mean(values))
}

/// Part 1: networks of the source site from more and more recordings, and what they are worth at the other.
fn report_source(
    report: &mut Report,
    plan: &Plan,
    network: &ModelConfig,
    sites: &Sites,
    cx: &Context,
) -> Result<Vec<Model>> {
    let sizes: Vec<usize> = [10, 20, 50, 100].into_iter().filter(|&size| size <= plan.source).collect();
    let bar = cx.progress(sizes.len() as u64 * plan.seeds, "learning at the source");
    let mut table = Table::new(
        "Data scaling at the source site: balanced accuracy, mean and range over seeds",
        &["recordings", "at the source", "at the target, as it is"],
    );
    let (mut models, mut points) = (Vec::new(), Vec::new());
    let (mut here, mut there) = (Vec::new(), Vec::new());
    let mut means = Vec::new();
    for &size in &sizes {
        (here, there) = (Vec::new(), Vec::new());
        models.clear();
        for seed in 0..plan.seeds {
            let cx = &repetition(seed, cx);
            let windows = subset(&sites.source, &sites.source_pool, size, network, cx);
            // The same number of steps whatever the recordings: fewer are seen more often.
            let epochs = plan.source_epochs * plan.source / size;
            let untrained = new_model(network, cx);
            let model = learn(&windows, epochs).adapt(Protocol::Scratch, &untrained, network, cx)?;
            here.push(score(&judge(&model, network, &sites.source, &sites.source_test, cx)?));
            there.push(score(&judge(&model, network, &sites.target, &sites.target_test, cx)?));
            points.push((size as f64, 1.0 - here[here.len() - 1]));
            models.push(model);
            bar.inc(1);
        }
        table.row([size.to_string(), spread(&here), spread(&there)]);
        means.push((size as f64, mean(&here)));
    }
    report.tables.push(table);
    let curve = means.iter().map(|&(n, s)| (n, 1.0 - s)).collect();
    let mut plot = Plot::lines("Data scaling", "recordings of the source", "1 - balanced accuracy")
        .log_x()
        .series("measured", curve);
    if let Some(law) = PowerLaw::fit(&points) {
        let fitted = sizes.iter().map(|&n| (n as f64, law.at(n as f64))).collect();
        plot = plot.series(format!("{:.3} + {:.3} n^-{:.2}", law.a, law.b, law.c), fitted);
    }
    report.plots.push(plot);
    let (first, last) = (means[0].1, means[means.len() - 1].1);
    report.claims.extend([
        Claim::new(
            "More recordings make better networks",
            "accuracy grows with the number of recordings",
            last - first,
            format!(
                "balanced accuracy with {} above that with {} recordings",
                sizes[sizes.len() - 1],
                sizes[0]
            ),
            Threshold::AtLeast(0.05),
        ),
        Claim::new(
            "The sites differ: a network is worth less at the other as it is",
            "worse on the other corpus",
            mean(&here) - mean(&there),
            "balanced accuracy at home above that at the other site, the same people",
            Threshold::AtLeast(LEAST),
        ),
    ]);
    Ok(models)
}

/// Runs of one protocol with so many recordings of the target, one a seed.
fn adapt(
    protocol: Protocol,
    size: usize,
    plan: &Plan,
    network: &ModelConfig,
    sites: &Sites,
    sources: &[Model],
    cx: &Context,
) -> Result<Vec<(Model, Vec<Outcome>)>> {
    (0..plan.seeds)
        .zip(sources)
        .map(|(seed, source)| {
            let cx = &repetition(seed, cx);
            let windows = subset(&sites.target, &sites.target_pool, size, network, cx);
            let beside = subset(&sites.source, &sites.source_pool, plan.source, network, cx);
            let target = Target { source: Some(&beside), ..learn(&windows, plan.target_epochs) };
            let model = target.adapt(protocol, source, network, cx)?;
            let outcomes = judge(&model, network, &sites.target, &sites.target_test, cx)?;
            Ok((model, outcomes))
        })
        .collect()
}

fn outcomes(runs: Vec<(Model, Vec<Outcome>)>) -> Vec<Vec<Outcome>> {
    runs.into_iter().map(|(_, outcomes)| outcomes).collect()
}

/// Part 2: ways to the target with few labels and with many. Returns what fine-tuning gains with few.
fn report_transfer(
    report: &mut Report,
    plan: &Plan,
    network: &ModelConfig,
    sites: &Sites,
    sources: &[Model],
    cx: &Context,
) -> Result<f64> {
    let many = MANY.min(sites.target_pool.len());
    let few = [Protocol::Scratch, Protocol::FineTune];
    let bar = cx.progress((plan.protocols.len() + few.len()) as u64, "transferring");
    let mut table = Table::new(
        "At the target: balanced accuracy, mean and range over seeds",
        &[
            "recordings",
            "protocol",
            "balanced accuracy",
            "minus scratch",
            "95 % over recordings",
            "at the source after",
            "negative",
        ],
    );
    let mut bars: Vec<(String, [f64; 3])> = Vec::new();
    let mut gains = Vec::new();
    let mut curve = Plot::lines("ROC at the target with few labels", "1 - specificity", "sensitivity");
    for (size, protocols) in [(FEW, plan.protocols), (many, &few)] {
        let mut baseline = Vec::new();
        for &protocol in protocols {
            let runs = adapt(protocol, size, plan, network, sites, sources, cx)?;
            let kept: Vec<f64> = runs
                .iter()
                .map(|(model, _)| Ok(score(&judge(model, network, &sites.source, &sites.source_test, cx)?)))
                .collect::<Result<_>>()?;
            let runs = outcomes(runs);
            if protocol == Protocol::Scratch {
                baseline.clone_from(&runs);
            }
            let undefined = || Error::work("the recordings to judge by lack a class");
            let (gain, [low, high]) =
                paired_difference(&runs, &baseline, &mut cx.rng("bootstrap", 0)).ok_or_else(undefined)?;
            let is_baseline = protocol == Protocol::Scratch;
            table.row([
                size.to_string(),
                protocol.to_string(),
                spread(&scores(&runs)),
                if is_baseline { "-".into() } else { format!("{gain:.3}") },
                if is_baseline { "-".into() } else { format!("{low:.3} to {high:.3}") },
                spread(&kept),
                if high < 0.0 { "yes".into() } else { String::new() },
            ]);
            if !is_baseline && size == FEW {
                bars.push((protocol.to_string(), [low, gain, high]));
            }
            if protocol == Protocol::FineTune {
                gains.push(gain);
            }
            if size == FEW && few.contains(&protocol) {
                curve = curve.series(protocol.to_string(), roc(&runs[0]));
            }
            bar.inc(1);
        }
    }
    report.tables.push(table);
    let of = |which: usize| bars.iter().map(|(_, values)| values[which]).collect::<Vec<_>>();
    report.plots.push(Plot::bars(
        format!("Gain over scratch with {FEW} recordings"),
        "balanced accuracy",
        bars.iter().map(|(name, _)| name.clone()),
        [("2.5 %", of(0)), ("mean", of(1)), ("97.5 %", of(2))],
    ));
    report.plots.push(curve.series("chance", vec![(0.0, 0.0), (1.0, 1.0)]));
    report.claims.extend([
        Claim::new(
            format!("With {FEW} labelled recordings, a network that learned elsewhere first decides better"),
            "transfer helps most when labels are few",
            gains[0],
            "balanced accuracy of fine-tuning above that from scratch",
            Threshold::AtLeast(0.03),
        ),
        Claim::new(
            format!("With {many} it helps less"),
            "the gain shrinks with the target's recordings",
            gains[0] - gains[1],
            format!("gain with {FEW} above that with {many} recordings"),
            Threshold::AtLeast(LEAST),
        ),
    ]);
    Ok(gains[0])
}

/// Part 3: whether a larger network gains more from transfer.
fn report_tcn(
    report: &mut Report,
    plan: &Plan,
    sites: &Sites,
    shallow_gain: f64,
    cx: &Context,
) -> Result<()> {
    let network: ModelConfig =
        TcnConfig { n_blocks: 4, n_filters: 24, kernel_size: 5, ..TcnConfig::new(CHANNELS.len(), 2, WINDOW) }
            .into();
    network.check()?;
    let bar = cx.progress(plan.seeds + 2, "TCN");
    let mut sources = Vec::new();
    for seed in 0..plan.seeds {
        let cx = &repetition(seed, cx);
        let windows = subset(&sites.source, &sites.source_pool, plan.source, &network, cx);
        let untrained = new_model(&network, cx);
        sources.push(learn(&windows, plan.source_epochs).adapt(
            Protocol::Scratch,
            &untrained,
            &network,
            cx,
        )?);
        bar.inc(1);
    }
    let mut runs = Vec::new();
    for protocol in [Protocol::Scratch, Protocol::FineTune] {
        runs.push(outcomes(adapt(protocol, FEW, plan, &network, sites, &sources, cx)?));
        bar.inc(1);
    }
    let home: Vec<f64> = sources
        .iter()
        .map(|model| Ok(score(&judge(model, &network, &sites.source, &sites.source_test, cx)?)))
        .collect::<Result<_>>()?;
    let gain = mean(&scores(&runs[1])) - mean(&scores(&runs[0]));
    let mut table = Table::new(
        format!("TCN: balanced accuracy with {FEW} recordings of the target, mean and range over seeds"),
        &["at the source", "scratch", "fine-tune", "gain", "gain of ShallowNet"],
    );
    table.row([
        spread(&home),
        spread(&scores(&runs[0])),
        spread(&scores(&runs[1])),
        format!("{gain:.3}"),
        format!("{shallow_gain:.3}"),
    ]);
    report.tables.push(table);
    report.claims.push(Claim::new(
        "TCN gains from transfer as ShallowNet does, or more",
        "TCN gains more",
        gain - shallow_gain,
        "gain of TCN above that of ShallowNet",
        Threshold::AtLeast(-0.02),
    ));
    Ok(())
}

/// How alike the layers of networks of two seeds, and of two sites, are.
fn report_alignment(report: &mut Report, sites: &Sites, sources: &[Model], cx: &Context) -> Result<()> {
    let network = ModelConfig::new(Arch::Shallow, CHANNELS.len(), 2, WINDOW);
    let windows =
        WindowSet::for_training(&sites.target, &sites.target_test, WINDOW, stride(&network)).thinned(128);
    let own = subset(&sites.target, &sites.target_pool, MANY, &network, cx);
    let scratch = learn(&own, 8).adapt(Protocol::Scratch, &sources[0], &network, cx)?;
    let (a, b) = (representations(&sources[0], &windows, cx)?, representations(&scratch, &windows, cx)?);
    let matrix = alignments(&a, &b, windows.len());
    report.plots.push(Plot::heat_map(
        "Alignment of blocks (CKA)",
        "block of the target's network",
        "block of the source's network",
        b.len(),
        matrix.iter().flatten().copied().collect(),
    ));
    report.notes.push(format!(
        "Linear CKA of networks that learned at the source and at the target, over {} windows of the target: first block \
         {:.3}, logits {:.3}.",
        windows.len(),
        matrix[0][0],
        matrix[matrix.len() - 1][b.len() - 1]
    ));
    Ok(())
}

/// Part 4: real EEG, where amplitude itself tells.
fn report_bonn(
    report: &mut Report,
    path: &Path,
    epochs: usize,
    with_transfer: bool,
    cx: &Context,
) -> Result<()> {
    let pipeline = Pipeline {
        tmin: 0.0,
        tmax: f64::MAX,
        normalise: Normalise::None,
        channels: Channels::Any,
        ..Pipeline::default()
    };
    let sets = |names: &[(&str, bool)], normalise: Normalise| -> Result<Dataset> {
        let pipeline = Pipeline { normalise, ..pipeline.clone() };
        let arrays: Vec<String> = names.iter().map(|(name, _)| name.to_string()).collect();
        let mut data = from_arrays(path, &arrays, BONN_RATE, None, &pipeline)?;
        for recording in &mut data.recordings {
            let array = recording.about.id.split('/').next().unwrap_or_default();
            let label = names.iter().find(|(name, _)| *name == array).map(|(_, label)| *label);
            let recording = Arc::make_mut(recording);
            (recording.label, recording.about.label) = (label, label);
        }
        Ok(data)
    };
    let data = sets(&[("Z", false), ("O", false), ("N", false), ("F", false), ("S", true)], Normalise::None)?;
    let all: Vec<usize> = (0..data.recordings.len()).collect();
    let (train, test) = data.split(&all, 0.2, &mut cx.rng("bonn", 0))?;
    let network = ModelConfig::new(Arch::Shallow, 1, 2, BONN_WINDOW);
    let windows = WindowSet::for_training(&data, &train, network.n_times(), network.n_times());
    let model = learn(&windows, epochs).adapt(Protocol::Scratch, &new_model(&network, cx), &network, cx)?;
    let judged = judge(&model, &network, &data, &test, cx)?;
    let accuracy = |outcomes: &[Outcome]| Metrics::of(outcomes).accuracy.unwrap_or(f64::NAN);
    let baseline = line_length_accuracy(path, &train, &test, &data)?;
    report.claims.push(Claim::new(
        "Real EEG: seizures are told from the rest (Bonn, S against Z, O, N, F)",
        "not in the paper",
        accuracy(&judged),
        format!("accuracy on {} segments that were held out", test.len()),
        Threshold::AtLeast(0.95),
    ));
    let mut table = Table::new("Real EEG: the Bonn segments", &["task", "method", "segments", "accuracy"]);
    table.row([
        "seizure or not",
        "ShallowNet",
        &test.len().to_string(),
        &format!("{:.3}", accuracy(&judged)),
    ]);
    table.row([
        "seizure or not",
        "threshold of line length",
        &test.len().to_string(),
        &format!("{baseline:.3}"),
    ]);

    if !with_transfer {
        report.tables.push(table);
        return Ok(());
    }
    // Eyes open or closed in the healthy, and the hippocampus opposite or within the focus: another task at another place.
    let source = sets(&[("Z", false), ("O", true)], Normalise::Zclip2)?;
    let target = sets(&[("N", false), ("F", true)], Normalise::Zclip2)?;
    let everything: Vec<usize> = (0..source.recordings.len()).collect();
    let (pool, held_out) = target.split(&everything, 0.5, &mut cx.rng("bonn", 1))?;
    let windows = WindowSet::for_training(&source, &everything, network.n_times(), network.n_times());
    let pretrained =
        learn(&windows, epochs).adapt(Protocol::Scratch, &new_model(&network, cx), &network, cx)?;
    let own = WindowSet::for_training(&target, &pool, network.n_times(), network.n_times());
    for protocol in [Protocol::Scratch, Protocol::ZeroShot, Protocol::FineTune] {
        let model = learn(&own, epochs).adapt(protocol, &pretrained, &network, cx)?;
        let judged = judge(&model, &network, &target, &held_out, cx)?;
        table.row([
            "N or F, after Z or O".to_string(),
            protocol.to_string(),
            held_out.len().to_string(),
            format!("{:.3}", accuracy(&judged)),
        ]);
    }
    report.tables.push(table);
    Ok(())
}

/// Accuracy of the best threshold on the training segments' line length, the sum of steps between samples.
fn line_length_accuracy(path: &Path, train: &[usize], test: &[usize], data: &Dataset) -> Result<f64> {
    let mut file = read_npz(path)?;
    let mut lengths = Vec::new();
    for name in ["Z", "O", "N", "F", "S"] {
        let tensor = file.take(name)?;
        let values = tensor
            .as_ints()
            .ok_or_else(|| Error::input(path.display(), format!("{name} holds no integers")))?;
        let samples = tensor.shape.last().copied().unwrap_or(1).max(1);
        let length = |segment: &[i64]| segment.windows(2).map(|p| (p[1] - p[0]).abs()).sum::<i64>();
        lengths.extend(values.chunks(samples).map(length));
    }
    let right = |part: &[usize], threshold: i64| {
        let right = part.iter().filter(|&&at| data.recordings[at].label == Some(lengths[at] >= threshold));
        right.count() as f64 / part.len() as f64
    };
    let candidates = train.iter().map(|&at| lengths[at]);
    let best = candidates.max_by(|&a, &b| right(train, a).total_cmp(&right(train, b))).unwrap_or(0);
    Ok(right(test, best))
}
