//! What must hold whatever the data.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_connectome::affinity::AffinityConfig;
use kiln_connectome::blockmodel::{BlockModelConfig, State, description_length, sample};
use kiln_connectome::entries::Entries;
use kiln_connectome::generate::SimulateConfig;
use kiln_connectome::graph::Graph;
use kiln_connectome::ntf::{Factors, Loss, NtfConfig, Solver, rank::factor_match};
use kiln_connectome::tensor::{AffinityTensor, Layout, pair_index};
use kiln_connectome::traces::{AlignConfig, Events, Traces, align, read_recordings};
use kiln_core::{Context, StreamedTensor, random_stream};
use kiln_data::Matrix;
use rand::RngExt;
use rand::seq::SliceRandom;

fn simulated(neurons: usize) -> Traces {
    let config = SimulateConfig { neurons, frames: 80, animals: 3, ..SimulateConfig::reference() };
    let planted = config.draw(&mut random_stream(1, "test", 0)).unwrap();
    align(&planted.recordings, &Events::default(), AlignConfig::default()).unwrap()
}

fn entries<E>(tensor: &AffinityTensor<E>) -> &[E] {
    match &tensor.entries {
        Entries::Memory(values) => values,
        Entries::File { .. } => unreachable!("it was computed in memory"),
    }
}

fn entries_mut<E>(tensor: &mut AffinityTensor<E>) -> &mut [E] {
    match &mut tensor.entries {
        Entries::Memory(values) => values,
        Entries::File { .. } => unreachable!("it was computed in memory"),
    }
}

/// A sum of `rank` random rank-one tensors, each of which is in every animal.
fn exact([frames, animals, pairs]: [usize; 3], rank: usize) -> (AffinityTensor<f64>, Factors) {
    let mut rng = random_stream(3, "exact", 0);
    // Half zeros over time and pairs, so that components differ.
    let mut matrix = |rows: usize, zeros: f64| {
        let values =
            (0..rows * rank).map(|_| if rng.random_bool(zeros) { 0.0 } else { rng.random_range(0.2..1.0) });
        Matrix::new(rows, rank, values.collect())
    };
    let (time, animals_factor, pairs_factor) =
        (matrix(frames, 0.5), matrix(animals, 0.0), matrix(pairs, 0.5));
    let factors = Factors { time, animals: animals_factor, pairs: pairs_factor, weights: vec![1.0; rank] };
    let values = (0..frames * animals * pairs)
        .map(|at| factors.at(at / (animals * pairs), at / pairs % animals, at % pairs));
    let tensor = AffinityTensor::new([frames, animals, pairs], values.collect(), None);
    (tensor, factors.normalised())
}

#[test]
fn affinities_do_not_see_scales_and_offsets() {
    let traces = simulated(12);
    let config = AffinityConfig::new();
    let plain = config.compute(&traces).unwrap();
    let mut scaled = traces.clone();
    for (a, animal) in scaled.animals.iter_mut().enumerate() {
        for (i, trace) in animal.traces.iter_mut().enumerate() {
            trace.iter_mut().for_each(|x| *x = *x * (1.0 + i as f64) + 3.0 * a as f64 - 5.0);
        }
    }
    let other = config.compute(&scaled).unwrap();
    assert!(entries(&plain).iter().zip(entries(&other)).all(|(a, b)| (a - b).abs() < 1e-5));
    assert!(
        entries(&plain).iter().all(|a| (0.0..=1.0).contains(a)) && entries(&plain).iter().any(|a| *a > 0.5)
    );
}

#[test]
fn time_reversed_traces_have_the_reversed_tensor() {
    let traces = simulated(9);
    let mut reversed = traces.clone();
    reversed.animals.iter_mut().flat_map(|animal| &mut animal.traces).for_each(|trace| trace.reverse());
    let config = AffinityConfig::new();
    let (a, b) = (config.compute(&traces).unwrap(), config.compute(&reversed).unwrap());
    let row = a.animals * a.pairs;
    for (forward, backward) in entries(&a).chunks(row).zip(entries(&b).chunks(row).rev()) {
        assert!(forward.iter().zip(backward).all(|(x, y)| (x - y).abs() < 1e-5));
    }
}

#[test]
fn permuted_neurons_have_the_permuted_tensor() {
    let traces = simulated(10);
    let n = traces.neurons.len();
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(&mut random_stream(0, "permute", 0));
    let mut permuted = traces.clone();
    for (animal, original) in permuted.animals.iter_mut().zip(&traces.animals) {
        animal.traces = order.iter().map(|&i| original.traces[i].clone()).collect();
    }
    let config = AffinityConfig::new();
    let (a, b) = (config.compute(&traces).unwrap(), config.compute(&permuted).unwrap());
    for i in 0..n {
        for j in i + 1..n {
            let there = pair_index(order[i].min(order[j]), order[i].max(order[j]), n);
            for row in 0..a.frames * a.animals {
                assert_eq!(
                    entries(&a)[row * a.pairs + there],
                    entries(&b)[row * a.pairs + pair_index(i, j, n)]
                );
            }
        }
    }
}

#[test]
fn the_error_never_grows_from_sweep_to_sweep() {
    let tensor = AffinityConfig::new().compute(&simulated(10)).unwrap();
    for (solver, loss) in [
        (Solver::Hals, Loss::Squared),
        (Solver::Mu, Loss::Squared),
        (Solver::Mu, Loss::Poisson),
        (Solver::Direct, Loss::Squared),
        (Solver::Direct, Loss::Poisson),
    ] {
        let config = NtfConfig::new(4).with_inits(1).with_sweeps(60).with_solver(solver).with_loss(loss);
        let fit = config.fit(&tensor, &Context::for_tests("")).unwrap();
        assert!(fit.errors.windows(2).all(|pair| pair[1] <= pair[0] + 1e-9), "{solver:?}: {:?}", fit.errors);
        let exact = fit.factors.relative_error(&tensor).unwrap();
        assert!((exact - fit.relative_error).abs() < 1e-9, "{exact} {}", fit.relative_error);
    }
}

#[test]
fn tied_factors_recover_neurons_that_act_in_pairs() {
    let (frames, animals, neurons, rank) = (30, 4, 9, 2);
    let mut rng = random_stream(7, "tied", 0);
    let mut matrix = |rows: usize, zeros: f64| {
        let values =
            (0..rows * rank).map(|_| if rng.random_bool(zeros) { 0.0 } else { rng.random_range(0.2..1.0) });
        Matrix::new(rows, rank, values.collect())
    };
    let (time, of_animals, of_neurons) = (matrix(frames, 0.5), matrix(animals, 0.0), matrix(neurons, 0.3));
    let places = (0..neurons).flat_map(|i| (i + 1..neurons).map(move |j| (i, j)));
    let product = |(i, j)| of_neurons.row(i).iter().zip(of_neurons.row(j)).map(|(a, b)| a * b);
    let pairs = Matrix::new(36, rank, places.flat_map(product).collect());
    let truth = Factors { time, animals: of_animals, pairs, weights: vec![1.0; rank] }.normalised();
    let entry = |at: usize| truth.at(at / (animals * 36), at / 36 % animals, at % 36);
    let values = (0..frames * animals * 36).map(entry).collect();
    let tensor = AffinityTensor::new([frames, animals, 36], values, None);
    let config = NtfConfig {
        solver: Solver::Direct,
        tied: true,
        tolerance: 1e-9,
        ..NtfConfig::new(rank).with_inits(4).with_sweeps(2000)
    };
    let fit = config.fit(&tensor, &Context::for_tests("")).unwrap();
    let likeness = factor_match(&fit.factors, &truth);
    assert!(likeness > 0.999, "{likeness}, error {}", fit.relative_error);
    let loose = NtfConfig { solver: Solver::Hals, ..config };
    assert!(loose.fit(&tensor, &Context::for_tests("")).unwrap_err().to_string().contains("--solver direct"));
}

#[test]
fn a_solver_that_does_not_know_a_loss_says_which_does() {
    let (tensor, _) = exact([20, 4, 28], 2);
    for (solver, loss) in [(Solver::Hals, Loss::Poisson), (Solver::Mu, Loss::Gamma)] {
        let config = NtfConfig::new(2).with_solver(solver).with_loss(loss);
        let error = config.fit(&tensor, &Context::for_tests("")).unwrap_err();
        assert!(error.hint_text().unwrap().contains("direct all"), "{error}");
    }
}

#[test]
fn an_exact_tensor_is_recovered() {
    let (tensor, factors) = exact([30, 5, 45], 3);
    let config = NtfConfig { tolerance: 1e-9, ..NtfConfig::new(3).with_inits(6).with_sweeps(2000) };
    let fit = config.fit(&tensor, &Context::for_tests("")).unwrap();
    let likeness = factor_match(&fit.factors, &factors);
    assert!(likeness > 0.999, "{likeness}, error {}", fit.relative_error);
}

#[test]
fn missing_pairs_do_not_hinder_the_recovery_of_an_exact_tensor() {
    let (mut tensor, factors) = exact([30, 5, 45], 3);
    let mut rng = random_stream(5, "mask", 0);
    let mask: Vec<bool> = (0..5 * 45).map(|_| rng.random_bool(0.85)).collect();
    for (at, value) in entries_mut(&mut tensor).iter_mut().enumerate() {
        if !mask[at % (5 * 45)] {
            *value = 0.0;
        }
    }
    tensor.mask = Some(mask);
    for solver in [Solver::Hals, Solver::Direct] {
        let config =
            NtfConfig { solver, tolerance: 1e-9, ..NtfConfig::new(3).with_inits(6).with_sweeps(3000) };
        let fit = config.fit(&tensor, &Context::for_tests("")).unwrap();
        let likeness = factor_match(&fit.factors, &factors);
        assert!(likeness > 0.99, "{solver:?}: {likeness}, error {}", fit.relative_error);
    }
}

/// Read a few frames at a time, the last stretch shorter than the others.
#[test]
fn a_tensor_in_a_file_has_the_factors_of_one_in_memory() {
    let mut traces = simulated(12);
    traces.animals[1].neurons.remove(3);
    traces.animals[1].traces.remove(3);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    AffinityConfig::new().write(&traces, Layout::Pairs, &path, &|_| Ok(())).unwrap();
    let whole = AffinityConfig::new().compute(&traces).unwrap();
    let mut file = AffinityTensor::open(&path, None).unwrap();
    let tensor = StreamedTensor::open(&path, "tensor").unwrap();
    file.entries = Entries::File { tensor: tensor.into(), at_once: 7 * whole.animals * whole.pairs };
    assert_eq!(file.mask, whole.mask);
    for (solver, loss) in
        [(Solver::Hals, Loss::Squared), (Solver::Mu, Loss::Poisson), (Solver::Direct, Loss::Squared)]
    {
        let config = NtfConfig::new(2).with_inits(1).with_sweeps(8).with_solver(solver).with_loss(loss);
        let cx = Context::for_tests("");
        let (a, b) = (config.fit(&whole, &cx).unwrap(), config.fit(&file, &cx).unwrap());
        assert!((a.relative_error - b.relative_error).abs() < 1e-9, "{solver:?}");
        for (a, b) in a.factors.modes().into_iter().zip(b.factors.modes()) {
            assert!(a.values.iter().zip(&b.values).all(|(a, b)| (a - b).abs() < 1e-6), "{solver:?}");
        }
    }
}

#[test]
fn all_solvers_come_to_the_same_error() {
    let (mut tensor, _) = exact([20, 4, 28], 2);
    let mut rng = random_stream(6, "noise", 0);
    entries_mut(&mut tensor).iter_mut().for_each(|x| *x += 0.1 * rng.random::<f64>());
    let last = |solver, loss| {
        let config = NtfConfig {
            tolerance: 1e-8,
            ..NtfConfig::new(2).with_inits(4).with_sweeps(4000).with_solver(solver).with_loss(loss)
        };
        config.fit(&tensor, &Context::for_tests("")).unwrap().last()
    };
    let hals = last(Solver::Hals, Loss::Squared);
    for solver in [Solver::Mu, Solver::Direct] {
        let other = last(solver, Loss::Squared);
        assert!((hals - other).abs() < 0.01 * hals, "{solver:?}: {hals} {other}");
    }
    let [mu, direct] = [Solver::Mu, Solver::Direct].map(|solver| last(solver, Loss::Poisson));
    assert!((mu - direct).abs() < 1e-3 * mu.abs(), "{mu} {direct}");
}

#[test]
fn a_seeded_fit_repeats() {
    let tensor = AffinityConfig::new().compute(&simulated(10)).unwrap();
    let fit =
        || NtfConfig::new(3).with_inits(2).with_sweeps(10).fit(&tensor, &Context::for_tests("")).unwrap();
    assert_eq!(fit().factors, fit().factors);
}

/// Three groups of weighted edges.
fn planted_graph(nodes: usize, seed: u64) -> Graph {
    let mut rng = random_stream(seed, "graph", 0);
    let mut edges = Vec::new();
    for i in 0..nodes {
        for j in i + 1..nodes {
            let inside = i % 3 == j % 3;
            if rng.random_bool(if inside { 0.6 } else { 0.1 }) || j == i + 1 {
                edges.push((i, j, rng.random_range(0.1..if inside { 3.0 } else { 1.0 })));
            }
        }
    }
    Graph::new((0..nodes).map(|i| i.to_string()).collect(), edges).unwrap()
}

#[test]
fn relabelled_groups_have_the_same_description_length() {
    let graph = planted_graph(30, 0);
    let groups: Vec<usize> = (0..30).map(|i| i % 4).collect();
    let relabelled: Vec<usize> = groups.iter().map(|g| [7, 2, 5, 0][*g]).collect();
    for corrected in [true, false] {
        let (a, b) = (
            description_length(&graph, &groups, corrected),
            description_length(&graph, &relabelled, corrected),
        );
        assert!((a.unwrap() - b.unwrap()).abs() < 1e-9);
    }
}

#[test]
fn a_move_changes_the_description_by_its_delta() {
    let graph = planted_graph(40, 1);
    for (corrected, nested) in [(true, false), (false, false), (true, true), (false, true)] {
        let mut rng = random_stream(2, "moves", u64::from(corrected));
        let start: Vec<usize> = (0..40).map(|i| i % 9).collect();
        let mut state = State::new(&graph, &start, corrected);
        if nested {
            state.set_hierarchy(Some(state.infer_hierarchy()));
        }
        let mut reach = Default::default();
        let (mut begun, mut ended) = (0, 0);
        for _ in 0..1000 {
            let node = rng.random_range(0..40);
            let to = rng.random_range(0..state.count() + 1);
            state.reach(node, &mut reach);
            let before = state.description_length();
            let delta = state.delta(node, to, &reach);
            if delta.is_infinite() {
                assert!(nested);
                continue;
            }
            let count = state.count();
            begun += usize::from(to == count);
            state.apply(node, to, &reach);
            ended += usize::from(state.count() < count);
            let full = state.description_length() - before;
            assert!((full - delta).abs() < 1e-9 * before.abs(), "{full} {delta}");
        }
        assert!(nested || begun > 10 && ended > 10, "{begun} {ended}");
        let anew = State::new(&graph, state.groups(), corrected);
        if !nested {
            assert!((anew.description_length() - state.description_length()).abs() < 1e-7);
        }
    }
}

#[test]
fn a_merge_changes_the_description_by_its_delta() {
    let graph = planted_graph(30, 4);
    let groups: Vec<usize> = (0..30).map(|i| i % 5).collect();
    for corrected in [true, false] {
        let state = State::new(&graph, &groups, corrected);
        let merged: Vec<usize> = state.groups().iter().map(|&g| if g == 3 { 1 } else { g }).collect();
        let full = state.with_groups(&merged).description_length() - state.description_length();
        assert!((state.merge_delta(1, 3) - full).abs() < 1e-9, "{} {full}", state.merge_delta(1, 3));
    }
}

#[test]
fn planted_groups_are_found() {
    let graph = planted_graph(48, 5);
    let found = BlockModelConfig::default().infer(&graph, &Context::for_tests("")).unwrap().best;
    let truth: Vec<usize> = (0..48).map(|i| i % 3).collect();
    assert!(kiln_connectome::score::nmi(&truth, &found.groups) > 0.95, "{found:?}");
}

/// All partitions of five nodes, weighed exactly.
#[test]
fn sampled_partitions_have_their_posterior_frequencies() {
    let edges = [(0, 1, 2.0), (1, 2, 1.5), (0, 2, 2.5), (2, 3, 0.2), (3, 4, 1.0)];
    let graph = Graph::new((0..5).map(|i| i.to_string()).collect(), edges).unwrap();
    let mut partitions = vec![vec![0usize]];
    for _ in 1..5 {
        let grown = partitions.iter().flat_map(|p| {
            let next = p.iter().max().unwrap() + 1;
            (0..=next).map(|g| p.iter().copied().chain([g]).collect::<Vec<_>>()).collect::<Vec<_>>()
        });
        partitions = grown.collect();
    }
    assert_eq!(partitions.len(), 52);
    let names = |p: &[usize]| (1..=p.iter().max().unwrap() + 1).product::<usize>() as f64;
    let weight = |p: &Vec<usize>| names(p) * (-description_length(&graph, p, true).unwrap()).exp();
    let total: f64 = partitions.iter().map(weight).sum();
    let posterior = sample(&graph, &[0; 5], true, 60_000, &Context::for_tests("")).unwrap();
    for i in 0..5 {
        for j in 0..5 {
            let exact: f64 = partitions.iter().filter(|p| p[i] == p[j]).map(weight).sum::<f64>() / total;
            let found = posterior.together[i * 5 + j];
            assert!((exact - found).abs() < 0.02, "{i} {j}: {exact} {found}");
        }
    }
}

#[test]
fn damaged_nwb_files_are_refused_or_read_and_nothing_worse() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("damaged.nwb");
    let mut refused = 0;
    for (file, stream) in [("plain", 0), ("gzip", 1)] {
        let whole = std::fs::read(format!("tests/data/{file}.nwb")).unwrap();
        let mut rng = random_stream(5, "damage", stream);
        for case in 0..200 {
            let mut bytes = whole.clone();
            if case % 4 == 0 {
                bytes.truncate(rng.random_range(0..whole.len()));
            } else {
                // Metadata stand at the beginning, and are worth more damage than numbers.
                let end = if case % 4 == 1 { whole.len() } else { 2048 };
                (0..rng.random_range(1..8)).for_each(|_| bytes[rng.random_range(0..end)] = rng.random());
            }
            std::fs::write(&path, bytes).unwrap();
            if let Err(error) = read_recordings(std::slice::from_ref(&path)) {
                refused += 1;
                assert!(error.to_string().contains("damaged.nwb"), "{file} {case}: {error}");
            }
        }
    }
    assert!(refused > 100, "{refused} of 400 were refused");
}
