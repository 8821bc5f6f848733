//! Against values computed independently in double precision; see `tests/data/README.md`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::backend::ir::{FloatOperationIr, NumericOperationIr, TensorIr};
use burn::tensor::{DType, Device, Tensor, TensorData};
use kiln_compiler::builder::Builder;
use kiln_compiler::{Boundary, Graph};
use kiln_core::{Context, Port, PortKind, random_stream};
use kiln_ops::quantised::{
    Affine, Bytes, Conv, ConvShape, Ends, Level, Panels, Product, Requantise, pack_nibbles, unpack_nibbles,
};
use kiln_ptq::curvature::{Differences, Probing};
use kiln_ptq::data::{Examples, Numbers};
use kiln_ptq::fold::{BatchNorm, fold};
use kiln_ptq::mlp::Mlp;
use kiln_ptq::quantiser::{
    Asymmetric, Calibrator, PERCENTILE, Rows, Symmetric, best_clip, largest_size, size_quantile,
};
use kiln_ptq::search::bisect;
use kiln_ptq::{Program, QuantConfig, Quantiser};

fn data(name: &str) -> PathBuf {
    Path::new("tests/data").join(name)
}

/// Arrays of any type as doubles, which hold all of them exactly.
fn arrays(name: &str) -> BTreeMap<String, Vec<f64>> {
    kiln_ptq::arrays::read(&data(name))
        .unwrap()
        .into_iter()
        .map(|(name, array)| (name, array.values))
        .collect()
}

fn assert_close(what: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1e-300),
        "{what}: {found}, should be {expected}"
    );
}

fn whole(values: &[f64]) -> Vec<i32> {
    values.iter().map(|&x| x as i32).collect()
}

#[test]
fn quantisers_give_the_reference_scales_and_exactly_its_whole_numbers() {
    let file = arrays("quantizers.npz");
    for tensor in ["w", "act", "heavy", "one", "zeros"] {
        let x = &file[&format!("{tensor}/x")];
        for bits in [4, 8, 16] {
            let of = |name: &str| &file[&format!("{tensor}/{}", name.replace('#', &bits.to_string()))];
            let what = format!("{tensor} at {bits} bits");
            let symmetric = Symmetric::of_range(largest_size(x), bits);
            assert_close(&what, symmetric.scale, of("sym#_scale")[0], 1e-12);
            let q: Vec<i32> = x.iter().map(|&x| symmetric.quantise(x)).collect();
            assert_eq!(q, whole(of("sym#_q")), "{what}");
            for (&q, &value) in q.iter().zip(of("sym#_deq")) {
                assert_close(&what, symmetric.value(q), value, 1e-12);
            }
            let low = x.iter().copied().fold(0.0, f64::min);
            let high = x.iter().copied().fold(0.0, f64::max);
            let asymmetric = Asymmetric::of_range(low, high, bits);
            assert_close(&what, asymmetric.scale, of("asym#_scale")[0], 1e-12);
            assert_eq!(f64::from(asymmetric.zero), of("asym#_zero")[0], "{what}");
            let q: Vec<i32> = x.iter().map(|&x| asymmetric.quantise(x)).collect();
            assert_eq!(q, whole(of("asym#_q")), "{what}");
            if tensor == "zeros" {
                continue; // no cut is better than another
            }
            let (clip, error) = best_clip(x, bits);
            assert_close(&what, clip, of("mse#_clip")[0], 1e-12);
            assert_close(&what, error, of("mse#_mse")[0], 1e-9);
        }
    }
    for bits in [4, 8] {
        let rows = Rows::of(&file["w/x"], 5, bits, Calibrator::Minmax);
        assert_eq!(rows.q, whole(&file[&format!("w/perch{bits}_q")]));
        for (&found, &expected) in rows.scales.iter().zip(&file[&format!("w/perch{bits}_scale")]) {
            assert_close("a row's scale", found, expected, 1e-12);
        }
    }
    assert_close(
        "quantile",
        size_quantile(&file["heavy/x"], PERCENTILE),
        file["heavy/pct99.9_clip"][0],
        1e-12,
    );
}

#[test]
fn integer_convolution_and_product_match_bit_for_bit() {
    let file = arrays("integer_ops.npz");
    let number = |name: &str| file[name][0];
    let shape = ConvShape {
        channels: 3,
        image: [7, 6],
        outputs: 4,
        kernel: [3, 3],
        stride: [2, 2],
        padding: [1, 1],
        dilation: [1, 1],
        groups: 1,
    };
    let x: Vec<u8> = file["conv_x"].iter().map(|&x| x as u8).collect();
    let w: Vec<i8> = file["conv_w"].iter().map(|&w| w as i8).collect();
    let (bias, zero) = (whole(&file["conv_bias"]), number("conv_zx") as u8);
    let scales: Vec<f32> = file["conv_sw"].iter().map(|sw| (number("conv_sx") * sw) as f32).collect();
    let to = Affine { scale: number("conv_sy") as f32, zero: number("conv_zy") as u8, most: 255 };
    for level in Level::available() {
        let conv = Conv::new(shape, &w).with_level(level);
        let sums = conv.sums(&x, zero);
        let with_bias: Vec<i32> = sums.iter().enumerate().map(|(at, sum)| sum + bias[at / 12 % 4]).collect();
        assert_eq!(with_bias, whole(&file["conv_acc"]), "{level:?}");
        let requantise = Requantise { scales: &scales, bias: &bias, ends: Ends::OPEN };
        let y: Vec<i32> = conv.bytes(&x, zero, &requantise, &to).iter().map(|&y| y.into()).collect();
        assert_eq!(y, whole(&file["conv_y"]), "{level:?}");
    }

    let [a, b] = ["i4_a", "i4_b"].map(|name| file[name].iter().map(|&x| x as i8).collect::<Vec<_>>());
    let packed = pack_nibbles(&b, 19);
    assert_eq!(packed.iter().map(|&byte| f64::from(byte)).collect::<Vec<_>>(), file["i4_b_packed"]);
    assert_eq!(unpack_nibbles(&packed, 19), b);
    let panels = Panels::from_rows(&b, 6, 19).with_nibbles();
    for level in Level::available() {
        let sums = Product::new(&Bytes::signed(&a, 19), &panels).with_level(level).sums();
        assert_eq!(sums, whole(&file["i4_acc"]), "{level:?}");
    }
}

#[test]
fn a_folded_batch_norm_is_the_reference() {
    let file = arrays("bn_fold.npz");
    let (mut w, mut b) = (file["w"].clone(), file["b"].clone());
    let norm = BatchNorm {
        gamma: &file["gamma"],
        beta: &file["beta"],
        mean: &file["mean"],
        variance: &file["var"],
        epsilon: file["eps"][0],
    };
    let (factors, terms) = norm.affine();
    fold(&mut w, &mut b, &factors, &terms);
    for (found, expected) in w.iter().chain(&b).zip(file["w_fold"].iter().chain(&file["b_fold"])) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs().max(1.0), "{found}, should be {expected}");
    }
}

#[test]
fn sensitivities_of_the_perceptron_are_exact_and_the_estimate_is_near() {
    let text = std::fs::read_to_string(data("sensitivity_mlp.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mlp: Mlp = serde_json::from_str(&text).unwrap();
    mlp.check("the perceptron").unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
    };
    let near = |what: &str, found: &[f64], expected: &[f64], tolerance: f64| {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f - e).abs() <= tolerance * e.abs().max(1.0), "{what}: {f}, should be {e}");
        }
    };
    near("loss", &[mlp.loss(&mlp.flat_weights())], &[expected["loss"].as_f64().unwrap()], 1e-12);
    let traces = mlp.exact_traces();
    near("trace", &traces, &numbers(&expected["trace"]), 1e-6);
    let estimate = mlp
        .estimated_traces(1 << 12, |layer, block| random_stream(0, &format!("probe {layer}"), block as u64));
    for (estimate, trace) in estimate.iter().zip(&traces) {
        assert!((estimate / trace - 1.0).abs() < 0.03, "{estimate}, should be near {trace}");
    }
    // Of fewer probes than make the signs orthogonal, the mean over many draws is the trace too.
    let draws: Vec<Vec<f64>> = (0..400)
        .map(|draw| {
            mlp.estimated_traces(3, |layer, block| random_stream(draw, &format!("few {layer}"), block as u64))
        })
        .collect();
    for (layer, trace) in traces.iter().enumerate() {
        let values: Vec<f64> = draws.iter().map(|draw| draw[layer]).collect();
        let mean = values.iter().sum::<f64>() / 400.0;
        let error = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 399.0 / 400.0).sqrt();
        assert!((mean - trace).abs() < 4.0 * error, "{mean}, should be near {trace} within {error}");
    }
    for bits in [4, 8] {
        let expected = &expected["bits"][bits.to_string()];
        let (noise, single, pairs) = mlp.perturbations(bits);
        near("noise", &noise, &numbers(&expected["err2"]), 1e-9);
        near("single", &single, &numbers(&expected["single"]), 1e-9);
        for (i, row) in pairs.iter().enumerate() {
            near("pair", row, &numbers(&expected["pair"][i]), 1e-9);
        }
        let weights = mlp.flat_weights();
        let score = |l: usize| traces[l] / weights[l].len() as f64 * noise[l];
        near("hessian", &(0..4).map(score).collect::<Vec<_>>(), &numbers(&expected["hess"]), 1e-6);
    }
}

/// The perceptron as a captured network, one example at a time, with its examples; `spoilt` adds 0 by an operation without a
/// derivative.
fn as_network(file: &serde_json::Value, spoilt: bool) -> (Program, Examples) {
    let numbers = |value: &serde_json::Value| -> Vec<f32> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    };
    let rows = |value: &serde_json::Value| -> Vec<f32> {
        value.as_array().unwrap().iter().flat_map(numbers).collect()
    };
    let mut builder = Builder::new(0);
    let (weights, biases) = (file["W"].as_array().unwrap(), file["B"].as_array().unwrap());
    let width = weights[0][0].as_array().unwrap().len();
    let x = builder.provided(&[1, width], DType::F32);
    let mut y = x.clone();
    for (layer, (weight, bias)) in weights.iter().zip(biases).enumerate() {
        if layer > 0 {
            y = builder.float(&y, FloatOperationIr::Tanh).unwrap();
        }
        let bias = numbers(bias);
        let weight = TensorData::new(rows(weight), [bias.len(), y.shape[1]]);
        let weight =
            builder.constant(Tensor::<2>::from_data(weight, &Device::flex()).transpose().into_data());
        y = builder.matmul(&y, &weight).unwrap();
        let bias = builder.constant(TensorData::new(bias.clone(), [1, bias.len()]));
        y = builder.add(&y, &bias).unwrap();
    }
    if spoilt {
        let product = builder.reduce(&y, 1, NumericOperationIr::ProdDim).unwrap();
        let nothing = builder.mul_scalar(&product, 0.0).unwrap();
        y = builder.add(&y, &nothing).unwrap();
    }
    let boundary = |name: &str, tensor: &TensorIr| Boundary {
        port: Port { name: name.into(), kind: PortKind::Float, shape: tensor.shape.to_vec() },
        tensor: tensor.id,
    };
    let (inputs, outputs) = (vec![boundary("x", &x)], vec![boundary("logits", &y)]);
    let Builder { operations, constants, .. } = builder;
    let graph = Graph { kind: "perceptron".into(), inputs, outputs, operations, constants };
    let labels: Vec<usize> =
        file["Y"].as_array().unwrap().iter().map(|label| label.as_u64().unwrap() as usize).collect();
    let classes = vec![String::new(); y.shape[1]];
    let values = Numbers::Floats(rows(&file["X"]));
    (Program::new(graph).unwrap(), Examples { shape: vec![width], values, labels, classes })
}

#[test]
fn curvature_of_the_perceptron_as_a_network_is_the_reference() {
    let text = std::fs::read_to_string(data("sensitivity_mlp.json")).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected: Vec<f64> =
        file["trace"].as_array().unwrap().iter().map(|trace| trace.as_f64().unwrap()).collect();
    let cx = Context::for_tests("unused");
    for (spoilt, differences, tolerance) in
        [(false, Differences::Gradients, 0.005), (true, Differences::Losses, 0.1)]
    {
        let (program, examples) = as_network(&file, spoilt);
        let quantiser = Quantiser::calibrate(program, &examples, QuantConfig::default(), &cx).unwrap();
        // As many orthogonal signs as make the traces exact, and each of the four layers is a group of its own.
        let found = quantiser.curvature(&examples, Probing { most: 64, error: 0.0 }, &cx).unwrap();
        assert_eq!((found.method.differences, found.method.because.is_some()), (differences, spoilt));
        for (layer, (trace, expected)) in found.traces.iter().zip(&expected).enumerate() {
            assert_eq!(trace.probes, 64);
            assert!(
                (trace.mean / expected - 1.0).abs() < tolerance,
                "layer {layer} by {differences:?}: {}, should be {expected}",
                trace.mean
            );
        }
    }
    let (program, examples) = as_network(&file, false);
    let quantiser = Quantiser::calibrate(program, &examples, QuantConfig::default(), &cx).unwrap();
    let found = quantiser.curvature(&examples, Probing::at_most(1 << 13), &cx).unwrap();
    for (trace, expected) in found.traces.iter().zip(&expected) {
        // Probes end as soon as the error is small enough, and the trace is within some of these errors.
        assert!(trace.probes < 1 << 13 && trace.error < 0.05 * trace.mean, "{trace:?}");
        assert!((trace.mean - expected).abs() < 4.0 * 0.05 * expected, "{trace:?}, should be {expected}");
    }
}

#[test]
fn bisection_looks_where_the_reference_looks() {
    let text = std::fs::read_to_string(data("bisection.json")).unwrap();
    let cases: serde_json::Value = serde_json::from_str(&text).unwrap();
    for case in cases.as_array().unwrap() {
        let metric = case["metric_by_k"].as_array().unwrap();
        let mut looked = Vec::new();
        let k = bisect(metric.len() - 1, |k| {
            looked.push(k);
            Ok(metric[k].as_f64().unwrap() >= case["target"].as_f64().unwrap())
        });
        assert_eq!(k.unwrap(), case["k"].as_u64().unwrap() as usize);
        assert_eq!(serde_json::json!(looked), case["evaluated"]);
    }
}
