//! The reference experiment: TCN beside EMA in time, and TCNCA beside MEGA in language modelling, recall and ListOps.

use std::time::Instant;

use burn::module::Module;
use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};
use kiln_data::{Corpus, Tokenizer, shakespeare};
use kiln_nn::{Decay, LogRow, Outcome, Task, TrainConfig, Trained, score_windows, train};

use crate::checkpoint::{BYTES, draw_classifier, draw_lm};
use crate::data::{Coding, Content, Sequence, StepCoding};
use crate::layer::{MixerKind, Variant};
use crate::listops::{self, ListOps};
use crate::long_conv::fft_length;
use crate::model::{Mixers, TcncaClassifierConfig, TcncaConfig, TcncaLm, TcncaLmConfig};
use crate::recall::Recall;
use crate::speed::{self, Timing};
use crate::tcn::TcnConfig;
use crate::training::{ClassificationTask, LanguageTask, RecallTask, Scores, predict};

/// Channels and EMA states of the timings.
const SPEED: (usize, usize) = (64, 16);
/// From this length on a TCN's time a step should not change.
const LONG: usize = 4096;

/// Everything that differs between scales.
struct Plan {
    lengths: &'static [usize],
    /// Length, values and training steps of recall.
    recall: &'static [(usize, usize)],
    recall_steps: usize,
    recall_trials: usize,
    /// Training steps and test bytes of language modelling; none to leave it out.
    language: Option<(usize, usize)>,
    /// Training sequences, test sequences and training steps of ListOps; none to leave it out.
    listops: Option<[usize; 3]>,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                lengths: &[256, 1024],
                recall: &[(8, 4)],
                recall_steps: 3,
                recall_trials: 32,
                language: Some((2, 600)),
                listops: Some([24, 12, 2]),
            },
            Scale::Quick => Self {
                lengths: &[1024, 4096, 16_384],
                recall: &[(32, 8)],
                recall_steps: 300,
                recall_trials: 500,
                language: None,
                listops: None,
            },
            Scale::Full => Self {
                lengths: &[1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072],
                recall: &[
                    (32, 8),
                    (32, 16),
                    (32, 32),
                    (64, 8),
                    (64, 16),
                    (64, 32),
                    (128, 8),
                    (128, 16),
                    (128, 32),
                    (256, 8),
                    (256, 16),
                    (256, 32),
                ],
                recall_trials: 1000,
                language: Some((600, 55_770)),
                listops: Some([4000, 1000, 600]),
                ..Self::at(Scale::Quick)
            },
        }
    }
}

/// One of the compared networks.
#[derive(Clone, Copy, PartialEq)]
struct Contender {
    name: &'static str,
    variant: Variant,
    mixer: MixerKind,
}

const FULL: Contender = Contender { name: "TCNCA", variant: Variant::Full, mixer: MixerKind::Tcn };
const SIMPLIFIED: Contender =
    Contender { name: "TCNCA, simplified", variant: Variant::Simplified, mixer: MixerKind::Tcn };
const MEGA: Contender = Contender { name: "MEGA", variant: Variant::Full, mixer: MixerKind::Ema };

impl Contender {
    /// This contender's form of a network.
    fn of(self, network: &TcncaConfig) -> TcncaConfig {
        TcncaConfig { variant: self.variant, mixer: Mixers::all(self.mixer), ..network.clone() }
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    report_speed(&mut report, &plan, cx);
    if let Some((steps, test_bytes)) = plan.language {
        report_language(&mut report, steps, test_bytes, cx)?;
    }
    report_recall(&mut report, &plan, cx)?;
    if let Some(sizes) = plan.listops {
        report_listops(&mut report, sizes, cx)?;
    }
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Part 1: the mixers alone.
fn report_speed(report: &mut Report, plan: &Plan, cx: &Context) {
    let (channels, states) = SPEED;
    let tcn = TcnConfig::new(channels);
    cx.note("timing the mixers");
    let timings = speed::measure(tcn, states, 1, plan.lengths, cx);
    let Some(longest) = timings.last() else { return };
    let paper = |speedup: &str| format!("up to {speedup} times faster than MEGA's EMA by FFT, on a GPU");
    let length = longest.length;
    report.claims.extend([
        Claim::new(
            format!("The TCN is faster than the EMA by FFT over {length} steps, forward"),
            paper("7.07"),
            longest.ema_forward / longest.tcn_forward,
            "times",
            Threshold::AtLeast(1.2),
        ),
        Claim::new(
            format!("And forward and backward over {length} steps"),
            paper("2.86"),
            longest.ema_both / longest.tcn_both,
            "times",
            Threshold::AtLeast(1.0),
        ),
    ]);
    let long = timings.iter().filter(|t| t.length >= LONG);
    let each: Vec<f64> = long.map(|t| t.tcn_forward / t.length as f64).collect();
    if each.len() > 1 {
        let extremes = each.iter().fold((f64::MAX, 0.0f64), |(low, high), &t| (low.min(t), high.max(t)));
        report.claims.push(Claim::new(
            format!("The TCN's time a step does not change from {LONG} steps on"),
            "linear in the length, where the FFT takes O(L log L)",
            extremes.1 / extremes.0,
            "times the least",
            Threshold::AtMost(1.25),
        ));
    }
    let title = format!("Time of the mixers in milliseconds, {channels} channels, batch 1");
    report.tables.push(speed::table(title, &timings));
    report.plots.push(speed::plot(&timings));
    let scan = |t: &Timing| t.scan_forward / t.tcn_forward;
    report.notes.push(format!(
        "Mixers: the TCN has kernel {}, dilation factor {} and {} blocks; the EMA {states} states a channel and a kernel as long \
         as the sequence. Its baseline is a real FFT over length {} for {length} steps (even, without prime factors above 5), with \
         plans made once, the spectra of both operands kept for the backward pass, and skip and SiLU fused into the last pass.",
        tcn.kernel,
        tcn.dilation,
        tcn.blocks,
        fft_length(2 * length),
    ));
    report.notes.push(format!(
        "On a CPU the EMA need not go by FFT: as a recurrence over vectors of channels, which Kiln uses where a state is carried \
         along, its forward pass takes {:.2} times the time of the TCN over {length} steps. The paper compares with the FFT.",
        scan(longest)
    ));
}

/// Highest learning rate of texts and expressions, and of recall.
const LR: [f64; 2] = [2e-3, 4e-3];

/// The recipe of all trainings here.
fn recipe(steps: usize, lr: f64) -> TrainConfig {
    TrainConfig {
        steps,
        lr,
        warmup: steps / 10,
        min_lr_ratio: 0.0,
        decay: Decay::Linear,
        betas: (0.9, 0.98),
        weight_decay: 0.1,
        clip_norm: 0.25,
        eval_every: 0,
        checkpoint_every: 0,
        patience: None,
        ..TrainConfig::default()
    }
}

/// Trains without a folder; returns the run and its seconds.
fn learn<M: Module>(
    model: M,
    task: &mut impl Task<M>,
    recipe: &TrainConfig,
    cx: &Context,
) -> Result<(Trained<M>, f64)> {
    let begun = Instant::now();
    let trained = train(model, task, recipe, None, false, cx)?;
    if trained.outcome == Outcome::Interrupted {
        return Err(Error::interrupted("the experiment was stopped"));
    }
    Ok((trained, begun.elapsed().as_secs_f64()))
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

/// Part 2: language models of bytes, with equal parameters.
fn report_language(report: &mut Report, steps: usize, test_bytes: usize, cx: &Context) -> Result<()> {
    const SEQ_LEN: usize = 256;
    const BATCH: usize = 8;
    let bytes = |text: &[u8]| Corpus::from_bytes(text, &Tokenizer::Byte);
    let [train_text, valid_text, test_text] =
        [bytes(shakespeare::train())?, bytes(shakespeare::valid())?, bytes(shakespeare::test())?];
    let network = TcncaConfig {
        kernel: 5,
        dilation_factor: 3,
        tcn_blocks: 4,
        chunk: 64,
        ffn_dim: 256,
        ..TcncaConfig::new(64, 2)
    };
    let lm = |contender: Contender, ffn_dim| TcncaLmConfig {
        network: TcncaConfig { ffn_dim, ..contender.of(&network) },
        vocab: BYTES,
    };
    let mega = lm(MEGA, network.ffn_dim).init(&cx.device).num_params();
    // The channel maps of the TCN have more parameters than the EMA; the feed-forward map gives way.
    let equal = |contender| {
        let apart = |ffn_dim: &usize| lm(contender, *ffn_dim).init(&cx.device).num_params().abs_diff(mega);
        (1..=2 * network.ffn_dim).rev().step_by(4).min_by_key(apart).unwrap_or(network.ffn_dim)
    };
    let mut table = Table::new(
        format!("Bytes of Shakespeare: {steps} steps of {BATCH} windows of {SEQ_LEN}"),
        &["model", "parameters", "feed-forward width", "bits a byte (test)", "seconds a step"],
    );
    let mut curves = Plot::lines("Learning to predict bytes", "step", "nats a byte");
    let mut found = Vec::new();
    for contender in [FULL, SIMPLIFIED, MEGA] {
        cx.note(format!("training {} on bytes", contender.name));
        let ffn_dim = if contender == MEGA { network.ffn_dim } else { equal(contender) };
        let model = draw_lm(&lm(contender, ffn_dim), cx);
        let parameters = model.num_params();
        let mut task =
            LanguageTask { train: &train_text, valid: &valid_text, seq_len: SEQ_LEN, batch: BATCH, cx };
        let (trained, _) = learn(model, &mut task, &recipe(steps, LR[0]), cx)?;
        let test = &test_text.ids[..test_bytes.min(test_text.ids.len())];
        let bits = score_windows(&trained.last, test, SEQ_LEN)?.nll_nats / std::f64::consts::LN_2;
        let seconds = median_step(&trained.log);
        table.row([
            contender.name.to_string(),
            parameters.to_string(),
            ffn_dim.to_string(),
            format!("{bits:.4}"),
            format!("{seconds:.4}"),
        ]);
        curves = curves.series(contender.name, smoothed(&trained.log));
        found.push((bits, seconds));
    }
    report.tables.push(table);
    report.plots.push(curves);
    let (tcnca, mega) = (found[0], found[2]);
    report.claims.extend([
        Claim::new(
            "TCNCA predicts bytes as well as MEGA with as many parameters",
            "a lower loss than MEGA on EnWik8",
            tcnca.0 - mega.0,
            "bits a byte behind",
            Threshold::AtMost(0.02),
        ),
        Claim::new(
            "And its training step takes less time",
            "1.37 and 1.24 times faster in forward and backward pass on EnWik8",
            tcnca.1 / mega.1,
            "of MEGA's time",
            Threshold::AtMost(1.0),
        ),
    ]);
    Ok(())
}

/// The median time of a training step.
fn median_step(log: &[LogRow]) -> f64 {
    let mut seconds: Vec<f64> = log.windows(2).map(|rows| rows[1].seconds - rows[0].seconds).collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Part 3: associative recall.
fn report_recall(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let contenders = [SIMPLIFIED, FULL, MEGA];
    let mut table = Table::new(
        format!("Associative recall after {} steps: share of right answers", plan.recall_steps),
        &["length", "values", "TCNCA, simplified", "TCNCA", "MEGA"],
    );
    let mut curves = Plot::lines("Learning recall (length 32, 8 values)", "step", "nats an answer");
    let mut sums = [0.0; 3];
    let mut easiest = f64::NAN;
    for &(length, values) in plan.recall {
        let recall = Recall { length, values };
        let mut row = vec![length.to_string(), values.to_string()];
        for (sum, contender) in sums.iter_mut().zip(contenders) {
            cx.note(format!("training {} on recall of {length} symbols, {values} values", contender.name));
            let (accuracy, trained) = recall_accuracy(contender, recall, plan, cx)?;
            *sum += accuracy / plan.recall.len() as f64;
            row.push(format!("{accuracy:.3}"));
            if (length, values) == plan.recall[0] {
                curves = curves.series(contender.name, smoothed(&trained.log));
                if contender == SIMPLIFIED {
                    easiest = accuracy;
                }
            }
        }
        table.row(row);
    }
    report.tables.push(table);
    report.plots.push(curves);
    let paper = "the simplified TCNCA is superior or competitive over lengths and vocabularies";
    report.claims.extend([
        Claim::new(
            "The simplified TCNCA recalls as well as MEGA, on average",
            paper,
            sums[0] - sums[2],
            "of the answers ahead",
            Threshold::AtLeast(-0.02),
        ),
        Claim::new(
            format!("And solves {} symbols with {} values", plan.recall[0].0, plan.recall[0].1),
            paper,
            easiest,
            "of the answers",
            Threshold::AtLeast(0.95),
        ),
    ]);
    report.notes.push(format!(
        "Recall: two layers of width 48, batches of 32 fresh sequences, one chunk; every model has the same sequences, {} steps \
         and the learning rate {}, and is tested on {} others.",
        plan.recall_steps, LR[1], plan.recall_trials
    ));
    Ok(())
}

fn recall_accuracy(
    contender: Contender,
    recall: Recall,
    plan: &Plan,
    cx: &Context,
) -> Result<(f64, Trained<TcncaLm>)> {
    let network = TcncaConfig {
        kernel: 5,
        dilation_factor: 3,
        tcn_blocks: 3,
        chunk: recall.length + 1,
        ..TcncaConfig::new(48, 2)
    };
    let config = TcncaLmConfig { network: contender.of(&network), vocab: recall.vocab() };
    let mut task = RecallTask { recall, batch: 32, cx };
    let (trained, _) = learn(draw_lm(&config, cx), &mut task, &recipe(plan.recall_steps, LR[1]), cx)?;
    Ok((task.accuracy(&trained.last, plan.recall_trials), trained))
}

/// Part 4: ListOps.
fn report_listops(
    report: &mut Report,
    [train_count, test_count, steps]: [usize; 3],
    cx: &Context,
) -> Result<()> {
    let listops = ListOps { min_len: 50, max_len: 200, max_depth: 6, max_args: 5 };
    let mut rng = cx.rng("listops", 0);
    let mut sequences = (0..train_count + test_count)
        .map(|_| {
            let (text, value) = listops.draw(&mut rng)?;
            Ok(Sequence { content: Content::Text(text.into()), label: Some(value.to_string()) })
        })
        .collect::<Result<Vec<_>>>()?;
    let test = sequences.split_off(train_count);
    let coding = Coding {
        steps: StepCoding::Words(listops::SYMBOLS.map(String::from).to_vec()),
        classes: (0..10).map(|digit| digit.to_string()).collect(),
        max_len: listops.max_len,
        truncate: false,
    };
    let network =
        TcncaConfig { kernel: 5, dilation_factor: 3, tcn_blocks: 3, chunk: 64, ..TcncaConfig::new(64, 2) };
    let mut table = Table::new(
        format!("ListOps, 50 to 200 symbols: {train_count} expressions, {steps} steps of 32"),
        &["model", "parameters", "accuracy", "commonest label", "seconds of training"],
    );
    let mut curves = Plot::lines("Learning ListOps", "step", "nats a label");
    let mut accuracies = Vec::new();
    let mut majority = f64::NAN;
    for contender in [FULL, SIMPLIFIED, MEGA] {
        cx.note(format!("training {} on ListOps", contender.name));
        let config = TcncaClassifierConfig {
            network: contender.of(&network),
            input: coding.input(),
            classes: coding.classes.len(),
            causal: false,
        };
        let model = draw_classifier(&config, cx);
        let parameters = model.num_params();
        let mut task = ClassificationTask::new([&sequences, &test[..8]], &coding, false, 32, cx);
        let (trained, seconds) = learn(model, &mut task, &recipe(steps, LR[0]), cx)?;
        let scores = Scores::new(&predict(&trained.last, &coding, &test, cx), &test, &coding);
        table.row([
            contender.name.to_string(),
            parameters.to_string(),
            format!("{:.3}", scores.accuracy),
            format!("{:.3}", scores.majority),
            format!("{seconds:.1}"),
        ]);
        curves = curves.series(contender.name, smoothed(&trained.log));
        accuracies.push(100.0 * scores.accuracy);
        majority = 100.0 * scores.majority;
    }
    report.tables.push(table);
    report.plots.push(curves);
    report.claims.extend([
        Claim::new(
            "TCNCA evaluates ListOps as well as MEGA",
            "similar accuracy to MEGA over the Long Range Arena",
            accuracies[0] - accuracies[2],
            "points ahead",
            Threshold::AtLeast(-3.0),
        ),
        Claim::new(
            "And better than the commonest answer",
            "similar accuracy to MEGA over the Long Range Arena",
            accuracies[0] - majority,
            "points ahead",
            Threshold::AtLeast(8.0),
        ),
    ]);
    Ok(())
}
