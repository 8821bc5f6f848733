//! The analytic model of an iteration's time, and the search for the best division of ranks (paper §3 and §5).
//!
//! Every operation takes the longer of its arithmetic and its memory traffic; products of matrices lose some of the peak
//! to short inner dimensions and to a last wave of blocks that does not fill the device. Times of the paper's Table 1 come
//! out within a few percent.

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::layout::divisors;
use crate::schedule::{Kind, Schedule};

/// A cluster of equal devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// Devices in all.
    pub gpus: usize,
    /// Devices of a node, which share the fast links.
    pub gpus_per_node: usize,
    /// Peak of a device, 10¹² operations a second.
    pub peak_tflops: f64,
    /// Memory of a device, 10⁹ bytes.
    pub memory_gb: f64,
    /// Memory bandwidth of a device, 10⁹ bytes a second.
    pub hbm_gbps: f64,
    /// Bandwidth between devices of a node, 10⁹ bytes a second each way.
    pub intra_gbps: f64,
    /// Bandwidth of a device to other nodes, 10⁹ bytes a second.
    pub inter_gbps: f64,
    /// Latency of a message, microseconds.
    pub latency_us: f64,
}

/// Share of the peak that large products reach.
const GEMM_EFFICIENCY: f64 = 0.80;
/// Share of that which the attention core reaches.
const ATTENTION_EFFICIENCY: f64 = 0.55;
/// Share of a link's bandwidth that collectives reach.
const NETWORK_EFFICIENCY: f64 = 0.7;
/// Share of the memory's bandwidth that kernels reach.
const MEMORY_EFFICIENCY: f64 = 0.8;
/// The inner extent at which a product reaches half of its efficiency.
const HALF_EFFICIENCY_EXTENT: f64 = 160.0;
/// Rows and columns of the block that a multiprocessor computes, and how many of these a device has.
const BLOCK: (f64, f64) = (128.0, 256.0);
const MULTIPROCESSORS: f64 = 108.0;
/// Bytes that element-wise operations of a layer move an element: on all ranks alike, and divided over the tensor group.
const REPLICATED_TRAFFIC: f64 = 26.0;
const DIVIDED_TRAFFIC: f64 = 16.0;
/// Bytes that the optimiser moves a parameter.
const OPTIMISER_TRAFFIC: f64 = 34.0;
/// Bytes of an activation or gradient on the wire.
const BYTES: f64 = 2.0;

impl Cluster {
    /// Selene's A100 of 80 GB: eight in a node over NVLink, InfiniBand between nodes.
    pub fn a100_selene(gpus: usize) -> Self {
        Self {
            gpus,
            gpus_per_node: 8,
            peak_tflops: 312.0,
            memory_gb: 80.0,
            hbm_gbps: 2000.0,
            intra_gbps: 300.0,
            inter_gbps: 25.0,
            latency_us: 10.0,
        }
    }

    /// A preset by name, with `gpus` devices.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn preset(name: &str, gpus: usize) -> Result<Self> {
        match name {
            "a100-selene" => Ok(Self::a100_selene(gpus)),
            "h100" => Ok(Self {
                peak_tflops: 989.0,
                hbm_gbps: 3350.0,
                intra_gbps: 450.0,
                inter_gbps: 50.0,
                ..Self::a100_selene(gpus)
            }),
            // Processes on one machine of today: everything is one node.
            "loopback" => Ok(Self {
                gpus,
                gpus_per_node: gpus.max(1),
                peak_tflops: 0.1,
                memory_gb: 8.0,
                hbm_gbps: 20.0,
                intra_gbps: 4.0,
                inter_gbps: 4.0,
                latency_us: 20.0,
            }),
            other => Err(Error::usage(format!("there is no cluster \"{other}\""))
                .hint("presets are a100-selene, h100 and loopback; or give the path of a cluster.toml")),
        }
    }

    /// Makes sure that every number is positive.
    ///
    /// # Errors
    /// Names the first that is not.
    pub fn check(&self) -> Result<()> {
        let counts = [("gpus", self.gpus), ("gpus_per_node", self.gpus_per_node)];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return Err(Error::usage(format!("{name} is 0, but must be at least 1")));
        }
        let positive = [
            ("peak_tflops", self.peak_tflops),
            ("memory_gb", self.memory_gb),
            ("hbm_gbps", self.hbm_gbps),
            ("intra_gbps", self.intra_gbps),
            ("inter_gbps", self.inter_gbps),
        ];
        for (name, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::usage(format!("{name} is {value}, but must be above 0")));
            }
        }
        if !(self.latency_us.is_finite() && self.latency_us >= 0.0) {
            return Err(Error::usage(format!("latency_us is {}, but must be at least 0", self.latency_us)));
        }
        Ok(())
    }
}

/// The extents of a GPT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GptShape {
    /// L
    pub layers: usize,
    /// h
    pub hidden: usize,
    /// a
    pub heads: usize,
    /// V
    pub vocab: usize,
    /// s
    pub seq: usize,
}

impl GptShape {
    /// Published models by name.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn preset(name: &str) -> Result<Self> {
        let shape = |layers, hidden, heads, vocab, seq| Ok(Self { layers, hidden, heads, vocab, seq });
        match name {
            "gpt2-small" => shape(12, 768, 12, 50257, 1024),
            "gpt2-xl" => shape(48, 1600, 25, 50257, 1024),
            "gpt3-6.7b" => shape(32, 4096, 32, 51200, 2048),
            "gpt3-175b" => shape(96, 12288, 96, 51200, 2048),
            "gpt-530b" => shape(105, 20480, 128, 51200, 2048),
            "gpt-1t" => shape(128, 25600, 160, 51200, 2048),
            other => Err(Error::usage(format!("there is no model \"{other}\""))
                .hint("there are gpt2-small, gpt2-xl, gpt3-6.7b, gpt3-175b, gpt-530b and gpt-1t; or give --layers, --hidden, --heads")),
        }
    }

    /// Parameters, `12 L h² (1 + 13/(12 h) + (V + s)/(12 L h))` (paper, Eq. 2).
    pub fn parameters(&self) -> f64 {
        let (l, h) = (self.layers as f64, self.hidden as f64);
        let (v, s) = (self.vocab as f64, self.seq as f64);
        12.0 * l * h * h * (1.0 + 13.0 / (12.0 * h) + (v + s) / (12.0 * l * h))
    }

    /// Operations of an iteration over `batch` sequences: `96 B s L h² (1 + s/(6 h) + V/(16 L h))` with activation
    /// recomputation (paper, Eq. 3), `72 …` without.
    pub fn operations(&self, batch: f64, recompute: bool) -> f64 {
        let (l, h) = (self.layers as f64, self.hidden as f64);
        let (v, s) = (self.vocab as f64, self.seq as f64);
        // Recomputation repeats the layers' forward pass, not that of the logits.
        let passes = if recompute { 96.0 } else { 72.0 };
        let head = if recompute { 16.0 } else { 12.0 };
        passes * batch * s * l * h * h * (1.0 + s / (6.0 * h) + v / (head * l * h))
    }

    /// End-to-end training time in seconds: `8 T P / (n X)` for `tokens` at `rate` operations a second a device (paper, Eq. 4).
    pub fn training_seconds(&self, tokens: f64, gpus: f64, rate: f64) -> f64 {
        8.0 * tokens * self.parameters() / (gpus * rate)
    }
}

/// How a batch is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Division {
    /// t
    pub tensor: usize,
    /// p
    pub pipeline: usize,
    /// d
    pub data: usize,
    /// b
    pub micro_batch: usize,
    /// v
    pub chunks: usize,
    /// B
    pub batch: usize,
}

impl Division {
    /// m: micro-batches of a pipeline in one iteration.
    pub fn micro_batches(&self) -> f64 {
        self.batch as f64 / (self.data * self.micro_batch) as f64
    }

    /// `(p - 1) / (v m)`
    pub fn bubble(&self) -> f64 {
        (self.pipeline - 1) as f64 / (self.chunks as f64 * self.micro_batches())
    }
}

/// Where the time of an iteration goes, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Iteration {
    /// All of it.
    pub seconds: f64,
    /// Computation and tensor-parallel communication of all micro-batches.
    pub work: f64,
    /// Waiting of pipeline ranks for each other.
    pub bubble: f64,
    /// Averaging of gradients over data-parallel ranks.
    pub gradients: f64,
    /// Update of the parameters.
    pub optimiser: f64,
    /// 10¹² useful operations a second and device, by the formula for operations with recomputation.
    pub tflops: f64,
}

/// The time that a model takes on a cluster.
#[derive(Debug, Clone)]
pub struct PerfModel {
    /// The devices.
    pub cluster: Cluster,
    /// The network.
    pub shape: GptShape,
    /// Whether activations are computed again in the backward pass.
    pub recompute: bool,
    /// Whether activations go to the next stage in parts, each from one rank of the tensor group.
    pub scatter_gather: bool,
    /// Whether the optimiser's state is divided over the data-parallel ranks.
    pub distributed_optimiser: bool,
}

impl PerfModel {
    /// With recomputation and the scatter/gather optimisation, as in the paper.
    pub fn new(cluster: Cluster, shape: GptShape) -> Self {
        Self { cluster, shape, recompute: true, scatter_gather: true, distributed_optimiser: false }
    }

    fn peak(&self) -> f64 {
        self.cluster.peak_tflops * 1e12
    }

    fn memory_rate(&self) -> f64 {
        self.cluster.hbm_gbps * 1e9 * MEMORY_EFFICIENCY
    }

    fn latency(&self) -> f64 {
        self.cluster.latency_us * 1e-6
    }

    /// Seconds for the product of `m × k` and `k × n`.
    fn gemm(&self, m: f64, n: f64, k: f64) -> f64 {
        let waves = (m / BLOCK.0).ceil() * (n / BLOCK.1).ceil() / MULTIPROCESSORS;
        let filled = waves / waves.ceil();
        let efficiency = GEMM_EFFICIENCY * filled * k / (k + HALF_EFFICIENCY_EXTENT);
        let arithmetic = 2.0 * m * n * k / (self.peak() * efficiency);
        let traffic = BYTES * (m * k + k * n + m * n) / self.memory_rate();
        arithmetic.max(traffic)
    }

    /// Seconds to add up `elements` over the tensor group, whose ranks may lie in several nodes.
    fn tensor_all_reduce(&self, elements: f64, t: f64) -> f64 {
        if t == 1.0 {
            return 0.0;
        }
        let fast = t <= self.cluster.gpus_per_node as f64;
        let rate = if fast { self.cluster.intra_gbps } else { self.cluster.inter_gbps };
        2.0 * (t - 1.0) / t * BYTES * elements / (rate * 1e9 * NETWORK_EFFICIENCY)
            + self.latency() * (t - 1.0)
    }

    /// Seconds of one layer for one micro-batch, forward and backward.
    fn layer(&self, d: &Division) -> f64 {
        let (t, b) = (d.tensor as f64, d.micro_batch as f64);
        let (h, s, a) = (self.shape.hidden as f64, self.shape.seq as f64, self.shape.heads as f64);
        let m = b * s;
        let products = self.gemm(m, 3.0 * h / t, h)
            + self.gemm(m, h, h / t)
            + self.gemm(m, 4.0 * h / t, h)
            + self.gemm(m, h, 4.0 * h / t);
        let attention = 4.0 * b * s * s * h / t / (self.peak() * GEMM_EFFICIENCY * ATTENTION_EFFICIENCY)
            + 16.0 * b * (a / t) * s * s / (2.0 * self.memory_rate());
        let elements = (REPLICATED_TRAFFIC * m * h + DIVIDED_TRAFFIC * m * h / t) / self.memory_rate();
        let forward = products + attention + elements;
        let backward = 2.0 * (products + attention) + 2.0 * elements;
        // Two all-reduces a pass: forward, backward, and the forward that is computed again.
        let (forwards, reductions) = if self.recompute { (2.0, 6.0) } else { (1.0, 4.0) };
        forwards * forward + backward + reductions * self.tensor_all_reduce(m * h, t)
    }

    /// Seconds to hand one micro-batch's activations to the next stage and its gradients back.
    fn point_to_point(&self, d: &Division) -> f64 {
        if d.pipeline == 1 {
            return 0.0;
        }
        let t = d.tensor as f64;
        let bytes = BYTES * d.micro_batch as f64 * self.shape.seq as f64 * self.shape.hidden as f64;
        let across =
            |bytes: f64| bytes / (self.cluster.inter_gbps * 1e9 * NETWORK_EFFICIENCY) + self.latency();
        if self.scatter_gather {
            let gather = bytes * (t - 1.0) / t / (self.cluster.intra_gbps * 1e9 * NETWORK_EFFICIENCY);
            2.0 * across(bytes / t) + 2.0 * gather
        } else {
            2.0 * across(bytes)
        }
    }

    /// Where the time of an iteration goes.
    pub fn iteration(&self, d: &Division) -> Iteration {
        let (t, p, v) = (d.tensor as f64, d.pipeline as f64, d.chunks as f64);
        let rows = d.micro_batch as f64 * self.shape.seq as f64;
        let vocab = self.shape.vocab as f64 / t;
        let micro = self.layer(d) * self.shape.layers as f64 / p + v * self.point_to_point(d);
        let head =
            3.0 * self.gemm(rows, vocab, self.shape.hidden as f64) + 12.0 * rows * vocab / self.memory_rate();
        let m = d.micro_batches();
        let share = self.shape.parameters() / (t * p);
        let data = d.data as f64;
        let gradients =
            2.0 * (data - 1.0) / data * BYTES * share / (self.cluster.inter_gbps * 1e9 * NETWORK_EFFICIENCY);
        let work = m * (micro + head);
        let bubble = micro * (p - 1.0) / v;
        let optimiser = OPTIMISER_TRAFFIC * share / self.memory_rate();
        let seconds = work + bubble + gradients + optimiser;
        let devices = t * p * data;
        let tflops = self.shape.operations(d.batch as f64, true) / seconds / devices / 1e12;
        Iteration { seconds, work, bubble, gradients, optimiser, tflops }
    }

    /// Bytes that the fullest rank needs in mixed precision: 18 a parameter, of which 12 are the optimiser's, and the
    /// activations of all micro-batches in flight.
    pub fn memory(&self, d: &Division) -> f64 {
        let (t, p) = (d.tensor as f64, d.pipeline as f64);
        let (h, s, a) = (self.shape.hidden as f64, self.shape.seq as f64, self.shape.heads as f64);
        let optimiser = if self.distributed_optimiser { 12.0 / d.data as f64 } else { 12.0 };
        let state = (6.0 + optimiser) * self.shape.parameters() / (t * p);
        let tokens = s * d.micro_batch as f64;
        let whole = tokens * h * (10.0 + 24.0 / t + 5.0 * a * s / (h * t));
        let kept = if self.recompute { 2.0 * tokens * h } else { whole };
        let layers_a_chunk = self.shape.layers as f64 / (p * d.chunks as f64);
        let kind = if d.chunks > 1 { Kind::Interleaved } else { Kind::OneForwardOneBackward };
        let in_flight = Schedule::new(kind, d.pipeline, d.micro_batches().max(1.0) as usize, d.chunks)
            .map_or(d.micro_batches(), |schedule| schedule.peak_in_flight(0) as f64);
        // One layer at a time is whole again while it is computed a second time.
        let at_work = if self.recompute { whole } else { 0.0 };
        state + in_flight * layers_a_chunk * kept + at_work
    }
}

/// A division with what it costs.
#[derive(Debug, Clone, Serialize)]
pub struct Plan {
    /// How ranks and batch are divided.
    #[serde(flatten)]
    pub division: Division,
    /// Where the time goes.
    #[serde(flatten)]
    pub iteration: Iteration,
    /// Idle time over work, `(p - 1) / (v m)`.
    pub bubble_fraction: f64,
    /// 10⁹ bytes a device.
    pub memory_gb: f64,
    /// Share of the devices' peak.
    pub peak_share: f64,
    /// Days for all tokens.
    pub days: f64,
}

/// Every division of the cluster that fits into its memory, the fastest first: tensor-parallel sizes divide heads, hidden
/// size and node; pipelines divide the layers; micro-batches and chunks are tried in powers of two and divisors.
///
/// # Errors
/// When no division is possible, or none fits; says which limit it met.
pub fn plan(model: &PerfModel, batch: usize, tokens: f64) -> Result<Vec<Plan>> {
    const MICRO_BATCHES: [usize; 6] = [1, 2, 4, 8, 16, 32];
    model.cluster.check()?;
    let (cluster, shape) = (&model.cluster, &model.shape);
    let mut plans = Vec::new();
    let mut least_memory = f64::INFINITY;
    for t in divisors(cluster.gpus) {
        if !shape.heads.is_multiple_of(t) || !shape.hidden.is_multiple_of(t) {
            continue;
        }
        for p in divisors(cluster.gpus / t) {
            let data = cluster.gpus / (t * p);
            if !shape.layers.is_multiple_of(p) || !batch.is_multiple_of(data) {
                continue;
            }
            for b in MICRO_BATCHES.into_iter().filter(|b| (batch / data).is_multiple_of(*b)) {
                let m = batch / data / b;
                for v in divisors(shape.layers / p) {
                    if v > 1 && (p == 1 || !m.is_multiple_of(p)) {
                        continue;
                    }
                    let division =
                        Division { tensor: t, pipeline: p, data, micro_batch: b, chunks: v, batch };
                    let memory = model.memory(&division);
                    least_memory = least_memory.min(memory);
                    if memory > cluster.memory_gb * 1e9 {
                        continue;
                    }
                    let iteration = model.iteration(&division);
                    let per_batch = batch as f64 * shape.seq as f64;
                    plans.push(Plan {
                        division,
                        iteration,
                        bubble_fraction: division.bubble(),
                        memory_gb: memory / 1e9,
                        peak_share: iteration.tflops / cluster.peak_tflops,
                        days: tokens / per_batch * iteration.seconds / 86_400.0,
                    });
                }
            }
        }
    }
    if plans.is_empty() {
        let error = if least_memory.is_finite() {
            Error::usage(format!(
                "no division fits: the smallest needs {:.1} GB a device of {} GB",
                least_memory / 1e9,
                cluster.memory_gb
            ))
            .hint("use more devices, --recompute full, or --distributed-optimizer true")
        } else {
            Error::usage(format!(
                "{} devices cannot be divided: tensor sizes must divide {} heads and hidden {}, pipelines {} layers, and \
                 data-parallel sizes the batch of {batch}",
                cluster.gpus, shape.heads, shape.hidden, shape.layers
            ))
            .hint("use a number of devices and a batch with more divisors")
        };
        return Err(error);
    }
    plans.sort_by(|a, b| a.iteration.seconds.total_cmp(&b.iteration.seconds));
    Ok(plans)
}

/// One row of the paper's Table 1.
#[derive(Debug, Clone, Copy)]
pub struct Table1Row {
    /// 10⁹ parameters.
    pub billions: f64,
    /// The network.
    pub shape: GptShape,
    /// The division that the authors used.
    pub division: Division,
    /// Devices.
    pub gpus: usize,
    /// 10¹² operations a second and device that the authors measured.
    pub paper_tflops: f64,
}

/// The paper's Table 1: weak scaling from 1.7 to 1008 billion parameters.
pub fn table1() -> Vec<Table1Row> {
    // 10⁹ parameters, a, h, L, t, p, GPUs, B, b, v, the paper's TFLOP/s
    const ROWS: [(f64, [usize; 9], f64); 10] = [
        (1.7, [24, 2304, 24, 1, 1, 32, 512, 16, 1], 137.0),
        (3.6, [32, 3072, 30, 2, 1, 64, 512, 16, 1], 138.0),
        (7.5, [32, 4096, 36, 4, 1, 128, 512, 16, 1], 142.0),
        (18.4, [48, 6144, 40, 8, 1, 256, 1024, 8, 1], 135.0),
        (39.1, [64, 8192, 48, 8, 2, 512, 1536, 4, 1], 138.0),
        (76.1, [80, 10240, 60, 8, 4, 1024, 1792, 2, 3], 140.0),
        (145.6, [96, 12288, 80, 8, 8, 1536, 2304, 2, 2], 148.0),
        (310.1, [128, 16384, 96, 8, 16, 1920, 2160, 1, 2], 155.0),
        (529.6, [128, 20480, 105, 8, 35, 2520, 2520, 1, 3], 163.0),
        (1008.0, [160, 25600, 128, 8, 64, 3072, 3072, 1, 1], 163.0),
    ];
    let row = |(billions, numbers, paper_tflops): (f64, [usize; 9], f64)| {
        let [heads, hidden, layers, tensor, pipeline, gpus, batch, micro_batch, chunks] = numbers;
        Table1Row {
            billions,
            shape: GptShape { layers, hidden, heads, vocab: 51200, seq: 2048 },
            division: Division {
                tensor,
                pipeline,
                data: gpus / (tensor * pipeline),
                micro_batch,
                chunks,
                batch,
            },
            gpus,
            paper_tflops,
        }
    };
    ROWS.into_iter().map(row).collect()
}
