//! The shortest Hamiltonian path: an order of cities in which neighbours are close (§3.3).
//!
//! Up to twelve cities are ordered exactly (Held and Karp 1962). More are a travelling salesman's problem with one city
//! added that is at distance 0 from all: where the tour passes it, the path begins and ends. Tours are built from
//! nearest neighbours, improved by 2-opt and Or-opt over neighbour lists with don't-look bits (Bentley 1992) until
//! nothing helps, and then the best of them are shaken: two pieces that follow each other change places, what that
//! undid is improved again, and the tour is kept unless it got much longer (Martin, Otto and Felten 1991).

use std::collections::VecDeque;

use clap::ValueEnum;
use kiln_core::{Context, Error, Result};
use rand::{Rng, RngExt};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

/// Up to so many cities are solved exactly.
const EXACT: usize = 12;
/// Up to so many cities, every one of them is tried as the start of a tour.
const ALL_STARTS: usize = 200;
/// Starts of larger tours.
const FEW_STARTS: usize = 4;
/// Neighbours of a city that a move may join it to.
const NEIGHBOURS: usize = 10;
/// Cities that Or-opt moves together, at most.
const SEGMENT: usize = 3;
/// So many of the best tours are shaken, side by side.
const CHAINS: usize = 8;
/// Shakes for each city, over all of those.
const KICKS: usize = 100;
/// How much longer than the shortest tour so far one may be kept, in mean distances along it.
const SLACK: f64 = 0.02;
/// Places that a shake is spread over.
const KICK_SPAN: usize = 30;
/// Most cities: the distances of more would fill the memory.
const MAX_CITIES: usize = 16_384;
/// A move must gain more than that.
const LEAST_GAIN: f64 = 1e-9;

/// How far two cities are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Metric {
    /// The sum of the absolute differences
    L1,
    /// The root of the sum of the squared differences
    L2,
}

/// Distances between all pairs of cities.
#[derive(Debug, Clone, PartialEq)]
pub struct Distances {
    cities: usize,
    values: Vec<f32>,
}

impl Distances {
    /// Of points, one a row of `width` numbers.
    ///
    /// # Errors
    /// When a number is not finite or there are too many points.
    ///
    /// # Panics
    /// When the points do not fill whole rows.
    pub fn of_points(points: &[f32], width: usize, metric: Metric) -> Result<Self> {
        assert!(width > 0 && points.len().is_multiple_of(width), "points must fill rows of {width}");
        let cities = points.len() / width;
        check_count(cities)?;
        if let Some(at) = points.iter().position(|x| !x.is_finite()) {
            return Err(Error::work(format!(
                "number {} of city {} is {}",
                at % width,
                at / width,
                points[at]
            )));
        }
        let row = |city: usize| &points[city * width..][..width];
        let mut values = vec![0.0f32; cities * cities];
        values.par_chunks_mut(cities.max(1)).enumerate().for_each(|(a, distances)| {
            for (b, distance) in distances.iter_mut().enumerate() {
                *distance = apart(row(a.min(b)), row(a.max(b)), metric);
            }
        });
        Ok(Self { cities, values })
    }

    /// A table of distances, row by row.
    ///
    /// # Errors
    /// When it is not square, not symmetric, or has a distance that is negative or no number.
    pub fn of_table(values: Vec<f32>, rows: usize) -> Result<Self> {
        if rows == 0 || values.len() != rows * rows {
            let columns = values.len().checked_div(rows).unwrap_or(0);
            return Err(Error::usage(format!("the table of distances is {rows} x {columns}, not square")));
        }
        check_count(rows)?;
        for (at, &value) in values.iter().enumerate() {
            let (a, b) = (at / rows, at % rows);
            let back = values[b * rows + a];
            if !(value.is_finite() && value >= 0.0)
                || (value - back).abs() > 1e-5 * value.abs().max(back.abs())
            {
                return Err(Error::usage(format!(
                    "the distance from city {a} to {b} is {value}, and back {back}"
                ))
                .hint("distances must be the same in both directions and not negative"));
            }
        }
        Ok(Self { cities: rows, values })
    }

    /// How many cities there are.
    pub fn cities(&self) -> usize {
        self.cities
    }

    fn between(&self, a: usize, b: usize) -> f64 {
        self.values[a * self.cities + b].into()
    }

    /// Length of a path.
    ///
    /// # Panics
    /// When it names a city that there is not.
    pub fn length(&self, path: &[usize]) -> f64 {
        path.windows(2).map(|pair| self.between(pair[0], pair[1])).sum()
    }
}

fn check_count(cities: usize) -> Result<()> {
    if cities > MAX_CITIES {
        return Err(Error::usage(format!("{cities} cities are too many"))
            .hint(format!("the distances between at most {MAX_CITIES} are kept in memory")));
    }
    Ok(())
}

fn apart(a: &[f32], b: &[f32], metric: Metric) -> f32 {
    /// Sums that run side by side, as wide as a register.
    const LANES: usize = 16;
    let term = |x: f32, y: f32| match metric {
        Metric::L1 => (x - y).abs(),
        Metric::L2 => (x - y) * (x - y),
    };
    let mut sums = [0.0f32; LANES];
    let (heads, rest) = a.as_chunks::<LANES>();
    let (other, other_rest) = b.as_chunks::<LANES>();
    for (x, y) in heads.iter().zip(other) {
        for lane in 0..LANES {
            sums[lane] += term(x[lane], y[lane]);
        }
    }
    let rest: f32 = rest.iter().zip(other_rest).map(|(&x, &y)| term(x, y)).sum();
    let sum = sums.iter().sum::<f32>() + rest;
    if metric == Metric::L2 { sum.sqrt() } else { sum }
}

/// A path through all cities.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HamiltonianPath {
    /// The sum of its distances.
    pub length: f64,
    /// Every city once.
    pub path: Vec<usize>,
}

/// Finds short paths; the same for the same seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShpSolver {
    /// Shakes for each city; 0 stops where no move helps.
    pub kicks: usize,
}

impl Default for ShpSolver {
    fn default() -> Self {
        Self { kicks: KICKS }
    }
}

impl ShpSolver {
    /// A short path through all cities: the shortest of all for up to twelve.
    ///
    /// # Errors
    /// When the user stops the search.
    pub fn solve(&self, distances: &Distances, cx: &Context) -> Result<HamiltonianPath> {
        let path = match distances.cities {
            0..=EXACT => exact(distances),
            _ => self.improve(distances, cx)?,
        };
        Ok(HamiltonianPath { length: distances.length(&path), path })
    }

    fn improve(&self, distances: &Distances, cx: &Context) -> Result<Vec<usize>> {
        let cities = distances.cities;
        let starts = if cities <= ALL_STARTS { cities } else { FEW_STARTS };
        let lists = neighbours(distances);
        let begin = |start: usize| {
            let mut tour =
                Tour::new(distances, &lists, nearest_neighbours(distances, start * cities / starts));
            tour.descend();
            (tour.length(), tour)
        };
        let mut tours: Vec<(f64, Tour)> = (0..starts).into_par_iter().map(begin).collect();
        tours.sort_by(|a, b| a.0.total_cmp(&b.0));
        tours.truncate(CHAINS);
        let kicks = self.kicks * cities / tours.len();
        let bar = cx.progress((kicks * tours.len()) as u64, "shortening the path");
        let shaken = tours.into_par_iter().enumerate().map(|(chain, (begun, mut tour))| {
            let mut rng = cx.rng("shp", chain as u64);
            let slack = SLACK * begun / cities as f64;
            let (mut length, mut best) = (begun, (begun, tour.path()));
            for kick in 1..=kicks {
                length += tour.shake(best.0 + slack - length, &mut rng);
                if length < best.0 - LEAST_GAIN {
                    best = (length, tour.path());
                }
                if kick % 256 == 0 {
                    bar.inc(256);
                    if cx.interrupted() {
                        return Err(Error::interrupted("stopped while a path was shortened"));
                    }
                }
            }
            Ok(best)
        });
        let shaken: Vec<(f64, Vec<usize>)> = shaken.collect::<Result<_>>()?;
        let shortest = shaken.into_iter().min_by(|a, b| a.0.total_cmp(&b.0));
        Ok(shortest.expect("one start at least").1)
    }
}

/// Held and Karp: the shortest path through each set of cities that ends in each of them.
fn exact(distances: &Distances) -> Vec<usize> {
    let n = distances.cities;
    if n == 0 {
        return Vec::new();
    }
    let all = (1usize << n) - 1;
    let mut best = vec![(f64::INFINITY, n); (all + 1) * n];
    for city in 0..n {
        best[(1 << city) * n + city] = (0.0, n);
    }
    for set in 1..=all {
        for last in (0..n).filter(|last| set >> last & 1 == 1) {
            let (length, _) = best[set * n + last];
            for next in (0..n).filter(|next| set >> next & 1 == 0) {
                let longer = length + distances.between(last, next);
                let place = &mut best[(set | 1 << next) * n + next];
                if longer < place.0 {
                    *place = (longer, last);
                }
            }
        }
    }
    let ends = (0..n).min_by(|&a, &b| best[all * n + a].0.total_cmp(&best[all * n + b].0));
    let (mut set, mut city) = (all, ends.expect("one city at least"));
    let mut path = vec![city];
    while let (_, before) = best[set * n + city]
        && before < n
    {
        set &= !(1 << city);
        city = before;
        path.push(city);
    }
    path
}

/// From each city to the nearest not yet visited.
fn nearest_neighbours(distances: &Distances, start: usize) -> Vec<usize> {
    let n = distances.cities;
    let mut left: Vec<usize> = (0..n).filter(|&city| city != start).collect();
    let mut path = vec![start];
    let mut last = start;
    while !left.is_empty() {
        let nearer = |&a: &usize, &b: &usize| {
            distances.between(last, left[a]).total_cmp(&distances.between(last, left[b]))
        };
        let at = (0..left.len()).min_by(nearer).expect("one city is left");
        last = left.swap_remove(at);
        path.push(last);
    }
    path
}

/// The nearest cities of each.
fn neighbours(distances: &Distances) -> Vec<Vec<usize>> {
    let n = distances.cities;
    let of = |city: usize| {
        let mut others: Vec<usize> = (0..n).filter(|&other| other != city).collect();
        others.sort_by(|&a, &b| distances.between(city, a).total_cmp(&distances.between(city, b)));
        others.truncate(NEIGHBOURS);
        others
    };
    (0..n).into_par_iter().map(of).collect()
}

/// A tour of the cities and of the one that is at distance 0 from all, whose number comes after theirs.
struct Tour<'a> {
    distances: &'a Distances,
    neighbours: &'a [Vec<usize>],
    order: Vec<usize>,
    /// Where each city is in the order.
    place: Vec<usize>,
    /// Cities whose surroundings changed since they were last looked at.
    pending: VecDeque<usize>,
    is_pending: Vec<bool>,
    /// The order before the last shake.
    before: Vec<usize>,
}

impl<'a> Tour<'a> {
    fn new(distances: &'a Distances, neighbours: &'a [Vec<usize>], mut path: Vec<usize>) -> Self {
        path.push(distances.cities);
        let count = path.len();
        let mut tour = Self {
            distances,
            neighbours,
            order: path,
            place: vec![0; count],
            pending: (0..count).collect(),
            is_pending: vec![true; count],
            before: Vec::new(),
        };
        tour.number(0..count);
        tour
    }

    fn number(&mut self, places: std::ops::Range<usize>) {
        for place in places {
            self.place[self.order[place]] = place;
        }
    }

    fn between(&self, a: usize, b: usize) -> f64 {
        if a.max(b) == self.distances.cities { 0.0 } else { self.distances.between(a, b) }
    }

    fn length(&self) -> f64 {
        let count = self.order.len();
        (0..count).map(|i| self.between(self.order[i], self.order[(i + 1) % count])).sum()
    }

    /// The tour cut at the added city.
    fn path(&self) -> Vec<usize> {
        let cut = self.place[self.distances.cities];
        [&self.order[cut + 1..], &self.order[..cut]].concat()
    }

    fn next(&self, city: usize) -> usize {
        let place = self.place[city] + 1;
        self.order[if place == self.order.len() { 0 } else { place }]
    }

    fn previous(&self, city: usize) -> usize {
        let place = self.place[city];
        self.order[if place == 0 { self.order.len() - 1 } else { place - 1 }]
    }

    fn look_at(&mut self, city: usize) {
        if !self.is_pending[city] {
            self.is_pending[city] = true;
            self.pending.push_back(city);
        }
    }

    /// Makes moves until none helps; by how much the tour became shorter.
    fn descend(&mut self) -> f64 {
        let mut gained = 0.0;
        while let Some(city) = self.pending.pop_front() {
            self.is_pending[city] = false;
            while let Some(gain) = self.two_opt(city).or_else(|| self.or_opt(city)) {
                gained += gain;
            }
        }
        gained
    }

    /// The cities that one may be joined to: its neighbours and the added one.
    fn candidates(&self, city: usize) -> impl Iterator<Item = usize> + use<'a> {
        let added = self.distances.cities;
        let near = self.neighbours.get(city).map_or(&[][..], Vec::as_slice);
        let added = std::iter::once(added).filter(move |_| city != added);
        added.chain(near.iter().copied())
    }

    /// Replaces an edge at `a` and another by two shorter ones.
    fn two_opt(&mut self, a: usize) -> Option<f64> {
        for forward in [true, false] {
            let beside = |tour: &Self, city| if forward { tour.next(city) } else { tour.previous(city) };
            let b = beside(self, a);
            let old = self.between(a, b);
            for c in self.candidates(a) {
                let new = self.between(a, c);
                if new >= old {
                    if c == self.distances.cities {
                        continue;
                    }
                    break;
                }
                let d = beside(self, c);
                let gain = old + self.between(c, d) - new - self.between(b, d);
                if gain > LEAST_GAIN {
                    match forward {
                        true => self.reverse(b, c),
                        false => self.reverse(c, b),
                    }
                    [a, b, c, d].into_iter().for_each(|city| self.look_at(city));
                    return Some(gain);
                }
            }
        }
        None
    }

    /// Turns round the part of the tour from one city forward to another.
    fn reverse(&mut self, from: usize, to: usize) {
        let count = self.order.len();
        let (mut i, mut j) = (self.place[from], self.place[to]);
        let mut inside = (j + count - i) % count + 1;
        if 2 * inside > count {
            // The same tour, the other way round.
            (i, j) = ((j + 1) % count, (i + count - 1) % count);
            inside = count - inside;
        }
        for _ in 0..inside / 2 {
            self.order.swap(i, j);
            self.place[self.order[i]] = i;
            self.place[self.order[j]] = j;
            i = if i + 1 == count { 0 } else { i + 1 };
            j = if j == 0 { count - 1 } else { j - 1 };
        }
    }

    /// Moves up to three cities from `head` on to where they lie better.
    fn or_opt(&mut self, head: usize) -> Option<f64> {
        for forward in [true, false] {
            let mut segment = vec![head];
            while segment.len() <= SEGMENT && segment.len() + 3 < self.order.len() {
                let tail = segment[segment.len() - 1];
                let (before, after) = match forward {
                    true => (self.previous(head), self.next(tail)),
                    false => (self.next(head), self.previous(tail)),
                };
                let gain =
                    self.between(before, head) + self.between(tail, after) - self.between(before, after);
                if let Some(([c, d], added)) = self.better_place(&segment, gain) {
                    self.move_between(&segment, c, d);
                    [before, after, head, tail, c, d].into_iter().for_each(|city| self.look_at(city));
                    return Some(gain - added);
                }
                segment.push(after);
            }
        }
        None
    }

    /// An edge that a segment, its head at the first end, lengthens by less than `gain`, and by how much.
    fn better_place(&self, segment: &[usize], gain: f64) -> Option<([usize; 2], f64)> {
        let (head, tail) = (segment[0], segment[segment.len() - 1]);
        for c in self.candidates(head).filter(|c| !segment.contains(c)) {
            let to_head = self.between(c, head);
            if to_head >= gain {
                if c == self.distances.cities {
                    continue;
                }
                break;
            }
            for d in [self.next(c), self.previous(c)] {
                let added = to_head + self.between(tail, d) - self.between(c, d);
                if !segment.contains(&d) && added - gain < -LEAST_GAIN {
                    return Some(([c, d], added));
                }
            }
        }
        None
    }

    /// Puts a segment between two neighbours, its head beside `c`.
    fn move_between(&mut self, segment: &[usize], c: usize, d: usize) {
        let places: Vec<usize> = segment.iter().map(|&city| self.place[city]).collect();
        let count = self.order.len();
        let (low, high) = (places.iter().min().copied(), places.iter().max().copied());
        let (low, high) = (low.unwrap_or(0), high.unwrap_or(0));
        let target = match self.next(c) == d {
            true => segment.to_vec(),
            false => segment.iter().rev().copied().collect(),
        };
        let first = if self.next(c) == d { c } else { d };
        if high - low + 1 != segment.len() {
            // The segment runs over the end of the order.
            self.order.rotate_left(count / 2);
            self.number(0..count);
            return self.move_between(segment, c, d);
        }
        let at = self.place[first];
        if at > high {
            self.order.copy_within(high + 1..at + 1, low);
            let start = at + 1 - segment.len();
            self.order[start..=at].copy_from_slice(&target);
            self.number(low..at + 1);
        } else {
            self.order.copy_within(at + 1..low, at + 1 + segment.len());
            self.order[at + 1..at + 1 + segment.len()].copy_from_slice(&target);
            self.number(at + 1..high + 1);
        }
    }

    /// Exchanges two pieces that follow each other and descends; takes that back if the tour became longer by more than
    /// `most`. By how much it is longer.
    fn shake(&mut self, most: f64, rng: &mut impl Rng) -> f64 {
        let count = self.order.len();
        let span = KICK_SPAN.min(count - 1);
        let start = rng.random_range(0..=count - 1 - span);
        let mut cuts = [0; 3].map(|_| start + rng.random_range(1..=span));
        cuts.sort_unstable();
        let [i, j, k] = cuts;
        if i == j || j == k {
            return 0.0;
        }
        self.before.clone_from(&self.order);
        let edges = |tour: &Self, places: [usize; 3]| -> f64 {
            places.iter().map(|&place| tour.between(tour.order[place - 1], tour.order[place % count])).sum()
        };
        let old = edges(self, [i, j, k]);
        self.order[i..j].reverse();
        self.order[j..k].reverse();
        self.order[i..k].reverse();
        self.number(i..k);
        let lost = edges(self, [i, i + k - j, k]) - old;
        let ends = [i - 1, i, i + k - j - 1, i + k - j, k - 1, k % count].map(|place| self.order[place]);
        ends.into_iter().for_each(|city| self.look_at(city));
        let longer = lost - self.descend();
        if longer > most {
            std::mem::swap(&mut self.order, &mut self.before);
            self.number(0..count);
            return 0.0;
        }
        longer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random_points(count: usize, seed: u64) -> Distances {
        let mut rng = kiln_core::random_stream(seed, "points", 0);
        let points: Vec<f32> = (0..count * 3).map(|_| rng.random()).collect();
        Distances::of_points(&points, 3, Metric::L1).unwrap()
    }

    #[test]
    fn moves_keep_every_city_and_never_lengthen_a_tour() {
        for seed in 0..20 {
            let distances = random_points(13 + seed as usize * 3, seed);
            let cx = Context { seed, ..Context::for_tests("unused") };
            let lists = neighbours(&distances);
            let begun = distances.length(&nearest_neighbours(&distances, 0));
            let mut tour = Tour::new(&distances, &lists, nearest_neighbours(&distances, 0));
            tour.descend();
            let descended = distances.length(&tour.path());
            let solved = ShpSolver::default().solve(&distances, &cx).unwrap();
            assert!(descended <= begun + 1e-6 && solved.length <= descended + 1e-6, "{begun} {descended}");
            let back: Vec<usize> = solved.path.iter().rev().copied().collect();
            assert!((distances.length(&back) - solved.length).abs() < 1e-6, "a path is as long backwards");
            let mut cities = solved.path.clone();
            cities.sort_unstable();
            assert_eq!(cities, (0..distances.cities()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_search_finds_what_the_exact_method_finds() {
        for seed in 0..10 {
            let distances = random_points(EXACT, seed);
            let found = ShpSolver::default().improve(&distances, &Context::for_tests("unused")).unwrap();
            assert!((distances.length(&found) - distances.length(&exact(&distances))).abs() < 1e-6);
        }
    }

    #[test]
    fn few_cities_and_equal_cities_have_paths() {
        let cx = Context::for_tests("unused");
        for count in [1, 2, 40] {
            let same = Distances::of_points(&vec![0.5; count * 2], 2, Metric::L2).unwrap();
            let found = ShpSolver::default().solve(&same, &cx).unwrap();
            assert_eq!((found.length, found.path.len()), (0.0, count));
        }
    }
}
