//! `kiln launch` and `kiln cluster`: starting ranks, and what their links can do.

use std::path::Path;
use std::process::ExitCode;

use kiln::cluster::{Algorithm, Launch, MEASURED, Operation, Timing, launch, time};
use kiln::core::{Context, Error, Plot, Result, Table, write_atomic};
use serde::Serialize;

use crate::cli::{BenchArgs, ClusterVerb, LaunchArgs, ProbeArgs};

/// Starts the ranks of this machine; the exit code is that of the first that failed.
pub fn start(args: &LaunchArgs, cx: &Context) -> Result<ExitCode> {
    let ranks = args.ranks.unwrap_or(args.first + args.local);
    let what = Launch {
        ranks,
        local: args.first..args.first + args.local,
        rendezvous: args.rendezvous.clone(),
        timeout: args.timeout,
        token: args.cluster_token.clone(),
    };
    launch(&what, &args.command, cx.interrupt_flag()).map(ExitCode::from)
}

pub fn execute(verb: &ClusterVerb, cx: &Context) -> Result<()> {
    match verb {
        ClusterVerb::Probe(args) => probe(args, cx),
        ClusterVerb::Bench(args) => bench(args, cx),
    }
}

#[derive(Serialize)]
struct Pair {
    from: usize,
    to: usize,
    latency_s: f64,
    bandwidth_bytes_per_s: f64,
}

fn probe(args: &ProbeArgs, cx: &Context) -> Result<()> {
    let measured = args.cluster.run(args.ranks, cx, |comm| {
        let pairs = (0..comm.size()).flat_map(|from| (from + 1..comm.size()).map(move |to| (from, to)));
        let links = pairs.map(|(from, to)| {
            let link = comm.probe_pair(from, to)?;
            Ok(Pair { from, to, latency_s: link.latency, bandwidth_bytes_per_s: link.bandwidth })
        });
        Ok((comm.rank() == 0).then_some(links.collect::<Result<Vec<_>>>()?))
    })?;
    let Some(pairs) = measured.into_iter().flatten().next() else { return Ok(()) };
    cx.emit(&pairs, |pairs| {
        let mut table = Table::new("Links", &["ranks", "latency", "bandwidth"]);
        for pair in pairs {
            let ranks = format!("{} – {}", pair.from, pair.to);
            table.row([ranks, micros(pair.latency_s), rate(pair.bandwidth_bytes_per_s)]);
        }
        table.to_text()
    })
}

fn bench(args: &BenchArgs, cx: &Context) -> Result<()> {
    let operation = MEASURED.into_iter().find(|known| known.to_string() == args.op);
    let operation = operation.ok_or_else(|| {
        let known: Vec<String> = MEASURED.iter().map(Operation::to_string).collect();
        Error::usage(format!("`{}` is not measured", args.op)).hint(format!("one of {}", known.join(", ")))
    })?;
    let algorithms: &[Algorithm] =
        if operation == Operation::AllReduce { &args.algorithms } else { &[Algorithm::Auto] };
    let measured = args.cluster.run(args.ranks, cx, |comm| {
        let mut rows = Vec::new();
        for &bytes in &args.bytes {
            for &algorithm in algorithms {
                if cx.interrupted() {
                    return Err(Error::interrupted("stopped before all was measured"));
                }
                rows.push(time(&comm, operation, algorithm, bytes)?);
            }
        }
        Ok((comm.rank() == 0).then_some(rows))
    })?;
    let Some(rows) = measured.into_iter().flatten().next() else { return Ok(()) };
    if let Some(path) = &args.csv {
        write_csv(path, &rows)?;
    }
    if let Some(path) = &args.plot {
        plot(&rows, algorithms).save(path)?;
    }
    cx.emit(&rows, |rows| {
        let columns = ["algorithm", "bytes", "time", "algorithm bandwidth", "bus bandwidth"];
        let mut table = Table::new(format!("{operation} on {} ranks", args.ranks), &columns);
        for row in rows {
            let bandwidths = [rate(row.algorithm_bandwidth), rate(row.bus_bandwidth)];
            let [algorithm, bus] = bandwidths;
            table.row([row.algorithm.clone(), row.bytes.to_string(), micros(row.seconds), algorithm, bus]);
        }
        table.to_text()
    })
}

fn write_csv(path: &Path, rows: &[Timing]) -> Result<()> {
    let mut text =
        String::from("operation,algorithm,ranks,bytes,seconds,algorithm_bandwidth,bus_bandwidth\n");
    for row in rows {
        let Timing { operation, algorithm, ranks, bytes, seconds, algorithm_bandwidth, bus_bandwidth } = row;
        text += &format!(
            "{operation},{algorithm},{ranks},{bytes},{seconds:e},{algorithm_bandwidth:e},{bus_bandwidth:e}\n"
        );
    }
    write_atomic(path, text.as_bytes())
}

/// Time over bytes, a line an algorithm.
fn plot(rows: &[Timing], algorithms: &[Algorithm]) -> Plot {
    let title = rows.first().map_or(String::new(), |row| format!("{} on {} ranks", row.operation, row.ranks));
    algorithms.iter().map(Algorithm::to_string).fold(
        Plot::lines(title, "bytes", "microseconds").log_x().log_y(),
        |plot, algorithm| {
            let of = rows.iter().filter(|row| row.algorithm == algorithm);
            let points = of.map(|row| (row.bytes.max(1) as f64, 1e6 * row.seconds)).collect();
            plot.series(algorithm, points)
        },
    )
}

fn micros(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{:.1} µs", 1e6 * s),
        s => format!("{:.2} ms", 1e3 * s),
    }
}

fn rate(bytes_per_second: f64) -> String {
    match bytes_per_second {
        rate if rate < 1e9 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.2} GB/s", rate / 1e9),
    }
}
