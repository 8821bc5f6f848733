//! Labelled sequences from CSV, JSONL and NPZ files and folders of images, and as batches.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Error, Result, Values};
use kiln_data::{ImageOptions, Images, read_npz};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layer::Kept;
use crate::model::{Input, Steps};

/// What a sequence is made of, as it stands in a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Text, in UTF-8.
    Text(Vec<u8>),
    /// Symbols.
    Symbols(Vec<String>),
    /// Steps of so many numbers, one after another.
    Numbers(Vec<f32>, usize),
}

/// A sequence and its label, where it has one.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// Its steps.
    pub content: Content,
    /// What is to be told from them.
    pub label: Option<String>,
}

/// How text becomes steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TextUnit {
    /// Every byte is one
    #[default]
    Byte,
    /// Every word between spaces is one, from a vocabulary of those in the training data
    Word,
}

/// Which columns of a table, or fields of a JSONL line, are read.
#[derive(Debug, Clone)]
pub struct Columns {
    /// The text.
    pub text: String,
    /// The label.
    pub label: String,
}

/// Reads sequences; the end of the name tells the format.
///
/// - CSV: a column of text, or (where there is none of that name) numbers in all columns but the label's, a step each
/// - JSONL: `{"text": "..", "label": ..}`, `{"tokens": [..], "label": ..}` with words or whole numbers, or
///   `{"values": [..], "label": ..}` with numbers, or lists of numbers, a step each
/// - NPZ: `x [rows, n]` of integers, or `[rows, n]` or `[rows, n, width]` of floats, and `y [rows]`
/// - a folder with one folder of PNG or JPEG files a class, or (to be labelled) the files themselves: a pixel is a step,
///   row after row
///
/// # Errors
/// When the file is missing, malformed or empty, or a sequence has no steps or numbers that are not finite.
pub fn read(path: &Path, columns: &Columns) -> Result<Vec<Sequence>> {
    let sequences = match path.extension().and_then(|extension| extension.to_str()) {
        _ if path.is_dir() => read_images(path),
        Some("csv") => read_csv(path, columns),
        Some("jsonl" | "json") => read_jsonl(path, columns),
        Some("npz") => read_arrays(path),
        _ => Err(Error::usage(format!("{} is neither .csv, .jsonl, .npz nor a folder", path.display()))
            .hint("the format is told by the end of the name")),
    }?;
    if sequences.is_empty() {
        return Err(Error::input(path.display(), "holds no sequences"));
    }
    for (row, sequence) in sequences.iter().enumerate() {
        let place = || format!("{}, row {}", path.display(), row + 1);
        let steps = match &sequence.content {
            Content::Text(text) => text.len(),
            Content::Symbols(symbols) => symbols.len(),
            Content::Numbers(numbers, width) => {
                if let Some(at) = numbers.iter().position(|x| !x.is_finite()) {
                    return Err(Error::input(place(), format!("step {} is not a finite number", at / width)));
                }
                numbers.len() / width
            }
        };
        if steps == 0 {
            return Err(Error::input(place(), "is empty").hint("a sequence needs at least one step"));
        }
    }
    Ok(sequences)
}

fn read_csv(path: &Path, columns: &Columns) -> Result<Vec<Sequence>> {
    let malformed = |e: csv::Error| Error::input(path.display(), "is not a CSV table").caused_by(e);
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    let mut reader = csv::Reader::from_reader(file);
    let heads = reader.headers().map_err(malformed)?.clone();
    let place = |name: &str| heads.iter().position(|head| head.trim() == name);
    let (text, label) = (place(&columns.text), place(&columns.label));
    let records = reader.records().enumerate();
    records
        .map(|(row, record)| {
            let record = record.map_err(malformed)?;
            let content = match text {
                Some(text) => Content::Text(record.get(text).unwrap_or_default().into()),
                None => {
                    let cells = record.iter().enumerate().filter(|(column, _)| Some(*column) != label);
                    let number = |(column, cell): (usize, &str)| {
                        cell.trim().parse::<f32>().map_err(|_| {
                            let head = heads.get(column).unwrap_or_default();
                            let found = format!("column \"{head}\" is \"{cell}\", not a number");
                            Error::input(format!("{}, row {}", path.display(), row + 1), found).hint(format!(
                                "there is no column \"{}\", so all but \"{}\" must be numbers; --text-col names the text",
                                columns.text, columns.label
                            ))
                        })
                    };
                    Content::Numbers(cells.map(number).collect::<Result<_>>()?, 1)
                }
            };
            let label = label.and_then(|label| record.get(label)).map(|label| label.trim().to_string());
            Ok(Sequence { content, label: label.filter(|label| !label.is_empty()) })
        })
        .collect()
}

fn read_jsonl(path: &Path, columns: &Columns) -> Result<Vec<Sequence>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let wrong = |found: String| {
                Error::input(format!("{}, line {}", path.display(), number + 1), found).hint(format!(
                    "a line is {{\"{}\": \"..\", \"{}\": ..}}, or has \"tokens\" or \"values\" instead of the text",
                    columns.text, columns.label
                ))
            };
            let value: Value =
                serde_json::from_str(line).map_err(|e| wrong("is not valid JSON".into()).caused_by(e))?;
            let content = match (&value[&columns.text], &value["tokens"], &value["values"]) {
                (Value::String(text), ..) => Content::Text(text.clone().into()),
                (_, Value::Array(tokens), _) => {
                    let symbol = |token: &Value| json_word(token).ok_or_else(|| wrong(format!("has the token {token}")));
                    Content::Symbols(tokens.iter().map(symbol).collect::<Result<_>>()?)
                }
                (_, _, Value::Array(values)) => json_numbers(values)
                    .ok_or_else(|| wrong("\"values\" are not numbers, or lists of equally many".into()))?,
                _ => return Err(wrong(format!("has neither \"{}\", \"tokens\" nor \"values\"", columns.text))),
            };
            let label = match &value[&columns.label] {
                Value::Null => None,
                label => Some(json_word(label).ok_or_else(|| wrong(format!("has the label {label}")))?),
            };
            Ok(Sequence { content, label })
        })
        .collect()
}

/// A word, a whole number or a truth value as text.
fn json_word(value: &Value) -> Option<String> {
    match value {
        Value::String(word) => Some(word.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(yes) => Some(u8::from(*yes).to_string()),
        _ => None,
    }
}

fn json_numbers(values: &[Value]) -> Option<Content> {
    let number = |value: &Value| value.as_f64().map(|x| x as f32);
    let width = values.first().and_then(Value::as_array).map_or(1, Vec::len);
    let steps: Option<Vec<Vec<f32>>> = values
        .iter()
        .map(|step| match step {
            Value::Array(step) => step.iter().map(number).collect(),
            step => number(step).map(|x| vec![x]),
        })
        .collect();
    let steps = steps?;
    let even = width > 0 && steps.iter().all(|step| step.len() == width);
    even.then(|| Content::Numbers(steps.concat(), width))
}

fn read_arrays(path: &Path) -> Result<Vec<Sequence>> {
    let mut file = read_npz(path)?;
    let wrong = |found: String| {
        Error::input(path.display(), found).hint(
            "expected x [rows, n] of integers, or [rows, n] or [rows, n, width] of floats, and y [rows]",
        )
    };
    let x = file.take("x")?;
    let (rows, n, width) = match x.shape[..] {
        [rows, n] => (rows, n, 1),
        [rows, n, width] if width > 0 => (rows, n, width),
        _ => return Err(wrong(format!("\"x\" has the shape {:?}", x.shape))),
    };
    let contents: Vec<Content> = match (&x.values, x.shape.len()) {
        (Values::Int(ids), 2) if n > 0 => {
            ids.chunks(n).map(|row| Content::Symbols(row.iter().map(i64::to_string).collect())).collect()
        }
        (Values::Float(values), _) if n > 0 => {
            values.chunks(n * width).map(|row| Content::Numbers(row.to_vec(), width)).collect()
        }
        _ => return Err(wrong(format!("\"x\" has the shape {:?} and no rows of steps", x.shape))),
    };
    let labels: Vec<Option<String>> = match file.take("y") {
        Ok(y) if y.shape == [rows] => match y.values {
            Values::Int(labels) => labels.iter().map(|label| Some(label.to_string())).collect(),
            Values::Float(_) => {
                return Err(wrong("\"y\" holds floats, must hold the numbers of classes".into()));
            }
        },
        Ok(y) => return Err(wrong(format!("\"y\" has the shape {:?}, \"x\" {:?}", y.shape, x.shape))),
        Err(_) => vec![None; rows],
    };
    Ok(contents.into_iter().zip(labels).map(|(content, label)| Sequence { content, label }).collect())
}

fn read_images(path: &Path) -> Result<Vec<Sequence>> {
    let images = Images::read(path, &ImageOptions { unlabelled: true, ..ImageOptions::default() })?;
    let [channels, height, width] = images.shape;
    let pixels = height * width;
    let sequence = |index| {
        let image = images.image(index);
        let steps =
            (0..pixels).flat_map(|pixel| (0..channels).map(move |channel| image[channel * pixels + pixel]));
        let label = images.labels.get(index).map(|&class| images.classes[class].clone());
        Sequence { content: Content::Numbers(steps.collect(), channels), label }
    };
    Ok((0..images.len()).map(sequence).collect())
}

/// What turns sequences and labels into numbers; kept in the model folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Coding {
    /// How steps are coded.
    pub steps: StepCoding,
    /// The labels.
    pub classes: Vec<String>,
    /// Longest sequence that is read.
    pub max_len: usize,
    /// Whether longer ones are cut off at the end, instead of being refused.
    #[serde(default)]
    pub truncate: bool,
}

/// How steps are coded.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StepCoding {
    /// Bytes of a text.
    Bytes,
    /// Words or symbols of this vocabulary.
    Words(Vec<String>),
    /// So many numbers a step, brought to mean 0 and deviation 1 over the training data.
    Numbers {
        /// Numbers a step.
        width: usize,
        /// Of all numbers.
        mean: f32,
        /// Of all numbers; above 0.
        deviation: f32,
    },
}

impl Coding {
    /// Learns vocabulary, scale and classes from training data; `place` names them in messages.
    ///
    /// # Errors
    /// When labels are missing, or sequences are too long or of different kinds.
    pub fn of(
        sequences: &[Sequence],
        unit: TextUnit,
        max_len: usize,
        truncate: bool,
        place: &Path,
    ) -> Result<Self> {
        let mut classes: Vec<String> =
            sequences.iter().filter_map(|sequence| sequence.label.clone()).collect();
        sort_numbers_first(&mut classes);
        let steps = match (&sequences[0].content, unit) {
            (Content::Text(_), TextUnit::Byte) => StepCoding::Bytes,
            (Content::Numbers(_, width), _) => {
                let numbers = || {
                    sequences.iter().flat_map(|sequence| match &sequence.content {
                        Content::Numbers(numbers, _) => numbers.as_slice(),
                        _ => &[],
                    })
                };
                let count = numbers().count().max(1) as f64;
                let mean = numbers().map(|&x| f64::from(x)).sum::<f64>() / count;
                let square = numbers().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
                let deviation = if square > 0.0 { square.sqrt() as f32 } else { 1.0 };
                StepCoding::Numbers { width: *width, mean: mean as f32, deviation }
            }
            _ => {
                let mut words: Vec<String> = sequences
                    .iter()
                    .flat_map(|sequence| words(&sequence.content))
                    .map(str::to_string)
                    .collect();
                sort_numbers_first(&mut words);
                StepCoding::Words(words)
            }
        };
        let coding = Self { steps, classes, max_len, truncate };
        coding.check(sequences, place, true)?;
        Ok(coding)
    }

    /// The kind of steps that a network gets.
    pub fn input(&self) -> Input {
        match &self.steps {
            StepCoding::Bytes => Input::Symbols(256),
            StepCoding::Words(words) => Input::Symbols(words.len()),
            StepCoding::Numbers { width, .. } => Input::Numbers(*width),
        }
    }

    /// Steps of a sequence, before any are cut off.
    fn length(&self, content: &Content) -> usize {
        match (&self.steps, content) {
            (_, Content::Numbers(numbers, width)) => numbers.len() / width,
            (StepCoding::Bytes, Content::Text(text)) => text.len(),
            (_, content) => words(content).count(),
        }
    }

    /// Steps that are read of a sequence.
    pub fn read_length(&self, sequence: &Sequence) -> usize {
        self.length(&sequence.content).min(self.max_len)
    }

    /// Makes sure that all data can be encoded.
    ///
    /// # Errors
    /// Names the first sequence that is too long, of another kind, or has an unknown word or label.
    pub fn check(&self, sequences: &[Sequence], place: &Path, labelled: bool) -> Result<()> {
        let vocabulary = self.vocabulary();
        let classes = numbered(&self.classes);
        for (row, Sequence { content, label }) in sequences.iter().enumerate() {
            let wrong = |found: String| Error::input(format!("{}, row {}", place.display(), row + 1), found);
            match (&self.steps, content) {
                (StepCoding::Numbers { width, .. }, Content::Numbers(_, found)) if found == width => {}
                (StepCoding::Numbers { width, .. }, Content::Numbers(_, found)) => {
                    return Err(wrong(format!("has {found} numbers a step, must have {width}")));
                }
                (StepCoding::Bytes, Content::Text(_)) => {}
                (StepCoding::Words(_), Content::Text(_) | Content::Symbols(_)) => {
                    if let Some((at, word)) =
                        words(content).enumerate().find(|(_, word)| !vocabulary.contains_key(word))
                    {
                        let found = format!(
                            "step {at} is \"{word}\", which is not among the {} known",
                            vocabulary.len()
                        );
                        return Err(wrong(found));
                    }
                }
                (StepCoding::Bytes, _) => return Err(wrong("is not a text, as the others are".into())),
                (StepCoding::Words(_), _) => {
                    return Err(wrong("is not made of words, as the others are".into()));
                }
                (StepCoding::Numbers { .. }, _) => {
                    return Err(wrong("is not made of numbers, as the others are".into()));
                }
            }
            let length = self.length(content);
            if length == 0 {
                return Err(wrong("has no steps".into()));
            }
            if length > self.max_len && !self.truncate {
                return Err(wrong(format!("has {length} steps, more than --max-len {}", self.max_len))
                    .hint("--truncate cuts longer sequences off, a larger --max-len reads them whole"));
            }
            match label {
                None if labelled => {
                    return Err(wrong("has no label".into()).hint("--label-col names the label"));
                }
                Some(label) if labelled && !classes.contains_key(label.as_str()) => {
                    let known = self.classes.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
                    return Err(wrong(format!("has the label \"{label}\", which the model does not know"))
                        .hint(format!("it knows: {known}")));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A sequence cut into pieces of at most `steps` steps, at the seams of its bytes, words or numbers.
    pub fn pieces(&self, sequence: &Sequence, steps: usize) -> Vec<Sequence> {
        let piece = |content| Sequence { content, label: None };
        match (&self.steps, &sequence.content) {
            (_, Content::Numbers(numbers, width)) => numbers
                .chunks(steps * width)
                .map(|part| piece(Content::Numbers(part.to_vec(), *width)))
                .collect(),
            (StepCoding::Bytes, Content::Text(text)) => {
                text.chunks(steps).map(|part| piece(Content::Text(part.to_vec()))).collect()
            }
            (_, content) => {
                let words: Vec<String> = words(content).map(str::to_string).collect();
                words.chunks(steps).map(|part| piece(Content::Symbols(part.to_vec()))).collect()
            }
        }
    }

    fn vocabulary(&self) -> HashMap<&str, i64> {
        match &self.steps {
            StepCoding::Words(words) => numbered(words),
            _ => HashMap::new(),
        }
    }

    /// The steps of some sequences that passed [`check`](Self::check), padded to the longest; `None` where none is padded.
    pub fn encode(&self, sequences: &[&Sequence], device: &Device) -> (Steps, Option<Kept>) {
        let lengths: Vec<usize> = sequences.iter().map(|sequence| self.read_length(sequence)).collect();
        let (batch, time) = (sequences.len(), lengths.iter().copied().max().unwrap_or(0));
        let seen: Vec<bool> = lengths.iter().flat_map(|&length| (0..time).map(move |t| t < length)).collect();
        let kept = seen
            .contains(&false)
            .then(|| Kept::new(Tensor::<2, Bool>::from_data(TensorData::new(seen, [batch, time]), device)));
        if let StepCoding::Numbers { width, mean, deviation } = self.steps {
            let mut values = vec![0.0f32; batch * time * width];
            for (row, sequence) in values.chunks_exact_mut(time * width).zip(sequences) {
                if let Content::Numbers(numbers, _) = &sequence.content {
                    row.iter_mut().zip(numbers).for_each(|(value, x)| *value = (x - mean) / deviation);
                }
            }
            let values = TensorData::new(values, [batch, time, width]);
            return (Steps::Numbers(Tensor::from_data(values, device)), kept);
        }
        let vocabulary = self.vocabulary();
        let mut ids = vec![0i64; batch * time];
        for (row, sequence) in ids.chunks_exact_mut(time).zip(sequences) {
            match (&self.steps, &sequence.content) {
                (StepCoding::Bytes, Content::Text(text)) => {
                    row.iter_mut().zip(text).for_each(|(id, &byte)| *id = byte.into());
                }
                (_, content) => {
                    let known = words(content).map(|word| vocabulary.get(word).copied().unwrap_or(0));
                    row.iter_mut().zip(known).for_each(|(id, known)| *id = known);
                }
            }
        }
        (Steps::Ids(Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, time]), device)), kept)
    }

    /// The number of a sequence's label among the classes; 0 where it has none.
    pub fn class(&self, sequence: &Sequence) -> usize {
        let place = |label: &String| self.classes.iter().position(|class| class == label);
        sequence.label.as_ref().and_then(place).unwrap_or(0)
    }
}

/// The words of a text, or the symbols.
fn words(content: &Content) -> Box<dyn Iterator<Item = &str> + '_> {
    match content {
        Content::Text(text) => Box::new(str::from_utf8(text).unwrap_or_default().split_whitespace()),
        Content::Symbols(symbols) => Box::new(symbols.iter().map(String::as_str)),
        Content::Numbers(..) => Box::new(std::iter::empty()),
    }
}

fn numbered(names: &[String]) -> HashMap<&str, i64> {
    names.iter().map(String::as_str).zip(0..).collect()
}

/// Without repeats, whole numbers by size before words.
fn sort_numbers_first(names: &mut Vec<String>) {
    names.sort_by(|a, b| match (a.parse::<i64>(), b.parse::<i64>()) {
        (Ok(a), Ok(b)) => a.cmp(&b),
        (Ok(_), Err(_)) => std::cmp::Ordering::Less,
        (Err(_), Ok(_)) => std::cmp::Ordering::Greater,
        _ => a.cmp(b),
    });
    names.dedup();
}
