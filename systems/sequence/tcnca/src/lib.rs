//! Sequence models of dilated convolutions and chunked attention.
