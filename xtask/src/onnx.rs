//! ONNX models between Kiln and ONNX Runtime, which a Python script compares.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::workspace::{cargo, each_line, metadata, root, target};
use crate::{Counted, bench};

/// Compares the models of `xtask/onnx/check.py` in both; how many agreed and how many did not.
pub fn check() -> Result<Counted, Box<dyn std::error::Error>> {
    println!("== ONNX Runtime, kiln-compiler");
    let scripts = root().join("xtask/onnx");
    let target = target(&metadata()?);
    let mut counted = Counted::default();
    let Ok(python) = bench::environment(&target.join("peers/onnx"), &scripts.join("requirements.txt")) else {
        println!("skipped: ONNX Runtime, with `pip install -r xtask/onnx/requirements.txt`");
        counted.skipped += 1;
        return Ok(counted);
    };
    if !cargo(["build", "--release", "-p", "kiln"]).stderr(Stdio::null()).status()?.success() {
        return Err("the binary does not build".into());
    }
    let folder = target.join("onnx-check");
    clear(&folder)?;
    let mut script = Command::new(python);
    script.arg(scripts.join("check.py")).arg(target.join("release/kiln")).arg(&folder);
    let status = each_line(&mut script, |line| {
        println!("{line}");
        counted.passed += usize::from(line.starts_with("ok "));
        counted.failed += usize::from(line.starts_with("FAILED "));
        counted.skipped += usize::from(line.starts_with("skipped: "));
    })?;
    if !status.success() {
        counted.failed += 1;
    }
    Ok(counted)
}

/// An empty folder.
fn clear(folder: &Path) -> std::io::Result<()> {
    if folder.exists() {
        std::fs::remove_dir_all(folder)?;
    }
    std::fs::create_dir_all(folder)
}
