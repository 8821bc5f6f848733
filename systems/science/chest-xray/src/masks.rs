//! Lung masks: from probabilities, cleaned up, and beside the truth.

use serde::Serialize;

/// Share of the image below which lungs count as not found.
pub const LEAST_LUNG: f64 = 0.05;
/// Lungs have two parts.
const PARTS: usize = 2;
/// Margin around the lungs when an image is cut to them, as a share of their extent.
const MARGIN: f64 = 0.05;

/// Share of pixels between black and white above which a picture is hardly a mask. Compressed and shrunk ones have some at
/// their outlines.
pub const MOST_GREY: f64 = 0.1;

/// Share of pixels that are neither nearly black nor nearly white.
pub fn grey_share(pixels: &[f32]) -> f64 {
    let grey = pixels.iter().filter(|pixel| (0.1..0.9).contains(*pixel)).count();
    grey as f64 / pixels.len().max(1) as f64
}

/// Which pixels are lung.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// `[height, width]`
    pub lung: Vec<bool>,
}

impl Mask {
    /// Pixels of at least a half.
    ///
    /// # Panics
    /// When the pixels do not fill the plane.
    pub fn of(pixels: &[f32], [height, width]: [usize; 2]) -> Self {
        assert_eq!(pixels.len(), height * width, "a mask must fill {height} x {width}");
        Self { height, width, lung: pixels.iter().map(|&p| p >= 0.5).collect() }
    }

    /// 1 for lung, 0 elsewhere.
    pub fn to_plane(&self) -> Vec<f32> {
        self.lung.iter().map(|&lung| f32::from(u8::from(lung))).collect()
    }

    /// The same with rows and columns of another size, by the nearest pixel.
    #[must_use]
    pub fn resized(&self, [height, width]: [usize; 2]) -> Self {
        let near = |at: usize, from: usize, to: usize| (2 * at + 1) * from / (2 * to);
        let lung = (0..height)
            .flat_map(|y| (0..width).map(move |x| (y, x)))
            .map(|(y, x)| self.lung[near(y, self.height, height) * self.width + near(x, self.width, width)])
            .collect();
        Self { height, width, lung }
    }

    /// Share of the image that is lung.
    pub fn fraction(&self) -> f64 {
        self.lung.iter().filter(|&&lung| lung).count() as f64 / self.lung.len().max(1) as f64
    }

    /// Only the two largest connected parts, without holes.
    #[must_use]
    pub fn cleaned(&self) -> Self {
        let mut parts = self.parts(|lung| lung);
        parts.sort_by_key(|part| std::cmp::Reverse(part.len()));
        let mut kept = Self { lung: vec![false; self.lung.len()], ..self.clone() };
        for &pixel in parts.iter().take(PARTS).flatten() {
            kept.lung[pixel] = true;
        }
        // What is not lung and does not reach the border is a hole.
        for part in kept.parts(|lung| !lung) {
            let at_border = |&pixel: &usize| {
                let (y, x) = (pixel / self.width, pixel % self.width);
                y == 0 || x == 0 || y == self.height - 1 || x == self.width - 1
            };
            if !part.iter().any(at_border) {
                part.into_iter().for_each(|pixel| kept.lung[pixel] = true);
            }
        }
        kept
    }

    /// Connected parts (over the four sides) of the pixels that `belongs` accepts.
    fn parts(&self, belongs: impl Fn(bool) -> bool) -> Vec<Vec<usize>> {
        let mut seen = vec![false; self.lung.len()];
        let mut parts = Vec::new();
        for start in 0..self.lung.len() {
            if seen[start] || !belongs(self.lung[start]) {
                continue;
            }
            seen[start] = true;
            let mut part = vec![start];
            let mut next = 0;
            while next < part.len() {
                let (y, x) = (part[next] / self.width, part[next] % self.width);
                next += 1;
                let sides = [
                    (y > 0).then(|| (y - 1, x)),
                    (y + 1 < self.height).then_some((y + 1, x)),
                    (x > 0).then(|| (y, x - 1)),
                    (x + 1 < self.width).then_some((y, x + 1)),
                ];
                for (y, x) in sides.into_iter().flatten() {
                    let pixel = y * self.width + x;
                    if !seen[pixel] && belongs(self.lung[pixel]) {
                        seen[pixel] = true;
                        part.push(pixel);
                    }
                }
            }
            parts.push(part);
        }
        parts
    }

    /// Rows and columns (first, and one behind the last) of the lungs with a margin; none without lung.
    pub fn bounds(&self) -> Option<[[usize; 2]; 2]> {
        let rows = (0..self.height).filter(|y| self.lung[y * self.width..][..self.width].contains(&true));
        let columns =
            (0..self.width).filter(|x| self.lung.iter().skip(*x).step_by(self.width).any(|&lung| lung));
        let span = |mut places: Box<dyn Iterator<Item = usize> + '_>, extent: usize| {
            let first = places.next()?;
            let last = places.last().unwrap_or(first) + 1;
            let margin = (MARGIN * (last - first) as f64).round() as usize;
            Some([first.saturating_sub(margin), (last + margin).min(extent)])
        };
        Some([span(Box::new(rows), self.height)?, span(Box::new(columns), self.width)?])
    }
}

/// How well a mask fits the truth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MaskMetrics {
    /// `2 |A ∩ B| / (|A| + |B|)`
    pub dice: f64,
    /// `|A ∩ B| / |A ∪ B|`
    pub iou: f64,
    /// Share of pixels on which the two agree.
    pub accuracy: f64,
}

impl MaskMetrics {
    /// Of two masks of one size; two empty ones fit wholly.
    ///
    /// # Panics
    /// When they differ in size.
    pub fn of(found: &Mask, truth: &Mask) -> Self {
        assert_eq!((found.height, found.width), (truth.height, truth.width), "masks must have one size");
        let pairs = || found.lung.iter().zip(&truth.lung);
        let both = pairs().filter(|(a, b)| **a && **b).count() as f64;
        let either = pairs().filter(|(a, b)| **a || **b).count() as f64;
        let agree = pairs().filter(|(a, b)| a == b).count() as f64;
        let share = |a: f64, b: f64| if b == 0.0 { 1.0 } else { a / b };
        Self {
            dice: share(2.0 * both, both + either),
            iou: share(both, either),
            accuracy: share(agree, found.lung.len() as f64),
        }
    }

    /// The mean over images.
    pub fn mean(all: &[Self]) -> Option<Self> {
        let n = all.len() as f64;
        let mean = |of: fn(&Self) -> f64| all.iter().map(of).sum::<f64>() / n;
        (n > 0.0).then(|| Self {
            dice: mean(|m| m.dice),
            iou: mean(|m| m.iou),
            accuracy: mean(|m| m.accuracy),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_are_told_from_radiographs() {
        let ramp: Vec<f32> = (0..100).map(|i| i as f32 / 99.0).collect();
        assert!((grey_share(&ramp) - 0.8).abs() < 0.02);
        assert_eq!(grey_share(&[0.0, 1.0, 0.95, 0.02]), 0.0);
        assert_eq!(grey_share(&[]), 0.0);
    }

    fn mask(rows: &[&str]) -> Mask {
        let lung = rows.iter().flat_map(|row| row.bytes().map(|byte| byte == b'#')).collect();
        Mask { height: rows.len(), width: rows[0].len(), lung }
    }

    #[test]
    fn cleaning_keeps_two_parts_and_fills_holes() {
        let found = mask(&[
            "###...#", //
            "#.#...#", "###.#..", ".......", "...##..",
        ]);
        let expected = mask(&[
            "###....", //
            "###....", "###....", ".......", "...##..",
        ]);
        let cleaned = found.cleaned();
        // Of parts of two pixels the first is kept.
        let other = mask(&["###...#", "###...#", "###....", ".......", "......."]);
        assert!(cleaned == expected || cleaned == other, "{cleaned:?}");
        assert_eq!(mask(&["...", "..."]).cleaned().fraction(), 0.0);
        assert_eq!(mask(&["...", "..."]).bounds(), None);
        assert_eq!(expected.bounds(), Some([[0, 5], [0, 5]]));
    }

    #[test]
    fn resizing_takes_the_nearest_pixel() {
        let small = mask(&["#.", ".#"]);
        assert_eq!(small.resized([4, 4]), mask(&["##..", "##..", "..##", "..##"]));
        assert_eq!(small.resized([4, 4]).resized([2, 2]), small);
    }
}
