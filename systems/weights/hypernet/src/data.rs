//! Users' rows: numbers, a class, and what weights depend on.

use std::collections::BTreeSet;
use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData};
use kiln_core::{Context, Error, HostTensor, Result, TensorFile, Values};
use kiln_data::read_npz;
use serde::{Deserialize, Serialize};

use crate::conditioning::{Condition, Conditioning};
use crate::training::normals;

/// Which columns of a table mean what.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Columns {
    /// Classes.
    pub label: String,
    /// Tasks, where weights depend on them.
    pub task: Option<String>,
    /// Descriptors, where weights depend on them.
    pub given: Vec<String>,
}

/// Rows of a table.
#[derive(Debug, Clone)]
pub struct Rows {
    /// Names of the features.
    pub features: Vec<String>,
    /// `[rows, features]`
    pub x: Vec<f32>,
    /// Classes; empty where the table has none.
    pub labels: Vec<String>,
    /// Tasks; empty where weights depend on none.
    pub tasks: Vec<String>,
    /// Descriptors, `[rows, given]`
    pub given: Vec<f32>,
    /// Number of rows.
    pub count: usize,
}

impl Rows {
    /// Reads `.csv`, with the columns named, or `.npz`, with `x [rows, width]`, `y [rows]`, and `task [rows]` and
    /// `given [rows, k]` where weights depend on them. Features of a CSV table are the columns named, or else all that mean
    /// nothing else. With `labelled`, classes must be there.
    ///
    /// # Errors
    /// Names the file, and the row and column that holds what it should not.
    pub fn read(path: &Path, columns: &Columns, features: Option<&[String]>, labelled: bool) -> Result<Self> {
        let rows = match path.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => Self::read_csv(path, columns, features, labelled)?,
            Some("npz") => Self::read_npz(path, columns, labelled)?,
            _ => {
                return Err(Error::input(path.display(), "ends neither in .csv nor in .npz")
                    .hint("a table has one row a sample, with names of the columns in its first line"));
            }
        };
        if rows.count == 0 {
            return Err(Error::input(path.display(), "holds no rows"));
        }
        Ok(rows)
    }

    fn read_csv(path: &Path, columns: &Columns, features: Option<&[String]>, labelled: bool) -> Result<Self> {
        let broken = |e: csv::Error| Error::input(path.display(), "is not a readable CSV file").caused_by(e);
        let mut reader = csv::ReaderBuilder::new().from_path(path).map_err(broken)?;
        let heads: Vec<String> =
            reader.headers().map_err(broken)?.iter().map(|h| h.trim().to_string()).collect();
        let place = |name: &String| {
            heads.iter().position(|head| head == name).ok_or_else(|| {
                Error::input(path.display(), format!("has no column \"{name}\""))
                    .hint(format!("its columns are {}", heads.join(", ")))
            })
        };
        let label = if labelled { Some(place(&columns.label)?) } else { place(&columns.label).ok() };
        let task = columns.task.as_ref().map(place).transpose()?;
        let given: Vec<usize> = columns.given.iter().map(place).collect::<Result<_>>()?;
        let taken = |i: &usize| label == Some(*i) || task == Some(*i) || given.contains(i);
        let features: Vec<usize> = match features {
            Some(names) => names.iter().map(place).collect::<Result<_>>()?,
            None => (0..heads.len()).filter(|i| !taken(i)).collect(),
        };
        let mut rows = Self {
            features: features.iter().map(|&i| heads[i].clone()).collect(),
            x: Vec::new(),
            labels: Vec::new(),
            tasks: Vec::new(),
            given: Vec::new(),
            count: 0,
        };
        if rows.features.is_empty() {
            return Err(Error::input(path.display(), "has no column left for features"));
        }
        for record in reader.records() {
            let record = record.map_err(broken)?;
            rows.count += 1;
            let number = |column: usize| {
                let cell = record.get(column).unwrap_or("").trim();
                cell.parse::<f32>().ok().filter(|value| value.is_finite()).ok_or_else(|| {
                    let found = format!("\"{cell}\" in column \"{}\" is not a finite number", heads[column]);
                    Error::input(format!("{}, row {}", path.display(), rows.count), found)
                })
            };
            for &column in &features {
                rows.x.push(number(column)?);
            }
            for &column in &given {
                rows.given.push(number(column)?);
            }
            let word = |column: usize| record.get(column).unwrap_or("").trim().to_string();
            rows.labels.extend(label.map(word));
            rows.tasks.extend(task.map(word));
        }
        Ok(rows)
    }

    fn read_npz(path: &Path, columns: &Columns, labelled: bool) -> Result<Self> {
        let mut file = read_npz(path)?;
        let x = file.take("x")?;
        let (&[count, width], Some(values)) = (&x.shape[..], x.as_floats()) else {
            let found = format!("\"x\" has the shape {:?}, must be floats [rows, width]", x.shape);
            return Err(Error::input(path.display(), found));
        };
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let found = format!("\"x\" is {} at row {}, column {}", values[at], at / width + 1, at % width);
            return Err(Error::input(path.display(), found));
        }
        let words = |file: &mut TensorFile, name: &str| -> Result<Vec<String>> {
            let HostTensor { shape, values } = file.take(name)?;
            match values {
                Values::Int(values) if values.len() == count => {
                    Ok(values.iter().map(i64::to_string).collect())
                }
                _ => Err(Error::input(
                    path.display(),
                    format!("\"{name}\" has the shape {shape:?}, must be {count} whole numbers"),
                )),
            }
        };
        let labels = if labelled || file.get("y").is_some() { words(&mut file, "y")? } else { Vec::new() };
        let tasks = if columns.task.is_some() { words(&mut file, "task")? } else { Vec::new() };
        let given = match columns.given.len() {
            0 => Vec::new(),
            k => {
                let given = file.take("given")?;
                match given.as_floats().filter(|values| values.len() == k * count) {
                    Some(values) if values.iter().all(|v| v.is_finite()) => values.to_vec(),
                    _ => {
                        let found = format!(
                            "\"given\" has the shape {:?}, must be finite [{count}, {k}]",
                            given.shape
                        );
                        return Err(Error::input(path.display(), found));
                    }
                }
            }
        };
        let features = (0..width).map(|column| format!("x{column}")).collect();
        Ok(Self { features, x: values.to_vec(), labels, tasks, given, count })
    }
}

/// From words and numbers of a table to those of a network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Coding {
    /// Which columns mean what.
    pub columns: Columns,
    /// Names of the features.
    pub features: Vec<String>,
    /// Names of the classes, in the order of the outputs.
    pub classes: Vec<String>,
    /// Names of the tasks, in their order.
    pub tasks: Vec<String>,
    /// Mean and standard deviation of every feature of the rows trained on.
    pub scale: Vec<[f32; 2]>,
    /// The same of the descriptors.
    pub given_scale: Vec<[f32; 2]>,
}

/// Rows as a network sees them.
#[derive(Debug, Clone)]
pub struct Coded {
    /// Standardised, `[rows, width]`
    pub x: Vec<f32>,
    /// Classes; 0 where they are unknown.
    pub y: Vec<usize>,
    /// Tasks; empty where weights depend on none.
    pub tasks: Vec<usize>,
    /// Standardised, `[rows, k]`
    pub given: Vec<f32>,
    width: usize,
    given_width: usize,
}

impl Coding {
    /// Learns names and scales from rows.
    ///
    /// # Errors
    /// When there are fewer than two classes.
    pub fn of(rows: &Rows, columns: Columns, path: &Path) -> Result<Self> {
        let names = |words: &[String]| -> Vec<String> {
            let names: Vec<String> = words.iter().cloned().collect::<BTreeSet<_>>().into_iter().collect();
            // Numbers in the order of numbers.
            let mut numbers: Vec<(f64, String)> = Vec::new();
            for name in &names {
                match name.parse() {
                    Ok(number) => numbers.push((number, name.clone())),
                    Err(_) => return names,
                }
            }
            numbers.sort_by(|a, b| a.0.total_cmp(&b.0));
            numbers.into_iter().map(|(_, name)| name).collect()
        };
        let classes = names(&rows.labels);
        if classes.len() < 2 {
            return Err(Error::input(
                path.display(),
                format!("has {} classes, needs at least two", classes.len()),
            ));
        }
        let (scale, given_scale) =
            (scales(&rows.x, rows.features.len()), scales(&rows.given, columns.given.len()));
        Ok(Self {
            features: rows.features.clone(),
            classes,
            tasks: names(&rows.tasks),
            scale,
            given_scale,
            columns,
        })
    }

    /// Codes rows.
    ///
    /// # Errors
    /// Names the row whose class or task is unknown, or the features that differ.
    pub fn encode(&self, rows: &Rows, path: &Path) -> Result<Coded> {
        if rows.features != self.features {
            let found = format!("has {} features, the model {}", rows.features.len(), self.features.len());
            return Err(Error::input(path.display(), found)
                .hint(format!("the model was trained on {}", self.features.join(", "))));
        }
        let numbers = |words: &[String], names: &[String], what: &str| -> Result<Vec<usize>> {
            let find = |(row, word): (usize, &String)| {
                names.iter().position(|name| name == word).ok_or_else(|| {
                    let place = format!("{}, row {}", path.display(), row + 1);
                    Error::input(place, format!("the {what} \"{word}\" is unknown"))
                        .hint(format!("the model knows {}", names.join(", ")))
                })
            };
            words.iter().enumerate().map(find).collect()
        };
        let y = match rows.labels.is_empty() {
            true => vec![0; rows.count],
            false => numbers(&rows.labels, &self.classes, "class")?,
        };
        Ok(Coded {
            x: standardised(&rows.x, &self.scale),
            y,
            tasks: numbers(&rows.tasks, &self.tasks, "task")?,
            given: standardised(&rows.given, &self.given_scale),
            width: self.features.len(),
            given_width: self.given_scale.len(),
        })
    }
}

/// Mean and standard deviation of every column; a constant column has the deviation 1.
fn scales(values: &[f32], width: usize) -> Vec<[f32; 2]> {
    let count = values.len().checked_div(width).unwrap_or(0) as f64;
    let of_column = |column: usize| {
        let column = || values.iter().skip(column).step_by(width).map(|&v| f64::from(v));
        let mean = column().sum::<f64>() / count;
        let variance = column().map(|v| (v - mean).powi(2)).sum::<f64>() / count;
        [mean as f32, if variance > 1e-12 { variance.sqrt() as f32 } else { 1.0 }]
    };
    (0..width).map(of_column).collect()
}

fn standardised(values: &[f32], scale: &[[f32; 2]]) -> Vec<f32> {
    values.iter().zip(scale.iter().cycle()).map(|(v, [mean, deviation])| (v - mean) / deviation).collect()
}

impl Coded {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.y.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.y.is_empty()
    }

    /// Some rows.
    pub fn select(&self, rows: &[usize]) -> Self {
        let part = |values: &[f32], width: usize| -> Vec<f32> {
            rows.iter().flat_map(|&row| values[row * width..(row + 1) * width].to_vec()).collect()
        };
        Self {
            x: part(&self.x, self.width),
            y: rows.iter().map(|&row| self.y[row]).collect(),
            tasks: if self.tasks.is_empty() {
                Vec::new()
            } else {
                rows.iter().map(|&row| self.tasks[row]).collect()
            },
            given: part(&self.given, self.given_width),
            ..*self
        }
    }

    /// Groups of equally many rows, each with one condition: that of its first row.
    pub fn batch(
        &self,
        groups: &[Vec<usize>],
        parts: &[Conditioning],
        noise: (&str, u64),
        cx: &Context,
    ) -> Batch {
        let (sets, rows) = (groups.len(), groups[0].len());
        let all: Vec<usize> = groups.iter().flatten().copied().collect();
        let chosen = self.select(&all);
        let x: Tensor<3> = Tensor::from_data(TensorData::new(chosen.x, [sets, rows, self.width]), &cx.device);
        let first: Vec<usize> = groups.iter().map(|group| group[0]).collect();
        let mut condition = Condition::default();
        for part in parts {
            match *part {
                Conditioning::Task { .. } => {
                    condition.tasks = Some(first.iter().map(|&row| self.tasks[row]).collect())
                }
                Conditioning::Data { .. } => condition.support = Some(x.clone()),
                Conditioning::Noise { dim } => {
                    condition.noise = Some(normals(sets, dim, &mut cx.rng(noise.0, noise.1), &cx.device));
                }
                Conditioning::Given { .. } => {
                    let given = TensorData::new(self.select(&first).given, [sets, self.given_width]);
                    condition.given = Some(Tensor::from_data(given, &cx.device));
                }
            }
        }
        let y: Vec<i64> = chosen.y.iter().map(|&y| y as i64).collect();
        Batch { condition, x, y: Tensor::from_data(TensorData::new(y, [sets, rows]), &cx.device) }
    }
}

/// What goes through hypernetwork and target at once.
#[derive(Debug, Clone)]
pub struct Batch {
    /// One for each set.
    pub condition: Condition,
    /// `[sets, rows, width]`
    pub x: Tensor<3>,
    /// `[sets, rows]`
    pub y: Tensor<2, Int>,
}
