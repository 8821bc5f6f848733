//! Ranges, ticks and their labels.

use serde::Serialize;

/// Larger numbers are left out like infinities, so that no extent overflows.
const LARGEST: f64 = 1e300;

/// One direction of a plot.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Axis {
    pub label: String,
    pub log: bool,
    /// Whether the values grow from right to left or from top to bottom.
    pub reversed: bool,
}

/// An axis with its extent: from data to 0 (left or bottom) … 1 (right or top).
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    low: f64,
    high: f64,
    log: bool,
    reversed: bool,
}

/// A position on an axis and what is written there.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Tick {
    pub value: f64,
    pub label: String,
}

impl Axis {
    pub fn new(label: impl Into<String>) -> Self {
        Self { label: label.into(), log: false, reversed: false }
    }

    /// Whether a value has a place on this axis.
    pub fn can_show(&self, value: f64) -> bool {
        value.abs() <= LARGEST && (!self.log || value > 0.0)
    }

    /// The extent that shows all of `values` with a margin (a fraction of the extent) at both ends;
    /// `None` when there are none.
    pub fn span(&self, values: impl Iterator<Item = f64>, margin: (f64, f64)) -> Option<Span> {
        let on_scale = |v: f64| if self.log { v.log10() } else { v };
        let (low, high) = values
            .filter(|&v| self.can_show(v))
            .map(on_scale)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            return None;
        }
        let extent = high - low;
        let same = extent <= low.abs().max(high.abs()) * 1e-12;
        let (below, above) = match same {
            true if self.log => (0.5, 0.5),
            true if low == 0.0 => (0.0, 1.0),
            true => (low.abs() * 0.1, low.abs() * 0.1),
            false => (extent * margin.0, extent * margin.1),
        };
        Some(Span { low: low - below, high: high + above, log: self.log, reversed: self.reversed })
    }
}

impl Span {
    /// Where a value lies, from 0 to 1.
    pub fn place(&self, value: f64) -> f64 {
        let value = if self.log { value.log10() } else { value };
        let place = (value - self.low) / (self.high - self.low);
        if self.reversed { 1.0 - place } else { place }
    }

    /// About `count` round positions inside the extent.
    pub fn ticks(&self, count: usize) -> Vec<Tick> {
        if self.log { self.log_ticks(count) } else { self.linear_ticks(count) }
    }

    fn linear_ticks(&self, count: usize) -> Vec<Tick> {
        let step = round_step((self.high - self.low) / count as f64);
        let first = (self.low / step).ceil();
        let last = (self.high / step).floor();
        (0..=(last - first) as usize)
            .map(|i| (first + i as f64) * step)
            .map(|value| Tick { value, label: linear_label(value, step) })
            .collect()
    }

    /// Whole decades; with few of them also 2 and 5 between, and within one decade even steps.
    fn log_ticks(&self, count: usize) -> Vec<Tick> {
        let decades = self.high - self.low;
        if decades < 1.0 {
            let (low, high) = (10f64.powf(self.low), 10f64.powf(self.high));
            return Span { low, high, log: false, reversed: false }.linear_ticks(count);
        }
        let stride = (decades / count as f64).ceil() as i32;
        let factors: &[f64] = match decades {
            d if d < 2.5 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        ((self.low.floor() as i32)..=(self.high.ceil() as i32))
            .filter(|decade| decade.rem_euclid(stride) == 0)
            .flat_map(|decade| factors.iter().map(move |factor| factor * 10f64.powi(decade)))
            .filter(|value| *value > 0.0 && (self.low..=self.high).contains(&value.log10()))
            .map(|value| Tick { value, label: log_label(value) })
            .collect()
    }
}

/// The smallest of 1, 2, 5 times a power of ten that is not below `rough`.
fn round_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| f * power >= rough * 0.999).unwrap_or(10.0);
    factor * power
}

fn linear_label(value: f64, step: f64) -> String {
    let largest = value.abs().max(step);
    if largest >= 1e7 || step < 1e-4 {
        return if value == 0.0 { "0".into() } else { scientific(value) };
    }
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    grouped(&format!("{:.decimals$}", if value == 0.0 { 0.0 } else { value }))
}

fn log_label(value: f64) -> String {
    match value {
        v if !(1e-3..1e5).contains(&v) => scientific(v),
        v if v >= 1.0 => grouped(&format!("{v:.0}")),
        v => format!("{}", (v * 1e6).round() / 1e6),
    }
}

/// `3×10⁻⁵`, or `10⁻⁵` for a pure power of ten.
fn scientific(value: f64) -> String {
    let text = format!("{value:.1e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let mantissa = mantissa.trim_end_matches(".0");
    let exponent: String = exponent.chars().map(superscript).collect();
    match mantissa {
        "1" => format!("10{exponent}"),
        "-1" => format!("−10{exponent}"),
        _ => format!("{}×10{exponent}", mantissa.replace('-', "−")),
    }
}

fn superscript(c: char) -> char {
    const DIGITS: [char; 10] = ['⁰', '¹', '²', '³', '⁴', '⁵', '⁶', '⁷', '⁸', '⁹'];
    c.to_digit(10).map_or('⁻', |digit| DIGITS[digit as usize])
}

/// Thin spaces between thousands from five digits on, and a proper minus sign.
fn grouped(number: &str) -> String {
    let (sign, number) = number.strip_prefix('-').map_or(("", number), |rest| ("−", rest));
    let whole = number.find('.').unwrap_or(number.len());
    let mut text = String::from(sign);
    for (i, c) in number.chars().enumerate() {
        if whole > 4 && i > 0 && i < whole && (whole - i).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(c);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(values: &[f64], log: bool) -> Vec<String> {
        let axis = Axis { log, ..Axis::new("") };
        let span = axis.span(values.iter().copied(), (0.0, 0.0)).unwrap();
        span.ticks(6).into_iter().map(|tick| tick.label).collect()
    }

    #[test]
    fn ticks_are_round_numbers_inside_the_extent() {
        assert_eq!(labels(&[0.0, 150.0], false), ["0", "50", "100", "150"]);
        assert_eq!(labels(&[2.31, 2.52], false), ["2.35", "2.40", "2.45", "2.50"]);
        assert_eq!(labels(&[-0.1, 0.1], false), ["−0.10", "−0.05", "0.00", "0.05", "0.10"]);
        assert_eq!(labels(&[0.0, 40000.0], false)[4..], ["40\u{202f}000"]);
        assert_eq!(
            labels(&[512.0, 32768.0], true),
            ["1000", "2000", "5000", "10\u{202f}000", "20\u{202f}000"]
        );
        assert_eq!(labels(&[1e-6, 1.0], true), ["10⁻⁶", "10⁻⁵", "10⁻⁴", "0.001", "0.01", "0.1", "1"]);
        assert_eq!(labels(&[100.0, 150.0], true), ["100", "110", "120", "130", "140", "150"]);
        assert_eq!(labels(&[1024.0, 4096.0], true), ["2000", "3000", "4000"]);
    }

    #[test]
    fn place_maps_the_extent_onto_zero_to_one() {
        let axis = Axis { log: true, ..Axis::new("") };
        let span = axis.span([1.0, 100.0].into_iter(), (0.0, 0.0)).unwrap();
        assert!((span.place(10.0) - 0.5).abs() < 1e-12);
        let axis = Axis::new("");
        let span = axis.span([-1e300, 1e300].into_iter(), (0.1, 0.1)).unwrap();
        assert!((span.place(0.0) - 0.5).abs() < 1e-12);
        let reversed = Axis { reversed: true, ..Axis::new("") };
        let span = reversed.span([10.0, 20.0].into_iter(), (0.0, 0.0)).unwrap();
        assert_eq!([10.0, 12.0, 20.0].map(|value| span.place(value)), [1.0, 0.8, 0.0]);
        assert!(axis.span([f64::NAN].into_iter(), (0.1, 0.1)).is_none());
    }
}
