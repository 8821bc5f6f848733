//! The reference experiment: Match3 in closed form and learned, the polynomial's error, and the cost of both algorithms.

use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Tensor, TensorData};
use kiln_core::{Card, Claim, Context, Error, Plot, Report, Result, Scale, Table, Threshold};
use kiln_nn::{LogRow, Outcome, TrainConfig, initialise, train};
use rand::{Rng, RngExt};

use crate::attention::{AttentionOptions, tensor_attention};
use crate::data::{Coding, Sequence, Token};
use crate::match3::{Convention, Instance, MatchConstruction};
use crate::model::{Input, KroneckerTransformerConfig, Target};
use crate::plan::{admissible_entries, score_bound};
use crate::polynomial::{Basis, ExpPolynomial, tensor_attention_poly};
use crate::training::{ClassificationTask, Scores, predict};

/// The Match3 that is learned.
#[derive(Clone, Copy)]
struct Problem {
    /// Tokens of an instance.
    n: usize,
    /// M
    modulus: u64,
}

/// The problem of the claims.
const MATCH3: Problem = Problem { n: 8, modulus: 31 };
/// A larger one, and the steps it is trained for; reported without a threshold.
const LARGER: (Problem, usize) = (Problem { n: 12, modulus: 61 }, 3000);
/// Frequencies of the residues that the models see.
const FREQUENCIES: usize = 8;

/// Everything that differs between scales.
struct Plan {
    instances: usize,
    steps: usize,
    seeds: u64,
    test_sequences: usize,
    /// Least accuracy of the tensor model.
    tensor_accuracy: f64,
    /// Whether the larger problem is learned too.
    larger: bool,
    /// Largest entries and widths of the error's cases.
    error_cases: &'static [(f32, usize)],
    exact_lengths: &'static [usize],
    poly_lengths: &'static [usize],
}

impl Plan {
    fn at(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                instances: 5,
                steps: 3,
                seeds: 1,
                test_sequences: 16,
                tensor_accuracy: 0.80,
                larger: false,
                error_cases: &[(1.0, 4)],
                exact_lengths: &[16, 32],
                poly_lengths: &[64, 128],
            },
            Scale::Quick => Self {
                instances: 200,
                steps: 600,
                test_sequences: 1000,
                error_cases: &[(1.0, 4), (2.0, 6)],
                exact_lengths: &[64, 128, 256],
                poly_lengths: &[1024, 4096, 16_384],
                ..Self::at(Scale::Smoke)
            },
            Scale::Full => Self {
                steps: 900,
                seeds: 3,
                test_sequences: 2000,
                tensor_accuracy: 0.85,
                larger: true,
                error_cases: &[
                    (0.5, 4),
                    (1.0, 4),
                    (1.5, 4),
                    (2.0, 4),
                    (0.5, 6),
                    (1.0, 6),
                    (1.5, 6),
                    (2.0, 6),
                ],
                exact_lengths: &[64, 128, 256, 512],
                poly_lengths: &[1024, 4096, 16_384, 65_536],
                ..Self::at(Scale::Quick)
            },
        }
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    report_closed_form(&mut report, &plan, cx);
    report_learned(&mut report, &plan, cx)?;
    report_error(&mut report, &plan, cx)?;
    report_cost(&mut report, &plan, cx)?;
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

/// Part 1: one head with weights in closed form.
fn report_closed_form(report: &mut Report, plan: &Plan, cx: &Context) {
    let mut rng = cx.rng("closed form", 0);
    let (mut right, mut labels, mut furthest) = (0, 0, 0.0f64);
    for _ in 0..plan.instances {
        let instance = Instance::draw(rng.random_range(3..=12), rng.random_range(5..=39), &mut rng);
        let found = MatchConstruction { modulus: instance.modulus }.solve(&instance.x, &cx.device);
        for (o, label) in found.iter().zip(instance.labels(Convention::Any)) {
            labels += 1;
            right += usize::from((*o > 0.5) == label);
            furthest = furthest.max((f64::from(*o) - f64::from(u8::from(label))).abs());
        }
    }
    report.claims.push(Claim::new(
        "One tensor-attention head with weights in closed form solves Match3",
        "one unit suffices, where pairwise attention needs many heads or layers",
        100.0 * right as f64 / labels as f64,
        "% of tokens",
        Threshold::AtLeast(100.0),
    ));
    report.notes.push(format!(
        "Closed form: {} random instances, {labels} tokens; the output furthest from its label is {furthest:.1e} away.",
        plan.instances
    ));
}

/// One of the compared networks.
struct Contender {
    name: &'static str,
    orders: Vec<usize>,
}

/// What a contender came to.
struct Outcomes {
    name: &'static str,
    parameters: usize,
    accuracies: Vec<f64>,
    majority: f64,
    seconds: f64,
    log: Vec<LogRow>,
}

impl Outcomes {
    fn accuracy(&self) -> f64 {
        self.accuracies.iter().sum::<f64>() / self.accuracies.len() as f64
    }
}

/// Part 2: Match3 learned from examples, beside pairwise attention.
fn report_learned(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let contenders = [
        Contender { name: "tensor, 1 layer", orders: vec![2] },
        Contender { name: "pairwise, 1 layer", orders: vec![1] },
        Contender { name: "pairwise, 2 layers", orders: vec![1, 1] },
    ];
    let compare = |problem, steps, seeds| {
        contenders
            .iter()
            .map(|contender| learn(contender, problem, steps, seeds, plan.test_sequences, cx))
            .collect::<Result<Vec<_>>>()
    };
    let outcomes = compare(MATCH3, plan.steps, plan.seeds)?;
    report.tables.push(outcome_table(MATCH3, &outcomes));
    let mut curves = Plot::lines("Learning Match3", "step", "nats per label, mean of 20 steps");
    for outcome in &outcomes {
        let smooth = outcome.log.chunks(20).map(|rows| {
            let mean = rows.iter().map(|row| row.loss).sum::<f64>() / rows.len() as f64;
            (rows[rows.len() / 2].step as f64, mean)
        });
        curves = curves.series(outcome.name, smooth.collect());
    }
    report.plots.push(curves);
    if plan.larger {
        let (problem, steps) = LARGER;
        report.tables.push(outcome_table(problem, &compare(problem, steps, 1)?));
        report.notes.push(format!(
            "Larger Match3 (n = {}, M = {}): the same recipe with {steps} steps and one seed; no threshold.",
            problem.n, problem.modulus
        ));
    }

    let [tensor, pair, two_layers] = [0, 1, 2].map(|i| outcomes[i].accuracy());
    let paper = "tensor attention captures correlations of three tokens, matrix attention does not";
    let claim = |name: &str, measured, threshold| Claim::new(name, paper, measured, "", threshold);
    report.claims.extend([
        claim("Tensor attention learns Match3", tensor, Threshold::AtLeast(plan.tensor_accuracy)),
        claim("One layer of pairwise attention does not", pair, Threshold::AtMost(0.68)),
        claim("Nor do two", two_layers, Threshold::AtMost(0.75)),
        claim(
            "Tensor attention is ahead of the better pairwise model",
            tensor - pair.max(two_layers),
            Threshold::AtLeast(0.15),
        ),
    ]);
    report.notes.push(format!(
        "Learned Match3: every model sees the same batches of 64 fresh instances for {} steps ({} seeds), with residues as \
         cosines and sines of {FREQUENCIES} frequencies, and is tested on {} instances of its own.",
        plan.steps, plan.seeds, plan.test_sequences
    ));
    Ok(())
}

fn outcome_table(problem: Problem, outcomes: &[Outcomes]) -> Table {
    let mut table = Table::new(
        format!("Learned Match3 (distinct tokens, n = {}, M = {})", problem.n, problem.modulus),
        &["model", "parameters", "accuracy", "commonest label", "seconds of training"],
    );
    for outcome in outcomes {
        table.row([
            outcome.name.to_string(),
            outcome.parameters.to_string(),
            format!("{:.4}", outcome.accuracy()),
            format!("{:.4}", outcome.majority),
            format!("{:.1}", outcome.seconds),
        ]);
    }
    table
}

fn learn(
    contender: &Contender,
    problem: Problem,
    steps: usize,
    seeds: u64,
    test_sequences: usize,
    cx: &Context,
) -> Result<Outcomes> {
    let input = Input::Fourier { modulus: problem.modulus, frequencies: FREQUENCIES };
    let config = KroneckerTransformerConfig::new(input.clone(), Target::Token, 2, 64, 4)
        .with_orders(contender.orders.clone())
        .with_scale(Some(0.5));
    let coding = Coding {
        input,
        target: Target::Token,
        vocabulary: Vec::new(),
        classes: vec!["0".into(), "1".into()],
    };
    let train_config = TrainConfig {
        steps,
        lr: 3e-3,
        warmup: 50.min(steps / 2),
        min_lr_ratio: 0.0,
        weight_decay: 0.0,
        eval_every: 0,
        checkpoint_every: 0,
        ..TrainConfig::default()
    };
    let begun = Instant::now();
    let mut outcomes = Outcomes {
        name: contender.name,
        parameters: 0,
        accuracies: Vec::new(),
        majority: 0.0,
        seconds: 0.0,
        log: Vec::new(),
    };
    for seed in 0..seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("training {} (seed {})", contender.name, cx.seed));
        let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.init(device));
        outcomes.parameters = model.num_params();
        let train_part = match3_sequences(problem, 64 * steps, &mut cx.rng("train data", 0));
        let test = match3_sequences(problem, test_sequences, &mut cx.rng("test data", 0));
        let mut task = ClassificationTask::new(&train_part, &test[..16], &coding, 64, cx);
        let trained = train(model, &mut task, &train_config, None, false, cx)?;
        if trained.outcome == Outcome::Interrupted {
            return Err(Error::interrupted("the experiment was stopped"));
        }
        let scores = Scores::new(&predict(&trained.last, &coding, &test, cx), &test, &coding);
        outcomes.accuracies.push(scores.accuracy);
        outcomes.majority = scores.majority;
        if seed == 0 {
            outcomes.log = trained.log;
        }
    }
    outcomes.seconds = begun.elapsed().as_secs_f64() / seeds as f64;
    Ok(outcomes)
}

fn match3_sequences(problem: Problem, count: usize, rng: &mut impl Rng) -> Vec<Sequence> {
    let sequence = |_| {
        let instance = Instance::draw(problem.n, problem.modulus, rng);
        Sequence {
            tokens: instance.x.iter().map(|x| Token::Symbol(x.to_string())).collect(),
            labels: instance
                .labels(Convention::Distinct)
                .iter()
                .map(|&label| u8::from(label).to_string())
                .collect(),
        }
    };
    (0..count).map(sequence).collect()
}

/// A head `[1, 1, rows, width]` with entries uniform in `[-largest, largest]`.
fn uniform(rows: usize, width: usize, largest: f32, rng: &mut impl Rng, cx: &Context) -> Tensor<4> {
    let values: Vec<f32> = (0..rows * width).map(|_| rng.random_range(-largest..=largest)).collect();
    Tensor::from_data(TensorData::new(values, [1, 1, rows, width]), &cx.device)
}

/// Queries, two key and two value matrices of one length.
fn operands(
    n: usize,
    width: usize,
    largest: f32,
    rng: &mut impl Rng,
    cx: &Context,
) -> (Tensor<4>, [Tensor<4>; 2], [Tensor<4>; 2]) {
    let mut draw = |largest| uniform(n, width, largest, rng, cx);
    (draw(largest), [draw(largest), draw(largest)], [draw(1.0), draw(1.0)])
}

/// Part 3: the polynomial's error against its degree, beside what is certified.
fn report_error(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let mut rng = cx.rng("error", 0);
    let mut table = Table::new(
        "Error of polynomial attention (n = 24, as a multiple of the largest values)",
        &["B", "d", "scores up to", "polynomial", "degree", "largest error", "certified"],
    );
    let mut plot = Plot::lines("Error against degree", "degree", "largest error, d = 4").log_y();
    let mut worst = 0.0f64;
    for &(largest, width) in plan.error_cases {
        let (q, keys, values) = operands(24, width, largest, &mut rng, cx);
        let options = AttentionOptions::new(1.0 / width as f64);
        let exact = tensor_attention(q.clone(), &keys, &values, &options);
        let range = score_bound(&q, &keys, options.scale);
        for basis in [Basis::Taylor, Basis::Chebyshev] {
            let mut points = Vec::new();
            for degree in [2, 4, 6, 8] {
                let polynomial = ExpPolynomial::new(basis, degree, range)?;
                let certificate = polynomial.certificate();
                if certificate.is_infinite() {
                    continue;
                }
                let poly = tensor_attention_poly(q.clone(), &keys, &values, &options, &polynomial);
                let error = f64::from((poly - exact.clone()).abs().max().into_scalar::<f32>());
                // Single precision adds errors of its own.
                worst = worst.max(error / (certificate + 1e-5));
                points.push((degree as f64, error.max(1e-9)));
                table.row([
                    largest.to_string(),
                    width.to_string(),
                    format!("{range:.2}"),
                    format!("{basis:?}"),
                    degree.to_string(),
                    format!("{error:.1e}"),
                    format!("{certificate:.1e}"),
                ]);
            }
            // Of the narrower heads only: the picture would have more curves than colours.
            if !points.is_empty() && width == plan.error_cases[0].1 {
                plot = plot.series(format!("{basis:?}, B {largest}"), points);
            }
        }
    }
    report.tables.push(table);
    report.plots.push(plot);
    report.claims.push(Claim::new(
        "The error of the near-linear algorithm stays within its certificate",
        "additive error 1/poly(n) for bounded entries",
        worst,
        "of the certified error",
        Threshold::AtMost(1.0),
    ));
    Ok(())
}

/// Part 4: time against length.
fn report_cost(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    const WIDTH: usize = 4;
    const DEGREE: usize = 4;
    let mut rng = cx.rng("cost", 0);
    let options = AttentionOptions::new(1.0 / WIDTH as f64);
    let mut time = |n: usize, poly: bool| -> Result<f64> {
        let (q, keys, values) = operands(n, WIDTH, 1.0, &mut rng, cx);
        let polynomial = ExpPolynomial::new(Basis::Chebyshev, DEGREE, score_bound(&q, &keys, options.scale))?;
        let mut seconds: Vec<f64> = (0..5)
            .map(|_| {
                let begun = Instant::now();
                let o = match poly {
                    true => tensor_attention_poly(q.clone(), &keys, &values, &options, &polynomial),
                    false => tensor_attention(q.clone(), &keys, &values, &options),
                };
                drop(o);
                begun.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        Ok(seconds[2])
    };
    let mut table = Table::new(
        format!("Time of one head, forward (d = {WIDTH}, degree {DEGREE})"),
        &["length", "exact, ms", "polynomial, ms"],
    );
    let (mut exact, mut poly) = (Vec::new(), Vec::new());
    let lengths = plan.exact_lengths.iter().chain(plan.poly_lengths);
    for &n in lengths {
        let exact_seconds = if plan.exact_lengths.contains(&n) { Some(time(n, false)?) } else { None };
        let poly_seconds = time(n, true)?;
        exact.extend(exact_seconds.map(|seconds| (n as f64, 1e3 * seconds)));
        poly.push((n as f64, 1e3 * poly_seconds));
        let ms = |seconds: f64| format!("{:.2}", 1e3 * seconds);
        table.row([n.to_string(), exact_seconds.map_or("–".into(), ms), ms(poly_seconds)]);
    }
    report.tables.push(table);
    let long: Vec<(f64, f64)> =
        poly.iter().copied().filter(|(n, _)| *n >= plan.poly_lengths[0] as f64).collect();
    report.claims.extend([
        Claim::new(
            "Exact tensor attention takes cubic time",
            "Ω(n^3-o(1)) is unavoidable for large entries, under SETH",
            slope(&exact),
            "slope on logarithmic axes",
            Threshold::AtLeast(2.6),
        ),
        Claim::new(
            "And no more than that",
            "O(n^3 d) for the exact algorithm",
            slope(&exact),
            "slope on logarithmic axes",
            Threshold::AtMost(3.3),
        ),
        Claim::new(
            "The near-linear algorithm takes near-linear time",
            "n^(1+o(1)) for entries o((log n)^1/3)",
            slope(&long),
            "slope on logarithmic axes",
            Threshold::AtMost(1.15),
        ),
    ]);
    let crossover = exact.iter().zip(&poly).find(|(exact, poly)| exact.1 > poly.1).map(|(exact, _)| exact.0);
    report.notes.push(match crossover {
        Some(n) => {
            format!("The polynomial is faster from n = {n} on, of the lengths that both were timed at.")
        }
        None => "The polynomial is slower at every length that both were timed at.".into(),
    });
    report.plots.push(
        Plot::lines("Time against length", "n", "milliseconds")
            .series("exact", exact)
            .series("polynomial", poly)
            .log_x()
            .log_y(),
    );

    let orders = [1, 2, 3, 4];
    let entries = admissible_entries(100_000, WIDTH, 1e-3, &orders)?;
    let mut table = Table::new(
        format!(
            "Largest entries B whose attention over 100000 tokens stays near-linear (d = {WIDTH}, error 1e-3)"
        ),
        &["order", "B"],
    );
    for (order, entry) in entries {
        table.row([order.to_string(), format!("{entry:.3}")]);
    }
    report.tables.push(table);
    Ok(())
}

/// The slope of the straight line through points on logarithmic axes, by least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let mean = |pick: fn(&(f64, f64)) -> f64| logs.iter().map(pick).sum::<f64>() / count;
    let (x, y) = (mean(|p| p.0), mean(|p| p.1));
    let covariance: f64 = logs.iter().map(|p| (p.0 - x) * (p.1 - y)).sum();
    covariance / logs.iter().map(|p| (p.0 - x).powi(2)).sum::<f64>()
}
