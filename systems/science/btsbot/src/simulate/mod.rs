//! A survey without a telescope: sources of six kinds, observed through weather, seeing and noise, as alerts like any other.
//!
//! Light curves are in [`light`], stamps in [`sky`]. What a person or a network sees of a source is made as the survey
//! makes it: an alert for every detection above five deviations, with the history of the last 30 days in its packet.

pub mod light;
pub mod sky;

use std::sync::Arc;

use kiln_core::{Context, Result};
use rand::{Rng, RngExt};
use rand_distr::{Distribution, Normal};
use rayon::prelude::*;
use serde::Serialize;

use crate::dataset::{About, Dataset};
use crate::features::{FeatureHistory, FeatureOptions};
use crate::packet::{Alert, Detection, Field, Stamp};
use crate::packets::triplet;
use light::Light;
use sky::{Scene, Seeing};

/// First night, as a Julian date.
const FIRST_NIGHT: f64 = 2_461_000.5;
/// Days that a source is followed.
const SEASON: f64 = 100.0;
/// Days of history in a packet.
const PACKET_DAYS: f64 = 30.0;
/// Deviations from which a detection becomes an alert.
const DETECTION: f64 = 5.0;
/// First number of alerts.
const FIRST_CANDID: i64 = 3_200_000_000_000_000_000;

/// What a source is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A supernova that becomes brighter than 18.5.
    BrightSn,
    /// A supernova that does not.
    FaintSn,
    /// An active galactic nucleus.
    Agn,
    /// A cataclysmic variable or nova.
    Cv,
    /// A variable star.
    Variable,
    /// None: an artefact.
    Bogus,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 6] =
        [Self::BrightSn, Self::FaintSn, Self::Agn, Self::Cv, Self::Variable, Self::Bogus];
    /// How many of twelve sources are of each kind.
    const SHARES: [usize; 6] = [3, 3, 2, 1, 2, 1];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::BrightSn => "bright supernova",
            Self::FaintSn => "faint supernova",
            Self::Agn => "active nucleus",
            Self::Cv => "cataclysmic variable",
            Self::Variable => "variable star",
            Self::Bogus => "artefact",
        }
    }

    /// The kind of the source of this number: any twelve in turn have the same mixture.
    fn of(number: usize) -> Self {
        let mut place = number % Self::SHARES.iter().sum::<usize>();
        for (kind, share) in Self::ALL.into_iter().zip(Self::SHARES) {
            if place < share {
                return kind;
            }
            place -= share;
        }
        Self::Bogus
    }
}

/// How the sky is over a season.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Season {
    /// Mean limiting magnitude.
    pub limit: f64,
    /// Median width of a star's image, in pixels of 1.01 arcseconds.
    pub fwhm: f64,
}

impl Default for Season {
    fn default() -> Self {
        Self { limit: 20.5, fwhm: 2.1 }
    }
}

impl Season {
    /// A season of worse weather: 0.3 magnitudes shallower, images 15 % wider.
    pub fn worse() -> Self {
        let Self { limit, fwhm } = Self::default();
        Self { limit: limit - 0.3, fwhm: fwhm * 1.15 }
    }
}

/// A source and its alerts in order of time.
#[derive(Debug, Clone)]
pub struct Simulated {
    /// Its name.
    pub object_id: String,
    /// What it is.
    pub kind: Kind,
    /// Its alerts without stamps, which are drawn when they are needed; there may be none.
    pub alerts: Vec<Alert>,
    survey: String,
    scene: Scene,
    /// Of every alert: magnitude, whether the source became brighter, and how good the exposure was.
    exposures: Vec<(f64, bool, Seeing)>,
}

impl Simulated {
    /// Whether it is a bright transient.
    pub fn label(&self) -> bool {
        self.kind == Kind::BrightSn
    }

    /// An alert with its stamps.
    pub fn with_stamps(&self, at: usize, cx: &Context) -> Alert {
        let alert = self.alerts[at].clone();
        let (magnitude, is_positive, seeing) = self.exposures[at];
        let mut rng = cx.rng(&format!("stamps {}", self.survey), alert.candid as u64);
        let stamps = self.scene.stamps(magnitude, is_positive, &seeing, &mut rng);
        Alert { stamps: stamps.map(Stamp::Image), ..alert }
    }
}

/// A number from a normal distribution.
fn normal(rng: &mut impl Rng, mean: f64, deviation: f64) -> f64 {
    Normal::new(mean, deviation).map_or(mean, |normal| normal.sample(rng))
}

/// One observation of a place.
#[derive(Debug, Clone, Copy)]
struct Epoch {
    jd: f64,
    fid: i64,
    seeing: Seeing,
}

/// The nights on which a place is observed, in both filters in turn.
fn epochs(season: &Season, rng: &mut impl Rng) -> Vec<Epoch> {
    let mut epochs = Vec::new();
    let mut jd = FIRST_NIGHT + rng.random_range(0.0..3.0) + 0.2;
    while jd < FIRST_NIGHT + SEASON {
        let limit = normal(rng, season.limit, 0.4);
        let fwhm = (season.fwhm * normal(rng, 0.0, 0.15).exp()).clamp(1.3, 6.0);
        epochs.push(Epoch {
            jd,
            fid: 1 + (epochs.len() % 2) as i64,
            seeing: Seeing {
                limit,
                fwhm,
                sky: 10f64.powf(0.4 * (20.5 - limit)) * rng.random_range(120.0..350.0),
            },
        });
        let gap = if rng.random_bool(0.08) { rng.random_range(4.0..10.0) } else { 0.0 };
        jd += rng.random_range(1.0..1.6) + gap; // in each filter every two to three days
    }
    epochs
}

/// The source of a number, as it is observed in a season. Any number gives the same source in every season.
pub fn source(number: usize, season: &Season, name: &str, cx: &Context) -> Simulated {
    let mut rng = cx.rng(&format!("simulate {name}"), number as u64);
    let kind = Kind::of(number);
    let object_id = object_name(number);
    let light = Light::draw(kind, FIRST_NIGHT + rng.random_range(10.0..SEASON - 25.0), &mut rng);
    let scene = Scene::draw(kind, &light, &mut rng);
    let (mut alerts, mut exposures) = (Vec::<Alert>::new(), Vec::new());
    let (mut detections, mut covered) = (0, 0);
    let past = Past::draw(kind, &mut rng);
    let [ra, dec] = [rng.random_range(0.0..360.0), rng.random_range(-0.45f64..1.0).asin().to_degrees()];
    for epoch in epochs(season, &mut rng) {
        covered += 1;
        let Some((magnitude, is_positive)) = light.observe(epoch.jd, epoch.fid, &mut rng) else { continue };
        // Deviations above the noise, which are five at the limit.
        let significance = DETECTION * 10f64.powf(0.4 * (epoch.seeing.limit - magnitude));
        if significance < DETECTION * rng.random_range(0.9..1.1) {
            continue;
        }
        detections += 1;
        let sigma = (1.0857 / significance).max(0.01);
        let measured = magnitude + normal(&mut rng, 0.0, sigma);
        let prior = alerts.iter().filter(|alert| alert.is_positive() && epoch.jd - alert.jd <= PACKET_DAYS);
        let prior: Vec<Detection> = prior.map(Alert::detection).collect();
        let start = alerts.first().map_or(epoch.jd, |first| first.jd);
        exposures.push((magnitude, is_positive, epoch.seeing));
        let seen = Seen { kind, scene: &scene, significance, seeing: epoch.seeing };
        let mut fields = seen.fields(&mut rng);
        let mut put = |name: &str, value: Field| fields.push((Arc::from(name), value));
        let candid = FIRST_CANDID + (number * 1000 + covered) as i64;
        put("jd", Field::Number(epoch.jd));
        put("fid", Field::Int(epoch.fid));
        put("candid", Field::Int(candid));
        put("pid", Field::Int(candid / 1000));
        put("programid", Field::Int(1));
        put("isdiffpos", Field::Text(if is_positive { "t" } else { "f" }.into()));
        put("ra", Field::Number(ra + normal(&mut rng, 0.0, 3e-5)));
        put("dec", Field::Number(dec + normal(&mut rng, 0.0, 3e-5)));
        put("magpsf", Field::Number(f64::from(measured as f32)));
        put("sigmapsf", Field::Number(sigma));
        put("ndethist", Field::Int(past.detections + detections));
        put("ncovhist", Field::Int(past.covered + covered as i64));
        put("jdstarthist", Field::Number(start - past.days));
        put("jdendhist", Field::Number(epoch.jd));
        alerts.push(Alert {
            object_id: object_id.clone(),
            candid,
            version: "4.02".into(),
            candidate: fields,
            jd: epoch.jd,
            magpsf: f64::from(measured as f32),
            prior_entries: prior.len(),
            prior,
            stamps: [Stamp::Absent, Stamp::Absent, Stamp::Absent],
        });
    }
    Simulated { object_id, kind, alerts, survey: name.into(), scene, exposures }
}

/// A name as the survey gives: the year and seven letters.
fn object_name(number: usize) -> String {
    let mut letters = [b'a'; 7];
    let mut left = number;
    for letter in letters.iter_mut().rev() {
        *letter += (left % 26) as u8;
        left /= 26;
    }
    format!("ZTF26{}", String::from_utf8_lossy(&letters))
}

/// What the survey already saw at the place.
struct Past {
    detections: i64,
    covered: i64,
    days: f64,
}

impl Past {
    fn draw(kind: Kind, rng: &mut impl Rng) -> Self {
        let covered = rng.random_range(150..1500);
        let chance = match kind {
            Kind::BrightSn | Kind::FaintSn => 0.06,
            Kind::Bogus => 0.6,
            Kind::Cv => 0.7,
            Kind::Agn | Kind::Variable => 0.95,
        };
        if !rng.random_bool(chance) {
            return Self { detections: 0, covered, days: 0.0 };
        }
        let share = match kind {
            Kind::BrightSn | Kind::FaintSn => 0.005,
            Kind::Bogus => 0.03,
            Kind::Cv => rng.random_range(0.01..0.08),
            Kind::Agn | Kind::Variable => rng.random_range(0.03..0.4),
        };
        let detections = ((covered as f64 * share) as i64).max(1);
        Self { detections, covered, days: rng.random_range(100.0..2200.0) }
    }
}

/// One observation of a source.
struct Seen<'a> {
    kind: Kind,
    scene: &'a Scene,
    significance: f64,
    seeing: Seeing,
}

impl Seen<'_> {
    /// What the pipeline measures besides place, time and magnitude.
    fn fields(&self, rng: &mut impl Rng) -> Vec<(Arc<str>, Field)> {
        let Self { kind, scene, significance, seeing } = self;
        // Real detections are recognised as such the better the more significant they are.
        let logit = match kind {
            Kind::Bogus => normal(rng, -2.0, 1.5),
            _ => normal(rng, 2.5 + 1.5 * (significance / DETECTION).ln(), 1.5),
        };
        let drb = 1.0 / (1.0 + (-logit).exp());
        let rb = 1.0 / (1.0 + (-0.6 * logit - normal(rng, 0.0, 0.5)).exp());
        let is_star = scene.nearest.is_star;
        let chi = match kind {
            Kind::Bogus => normal(rng, 1.6, 0.6).exp(),
            _ => normal(rng, 0.7, 0.35).exp(),
        };
        let number = |name: &str, value: f64| (Arc::from(name), Field::Number(f64::from(value as f32)));
        vec![
            number("diffmaglim", seeing.limit),
            number("chipsf", chi),
            number("distnr", scene.nearest.distance * rng.random_range(0.8..1.1)),
            number("magnr", scene.nearest.magnitude + normal(rng, 0.0, 0.05)),
            number("chinr", normal(rng, if is_star { -0.1 } else { 0.6 }, 0.4).exp()),
            number("sharpnr", normal(rng, if is_star { 0.0 } else { 0.35 }, 0.25)),
            number("sky", seeing.sky),
            number("fwhm", seeing.fwhm),
            number(
                "classtar",
                if *kind == Kind::Bogus { rng.random_range(0.2..1.0) } else { rng.random_range(0.8..1.0) },
            ),
            (Arc::from("nneg"), Field::Int(rng.random_range(0..if *kind == Kind::Bogus { 12 } else { 4 }))),
            (Arc::from("nbad"), Field::Int(0)),
            number("rb", rb),
            number("drb", drb),
            number("ssdistnr", -999.0),
            number("ssmagnr", -999.0),
            number("sgscore1", scene.nearest.star_score),
            number("distpsnr1", scene.nearest.distance),
            number("sgscore2", scene.second.star_score),
            number("distpsnr2", scene.second.distance),
            (Arc::from("nmtchps"), Field::Int(scene.matches)),
            (Arc::from("scorr"), Field::Number(significance * rng.random_range(0.9..1.2))),
            number("exptime", 30.0),
        ]
    }
}

/// Sources with their alerts, in parallel; those without an alert are left out.
pub fn sources(count: usize, season: &Season, name: &str, cx: &Context) -> Vec<Simulated> {
    let all = (0..count).into_par_iter().map(|number| source(number, season, name, cx));
    all.filter(|source| !source.alerts.is_empty()).collect()
}

/// Alerts as networks see them, made as from packets. Those that became fainter are left out; of every source, at most
/// `most` are taken, spread over its time.
///
/// # Errors
/// When an alert of the simulation could not be used, which is a fault of the simulation.
pub fn dataset(sources: &[Simulated], side: usize, most: usize, cx: &Context) -> Result<Dataset> {
    let one = |source: &Simulated| -> Result<Dataset> {
        let mut history = FeatureHistory::new(FeatureOptions::default());
        let mut data = Dataset::empty(side);
        let positive: Vec<usize> =
            (0..source.alerts.len()).filter(|&at| source.alerts[at].is_positive()).collect();
        let taken = positive.len().min(most);
        let mut next = 0;
        for (number, &at) in positive.iter().enumerate() {
            let alert = &source.alerts[at];
            let features = history.push(alert);
            if next >= taken || number < next * positive.len() / taken {
                continue;
            }
            next += 1;
            let failed = |reason: String| {
                kiln_core::Error::work(format!("simulated alert {}: {reason}", alert.candid))
            };
            let about = About {
                object_id: alert.object_id.clone(),
                candid: alert.candid.to_string(),
                jd: alert.jd,
                magpsf: alert.magpsf,
                label: Some(source.label()),
            };
            data.push(
                &triplet(&source.with_stamps(at, cx)).map_err(failed)?,
                features.map_err(failed)?,
                about,
            );
        }
        Ok(data)
    };
    let parts: Vec<Dataset> = sources.par_iter().map(one).collect::<Result<_>>()?;
    let mut all = Dataset::empty(side);
    for part in parts {
        all.images.extend(part.images);
        all.features.extend(part.features);
        all.about.extend(part.about);
    }
    Ok(all)
}
