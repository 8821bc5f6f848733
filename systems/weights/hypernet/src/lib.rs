//! Networks that make the weights of networks.
