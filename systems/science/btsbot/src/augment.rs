//! The eight ways to turn and mirror a square, by which stamps are augmented: the sky knows no up.

use rand::{Rng, RngExt};

/// A transform of the square.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Dihedral {
    /// Whether columns are reversed,
    pub flip_columns: bool,
    /// whether rows are,
    pub flip_rows: bool,
    /// and by how many quarters the square is turned after that.
    pub quarters: usize,
}

impl Dihedral {
    /// Both flips with probability ½ and any turn: every transform comes out equally often.
    pub fn draw(rng: &mut impl Rng) -> Self {
        Self { flip_columns: rng.random(), flip_rows: rng.random(), quarters: rng.random_range(0..4) }
    }

    /// Where the pixel that comes to (row, column) was before.
    fn origin(self, row: usize, column: usize, side: usize) -> (usize, usize) {
        let last = side - 1;
        let (row, column) = match self.quarters % 4 {
            0 => (row, column),
            1 => (column, last - row),
            2 => (last - row, last - column),
            _ => (last - column, row),
        };
        (
            if self.flip_rows { last - row } else { row },
            if self.flip_columns { last - column } else { column },
        )
    }

    /// Puts the channels `[channels, side, side]` of `from`, all transformed in the same way, behind `to`.
    pub fn append(self, from: &[f32], side: usize, to: &mut Vec<f32>) {
        if self == Self::default() {
            to.extend(from);
            return;
        }
        for channel in from.chunks(side * side) {
            for row in 0..side {
                to.extend((0..side).map(|column| {
                    let (row, column) = self.origin(row, column, side);
                    channel[row * side + column]
                }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn applied(transform: Dihedral, side: usize) -> Vec<f32> {
        let from: Vec<f32> = (0..3 * side * side).map(|i| i as f32).collect();
        let mut to = Vec::new();
        transform.append(&from, side, &mut to);
        to
    }

    #[test]
    fn transforms_permute_pixels_and_never_channels() {
        for number in 0..16 {
            let transform =
                Dihedral { flip_columns: number & 1 > 0, flip_rows: number & 2 > 0, quarters: number / 4 };
            let to = applied(transform, 5);
            for (channel, pixels) in to.chunks(25).enumerate() {
                let mut sorted: Vec<usize> = pixels.iter().map(|&p| p as usize).collect();
                sorted.sort_unstable();
                assert_eq!(sorted, (channel * 25..(channel + 1) * 25).collect::<Vec<_>>());
                assert_eq!(pixels[12], (channel * 25 + 12) as f32, "the centre stays");
            }
        }
        let turned = applied(Dihedral { quarters: 1, ..Dihedral::default() }, 2);
        assert_eq!(turned[..4], [1.0, 3.0, 0.0, 2.0]);
    }

    #[test]
    fn all_eight_come_out_equally_often() {
        let mut rng = kiln_core::random_stream(0, "dihedral", 0);
        let mut counts: BTreeMap<Vec<usize>, f64> = BTreeMap::new();
        let draws = 8000.0;
        for _ in 0..draws as usize {
            let key = applied(Dihedral::draw(&mut rng), 2).iter().map(|&p| p as usize).collect();
            *counts.entry(key).or_default() += 1.0;
        }
        assert_eq!(counts.len(), 8);
        let chi: f64 = counts.values().map(|n| (n - draws / 8.0).powi(2) / (draws / 8.0)).sum();
        assert!(chi < 24.3, "χ² = {chi} with 7 degrees of freedom, exceeded once in a thousand");
    }
}
