//! Which networks are worth their cost.

use kiln_core::{Error, Result};

/// A network, what it costs and how good it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Its id.
    pub id: usize,
    /// FLOPs, or seconds.
    pub cost: f64,
    /// The higher the better.
    pub accuracy: f64,
}

/// The networks among which one chooses.
#[derive(Debug, Clone, PartialEq)]
pub struct Pareto {
    points: Vec<Point>,
}

/// What fits a budget.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The network.
    pub point: Point,
    /// Whether even the cheapest, which this is then, costs more than the budget.
    pub over_budget: bool,
}

impl Pareto {
    /// Over these networks.
    ///
    /// # Errors
    /// When there is none, or a figure is not a number.
    pub fn new(points: Vec<Point>) -> Result<Self> {
        if points.is_empty() || points.iter().any(|p| p.cost.is_nan() || p.accuracy.is_nan()) {
            return Err(Error::usage("networks are compared by cost and accuracy, which must be numbers"));
        }
        Ok(Self { points })
    }

    /// The networks that no other dominates, by cost: none is at least as cheap and as good, and better in one of the two.
    pub fn front(&self) -> Vec<Point> {
        let mut ordered = self.points.clone();
        ordered.sort_by(|a, b| a.cost.total_cmp(&b.cost).then(b.accuracy.total_cmp(&a.accuracy)));
        let mut front: Vec<Point> = Vec::new();
        for point in ordered {
            let twin = |last: &Point| last.cost == point.cost && last.accuracy == point.accuracy;
            if front.last().is_none_or(|last| point.accuracy > last.accuracy || twin(last)) {
                front.push(point);
            }
        }
        front
    }

    /// The most accurate network within a budget, the cheapest of several; where none is within, the cheapest of all.
    pub fn select(&self, budget: f64) -> Choice {
        let within = self.points.iter().filter(|point| point.cost <= budget);
        let best = within.max_by(|a, b| a.accuracy.total_cmp(&b.accuracy).then(b.cost.total_cmp(&a.cost)));
        let cheapest = self.points.iter().min_by(|a, b| a.cost.total_cmp(&b.cost));
        Choice {
            point: *best.or(cheapest).expect("there is a network, as `new` makes sure"),
            over_budget: best.is_none(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(figures: &[(f64, f64)]) -> Pareto {
        let point = |(id, &(cost, accuracy))| Point { id, cost, accuracy };
        Pareto::new(figures.iter().enumerate().map(point).collect()).unwrap()
    }

    fn ids(points: &[Point]) -> Vec<usize> {
        points.iter().map(|point| point.id).collect()
    }

    #[test]
    fn the_front_holds_exactly_what_nothing_dominates() {
        let pareto = points(&[(3.0, 0.7), (1.0, 0.5), (2.0, 0.5), (2.5, 0.8), (1.0, 0.4), (4.0, 0.9)]);
        assert_eq!(ids(&pareto.front()), [1, 3, 5]);
        // Twins do not dominate each other.
        assert_eq!(ids(&points(&[(1.0, 0.5), (1.0, 0.5)]).front()), [0, 1]);
    }

    #[test]
    fn a_budget_buys_the_best_network_or_the_cheapest_beyond_it() {
        let pareto = points(&[(1.0, 0.5), (2.0, 0.7), (3.0, 0.7), (4.0, 0.6)]);
        let id = |budget| (pareto.select(budget).point.id, pareto.select(budget).over_budget);
        assert_eq!([id(0.5), id(1.0), id(3.5), id(9.0)], [(0, true), (0, false), (1, false), (1, false)]);
        assert!(Pareto::new(vec![]).is_err());
    }
}
