//! Tokens to train on: texts, JSON lines, and arrays of token ids.

use std::fs;
use std::path::Path;

use kiln_core::{Error, ModelFolder, Result, random_stream, write_atomic};
use kiln_data::{Corpus, Tokenizer, Windows};
use npyz::NpyFile;
use rand::RngExt;
use serde_json::{Value, json};

/// Where the samples of a step come from.
#[derive(Debug, Clone)]
pub enum Tokens {
    /// Stretches of a text.
    Text {
        /// All token ids.
        ids: Vec<u32>,
        /// Whether they begin anywhere, or follow one another.
        shuffle: bool,
    },
    /// Given samples, used in order.
    Fixed {
        /// `[steps, batch, seq + 1]`
        ids: Vec<u32>,
        /// The shape.
        shape: [usize; 3],
    },
}

impl Tokens {
    /// The samples of a step, `[batch, seq + 1]`: inputs and, one further, the tokens that follow. They depend on step and
    /// seed alone, not on the layout.
    ///
    /// # Panics
    /// When [`check`](Self::check) would refuse.
    pub fn batch(&self, step: usize, (batch, seq): (usize, usize), seed: u64) -> Vec<u32> {
        match self {
            Self::Text { ids, shuffle: true } => {
                let windows = Windows { corpus: ids, seq_len: seq, batch };
                let starts = windows.starts(&mut random_stream(seed, "batch", step as u64));
                starts.iter().flat_map(|&start| &ids[start..=start + seq]).copied().collect()
            }
            Self::Text { ids, shuffle: false } => {
                let windows = (ids.len() - 1) / seq;
                let start = |sample: usize| (step * batch + sample) % windows * seq;
                (0..batch).flat_map(|sample| &ids[start(sample)..=start(sample) + seq]).copied().collect()
            }
            Self::Fixed { ids, shape: [_, samples, len] } => {
                ids[step * samples * len..][..samples * len].to_vec()
            }
        }
    }

    /// Makes sure that there are samples for every step, of ids in the vocabulary.
    ///
    /// # Errors
    /// Says what is missing; `place` names where the tokens come from.
    pub fn check(&self, steps: usize, (batch, seq): (usize, usize), vocab: usize, place: &str) -> Result<()> {
        let ids = match self {
            Self::Text { ids, .. } if ids.len() <= seq => {
                return Err(Error::input(
                    place,
                    format!("has {} tokens, but samples of {seq} need at least {}", ids.len(), seq + 1),
                )
                .hint("give more text, or a shorter --seq"));
            }
            Self::Fixed { shape, .. } if shape[0] < steps || shape[1..] != [batch, seq + 1] => {
                let found =
                    format!("has the shape {shape:?}, expected at least [{steps}, {batch}, {}]", seq + 1);
                return Err(Error::input(place, found)
                    .hint("the axes are steps, samples of a batch, and tokens with one more than --seq"));
            }
            Self::Text { ids, .. } | Self::Fixed { ids, .. } => ids,
        };
        match ids.iter().position(|&id| id as usize >= vocab) {
            Some(at) => Err(Error::input(
                place,
                format!("token id {} at {at} is outside the vocabulary of {vocab}", ids[at]),
            )
            .hint("was the text cut by another tokenizer than the model's? --vocab sets the number of ids")),
            None => Ok(()),
        }
    }
}

/// Reads a text file, a folder of them, JSON lines with a text field, or a `.npy` array of ids.
///
/// # Errors
/// When it cannot be read, is malformed, or holds nothing.
pub fn read_text(path: &Path, text_field: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("npy") => Ok(read_npy(path)?.0),
        Some("jsonl") if path.is_file() => {
            let ids = tokenizer.encode(&json_lines(path, text_field)?).map_err(|e| at(path, &e))?;
            if ids.is_empty() {
                return Err(Error::input(path.display(), format!("holds no text in \"{text_field}\"")));
            }
            Ok(ids)
        }
        _ => Ok(Corpus::read(path, tokenizer)?.ids),
    }
}

/// The bytes of a text as [`read_text`] sees it, for a tokenizer that is made from them.
fn text_bytes(path: &Path, text_field: &str) -> Result<Vec<u8>> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("npy") => Err(Error::usage("--tokenizer char needs text, not token ids")
            .hint("use --tokenizer bytes and --vocab")),
        Some("jsonl") if path.is_file() => json_lines(path, text_field),
        _ => Ok(Corpus::read(path, &Tokenizer::Byte)?.ids.into_iter().map(|id| id as u8).collect()),
    }
}

fn at(path: &Path, error: &Error) -> Error {
    let named = Error::input(path.display(), error);
    match error.hint_text() {
        Some(hint) => named.hint(hint),
        None => named,
    }
}

/// The text fields of all lines, each followed by a line break.
fn json_lines(path: &Path, field: &str) -> Result<Vec<u8>> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let mut text = Vec::new();
    for (number, line) in bytes.split(|&b| b == b'\n').enumerate() {
        if line.trim_ascii().is_empty() {
            continue;
        }
        let place = || format!("{}, line {}", path.display(), number + 1);
        let value: Value = serde_json::from_slice(line)
            .map_err(|e| Error::input(place(), "is not valid JSON").caused_by(e))?;
        let found = value.get(field).and_then(Value::as_str).ok_or_else(|| {
            let keys = value.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>().join(", "));
            Error::input(place(), format!("has no text in \"{field}\""))
                .hint(format!("--text-field names the field; there are: {}", keys.unwrap_or_default()))
        })?;
        text.extend_from_slice(found.as_bytes());
        text.push(b'\n');
    }
    Ok(text)
}

/// Samples in order, `[steps, batch, seq + 1]` ids.
///
/// # Errors
/// When the file is no `.npy` array of such a shape.
pub fn read_samples(path: &Path) -> Result<Tokens> {
    let (ids, shape) = read_npy(path)?;
    let shape: [usize; 3] = shape.as_slice().try_into().map_err(|_| {
        Error::input(path.display(), format!("has the shape {shape:?}, expected [steps, batch, seq + 1]"))
    })?;
    Ok(Tokens::Fixed { ids, shape })
}

/// A `.npy` array of whole numbers.
pub(crate) fn read_npy(path: &Path) -> Result<(Vec<u32>, Vec<usize>)> {
    let malformed = |found: String| {
        Error::input(path.display(), found)
            .hint("it must be an array of whole numbers as numpy.save writes it")
    };
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let file = NpyFile::new(&bytes[..]).map_err(|e| malformed("is not a .npy file".into()).caused_by(e))?;
    let shape: Vec<usize> = file.shape().iter().map(|&n| n as usize).collect();
    let count = shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m));
    if count.is_none_or(|count| count > bytes.len()) {
        return Err(malformed(format!(
            "claims the shape {shape:?}, more than its {} bytes hold",
            bytes.len()
        )));
    }
    if file.header().order() == npyz::Order::Fortran && shape.len() > 1 {
        return Err(malformed("is stored column by column".into()).hint("save numpy.ascontiguousarray of it"));
    }
    let kind = file.dtype().descr();
    let broken = |e: std::io::Error| malformed("ends too early".into()).caused_by(e);
    macro_rules! read_as {
        ($($type:ty),+) => {{
            let mut ids = None;
            $(if ids.is_none() && let Ok(reader) = file.clone_for::<$type>(&bytes) {
                let wide = |id: std::io::Result<$type>| id.map(|id| u32::try_from(id).ok());
                ids = Some(reader.map(wide).collect::<std::io::Result<Option<Vec<u32>>>>().map_err(broken)?);
            })+
            ids
        }};
    }
    trait Again {
        fn clone_for<'a, T: npyz::Deserialize>(
            &self,
            bytes: &'a [u8],
        ) -> Result<npyz::NpyReader<T, &'a [u8]>, ()>;
    }
    impl Again for NpyFile<&[u8]> {
        fn clone_for<'a, T: npyz::Deserialize>(
            &self,
            bytes: &'a [u8],
        ) -> Result<npyz::NpyReader<T, &'a [u8]>, ()> {
            NpyFile::new(bytes).map_err(|_| ())?.data::<T>().map_err(|_| ())
        }
    }
    match read_as!(u8, u16, u32, u64, i16, i32, i64) {
        Some(Some(ids)) => Ok((ids, shape)),
        Some(None) => Err(malformed("holds a number that is no token id".into())),
        None => Err(malformed(format!("has the type {kind}"))),
    }
}

/// The tokenizer of a name: `bytes`, `char` (every character that occurs in `data` is a token), or the path of a
/// `tokenizer.json`; put into the model folder. Also says how the configuration calls it.
///
/// # Errors
/// When it or the text cannot be read.
pub fn make_tokenizer(
    name: &str,
    data: Option<&Path>,
    text_field: &str,
    folder: &ModelFolder,
) -> Result<(Tokenizer, String)> {
    let own = folder.file("tokenizer.json");
    let (tokenizer, called) = match name {
        "bytes" | "byte" => (Tokenizer::Byte, "bytes"),
        "char" => {
            let data =
                data.ok_or_else(|| Error::usage("--tokenizer char is made from --data, which is missing"))?;
            folder.create()?;
            write_atomic(&own, character_tokenizer(&text_bytes(data, text_field)?, data)?.as_bytes())?;
            (Tokenizer::load(&own.to_string_lossy())?, "char")
        }
        path => (Tokenizer::load(path)?, "tokenizer.json"),
    };
    folder.create()?;
    tokenizer.save(folder)?;
    Ok((tokenizer, called.into()))
}

/// A tokenizer file in which every character of a text is a token, and all others are one.
fn character_tokenizer(text: &[u8], path: &Path) -> Result<String> {
    let text = str::from_utf8(text).map_err(|e| {
        Error::input(
            path.display(),
            format!("is not UTF-8: byte {} is no part of a character", e.valid_up_to()),
        )
        .hint("use --tokenizer bytes, which accepts anything")
    })?;
    const UNKNOWN: &str = "<unknown>";
    let characters: std::collections::BTreeSet<char> = text.chars().collect();
    let mut vocab = serde_json::Map::new();
    for (id, token) in
        std::iter::once(UNKNOWN.to_string()).chain(characters.iter().map(char::to_string)).enumerate()
    {
        vocab.insert(token, id.into());
    }
    let file = json!({
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": { "type": "Split", "pattern": { "Regex": "(?s:.)" }, "behavior": "Isolated", "invert": false },
        "decoder": { "type": "Fuse" },
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": UNKNOWN },
    });
    Ok(file.to_string())
}

/// Samples of random ids, for benchmarks and experiments that need no text.
pub fn random_samples([steps, batch, len]: [usize; 3], vocab: usize, seed: u64) -> Tokens {
    let mut rng = random_stream(seed, "random tokens", 0);
    let ids = (0..steps * batch * len).map(|_| rng.random_range(0..vocab as u32)).collect();
    Tokens::Fixed { ids, shape: [steps, batch, len] }
}
