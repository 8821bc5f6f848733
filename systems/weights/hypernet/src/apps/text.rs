//! Texts with a class each, one set for every task.

use std::fs;
use std::path::Path;

use kiln_core::{Context, Error, Result};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use serde_json::Value;

/// Rows of each class that a task needs.
const LEAST: usize = 4;

/// Texts, cut into words, and their classes.
#[derive(Debug, Clone, Default)]
pub struct Texts {
    /// Lower-case words of every text.
    pub words: Vec<Vec<String>>,
    /// `[texts]`
    pub y: Vec<usize>,
}

impl Texts {
    fn push(&mut self, text: &str, class: usize) {
        self.words.push(text.split_whitespace().map(str::to_lowercase).collect());
        self.y.push(class);
    }

    fn select(&self, rows: &[usize]) -> Self {
        Self {
            words: rows.iter().map(|&row| self.words[row].clone()).collect(),
            y: rows.iter().map(|&row| self.y[row]).collect(),
        }
    }
}

/// One task.
#[derive(Debug, Clone)]
pub struct TextTask {
    /// What it is called.
    pub name: String,
    /// What its classes are called.
    pub classes: Vec<String>,
    /// For training and validation.
    pub train: Texts,
    /// For tests.
    pub test: Texts,
}

impl TextTask {
    /// A user's file: a table, or JSON Lines with one object a row. A fifth of the rows is for tests.
    ///
    /// # Errors
    /// Names the row that lacks a text or a class, or the class that is too small.
    pub fn read(path: &Path, text: &str, label: &str, cx: &Context) -> Result<Self> {
        let rows = read_rows(path, text, label)?;
        let classes = class_names(&rows);
        let all = numbered(&rows, &classes, path)?;
        for (number, class) in classes.iter().enumerate() {
            let count = all.y.iter().filter(|&&y| y == number).count();
            if count < LEAST {
                let found = format!("the class \"{class}\" has {count} rows, needs at least {LEAST}");
                return Err(Error::input(path.display(), found));
            }
        }
        let mut order: Vec<usize> = (0..all.y.len()).collect();
        order.shuffle(&mut cx.rng("text test", 0));
        let (test, train) = order.split_at((order.len() / 5).max(1));
        let name = path.file_name().map(|name| name.to_string_lossy().to_string()).unwrap_or_default();
        let name = name.split('.').next().unwrap_or_default().to_string();
        Ok(Self { name, classes, train: all.select(train), test: all.select(test) })
    }

    /// Files for training and for tests, with the columns `text` and `label`.
    fn read_split(name: &str, train: &Path, test: &Path) -> Result<Self> {
        let (train_rows, test_rows) = (read_rows(train, "text", "label")?, read_rows(test, "text", "label")?);
        let classes = class_names(&train_rows);
        Ok(Self {
            name: name.into(),
            train: numbered(&train_rows, &classes, train)?,
            test: numbered(&test_rows, &classes, test)?,
            classes,
        })
    }
}

/// The class names in their order.
fn class_names(rows: &[(String, String)]) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = rows.iter().map(|(_, label)| label).collect();
    names.into_iter().cloned().collect()
}

fn numbered(rows: &[(String, String)], classes: &[String], path: &Path) -> Result<Texts> {
    if classes.len() < 2 {
        return Err(Error::input(
            path.display(),
            format!("has {} classes, needs at least two", classes.len()),
        ));
    }
    let mut texts = Texts::default();
    for (row, (text, label)) in rows.iter().enumerate() {
        let class = classes.iter().position(|class| class == label).ok_or_else(|| {
            let place = format!("{}, row {}", path.display(), row + 1);
            Error::input(place, format!("the class \"{label}\" is unknown"))
                .hint(format!("there are {}", classes.join(", ")))
        })?;
        texts.push(text, class);
    }
    Ok(texts)
}

/// Pairs of text and class.
fn read_rows(path: &Path, text: &str, label: &str) -> Result<Vec<(String, String)>> {
    let lacks = |row: usize, what: &str| {
        Error::input(format!("{}, row {}", path.display(), row + 1), format!("has nothing in \"{what}\""))
    };
    let is_json = path.extension().is_some_and(|end| end == "jsonl" || end == "ndjson");
    if !is_json {
        let mut table = kiln_data::Table::read(path, kiln_data::TableOptions::default())?;
        let (texts, labels) = (table.take(text)?, table.take(label)?);
        let row = |row| {
            let text = texts.text(row).ok_or_else(|| lacks(row, text))?;
            Ok((text, labels.text(row).ok_or_else(|| lacks(row, label))?))
        };
        return (0..table.rows()).map(row).collect();
    }
    let lines = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let mut rows = Vec::new();
    for (row, line) in lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let object: Value = serde_json::from_str(line).map_err(|e| {
            let place = format!("{}, row {}", path.display(), row + 1);
            Error::input(place, "is not a JSON object").caused_by(e)
        })?;
        let field = |name: &str| match object.get(name) {
            Some(Value::String(value)) if !value.trim().is_empty() => Ok(value.clone()),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => Ok(value.to_string()),
            _ => Err(lacks(row, name)),
        };
        rows.push((field(text)?, field(label)?));
    }
    if rows.is_empty() {
        return Err(Error::input(path.display(), "holds no rows"));
    }
    Ok(rows)
}

/// Sentiments and kinds of questions from the shared data, or two drawn tasks of that kind.
///
/// # Errors
/// When a file there is damaged.
pub fn bundled(cx: &Context) -> Result<Vec<TextTask>> {
    let folder = kiln_data::shared_dir().map(|shared| shared.join("data/sentiment-and-question"));
    match folder.filter(|folder| folder.is_dir()) {
        Some(folder) => ["sst2", "trec"]
            .into_iter()
            .zip(["sentiment", "question"])
            .map(|(file, name)| {
                let part = |part: &str| folder.join(format!("{file}_{part}.csv.gz"));
                TextTask::read_split(name, &part("train"), &part("test"))
            })
            .collect(),
        None => Ok(synthetic(&mut cx.rng("texts", 0))),
    }
}

/// Sentences that praise or blame, which "not" turns round, and questions by what they ask for.
pub fn synthetic<R: Rng>(rng: &mut R) -> Vec<TextTask> {
    const ROWS: [usize; 2] = [600, 300];
    let mut part = |count: usize, draw: fn(&mut R) -> (String, usize)| {
        let mut texts = Texts::default();
        for _ in 0..count {
            let (text, class) = draw(rng);
            texts.push(&text, class);
        }
        texts
    };
    let names = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    vec![
        TextTask {
            name: "sentiment".into(),
            classes: names(&["blame", "praise"]),
            train: part(ROWS[0], sentiment),
            test: part(ROWS[1], sentiment),
        },
        TextTask {
            name: "question".into(),
            classes: names(&["person", "place", "time", "number"]),
            train: part(ROWS[0], question),
            test: part(ROWS[1], question),
        },
    ]
}

/// What sentences and questions are about.
const THINGS: [&str; 8] = ["film", "story", "plot", "acting", "music", "ending", "dialogue", "cast"];

fn sentiment<R: Rng>(rng: &mut R) -> (String, usize) {
    const WORDS: [[&str; 6]; 2] = [
        ["dull", "tired", "clumsy", "stale", "endless", "silly"],
        ["moving", "funny", "clever", "fresh", "gripping", "lovely"],
    ];
    let (class, turned) = (rng.random_range(0..2), rng.random_ratio(1, 3));
    let word = WORDS[if turned { 1 - class } else { class }][rng.random_range(0..6)];
    let not = if turned { "not " } else { "" };
    let [first, second] = [0; 2].map(|_| THINGS[rng.random_range(0..THINGS.len())]);
    (format!("the {first} is {not}{word} and the {second} too"), class)
}

fn question<R: Rng>(rng: &mut R) -> (String, usize) {
    const BEGINNINGS: [[&str; 3]; 4] = [
        ["who wrote", "which author made", "who thought of"],
        ["where was", "in which town was", "what is the country of"],
        ["when was", "in what year came", "what date has"],
        ["how many saw", "what number counts", "how much cost"],
    ];
    let class = rng.random_range(0..BEGINNINGS.len());
    let beginning = BEGINNINGS[class][rng.random_range(0..3)];
    let [first, second] = [0; 2].map(|_| THINGS[rng.random_range(0..THINGS.len())]);
    (format!("{beginning} the {first} of the {second} ?"), class)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drawn_texts_have_all_classes_and_not_turns_a_sentence_round() {
        let tasks = synthetic(&mut kiln_core::random_stream(0, "test", 0));
        for task in &tasks {
            for class in 0..task.classes.len() {
                assert!(task.train.y.contains(&class) && task.test.y.contains(&class));
            }
        }
        let sentiment = &tasks[0].train;
        for (words, &y) in sentiment.words.iter().zip(&sentiment.y) {
            let good = ["moving", "funny", "clever", "fresh", "gripping", "lovely"];
            let praised = words.iter().any(|word| good.contains(&word.as_str()));
            let turned = words.iter().any(|word| word == "not");
            assert_eq!(y == 1, praised != turned, "{words:?}");
        }
    }
}
