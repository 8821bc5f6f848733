//! Every operation gives the same on every instruction set and every number of threads.
//!
//! The test starts itself again with other settings of [`LEVEL_VARIABLE`] and of rayon's threads, as a child
//! that prints what each operation gives, and compares: bit for bit where the settings are the same, within
//! rounding where they differ.

#[allow(dead_code, reason = "a part of it is enough here")]
mod support;

use std::collections::BTreeMap;
use std::process::Command;

use burn::tensor::ops::{AvgPoolOptions, ConvOptions, ConvTransposeOptions, MaxPoolOptions};
use burn::tensor::{Device, Int, Tensor};
use kiln_ops::*;
use support::{assert_close, evaluate, random, rng};

/// Set in a child.
const CHILD_VARIABLE: &str = "KILN_TEST_CHILD";

/// An operation by name: the lengths of its flat inputs, and the operation, which shapes them itself.
type Operation = (&'static str, &'static [usize], fn(&[Tensor<1>]) -> Tensor<1>);

const OPERATIONS: &[Operation] = &[
    ("activate gelu", &[70_001], |x| activate(x[0].clone(), Activation::Gelu)),
    ("activate silu", &[70_001], |x| activate(x[0].clone(), Activation::Silu)),
    ("activate tanh", &[70_001], |x| activate(x[0].clone(), Activation::Tanh)),
    ("activate log-sigmoid", &[70_001], |x| activate(x[0].clone(), Activation::LogSigmoid)),
    ("gated", &[40_007, 40_007], |x| gated(x[0].clone(), x[1].clone(), Activation::Silu)),
    ("linear", &[301 * 67, 67 * 129, 129], |x| {
        flat(linear(to(x, 0, [301, 67]), to(x, 1, [67, 129]), Some(x[2].clone()), Activation::Gelu))
    }),
    ("matmul", &[3 * 65 * 70, 3 * 70 * 33], |x| flat(matmul(to(x, 0, [3, 65, 70]), to(x, 1, [3, 70, 33])))),
    ("layer norm", &[130 * 97, 97, 97], |x| {
        flat(layer_norm(to(x, 0, [130, 97]), x[1].clone(), Some(x[2].clone()), 1e-5))
    }),
    ("rms norm", &[130 * 97, 97], |x| flat(rms_norm(to(x, 0, [130, 97]), x[1].clone(), 1e-5))),
    ("batch norm", &[9 * 7 * 150, 7, 7], |x| {
        flat(batch_norm_train(to(x, 0, [9, 7, 150]), x[1].clone(), x[2].clone(), 1e-5).output)
    }),
    ("softmax", &[150 * 203], |x| flat(softmax(to::<2>(x, 0, [150, 203]), 1))),
    ("log-softmax", &[150 * 203], |x| flat(log_softmax(to::<2>(x, 0, [150, 203]), 1))),
    ("cross-entropy", &[150 * 203], |x| {
        cross_entropy(to(x, 0, [150, 203]), ids(150, 203), &CrossEntropyOptions::default())
    }),
    ("attention", &[6 * 90 * 24, 6 * 90 * 24, 6 * 90 * 24], |x| {
        let [q, k, v] = [0, 1, 2].map(|i| to(x, i, [2, 3, 90, 24]));
        flat(attention(q, k, v, AttentionOptions { causal: true, ..AttentionOptions::default() }))
    }),
    ("dilated convolution", &[2 * 700 * 37, 37 * 7, 37], |x| {
        let options = DilatedConvOptions::causal(7, 9);
        flat(dilated_conv(to(x, 0, [2, 700, 37]), to(x, 1, [37, 7]), Some(x[2].clone()), options))
    }),
    ("embedding", &[50 * 20], |x| flat(embedding(to(x, 0, [50, 20]), ids(600, 50).reshape([20, 30])))),
    ("embedding bag", &[50 * 20], |x| {
        let offsets = Tensor::arange(0..100, &Device::flex()) * 6;
        flat(embedding_bag(to(x, 0, [50, 20]), ids(600, 50), offsets, Pooling::Mean))
    }),
    ("segment sum", &[600 * 20], |x| flat(segment_sum::<2>(to(x, 0, [600, 20]), ids(600, 50), 50))),
    ("segment max", &[600 * 20], |x| flat(segment_max::<2>(to(x, 0, [600, 20]), ids(600, 50), 50))),
    ("conv1d", &[2 * 8 * 300, 16 * 8 * 3, 16], |x| {
        let options = ConvOptions::new_with_padding([1], [(4, 0)], [2], 1);
        flat(conv1d(to(x, 0, [2, 8, 300]), to(x, 1, [16, 8, 3]), Some(x[2].clone()), options))
    }),
    ("conv2d", &[2 * 8 * 30 * 31, 16 * 8 * 9, 16], |x| {
        let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
        flat(conv2d(to(x, 0, [2, 8, 30, 31]), to(x, 1, [16, 8, 3, 3]), Some(x[2].clone()), options))
    }),
    ("conv2d by channel", &[2 * 8 * 30 * 31, 8 * 9], |x| {
        let options = ConvOptions::new([2, 2], [1, 1], [1, 1], 8);
        flat(conv2d(to(x, 0, [2, 8, 30, 31]), to(x, 1, [8, 1, 3, 3]), None, options))
    }),
    ("transposed conv2d", &[2 * 8 * 15 * 16, 8 * 6 * 9], |x| {
        let options = ConvTransposeOptions::new([2, 2], [1, 1], [0, 0], [1, 1], 1);
        flat(conv_transpose2d(to(x, 0, [2, 8, 15, 16]), to(x, 1, [8, 6, 3, 3]), None, options))
    }),
    ("max pooling", &[2 * 8 * 30 * 31], |x| {
        flat(max_pool2d(to(x, 0, [2, 8, 30, 31]), MaxPoolOptions::new([3, 3])))
    }),
    ("average pooling", &[2 * 8 * 30 * 31], |x| {
        flat(avg_pool2d(to(x, 0, [2, 8, 30, 31]), AvgPoolOptions::new([3, 3])))
    }),
    ("group norm", &[9 * 6 * 150, 6, 6], |x| {
        flat(group_norm(to::<3>(x, 0, [9, 6, 150]), Some(x[1].clone()), Some(x[2].clone()), 3, 1e-5))
    }),
    ("short conv", &[3 * 70 * 40, 4 * 40, 40], |x| {
        flat(short_conv(to(x, 0, [3, 70, 40]), to(x, 1, [4, 40]), Some(x[2].clone())))
    }),
    ("rfft", &[30 * 1001], |x| {
        let (re, im) = rfft::<2>(to(x, 0, [30, 1001]), 1);
        Tensor::cat(vec![flat(re), flat(im)], 0)
    }),
    ("irfft", &[30 * 501, 30 * 501], |x| flat(irfft::<2>(to(x, 0, [30, 501]), to(x, 1, [30, 501]), 1001, 1))),
    ("dropout", &[70_001], |x| dropout(x[0].clone(), 0.3, 11)),
    ("adamw", &[70_001, 70_001], |x| {
        let [value, gradient] = [0, 1].map(|i| x[i].clone().inner());
        let state = [value.zeros_like(), value.zeros_like()];
        let step = AdamWStep { lr: 0.1, betas: (0.9, 0.999), epsilon: 1e-8, step: 3, scale: 0.5 };
        let after = step.apply(vec![Parameter { value, gradient, state, weight_decay: 0.1 }]).remove(0);
        // The inputs take part so that there is a graph to go back through.
        Tensor::from_inner(after.value) + x[0].clone()
    }),
    ("gradient norm", &[70_001], |x| x[0].clone() * gradient_norm(&[x[0].clone().inner()])),
];

/// Input `i` in a shape.
fn to<const D: usize>(inputs: &[Tensor<1>], i: usize, shape: [usize; D]) -> Tensor<D> {
    inputs[i].clone().reshape(shape)
}

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    x.reshape([-1])
}

/// Numbers below `end` that repeat and come in no order.
fn ids(length: i64, end: i64) -> Tensor<1, Int> {
    let ids: Vec<i64> = (0..length).map(|i| i * i * 7 % end).collect();
    Tensor::from_data(ids.as_slice(), &Device::flex())
}

/// Result and gradients of an operation, with the number of every list.
fn outcome(lengths: &[usize], operation: fn(&[Tensor<1>]) -> Tensor<1>) -> Vec<Vec<f32>> {
    let mut rng = rng(lengths.len() as u64);
    let inputs: Vec<Tensor<1>> = lengths.iter().map(|&length| random(length, &mut rng)).collect();
    let (result, gradients) = evaluate(&inputs, 5, operation);
    [vec![result], gradients].concat()
}

/// What every operation gives, in a process with these settings.
fn run(level: &str, threads: &str) -> BTreeMap<String, Vec<Vec<f32>>> {
    let output = Command::new(std::env::current_exe().expect("the system knows the program"))
        .args(["child", "--exact", "--nocapture"])
        .envs([(CHILD_VARIABLE, "1"), (LEVEL_VARIABLE, level), ("RAYON_NUM_THREADS", threads)])
        .output()
        .expect("the test starts again");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let numbers = |list: &str| list.as_bytes().chunks(8).map(number).collect();
    String::from_utf8(output.stdout)
        .expect("it prints text")
        .lines()
        .filter_map(|line| line.split_once(": "))
        .filter(|(name, _)| OPERATIONS.iter().any(|(other, ..)| name == other))
        .map(|(name, lists)| (name.to_string(), lists.split(' ').map(numbers).collect()))
        .collect()
}

fn number(digits: &[u8]) -> f32 {
    let digits = std::str::from_utf8(digits).expect("digits");
    f32::from_bits(u32::from_str_radix(digits, 16).expect("digits"))
}

/// The part of the child: prints results and gradients as the digits of their bits.
#[test]
fn child() {
    if std::env::var(CHILD_VARIABLE).is_err() {
        return;
    }
    println!();
    for &(name, lengths, operation) in OPERATIONS {
        let digits = |list: Vec<f32>| list.iter().map(|x| format!("{:08x}", x.to_bits())).collect::<String>();
        let lists: Vec<String> = outcome(lengths, operation).into_iter().map(digits).collect();
        println!("{name}: {}", lists.join(" "));
    }
}

fn assert_same_bits(
    what: &str,
    found: &BTreeMap<String, Vec<Vec<f32>>>,
    expected: &BTreeMap<String, Vec<Vec<f32>>>,
) {
    let bits = |lists: &Vec<Vec<f32>>| -> Vec<u32> { lists.iter().flatten().map(|x| x.to_bits()).collect() };
    for (name, lists) in expected {
        assert!(bits(&found[name]) == bits(lists), "{name} differs {what}");
    }
}

#[test]
fn results_repeat_and_are_the_same_on_all_instruction_sets_and_threads() {
    let best = run("", "2");
    assert_eq!(best.len(), OPERATIONS.len(), "the child prints every operation");
    assert_same_bits("from run to run", &run("", "2"), &best);
    for (level, threads) in [("", "1"), ("avx2", "2"), ("scalar", "2"), ("scalar", "1")] {
        for (name, lists) in run(level, threads) {
            for (i, (found, expected)) in lists.iter().zip(&best[&name]).enumerate() {
                let what = format!("{name} with '{level}' on {threads} threads, list {i}");
                assert_close(&what, found, expected, 2e-5);
            }
        }
    }
}
