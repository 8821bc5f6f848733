//! Requests for spectra: what is asked for, and of whom.

mod mock;
mod skyportal;

use kiln_core::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use mock::MockSkyPortal;
pub use skyportal::{SkyPortal, read_token};

/// Days for which a request stands.
const DAYS: f64 = 7.0;

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// The source.
    pub object_id: String,
    /// Where it is, in degrees.
    pub ra: f64,
    /// See `ra`.
    pub dec: f64,
    /// When the alert that triggered was observed,
    pub jd: f64,
    /// how bright it was then,
    pub magpsf: f64,
    /// its score,
    pub score: f64,
    /// and how long the source had been known, in days.
    pub age: f64,
    /// The policy that triggered.
    pub policy: String,
}

/// What is the same in all requests.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Target {
    /// The share of a telescope's time that is asked for.
    pub allocation: u64,
    /// Groups that see the request,
    pub target_groups: Vec<u64>,
    /// and the source.
    pub source_groups: Vec<u64>,
    /// What is to be observed.
    pub observation: String,
    /// What the instrument's form asks for besides.
    pub payload: Map<String, Value>,
}

impl Request {
    /// From 1 to 5: 3, one more below magnitude 18 and another below 17, as bright sources cost little time; one less
    /// from the 30th day, when a spectrum tells less.
    pub fn priority(&self) -> u8 {
        let bright = u8::from(self.magpsf < 18.0) + u8::from(self.magpsf < 17.0);
        3 + bright - u8::from(self.age >= 30.0)
    }

    /// The body of the request, as SkyPortal takes it.
    pub fn body(&self, target: &Target) -> Value {
        let mut payload = Map::new();
        payload.insert("start_date".into(), date(self.jd).into());
        payload.insert("end_date".into(), date(self.jd + DAYS).into());
        payload.insert("priority".into(), self.priority().into());
        payload.insert("observation_type".into(), target.observation.clone().into());
        payload.extend(target.payload.clone());
        serde_json::json!({
            "obj_id": self.object_id,
            "allocation_id": target.allocation,
            "payload": payload,
            "target_group_ids": target.target_groups,
            "source_group_ids": target.source_groups,
        })
    }
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It stands.
    Acknowledged,
    /// Nothing was sent.
    Dry,
    /// It will not be accepted, and must not be sent again.
    Refused(String),
    /// Nobody knows; it must be looked for before it is sent again.
    Unknown(String),
}

/// Where requests go.
pub trait FollowUp {
    /// Sends a request once, retrying where that cannot double it.
    ///
    /// # Errors
    /// When the user stopped.
    fn send(&self, request: &Request) -> Result<Outcome>;

    /// Whether the request stands already; `Err` within, where that cannot be found out.
    ///
    /// # Errors
    /// When the user stopped.
    fn stands(&self, request: &Request) -> Result<std::result::Result<bool, String>>;

    /// Whether anything is sent at all.
    fn is_live(&self) -> bool;
}

/// Sends nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct DryRun;

impl FollowUp for DryRun {
    fn send(&self, _: &Request) -> Result<Outcome> {
        Ok(Outcome::Dry)
    }

    fn stands(&self, _: &Request) -> Result<std::result::Result<bool, String>> {
        Ok(Ok(false))
    }

    fn is_live(&self) -> bool {
        false
    }
}

/// The day of a Julian date, as year-month-day (Fliegel and Van Flandern, CACM 11, 1968).
pub fn date(jd: f64) -> String {
    let day = (jd + 0.5).floor() as i64;
    let l = day + 68_569;
    let n = 4 * l / 146_097;
    let l = l - (146_097 * n + 3) / 4;
    let i = 4000 * (l + 1) / 1_461_001;
    let l = l - 1461 * i / 4 + 31;
    let j = 80 * l / 2447;
    let (day, l) = (l - 2447 * j / 80, j / 11);
    format!("{:04}-{:02}-{day:02}", 100 * (n - 49) + i + l, j + 2 - 12 * l)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_and_priorities() {
        assert_eq!(date(2_451_545.0), "2000-01-01");
        assert_eq!([date(2_460_369.6), date(2_460_370.5)], ["2024-02-29", "2024-03-01"]);
        let request = |magpsf, age| Request {
            object_id: "a".into(),
            ra: 0.0,
            dec: 0.0,
            jd: 2_460_000.5,
            magpsf,
            score: 0.9,
            age,
            policy: "p".into(),
        };
        let cases = [(18.4, 3.0), (17.9, 3.0), (16.0, 3.0), (18.4, 40.0), (16.0, 40.0)];
        assert_eq!(cases.map(|(magpsf, age)| request(magpsf, age).priority()), [3, 4, 5, 2, 4]);
    }
}
