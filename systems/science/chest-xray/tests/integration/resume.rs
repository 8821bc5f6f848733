//! Resumed training, in a process of its own: dropout draws from one generator that all threads of a process share.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use kiln_chest_xray::ChestXray;
use kiln_core::testing::Desk;

#[test]
fn a_stopped_run_goes_on_to_the_same_weights() {
    let desk = Desk::new(&ChestXray);
    desk.json("phantom --n 30 --size 64 --tb 0.3 --out @d");
    // Stopped after the first checkpoint: of the first of two folds, and of the only model.
    let lines = [
        (
            "train",
            "--images @d/images",
            "--net squeezenet1_1 --width 0.125 --size 64 --epochs 8 --patience 9 --batch 4 --folds 2",
            ["fold-1", "fold-2"],
        ),
        (
            "train-seg",
            "--images @d/images --masks @d/masks",
            "--width 2 --size 64 --epochs 8 --augment",
            ["", ""],
        ),
    ];
    for (verb, data, options, models) in lines {
        desk.json(&format!("{verb} {data} {options} --out @{verb}-whole"));
        let checkpoint = desk.path(&format!("{verb}-parts")).join(models[0]).join("checkpoint.safetensors");
        let stop = desk.cx.interrupt_flag();
        let watch = thread::spawn(move || {
            while !checkpoint.exists() {
                thread::sleep(Duration::from_millis(1));
            }
            stop.store(true, Ordering::Relaxed);
        });
        // On a fast machine the run may be over before it is stopped.
        if let Err(error) = desk.run(&format!("{verb} {data} {options} --out @{verb}-parts")) {
            assert!(error.to_string().contains("stopped"), "{error}");
        }
        watch.join().unwrap();
        desk.cx.interrupt_flag().store(false, Ordering::Relaxed);
        desk.json(&format!("{verb} {data} --resume @{verb}-parts"));
        for model in models {
            let weights = |kind: &str| {
                fs::read(desk.path(&format!("{verb}-{kind}")).join(model).join("model.safetensors")).unwrap()
            };
            assert!(weights("whole") == weights("parts"), "{verb} {model}");
        }
    }
}
