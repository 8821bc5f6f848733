//! The workloads that `peer.py` measures in PyTorch, measured here; `cargo xtask bench ops` runs both in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`. A time is the median of several repetitions
//! after a warm-up; memory is how far the resident set of a process that runs only this workload rises above
//! where it was after the start. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::mem::take;
use std::process::Command;
use std::time::Instant;

use burn::backend::{BackendTensor, DispatchTensorKind};
use burn::tensor::{Device, Distribution, Tensor};
use burn_flex::FlexTensor;
use kiln_core::MemoryGauge;
use kiln_ops::{Activation, AdamWStep, Function, Parameter, activate, apply, flex, layer_norm, rms_norm};

/// Set for a process whose memory is measured: the name of its workload.
const MEMORY_VARIABLE: &str = "KILN_BENCH_MEMORY";

/// Work that is ready to be repeated.
type Work = Box<dyn FnMut()>;

/// A workload by name: the function prepares its operands.
type Workload = (&'static str, fn() -> Work);

const WORKLOADS: &[Workload] = &[
    ("gemm 1024", gemm),
    ("gelu 4096x1024 fwd", || infer(|x| activate(x, Activation::Gelu))),
    ("gelu 4096x1024 fwd+bwd", || train(|x| activate(x, Activation::Gelu))),
    ("layer norm 4096x1024 fwd+bwd", layer_norms),
    ("rms norm 4096x1024 fwd+bwd", rms_norms),
    ("adamw step 50M", adamw),
];

/// Of these the memory is measured as well.
const MEMORY: &[&str] = &["adamw step 50M"];

fn normal<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

/// A tensor that wants a gradient.
fn leaf<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::from_inner(normal(shape)).require_grad()
}

fn gemm() -> Work {
    let (a, b) = (normal([1024, 1024]), normal([1024, 1024]));
    Box::new(move || {
        black_box(kiln_ops::matmul(a.clone(), b.clone()));
    })
}

/// A function of one matrix without gradients.
fn infer(f: impl Fn(Tensor<2>) -> Tensor<2> + 'static) -> Work {
    let x = normal([4096, 1024]);
    Box::new(move || {
        black_box(f(x.clone()));
    })
}

/// A function of one matrix, forward and backward.
fn train(f: impl Fn(Tensor<2>) -> Tensor<2> + 'static) -> Work {
    let x = leaf([4096, 1024]);
    pull_back(move || f(x.clone()))
}

/// Forward and backward of `f`, which depends on tensors that want a gradient.
fn pull_back<const D: usize>(f: impl Fn() -> Tensor<D> + 'static) -> Work {
    let upstream = Upstream::of(&f());
    Box::new(move || {
        black_box(upstream.attach(f()).backward());
    })
}

/// A function whose gradient is what it was made with, so that a backward pass can begin from any gradient.
#[derive(Debug, Clone)]
struct Upstream(FlexTensor);

impl Upstream {
    /// A random gradient for tensors like `output`.
    fn of<const D: usize>(output: &Tensor<D>) -> Self {
        match normal(output.dims()).into_dispatch().kind {
            DispatchTensorKind::Flex(BackendTensor::Float(gradient)) => Self(gradient),
            other => panic!("not a CPU tensor: {other:?}"),
        }
    }

    fn attach<const D: usize>(&self, output: Tensor<D>) -> Tensor<1> {
        Tensor::from_dispatch(apply(self, [output.into_dispatch()]))
    }
}

impl Function<1> for Upstream {
    type Saved = ();

    fn forward(&self, _: [FlexTensor; 1]) -> (FlexTensor, ()) {
        (flex::tensor(vec![0.0], [1]), ())
    }

    fn backward(&self, (): (), _: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        [Some(self.0.clone())]
    }
}

fn layer_norms() -> Work {
    let (x, weight, bias) = (leaf([4096, 1024]), leaf([1024]), leaf([1024]));
    pull_back(move || layer_norm(x.clone(), weight.clone(), Some(bias.clone()), 1e-5))
}

fn rms_norms() -> Work {
    let (x, weight) = (leaf([4096, 1024]), leaf([1024]));
    pull_back(move || rms_norm(x.clone(), weight.clone(), 1e-5))
}

/// 50 million parameters in 150 tensors.
fn adamw() -> Work {
    const LENGTH: usize = 577 * 578;
    let gradients: Vec<Tensor<1>> = (0..150).map(|_| normal([LENGTH])).collect();
    let mut optimiser = AdamW::new(vec![normal([LENGTH]); 150]);
    Box::new(move || optimiser.step(gradients.clone()))
}

/// Parameters with the state of their optimiser.
struct AdamW {
    parameters: Vec<Tensor<1>>,
    moments: Vec<[Tensor<1>; 2]>,
    steps: i32,
}

impl AdamW {
    fn new(parameters: Vec<Tensor<1>>) -> Self {
        let zeros = |x: &Tensor<1>| [x.zeros_like(), x.zeros_like()];
        Self { moments: parameters.iter().map(zeros).collect(), parameters, steps: 0 }
    }

    fn step(&mut self, gradients: Vec<Tensor<1>>) {
        self.steps += 1;
        let step = AdamWStep { lr: 1e-4, betas: (0.9, 0.999), epsilon: 1e-8, step: self.steps, scale: 1.0 };
        let states = take(&mut self.parameters).into_iter().zip(take(&mut self.moments)).zip(gradients);
        let parameters =
            states.map(|((value, state), gradient)| Parameter { value, gradient, state, weight_decay: 0.01 });
        for Parameter { value, state, .. } in step.apply(parameters.collect()) {
            self.parameters.push(value);
            self.moments.push(state);
        }
    }
}

/// The median in milliseconds of at least five repetitions that together take at least a second, after two
/// more.
fn median_milliseconds(mut work: Work) -> f64 {
    work();
    work();
    let mut seconds = Vec::new();
    let begun = Instant::now();
    while seconds.len() < 5 || begun.elapsed().as_secs_f64() < 1.0 {
        let begun = Instant::now();
        work();
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    1e3 * seconds[seconds.len() / 2]
}

/// How far memory rises while the operands are made and the work is done three times; not a number where the
/// system does not tell, which the comparison leaves out.
fn peak_mebibytes(workload: fn() -> Work) -> f64 {
    // Threads are there before the count begins.
    gemm()();
    let run = || {
        let mut work = workload();
        (0..3).for_each(|_| work());
    };
    let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(run).1);
    peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
}

fn peak_mebibytes_of_a_process(name: &str) -> f64 {
    let program = std::env::current_exe().expect("the system knows the program");
    let output = Command::new(program).env(MEMORY_VARIABLE, name).output().expect("it starts again");
    String::from_utf8_lossy(&output.stdout).trim().parse().expect("it prints one number")
}

fn workload(name: &str) -> fn() -> Work {
    WORKLOADS.iter().find(|(other, _)| *other == name).expect("memory is measured of a workload").1
}

fn main() {
    if let Ok(name) = std::env::var(MEMORY_VARIABLE) {
        return println!("{}", peak_mebibytes(workload(&name)));
    }
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let show = |name: &str, unit: &str, measure: &dyn Fn() -> f64| {
        if name.contains(&only) {
            println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
        }
    };
    for (name, workload) in WORKLOADS {
        show(name, "ms", &|| median_milliseconds(workload()));
    }
    for name in MEMORY {
        show(&format!("memory of {name}"), "MiB", &|| peak_mebibytes_of_a_process(name));
    }
}
