//! Further images of the rarer class: turned, moved and scaled a little.

use rand::{Rng, RngExt};

/// Degrees by which images turn, either way,
const ROTATION: [f64; 2] = [5.0, 15.0];
/// shares of their sides by which they move, either way,
const SHIFT: [f64; 2] = [0.05, 0.15];
/// and the most by which they grow or shrink.
const ZOOM: f64 = 0.10;

/// A transform of square planes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Transform {
    /// Degrees, clockwise.
    pub rotation: f64,
    /// Shares of the side, downwards and to the right.
    pub shift: [f64; 2],
    /// Factor.
    pub zoom: f64,
}

impl Transform {
    /// The transform that leaves everything where it is.
    pub const NONE: Self = Self { rotation: 0.0, shift: [0.0; 2], zoom: 1.0 };

    /// A transform of the paper's ranges.
    pub fn draw(rng: &mut impl Rng) -> Self {
        let mut either_way = |[low, high]: [f64; 2]| {
            let size = rng.random_range(low..=high);
            if rng.random() { size } else { -size }
        };
        let rotation = either_way(ROTATION);
        let shift = [either_way(SHIFT), either_way(SHIFT)];
        Self { rotation, shift, zoom: 1.0 + rng.random_range(-ZOOM..=ZOOM) }
    }

    /// What the transform is in a mirror.
    #[must_use]
    pub fn mirrored(self) -> Self {
        Self { rotation: -self.rotation, shift: [self.shift[0], -self.shift[1]], ..self }
    }

    /// Where a pixel of the transformed plane comes from, in pixels from the upper left one.
    fn origin(&self, y: usize, x: usize, size: usize) -> [f64; 2] {
        let centre = (size as f64 - 1.0) / 2.0;
        let [dy, dx] = [
            y as f64 - centre - self.shift[0] * size as f64,
            x as f64 - centre - self.shift[1] * size as f64,
        ];
        let (sin, cos) = self.rotation.to_radians().sin_cos();
        [(cos * dy - sin * dx) / self.zoom + centre, (sin * dy + cos * dx) / self.zoom + centre]
    }

    /// The plane transformed, between pixels; what comes from outside is as the nearest border.
    pub fn image(&self, plane: &[f32], size: usize) -> Vec<f32> {
        let last = size as f64 - 1.0;
        self.each(size, |[y, x]| {
            let (y, x) = (y.clamp(0.0, last), x.clamp(0.0, last));
            let (top, left) = (y as usize, x as usize);
            let (below, right) = ((top + 1).min(size - 1), (left + 1).min(size - 1));
            let (v, u) = ((y - top as f64) as f32, (x - left as f64) as f32);
            let at = |y: usize, x: usize| plane[y * size + x];
            let upper = at(top, left) * (1.0 - u) + at(top, right) * u;
            let lower = at(below, left) * (1.0 - u) + at(below, right) * u;
            upper * (1.0 - v) + lower * v
        })
    }

    /// A mask transformed, by the nearest pixel; outside is no lung.
    pub fn mask(&self, plane: &[f32], size: usize) -> Vec<f32> {
        self.each(size, |[y, x]| {
            let (y, x) = (y.round(), x.round());
            let inside = |at: f64| at >= 0.0 && at < size as f64;
            if inside(y) && inside(x) { plane[y as usize * size + x as usize] } else { 0.0 }
        })
    }

    fn each(&self, size: usize, value: impl Fn([f64; 2]) -> f32) -> Vec<f32> {
        (0..size)
            .flat_map(|y| (0..size).map(move |x| (y, x)))
            .map(|(y, x)| value(self.origin(y, x, size)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    fn flipped(plane: &[f32], size: usize) -> Vec<f32> {
        plane.chunks(size).flat_map(|row| row.iter().rev().copied()).collect()
    }

    #[test]
    fn flips_commute_with_transforms_in_the_mirror() {
        const SIZE: usize = 17;
        let mut rng = random_stream(0, "augment", 0);
        for _ in 0..20 {
            let transform = Transform::draw(&mut rng);
            let mask: Vec<f32> =
                (0..SIZE * SIZE).map(|_| f32::from(u8::from(rng.random::<f32>() < 0.4))).collect();
            let one = transform.mirrored().mask(&flipped(&mask, SIZE), SIZE);
            assert_eq!(one, flipped(&transform.mask(&mask, SIZE), SIZE));
            let image: Vec<f32> = (0..SIZE * SIZE).map(|_| rng.random()).collect();
            let one = transform.mirrored().image(&flipped(&image, SIZE), SIZE);
            let other = flipped(&transform.image(&image, SIZE), SIZE);
            assert!(one.iter().zip(&other).all(|(a, b)| (a - b).abs() < 1e-5));
        }
        let image: Vec<f32> = (0..SIZE * SIZE).map(|i| i as f32).collect();
        assert_eq!(Transform::NONE.image(&image, SIZE), image);
        assert_eq!(Transform::NONE.mask(&image, SIZE), image);
    }

    #[test]
    fn transforms_stay_in_their_ranges_and_turn_clockwise() {
        let mut rng = random_stream(0, "augment", 1);
        for _ in 0..100 {
            let t = Transform::draw(&mut rng);
            assert!((5.0..=15.0).contains(&t.rotation.abs()) && (0.9..=1.1).contains(&t.zoom));
            assert!(t.shift.iter().all(|s| (0.05..=0.15).contains(&s.abs())));
        }
        let mut dot = vec![0.0; 9];
        dot[1] = 1.0; // above the middle
        let turned = Transform { rotation: 90.0, ..Transform::NONE }.mask(&dot, 3);
        assert_eq!(turned[5], 1.0); // right of it
    }
}
