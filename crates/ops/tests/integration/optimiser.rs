//! Fused optimiser steps equal their equations in double precision, for lengths of every kind.

use burn::tensor::{DType, Device, Tensor, TensorData};
use kiln_ops::{AdagradStep, AdamWStep, Parameter, SgdStep, gradient_norm};
use rand::RngExt;

use crate::support::{assert_close, random, rng};

const LENGTHS: [usize; 6] = [0, 1, 17, 500, 16_384, 40_001];

/// A parameter of the reference: value, gradient, state, weight decay.
#[derive(Clone)]
struct Exact<const S: usize> {
    value: f64,
    gradient: f64,
    state: [f64; S],
    weight_decay: f64,
}

fn floats(x: &Tensor<1>) -> Vec<f32> {
    x.clone().cast(DType::F32).into_data().try_to_vec().expect("the values are f32")
}

/// Makes sure that three steps of `fused` follow `exact`, element by element, for parameters of all lengths
/// at once and in the precision `dtype`.
fn follows<const S: usize>(
    dtype: DType,
    fused: impl Fn(i32, Vec<Parameter<S>>) -> Vec<Parameter<S>>,
    exact: impl Fn(i32, &mut Exact<S>),
) {
    let mut rng = rng(3);
    let mut parameters: Vec<Parameter<S>> = LENGTHS
        .iter()
        .map(|&length| Parameter {
            value: random(length, &mut rng).cast(dtype),
            gradient: random(length, &mut rng).cast(dtype),
            state: [(); S].map(|()| Tensor::zeros([length], (&Device::flex(), dtype))),
            weight_decay: if length % 2 == 0 { 0.1 } else { 0.0 },
        })
        .collect();
    let mut expected: Vec<Vec<Exact<S>>> = parameters
        .iter()
        .map(|p| {
            let values = floats(&p.value).into_iter().zip(floats(&p.gradient));
            let exact = |(value, gradient): (f32, f32)| Exact {
                value: value.into(),
                gradient: gradient.into(),
                state: [0.0; S],
                weight_decay: p.weight_decay,
            };
            values.map(exact).collect()
        })
        .collect();
    for step in 1..=3 {
        parameters = fused(step, parameters);
        expected.iter_mut().flatten().for_each(|element| exact(step, element));
        for (found, expected) in parameters.iter().zip(&expected) {
            let what = format!("{dtype:?}, step {step}, length {}", expected.len());
            let values: Vec<f32> = expected.iter().map(|x| x.value as f32).collect();
            assert_close(&what, &floats(&found.value), &values, 1e-6);
            for s in 0..S {
                let state: Vec<f32> = expected.iter().map(|x| x.state[s] as f32).collect();
                assert_close(&format!("{what}, state {s}"), &floats(&found.state[s]), &state, 1e-6);
            }
        }
    }
}

#[test]
fn adamw_follows_its_equations() {
    let step_of = |step| AdamWStep { lr: 0.01, betas: (0.9, 0.99), epsilon: 1e-8, step, scale: 0.5 };
    let exact = |step: i32, p: &mut Exact<2>| {
        let g = 0.5 * p.gradient;
        p.state = [0.9 * p.state[0] + 0.1 * g, 0.99 * p.state[1] + 0.01 * g * g];
        let first = p.state[0] / (1.0 - 0.9f64.powi(step));
        let second = p.state[1] / (1.0 - 0.99f64.powi(step));
        p.value -= 0.01 * p.weight_decay * p.value;
        p.value -= 0.01 * first / (second.sqrt() + 1e-8);
    };
    for dtype in [DType::F32, DType::F64] {
        follows(dtype, |step, parameters| step_of(step).apply(parameters), exact);
    }
}

#[test]
fn momentum_follows_its_equations() {
    for (nesterov, momentum) in [(false, 0.0), (false, 0.9), (true, 0.9)] {
        let step = SgdStep { lr: 0.1, momentum, nesterov, scale: 0.5 };
        let exact = |_: i32, p: &mut Exact<1>| {
            let g = 0.5 * p.gradient + p.weight_decay * p.value;
            p.state = [momentum * p.state[0] + g];
            p.value -= 0.1 * if nesterov { g + momentum * p.state[0] } else { p.state[0] };
        };
        for dtype in [DType::F32, DType::F64] {
            follows(dtype, |_, parameters| step.apply(parameters), exact);
        }
    }
}

#[test]
fn adagrad_follows_its_equations() {
    let step = AdagradStep { lr: 0.1, epsilon: 1e-10, scale: 0.5 };
    let exact = |_: i32, p: &mut Exact<1>| {
        let g = 0.5 * p.gradient + p.weight_decay * p.value;
        p.state = [p.state[0] + g * g];
        p.value -= 0.1 * g / (p.state[0].sqrt() + 1e-10);
    };
    for dtype in [DType::F32, DType::F64] {
        follows(dtype, |_, parameters| step.apply(parameters), exact);
    }
}

fn descend(value: Tensor<1>, gradient: Tensor<1>) -> Tensor<1> {
    let state = [value.zeros_like()];
    let parameter = Parameter { value, gradient, state, weight_decay: 0.0 };
    let step = SgdStep { lr: 1.0, momentum: 0.0, nesterov: false, scale: 1.0 };
    step.apply(vec![parameter]).remove(0).value
}

#[test]
fn values_that_others_hold_are_left_alone() {
    let device = Device::flex();
    let value = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0], &device);
    let after = descend(value.clone(), value.ones_like());
    assert_eq!(floats(&after), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(floats(&value), [1.0, 2.0, 3.0, 4.0]);
    // Parts of a larger tensor, in order and in steps.
    let part = descend(value.clone().narrow(0, 1, 2), value.clone().narrow(0, 2, 2));
    assert_eq!(floats(&part), [-1.0, -1.0]);
    let column = value.clone().reshape([2, 2]).slice([0..2, 1..2]).reshape([2]);
    assert_eq!(floats(&descend(column, Tensor::ones([2], &device))), [1.0, 3.0]);
    assert_eq!(floats(&value), [1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn nan_passes_through() {
    let value = Tensor::<1>::from_floats([1.0, 2.0], &Device::flex());
    let after = floats(&descend(value.clone(), Tensor::from_floats([f32::NAN, 1.0], &Device::flex())));
    assert!(after[0].is_nan() && after[1] == 1.0, "{after:?}");
    assert!(gradient_norm(&[value * f32::NAN]).is_nan());
}

#[test]
fn the_norm_is_that_of_all_gradients_together() {
    let mut rng = rng(5);
    let values: Vec<Vec<f32>> =
        LENGTHS.iter().map(|&n| (0..n).map(|_| rng.random_range(-3.0..3.0)).collect()).collect();
    let exact = values.iter().flatten().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    for dtype in [DType::F32, DType::F64] {
        let tensor = |values: &Vec<f32>| {
            Tensor::<1>::from_data(TensorData::new(values.clone(), [values.len()]), &Device::flex())
                .cast(dtype)
        };
        let norm = gradient_norm(&values.iter().map(tensor).collect::<Vec<_>>());
        assert!((norm - exact).abs() < 1e-9 * exact, "{dtype:?}: {norm}, should be {exact}");
    }
    assert_eq!(gradient_norm(&[]), 0.0);
}

#[test]
#[should_panic(expected = "a parameter of 2 values has a gradient of 3 and a state of [2]")]
fn lengths_that_differ_are_named() {
    let device = Device::flex();
    descend(Tensor::zeros([2], &device), Tensor::zeros([3], &device));
}
