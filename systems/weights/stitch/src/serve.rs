//! Answers to a stream of requests, each with a budget of its own: one JSON document a line.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::Duration;

use kiln_core::{Context, Error, Result};
use kiln_data::{ImageOptions, Images};
use kiln_nn::likeliest;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::budget::{Budgets, Wanted};
use crate::checkpoint::SnConfig;
use crate::evaluate::{Measure, predict};
use crate::family::AnchorNet;
use crate::snnet::SnNet;

/// A longer line is refused unread.
const LONGEST_LINE: u64 = 1 << 20;
/// How long the next request is waited for before looking whether the user wants to stop.
const PATIENCE: Duration = Duration::from_millis(50);

/// A line of the input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    /// A PNG or JPEG file.
    image: PathBuf,
    /// Millions of FLOPs that the answer may cost.
    budget_mflops: Option<f64>,
    /// Milliseconds that it may take.
    budget_ms: Option<f64>,
    /// The id or name of a network.
    config: Option<Value>,
}

impl Request {
    fn wanted(&self) -> Result<Wanted> {
        match (&self.config, self.budget_mflops, self.budget_ms) {
            (None, None, None) => Ok(Wanted::Best),
            (Some(Value::String(name)), None, None) => Ok(Wanted::Named(name.clone())),
            (Some(Value::Number(id)), None, None) => Ok(Wanted::Named(id.to_string())),
            (None, Some(budget), None) => Ok(Wanted::Within(budget, Measure::MegaFlops)),
            (None, None, Some(budget)) => Ok(Wanted::Within(budget, Measure::Milliseconds)),
            _ => Err(Error::usage("a request has one of budget_mflops, budget_ms and config, or none")),
        }
    }
}

/// What answers requests.
pub struct Server<'a> {
    /// The model's configuration.
    pub config: &'a SnConfig,
    /// The networks, all of which share their weights: which one answers is decided for every request.
    pub net: &'a SnNet<AnchorNet>,
    /// What is known of them.
    pub budgets: &'a Budgets,
    /// Whether to refuse a budget below the cheapest network instead of answering with that.
    pub strict: bool,
}

impl Server<'_> {
    /// Answers every line of `requests` with a line. A request that cannot be answered gets its error as the answer.
    /// Returns how many there were.
    ///
    /// # Errors
    /// When requests cannot be read or answers not be written, or the user stops it.
    pub fn run(&self, requests: impl BufRead + Send + 'static, cx: &Context) -> Result<usize> {
        let lines = read_lines(requests);
        let mut count = 0;
        loop {
            if cx.interrupted() {
                return Err(Error::interrupted(format!("stopped after {count} requests")));
            }
            let line = match lines.recv_timeout(PATIENCE) {
                Ok(line) => line?,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return Ok(count),
            };
            if line.len() as u64 == LONGEST_LINE && !line.ends_with(b"\n") {
                return Err(Error::input(
                    "the requests",
                    format!("line {} is longer than a mebibyte", count + 1),
                ));
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            count += 1;
            let answer = self.answer(&line, cx).unwrap_or_else(
                |error| json!({ "request": count, "error": error.to_string(), "hint": error.hint_text() }),
            );
            cx.print(&format!("{answer}\n"))?;
        }
    }

    fn answer(&self, line: &[u8], cx: &Context) -> Result<Value> {
        let request: Request = serde_json::from_slice(line).map_err(|e| {
            Error::usage(format!("not a request: {e}")).hint("{\"image\": \"a.png\", \"budget_mflops\": 0.5}")
        })?;
        let space = self.net.space();
        let chosen = self.budgets.choose(&request.wanted()?, space)?;
        if chosen.over_budget && self.strict {
            return Err(over_budget());
        }
        let interface = &self.config.interface;
        let images = read_one(&request.image, interface.white)?;
        let images = interface.fit(images, self.config.image(), &request.image)?;
        let forward = |x| self.net.forward_with(chosen.id, x);
        let probabilities = predict(&images, &interface.scaling, cx, forward)?.swap_remove(0);
        let configuration = space.configuration(chosen.id)?;
        Ok(json!({
            "image": request.image,
            "class": interface.classes[likeliest(&probabilities)],
            "config": chosen.id,
            "name": configuration.name(),
            "mflops": space.cost(configuration).flops as f64 / 1e6,
            "over_budget": chosen.over_budget,
            "probabilities": interface.classes.iter().cloned().zip(probabilities.iter().map(|&p| json!(p)))
                .collect::<serde_json::Map<_, _>>(),
        }))
    }
}

/// Reads lines on a thread of their own, one ahead: whoever waits for the next can stop waiting.
fn read_lines(mut requests: impl BufRead + Send + 'static) -> Receiver<Result<Vec<u8>>> {
    let (sender, lines) = sync_channel(0);
    thread::spawn(move || {
        loop {
            let mut line = Vec::new();
            let read = requests.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line);
            let line = match read {
                Ok(0) => return,
                read => read.map(|_| line).map_err(Error::io("read", "the requests")),
            };
            let last = line.is_err();
            if sender.send(line).is_err() || last {
                return; // nobody waits for more
            }
        }
    });
    lines
}

/// The refusal of a budget that no network meets.
pub(crate) fn over_budget() -> Error {
    Error::usage("even the cheapest network costs more than the budget")
        .hint("without --strict the cheapest one answers; `kiln stitch space --model DIR` lists the costs")
}

/// One image file, whose labels nobody knows.
fn read_one(path: &Path, white: f64) -> Result<Images> {
    let name = path.to_string_lossy().to_lowercase();
    if ![".png", ".jpg", ".jpeg"].iter().any(|ending| name.ends_with(ending)) {
        return Err(Error::usage(format!("{} is no PNG or JPEG file", path.display())));
    }
    Images::read(path, &ImageOptions { white: Some(white), unlabelled: true, ..ImageOptions::default() })
}
