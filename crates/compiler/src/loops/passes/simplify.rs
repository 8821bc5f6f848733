//! Computing what is known before the program runs.

use super::super::program::{BinOp, Expr, For, Program, ScalarType, Stmt, UnOp};
use super::super::value::Value;
use super::super::walk::substitute;

/// Folds constants, uses the laws of integers and truth values, and drops statements without effect.
///
/// Floats are folded only where all operands are literals: `x + 0`, `x * 0` and `x - x` depend on the sign of zero, NaN
/// and infinities.
pub fn simplify(program: &mut Program) {
    program.body.iter_mut().for_each(|statement| statement.rewrite_exprs(&mut fold));
    drop_idle(&mut program.body);
}

/// Puts the values of `let` in the place of its names, where they are literals, variables or sums that cannot trap.
pub fn inline_let(program: &mut Program) {
    inline(&mut program.body);
}

fn inline(body: &mut Vec<Stmt>) {
    let mut inlined = Vec::with_capacity(body.len());
    for statement in body.drain(..) {
        match statement {
            Stmt::Let { ref var, ref value, mut body } if value.is_pure() && size(value) <= 8 => {
                substitute(&mut body, var, value);
                inline(&mut body);
                inlined.append(&mut body);
            }
            mut other => {
                other.bodies_mut().into_iter().for_each(inline);
                inlined.push(other);
            }
        }
    }
    *body = inlined;
}

fn size(expr: &Expr) -> usize {
    let mut parts = 0;
    expr.visit(&mut |_| parts += 1);
    parts
}

fn literal(expr: &Expr) -> Option<Value> {
    match expr {
        Expr::I32(value) => Some(Value::I32(*value)),
        Expr::I64(value) => Some(Value::I64(*value)),
        Expr::F32(value) => Some(Value::F32(*value)),
        Expr::F64(value) => Some(Value::F64(*value)),
        Expr::Bool(value) => Some(Value::Bool(*value)),
        _ => None,
    }
}

fn as_expr(value: Value) -> Expr {
    match value {
        Value::I32(value) => Expr::I32(value),
        Value::I64(value) => Expr::I64(value),
        Value::F32(value) => Expr::F32(value),
        Value::F64(value) => Expr::F64(value),
        Value::Bool(value) => Expr::Bool(value),
    }
}

/// Simplifies an expression whose parts are simple already.
fn fold(expr: &mut Expr) {
    if let Some(simpler) = folded(expr) {
        *expr = simpler;
    }
}

fn folded(expr: &Expr) -> Option<Expr> {
    match expr {
        Expr::Bin(op, a, b) => match (literal(a), literal(b)) {
            // What would trap stays, to trap when it is reached.
            (Some(x), Some(y)) => x.binary(*op, y).ok().map(as_expr),
            _ => by_laws(*op, a, b),
        },
        Expr::Un(op, a) => match (op, &**a, literal(a)) {
            (_, _, Some(value)) => Some(as_expr(value.unary(*op))),
            (UnOp::Not, Expr::Un(UnOp::Not, inner), None) => Some((**inner).clone()),
            _ => None,
        },
        Expr::Cast(to, a) => literal(a).map(|value| as_expr(value.cast(*to))),
        Expr::Select(condition, yes, no) => match literal(condition) {
            Some(Value::Bool(true)) => Some((**yes).clone()),
            Some(Value::Bool(false)) => Some((**no).clone()),
            _ => (yes == no && condition.is_pure()).then(|| (**yes).clone()),
        },
        _ => None,
    }
}

/// The laws of integers, which wrap, and of truth values.
fn by_laws(op: BinOp, a: &Expr, b: &Expr) -> Option<Expr> {
    use BinOp::{Add, And, Div, FloorDiv, FloorMod, Max, Min, Mul, Or, Sub};
    let whole = |expr: &Expr| match expr {
        Expr::I32(value) => Some((i64::from(*value), ScalarType::I32)),
        Expr::I64(value) => Some((*value, ScalarType::I64)),
        _ => None,
    };
    let zero = |ty| as_expr(Value::I64(0).cast(ty));
    match (op, whole(a), whole(b)) {
        (Add, Some((0, _)), _) | (Mul, Some((1, _)), _) => return Some(b.clone()),
        (Add | Sub, _, Some((0, _))) | (Mul | Div | FloorDiv, _, Some((1, _))) => return Some(a.clone()),
        (Mul, Some((0, ty)), _) if b.is_pure() => return Some(zero(ty)),
        (Mul, _, Some((0, ty))) | (FloorMod, _, Some((1, ty))) if a.is_pure() => return Some(zero(ty)),
        // Numbers go to the right, where they meet.
        (Add | Mul, Some(_), None) => return Some(Expr::Bin(op, Box::new(b.clone()), Box::new(a.clone()))),
        (Add | Sub, None, Some(_)) => {
            if let Expr::Bin(inner @ (Add | Sub), x, y) = a
                && let (Some(y), Some(b)) = (literal(y), literal(b))
            {
                let signed = |op: BinOp, value: Value| if op == Sub { value.unary(UnOp::Neg) } else { value };
                let total = signed(*inner, y).binary(Add, signed(op, b)).ok()?;
                return Some(Expr::Bin(Add, x.clone(), Box::new(as_expr(total))));
            }
        }
        _ => {}
    }
    match (op, literal(a), literal(b)) {
        (And, Some(Value::Bool(true)), _) | (Or, Some(Value::Bool(false)), _) => Some(b.clone()),
        (And, _, Some(Value::Bool(true))) | (Or, _, Some(Value::Bool(false))) => Some(a.clone()),
        (And, Some(Value::Bool(false)), _) => Some(Expr::Bool(false)),
        (Or, Some(Value::Bool(true)), _) => Some(Expr::Bool(true)),
        // Of equal integers; NaN is not below itself either way.
        (Min | Max, ..) if a == b && a.is_pure() => Some(a.clone()),
        _ => None,
    }
}

/// Drops loops without turns and what does nothing, and takes the body that a known condition chooses.
fn drop_idle(body: &mut Vec<Stmt>) {
    let mut kept = Vec::with_capacity(body.len());
    for mut statement in body.drain(..) {
        statement.bodies_mut().into_iter().for_each(drop_idle);
        match statement {
            Stmt::For(For { ref min, extent: Expr::I64(..=0), .. }) if min.is_pure() => {}
            Stmt::For(For { ref min, ref extent, ref body, .. })
                if body.is_empty() && min.is_pure() && extent.is_pure() => {}
            Stmt::If { cond: Expr::Bool(true), mut then, .. } => kept.append(&mut then),
            Stmt::If { cond: Expr::Bool(false), mut otherwise, .. } => kept.append(&mut otherwise),
            Stmt::If { ref cond, ref then, ref otherwise }
                if then.is_empty() && otherwise.is_empty() && cond.is_pure() => {}
            Stmt::Let { ref value, ref body, .. } if body.is_empty() && value.is_pure() => {}
            Stmt::Alloc { ref body, .. } if body.is_empty() => {}
            Stmt::Assert { cond: Expr::Bool(true), .. } => {}
            other => kept.push(other),
        }
    }
    *body = kept;
}
