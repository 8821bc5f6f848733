//! What is done with a finished atlas.

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, Result, Table};
use kiln_data::write_csv;
use serde_json::json;

use crate::atlas::Atlas;
use crate::compare;
use crate::silence;

#[derive(Debug, Args)]
pub struct AtlasArgs {
    /// Folder of an atlas
    #[arg(long)]
    model: PathBuf,
    /// Folder to write; by default that of the atlas
    #[arg(long)]
    out: Option<PathBuf>,
}

pub fn atlas(args: &AtlasArgs, cx: &Context) -> Result<()> {
    let atlas = Atlas::load(&args.model)?;
    let out = args.out.as_ref().unwrap_or(&args.model);
    std::fs::create_dir_all(out).map_err(Error::io("create", out))?;
    atlas.save_atlas(out)?;
    let result = json!({ "out": out.join("atlas.html"), "motifs": atlas.motifs.len() });
    cx.emit(&result, |_| format!("{} motifs in {}\n", atlas.motifs.len(), out.join("atlas.html").display()))
}

#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Folder of an atlas
    #[arg(long)]
    a: PathBuf,
    /// Folder of another
    #[arg(long)]
    b: PathBuf,
}

pub fn compare(args: &CompareArgs, cx: &Context) -> Result<()> {
    let found = compare::compare(&Atlas::load(&args.a)?, &Atlas::load(&args.b)?)?;
    cx.emit(&found, |found| {
        let mut table = Table::new("", &["motif of a", "motif of b", "similarity", "communities, NMI"]);
        for counterpart in found {
            table.row([
                counterpart.a.to_string(),
                counterpart.b.to_string(),
                format!("{:.3}", counterpart.similarity),
                format!("{:.3}", counterpart.community_nmi),
            ]);
        }
        table.to_text()
    })
}

#[derive(Debug, Args)]
pub struct SilenceArgs {
    /// Folder of an atlas
    #[arg(long)]
    model: PathBuf,
    /// The neuron that falls silent
    #[arg(long)]
    neuron: String,
    /// CSV file to write: rank,neuron,effect,motif
    #[arg(long)]
    out: Option<PathBuf>,
}

pub fn silence(args: &SilenceArgs, cx: &Context) -> Result<()> {
    let found = silence::silence(&Atlas::load(&args.model)?, &args.neuron)?;
    if let Some(out) = &args.out {
        let header = ["rank", "neuron", "effect", "motif"].map(String::from);
        let rows = found.neurons.iter().enumerate().map(|(rank, affected)| {
            let motif = affected.motif.map_or(String::new(), |motif| motif.to_string());
            [(rank + 1).to_string(), affected.neuron.clone(), format!("{:.6}", affected.effect), motif]
        });
        write_csv(out, std::iter::once(header).chain(rows))?;
    }
    cx.emit(&found, |found| {
        let shares = found
            .motifs
            .iter()
            .enumerate()
            .map(|(r, share)| format!("motif {}: {:.1} %", r + 1, 100.0 * share));
        let mut text = format!("{} carries of {}\n", found.neuron, shares.collect::<Vec<_>>().join(", "));
        for affected in found.neurons.iter().take(10).filter(|affected| affected.effect > 0.0) {
            let motif = affected.motif.map_or(String::new(), |motif| format!("motif {motif}"));
            text += &format!("{:<12} {:>10.4}  {motif}\n", affected.neuron, affected.effect);
        }
        text
    })
}
