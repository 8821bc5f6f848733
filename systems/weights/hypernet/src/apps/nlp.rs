//! Texts of several tasks with one frozen encoder: a hypernetwork makes the adapters of every task.
//!
//! After Karimi Mahabadi et al., "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks",
//! arXiv 2106.04489. The encoder is small: vectors of hashed words and pairs of words, and one layer of a Transformer. It
//! is trained on one half of the rows of all tasks together, without being told which is which, and then stays as it is.
//! The other half is for what each task has of its own: behind attention and feed-forward layer an *adapter*
//! `h + up(relu(down h))` and the scale and shift of the norm, and a linear head. From the vector of a task and that of a
//! place in the layer, the hypernetwork makes all of them. Baselines: a head alone, shared by all tasks; adapters of which
//! every task learns its own.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use kiln_core::{Context, Error, Result, Table};
use kiln_nn::{
    Embedding, EmbeddingConfig, Linear, LinearConfig, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig,
    ParamSpec, WeightSpec, functional, initialise, likeliest,
};
use kiln_ops::{Activation, activate, layer_norm};
use rand::RngExt;
use rand::seq::SliceRandom;

use crate::apps::text::{TextTask, Texts};
use crate::apps::{Findings, Spread};
use crate::conditioning::{Condition, Conditioning};
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, OutputScheme, Theta};
use crate::training::{Fit, Plain, cross_entropy, fit_best};

/// Rows of the table of vectors; words and pairs of words share it.
const BUCKETS: usize = 16_384;
/// Width of the encoder, of its feed-forward layer, and of an adapter.
const WIDTH: usize = 64;
const WIDE: usize = 128;
const NARROW: usize = 16;
/// Words of a text that are read.
const LONGEST: usize = 40;
/// Where adapters are.
const PLACES: [&str; 2] = ["attention", "feedforward"];
/// Factor of what an adapter adds, so that it begins near nothing.
const ADDED: f64 = 0.1;
/// Rows of every task in a batch.
const BATCH: usize = 32;
/// Rows that pass through the encoder at once when nothing is learned.
const AT_ONCE: usize = 256;
/// Learning rates that each method is given; the one with the lowest validation loss counts.
const RATES: [f64; 2] = [1e-3, 4e-3];
/// Steps between validations.
const VALIDATE_EVERY: usize = 50;

/// What decides the outcome.
#[derive(Debug, Clone)]
pub struct Config {
    /// Optimisation steps of the encoder, and of what the tasks have of their own.
    pub steps: [usize; 2],
    /// Numbers in a chunk of what the hypernetwork makes.
    pub chunk: usize,
    /// Width of its hidden layer.
    pub hidden: usize,
    /// Width of the vectors of tasks and of places.
    pub emb_dim: usize,
    /// Repetitions.
    pub seeds: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { steps: [600, 600], chunk: 256, hidden: 16, emb_dim: 8, seeds: 1 }
    }
}

/// Mean accuracies over tasks on the tests, and numbers of parameters: of the hypernetwork, of adapters for each task, and
/// of the shared head.
#[derive(Debug, Clone, Copy, Default)]
pub struct Summary {
    /// Mean accuracies.
    pub accuracies: [f64; 3],
    /// Parameters that are learned while the encoder stays.
    pub parameters: [usize; 3],
}

/// Rows with as many of every task, as the encoder reads them.
struct Batch {
    /// Buckets of words and of pairs, `[tasks · rows, time]`
    words: Tensor<2, Int>,
    pairs: Tensor<2, Int>,
    /// Where a text has ended.
    blank: Tensor<2, Bool>,
    /// One over the length of a text at its words, 0 behind them.
    share: Tensor<2>,
    /// `[tasks, rows]`
    y: Tensor<2, Int>,
}

impl Batch {
    /// These rows of every task.
    fn new(tasks: &[(&Texts, Vec<usize>)], device: &Device) -> Self {
        let rows = tasks[0].1.len();
        let texts = || tasks.iter().flat_map(|(texts, rows)| rows.iter().map(|&row| &texts.words[row]));
        let time = texts().map(Vec::len).max().unwrap_or(0).clamp(1, LONGEST);
        let all = tasks.len() * rows;
        let (mut words, mut pairs) = (vec![0i64; all * time], vec![0i64; all * time]);
        let mut share = vec![0.0f32; all * time];
        for (row, text) in texts().enumerate() {
            let length = text.len().clamp(1, time);
            share[row * time..row * time + length].fill(1.0 / length as f32);
            for (at, word) in text.iter().take(time).enumerate() {
                words[row * time + at] = bucket(&[word]);
                pairs[row * time + at] = if at == 0 { 0 } else { bucket(&[&text[at - 1], word]) };
            }
        }
        let y: Vec<i64> =
            tasks.iter().flat_map(|(texts, rows)| rows.iter().map(|&row| texts.y[row] as i64)).collect();
        let ids = |values| Tensor::from_data(TensorData::new(values, [all, time]), device);
        let share = Tensor::<2>::from_data(TensorData::new(share, [all, time]), device);
        Self {
            words: ids(words),
            pairs: ids(pairs),
            blank: share.clone().equal_elem(0.0),
            share,
            y: Tensor::from_data(TensorData::new(y, [tasks.len(), rows]), device),
        }
    }
}

/// The bucket of a word or a pair, by Fowler, Noll and Vo; 0 is kept for nothing.
fn bucket(words: &[&String]) -> i64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for word in words {
        for byte in word.bytes().chain([b' ']) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    1 + ((hash ^ (hash >> 32)) % (BUCKETS as u64 - 1)) as i64
}

/// From texts to one vector each.
#[derive(Module, Debug)]
struct Encoder {
    table: Embedding,
    attention: MultiHeadAttention,
    up: Linear,
    down: Linear,
    /// To the classes of all tasks; used only while the encoder is trained.
    head: Linear,
}

impl Encoder {
    fn new(classes: usize, device: &Device) -> Self {
        let small = Initializer::Normal { mean: 0.0, std: 0.1 };
        Self {
            table: EmbeddingConfig::new(BUCKETS, WIDTH).with_initializer(small).init(device),
            attention: MultiHeadAttentionConfig::new(WIDTH, 4).with_dropout(0.0).init(device),
            up: LinearConfig::new(WIDTH, WIDE).init(device),
            down: LinearConfig::new(WIDE, WIDTH).init(device),
            head: LinearConfig::new(WIDTH, classes).init(device),
        }
    }

    /// The mean over the words of a text, `[tasks, rows, WIDTH]`, with what the tasks have of their own, if anything.
    fn encode(&self, batch: &Batch, own: Option<&Own>) -> Tensor<3> {
        let x = self.table.forward(batch.words.clone()) + self.table.forward(batch.pairs.clone());
        let ([all, time, width], [tasks, rows]) = (x.dims(), batch.y.dims());
        // All words of a task are rows of one set.
        let sets = |x: Tensor<3>| x.reshape([tasks, rows * time, width]);
        let input = MhaInput::self_attn(x.clone()).mask_pad(batch.blank.clone());
        let context = sets(self.attention.forward(input).context);
        let x = norm(sets(x) + adapted(context, own, 0), own, 0);
        let fed = self.down.forward(self.up.forward_activated(x.clone(), Activation::Relu));
        let x = norm(x + adapted(fed, own, 1), own, 1);
        let mean = (x.reshape([all, time, width]) * batch.share.clone().unsqueeze_dim::<3>(2)).sum_dim(1);
        mean.reshape([tasks, rows, width])
    }
}

/// What a task has of its own at one place.
struct Place {
    down: (Tensor<3>, Tensor<2>),
    up: (Tensor<3>, Tensor<2>),
    scale: Tensor<2>,
    shift: Tensor<2>,
}

/// What every task has of its own, `[tasks, ...]`.
struct Own {
    places: [Place; 2],
    head: (Tensor<3>, Tensor<2>),
}

impl Own {
    /// The tensors of a task, in order; the head comes last.
    fn spec(classes: usize) -> Result<WeightSpec> {
        let mut params = Vec::new();
        let mut add = |name: String, shape: &[usize]| {
            let holder = if shape.len() == 2 { "Linear" } else { "own" };
            params.push(ParamSpec { name, shape: shape.to_vec(), holder: holder.into() });
        };
        for place in PLACES {
            add(format!("{place}.down.weight"), &[WIDTH, NARROW]);
            add(format!("{place}.down.bias"), &[NARROW]);
            add(format!("{place}.up.weight"), &[NARROW, WIDTH]);
            add(format!("{place}.up.bias"), &[WIDTH]);
            add(format!("{place}.scale"), &[WIDTH]);
            add(format!("{place}.shift"), &[WIDTH]);
        }
        add("head.weight".into(), &[WIDTH, classes]);
        add("head.bias".into(), &[classes]);
        WeightSpec::new(params)
    }

    /// Numbers of the head.
    fn head_len(classes: usize) -> usize {
        (WIDTH + 1) * classes
    }

    fn read(theta: &Theta) -> Result<Self> {
        let linear = |name: String| -> Result<(Tensor<3>, Tensor<2>)> {
            Ok((theta.tensor(&format!("{name}.weight"))?, theta.tensor(&format!("{name}.bias"))?))
        };
        let place = |name: &str| -> Result<Place> {
            Ok(Place {
                down: linear(format!("{name}.down"))?,
                up: linear(format!("{name}.up"))?,
                scale: theta.tensor(&format!("{name}.scale"))?,
                shift: theta.tensor(&format!("{name}.shift"))?,
            })
        };
        Ok(Self { places: [place(PLACES[0])?, place(PLACES[1])?], head: linear("head".into())? })
    }
}

/// `h + up(relu(down h))`
fn adapted(x: Tensor<3>, own: Option<&Own>, place: usize) -> Tensor<3> {
    let Some(own) = own else { return x };
    let Place { down, up, .. } = &own.places[place];
    let narrow = functional::linear(x.clone(), down.0.clone(), Some(down.1.clone()));
    let added = functional::linear(activate(narrow, Activation::Relu), up.0.clone(), Some(up.1.clone()));
    x + added * ADDED
}

/// Layer norm with `1 + scale` and the shift.
fn norm(x: Tensor<3>, own: Option<&Own>, place: usize) -> Tensor<3> {
    let ones = Tensor::ones([WIDTH], &x.device());
    let x = layer_norm(x, ones, None, 1e-5);
    match own.map(|own| &own.places[place]) {
        None => x,
        Some(Place { scale, shift, .. }) => {
            x * (scale.clone() + 1.0).unsqueeze_dim::<3>(1) + shift.clone().unsqueeze_dim::<3>(1)
        }
    }
}

/// What makes the weights that tasks have of their own.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one at a time")]
enum Maker {
    /// A hypernetwork.
    Hyper(HyperNet),
    /// They are learned for each task, `[tasks, N]`.
    Each(Plain),
    /// Only a head, for all tasks, `[1, head]`; the rest is 0.
    Head(Plain),
}

impl Maker {
    /// `[tasks, N]`
    fn make(&self, tasks: usize, spec: &WeightSpec) -> Result<Own> {
        let flat = match self {
            Self::Hyper(hyper) => hyper.generate(&Condition::tasks((0..tasks).collect::<Vec<_>>()))?.flat,
            Self::Each(plain) => plain.theta.val(),
            Self::Head(plain) => {
                let head = plain.theta.val();
                let rest = Tensor::zeros([1, spec.numel() - head.dims()[1]], &head.device());
                Tensor::cat(vec![rest, head], 1).expand([tasks, spec.numel()])
            }
        };
        Own::read(&Theta::new(flat, spec.clone()))
    }
}

/// Tasks with their rows divided: for the encoder, for what they have of their own, for validation.
struct Course<'a> {
    tasks: &'a [TextTask],
    /// Where the classes of a task begin among those of all.
    first: Vec<usize>,
    classes: usize,
    parts: Vec<[Vec<usize>; 3]>,
    /// 0 for the classes of a task, far below for all others, `[tasks, 1, classes]`
    barred: Tensor<3>,
    cx: &'a Context,
}

impl<'a> Course<'a> {
    fn new(tasks: &'a [TextTask], cx: &'a Context) -> Self {
        let mut first = Vec::new();
        let mut classes = 0;
        for task in tasks {
            first.push(classes);
            classes += task.classes.len();
        }
        let mut barred = vec![-1e9f32; tasks.len() * classes];
        for (number, task) in tasks.iter().enumerate() {
            barred[number * classes + first[number]..][..task.classes.len()].fill(0.0);
        }
        let parts = tasks.iter().enumerate().map(|(number, task)| {
            let mut order: Vec<usize> = (0..task.train.y.len()).collect();
            order.shuffle(&mut cx.rng("text split", number as u64));
            let tenth = (order.len() / 10).max(1);
            let (valid, rest) = order.split_at(tenth);
            let (encoder, own) = rest.split_at(rest.len() / 2);
            [encoder.to_vec(), own.to_vec(), valid.to_vec()]
        });
        let barred = Tensor::from_data(TensorData::new(barred, [tasks.len(), 1, classes]), &cx.device);
        Self { tasks, parts: parts.collect(), first, classes, barred, cx }
    }

    /// A batch of one of the parts.
    fn draw(&self, part: usize, stream: &str, step: usize) -> Batch {
        let mut rng = self.cx.rng(stream, step as u64);
        let rows = |(task, parts): (&'a TextTask, &[Vec<usize>; 3])| {
            let part = &parts[part];
            (&task.train, (0..BATCH).map(|_| part[rng.random_range(0..part.len())]).collect())
        };
        Batch::new(&self.tasks.iter().zip(&self.parts).map(rows).collect::<Vec<_>>(), &self.cx.device)
    }

    /// Classes as they are numbered among those of all tasks, `[tasks, rows]`.
    fn union(&self, y: Tensor<2, Int>) -> Tensor<2, Int> {
        let first: Vec<i64> = self.first.iter().map(|&first| first as i64).collect();
        y + Tensor::<2, Int>::from_data(TensorData::new(first, [self.tasks.len(), 1]), &self.cx.device)
    }

    /// Logits of the classes of each task, those of other tasks barred.
    fn logits(&self, encoder: &Encoder, own: &Own, batch: &Batch) -> Tensor<3> {
        let mean = encoder.encode(batch, Some(own));
        functional::linear(mean, own.head.0.clone(), Some(own.head.1.clone())) + self.barred.clone()
    }

    /// Trains the encoder on the first parts.
    fn encoder(&self, steps: usize) -> Result<Encoder> {
        let encoder = initialise(&self.cx.device, &mut self.cx.rng("encoder", 0), |device| {
            Encoder::new(self.classes, device)
        });
        let loss = |encoder: &Encoder, batch: &Batch| {
            cross_entropy(encoder.head.forward(encoder.encode(batch, None)), self.union(batch.y.clone()))
        };
        let valid = self.draw_validation();
        let fit = Fit { steps, lr: 3e-3, validate_every: VALIDATE_EVERY };
        fit_best(
            encoder,
            fit,
            self.cx,
            |encoder, step| Ok(loss(encoder, &self.draw(0, "encoder batch", step))),
            |encoder| Ok(mean_loss(&valid, |batch| loss(encoder, batch))),
        )
    }

    /// Batches of the last parts, the same for every network.
    fn draw_validation(&self) -> Vec<Batch> {
        (0..8).map(|number| self.draw(2, "text validation", number)).collect()
    }

    /// Trains what tasks have of their own, with the better of the learning rates.
    fn own(&self, encoder: &Encoder, maker: &Maker, spec: &WeightSpec, steps: usize) -> Result<Maker> {
        let valid = self.draw_validation();
        let loss = |maker: &Maker, batch: &Batch| -> Result<Tensor<1>> {
            let own = maker.make(self.tasks.len(), spec)?;
            // The sum over tasks, so that those that share nothing learn as fast as one alone.
            let sum = cross_entropy(self.logits(encoder, &own, batch), self.union(batch.y.clone()));
            Ok(sum * self.tasks.len() as f64)
        };
        let validate = |maker: &Maker| -> Result<f64> {
            let losses = valid.iter().map(|batch| Ok(f64::from(loss(maker, batch)?.into_scalar::<f32>())));
            Ok(losses.collect::<Result<Vec<_>>>()?.iter().sum())
        };
        let mut best: Option<(f64, Maker)> = None;
        for lr in RATES {
            let fit = Fit { steps, lr, validate_every: VALIDATE_EVERY };
            let draw = |step| self.draw(1, "own batch", step);
            let made = fit_best(maker.clone(), fit, self.cx, |m, step| loss(m, &draw(step)), validate)?;
            let found = validate(&made)?;
            if best.as_ref().is_none_or(|(least, _)| found < *least) {
                best = Some((found, made));
            }
        }
        Ok(best.map_or_else(|| maker.clone(), |(_, made)| made))
    }

    /// Accuracy on the tests of every task.
    fn accuracies(&self, encoder: &Encoder, maker: &Maker, spec: &WeightSpec) -> Result<Vec<f64>> {
        let own = maker.make(self.tasks.len(), spec)?;
        let mut right = vec![0; self.tasks.len()];
        let longest = self.tasks.iter().map(|task| task.test.y.len()).max().unwrap_or(0);
        for start in (0..longest).step_by(AT_ONCE) {
            // As many rows of every task: where one has run out, its last is read again and not counted.
            let rows = |task: &TextTask| -> Vec<usize> {
                let last = task.test.y.len() - 1;
                (start..longest.min(start + AT_ONCE)).map(|row| row.min(last)).collect()
            };
            let chosen: Vec<_> = self.tasks.iter().map(|task| (&task.test, rows(task))).collect();
            let logits = self.logits(encoder, &own, &Batch::new(&chosen, &self.cx.device));
            let values: Vec<f32> = logits.into_data().iter().collect();
            let mut lines = values.chunks(self.classes);
            for (number, (texts, rows)) in chosen.iter().enumerate() {
                for (row, line) in (start..).zip(lines.by_ref().take(rows.len())) {
                    let is_right =
                        texts.y.get(row).is_some_and(|y| likeliest(line) == self.first[number] + y);
                    right[number] += usize::from(is_right);
                }
            }
        }
        Ok(right.iter().zip(self.tasks).map(|(&n, task)| n as f64 / task.test.y.len() as f64).collect())
    }
}

fn mean_loss(batches: &[Batch], loss: impl Fn(&Batch) -> Tensor<1>) -> f64 {
    let sum: f64 = batches.iter().map(|batch| f64::from(loss(batch).into_scalar::<f32>())).sum();
    sum / batches.len() as f64
}

/// Compares ways to several tasks with one encoder.
///
/// # Errors
/// When there are fewer than two tasks, or a training fails or is stopped.
pub fn run(config: &Config, tasks: &[TextTask], cx: &Context) -> Result<(Findings, Summary)> {
    if tasks.len() < 2 {
        return Err(Error::usage("sharing an encoder needs at least two tasks")
            .hint("give --data once for every task"));
    }
    const METHODS: [&str; 3] = ["adapters made by a hypernetwork", "adapters of each task", "a shared head"];
    let mut found: [Vec<Vec<f64>>; 3] = Default::default();
    let mut summary = Summary::default();
    for seed in 0..config.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        cx.note(format!("text, seed {}", cx.seed));
        let course = Course::new(tasks, cx);
        let encoder = course.encoder(config.steps[0])?;
        let spec = Own::spec(course.classes)?;
        let hyper = HyperNetConfig::new(spec.clone())
            .with_conditioning([Conditioning::Task { tasks: tasks.len(), dim: config.emb_dim }])
            .with_scheme(OutputScheme::Chunk { chunk: config.chunk, emb_dim: config.emb_dim })
            .with_arch(Arch::Mlp(vec![config.hidden]));
        let each = Plain::of_spec(&spec, tasks.len(), cx, "adapters");
        let head = Plain::of_spec(&spec, 1, cx, "adapters").theta.val();
        let count = Own::head_len(course.classes);
        let head = head.narrow(1, spec.numel() - count, count);
        let makers = [
            Maker::Hyper(hyper.draw(cx, "hypernet")?),
            Maker::Each(each),
            Maker::Head(Plain { theta: Param::from_tensor(head) }),
        ];
        for (number, maker) in makers.iter().enumerate() {
            let made = course.own(&encoder, maker, &spec, config.steps[1])?;
            found[number].push(course.accuracies(&encoder, &made, &spec)?);
            summary.parameters[number] = made.num_params();
        }
    }
    let mut columns = vec!["method".to_string(), "parameters beside the encoder's".into()];
    columns.extend(tasks.iter().map(|task| task.name.clone()));
    columns.push("mean".into());
    let mut table = Table::new(
        "Accuracy on texts of several tasks with one frozen encoder",
        &columns.iter().map(String::as_str).collect::<Vec<_>>(),
    );
    for (number, name) in METHODS.into_iter().enumerate() {
        let runs = &found[number];
        let of_task = |task: usize| Spread::of(&runs.iter().map(|run| run[task]).collect::<Vec<_>>());
        let means: Vec<f64> = runs.iter().map(|run| run.iter().sum::<f64>() / tasks.len() as f64).collect();
        let mut cells = vec![name.to_string(), summary.parameters[number].to_string()];
        cells.extend((0..tasks.len()).map(|task| of_task(task).text()));
        cells.push(Spread::of(&means).text());
        table.row(cells);
        summary.accuracies[number] = Spread::of(&means).mean;
    }
    let sizes: Vec<String> = tasks
        .iter()
        .map(|task| format!("{}: {} rows, {} for tests", task.name, task.train.y.len(), task.test.y.len()))
        .collect();
    let notes = vec![format!(
        "Texts: {}; {} steps of the encoder, {} of each method with either of the learning rates {RATES:?}, of which \
         the one with the lower validation loss counts.",
        sizes.join("; "),
        config.steps[0],
        config.steps[1]
    )];
    Ok((Findings { table, plots: Vec::new(), notes }, summary))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(lines: &[&str]) -> Texts {
        let words = lines.iter().map(|line| line.split(' ').map(str::to_string).collect());
        Texts { words: words.collect(), y: vec![0; lines.len()] }
    }

    #[test]
    fn longer_neighbours_do_not_change_what_a_text_is() {
        let device = Device::flex();
        let encoder = initialise(&device, &mut kiln_core::random_stream(0, "test", 0), |device| {
            Encoder::new(2, device)
        });
        let texts = texts(&["a short text", "a text that goes on and on and on"]);
        let code = |rows: Vec<usize>| {
            let mean = encoder.encode(&Batch::new(&[(&texts, rows)], &device), None);
            mean.narrow(1, 0, 1).into_data().try_to_vec::<f32>().unwrap()
        };
        for (a, b) in code(vec![0]).iter().zip(&code(vec![0, 1])) {
            assert!((a - b).abs() < 1e-5, "{a} {b}");
        }
        assert_ne!(code(vec![0]), code(vec![1]));
    }

    #[test]
    fn weights_of_nothing_leave_the_encoder_as_it_is() {
        let device = Device::flex();
        let encoder = initialise(&device, &mut kiln_core::random_stream(0, "test", 0), |device| {
            Encoder::new(2, device)
        });
        let spec = Own::spec(2).unwrap();
        let own = Own::read(&Theta::new(Tensor::zeros([1, spec.numel()], &device), spec)).unwrap();
        let texts = texts(&["one", "another text"]);
        let batch = Batch::new(&[(&texts, vec![0, 1])], &device);
        let values = |x: Tensor<3>| x.into_data().try_to_vec::<f32>().unwrap();
        assert_eq!(values(encoder.encode(&batch, Some(&own))), values(encoder.encode(&batch, None)));
    }

    #[test]
    fn pairs_have_buckets_of_their_own() {
        let (a, b) = ("not".to_string(), "good".to_string());
        assert_ne!(bucket(&[&a, &b]), bucket(&[&b, &a]));
        assert_ne!(bucket(&[&a]), bucket(&[&a, &b]));
        assert!((1..BUCKETS as i64).contains(&bucket(&[&a])));
    }
}
