//! Reports and tables as plain text for the terminal.

use std::fmt::Write;

use crate::{Claim, Report, Table, Threshold};

/// A measured figure with four significant digits.
pub(crate) fn figure(value: f64) -> String {
    if !value.is_finite() {
        return "not a number".into();
    }
    let magnitude = value.abs();
    if magnitude != 0.0 && !(1e-4..1e7).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let leading_digit = if magnitude == 0.0 { 0.0 } else { magnitude.log10().floor() };
    let text = format!("{value:.*}", (3.0 - leading_digit).max(0.0) as usize);
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').into(),
        false => text,
    }
}

impl Claim {
    /// The measured figure with its unit.
    pub fn measured_text(&self) -> String {
        format!("{} {}", figure(self.measured), self.unit).trim_end().into()
    }

    /// What the figure must satisfy, in the same unit.
    pub fn threshold_text(&self) -> String {
        let (bound, limit) = match self.threshold {
            Threshold::AtLeast(limit) => ("≥", limit),
            Threshold::AtMost(limit) => ("≤", limit),
        };
        format!("{bound} {}", figure(limit))
    }

    /// `held` or `not held`.
    pub fn verdict(&self) -> &'static str {
        if self.held() { "held" } else { "not held" }
    }
}

impl Table {
    /// Columns aligned with spaces; numbers to the right, words to the left.
    pub fn to_text(&self) -> String {
        let width = |column: usize| {
            let cells = self.rows.iter().map(|row| row[column].chars().count());
            cells.chain([self.columns[column].chars().count()]).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.columns.len()).map(width).collect();
        let to_right: Vec<bool> = (0..self.columns.len()).map(|column| self.is_numeric(column)).collect();
        let line = |cells: &[String]| {
            let padded =
                cells.iter().zip(&widths).zip(&to_right).map(|((cell, &width), &right)| match right {
                    true => format!("{cell:>width$}"),
                    false => format!("{cell:<width$}"),
                });
            padded.collect::<Vec<_>>().join("  ").trim_end().to_string() + "\n"
        };
        let rule: Vec<String> = widths.iter().map(|&width| "─".repeat(width)).collect();
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        line(&self.columns) + &line(&rule) + &rows
    }

    /// Whether every cell of a column begins like a number (or is empty or a dash).
    pub(crate) fn is_numeric(&self, column: usize) -> bool {
        let numeric = |cell: &String| {
            let cell = cell.trim_start_matches(['-', '−', '+', '–', '—', '±', '≤', '≥', '<', '>', '×', ' ']);
            cell.is_empty() || cell.starts_with(|c: char| c.is_ascii_digit())
        };
        !self.rows.is_empty() && self.rows.iter().all(|row| numeric(&row[column]))
    }
}

impl Report {
    /// How an experiment was run, as `quick scale, seed 0, 12 s`.
    pub(crate) fn run(&self) -> Option<String> {
        let scale = self.scale?.name();
        Some(format!("{scale} scale, seed {}, {} s", self.seed, figure(self.seconds)))
    }

    /// Claims first, then tables and notes, in plain text.
    pub fn to_text(&self) -> String {
        let mut text = format!("{}\n{}\n", self.system.title, self.system.paper);
        let plural = if self.claims.len() == 1 { "" } else { "s" };
        let held = self.claims.iter().filter(|claim| claim.held()).count();
        if let Some(run) = self.run() {
            let _ = writeln!(text, "{run}, {held} of {} claim{plural} held\n", self.claims.len());
        }
        text += &self.claims_text();
        for table in &self.tables {
            let _ = write!(text, "\n{}\n{}", table.title, table.to_text());
        }
        if !self.notes.is_empty() {
            text.push('\n');
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }

    /// Two lines a claim: whether it holds, and the figures behind it.
    pub fn claims_text(&self) -> String {
        let mut text = String::new();
        for claim in &self.claims {
            let (verdict, measured, threshold) =
                (claim.verdict(), claim.measured_text(), claim.threshold_text());
            let _ = writeln!(text, "{verdict:<8}  {}", claim.name);
            let _ = writeln!(text, "{:8}  {measured}, must be {threshold}; paper: {}", "", claim.paper);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_keep_four_digits() {
        let cases = [
            (0.0, "0"),
            (0.12346, "0.1235"),
            (0.001234, "0.001234"),
            (-2.5, "-2.5"),
            (1234.56, "1235"),
            (98765.4, "98765"),
            (0.00001234, "1.234e-5"),
            (f64::NAN, "not a number"),
        ];
        for (value, text) in cases {
            assert_eq!(figure(value), text);
        }
    }

    #[test]
    fn a_claim_is_printed_with_verdict_figure_threshold_and_the_papers_figure() {
        let card = crate::Card {
            slug: "a",
            family: "b",
            title: "c",
            paper: "d",
            year: 2020,
            claim: "e",
            purpose: "f",
        };
        let mut report = Report::new(card, crate::Scale::Quick, 0);
        report.claims.push(Claim::new("ahead", "2 %", 1.5, "%", Threshold::AtLeast(1.0)));
        report.claims.push(Claim::new("defined", "yes", f64::NAN, "", Threshold::AtMost(1.0)));
        assert_eq!(
            report.claims_text(),
            "held      ahead\n          1.5 %, must be ≥ 1; paper: 2 %\n\
             not held  defined\n          not a number, must be ≤ 1; paper: yes\n"
        );
    }

    #[test]
    fn numbers_align_to_the_right_and_words_to_the_left() {
        let mut table = Table::new("t", &["model", "loss"]);
        table.row(["gla", "2.38"]).row(["linear", "12.5"]);
        assert_eq!(table.to_text(), "model   loss\n──────  ────\ngla     2.38\nlinear  12.5\n");
    }
}
