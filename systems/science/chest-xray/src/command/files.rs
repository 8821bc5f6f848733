//! `kiln chest-xray phantom`, `duplicates` and `arrays`

use std::path::PathBuf;

use clap::Args;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::{Picture, write_csv, write_tensors};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::json;

use super::judge::{Ensemble, ModelArgs};
use super::{ImagesArgs, make_folder};
use crate::NOTICE;
use crate::bilinear::resize_plane;
use crate::image::Radiograph;
use crate::phantom::{draw, draw_marker};

/// Rows of a difference hash, which has as many bits in each.
const HASH: usize = 16;

#[derive(Debug, Args)]
pub(super) struct PhantomArgs {
    /// How many
    #[arg(long)]
    n: usize,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Share of tuberculous images, and of normal ones without it, that a hospital's marker gives away [default: no marker]
    #[arg(long)]
    shortcut: Option<f64>,
    /// Rows and columns
    #[arg(long, default_value_t = 128)]
    size: usize,
    /// Share of the images that show tuberculosis
    #[arg(long, default_value_t = 0.5)]
    tb: f64,
}

#[derive(Serialize)]
struct PhantomRow {
    image: String,
    label: &'static str,
    patient: String,
    marker: bool,
    signs: String,
}

pub(super) fn phantom(args: &PhantomArgs, cx: &Context) -> Result<()> {
    if args.n == 0 || args.n > 1_000_000 {
        return Err(Error::usage(format!("--n {} must lie between 1 and 1000000", args.n)));
    }
    if !(32..=1024).contains(&args.size) {
        return Err(Error::usage(format!("--size {} must lie between 32 and 1024", args.size)));
    }
    for (name, share) in [("--shortcut", args.shortcut.unwrap_or(0.5)), ("--tb", args.tb)] {
        if !(0.0..=1.0).contains(&share) {
            return Err(Error::usage(format!("{name} {share} must lie between 0 and 1")));
        }
    }
    for folder in ["images/TB", "images/Normal", "masks"] {
        make_folder(&args.out.join(folder))?;
    }
    let ill = (args.tb * args.n as f64).round() as usize;
    let bar = cx.progress(args.n as u64, "drawing phantoms");
    let one = |number: usize| {
        if cx.interrupted() {
            return Err(Error::interrupted("stopped before all were drawn"));
        }
        // Spread evenly, so that any stretch has both.
        let is_tb = (number + 1) * ill / args.n > number * ill / args.n;
        let mut rng = cx.rng("phantom", number as u64);
        let marker = args
            .shortcut
            .is_some_and(|shortcut| draw_marker(is_tb, shortcut, &mut cx.rng("marker", number as u64)));
        let phantom = draw(is_tb, marker, args.size, &mut rng);
        let label = if is_tb { "TB" } else { "Normal" };
        let name = format!("{label}/ph{number:05}.png");
        let image = Picture::grey(args.size, args.size, phantom.pixels);
        image.write_png(&args.out.join("images").join(&name))?;
        let mask = Picture::grey(args.size, args.size, phantom.lungs.to_plane());
        mask.write_png(&args.out.join(format!("masks/ph{number:05}.png")))?;
        bar.inc(1);
        let signs = phantom.signs.iter().map(|sign| format!("{sign:?}").to_lowercase()).collect::<Vec<_>>();
        let patient = format!("ph{number:05}");
        Ok(PhantomRow { image: name, label, patient, marker, signs: signs.join(" ") })
    };
    let rows = (0..args.n).into_par_iter().map(one).collect::<Result<Vec<_>>>()?;
    write_csv(&args.out.join("labels.csv"), &rows)?;
    cx.emit(&json!({ "out": args.out, "images": args.n, "tb": ill, "note": NOTICE }), |_| {
        format!("{} phantoms, {ill} with tuberculosis, in {}\n", args.n, args.out.display())
    })
}

#[derive(Debug, Args)]
pub(super) struct DuplicatesArgs {
    #[command(flatten)]
    images: ImagesArgs,
    /// Bits of 256 in which the coarse pictures of near copies may differ
    #[arg(long, default_value_t = 6)]
    distance: usize,
    /// Table to write
    #[arg(long, default_value = "duplicates.csv")]
    out: PathBuf,
}

#[derive(Serialize)]
struct DuplicateRow {
    a: String,
    b: String,
    kind: &'static str,
    distance: usize,
    same_label: Option<bool>,
}

pub(super) fn duplicates(args: &DuplicatesArgs, cx: &Context) -> Result<()> {
    let entries = args.images.list()?;
    let bar = cx.progress(entries.len() as u64, "reading images");
    let read = |entry: &crate::dataset::Entry| {
        let image = Radiograph::read(&entry.path)?;
        bar.inc(1);
        Ok((difference_hash(&image), image.hash))
    };
    let hashes = entries.par_iter().map(read).collect::<Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for a in 0..entries.len() {
        for b in a + 1..entries.len() {
            let pairs = hashes[a].0.iter().zip(&hashes[b].0);
            let distance = pairs.filter(|(a, b)| a != b).count();
            let is_copy = hashes[a].1 == hashes[b].1;
            if is_copy || distance <= args.distance {
                rows.push(DuplicateRow {
                    a: entries[a].name.clone(),
                    b: entries[b].name.clone(),
                    kind: if is_copy { "copy" } else { "near copy" },
                    distance,
                    same_label: entries[a].is_tb.zip(entries[b].is_tb).map(|(a, b)| a == b),
                });
            }
        }
    }
    let copies = rows.iter().filter(|row| row.kind == "copy").count();
    write_csv(&args.out, &rows)?;
    let result = json!({ "images": entries.len(), "copies": copies, "near_copies": rows.len() - copies, "pairs": rows });
    cx.emit(&result, |_| {
        let near = rows.len() - copies;
        format!(
            "{} images: {copies} pairs of copies and {near} of near copies in {}\n",
            entries.len(),
            args.out.display()
        )
    })
}

#[derive(Debug, Args)]
pub(super) struct ArraysArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImagesArgs,
    /// .npz or .safetensors file to write
    #[arg(long)]
    out: PathBuf,
}

/// Writes images as a model's network takes them, for what runs its graph: `kiln ptq`, `kiln graph`, other runtimes.
pub(super) fn arrays(args: &ArraysArgs, cx: &Context) -> Result<()> {
    let ensemble = Ensemble::open(&args.model, cx)?;
    if ensemble.members.len() > 1 {
        return Err(Error::usage(format!("there are {} models", ensemble.members.len()))
            .hint("give one, such as fold-1 of several"));
    }
    let entries = args.images.list()?;
    let lungs = ensemble.lungs(&entries, cx)?;
    let views = ensemble.views(&entries, lungs.as_deref(), cx)?;
    let images = views.of(0);
    let planes: Vec<Vec<f32>> = (0..images.len()).map(|index| images.plane(index)).collect();
    let x = images.cxr.to_tensor(planes.iter().map(Vec::as_slice), &cx.device);
    let shape = x.dims();
    let mut file = TensorFile::new();
    file.insert("x", HostTensor::from_tensor(x));
    // Labels as the network counts its classes.
    let labels: Option<Vec<i64>> = entries.iter().map(|entry| entry.is_tb.map(i64::from)).collect();
    if let Some(labels) = &labels {
        file.insert("y", HostTensor::int([labels.len()], labels.clone()));
    }
    write_tensors(&args.out, &file)?;
    let result = json!({ "out": args.out, "x": shape, "labelled": labels.is_some(), "note": NOTICE });
    cx.emit(&result, |_| {
        let labels = if labels.is_some() { " and their labels y" } else { "" };
        format!("{} images x {shape:?}{labels} in {}\n", entries.len(), args.out.display())
    })
}

/// Whether brightness rises to the right at 16 × 16 places of the coarse picture: hardly changed by scaling and compression.
fn difference_hash(image: &Radiograph) -> Vec<bool> {
    let coarse = resize_plane(&image.pixels, [image.height, image.width], [HASH, HASH + 1]);
    coarse.chunks(HASH + 1).flat_map(|row| row.windows(2).map(|pair| pair[1] > pair[0])).collect()
}
