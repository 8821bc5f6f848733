//! The figures that `peer.py` measures with the package `tabpfn` (version 1, PyTorch) and with scikit-learn and XGBoost,
//! measured here; `cargo xtask bench tabpfn` runs both sides in turn.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median of several repetitions after a
//! warm-up. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use std::hint::black_box;
use std::time::Instant;

use kiln_core::{Context, MemoryGauge};
use kiln_data::Matrix;
use kiln_tabpfn::baselines::{Baseline, BoostingConfig, GradientBoosting};
use kiln_tabpfn::{Calibrate, ClassifierOptions, TabPfn, TabPfnClassifier, TabPfnConfig};
use rand::RngExt;

/// Labelled rows, rows to predict, columns.
const TABLES: [(usize, usize, usize); 3] = [(100, 100, 10), (500, 500, 30), (1000, 1000, 100)];

struct Workload {
    train: Matrix,
    labels: Vec<usize>,
    test: Matrix,
}

/// Normal numbers, and two classes that the first column decides.
fn workload((p, m, columns): (usize, usize, usize), cx: &Context) -> Workload {
    let mut rng = cx.rng("bench", columns as u64);
    // Twelve uniform numbers less six: normal enough.
    let mut normal = || (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
    let mut matrix =
        |rows: usize| Matrix::new(rows, columns, (0..rows * columns).map(|_| normal()).collect());
    let (train, test) = (matrix(p), matrix(m));
    let labels = (0..p).map(|row| usize::from(train.at(row, 0) > 0.0)).collect();
    Workload { train, labels, test }
}

fn median_milliseconds(repetitions: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..repetitions)
        .map(|_| {
            let begun = Instant::now();
            work();
            begun.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    1e3 * seconds[repetitions / 2]
}

/// Fits and predicts, as a user does with a new table.
fn predict(network: &TabPfn, work: &Workload, members: usize, cx: &Context) {
    let options = ClassifierOptions {
        members: Some(members),
        calibrate: Calibrate::Off,
        ..ClassifierOptions::default()
    };
    let classes = vec!["0".into(), "1".into()];
    let classifier =
        TabPfnClassifier::fit_matrix(network, work.train.clone(), work.labels.clone(), classes, options, cx)
            .expect("the table is fit");
    black_box(classifier.predict_proba(&work.test, cx).expect("the rows are fit"));
}

#[global_allocator]
static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;

fn main() {
    kiln_ops::keep_freed_memory(); // as the kiln binary does
    let cx = &Context::for_tests(".");
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    let show = |name: String, unit: &str, measure: &dyn Fn() -> f64| {
        if name.contains(&only) {
            println!("{}", serde_json::json!({ "name": name, "unit": unit, "value": measure() }));
        }
    };
    // The published network's size; the time does not hang on what the weights are.
    let official =
        TabPfnConfig { max_features: 100, max_classes: 10, emsize: 512, layers: 12, heads: 4, hidden: 1024 };
    let network = official.init(&cx.device);
    show("memory of predict p=1000 m=1000 F=100 members=3".into(), "MiB", &|| {
        let work = workload(TABLES[2], cx);
        let peak = MemoryGauge::start().and_then(|gauge| gauge.peak(|| predict(&network, &work, 3, cx)).1);
        peak.map_or(f64::NAN, |peak| peak as f64 / f64::from(1 << 20))
    });
    for table in TABLES {
        let (p, m, columns) = table;
        let work = workload(table, cx);
        for members in [1, 3, 32] {
            // 32 passes of the largest table take minutes on either side.
            if members == 32 && p == 1000 {
                continue;
            }
            let repetitions = if members * p > 1000 { 1 } else { 3 };
            show(format!("predict p={p} m={m} F={columns} members={members}"), "ms", &|| {
                median_milliseconds(repetitions, || predict(&network, &work, members, cx))
            });
        }
    }
    let work = workload(TABLES[1], cx);
    for baseline in Baseline::ALL {
        let name = match baseline {
            Baseline::Logreg => "logreg",
            Baseline::Knn => "knn",
            Baseline::Gbdt => "gbdt",
            Baseline::Rf => "rf",
        };
        show(format!("{name} fit and predict p=500 m=500 F=30"), "ms", &|| {
            median_milliseconds(3, || {
                black_box(baseline.predict(&work.train, &work.labels, 2, &work.test, cx).expect("it is fit"));
            })
        });
    }
    show("gbdt fit p=1000 F=100".into(), "ms", &|| {
        let work = workload(TABLES[2], cx);
        let config = BoostingConfig::default();
        median_milliseconds(3, || {
            let mut rng = cx.rng("boosting", 0);
            black_box(GradientBoosting::fit(&work.train, &work.labels, 2, &config, &mut rng));
        })
    });
}
