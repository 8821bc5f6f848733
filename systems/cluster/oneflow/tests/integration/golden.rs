//! Local tensors, bytes of conversions, selections and actors of an independent computation.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::TensorData;
use kiln_core::{TensorFile, Values};
use kiln_oneflow::actor::{chain, simulate};
use kiln_oneflow::boxing::{bytes_on_same, bytes_to_others};
use kiln_oneflow::linear::{Linear, Selected};
use kiln_oneflow::parts::cut;
use kiln_oneflow::sbp::{NdSbp, Placement, Region, Sbp};
use serde_json::Value;

const SBP: &str = include_str!("../data/sbp.json");
const SPLITS: &str = include_str!("../data/splits.json");

fn cases(kind: &str) -> Vec<Value> {
    let all: Value = serde_json::from_str(SBP).unwrap();
    all[kind].as_array().unwrap().clone()
}

fn count(value: &Value) -> usize {
    usize::try_from(value.as_u64().unwrap()).unwrap()
}

fn counts(value: &Value) -> Vec<usize> {
    value.as_array().unwrap().iter().map(count).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
}

fn sbp(value: &Value) -> Sbp {
    value.as_str().unwrap().parse().unwrap()
}

#[test]
fn conversions_move_as_many_bytes_as_the_table_says() {
    for case in cases("boxing_same") {
        let found = bytes_on_same(sbp(&case["src"]), sbp(&case["dst"]), count(&case["p"]), 1000.0);
        assert_eq!(found, case["bytes"].as_f64().unwrap(), "{case}");
    }
    for case in cases("boxing_disjoint") {
        let (p1, p2) = (count(&case["p1"]), count(&case["p2"]));
        let found = bytes_to_others(sbp(&case["src"]), sbp(&case["dst"]), p1, p2, 1000.0);
        assert_eq!(found, case["bytes"].as_f64().unwrap(), "{case}");
    }
}

#[test]
fn the_linear_classifier_moves_the_fewest_bytes_for_every_form_of_its_weight() {
    for case in cases("selection") {
        let linear = Linear {
            batch: count(&case["batch"]),
            features: count(&case["features"]),
            classes: count(&case["classes"]),
        };
        let devices = count(&case["devices"]);
        let found = linear.select(devices).unwrap();
        let check = |found: &Selected, expected: &Value| {
            let bytes = expected["bytes"].as_f64().unwrap();
            assert!(
                (found.bytes - bytes).abs() <= 1e-9 * bytes,
                "{linear:?} {devices}: {found:?}, must be {expected}"
            );
        };
        check(&found.best, &case["best"]);
        for expected in case["by_weight_sbp"].as_array().unwrap() {
            let weight = sbp(&expected["weight"]);
            check(found.by_weight_sbp.iter().find(|selected| selected.weight == weight).unwrap(), expected);
            assert_eq!(linear.enumerate(weight, devices).unwrap(), expected["bytes"].as_f64().unwrap());
        }
    }
}

#[test]
fn actors_begin_when_they_must() {
    for case in cases("actors") {
        let network = chain(&numbers(&case["durations"]), &counts(&case["registers"])).unwrap();
        let found = simulate(&network, count(&case["pieces"])).unwrap();
        assert_eq!(found.makespan, case["makespan"].as_f64().unwrap(), "{case}");
        assert_eq!(found.peak_registers, counts(&case["peak_registers"]), "{case}");
        let starts: Vec<Vec<f64>> = case["starts"].as_array().unwrap().iter().map(numbers).collect();
        assert_eq!(found.starts, starts, "{case}");
    }
}

#[test]
fn every_rank_has_its_part() {
    let tensors =
        TensorFile::from_bytes(include_bytes!("../data/splits.safetensors"), "splits.safetensors").unwrap();
    let read = |name: &str| {
        let tensor = tensors.get(name).unwrap();
        match &tensor.values {
            Values::Float(values) => TensorData::new(values.clone(), tensor.shape.clone()),
            Values::Int(values) => TensorData::new(values.clone(), tensor.shape.clone()),
        }
    };
    let all: Value = serde_json::from_str(SPLITS).unwrap();
    for case in all.as_array().unwrap() {
        let name = case["case"].as_str().unwrap();
        let placement = Placement::mesh(&counts(&case["mesh"])).unwrap();
        let form = NdSbp(case["sbp"].as_array().unwrap().iter().map(sbp).collect());
        let whole = read(&format!("{name}.global"));
        for rank in 0..placement.len() {
            let region = Region::local(whole.shape(), &placement.mesh, &form, &placement.coordinate(rank));
            assert_eq!(
                cut(&whole, &region).unwrap(),
                read(&format!("{name}.rank{rank}")),
                "{name} rank {rank}"
            );
        }
    }
}
