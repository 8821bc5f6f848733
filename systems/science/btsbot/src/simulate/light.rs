//! Light curves of six kinds.

use rand::{Rng, RngExt};

use super::{Kind, normal};

/// Days between the knots of a random walk.
const WALK_STEP: f64 = 1.0;

/// How bright a source is over time.
#[derive(Debug, Clone)]
pub enum Light {
    /// A rise and a slower fall: `exp(-(t - t0) / fall) / (1 + exp(-(t - t0) / rise))`, scaled to its maximum.
    Burst {
        /// Where the two meet.
        t0: f64,
        /// Days.
        rise: f64,
        /// Days.
        fall: f64,
        /// Magnitude at maximum in the brighter filter.
        peak: f64,
        /// By how much the g filter is fainter, and by how much more after ten days.
        colour: [f64; 2],
    },
    /// A source that was there before, and differs from its image of before.
    Varying {
        /// Its mean magnitude.
        mean: f64,
        /// Magnitudes from the mean at each knot.
        walk: Vec<f64>,
        /// The first knot.
        from: f64,
    },
    /// A sine.
    Sine {
        /// Its mean magnitude.
        mean: f64,
        /// Magnitudes.
        amplitude: f64,
        /// Days.
        period: f64,
        /// Radians.
        phase: f64,
    },
    /// Now and then something that is nothing.
    Sporadic {
        /// How often.
        chance: f64,
        /// About how bright.
        mean: f64,
    },
}

impl Light {
    /// Draws a light curve of a kind; a burst begins around `t0`.
    pub(super) fn draw(kind: Kind, t0: f64, rng: &mut impl Rng) -> Self {
        match kind {
            Kind::BrightSn | Kind::FaintSn => {
                // More of them the fainter they are, as there is more room far away.
                let depth: f64 = rng.random::<f64>().powf(0.6);
                let peak = if kind == Kind::BrightSn { 16.5 + 1.9 * depth } else { 18.65 + 1.85 * depth };
                let dust = rng.random_range(0.0..0.3);
                Self::Burst {
                    t0,
                    rise: normal(rng, 3.6, 0.6).clamp(2.2, 5.5),
                    fall: normal(rng, 24.0, 5.0).clamp(12.0, 45.0),
                    peak,
                    colour: [dust, rng.random_range(0.1..0.35)],
                }
            }
            Kind::Cv => Self::Burst {
                t0,
                rise: rng.random_range(0.15..0.5),
                fall: rng.random_range(2.5..9.0),
                peak: rng.random_range(15.5..19.3),
                colour: [rng.random_range(-0.1..0.1), 0.02],
            },
            Kind::Agn => {
                let (scale, deviation) = (rng.random_range(40.0..200.0), rng.random_range(0.12..0.4));
                let keep = f64::exp(-WALK_STEP / scale);
                let mut at = normal(rng, 0.0, deviation);
                let walk = (0..220).map(|_| {
                    at = keep * at + normal(rng, 0.0, deviation * (1.0 - keep * keep).sqrt());
                    at
                });
                let walk = walk.collect();
                Self::Varying { mean: rng.random_range(15.8..18.8), walk, from: t0 - 110.0 }
            }
            Kind::Variable => Self::Sine {
                mean: rng.random_range(14.0..18.0),
                amplitude: rng.random_range(0.08..0.6),
                period: 10f64.powf(rng.random_range(-0.5..2.0)),
                phase: rng.random_range(0.0..std::f64::consts::TAU),
            },
            Kind::Bogus => {
                Self::Sporadic { chance: rng.random_range(0.05..0.25), mean: rng.random_range(17.0..20.0) }
            }
        }
    }

    /// Magnitude of the difference from the template, and whether the source became brighter; `None` where there is none.
    pub(super) fn observe(&self, jd: f64, fid: i64, rng: &mut impl Rng) -> Option<(f64, bool)> {
        let difference = |mean: f64, now: f64| {
            let flux = 10f64.powf(-0.4 * (mean + now)) - 10f64.powf(-0.4 * mean);
            (flux != 0.0).then(|| (-2.5 * flux.abs().log10(), flux > 0.0))
        };
        match self {
            Self::Burst { t0, rise, fall, peak, colour } => {
                let flux = |t: f64| (-t / fall).exp() / (1.0 + (-t / rise).exp());
                let t = jd - t0;
                // The maximum, where the derivative is 0.
                let maximum = flux(rise * (fall / rise - 1.0).max(1e-3).ln());
                let magnitude = peak - 2.5 * (flux(t) / maximum).log10();
                let reddening = colour[0] + colour[1] * (t / 10.0).clamp(0.0, 4.0);
                let magnitude = magnitude + if fid == 1 { reddening } else { 0.0 };
                magnitude.is_finite().then_some((magnitude, true))
            }
            Self::Varying { mean, walk, from } => {
                let at = ((jd - from) / WALK_STEP).clamp(0.0, (walk.len() - 1) as f64) as usize;
                difference(*mean, walk[at])
            }
            Self::Sine { mean, amplitude, period, phase } => {
                difference(*mean, amplitude * (std::f64::consts::TAU * jd / period + phase).sin())
            }
            Self::Sporadic { chance, mean } => {
                rng.random_bool(*chance).then(|| (normal(rng, *mean, 0.5), rng.random_bool(0.7)))
            }
        }
    }

    /// The magnitude of what is there without the difference, where there is something.
    pub(super) fn underneath(&self) -> Option<f64> {
        match *self {
            Self::Varying { mean, .. } | Self::Sine { mean, .. } => Some(mean),
            _ => None,
        }
    }

    /// The brightest magnitude of a burst.
    pub(super) fn peak(&self) -> Option<f64> {
        match *self {
            Self::Burst { peak, .. } => Some(peak),
            _ => None,
        }
    }
}
