//! How many bits each unit gets, or each of its tensors: scores order them, and bisection finds how many of the least sensitive
//! can do with eight bits, and then with four, within the accuracy that the user asks for (paper, §3). Within a budget of
//! bytes instead, as few as possible get fewer bits.

use std::collections::BTreeMap;

use clap::ValueEnum;
use kiln_core::Result;
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

/// By what units are ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Curvature and what units do to each other: the paper's
    #[default]
    Augmented,
    /// Curvature alone
    Hessian,
    /// The loss with one unit quantised
    Single,
    /// The size of the rounding errors
    Noise,
    /// At random
    Random,
    /// The first layers first
    Depth,
}

/// Which part of the dependencies augments the score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize, Deserialize)]
pub enum Augment {
    /// The loss with one unit quantised
    #[value(name = "single")]
    #[serde(rename = "single")]
    Single,
    /// What pairs of units do beyond that
    #[value(name = "pair")]
    #[serde(rename = "pair")]
    Pair,
    /// Both
    #[default]
    #[value(name = "pair+single")]
    #[serde(rename = "pair+single")]
    Both,
}

/// What was measured of all units at one precision.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Mean curvature times squared error: `Ω = Tr(H) / n ‖δ‖²`
    pub hessian: Vec<f64>,
    /// `‖δ‖²`
    pub noise: Vec<f64>,
    /// `Δ_i = L(only i quantised) - L`
    pub single: Vec<f64>,
    /// `D_ij = L(i and j quantised) - L - Δ_i - Δ_j`, symmetric; empty where it was not measured
    pub pair: Vec<Vec<f64>>,
}

impl Measured {
    /// `I_l = max(0, Δ_l) + ½ Σ_{j ≠ l} max(0, D_lj)`
    pub fn dependency(&self, augment: Augment) -> Vec<f64> {
        let pairs = |l: usize| -> f64 {
            let others = self.pair.get(l).into_iter().flatten().enumerate().filter(|(j, _)| *j != l);
            0.5 * others.map(|(_, d)| d.max(0.0)).sum::<f64>()
        };
        let single = |l: usize| self.single[l].max(0.0);
        let value = |l: usize| match augment {
            Augment::Single => single(l),
            Augment::Pair => pairs(l),
            Augment::Both => single(l) + pairs(l),
        };
        (0..self.single.len()).map(value).collect()
    }

    /// The scores: `Ω / ΣΩ + λ I / ΣI` for [`Order::Augmented`]; the larger, the more sensitive.
    pub fn scores(&self, order: Order, lambda: f64, augment: Augment, rng: &mut impl Rng) -> Vec<f64> {
        let units = self.noise.len();
        match order {
            Order::Augmented => {
                let (curvature, dependency) = (shares(&self.hessian), shares(&self.dependency(augment)));
                curvature.iter().zip(&dependency).map(|(h, i)| h + lambda * i).collect()
            }
            Order::Hessian => self.hessian.clone(),
            Order::Single => self.single.clone(),
            Order::Noise => self.noise.clone(),
            Order::Depth => (0..units).map(|l| -(l as f64)).collect(),
            Order::Random => {
                let mut places: Vec<usize> = (0..units).collect();
                places.shuffle(rng);
                places.into_iter().map(|place| place as f64).collect()
            }
        }
    }
}

/// Scores over the time that fewer bits save, `S / ΔT`: what saves nothing comes last.
pub fn per_gain(scores: &[f64], gains: &[f64]) -> Vec<f64> {
    // Scores can be negative, and the order of those must not turn round: they are moved to above 0 first.
    let least = scores.iter().copied().fold(0.0, f64::min);
    let one = |(score, &gain): (&f64, &f64)| if gain > 0.0 { (score - least) / gain } else { f64::INFINITY };
    scores.iter().zip(gains).map(one).collect()
}

fn shares(values: &[f64]) -> Vec<f64> {
    let sum: f64 = values.iter().sum();
    values.iter().map(|value| if sum > 0.0 { value / sum } else { 0.0 }).collect()
}

/// Units from the least sensitive on; of equals the earlier first.
pub fn least_first(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
    order
}

/// The largest `k` up to `most` that bisection accepts: `lo = mid` where `accepts(mid)`, else `hi = mid - 1`, with
/// `mid = ⌈(lo + hi) / 2⌉`. 0 is accepted without asking.
///
/// # Errors
/// Those of `accepts`.
pub fn bisect(most: usize, mut accepts: impl FnMut(usize) -> Result<bool>) -> Result<usize> {
    let (mut lo, mut hi) = (0, most);
    while lo < hi {
        let mid = (lo + hi).div_ceil(2);
        if accepts(mid)? { lo = mid } else { hi = mid - 1 }
    }
    Ok(lo)
}

/// Bits of every unit: 16, 8 or 4.
pub type Bits = Vec<u8>;

/// A configuration that was tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tried {
    /// Bits of every unit.
    pub bits: Bits,
    /// The metric on the validation set.
    pub metric: f64,
}

/// Every configuration that was tried, in order, so that none is evaluated twice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Trials {
    /// In the order in which they were asked for first.
    pub tried: Vec<Tried>,
    /// The metric of the network as it was, once it is known.
    pub baseline: Option<f64>,
    known: BTreeMap<Bits, f64>,
    /// Metrics that another search found out.
    elsewhere: BTreeMap<Bits, f64>,
}

impl Trials {
    /// With those of an earlier, interrupted search.
    pub fn resumed(tried: Vec<Tried>) -> Self {
        let known = tried.iter().map(|trial| (trial.bits.clone(), trial.metric)).collect();
        Self { tried, known, ..Self::default() }
    }

    /// For another search of the same network on the same examples, with what this one found out.
    pub fn for_another(&self) -> Self {
        let mut elsewhere = self.elsewhere.clone();
        elsewhere.extend(self.known.iter().map(|(bits, &metric)| (bits.clone(), metric)));
        Self { baseline: self.baseline, elsewhere, ..Self::default() }
    }

    /// The metric of a configuration, from `evaluate` where it is not known yet.
    ///
    /// # Errors
    /// Those of `evaluate`.
    pub fn metric(&mut self, bits: &Bits, evaluate: &mut impl FnMut(&Bits) -> Result<f64>) -> Result<f64> {
        if let Some(&metric) = self.known.get(bits) {
            return Ok(metric);
        }
        let metric = match self.elsewhere.get(bits) {
            Some(&metric) => metric,
            None => evaluate(bits)?,
        };
        self.known.insert(bits.clone(), metric);
        self.tried.push(Tried { bits: bits.clone(), metric });
        Ok(metric)
    }
}

/// What the search may use and must reach.
#[derive(Debug, Clone)]
pub struct Goal<'a> {
    /// The least metric that is accepted.
    pub target: f64,
    /// Units from the least sensitive on, when eight bits are tried; empty leaves that phase out.
    pub order8: &'a [usize],
    /// The same for four bits.
    pub order4: &'a [usize],
    /// Bits that a unit must have.
    pub pinned: &'a BTreeMap<usize, u8>,
    /// Whether units that bisection refused are tried one by one afterwards.
    pub refine: bool,
}

/// Finds bits for every unit: bisection over the number of leading units at eight bits, then over those of them at four.
///
/// The metric need not fall evenly: what is returned was evaluated itself, or is the baseline.
///
/// # Errors
/// Those of `evaluate`.
pub fn search(
    units: usize,
    goal: &Goal<'_>,
    trials: &mut Trials,
    mut evaluate: impl FnMut(&Bits) -> Result<f64>,
) -> Result<Bits> {
    let mut chosen: Bits = vec![16; units];
    goal.pinned.iter().for_each(|(&unit, &bits)| chosen[unit] = bits);
    for (precision, order) in [(8, goal.order8), (4, goal.order4)] {
        let free: Vec<usize> = order
            .iter()
            .copied()
            .filter(|unit| !goal.pinned.contains_key(unit))
            // Four bits are tried where eight were accepted, if eight were tried at all.
            .filter(|&unit| precision == 8 || goal.order8.is_empty() || chosen[unit] == 8)
            .collect();
        let base = chosen.clone();
        let with = |leading: &[usize]| {
            let mut bits = base.clone();
            leading.iter().for_each(|&unit| bits[unit] = precision);
            bits
        };
        let k = bisect(free.len(), |k| Ok(trials.metric(&with(&free[..k]), &mut evaluate)? >= goal.target))?;
        chosen = with(&free[..k]);
        if goal.refine {
            for &unit in &free[k..] {
                let mut bits = chosen.clone();
                bits[unit] = precision;
                if trials.metric(&bits, &mut evaluate)? >= goal.target {
                    chosen = bits;
                }
            }
        }
    }
    Ok(chosen)
}

/// Bits that keep `bytes` within a budget: as few of the least sensitive units as are needed have eight bits, and if all of them
/// are not enough, as few of them as are needed have four. With [`Goal::refine`], units of which that was not needed in the end get
/// their bits back, the most sensitive first. `None` where the fewest bits are too many.
pub fn within(units: usize, budget: usize, goal: &Goal<'_>, bytes: impl Fn(&Bits) -> usize) -> Option<Bits> {
    let mut chosen: Bits = vec![16; units];
    goal.pinned.iter().for_each(|(&unit, &bits)| chosen[unit] = bits);
    let mut lowered = Vec::new();
    for (precision, order) in [(8, goal.order8), (4, goal.order4)] {
        for &unit in order.iter().filter(|unit| !goal.pinned.contains_key(unit)) {
            if bytes(&chosen) <= budget {
                break;
            }
            lowered.push((unit, chosen[unit]));
            chosen[unit] = precision;
        }
    }
    if bytes(&chosen) > budget {
        return None;
    }
    if goal.refine {
        for (unit, before) in lowered.into_iter().rev() {
            let lower = std::mem::replace(&mut chosen[unit], before);
            if bytes(&chosen) > budget {
                chosen[unit] = lower;
            }
        }
    }
    Some(chosen)
}

/// The points that no other beats in both: the lowest cost for each metric, by falling metric.
pub fn pareto(points: &[(f64, f64)]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|&a, &b| points[b].0.total_cmp(&points[a].0).then(points[a].1.total_cmp(&points[b].1)));
    let mut cheapest = f64::INFINITY;
    order.retain(|&at| {
        let better = points[at].1 < cheapest;
        cheapest = cheapest.min(points[at].1);
        better
    });
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_search_evaluates_logarithmically_and_returns_what_it_evaluated() {
        let sensitive = [2, 5];
        let metric = |bits: &Bits| {
            let lost: f64 = bits
                .iter()
                .enumerate()
                .map(|(unit, &b)| match (b, sensitive.contains(&unit)) {
                    (16, _) => 0.0,
                    (_, true) => 0.1,
                    (8, _) => 0.001,
                    _ => 0.004,
                })
                .sum();
            Ok(0.9 - lost)
        };
        let order = [0, 1, 3, 4, 6, 7, 2, 5];
        let (pinned, mut trials) = (BTreeMap::new(), Trials::default());
        let goal = Goal { target: 0.886, order8: &order, order4: &order, pinned: &pinned, refine: false };
        let bits = search(8, &goal, &mut trials, metric).unwrap();
        assert_eq!(bits, [4, 4, 16, 8, 8, 16, 8, 8]);
        assert!(
            trials.tried.len() <= 2 * (4 + 1)
                && trials.tried.iter().any(|t| t.bits == bits && t.metric >= 0.886)
        );

        let pinned = BTreeMap::from([(0, 16)]);
        let goal = Goal { pinned: &pinned, refine: true, ..goal };
        let mut again = Trials::resumed(trials.tried.clone());
        let mut fresh = 0;
        let bits = search(8, &goal, &mut again, |bits| {
            fresh += 1;
            metric(bits)
        })
        .unwrap();
        assert!(bits[0] == 16 && metric(&bits).unwrap() >= 0.886 && fresh > 0);
        // A search that is repeated knows everything already.
        search(8, &goal, &mut again, |_| panic!("everything is known")).unwrap();
        // Neither does another one ask for what is known, but it has tried it too.
        let mut another = again.for_another();
        search(8, &goal, &mut another, |_| panic!("everything is known")).unwrap();
        assert!(another.tried.iter().any(|t| t.bits == bits) && another.tried.len() <= again.tried.len());
    }

    #[test]
    fn a_budget_of_bytes_lowers_no_more_units_than_it_must() {
        let (order, pinned) = ([2, 0, 1], BTreeMap::new());
        let goal = Goal { target: 0.0, order8: &order, order4: &order, pinned: &pinned, refine: false };
        let sizes = [100, 10, 40];
        let bytes = |bits: &Bits| bits.iter().zip(sizes).map(|(&b, size)| usize::from(b) * size).sum();
        let found = |budget, goal: &Goal<'_>| within(3, budget, goal, bytes);
        assert_eq!(found(2400, &goal), Some(vec![16, 16, 16]));
        assert_eq!(found(2200, &goal), Some(vec![16, 16, 8]));
        assert_eq!(found(1700, &goal), Some(vec![8, 16, 8]));
        assert_eq!(found(1100, &goal), Some(vec![8, 8, 4]));
        assert_eq!(found(599, &goal), None);
        // Once the large unit is at eight bits, the smaller one before it need not be.
        assert_eq!(found(1700, &Goal { refine: true, ..goal.clone() }), Some(vec![8, 16, 16]));
        let pinned = BTreeMap::from([(0, 16)]);
        let bits = found(1700, &Goal { pinned: &pinned, ..goal });
        assert_eq!(bits, None);
    }

    #[test]
    fn scores_over_gains_put_what_saves_nothing_last() {
        let found = per_gain(&[1.0, 1.0, -1.0, 3.0], &[1.0, 2.0, 1.0, -1.0]);
        assert_eq!(least_first(&found), [2, 1, 0, 3]);
    }

    #[test]
    fn only_unbeaten_points_are_on_the_front() {
        let points = [(0.9, 5.0), (0.8, 6.0), (0.85, 4.0), (0.9, 4.5), (0.7, 1.0)];
        assert_eq!(pareto(&points), [3, 2, 4]);
    }

    #[test]
    fn negative_dependencies_count_as_none() {
        let measured = Measured {
            hessian: vec![1.0, 3.0],
            noise: vec![1.0, 1.0],
            single: vec![-1.0, 0.5],
            pair: vec![vec![9.0, -0.2], vec![-0.2, 9.0]],
        };
        assert_eq!(measured.dependency(Augment::Both), [0.0, 0.5]);
        let mut rng = kiln_core::random_stream(0, "order", 0);
        assert_eq!(measured.scores(Order::Augmented, 1.0, Augment::Both, &mut rng), [0.25, 1.75]);
        assert_eq!(measured.scores(Order::Augmented, 0.0, Augment::Both, &mut rng), [0.25, 0.75]);
    }
}
