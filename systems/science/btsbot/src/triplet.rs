//! The three stamps of an alert as a network sees them: science, template, difference.

use kiln_data::fits::FitsImage;

/// Pixels of a side.
pub const SIDE: usize = 63;
/// What is written around stamps from the edge of a detector.
const PADDING: f32 = 1e-9;
/// What the stamps are called, in order.
pub const STAMPS: [&str; 3] = ["science", "template", "difference"];

/// Three stamps `[3, side, side]`, each of norm 1 before padding.
#[derive(Debug, Clone, PartialEq)]
pub struct Triplet {
    /// Pixels of a side.
    pub side: usize,
    /// Channel by channel, row by row.
    pub pixels: Vec<f32>,
}

impl Triplet {
    /// Normalises and pads the stamps.
    ///
    /// # Errors
    /// When one is corrupted or too large, by its name.
    pub fn from_stamps(stamps: [&FitsImage; 3]) -> Result<Self, String> {
        let mut pixels = Vec::with_capacity(3 * SIDE * SIDE);
        for (name, stamp) in STAMPS.into_iter().zip(stamps) {
            let normalised = normalise(&stamp.pixels);
            if let Some(reason) = normalised.corrupted {
                return Err(format!("the {name} stamp {reason}"));
            }
            if stamp.width > SIDE || stamp.height > SIDE {
                return Err(format!(
                    "the {name} stamp has {} x {} pixels, more than {SIDE} x {SIDE}",
                    stamp.width, stamp.height
                ));
            }
            for row in normalised.pixels.chunks(stamp.width) {
                pixels.extend(row);
                pixels.resize(pixels.len() + SIDE - stamp.width, PADDING);
            }
            pixels.resize(pixels.len() + (SIDE - stamp.height) * SIDE, PADDING);
        }
        Ok(Self { side: SIDE, pixels })
    }

    /// The middle `side` × `side` pixels, with norm 1 again where they are not all 0.
    ///
    /// # Panics
    /// When `side` is not odd or larger than this triplet's.
    #[must_use]
    pub fn cropped(&self, side: usize) -> Self {
        assert!(side % 2 == 1 && side <= self.side, "cannot crop {} pixels to {side}", self.side);
        if side == self.side {
            return self.clone();
        }
        let margin = (self.side - side) / 2;
        let mut pixels = Vec::with_capacity(3 * side * side);
        for channel in self.pixels.chunks(self.side * self.side) {
            let begin = pixels.len();
            for row in channel.chunks(self.side).skip(margin).take(side) {
                pixels.extend(&row[margin..margin + side]);
            }
            let norm = norm(&pixels[begin..]);
            if norm > 0.0 {
                pixels[begin..].iter_mut().for_each(|pixel| *pixel = (f64::from(*pixel) / norm) as f32);
            }
        }
        Self { side, pixels }
    }
}

/// A stamp after normalisation.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalised {
    /// Pixels, of norm 1 where they are not all 0.
    pub pixels: Vec<f32>,
    /// Why the alert should not be used.
    pub corrupted: Option<&'static str>,
}

/// Takes NaN for 0 and infinities for the largest number, and divides by the norm of all pixels.
///
/// A stamp is corrupted when the median of its pixels is not finite or all of them are 0.
pub fn normalise(pixels: &[f32]) -> Normalised {
    let count = |is: fn(f32) -> bool| pixels.iter().filter(|&&pixel| is(pixel)).count();
    let (numbers, below, above) =
        (count(|p| !p.is_nan()), count(|p| p == f32::NEG_INFINITY), count(|p| p == f32::INFINITY));
    // The median lies at these places of the sorted numbers, of which the infinite ones come first and last.
    let middle = [numbers.saturating_sub(1) / 2, numbers / 2];
    let finite_median = numbers > 0 && middle.iter().all(|&at| at >= below && at < numbers - above);
    let finite: Vec<f32> =
        pixels.iter().map(|&p| if p.is_nan() { 0.0 } else { p.clamp(f32::MIN, f32::MAX) }).collect();
    let norm = norm(&finite);
    let corrupted = match (numbers, finite_median, norm) {
        (0, _, _) => Some("has no pixel that is a number"),
        (_, false, _) => Some("is infinite at its median"),
        (_, _, 0.0) => Some("is 0 everywhere"),
        _ => None,
    };
    let scale = if norm > 0.0 { norm } else { 1.0 };
    Normalised { pixels: finite.iter().map(|&p| (f64::from(p) / scale) as f32).collect(), corrupted }
}

fn norm(pixels: &[f32]) -> f64 {
    pixels.iter().map(|&p| f64::from(p).powi(2)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::RngExt;

    fn stamp(width: usize, height: usize, seed: u64) -> FitsImage {
        let mut rng = kiln_core::random_stream(seed, "stamp", 0);
        FitsImage {
            width,
            height,
            pixels: (0..width * height).map(|_| rng.random_range(-5.0..90.0)).collect(),
        }
    }

    #[test]
    fn stamps_have_norm_one_and_a_scale_changes_nothing() {
        let stamps = [stamp(SIDE, SIDE, 0), stamp(50, SIDE, 1), stamp(SIDE, 40, 2)];
        let triplet = Triplet::from_stamps([&stamps[0], &stamps[1], &stamps[2]]).unwrap();
        assert_eq!(triplet.pixels.len(), 3 * SIDE * SIDE);
        for (channel, stamp) in triplet.pixels.chunks(SIDE * SIDE).zip(&stamps) {
            let padded = SIDE * SIDE - stamp.width * stamp.height;
            assert_eq!(channel.iter().filter(|&&p| p == PADDING).count(), padded);
            assert!((norm(channel) - 1.0).abs() < 1e-6);
            // The padding lies at the right and at the bottom.
            assert!(channel[0] != PADDING && (padded == 0) == (channel[SIDE * SIDE - 1] != PADDING));
        }
        let mut scaled = stamps.clone();
        scaled.iter_mut().for_each(|stamp| stamp.pixels.iter_mut().for_each(|p| *p *= 37.25));
        let again = Triplet::from_stamps([&scaled[0], &scaled[1], &scaled[2]]).unwrap();
        let difference = triplet.pixels.iter().zip(&again.pixels).map(|(a, b)| (a - b).abs());
        assert!(difference.fold(0.0, f32::max) < 1e-6);
        for channel in triplet.cropped(31).pixels.chunks(31 * 31) {
            assert!((norm(channel) - 1.0).abs() < 1e-6);
        }
        assert_eq!(triplet.cropped(SIDE), triplet);
    }

    #[test]
    fn corrupted_stamps_are_named() {
        let good = stamp(SIDE, SIDE, 0);
        let of = |pixels: Vec<f32>| {
            let bad = FitsImage { width: SIDE, height: SIDE, pixels };
            Triplet::from_stamps([&good, &bad, &good]).map(|_| ())
        };
        let count = SIDE * SIDE;
        assert!(of(vec![f32::NAN; count]).unwrap_err().contains("the template stamp has no pixel"));
        assert!(of(vec![0.0; count]).unwrap_err().contains("0 everywhere"));
        assert!(of(vec![f32::INFINITY; count]).unwrap_err().contains("infinite"));
        let mut some = good.pixels.clone();
        some[..10].fill(f32::NAN);
        some[10..20].fill(f32::NEG_INFINITY);
        assert_eq!(of(some), Ok(()));
        let large = stamp(SIDE + 1, SIDE, 0);
        assert!(Triplet::from_stamps([&good, &good, &large]).unwrap_err().contains("64 x 63"));
    }
}
