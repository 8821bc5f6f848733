//! The drawing itself, in a fixed layout: title, legend, axes.

use std::sync::OnceLock;

use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::register_font;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::axis::{Span, Tick};
use super::{Kind, Plot};
use crate::{Error, Result};

// All measures are in CSS pixels; a `Pen` multiplies them with its scale.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TEXT: f64 = 15.0;
const TITLE: f64 = 19.0;
/// Text sits higher in a bitmap than in an SVG, by this part of its size.
const BITMAP_RISE: f64 = 0.14;

/// Backends draw at whole pixels: the SVG is drawn ten times larger and shown at its size.
const SVG_SCALE: f64 = 10.0;
/// The PNG has twice as many pixels as CSS would have,
const PNG_SCALE: u32 = 2;
/// each averaged from 2×2 drawn ones, which smooths all edges.
const SMOOTHING: u32 = 2;

const PAPER: RGBColor = RGBColor(0xff, 0xff, 0xff);
const INK: RGBColor = RGBColor(0x33, 0x33, 0x33);
const FAINT: RGBColor = RGBColor(0x66, 0x66, 0x66);
const GRID: RGBColor = RGBColor(0xe6, 0xe6, 0xe6);

/// Okabe and Ito's colours, which stay apart for colour-blind readers, without black and yellow.
const PALETTE: [RGBColor; 6] = [
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
];
#[cfg(test)]
pub(super) const PALETTE_HEX: [&str; 2] = ["#0072B2", "#D55E00"];

/// Curves with at most this many points get a dot at each.
const MOST_DOTS: usize = 24;
/// Charts with at most this many bars have the value written on each.
const MOST_BAR_LABELS: usize = 16;

pub(super) fn svg(plot: &Plot) -> Result<String> {
    let size = |scale: f64| ((WIDTH * scale) as u32, (HEIGHT * scale) as u32);
    let attributes = |(width, height)| format!("<svg width=\"{width}\" height=\"{height}\"");
    let mut text = String::new();
    let area = SVGBackend::with_string(&mut text, size(SVG_SCALE)).into_drawing_area();
    paint(plot, &Pen { area, scale: SVG_SCALE, text_drop: 0.0 })?;
    let shown = attributes(size(1.0)) + " stroke-linejoin=\"round\" stroke-linecap=\"round\"";
    Ok(text.replacen(&attributes(size(SVG_SCALE)), &shown, 1))
}

pub(super) fn png(plot: &Plot) -> Result<Vec<u8>> {
    let scale = PNG_SCALE * SMOOTHING;
    let (width, height) = (WIDTH as u32 * scale, HEIGHT as u32 * scale);
    let mut pixels = vec![0u8; (width * height * 3) as usize];
    let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
    paint(plot, &Pen { area, scale: f64::from(scale), text_drop: BITMAP_RISE })?;
    let (width, height) = (width / SMOOTHING, height / SMOOTHING);
    encode_png(&average_blocks(&pixels, width, height, SMOOTHING), width, height)
}

/// Shrinks an RGB image to `width`×`height` by averaging blocks of `block`×`block` pixels.
fn average_blocks(pixels: &[u8], width: u32, height: u32, block: u32) -> Vec<u8> {
    let (width, height, block) = (width as usize, height as usize, block as usize);
    let sample =
        |x: usize, y: usize, channel: usize| u32::from(pixels[(y * width * block + x) * 3 + channel]);
    let mut smooth = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        for x in 0..width {
            for channel in 0..3 {
                let offsets = (0..block).flat_map(|dy| (0..block).map(move |dx| (dx, dy)));
                let sum: u32 = offsets.map(|(dx, dy)| sample(x * block + dx, y * block + dy, channel)).sum();
                smooth.push((sum / (block * block) as u32) as u8);
            }
        }
    }
    smooth
}

fn encode_png(pixels: &[u8], width: u32, height: u32) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, width, height);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder
        .write_header()
        .and_then(|mut writer| writer.write_image_data(pixels))
        .map_err(|e| Error::work("cannot encode the plot as PNG").caused_by(e))?;
    Ok(bytes)
}

/// A rectangle on the page with the data's extents.
struct Frame {
    left: f64,
    top: f64,
    right: f64,
    bottom: f64,
    x: Span,
    y: Span,
}

impl Frame {
    fn x(&self, value: f64) -> f64 {
        self.left + self.x.place(value) * (self.right - self.left)
    }

    fn y(&self, value: f64) -> f64 {
        self.bottom - self.y.place(value) * (self.bottom - self.top)
    }
}

fn paint<DB: DrawingBackend>(plot: &Plot, pen: &Pen<DB>) -> Result<()> {
    pen.fill(PAPER)?;
    pen.text(&plot.title, (LEFT, 16.0), TITLE, INK, (HPos::Left, VPos::Top))?;
    let below_legend = legend(plot, pen, 46.0)?;
    pen.text(&plot.y.label, (LEFT, below_legend), TEXT, FAINT, (HPos::Left, VPos::Top))?;
    let top = below_legend + 28.0;
    let bottom = HEIGHT - if plot.x.label.is_empty() { 36.0 } else { 58.0 };
    let middle = ((LEFT + WIDTH - RIGHT) / 2.0, (top + bottom) / 2.0);
    match spans(plot) {
        Some((x, y)) => {
            let mut frame = Frame { left: LEFT, top, right: WIDTH - RIGHT, bottom, x, y };
            axes(plot, pen, &mut frame)?;
            match &plot.kind {
                Kind::Lines | Kind::Points => curves(plot, pen, &frame)?,
                Kind::Bars { categories } => bars(plot, categories.len(), pen, &frame)?,
                Kind::Histogram { bin_width } => histogram(plot, *bin_width, pen, &frame)?,
                Kind::HeatMap { columns, values } => heat_map(*columns, values, pen, &frame)?,
            }
        }
        None => pen.text("no data", middle, TEXT, FAINT, (HPos::Center, VPos::Center))?,
    }
    pen.area.present().map_err(failed)
}

/// The extents of both axes, or nothing when no point can be shown.
fn spans(plot: &Plot) -> Option<(Span, Span)> {
    if let Kind::HeatMap { columns, values } = &plot.kind {
        let cells = |axis: &super::Axis, count: usize| {
            axis.span([-0.5, count as f64 - 0.5].into_iter(), (0.0, 0.0)).filter(|_| count > 0)
        };
        return cells(&plot.x, *columns).zip(cells(&plot.y, values.len() / columns));
    }
    let shown = plot.series.iter().flat_map(|series| [plot.drawable(series), plot.outline(series)]);
    let points: Vec<(f64, f64)> = shown.flatten().collect();
    if points.is_empty() {
        return None;
    }
    // Bars stand on zero, which a logarithmic axis does not have.
    let base = match plot.kind {
        Kind::Bars { .. } | Kind::Histogram { .. } if !plot.y.log => Some(0.0),
        _ => None,
    };
    let rests_on_base = base.is_some() && points.iter().all(|p| p.1 >= 0.0);
    let margin = (if rests_on_base { 0.0 } else { 0.04 }, 0.04);
    let y = plot.y.span(points.iter().map(|p| p.1).chain(base), margin)?;
    let x = match &plot.kind {
        Kind::Lines | Kind::Points | Kind::HeatMap { .. } => {
            plot.x.span(points.iter().map(|p| p.0), (0.015, 0.015))?
        }
        Kind::Bars { categories } => {
            plot.x.span([-0.5, categories.len() as f64 - 0.5].into_iter(), (0.0, 0.0))?
        }
        Kind::Histogram { bin_width } => {
            let edges = points.iter().flat_map(|p| [p.0 - bin_width / 2.0, p.0 + bin_width / 2.0]);
            plot.x.span(edges, (0.015, 0.015))?
        }
    };
    Some((x, y))
}

/// Writes the legend in rows from `top` on and returns where it ends.
fn legend<DB: DrawingBackend>(plot: &Plot, pen: &Pen<DB>, top: f64) -> Result<f64> {
    const SWATCH: f64 = 20.0;
    const ROW: f64 = 22.0;
    let (mut x, mut y) = (LEFT, top);
    for (number, series) in plot.series.iter().enumerate().filter(|(_, series)| !series.name.is_empty()) {
        let note = if plot.drawable(series).is_empty() { " (no finite values)" } else { "" };
        let name = format!("{}{note}", series.name);
        let width = SWATCH + 6.0 + pen.text_width(&name, TEXT)?;
        if x > LEFT && x + width > WIDTH - RIGHT {
            (x, y) = (LEFT, y + ROW);
        }
        let (colour, middle) = (colour(number), y + ROW / 2.0);
        match plot.kind {
            Kind::Lines => pen.line(&[(x, middle), (x + SWATCH, middle)], colour, 2.5)?,
            Kind::Points => pen.dot((x + SWATCH / 2.0, middle), 4.0, colour)?,
            _ => pen.rect((x + 4.0, middle - 6.0), (x + 16.0, middle + 6.0), colour)?,
        }
        pen.text(&name, (x + SWATCH + 6.0, middle), TEXT, INK, (HPos::Left, VPos::Center))?;
        x += width + 22.0;
    }
    Ok(if x > LEFT { y + ROW + 8.0 } else { top })
}

/// Draws grid lines and labels, after moving the frame's left edge so that the labels fit.
fn axes<DB: DrawingBackend>(plot: &Plot, pen: &Pen<DB>, frame: &mut Frame) -> Result<()> {
    let y_ticks = frame.y.ticks(((frame.bottom - frame.top) / 36.0) as usize);
    for tick in &y_ticks {
        frame.left = frame.left.max(pen.text_width(&tick.label, TEXT)? + 18.0);
    }
    for Tick { value, label } in &y_ticks {
        let y = frame.y(*value);
        pen.line(&[(frame.left, y), (frame.right, y)], GRID, 1.0)?;
        pen.text(label, (frame.left - 8.0, y), TEXT, FAINT, (HPos::Right, VPos::Center))?;
    }
    let x_ticks = match &plot.kind {
        Kind::Bars { categories } => {
            let named = |(i, name): (usize, &String)| Tick { value: i as f64, label: name.clone() };
            categories.iter().enumerate().map(named).collect()
        }
        _ => frame.x.ticks(8),
    };
    let is_bars = matches!(plot.kind, Kind::Bars { .. });
    let mut free_from = f64::NEG_INFINITY;
    for Tick { value, label } in &x_ticks {
        let x = frame.x(*value);
        if !is_bars {
            pen.line(&[(x, frame.bottom), (x, frame.bottom + 5.0)], FAINT, 1.0)?;
        }
        // A label that would touch the one before it is left out.
        let half = pen.text_width(label, TEXT)? / 2.0;
        if x - half > free_from {
            pen.text(label, (x, frame.bottom + 9.0), TEXT, FAINT, (HPos::Center, VPos::Top))?;
            free_from = x + half + 8.0;
        }
    }
    pen.line(&[(frame.left, frame.bottom), (frame.right, frame.bottom)], FAINT, 1.0)?;
    let middle = (frame.left + frame.right) / 2.0;
    pen.text(&plot.x.label, (middle, HEIGHT - 26.0), TEXT, FAINT, (HPos::Center, VPos::Top))
}

fn curves<DB: DrawingBackend>(plot: &Plot, pen: &Pen<DB>, frame: &Frame) -> Result<()> {
    for (number, series) in plot.series.iter().enumerate() {
        let corners: Vec<(f64, f64)> =
            plot.outline(series).iter().map(|&(x, y)| (frame.x(x), frame.y(y))).collect();
        if corners.len() > 2 {
            pen.area_within(&corners, colour(number))?;
        }
    }
    for (number, series) in plot.series.iter().enumerate() {
        let points: Vec<(f64, f64)> =
            plot.drawable(series).iter().map(|&(x, y)| (frame.x(x), frame.y(y))).collect();
        let is_curve = plot.kind == Kind::Lines;
        if is_curve && points.len() > 1 {
            pen.line(&points, colour(number), 2.0)?;
        }
        if !is_curve || points.len() <= MOST_DOTS {
            for &point in &points {
                pen.dot(point, 3.2, colour(number))?;
            }
        }
    }
    Ok(())
}

fn bars<DB: DrawingBackend>(plot: &Plot, categories: usize, pen: &Pen<DB>, frame: &Frame) -> Result<()> {
    /// The part of a category's width that its bars fill.
    const FILLED: f64 = 0.72;
    let count = plot.series.len() as f64;
    let category_width = (frame.right - frame.left) / categories as f64;
    let width = (category_width * FILLED / count).min(90.0);
    let labelled = plot.series.len() * categories <= MOST_BAR_LABELS;
    for (number, series) in plot.series.iter().enumerate() {
        for (category, value) in plot.drawable(series) {
            let left = frame.x(category) + (number as f64 - count / 2.0) * width;
            let gap = (width * 0.06).min(2.0);
            bar(pen, frame, (left + gap, left + width - gap), value, colour(number))?;
            if labelled {
                let (y, anchor) = match value < 0.0 {
                    true => (frame.y(value) + 3.0, VPos::Top),
                    false => (frame.y(value) - 2.0, VPos::Bottom),
                };
                let text = crate::text::figure(value);
                pen.text(&text, (left + width / 2.0, y), TEXT - 2.0, INK, (HPos::Center, anchor))?;
            }
        }
    }
    Ok(())
}

fn histogram<DB: DrawingBackend>(plot: &Plot, bin_width: f64, pen: &Pen<DB>, frame: &Frame) -> Result<()> {
    for (number, series) in plot.series.iter().enumerate() {
        for (middle, count) in plot.drawable(series) {
            let edges = (frame.x(middle - bin_width / 2.0) + 0.5, frame.x(middle + bin_width / 2.0) - 0.5);
            bar(pen, frame, edges, count, colour(number))?;
        }
    }
    Ok(())
}

/// Cells from white to the darkest colour; those without a finite value are left grey.
fn heat_map<DB: DrawingBackend>(columns: usize, values: &[f64], pen: &Pen<DB>, frame: &Frame) -> Result<()> {
    let finite = || values.iter().copied().filter(|value| value.is_finite());
    let (least, most) = finite().fold((0.0f64, 0.0f64), |(least, most), v| (least.min(v), most.max(v)));
    // Halves, since the range of two finite numbers may not be finite.
    let half_range = most / 2.0 - least / 2.0;
    for (cell, value) in values.iter().enumerate() {
        let (x, y) = ((cell % columns) as f64, (cell / columns) as f64);
        let colour = if value.is_finite() {
            let share = if half_range > 0.0 { (value / 2.0 - least / 2.0) / half_range } else { 0.0 };
            blend(PAPER, PALETTE[0], share)
        } else {
            GRID
        };
        pen.rect((frame.x(x - 0.5), frame.y(y + 0.5)), (frame.x(x + 0.5), frame.y(y - 0.5)), colour)?;
    }
    let range = format!("{} to {}", crate::text::figure(least), crate::text::figure(most));
    pen.text(&range, (frame.right, frame.top - 6.0), TEXT, FAINT, (HPos::Right, VPos::Bottom))
}

fn blend(from: RGBColor, to: RGBColor, share: f64) -> RGBColor {
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * share).round() as u8;
    RGBColor(mix(from.0, to.0), mix(from.1, to.1), mix(from.2, to.2))
}

/// A bar from zero, or from the bottom where the axis has no zero.
fn bar<DB: DrawingBackend>(
    pen: &Pen<DB>,
    frame: &Frame,
    (left, right): (f64, f64),
    value: f64,
    colour: RGBColor,
) -> Result<()> {
    let zero = frame.y(0.0);
    let base = if zero.is_finite() { zero.clamp(frame.top, frame.bottom) } else { frame.bottom };
    let end = frame.y(value);
    pen.rect((left, base.min(end)), (right, base.max(end)), colour)
}

fn colour(number: usize) -> RGBColor {
    PALETTE[number % PALETTE.len()]
}

/// Draws in CSS pixels on a surface with `scale` pixels each.
struct Pen<DB: DrawingBackend> {
    area: DrawingArea<DB, Shift>,
    scale: f64,
    text_drop: f64,
}

impl<DB: DrawingBackend> Pen<DB> {
    fn at(&self, (x, y): (f64, f64)) -> (i32, i32) {
        ((x * self.scale).round() as i32, (y * self.scale).round() as i32)
    }

    fn length(&self, length: f64) -> u32 {
        (length * self.scale).round() as u32
    }

    fn fill(&self, colour: RGBColor) -> Result<()> {
        self.area.fill(&colour).map_err(failed)
    }

    fn line(&self, points: &[(f64, f64)], colour: RGBColor, width: f64) -> Result<()> {
        let points: Vec<_> = points.iter().map(|&point| self.at(point)).collect();
        let style = colour.stroke_width(self.length(width));
        self.area.draw(&PathElement::new(points, style)).map_err(failed)
    }

    /// Fills the area within corners, so lightly that what lies behind can be seen.
    fn area_within(&self, corners: &[(f64, f64)], colour: RGBColor) -> Result<()> {
        const COVER: f64 = 0.18;
        let corners: Vec<_> = corners.iter().map(|&corner| self.at(corner)).collect();
        self.area.draw(&Polygon::new(corners, colour.mix(COVER).filled())).map_err(failed)
    }

    fn dot(&self, centre: (f64, f64), radius: f64, colour: RGBColor) -> Result<()> {
        self.area.draw(&Circle::new(self.at(centre), self.length(radius), colour.filled())).map_err(failed)
    }

    fn rect(&self, from: (f64, f64), to: (f64, f64), colour: RGBColor) -> Result<()> {
        self.area.draw(&Rectangle::new([self.at(from), self.at(to)], colour.filled())).map_err(failed)
    }

    fn text(
        &self,
        text: &str,
        at: (f64, f64),
        size: f64,
        colour: RGBColor,
        (h, v): (HPos, VPos),
    ) -> Result<()> {
        let style = self.font(size).color(&colour).pos(Pos::new(h, v));
        let at = self.at((at.0, at.1 + size * self.text_drop));
        self.area.draw_text(text, &style, at).map_err(failed)
    }

    fn text_width(&self, text: &str, size: f64) -> Result<f64> {
        let (width, _) = self.area.estimate_text_size(text, &self.font(size)).map_err(failed)?;
        Ok(f64::from(width) / self.scale)
    }

    fn font(&self, size: f64) -> TextStyle<'static> {
        static REGISTERED: OnceLock<()> = OnceLock::new();
        REGISTERED.get_or_init(|| {
            let registered = register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
            assert!(registered.is_ok(), "the font in the binary can be read");
        });
        ("sans-serif", size * self.scale).into_font().into()
    }
}

fn failed<E: std::error::Error + Send + Sync>(cause: DrawingAreaErrorKind<E>) -> Error {
    Error::work(format!("cannot draw the plot: {cause}"))
}
