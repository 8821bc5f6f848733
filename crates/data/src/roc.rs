//! The receiver operating characteristic of a score that is to tell positives from negatives.

/// The area under the ROC curve: how often a positive scores above a negative, ties counting a half. `scores` are (whether
/// it is positive, score); `None` where a class is absent or a score is NaN.
///
/// ```
/// let area = kiln_data::roc_auc([(true, 0.5), (false, 0.5), (true, 0.9), (false, 0.1)]);
/// assert_eq!(area, Some(0.875));
/// ```
pub fn roc_auc(scores: impl IntoIterator<Item = (bool, f64)>) -> Option<f64> {
    let mut scores: Vec<(bool, f64)> = scores.into_iter().collect();
    scores.sort_by(|a, b| a.1.total_cmp(&b.1));
    let (mut ordered, mut positives, mut negatives) = (0.0, 0, 0);
    for tied in scores.chunk_by(|a, b| a.1 == b.1) {
        let [negative, positive] = count(tied);
        ordered += positive as f64 * (negatives as f64 + 0.5 * negative as f64);
        positives += positive;
        negatives += negative;
    }
    let pairs = positives as f64 * negatives as f64;
    (pairs > 0.0 && scores.iter().all(|(_, score)| !score.is_nan())).then(|| ordered / pairs)
}

/// The ROC curve from the strictest threshold to the laxest: (share of the negatives, share of the positives) that score at
/// least as high, one point a distinct score after the origin. A class that is absent stays at 0.
pub fn roc_curve(scores: impl IntoIterator<Item = (bool, f64)>) -> Vec<(f64, f64)> {
    let mut scores: Vec<(bool, f64)> = scores.into_iter().collect();
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    let all = count(&scores).map(|number| number.max(1) as f64);
    let mut above = [0, 0];
    let mut curve = vec![(0.0, 0.0)];
    for tied in scores.chunk_by(|a, b| a.1 == b.1) {
        let here = count(tied);
        above = [above[0] + here[0], above[1] + here[1]];
        curve.push((above[0] as f64 / all[0], above[1] as f64 / all[1]));
    }
    curve
}

/// How many are negative, and how many positive.
fn count(scores: &[(bool, f64)]) -> [usize; 2] {
    let positives = scores.iter().filter(|(positive, _)| *positive).count();
    [scores.len() - positives, positives]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_count_by_half_and_both_classes_are_needed() {
        let scores = [(true, 0.5), (false, 0.5), (true, 0.9), (false, 0.1)];
        assert_eq!(roc_auc(scores), Some(0.875));
        assert_eq!(roc_curve(scores), [(0.0, 0.0), (0.0, 0.5), (0.5, 1.0), (1.0, 1.0)]);
        assert_eq!(roc_auc(scores.map(|(positive, score)| (positive, -score))), Some(0.125));
        assert_eq!(roc_auc(scores.map(|(positive, _)| (positive, 0.0))), Some(0.5));
        assert_eq!(roc_auc([(true, 0.5)]), None);
        assert_eq!(roc_auc([]), None);
        assert_eq!(roc_curve([(true, 0.5)]), [(0.0, 0.0), (0.0, 1.0)]);
    }

    #[test]
    fn a_score_that_is_not_a_number_has_no_area() {
        assert_eq!(roc_auc([(true, f64::NAN), (false, 0.5)]), None);
        assert_eq!(roc_auc([(true, f64::INFINITY), (false, 0.5)]), Some(1.0));
    }
}
