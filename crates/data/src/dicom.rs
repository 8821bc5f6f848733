//! DICOM files of one grey image, as radiography writes them.
//!
//! Read are files of part 10 of the standard with little-endian values, implicit or explicit, whose pixels are bare or a JPEG
//! image, baseline or lossless; other transfer syntaxes are named in the error. Nothing is allocated by what a file claims:
//! values are parts of the bytes that are there.

use std::io::Cursor;
use std::path::Path;

use image::{ImageFormat, ImageReader, Limits};
use jpeg_decoder::PixelFormat;
use kiln_core::{Error, Result};

/// Where "DICM" stands.
const MAGIC_AT: usize = 128;
/// Nested sequences beyond which a file is taken as malformed.
const MAX_DEPTH: usize = 16;
/// Most pixels of an image.
const MAX_PIXELS: usize = 1 << 28;
/// A length that is not told.
const UNDEFINED: u32 = u32::MAX;
/// Shares of the darkest and the brightest pixels that are left out where a file has no window.
const PERCENTILES: [f64; 2] = [0.01, 0.99];

const ITEM: (u16, u16) = (0xFFFE, 0xE000);
const ITEM_END: (u16, u16) = (0xFFFE, 0xE00D);
const SEQUENCE_END: (u16, u16) = (0xFFFE, 0xE0DD);
const TRANSFER_SYNTAX: (u16, u16) = (0x0002, 0x0010);
const PATIENT: (u16, u16) = (0x0010, 0x0020);
const VIEW: (u16, u16) = (0x0018, 0x5101);
const SAMPLES: (u16, u16) = (0x0028, 0x0002);
const PHOTOMETRIC: (u16, u16) = (0x0028, 0x0004);
const FRAMES: (u16, u16) = (0x0028, 0x0008);
const ROWS: (u16, u16) = (0x0028, 0x0010);
const COLUMNS: (u16, u16) = (0x0028, 0x0011);
const ALLOCATED: (u16, u16) = (0x0028, 0x0100);
const STORED: (u16, u16) = (0x0028, 0x0101);
const HIGH_BIT: (u16, u16) = (0x0028, 0x0102);
const SIGNED: (u16, u16) = (0x0028, 0x0103);
const CENTER: (u16, u16) = (0x0028, 0x1050);
const WIDTH: (u16, u16) = (0x0028, 0x1051);
const INTERCEPT: (u16, u16) = (0x0028, 0x1052);
const SLOPE: (u16, u16) = (0x0028, 0x1053);
const PIXELS: (u16, u16) = (0x7FE0, 0x0010);

/// A grey image and what the file says of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Dicom {
    /// Pixels from top to bottom.
    pub rows: usize,
    /// Pixels from left to right.
    pub columns: usize,
    /// Stored values after slope and intercept, `[rows, columns]`.
    pub values: Vec<f32>,
    /// Whether the smallest value is white (MONOCHROME1).
    pub is_inverted: bool,
    /// Centre and width of the values to look at, where the file names them.
    pub window: Option<[f32; 2]>,
    /// The patient's identifier; empty where there is none.
    pub patient: String,
    /// The view, such as PA, AP or LATERAL; empty where there is none.
    pub view: String,
}

impl Dicom {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, is malformed, holds no single grey image, or is written in a way that Kiln does not read.
    pub fn read(path: &Path) -> Result<Self> {
        Self::from_bytes(&std::fs::read(path).map_err(Error::io("read", path))?, path)
    }

    /// Reads what was read already; messages call it `source`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_bytes(bytes: &[u8], source: impl AsRef<Path>) -> Result<Self> {
        let place = source.as_ref().display().to_string();
        parse(bytes).map_err(|Refusal { found, hint }| Error::input(place, found).hint(hint))
    }

    /// Brightness from 0 to 1, `[rows, columns]`: within the file's window, or between the 1st and the 99th percentile.
    pub fn brightness(&self) -> Vec<f32> {
        let [low, high] = match self.window {
            // The linear function of PS3.3 C.11.2.1.2.1.
            Some([center, width]) => {
                let half = (width - 1.0).max(f32::EPSILON) / 2.0;
                [center - 0.5 - half, center - 0.5 + half]
            }
            None => percentiles(&self.values),
        };
        let span = high - low;
        let scale = |x: f32| if span > 0.0 { ((x - low) / span).clamp(0.0, 1.0) } else { 0.0 };
        let shown = |x: f32| if self.is_inverted { 1.0 - scale(x) } else { scale(x) };
        self.values.iter().map(|&x| shown(x)).collect()
    }
}

fn percentiles(values: &[f32]) -> [f32; 2] {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    PERCENTILES.map(|share| {
        let at = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
        sorted.get(at).copied().unwrap_or(0.0)
    })
}

/// Why a file is refused.
struct Refusal {
    found: String,
    hint: String,
}

fn refuse<T>(found: impl Into<String>, hint: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { found: found.into(), hint: hint.into() })
}

fn malformed<T>(found: impl Into<String>) -> Result<T, Refusal> {
    refuse(found, "is it a complete DICOM file?")
}

/// The elements that say how pixels are to be read, as they stand in the file.
#[derive(Default)]
struct Header<'a> {
    patient: &'a [u8],
    view: &'a [u8],
    photometric: &'a [u8],
    frames: &'a [u8],
    samples: Option<u16>,
    rows: Option<u16>,
    columns: Option<u16>,
    allocated: Option<u16>,
    stored: Option<u16>,
    high_bit: Option<u16>,
    signed: Option<u16>,
    center: &'a [u8],
    width: &'a [u8],
    intercept: &'a [u8],
    slope: &'a [u8],
}

/// Pixels in the file.
enum Stored<'a> {
    Bare(&'a [u8]),
    /// Fragments of a compressed image.
    Fragments(Vec<&'a [u8]>),
}

/// How values are written.
#[derive(Clone, Copy, PartialEq)]
enum Syntax {
    Implicit,
    Explicit,
    JpegBaseline,
    JpegLossless,
}

fn parse(bytes: &[u8]) -> Result<Dicom, Refusal> {
    if bytes.get(MAGIC_AT..MAGIC_AT + 4) != Some(b"DICM") {
        return malformed("has no DICM at byte 128");
    }
    let mut reader = Reader { bytes, at: MAGIC_AT + 4, explicit: true };
    let mut syntax = None;
    // The file meta group is always explicit.
    while reader.peek_tag().is_some_and(|(group, _)| group == 2) {
        let element = reader.element()?;
        let value = reader.value(&element)?;
        if element.tag == TRANSFER_SYNTAX {
            syntax = Some(text(value));
        }
    }
    let syntax = match syntax.as_deref() {
        Some("1.2.840.10008.1.2") => Syntax::Implicit,
        Some("1.2.840.10008.1.2.1") => Syntax::Explicit,
        Some("1.2.840.10008.1.2.4.50") => Syntax::JpegBaseline,
        Some("1.2.840.10008.1.2.4.57" | "1.2.840.10008.1.2.4.70") => Syntax::JpegLossless,
        Some(uid) => {
            return refuse(
                format!("is written in the transfer syntax {uid}{}", name_of(uid)),
                "Kiln reads bare little-endian pixels, JPEG baseline and JPEG lossless; convert it, for example with dcmdjpeg or gdcmconv --raw",
            );
        }
        None => return malformed("names no transfer syntax"),
    };
    reader.explicit = syntax != Syntax::Implicit;
    let (header, pixels) = read_elements(&mut reader)?;
    let Some(pixels) = pixels else {
        return refuse("holds no pixel data", "is it a report or a presentation state instead of an image?");
    };
    decode(&header, pixels, syntax)
}

fn name_of(uid: &str) -> &'static str {
    match uid {
        "1.2.840.10008.1.2.1.99" => " (deflated)",
        "1.2.840.10008.1.2.2" => " (big endian)",
        "1.2.840.10008.1.2.4.51" => " (JPEG extended)",
        "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => " (JPEG-LS)",
        "1.2.840.10008.1.2.4.90" | "1.2.840.10008.1.2.4.91" => " (JPEG 2000)",
        "1.2.840.10008.1.2.5" => " (RLE)",
        _ => "",
    }
}

/// The elements of the data set up to its pixels.
fn read_elements<'a>(reader: &mut Reader<'a>) -> Result<(Header<'a>, Option<Stored<'a>>), Refusal> {
    let mut header = Header::default();
    while reader.at < reader.bytes.len() {
        let element = reader.element()?;
        if element.tag == PIXELS && element.len == UNDEFINED {
            return Ok((header, Some(Stored::Fragments(reader.fragments()?))));
        }
        if element.len == UNDEFINED {
            reader.skip_sequence(0)?;
            continue;
        }
        let value = reader.value(&element)?;
        match element.tag {
            PATIENT => header.patient = value,
            VIEW => header.view = value,
            PHOTOMETRIC => header.photometric = value,
            FRAMES => header.frames = value,
            SAMPLES => header.samples = short(value),
            ROWS => header.rows = short(value),
            COLUMNS => header.columns = short(value),
            ALLOCATED => header.allocated = short(value),
            STORED => header.stored = short(value),
            HIGH_BIT => header.high_bit = short(value),
            SIGNED => header.signed = short(value),
            CENTER => header.center = value,
            WIDTH => header.width = value,
            INTERCEPT => header.intercept = value,
            SLOPE => header.slope = value,
            PIXELS => return Ok((header, Some(Stored::Bare(value)))),
            _ => {}
        }
    }
    Ok((header, None))
}

fn decode(header: &Header, pixels: Stored, syntax: Syntax) -> Result<Dicom, Refusal> {
    let frames = text(header.frames);
    if !matches!(frames.as_str(), "" | "1") {
        return refuse(format!("holds {frames} frames"), "give one image a file");
    }
    let photometric = text(header.photometric);
    let is_inverted = match photometric.as_str() {
        "MONOCHROME1" => true,
        "MONOCHROME2" => false,
        other => {
            return refuse(
                format!("has the photometric interpretation \"{other}\""),
                "radiographs are MONOCHROME1 or MONOCHROME2",
            );
        }
    };
    if header.samples.unwrap_or(1) != 1 {
        return refuse(format!("has {} samples a pixel", header.samples.unwrap_or(0)), "expected 1");
    }
    let (Some(rows), Some(columns)) = (header.rows, header.columns) else {
        return malformed("does not say how many rows and columns it has");
    };
    let (rows, columns) = (usize::from(rows), usize::from(columns));
    let count = rows * columns;
    if count == 0 || count > MAX_PIXELS {
        return malformed(format!("claims {rows} x {columns} pixels"));
    }
    let stored = match (pixels, syntax) {
        (Stored::Bare(bytes), Syntax::Implicit | Syntax::Explicit) => bare(header, bytes, count)?,
        (Stored::Fragments(fragments), Syntax::JpegBaseline) => jpeg(&fragments, rows, columns)?,
        (Stored::Fragments(fragments), Syntax::JpegLossless) => {
            bare(header, &lossless(header, &fragments, rows, columns)?, count)?
        }
        (Stored::Bare(_), Syntax::JpegBaseline | Syntax::JpegLossless) => {
            return malformed("has bare pixels in place of a JPEG image");
        }
        (Stored::Fragments(_), _) => return malformed("has fragments in place of bare pixels"),
    };
    let slope = number(header.slope, "rescale slope")?.unwrap_or(1.0);
    let intercept = number(header.intercept, "rescale intercept")?.unwrap_or(0.0);
    let window = match (number(header.center, "window center")?, number(header.width, "window width")?) {
        (Some(center), Some(width)) if width >= 1.0 => Some([center, width]),
        _ => None,
    };
    let values: Vec<f32> = stored.into_iter().map(|x| x * slope + intercept).collect();
    if values.iter().any(|x| x.abs() > f32::MAX / 4.0 || x.is_nan()) {
        return malformed(format!(
            "has the slope {slope} and the intercept {intercept}, by which values overflow"
        ));
    }
    Ok(Dicom {
        rows,
        columns,
        values,
        is_inverted,
        window,
        patient: text(header.patient),
        view: text(header.view),
    })
}

/// Whole numbers of eight or sixteen bits.
fn bare(header: &Header, bytes: &[u8], count: usize) -> Result<Vec<f32>, Refusal> {
    let allocated = header.allocated.unwrap_or(0);
    let width = match allocated {
        8 => 1,
        16 => 2,
        other => return refuse(format!("has {other} bits a pixel"), "Kiln reads 8 and 16"),
    };
    let stored = header.stored.unwrap_or(allocated);
    let high = header.high_bit.unwrap_or(stored.saturating_sub(1));
    if stored == 0 || stored > allocated || high >= allocated || high + 1 < stored {
        return malformed(format!("stores {stored} bits up to bit {high} of {allocated}"));
    }
    let shift = u32::from(high + 1 - stored);
    let unused = 32 - u32::from(stored);
    let is_signed = header.signed == Some(1);
    let Some(bytes) = bytes.get(..count * width) else {
        return malformed(format!("has {} bytes of pixels for {count} of {allocated} bits", bytes.len()));
    };
    let value = |raw: u32| {
        let bits = (raw >> shift) << unused;
        if is_signed { (bits as i32 >> unused) as f32 } else { (bits >> unused) as f32 }
    };
    Ok(match width {
        1 => bytes.iter().map(|&byte| value(byte.into())).collect(),
        _ => bytes.as_chunks::<2>().0.iter().map(|&pair| value(u16::from_le_bytes(pair).into())).collect(),
    })
}

fn jpeg(fragments: &[&[u8]], rows: usize, columns: usize) -> Result<Vec<f32>, Refusal> {
    let mut reader = ImageReader::with_format(Cursor::new(fragments.concat()), ImageFormat::Jpeg);
    let mut limits = Limits::default();
    (limits.max_image_height, limits.max_image_width) = (Some(rows as u32), Some(columns as u32));
    reader.limits(limits);
    let picture = match reader.decode() {
        Ok(picture) => picture.into_luma8(),
        Err(e) => return malformed(format!("holds no whole JPEG image: {e}")),
    };
    if (picture.height() as usize, picture.width() as usize) != (rows, columns) {
        let (height, width) = (picture.height(), picture.width());
        return malformed(format!(
            "claims {rows} x {columns} pixels, and its JPEG image has {height} x {width}"
        ));
    }
    Ok(picture.into_raw().into_iter().map(f32::from).collect())
}

/// The pixels of a lossless JPEG image (process 14 of ITU T.81), as they would stand bare in the file.
fn lossless(header: &Header, fragments: &[&[u8]], rows: usize, columns: usize) -> Result<Vec<u8>, Refusal> {
    let whole = fragments.concat();
    let mut decoder = jpeg_decoder::Decoder::new(&whole[..]);
    decoder.set_max_decoding_buffer_size(2 * rows * columns);
    let broken = |e: jpeg_decoder::Error| malformed(format!("holds no whole JPEG image: {e}"));
    if let Err(e) = decoder.read_info() {
        return broken(e);
    }
    let Some(info) = decoder.info() else { return malformed("holds a JPEG image without a size") };
    let allocated = match info.pixel_format {
        PixelFormat::L8 => 8,
        PixelFormat::L16 => 16,
        _ => return malformed("holds a JPEG image in colour"),
    };
    let size = (usize::from(info.height), usize::from(info.width));
    if size != (rows, columns) || header.allocated != Some(allocated) {
        return malformed(format!(
            "claims {rows} x {columns} pixels of {} bits, and its JPEG image has {} x {} of {allocated}",
            header.allocated.unwrap_or(0),
            size.0,
            size.1,
        ));
    }
    match decoder.decode() {
        Ok(bytes) if allocated == 8 => Ok(bytes),
        // The decoder writes numbers as this machine does.
        Ok(bytes) => {
            let pairs = bytes.as_chunks().0.iter();
            Ok(pairs.flat_map(|&pair| u16::from_ne_bytes(pair).to_le_bytes()).collect())
        }
        Err(e) => broken(e),
    }
}

/// Text without the spaces and zeros that fill it up.
fn text(value: &[u8]) -> String {
    String::from_utf8_lossy(value).trim_matches([' ', '\0']).to_string()
}

fn short(value: &[u8]) -> Option<u16> {
    value.first_chunk().map(|&bytes| u16::from_le_bytes(bytes))
}

/// The first of the numbers of a decimal string.
fn number(value: &[u8], what: &str) -> Result<Option<f32>, Refusal> {
    let all = text(value);
    let first = all.split('\\').next().unwrap_or_default().trim();
    if first.is_empty() {
        return Ok(None);
    }
    match first.parse::<f32>() {
        Ok(number) if number.is_finite() => Ok(Some(number)),
        _ => malformed(format!("has the {what} \"{first}\"")),
    }
}

/// Group and number, and bytes of the value.
struct Element {
    tag: (u16, u16),
    len: u32,
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    explicit: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Refusal> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        match taken {
            Some(taken) => {
                self.at += count;
                Ok(taken)
            }
            None => malformed(format!("ends at byte {}, within an element", self.bytes.len())),
        }
    }

    fn u16(&mut self) -> Result<u16, Refusal> {
        Ok(short(self.take(2)?).unwrap_or_default())
    }

    fn u32(&mut self) -> Result<u32, Refusal> {
        Ok(self.take(4)?.first_chunk().map_or(0, |&bytes| u32::from_le_bytes(bytes)))
    }

    fn peek_tag(&self) -> Option<(u16, u16)> {
        let group = short(self.bytes.get(self.at..)?)?;
        Some((group, short(self.bytes.get(self.at + 2..)?)?))
    }

    /// The head of the next element.
    fn element(&mut self) -> Result<Element, Refusal> {
        let tag = (self.u16()?, self.u16()?);
        // Items and their ends have no type of value.
        if !self.explicit || tag.0 == ITEM.0 {
            return Ok(Element { tag, len: self.u32()? });
        }
        let kind = self.take(2)?;
        let len = match kind {
            b"OB" | b"OD" | b"OF" | b"OL" | b"OV" | b"OW" | b"SQ" | b"SV" | b"UC" | b"UN" | b"UR" | b"UT"
            | b"UV" => {
                self.take(2)?;
                self.u32()?
            }
            _ if kind.iter().all(u8::is_ascii_uppercase) => self.u16()?.into(),
            _ => return malformed(format!("has no type of value at byte {}", self.at - 2)),
        };
        Ok(Element { tag, len })
    }

    fn value(&mut self, element: &Element) -> Result<&'a [u8], Refusal> {
        self.take(element.len as usize)
    }

    /// Goes behind a sequence of a length that is not told.
    fn skip_sequence(&mut self, depth: usize) -> Result<(), Refusal> {
        if depth > MAX_DEPTH {
            return malformed(format!("nests sequences more than {MAX_DEPTH} deep"));
        }
        loop {
            let item = self.element()?;
            match item.tag {
                SEQUENCE_END => return Ok(()),
                ITEM if item.len != UNDEFINED => {
                    self.value(&item)?;
                }
                ITEM => self.skip_item(depth)?,
                (group, number) => {
                    return malformed(format!("has ({group:04x},{number:04x}) in place of an item"));
                }
            }
        }
    }

    fn skip_item(&mut self, depth: usize) -> Result<(), Refusal> {
        loop {
            let element = self.element()?;
            match element.tag {
                ITEM_END => return Ok(()),
                _ if element.len == UNDEFINED => self.skip_sequence(depth + 1)?,
                _ => {
                    self.value(&element)?;
                }
            }
        }
    }

    /// The fragments of a compressed image, without the table of offsets before them.
    fn fragments(&mut self) -> Result<Vec<&'a [u8]>, Refusal> {
        let mut fragments = Vec::new();
        loop {
            let item = self.element()?;
            match item.tag {
                SEQUENCE_END => break,
                ITEM => fragments.push(self.value(&item)?),
                (group, number) => {
                    return malformed(format!("has ({group:04x},{number:04x}) among its fragments"));
                }
            }
        }
        if fragments.len() < 2 {
            return malformed("holds no fragment of an image");
        }
        Ok(fragments.split_off(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;
    use rand::RngExt;

    /// Tag, type and value of an element.
    type Extra<'a> = ((u16, u16), &'a [u8; 2], Vec<u8>);

    /// A file of 2 x 3 pixels in a transfer syntax, with further elements before its pixels.
    fn file(syntax: &str, explicit: bool, extra: &[Extra<'_>], pixels: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; MAGIC_AT];
        bytes.extend(b"DICM");
        let mut put = |(group, number): (u16, u16), kind: &[u8; 2], value: &[u8], explicit: bool| {
            let mut value = value.to_vec();
            if value.len() % 2 == 1 {
                value.push(if kind == b"UI" { 0 } else { b' ' });
            }
            bytes.extend(group.to_le_bytes());
            bytes.extend(number.to_le_bytes());
            match (explicit, kind) {
                (false, _) => bytes.extend((value.len() as u32).to_le_bytes()),
                (true, b"OW" | b"SQ") => {
                    bytes.extend(kind);
                    bytes.extend([0; 2]);
                    bytes.extend((value.len() as u32).to_le_bytes());
                }
                (true, _) => {
                    bytes.extend(kind);
                    bytes.extend((value.len() as u16).to_le_bytes());
                }
            }
            bytes.extend(value);
        };
        put(TRANSFER_SYNTAX, b"UI", syntax.as_bytes(), true);
        let number = |x: u16| x.to_le_bytes().to_vec();
        let mut elements = vec![
            (PATIENT, b"LO", b"p7".to_vec()),
            (SAMPLES, b"US", number(1)),
            (PHOTOMETRIC, b"CS", b"MONOCHROME2".to_vec()),
            (ROWS, b"US", number(2)),
            (COLUMNS, b"US", number(3)),
            (ALLOCATED, b"US", number(16)),
            (STORED, b"US", number(12)),
            (HIGH_BIT, b"US", number(11)),
            (SIGNED, b"US", number(0)),
        ];
        for (tag, kind, value) in extra {
            elements.retain(|(known, ..)| known != tag);
            elements.push((*tag, kind, value.clone()));
        }
        elements.sort_by_key(|(tag, ..)| *tag);
        for (tag, kind, value) in &elements {
            put(*tag, kind, value, explicit);
        }
        if !pixels.is_empty() {
            put(PIXELS, b"OW", pixels, explicit);
        }
        bytes
    }

    const EXPLICIT: &str = "1.2.840.10008.1.2.1";

    fn pixels() -> Vec<u8> {
        [0u16, 1, 2, 100, 4095, 0xF005].iter().flat_map(|x| x.to_le_bytes()).collect()
    }

    fn read(bytes: &[u8]) -> Result<Dicom> {
        Dicom::from_bytes(bytes, "a.dcm")
    }

    #[test]
    fn both_ways_of_writing_give_the_same_image() {
        let one = read(&file(EXPLICIT, true, &[], &pixels())).unwrap();
        let two = read(&file("1.2.840.10008.1.2", false, &[], &pixels())).unwrap();
        assert_eq!(one, two);
        assert_eq!((one.rows, one.columns, one.patient.as_str()), (2, 3, "p7"));
        // Bits above those stored do not count.
        assert_eq!(one.values, [0.0, 1.0, 2.0, 100.0, 4095.0, 5.0]);
    }

    #[test]
    fn slope_window_sign_and_inversion_count() {
        let extra = [
            (SLOPE, b"DS", b"2".to_vec()),
            (INTERCEPT, b"DS", b"-10".to_vec()),
            (CENTER, b"DS", b"91\\7".to_vec()),
            (WIDTH, b"DS", b"201 ".to_vec()),
            (PHOTOMETRIC, b"CS", b"MONOCHROME1".to_vec()),
        ];
        let image = read(&file(EXPLICIT, true, &extra, &pixels())).unwrap();
        assert_eq!(image.values, [-10.0, -8.0, -6.0, 190.0, 8180.0, 0.0]);
        let shown = image.brightness();
        assert!(
            (shown[0] - 1.0).abs() < 1e-2 && shown[4] == 0.0 && shown.iter().all(|x| (0.0..=1.0).contains(x))
        );
        let signed = [(SIGNED, b"US", vec![1, 0])];
        assert_eq!(read(&file(EXPLICIT, true, &signed, &pixels())).unwrap().values[4], -1.0);
    }

    #[test]
    fn sequences_of_unknown_length_are_passed_over() {
        let whole = file(EXPLICIT, true, &[], &pixels());
        let at = whole.windows(4).position(|w| w == [0x28, 0, 2, 0]).unwrap();
        let mut nested = whole[..at].to_vec();
        let open: &[u8] = &[
            0x20, 0, 0, 0x10, b'S', b'Q', 0, 0, 255, 255, 255, 255, 0xFE, 0xFF, 0, 0xE0, 255, 255, 255, 255,
        ];
        let close: &[u8] = &[0xFE, 0xFF, 0x0D, 0xE0, 0, 0, 0, 0, 0xFE, 0xFF, 0xDD, 0xE0, 0, 0, 0, 0];
        nested.extend(open.repeat(2));
        nested.extend(close.repeat(2));
        nested.extend(&whole[at..]);
        assert_eq!(read(&nested).unwrap(), read(&whole).unwrap());
        let mut deep = whole[..at].to_vec();
        deep.extend(open.repeat(10_000));
        assert!(read(&deep).unwrap_err().to_string().contains("deep"));
    }

    /// Puts a compressed image into a file without pixels, in three fragments of which the first is empty.
    fn with_fragments(mut file: Vec<u8>, jpeg: &[u8]) -> Vec<u8> {
        file.extend([0xE0, 0x7F, 0x10, 0, b'O', b'B', 0, 0, 255, 255, 255, 255]);
        for part in [&[][..], &jpeg[..20], &jpeg[20..]] {
            file.extend([0xFE, 0xFF, 0, 0xE0]);
            file.extend((part.len() as u32).to_le_bytes());
            file.extend(part);
        }
        file.extend([0xFE, 0xFF, 0xDD, 0xE0, 0, 0, 0, 0]);
        file
    }

    #[test]
    fn a_lossless_jpeg_image_is_unpacked_bit_for_bit() {
        // Twelve bits a pixel, as liblj92 writes them.
        let jpeg = b"\xff\xd8\xff\xc4\x00\x17\x00\x01\x01\x01\x01\0\0\0\0\0\0\0\0\0\0\0\0\x0b\x0c\x03\x0a\xff\xc3\x00\
              \x0b\x0c\x00\x02\x00\x03\x01\x00\x11\x00\xff\xda\x00\x08\x01\x00\x00\x06\x00\x00\x9f\xfe\x80\x07\xff\x00\xdc\xf9\
              \x39\xc4\xff\xd9";
        let bytes = with_fragments(file("1.2.840.10008.1.2.4.70", true, &[], &[]), jpeg);
        assert_eq!(read(&bytes).unwrap().values, [0.0, 2048.0, 4095.0, 7.0, 1000.0, 3000.0]);
        assert_broken_files_are_refused(&bytes, 4);
        let short = with_fragments(
            file("1.2.840.10008.1.2.4.70", true, &[(ALLOCATED, b"US", vec![8, 0])], &[]),
            jpeg,
        );
        assert!(read(&short).unwrap_err().to_string().contains("2 x 3 pixels of 8 bits"));
    }

    #[test]
    fn a_jpeg_image_is_unpacked() {
        let mut jpeg = Vec::new();
        image::codecs::jpeg::JpegEncoder::new_with_quality(&mut jpeg, 100)
            .encode(&[10, 20, 30, 40, 50, 60], 3, 2, image::ExtendedColorType::L8)
            .unwrap();
        let bytes = with_fragments(file("1.2.840.10008.1.2.4.50", true, &[], &[]), &jpeg);
        let image = read(&bytes).unwrap();
        assert!(
            image.values.iter().zip([10.0, 20.0, 30.0, 40.0, 50.0, 60.0]).all(|(a, b)| (a - b).abs() < 4.0)
        );
        assert_broken_files_are_refused(&bytes, 3);
    }

    #[test]
    fn what_is_no_single_grey_image_is_refused() {
        let cases: [(Vec<u8>, &str); 8] = [
            (file("1.2.840.10008.1.2.4.80", true, &[], &pixels()), "(JPEG-LS)"),
            (file("1.2.840.10008.1.2.2", true, &[], &pixels()), "(big endian)"),
            (file(EXPLICIT, true, &[], &[]), "no pixel data"),
            (file(EXPLICIT, true, &[(FRAMES, b"IS", b"12".to_vec())], &pixels()), "12 frames"),
            (file(EXPLICIT, true, &[(PHOTOMETRIC, b"CS", b"RGB ".to_vec())], &pixels()), "\"RGB\""),
            (file(EXPLICIT, true, &[(ROWS, b"US", vec![255, 255])], &pixels()), "12 bytes of pixels"),
            (file(EXPLICIT, true, &[(SLOPE, b"DS", b"nan ".to_vec())], &pixels()), "rescale slope"),
            (b"GIF".to_vec(), "no DICM"),
        ];
        for (bytes, words) in cases {
            let error = read(&bytes).unwrap_err();
            assert!(error.to_string().contains(words) && error.hint_text().is_some(), "{error}");
        }
    }

    #[test]
    fn broken_files_are_read_or_refused_but_never_break_the_reader() {
        assert_broken_files_are_refused(&file(EXPLICIT, true, &[], &pixels()), 0);
        assert_broken_files_are_refused(&file("1.2.840.10008.1.2", false, &[], &pixels()), 1);
    }

    /// Cuts the file at every byte, and turns bits and whole bytes at random places.
    fn assert_broken_files_are_refused(whole: &[u8], stream: u64) {
        for end in 0..whole.len() {
            let _ = read(&whole[..end]);
        }
        let mut rng = random_stream(0, "broken dicom", stream);
        for _ in 0..20_000 {
            let mut broken = whole.to_vec();
            for _ in 0..rng.random_range(1..4) {
                let at = rng.random_range(MAGIC_AT..broken.len());
                broken[at] =
                    if rng.random() { rng.random() } else { broken[at] ^ (1 << rng.random_range(0..8)) };
            }
            if let Ok(image) = read(&broken) {
                assert_eq!(image.values.len(), image.rows * image.columns);
                assert!(image.brightness().iter().all(|x| (0.0..=1.0).contains(x)));
            }
        }
    }
}
