//! The user's examples: an array for every input, and what is to be predicted.

use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use kiln_compiler::Graph;
use kiln_core::{Error, HostTensor, Port, PortKind, Result, TensorFile, random_stream};
use kiln_data::read_tensors;
use rand::RngExt;

use super::Loss;
use super::loss::target_of;

/// Examples by row.
#[derive(Debug, Clone)]
pub struct Rows {
    path: PathBuf,
    /// One an input, `[rows, …]`.
    inputs: Vec<Array>,
    /// `[rows, …]`
    target: Option<Array>,
    /// What it is called.
    target_name: &'static str,
    /// Examples that the graph takes at once.
    batch: usize,
    /// How many there are.
    pub count: usize,
}

#[derive(Debug, Clone)]
struct Array {
    /// Extents of a row.
    row: Vec<usize>,
    values: Values,
}

#[derive(Debug, Clone)]
enum Values {
    Floats(Vec<f32>),
    Ints(Vec<i64>),
}

impl Rows {
    /// Reads an array for every input of a graph by its name, or `x` where it has one input, and `y`, which may be missing.
    ///
    /// # Errors
    /// When the file is missing or malformed, an array is missing or does not fit, or a number is none.
    pub fn read(path: &Path, graph: &Graph) -> Result<Self> {
        let mut arrays = read_tensors(path)?;
        let mut inputs = Vec::with_capacity(graph.inputs.len());
        let mut count = None;
        for input in &graph.inputs {
            let port = &input.port;
            let single = graph.inputs.len() == 1 && arrays.get(&port.name).is_none();
            let name = if single { "x" } else { &port.name };
            let tensor = take(&mut arrays, name, path, port)?;
            let rows = tensor.shape.first().copied().unwrap_or(0);
            let array = Array::of(tensor, port.kind).and_then(|array| {
                let fits = Some(array.row.as_slice()) == port.shape.get(1..);
                if fits { Ok(array) } else { Err(format!("has the shape {}", told(rows, &array.row))) }
            });
            let array = array.map_err(|found| {
                let kind = if port.kind == PortKind::Int { "whole numbers" } else { "floats" };
                let expected = told("rows", port.shape.get(1..).unwrap_or(&[]));
                Error::input(path.display(), format!("\"{name}\" {found}"))
                    .hint(format!("the network reads {kind} {expected}"))
            })?;
            if *count.get_or_insert(rows) != rows {
                let before = count.unwrap_or(0);
                return Err(Error::input(
                    path.display(),
                    format!("\"{name}\" has {rows} rows, other arrays {before}"),
                ));
            }
            if let Values::Floats(values) = &array.values
                && let Some(at) = values.iter().position(|value| !value.is_finite())
            {
                let row = at / array.width();
                return Err(Error::input(
                    path.display(),
                    format!("\"{name}\" is {} in row {row}", values[at]),
                ));
            }
            inputs.push(array);
        }
        let count = count.unwrap_or(0);
        if count == 0 {
            return Err(Error::input(path.display(), "has no rows"));
        }
        let target_name = target_of(graph);
        let target = match arrays.get(target_name).is_some() {
            true => {
                let tensor = arrays.take(target_name)?;
                if tensor.shape.first() != Some(&count) {
                    let found = format!(
                        "\"{target_name}\" has the shape {:?}, but there are {count} rows",
                        tensor.shape
                    );
                    return Err(Error::input(path.display(), found));
                }
                let kind = if tensor.as_ints().is_some() { PortKind::Int } else { PortKind::Float };
                Array::of(tensor, kind).ok()
            }
            false => None,
        };
        let batch = graph.inputs.first().and_then(|input| input.port.shape.first().copied()).unwrap_or(1);
        Ok(Self { path: path.to_path_buf(), inputs, target, target_name, batch, count })
    }

    /// The loss that fits what is to be predicted: classes for whole numbers, or yes and no for one score of an output.
    ///
    /// # Errors
    /// When there is nothing to predict.
    pub fn usual_loss(&self, output: &Port) -> Result<Loss> {
        match &self.target()?.values {
            Values::Ints(_) if output.shape.last() == Some(&1) => Ok(Loss::Binary),
            Values::Ints(_) => Ok(Loss::CrossEntropy),
            Values::Floats(_) => Ok(Loss::Squared),
        }
    }

    fn target(&self) -> Result<&Array> {
        self.target.as_ref().ok_or_else(|| {
            Error::input(self.path.display(), format!("has no array \"{}\"", self.target_name))
                .hint("it holds what is to be predicted: whole numbers for classes, floats for numbers")
        })
    }

    /// Makes sure that what is to be predicted fits an output and a loss.
    ///
    /// # Errors
    /// Names the first row that does not.
    pub fn check(&self, output: &Port, loss: Loss) -> Result<()> {
        let target = self.target()?;
        let wrong =
            |found: String| Error::input(self.path.display(), format!("\"{}\" {found}", self.target_name));
        let shape = &output.shape;
        // An output may have several rows for an example: one a token.
        let mut row = vec![shape.first().map_or(1, |rows| rows / self.batch)];
        row.extend(shape.iter().skip(1));
        let classes = loss.class_axis(shape).and_then(|axis| shape.get(axis).copied());
        if classes.is_some() {
            row.pop();
        }
        // One number may stand in an axis of its own or not.
        let stripped = |row: &[usize]| row.iter().copied().filter(|&size| size != 1).collect::<Vec<_>>();
        if stripped(&row) != stripped(&target.row) {
            return Err(wrong(format!("has the shape {}", told(self.count, &target.row))).hint(format!(
                "for the loss {} and the output \"{}\" {shape:?} it must be {}",
                loss.name(),
                output.name,
                told("rows", &row)
            )));
        }
        let per_row = target.width();
        match (&target.values, classes) {
            (Values::Ints(values), Some(classes)) => {
                let outside = |value: &i64| usize::try_from(*value).map_or(true, |class| class >= classes);
                match values.iter().position(outside) {
                    Some(at) => Err(wrong(format!(
                        "is {} in row {}, but there are {classes} classes",
                        values[at],
                        at / per_row
                    ))),
                    None => Ok(()),
                }
            }
            (Values::Floats(_), Some(_)) => Err(wrong("holds floats, and classes are whole numbers".into())
                .hint("write them as integers, or take --loss squared")),
            (values, None) => {
                let numbers = values.as_floats();
                let bad = |value: &f32| {
                    !value.is_finite() || (loss == Loss::Binary && *value != 0.0 && *value != 1.0)
                };
                match numbers.iter().position(bad) {
                    Some(at) => Err(wrong(format!("is {} in row {}", numbers[at], at / per_row)).hint(
                        if loss == Loss::Binary { "it must be 0 or 1" } else { "it must be a number" },
                    )),
                    None => Ok(()),
                }
            }
        }
    }

    /// A batch, drawn by its number: the inputs in order, then what is to be predicted in a loss's shape.
    pub fn batch(&self, batch: usize, output: &Port, loss: Loss, seed: u64, number: u64) -> Vec<TensorData> {
        let mut rng = random_stream(seed, "batch", number);
        let rows: Vec<usize> = (0..batch).map(|_| rng.random_range(0..self.count)).collect();
        let mut data = self.at(&rows);
        data.extend(self.target.as_ref().map(|target| {
            let mut shape = output.shape.clone();
            if let Some(axis) = loss.class_axis(&shape) {
                shape[axis] = 1;
            }
            shape[0] = shape[0] / self.batch * batch;
            target.values.picked(target.width(), &rows, shape, loss != Loss::CrossEntropy)
        }));
        data
    }

    /// The inputs of some rows.
    pub fn at(&self, rows: &[usize]) -> Vec<TensorData> {
        let of = |array: &Array| {
            let shape = [&[rows.len()], &array.row[..]].concat();
            array.values.picked(array.width(), rows, shape, false)
        };
        self.inputs.iter().map(of).collect()
    }

    /// How well outputs fit what is to be predicted: the share of right classes, or the mean square of differences.
    pub fn score(&self, outputs: &[f32], output: &Port, loss: Loss) -> Option<(&'static str, f64)> {
        let target = self.target.as_ref()?;
        let width = output.shape.last().copied().unwrap_or(1).max(1);
        match (&target.values, loss) {
            (Values::Ints(classes), Loss::CrossEntropy) => {
                let best = |row: &[f32]| {
                    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map_or(0, |(class, _)| class)
                };
                let right =
                    outputs.chunks(width).zip(classes).filter(|(row, class)| best(row) as i64 == **class);
                Some(("accuracy", right.count() as f64 / classes.len() as f64))
            }
            (values, Loss::Binary) => {
                let numbers = values.as_floats();
                let right = outputs.iter().zip(&numbers).filter(|(x, y)| (**x > 0.0) == (**y > 0.5));
                Some(("accuracy", right.count() as f64 / numbers.len() as f64))
            }
            (values, _) => {
                let numbers = values.as_floats();
                let sum: f64 = outputs.iter().zip(&numbers).map(|(x, y)| f64::from(x - y).powi(2)).sum();
                Some(("mean square", sum / numbers.len() as f64))
            }
        }
    }
}

fn take(arrays: &mut TensorFile, name: &str, path: &Path, port: &Port) -> Result<HostTensor> {
    if arrays.get(name).is_none() {
        let names: Vec<&str> = arrays.names().collect();
        return Err(Error::input(path.display(), format!("has no array \"{name}\"")).hint(format!(
            "the network reads \"{}\" {:?}, the first axis counting examples; the file has: {}",
            port.name,
            port.shape,
            names.join(", ")
        )));
    }
    arrays.take(name)
}

impl Array {
    fn width(&self) -> usize {
        self.row.iter().product::<usize>().max(1)
    }

    /// An array of a kind, or what was found in its place; whole numbers may stand for floats.
    fn of(tensor: HostTensor, kind: PortKind) -> std::result::Result<Self, String> {
        let row = tensor.shape.get(1..).unwrap_or(&[]).to_vec();
        let values = match (kind, tensor.as_floats(), tensor.as_ints()) {
            (PortKind::Float, Some(values), _) => Values::Floats(values.to_vec()),
            (PortKind::Float, _, Some(values)) => {
                Values::Floats(values.iter().map(|&value| value as f32).collect())
            }
            (PortKind::Int, _, Some(values)) => Values::Ints(values.to_vec()),
            _ => return Err("holds floats".into()),
        };
        Ok(Self { row, values })
    }
}

/// A shape of so many rows.
fn told(rows: impl ToString, row: &[usize]) -> String {
    let sizes = std::iter::once(rows.to_string()).chain(row.iter().map(usize::to_string));
    format!("[{}]", sizes.collect::<Vec<_>>().join(", "))
}

impl Values {
    fn as_floats(&self) -> Vec<f32> {
        match self {
            Self::Floats(values) => values.clone(),
            Self::Ints(values) => values.iter().map(|&value| value as f32).collect(),
        }
    }

    fn picked(&self, width: usize, rows: &[usize], shape: Vec<usize>, floats: bool) -> TensorData {
        fn of<T: Copy>(values: &[T], width: usize, rows: &[usize]) -> Vec<T> {
            rows.iter().flat_map(|&row| values[row * width..(row + 1) * width].iter().copied()).collect()
        }
        match self {
            Self::Floats(values) => TensorData::new(of(values, width, rows), shape),
            Self::Ints(values) if floats => TensorData::new(
                of(values, width, rows).into_iter().map(|value| value as f32).collect(),
                shape,
            ),
            Self::Ints(values) => TensorData::new(of(values, width, rows), shape),
        }
    }
}
