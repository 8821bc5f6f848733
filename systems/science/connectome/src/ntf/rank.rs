//! The number of motifs: as many as random starts agree on.

use kiln_core::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{Factors, Fit, NtfConfig, Starts, best};
use crate::score::{assign, cosine};
use crate::tensor::{AffinityTensor, Element};

/// Starts that agree so well count as the same solution.
pub const STABLE: f64 = 0.9;

/// What one rank gave.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankScore {
    /// R.
    pub rank: usize,
    /// The least relative error of the starts.
    pub relative_error: f64,
    /// Mean factor match between the starts, 1 when all found the same.
    pub stability: f64,
}

/// All ranks tried, and the best fit of the chosen one.
pub struct RankChoice {
    /// In the order of the ranks.
    pub scores: Vec<RankScore>,
    /// The fit of the chosen rank.
    pub best: Fit,
}

/// Fits every rank from several starts, and chooses the largest on which starts agree (stability ≥ 0.9), or else the
/// rank on which they agree most.
///
/// # Errors
/// As [`NtfConfig::fit`].
pub fn choose<E: Element>(
    config: &NtfConfig,
    ranks: impl IntoIterator<Item = usize>,
    tensor: &AffinityTensor<E>,
    kept: &Starts,
    cx: &Context,
) -> Result<Option<RankChoice>> {
    let mut tried: Vec<(RankScore, Fit)> = Vec::new();
    for rank in ranks {
        let fits = NtfConfig { rank, ..config.clone() }.fit_all(tensor, kept, cx)?;
        let stability = stability(&fits);
        let Some(best) = best(fits) else { continue };
        cx.note(format!("rank {rank}: relative error {:.4}, stability {stability:.3}", best.relative_error));
        tried.push((RankScore { rank, relative_error: best.relative_error, stability }, best));
    }
    let stable = tried.iter().rposition(|(score, _)| score.stability >= STABLE);
    let most = (0..tried.len()).max_by(|&a, &b| tried[a].0.stability.total_cmp(&tried[b].0.stability));
    let Some(chosen) = stable.or(most) else { return Ok(None) };
    let scores = tried.iter().map(|(score, _)| score.clone()).collect();
    Ok(Some(RankChoice { scores, best: tried.swap_remove(chosen).1 }))
}

/// Mean factor match over all pairs of fits; 1 for a single one.
pub fn stability(fits: &[Fit]) -> f64 {
    let pairs = fits.iter().enumerate().flat_map(|(i, a)| fits[i + 1..].iter().map(move |b| (a, b)));
    let matches: Vec<f64> = pairs.map(|(a, b)| factor_match(&a.factors, &b.factors)).collect();
    match matches.len() {
        0 => 1.0,
        count => matches.iter().sum::<f64>() / count as f64,
    }
}

/// How well two factorisations of one rank agree, from 0 to 1: over the best assignment of components, the mean of the
/// product of the cosines of the three modes and of `1 − |λ − λ'| / max(λ, λ')`.
pub fn factor_match(a: &Factors, b: &Factors) -> f64 {
    let likeness = |r: usize, q: usize| {
        let cosines = a.modes().into_iter().zip(b.modes()).map(|(a, b)| cosine(&a.column(r), &b.column(q)));
        let (x, y) = (a.weights[r], b.weights[q]);
        let weights = if x.max(y) > 0.0 { 1.0 - (x - y).abs() / x.max(y) } else { 1.0 };
        cosines.product::<f64>() * weights
    };
    let table: Vec<Vec<f64>> =
        (0..a.rank()).map(|r| (0..b.rank()).map(|q| likeness(r, q)).collect()).collect();
    let total: f64 = assign(&table).into_iter().enumerate().map(|(r, q)| table[r][q]).sum();
    total / a.rank() as f64
}
