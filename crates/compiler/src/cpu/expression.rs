//! Element-wise computation: expressions over tensors of one shape, and the code that evaluates them tile by tile.
//!
//! Truth values are 0 and 1 here, so that one kind of register does.

use kiln_ops::{simd, vector};

use super::memory::{Elements, Memory};
use super::view::View;

/// Elements evaluated together: all registers of an expression stay in the first-level cache.
const TILE: usize = 512;

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Unary {
    Abs,
    Ceil,
    Cos,
    Erf,
    Exp,
    Floor,
    Gelu,
    LeakyRelu(f32),
    Log,
    Log1p,
    LogSigmoid,
    Negate,
    Not,
    IsNan,
    IsInfinite,
    Reciprocal,
    Relu,
    Round,
    Sigmoid,
    Sign,
    Sin,
    Sqrt,
    Tanh,
    Truncate,
    Arccos,
    Arccosh,
    Arcsin,
    Arcsinh,
    Arctan,
    Arctanh,
    Cosh,
    Sinh,
    Tan,
}

/// A function of two numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Binary {
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
    Power,
    Arctan2,
    Hypotenuse,
    /// Not a number where the first is not.
    AtLeast,
    /// Not a number where the first is not.
    AtMost,
    Equal,
    NotEqual,
    Greater,
    GreaterEqual,
    Less,
    LessEqual,
    And,
    Or,
    Xor,
}

/// An expression over tensors of one shape.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Expression {
    /// The elements of a tensor.
    Load(View),
    /// The same number everywhere.
    Constant(f32),
    Unary(Unary, Box<Self>),
    Binary(Binary, Box<Self>, Box<Self>),
    /// The second where the first is not 0, the third elsewhere.
    Select(Box<Self>, Box<Self>, Box<Self>),
}

impl Expression {
    pub fn unary(self, operation: Unary) -> Self {
        Self::Unary(operation, Box::new(self))
    }

    pub fn binary(self, operation: Binary, other: Self) -> Self {
        Self::Binary(operation, Box::new(self), Box::new(other))
    }

    /// Its operands.
    fn operands(&self) -> Vec<&Self> {
        match self {
            Self::Load(_) | Self::Constant(_) => Vec::new(),
            Self::Unary(_, a) => vec![a],
            Self::Binary(_, a, b) => vec![a, b],
            Self::Select(a, b, c) => vec![a, b, c],
        }
    }

    /// The tensors that it reads, each once.
    pub fn loads(&self) -> Vec<&View> {
        let mut loads = Vec::new();
        self.collect_loads(&mut loads);
        loads
    }

    fn collect_loads<'a>(&'a self, loads: &mut Vec<&'a View>) {
        match self {
            Self::Load(view) if !loads.contains(&view) => loads.push(view),
            other => other.operands().into_iter().for_each(|operand| operand.collect_loads(loads)),
        }
    }

    /// The tensor itself, where nothing is computed.
    pub fn as_load(&self) -> Option<&View> {
        match self {
            Self::Load(view) => Some(view),
            _ => None,
        }
    }

    /// Operations an element; functions without an instruction of their own count as ten.
    pub fn cost(&self) -> usize {
        let own = match self {
            Self::Load(_) | Self::Constant(_) => 0,
            Self::Unary(
                Unary::Abs | Unary::Negate | Unary::Not | Unary::Relu | Unary::Floor | Unary::Ceil,
                _,
            ) => 1,
            Self::Unary(..) | Self::Binary(Binary::Power | Binary::Arctan2 | Binary::Remainder, ..) => 10,
            Self::Binary(..) | Self::Select(..) => 1,
        };
        own + self.operands().into_iter().map(Self::cost).sum::<usize>()
    }

    /// With every tensor described anew; `None` where one cannot be.
    pub fn map_loads(&self, change: &impl Fn(&View) -> Option<View>) -> Option<Self> {
        let inner = |operand: &Self| operand.map_loads(change).map(Box::new);
        Some(match self {
            Self::Load(view) => Self::Load(change(view)?),
            Self::Constant(value) => Self::Constant(*value),
            Self::Unary(operation, a) => Self::Unary(*operation, inner(a)?),
            Self::Binary(operation, a, b) => Self::Binary(*operation, inner(a)?, inner(b)?),
            Self::Select(a, b, c) => Self::Select(inner(a)?, inner(b)?, inner(c)?),
        })
    }
}

/// Where an instruction finds an operand.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Operand {
    Register(usize),
    /// Number of a source.
    Source(usize),
    Constant(f32),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Instruction {
    Unary(Unary, Operand),
    Binary(Binary, Operand, Operand),
    Select(Operand, Operand, Operand),
}

/// What an expression reads.
#[derive(Debug, Clone, PartialEq)]
enum Source {
    /// Elements that follow one another, read where they lie.
    Direct { buffer: usize, offset: usize },
    /// Elements elsewhere, gathered into a register first: extents and strides from the outermost axis in.
    Gathered { buffer: usize, offset: usize, axes: Vec<(usize, isize)> },
    /// What stands where the results go.
    Destination,
}

/// An expression compiled for a stretch of its elements: instruction `i` writes register `i`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Code {
    sources: Vec<Source>,
    instructions: Vec<Instruction>,
    result: Operand,
}

/// Registers that a thread uses again from tile to tile.
#[derive(Default)]
pub(super) struct Registers {
    values: Vec<Vec<f32>>,
    gathered: Vec<Vec<f32>>,
    before: Vec<f32>,
}

impl Code {
    /// Compiles an expression; tensors of the buffer `destination` are read from where the results go.
    ///
    /// `is_float` says of which buffers the elements are floats, which can be read where they lie.
    pub fn new(
        expression: &Expression,
        destination: Option<usize>,
        is_float: &impl Fn(usize) -> bool,
    ) -> Self {
        let mut code = Self { sources: Vec::new(), instructions: Vec::new(), result: Operand::Constant(0.0) };
        code.result = code.add(expression, destination, is_float);
        code
    }

    fn add(
        &mut self,
        expression: &Expression,
        destination: Option<usize>,
        is_float: &impl Fn(usize) -> bool,
    ) -> Operand {
        let instruction = match expression {
            Expression::Constant(value) => return Operand::Constant(*value),
            Expression::Load(view) => {
                let source = if Some(view.buffer) == destination {
                    Source::Destination
                } else if view.is_contiguous() && is_float(view.buffer) {
                    Source::Direct { buffer: view.buffer, offset: view.offset }
                } else {
                    Source::Gathered { buffer: view.buffer, offset: view.offset, axes: merged_axes(view) }
                };
                let known = self.sources.iter().position(|known| *known == source);
                return Operand::Source(known.unwrap_or_else(|| {
                    self.sources.push(source);
                    self.sources.len() - 1
                }));
            }
            Expression::Unary(operation, a) => {
                Instruction::Unary(*operation, self.add(a, destination, is_float))
            }
            Expression::Binary(operation, a, b) => {
                let [a, b] = [a, b].map(|operand| self.add(operand, destination, is_float));
                Instruction::Binary(*operation, a, b)
            }
            Expression::Select(a, b, c) => {
                let [a, b, c] = [a, b, c].map(|operand| self.add(operand, destination, is_float));
                Instruction::Select(a, b, c)
            }
        };
        let known = self.instructions.iter().position(|known| *known == instruction);
        Operand::Register(known.unwrap_or_else(|| {
            self.instructions.push(instruction);
            self.instructions.len() - 1
        }))
    }

    /// Elements `at..` of the expression, as many as fit `out`.
    pub fn evaluate(&self, memory: &Memory<'_>, registers: &mut Registers, at: usize, out: &mut [f32]) {
        if self.instructions.is_empty()
            && let Operand::Source(source) = self.result
        {
            return self.copy(&self.sources[source], memory, at, out);
        }
        registers.values.resize_with(self.instructions.len().max(registers.values.len()), Vec::new);
        registers.gathered.resize_with(self.sources.len().max(registers.gathered.len()), Vec::new);
        for (tile, out) in out.chunks_mut(TILE).enumerate() {
            self.evaluate_tile(memory, registers, at + tile * TILE, out);
        }
    }

    fn copy(&self, source: &Source, memory: &Memory<'_>, at: usize, out: &mut [f32]) {
        match source {
            Source::Direct { buffer, offset } => {
                out.copy_from_slice(&memory.floats(*buffer)[offset + at..][..out.len()]);
            }
            Source::Gathered { buffer, offset, axes } => {
                gather(&memory.elements(*buffer), *offset, axes, at, out);
            }
            Source::Destination => {}
        }
    }

    fn evaluate_tile(&self, memory: &Memory<'_>, registers: &mut Registers, at: usize, out: &mut [f32]) {
        let len = out.len();
        let Registers { values, gathered, before } = registers;
        for (source, room) in self.sources.iter().zip(&mut *gathered) {
            if let Source::Gathered { buffer, offset, axes } = source {
                room.resize(TILE, 0.0);
                gather(&memory.elements(*buffer), *offset, axes, at, &mut room[..len]);
            }
        }
        if self.sources.contains(&Source::Destination) {
            before.clear();
            before.extend_from_slice(out);
        }
        let last = self.instructions.len().checked_sub(1);
        for (number, instruction) in self.instructions.iter().enumerate() {
            let mut own = std::mem::take(&mut values[number]);
            own.resize(TILE, 0.0);
            let result = if Some(number) == last { &mut *out } else { &mut own[..len] };
            let find = |operand: Operand| match operand {
                Operand::Constant(value) => Found::Constant(value),
                Operand::Register(number) => Found::Slice(&values[number][..len]),
                Operand::Source(source) => Found::Slice(match &self.sources[source] {
                    Source::Direct { buffer, offset } => &memory.floats(*buffer)[offset + at..][..len],
                    Source::Gathered { .. } => &gathered[source][..len],
                    Source::Destination => before,
                }),
            };
            match *instruction {
                Instruction::Unary(operation, a) => apply_unary(operation, &find(a), result),
                Instruction::Binary(operation, a, b) => apply_binary(operation, &find(a), &find(b), result),
                Instruction::Select(a, b, c) => select(&find(a), &find(b), &find(c), result),
            }
            values[number] = own;
        }
        if let Operand::Constant(value) = self.result {
            out.fill(value);
        }
    }
}

/// Extents and strides of a tensor, axes that continue one another as one, those of extent 1 left out.
fn merged_axes(view: &View) -> Vec<(usize, isize)> {
    let mut axes: Vec<(usize, isize)> = Vec::new();
    for (&extent, &stride) in view.shape.iter().zip(&view.strides).filter(|&(&extent, _)| extent != 1) {
        match axes.last_mut() {
            Some((outer, outer_stride)) if *outer_stride == stride * extent as isize => {
                *outer *= extent;
                *outer_stride = stride;
            }
            _ => axes.push((extent, stride)),
        }
    }
    if axes.is_empty() {
        axes.push((1, 0));
    }
    axes
}

/// Elements `at..` of a tensor in row-major order.
fn gather(elements: &Elements<'_>, offset: usize, axes: &[(usize, isize)], at: usize, out: &mut [f32]) {
    match elements {
        Elements::Floats(values) => gather_from(values, |x| *x, offset, axes, at, out),
        Elements::Ints(values) => gather_from(values, |x| *x as f32, offset, axes, at, out),
        Elements::Bools(values) => gather_from(values, |x| f32::from(*x), offset, axes, at, out),
    }
}

#[inline(always)]
fn gather_from<T>(
    values: &[T],
    read: impl Fn(&T) -> f32,
    offset: usize,
    axes: &[(usize, isize)],
    at: usize,
    out: &mut [f32],
) {
    let (&(inner, stride), outer) = axes.split_last().expect("a tensor has at least one merged axis");
    // The index of `at` along every axis, and the place of its row.
    let mut index = vec![0; outer.len()];
    let (mut rest, mut column) = (at / inner, at % inner);
    let mut row = offset as isize;
    for (index, &(extent, stride)) in index.iter_mut().zip(outer).rev() {
        *index = rest % extent;
        rest /= extent;
        row += *index as isize * stride;
    }
    let mut filled = 0;
    while filled < out.len() {
        let len = (inner - column).min(out.len() - filled);
        let out = &mut out[filled..filled + len];
        let first = row + column as isize * stride;
        match stride {
            0 => out.fill(read(&values[first as usize])),
            1 => out.iter_mut().zip(&values[first as usize..]).for_each(|(out, x)| *out = read(x)),
            _ => {
                let mut place = first;
                for out in out {
                    *out = read(&values[place as usize]);
                    place += stride;
                }
            }
        }
        filled += len;
        column = 0;
        for (index, &(extent, stride)) in index.iter_mut().zip(outer).rev() {
            *index += 1;
            row += stride;
            if *index < extent {
                break;
            }
            *index = 0;
            row -= extent as isize * stride;
        }
    }
}

/// An operand of a tile.
enum Found<'a> {
    Slice(&'a [f32]),
    Constant(f32),
}

fn apply_unary(operation: Unary, a: &Found<'_>, out: &mut [f32]) {
    /// One vector loop for a function.
    macro_rules! each {
        ($x:ident => $value:expr) => {
            match a {
                Found::Slice(a) => simd(
                    #[inline(always)]
                    || {
                        for (out, &$x) in out.iter_mut().zip(*a) {
                            *out = $value;
                        }
                    },
                ),
                &Found::Constant($x) => out.fill($value),
            }
        };
    }
    match operation {
        Unary::Abs => each!(x => f32::abs(x)),
        Unary::Ceil => each!(x => f32::ceil(x)),
        Unary::Cos => each!(x => f32::cos(x)),
        Unary::Erf => each!(x => vector::erf(x)),
        Unary::Exp => each!(x => vector::exp(x)),
        Unary::Floor => each!(x => f32::floor(x)),
        Unary::Gelu => each!(x => 0.5 * x * (1.0 + vector::erf(x * std::f32::consts::FRAC_1_SQRT_2))),
        Unary::LeakyRelu(slope) => each!(x => if x >= 0.0 { x } else { slope * x }),
        Unary::Log => each!(x => f32::ln(x)),
        Unary::Log1p => each!(x => f32::ln_1p(x)),
        Unary::LogSigmoid => each!(x => -vector::softplus(-x)),
        Unary::Negate => each!(x => -x),
        Unary::Not => each!(x => 1.0 - x),
        Unary::IsNan => each!(x => truth(x.is_nan())),
        Unary::IsInfinite => each!(x => truth(x.is_infinite())),
        Unary::Reciprocal => each!(x => 1.0 / x),
        Unary::Relu => each!(x => if x > 0.0 || x.is_nan() { x } else { 0.0 }),
        Unary::Round => each!(x => f32::round_ties_even(x)),
        Unary::Sigmoid => each!(x => vector::sigmoid(x)),
        Unary::Sign => each!(x => if x == 0.0 || x.is_nan() { 0.0 } else { 1.0f32.copysign(x) }),
        Unary::Sin => each!(x => f32::sin(x)),
        Unary::Sqrt => each!(x => f32::sqrt(x)),
        Unary::Tanh => each!(x => vector::tanh(x)),
        Unary::Truncate => each!(x => f32::trunc(x)),
        Unary::Arccos => each!(x => f32::acos(x)),
        Unary::Arccosh => each!(x => f32::acosh(x)),
        Unary::Arcsin => each!(x => f32::asin(x)),
        Unary::Arcsinh => each!(x => f32::asinh(x)),
        Unary::Arctan => each!(x => f32::atan(x)),
        Unary::Arctanh => each!(x => f32::atanh(x)),
        Unary::Cosh => each!(x => f32::cosh(x)),
        Unary::Sinh => each!(x => f32::sinh(x)),
        Unary::Tan => each!(x => f32::tan(x)),
    }
}

#[inline(always)]
fn truth(value: bool) -> f32 {
    if value { 1.0 } else { 0.0 }
}

fn apply_binary(operation: Binary, a: &Found<'_>, b: &Found<'_>, out: &mut [f32]) {
    /// One vector loop for each of the ways in which operands come.
    macro_rules! each {
        ($a:ident, $b:ident => $value:expr) => {
            simd(
                #[inline(always)]
                || match (a, b) {
                    (Found::Slice(a), Found::Slice(b)) => {
                        for ((out, &$a), &$b) in out.iter_mut().zip(*a).zip(*b) {
                            *out = $value;
                        }
                    }
                    (Found::Slice(a), &Found::Constant($b)) => {
                        for (out, &$a) in out.iter_mut().zip(*a) {
                            *out = $value;
                        }
                    }
                    (&Found::Constant($a), Found::Slice(b)) => {
                        for (out, &$b) in out.iter_mut().zip(*b) {
                            *out = $value;
                        }
                    }
                    (&Found::Constant($a), &Found::Constant($b)) => out.fill($value),
                },
            )
        };
    }
    /// A comparison, as 0 or 1.
    macro_rules! compare {
        ($operator:tt) => {
            each!(a, b => truth(a $operator b))
        };
    }
    match operation {
        Binary::Add => each!(a, b => a + b),
        Binary::Subtract => each!(a, b => a - b),
        Binary::Multiply | Binary::And => each!(a, b => a * b),
        Binary::Divide => each!(a, b => a / b),
        // The sign of the divisor, as in Python.
        Binary::Remainder => each!(a, b => {
            let rest = a % b;
            if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }
        }),
        Binary::Power => each!(a, b => f32::powf(a, b)),
        Binary::Arctan2 => each!(a, b => f32::atan2(a, b)),
        Binary::Hypotenuse => each!(a, b => f32::hypot(a, b)),
        Binary::AtLeast => each!(a, b => if a > b || a.is_nan() { a } else { b }),
        Binary::AtMost => each!(a, b => if a < b || a.is_nan() { a } else { b }),
        Binary::Equal => compare!(==),
        Binary::NotEqual | Binary::Xor => compare!(!=),
        Binary::Greater => compare!(>),
        Binary::GreaterEqual => compare!(>=),
        Binary::Less => compare!(<),
        Binary::LessEqual => compare!(<=),
        Binary::Or => each!(a, b => a + b - a * b),
    }
}

fn select(condition: &Found<'_>, a: &Found<'_>, b: &Found<'_>, out: &mut [f32]) {
    let at = |found: &Found<'_>, i: usize| match found {
        Found::Slice(values) => values[i],
        Found::Constant(value) => *value,
    };
    match (condition, a, b) {
        (Found::Slice(condition), &Found::Constant(a), Found::Slice(b)) => simd(
            #[inline(always)]
            || {
                for ((out, &condition), &b) in out.iter_mut().zip(*condition).zip(*b) {
                    *out = if condition != 0.0 { a } else { b };
                }
            },
        ),
        _ => {
            for (i, out) in out.iter_mut().enumerate() {
                *out = if at(condition, i) != 0.0 { at(a, i) } else { at(b, i) };
            }
        }
    }
}
