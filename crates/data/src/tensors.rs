//! Files of named tensors, whatever their format.

use std::path::Path;

use kiln_core::{Error, Result, TensorFile};

use crate::npz::{read_npz, write_npz};
use crate::pytorch::read_pytorch;

/// The formats, told apart by the end of the name.
enum Format {
    Npz,
    Safetensors,
    PyTorch,
}

fn format(path: &Path) -> Result<Format> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("npz") => Ok(Format::Npz),
        Some("safetensors") => Ok(Format::Safetensors),
        Some("pt" | "pth") => Ok(Format::PyTorch),
        _ => Err(Error::usage(format!("{} ends neither in .npz nor in .safetensors", path.display()))
            .hint("tensors are read and written in these two formats, and read from PyTorch's .pt and .pth")),
    }
}

/// Reads every tensor of an `.npz` or `.safetensors` file, or of a `.pt` or `.pth` file that `torch.save` wrote. Of a
/// checkpoint that keeps its weights under a name of their own, such as `state_dict`, only these are read, without that name.
///
/// # Errors
/// When the name ends otherwise, or the file is missing or malformed.
pub fn read_tensors(path: &Path) -> Result<TensorFile> {
    match format(path)? {
        Format::Npz => read_npz(path),
        Format::Safetensors => TensorFile::read(path),
        Format::PyTorch => read_pytorch(path),
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
        Format::PyTorch => Err(Error::usage(format!("{} would be a file of PyTorch's", path.display()))
            .hint("write .safetensors, which PyTorch reads with safetensors.torch.load_file")),
    }
}
