//! Verbs that check a network against a site: `calibrate` and `shift`.

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, ModelFolder, Plot, Result};
use serde_json::json;

use super::judge::judge;
use super::shown;
use crate::calibrate::{calibration, temperature};
use crate::checkpoint::{Config, KIND, open, stride};
use crate::dataset::Dataset;
use crate::shift::{BANDS, band_differences, site_accuracy};
use crate::windows::WindowSet;

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// A folder that `prepare` wrote, whose labelled recordings to learn from decide the temperature
    #[arg(long)]
    data: PathBuf,
    /// Windows that pass through the network at once
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Model folder to write
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn calibrate(args: &CalibrateArgs, cx: &Context) -> Result<()> {
    if args.batch == 0 {
        return Err(Error::usage("--batch must be at least 1"));
    }
    let (config, model) = open(&args.model, cx)?;
    let config = Config { temperature: 1.0, ..config };
    let data = Dataset::open(&args.data)?;
    config.check_data(&data, &args.data)?;
    let windows = judge(&config, &model, &data, &data.training(), args.batch, &mut Vec::new(), cx)?;
    let Some(found) = temperature(&windows) else {
        return Err(Error::input(args.data.display(), "lacks labelled recordings of both classes")
            .hint("calibration needs normal and pathological ones, each as long as a window"));
    };
    let (before, after) = (calibration(&windows, 1.0), calibration(&windows, found));
    let folder = ModelFolder::new(&args.out);
    if folder.file("config.json").exists() {
        return Err(Error::usage(format!("{} already holds a model", args.out.display())));
    }
    folder.create()?;
    folder.save_config(KIND, &Config { temperature: found, ..config })?;
    folder.save_weights(&ModelFolder::new(&args.model).weights()?)?;
    let result = json!({ "out": args.out, "temperature": found, "windows": windows.len(), "before": before, "after": after });
    cx.emit(&result, |_| {
        let line = |name: &str, c: Option<crate::calibrate::Calibration>| {
            format!(
                "{name:<8} loss {}  calibration error {}\n",
                shown(c.map(|c| c.nll)),
                shown(c.map(|c| c.ece))
            )
        };
        format!(
            "temperature {found:.3}\n{}{}model in {}\n",
            line("before", before),
            line("after", after),
            args.out.display()
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct ShiftArgs {
    /// A folder that `prepare` wrote
    #[arg(long)]
    a: PathBuf,
    /// Another, prepared in the same way
    #[arg(long)]
    b: PathBuf,
    /// Model folder: how well its embedding gives the site away
    #[arg(long)]
    model: Option<PathBuf>,
    /// Samples of a window [default: 6000, or the shortest recording, or the model's]
    #[arg(long, conflicts_with = "model")]
    window: Option<usize>,
    /// Heat map to write, .svg or .png: differences by channel and band
    #[arg(long, default_value = "shift.svg")]
    out: PathBuf,
}

pub(super) fn shift(args: &ShiftArgs, cx: &Context) -> Result<()> {
    let (a, b) = (Dataset::open(&args.a)?, Dataset::open(&args.b)?);
    if a.channels != b.channels || a.pipeline.rate != b.pipeline.rate {
        return Err(Error::input(args.b.display(), "has other channels or another sample rate").hint(
            format!("prepare both sites in the same way: {} has {}", args.a.display(), a.channels.join(", ")),
        ));
    }
    let model = args.model.as_ref().map(|folder| open(folder, cx)).transpose()?;
    if let Some((config, _)) = &model {
        config.check_data(&a, &args.a)?;
        config.check_data(&b, &args.b)?;
    }
    let all = |data: &Dataset| (0..data.recordings.len()).collect::<Vec<_>>();
    let length = match (&model, args.window) {
        (Some((config, _)), _) => config.network.n_times(),
        (None, Some(window)) => window.max(2),
        (None, None) => a.shortest(&all(&a)).min(b.shortest(&all(&b))).clamp(2, 6000),
    };
    let step = model.as_ref().map_or(length, |(config, _)| stride(&config.network));
    let (of_a, of_b) = (
        WindowSet::for_training(&a, &all(&a), length, step),
        WindowSet::for_training(&b, &all(&b), length, step),
    );
    if of_a.len() < 4 || of_b.len() < 4 {
        return Err(Error::usage(format!("{} and {} windows of {length} samples", of_a.len(), of_b.len()))
            .hint("at least four of each site are needed: use a shorter --window"));
    }
    let differences = band_differences(&of_a, &of_b, &a.channels, a.pipeline.rate)?;
    let site = model.as_ref().map(|(_, model)| site_accuracy(model, &of_a, &of_b, cx)).transpose()?;
    Plot::heat_map(
        "Difference of band power",
        "band: delta, theta, alpha, beta, gamma",
        "channel",
        BANDS.len(),
        differences.iter().map(|d| d.difference.abs()).collect(),
    )
    .save(&args.out)?;
    let result = json!({
        "windows": [of_a.len(), of_b.len()],
        "bands": differences,
        "site_balanced_accuracy": site,
        "out": args.out,
    });
    cx.emit(&result, |_| {
        let mut text = String::from("difference of log-power, b less a, in deviations\nchannel  ");
        text += &BANDS.iter().map(|(name, _)| format!("{name:>8}")).collect::<String>();
        for (channel, row) in a.channels.iter().zip(differences.chunks(BANDS.len())) {
            text += &format!("\n{channel:<9}");
            text += &row.iter().map(|d| format!("{:>8.2}", d.difference)).collect::<String>();
        }
        text.push('\n');
        if let Some(site) = site {
            text += &format!(
                "the network's embedding tells the sites apart with a balanced accuracy of {site:.3}\n"
            );
        }
        text
    })
}
