//! ptq
pub mod arrays;
pub mod fold;
pub mod mlp;
pub mod quantiser;
pub mod search;
