//! What packets call what is needed of them, and in which units it is. Another survey's or broker's are given as a JSON file,
//! as this for the Rubin observatory's:
//!
//! ```json
//! {
//!   "object_id": "diaSource.diaObjectId", "candid": "diaSource.diaSourceId", "candidate": "diaSource", "prior": "prvDiaSources",
//!   "fields": {"midpointMjdTai": "jd", "band": "fid", "psfFlux": "magpsf", "psfFluxErr": "sigmapsf"},
//!   "units": {"midpointMjdTai": "MJD", "band": "band", "psfFlux": "nJy", "psfFluxErr": {"error_of": "psfFlux"}},
//!   "absent": {"sgscore1": -999, "distpsnr1": -999}
//! }
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

use crate::packet::Field;

/// Names of a packet's parts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Names {
    /// The source; `record.field` for a field of a record.
    pub object_id: String,
    /// The alert's own number, likewise.
    pub candid: String,
    /// The record of the alert's measurements.
    pub candidate: String,
    /// The list of earlier ones.
    pub prior: String,
    /// The stamps: science, template, difference. Bytes, or records that hold them.
    pub stamps: [String; 3],
    /// The bytes in the record of a stamp.
    pub stamp_data: String,
    /// Measurements that have another name: theirs and ZTF's.
    pub fields: BTreeMap<String, String>,
    /// Units of measurements, by their names there, where these are not ZTF's.
    pub units: BTreeMap<String, Unit>,
    /// What stands in for measurements that the packets do not have, by ZTF's names; -999 is ZTF's own value for what is not
    /// known.
    pub absent: BTreeMap<String, f64>,
}

/// A unit that is not ZTF's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unit {
    /// Flux in nanojansky; becomes an AB magnitude.
    #[serde(rename = "nJy")]
    Nanojansky,
    /// Flux in microjansky.
    #[serde(rename = "uJy")]
    Microjansky,
    /// Flux in millijansky.
    #[serde(rename = "mJy")]
    Millijansky,
    /// Flux in jansky.
    #[serde(rename = "Jy")]
    Jansky,
    /// The error of a flux, whose name it is given; becomes that of the magnitude.
    #[serde(rename = "error_of")]
    ErrorOf(String),
    /// A modified Julian date.
    #[serde(rename = "MJD")]
    ModifiedJulianDate,
    /// A filter by its letter: g, r and i are ZTF's 1, 2 and 3, then come u, z and y.
    #[serde(rename = "band")]
    Band,
}

/// The flux of magnitude 0 in nanojansky is 10 to the power of this by 2.5 (Oke and Gunn 1983).
const AB_ZERO_OF_NJY: f64 = 31.4;
/// The Julian date at which modified ones begin.
const MJD_ZERO: f64 = 2_400_000.5;

impl Unit {
    /// Nanojansky in one of a unit of flux.
    fn nanojansky(&self) -> Option<f64> {
        match self {
            Self::Nanojansky => Some(1.0),
            Self::Microjansky => Some(1e3),
            Self::Millijansky => Some(1e6),
            Self::Jansky => Some(1e9),
            _ => None,
        }
    }

    /// A value of this unit in ZTF's; none where there is no such, as the magnitude of no flux. `other` gives further numbers
    /// of the record. A source that became fainter has a magnitude too, that of the flux it lost.
    fn convert(&self, value: &Field, other: impl Fn(&str) -> Option<f64>) -> Field {
        let number = || value.as_number().filter(|value| !value.is_nan());
        let converted = match self {
            Self::Nanojansky | Self::Microjansky | Self::Millijansky | Self::Jansky => number()
                .filter(|flux| *flux != 0.0)
                .zip(self.nanojansky())
                .map(|(flux, unit)| AB_ZERO_OF_NJY - 2.5 * (flux * unit).abs().log10()),
            Self::ErrorOf(flux) => number()
                .zip(other(flux).filter(|flux| *flux != 0.0))
                .map(|(error, flux)| 2.5 / std::f64::consts::LN_10 * (error / flux).abs()),
            Self::ModifiedJulianDate => number().map(|date| date + MJD_ZERO),
            Self::Band => match value {
                Field::Text(letter) => ["g", "r", "i", "u", "z", "y"]
                    .iter()
                    .position(|band| band == letter)
                    .map(|at| (at + 1) as f64),
                _ => None,
            },
        };
        converted.map_or(Field::Null, Field::Number)
    }
}

impl Default for Names {
    fn default() -> Self {
        Self {
            object_id: "objectId".into(),
            candid: "candid".into(),
            candidate: "candidate".into(),
            prior: "prv_candidates".into(),
            stamps: ["cutoutScience", "cutoutTemplate", "cutoutDifference"].map(String::from),
            stamp_data: "stampData".into(),
            fields: BTreeMap::new(),
            units: BTreeMap::new(),
            absent: BTreeMap::new(),
        }
    }
}

/// What is read of an earlier measurement.
const OF_PRIOR: [&str; 4] = ["jd", "fid", "magpsf", "isdiffpos"];

impl Names {
    /// Reads a file of names; those that it does not give are ZTF's.
    ///
    /// # Errors
    /// When it cannot be read or names other things.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).map_err(Error::io("read", path))?;
        serde_json::from_str(&text).map_err(|e| {
            Error::input(path.display(), "does not name fields of packets").caused_by(e).hint(
                "write a JSON object such as {\"candidate\": \"diaSource\", \"fields\": {\"midpointMjd\": \"jd\"}}",
            )
        })
    }

    /// Our name of one of their measurements.
    pub fn ours(&self, theirs: &str) -> Arc<str> {
        self.fields.get(theirs).map_or(theirs, String::as_str).into()
    }

    /// Their name of one of our measurements.
    pub fn theirs<'a>(&'a self, ours: &'a str) -> &'a str {
        self.fields.iter().find(|(_, to)| *to == ours).map_or(ours, |(from, _)| from)
    }

    /// A measurement in ZTF's unit; `other` gives further numbers of its record, by their names there.
    pub fn convert(&self, theirs: &str, value: Field, other: impl Fn(&str) -> Option<f64>) -> Field {
        match self.units.get(theirs) {
            Some(unit) => unit.convert(&value, other),
            None => value,
        }
    }

    /// Their name of the flux that magnitudes come from, where they do.
    pub fn flux(&self) -> Option<&str> {
        let theirs = self.theirs("magpsf");
        self.units.get(theirs).filter(|unit| unit.nanojansky().is_some()).map(|_| theirs)
    }

    /// Whether a field of a record is read: of the packet itself what is named here, of ZTF's records of earlier
    /// measurements four fields, and everything of records with other names.
    pub fn is_needed(&self, record: &str, field: &str) -> bool {
        match record {
            "alert" => {
                let named = [&self.object_id, &self.candid, &self.candidate, &self.prior];
                let first = |name: &'_ String| name.split('.').next() == Some(field);
                field == "schemavsn" || named.into_iter().chain(&self.stamps).any(first)
            }
            "prv_candidate" => {
                OF_PRIOR.iter().any(|name| self.theirs(name) == field) || self.units.contains_key(field)
            }
            _ => true,
        }
    }
}
