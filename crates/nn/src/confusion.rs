//! How the classes that a model gives agree with the labels.

/// The class with the highest probability, or logit.
pub fn likeliest(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0)
}

/// How often each class was given for each label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confusion {
    counts: Vec<Vec<usize>>,
}

impl Confusion {
    /// Counts pairs of a label and the class that was given for it, both below `classes`.
    ///
    /// # Panics
    /// When one is not.
    pub fn new(classes: usize, pairs: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut counts = vec![vec![0; classes]; classes];
        pairs.into_iter().for_each(|(label, given)| counts[label][given] += 1);
        Self { counts }
    }

    /// `counts[label][given]`
    pub fn counts(&self) -> &[Vec<usize>] {
        &self.counts
    }

    /// How often a label occurs.
    fn occurrences(&self, label: usize) -> usize {
        self.counts[label].iter().sum()
    }

    fn total(&self) -> f64 {
        (0..self.counts.len()).map(|label| self.occurrences(label)).sum::<usize>() as f64
    }

    /// Share of the pairs whose label was given.
    pub fn accuracy(&self) -> f64 {
        (0..self.counts.len()).map(|class| self.counts[class][class]).sum::<usize>() as f64 / self.total()
    }

    /// Share of the commonest label, what always guessing it would reach.
    pub fn majority(&self) -> f64 {
        let most = (0..self.counts.len()).map(|label| self.occurrences(label)).max();
        most.unwrap_or(0) as f64 / self.total()
    }

    /// F1 of each class, averaged over the labels that occur.
    pub fn macro_f1(&self) -> f64 {
        let f1 = |class: usize| {
            let given: usize = self.counts.iter().map(|row| row[class]).sum();
            2.0 * self.counts[class][class] as f64 / (self.occurrences(class) + given) as f64
        };
        let present: Vec<usize> =
            (0..self.counts.len()).filter(|&label| self.occurrences(label) > 0).collect();
        present.iter().map(|&class| f1(class)).sum::<f64>() / present.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_by_hand() {
        // The third class never occurs, and is given once.
        let confusion = Confusion::new(3, [(0, 0), (0, 0), (0, 1), (1, 1), (1, 2)]);
        assert_eq!(confusion.counts(), [[2, 1, 0], [0, 1, 1], [0, 0, 0]]);
        assert_eq!((confusion.accuracy(), confusion.majority()), (0.6, 0.6));
        assert!((confusion.macro_f1() - (4.0 / 5.0 + 2.0 / 4.0) / 2.0).abs() < 1e-12);
        assert_eq!((likeliest(&[0.1, 0.7, 0.2]), likeliest(&[])), (1, 0));
    }
}
