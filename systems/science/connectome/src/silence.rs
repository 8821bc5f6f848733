//! What silencing a neuron is predicted to change: whoever shares communities with it.
//!
//! The effect on neuron j of silencing i is `Σ_r λ_r c_r(i,j) · 1[i and j in one community of motif r]`.

use kiln_core::{Error, Result};
use serde::Serialize;

use crate::atlas::{Atlas, Motif};

/// What silencing is predicted to do.
#[derive(Debug, Clone, Serialize)]
pub struct Silencing {
    /// The neuron that falls silent.
    pub neuron: String,
    /// Every other neuron, the most affected first.
    pub neurons: Vec<Affected>,
    /// Every motif by the part of its weight that the neuron carries, in the order of the atlas.
    pub motifs: Vec<f64>,
}

/// A neuron and how much it is predicted to change.
#[derive(Debug, Clone, Serialize)]
pub struct Affected {
    /// Its name.
    pub neuron: String,
    /// Weight shared with the silenced neuron within communities.
    pub effect: f64,
    /// The motif that adds most to it, counted from 1; none where the effect is 0.
    pub motif: Option<usize>,
}

/// The predicted effect on every neuron of silencing neuron `i`.
pub fn effects(motifs: &[Motif], i: usize) -> Vec<f64> {
    let neurons = motifs.first().map_or(0, |motif| motif.communities.len());
    (0..neurons).map(|j| motifs.iter().map(|motif| effect(motif, i, j)).sum()).collect()
}

fn effect(motif: &Motif, i: usize, j: usize) -> f64 {
    let together = motif.communities[i].is_some() && motif.communities[i] == motif.communities[j];
    if together && i != j { motif.weight * motif.between(i, j) } else { 0.0 }
}

/// What silencing a neuron of an atlas is predicted to change.
///
/// # Errors
/// When the atlas has no neuron of this name.
pub fn silence(atlas: &Atlas, neuron: &str) -> Result<Silencing> {
    let names = &atlas.traces.neurons;
    let i = names.iter().position(|name| name == neuron).ok_or_else(|| {
        let first = neuron.chars().next();
        let (near, others): (Vec<&String>, Vec<&String>) =
            names.iter().partition(|name| name.chars().next() == first);
        let some: Vec<&str> = near.into_iter().chain(others).map(String::as_str).take(8).collect();
        Error::usage(format!("the atlas has no neuron \"{neuron}\"")).hint(format!(
            "it has {} neurons, among them {}",
            names.len(),
            some.join(", ")
        ))
    })?;
    let total = effects(&atlas.motifs, i);
    let strongest = |j: usize| {
        let parts = atlas.motifs.iter().map(|motif| effect(motif, i, j)).enumerate();
        parts.max_by(|a, b| a.1.total_cmp(&b.1)).filter(|(_, part)| *part > 0.0).map(|(r, _)| r + 1)
    };
    let others = (0..names.len()).filter(|&j| j != i);
    let mut neurons: Vec<Affected> = others
        .map(|j| Affected { neuron: names[j].clone(), effect: total[j], motif: strongest(j) })
        .collect();
    neurons.sort_by(|a, b| b.effect.total_cmp(&a.effect).then_with(|| a.neuron.cmp(&b.neuron)));
    let share = |motif: &Motif| {
        let own: f64 = (0..names.len()).map(|j| motif.between(i, j)).sum();
        own / motif.pairs.iter().sum::<f64>().max(1e-300)
    };
    Ok(Silencing { neuron: neuron.into(), neurons, motifs: atlas.motifs.iter().map(share).collect() })
}
