//! The contract between Kiln's systems, its binary and its library.
//!
//! A system implements [`System`]: it names itself with a [`Card`], offers verbs on the command line,
//! and runs its reference experiment into a [`Report`] whose [`Claim`]s are computed from measurements.
//! A trained model lives in a folder ([`ModelFolder`]) as `config.json` and `model.safetensors`;
//! [`TensorFile`] moves parameters between such files and Burn modules by name.

mod context;
mod error;
pub mod html;
mod memory;
mod model;
mod network;
pub mod plot;
mod progress;
mod report;
mod system;
mod tensor_file;
mod tensor_stream;
pub mod testing;
mod text;

pub use context::{Context, OpenNetwork, OutputMode, random_stream};
pub use error::{Error, ErrorKind, Result};
pub use memory::MemoryGauge;
pub use model::{ModelFolder, write_atomic};
pub use network::{Network, Port, PortKind};
pub use plot::Plot;
pub use progress::Progress;
pub use report::{Claim, Report, Table, Threshold};
pub use system::{Card, Scale, System};
pub use tensor_file::{HostTensor, ModulePath, TensorFile, Values};
pub use tensor_stream::{StreamedTensor, Take};
