//! The search for the shortest description: from single nodes by merging, from spectral partitions, and by annealing;
//! every start is then improved by single moves, merges and new divisions until none of them
//! helps.

use kiln_core::{Context, Error, Result, random_stream};
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{Rng, RngExt};
use rayon::prelude::*;

use super::state::{Reach, State};
use super::{BlockModelConfig, Partition, by_size, spectral};
use crate::graph::Graph;

/// A change that is smaller than this is rounding.
const LEAST_GAIN: f64 = 1e-9;
/// With so few groups, a node tries them all; otherwise those of its neighbours.
const FEW_GROUPS: usize = 24;
/// Merging goes from B to B / 1.3 groups at a time, and one by one below FEW_GROUPS.
const SHRINK: f64 = 1.3;
/// Merging starts from single nodes in graphs up to this size, from so many random groups in larger ones.
const MOST_GROUPS: usize = 500;
/// Numbers of groups of the spectral starts.
const SPECTRAL: [usize; 8] = [2, 3, 4, 5, 6, 8, 11, 16];
/// Sweeps of one annealing.
const ANNEALING: usize = 40;
/// Random halves tried for every group and pair of groups.
const SPLITS: usize = 3;
/// Most pairs of groups that are divided anew in one round.
const MOST_PAIRS: usize = 20;

pub fn search(
    graph: &Graph,
    degree_corrected: bool,
    config: &BlockModelConfig,
    cx: &Context,
) -> Result<Partition> {
    let seed = cx.rng("blockmodel", u64::from(degree_corrected)).random::<u64>();
    let stopped = || cx.interrupted();
    let mut found: Vec<Vec<usize>> = vec![vec![0; graph.len()]];
    let mut starts = spectral::partitions(graph, &SPECTRAL, &mut random_stream(seed, "spectral", 0));
    starts.push(single_nodes(graph.len(), &mut random_stream(seed, "single", 0)));
    let refined = starts.par_iter().enumerate().map(|(index, start)| {
        let rng = &mut random_stream(seed, "refine", index as u64);
        let state = State::new(graph, start, degree_corrected);
        match state.count() > FEW_GROUPS {
            true => agglomerate(state, rng, &stopped),
            false => vec![refine(state, rng, &stopped).groups().to_vec()],
        }
    });
    found.extend(refined.collect::<Vec<_>>().into_iter().flatten());
    let flat = |groups: &Vec<usize>| State::new(graph, groups, degree_corrected).description_length();
    let least = |found: &[Vec<usize>]| found.iter().min_by(|a, b| flat(a).total_cmp(&flat(b))).cloned();
    let best = least(&found).unwrap_or_default();
    let annealed = (0..config.restarts).into_par_iter().map(|restart| {
        let rng = &mut random_stream(seed, "anneal", restart as u64);
        let mut state = State::new(graph, &best, degree_corrected);
        anneal(&mut state, rng, &stopped);
        refine(state, rng, &stopped).groups().to_vec()
    });
    found.extend(annealed.collect::<Vec<_>>());
    if cx.interrupted() {
        return Err(Error::interrupted("the search for communities was stopped"));
    }
    if config.nested {
        return Ok(best_nested(graph, degree_corrected, found, seed));
    }
    let best = least(&found).unwrap_or_default();
    let (groups, _) = by_size(&best);
    let count = groups.iter().max().map_or(0, |m| m + 1);
    Ok(Partition { description_length: flat(&best), groups, count, degree_corrected, levels: Vec::new() })
}

fn single_nodes(nodes: usize, rng: &mut impl Rng) -> Vec<usize> {
    match nodes <= MOST_GROUPS {
        true => (0..nodes).collect(),
        false => (0..nodes).map(|_| rng.random_range(0..MOST_GROUPS)).collect(),
    }
}

/// The shortest nested description above the partitions found, after single moves under it.
fn best_nested(graph: &Graph, degree_corrected: bool, mut found: Vec<Vec<usize>>, seed: u64) -> Partition {
    found.iter_mut().for_each(|groups| *groups = by_size(groups).0);
    found.sort();
    found.dedup();
    let nested = found.par_iter().enumerate().map(|(index, groups)| {
        let rng = &mut random_stream(seed, "nested", index as u64);
        let mut state = State::new(graph, groups, degree_corrected);
        let mut last = f64::INFINITY;
        loop {
            state.set_hierarchy(Some(state.infer_hierarchy()));
            sweep(&mut state, rng, Moves::Any);
            let now = state.description_length();
            if now > last - LEAST_GAIN {
                break;
            }
            last = now;
        }
        let levels = state.hierarchy().map(|hierarchy| hierarchy.levels()).unwrap_or_default();
        (state.description_length(), state.groups().to_vec(), levels)
    });
    let best = nested.collect::<Vec<_>>().into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
    let (description_length, groups, mut levels) = best.unwrap_or_default();
    let (groups, place) = by_size(&groups);
    if let Some(first) = levels.first_mut() {
        let mut moved = first.clone();
        first.iter().zip(&place).for_each(|(&above, &new)| moved[new] = above);
        *first = moved;
    }
    let count = groups.iter().max().map_or(0, |m| m + 1);
    Partition { groups, count, description_length, degree_corrected, levels }
}

/// Merges groups until one is left, moving single nodes in between; from a few groups on, what refining each state gives.
fn agglomerate(mut state: State, rng: &mut impl Rng, stopped: &impl Fn() -> bool) -> Vec<Vec<usize>> {
    let mut met = Vec::new();
    while state.count() > 1 && !stopped() {
        let count = state.count();
        let target = if count <= FEW_GROUPS { count - 1 } else { (count as f64 / SHRINK) as usize };
        state = merged(&state, count - target);
        for _ in 0..3 {
            if sweep(&mut state, rng, Moves::Existing) < LEAST_GAIN {
                break;
            }
        }
        if state.count() <= FEW_GROUPS {
            met.push(refine(state.clone(), rng, stopped).groups().to_vec());
        }
    }
    met
}

/// The state after the `wanted` best merges, each group taking part in at most one.
fn merged<'g>(state: &State<'g>, wanted: usize) -> State<'g> {
    let count = state.count();
    let best_of = |r: usize| {
        let others = (0..count).filter(|&s| s != r).map(|s| (state.merge_delta(r, s), r, s));
        others.min_by(|a, b| a.0.total_cmp(&b.0))
    };
    let mut merges: Vec<(f64, usize, usize)> = (0..count).filter_map(best_of).collect();
    merges.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut into: Vec<usize> = (0..count).collect();
    let mut taken = vec![false; count];
    let mut done = 0;
    for (_, r, s) in merges {
        if done < wanted && !taken[r] && !taken[s] {
            into[r] = s;
            (taken[r], taken[s]) = (true, true);
            done += 1;
        }
    }
    let groups: Vec<usize> = state.groups().iter().map(|&group| into[group]).collect();
    state.with_groups(&groups)
}

/// Single moves, merges and new divisions until none of them shortens the description.
fn refine<'g>(mut state: State<'g>, rng: &mut impl Rng, stopped: &impl Fn() -> bool) -> State<'g> {
    loop {
        while sweep(&mut state, rng, Moves::Any) > LEAST_GAIN {}
        if stopped() || !(merge_once(&mut state) || divide_once(&mut state, rng)) {
            return state;
        }
    }
}

/// Where nodes may go.
#[derive(Clone, Copy)]
enum Moves {
    /// To any group, or to a new one.
    Any,
    /// To groups that there are.
    Existing,
    /// Nodes of two groups, from one to the other.
    Between([usize; 2]),
}

/// Moves every node to the group that shortens the description most; by how much it did.
fn sweep(state: &mut State, rng: &mut impl Rng, moves: Moves) -> f64 {
    let mut nodes: Vec<usize> = (0..state.graph().len()).collect();
    if let Moves::Between(pair) = moves {
        nodes.retain(|&node| pair.contains(&state.groups()[node]));
    }
    nodes.shuffle(rng);
    let mut reach = Reach::default();
    let mut gained = 0.0;
    for node in nodes {
        state.reach(node, &mut reach);
        let (from, count) = (state.groups()[node], state.count());
        let mut best = (-LEAST_GAIN, from);
        let mut consider = |to: usize| {
            let delta = state.delta(node, to, &reach);
            if delta < best.0 {
                best = (delta, to);
            }
        };
        match moves {
            Moves::Between(pair) => {
                pair.into_iter().filter(|&to| to != from && state.size(from) > 1).for_each(&mut consider);
            }
            _ if count <= FEW_GROUPS => (0..count).filter(|&to| to != from).for_each(&mut consider),
            _ => reach.groups.iter().filter(|&&to| to != from).for_each(|&to| consider(to)),
        }
        if matches!(moves, Moves::Any) && state.size(from) > 1 {
            consider(count);
        }
        if best.1 != from {
            state.apply(node, best.1, &reach);
            gained -= best.0;
        }
    }
    gained
}

/// The best merge, if it shortens the description.
fn merge_once(state: &mut State) -> bool {
    let count = state.count();
    let pairs = (0..count).flat_map(|r| (r + 1..count).map(move |s| (r, s)));
    let best = pairs.map(|(r, s)| (state.merge_delta(r, s), r, s)).min_by(|a, b| a.0.total_cmp(&b.0));
    match best {
        Some((delta, r, s)) if delta < -LEAST_GAIN => {
            let groups: Vec<usize> = state.groups().iter().map(|&g| if g == s { r } else { g }).collect();
            *state = state.with_groups(&groups);
            true
        }
        _ => false,
    }
}

/// The first new division that shortens the description: of one group into two, or of two groups between them, once
/// their nodes have chosen sides.
fn divide_once(state: &mut State, rng: &mut impl Rng) -> bool {
    let before = state.description_length();
    let count = state.count();
    let single = (0..count).map(|r| (r, count));
    let mut pairs: Vec<(usize, usize)> =
        (0..count).flat_map(|r| (r + 1..count).map(move |s| (r, s))).collect();
    pairs.shuffle(rng);
    pairs.truncate(MOST_PAIRS);
    for (r, s) in single.chain(pairs) {
        let of_them = |i: &usize| state.groups()[*i] == r || state.groups()[*i] == s;
        let members: Vec<usize> = (0..state.graph().len()).filter(of_them).collect();
        if members.len() < 4 {
            continue;
        }
        for _ in 0..SPLITS {
            let mut halves = members.clone();
            halves.shuffle(rng);
            let mut groups = state.groups().to_vec();
            for (place, &node) in halves.iter().enumerate() {
                groups[node] = if place < halves.len() / 2 { s } else { r };
            }
            let mut halved = state.with_groups(&groups);
            let pair = [halved.groups()[halves[0]], halved.groups()[halves[members.len() - 1]]];
            for _ in 0..8 {
                if sweep(&mut halved, rng, Moves::Between(pair)) < LEAST_GAIN {
                    break;
                }
            }
            if halved.description_length() < before - LEAST_GAIN {
                *state = halved;
                return true;
            }
        }
    }
    false
}

/// Random moves to the groups of neighbours, to any group or to a new one, ever fewer of them for the worse.
fn anneal(state: &mut State, rng: &mut impl Rng, stopped: &impl Fn() -> bool) {
    let mut reach = Reach::default();
    let nodes = state.graph().len();
    for step in 0..ANNEALING {
        let temperature = 2.0 * (1.0 - step as f64 / ANNEALING as f64);
        for _ in 0..nodes {
            let node = rng.random_range(0..nodes);
            state.reach(node, &mut reach);
            let neighbour = reach.groups.choose(rng).copied();
            let any = rng.random_range(0..state.count() + 1);
            let to = if rng.random_bool(0.7) { neighbour.unwrap_or(any) } else { any };
            if to == state.count() && state.size(state.groups()[node]) == 1 {
                continue;
            }
            let delta = state.delta(node, to, &reach);
            if delta <= 0.0 || rng.random::<f64>() < (-delta / temperature).exp() {
                state.apply(node, to, &reach);
            }
        }
        if stopped() {
            return;
        }
    }
}
