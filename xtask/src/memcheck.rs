//! The unit tests of the crates that have `unsafe` blocks, under valgrind: no memory is read before it is written or after
//! it is freed.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::workspace::{cargo, has, install};

/// What running under valgrind came to.
pub enum Memcheck {
    /// Whether nothing was found.
    Ran(bool),
    /// What has to be installed.
    Skipped(&'static str),
}

/// Runs the unit tests of `kiln-ops` around its `unsafe` blocks.
pub fn check() -> Result<Memcheck, Box<dyn std::error::Error>> {
    println!("== valgrind, kiln-ops");
    if !has("valgrind") && !install(&["valgrind"]) {
        return Ok(Memcheck::Skipped("valgrind, with `apt-get install valgrind`"));
    }
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--quiet", "--error-exitcode=9"]).arg(test_binary()?);
    // The allocator's settings, and memory that is filled once; the third kind is a hint that touches no memory.
    let status = valgrind.args(["memory::", "blocks::"]).status()?;
    Ok(Memcheck::Ran(status.success()))
}

/// The program with the unit tests of `kiln-ops`, built as the test step builds it.
fn test_binary() -> Result<PathBuf, Box<dyn std::error::Error>> {
    let arguments = ["test", "--release", "--workspace", "--no-run", "--message-format", "json"];
    let output = cargo(arguments).stderr(Stdio::null()).output()?;
    String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == "kiln_ops" && message["profile"]["test"] == true)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .ok_or_else(|| "cargo names no program with the unit tests of kiln-ops".into())
}
