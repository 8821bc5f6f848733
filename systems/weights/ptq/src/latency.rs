//! How long a configuration takes: by a model whose constants are measured on this machine, and by running it.

use std::sync::Arc;
use std::time::Instant;

use burn::backend::ir::TensorId;
use kiln_compiler::{Executor, Graph};
use kiln_core::{Error, Result};
use kiln_ops::flex;
use kiln_ops::quantised::Ends;
use serde::{Deserialize, Serialize};

use crate::data::Examples;
use crate::program::Program;
use crate::quantise::batches;
use crate::quantiser::{Asymmetric, Calibrator, Symmetric};
use crate::ready::Ready;
use crate::unit::{Numbers, Pair, Scales, Unit, Weights, Window, Work};

/// Runs before those that count.
const WARM_UP: usize = 5;

/// What this machine does: `T = Σ max(multiplications / throughput, bytes / bandwidth) + overhead` over the units.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Of convolutions.
    pub conv: Rates,
    /// Of convolutions by channel.
    pub by_channel: Rates,
    /// Of linear layers.
    pub linear: Rates,
    /// Of products of two activations.
    pub product: Rates,
    /// Bytes a second from memory.
    pub bandwidth: f64,
    /// Threads that were used.
    pub threads: usize,
}

/// What one kind of unit does, at 16, 8 and 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rates {
    /// Multiplications a second.
    pub throughput: [f64; 3],
    /// Seconds besides.
    pub overhead: [f64; 3],
}

/// Which entry of a profile belongs to so many bits.
fn place(bits: u8) -> usize {
    match bits {
        16 => 0,
        8 => 1,
        _ => 2,
    }
}

/// The median time of a few repetitions, in seconds.
fn median(repetitions: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..repetitions)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// A unit that is measured, and the extents of its operands.
struct Probe {
    unit: Unit,
    x: Vec<usize>,
    second: Option<Vec<usize>>,
}

impl Probe {
    fn new(work: Work, shape: [usize; 4], x: Vec<usize>, multiplications: usize) -> Self {
        let shape: Vec<usize> = shape.into_iter().filter(|&extent| extent > 0).collect();
        let count: usize = if work == Work::Product { 0 } else { shape.iter().product() };
        let second = (work == Work::Product).then(|| shape.clone());
        let unit = Unit {
            name: String::new(),
            work,
            input: TensorId::new(0),
            second: second.as_ref().map(|_| TensorId::new(1)),
            output: TensorId::new(2),
            bias: vec![0.0; if count == 0 { 0 } else { shape[0] }],
            weight: (0..count).map(|i| (i % 13) as f32 * 0.1 - 0.6).collect(),
            shape,
            ends: Ends::OPEN,
            tops: Vec::new(),
            multiplications,
            elements: 0,
        };
        Self { unit, x, second }
    }

    fn conv(channels: usize, groups: usize, kernel: usize, side: usize) -> Self {
        let window = Window {
            kernel: [kernel; 2],
            stride: [1; 2],
            padding: [kernel / 2; 2],
            dilation: [1; 2],
            groups,
            image: [side; 2],
        };
        let shape = [channels, channels / groups, kernel, kernel];
        let multiplications = side * side * shape.iter().product::<usize>();
        Self::new(Work::Conv(window), shape, vec![1, channels, side, side], multiplications)
    }

    fn linear(rows: usize, width: usize) -> Self {
        Self::new(Work::Linear, [width, width, 0, 0], vec![1, rows, width], rows * width * width)
    }

    fn product(rows: usize, width: usize) -> Self {
        Self::new(Work::Product, [width, width, 0, 0], vec![rows, width], rows * width * width)
    }

    /// Seconds at so many bits.
    fn seconds(&self, bits: u8) -> f64 {
        let tensor = |shape: &[usize]| {
            let count = shape.iter().product();
            flex::tensor((0..count).map(|i| (i % 17) as f32 * 0.1).collect(), shape.to_vec())
        };
        let (x, second) = (tensor(&self.x), self.second.as_deref().map(tensor));
        let ready = match bits {
            16 => Ready::float(&self.unit),
            bits => {
                let weights = || Arc::new(Weights::of(&self.unit, bits, Calibrator::Minmax, Scales::Row));
                let numbers = Numbers {
                    weights: (!self.unit.weight.is_empty()).then(weights),
                    input: Some(Asymmetric::of_range(0.0, 1.6, bits.into())),
                    second: self.second.as_ref().map(|_| Symmetric::of_range(1.6, bits.into())),
                    shift: Vec::new(),
                };
                Ready::whole(&self.unit, &numbers)
            }
        };
        median(15, || {
            std::hint::black_box(ready.compute(&self.unit, x.clone(), second.clone()));
        })
    }
}

impl Rates {
    /// From a small unit and a large one of the same kind.
    fn measure(small: &Probe, large: &Probe) -> Self {
        let overhead = [16, 8, 4].map(|bits| small.seconds(bits));
        let more = (large.unit.multiplications - small.unit.multiplications) as f64;
        let mut at = overhead.iter();
        let throughput = [16, 8, 4].map(|bits| {
            let overhead = at.next().copied().unwrap_or(0.0);
            more / (large.seconds(bits) - overhead).max(1e-9)
        });
        Self { throughput, overhead }
    }
}

impl Profile {
    /// Measures this machine with units as networks have them; takes less than a second.
    pub fn measure() -> Self {
        // A copy of 64 MiB reads and writes each byte once.
        let source = vec![1u8; 64 << 20];
        let mut target = vec![0u8; 64 << 20];
        let seconds = median(5, || target.copy_from_slice(std::hint::black_box(&source)));
        Self {
            conv: Rates::measure(&Probe::conv(4, 1, 1, 4), &Probe::conv(64, 1, 3, 28)),
            by_channel: Rates::measure(&Probe::conv(4, 4, 3, 4), &Probe::conv(128, 128, 3, 28)),
            linear: Rates::measure(&Probe::linear(1, 16), &Probe::linear(64, 384)),
            product: Rates::measure(&Probe::product(4, 8), &Probe::product(64, 64)),
            bandwidth: 2.0 * source.len() as f64 / seconds,
            threads: rayon::current_num_threads(),
        }
    }

    /// Seconds that a unit takes for one example. It computes with the more bits of weights and input.
    pub fn unit(&self, unit: &Unit, pair: Pair) -> f64 {
        let rates = match unit.work {
            Work::Conv(window) if window.groups == unit.shape[0] && window.groups > 1 => &self.by_channel,
            Work::Conv(_) => &self.conv,
            Work::Product => &self.product,
            Work::Linear => &self.linear,
            Work::Table => return (unit.elements * 4) as f64 / self.bandwidth,
        };
        let at = place(pair.wider());
        let compute = unit.multiplications as f64 / rates.throughput[at];
        // Activations pass in floats on either side of a unit.
        let bytes = unit.bytes(pair.weight) + 4 * unit.elements;
        compute.max(bytes as f64 / self.bandwidth) + rates.overhead[at]
    }
}

/// Times of whole runs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Timing {
    /// Seconds, the middle of all runs.
    pub median: f64,
    /// Seconds that nine of ten runs do not exceed.
    pub p90: f64,
}

/// Runs a program `runs` times after a warm-up, on the first examples.
///
/// # Errors
/// When the examples do not fit.
pub fn measure(program: &Program, ready: &[Ready], examples: &Examples, runs: usize) -> Result<Timing> {
    let (inputs, _) = batches(examples, program.batch())
        .next()
        .ok_or_else(|| Error::usage("there are no examples to run"))?;
    let inputs = [inputs];
    timing(runs, || program.run(&inputs, ready).map(|_| ()))
}

/// Seconds of a network in floats, compiled: what a user would run otherwise.
///
/// # Errors
/// When the graph does not compile or run.
pub fn compiled_seconds(graph: &Graph, examples: &Examples, runs: usize) -> Result<f64> {
    let mut executor = Executor::new(graph.clone())?;
    let inputs = [examples.batch(&[0])];
    Ok(timing(runs, || executor.run(&inputs).map(|_| ()))?.median)
}

/// Times of work that can fail.
///
/// # Errors
/// When it does.
pub fn timing(runs: usize, mut work: impl FnMut() -> Result<()>) -> Result<Timing> {
    for _ in 0..WARM_UP {
        work()?;
    }
    let mut seconds = Vec::with_capacity(runs);
    for _ in 0..runs.max(1) {
        let begun = Instant::now();
        work()?;
        seconds.push(begun.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    Ok(Timing { median: seconds[seconds.len() / 2], p90: seconds[seconds.len() * 9 / 10] })
}
