//! When each rank computed what: simulated on a virtual clock, or measured; and the diagram of the paper's Figures 3 and 4.

use std::collections::BTreeMap;
use std::fmt::Write;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::schedule::{Operation, Pass, Schedule};

/// One operation on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Span {
    /// Rank of the pipeline.
    pub rank: usize,
    /// What it computed.
    pub operation: Operation,
    /// Seconds from the start of the batch.
    pub start: f64,
    /// Seconds from the start of the batch.
    pub end: f64,
}

/// All operations of a batch.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Trace {
    /// In order of rank, then of time.
    pub spans: Vec<Span>,
}

impl Trace {
    /// Runs a schedule on a virtual clock: a stage takes `forward` and `backward`, a chunk `1/v` of that, and
    /// communication takes no time.
    ///
    /// # Errors
    /// When the ranks wait for one another for ever.
    pub fn simulate(schedule: &Schedule, forward: f64, backward: f64) -> Result<Self> {
        let orders: Vec<Vec<Operation>> =
            (0..schedule.pipeline).map(|rank| schedule.operations(rank)).collect();
        let stage = |rank: usize, chunk: usize| chunk * schedule.pipeline + rank;
        // When a pass of a micro-batch through a stage was done.
        let mut done: BTreeMap<(Pass, usize, usize), f64> = BTreeMap::new();
        let mut next = vec![0; orders.len()];
        let mut clock = vec![0.0f64; orders.len()];
        let mut spans = vec![Vec::new(); orders.len()];
        loop {
            let mut moved = false;
            for (rank, order) in orders.iter().enumerate() {
                while let Some(&operation) = order.get(next[rank]) {
                    let at = stage(rank, operation.chunk);
                    let needs = match operation.pass {
                        Pass::Forward if at == 0 => None,
                        Pass::Forward => Some((Pass::Forward, operation.micro, at - 1)),
                        Pass::Backward if at == schedule.last_stage() => {
                            Some((Pass::Forward, operation.micro, at))
                        }
                        Pass::Backward => Some((Pass::Backward, operation.micro, at + 1)),
                    };
                    let ready = match needs.map(|key| done.get(&key)) {
                        None => 0.0,
                        Some(Some(&time)) => time,
                        Some(None) => break,
                    };
                    let whole = if operation.pass == Pass::Forward { forward } else { backward };
                    let start = clock[rank].max(ready);
                    let end = start + whole / schedule.chunks as f64;
                    clock[rank] = end;
                    done.insert((operation.pass, operation.micro, at), end);
                    spans[rank].push(Span { rank, operation, start, end });
                    next[rank] += 1;
                    moved = true;
                }
            }
            if orders.iter().zip(&next).all(|(order, &next)| next == order.len()) {
                return Ok(Self { spans: spans.concat() });
            }
            if !moved {
                return Err(Error::work("the ranks of the schedule wait for one another for ever"));
            }
        }
    }

    /// The ranks in the trace.
    pub fn ranks(&self) -> usize {
        self.spans.iter().map(|span| span.rank + 1).max().unwrap_or(0)
    }

    /// Seconds from the first start to the last end.
    pub fn makespan(&self) -> f64 {
        let start = self.spans.iter().map(|span| span.start).fold(f64::INFINITY, f64::min);
        let end = self.spans.iter().map(|span| span.end).fold(f64::NEG_INFINITY, f64::max);
        (end - start).max(0.0)
    }

    /// Seconds that a rank computed.
    pub fn busy(&self, rank: usize) -> f64 {
        self.spans.iter().filter(|span| span.rank == rank).map(|span| span.end - span.start).sum()
    }

    /// Idle time of all ranks over their own work.
    pub fn bubble(&self) -> f64 {
        let busy: f64 = (0..self.ranks()).map(|rank| self.busy(rank)).sum();
        if busy == 0.0 { 0.0 } else { self.makespan() * self.ranks() as f64 / busy - 1.0 }
    }

    /// The rank and chunk whose operations took longest on average, with these seconds: a straggler.
    pub fn slowest_stage(&self) -> Option<(usize, usize, f64)> {
        let mut sums: BTreeMap<(usize, usize), (f64, usize)> = BTreeMap::new();
        for span in &self.spans {
            let (sum, count) = sums.entry((span.rank, span.operation.chunk)).or_default();
            *sum += span.end - span.start;
            *count += usize::from(span.operation.pass == Pass::Forward);
        }
        let mean =
            sums.into_iter().map(|((rank, chunk), (sum, count))| (rank, chunk, sum / count.max(1) as f64));
        mean.max_by(|a, b| a.2.total_cmp(&b.2))
    }

    /// The diagram as an SVG document: one row a rank, forward passes blue, backward passes green, darker for higher chunks.
    pub fn to_svg(&self, title: &str) -> String {
        const WIDTH: f64 = 1160.0;
        const LEFT: f64 = 66.0;
        const TOP: f64 = 44.0;
        const ROW: f64 = 34.0;
        let ranks = self.ranks();
        let start = self.spans.iter().map(|span| span.start).fold(f64::INFINITY, f64::min);
        let scale = if self.makespan() > 0.0 { (WIDTH - LEFT - 16.0) / self.makespan() } else { 0.0 };
        let chunks = self.spans.iter().map(|span| span.operation.chunk + 1).max().unwrap_or(1);
        let height = TOP + ROW * ranks as f64 + 42.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
             font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"{LEFT}\" y=\"24\" font-size=\"15\">{}</text>\n",
            escape(title)
        );
        for rank in 0..ranks {
            let y = TOP + ROW * rank as f64;
            let _ = writeln!(
                svg,
                "<text x=\"8\" y=\"{:.1}\">rank {rank}</text>\n<rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" \
                 fill=\"#eeeeee\"/>",
                y + ROW / 2.0 + 4.0,
                y + 2.0,
                self.makespan() * scale,
                ROW - 4.0
            );
        }
        for span in &self.spans {
            let (x, width) = (LEFT + (span.start - start) * scale, (span.end - span.start) * scale);
            let y = TOP + ROW * span.rank as f64 + 2.0;
            let _ = writeln!(
                svg,
                "<rect x=\"{x:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{:.1}\" fill=\"{}\" stroke=\"white\" \
                 stroke-width=\"0.6\"><title>{}: {:.6} to {:.6} s</title></rect>",
                ROW - 4.0,
                colour(span.operation, chunks),
                span.operation,
                span.start,
                span.end
            );
            if width >= 13.0 {
                let _ = writeln!(
                    svg,
                    "<text x=\"{:.2}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"11\" fill=\"{}\">{}</text>",
                    x + width / 2.0,
                    y + ROW / 2.0 + 2.0,
                    if dark(span.operation, chunks) { "white" } else { "black" },
                    span.operation.micro + 1
                );
            }
        }
        let _ = writeln!(
            svg,
            "<text x=\"{LEFT}\" y=\"{:.1}\" fill=\"#444444\">numbers are micro-batches; blue forward, green backward{}; bubble {:.1} % \
             of the work, {} in all</text>\n</svg>",
            height - 16.0,
            if chunks > 1 { ", darker the later chunks" } else { "" },
            100.0 * self.bubble(),
            duration(self.makespan())
        );
        svg
    }
}

/// Seconds in a unit that suits them.
fn duration(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.2} ms", 1e3 * seconds) } else { format!("{seconds:.2} s") }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// How far from light to dark a chunk is.
fn shade(chunk: usize, chunks: usize) -> f64 {
    if chunks > 1 { chunk as f64 / (chunks - 1) as f64 } else { 0.4 }
}

fn dark(operation: Operation, chunks: usize) -> bool {
    shade(operation.chunk, chunks) > 0.3
}

fn colour(operation: Operation, chunks: usize) -> String {
    let (light, deep) = match operation.pass {
        Pass::Forward => ([158.0, 202.0, 240.0], [16.0, 78.0, 155.0]),
        Pass::Backward => ([170.0, 222.0, 160.0], [20.0, 110.0, 45.0]),
    };
    let at = shade(operation.chunk, chunks);
    let channel = |i: usize| (light[i] + (deep[i] - light[i]) * at) as u8;
    format!("#{:02x}{:02x}{:02x}", channel(0), channel(1), channel(2))
}
