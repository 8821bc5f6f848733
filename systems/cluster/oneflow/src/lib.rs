//! draft
pub mod actor;
pub mod boxing;
pub mod linear;
pub mod local;
pub mod sbp;
pub mod select;
pub mod signature;
