//! Four turns of a vectorised loop at once, in the lanes of SIMD128.
//!
//! Each lane computes what its turn computes, operation by operation, so that the results are the same to the bit.

use wasm_encoder::{BlockType, Instruction as I, MemArg, ValType};

use super::Emitter;
use crate::loops::check::{Code, Step};
use crate::loops::program::{BinOp, Function, ScalarType, UnOp};

/// Turns at once.
const LANES: i64 = 4;
/// Elements of four bytes may lie at multiples of four, not of sixteen.
const ALIGNMENT: u32 = 2;

/// What the four lanes of a value are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lane {
    Float,
    /// All bits set, or none.
    Truth,
}

/// The loop whose turns lie in the lanes.
pub(super) struct Lanes {
    variable: usize,
    /// Values that are the same in every turn, and the locals that hold them four times.
    same: Vec<(Code, u32)>,
}

impl Emitter<'_> {
    /// The stores of a loop's body as lanes; `None` where one of them has no such form. `variable` has its range already.
    pub(super) fn lanes_of(&self, variable: usize, body: &[Step]) -> Option<Lanes> {
        if body.is_empty() || !self.side_by_side.contains(&variable) {
            return None;
        }
        let fits = body.iter().all(|step| match step {
            Step::Store { buffer, index, value } => {
                self.is_contiguous(*buffer, index, variable)
                    && self.lane(value, variable) == Some(Lane::Float)
            }
            _ => false,
        });
        fits.then(|| Lanes { variable, same: Vec::new() })
    }

    /// Runs as many turns by fours as there are; `turn` and `value` are the loop's locals.
    pub(super) fn by_fours(
        &mut self,
        mut lanes: Lanes,
        [first, count, turn, value]: [u32; 4],
        body: &[Step],
    ) {
        for step in body {
            if let Step::Store { value, .. } = step {
                self.hoist(value, &mut lanes);
            }
        }
        self.code.extend([I::Block(BlockType::Empty), I::Loop(BlockType::Empty)]);
        self.code.extend([I::LocalGet(turn), I::I64Const(LANES), I::I64Add]);
        self.code.extend([I::LocalGet(count), I::I64GtS, I::BrIf(1)]);
        self.code.extend([I::LocalGet(first), I::LocalGet(turn), I::I64Add, I::LocalSet(value)]);
        for step in body {
            if let Step::Store { buffer, index, value } = step {
                self.place(*buffer, index);
                self.four(value, &lanes);
                let argument = self.four_places(*buffer);
                self.push(I::V128Store(argument));
            }
        }
        self.code.extend([I::LocalGet(turn), I::I64Const(LANES), I::I64Add, I::LocalSet(turn)]);
        self.code.extend([I::Br(0), I::End, I::End]);
    }

    fn four_places(&self, buffer: usize) -> MemArg {
        MemArg { align: ALIGNMENT, ..self.memory_argument(buffer) }
    }

    /// Whether neighbouring turns touch neighbouring floats, all of which are there.
    fn is_contiguous(&self, buffer: usize, index: &[Code], variable: usize) -> bool {
        let spec = &self.checked.buffers[buffer];
        let Some((last, others)) = index.split_last() else { return false };
        spec.dtype == ScalarType::F32
            && last.step(variable) == Some(1)
            && others.iter().all(|part| !part.mentions(variable))
            && index.iter().zip(&spec.shape).all(|(part, &extent)| self.ranges.is_within(part, extent))
    }

    /// Whether computing a value ends in no trap, whatever the turn.
    fn is_safe(&self, code: &Code) -> bool {
        match code {
            Code::Constant(_) | Code::Variable(_) => true,
            Code::Load { buffer, index } => {
                let extents = &self.checked.buffers[*buffer].shape;
                index.iter().zip(extents).all(|(part, &extent)| self.ranges.is_within(part, extent))
                    && index.iter().all(|part| self.is_safe(part))
            }
            Code::Binary(op, operands) => {
                let divides = matches!(op, BinOp::Div | BinOp::Rem | BinOp::FloorDiv | BinOp::FloorMod);
                let floats = self.type_of(&operands.0).is_float();
                let by_zero = divides
                    && !floats
                    && self.ranges.of(&operands.1).is_none_or(|(low, high)| low <= 0 && high >= 0);
                !by_zero && self.is_safe(&operands.0) && self.is_safe(&operands.1)
            }
            Code::Unary(_, a) | Code::Cast(_, a) => self.is_safe(a),
            Code::Select(parts) => [&parts.0, &parts.1, &parts.2].iter().all(|part| self.is_safe(part)),
            Code::Call(_, arguments) => arguments.iter().all(|argument| self.is_safe(argument)),
        }
    }

    /// What the lanes of a value are; `None` where it has none.
    fn lane(&self, code: &Code, variable: usize) -> Option<Lane> {
        if !code.mentions(variable) {
            return match self.type_of(code) {
                ScalarType::F32 if self.is_safe(code) => Some(Lane::Float),
                ScalarType::Bool if self.is_safe(code) => Some(Lane::Truth),
                _ => None,
            };
        }
        let lane = |code: &Code| self.lane(code, variable);
        match code {
            Code::Load { buffer, index } => {
                self.is_contiguous(*buffer, index, variable).then_some(Lane::Float)
            }
            Code::Binary(op, operands) => {
                let both = lane(&operands.0)? == lane(&operands.1)?;
                let floats = lane(&operands.0)? == Lane::Float;
                match op {
                    BinOp::Add | BinOp::Sub | BinOp::Mul | BinOp::Div | BinOp::Min | BinOp::Max => {
                        (both && floats).then_some(Lane::Float)
                    }
                    op if op.compares() => (both && floats).then_some(Lane::Truth),
                    BinOp::And | BinOp::Or | BinOp::Xor => (both && !floats).then_some(Lane::Truth),
                    _ => None,
                }
            }
            Code::Unary(UnOp::Neg | UnOp::Abs, a) => lane(a).filter(|&lane| lane == Lane::Float),
            Code::Unary(UnOp::Not, a) => lane(a).filter(|&lane| lane == Lane::Truth),
            Code::Select(parts) => {
                let (condition, yes, no) = (lane(&parts.0)?, lane(&parts.1)?, lane(&parts.2)?);
                (condition == Lane::Truth && yes == no).then_some(yes)
            }
            Code::Call(Function::Sqrt | Function::Floor | Function::Ceil, arguments) => lane(&arguments[0]),
            _ => None,
        }
    }

    /// Computes what is the same in every turn once, before the loop.
    fn hoist(&mut self, code: &Code, lanes: &mut Lanes) {
        if lanes.same.iter().any(|(known, _)| known == code) {
            return;
        }
        if !code.mentions(lanes.variable) {
            let ty = self.value(code);
            if ty == ScalarType::Bool {
                // 0 or 1 to no bits or all.
                let truth = self.local(ty);
                self.code.extend([I::LocalSet(truth), I::I32Const(0), I::LocalGet(truth), I::I32Sub]);
                self.push(I::I32x4Splat);
            } else {
                self.push(I::F32x4Splat);
            }
            self.locals.push(ValType::V128);
            let local = self.locals.len() as u32 - 1;
            self.push(I::LocalSet(local));
            lanes.same.push((code.clone(), local));
            return;
        }
        match code {
            Code::Binary(_, operands) => {
                self.hoist(&operands.0, lanes);
                self.hoist(&operands.1, lanes);
            }
            Code::Unary(_, a) => self.hoist(a, lanes),
            Code::Select(parts) => {
                [&parts.0, &parts.1, &parts.2].into_iter().for_each(|part| self.hoist(part, lanes))
            }
            Code::Call(_, arguments) => arguments.iter().for_each(|argument| self.hoist(argument, lanes)),
            _ => {}
        }
    }

    /// Leaves four values on the stack.
    fn four(&mut self, code: &Code, lanes: &Lanes) {
        if let Some((_, local)) = lanes.same.iter().find(|(known, _)| known == code) {
            return self.push(I::LocalGet(*local));
        }
        match code {
            Code::Load { buffer, index } => {
                self.place(*buffer, index);
                let argument = self.four_places(*buffer);
                self.push(I::V128Load(argument));
            }
            Code::Binary(op, operands) => {
                self.four(&operands.0, lanes);
                self.four(&operands.1, lanes);
                self.push(match op {
                    BinOp::Add => I::F32x4Add,
                    BinOp::Sub => I::F32x4Sub,
                    BinOp::Mul => I::F32x4Mul,
                    BinOp::Div => I::F32x4Div,
                    BinOp::Min => I::F32x4Min,
                    BinOp::Max => I::F32x4Max,
                    BinOp::Eq => I::F32x4Eq,
                    BinOp::Ne => I::F32x4Ne,
                    BinOp::Lt => I::F32x4Lt,
                    BinOp::Le => I::F32x4Le,
                    BinOp::Gt => I::F32x4Gt,
                    BinOp::Ge => I::F32x4Ge,
                    BinOp::And => I::V128And,
                    BinOp::Or => I::V128Or,
                    BinOp::Xor => I::V128Xor,
                    op => unreachable!("{op} has no lanes"),
                });
            }
            Code::Unary(op, a) => {
                self.four(a, lanes);
                self.push(match op {
                    UnOp::Neg => I::F32x4Neg,
                    UnOp::Abs => I::F32x4Abs,
                    UnOp::Not => I::V128Not,
                });
            }
            Code::Select(parts) => {
                self.four(&parts.1, lanes);
                self.four(&parts.2, lanes);
                self.four(&parts.0, lanes);
                self.push(I::V128Bitselect);
            }
            Code::Call(function, arguments) => {
                self.four(&arguments[0], lanes);
                self.push(match function {
                    Function::Sqrt => I::F32x4Sqrt,
                    Function::Floor => I::F32x4Floor,
                    _ => I::F32x4Ceil,
                });
            }
            Code::Constant(_) | Code::Variable(_) | Code::Cast(..) => {
                unreachable!("what is the same in every turn is hoisted, other values have lanes")
            }
        }
    }
}
