//! The reference experiment: one program in any parallel, what selection saves, what registers gain, and time a step.

use std::time::{Duration, Instant};

use burn::tensor::TensorData;
use burn_flex::FlexTensor;
use kiln_cluster::{ClusterArgs, Op};
use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};

use crate::actor::{self, Queue, chain, simulate};
use crate::case::{Case, Examples};
use crate::compile::{Compiler, Parallel};
use crate::execute::Run;
use crate::graph::Logical;
use crate::linear::Linear;
use crate::optimiser::{Kind, Optimiser, State};
use crate::parts;
use crate::pipeline::{self, Flow, Pipeline, cut};
use crate::sbp::{Placement, Region};
use crate::train::train;

const PARALLELS: [Parallel; 3] = [Parallel::Data, Parallel::Model, Parallel::Auto];
const OPTIMISER: Optimiser = Optimiser { kind: Kind::Sgd, lr: 0.01 };
/// Stages of a pipeline.
const STAGES: usize = 2;
/// Steps over which losses are compared.
const STEPS: usize = 10;

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let mut report = Report::new(card, scale, cx.seed);
    report_cases(&mut report, scale, cx)?;
    report_selection(&mut report, cx)?;
    report_actors(&mut report, scale, cx)?;
    report_time(&mut report, scale, cx)?;
    report.notes.push(
        "Ranks are threads of one process. The bytes of eight and more devices are the compiler's, which needs none of them."
            .into(),
    );
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// A case with its batch and mesh.
struct Study {
    case: Case,
    batch: usize,
    mesh: Vec<usize>,
}

fn studies(scale: Scale) -> Vec<Study> {
    let mlp = Case::Mlp { inputs: 64, hidden: 128, classes: 10 };
    match scale {
        Scale::Smoke => vec![Study { case: mlp, batch: 16, mesh: vec![2] }],
        Scale::Quick => vec![
            Study { case: mlp, batch: 64, mesh: vec![2] },
            Study {
                case: Case::SoftmaxHead { inputs: 64, embedding: 128, classes: 10_000 },
                batch: 64,
                mesh: vec![2],
            },
        ],
        Scale::Full => vec![
            Study { case: mlp, batch: 64, mesh: vec![4] },
            Study {
                case: Case::SoftmaxHead { inputs: 64, embedding: 128, classes: 100_000 },
                batch: 64,
                mesh: vec![4],
            },
            Study {
                case: Case::WideDeep { rows: 100_000, width: 8, hidden: 128 },
                batch: 256,
                mesh: vec![4],
            },
            Study {
                case: Case::HybridGpt { vocab: 256, seq: 32, hidden: 64, heads: 4, layers: 2 },
                batch: 8,
                mesh: vec![2, 2],
            },
        ],
    }
}

/// What some steps gave.
struct Course {
    losses: Vec<f32>,
    /// Bytes a step: of all ranks, and as predicted.
    sent: f64,
    predicted: f64,
    seconds: f64,
}

fn steps(
    study: &Study,
    mesh: &[usize],
    parallel: Parallel,
    registers: Option<usize>,
    count: usize,
    cx: &Context,
) -> Result<Course> {
    let placement = Placement::mesh(mesh)?;
    let (case, batch) = (&study.case, study.batch);
    let logical = case.logical(batch, &case.initial(cx.seed))?;
    let physical = Compiler::new(logical.clone()).parallel(parallel, &placement).compile(&placement)?;
    let examples = Examples::generated(case);
    let run = Run { pieces: count, registers, optimiser: OPTIMISER, seed: cx.seed, ..Run::default() };
    let feed = |step: usize| Ok(examples.batch(case, batch, cx.seed, step as u64));
    let mut ranks = ClusterArgs::default()
        .run(placement.len(), cx, |world| train(&physical, &logical, &world, &run, &feed, cx, &|_| {}))?;
    let sent: u64 = ranks.iter().map(|rank| rank.bytes_sent).sum();
    let first = ranks.swap_remove(0);
    if first.stopped {
        return Err(Error::interrupted("the experiment was stopped"));
    }
    Ok(Course {
        losses: first.losses,
        sent: sent as f64 / count as f64,
        predicted: physical.bytes() as f64,
        seconds: first.seconds / count as f64,
    })
}

/// The same in two stages, each on `mesh`, with micro-batches that flow through actors with two registers.
fn staged_steps(study: &Study, mesh: &[usize], count: usize, cx: &Context) -> Result<Course> {
    const MICRO_BATCHES: usize = 4;
    let placement = Placement::mesh(mesh)?;
    let (case, batch) = (&study.case, study.batch);
    let objective = case.objective(batch / MICRO_BATCHES)?;
    let logical = Logical::training(&objective, "loss", &case.initial(cx.seed))?;
    let stages = cut(&objective, &logical.variables, Some("loss"), STAGES, &[])?;
    let pipeline = Pipeline::compile(stages, &placement, |compiler, _| Ok(compiler))?;
    let examples = Examples::generated(case);
    let run = Run {
        pieces: MICRO_BATCHES,
        registers: Some(STAGES),
        optimiser: OPTIMISER,
        seed: cx.seed,
        ..Run::default()
    };
    let flow = Flow { steps: count, first: 0, run };
    let feed = |piece: usize| {
        let whole = examples.batch(case, batch, cx.seed, (piece / MICRO_BATCHES) as u64);
        let rows = |data: &TensorData| {
            let all = Region::whole(data.shape());
            parts::cut(data, &all.split(0, MICRO_BATCHES, piece % MICRO_BATCHES))
        };
        whole.iter().map(rows).collect()
    };
    let mut ranks = ClusterArgs::default()
        .run(pipeline.ranks(), cx, |world| pipeline::train(&pipeline, &world, &flow, &feed, cx, &|_| {}))?;
    let sent: u64 = ranks.iter().map(|rank| rank.bytes_sent).sum();
    let first = ranks.swap_remove(0);
    if first.stopped {
        return Err(Error::interrupted("the experiment was stopped"));
    }
    Ok(Course {
        losses: first.losses,
        sent: sent as f64 / count as f64,
        predicted: (pipeline.bytes() * MICRO_BATCHES as u64 + pipeline.step_bytes()) as f64,
        seconds: first.seconds / count as f64,
    })
}

/// Parts 1 and 2: every case in every parallel, against one device.
fn report_cases(report: &mut Report, scale: Scale, cx: &Context) -> Result<()> {
    let mut table = Table::new(
        format!("{STEPS} steps of training in data, model and the compiler's parallel, and in two stages"),
        &["case", "devices", "parallel", "loss from one device's", "bytes a step", "predicted", "last loss"],
    );
    let (mut worst_loss, mut worst_ratio, mut worst_count) = (0.0f64, 0.0f64, 0.0f64);
    let mut bars = vec![Vec::new(); PARALLELS.len() + 1];
    let studies = studies(scale);
    let progress = cx.progress((studies.len() * (2 + PARALLELS.len())) as u64, "trainings");
    for study in &studies {
        let single = steps(study, &[1], Parallel::Auto, None, STEPS, cx)?;
        progress.inc(1);
        let mut sent = Vec::new();
        // As many devices in two stages.
        let mut half = study.mesh.clone();
        half[0] = (half[0] / STAGES).max(1);
        for (at, bars) in bars.iter_mut().enumerate() {
            let parallel = PARALLELS.get(at).copied();
            let course = match parallel {
                Some(parallel) => steps(study, &study.mesh, parallel, Some(2), STEPS, cx)?,
                None => staged_steps(study, &half, STEPS, cx)?,
            };
            progress.inc(1);
            let difference =
                course.losses.iter().zip(&single.losses).map(|(a, b)| f64::from((a - b).abs() / b.abs()));
            let difference = difference.fold(0.0, f64::max);
            worst_loss = worst_loss.max(difference);
            worst_count = worst_count.max((course.sent - course.predicted).abs());
            if parallel.is_some() {
                sent.push(course.sent);
            }
            bars.push(course.sent.max(1.0));
            table.row([
                study.case.name().to_string(),
                study.mesh.iter().map(usize::to_string).collect::<Vec<_>>().join(" x "),
                parallel.map_or("two stages", Parallel::name).to_string(),
                format!("{difference:.1e}"),
                format!("{:.0}", course.sent),
                format!("{:.0}", course.predicted),
                format!("{:.4}", course.losses.last().copied().unwrap_or(f32::NAN)),
            ]);
        }
        let least = sent[0].min(sent[1]);
        worst_ratio = worst_ratio.max(if least > 0.0 {
            sent[2] / least
        } else if sent[2] > 0.0 {
            f64::INFINITY
        } else {
            0.0
        });
    }
    report.tables.push(table);
    let names: Vec<&str> = studies.iter().map(|study| study.case.name()).collect();
    let series: Vec<(&str, Vec<f64>)> =
        PARALLELS.iter().map(|parallel| parallel.name()).chain(["two stages"]).zip(bars).collect();
    report.plots.push(Plot::bars("Bytes that all devices send in a step", "bytes", names, series).log_y());
    report.claims.push(Claim::new(
        "One program in any parallel: the losses are those of one device",
        "a global tensor's value does not depend on its SBP",
        worst_loss,
        "largest relative difference over 10 steps",
        Threshold::AtMost(1e-4),
    ));
    report.claims.push(Claim::new(
        "The compiler's choice moves no more than data or model parallel",
        "the compiler selects the cheapest signatures",
        worst_ratio,
        "of the lesser's bytes, in the worst case",
        Threshold::AtMost(1.0),
    ));
    report.claims.push(Claim::new(
        "As many bytes are sent as the compiler predicts",
        "table 2",
        worst_count,
        "bytes a step difference at most",
        Threshold::AtMost(0.0),
    ));
    Ok(())
}

/// Part 2: the head of a hundred thousand classes on eight devices.
fn report_selection(report: &mut Report, cx: &Context) -> Result<()> {
    const DEVICES: usize = 8;
    let linear = Linear { batch: 64, features: 512, classes: 100_000 };
    let found = linear.select(DEVICES)?;
    let mut table = Table::new(
        format!(
            "A step of a linear classifier, {} x {} x {} on {DEVICES} devices",
            linear.batch, linear.features, linear.classes
        ),
        &["weight", "bytes"],
    );
    for selected in &found.by_weight_sbp {
        table.row([selected.weight.to_string(), format!("{:.0}", selected.bytes)]);
    }
    let case = Case::SoftmaxHead { inputs: 64, embedding: 128, classes: 100_000 };
    let logical = case.logical(64, &case.initial(cx.seed))?;
    let placement = Placement::mesh(&[DEVICES])?;
    let bytes = |parallel: Parallel| -> Result<f64> {
        let physical = Compiler::new(logical.clone()).parallel(parallel, &placement).compile(&placement)?;
        Ok(physical.bytes() as f64)
    };
    let (data, auto) = (bytes(Parallel::Data)?, bytes(Parallel::Auto)?);
    table.row(["the whole softmax head, data parallel".to_string(), format!("{data:.0}")]);
    table.row(["the whole softmax head, the compiler's choice".to_string(), format!("{auto:.0}")]);
    report.tables.push(table);
    report.claims.push(Claim::new(
        "A head of 100 000 classes on 8 devices moves far less than in data parallel",
        "InsightFace: the split head makes training of such heads possible",
        data / auto,
        "times fewer bytes",
        Threshold::AtLeast(20.0),
    ));
    Ok(())
}

/// Part 3: registers.
fn report_actors(report: &mut Report, scale: Scale, cx: &Context) -> Result<()> {
    const STAGES: [&str; 4] = ["load", "copy", "compute", "send"];
    let pieces = if scale == Scale::Smoke { 6 } else { 30 };
    let stage = Duration::from_millis(if scale == Scale::Full { 10 } else { 4 });
    let mut table = Table::new(
        "Four stages of equal length",
        &[
            "registers",
            "6 pieces on the virtual clock",
            "in use at most",
            "1000 pieces",
            "in use at most",
            "on threads, s",
            "in use at most",
        ],
    );
    let mut measured = Vec::new();
    let mut largest = 0.0f64;
    for registers in [1, 2] {
        let network = chain(&[3.0; 4], &[registers; 3])?;
        let (short, long) = (simulate(&network, 6)?, simulate(&network, 1000)?);
        let queues = STAGES.iter().map(|name| Queue {
            name: (*name).into(),
            act: Box::new(|actor: usize, _: usize, _: &[()]| {
                std::thread::sleep(stage);
                Ok(if actor + 1 < STAGES.len() { vec![()] } else { Vec::new() })
            }),
            ordered: false,
        });
        let begun = Instant::now();
        let course = actor::run(&network, pieces, queues.collect(), |_| (), 0, false)?;
        let seconds = begun.elapsed().as_secs_f64();
        measured.push(seconds);
        let peak = |peaks: &[usize]| peaks.iter().copied().max().unwrap_or(0);
        for peaks in [&short.peak_registers, &long.peak_registers, &course.peak_registers] {
            largest = largest.max(peak(peaks) as f64 / registers as f64);
        }
        table.row([
            registers.to_string(),
            short.makespan.to_string(),
            peak(&short.peak_registers).to_string(),
            long.makespan.to_string(),
            peak(&long.peak_registers).to_string(),
            format!("{seconds:.3}"),
            peak(&course.peak_registers).to_string(),
        ]);
        if cx.interrupted() {
            return Err(Error::interrupted("the experiment was stopped"));
        }
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        format!(
            "Two registers instead of one overlap four equal stages ({pieces} pieces, threads that sleep)"
        ),
        "1.56 for 6 pieces, 2 in the long run",
        measured[0] / measured[1],
        "times faster",
        Threshold::AtLeast(1.4),
    ));
    report.claims.push(Claim::new(
        "Never more registers are in use than there are, however many pieces go through",
        "memory is bounded when the graph is compiled",
        largest,
        "of the registers in use at most",
        Threshold::AtMost(1.0),
    ));
    Ok(())
}

/// Part 4: time a step on two ranks, against data parallel by hand.
fn report_time(report: &mut Report, scale: Scale, cx: &Context) -> Result<()> {
    const RANKS: usize = 2;
    let (hidden, count) = match scale {
        Scale::Smoke => (64, 4),
        Scale::Quick => (1024, 20),
        Scale::Full => (2048, 40),
    };
    let study = Study { case: Case::Mlp { inputs: 64, hidden, classes: 10 }, batch: 256, mesh: vec![RANKS] };
    // In turn, the least of some tries: a busy machine only adds.
    let tries = if scale == Scale::Smoke { 1 } else { 3 };
    let mut least = [f64::INFINITY; 4];
    for _ in 0..tries {
        let seconds = [
            by_hand(&study, RANKS, count, cx)?,
            steps(&study, &study.mesh, Parallel::Auto, Some(2), count, cx)?.seconds,
            steps(&study, &study.mesh, Parallel::Data, Some(2), count, cx)?.seconds,
            steps(&study, &study.mesh, Parallel::Data, None, count, cx)?.seconds,
        ];
        least.iter_mut().zip(seconds).for_each(|(least, seconds)| *least = least.min(seconds));
    }
    let mut table = Table::new(
        format!("A step of two layers, 64 x {hidden} x 10, batch {} on {RANKS} ranks", study.batch),
        &["how", "ms"],
    );
    let names = [
        "data parallel by hand",
        "the compiler's choice, actors",
        "data parallel, actors",
        "data parallel, one after another",
    ];
    for (name, seconds) in names.iter().zip(least) {
        table.row([(*name).to_string(), format!("{:.3}", 1e3 * seconds)]);
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        "A step takes no longer than in data parallel by hand",
        "as fast as hand-written parallelism",
        least[0] / least[1],
        "of the speed by hand",
        Threshold::AtLeast(0.95),
    ));
    Ok(())
}

/// Seconds a step of data parallel as one writes it by hand: every rank computes gradients of its part of the batch, then all
/// are averaged, then the weights change.
fn by_hand(study: &Study, ranks: usize, count: usize, cx: &Context) -> Result<f64> {
    let (case, batch) = (&study.case, study.batch / ranks);
    let graph = case.gradients(batch)?;
    let initial = case.initial(cx.seed);
    let examples = Examples::generated(case);
    let seconds = ClusterArgs::default().run(ranks, cx, |world| {
        let values =
            initial.values().map(|value| Some(State::new(FlexTensor::from_data(value.clone()), Vec::new())));
        let mut states: Vec<Option<State>> = values.collect();
        let names: Vec<&String> = initial.keys().collect();
        let begun = Instant::now();
        for step in 0..count {
            let data = examples.batch(case, batch, cx.seed + world.rank() as u64, step as u64);
            let mut data = data.into_iter();
            let inputs = graph.inputs.iter().map(|input| {
                let weight = names.iter().position(|name| **name == input.port.name);
                match weight.and_then(|at| states[at].as_ref()) {
                    Some(state) => Ok(state.value.clone().into_data()),
                    None => {
                        data.next().ok_or_else(|| Error::work("the graph has more inputs than an example"))
                    }
                }
            });
            let outputs = graph.run(&inputs.collect::<Result<Vec<_>>>()?)?;
            for (state, gradient) in states.iter_mut().zip(outputs.into_iter().skip(1)) {
                let shape = gradient.shape().to_vec();
                let mut values: Vec<f32> = gradient.iter().collect();
                world.all_reduce(&mut values, Op::Avg)?;
                let gradient = FlexTensor::from_data(TensorData::new(values, shape));
                *state = state.take().map(|state| OPTIMISER.step(state, gradient, step, 1.0));
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    })?;
    Ok(seconds.into_iter().fold(0.0, f64::max) / count as f64)
}
