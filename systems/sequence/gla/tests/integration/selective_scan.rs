//! The selective scan against its definition in double precision.

use burn::tensor::{Device, Tensor, TensorData, Tolerance};
use kiln_core::random_stream;
use kiln_gla::selective_scan::{selective_scan, selective_scan_with_state};
use rand::RngExt;

/// The arguments of a scan in double precision; `h` is the state before the first step.
#[derive(Clone)]
struct Case {
    batch: usize,
    time: usize,
    channels: usize,
    state: usize,
    u: Vec<f64>,
    delta: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
    d: Vec<f64>,
    h: Vec<f64>,
}

impl Case {
    fn random(batch: usize, time: usize, channels: usize, state: usize) -> Self {
        let mut rng = random_stream(7, "selective-scan", (time * channels) as u64);
        let mut draw = |count: usize, low: f64, high: f64| -> Vec<f64> {
            (0..count).map(|_| f64::from(rng.random_range(low..high) as f32)).collect()
        };
        Self {
            batch,
            time,
            channels,
            state,
            u: draw(batch * time * channels, -1.0, 1.0),
            delta: draw(batch * time * channels, 0.01, 0.6),
            a: draw(channels * state, -3.0, -0.05),
            b: draw(batch * time * state, -1.0, 1.0),
            c: draw(batch * time * state, -1.0, 1.0),
            d: draw(channels, -1.0, 1.0),
            h: draw(batch * channels * state, -1.0, 1.0),
        }
    }

    /// The definition, one step after another: `y` and the last state.
    fn definition(&self) -> (Vec<f64>, Vec<f64>) {
        let mut y = Vec::new();
        let mut last = self.h.clone();
        for row in 0..self.batch {
            let h = &mut last[row * self.channels * self.state..][..self.channels * self.state];
            for t in row * self.time..(row + 1) * self.time {
                for channel in 0..self.channels {
                    let (u, delta) =
                        (self.u[t * self.channels + channel], self.delta[t * self.channels + channel]);
                    let mut read = self.d[channel] * u;
                    for n in 0..self.state {
                        let h = &mut h[channel * self.state + n];
                        let decay = (delta * self.a[channel * self.state + n]).exp();
                        *h = decay * *h + delta * u * self.b[t * self.state + n];
                        read += self.c[t * self.state + n] * *h;
                    }
                    y.push(read);
                }
            }
        }
        (y, last)
    }

    /// All arguments but `h`, as tensors.
    fn tensors(&self, device: &Device) -> Arguments {
        let &Self { batch, time, channels, state, .. } = self;
        Arguments {
            u: tensor(&self.u, [batch, time, channels], device),
            delta: tensor(&self.delta, [batch, time, channels], device),
            a: tensor(&self.a, [channels, state], device),
            b: tensor(&self.b, [batch, time, state], device),
            c: tensor(&self.c, [batch, time, state], device),
            d: tensor(&self.d, [channels], device),
        }
    }

    fn start(&self, device: &Device) -> Tensor<3> {
        tensor(&self.h, [self.batch, self.channels, self.state], device)
    }
}

#[derive(Clone)]
struct Arguments {
    u: Tensor<3>,
    delta: Tensor<3>,
    a: Tensor<2>,
    b: Tensor<3>,
    c: Tensor<3>,
    d: Tensor<1>,
}

impl Arguments {
    fn scan(self, h: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        selective_scan_with_state(self.u, self.delta, self.a, self.b, self.c, self.d, h)
    }

    /// The arguments at some of the steps.
    fn steps(&self, start: usize, length: usize) -> Self {
        let cut = |whole: &Tensor<3>| whole.clone().narrow(1, start, length);
        Self { u: cut(&self.u), delta: cut(&self.delta), b: cut(&self.b), c: cut(&self.c), ..self.clone() }
    }
}

fn tensor<const D: usize>(values: &[f64], shape: [usize; D], device: &Device) -> Tensor<D> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("scans are in f32")
}

fn assert_close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1.0, |max: f64, x| max.max(x.abs()));
    for (i, (&found, &expected)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(found) - expected).abs();
        assert!(difference <= tolerance * scale, "at {i}: {found}, should be {expected}");
    }
}

#[test]
fn the_scan_equals_its_definition_for_odd_lengths_and_widths() {
    let device = Device::flex();
    for (batch, time, channels, state) in
        [(1, 1, 1, 1), (2, 5, 3, 4), (1, 63, 33, 16), (2, 64, 32, 2), (1, 65, 31, 5), (3, 131, 70, 3)]
    {
        let case = Case::random(batch, time, channels, state);
        let (y, h) = case.tensors(&device).scan(case.start(&device));
        let (expected_y, expected_h) = case.definition();
        assert_close(&values(y), &expected_y, 1e-5);
        assert_close(&values(h), &expected_h, 1e-5);
    }
}

#[test]
fn gradients_equal_finite_differences_of_the_definition() {
    let mut case = Case::random(2, 9, 3, 2);
    case.h.fill(0.0);
    let device = Device::flex().autodiff();
    let weights: Vec<f64> = (0..case.u.len()).map(|i| ((i * 7 + 3) % 11) as f64 / 5.0 - 1.0).collect();

    let arguments = case.tensors(&device);
    let Arguments { u, delta, a, b, c, d } = arguments;
    let (u, delta, a) = (u.require_grad(), delta.require_grad(), a.require_grad());
    let (b, c, d) = (b.require_grad(), c.require_grad(), d.require_grad());
    let y = selective_scan(u.clone(), delta.clone(), a.clone(), b.clone(), c.clone(), d.clone());
    let grads = (y * tensor(&weights, [2, 9, 3], &device)).sum().backward();

    let loss =
        |case: &Case| -> f64 { case.definition().0.iter().zip(&weights).map(|(y, weight)| y * weight).sum() };
    let differences = |field: fn(&mut Case) -> &mut Vec<f64>| -> Vec<f64> {
        let step = 1e-6;
        (0..field(&mut case.clone()).len())
            .map(|i| {
                let (mut above, mut below) = (case.clone(), case.clone());
                field(&mut above)[i] += step;
                field(&mut below)[i] -= step;
                (loss(&above) - loss(&below)) / (2.0 * step)
            })
            .collect()
    };
    assert_close(&values(u.grad(&grads).unwrap()), &differences(|case| &mut case.u), 1e-5);
    assert_close(&values(delta.grad(&grads).unwrap()), &differences(|case| &mut case.delta), 1e-5);
    assert_close(&values(a.grad(&grads).unwrap()), &differences(|case| &mut case.a), 1e-5);
    assert_close(&values(b.grad(&grads).unwrap()), &differences(|case| &mut case.b), 1e-5);
    assert_close(&values(c.grad(&grads).unwrap()), &differences(|case| &mut case.c), 1e-5);
    assert_close(&values(d.grad(&grads).unwrap()), &differences(|case| &mut case.d), 1e-5);
}

#[test]
fn pieces_with_the_state_carried_give_the_whole() {
    let device = Device::flex();
    let case = Case::random(2, 150, 5, 4);
    let arguments = case.tensors(&device);
    let (whole, last) = arguments.clone().scan(case.start(&device));
    let mut h = case.start(&device);
    let mut pieces = Vec::new();
    for (start, length) in [(0, 1), (1, 70), (71, 64), (135, 15)] {
        let (y, next) = arguments.steps(start, length).scan(h);
        pieces.push(y);
        h = next;
    }
    let tolerance = Tolerance::<f32>::rel_abs(1e-5, 1e-6);
    whole.into_data().assert_approx_eq(&Tensor::cat(pieces, 1).into_data(), tolerance);
    last.into_data().assert_approx_eq(&h.into_data(), tolerance);
}

#[test]
fn a_decay_beyond_the_smallest_number_forgets_the_state_and_stays_finite() {
    let device = Device::flex().autodiff();
    let mut case = Case::random(1, 70, 2, 3);
    case.a.fill(-1e4);
    case.delta.fill(100.0);
    let arguments = case.tensors(&device);
    let delta = arguments.delta.clone().require_grad();
    let a = arguments.a.clone().require_grad();
    let arguments = Arguments { delta: delta.clone(), a: a.clone(), ..arguments };
    let (y, _) = arguments.scan(case.start(&device));
    assert_close(&values(y.clone()), &case.definition().0, 1e-5);
    let grads = y.sum().backward();
    assert!(values(delta.grad(&grads).unwrap()).iter().all(|x| x.is_finite()));
    assert!(values(a.grad(&grads).unwrap()).iter().all(|&x| x == 0.0));
}

#[test]
fn a_later_input_leaves_earlier_outputs_bit_identical() {
    let device = Device::flex();
    let mut case = Case::random(1, 80, 3, 2);
    let (before, _) = case.tensors(&device).scan(case.start(&device));
    case.u[66 * 3] += 5.0;
    let (after, _) = case.tensors(&device).scan(case.start(&device));
    let (before, after) = (values(before), values(after));
    assert_eq!(before[..66 * 3], after[..66 * 3]);
    assert_ne!(before[66 * 3], after[66 * 3]);
}
