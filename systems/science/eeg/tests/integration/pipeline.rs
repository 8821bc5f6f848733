//! Preparation and metrics against reference values.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use kiln_core::random_stream;
use kiln_data::edf::EdfReader;
use kiln_data::{read_npz, shared_dir};
use kiln_eeg::metrics::{Metrics, WindowOutcome, by_recording};
use kiln_eeg::pipeline::{Normalise, Pipeline};
use kiln_eeg::resample::Resampler;

fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst <= tolerance, "{what}: {worst}");
}

/// The reference arrays were computed of the signals *before* they were written: in the file, samples below zero are one step
/// of the converter, 0.1 µV, nearer to zero. So the file is compared within a step, and the steps of the pipeline exactly,
/// with the step given back.
#[test]
fn a_recording_is_prepared_as_scipy_and_numpy_do() {
    let Some(shared) = shared_dir() else {
        eprintln!("skipped: no shared data");
        return;
    };
    let expected = read_npz_floats(&shared.join("golden/eeg/edf/tuab_like_expected.npz"));
    let floats = |name: &str| expected.get(name).unwrap().as_floats().unwrap().to_vec();
    let path = Path::new("tests/data/tuab_like.edf");
    let cut = Pipeline { tmin: 2.0, tmax: 11.0, normalise: Normalise::None, ..Pipeline::default() };
    let raw = Pipeline { tmin: 0.0, tmax: 1.0, rate: 250.0, clip: 1e9, ..cut.clone() };
    let found = raw.read(path).unwrap().eeg;
    assert_close(&found, &floats("raw_first_second"), 0.1001, "raw");
    let above: Vec<(f32, f32)> =
        found.iter().copied().zip(floats("raw_first_second")).filter(|(x, _)| *x > 0.0).collect();
    assert!(
        above.len() > 2000 && above.iter().all(|(a, b)| (a - b).abs() < 1e-4),
        "samples above zero are exact"
    );
    let found = cut.read(path).unwrap();
    assert_eq!(found.channels, kiln_eeg::channels::TUAB);
    assert_close(&found.eeg, &floats("resampled"), 0.15, "resampled");

    // The step given back. What the file has as 0 may have been 0 or -0.1: outputs that see such a sample are left out.
    let mut reader = EdfReader::open(path).unwrap();
    let labels: Vec<String> = reader.header().signals.iter().map(|s| s.label.clone()).collect();
    let resampler = Resampler::new(250.0, 100.0).unwrap();
    let (mut compared, expected_resampled) = (0, floats("resampled"));
    for (place, name) in kiln_eeg::channels::TUAB.iter().enumerate() {
        let signal = labels.iter().position(|label| *label == format!("EEG {name}-REF")).unwrap();
        let digital = &reader.read_digital(&[signal], 0..12).unwrap()[0][500..2750];
        let before: Vec<f64> =
            digital.iter().map(|&d| f64::from(if d < 0 { d - 1 } else { d }) / 10.0).collect();
        let found = resampler.apply(&before);
        assert_eq!(found.len(), 900);
        for (at, x) in found.iter().enumerate() {
            let seen = (at * 5 / 2).saturating_sub(26)..(at * 5 / 2 + 27).min(digital.len());
            if !digital[seen].contains(&0) {
                let expected = f64::from(expected_resampled[place * 900 + at]);
                assert!((x - expected).abs() < 1e-4, "{name} {at}: {x}, should be {expected}");
                compared += 1;
            }
        }
    }
    assert!(compared > 10_000, "{compared} of 18900");

    let signals =
        floats("resampled").chunks(900).map(|c| c.iter().map(|&x| f64::from(x)).collect()).collect();
    let names = kiln_eeg::channels::TUAB.map(String::from).into();
    let same = Resampler::of_all(&[100.0; 21], 100.0).unwrap();
    let found = Pipeline::default().apply(names, signals, &same, Vec::new()).unwrap();
    assert_close(&found.eeg, &floats("normalised"), 1e-4, "normalised");
}

/// Arrays of numbers; names of channels are passed over.
fn read_npz_floats(path: &Path) -> kiln_core::TensorFile {
    let arrays = kiln_data::read_npz_as(path, |bytes| Ok(bytes.to_vec())).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let numbers = folder.path().join("numbers.npz");
    let is_number = |bytes: &[u8]| bytes[..64.min(bytes.len())].windows(3).any(|w| w == b"'<f");
    let kept =
        arrays.iter().filter(|(_, bytes)| is_number(bytes)).map(|(name, bytes)| (name.as_str(), bytes));
    kiln_data::write_npz_as(&numbers, kept, |bytes| Ok(bytes.clone())).unwrap();
    read_npz(&numbers).unwrap()
}

#[test]
fn figures_of_recordings_are_those_of_the_reference() {
    let text = std::fs::read_to_string("tests/data/window_probs.csv").unwrap();
    let windows: Vec<WindowOutcome> = text
        .lines()
        .skip(1)
        .map(|line| {
            let cells: Vec<&str> = line.split(',').collect();
            WindowOutcome {
                recording: cells[0].into(),
                window: cells[1].parse().unwrap(),
                label: Some(cells[2] == "1"),
                p_pathological: cells[3].parse().unwrap(),
            }
        })
        .collect();
    let found = serde_json::to_value(Metrics::of(&by_recording(&windows))).unwrap();
    let expected = std::fs::read_to_string("tests/data/recording_metrics_expected.json").unwrap();
    let expected: serde_json::Value = serde_json::from_str(&expected).unwrap();
    for (name, value) in expected.as_object().unwrap() {
        let (found, value) = (found[name].as_f64().unwrap(), value.as_f64().unwrap());
        assert!((found - value).abs() <= 1e-9, "{name}: {found}, should be {value}");
    }
}

#[test]
fn networks_learn_a_tone_and_what_is_frozen_stays() {
    use burn::tensor::Device;
    use kiln_core::{Context, TensorFile};
    use kiln_eeg::dataset::{About, Dataset, Recording};
    use kiln_eeg::model::{Arch, ModelConfig};
    use kiln_eeg::train::predict;
    use kiln_eeg::transfer::{Protocol, Target, new_model};
    use kiln_eeg::windows::WindowSet;
    use rand::RngExt;

    let cx = Context::for_tests("unused");
    assert_eq!(cx.device, Device::flex());
    let recordings = (0..24).map(|number| {
        let mut rng = random_stream(0, "tone", number);
        let pathological = number % 2 == 1;
        let wave = |i: usize| (i as f32 * if pathological { 0.3 } else { 0.9 }).sin();
        let eeg = (0..2 * 300).map(|i| wave(i % 300) + rng.random_range(-0.3..0.3)).collect();
        let id = format!("r{number}");
        let about = About { id, label: Some(pathological), subject: None, age: None, sex: None, split: None };
        std::sync::Arc::new(Recording::new(about, eeg, 2))
    });
    let data = Dataset {
        channels: vec!["A".into(), "B".into()],
        pipeline: Pipeline::default(),
        recordings: recordings.collect(),
    };
    let (train, test): (Vec<usize>, Vec<usize>) = (0..24).partition(|at| at / 2 % 2 == 0);
    let network = ModelConfig::new(Arch::Shallow, 2, 2, 150);
    let windows = WindowSet::for_training(&data, &train, 150, 150);
    let judged = WindowSet::for_evaluation(&data, &test, 150, 150);
    let target =
        Target { train: &windows, valid: None, source: Some(&windows), batch: 8, epochs: 6, lr: 2e-3 };
    let untrained = new_model(&network, &cx);
    let weights = |model: &_, name: &str| TensorFile::from_module(model).get(name).unwrap().clone();
    let (first, mean, last) =
        ("conv_time_spat.conv_time.weight", "bnorm.running_mean", "final_layer.conv_classifier.weight");
    let source = target.adapt(Protocol::Scratch, &untrained, &network, &cx).unwrap();
    let outcomes = by_recording(&predict(&source, &judged, 8, 1.0, &cx).unwrap());
    assert_eq!(Metrics::of(&outcomes).accuracy, Some(1.0));

    // The tones at 14 and 5 Hz decide, and bands in which there is nothing do not.
    let evidence = kiln_eeg::relevance::relevance(&source, &judged, 100.0, &cx).unwrap();
    let of = |band: usize| evidence.iter().map(|channel| channel[band].abs()).sum::<f64>();
    assert!(of(1).max(of(3)) > 3.0 * of(4), "{evidence:?}");

    for (protocol, first_moves, last_moves) in [
        (Protocol::ZeroShot, false, false),
        (Protocol::LinearProbe, false, true),
        (Protocol::Freeze(1), false, true),
        (Protocol::FineTune, true, true),
        (Protocol::Discriminative, true, true),
    ] {
        let before = [first, mean, last].map(|name| weights(&source, name));
        let adapted = target.adapt(protocol, &source, &network, &cx).unwrap();
        assert_eq!(weights(&adapted, first) != before[0], first_moves, "{protocol}");
        assert_eq!(weights(&adapted, mean) != before[1], first_moves, "{protocol}");
        assert_eq!(weights(&adapted, last) != before[2], last_moves, "{protocol}");
        // The source is as it was, its running statistics included.
        assert_eq!([first, mean, last].map(|name| weights(&source, name)), before, "{protocol}");
        // A run repeats.
        let again = target.adapt(protocol, &source, &network, &cx).unwrap();
        assert_eq!(weights(&again, last), weights(&adapted, last), "{protocol}");
    }
    // Blocks nearer to the input move less.
    let moved = |protocol| {
        let adapted = target.adapt(protocol, &source, &network, &cx).unwrap();
        let (a, b) = (weights(&adapted, first), weights(&source, first));
        a.as_floats().unwrap().iter().zip(b.as_floats().unwrap()).map(|(a, b)| (a - b).abs()).sum::<f32>()
    };
    assert!(moved(Protocol::Discriminative) < 0.8 * moved(Protocol::FineTune));
    let error = target.adapt(Protocol::Freeze(2), &source, &network, &cx).unwrap_err().to_string();
    assert!(error.contains("leaves nothing to learn"), "{error}");
}
