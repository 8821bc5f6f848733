//! Recordings with a known answer.

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, Result, write_atomic};
use serde_json::json;

use crate::generate::SimulateConfig;
use crate::traces::write_npz;

#[derive(Debug, Args)]
pub struct SimulateArgs {
    /// Animals
    #[arg(long, default_value_t = 6)]
    animals: usize,
    /// Neurons of each
    #[arg(long, default_value_t = 40)]
    neurons: usize,
    /// Frames, two a second
    #[arg(long, default_value_t = 300)]
    frames: usize,
    /// Motifs that are planted
    #[arg(long, default_value_t = 3)]
    motifs: usize,
    /// Folder to write: traces.npz and truth.json
    #[arg(long)]
    out: PathBuf,
}

pub fn simulate(args: &SimulateArgs, cx: &Context) -> Result<()> {
    let config = SimulateConfig {
        animals: args.animals,
        neurons: args.neurons,
        frames: args.frames,
        motifs: args.motifs,
        ..SimulateConfig::reference()
    };
    let planted = config.draw(&mut cx.rng("simulate", 0))?;
    std::fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    write_npz(&args.out.join("traces.npz"), &planted.recordings)?;
    let truth = json!({ "config": config, "motifs": planted.motifs });
    let text =
        serde_json::to_vec_pretty(&truth).map_err(|e| Error::work("cannot write truth.json").caused_by(e))?;
    write_atomic(&args.out.join("truth.json"), &text)?;
    let result = json!({ "out": args.out, "animals": args.animals, "motifs": planted.motifs });
    cx.emit(&result, |_| format!("{} animals in {}\n", args.animals, args.out.join("traces.npz").display()))
}
