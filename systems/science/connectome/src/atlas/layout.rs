//! Where the nodes of a drawing go: springs along edges, repulsion between all (Fruchterman and Reingold 1991).

use std::f64::consts::TAU;

use crate::graph::Graph;

/// Rounds of moving all nodes.
const ROUNDS: usize = 300;
/// How strongly nodes are drawn to the middle, so that parts without connection stay in the picture.
const GRAVITY: f64 = 0.08;
/// Sum of the springs of a node, so that dense graphs do not collapse.
const PULL: f64 = 6.0;

/// A place in the unit square for every node that has an edge. Nodes begin on a circle, one community beside the other.
pub fn places(graph: &Graph, order: &[usize]) -> Vec<(f64, f64)> {
    let n = graph.len();
    let nodes: Vec<usize> = order.iter().copied().filter(|&i| !graph.neighbours(i).is_empty()).collect();
    let count = nodes.len().max(1) as f64;
    let mut at = vec![(0.0, 0.0); n];
    for (place, &i) in nodes.iter().enumerate() {
        let angle = TAU * place as f64 / count;
        at[i] = (angle.cos(), angle.sin());
    }
    // Squares, so that heavy edges decide.
    let stiffness = |i: usize| graph.neighbours(i).iter().map(|(_, weight)| weight * weight).sum::<f64>();
    let total: Vec<f64> = (0..n).map(stiffness).collect();
    let ideal = (4.0 / count).sqrt();
    for round in 0..ROUNDS {
        let step = 0.15 * (1.0 - round as f64 / ROUNDS as f64);
        let mut force = vec![(0.0, 0.0); n];
        for (k, &i) in nodes.iter().enumerate() {
            force[i].0 -= GRAVITY * at[i].0;
            force[i].1 -= GRAVITY * at[i].1;
            for &j in &nodes[k + 1..] {
                let (dx, dy) = (at[i].0 - at[j].0, at[i].1 - at[j].1);
                let push = ideal * ideal / (dx * dx + dy * dy).max(1e-4);
                force[i] = (force[i].0 + push * dx, force[i].1 + push * dy);
                force[j] = (force[j].0 - push * dx, force[j].1 - push * dy);
            }
        }
        for &(i, j, weight) in graph.edges() {
            let (dx, dy) = (at[i].0 - at[j].0, at[i].1 - at[j].1);
            let stiff = PULL * weight * weight / (total[i] * total[j]).sqrt();
            let pull = (dx * dx + dy * dy).sqrt() / ideal * stiff;
            force[i] = (force[i].0 - pull * dx, force[i].1 - pull * dy);
            force[j] = (force[j].0 + pull * dx, force[j].1 + pull * dy);
        }
        for &i in &nodes {
            let size = force[i].0.hypot(force[i].1).max(1e-12);
            let scale = step.min(size) / size;
            at[i] = (at[i].0 + force[i].0 * scale, at[i].1 + force[i].1 * scale);
        }
    }
    into_unit_square(&mut at, &nodes);
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
