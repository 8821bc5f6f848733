//! `cargo xtask bench`: a system beside its peer, run in turn so that both see the same machine.
//!
//! Both sides print one JSON line a figure, `{"name": …, "unit": …, "value": …}`, when `KILN_BENCH=json`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::Outcome;
use crate::workspace::{cargo, each_line, metadata, target};

/// Figures of one side by name: the unit and what each run measured.
type Figures = BTreeMap<String, (String, Vec<f64>)>;

pub fn run(slug: &str, pairs: u32) -> Outcome {
    let metadata = metadata()?;
    let package = format!("kiln-{slug}");
    let benches = folder_of(&metadata, &package)
        .ok_or_else(|| format!("there is no crate {package}; `kiln list` names the systems"))?
        .join("benches");
    let script = benches.join("peer.py");
    let python = environment(&target(&metadata).join("peers").join(slug), &benches.join("requirements.txt"))?;

    let (mut ours, mut peer) = (Figures::new(), Figures::new());
    for pair in 1..=pairs {
        println!("== pair {pair} of {pairs}");
        // Together with the binary, so that dependencies have the features they were already built with.
        let mut bench =
            cargo(["bench", "--profile", "release", "-p", "kiln", "-p", &package, "--bench", "peer"]);
        measure(&mut bench, &mut ours)?;
        measure(Command::new(&python).arg(&script), &mut peer)?;
    }
    print!("{}", compare(&ours, &peer));
    Ok(true)
}

fn folder_of(metadata: &Value, package: &str) -> Option<PathBuf> {
    let found = metadata["packages"].as_array()?.iter().find(|p| p["name"] == package)?;
    Some(Path::new(found["manifest_path"].as_str()?).parent()?.into())
}

/// The Python of a virtual environment with the required packages, made when they have changed.
pub fn environment(folder: &Path, requirements: &Path) -> Result<PathBuf, Box<dyn std::error::Error>> {
    let python = folder.join("bin/python");
    let installed = folder.join("requirements.txt");
    let wanted =
        fs::read(requirements).map_err(|e| format!("cannot read {}: {e}", requirements.display()))?;
    if fs::read(&installed).is_ok_and(|found| found == wanted) {
        return Ok(python);
    }
    succeed(Command::new("python3").args(["-m", "venv", "--clear"]).arg(folder))?;
    succeed(Command::new(&python).args(["-m", "pip", "install", "--quiet", "-r"]).arg(requirements))?;
    fs::write(installed, wanted)?;
    Ok(python)
}

fn succeed(command: &mut Command) -> Result<(), Box<dyn std::error::Error>> {
    let status = command.status().map_err(|e| format!("cannot run {:?}: {e}", command.get_program()))?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} failed").into()) }
}

fn measure(command: &mut Command, figures: &mut Figures) -> Result<(), Box<dyn std::error::Error>> {
    let status = each_line(command.env("KILN_BENCH", "json"), |line| match figure(line) {
        Some((name, unit, value)) => {
            println!("{name}: {value:.4} {unit}");
            figures.entry(name).or_insert((unit, Vec::new())).1.push(value);
        }
        None => println!("{line}"),
    })?;
    if status.success() { Ok(()) } else { Err(format!("{command:?} failed").into()) }
}

fn figure(line: &str) -> Option<(String, String, f64)> {
    let value: Value = serde_json::from_str(line).ok()?;
    Some((value["name"].as_str()?.into(), value["unit"].as_str()?.into(), value["value"].as_f64()?))
}

/// A table of medians and their ratio, and beneath it the geometric means of the ratios of times (a rate counts
/// as the time of one) and of memory.
fn compare(ours: &Figures, peer: &Figures) -> String {
    let mut names: Vec<&String> = ours.keys().chain(peer.keys()).collect();
    names.sort();
    names.dedup();
    let width = names.iter().map(|name| name.chars().count()).max().unwrap_or(0).max(4);
    let mut text =
        format!("{:width$}  {:>10}  {:>12}  {:>12}  {:>9}\n", "name", "unit", "ours", "peer", "ours/peer");
    let (mut times, mut memory) = (Vec::new(), Vec::new());
    for name in names {
        let middle = |side: &Figures| side.get(name).map(|(_, values)| median(values));
        let unit = ours.get(name).or(peer.get(name)).map_or("", |(unit, _)| unit);
        let (ours, peer) = (middle(ours), middle(peer));
        let ratio = ours.zip(peer).map(|(ours, peer)| ours / peer);
        match unit {
            "MiB" => memory.extend(ratio),
            _ if unit.ends_with("/s") => times.extend(ratio.map(f64::recip)),
            _ => times.extend(ratio),
        }
        let [ours, peer, ratio] =
            [ours, peer, ratio].map(|x| x.map_or("–".to_string(), |x| format!("{x:.4}")));
        text += &format!("{name:width$}  {unit:>10}  {ours:>12}  {peer:>12}  {ratio:>9}\n");
    }
    for (name, ratios) in [("geometric mean of memory", memory), ("geometric mean", times)] {
        if let Some(mean) = geometric_mean(&ratios) {
            text += &format!("{name}: {mean:.4}\n");
        }
    }
    text
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    let logarithms: f64 = values.iter().map(|x| x.ln()).sum();
    (!values.is_empty()).then(|| (logarithms / values.len() as f64).exp())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() % 2 {
        1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_compared_by_name_and_what_one_side_lacks_is_a_dash() {
        let side = |pairs: &[(&str, &[f64])]| -> Figures {
            pairs.iter().map(|(name, values)| (name.to_string(), ("ms".into(), values.to_vec()))).collect()
        };
        let text = compare(&side(&[("op", &[3.0, 1.0, 2.0])]), &side(&[("op", &[4.0, 6.0]), ("x", &[1.0])]));
        let cells = |line: &str| line.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let lines: Vec<_> = text.lines().map(cells).collect();
        assert_eq!(lines[1], ["op", "ms", "2.0000", "5.0000", "0.4000"]);
        assert_eq!(lines[2], ["x", "ms", "–", "1.0000", "–"]);
    }

    #[test]
    fn geometric_means_count_rates_as_times_and_memory_apart() {
        let side = |figures: [f64; 3]| -> Figures {
            let named =
                [("op", "ms"), ("train", "tokens/s"), ("memory of op", "MiB")].into_iter().zip(figures);
            named.map(|((name, unit), value)| (name.into(), (unit.into(), vec![value]))).collect()
        };
        let text = compare(&side([1.0, 8.0, 3.0]), &side([2.0, 1.0, 1.0]));
        let lines: Vec<&str> = text.lines().rev().take(2).collect();
        assert_eq!(lines, ["geometric mean: 0.2500", "geometric mean of memory: 3.0000"]);
    }

    #[test]
    fn only_figures_are_read_from_the_output() {
        let line = r#"{"name": "op", "unit": "ms", "value": 2}"#;
        assert_eq!(figure(line), Some(("op".into(), "ms".into(), 2.0)));
        assert_eq!(figure("Running benches"), None);
        assert_eq!(figure(r#"{"name": "op"}"#), None);
    }
}
