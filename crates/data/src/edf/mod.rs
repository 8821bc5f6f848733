//! EDF, EDF+ and BDF: recordings of many signals, such as EEG, in records of equal duration.
//!
//! Source: Kemp et al., "A simple format for exchange of digitized polygraphic recordings", 1992; Kemp and Olivan, "European
//! data format 'plus'", 2003; BDF is BioSemi's form with samples of 24 bits. [`EdfReader`] reads record by record, so that
//! memory grows with what is asked for and not with the file; [`write_edf`] writes whole files.

mod annotations;
mod header;
mod write;

use std::fs::File;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

use kiln_core::{Error, Result};

pub use annotations::Annotation;
pub use header::{EdfFormat, EdfHeader, EdfKind, EdfSignal};
pub use write::write_edf;

/// Most bytes that are read ahead.
const READ_AHEAD: usize = 1 << 18;
/// Two records follow without a gap when their times differ from a record's duration by less than this share of it.
const GAP: f64 = 0.01;

/// Records without a gap between them.
#[derive(Debug, Clone, PartialEq)]
pub struct Stretch {
    /// Seconds from the beginning of the recording.
    pub start: f64,
    /// The records.
    pub records: Range<usize>,
}

/// An open recording.
#[derive(Debug)]
pub struct EdfReader {
    path: PathBuf,
    file: BufReader<File>,
    /// Where in the file the next byte comes from.
    position: u64,
    header: EdfHeader,
    records: usize,
    warnings: Vec<String>,
}

impl EdfReader {
    /// Opens a recording and checks its header. Only whole records count; where the header promises more or fewer,
    /// [`warnings`](Self::warnings) says so.
    ///
    /// # Errors
    /// When the file is missing, is neither EDF nor BDF, its header is wrong, or it holds no whole record.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let mut file = BufReader::with_capacity(READ_AHEAD, file);
        let header = EdfHeader::read(&mut file, size, path)?;
        let (begin, record) = (header.bytes(), header.record_bytes());
        let (whole, rest) = ((size - begin) / record, (size - begin) % record);
        let mut warnings = Vec::new();
        let records = match header.declared_records {
            None => {
                warnings
                    .push(format!("the header does not say how many records there are; {whole} are whole"));
                whole
            }
            Some(declared) if declared > whole => {
                warnings.push(format!("the file is cut off: {whole} of {declared} records are whole"));
                whole
            }
            Some(declared) => declared,
        };
        if header.declared_records.is_some_and(|declared| declared < whole) || (rest > 0 && records == whole)
        {
            let left = size - begin - records * record;
            warnings.push(format!("{left} bytes after the last whole record are not read"));
        }
        if records == 0 {
            let found = format!("holds no whole record: {} bytes of data, {record} a record", size - begin);
            return Err(Error::input(path.display(), found).hint("the recording was cut off; fetch it again"));
        }
        let records = usize::try_from(records)
            .map_err(|_| Error::input(path.display(), format!("claims {records} records")))?;
        Ok(Self { path: path.into(), file, position: begin, header, records, warnings })
    }

    /// What the header says.
    pub fn header(&self) -> &EdfHeader {
        &self.header
    }

    /// Where it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whole records.
    pub fn records(&self) -> usize {
        self.records
    }

    /// Seconds of signal, gaps left out.
    pub fn seconds(&self) -> f64 {
        self.records as f64 * self.header.record_seconds
    }

    /// What is odd about the file, but does not keep it from being read.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The samples of these signals, as numbers of the converter, record by record: `each(place in signals, samples)`.
    ///
    /// # Errors
    /// When a signal or record does not exist, the file cannot be read, or `each` fails.
    pub fn visit(
        &mut self,
        signals: &[usize],
        records: Range<usize>,
        mut each: impl FnMut(usize, &[i32]) -> Result<()>,
    ) -> Result<()> {
        if let Some(signal) = signals.iter().find(|&&signal| signal >= self.header.signals.len()) {
            let count = self.header.signals.len();
            return Err(Error::usage(format!(
                "{}: no signal {signal}, there are {count}",
                self.path.display()
            )));
        }
        if records.end > self.records {
            let message = format!("{}: records {records:?}, there are {}", self.path.display(), self.records);
            return Err(Error::usage(message));
        }
        // In the order of the file, which is then read forwards.
        let mut order: Vec<usize> = (0..signals.len()).collect();
        order.sort_by_key(|&place| signals[place]);
        let (mut bytes, mut samples) = (Vec::new(), Vec::new());
        for record in records {
            for &place in &order {
                self.read_bytes(record, signals[place], &mut bytes)?;
                samples.clear();
                match self.header.format {
                    EdfFormat::Edf => {
                        samples.extend(
                            bytes.as_chunks::<2>().0.iter().map(|&b| i32::from(i16::from_le_bytes(b))),
                        );
                    }
                    // Three bytes above an empty one, moved down with their sign.
                    EdfFormat::Bdf => samples.extend(
                        bytes
                            .as_chunks::<3>()
                            .0
                            .iter()
                            .map(|&[a, b, c]| i32::from_le_bytes([0, a, b, c]) >> 8),
                    ),
                }
                each(place, &samples)?;
            }
        }
        Ok(())
    }

    /// The samples of these signals as numbers of the converter, one list a signal.
    ///
    /// # Errors
    /// As [`visit`](Self::visit).
    pub fn read_digital(&mut self, signals: &[usize], records: Range<usize>) -> Result<Vec<Vec<i32>>> {
        let mut all: Vec<Vec<i32>> = vec![Vec::new(); signals.len()];
        self.visit(signals, records, |place, samples| {
            all[place].extend_from_slice(samples);
            Ok(())
        })?;
        Ok(all)
    }

    /// The samples of these signals in their physical units, one list a signal.
    ///
    /// # Errors
    /// As [`visit`](Self::visit), and when the ranges of a signal do not say what its numbers mean.
    pub fn read(&mut self, signals: &[usize], records: Range<usize>) -> Result<Vec<Vec<f64>>> {
        let scale = |&signal: &usize| match self.header.signals.get(signal) {
            Some(described) => described.scale().map_err(|found| self.malformed(signal, &found)),
            None => Ok((0.0, 0.0)), // refused below
        };
        let scales = signals.iter().map(scale).collect::<Result<Vec<_>>>()?;
        let mut all: Vec<Vec<f64>> = vec![Vec::new(); signals.len()];
        self.visit(signals, records, |place, samples| {
            let (gain, offset) = scales[place];
            all[place].extend(samples.iter().map(|&d| f64::from(d) * gain + offset));
            Ok(())
        })?;
        Ok(all)
    }

    /// All annotations in the order of the file. Bytes that are none are passed over with a warning.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn annotations(&mut self) -> Result<Vec<Annotation>> {
        Ok(self.timed_annotations()?.1)
    }

    /// The records in stretches without gaps; only EDF+D and BDF+D have more than one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn stretches(&mut self) -> Result<Vec<Stretch>> {
        if self.header.kind != EdfKind::Discontinuous {
            return Ok(vec![Stretch { start: 0.0, records: 0..self.records }]);
        }
        let (starts, _) = self.timed_annotations()?;
        let seconds = self.header.record_seconds;
        let mut stretches: Vec<Stretch> = Vec::new();
        for (record, start) in starts.into_iter().enumerate() {
            let expected = stretches.last().map(|s| s.start + s.records.len() as f64 * seconds);
            let start = start.or(expected).unwrap_or(0.0);
            match (stretches.last_mut(), expected) {
                (Some(last), Some(expected)) if (start - expected).abs() <= GAP * seconds => {
                    last.records.end = record + 1;
                }
                _ => stretches.push(Stretch { start, records: record..record + 1 }),
            }
        }
        Ok(stretches)
    }

    /// When each record begins, where it says so, and the annotations.
    fn timed_annotations(&mut self) -> Result<(Vec<Option<f64>>, Vec<Annotation>)> {
        let mut starts = vec![None; self.records];
        let mut all = Vec::new();
        let signals: Vec<usize> =
            (0..self.header.signals.len()).filter(|&s| self.header.signals[s].is_annotation()).collect();
        let mut malformed = 0;
        let mut bytes = Vec::new();
        for (record, start) in starts.iter_mut().enumerate() {
            for &signal in &signals {
                self.read_bytes(record, signal, &mut bytes)?;
                let found = annotations::parse(&bytes);
                *start = start.or(found.record_start);
                malformed += found.malformed;
                all.extend(found.annotations);
            }
        }
        if malformed > 0 {
            let warning = format!("{malformed} annotations are malformed and were passed over");
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
        Ok((starts, all))
    }

    /// The bytes of one signal in one record.
    fn read_bytes(&mut self, record: usize, signal: usize, bytes: &mut Vec<u8>) -> Result<()> {
        let (begin, length) = self.header.place(signal);
        let at = self.header.bytes() + record as u64 * self.header.record_bytes() + begin;
        // Within a whole record, so that the length is one of bytes that are there.
        bytes.resize(length, 0);
        let read = self.file.seek_relative(at as i64 - self.position as i64);
        read.and_then(|()| self.file.read_exact(bytes)).map_err(Error::io("read", &self.path))?;
        self.position = at + length as u64;
        Ok(())
    }

    /// An error about one signal.
    fn malformed(&self, signal: usize, found: &str) -> Error {
        let label = self.header.signals.get(signal).map_or("", |s| s.label.as_str());
        Error::input(format!("{}: signal {} \"{label}\"", self.path.display(), signal + 1), found)
            .hint("the header is wrong; leave this signal out or export the recording again")
    }
}

#[cfg(test)]
mod tests;
