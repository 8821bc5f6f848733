//! The 1797 handwritten digits of 8 × 8 pixels, embedded so that experiments run without any download. Provenance and
//! licence are in `assets/README.md`.

use std::io::Read;
use std::sync::LazyLock;

use flate2::read::GzDecoder;

/// One byte a pixel, 0 to 16, then one for the label, for every image.
const PACKED: &[u8] = include_bytes!("../assets/digits.gz");
/// Pixels of an image.
pub const PIXELS: usize = 64;
/// Images that are trained on, by custom; the later ones were written by other people.
const TRAIN: usize = 1437;

/// Images and their labels.
#[derive(Debug, Clone, Copy)]
pub struct Digits {
    /// Row by row, 0 to 1, `[images, 64]`
    pub pixels: &'static [f32],
    /// 0 to 9, `[images]`
    pub labels: &'static [u8],
}

static ALL: LazyLock<(Vec<f32>, Vec<u8>)> = LazyLock::new(|| {
    let mut bytes = Vec::new();
    GzDecoder::new(PACKED).read_to_end(&mut bytes).expect("the embedded digits are intact");
    let pixels = bytes.chunks(PIXELS + 1).flat_map(|row| row[..PIXELS].iter().map(|&p| f32::from(p) / 16.0));
    (pixels.collect(), bytes.chunks(PIXELS + 1).map(|row| row[PIXELS]).collect())
});

/// The first 1437 images.
pub fn train() -> Digits {
    Digits { pixels: &ALL.0[..TRAIN * PIXELS], labels: &ALL.1[..TRAIN] }
}

/// The last 360 images.
pub fn test() -> Digits {
    Digits { pixels: &ALL.0[TRAIN * PIXELS..], labels: &ALL.1[TRAIN..] }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_images_are_the_published_ones() {
        assert_eq!((train().labels.len(), test().labels.len()), (1437, 360));
        // First row of the first image: 0 0 5 13 9 1 0 0.
        assert_eq!(
            train().pixels[..6].iter().map(|p| p * 16.0).collect::<Vec<_>>(),
            [0.0, 0.0, 5.0, 13.0, 9.0, 1.0]
        );
        let mut counts = [0; 10];
        train().labels.iter().chain(test().labels).for_each(|&label| counts[usize::from(label)] += 1);
        assert_eq!(counts, [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]);
        assert!(ALL.0.iter().all(|p| (0.0..=1.0).contains(p)));
    }
}
