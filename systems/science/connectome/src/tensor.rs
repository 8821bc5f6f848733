//! The tensor that is factorised: time × animals × pairs of neurons.

use kiln_core::{Error, HostTensor, Result, TensorFile, Values};

/// A stored number: f32 to save memory, f64 for checks.
pub trait Element: Copy + Send + Sync {
    /// Widened.
    fn widen(self) -> f64;
}

impl Element for f32 {
    #[inline(always)]
    fn widen(self) -> f64 {
        self.into()
    }
}

impl Element for f64 {
    #[inline(always)]
    fn widen(self) -> f64 {
        self
    }
}

/// Non-negative affinities `[time, animals, pairs]`; pairs are the upper triangle of neurons × neurons, row by row.
#[derive(Debug, Clone, PartialEq)]
pub struct AffinityTensor<E = f32> {
    /// T.
    pub frames: usize,
    /// W.
    pub animals: usize,
    /// P.
    pub pairs: usize,
    /// `[T, W, P]`; zero where a pair is missing in an animal.
    pub values: Vec<E>,
    /// `[W, P]`: whether an animal has both neurons. None where every animal has all.
    pub mask: Option<Vec<bool>>,
}

/// Pairs of n neurons.
pub fn pair_count(n: usize) -> usize {
    n * n.saturating_sub(1) / 2
}

/// The number of neurons that have so many pairs, if there is one.
pub fn neuron_count(pairs: usize) -> Option<usize> {
    let n = ((1.0 + (1.0 + 8.0 * pairs as f64).sqrt()) / 2.0).round() as usize;
    (pair_count(n) == pairs).then_some(n)
}

/// The place of the pair (i, j), i < j, among those of n neurons.
pub fn pair_index(i: usize, j: usize, n: usize) -> usize {
    debug_assert!(i < j && j < n);
    i * (2 * n - i - 1) / 2 + j - i - 1
}

impl<E: Element> AffinityTensor<E> {
    /// A tensor of these values, checked.
    ///
    /// # Errors
    /// When a value is negative or not finite, or the mask leaves nothing; `place` names where they come from.
    pub fn checked(
        place: &str,
        [frames, animals, pairs]: [usize; 3],
        mut values: Vec<E>,
        mask: Option<Vec<bool>>,
        zero: E,
    ) -> Result<Self> {
        let wrong = |found: String| Error::input(place, found);
        if frames * animals * pairs == 0 {
            return Err(wrong(format!(
                "the tensor has the shape [{frames}, {animals}, {pairs}]: nothing in it"
            )));
        }
        if let Some(mask) = &mask {
            if !mask.contains(&true) {
                return Err(wrong("the mask leaves no pair in any animal".into()));
            }
            for (row, values) in values.chunks_mut(pairs).enumerate() {
                let animal = row % animals;
                for (value, &there) in values.iter_mut().zip(&mask[animal * pairs..]) {
                    if !there {
                        *value = zero;
                    }
                }
            }
        }
        if let Some(at) = values.iter().position(|v| !(v.widen().is_finite() && v.widen() >= 0.0)) {
            let (t, w, p) = (at / (animals * pairs), at / pairs % animals, at % pairs);
            return Err(wrong(format!("the entry [{t}, {w}, {p}] is {}", values[at].widen()))
                .hint("affinities are finite and not negative; mark missing pairs in the mask"));
        }
        Ok(Self { frames, animals, pairs, values, mask })
    }

    /// Whether an animal has a pair.
    pub fn has(&self, animal: usize, pair: usize) -> bool {
        self.mask.as_ref().is_none_or(|mask| mask[animal * self.pairs + pair])
    }

    /// Number of pairs that no animal has.
    pub fn unseen_pairs(&self) -> usize {
        (0..self.pairs).filter(|&p| (0..self.animals).all(|w| !self.has(w, p))).count()
    }

    /// Number of entries that were observed.
    pub fn observed(&self) -> usize {
        let of_animal = |w: usize| (0..self.pairs).filter(|&p| self.has(w, p)).count();
        self.frames * (0..self.animals).map(of_animal).sum::<usize>()
    }

    /// Σ x².
    pub fn squared_norm(&self) -> f64 {
        let row = |row: &[E]| row.iter().map(|v| v.widen() * v.widen()).sum::<f64>();
        self.values.chunks(self.pairs).map(row).sum()
    }
}

impl AffinityTensor {
    /// As a file: `tensor` [T, W, P], `mask` [W, P], and the names in the metadata.
    pub fn to_file(&self, neurons: &[String], animals: &[String]) -> TensorFile {
        let mut file = TensorFile::new();
        let shape = [self.frames, self.animals, self.pairs];
        file.insert("tensor", HostTensor::float(shape, self.values.clone()));
        let mask = (0..self.animals).flat_map(|w| (0..self.pairs).map(move |p| i64::from(self.has(w, p))));
        file.insert("mask", HostTensor::int([self.animals, self.pairs], mask.collect()));
        file.metadata.insert("neurons".into(), neurons.join(","));
        file.metadata.insert("animals".into(), animals.join(","));
        file
    }

    /// As symmetric matrices with zeros on the diagonal, `[T, W, N, N]`.
    pub fn as_matrices(&self, neurons: usize) -> HostTensor {
        let mut matrices = vec![0.0; self.frames * self.animals * neurons * neurons];
        for (matrix, pairs) in matrices.chunks_mut(neurons * neurons).zip(self.values.chunks(self.pairs)) {
            let places = (0..neurons).flat_map(|i| (i + 1..neurons).map(move |j| (i, j)));
            for ((i, j), &value) in places.zip(pairs) {
                (matrix[i * neurons + j], matrix[j * neurons + i]) = (value, value);
            }
        }
        HostTensor::float([self.frames, self.animals, neurons, neurons], matrices)
    }

    /// From a file with `tensor` [T, W, P], or [T, W, N, N] with symmetric slices, and perhaps `mask` [W, P].
    ///
    /// # Errors
    /// When either has another shape or type, or values that no affinity has.
    pub fn from_file(mut file: TensorFile, mask: Option<HostTensor>) -> Result<Self> {
        let place = file.source().display().to_string();
        let tensor = file.take("tensor")?;
        let mask = mask.or_else(|| file.take("mask").ok());
        let wrong = |found: String| Error::input(&place, found);
        let Values::Float(values) = tensor.values else {
            return Err(wrong("\"tensor\" holds integers".into()).hint("affinities are floats"));
        };
        let (shape, values) = match tensor.shape[..] {
            [t, w, p] => ([t, w, p], values),
            [t, w, n, m] if n == m => ([t, w, pair_count(n)], upper_triangles(&place, &values, n)?),
            _ => {
                return Err(wrong(format!("\"tensor\" has the shape {:?}", tensor.shape))
                    .hint("it must be [time, animals, pairs] or [time, animals, neurons, neurons]"));
            }
        };
        let mask = mask.map(|mask| {
            if mask.shape != shape[1..] {
                return Err(wrong(format!(
                    "the mask has the shape {:?}, must have {:?}",
                    mask.shape,
                    &shape[1..]
                )));
            }
            Ok(match mask.values {
                Values::Float(values) => values.iter().map(|&v| v != 0.0).collect(),
                Values::Int(values) => values.iter().map(|&v| v != 0).collect(),
            })
        });
        Self::checked(&place, shape, values, mask.transpose()?, 0.0)
    }
}

/// The upper triangles of symmetric slices.
fn upper_triangles(place: &str, values: &[f32], n: usize) -> Result<Vec<f32>> {
    let mut pairs = Vec::with_capacity(values.len() / 2);
    for slice in values.chunks(n * n) {
        for i in 0..n {
            for j in i + 1..n {
                let (above, below) = (slice[i * n + j], slice[j * n + i]);
                if (above - below).abs() > 1e-5 * above.abs().max(below.abs()) {
                    return Err(Error::input(
                        place,
                        format!(
                            "a slice of \"tensor\" is not symmetric: {above} at [{i}, {j}], {below} at [{j}, {i}]"
                        ),
                    ));
                }
                pairs.push(above);
            }
        }
    }
    Ok(pairs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_numbered_row_by_row() {
        let n = 7;
        let pairs = (0..n).flat_map(|i| (i + 1..n).map(move |j| (i, j)));
        for (place, (i, j)) in pairs.enumerate() {
            assert_eq!(pair_index(i, j, n), place);
        }
        assert_eq!(neuron_count(pair_count(n)), Some(n));
        assert_eq!(neuron_count(20), None);
    }
}
