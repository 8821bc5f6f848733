//! What packets call what is needed of them. Another survey's or broker's names are given as a JSON file:
//! `{"object_id": "diaObjectId", "candidate": "diaSource", "fields": {"midpointMjd": "jd"}}`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// Names of a packet's parts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Names {
    /// The source.
    pub object_id: String,
    /// The alert's own number.
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

    /// Whether a field of a record is read: of the packet itself what is named here, of ZTF's records of earlier
    /// measurements four fields, and everything of records with other names.
    pub fn is_needed(&self, record: &str, field: &str) -> bool {
        match record {
            "alert" => {
                let named = [&self.object_id, &self.candid, &self.candidate, &self.prior];
                field == "schemavsn" || named.into_iter().chain(&self.stamps).any(|name| name == field)
            }
            "prv_candidate" => OF_PRIOR.iter().any(|name| self.theirs(name) == field),
            _ => true,
        }
    }
}
