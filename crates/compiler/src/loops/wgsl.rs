//! Programs as compute shaders in WGSL, the language of WebGPU.
//!
//! The statements at the top of a program become kernels, which a device runs one after another: a loop whose turns are
//! independent (and loops directly inside of it) a kernel with one invocation a turn, everything else one with a single
//! invocation. Every buffer that outlives a kernel is a storage buffer. [`WgslProgram::dispatches`] says in which order
//! buffers are cleared and kernels run.
//!
//! WGSL has no 64-bit numbers: `f64` is refused, `i64` is computed in 32 bits. It cannot end a program either: a trap is
//! noted in a buffer of its own (see [`STATUS`]), elements out of bounds are read as the first and not written. How
//! functions such as `exp` are rounded, and what becomes of infinities and NaN, is the device's choice.

use std::collections::BTreeSet;
use std::fmt::Write;

use kiln_core::{Error, Result};
use serde::Serialize;

use super::check::{Checked, Code, Step};
use super::dependence::independent_loops;
use super::interpret::Trap;
use super::program::{BinOp, Function, Io, Program, ScalarType, UnOp};
use super::ranges::Ranges;
use super::value::Value;

/// What the buffer of the trap is called: one `u32`, 0 where nothing went wrong.
pub const STATUS: &str = "status";

/// Invocations of a workgroup.
const GROUP: usize = 64;
/// Workgroups along an axis that every device can run.
const MOST_GROUPS: usize = 65_535;
/// Elements of a buffer that each invocation has for itself.
const MOST_OWN: usize = 4096;

const OUT_OF_BOUNDS: u32 = 1;
const DIVISION_BY_ZERO: u32 = 2;
const FIRST_ASSERTION: u32 = 3;

/// A program for WebGPU.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WgslProgram {
    /// The storage buffers; the last is [`STATUS`].
    pub buffers: Vec<WgslBuffer>,
    /// The kernels.
    pub kernels: Vec<WgslKernel>,
    /// What is done, in order.
    pub dispatches: Vec<Dispatch>,
    /// What the assertions say, by the number of their trap less 3.
    pub assertions: Vec<String>,
    /// Storage buffers that a kernel reads and writes at most: what the device's `maxStorageBuffersPerShaderStage` must be.
    pub storage_buffers: usize,
}

/// A storage buffer. Its elements have four bytes; truth values are 0 and 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WgslBuffer {
    /// Its name in the program.
    pub name: String,
    /// `f32`, `i32` or `u32`.
    pub element: &'static str,
    /// How many.
    pub len: usize,
    /// Which way values go; none for a buffer inside of the program.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<Io>,
}

/// A compute shader with the entry point `main`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WgslKernel {
    /// Its text.
    #[serde(skip)]
    pub text: String,
    /// The buffers of its bindings, from 0 on, in group 0.
    pub bindings: Vec<usize>,
    /// Workgroups along x and y.
    pub workgroups: [usize; 2],
}

/// A step of a run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Dispatch {
    /// Fills a buffer with zeros.
    Clear(usize),
    /// Runs a kernel.
    Run(usize),
}

/// Writes a program in WGSL.
///
/// # Errors
/// When it computes with `f64`, with literals beyond 32 bits, or keeps a large buffer inside of a loop.
pub fn to_wgsl(program: &Program, checked: &Checked) -> Result<WgslProgram> {
    let mut buffers = Vec::new();
    for (number, spec) in checked.buffers.iter().enumerate() {
        let element = element(spec.dtype).ok_or_else(|| {
            wrong(program, format!("buffer \"{}\" holds {}", spec.name, spec.dtype))
                .hint("WGSL has floats of 32 bits only: use f32")
        })?;
        let io = program.params.get(number).map(|param| param.io);
        buffers.push(WgslBuffer { name: spec.name.clone(), element, len: spec.shape.iter().product(), io });
    }
    let status = buffers.len();
    buffers.push(WgslBuffer { name: STATUS.into(), element: "u32", len: 1, io: None });
    let mut writer = Writer {
        program,
        checked,
        independent: independent_loops(program, checked, |_| true),
        status,
        variables: vec![ScalarType::I64; checked.variables],
        ranges: Ranges::new(checked),
        kernels: Vec::new(),
        dispatches: vec![Dispatch::Clear(status)],
        assertions: Vec::new(),
    };
    for (buffer, param) in program.params.iter().enumerate() {
        if param.io == Io::Out {
            writer.dispatches.push(Dispatch::Clear(buffer));
        }
    }
    writer.top(&checked.body)?;
    let Writer { kernels, dispatches, assertions, .. } = writer;
    let storage_buffers = kernels.iter().map(|kernel| kernel.bindings.len()).max().unwrap_or(0);
    Ok(WgslProgram { buffers, kernels, dispatches, assertions, storage_buffers })
}

impl WgslProgram {
    /// The trap that the status buffer tells by a number.
    pub fn trap(&self, status: u32) -> Option<Trap> {
        match status {
            0 => None,
            OUT_OF_BOUNDS => Some(Trap::OutOfBounds),
            DIVISION_BY_ZERO => Some(Trap::DivisionByZero),
            status => {
                let message = self.assertions.get((status - FIRST_ASSERTION) as usize);
                Some(Trap::Assertion(message.cloned().unwrap_or_default()))
            }
        }
    }
}

fn wrong(program: &Program, found: String) -> Error {
    Error::input(format!("program \"{}\"", program.name), found)
}

/// The type of a value in memory.
fn element(ty: ScalarType) -> Option<&'static str> {
    match ty {
        ScalarType::F32 => Some("f32"),
        ScalarType::I32 | ScalarType::I64 => Some("i32"),
        ScalarType::Bool => Some("u32"),
        ScalarType::F64 => None,
    }
}

/// The type of a value.
fn value_type(ty: ScalarType) -> &'static str {
    match ty {
        ScalarType::F32 | ScalarType::F64 => "f32",
        ScalarType::I32 | ScalarType::I64 => "i32",
        ScalarType::Bool => "bool",
    }
}

/// What kernels are made of.
struct Writer<'a> {
    program: &'a Program,
    checked: &'a Checked,
    independent: BTreeSet<usize>,
    status: usize,
    /// Types of the variables.
    variables: Vec<ScalarType>,
    ranges: Ranges,
    kernels: Vec<WgslKernel>,
    dispatches: Vec<Dispatch>,
    assertions: Vec<String>,
}

impl Writer<'_> {
    /// Statements at the top of the program.
    fn top(&mut self, steps: &[Step]) -> Result<()> {
        for step in steps {
            match step {
                Step::Alloc { buffer, body } => {
                    self.dispatches.push(Dispatch::Clear(*buffer));
                    self.top(body)?;
                }
                step => self.kernel(step)?,
            }
        }
        Ok(())
    }

    /// One statement as a kernel.
    fn kernel(&mut self, step: &Step) -> Result<()> {
        let (loops, body) = self.independent_nest(step);
        let turns = loops.iter().map(|turn| turn.extent).product::<usize>();
        if turns == 0 {
            return Ok(());
        }
        let mut kernel = Kernel {
            writer: self,
            lines: String::new(),
            indent: 1,
            bindings: Vec::new(),
            written: BTreeSet::new(),
            own: BTreeSet::new(),
            temporaries: 0,
            helpers: BTreeSet::new(),
        };
        // The number of the invocation is that of the turn, the innermost loop's first.
        let mut rest = String::from("turn");
        for (number, turn) in loops.iter().enumerate().rev() {
            let Turn { variable, min, extent } = turn;
            let value = if number == 0 { rest.clone() } else { format!("({rest} % {extent}u)") };
            kernel.line(&format!("let v{variable} = i32({value}) + ({min});"));
            rest = format!("({rest} / {extent}u)");
        }
        body.iter().try_for_each(|step| kernel.step(step))?;
        let (text, bindings) = kernel.finish(turns);
        let groups = turns.div_ceil(GROUP);
        let rows = groups.div_ceil(MOST_GROUPS);
        self.dispatches.push(Dispatch::Run(self.kernels.len()));
        self.kernels.push(WgslKernel { text, bindings, workgroups: [groups.div_ceil(rows), rows] });
        Ok(())
    }

    /// The loops around a statement whose turns can all run at once, and what they repeat.
    fn independent_nest<'s>(&mut self, mut step: &'s Step) -> (Vec<Turn>, &'s [Step]) {
        let mut loops = Vec::new();
        let mut body = std::slice::from_ref(step);
        while let Step::For { variable, min, extent, body: inner } = step {
            let (Code::Constant(Value::I64(first)), Code::Constant(Value::I64(count))) = (min, extent) else {
                break;
            };
            let turns: usize = loops.iter().map(|turn: &Turn| turn.extent).product();
            let extent_ = usize::try_from(*count).unwrap_or(0);
            let fits = turns.checked_mul(extent_).is_some_and(|turns| turns < 1 << 31)
                && i32::try_from(*first).is_ok();
            if !self.independent.contains(variable) || !fits {
                break;
            }
            self.ranges.enter_loop(*variable, min, extent);
            loops.push(Turn { variable: *variable, min: *first, extent: extent_ });
            body = inner;
            match inner.as_slice() {
                [only] => step = only,
                _ => break,
            }
        }
        (loops, body)
    }
}

/// A loop whose turns are invocations.
struct Turn {
    variable: usize,
    min: i64,
    extent: usize,
}

/// A kernel in the making.
struct Kernel<'a, 'b> {
    writer: &'a mut Writer<'b>,
    lines: String,
    indent: usize,
    /// Storage buffers, in the order of their bindings.
    bindings: Vec<usize>,
    written: BTreeSet<usize>,
    /// Buffers that every invocation has for itself.
    own: BTreeSet<usize>,
    temporaries: usize,
    helpers: BTreeSet<Helper>,
}

/// Functions that a kernel calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Helper {
    Trap,
    Within,
    Divide,
    Rest,
    FloorDivide,
    FloorRest,
    Erf,
    Turn,
    Tanh,
    Infinity,
}

impl Helper {
    /// Its text and what it calls.
    fn text(self) -> (&'static str, &'static [Self]) {
        match self {
            Self::Trap => (
                "fn trap(code: u32) {\n    if (atomicLoad(&status) == 0u) { atomicStore(&status, code); }\n}\n",
                &[],
            ),
            Self::Within => (
                "fn within(index: i32, extent: i32) -> bool {\n    if (index >= 0 && index < extent) { return true; }\n    \
                 trap(1u);\n    return false;\n}\n",
                &[Self::Trap],
            ),
            Self::Divide => (
                "fn divide(a: i32, b: i32) -> i32 {\n    if (b == 0) { trap(2u); return 0; }\n    if (b == -1) { return -a; }\n    \
                 return a / b;\n}\n",
                &[Self::Trap],
            ),
            Self::Rest => (
                "fn rest(a: i32, b: i32) -> i32 {\n    if (b == 0) { trap(2u); return 0; }\n    if (b == -1) { return 0; }\n    \
                 return a % b;\n}\n",
                &[Self::Trap],
            ),
            Self::FloorDivide => (
                "fn floor_divide(a: i32, b: i32) -> i32 {\n    let q = divide(a, b);\n    \
                 return select(q, q - 1, (a - q * b != 0) && ((a < 0) != (b < 0)));\n}\n",
                &[Self::Divide],
            ),
            Self::FloorRest => (
                "fn floor_rest(a: i32, b: i32) -> i32 {\n    let r = rest(a, b);\n    \
                 return select(r, r + b, r != 0 && ((r < 0) != (b < 0)));\n}\n",
                &[Self::Rest],
            ),
            // Abramowitz and Stegun, 7.1.26: within 1.5e-7.
            Self::Erf => (
                "fn erf(x: f32) -> f32 {\n    let t = 1.0 / (1.0 + 0.3275911 * abs(x));\n    \
                 let p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;\n    \
                 return sign(x) * (1.0 - p * exp(-x * x));\n}\n",
                &[],
            ),
            // WGSL promises nothing of sines beyond half a turn.
            Self::Turn => {
                ("fn in_turn(x: f32) -> f32 {\n    return x - 6.2831853 * round(x * 0.15915494);\n}\n", &[])
            }
            // Beyond 10 the result is 1, and exponentials would overflow.
            Self::Tanh => ("fn tanh_of(x: f32) -> f32 {\n    return tanh(clamp(x, -10.0, 10.0));\n}\n", &[]),
            // A constant expression must be finite.
            Self::Infinity => (
                "var<private> infinite_bits: u32 = 0x7f800000u;\nfn infinity() -> f32 {\n    \
                 return bitcast<f32>(infinite_bits);\n}\n",
                &[],
            ),
        }
    }
}

impl Kernel<'_, '_> {
    fn line(&mut self, text: &str) {
        for _ in 0..self.indent {
            self.lines.push_str("    ");
        }
        self.lines.push_str(text);
        self.lines.push('\n');
    }

    fn call(&mut self, helper: Helper) {
        self.helpers.insert(helper);
        helper.text().1.iter().for_each(|&helper| self.call(helper));
    }

    fn temporary(&mut self) -> String {
        self.temporaries += 1;
        format!("t{}", self.temporaries)
    }

    /// The kernel's text and bindings.
    fn finish(mut self, turns: usize) -> (String, Vec<usize>) {
        let status = self.writer.status;
        if self.helpers.contains(&Helper::Trap) {
            self.bindings.push(status);
        }
        let mut text = String::new();
        for (binding, &buffer) in self.bindings.iter().enumerate() {
            if buffer == status {
                let _ = writeln!(
                    text,
                    "@group(0) @binding({binding}) var<storage, read_write> status: atomic<u32>;"
                );
                continue;
            }
            let spec = &self.writer.checked.buffers[buffer];
            let access = if self.written.contains(&buffer) { "read_write" } else { "read" };
            let element = element(spec.dtype).unwrap_or("f32");
            let _ = writeln!(
                text,
                "@group(0) @binding({binding}) var<storage, {access}> b{buffer}: array<{element}>; // {}",
                spec.name
            );
        }
        for helper in &self.helpers {
            text.push('\n');
            text.push_str(helper.text().0);
        }
        let row = turns.div_ceil(GROUP).div_ceil(turns.div_ceil(GROUP).div_ceil(MOST_GROUPS)) * GROUP;
        let _ = write!(
            text,
            "\n@compute @workgroup_size({GROUP})\nfn main(@builtin(global_invocation_id) id: vec3<u32>) {{\n    let turn = id.x + \
             id.y * {row}u;\n    if (turn >= {turns}u) {{ return; }}\n{}}}\n",
            self.lines
        );
        (text, self.bindings)
    }

    fn steps(&mut self, steps: &[Step]) -> Result<()> {
        self.indent += 1;
        let done = steps.iter().try_for_each(|step| self.step(step));
        self.indent -= 1;
        done
    }

    fn step(&mut self, step: &Step) -> Result<()> {
        match step {
            Step::For { variable, min, extent, body } => {
                let (first, count) = (self.value(min)?, self.value(extent)?);
                let end = self.temporary();
                let v = format!("v{variable}");
                self.line(&format!("let {end}_first = {first};"));
                self.line(&format!("let {end} = {end}_first + {count};"));
                self.line(&format!("for (var {v} = {end}_first; {v} < {end}; {v}++) {{"));
                self.writer.ranges.enter_loop(*variable, min, extent);
                self.steps(body)?;
                self.line("}");
            }
            Step::Store { buffer, index, value } => {
                let ty = self.writer.checked.buffers[*buffer].dtype;
                let value = self.value(value)?;
                let value = if ty == ScalarType::Bool { format!("u32({value})") } else { value };
                let (place, guard) = self.place(*buffer, index)?;
                self.written.insert(*buffer);
                let name = self.buffer(*buffer);
                match guard {
                    None => self.line(&format!("{name}[{place}] = {value};")),
                    Some(guard) => self.line(&format!("if ({guard}) {{ {name}[{place}] = {value}; }}")),
                }
            }
            Step::Alloc { buffer, body } => {
                let spec = &self.writer.checked.buffers[*buffer];
                let len: usize = spec.shape.iter().product();
                if len > MOST_OWN {
                    let found =
                        format!("buffer \"{}\" of {len} elements is made inside of a loop", spec.name);
                    return Err(wrong(self.writer.program, found).hint(format!(
                        "for WGSL it may have {MOST_OWN} there: make it outside of all loops"
                    )));
                }
                let element = element(spec.dtype).unwrap_or("f32");
                self.own.insert(*buffer);
                self.line("{");
                self.indent += 1;
                self.line(&format!("var b{buffer}: array<{element}, {}>;", len.max(1)));
                self.indent -= 1;
                self.steps(body)?;
                self.line("}");
            }
            Step::If { condition, then, otherwise } => {
                let text = self.value(condition)?;
                self.line(&format!("if ({text}) {{"));
                let known = self.writer.ranges.enter_condition(condition);
                self.steps(then)?;
                self.writer.ranges.leave(known);
                if !otherwise.is_empty() {
                    self.line("} else {");
                    self.steps(otherwise)?;
                }
                self.line("}");
            }
            Step::Let { variable, value, body } => {
                let ty = self.type_of(value);
                let text = self.value(value)?;
                self.writer.variables[*variable] = ty;
                self.writer.ranges.enter_let(*variable, value);
                self.line("{");
                self.indent += 1;
                self.line(&format!("let v{variable}: {} = {text};", value_type(ty)));
                self.indent -= 1;
                self.steps(body)?;
                self.line("}");
            }
            Step::Assert { condition, message } => {
                let text = self.value(condition)?;
                let number = FIRST_ASSERTION + self.writer.assertions.len() as u32;
                self.writer.assertions.push(message.clone());
                self.call(Helper::Trap);
                self.line(&format!("if (!({text})) {{ trap({number}u); return; }}"));
            }
        }
        Ok(())
    }

    /// A buffer's name, bound where it lies in storage.
    fn buffer(&mut self, buffer: usize) -> String {
        if !self.own.contains(&buffer) && !self.bindings.contains(&buffer) {
            self.bindings.push(buffer);
        }
        format!("b{buffer}")
    }

    /// Where an element lies, and under which condition it is there, unless it always is.
    fn place(&mut self, buffer: usize, index: &[Code]) -> Result<(String, Option<String>)> {
        let shape = self.writer.checked.buffers[buffer].shape.clone();
        let (mut place, mut guards) = (String::new(), Vec::new());
        for (part, &extent) in index.iter().zip(&shape) {
            let mut text = self.value(part)?;
            if !self.writer.ranges.is_within(part, extent) {
                self.call(Helper::Within);
                let name = self.temporary();
                self.line(&format!("let {name} = {text};"));
                guards.push(format!("within({name}, {extent})"));
                text = name;
            }
            place = if place.is_empty() { text } else { format!("({place}) * {extent} + {text}") };
        }
        if place.is_empty() {
            place.push('0');
        }
        Ok((place, (!guards.is_empty()).then(|| guards.join(" && "))))
    }

    fn type_of(&self, code: &Code) -> ScalarType {
        match code {
            Code::Constant(value) => value.ty(),
            Code::Variable(place) => self.writer.variables[*place],
            Code::Load { buffer, .. } => self.writer.checked.buffers[*buffer].dtype,
            Code::Binary(op, _) if op.compares() => ScalarType::Bool,
            Code::Binary(_, operands) => self.type_of(&operands.0),
            Code::Unary(_, a) => self.type_of(a),
            Code::Select(operands) => self.type_of(&operands.1),
            Code::Cast(to, _) => *to,
            Code::Call(_, arguments) => self.type_of(&arguments[0]),
        }
    }

    /// A value as an expression; what it needs beforehand is written before.
    fn value(&mut self, code: &Code) -> Result<String> {
        Ok(match code {
            Code::Constant(value) => self.constant(*value)?,
            Code::Variable(place) => format!("v{place}"),
            Code::Load { buffer, index } => {
                let (place, guard) = self.place(*buffer, index)?;
                let name = self.buffer(*buffer);
                let at = match guard {
                    None => place,
                    Some(guard) => {
                        let at = self.temporary();
                        self.line(&format!("let {at} = select(0, {place}, {guard});"));
                        at
                    }
                };
                match self.writer.checked.buffers[*buffer].dtype {
                    ScalarType::Bool => format!("({name}[{at}] != 0u)"),
                    _ => format!("{name}[{at}]"),
                }
            }
            Code::Binary(op, operands) => self.binary(*op, &operands.0, &operands.1)?,
            Code::Unary(op, a) => {
                let a = self.value(a)?;
                match op {
                    UnOp::Neg => format!("(-{a})"),
                    UnOp::Abs => format!("abs({a})"),
                    UnOp::Not if self.type_of(code) == ScalarType::Bool => format!("(!{a})"),
                    UnOp::Not => format!("(~{a})"),
                }
            }
            Code::Select(parts) => {
                let condition = self.value(&parts.0)?;
                self.either(&condition, &parts.1, &parts.2)?
            }
            Code::Cast(to, a) => {
                let from = self.type_of(a);
                let text = self.value(a)?;
                self.cast(from, *to, &text)?
            }
            Code::Call(function, arguments) => {
                let arguments =
                    arguments.iter().map(|argument| self.value(argument)).collect::<Result<Vec<_>>>()?;
                let name = match function {
                    Function::Exp => "exp",
                    Function::Log => "log",
                    Function::Sqrt => "sqrt",
                    Function::Sin | Function::Cos => {
                        self.call(Helper::Turn);
                        return Ok(format!("{function}(in_turn({}))", arguments.join(", ")));
                    }
                    Function::Tanh => {
                        self.call(Helper::Tanh);
                        "tanh_of"
                    }
                    Function::Erf => {
                        self.call(Helper::Erf);
                        "erf"
                    }
                    Function::Floor => "floor",
                    Function::Ceil => "ceil",
                    Function::Fma => "fma",
                };
                format!("{name}({})", arguments.join(", "))
            }
        })
    }

    fn constant(&mut self, value: Value) -> Result<String> {
        let whole = |value: i64| match i32::try_from(value) {
            // The lowest number has no literal of its own.
            Ok(i32::MIN) => Ok("(-2147483647 - 1)".to_string()),
            Ok(value) if value < 0 => Ok(format!("({value})")),
            Ok(value) => Ok(value.to_string()),
            Err(_) => Err(wrong(self.writer.program, format!("{value} does not fit 32 bits"))
                .hint("WGSL has no wider whole numbers")),
        };
        match value {
            Value::F32(x) if x.is_finite() => Ok(format!("f32({x:?})")),
            Value::F32(x) => {
                self.call(Helper::Infinity);
                Ok(match x {
                    f32::INFINITY => "infinity()".into(),
                    f32::NEG_INFINITY => "(-infinity())".into(),
                    _ => "(infinity() - infinity())".into(),
                })
            }
            Value::F64(x) => Err(wrong(self.writer.program, format!("{x} is an f64"))
                .hint("WGSL has floats of 32 bits only: use f32")),
            Value::I32(x) => whole(x.into()),
            Value::I64(x) => whole(x),
            Value::Bool(x) => Ok(x.to_string()),
        }
    }

    /// One of two values, of which only that one is computed.
    fn either(&mut self, condition: &str, yes: &Code, no: &Code) -> Result<String> {
        let ty = value_type(self.type_of(yes));
        let name = self.temporary();
        self.indent += 1;
        let [yes, no] = [yes, no].map(|part| {
            let begun = self.lines.len();
            let text = self.value(part)?;
            Ok((self.lines.split_off(begun), text))
        });
        self.indent -= 1;
        let ((first, yes), (second, no)) = (yes?, no?);
        if first.is_empty() && second.is_empty() {
            return Ok(format!("select({no}, {yes}, {condition})"));
        }
        self.line(&format!("var {name}: {ty};"));
        self.line(&format!("if ({condition}) {{"));
        self.lines.push_str(&first);
        self.line(&format!("    {name} = {yes};"));
        self.line("} else {");
        self.lines.push_str(&second);
        self.line(&format!("    {name} = {no};"));
        self.line("}");
        Ok(name)
    }

    fn binary(&mut self, op: BinOp, a: &Code, b: &Code) -> Result<String> {
        let ty = self.type_of(a);
        if ty == ScalarType::Bool && matches!(op, BinOp::And | BinOp::Or) {
            // The second is computed only where it matters.
            let condition = self.value(a)?;
            let known = Code::Constant(Value::Bool(op == BinOp::Or));
            return match op {
                BinOp::And => self.either(&condition, b, &known),
                _ => self.either(&condition, &known, b),
            };
        }
        let integers = ty.is_int();
        let (x, y) = (self.value(a)?, self.value(b)?);
        let mut helper = |helper: Helper, name: &str| {
            self.call(helper);
            format!("{name}({x}, {y})")
        };
        Ok(match op {
            BinOp::Add => format!("({x} + {y})"),
            BinOp::Sub => format!("({x} - {y})"),
            BinOp::Mul => format!("({x} * {y})"),
            BinOp::Div if integers => helper(Helper::Divide, "divide"),
            BinOp::Rem if integers => helper(Helper::Rest, "rest"),
            BinOp::Div => format!("({x} / {y})"),
            BinOp::Rem => format!("({x} % {y})"),
            BinOp::FloorDiv => helper(Helper::FloorDivide, "floor_divide"),
            BinOp::FloorMod => helper(Helper::FloorRest, "floor_rest"),
            BinOp::Min => format!("min({x}, {y})"),
            BinOp::Max => format!("max({x}, {y})"),
            BinOp::Eq => format!("({x} == {y})"),
            BinOp::Ne => format!("({x} != {y})"),
            BinOp::Lt => format!("({x} < {y})"),
            BinOp::Le => format!("({x} <= {y})"),
            BinOp::Gt => format!("({x} > {y})"),
            BinOp::Ge => format!("({x} >= {y})"),
            BinOp::And => format!("({x} & {y})"),
            BinOp::Or => format!("({x} | {y})"),
            BinOp::Xor if ty == ScalarType::Bool => format!("({x} != {y})"),
            BinOp::Xor => format!("({x} ^ {y})"),
            BinOp::Shl => format!("({x} << (u32({y}) & 31u))"),
            BinOp::Shr => format!("({x} >> (u32({y}) & 31u))"),
        })
    }

    fn cast(&mut self, from: ScalarType, to: ScalarType, x: &str) -> Result<String> {
        Ok(match (from, to) {
            (_, ScalarType::F64) => {
                return Err(wrong(self.writer.program, "computes with f64".into())
                    .hint("WGSL has floats of 32 bits only: use f32"));
            }
            (_, ScalarType::F32) => format!("f32({x})"),
            (_, ScalarType::Bool) => format!("bool({x})"),
            (_, ScalarType::I32 | ScalarType::I64) => format!("i32({x})"),
        })
    }
}
