//! Resumed training, in a process of its own: dropout draws from one generator that all threads of a process share.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::atomic::Ordering;

use kiln_core::testing::Desk;
use kiln_eeg::Eeg;

#[test]
fn a_stopped_run_goes_on_to_the_same_weights() {
    let desk = Desk::new(&Eeg);
    desk.json("simulate --site a --recordings 16 --seconds 4 --channels C3,O1 --out @a");
    desk.json("prepare --in @a --labels @a/labels.csv --channels C3,O1 --tmin 0 --out @p");
    let options = "--data @p --window 200 --epochs 2 --batch 4 --width 0.1 --augment sign-flip,noise:0.5:0.1 --class-weights";
    desk.json(&format!("train {options} --out @whole"));
    desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
    let refusal = desk.refusal(&format!("train {options} --out @parts"));
    assert!(refusal.contains("kiln eeg train --data"), "{refusal}");
    desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
    desk.json("train --data @p --resume @parts");
    let weights = |model: &str| fs::read(desk.path(model).join("model.safetensors")).unwrap();
    assert!(weights("whole") == weights("parts"));
}
