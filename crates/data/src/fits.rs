//! FITS images of two axes: the primary header and data unit, as alert packets carry it.
//!
//! Source: FITS standard 4.0, sections 3, 4.4 and 5. The `SIMPLE` card is only looked at for its name, because packets in
//! the wild write its value in other columns.

use std::io::{Read, Write};

use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;

/// Bytes of a block,
const BLOCK: usize = 2880;
/// and of a card in a header.
const CARD: usize = 80;

/// A picture `[height, width]`, row by row from the first in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct FitsImage {
    /// NAXIS1, pixels of a row.
    pub width: usize,
    /// NAXIS2, rows.
    pub height: usize,
    /// Physical values: BZERO + BSCALE × stored.
    pub pixels: Vec<f32>,
}

impl FitsImage {
    /// Reads an image; trailing bytes are ignored.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        if !bytes.starts_with(b"SIMPLE") {
            return Err("is no FITS image: it does not begin with SIMPLE".into());
        }
        let (mut bitpix, mut axes) = (None, [None; 3]);
        let (mut scale, mut zero) = (1.0, 0.0);
        let mut end = None;
        for (number, card) in bytes.chunks_exact(CARD).enumerate() {
            let name = card[..8].trim_ascii_end();
            if name == b"END" {
                end = Some((number + 1) * CARD);
                break;
            }
            if card[8] != b'=' {
                continue;
            }
            let text = String::from_utf8_lossy(&card[9..]);
            let text = text.split('/').next().unwrap_or_default().trim();
            let int = || {
                text.parse::<i64>().map_err(|_| format!("has {text:?} for {}", String::from_utf8_lossy(name)))
            };
            let number = || {
                let value =
                    text.replace(['D', 'd'], "E").parse::<f64>().ok().filter(|value| value.is_finite());
                value.ok_or_else(|| format!("has {text:?} for {}", String::from_utf8_lossy(name)))
            };
            match name {
                b"BITPIX" => bitpix = Some(int()?),
                b"NAXIS" => axes[0] = Some(int()?),
                b"NAXIS1" => axes[1] = Some(int()?),
                b"NAXIS2" => axes[2] = Some(int()?),
                b"BSCALE" => scale = number()?,
                b"BZERO" => zero = number()?,
                _ => {}
            }
        }
        let end = end.ok_or("has a header without END: is the file cut off?")?;
        if axes[0] != Some(2) {
            return Err(format!("has {} axes, not 2", axes[0].unwrap_or(0)));
        }
        let length = |axis: Option<i64>| axis.and_then(|n| usize::try_from(n).ok()).filter(|&n| n > 0);
        let (Some(width), Some(height)) = (length(axes[1]), length(axes[2])) else {
            return Err(format!("has {:?} x {:?} pixels", axes[1], axes[2]));
        };
        let bitpix = bitpix.ok_or("has no BITPIX")?;
        if !matches!(bitpix, 8 | 16 | 32 | -32 | -64) {
            return Err(format!("has BITPIX {bitpix}; 8, 16, 32, -32 and -64 are read"));
        }
        let size = bitpix.unsigned_abs() as usize / 8;
        let data = bytes.get(end.next_multiple_of(BLOCK)..).unwrap_or(&[]);
        let needed = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(size));
        let Some(data) = needed.and_then(|needed| data.get(..needed)) else {
            return Err(format!("claims {width} x {height} pixels, more than its {} bytes hold", data.len()));
        };
        let physical = |stored: f64| (zero + scale * stored) as f32;
        let is_plain = scale == 1.0 && zero == 0.0;
        let pixels = match bitpix {
            -32 if is_plain => {
                data.chunks_exact(4).map(|b| f32::from_be_bytes([b[0], b[1], b[2], b[3]])).collect()
            }
            8 => data.iter().map(|&b| physical(b.into())).collect(),
            16 => data.chunks_exact(2).map(|b| physical(i16::from_be_bytes([b[0], b[1]]).into())).collect(),
            32 => {
                let int = |b: &[u8]| i32::from_be_bytes([b[0], b[1], b[2], b[3]]);
                data.chunks_exact(4).map(|b| physical(int(b).into())).collect()
            }
            -32 => {
                let float = |b: &[u8]| f32::from_be_bytes([b[0], b[1], b[2], b[3]]);
                data.chunks_exact(4).map(|b| physical(float(b).into())).collect()
            }
            _ => {
                let double = |b: &[u8]| f64::from_be_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
                data.chunks_exact(8).map(|b| physical(double(b))).collect()
            }
        };
        Ok(Self { width, height, pixels })
    }

    /// The image as a file of 32-bit floats.
    pub fn to_bytes(&self) -> Vec<u8> {
        let cards = [
            ("SIMPLE", "T".to_string()),
            ("BITPIX", "-32".to_string()),
            ("NAXIS", "2".to_string()),
            ("NAXIS1", self.width.to_string()),
            ("NAXIS2", self.height.to_string()),
        ];
        let mut bytes: Vec<u8> = cards
            .iter()
            .flat_map(|(name, value)| format!("{name:<8}= {value:>20}{:50}", "").into_bytes())
            .collect();
        bytes.extend(format!("{:80}", "END").bytes());
        bytes.resize(bytes.len().next_multiple_of(BLOCK), b' ');
        bytes.extend(self.pixels.iter().flat_map(|pixel| pixel.to_be_bytes()));
        bytes.resize(bytes.len().next_multiple_of(BLOCK), 0);
        bytes
    }
}

/// Unpacks gzip to at most `limit` bytes.
///
/// # Errors
/// When it is damaged or holds more.
pub fn gunzip(packed: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    GzDecoder::new(packed)
        .take(limit as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| format!("cannot be unpacked by gzip: {e}"))?;
    if bytes.len() > limit {
        return Err(format!("unpacks to more than {limit} bytes"));
    }
    Ok(bytes)
}

/// Packs bytes by gzip, quickly rather than tightly.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).and_then(|()| encoder.finish()).expect("a vector takes all bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> FitsImage {
        FitsImage { width: 3, height: 2, pixels: vec![1.0, -2.5, f32::NAN, 0.0, f32::INFINITY, 7.0] }
    }

    fn same(a: &FitsImage, b: &FitsImage) -> bool {
        let bits = |image: &FitsImage| image.pixels.iter().map(|p| p.to_bits()).collect::<Vec<_>>();
        (a.width, a.height, bits(a)) == (b.width, b.height, bits(b))
    }

    #[test]
    fn what_is_written_is_read_back_packed_or_not() {
        let bytes = image().to_bytes();
        assert!(bytes.len() == 2 * BLOCK && same(&FitsImage::read(&bytes).unwrap(), &image()));
        let packed = gzip(&bytes);
        assert_eq!(gunzip(&packed, bytes.len()).unwrap(), bytes);
        assert!(gunzip(&packed, bytes.len() - 1).unwrap_err().contains("more than"));
    }

    #[test]
    fn stored_integers_are_scaled() {
        let mut bytes = image().to_bytes();
        let cards = ["BITPIX  =                   16", "BSCALE  = 0.5", "BZERO   = 10 / offset"];
        for (card, at) in cards.iter().zip([1, 5, 6]) {
            bytes[at * CARD..(at + 1) * CARD].copy_from_slice(format!("{card:80}").as_bytes());
        }
        bytes[7 * CARD..8 * CARD].copy_from_slice(format!("{:80}", "END").as_bytes());
        bytes[BLOCK..BLOCK + 4].copy_from_slice(&[0, 4, 0xff, 0xfe]);
        assert_eq!(FitsImage::read(&bytes).unwrap().pixels[..2], [12.0, 9.0]);
    }

    #[test]
    fn damaged_images_are_errors_that_say_why() {
        let bytes = image().to_bytes();
        for cut in [0, 5, 100, BLOCK, BLOCK + 23] {
            assert!(FitsImage::read(&bytes[..cut]).is_err());
        }
        let mut huge = bytes.clone();
        huge[3 * CARD..4 * CARD]
            .copy_from_slice(format!("{:80}", "NAXIS1  = 9000000000000000000").as_bytes());
        assert!(FitsImage::read(&huge).unwrap_err().contains("more than its"));
        for at in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x15;
            let _ = FitsImage::read(&bytes);
        }
    }
}
