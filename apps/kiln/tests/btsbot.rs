//! `kiln btsbot watch`, killed at random moments: every target is requested once.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use kiln::btsbot::Btsbot;
use kiln::btsbot::follow_up::MockSkyPortal;
use kiln::core::random_stream;
use kiln::core::testing::Desk;
use rand::RngExt;

#[test]
fn a_watch_that_is_killed_again_and_again_loses_and_doubles_no_request() {
    let desk = Desk::new(&Btsbot);
    desk.write("c.json", r#"{"channels": [2, 3], "kernel": 3, "meta_hidden": [8, 8]}"#);
    desk.json("simulate --sources 48 --out @s");
    desk.json("extract --packets @s/packets --labels @s/sources.csv --out @a");
    desk.json(
        "train --triplets @a/triplets.npy --candidates @a/candidates.csv --config @c.json --crop 15 --epochs 1 --batch 8 \
         --n-max 2 --out @m",
    );
    // A policy that takes every source of some brightness, so that there is much to lose.
    const POLICY: &str = "n=1,score=0,mag=19.5";
    desk.json(&format!(
        "watch --model @m --packets @s/packets --policy {POLICY} --store @dry.redb --once --out @dry"
    ));
    let table = fs::read_to_string(desk.path("dry/requests.csv")).unwrap();
    let expected: BTreeSet<String> =
        table.lines().skip(1).map(|line| line.split(',').next().unwrap().to_string()).collect();
    assert!(expected.len() > 10, "{}", expected.len());

    let server = MockSkyPortal::start("secret").unwrap();
    server.fail([(500, false), (503, true), (429, false), (500, true)]);
    let start = || -> Child {
        Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args([
                "btsbot",
                "watch",
                "--policy",
                POLICY,
                "--once",
                "--live",
                "--allocation",
                "1",
                "--first-wait",
                "0.001",
            ])
            .arg("--base")
            .arg(&server.base)
            .arg("--model")
            .arg(desk.path("m"))
            .arg("--packets")
            .arg(desk.path("s/packets"))
            .arg("--store")
            .arg(desk.path("live.redb"))
            .env("SKYPORTAL_TOKEN", "secret")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    };
    let mut rng = random_stream(0, "kill", 0);
    let mut kills = 0;
    let mut lives = 0;
    loop {
        let mut child = start();
        lives += 1;
        // Later lives live longer, so that one lasts on any machine.
        thread::sleep(Duration::from_millis(rng.random_range(5..120) + 20 * lives));
        match child.try_wait().unwrap() {
            Some(status) => {
                assert!(status.success());
                break;
            }
            None => {
                child.kill().unwrap(); // SIGKILL, which no program can prepare for
                child.wait().unwrap();
                kills += 1;
            }
        }
    }
    let requested = server.requested();
    let once: BTreeSet<String> = requested.iter().cloned().collect();
    assert_eq!(once, expected, "after {kills} kills");
    assert_eq!(requested.len(), expected.len(), "after {kills} kills");
    println!("{kills} kills, {} targets", expected.len());
    assert!(kills > 0);
}
