//! What tests of a system's verbs stand on.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use crate::{Context, Error, OutputMode, Result, System};

/// A folder for the files of one test, a system whose verbs are run there, and a context that keeps what they print.
pub struct Desk {
    /// The context, which prints JSON.
    pub cx: Context,
    folder: tempfile::TempDir,
    system: &'static dyn System,
}

impl Desk {
    /// An empty desk.
    ///
    /// # Panics
    /// When no temporary folder can be made.
    pub fn new(system: &'static dyn System) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cx = Context { output: OutputMode::Json, ..Context::for_tests(folder.path()) };
        Self { cx, folder, system }
    }

    /// Where a file of the desk lies.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Puts a file on the desk.
    ///
    /// # Panics
    /// When it cannot be written.
    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.path(name), contents).unwrap();
    }

    /// Runs a verb; in `line`, `@` stands for this folder and `%` for the crate's `tests/data`.
    ///
    /// # Errors
    /// As the verb.
    pub fn run(&self, line: &str) -> Result<()> {
        let here = format!("{}/", self.folder.path().display());
        let data = std::env::current_dir().unwrap().join("tests/data/");
        let words = line.split_whitespace();
        let words = words.map(|word| word.replace('@', &here).replace('%', &data.display().to_string()));
        let arguments = std::iter::once(self.system.card().slug.to_string()).chain(words);
        let matches =
            self.system.command().try_get_matches_from(arguments).map_err(|e| Error::usage(e.to_string()))?;
        self.cx.take_printed();
        self.system.execute(&matches, &self.cx)
    }

    /// What a verb prints.
    ///
    /// # Panics
    /// When it fails or prints something else than JSON.
    pub fn json(&self, line: &str) -> Value {
        self.run(line).unwrap_or_else(|error| panic!("`{line}`: {error}"));
        serde_json::from_str(&self.cx.take_printed()).unwrap()
    }

    /// Why a verb refuses, with the hint.
    ///
    /// # Panics
    /// When it succeeds, or has printed something.
    pub fn refusal(&self, line: &str) -> String {
        let error = self.run(line).unwrap_err();
        assert_eq!(self.cx.take_printed(), "");
        format!("{error}; {}", error.hint_text().unwrap_or("no hint"))
    }

    /// Checks that a verb refuses with these words.
    ///
    /// # Panics
    /// When it does not.
    pub fn assert_refused(&self, line: &str, words: &str) {
        let refusal = self.refusal(line);
        assert!(refusal.contains(words), "`{line}` gave: {refusal}");
    }
}
