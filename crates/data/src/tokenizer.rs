//! From text to token ids and back.

use std::fs;
use std::path::Path;

use kiln_core::{Error, ModelFolder, Result, write_atomic};

/// The file in a model folder that holds a tokenizer other than bytes.
const FILE_NAME: &str = "tokenizer.json";

/// Names that published tokenizers give to the token which begins a text.
const START_TOKENS: [&str; 6] =
    ["<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>"];

/// Cuts texts into tokens.
#[derive(Debug, Clone)]
pub enum Tokenizer {
    /// Every byte is a token; accepts anything.
    Byte,
    /// A tokenizer in the Hugging Face format, with the JSON text it was read from.
    HuggingFace(Box<tokenizers::Tokenizer>, String),
}

impl Tokenizer {
    /// `byte`, or the tokenizer in a `tokenizer.json`.
    ///
    /// # Errors
    /// When the file cannot be read or is not a tokenizer.
    pub fn load(spec: &str) -> Result<Self> {
        if spec == "byte" {
            return Ok(Self::Byte);
        }
        let path = Path::new(spec);
        let json = fs::read_to_string(path)
            .map_err(|e| Error::io("read", path)(e).hint("give \"byte\" or the path of a tokenizer.json"))?;
        Self::from_json(json, path.display())
    }

    /// The tokenizer that a `tokenizer.json` describes; `source` names it in errors.
    ///
    /// # Errors
    /// When the text is not a tokenizer.
    pub fn from_json(json: String, source: impl std::fmt::Display) -> Result<Self> {
        let tokenizer = tokenizers::Tokenizer::from_bytes(&json).map_err(|e| {
            Error::input(source, "is not a tokenizer in the Hugging Face format").caused_by(e)
        })?;
        Ok(Self::HuggingFace(Box::new(tokenizer), json))
    }

    /// The tokenizer of a trained model; bytes when its folder holds none.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn open(folder: &ModelFolder) -> Result<Self> {
        let path = folder.file(FILE_NAME);
        if path.exists() { Self::load(&path.to_string_lossy()) } else { Ok(Self::Byte) }
    }

    /// Puts the tokenizer into a model folder, so that [`open`](Self::open) finds the same one.
    ///
    /// # Errors
    /// When the file cannot be written, or a stale one cannot be removed.
    pub fn save(&self, folder: &ModelFolder) -> Result<()> {
        let path = folder.file(FILE_NAME);
        match self {
            Self::HuggingFace(_, json) => write_atomic(&path, json.as_bytes()),
            Self::Byte if path.exists() => fs::remove_file(&path).map_err(Error::io("remove", &path)),
            Self::Byte => Ok(()),
        }
    }

    /// The token ids of a text, without special tokens around it.
    ///
    /// # Errors
    /// When the text is not UTF-8 and the tokenizer is not bytes; names the offset of the first bad byte.
    pub fn encode(&self, text: &[u8]) -> Result<Vec<u32>> {
        let Self::HuggingFace(tokenizer, _) = self else {
            return Ok(text.iter().map(|&byte| byte.into()).collect());
        };
        let text = str::from_utf8(text).map_err(|e| {
            let offset = e.valid_up_to();
            Error::input("text", format!("is not UTF-8: byte {offset} is 0x{:02x}", text[offset]))
                .hint("convert the text to UTF-8, or use --tokenizer byte, which accepts anything")
        })?;
        let encoding = tokenizer
            .encode_fast(text, false)
            .map_err(|e| Error::work("the tokenizer failed on the text").caused_by(e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of some tokens, special ones left out. Bytes come back exactly; other tokenizers give UTF-8,
    /// with U+FFFD where the tokens end inside a character.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        match self {
            // An id beyond 255 is no byte; it is shown as one unknown character.
            Self::Byte => ids.iter().fold(Vec::with_capacity(ids.len()), |mut bytes, &id| {
                match u8::try_from(id) {
                    Ok(byte) => bytes.push(byte),
                    Err(_) => bytes.extend("\u{fffd}".bytes()),
                }
                bytes
            }),
            // Decoding fails only for sequences that the decoder cannot join; what it knows is shown.
            Self::HuggingFace(tokenizer, _) => tokenizer.decode(ids, true).map_or_else(
                |_| ids.iter().filter_map(|&id| tokenizer.id_to_token(id)).collect::<String>().into_bytes(),
                String::into_bytes,
            ),
        }
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Byte => 256,
            Self::HuggingFace(tokenizer, _) => {
                tokenizer.get_vocab(true).values().max().map_or(0, |&highest| highest as usize + 1)
            }
        }
    }

    /// The token from which text is generated without a prompt: the tokenizer's own start token if it has
    /// one, else a line break.
    pub fn start_token(&self) -> u32 {
        let Self::HuggingFace(tokenizer, _) = self else {
            return b'\n'.into();
        };
        let put_before_any_text = || tokenizer.encode_fast("", true).ok()?.get_ids().first().copied();
        let by_name = || START_TOKENS.iter().find_map(|name| tokenizer.token_to_id(name));
        let line_break = || tokenizer.encode_fast("\n", false).ok()?.get_ids().last().copied();
        put_before_any_text().or_else(by_name).or_else(line_break).unwrap_or(0)
    }
}

/// Turns tokens into text as they come, holding back what is not yet a whole character.
#[derive(Debug, Clone)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    /// The last tokens shown, for context, and those not yet shown.
    ids: Vec<u32>,
    /// How many of `ids` have been shown.
    shown: usize,
    /// Bytes of an unfinished character, for the byte tokenizer.
    bytes: Vec<u8>,
}

/// A character has at most four bytes, so that tokens held back for longer do not form one.
const MAX_HELD_TOKENS: usize = 4;

impl<'a> TokenStream<'a> {
    /// A stream that has seen nothing.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), shown: 0, bytes: Vec::new() }
    }

    /// The text that `id` completes, which may be empty. Bytes that can never become a character come out as
    /// U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        match self.tokenizer {
            Tokenizer::Byte => {
                self.bytes.extend(self.tokenizer.decode(&[id]));
                take_whole_characters(&mut self.bytes)
            }
            Tokenizer::HuggingFace(..) => {
                self.ids.push(id);
                let text = self.unshown_text();
                let held = self.ids.len() - self.shown;
                if text.is_empty() || (text.ends_with('\u{fffd}') && held < MAX_HELD_TOKENS) {
                    return String::new();
                }
                self.ids.drain(..self.shown);
                self.shown = self.ids.len();
                text
            }
        }
    }

    /// What was held back, with U+FFFD for what is not a character.
    pub fn finish(self) -> String {
        match self.tokenizer {
            Tokenizer::Byte => String::from_utf8_lossy(&self.bytes).into_owned(),
            Tokenizer::HuggingFace(..) => self.unshown_text(),
        }
    }

    /// The text of the tokens not yet shown. How a token reads can depend on those before it (a leading
    /// space), so that both are decoded together.
    fn unshown_text(&self) -> String {
        let text = |ids: &[u32]| String::from_utf8_lossy(&self.tokenizer.decode(ids)).into_owned();
        let (before, all) = (text(&self.ids[..self.shown]), text(&self.ids));
        all.get(before.len()..).unwrap_or_default().to_string()
    }
}

/// Removes everything from `bytes` but the beginning of a character at its end, and returns it as text.
fn take_whole_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    loop {
        match str::from_utf8(bytes) {
            Ok(valid) => {
                text.push_str(valid);
                bytes.clear();
                return text;
            }
            Err(error) => {
                let valid = error.valid_up_to();
                text.push_str(&String::from_utf8_lossy(&bytes[..valid]));
                let Some(bad) = error.error_len() else {
                    bytes.drain(..valid);
                    return text;
                };
                text.push('\u{fffd}');
                bytes.drain(..valid + bad);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level BPE over a few bytes: `h`, `i`, the space, the three bytes of `€`, one merge and `<s>`.
    const SMALL: &str = r#"{
        "version": "1.0",
        "added_tokens": [{"id": 7, "content": "<s>", "single_word": false, "lstrip": false,
                          "rstrip": false, "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": {"h": 0, "i": 1, "Ġ": 2, "â": 3, "Ĥ": 4, "¬": 5, "hi": 6},
                  "merges": ["h i"]}
    }"#;

    fn small() -> (tempfile::TempDir, Tokenizer) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        fs::write(&path, SMALL).unwrap();
        let tokenizer = Tokenizer::load(path.to_str().unwrap()).unwrap();
        (dir, tokenizer)
    }

    #[test]
    fn a_tokenizer_file_encodes_and_decodes() {
        let (_dir, tokenizer) = small();
        let ids = tokenizer.encode("hi h€".as_bytes()).unwrap();
        assert_eq!(ids, [6, 2, 0, 3, 4, 5]);
        assert_eq!(tokenizer.decode(&ids), "hi h€".as_bytes());
        assert_eq!(tokenizer.vocab_size(), 8);
        assert_eq!(tokenizer.start_token(), 7);
    }

    #[test]
    fn bytes_decode_to_themselves() {
        let all: Vec<u8> = (0..=255).collect();
        let ids = Tokenizer::Byte.encode(&all).unwrap();
        assert_eq!(Tokenizer::Byte.decode(&ids), all);
        assert_eq!((Tokenizer::Byte.vocab_size(), Tokenizer::Byte.start_token()), (256, 10));
    }

    #[test]
    fn a_model_folder_keeps_its_tokenizer() {
        let (_source, tokenizer) = small();
        let dir = tempfile::tempdir().unwrap();
        let folder = ModelFolder::new(dir.path());
        assert!(matches!(Tokenizer::open(&folder).unwrap(), Tokenizer::Byte));
        tokenizer.save(&folder).unwrap();
        assert_eq!(Tokenizer::open(&folder).unwrap().vocab_size(), 8);
        Tokenizer::Byte.save(&folder).unwrap();
        assert!(matches!(Tokenizer::open(&folder).unwrap(), Tokenizer::Byte));
    }

    #[test]
    fn bad_text_and_bad_files_are_named() {
        let (dir, tokenizer) = small();
        let error = tokenizer.encode(b"hi\xff").unwrap_err().to_string();
        assert_eq!(error, "text: is not UTF-8: byte 2 is 0xff");
        let path = dir.path().join("other.json");
        fs::write(&path, "{}").unwrap();
        let error = Tokenizer::load(path.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("other.json: is not a tokenizer"), "{error}");
        assert!(Tokenizer::load("nowhere.json").unwrap_err().hint_text().is_some());
    }

    #[test]
    fn characters_come_out_whole() {
        let mut stream = TokenStream::new(&Tokenizer::Byte);
        let pieces: Vec<String> = "a€b".bytes().map(|byte| stream.push(byte.into())).collect();
        assert_eq!(pieces, ["a", "", "", "€", "b"]);
        assert_eq!(stream.finish(), "");

        let (_dir, tokenizer) = small();
        let mut stream = TokenStream::new(&tokenizer);
        let pieces: Vec<String> = [6, 2, 3, 4, 5, 0].map(|id| stream.push(id)).into();
        assert_eq!(pieces, ["hi", " ", "", "", "€", "h"]);
        assert_eq!(stream.finish(), "");
    }

    #[test]
    fn what_is_no_character_comes_out_marked_and_the_end_is_flushed() {
        let mut stream = TokenStream::new(&Tokenizer::Byte);
        let pieces: Vec<String> = b"\xffa\xe2\x82".iter().map(|&byte| stream.push(byte.into())).collect();
        assert_eq!(pieces, ["\u{fffd}", "a", "", ""]);
        assert_eq!(stream.finish(), "\u{fffd}");

        let (_dir, tokenizer) = small();
        let mut stream = TokenStream::new(&tokenizer);
        assert_eq!(stream.push(3), "");
        assert!(stream.finish().contains('\u{fffd}'));
    }
}
