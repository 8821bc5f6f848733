//! Chest radiographs made by numbers: a thorax with lungs whose mask is known, with or without signs of tuberculosis, and
//! with or without a hospital's marker outside the lungs.
//!
//! Places are in half widths of the image from its middle, to the right and downwards; what is left in the image is the
//! patient's right. Brightness is from 0 (air) to 1 (bone).

use std::f64::consts::{PI, TAU};

use rand::{Rng, RngExt};
use rand_distr::{Distribution, Normal};
use serde::Serialize;

use crate::masks::Mask;

/// Deviation of the noise.
const NOISE: f64 = 0.03;
/// Brightness of lesions above the lung around them.
const LESION: f64 = 0.45;
/// Radii of infiltrates, in half widths (0.04 to 0.08 of the width).
const INFILTRATE: [f64; 2] = [0.08, 0.16];
/// Glyphs of the marker, five columns of seven pixels each, the topmost in the lowest bit.
const MARKER: [[u8; 5]; 2] = [[0x7e, 0x09, 0x09, 0x09, 0x7e], [0x7f, 0x09, 0x09, 0x09, 0x06]];

/// A sign of tuberculosis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sign {
    /// Patches in an upper lobe.
    Infiltrate,
    /// A ring.
    Cavity,
    /// Many small nodules in both lungs.
    Miliary,
    /// Fluid above the diaphragm, which blunts its angle.
    Effusion,
}

/// A radiograph and the truth about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Phantom {
    /// Rows and columns.
    pub size: usize,
    /// Brightness from 0 to 1, `[size, size]`.
    pub pixels: Vec<f32>,
    /// The lungs.
    pub lungs: Mask,
    /// Signs of tuberculosis; none in a normal image.
    pub signs: Vec<Sign>,
    /// Whether a marker is in it.
    pub has_marker: bool,
}

impl Phantom {
    /// Whether it shows tuberculosis.
    pub fn is_tb(&self) -> bool {
        !self.signs.is_empty()
    }
}

/// Whether an image gets a marker: with probability `shortcut` when it shows tuberculosis, else with the rest of 1. At 0.5
/// the marker tells nothing.
pub fn draw_marker(is_tb: bool, shortcut: f64, rng: &mut impl Rng) -> bool {
    rng.random::<f64>() < if is_tb { shortcut } else { 1.0 - shortcut }
}

/// Draws a radiograph.
///
/// The same stream gives the same patient at every size, with or without a marker.
pub fn draw(is_tb: bool, has_marker: bool, size: usize, rng: &mut impl Rng) -> Phantom {
    let body = Body::draw(rng);
    let anatomy = Anatomy::draw(&body, rng);
    let lesions = if is_tb { Lesions::draw(&body, rng) } else { Lesions::default() };
    let (gain, gamma, offset) =
        (rng.random_range(0.85..1.1), rng.random_range(0.85..1.2), rng.random_range(-0.03..0.04));
    let noise = Normal::new(0.0, NOISE).expect("a deviation above 0");

    let mut pixels = Vec::with_capacity(size * size);
    let mut lung = Vec::with_capacity(size * size);
    for y in 0..size {
        for x in 0..size {
            let at = body.place([y, x], size);
            let depth = body.lung_depth(at);
            let inside = depth > 0.0;
            let mut value = body.brightness(at, depth) + anatomy.brightness(&body, at, depth);
            if inside {
                value += lesions.brightness(&body, at);
            }
            let exposed = (value.clamp(0.0, 1.2) * gain + offset).max(0.0).powf(gamma);
            pixels.push(exposed);
            lung.push(inside);
        }
    }
    if has_marker {
        stamp_marker(&mut pixels, &lung, size);
    }
    // Noise last, so that it is of the machine and not of the patient.
    let pixels = pixels.into_iter().map(|x| (x + noise.sample(rng)).clamp(0.0, 1.0) as f32).collect();
    Phantom {
        size,
        pixels,
        lungs: Mask { height: size, width: size, lung },
        signs: lesions.signs,
        has_marker,
    }
}

/// The marker "AP" in the upper left corner, and a bar along the left edge.
fn stamp_marker(pixels: &mut [f64], lung: &[bool], size: usize) {
    let unit = (size / 64).max(1);
    let mut light = |y: usize, x: usize| {
        if y < size && x < size && !lung[y * size + x] {
            pixels[y * size + x] = 0.95;
        }
    };
    for (number, glyph) in MARKER.iter().enumerate() {
        for (column, bits) in glyph.iter().enumerate() {
            for row in (0..7).filter(|row| bits >> row & 1 == 1) {
                for (dy, dx) in (0..unit * unit).map(|i| (i / unit, i % unit)) {
                    light((2 + row) * unit + dy, (3 + 6 * number + column) * unit + dx);
                }
            }
        }
    }
    (0..size).for_each(|y| (0..unit).for_each(|x| light(y, x)));
}

/// From 0 below `low` to 1 above `high`, smoothly.
fn smooth(low: f64, high: f64, x: f64) -> f64 {
    let t = ((x - low) / (high - low)).clamp(0.0, 1.0);
    t * t * (3.0 - 2.0 * t)
}

/// How bright a blurred disc is at a distance from its middle.
fn blob([dy, dx]: [f64; 2], radius: f64) -> f64 {
    (-(dy * dy + dx * dx) / (radius * radius)).exp()
}

/// Trunk and lungs.
struct Body {
    /// Radians by which the patient leans,
    lean: f64,
    scale: f64,
    shift: [f64; 2],
    lungs: [Lung; 2],
    heart: [f64; 4],
    mediastinum: f64,
    shoulder: f64,
}

/// One lung: an oval with a wavy outline, cut off by the dome of the diaphragm.
struct Lung {
    centre: [f64; 2],
    radii: [f64; 2],
    /// Amplitudes and phases of waves of the outline.
    waves: [[f64; 2]; 4],
    /// Height of the dome, and how far it falls at the sides.
    dome: [f64; 2],
}

impl Body {
    fn draw(rng: &mut impl Rng) -> Self {
        let mut lung = |side: f64| Lung {
            centre: [rng.random_range(-0.12..-0.04), side * rng.random_range(0.40..0.45)],
            radii: [rng.random_range(0.64..0.72), rng.random_range(0.29..0.34)],
            waves: [2, 3, 4, 5]
                .map(|k| [rng.random_range(-0.12..0.12) / f64::from(k), rng.random_range(0.0..TAU)]),
            dome: [rng.random_range(0.40..0.52), rng.random_range(0.16..0.28)],
        };
        let lungs = [lung(-1.0), lung(1.0)];
        Self {
            lean: rng.random_range(-0.08..0.08),
            scale: rng.random_range(0.94..1.04),
            shift: [rng.random_range(-0.03..0.03), rng.random_range(-0.03..0.03)],
            lungs,
            heart: [
                rng.random_range(0.26..0.36),
                rng.random_range(0.08..0.15),
                rng.random_range(0.26..0.34),
                rng.random_range(0.26..0.34),
            ],
            mediastinum: rng.random_range(0.10..0.14),
            shoulder: rng.random_range(0.50..0.64),
        }
    }

    /// The place in the body that a pixel shows, `[down, right]`.
    fn place(&self, [y, x]: [usize; 2], size: usize) -> [f64; 2] {
        let half = size as f64 / 2.0;
        let v = ((y as f64 + 0.5) / half - 1.0 - self.shift[0]) / self.scale;
        let u = ((x as f64 + 0.5) / half - 1.0 - self.shift[1]) / self.scale;
        let (sin, cos) = self.lean.sin_cos();
        [cos * v - sin * u, sin * v + cos * u]
    }

    /// How deep inside a lung a place is; at most 0 outside.
    fn lung_depth(&self, [v, u]: [f64; 2]) -> f64 {
        let lung = &self.lungs[usize::from(u > 0.0)];
        let [dv, du] = [v - lung.centre[0], u - lung.centre[1]];
        let angle = dv.atan2(du);
        let waves: f64 =
            lung.waves.iter().zip(2..).map(|([a, phase], k)| a * (f64::from(k) * angle + phase).cos()).sum();
        // An oval that is fuller than an ellipse.
        let radius =
            ((dv / lung.radii[0]).abs().powf(2.4) + (du / lung.radii[1]).abs().powf(2.4)).powf(1.0 / 2.4);
        let oval = (1.0 + waves - radius) * lung.radii[1];
        let dome = lung.centre[0] + lung.dome[0] + lung.dome[1] * (du / lung.radii[1]).powi(2) - v;
        let [hv, hu, rv, ru] = self.heart;
        let heart = ((((v - hv) / rv).powi(2) + ((u - hu) / ru).powi(2)).sqrt() - 1.0) * ru;
        oval.min(dome).min(heart).min(u.abs() - self.mediastinum)
    }

    /// Soft tissue, lungs, heart and spine.
    fn brightness(&self, [v, u]: [f64; 2], depth: f64) -> f64 {
        // The trunk widens from the neck over the shoulders.
        let half = 0.26 + 0.68 * smooth(-1.0, -self.shoulder, v);
        let trunk = smooth(0.03, -0.03, u.abs() - half);
        let tissue = 0.56 + 0.10 * smooth(0.0, 0.9, v) - 0.10 * u * u;
        let air = smooth(-0.02, 0.05, depth);
        let lung = 0.20 + 0.07 * v + 0.05 * u.abs();
        let [hv, hu, rv, ru] = self.heart;
        let heart = smooth(1.08, 0.8, ((v - hv) / rv).hypot((u - hu) / ru));
        let mediastinum = smooth(self.mediastinum + 0.04, self.mediastinum - 0.03, u.abs());
        let vertebrae = smooth(0.10, 0.06, u.abs()) * (0.06 + 0.03 * (v * 9.0 * PI).cos());
        let body = tissue * (1.0 - air) + lung * air;
        let body = body + (0.70 - body).max(0.0) * heart.max(mediastinum) * (1.0 - air) + vertebrae;
        0.04 + (body - 0.04) * trunk
    }
}

/// Bones, vessels, and what looks like a lesion and is none.
struct Anatomy {
    /// Where each rib leaves the spine, how steeply it falls, and how bright it is.
    ribs: Vec<[f64; 3]>,
    clavicles: [[f64; 2]; 2],
    /// Beginning, end and width of branches of vessels.
    vessels: Vec<([f64; 2], [f64; 2], f64)>,
    /// Place, radius and brightness of small discs.
    discs: Vec<([f64; 2], f64, f64)>,
}

impl Anatomy {
    fn draw(body: &Body, rng: &mut impl Rng) -> Self {
        let count = rng.random_range(8..=10);
        let spacing = 1.5 / f64::from(count);
        let ribs = (0..count)
            .map(|number| {
                let start = -0.92 + spacing * (f64::from(number) + rng.random_range(-0.08..0.08));
                [start, rng.random_range(0.20..0.30), rng.random_range(0.06..0.11)]
            })
            .collect();
        let clavicles = [-1.0, 1.0].map(|_| [rng.random_range(-0.72..-0.64), rng.random_range(-0.26..-0.14)]);
        let mut vessels = Vec::new();
        for lung in &body.lungs {
            let side = lung.centre[1].signum();
            let hilum = [lung.centre[0] + 0.10, side * (body.mediastinum + 0.03)];
            for fan in 0..6 {
                let angle = (f64::from(fan) - 2.5) * 0.42 + rng.random_range(-0.15..0.15);
                grow(&mut vessels, hilum, angle, side, 0.024, 3, rng);
            }
        }
        let mut discs = Vec::new();
        // Vessels seen end-on, near the hila.
        for lung in &body.lungs {
            for _ in 0..rng.random_range(1..=3) {
                let place = [
                    lung.centre[0] + rng.random_range(-0.05..0.35),
                    lung.centre[1] - lung.centre[1].signum() * rng.random_range(0.05..0.22),
                ];
                discs.push((place, rng.random_range(0.016..0.026), 0.22));
            }
        }
        if rng.random::<f64>() < 0.3 {
            let lung = &body.lungs[usize::from(rng.random::<bool>())];
            let place = [
                lung.centre[0] + rng.random_range(-0.3..0.3),
                lung.centre[1] + rng.random_range(-0.15..0.15),
            ];
            discs.push((place, 0.022, 0.5)); // a calcified node
        }
        Self { ribs, clavicles, vessels, discs }
    }

    fn brightness(&self, body: &Body, [v, u]: [f64; 2], depth: f64) -> f64 {
        let side = u.abs();
        let chest = smooth(0.92, 0.84, side) * smooth(0.04, 0.10, side);
        let ribs: f64 = self
            .ribs
            .iter()
            .map(|&[start, fall, light]| {
                // Behind, a rib rises a little from the spine and then falls.
                let away = (v - (start - 0.12 * side + fall * (1.9 * side).powi(2) * 0.55)).abs();
                let width = 0.036 - 0.010 * side;
                // The rim of a rib is brighter than its middle.
                light * (smooth(width, width * 0.55, away) - 0.35 * smooth(width * 0.6, 0.0, away))
            })
            .sum();
        let [height, slope] = self.clavicles[usize::from(u > 0.0)];
        let clavicle = (v - (height + slope * side + 0.06 * (side * 7.0).sin() * side)).abs();
        let clavicle =
            0.16 * smooth(0.045, 0.025, clavicle) * smooth(0.06, 0.10, side) * smooth(0.86, 0.78, side);
        let trunk = smooth(0.02, -0.02, side - (0.26 + 0.68 * smooth(-1.0, -body.shoulder, v)));
        let mut value = (ribs * chest + clavicle) * trunk;
        if depth > 0.0 {
            let edge = smooth(0.0, 0.04, depth);
            let vessel = self.vessels.iter().map(|&(a, b, width)| {
                let away = distance_to_segment([v, u], a, b);
                smooth(width, width * 0.3, away) * (0.10 + 2.0 * width)
            });
            value += edge * vessel.fold(0.0, f64::max);
            let discs =
                self.discs.iter().map(|&(at, radius, light)| light * blob([v - at[0], u - at[1]], radius));
            value += edge * discs.sum::<f64>();
        }
        value
    }
}

/// A branch of a vessel and what grows out of it.
fn grow(
    vessels: &mut Vec<([f64; 2], [f64; 2], f64)>,
    from: [f64; 2],
    angle: f64,
    side: f64,
    width: f64,
    generations: usize,
    rng: &mut impl Rng,
) {
    let length = rng.random_range(0.13..0.20) * (width / 0.024).sqrt();
    let to = [from[0] + length * angle.sin(), from[1] + side * length * angle.cos()];
    vessels.push((from, to, width));
    if generations > 0 {
        for turn in [-1.0, 1.0] {
            let turn = turn * rng.random_range(0.15..0.5);
            grow(vessels, to, angle + turn, side, width * 0.68, generations - 1, rng);
        }
    }
}

fn distance_to_segment(p: [f64; 2], a: [f64; 2], b: [f64; 2]) -> f64 {
    let (along, to) = ([b[0] - a[0], b[1] - a[1]], [p[0] - a[0], p[1] - a[1]]);
    let length = along[0] * along[0] + along[1] * along[1];
    let t = ((along[0] * to[0] + along[1] * to[1]) / length).clamp(0.0, 1.0);
    (to[0] - t * along[0]).hypot(to[1] - t * along[1])
}

/// Signs of tuberculosis.
#[derive(Default)]
struct Lesions {
    signs: Vec<Sign>,
    /// Place, radius and brightness of patches and nodules.
    patches: Vec<([f64; 2], f64, f64)>,
    /// Place, radius and thickness of rings.
    rings: Vec<([f64; 2], f64, f64)>,
    /// Lung and height of fluid.
    fluid: Option<(usize, f64)>,
}

impl Lesions {
    fn draw(body: &Body, rng: &mut impl Rng) -> Self {
        let mut lesions = Self::default();
        let chances =
            [(Sign::Infiltrate, 0.65), (Sign::Cavity, 0.35), (Sign::Miliary, 0.15), (Sign::Effusion, 0.20)];
        while lesions.signs.is_empty() {
            lesions.signs =
                chances.iter().filter(|(_, p)| rng.random::<f64>() < *p).map(|(sign, _)| *sign).collect();
        }
        for sign in lesions.signs.clone() {
            let side = usize::from(rng.random::<bool>());
            match sign {
                Sign::Infiltrate => {
                    let middle = inside(body, side, [-0.55, -0.15], rng);
                    for _ in 0..rng.random_range(3..=6) {
                        let place = middle.map(|at| at + rng.random_range(-0.14..0.14));
                        let radius = rng.random_range(INFILTRATE[0]..INFILTRATE[1]);
                        lesions.patches.push((place, radius, LESION * rng.random_range(0.7..1.0)));
                    }
                }
                Sign::Cavity => {
                    let middle = inside(body, side, [-0.50, 0.10], rng);
                    lesions.rings.push((middle, rng.random_range(0.09..0.15), rng.random_range(0.03..0.05)));
                }
                Sign::Miliary => {
                    for number in 0..120 {
                        let place = inside(body, number % 2, [-0.65, 0.60], rng);
                        lesions.patches.push((place, rng.random_range(0.018..0.032), 0.30));
                    }
                }
                Sign::Effusion => lesions.fluid = Some((side, rng.random_range(0.10..0.26))),
            }
        }
        lesions
    }

    fn brightness(&self, body: &Body, [v, u]: [f64; 2]) -> f64 {
        let patches =
            self.patches.iter().map(|&(at, radius, light)| light * blob([v - at[0], u - at[1]], radius));
        let rings = self.rings.iter().map(|&(at, radius, thick)| {
            let away = (v - at[0]).hypot(u - at[1]);
            LESION * (-((away - radius) / thick).powi(2)).exp() - 0.06 * smooth(radius, 0.0, away)
        });
        let fluid = self.fluid.iter().map(|&(side, height)| {
            let lung = &body.lungs[side];
            if (u > 0.0) != (side == 1) {
                return 0.0;
            }
            // The surface rises towards the chest wall.
            let outward = (u - lung.centre[1]) * lung.centre[1].signum() / lung.radii[1];
            let surface = lung.centre[0] + lung.dome[0] + 0.10 - height * (0.7 + 0.6 * outward.max(-1.0));
            0.40 * smooth(surface - 0.03, surface + 0.05, v)
        });
        (patches.sum::<f64>() + rings.sum::<f64>() + fluid.sum::<f64>()).min(0.6)
    }
}

/// A place well inside a lung, between two heights relative to its middle.
fn inside(body: &Body, side: usize, [high, low]: [f64; 2], rng: &mut impl Rng) -> [f64; 2] {
    let lung = &body.lungs[side];
    for _ in 0..100 {
        let place = [
            lung.centre[0] + rng.random_range(high..low),
            lung.centre[1] + rng.random_range(-1.0..1.0) * lung.radii[1],
        ];
        if body.lung_depth(place) > 0.04 {
            return place;
        }
    }
    [lung.centre[0] + (high + low) / 2.0, lung.centre[1]]
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn a_stream_gives_the_same_patient_with_and_without_marker_and_at_every_size() {
        let one = draw(true, false, 96, &mut random_stream(0, "phantom", 3));
        assert_eq!(one, draw(true, false, 96, &mut random_stream(0, "phantom", 3)));
        let marked = draw(true, true, 96, &mut random_stream(0, "phantom", 3));
        assert_eq!((&marked.lungs, &marked.signs), (&one.lungs, &one.signs));
        let changed = one.pixels.iter().zip(&marked.pixels).zip(&one.lungs.lung).filter(|((a, b), _)| a != b);
        let lungs: Vec<bool> = changed.map(|(_, lung)| *lung).collect();
        assert!(lungs.len() > 60 && !lungs.contains(&true), "the marker lies outside the lungs");
        let large = draw(true, false, 192, &mut random_stream(0, "phantom", 3));
        let agree = crate::masks::MaskMetrics::of(&large.lungs.resized([96, 96]), &one.lungs);
        assert!(agree.dice > 0.98 && large.signs == one.signs, "{agree:?}");
    }

    #[test]
    fn lungs_are_two_parts_of_a_fair_size_and_only_the_ill_have_signs() {
        for number in 0..40 {
            let phantom = draw(number % 2 == 0, false, 64, &mut random_stream(1, "phantom", number));
            assert_eq!(phantom.is_tb(), number % 2 == 0);
            let fraction = phantom.lungs.fraction();
            assert!((0.12..0.42).contains(&fraction), "{fraction}");
            let cleaned = phantom.lungs.cleaned().fraction();
            assert!((cleaned - fraction).abs() < 0.01, "{cleaned} of {fraction}");
            assert!(phantom.pixels.iter().all(|x| (0.0..=1.0).contains(x)));
        }
    }
}
