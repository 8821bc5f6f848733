//! The reference experiment: GLA beside its ablations and baselines on the same text, and the cost of the
//! operator beside that of softmax attention.

use std::time::Instant;

use burn::module::Module;
use burn::tensor::activation::softmax;
use burn::tensor::{Bool, Distribution, Tensor};
use kiln_core::{Card, Claim, Context, Error, MemoryGauge, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::{Corpus, Tokenizer, shakespeare};
use kiln_nn::{LogRow, Outcome, TrainConfig, score_context_lengths, score_windows, train};
use kiln_ops::release_freed_memory;

use crate::lm::{Arch, Lm, LmConfig};
use crate::model::GlaLmConfig;
use crate::op::{GlaOpConfig, gla_chunk};
use crate::training::{LanguageTask, head_memory, memory_plot, memory_table};

/// Everything that differs between scales.
struct Plan {
    architectures: &'static [Arch],
    d_model: usize,
    layers: usize,
    heads: usize,
    seq_len: usize,
    batch: usize,
    steps: usize,
    seeds: u64,
    test_tokens: usize,
    /// Claim 1: nats by which GLA must be ahead of retention and of no decay.
    gate_margins: [f64; 2],
    /// Claim 2: nats by which GLA may be behind the Transformer (and Mamba).
    baseline_margin: f64,
    /// Lengths at which the operator is measured.
    op_lengths: &'static [usize],
    /// Claim 4: context lengths, the first being that of training; none to leave it out.
    contexts: &'static [usize],
}

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                architectures: &[Arch::Gla, Arch::Retnet, Arch::Linear, Arch::Llama],
                d_model: 16,
                layers: 1,
                heads: 2,
                seq_len: 32,
                batch: 2,
                steps: 3,
                seeds: 1,
                test_tokens: 256,
                gate_margins: [0.03, 0.05],
                baseline_margin: 0.08,
                op_lengths: &[128, 256],
                contexts: &[],
            },
            Scale::Quick => Self {
                d_model: 64,
                layers: 2,
                seq_len: 128,
                batch: 8,
                steps: 150,
                test_tokens: 16_384,
                op_lengths: &[1024, 2048, 4096],
                ..Self::at(Scale::Smoke)
            },
            Scale::Full => Self {
                architectures: &[Arch::Gla, Arch::Retnet, Arch::Linear, Arch::Llama, Arch::Mamba],
                d_model: 128,
                layers: 4,
                heads: 4,
                seq_len: 256,
                batch: 8,
                steps: 300,
                seeds: 2,
                test_tokens: 55_770,
                gate_margins: [0.10, 0.10],
                baseline_margin: 0.06,
                op_lengths: &[1024, 2048, 4096, 8192, 16_384],
                contexts: &[256, 512, 1024, 2048],
            },
        }
    }
}

/// What one architecture came to, over all seeds.
struct Outcomes {
    arch: Arch,
    parameters: usize,
    seconds: f64,
    test_losses: Vec<f64>,
    log: Vec<LogRow>,
    /// The model of the first seed.
    model: Lm,
}

impl Outcomes {
    fn mean_loss(&self) -> f64 {
        self.test_losses.iter().sum::<f64>() / self.test_losses.len() as f64
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    let bytes = |text: &[u8]| Corpus::from_bytes(text, &Tokenizer::Byte);
    let texts = [bytes(shakespeare::train())?, bytes(shakespeare::valid())?, bytes(shakespeare::test())?];

    // The cost first: memory is measured best before the allocator has seen much.
    let cost = measure_cost(&plan, cx);
    let mut outcomes = Vec::with_capacity(plan.architectures.len());
    for &arch in plan.architectures {
        outcomes.push(train_one(arch, &plan, &texts, cx)?);
    }
    report_losses(&mut report, &plan, &outcomes);
    report_cost(&mut report, &cost);
    if !plan.contexts.is_empty() {
        report_contexts(&mut report, &plan, &outcomes, &texts[2])?;
    }
    if let Some(gla) = outcomes.iter().find(|outcome| outcome.arch == Arch::Gla) {
        let heads = head_memory(&gla.model, &texts[1].ids[..plan.test_tokens.min(4096)], cx);
        report.tables.push(memory_table(&heads));
        report.plots.push(memory_plot(&heads));
    }
    report.notes.push(format!(
        "Text: the plays of Shakespeare as bytes, {} for training; tested on {} bytes that no model has seen. \
         Every model has the same steps ({}), batches, learning rates and seeds ({}).",
        texts[0].ids.len(),
        plan.test_tokens,
        plan.steps,
        plan.seeds,
    ));
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

fn train_one(arch: Arch, plan: &Plan, texts: &[Corpus; 3], cx: &Context) -> Result<Outcomes> {
    let gla = GlaLmConfig::new(256, plan.d_model, plan.layers, plan.heads);
    let config = LmConfig::like(arch, &gla)?;
    let [train_text, valid_text, test_text] = texts;
    let train_config = TrainConfig {
        steps: plan.steps,
        lr: 3e-3,
        warmup: plan.steps / 10,
        eval_every: (plan.steps / 5).max(1),
        checkpoint_every: 0,
        ..TrainConfig::default()
    };
    let mut seeds = Vec::new();
    let begun = Instant::now();
    for seed in 0..plan.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        let mut task = LanguageTask {
            train: train_text,
            valid: valid_text,
            seq_len: plan.seq_len,
            batch: plan.batch,
            cx,
        };
        cx.note(format!("training {} (seed {})", arch.name(), cx.seed));
        let trained = train(config.init(cx), &mut task, &train_config, None, false, cx)?;
        if trained.outcome == Outcome::Interrupted {
            return Err(Error::interrupted("the experiment was stopped"));
        }
        let test = &test_text.ids[..plan.test_tokens];
        let loss = score_windows(&trained.model, test, plan.seq_len)?.nll_nats;
        seeds.push((loss, trained));
    }
    let seconds = begun.elapsed().as_secs_f64() / plan.seeds as f64;
    let test_losses = seeds.iter().map(|(loss, _)| *loss).collect();
    let (_, first) = seeds.swap_remove(0);
    let parameters = first.model.num_params();
    Ok(Outcomes { arch, parameters, seconds, test_losses, log: first.log, model: first.model })
}

/// Claims 1 and 2: quality at equal size, steps and seeds.
fn report_losses(report: &mut Report, plan: &Plan, outcomes: &[Outcomes]) {
    let loss = |arch| outcomes.iter().find(|o| o.arch == arch).map_or(f64::NAN, Outcomes::mean_loss);
    let [retnet_margin, linear_margin] = plan.gate_margins;
    for (arch, what, margin) in
        [(Arch::Retnet, "a fixed decay", retnet_margin), (Arch::Linear, "no decay", linear_margin)]
    {
        report.claims.push(Claim::new(
            format!("The data-dependent gate is ahead of {what}"),
            "the paper compares with RetNet, whose decay is fixed",
            loss(arch) - loss(Arch::Gla),
            "nats a byte",
            Threshold::AtLeast(margin),
        ));
    }
    for (arch, what) in [(Arch::Llama, "a strong Transformer"), (Arch::Mamba, "Mamba")] {
        if outcomes.iter().any(|outcome| outcome.arch == arch) {
            report.claims.push(Claim::new(
                format!("GLA is competitive with {what} of its size"),
                "perplexity 17.2 against 16.9 (Transformer++) and 17.1 (Mamba) at 1.3 B parameters",
                loss(Arch::Gla) - loss(arch),
                "nats a byte behind",
                Threshold::AtMost(plan.baseline_margin),
            ));
        }
    }

    let mut table = Table::new(
        "Test loss",
        &["model", "parameters", "nats a byte", "bits a byte", "spread over seeds", "seconds of training"],
    );
    let mut training = Plot::lines("Training loss", "step", "nats a byte");
    let mut validation = Plot::lines("Validation loss", "step", "nats a byte");
    for outcome in outcomes {
        let losses = &outcome.test_losses;
        let spread =
            losses.iter().copied().fold(f64::MIN, f64::max) - losses.iter().copied().fold(f64::MAX, f64::min);
        table.row([
            outcome.arch.name().to_string(),
            outcome.parameters.to_string(),
            format!("{:.4}", outcome.mean_loss()),
            format!("{:.4}", outcome.mean_loss() / std::f64::consts::LN_2),
            format!("{spread:.4}"),
            format!("{:.1}", outcome.seconds),
        ]);
        let name = outcome.arch.name();
        training = training.series(name, smoothed(&outcome.log));
        let points = outcome.log.iter().filter_map(|row| Some((row.step as f64, row.val_loss?)));
        validation = validation.series(name, points.collect());
    }
    report.tables.push(table);
    report.plots.extend([training, validation]);
}

/// Losses averaged over a fortieth of the run each, so that curves can be told apart.
fn smoothed(log: &[LogRow]) -> Vec<(f64, f64)> {
    let width = (log.len() / 40).max(1);
    log.chunks(width)
        .map(|rows| {
            let mean = rows.iter().map(|row| row.loss).sum::<f64>() / rows.len() as f64;
            (rows[rows.len() / 2].step as f64, mean)
        })
        .collect()
}

/// Heads and widths at which the operator's cost is measured.
const COST_SHAPE: [usize; 3] = [2, 64, 64];

/// What attention costs at one length, forward and backward.
struct Cost {
    time: usize,
    gla_seconds: f64,
    /// Peak memory above that before the first measurement, where the system tells.
    gla_bytes: Option<u64>,
    /// Up to [`SOFTMAX_LIMIT`].
    softmax_seconds: Option<f64>,
}

/// Beyond this length softmax attention's matrices, which are kept for the backward pass, fill the memory of
/// a small machine.
const SOFTMAX_LIMIT: usize = 4096;

fn measure_cost(plan: &Plan, cx: &Context) -> Vec<Cost> {
    release_freed_memory();
    let gauge = MemoryGauge::start();
    let gla = |&time: &usize| match gauge {
        Some(gauge) => gauge.peak(|| measure_gla(time, cx)),
        None => (measure_gla(time, cx), None),
    };
    let gla: Vec<(f64, Option<u64>)> = plan.op_lengths.iter().map(gla).collect();
    let rows = plan.op_lengths.iter().zip(gla);
    rows.map(|(&time, (gla_seconds, gla_bytes))| {
        let softmax_seconds = (time <= SOFTMAX_LIMIT).then(|| measure_softmax(time, cx));
        Cost { time, gla_seconds, gla_bytes, softmax_seconds }
    })
    .collect()
}

/// Claim 3: time and memory of the operator, forward and backward, grow linearly; softmax's do not.
fn report_cost(report: &mut Report, cost: &[Cost]) {
    let claims = [
        (
            "Time of forward and backward is linear in the length",
            growth(cost, |row| Some(row.gla_seconds)),
            Threshold::AtMost(5.0),
        ),
        ("Softmax attention's time is not", growth(cost, |row| row.softmax_seconds), Threshold::AtLeast(9.0)),
        (
            "Peak memory is linear in the length",
            growth(cost, |row| Some(row.gla_bytes? as f64)),
            Threshold::AtMost(4.6),
        ),
    ];
    for (name, measured, threshold) in claims {
        let paper = "linear for GLA, quadratic for softmax";
        match measured {
            Some(measured) => {
                report.claims.push(Claim::new(name, paper, measured, "× a fourfold length", threshold));
            }
            None => report.notes.push(format!("Not measured on this system: {name}.")),
        }
    }

    let [heads, key, value] = COST_SHAPE;
    let mut table = Table::new(
        format!(
            "Cost of attention, forward and backward, batch 1, {heads} heads, keys {key}, values {value}"
        ),
        &["length", "GLA, ms", "GLA peak, MiB", "softmax, ms", "softmax's matrix alone, MiB"],
    );
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    for row in cost {
        table.row([
            row.time.to_string(),
            format!("{:.1}", 1e3 * row.gla_seconds),
            row.gla_bytes.map_or("unknown".into(), mib),
            row.softmax_seconds.map_or("–".into(), |seconds| format!("{:.1}", 1e3 * seconds)),
            mib(4 * (heads * row.time * row.time) as u64),
        ]);
    }
    report.tables.push(table);
    let curve = |of: fn(&Cost) -> Option<f64>| {
        cost.iter().filter_map(|row| Some((row.time as f64, of(row)?))).collect::<Vec<_>>()
    };
    report.plots.push(
        Plot::lines("Time of attention, forward and backward", "length in tokens", "milliseconds")
            .log_x()
            .log_y()
            .series("GLA, chunkwise", curve(|row| Some(1e3 * row.gla_seconds)))
            .series("softmax", curve(|row| Some(1e3 * row.softmax_seconds?))),
    );
    let memory = curve(|row| Some(row.gla_bytes? as f64 / f64::from(1 << 20)));
    if !memory.is_empty() {
        let plot = Plot::lines("Peak memory of attention, forward and backward", "length in tokens", "MiB");
        report.plots.push(plot.log_x().log_y().series("GLA, chunkwise", memory));
    }
}

/// By how much a figure grows as the length grows fourfold, over the last fourfold span that was measured.
///
/// A shorter span, where no more was measured, is brought to fourfold by its exponent.
fn growth(cost: &[Cost], of: fn(&Cost) -> Option<f64>) -> Option<f64> {
    let measured: Vec<(f64, f64)> = cost.iter().filter_map(|row| Some((row.time as f64, of(row)?))).collect();
    let &(longest, last) = measured.last()?;
    let &(shorter, first) =
        measured.iter().rev().find(|(time, _)| 4.0 * time <= longest).or(measured.first())?;
    (longest > shorter).then(|| ((last / first).ln() / (longest / shorter).ln() * 4f64.ln()).exp())
}

/// The median of three runs after a warm-up, in seconds.
fn median_seconds(mut run: impl FnMut()) -> f64 {
    run();
    let mut seconds: Vec<f64> = (0..3)
        .map(|_| {
            let begun = Instant::now();
            run();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[1]
}

fn random(time: usize, width: usize, cx: &Context) -> Tensor<4> {
    let device = cx.device.clone().autodiff();
    Tensor::random([1, COST_SHAPE[0], time, width], Distribution::Normal(0.0, 1.0), &device)
}

fn measure_gla(time: usize, cx: &Context) -> f64 {
    let [_, key, value] = COST_SHAPE;
    let [q, k, g] = [0; 3].map(|_| random(time, key, cx));
    let v = random(time, value, cx);
    let g = g.abs().neg().mul_scalar(0.1);
    let [q, k, v, g] = [q, k, v, g].map(|x| x.detach().require_grad());
    median_seconds(|| {
        let o = gla_chunk(q.clone(), k.clone(), v.clone(), g.clone(), None, GlaOpConfig::default());
        let gradients = o.sum().backward();
        assert!(q.grad(&gradients).is_some());
    })
}

fn measure_softmax(time: usize, cx: &Context) -> f64 {
    let [_, key, value] = COST_SHAPE;
    let [q, k] = [0; 2].map(|_| random(time, key, cx).require_grad());
    let v = random(time, value, cx).require_grad();
    let above = Tensor::<2, Bool>::tril_mask([time, time], 0, &cx.device.clone().autodiff());
    median_seconds(|| {
        let scores = q.clone().matmul(k.clone().transpose()).div_scalar((key as f64).sqrt());
        let scores = scores.mask_fill(above.clone().unsqueeze::<4>(), f32::NEG_INFINITY);
        let gradients = softmax(scores, 3).matmul(v.clone()).sum().backward();
        assert!(q.grad(&gradients).is_some());
    })
}

/// Claim 4: longer contexts than those of training do not hurt.
fn report_contexts(report: &mut Report, plan: &Plan, outcomes: &[Outcomes], test: &Corpus) -> Result<()> {
    let mut table = Table::new(
        format!("Loss of the last {} bytes against the context, nats a byte", plan.contexts[0]),
        &["model", "256", "512", "1024", "2048"],
    );
    let mut plot = Plot::lines("Loss against context", "context in bytes", "nats a byte").log_x();
    for outcome in outcomes {
        let scores = score_context_lengths(&outcome.model, &test.ids, plan.contexts, plan.contexts[0])?;
        let losses: Vec<f64> = scores.iter().map(|row| row.score.nll_nats).collect();
        let name = outcome.arch.name();
        table.row(std::iter::once(name.to_string()).chain(losses.iter().map(|loss| format!("{loss:.4}"))));
        plot =
            plot.series(name, plan.contexts.iter().map(|&c| c as f64).zip(losses.iter().copied()).collect());
        if outcome.arch == Arch::Gla {
            let worst = losses.iter().map(|loss| loss - losses[0]).fold(f64::MIN, f64::max);
            report.claims.push(Claim::new(
                "GLA's loss does not rise with contexts up to eight times those of training",
                "trained at 2048, the loss falls or stays up to 20 k tokens",
                worst,
                "nats a byte above the shortest",
                Threshold::AtMost(0.02),
            ));
        }
    }
    report.tables.push(table);
    report.plots.push(plot);
    Ok(())
}
