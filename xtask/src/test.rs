//! `cargo xtask test`: everything that must hold before a commit.

use std::process::Command;
use std::time::Instant;

use crate::memcheck::{self, Memcheck};
use crate::workspace::{cargo, each_line, has, install};
use crate::{Outcome, mpi, onnx, readme};

/// Tests seen so far.
#[derive(Default, Debug, PartialEq)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
}

pub fn run() -> Outcome {
    let mut count = Count::default();
    step(cargo(["fmt", "--all", "--", "--check"]), &mut count)?;
    // Everything in the release profile, so that dependencies are built once.
    let clippy = ["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step(cargo(clippy), &mut count)?;
    // Tests that need a server of NATS say that they are skipped where it could not be installed.
    if !has("nats-server") {
        install(&["nats-server"]);
    }
    // Unit, integration and documentation tests; the output of tests that pass tells of skipped ones.
    step(cargo(["test", "--release", "--workspace", "--no-fail-fast", "--", "--show-output"]), &mut count)?;
    match timed(memcheck::check)? {
        Memcheck::Ran(true) => count.passed += 1,
        Memcheck::Ran(false) => count.failed += 1,
        Memcheck::Skipped(what) => {
            println!("skipped: {what}");
            count.skipped += 1;
        }
    }
    for counted in [timed(onnx::check)?, timed(mpi::check)?] {
        count.passed += counted.passed;
        count.failed += counted.failed;
        count.skipped += counted.skipped;
    }
    // What the READMEs tell people to type.
    let (worked, did_not) = timed(readme::check)?;
    count.passed += worked;
    count.failed += did_not;
    println!("{} passed, {} failed, {} skipped", count.passed, count.failed, count.skipped);
    Ok(count.failed == 0)
}

/// Runs one command. If it fails without a failed test (it may not have compiled), that counts as one.
fn step(mut command: Command, count: &mut Count) -> std::io::Result<()> {
    let arguments: Vec<_> = command.get_args().map(|a| a.to_string_lossy()).collect();
    println!("== cargo {}", arguments.join(" "));
    let failed_before = count.failed;
    let status = timed(|| {
        each_line(&mut command, |line| {
            println!("{line}");
            count.read(line);
        })
    })?;
    if !status.success() && count.failed == failed_before {
        count.failed += 1;
    }
    Ok(())
}

/// Does one part of the work and says how long it took.
fn timed<T>(part: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let outcome = part();
    println!("== took {:.0} s", begun.elapsed().as_secs_f64());
    outcome
}

impl Count {
    /// Reads a line of the test harness. A test that says `skipped: <reason>` has passed for the
    /// harness, but has shown nothing.
    fn read(&mut self, line: &str) {
        if line.trim_start().starts_with("skipped: ") {
            self.passed = self.passed.saturating_sub(1);
            self.skipped += 1;
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let number = |word: &str| -> usize {
            let part = result.split([';', '.']).map(str::trim).find_map(|part| part.strip_suffix(word));
            part.and_then(|number| number.trim().parse().ok()).unwrap_or(0)
        };
        self.passed += number("passed");
        self.failed += number("failed");
        self.skipped += number("ignored");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_lines_are_added_up_and_skipped_tests_do_not_count_as_passed() {
        let mut count = Count::default();
        for line in [
            "test result: ok. 20 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.15s",
            "---- golden stdout ----",
            "skipped: no shared data",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.00s",
        ] {
            count.read(line);
        }
        assert_eq!(count, Count { passed: 22, failed: 2, skipped: 2 });
    }
}
