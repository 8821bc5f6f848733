//! Labelled images of one size, as people have them: folders of PNG or JPEG files, IDX, NPZ, CSV.

mod folder;
mod idx;
mod picture;

use std::path::{Path, PathBuf};

use kiln_core::{Error, HostTensor, Result, Values};

use crate::npz::{read_npy, read_npz};
use crate::table::{Cells, Table, TableOptions};

pub use picture::Picture;

/// Most numbers that are read: a small packed file must not fill the memory.
const MAX_VALUES: u64 = 1 << 29;

/// Where labels are, and how numbers become brightness.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageOptions {
    /// The IDX file of labels, by default the images' name with `labels-idx1` for `images-idx3`; the `.npy` file of labels
    /// for images in such a file.
    pub labels: Option<PathBuf>,
    /// The CSV column of labels; by default the last.
    pub target: Option<String>,
    /// The value of white in a CSV file; by default the smallest of 1, 16, 255 and 65535 that no value exceeds.
    pub white: Option<f64>,
    /// Whether labels may be missing, as when they are to be predicted.
    pub unlabelled: bool,
}

/// Images of one size with their labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Images {
    /// Channels, height, width.
    pub shape: [usize; 3],
    /// Brightness from 0 to 1, `[images, channels, height, width]`.
    pub pixels: Vec<f32>,
    /// The class of each image; empty where there are no labels.
    pub labels: Vec<usize>,
    /// What the classes are called.
    pub classes: Vec<String>,
    /// The value that became 1.
    pub white: f64,
}

impl Images {
    /// Reads images.
    ///
    /// - a folder: one folder for each class, with PNG or JPEG files; without labels, the files themselves
    /// - `.png`, `.jpg`: one image, without a label
    /// - `.npz`: `x` (or `images`), `[n, height, width]` or `[n, channels, height, width]`, and `y` (or `labels`) `[n]`;
    ///   whole numbers are taken as 0 to 255
    /// - `.npy`: images as in an `.npz`; their labels are in the `.npy` file that the options name
    /// - `.csv`, `.tsv`, also with `.gz`: one image a row; a square number of columns is a square image
    /// - anything else: an IDX file, gzipped or not, as the MNIST family has them
    ///
    /// # Errors
    /// When a file cannot be read or is malformed, images differ in size, or labels are missing.
    pub fn read(path: &Path, options: &ImageOptions) -> Result<Self> {
        let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
        let ending = name.trim_end_matches(".gz").rsplit('.').next().unwrap_or_default();
        let images = match ending {
            _ if path.is_dir() => folder::read(path, options)?,
            "png" | "jpg" | "jpeg" if options.unlabelled => folder::read_one(path)?,
            "npz" => Self::from_npz(path, options)?,
            "npy" => Self::from_npy(path, options)?,
            "csv" | "tsv" | "txt" => Self::from_table(path, options)?,
            _ => idx::read(path, options)?,
        };
        if images.is_empty() {
            return Err(Error::input(path.display(), "holds no images"));
        }
        if let Some(at) = images.pixels.iter().position(|x| !x.is_finite()) {
            let image = at / images.numel();
            return Err(Error::input(
                path.display(),
                format!("image {} has a pixel that is no number", image + 1),
            ));
        }
        Ok(images)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pixels.len() / self.numel().max(1)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.pixels.is_empty()
    }

    /// Numbers in an image.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// One image, `[channels, height, width]`.
    pub fn image(&self, index: usize) -> &[f32] {
        &self.pixels[index * self.numel()..][..self.numel()]
    }

    /// These images, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let labels = if self.labels.is_empty() {
            Vec::new()
        } else {
            indices.iter().map(|&i| self.labels[i]).collect()
        };
        let pixels = indices.iter().flat_map(|&i| self.image(i).iter().copied()).collect();
        Self { pixels, labels, ..self.clone_empty() }
    }

    fn clone_empty(&self) -> Self {
        Self {
            shape: self.shape,
            pixels: Vec::new(),
            labels: Vec::new(),
            classes: self.classes.clone(),
            white: self.white,
        }
    }

    /// Numbers the labels by the `classes` of a trained model.
    ///
    /// # Errors
    /// When a label is none of them.
    pub fn with_classes(mut self, classes: &[String], path: &Path) -> Result<Self> {
        let places = self.classes.iter().map(|name| classes.iter().position(|class| class == name));
        let places: Vec<Option<usize>> = places.collect();
        for (index, label) in self.labels.iter_mut().enumerate() {
            *label = places[*label].ok_or_else(|| {
                let found = format!("image {} has the label \"{}\"", index + 1, self.classes[*label]);
                Error::input(path.display(), found).hint(format!("the model knows {}", classes.join(", ")))
            })?;
        }
        self.classes = classes.to_vec();
        Ok(self)
    }

    fn from_npz(path: &Path, options: &ImageOptions) -> Result<Self> {
        let mut file = read_npz(path)?;
        let mut either = |names: [&str; 2]| {
            let name = names.into_iter().find(|name| file.get(name).is_some()).unwrap_or(names[0]);
            file.take(name)
        };
        let images = either(["x", "images"])?;
        let labels = match either(["y", "labels"]) {
            Ok(labels) => Some(labels),
            Err(_) if options.unlabelled => None,
            Err(error) => return Err(error),
        };
        Self::from_arrays(images, labels, path)
    }

    fn from_npy(path: &Path, options: &ImageOptions) -> Result<Self> {
        let labels = match &options.labels {
            Some(labels) => Some(read_npy(labels)?),
            None if options.unlabelled => None,
            None => {
                return Err(Error::input(path.display(), "has no labels beside it")
                    .hint("name the .npy file of labels, a whole number for each image"));
            }
        };
        Self::from_arrays(read_npy(path)?, labels, path)
    }

    /// Images `[n, height, width]` or `[n, channels, height, width]` and labels `[n]`; `path` names them in messages.
    fn from_arrays(images: HostTensor, labels: Option<HostTensor>, path: &Path) -> Result<Self> {
        let HostTensor { shape, values } = images;
        let image_shape = match shape[..] {
            [_, height, width] => [1, height, width],
            [_, channels, height, width] => [channels, height, width],
            _ => {
                return Err(Error::input(path.display(), format!("the images have the shape {shape:?}"))
                    .hint("expected [n, height, width] or [n, channels, height, width]"));
            }
        };
        let (pixels, white) = match values {
            Values::Float(pixels) => (pixels, 1.0),
            Values::Int(pixels) => (pixels.iter().map(|&x| x as f32 / 255.0).collect(), 255.0),
        };
        let labels: Vec<String> = match labels {
            None => Vec::new(),
            Some(HostTensor { values: Values::Int(labels), .. }) => {
                labels.iter().map(i64::to_string).collect()
            }
            Some(HostTensor { values: Values::Float(labels), .. }) => {
                labels.iter().map(f32::to_string).collect()
            }
        };
        Self { shape: image_shape, pixels, labels: Vec::new(), classes: Vec::new(), white }
            .labelled(&labels, path)
    }

    fn from_table(path: &Path, options: &ImageOptions) -> Result<Self> {
        let mut table = Table::read(path, TableOptions::default())?;
        let last = table.columns().last().map(|column| column.name.clone()).unwrap_or_default();
        let target = match &options.target {
            Some(target) => Some(target.clone()),
            // Without labels, every column is a pixel unless the last is called a label.
            None if options.unlabelled => {
                Some(last).filter(|name| ["label", "target", "class", "y"].contains(&&name[..]))
            }
            None => Some(last),
        };
        let labels = match target {
            Some(target) if options.unlabelled && table.column(&target).is_none() => Vec::new(),
            Some(target) => {
                let column = table.take(&target)?;
                let missing = |row: usize| {
                    Error::input(
                        path.display(),
                        format!("row {} has no label in column \"{target}\"", row + 1),
                    )
                };
                (0..table.rows())
                    .map(|row| column.text(row).ok_or_else(|| missing(row)))
                    .collect::<Result<_>>()?
            }
            None => Vec::new(),
        };
        let columns: Vec<&[f64]> = table
            .columns()
            .iter()
            .map(|column| match &column.cells {
                Cells::Numbers(numbers) => Ok(&numbers[..]),
                Cells::Words { .. } => {
                    Err(Error::input(path.display(), format!("column \"{}\" holds words", column.name))
                        .hint("all columns but the label must be pixels: name the label's column"))
                }
            })
            .collect::<Result<_>>()?;
        for (column, values) in table.columns().iter().zip(&columns) {
            if let Some(row) = values.iter().position(|x| x.is_nan()) {
                let found = format!("row {}, column \"{}\" is empty", row + 1, column.name);
                return Err(Error::input(path.display(), found).hint("every pixel must be a number"));
            }
        }
        let largest = columns.iter().flat_map(|column| column.iter()).fold(0.0f64, |a, &b| a.max(b));
        let white = options.white.unwrap_or_else(|| {
            [1.0, 16.0, 255.0, 65535.0].into_iter().find(|&white| largest <= white).unwrap_or(largest)
        });
        let side = (columns.len() as f64).sqrt().round() as usize;
        let shape = if side * side == columns.len() { [1, side, side] } else { [1, 1, columns.len()] };
        let pixels = (0..table.rows())
            .flat_map(|row| columns.iter().map(move |column| (column[row] / white) as f32))
            .collect();
        Self { shape, pixels, labels: Vec::new(), classes: Vec::new(), white }.labelled(&labels, path)
    }

    /// Adds labels by name; classes are numbered in the order of their names, numbers by their value.
    fn labelled(mut self, labels: &[String], path: &Path) -> Result<Self> {
        if !labels.is_empty() && labels.len() != self.len() {
            let found = format!("there are {} labels for {} images", labels.len(), self.len());
            return Err(Error::input(path.display(), found));
        }
        self.classes = labels.to_vec();
        self.classes.sort_by(|a, b| match (a.parse::<f64>(), b.parse::<f64>()) {
            (Ok(a), Ok(b)) => a.total_cmp(&b),
            _ => a.cmp(b),
        });
        self.classes.dedup();
        let number = |label: &String| self.classes.iter().position(|class| class == label);
        self.labels = labels.iter().filter_map(number).collect();
        Ok(self)
    }
}

/// Refuses what would not fit into memory.
fn check_size(path: &Path, extents: &[usize]) -> Result<usize> {
    let total = extents.iter().try_fold(1u64, |product, &extent| product.checked_mul(extent as u64));
    match total {
        Some(total) if total <= MAX_VALUES => Ok(total as usize),
        _ => Err(Error::input(path.display(), format!("claims an extent of {extents:?}"))
            .hint(format!("at most {MAX_VALUES} numbers are read at once"))),
    }
}
