//! The EMA of whole sequences as a convolution on the CPU: the kernel out of powers, and the convolution by real FFTs.
//!
//! The transforms are as long as sequence and kernel together, so that nothing wraps around, rounded up to the next even
//! number without prime factors above 5. Plans are made once for every length, spectra are kept for the backward pass, and
//! skip and SiLU are part of the last pass over the output.

use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use burn_flex::FlexTensor;
use kiln_ops::flex::{floats, tensor};
use kiln_ops::vector::{exp, fma, sigmoid};
use kiln_ops::{Function, simd};
use rayon::prelude::*;
use realfft::num_complex::Complex32;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};

/// `k_l = Σ_n c_n e^(l g_n)` for l = 0 .. length, as a function of c and g `[rows, states]`; the result is `[rows, length]`.
#[derive(Debug, Clone)]
pub(crate) struct PowerKernel {
    pub length: usize,
}

/// Powers of one table; longer exponents are a product of two.
const TABLE: usize = 128;

impl PowerKernel {
    /// `e^(i g)` for the exponents of the table, `[states, TABLE]`.
    fn table(&self, g: &[f32]) -> Vec<f32> {
        let mut table = vec![0.0; g.len() * TABLE];
        simd(
            #[inline(always)]
            || {
                for (powers, &g) in table.chunks_exact_mut(TABLE).zip(g) {
                    powers.iter_mut().enumerate().for_each(|(i, power)| *power = exp(i as f32 * g));
                }
            },
        );
        table
    }
}

impl Function<2> for PowerKernel {
    type Saved = [FlexTensor; 2];

    fn forward(&self, inputs: [FlexTensor; 2]) -> (FlexTensor, [FlexTensor; 2]) {
        let [c, g] = inputs.each_ref().map(floats);
        let shape = inputs[0].layout().shape();
        let (rows, states) = (shape[0], shape[1]);
        let mut kernel = vec![0.0; rows * self.length];
        kernel.par_chunks_mut(self.length.max(1)).enumerate().for_each(|(row, kernel)| {
            let (c, g) = (&c[row * states..][..states], &g[row * states..][..states]);
            let table = self.table(g);
            for (block, kernel) in kernel.chunks_mut(TABLE).enumerate() {
                simd(
                    #[inline(always)]
                    || {
                        for ((powers, &c), &g) in table.chunks_exact(TABLE).zip(c).zip(g) {
                            let factor = c * exp((block * TABLE) as f32 * g);
                            kernel.iter_mut().zip(powers).for_each(|(k, &power)| *k = fma(factor, power, *k));
                        }
                    },
                );
            }
        });
        drop((c, g));
        (tensor(kernel, [rows, self.length]), inputs)
    }

    /// `dc_n = Σ_l dk_l e^(l g_n)`, `dg_n = c_n Σ_l l dk_l e^(l g_n)`
    fn backward(
        &self,
        inputs: [FlexTensor; 2],
        upstream: FlexTensor,
        _: [bool; 2],
    ) -> [Option<FlexTensor>; 2] {
        let [c, g] = inputs.each_ref().map(floats);
        let d_kernel = floats(&upstream);
        let shape = inputs[0].layout().shape().clone();
        let states = shape[1];
        let [mut d_c, mut d_g] = [vec![0.0; c.len()], vec![0.0; c.len()]];
        let rows = d_c.par_chunks_mut(states.max(1)).zip(d_g.par_chunks_mut(states.max(1))).enumerate();
        rows.for_each(|(row, (d_c, d_g))| {
            let (c, g) = (&c[row * states..][..states], &g[row * states..][..states]);
            let table = self.table(g);
            let d_kernel = &d_kernel[row * self.length..][..self.length];
            let mut sums = vec![[0.0f64; 2]; states];
            for (block, d_kernel) in d_kernel.chunks(TABLE).enumerate() {
                let start = (block * TABLE) as f32;
                for ((sums, powers), &g) in sums.iter_mut().zip(table.chunks_exact(TABLE)).zip(g) {
                    let [plain, weighted] = moments(d_kernel, powers);
                    let factor = f64::from(exp(start * g));
                    sums[0] += factor * f64::from(plain);
                    sums[1] += factor * (f64::from(start) * f64::from(plain) + f64::from(weighted));
                }
            }
            for (n, [plain, weighted]) in sums.into_iter().enumerate() {
                d_c[n] = plain as f32;
                d_g[n] = (f64::from(c[n]) * weighted) as f32;
            }
        });
        [d_c, d_g].map(|gradient| Some(tensor(gradient, shape.clone())))
    }
}

/// `Σ_i d_i p_i` and `Σ_i i d_i p_i`.
fn moments(d: &[f32], powers: &[f32]) -> [f32; 2] {
    const LANES: usize = 16;
    let mut sums = [[0.0f32; LANES]; 2];
    simd(
        #[inline(always)]
        || {
            for (block, (d, powers)) in d.chunks(LANES).zip(powers.chunks(LANES)).enumerate() {
                for (lane, (d, power)) in d.iter().zip(powers).enumerate() {
                    let term = d * power;
                    sums[0][lane] += term;
                    sums[1][lane] = fma((block * LANES + lane) as f32, term, sums[1][lane]);
                }
            }
        },
    );
    sums.map(|sums| sums.iter().sum())
}

/// `silu(k * x + ω ⊙ x)` as a function of x `[batch, time, channels]`, the kernel k `[channels, length]`, one of the steps
/// after (without elements where there is none), and ω `[channels]`.
#[derive(Debug, Clone)]
pub(crate) struct LongConv;

/// What the backward pass of [`LongConv`] needs.
#[derive(Clone)]
pub(crate) struct Saved {
    x: FlexTensor,
    omega: FlexTensor,
    /// `k * x + ω ⊙ x`, `[batch, time, channels]`
    sums: FlexTensor,
    /// Spectra of the channels of x, `[batch · channels]`, and of the kernels, `[channels]`.
    spectra: Arc<[Vec<Complex32>; 2]>,
    /// Steps of the kernel, and whether there is one of the steps after.
    length: usize,
    both_ways: bool,
}

impl Function<4> for LongConv {
    type Saved = Saved;

    fn forward(&self, inputs: [FlexTensor; 4]) -> (FlexTensor, Saved) {
        let (output, sums, spectra) = convolve(&inputs, true);
        let [x, kernel, after, omega] = inputs;
        let (length, both_ways) = (kernel.layout().shape()[1], after.layout().num_elements() > 0);
        (output, Saved { x, omega, sums, spectra: Arc::new(spectra), length, both_ways })
    }

    fn infer(&self, inputs: [FlexTensor; 4]) -> FlexTensor {
        convolve(&inputs, false).0
    }

    fn backward(&self, saved: Saved, upstream: FlexTensor, _: [bool; 4]) -> [Option<FlexTensor>; 4] {
        let shape = saved.x.layout().shape().clone();
        let [batch, time, channels] = [shape[0], shape[1], shape[2]];
        let (x, omega, sums) = (floats(&saved.x), floats(&saved.omega), floats(&saved.sums));
        let mut d_sums = floats(&upstream).into_owned();
        d_sums.par_chunks_mut(CHUNK).zip(sums.par_chunks(CHUNK)).for_each(|(d, u)| {
            simd(
                #[inline(always)]
                || {
                    for (d, &u) in d.iter_mut().zip(u) {
                        let gate = sigmoid(u);
                        *d *= gate * (1.0 + u * (1.0 - gate));
                    }
                },
            );
        });
        let d_omega = column_products(&d_sums, &x, channels);

        let transform = Transform::of(time, saved.length);
        let [of_x, of_kernel] = &*saved.spectra;
        let bins = transform.bins();
        let d_rows = transposed_each(&d_sums, batch, time, channels);
        // A task has a channel: the gradients of its rows, and of its kernel over the batch.
        let of_channels: Vec<(Vec<f32>, Vec<f32>)> = (0..channels)
            .into_par_iter()
            .map(|channel| {
                let mut buffers = transform.buffers();
                let kernel = &of_kernel[channel * bins..][..bins];
                let mut d_kernel = vec![Complex32::default(); bins];
                let mut d_x = Vec::with_capacity(batch * time);
                for b in 0..batch {
                    let row = b * channels + channel;
                    transform.forward(&mut buffers, |numbers| {
                        numbers[..time].copy_from_slice(&d_rows[row * time..][..time]);
                    });
                    let x = &of_x[row * bins..][..bins];
                    for ((d, sum), (x, k)) in
                        buffers.spectrum.iter_mut().zip(&mut d_kernel).zip(x.iter().zip(kernel))
                    {
                        *sum += *d * x.conj();
                        *d *= k.conj();
                    }
                    transform.inverse(&mut buffers);
                    d_x.extend_from_slice(&buffers.numbers[..time]);
                }
                buffers.spectrum.copy_from_slice(&d_kernel);
                transform.inverse(&mut buffers);
                (d_x, buffers.numbers)
            })
            .collect();

        let mut d_x = d_sums;
        for b in 0..batch {
            let columns: Vec<&[f32]> = of_channels.iter().map(|(d_x, _)| &d_x[b * time..][..time]).collect();
            let d_x = &mut d_x[b * time * channels..][..time * channels];
            from_columns(d_x, &columns, |d_x, d_rows| {
                for ((d_x, d_row), omega) in d_x.iter_mut().zip(d_rows).zip(&*omega) {
                    *d_x = fma(*omega, *d_x, *d_row);
                }
            });
        }
        let n = transform.n;
        let before = |lag: usize| lag;
        let after = |lag: usize| (n - lag) % n;
        let d_kernel = |place: &dyn Fn(usize) -> usize| {
            let lags = |(_, d): &(Vec<f32>, Vec<f32>)| {
                (0..saved.length).map(|lag| d[place(lag)]).collect::<Vec<_>>()
            };
            tensor(of_channels.iter().flat_map(lags).collect(), [channels, saved.length])
        };
        [
            Some(tensor(d_x, shape)),
            Some(d_kernel(&before)),
            saved.both_ways.then(|| d_kernel(&after)),
            Some(tensor(d_omega, [channels])),
        ]
    }
}

/// Elements of a piece of elementwise work.
const CHUNK: usize = 1 << 14;

/// The output, and for the backward pass what is under the SiLU and the spectra of rows and kernels.
fn convolve(inputs: &[FlexTensor; 4], keep: bool) -> (FlexTensor, FlexTensor, [Vec<Complex32>; 2]) {
    let [x, kernel, after, omega] = inputs.each_ref().map(floats);
    let shape = inputs[0].layout().shape().clone();
    let [batch, time, channels] = [shape[0], shape[1], shape[2]];
    let length = inputs[1].layout().shape()[1];
    let transform = Transform::of(time, length);
    let bins = transform.bins();

    let mut of_kernel = vec![Complex32::default(); channels * bins];
    of_kernel.par_chunks_mut(bins).enumerate().for_each(|(channel, spectrum)| {
        let mut buffers = transform.buffers();
        transform.forward(&mut buffers, |numbers| {
            numbers[..length].copy_from_slice(&kernel[channel * length..][..length]);
            for (lag, k) in after.iter().skip(channel * length).take(length).enumerate() {
                numbers[(transform.n - lag) % transform.n] += k;
            }
        });
        let scale = 1.0 / transform.n as f32;
        spectrum.iter_mut().zip(&buffers.spectrum).for_each(|(kept, k)| *kept = *k * scale);
    });

    let rows = transposed_each(&x, batch, time, channels);
    let mut of_x = vec![Complex32::default(); if keep { batch * channels * bins } else { 0 }];
    let mut convolved = vec![0.0; rows.len()];
    let kept: Vec<&mut [Complex32]> = match keep {
        true => of_x.chunks_mut(bins).collect(),
        false => (0..batch * channels).map(|_| Default::default()).collect(),
    };
    convolved.par_chunks_mut(time).zip(kept).enumerate().for_each(|(row, (output, kept))| {
        let mut buffers = transform.buffers();
        transform
            .forward(&mut buffers, |numbers| numbers[..time].copy_from_slice(&rows[row * time..][..time]));
        if keep {
            let scale = 1.0 / transform.n as f32;
            kept.iter_mut().zip(&buffers.spectrum).for_each(|(kept, x)| *kept = *x * scale);
        }
        let kernel = &of_kernel[row % channels * bins..][..bins];
        buffers.spectrum.iter_mut().zip(kernel).for_each(|(x, k)| *x *= k);
        transform.inverse(&mut buffers);
        output.copy_from_slice(&buffers.numbers[..time]);
    });

    let mut sums = x.into_owned();
    for b in 0..batch {
        let columns: Vec<&[f32]> = convolved[b * channels * time..][..channels * time].chunks(time).collect();
        let sums = &mut sums[b * time * channels..][..time * channels];
        from_columns(sums, &columns, |x, convolved| {
            for ((x, convolved), omega) in x.iter_mut().zip(convolved).zip(&*omega) {
                *x = fma(*omega, *x, *convolved);
            }
        });
    }
    let mut output = if keep { sums.clone() } else { std::mem::take(&mut sums) };
    output.par_chunks_mut(CHUNK).for_each(|output| {
        simd(
            #[inline(always)]
            || output.iter_mut().for_each(|u| *u *= sigmoid(*u)),
        );
    });
    let sums = if keep { tensor(sums, shape.clone()) } else { tensor(sums, [0]) };
    (tensor(output, shape), sums, [of_x, of_kernel])
}

/// Real transforms of one length.
struct Transform {
    n: usize,
    forward: Arc<dyn RealToComplex<f32>>,
    inverse: Arc<dyn ComplexToReal<f32>>,
}

/// Room for one transform.
struct Buffers {
    numbers: Vec<f32>,
    spectrum: Vec<Complex32>,
    scratch: [Vec<Complex32>; 2],
}

static PLANS: LazyLock<Mutex<RealFftPlanner<f32>>> = LazyLock::new(|| Mutex::new(RealFftPlanner::new()));

impl Transform {
    fn of(time: usize, length: usize) -> Self {
        let n = fft_length(time + length);
        let mut plans = PLANS.lock().unwrap_or_else(PoisonError::into_inner);
        Self { n, forward: plans.plan_fft_forward(n), inverse: plans.plan_fft_inverse(n) }
    }

    fn bins(&self) -> usize {
        self.n / 2 + 1
    }

    fn buffers(&self) -> Buffers {
        Buffers {
            numbers: self.forward.make_input_vec(),
            spectrum: self.forward.make_output_vec(),
            scratch: [self.forward.make_scratch_vec(), self.inverse.make_scratch_vec()],
        }
    }

    /// The spectrum of what `fill` writes into zeros.
    fn forward(&self, buffers: &mut Buffers, fill: impl FnOnce(&mut [f32])) {
        buffers.numbers.fill(0.0);
        fill(&mut buffers.numbers);
        let Buffers { numbers, spectrum, scratch } = buffers;
        self.forward
            .process_with_scratch(numbers, spectrum, &mut scratch[0])
            .expect("lengths are the plan's");
    }

    /// The numbers of a spectrum, times n.
    fn inverse(&self, buffers: &mut Buffers) {
        let Buffers { numbers, spectrum, scratch } = buffers;
        // Rounding leaves traces where the spectrum of real numbers is real.
        spectrum[0].im = 0.0;
        spectrum[self.n / 2].im = 0.0;
        self.inverse
            .process_with_scratch(spectrum, numbers, &mut scratch[1])
            .expect("lengths are the plan's");
    }
}

/// The least even number from `needed` on whose prime factors are 2, 3 and 5.
pub(crate) fn fft_length(needed: usize) -> usize {
    let smooth = |mut n: usize| {
        for factor in [2, 3, 5] {
            while n.is_multiple_of(factor) {
                n /= factor;
            }
        }
        n == 1
    };
    (needed.div_ceil(2).max(1)..).find(|&half| smooth(half)).map_or(needed, |half| 2 * half)
}

/// Rows that a task transposes.
const TILE: usize = 16;

/// `[batch, time, channels]` as `[batch, channels, time]`.
fn transposed_each(x: &[f32], batch: usize, time: usize, channels: usize) -> Vec<f32> {
    let mut rows = vec![0.0; x.len()];
    let sequences = rows.par_chunks_mut(time * channels).zip(x.par_chunks(time * channels));
    debug_assert_eq!(x.len(), batch * time * channels);
    sequences.for_each(|(rows, x)| {
        rows.par_chunks_mut(TILE * time).enumerate().for_each(|(tile, rows)| {
            let first = tile * TILE;
            // A stretch of time at once, so that the lines of every row stay in the cache.
            for start in (0..time).step_by(64) {
                let end = time.min(start + 64);
                for (c, row) in rows.chunks_exact_mut(time).enumerate() {
                    for (t, value) in (start..end).zip(&mut row[start..end]) {
                        *value = x[t * channels + first + c];
                    }
                }
            }
        });
    });
    rows
}

/// Hands `work` every row of `rows [time, channels]` beside the same row of the matrix with these columns.
fn from_columns(rows: &mut [f32], columns: &[&[f32]], work: impl Fn(&mut [f32], &[f32]) + Sync) {
    const STEPS: usize = 64;
    let channels = columns.len();
    rows.par_chunks_mut(STEPS * channels).enumerate().for_each(|(block, rows)| {
        let (start, steps) = (block * STEPS, rows.len() / channels);
        let mut turned = vec![0.0; rows.len()];
        for (c, column) in columns.iter().enumerate() {
            for (t, value) in column[start..start + steps].iter().enumerate() {
                turned[t * channels + c] = *value;
            }
        }
        for (row, turned) in rows.chunks_exact_mut(channels).zip(turned.chunks_exact(channels)) {
            work(row, turned);
        }
    });
}

/// `Σ_t a_t ⊙ b_t` over rows of `channels` elements.
fn column_products(a: &[f32], b: &[f32], channels: usize) -> Vec<f32> {
    let rows = (a.len() / channels.max(1)).div_ceil(32).max(1) * channels;
    let parts: Vec<Vec<f32>> = a
        .par_chunks(rows)
        .zip(b.par_chunks(rows))
        .map(|(a, b)| {
            let mut sum = vec![0.0; channels];
            simd(
                #[inline(always)]
                || {
                    for (a, b) in a.chunks_exact(channels).zip(b.chunks_exact(channels)) {
                        for c in 0..channels {
                            sum[c] = fma(a[c], b[c], sum[c]);
                        }
                    }
                },
            );
            sum
        })
        .collect();
    parts.into_iter().fold(vec![0.0; channels], |mut sum, part| {
        sum.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
        sum
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transforms_are_even_smooth_and_no_longer_than_needed() {
        let lengths = [1, 2, 3, 7, 11, 90, 97, 2048, 2049].map(fft_length);
        assert_eq!(lengths, [2, 2, 4, 8, 12, 90, 100, 2048, 2160]);
    }
}
