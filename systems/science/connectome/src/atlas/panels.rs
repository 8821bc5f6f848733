//! The picture of one motif: when, among whom, in which animals, and what the neurons did.

use super::draw::{ACCENT, Anchor, FAINT, INK, RULE, Svg, colour, escape, ramp};
use super::layout::places;
use super::{Atlas, Motif, smoothed};
use crate::affinity::standardised;

const WIDTH: f64 = 1100.0;
const MARGIN: f64 = 24.0;
/// The three panels of the middle row.
const SIDE: f64 = 340.0;
/// Colours of a scale.
const LEVELS: usize = 16;
/// Most rows of the raster and of the matrix that get names.
const MOST_NAMES: usize = 48;
/// Most edges that are drawn, the heaviest.
const MOST_EDGES: usize = 260;
/// Traces are drawn up to so many standard deviations.
const BRIGHTEST: f64 = 2.5;
/// Frames of the raster: more are averaged.
const MOST_COLUMNS: usize = 420;

impl Atlas {
    /// The picture of a motif as an SVG document.
    pub fn motif_svg(&self, number: usize) -> String {
        let motif = &self.motifs[number];
        let order: Vec<usize> =
            motif.order().into_iter().filter(|&i| motif.communities[i].is_some()).collect();
        let raster = (order.len() as f64 * 7.0).clamp(80.0, 420.0);
        let (middle, bottom) = (212.0, 212.0 + SIDE + 46.0);
        let mut svg = Svg::new(WIDTH, bottom + raster + 52.0);
        svg.text(&format!("Motif {}", number + 1), (MARGIN, 36.0), 22.0, INK, Anchor::Start);
        svg.text(&self.summary(motif), (MARGIN + 110.0, 36.0), 14.0, FAINT, Anchor::Start);
        self.time_panel(&mut svg, motif, 62.0, 96.0);
        self.matrix_panel(&mut svg, motif, &order, (MARGIN + 56.0, middle));
        self.graph_panel(&mut svg, motif, &order, (MARGIN + 56.0 + SIDE + 24.0, middle));
        self.animal_panel(&mut svg, motif, (MARGIN + 56.0 + 2.0 * SIDE + 48.0, middle));
        self.raster_panel(&mut svg, motif, &order, (bottom, raster));
        svg.finish()
    }

    /// When, in how many animals, how many neurons.
    pub fn summary(&self, motif: &Motif) -> String {
        let (start, end) = motif.active;
        let strongest = motif.animals.iter().copied().fold(0.0, f64::max);
        let carry = motif.animals.iter().filter(|&&w| w >= strongest / 2.0).count();
        format!(
            "{:.1} – {:.1} s   ·   strong in {carry} of {} animals   ·   {} neurons in {} communities   ·   weight {:.3}",
            self.traces.seconds(start),
            self.traces.seconds(end),
            motif.animals.len(),
            motif.communities.iter().flatten().count(),
            motif.community_count(),
            motif.weight,
        )
    }

    fn time_panel(&self, svg: &mut Svg, motif: &Motif, top: f64, height: f64) {
        let (left, width) = (MARGIN + 56.0, WIDTH - 2.0 * MARGIN - 56.0);
        let seconds = self.traces.seconds(self.traces.frames);
        let x = |t: f64| left + width * (t / seconds).clamp(0.0, 1.0);
        for span in &self.traces.spans {
            svg.rect((x(span.start), top), ((x(span.end) - x(span.start)).max(1.0), height), "#e69f00", 0.22);
            svg.text(&span.label, (x(span.start) + 3.0, top + 11.0), 10.0, FAINT, Anchor::Start);
        }
        let (start, end) = (self.traces.seconds(motif.active.0), self.traces.seconds(motif.active.1));
        svg.rect((x(start), top), (x(end) - x(start), height), ACCENT, 0.10);
        svg.text("when", (left - 10.0, top + height / 2.0), 12.0, FAINT, Anchor::End);
        let most = motif.time.iter().copied().fold(1e-300, f64::max);
        let points = |series: &[f64]| -> Vec<(f64, f64)> {
            let point = |(t, v): (usize, &f64)| (x(self.traces.seconds(t)), top + height * (1.0 - v / most));
            series.iter().enumerate().map(point).collect()
        };
        svg.curve(&points(&motif.time), ACCENT, 0.8, 0.45);
        svg.curve(&points(&smoothed(&motif.time, 4.0 * self.config.affinity.sigma)), ACCENT, 2.2, 1.0);
        svg.line((left, top + height), (left + width, top + height), FAINT, 1.0, 1.0);
        axis(svg, (0.0, seconds), (left, width), top + height);
    }

    fn matrix_panel(&self, svg: &mut Svg, motif: &Motif, order: &[usize], (left, top): (f64, f64)) {
        svg.text("affinities, by community", (left, top - 10.0), 12.0, FAINT, Anchor::Start);
        let n = order.len().max(1);
        let most = motif.pairs.iter().copied().fold(1e-300, f64::max);
        let scale = ramp(&[[239, 246, 251], [86, 156, 206], [8, 48, 107]], LEVELS);
        svg.cells((left, top), (SIDE, SIDE), (order.len(), n), &scale, |row, column| {
            let part = motif.between(order[row], order[column]) / most;
            // The square root brings out the weak ones.
            (part > 1e-3).then(|| ((part.sqrt() * LEVELS as f64) as usize).min(LEVELS - 1))
        });
        svg.frame((left, top), (SIDE, SIDE));
        let cell = SIDE / n as f64;
        for (row, &i) in order.iter().enumerate() {
            let y = top + row as f64 * cell;
            svg.rect((left - 6.0, y), (4.0, cell + 0.3), colour(motif.communities[i]), 1.0);
            if row > 0 && motif.communities[order[row - 1]] != motif.communities[i] {
                svg.line((left, y), (left + SIDE, y), "#ffffff", 1.2, 1.0);
                let x = left + row as f64 * cell;
                svg.line((x, top), (x, top + SIDE), "#ffffff", 1.2, 1.0);
            }
        }
        self.names(svg, motif, order, (left - 9.0, top), cell);
    }

    /// Names beside rows: all of them, or every so many where there is no room.
    fn names(&self, svg: &mut Svg, motif: &Motif, order: &[usize], (right, top): (f64, f64), cell: f64) {
        let every = order.len().div_ceil(MOST_NAMES).max(1);
        let size = (cell * every as f64 * 0.9).clamp(5.0, 10.0);
        for (row, &i) in order.iter().enumerate().step_by(every) {
            let y = top + (row as f64 + 0.5) * cell + size * 0.36;
            svg.text(&self.traces.neurons[i], (right, y), size, colour(motif.communities[i]), Anchor::End);
        }
    }

    fn graph_panel(&self, svg: &mut Svg, motif: &Motif, order: &[usize], (left, top): (f64, f64)) {
        svg.text("who with whom", (left, top - 10.0), 12.0, FAINT, Anchor::Start);
        svg.frame((left, top), (SIDE, SIDE));
        let Ok(graph) = motif.graph(&self.traces.neurons, self.config.threshold) else { return };
        let at = places(motif, order);
        let inner = SIDE - 44.0;
        let place = |i: usize| (left + 22.0 + inner * at[i].0, top + 22.0 + inner * at[i].1);
        let mut edges = graph.edges().to_vec();
        edges.sort_by(|a, b| b.2.total_cmp(&a.2));
        edges.truncate(MOST_EDGES);
        let most = edges.first().map_or(1.0, |edge| edge.2);
        for &(i, j, weight) in edges.iter().rev() {
            let part = weight / most;
            let inside = motif.communities[i] == motif.communities[j];
            let stroke = if inside { colour(motif.communities[i]) } else { "#9a9a9a" };
            svg.line(place(i), place(j), stroke, 0.4 + 2.2 * part, 0.15 + 0.55 * part);
        }
        let radius = (90.0 / (order.len() as f64 + 8.0)).clamp(3.0, 7.0);
        for &i in order {
            svg.circle(place(i), radius, colour(motif.communities[i]));
        }
        let size = if order.len() <= MOST_NAMES { 8.5 } else { 6.0 };
        for &i in order {
            let (x, y) = place(i);
            svg.text(&self.traces.neurons[i], (x, y - radius - 1.5), size, INK, Anchor::Middle);
        }
    }

    fn animal_panel(&self, svg: &mut Svg, motif: &Motif, (left, top): (f64, f64)) {
        svg.text("in which animals", (left, top - 10.0), 12.0, FAINT, Anchor::Start);
        let width = WIDTH - MARGIN - left;
        let row = (SIDE / motif.animals.len() as f64).clamp(6.0, 30.0);
        let most = motif.animals.iter().copied().fold(1e-300, f64::max);
        for (w, (&share, animal)) in motif.animals.iter().zip(&self.traces.animals).enumerate() {
            let y = top + w as f64 * row;
            svg.rect((left, y + row * 0.52), (width, row * 0.3), RULE, 0.6);
            svg.rect((left, y + row * 0.52), (width * share / most, row * 0.3), ACCENT, 1.0);
            svg.text(&animal.name, (left, y + row * 0.4), (row * 0.38).clamp(6.0, 11.0), INK, Anchor::Start);
        }
    }

    /// The traces of the animal that has the motif most, around its active interval.
    fn raster_panel(&self, svg: &mut Svg, motif: &Motif, order: &[usize], (top, height): (f64, f64)) {
        let strongest =
            (0..motif.animals.len()).max_by(|&a, &b| motif.animals[a].total_cmp(&motif.animals[b]));
        let Some(animal) = strongest.map(|w| &self.traces.animals[w]) else { return };
        let rows: Vec<usize> =
            order.iter().copied().filter(|i| animal.neurons.binary_search(i).is_ok()).collect();
        let (start, end) = motif.active;
        let margin = ((end - start) / 2).max(10);
        let shown = start.saturating_sub(margin)..(end + margin).min(self.traces.frames);
        let (left, width) = (MARGIN + 56.0, WIDTH - 2.0 * MARGIN - 56.0);
        let seconds = (self.traces.seconds(shown.start), self.traces.seconds(shown.end));
        svg.text(
            &format!("traces of {} by community, around the active interval", animal.name),
            (left, top - 10.0),
            12.0,
            FAINT,
            Anchor::Start,
        );
        let standard: Vec<Vec<f64>> = (rows.iter())
            .map(|i| standardised(&animal.traces[animal.neurons.binary_search(i).unwrap_or_default()]))
            .collect();
        let columns = shown.len().clamp(1, MOST_COLUMNS);
        let value = |row: usize, column: usize| {
            let from = shown.start + column * shown.len() / columns;
            let to = (shown.start + (column + 1) * shown.len() / columns).max(from + 1);
            standard[row][from..to].iter().sum::<f64>() / (to - from) as f64
        };
        let scale = ramp(&[[33, 102, 172], [247, 247, 247], [178, 24, 43]], LEVELS + 1);
        svg.cells((left, top), (width, height), (rows.len(), columns), &scale, |row, column| {
            let part = (value(row, column) / BRIGHTEST).clamp(-1.0, 1.0);
            Some(((part + 1.0) / 2.0 * LEVELS as f64).round() as usize)
        });
        let cell = height / rows.len().max(1) as f64;
        for (row, &i) in rows.iter().enumerate() {
            svg.rect(
                (left - 6.0, top + row as f64 * cell),
                (4.0, cell + 0.3),
                colour(motif.communities[i]),
                1.0,
            );
        }
        self.names(svg, motif, &rows, (left - 9.0, top), cell);
        let x = |frame: usize| left + width * (frame - shown.start) as f64 / shown.len().max(1) as f64;
        for edge in [start, end] {
            svg.line((x(edge), top - 4.0), (x(edge), top + height + 4.0), INK, 1.2, 0.8);
        }
        axis(svg, seconds, (left, width), top + height);
    }
}

/// Ticks at round seconds below a panel.
fn axis(svg: &mut Svg, (from, to): (f64, f64), (left, width): (f64, f64), y: f64) {
    let rough = ((to - from) / 8.0).max(1e-6);
    let power = 10f64.powf(rough.log10().floor());
    let step =
        [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|step| *step >= rough).unwrap_or(rough);
    let mut tick = (from / step).ceil() * step;
    while tick <= to {
        let x = left + width * (tick - from) / (to - from);
        svg.line((x, y), (x, y + 4.0), FAINT, 1.0, 1.0);
        let label = if step >= 1.0 { format!("{tick:.0}") } else { format!("{tick:.1}") };
        svg.text(&label, (x, y + 16.0), 10.0, FAINT, Anchor::Middle);
        tick += step;
    }
    svg.text("s", (left + width + 4.0, y + 16.0), 10.0, FAINT, Anchor::Start);
}

/// The names of a motif's communities, each in its colour, as HTML.
pub fn community_lists(atlas: &Atlas, motif: &Motif) -> String {
    let list = |community: Option<usize>| {
        let members = (0..motif.communities.len()).filter(|&i| motif.communities[i] == community);
        members.map(|i| escape(&atlas.traces.neurons[i])).collect::<Vec<_>>().join(" ")
    };
    let mut html: String = (0..motif.community_count())
        .map(|c| {
            format!(
                "<p><b style=\"color:{}\">community {}</b> {}</p>\n",
                colour(Some(c)),
                c + 1,
                list(Some(c))
            )
        })
        .collect();
    let none = list(None);
    if !none.is_empty() {
        html += &format!("<p class=\"faint\"><b>not in the motif</b> {none}</p>\n");
    }
    html
}
