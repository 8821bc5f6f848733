//! `kiln eeg follow`: a recording judged while it is made.

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use kiln_core::{Context, Error, Plot, Result};
use kiln_data::edf::EdfReader;
use kiln_data::write_csv;
use serde::Serialize;
use serde_json::json;

use super::judge::{check_batch, judge, read_one};
use crate::checkpoint::open;
use crate::metrics::by_recording;

/// Between two looks at the file.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(super) struct FollowArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// EDF or BDF file that another program is writing
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    /// Seconds of new signal after which the recording is judged again
    #[arg(long, default_value_t = 10.0)]
    every: f64,
    /// Seconds without a new record after which the recording counts as finished
    #[arg(long, default_value_t = 60.0)]
    patience: f64,
    /// Windows that pass through the network at once
    #[arg(long, default_value_t = 64)]
    batch: usize,
    /// Folder to write: timeline.csv and timeline.svg
    #[arg(long)]
    out: PathBuf,
}

/// What the recording looked like when so much of it was there.
#[derive(Debug, Serialize)]
struct Judgement {
    seconds: f64,
    windows: usize,
    p_pathological: f64,
}

/// Judges all that is there, again and again: normalisation is over the whole recording, so that new signal changes what
/// the network sees of the old.
pub(super) fn follow(args: &FollowArgs, cx: &Context) -> Result<()> {
    check_batch(args.batch)?;
    let patience = Duration::try_from_secs_f64(args.patience).map_err(|_| {
        Error::usage(format!("--patience is {}, but must be a number of seconds", args.patience))
    })?;
    if args.every.is_nan() || args.every < 0.0 {
        return Err(Error::usage(format!("--every is {}, but must be a number of seconds", args.every)));
    }
    let (config, model) = open(&args.model, cx)?;
    let id = args.input.file_stem().map(|name| name.to_string_lossy().to_string()).unwrap_or_default();
    let mut timeline: Vec<Judgement> = Vec::new();
    let (mut seen, mut judged) = (0.0, 0.0);
    let mut grown = Instant::now();
    let mut waiting_for = None;
    loop {
        let reader = match EdfReader::open(&args.input) {
            Ok(reader) => reader,
            // Its header, or the first record, may not be there yet.
            Err(_) if args.input.exists() && grown.elapsed() < patience && !cx.interrupted() => {
                thread::sleep(LOOK);
                continue;
            }
            Err(error) => return Err(error),
        };
        let seconds = reader.seconds();
        let declared = reader.header().declared_records;
        let complete = declared == Some(reader.records() as u64);
        drop(reader);
        if seconds > seen {
            (seen, grown) = (seconds, Instant::now());
        }
        let last = complete || cx.interrupted() || grown.elapsed() >= patience;
        if seconds > judged && (last || seconds - judged >= args.every) {
            judged = seconds;
            match read_one(&config, &args.input, &id) {
                Ok(data) => {
                    let mut short = Vec::new();
                    let windows = judge(&config, &model, &data, &[0], args.batch, &mut short, cx)?;
                    waiting_for = short.pop().map(|skipped| skipped.reason);
                    if let Some(outcome) = by_recording(&windows).pop() {
                        let (windows, p_pathological) = (outcome.windows, outcome.p_pathological);
                        cx.note(format!("{seconds:.0} s: {p_pathological:.3} from {windows} windows"));
                        timeline.push(Judgement { seconds, windows, p_pathological });
                        write(args, &timeline)?;
                    }
                }
                // There may be nothing yet but what the pipeline leaves out.
                Err(error) if !last => waiting_for = Some(error.to_string()),
                Err(error) => return Err(error),
            }
        }
        if last {
            break;
        }
        thread::sleep(LOOK);
    }
    let Some(end) = timeline.last() else {
        let reason = waiting_for.unwrap_or_else(|| "nothing was judged".into());
        return Err(Error::input(args.input.display(), reason)
            .hint("record for longer, or use a smaller --tmin in training"));
    };
    let result = json!({ "recording": id, "timeline": timeline, "out": args.out });
    cx.emit(&result, |_| {
        format!(
            "{id}: {:.3} after {:.0} s and {} windows; the course is in {}\n",
            end.p_pathological,
            end.seconds,
            end.windows,
            args.out.display()
        )
    })
}

fn write(args: &FollowArgs, timeline: &[Judgement]) -> Result<()> {
    fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    write_csv(&args.out.join("timeline.csv"), timeline)?;
    let points: Vec<(f64, f64)> =
        timeline.iter().map(|judgement| (judgement.seconds, judgement.p_pathological)).collect();
    Plot::lines("Probability of pathology", "seconds recorded", "probability")
        .series("all windows so far", points)
        .save(&args.out.join("timeline.svg"))
}
