//! Two atlases side by side: which motifs recur, by the pairs of neurons that both have.

use kiln_core::{Error, Result};
use serde::Serialize;

use crate::atlas::Atlas;
use crate::score::{assign, cosine, nmi};

/// A motif of one atlas and its counterpart in the other.
#[derive(Debug, Clone, Serialize)]
pub struct Counterpart {
    /// Number in the first atlas, from 1.
    pub a: usize,
    /// Number in the second atlas, from 1.
    pub b: usize,
    /// Cosine of the weights of shared pairs.
    pub similarity: f64,
    /// Agreement of the communities of neurons that both motifs have.
    pub community_nmi: f64,
}

/// The assignment of motifs with the largest total similarity; the atlas with fewer motifs has them all assigned.
///
/// # Errors
/// When the atlases share fewer than three neurons.
pub fn compare(a: &Atlas, b: &Atlas) -> Result<Vec<Counterpart>> {
    let shared: Vec<(usize, usize)> = (a.traces.neurons.iter().enumerate())
        .filter_map(|(i, name)| Some((i, b.traces.neurons.iter().position(|other| other == name)?)))
        .collect();
    if shared.len() < 3 {
        return Err(Error::work(format!("the atlases share {} neurons: too few to compare", shared.len()))
            .hint("neurons are matched by name"));
    }
    if a.motifs.len() > b.motifs.len() {
        let swapped = compare(b, a)?.into_iter().map(|c| Counterpart { a: c.b, b: c.a, ..c });
        let mut swapped: Vec<Counterpart> = swapped.collect();
        swapped.sort_by_key(|counterpart| counterpart.a);
        return Ok(swapped);
    }
    let pairs: Vec<((usize, usize), (usize, usize))> = (shared.iter().enumerate())
        .flat_map(|(k, &(i, p))| shared[k + 1..].iter().map(move |&(j, q)| ((i, j), (p, q))))
        .collect();
    let similarity: Vec<Vec<f64>> = (a.motifs.iter())
        .map(|m| {
            let left: Vec<f64> = pairs.iter().map(|((i, j), _)| m.between(*i, *j)).collect();
            let right = |n: &crate::atlas::Motif| {
                pairs.iter().map(|(_, (p, q))| n.between(*p, *q)).collect::<Vec<_>>()
            };
            b.motifs.iter().map(|n| cosine(&left, &right(n))).collect()
        })
        .collect();
    let counterpart = |(r, q): (usize, usize)| {
        let both =
            shared.iter().filter_map(|&(i, p)| a.motifs[r].communities[i].zip(b.motifs[q].communities[p]));
        let (left, right): (Vec<usize>, Vec<usize>) = both.unzip();
        Counterpart { a: r + 1, b: q + 1, similarity: similarity[r][q], community_nmi: nmi(&left, &right) }
    };
    Ok(assign(&similarity).into_iter().enumerate().map(counterpart).collect())
}
