//! Subjects of NATS: the suites of the stream crate and of the system that follows them, with a server.

use crate::Counted;
use crate::workspace::{cargo, each_line, has, install};

/// The server's package on Debian.
const PACKAGES: [&str; 1] = ["nats-server"];

/// Runs both suites.
pub fn check() -> Result<Counted, Box<dyn std::error::Error>> {
    println!("== NATS, kiln-stream and kiln-btsbot");
    let mut counted = Counted::default();
    if !has("nats-server") && !install(&PACKAGES) {
        println!("skipped: NATS, with `apt-get install {}`", PACKAGES.join(" "));
        counted.skipped += 1;
        return Ok(counted);
    }
    // Together with the binary, so that dependencies have the features they were already built with.
    let packages = ["-p", "kiln", "-p", "kiln-stream", "-p", "kiln-btsbot"];
    let mut suites = cargo(["test", "--release", "--features", "nats", "--test", "nats"]);
    let status = each_line(suites.args(packages), |line| {
        println!("{line}");
        counted.passed += usize::from(line.starts_with("test ") && line.ends_with(" ... ok"));
    })?;
    counted.failed += usize::from(!status.success());
    Ok(counted)
}
