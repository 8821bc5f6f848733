//! The verbs of `kiln kronecker-attention`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Instant;

use burn::module::Module;
use burn::tensor::Tensor;
use clap::{Args, Parser, Subcommand, ValueEnum};
use kiln_core::{Context, Error, HostTensor, MemoryGauge, Plot, Result, TensorFile, write_atomic};
use kiln_data::{read_tensors, write_tensors};
use kiln_nn::{TrainConfig, TrainRun, TrainSummary, initialise, likeliest};
use kiln_ops::release_freed_memory;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::attention::{AttentionOptions, MAX_ORDER, tensor_attention};
use crate::checkpoint::{self, Config, KIND};
use crate::data::{self, Coding, InputKind, Sequence};
use crate::explain::QueryWeights;
use crate::layer::Implementation;
use crate::match3::{Convention, Instance, MatchConstruction};
use crate::model::{KroneckerTransformerConfig, Target};
use crate::plan::{self, Algorithm, admissible_entries, plan};
use crate::polynomial::{Basis, ExpPolynomial, Monomials, tensor_attention_poly};
use crate::training::{ClassificationTask, Scores, predict, split};

/// The command whose runs a model folder keeps.
const TRAIN: &str = "kronecker-attention train";
/// Beyond this many tokens in a tuple, exact attention is out of reach for all but the shortest sequences.
const LARGE_ORDER: usize = 4;

/// `kiln kronecker-attention …`
#[derive(Debug, Parser)]
#[command(name = "kronecker-attention", about = "Attention in which every token looks at tuples of tokens")]
#[command(after_help = "Examples:
  kiln kronecker-attention match3 --n 8 --modulus 31 --count 5000 --out triples.jsonl
  kiln kronecker-attention train --data triples.jsonl --task token --input fourier:31 --out m/
  kiln kronecker-attention plan --in qkv.npz")]
pub struct Command {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Compute tensor attention of your own matrices
    #[command(after_help = "Examples:
  kiln kronecker-attention run-op --in qkv.npz --out o.npz
  kiln kronecker-attention run-op --in qkv.npz --impl poly --degree 6 --compare --out o.npz
The input holds Q [n, d], K1 .. Kr [m, d] and V1 .. Vr [m, dv], or each with a batch axis before.")]
    RunOp(RunOpArgs),
    /// Tell which algorithm suits your matrices, and why
    #[command(after_help = "Examples:
  kiln kronecker-attention plan --in qkv.npz --eps 1e-3
  kiln kronecker-attention plan --in qkv.npz --trade-off entries.svg")]
    Plan(PlanArgs),
    /// Train a classifier of tokens or of sequences
    #[command(after_help = "Examples:
  kiln kronecker-attention train --data triples.jsonl --task token --input fourier:31 --out m/
  kiln kronecker-attention train --data molecules.csv --task sequence --positions --out m/
  kiln kronecker-attention train --data vectors.npz --task sequence --input numeric --attention pair --out m/
  kiln kronecker-attention train --data triples.jsonl --resume m/      after Ctrl-C or a crash")]
    Train(TrainArgs),
    /// Label sequences with a trained model
    #[command(after_help = "Example:
  kiln kronecker-attention predict --model m/ --data new.jsonl --explain 3 --out labels.csv")]
    Predict(PredictArgs),
    /// Score a trained model on labelled sequences
    #[command(after_help = "Example:
  kiln kronecker-attention eval --model m/ --data test.jsonl")]
    Eval(EvalArgs),
    /// Draw the weights of pairs that a token looks at
    #[command(after_help = "Example:
  kiln kronecker-attention plot --model m/ --data test.jsonl --row 1 --token 3 --out pairs.svg")]
    Plot(PlotArgs),
    /// Make instances of the triple problem Match3, or solve them with weights in closed form
    #[command(after_help = "Examples:
  kiln kronecker-attention match3 --n 8 --modulus 31 --count 10000 --convention distinct --out triples.jsonl
  kiln kronecker-attention match3 --solve instances.jsonl")]
    Match3(Match3Args),
}

#[derive(Debug, Args)]
struct RunOpArgs {
    /// .npz or .safetensors file with Q, K1.., V1..
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Number of key and value matrices, or `auto` for all that are there
    #[arg(long, default_value = "auto")]
    order: String,
    /// Algorithm
    #[arg(long = "impl", value_enum, default_value = "auto")]
    implementation: Implementation,
    /// Degree of the polynomial; by default the smallest that certifies --eps
    #[arg(long)]
    degree: Option<usize>,
    /// Polynomial in place of the exponential
    #[arg(long, value_enum, default_value = "chebyshev")]
    basis: Basis,
    /// Largest certified error, as a multiple of the largest values
    #[arg(long, default_value_t = 1e-3)]
    eps: f64,
    /// Factor of the scores: 1/d, 1/sqrt(d), or a number
    #[arg(long, default_value = "1/d")]
    scale: String,
    /// A query sees only tuples up to its own place
    #[arg(long)]
    causal: bool,
    /// Refuse more multiplications than this
    #[arg(long, default_value_t = 1e13)]
    max_ops: f64,
    /// Compute exact attention over tuples of more than 4 tokens
    #[arg(long)]
    force: bool,
    /// Refuse more monomials than this
    #[arg(long, default_value_t = 100_000)]
    max_rank: usize,
    /// Compute both and tell the true error
    #[arg(long)]
    compare: bool,
    /// .npz or .safetensors file to write, with O
    #[arg(long)]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct PlanArgs {
    /// .npz or .safetensors file with Q, K1.., V1..
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Largest certified error, as a multiple of the largest values
    #[arg(long, default_value_t = 1e-3)]
    eps: f64,
    /// Factor of the scores: 1/d, 1/sqrt(d), or a number
    #[arg(long, default_value = "1/d")]
    scale: String,
    /// Polynomial in place of the exponential
    #[arg(long, value_enum, default_value = "chebyshev")]
    basis: Basis,
    /// Also draw the largest entries that stay near-linear against the order, into this SVG or PNG file
    #[arg(long, value_name = "FILE")]
    trade_off: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct TrainArgs {
    /// .jsonl, .csv or .npz file of labelled sequences
    #[arg(long)]
    data: PathBuf,
    /// Folder for the model
    #[arg(long, required_unless_present = "resume")]
    out: Option<PathBuf>,
    /// Continue the run in this folder; only --steps may grow
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    resume: Option<PathBuf>,
    /// Optimisation steps in all [default: 900]
    #[arg(long)]
    steps: Option<usize>,
    /// Train on tuples of more than 4 tokens
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    recipe: Recipe,
}

/// What decides the outcome of a training run, besides data, steps and seed.
#[derive(Debug, Clone, Args, Serialize, Deserialize)]
struct Recipe {
    /// What has a label
    #[arg(long, value_enum, default_value = "token", conflicts_with = "resume")]
    task: Target,
    /// Tuples, or ordinary pairwise attention
    #[arg(long, value_enum, default_value = "tensor", conflicts_with = "resume")]
    attention: Attention,
    /// Tokens in a tuple besides the query
    #[arg(long, default_value_t = 2, conflicts_with = "resume")]
    order: usize,
    /// How attention is computed
    #[arg(long = "impl", value_enum, default_value = "exact", conflicts_with = "resume")]
    implementation: Implementation,
    /// Width of the model
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    dim: usize,
    /// Attention heads
    #[arg(long, default_value_t = 4, conflicts_with = "resume")]
    heads: usize,
    /// Number of blocks
    #[arg(long, default_value_t = 1, conflicts_with = "resume")]
    layers: usize,
    /// Factor of the scores [default: 1 / head width]
    #[arg(long, conflicts_with = "resume")]
    score_scale: Option<f64>,
    /// Tokens as symbols (embed), residues (fourier:M) or numbers (numeric)
    #[arg(long, default_value = "embed", conflicts_with = "resume")]
    input: String,
    /// The places of tokens matter
    #[arg(long, conflicts_with = "resume")]
    positions: bool,
    /// A token sees only those before it
    #[arg(long, conflicts_with = "resume")]
    causal: bool,
    /// Probability that a channel is dropped in training
    #[arg(long, default_value_t = 0.0, conflicts_with = "resume")]
    dropout: f64,
    /// Sequences a batch
    #[arg(long, default_value_t = 64, conflicts_with = "resume")]
    batch: usize,
    /// Highest learning rate
    #[arg(long, default_value_t = 3e-3, conflicts_with = "resume")]
    lr: f64,
    /// Steps over which the learning rate rises
    #[arg(long, default_value_t = 50, conflicts_with = "resume")]
    warmup: usize,
    /// Decoupled weight decay
    #[arg(long, default_value_t = 0.0, conflicts_with = "resume")]
    weight_decay: f64,
    /// Share of the sequences that is held out for validation
    #[arg(long, default_value_t = 0.1, conflicts_with = "resume")]
    val_fraction: f64,
    /// Steps between validations
    #[arg(long, default_value_t = 100, conflicts_with = "resume")]
    eval_every: usize,
    /// Steps between checkpoints: what a crash can cost at most
    #[arg(long, default_value_t = 100, conflicts_with = "resume")]
    checkpoint_every: usize,
    /// Stop after so many validations without improvement
    #[arg(long, conflicts_with = "resume")]
    patience: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Attention {
    /// Every token looks at tuples of --order tokens
    Tensor,
    /// Every token looks at single tokens
    Pair,
}

#[derive(Debug, Args)]
struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .jsonl, .csv or .npz file of sequences
    #[arg(long)]
    data: PathBuf,
    /// CSV file to write: row, position, label, probability
    #[arg(long)]
    out: PathBuf,
    /// Also write the tuples with the highest weights of each token
    #[arg(long, value_name = "COUNT")]
    explain: Option<usize>,
}

#[derive(Debug, Args)]
struct EvalArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .jsonl, .csv or .npz file of labelled sequences
    #[arg(long)]
    data: PathBuf,
}

#[derive(Debug, Args)]
struct PlotArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// .jsonl, .csv or .npz file of sequences
    #[arg(long)]
    data: PathBuf,
    /// Which sequence, from 1
    #[arg(long, default_value_t = 1)]
    row: usize,
    /// Which token of it looks, from 0
    #[arg(long, default_value_t = 0)]
    token: usize,
    /// SVG or PNG file to write
    #[arg(long, default_value = "pairs.svg")]
    out: PathBuf,
}

#[derive(Debug, Args)]
struct Match3Args {
    /// Tokens of an instance
    #[arg(long, default_value_t = 8)]
    n: usize,
    /// The modulus M
    #[arg(long, default_value_t = 31)]
    modulus: u64,
    /// Number of instances
    #[arg(long, default_value_t = 10_000)]
    count: usize,
    /// Which triples count
    #[arg(long, value_enum, default_value = "distinct")]
    convention: Convention,
    /// Solve the instances {"M":.., "x":[..]} of this JSON or JSONL file instead
    #[arg(long, value_name = "FILE", conflicts_with_all = ["n", "modulus", "count"])]
    solve: Option<PathBuf>,
    /// JSONL file to write; standard output by default when solving
    #[arg(long, required_unless_present = "solve")]
    out: Option<PathBuf>,
}

impl Command {
    /// Runs the verb.
    ///
    /// # Errors
    /// Whatever the verb's work runs into.
    pub fn run(self, cx: &Context) -> Result<()> {
        match self.verb {
            Verb::RunOp(args) => run_op(&args, cx),
            Verb::Plan(args) => run_plan(&args, cx),
            Verb::Train(args) => run_train(&args, cx),
            Verb::Predict(args) => run_predict(&args, cx),
            Verb::Eval(args) => run_eval(&args, cx),
            Verb::Plot(args) => run_plot(&args, cx),
            Verb::Match3(args) => run_match3(&args, cx),
        }
    }
}

/// Queries, keys and values of a file, `[batch, 1, rows, width]`.
struct Matrices {
    q: Tensor<4>,
    keys: Vec<Tensor<4>>,
    values: Vec<Tensor<4>>,
    /// Whether the file has a batch axis.
    batched: bool,
}

impl Matrices {
    fn read(path: &Path, order: Option<usize>, cx: &Context) -> Result<Self> {
        let mut file = read_tensors(path)?;
        let count = |letter: char| (1..).take_while(|l| file.get(&format!("{letter}{l}")).is_some()).count();
        let (keys, values) = (count('K'), count('V'));
        let order = order.unwrap_or(keys.max(1));
        if keys < order || values < order || order == 0 {
            let found =
                format!("holds {keys} key matrices (K1, K2, ..) and {values} value matrices (V1, V2, ..)");
            let hint = format!("order {order} needs Q, K1 to K{order} and V1 to V{order}");
            return Err(Error::input(path.display(), found).hint(hint));
        }
        let q = Matrix::take(&mut file, "Q".into(), path)?;
        let mut take = |letter: char| {
            (1..=order)
                .map(|l| Matrix::take(&mut file, format!("{letter}{l}"), path))
                .collect::<Result<Vec<_>>>()
        };
        let (keys, values) = (take('K')?, take('V')?);
        for (k, v) in keys.iter().zip(&values) {
            q.must_share(k, "the same batch and width", |m| [m.batch, m.width])?;
            k.must_share(v, "the same batch and number of rows", |m| [m.batch, m.rows])?;
            values[0].must_share(v, "the same width", |m| [m.width, 0])?;
        }
        let tensors = |matrices: Vec<Matrix>| matrices.into_iter().map(|m| m.tensor(cx)).collect();
        let batched = q.batched;
        Ok(Self { q: q.tensor(cx), keys: tensors(keys), values: tensors(values), batched })
    }

    /// s, from what `--scale` says.
    fn scale(&self, text: &str) -> Result<f64> {
        let width = self.q.dims()[3] as f64;
        match text.replace(' ', "").as_str() {
            "1/d" => Ok(1.0 / width),
            "1/sqrt(d)" => Ok(1.0 / width.sqrt()),
            number => number.parse().ok().filter(|s: &f64| s.is_finite()).ok_or_else(|| {
                Error::usage(format!("--scale {text} is neither 1/d, 1/sqrt(d) nor a number"))
            }),
        }
    }

    /// `∏ |V_l|∞`, what certificates are multiples of.
    fn largest_values(&self) -> f64 {
        self.values.iter().map(|v| v.clone().abs().max().into_scalar::<f32>()).map(f64::from).product()
    }
}

/// One matrix of a file, with or without a batch axis.
struct Matrix {
    name: String,
    place: String,
    batched: bool,
    batch: usize,
    rows: usize,
    width: usize,
    values: Vec<f32>,
}

impl Matrix {
    fn take(file: &mut TensorFile, name: String, path: &Path) -> Result<Self> {
        let HostTensor { shape, values } = file.take(&name)?;
        let place = path.display().to_string();
        let wrong = |found: String| {
            Error::input(&place, format!("\"{name}\" {found}"))
                .hint("matrices are floats [rows, width], or [batch, rows, width]")
        };
        let (batched, batch, rows, width) = match shape[..] {
            [rows, width] => (false, 1, rows, width),
            [batch, rows, width] => (true, batch, rows, width),
            _ => return Err(wrong(format!("has the shape {shape:?}"))),
        };
        let kiln_core::Values::Float(values) = values else { return Err(wrong("holds integers".into())) };
        if values.is_empty() {
            return Err(wrong(format!("is empty: {shape:?}")));
        }
        if let Some(at) = values.iter().position(|x| !x.is_finite()) {
            return Err(wrong(format!("is {} at row {}, column {}", values[at], at / width, at % width)));
        }
        Ok(Self { name, place, batched, batch, rows, width, values })
    }

    fn must_share(&self, other: &Self, what: &str, of: impl Fn(&Self) -> [usize; 2]) -> Result<()> {
        if of(self) == of(other) && self.batched == other.batched {
            return Ok(());
        }
        let shape = |m: &Self| format!("\"{}\" {}x{}x{}", m.name, m.batch, m.rows, m.width);
        Err(Error::input(&self.place, format!("{} and {} must have {what}", shape(self), shape(other))))
    }

    fn tensor(self, cx: &Context) -> Tensor<4> {
        let data = burn::tensor::TensorData::new(self.values, [self.batch, 1, self.rows, self.width]);
        Tensor::from_data(data, &cx.device)
    }
}

fn run_op(args: &RunOpArgs, cx: &Context) -> Result<()> {
    let order = match args.order.as_str() {
        "auto" => None,
        number => Some(
            number
                .parse()
                .map_err(|_| Error::usage(format!("--order {number} is neither auto nor a number")))?,
        ),
    };
    let matrices = Matrices::read(&args.input, order, cx)?;
    let Matrices { q, keys, values, .. } = &matrices;
    let order = keys.len();
    let scale = matrices.scale(&args.scale)?;
    let options = AttentionOptions::new(scale).causal(args.causal);
    let range = plan::score_bound(q, keys, scale);
    let polynomial = match args.degree {
        Some(degree) => ExpPolynomial::new(args.basis, degree, range),
        None => ExpPolynomial::within(args.basis, args.eps, range),
    };
    let polynomial = match args.implementation {
        Implementation::Poly if args.causal => {
            return Err(Error::usage("polynomial attention cannot be causal").hint("use --impl exact"));
        }
        Implementation::Poly => Some(certified(polynomial?, q, args)?),
        Implementation::Auto if args.causal => None,
        Implementation::Auto => polynomial
            .ok()
            .and_then(|polynomial| certified(polynomial, q, args).ok())
            .filter(|polynomial| plan::cheaper(q, keys, values, polynomial) == Algorithm::Poly),
        Implementation::Exact => None,
    };
    let operations = plan::exact_operations(q, keys, values) * q.dims()[0] as f64;
    let exactly = polynomial.is_none() || args.compare;
    if exactly {
        affordable(order, args.force, &format!("{operations:.1e} multiplications"))?;
    }
    if exactly && operations > args.max_ops {
        return Err(Error::usage(format!(
            "{operations:.1e} multiplications are more than --max-ops {:.1e}",
            args.max_ops
        ))
        .hint("use --impl poly, or raise --max-ops"));
    }

    let exact = || tensor_attention(q.clone(), keys, values, &options);
    let compute = || match &polynomial {
        Some(polynomial) => tensor_attention_poly(q.clone(), keys, values, &options, polynomial),
        None => exact(),
    };
    release_freed_memory();
    let begun = Instant::now();
    let (o, peak) = match MemoryGauge::start() {
        Some(gauge) => gauge.peak(compute),
        None => (compute(), None),
    };
    let seconds = begun.elapsed().as_secs_f64();
    let error = args.compare.then(|| f64::from((o.clone() - exact()).abs().max().into_scalar::<f32>()));

    let [batch, _, rows, width] = o.dims();
    let o = match matrices.batched {
        true => HostTensor::from_tensor(o.reshape([batch, rows, width])),
        false => HostTensor::from_tensor(o.reshape([rows, width])),
    };
    let mut file = TensorFile::new();
    file.insert("O", o);
    write_tensors(&args.out, &file)?;
    let bound = polynomial.as_ref().map(|p| p.certificate() * matrices.largest_values());
    let result = json!({
        "impl": if polynomial.is_some() { "poly" } else { "exact" },
        "order": order,
        "R": range,
        "degree": polynomial.as_ref().map(ExpPolynomial::degree),
        "rank": polynomial.as_ref().map(|p| Monomials::new(q.dims()[3], p.degree()).rank()),
        "certificate": bound,
        "error": error,
        "seconds": seconds,
        "peak_bytes": peak,
        "out": args.out,
    });
    cx.emit(&result, |_| {
        let mut text = match &polynomial {
            Some(p) => {
                format!("polynomial of degree {}, error at most {:.2e}", p.degree(), bound.unwrap_or(0.0))
            }
            None => "exact".to_string(),
        };
        if let Some(error) = error {
            text += &format!(", in truth {error:.2e}");
        }
        text + &format!("; {seconds:.3} s; O in {}\n", args.out.display())
    })
}

/// Exact attention over tuples of more than [`LARGE_ORDER`] tokens must be asked for twice.
fn affordable(order: usize, force: bool, cost: &str) -> Result<()> {
    if order > MAX_ORDER {
        return Err(Error::usage(format!(
            "order {order} is above {MAX_ORDER}, the highest that is computed"
        ))
        .hint("polynomial attention has no highest order: --impl poly"));
    }
    if order > LARGE_ORDER && !force {
        let message = format!("order {order} costs n^{} times the width: {cost}", order + 1);
        return Err(Error::usage(message).hint("use --force if you mean it, or a lower --order"));
    }
    Ok(())
}

/// The polynomial, if it is positive and has few enough monomials.
fn certified(polynomial: ExpPolynomial, q: &Tensor<4>, args: &RunOpArgs) -> Result<ExpPolynomial> {
    let degree = polynomial.degree();
    if polynomial.certificate().is_infinite() {
        let message = format!("degree {degree} certifies nothing for scores up to {:.3}", polynomial.range);
        let smallest = (degree + 1..=crate::polynomial::MAX_DEGREE)
            .filter_map(|degree| ExpPolynomial::new(args.basis, degree, polynomial.range).ok())
            .find(|polynomial| polynomial.certificate().is_finite());
        return Err(Error::usage(message).hint(match smallest {
            Some(p) => format!("the smallest degree that works is {}", p.degree()),
            None => "use --impl exact, or scale the entries down".into(),
        }));
    }
    let rank = Monomials::count(q.dims()[3], degree);
    if rank > args.max_rank as f64 {
        return Err(Error::usage(format!(
            "degree {degree} needs {rank:.0} monomials, more than --max-rank {}",
            args.max_rank
        ))
        .hint("use --impl exact, a larger --eps, or raise --max-rank"));
    }
    Ok(polynomial)
}

fn run_plan(args: &PlanArgs, cx: &Context) -> Result<()> {
    let matrices = Matrices::read(&args.input, None, cx)?;
    let scale = matrices.scale(&args.scale)?;
    let plan = plan(&matrices.q, &matrices.keys, &matrices.values, scale, args.basis, args.eps)?;
    let trade_off = match &args.trade_off {
        Some(path) => {
            let entries = admissible_entries(plan.queries, plan.width, args.eps, &[1, 2, 3, 4])?;
            let points = entries.iter().map(|&(order, entry)| (order as f64, entry)).collect();
            Plot::lines("Largest entries that stay near-linear", "order r", "B")
                .series(format!("rank at most √n, n = {}, d = {}", plan.queries, plan.width), points)
                .save(path)?;
            Some(entries)
        }
        None => None,
    };
    let mut result =
        serde_json::to_value(&plan).map_err(|e| Error::work("cannot write the plan").caused_by(e))?;
    result["trade_off"] = json!(trade_off);
    cx.emit(&result, |_| {
        let or_none = |value: Option<String>| value.unwrap_or_else(|| "none".into());
        let mut text = format!(
            "order {}, {} queries, width {}\n\
             largest entry B {:.4}, {:.4} with balanced columns\n\
             scores at most R {:.4} (s d B^{}: {:.4})\n\
             degree {} for an error of {}, rank {} (by the power series {})\n\
             multiplications: exact {:.2e}, polynomial {}\n\
             recommended: {}\n",
            plan.order,
            plan.queries,
            plan.width,
            plan.largest_entry,
            plan.balanced_entry,
            plan.score_bound,
            plan.order + 1,
            plan.plain_score_bound,
            or_none(plan.degree.map(|g| g.to_string())),
            plan.epsilon,
            or_none(plan.rank.map(|rank| rank.to_string())),
            or_none(plan.taylor_rank.map(|rank| rank.to_string())),
            plan.exact_operations,
            or_none(plan.poly_operations.map(|n| format!("{n:.2e}"))),
            if plan.recommended == Algorithm::Poly { "poly" } else { "exact" },
        );
        for (order, entry) in trade_off.iter().flatten() {
            text += &format!("order {order}: near-linear for entries up to {entry:.4}\n");
        }
        text
    })
}

fn run_train(args: &TrainArgs, cx: &Context) -> Result<()> {
    let run = match (&args.resume, &args.out) {
        (Some(folder), _) => TrainRun::resume(TRAIN, folder, args.steps)?,
        (None, Some(out)) => TrainRun::begin(TRAIN, out, args.steps.unwrap_or(900), args.recipe.clone(), cx),
        (None, None) => return Err(Error::usage("--out or --resume is needed")),
    };
    let cx = &run.context(cx);
    let recipe = &run.recipe;
    if recipe.batch == 0 {
        return Err(Error::usage("--batch must be at least 1"));
    }
    if !(recipe.val_fraction > 0.0 && recipe.val_fraction < 1.0) {
        return Err(Error::usage(format!("--val-fraction {} is not between 0 and 1", recipe.val_fraction)));
    }

    let sequences = data::read(&args.data)?;
    if sequences.len() < 2 {
        return Err(Error::input(args.data.display(), "holds one sequence, needs at least two")
            .hint("one is held out for validation"));
    }
    let config = if run.resumed {
        let config: Config = run.folder.config(KIND)?;
        config.coding.check(&sequences, &args.data, true)?;
        config
    } else {
        let coding = Coding::of(&sequences, input_kind(&recipe.input)?, recipe.task, &args.data)?;
        let order = if recipe.attention == Attention::Pair { 1 } else { recipe.order };
        let longest = sequences.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        let tuples = (longest as f64 + 1.0).powi(order as i32);
        affordable(order, args.force, &format!("{tuples:.1e} tuples a token of the longest sequence"))?;
        let network = KroneckerTransformerConfig {
            orders: vec![order; recipe.layers],
            scale: recipe.score_scale,
            implementation: recipe.implementation,
            causal: recipe.causal,
            positions: recipe.positions,
            dropout: recipe.dropout,
            ..KroneckerTransformerConfig::new(
                coding.input.clone(),
                recipe.task,
                coding.classes.len(),
                recipe.dim,
                recipe.heads,
            )
        };
        Config { network, coding }
    };
    config.network.check()?;
    let train_config = TrainConfig {
        steps: run.steps,
        lr: recipe.lr,
        warmup: recipe.warmup,
        min_lr_ratio: 0.0,
        weight_decay: recipe.weight_decay,
        eval_every: recipe.eval_every,
        checkpoint_every: recipe.checkpoint_every,
        patience: recipe.patience,
        ..TrainConfig::default()
    };
    train_config.check()?;
    run.save(|folder| folder.save_config(KIND, &config))?;

    let model = initialise(&cx.device, &mut cx.rng("init", 0), |device| config.network.init(device));
    let (train_part, valid_part) = split(sequences, recipe.val_fraction, cx);
    cx.note(format!(
        "{} parameters, {} sequences, {} held out",
        model.num_params(),
        train_part.len(),
        valid_part.len()
    ));
    let mut task = ClassificationTask::new(&train_part, &valid_part, &config.coding, recipe.batch, cx);
    let data = format!("--data {}", args.data.display());
    let trained = run.train(model, &mut task, &train_config, &data, cx)?;
    let summary = run.finish(&trained, "nats per label")?;
    let predictions = predict(&trained.model, &config.coding, &valid_part, cx);
    let result = TrainResult { summary, validation: Scores::new(&predictions, &valid_part, &config.coding) };
    cx.emit(&result, |TrainResult { summary, validation }| {
        format!(
            "{}{}model in {}\n",
            summary.to_text("nats a label"),
            scores_text(validation),
            summary.model.display()
        )
    })
}

/// What `train` prints.
#[derive(Serialize)]
struct TrainResult {
    #[serde(flatten)]
    summary: TrainSummary,
    /// Of the best weights, on the sequences held out.
    validation: Scores,
}

fn input_kind(text: &str) -> Result<InputKind> {
    match text.split_once(':') {
        None if text == "embed" => Ok(InputKind::Embed),
        None if text == "numeric" => Ok(InputKind::Numeric),
        Some(("fourier", modulus)) => modulus
            .parse()
            .map(InputKind::Fourier)
            .map_err(|_| Error::usage(format!("the modulus \"{modulus}\" is not a whole number"))),
        _ => Err(Error::usage(format!("--input {text} is neither embed, fourier:M nor numeric"))),
    }
}

fn scores_text(scores: &Scores) -> String {
    let auc = scores.auc.map_or(String::new(), |auc| format!(", AUC {auc:.4}"));
    format!(
        "accuracy {:.4} on {} labels (commonest label {:.4}), macro F1 {:.4}{auc}\n",
        scores.accuracy, scores.labels, scores.majority, scores.macro_f1
    )
}

fn run_predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (Config { coding, .. }, model) = checkpoint::open(&args.model, cx)?;
    let sequences = data::read(&args.data)?;
    let unlabelled: Vec<Sequence> =
        sequences.into_iter().map(|sequence| Sequence { labels: Vec::new(), ..sequence }).collect();
    coding.check(&unlabelled, &args.data, false)?;
    let predictions = predict(&model, &coding, &unlabelled, cx);

    let mut writer = csv::Writer::from_writer(Vec::new());
    let mut heads = vec!["row", "position", "label", "probability"];
    heads.extend(args.explain.map(|_| "tuples"));
    let failed = |e: csv::Error| Error::work("cannot lay out the predictions").caused_by(e);
    writer.write_record(&heads).map_err(failed)?;
    for (row, (sequence, predictions)) in unlabelled.iter().zip(&predictions).enumerate() {
        let weights = match args.explain {
            Some(_) => QueryWeights::of(&model, &coding, sequence, cx),
            None => Vec::new(),
        };
        for (at, probabilities) in predictions.iter().enumerate() {
            let best = likeliest(probabilities);
            let position = if coding.target == Target::Token { at.to_string() } else { String::new() };
            let mut cells = vec![
                (row + 1).to_string(),
                position,
                coding.classes[best].clone(),
                format!("{:.6}", probabilities[best]),
            ];
            cells.extend(args.explain.map(|count| tuples_text(&weights[at], count)));
            writer.write_record(&cells).map_err(failed)?;
        }
    }
    let bytes =
        writer.into_inner().map_err(|e| Error::work(format!("cannot lay out the predictions: {e}")))?;
    write_atomic(&args.out, &bytes)?;
    let labels: usize = predictions.iter().map(Vec::len).sum();
    let result = json!({ "sequences": unlabelled.len(), "labels": labels, "out": args.out });
    cx.emit(&result, |_| {
        format!("{labels} labels of {} sequences in {}\n", unlabelled.len(), args.out.display())
    })
}

/// Tuples as `3+5 0.71; blank+2 0.10`.
fn tuples_text(weights: &QueryWeights, count: usize) -> String {
    let tuple = |tuple: crate::explain::Tuple| {
        let place = |place: &Option<usize>| place.map_or("blank".to_string(), |place| place.to_string());
        format!("{} {:.4}", tuple.places.iter().map(place).collect::<Vec<_>>().join("+"), tuple.weight)
    };
    weights.strongest(count).into_iter().map(tuple).collect::<Vec<_>>().join("; ")
}

fn run_eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (Config { coding, .. }, model) = checkpoint::open(&args.model, cx)?;
    let sequences = data::read(&args.data)?;
    coding.check(&sequences, &args.data, true)?;
    let scores = Scores::new(&predict(&model, &coding, &sequences, cx), &sequences, &coding);
    cx.emit(&scores, scores_text)
}

fn run_plot(args: &PlotArgs, cx: &Context) -> Result<()> {
    let (Config { coding, .. }, model) = checkpoint::open(&args.model, cx)?;
    let sequences = data::read(&args.data)?;
    let Some(sequence) = args.row.checked_sub(1).and_then(|row| sequences.get(row)) else {
        return Err(Error::usage(format!("--row {} is not 1 to {}", args.row, sequences.len())));
    };
    coding.check(std::slice::from_ref(sequence), &args.data, false)?;
    if args.token >= sequence.tokens.len() {
        return Err(Error::usage(format!("--token {} is not below {}", args.token, sequence.tokens.len())));
    }
    let weights = QueryWeights::of(&model, &coding, sequence, cx).swap_remove(args.token);
    if weights.order != 2 {
        return Err(Error::usage(format!(
            "the model looks at tuples of {}, only pairs are drawn",
            weights.order
        ))
        .hint("predict --explain lists tuples of every order"));
    }
    let values = weights.weights.iter().map(|&w| f64::from(w)).collect();
    let title = format!("Pairs that token {} of sequence {} looks at", args.token, args.row);
    Plot::heat_map(
        title,
        "second token + 1 (0: blank)",
        "first token + 1 (0: blank)",
        weights.tokens,
        values,
    )
    .save(&args.out)?;
    let strongest = weights.strongest(5);
    cx.emit(&json!({ "plot": args.out, "strongest": strongest }), |_| {
        format!("{}\nplot in {}\n", tuples_text(&weights, 5), args.out.display())
    })
}

fn run_match3(args: &Match3Args, cx: &Context) -> Result<()> {
    if let Some(path) = &args.solve {
        return solve_match3(path, args, cx);
    }
    let Some(out) = &args.out else { return Err(Error::usage("--out is needed")) };
    if args.n == 0 || args.modulus < 2 {
        return Err(Error::usage("--n must be at least 1 and --modulus at least 2"));
    }
    let mut rng = cx.rng("match3", 0);
    let mut lines = String::new();
    let mut positive = 0;
    for _ in 0..args.count {
        let instance = Instance::draw(args.n, args.modulus, &mut rng);
        let labels = instance.labels(args.convention);
        positive += labels.iter().filter(|&&label| label).count();
        let line = json!({ "tokens": instance.x, "labels": ones(&labels), "M": args.modulus });
        lines += &format!("{line}\n");
    }
    write_atomic(out, lines.as_bytes())?;
    let share = positive as f64 / (args.count * args.n).max(1) as f64;
    let result = json!({ "instances": args.count, "share_with_match": share, "out": out });
    cx.emit(&result, |_| {
        format!(
            "{} instances, {:.1} % of tokens have a match, in {}\n",
            args.count,
            100.0 * share,
            out.display()
        )
    })
}

fn ones(labels: &[bool]) -> Vec<u8> {
    labels.iter().map(|&label| label.into()).collect()
}

fn solve_match3(path: &Path, args: &Match3Args, cx: &Context) -> Result<()> {
    let mut solved = Vec::new();
    for (number, value) in instances(path)?.into_iter().enumerate() {
        let place = format!("{}, instance {}", path.display(), number + 1);
        let Value::Object(mut object) = value else {
            return Err(Error::input(place, "is not an object {\"M\":.., \"x\":[..]}"));
        };
        let instance: Instance = serde_json::from_value(Value::Object(object.clone()))
            .map_err(|e| Error::input(&place, "is not {\"M\":.., \"x\":[..]}").caused_by(e))?;
        instance.check(&place)?;
        let labels = match args.convention {
            // The closed form covers this convention only.
            Convention::Any => {
                let o = MatchConstruction { modulus: instance.modulus }.solve(&instance.x, &cx.device);
                o.iter().map(|&o| o > 0.5).collect()
            }
            Convention::Distinct => instance.labels(Convention::Distinct),
        };
        object.insert("labels".into(), json!(ones(&labels)));
        solved.push(Value::Object(object));
    }
    match &args.out {
        Some(out) => {
            let lines: String = solved.iter().map(|line| format!("{line}\n")).collect();
            write_atomic(out, lines.as_bytes())?;
            let result = json!({ "instances": solved.len(), "out": out });
            cx.emit(&result, |_| format!("{} instances solved, in {}\n", solved.len(), out.display()))
        }
        None => cx.emit(&solved, |solved| solved.iter().map(|line| format!("{line}\n")).collect()),
    }
}

/// The objects of a JSON list, a single JSON object or JSONL.
fn instances(path: &Path) -> Result<Vec<Value>> {
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    let whole: Result<Value, _> = serde_json::from_reader(BufReader::new(&file));
    match whole {
        Ok(Value::Array(list)) => return Ok(list),
        Ok(object) => return Ok(vec![object]),
        Err(_) => {}
    }
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    let mut objects = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(Error::io("read", path))?;
        if line.trim().is_empty() {
            continue;
        }
        objects.push(serde_json::from_str(&line).map_err(|e| {
            Error::input(format!("{}, line {}", path.display(), number + 1), "is not valid JSON").caused_by(e)
        })?);
    }
    Ok(objects)
}
