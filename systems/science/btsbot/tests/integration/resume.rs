//! Training that was stopped. Alone in its program: dropout draws from one generator that all threads share.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::atomic::Ordering;

use kiln_btsbot::Btsbot;
use kiln_core::testing::Desk;

#[test]
fn a_stopped_run_goes_on_to_the_same_weights() {
    let desk = Desk::new(&Btsbot);
    desk.write("c.json", r#"{"channels": [2, 3], "kernel": 3, "meta_hidden": [8, 8]}"#);
    desk.json("simulate --sources 24 --out @survey");
    desk.json("extract --packets @survey/packets --labels @survey/sources.csv --out @arrays");
    let options = "--triplets @arrays/triplets.npy --candidates @arrays/candidates.csv";
    let recipe = "--config @c.json --crop 15 --epochs 2 --batch 16 --lr 1e-3 --n-max 3";
    desk.json(&format!("train {options} {recipe} --out @whole"));
    desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
    let refusal = desk.refusal(&format!("train {options} {recipe} --out @parts"));
    assert!(refusal.contains("kiln btsbot train --triplets"), "{refusal}");
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    desk.json(&format!("train {options} --resume @parts"));
    let weights = |model: &str| fs::read(desk.path(model).join("model.safetensors")).unwrap();
    assert!(weights("whole") == weights("parts"));
}
