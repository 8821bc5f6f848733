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
use burn::tensor::ops::ConvOptions;
use burn::tensor::{Device, Distribution, Int, Tensor};
use burn_flex::FlexTensor;
use kiln_core::MemoryGauge;
use kiln_ops::quantised::{Affine, Bytes, Ends, Panels, Product, Requantise};
use kiln_ops::{
    Activation, AdamWStep, AttentionOptions, CrossEntropyOptions, Function, Parameter, Pooling, SgdStep,
    TensorAllocator, activate, apply, attention, conv1d, cross_entropy, embedding_bag, flex,
    keep_freed_memory, layer_norm, rfft, rms_norm, softmax,
};
use networks::{BertLayer, Cnn, Mlp, ParameterMut, ResNet18, Trainer, TransformerBlock};

mod networks;

#[global_allocator]
static ALLOCATOR: TensorAllocator = TensorAllocator;

/// Set for a process whose memory is measured: the name of its workload.
const MEMORY_VARIABLE: &str = "KILN_BENCH_MEMORY";

/// Work that is ready to be repeated.
type Work = Box<dyn FnMut()>;

/// A workload by name: the function prepares its operands.
type Workload = (&'static str, fn() -> Work);

const WORKLOADS: &[Workload] = &[
    ("gemm 1024", gemm),
    ("gemm 512", || products([512, 512, 512], false)),
    ("gemm 128x768x3072", || products([128, 768, 3072], false)),
    ("gemm 512 of bytes", || products([512, 512, 512], true)),
    ("gemm 128x768x3072 of bytes", || products([128, 768, 3072], true)),
    ("gelu 4096x1024 fwd", || infer(|x| activate(x, Activation::Gelu))),
    ("gelu 4096x1024 fwd+bwd", || train(|x| activate(x, Activation::Gelu))),
    ("layer norm 4096x1024 fwd+bwd", layer_norms),
    ("rms norm 4096x1024 fwd+bwd", rms_norms),
    ("softmax 4096x1024 fwd", || infer(|x| softmax(x, 1))),
    ("softmax 4096x1024 fwd+bwd", || train(|x| softmax(x, 1))),
    ("cross entropy 512x32000 fwd+bwd", cross_entropies),
    ("attention causal 2x8x2048x64 fwd", || attend(false)),
    ("attention causal 2x8x2048x64 fwd+bwd", || attend(true)),
    ("causal conv1d 4x256x8192 fwd+bwd", conv),
    ("embedding bag 1Mx64 fwd", || bags(false)),
    ("embedding bag 1Mx64 fwd+bwd", || bags(true)),
    ("real fft 256x65536 fwd+bwd", real_fft),
    ("adamw step 50M", adamw),
    ("tiny mlp train", mlp_training),
    ("cnn train", cnn_training),
    ("transformer block train", block_training),
    ("resnet18 inference", resnet_inference),
    ("resnet18 train", resnet_training),
    ("bert layer inference", bert_inference),
    ("bert layer train", bert_training),
];

/// Of these the memory is measured as well.
const MEMORY: &[&str] = &[
    "attention causal 2x8x2048x64 fwd+bwd",
    "cross entropy 512x32000 fwd+bwd",
    "causal conv1d 4x256x8192 fwd+bwd",
    "real fft 256x65536 fwd+bwd",
    "adamw step 50M",
    "transformer block train",
    "resnet18 train",
    "bert layer train",
];

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

/// `[rows, inner] x [inner, columns]`; of bytes, the rows are quantised and the result is floats, as in a linear layer.
fn products([rows, inner, columns]: [usize; 3], of_bytes: bool) -> Work {
    let (a, b) = (normal([rows, inner]), normal([inner, columns]));
    if !of_bytes {
        return Box::new(move || {
            black_box(kiln_ops::matmul(a.clone(), b.clone()));
        });
    }
    let floats = |x: Tensor<2>| x.into_data().iter::<f32>().collect::<Vec<f32>>();
    let weights: Vec<i8> = floats(b).iter().map(|w| (w * 30.0) as i8).collect();
    let panels = Panels::from_columns(&weights, inner, columns);
    let (a, affine) = (floats(a), Affine { scale: 0.03, zero: 128, most: 255 });
    let (scales, bias) = (vec![1e-3; columns], vec![0; columns]);
    Box::new(move || {
        let bytes = Bytes::quantise(&a, inner, &affine);
        let requantise = Requantise { scales: &scales, bias: &bias, ends: Ends::OPEN };
        black_box(Product::new(&bytes, &panels).floats(&requantise));
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

/// The mean loss of random targets.
fn classify(logits: Tensor<2>, targets: &Tensor<1, Int>) -> Tensor<1> {
    cross_entropy(logits, targets.clone(), &CrossEntropyOptions::default()).mean()
}

/// Random numbers below `end`.
fn ids(length: usize, end: usize) -> Tensor<1, Int> {
    Tensor::random([length], Distribution::Uniform(0.0, end as f64), &Device::flex())
}

fn cross_entropies() -> Work {
    let (logits, targets) = (leaf([512, 32_000]), ids(512, 32_000));
    pull_back(move || classify(logits.clone(), &targets))
}

fn attend(backward: bool) -> Work {
    let options = || AttentionOptions { causal: true, ..AttentionOptions::default() };
    let shape = [2, 8, 2048, 64];
    if backward {
        let [q, k, v] = [(); 3].map(|()| leaf(shape));
        return pull_back(move || attention(q.clone(), k.clone(), v.clone(), options()));
    }
    let [q, k, v] = [(); 3].map(|()| normal(shape));
    Box::new(move || {
        black_box(attention(q.clone(), k.clone(), v.clone(), options()));
    })
}

fn conv() -> Work {
    let (x, weight, bias) = (leaf([4, 256, 8192]), leaf([256, 256, 3]), leaf([256]));
    pull_back(move || {
        let options = ConvOptions::new_with_padding([1], [(8, 0)], [4], 1);
        conv1d(x.clone(), weight.clone(), Some(bias.clone()), options)
    })
}

/// Sums of 32 rows for each of 4096 bags; the gradient of the table is dense.
fn bags(backward: bool) -> Work {
    let ids = ids(4096 * 32, 1_000_000);
    let offsets = Tensor::arange(0..4096, &Device::flex()) * 32;
    let bag = move |table| embedding_bag(table, ids.clone(), offsets.clone(), Pooling::Sum);
    if backward {
        let table = leaf([1_000_000, 64]);
        return pull_back(move || bag(table.clone()));
    }
    let table = normal([1_000_000, 64]);
    Box::new(move || {
        black_box(bag(table.clone()));
    })
}

fn real_fft() -> Work {
    let x = leaf([256, 65_536]);
    let of_part = Upstream::of(&normal([256, 32_769]));
    Box::new(move || {
        let (re, im) = rfft(x.clone(), 1);
        black_box((of_part.attach(re) + of_part.attach(im)).backward());
    })
}

/// 50 million parameters in 150 tensors.
fn adamw() -> Work {
    let mut steps = 0;
    let mut parameters: Vec<Parameter<2>> = (0..150)
        .map(|_| {
            let [value, gradient, first, second] = [(); 4].map(|()| normal([577 * 578]));
            let state = [first * 0.0, second * 0.0];
            Parameter { value, gradient, state, weight_decay: 0.01 }
        })
        .collect();
    Box::new(move || {
        steps += 1;
        parameters = adamw_rule(steps, take(&mut parameters));
    })
}

fn adamw_rule(step: i32, parameters: Vec<Parameter<2>>) -> Vec<Parameter<2>> {
    AdamWStep { lr: 1e-4, betas: (0.9, 0.999), epsilon: 1e-8, step, scale: 1.0 }.apply(parameters)
}

fn momentum_rule(_: i32, parameters: Vec<Parameter<1>>) -> Vec<Parameter<1>> {
    SgdStep { lr: 1e-3, momentum: 0.9, nesterov: false, scale: 1.0 }.apply(parameters)
}

/// Forward, backward and one step of an optimiser.
fn training_step<N: 'static, const S: usize>(
    mut network: N,
    rule: fn(i32, Vec<Parameter<S>>) -> Vec<Parameter<S>>,
    parameters: fn(&mut N) -> Vec<ParameterMut<'_>>,
    loss: impl Fn(&N) -> Tensor<1> + 'static,
) -> Work {
    let mut trainer = Trainer::new(rule);
    Box::new(move || {
        let mut gradients = loss(&network).backward();
        trainer.step(parameters(&mut network), &mut gradients);
    })
}

/// A tensor on the autodiff device that wants no gradient.
fn input<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::from_inner(normal(shape))
}

fn mlp_training() -> Work {
    let (x, targets) = (input([32, 16]), ids(32, 4));
    let loss = move |mlp: &Mlp| classify(mlp.forward(x.clone()), &targets);
    training_step(Mlp::new(), adamw_rule, Mlp::parameters, loss)
}

fn cnn_training() -> Work {
    let (x, targets) = (input([16, 3, 32, 32]), ids(16, 10));
    let loss = move |cnn: &Cnn| classify(cnn.forward(x.clone()), &targets);
    training_step(Cnn::new(), momentum_rule, Cnn::parameters, loss)
}

fn block_training() -> Work {
    let x = input([8, 128, 256]);
    let upstream = Upstream::of(&x);
    let loss = move |block: &TransformerBlock| upstream.attach(block.forward(x.clone()));
    training_step(TransformerBlock::new(), adamw_rule, TransformerBlock::parameters, loss)
}

fn resnet_inference() -> Work {
    let (network, x) = (ResNet18::new(&Device::flex()), normal([8, 3, 64, 64]));
    Box::new(move || {
        black_box(network.forward(x.clone(), false));
    })
}

fn resnet_training() -> Work {
    let (x, targets) = (input([8, 3, 64, 64]), ids(8, 1000));
    let loss = move |network: &ResNet18| classify(network.forward(x.clone(), true), &targets);
    training_step(ResNet18::new(&Device::flex().autodiff()), momentum_rule, ResNet18::parameters, loss)
}

fn bert_inference() -> Work {
    let (layer, x) = (BertLayer::new(&Device::flex()), normal([8, 128, 768]));
    Box::new(move || {
        black_box(layer.forward(x.clone()));
    })
}

fn bert_training() -> Work {
    let x = input([8, 128, 768]);
    let upstream = Upstream::of(&x);
    let loss = move |layer: &BertLayer| upstream.attach(layer.forward(x.clone()));
    training_step(BertLayer::new(&Device::flex().autodiff()), adamw_rule, BertLayer::parameters, loss)
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
    keep_freed_memory(); // as the kiln binary does
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
