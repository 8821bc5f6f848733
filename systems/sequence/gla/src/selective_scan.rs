//! The selective state-space recurrence of Mamba (Gu & Dao, "Mamba: Linear-Time Sequence Modeling with
//! Selective State Spaces", arXiv 2312.00752, Eq. 2a–2b with the discretisation of its §3.2).
//!
//! Each channel keeps a state `h` of a few numbers, with `h_0` given:
//!
//! ```text
//! h_t = exp(Δ_t A) h_{t-1} + (Δ_t u_t) B_t
//! y_t = C_t · h_t + D u_t
//! ```
//!
//! On the CPU a kernel computes it for tiles of [`LANES`] channels side by side. It keeps the states before
//! every [`CHUNK`] steps only; the backward pass recomputes those in between. Other devices compute the same
//! from tensor operations, step by step.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, Backend, Dispatch, Flex, backend_extension};
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use kiln_ops::flex::{floats, is_cpu, tensor};
use kiln_ops::simd;
use kiln_ops::vector::{exp, fma};
use rayon::prelude::*;

/// Channels that the kernel computes side by side.
const LANES: usize = 32;
/// Steps between two states that are kept for the backward pass.
const CHUNK: usize = 64;

/// One number for every channel of a tile.
type Lane = [f32; LANES];

/// Runs the recurrence from a state of zeros.
///
/// Differentiable in every argument.
///
/// # Shapes
/// - u: `[batch, time, channels]`
/// - delta: `[batch, time, channels]`, the step sizes, positive
/// - a: `[channels, state]`, negative
/// - b, c: `[batch, time, state]`
/// - d: `[channels]`
/// - output: `[batch, time, channels]`
///
/// # Panics
/// When the shapes do not fit.
pub fn selective_scan(
    u: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    d: Tensor<1>,
) -> Tensor<3> {
    let ([batch, _, channels], [_, state]) = (u.dims(), a.dims());
    let start = Tensor::zeros([batch, channels, state], &u.device());
    selective_scan_with_state(u, delta, a, b, c, d, start).0
}

/// As [`selective_scan`], from the state `h` of shape `[batch, channels, state]`; also returns the last state.
///
/// States are constants to differentiation: no gradient flows into the first or out of the last.
pub fn selective_scan_with_state(
    u: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    d: Tensor<1>,
    h: Tensor<3>,
) -> (Tensor<3>, Tensor<3>) {
    let ([batch, time, channels], [_, state]) = (u.dims(), a.dims());
    assert_eq!(delta.dims(), [batch, time, channels], "delta must have the shape of u");
    assert_eq!(a.dims()[0], channels, "a must be [channels, state]");
    assert!(state > 0, "a channel must remember at least one number");
    assert_eq!(b.dims(), [batch, time, state], "b must be [batch, time, state]");
    assert_eq!(c.dims(), [batch, time, state], "c must be [batch, time, state]");
    assert_eq!(d.dims(), [channels], "d must be [channels]");
    assert_eq!(h.dims(), [batch, channels, state], "the state must be [batch, channels, state]");

    let h = h.detach();
    if !is_cpu(&u.device()) {
        return composed(u, delta, a, b, c, d, h);
    }
    let (y, h) = <Dispatch as SelectiveScan>::selective_scan(
        u.into_dispatch(),
        delta.into_dispatch(),
        a.into_dispatch(),
        b.into_dispatch(),
        c.into_dispatch(),
        d.into_dispatch(),
        h.into_dispatch(),
    );
    (Tensor::from_dispatch(y), Tensor::from_dispatch(h))
}

/// The recurrence as a composition of tensor operations, for devices without a kernel.
fn composed(
    u: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    d: Tensor<1>,
    mut h: Tensor<3>,
) -> (Tensor<3>, Tensor<3>) {
    let [_, time, _] = u.dims();
    let a = a.unsqueeze::<3>();
    let input = (delta.clone() * u.clone()).unsqueeze_dim::<4>(3);
    let mut reads = Vec::with_capacity(time);
    for t in 0..time {
        // `[batch, 1, channels]` → `[batch, channels, 1]`
        let step = delta.clone().narrow(1, t, 1).swap_dims(1, 2);
        let decay = (step * a.clone()).exp();
        let written = input.clone().narrow(1, t, 1).squeeze_dim::<3>(1) * b.clone().narrow(1, t, 1);
        h = decay * h + written;
        reads.push((h.clone() * c.clone().narrow(1, t, 1)).sum_dim(2).swap_dims(1, 2));
    }
    let skipped = u * d.unsqueeze::<3>();
    if reads.is_empty() {
        return (skipped, h);
    }
    (Tensor::cat(reads, 1) + skipped, h.detach())
}

/// The recurrence as an operation of a backend: `(u, Δ, A, B, C, D, h_0) → (y, h_T)`.
#[backend_extension(Flex, Autodiff)]
trait SelectiveScan: Backend {
    fn selective_scan(
        u: FloatTensor<Self>,
        delta: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        h: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>);
}

impl SelectiveScan for Flex {
    fn selective_scan(
        u: FlexTensor,
        delta: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        c: FlexTensor,
        d: FlexTensor,
        h: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        let (y, h, _) = Operands { u, delta, a, b, c, d }.view().forward(&h);
        (y, h)
    }
}

impl<C: CheckpointStrategy> SelectiveScan for Autodiff<Flex, C> {
    fn selective_scan(
        u: FloatTensor<Self>,
        delta: FloatTensor<Self>,
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        c: FloatTensor<Self>,
        d: FloatTensor<Self>,
        h: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [u.node(), delta.node(), a.node(), b.node(), c.node(), d.node()];
        let operands = Operands {
            u: u.into_primitive(),
            delta: delta.into_primitive(),
            a: a.into_primitive(),
            b: b.into_primitive(),
            c: c.into_primitive(),
            d: d.into_primitive(),
        };
        let (y, h, starts) = operands.view().forward(h.primitive());
        let y = match ScanBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(prep) => prep.finish((operands, Arc::new(starts)), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        };
        (y, FloatTensor::<Self>::new(h))
    }
}

/// The step backward through [`SelectiveScan::selective_scan`].
#[derive(Debug)]
struct ScanBackward;

impl Backward<Flex, 6> for ScanBackward {
    /// The operands, and for every tile the states before each chunk.
    type State = (Operands, Arc<Vec<Vec<Lane>>>);

    fn backward(self, ops: Ops<Self::State, 6>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (operands, starts) = ops.state;
        let dy = grads.consume::<Flex>(&ops.node);
        let results = operands.view().backward(&floats(&dy), &starts);
        for (node, grad) in ops.parents.into_iter().zip(results) {
            if let Some(node) = node {
                grads.register::<Flex>(node.id, grad);
            }
        }
    }
}

/// The differentiable operands.
#[derive(Debug, Clone)]
struct Operands {
    u: FlexTensor,
    delta: FlexTensor,
    a: FlexTensor,
    b: FlexTensor,
    c: FlexTensor,
    d: FlexTensor,
}

impl Operands {
    fn view(&self) -> Kernel<'_> {
        let (u_shape, a_shape) = (self.u.layout().shape(), self.a.layout().shape());
        Kernel {
            batch: u_shape[0],
            time: u_shape[1],
            channels: u_shape[2],
            state: a_shape[1],
            u: floats(&self.u),
            delta: floats(&self.delta),
            a: floats(&self.a),
            b: floats(&self.b),
            c: floats(&self.c),
            d: floats(&self.d),
        }
    }
}

/// The operands' elements, and the loops over them.
struct Kernel<'a> {
    batch: usize,
    time: usize,
    channels: usize,
    state: usize,
    u: Cow<'a, [f32]>,
    delta: Cow<'a, [f32]>,
    a: Cow<'a, [f32]>,
    b: Cow<'a, [f32]>,
    c: Cow<'a, [f32]>,
    d: Cow<'a, [f32]>,
}

/// Up to [`LANES`] neighbouring channels of one row of the batch.
#[derive(Clone, Copy)]
struct Tile {
    row: usize,
    first: usize,
    width: usize,
}

/// What one tile gives forward.
struct TileOutput {
    /// `y`, `[time][lane]`
    y: Vec<Lane>,
    /// `h_T`, `[state][lane]`
    last: Vec<Lane>,
    /// States before every chunk, `[chunk][state][lane]`
    starts: Vec<Lane>,
}

/// What one tile gives backward.
struct TileGradients {
    /// `[time][lane]`
    u: Vec<Lane>,
    /// `[time][lane]`
    delta: Vec<Lane>,
    /// `[state][lane]`
    a: Vec<Lane>,
    /// This tile's share, `[time][state]`
    b: Vec<f32>,
    /// This tile's share, `[time][state]`
    c: Vec<f32>,
    d: Lane,
}

impl Kernel<'_> {
    /// All tiles: those of the first row of the batch, then those of the next.
    fn tiles(&self) -> Vec<Tile> {
        let firsts = || (0..self.channels).step_by(LANES);
        let tile = |row, first| Tile { row, first, width: LANES.min(self.channels - first) };
        (0..self.batch).flat_map(|row| firsts().map(move |first| tile(row, first))).collect()
    }

    /// `y`, the last state and, for every tile, the states before each chunk.
    fn forward(&self, h: &FlexTensor) -> (FlexTensor, FlexTensor, Vec<Vec<Lane>>) {
        let (batch, time, channels, state) = (self.batch, self.time, self.channels, self.state);
        let h = floats(h);
        let tiles = self.tiles();
        let outputs: Vec<TileOutput> = tiles
            .par_iter()
            .map(|&tile| {
                let start = gather_matrix(&h[tile.row * channels * state..], state, tile);
                simd(
                    #[inline(always)]
                    || self.forward_tile(tile, start),
                )
            })
            .collect();

        let y = self.scatter_rows(&tiles, outputs.iter().map(|output| &output.y[..]));
        let mut last = vec![0.0; batch * channels * state];
        for (tile, output) in tiles.iter().zip(&outputs) {
            scatter_matrix(&output.last, &mut last[tile.row * channels * state..], *tile);
        }
        (
            tensor(y, [batch, time, channels]),
            tensor(last, [batch, channels, state]),
            outputs.into_iter().map(|output| output.starts).collect(),
        )
    }

    /// The gradients of the operands in their order.
    fn backward(&self, dy: &[f32], starts: &[Vec<Lane>]) -> [FlexTensor; 6] {
        let (batch, time, channels, state) = (self.batch, self.time, self.channels, self.state);
        let tiles = self.tiles();
        let results: Vec<TileGradients> = tiles
            .par_iter()
            .zip(starts)
            .map(|(&tile, starts)| {
                simd(
                    #[inline(always)]
                    || self.backward_tile(tile, starts, dy),
                )
            })
            .collect();

        let du = self.scatter_rows(&tiles, results.iter().map(|result| &result.u[..]));
        let ddelta = self.scatter_rows(&tiles, results.iter().map(|result| &result.delta[..]));
        let mut da = vec![0.0; channels * state];
        let mut dd = vec![0.0; channels];
        let mut db = vec![0.0; batch * time * state];
        let mut dc = vec![0.0; batch * time * state];
        for (tile, result) in tiles.iter().zip(&results) {
            scatter_matrix(&result.a, &mut da, *tile);
            add(&mut dd[tile.first..][..tile.width], &result.d);
            let row = tile.row * time * state..(tile.row + 1) * time * state;
            add(&mut db[row.clone()], &result.b);
            add(&mut dc[row], &result.c);
        }
        [
            tensor(du, [batch, time, channels]),
            tensor(ddelta, [batch, time, channels]),
            tensor(da, [channels, state]),
            tensor(db, [batch, time, state]),
            tensor(dc, [batch, time, state]),
            tensor(dd, [channels]),
        ]
    }

    #[inline(always)]
    fn forward_tile(&self, tile: Tile, mut h: Vec<Lane>) -> TileOutput {
        let a = gather_matrix(&self.a, self.state, tile);
        let d = load(&self.d[tile.first..][..tile.width]);
        let mut y = Vec::with_capacity(self.time);
        let mut starts = Vec::with_capacity(self.time.div_ceil(CHUNK) * self.state);
        let (mut u, mut delta) = (Vec::with_capacity(CHUNK), Vec::with_capacity(CHUNK));
        for first in (0..self.time).step_by(CHUNK) {
            let steps = first..self.time.min(first + CHUNK);
            starts.extend_from_slice(&h);
            self.load(&mut u, &self.u, tile, steps.clone());
            self.load(&mut delta, &self.delta, tile, steps.clone());
            for ((t, u), delta) in steps.zip(&u).zip(&delta) {
                let (b, c) = (self.over_state(&self.b, tile, t), self.over_state(&self.c, tile, t));
                let mut read = product(&d, u);
                let input = product(delta, u);
                for (((h, a), &b), &c) in h.iter_mut().zip(&a).zip(b).zip(c) {
                    for lane in 0..LANES {
                        h[lane] = fma(exp(delta[lane] * a[lane]), h[lane], input[lane] * b);
                        read[lane] = fma(c, h[lane], read[lane]);
                    }
                }
                y.push(read);
            }
        }
        TileOutput { y, last: h, starts }
    }

    #[inline(always)]
    fn backward_tile(&self, tile: Tile, starts: &[Lane], dy: &[f32]) -> TileGradients {
        let (time, state) = (self.time, self.state);
        let a = gather_matrix(&self.a, state, tile);
        let d = load(&self.d[tile.first..][..tile.width]);
        let mut grads = TileGradients {
            u: vec![[0.0; LANES]; time],
            delta: vec![[0.0; LANES]; time],
            a: vec![[0.0; LANES]; state],
            b: vec![0.0; time * state],
            c: vec![0.0; time * state],
            d: [0.0; LANES],
        };
        let [mut u, mut delta, mut dys] = [const { Vec::new() }; 3];
        // `[step + 1][state]` and `[step][state]` within a chunk.
        let mut h = vec![[0.0; LANES]; (CHUNK + 1) * state];
        let mut decay = vec![[0.0; LANES]; CHUNK * state];
        // The gradient of `h_t` as far as it comes from later steps.
        let mut dh = vec![[0.0; LANES]; state];

        for (chunk, start) in starts.chunks_exact(state).enumerate().rev() {
            let first = chunk * CHUNK;
            let steps = first..time.min(first + CHUNK);
            self.load(&mut u, &self.u, tile, steps.clone());
            self.load(&mut delta, &self.delta, tile, steps.clone());
            self.load(&mut dys, dy, tile, steps.clone());
            h[..state].copy_from_slice(start);
            for (i, (u, delta)) in u.iter().zip(&delta).enumerate() {
                let b = self.over_state(&self.b, tile, first + i);
                let input = product(delta, u);
                let (before, after) = h[i * state..(i + 2) * state].split_at_mut(state);
                let decay = &mut decay[i * state..(i + 1) * state];
                for ((((before, after), decay), a), &b) in before.iter().zip(after).zip(decay).zip(&a).zip(b)
                {
                    for lane in 0..LANES {
                        decay[lane] = exp(delta[lane] * a[lane]);
                        after[lane] = fma(decay[lane], before[lane], input[lane] * b);
                    }
                }
            }
            for t in steps.rev() {
                let i = t - first;
                let (u, delta, dy) = (u[i], delta[i], dys[i]);
                let (b, c) = (self.over_state(&self.b, tile, t), self.over_state(&self.c, tile, t));
                let (db, dc) = (&mut grads.b[t * state..][..state], &mut grads.c[t * state..][..state]);
                let input = product(&delta, &u);
                let (mut dinput, mut ddelta, mut dd) = ([0.0; LANES], [0.0; LANES], grads.d);
                for n in 0..state {
                    let (before, after) = (h[i * state + n], h[(i + 1) * state + n]);
                    let (decay, a) = (decay[i * state + n], a[n]);
                    // Copied out and back, so that the compiler sees that they do not overlap.
                    let (mut da, mut dh_n) = (grads.a[n], dh[n]);
                    let mut db_lanes = [0.0; LANES];
                    for lane in 0..LANES {
                        dh_n[lane] = fma(c[n], dy[lane], dh_n[lane]);
                        db_lanes[lane] = dh_n[lane] * input[lane];
                        dinput[lane] = fma(dh_n[lane], b[n], dinput[lane]);
                        dh_n[lane] *= decay[lane];
                        // d exp(ΔA) = exp(ΔA) d(ΔA)
                        let dexponent = dh_n[lane] * before[lane];
                        ddelta[lane] = fma(dexponent, a[lane], ddelta[lane]);
                        da[lane] = fma(dexponent, delta[lane], da[lane]);
                    }
                    (grads.a[n], dh[n]) = (da, dh_n);
                    (db[n], dc[n]) = (sum(db_lanes), sum(product(&dy, &after)));
                }
                let mut du = product(&d, &dy);
                for lane in 0..LANES {
                    du[lane] = fma(dinput[lane], delta[lane], du[lane]);
                    ddelta[lane] = fma(dinput[lane], u[lane], ddelta[lane]);
                    dd[lane] = fma(dy[lane], u[lane], dd[lane]);
                }
                (grads.u[t], grads.delta[t], grads.d) = (du, ddelta, dd);
            }
        }
        grads
    }

    /// Fills `lanes` with a tile's channels of `[batch, time, channels]` at some steps.
    ///
    /// The rows lie far apart in memory; read together, the processor waits for them together.
    #[inline(always)]
    fn load(&self, lanes: &mut Vec<Lane>, values: &[f32], tile: Tile, steps: Range<usize>) {
        lanes.clear();
        let rows = values[(tile.row * self.time + steps.start) * self.channels..].chunks_exact(self.channels);
        lanes.extend(rows.take(steps.len()).map(
            #[inline(always)]
            |row| load(&row[tile.first..][..tile.width]),
        ));
    }

    /// The row of `[batch, time, state]` at step `t`.
    #[inline(always)]
    fn over_state<'b>(&self, values: &'b [f32], tile: Tile, t: usize) -> &'b [f32] {
        &values[(tile.row * self.time + t) * self.state..][..self.state]
    }

    /// Puts the tiles' `[time][lane]` together as `[batch, time, channels]`.
    fn scatter_rows<'b>(&self, tiles: &[Tile], parts: impl Iterator<Item = &'b [Lane]>) -> Vec<f32> {
        let mut whole = vec![0.0; self.batch * self.time * self.channels];
        if whole.is_empty() {
            return whole;
        }
        let parts: Vec<(&Tile, &[Lane])> = tiles.iter().zip(parts).collect();
        let tiles_a_row = self.channels.div_ceil(LANES);
        whole.par_chunks_mut(self.channels).enumerate().for_each(|(at, out)| {
            let (row, t) = (at / self.time, at % self.time);
            for (tile, part) in &parts[row * tiles_a_row..(row + 1) * tiles_a_row] {
                out[tile.first..][..tile.width].copy_from_slice(&part[t][..tile.width]);
            }
        });
        whole
    }
}

/// The lanes of a tile, those beyond its width 0; a channel of zeros stays at 0 and adds nothing.
#[inline(always)]
fn load(values: &[f32]) -> Lane {
    values.try_into().unwrap_or_else(|_| {
        let mut padded = [0.0; LANES];
        padded[..values.len()].copy_from_slice(values);
        padded
    })
}

/// A tile of `[channels, state]` as `[state][lane]`.
#[inline(always)]
fn gather_matrix(matrix: &[f32], state: usize, tile: Tile) -> Vec<Lane> {
    let mut lanes = vec![[0.0; LANES]; state];
    for lane in 0..tile.width {
        for (n, &value) in matrix[(tile.first + lane) * state..][..state].iter().enumerate() {
            lanes[n][lane] = value;
        }
    }
    lanes
}

/// Adds `[state][lane]` to a tile of `[channels, state]`.
fn scatter_matrix(lanes: &[Lane], matrix: &mut [f32], tile: Tile) {
    let state = lanes.len();
    for lane in 0..tile.width {
        for (n, value) in matrix[(tile.first + lane) * state..][..state].iter_mut().enumerate() {
            *value += lanes[n][lane];
        }
    }
}

fn add(to: &mut [f32], values: &[f32]) {
    to.iter_mut().zip(values).for_each(|(to, value)| *to += value);
}

#[inline(always)]
fn product(a: &Lane, b: &Lane) -> Lane {
    std::array::from_fn(|lane| a[lane] * b[lane])
}

/// The sum over the lanes, by halves so that it is vector additions but for the last few.
#[inline(always)]
fn sum(mut lanes: Lane) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, TensorData, Tolerance};
    use kiln_core::random_stream;
    use rand::RngExt;

    #[test]
    fn the_kernel_equals_the_composition_of_tensor_operations_in_values_and_gradients() {
        let device = Device::flex().autodiff();
        // Two chunks and two tiles, the last of each not full.
        let [batch, time, channels, state] = [2, CHUNK + 7, LANES + 5, 3];
        let mut rng = random_stream(7, "selective-scan", 0);
        let mut draw = |shape: &[usize], low: f32, high: f32| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.random_range(low..high)).collect();
            TensorData::new(values, shape)
        };
        let mut draw3 =
            |shape: [usize; 3], low, high| Tensor::<3>::from_data(draw(&shape, low, high), &device);
        let u = draw3([batch, time, channels], -1.0, 1.0).require_grad();
        let delta = draw3([batch, time, channels], 0.01, 0.5).require_grad();
        let b = draw3([batch, time, state], -1.0, 1.0).require_grad();
        let c = draw3([batch, time, state], -1.0, 1.0).require_grad();
        let h = draw3([batch, channels, state], -1.0, 1.0);
        let weight = draw3([batch, time, channels], -1.0, 1.0);
        let a = Tensor::<2>::from_data(draw(&[channels, state], -3.0, -0.1), &device).require_grad();
        let d = Tensor::<1>::from_data(draw(&[channels], -1.0, 1.0), &device).require_grad();

        type Scan = fn(
            Tensor<3>,
            Tensor<3>,
            Tensor<2>,
            Tensor<3>,
            Tensor<3>,
            Tensor<1>,
            Tensor<3>,
        ) -> (Tensor<3>, Tensor<3>);
        let run = |scan: Scan| {
            let (y, last) =
                scan(u.clone(), delta.clone(), a.clone(), b.clone(), c.clone(), d.clone(), h.clone());
            let grads = (y.clone() * weight.clone()).sum().backward();
            let three = [&u, &delta, &b, &c].map(|tensor| tensor.grad(&grads).unwrap().into_data());
            let others = [a.grad(&grads).unwrap().into_data(), d.grad(&grads).unwrap().into_data()];
            [y.into_data(), last.into_data()].into_iter().chain(three).chain(others)
        };
        for (kernel, composition) in run(selective_scan_with_state).zip(run(composed)) {
            kernel.assert_approx_eq::<f32>(&composition, Tolerance::rel_abs(1e-4, 1e-4));
        }
    }
}
