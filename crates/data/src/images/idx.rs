//! The IDX format of the MNIST family: a magic number with type and rank, extents, bytes.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use kiln_core::{Error, Result};

use super::{ImageOptions, Images, check_size};

/// Images, and the labels beside them.
pub(super) fn read(path: &Path, options: &ImageOptions) -> Result<Images> {
    let (extents, bytes) = read_bytes(path)?;
    let &[count, height, width] = &extents[..] else {
        return Err(Error::input(path.display(), format!("has the extents {extents:?}"))
            .hint("images have three: number, height, width; give the file of labels with --labels"));
    };
    let pixels = bytes.iter().map(|&byte| f32::from(byte) / 255.0).collect();
    let images =
        Images { shape: [1, height, width], pixels, labels: Vec::new(), classes: Vec::new(), white: 255.0 };
    let Some(labels) = options.labels.clone().or_else(|| labels_beside(path)) else {
        return match options.unlabelled {
            true => Ok(images),
            false => {
                Err(Error::input(path.display(), "has no file of labels beside it")
                    .hint("name it with --labels"))
            }
        };
    };
    let (extents, bytes) = read_bytes(&labels)?;
    if extents != [count] {
        let found = format!("has the extents {extents:?} for {count} images");
        return Err(
            Error::input(labels.display(), found).hint("labels have one extent, the number of images")
        );
    }
    images.labelled(&bytes.iter().map(u8::to_string).collect::<Vec<_>>(), &labels)
}

/// `…labels-idx1…` for `…images-idx3…`, where there is such a file.
fn labels_beside(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let beside = path.with_file_name(name.replace("images-idx3", "labels-idx1"));
    (beside != path && beside.exists()).then_some(beside)
}

/// Extents and elements of a file of bytes.
fn read_bytes(path: &Path) -> Result<(Vec<usize>, Vec<u8>)> {
    let file = BufReader::new(File::open(path).map_err(Error::io("read", path))?);
    let mut reader: Box<dyn Read> = match path.extension().is_some_and(|ending| ending == "gz") {
        true => Box::new(GzDecoder::new(file)),
        false => Box::new(file),
    };
    let malformed = |found: String| {
        Error::input(path.display(), found).hint("expected an IDX file of bytes, PNG folders, .npz or .csv")
    };
    let mut word = |what: &str| -> Result<[u8; 4]> {
        let mut bytes = [0; 4];
        reader
            .read_exact(&mut bytes)
            .map_err(|e| malformed(format!("ends before its {what}")).caused_by(e))?;
        Ok(bytes)
    };
    let magic = word("magic number")?;
    let [0, 0, 8, rank @ 1..=4] = magic else {
        return Err(malformed(format!("begins with the bytes {magic:?}")));
    };
    let extents =
        (0..rank).map(|_| Ok(u32::from_be_bytes(word("extents")?) as usize)).collect::<Result<Vec<_>>>()?;
    let total = check_size(path, &extents)?;
    let mut bytes = Vec::new();
    reader
        .take(total as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| malformed("cannot be read to its end".into()).caused_by(e))?;
    if bytes.len() != total {
        let found = if bytes.len() > total { "more".into() } else { bytes.len().to_string() };
        return Err(malformed(format!("should hold {total} bytes after its header but holds {found}")));
    }
    Ok((extents, bytes))
}
