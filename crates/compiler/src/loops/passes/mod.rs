//! Passes: programs into programs that do the same.
//!
//! A pass is data, so that a list of them can be stored, reordered and mutated. Every pass leaves outputs bit for bit as
//! they were, and a program that traps traps in the same way.

mod hoist;
mod nest;
mod simplify;
mod split;
mod unroll;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use super::check::check;
use super::program::Program;

/// A pass with its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "pass", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Pass {
    /// Computes what is known, drops what does nothing.
    Simplify,
    /// Puts values in the place of names that cost nothing to compute again.
    InlineLet,
    /// Writes loops marked as unrolled, of a known number of turns up to `most`, as straight code.
    Unroll {
        /// Most turns.
        most: usize,
    },
    /// Runs loops in blocks of `factor` turns, and the turns that are left over by themselves.
    Split {
        /// Turns of a block.
        factor: usize,
    },
    /// Runs loops marked as vectorized in blocks of `width` lanes, where their turns are independent, and the others
    /// serially.
    Vectorize {
        /// Lanes.
        width: usize,
    },
    /// Marks outermost loops of independent turns as parallel, and takes the mark from others.
    Parallelise,
    /// Takes the first and last turns out of loops whose conditions then need no asking.
    LoopPartition,
    /// Computes what is the same in every turn of a loop once before it.
    HoistInvariant,
    /// Joins neighbouring loops over the same turns.
    FuseLoops,
    /// Exchanges loops so that the innermost goes from an element to the next.
    Reorder,
}

/// Names of the passes.
pub const PASSES: [&str; 10] = [
    "simplify",
    "inline-let",
    "unroll",
    "split",
    "vectorize",
    "parallelise",
    "loop-partition",
    "hoist-invariant",
    "fuse-loops",
    "reorder",
];

/// The passes that a program gets where none are named.
pub fn default_passes() -> Vec<Pass> {
    vec![
        Pass::Simplify,
        Pass::InlineLet,
        Pass::LoopPartition,
        Pass::Unroll { most: 16 },
        Pass::Vectorize { width: 8 },
        Pass::InlineLet,
        Pass::Simplify,
        Pass::Parallelise,
    ]
}

impl Pass {
    /// Reads `name` or `name:number`.
    ///
    /// # Errors
    /// When there is no such pass, or it needs a number.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, Some(number)),
            None => (text, None),
        };
        let argument = || {
            let parsed = number.and_then(|number| number.parse::<usize>().ok()).filter(|&number| number > 0);
            parsed.ok_or_else(|| Error::usage(format!("pass \"{text}\" needs a number, as in {name}:8")))
        };
        let plain = |pass| match number {
            None => Ok(pass),
            Some(_) => Err(Error::usage(format!("pass \"{name}\" takes no number"))),
        };
        match name {
            "simplify" => plain(Self::Simplify),
            "inline-let" => plain(Self::InlineLet),
            "unroll" => Ok(Self::Unroll { most: argument()? }),
            "split" => Ok(Self::Split { factor: argument()? }),
            "vectorize" => Ok(Self::Vectorize { width: argument()? }),
            "parallelise" => plain(Self::Parallelise),
            "loop-partition" => plain(Self::LoopPartition),
            "hoist-invariant" => plain(Self::HoistInvariant),
            "fuse-loops" => plain(Self::FuseLoops),
            "reorder" => plain(Self::Reorder),
            _ => Err(Error::usage(format!("there is no pass \"{name}\""))
                .hint(format!("there are: {}", PASSES.join(", ")))),
        }
    }

    /// Applies the pass, and verifies what comes out.
    ///
    /// # Errors
    /// When an argument makes no sense, or the result does not pass the verifier: that is a mistake in the pass.
    pub fn apply(&self, program: &mut Program) -> Result<()> {
        if let Self::Split { factor: 0 } | Self::Vectorize { width: 0 } = self {
            return Err(Error::usage(format!("{self:?} has blocks of no turns")));
        }
        program.make_names_unique();
        match self {
            Self::Simplify => simplify::simplify(program),
            Self::InlineLet => simplify::inline_let(program),
            Self::Unroll { most } => unroll::unroll(program, *most),
            Self::Split { factor } => split::split(program, *factor),
            Self::Vectorize { width } => split::vectorize(program, *width),
            Self::Parallelise => split::parallelise(program),
            Self::LoopPartition => split::partition(program),
            Self::HoistInvariant => hoist::hoist_invariant(program),
            Self::FuseLoops => nest::fuse_loops(program),
            Self::Reorder => nest::reorder(program),
        }
        check(program)
            .map(drop)
            .map_err(|e| Error::work(format!("pass {self:?} broke the program")).caused_by(e))
    }
}
