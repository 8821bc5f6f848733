//! `kiln ptq profile` and `quant-array`

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use kiln_compiler::loops::{Buffer, Elements, write_buffers};
use kiln_core::{Context, Error, Result};
use serde_json::json;

use super::write_json;
use crate::arrays;
use crate::latency::Profile;
use crate::quantiser::{Asymmetric, Calibrator, Rows, largest_size, weight_range};

#[derive(Debug, Args)]
pub(super) struct ProfileArgs {
    /// JSON file to write
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn profile(args: &ProfileArgs, cx: &Context) -> Result<()> {
    let profile = Profile::measure();
    write_json(&args.out, &profile)?;
    cx.emit(&profile, |profile| {
        let mut text = String::from(
            "kind         billion multiplications a second      µs besides      (at 16, 8, 4 bits)\n",
        );
        let kinds = [
            ("conv", profile.conv),
            ("by channel", profile.by_channel),
            ("linear", profile.linear),
            ("product", profile.product),
        ];
        for (kind, rates) in kinds {
            let [t16, t8, t4] = rates.throughput.map(|rate| rate / 1e9);
            let [o16, o8, o4] = rates.overhead.map(|seconds| 1e6 * seconds);
            text += &format!(
                "{kind:<12} {t16:>8.1} {t8:>8.1} {t4:>8.1}         {o16:>8.1} {o8:>8.1} {o4:>8.1}\n"
            );
        }
        text + &format!("memory: {:.1} GB/s\n", profile.bandwidth / 1e9)
    })
}

/// Around zero or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scheme {
    /// Around zero, as for weights
    Sym,
    /// With a zero point, as for activations
    Asym,
}

#[derive(Debug, Args)]
pub(super) struct QuantArrayArgs {
    /// .npy file, or .npz file with one array
    #[arg(long)]
    input: PathBuf,
    /// Bits of the whole numbers
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(2..=16))]
    bits: u32,
    /// Around zero or not
    #[arg(long, value_enum, default_value = "sym")]
    scheme: Scheme,
    /// How the range is chosen
    #[arg(long, value_enum, default_value = "minmax")]
    calibrator: Calibrator,
    /// Give every row along the first axis a scale of its own
    #[arg(long, value_parser = clap::value_parser!(u32).range(0..=0))]
    axis: Option<u32>,
    /// .npz file to write: scale, zero, q, deq
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn quant_array(args: &QuantArrayArgs, cx: &Context) -> Result<()> {
    let array = arrays::read_one(&args.input)?;
    if array.values.is_empty() {
        return Err(Error::input(args.input.display(), "holds no numbers"));
    }
    let x = &array.values;
    let (scale, zero, q, values): (Vec<f64>, i32, Vec<i32>, Vec<f64>) = match (args.scheme, args.axis) {
        (Scheme::Sym, axis) => {
            let rows = if axis.is_some() { array.shape.first().copied().unwrap_or(1) } else { 1 };
            let rows = Rows::of(x, rows.max(1), args.bits, args.calibrator);
            let values = rows.values();
            (rows.scales, 0, rows.q, values)
        }
        (Scheme::Asym, Some(_)) => {
            return Err(Error::usage("--axis is for the symmetric scheme").hint("activations have one range"));
        }
        (Scheme::Asym, None) => {
            let clip = match args.calibrator {
                Calibrator::Minmax | Calibrator::Ema => largest_size(x),
                calibrator => weight_range(x, args.bits, calibrator),
            };
            let ends = x.iter().fold([0.0f64, 0.0], |[low, high], &x| [low.min(x), high.max(x)]);
            let quantiser = Asymmetric::of_range(ends[0].max(-clip), ends[1].min(clip), args.bits);
            let q: Vec<i32> = x.iter().map(|&x| quantiser.quantise(x)).collect();
            let values = q.iter().map(|&q| quantiser.value(q)).collect();
            (vec![quantiser.scale], quantiser.zero, q, values)
        }
    };
    let error = x.iter().zip(&values).map(|(x, y)| (x - y).powi(2)).sum::<f64>() / x.len() as f64;
    let scale_shape = if scale.len() == 1 { Vec::new() } else { vec![scale.len()] };
    let column = |name: &str, shape: &[usize], elements| {
        (name.to_string(), Buffer { shape: shape.to_vec(), elements })
    };
    let columns = [
        column("scale", &scale_shape, Elements::F64(scale.clone())),
        column("zero", &[], Elements::I32(vec![zero])),
        column("q", &array.shape, Elements::I32(q)),
        column("deq", &array.shape, Elements::F64(values)),
    ];
    write_buffers(&args.out, &columns.into())?;
    let result = json!({ "scale": scale, "zero": zero, "mean_squared_error": error, "out": args.out });
    cx.emit(&result, |_| {
        format!("{} numbers, mean squared error {error:.3e}, in {}\n", x.len(), args.out.display())
    })
}
