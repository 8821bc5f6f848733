//! Verbs on recordings: `prepare`, `info`, `convert`, `simulate`.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Result};
use kiln_data::edf::{EdfFormat, EdfHeader, EdfKind, EdfReader, EdfSignal, write_edf};
use kiln_data::{write_csv, write_npz_as};
use rand::RngExt;
use serde::Serialize;
use serde_json::json;

use super::PipelineArgs;
use crate::channels::{Channels, TUAB};
use crate::dataset::{Dataset, check_subjects};
use crate::layout::{self, Layout, drop_contradictory, unique_subjects};
use crate::prepare::{Skipped, prepare_all};
use crate::simulate::{Site, Subject, record};

#[derive(Debug, Args)]
pub(super) struct PrepareArgs {
    /// Folder of recordings
    #[arg(long = "in", value_name = "DIR")]
    input: PathBuf,
    /// How it is laid out
    #[arg(long, value_enum, default_value = "csv")]
    layout: Layout,
    /// Table of labels: path, label, and optionally subject, age, sex, split
    #[arg(long)]
    labels: Option<PathBuf>,
    /// The label that counts as pathological; all others are normal
    #[arg(long, value_name = "LABEL")]
    positive: Option<String>,
    /// Use only the first recording of every subject
    #[arg(long)]
    unique_subjects: bool,
    /// Leave out subjects of whom one recording is normal and another is not
    #[arg(long)]
    drop_common: bool,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn prepare(args: &PrepareArgs, cx: &Context) -> Result<()> {
    let pipeline = args.pipeline.pipeline()?;
    let out = &args.out;
    if Dataset::is_prepared(out) {
        return Err(Error::usage(format!("{} already holds prepared recordings", out.display()))
            .hint("choose another --out, or delete that folder"));
    }
    let (mut found, absent) =
        layout::find(&args.input, args.layout, args.labels.as_deref(), args.positive.as_deref())?;
    if args.drop_common {
        found = drop_contradictory(found);
    }
    if args.unique_subjects {
        found = unique_subjects(found);
    }
    check_subjects(found.iter().map(|f| &f.about), &args.input)?;
    let folder = out.join("recordings");
    fs::create_dir_all(&folder).map_err(Error::io("create", &folder))?;
    let mut kept = Vec::new();
    let result = prepare_all(&found, &pipeline, cx, |about, prepared| {
        let (channels, samples) = (prepared.channels.len(), prepared.samples());
        Dataset::write_recording(out, &about.id, prepared.eeg, channels)?;
        kept.push((about.clone(), samples));
        Ok(())
    });
    let (channels, mut skipped) = result.inspect_err(|_| {
        // Recordings without an index are of no use.
        let _ = fs::remove_dir_all(&folder);
        let _ = fs::remove_dir(out);
    })?;
    skipped.extend(absent.iter().map(Skipped::from));
    if !skipped.is_empty() {
        write_csv(&out.join("skipped.csv"), &skipped)?;
    }
    Dataset::write_index(out, &channels, &pipeline, &kept)?;
    let pathological = kept.iter().filter(|(about, _)| about.label == Some(true)).count();
    let result = json!({
        "out": out,
        "recordings": kept.len(),
        "pathological": pathological,
        "skipped": skipped.len(),
        "channels": channels,
    });
    cx.emit(&result, |_| {
        let mut text = format!(
            "{} recordings in {}, {pathological} of them pathological, {} channels at {} samples a second\n",
            kept.len(),
            out.display(),
            channels.len(),
            pipeline.rate
        );
        if !skipped.is_empty() {
            text += &format!("{} left out: see {}\n", skipped.len(), out.join("skipped.csv").display());
        }
        text
    })
}

#[derive(Debug, Args)]
pub(super) struct InfoArgs {
    /// EDF or BDF file
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
}

/// Running mean and deviation of a signal in its physical unit.
#[derive(Debug, Clone, Serialize)]
struct SignalInfo {
    #[serde(flatten)]
    signal: EdfSignal,
    rate: f64,
    samples: u64,
    mean: Option<f64>,
    std: Option<f64>,
    #[serde(skip)]
    squares: f64,
    /// Why its numbers have no physical value.
    problem: Option<String>,
}

pub(super) fn info(args: &InfoArgs, cx: &Context) -> Result<()> {
    let mut reader = EdfReader::open(&args.input)?;
    let header = reader.header().clone();
    let chosen: Vec<usize> =
        (0..header.signals.len()).filter(|&s| !header.signals[s].is_annotation()).collect();
    let scales: Vec<Result<(f64, f64), String>> = chosen.iter().map(|&s| header.signals[s].scale()).collect();
    let mut signals: Vec<SignalInfo> = chosen
        .iter()
        .zip(&scales)
        .map(|(&s, scale)| SignalInfo {
            signal: header.signals[s].clone(),
            rate: header.rate(s),
            samples: 0,
            mean: scale.as_ref().ok().map(|_| 0.0),
            std: None,
            squares: 0.0,
            problem: scale.as_ref().err().cloned(),
        })
        .collect();
    let bar = cx.progress(reader.records() as u64, "reading");
    for from in (0..reader.records()).step_by(64) {
        let to = reader.records().min(from + 64);
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before the file was read"));
        }
        reader.visit(&chosen, from..to, |place, samples| {
            let (info, Ok((gain, offset))) = (&mut signals[place], &scales[place]) else { return Ok(()) };
            for &digital in samples {
                // Welford's sums lose nothing to a large mean.
                let value = f64::from(digital) * gain + offset;
                info.samples += 1;
                let mean = info.mean.get_or_insert(0.0);
                let before = value - *mean;
                *mean += before / info.samples as f64;
                info.squares += before * (value - *mean);
            }
            Ok(())
        })?;
        bar.inc((to - from) as u64);
    }
    for info in &mut signals {
        info.std =
            info.mean.filter(|_| info.samples > 0).map(|_| (info.squares / info.samples as f64).sqrt());
    }
    let (annotations, stretches) = (reader.annotations()?, reader.stretches()?);
    let result = json!({
        "file": args.input,
        "format": header.format,
        "kind": header.kind,
        "patient": header.patient,
        "recording": header.recording,
        "start": header.start(),
        "records": reader.records(),
        "record_seconds": header.record_seconds,
        "seconds": reader.seconds(),
        "stretches": stretches.len(),
        "signals": signals,
        "annotations": annotations,
        "warnings": reader.warnings(),
    });
    cx.emit(&result, |_| {
        let mut text = format!(
            "{}: {:?}, {} signals, {:.1} s, begun {}\n",
            args.input.display(),
            header.format,
            signals.len(),
            reader.seconds(),
            header.start().unwrap_or_else(|| "at an unknown time".into())
        );
        for warning in reader.warnings() {
            text += &format!("odd: {warning}\n");
        }
        text += "signal            unit      rate      mean         deviation\n";
        for info in &signals {
            let label = &info.signal.label;
            text += &format!("{label:<17} {:<9} {:<9} ", info.signal.unit, (info.rate * 1e3).round() / 1e3);
            text += &match (info.mean, info.std) {
                (Some(mean), Some(std)) => format!("{mean:<12.3} {std:.3}\n"),
                _ => format!("{}\n", info.problem.clone().unwrap_or_default()),
            };
        }
        for annotation in annotations.iter().take(20) {
            text += &format!("{:>9.2} s  {}\n", annotation.onset, annotation.text);
        }
        if annotations.len() > 20 {
            text += &format!("and {} more annotations: see --json\n", annotations.len() - 20);
        }
        text
    })
}

#[derive(Debug, Args)]
pub(super) struct ConvertArgs {
    /// EDF or BDF file
    #[arg(long = "in", value_name = "FILE")]
    input: PathBuf,
    #[command(flatten)]
    pipeline: PipelineArgs,
    /// .npz file to write: eeg [channels, samples] and channels
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn convert(args: &ConvertArgs, cx: &Context) -> Result<()> {
    let pipeline = args.pipeline.pipeline()?;
    let prepared = pipeline.read(&args.input)?;
    let (channels, samples) = (prepared.channels.len(), prepared.samples());
    let width = prepared.channels.iter().map(|name| name.chars().count()).max().unwrap_or(1);
    let letters = |name: &String| {
        let letters: Vec<u32> = name.chars().map(u32::from).collect();
        letters.into_iter().chain(std::iter::repeat(0)).take(width).collect::<Vec<_>>()
    };
    let names: Vec<u8> = prepared.channels.iter().flat_map(letters).flat_map(u32::to_le_bytes).collect();
    let eeg: Vec<u8> = prepared.eeg.iter().flat_map(|x| x.to_le_bytes()).collect();
    let arrays = [
        ("channels", npy(&format!("<U{width}"), &format!("({channels},)"), &names)),
        ("eeg", npy("<f4", &format!("({channels}, {samples})"), &eeg)),
    ];
    write_npz_as(&args.out, arrays, Ok)?;
    let result = json!({
        "out": args.out,
        "channels": prepared.channels,
        "samples": samples,
        "rate": pipeline.rate,
        "warnings": prepared.warnings,
    });
    cx.emit(&result, |_| {
        let mut text =
            prepared.warnings.iter().map(|warning| format!("odd: {warning}\n")).collect::<String>();
        text += &format!("{channels} channels of {samples} samples in {}\n", args.out.display());
        text
    })
}

/// A `.npy` file of version 1: names of channels are text, which no tensor holds.
fn npy(kind: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let mut header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}");
    // Ten bytes before it, and a line's end: the data begin at a multiple of 64.
    let padding = 64 - (header.len() + 11) % 64;
    header += &" ".repeat(padding);
    header.push('\n');
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.bytes());
    bytes.extend(data);
    bytes
}

#[derive(Debug, Args)]
pub(super) struct SimulateArgs {
    /// Which site
    #[arg(long, value_enum)]
    site: Site,
    /// How many recordings, half of them pathological
    #[arg(long, default_value_t = 40)]
    recordings: usize,
    /// Seconds of each
    #[arg(long, default_value_t = 60)]
    seconds: usize,
    /// 21, or names between commas
    #[arg(long, default_value = "21")]
    channels: Channels,
    /// Share of the recordings that are marked to judge by
    #[arg(long, default_value_t = 0.3)]
    eval_fraction: f64,
    /// Folder to write: recordings and labels.csv
    #[arg(long)]
    out: PathBuf,
}

/// A row of the simulated labels.
#[derive(Serialize)]
struct LabelRow {
    path: String,
    label: &'static str,
    subject: String,
    age: u32,
    sex: &'static str,
    split: &'static str,
}

pub(super) fn simulate(args: &SimulateArgs, cx: &Context) -> Result<()> {
    let SimulateArgs { site, recordings, seconds, eval_fraction, out, .. } = args;
    if *recordings == 0 || *seconds == 0 || *recordings > 100_000 || *seconds > 36_000 {
        return Err(Error::usage(format!("{recordings} recordings of {seconds} seconds"))
            .hint("at least one of at least a second, and at most 100000 of ten hours"));
    }
    if !(0.0..=1.0).contains(eval_fraction) {
        return Err(Error::usage(format!("--eval-fraction {eval_fraction} is no share")));
    }
    let labels = out.join("labels.csv");
    if labels.exists() {
        return Err(Error::usage(format!("{} already holds recordings", out.display())));
    }
    fs::create_dir_all(out).map_err(Error::io("create", out))?;
    let names = match &args.channels {
        Channels::Named(names) => names.clone(),
        Channels::Any => TUAB.map(String::from).into(),
    };
    let (letter, rate) = match site {
        Site::A => ("a", 250),
        Site::B => ("b", 200),
    };
    let bar = cx.progress(*recordings as u64, "recording");
    let mut rows = Vec::new();
    for number in 0..*recordings {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before all recordings were written"));
        }
        let mut rng = cx.rng(&format!("simulate {letter}"), number as u64);
        let pathological = number % 2 == 1;
        let subject = Subject::draw(pathological, &mut rng);
        let eeg = record(*site, &subject, &names, seconds * rate, rate as f64, &mut rng);
        let path = format!("{letter}{number:05}.edf");
        write_recording(&out.join(&path), &eeg, &names, *site, rate)?;
        // Every class is divided alike.
        let for_eval = ((number / 2) as f64 * eval_fraction).fract() + eval_fraction >= 1.0 - 1e-9;
        rows.push(LabelRow {
            label: if pathological { "abnormal" } else { "normal" },
            subject: format!("{letter}{number:05}"),
            age: rng.random_range(18..90),
            sex: if rng.random() { "F" } else { "M" },
            split: if for_eval { "eval" } else { "train" },
            path,
        });
        bar.inc(1);
    }
    write_csv(&labels, &rows)?;
    let result = json!({ "out": out, "recordings": recordings, "labels": labels });
    cx.emit(&result, |_| {
        format!("{recordings} recordings of {seconds} s in {}, labels in labels.csv\n", out.display())
    })
}

/// Microvolts as EDF, in steps of a tenth.
fn write_recording(path: &Path, eeg: &[Vec<f64>], names: &[String], site: Site, rate: usize) -> Result<()> {
    const LIMIT: i32 = 1 << 15;
    let label = |name: &String| match site {
        Site::A => format!("EEG {name}-REF"),
        Site::B => name.clone(),
    };
    let signal = |name: &String| EdfSignal {
        label: label(name),
        transducer: "simulated".into(),
        unit: "uV".into(),
        physical_min: -f64::from(LIMIT) / 10.0,
        physical_max: f64::from(LIMIT - 1) / 10.0,
        digital_min: -LIMIT,
        digital_max: LIMIT - 1,
        prefilter: String::new(),
        samples_per_record: rate,
    };
    let header = EdfHeader {
        format: EdfFormat::Edf,
        kind: EdfKind::Plain,
        patient: "X X X X".into(),
        recording: "Startdate X X simulated X".into(),
        start_date: "01.01.00".into(),
        start_time: "00.00.00".into(),
        declared_records: None,
        record_seconds: 1.0,
        signals: names.iter().map(signal).collect(),
    };
    let digital = |x: &f64| ((x * 10.0).round() as i32).clamp(-LIMIT, LIMIT - 1);
    let samples: Vec<Vec<i32>> = eeg.iter().map(|channel| channel.iter().map(digital).collect()).collect();
    write_edf(path, &header, &samples, &[])
}
