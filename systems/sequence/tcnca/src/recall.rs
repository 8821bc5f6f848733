//! Associative recall: after pairs of keys and values a key is asked for, and its value is the answer.

use kiln_core::{Error, Result};
use rand::seq::SliceRandom;
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

/// The task with L symbols in pairs and V keys and values. Symbols below V are keys, those from V on values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recall {
    /// L, symbols before the question; even.
    pub length: usize,
    /// V, keys, and as many values.
    pub values: usize,
}

impl Recall {
    /// Checks that the numbers fit.
    ///
    /// # Errors
    /// Names those that do not.
    pub fn check(&self) -> Result<()> {
        if self.length < 2 || !self.length.is_multiple_of(2) || self.values < 2 {
            let message =
                format!("recall of {} symbols with {} values makes no sense", self.length, self.values);
            return Err(
                Error::usage(message).hint("the symbols come in pairs, and there are at least two values")
            );
        }
        Ok(())
    }

    /// Number of symbols.
    pub fn vocab(&self) -> usize {
        2 * self.values
    }

    /// A sequence of L + 1 symbols, the last of which is a key that occurred, and the value that belongs to it.
    pub fn draw(&self, rng: &mut impl Rng) -> (Vec<u32>, u32) {
        let mut map: Vec<u32> = (self.values..2 * self.values).map(|value| value as u32).collect();
        map.shuffle(rng);
        let keys: Vec<usize> = (0..self.length / 2).map(|_| rng.random_range(0..self.values)).collect();
        let asked = keys[rng.random_range(0..keys.len())];
        let mut symbols: Vec<u32> = keys.iter().flat_map(|&key| [key as u32, map[key]]).collect();
        symbols.push(asked as u32);
        (symbols, map[asked])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn the_answer_is_the_value_that_stood_beside_the_key() {
        let recall = Recall { length: 12, values: 5 };
        for index in 0..50 {
            let (symbols, answer) = recall.draw(&mut random_stream(0, "recall", index));
            let (pairs, asked) = (&symbols[..12], symbols[12]);
            let beside: Vec<u32> =
                pairs.chunks(2).filter(|pair| pair[0] == asked).map(|pair| pair[1]).collect();
            assert!(!beside.is_empty() && beside.iter().all(|&value| value == answer), "{symbols:?}");
            assert!(pairs.chunks(2).all(|pair| pair[0] < 5 && (5..10).contains(&pair[1])));
        }
        assert!(Recall { length: 7, values: 5 }.check().is_err());
    }
}
