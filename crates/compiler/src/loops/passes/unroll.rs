//! Loops as straight code.

use super::super::program::{BinOp, Expr, For, LoopKind, Program, Stmt};
use super::super::walk::substitute;

/// Writes loops that are marked as unrolled out, inner ones first, where the number of their turns is known and at most
/// `most`; of others the mark is taken.
pub fn unroll(program: &mut Program, most: usize) {
    unroll_body(&mut program.body, most);
}

fn unroll_body(body: &mut Vec<Stmt>, most: usize) {
    let mut unrolled = Vec::with_capacity(body.len());
    for mut statement in body.drain(..) {
        statement.bodies_mut().into_iter().for_each(|body| unroll_body(body, most));
        match statement {
            Stmt::For(For {
                kind: LoopKind::Unrolled,
                ref var,
                ref min,
                extent: Expr::I64(extent),
                ref body,
            }) if min.is_pure() && extent <= most as i64 => {
                for turn in 0..extent {
                    let mut copy = body.clone();
                    let value = Expr::Bin(BinOp::Add, Box::new(min.clone()), Box::new(Expr::I64(turn)));
                    substitute(&mut copy, var, &value);
                    unrolled.append(&mut copy);
                }
            }
            Stmt::For(For { kind: ref mut kind @ LoopKind::Unrolled, .. }) => {
                *kind = LoopKind::Serial;
                unrolled.push(statement);
            }
            other => unrolled.push(other),
        }
    }
    *body = unrolled;
}
