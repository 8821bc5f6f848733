//! Graphs compiled for the CPU against the same graphs run operation by operation.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::backend::DispatchTensor;
use burn::tensor::{Device, Int, Tensor, TensorData, activation, s};
use kiln_compiler::loops::{Buffer, check, default_passes, interpret, to_wasm};
use kiln_compiler::{Executor, Graph, capture};
use kiln_core::{Network, Port, PortKind};

use crate::cases::{Case, FUNCTIONS, input};
use crate::networks::{Example, Frozen};

fn floats(data: &TensorData) -> Vec<f32> {
    data.iter::<f32>().collect()
}

/// Numbers between -2 and 2 that do not repeat soon.
fn numbers(shape: &[usize]) -> TensorData {
    let count: usize = shape.iter().product();
    let number = |i: usize| ((i * 7919 + 13) % 4001) as f32 / 1000.0 - 2.0;
    TensorData::new((0..count).map(number).collect::<Vec<_>>(), shape.to_vec())
}

/// Compiles a graph and compares; the second run finds the memory full of what the first left.
fn agrees(graph: &Graph, inputs: &[TensorData], what: &str) -> Executor {
    let expected = graph.run(inputs).unwrap();
    let mut compiled = Executor::new(graph.clone()).unwrap();
    for _ in 0..2 {
        let found = compiled.run(inputs).unwrap();
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!((found.shape(), found.dtype()), (expected.shape(), expected.dtype()), "{what}");
            for (i, (a, b)) in floats(found).into_iter().zip(floats(expected)).enumerate() {
                let close = (a - b).abs() <= 2e-5 * (1.0 + b.abs()) || a.to_bits() == b.to_bits();
                assert!(
                    close || (a.is_nan() && b.is_nan()) || a == b,
                    "{what}, element {i}: {a}, should be {b}"
                );
            }
        }
    }
    compiled
}

/// Runs a graph as a loop program: interpreted, and as a WebAssembly module, before and after the passes.
fn agrees_as_loops(graph: &Graph, inputs: &[TensorData], what: &str) {
    let expected = graph.run(inputs).unwrap();
    let (program, mut buffers) = graph.clone().to_loops().unwrap_or_else(|e| panic!("{what}: {e}"));
    for (input, data) in graph.inputs.iter().zip(inputs) {
        buffers.insert(input.port.name.clone(), Buffer::from_tensor(data).unwrap());
    }
    let mut optimised = program.clone();
    default_passes().iter().for_each(|pass| pass.apply(&mut optimised).unwrap());
    for (program, how) in [(program, "as written"), (optimised, "after the passes")] {
        let checked = check(&program).unwrap();
        let interpreted = interpret(&program, &checked, &buffers, u64::MAX).unwrap().unwrap();
        let compiled = to_wasm(&program, &checked).unwrap().run(&buffers).unwrap().unwrap();
        // As text, in which numbers that are none are alike.
        assert_eq!(format!("{interpreted:?}"), format!("{compiled:?}"), "{what} {how}");
        for (output, expected) in graph.outputs.iter().zip(&expected) {
            let found = floats(&interpreted[&output.port.name].to_tensor());
            for (a, b) in found.into_iter().zip(floats(expected)) {
                let close = (a - b).abs() <= 2e-5 * (1.0 + b.abs()) || a == b || (a.is_nan() && b.is_nan());
                assert!(close, "{what} {how}: {a}, should be {b}");
            }
        }
    }
}

#[test]
fn networks_of_every_family_are_loop_programs_too() {
    let bert = Example::Bert { layers: 1, heads: 2 };
    let llama = Example::Llama { layers: 1, heads: 2 };
    for (example, shape) in [(bert, vec![2, 3, 8]), (llama, vec![1, 5, 8])] {
        let graph = capture(Box::new(Frozen { example, input: shape.clone() })).unwrap();
        agrees_as_loops(&graph, &[numbers(&shape)], &format!("{example:?}"));
    }
}

#[test]
fn networks_of_every_family_agree_with_the_reference() {
    let bert = Example::Bert { layers: 2, heads: 3 };
    let llama = Example::Llama { layers: 2, heads: 3 };
    let gla = Example::Gla { layers: 1, heads: 2 };
    for (example, shape) in [
        (Example::ResNet18, vec![2, 3, 33, 40]),
        (Example::MobileNetV2, vec![1, 3, 32, 32]),
        (bert, vec![3, 7, 24]),
        (bert, vec![1, 1, 24]),
        (llama, vec![2, 70, 24]),
        (gla, vec![2, 128, 16]),
    ] {
        let graph = capture(Box::new(Frozen { example, input: shape.clone() })).unwrap();
        agrees(&graph, &[numbers(&shape)], &format!("{example:?} {shape:?}"));
    }
}

#[test]
fn fused_networks_have_few_steps() {
    let steps = |example, shape: Vec<usize>| {
        let graph = capture(Box::new(Frozen { example, input: shape })).unwrap();
        Executor::new(graph).unwrap().footprint().steps.iter().map(|step| step.count).sum::<usize>()
    };
    // 20 convolutions with all between them, two pools, one product.
    assert_eq!(steps(Example::ResNet18, vec![1, 3, 64, 64]), 23);
    // Four products of one input, attention, two products more, two norms.
    assert_eq!(steps(Example::Bert { layers: 1, heads: 3 }, vec![1, 8, 24]), 9);
}

/// A network of one function.
struct Of<F>(F, Vec<Vec<usize>>, Vec<Vec<usize>>);

impl<F: Fn(Vec<Tensor<3>>) -> Vec<DispatchTensor> + Send> Network for Of<F> {
    fn kind(&self) -> &str {
        "function"
    }

    fn inputs(&self) -> Vec<Port> {
        ports("x", &self.1)
    }

    fn outputs(&self) -> Vec<Port> {
        ports("y", &self.2)
    }

    fn move_to(&mut self, _: &Device) {}

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        (self.0)(inputs.into_iter().map(Tensor::from_dispatch).collect())
    }
}

fn ports(name: &str, shapes: &[Vec<usize>]) -> Vec<Port> {
    let port = |(i, shape): (usize, &Vec<usize>)| Port {
        name: format!("{name}{i}"),
        kind: PortKind::Float,
        shape: shape.clone(),
    };
    shapes.iter().enumerate().map(port).collect()
}

/// Captures a function of two tensors `[2, 5, 6]` and compares.
fn compare<const D: usize>(
    what: &str,
    shape: [usize; D],
    f: impl Fn(Tensor<3>, Tensor<3>) -> Tensor<D> + Send + 'static,
) {
    let inputs = vec![vec![2, 5, 6]; 2];
    let of = move |x: Vec<Tensor<3>>| vec![f(x[0].clone(), x[1].clone()).into_dispatch()];
    let graph = capture(Box::new(Of(of, inputs, vec![shape.to_vec()]))).unwrap();
    let [a, b] = [numbers(&[2, 5, 6]), numbers(&[2, 5, 7])];
    let b = TensorData::new(floats(&b)[..60].to_vec(), vec![2, 5, 6]);
    let inputs = [a, b];
    agrees(&graph, &inputs, what);
    match graph.clone().to_loops() {
        Ok(_) => agrees_as_loops(&graph, &inputs, what),
        Err(error) => assert!(error.to_string().contains("has no form as loops"), "{what}: {error}"),
    }
}

#[test]
fn moving_elements_about_keeps_them() {
    compare("transposed sum", [2, 6, 5], |a, b| a.swap_dims(1, 2) + b.swap_dims(1, 2).exp());
    compare("reshaped transpose", [10, 6], |a, _| a.swap_dims(0, 1).reshape([10, 6]));
    compare("slice of a computed tensor", [1, 2, 6], |a, b| (a * b).slice(s![1..2, 1..5;2, ..]));
    compare("flip", [2, 5, 6], |a, b| a.flip([0, 2]) - b);
    compare("repeat", [2, 15, 6], |a, _| a.repeat_dim(1, 3));
    compare("expanded sum", [2, 5, 6], |a, b| a.slice(s![.., 0..1, ..]).sqrt() + b);
    compare("concatenation", [2, 12, 6], |a, b| {
        Tensor::cat(vec![a.clone().tanh(), b, a.slice(s![.., 3..5, ..])], 1)
    });
    compare("concatenation of the last axis", [2, 5, 12], |a, b| {
        Tensor::cat(vec![a.clone() + 1.0, b * a], 2)
    });
    compare("unfolded", [2, 3, 6, 3], |a, _| a.unfold(1, 3, 1));
}

#[test]
fn functions_of_elements_are_burns() {
    compare("unaries", [2, 5, 6], |a, b| {
        a.clone().abs().sqrt() + b.clone().sin() * a.clone().cos() - b.exp().log1p() + a.erf()
    });
    compare("rounding", [2, 5, 6], |a, b| a.clone().floor() + b.clone().ceil() * a.round() + b.sign());
    compare("clamps", [2, 5, 6], |a, b| a.clamp(-0.5, 1.0) + b.clone().clamp_min(0.1) + b.clamp_max(0.2));
    compare("masks", [2, 5, 6], |a, b| {
        let mask = a.clone().greater(b.clone());
        b.clone().mask_where(mask.clone(), a.clone()) + a.mask_fill(mask.bool_not(), f32::INFINITY)
    });
    compare("powers", [2, 5, 6], |a, b| {
        a.clone().powi_scalar(2) + a.abs().powf_scalar(1.7) * b.powi_scalar(3)
    });
    compare("activations", [2, 5, 6], |a, b| {
        activation::gelu(a.clone()) + activation::silu(b.clone()) * activation::sigmoid(a.clone())
            - activation::leaky_relu(b, 0.1)
            + activation::relu(a)
    });
    compare("remainders", [2, 5, 6], |a, b| a.remainder(b + 2.5));
    compare("not numbers", [2, 5, 6], |a, b| a.clone().log() * b.clone().sqrt() + (a / (b.clone() - b)));
}

#[test]
fn rows_are_reduced_along_every_axis() {
    compare("sums", [2, 1, 6], |a, b| (a * b).sum_dim(1) / 3.0);
    compare("mean of the first axis", [1, 5, 6], |a, b| (a + b).mean_dim(0));
    compare("largest", [2, 5, 1], |a, b| a.max_dim(2) - b.min_dim(2));
    compare("total", [1], |a, b| (a - b).sum());
    compare("softmax", [2, 5, 6], |a, b| activation::softmax(a * 3.0, 1) + activation::log_softmax(b, 2));
    compare("cumulative", [2, 5, 6], |a, b| a.cumsum(1) * b);
    compare("what no kernel does", [2, 5, 6], |a, b| a.sort(1) + b.cumprod(2));
    compare("variance", [2, 5, 1], |a, b| (a + b).var(2));
}

#[test]
fn products_take_operands_as_they_lie() {
    compare("transposed operand", [2, 5, 5], |a, b| a.matmul(b.swap_dims(1, 2)));
    compare("both transposed", [2, 6, 6], |a, b| a.swap_dims(1, 2).matmul(b));
    compare("one matrix for all", [2, 5, 5], |a, b| {
        activation::gelu(a.matmul(b.slice(s![0..1, .., ..]).swap_dims(1, 2)) + 0.5)
    });
    compare("vector", [2, 1, 5], |a, b| a.slice(s![.., 0..1, ..]).matmul(b.swap_dims(1, 2)));
    compare("strided rows", [2, 3, 5], |a, b| a.slice(s![.., 0..5;2, ..]).matmul(b.swap_dims(1, 2)));
}

#[test]
fn attention_is_found_again_in_the_operations_it_was_written_with() {
    /// `[2, 5, 6]` as three heads of two.
    fn heads(x: Tensor<3>) -> Tensor<4> {
        x.reshape([2, 5, 3, 2]).swap_dims(1, 2)
    }
    type Scores = fn(Tensor<4>, Tensor<3>) -> Tensor<4>;
    let found: &[(&str, Scores)] = &[
        ("scaled", |scores, _| scores * 0.7),
        ("scaled and biased", |scores, b| scores / 1.5 + b.slice(s![.., .., 0..5]).unsqueeze_dim(1)),
        ("causal", |scores, _| {
            let mask = Tensor::<2, burn::tensor::Bool>::tril_mask([5, 5], 0, &scores.device());
            (scores * 0.3).mask_fill(mask.unsqueeze(), f32::NEG_INFINITY)
        }),
    ];
    let other: &[(&str, Scores)] = &[
        ("scaled after the bias", |scores, b| (scores + b.slice(s![.., .., 0..5]).unsqueeze_dim(1)) * 0.5),
        ("a function of the scores", |scores, _| scores.tanh()),
    ];
    for (expected, cases) in [(true, found), (false, other)] {
        for (what, change) in cases {
            let (change, inputs) = (*change, vec![vec![2, 5, 6]; 2]);
            let of = move |x: Vec<Tensor<3>>| {
                let [a, b] = [x[0].clone(), x[1].clone()];
                let scores = heads(a.clone()).matmul(heads(b.clone()).transpose());
                let mixed = activation::softmax(change(scores, b.clone()), 3).matmul(heads(a * b));
                vec![mixed.swap_dims(1, 2).reshape([2, 5, 6]).into_dispatch()]
            };
            let graph = capture(Box::new(Of(of, inputs, vec![vec![2, 5, 6]]))).unwrap();
            let compiled = agrees(&graph, &[numbers(&[2, 5, 6]), numbers(&[2, 5, 6])], what);
            let attention = compiled.footprint().steps.iter().any(|step| step.name.contains("Attention"));
            assert_eq!(attention, expected, "{what}");
        }
    }
}

#[test]
fn a_result_with_two_readers_is_not_overwritten_for_one() {
    compare("product read twice", [2, 5, 5], |a, b| {
        let product = a.matmul(b.swap_dims(1, 2));
        activation::relu(product.clone()).matmul(product)
    });
    compare("swish of a product", [2, 5, 5], |a, b| activation::silu(a.matmul(b.swap_dims(1, 2))));
    compare("two epilogues", [2, 5, 5], |a, b| {
        let product = a.matmul(b.swap_dims(1, 2));
        let [left, right] = [product.clone().exp(), product.sin()];
        left.matmul(right)
    });
    compare("a sum of two products", [2, 5, 5], |a, b| {
        let left = a.clone().matmul(b.clone().swap_dims(1, 2));
        left.clone() + b.matmul(a.swap_dims(1, 2)) * left
    });
    compare("rows and what they came from", [2, 5, 6], |a, b| {
        let sum = (a + b).exp();
        activation::softmax(sum.clone(), 2) + sum
    });
}

#[test]
fn indices_pick_rows_or_are_refused() {
    struct Pick;
    impl Network for Pick {
        fn kind(&self) -> &str {
            "pick"
        }
        fn inputs(&self) -> Vec<Port> {
            vec![
                Port { name: "table".into(), kind: PortKind::Float, shape: vec![4, 3] },
                Port { name: "ids".into(), kind: PortKind::Int, shape: vec![5] },
            ]
        }
        fn outputs(&self) -> Vec<Port> {
            ports("y", &[vec![5, 3]])
        }
        fn move_to(&mut self, _: &Device) {}
        fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
            let [table, ids] = inputs.try_into().unwrap();
            let picked = Tensor::<2>::from_dispatch(table).select(0, Tensor::<1, Int>::from_dispatch(ids));
            vec![(picked * 2.0).into_dispatch()]
        }
    }
    let graph = capture(Box::new(Pick)).unwrap();
    let ids = |last: i64| TensorData::new(vec![3i64, 0, 0, 2, last], vec![5]);
    let mut compiled = agrees(&graph, &[numbers(&[4, 3]), ids(1)], "pick");
    for wrong in [4, -1] {
        let error = compiled.run(&[numbers(&[4, 3]), ids(wrong)]).unwrap_err().to_string();
        assert!(error.contains("index 4") && error.contains("4 rows"), "{error}");
    }
}

#[test]
fn convolutions_and_pools_are_loop_programs_too() {
    use burn::tensor::module;
    use burn::tensor::ops::{AvgPoolOptions, ConvOptions, MaxPoolOptions};
    type Layer = fn(Tensor<4>) -> Tensor<4>;
    let cases: &[(&str, Layer)] = &[
        ("strided convolution with groups", |x| {
            let weight = Tensor::from_data(numbers(&[4, 1, 3, 2]), &x.device());
            let bias = Tensor::from_data(numbers(&[4]), &x.device());
            module::conv2d(x, weight, Some(bias), ConvOptions::new([2, 1], [1, 0], [1, 2], 2))
        }),
        ("largest of windows", |x| {
            kiln_ops::max_pool2d(x, MaxPoolOptions::new([3, 2]).with_stride([2, 1]).with_padding([1, 0]))
        }),
        ("means of windows", |x| kiln_ops::avg_pool2d(x, AvgPoolOptions::new([3, 2]).with_padding([1, 1]))),
        ("means of windows, rounded up", |x| {
            let windows = AvgPoolOptions::new([3, 4]).with_stride([2, 3]).with_padding([1, 1]);
            kiln_ops::avg_pool2d(x, windows.with_ceil_mode(true))
        }),
        ("means without padding, rounded up", |x| {
            let windows = AvgPoolOptions::new([3, 4]).with_stride([2, 3]).with_padding([1, 1]);
            kiln_ops::avg_pool2d(x, windows.with_count_include_pad(false).with_ceil_mode(true))
        }),
        ("even means", |x| kiln_ops::adaptive_avg_pool2d(x, [3, 4])),
        ("largest of windows in a row", |x| {
            let windows = MaxPoolOptions::new([3]).with_stride([2]).with_padding([1]).with_dilation([2]);
            kiln_ops::max_pool1d(x.reshape([2, 2, 42]), windows).unsqueeze_dim(2)
        }),
        ("means of windows in a row", |x| {
            let windows = AvgPoolOptions::new([4]).with_stride([3]).with_padding([1]);
            kiln_ops::avg_pool1d(x.reshape([2, 2, 42]), windows).unsqueeze_dim(2)
        }),
    ];
    for (what, layer) in cases {
        let layer = *layer;
        let sample = layer(Tensor::from_data(numbers(&[2, 2, 7, 6]), &Device::flex()));
        let of = move |x: Vec<Tensor<3>>| vec![layer(x[0].clone().reshape([2, 2, 7, 6])).into_dispatch()];
        let network = Of(of, vec![vec![4, 7, 6]], vec![sample.dims().to_vec()]);
        let graph = capture(Box::new(network)).unwrap();
        agrees(&graph, &[numbers(&[4, 7, 6])], what);
        agrees_as_loops(&graph, &[numbers(&[4, 7, 6])], what);
    }
}

#[test]
fn compiled_gradients_are_those_of_the_graph() {
    let inputs = [input([4, 6]).to_data(), input([6, 4]).to_data()];
    for (name, function) in FUNCTIONS {
        let gradient = capture(Box::new(Case(*function))).unwrap().gradient("loss", &["x", "y"]).unwrap();
        let compiled = agrees(&gradient, &inputs, name);
        // Convolutions whose weights change, and their gradients, have kernels of their own.
        let by_burn = ["Conv2d (by Burn)", "Conv2dXBackward (by Burn)", "Conv2dWeightBackward (by Burn)"];
        assert!(!compiled.footprint().steps.iter().any(|step| by_burn.contains(&&*step.name)), "{name}");
    }
}
