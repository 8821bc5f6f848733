//! Pictures of stamps as people know them: science and template in grey, the difference in blue and red.

use std::io::Cursor;

use image::{ImageFormat, Rgb, RgbImage};
use kiln_core::{Error, Result};
use kiln_data::fits::FitsImage;

/// Screen pixels of a pixel,
const SCALE: u32 = 5;
/// and between the stamps.
const GAP: u32 = 10;
/// Shares of the pixels below which all is black, and above which all is white.
const RANGE: [f64; 2] = [0.01, 0.995];
/// Where the stretch of the images turns from linear to logarithmic, as a part of the range,
const SOFTNESS: f64 = 0.1;
/// and that of the difference, whose noise should not look like anything.
const DIFFERENCE_SOFTNESS: f64 = 1.0;

/// A PNG of the stamps side by side, each with a stretch of its own. The first row of the data is at the bottom, as in
/// FITS viewers.
///
/// # Errors
/// When the encoder fails.
pub fn png(stamps: &[FitsImage; 3]) -> Result<Vec<u8>> {
    let width: u32 = stamps.iter().map(|s| s.width as u32 * SCALE).sum::<u32>() + 2 * GAP;
    let height = stamps.iter().map(|s| s.height as u32).max().unwrap_or(0) * SCALE;
    let mut picture = RgbImage::from_pixel(width, height, Rgb([255; 3]));
    let mut left = 0;
    for (number, stamp) in stamps.iter().enumerate() {
        let colour: Box<dyn Fn(f32) -> Rgb<u8>> =
            if number == 2 { Box::new(diverging(&stamp.pixels)) } else { Box::new(grey(&stamp.pixels)) };
        for row in 0..stamp.height as u32 {
            for column in 0..stamp.width as u32 {
                let shade = colour(stamp.pixels[(row * stamp.width as u32 + column) as usize]);
                let top = (stamp.height as u32 - 1 - row) * SCALE;
                for (x, y) in (0..SCALE * SCALE).map(|i| (i % SCALE, i / SCALE)) {
                    picture.put_pixel(left + column * SCALE + x, top + y, shade);
                }
            }
        }
        left += stamp.width as u32 * SCALE + GAP;
    }
    let mut bytes = Cursor::new(Vec::new());
    picture
        .write_to(&mut bytes, ImageFormat::Png)
        .map_err(|e| Error::work("cannot draw the stamps").caused_by(e))?;
    Ok(bytes.into_inner())
}

/// The finite pixels' values at these shares of them.
fn quantiles<const N: usize>(pixels: &[f32], shares: [f64; N]) -> [f64; N] {
    let mut sorted: Vec<f64> = pixels.iter().filter(|p| p.is_finite()).map(|&p| f64::from(p)).collect();
    sorted.sort_by(f64::total_cmp);
    shares.map(|share| {
        let at = (sorted.len().saturating_sub(1) as f64 * share).round() as usize;
        sorted.get(at).copied().unwrap_or(0.0)
    })
}

/// From 0 to 1, the steeper near 0 the smaller `softness` is.
fn stretch(x: f64, softness: f64) -> f64 {
    (x.clamp(0.0, 1.0) / softness).asinh() / (1.0 / softness).asinh()
}

/// What has no value.
const NO_VALUE: Rgb<u8> = Rgb([255, 214, 102]);

fn grey(pixels: &[f32]) -> impl Fn(f32) -> Rgb<u8> + use<> {
    let [low, high] = quantiles(pixels, RANGE);
    let range = if high > low { high - low } else { 1.0 };
    move |pixel| match pixel.is_nan() {
        true => NO_VALUE,
        false => Rgb([(stretch((f64::from(pixel) - low) / range, SOFTNESS) * 255.0) as u8; 3]),
    }
}

fn diverging(pixels: &[f32]) -> impl Fn(f32) -> Rgb<u8> + use<> {
    let [low, high] = quantiles(pixels, [1.0 - RANGE[1], RANGE[1]]);
    let range = low.abs().max(high.abs()).max(f64::MIN_POSITIVE);
    move |pixel| {
        if pixel.is_nan() {
            return NO_VALUE;
        }
        let strength = stretch((f64::from(pixel) / range).abs(), DIFFERENCE_SOFTNESS);
        let [r, g, b] = if pixel > 0.0 { [178.0, 24.0, 43.0] } else { [33.0, 102.0, 172.0] };
        Rgb([r, g, b].map(|end: f64| (255.0 + (end - 255.0) * strength) as u8))
    }
}
