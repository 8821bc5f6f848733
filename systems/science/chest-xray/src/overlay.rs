//! Pictures for people: maps over radiographs, and outlines of lungs.

use kiln_data::Picture;

use crate::bilinear::resize_plane;
use crate::cam::Map;
use crate::masks::Mask;

/// Rows and columns of a picture, at least.
const SIDE: usize = 320;
/// How much a map's highest point hides of the image beneath.
const COVER: f32 = 0.55;
/// Colours of a map from nothing to everything: as those of matplotlib's "inferno", which printing in grey does not spoil.
const COLOURS: [[f32; 3]; 6] = [
    [0.00, 0.00, 0.02],
    [0.26, 0.04, 0.41],
    [0.58, 0.15, 0.40],
    [0.87, 0.32, 0.23],
    [0.99, 0.65, 0.04],
    [0.99, 1.00, 0.64],
];
/// The colour of the lungs' outline.
const OUTLINE: [f32; 3] = [0.25, 0.85, 0.95];

/// A radiograph with, where given, a map over it and the lungs' outline.
///
/// # Panics
/// When the plane is no square of `size`.
pub fn overlay(plane: &[f32], size: usize, map: Option<&Map>, lungs: Option<&Mask>) -> Picture {
    let side = size.max(SIDE);
    let image = resize_plane(plane, [size; 2], [side; 2]);
    let mut channels = [image.clone(), image.clone(), image];
    if let Some(map) = map {
        for (pixel, &heat) in map.over([side; 2]).iter().enumerate() {
            let colour = colour_of(heat);
            // Where the map says nothing, the image stays as it is.
            let cover = COVER * heat.sqrt();
            for (channel, colour) in channels.iter_mut().zip(colour) {
                channel[pixel] = channel[pixel] * (1.0 - cover) + colour * cover;
            }
        }
    }
    if let Some(lungs) = lungs {
        // Smoothed before it is cut, so that a coarse mask has no steps.
        let mask =
            Mask::of(&resize_plane(&lungs.to_plane(), [lungs.height, lungs.width], [side; 2]), [side; 2]);
        for pixel in outline(&mask) {
            channels.iter_mut().zip(OUTLINE).for_each(|(channel, colour)| channel[pixel] = colour);
        }
    }
    Picture { shape: [3, side, side], pixels: channels.concat() }
}

/// Pixels of lung that have a neighbour that is none.
fn outline(mask: &Mask) -> impl Iterator<Item = usize> {
    let (height, width) = (mask.height, mask.width);
    let is_lung = move |y: usize, x: usize| mask.lung[y * width + x];
    (0..height * width).filter(move |&pixel| {
        let (y, x) = (pixel / width, pixel % width);
        let inner = y > 0 && x > 0 && y + 1 < height && x + 1 < width;
        is_lung(y, x)
            && !(inner && is_lung(y - 1, x) && is_lung(y + 1, x) && is_lung(y, x - 1) && is_lung(y, x + 1))
    })
}

fn colour_of(heat: f32) -> [f32; 3] {
    let at = heat.clamp(0.0, 1.0) * (COLOURS.len() - 1) as f32;
    let lower = (at as usize).min(COLOURS.len() - 2);
    let share = at - lower as f32;
    std::array::from_fn(|channel| {
        COLOURS[lower][channel] * (1.0 - share) + COLOURS[lower + 1][channel] * share
    })
}

/// Pictures of one size side by side.
///
/// # Panics
/// When there are none, or they differ in size.
pub fn beside(pictures: &[Picture]) -> Picture {
    let [channels, height, width] = pictures[0].shape;
    assert!(pictures.iter().all(|picture| picture.shape == pictures[0].shape), "pictures must have one size");
    let rows = (0..channels).flat_map(|channel| (0..height).map(move |y| (channel, y)));
    let pixels = rows
        .flat_map(|(channel, y)| {
            pictures
                .iter()
                .flat_map(move |p| p.pixels[(channel * height + y) * width..][..width].iter().copied())
        })
        .collect();
    Picture { shape: [channels, height, width * pictures.len()], pixels }
}
