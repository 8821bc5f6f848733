//! Class probabilities for small tables in one forward pass.
