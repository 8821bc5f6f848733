//! What communities are compared with: modularity and k-means.

mod kmeans;
mod louvain;

pub use kmeans::kmeans;
pub use louvain::louvain;
