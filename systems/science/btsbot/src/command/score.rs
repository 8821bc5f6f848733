//! `kiln btsbot predict` and `kiln btsbot serve`

use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile, write_atomic};
use kiln_data::{write_csv, write_tensors};
use serde::Serialize;
use serde_json::json;

use super::{ArrayArgs, ReadArgs};
use crate::checkpoint::open;
use crate::dataset::{About, Dataset, Rejected};
use crate::filter::Filter;
use crate::packets::{find, ingest, rejected, visit_stamps};
use crate::server::{self, Server};
use crate::train;

/// Alerts whose stamps are in memory at once.
const AT_ONCE: usize = 512;

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    /// Packets (.avro), archives of them (.tar.gz), or folders of both
    #[arg(long, value_name = "PATH", num_args = 1.., required_unless_present = "triplets", conflicts_with = "triplets")]
    packets: Vec<PathBuf>,
    #[command(flatten)]
    arrays: ArrayArgs,
    #[command(flatten)]
    reading: ReadArgs,
    #[command(flatten)]
    filter: Filter,
    /// Also write what the last layer sees of every scored alert, for searches by similarity: .csv or .npz
    #[arg(long, value_name = "FILE")]
    embeddings: Option<PathBuf>,
    /// Table to write
    #[arg(long, default_value = "scores.csv")]
    out: PathBuf,
}

/// A row of the scores.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ScoreRow {
    #[serde(rename = "objectId")]
    pub object_id: String,
    pub candid: String,
    pub jd: Option<f64>,
    pub label: Option<u8>,
    pub magpsf: Option<f64>,
    pub score: Option<f64>,
    pub status: &'static str,
    pub reason: String,
}

impl ScoreRow {
    pub(super) fn scored(about: &About, score: f64) -> Self {
        Self {
            object_id: about.object_id.clone(),
            candid: about.candid.clone(),
            jd: Some(about.jd),
            label: about.label.map(u8::from),
            magpsf: Some(about.magpsf),
            score: Some(score),
            status: "scored",
            reason: String::new(),
        }
    }

    pub(super) fn rejected(rejected: &Rejected) -> Self {
        Self {
            object_id: rejected.object_id.clone(),
            candid: rejected.candid.clone(),
            jd: None,
            label: None,
            magpsf: None,
            score: None,
            status: "rejected",
            reason: format!("{}: {}", rejected.file, rejected.reason),
        }
    }
}

pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let (config, model) = open(&args.model, cx)?;
    let side = config.network.side;
    let mut embeddings: Vec<Vec<f32>> = Vec::new();
    let mut score = |data: &Dataset| -> Result<Vec<ScoreRow>> {
        let all: Vec<usize> = (0..data.len()).collect();
        if args.embeddings.is_some() {
            embeddings.extend(train::embed(&model, data, &all, cx));
        }
        let scores = train::predict(&model, data, &all, config.temperature, cx)?;
        Ok(data.about.iter().zip(scores).map(|(about, score)| ScoreRow::scored(about, score)).collect())
    };
    let mut rows = Vec::new();
    let mut lost;
    if let (Some(triplets), Some(candidates)) = (&args.arrays.triplets, &args.arrays.candidates) {
        let (data, rejected) = Dataset::read(triplets, candidates, side)?;
        rows.extend(score(&data)?);
        lost = rejected;
    } else {
        let paths = find(&args.packets)?;
        let reader = args.reading.reader()?;
        let ingested = ingest(&paths, &reader, args.reading.options(config.features), &args.filter, cx)?;
        lost = ingested.rejected;
        let mut waiting = Dataset::empty(side);
        visit_stamps(&paths, &reader, &ingested.ready, cx, |ready, triplet| {
            let alert = &ready.alert;
            match triplet {
                Ok(triplet) => {
                    let about = About {
                        object_id: alert.object_id.clone(),
                        candid: alert.candid.to_string(),
                        jd: alert.jd,
                        magpsf: alert.magpsf,
                        label: None,
                    };
                    waiting.push(&triplet, ready.features, about);
                }
                Err(reason) => {
                    let (object, candid) = (Some(alert.object_id.clone()), Some(alert.candid));
                    lost.push(rejected(ready.origin.file.clone(), object, candid, reason));
                }
            }
            if waiting.len() == AT_ONCE {
                rows.extend(score(&waiting)?);
                waiting = Dataset::empty(side);
            }
            Ok(())
        })?;
        rows.extend(score(&waiting)?);
    }
    let count = rows.len();
    if count == 0 {
        let reason =
            lost.first().map_or("there are none".into(), |one| format!("{}: {}", one.file, one.reason));
        return Err(Error::work(format!("no alert can be scored; the first: {reason}")));
    }
    if let Some(path) = &args.embeddings {
        write_embeddings(path, &rows, &embeddings)?;
    }
    rows.extend(lost.iter().map(ScoreRow::rejected));
    write_csv(&args.out, &rows)?;
    let result = json!({ "out": args.out, "scored": count, "rejected": lost, "scores": rows[..count] });
    cx.emit(&result, |_| {
        let mut text = format!("{:<20} {:<20} {:<15} {:<7} score\n", "objectId", "candid", "jd", "magpsf");
        for row in rows[..count].iter().take(40) {
            let (jd, magpsf) = (row.jd.unwrap_or_default(), row.magpsf.unwrap_or_default());
            let score = row.score.unwrap_or_default();
            text +=
                &format!("{:<20} {:<20} {jd:<15.5} {magpsf:<7.2} {score:.3}\n", row.object_id, row.candid);
        }
        if count > 40 {
            text += &format!("and {} more\n", count - 40);
        }
        for one in lost.iter().take(20) {
            text += &format!("rejected: {} {}: {}\n", one.file, one.object_id, one.reason);
        }
        text + &format!("{count} scored and {} rejected alerts in {}\n", lost.len(), args.out.display())
    })
}

/// One row of numbers for every scored alert: as `.npz` the array `embeddings`, as `.csv` with objectId and candid.
fn write_embeddings(path: &Path, rows: &[ScoreRow], embeddings: &[Vec<f32>]) -> Result<()> {
    let width = embeddings.first().map_or(0, Vec::len);
    if path.extension().is_some_and(|ending| ending == "npz") {
        let mut file = TensorFile::new();
        file.insert("embeddings", HostTensor::float([embeddings.len(), width], embeddings.concat()));
        return write_tensors(path, &file);
    }
    let names = ["objectId".to_string(), "candid".to_string()].into_iter();
    let mut text = names.chain((0..width).map(|at| format!("e{at}"))).collect::<Vec<_>>().join(",") + "\n";
    for (row, numbers) in rows.iter().zip(embeddings) {
        text += &format!("{},{}", row.object_id, row.candid);
        numbers.iter().for_each(|x| text += &format!(",{x}"));
        text += "\n";
    }
    write_atomic(path, text.as_bytes())
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Model folder
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    reading: ReadArgs,
    /// Address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    host: String,
    /// Port; 0 takes any that is free
    #[arg(long, default_value_t = 8080)]
    port: u16,
}

pub(super) fn serve(args: &ServeArgs, cx: &Context) -> Result<()> {
    let (config, model) = open(&args.model, cx)?;
    let server = Server {
        features: args.reading.options(config.features),
        reader: args.reading.reader()?,
        config,
        model,
        cx: cx.clone(),
    };
    server::serve(server, kiln_http::listen(&args.host, args.port)?, cx)
}
