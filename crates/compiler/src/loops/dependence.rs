//! Whether the turns of a loop are independent of each other: no element that one writes is touched by another.
//!
//! Indices are taken as sums `c v + Σ c_k x_k + constant` of the loop's variable v and others. Two accesses to a buffer
//! never meet in different turns when, along some axis, both have the same `c` and the rest can differ by less than |c|:
//! variables from outside of the loop are the same in both, those of loops inside run over their ranges.

use std::collections::{BTreeMap, BTreeSet};

use super::check::{Checked, Step};
use super::program::{BinOp, Expr, For, Program, Stmt};
use super::ranges::Range;
use super::walk::substitute;

/// A whole number as a sum of multiples of variables and a constant; the constant's name is empty.
type Affine = BTreeMap<String, i64>;

/// A larger step from turn to turn could come round to an earlier index where integers wrap.
const MOST_STEP: u64 = 1 << 31;

/// The variables, by their places, of those of the wanted loops whose turns are independent.
pub(super) fn independent_loops(
    program: &Program,
    checked: &Checked,
    wanted: impl Fn(&For) -> bool,
) -> BTreeSet<usize> {
    fn collect(body: &[Stmt], steps: &[Step], wanted: &impl Fn(&For) -> bool, found: &mut BTreeSet<usize>) {
        for (statement, step) in body.iter().zip(steps) {
            match (statement, step) {
                (Stmt::For(loop_), Step::For { variable, body, .. }) => {
                    if wanted(loop_) && loop_.is_independent() {
                        found.insert(*variable);
                    }
                    collect(&loop_.body, body, wanted, found);
                }
                (Stmt::Alloc { body, .. }, Step::Alloc { body: steps, .. })
                | (Stmt::Let { body, .. }, Step::Let { body: steps, .. }) => {
                    collect(body, steps, wanted, found);
                }
                (Stmt::If { then, otherwise, .. }, Step::If { then: yes, otherwise: no, .. }) => {
                    collect(then, yes, wanted, found);
                    collect(otherwise, no, wanted, found);
                }
                _ => {}
            }
        }
    }
    let mut unique = program.clone();
    unique.make_names_unique();
    let mut found = BTreeSet::new();
    collect(&unique.body, &checked.body, &wanted, &mut found);
    found
}

impl For {
    /// Whether its turns can run in any order, and at once. Names in the program must be unique.
    pub fn is_independent(&self) -> bool {
        let mut accesses = Accesses::default();
        accesses.collect(&self.body, &mut Vec::new());
        let Accesses { touched, own, ranges } = accesses;
        touched.iter().enumerate().filter(|(_, access)| access.writes).all(|(number, write)| {
            own.contains(&write.buffer)
                || touched.iter().enumerate().filter(|(_, other)| other.buffer == write.buffer).all(
                    |(at, other)| {
                        (at < number && other.writes) || self.never_meet(&write.index, &other.index, &ranges)
                    },
                )
        })
    }

    /// Whether no turn of another loop over the same values touches what a different turn of this one writes, or writes what it
    /// touches. Names in the program must be unique.
    pub(super) fn is_apart_from(&self, other: &Self) -> bool {
        let [mut ours, mut theirs] = [Accesses::default(), Accesses::default()];
        ours.collect(&self.body, &mut Vec::new());
        let mut turned = other.body.clone();
        substitute(&mut turned, &other.var, &Expr::Var(self.var.clone()));
        theirs.collect(&turned, &mut Vec::new());
        let ranges = ours.ranges.into_iter().chain(theirs.ranges).collect();
        let meets = |a: &Access, b: &Access| a.buffer == b.buffer && (a.writes || b.writes);
        ours.touched.iter().all(|a| {
            theirs.touched.iter().all(|b| !meets(a, b) || self.never_meet(&a.index, &b.index, &ranges))
        })
    }

    fn never_meet(&self, a: &[Expr], b: &[Expr], ranges: &BTreeMap<String, Option<Range>>) -> bool {
        a.iter().zip(b).any(|(a, b)| {
            let (Some(mut a), Some(mut b)) = (affine(a), affine(b)) else { return false };
            let (turn_a, turn_b) = (a.remove(&self.var).unwrap_or(0), b.remove(&self.var).unwrap_or(0));
            turn_a == turn_b
                && (1..MOST_STEP).contains(&turn_a.unsigned_abs())
                && largest_gap(&a, &b, ranges).is_some_and(|gap| gap < turn_a.unsigned_abs())
        })
    }
}

impl Expr {
    /// By how much an index grows when a variable grows by one; `None` when that is not known.
    pub(super) fn step_of(&self, variable: &str) -> Option<i64> {
        let mut mentioned = false;
        self.visit(&mut |part| mentioned |= matches!(part, Self::Var(name) if name == variable));
        if !mentioned {
            return Some(0);
        }
        affine(self)?.get(variable).copied()
    }
}

/// How far the rests of two indices can be apart; `None` when nothing bounds it.
fn largest_gap(a: &Affine, b: &Affine, ranges: &BTreeMap<String, Option<Range>>) -> Option<u64> {
    let (mut low, mut high) = (0i64, 0i64);
    let mut add = |(from, to): Range| {
        low = low.checked_add(from)?;
        high = high.checked_add(to)?;
        Some(())
    };
    let names: Vec<&String> = a.keys().chain(b.keys().filter(|name| !a.contains_key(*name))).collect();
    for name in names {
        let (in_a, in_b) = (a.get(name).copied().unwrap_or(0), b.get(name).copied().unwrap_or(0));
        match ranges.get(name) {
            // From outside of the loop, or the constant: the same in both turns.
            None if name.is_empty() => add((in_a.checked_sub(in_b)?, in_a.checked_sub(in_b)?))?,
            None if in_a == in_b => {}
            None | Some(None) => return None,
            Some(Some(range)) => {
                add(scaled(*range, in_a)?)?;
                add(scaled(*range, in_b.checked_neg()?)?)?;
            }
        }
    }
    Some(low.unsigned_abs().max(high.unsigned_abs()))
}

fn scaled((low, high): Range, factor: i64) -> Option<Range> {
    let (a, b) = (low.checked_mul(factor)?, high.checked_mul(factor)?);
    Some((a.min(b), a.max(b)))
}

/// An index as a sum; `None` when it is none.
fn affine(expr: &Expr) -> Option<Affine> {
    match expr {
        Expr::I64(value) => Some(BTreeMap::from([(String::new(), *value)])),
        Expr::Var(name) => Some(BTreeMap::from([(name.clone(), 1)])),
        Expr::Bin(BinOp::Add, a, b) => sum(affine(a)?, affine(b)?, 1),
        Expr::Bin(BinOp::Sub, a, b) => sum(affine(a)?, affine(b)?, -1),
        Expr::Bin(BinOp::Mul, a, b) => match (&**a, &**b) {
            (Expr::I64(factor), x) | (x, Expr::I64(factor)) => sum(Affine::new(), affine(x)?, *factor),
            _ => None,
        },
        _ => None,
    }
}

/// `a + factor b`
fn sum(mut a: Affine, b: Affine, factor: i64) -> Option<Affine> {
    for (name, value) in b {
        let part = a.entry(name).or_insert(0);
        *part = part.checked_add(value.checked_mul(factor)?)?;
    }
    Some(a)
}

struct Access {
    buffer: String,
    index: Vec<Expr>,
    writes: bool,
}

/// What a body does to buffers.
#[derive(Default)]
struct Accesses {
    touched: Vec<Access>,
    /// Buffers that are made inside: every turn has its own.
    own: Vec<String>,
    /// Variables that are bound inside, and their ranges where they are known.
    ranges: BTreeMap<String, Option<Range>>,
}

impl Accesses {
    /// `names` are those that `let` binds, with what they stand for.
    fn collect(&mut self, body: &[Stmt], names: &mut Vec<(String, Expr)>) {
        for statement in body {
            for expr in statement.exprs() {
                self.collect_loads(expr, names);
            }
            match statement {
                Stmt::Store { buf, idx, .. } => self.touch(buf, idx, true, names),
                Stmt::Alloc { buf, .. } => self.own.push(buf.clone()),
                Stmt::For(For { var, min, extent, .. }) => {
                    let range = match (resolved(min, names), resolved(extent, names)) {
                        (Expr::I64(min), Expr::I64(extent)) if extent > 0 => {
                            min.checked_add(extent - 1).map(|max| (min, max))
                        }
                        _ => None,
                    };
                    self.ranges.insert(var.clone(), range);
                }
                Stmt::Let { var, value, .. } => {
                    self.ranges.insert(var.clone(), None);
                    let value = resolved(value, names);
                    names.push((var.clone(), value));
                }
                Stmt::If { .. } | Stmt::Assert { .. } => {}
            }
            statement.bodies().into_iter().for_each(|body| self.collect(body, names));
        }
    }

    fn collect_loads(&mut self, expr: &Expr, names: &[(String, Expr)]) {
        expr.visit(&mut |part| {
            if let Expr::Load { buf, idx } = part {
                self.touch(buf, idx, false, names);
            }
        });
    }

    fn touch(&mut self, buffer: &str, index: &[Expr], writes: bool, names: &[(String, Expr)]) {
        let index = index.iter().map(|part| resolved(part, names)).collect();
        self.touched.push(Access { buffer: buffer.into(), index, writes });
    }
}

/// An expression with what names stand for in their place.
fn resolved(expr: &Expr, names: &[(String, Expr)]) -> Expr {
    let mut expr = expr.clone();
    expr.rewrite(&mut |part| {
        if let Expr::Var(name) = part
            && let Some((_, value)) = names.iter().find(|(known, _)| known == name)
        {
            *part = value.clone();
        }
    });
    expr
}
