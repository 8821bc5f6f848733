//! The verifier: every name is known, every type fits, every index has as many parts as its buffer has axes.
//!
//! What passes is resolved: variables and buffers have places instead of names, so that running it looks nothing up and
//! meets no type that does not fit.

use kiln_core::{Error, Result};

use super::program::{BinOp, Expr, For, Function, Io, Program, ScalarType, Stmt, UnOp};
use super::value::Value;

/// Most elements of all buffers together: a small file must not fill the memory.
const MAX_ELEMENTS: usize = 1 << 28;
/// Words of the text form, which name nothing.
const WORDS: [&str; 17] = [
    "program",
    "for",
    "in",
    "count",
    "parallel",
    "vectorized",
    "unrolled",
    "alloc",
    "on",
    "if",
    "else",
    "let",
    "assert",
    "true",
    "false",
    "out",
    "inout",
];

/// A program that passed the verifier.
#[derive(Debug, Clone)]
pub struct Checked {
    pub(super) body: Vec<Step>,
    pub(super) buffers: Vec<BufferSpec>,
    pub(super) variables: usize,
}

/// What is known of a buffer: first those of the parameters, then one for every `alloc`.
#[derive(Debug, Clone)]
pub(super) struct BufferSpec {
    pub name: String,
    pub dtype: ScalarType,
    pub shape: Vec<usize>,
    pub written: bool,
}

/// A statement with places instead of names.
#[derive(Debug, Clone)]
pub(super) enum Step {
    For { variable: usize, min: Code, extent: Code, body: Vec<Step> },
    Store { buffer: usize, index: Vec<Code>, value: Code },
    Alloc { buffer: usize, body: Vec<Step> },
    If { condition: Code, then: Vec<Step>, otherwise: Vec<Step> },
    Let { variable: usize, value: Code, body: Vec<Step> },
    Assert { condition: Code, message: String },
}

/// An expression with places instead of names.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Code {
    Constant(Value),
    Variable(usize),
    Load { buffer: usize, index: Vec<Code> },
    Binary(BinOp, Box<(Code, Code)>),
    Unary(UnOp, Box<Code>),
    Select(Box<(Code, Code, Code)>),
    Cast(ScalarType, Box<Code>),
    Call(Function, Vec<Code>),
}

/// Verifies a program.
///
/// # Errors
/// Names the first place that is wrong, as a path in the program's JSON.
pub fn check(program: &Program) -> Result<Checked> {
    let mut checker = Checker {
        program: &program.name,
        scope: Vec::new(),
        buffers: Vec::new(),
        variables: 0,
        elements: 0,
        path: Vec::new(),
    };
    for (number, param) in program.params.iter().enumerate() {
        let twice = program.params[..number].iter().any(|other| other.name == param.name);
        checker.within(format!("params[{number}]"), |checker| {
            if twice {
                return Err(checker.wrong(format!("\"{}\" names two parameters", param.name)));
            }
            checker.add_buffer(&param.name, param.dtype, &param.shape, param.io != Io::In)
        })?;
    }
    let body = checker.steps("body", &program.body)?;
    let Checker { buffers, variables, .. } = checker;
    Ok(Checked { body, buffers, variables })
}

/// What a name stands for.
#[derive(Debug, Clone)]
enum Meaning {
    Variable(usize, ScalarType),
    Buffer(usize),
}

struct Checker<'a> {
    program: &'a str,
    /// Names in sight, the last first.
    scope: Vec<(String, Meaning)>,
    buffers: Vec<BufferSpec>,
    variables: usize,
    /// Of all buffers.
    elements: usize,
    path: Vec<String>,
}

impl Checker<'_> {
    fn wrong(&self, found: String) -> Error {
        Error::input(format!("program \"{}\", {}", self.program, self.path.join(".")), found)
    }

    /// Does something one level deeper in the program's JSON.
    fn within<T>(&mut self, place: String, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.path.push(place);
        let result = work(self);
        self.path.pop();
        result
    }

    fn check_name(&self, name: &str) -> Result<()> {
        let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
        let good =
            name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit() || c == '.');
        if good && !WORDS.contains(&name) {
            return Ok(());
        }
        Err(self.wrong(format!("\"{name}\" is no name"))
            .hint("names are made of letters, digits, _ and ., begin with a letter or _, and are no word of the language"))
    }

    fn add_buffer(&mut self, name: &str, dtype: ScalarType, shape: &[usize], written: bool) -> Result<()> {
        self.check_name(name)?;
        let elements = shape.iter().try_fold(1usize, |n, &extent| n.checked_mul(extent));
        let total = elements.and_then(|elements| self.elements.checked_add(elements));
        self.elements = total.filter(|&total| total <= MAX_ELEMENTS).ok_or_else(|| {
            self.wrong(format!("\"{name}\" has the shape {shape:?}, too large"))
                .hint("all buffers of a program together hold at most 2^28 elements")
        })?;
        self.scope.push((name.into(), Meaning::Buffer(self.buffers.len())));
        self.buffers.push(BufferSpec { name: name.into(), dtype, shape: shape.to_vec(), written });
        Ok(())
    }

    fn add_variable(&mut self, name: &str, ty: ScalarType) -> Result<usize> {
        self.check_name(name)?;
        let place = self.variables;
        self.variables += 1;
        self.scope.push((name.into(), Meaning::Variable(place, ty)));
        Ok(place)
    }

    fn meaning(&self, name: &str) -> Result<Meaning> {
        let found = self.scope.iter().rev().find(|(known, _)| known == name);
        found.map(|(_, meaning)| meaning.clone()).ok_or_else(|| {
            let known: Vec<&str> = self.scope.iter().map(|(known, _)| known.as_str()).collect();
            self.wrong(format!("\"{name}\" is not known here"))
                .hint(format!("in sight are: {}", known.join(", ")))
        })
    }

    fn buffer(&self, name: &str) -> Result<usize> {
        match self.meaning(name)? {
            Meaning::Buffer(place) => Ok(place),
            Meaning::Variable(..) => Err(self.wrong(format!("\"{name}\" is a value, not a buffer"))),
        }
    }

    fn steps(&mut self, place: &str, statements: &[Stmt]) -> Result<Vec<Step>> {
        let in_sight = self.scope.len();
        let steps = statements.iter().enumerate().map(|(number, statement)| {
            let step = self.within(format!("{place}[{number}]"), |checker| checker.step(statement));
            self.scope.truncate(in_sight);
            step
        });
        steps.collect()
    }

    fn step(&mut self, statement: &Stmt) -> Result<Step> {
        match statement {
            Stmt::For(For { var, min, extent, kind: _, body }) => self.within("for".into(), |checker| {
                let min = checker.typed("min", min, ScalarType::I64)?;
                let extent = checker.typed("extent", extent, ScalarType::I64)?;
                let variable = checker.add_variable(var, ScalarType::I64)?;
                Ok(Step::For { variable, min, extent, body: checker.steps("body", body)? })
            }),
            Stmt::Store { buf, idx, value } => self.within("store".into(), |checker| {
                let buffer = checker.buffer(buf)?;
                let BufferSpec { dtype, written, .. } = checker.buffers[buffer];
                if !written {
                    return Err(checker.wrong(format!("\"{buf}\" is an input, which cannot be written")));
                }
                let index = checker.index(buffer, idx)?;
                Ok(Step::Store { buffer, index, value: checker.typed("value", value, dtype)? })
            }),
            Stmt::Alloc { buf, dtype, shape, scope: _, body } => self.within("alloc".into(), |checker| {
                let buffer = checker.buffers.len();
                checker.add_buffer(buf, *dtype, shape, true)?;
                Ok(Step::Alloc { buffer, body: checker.steps("body", body)? })
            }),
            Stmt::If { cond, then, otherwise } => self.within("if".into(), |checker| {
                Ok(Step::If {
                    condition: checker.typed("cond", cond, ScalarType::Bool)?,
                    then: checker.steps("then", then)?,
                    otherwise: checker.steps("else", otherwise)?,
                })
            }),
            Stmt::Let { var, value, body } => self.within("let".into(), |checker| {
                let (value, ty) = checker.within("value".into(), |checker| checker.code(value))?;
                let variable = checker.add_variable(var, ty)?;
                Ok(Step::Let { variable, value, body: checker.steps("body", body)? })
            }),
            Stmt::Assert { cond, msg } => self.within("assert".into(), |checker| {
                let condition = checker.typed("cond", cond, ScalarType::Bool)?;
                Ok(Step::Assert { condition, message: msg.clone() })
            }),
        }
    }

    fn index(&mut self, buffer: usize, index: &[Expr]) -> Result<Vec<Code>> {
        let axes = self.buffers[buffer].shape.len();
        if index.len() != axes {
            let name = &self.buffers[buffer].name;
            return Err(self.wrong(format!("\"{name}\" has {axes} axes and gets {} indices", index.len())));
        }
        let part = |(axis, part)| self.typed(&format!("idx[{axis}]"), part, ScalarType::I64);
        index.iter().enumerate().map(part).collect()
    }

    fn typed(&mut self, place: &str, expr: &Expr, expected: ScalarType) -> Result<Code> {
        self.within(place.into(), |checker| match checker.code(expr)? {
            (code, found) if found == expected => Ok(code),
            (_, found) => Err(checker.wrong(format!("is of type {found}, must be {expected}"))),
        })
    }

    fn code(&mut self, expr: &Expr) -> Result<(Code, ScalarType)> {
        let constant = |value: Value| Ok((Code::Constant(value), value.ty()));
        match expr {
            Expr::I32(value) => constant(Value::I32(*value)),
            Expr::I64(value) => constant(Value::I64(*value)),
            Expr::F32(value) => constant(Value::F32(*value)),
            Expr::F64(value) => constant(Value::F64(*value)),
            Expr::Bool(value) => constant(Value::Bool(*value)),
            Expr::Var(name) => match self.meaning(name)? {
                Meaning::Variable(place, ty) => Ok((Code::Variable(place), ty)),
                Meaning::Buffer(_) => Err(self
                    .wrong(format!("\"{name}\" is a buffer, not a value"))
                    .hint("load an element of it")),
            },
            Expr::Load { buf, idx } => self.within("load".into(), |checker| {
                let buffer = checker.buffer(buf)?;
                let dtype = checker.buffers[buffer].dtype;
                Ok((Code::Load { buffer, index: checker.index(buffer, idx)? }, dtype))
            }),
            Expr::Bin(op, a, b) => self.within(format!("bin({op})"), |checker| {
                let (a, ty) = checker.within("[1]".into(), |checker| checker.code(a))?;
                let b = checker.typed("[2]", b, ty)?;
                checker.takes(op.takes(ty), op, ty)?;
                let result = if op.compares() { ScalarType::Bool } else { ty };
                Ok((Code::Binary(*op, Box::new((a, b))), result))
            }),
            Expr::Un(op, a) => self.within(format!("un({op})"), |checker| {
                let (a, ty) = checker.code(a)?;
                checker.takes(op.takes(ty), op, ty)?;
                Ok((Code::Unary(*op, Box::new(a)), ty))
            }),
            Expr::Select(condition, yes, no) => self.within("select".into(), |checker| {
                let condition = checker.typed("[0]", condition, ScalarType::Bool)?;
                let (yes, ty) = checker.within("[1]".into(), |checker| checker.code(yes))?;
                let no = checker.typed("[2]", no, ty)?;
                Ok((Code::Select(Box::new((condition, yes, no))), ty))
            }),
            Expr::Cast(to, a) => self.within("cast".into(), |checker| {
                let (a, _) = checker.code(a)?;
                Ok((Code::Cast(*to, Box::new(a)), *to))
            }),
            Expr::Call(function, arguments) => self.within(format!("call({function})"), |checker| {
                let expected = function.arity();
                if arguments.len() != expected {
                    return Err(
                        checker.wrong(format!("has {} arguments, must have {expected}", arguments.len()))
                    );
                }
                let (first, ty) = checker.code(&arguments[0])?;
                checker.takes(ty.is_float(), function, ty)?;
                let others = arguments[1..].iter().map(|argument| checker.typed("[1]", argument, ty));
                let codes = [Ok(first)].into_iter().chain(others).collect::<Result<_>>()?;
                Ok((Code::Call(*function, codes), ty))
            }),
        }
    }

    fn takes(&self, fits: bool, operation: &dyn std::fmt::Display, ty: ScalarType) -> Result<()> {
        if fits { Ok(()) } else { Err(self.wrong(format!("{operation} does not take {ty}"))) }
    }
}
