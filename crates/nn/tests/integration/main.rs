//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod attention_layers;
mod burn_layers;
mod conv_layers;
mod dropout;
mod functional;
mod weights;
