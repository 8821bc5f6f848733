//! Reports as one HTML page that opens from disk, without scripts and without the network.

use std::fmt::Write;

use crate::text::figure;
use crate::{Claim, Report, Result, Table};

const STYLE: &str = include_str!("html.css");

/// The whole page: with several reports, a summary of all claims and a table of contents come first.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn page(title: &str, reports: &[Report]) -> Result<String> {
    let mut body = String::new();
    if let [report] = reports {
        section(&mut body, report, 1)?;
    } else {
        let _ = write!(body, "<h1>{}</h1>\n{}", escape(title), summary(reports));
        for report in reports {
            section(&mut body, report, 2)?;
        }
    }
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        escape(title)
    ))
}

/// How many claims held in each report, with links to them.
fn summary(reports: &[Report]) -> String {
    let claims: Vec<&Claim> = reports.iter().flat_map(|report| &report.claims).collect();
    let seconds: f64 = reports.iter().map(|report| report.seconds).sum();
    let mut html = format!(
        "<p class=\"lead\">{} of {} claims held in {} systems, {} s of computation.</p>\n",
        claims.iter().filter(|claim| claim.held()).count(),
        claims.len(),
        reports.len(),
        figure(seconds),
    );
    html += "<nav class=\"scroll\" aria-label=\"Contents\"><table>\n\
             <thead><tr><th>System</th><th>Result</th><th>Claim</th><th class=\"number\">Measured</th>\
             <th class=\"number\">Must be</th></tr></thead>\n<tbody>\n";
    for report in reports {
        let link = format!("<a href=\"#{}\">{}</a>", escape(report.system.slug), escape(report.system.title));
        if report.claims.is_empty() {
            let _ = writeln!(html, "<tr><td>{link}</td><td colspan=\"4\">no claims measured</td></tr>");
        }
        for (number, claim) in report.claims.iter().enumerate() {
            let _ = writeln!(
                html,
                "<tr><td class=\"words\">{}</td>{}</tr>",
                if number == 0 { &link } else { "" },
                claim_cells(claim)
            );
        }
    }
    html + "</tbody></table></nav>\n"
}

fn section(html: &mut String, report: &Report, level: usize) -> Result<()> {
    let card = &report.system;
    let below = level + 1;
    let _ = write!(
        html,
        "<section id=\"{}\">\n<h{level}>{}</h{level}>\n<p class=\"lead\">{}</p>\n\
         <dl>\n<dt>Paper</dt><dd>{}, {}</dd>\n<dt>Claim</dt><dd>{}</dd>\n",
        escape(card.slug),
        escape(card.title),
        escape(card.purpose),
        escape(card.paper),
        card.year,
        escape(card.claim),
    );
    if let Some(run) = report.run() {
        let _ = writeln!(html, "<dt>Run</dt><dd>{run}</dd>");
    }
    html.push_str("</dl>\n");
    if !report.claims.is_empty() {
        claims(html, &report.claims, below);
    }
    for plot in &report.plots {
        let _ = write!(
            html,
            "<figure role=\"img\" aria-label=\"{}\">\n{}</figure>\n",
            escape(plot.title()),
            plot.to_svg()?
        );
    }
    for one in &report.tables {
        table(html, one, below);
    }
    if !report.notes.is_empty() {
        let items: String = report.notes.iter().map(|note| format!("<li>{}</li>\n", escape(note))).collect();
        let _ = write!(html, "<h{below}>Notes</h{below}>\n<ul>\n{items}</ul>\n");
    }
    html.push_str("</section>\n");
    Ok(())
}

fn claims(html: &mut String, claims: &[Claim], level: usize) {
    let _ = write!(
        html,
        "<h{level}>Claims</h{level}>\n<div class=\"scroll\"><table>\n<thead><tr><th>Result</th><th>Claim</th>\
         <th class=\"number\">Measured</th><th class=\"number\">Must be</th><th>Paper</th></tr></thead>\n<tbody>\n"
    );
    for claim in claims {
        let _ = writeln!(
            html,
            "<tr>{}<td class=\"words\">{}</td></tr>",
            claim_cells(claim),
            escape(&claim.paper)
        );
    }
    html.push_str("</tbody></table></div>\n");
}

/// Result, claim, measured, must be.
fn claim_cells(claim: &Claim) -> String {
    format!(
        "<td>{}</td><td class=\"words\">{}</td><td class=\"number\">{}</td><td class=\"number\">{}</td>",
        verdict(claim),
        escape(&claim.name),
        escape(&claim.measured_text()),
        escape(&claim.threshold_text())
    )
}

/// A mark, a word and a colour, so that none of the three has to be seen.
fn verdict(claim: &Claim) -> String {
    let (class, mark) = if claim.held() { ("held", "✓") } else { ("not-held", "✗") };
    format!("<span class=\"verdict {class}\">{mark} {}</span>", claim.verdict())
}

fn table(html: &mut String, table: &Table, level: usize) {
    let class = |column: usize| if table.is_numeric(column) { " class=\"number\"" } else { "" };
    let row = |tag: &str, cells: &[String]| -> String {
        let cells = cells.iter().enumerate();
        cells.map(|(column, cell)| format!("<{tag}{}>{}</{tag}>", class(column), escape(cell))).collect()
    };
    let _ = write!(
        html,
        "<h{level}>{}</h{level}>\n<div class=\"scroll\"><table>\n<thead><tr>{}</tr></thead>\n<tbody>\n",
        escape(&table.title),
        row("th", &table.columns)
    );
    for cells in &table.rows {
        let _ = writeln!(html, "<tr>{}</tr>", row("td", cells));
    }
    html.push_str("</tbody></table></div>\n");
}

/// Text that is safe between tags and inside quoted attributes.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            other => safe.push(other),
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plot::Plot;
    use crate::{Card, Scale, Threshold};

    fn report(slug: &'static str) -> Report {
        let card = Card {
            slug,
            family: "sequence",
            title: "Method <1>",
            paper: "A & B, \"On methods\"",
            year: 2023,
            claim: "It is better.",
            purpose: "Trains things.",
        };
        let mut report = Report::new(card, Scale::Quick, 7);
        report.claims.push(Claim::new("better", "by <half>", 0.5, "nats", Threshold::AtLeast(0.1)));
        report.claims.push(Claim::new("not worse", "equal", 0.5, "", Threshold::AtMost(0.1)));
        let mut table = Table::new("Losses", &["model", "loss"]);
        table.row(["<script>alert(1)</script>", "2.5"]);
        report.tables.push(table);
        report.plots.push(Plot::lines("Loss", "step", "nats").series("<img>", vec![(0.0, 1.0), (1.0, 0.5)]));
        report.notes.push("one & only".into());
        report
    }

    #[test]
    fn everything_from_outside_is_escaped_and_the_page_stands_alone() {
        let page = page("Title & <more>", &[report("a")]).unwrap();
        for forbidden in ["<script", "<img", "<half>", "<more>", "<1>", "src=", "<link", "@import", "url("] {
            assert!(!page.contains(forbidden), "found {forbidden}");
        }
        for expected in ["&lt;script&gt;", "&lt;half&gt;", "one &amp; only", "<svg", "seed 7", "quick scale"]
        {
            assert!(page.contains(expected), "missing {expected}");
        }
        assert_eq!(page.matches("✓ held").count(), 1);
        assert_eq!(page.matches("✗ not held").count(), 1);
        for tag in ["table", "section", "figure", "tr", "svg", "div", "ul"] {
            let opened =
                page.matches(&format!("<{tag}>")).count() + page.matches(&format!("<{tag} ")).count();
            assert_eq!(opened, page.matches(&format!("</{tag}>")).count(), "<{tag}>");
        }
    }

    #[test]
    fn several_reports_get_contents_that_link_to_each() {
        let page = page("Tour", &[report("first"), report("second")]).unwrap();
        for slug in ["first", "second"] {
            assert!(page.contains(&format!("href=\"#{slug}\"")) && page.contains(&format!("id=\"{slug}\"")));
        }
        assert!(page.contains("2 of 4 claims held in 2 systems"));
    }

    #[test]
    fn the_plots_colours_that_dark_mode_replaces_occur_in_the_plots() {
        let svg = report("a").plots[0].to_svg().unwrap();
        let replaced: Vec<&str> = STYLE
            .split("=\"#")
            .skip(1)
            .filter_map(|rest| rest.split_once('"'))
            .map(|(colour, _)| colour)
            .collect();
        assert!(replaced.len() >= 4);
        for colour in replaced {
            assert!(svg.contains(colour), "{colour}");
        }
    }
}
