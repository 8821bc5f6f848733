//! The verb `plot`: weights as pictures, and how smooth they are.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use serde::Serialize;

use super::apply::png;
use super::{numbers, widths};
use crate::arch::Size;
use crate::checkpoint;
use crate::graph::TensorSpec;
use crate::smooth::total_variation;

#[derive(Debug, Args)]
pub(super) struct PlotArgs {
    /// Model folder of a family
    #[arg(long)]
    model: PathBuf,
    /// Tensor to show
    #[arg(long)]
    tensor: String,
    /// Widths, as 8,12,16 or 8-16 [default: those that are trained]
    #[arg(long, value_name = "WIDTHS")]
    widths: Option<String>,
    /// Kernel sizes, as 1,3,5: a row of the picture for each, with whole kernels instead of their middles
    #[arg(long, value_name = "KERNELS")]
    kernels: Option<String>,
    /// Sets of weights that are averaged
    #[arg(long, default_value_t = 1)]
    draws: usize,
    /// Folder to write
    #[arg(long)]
    to: PathBuf,
}

/// What `plot` prints.
#[derive(Serialize)]
struct PlotResult {
    to: PathBuf,
    widths: Vec<usize>,
    /// Extents of kernels; none where they are whole.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kernels: Vec<usize>,
    /// Total variation of the tensor for each number of its weights: for each kernel, at each width.
    variation: Vec<Vec<f64>>,
}

pub(super) fn plot(args: &PlotArgs, cx: &Context) -> Result<()> {
    let (family, inr, _) = checkpoint::open_family(&args.model, cx)?;
    let net = &family.config.net;
    let chosen = match &args.widths {
        Some(text) => widths(text).map_err(Error::usage)?,
        None => family.config.widths.clone(),
    };
    let kernels = match &args.kernels {
        Some(text) => numbers(text, "kernels").map_err(Error::usage)?,
        None => Vec::new(),
    };
    let names: Vec<String> =
        net.build(family.full())?.graph.tensors().into_iter().map(|spec| spec.name).collect();
    let index = names.iter().position(|name| *name == args.tensor).ok_or_else(|| {
        Error::usage(format!("the network has no tensor \"{}\"", args.tensor))
            .hint(format!("it has {}", names.join(", ")))
    })?;
    let rows: Vec<Option<usize>> = match kernels.is_empty() {
        true => vec![None],
        false => kernels.iter().copied().map(Some).collect(),
    };
    let (mut panels, mut variation) = (Vec::new(), Vec::new());
    for &kernel in &rows {
        let (mut row, mut found) = (Vec::new(), Vec::new());
        for &width in &chosen {
            let plain = family.sample(&inr, Size { kernel, ..Size::new(width) }, args.draws, cx)?;
            let spec = net.build(plain.size)?.graph.tensors().swap_remove(index);
            let values = &plain.tensors[index];
            found.push(total_variation(&spec, values) / values.len() as f64);
            row.push(Panel::of(&spec, values, kernel.is_some()));
        }
        panels.push(row);
        variation.push(found);
    }
    fs::create_dir_all(&args.to).map_err(Error::io("create", &args.to))?;
    let (picture, shape) = weight_panels(&panels);
    let stem = args.tensor.replace(['.', '/'], "-");
    write_atomic(&args.to.join(format!("{stem}.png")), &png(&picture, shape)?)?;
    let title = format!("Smoothness of {}", args.tensor);
    let mut lines = Plot::lines(title, "width", "total variation a weight");
    for (kernel, variation) in rows.iter().zip(&variation) {
        let name = kernel.map_or(args.tensor.clone(), |kernel| format!("kernel {kernel}"));
        let points = chosen.iter().zip(variation).map(|(&width, &variation)| (width as f64, variation));
        lines = lines.series(name, points.collect());
    }
    lines.save(&args.to.join(format!("{stem}-variation.svg")))?;
    let result = PlotResult { to: args.to.clone(), widths: chosen, kernels, variation };
    cx.emit(&result, |PlotResult { to, widths, kernels, variation }| {
        let mut text = String::from("total variation a weight\nwidth");
        kernels.iter().for_each(|kernel| text += &format!("  {:>7}", format!("{kernel} x {kernel}")));
        for (place, width) in widths.iter().enumerate() {
            text += &format!("\n{width:>5}");
            variation.iter().for_each(|row| text += &format!("  {:.5}", row[place]));
        }
        text + &format!("\nweights, widths from left to right, in {}\n", to.display())
    })
}

/// What a picture shows of the weights of one network: for each output and input a kernel, or its middle.
struct Panel {
    outputs: usize,
    inputs: usize,
    /// Rows and columns that are shown of each kernel.
    kernel: [usize; 2],
    /// Row by row over outputs, inputs and the kernel.
    values: Vec<f32>,
}

impl Panel {
    fn of(spec: &TensorSpec, values: &[f32], whole: bool) -> Self {
        let [outputs, inputs, taps] = spec.extents();
        match (whole, &spec.shape[..]) {
            (true, &[_, _, height, width]) => {
                Self { outputs, inputs, kernel: [height, width], values: values.to_vec() }
            }
            _ => {
                let middles = values.iter().skip(taps / 2).step_by(taps).copied().collect();
                Self { outputs, inputs, kernel: [1, 1], values: middles }
            }
        }
    }

    /// Height and width in squares; kernels of several numbers stand a line apart.
    fn extents(&self) -> [usize; 2] {
        let [height, width] = self.kernel;
        let gap = usize::from(height * width > 1);
        [self.outputs * (height + gap), self.inputs * (width + gap)]
    }

    /// The weight at a square; none between kernels.
    fn at(&self, row: usize, column: usize) -> Option<f32> {
        let [height, width] = self.kernel;
        let gap = usize::from(height * width > 1);
        let (o, y) = (row / (height + gap), row % (height + gap));
        let (c, x) = (column / (width + gap), column % (width + gap));
        (y < height && x < width).then(|| self.values[((o * self.inputs + c) * height + y) * width + x])
    }
}

/// Panels in rows, outputs down and inputs across: grey is 0, white the largest weight and black its opposite. Weights are
/// squares of several pixels.
fn weight_panels(rows: &[Vec<Panel>]) -> (Vec<f32>, [usize; 3]) {
    const SQUARE: usize = 6;
    const GAP: usize = 8;
    let all = || rows.iter().flatten();
    let largest = all().flat_map(|panel| &panel.values).fold(f32::MIN_POSITIVE, |a, w| a.max(w.abs()));
    let height = |row: &Vec<Panel>| row.iter().map(|panel| panel.extents()[0]).max().unwrap_or(0) * SQUARE;
    let width = |row: &Vec<Panel>| row.iter().map(|panel| panel.extents()[1] * SQUARE + GAP).sum::<usize>();
    let tall = GAP + rows.iter().map(|row| height(row) + GAP).sum::<usize>();
    let wide = GAP + rows.iter().map(width).max().unwrap_or(0);
    let mut picture = vec![0.25; tall * wide];
    let mut top = GAP;
    for row in rows {
        let mut left = GAP;
        for panel in row {
            let [down, across] = panel.extents().map(|extent| extent * SQUARE);
            for (y, x) in (0..down).flat_map(|y| (0..across).map(move |x| (y, x))) {
                if let Some(weight) = panel.at(y / SQUARE, x / SQUARE) {
                    picture[(top + y) * wide + left + x] = 0.5 + 0.5 * weight / largest;
                }
            }
            left += across + GAP;
        }
        top += height(row) + GAP;
    }
    (picture, [1, tall, wide])
}
