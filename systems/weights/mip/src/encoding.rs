//! How a condition enters the hypernetwork (§4.1 of the paper), and how users' values become conditions.

use std::collections::BTreeSet;
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

/// One component of a condition in the user's own words: `name=low:high`, `name=low:high:log` or `name=cat:a,b,c`.
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
    /// The categories of a component that is no number; each stands for its place among them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub categories: Vec<String>,
}

impl Range {
    /// A component whose values are in `[0, 1]` already.
    pub fn unit(name: impl Into<String>) -> Self {
        Self { name: name.into(), low: 0.0, high: 1.0, log: false, categories: Vec::new() }
    }

    /// A component that is one of several categories.
    pub fn of_categories(name: impl Into<String>, categories: Vec<String>) -> Self {
        Self { categories, ..Self::unit(name) }
    }

    /// Whether it is a number.
    pub fn is_number(&self) -> bool {
        self.categories.is_empty()
    }

    /// The place of a value between the ends; outside `[0, 1]` for one beyond them.
    pub fn place(&self, value: f64) -> f64 {
        let scale = |x: f64| if self.log { x.ln() } else { x };
        (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
    }

    /// The component of a condition that a user's word or number stands for: the place of a category, or that of a number.
    ///
    /// # Errors
    /// When it is no category that there is, or no number; the message says `what` it is of.
    pub fn read(&self, text: &str, what: &str) -> Result<f64> {
        if !self.is_number() {
            let known = || self.categories.join(", ");
            let place = self.categories.iter().position(|category| category == text);
            return place.map(|place| place as f64).ok_or_else(|| {
                Error::usage(format!("{what}: there is no category \"{text}\" of {}", self.name))
                    .hint(format!("there are {}", known()))
            });
        }
        let place = text.trim().parse::<f64>().map_or(f64::NAN, |value| self.place(value));
        if place.is_finite() {
            return Ok(place);
        }
        let positive = if self.log { " above 0" } else { "" };
        Err(Error::usage(format!("{what}: {} = {text} is not a number in its range", self.name)).hint(
            format!("give a number{positive}; the model was trained from {} to {}", self.low, self.high),
        ))
    }

    /// The value at a place between the ends.
    pub fn value(&self, place: f64) -> f64 {
        match self.log {
            true => (self.low.ln() + place * (self.high / self.low).ln()).exp(),
            false => self.low + place * (self.high - self.low),
        }
    }

    /// A component of a condition in the user's own words: a category's name, or the value of a number.
    pub fn word(&self, component: f32) -> String {
        match self.categories.get(component as usize) {
            Some(category) => category.clone(),
            None => (self.value(component.into()) as f32).to_string(),
        }
    }
}

impl FromStr for Range {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let refused = || {
            format!(
                "\"{text}\" is not name=low:high, name=low:high:log with low below high, or name=cat:a,b with different \
                 categories"
            )
        };
        let (name, range) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(refused)?;
        if let Some(list) = range.strip_prefix("cat:") {
            let categories: Vec<String> = list.split(',').map(|word| word.trim().to_string()).collect();
            let distinct: BTreeSet<&String> = categories.iter().collect();
            if categories.len() < 2
                || distinct.len() != categories.len()
                || categories.iter().any(String::is_empty)
            {
                return Err(refused());
            }
            return Ok(Self::of_categories(name, categories));
        }
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
        Ok(Self { low, high, log, ..Self::unit(name) })
    }
}

/// Turns conditions in users' words, one after another, into conditions; `what` names one by its number. Values beyond a
/// range are told, once for each component, and moved to the end of the range with `clamp`.
///
/// # Errors
/// When a condition has more or fewer values than there are components, or one is no number or category.
pub fn conditions<S: AsRef<str>>(
    all: &[Vec<S>],
    ranges: &[Range],
    clamp: bool,
    what: impl Fn(usize) -> String,
    cx: &Context,
) -> Result<Vec<Vec<f32>>> {
    let mut told = vec![false; ranges.len()];
    let mut read = |number: usize, values: &Vec<S>| -> Result<Vec<f32>> {
        if values.len() != ranges.len() {
            let names: Vec<&str> = ranges.iter().map(|range| range.name.as_str()).collect();
            let found = format!("{} has {} values, must have {}", what(number), values.len(), ranges.len());
            return Err(Error::usage(found).hint(format!("give one for each of: {}", names.join(", "))));
        }
        let component = |(index, range): (usize, &Range)| {
            let value = values[index].as_ref();
            let place = range.read(value, &what(number))?;
            if !range.is_number() {
                return Ok(place as f32);
            }
            if !(0.0..=1.0).contains(&place) && !std::mem::replace(&mut told[index], true) {
                let ends = format!("{} to {}", range.low, range.high);
                cx.note(format!(
                    "{} = {value} is outside {ends}, on which the model was trained",
                    range.name
                ));
            }
            Ok(if clamp { place.clamp(0.0, 1.0) } else { place } as f32)
        };
        ranges.iter().enumerate().map(component).collect()
    };
    all.iter().enumerate().map(|(number, values)| read(number, values)).collect()
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
        assert!((range.value(0.5) - 0.1).abs() < 1e-12);
        let linear: Range = "x=-1:3".parse().unwrap();
        assert_eq!((linear.place(0.0), linear.value(0.25), linear.word(0.25)), (0.25, 0.0, "0".to_string()));
        for text in
            ["x", "=0:1", "x=1:0", "x=0:1:log", "x=a:1", "x=0:1:lin", "x=0:inf", "x=cat:a", "x=cat:a,a"]
        {
            assert!(text.parse::<Range>().is_err(), "{text}");
        }
        let site: Range = "site=cat:north,south".parse().unwrap();
        assert_eq!((site.read("south", "row 1").unwrap(), site.word(1.0)), (1.0, "south".to_string()));
        let error = site.read("east", "row 3").unwrap_err();
        assert!(error.to_string().contains("row 3: there is no category \"east\" of site"), "{error}");
        assert!(error.hint_text().unwrap().contains("north, south"));
    }

    #[test]
    fn a_condition_of_the_wrong_length_names_its_components() {
        let ranges = [Range::unit("angle"), Range::unit("noise")];
        let cx = Context::for_tests("unused");
        let read = |values: &[&str], clamp| {
            conditions(&[values.to_vec()], &ranges, clamp, |_| "the condition".into(), &cx)
        };
        assert!(read(&["0.5"], false).unwrap_err().hint_text().unwrap().contains("angle, noise"));
        assert!(read(&["0.5", "nan"], false).unwrap_err().to_string().contains("noise = nan"));
        assert_eq!(read(&["0.5", "2"], true).unwrap(), [[0.5, 1.0]]);
    }
}
