//! Weights as the kernels read them, and two numbers of four bits in a byte.

use super::kernel::{GROUP, Kind, PANEL};

/// The signed operand of a [`Product`](super::Product): `columns` columns of `inner` numbers each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Panels {
    pub(super) kind: Kind,
    pub(super) bytes: Vec<u8>,
    pub(super) columns: usize,
    pub(super) inner: usize,
    /// The sum of every column.
    pub(super) sums: Vec<i32>,
}

impl Panels {
    /// From weights `[columns, inner]`, as a linear layer of PyTorch has them.
    ///
    /// # Panics
    /// When the weights do not fill the shape.
    pub fn from_rows(weights: &[i8], columns: usize, inner: usize) -> Self {
        assert_eq!(weights.len(), columns * inner, "weights must fill their shape");
        let mut panels = Self::empty(columns, inner);
        let groups = inner.div_ceil(GROUP);
        for (column, row) in weights.chunks(inner.max(1)).enumerate() {
            panels.sums[column] = row.iter().map(|&w| i32::from(w)).sum();
            for (group, quad) in row.chunks(GROUP).enumerate() {
                let at = (column / PANEL * groups + group) * PANEL + column % PANEL;
                let to = &mut panels.bytes[at * GROUP..][..quad.len()];
                to.iter_mut().zip(quad).for_each(|(to, &w)| *to = w as u8);
            }
        }
        panels
    }

    /// From weights `[inner, columns]`, as the second operand of a matrix product has them.
    ///
    /// # Panics
    /// When the weights do not fill the shape.
    pub fn from_columns(weights: &[i8], inner: usize, columns: usize) -> Self {
        assert_eq!(weights.len(), columns * inner, "weights must fill their shape");
        let mut panels = Self::empty(columns, inner);
        let groups = inner.div_ceil(GROUP);
        for (k, row) in weights.chunks(columns.max(1)).enumerate() {
            for (panel, part) in row.chunks(PANEL).enumerate() {
                let to = &mut panels.bytes[(panel * groups + k / GROUP) * PANEL * GROUP..][..PANEL * GROUP];
                for (quad, &w) in to.chunks_exact_mut(GROUP).zip(part) {
                    quad[k % GROUP] = w as u8;
                }
            }
            panels.sums.iter_mut().zip(row).for_each(|(sum, &w)| *sum += i32::from(w));
        }
        panels
    }

    fn empty(columns: usize, inner: usize) -> Self {
        let bytes = vec![0; columns.div_ceil(PANEL) * inner.div_ceil(GROUP) * PANEL * GROUP];
        Self { kind: Kind::Signed, bytes, columns, inner, sums: vec![0; columns] }
    }

    /// The same in half the memory, for weights between -8 and 7; the kernels unpack them in their registers.
    ///
    /// # Panics
    /// When a weight needs more than four bits.
    pub fn with_nibbles(self) -> Self {
        if self.kind == Kind::Nibbles {
            return self;
        }
        let pair = |pair: &[u8]| {
            assert!(
                pair.iter().all(|&byte| (-8..8).contains(&(byte as i8))),
                "a weight needs more than four bits"
            );
            pair[0] & 15 | pair[1] << 4
        };
        Self { kind: Kind::Nibbles, bytes: self.bytes.chunks(2).map(pair).collect(), ..self }
    }

    /// How many columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Numbers in a column.
    pub fn inner(&self) -> usize {
        self.inner
    }

    /// Bytes that the weights take.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
}

/// Numbers of four bits, two in a byte: the first in the low half, and a row of odd length ends with an empty high half.
///
/// # Panics
/// When the values are not whole rows of `inner`.
pub fn pack_nibbles(values: &[i8], inner: usize) -> Vec<u8> {
    assert!(inner > 0 && values.len().is_multiple_of(inner), "values must be whole rows");
    let byte = |pair: &[i8]| (pair[0] as u8 & 15) | pair.get(1).map_or(0, |&high| (high as u8) << 4);
    values.chunks(inner).flat_map(|row| row.chunks(2).map(byte)).collect()
}

/// What [`pack_nibbles`] packed.
///
/// # Panics
/// When the bytes are not whole rows of `inner` numbers.
pub fn unpack_nibbles(bytes: &[u8], inner: usize) -> Vec<i8> {
    let width = inner.div_ceil(2);
    assert!(inner > 0 && bytes.len().is_multiple_of(width), "bytes must be whole rows");
    let row = |row: &[u8]| {
        let both = |&byte: &u8| [(byte << 4) as i8 >> 4, byte as i8 >> 4];
        row.iter().flat_map(both).take(inner).collect::<Vec<_>>()
    };
    bytes.chunks(width).flat_map(row).collect()
}
