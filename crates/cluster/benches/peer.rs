//! All-reduces of threads and of ranks over TCP; `cargo xtask bench cluster` sets them beside gloo's and Open MPI's of
//! the same sizes, which `peer.py` measures.
//!
//! Prints one JSON object a line, `{"name", "unit", "value"}`; every value is the median over many calls of the slowest
//! rank's time. `KILN_BENCH_ONLY=substring` runs only the figures whose name contains it.

use kiln_cluster::{Algorithm, ClusterArgs, Operation, Timing, run_over_loopback, run_threads, time};

const SIZES: [(&str, usize); 3] = [("1 KiB", 1 << 10), ("1 MiB", 1 << 20), ("64 MiB", 64 << 20)];

/// Seconds of every size; links are measured first, as `Auto` wants.
fn threads(ranks: usize) -> Vec<Timing> {
    let timed = run_threads(ranks, |comm| {
        SIZES
            .into_iter()
            .map(|(_, bytes)| time(&comm, Operation::AllReduce, Algorithm::Auto, bytes))
            .collect()
    });
    timed.expect("threads do not fail").swap_remove(0)
}

fn tcp(ranks: usize, algorithm: Algorithm) -> Vec<Timing> {
    let timed = run_over_loopback(ranks, &ClusterArgs::default(), |comm| {
        comm.probe()?;
        SIZES.into_iter().map(|(_, bytes)| time(&comm, Operation::AllReduce, algorithm, bytes)).collect()
    });
    timed.expect("the loopback does not fail").swap_remove(0)
}

fn main() {
    let only = std::env::var("KILN_BENCH_ONLY").unwrap_or_default();
    for ranks in [2, 4] {
        for (side, timings) in [
            ("threads", threads(ranks)),
            ("tcp", tcp(ranks, Algorithm::Auto)),
            ("tcp, ring", tcp(ranks, Algorithm::Ring)),
        ] {
            for ((size, _), timing) in SIZES.into_iter().zip(timings) {
                for peer in ["gloo", "Open MPI"] {
                    let name = format!("{side} / {peer}: {ranks} ranks, {size}");
                    if name.contains(&only) {
                        let value = 1e6 * timing.seconds;
                        println!("{}", serde_json::json!({ "name": name, "unit": "us", "value": value }));
                    }
                }
            }
        }
    }
}
