//! `fit-prior`, `sample-prior`, `forward` and `import`, with good and bad input.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::atomic::Ordering;

use kiln_core::TensorFile;
use kiln_core::testing::Desk;
use kiln_tabpfn::Tabpfn;

/// Options of a network that learns in milliseconds.
const TINY: &str =
    "--emsize 16 --layers 1 --heads 2 --hidden 16 --max-features 5 --max-classes 3 --rows 32 --batch 2";

fn desk() -> Desk {
    Desk::new(&Tabpfn)
}

/// The largest difference of two tensors.
fn difference(a: &TensorFile, b: &TensorFile, name: &str) -> f32 {
    let (a, b) = (a.get(name).unwrap().as_floats().unwrap(), b.get(name).unwrap().as_floats().unwrap());
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn forward_gives_the_logits_of_the_reference() {
    let desk = desk();
    let golden = TensorFile::read("tests/data/forward.safetensors".as_ref()).unwrap();
    for case in ["a", "c"] {
        let mut input = TensorFile::new();
        for name in ["x", "y", "single_eval_pos", "logits"] {
            input.insert(name, golden.get(&format!("{case}_{name}")).unwrap().clone());
        }
        input.write(&desk.path("in.safetensors")).unwrap();
        desk.json("forward --model %model --in @in.safetensors --out @out.safetensors");
        let output = TensorFile::read(&desk.path("out.safetensors")).unwrap();
        assert!(difference(&output, &input, "logits") < 1e-4, "case {case}");
    }
    let mut narrow = TensorFile::read(&desk.path("in.safetensors")).unwrap();
    narrow.rename("y", "z");
    narrow.write(&desk.path("in.safetensors")).unwrap();
    desk.assert_refused(
        "forward --model %model --in @in.safetensors --out @o.safetensors",
        "\"y\" is missing",
    );
}

#[test]
fn a_published_checkpoint_becomes_a_model_folder_and_half_precision_halves_it() {
    let desk = desk();
    let mut published = TensorFile::new();
    published
        .insert_section("module.", TensorFile::read("tests/data/model/model.safetensors".as_ref()).unwrap());
    published.insert("module.criterion.weight", kiln_core::HostTensor::float([10], vec![1.0; 10]));
    published.write(&desk.path("official.safetensors")).unwrap();
    let result = desk.json("import --checkpoint @official.safetensors --out @m");
    assert_eq!((&result["network"]["nlayers"], &result["network"]["num_features"]), (&3.into(), &12.into()));
    let original = TensorFile::read("tests/data/model/model.safetensors".as_ref()).unwrap();
    let size = |model: &str| fs::metadata(desk.path(model).join("model.safetensors")).unwrap().len();
    let imported = TensorFile::read(&desk.path("m/model.safetensors")).unwrap();
    assert!(original.names().eq(imported.names()));
    assert!(original.names().all(|name| difference(&original, &imported, name) == 0.0));
    desk.json("import --checkpoint @official.safetensors --half --out @h");
    assert!(size("h") < size("m") * 6 / 10);
    let result =
        desk.refusal("import --checkpoint @official.safetensors --config %model/model.safetensors --out @x");
    assert!(result.contains("cannot read") || result.contains("does not describe"), "{result}");
    assert!(!desk.path("x").exists());
}

#[test]
fn a_stopped_fit_goes_on_to_the_same_weights() {
    let desk = desk();
    let whole = desk.json(&format!("fit-prior {TINY} --steps 6 --eval-every 3 --out @whole"));
    assert_eq!(whole["steps"], 6);
    assert!(whole["best_val_loss"].as_f64().unwrap() > 0.0);

    desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
    let refusal = desk.refusal(&format!("fit-prior {TINY} --steps 6 --eval-every 3 --out @parts"));
    assert!(refusal.contains("kiln tabpfn fit-prior --resume"), "{refusal}");
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    desk.json("fit-prior --resume @parts");
    let weights = |run: &str| TensorFile::read(&desk.path(run).join("model.safetensors")).unwrap();
    let tables = |run: &str| fs::read_to_string(desk.path(run).join("tables.csv")).unwrap();
    assert_eq!(tables("whole"), tables("parts"));
    assert!(tables("whole").starts_with("step,table,accuracy,roc_auc\n3,iris,"), "{}", tables("whole"));
    assert_eq!(tables("whole").lines().count(), 1 + 2 * 6);
    let (whole, parts) = (weights("whole"), weights("parts"));
    assert!(whole.names().all(|name| difference(&whole, &parts, name) == 0.0));
    desk.assert_refused(&format!("fit-prior {TINY} --steps 6 --out @whole"), "already holds a training run");
}

#[test]
fn a_fit_for_some_time_has_as_many_steps_as_fit_in() {
    let desk = desk();
    let result = desk.json(&format!("fit-prior {TINY} --minutes 0.000001 --out @m"));
    assert_eq!(result["steps"], 1);
}

#[test]
fn settings_that_do_not_fit_are_refused_before_anything_is_written() {
    let desk = desk();
    for (options, words) in [
        ("--emsize 10 --heads 3", "3 heads do not divide the embedding width 10"),
        ("--rows 31", "too short"),
        ("--batch 0", "at least one data set"),
        ("--max-classes 1", "1 classes, but needs at least 2"),
        ("--minutes 0", "no time to train"),
        ("--lr 0", "learning rate is 0"),
    ] {
        desk.assert_refused(&format!("fit-prior {options} --out @m"), words);
        assert!(!desk.path("m").exists(), "{options}");
    }
    desk.assert_refused("fit-prior --resume @nothing", "only a folder that `kiln tabpfn fit-prior` wrote");
}

#[test]
fn sampled_tables_are_files_with_a_header_and_drawings() {
    let desk = desk();
    let sets =
        desk.json("sample-prior --n 4 --rows 20 --max-features 3 --max-classes 3 --plot --out @tables");
    for set in sets.as_array().unwrap() {
        let text = fs::read_to_string(set["file"].as_str().unwrap()).unwrap();
        let features = set["features"].as_u64().unwrap() as usize;
        assert_eq!(text.lines().count(), 21);
        assert!(text.lines().all(|line| line.split(',').count() == features + 1));
        assert!(text.lines().next().unwrap().ends_with(",target"));
    }
    let graph = fs::read_to_string(desk.path("tables/set-000-graph.svg")).unwrap();
    assert!(graph.starts_with("<svg") && graph.contains("#c0392b"));
    desk.assert_refused("sample-prior --rows 3 --out @few", "2 rows with labels and 2 without");
}
