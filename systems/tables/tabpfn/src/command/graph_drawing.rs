//! The graph behind a synthetic data set as a drawing.

use std::fmt::Write;

use crate::prior::{Layer, Mechanism};

/// Edges into a node that are drawn: the heaviest.
const EDGES: usize = 3;
/// Size of the drawing, in pixels.
const SIZE: (f64, f64) = (900.0, 520.0);
const MARGIN: f64 = 40.0;

/// A node by its layer, 0 for the causes, and its place there.
type Node = (usize, usize);

/// Columns in blue, targets in red, what leads to them in grey, causes on the left; of the edges into a node only the
/// heaviest.
pub(super) fn svg(mechanism: &Mechanism) -> String {
    let layers = &mechanism.function.layers;
    let (features, targets) = observed(mechanism);
    let mut shown: Vec<Node> = features.iter().chain(&targets).copied().collect();
    let mut edges: Vec<(Node, Node, f32)> = Vec::new();
    let mut next = 0;
    while let Some(&node) = shown.get(next) {
        for (source, weight) in heaviest(layers, node) {
            edges.push((source, node, weight));
            if !shown.contains(&source) {
                shown.push(source);
            }
        }
        next += 1;
    }
    let place = |(layer, index): Node| {
        let count = if layer == 0 { layers[0].inputs } else { layers[layer - 1].outputs };
        let across = layer as f64 / layers.len() as f64;
        let down = (index as f64 + 0.5) / count as f64;
        (MARGIN + across * (SIZE.0 - 2.0 * MARGIN), MARGIN + down * (SIZE.1 - 2.0 * MARGIN))
    };
    let (width, height) = SIZE;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (from, to, weight) in edges {
        let ((x1, y1), (x2, y2)) = (place(from), place(to));
        let colour = if weight > 0.0 { "#5b7f95" } else { "#b58a5a" };
        let _ = writeln!(
            svg,
            "<path d=\"M{x1:.1} {y1:.1}L{x2:.1} {y2:.1}\" stroke=\"{colour}\" opacity=\"0.5\"/>"
        );
    }
    for node in shown {
        let (x, y) = place(node);
        let (colour, radius) = match node {
            node if targets.contains(&node) => ("#c0392b", 7),
            node if features.contains(&node) => ("#2471a3", 5),
            _ => ("#999999", 3),
        };
        let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\"/>");
    }
    let legend = "causes on the left; columns blue, targets red; the three heaviest edges into each node, positive blue, \
                  negative brown";
    let _ =
        writeln!(svg, "<text x=\"{MARGIN}\" y=\"{}\" fill=\"#333\">{legend}</text>\n</svg>", height - 12.0);
    svg
}

/// The nodes of columns and targets.
fn observed(mechanism: &Mechanism) -> (Vec<Node>, Vec<Node>) {
    let layers = &mechanism.function.layers;
    match &mechanism.nodes {
        None => {
            let outputs = layers.last().map_or(0, |last| last.outputs);
            let all = |layer: usize, count: usize| (0..count).map(|node| (layer, node)).collect();
            (all(0, layers[0].inputs), all(layers.len(), outputs))
        }
        Some(nodes) => {
            // The nodes are counted from the second layer on, and all layers are equally wide.
            let width = layers[0].outputs;
            let node = |&index: &usize| (2 + index / width, index % width);
            (nodes.features.iter().map(node).collect(), nodes.targets.iter().map(node).collect())
        }
    }
}

/// The heaviest edges into a node.
fn heaviest(layers: &[Layer], (layer, index): Node) -> Vec<(Node, f32)> {
    let Some(before) = layer.checked_sub(1) else { return Vec::new() };
    let Layer { outputs, weights, .. } = &layers[before];
    let into = weights.iter().skip(index).step_by(*outputs).copied().enumerate();
    let mut edges: Vec<(Node, f32)> = into
        .filter(|(_, weight)| *weight != 0.0)
        .map(|(source, weight)| ((before, source), weight))
        .collect();
    edges.sort_by(|a, b| b.1.abs().total_cmp(&a.1.abs()));
    edges.truncate(EDGES);
    edges
}
