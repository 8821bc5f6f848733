//! `kiln chest-xray predict`, `eval` and `calibrate`

use std::fmt::Write;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Tensor;
use clap::Args;
use kiln_core::{Context, Error, ModelFolder, Plot, Result, TensorFile, write_atomic};
use kiln_data::write_csv;
use serde::Serialize;
use serde_json::{Value, json};

use super::lungs::lung_warning;
use super::{ImagesArgs, escape, make_folder, page, picture_path, shown, write_json};
use crate::NOTICE;
use crate::cam::{Layer, Map, score_cam};
use crate::checkpoint::{
    ClassifyConfig, Config, KIND, SegmentConfig, model_folders, open_classifier, open_segmenter,
};
use crate::dataset::{Entry, Images, class_of};
use crate::image::{Cxr, Radiograph, segmented};
use crate::masks::Mask;
use crate::metrics::{
    DECISION, Metrics, OperatingPoint, Reliability, Scored, TRIAGE_SENSITIVITY, intervals, operating_point,
    platt, reliability, roc,
};
use crate::networks::{Classifier, UNet};
use crate::overlay::overlay;
use crate::train::{find_lungs, judge};

/// Activation maps that pictures of the worklist are made of.
const WORKLIST_MAPS: usize = 64;

/// Models that vote, and the one that finds lungs for them.
#[derive(Debug, Clone, Args)]
pub(super) struct ModelArgs {
    /// Models that `train` wrote; several, and the folds of one, vote with their mean probability
    #[arg(long, num_args = 1.., required = true)]
    pub model: Vec<PathBuf>,
    /// Model that finds lungs, for models that see lungs alone and for warnings
    #[arg(long, value_name = "MODEL")]
    pub seg: Option<PathBuf>,
}

/// Networks and what they need.
pub(super) struct Ensemble {
    pub members: Vec<(ClassifyConfig, Classifier)>,
    /// The members' folders.
    names: Vec<String>,
    segmenter: Option<(SegmentConfig, UNet)>,
}

impl Ensemble {
    pub(super) fn open(args: &ModelArgs, cx: &Context) -> Result<Self> {
        let (mut members, mut names) = (Vec::new(), Vec::new());
        for path in &args.model {
            for folder in model_folders(path)? {
                let (config, model) = open_classifier(&folder, cx)?;
                if config.segmented && args.seg.is_none() {
                    return Err(Error::usage(format!("{} was trained on lungs alone", folder.display()))
                        .hint("give the model that finds them with --seg"));
                }
                members.push((config, model));
                names.push(folder.display().to_string());
            }
        }
        let segmenter = args.seg.as_deref().map(|path| open_segmenter(path, cx)).transpose()?;
        Ok(Self { members, names, segmenter })
    }

    /// Mean of the members' thresholds.
    pub(super) fn threshold(&self) -> f64 {
        self.members.iter().map(|(config, _)| config.threshold).sum::<f64>() / self.members.len() as f64
    }

    /// The lungs of images, where there is a model that finds them.
    pub(super) fn lungs(&self, entries: &[Entry], cx: &Context) -> Result<Option<Vec<Mask>>> {
        let Some((config, model)) = &self.segmenter else { return Ok(None) };
        let images = Images::read(entries.to_vec(), config.cxr, cx)?;
        let all: Vec<usize> = (0..images.len()).collect();
        find_lungs(model, &images, &all, cx).map(Some)
    }

    /// Images as the members see them.
    pub(super) fn views(&self, entries: &[Entry], lungs: Option<&[Mask]>, cx: &Context) -> Result<Views> {
        let mut views = Views { distinct: Vec::new(), of_member: Vec::new() };
        let mut seen: Vec<(Cxr, bool, bool)> = Vec::new();
        for (config, _) in &self.members {
            let sight = (config.cxr, config.segmented, config.crop);
            let known = seen.iter().position(|other| *other == sight);
            views.of_member.push(known.unwrap_or(seen.len()));
            if known.is_none() {
                let mut images = Images::read(entries.to_vec(), config.cxr, cx)?;
                if let Some(lungs) = lungs.filter(|_| config.segmented) {
                    cover(&mut images, lungs, config.crop);
                }
                seen.push(sight);
                views.distinct.push(images);
            }
        }
        Ok(views)
    }

    /// Probabilities of tuberculosis, by member and image.
    pub(super) fn votes(&self, views: &Views, cx: &Context) -> Result<Vec<Vec<f64>>> {
        let vote = |(member, (config, model)): (usize, &(ClassifyConfig, Classifier))| {
            let images = views.of(member);
            let all: Vec<usize> = (0..images.len()).collect();
            let margins = judge(model, images, &all, cx)?;
            Ok(margins.into_iter().map(|margin| config.probability(margin)).collect())
        };
        self.members.iter().enumerate().map(vote).collect()
    }

    /// An image as every member's network takes it, `[1, 3, size, size]`.
    pub(super) fn inputs(&self, views: &Views, index: usize, cx: &Context) -> Vec<Tensor<4>> {
        let input = |(member, (config, _)): (usize, &(ClassifyConfig, Classifier))| {
            config.cxr.to_tensor([&views.of(member).plane(index)[..]], &cx.device)
        };
        self.members.iter().enumerate().map(input).collect()
    }

    /// The mean of the members' maps of an image, over the square that the first sees.
    pub(super) fn map(
        &self,
        inputs: &[Tensor<4>],
        cam: impl Fn(&Classifier, Tensor<4>) -> Result<Map>,
    ) -> Result<Map> {
        let maps = self.members.iter().zip(inputs).map(|((_, model), x)| cam(model, x.clone()));
        Ok(Map::mean(maps.collect::<Result<_>>()?, [self.members[0].0.cxr.size; 2]))
    }

    /// Makes sure that maps of all members lie over each other.
    pub(super) fn require_one_square(&self) -> Result<()> {
        let square = |config: &ClassifyConfig| (config.cxr.fit, config.crop);
        let first = square(&self.members[0].0);
        match self.members.iter().all(|(config, _)| square(config) == first) {
            true => Ok(()),
            false => Err(Error::usage("the models see images in different squares (--fit, --crop)")
                .hint("maps of such models do not lie over each other; give one model at a time")),
        }
    }
}

/// Images as members of an [`Ensemble`] see them; those that see the same share it.
pub(super) struct Views {
    distinct: Vec<Images>,
    /// Which of them each member sees.
    of_member: Vec<usize>,
}

impl Views {
    /// What a member sees.
    pub(super) fn of(&self, member: usize) -> &Images {
        &self.distinct[self.of_member[member]]
    }
}

/// The mean over members, for every image.
pub(super) fn mean_votes(votes: &[Vec<f64>]) -> Vec<f64> {
    let count = votes.first().map_or(0, Vec::len);
    (0..count).map(|index| votes.iter().map(|vote| vote[index]).sum::<f64>() / votes.len() as f64).collect()
}

/// Blacks out what is no lung.
fn cover(images: &mut Images, lungs: &[Mask], crop: bool) {
    let size = images.cxr.size;
    for (index, lungs) in lungs.iter().enumerate() {
        let plane = segmented(&images.plane(index), &lungs.resized([size, size]), crop);
        images.set_plane(index, &plane);
    }
}

/// Blacks out what a model does not take for lung.
pub(super) fn apply_lungs(images: &mut Images, seg: Option<&Path>, crop: bool, cx: &Context) -> Result<()> {
    let Some(seg) = seg else { return Ok(()) };
    let (config, model) = open_segmenter(seg, cx)?;
    let all: Vec<usize> = (0..images.len()).collect();
    let for_lungs = Images::read(images.entries.clone(), config.cxr, cx)?;
    let lungs = find_lungs(&model, &for_lungs, &all, cx)?;
    for (mask, entry) in lungs.iter().zip(&images.entries) {
        if let Some(warning) = lung_warning(mask) {
            cx.note(format!("{}: {warning}", entry.name));
        }
    }
    cover(images, &lungs, crop);
    Ok(())
}

#[derive(Debug, Args)]
pub(super) struct PredictArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    images: ImagesArgs,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Draw in the worklist on what each decision rests
    #[arg(long)]
    overlays: bool,
}

#[derive(Clone, Serialize)]
struct PredictionRow {
    image: String,
    p_tb: Option<f64>,
    label: &'static str,
    lung_fraction: Option<f64>,
    warnings: String,
}

pub(super) fn predict(args: &PredictArgs, cx: &Context) -> Result<()> {
    let ensemble = Ensemble::open(&args.model, cx)?;
    if args.overlays {
        ensemble.require_one_square()?;
    }
    // What cannot be read gets a row that says so, and the others go on.
    let (mut entries, mut unreadable) = (Vec::new(), Vec::new());
    for entry in args.images.list()? {
        match Radiograph::read(&entry.path) {
            Ok(_) => entries.push(entry),
            Err(error) => unreadable.push((entry, error.to_string())),
        }
    }
    if entries.is_empty() {
        let why = unreadable.first().map(|(_, why)| why.clone()).unwrap_or_default();
        return Err(Error::input(
            args.images.images.display(),
            format!("none of the images can be read ({why})"),
        ));
    }
    let lungs = ensemble.lungs(&entries, cx)?;
    let views = ensemble.views(&entries, lungs.as_deref(), cx)?;
    let probabilities = mean_votes(&ensemble.votes(&views, cx)?);
    let threshold = ensemble.threshold();
    let (config, images) = (&ensemble.members[0].0, views.of(0));
    make_folder(&args.out)?;
    let mut rows = Vec::new();
    let bar = cx.progress(entries.len() as u64, "writing");
    for (index, &p) in probabilities.iter().enumerate() {
        let mut warnings = images.warnings[index].clone();
        let mask = lungs.as_ref().map(|lungs| &lungs[index]);
        let no_lungs = mask.and_then(lung_warning);
        // Without lungs there is nothing to judge.
        let label = match (&no_lungs, p >= threshold) {
            (Some(_), _) => "flagged",
            (None, true) => "TB",
            (None, false) => "Normal",
        };
        warnings.extend(no_lungs);
        if args.overlays {
            let map = ensemble.map(&ensemble.inputs(&views, index, cx), |model, x| {
                Ok(score_cam(model, x, 1, Layer::Last, Some(WORKLIST_MAPS)).map)
            })?;
            picture(&images.plane(index), config.cxr.size, &map, mask.filter(|_| !config.crop))
                .write_png(&picture_path(&args.out.join("overlays"), &entries[index].name)?)?;
        }
        let lung_fraction = mask.map(Mask::fraction);
        let warnings = warnings.join("; ");
        rows.push(PredictionRow {
            image: entries[index].name.clone(),
            p_tb: Some(p),
            label,
            lung_fraction,
            warnings,
        });
        bar.inc(1);
    }
    rows.extend(unreadable.into_iter().map(|(entry, why)| PredictionRow {
        image: entry.name,
        p_tb: None,
        label: "unreadable",
        lung_fraction: None,
        warnings: why,
    }));
    write_csv(&args.out.join("predictions.csv"), &rows)?;
    let page = worklist(&rows, threshold, ensemble.members.len(), args.overlays, &args.out);
    write_atomic(&args.out.join("worklist.html"), page.as_bytes())?;
    let count = |label: &str| rows.iter().filter(|row| row.label == label).count();
    let result = json!({ "out": args.out, "threshold": threshold, "predictions": rows, "note": NOTICE });
    cx.emit(&result, |_| {
        format!(
            "{} images: {} TB, {} Normal, {} flagged, {} unreadable; predictions.csv and worklist.html in {}; {NOTICE}\n",
            rows.len(),
            count("TB"),
            count("Normal"),
            count("flagged"),
            count("unreadable"),
            args.out.display()
        )
    })
}

/// A radiograph with a map, and the lungs' outline where it fits.
pub(super) fn picture(plane: &[f32], size: usize, map: &Map, lungs: Option<&Mask>) -> kiln_data::Picture {
    overlay(plane, size, Some(map), lungs)
}

/// The images with the highest risk first; what could not be judged before them all.
fn worklist(rows: &[PredictionRow], threshold: f64, networks: usize, overlays: bool, out: &Path) -> String {
    let mut sorted: Vec<&PredictionRow> = rows.iter().collect();
    let rank = |row: &PredictionRow| match row.label {
        "unreadable" | "flagged" => f64::INFINITY,
        _ => row.p_tb.unwrap_or(f64::INFINITY),
    };
    sorted.sort_by(|a, b| rank(b).total_cmp(&rank(a)));
    let mut body = String::from("<table>\n<thead><tr>");
    if overlays {
        body += "<th>Score-CAM</th>";
    }
    body += "<th>Image</th><th>Called</th><th>Probability of TB</th><th></th><th>Warnings</th></tr></thead>\n<tbody>\n";
    for row in sorted {
        body += "<tr>";
        if overlays {
            let below = Path::new("overlays").join(Path::new(&row.image).with_extension("png"));
            let shown = out.join(&below).is_file();
            let source = escape(&below.display().to_string());
            let _ = match shown {
                true => write!(
                    body,
                    "<td><img src=\"{source}\" alt=\"Score-CAM of {}\"></td>",
                    escape(&row.image)
                ),
                false => write!(body, "<td></td>"),
            };
        }
        let percent = row.p_tb.unwrap_or(0.0) * 100.0;
        let _ = writeln!(
            body,
            "<td>{}</td><td>{}</td><td class=\"number\">{}</td>\
             <td><div class=\"bar\"><i style=\"width:{percent:.0}%\"></i></div></td><td class=\"warn\">{}</td></tr>",
            escape(&row.image),
            row.label,
            shown(row.p_tb),
            escape(&row.warnings)
        );
    }
    body += "</tbody>\n</table>\n";
    let lead = format!(
        "{} images, judged by {networks} network{}, highest risk first; called TB from a probability of {threshold:.3}. \
         What could not be judged stands at the top.",
        rows.len(),
        if networks == 1 { "" } else { "s" }
    );
    page("Tuberculosis worklist", &lead, &body)
}

#[derive(Debug, Args)]
pub(super) struct EvalArgs {
    /// Models that `train` wrote
    #[arg(long, num_args = 1.., required_unless_present = "scores")]
    model: Vec<PathBuf>,
    /// Model that finds lungs
    #[arg(long, value_name = "MODEL")]
    seg: Option<PathBuf>,
    /// Folder of labelled radiographs
    #[arg(long, required_unless_present = "scores")]
    images: Option<PathBuf>,
    /// Table of labels: image, label
    #[arg(long)]
    labels: Option<PathBuf>,
    /// Table of probabilities instead of a model: image, label, p_tb
    #[arg(long, conflicts_with_all = ["model", "images"])]
    scores: Option<PathBuf>,
    /// Probability from which an image is called tuberculosis [default: the model's, or 0.5]
    #[arg(long)]
    threshold: Option<f64>,
    /// JSON file to write; the plots lie beside it
    #[arg(long, default_value = "metrics.json")]
    out: PathBuf,
}

/// What `eval` finds.
#[derive(Serialize)]
struct Judgement {
    threshold: f64,
    #[serde(flatten)]
    metrics: Metrics,
    intervals_95: crate::metrics::Intervals,
    triage: Option<OperatingPoint>,
    reliability: Reliability,
    note: &'static str,
}

pub(super) fn eval(args: &EvalArgs, cx: &Context) -> Result<()> {
    let (scores, each, threshold) = match (&args.scores, &args.images) {
        (Some(table), _) => (read_scores(table)?, Vec::new(), args.threshold.unwrap_or(DECISION)),
        (None, Some(images)) => {
            let model = ModelArgs { model: args.model.clone(), seg: args.seg.clone() };
            let ensemble = Ensemble::open(&model, cx)?;
            let images =
                ImagesArgs { images: images.clone(), labels: args.labels.clone(), patient_regex: None };
            let (scores, each) = score(&ensemble, &images, cx)?;
            (scores, each, args.threshold.unwrap_or(ensemble.threshold()))
        }
        (None, None) => {
            return Err(Error::usage("there is nothing to judge").hint("give --images or --scores"));
        }
    };
    if !(0.0..=1.0).contains(&threshold) {
        return Err(Error::usage(format!("--threshold {threshold} must lie between 0 and 1")));
    }
    let judgement = Judgement {
        threshold,
        metrics: Metrics::of(&scores, threshold),
        intervals_95: intervals(&scores, threshold, &mut cx.rng("bootstrap", 0)),
        triage: operating_point(&scores, TRIAGE_SENSITIVITY),
        reliability: reliability(&scores),
        note: NOTICE,
    };
    write_json(&args.out, &judgement)?;
    let mut curves = Plot::lines("ROC", "1 - specificity", "sensitivity");
    if each.len() > 1 {
        curves = each.iter().fold(curves, |curves, (name, scores)| curves.series(name.clone(), roc(scores)));
    }
    let whole = if each.len() > 1 { "all together" } else { "network" };
    curves
        .series(whole, roc(&scores))
        .series("chance", vec![(0.0, 0.0), (1.0, 1.0)])
        .save(&args.out.with_extension("roc.svg"))?;
    Plot::lines("Reliability", "probability of tuberculosis", "share of tuberculosis")
        .series("network", judgement.reliability.bins.clone())
        .series("as it should be", vec![(0.0, 0.0), (1.0, 1.0)])
        .save(&args.out.with_extension("reliability.svg"))?;
    cx.emit(&judgement, |judgement| {
        let triage = judgement.triage.map_or_else(String::new, |point| {
            format!(
                "sensitivity {:.3} is reached from {:.3} on, with specificity {:.3}: {} the WHO's triage profile\n",
                point.sensitivity,
                point.threshold,
                point.specificity,
                if point.meets_triage_profile { "within" } else { "short of" }
            )
        });
        format!("{}{triage}{NOTICE}\n", describe(&judgement.metrics))
    })
}

/// What several models say of the same images, by the models' folders.
type ByModel = Vec<(String, Vec<Scored>)>;

/// Probabilities of labelled images: of all members together, and of each by its name.
fn score(ensemble: &Ensemble, args: &ImagesArgs, cx: &Context) -> Result<(Vec<Scored>, ByModel)> {
    let entries = args.list()?;
    if let Some(entry) = entries.iter().find(|entry| entry.is_tb.is_none()) {
        return Err(Error::input(args.images.display(), format!("{} has no label", entry.name))
            .hint("expected the folders TB and Normal, or a table with --labels"));
    }
    let lungs = ensemble.lungs(&entries, cx)?;
    let votes = ensemble.votes(&ensemble.views(&entries, lungs.as_deref(), cx)?, cx)?;
    let scored = |probabilities: &[f64]| -> Vec<Scored> {
        let scored = entries.iter().zip(probabilities);
        scored
            .map(|(entry, &p_tb)| Scored {
                image: entry.name.clone(),
                is_tb: entry.is_tb == Some(true),
                p_tb,
            })
            .collect()
    };
    let each = ensemble.names.iter().zip(&votes).map(|(name, votes)| (name.clone(), scored(votes))).collect();
    Ok((scored(&mean_votes(&votes)), each))
}

fn read_scores(path: &Path) -> Result<Vec<Scored>> {
    let unreadable = |e: csv::Error| Error::input(path.display(), "cannot be read as CSV").caused_by(e);
    let mut reader = csv::Reader::from_path(path).map_err(unreadable)?;
    let heads = reader.headers().map_err(unreadable)?.clone();
    let column = |name: &str| heads.iter().position(|head| head.trim() == name);
    let (Some(image), Some(label), Some(p_tb)) = (column("image"), column("label"), column("p_tb")) else {
        let found = format!("has the columns {}", heads.iter().collect::<Vec<_>>().join(", "));
        return Err(Error::input(path.display(), found).hint("expected image, label and p_tb"));
    };
    let mut scores = Vec::new();
    for (row, record) in reader.records().enumerate() {
        let record = record.map_err(unreadable)?;
        let place = || format!("{}: row {}", path.display(), row + 1);
        let cell = |at: usize| record.get(at).unwrap_or_default();
        let Some(is_tb) = class_of(cell(label)) else {
            return Err(Error::input(place(), format!("the label is \"{}\"", cell(label)))
                .hint("labels are TB and Normal"));
        };
        match cell(p_tb).trim().parse::<f64>() {
            Ok(p) if (0.0..=1.0).contains(&p) => {
                scores.push(Scored { image: cell(image).into(), is_tb, p_tb: p })
            }
            _ => {
                return Err(Error::input(place(), format!("p_tb is \"{}\"", cell(p_tb)))
                    .hint("probabilities lie between 0 and 1"));
            }
        }
    }
    if scores.is_empty() {
        return Err(Error::input(path.display(), "has no rows"));
    }
    Ok(scores)
}

/// Figures for a person.
pub(super) fn describe(m: &Metrics) -> String {
    format!(
        "{} images: accuracy {} ± {}, sensitivity {}, specificity {}, precision {}, F1 {}, AUC {}\n\
         found {} of {} with tuberculosis; {} false alarms among {} normal\n",
        m.n,
        shown(m.accuracy),
        shown(m.accuracy_ci95),
        shown(m.tb.sensitivity),
        shown(m.tb.specificity),
        shown(m.tb.precision),
        shown(m.tb.f1),
        shown(m.auc),
        m.tp,
        m.tp + m.missed,
        m.fp,
        m.fp + m.tn
    )
}

#[derive(Debug, Args)]
pub(super) struct CalibrateArgs {
    /// Model that `train` wrote
    #[arg(long)]
    model: PathBuf,
    /// Model that finds lungs
    #[arg(long, value_name = "MODEL")]
    seg: Option<PathBuf>,
    #[command(flatten)]
    images: ImagesArgs,
    /// Share of tuberculosis that must be found
    #[arg(long, default_value_t = TRIAGE_SENSITIVITY)]
    sensitivity: f64,
    /// Model folder to write
    #[arg(long)]
    out: PathBuf,
}

pub(super) fn calibrate(args: &CalibrateArgs, cx: &Context) -> Result<()> {
    if !(args.sensitivity > 0.0 && args.sensitivity <= 1.0) {
        return Err(Error::usage(format!("--sensitivity {} must lie between 0 and 1", args.sensitivity)));
    }
    if args.out.join("config.json").exists() {
        return Err(Error::usage(format!("{} already holds a model", args.out.display()))
            .hint("choose another --out"));
    }
    let model = ModelArgs { model: vec![args.model.clone()], seg: args.seg.clone() };
    let mut ensemble = Ensemble::open(&model, cx)?;
    if ensemble.members.len() > 1 {
        return Err(Error::usage(format!("{} holds several models", args.model.display()))
            .hint("calibrate one of its folds, such as fold-1"));
    }
    ensemble.members[0].0.platt = None;
    let (before, _) = score(&ensemble, &args.images, cx)?;
    let Some(found) = platt(&before) else {
        return Err(Error::input(args.images.images.display(), "lacks one of the classes"));
    };
    ensemble.members[0].0.platt = Some(found);
    let after: Vec<Scored> = before
        .iter()
        .map(|s| Scored { p_tb: crate::metrics::calibrated(s.p_tb, found), ..s.clone() })
        .collect();
    let point = operating_point(&after, args.sensitivity);
    let (mut config, model) = ensemble.members.remove(0);
    config.threshold = point.map_or(DECISION, |point| point.threshold);
    let folder = ModelFolder::new(&args.out);
    folder.create()?;
    folder.save_weights(&TensorFile::from_module(&model.no_grad()))?;
    folder.save_config(KIND, &Config::Classify(config.clone()))?;
    let (was, is) = (reliability(&before), reliability(&after));
    let result = json!({
        "out": args.out, "platt": found, "operating_point": point,
        "before": { "ece": was.ece, "brier": was.brier }, "after": { "ece": is.ece, "brier": is.brier },
        "note": Value::from(NOTICE),
    });
    cx.emit(&result, |_| {
        format!(
            "calibration error {:.3} before, {:.3} after; called TB from {:.3} on (sensitivity {}, specificity {} on these \
             images); model in {}\n",
            was.ece,
            is.ece,
            config.threshold,
            shown(point.map(|p| p.sensitivity)),
            shown(point.map(|p| p.specificity)),
            args.out.display()
        )
    })
}
