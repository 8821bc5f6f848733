//! One image of any size.

use std::io::Cursor;
use std::path::Path;

use image::{ExtendedColorType, ImageEncoder, codecs::png::PngEncoder};
use kiln_core::{Error, Result, write_atomic};

use super::folder::{append, open};

/// An image in main memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Picture {
    /// Channels (1 is grey, 3 are red, green and blue), height, width.
    pub shape: [usize; 3],
    /// Brightness from 0 to 1, `[channels, height, width]`.
    pub pixels: Vec<f32>,
}

impl Picture {
    /// A grey image.
    ///
    /// # Panics
    /// When `pixels` does not fill it.
    pub fn grey(height: usize, width: usize, pixels: Vec<f32>) -> Self {
        assert_eq!(height * width, pixels.len(), "pixels must fill {height} x {width}");
        Self { shape: [1, height, width], pixels }
    }

    /// Reads a PNG or JPEG file; transparency is passed over.
    ///
    /// # Errors
    /// When the file cannot be read, is no such image or not whole.
    pub fn read(path: &Path) -> Result<Self> {
        let picture = open(path)?;
        let grey = !picture.color().has_color();
        let (width, height) = (picture.width() as usize, picture.height() as usize);
        let mut pixels = Vec::new();
        append(&picture, grey, &mut pixels);
        Ok(Self { shape: [if grey { 1 } else { 3 }, height, width], pixels })
    }

    /// Brightness, `[height, width]`: of red, green and blue as BT.709 weighs them.
    pub fn to_grey(&self) -> Vec<f32> {
        let [channels, height, width] = self.shape;
        if channels == 1 {
            return self.pixels.clone();
        }
        let plane = height * width;
        let weighed = |i: usize| {
            0.2126 * self.pixels[i] + 0.7152 * self.pixels[plane + i] + 0.0722 * self.pixels[2 * plane + i]
        };
        (0..plane).map(weighed).collect()
    }

    /// How far the channels lie apart, in the mean over pixels; 0 for what is grey.
    pub fn colour(&self) -> f32 {
        let [channels, height, width] = self.shape;
        if channels == 1 {
            return 0.0;
        }
        let plane = height * width;
        let spread = |i: usize| {
            let values = [0, 1, 2].map(|channel| self.pixels[channel * plane + i]);
            values.iter().copied().fold(0.0, f32::max) - values.iter().copied().fold(1.0, f32::min)
        };
        (0..plane).map(spread).sum::<f32>() / plane.max(1) as f32
    }

    /// The image as a PNG file of eight bits.
    ///
    /// # Errors
    /// When it has no pixels or more than the format allows.
    pub fn to_png(&self) -> Result<Vec<u8>> {
        let [channels, height, width] = self.shape;
        let plane = height * width;
        let byte = |x: f32| (x.clamp(0.0, 1.0) * 255.0).round() as u8;
        let bytes: Vec<u8> = (0..plane)
            .flat_map(|i| (0..channels).map(move |c| c * plane + i))
            .map(|i| byte(self.pixels[i]))
            .collect();
        let colour = if channels == 1 { ExtendedColorType::L8 } else { ExtendedColorType::Rgb8 };
        let mut file = Cursor::new(Vec::new());
        PngEncoder::new(&mut file)
            .write_image(&bytes, width as u32, height as u32, colour)
            .map_err(|e| Error::work(format!("cannot draw an image of {width} x {height}")).caused_by(e))?;
        Ok(file.into_inner())
    }

    /// Writes the image as a PNG file of eight bits.
    ///
    /// # Errors
    /// As [`to_png`](Self::to_png), and when the file cannot be written.
    pub fn write_png(&self, path: &Path) -> Result<()> {
        write_atomic(path, &self.to_png()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_survive_the_way_to_disk_and_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.png");
        let grey = Picture::grey(2, 3, [0, 1, 2, 100, 254, 255].map(|x| x as f32 / 255.0).to_vec());
        grey.write_png(&path).unwrap();
        assert_eq!(Picture::read(&path).unwrap(), grey);
        let pixels = [0, 51, 102, 153, 204, 255].map(|x| x as f32 / 255.0).to_vec();
        let colour = Picture { shape: [3, 1, 2], pixels };
        colour.write_png(&path).unwrap();
        assert_eq!(Picture::read(&path).unwrap(), colour);
        assert!(colour.colour() > 0.5 && grey.colour() == 0.0);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        assert!(Picture::read(&path).unwrap_err().to_string().contains("not a whole PNG or JPEG"));
    }
}
