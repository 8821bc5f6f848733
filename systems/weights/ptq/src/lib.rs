//! ptq
pub mod arch;
pub mod arrays;
pub mod checkpoint;
pub mod data;
pub mod fold;
pub mod mlp;
pub mod program;
pub mod quantise;
pub mod quantiser;
pub mod search;
pub mod unit;
