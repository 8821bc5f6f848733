//! Programs as WebAssembly modules.
//!
//! A module exports its memory, in which every buffer has a fixed place, and `run`, which takes nothing and gives 0, or the
//! number of a trap: 1 for an index out of bounds, 2 for a division by zero, 3 and more for the program's assertions. It
//! imports the functions that WebAssembly lacks from `math`, as far as it calls them: `exp`, `log`, `tanh`, `erf`, `fmod`
//! and `fma` of f64, and `fmaf` of f32.
//!
//! Loops that are marked as vectorised, whose turns are independent and store neighbouring floats, run four turns at once
//! with SIMD128. Indices that [`Ranges`] shows to lie within their buffers are not checked.

mod lanes;

use std::collections::{BTreeMap, BTreeSet};

use kiln_core::{Error, Result};
use wasm_encoder::{
    BlockType, CodeSection, EntityType, ExportKind, ExportSection, FunctionSection, ImportSection,
    Instruction as I, MemArg, MemArgTarget, MemorySection, MemoryType, TypeSection, ValType,
};
use wasmi::{Engine, Linker, Store};

use super::buffer::{Buffer, Elements, fit};
use super::check::{Checked, Code, Step};
use super::dependence::independent_loops;
use super::interpret::{Outcome, Trap};
use super::program::{BinOp, Function, Io, LoopKind, Param, Program, ScalarType, UnOp};
use super::ranges::Ranges;
use super::value::Value;

const OUT_OF_BOUNDS: i32 = 1;
const DIVISION_BY_ZERO: i32 = 2;
const FIRST_ASSERTION: i32 = 3;
/// Buffers begin at multiples of so many bytes.
const ALIGNMENT: u64 = 16;
const PAGE: u64 = 1 << 16;

/// A compiled program.
#[derive(Debug, Clone)]
pub struct WasmModule {
    /// The module in the binary format.
    pub bytes: Vec<u8>,
    /// The first byte of each parameter in the module's memory.
    pub offsets: Vec<u32>,
    /// Bytes of memory that all buffers need.
    pub memory: u64,
    /// What the assertions say, by the number of their trap less 3.
    pub assertions: Vec<String>,
    params: Vec<Param>,
}

/// Compiles a program.
///
/// # Errors
/// When its buffers do not fit into a memory of 4 GiB.
pub fn to_wasm(program: &Program, checked: &Checked) -> Result<WasmModule> {
    let mut memory = 0u64;
    let mut offsets = Vec::with_capacity(checked.buffers.len());
    for spec in &checked.buffers {
        offsets.push(memory);
        let bytes = spec.shape.iter().product::<usize>() as u64 * size_of(spec.dtype);
        memory = (memory + bytes).next_multiple_of(ALIGNMENT);
    }
    if memory > u64::from(u32::MAX) {
        return Err(Error::input(
            format!("program \"{}\"", program.name),
            format!("needs {memory} bytes of memory, more than the 4 GiB of WebAssembly"),
        ));
    }
    let mut emitter = Emitter {
        checked,
        offsets: &offsets,
        code: Vec::new(),
        locals: Vec::new(),
        variables: vec![(0, ScalarType::I64); checked.variables],
        imports: Vec::new(),
        assertions: Vec::new(),
        ranges: Ranges::new(checked),
        side_by_side: independent_loops(program, checked, |found| found.kind == LoopKind::Vectorized),
    };
    for (buffer, param) in program.params.iter().enumerate() {
        if param.io == Io::Out {
            emitter.clear(buffer);
        }
    }
    emitter.steps(&checked.body);
    emitter.code.extend([I::I32Const(0), I::End]);
    let Emitter { code, locals, imports, assertions, .. } = emitter;
    Ok(WasmModule {
        bytes: module(&code, locals, &imports, memory),
        offsets: offsets[..program.params.len()].iter().map(|&offset| offset as u32).collect(),
        memory,
        assertions,
        params: program.params.clone(),
    })
}

impl WasmModule {
    /// Runs the module in an interpreter of WebAssembly.
    ///
    /// # Errors
    /// When an input is missing or does not fit; a trap is no error but an outcome.
    pub fn run(&self, inputs: &BTreeMap<String, Buffer>) -> Result<Outcome> {
        let failed = |e: wasmi::Error| Error::work("the WebAssembly module does not run").caused_by(e);
        let engine = Engine::default();
        let module = wasmi::Module::new(&engine, &self.bytes).map_err(failed)?;
        let mut store = Store::new(&engine, ());
        let mut linker = Linker::new(&engine);
        define_math(&mut linker).map_err(|e| failed(e.into()))?;
        let instance = linker.instantiate_and_start(&mut store, &module).map_err(failed)?;
        let memory = instance
            .get_memory(&store, "memory")
            .ok_or_else(|| Error::work("the WebAssembly module exports no memory"))?;
        for (param, &offset) in self.params.iter().zip(&self.offsets) {
            if param.io != Io::Out {
                let input = fit(inputs.get(&param.name), &param.name, param.dtype, &param.shape)?;
                let bytes = to_bytes(&input);
                memory.data_mut(&mut store)[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
            }
        }
        let run = instance.get_typed_func::<(), i32>(&store, "run").map_err(failed)?;
        let code = run.call(&mut store, ()).map_err(failed)?;
        if let Some(trap) = self.trap(code) {
            return Ok(Err(trap));
        }
        let results = self.params.iter().zip(&self.offsets).filter(|(param, _)| param.io != Io::In);
        let result = |(param, &offset): (&Param, &u32)| {
            let bytes = &memory.data(&store)[offset as usize..];
            (param.name.clone(), from_bytes(bytes, param))
        };
        Ok(Ok(results.map(result).collect()))
    }

    /// The trap that `run` tells by a number.
    pub fn trap(&self, code: i32) -> Option<Trap> {
        match code {
            0 => None,
            OUT_OF_BOUNDS => Some(Trap::OutOfBounds),
            DIVISION_BY_ZERO => Some(Trap::DivisionByZero),
            code => {
                let message = self.assertions.get((code - FIRST_ASSERTION) as usize);
                Some(Trap::Assertion(message.cloned().unwrap_or_default()))
            }
        }
    }
}

/// The functions of `math` as the interpreter of programs computes them.
fn define_math(linker: &mut Linker<()>) -> Result<(), wasmi::errors::LinkerError> {
    linker.func_wrap("math", "exp", f64::exp)?;
    linker.func_wrap("math", "log", f64::ln)?;
    linker.func_wrap("math", "sin", f64::sin)?;
    linker.func_wrap("math", "cos", f64::cos)?;
    linker.func_wrap("math", "tanh", f64::tanh)?;
    linker.func_wrap("math", "erf", |x: f64| libm::erf(x))?;
    linker.func_wrap("math", "fmod", |a: f64, b: f64| a % b)?;
    linker.func_wrap("math", "fma", f64::mul_add)?;
    linker.func_wrap("math", "fmaf", f32::mul_add)?;
    Ok(())
}

fn size_of(ty: ScalarType) -> u64 {
    match ty {
        ScalarType::Bool => 1,
        ScalarType::F32 | ScalarType::I32 => 4,
        ScalarType::F64 | ScalarType::I64 => 8,
    }
}

fn to_bytes(buffer: &Buffer) -> Vec<u8> {
    match &buffer.elements {
        Elements::F32(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Elements::F64(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Elements::I32(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Elements::I64(values) => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        Elements::Bool(values) => values.iter().map(|&x| x.into()).collect(),
    }
}

fn from_bytes(bytes: &[u8], param: &Param) -> Buffer {
    let count: usize = param.shape.iter().product();
    /// Elements of one type.
    macro_rules! elements {
        ($element:ty) => {{
            const SIZE: usize = size_of::<$element>();
            let number = |bytes: &[u8]| <$element>::from_le_bytes(bytes.try_into().unwrap_or([0; SIZE]));
            bytes[..count * SIZE].chunks_exact(SIZE).map(number).collect()
        }};
    }
    use std::mem::size_of;
    let elements = match param.dtype {
        ScalarType::F32 => Elements::F32(elements!(f32)),
        ScalarType::F64 => Elements::F64(elements!(f64)),
        ScalarType::I32 => Elements::I32(elements!(i32)),
        ScalarType::I64 => Elements::I64(elements!(i64)),
        ScalarType::Bool => Elements::Bool(bytes[..count].iter().map(|&x| x != 0).collect()),
    };
    Buffer { shape: param.shape.clone(), elements }
}

/// A function of `math`: its name, and how many arguments of which type it takes to one of the same.
type Import = (&'static str, usize, ValType);

/// Puts the sections together.
fn module(code: &[I<'static>], locals: Vec<ValType>, imports: &[Import], memory: u64) -> Vec<u8> {
    let (mut types, mut imported) = (TypeSection::new(), ImportSection::new());
    for (number, (name, arity, ty)) in imports.iter().enumerate() {
        types.ty().function(vec![*ty; *arity], [*ty]);
        imported.import("math", name, EntityType::Function(number as u32));
    }
    let run = imports.len() as u32;
    types.ty().function([], [ValType::I32]);
    let mut functions = FunctionSection::new();
    functions.function(run);
    let mut memories = MemorySection::new();
    memories.memory(MemoryType {
        minimum: memory.div_ceil(PAGE),
        maximum: None,
        memory64: false,
        shared: false,
        page_size_log2: None,
    });
    let mut exports = ExportSection::new();
    exports.export("memory", ExportKind::Memory, 0).export("run", ExportKind::Func, run);
    let mut function = wasm_encoder::Function::new_with_locals_types(locals);
    code.iter().for_each(|instruction| {
        function.instruction(instruction);
    });
    let mut codes = CodeSection::new();
    codes.function(&function);
    let mut module = wasm_encoder::Module::new();
    module
        .section(&types)
        .section(&imported)
        .section(&functions)
        .section(&memories)
        .section(&exports)
        .section(&codes);
    module.finish()
}

fn val_type(ty: ScalarType) -> ValType {
    match ty {
        ScalarType::F32 => ValType::F32,
        ScalarType::F64 => ValType::F64,
        ScalarType::I32 | ScalarType::Bool => ValType::I32,
        ScalarType::I64 => ValType::I64,
    }
}

struct Emitter<'a> {
    checked: &'a Checked,
    offsets: &'a [u64],
    code: Vec<I<'static>>,
    locals: Vec<ValType>,
    /// The local and the type of each variable of the program.
    variables: Vec<(u32, ScalarType)>,
    imports: Vec<Import>,
    assertions: Vec<String>,
    ranges: Ranges,
    /// The variables of vectorised loops whose turns are independent.
    side_by_side: BTreeSet<usize>,
}

/// One instruction for each of two types.
macro_rules! by_width {
    ($wide:expr, $narrow_instruction:ident, $wide_instruction:ident) => {
        if $wide { I::$wide_instruction } else { I::$narrow_instruction }
    };
}

impl Emitter<'_> {
    fn push(&mut self, instruction: I<'static>) {
        self.code.push(instruction);
    }

    fn local(&mut self, ty: ScalarType) -> u32 {
        self.locals.push(val_type(ty));
        self.locals.len() as u32 - 1
    }

    /// Ends the program with a trap.
    fn trap(&mut self, code: i32) {
        self.code.extend([I::I32Const(code), I::Return]);
    }

    /// Ends the program with a trap if the value on the stack is not 0.
    fn trap_if(&mut self, code: i32) {
        self.push(I::If(BlockType::Empty));
        self.trap(code);
        self.push(I::End);
    }

    fn clear(&mut self, buffer: usize) {
        let spec = &self.checked.buffers[buffer];
        let bytes = spec.shape.iter().product::<usize>() as u64 * size_of(spec.dtype);
        let (start, bytes) = (self.offsets[buffer] as u32 as i32, bytes as u32 as i32);
        self.code.extend([I::I32Const(start), I::I32Const(0), I::I32Const(bytes), I::MemoryFill(0)]);
    }

    fn steps(&mut self, steps: &[Step]) {
        steps.iter().for_each(|step| self.step(step));
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::For { variable, min, extent, body } => self.for_loop(*variable, min, extent, body),
            Step::Store { buffer, index, value } => {
                self.place(*buffer, index);
                let ty = self.value(value);
                let argument = self.memory_argument(*buffer);
                self.push(match ty {
                    ScalarType::F32 => I::F32Store(argument),
                    ScalarType::F64 => I::F64Store(argument),
                    ScalarType::I32 => I::I32Store(argument),
                    ScalarType::I64 => I::I64Store(argument),
                    ScalarType::Bool => I::I32Store8(argument),
                });
            }
            Step::Alloc { buffer, body } => {
                self.clear(*buffer);
                self.steps(body);
            }
            Step::If { condition, then, otherwise } => {
                self.value(condition);
                self.push(I::If(BlockType::Empty));
                let known = self.ranges.enter_condition(condition);
                self.steps(then);
                self.ranges.leave(known);
                if !otherwise.is_empty() {
                    self.push(I::Else);
                    self.steps(otherwise);
                }
                self.push(I::End);
            }
            Step::Let { variable, value, body } => {
                let ty = self.value(value);
                let local = self.local(ty);
                self.push(I::LocalSet(local));
                self.variables[*variable] = (local, ty);
                self.ranges.enter_let(*variable, value);
                self.steps(body);
            }
            Step::Assert { condition, message } => {
                self.value(condition);
                self.push(I::I32Eqz);
                self.trap_if(FIRST_ASSERTION + self.assertions.len() as i32);
                self.assertions.push(message.clone());
            }
        }
    }

    fn for_loop(&mut self, variable: usize, min: &Code, extent: &Code, body: &[Step]) {
        let [first, count, turn, value] = std::array::from_fn(|_| self.local(ScalarType::I64));
        self.value(min);
        self.push(I::LocalSet(first));
        self.value(extent);
        self.code.extend([I::LocalSet(count), I::I64Const(0), I::LocalSet(turn)]);
        self.variables[variable] = (value, ScalarType::I64);
        self.ranges.enter_loop(variable, min, extent);
        if let Some(lanes) = self.lanes_of(variable, body) {
            self.by_fours(lanes, [first, count, turn, value], body);
        }
        self.code.extend([I::Block(BlockType::Empty), I::Loop(BlockType::Empty)]);
        self.code.extend([I::LocalGet(turn), I::LocalGet(count), I::I64GeS, I::BrIf(1)]);
        self.code.extend([I::LocalGet(first), I::LocalGet(turn), I::I64Add, I::LocalSet(value)]);
        self.steps(body);
        self.code.extend([I::LocalGet(turn), I::I64Const(1), I::I64Add, I::LocalSet(turn)]);
        self.code.extend([I::Br(0), I::End, I::End]);
    }

    fn memory_argument(&self, buffer: usize) -> MemArg {
        let align = size_of(self.checked.buffers[buffer].dtype).trailing_zeros();
        MemArg { offset: self.offsets[buffer], align, target: MemArgTarget::Memory(0), ordering: None }
    }

    /// Leaves the distance of an element from the buffer's first byte on the stack.
    fn place(&mut self, buffer: usize, index: &[Code]) {
        let checked = self.checked;
        let spec = &checked.buffers[buffer];
        for (axis, (part, &extent)) in index.iter().zip(&spec.shape).enumerate() {
            if axis > 0 {
                self.code.extend([I::I64Const(extent as i64), I::I64Mul]);
            }
            self.value(part);
            if !self.ranges.is_within(part, extent) {
                // A negative index is a large one without its sign.
                let local = self.local(ScalarType::I64);
                self.code.extend([I::LocalTee(local), I::I64Const(extent as i64), I::I64GeU]);
                self.trap_if(OUT_OF_BOUNDS);
                self.push(I::LocalGet(local));
            }
            if axis > 0 {
                self.push(I::I64Add);
            }
        }
        if index.is_empty() {
            self.push(I::I64Const(0));
        }
        let size = size_of(spec.dtype) as i32;
        self.code.extend([I::I32WrapI64, I::I32Const(size), I::I32Mul]);
    }

    /// Leaves a value on the stack; returns its type.
    fn value(&mut self, code: &Code) -> ScalarType {
        match code {
            Code::Constant(value) => {
                self.push(match *value {
                    Value::F32(x) => I::F32Const(x.into()),
                    Value::F64(x) => I::F64Const(x.into()),
                    Value::I32(x) => I::I32Const(x),
                    Value::I64(x) => I::I64Const(x),
                    Value::Bool(x) => I::I32Const(x.into()),
                });
                value.ty()
            }
            Code::Variable(place) => {
                let (local, ty) = self.variables[*place];
                self.push(I::LocalGet(local));
                ty
            }
            Code::Load { buffer, index } => {
                self.place(*buffer, index);
                let ty = self.checked.buffers[*buffer].dtype;
                let argument = self.memory_argument(*buffer);
                self.push(match ty {
                    ScalarType::F32 => I::F32Load(argument),
                    ScalarType::F64 => I::F64Load(argument),
                    ScalarType::I32 => I::I32Load(argument),
                    ScalarType::I64 => I::I64Load(argument),
                    ScalarType::Bool => I::I32Load8U(argument),
                });
                ty
            }
            Code::Binary(op, operands) => self.binary(*op, &operands.0, &operands.1),
            Code::Unary(op, a) => self.unary(*op, a),
            Code::Select(operands) => {
                let (condition, yes, no) = &**operands;
                let ty = self.type_of(yes);
                self.value(condition);
                self.push(I::If(BlockType::Result(val_type(ty))));
                self.value(yes);
                self.push(I::Else);
                self.value(no);
                self.push(I::End);
                ty
            }
            Code::Cast(to, a) => {
                let from = self.value(a);
                self.cast(from, *to);
                *to
            }
            Code::Call(function, arguments) => self.call(*function, arguments),
        }
    }

    /// The type of a value, without computing it.
    fn type_of(&self, code: &Code) -> ScalarType {
        match code {
            Code::Constant(value) => value.ty(),
            Code::Variable(place) => self.variables[*place].1,
            Code::Load { buffer, .. } => self.checked.buffers[*buffer].dtype,
            Code::Binary(op, _) if op.compares() => ScalarType::Bool,
            Code::Binary(_, operands) => self.type_of(&operands.0),
            Code::Unary(_, a) => self.type_of(a),
            Code::Select(operands) => self.type_of(&operands.1),
            Code::Cast(to, _) => *to,
            Code::Call(_, arguments) => self.type_of(&arguments[0]),
        }
    }

    fn unary(&mut self, op: UnOp, a: &Code) -> ScalarType {
        let ty = self.type_of(a);
        let wide = matches!(ty, ScalarType::I64 | ScalarType::F64);
        let zero = if wide { I::I64Const(0) } else { I::I32Const(0) };
        match (op, ty) {
            (UnOp::Neg, ScalarType::F32 | ScalarType::F64) => {
                self.value(a);
                self.push(by_width!(wide, F32Neg, F64Neg));
            }
            (UnOp::Abs, ScalarType::F32 | ScalarType::F64) => {
                self.value(a);
                self.push(by_width!(wide, F32Abs, F64Abs));
            }
            (UnOp::Neg, _) => {
                self.push(zero);
                self.value(a);
                self.push(by_width!(wide, I32Sub, I64Sub));
            }
            (UnOp::Abs, _) => {
                let local = self.local(ty);
                self.push(zero.clone());
                self.value(a);
                self.code.extend([I::LocalTee(local), by_width!(wide, I32Sub, I64Sub), I::LocalGet(local)]);
                self.code.extend([I::LocalGet(local), zero, by_width!(wide, I32LtS, I64LtS), I::Select]);
            }
            (UnOp::Not, ScalarType::Bool) => {
                self.value(a);
                self.push(I::I32Eqz);
            }
            (UnOp::Not, _) => {
                self.value(a);
                self.push(if wide { I::I64Const(-1) } else { I::I32Const(-1) });
                self.push(by_width!(wide, I32Xor, I64Xor));
            }
        }
        ty
    }

    fn binary(&mut self, op: BinOp, a: &Code, b: &Code) -> ScalarType {
        let ty = self.type_of(a);
        match ty {
            ScalarType::Bool if matches!(op, BinOp::And | BinOp::Or) => {
                // The second is computed only where it matters.
                self.value(a);
                self.push(I::If(BlockType::Result(ValType::I32)));
                if op == BinOp::And {
                    self.value(b);
                    self.code.extend([I::Else, I::I32Const(0)]);
                } else {
                    self.code.extend([I::I32Const(1), I::Else]);
                    self.value(b);
                }
                self.push(I::End);
            }
            ScalarType::F32 | ScalarType::F64 => self.float_binary(op, a, b, ty),
            _ => self.integer_binary(op, a, b, ty),
        }
        if op.compares() { ScalarType::Bool } else { ty }
    }

    fn float_binary(&mut self, op: BinOp, a: &Code, b: &Code, ty: ScalarType) {
        let wide = ty == ScalarType::F64;
        if op == BinOp::Rem {
            // The rest of a division is exact, in f64 as in f32.
            for operand in [a, b] {
                self.value(operand);
                self.cast(ty, ScalarType::F64);
            }
            self.call_import(("fmod", 2, ValType::F64));
            return self.cast(ScalarType::F64, ty);
        }
        self.value(a);
        self.value(b);
        self.push(match op {
            BinOp::Add => by_width!(wide, F32Add, F64Add),
            BinOp::Sub => by_width!(wide, F32Sub, F64Sub),
            BinOp::Mul => by_width!(wide, F32Mul, F64Mul),
            BinOp::Div => by_width!(wide, F32Div, F64Div),
            BinOp::Min => by_width!(wide, F32Min, F64Min),
            BinOp::Max => by_width!(wide, F32Max, F64Max),
            BinOp::Eq => by_width!(wide, F32Eq, F64Eq),
            BinOp::Ne => by_width!(wide, F32Ne, F64Ne),
            BinOp::Lt => by_width!(wide, F32Lt, F64Lt),
            BinOp::Le => by_width!(wide, F32Le, F64Le),
            BinOp::Gt => by_width!(wide, F32Gt, F64Gt),
            BinOp::Ge => by_width!(wide, F32Ge, F64Ge),
            op => unreachable!("{op} of floats passes no check"),
        });
    }

    fn integer_binary(&mut self, op: BinOp, a: &Code, b: &Code, ty: ScalarType) {
        let wide = ty == ScalarType::I64;
        let simple = match op {
            BinOp::Add => by_width!(wide, I32Add, I64Add),
            BinOp::Sub => by_width!(wide, I32Sub, I64Sub),
            BinOp::Mul => by_width!(wide, I32Mul, I64Mul),
            BinOp::And => by_width!(wide, I32And, I64And),
            BinOp::Or => by_width!(wide, I32Or, I64Or),
            BinOp::Xor => by_width!(wide, I32Xor, I64Xor),
            BinOp::Shl => by_width!(wide, I32Shl, I64Shl),
            BinOp::Shr => by_width!(wide, I32ShrS, I64ShrS),
            BinOp::Eq => by_width!(wide, I32Eq, I64Eq),
            BinOp::Ne => by_width!(wide, I32Ne, I64Ne),
            BinOp::Lt => by_width!(wide, I32LtS, I64LtS),
            BinOp::Le => by_width!(wide, I32LeS, I64LeS),
            BinOp::Gt => by_width!(wide, I32GtS, I64GtS),
            BinOp::Ge => by_width!(wide, I32GeS, I64GeS),
            BinOp::Min | BinOp::Max | BinOp::Div | BinOp::Rem | BinOp::FloorDiv | BinOp::FloorMod => {
                return self.careful_binary(op, a, b, ty);
            }
        };
        self.value(a);
        self.value(b);
        self.push(simple);
    }

    /// Operations that look at their operands twice.
    fn careful_binary(&mut self, op: BinOp, a: &Code, b: &Code, ty: ScalarType) {
        let wide = ty == ScalarType::I64;
        let number = |value: i32| if wide { I::I64Const(value.into()) } else { I::I32Const(value) };
        let [x, y] = std::array::from_fn(|_| self.local(ty));
        self.value(a);
        self.push(I::LocalSet(x));
        self.value(b);
        self.push(I::LocalSet(y));
        if matches!(op, BinOp::Min | BinOp::Max) {
            let below = if op == BinOp::Min {
                by_width!(wide, I32LtS, I64LtS)
            } else {
                by_width!(wide, I32GtS, I64GtS)
            };
            self.code.extend([
                I::LocalGet(x),
                I::LocalGet(y),
                I::LocalGet(x),
                I::LocalGet(y),
                below,
                I::Select,
            ]);
            return;
        }
        self.code.extend([I::LocalGet(y), by_width!(wide, I32Eqz, I64Eqz)]);
        self.trap_if(DIVISION_BY_ZERO);
        let rest = [I::LocalGet(x), I::LocalGet(y), by_width!(wide, I32RemS, I64RemS)];
        // The lowest number by -1 does not fit: its quotient is its negative, which wraps.
        let quotient = [
            I::LocalGet(y),
            number(-1),
            by_width!(wide, I32Eq, I64Eq),
            I::If(BlockType::Result(val_type(ty))),
            number(0),
            I::LocalGet(x),
            by_width!(wide, I32Sub, I64Sub),
            I::Else,
            I::LocalGet(x),
            I::LocalGet(y),
            by_width!(wide, I32DivS, I64DivS),
            I::End,
        ];
        match op {
            BinOp::Div => self.code.extend(quotient),
            BinOp::Rem => self.code.extend(rest),
            _ => {
                let below = self.local(ScalarType::I32);
                let kept = self.local(ty);
                self.code.extend(rest);
                // Whether truncation went up: a rest whose sign is not the divisor's.
                self.code.extend([I::LocalTee(kept), number(0), by_width!(wide, I32Ne, I64Ne)]);
                self.code.extend([
                    I::LocalGet(kept),
                    I::LocalGet(y),
                    by_width!(wide, I32Xor, I64Xor),
                    number(0),
                ]);
                self.code.extend([by_width!(wide, I32LtS, I64LtS), I::I32And, I::LocalSet(below)]);
                if op == BinOp::FloorDiv {
                    self.code.extend(quotient);
                    self.push(I::LocalGet(below));
                    if wide {
                        self.push(I::I64ExtendI32U);
                    }
                    self.push(by_width!(wide, I32Sub, I64Sub));
                } else {
                    self.code.extend([
                        I::LocalGet(kept),
                        I::LocalGet(y),
                        number(0),
                        I::LocalGet(below),
                        I::Select,
                    ]);
                    self.push(by_width!(wide, I32Add, I64Add));
                }
            }
        }
    }

    /// Turns the value on the stack into another type.
    fn cast(&mut self, from: ScalarType, to: ScalarType) {
        use ScalarType::{Bool, F32, F64, I32, I64};
        let instructions: &[I<'static>] = match (from, to) {
            (F32, F64) => &[I::F64PromoteF32],
            (F64, F32) => &[I::F32DemoteF64],
            (F32, I32) => &[I::I32TruncSatF32S],
            (F32, I64) => &[I::I64TruncSatF32S],
            (F64, I32) => &[I::I32TruncSatF64S],
            (F64, I64) => &[I::I64TruncSatF64S],
            (I32 | Bool, F32) => &[I::F32ConvertI32S],
            (I32 | Bool, F64) => &[I::F64ConvertI32S],
            (I64, F32) => &[I::F32ConvertI64S],
            (I64, F64) => &[I::F64ConvertI64S],
            (I32 | Bool, I64) => &[I::I64ExtendI32S],
            (I64, I32) => &[I::I32WrapI64],
            (I32, Bool) => &[I::I32Const(0), I::I32Ne],
            (I64, Bool) => &[I::I64Const(0), I::I64Ne],
            (F32, Bool) => {
                self.push(I::F32Const(0.0.into()));
                &[I::F32Ne]
            }
            (F64, Bool) => {
                self.push(I::F64Const(0.0.into()));
                &[I::F64Ne]
            }
            (F32, F32) | (F64, F64) | (I32 | Bool, I32) | (I64, I64) | (Bool, Bool) => &[],
        };
        self.code.extend_from_slice(instructions);
    }

    fn call(&mut self, function: Function, arguments: &[Code]) -> ScalarType {
        let ty = self.type_of(&arguments[0]);
        let wide = ty == ScalarType::F64;
        let own = match function {
            Function::Sqrt => Some(by_width!(wide, F32Sqrt, F64Sqrt)),
            Function::Floor => Some(by_width!(wide, F32Floor, F64Floor)),
            Function::Ceil => Some(by_width!(wide, F32Ceil, F64Ceil)),
            _ => None,
        };
        if let Some(own) = own {
            self.value(&arguments[0]);
            self.push(own);
            return ty;
        }
        if function == Function::Fma {
            arguments.iter().for_each(|argument| {
                self.value(argument);
            });
            self.call_import(if wide { ("fma", 3, ValType::F64) } else { ("fmaf", 3, ValType::F32) });
            return ty;
        }
        let name = match function {
            Function::Exp => "exp",
            Function::Log => "log",
            Function::Sin => "sin",
            Function::Cos => "cos",
            Function::Tanh => "tanh",
            _ => "erf",
        };
        self.value(&arguments[0]);
        self.cast(ty, ScalarType::F64);
        self.call_import((name, 1, ValType::F64));
        self.cast(ScalarType::F64, ty);
        ty
    }

    fn call_import(&mut self, import: Import) {
        let known = self.imports.iter().position(|known| *known == import);
        let number = known.unwrap_or_else(|| {
            self.imports.push(import);
            self.imports.len() - 1
        });
        self.push(I::Call(number as u32));
    }
}
