//! Values of an independent implementation: packets, stamps, policies, metrics, the network and its gradients.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::{Module, Param};
use burn::tensor::{Device, Gradients, Tensor};
use kiln_btsbot::features::{Derived, DrbMissing, FEATURES, features};
use kiln_btsbot::metrics::AlertMetrics;
use kiln_btsbot::model::MmCnn;
use kiln_btsbot::names::from_elsewhere;
use kiln_btsbot::policy::{apply, judged};
use kiln_btsbot::scores::{read_scores, sources};
use kiln_btsbot::train::weighted_loss;
use kiln_btsbot::triplet::normalise;
use kiln_btsbot::{Alert, AlertReader, Btsbot, MmCnnConfig, Mode, Policy, Triplet};
use kiln_core::TensorFile;
use kiln_core::testing::Desk;
use kiln_data::{read_npz, shared_dir};
use serde_json::Value;

fn data(name: &str) -> PathBuf {
    Path::new("tests/data").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn read(path: &Path) -> Alert {
    AlertReader::new()
        .read(&fs::read(path).unwrap())
        .remove(0)
        .unwrap_or_else(|e| panic!("{}: {e:?}", path.display()))
}

/// How exactly numbers are read from JSON.
const DIGITS: f64 = 1e-15;

fn close(found: f64, expected: f64, tolerance: f64, what: &str) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs().max(1.0),
        "{what}: {found}, not {expected}"
    );
}

/// Compares a packet with its row of the expected values; returns whether its stamps are usable.
fn assert_as_expected(path: &Path, row: &Value) -> bool {
    let alert = read(path);
    let name = path.display().to_string();
    assert_eq!(
        (&row["objectId"], row["candid"].as_i64(), &row["schemavsn"]),
        (&Value::from(alert.object_id.clone()), Some(alert.candid), &Value::from(alert.version.clone())),
        "{name}"
    );
    for field in ["jd", "fid", "magpsf", "ra", "dec", "rb", "drb", "ndethist", "ncovhist"] {
        match row[field].as_f64() {
            Some(expected) => {
                close(alert.number(field).unwrap(), expected, DIGITS, &format!("{name} {field}"))
            }
            None => assert!(alert.number(field).is_none(), "{name} {field}"),
        }
    }
    assert_eq!(row["n_prv"], alert.prior_entries, "{name}");
    assert_eq!(row["n_prv_detections"], alert.prior.len(), "{name}");
    let derived = Derived::of(&alert, &alert.prior);
    for (field, found) in [
        ("age", derived.age),
        ("peakmag_so_far", derived.peakmag_so_far),
        ("maxmag_so_far", derived.maxmag_so_far),
        ("days_since_peak", derived.days_since_peak),
        ("days_to_peak", derived.days_to_peak),
    ] {
        close(found, row[field].as_f64().unwrap(), DIGITS, &format!("{name} {field}"));
    }
    match features(&alert, &derived, DrbMissing::Reject) {
        Ok(features) => {
            let at = FEATURES.iter().position(|feature| *feature == "nnotdet").unwrap();
            close(features[at].into(), row["nnotdet"].as_f64().unwrap(), 0.0, &name);
        }
        Err(reason) => assert!(row["drb"].is_null() && reason == "has no drb", "{name} {reason}"),
    }
    let stamps = alert.images().unwrap();
    let mut is_usable = true;
    for (at, stamp) in stamps.iter().enumerate() {
        let shape = [stamp.height, stamp.width];
        assert_eq!(row["stamp_shapes"][at], Value::from(shape.to_vec()), "{name}");
        let normalised = normalise(&stamp.pixels);
        is_usable &= normalised.corrupted.is_none();
        let padding = 1e-9 * (63 * 63 - stamp.pixels.len()) as f64;
        let sum: f64 = normalised.pixels.iter().map(|&p| f64::from(p)).sum::<f64>() + padding;
        close(sum, row["triplet_sum"][at].as_f64().unwrap(), 1e-6, &format!("{name} sum {at}"));
        let centre =
            if shape.iter().all(|&n| n > 31) { normalised.pixels[31 * stamp.width + 31] } else { 1e-9 };
        close(
            centre.into(),
            row["triplet_center"][at].as_f64().unwrap(),
            1e-6,
            &format!("{name} centre {at}"),
        );
    }
    assert_eq!(row["drop"], !is_usable, "{name}");
    assert_eq!(Triplet::from_stamps(stamps.each_ref()).is_ok(), is_usable, "{name}");
    is_usable
}

/// Compares the stamps of a packet with `[63, 63, 3]`.
fn assert_stamps(path: &Path, expected: &[f32]) {
    let triplet = Triplet::from_stamps(read(path).images().unwrap().each_ref()).unwrap();
    assert_eq!(expected.len(), 3 * 63 * 63);
    for (pixel, expected) in expected.chunks(3).enumerate() {
        for (channel, &expected) in expected.iter().enumerate() {
            let found = triplet.pixels[channel * 63 * 63 + pixel];
            assert!((found - expected).abs() < 1e-6, "{} pixel {pixel}: {found}, {expected}", path.display());
        }
    }
}

#[test]
fn short_and_corrupted_packets_are_read_as_expected() {
    let rows = json(&data("packets_edge_expected.json"));
    let paths: Vec<PathBuf> = rows
        .as_array()
        .unwrap()
        .iter()
        .map(|row| data("packets_edge").join(row["file"].as_str().unwrap()))
        .collect();
    let usable =
        paths.iter().zip(rows.as_array().unwrap()).filter(|(path, row)| assert_as_expected(path, row));
    let expected = read_npz(&data("packets_edge_triplets.npz")).unwrap();
    let mut compared = 0;
    for (path, _) in usable {
        let name = path.file_stem().unwrap().to_string_lossy();
        assert_stamps(path, expected.get(&name).unwrap().as_floats().unwrap());
        compared += 1;
    }
    assert_eq!((paths.len(), compared), (4, 2));
}

#[test]
fn real_packets_of_all_schemas_are_read_as_expected() {
    let Some(shared) = shared_dir() else {
        println!("skipped: no shared data");
        return;
    };
    let rows = json(&data("packets_expected.json"));
    let folder = shared.join("data/ztf-alerts/packets");
    let mut versions = std::collections::BTreeSet::new();
    let mut paths = Vec::new();
    for row in rows.as_array().unwrap() {
        let path = folder.join(row["file"].as_str().unwrap());
        assert_as_expected(&path, row);
        versions.insert(row["schemavsn"].as_str().unwrap());
        paths.push(path);
    }
    paths.sort();
    assert_eq!((paths.len(), versions.len()), (24, 3));
    let expected = read_npz(&shared.join("golden/btsbot/packets_triplets.npz")).unwrap();
    let expected = expected.get("triplets").unwrap();
    assert_eq!(expected.shape, [6, 63, 63, 3]);
    for (path, expected) in paths.iter().zip(expected.as_floats().unwrap().chunks(3 * 63 * 63)) {
        assert_stamps(path, expected);
    }
}

#[test]
fn policies_find_the_expected_sources_at_the_expected_alerts() {
    let alerts = read_scores(&data("scored_alerts.csv")).unwrap();
    let sources = sources(&alerts).unwrap();
    let judged = judged(&sources, &[]);
    let expected = json(&data("policies_expected.json"));
    assert_eq!(expected.as_object().unwrap().len(), 4);
    for (name, expected) in expected.as_object().unwrap() {
        let found = serde_json::to_value(apply(&Policy::parse(name).unwrap(), &judged)).unwrap();
        for count in ["tp", "fp", "fn", "tn"] {
            assert_eq!(found[count], expected[count], "{name} {count}");
        }
        for figure in ["completeness", "purity"] {
            close(found[figure].as_f64().unwrap(), expected[figure].as_f64().unwrap(), DIGITS, name);
        }
        let triggers = |value: &Value| value["first_trigger"].as_object().unwrap().clone();
        let (found, expected) = (triggers(&found), triggers(expected));
        assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{name}");
        for (id, row) in &expected {
            for at in 0..2 {
                close(found[id][at].as_f64().unwrap(), row[at].as_f64().unwrap(), DIGITS, id);
            }
        }
    }
}

#[test]
fn metrics_of_alerts_are_the_expected_ones() {
    let alerts = read_scores(&data("scored_alerts.csv")).unwrap();
    let found = serde_json::to_value(AlertMetrics::of(&alerts)).unwrap();
    for (name, expected) in json(&data("alert_metrics_expected.json")).as_object().unwrap() {
        close(found[name].as_f64().unwrap(), expected.as_f64().unwrap(), 1e-9, name);
    }
}

/// The reference network and its inputs.
fn reference() -> Option<(MmCnn, TensorFile)> {
    let Some(shared) = shared_dir() else {
        println!("skipped: no shared data");
        return None;
    };
    let folder = shared.join("golden/btsbot");
    let mut weights = TensorFile::read(&folder.join("mm_cnn_weights.safetensors")).unwrap();
    from_elsewhere(&mut weights, Mode::MmCnn);
    let network = weights.into_module(MmCnnConfig::new().init(&Device::flex())).unwrap();
    Some((network, TensorFile::read(&folder.join("mm_cnn_io.safetensors")).unwrap()))
}

#[test]
fn logits_are_those_of_the_reference() {
    let Some((network, mut io)) = reference() else { return };
    let device = Device::flex();
    let images = io.take_float::<4>("input_triplet", &device).unwrap();
    let meta = io.take_float::<2>("input_meta", &device).unwrap();
    let values = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<_>>();
    let expect = |io: &TensorFile, name: &str| io.get(name).unwrap().as_floats().unwrap().to_vec();
    let image_features = network.image_features(images.clone()).unwrap();
    let norms: Vec<f32> =
        values(image_features).chunks(3136).map(|x| x.iter().map(|x| x * x).sum::<f32>().sqrt()).collect();
    for (found, expected) in norms.iter().zip(expect(&io, "image_features_norm")) {
        close((*found).into(), expected.into(), 1e-5, "image features");
    }
    for (found, expected) in
        values(network.meta_features(meta.clone()).unwrap()).iter().zip(expect(&io, "meta_features"))
    {
        close((*found).into(), expected.into(), 1e-5, "metadata features");
    }
    let logits = values(network.forward(images, meta));
    for (found, expected) in logits.iter().zip(expect(&io, "logit")) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }
}

#[test]
fn forward_gives_the_logits_of_the_reference() {
    let Some(shared) = shared_dir() else {
        println!("skipped: no shared data");
        return;
    };
    let (desk, folder) = (Desk::new(&Btsbot), shared.join("golden/btsbot"));
    let [weights, io] = ["mm_cnn_weights.safetensors", "mm_cnn_io.safetensors"].map(|name| folder.join(name));
    desk.json(&format!(
        "forward --weights {} --input {} --out @l.safetensors",
        weights.display(),
        io.display()
    ));
    let (found, expected) =
        (TensorFile::read(&desk.path("l.safetensors")).unwrap(), TensorFile::read(&io).unwrap());
    for name in ["logit", "score"] {
        let values = |file: &TensorFile| file.get(name).unwrap().as_floats().unwrap().to_vec();
        for (found, expected) in values(&found).iter().zip(values(&expected)) {
            assert!((found - expected).abs() < 1e-5, "{name}: {found}, not {expected}");
        }
    }
}

/// The gradient of a parameter, flattened.
fn gradient<const D: usize>(param: &Param<Tensor<D>>, gradients: &Gradients) -> Vec<f32> {
    param.val().grad(gradients).unwrap().into_data().iter().collect()
}

#[test]
fn gradients_are_those_of_the_reference() {
    let Some((network, mut io)) = reference() else { return };
    let device = Device::flex();
    let images = io.take_float::<4>("input_triplet", &device).unwrap();
    let meta = io.take_float::<2>("input_meta", &device).unwrap();
    let labels: Vec<bool> =
        io.get("label").unwrap().as_floats().unwrap().iter().map(|&label| label == 1.0).collect();
    // On a device without autodiff the inputs are constants: neither dropout nor statistics of the batch.
    let network = network.train();
    let mut frozen = network.clone();
    frozen.conv_drops.iter_mut().for_each(|drop| drop.prob = 0.0);
    (frozen.meta_drop.prob, frozen.head_drop.prob) = (0.0, 0.0);
    let loss = weighted_loss(frozen.forward(images, meta), &labels, 16.0 / 23.0);
    let expected = io.get("loss").unwrap().as_floats().unwrap()[0];
    close(loss.clone().into_scalar::<f32>().into(), expected.into(), 1e-5, "loss");
    let gradients = loss.backward();
    for (name, found) in [
        ("grad_conv1_weight", gradient(&frozen.conv1.as_ref().unwrap().weight, &gradients)),
        (
            "grad_meta_fc1_bias",
            gradient(frozen.meta_fc1.as_ref().unwrap().bias.as_ref().unwrap(), &gradients),
        ),
        ("grad_comb_fc_bias", gradient(frozen.comb_fc[0].bias.as_ref().unwrap(), &gradients)),
    ] {
        let expected = io.get(name).unwrap().as_floats().unwrap();
        let scale = expected.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-4 * scale, "{name}: {found}, not {expected}");
        }
    }
}
