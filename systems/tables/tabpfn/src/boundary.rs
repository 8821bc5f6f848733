//! Decision regions of a classifier over two columns, drawn.

use std::fmt::Write;

use kiln_core::{Context, Error, Result};
use kiln_data::{Cells, Column, Matrix, Table};

use crate::classifier::{ClassifierOptions, TabPfnClassifier};
use crate::metrics::most_probable;
use crate::network::TabPfn;

/// Cells of the grid along each axis.
const GRID: usize = 72;
/// Colours of the classes: those of all plots, and more for many classes.
const PALETTE: [[u8; 3]; 10] = [
    [0x00, 0x72, 0xb2],
    [0xd5, 0x5e, 0x00],
    [0x00, 0x9e, 0x73],
    [0xcc, 0x79, 0xa7],
    [0xe6, 0x9f, 0x00],
    [0x56, 0xb4, 0xe9],
    [0x8c, 0x56, 0x4b],
    [0x7f, 0x7f, 0x7f],
    [0xbc, 0xbd, 0x22],
    [0x6a, 0x3d, 0x9a],
];
const LEFT: f64 = 70.0;
const TOP: f64 = 46.0;
const SIDE: f64 = 432.0;
const WIDTH: f64 = 680.0;
const HEIGHT: f64 = 540.0;

/// The probabilities of the classes on a grid over two columns.
pub struct Boundary {
    axes: [Axis; 2],
    target: String,
    classes: Vec<String>,
    /// `[GRID * GRID, classes]`, row by row of the grid from below.
    probabilities: Matrix,
    /// The labelled rows: both columns and the class.
    points: Vec<(f64, f64, usize)>,
}

struct Axis {
    name: String,
    from: f64,
    to: f64,
    ticks: Vec<(f64, String)>,
}

impl Boundary {
    /// Lets a classifier that sees only the columns `x` and `y` of a table predict every place of a grid.
    ///
    /// # Errors
    /// When a column is not there, or the table is not fit for a classifier.
    pub fn new(
        network: &TabPfn,
        table: &Table,
        target: &str,
        [x, y]: [&str; 2],
        options: ClassifierOptions,
        cx: &Context,
    ) -> Result<Self> {
        if x == y || x == target || y == target {
            return Err(Error::usage("the two columns and the target must be three different columns"));
        }
        let mut table = table.clone();
        let columns = [table.take(x)?, table.take(y)?, table.take(target)?];
        let table = Table::from_columns(table.source(), columns.to_vec())?;
        let axes = [Axis::new(&columns[0])?, Axis::new(&columns[1])?];
        let classifier = TabPfnClassifier::fit(network, table.clone(), target, options, cx)?;
        let rows = classifier.encoder().encode(&without(table, target)?)?.matrix;
        let labels = classifier.labels(&columns[2], "the table")?;
        let grid: Vec<f64> = (0..GRID * GRID)
            .flat_map(|cell| [axes[0].middle(cell % GRID), axes[1].middle(cell / GRID)])
            .collect();
        let probabilities = classifier.predict_proba(&Matrix::new(GRID * GRID, 2, grid), cx)?;
        let point = |(row, label): (usize, &Option<usize>)| {
            let (x, y) = (rows.at(row, 0), rows.at(row, 1));
            label.filter(|_| x.is_finite() && y.is_finite()).map(|label| (x, y, label))
        };
        Ok(Self {
            axes,
            target: target.into(),
            classes: classifier.classes().to_vec(),
            probabilities,
            points: labels.iter().enumerate().filter_map(point).collect(),
        })
    }

    /// The share of the labelled rows that lie in the region of their class.
    pub fn agreement(&self) -> f64 {
        let regions = most_probable(&self.probabilities);
        let inside = |&&(x, y, label): &&(f64, f64, usize)| {
            regions[self.axes[1].cell(y) * GRID + self.axes[0].cell(x)] == label
        };
        self.points.iter().filter(inside).count() as f64 / self.points.len() as f64
    }

    /// The picture: colours of the most probable classes, the paler the less sure, and the labelled rows as dots.
    pub fn to_svg(&self) -> String {
        let title = format!("{} by {} and {}", self.target, self.axes[0].name, self.axes[1].name);
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
             viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" font-family=\"sans-serif\" font-size=\"13\">\n\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#ffffff\"/>\n\
             <text x=\"{LEFT}\" y=\"28\" font-size=\"17\" fill=\"#333333\">{}</text>\n",
            escape(&title)
        );
        self.draw_regions(&mut svg);
        self.draw_axes(&mut svg);
        for &(x, y, label) in &self.points {
            let (x, y) = (LEFT + SIDE * self.axes[0].share(x), TOP + SIDE * (1.0 - self.axes[1].share(y)));
            let _ = writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.2\" fill=\"{}\" stroke=\"#ffffff\" stroke-width=\"0.8\"/>",
                colour(label, 1.0)
            );
        }
        let legend = LEFT + SIDE + 22.0;
        for (class, name) in self.classes.iter().enumerate() {
            let y = TOP + 12.0 + 21.0 * class as f64;
            let _ = writeln!(
                svg,
                "<circle cx=\"{legend}\" cy=\"{y}\" r=\"5\" fill=\"{}\"/><text x=\"{}\" y=\"{}\" fill=\"#333333\">{}</text>",
                colour(class, 1.0),
                legend + 12.0,
                y + 4.5,
                escape(&shorten(name, 16))
            );
        }
        svg + "</svg>\n"
    }

    /// Neighbouring cells of one colour in a row of the grid become one rectangle.
    fn draw_regions(&self, svg: &mut String) {
        let side = SIDE / GRID as f64;
        let classes = most_probable(&self.probabilities);
        let fill = |cell: usize| {
            let class = classes[cell];
            let (p, chance) = (self.probabilities.at(cell, class), 1.0 / self.classes.len() as f64);
            // In steps, so that neighbours are often alike.
            let sure = ((p - chance) / (1.0 - chance) * 12.0).round() / 12.0;
            colour(class, 0.12 + 0.5 * sure.clamp(0.0, 1.0))
        };
        svg.push_str("<g shape-rendering=\"crispEdges\">\n");
        for row in 0..GRID {
            let fills: Vec<String> = (0..GRID).map(|column| fill(row * GRID + column)).collect();
            let mut begin = 0;
            for run in fills.chunk_by(|a, b| a == b) {
                let _ = writeln!(
                    svg,
                    "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
                    LEFT + side * begin as f64,
                    TOP + side * (GRID - 1 - row) as f64,
                    side * run.len() as f64,
                    side,
                    run[0]
                );
                begin += run.len();
            }
        }
        svg.push_str("</g>\n");
    }

    fn draw_axes(&self, svg: &mut String) {
        let bottom = TOP + SIDE;
        let _ = writeln!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{SIDE}\" height=\"{SIDE}\" fill=\"none\" stroke=\"#666666\"/>"
        );
        for (value, text) in &self.axes[0].ticks {
            let x = LEFT + SIDE * self.axes[0].share(*value);
            let _ = writeln!(
                svg,
                "<path d=\"M{x:.1} {bottom}v5\" stroke=\"#666666\"/><text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" \
                 fill=\"#333333\">{}</text>",
                bottom + 19.0,
                escape(text)
            );
        }
        for (value, text) in &self.axes[1].ticks {
            let y = TOP + SIDE * (1.0 - self.axes[1].share(*value));
            let _ = writeln!(
                svg,
                "<path d=\"M{LEFT} {y:.1}h-5\" stroke=\"#666666\"/><text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" \
                 fill=\"#333333\">{}</text>",
                LEFT - 8.0,
                y + 4.5,
                escape(text)
            );
        }
        let middle = (LEFT + SIDE / 2.0, TOP + SIDE / 2.0);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\" fill=\"#333333\">{}</text>\n\
             <text x=\"16\" y=\"{}\" text-anchor=\"middle\" fill=\"#333333\" transform=\"rotate(-90 16 {})\">{}</text>",
            middle.0,
            bottom + 42.0,
            escape(&self.axes[0].name),
            middle.1,
            middle.1,
            escape(&self.axes[1].name)
        );
    }
}

impl Axis {
    /// The range of a column and a margin; words lie at whole numbers.
    fn new(column: &Column) -> Result<Self> {
        let name = column.name.clone();
        match &column.cells {
            Cells::Words { words, .. } => {
                let ticks = words.iter().enumerate().take(12).map(|(i, word)| (i as f64, shorten(word, 9)));
                Ok(Self { name, from: -0.5, to: words.len() as f64 - 0.5, ticks: ticks.collect() })
            }
            Cells::Numbers(numbers) => {
                let present = numbers.iter().copied().filter(|x| x.is_finite());
                let (low, high) =
                    present.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
                if low >= high || !(high - low).is_finite() {
                    return Err(Error::input(format!("column \"{name}\""), "does not vary")
                        .hint("decision regions need two columns that do"));
                }
                let (from, to) = (low - 0.06 * (high - low), high + 0.06 * (high - low));
                Ok(Self { name, from, to, ticks: round_ticks(from, to) })
            }
        }
    }

    fn share(&self, x: f64) -> f64 {
        (x - self.from) / (self.to - self.from)
    }

    fn cell(&self, x: f64) -> usize {
        ((self.share(x) * GRID as f64) as usize).min(GRID - 1)
    }

    fn middle(&self, cell: usize) -> f64 {
        self.from + (cell as f64 + 0.5) / GRID as f64 * (self.to - self.from)
    }
}

/// About five round numbers.
fn round_ticks(from: f64, to: f64) -> Vec<(f64, String)> {
    let rough = (to - from) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|step| *step >= rough).unwrap_or(rough);
    let decimals = (-step.log10().floor()).max(0.0) as usize;
    let text = |x: f64| match step.abs() {
        step if (1e-4..1e6).contains(&step) => format!("{x:.decimals$}"),
        _ => format!("{x:.1e}"),
    };
    let first = (from / step).ceil() as i64;
    (first..first + 12).map(|i| i as f64 * step).take_while(|x| *x <= to).map(|x| (x, text(x))).collect()
}

/// A class's colour over white.
fn colour(class: usize, strength: f64) -> String {
    let mix = |channel: u8| (255.0 - strength * (255.0 - f64::from(channel))).round() as u8;
    let [r, g, b] = PALETTE[class % PALETTE.len()].map(mix);
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn without(mut table: Table, column: &str) -> Result<Table> {
    table.take(column)?;
    Ok(table)
}

fn shorten(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.into();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_within_the_axis() {
        let texts = |from, to| round_ticks(from, to).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
        assert_eq!(texts(0.0, 10.0), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(texts(-0.03, 0.32), ["0.0", "0.1", "0.2", "0.3"]);
        assert_eq!(texts(1e9, 2e9).len(), 6);
    }

    #[test]
    fn colours_pale_towards_white_and_long_names_are_cut() {
        assert_eq!((colour(0, 1.0), colour(0, 0.0)), ("#0072b2".into(), "#ffffff".into()));
        assert_eq!(shorten("äöüäöü", 4), "äöü…");
    }
}
