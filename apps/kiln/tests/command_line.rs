//! The built binary as a user meets it.

use std::process::{Command, Output, Stdio};

fn kiln(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kiln")).args(arguments).output().expect("the binary starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("output is UTF-8")
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("output is UTF-8")
}

#[test]
fn list_names_every_system_for_people_and_machines() {
    let human = kiln(&["list"]);
    assert!(human.status.success() && stdout(&human).contains("gla"));
    let json = kiln(&["list", "--json"]);
    let cards: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    let cards = cards.as_array().unwrap();
    assert!(!cards.is_empty());
    for card in cards {
        for field in ["slug", "family", "title", "paper", "claim", "purpose"] {
            assert!(card[field].as_str().is_some_and(|text| !text.is_empty()), "{field} of {card}");
        }
    }
}

#[test]
fn show_gives_the_card_and_the_verbs() {
    let json = kiln(&["--json", "show", "gla"]);
    let shown: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(shown["slug"], "gla");
    assert!(shown["verbs"].as_array().unwrap().iter().any(|verb| verb["name"] == "train"), "{shown}");
    assert!(stdout(&kiln(&["show", "gla"])).contains("kiln gla train"));
}

#[test]
fn a_misspelt_system_or_verb_is_a_usage_error_that_suggests_the_right_one() {
    for arguments in [&["show", "glaa"][..], &["glaa"], &["run", "glaa"], &["lisst"]] {
        let output = kiln(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let text = stderr(&output);
        assert!(text.starts_with("error: "), "{text}");
        assert!(text.contains("gla'") || text.contains("list'"), "{text}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn impossible_options_are_usage_errors() {
    for arguments in [
        &["list", "--threads", "0"][..],
        &["list", "--json", "--quiet"],
        &["list", "--seed", "-1"],
        &["run", "gla", "--scale", "huge"],
        &["list", "--device", "abacus"],
    ] {
        assert_eq!(kiln(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

#[test]
fn a_missing_model_is_an_error_with_a_hint_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("none"), dir.path().join("graph"));
    let output = kiln(&["export", "--model", model.to_str().unwrap(), "--out", out.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(text.starts_with("error: cannot read ") && text.contains("\nhint: "), "{text}");
    assert!(!out.exists() && output.stdout.is_empty());
}

#[test]
fn completions_exist_for_every_shell_and_know_the_systems() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = kiln(&["completions", shell]);
        assert!(output.status.success() && stdout(&output).contains("gla"), "{shell}");
    }
    assert_eq!(kiln(&["completions", "tcsh"]).status.code(), Some(2));
}

#[test]
fn help_has_examples_everywhere() {
    for verb in [
        &[][..],
        &["list"],
        &["show"],
        &["run"],
        &["tour"],
        &["export"],
        &["graph", "show"],
        &["compile", "build"],
        &["completions"],
    ] {
        let arguments = [verb, &["--help"]].concat();
        let output = kiln(&arguments);
        assert!(output.status.success());
        assert!(stdout(&output).contains("Example"), "{verb:?}");
    }
}

#[test]
fn a_reader_that_leaves_early_ends_the_program_quietly() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    let output = command.arg("list").stdout(writer).stderr(Stdio::piped()).output().unwrap();
    assert_eq!((output.status.code(), stderr(&output).as_str()), (Some(0), ""));
}

/// A limit on the size of files stands in for a disk without room: writing fails in the middle of a file.
#[cfg(unix)]
#[test]
fn a_full_disk_is_an_error_that_names_the_file_and_nothing_half_written_stays() {
    let folder = tempfile::tempdir().unwrap();
    let train = format!(
        "'{}' gla train --text text.txt --d-model 32 --layers 1 --heads 2 --seq-len 32 --batch 2 --steps 3 --out model",
        env!("CARGO_BIN_EXE_kiln")
    );
    std::fs::write(folder.path().join("text.txt"), "the cat sat on the mat; ".repeat(40)).unwrap();
    let limited = format!("trap '' XFSZ; ulimit -f 40; exec {train}"); // 20 kB
    let output = Command::new("sh").args(["-c", &limited]).current_dir(folder.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("model.safetensors"), "{}", stderr(&output));
    let left: Vec<_> = std::fs::read_dir(folder.path().join("model"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(!left.iter().any(|name| name.contains("safetensors")), "{left:?}");

    // With room again the same command works.
    let again = format!("rm -r model; exec {train}");
    let output = Command::new("sh").args(["-c", &again]).current_dir(folder.path()).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
