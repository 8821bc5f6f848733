//! How long a configuration takes: by a model whose constants are measured on this machine, and by running it.

use std::time::Instant;

use kiln_core::{Error, Result};
use kiln_ops::gemm::{Mat, Out, gemm_parallel};
use kiln_ops::quantised::{Affine, Bytes, Ends, Panels, Product, Requantise};
use serde::{Deserialize, Serialize};

use crate::data::Examples;
use crate::program::Program;
use crate::quantise::batches;
use crate::search::Bits;
use crate::unit::{Ready, Work};

/// Runs before those that count.
const WARM_UP: usize = 5;

/// What this machine does: `T = Σ max(multiplications / throughput, bytes / bandwidth) + overhead` over the units.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Multiplications a second at 16, 8 and 4 bits.
    pub throughput: [f64; 3],
    /// Bytes a second from memory.
    pub bandwidth: f64,
    /// Seconds that a unit takes besides, at 16, 8 and 4 bits.
    pub overhead: [f64; 3],
    /// Threads that were used.
    pub threads: usize,
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

impl Profile {
    /// Measures this machine; takes about a second.
    pub fn measure() -> Self {
        let time = |rows: usize, inner: usize, columns: usize, bits: u8| -> f64 {
            let x: Vec<f32> = (0..rows * inner).map(|i| (i % 17) as f32 * 0.1).collect();
            if bits == 16 {
                let w: Vec<f32> = (0..inner * columns).map(|i| (i % 13) as f32 * 0.1).collect();
                let mut out = vec![0.0; rows * columns];
                return median(15, || {
                    gemm_parallel(
                        &mut out,
                        columns,
                        Out::Set,
                        Mat::new(&x, rows, inner),
                        Mat::new(&w, inner, columns),
                    );
                });
            }
            let w: Vec<i8> = (0..inner * columns).map(|i| (i % 13) as i8 - 6).collect();
            let panels = Panels::from_columns(&w, inner, columns);
            let panels = if bits == 4 { panels.with_nibbles() } else { panels };
            let affine = Affine { scale: 0.01, zero: 0, most: 255 };
            let (scales, bias) = (vec![1e-3; columns], vec![0; columns]);
            let requantise = Requantise { scales: &scales, bias: &bias, ends: Ends::OPEN };
            median(15, || {
                let bytes = Bytes::quantise(&x, inner, &affine);
                std::hint::black_box(Product::new(&bytes, &panels).floats(&requantise));
            })
        };
        let each = |of: &dyn Fn(u8) -> f64| [16, 8, 4].map(of);
        let throughput = each(&|bits| (256 * 512 * 512) as f64 / time(256, 512, 512, bits));
        let overhead = each(&|bits| time(4, 16, 16, bits));
        // A copy of 64 MiB reads and writes each byte once.
        let source = vec![1u8; 64 << 20];
        let mut target = vec![0u8; 64 << 20];
        let seconds = median(5, || target.copy_from_slice(std::hint::black_box(&source)));
        let bandwidth = 2.0 * source.len() as f64 / seconds;
        Self { throughput, bandwidth, overhead, threads: rayon::current_num_threads() }
    }

    /// Seconds for one example of a configuration.
    pub fn latency(&self, program: &Program, bits: &Bits) -> f64 {
        let unit = |(unit, &bits): (&crate::unit::Unit, &u8)| {
            let at = place(bits);
            let compute = if unit.work == Work::Table {
                0.0
            } else {
                unit.multiplications as f64 / self.throughput[at]
            };
            // Activations pass in floats on either side of a unit.
            let bytes = unit.bytes(bits) + 4 * unit.elements;
            compute.max(bytes as f64 / self.bandwidth) + self.overhead[at]
        };
        program.units.iter().zip(bits).map(unit).sum()
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
    let (_, inputs, _) = batches(examples, program.batch())
        .next()
        .ok_or_else(|| Error::usage("there are no examples to run"))?;
    let inputs = [inputs];
    timing(runs, || program.run(&inputs, ready).map(|_| ()))
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
