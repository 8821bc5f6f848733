//! The tensor that is factorised: time × animals × pairs of neurons.

use std::path::Path;
use std::sync::Arc;

use clap::ValueEnum;
use kiln_core::{Error, HostTensor, Result, StreamedTensor, TensorFile, Values};

use crate::entries::{AT_ONCE, Entries};

/// A stored number: f32 to save memory, f64 for checks.
pub trait Element: Copy + Send + Sync + From<f32> {
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
#[derive(Debug, Clone)]
pub struct AffinityTensor<E = f32> {
    /// T.
    pub frames: usize,
    /// W.
    pub animals: usize,
    /// P.
    pub pairs: usize,
    /// `[T, W, P]`; zero where a pair is missing in an animal.
    pub entries: Entries<E>,
    /// `[W, P]`: whether an animal has both neurons. None where every animal has all.
    pub mask: Option<Vec<bool>>,
    /// Where it comes from, for messages.
    pub place: String,
}

/// Pairs of n neurons.
pub fn pair_count(n: usize) -> usize {
    n * n.saturating_sub(1) / 2
}

/// How the pairs of a written tensor are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// [time, animals, pairs]
    Pairs,
    /// [time, animals, neurons, neurons]
    Matrix,
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
    /// A tensor in memory.
    ///
    /// # Panics
    /// When there are not as many values, or marks in the mask, as the shape has.
    pub fn new(
        [frames, animals, pairs]: [usize; 3],
        values: Vec<E>,
        mask: Option<Vec<bool>>,
    ) -> AffinityTensor<E> {
        assert_eq!(values.len(), frames * animals * pairs, "values of [{frames}, {animals}, {pairs}]");
        assert!(mask.as_ref().is_none_or(|mask| mask.len() == animals * pairs), "marks of the mask");
        Self { frames, animals, pairs, entries: Entries::Memory(values), mask, place: "the tensor".into() }
    }

    /// A tensor of these values, checked; what the mask leaves out becomes zero.
    ///
    /// # Errors
    /// When a value is negative or not finite, or the mask leaves nothing; `place` names where they come from.
    pub fn checked(
        place: &str,
        shape: [usize; 3],
        mut values: Vec<E>,
        mask: Option<Vec<bool>>,
    ) -> Result<Self> {
        let [_, animals, pairs] = shape;
        if let Some(mask) = &mask {
            for (row, values) in values.chunks_mut(pairs.max(1)).enumerate() {
                for (value, &there) in values.iter_mut().zip(&mask[row % animals * pairs..]) {
                    if !there {
                        *value = E::from(0.0);
                    }
                }
            }
        }
        let tensor = Self { place: place.into(), ..Self::new(shape, values, mask) };
        tensor.check()?;
        Ok(tensor)
    }

    /// Makes sure that all entries can be affinities.
    fn check(&self) -> Result<()> {
        let wrong = |found: String| Error::input(&self.place, found);
        let &Self { frames, animals, pairs, .. } = self;
        if self.entries.is_empty() {
            return Err(wrong(format!(
                "the tensor has the shape [{frames}, {animals}, {pairs}]: nothing in it"
            )));
        }
        if self.mask.as_ref().is_some_and(|mask| !mask.contains(&true)) {
            return Err(wrong("the mask leaves no pair in any animal".into()));
        }
        self.pass(|first, rows| {
            let at = |place: usize| {
                let (row, p) = (first + place / pairs, place % pairs);
                (row / animals, row % animals, p)
            };
            if let Some(found) = rows.iter().position(|v| !(v.widen().is_finite() && v.widen() >= 0.0)) {
                let (t, w, p) = at(found);
                return Err(wrong(format!("the entry [{t}, {w}, {p}] is {}", rows[found].widen()))
                    .hint("affinities are finite and not negative; mark missing pairs in the mask"));
            }
            // What is in memory has zeros there.
            let masked = |&(place, v): &(usize, &E)| {
                let (_, w, p) = at(place);
                v.widen() != 0.0 && !self.has(w, p)
            };
            match rows.iter().enumerate().find(masked) {
                None => Ok(()),
                Some((place, value)) => {
                    let (t, w, p) = at(place);
                    Err(wrong(format!(
                        "the entry [{t}, {w}, {p}] is {}, though the mask leaves it out",
                        value.widen()
                    ))
                    .hint("write 0 there, or read the tensor as a whole"))
                }
            }
        })
    }

    /// One pass over the `T·W` rows of P entries: `each` gets the number of the first row of a stretch, and the stretch.
    ///
    /// # Errors
    /// Those of `each`, and when a file cannot be read.
    pub fn pass(&self, mut each: impl FnMut(usize, &[E]) -> Result<()>) -> Result<()> {
        let frame = self.animals * self.pairs;
        self.entries.pass(frame, |start, values| each(start / self.pairs, values))
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
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn squared_norm(&self) -> Result<f64> {
        let row = |row: &[E]| row.iter().map(|v| v.widen() * v.widen()).sum::<f64>();
        let mut sum = 0.0;
        self.pass(|_, rows| {
            sum += rows.chunks(self.pairs).map(row).sum::<f64>();
            Ok(())
        })?;
        Ok(sum)
    }
}

impl AffinityTensor {
    /// A tensor that stays in its file, `tensor` [T, W, P] of f32 with perhaps `mask` [W, P], and is read anew by every pass:
    /// memory holds 64 MB of it at a time. `mask` stands before that of the file.
    ///
    /// # Errors
    /// When either has another shape or type, or values that no affinity has.
    pub fn open(path: &Path, mask: Option<HostTensor>) -> Result<Self> {
        let tensor = StreamedTensor::open(path, "tensor")?;
        let &[frames, animals, pairs] = tensor.shape() else {
            return Err(Error::input(
                path.display(),
                format!("\"tensor\" has the shape {:?}", tensor.shape()),
            )
            .hint("what is read piece by piece must be [time, animals, pairs]"));
        };
        let place = path.display().to_string();
        let mask = match mask {
            Some(mask) => Some(mask),
            None => TensorFile::read_some(path, |name| name == "mask")?.take("mask").ok(),
        };
        let mask = mask.map(|mask| marks(&place, mask, [animals, pairs])).transpose()?;
        let entries = Entries::File { tensor: Arc::new(tensor), at_once: AT_ONCE };
        let tensor = Self { frames, animals, pairs, entries, mask, place };
        tensor.check()?;
        Ok(tensor)
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
        let mask = mask.map(|mask| marks(&place, mask, [shape[1], shape[2]])).transpose()?;
        Self::checked(&place, shape, values, mask)
    }
}

/// Affinities of pairs, row by row, as symmetric matrices with zeros on the diagonal.
pub fn as_matrices(rows: &[f32], neurons: usize) -> Vec<f32> {
    let pairs = pair_count(neurons);
    let mut matrices = vec![0.0; rows.len() / pairs.max(1) * neurons * neurons];
    for (matrix, pairs) in matrices.chunks_mut(neurons * neurons).zip(rows.chunks(pairs.max(1))) {
        let places = (0..neurons).flat_map(|i| (i + 1..neurons).map(move |j| (i, j)));
        for ((i, j), &value) in places.zip(pairs) {
            (matrix[i * neurons + j], matrix[j * neurons + i]) = (value, value);
        }
    }
    matrices
}

/// The marks of a mask.
fn marks(place: &str, mask: HostTensor, shape: [usize; 2]) -> Result<Vec<bool>> {
    if mask.shape != shape {
        return Err(Error::input(
            place,
            format!("the mask has the shape {:?}, must have {shape:?}", mask.shape),
        ));
    }
    Ok(match mask.values {
        Values::Float(values) => values.iter().map(|&v| v != 0.0).collect(),
        Values::Int(values) => values.iter().map(|&v| v != 0).collect(),
    })
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
