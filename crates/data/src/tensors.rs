//! Files of named tensors, whatever their format.

use std::path::Path;

use kiln_core::{Error, Result, TensorFile};

use crate::npz::{read_npz, write_npz};

/// The formats, told apart by the end of the name.
enum Format {
    Npz,
    Safetensors,
}

fn format(path: &Path) -> Result<Format> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("npz") => Ok(Format::Npz),
        Some("safetensors") => Ok(Format::Safetensors),
        _ => Err(Error::usage(format!("{} ends neither in .npz nor in .safetensors", path.display()))
            .hint("tensors are read and written in these two formats")),
    }
}

/// Reads every tensor of an `.npz` or `.safetensors` file.
///
/// # Errors
/// When the name ends otherwise, or the file is missing or malformed.
pub fn read_tensors(path: &Path) -> Result<TensorFile> {
    match format(path)? {
        Format::Npz => read_npz(path),
        Format::Safetensors => TensorFile::read(path),
    }
}

/// Writes tensors into an `.npz` or `.safetensors` file, atomically.
///
/// # Errors
/// When the name ends otherwise or the file cannot be written.
pub fn write_tensors(path: &Path, tensors: &TensorFile) -> Result<()> {
    match format(path)? {
        Format::Npz => write_npz(path, tensors),
        Format::Safetensors => tensors.write(path),
    }
}
