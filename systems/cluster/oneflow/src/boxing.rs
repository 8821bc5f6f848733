//! Boxing: how a tensor gets from one SBP to another, and how many bytes that moves (table 2 of the paper).
//!
//! A conversion is a path of steps that each change one axis of the mesh, found by Dijkstra's method with the bytes of
//! the table as cost, or with the seconds that they take. A step stands for one collective a sub-group: the devices that
//! differ in that axis alone.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use kiln_cluster::Link;
use kiln_core::{Error, Result};
use serde::Serialize;

use crate::sbp::{NdSbp, Placement, Region, Sbp, coordinate};

/// Bytes that all devices together send when a tensor of `bytes` bytes changes its form on the same `p` devices.
pub fn bytes_on_same(from: Sbp, to: Sbp, p: usize, bytes: f64) -> f64 {
    let others = (p - 1) as f64;
    match (from, to) {
        (Sbp::S(i), Sbp::S(j)) if i != j => others / p as f64 * bytes,
        (Sbp::S(_), Sbp::B) | (Sbp::P(_), Sbp::S(_)) => others * bytes,
        (Sbp::P(_), Sbp::B) => 2.0 * others * bytes,
        _ => 0.0,
    }
}

/// The same from `p1` devices to `p2` others.
pub fn bytes_to_others(from: Sbp, to: Sbp, p1: usize, p2: usize, bytes: f64) -> f64 {
    let (p1, p2) = (p1 as f64, p2 as f64);
    match (from, to) {
        (Sbp::P(_), Sbp::B) => (p1 + p2 - 1.0) * bytes,
        (Sbp::P(_), _) => p1 * bytes,
        (_, Sbp::B) => p2 * bytes,
        _ => bytes,
    }
}

/// The collective that a step stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Collective {
    /// Every device cuts its part out of what it has.
    Slice,
    /// Every device keeps what it has, and others' places are neutral.
    Place,
    /// Parts along one axis become parts along another.
    AllToAll,
    /// Parts become the whole.
    AllGather,
    /// Partial tensors become parts of their reduction.
    ReduceScatter,
    /// Partial tensors become their reduction.
    AllReduce,
}

/// One axis of the mesh changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Step {
    /// Which axis of the mesh.
    pub axis: usize,
    /// What it did.
    pub from: Sbp,
    /// What it does then.
    pub to: Sbp,
    /// Bytes that all devices together send.
    pub bytes: u64,
}

impl Step {
    /// How it is done.
    pub fn collective(&self) -> Collective {
        match (self.from, self.to) {
            (Sbp::S(_), Sbp::S(_)) => Collective::AllToAll,
            (Sbp::S(_), Sbp::B) => Collective::AllGather,
            (Sbp::B, Sbp::S(_)) => Collective::Slice,
            (Sbp::P(_), Sbp::S(_)) => Collective::ReduceScatter,
            (Sbp::P(_), Sbp::B) => Collective::AllReduce,
            _ => Collective::Place,
        }
    }
}

/// What is kept small.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Cost {
    /// Bytes that all devices together send.
    Bytes,
    /// Seconds, on devices of which each has such a link to every other.
    Seconds(Link),
}

impl Cost {
    /// Of one step on a mesh. All devices send at the same time, in as many rounds as a ring has.
    pub fn of(self, step: &Step, mesh: &[usize]) -> f64 {
        let link = match self {
            Self::Bytes => return step.bytes as f64,
            Self::Seconds(link) => link,
        };
        if step.bytes == 0 {
            return 0.0;
        }
        let others = (mesh[step.axis] - 1) as f64;
        let rounds = if step.collective() == Collective::AllReduce { 2.0 * others } else { others };
        let devices: usize = mesh.iter().product();
        rounds * link.latency + step.bytes as f64 / devices as f64 / link.bandwidth
    }

    /// Of a byte that one device sends.
    pub fn of_byte(self) -> f64 {
        match self {
            Self::Bytes => 1.0,
            Self::Seconds(link) => link.bandwidth.recip(),
        }
    }
}

/// Whether one axis of the mesh can change while the others keep what they have.
///
/// Later axes of the mesh divide what earlier ones leave: while one of them splits the same axis of the tensor, the
/// pieces of a sub-group are no slices of one tensor. Reductions of different kinds are undone from the last axis on.
fn is_closed(state: &NdSbp, axis: usize, to: Sbp) -> bool {
    let from = state.0[axis];
    state.0[axis + 1..].iter().all(|&later| match later {
        Sbp::S(split) => from.axis() != Some(split) && to.axis() != Some(split),
        Sbp::P(kind) => from.reduction().is_none_or(|ours| ours == kind),
        Sbp::B => true,
    })
}

/// Bytes that all sub-groups together send when one axis of the mesh changes.
fn step_bytes(shape: &[usize], element: usize, mesh: &[usize], state: &NdSbp, axis: usize, to: Sbp) -> u64 {
    let (from, parts) = (state.0[axis], mesh[axis]);
    let groups: usize = mesh.iter().enumerate().filter(|(other, _)| *other != axis).map(|(_, n)| n).product();
    let mut others = state.clone();
    others.0[axis] = Sbp::B;
    let mut elements = 0;
    for group in 0..groups {
        // The sub-group's tensor is what the other axes leave.
        let mut rest: Vec<usize> = mesh.to_vec();
        rest[axis] = 1;
        let piece = Region::local(shape, mesh, &others, &coordinate(&rest, group));
        let whole = piece.elements();
        elements += match (from, to) {
            (Sbp::S(i), Sbp::S(j)) if i != j => {
                let kept = |index| {
                    piece
                        .clone()
                        .split(i, parts, index)
                        .intersect(&piece.clone().split(j, parts, index))
                        .elements()
                };
                whole - (0..parts).map(kept).sum::<usize>()
            }
            (Sbp::S(_), Sbp::B) | (Sbp::P(_), Sbp::S(_)) => (parts - 1) * whole,
            (Sbp::P(_), Sbp::B) => 2 * (parts - 1) * whole,
            _ => 0,
        };
    }
    (elements * element) as u64
}

/// Paths and their costs on one mesh, remembered.
#[derive(Debug, Clone)]
pub struct Router {
    mesh: Vec<usize>,
    cost: Cost,
    /// By the shape and the size of an element.
    known: HashMap<(Vec<usize>, usize), Routes>,
}

/// From a state, the best ways to others.
type Routes = HashMap<NdSbp, HashMap<NdSbp, Reached>>;

/// The best way to a state.
#[derive(Debug, Clone)]
struct Reached {
    cost: f64,
    steps: usize,
    last: Option<(NdSbp, Step)>,
}

impl Reached {
    /// Cheaper first, then of fewer steps.
    fn order(&self, other: &Self) -> Ordering {
        self.cost.total_cmp(&other.cost).then(self.steps.cmp(&other.steps))
    }
}

impl Router {
    /// For a mesh, with few bytes as the aim.
    pub fn new(mesh: &[usize]) -> Self {
        Self { mesh: mesh.to_vec(), cost: Cost::Bytes, known: HashMap::new() }
    }

    /// With another aim.
    #[must_use]
    pub fn by(mut self, cost: Cost) -> Self {
        self.cost = cost;
        self.known.clear();
        self
    }

    /// Cost of the cheapest conversion; `element` is the size of an element in bytes. `None` where partial tensors of one
    /// kind would have to become partial tensors of another, which are not the same values.
    pub fn cost(&mut self, shape: &[usize], element: usize, from: &NdSbp, to: &NdSbp) -> Option<f64> {
        if from == to {
            return Some(0.0);
        }
        self.reached(shape, element, from).get(to).map(|reached| reached.cost)
    }

    /// Costs from every one of some forms to every other; infinite where there is no way.
    pub fn costs(&mut self, shape: &[usize], element: usize, forms: &[&NdSbp]) -> Vec<Vec<f64>> {
        let from_one = |from: &&NdSbp| {
            let reached = self.reached(shape, element, from);
            forms.iter().map(|to| reached.get(*to).map_or(f64::INFINITY, |reached| reached.cost)).collect()
        };
        forms.iter().map(from_one).collect()
    }

    /// The cheapest conversion, of the fewest steps where several are.
    ///
    /// # Errors
    /// When partial tensors of one kind would have to become partial tensors of another.
    pub fn path(&mut self, shape: &[usize], element: usize, from: &NdSbp, to: &NdSbp) -> Result<Vec<Step>> {
        if from == to {
            return Ok(Vec::new());
        }
        let reached = self.reached(shape, element, from);
        let mut path = Vec::new();
        let mut at = to;
        while at != from {
            let Some((before, step)) = reached.get(at).and_then(|reached| reached.last.as_ref()) else {
                return Err(Error::usage(format!(
                    "{from} cannot become {to}: partial tensors of one reduction are not those of another"
                ))
                .hint("convert to B or a split first"));
            };
            path.push(*step);
            at = before;
        }
        path.reverse();
        Ok(path)
    }

    /// Everything that can be reached from a state.
    fn reached(&mut self, shape: &[usize], element: usize, from: &NdSbp) -> &HashMap<NdSbp, Reached> {
        let (mesh, cost) = (&self.mesh, self.cost);
        let of_shape = self.known.entry((shape.to_vec(), element)).or_default();
        of_shape.entry(from.clone()).or_insert_with(|| dijkstra(shape, element, mesh, cost, from))
    }
}

/// A state in the queue, the cheapest of which is the greatest.
struct Waiting {
    cost: f64,
    steps: usize,
    state: NdSbp,
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_cost = other.cost.total_cmp(&self.cost);
        by_cost.then(other.steps.cmp(&self.steps)).then_with(|| other.state.cmp(&self.state))
    }
}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Waiting {}

fn dijkstra(
    shape: &[usize],
    element: usize,
    mesh: &[usize],
    aim: Cost,
    from: &NdSbp,
) -> HashMap<NdSbp, Reached> {
    let mut kinds: Vec<Sbp> = (0..shape.len()).map(Sbp::S).chain([Sbp::B, Sbp::SUM]).collect();
    kinds.extend(from.0.iter().filter(|sbp| sbp.reduction().is_some() && **sbp != Sbp::SUM));
    let mut best: HashMap<NdSbp, Reached> = HashMap::new();
    let mut queue = BinaryHeap::new();
    best.insert(from.clone(), Reached { cost: 0.0, steps: 0, last: None });
    queue.push(Waiting { cost: 0.0, steps: 0, state: from.clone() });
    while let Some(Waiting { cost, steps, state }) = queue.pop() {
        if best.get(&state).is_some_and(|known| (known.cost, known.steps) < (cost, steps)) {
            continue;
        }
        for axis in 0..mesh.len() {
            for &to in &kinds {
                let before = state.0[axis];
                let other_kind = before.reduction().zip(to.reduction()).is_some_and(|(a, b)| a != b);
                if to == before || other_kind || !is_closed(&state, axis, to) {
                    continue;
                }
                let bytes = step_bytes(shape, element, mesh, &state, axis, to);
                let step = Step { axis, from: before, to, bytes };
                let mut next = state.clone();
                next.0[axis] = to;
                let last = Some((state.clone(), step));
                let reached = Reached { cost: cost + aim.of(&step, mesh), steps: steps + 1, last };
                if best.get(&next).is_none_or(|known| reached.order(known) == Ordering::Less) {
                    queue.push(Waiting { cost: reached.cost, steps: reached.steps, state: next.clone() });
                    best.insert(next, reached);
                }
            }
        }
    }
    // A detour over a whole tensor would turn partial sums into partial maxima; only what began so may be so.
    let maxima =
        |state: &NdSbp| state.0.iter().any(|sbp| sbp.reduction().is_some() && !kinds_of(from).contains(sbp));
    if from.is_partial() {
        best.retain(|state, _| !maxima(state));
    }
    best
}

/// The partial forms in a state.
fn kinds_of(state: &NdSbp) -> Vec<Sbp> {
    state.0.iter().copied().filter(|sbp| sbp.reduction().is_some()).collect()
}

/// Bytes between two placements: the table on the same devices, and its other row where none is shared.
///
/// # Errors
/// When the placements share some devices only, a mesh of more than one axis lies on others, or as
/// [`Router::path`].
pub fn bytes_between(
    shape: &[usize],
    element: usize,
    (from, from_placement): (&NdSbp, &Placement),
    (to, to_placement): (&NdSbp, &Placement),
) -> Result<u64> {
    if from_placement == to_placement {
        let path = Router::new(&from_placement.mesh).path(shape, element, from, to)?;
        return Ok(path.iter().map(|step| step.bytes).sum());
    }
    let shared = from_placement.ranks.iter().any(|rank| to_placement.ranks.contains(rank));
    let ([from], [to], false) = (&from.0[..], &to.0[..], shared) else {
        return Err(Error::usage(format!("no conversion is known from {from_placement} to {to_placement}"))
            .hint("placements must be the same, or lines of devices that share none"));
    };
    let bytes = (shape.iter().product::<usize>() * element) as f64;
    Ok(bytes_to_others(*from, *to, from_placement.len(), to_placement.len(), bytes) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nd(text: &str) -> NdSbp {
        text.parse().unwrap()
    }

    #[test]
    fn even_shapes_cost_what_the_table_says() {
        let (shape, p) = ([8, 16], 4);
        let mut router = Router::new(&[p]);
        for from in ["S0", "S1", "B", "P"] {
            for to in ["S0", "S1", "B", "P"] {
                let (a, b) = (nd(from), nd(to));
                let table = bytes_on_same(a.0[0], b.0[0], p, 512.0);
                assert_eq!(router.cost(&shape, 4, &a, &b), Some(table), "{from} to {to}");
            }
        }
    }

    #[test]
    fn seconds_count_rounds_as_well_as_bytes() {
        let link = Link { latency: 1e-3, bandwidth: 1e3 };
        let mut router = Router::new(&[4]).by(Cost::Seconds(link));
        // 2 · 3 rounds, and 2 · 3/4 of 80 bytes a device.
        let reduced = router.cost(&[20], 4, &nd("P"), &nd("B")).unwrap();
        assert!((reduced - (6e-3 + 0.12)).abs() < 1e-12, "{reduced}");
        assert_eq!(router.cost(&[20], 4, &nd("B"), &nd("S0")), Some(0.0));
    }

    #[test]
    fn every_pair_of_two_axes_has_a_path_whose_steps_are_closed() {
        let forms = ["S0", "S1", "B", "P"];
        let mut router = Router::new(&[2, 3]);
        for from in forms.iter().flat_map(|a| forms.iter().map(move |b| nd(&format!("{a},{b}")))) {
            for to in forms.iter().flat_map(|a| forms.iter().map(move |b| nd(&format!("{a},{b}")))) {
                let path = router.path(&[7, 5], 4, &from, &to).unwrap();
                let mut state = from.clone();
                for step in &path {
                    assert!(is_closed(&state, step.axis, step.to), "{from} to {to}: {state}, {step:?}");
                    assert_eq!(state.0[step.axis], step.from);
                    state.0[step.axis] = step.to;
                }
                assert_eq!(state, to);
            }
        }
    }

    #[test]
    fn nested_splits_of_one_axis_go_over_whole_pieces() {
        let mut router = Router::new(&[2, 2]);
        let path = router.path(&[8, 4], 4, &nd("S0,S0"), &nd("B,S0")).unwrap();
        assert_eq!(path[0].axis, 1);
        let partial = router.path(&[8, 4], 4, &nd("S0,P"), &nd("S0,S0")).unwrap();
        assert_eq!(partial.len(), 1);
        assert_eq!(partial[0].collective(), Collective::ReduceScatter);
    }

    #[test]
    fn maxima_do_not_become_sums() {
        let refusal = Router::new(&[2]).path(&[4], 4, &nd("Pmax"), &nd("P")).unwrap_err();
        assert!(refusal.to_string().contains("Pmax cannot become P"), "{refusal}");
    }
}
