//! A crate imports only from lower floors, and no system imports another.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

/// The floor of a crate by the folder it lives in, relative to the workspace; see `ARCHITECTURE.md`.
fn floor(folder: &str) -> Option<u8> {
    match folder {
        "crates/core" => Some(0),
        "crates/ops" | "crates/data" | "crates/http" | "crates/stream" => Some(1),
        "crates/nn" | "crates/compiler" | "crates/cluster" => Some(2),
        _ if folder.starts_with("systems/") => Some(3),
        _ if folder.starts_with("apps/") => Some(4),
        _ => None,
    }
}

fn packages() -> Vec<Value> {
    let output = Command::new(std::env::var("CARGO").unwrap_or("cargo".into()))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo starts");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    metadata["packages"].as_array().expect("a list of packages").clone()
}

#[test]
fn every_import_comes_from_a_lower_floor() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap();
    let packages = packages();
    let folder = |package: &Value| {
        let manifest = Path::new(package["manifest_path"].as_str().unwrap());
        manifest.parent().unwrap().strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/")
    };
    let folders: BTreeMap<&str, String> =
        packages.iter().map(|package| (package["name"].as_str().unwrap(), folder(package))).collect();
    assert!(folders.len() >= 6, "{folders:?}");

    let mut wrong = Vec::new();
    for package in &packages {
        let name = package["name"].as_str().unwrap();
        let own = &folders[name];
        if own == "xtask" {
            continue; // a tool that stands beside the house
        }
        let own_floor = floor(own).unwrap_or_else(|| panic!("{own} is on no floor"));
        // All kinds: normal, build and dev dependencies.
        for dependency in package["dependencies"].as_array().unwrap() {
            let dependency = dependency["name"].as_str().unwrap();
            let Some(theirs) = folders.get(dependency) else { continue };
            if floor(theirs).is_none_or(|theirs| theirs >= own_floor) {
                wrong.push(format!("{name} imports {dependency}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join(", "));
}
