//! Networks with their rounding written out compute what the integer kernels compute, in Kiln's graphs and as ONNX files.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_compiler::{Graph, OnnxOptions};
use kiln_core::ModelFolder;
use kiln_ptq::arch::Arch;
use kiln_ptq::quantise::logits;
use kiln_ptq::search::Bits;
use kiln_ptq::{Granularity, Metric, QuantConfig, Quantised, Quantiser, SearchPlan, store};
use tempfile::TempDir;

use crate::subject::{ALL, distance, subject, subject_as};

fn stored(quantiser: &Quantiser, bits: &Bits) -> (TempDir, Quantised) {
    let folder = TempDir::new().unwrap();
    let names = quantiser.parts.iter().map(|part| part.name.clone());
    let config = store::Config {
        input: None,
        classes: Vec::new(),
        white: 1.0,
        bits: names.zip(bits.iter().copied()).collect(),
        rounding: quantiser.config(),
        search: SearchPlan { metric: Metric::Accuracy, ..SearchPlan::default() },
        baseline: 1.0,
        target: Some(1.0),
        metric: 1.0,
    };
    store::save(&ModelFolder::new(folder.path()), quantiser, bits, &config).unwrap();
    let quantised = Quantised::open(folder.path()).unwrap();
    (folder, quantised)
}

#[test]
fn a_written_network_computes_what_the_kernels_compute() {
    for arch in ALL {
        let (quantiser, examples, _) = subject(arch);
        let units = quantiser.program.units.len();
        let mixed = (0..units).map(|unit| [16, 8, 4][unit % 3]).collect();
        // With more bits a step is smaller, and so is what one at the border of two changes.
        for (bits, most) in
            [(vec![16; units], 1e-4), (vec![8; units], 0.02), (vec![4; units], 0.3), (mixed, 0.3)]
        {
            let (_folder, quantised) = stored(&quantiser, &bits);
            let kernels = logits(&quantised.program, &quantised.ready, &examples).unwrap();
            let graph = quantised.to_graph(1).unwrap();
            let run = |graph: &Graph| -> Vec<Vec<f32>> {
                let one = |at| graph.run(&[examples.batch(&[at])]).unwrap()[0].iter::<f32>().collect();
                (0..examples.len()).map(one).collect()
            };
            let written = run(&graph);
            let apart = distance(&written, &kernels);
            assert!(apart < most, "{arch:?} {bits:?}: {apart}");
            // And as an ONNX file.
            let bytes = graph.to_onnx_bytes().unwrap();
            let count = |word: &[u8]| bytes.windows(word.len()).filter(|part| *part == word).count();
            assert_eq!(count(b"DequantizeLinear") > 0, bits != vec![16; units], "{arch:?} {bits:?}");
            assert_eq!(
                count(b"Floor") + count(b"Round"),
                0,
                "{arch:?} {bits:?}: a rounding is not recognised"
            );
            let read = Graph::from_onnx_bytes(&bytes, &OnnxOptions::default()).unwrap();
            assert!(distance(&run(&read), &written) < 1e-5, "{arch:?} {bits:?}");
        }
    }
}

#[test]
fn a_written_network_takes_several_examples_at_once() {
    let (quantiser, examples, _) = subject(Arch::Mobilenet);
    let (_folder, quantised) = stored(&quantiser, &vec![8; quantiser.program.units.len()]);
    let one = quantised.to_graph(1).unwrap();
    let many = quantised.to_graph(3).unwrap();
    let together: Vec<f32> = many.run(&[examples.batch(&[0, 1, 2])]).unwrap()[0].iter::<f32>().collect();
    let alone = |at| one.run(&[examples.batch(&[at])]).unwrap()[0].iter::<f32>().collect::<Vec<f32>>();
    let alone: Vec<f32> = (0..3).flat_map(alone).collect();
    assert!(distance(&[together], &[alone]) < 1e-5);
}

#[test]
fn networks_that_are_quantised_otherwise_are_kept_and_written_too() {
    let ways = [
        QuantConfig { granularity: Granularity::Tensor, ..QuantConfig::default() },
        QuantConfig { group: Some(32), bias_correct: true, ..QuantConfig::default() },
        QuantConfig { equalise: true, bias_correct: true, adaround: Some(20), ..QuantConfig::default() },
    ];
    for (how, arch) in ways.into_iter().flat_map(|how| ALL.map(|arch| (how, arch))) {
        let (quantiser, examples, _) = subject_as(arch, how);
        let bits: Bits = (0..quantiser.parts.len()).map(|part| [8, 4, 16][part % 3]).collect();
        let expected = logits(&quantiser.program, &quantiser.real(&bits), &examples).unwrap();
        let (_folder, quantised) = stored(&quantiser, &bits);
        assert_eq!(quantised.pairs, quantiser.pairs(&bits));
        let kept = logits(&quantised.program, &quantised.ready, &examples).unwrap();
        assert!(distance(&kept, &expected) < 1e-4, "{arch:?} {how:?}: {}", distance(&kept, &expected));

        let graph = quantised.to_graph(1).unwrap();
        let run = |graph: &Graph| -> Vec<Vec<f32>> {
            let one = |at| graph.run(&[examples.batch(&[at])]).unwrap()[0].iter::<f32>().collect();
            (0..examples.len()).map(one).collect()
        };
        let written = run(&graph);
        assert!(distance(&written, &kept) < 0.3, "{arch:?} {how:?}: {}", distance(&written, &kept));
        // In four bits the file says the same and is smaller.
        let (usual, four) = (graph.to_onnx_bytes().unwrap(), graph.to_onnx_bytes_in_four_bits().unwrap());
        assert!(four.len() < usual.len(), "{arch:?} {how:?}: {} and {}", four.len(), usual.len());
        for bytes in [usual, four] {
            let read = Graph::from_onnx_bytes(&bytes, &OnnxOptions::default()).unwrap();
            assert!(distance(&run(&read), &written) < 1e-5, "{arch:?} {how:?}");
        }
    }
}
