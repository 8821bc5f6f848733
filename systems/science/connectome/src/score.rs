//! Measures of agreement.

/// Cosine of the angle between two vectors; 0 where either is zero.
pub fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 0.0 }
}

/// Pearson's correlation; 0 where either is constant.
pub fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let centred = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        x.iter().map(|x| x - mean).collect::<Vec<f64>>()
    };
    cosine(&centred(a), &centred(b))
}

/// Spearman's rank correlation, ties sharing their mean rank.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    correlation(&ranks(a), &ranks(b))
}

fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&i, &j| x[i].total_cmp(&x[j]));
    let mut ranks = vec![0.0; x.len()];
    for tied in order.chunk_by(|&i, &j| x[i] == x[j]) {
        let below = x.iter().filter(|&&y| y < x[tied[0]]).count();
        tied.iter().for_each(|&i| ranks[i] = below as f64 + (tied.len() - 1) as f64 / 2.0);
    }
    ranks
}

/// Normalised mutual information of two partitions, `2 I / (H₁ + H₂)`: 1 when they are the same up to names, 0 when one
/// says nothing of the other. Two partitions into a single group agree.
pub fn nmi(a: &[usize], b: &[usize]) -> f64 {
    let groups = |x: &[usize]| x.iter().max().map_or(0, |m| m + 1);
    let (rows, columns) = (groups(a), groups(b));
    let mut table = vec![0.0; rows * columns];
    let share = 1.0 / a.len() as f64;
    a.iter().zip(b).for_each(|(&i, &j)| table[i * columns + j] += share);
    let pa: Vec<f64> = table.chunks(columns).map(|row| row.iter().sum()).collect();
    let pb: Vec<f64> = (0..columns).map(|j| table.chunks(columns).map(|row| row[j]).sum()).collect();
    let entropy = |p: &[f64]| -p.iter().filter(|&&p| p > 0.0).map(|p| p * p.ln()).sum::<f64>();
    let both = entropy(&pa) + entropy(&pb);
    let mutual = both - entropy(&table);
    if both > 1e-12 { (2.0 * mutual / both).clamp(0.0, 1.0) } else { 1.0 }
}

/// For every row of a table the column assigned to it, one each, so that the sum of the entries is largest (Hungarian
/// method with potentials, O(n³)). The table has at least as many columns as rows.
pub fn assign(gain: &[Vec<f64>]) -> Vec<usize> {
    let (n, m) = (gain.len(), gain.first().map_or(0, Vec::len));
    assert!(m >= n, "every row needs a column");
    // Row and column 0 are the start of an augmenting path; costs are negative gains.
    let (mut u, mut v) = (vec![0.0; n + 1], vec![0.0; m + 1]);
    let mut row_of = vec![0; m + 1];
    for row in 1..=n {
        row_of[0] = row;
        let (mut column, mut least) = (0, vec![f64::INFINITY; m + 1]);
        let (mut from, mut done) = (vec![0; m + 1], vec![false; m + 1]);
        while row_of[column] != 0 {
            done[column] = true;
            let (current, mut step, mut next) = (row_of[column], f64::INFINITY, 0);
            for j in (1..=m).filter(|&j| !done[j]) {
                let slack = -gain[current - 1][j - 1] - u[current] - v[j];
                if slack < least[j] {
                    (least[j], from[j]) = (slack, column);
                }
                if least[j] < step {
                    (step, next) = (least[j], j);
                }
            }
            for j in 0..=m {
                if done[j] {
                    u[row_of[j]] += step;
                    v[j] -= step;
                } else {
                    least[j] -= step;
                }
            }
            column = next;
        }
        while column != 0 {
            row_of[column] = row_of[from[column]];
            column = from[column];
        }
    }
    let mut columns = vec![0; n];
    (1..=m).filter(|&j| row_of[j] != 0).for_each(|j| columns[row_of[j] - 1] = j - 1);
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_assignment_beats_the_greedy_one() {
        let gain = vec![vec![9.0, 8.0, 0.0], vec![8.0, 1.0, 0.0], vec![0.0, 0.0, 1.0]];
        assert_eq!(assign(&gain), [1, 0, 2]);
        assert_eq!(assign(&[vec![0.0, 2.0, 3.0]]), [2]);
    }

    #[test]
    fn mutual_information_ignores_names_and_is_zero_for_independence() {
        assert!((nmi(&[0, 0, 1, 1], &[1, 1, 0, 0]) - 1.0).abs() < 1e-12);
        assert!(nmi(&[0, 0, 1, 1], &[0, 1, 0, 1]).abs() < 1e-12);
        assert_eq!(nmi(&[0, 0, 0], &[0, 0, 0]), 1.0);
        assert_eq!(nmi(&[0, 1, 2], &[0, 0, 0]), 0.0);
    }

    #[test]
    fn ranks_of_ties_are_shared() {
        assert_eq!(ranks(&[2.0, 1.0, 2.0, 5.0]), [1.5, 0.0, 1.5, 3.0]);
        assert!((rank_correlation(&[1.0, 2.0, 9.0], &[0.0, 5.0, 6.0]) - 1.0).abs() < 1e-12);
    }
}
