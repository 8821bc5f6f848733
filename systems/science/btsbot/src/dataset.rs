//! Alerts to learn from and to judge by: stamps and features as arrays and tables, split by source.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Error, HostTensor, Result};
use kiln_data::{read_npy, read_npz};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::augment::Dihedral;
use crate::features::FEATURES;
use crate::scores::Scored;
use crate::tables::CsvTable;
use crate::triplet::{SIDE, Triplet};

/// What is known of an alert besides its input to a network.
#[derive(Debug, Clone, PartialEq)]
pub struct About {
    /// The source.
    pub object_id: String,
    /// The alert's number, as it was written.
    pub candid: String,
    /// When it was observed.
    pub jd: f64,
    /// Its magnitude.
    pub magpsf: f64,
    /// 1 for bright transients, where that is known.
    pub label: Option<bool>,
}

/// An alert that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejected {
    /// The file, and the row where it has rows.
    pub file: String,
    /// The source, where that much is known.
    #[serde(rename = "objectId")]
    pub object_id: String,
    /// The alert's number, where that much is known.
    pub candid: String,
    /// Why.
    pub reason: String,
}

/// Alerts as a network sees them.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    /// Pixels of a side of the stamps.
    pub side: usize,
    /// `[alerts, 3, side, side]`
    pub images: Vec<f32>,
    /// One row an alert.
    pub features: Vec<[f32; 25]>,
    /// One an alert.
    pub about: Vec<About>,
}

impl Dataset {
    /// No alerts, of stamps of this size.
    pub fn empty(side: usize) -> Self {
        Self { side, ..Self::default() }
    }

    /// Reads stamps `[alerts, 63, 63, 3]` (`.npy` or `.npz`) and the table of the same alerts in the same order. Alerts
    /// without one of the features are left out, with the reason.
    ///
    /// # Errors
    /// When a file is malformed, the stamps have another shape, or the numbers of alerts differ.
    pub fn read(triplets: &Path, candidates: &Path, side: usize) -> Result<(Self, Vec<Rejected>)> {
        let stamps = read_array(triplets)?;
        let shape = stamps.shape.clone();
        if shape.len() != 4 || shape[1..] != [SIDE, SIDE, 3] {
            return Err(Error::input(triplets.display(), format!("has the shape {shape:?}"))
                .hint(format!("stamps have the shape [alerts, {SIDE}, {SIDE}, 3]")));
        }
        let stamps = stamps.as_floats().ok_or_else(|| {
            Error::input(triplets.display(), "holds integers").hint("stamps are f32 or f64")
        })?;
        let required: Vec<&str> = ["objectId", "jd"].into_iter().chain(FEATURES).collect();
        let mut table = CsvTable::open(candidates, &required)?;
        let at = |name: &str| table.column(name);
        let columns = FEATURES.map(|name| at(name).unwrap_or_default());
        let (object, jd) = (at("objectId").unwrap_or_default(), at("jd").unwrap_or_default());
        let (candid, label) = (at("candid"), at("label"));
        let (mut data, mut rejected) = (Self::empty(side), Vec::new());
        let mut rows = 0;
        while table.advance()? {
            let place = table.place();
            let object_id = table.text(object).to_string();
            let candid = candid.map(|at| table.text(at).to_string()).unwrap_or_default();
            let stamp = stamps.get(rows * 3 * SIDE * SIDE..(rows + 1) * 3 * SIDE * SIDE);
            rows += 1;
            let Some(stamp) = stamp else { continue };
            let label = label.map(|at| table.label(at)).transpose()?.flatten();
            let mut features = [0.0; 25];
            let mut missing = None;
            for ((feature, &column), name) in features.iter_mut().zip(&columns).zip(FEATURES) {
                match table.number(column)?.map(|value| value as f32).filter(|value| value.is_finite()) {
                    Some(value) => *feature = value,
                    None => missing = missing.or(Some(format!("has no {name}"))),
                }
            }
            if missing.is_none() && stamp.iter().any(|pixel| !pixel.is_finite()) {
                missing = Some("has a stamp with pixels that are no numbers".into());
            }
            if let Some(reason) = missing {
                rejected.push(Rejected { file: place, object_id, candid, reason });
                continue;
            }
            let jd = table.required(jd)?;
            let about = About { object_id, candid, jd, magpsf: table.required(columns[5])?, label };
            data.push(&channels_first(stamp), features, about);
        }
        if rows != shape[0] {
            let found = format!("has {rows} rows, but {} has {} alerts", triplets.display(), shape[0]);
            return Err(Error::input(candidates.display(), found)
                .hint("row i of the table belongs to alert i of the stamps"));
        }
        Ok((data, rejected))
    }

    /// Adds an alert; its stamps are cropped to the size of the others.
    pub fn push(&mut self, triplet: &Triplet, features: [f32; 25], about: About) {
        match triplet.side == self.side {
            true => self.images.extend(&triplet.pixels),
            false => self.images.extend(triplet.cropped(self.side).pixels),
        }
        self.features.push(features);
        self.about.push(about);
    }

    /// How many alerts there are.
    pub fn len(&self) -> usize {
        self.about.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.about.is_empty()
    }

    /// The stamps of an alert.
    pub fn stamps(&self, alert: usize) -> &[f32] {
        let size = 3 * self.side * self.side;
        &self.images[alert * size..(alert + 1) * size]
    }

    /// Stamps `[chosen, 3, side, side]` and features `[chosen, 25]`, each alert transformed as the iterator says.
    pub fn tensors(
        &self,
        chosen: &[usize],
        transforms: impl IntoIterator<Item = Dihedral>,
        device: &Device,
    ) -> (Tensor<4>, Tensor<2>) {
        let mut pixels = Vec::with_capacity(chosen.len() * 3 * self.side * self.side);
        for (&alert, transform) in chosen.iter().zip(transforms) {
            transform.append(self.stamps(alert), self.side, &mut pixels);
        }
        let features: Vec<f32> = chosen.iter().flat_map(|&alert| self.features[alert]).collect();
        let images = TensorData::new(pixels, [chosen.len(), 3, self.side, self.side]);
        let features = TensorData::new(features, [chosen.len(), FEATURES.len()]);
        (Tensor::from_data(images, device), Tensor::from_data(features, device))
    }

    /// The chosen alerts with their scores.
    pub fn scored(&self, chosen: &[usize], scores: &[f64]) -> Vec<Scored> {
        let one = |(&alert, &score): (&usize, &f64)| {
            let About { object_id, candid, jd, magpsf, label } = self.about[alert].clone();
            Scored { object_id, candid, jd, label, magpsf, score }
        };
        chosen.iter().zip(scores).map(one).collect()
    }

    /// The alerts of each source, by name.
    pub fn by_source(&self) -> BTreeMap<&str, Vec<usize>> {
        let mut sources: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (alert, about) in self.about.iter().enumerate() {
            sources.entry(&about.object_id).or_default().push(alert);
        }
        sources
    }

    /// The alerts that have a label.
    ///
    /// # Errors
    /// When a source has alerts of both labels.
    pub fn labelled(&self) -> Result<Vec<usize>> {
        for (source, alerts) in self.by_source() {
            let label = self.about[alerts[0]].label;
            if alerts.iter().any(|&alert| self.about[alert].label != label) {
                return Err(Error::input(format!("source {source}"), "has alerts of different labels")
                    .hint("a label belongs to a source"));
            }
        }
        Ok((0..self.len()).filter(|&alert| self.about[alert].label.is_some()).collect())
    }

    /// Splits alerts by source into three parts of these shares, each class for itself.
    pub fn split(&self, chosen: &[usize], shares: [f64; 3], rng: &mut impl Rng) -> [Vec<usize>; 3] {
        let chosen: HashSet<usize> = chosen.iter().copied().collect();
        let mut parts: [Vec<usize>; 3] = Default::default();
        for label in [Some(false), Some(true), None] {
            let mut sources: Vec<Vec<usize>> = self
                .by_source()
                .into_values()
                .map(|alerts| alerts.into_iter().filter(|alert| chosen.contains(alert)).collect::<Vec<_>>())
                .filter(|alerts| alerts.first().is_some_and(|&first| self.about[first].label == label))
                .collect();
            sources.shuffle(rng);
            let count = sources.len() as f64;
            let whole: f64 = shares.iter().sum();
            let ends =
                [shares[0] / whole, (shares[0] + shares[1]) / whole].map(|share| (share * count).round());
            for (number, alerts) in sources.into_iter().enumerate() {
                let part = ends.iter().filter(|&&end| number as f64 >= end).count();
                parts[part].extend(alerts);
            }
        }
        parts.iter_mut().for_each(|part| part.sort_unstable());
        parts
    }

    /// Leaves at most so many alerts of every source, by label, drawn at random.
    pub fn thinned(&self, chosen: &[usize], most: [usize; 2], rng: &mut impl Rng) -> Vec<usize> {
        let chosen: HashSet<usize> = chosen.iter().copied().collect();
        let mut left = Vec::new();
        for alerts in self.by_source().into_values() {
            let mut alerts: Vec<usize> = alerts.into_iter().filter(|alert| chosen.contains(alert)).collect();
            let Some(&first) = alerts.first() else { continue };
            alerts.shuffle(rng);
            alerts.truncate(most[usize::from(self.about[first].label == Some(true))]);
            left.extend(alerts);
        }
        left.sort_unstable();
        left
    }
}

/// The array of a `.npy` file, or of an `.npz` file that calls it `triplets` or has no other.
fn read_array(path: &Path) -> Result<HostTensor> {
    match path.extension().and_then(|ending| ending.to_str()) {
        Some("npy") => read_npy(path),
        Some("npz") => {
            let mut file = read_npz(path)?;
            let names: Vec<String> = file.names().map(str::to_string).collect();
            match &names[..] {
                [one] => file.take(one),
                _ => file.take("triplets"),
            }
        }
        _ => Err(Error::usage(format!("{} ends neither in .npy nor in .npz", path.display()))),
    }
}

/// `[3, side, side]` from `[side, side, 3]`.
fn channels_first(stamp: &[f32]) -> Triplet {
    let pixels = (0..3).flat_map(|channel| stamp.iter().skip(channel).step_by(3).copied()).collect();
    Triplet { side: SIDE, pixels }
}
