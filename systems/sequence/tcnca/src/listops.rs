//! ListOps (Nangia and Bowman, arXiv 1804.06028, as in the Long Range Arena): nested prefix expressions over digits, such as
//! `[MAX 2 9 [MIN 4 7 ] 0 ]`, whose value is a digit.

use std::fmt;

use kiln_core::{Error, Result};
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

/// The opening symbols, in the order of [`Operator`].
const OPENINGS: [&str; 4] = ["[MAX", "[MIN", "[MED", "[SM"];
/// Every symbol of the language.
pub const SYMBOLS: [&str; 15] =
    ["[MAX", "[MIN", "[MED", "[SM", "]", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9"];
/// The share of arguments that are digits although they could be lists.
const DIGITS: f64 = 0.25;
/// Expressions that are drawn before a wanted length counts as out of reach.
const ATTEMPTS: usize = 100_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operator {
    Max,
    Min,
    /// The median; of an even number the mean of the two in the middle, cut to a whole number.
    Median,
    /// The sum modulo 10.
    Sum,
}

impl Operator {
    const ALL: [Self; 4] = [Self::Max, Self::Min, Self::Median, Self::Sum];

    fn apply(self, mut digits: Vec<u8>) -> u8 {
        digits.sort_unstable();
        let (first, last, middle) = (digits[0], digits[digits.len() - 1], digits.len() / 2);
        match self {
            Self::Max => last,
            Self::Min => first,
            Self::Median if digits.len().is_multiple_of(2) => (digits[middle - 1] + digits[middle]) / 2,
            Self::Median => digits[middle],
            Self::Sum => (digits.iter().map(|&digit| u32::from(digit)).sum::<u32>() % 10) as u8,
        }
    }
}

/// Where and why a text is no expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError {
    /// The symbol, counted from 1.
    pub symbol: usize,
    /// What is wrong there.
    pub found: String,
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "symbol {} {}", self.symbol, self.found)
    }
}

/// The value of an expression whose symbols are separated by spaces.
///
/// # Errors
/// Names the first symbol that has no place.
pub fn evaluate(text: &str) -> Result<u8, ParseError> {
    // Lists that are still open, so that depth costs no stack.
    let mut open: Vec<(Operator, Vec<u8>)> = Vec::new();
    let mut value = None;
    let mut symbols = 0;
    for word in text.split_whitespace() {
        symbols += 1;
        let wrong = |found: String| ParseError { symbol: symbols, found };
        if value.is_some() {
            return Err(wrong(format!("is \"{word}\", after the end of the expression")));
        }
        let digit = if let Some(which) = OPENINGS.iter().position(|opening| *opening == word) {
            open.push((Operator::ALL[which], Vec::new()));
            continue;
        } else if word == "]" {
            let (operator, digits) =
                open.pop().ok_or_else(|| wrong("closes a list that was not opened".into()))?;
            if digits.is_empty() {
                return Err(wrong("closes an empty list".into()));
            }
            operator.apply(digits)
        } else {
            word.parse().ok().filter(|digit| *digit < 10).ok_or_else(|| {
                wrong(format!(
                    "is \"{word}\", neither a digit, a closing ] nor one of {}",
                    OPENINGS.join(" ")
                ))
            })?
        };
        match open.last_mut() {
            Some((_, digits)) => digits.push(digit),
            None => value = Some(digit),
        }
    }
    value.ok_or_else(|| ParseError {
        symbol: symbols + 1,
        found: format!("is missing: {} lists are open at the end", open.len()),
    })
}

/// Which expressions are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListOps {
    /// Fewest symbols.
    pub min_len: usize,
    /// Most symbols.
    pub max_len: usize,
    /// Most lists inside one another.
    pub max_depth: usize,
    /// Most arguments of a list; at least 2.
    pub max_args: usize,
}

impl ListOps {
    /// An expression and its value.
    ///
    /// # Errors
    /// When expressions of the wanted length do not come up.
    pub fn draw(&self, rng: &mut impl Rng) -> Result<(String, u8)> {
        self.check()?;
        for _ in 0..ATTEMPTS {
            let mut symbols = Vec::new();
            self.list(&mut symbols, 1, rng);
            if (self.min_len..=self.max_len).contains(&symbols.len()) {
                let text = symbols.join(" ");
                let value =
                    evaluate(&text).map_err(|e| Error::work(format!("a drawn expression is none: {e}")))?;
                return Ok((text, value));
            }
        }
        let message =
            format!("none of {ATTEMPTS} expressions had {} to {} symbols", self.min_len, self.max_len);
        Err(Error::work(message).hint("allow more lengths, a greater depth or more arguments"))
    }

    fn check(&self) -> Result<()> {
        if self.max_args < 2 || self.max_depth == 0 || self.max_depth > 1000 {
            return Err(Error::usage("lists need at least 2 arguments and a depth of 1 to 1000"));
        }
        if self.min_len > self.max_len || self.max_len < 4 {
            return Err(Error::usage(format!("no list has {} to {} symbols", self.min_len, self.max_len))
                .hint("the shortest has 4: an operator, two digits and ]"));
        }
        Ok(())
    }

    /// Appends a list; stops early once it is too long to be wanted.
    fn list(&self, symbols: &mut Vec<&'static str>, depth: usize, rng: &mut impl Rng) {
        symbols.push(OPENINGS[rng.random_range(0..OPENINGS.len())]);
        for _ in 0..rng.random_range(2..=self.max_args) {
            if symbols.len() > self.max_len {
                return;
            }
            if depth == self.max_depth || rng.random_bool(DIGITS) {
                symbols.push(SYMBOLS[5 + rng.random_range(0..10)]);
            } else {
                self.list(symbols, depth + 1, rng);
            }
        }
        symbols.push("]");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn values_by_hand() {
        for (text, value) in [
            ("7", 7),
            ("[MAX 2 9 [MIN 4 7 ] 0 ]", 9),
            ("[MIN 4 7 ]", 4),
            ("[MED 1 8 3 ]", 3),
            ("[MED 1 4 9 2 ]", 3), // (2 + 4) / 2
            ("[MED 1 2 ]", 1),     // 1.5, cut
            ("[SM 9 8 7 ]", 4),
            ("[SM [MAX 1 [MED 0 5 5 ] ] [MIN 9 [SM 6 6 ] ] ]", 7),
        ] {
            assert_eq!(evaluate(text), Ok(value), "{text}");
        }
        let deep = "[MAX 1 ".repeat(10) + "8" + &" ]".repeat(10);
        assert_eq!(evaluate(&deep), Ok(8));
        let deeper = "[SM 1 ".repeat(100_000) + "0" + &" ]".repeat(100_000);
        assert_eq!(evaluate(&deeper), Ok(0));
    }

    #[test]
    fn what_is_no_expression_is_named_by_its_symbol() {
        for (text, symbol, words) in [
            ("[MAX 1 x ]", 3, "\"x\""),
            ("[MAX 1 12 ]", 3, "\"12\""),
            ("[MAX 1 2", 4, "1 lists are open"),
            ("[MAX ]", 2, "empty list"),
            ("] 1", 1, "not opened"),
            ("1 2", 2, "after the end"),
            ("", 1, "missing"),
        ] {
            let error = evaluate(text).unwrap_err();
            assert_eq!(error.symbol, symbol, "{text}: {error}");
            assert!(error.found.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn drawn_expressions_keep_to_lengths_and_depth_and_repeat() {
        let listops = ListOps { min_len: 20, max_len: 60, max_depth: 4, max_args: 5 };
        let mut values = std::collections::BTreeSet::new();
        for index in 0..100 {
            let draw = || listops.draw(&mut random_stream(1, "listops", index)).unwrap();
            let (text, value) = draw();
            assert_eq!(draw(), (text.clone(), value));
            assert!((20..=60).contains(&text.split(' ').count()), "{text}");
            let depth = text.split(' ').scan(0i32, |depth, word| {
                *depth += i32::from(word.starts_with('[')) - i32::from(word == "]");
                Some(*depth)
            });
            assert!(depth.max().unwrap() <= 4, "{text}");
            values.insert(value);
        }
        assert!(values.len() >= 8, "{values:?}");
        let impossible = ListOps { min_len: 500, max_len: 600, max_depth: 1, max_args: 3 };
        assert!(impossible.draw(&mut random_stream(1, "listops", 0)).is_err());
    }
}
