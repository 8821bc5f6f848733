//! What actors did when, for people: Chrome's trace format and a picture.

use std::fmt::Write;

use serde::Serialize;
use serde_json::{Value, json};

/// One act.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Worked {
    /// The rank.
    pub rank: usize,
    /// The queue.
    pub queue: usize,
    /// The actor's name.
    pub name: String,
    /// Which piece.
    pub piece: usize,
    /// Begin, from the start of the run on.
    pub begin: f64,
    /// End.
    pub end: f64,
}

/// All acts of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Trace {
    /// In no order.
    pub acts: Vec<Worked>,
    /// What the queues are called.
    pub queues: Vec<String>,
    /// What its times are.
    pub clock: Clock,
}

/// What times are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum Clock {
    /// Microseconds.
    #[default]
    Measured,
    /// Units of the durations that were given.
    Virtual,
}

const WIDTH: f64 = 1000.0;
const LANE: f64 = 22.0;
const LEFT: f64 = 120.0;
const TOP: f64 = 24.0;
/// Fills of pieces, in turn.
const COLOURS: [&str; 6] = ["#7fb2e5", "#9bd29b", "#f2c879", "#d9a3d9", "#e59a8f", "#a8b4c0"];

impl Trace {
    /// What several ranks did at the same time.
    pub fn together<'a>(traces: impl Iterator<Item = &'a Self>) -> Self {
        traces.fold(Self::default(), |mut all, trace| {
            all.acts.extend(trace.acts.iter().cloned());
            if trace.queues.len() > all.queues.len() {
                all.queues.clone_from(&trace.queues);
            }
            Self { clock: trace.clock, ..all }
        })
    }

    /// For `chrome://tracing` and Perfetto: ranks are processes, queues threads.
    pub fn to_chrome(&self) -> Value {
        let acts = self.acts.iter().map(|act| {
            json!({"name": act.name, "ph": "X", "ts": act.begin, "dur": act.end - act.begin, "pid": act.rank,
                   "tid": act.queue, "args": {"piece": act.piece}})
        });
        let names = self.lanes().into_iter().map(|(rank, queue)| {
            json!({"name": "thread_name", "ph": "M", "pid": rank, "tid": queue, "args": {"name": self.queue(queue)}})
        });
        json!({"traceEvents": acts.chain(names).collect::<Vec<_>>()})
    }

    fn queue(&self, queue: usize) -> String {
        self.queues.get(queue).cloned().unwrap_or_else(|| format!("queue {queue}"))
    }

    fn lanes(&self) -> Vec<(usize, usize)> {
        let mut lanes: Vec<(usize, usize)> = self.acts.iter().map(|act| (act.rank, act.queue)).collect();
        lanes.sort_unstable();
        lanes.dedup();
        lanes
    }

    /// One lane a queue and rank, time to the right, a colour a piece.
    pub fn to_svg(&self) -> String {
        let lanes = self.lanes();
        let end = self.acts.iter().map(|act| act.end).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
        let height = TOP + lanes.len() as f64 * LANE + 28.0;
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" width=\"{}\" font-family=\"sans-serif\" \
             font-size=\"10\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
            LEFT + WIDTH + 20.0,
            LEFT + WIDTH + 20.0
        );
        let x = |time: f64| LEFT + time / end * WIDTH;
        for (row, &(rank, queue)) in lanes.iter().enumerate() {
            let y = TOP + row as f64 * LANE;
            let _ = writeln!(
                svg,
                "<text x=\"4\" y=\"{:.1}\">rank {rank} {}</text>\n<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#dde2e6\"/>",
                y + 14.0,
                escaped(&self.queue(queue)),
                LEFT + WIDTH,
                y + LANE,
                y + LANE
            );
        }
        for act in &self.acts {
            let row = lanes.iter().position(|lane| *lane == (act.rank, act.queue)).unwrap_or(0);
            let (left, width) = (x(act.begin), (x(act.end) - x(act.begin)).max(0.5));
            let y = TOP + row as f64 * LANE + 2.0;
            let _ = write!(
                svg,
                "<rect x=\"{left:.2}\" y=\"{y:.1}\" width=\"{width:.2}\" height=\"{:.1}\" fill=\"{}\" stroke=\"white\" \
                 stroke-width=\"0.5\"><title>{} piece {}</title></rect>",
                LANE - 4.0,
                COLOURS[act.piece % COLOURS.len()],
                escaped(&act.name),
                act.piece
            );
            if width > 14.0 {
                let _ = writeln!(
                    svg,
                    "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    left + width / 2.0,
                    y + 13.0,
                    act.piece
                );
            }
        }
        let bottom = TOP + lanes.len() as f64 * LANE + 16.0;
        for tick in 0..=5 {
            let time = end * f64::from(tick) / 5.0;
            let label = match self.clock {
                Clock::Virtual => format!("{time:.1}"),
                Clock::Measured if end >= 10_000.0 => format!("{:.0} ms", time / 1e3),
                Clock::Measured => format!("{time:.0} µs"),
            };
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{bottom:.1}\" text-anchor=\"middle\">{label}</text>",
                x(time)
            );
        }
        svg.push_str("</svg>\n");
        svg
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
