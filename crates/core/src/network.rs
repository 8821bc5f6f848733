//! A trained network behind one interface, whatever system it came from.

use burn::tensor::{Device, DispatchTensor};
use serde::{Deserialize, Serialize};

/// The element kind of a [`Port`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PortKind {
    /// 32-bit floats.
    Float,
    /// Integers, for example token ids.
    Int,
}

/// A named input or output with an example shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Port {
    /// Readable name, unique among the network's inputs (or outputs).
    pub name: String,
    /// Element kind.
    pub kind: PortKind,
    /// Shape with an example batch and length.
    pub shape: Vec<usize>,
}

/// A trained model that can be run and captured without knowing its system.
pub trait Network: Send {
    /// The slug of the system that trained it.
    fn kind(&self) -> &str;

    /// What [`forward`](Self::forward) takes, in order.
    fn inputs(&self) -> Vec<Port>;

    /// What [`forward`](Self::forward) returns, in order.
    fn outputs(&self) -> Vec<Port>;

    /// Moves the parameters to `device`.
    fn move_to(&mut self, device: &Device);

    /// Runs the network in inference mode on tensors of the ports' ranks and kinds.
    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor>;
}
