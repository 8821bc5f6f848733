//! Tasks that come one after another (von Oswald et al., "Continual learning with hypernetworks", arXiv 1906.00695).
//!
//! Each task has an embedding; the hypernetwork makes its network. While task t is learned, what is made for the tasks
//! before must not change: `CE + β/(t-1) Σ_{k<t} ‖H(e_k, Φ) - H(e_k*, Φ*)‖²`. Baselines: one network trained on one task
//! after the other (fine-tuning), the same with elastic weight consolidation (Kirkpatrick et al., arXiv 1612.00796), and
//! one trained on all tasks together.

use burn::module::Param;
use burn::tensor::Tensor;
use kiln_core::{Context, Error, Plot, Result, Table};
use kiln_nn::{WeightSpec, token_nll};

use crate::apps::{Findings, Parts, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, Init, OutputRegularizer, OutputScheme};
use crate::target::Target;
use crate::training::{Fit, Labelled, Plain, accuracy_of, cross_entropy, fit, probabilities};

/// Factors of the penalty that elastic weight consolidation is given; the best counts.
const EWC_STRENGTHS: [f64; 3] = [1e3, 1e4, 1e5];
/// Rows that the Fisher information is measured on.
const FISHER_ROWS: usize = 256;

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// The network of a task; its outputs are the classes of a task.
    pub target: Target,
    /// Numbers in a chunk.
    pub chunk: usize,
    /// Width of the hidden layer.
    pub hidden: usize,
    /// Width of the embeddings of chunks and of tasks.
    pub emb_dim: usize,
    /// β
    pub beta: f64,
    /// Whether earlier tasks are kept as they would be after the next step, not as they are before it.
    pub look_ahead: bool,
    /// Optimisation steps a task.
    pub steps: usize,
    /// Rows a batch.
    pub batch: usize,
    /// Learning rate.
    pub lr: f64,
    /// Repetitions, each with a seed of its own.
    pub seeds: u64,
}

impl Config {
    /// As in the paper's split-MNIST, for 8 × 8 digits: a network 64-32-2.
    pub fn new() -> Self {
        Self {
            target: Target::mlp(&[64, 32, 2]),
            chunk: 256,
            hidden: 32,
            emb_dim: 8,
            beta: 0.01,
            look_ahead: false,
            steps: 400,
            batch: 64,
            lr: 3e-3,
            seeds: 1,
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self::new()
    }
}

/// Pairs of digits as tasks, such as `0/1,2/3`; the first of a pair has the label 0.
///
/// # Errors
/// When the text is no list of groups of digits, or the groups differ in size.
pub fn digit_tasks(pairs: &str) -> Result<Vec<Parts>> {
    let wrong = || Error::usage(format!("\"{pairs}\" is no list of tasks")).hint("write 0/1,2/3,4/5,6/7,8/9");
    let groups: Vec<Vec<u8>> = pairs
        .split(',')
        .map(|group| group.split('/').map(|class| class.trim().parse()).collect::<Result<_, _>>())
        .collect::<Result<_, _>>()
        .map_err(|_| wrong())?;
    let size = groups[0].len();
    if size < 2 || groups.iter().any(|group| group.len() != size || group.iter().any(|&class| class > 9)) {
        return Err(wrong());
    }
    Ok(groups.iter().map(|group| Parts::digits(group)).collect())
}

/// Accuracies on the tests of all tasks learned so far, after each task.
type History = Vec<Vec<f64>>;

/// Figures of one method, one for every seed.
struct Method {
    name: &'static str,
    accuracies: Vec<f64>,
    forgetting: Vec<f64>,
}

/// The mean over tasks after the last one.
fn final_accuracy(history: &History) -> f64 {
    history.last().map_or(0.0, |last| last.iter().sum::<f64>() / last.len() as f64)
}

/// How much accuracy tasks have lost since they were learned, on average over all but the last.
fn forgetting(history: &History) -> f64 {
    let Some(last) = history.last() else { return 0.0 };
    let earlier = last.len() - 1;
    (0..earlier).map(|task| history[task][task] - last[task]).sum::<f64>() / earlier.max(1) as f64
}

/// Runs the hypernetwork with and without its regulariser, and the baselines.
///
/// # Errors
/// When a training fails or is stopped, or the tasks do not fit the target.
pub fn run(config: &Config, tasks: &[Parts], cx: &Context) -> Result<(Findings, Summary)> {
    if tasks.len() < 2 {
        return Err(Error::usage("continual learning needs at least two tasks"));
    }
    let mut methods: Vec<Method> = Vec::new();
    let mut note = |name, history: &History| {
        let (accuracy, forgot) = (final_accuracy(history), forgetting(history));
        match methods.iter_mut().find(|method| method.name == name) {
            Some(method) => {
                method.accuracies.push(accuracy);
                method.forgetting.push(forgot);
            }
            None => methods.push(Method { name, accuracies: vec![accuracy], forgetting: vec![forgot] }),
        }
    };
    let (mut curves, mut inferred) = (Vec::new(), Vec::new());
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("continual learning, seed {}", cx.seed));
        let (hyper, history) = learn(config, config.beta, tasks, cx)?;
        note("hypernetwork", &history);
        inferred.push(infer(config, &hyper, tasks, cx)?);
        if config.look_ahead {
            note("hypernetwork, looking ahead", &learn_ahead(config, config.beta, true, tasks, cx)?.1);
        }
        let (_, without) = learn(config, 0.0, tasks, cx)?;
        note("hypernetwork, β = 0", &without);
        let tuned = plain(config, None, tasks, cx)?;
        note("fine-tuning", &tuned);
        let best = EWC_STRENGTHS
            .iter()
            .map(|&strength| plain(config, Some(strength), tasks, cx))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .max_by(|a, b| final_accuracy(a).total_cmp(&final_accuracy(b)));
        note("elastic weight consolidation", &best.unwrap_or_default());
        note("joint training", &joint(config, tasks, cx)?);
        if seed == 0 {
            curves = vec![("hypernetwork", history), ("β = 0", without), ("fine-tuning", tuned)];
        }
    }

    let mut table = Table::new("Continual learning", &["method", "mean final accuracy", "forgetting"]);
    for method in &methods {
        let (accuracy, forgot) = (Spread::of(&method.accuracies), Spread::of(&method.forgetting));
        table.row([method.name.to_string(), accuracy.text(), forgot.text()]);
    }
    let mut plot = Plot::lines("Continual learning", "tasks learned", "mean accuracy on the tasks so far");
    for (name, history) in curves {
        let mean = |row: &Vec<f64>| row.iter().sum::<f64>() / row.len() as f64;
        plot = plot
            .series(name, history.iter().enumerate().map(|(t, row)| ((t + 1) as f64, mean(row))).collect());
    }
    let mean_of = |name: &str, pick: fn(&Method) -> &Vec<f64>| {
        methods
            .iter()
            .find(|method| method.name == name)
            .map_or(f64::NAN, |method| Spread::of(pick(method)).mean)
    };
    let inferred_mean = Spread::of(&inferred);
    let summary = Summary {
        accuracy: mean_of("hypernetwork", |method| &method.accuracies),
        forgetting: mean_of("hypernetwork", |method| &method.forgetting),
        fine_tuning: mean_of("fine-tuning", |method| &method.accuracies),
    };
    let notes = vec![
        format!(
            "Continual learning: {} tasks, {} steps each, seeds: {}; elastic weight consolidation has the best of the \
             strengths {EWC_STRENGTHS:?} by its test accuracy.",
            tasks.len(),
            config.steps,
            config.seeds
        ),
        format!(
            "Without being told the task, the one with the least entropy of the prediction is right for {} of the rows.",
            inferred_mean.text()
        ),
    ];
    Ok((Findings { table, plots: vec![plot], notes }, summary))
}

/// The figures behind the claim.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// Mean final accuracy of the hypernetwork.
    pub accuracy: f64,
    /// Its forgetting.
    pub forgetting: f64,
    /// Mean final accuracy of fine-tuning.
    pub fine_tuning: f64,
}

/// Learns the tasks one after another with a hypernetwork.
///
/// # Errors
/// When a training fails or is stopped.
pub fn learn(config: &Config, beta: f64, tasks: &[Parts], cx: &Context) -> Result<(HyperNet, History)> {
    learn_ahead(config, beta, false, tasks, cx)
}

/// As [`learn`]; looking ahead, what is made for earlier tasks is compared after the step that the loss of the new task
/// alone would take, as in the paper's Eq. (2).
fn learn_ahead(
    config: &Config,
    beta: f64,
    ahead: bool,
    tasks: &[Parts],
    cx: &Context,
) -> Result<(HyperNet, History)> {
    let hyper_config = HyperNetConfig::new(config.target.spec()?)
        .with_conditioning([Conditioning::Task { tasks: tasks.len(), dim: config.emb_dim }])
        .with_scheme(OutputScheme::Chunk { chunk: config.chunk, emb_dim: config.emb_dim })
        .with_arch(Arch::Mlp(vec![config.hidden]))
        .with_init(Init::Hyperfan);
    let mut hyper = hyper_config.draw(cx, "hypernet")?;
    let mut history = History::new();
    for (number, task) in tasks.iter().enumerate() {
        let earlier = (number > 0).then(|| OutputRegularizer::snapshot(&hyper, number)).transpose()?;
        hyper = fit(hyper, Fit::new(config.steps, config.lr), cx, |hyper, step| {
            let step = (number * config.steps + step) as u64;
            let (x, y) = task.train.draw(config.batch, &mut cx.rng("batch", step)).tensors(&cx.device);
            let task_loss = |hyper: &HyperNet| -> Result<Tensor<1>> {
                let theta = hyper.generate(&Condition::tasks([number]))?.flat;
                Ok(cross_entropy(config.target.forward(theta, x.clone()), y.clone()))
            };
            let loss = task_loss(hyper)?;
            Ok(match &earlier {
                Some(earlier) if beta > 0.0 && ahead => {
                    loss + earlier.value(&stepped(hyper, config.lr, task_loss)?)? * beta
                }
                Some(earlier) if beta > 0.0 => loss + earlier.value(hyper)? * beta,
                _ => loss,
            })
        })?;
        let accuracies = (0..=number).map(|task| {
            let theta = hyper.generate(&Condition::tasks([task]))?.flat;
            Ok(accuracy_of(&config.target, theta, &tasks[task].test, cx))
        });
        history.push(accuracies.collect::<Result<_>>()?);
    }
    Ok((hyper, history))
}

/// The hypernetwork after one step of plain gradient descent; the step itself is a constant, as in the paper.
fn stepped(hyper: &HyperNet, lr: f64, loss: impl Fn(&HyperNet) -> Result<Tensor<1>>) -> Result<HyperNet> {
    let spec = WeightSpec::of(hyper);
    let own = spec.read(hyper)?;
    let leaf = Tensor::from_inner(own.clone().inner()).require_grad();
    let gradients = loss(&spec.split(leaf.clone())?.fill(hyper)?)?.backward();
    match leaf.grad(&gradients) {
        Some(gradient) => spec.split(own - Tensor::from_inner(gradient) * lr)?.fill(hyper),
        None => Ok(hyper.clone()),
    }
}

/// The share of test rows whose task and class are both right, when the task is taken to be the one whose network is
/// surest.
fn infer(config: &Config, hyper: &HyperNet, tasks: &[Parts], cx: &Context) -> Result<f64> {
    let count = tasks.len();
    let theta = hyper.generate(&Condition::tasks((0..count).collect::<Vec<_>>()))?.flat;
    let (mut right, mut total) = (0, 0);
    for (number, task) in tasks.iter().enumerate() {
        let (x, _) = task.test.tensors(&cx.device);
        let [_, rows, width] = x.dims();
        let all = probabilities(config.target.forward(theta.clone(), x.expand([count, rows, width])));
        let classes = all.len() / (count * rows);
        for (row, &class) in task.test.y.iter().enumerate() {
            let of = |task: usize| &all[(task * rows + row) * classes..][..classes];
            let surest = (0..count).min_by(|&a, &b| entropy(of(a)).total_cmp(&entropy(of(b)))).unwrap_or(0);
            right += usize::from(surest == number && kiln_nn::likeliest(of(surest)) == class);
            total += 1;
        }
    }
    Ok(f64::from(right as u32) / f64::from(total as u32))
}

/// Entropy in nats.
pub(crate) fn entropy(row: &[f32]) -> f64 {
    row.iter().map(|&p| f64::from(p)).filter(|&p| p > 0.0).map(|p| -p * p.ln()).sum()
}

/// One network for all tasks, one after another; with elastic weight consolidation if a strength is given.
fn plain(config: &Config, ewc: Option<f64>, tasks: &[Parts], cx: &Context) -> Result<History> {
    let mut net = Plain::new(&config.target, 1, cx, "plain")?;
    let mut anchors: Vec<(Tensor<2>, Tensor<2>)> = Vec::new();
    let mut history = History::new();
    for (number, task) in tasks.iter().enumerate() {
        net = fit(net, Fit::new(config.steps, config.lr), cx, |net, step| {
            let step = (number * config.steps + step) as u64;
            let (x, y) = task.train.draw(config.batch, &mut cx.rng("batch", step)).tensors(&cx.device);
            let loss = cross_entropy(config.target.forward(net.theta.val(), x), y);
            Ok(anchors.iter().fold(loss, |loss, (theta, fisher)| {
                let moved = (net.theta.val() - theta.clone()).square() * fisher.clone();
                loss + moved.sum() * (0.5 * ewc.unwrap_or(0.0))
            }))
        })?;
        if ewc.is_some() {
            anchors.push((net.theta.val(), fisher(config, &net.theta, &task.train, number, cx)));
        }
        let accuracies =
            tasks[..=number].iter().map(|task| accuracy_of(&config.target, net.theta.val(), &task.test, cx));
        history.push(accuracies.collect());
    }
    Ok(history)
}

/// The diagonal of the empirical Fisher information, `[1, N]`: mean squares of the gradients of single rows, all at once
/// by giving every row its own copy of the weights.
fn fisher(
    config: &Config,
    theta: &Param<Tensor<2>>,
    rows: &Labelled,
    task: usize,
    cx: &Context,
) -> Tensor<2> {
    let rows = rows.draw(FISHER_ROWS, &mut cx.rng("fisher", task as u64));
    let (x, y) = rows.tensors(&cx.device);
    let copies = theta.val().repeat_dim(0, FISHER_ROWS);
    let copies = Tensor::from_inner(copies).require_grad();
    let logits = config.target.forward(copies.clone(), x.swap_dims(0, 1));
    let gradients = token_nll(logits, y.swap_dims(0, 1)).sum().backward();
    copies.grad(&gradients).expect("every copy has a loss").square().mean_dim(0)
}

/// One network for all tasks at once, with as many steps as all tasks have.
fn joint(config: &Config, tasks: &[Parts], cx: &Context) -> Result<History> {
    let net = Plain::new(&config.target, 1, cx, "plain")?;
    let all = Labelled::join(&tasks.iter().map(|task| task.train.clone()).collect::<Vec<_>>());
    let net = fit(net, Fit::new(config.steps * tasks.len(), config.lr), cx, |net, step| {
        let (x, y) = all.draw(config.batch, &mut cx.rng("joint batch", step as u64)).tensors(&cx.device);
        Ok(cross_entropy(config.target.forward(net.theta.val(), x), y))
    })?;
    let accuracies: Vec<f64> =
        tasks.iter().map(|task| accuracy_of(&config.target, net.theta.val(), &task.test, cx)).collect();
    Ok(vec![accuracies; tasks.len()])
}
