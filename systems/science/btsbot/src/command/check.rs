//! `kiln btsbot shift`

use std::fs;
use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, Plot, Result, Table, write_atomic};

use super::shown;
use crate::policy::Policy;
use crate::shift::{Compared, Sample, compare};

/// Features that are shown to a person.
const SHOWN: usize = 10;

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
    /// Folder to write: shift.json, features.svg and scores.svg
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn shift(args: &ShiftArgs, cx: &Context) -> Result<()> {
    let (a, b) = (Sample::read(&args.a)?, Sample::read(&args.b)?);
    let found = compare(&a, &b, &args.policy, &mut cx.rng("shift", 0))?;
    let out = &args.out;
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let json = serde_json::to_vec_pretty(&found).map_err(|e| Error::work("cannot write JSON").caused_by(e))?;
    write_atomic(&out.join("shift.json"), &json)?;
    let bins = 10;
    let counts = |sample: &Sample| {
        let mut counts = vec![0.0; bins];
        for alert in &sample.alerts {
            counts[((alert.score * bins as f64) as usize).min(bins - 1)] += 1.0 / sample.alerts.len() as f64;
        }
        counts
    };
    let names = (0..bins).map(|bin| format!("{:.1}", bin as f64 / bins as f64));
    Plot::bars("Scores (from …)", "share of alerts", names, [("before", counts(&a)), ("today", counts(&b))])
        .save(&out.join("scores.svg"))?;
    if !found.features.is_empty() {
        let top = || found.features.iter().take(SHOWN);
        let bars = [
            ("distance (KS)", top().map(|f| f.ks).collect::<Vec<_>>()),
            ("stability index", top().map(|f| f.psi).collect()),
        ];
        Plot::bars("Features that differ most", "", top().map(|f| f.name.clone()), bars)
            .save(&out.join("features.svg"))?;
    }
    cx.emit(&found, |_| {
        let mut table = Table::new("", &["figure", "before", "today", "difference", "95 %"]);
        for (name, compared) in
            [("AUC", found.auc), ("completeness", found.completeness), ("purity", found.purity)]
        {
            let Compared { a, b, difference, interval } = compared;
            let interval = interval.map_or("-".into(), |[low, high]| format!("{low:.3} to {high:.3}"));
            table.row([name.into(), shown(a), shown(b), shown(difference), interval]);
        }
        let mut text = format!("{}\ndistance of the scores' distributions {:.3}\n", table.to_text(), found.score_ks);
        for feature in found.features.iter().take(SHOWN) {
            text += &format!("{:<16} KS {:.3}, stability index {:.3}\n", feature.name, feature.ks, feature.psi);
        }
        text + &format!("{}: {}\n", found.verdict, out.display())
    })
}
