//! Communities of a graph that the user brings.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, Result, write_atomic};
use kiln_data::{Table, TableOptions};
use serde_json::{Value, json};

use crate::blockmodel::{BlockModelConfig, Correction, Partition, description_length, sample};
use crate::graph::Graph;

#[derive(Debug, Args)]
pub struct CommunitiesArgs {
    /// Edges as CSV: source,target,weight
    #[arg(long)]
    edges: PathBuf,
    /// Whether the degrees of nodes are part of the model
    #[arg(long, value_enum, default_value = "auto")]
    model: Correction,
    /// Describe the edges between communities flat, not nested
    #[arg(long)]
    flat: bool,
    /// Only score this partition: node,label as CSV
    #[arg(long, conflicts_with_all = ["flat", "posterior"])]
    partition: Option<PathBuf>,
    /// Annealed restarts of the search
    #[arg(long, default_value_t = 16)]
    restarts: usize,
    /// Draw so many partitions from the posterior, and add how sure every node is
    #[arg(long, value_name = "SAMPLES")]
    posterior: Option<usize>,
    /// Folder to write: communities.csv and dl.json
    #[arg(long)]
    out: PathBuf,
}

pub fn communities(args: &CommunitiesArgs, cx: &Context) -> Result<()> {
    let graph = Graph::read(&args.edges)?;
    let (connected, kept) = graph.without_isolated();
    if connected.edges().is_empty() {
        return Err(Error::input(args.edges.display(), "every edge has the weight 0")
            .hint("communities need edges with positive weights"));
    }
    if let Some(path) = &args.partition {
        return score(args, path, &connected, cx);
    }
    let config = BlockModelConfig { correction: args.model, nested: !args.flat, restarts: args.restarts };
    let found = config.infer(&connected, cx)?;
    let best = &found.best;
    let posterior = match args.posterior {
        Some(samples) => Some(sample(&connected, &best.groups, best.degree_corrected, samples, cx)?),
        None => None,
    };
    let confidence = posterior.as_ref().map(|posterior| posterior.confidence(&best.groups));
    let table = table(&graph, &kept, best, confidence.as_deref())?;
    let result = json!({
        "nodes": graph.len(),
        "isolated": graph.len() - kept.len(),
        "edges": connected.edges().len(),
        "communities": best.count,
        "description_length_nats": best.description_length,
        "degree_corrected": best.degree_corrected,
        "log_odds_over_other": found.log_odds,
        "levels": best.levels.iter().map(|level| level.iter().max().map_or(0, |m| m + 1)).collect::<Vec<_>>(),
        "posterior": posterior.map(|posterior| {
            json!({ "samples": posterior.samples, "group_counts": trimmed(&posterior.group_counts), "together": posterior.together })
        }),
    });
    write(&args.out, &table, &result)?;
    cx.emit(&result, |_| {
        format!(
            "{} communities of {} nodes, {:.2} nats, {}degree-corrected\n{}\n",
            best.count,
            kept.len(),
            best.description_length,
            if best.degree_corrected { "" } else { "not " },
            args.out.join("communities.csv").display()
        )
    })
}

/// The description lengths of a partition that the user brings.
fn score(args: &CommunitiesArgs, path: &Path, graph: &Graph, cx: &Context) -> Result<()> {
    let groups = labels(path, graph)?;
    let length = |corrected| description_length(graph, &groups, corrected);
    let result = json!({
        "nodes": graph.len(),
        "edges": graph.edges().len(),
        "communities": groups.iter().max().map_or(0, |m| m + 1),
        "description_length_nats": { "dc": length(true)?, "ndc": length(false)? },
    });
    std::fs::create_dir_all(&args.out).map_err(Error::io("create", &args.out))?;
    write_json(&args.out, &result)?;
    cx.emit(&result, |result| {
        let lengths = &result["description_length_nats"];
        format!("{} nats degree-corrected, {} not corrected\n", lengths["dc"], lengths["ndc"])
    })
}

/// The group of every node, by the labels of a table.
fn labels(path: &Path, graph: &Graph) -> Result<Vec<usize>> {
    let table = Table::read(path, TableOptions::default())?;
    let column = |name: &str| table.column(name).ok_or_else(|| table.no_column(name));
    let (nodes, labels) = (column("node")?, column("label")?);
    let mut of_node = BTreeMap::new();
    for row in 0..table.rows() {
        let (Some(node), Some(label)) = (nodes.text(row), labels.text(row)) else {
            return Err(Error::input(format!("{}: row {}", path.display(), row + 1), "a cell is empty")
                .hint("every row is node,label"));
        };
        of_node.insert(node, label);
    }
    let mut numbers: BTreeMap<String, usize> = BTreeMap::new();
    let group = |name: &String| {
        let label = of_node.get(name).ok_or_else(|| {
            Error::input(path.display(), format!("has no label for node \"{name}\" of the graph"))
                .hint("every node with an edge needs one row")
        })?;
        let next = numbers.len();
        Ok(*numbers.entry(label.clone()).or_insert(next))
    };
    graph.nodes().iter().map(group).collect()
}

/// `node,community,level1,…,confidence`; `none` for a node without an edge.
fn table(graph: &Graph, kept: &[usize], best: &Partition, confidence: Option<&[f64]>) -> Result<Vec<u8>> {
    let failed = |e: csv::Error| Error::work("cannot lay out communities.csv").caused_by(e);
    let mut writer = csv::Writer::from_writer(Vec::new());
    let levels = best.levels.len().saturating_sub(1); // the last is one group
    let mut header = vec!["node".to_string(), "community".into()];
    header.extend((1..=levels).map(|level| format!("level{level}")));
    header.extend(confidence.map(|_| "confidence".into()));
    writer.write_record(&header).map_err(failed)?;
    let mut place = vec![None; graph.len()];
    kept.iter().enumerate().for_each(|(new, &old)| place[old] = Some(new));
    for (name, place) in graph.nodes().iter().zip(place) {
        let mut row = vec![name.clone()];
        match place {
            Some(place) => {
                let mut group = best.groups[place];
                row.push((group + 1).to_string());
                for level in &best.levels[..levels] {
                    group = level[group];
                    row.push((group + 1).to_string());
                }
                row.extend(confidence.map(|confidence| format!("{:.4}", confidence[place])));
            }
            None => row.resize(header.len(), "none".into()),
        }
        writer.write_record(&row).map_err(failed)?;
    }
    writer.into_inner().map_err(|e| Error::work(e.to_string()))
}

/// Without the zeros at the end.
fn trimmed(shares: &[f64]) -> &[f64] {
    let end = shares.iter().rposition(|&share| share > 0.0).map_or(0, |last| last + 1);
    &shares[..end]
}

fn write(folder: &Path, table: &[u8], result: &Value) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    write_atomic(&folder.join("communities.csv"), table)?;
    write_json(folder, result)
}

fn write_json(folder: &Path, result: &Value) -> Result<()> {
    let text =
        serde_json::to_vec_pretty(result).map_err(|e| Error::work("cannot write dl.json").caused_by(e))?;
    write_atomic(&folder.join("dl.json"), &text)
}
