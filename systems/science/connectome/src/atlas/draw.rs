//! Shapes as SVG.

use std::fmt::Write;

pub const INK: &str = "#333333";
pub const FAINT: &str = "#767676";
pub const RULE: &str = "#e2e2e2";
pub const ACCENT: &str = "#0072b2";
/// Communities: Okabe and Ito's colours, then more hues for those who have more.
const PALETTE: [&str; 10] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c564b", "#5d8a00",
    "#c2185b",
];
/// What belongs to no community.
pub const NONE: &str = "#bdbdbd";

/// Where text is anchored.
#[derive(Clone, Copy)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// The colour of a community.
pub fn colour(community: Option<usize>) -> &'static str {
    community.map_or(NONE, |c| PALETTE[c % PALETTE.len()])
}

/// A picture in the making; coordinates in pixels.
pub struct Svg {
    width: f64,
    height: f64,
    body: String,
}

impl Svg {
    pub fn new(width: f64, height: f64) -> Self {
        Self { width, height, body: String::new() }
    }

    pub fn rect(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), fill: &str, opacity: f64) {
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" fill=\"{fill}\" fill-opacity=\"{opacity:.2}\"/>"
        );
    }

    pub fn frame(&mut self, (x, y): (f64, f64), (w, h): (f64, f64)) {
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" fill=\"none\" stroke=\"{RULE}\"/>"
        );
    }

    pub fn line(
        &mut self,
        (x1, y1): (f64, f64),
        (x2, y2): (f64, f64),
        stroke: &str,
        width: f64,
        opacity: f64,
    ) {
        let _ = writeln!(
            self.body,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{stroke}\" \
             stroke-width=\"{width:.2}\" stroke-opacity=\"{opacity:.2}\"/>"
        );
    }

    pub fn curve(&mut self, points: &[(f64, f64)], stroke: &str, width: f64, opacity: f64) {
        let points: String = points.iter().map(|(x, y)| format!("{x:.1},{y:.1} ")).collect();
        let _ = writeln!(
            self.body,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{stroke}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\"/>"
        );
    }

    pub fn circle(&mut self, (x, y): (f64, f64), radius: f64, fill: &str) {
        let _ = writeln!(
            self.body,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\" fill=\"{fill}\" stroke=\"#ffffff\"/>"
        );
    }

    pub fn text(&mut self, text: &str, (x, y): (f64, f64), size: f64, fill: &str, anchor: Anchor) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size:.1}\" fill=\"{fill}\" text-anchor=\"{anchor}\">{}</text>",
            escape(text)
        );
    }

    /// A table of cells; `level` gives each a colour of the scale, or none for paper. Neighbours of one colour in a row
    /// become one shape.
    pub fn cells(
        &mut self,
        (x, y): (f64, f64),
        (w, h): (f64, f64),
        (rows, columns): (usize, usize),
        scale: &[String],
        level: impl Fn(usize, usize) -> Option<usize>,
    ) {
        let mut paths = vec![String::new(); scale.len()];
        let (cell_w, cell_h) = (w / columns as f64, h / rows as f64);
        for row in 0..rows {
            let mut column = 0;
            while column < columns {
                let here = level(row, column);
                let start = column;
                while column < columns && level(row, column) == here {
                    column += 1;
                }
                if let Some(here) = here {
                    let (left, top) = (x + start as f64 * cell_w, y + row as f64 * cell_h);
                    let length = (column - start) as f64 * cell_w;
                    let _ = write!(paths[here], "M{left:.2} {top:.2}h{length:.2}v{cell_h:.2}h-{length:.2}z");
                }
            }
        }
        for (path, fill) in paths.iter().zip(scale).filter(|(path, _)| !path.is_empty()) {
            let _ =
                writeln!(self.body, "<path d=\"{path}\" fill=\"{fill}\" shape-rendering=\"crispEdges\"/>");
        }
    }

    pub fn finish(self) -> String {
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" \
             font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\">\n<rect width=\"{0}\" height=\"{1}\" fill=\"#ffffff\"/>\n{2}</svg>\n",
            self.width, self.height, self.body
        )
    }
}

/// So many colours from one to another through those between, in equal steps.
pub fn ramp(stops: &[[u8; 3]], levels: usize) -> Vec<String> {
    let colour = |level: usize| {
        let place = level as f64 / (levels - 1) as f64 * (stops.len() - 1) as f64;
        let below = (place as usize).min(stops.len() - 2);
        let part = place - below as f64;
        let mix = |c: usize| {
            let (a, b) = (f64::from(stops[below][c]), f64::from(stops[below + 1][c]));
            (a + part * (b - a)).round() as u8
        };
        format!("#{:02x}{:02x}{:02x}", mix(0), mix(1), mix(2))
    };
    (0..levels).map(colour).collect()
}

/// Text that may stand in HTML and SVG.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
