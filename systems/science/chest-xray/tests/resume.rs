//! Resumed training, in a process of its own: dropout draws from one generator that all threads of a process share.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::atomic::Ordering;

use kiln_chest_xray::ChestXray;
use kiln_core::testing::Desk;

#[test]
fn a_stopped_run_goes_on_to_the_same_weights() {
    let desk = Desk::new(&ChestXray);
    desk.json("phantom --n 30 --size 64 --tb 0.3 --out @d");
    let lines = [
        (
            "train",
            "--images @d/images",
            "--net squeezenet1_1 --width 0.125 --size 64 --epochs 2 --batch 8 --folds 2",
            "/fold-2",
        ),
        ("train-seg", "--images @d/images --masks @d/masks", "--width 2 --size 64 --epochs 2 --augment", ""),
    ];
    for (verb, data, options, model) in lines {
        desk.json(&format!("{verb} {data} {options} --out @{verb}-whole"));
        desk.cx.interrupt_flag().store(true, Ordering::Relaxed);
        let refusal = desk.refusal(&format!("{verb} {data} {options} --out @{verb}-parts"));
        assert!(refusal.contains("stopped"), "{refusal}");
        desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
        match desk.path(&format!("{verb}-parts")).exists() {
            true => desk.json(&format!("{verb} {data} --resume @{verb}-parts")),
            // Stopped before there was anything to keep.
            false => desk.json(&format!("{verb} {data} {options} --out @{verb}-parts")),
        };
        let weights = |kind: &str| {
            fs::read(desk.path(&format!("{verb}-{kind}{model}")).join("model.safetensors")).unwrap()
        };
        assert!(weights("whole") == weights("parts"));
    }
}
