//! Kiln's own chores, as `cargo xtask <chore>`.

mod bench;
mod memcheck;
mod mpi;
mod onnx;
mod readme;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::Parser;

/// Kiln's own chores.
#[derive(Parser)]
#[command(name = "cargo xtask")]
enum Chore {
    /// Check the format, run clippy and every test, and count the outcome
    Test,
    /// Measure a system against its Python peer, in alternating runs
    Bench {
        /// The system, as `kiln list` names it
        slug: String,
        /// How often each side runs
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
        pairs: u32,
    },
    /// Run the shell blocks of every README.md
    Readme,
    /// Compare ONNX models in Kiln and ONNX Runtime
    Onnx,
    /// Run the cluster crate's suite on processes of MPI
    Mpi,
}

/// What a component's own suite came to.
#[derive(Default)]
struct Counted {
    passed: usize,
    failed: usize,
    skipped: usize,
}

/// What a chore can end with: whether all is well, or why it could not be done.
type Outcome = Result<bool, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let outcome = match Chore::parse() {
        Chore::Test => test::run(),
        Chore::Bench { slug, pairs } => bench::run(&slug, pairs),
        Chore::Readme => readme::run(),
        Chore::Onnx => onnx::check().map(|counted| counted.failed == 0),
        Chore::Mpi => mpi::check().map(|counted| counted.failed == 0),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
