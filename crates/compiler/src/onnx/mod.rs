//! Graphs from and to ONNX files.
//!
//! [`Graph::from_onnx`] turns every node of a file into Burn's operations. All floats become 32-bit ones, all integers
//! 64-bit ones (constants that `DequantizeLinear` reads keep their type). Arithmetic of shapes is done on the way, so
//! that a graph has fixed shapes; sizes that the file leaves open are given in [`OnnxOptions`].
//! [`Graph::to_onnx`] writes a graph with operators of the standard's set 20.

mod export;
mod import;
mod operators;
mod proto;
mod quantised;
mod tensor;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use operators::known_operators as onnx_operators;

#[cfg(doc)]
use crate::Graph;

/// What an ONNX file leaves open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OnnxOptions {
    /// Sizes by the name that the file gives them (`batch`), or by input and axis (`x.0`). Others are 1.
    pub dims: BTreeMap<String, usize>,
}
