//! Alerts: read from Avro packets of any schema version, and written as packets.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use kiln_data::avro::{AvroFile, AvroSchema, AvroValue, write_avro};
use kiln_data::fits::{FitsImage, gunzip, gzip};

use crate::fields::Names;
use crate::triplet::STAMPS;

/// Bytes that a packed stamp may unpack to: 256 × 256 doubles and their headers.
const LARGEST_STAMP: usize = 256 * 256 * 8 + 8 * 2880;
/// Bytes that a packed block of a file may unpack to.
const LARGEST_BLOCK: usize = 64 << 20;
/// Schemas that are kept prepared; beyond, all are forgotten.
const MOST_SCHEMAS: usize = 64;
/// The schema of the packets written here: those fields of version 4.02 that the simulator fills.
const SCHEMA: &str = include_str!("packet.avsc");

/// A field of `candidate`.
#[derive(Debug, Clone, PartialEq)]
pub enum Field {
    /// No value.
    Null,
    /// A truth value.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number.
    Number(f64),
    /// Text.
    Text(String),
}

impl Field {
    /// As a number, where it is one.
    pub fn as_number(&self) -> Option<f64> {
        match *self {
            Self::Int(value) => Some(value as f64),
            Self::Number(value) => Some(value),
            _ => None,
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => Ok(()),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Number(value) => write!(f, "{value}"),
            Self::Text(value) => f.write_str(value),
        }
    }
}

/// One measurement of a source.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Detection {
    /// Julian date.
    pub jd: f64,
    /// Filter.
    pub fid: i64,
    /// Magnitude.
    pub magpsf: f64,
}

/// A stamp, as it came or as it was made.
#[derive(Debug, Clone, PartialEq)]
pub enum Stamp {
    /// There is none.
    Absent,
    /// FITS, packed by gzip or not.
    Packed(Vec<u8>),
    /// Pixels.
    Image(FitsImage),
}

/// One alert of a survey.
#[derive(Debug, Clone, PartialEq)]
pub struct Alert {
    /// The source.
    pub object_id: String,
    /// The alert's own number.
    pub candid: i64,
    /// The version of the schema.
    pub version: String,
    /// The fields of `candidate`, in the order of the schema.
    pub candidate: Vec<(Arc<str>, Field)>,
    /// When it was observed, as a Julian date.
    pub jd: f64,
    /// Its magnitude.
    pub magpsf: f64,
    /// Entries of `prv_candidates`,
    pub prior_entries: usize,
    /// and those of them that are detections.
    pub prior: Vec<Detection>,
    /// Science, template and difference.
    pub stamps: [Stamp; 3],
}

impl Alert {
    /// A field of `candidate`.
    pub fn field(&self, name: &str) -> Option<&Field> {
        self.candidate.iter().find(|(field, _)| &**field == name).map(|(_, value)| value)
    }

    /// A field as a number; NaN counts as missing.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.field(name)?.as_number().filter(|value| !value.is_nan())
    }

    /// Whether the source is brighter than in the template.
    pub fn is_positive(&self) -> bool {
        match self.field("isdiffpos") {
            Some(Field::Text(text)) => is_positive(text),
            Some(Field::Bool(value)) => *value,
            Some(Field::Int(value)) => *value == 1,
            _ => false,
        }
    }

    /// This alert's own measurement.
    pub fn detection(&self) -> Detection {
        let fid = self.number("fid").unwrap_or(0.0) as i64;
        Detection { jd: self.jd, fid, magpsf: self.magpsf }
    }

    /// The pixels of the stamps.
    ///
    /// # Errors
    /// When one is missing or damaged, by its name.
    pub fn images(&self) -> Result<[FitsImage; 3], String> {
        let image = |at: usize| {
            let found = match &self.stamps[at] {
                Stamp::Absent => Err("is missing".to_string()),
                Stamp::Image(image) => Ok(image.clone()),
                Stamp::Packed(bytes) if bytes.starts_with(&[0x1f, 0x8b]) => {
                    gunzip(bytes, LARGEST_STAMP).and_then(|bytes| FitsImage::read(&bytes))
                }
                Stamp::Packed(bytes) => FitsImage::read(bytes),
            };
            found.map_err(|e| format!("the {} stamp {e}", STAMPS[at]))
        };
        Ok([image(0)?, image(1)?, image(2)?])
    }

    /// The alert as a packet of its own.
    ///
    /// # Panics
    /// When a field is not of the type that the schema of packets has for it.
    pub fn to_avro(&self) -> Vec<u8> {
        let field = |field: &'_ Field| match field {
            Field::Null => AvroValue::Null,
            Field::Bool(value) => AvroValue::Bool(*value),
            Field::Int(value) => AvroValue::Int(*value),
            Field::Number(value) => AvroValue::Number(*value),
            Field::Text(_) => AvroValue::Null, // replaced below, where it is borrowed
        };
        let candidate = self
            .candidate
            .iter()
            .map(|(name, value)| {
                let value = if let Field::Text(text) = value { AvroValue::Text(text) } else { field(value) };
                (&**name, value)
            })
            .chain([("jd", AvroValue::Number(self.jd)), ("magpsf", AvroValue::Number(self.magpsf))]);
        let prior = self.prior.iter().map(|detection| {
            AvroValue::Record(vec![
                ("jd", AvroValue::Number(detection.jd)),
                ("fid", AvroValue::Int(detection.fid)),
                ("magpsf", AvroValue::Number(detection.magpsf)),
                ("isdiffpos", AvroValue::Text("t")),
            ])
        });
        let names = STAMPS.map(|name| format!("candid{}_{name}.fits.gz", self.candid));
        let packed: Vec<Vec<u8>> = self
            .stamps
            .iter()
            .map(|stamp| match stamp {
                Stamp::Absent => Vec::new(),
                Stamp::Packed(bytes) => bytes.clone(),
                Stamp::Image(image) => gzip(&image.to_bytes()),
            })
            .collect();
        let cutout = |at: usize| match self.stamps[at] {
            Stamp::Absent => AvroValue::Null,
            _ => AvroValue::Record(vec![
                ("fileName", AvroValue::Text(&names[at])),
                ("stampData", AvroValue::Bytes(&packed[at])),
            ]),
        };
        let packet = AvroValue::Record(vec![
            ("schemavsn", AvroValue::Text(&self.version)),
            ("publisher", AvroValue::Text("Kiln")),
            ("objectId", AvroValue::Text(&self.object_id)),
            ("candid", AvroValue::Int(self.candid)),
            ("candidate", AvroValue::Record(candidate.collect())),
            ("prv_candidates", AvroValue::Array(prior.collect())),
            ("cutoutScience", cutout(0)),
            ("cutoutTemplate", cutout(1)),
            ("cutoutDifference", cutout(2)),
        ]);
        let schema = AvroSchema::parse(SCHEMA).expect("the schema is part of the program");
        write_avro(SCHEMA, &schema, &[packet]).unwrap_or_else(|e| panic!("alert {}: {e}", self.candid))
    }
}

/// `t`, `1` and their like.
fn is_positive(text: &str) -> bool {
    matches!(text, "t" | "1" | "true")
}

/// Why a packet, or a datum in it, is no alert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The source, where that much could be read.
    pub object_id: Option<String>,
    /// The alert's number, where that much could be read.
    pub candid: Option<i64>,
    /// What is wrong.
    pub reason: String,
}

impl Fault {
    fn of_file(reason: String) -> Self {
        Self { object_id: None, candid: None, reason }
    }
}

/// Reads packets; schemas that were met before are not parsed again.
#[derive(Debug, Default)]
pub struct AlertReader {
    names: Names,
    schemas: Mutex<HashMap<String, Arc<AvroSchema>>>,
}

impl AlertReader {
    /// For packets of the Zwicky Transient Facility.
    pub fn new() -> Self {
        Self::default()
    }

    /// For packets of another survey or broker, with these names of fields.
    pub fn with_names(names: Names) -> Self {
        Self { names, schemas: Mutex::default() }
    }

    /// The alerts in the bytes of a file; one in nearly all files.
    pub fn read(&self, bytes: &[u8]) -> Vec<Result<Alert, Fault>> {
        let mut alerts = Vec::new();
        if let Err(reason) = self.read_into(bytes, &mut alerts) {
            alerts.push(Err(Fault::of_file(reason)));
        }
        alerts
    }

    fn read_into(&self, bytes: &[u8], alerts: &mut Vec<Result<Alert, Fault>>) -> Result<(), String> {
        let mut file = AvroFile::new(bytes)?;
        let schema = self.schema(file.schema())?;
        let mut is_empty = true;
        while let Some((count, block)) = file.next_block(LARGEST_BLOCK)? {
            let mut rest = &block[..];
            for _ in 0..count {
                let (value, after) = schema.decode(rest)?;
                alerts.push(self.alert(&value));
                rest = after;
                is_empty = false;
            }
        }
        if is_empty { Err("holds no alert: is the file cut off?".into()) } else { Ok(()) }
    }

    /// The schema with what is not needed of it marked.
    fn schema(&self, json: &str) -> Result<Arc<AvroSchema>, String> {
        let known = || self.schemas.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(schema) = known().get(json) {
            return Ok(schema.clone());
        }
        let mut schema = AvroSchema::parse(json)?;
        schema.keep(|record, field| self.names.is_needed(record, field));
        let schema = Arc::new(schema);
        let mut known = known();
        if known.len() >= MOST_SCHEMAS {
            known.clear();
        }
        known.insert(json.into(), schema.clone());
        Ok(schema)
    }

    fn alert(&self, value: &AvroValue<'_>) -> Result<Alert, Fault> {
        let names = &self.names;
        let object_id = find(value, &names.object_id).and_then(|id| match id {
            AvroValue::Text(text) => Some((*text).to_string()),
            AvroValue::Int(number) => Some(number.to_string()),
            _ => None,
        });
        let candid = find(value, &names.candid).and_then(AvroValue::as_int);
        let fault = |reason: String| Fault { object_id: object_id.clone(), candid, reason };
        let missing = |name: &str| fault(format!("has no {name}: is it another survey's packet?"));
        let (Some(object), Some(number)) = (&object_id, candid) else {
            return Err(missing(if object_id.is_none() { &names.object_id } else { &names.candid }));
        };
        let Some(record @ AvroValue::Record(fields)) = value.get(&names.candidate) else {
            return Err(missing(&names.candidate));
        };
        let measured = fields.iter().filter_map(|(name, value)| {
            let converted = names.convert(name, field(value)?, |other| self::number(record, other));
            Some((names.ours(name), converted))
        });
        let mut candidate: Vec<(Arc<str>, Field)> = measured.collect();
        // What the packet does not say: the sign of a flux, and what stands in for a measurement.
        let sign = names.flux().and_then(|flux| self::number(record, flux));
        let sign = sign.map(|flux| ("isdiffpos", Field::Text(if flux > 0.0 { "t" } else { "f" }.into())));
        let absent = names.absent.iter().map(|(name, value)| (name.as_str(), Field::Number(*value)));
        for (ours, value) in sign.into_iter().chain(absent) {
            if !candidate.iter().any(|(name, value)| &**name == ours && *value != Field::Null) {
                candidate.retain(|(name, _)| &**name != ours);
                candidate.push((ours.into(), value));
            }
        }
        let required = |name: &str| {
            let found = candidate.iter().find(|(field, _)| &**field == name);
            let found = found.and_then(|(_, value)| value.as_number()).filter(|value| value.is_finite());
            found.ok_or_else(|| missing(&format!("{}.{name}", names.candidate)))
        };
        let (jd, magpsf) = (required("jd")?, required("magpsf")?);
        required("fid")?;
        let entries = match value.get(&names.prior) {
            Some(AvroValue::Array(entries)) => &entries[..],
            _ => &[],
        };
        let stamps = names.stamps.each_ref().map(|name| match value.get(name) {
            Some(AvroValue::Bytes(bytes)) => Stamp::Packed(bytes.to_vec()),
            Some(cutout) => match cutout.get(&names.stamp_data) {
                Some(AvroValue::Bytes(bytes)) => Stamp::Packed(bytes.to_vec()),
                _ => Stamp::Absent,
            },
            None => Stamp::Absent,
        });
        Ok(Alert {
            object_id: object.clone(),
            candid: number,
            version: value.get("schemavsn").and_then(AvroValue::as_text).unwrap_or_default().into(),
            jd,
            magpsf,
            prior_entries: entries.len(),
            prior: entries.iter().filter_map(|entry| self.detection(entry)).collect(),
            stamps,
            candidate,
        })
    }

    /// An entry of the packet's history, where it is a detection of a brighter source.
    fn detection(&self, entry: &AvroValue<'_>) -> Option<Detection> {
        let measured = |ours: &str| {
            let theirs = self.names.theirs(ours);
            let value = field(entry.get(theirs)?)?;
            let value = self.names.convert(theirs, value, |other| number(entry, other)).as_number();
            value.filter(|value| value.is_finite())
        };
        let positive = match (entry.get(self.names.theirs("isdiffpos")), self.names.flux()) {
            (Some(AvroValue::Text(text)), _) => is_positive(text),
            (Some(AvroValue::Bool(value)), _) => *value,
            (Some(AvroValue::Int(value)), _) => *value == 1,
            (_, Some(flux)) => number(entry, flux)? > 0.0,
            _ => false,
        };
        let (jd, fid, magpsf) = (measured("jd")?, measured("fid")? as i64, measured("magpsf")?);
        positive.then_some(Detection { jd, fid, magpsf })
    }
}

/// A field of a record, or of a record in it: `record.field`.
fn find<'v, 'b>(value: &'v AvroValue<'b>, path: &str) -> Option<&'v AvroValue<'b>> {
    path.split('.').try_fold(value, |value, name| value.get(name))
}

/// A number of a record.
fn number(record: &AvroValue<'_>, name: &str) -> Option<f64> {
    record.get(name).and_then(AvroValue::as_number).filter(|value| value.is_finite())
}

/// A value without parts.
fn field(value: &AvroValue<'_>) -> Option<Field> {
    Some(match value {
        AvroValue::Null => Field::Null,
        AvroValue::Bool(value) => Field::Bool(*value),
        AvroValue::Int(value) => Field::Int(*value),
        AvroValue::Number(value) => Field::Number(*value),
        AvroValue::Text(text) => Field::Text((*text).into()),
        _ => return None,
    })
}
