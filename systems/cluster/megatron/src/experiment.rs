//! The reference experiment: layouts that train alike, bubbles, what interleaving gains, the paper's Table 1.

use std::time::Instant;

use kiln_cluster::{ClusterArgs, Operation as Exchange};
use kiln_core::{Card, Claim, Context, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::shakespeare;

use crate::data::Tokens;
use crate::figures::Figure;
use crate::layout::ParallelLayout;
use crate::model::GptConfig;
use crate::perf::{Cluster, Division, GptShape, PerfModel, table1};
use crate::ranks::Ranks;
use crate::real::Real;
use crate::schedule::{Kind, Schedule};
use crate::trace::Trace;
use crate::trainer::{TrainOptions, Trainer};

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let mut report = Report::new(card, scale, cx.seed);
    report_equality(&mut report, scale, cx)?;
    report_bubbles(&mut report)?;
    report_interleaving(&mut report, scale, cx)?;
    report_table1(&mut report);
    report_divisions(&mut report);
    if scale == Scale::Full {
        report_training(&mut report, cx)?;
    }
    report.notes.push(
        "Ranks are threads of one process. The analytic model is of A100 clusters that are not at hand: its figures are \
         predictions, set beside those that the authors measured."
            .into(),
    );
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Text, as bytes.
fn text(bytes: &[u8]) -> Tokens {
    Tokens::Text { ids: bytes.iter().map(|&byte| byte.into()).collect(), shuffle: true }
}

/// What a short training gave.
struct Course<T> {
    losses: Vec<f64>,
    /// The gradient of the first step, of the parts that rank 0 has.
    gradients: Vec<(String, Vec<T>)>,
    seconds: f64,
    bubble: f64,
    /// Bytes that all ranks sent to other pipeline ranks.
    pipe_bytes: u64,
}

/// Trains for some steps on thread ranks.
fn train<T: Real>(
    config: &GptConfig,
    layout: &ParallelLayout,
    options: &TrainOptions,
    tokens: &Tokens,
    steps: usize,
    cx: &Context,
) -> Result<Course<T>> {
    let results = ClusterArgs::default().run(layout.ranks(), cx, |comm| {
        let ranks = Ranks::new(layout, comm)?;
        let mut trainer = Trainer::<T>::new(config, options, ranks, |_| None, cx)?;
        let mut losses = Vec::with_capacity(steps);
        let mut gradients = Vec::new();
        let (mut seconds, mut bubbles) = (Vec::new(), Vec::new());
        for step in 0..steps {
            let rows = tokens.batch(step, (options.batch, options.seq), options.seed);
            let result = trainer.train_step(&rows, 1e-3)?;
            if step == 0 {
                let parameters = &trainer.parameters;
                let part = |spec: &crate::parameters::Spec| {
                    (spec.name.clone(), parameters.gradients[spec.range.clone()].to_vec())
                };
                gradients =
                    parameters.specs.iter().filter(|spec| spec.shape == spec.whole).map(part).collect();
            }
            losses.push(result.loss);
            seconds.push(result.seconds);
            bubbles.push(trainer.gather_trace(&result.trace)?.bubble());
        }
        let sent = trainer.ranks.pipe.traffic().of(Exchange::Send).bytes_sent;
        Ok(Course {
            losses,
            gradients,
            seconds: median(&seconds),
            bubble: median(&bubbles),
            pipe_bytes: sent,
        })
    })?;
    let pipe_bytes = results.iter().map(|course| course.pipe_bytes).sum();
    let mut results = results;
    Ok(Course { pipe_bytes, ..results.swap_remove(0) })
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The largest difference of two runs' losses, relative.
fn loss_difference(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs() / b.abs()).fold(0.0, f64::max)
}

/// The largest difference of the gradients that both runs' first ranks have whole, relative to the largest of each.
fn gradient_difference<T: Real>(a: &Course<T>, b: &Course<T>) -> f64 {
    let mut worst = 0.0f64;
    for (name, values) in &a.gradients {
        let Some((_, others)) = b.gradients.iter().find(|(other, _)| other == name) else { continue };
        let largest = others.iter().fold(0.0f64, |m, x| m.max(x.wide().abs()));
        // Keys' biases have no gradient but rounding: softmax does not see them.
        if largest > 1e-7 {
            let difference =
                values.iter().zip(others).map(|(x, y)| (x.wide() - y.wide()).abs()).fold(0.0, f64::max);
            worst = worst.max(difference / largest);
        }
    }
    worst
}

/// Part 1: every layout trains as one rank does.
fn report_equality(report: &mut Report, scale: Scale, cx: &Context) -> Result<()> {
    const STEPS: usize = 10;
    // (t, p, d, v)
    let layouts: &[[usize; 4]] = match scale {
        Scale::Full => &[
            [2, 1, 1, 1],
            [1, 2, 1, 1],
            [1, 1, 2, 1],
            [2, 2, 1, 1],
            [2, 2, 1, 2],
            [2, 2, 2, 1],
            [2, 2, 2, 2],
        ],
        Scale::Smoke | Scale::Quick => &[[2, 1, 1, 1], [2, 2, 2, 2]],
    };
    let config = GptConfig::new(4, 32, 4, 256).with_max_seq(32);
    let tokens = text(shakespeare::train());
    let options = TrainOptions { seed: cx.seed, ..TrainOptions::new(8, 2, 32) };
    let single32 = train::<f32>(&config, &ParallelLayout::new(1, 1, 1), &options, &tokens, STEPS, cx)?;
    let single64 = train::<f64>(&config, &ParallelLayout::new(1, 1, 1), &options, &tokens, STEPS, cx)?;
    let mut table = Table::new(
        format!("{STEPS} steps of a small GPT against one rank"),
        &[
            "t",
            "p",
            "d",
            "v",
            "schedule",
            "loss, f32",
            "loss, f64",
            "first gradient, f32",
            "bytes to other stages",
        ],
    );
    let mut worst = [0.0f64; 3];
    let mut plot = Plot::lines("Training loss, whatever the layout", "step", "nats a token");
    let points =
        |losses: &[f64]| losses.iter().enumerate().map(|(step, &loss)| (step as f64, loss)).collect();
    plot = plot.series("one rank", points(&single32.losses));
    for &[t, p, d, v] in layouts {
        let layout = ParallelLayout::new(t, p, d).with_chunks(v);
        let mut kinds = vec![if v > 1 { Kind::Interleaved } else { Kind::OneForwardOneBackward }];
        if p > 1 && v == 1 {
            kinds.push(Kind::Gpipe);
        }
        for kind in kinds {
            let options = TrainOptions { schedule: kind, ..options.clone() };
            let single = train::<f32>(&config, &layout, &options, &tokens, STEPS, cx)?;
            let double = train::<f64>(&config, &layout, &options, &tokens, STEPS, cx)?;
            let found = [
                loss_difference(&single.losses, &single32.losses),
                loss_difference(&double.losses, &single64.losses),
                gradient_difference(&single, &single32),
            ];
            for (worst, found) in worst.iter_mut().zip(found) {
                *worst = worst.max(found);
            }
            let mut cells = [t, p, d, v].map(|n| n.to_string()).to_vec();
            cells.push(kind.name().into());
            cells.extend(found.map(|difference| format!("{difference:.1e}")));
            cells.push(single.pipe_bytes.to_string());
            table.row(cells);
            plot =
                plot.series(format!("t {t}, p {p}, d {d}, v {v}, {}", kind.name()), points(&single.losses));
        }
    }
    report.tables.push(table);
    report.plots.push(plot);
    for (name, measured, unit, limit) in [
        (
            "Every layout has the losses of one rank, in f32",
            worst[0],
            "largest relative difference over 10 steps",
            1e-4,
        ),
        (
            "Every layout has the losses of one rank, in f64",
            worst[1],
            "largest relative difference over 10 steps",
            1e-9,
        ),
        (
            "And its first gradient, in f32",
            worst[2],
            "largest difference, relative to a tensor's largest",
            1e-5,
        ),
    ] {
        report.claims.push(Claim::new(
            name,
            "strict optimiser semantics",
            measured,
            unit,
            Threshold::AtMost(limit),
        ));
    }
    scatter_gather(report, cx)
}

/// Part 1, continued: activations in shares are the same activations, and a t-th of the bytes.
fn scatter_gather(report: &mut Report, cx: &Context) -> Result<()> {
    let config = GptConfig::new(4, 32, 4, 256).with_max_seq(32);
    let tokens = text(shakespeare::train());
    let layout = ParallelLayout::new(2, 2, 1);
    let course = |scatter_gather| {
        let options = TrainOptions { seed: cx.seed, scatter_gather, ..TrainOptions::new(8, 2, 32) };
        train::<f32>(&config, &layout, &options, &tokens, 3, cx)
    };
    let (shares, whole) = (course(true)?, course(false)?);
    report.claims.extend([
        Claim::new(
            "Sending activations in shares changes no bit of the losses",
            "the same computation",
            loss_difference(&shares.losses, &whole.losses),
            "largest relative difference",
            Threshold::AtMost(0.0),
        ),
        Claim::new(
            "And divides the bytes between stages by t = 2",
            "b s h instead of b s h t",
            whole.pipe_bytes as f64 / shares.pipe_bytes as f64,
            "times fewer bytes",
            Threshold::AtLeast(2.0),
        ),
    ]);
    Ok(())
}

/// Part 2: idle time on a virtual clock is what the formula says.
fn report_bubbles(report: &mut Report) -> Result<()> {
    let mut table = Table::new(
        "Bubbles on a virtual clock (forward 1, backward 2)",
        &["p", "m", "v", "schedule", "measured", "(p - 1)/(v m)", "most in flight"],
    );
    let mut worst = 0.0f64;
    for p in [2, 4, 8] {
        for m in [p, 2 * p, 4 * p] {
            let mut schedules = vec![Schedule::gpipe(p, m, 1)?, Schedule::one_f_one_b(p, m, 1)?];
            for v in [1, 2, 4] {
                schedules.push(Schedule::interleaved(p, m, v)?);
            }
            for schedule in schedules {
                let measured = Trace::simulate(&schedule, 1.0, 2.0)?.bubble();
                worst = worst.max((measured - schedule.bubble()).abs());
                if p < 8 || m == 2 * p {
                    table.row([
                        p.to_string(),
                        m.to_string(),
                        schedule.chunks.to_string(),
                        schedule.kind.name().into(),
                        format!("{measured:.4}"),
                        format!("{:.4}", schedule.bubble()),
                        schedule.peak_in_flight(0).to_string(),
                    ]);
                }
            }
        }
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        "The bubble is (p - 1)/(v m) for every schedule",
        "exactly",
        worst,
        "largest difference",
        Threshold::AtMost(1e-9),
    ));
    Ok(())
}

/// Part 3: what interleaving gains, by the model and measured.
fn report_interleaving(report: &mut Report, scale: Scale, cx: &Context) -> Result<()> {
    let curves = Figure::Interleaving.curves();
    let gain = |at: usize| {
        let rate = |curve: usize| curves[curve].points[at].1.unwrap_or(f64::NAN);
        100.0 * (rate(1) / rate(0) - 1.0)
    };
    let batches: Vec<f64> = curves[0].points.iter().map(|&(batch, _)| batch).collect();
    let mut table = Table::new(
        "175 billion parameters on 96 GPUs: what two chunks a rank gain over one, by the model",
        &["batch", "gain"],
    );
    for (at, batch) in batches.iter().enumerate() {
        table.row([format!("{batch:.0}"), format!("{:.1} %", gain(at))]);
    }
    report.tables.push(table);
    report.plots.push(Figure::Interleaving.plot(&curves));
    let falls = (1..batches.len()).all(|at| gain(at) < gain(at - 1));
    report.claims.extend([
        Claim::new(
            "Interleaving gains at the smallest batches (model)",
            "10 % and more",
            gain(0).min(gain(1)),
            "% at batches of 12 and 24, the less of both",
            Threshold::AtLeast(10.0),
        ),
        Claim::new(
            "The gain falls with the batch (model)",
            "falls",
            f64::from(u8::from(falls)),
            "1 where every gain is below the one before",
            Threshold::AtLeast(1.0),
        ),
    ]);

    // On two real ranks, with layers large enough that messages cost little beside them.
    let (hidden, steps) = match scale {
        Scale::Smoke => (32, 2),
        Scale::Quick => (128, 5),
        Scale::Full => (256, 15),
    };
    // A small vocabulary keeps the last stage's logits from weighing more than its layers.
    let config = GptConfig { vocab_multiple: 1, ..GptConfig::new(8, hidden, 4, 32) }.with_max_seq(64);
    let tokens = crate::data::random_samples([steps, 8, 65], 32, cx.seed);
    let options = TrainOptions { seed: cx.seed, ..TrainOptions::new(8, 4, 64) };
    let mut table = Table::new(
        format!("Two pipeline ranks, two micro-batches, 8 layers of width {hidden}: median of {steps} steps"),
        &["schedule", "v", "ms a step", "bubble measured", "formula"],
    );
    let mut seconds = Vec::new();
    for (kind, v) in [(Kind::Gpipe, 1), (Kind::OneForwardOneBackward, 1), (Kind::Interleaved, 2)] {
        let options = TrainOptions { schedule: kind, ..options.clone() };
        let layout = ParallelLayout::new(1, 2, 1).with_chunks(v);
        let course = train::<f32>(&config, &layout, &options, &tokens, steps, cx)?;
        let formula = Schedule::new(kind, 2, 2, v)?.bubble();
        table.row([
            kind.name().to_string(),
            v.to_string(),
            format!("{:.1}", 1e3 * course.seconds),
            format!("{:.2}", course.bubble),
            format!("{formula:.2}"),
        ]);
        seconds.push(course.seconds);
    }
    report.tables.push(table);
    let measured = seconds[1] / seconds[2];
    if scale == Scale::Full {
        report.claims.push(Claim::new(
            "Interleaving gains on two real ranks",
            "(1 + 1/2)/(1 + 1/4) = 1.2 by the formula",
            measured,
            "times as fast as 1F1B",
            Threshold::AtLeast(1.05),
        ));
    } else {
        report.notes.push(format!(
            "On two thread ranks interleaving is {measured:.2} times as fast as 1F1B (by the formula 1.2); a claim at full scale, \
             where steps are long enough to be timed."
        ));
    }
    Ok(())
}

/// Part 4: the model beside the paper's weak scaling.
fn report_table1(report: &mut Report) {
    let mut table = Table::new(
        "TFLOP/s a GPU: the paper's Table 1, the model, and the same GPUs divided otherwise (model)",
        &[
            "10⁹ parameters",
            "GPUs",
            "paper",
            "model",
            "difference",
            "t = 1, pipeline only",
            "all of a copy in one tensor group",
        ],
    );
    let (mut worst, mut last, mut share) = (0.0f64, f64::NAN, f64::NAN);
    for row in table1() {
        let model = PerfModel::new(Cluster::a100_selene(row.gpus), row.shape);
        let tflops = model.iteration(&row.division).tflops;
        let difference = tflops / row.paper_tflops - 1.0;
        worst = worst.max(difference.abs());
        (last, share) = (tflops * row.gpus as f64 / 1e3, tflops / model.cluster.peak_tflops);
        let d = row.division;
        let group = d.tensor * d.pipeline;
        let other = |tensor: usize, pipeline: usize| match row.shape.layers.is_multiple_of(pipeline) {
            true => {
                let tflops = model.iteration(&Division { tensor, pipeline, chunks: 1, ..d }).tflops;
                format!("{tflops:.0}")
            }
            false => "layers do not divide".into(),
        };
        table.row([
            row.billions.to_string(),
            row.gpus.to_string(),
            format!("{:.0}", row.paper_tflops),
            format!("{tflops:.1}"),
            format!("{:+.1} %", 100.0 * difference),
            other(1, group),
            other(group, 1),
        ]);
    }
    report.tables.push(table);
    report.claims.extend([
        Claim::new(
            "The model gives the paper's weak scaling",
            "137 to 163 TFLOP/s a GPU",
            100.0 * worst,
            "% off in the worst of ten rows",
            Threshold::AtMost(10.0),
        ),
        Claim::new(
            "A trillion parameters train at the paper's rate",
            "502 petaFLOP/s",
            100.0 * (last / 502.0 - 1.0).abs(),
            "% off",
            Threshold::AtMost(10.0),
        ),
        Claim::new(
            "At half of the devices' peak",
            "52 %",
            (100.0 * share - 52.0).abs(),
            "percentage points off",
            Threshold::AtMost(5.0),
        ),
    ]);
}

/// Part 4, continued: tensor parallelism beyond the node loses.
fn report_divisions(report: &mut Report) {
    let shape = GptShape { layers: 32, hidden: 20480, heads: 128, vocab: 51200, seq: 2048 };
    let model = PerfModel::new(Cluster::a100_selene(64), shape);
    let tflops = |tensor, pipeline| {
        let division = Division { tensor, pipeline, data: 1, micro_batch: 1, chunks: 1, batch: 32 };
        model.iteration(&division).tflops
    };
    let curves = Figure::TensorPipeline.curves();
    report.plots.push(Figure::TensorPipeline.plot(&curves));
    let mut table =
        Table::new("161 billion parameters on 64 GPUs, batch 32 (model)", &["t", "p", "TFLOP/s a GPU"]);
    for (t, p) in [(2, 32), (4, 16), (8, 8), (16, 4), (32, 2)] {
        table.row([t.to_string(), p.to_string(), format!("{:.0}", tflops(t, p))]);
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        "Tensor parallelism beyond the node loses",
        "the best is t = node size",
        100.0 * (1.0 - tflops(16, 4) / tflops(8, 8)),
        "% lost by (16, 4) against (8, 8)",
        Threshold::AtLeast(40.0),
    ));
}

/// Part 5: a real training on two ranks, beside one.
fn report_training(report: &mut Report, cx: &Context) -> Result<()> {
    const STEPS: usize = 500;
    const LIMIT_SECONDS: f64 = 480.0;
    let config = GptConfig::new(4, 128, 4, 256).with_max_seq(128);
    let tokens = text(shakespeare::train());
    let options = TrainOptions { seed: cx.seed, ..TrainOptions::new(32, 8, 128) };
    let valid: Vec<u32> = shakespeare::valid().iter().map(|&byte| byte.into()).collect();
    let mut plot = Plot::lines("Training on Shakespeare, bytes", "step", "nats a byte");
    let mut table = Table::new(
        format!("4 layers, width 128, {STEPS} steps of 32 × 128 bytes"),
        &["t", "p", "last loss", "validation loss", "seconds", "tokens a second"],
    );
    let mut curves: Vec<Vec<f64>> = Vec::new();
    for [t, p] in [[1, 1], [2, 1], [1, 2]] {
        let begun = Instant::now();
        let (losses, score) =
            train_to_the_end(&config, &ParallelLayout::new(t, p, 1), &options, &tokens, STEPS, &valid, cx)?;
        let seconds = begun.elapsed().as_secs_f64();
        let points = losses.iter().enumerate().map(|(step, &loss)| (step as f64, loss)).collect();
        plot = plot.series(format!("t {t}, p {p}"), points);
        table.row([
            t.to_string(),
            p.to_string(),
            format!("{:.4}", losses.last().copied().unwrap_or(f64::NAN)),
            format!("{score:.4}"),
            format!("{seconds:.0}"),
            format!("{:.0}", (STEPS * options.batch * options.seq) as f64 / seconds),
        ]);
        if t == 2 {
            report.claims.extend([
                Claim::new(
                    "Two tensor ranks learn",
                    "trains",
                    score,
                    "nats a byte, validation",
                    Threshold::AtMost(2.2),
                ),
                Claim::new(
                    "In a few minutes",
                    "not measured",
                    seconds,
                    "s",
                    Threshold::AtMost(LIMIT_SECONDS),
                ),
            ]);
        }
        curves.push(losses);
    }
    let apart = |other: &[f64]| loss_difference(other, &curves[0]);
    report.claims.push(Claim::new(
        "And with the curve of one rank",
        "the same",
        apart(&curves[1]).max(apart(&curves[2])),
        "largest relative difference of the loss over all steps",
        Threshold::AtMost(0.02),
    ));
    report.tables.push(table);
    report.plots.push(plot);
    Ok(())
}

/// Losses of a whole training with warm-up and decay, and the loss on other text.
fn train_to_the_end(
    config: &GptConfig,
    layout: &ParallelLayout,
    options: &TrainOptions,
    tokens: &Tokens,
    steps: usize,
    valid: &[u32],
    cx: &Context,
) -> Result<(Vec<f64>, f64)> {
    let rates =
        kiln_nn::Schedule { peak: 2e-3, warmup: 20, steps, min_ratio: 0.1, decay: kiln_nn::Decay::Cosine };
    let bar = cx.progress(steps as u64, &format!("training on {} rank(s)", layout.ranks()));
    let results = ClusterArgs::default().run(layout.ranks(), cx, |comm| {
        let ranks = Ranks::new(layout, comm)?;
        let mut trainer = Trainer::<f32>::new(config, options, ranks, |_| None, cx)?;
        let mut losses = Vec::with_capacity(steps);
        for step in 0..steps {
            let rows = tokens.batch(step, (options.batch, options.seq), options.seed);
            losses.push(trainer.train_step(&rows, rates.at(step))?.loss);
            if trainer.ranks.world.rank() == 0 {
                bar.inc(1);
            }
        }
        // Other text in the same way, as batches without an update.
        let text = Tokens::Text { ids: valid.to_vec(), shuffle: false };
        let batches = (valid.len() - 1) / options.seq / options.batch;
        let mut sum = 0.0;
        for batch in 0..batches {
            sum += trainer.gradients(&text.batch(batch, (options.batch, options.seq), 0))?.loss;
        }
        Ok((losses, sum / batches as f64))
    })?;
    Ok(results.into_iter().next().unwrap_or_default())
}
