//! Which values 64-bit whole numbers of a program can have, so that a target leaves out checks that cannot fail
//! (`bounds-check-elision`).
//!
//! Nothing is known of 32-bit numbers, which wrap earlier than these ranges are computed.

use super::check::{Checked, Code};
use super::program::BinOp;
use super::value::Value;

/// The lowest and the highest value.
pub(super) type Range = (i64, i64);

/// What is known of the variables in sight, and of expressions that a condition has tested.
#[derive(Debug, Default)]
pub(super) struct Ranges {
    /// By the variables' places.
    variables: Vec<Option<Range>>,
    tested: Vec<(Code, Range)>,
}

impl Ranges {
    pub fn new(checked: &Checked) -> Self {
        Self { variables: vec![None; checked.variables], tested: Vec::new() }
    }

    /// Learns what a loop's variable can be.
    pub fn enter_loop(&mut self, variable: usize, min: &Code, extent: &Code) {
        self.variables[variable] = self.of(min).zip(self.of(extent)).and_then(|(min, extent)| {
            let last = min.1.checked_add(extent.1.checked_sub(1)?)?;
            (last >= min.0).then_some((min.0, last))
        });
    }

    /// Learns what a name stands for.
    pub fn enter_let(&mut self, variable: usize, value: &Code) {
        self.variables[variable] = self.of(value);
    }

    /// Learns from a condition that holds; how much is forgotten by [`leave`](Self::leave).
    pub fn enter_condition(&mut self, condition: &Code) -> usize {
        let known = self.tested.len();
        self.learn(condition);
        known
    }

    /// Forgets what was learnt since.
    pub fn leave(&mut self, known: usize) {
        self.tested.truncate(known);
    }

    fn learn(&mut self, condition: &Code) {
        let Code::Binary(op, operands) = condition else { return };
        let (a, b) = &**operands;
        if *op == BinOp::And {
            self.learn(a);
            return self.learn(b);
        }
        // What lies in a buffer may change.
        let Code::Constant(Value::I64(bound)) = b else { return };
        if a.reads() {
            return;
        }
        let range = match op {
            BinOp::Ge => (Some(*bound), None),
            BinOp::Gt => (bound.checked_add(1), None),
            BinOp::Le => (None, Some(*bound)),
            BinOp::Lt => (None, bound.checked_sub(1)),
            _ => return,
        };
        let known = self.of(a).unwrap_or((i64::MIN, i64::MAX));
        let range = (known.0.max(range.0.unwrap_or(i64::MIN)), known.1.min(range.1.unwrap_or(i64::MAX)));
        self.tested.push((a.clone(), range));
    }

    /// Whether an index always lies within an extent.
    pub fn is_within(&self, index: &Code, extent: usize) -> bool {
        self.of(index).is_some_and(|(low, high)| low >= 0 && high < extent as i64)
    }

    /// What a whole number can be; `None` where nothing bounds it.
    pub fn of(&self, code: &Code) -> Option<Range> {
        if let Some((_, range)) = self.tested.iter().rev().find(|(tested, _)| tested == code) {
            return Some(*range);
        }
        match code {
            Code::Constant(Value::I64(value)) => Some((*value, *value)),
            Code::Variable(place) => self.variables[*place],
            Code::Binary(op, operands) => self.of_binary(*op, self.of(&operands.0)?, self.of(&operands.1)?),
            Code::Select(parts) => {
                let (a, b) = (self.of(&parts.1)?, self.of(&parts.2)?);
                Some((a.0.min(b.0), a.1.max(b.1)))
            }
            _ => None,
        }
    }

    fn of_binary(&self, op: BinOp, a: Range, b: Range) -> Option<Range> {
        match op {
            BinOp::Add => Some((a.0.checked_add(b.0)?, a.1.checked_add(b.1)?)),
            BinOp::Sub => Some((a.0.checked_sub(b.1)?, a.1.checked_sub(b.0)?)),
            BinOp::Mul => {
                let corner = i64::checked_mul;
                let corners = [corner(a.0, b.0)?, corner(a.0, b.1)?, corner(a.1, b.0)?, corner(a.1, b.1)?];
                Some((*corners.iter().min()?, *corners.iter().max()?))
            }
            BinOp::Min => Some((a.0.min(b.0), a.1.min(b.1))),
            BinOp::Max => Some((a.0.max(b.0), a.1.max(b.1))),
            BinOp::FloorDiv if b.0 == b.1 && b.0 > 0 => Some((a.0.div_euclid(b.0), a.1.div_euclid(b.0))),
            BinOp::FloorMod if b.0 == b.1 && b.0 > 0 => {
                Some(if a.0 >= 0 && a.1 < b.0 { a } else { (0, b.0 - 1) })
            }
            _ => None,
        }
    }
}

impl Code {
    /// Whether its value depends on a variable.
    pub(super) fn mentions(&self, variable: usize) -> bool {
        match self {
            Self::Constant(_) => false,
            Self::Variable(place) => *place == variable,
            Self::Load { index: parts, .. } | Self::Call(_, parts) => {
                parts.iter().any(|part| part.mentions(variable))
            }
            Self::Binary(_, operands) => operands.0.mentions(variable) || operands.1.mentions(variable),
            Self::Unary(_, a) | Self::Cast(_, a) => a.mentions(variable),
            Self::Select(parts) => [&parts.0, &parts.1, &parts.2].iter().any(|part| part.mentions(variable)),
        }
    }

    /// Whether its value depends on a buffer.
    pub(super) fn reads(&self) -> bool {
        match self {
            Self::Constant(_) | Self::Variable(_) => false,
            Self::Load { .. } => true,
            Self::Binary(_, operands) => operands.0.reads() || operands.1.reads(),
            Self::Unary(_, a) | Self::Cast(_, a) => a.reads(),
            Self::Select(parts) => parts.0.reads() || parts.1.reads() || parts.2.reads(),
            Self::Call(_, arguments) => arguments.iter().any(Self::reads),
        }
    }

    /// By how much a whole number grows when a variable grows by one; `None` where that is not always the same.
    pub(super) fn step(&self, variable: usize) -> Option<i64> {
        match self {
            Self::Variable(place) if *place == variable => Some(1),
            _ if !self.mentions(variable) => Some(0),
            Self::Binary(op, operands) => {
                let (a, b) = (&operands.0, &operands.1);
                match (op, a, b) {
                    (BinOp::Add, ..) => a.step(variable)?.checked_add(b.step(variable)?),
                    (BinOp::Sub, ..) => a.step(variable)?.checked_sub(b.step(variable)?),
                    (BinOp::Mul, x, Self::Constant(Value::I64(factor)))
                    | (BinOp::Mul, Self::Constant(Value::I64(factor)), x) => {
                        x.step(variable)?.checked_mul(*factor)
                    }
                    _ => None,
                }
            }
            _ => None,
        }
    }
}
