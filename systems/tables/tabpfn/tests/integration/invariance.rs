//! What must not change a classifier's probabilities.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_core::Context;
use kiln_data::Matrix;
use kiln_tabpfn::{Calibrate, ClassifierOptions, TabPfn, TabPfnClassifier, checkpoint};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};

fn cx() -> Context {
    Context::for_tests(".")
}

/// The reference's network with random weights: 12 columns, 10 classes.
fn network() -> TabPfn {
    checkpoint::open("tests/data/model".as_ref(), &cx()).unwrap()
}

/// Rows of `columns` numbers, and classes that hang on them.
fn table(rows: usize, columns: usize, classes: usize, rng: &mut impl Rng) -> (Matrix, Vec<usize>) {
    let x = Matrix::new(rows, columns, (0..rows * columns).map(|_| rng.random_range(-2.0..2.0)).collect());
    let label = |row: usize| match row < classes {
        true => row,
        false => ((x.at(row, 0) + 2.0) / 4.0 * classes as f64) as usize % classes,
    };
    let labels = (0..rows).map(label).collect();
    (x, labels)
}

fn names(classes: usize) -> Vec<String> {
    (0..classes).map(|class| format!("class {class}")).collect()
}

fn fit(rows: &Matrix, labels: &[usize], classes: usize, options: ClassifierOptions) -> TabPfnClassifier {
    TabPfnClassifier::fit_matrix(&network(), rows.clone(), labels.to_vec(), names(classes), options, &cx())
        .unwrap()
}

const FEW: ClassifierOptions = ClassifierOptions {
    members: Some(4),
    power: true,
    temperature: 0.8,
    sample_rows: None,
    allow_large: false,
    many_class: false,
    groups: None,
    calibrate: Calibrate::Off,
    cache: true,
};

fn assert_near(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (place, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= tolerance, "at {place}: {found}, should be {expected}");
    }
}

#[test]
fn the_order_of_labelled_rows_means_nothing() {
    let mut rng = cx().rng("rows", 0);
    let ((train, labels), (test, _)) = (table(30, 4, 3, &mut rng), table(8, 4, 3, &mut rng));
    let expected = fit(&train, &labels, 3, FEW).predict_proba(&test, &cx()).unwrap();
    let mut order: Vec<usize> = (0..30).collect();
    order.shuffle(&mut rng);
    let labels: Vec<usize> = order.iter().map(|&row| labels[row]).collect();
    let found = fit(&train.select_rows(&order), &labels, 3, FEW).predict_proba(&test, &cx()).unwrap();
    assert_near(&found.values, &expected.values, 1e-5);
}

#[test]
fn a_row_is_predicted_alike_alone_and_among_others_and_whether_labelled_rows_are_kept_or_not() {
    let mut rng = cx().rng("rows", 1);
    let ((train, labels), (test, _)) = (table(30, 4, 3, &mut rng), table(40, 4, 3, &mut rng));
    let classifier = fit(&train, &labels, 3, FEW);
    let together = classifier.predict_proba(&test, &cx()).unwrap();
    for row in [0, 17, 39] {
        let alone = classifier.predict_proba(&test.select_rows(&[row]), &cx()).unwrap();
        assert_near(&alone.values, together.row(row), 1e-5);
    }
    let anew = fit(&train, &labels, 3, ClassifierOptions { cache: false, ..FEW });
    assert_near(&anew.predict_proba(&test, &cx()).unwrap().values, &together.values, 1e-6);
}

#[test]
fn with_all_members_rotated_columns_and_renumbered_classes_change_nothing() {
    let all = ClassifierOptions { members: None, ..FEW };
    let mut rng = cx().rng("rows", 2);
    let ((train, labels), (test, _)) = (table(24, 4, 3, &mut rng), table(6, 4, 3, &mut rng));
    let classifier = fit(&train, &labels, 3, all);
    assert_eq!(classifier.members(), 24);
    let expected = classifier.predict_proba(&test, &cx()).unwrap();
    let turned = [2, 3, 0, 1];
    let found = fit(&train.select_columns(&turned), &labels, 3, all)
        .predict_proba(&test.select_columns(&turned), &cx())
        .unwrap();
    assert_near(&found.values, &expected.values, 1e-5);

    let renumbered: Vec<usize> = labels.iter().map(|label| (label + 1) % 3).collect();
    let found = fit(&train, &renumbered, 3, all).predict_proba(&test, &cx()).unwrap();
    for row in 0..test.rows {
        let back: Vec<f64> = (0..3).map(|class| found.at(row, (class + 1) % 3)).collect();
        assert_near(&back, expected.row(row), 1e-5);
    }
}

#[test]
fn columns_in_other_units_change_nothing() {
    let mut rng = cx().rng("rows", 3);
    let ((train, labels), (test, _)) = (table(30, 3, 2, &mut rng), table(8, 3, 2, &mut rng));
    let expected = fit(&train, &labels, 2, FEW).predict_proba(&test, &cx()).unwrap();
    let rescaled = |m: &Matrix| Matrix::new(m.rows, 3, m.values.iter().map(|x| 1000.0 * x - 7.0).collect());
    let found = fit(&rescaled(&train), &labels, 2, FEW).predict_proba(&rescaled(&test), &cx()).unwrap();
    assert_near(&found.values, &expected.values, 1e-4);
}

#[test]
fn a_missing_value_is_as_good_as_the_mean_and_a_constant_column_as_none() {
    let plain = ClassifierOptions { power: false, ..FEW };
    let mut rng = cx().rng("rows", 4);
    let (train, labels) = table(30, 3, 2, &mut rng);
    let classifier = fit(&train, &labels, 2, plain);
    let mean = train.column(1).iter().sum::<f64>() / 30.0;
    let rows = Matrix::new(2, 3, vec![0.5, f64::NAN, 1.0, 0.5, mean, 1.0]);
    let found = classifier.predict_proba(&rows, &cx()).unwrap();
    assert_near(found.row(0), found.row(1), 1e-6);

    let mut columns: Vec<Vec<f64>> = (0..3).map(|column| train.column(column)).collect();
    columns.insert(1, vec![5.0; 30]);
    let wider = fit(&Matrix::from_columns(30, &columns), &labels, 2, plain);
    let with_constant = Matrix::new(1, 4, vec![0.5, 8.0, mean, 1.0]);
    assert_near(&wider.predict_proba(&with_constant, &cx()).unwrap().values, found.row(1), 1e-6);
}

#[test]
fn tables_beyond_the_network_are_seen_in_parts() {
    let mut rng = cx().rng("rows", 5);
    // 30 columns, where the network takes 12; 15 classes, where it has 10 outputs; samples of 40 rows.
    let ((train, labels), (test, _)) = (table(100, 30, 15, &mut rng), table(5, 30, 15, &mut rng));
    let large = ClassifierOptions { allow_large: true, many_class: true, sample_rows: Some(40), ..FEW };
    let classifier = fit(&train, &labels, 15, large);
    let notices = classifier.notices.join("; ");
    for words in ["100 labelled rows are seen in 3 samples", "30 columns are seen in 3 parts", "15 classes"] {
        assert!(notices.contains(words), "{notices}");
    }
    let probabilities = classifier.predict_proba(&test, &cx()).unwrap();
    for row in 0..5 {
        assert!((probabilities.row(row).iter().sum::<f64>() - 1.0).abs() < 1e-9);
        assert!(probabilities.row(row).iter().all(|&p| p >= 0.0));
    }
}

#[test]
fn few_classes_at_a_time_make_no_difference_where_there_are_no_more() {
    let mut rng = cx().rng("rows", 7);
    let ((train, labels), (test, _)) = (table(30, 4, 3, &mut rng), table(8, 4, 3, &mut rng));
    let predict = |groups| {
        fit(&train, &labels, 3, ClassifierOptions { groups, ..FEW }).predict_proba(&test, &cx()).unwrap()
    };
    assert_eq!(predict(Some(3)), predict(None));
    let in_pairs = predict(Some(2));
    assert_ne!(in_pairs, predict(None));
    assert!((in_pairs.row(0).iter().sum::<f64>() - 1.0).abs() < 1e-9);
}

#[test]
fn calibration_follows_the_ensemble_and_is_saved_with_the_classifier() {
    let mut rng = cx().rng("rows", 8);
    let ((train, labels), (test, _)) = (table(60, 4, 5, &mut rng), table(8, 4, 5, &mut rng));
    let plain = fit(&train, &labels, 5, FEW).predict_proba(&test, &cx()).unwrap();
    for calibrate in [Calibrate::Auto, Calibrate::Temperature] {
        let classifier = fit(&train, &labels, 5, ClassifierOptions { calibrate, ..FEW });
        let found = classifier.predict_proba(&test, &cx()).unwrap();
        let mut expected = plain.clone();
        classifier.calibration().unwrap().apply(&mut expected);
        assert_near(&found.values, &expected.values, 1e-9);
        assert_ne!(found.values, plain.values);
        let folder = tempfile::tempdir().unwrap();
        classifier.save(folder.path()).unwrap();
        let loaded = TabPfnClassifier::load(folder.path(), &cx()).unwrap();
        // Text keeps numbers to the last bit but one.
        assert_near(&loaded.predict_proba(&test, &cx()).unwrap().values, &found.values, 1e-12);
    }
}

#[test]
fn classes_of_one_row_and_columns_that_a_fold_does_not_see_vary_can_be_calibrated() {
    let columns =
        [(0..12).map(f64::from).collect(), (0..12).map(|row| f64::from(row / 11)).collect::<Vec<_>>()];
    let rows = Matrix::from_columns(12, &columns);
    let labels = [0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 2];
    let asked = ClassifierOptions { calibrate: Calibrate::Vector, ..FEW };
    let classifier = fit(&rows, &labels, 3, asked);
    assert!(classifier.predict_proba(&rows, &cx()).unwrap().values.iter().all(|p| p.is_finite()));
    let alone = fit(&Matrix::new(2, 1, vec![0.0, 1.0]), &[0, 1], 2, asked);
    assert!(alone.calibration().is_none() && alone.notices[0].contains("no class has two rows"));
}

#[test]
fn the_least_tables_are_predicted_without_nonsense() {
    let two = Matrix::new(2, 1, vec![0.0, 1.0]);
    let found = fit(&two, &[0, 1], 2, FEW).predict_proba(&two, &cx()).unwrap();
    assert!(found.values.iter().all(|p| p.is_finite()));
    // A row a class, a value present once, rows that repeat.
    let sparse =
        Matrix::from_columns(4, &[vec![1.0, 2.0, 2.0, 2.0], vec![f64::NAN, f64::NAN, f64::NAN, 3.0]]);
    let found = fit(&sparse, &[0, 1, 2, 2], 3, FEW).predict_proba(&sparse, &cx()).unwrap();
    assert!(found.values.iter().all(|p| p.is_finite()));
    let none = fit(&two, &[0, 1], 2, FEW).predict_proba(&Matrix::new(0, 1, vec![]), &cx()).unwrap();
    assert_eq!((none.rows, none.columns), (0, 2));
}

#[test]
fn a_classifier_that_is_saved_predicts_as_before() {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = cx().rng("rows", 6);
    let ((train, labels), (test, _)) = (table(30, 4, 3, &mut rng), table(8, 4, 3, &mut rng));
    let classifier = fit(&train, &labels, 3, FEW);
    classifier.save(folder.path()).unwrap();
    let other_seed = Context { seed: 9, ..cx() };
    let loaded = TabPfnClassifier::load(folder.path(), &other_seed).unwrap();
    assert_eq!(loaded.classes(), classifier.classes());
    let (found, expected) =
        (loaded.predict_proba(&test, &cx()).unwrap(), classifier.predict_proba(&test, &cx()).unwrap());
    assert_eq!(found.values, expected.values);
    std::fs::remove_file(folder.path().join("train.csv")).unwrap();
    assert!(TabPfnClassifier::load(folder.path(), &cx()).err().unwrap().to_string().contains("train.csv"));
}
