//! Which alerts are scored at all: the survey's cuts, each of which can be switched on.

use clap::Args;
use serde::{Deserialize, Serialize};

use crate::packet::Alert;

/// The galactic north pole, in degrees of J2000.
const POLE: [f64; 2] = [192.859_48, 27.128_25];
/// From this star–galaxy score
const STAR_SCORE: f64 = 0.76;
/// and within so many arcseconds an alert counts as that of a star (the survey's first paper, arXiv 1910.12973, §2.1).
const STAR_DISTANCE: f64 = 2.0;
/// Arcseconds within which a known solar-system object is the alert's own.
const SOLAR_DISTANCE: f64 = 5.0;

/// What alerts must pass.
#[derive(Debug, Clone, PartialEq, Default, Args, Serialize, Deserialize)]
pub struct Filter {
    /// Score alerts of sources that became fainter, too
    #[arg(long)]
    pub negative: bool,
    /// Least real/bogus score rb
    #[arg(long, value_name = "RB")]
    pub min_rb: Option<f64>,
    /// Least deep-learning real/bogus score drb
    #[arg(long, value_name = "DRB")]
    pub min_drb: Option<f64>,
    /// Least distance from the galactic plane, in degrees
    #[arg(long, value_name = "DEGREES")]
    pub min_latitude: Option<f64>,
    /// Leave out alerts on stars: sgscore1 above 0.76 within 2 arcseconds
    #[arg(long)]
    pub no_stars: bool,
    /// Leave out known solar-system objects: ssdistnr within 5 arcseconds
    #[arg(long)]
    pub no_solar_system: bool,
}

impl Filter {
    /// Why an alert does not pass, where it does not. A cut on a field that the alert lacks is not passed.
    pub fn refusal(&self, alert: &Alert) -> Option<String> {
        let below = |field: &str, least: Option<f64>| {
            let least = least?;
            match alert.number(field) {
                Some(value) if value >= least => None,
                Some(value) => Some(format!("{field} is {value:.3}, below {least}")),
                None => Some(format!("has no {field}")),
            }
        };
        if !self.negative && !alert.is_positive() {
            return Some("the source became fainter (isdiffpos)".into());
        }
        if let Some(refusal) = below("rb", self.min_rb).or_else(|| below("drb", self.min_drb)) {
            return Some(refusal);
        }
        if let Some(least) = self.min_latitude {
            match alert.number("ra").zip(alert.number("dec")).map(|(ra, dec)| galactic_latitude(ra, dec)) {
                Some(latitude) if latitude.abs() >= least => {}
                Some(latitude) => return Some(format!("lies {latitude:.1} degrees from the galactic plane")),
                None => return Some("has no ra or dec".into()),
            }
        }
        let score = alert.number("sgscore1").zip(alert.number("distpsnr1"));
        if self.no_stars
            && let Some((score, distance)) = score
            && score > STAR_SCORE
            && (0.0..STAR_DISTANCE).contains(&distance)
        {
            return Some(format!("lies {distance:.2} arcseconds from a star (sgscore1 {score:.2})"));
        }
        if self.no_solar_system
            && let Some(distance) = alert.number("ssdistnr")
            && (0.0..SOLAR_DISTANCE).contains(&distance)
        {
            return Some(format!("lies {distance:.2} arcseconds from a known solar-system object"));
        }
        None
    }
}

/// Galactic latitude of a place, all in degrees.
pub fn galactic_latitude(ra: f64, dec: f64) -> f64 {
    let [pole_ra, pole_dec] = POLE.map(f64::to_radians);
    let (ra, dec) = (ra.to_radians(), dec.to_radians());
    let sine = dec.sin() * pole_dec.sin() + dec.cos() * pole_dec.cos() * (ra - pole_ra).cos();
    sine.clamp(-1.0, 1.0).asin().to_degrees()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_galactic_centre_lies_in_the_plane_and_the_pole_above_it() {
        assert!(galactic_latitude(266.405_1, -28.936_2).abs() < 1e-3);
        assert!((galactic_latitude(POLE[0], POLE[1]) - 90.0).abs() < 1e-4);
    }
}
