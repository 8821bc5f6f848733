//! Programs of loops over buffers: what graphs are lowered to, and what targets compile.
//!
//! A [`Program`] has typed buffers as parameters and statements that run over them; its JSON form is
//! `kiln-loop-ir/1`, its [text form](text) parses back. [`check`] verifies it, [`interpret`] runs it and defines what it
//! means: integers wrap, `div` and `rem` truncate, `floordiv` and `floormod` floor, shifts mask their amount; every float
//! operation is rounded to its type, nothing is contracted or reassociated, `min` and `max` propagate NaN and put -0
//! below +0. Division of an integer by zero, an index out of bounds and an assertion that does not hold end a program
//! with a [`Trap`]; `and`, `or` of truth values and `select` compute what they need only. A [`Pass`] makes a program into
//! another that does the same, [`to_wasm`] a WebAssembly module, [`to_wgsl`] compute shaders.

mod buffer;
mod check;
mod dependence;
mod interpret;
mod passes;
mod program;
mod ranges;
pub mod text;
mod value;
mod walk;
mod wasm;
mod wgsl;

pub use buffer::{Buffer, Elements, read_buffer, read_buffers, write_buffers};
pub use check::{Checked, check};
pub use interpret::{Outcome, Trap, interpret};
pub use passes::{PASSES, Pass, default_passes};
pub use program::{BinOp, Expr, For, Function, Io, LoopKind, Memory, Param, Program, ScalarType, Stmt, UnOp};
pub use value::Value;
pub use wasm::{WasmModule, to_wasm};
pub use wgsl::{Dispatch, STATUS, WgslBuffer, WgslKernel, WgslProgram, to_wgsl};
