//! Loops joined with their neighbours, and exchanged with those around them.

use std::collections::HashSet;

use super::super::interpret::Trap;
use super::super::program::{Expr, For, Program, Stmt};
use super::super::walk::substitute;
use super::split::change_loops;

/// Joins neighbouring loops over the same turns, where no turn of the second meets what another turn of the first touches.
pub fn fuse_loops(program: &mut Program) {
    fuse(&mut program.body);
}

fn fuse(body: &mut Vec<Stmt>) {
    let mut fused: Vec<Stmt> = Vec::with_capacity(body.len());
    for statement in body.drain(..) {
        match (fused.last_mut(), statement) {
            (Some(Stmt::For(first)), Stmt::For(second)) if can_join(first, &second) => {
                let For { var, body: mut joined, .. } = second;
                substitute(&mut joined, &var, &Expr::Var(first.var.clone()));
                first.body.append(&mut joined);
            }
            (_, other) => fused.push(other),
        }
    }
    *body = fused;
    body.iter_mut().flat_map(Stmt::bodies_mut).for_each(fuse);
}

fn can_join(first: &For, second: &For) -> bool {
    let same_turns = first.kind == second.kind && first.min == second.min && first.extent == second.extent;
    let [a, b] = [first, second].map(|found| traps(&found.body));
    // Which of two traps comes first may change.
    let same_traps = a.is_empty() || b.is_empty() || a.union(&b).count() == 1;
    same_turns && first.min.is_pure() && first.extent.is_pure() && same_traps && first.is_apart_from(second)
}

/// Exchanges loops that stand right inside of each other where more elements then follow one another from turn to turn of the inner
/// one, if the turns of the outer one are independent.
pub fn reorder(program: &mut Program) {
    change_loops(&mut program.body, &mut |found| vec![Stmt::For(with_best_inside(found))]);
}

fn with_best_inside(mut outer: For) -> For {
    let [Stmt::For(inner)] = &mut outer.body[..] else { return outer };
    let fixed = |bound: &Expr| {
        let mut fixed = bound.is_pure();
        bound.visit(&mut |part| fixed &= !matches!(part, Expr::Var(name) if *name == outer.var));
        fixed
    };
    let exchanges = fixed(&inner.min)
        && fixed(&inner.extent)
        && traps(&inner.body).len() <= 1
        && unit_steps(&inner.body, &outer.var) > unit_steps(&inner.body, &inner.var);
    if !exchanges || !outer.is_independent() {
        return outer;
    }
    let Some(Stmt::For(mut inner)) = outer.body.pop() else { return outer };
    std::mem::swap(&mut outer.body, &mut inner.body);
    // It may belong further in yet.
    inner.body = vec![Stmt::For(with_best_inside(outer))];
    inner
}

/// How many accesses go from an element to the next when a variable grows by one.
fn unit_steps(body: &[Stmt], var: &str) -> usize {
    let mut count = 0;
    let mut look = |idx: &[Expr]| {
        let step = |index: &Expr| index.step_of(var);
        let Some((last, others)) = idx.split_last() else { return };
        let along = step(last).is_some_and(|step| step.abs() == 1);
        count += usize::from(along && others.iter().all(|index| step(index) == Some(0)));
    };
    for statement in body {
        statement.visit(&mut |statement| {
            for expr in statement.exprs() {
                expr.visit(&mut |part| {
                    if let Expr::Load { idx, .. } = part {
                        look(idx);
                    }
                });
            }
            if let Stmt::Store { idx, .. } = statement {
                look(idx);
            }
        });
    }
    count
}

/// The ways in which statements may trap.
fn traps(body: &[Stmt]) -> HashSet<Trap> {
    let mut found = HashSet::new();
    for statement in body {
        statement.visit(&mut |statement| {
            match statement {
                Stmt::Store { .. } => found.extend([Trap::OutOfBounds]),
                Stmt::Assert { msg, .. } => found.extend([Trap::Assertion(msg.clone())]),
                _ => {}
            }
            for expr in statement.exprs() {
                expr.visit(&mut |part| {
                    found.extend(matches!(part, Expr::Load { .. }).then_some(Trap::OutOfBounds));
                    found.extend(part.may_divide_by_zero().then_some(Trap::DivisionByZero));
                });
            }
        });
    }
    found
}
