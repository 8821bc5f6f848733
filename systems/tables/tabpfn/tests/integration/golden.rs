//! The reference implementation's preprocessing and whole prediction.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_core::Context;
use kiln_data::{Column, Matrix, Table, TableOptions, read_npz};
use kiln_tabpfn::preprocess::{OutlierRule, YeoJohnson, ZScore};
use kiln_tabpfn::{Calibrate, ClassifierOptions, TabPfnClassifier, checkpoint};

fn assert_near(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "{what}[{place}]: {found}, should be {expected}");
    }
}

#[test]
fn scaling_power_transform_and_outlier_rule_are_those_of_the_reference() {
    let file = read_npz("tests/data/preprocess.npz".as_ref()).unwrap();
    let column = |name: &str, column: usize| -> Vec<f64> {
        let tensor = file.get(name).unwrap();
        tensor.as_floats().unwrap().iter().skip(column).step_by(6).map(|&x| f64::from(x)).collect()
    };
    let train = file.get("train_rows").unwrap().as_ints().unwrap()[0] as usize;
    let lambdas = file.get("yeo_johnson_lambda").unwrap().as_floats().unwrap();
    for (at, &lambda) in lambdas.iter().enumerate() {
        let x = column("X", at);
        let scale = ZScore::fit(&x[..train]);
        let scaled: Vec<f64> = x.iter().map(|&x| scale.apply(x)).collect();
        // The file's doubles are read in single precision.
        assert_near("normalized", &scaled, &column("normalized", at), 3e-6);
        let rule = OutlierRule::fit(&scaled[..train]);
        let drawn_in: Vec<f64> = scaled.iter().map(|&x| rule.apply(x)).collect();
        assert_near("outliers", &drawn_in, &column("normalized_outliers", at), 3e-6);

        let power = YeoJohnson::fit(&scaled[..train]).unwrap();
        assert_near("lambda", &[power.lambda], &[f64::from(lambda)], 1e-4);
        let transformed: Vec<f64> = scaled.iter().map(|&x| power.apply(x)).collect();
        assert_near("power", &transformed, &column("power", at), 1e-3);
        let rule = OutlierRule::fit(&transformed[..train]);
        let drawn_in: Vec<f64> = transformed.iter().map(|&x| rule.apply(x)).collect();
        assert_near("power, outliers", &drawn_in, &column("power_outliers", at), 1e-3);
    }
}

#[test]
fn the_whole_ensemble_gives_the_probabilities_of_the_reference() {
    let cx = Context::for_tests(".");
    let read = |name: &str| {
        Table::read(format!("tests/data/pipeline/{name}.csv").as_ref(), TableOptions::default()).unwrap()
    };
    let network = checkpoint::open("tests/data/model".as_ref(), &cx).unwrap();
    let options =
        ClassifierOptions { members: None, calibrate: Calibrate::Off, ..ClassifierOptions::default() };
    let classifier = TabPfnClassifier::fit(&network, read("train"), "label", options, &cx).unwrap();
    assert_eq!(classifier.members(), 3 * 4 * 2);
    let rows = classifier.encoder().encode(&read("test")).unwrap().matrix;
    let found = classifier.predict_proba(&rows, &cx).unwrap();
    let expected = read("expected_proba");
    let columns: Vec<Vec<f64>> = expected.columns().iter().map(numbers).collect();
    assert_eq!(classifier.classes(), expected.columns().iter().map(|c| c.name.clone()).collect::<Vec<_>>());
    assert_near("probability", &found.values, &Matrix::from_columns(10, &columns).values, 1e-4);
}

fn numbers(column: &Column) -> Vec<f64> {
    (0..column.len()).map(|row| column.text(row).unwrap().parse().unwrap()).collect()
}
