//! Texts as token ids.

use std::fs;
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result};

use crate::Tokenizer;

/// File name extensions that are read from a folder of texts.
const TEXT_EXTENSIONS: [&str; 16] = [
    "txt", "text", "md", "rst", "tex", "org", "html", "xml", "json", "jsonl", "csv", "tsv", "rs", "py", "c",
    "h",
];

/// One or more documents as one sequence of token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// The documents' token ids, one after another.
    pub ids: Vec<u32>,
    /// Where each document starts in `ids`; the first at 0.
    pub documents: Vec<usize>,
}

impl Corpus {
    /// Reads a file, or the text files of a folder (not of its subfolders) in the order of their names,
    /// one document each.
    ///
    /// # Errors
    /// When nothing is there to read, a file cannot be read, or the tokenizer does not accept its bytes.
    pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Self> {
        let files = if path.is_dir() { text_files(path)? } else { vec![path.to_path_buf()] };
        let mut corpus = Self { ids: Vec::new(), documents: Vec::new() };
        for file in files {
            let bytes = fs::read(&file).map_err(Error::io("read", &file))?;
            let ids = tokenizer.encode(&bytes).map_err(|e| {
                let named = Error::input(file.display(), &e);
                match e.hint_text() {
                    Some(hint) => named.hint(hint),
                    None => named,
                }
            })?;
            if !ids.is_empty() {
                corpus.documents.push(corpus.ids.len());
                corpus.ids.extend(ids);
            }
        }
        if corpus.ids.is_empty() {
            return Err(Error::input(path.display(), "holds no text").hint("give a file that is not empty"));
        }
        Ok(corpus)
    }

    /// One document from memory.
    ///
    /// # Errors
    /// When the tokenizer does not accept the bytes.
    pub fn from_bytes(bytes: &[u8], tokenizer: &Tokenizer) -> Result<Self> {
        Ok(Self { ids: tokenizer.encode(bytes)?, documents: vec![0] })
    }

    /// Cuts off the last `val_fraction` (0 to 1) of the tokens for validation: (training, validation).
    pub fn split(self, val_fraction: f64) -> (Self, Self) {
        let held_out = (self.ids.len() as f64 * val_fraction.clamp(0.0, 1.0)).round() as usize;
        let cut = self.ids.len() - held_out;
        let (before, after): (Vec<_>, Vec<_>) = self.documents.iter().partition(|&&start| start < cut);
        let mut ids = self.ids;
        let validation = Self {
            ids: ids.split_off(cut),
            // A document that the cut divides goes on at the start of the validation text.
            documents: std::iter::once(0)
                .chain(after.into_iter().map(|start| start - cut).filter(|&start| start > 0))
                .collect(),
        };
        (Self { ids, documents: before }, validation)
    }

    /// Makes sure that there are at least `min_tokens` tokens; `place` says which text this is.
    ///
    /// # Errors
    /// When there are fewer; names the count needed and the count found.
    pub fn require(&self, min_tokens: usize, place: impl std::fmt::Display) -> Result<()> {
        if self.ids.len() >= min_tokens {
            return Ok(());
        }
        let found = format!("has {} tokens, but at least {min_tokens} are needed", self.ids.len());
        Err(Error::input(place, found).hint("give more text or ask for shorter sequences"))
    }
}

/// The text files of a folder in the order of their names.
fn text_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_text = |path: &Path| {
        let extension = path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase);
        path.is_file() && extension.is_some_and(|e| TEXT_EXTENSIONS.contains(&e.as_str()))
    };
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::io("read", folder))? {
        let path = entry.map_err(Error::io("read", folder))?.path();
        if is_text(&path) {
            files.push(path);
        }
    }
    if files.is_empty() {
        return Err(Error::input(folder.display(), "is a folder without text files")
            .hint(format!("read are files ending in {}", TEXT_EXTENSIONS.join(", "))));
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        dir
    }

    #[test]
    fn a_folder_is_read_in_name_order_with_one_document_a_file() {
        let dir = folder(&[("b.md", b"BB"), ("a.TXT", b"aaa"), ("c.txt", b""), ("d.png", b"png")]);
        let corpus = Corpus::read(dir.path(), &Tokenizer::Byte).unwrap();
        assert_eq!(corpus.ids, [97, 97, 97, 66, 66]);
        assert_eq!(corpus.documents, [0, 3]);
    }

    #[test]
    fn a_binary_file_is_fine_for_bytes() {
        let dir = folder(&[("a.bin", &[0, 255, 128])]);
        assert_eq!(Corpus::read(&dir.path().join("a.bin"), &Tokenizer::Byte).unwrap().ids, [0, 255, 128]);
    }

    #[test]
    fn nothing_to_read_is_an_error_that_names_the_place() {
        let dir = folder(&[("empty.txt", b"")]);
        let read = |path: &Path| Corpus::read(path, &Tokenizer::Byte).unwrap_err().to_string();
        assert!(read(&dir.path().join("empty.txt")).contains("empty.txt: holds no text"));
        assert!(read(&dir.path().join("missing.txt")).contains("cannot read"));
        let images = folder(&[("a.png", b"png")]);
        assert!(read(images.path()).contains("without text files"));
    }

    #[test]
    fn split_takes_the_tail_and_keeps_document_starts() {
        let corpus = Corpus { ids: (0..10).collect(), documents: vec![0, 3, 8] };
        let (train, valid) = corpus.clone().split(0.4);
        assert_eq!((train.ids.len(), train.documents), (6, vec![0, 3]));
        assert_eq!((valid.ids, valid.documents), (vec![6, 7, 8, 9], vec![0, 2]));
        let (train, valid) = corpus.split(0.2);
        assert_eq!((train.documents, valid.documents), (vec![0, 3], vec![0]));
    }

    #[test]
    fn too_short_a_text_names_both_counts() {
        let corpus = Corpus::from_bytes(b"abc", &Tokenizer::Byte).unwrap();
        corpus.require(3, "text").unwrap();
        let error = corpus.require(257, "play.txt").unwrap_err().to_string();
        assert_eq!(error, "play.txt: has 3 tokens, but at least 257 are needed");
    }
}
