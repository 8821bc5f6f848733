//! Plots of an experiment's figures, as SVG for the page and PNG for everything else.

mod axis;
mod draw;

use std::path::Path;

use serde::Serialize;

use crate::{Error, Result, write_atomic};
use axis::Axis;

/// Curves, points, bars or a histogram, with as many series as the legend can bear.
#[derive(Debug, Clone, Serialize)]
pub struct Plot {
    title: String,
    x: Axis,
    y: Axis,
    kind: Kind,
    series: Vec<Series>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    Lines,
    Points,
    /// A series' points are (number of the category, value).
    Bars {
        categories: Vec<String>,
    },
    /// One number a cell, row by row; row 0 is at the bottom.
    HeatMap {
        columns: usize,
        values: Vec<f64>,
    },
    /// A series' points are (middle of the bin, count).
    Histogram {
        bin_width: f64,
    },
}

#[derive(Debug, Clone, Serialize)]
struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    /// (x, least, largest), behind the curve.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    band: Vec<(f64, f64, f64)>,
}

impl Plot {
    /// Curves through points, for example a loss against the step.
    pub fn lines(title: impl Into<String>, x: impl Into<String>, y: impl Into<String>) -> Self {
        Self::new(title, x, y, Kind::Lines)
    }

    /// Points without a curve.
    pub fn points(title: impl Into<String>, x: impl Into<String>, y: impl Into<String>) -> Self {
        Self::new(title, x, y, Kind::Points)
    }

    /// Bars grouped by category; every series has one value a category.
    ///
    /// # Panics
    /// When a series has more or fewer values than there are categories.
    pub fn bars<C: Into<String>, S: Into<String>>(
        title: impl Into<String>,
        y: impl Into<String>,
        categories: impl IntoIterator<Item = C>,
        series: impl IntoIterator<Item = (S, Vec<f64>)>,
    ) -> Self {
        let categories: Vec<String> = categories.into_iter().map(Into::into).collect();
        let count = categories.len();
        let mut plot = Self::new(title, "", y, Kind::Bars { categories });
        for (name, values) in series {
            assert_eq!(values.len(), count, "plot \"{}\" needs one value a category", plot.title);
            let points = values.into_iter().enumerate().map(|(i, value)| (i as f64, value));
            plot = plot.series(name, points.collect());
        }
        plot
    }

    /// How often `values` fall into each of `bins` bins of equal width.
    ///
    /// # Panics
    /// When `bins` is zero.
    pub fn histogram(title: impl Into<String>, x: impl Into<String>, values: &[f64], bins: usize) -> Self {
        assert!(bins > 0, "a histogram needs a bin");
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let (low, high) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        let bin_width = if high > low { (high - low) / bins as f64 } else { 1.0 };
        let mut counts = vec![0.0; bins];
        for value in finite() {
            let bin = ((value - low) / bin_width) as usize; // the largest value belongs to the last bin
            counts[bin.min(bins - 1)] += 1.0;
        }
        let middle = |bin: usize| low + (bin as f64 + 0.5) * bin_width;
        let points = counts.into_iter().enumerate().map(|(bin, count)| (middle(bin), count)).collect();
        Self::new(title, x, "count", Kind::Histogram { bin_width }).series("", points)
    }

    /// A matrix as cells of colour, from white for 0 (or the least value, if that is below) to dark for the largest.
    ///
    /// # Panics
    /// When the values do not fill whole rows of `columns`.
    pub fn heat_map(
        title: impl Into<String>,
        x: impl Into<String>,
        y: impl Into<String>,
        columns: usize,
        values: Vec<f64>,
    ) -> Self {
        assert!(
            columns > 0 && values.len().is_multiple_of(columns),
            "the cells of a heat map must fill its rows"
        );
        Self::new(title, x, y, Kind::HeatMap { columns, values })
    }

    fn new(title: impl Into<String>, x: impl Into<String>, y: impl Into<String>, kind: Kind) -> Self {
        Self { title: title.into(), x: Axis::new(x), y: Axis::new(y), kind, series: Vec::new() }
    }

    /// A logarithmic horizontal axis.
    pub fn log_x(mut self) -> Self {
        self.x.log = true;
        self
    }

    /// A logarithmic vertical axis.
    pub fn log_y(mut self) -> Self {
        self.y.log = true;
        self
    }

    /// A vertical axis whose values grow downwards, as astronomers draw magnitudes.
    pub fn reversed_y(mut self) -> Self {
        self.y.reversed = true;
        self
    }

    /// Adds a series of (x, y). Points that are not finite, or not positive on a logarithmic axis,
    /// are left out of the picture.
    pub fn series(mut self, name: impl Into<String>, points: Vec<(f64, f64)>) -> Self {
        self.series.push(Series { name: name.into(), points, band: Vec::new() });
        self
    }

    /// Adds a curve of (x, y) as [`series`](Self::series) does, and behind it in its colour the range of (x, least, largest),
    /// such as that of several runs.
    pub fn band(
        mut self,
        name: impl Into<String>,
        points: Vec<(f64, f64)>,
        range: Vec<(f64, f64, f64)>,
    ) -> Self {
        self.series.push(Series { name: name.into(), points, band: range });
        self
    }

    /// What the plot shows.
    pub fn title(&self) -> &str {
        &self.title
    }

    /// The title as part of a file name: lower-case letters and digits, joined by `-`.
    pub fn file_stem(&self) -> String {
        let words: Vec<String> = self
            .title
            .to_lowercase()
            .split(|c: char| !c.is_ascii_alphanumeric())
            .filter(|word| !word.is_empty())
            .map(str::to_string)
            .collect();
        if words.is_empty() { "plot".into() } else { words.join("-") }
    }

    /// Draws the plot as an SVG document.
    ///
    /// # Errors
    /// When the drawing library fails.
    pub fn to_svg(&self) -> Result<String> {
        draw::svg(self)
    }

    /// Draws the plot into a file, as SVG or PNG by its extension.
    ///
    /// # Errors
    /// When the extension is another, or the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("svg") => write_atomic(path, self.to_svg()?.as_bytes()),
            Some("png") => write_atomic(path, &draw::png(self)?),
            _ => Err(Error::input(path.display(), "plots are saved as .svg or .png")),
        }
    }

    /// The points of a series that have a place on the axes.
    fn drawable(&self, series: &Series) -> Vec<(f64, f64)> {
        series.points.iter().copied().filter(|&(x, y)| self.x.can_show(x) && self.y.can_show(y)).collect()
    }

    /// The outline of a series' band: its largest values from left to right, then its least ones back.
    fn outline(&self, series: &Series) -> Vec<(f64, f64)> {
        let shown = series.band.iter().filter(|&&(x, least, largest)| {
            self.x.can_show(x) && self.y.can_show(least) && self.y.can_show(largest)
        });
        let (above, below): (Vec<_>, Vec<_>) =
            shown.map(|&(x, least, largest)| ((x, largest), (x, least))).unzip();
        above.into_iter().chain(below.into_iter().rev()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn polylines(svg: &str, colour: &str) -> usize {
        svg.lines().filter(|l| l.starts_with("<polyline") && l.contains(colour)).count()
    }

    #[test]
    fn file_stem_is_a_slug_of_the_title() {
        assert_eq!(Plot::lines("Loss, by step (β=0.9)", "", "").file_stem(), "loss-by-step-0-9");
        assert_eq!(Plot::lines("…", "", "").file_stem(), "plot");
    }

    #[test]
    fn a_series_without_finite_points_says_so_and_draws_nothing() {
        let plot = Plot::lines("Loss", "step", "nats/byte")
            .series("good", vec![(0.0, 3.0), (1.0, f64::NAN), (2.0, 2.0)])
            .series("bad", vec![(0.0, f64::NAN), (1.0, f64::INFINITY)]);
        let svg = plot.to_svg().unwrap();
        assert!(svg.contains("bad (no finite values)"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert_eq!(polylines(&svg, draw::PALETTE_HEX[0]), 2, "one curve and its legend swatch");
        assert_eq!(polylines(&svg, draw::PALETTE_HEX[1]), 1, "only the legend swatch");
    }

    #[test]
    fn empty_constant_and_one_point_plots_are_drawn() {
        let empty = Plot::lines("Empty", "x", "y");
        assert!(empty.to_svg().unwrap().contains("no data"));
        let plots = [
            empty.clone().series("none", vec![]).log_x().log_y(),
            Plot::points("One", "x", "y").series("one", vec![(0.0, 0.0)]),
            Plot::lines("Constant", "x", "y").series("c", vec![(0.0, 5.0), (1.0, 5.0)]),
            Plot::lines("Not positive", "x", "y").log_y().series("c", vec![(0.0, -5.0), (1.0, 0.0)]),
            Plot::lines("Huge", "x", "y").series("c", vec![(-1e300, -1e300), (1e300, 1e300), (1e308, 0.0)]),
            Plot::lines("Tiny", "x", "y").log_x().series("c", vec![(5e-324, 0.0), (1e300, 1e-320)]),
            Plot::bars("No bars", "y", [""; 0], [("", vec![])]),
            Plot::bars("Bars", "y", ["a"], [("s", vec![f64::NAN])]),
            Plot::histogram("No values", "x", &[], 4),
            Plot::heat_map("No cells", "x", "y", 2, vec![]),
            Plot::heat_map("Cells", "x", "y", 2, vec![0.0, 0.0, f64::NAN, 0.0]),
            Plot::heat_map("More cells", "x", "y", 3, vec![-1.0, 2.0, 3.0, 1e300, 0.0, f64::INFINITY]),
            Plot::histogram("One value", "x", &[2.0], 4),
        ];
        for plot in plots {
            let svg = plot.to_svg().unwrap();
            assert!(svg.contains(&plot.title) && !svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn a_band_is_drawn_behind_its_curve_and_the_axis_holds_it() {
        let points = vec![(0.0, 2.0), (1.0, 3.0)];
        let range = vec![(0.0, 1.0, 4.0), (1.0, 2.0, 900.0), (2.0, 1.0, f64::NAN)];
        let svg = Plot::lines("Loss", "step", "nats").band("runs", points.clone(), range).to_svg().unwrap();
        let corners = |line: &str| -> Vec<(f64, f64)> {
            let text = line.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
            let number = |text: &str| text.parse().unwrap();
            let pairs = text.split_whitespace().map(|pair| pair.split_once(',').unwrap());
            pairs.map(|(x, y)| (number(x), number(y))).collect()
        };
        let of = |kind: &str| {
            let is_coloured = |line: &&str| line.starts_with(kind) && line.contains(draw::PALETTE_HEX[0]);
            svg.lines().enumerate().filter(|(_, line)| is_coloured(line)).last().unwrap()
        };
        let ((at, band), (above, curve)) = (of("<polygon"), of("<polyline"));
        assert!(at < above, "the curve lies on the band");
        let (band, curve) = (corners(band), corners(curve));
        assert_eq!(band.len(), 4, "a place without a number is left out");
        // A larger value is further up: the band's largest is above the curve's end, and within the picture.
        assert!(band[1].1 > 0.0 && band[1].1 < curve[1].1 - 1000.0, "{band:?} {curve:?}");
        let plain = Plot::lines("Loss", "step", "nats").series("runs", points).to_svg().unwrap();
        assert!(!plain.contains("<polygon"));
    }

    #[test]
    fn text_is_escaped() {
        let svg = Plot::lines("<b>&", "x", "y").series("a<b", vec![(0.0, 1.0)]).to_svg().unwrap();
        assert!(svg.contains("&lt;b&gt;&amp;") && svg.contains("a&lt;b") && !svg.contains("<b>"));
    }

    #[test]
    fn histogram_counts_every_finite_value_once() {
        let plot = Plot::histogram("H", "x", &[0.0, 0.1, 0.5, 1.0, f64::NAN, f64::INFINITY], 2);
        assert_eq!(plot.series[0].points, [(0.25, 2.0), (0.75, 2.0)]);
    }

    #[test]
    fn files_are_written_by_extension() {
        let dir = tempfile::tempdir().unwrap();
        let plot = Plot::lines("Loss", "step", "nats").series("a", vec![(0.0, 1.0), (1.0, 0.5)]);
        plot.save(&dir.path().join("a.png")).unwrap();
        let png = std::fs::read(dir.path().join("a.png")).unwrap();
        assert!(png.starts_with(b"\x89PNG"));
        plot.save(&dir.path().join("a.svg")).unwrap();
        assert!(std::fs::read_to_string(dir.path().join("a.svg")).unwrap().starts_with("<svg"));
        assert!(plot.save(&dir.path().join("a.gif")).is_err());
    }
}
