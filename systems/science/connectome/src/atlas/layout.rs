//! Where the nodes of a drawing go: every community is a disc of its own, the discs stand in a circle. Springs would pull
//! the heavy community of a real recording into one spot, as its edges weigh a hundred times those of the others.

use std::f64::consts::TAU;

use super::Motif;

/// The angle from one node of a disc to the next, which fills it evenly: the golden one.
const GOLDEN: f64 = 2.399_963_229_728_653;

/// A place in the unit square for every neuron in `order`, which lists community after community.
pub fn places(motif: &Motif, order: &[usize]) -> Vec<(f64, f64)> {
    let discs: Vec<&[usize]> =
        order.chunk_by(|&i, &j| motif.communities[i] == motif.communities[j]).collect();
    let radii: Vec<f64> = discs.iter().map(|disc| (disc.len() as f64).sqrt()).collect();
    let total: f64 = radii.iter().sum();
    let next = |c: usize| radii[c] + radii[(c + 1) % radii.len()];
    let widest = (0..radii.len()).map(next).fold(0.0, f64::max);
    let circle = if discs.len() > 1 { (0.37 * total).max(0.6 * widest) } else { 0.0 };
    let mut at = vec![(0.0, 0.0); motif.communities.len()];
    let mut angle = 0.0;
    for (disc, radius) in discs.iter().zip(&radii) {
        let middle = angle + TAU * radius / total / 2.0;
        angle += TAU * radius / total;
        for (k, &i) in disc.iter().enumerate() {
            // The strongest in the middle.
            let (out, turn) = (radius * (k as f64 / disc.len() as f64).sqrt(), GOLDEN * k as f64);
            at[i] = (circle * middle.cos() + out * turn.cos(), circle * middle.sin() + out * turn.sin());
        }
    }
    into_unit_square(&mut at, order);
    at
}

fn into_unit_square(at: &mut [(f64, f64)], nodes: &[usize]) {
    let span = |of: fn(&(f64, f64)) -> f64| {
        let values = nodes.iter().map(|&i| of(&at[i]));
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)))
    };
    let ((x0, x1), (y0, y1)) = (span(|p| p.0), span(|p| p.1));
    let scale = (x1 - x0).max(y1 - y0).max(1e-9);
    for &i in nodes {
        at[i] = (0.5 + (at[i].0 - (x0 + x1) / 2.0) / scale, 0.5 + (at[i].1 - (y0 + y1) / 2.0) / scale);
    }
}
