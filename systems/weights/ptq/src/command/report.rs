//! What quantising did to each layer, as text, table, JSON and page.

use std::path::Path;

use kiln_core::{
    Card, Context, Error, ModelFolder, Plot, Report, Result, Scale, System, Table, html, write_atomic,
};

use super::write_json;
use crate::Ptq;
use crate::layers::{EXACT, Layer, Layers};

/// Units named as the most costly.
const NAMED: usize = 3;

/// Columns of the table.
const COLUMNS: [&str; 10] = [
    "unit",
    "bits of weights",
    "bits of input",
    "weights, dB",
    "rounding of input, dB",
    "input cut off",
    "what it reads, dB",
    "largest difference",
    "loss when it alone is quantised",
    "loss gained at 16 bits",
];

fn cells(layer: &Layer) -> [String; 10] {
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
    let decibels = |x: Option<f64>| or_dash(x.map(|x| format!("{x:.1}")));
    let change = |x: Option<f64>| or_dash(x.map(|x| format!("{x:+.5}")));
    [
        layer.unit.clone(),
        layer.bits.weight.to_string(),
        layer.bits.input.to_string(),
        decibels(layer.weights_db),
        decibels(layer.rounding_db),
        or_dash(layer.clipped.map(|share| format!("{:.3} %", 100.0 * share))),
        decibels(Some(layer.reads_db)),
        format!("{:.3e}", layer.reads_max),
        change(layer.alone),
        change(layer.restored),
    ]
}

/// The table for a terminal, and what it comes to.
pub(super) fn text(layers: &Layers) -> String {
    let mut text = String::from(
        "                bits             signal over noise, dB        input    largest    loss,      loss gained\n\
         unit            weight  input    weights  rounding  reads    cut off  difference alone      at 16 bits\n",
    );
    for layer in &layers.layers {
        let [unit, weight, input, weights, rounding, clipped, reads, most, alone, restored] = cells(layer);
        text += &format!(
            "{unit:<15} {weight:<7} {input:<8} {weights:<8} {rounding:<9} {reads:<8} {clipped:<8} {most:<10} {alone:<10} {restored}\n"
        );
    }
    text += &format!("logits: {:.1} dB, differ by {:.3e} at most", layers.output_db, layers.output_max);
    if let Some([before, after]) = layers.loss {
        text += &format!("; loss {after:.4}, as it was {before:.4}");
    }
    text + &format!(", on {} examples\n", layers.examples) + &worst_of(layers)
}

fn worst_of(layers: &Layers) -> String {
    let named: Vec<Layer> = layers.worst(NAMED).into_iter().cloned().collect();
    worst(&named)
}

/// The units that cost the most, in one line; nothing where none does.
pub(super) fn worst(layers: &[Layer]) -> String {
    let named: Vec<String> = layers
        .iter()
        .map(|layer| format!("{} ({:+.5})", layer.unit, -layer.restored.unwrap_or(0.0)))
        .collect();
    match named.is_empty() {
        true => String::new(),
        false => format!("the loss would fall most with 16 bits for {}\n", named.join(", ")),
    }
}

/// Writes `layers.csv`, `layers.json`, `report.html` and the plots of it into a folder; `before` are plots that come first.
pub(super) fn write(
    out: &Path,
    layers: &Layers,
    before: Vec<Plot>,
    seconds: f64,
    cx: &Context,
) -> Result<()> {
    let folder = ModelFolder::new(out);
    folder.create()?;
    write_json(&folder.file("layers.json"), layers)?;
    let failed = |e: csv::Error| Error::work("cannot lay out the table of layers").caused_by(e);
    let mut table = csv::Writer::from_writer(Vec::new());
    table
        .write_record([
            "unit",
            "weight_bits",
            "input_bits",
            "weights_db",
            "rounding_db",
            "clipped",
            "reads_db",
            "reads_max",
            "alone",
            "restored",
        ])
        .map_err(failed)?;
    let number = |x: Option<f64>| x.map_or(String::new(), |x| x.to_string());
    for layer in &layers.layers {
        table
            .write_record([
                layer.unit.clone(),
                layer.bits.weight.to_string(),
                layer.bits.input.to_string(),
                number(layer.weights_db),
                number(layer.rounding_db),
                number(layer.clipped),
                number(Some(layer.reads_db)),
                number(Some(layer.reads_max)),
                number(layer.alone),
                number(layer.restored),
            ])
            .map_err(failed)?;
    }
    let bytes =
        table.into_inner().map_err(|e| Error::work(format!("cannot lay out the table of layers: {e}")))?;
    write_atomic(&folder.file("layers.csv"), &bytes)?;

    let drawn = plots(layers);
    for plot in &drawn {
        plot.save(&folder.file(&format!("{}.svg", plot.file_stem())))?;
    }
    let card = Card { title: "A quantised network, layer by layer", ..Ptq.card() };
    let mut report = Report::new(card, Scale::Full, cx.seed);
    report.seconds = seconds;
    report.plots = before.into_iter().chain(drawn).collect();
    let mut listing = Table::new("Layers", &COLUMNS);
    for layer in &layers.layers {
        listing.row(cells(layer));
    }
    report.tables.push(listing);
    report.notes.push(format!(
        "On {} examples the logits have {:.1} dB of signal over noise.",
        layers.examples, layers.output_db
    ));
    if let Some([before, after]) = layers.loss {
        report.notes.push(format!("The loss is {after:.4} instead of {before:.4}."));
    }
    let worst = worst_of(layers);
    if !worst.is_empty() {
        report.notes.push(format!("The {}.", worst.trim_start_matches("the ").trim_end()));
    }
    let page = html::page("A quantised network, layer by layer", &[report])?;
    write_atomic(&folder.file("report.html"), page.as_bytes())
}

/// Noise along the network, and what each unit costs.
fn plots(layers: &Layers) -> Vec<Plot> {
    let line = |value: fn(&Layer) -> Option<f64>| -> Vec<(f64, f64)> {
        let points = layers.layers.iter().enumerate();
        points.filter_map(|(at, layer)| Some((at as f64, value(layer)?))).collect()
    };
    let mut plots = vec![
        Plot::lines("Signal over noise along the network", "unit", "dB")
            // What is still exact has no place on this axis.
            .series("what a unit reads", line(|layer| Some(layer.reads_db).filter(|&db| db < EXACT)))
            .series("its weights", line(|layer| layer.weights_db))
            .series("rounding of its input", line(|layer| layer.rounding_db)),
    ];
    if layers.loss.is_some() {
        let names = layers.layers.iter().map(|layer| layer.unit.clone());
        let values = |value: fn(&Layer) -> Option<f64>| -> Vec<f64> {
            layers.layers.iter().map(|layer| value(layer).unwrap_or(0.0)).collect()
        };
        let series = [
            ("it alone quantised", values(|layer| layer.alone)),
            ("it alone at 16 bits, gained", values(|layer| layer.restored)),
        ];
        plots.push(Plot::bars("What each unit costs", "loss", names, series));
    }
    let clipped = layers.layers.iter().map(|layer| 100.0 * layer.clipped.unwrap_or(0.0)).collect();
    let names = layers.layers.iter().map(|layer| layer.unit.clone());
    plots.push(Plot::bars("Share of inputs that is cut off", "%", names, [("", clipped)]));
    plots
}
