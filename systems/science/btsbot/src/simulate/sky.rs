//! Stamps: a host, stars, and what changed, through seeing and noise.

use kiln_data::fits::FitsImage;
use rand::{Rng, RngExt};
use rand_distr::{Distribution, StandardNormal};

use super::light::Light;
use super::{Kind, normal};
use crate::triplet::SIDE;

/// Magnitude of one count.
const ZERO_POINT: f64 = 26.2;
/// Electrons of a count.
const GAIN: f64 = 6.2;
/// How much less noise the template has.
const TEMPLATE_DEPTH: f64 = 4.0;
/// Exponent of a star's profile (Moffat).
const BETA: f64 = 3.0;
/// Arcseconds of a pixel.
const PIXEL: f64 = 1.01;
/// Farthest that an exposure lies from its template, in pixels of either axis.
const MISALIGNED: f64 = 0.3;

/// How good an exposure is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seeing {
    /// Magnitude at five deviations.
    pub limit: f64,
    /// Width of a star's image, in pixels.
    pub fwhm: f64,
    /// Counts of the sky in a pixel.
    pub sky: f64,
}

/// A catalogued object near the source.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Neighbour {
    /// 1 for stars, 0 for galaxies.
    pub star_score: f64,
    /// Whether it is one.
    pub is_star: bool,
    /// Arcseconds.
    pub distance: f64,
    /// Its magnitude.
    pub magnitude: f64,
}

/// A galaxy (Sérsic).
#[derive(Debug, Clone, Copy)]
struct Galaxy {
    magnitude: f64,
    /// Pixels from the middle.
    place: [f64; 2],
    /// Half of its light lies within, in pixels.
    radius: f64,
    index: f64,
    /// Short axis over long axis, and the direction of the long one.
    flattening: f64,
    angle: f64,
}

/// A star.
#[derive(Debug, Clone, Copy)]
struct Star {
    magnitude: f64,
    place: [f64; 2],
}

/// An artefact.
#[derive(Debug, Clone, Copy)]
enum Artefact {
    /// A star that moved: bright on one side, dark on the other.
    Dipole { shift: [f64; 2] },
    /// A particle's trace.
    CosmicRay { angle: f64, length: f64 },
    /// Light that took a way round.
    Ghost { radius: f64 },
}

/// What is at a place.
#[derive(Debug, Clone)]
pub struct Scene {
    host: Option<Galaxy>,
    stars: Vec<Star>,
    artefact: Option<Artefact>,
    /// The nearest catalogued object,
    pub nearest: Neighbour,
    /// the one after,
    pub second: Neighbour,
    /// and how many are within 30 arcseconds.
    pub matches: i64,
}

impl Scene {
    /// Draws the surroundings of a source.
    pub(super) fn draw(kind: Kind, light: &Light, rng: &mut impl Rng) -> Self {
        let count = rng.random_range(1..5);
        let mut star = || Star {
            magnitude: 14.5 + 6.0 * rng.random::<f64>().sqrt(),
            place: [(); 2].map(|()| (rng.random::<f64>() - 0.5) * SIDE as f64),
        };
        let mut stars: Vec<Star> = (0..count).map(|_| star()).collect();
        // None of them so near that it would be the source.
        stars
            .iter_mut()
            .filter(|star| star.place[0].hypot(star.place[1]) < 8.0)
            .for_each(|star| star.place[0] += 14.0);
        let far = Neighbour {
            star_score: if rng.random_bool(0.7) {
                rng.random_range(0.6..1.0)
            } else {
                rng.random_range(0.0..0.5)
            },
            is_star: true,
            distance: rng.random_range(5.0..25.0),
            magnitude: rng.random_range(17.0..22.0),
        };
        let (host, artefact, nearest) = match kind {
            Kind::BrightSn | Kind::FaintSn => {
                let peak = light.peak().unwrap_or(19.0);
                let host = Galaxy::of_supernova(peak, rng);
                let distance = host.place[0].hypot(host.place[1]) * PIXEL;
                // A quarter have hosts that are too faint for the catalogue.
                let near = Neighbour {
                    star_score: rng.random_range(0.0f64..0.9).powi(3),
                    is_star: false,
                    distance,
                    magnitude: host.magnitude,
                };
                let is_listed = host.magnitude < 22.0 && rng.random_bool(0.9);
                (Some(host), None, if is_listed { near } else { far })
            }
            Kind::Agn => {
                let magnitude = light.underneath().unwrap_or(18.0);
                let host = Galaxy {
                    magnitude: magnitude + rng.random_range(-0.5..1.5),
                    place: [0.0; 2],
                    radius: rng.random_range(0.8..4.0),
                    index: rng.random_range(2.0..4.0),
                    flattening: rng.random_range(0.5..1.0),
                    angle: rng.random_range(0.0..3.1),
                };
                stars.push(Star { magnitude, place: [0.0; 2] });
                let near = Neighbour {
                    star_score: rng.random_range(0.0..1.0),
                    is_star: rng.random_bool(0.4),
                    distance: rng.random_range(0.02f64..0.6),
                    magnitude,
                };
                (Some(host), None, near)
            }
            Kind::Cv | Kind::Variable => {
                let quiet = light
                    .underneath()
                    .unwrap_or_else(|| light.peak().unwrap_or(18.0) + rng.random_range(2.0..5.0));
                stars.push(Star { magnitude: quiet, place: [0.0; 2] });
                let near = Neighbour {
                    star_score: 1.0 - rng.random_range(0.0f64..0.7).powi(3),
                    is_star: true,
                    distance: rng.random_range(0.02..0.9),
                    magnitude: quiet,
                };
                // What is too faint for the catalogue is not in it.
                (None, None, if quiet < 22.0 { near } else { far })
            }
            Kind::Bogus => {
                let artefact = match rng.random_range(0..3) {
                    0 => {
                        let magnitude = rng.random_range(12.5..16.0);
                        stars.push(Star { magnitude, place: [0.0; 2] });
                        Artefact::Dipole { shift: [(); 2].map(|()| rng.random_range(-0.9..0.9)) }
                    }
                    1 => Artefact::CosmicRay {
                        angle: rng.random_range(0.0..3.1),
                        length: rng.random_range(2.0..12.0),
                    },
                    _ => Artefact::Ghost { radius: rng.random_range(5.0..20.0) },
                };
                let near = Neighbour {
                    star_score: rng.random_range(0.5..1.0),
                    is_star: true,
                    distance: if matches!(artefact, Artefact::Dipole { .. }) {
                        rng.random_range(0.1..1.5)
                    } else {
                        rng.random_range(1.0..15.0)
                    },
                    magnitude: rng.random_range(13.0..20.0),
                };
                (None, Some(artefact), near)
            }
        };
        let second = Neighbour {
            star_score: rng.random_range(0.0..1.0),
            is_star: false,
            distance: nearest.distance + rng.random_range(2.0..15.0),
            magnitude: 20.0,
        };
        Self { host, stars, artefact, nearest, second, matches: rng.random_range(2..16) }
    }

    /// Science, template and difference of one observation.
    pub(super) fn stamps(
        &self,
        magnitude: f64,
        is_positive: bool,
        seeing: &Seeing,
        rng: &mut impl Rng,
    ) -> [FitsImage; 3] {
        let shift = match self.artefact {
            Some(Artefact::Dipole { shift }) => shift,
            _ => [(); 2].map(|()| rng.random_range(-MISALIGNED..MISALIGNED)),
        };
        let template = self.still(seeing.fwhm, [0.0; 2]);
        let mut science = self.still(seeing.fwhm, shift);
        let sign = if is_positive { 1.0 } else { -1.0 };
        match self.artefact {
            None => add_star(&mut science, &Star { magnitude, place: shift }, seeing.fwhm, sign),
            Some(artefact) => artefact.add(&mut science, magnitude, sign),
        }
        // Noise of a pixel by which a star at the limit stands five deviations above it.
        let area = 4.0 * std::f64::consts::PI * (seeing.fwhm / 2.355).powi(2);
        let faint = counts(seeing.limit) / (5.0 * area.sqrt());
        let mut noise = |signal: f64, floor: f64| {
            let z: f64 = StandardNormal.sample(rng);
            z * (floor * floor + signal.max(0.0) / GAIN).sqrt()
        };
        let pixels = science.len();
        let mut images = [(); 3].map(|()| Vec::with_capacity(pixels));
        for (now, before) in science.iter().zip(&template) {
            let noise_now = noise(*now, faint);
            let noise_before = noise(*before / TEMPLATE_DEPTH.powi(2), faint / TEMPLATE_DEPTH);
            images[0].push((now + seeing.sky + noise_now) as f32);
            images[1].push((before + 0.6 * seeing.sky + noise_before) as f32);
            images[2].push((now - before + noise_now - noise_before) as f32);
        }
        images.map(|pixels| FitsImage { width: SIDE, height: SIDE, pixels })
    }

    /// What does not change, in counts.
    fn still(&self, fwhm: f64, shift: [f64; 2]) -> Vec<f64> {
        let mut pixels = vec![0.0; SIDE * SIDE];
        if let Some(host) = &self.host {
            host.add(&mut pixels, fwhm, shift);
        }
        for star in &self.stars {
            let place = [star.place[0] + shift[0], star.place[1] + shift[1]];
            add_star(&mut pixels, &Star { place, ..*star }, fwhm, 1.0);
        }
        pixels
    }
}

/// Counts of a magnitude.
fn counts(magnitude: f64) -> f64 {
    10f64.powf(0.4 * (ZERO_POINT - magnitude))
}

/// Pixels with their places from the middle.
fn places() -> impl Iterator<Item = (usize, [f64; 2])> {
    let middle = (SIDE / 2) as f64;
    (0..SIDE * SIDE).map(move |at| (at, [(at % SIDE) as f64 - middle, (at / SIDE) as f64 - middle]))
}

/// Adds a Moffat profile, out to where nothing is left of it.
fn add_star(pixels: &mut [f64], star: &Star, fwhm: f64, sign: f64) {
    let width = fwhm / (2.0 * (2f64.powf(1.0 / BETA) - 1.0).sqrt());
    let height = sign * counts(star.magnitude) * (BETA - 1.0) / (std::f64::consts::PI * width * width);
    for (at, place) in places() {
        let r2 = (place[0] - star.place[0]).powi(2) + (place[1] - star.place[1]).powi(2);
        pixels[at] += height / (1.0 + r2 / (width * width)).powi(3);
    }
}

impl Galaxy {
    /// Hosts are about as bright as their supernovae, and look the larger the nearer they are.
    fn of_supernova(peak: f64, rng: &mut impl Rng) -> Self {
        let radius = 4.5 * 10f64.powf(-0.2 * (peak - 17.5)) * normal(rng, 0.0, 0.35).exp();
        let away = radius * rng.random_range(0.0f64..1.8);
        let direction = rng.random_range(0.0..std::f64::consts::TAU);
        Self {
            magnitude: peak - 0.5 + normal(rng, 0.0, 1.3),
            place: [away * direction.cos(), away * direction.sin()],
            radius: radius.clamp(0.5, 14.0),
            index: rng.random_range(1.0..4.0),
            flattening: rng.random_range(0.35..1.0),
            angle: rng.random_range(0.0..std::f64::consts::PI),
        }
    }

    /// Adds the galaxy; seeing is taken as a core that the profile cannot rise within.
    fn add(&self, pixels: &mut [f64], fwhm: f64, shift: [f64; 2]) {
        let b = 2.0 * self.index - 1.0 / 3.0;
        let core = (0.5 * fwhm).powi(2);
        let (sin, cos) = self.angle.sin_cos();
        let mut light = Vec::with_capacity(pixels.len());
        let mut total = 0.0;
        for (_, place) in places() {
            let [x, y] = [place[0] - self.place[0] - shift[0], place[1] - self.place[1] - shift[1]];
            let (along, across) = (x * cos + y * sin, (y * cos - x * sin) / self.flattening);
            let r = (along * along + across * across + core).sqrt() / self.radius;
            let value = (-b * (r.powf(1.0 / self.index) - 1.0)).exp();
            total += value;
            light.push(value);
        }
        let scale = counts(self.magnitude) / total.max(f64::MIN_POSITIVE);
        pixels.iter_mut().zip(light).for_each(|(pixel, value)| *pixel += scale * value);
    }
}

impl Artefact {
    fn add(self, pixels: &mut [f64], magnitude: f64, sign: f64) {
        let light = counts(magnitude);
        match self {
            // The shifted star is in the picture already.
            Self::Dipole { .. } => {}
            Self::CosmicRay { angle, length } => {
                let (sin, cos) = angle.sin_cos();
                for (at, [x, y]) in places() {
                    let (along, across) = ((x * cos + y * sin).abs(), (y * cos - x * sin).abs());
                    if along <= length / 2.0 && across < 0.6 {
                        pixels[at] += sign * light / length;
                    }
                }
            }
            Self::Ghost { radius } => {
                for (at, [x, y]) in places() {
                    let r = x.hypot(y) / radius;
                    if (0.35..1.0).contains(&r) {
                        pixels[at] += sign * light / (2.0 * radius * radius);
                    }
                }
            }
        }
    }
}
