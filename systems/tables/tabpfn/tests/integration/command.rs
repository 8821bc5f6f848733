//! The verbs that take tables, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use kiln_core::testing::Desk;
use kiln_core::{HostTensor, TensorFile};
use kiln_data::{read_npz, write_npz};
use kiln_tabpfn::{Tabpfn, examples};

/// Options that keep the reference's small network fast.
const QUICK: &str = "--model %model --members 2";

/// A desk with 40 irises to learn from, and 20 others with an identifier.
fn desk() -> Desk {
    let desk = Desk::new(&Tabpfn);
    let iris = examples::table("iris").unwrap();
    let rows =
        |from: usize, count: usize| -> Vec<usize> { (0..count).map(|i| (from + 7 * i) % 150).collect() };
    iris.select(&rows(0, 40)).write(&desk.path("train.csv")).unwrap();
    let test = iris.select(&rows(3, 20));
    test.write(&desk.path("test.csv")).unwrap();
    desk
}

fn without_target(desk: &Desk) {
    let text = fs::read_to_string(desk.path("test.csv")).unwrap();
    let lines = text.lines().enumerate().map(|(number, line)| {
        let (cells, _) = line.rsplit_once(',').unwrap();
        let id = if number == 0 { "id".to_string() } else { format!("flower {number}") };
        format!("{id};{}\n", cells.replace(',', ";"))
    });
    desk.write("unlabelled.csv", lines.collect::<String>());
}

#[test]
fn predictions_have_an_identifier_a_class_and_a_probability_for_each_class() {
    let desk = desk();
    without_target(&desk);
    let result = desk.json(&format!(
        "predict --train @train.csv --test @unlabelled.csv --target target --id id {QUICK} --out @p.csv"
    ));
    assert_eq!((&result["rows"], &result["scores"]), (&20.into(), &serde_json::Value::Null));
    let csv = fs::read_to_string(desk.path("p.csv")).unwrap();
    let mut lines = csv.lines();
    assert_eq!(lines.next(), Some("id,prediction,proba_setosa,proba_versicolor,proba_virginica"));
    let first: Vec<&str> = lines.next().unwrap().split(',').collect();
    assert_eq!(first[0], "flower 1");
    let sum: f64 = first[2..].iter().map(|p| p.parse::<f64>().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{sum}");
    assert_eq!(lines.count(), 19);
}

#[test]
fn labelled_rows_are_scored_and_every_format_gives_the_same_probabilities() {
    let desk = desk();
    let predict = |train: &str, test: &str| {
        desk.json(&format!("predict --train @{train} --test @{test} --target target {QUICK}"))
    };
    let expected = predict("train.csv", "test.csv");
    let area = expected["scores"]["roc_auc"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&area));
    assert_eq!(expected["predictions"][4]["row"], 5.0);

    let text = fs::read_to_string(desk.path("train.csv")).unwrap();
    desk.write("train.tsv", text.replace(',', "\t"));
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packed, text.as_bytes()).unwrap();
    desk.write("train.csv.gz", packed.finish().unwrap());
    let (_, rows) = text.split_once('\n').unwrap();
    let heads = text.lines().next().unwrap().split(',').take(4).map(|n| format!("@attribute {n} numeric\n"));
    desk.write(
        "train.arff",
        format!(
            "@relation iris\n{}@attribute target {{setosa,versicolor,virginica}}\n@data\n{rows}",
            heads.collect::<String>()
        ),
    );
    for train in ["train.tsv", "train.csv.gz", "train.arff"] {
        assert_eq!(predict(train, "test.csv")["predictions"], expected["predictions"], "{train}");
    }
    desk.write("comma.csv", text.replace(',', ";").replace('.', ","));
    desk.assert_refused(
        &format!("predict --train @comma.csv --test @test.csv --target target {QUICK}"),
        "has a decimal comma; write decimal points, or say --decimal-comma",
    );
}

#[test]
fn arrays_are_predicted_and_preprocessed() {
    let desk = desk();
    let mut arrays = TensorFile::new();
    let numbers = |count: usize| (0..count).map(|i| (i as f32 * 1.7).sin()).collect::<Vec<_>>();
    arrays.insert("X_train", HostTensor::float([10, 3], numbers(30)));
    arrays.insert("y_train", HostTensor::int([10], (0..10).map(|i| i % 2).collect()));
    arrays.insert("X_test", HostTensor::float([4, 3], numbers(12)));
    write_npz(&desk.path("a.npz"), &arrays).unwrap();
    let result = desk.json(&format!("predict --train @a.npz {QUICK}"));
    assert_eq!((&result["rows"], &result["classes"]), (&4.into(), &serde_json::json!(["0", "1"])));
    desk.json("preprocess --train @a.npz --mode power --max-features 12 --out @seen.npz");
    let seen = read_npz(&desk.path("seen.npz")).unwrap();
    assert_eq!(seen.get("X_train").unwrap().shape, [10, 3]);
    assert_eq!(seen.get("X_test").unwrap().shape, [4, 3]);
    // Columns have the mean 0, and few weigh as much as the 12 that the network takes.
    let column: Vec<f32> =
        seen.get("X_train").unwrap().as_floats().unwrap().iter().step_by(3).copied().collect();
    assert!(column.iter().sum::<f32>().abs() < 1e-3);
    assert!((column.iter().map(|x| x * x).sum::<f32>() / 10.0 - 16.0).abs() < 0.1);
    arrays.insert("y_train", HostTensor::int([9], vec![0; 9]));
    write_npz(&desk.path("b.npz"), &arrays).unwrap();
    desk.assert_refused(&format!("predict --train @b.npz {QUICK}"), "\"y\" has 9 rows, must have 10");
}

#[test]
fn classifiers_are_compared_on_a_table_and_on_a_folder() {
    let desk = desk();
    let line = format!("eval --data @train.csv --target target --splits 2 {QUICK} --tune 2");
    let result = desk.json(&format!("{line} --reliability @r.svg"));
    let names: Vec<&str> =
        result["methods"].as_array().unwrap().iter().map(|m| m["method"].as_str().unwrap()).collect();
    assert_eq!(names[..3], ["TabPFN", "logistic regression", "kNN (5)"]);
    assert_eq!(names[5], "boosted trees, tuned over 2");
    assert!(desk.path("r.svg").exists());

    fs::create_dir(desk.path("tables")).unwrap();
    fs::copy(desk.path("train.csv"), desk.path("tables/a.csv")).unwrap();
    fs::copy(desk.path("test.csv"), desk.path("tables/b.csv")).unwrap();
    desk.write("tables/c.csv", "x,target\n1,a\n2,a\n");
    let line = format!("bench --folder @tables --splits 1 --baselines knn {QUICK} --out @bench.csv");
    let result = desk.json(&line);
    assert_eq!(result["tables"].as_array().unwrap().len(), 2);
    assert!(result["skipped"][0].as_str().unwrap().contains("one class only"), "{result}");
    let wins = |method: usize| result["summary"][method]["wins"].as_u64().unwrap();
    assert!(wins(0) + wins(1) >= 2);
    assert_eq!(fs::read_to_string(desk.path("bench.csv")).unwrap().lines().count(), 1 + 2 * 2);
    assert!(fs::read_to_string(desk.path("bench.html")).unwrap().contains("Means over 2 tables"));
}

#[test]
fn predictions_are_explained_and_drawn() {
    let desk = desk();
    let result = desk.json(&format!(
        "explain --train @train.csv --test @test.csv --target target --repeats 2 --top 2 {QUICK} --out @why"
    ));
    assert_eq!(result["importance"].as_array().unwrap().len(), 4);
    let drawn = &result["dependence"][0];
    assert_eq!(drawn["probabilities"].as_array().unwrap().len(), drawn["values"].as_array().unwrap().len());
    assert_eq!(fs::read_dir(desk.path("why")).unwrap().count(), 4);

    let line = "boundary --train @train.csv --target target --x petal_length --y petal_width";
    let result = desk.json(&format!("{line} {QUICK} --out @b.svg"));
    assert!((0.0..=1.0).contains(&result["agreement"].as_f64().unwrap()));
    let svg = fs::read_to_string(desk.path("b.svg")).unwrap();
    assert!(svg.contains("petal_width") && svg.matches("r=\"3.2\"").count() == 40);
    desk.assert_refused(&format!("{line} {QUICK} --out @b.png"), "must end in .svg");
    desk.assert_refused(
        &format!(
            "boundary --train @train.csv --target target --x target --y petal_width {QUICK} --out @c.svg"
        ),
        "three different columns",
    );
}

#[test]
fn tables_that_cannot_be_used_are_named_with_a_way_out() {
    let desk = desk();
    let many =
        |classes: usize| (0..2 * classes).map(|i| format!("{i},{}\n", i % classes)).collect::<String>();
    desk.write("one-class.csv", "a,target\n1,x\n2,x\n");
    desk.write("constant.csv", "a,target\n1,x\n1,y\n");
    desk.write("gap.csv", "a,target\n1,x\n2,\n3,y\n");
    desk.write("alone.csv", "target\nx\ny\n");
    desk.write("twelve.csv", format!("a,target\n{}", many(12)));
    desk.write("long.csv", format!("a,target\n{}", many(2).repeat(300)));
    let wide = |row: usize| (0..13).map(|c| format!("{},", row * row + c)).collect::<String>();
    let heads: String = (0..13).map(|c| format!("c{c},")).collect();
    desk.write("wide.csv", format!("{heads}target\n{}x\n{}y\n{}x\n", wide(1), wide(2), wide(3)));
    desk.write("ragged.csv", "a,target\n1,x\n2\n");
    desk.write("empty.csv", "");
    desk.write("huge.csv", "a,target\n1e200,x\n-1e200,y\n");
    desk.write("t.csv", "a\n1\n");
    for (train, options, words) in [
        ("none.csv", "", "cannot read"),
        ("empty.csv", "", "empty.csv: is empty"),
        ("ragged.csv", "", "ragged.csv, line 3: has 1 cell, the header has 2"),
        ("one-class.csv", "", "all are of one class, \"x\"; is this the right target column?"),
        ("constant.csv", "", "no column varies"),
        ("gap.csv", "", "gap.csv, row 2: has no class in \"target\""),
        ("alone.csv", "", "has no columns besides \"target\""),
        ("twelve.csv", "", "there are 12 classes, the model tells 10 apart; --many-class"),
        ("long.csv", "", "there are 1200, more than 1000; --sample-rows"),
        ("wide.csv", "", "13 columns vary, the model takes 12; --allow-large"),
        ("huge.csv", "", "row 1, column 1: is 1e200"),
        ("gap.csv", "--target b", "has no column \"b\"; its columns are a, target"),
        ("gap.csv", "--drop b", "has no column \"b\""),
        ("gap.csv", "--members 0", "--members must be at least 1"),
        ("gap.csv", "--members x", "--members x is neither"),
        ("gap.csv", "--temperature 0", "--temperature 0 must be above 0"),
        ("gap.csv", "--calibrate maybe", "invalid value 'maybe'"),
        ("gap.csv", "--model @nowhere", "cannot read"),
    ] {
        let members = if options.contains("--members") { "" } else { "--members 2" };
        let model = if options.contains("--model") { "" } else { "--model %model" };
        let line = format!("predict --train @{train} --test @t.csv {options} {members} {model} --out @p.csv");
        desk.assert_refused(&line, words);
        assert!(!desk.path("p.csv").exists(), "{train} {options}");
    }
}

#[test]
fn test_tables_that_do_not_fit_are_named() {
    let desk = desk();
    let predict = |test: &str| format!("predict --train @train.csv --test @{test} {QUICK} --out @p.csv");
    desk.write("lacking.csv", "sepal_length,sepal_width,petal_length\n1,2,3\n");
    desk.assert_refused(&predict("lacking.csv"), "lacking.csv: has no column \"petal_width\"");
    let heads = "sepal_length,sepal_width,petal_length,petal_width";
    desk.write("words.csv", format!("{heads}\n1,2,3,4\n1,2,3,wide\n"));
    desk.assert_refused(&predict("words.csv"), "row 2, column \"petal_width\": is \"wide\"");
    desk.write("new.csv", format!("{heads},target\n1,2,3,4,tulip\n"));
    desk.assert_refused(&predict("new.csv"), "row 1: has the class \"tulip\", which no training row has");
    desk.write("more.csv", format!("{heads},colour,target\n1,2,3,,red,\n"));
    let result = desk.json(&predict("more.csv"));
    let notices = result["notices"].to_string();
    assert!(notices.contains("left out: colour") && notices.contains("1 missing"), "{notices}");
    desk.assert_refused(&format!("predict --train @train.csv {QUICK}"), "no rows to predict; say --test");
    desk.assert_refused(&format!("{} --id name", predict("more.csv")), "has no column \"name\"");
}

#[test]
fn options_of_comparisons_that_make_no_sense_are_refused() {
    let desk = desk();
    for (options, words) in [
        ("--splits 0", "--splits must be at least 1"),
        ("--train-fraction 1", "--train-fraction 1 must be between 0 and 1"),
        ("--baselines svm", "--baselines names \"svm\"; there are logreg, knn, gbdt and rf"),
        ("--target nothing", "has no column \"nothing\""),
    ] {
        desk.assert_refused(&format!("eval --data @train.csv {QUICK} {options}"), words);
    }
    fs::create_dir(desk.path("tables")).unwrap();
    desk.assert_refused(&format!("bench --folder @tables {QUICK} --out @b.csv"), "holds no tables");
    desk.write("tables/a.csv", "x,target\n1,a\n");
    desk.assert_refused(&format!("bench --folder @tables {QUICK} --out @b.csv"), "could be evaluated");
    assert!(!desk.path("b.csv").exists());
}
