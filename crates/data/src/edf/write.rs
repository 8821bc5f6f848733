//! Writing whole recordings.

use std::path::Path;

use kiln_core::{Error, Result, write_atomic};

use super::annotations::{Annotation, encode};
use super::header::{BLOCK, EdfFormat, EdfHeader, EdfKind, EdfSignal, SIGNAL_FIELDS};

/// Writes a recording, atomically. `samples` holds the numbers of the converter, one list a signal, in whole records;
/// records follow one another without gaps. Where there are annotations, the file is EDF+ (or BDF+), and a signal for
/// them is added to those of the header, which must have none.
///
/// # Errors
/// When a text or number does not fit into its field, samples do not fill whole records or leave the range of the
/// converter, or the file cannot be written.
pub fn write_edf(
    path: &Path,
    header: &EdfHeader,
    samples: &[Vec<i32>],
    annotations: &[Annotation],
) -> Result<()> {
    let bytes = encode_file(header, samples, annotations)
        .map_err(|found| Error::input(path.display(), format!("cannot be written: {found}")))?;
    write_atomic(path, &bytes)
}

fn encode_file(
    header: &EdfHeader,
    samples: &[Vec<i32>],
    annotations: &[Annotation],
) -> Result<Vec<u8>, String> {
    let records = check(header, samples)?;
    let mut header = header.clone();
    let lists = match header.kind {
        EdfKind::Plain if annotations.is_empty() => Vec::new(),
        EdfKind::Discontinuous => return Err("recordings with gaps are not written".into()),
        _ => {
            header.kind = EdfKind::Continuous;
            let lists = annotation_bytes(annotations, records, header.record_seconds);
            let longest = lists.iter().map(Vec::len).max().unwrap_or(0) as u64;
            header.signals.push(annotation_signal(header.format, longest));
            lists
        }
    };
    let mut bytes = encode_header(&header, records)?;
    let width = header.format.width() as usize;
    for record in 0..records {
        for (signal, samples) in header.signals.iter().zip(samples) {
            let count = signal.samples_per_record;
            for sample in &samples[record * count..(record + 1) * count] {
                bytes.extend(&sample.to_le_bytes()[..width]);
            }
        }
        if let (Some(list), Some(signal)) = (lists.get(record), header.signals.last()) {
            let end = bytes.len() + signal.samples_per_record * width;
            bytes.extend(list);
            bytes.resize(end, 0);
        }
    }
    Ok(bytes)
}

/// The number of records, if the samples fill them.
fn check(header: &EdfHeader, samples: &[Vec<i32>]) -> Result<usize, String> {
    if header.signals.is_empty() || header.signals.len() != samples.len() {
        return Err(format!("{} signals with {} lists of samples", header.signals.len(), samples.len()));
    }
    if !(header.record_seconds.is_finite() && header.record_seconds > 0.0) {
        return Err(format!("records of {} seconds", header.record_seconds));
    }
    let mut records = None;
    for (signal, samples) in header.signals.iter().zip(samples) {
        let label = &signal.label;
        signal.scale().map_err(|found| format!("signal \"{label}\": {found}"))?;
        if signal.is_annotation() {
            return Err(format!("signal \"{label}\" is added by itself"));
        }
        let count = signal.samples_per_record;
        if count == 0 || !samples.len().is_multiple_of(count) {
            return Err(format!("signal \"{label}\": {} samples, {count} a record", samples.len()));
        }
        let range = signal.digital_min..=signal.digital_max;
        if let Some(sample) = samples.iter().find(|sample| !range.contains(sample)) {
            return Err(format!("signal \"{label}\": the sample {sample} is outside of {range:?}"));
        }
        match records {
            None => records = Some(samples.len() / count),
            Some(records) if records != samples.len() / count => {
                return Err(format!(
                    "signal \"{label}\" has {} records, others {records}",
                    samples.len() / count
                ));
            }
            Some(_) => {}
        }
    }
    records.filter(|&records| records > 0).ok_or_else(|| "there are no samples".into())
}

/// For each record the list of its time, and those of the annotations that begin within it.
fn annotation_bytes(annotations: &[Annotation], records: usize, seconds: f64) -> Vec<Vec<u8>> {
    let mut lists: Vec<Vec<u8>> =
        (0..records).map(|record| encode(record as f64 * seconds, None, "")).collect();
    for annotation in annotations {
        let record = ((annotation.onset / seconds).max(0.0) as usize).min(records - 1);
        lists[record].extend(encode(annotation.onset, annotation.duration, &annotation.text));
    }
    lists
}

fn annotation_signal(format: EdfFormat, bytes: u64) -> EdfSignal {
    let (name, limit) = match format {
        EdfFormat::Edf => ("EDF Annotations", 1 << 15),
        EdfFormat::Bdf => ("BDF Annotations", 1 << 23),
    };
    EdfSignal {
        label: name.into(),
        transducer: String::new(),
        unit: String::new(),
        physical_min: -1.0,
        physical_max: 1.0,
        digital_min: -limit,
        digital_max: limit - 1,
        prefilter: String::new(),
        samples_per_record: bytes.div_ceil(format.width()) as usize,
    }
}

fn encode_header(header: &EdfHeader, records: usize) -> Result<Vec<u8>, String> {
    let mut bytes = match header.format {
        EdfFormat::Edf => b"0       ".to_vec(),
        EdfFormat::Bdf => b"\xffBIOSEMI".to_vec(),
    };
    let reserved = match (header.format, header.kind) {
        (EdfFormat::Edf, EdfKind::Plain) => "",
        (EdfFormat::Bdf, EdfKind::Plain) => "24BIT",
        (EdfFormat::Edf, _) => "EDF+C",
        (EdfFormat::Bdf, _) => "BDF+C",
    };
    let count = header.signals.len();
    for (text, width) in [
        (header.patient.clone(), 80),
        (header.recording.clone(), 80),
        (header.start_date.clone(), 8),
        (header.start_time.clone(), 8),
        ((BLOCK as usize * (count + 1)).to_string(), 8),
        (reserved.into(), 44),
        (records.to_string(), 8),
        (shortened(header.record_seconds)?, 8),
        (count.to_string(), 4),
    ] {
        put(&mut bytes, &text, width)?;
    }
    for (which, width) in SIGNAL_FIELDS.into_iter().enumerate() {
        for signal in &header.signals {
            let text = match which {
                0 => signal.label.clone(),
                1 => signal.transducer.clone(),
                2 => signal.unit.clone(),
                3 => shortened(signal.physical_min)?,
                4 => shortened(signal.physical_max)?,
                5 => signal.digital_min.to_string(),
                6 => signal.digital_max.to_string(),
                7 => signal.prefilter.clone(),
                8 => signal.samples_per_record.to_string(),
                _ => String::new(),
            };
            put(&mut bytes, &text, width)?;
        }
    }
    Ok(bytes)
}

/// One field of ASCII, filled up with spaces.
fn put(bytes: &mut Vec<u8>, text: &str, width: usize) -> Result<(), String> {
    if !text.bytes().all(|byte| (32..127).contains(&byte)) {
        return Err(format!("\"{text}\" is not plain ASCII"));
    }
    if text.len() > width {
        return Err(format!("\"{text}\" is longer than its field of {width} characters"));
    }
    bytes.extend(text.bytes());
    bytes.extend(std::iter::repeat_n(b' ', width - text.len()));
    Ok(())
}

/// A number in at most eight characters, with as many decimals as there is room for.
fn shortened(value: f64) -> Result<String, String> {
    let exact = value.to_string();
    if exact.len() <= 8 {
        return Ok(exact);
    }
    (0..=6)
        .rev()
        .map(|decimals| format!("{value:.decimals$}"))
        .find(|text| text.len() <= 8)
        .ok_or_else(|| format!("{value} does not fit into eight characters"))
}
