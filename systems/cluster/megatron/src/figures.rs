//! The paper's figures, as the analytic model draws them.

use clap::ValueEnum;
use kiln_core::Plot;

use crate::perf::{Cluster, Division, GptShape, PerfModel};

/// Which figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Figure {
    /// Interleaved against plain 1F1B over the batch (Figure 12)
    Interleaving,
    /// Tensor against pipeline parallelism (Figure 13)
    TensorPipeline,
    /// Pipeline against data parallelism (Figure 14)
    PipelineData,
    /// The best micro-batch (Figure 16)
    MicroBatch,
    /// Activations computed again or kept (Figure 17)
    Recompute,
    /// Activations sent whole or in shares (Figure 18)
    ScatterGather,
}

/// A curve: its name, and throughputs over what the figure varies; none where the devices' memory does not hold the
/// configuration.
#[derive(Debug, Clone)]
pub struct Curve {
    /// Which configurations.
    pub name: String,
    /// The varied number, and 10¹² operations a second and device.
    pub points: Vec<(f64, Option<f64>)>,
}

const GPT3: GptShape = GptShape { layers: 96, hidden: 12288, heads: 96, vocab: 51200, seq: 2048 };

impl Figure {
    /// The name of its files.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }

    /// What is varied.
    pub fn axis(self) -> &'static str {
        match self {
            Self::Interleaving | Self::Recompute | Self::ScatterGather => "batch",
            Self::TensorPipeline => "tensor ranks",
            Self::PipelineData => "pipeline ranks",
            Self::MicroBatch => "micro-batch",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Interleaving => "175 billion parameters on 96 GPUs, (t, p) = (8, 12)",
            Self::TensorPipeline => "161 billion parameters on 64 GPUs, t p = 64",
            Self::PipelineData => "5.9 billion parameters on 64 GPUs, p d = 64",
            Self::MicroBatch => "91 billion parameters on 64 GPUs, (t, p) = (8, 8)",
            Self::Recompute => "145 billion parameters on 128 GPUs, (t, p) = (8, 16)",
            Self::ScatterGather => "175 billion parameters on 96 GPUs, interleaved",
        }
    }

    /// The curves.
    pub fn curves(self) -> Vec<Curve> {
        let division = |tensor, pipeline, data, micro_batch, chunks, batch| Division {
            tensor,
            pipeline,
            data,
            micro_batch,
            chunks,
            batch,
        };
        match self {
            Self::Interleaving => [1, 2]
                .into_iter()
                .map(|v| {
                    curve(
                        format!("{v} chunk{}", if v == 1 { "" } else { "s" }),
                        GPT3,
                        &[12, 24, 36, 48, 60],
                        |b| division(8, 12, 1, 1, v, b),
                        |_| {},
                    )
                })
                .collect(),
            Self::TensorPipeline => [32, 128]
                .into_iter()
                .map(|batch| {
                    let shape = GptShape { layers: 32, hidden: 20480, heads: 128, ..GPT3 };
                    curve(
                        format!("batch {batch}"),
                        shape,
                        &[2, 4, 8, 16, 32],
                        |t| division(t, 64 / t, 1, 1, 1, batch),
                        |_| {},
                    )
                })
                .collect(),
            Self::PipelineData => [32, 128, 512]
                .into_iter()
                .map(|batch| {
                    let shape = GptShape { layers: 32, hidden: 3840, heads: 32, ..GPT3 };
                    curve(
                        format!("batch {batch}"),
                        shape,
                        &[2, 4, 8, 16, 32],
                        |p| division(1, p, 64 / p, 1, 1, batch),
                        |_| {},
                    )
                })
                .collect(),
            Self::MicroBatch => [128, 512]
                .into_iter()
                .map(|batch| {
                    let shape = GptShape { layers: 80, hidden: 9728, heads: 64, ..GPT3 };
                    curve(
                        format!("batch {batch}"),
                        shape,
                        &[1, 2, 4, 8],
                        |b| division(8, 8, 1, b, 1, batch),
                        |_| {},
                    )
                })
                .collect(),
            Self::Recompute => [true, false]
                .into_iter()
                .map(|recompute| {
                    let name = if recompute { "computed again" } else { "kept" };
                    let shape = GptShape { layers: 80, ..GPT3 };
                    curve(
                        name.into(),
                        shape,
                        &[1, 2, 4, 8, 16, 32, 64, 128, 256],
                        |b| division(8, 16, 1, 1, 1, b),
                        |model| {
                            model.recompute = recompute;
                        },
                    )
                })
                .collect(),
            Self::ScatterGather => [true, false]
                .into_iter()
                .map(|shares| {
                    let name = if shares { "in shares" } else { "whole" };
                    curve(
                        name.into(),
                        GPT3,
                        &[12, 24, 36, 48, 60],
                        |b| division(8, 12, 1, 1, 2, b),
                        |model| {
                            model.scatter_gather = shares;
                        },
                    )
                })
                .collect(),
        }
    }

    /// The curves as a picture.
    pub fn plot(self, curves: &[Curve]) -> Plot {
        let mut plot = Plot::lines(self.title(), self.axis(), "TFLOP/s a GPU");
        if !matches!(self, Self::Interleaving | Self::ScatterGather) {
            plot = plot.log_x();
        }
        for curve in curves {
            let points = curve.points.iter().filter_map(|&(x, y)| Some((x, y?)));
            plot = plot.series(&curve.name, points.collect());
        }
        plot
    }
}

/// Throughputs of divisions that differ in one number.
fn curve(
    name: String,
    shape: GptShape,
    over: &[usize],
    division: impl Fn(usize) -> Division,
    change: impl Fn(&mut PerfModel),
) -> Curve {
    let at = |&x: &usize| {
        let division = division(x);
        let gpus = division.tensor * division.pipeline * division.data;
        let mut model = PerfModel::new(Cluster::a100_selene(gpus), shape);
        change(&mut model);
        let fits = model.memory(&division) <= model.cluster.memory_gb * 1e9;
        (x as f64, fits.then(|| model.iteration(&division).tflops))
    };
    Curve { name, points: over.iter().map(at).collect() }
}
