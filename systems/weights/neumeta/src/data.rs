//! Pictures with what is to be learned about them: classes, masks, or nothing.

use std::fs;
use std::path::{Path, PathBuf};

use image::ImageReader;
use kiln_core::{Context, Error, Result};
use kiln_data::Images;
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};

/// Pictures, and where they are to be segmented, a class for every pixel.
#[derive(Debug, Clone, PartialEq)]
pub struct Samples {
    /// The pictures, with labels where they are to be classified.
    pub images: Images,
    /// `[images, height, width]`; empty where there are no masks.
    pub masks: Vec<u8>,
}

impl Samples {
    /// How many.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// The mask of one picture.
    pub fn mask(&self, index: usize) -> &[u8] {
        let [_, height, width] = self.images.shape;
        &self.masks[index * height * width..][..height * width]
    }

    /// These samples, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let masks = if self.masks.is_empty() {
            Vec::new()
        } else {
            indices.iter().flat_map(|&i| self.mask(i).iter().copied()).collect()
        };
        Self { images: self.images.select(indices), masks }
    }

    /// Holds out a share of the samples, at random: the rest, and those.
    ///
    /// # Errors
    /// When there is only one.
    pub fn split(&self, share: f64, cx: &Context) -> Result<(Self, Self)> {
        if !(share > 0.0 && share < 1.0) {
            return Err(Error::usage(format!("--val-fraction {share} is not between 0 and 1")));
        }
        if self.len() < 2 {
            return Err(Error::usage("one picture is too few")
                .hint("one is held out for validation, others are learned from"));
        }
        let mut order: Vec<usize> = (0..self.len()).collect();
        order.shuffle(&mut cx.rng("split", 0));
        let held_out = ((self.len() as f64 * share).round() as usize).clamp(1, self.len() - 1);
        let (valid, train) = order.split_at(held_out);
        Ok((self.select(train), self.select(valid)))
    }

    /// Reads the masks of a folder of pictures: for each file `name.png` of `folder` a mask `name.png`, whose values
    /// are classes.
    ///
    /// # Errors
    /// When a mask is missing, has another size, or names a class of `classes` or above.
    pub fn with_masks(images: Images, folder: &Path, masks: &Path, classes: Option<usize>) -> Result<Self> {
        let mut values = Vec::new();
        let [_, height, width] = images.shape;
        for file in picture_files(folder)? {
            let name = file.file_name().unwrap_or_default();
            let path = masks.join(name).with_extension("png");
            let mask = ImageReader::open(&path)
                .map_err(|e| {
                    Error::io("read", &path)(e).hint("every picture needs a mask of the same name, as PNG")
                })?
                .decode()
                .map_err(|e| Error::input(path.display(), "is not a whole PNG image").caused_by(e))?;
            let mask = mask.into_luma8();
            if (mask.width() as usize, mask.height() as usize) != (width, height) {
                let found = format!("is {} x {} pixels", mask.width(), mask.height());
                return Err(
                    Error::input(path.display(), found).hint(format!("its picture is {width} x {height}"))
                );
            }
            if let (Some(classes), Some(&wrong)) =
                (classes, mask.as_raw().iter().find(|&&class| Some(usize::from(class)) >= classes))
            {
                return Err(Error::input(path.display(), format!("has the class {wrong}"))
                    .hint(format!("classes are the pixels' values, 0 to {}", classes - 1)));
            }
            values.extend(mask.into_raw());
        }
        if values.len() != images.len() * height * width {
            let found = format!("{} masks for {} pictures", values.len() / (height * width), images.len());
            return Err(Error::input(masks.display(), found));
        }
        Ok(Self { images, masks: values })
    }

    /// The number of classes that masks need: one more than the highest.
    pub fn mask_classes(&self) -> usize {
        usize::from(self.masks.iter().copied().max().unwrap_or(0)) + 1
    }
}

/// PNG and JPEG files of a folder in the order of their names, as [`Images::read`] takes them without labels.
fn picture_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).map_err(Error::io("read", folder))?;
    let mut files = entries
        .map(|entry| Ok(entry.map_err(Error::io("read", folder))?.path()))
        .collect::<Result<Vec<PathBuf>>>()?;
    files.retain(|file| {
        let ending = file.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        matches!(ending.as_deref(), Some("png" | "jpg" | "jpeg"))
    });
    files.sort();
    Ok(files)
}

/// Pictures half as large in both directions, each pixel the mean of four.
pub fn halved(images: &Images) -> Images {
    let [channels, height, width] = images.shape;
    let (tall, wide) = (height / 2, width / 2);
    let mut pixels = Vec::with_capacity(images.len() * channels * tall * wide);
    for plane in images.pixels.chunks(height * width) {
        for row in 0..tall {
            for column in 0..wide {
                let at = |r: usize, c: usize| plane[(2 * row + r) * width + 2 * column + c];
                pixels.push((at(0, 0) + at(0, 1) + at(1, 0) + at(1, 1)) / 4.0);
            }
        }
    }
    Images { shape: [channels, tall, wide], pixels, labels: images.labels.clone(), ..images.clone() }
}

/// Scenes of two or three things each on a square canvas, with masks: 0 where there is nothing, else the thing's class
/// and one more. Later things hide earlier ones.
///
/// # Panics
/// When the things are larger than the canvas.
pub fn scenes(things: &Images, canvas: usize, count: usize, rng: &mut impl Rng) -> Samples {
    /// A pixel brighter than this belongs to the thing.
    const INK: f32 = 0.1;
    let [_, height, width] = things.shape;
    assert!(height.max(width) <= canvas, "things must fit on the canvas");
    let (mut pixels, mut masks) = (vec![0.0f32; count * canvas * canvas], vec![0u8; count * canvas * canvas]);
    for (scene, mask) in pixels.chunks_mut(canvas * canvas).zip(masks.chunks_mut(canvas * canvas)) {
        for _ in 0..rng.random_range(2..=3) {
            let thing = rng.random_range(0..things.len());
            let (top, left) = (rng.random_range(0..=canvas - height), rng.random_range(0..=canvas - width));
            let picture = &things.image(thing)[..height * width];
            for (place, &ink) in picture.iter().enumerate().filter(|(_, ink)| **ink > INK) {
                let at = (top + place / width) * canvas + left + place % width;
                scene[at] = ink;
                mask[at] = things.labels[thing] as u8 + 1;
            }
        }
    }
    let images = Images {
        shape: [1, canvas, canvas],
        pixels,
        labels: Vec::new(),
        classes: Vec::new(),
        white: things.white,
    };
    Samples { images, masks }
}
