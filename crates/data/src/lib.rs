//! File formats, datasets and generators.

pub mod digits;
mod npz;
pub mod shakespeare;
mod shared;
mod tensors;
mod text;
mod tokenizer;
mod windows;

pub use npz::{read_npz, write_npz};
pub use shared::shared_dir;
pub use tensors::{read_tensors, write_tensors};
pub use text::Corpus;
pub use tokenizer::{TokenStream, Tokenizer};
pub use windows::Windows;
