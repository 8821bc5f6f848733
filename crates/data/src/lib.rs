//! File formats, datasets and generators.

pub mod shakespeare;
mod shared;
mod text;
mod tokenizer;
mod windows;

pub use shared::shared_dir;
pub use text::Corpus;
pub use tokenizer::{TokenStream, Tokenizer};
pub use windows::Windows;
