//! Against an independent NumPy implementation of the definitions; see `tests/data/README.md`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use kiln_connectome::affinity::{AffinityConfig, rate_of_change};
use kiln_connectome::blockmodel::{BlockModelConfig, Correction, description_length};
use kiln_connectome::graph::Graph;
use kiln_connectome::ntf::{Factors, NtfConfig};
use kiln_connectome::score::{correlation, nmi};
use kiln_connectome::tensor::AffinityTensor;
use kiln_connectome::traces::{AlignConfig, Animal, Events, align, read_recordings};
use kiln_core::Context;
use kiln_data::{Matrix, Table, TableOptions};
use safetensors::SafeTensors;

/// The arrays in full precision, which `TensorFile` would narrow.
struct Golden(Vec<u8>);

impl Golden {
    fn read() -> Self {
        Self(std::fs::read("tests/data/affinity_ntf.safetensors").unwrap())
    }

    fn matrix(&self, name: &str) -> Matrix {
        let (shape, values) = self.array(name);
        Matrix::new(shape[0], shape[1..].iter().product(), values)
    }

    fn array(&self, name: &str) -> (Vec<usize>, Vec<f64>) {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        let values = tensor.data().as_chunks::<8>().0.iter().map(|&bytes| f64::from_le_bytes(bytes));
        (tensor.shape().to_vec(), values.collect())
    }
}

fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= tolerance, "{what} is off by {worst:e}");
}

#[test]
fn rates_and_affinities_are_those_of_the_reference() {
    let golden = Golden::read();
    for (case, sigma, k) in [("a", 2.0, 3), ("b", 3.0, 4)] {
        let traces = golden.matrix(&format!("{case}_traces"));
        let columns: Vec<Vec<f64>> = (0..traces.columns).map(|i| traces.column(i)).collect();
        let g = golden.matrix(&format!("{case}_g"));
        for (i, trace) in columns.iter().enumerate() {
            assert_close(&rate_of_change(trace, sigma), &g.column(i), 1e-9, "g");
        }
        let config = AffinityConfig::new().with_sigma(sigma).with_knn(k);
        let found = config.of_animal(&columns).unwrap().concat();
        assert_close(&found, &golden.matrix(&format!("{case}_affinity")).values, 1e-9, "affinity");
    }
}

#[test]
fn hals_makes_the_factors_of_the_reference_with_and_without_missing_pairs() {
    let golden = Golden::read();
    let (shape, values) = golden.array("ntf_x");
    let mask = golden.array("ntf_mask").1.iter().map(|&m| m != 0.0).collect();
    let start = Factors {
        time: golden.matrix("ntf_init0"),
        animals: golden.matrix("ntf_init1"),
        pairs: golden.matrix("ntf_init2"),
        weights: vec![1.0; 4],
    };
    for (case, mask) in [("full", None), ("mask", Some(mask))] {
        let shape = [shape[0], shape[1], shape[2]];
        let tensor = AffinityTensor::checked("golden", shape, values.clone(), mask).unwrap();
        for (sweeps, tolerance) in [(1, 1e-9), (50, 1e-6)] {
            let config = NtfConfig { tolerance: 0.0, ..NtfConfig::new(4).with_sweeps(sweeps) };
            let fit = config.fit_from(&tensor, start.clone(), &Context::for_tests(""), &|_| ()).unwrap();
            let matrix = |mode: usize| golden.matrix(&format!("ntf_{case}_{sweeps}_f{mode}"));
            let expected =
                Factors { time: matrix(0), animals: matrix(1), pairs: matrix(2), weights: vec![1.0; 4] };
            let expected = expected.normalised();
            assert_close(&fit.factors.weights, &expected.weights, 10.0 * tolerance, "weights");
            for (found, expected) in fit.factors.modes().into_iter().zip(expected.modes()) {
                assert_close(&found.values, &expected.values, tolerance, "a factor");
            }
            let error = golden.array(&format!("ntf_{case}_{sweeps}_err")).1[0];
            assert!((fit.relative_error - error).abs() < tolerance, "{} {error}", fit.relative_error);
            assert!((fit.factors.relative_error(&tensor).unwrap() - error).abs() < tolerance);
        }
    }
}

/// A golden graph and its planted groups, both by the numbers of the nodes.
fn graph(name: &str) -> (Graph, Vec<usize>) {
    let read = |file: String| {
        Table::read(Path::new("tests/data").join(file).as_ref(), TableOptions::default()).unwrap()
    };
    let number = |table: &Table, column: &str, row: usize| -> usize {
        table.column(column).unwrap().text(row).unwrap().parse().unwrap()
    };
    let labels = read(format!("{name}_labels.csv"));
    let mut planted = vec![0; labels.rows()];
    (0..labels.rows()).for_each(|row| planted[number(&labels, "node", row)] = number(&labels, "label", row));
    let edges = read(format!("{name}_edges.csv"));
    let weight = |row: usize| edges.column("weight").unwrap().text(row).unwrap().parse().unwrap();
    let edge = |row: usize| (number(&edges, "source", row), number(&edges, "target", row), weight(row));
    let nodes = (0..planted.len()).map(|i| i.to_string()).collect();
    (Graph::new(nodes, (0..edges.rows()).map(edge)).unwrap(), planted)
}

fn reference() -> serde_json::Value {
    serde_json::from_slice(&std::fs::read("tests/data/sbm_dl.json").unwrap()).unwrap()
}

#[test]
fn real_worms_are_read_from_npz_and_csv() {
    let Some(shared) = kiln_data::shared_dir() else {
        println!("skipped: no shared data");
        return;
    };
    let folder = shared.join("data/celegans-calcium");
    let files = [folder.join("flavell_neuropal.npz"), folder.join("worm_2022-08-02-38.csv")];
    let recordings = read_recordings(&files).unwrap();
    assert_eq!(recordings.iter().map(|r| r.neurons.len()).collect::<Vec<_>>()[..3], [91, 78, 89]);
    let traces = align(&recordings, &Events::default(), AlignConfig::default()).unwrap();
    assert!(traces.animals.len() == 6 && traces.frames >= 750 && traces.share_a_pair(), "{}", traces.frames);
    let ava = |animal: &Animal, name: &str| {
        let place = traces.neurons.iter().position(|neuron| neuron == name).unwrap();
        Some(animal.traces[animal.neurons.binary_search(&place).ok()?].clone())
    };
    // The two sides of a command neuron go together: rows and columns are as they should be.
    let both = traces
        .animals
        .iter()
        .filter_map(|animal| Some(correlation(&ava(animal, "AVAL")?, &ava(animal, "AVAR")?)));
    let both: Vec<f64> = both.collect();
    assert!(both.len() >= 3 && both.iter().all(|r| *r > 0.5), "{both:?}");
}

#[test]
fn description_lengths_are_those_of_the_reference() {
    let reference = reference();
    for name in ["g1", "g2"] {
        let (graph, planted) = graph(name);
        let single = vec![0; graph.len()];
        let parity: Vec<usize> = (0..graph.len()).map(|i| i % 2).collect();
        for (partition, groups) in [("planted", &planted), ("single", &single), ("parity", &parity)] {
            for (model, corrected) in [("dc", true), ("ndc", false)] {
                let expected = reference[name][format!("dl_{partition}_{model}")].as_f64().unwrap();
                let found = description_length(&graph, groups, corrected).unwrap();
                assert!(
                    (found - expected).abs() < 1e-8 * expected,
                    "{name} {partition} {model}: {found} {expected}"
                );
            }
        }
    }
}

#[test]
fn the_search_finds_descriptions_no_longer_than_the_reference_search() {
    let reference = reference();
    let cx = Context::for_tests("");
    for name in ["g1", "g2"] {
        let (graph, planted) = graph(name);
        for (model, correction) in [("dc", Correction::Dc), ("ndc", Correction::Ndc)] {
            let config = BlockModelConfig { correction, nested: false, ..BlockModelConfig::default() };
            let found = config.infer(&graph, &cx).unwrap().best;
            let expected = reference[name]["best_found"][model]["dl"].as_f64().unwrap();
            println!(
                "{name} {model}: {} against {expected}, B {}, NMI {}",
                found.description_length,
                found.count,
                nmi(&found.groups, &planted)
            );
            assert!(
                found.description_length <= expected + 1e-6,
                "{name} {model}: {}",
                found.description_length
            );
            if name == "g1" {
                assert_eq!(found.count, 1, "g1 has no structure");
            }
        }
    }
    let (graph, planted) = graph("g2");
    let nested = BlockModelConfig::default().infer(&graph, &cx).unwrap();
    println!("nested {:?} {}", nested.best, nmi(&nested.best.groups, &planted));
    assert!(nmi(&nested.best.groups, &planted) >= 0.9);
}
