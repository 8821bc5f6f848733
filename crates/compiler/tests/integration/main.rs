//! The crate's tests from outside, in one program: every program links Burn anew, which takes longer than they do.

mod capture;
mod cases;
mod compile;
mod execute;
mod loops;
#[path = "../../benches/networks/mod.rs"]
mod networks;
mod onnx;
mod reverse;
mod shaders;
