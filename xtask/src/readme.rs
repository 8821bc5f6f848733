//! `cargo xtask readme`: what the READMEs tell people to type must work.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::Outcome;
use crate::workspace::{cargo, metadata, root, target};

/// A fenced block marked `sh`.
#[derive(Debug, PartialEq)]
struct Block {
    /// Line of the opening fence, counted from one.
    line: usize,
    script: String,
}

pub fn run() -> Outcome {
    let (passed, failed) = check()?;
    println!("{passed} passed, {failed} failed");
    Ok(failed == 0)
}

/// How many blocks worked and how many did not.
pub fn check() -> Result<(usize, usize), Box<dyn std::error::Error>> {
    if !cargo(["build", "--release", "--package", "kiln"]).status()?.success() {
        return Err("kiln cannot be built".into());
    }
    let metadata = metadata()?;
    let mut readmes = vec![root().join("README.md")];
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap_or_default());
        readmes.push(manifest.with_file_name("README.md"));
    }
    readmes.retain(|path| path.is_file());

    let (mut passed, mut failed) = (0, 0);
    for path in readmes {
        let shown = path.strip_prefix(root()).unwrap_or(&path).display();
        for block in blocks(&fs::read_to_string(&path)?) {
            println!("== {shown}:{}", block.line);
            match execute(&block.script, &target(&metadata).join("release"))? {
                true => passed += 1,
                false => {
                    failed += 1;
                    println!("FAILED {shown}:{}\n{}", block.line, block.script);
                }
            }
        }
    }
    Ok((passed, failed))
}

/// The blocks marked `sh`; others, such as `console`, are for reading only.
fn blocks(markdown: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let mut open: Option<(Block, bool)> = None;
    for (number, line) in markdown.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(_), Some(_)) => blocks.extend(open.take().and_then(|(block, run)| run.then_some(block))),
            (Some(info), None) => {
                let block = Block { line: number + 1, script: String::new() };
                open = Some((block, info.trim() == "sh"));
            }
            (None, Some((block, _))) => block.script += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    blocks
}

/// Runs a script in a folder of its own with the built `kiln` before any other.
fn execute(script: &str, programs: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let others = std::env::var_os("PATH").unwrap_or_default();
    let path =
        std::env::join_paths([PathBuf::from(programs)].into_iter().chain(std::env::split_paths(&others)))?;
    let status = Command::new("sh")
        .args(["-e", "-c", script])
        .current_dir(folder.path())
        .env("PATH", path)
        .status()?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_runnable_shell_blocks_are_found() {
        let markdown = "text\n```sh\nkiln list\nkiln show gla\n```\n```console\nrm -r /\n```\n```rust\nfn main() {}\n```\n";
        assert_eq!(blocks(markdown), [Block { line: 2, script: "kiln list\nkiln show gla\n".into() }]);
    }

    #[test]
    fn a_failing_line_fails_the_block() {
        assert!(execute("true\ntest -z \"$(ls)\"", Path::new("/")).unwrap());
        assert!(!execute("false\ntrue", Path::new("/")).unwrap());
    }
}
