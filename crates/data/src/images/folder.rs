//! Folders of image files, one folder for each class.

use std::fs;
use std::path::{Path, PathBuf};

use image::{ColorType, DynamicImage, ImageReader};
use kiln_core::{Error, Result};

use super::{ImageOptions, Images, check_size};

/// All images of a folder: grey if every file is, else red, green and blue.
pub(super) fn read(path: &Path, options: &ImageOptions) -> Result<Images> {
    let (mut files, mut labels) = (Vec::new(), Vec::new());
    for class in entries(path)?.into_iter().filter(|entry| entry.is_dir()) {
        let name = class.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        for file in image_files(&class)? {
            files.push(file);
            labels.push(name.clone());
        }
    }
    if files.is_empty() && options.unlabelled {
        files = image_files(path)?;
    }
    if files.is_empty() {
        return Err(Error::input(path.display(), "holds no folders with PNG or JPEG files")
            .hint("expected one folder for each class, with its images inside"));
    }
    read_files(path, &files)?.labelled(&labels, path)
}

/// One image file.
pub(super) fn read_one(path: &Path) -> Result<Images> {
    read_files(path, &[path.into()])
}

/// Image files of one size, of which there is at least one.
fn read_files(path: &Path, files: &[PathBuf]) -> Result<Images> {
    let pictures = files.iter().map(|file| open(file)).collect::<Result<Vec<_>>>()?;
    let size = (pictures[0].width(), pictures[0].height());
    for (file, picture) in files.iter().zip(&pictures) {
        if (picture.width(), picture.height()) != size {
            let found = format!("is {} x {} pixels", picture.width(), picture.height());
            return Err(Error::input(file.display(), found).hint(format!(
                "{} is {} x {}: all images must have one size",
                files[0].display(),
                size.0,
                size.1
            )));
        }
    }
    let grey = pictures.iter().all(|picture| !picture.color().has_color());
    let (width, height) = (size.0 as usize, size.1 as usize);
    let shape = [if grey { 1 } else { 3 }, height, width];
    let mut pixels = Vec::with_capacity(check_size(path, &[pictures.len(), shape[0], height, width])?);
    for picture in &pictures {
        append(picture, grey, &mut pixels);
    }
    Ok(Images { shape, pixels, labels: Vec::new(), classes: Vec::new(), white: 1.0 })
}

/// What a folder holds, by name.
fn entries(path: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(path).map_err(Error::io("read", path))?;
    let mut paths = entries
        .map(|entry| Ok(entry.map_err(Error::io("read", path))?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn image_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = entries(folder)?;
    files.retain(|file| {
        let ending = file.extension().map(|ending| ending.to_string_lossy().to_lowercase());
        matches!(ending.as_deref(), Some("png" | "jpg" | "jpeg"))
    });
    Ok(files)
}

pub(super) fn open(path: &Path) -> Result<DynamicImage> {
    ImageReader::open(path)
        .and_then(ImageReader::with_guessed_format)
        .map_err(Error::io("read", path))?
        .decode()
        .map_err(|e| Error::input(path.display(), "is not a whole PNG or JPEG image").caused_by(e))
}

/// Appends an image plane by plane, with sixteen bits where it has them.
pub(super) fn append(picture: &DynamicImage, grey: bool, pixels: &mut Vec<f32>) {
    let deep =
        matches!(picture.color(), ColorType::L16 | ColorType::La16 | ColorType::Rgb16 | ColorType::Rgba16);
    if grey && deep {
        pixels.extend(picture.to_luma16().as_raw().iter().map(|&x| f32::from(x) / 65535.0));
    } else if grey {
        pixels.extend(picture.to_luma8().as_raw().iter().map(|&x| f32::from(x) / 255.0));
    } else {
        let raw = picture.to_rgb32f().into_raw();
        (0..3).for_each(|channel| pixels.extend(raw.iter().skip(channel).step_by(3)));
    }
}
