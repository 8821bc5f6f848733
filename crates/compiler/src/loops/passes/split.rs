//! Loops in blocks, in lanes, over threads, and without their borders.

use std::collections::HashSet;

use super::super::program::{BinOp, Expr, For, LoopKind, Program, Stmt};
use super::super::walk::{free_name, substitute};

/// Names in use.
pub(super) struct Names(HashSet<String>);

impl Names {
    pub fn of(program: &Program) -> Self {
        let mut names: HashSet<String> = program.params.iter().map(|param| param.name.clone()).collect();
        for statement in &program.body {
            statement.visit(&mut |statement| names.extend(statement.binding().map(String::from)));
        }
        Self(names)
    }

    pub fn fresh(&mut self, name: &str) -> String {
        let name = free_name(name, &self.0);
        self.0.insert(name.clone());
        name
    }
}

/// Splits every innermost loop into blocks.
pub fn split(program: &mut Program, factor: usize) {
    let mut names = Names::of(program);
    change_loops(&mut program.body, &mut |found| {
        let innermost = !found.body.iter().any(contains_loop);
        match innermost {
            true => in_blocks(found, factor, None, &mut names),
            false => vec![Stmt::For(found)],
        }
    });
}

/// Splits loops that are marked as vectorized into blocks of lanes, where their turns are independent, and takes the mark
/// from the others.
pub fn vectorize(program: &mut Program, width: usize) {
    let mut names = Names::of(program);
    change_loops(&mut program.body, &mut |mut found| {
        if found.kind != LoopKind::Vectorized {
            return vec![Stmt::For(found)];
        }
        let independent = found.is_independent() && !found.body.iter().any(contains_loop);
        found.kind = LoopKind::Serial;
        match independent {
            true => in_blocks(found, width, Some(LoopKind::Vectorized), &mut names),
            false => vec![Stmt::For(found)],
        }
    });
}

/// Marks outermost loops of independent turns as parallel, and takes the mark from all others.
pub fn parallelise(program: &mut Program) {
    change_loops(&mut program.body, &mut |mut found| {
        if found.kind == LoopKind::Parallel {
            found.kind = LoopKind::Serial;
        }
        vec![Stmt::For(found)]
    });
    mark_outermost(&mut program.body);
}

fn mark_outermost(body: &mut [Stmt]) {
    for statement in body {
        match statement {
            Stmt::For(found) if found.kind == LoopKind::Serial && found.is_independent() => {
                found.kind = LoopKind::Parallel;
            }
            other => other.bodies_mut().into_iter().for_each(|body| mark_outermost(body)),
        }
    }
}

fn contains_loop(statement: &Stmt) -> bool {
    let mut found = false;
    statement.visit(&mut |inner| found |= matches!(inner, Stmt::For(_)));
    found
}

/// Replaces every loop by what `change` makes of it, inner ones first.
pub(super) fn change_loops(body: &mut Vec<Stmt>, change: &mut impl FnMut(For) -> Vec<Stmt>) {
    let mut changed = Vec::with_capacity(body.len());
    for mut statement in body.drain(..) {
        statement.bodies_mut().into_iter().for_each(|body| change_loops(body, change));
        match statement {
            Stmt::For(found) => changed.extend(change(found)),
            other => changed.push(other),
        }
    }
    *body = changed;
}

fn bin(op: BinOp, a: Expr, b: Expr) -> Expr {
    Expr::Bin(op, Box::new(a), Box::new(b))
}

/// `for i in m count n { .. }` as blocks of `factor` turns of kind `inner`, and a loop over the turns that are left.
fn in_blocks(found: For, factor: usize, inner: Option<LoopKind>, names: &mut Names) -> Vec<Stmt> {
    let For { var, min, extent, kind, body } = found;
    let width = Expr::I64(factor as i64);
    let [first, count, block, lane, left] =
        ["min", "count", "block", "lane", "left"].map(|part| names.fresh(&format!("{var}_{part}")));
    let of = |name: &String| Expr::Var(name.clone());
    // A loop without turns has no blocks either.
    let turns = bin(BinOp::Max, of(&count), Expr::I64(0));
    let blocks = bin(BinOp::Div, turns.clone(), width.clone());
    let done = bin(BinOp::Mul, blocks.clone(), width.clone());
    let start = bin(BinOp::Add, of(&first), bin(BinOp::Mul, of(&block), width.clone()));
    let at_lane = |lane: Expr| bin(BinOp::Add, start.clone(), lane);
    let mut in_block = body.clone();
    substitute(&mut in_block, &var, &at_lane(of(&lane)));
    let mut at_end = body;
    rename_bound(&mut at_end, names);
    substitute(&mut at_end, &var, &of(&left));
    let lanes = For {
        var: lane,
        min: Expr::I64(0),
        extent: width.clone(),
        kind: inner.unwrap_or(LoopKind::Serial),
        body: in_block,
    };
    let whole = For { var: block, min: Expr::I64(0), extent: blocks, kind, body: vec![Stmt::For(lanes)] };
    let rest = For {
        var: left,
        min: bin(BinOp::Add, of(&first), done.clone()),
        extent: bin(BinOp::Sub, turns, done),
        kind: LoopKind::Serial,
        body: at_end,
    };
    // The bounds are computed once, before the first turn changes what they may depend on.
    let body = vec![Stmt::For(whole), Stmt::For(rest)];
    let count = Stmt::Let { var: count, value: extent, body };
    vec![Stmt::Let { var: first, value: min, body: vec![count] }]
}

/// Gives what is bound inside of a copy new names.
fn rename_bound(body: &mut [Stmt], names: &mut Names) {
    let taken = names.0.clone();
    let mut copy = Program { name: String::new(), params: Vec::new(), body: body.to_vec() };
    copy.make_names_differ_from(taken);
    names.0.extend(Names::of(&copy).0);
    body.clone_from_slice(&copy.body);
}

/// Peels borders: `for i in a count n { if i >= c {..} .. }` with literal a, n and c becomes two loops, in each of which
/// the condition is known.
pub fn partition(program: &mut Program) {
    let mut names = Names::of(program);
    change_loops(&mut program.body, &mut |found| partitioned(found, &mut names));
}

fn partitioned(found: For, names: &mut Names) -> Vec<Stmt> {
    let (Expr::I64(min), Expr::I64(extent)) = (&found.min, &found.extent) else {
        return vec![Stmt::For(found)];
    };
    let (min, extent) = (*min, *extent);
    let Some(end) = min.checked_add(extent) else { return vec![Stmt::For(found)] };
    let mut seam = None;
    for statement in &found.body {
        statement.visit(&mut |statement| {
            if let Stmt::If { cond, .. } = statement {
                seam =
                    seam.or_else(|| turning_point(cond, &found.var).filter(|at| (min + 1..end).contains(at)));
            }
        });
    }
    let Some(seam) = seam else { return vec![Stmt::For(found)] };
    let part = |from: i64, to: i64, body: Vec<Stmt>, var: String| {
        let mut part =
            For { var, min: Expr::I64(from), extent: Expr::I64(to - from), kind: found.kind, body };
        settle(&mut part.body, &part.var, from, to);
        part
    };
    let mut rest = found.body.clone();
    rename_bound(&mut rest, names);
    let late = names.fresh(&found.var);
    substitute(&mut rest, &found.var, &Expr::Var(late.clone()));
    let first = part(min, seam, found.body.clone(), found.var.clone());
    let last = part(seam, end, rest, late);
    // There may be a second border in either.
    [partitioned(first, names), partitioned(last, names)].concat()
}

/// The first value of a variable from which on a comparison with a literal is settled otherwise than before.
fn turning_point(cond: &Expr, var: &str) -> Option<i64> {
    match cond {
        Expr::Bin(op, a, b) => match (op, &**a, &**b) {
            (BinOp::Lt | BinOp::Ge, Expr::Var(name), Expr::I64(limit)) if name == var => Some(*limit),
            (BinOp::Le | BinOp::Gt, Expr::Var(name), Expr::I64(limit)) if name == var => limit.checked_add(1),
            (BinOp::And | BinOp::Or, a, b) => turning_point(a, var).or_else(|| turning_point(b, var)),
            _ => None,
        },
        _ => None,
    }
}

/// Answers comparisons of a variable that runs from `from` to below `to` with literals.
fn settle(body: &mut [Stmt], var: &str, from: i64, to: i64) {
    let mut change = |expr: &mut Expr| {
        let answer = match expr {
            Expr::Bin(op, a, b) => match (op, &**a, &**b) {
                (BinOp::Lt, Expr::Var(name), Expr::I64(limit)) if name == var => {
                    known(to <= *limit, from >= *limit)
                }
                (BinOp::Ge, Expr::Var(name), Expr::I64(limit)) if name == var => {
                    known(from >= *limit, to <= *limit)
                }
                (BinOp::Le, Expr::Var(name), Expr::I64(limit)) if name == var => {
                    known(to - 1 <= *limit, from > *limit)
                }
                (BinOp::Gt, Expr::Var(name), Expr::I64(limit)) if name == var => {
                    known(from > *limit, to - 1 <= *limit)
                }
                _ => None,
            },
            _ => None,
        };
        if let Some(answer) = answer {
            *expr = Expr::Bool(answer);
        }
    };
    body.iter_mut().for_each(|statement| statement.rewrite_exprs(&mut change));
}

fn known(yes: bool, no: bool) -> Option<bool> {
    if yes {
        Some(true)
    } else if no {
        Some(false)
    } else {
        None
    }
}
