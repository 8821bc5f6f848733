//! The reference interpreter: it defines what a program means.

use std::collections::BTreeMap;
use std::fmt;

use kiln_core::Result;

use super::buffer::{Buffer, fit};
use super::check::{Checked, Code, Step};
use super::program::{BinOp, Io, Program, ScalarType};
use super::value::Value;

/// Why a program stopped before its end.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Trap {
    /// An integer was divided by zero.
    DivisionByZero,
    /// A buffer has no element at an index.
    OutOfBounds,
    /// A condition did not hold.
    Assertion(String),
    /// More statements ran than were allowed.
    StepLimit,
}

impl fmt::Display for Trap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DivisionByZero => f.write_str("division by zero"),
            Self::OutOfBounds => f.write_str("out of bounds"),
            Self::Assertion(message) => write!(f, "assertion: {message}"),
            Self::StepLimit => f.write_str("step limit"),
        }
    }
}

/// What a program leaves: its outputs by name, or a trap.
pub type Outcome = Result<BTreeMap<String, Buffer>, Trap>;

/// Runs a program serially, at most `max_steps` statements and loop turns.
///
/// # Errors
/// When an input is missing or does not fit; a trap is no error but an outcome.
pub fn interpret(
    program: &Program,
    checked: &Checked,
    inputs: &BTreeMap<String, Buffer>,
    max_steps: u64,
) -> Result<Outcome> {
    let mut buffers = Vec::with_capacity(checked.buffers.len());
    for param in &program.params {
        buffers.push(match param.io {
            Io::Out => Buffer::zeros(param.dtype, &param.shape),
            Io::In | Io::Inout => fit(inputs.get(&param.name), &param.name, param.dtype, &param.shape)?,
        });
    }
    // Buffers inside of the program are made when they are reached.
    buffers.resize_with(checked.buffers.len(), || Buffer::zeros(ScalarType::Bool, &[0]));
    let mut machine = Machine {
        checked,
        buffers,
        variables: vec![Value::I64(0); checked.variables],
        steps_left: max_steps,
    };
    Ok(machine.run(&checked.body).map(|()| {
        let results = program.params.iter().zip(machine.buffers).filter(|(param, _)| param.io != Io::In);
        results.map(|(param, buffer)| (param.name.clone(), buffer)).collect()
    }))
}

struct Machine<'a> {
    checked: &'a Checked,
    buffers: Vec<Buffer>,
    variables: Vec<Value>,
    steps_left: u64,
}

impl Machine<'_> {
    fn run(&mut self, steps: &[Step]) -> Result<(), Trap> {
        steps.iter().try_for_each(|step| self.step(step))
    }

    fn count(&mut self) -> Result<(), Trap> {
        self.steps_left = self.steps_left.checked_sub(1).ok_or(Trap::StepLimit)?;
        Ok(())
    }

    fn step(&mut self, step: &Step) -> Result<(), Trap> {
        self.count()?;
        match step {
            Step::For { variable, min, extent, body } => {
                let (min, extent) = (self.integer(min)?, self.integer(extent)?);
                for turn in 0..extent {
                    self.count()?;
                    self.variables[*variable] = Value::I64(min.wrapping_add(turn));
                    self.run(body)?;
                }
                Ok(())
            }
            Step::Store { buffer, index, value } => {
                let at = self.place(*buffer, index)?;
                let value = self.evaluate(value)?;
                self.buffers[*buffer].set(at, value);
                Ok(())
            }
            Step::Alloc { buffer, body } => {
                let spec = &self.checked.buffers[*buffer];
                if self.buffers[*buffer].shape == spec.shape && self.buffers[*buffer].dtype() == spec.dtype {
                    self.buffers[*buffer].clear();
                } else {
                    self.buffers[*buffer] = Buffer::zeros(spec.dtype, &spec.shape);
                }
                self.run(body)
            }
            Step::If { condition, then, otherwise } => match self.truth(condition)? {
                true => self.run(then),
                false => self.run(otherwise),
            },
            Step::Let { variable, value, body } => {
                self.variables[*variable] = self.evaluate(value)?;
                self.run(body)
            }
            Step::Assert { condition, message } => match self.truth(condition)? {
                true => Ok(()),
                false => Err(Trap::Assertion(message.clone())),
            },
        }
    }

    /// Where an element lies.
    fn place(&self, buffer: usize, index: &[Code]) -> Result<usize, Trap> {
        let mut at = 0;
        for (part, &extent) in index.iter().zip(&self.checked.buffers[buffer].shape) {
            let part = usize::try_from(self.integer(part)?).map_err(|_| Trap::OutOfBounds)?;
            if part >= extent {
                return Err(Trap::OutOfBounds);
            }
            at = at * extent + part;
        }
        Ok(at)
    }

    fn integer(&self, code: &Code) -> Result<i64, Trap> {
        match self.evaluate(code)? {
            Value::I64(value) => Ok(value),
            other => unreachable!("{other:?} as an index passes no check"),
        }
    }

    fn truth(&self, code: &Code) -> Result<bool, Trap> {
        match self.evaluate(code)? {
            Value::Bool(value) => Ok(value),
            other => unreachable!("{other:?} as a condition passes no check"),
        }
    }

    fn evaluate(&self, code: &Code) -> Result<Value, Trap> {
        match code {
            Code::Constant(value) => Ok(*value),
            Code::Variable(place) => Ok(self.variables[*place]),
            Code::Load { buffer, index } => Ok(self.buffers[*buffer].get(self.place(*buffer, index)?)),
            Code::Binary(op, operands) => {
                let (a, b) = &**operands;
                // Of truth values the second is computed only where it matters.
                match (op, self.evaluate(a)?) {
                    (BinOp::And, Value::Bool(false)) => Ok(Value::Bool(false)),
                    (BinOp::Or, Value::Bool(true)) => Ok(Value::Bool(true)),
                    (op, a) => a.binary(*op, self.evaluate(b)?),
                }
            }
            Code::Unary(op, a) => Ok(self.evaluate(a)?.unary(*op)),
            Code::Select(operands) => {
                let (condition, yes, no) = &**operands;
                self.evaluate(if self.truth(condition)? { yes } else { no })
            }
            Code::Cast(to, a) => Ok(self.evaluate(a)?.cast(*to)),
            Code::Call(function, arguments) => {
                let first = self.evaluate(&arguments[0])?;
                let mut values = [first; 3];
                for (value, argument) in values.iter_mut().zip(arguments).skip(1) {
                    *value = self.evaluate(argument)?;
                }
                Ok(Value::call(*function, values))
            }
        }
    }
}
