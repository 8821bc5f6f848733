//! The reference experiment: planted motifs, benchmark graphs, silenced neurons, and real worms where they are at hand.

use std::time::Instant;

use kiln_core::{Card, Claim, Context, Plot, Report, Result, Scale, Table, Threshold};
use rayon::prelude::*;

use crate::affinity::AffinityConfig;
use crate::atlas::{Atlas, AtlasConfig, Motif, smoothed};
use crate::baselines::{kmeans, louvain};
use crate::blockmodel::BlockModelConfig;
use crate::generate::{CoupledConfig, LfrConfig, PlantedMotif, SimulateConfig};
use crate::ntf::NtfConfig;
use crate::score::{assign, correlation, nmi, rank_correlation};
use crate::silence::effects;
use crate::traces::{AlignConfig, Events, Recording, Traces, align, read_recordings};

/// Width of the filter for planted motifs, in frames.
const SIGMA: f64 = 1.5;
/// Time factors are compared after smoothing over so many frames.
const SMOOTH: f64 = 8.0;

/// Everything that differs between scales.
struct Plan {
    seeds: u64,
    /// Cells (μ_t, μ_w, β) of the benchmark.
    cells: Vec<(f64, f64, f64)>,
    graphs: u64,
    silenced: usize,
    worms: bool,
}

impl Plan {
    fn at(scale: Scale) -> Self {
        let each = [0.25, 0.5, 0.75];
        let cells = each
            .into_iter()
            .flat_map(|t| each.map(|w| (t, w)))
            .flat_map(|(t, w)| [0.5, 1.0, 2.0].map(|b| (t, w, b)));
        let few = vec![(0.25, 0.25, 1.0), (0.5, 0.25, 1.0), (0.5, 0.5, 1.0)];
        match scale {
            Scale::Smoke => Self { seeds: 1, cells: few[..1].to_vec(), graphs: 1, silenced: 3, worms: false },
            Scale::Quick => Self { seeds: 1, cells: few, graphs: 1, silenced: 12, worms: false },
            Scale::Full => Self { seeds: 3, cells: cells.collect(), graphs: 10, silenced: 36, worms: true },
        }
    }
}

pub(crate) fn run(card: Card, scale: Scale, cx: &Context) -> Result<Report> {
    let begun = Instant::now();
    let plan = Plan::at(scale);
    let mut report = Report::new(card, scale, cx.seed);
    report_planted(&mut report, &plan, cx)?;
    report_graphs(&mut report, &plan, cx)?;
    report_silencing(&mut report, &plan, cx)?;
    if plan.worms {
        report_worms(&mut report, cx)?;
    }
    report.seconds = begun.elapsed().as_secs_f64();
    Ok(report)
}

fn on_one_clock(recordings: &[Recording]) -> Result<Traces> {
    align(recordings, &Events::default(), AlignConfig::default())
}

/// What was recovered of one simulation, one entry a planted motif.
struct Recovery {
    time: Vec<f64>,
    animals: Vec<f64>,
    communities: Vec<f64>,
    baseline: Vec<f64>,
}

/// Part 1: are planted motifs found, with their times, animals and communities?
fn report_planted(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let mut table = Table::new(
        "Planted motifs: 6 animals, 36 neurons, 240 frames",
        &["seed", "motif", "time, r", "animals, r", "communities, NMI", "correlation and k-means, NMI"],
    );
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (mut times, mut communities, mut gains) = (Vec::new(), Vec::new(), Vec::new());
    for seed in 0..plan.seeds {
        let cx = &Context { seed: cx.seed + seed, ..cx.clone() };
        let planted = SimulateConfig::reference().draw(&mut cx.rng("planted", 0))?;
        let traces = on_one_clock(&planted.recordings)?;
        let config = AtlasConfig {
            affinity: AffinityConfig::new().with_sigma(SIGMA),
            ntf: NtfConfig::new(3).with_inits(4).with_sweeps(200),
            ..AtlasConfig::new(3)
        };
        let atlas = Atlas::build(traces, config, cx)?;
        if seed == 0 {
            report.plots.push(time_plot(&atlas, &planted.motifs));
        }
        let found = recovery(&atlas, &planted.motifs, cx);
        for motif in 0..planted.motifs.len() {
            let figures = [&found.time, &found.animals, &found.communities, &found.baseline];
            let cells = figures.map(|figure| format!("{:.3}", figure[motif]));
            table.row([(cx.seed).to_string(), (motif + 1).to_string()].into_iter().chain(cells));
        }
        times.push(mean(&found.time));
        communities.push(mean(&found.communities));
        gains.push(mean(&found.communities) - mean(&found.baseline));
    }
    report.tables.push(table);
    report.claims.extend([
        Claim::new(
            "Motifs are found at the times at which they were planted",
            "motifs with distinct time courses",
            median(&mut times),
            "correlation of time factors with the planted windows, mean of motifs, median of seeds",
            Threshold::AtLeast(0.7),
        ),
        Claim::new(
            "with their communities",
            "communities of each motif",
            median(&mut communities),
            "NMI, mean of motifs, median of seeds",
            Threshold::AtLeast(0.8),
        ),
        Claim::new(
            "which a static analysis does not see",
            "static correlation mixes motifs",
            median(&mut gains),
            "NMI above time-averaged correlation with k-means",
            Threshold::AtLeast(0.3),
        ),
    ]);
    Ok(())
}

fn window(motif: &PlantedMotif, frames: usize) -> Vec<f64> {
    (0..frames).map(|t| f64::from(u8::from((motif.start..motif.end).contains(&t)))).collect()
}

fn recovery(atlas: &Atlas, planted: &[PlantedMotif], cx: &Context) -> Recovery {
    let traces = &atlas.traces;
    let courses: Vec<Vec<f64>> = atlas.motifs.iter().map(|motif| smoothed(&motif.time, SMOOTH)).collect();
    let likeness: Vec<Vec<f64>> = (planted.iter())
        .map(|motif| {
            courses.iter().map(|course| correlation(course, &window(motif, traces.frames))).collect()
        })
        .collect();
    let matched = assign(&likeness);
    let pairs = || planted.iter().zip(&matched).map(|(truth, &r)| (truth, &atlas.motifs[r]));
    let carried = |truth: &PlantedMotif| -> Vec<f64> {
        (0..traces.animals.len()).map(|w| f64::from(u8::from(truth.animals.contains(&w)))).collect()
    };
    let still = static_communities(traces, cx);
    Recovery {
        time: matched.iter().enumerate().map(|(m, &r)| likeness[m][r]).collect(),
        animals: pairs().map(|(truth, motif)| correlation(&motif.animals, &carried(truth))).collect(),
        communities: pairs().map(|(truth, motif)| nmi(&truth.groups, &with_rest(motif))).collect(),
        baseline: planted.iter().map(|truth| nmi(&truth.groups, &still)).collect(),
    }
}

/// Communities, with the neurons that have none as one more.
fn with_rest(motif: &Motif) -> Vec<usize> {
    let rest = motif.community_count();
    motif.communities.iter().map(|community| community.unwrap_or(rest)).collect()
}

/// The baseline: correlations over all the time, averaged over animals, and k-means on their rows.
fn static_communities(traces: &Traces, cx: &Context) -> Vec<usize> {
    let n = traces.neurons.len();
    let mut rows = vec![vec![0.0; n]; n];
    for animal in &traces.animals {
        for (a, &i) in animal.neurons.iter().enumerate() {
            for (b, &j) in animal.neurons.iter().enumerate() {
                rows[i][j] += correlation(&animal.traces[a], &animal.traces[b]);
            }
        }
    }
    kmeans(&rows, 3, 10, &mut cx.rng("k-means", 0))
}

fn time_plot(atlas: &Atlas, planted: &[PlantedMotif]) -> Plot {
    let mut plot = Plot::lines("Time factors of planted motifs, smoothed", "frame", "part of the largest");
    for (r, motif) in atlas.motifs.iter().enumerate() {
        let course = smoothed(&motif.time, SMOOTH);
        let most = course.iter().copied().fold(1e-300, f64::max);
        let points = course.iter().enumerate().map(|(t, value)| (t as f64, value / most)).collect();
        plot = plot.series(format!("motif {}", r + 1), points);
    }
    for (m, motif) in planted.iter().enumerate() {
        let (start, end, height) = (motif.start as f64, motif.end as f64, 1.05 + 0.05 * m as f64);
        plot = plot.series(format!("window {}", m + 1), vec![(start, height), (end, height)]);
    }
    plot
}

/// Part 2: the block model against Louvain's method on benchmark graphs.
fn report_graphs(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let mut table = Table::new(
        "Weighted benchmark graphs, 125 nodes: mean NMI with the planted communities",
        &["mixing of edges", "of weights", "exponent of weights", "graphs", "block model", "Louvain"],
    );
    let (mut easy, mut model_total, mut louvain_total, mut clear) = (Vec::new(), 0.0, 0.0, 0);
    let bar = cx.progress(plan.cells.len() as u64 * plan.graphs, "benchmark graphs");
    for (cell, &(mixing, weight_mixing, exponent)) in plan.cells.iter().enumerate() {
        let scores = (0..plan.graphs).into_par_iter().map(|graph| -> Result<(f64, f64)> {
            let mut rng = cx.rng("lfr", 1000 * cell as u64 + graph);
            let drawn = LfrConfig::table(mixing, weight_mixing, exponent).draw(&mut rng)?;
            let (connected, kept) = drawn.graph.without_isolated();
            let truth: Vec<usize> = kept.iter().map(|&i| drawn.groups[i]).collect();
            let found = BlockModelConfig::default().infer(&connected, cx)?;
            bar.inc(1);
            Ok((nmi(&truth, &found.best.groups), nmi(&truth, &louvain(&connected, &mut rng))))
        });
        let scores = scores.collect::<Result<Vec<_>>>()?;
        let mean = |of: fn(&(f64, f64)) -> f64| scores.iter().map(of).sum::<f64>() / scores.len() as f64;
        let (model, peer) = (mean(|s| s.0), mean(|s| s.1));
        table.row([
            mixing.to_string(),
            weight_mixing.to_string(),
            exponent.to_string(),
            scores.len().to_string(),
            format!("{model:.3}"),
            format!("{peer:.3}"),
        ]);
        if weight_mixing <= 0.5 {
            (model_total, louvain_total, clear) = (model_total + model, louvain_total + peer, clear + 1);
        }
        if mixing == 0.25 && weight_mixing == 0.25 {
            easy.push(model);
        }
    }
    report.tables.push(table);
    report.claims.extend([
        Claim::new(
            "The block model finds communities as well as Louvain's method where weights are clear (μ_w ≤ 0.5)",
            "better than modularity in most cells of the table",
            (model_total - louvain_total) / f64::from(clear.max(1)),
            "NMI above Louvain, mean of cells",
            Threshold::AtLeast(-0.02),
        ),
        Claim::new(
            "and almost perfectly in easy graphs (μ_t = μ_w = 0.25)",
            "near 1",
            easy.iter().sum::<f64>() / easy.len().max(1) as f64,
            "NMI",
            Threshold::AtLeast(0.9),
        ),
    ]);
    Ok(())
}

/// Part 3: predicted against true effects of silencing, in networks whose neurons drive each other.
fn report_silencing(report: &mut Report, plan: &Plan, cx: &Context) -> Result<()> {
    let network = CoupledConfig { neurons: 36, communities: 3, frames: 400 }.draw(&mut cx.rng("coupled", 0));
    let config = AtlasConfig { ntf: NtfConfig::new(3).with_inits(4).with_sweeps(200), ..AtlasConfig::new(3) };
    let atlas = Atlas::build(on_one_clock(&[network.recording()])?, config, cx)?;
    let traces = &atlas.traces.animals[0].traces;
    let step = network.groups.len().div_ceil(plan.silenced);
    let (mut predicted, mut simple) = (Vec::new(), Vec::new());
    for i in (0..network.groups.len()).step_by(step) {
        let others = |x: &[f64]| -> Vec<f64> { (0..x.len()).filter(|&j| j != i).map(|j| x[j]).collect() };
        let truth = others(&network.effect(i));
        predicted.push(rank_correlation(&truth, &others(&effects(&atlas.motifs, i))));
        let correlations: Vec<f64> = traces.iter().map(|trace| correlation(&traces[i], trace)).collect();
        simple.push(rank_correlation(&truth, &others(&correlations)));
    }
    let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let mut table = Table::new(
        "Who is affected by silencing a neuron: rank correlation with the true effect",
        &["prediction", "silenced neurons", "mean rank correlation"],
    );
    table.row([
        "shared communities of motifs",
        &predicted.len().to_string(),
        &format!("{:.3}", mean(&predicted)),
    ]);
    table.row(["plain correlation of traces", &simple.len().to_string(), &format!("{:.3}", mean(&simple))]);
    report.tables.push(table);
    report.claims.push(Claim::new(
        "Communities predict whom silencing a neuron affects",
        "validated by silencing AWB in the paper",
        mean(&predicted),
        "rank correlation with the simulated effect, mean over silenced neurons",
        Threshold::AtLeast(0.5),
    ));
    Ok(())
}

/// Part 4: six freely moving worms.
fn report_worms(report: &mut Report, cx: &Context) -> Result<()> {
    let Some(folder) = kiln_data::shared_dir().map(|shared| shared.join("data/celegans-calcium")) else {
        report.notes.push("Real worms were left out: their recordings are not on this machine.".into());
        return Ok(());
    };
    let mut recordings =
        read_recordings(&[folder.join("flavell_neuropal.npz"), folder.join("worm_2022-08-02-38.csv")])?;
    let events = Events::read(&folder.join("events_2022-08-02-38.csv"))?;
    if let Some(last) = recordings.last_mut() {
        last.behaviours =
            events.series.iter().map(|series| (series.name.clone(), series.values.clone())).collect();
    }
    let mut table = Table::new(
        "Freely moving worms: the motif closest to reversals",
        &[
            "animals",
            "motif",
            "r with reversals",
            "command neurons in one community",
            "best single neuron, r",
        ],
    );
    let mut together = None;
    let alone: Vec<Vec<Recording>> = recordings.iter().map(|recording| vec![recording.clone()]).collect();
    for group in std::iter::once(recordings).chain(alone) {
        let name = if group.len() == 1 { group[0].animal.clone() } else { format!("all {}", group.len()) };
        let config =
            AtlasConfig { ntf: NtfConfig::new(6).with_inits(3).with_sweeps(200), ..AtlasConfig::new(6) };
        let atlas = Atlas::build(on_one_clock(&group)?, config, cx)?;
        let best = (atlas.motifs.iter().enumerate())
            .map(|(r, motif)| (r, reversal_correlation(&atlas, motif), command_neurons(&atlas, motif)))
            .max_by(|a, b| {
                (!a.2.is_empty(), a.1.abs())
                    .partial_cmp(&(!b.2.is_empty(), b.1.abs()))
                    .unwrap_or(std::cmp::Ordering::Equal)
            });
        let Some((r, correlation, pairs)) = best else { continue };
        table.row([
            name,
            (r + 1).to_string(),
            format!("{correlation:.3}"),
            if pairs.is_empty() { "none".into() } else { pairs.join(", ") },
            best_neuron(&atlas),
        ]);
        if together.is_none() {
            together = Some(if pairs.is_empty() { 0.0 } else { correlation.abs() });
        }
    }
    report.tables.push(table);
    report.claims.push(Claim::new(
        "In worms, a motif with AVAL/AVAR or AVEL/AVER in one community follows reversals",
        "motifs go with behaviour",
        together.unwrap_or(f64::NAN),
        "|r| of its time factor with reversals, weighted by the animals that carry it; 0 where there is no such motif",
        Threshold::AtLeast(0.3),
    ));
    report.notes.push(
        "The worms moved freely and were not stimulated: nothing aligns their reversals, so one time factor for all six can \
         follow them in one animal at most. Each worm alone is shown as well."
            .into(),
    );
    Ok(())
}

fn reversal_correlation(atlas: &Atlas, motif: &Motif) -> f64 {
    let found = atlas.behaviour_correlations(motif).into_iter().find(|(name, _)| name == "reversal");
    found.map_or(0.0, |(_, r)| r)
}

/// The pairs of command neurons for reversals that share a community.
fn command_neurons(atlas: &Atlas, motif: &Motif) -> Vec<String> {
    let community = |name: &str| {
        let place = atlas.traces.neurons.iter().position(|neuron| neuron == name);
        place.and_then(|i| motif.communities[i])
    };
    let pairs = [("AVAL", "AVAR"), ("AVEL", "AVER")];
    let same = pairs.into_iter().filter(|(a, b)| community(a).is_some() && community(a) == community(b));
    same.map(|(a, b)| format!("{a}/{b}")).collect()
}

/// The baseline: the neuron whose trace goes best with reversals, by the mean over animals.
fn best_neuron(atlas: &Atlas) -> String {
    let reversal = |w: usize| {
        atlas.traces.animals[w]
            .behaviours
            .iter()
            .find(|(name, _)| name == "reversal")
            .map(|(_, series)| series)
    };
    let mean = |i: usize| {
        let each = atlas.traces.animals.iter().enumerate().filter_map(|(w, animal)| {
            Some(correlation(&animal.traces[animal.neurons.binary_search(&i).ok()?], reversal(w)?))
        });
        let each: Vec<f64> = each.collect();
        if each.is_empty() { 0.0 } else { each.iter().sum::<f64>() / each.len() as f64 }
    };
    let found =
        (0..atlas.traces.neurons.len()).map(|i| (i, mean(i))).max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    found.map_or(String::new(), |(i, r)| format!("{} {r:.3}", atlas.traces.neurons[i]))
}

fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    match x.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => x[n / 2],
        n => (x[n / 2 - 1] + x[n / 2]) / 2.0,
    }
}
