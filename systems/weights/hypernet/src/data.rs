//! Users' rows: numbers, a class, and what weights depend on.

use std::collections::BTreeSet;
use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData};
use kiln_core::{Context, Error, HostTensor, Result, TensorFile, Values};
use kiln_data::{Cells, Column, ImageOptions, Images, Table, TableOptions, read_npz};
use serde::{Deserialize, Serialize};

use crate::conditioning::{Condition, Conditioning};

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
    /// Reads rows; classes must be there with `labelled`.
    ///
    /// - a table (`.csv`, `.tsv`, `.arff`, any of them with `.gz`), with the columns named; features are the columns named,
    ///   or else all that mean nothing else
    /// - `.npz` with `x [rows, ...]`, `y [rows]`, and `task [rows]` and `given [rows, k]` where weights depend on them;
    ///   further axes of x are laid one after another
    /// - images as [`Images::read`] has them (a folder with one folder a class, IDX); features are their pixels
    ///
    /// # Errors
    /// Names the file, and the row and column that holds what it should not.
    pub fn read(path: &Path, columns: &Columns, features: Option<&[String]>, labelled: bool) -> Result<Self> {
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
        let ending = name.trim_end_matches(".gz").rsplit('.').next().unwrap_or_default();
        match ending {
            _ if path.is_dir() => Self::read_images(path, columns, labelled),
            "csv" | "tsv" | "txt" | "arff" => Self::read_table(path, columns, features, labelled),
            "npz" => Self::read_npz(path, columns, labelled),
            _ => Self::read_images(path, columns, labelled),
        }
    }

    fn read_table(
        path: &Path,
        columns: &Columns,
        features: Option<&[String]>,
        labelled: bool,
    ) -> Result<Self> {
        let mut table = Table::read(path, TableOptions::default())?;
        let count = table.rows();
        let words = |column: &Column| -> Result<Vec<String>> {
            let word = |row| column.text(row).ok_or_else(|| no_value(path, row, column));
            (0..count).map(word).collect()
        };
        // The columns of what means something are named before any of them is taken out.
        if let Some(name) =
            columns.task.iter().chain(&columns.given).find(|name| table.column(name).is_none())
        {
            return Err(table.no_column(name));
        }
        let labels = match labelled || table.column(&columns.label).is_some() {
            true => words(&table.take(&columns.label)?)?,
            false => Vec::new(),
        };
        let tasks = match &columns.task {
            Some(name) => words(&table.take(name)?)?,
            None => Vec::new(),
        };
        let given = columns.given.iter().map(|name| numbers(path, &table.take(name)?));
        let given = interleaved(&given.collect::<Result<Vec<_>>>()?, count);
        let names: Vec<String> = match features {
            Some(names) => names.to_vec(),
            None => table.columns().iter().map(|column| column.name.clone()).collect(),
        };
        if names.is_empty() {
            return Err(Error::input(path.display(), "has no column left for features"));
        }
        let x = names.iter().map(|name| match table.column(name) {
            Some(column) => numbers(path, column),
            None => Err(table.no_column(name)),
        });
        let x = interleaved(&x.collect::<Result<Vec<_>>>()?, count);
        Ok(Self { features: names, x, labels, tasks, given, count })
    }

    fn read_images(path: &Path, columns: &Columns, labelled: bool) -> Result<Self> {
        if columns.task.is_some() || !columns.given.is_empty() {
            return Err(Error::input(
                path.display(),
                "holds images, which have neither tasks nor descriptors",
            )
            .hint("train with --cond data or noise, or put x, y and task into an .npz file"));
        }
        let options = ImageOptions { unlabelled: !labelled, ..ImageOptions::default() };
        let images = Images::read(path, &options)?;
        let labels = images.labels.iter().map(|&class| images.classes[class].clone()).collect();
        Ok(Self {
            features: numbered(images.numel()),
            labels,
            tasks: Vec::new(),
            given: Vec::new(),
            count: images.len(),
            x: images.pixels,
        })
    }

    fn read_npz(path: &Path, columns: &Columns, labelled: bool) -> Result<Self> {
        let mut file = read_npz(path)?;
        let x = file.take("x")?;
        let &[count, ref rest @ ..] = &x.shape[..] else {
            return Err(Error::input(path.display(), "\"x\" is a single number, must be [rows, width]"));
        };
        let width = rest.iter().product::<usize>();
        if rest.is_empty() || width == 0 || count == 0 {
            let found = format!("\"x\" has the shape {:?}, must be [rows, width]", x.shape);
            return Err(Error::input(path.display(), found));
        }
        let values: Vec<f32> = match x.values {
            Values::Float(values) => values,
            // Bytes of pixels, mostly; rows are standardised anyway.
            Values::Int(values) => values.iter().map(|&x| x as f32).collect(),
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
        Ok(Self { features: numbered(width), x: values, labels, tasks, given, count })
    }
}

/// Names of features that have none.
fn numbered(width: usize) -> Vec<String> {
    (0..width).map(|column| format!("x{column}")).collect()
}

/// That a cell is empty.
fn no_value(path: &Path, row: usize, column: &Column) -> Error {
    let place = format!("{}, row {}", path.display(), row + 1);
    Error::input(place, format!("column \"{}\" has no value", column.name))
}

/// The numbers of a column, none of them missing.
pub(crate) fn numbers(path: &Path, column: &Column) -> Result<Vec<f64>> {
    let missing = |row: usize| no_value(path, row, column).hint("fill it in, or leave the row out");
    match &column.cells {
        Cells::Numbers(values) => match values.iter().position(|value| value.is_nan()) {
            Some(row) => Err(missing(row)),
            None => Ok(values.clone()),
        },
        Cells::Words { words, codes } => {
            let is_number = |code: &Option<u32>| {
                code.is_some_and(|code| words[code as usize].parse::<f64>().is_ok_and(f64::is_finite))
            };
            let row = codes.iter().position(|code| !is_number(code)).unwrap_or(0);
            Err(match codes.get(row).copied().flatten() {
                None => missing(row),
                Some(code) => Error::input(
                    format!("{}, row {}", path.display(), row + 1),
                    format!(
                        "\"{}\" in column \"{}\" is not a finite number",
                        words[code as usize], column.name
                    ),
                ),
            })
        }
    }
}

/// Columns as rows, `[rows, columns]`.
pub(crate) fn interleaved(columns: &[Vec<f64>], rows: usize) -> Vec<f32> {
    (0..rows).flat_map(|row| columns.iter().map(move |column| column[row] as f32)).collect()
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
                Conditioning::Noise { dim, law } => {
                    condition.noise = Some(law.draw(sets, dim, &mut cx.rng(noise.0, noise.1), &cx.device));
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
