//! What the pixels of images belong to, for registration to be judged by.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_core::{Error, HostTensor, Result, Values};
use kiln_data::{ImageOptions, Images, read_npz};

use crate::register::Pair;

/// A label for every pixel of every image; 0 belongs to nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelMaps {
    /// `[images, height, width]`
    labels: Vec<u16>,
    /// Height and width.
    size: [usize; 2],
}

impl LabelMaps {
    /// Reads the label maps of images: a folder laid out as that of the images, with the labels as grey levels of PNG files,
    /// or an `.npz` with whole numbers `map [n, height, width]`, for pairs `moving` and `fixed`.
    ///
    /// # Errors
    /// When a file cannot be read, or maps do not fit the images.
    pub fn read(path: &Path, images: &Images, are_pairs: bool) -> Result<Self> {
        let [_, height, width] = images.shape;
        let labels = match path.is_dir() {
            true => grey_levels(path, images, are_pairs)?,
            false => {
                let mut file = read_npz(path)?;
                let names: &[&str] = if are_pairs { &["moving", "fixed"] } else { &["map"] };
                let mut labels = Vec::new();
                for name in names {
                    let HostTensor { shape, values } = file.take(name)?;
                    if shape.len() != 3 || shape[1..] != [height, width] {
                        return Err(Error::input(
                            path.display(),
                            format!("\"{name}\" has the shape {shape:?}"),
                        )
                        .hint(format!("expected [n, {height}, {width}], a label for every pixel")));
                    }
                    let Values::Int(values) = values else {
                        return Err(Error::input(
                            path.display(),
                            format!("\"{name}\" holds no whole numbers"),
                        ));
                    };
                    for value in values {
                        labels.push(u16::try_from(value).map_err(|_| {
                            Error::input(path.display(), format!("\"{name}\" holds the label {value}"))
                                .hint("labels are from 0 to 65535")
                        })?);
                    }
                }
                labels
            }
        };
        if labels.len() != images.len() * height * width {
            let found = format!("{} maps for {} images", labels.len() / (height * width), images.len());
            return Err(Error::input(path.display(), found));
        }
        Ok(Self { labels, size: [height, width] })
    }

    fn of(&self, image: usize) -> &[u16] {
        let pixels = self.size[0] * self.size[1];
        &self.labels[image * pixels..][..pixels]
    }

    /// Dice of moved and fixed maps of pairs under displacements `[pairs, 2, height, width]`: the mean over labels that either
    /// has, then over pairs that have any.
    pub(crate) fn overlap(&self, pairs: &[Pair], field: &[f32]) -> f64 {
        let pixels = self.size[0] * self.size[1];
        let each = pairs
            .iter()
            .zip(field.chunks(2 * pixels))
            .map(|(&(moving, fixed), field)| dice(&moved(self.of(moving), field, self.size), self.of(fixed)));
        let found: Vec<f64> = each.flatten().collect();
        if found.is_empty() { 1.0 } else { found.iter().sum::<f64>() / found.len() as f64 }
    }
}

/// Grey levels of PNG files.
fn grey_levels(path: &Path, images: &Images, are_pairs: bool) -> Result<Vec<u16>> {
    let read = |path: &Path, unlabelled: bool| -> Result<Images> {
        let maps = Images::read(path, &ImageOptions { unlabelled, ..ImageOptions::default() })?;
        if maps.shape != [1, images.shape[1], images.shape[2]] {
            return Err(Error::input(
                path.display(),
                format!("the maps are {:?}, channels first", maps.shape),
            )
            .hint(format!("expected grey images of {:?}, height first", &images.shape[1..])));
        }
        Ok(maps)
    };
    let maps = if are_pairs {
        vec![read(&path.join("moving"), true)?, read(&path.join("fixed"), true)?]
    } else {
        let maps = read(path, false)?;
        let named = |images: &Images| {
            images.labels.iter().map(|&label| images.classes[label].clone()).collect::<Vec<_>>()
        };
        if named(&maps) != named(images) {
            return Err(Error::input(path.display(), "is not laid out as the folder of images")
                .hint("expected the same folders of classes with the same files"));
        }
        vec![maps]
    };
    Ok(maps.iter().flat_map(|maps| &maps.pixels).map(|level| (level * 255.0).round() as u16).collect())
}

/// A map where every pixel has the label of the pixel that it comes from, the nearest one.
fn moved(map: &[u16], field: &[f32], [height, width]: [usize; 2]) -> Vec<u16> {
    let pixels = height * width;
    let nearest = |at: usize, move_by: f32, extent: usize| {
        (at as f32 + move_by).round().clamp(0.0, (extent - 1) as f32) as usize
    };
    let from = |pixel: usize| {
        let (row, column) = (pixel / width, pixel % width);
        nearest(row, field[pixels + pixel], height) * width + nearest(column, field[pixel], width)
    };
    (0..pixels).map(|pixel| map[from(pixel)]).collect()
}

/// The mean Dice over labels that either map has; `None` where there is nothing.
fn dice(a: &[u16], b: &[u16]) -> Option<f64> {
    let mut counts: BTreeMap<u16, [usize; 2]> = BTreeMap::new(); // pixels in both, and the sum of pixels
    for (&a, &b) in a.iter().zip(b) {
        for label in [a, b] {
            counts.entry(label).or_default()[1] += 1;
        }
        if a == b {
            counts.entry(a).or_default()[0] += 1;
        }
    }
    counts.remove(&0);
    let count = counts.len() as f64;
    let sum: f64 = counts.values().map(|&[both, sum]| 2.0 * both as f64 / sum as f64).sum();
    (count > 0.0).then(|| sum / count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dice_by_hand() {
        // Label 1: 1 of (2 + 1) pixels in both; label 2: nothing in common.
        assert_eq!(dice(&[1, 1, 2, 0], &[1, 0, 0, 0]), Some((2.0 / 3.0 + 0.0) / 2.0));
        assert_eq!(dice(&[3, 3], &[3, 3]), Some(1.0));
        assert_eq!(dice(&[0], &[0]), None);
    }

    #[test]
    fn maps_move_with_their_pixels() {
        let maps = LabelMaps { labels: vec![5, 0, 0, 0, 0, 5, 0, 0], size: [2, 2] };
        // The fixed map has what the moving one has, a column to the right.
        let still = maps.overlap(&[(0, 1)], &[0.0; 8]);
        let shifted = maps.overlap(&[(0, 1)], &[0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(still, 0.0);
        // The border goes on: the first column keeps its label, and is one pixel too many.
        assert!((shifted - 2.0 / 3.0).abs() < 1e-12, "{shifted}");
    }
}
