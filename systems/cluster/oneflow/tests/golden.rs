//! Against the golden vectors, which were computed apart in Python.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_core::TensorFile;
use kiln_oneflow::actor::{chain, simulate};
use kiln_oneflow::boxing::{bytes_on_same, bytes_to_others};
use kiln_oneflow::linear::Linear;
use kiln_oneflow::sbp::{NdSbp, Region, Sbp, coordinate, copy_box};
use serde_json::Value;

fn golden(file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(format!("tests/data/{file}")).unwrap()).unwrap()
}

fn sbp(value: &Value) -> Sbp {
    value.as_str().unwrap().parse().unwrap()
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

fn sizes(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(size).collect()
}

#[test]
fn local_tensors_are_those_of_the_reference() {
    let tensors = TensorFile::read("tests/data/splits.safetensors".as_ref()).unwrap();
    for case in golden("splits.json").as_array().unwrap() {
        let name = case["case"].as_str().unwrap();
        let (shape, mesh) = (sizes(&case["shape"]), sizes(&case["mesh"]));
        let form = NdSbp(case["sbp"].as_array().unwrap().iter().map(sbp).collect());
        let global = tensors.get(&format!("{name}.global")).unwrap();
        for rank in 0..mesh.iter().product() {
            let local = tensors.get(&format!("{name}.rank{rank}")).unwrap();
            let region = Region::local(&shape, &mesh, &form, &coordinate(&mesh, rank));
            assert_eq!(region.size, local.shape, "{name} rank {rank}");
            let mut cut = vec![0.0; region.elements()];
            copy_box(global.as_floats().unwrap(), &Region::whole(&shape), &mut cut, &region, &region);
            assert_eq!(cut, local.as_floats().unwrap(), "{name} rank {rank}");
        }
    }
}

#[test]
fn conversions_cost_what_the_reference_says() {
    for case in golden("sbp.json")["boxing_same"].as_array().unwrap() {
        let bytes = bytes_on_same(sbp(&case["src"]), sbp(&case["dst"]), size(&case["p"]), 1000.0);
        assert_eq!(bytes, case["bytes"].as_f64().unwrap(), "{case}");
    }
    for case in golden("sbp.json")["boxing_disjoint"].as_array().unwrap() {
        let (p1, p2) = (size(&case["p1"]), size(&case["p2"]));
        let bytes = bytes_to_others(sbp(&case["src"]), sbp(&case["dst"]), p1, p2, 1000.0);
        assert_eq!(bytes, case["bytes"].as_f64().unwrap(), "{case}");
    }
}

#[test]
fn selection_finds_the_reference_bytes() {
    for case in golden("sbp.json")["selection"].as_array().unwrap() {
        let linear = Linear { batch: size(&case["batch"]), features: size(&case["features"]), classes: size(&case["classes"]) };
        let found = linear.select(size(&case["devices"])).unwrap();
        let close = |found: f64, expected: &Value| {
            let expected = expected.as_f64().unwrap();
            assert!((found - expected).abs() <= 1e-9 * expected, "{linear:?}: {found} and {expected}");
        };
        close(found.best.bytes, &case["best"]["bytes"]);
        for expected in case["by_weight_sbp"].as_array().unwrap() {
            let ours = found.by_weight_sbp.iter().find(|ours| ours.weight == sbp(&expected["weight"])).unwrap();
            close(ours.bytes, &expected["bytes"]);
            close(linear.enumerate(ours.weight, size(&case["devices"])).unwrap(), &expected["bytes"]);
        }
    }
}

#[test]
fn actors_begin_when_the_reference_says() {
    let floats = |value: &Value| value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
    for case in golden("sbp.json")["actors"].as_array().unwrap() {
        let network = chain(&floats(&case["durations"]), &sizes(&case["registers"])).unwrap();
        let found = simulate(&network, size(&case["pieces"])).unwrap();
        assert_eq!(found.makespan, case["makespan"].as_f64().unwrap());
        assert_eq!(found.starts, case["starts"].as_array().unwrap().iter().map(floats).collect::<Vec<_>>());
        assert_eq!(found.peak_registers, sizes(&case["peak_registers"]));
    }
}
