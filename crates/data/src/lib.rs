//! File formats, datasets and generators.

pub mod avro;
mod csv_file;
pub mod dicom;
pub mod digits;
pub mod edf;
pub mod fits;
mod images;
mod matrix;
mod npz;
mod pytorch;
mod roc;
pub mod shakespeare;
mod shared;
mod stopped_text;
pub mod table;
mod tensors;
mod text;
mod tokenizer;
mod windows;

pub use csv_file::write_csv;
pub use images::{ImageOptions, Images, Picture};
pub use matrix::Matrix;
pub use npz::{read_npy, read_npz, read_npz_as, write_npz, write_npz_as};
pub use roc::{roc_auc, roc_curve};
pub use shared::shared_dir;
pub use stopped_text::StoppedText;
pub use table::{Cells, Column, Encoder, Table, TableOptions};
pub use tensors::{read_tensors, write_tensors};
pub use text::Corpus;
pub use tokenizer::{TokenStream, Tokenizer};
pub use windows::Windows;
