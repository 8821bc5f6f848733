//! `kiln btsbot shift` and `kiln btsbot calibrate`

use std::fs;
use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use serde_json::json;

use super::ArrayArgs;
use super::learn::read;
use crate::calibrate::{calibration, reliability, temperature};
use crate::checkpoint::{open, save};
use crate::metrics::labelled;
use crate::page;
use crate::policy::Policy;
use crate::shift::{Sample, compare};
use crate::train::predict;

#[derive(Debug, Args)]
pub(super) struct ShiftArgs {
    /// Scored, labelled alerts of before
    #[arg(long)]
    a: PathBuf,
    /// Scored, labelled alerts of today
    #[arg(long)]
    b: PathBuf,
    /// The policy whose completeness and purity are compared
    #[arg(long, default_value = "bts_p1")]
    policy: Policy,
    /// Folder to write: shift.json, report.html and its plots
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn shift(args: &ShiftArgs, cx: &Context) -> Result<()> {
    let (a, b) = (Sample::read(&args.a)?, Sample::read(&args.b)?);
    let found = compare(&a, &b, &args.policy, &mut cx.rng("shift", 0))?;
    let out = &args.out;
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let json =
        serde_json::to_vec_pretty(&found).map_err(|e| Error::work("cannot write JSON").caused_by(e))?;
    write_atomic(&out.join("shift.json"), &json)?;
    let mut report = page::shift(&a, &b, &found);
    report.seed = cx.seed;
    report.save(out)?;
    cx.emit(&found, |_| {
        let text: String =
            report.tables.iter().map(|table| format!("{}\n{}\n", table.title, table.to_text())).collect();
        format!("{text}{}: see {}\n", found.verdict, out.join("report.html").display())
    })
}

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    arrays: ArrayArgs,
    /// Model folder to write, with reliability.svg
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn calibrate(args: &CalibrateArgs, cx: &Context) -> Result<()> {
    let (Some(triplets), Some(candidates)) = (&args.arrays.triplets, &args.arrays.candidates) else {
        return Err(Error::usage("there is nothing to calibrate by").hint("give --triplets and --candidates"));
    };
    if args.out.join("config.json").exists() {
        return Err(Error::usage(format!("{} already holds a model", args.out.display())));
    }
    let (mut config, model) = open(&args.model, cx)?;
    let data = read(triplets, candidates, config.network.side, cx)?;
    let chosen = data.labelled()?;
    let scores = predict(&model, &data, &chosen, 1.0, cx)?;
    let alerts = labelled(&data.scored(&chosen, &scores));
    let Some(found) = temperature(&alerts) else {
        return Err(Error::input(candidates.display(), "has labelled alerts of one class only")
            .hint("a temperature needs both"));
    };
    let (before, after) = (calibration(&alerts, config.temperature), calibration(&alerts, found));
    let earlier = config.temperature;
    config.temperature = found;
    save(&args.out, &config, &model)?;
    Plot::lines("Reliability", "mean score", "share of bright transients")
        .series("before", reliability(&alerts, earlier))
        .series("after", reliability(&alerts, found))
        .series("ideal", vec![(0.0, 0.0), (1.0, 1.0)])
        .save(&args.out.join("reliability.svg"))?;
    let result = json!({ "out": args.out, "temperature": found, "before": before, "after": after });
    cx.emit(&result, |_| {
        format!(
            "temperature {found:.3}: calibration error {:.4} before, {:.4} after; negative log-likelihood {:.4} before, {:.4} after\nmodel in {}\n",
            before.ece,
            after.ece,
            before.nll,
            after.nll,
            args.out.display()
        )
    })
}
