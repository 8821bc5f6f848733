//! Values that are the same in every turn, computed before the loop.

use std::collections::HashSet;

use super::super::program::{Expr, For, Program, Stmt};
use super::split::{Names, change_loops};

/// Gives the largest expressions that depend on nothing inside of a loop a name before it, if they can neither trap nor read a
/// buffer; from inner loops outwards, as far as they can go.
pub fn hoist_invariant(program: &mut Program) {
    let mut names = Names::of(program);
    change_loops(&mut program.body, &mut |found| vec![with_values_before(found, &mut names)]);
}

fn with_values_before(mut found: For, names: &mut Names) -> Stmt {
    let mut inside = HashSet::from([found.var.clone()]);
    for statement in &found.body {
        statement.visit(&mut |statement| inside.extend(statement.binding().map(String::from)));
    }
    let mut values: Vec<(String, Expr)> = Vec::new();
    let mut name_of = |part: &Expr| {
        if !is_computed(part) || !part.is_pure() || mentions(part, &inside) {
            return None;
        }
        let known = values.iter().find(|(_, value)| value == part).map(|(name, _)| name.clone());
        let name = known.unwrap_or_else(|| {
            let name = names.fresh(&format!("{}_same", found.var));
            values.push((name.clone(), part.clone()));
            name
        });
        Some(Expr::Var(name))
    };
    found.body.iter_mut().for_each(|statement| replace_in(statement, &mut name_of));
    let before = |body, (var, value)| Stmt::Let { var, value, body: vec![body] };
    values.into_iter().rev().fold(Stmt::For(found), before)
}

fn replace_in(statement: &mut Stmt, replacement: &mut impl FnMut(&Expr) -> Option<Expr>) {
    statement.exprs_mut().into_iter().for_each(|expr| expr.replace_largest(replacement));
    statement.bodies_mut().into_iter().flatten().for_each(|inner| replace_in(inner, replacement));
}

fn is_computed(expr: &Expr) -> bool {
    matches!(expr, Expr::Bin(..) | Expr::Un(..) | Expr::Select(..) | Expr::Cast(..) | Expr::Call(..))
}

fn mentions(expr: &Expr, names: &HashSet<String>) -> bool {
    let mut found = false;
    expr.visit(&mut |part| found |= matches!(part, Expr::Var(name) if names.contains(name)));
    found
}
