//! Text that comes token by token and ends before a stop text.

use crate::{TokenStream, Tokenizer};

/// Joins tokens into text of which no part of the stop text, and no part of a character, is ever given out.
pub struct StoppedText<'a> {
    stream: TokenStream<'a>,
    stop: Option<&'a str>,
    /// Everything decoded, cut where the stop text began.
    text: String,
    /// Bytes of `text` already given out.
    given: usize,
    stopped: bool,
}

impl<'a> StoppedText<'a> {
    /// Nothing yet; an empty stop text is none.
    pub fn new(tokenizer: &'a Tokenizer, stop: Option<&'a str>) -> Self {
        let stop = stop.filter(|stop| !stop.is_empty());
        Self { stream: TokenStream::new(tokenizer), stop, text: String::new(), given: 0, stopped: false }
    }

    /// What can be shown now that `id` is known.
    pub fn push(&mut self, id: u32) -> String {
        let piece = self.stream.push(id);
        self.text.push_str(&piece);
        self.release(false)
    }

    /// What had been held back, now that no more tokens come.
    pub fn finish(&mut self) -> String {
        let stream = std::mem::replace(&mut self.stream, TokenStream::new(&Tokenizer::Byte));
        if !self.stopped {
            self.text.push_str(&stream.finish());
        }
        self.release(true)
    }

    /// Everything up to the stop text, also what is held back.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the stop text came.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    fn release(&mut self, all: bool) -> String {
        let mut end = self.text.len();
        if let Some(stop) = self.stop {
            // No stop text begins in what was given out.
            if let Some(at) = self.text[self.given..].find(stop) {
                end = self.given + at;
                self.text.truncate(end);
                self.stopped = true;
            } else if !all {
                // What may be the beginning of the stop text is held back.
                let held = (1..stop.len().min(end + 1))
                    .rev()
                    .find(|&n| stop.is_char_boundary(n) && self.text.ends_with(&stop[..n]));
                end -= held.unwrap_or(0);
            }
        }
        let piece = self.text[self.given..end].to_string();
        self.given = end;
        piece
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces that the bytes of `text` give, the rest last, the whole text, and whether it was stopped.
    fn pieces(text: &str, stop: &str) -> (Vec<String>, String, bool) {
        let mut output = StoppedText::new(&Tokenizer::Byte, Some(stop));
        let mut pieces = Vec::new();
        for byte in text.bytes() {
            pieces.push(output.push(byte.into()));
            if output.stopped() {
                break;
            }
        }
        pieces.push(output.finish());
        (pieces, output.text().to_string(), output.stopped())
    }

    #[test]
    fn what_may_begin_the_stop_text_is_held_back_until_it_is_known() {
        let (pieces, text, stopped) = pieces("xababc!", "abc");
        assert_eq!(pieces, ["x", "", "", "ab", "", "", ""]);
        assert_eq!((text.as_str(), stopped), ("xab", true));
    }

    #[test]
    fn a_stop_text_that_never_ends_is_shown_at_the_end() {
        let (pieces, text, stopped) = pieces("x€a", "ab");
        assert_eq!(pieces, ["x", "", "", "€", "", "a"]);
        assert_eq!((text.as_str(), stopped), ("x€a", false));
    }

    #[test]
    fn half_a_character_is_not_half_a_stop_text() {
        let (pieces, _, stopped) = pieces("é€", "€");
        assert_eq!(pieces, ["", "é", "", "", "", ""]);
        assert!(stopped);
        let nothing = StoppedText::new(&Tokenizer::Byte, Some("")).push(b'a'.into());
        assert_eq!(nothing, "a");
    }
}
