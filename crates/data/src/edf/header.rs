//! The header: 256 bytes about the recording, and 256 about each signal, all of it text.

use std::io::Read;
use std::path::Path;

use kiln_core::{Error, Result};
use serde::Serialize;

/// Bytes of the recording's part of the header, and of each signal's.
pub(super) const BLOCK: u64 = 256;
/// Widths of a signal's fields, each of which stands for all signals in turn.
pub(super) const SIGNAL_FIELDS: [usize; 10] = [16, 80, 8, 8, 8, 8, 8, 80, 8, 32];
const BIOSEMI: &[u8] = b"\xffBIOSEMI";

/// How wide a sample is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum EdfFormat {
    /// 16 bits.
    Edf,
    /// 24 bits.
    Bdf,
}

impl EdfFormat {
    /// Bytes of a sample.
    pub(super) fn width(self) -> u64 {
        match self {
            Self::Edf => 2,
            Self::Bdf => 3,
        }
    }

    /// Numbers that a sample can hold.
    fn limits(self) -> (i32, i32) {
        match self {
            Self::Edf => (i16::MIN.into(), i16::MAX.into()),
            Self::Bdf => (-(1 << 23), (1 << 23) - 1),
        }
    }
}

/// Whether there are annotations and gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EdfKind {
    /// EDF or BDF as of old: neither.
    Plain,
    /// EDF+C, BDF+C: annotations.
    Continuous,
    /// EDF+D, BDF+D: annotations, and possibly gaps between records.
    Discontinuous,
}

/// One signal.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EdfSignal {
    /// Its name, such as `EEG FP1-REF`.
    pub label: String,
    /// The sensor.
    pub transducer: String,
    /// The physical unit, such as `uV`.
    pub unit: String,
    /// The physical value of `digital_min`.
    pub physical_min: f64,
    /// The physical value of `digital_max`.
    pub physical_max: f64,
    /// Least number of the converter.
    pub digital_min: i32,
    /// Largest number of the converter.
    pub digital_max: i32,
    /// Filters that the signal has passed.
    pub prefilter: String,
    /// Samples in every record.
    pub samples_per_record: usize,
}

impl EdfSignal {
    /// Whether it holds annotations in place of samples.
    pub fn is_annotation(&self) -> bool {
        self.label == "EDF Annotations" || self.label == "BDF Annotations"
    }

    /// Gain and offset of `physical = digital · gain + offset`.
    ///
    /// # Errors
    /// Says why the ranges give none.
    pub fn scale(&self) -> Result<(f64, f64), String> {
        let (low, high) = (self.physical_min, self.physical_max);
        if low == high {
            return Err(format!("physical minimum and maximum are both {low}, so that its unit is unknown"));
        }
        if self.digital_min >= self.digital_max {
            let (low, high) = (self.digital_min, self.digital_max);
            return Err(format!("the digital minimum {low} is not below the maximum {high}"));
        }
        let gain = (high - low) / (f64::from(self.digital_max) - f64::from(self.digital_min));
        Ok((gain, low - f64::from(self.digital_min) * gain))
    }
}

/// What a file says about itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EdfHeader {
    /// Width of the samples.
    pub format: EdfFormat,
    /// Whether there are annotations and gaps.
    pub kind: EdfKind,
    /// About the patient.
    pub patient: String,
    /// About the recording.
    pub recording: String,
    /// When it began, `dd.mm.yy`.
    pub start_date: String,
    /// When it began, `hh.mm.ss`.
    pub start_time: String,
    /// Records that the header promises, where it does.
    pub declared_records: Option<u64>,
    /// Duration of a record.
    pub record_seconds: f64,
    /// The signals in the order of the file.
    pub signals: Vec<EdfSignal>,
}

impl EdfHeader {
    /// Bytes of the header.
    pub(super) fn bytes(&self) -> u64 {
        BLOCK * (self.signals.len() as u64 + 1)
    }

    /// Bytes of a record.
    pub(super) fn record_bytes(&self) -> u64 {
        self.signals.iter().map(|s| s.samples_per_record as u64).sum::<u64>() * self.format.width()
    }

    /// Where a signal's bytes begin in a record, and how many there are.
    pub(super) fn place(&self, signal: usize) -> (u64, usize) {
        let width = self.format.width();
        let before: u64 = self.signals[..signal].iter().map(|s| s.samples_per_record as u64).sum();
        (before * width, self.signals[signal].samples_per_record * width as usize)
    }

    /// Samples a second of a signal; 0 where a record has no duration.
    pub fn rate(&self, signal: usize) -> f64 {
        match self.record_seconds > 0.0 {
            true => self.signals[signal].samples_per_record as f64 / self.record_seconds,
            false => 0.0,
        }
    }

    /// When the recording began, as `2005-09-15T10:18:42`; years before 85 are of this century. `None` where the fields
    /// hold no date.
    pub fn start(&self) -> Option<String> {
        let three = |text: &str| -> Option<[u32; 3]> {
            text.split(['.', ':', '-', '/'])
                .map(|n| n.trim().parse().ok())
                .collect::<Option<Vec<_>>>()?
                .try_into()
                .ok()
        };
        let [day, month, year] = three(&self.start_date)?;
        let [hour, minute, second] = three(&self.start_time)?;
        let is_date = (1..=31).contains(&day) && (1..=12).contains(&month) && year < 100;
        if !is_date || hour > 23 || minute > 59 || second > 59 {
            return None;
        }
        let year = if year >= 85 { 1900 + year } else { 2000 + year };
        Some(format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}"))
    }

    /// Reads and checks the header of a file of `size` bytes.
    pub(super) fn read(file: &mut impl Read, size: u64, path: &Path) -> Result<Self> {
        let malformed = |found: String| {
            Error::input(path.display(), found).hint("is it a complete EDF, EDF+ or BDF recording?")
        };
        if size < BLOCK {
            return Err(malformed(format!("has {size} bytes, too few for the header of an EDF file")));
        }
        let mut bytes = vec![0; BLOCK as usize];
        file.read_exact(&mut bytes).map_err(Error::io("read", path))?;
        let format = match &bytes[..8] {
            BIOSEMI => EdfFormat::Bdf,
            version if text(version) == "0" => EdfFormat::Edf,
            version => {
                let found =
                    format!("begins with \"{}\", neither as EDF nor as BDF", text(version).escape_debug());
                return Err(malformed(found));
            }
        };
        let field = |from: usize, to: usize| text(&bytes[from..to]);
        let count: u64 = number(&field(252, 256), "number of signals").map_err(malformed)?;
        let claimed: u64 = number(&field(184, 192), "size of the header").map_err(malformed)?;
        let needed = BLOCK * (count + 1); // at most 9999 signals: the field has four digits
        if count == 0 {
            return Err(malformed("has no signals".into()));
        }
        if claimed != needed {
            let found = format!("its header claims {claimed} bytes, but {count} signals need {needed}");
            return Err(malformed(found));
        }
        if needed > size {
            return Err(malformed(format!("has {size} bytes, but its header alone needs {needed}")));
        }
        let records: i64 = number(&field(236, 244), "number of records").map_err(malformed)?;
        let record_seconds: f64 = number(&field(244, 252), "duration of a record").map_err(malformed)?;
        if records < -1 {
            return Err(malformed(format!("claims {records} records")));
        }
        if !(record_seconds.is_finite() && record_seconds >= 0.0) {
            return Err(malformed(format!("records last {record_seconds} seconds")));
        }
        let reserved = field(192, 236);
        let kind = match reserved.get(..5) {
            Some("EDF+C" | "BDF+C") => EdfKind::Continuous,
            Some("EDF+D" | "BDF+D") => EdfKind::Discontinuous,
            _ => EdfKind::Plain,
        };
        let mut rest = vec![0; (needed - BLOCK) as usize];
        file.read_exact(&mut rest).map_err(Error::io("read", path))?;
        let signals = signals(&rest, count as usize, format).map_err(malformed)?;
        let header = Self {
            format,
            kind,
            patient: field(8, 88),
            recording: field(88, 168),
            start_date: field(168, 176),
            start_time: field(176, 184),
            declared_records: u64::try_from(records).ok(),
            record_seconds,
            signals,
        };
        if header.record_bytes() == 0 {
            return Err(malformed("no signal has samples".into()));
        }
        if record_seconds == 0.0 && header.signals.iter().any(|s| !s.is_annotation()) {
            return Err(malformed("its records last 0 seconds, so that signals have no sample rate".into()));
        }
        Ok(header)
    }
}

/// The signals' part of the header.
fn signals(bytes: &[u8], count: usize, format: EdfFormat) -> Result<Vec<EdfSignal>, String> {
    let mut starts = [0; SIGNAL_FIELDS.len()];
    let mut at = 0;
    for (start, width) in starts.iter_mut().zip(SIGNAL_FIELDS) {
        *start = at;
        at += width * count;
    }
    let one = |signal: usize| {
        let field = |which: usize| {
            let width = SIGNAL_FIELDS[which];
            text(&bytes[starts[which] + signal * width..][..width])
        };
        let label = field(0);
        let place = |name: &str| format!("signal {} \"{}\": {name}", signal + 1, label.escape_debug());
        let physical = |which, name| {
            let value: f64 = number(&field(which), &place(name))?;
            match value.is_finite() {
                true => Ok(value),
                false => Err(format!("{} is {value}", place(name))),
            }
        };
        let (least, largest) = format.limits();
        let digital = |which, name| {
            // Some programs write whole numbers as 32767.0.
            let value: f64 = number(&field(which), &place(name))?;
            match value.fract() == 0.0 && (f64::from(least)..=f64::from(largest)).contains(&value) {
                true => Ok(value as i32),
                false => {
                    Err(format!("{} is {value}, not a whole number from {least} to {largest}", place(name)))
                }
            }
        };
        Ok::<_, String>(EdfSignal {
            transducer: field(1),
            unit: field(2),
            physical_min: physical(3, "physical minimum")?,
            physical_max: physical(4, "physical maximum")?,
            digital_min: digital(5, "digital minimum")?,
            digital_max: digital(6, "digital maximum")?,
            prefilter: field(7),
            // Eight digits at most.
            samples_per_record: number::<u32>(&field(8), &place("samples in a record"))? as usize,
            label: label.clone(),
        })
    };
    (0..count).map(one).collect()
}

/// A field as text. Every byte is a character, as Latin-1 has them; the standard allows ASCII only.
fn text(bytes: &[u8]) -> String {
    let text: String = bytes.iter().map(|&byte| char::from(byte)).collect();
    text.trim_matches(|c: char| c == ' ' || c == '\0').into()
}

/// A field as a number.
fn number<T: std::str::FromStr>(text: &str, name: &str) -> Result<T, String> {
    text.parse().map_err(|_| format!("{name} is \"{}\", not a number that fits", text.escape_debug()))
}
