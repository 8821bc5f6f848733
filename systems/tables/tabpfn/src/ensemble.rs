//! The members of the ensemble: one network sees the table with its classes renumbered, its columns rotated, and with or
//! without the power transform. None of the three changes what the table says, but the network was not made indifferent
//! to them; the average over members is.

use kiln_data::Matrix;
use rand::Rng;
use rand::seq::SliceRandom;

use crate::preprocess::Mode;

/// How one member sees the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Member {
    /// Class c is shown as (c + shift) mod C.
    pub class_shift: usize,
    /// Columns are rotated to the left by so many.
    pub feature_shift: usize,
    /// What the columns have gone through.
    pub mode: Mode,
}

/// The first `count` members, or all: class shifts times feature shifts in random order, each with every mode.
pub fn members(
    classes: usize,
    features: usize,
    modes: &[Mode],
    count: Option<usize>,
    rng: &mut impl Rng,
) -> Vec<Member> {
    let mut shifts: Vec<(usize, usize)> =
        (0..classes).flat_map(|class| (0..features).map(move |feature| (class, feature))).collect();
    shifts.shuffle(rng);
    let members = shifts.into_iter().flat_map(|(class_shift, feature_shift)| {
        modes.iter().map(move |&mode| Member { class_shift, feature_shift, mode })
    });
    members.take(count.unwrap_or(usize::MAX)).collect()
}

impl Member {
    /// Rows `[rows, columns]` as the network's input `[rows, width]`: rotated and padded with zeros.
    pub fn rotate(&self, table: &Matrix, width: usize, rows: std::ops::Range<usize>) -> Vec<f32> {
        let used = table.columns;
        let mut input = vec![0.0; rows.len() * width];
        for (padded, row) in input.chunks_exact_mut(width).zip(rows) {
            let row = table.row(row);
            for (place, x) in padded.iter_mut().enumerate().take(used) {
                *x = row[(place + self.feature_shift) % used] as f32;
            }
        }
        input
    }

    /// A label as the network sees it.
    pub fn shown(&self, label: usize, classes: usize) -> f32 {
        ((label + self.class_shift) % classes) as f32
    }

    /// Where the network's answer for a class stands.
    pub fn place_of(&self, class: usize, classes: usize) -> usize {
        (class + self.class_shift) % classes
    }
}

/// Probabilities from logits, in place.
pub fn softmax(logits: &mut [f64]) {
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    logits.iter_mut().for_each(|x| *x = (*x - largest).exp());
    let sum: f64 = logits.iter().sum();
    logits.iter_mut().for_each(|x| *x /= sum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;
    use std::collections::HashSet;

    #[test]
    fn all_members_are_all_combinations_and_fewer_keep_both_modes_of_a_shift_together() {
        let draw = |count, seed| {
            members(3, 4, &[Mode::None, Mode::Power], count, &mut random_stream(seed, "members", 0))
        };
        let all = draw(None, 0);
        let distinct: HashSet<_> =
            all.iter().map(|m| (m.class_shift, m.feature_shift, m.mode == Mode::Power)).collect();
        assert_eq!((all.len(), distinct.len()), (24, 24));
        assert_eq!(draw(Some(6), 0), all[..6]);
        assert_ne!(draw(None, 1), all);
        assert!(all.chunks(2).all(|pair| pair[0].class_shift == pair[1].class_shift
            && pair[0].feature_shift == pair[1].feature_shift
            && (pair[0].mode, pair[1].mode) == (Mode::None, Mode::Power)));
    }

    #[test]
    fn rotation_pads_with_zeros_and_labels_come_back_where_they_were_shown() {
        let member = Member { class_shift: 2, feature_shift: 1, mode: Mode::None };
        let table = Matrix::new(2, 3, vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(member.rotate(&table, 5, 0..2), [2.0, 3.0, 1.0, 0.0, 0.0, 5.0, 6.0, 4.0, 0.0, 0.0]);
        assert_eq!(member.rotate(&table, 3, 1..2), [5.0, 6.0, 4.0]);
        for label in 0..3 {
            assert_eq!(member.shown(label, 3), member.place_of(label, 3) as f32);
        }
    }

    #[test]
    fn softmax_sums_to_one_for_logits_of_any_size() {
        let mut logits = [1000.0, 999.0, -1000.0];
        softmax(&mut logits);
        assert!((logits.iter().sum::<f64>() - 1.0).abs() < 1e-12 && logits[0] > logits[1]);
    }
}
