//! The suite of the cluster crate on processes of MPI.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::Counted;
use crate::workspace::{cargo, each_line, has, install};

/// What building and running with Open MPI takes on Debian.
const PACKAGES: [&str; 3] = ["libopenmpi-dev", "openmpi-bin", "libclang-dev"];

/// Runs the suite on four ranks, and on two.
pub fn check() -> Result<Counted, Box<dyn std::error::Error>> {
    println!("== Open MPI, kiln-cluster");
    let mut counted = Counted::default();
    let there = has("mpirun") && has("mpicc");
    if !there && !install(&PACKAGES) {
        println!("skipped: Open MPI, with `apt-get install {}`", PACKAGES.join(" "));
        counted.skipped += 1;
        return Ok(counted);
    }
    let Some(suite) = suite()? else {
        counted.failed += 1;
        return Ok(counted);
    };
    for ranks in ["2", "4"] {
        let mut mpirun = Command::new("mpirun");
        mpirun.args(["--oversubscribe", "-n", ranks]).arg(&suite);
        // In a container everything may run as root.
        mpirun.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        let status = each_line(&mut mpirun, |line| {
            println!("{line}");
            counted.passed += usize::from(line.starts_with("test ") && line.ends_with(" ... ok"));
        })?;
        counted.failed += usize::from(!status.success());
    }
    Ok(counted)
}

/// The program with the suite, unless it does not build. Together with the binary, so that dependencies have the
/// features they were already built with.
fn suite() -> Result<Option<PathBuf>, Box<dyn std::error::Error>> {
    let arguments =
        ["test", "--release", "-p", "kiln", "-p", "kiln-cluster", "--features", "mpi", "--test", "mpi"];
    let output =
        cargo(arguments).args(["--no-run", "--message-format", "json"]).stderr(Stdio::inherit()).output()?;
    let found = String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find_map(|message| message["executable"].as_str().map(PathBuf::from));
    Ok(found.filter(|_| output.status.success()))
}
