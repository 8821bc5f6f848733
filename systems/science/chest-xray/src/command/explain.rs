//! `kiln chest-xray explain`

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, Plot, Result, write_atomic};
use kiln_data::write_csv;
use serde::Serialize;
use serde_json::json;

use super::judge::{Ensemble, ModelArgs, mean_votes, picture};
use super::{ImagesArgs, escape, make_folder, page, picture_path, shown};
use crate::NOTICE;
use crate::cam::{Faithfulness, Layer, grad_cam, score_cam};
use crate::masks::Mask;
use crate::tsne;

/// Neighbours that count in t-SNE.
const PERPLEXITY: f64 = 30.0;

/// How a decision is explained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Method {
    /// What of the image raises the probability
    ScoreCam,
    /// Where activations raise the logit
    GradCam,
    /// Which images the network finds alike
    Tsne,
}

#[derive(Debug, Args)]
pub(super) struct ExplainArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImagesArgs,
    /// How
    #[arg(long, value_enum, default_value = "score-cam")]
    method: Method,
    /// Activation maps that Score-CAM is made of, those that vary most [default: all]
    #[arg(long)]
    max_maps: Option<usize>,
    /// Whose activations Score-CAM is made of; the middle's are finer, for images of fewer than about 200 pixels
    #[arg(long, value_enum, default_value = "last")]
    layer: Layer,
    /// The class to explain: TB, Normal, or the one that was decided for [default: decided]
    #[arg(long, value_parser = ["tb", "normal", "decided"], default_value = "decided")]
    class: String,
    /// Measure how the probability moves as pixels are deleted and put in, in the order of the map
    #[arg(long)]
    curves: bool,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
}

#[derive(Serialize)]
struct ExplainedRow {
    image: String,
    label: String,
    decided: &'static str,
    p_tb: f64,
    lung_attention: Option<f64>,
    deletion: Option<f64>,
    insertion: Option<f64>,
    #[serde(skip)]
    is_right: Option<bool>,
    #[serde(skip)]
    picture: PathBuf,
}

pub(super) fn run(args: &ExplainArgs, cx: &Context) -> Result<()> {
    if args.max_maps == Some(0) {
        return Err(Error::usage("--max-maps must be at least 1"));
    }
    let ensemble = Ensemble::open(&args.model, cx)?;
    match args.method {
        Method::Tsne => map_of_images(args, &ensemble, cx),
        Method::ScoreCam | Method::GradCam => attention(args, &ensemble, cx),
    }
}

fn attention(args: &ExplainArgs, ensemble: &Ensemble, cx: &Context) -> Result<()> {
    ensemble.require_one_square()?;
    let entries = args.images.list()?;
    let lungs = ensemble.lungs(&entries, cx)?;
    let views = ensemble.views(&entries, lungs.as_deref(), cx)?;
    let probabilities = mean_votes(&ensemble.votes(&views, cx)?);
    let threshold = ensemble.threshold();
    let (config, images) = (&ensemble.members[0].0, views.of(0));
    make_folder(&args.out)?;
    let bar = cx.progress(images.len() as u64, "explaining");
    let (mut rows, mut curves) = (Vec::new(), Vec::new());
    for (index, p_tb) in probabilities.into_iter().enumerate() {
        if cx.interrupted() {
            return Err(Error::interrupted(format!("stopped after {index} images")));
        }
        let is_tb = p_tb >= threshold;
        let class = match args.class.as_str() {
            "tb" => 1,
            "normal" => 0,
            _ => usize::from(is_tb),
        };
        let inputs = ensemble.inputs(&views, index, cx);
        let map = ensemble.map(&inputs, |model, x| match args.method {
            Method::GradCam => grad_cam(model, x, class),
            _ => Ok(score_cam(model, x, class, args.layer, args.max_maps).map),
        })?;
        // A cut image no longer lies where the mask does.
        let mask = lungs.as_ref().filter(|_| !config.crop).map(|lungs| &lungs[index]);
        let path = picture_path(&args.out.join("overlays"), &entries[index].name)?;
        picture(&images.plane(index), config.cxr.size, &map, mask).write_png(&path)?;
        let faithful = args.curves.then(|| {
            let members = ensemble.members.iter().zip(&inputs);
            let each: Vec<_> =
                members.map(|((_, model), x)| Faithfulness::of(model, x, class, &map)).collect();
            Faithfulness::mean(&each)
        });
        let faithful = faithful.flatten();
        let truth = entries[index].is_tb;
        rows.push(ExplainedRow {
            image: entries[index].name.clone(),
            label: truth.map_or(String::new(), |is_tb| name_of(is_tb).into()),
            decided: name_of(is_tb),
            p_tb,
            lung_attention: mask.and_then(|mask: &Mask| map.lung_fraction(mask)),
            deletion: faithful.as_ref().map(|curves| Faithfulness::area(&curves.deletion)),
            insertion: faithful.as_ref().map(|curves| Faithfulness::area(&curves.insertion)),
            is_right: truth.map(|truth| truth == is_tb),
            picture: path.strip_prefix(&args.out).map(Path::to_path_buf).unwrap_or_default(),
        });
        curves.extend(faithful);
        bar.inc(1);
    }
    if let Some(mean) = Faithfulness::mean(&curves) {
        Plot::lines("Deletion and insertion", "share of pixels", "probability of the class")
            .series("deletion", mean.deletion)
            .series("insertion", mean.insertion)
            .save(&args.out.join("curves.svg"))?;
    }
    write_csv(&args.out.join("explain.csv"), &rows)?;
    let groups = groups(&rows);
    write_atomic(
        &args.out.join("explain.html"),
        html(&rows, &groups, args.method, !curves.is_empty()).as_bytes(),
    )?;
    let result = json!({
        "out": args.out, "method": args.method, "images": rows,
        "lung_attention": groups.iter().map(|(name, mean, n)| json!({ "group": name, "mean": mean, "n": n })).collect::<Vec<_>>(),
        "note": NOTICE,
    });
    cx.emit(&result, |_| {
        let lines = groups.iter().map(|(name, mean, n)| {
            format!("{name}: {} of the map in the lungs ({n} images)\n", shown(*mean))
        });
        format!(
            "{}{} pictures, explain.csv and explain.html in {}; {NOTICE}\n",
            lines.collect::<String>(),
            rows.len(),
            args.out.display()
        )
    })
}

fn name_of(is_tb: bool) -> &'static str {
    if is_tb { "TB" } else { "Normal" }
}

/// Mean lung attention of all, of each class, and of right and wrong decisions.
fn groups(rows: &[ExplainedRow]) -> Vec<(&'static str, Option<f64>, usize)> {
    type Belongs = fn(&ExplainedRow) -> bool;
    let groups: [(&str, Belongs); 5] = [
        ("all", |_| true),
        ("TB", |row| row.label == "TB"),
        ("Normal", |row| row.label == "Normal"),
        ("right decisions", |row| row.is_right == Some(true)),
        ("wrong decisions", |row| row.is_right == Some(false)),
    ];
    let mean = |belongs: Belongs| {
        let found: Vec<f64> =
            rows.iter().filter(|row| belongs(row)).filter_map(|row| row.lung_attention).collect();
        ((!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64), found.len())
    };
    let all = groups.map(|(name, belongs)| (name, mean(belongs).0, mean(belongs).1));
    all.into_iter().filter(|(_, mean, _)| mean.is_some()).collect()
}

fn html(
    rows: &[ExplainedRow],
    groups: &[(&str, Option<f64>, usize)],
    method: Method,
    has_curves: bool,
) -> String {
    let mut body = String::new();
    if !groups.is_empty() {
        body += "<h2>Share of the map inside the lungs</h2>\n<table><tbody>\n";
        for (name, mean, n) in groups {
            let _ = writeln!(
                body,
                "<tr><td>{name}</td><td class=\"number\">{}</td><td class=\"number\">{n} images</td></tr>",
                shown(*mean)
            );
        }
        body += "</tbody></table>\n";
    }
    if has_curves {
        body += "<p><img src=\"curves.svg\" alt=\"Deletion and insertion curves\"></p>\n";
    }
    body += "<h2>Images</h2>\n<div class=\"figures\">\n";
    for row in rows {
        let truth = if row.label.is_empty() { String::new() } else { format!(" (is {})", row.label) };
        let inside = row
            .lung_attention
            .map_or(String::new(), |share| format!(", {:.0} % of the map in the lungs", 100.0 * share));
        let _ = writeln!(
            body,
            "<figure><img src=\"{}\" alt=\"map over {}\"><figcaption>{}<br>called {}{truth}, probability of TB {:.3}{inside}</figcaption></figure>",
            escape(&row.picture.display().to_string()),
            escape(&row.image),
            escape(&row.image),
            row.decided,
            row.p_tb
        );
    }
    body += "</div>\n";
    let name = if method == Method::GradCam { "Grad-CAM" } else { "Score-CAM" };
    let lead = format!(
        "{name}: dark to bright is from little to much. A map shows where the network's last activations are that speak for \
         the class; it is as coarse as they are, and no proof of a lesion. The outline is that of the lungs, where they were found."
    );
    page("On what decisions rest", &lead, &body)
}

#[derive(Serialize)]
struct PlaceRow {
    image: String,
    label: String,
    x: f64,
    y: f64,
}

fn map_of_images(args: &ExplainArgs, ensemble: &Ensemble, cx: &Context) -> Result<()> {
    let entries = args.images.list()?;
    if entries.len() < 3 {
        return Err(Error::input(args.images.images.display(), format!("holds {} images", entries.len()))
            .hint("a map needs at least 3"));
    }
    let lungs = ensemble.lungs(&entries, cx)?;
    let views = ensemble.views(&entries, lungs.as_deref(), cx)?;
    let bar = cx.progress(entries.len() as u64, "reading features");
    let mut features = Vec::with_capacity(entries.len());
    for index in 0..entries.len() {
        if cx.interrupted() {
            return Err(Error::interrupted(format!("stopped after the features of {index} images")));
        }
        // Those of all members, one after another.
        let mut of_image: Vec<f32> = Vec::new();
        for ((_, model), x) in ensemble.members.iter().zip(ensemble.inputs(&views, index, cx)) {
            of_image.extend(model.embed(model.activations(x)).into_data().iter::<f32>());
        }
        features.push(of_image);
        bar.inc(1);
    }
    let places = tsne::embed(&features, PERPLEXITY, cx)?;
    make_folder(&args.out)?;
    let mut plot = Plot::points("Images as the network sees them (t-SNE)", "", "");
    for (name, class) in [("TB", Some(true)), ("Normal", Some(false)), ("no label", None)] {
        let points: Vec<(f64, f64)> = entries
            .iter()
            .zip(&places)
            .filter(|(entry, _)| entry.is_tb == class)
            .map(|(_, &[x, y])| (x, y))
            .collect();
        if !points.is_empty() {
            plot = plot.series(name, points);
        }
    }
    plot.save(&args.out.join("tsne.svg"))?;
    let row = |(entry, &[x, y]): (&crate::dataset::Entry, &[f64; 2])| PlaceRow {
        image: entry.name.clone(),
        label: entry.is_tb.map_or(String::new(), |is_tb| name_of(is_tb).into()),
        x,
        y,
    };
    write_csv(&args.out.join("tsne.csv"), entries.iter().zip(&places).map(row))?;
    cx.emit(&json!({ "out": args.out, "images": entries.len(), "note": NOTICE }), |_| {
        format!("{} images in tsne.svg and tsne.csv in {}; {NOTICE}\n", entries.len(), args.out.display())
    })
}
