//! Examples for the cases: generated, or the user's own.

use std::path::Path;

use burn::tensor::TensorData;
use kiln_core::{Error, Result, random_stream};
use kiln_data::{Cells, Table, TableOptions, digits, read_tensors, shakespeare};
use rand::RngExt;
use rand_distr::{Distribution, LogNormal, StandardNormal, Zipf};
use serde::{Deserialize, Serialize};

use super::{CATEGORICAL, Case, NUMERIC};

/// Where examples come from.
#[derive(Debug, Clone)]
pub enum Examples {
    /// Rows of numbers and their classes.
    Rows {
        /// `[rows, width]`
        x: Vec<f32>,
        /// Numbers of a row.
        width: usize,
        /// `[rows]`
        labels: Vec<i64>,
    },
    /// Identities on the sphere: a centre each, and noise around it.
    Identities {
        /// Numbers of an example.
        width: usize,
        /// Identities.
        classes: usize,
        /// Noise as long as this part of a centre.
        noise: f64,
    },
    /// Clicks as in advertisements, after a hidden model.
    Clicks {
        /// Rows of the tables.
        rows: usize,
    },
    /// Clicks from a file.
    Table {
        /// `[rows, 13]`
        numbers: Vec<f32>,
        /// `[rows, 26]`
        words: Vec<i64>,
        /// `[rows]`
        labels: Vec<f32>,
    },
    /// Token ids of a text.
    Text {
        /// The ids, bytes.
        ids: Vec<u32>,
    },
}

/// Which columns of a table of clicks are what.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// 1 for a click, 0 for none.
    pub label: String,
    /// Columns of numbers, 13 at most.
    pub numeric: Vec<String>,
    /// Columns of words, 26 at most.
    pub categorical: Vec<String>,
}

impl Default for Columns {
    /// As in Criteo's data.
    fn default() -> Self {
        let named = |letter: char, count: usize| (1..=count).map(|at| format!("{letter}{at}")).collect();
        Self { label: "label".into(), numeric: named('I', NUMERIC), categorical: named('C', CATEGORICAL) }
    }
}

impl Columns {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// When it is malformed, or names more columns than the network reads.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let columns: Self = toml::from_str(&text).map_err(|e| {
            Error::input(path.display(), format!("does not name columns: {}", e.to_string().trim_end()))
                .hint("it needs label = \"…\", numeric = [\"…\"] and categorical = [\"…\"]")
        })?;
        if columns.numeric.len() > NUMERIC || columns.categorical.len() > CATEGORICAL {
            let found = format!(
                "names {} numeric and {} categorical columns",
                columns.numeric.len(),
                columns.categorical.len()
            );
            return Err(
                Error::input(path.display(), found).hint(format!("{NUMERIC} and {CATEGORICAL} are the most"))
            );
        }
        Ok(columns)
    }
}

/// Identities are drawn with this much noise.
const NOISE: f64 = 0.5;

impl Examples {
    /// Generated or embedded examples for a case.
    pub fn generated(case: &Case) -> Self {
        match *case {
            Case::Mlp { inputs, classes, .. } => {
                let data = digits::train();
                if inputs == digits::PIXELS && classes == 10 {
                    let labels = data.labels.iter().map(|&label| label.into()).collect();
                    return Self::Rows { x: data.pixels.to_vec(), width: inputs, labels };
                }
                Self::Identities { width: inputs, classes, noise: NOISE }
            }
            Case::SoftmaxHead { inputs, classes, .. } => {
                Self::Identities { width: inputs, classes, noise: NOISE }
            }
            Case::WideDeep { rows, .. } => Self::Clicks { rows },
            Case::HybridGpt { .. } => {
                Self::Text { ids: shakespeare::train().iter().map(|&byte| byte.into()).collect() }
            }
        }
    }

    /// The user's: a table of clicks, arrays `x` and `y` of an NPZ file, or a text.
    ///
    /// # Errors
    /// When the file is missing, malformed, or does not fit the case.
    pub fn read(path: &Path, case: &Case, columns: &Columns) -> Result<Self> {
        match *case {
            Case::Mlp { inputs, classes, .. } | Case::SoftmaxHead { inputs, classes, .. } => {
                read_rows(path, inputs, classes)
            }
            Case::WideDeep { rows, .. } => read_clicks(path, rows, columns),
            Case::HybridGpt { vocab, seq, .. } => {
                let bytes = std::fs::read(path).map_err(Error::io("read", path))?;
                if bytes.len() <= seq {
                    return Err(Error::input(
                        path.display(),
                        format!("has {} bytes, samples need {}", bytes.len(), seq + 1),
                    ));
                }
                if let Some(at) = bytes.iter().position(|&byte| usize::from(byte) >= vocab) {
                    return Err(Error::input(
                        path.display(),
                        format!("byte {} at {at} is outside the vocabulary of {vocab}", bytes[at]),
                    ));
                }
                Ok(Self::Text { ids: bytes.into_iter().map(u32::from).collect() })
            }
        }
    }

    /// How many samples there are to predict: rows, or windows of a text side by side; none where examples are drawn.
    pub fn samples(&self, case: &Case) -> usize {
        match (self, case) {
            (Self::Rows { labels, .. }, _) => labels.len(),
            (Self::Table { labels, .. }, _) => labels.len(),
            (Self::Text { ids }, Case::HybridGpt { seq, .. }) => (ids.len() - 1) / seq,
            _ => 0,
        }
    }

    /// A batch, drawn by its number: inputs in the order of the case's ports, then what is to be predicted.
    pub fn batch(&self, case: &Case, batch: usize, seed: u64, number: u64) -> Vec<TensorData> {
        let mut rng = random_stream(seed, "batch", number);
        match self {
            Self::Rows { width, labels, .. } => {
                let rows: Vec<usize> = (0..batch).map(|_| rng.random_range(0..labels.len())).collect();
                self.rows(*width, &rows)
            }
            Self::Identities { width, classes, noise } => {
                let mut x = Vec::with_capacity(batch * width);
                let mut labels = Vec::with_capacity(batch);
                for _ in 0..batch {
                    let class = rng.random_range(0..*classes);
                    let mut centre = random_stream(seed, "centre", class as u64);
                    x.extend((0..*width).map(|_| {
                        let (at, off): (f64, f64) =
                            (centre.sample(StandardNormal), rng.sample(StandardNormal));
                        ((at + noise * off) / (*width as f64).sqrt()) as f32
                    }));
                    labels.push(class as i64);
                }
                vec![TensorData::new(x, [batch, *width]), TensorData::new(labels, [batch, 1])]
            }
            Self::Clicks { rows } => clicks(*rows, batch, seed, &mut rng),
            Self::Table { labels, .. } => {
                let rows: Vec<usize> = (0..batch).map(|_| rng.random_range(0..labels.len())).collect();
                self.table_rows(&rows)
            }
            Self::Text { ids } => {
                let Case::HybridGpt { seq, .. } = *case else { return Vec::new() };
                let starts = (0..batch).map(|_| rng.random_range(0..ids.len() - seq));
                text_windows(ids, seq, &starts.collect::<Vec<_>>())
            }
        }
    }

    /// Samples by their places.
    pub fn at(&self, case: &Case, places: &[usize]) -> Vec<TensorData> {
        match self {
            Self::Rows { width, .. } => self.rows(*width, places),
            Self::Table { .. } => self.table_rows(places),
            Self::Text { ids } => {
                let Case::HybridGpt { seq, .. } = *case else { return Vec::new() };
                text_windows(ids, seq, &places.iter().map(|place| place * seq).collect::<Vec<_>>())
            }
            Self::Identities { .. } | Self::Clicks { .. } => Vec::new(),
        }
    }

    fn rows(&self, width: usize, rows: &[usize]) -> Vec<TensorData> {
        let Self::Rows { x, labels, .. } = self else { return Vec::new() };
        let numbers: Vec<f32> =
            rows.iter().flat_map(|&row| x[row * width..(row + 1) * width].iter().copied()).collect();
        let classes: Vec<i64> = rows.iter().map(|&row| labels[row]).collect();
        vec![TensorData::new(numbers, [rows.len(), width]), TensorData::new(classes, [rows.len(), 1])]
    }

    fn table_rows(&self, rows: &[usize]) -> Vec<TensorData> {
        let Self::Table { numbers, words, labels } = self else { return Vec::new() };
        fn picked<T: Copy>(values: &[T], width: usize, rows: &[usize]) -> Vec<T> {
            rows.iter().flat_map(|&row| values[row * width..(row + 1) * width].iter().copied()).collect()
        }
        vec![
            TensorData::new(picked(numbers, NUMERIC, rows), [rows.len(), NUMERIC]),
            TensorData::new(picked(words, CATEGORICAL, rows), [rows.len(), CATEGORICAL]),
            TensorData::new(picked(labels, 1, rows), [rows.len(), 1]),
        ]
    }
}

/// Samples of a text and, one further, the tokens that follow.
fn text_windows(ids: &[u32], seq: usize, starts: &[usize]) -> Vec<TensorData> {
    let window = |shift: usize| -> Vec<i64> {
        starts
            .iter()
            .flat_map(|&start| ids[start + shift..start + shift + seq].iter().map(|&id| id.into()))
            .collect()
    };
    let count = starts.len();
    vec![TensorData::new(window(0), [count, seq]), TensorData::new(window(1), [count * seq, 1])]
}

/// Clicks with 13 log-normal numbers and 26 words after Zipf's law, of up to a million kinds; a click is likely as a hidden
/// logistic model says.
fn clicks(rows: usize, batch: usize, seed: u64, rng: &mut impl rand::Rng) -> Vec<TensorData> {
    const EXPONENT: f64 = 1.1;
    const MOST: f64 = 1e6;
    let log_normal = LogNormal::new(0.0, 1.0).expect("the deviation is positive");
    let (mut numbers, mut words, mut labels) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..batch {
        let mut odds = -1.0f64;
        for at in 0..NUMERIC {
            // Logarithms of counts, as is usual.
            let number = (1.0f64 + log_normal.sample(rng)).ln();
            odds += number * if at % 2 == 0 { 0.3 } else { -0.3 };
            numbers.push(number as f32);
        }
        for at in 0..CATEGORICAL {
            // From ten kinds in the first column to a million in the last.
            let kinds = 10f64.powf(1.0 + 5.0 * at as f64 / (CATEGORICAL - 1) as f64).min(MOST);
            let kind = Zipf::new(kinds, EXPONENT).expect("there are kinds").sample(rng) as u64;
            let weight: f64 = random_stream(seed, "hidden", (at as u64) << 32 | kind).sample(StandardNormal);
            odds += 0.3 * weight;
            words.push(row_of(rows, at, &kind.to_string()));
        }
        labels.push(f32::from(u8::from(rng.random_bool(1.0 / (1.0 + (-odds).exp())))));
    }
    vec![
        TensorData::new(numbers, [batch, NUMERIC]),
        TensorData::new(words, [batch, CATEGORICAL]),
        TensorData::new(labels, [batch, 1]),
    ]
}

/// The row of the tables that a word of a column has: by its hash (FNV-1a).
fn row_of(rows: usize, column: usize, word: &str) -> i64 {
    let bytes = [column as u8].into_iter().chain(word.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    (hash % rows as u64) as i64
}

fn read_rows(path: &Path, inputs: usize, classes: usize) -> Result<Examples> {
    let mut arrays = read_tensors(path)?;
    let wrong = |found: String| {
        Error::input(path.display(), found)
            .hint(format!("x must be floats [rows, {inputs}], y whole numbers [rows]"))
    };
    let x = arrays.take("x")?;
    let y = arrays.take("y")?;
    let (Some(values), &[rows, width]) = (x.as_floats(), &x.shape[..]) else {
        return Err(wrong(format!("\"x\" has the shape {:?}", x.shape)));
    };
    if width != inputs || rows == 0 {
        return Err(wrong(format!("\"x\" has the shape {:?}", x.shape)));
    }
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(wrong(format!("\"x\" is {} in row {}", values[at], at / width)));
    }
    let Some(labels) = y.as_ints().filter(|labels| labels.len() == rows) else {
        return Err(wrong(format!("\"y\" has the shape {:?}, but there are {rows} rows", y.shape)));
    };
    if let Some(row) =
        labels.iter().position(|&label| usize::try_from(label).map_or(true, |label| label >= classes))
    {
        return Err(wrong(format!("\"y\" is {} in row {row}, but there are {classes} classes", labels[row])));
    }
    Ok(Examples::Rows { x: values.to_vec(), width, labels: labels.to_vec() })
}

fn read_clicks(path: &Path, rows: usize, columns: &Columns) -> Result<Examples> {
    let table = Table::read(path, TableOptions::default())?;
    let count = table.rows();
    if count == 0 {
        return Err(Error::input(path.display(), "has no rows"));
    }
    let column = |name: &String| table.column(name).ok_or_else(|| table.no_column(name));
    let number = |name: &String, row: usize| -> Result<Option<f64>> {
        let column = column(name)?;
        match (&column.cells, column.text(row)) {
            (_, None) => Ok(None),
            (Cells::Numbers(numbers), _) => Ok(Some(numbers[row])),
            (_, Some(word)) => word.parse().map(Some).map_err(|_| {
                Error::input(
                    path.display(),
                    format!("row {row}: \"{word}\" in column \"{name}\" is no number"),
                )
                .hint("leave it empty where there is none, or name the column among the categorical ones")
            }),
        }
    };
    let (mut numbers, mut words, mut labels) =
        (vec![0.0; count * NUMERIC], vec![0; count * CATEGORICAL], Vec::with_capacity(count));
    for row in 0..count {
        let label = number(&columns.label, row)?;
        match label {
            Some(label) if label == 0.0 || label == 1.0 => labels.push(label as f32),
            other => {
                let found = other.map_or_else(|| "nothing".into(), |label| label.to_string());
                return Err(Error::input(
                    path.display(),
                    format!("row {row}: the label is {found}, and must be 0 or 1"),
                ));
            }
        }
        for (at, name) in columns.numeric.iter().enumerate() {
            // Logarithms, of what is above zero; nothing is zero.
            let number = number(name, row)?.filter(|number| number.is_finite()).unwrap_or(0.0);
            numbers[row * NUMERIC + at] = (1.0 + number.max(0.0)).ln() as f32;
        }
        for at in 0..CATEGORICAL {
            let word = match columns.categorical.get(at) {
                Some(name) => column(name)?.text(row).unwrap_or_default(),
                None => String::new(),
            };
            words[row * CATEGORICAL + at] = row_of(rows, at, &word);
        }
    }
    Ok(Examples::Table { numbers, words, labels })
}
