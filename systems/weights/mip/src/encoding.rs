//! How a condition enters the hypernetwork (§4.1 of the paper), and how users' values become conditions.

use std::str::FromStr;

use burn::tensor::Tensor;
use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use serde::{Deserialize, Serialize};

/// What a hypernetwork sees of a condition `γ` in `[0, 1]^k`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Encoding {
    /// `[cos(π/2 γ), sin(π/2 γ)]`: the squared norm is k whatever γ is
    CosSin,
    /// γ itself: everything that follows scales with it
    None,
    /// `[γ, 1 - γ]`: the sum is k whatever γ is
    OneMinus,
    /// γ with mean 0 and variance 1 over its components
    LayerNorm,
}

impl Encoding {
    /// Numbers that stand for a condition of `k` numbers.
    pub fn width(self, k: usize) -> usize {
        match self {
            Self::CosSin | Self::OneMinus => 2 * k,
            Self::None | Self::LayerNorm => k,
        }
    }

    /// Encodes conditions.
    ///
    /// # Shapes
    /// - gamma: `[batch, k]`
    /// - output: `[batch, width]`, all cosines (or γ) first
    pub fn encode(self, gamma: Tensor<2>) -> Tensor<2> {
        match self {
            Self::CosSin => {
                let angle = gamma * std::f64::consts::FRAC_PI_2;
                Tensor::cat(vec![angle.clone().cos(), angle.sin()], 1)
            }
            Self::None => gamma,
            Self::OneMinus => Tensor::cat(vec![gamma.clone(), 1.0 - gamma], 1),
            Self::LayerNorm => {
                let ones = Tensor::ones([gamma.dims()[1]], &gamma.device());
                kiln_ops::layer_norm(gamma, ones, None, 1e-5)
            }
        }
    }
}

/// The range of one component of a condition in the user's own unit: `name=low:high` or `name=low:high:log`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Range {
    /// What the component is called.
    pub name: String,
    /// The value that becomes 0.
    pub low: f64,
    /// The value that becomes 1.
    pub high: f64,
    /// Whether equal ratios, not equal differences, become equal steps.
    pub log: bool,
}

impl Range {
    /// A component whose values are in `[0, 1]` already.
    pub fn unit(name: impl Into<String>) -> Self {
        Self { name: name.into(), low: 0.0, high: 1.0, log: false }
    }

    /// The place of a value between the ends; outside `[0, 1]` for one beyond them.
    pub fn place(&self, value: f64) -> f64 {
        let scale = |x: f64| if self.log { x.ln() } else { x };
        (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refused = || format!("\"{text}\" is not name=low:high or name=low:high:log with low below high");
        let (name, range) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(refused)?;
        let parts: Vec<&str> = range.split(':').collect();
        let (low, high, log) = match parts[..] {
            [low, high] => (low, high, false),
            [low, high, "log"] => (low, high, true),
            _ => return Err(refused()),
        };
        let number = |text: &str| text.parse::<f64>().ok().filter(|x| x.is_finite()).ok_or_else(refused);
        let (low, high) = (number(low)?, number(high)?);
        if low >= high || (log && low <= 0.0) {
            return Err(refused());
        }
        Ok(Self { name: name.into(), low, high, log })
    }
}

/// Turns users' values into a condition. A value beyond its range is told, and moved to the end of the range with
/// `clamp`.
///
/// # Errors
/// When there are more or fewer values than ranges, or one is not a number.
pub fn condition(values: &[f64], ranges: &[Range], clamp: bool, cx: &Context) -> Result<Vec<f64>> {
    if values.len() != ranges.len() {
        let names: Vec<&str> = ranges.iter().map(|range| range.name.as_str()).collect();
        return Err(Error::usage(format!(
            "the condition has {} values, must have {}",
            values.len(),
            ranges.len()
        ))
        .hint(format!("give one for each of: {}", names.join(", "))));
    }
    let places = values.iter().zip(ranges).map(|(&value, range)| {
        let place = range.place(value);
        if !place.is_finite() {
            return Err(Error::usage(format!("{} = {value} is not a number in its range", range.name)));
        }
        if !(0.0..=1.0).contains(&place) {
            let ends = format!("{} to {}", range.low, range.high);
            cx.note(format!("{} = {value} is outside {ends}, on which the model was trained", range.name));
        }
        Ok(if clamp { place.clamp(0.0, 1.0) } else { place })
    });
    places.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    #[test]
    fn the_squared_norm_of_cosines_and_sines_is_the_number_of_components() {
        let gamma = Tensor::<2>::from_floats([[0.0, 0.3, 1.0], [0.7, 0.01, 0.5]], &Device::flex());
        let squares = Encoding::CosSin.encode(gamma).powi_scalar(2).sum_dim(1);
        let squares: Vec<f32> = squares.into_data().iter().collect();
        assert!(squares.iter().all(|square| (square - 3.0).abs() < 1e-6), "{squares:?}");
    }

    #[test]
    fn ranges_are_read_and_place_values() {
        let range: Range = "lambda=0.01:1:log".parse().unwrap();
        assert_eq!((range.name.as_str(), range.place(0.1)), ("lambda", 0.5));
        assert_eq!("x=-1:3".parse::<Range>().unwrap().place(0.0), 0.25);
        for text in ["x", "=0:1", "x=1:0", "x=0:1:log", "x=a:1", "x=0:1:lin", "x=0:inf"] {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_condition_of_the_wrong_length_names_its_components() {
        let ranges = [Range::unit("angle"), Range::unit("noise")];
        let cx = Context::for_tests("unused");
        let error = condition(&[0.5], &ranges, false, &cx).unwrap_err();
        assert!(error.hint_text().unwrap().contains("angle, noise"));
        assert!(condition(&[0.5, f64::NAN], &ranges, false, &cx).is_err());
        assert_eq!(condition(&[0.5, 2.0], &ranges, true, &cx).unwrap(), [0.5, 1.0]);
    }
}
