//! Electrodes of the international 10-20 system, under the names that recordings give them.

use kiln_core::{Error, Result};
use serde::{Deserialize, Serialize};

/// The channels of the paper, in the order that networks see.
pub const TUAB: [&str; 21] = [
    "A1", "A2", "C3", "C4", "CZ", "F3", "F4", "F7", "F8", "FP1", "FP2", "FZ", "O1", "O2", "P3", "P4", "PZ",
    "T3", "T4", "T5", "T6",
];

/// The electrode's name of old, in capitals: `EEG Fp1-REF` and `fp1` are `FP1`, `T7` is `T3`.
pub fn canonical(label: &str) -> String {
    let label = label.trim().to_uppercase();
    let label = label.strip_prefix("EEG").map_or(label.as_str(), str::trim_start);
    let label = ["-REF", "-LE", "-AR", "-AVG", "-A1A2"]
        .iter()
        .find_map(|reference| label.strip_suffix(reference))
        .unwrap_or(label)
        .trim_end_matches(['.', ' ']);
    match label {
        "T7" => "T3",
        "T8" => "T4",
        "P7" => "T5",
        "P8" => "T6",
        label => label,
    }
    .into()
}

/// Which channels of a recording are used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Channels {
    /// These, sorted by name.
    Named(Vec<String>),
    /// All that a recording has, sorted by name.
    Any,
}

impl Default for Channels {
    fn default() -> Self {
        Self::Named(TUAB.map(String::from).into())
    }
}

impl std::str::FromStr for Channels {
    type Err = Error;

    /// `21`, `any`, or names between commas.
    fn from_str(text: &str) -> Result<Self> {
        match text {
            "21" => Ok(Self::default()),
            "any" => Ok(Self::Any),
            names => {
                let mut names: Vec<String> = names.split(',').map(canonical).collect();
                names.sort_unstable();
                let count = names.len();
                names.dedup();
                if names.iter().any(String::is_empty) || names.len() < count {
                    return Err(Error::usage(format!("\"{text}\" does not name channels, each once"))
                        .hint("write 21, any, or names such as C3,C4,O1,O2"));
                }
                Ok(Self::Named(names))
            }
        }
    }
}

impl Channels {
    /// The places of the channels among a recording's labels, in the order of their names, with the names.
    ///
    /// # Errors
    /// Lists the channels that are missing, or one that is there twice.
    pub fn find(&self, labels: &[&str]) -> Result<Vec<(usize, String)>, String> {
        let mut present: Vec<(String, usize)> =
            labels.iter().enumerate().map(|(place, label)| (canonical(label), place)).collect();
        present.sort();
        let wanted = |name: &String| match self {
            Self::Any => true,
            Self::Named(names) => names.contains(name),
        };
        present.retain(|(name, _)| wanted(name));
        if let Some(pair) = present.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(format!("channel {} is there twice", pair[0].0));
        }
        if let Self::Named(names) = self {
            let missing: Vec<&str> = names
                .iter()
                .filter(|name| present.iter().all(|(found, _)| found != *name))
                .map(String::as_str)
                .collect();
            if !missing.is_empty() {
                return Err(format!("lacks the channels {}", missing.join(", ")));
            }
        }
        if present.is_empty() {
            return Err("has no channels".into());
        }
        Ok(present.into_iter().map(|(name, place)| (place, name)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_all_kinds_name_the_same_electrodes() {
        for (label, name) in [
            ("EEG FP1-REF", "FP1"),
            ("EEG FP1-LE", "FP1"),
            ("Fp1", "FP1"),
            ("Fp1.", "FP1"),
            ("T7", "T3"),
            ("eeg p8-ref", "T6"),
            ("DC04", "DC04"),
        ] {
            assert_eq!(canonical(label), name);
        }
    }

    #[test]
    fn channels_are_found_in_the_order_of_their_names_or_listed_as_missing() {
        let channels: Channels = "O1,c4".parse().unwrap();
        let found = channels.find(&["O2", "EEG O1-REF", "C4"]).unwrap();
        assert_eq!(found, [(2, "C4".to_string()), (1, "O1".to_string())]);
        assert_eq!(channels.find(&["C4"]).unwrap_err(), "lacks the channels O1");
        assert_eq!(channels.find(&["C4", "O1", "EEG C4-REF"]).unwrap_err(), "channel C4 is there twice");
        assert_eq!(Channels::Any.find(&["b", "a"]).unwrap(), [(1, "A".to_string()), (0, "B".to_string())]);
        assert!("C3,C3".parse::<Channels>().is_err() && ",".parse::<Channels>().is_err());
        assert!(TUAB.is_sorted());
    }
}
