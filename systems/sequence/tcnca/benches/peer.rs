//! The figures that `peer.py` measures in PyTorch, measured here; `cargo xtask bench tcnca` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several
//! repetitions after a warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};
use kiln_core::{MemoryGauge, random_stream};
use kiln_nn::{AdamW, LanguageModel, initialise, next_token_loss};
use kiln_ops::{DilatedConvOptions, dilated_conv};
use kiln_tcnca::model::Mixers;
use kiln_tcnca::*;
use rand::RngExt;

/// Channels of the mixers.
const CHANNELS: usize = 64;
const LENGTHS: [usize; 4] = [4096, 16_384, 65_536, 131_072];

fn median_milliseconds(repetitions: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..repetitions)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    1e3 * seconds[repetitions / 2]
}

fn drawn<M: Module>(init: impl FnOnce(&Device) -> M) -> M {
    initialise(&Device::flex(), &mut random_stream(0, "bench", 0), init)
}

fn input(length: usize) -> Tensor<3> {
    Tensor::random([1, length, CHANNELS], Distribution::Normal(0.0, 1.0), &Device::flex())
}

/// Forward, or forward and backward through input and parameters.
fn mixer<M: Module>(mixer: M, length: usize, both: bool, apply: impl Fn(&M, Tensor<3>) -> Tensor<3>) -> f64 {
    let x = input(length);
    let repetitions = ((1 << 18) / length).clamp(3, 15);
    if !both {
        return median_milliseconds(repetitions, || drop(black_box(apply(&mixer, x.clone()))));
    }
    let mixer = mixer.train();
    let upstream = Tensor::from_inner(input(length));
    let x = Tensor::from_inner(x).require_grad();
    median_milliseconds(repetitions, || {
        black_box((apply(&mixer, x.clone()) * upstream.clone()).sum().backward());
    })
}

/// The dilated convolution by itself.
#[derive(Module, Debug)]
struct Conv {
    weight: burn::module::Param<Tensor<2>>,
    bias: burn::module::Param<Tensor<1>>,
}

impl Conv {
    fn new() -> Self {
        let normal = burn::nn::Initializer::Normal { mean: 0.0, std: 0.2 };
        drawn(|device| Self {
            weight: normal.init([CHANNELS, 17], device),
            bias: normal.init([CHANNELS], device),
        })
    }

    fn forward(&self, x: Tensor<3>, dilation: usize) -> Tensor<3> {
        dilated_conv(x, self.weight.val(), Some(self.bias.val()), DilatedConvOptions::causal(17, dilation))
    }
}

fn conv(length: usize, dilation: usize, both: bool) -> f64 {
    mixer(Conv::new(), length, both, |conv, x| conv.forward(x, dilation))
}

fn tcn(length: usize, both: bool) -> f64 {
    mixer(drawn(|device| TcnConfig::new(CHANNELS).init(device)), length, both, |tcn, x| tcn.forward(x, None))
}

fn ema(length: usize, both: bool) -> f64 {
    let ema = drawn(|device| MultiHeadEmaConfig::new(CHANNELS).init(device));
    mixer(ema, length, both, |ema, x| ema.forward(x, None))
}

/// Bytes a second of training steps of the default network at width 128.
fn training(mixer: MixerKind) -> f64 {
    const BATCH: usize = 8;
    const LENGTH: usize = 1024;
    let network = TcncaConfig { mixer: Mixers::all(mixer), ..TcncaConfig::new(128, 4) };
    let mut model = Some(drawn(|device| TcncaLmConfig { network, vocab: 256 }.init(device)).train());
    let mut optimiser = AdamW::new(0.1, 0.25);
    let mut rng = random_stream(0, "ids", 0);
    let mut ids = || {
        let ids: Vec<i64> = (0..BATCH * LENGTH).map(|_| rng.random_range(0..256)).collect();
        Tensor::<2, Int>::from_data(TensorData::new(ids, [BATCH, LENGTH]), &Device::flex())
    };
    let milliseconds = median_milliseconds(3, || {
        let before = model.take().expect("put back below");
        let gradients = next_token_loss(before.forward(ids()), ids()).backward();
        model = Some(optimiser.step(before, gradients, 1e-3).0);
    });
    (BATCH * LENGTH) as f64 / (1e-3 * milliseconds)
}

/// Memory above the input of the mixer, forward and backward; not a number where the system does not tell.
fn peak_mib(length: usize) -> f64 {
    let tcn = drawn(|device| TcnConfig::new(CHANNELS).init(device)).train();
    let x = Tensor::from_inner(input(length)).require_grad();
    let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(|| tcn.forward(x, None).sum().backward()).1);
    peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let show = |name: String, unit: &str, measure: &dyn Fn() -> f64| {
        if name.contains(&only) {
            println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
        }
    };
    show("memory of tcn fwd+bwd L=65536".into(), "MiB", &|| peak_mib(65_536));
    for (both, what) in [(false, "fwd"), (true, "fwd+bwd")] {
        for dilation in [1, 16] {
            let name = format!("dilated conv {what} L=65536 dilation={dilation}");
            show(name, "ms", &|| conv(65_536, dilation, both));
        }
        for length in LENGTHS {
            show(format!("tcn {what} L={length}"), "ms", &|| tcn(length, both));
            show(format!("ema {what} L={length}"), "ms", &|| ema(length, both));
        }
    }
    show("training tcnca D=128 L=1024".into(), "tokens/s", &|| training(MixerKind::Tcn));
    show("training mega D=128 L=1024".into(), "tokens/s", &|| training(MixerKind::Ema));
}
