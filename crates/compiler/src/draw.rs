//! A graph as a drawing: operations in rows by their distance from the inputs, operands above what reads them.

use std::collections::HashMap;
use std::fmt::Write;

use burn::backend::ir::TensorId;
use kiln_core::Result;

use crate::Graph;
use crate::graph::name_and_attributes;

/// Size of a box and the room around it, in pixels.
const BOX: (f64, f64) = (150.0, 34.0);
const GAP: (f64, f64) = (16.0, 26.0);
const MARGIN: f64 = 24.0;

/// What a box shows.
struct Node {
    title: String,
    shape: String,
    colour: &'static str,
    row: usize,
    operands: Vec<usize>,
}

impl Graph {
    /// The graph as SVG: inputs green, outputs marked, what multiplies blue, what only moves elements grey.
    ///
    /// # Errors
    /// As [`to_text`](Self::to_text).
    pub fn to_svg(&self) -> Result<String> {
        let (nodes, outputs) = self.nodes()?;
        let rows = nodes.iter().map(|node| node.row + 1).max().unwrap_or(0);
        let mut places = Vec::with_capacity(nodes.len());
        let mut filled = vec![0usize; rows];
        for node in &nodes {
            places.push((filled[node.row], node.row));
            filled[node.row] += 1;
        }
        let widest = filled.iter().copied().max().unwrap_or(0);
        let (step_x, step_y) = (BOX.0 + GAP.0, BOX.1 + GAP.1);
        let (width, height) = (2.0 * MARGIN + widest as f64 * step_x, 2.0 * MARGIN + rows as f64 * step_y);
        let corner = |(column, row): (usize, usize)| {
            let indent = (widest - filled[row]) as f64 * step_x / 2.0;
            (MARGIN + indent + column as f64 * step_x, MARGIN + row as f64 * step_y)
        };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
             font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
        );
        for (node, place) in nodes.iter().zip(&places) {
            let (x, y) = corner(*place);
            for &operand in &node.operands {
                let (from_x, from_y) = corner(places[operand]);
                let (x1, y1, x2) = (from_x + BOX.0 / 2.0, from_y + BOX.1, x + BOX.0 / 2.0);
                let bend = (y1 + y) / 2.0;
                let _ = writeln!(
                    svg,
                    "<path d=\"M{x1:.1} {y1:.1}C{x1:.1} {bend:.1} {x2:.1} {bend:.1} {x2:.1} {y:.1}\" fill=\"none\" \
                     stroke=\"#98a2ad\"/>"
                );
            }
        }
        for (number, (node, place)) in nodes.iter().zip(&places).enumerate() {
            let (x, y) = corner(*place);
            let edge = if outputs.contains(&number) {
                "stroke=\"#c0392b\" stroke-width=\"2\""
            } else {
                "stroke=\"#5c6670\""
            };
            let middle = x + BOX.0 / 2.0;
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{}\" height=\"{}\" rx=\"4\" fill=\"{}\" {edge}/>\n\
                 <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n\
                 <text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"9\" fill=\"#444\">{}</text>",
                BOX.0,
                BOX.1,
                node.colour,
                y + 14.0,
                escaped(&node.title),
                y + 27.0,
                escaped(&node.shape)
            );
        }
        svg.push_str("</svg>\n");
        Ok(svg)
    }

    /// The boxes, operands before what reads them, and which of them are outputs.
    fn nodes(&self) -> Result<(Vec<Node>, Vec<usize>)> {
        let mut nodes = Vec::new();
        let mut made_by: HashMap<TensorId, usize> = HashMap::new();
        for input in &self.inputs {
            made_by.insert(input.tensor, nodes.len());
            nodes.push(Node {
                title: input.port.name.clone(),
                shape: format!("{:?}", input.port.shape),
                colour: "#d5ecd4",
                row: 0,
                operands: Vec::new(),
            });
        }
        for operation in &self.operations {
            let (name, _) = name_and_attributes(operation)?;
            let operands: Vec<usize> =
                operation.inputs().filter_map(|tensor| made_by.get(&tensor.id).copied()).collect();
            let weights = operation.inputs().filter(|tensor| self.constants.contains_key(&tensor.id));
            let weights: String = weights.map(|tensor| format!(" ◦ {:?}", tensor.shape.to_vec())).collect();
            let Some(output) = operation.outputs().next() else { continue };
            let shape = format!("{:?}{weights}", output.shape.to_vec());
            let row = operands.iter().map(|&operand| nodes[operand].row + 1).max().unwrap_or(0);
            operation.outputs().for_each(|tensor| {
                made_by.insert(tensor.id, nodes.len());
            });
            nodes.push(Node { colour: colour(&name), title: name, shape, row, operands });
        }
        let outputs = self.outputs.iter().filter_map(|output| made_by.get(&output.tensor).copied()).collect();
        Ok((nodes, outputs))
    }
}

fn colour(name: &str) -> &'static str {
    const MULTIPLY: [&str; 5] = ["Matmul", "Linear", "Conv", "Attention", "Embedding"];
    const MOVE: [&str; 10] =
        ["Reshape", "SwapDims", "Permute", "Flip", "Expand", "Slice", "Cat", "RepeatDim", "Unfold", "Cast"];
    if MULTIPLY.iter().any(|kind| name.starts_with(kind)) {
        "#cfe3f7"
    } else if MOVE.iter().any(|kind| name.starts_with(kind)) {
        "#eceef0"
    } else {
        "#fdf1d8"
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
