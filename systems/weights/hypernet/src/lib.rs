//! Hypernetworks: networks that make the weights of networks.
//!
//! Source: Vinod Kumar Chauhan et al., "A Brief Review of Hypernetworks in Deep Learning", Artificial Intelligence Review
//! 2024, arXiv 2306.06955. A target network `y = F(x; Θ)` gets its weights from another, which alone is learned:
//!
//! ```text
//! Θ = H(C; Φ)        y = F(x; H(C; Φ))        gradients flow from the loss through Θ to Φ
//! ```
//!
//! The review sorts hypernetworks by five criteria; here each is a type, and a [`HyperNetConfig`] picks one value of each:
//!
//! | criterion | type | values |
//! |---|---|---|
//! | inputs C | [`Conditioning`] | task, data, noise, given, or several |
//! | outputs | [`OutputScheme`] | once, heads, component, chunk |
//! | variability of inputs | [`Conditioning::is_static`] | static (tasks), dynamic (all others) |
//! | variability of outputs | [`Theta`] | static: keep it; dynamic: one set of weights a sample, in one pass |
//! | architecture | [`Arch`] | MLP, CNN, RNN, attention |
//!
//! [`target`] has the networks whose weights are made, [`kiln_nn::WeightSpec`] makes a target of any Burn module. [`apps`]
//! holds applications that the review lists, each beside the network that one would use without a hypernetwork.

pub mod conditioning;
pub mod generator;
pub mod hypernet;
pub mod target;

pub use conditioning::{Condition, Conditioning};
pub use generator::Arch;
pub use hypernet::{HyperNet, HyperNetConfig, Init, OutputRegularizer, OutputScheme, Theta};
pub use target::{Layer, Target};
