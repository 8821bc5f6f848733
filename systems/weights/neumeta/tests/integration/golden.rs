//! Against the paper's reference code, run in double precision.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::tensor::Device;
use kiln_core::{Context, TensorFile};
use kiln_neumeta::forward::{ForwardConfig, recompute};
use kiln_neumeta::graph::TensorSpec;
use kiln_neumeta::network::BatchStatistics;
use kiln_neumeta::shp::Metric;
use kiln_neumeta::smooth::total_variation;
use kiln_neumeta::{Distances, ShpSolver, fold_batch_norm};

fn golden() -> TensorFile {
    TensorFile::read(Path::new("tests/data/neumeta.safetensors")).unwrap()
}

fn floats(file: &TensorFile, name: &str) -> Vec<f32> {
    file.get(name).unwrap_or_else(|| panic!("{name}")).as_floats().unwrap().to_vec()
}

fn assert_close(name: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (index, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= 1e-4 * b.abs() + 1e-6, "{name}[{index}]: {a}, expected {b}");
    }
}

#[test]
fn coordinates_weights_logits_and_losses_are_those_of_the_reference() {
    let config: ForwardConfig =
        serde_json::from_slice(&std::fs::read("tests/data/config.json").unwrap()).unwrap();
    let found = recompute(golden(), &config, &Device::flex()).unwrap();
    let golden = golden();
    let mut compared = 0;
    for name in
        golden.names().filter(|name| name.starts_with('w') || *name == "recon.loss" || *name == "reg.loss")
    {
        assert_eq!(found.get(name).unwrap().shape, golden.get(name).unwrap().shape, "{name}");
        assert_close(name, &floats(&found, name), &floats(&golden, name));
        compared += 1;
    }
    assert_eq!(compared, 3 * 10 + 2);
}

#[test]
fn total_variation_is_that_of_the_reference() {
    let golden = golden();
    let names: Vec<&str> = golden.names().filter(|name| name.starts_with("tv.param.")).collect();
    let sum: f64 = names
        .iter()
        .map(|name| {
            let spec = TensorSpec { name: String::new(), shape: golden.get(name).unwrap().shape.clone() };
            total_variation(&spec, &floats(&golden, name))
        })
        .sum();
    assert_close("tv", &[(sum / names.len() as f64) as f32], &floats(&golden, "tv.reference"));
}

fn cities(name: &str) -> Distances {
    let golden = golden();
    let tensor = golden.get(name).unwrap();
    Distances::of_points(tensor.as_floats().unwrap(), tensor.shape[1], Metric::L1).unwrap()
}

#[test]
fn few_cities_are_ordered_optimally_and_many_at_least_as_well_as_by_the_reference() {
    let (cx, golden) = (Context::for_tests("unused"), golden());
    let few = ShpSolver::default().solve(&cities("shp.cities"), &cx).unwrap();
    let optimum = f64::from(floats(&golden, "shp.optimal_length")[0]);
    assert!((few.length / optimum - 1.0).abs() < 1e-5, "{} {optimum}", few.length);

    let distances = cities("shp.big.cities");
    let identity: Vec<usize> = (0..96).collect();
    let expected = f64::from(floats(&golden, "shp.big.identity_length")[0]);
    assert!((distances.length(&identity) / expected - 1.0).abs() < 1e-5);
    let many = ShpSolver::default().solve(&distances, &cx).unwrap();
    let reference = f64::from(floats(&golden, "shp.big.reference_length")[0]);
    assert!(many.length <= 1.001 * reference, "{} {reference}", many.length);
    let backwards: Vec<usize> = many.path.iter().rev().copied().collect();
    assert!((distances.length(&backwards) - many.length).abs() < 1e-6);
}

#[test]
fn a_folded_batch_norm_is_that_of_the_reference() {
    let golden = golden();
    let mut weight = floats(&golden, "bn.conv.weight");
    let mut bias = vec![0.0; 5];
    let part = |name: &str| floats(&golden, &format!("bn.{name}"));
    let norm = BatchStatistics {
        scale: part("gamma"),
        shift: part("beta"),
        mean: part("mean"),
        variance: part("var"),
    };
    fold_batch_norm(&mut weight, &mut bias, &norm, 1e-5);
    assert_close("weight", &weight, &part("fused.weight"));
    assert_close("bias", &bias, &part("fused.bias"));
}
