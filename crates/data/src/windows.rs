//! Random stretches of a corpus, for training.

use rand::{Rng, RngExt};

/// Draws batches of windows, each starting anywhere in the corpus.
#[derive(Debug, Clone, Copy)]
pub struct Windows<'a> {
    /// Token ids; more than `seq_len` of them.
    pub corpus: &'a [u32],
    /// Tokens read in a window; the targets are one further.
    pub seq_len: usize,
    /// Windows in a batch.
    pub batch: usize,
}

impl Windows<'_> {
    /// Where the windows of a batch begin, each anywhere in the corpus.
    ///
    /// # Panics
    /// When the corpus has fewer than `seq_len + 1` tokens; [`Corpus::require`](crate::Corpus::require)
    /// turns that into an error for the user.
    pub fn starts(&self, rng: &mut impl Rng) -> Vec<usize> {
        let count = self.corpus.len().checked_sub(self.seq_len).filter(|&n| n > 0);
        let count = count.expect("a corpus must be longer than its windows");
        (0..self.batch).map(|_| rng.random_range(0..count)).collect()
    }

    /// The windows' inputs and the tokens that follow them, each `[batch, seq_len]` in row-major order.
    pub fn read(&self, starts: &[usize]) -> (Vec<i64>, Vec<i64>) {
        let mut inputs = Vec::with_capacity(self.batch * self.seq_len);
        let mut targets = Vec::with_capacity(self.batch * self.seq_len);
        for &start in starts {
            let window = &self.corpus[start..=start + self.seq_len];
            inputs.extend(window[..self.seq_len].iter().map(|&id| i64::from(id)));
            targets.extend(window[1..].iter().map(|&id| i64::from(id)));
        }
        (inputs, targets)
    }

    /// A random batch: [`read`](Self::read) at random [`starts`](Self::starts).
    pub fn batch(&self, rng: &mut impl Rng) -> (Vec<i64>, Vec<i64>) {
        self.read(&self.starts(rng))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn targets_follow_inputs_and_every_start_is_drawn() {
        let corpus: Vec<u32> = (0..7).collect();
        let windows = Windows { corpus: &corpus, seq_len: 4, batch: 200 };
        let (inputs, targets) = windows.batch(&mut random_stream(0, "batch", 0));
        assert!(inputs.iter().zip(&targets).all(|(input, target)| input + 1 == *target));
        let starts: std::collections::BTreeSet<i64> = inputs.chunks(4).map(|row| row[0]).collect();
        assert_eq!(starts, [0, 1, 2].into());
    }

    #[test]
    fn the_stream_decides_the_batch() {
        let corpus: Vec<u32> = (0..1000).collect();
        let windows = Windows { corpus: &corpus, seq_len: 5, batch: 3 };
        let draw = |index| windows.batch(&mut random_stream(3, "batch", index));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
