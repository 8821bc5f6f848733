//! Labelled sequences of tokens, from JSONL, CSV and NPZ files, and as batches.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use kiln_core::{Error, Result, Values};
use kiln_data::read_npz;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::{Input, Target, Tokens};

/// A token as it stands in a file.
#[derive(Debug, Clone, PartialEq)]
pub enum Token {
    /// A word, or a whole number.
    Symbol(String),
    /// Numbers.
    Vector(Vec<f32>),
}

/// A sequence and its labels: one a token or one in all; none where a file has none.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// The tokens.
    pub tokens: Vec<Token>,
    /// The labels.
    pub labels: Vec<String>,
}

/// Reads labelled sequences; the end of the name tells the format.
///
/// - JSONL: `{"tokens": [..], "labels": [..]}` or `{"tokens": [..], "label": ..}` a line; tokens are whole numbers, words,
///   or lists of numbers
/// - CSV: a row a sequence, columns `t0, t1, ..` and `label` or `label0, label1, ..`; empty cells at the end of a row
///   shorten the sequence
/// - NPZ: `x [rows, n]` of integers or `[rows, n, width]` of floats, `y [rows]` or `[rows, n]`, optionally `mask [rows, n]`
///
/// # Errors
/// When the file is missing, malformed or empty; the message names the row.
pub fn read(path: &Path) -> Result<Vec<Sequence>> {
    let sequences = match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl" | "json") => read_jsonl(path),
        Some("csv") => read_csv(path),
        Some("npz") => read_arrays(path),
        _ => Err(Error::usage(format!("{} is neither .jsonl, .csv nor .npz", path.display()))
            .hint("the format is told by the end of the name")),
    }?;
    if sequences.is_empty() {
        return Err(Error::input(path.display(), "holds no sequences"));
    }
    for (row, sequence) in sequences.iter().enumerate() {
        let place = format!("{}, sequence {}", path.display(), row + 1);
        if sequence.tokens.is_empty() {
            return Err(Error::input(place, "has no tokens"));
        }
        let finite = |token: &Token| match token {
            Token::Vector(vector) => vector.iter().all(|x| x.is_finite()),
            Token::Symbol(_) => true,
        };
        if let Some(at) = sequence.tokens.iter().position(|token| !finite(token)) {
            return Err(Error::input(place, format!("token {at} is not a finite number")));
        }
    }
    Ok(sequences)
}

fn read_jsonl(path: &Path) -> Result<Vec<Sequence>> {
    let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(number, line)| {
            let wrong = |found: String| {
                Error::input(format!("{}, line {}", path.display(), number + 1), found).hint(
                    "a line is {\"tokens\": [..], \"labels\": [..]} or {\"tokens\": [..], \"label\": ..}",
                )
            };
            let value: Value =
                serde_json::from_str(line).map_err(|e| wrong("is not valid JSON".into()).caused_by(e))?;
            let tokens = value["tokens"].as_array().ok_or_else(|| wrong("has no list \"tokens\"".into()))?;
            let token = |(at, value): (usize, &Value)| {
                json_token(value).ok_or_else(|| {
                    wrong(format!("token {at} is {value}, neither a word, a number nor numbers"))
                })
            };
            let tokens = tokens.iter().enumerate().map(token).collect::<Result<Vec<_>>>()?;
            let label = |(at, value): (usize, &Value)| {
                json_label(value)
                    .ok_or_else(|| wrong(format!("label {at} is {value}, neither a word nor a number")))
            };
            let labels = match (&value["labels"], &value["label"]) {
                (Value::Array(labels), _) => {
                    labels.iter().enumerate().map(label).collect::<Result<Vec<_>>>()?
                }
                (Value::Null, Value::Null) => Vec::new(),
                (Value::Null, one) => vec![label((0, one))?],
                (other, _) => return Err(wrong(format!("\"labels\" is {other}, not a list"))),
            };
            Ok(Sequence { tokens, labels })
        })
        .collect()
}

fn json_token(value: &Value) -> Option<Token> {
    match value {
        Value::String(word) => Some(Token::Symbol(word.clone())),
        Value::Number(number) if number.is_i64() || number.is_u64() => {
            Some(Token::Symbol(number.to_string()))
        }
        Value::Number(number) => Some(Token::Vector(vec![number.as_f64()? as f32])),
        Value::Array(numbers) => {
            numbers.iter().map(|x| x.as_f64().map(|x| x as f32)).collect::<Option<_>>().map(Token::Vector)
        }
        _ => None,
    }
}

fn json_label(value: &Value) -> Option<String> {
    match value {
        Value::String(word) => Some(word.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(yes) => Some(u8::from(*yes).to_string()),
        _ => None,
    }
}

fn read_csv(path: &Path) -> Result<Vec<Sequence>> {
    let malformed = |e: csv::Error| Error::input(path.display(), "is not a CSV table").caused_by(e);
    let file = fs::File::open(path).map_err(Error::io("read", path))?;
    let mut reader = csv::Reader::from_reader(file);
    let heads = reader.headers().map_err(malformed)?.clone();
    let columns = |prefix: &str| -> Vec<usize> {
        let place = |i: usize| heads.iter().position(|head| head.trim() == format!("{prefix}{i}"));
        (0..).map_while(place).collect()
    };
    let tokens = columns("t");
    let mut labels = columns("label");
    if labels.is_empty() {
        labels.extend(heads.iter().position(|head| head.trim() == "label"));
    }
    if tokens.is_empty() {
        let found = heads.iter().collect::<Vec<_>>().join(", ");
        return Err(Error::input(path.display(), format!("has no column t0; its columns are {found}"))
            .hint("columns are t0, t1, .. and label, or label0, label1, .."));
    }
    let records = reader.records().enumerate();
    records
        .map(|(row, record)| {
            let record = record.map_err(malformed)?;
            let cells = |columns: &[usize]| -> Vec<String> {
                let cell = |&column: &usize| record.get(column).unwrap_or_default().trim().to_string();
                columns.iter().map(cell).take_while(|cell| !cell.is_empty()).collect()
            };
            let tokens = cells(&tokens);
            let filled = record.iter().filter(|cell| !cell.trim().is_empty()).count();
            let labels = cells(&labels);
            if filled < tokens.len() + labels.len() || tokens.is_empty() {
                return Err(Error::input(
                    format!("{}, row {}", path.display(), row + 1),
                    "has a gap or no tokens",
                ));
            }
            // A number that is not whole is a vector of one.
            let token = |cell: String| match cell.parse::<f32>() {
                Ok(x) if cell.parse::<i64>().is_err() => Token::Vector(vec![x]),
                _ => Token::Symbol(cell),
            };
            Ok(Sequence { tokens: tokens.into_iter().map(token).collect(), labels })
        })
        .collect()
}

fn read_arrays(path: &Path) -> Result<Vec<Sequence>> {
    let mut file = read_npz(path)?;
    let wrong = |found: String| {
        Error::input(path.display(), found)
            .hint("expected x [rows, n] of integers or [rows, n, width] of floats, y [rows] or [rows, n]")
    };
    let x = file.take("x")?;
    let (rows, n) = match x.shape[..] {
        [rows, n] | [rows, n, _] => (rows, n),
        _ => return Err(wrong(format!("\"x\" has the shape {:?}", x.shape))),
    };
    let tokens: Vec<Token> = match (&x.values, x.shape.get(2)) {
        (Values::Int(ids), None) => ids.iter().map(|id| Token::Symbol(id.to_string())).collect(),
        (Values::Float(values), width) => {
            let width = width.copied().unwrap_or(1).max(1);
            values.chunks(width).map(|vector| Token::Vector(vector.to_vec())).collect()
        }
        _ => return Err(wrong("\"x\" has three axes but integers".into())),
    };
    let labels = match file.take("y") {
        Ok(y) if y.shape == [rows] || y.shape == [rows, n] => {
            let Values::Int(labels) = y.values else {
                return Err(wrong("\"y\" holds floats, must hold the numbers of classes".into()));
            };
            labels
        }
        Ok(y) => return Err(wrong(format!("\"y\" has the shape {:?}, \"x\" {:?}", y.shape, x.shape))),
        Err(_) => Vec::new(),
    };
    let mask = match file.take("mask") {
        Ok(mask) if mask.shape == [rows, n] => {
            let seen = match mask.values {
                Values::Int(values) => values.iter().map(|&x| x != 0).collect(),
                Values::Float(values) => values.iter().map(|&x| x != 0.0).collect(),
            };
            Some::<Vec<bool>>(seen)
        }
        Ok(mask) => {
            return Err(wrong(format!("\"mask\" has the shape {:?}, \"x\" {:?}", mask.shape, x.shape)));
        }
        Err(_) => None,
    };
    let per_token = labels.len() == rows * n && !(n == 1 && labels.len() == rows);
    let sequence = |row: usize| {
        let kept = |at: &usize| mask.as_ref().is_none_or(|mask| mask[*at]);
        let places: Vec<usize> = (row * n..(row + 1) * n).filter(kept).collect();
        let labels = match (labels.is_empty(), per_token) {
            (true, _) => Vec::new(),
            (_, true) => places.iter().map(|&at| labels[at].to_string()).collect(),
            (_, false) => vec![labels[row].to_string()],
        };
        Sequence { tokens: places.iter().map(|&at| tokens[at].clone()).collect(), labels }
    };
    Ok((0..rows).map(sequence).collect())
}

/// What turns tokens and labels into numbers; kept in the model folder.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Coding {
    /// How tokens become vectors.
    pub input: Input,
    /// What a label belongs to.
    pub target: Target,
    /// The symbols, for [`Input::Embed`].
    pub vocabulary: Vec<String>,
    /// The labels.
    pub classes: Vec<String>,
}

/// Which kind of input is wanted, before the data are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    /// Symbols are embedded.
    Embed,
    /// Residues of a modulus are turned into cosines and sines.
    Fourier(u64),
    /// Vectors are taken as they are.
    Numeric,
}

/// Frequencies of residues, or fewer where the modulus has no more.
const FREQUENCIES: usize = 8;

impl Coding {
    /// Learns vocabulary and classes from data; `place` names them in messages.
    ///
    /// # Errors
    /// When labels are missing or tokens do not fit the kind of input.
    pub fn of(sequences: &[Sequence], kind: InputKind, target: Target, place: &Path) -> Result<Self> {
        let mut classes: Vec<String> =
            sequences.iter().flat_map(|sequence| sequence.labels.clone()).collect();
        sort_numbers_first(&mut classes);
        let (input, vocabulary) = match kind {
            InputKind::Embed => {
                let symbols =
                    sequences.iter().flat_map(|sequence| &sequence.tokens).filter_map(|token| match token {
                        Token::Symbol(symbol) => Some(symbol.clone()),
                        Token::Vector(_) => None,
                    });
                let mut vocabulary: Vec<String> = symbols.collect();
                sort_numbers_first(&mut vocabulary);
                (Input::Embed(vocabulary.len()), vocabulary)
            }
            InputKind::Fourier(modulus) => {
                let frequencies = FREQUENCIES.min((modulus / 2).max(1) as usize);
                (Input::Fourier { modulus, frequencies }, Vec::new())
            }
            InputKind::Numeric => {
                let width =
                    sequences.iter().flat_map(|sequence| &sequence.tokens).map(numbers).next().flatten();
                (Input::Numeric(width.map_or(0, |vector| vector.len())), Vec::new())
            }
        };
        let coding = Self { input, target, vocabulary, classes };
        coding.check(sequences, place, true)?;
        Ok(coding)
    }

    /// Makes sure that all data can be encoded.
    ///
    /// # Errors
    /// Names the first sequence, token or label that cannot.
    pub fn check(&self, sequences: &[Sequence], place: &Path, labelled: bool) -> Result<()> {
        let (vocabulary, classes) = (numbered(&self.vocabulary), numbered(&self.classes));
        for (row, sequence) in sequences.iter().enumerate() {
            let place = || format!("{}, sequence {}", place.display(), row + 1);
            for (at, token) in sequence.tokens.iter().enumerate() {
                self.check_token(token, &vocabulary)
                    .map_err(|found| Error::input(place(), format!("token {at} {found}")))?;
            }
            if !labelled && sequence.labels.is_empty() {
                continue;
            }
            let wanted = match self.target {
                Target::Token => sequence.tokens.len(),
                Target::Sequence => 1,
            };
            if sequence.labels.len() != wanted {
                let found = format!("has {} labels, must have {wanted}", sequence.labels.len());
                return Err(
                    Error::input(place(), found).hint("--task says whether tokens or sequences have labels")
                );
            }
            if let Some(label) = sequence.labels.iter().find(|label| !classes.contains_key(label.as_str())) {
                let known = self.classes.iter().take(8).cloned().collect::<Vec<_>>().join(", ");
                return Err(Error::input(
                    place(),
                    format!("has the label \"{label}\", which the model does not know"),
                )
                .hint(format!("it knows: {known}")));
            }
        }
        Ok(())
    }

    fn check_token(&self, token: &Token, vocabulary: &HashMap<&str, i64>) -> Result<(), String> {
        match (&self.input, token) {
            (Input::Embed(_), Token::Symbol(symbol)) if vocabulary.contains_key(symbol.as_str()) => Ok(()),
            (Input::Embed(_), Token::Symbol(symbol)) => {
                Err(format!("is \"{symbol}\", which is not in the vocabulary of {}", self.vocabulary.len()))
            }
            (Input::Embed(_), Token::Vector(_)) => {
                Err("is a vector, but symbols are embedded; use --input numeric".into())
            }
            (Input::Fourier { modulus, .. }, token) => match token {
                Token::Symbol(symbol) if symbol.parse::<u64>().is_ok_and(|x| x < *modulus) => Ok(()),
                other => Err(format!("is {other:?}, must be a whole number below the modulus {modulus}")),
            },
            (Input::Numeric(width), token) => match numbers(token) {
                Some(vector) if vector.len() == *width => Ok(()),
                Some(vector) => Err(format!("has {} numbers, must have {width}", vector.len())),
                None => Err(format!("is {token:?}, must be numbers")),
            },
        }
    }

    /// Tokens and mask of some sequences that passed [`check`](Self::check), padded to the longest; no mask where none is.
    pub fn encode(&self, sequences: &[&Sequence], device: &Device) -> (Tokens, Option<Tensor<2, Bool>>) {
        let n = sequences.iter().map(|sequence| sequence.tokens.len()).max().unwrap_or(0);
        let batch = sequences.len();
        let seen: Vec<bool> = sequences.iter().flat_map(|s| (0..n).map(|at| at < s.tokens.len())).collect();
        let mask =
            seen.contains(&false).then(|| Tensor::from_data(TensorData::new(seen, [batch, n]), device));
        if let Input::Numeric(width) = self.input {
            let mut values = vec![0.0f32; batch * n * width];
            for (row, sequence) in sequences.iter().enumerate() {
                for (at, token) in sequence.tokens.iter().enumerate() {
                    let vector = numbers(token).unwrap_or_default();
                    values[(row * n + at) * width..][..vector.len()].copy_from_slice(&vector);
                }
            }
            return (
                Tokens::Vectors(Tensor::from_data(TensorData::new(values, [batch, n, width]), device)),
                mask,
            );
        }
        let vocabulary = numbered(&self.vocabulary);
        let mut ids = vec![0i64; batch * n];
        for (row, sequence) in sequences.iter().enumerate() {
            for (at, token) in sequence.tokens.iter().enumerate() {
                if let Token::Symbol(symbol) = token {
                    ids[row * n + at] = match self.input {
                        Input::Embed(_) => vocabulary.get(symbol.as_str()).copied().unwrap_or(0),
                        _ => symbol.parse().unwrap_or(0),
                    };
                }
            }
        }
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [batch, n]), device);
        (Tokens::Ids(ids), mask)
    }

    /// The numbers of a sequence's labels among the classes.
    pub fn label_ids(&self, sequence: &Sequence) -> Vec<i64> {
        let place = |label: &String| self.classes.iter().position(|class| class == label);
        sequence.labels.iter().map(|label| place(label).map_or(0, |at| at as i64)).collect()
    }
}

fn numbered(names: &[String]) -> HashMap<&str, i64> {
    names.iter().map(String::as_str).zip(0..).collect()
}

/// A token as numbers; a whole number counts as one.
fn numbers(token: &Token) -> Option<Vec<f32>> {
    match token {
        Token::Vector(vector) => Some(vector.clone()),
        Token::Symbol(symbol) => symbol.parse::<f32>().ok().map(|x| vec![x]),
    }
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
