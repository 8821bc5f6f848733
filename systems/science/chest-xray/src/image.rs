//! Radiographs, and what networks see of them.

use std::fs;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use clap::ValueEnum;
use kiln_core::{Error, Result};
use kiln_data::Picture;
use kiln_data::dicom::Dicom;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::bilinear::resize_plane;
use crate::masks::Mask;

/// Mean distance of colour channels from which an image is no plain radiograph.
const COLOURED: f32 = 0.03;
/// Mean and deviation of ImageNet's colours, which pre-trained networks expect.
const IMAGENET: ([f32; 3], [f32; 3]) = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]);

/// A grey image with what is known of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Radiograph {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Brightness from 0 to 1, `[height, width]`.
    pub pixels: Vec<f32>,
    /// SHA-256 of the pixels at eight bits: the same for copies, in whatever format without loss.
    pub hash: String,
    /// The patient that a DICOM file names.
    pub patient: Option<String>,
    /// What is unusual about it.
    pub warnings: Vec<String>,
}

/// Whether a file's name is that of a radiograph.
pub fn is_image(path: &Path) -> bool {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
    matches!(ending.as_deref(), Some("png" | "jpg" | "jpeg" | "dcm" | "dicom"))
}

impl Radiograph {
    /// Reads a PNG, JPEG or DICOM file; colours become grey.
    ///
    /// # Errors
    /// When it cannot be read, is damaged or no such image.
    pub fn read(path: &Path) -> Result<Self> {
        let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        match ending.as_deref() {
            Some("dcm" | "dicom") => {
                let dicom = Dicom::read(path)?;
                let mut image = Self::new(dicom.rows, dicom.columns, dicom.brightness());
                image.patient = (!dicom.patient.is_empty()).then(|| dicom.patient.clone());
                if matches!(dicom.view.as_str(), "LL" | "RL" | "LATERAL") {
                    image.warnings.push(format!("lateral view ({})", dicom.view));
                }
                Ok(image)
            }
            Some("png" | "jpg" | "jpeg") => {
                let picture = Picture::read(path)?;
                let [_, height, width] = picture.shape;
                let mut image = Self::new(height, width, picture.to_grey());
                if picture.colour() > COLOURED {
                    image.warnings.push("colours: no plain radiograph".into());
                }
                Ok(image)
            }
            _ => Err(Error::input(path.display(), "is no PNG, JPEG or DICOM file by its name")),
        }
    }

    /// Of pixels.
    ///
    /// # Panics
    /// When they do not fill it.
    pub fn new(height: usize, width: usize, pixels: Vec<f32>) -> Self {
        assert_eq!(pixels.len(), height * width, "pixels must fill {height} x {width}");
        let bytes: Vec<u8> = pixels.iter().map(|&x| (x * 255.0).round() as u8).collect();
        let mut hash = Sha256::new();
        hash.update((width as u64).to_le_bytes());
        hash.update(&bytes);
        let hash = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        let mut warnings = Vec::new();
        let (low, high) = pixels.iter().fold((1.0f32, 0.0f32), |(l, h), &x| (l.min(x), h.max(x)));
        if high - low < 0.05 {
            warnings.push("hardly any contrast".into());
        }
        Self { height, width, pixels, hash, patient: None, warnings }
    }
}

/// The radiographs of a folder, by name, with those in its folders.
///
/// # Errors
/// When it cannot be read or holds none.
pub fn find(path: &Path) -> Result<Vec<PathBuf>> {
    if path.is_file() {
        return Ok(vec![path.into()]);
    }
    let mut found = Vec::new();
    collect(path, &mut found)?;
    if found.is_empty() {
        return Err(Error::input(path.display(), "holds no PNG, JPEG or DICOM files"));
    }
    found.sort();
    Ok(found)
}

fn collect(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let entry = entry.map_err(Error::io("read", folder))?;
        let path = entry.path();
        // Links are not followed into folders, so that none leads round in a circle.
        if entry.file_type().map_err(Error::io("read", &path))?.is_dir() {
            collect(&path, found)?;
        } else if is_image(&path) {
            found.push(path);
        }
    }
    Ok(())
}

/// How an image is brought to a square.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fit {
    /// Sides are scaled each for itself
    #[default]
    Stretch,
    /// Black is added to the shorter side
    Pad,
}

/// How brightness is made comparable.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Norm {
    /// Every image has mean 0 and deviation 1
    #[default]
    Zscore,
    /// As networks trained on ImageNet expect it
    Imagenet,
}

/// What is done to a radiograph before a network sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cxr {
    /// Rows and columns.
    pub size: usize,
    /// How it becomes a square.
    pub fit: Fit,
    /// How its brightness is made comparable.
    pub norm: Norm,
}

impl Cxr {
    /// The radiograph as a square plane, `[size, size]`, from 0 to 1.
    pub fn plane(&self, image: &Radiograph) -> Vec<f32> {
        self.square(&image.pixels, [image.height, image.width])
    }

    /// A plane of any shape as a square one.
    pub fn square(&self, pixels: &[f32], [height, width]: [usize; 2]) -> Vec<f32> {
        let size = self.size;
        let [inner, [top, left]] = self.place([height, width]);
        let scaled = resize_plane(pixels, [height, width], inner);
        if inner == [size, size] {
            return scaled;
        }
        let mut plane = vec![0.0; size * size];
        for (y, row) in scaled.chunks(inner[1]).enumerate() {
            plane[(top + y) * size + left..][..inner[1]].copy_from_slice(row);
        }
        plane
    }

    /// What of a square plane an image of another shape fills, in the image's own shape: the way back of
    /// [`square`](Self::square).
    pub fn unsquare(&self, plane: &[f32], shape: [usize; 2]) -> Vec<f32> {
        let [inner, [top, left]] = self.place(shape);
        let cut: Vec<f32> = (0..inner[0])
            .flat_map(|y| plane[(top + y) * self.size + left..][..inner[1]].iter().copied())
            .collect();
        resize_plane(&cut, inner, shape)
    }

    /// Shape of an image within the square, and where it begins.
    fn place(&self, [height, width]: [usize; 2]) -> [[usize; 2]; 2] {
        let size = self.size;
        match self.fit {
            Fit::Stretch => [[size; 2], [0; 2]],
            Fit::Pad => {
                let longer = height.max(width) as f64;
                let side =
                    |extent: usize| ((extent as f64 / longer * size as f64).round() as usize).clamp(1, size);
                let inner = [side(height), side(width)];
                [inner, inner.map(|side| (size - side) / 2)]
            }
        }
    }

    /// Planes as a network takes them: grey in three channels, made comparable.
    ///
    /// # Shapes
    /// - planes: of `[size, size]` each, from 0 to 1
    /// - output: `[planes, 3, size, size]`
    pub fn to_tensor<'a>(&self, planes: impl IntoIterator<Item = &'a [f32]>, device: &Device) -> Tensor<4> {
        let mut values = Vec::new();
        let mut count = 0;
        for plane in planes {
            count += 1;
            match self.norm {
                Norm::Zscore => {
                    let plane = zscore(plane);
                    (0..3).for_each(|_| values.extend_from_slice(&plane));
                }
                Norm::Imagenet => {
                    let (means, deviations) = IMAGENET;
                    for (mean, deviation) in means.into_iter().zip(deviations) {
                        values.extend(plane.iter().map(|x| (x - mean) / deviation));
                    }
                }
            }
        }
        Tensor::from_data(TensorData::new(values, [count, 3, self.size, self.size]), device)
    }

    /// Reads, squares and normalises one file.
    ///
    /// # Shapes
    /// - output: `[1, 3, size, size]`
    ///
    /// # Errors
    /// As [`Radiograph::read`].
    pub fn preprocess(&self, path: &Path, device: &Device) -> Result<Tensor<4>> {
        let plane = self.plane(&Radiograph::read(path)?);
        Ok(self.to_tensor([&plane[..]], device))
    }
}

/// Mean 0 and deviation 1; a plane of one brightness becomes 0.
pub fn zscore(plane: &[f32]) -> Vec<f32> {
    let n = plane.len() as f64;
    let mean = plane.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
    let variance = plane.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
    let scale = if variance > 1e-12 { 1.0 / variance.sqrt() } else { 0.0 };
    plane.iter().map(|&x| ((f64::from(x) - mean) * scale) as f32).collect()
}

/// An image with black outside the lungs; with `crop`, cut to them and brought back to its size.
pub fn segmented(plane: &[f32], lungs: &Mask, crop: bool) -> Vec<f32> {
    let masked: Vec<f32> =
        plane.iter().zip(&lungs.lung).map(|(&x, &lung)| if lung { x } else { 0.0 }).collect();
    match lungs.bounds().filter(|_| crop) {
        None => masked,
        Some([rows, columns]) => {
            let cut: Vec<f32> = (rows[0]..rows[1])
                .flat_map(|y| {
                    masked[y * lungs.width + columns[0]..y * lungs.width + columns[1]].iter().copied()
                })
                .collect();
            resize_plane(&cut, [rows[1] - rows[0], columns[1] - columns[0]], [lungs.height, lungs.width])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padding_keeps_the_aspect_and_is_undone() {
        let cxr = Cxr { size: 8, fit: Fit::Pad, norm: Norm::Zscore };
        let pixels: Vec<f32> = (0..32).map(|i| i as f32 / 32.0).collect();
        let plane = cxr.square(&pixels, [4, 8]);
        assert!(plane[..16].iter().all(|&x| x == 0.0) && plane[16..48] == pixels[..]);
        assert_eq!(cxr.unsquare(&plane, [4, 8]), pixels);
    }

    #[test]
    fn brightness_is_made_comparable() {
        let plane = zscore(&[0.1, 0.2, 0.6, 0.9]);
        assert!(plane.iter().sum::<f32>().abs() < 1e-6);
        assert!((plane.iter().map(|x| x * x).sum::<f32>() - 4.0).abs() < 1e-5);
        assert_eq!(zscore(&[0.5; 3]), [0.0; 3]);
    }

    #[test]
    fn a_segmented_image_is_black_outside_the_lungs() {
        let lungs = Mask { height: 2, width: 2, lung: vec![true, false, false, false] };
        assert_eq!(segmented(&[0.5, 0.6, 0.7, 0.8], &lungs, false), [0.5, 0.0, 0.0, 0.0]);
        assert_eq!(segmented(&[0.5, 0.6, 0.7, 0.8], &lungs, true), [0.5; 4]);
    }
}
