//! `kiln ptq sensitivity` and `sensitivity-mlp`

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, ModelFolder, Plot, Result};
use serde_json::json;

use super::source::{CalibArgs, ModelArgs, Source};
use super::{read_json, write_json};
use crate::mlp::Mlp;
use crate::search::Augment;
use crate::sensitivity::Sensitivities;

#[derive(Debug, Args)]
pub(super) struct SensitivityArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    calib: CalibArgs,
    /// Folder to write: sensitivity.json and plots
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn run(args: &SensitivityArgs, cx: &Context) -> Result<()> {
    args.calib.check()?;
    let source = Source::open(&args.model, cx)?;
    let (_, sensitivities) = args.calib.measure(&source, None, cx)?;
    let folder = ModelFolder::new(&args.out);
    folder.create()?;
    write_json(&folder.file("sensitivity.json"), &sensitivities)?;
    plot_sensitivities(&folder, &sensitivities)?;
    cx.emit(&sensitivities, |found| {
        let mut text = String::from(
            "unit         trace          error    probes  Ω at 4 bits    Δ at 4 bits    Δ at 8 bits\n",
        );
        for (at, name) in found.units.iter().enumerate() {
            let (trace, four, eight) = (found.traces[at], &found.four, &found.eight);
            text += &format!(
                "{name:<12} {:<14.4} {:<8.2} {:<7} {:<14.3e} {:<14.3e} {:.3e}\n",
                trace.mean, trace.error, trace.probes, four.hessian[at], four.single[at], eight.single[at]
            );
        }
        text + &format!("{}\n", found.method)
    })
}

fn plot_sensitivities(folder: &ModelFolder, found: &Sensitivities) -> Result<()> {
    let (shares, pairs) = plots(found);
    shares.save(&folder.file("sensitivity.svg"))?;
    pairs.map_or(Ok(()), |pairs| pairs.save(&folder.file("pairs.svg")))
}

/// What units share in, and what pairs of them lose, if that was measured.
pub(super) fn plots(found: &Sensitivities) -> (Plot, Option<Plot>) {
    let pairs = found.four.pair.first().map(|first| {
        let values = found.four.pair.iter().flatten().map(|d| d.max(0.0)).collect();
        let title = "What pairs of units lose beyond the sum, 4 bits";
        Plot::heat_map(title, "unit", "unit", first.len(), values)
    });
    let shares = |values: Vec<f64>| {
        let sum = values.iter().sum::<f64>().max(1e-300);
        values.into_iter().map(|value| value / sum).collect::<Vec<f64>>()
    };
    let series = [
        ("curvature", shares(found.four.hessian.clone())),
        ("dependency", shares(found.four.dependency(Augment::Both))),
    ];
    (Plot::bars("Sensitivity at 4 bits", "share", found.units.clone(), series), pairs)
}

#[derive(Debug, Args)]
pub(super) struct MlpArgs {
    /// JSON file with W, B, X and Y
    #[arg(long)]
    input: PathBuf,
    /// Bits of the weights
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(2..=16))]
    bits: u32,
    /// Compute traces exactly instead of estimating them
    #[arg(long)]
    exact_trace: bool,
    /// Random directions of the estimate
    #[arg(long, default_value_t = 4096)]
    probes: usize,
}

pub(super) fn perceptron(args: &MlpArgs, cx: &Context) -> Result<()> {
    let mlp: Mlp = read_json(&args.input, "a perceptron W, B with examples X, Y")?;
    mlp.check(&args.input.display().to_string())?;
    if args.probes == 0 {
        return Err(Error::usage("--probes must be at least 1"));
    }
    let traces = match args.exact_trace {
        true => mlp.exact_traces(),
        false => {
            mlp.estimated_traces(args.probes, |layer, block| cx.rng(&format!("probe {layer}"), block as u64))
        }
    };
    let (noise, single, pairs) = mlp.perturbations(args.bits);
    let weights = mlp.flat_weights();
    let hessian: Vec<f64> =
        traces.iter().zip(&noise).zip(&weights).map(|((t, e), w)| t.max(0.0) / w.len() as f64 * e).collect();
    let result = json!({
        "loss": mlp.loss(&weights), "trace": traces, "err2": noise, "hess": hessian, "single": single, "pair": pairs,
    });
    cx.emit(&result, |_| {
        let mut text = String::from("layer  trace        ‖δ‖²         Ω            Δ\n");
        for l in 0..mlp.layers() {
            text += &format!(
                "{l:<6} {:<12.6} {:<12.6} {:<12.6} {:.6}\n",
                traces[l], noise[l], hessian[l], single[l]
            );
        }
        text
    })
}
