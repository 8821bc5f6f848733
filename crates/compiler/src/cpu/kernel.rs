//! What a step does, on slices.

use std::cell::RefCell;

use burn::backend::ir::{HandleKind, OperationIr, TensorIr, TensorStatus};
use burn::tensor::TensorData;
use burn_flex::{Flex, FlexDevice};
use burn_router::TensorInterpreter;
use kiln_ops::gemm::{Mat, Out, gemm, gemm_finished, gemm_parallel};
use kiln_ops::kernels::{
    AttentionInputs, FixedConv, FixedPool, FreeConv, Heads, RightFactor, attend, layer_norm_rows,
    log_softmax_rows, softmax_rows,
};
use kiln_ops::{simd, vector};
use rayon::prelude::*;

use super::expression::{Code, Expression, Registers};
use super::lower::{Attention, ConvResult, Reduction, RowWork, Work};
use super::memory::{ElementsMut, Memory};
use super::view::{BufferId, View};

/// Elements of one task.
const TASK: usize = 1 << 14;

/// Compiled work.
pub(super) enum Kernel {
    Map(Code),
    Concatenate(Vec<(Code, usize)>),
    Product { a: View, b: View },
    FixedProduct { x: View, weight: RightFactor },
    Convolution { x: View, convolution: FixedConv },
    FreeConvolution { gives: ConvResult, operands: [View; 2], bias: Option<View>, convolution: FreeConv },
    Pool { x: View, pool: FixedPool },
    Attention(Attention),
    Rows { x: Code, width: usize, work: RowWork },
    LayerNorm { x: Code, weight: View, bias: Option<View>, epsilon: f32 },
    Reduce { x: Code, width: usize, reduction: Reduction },
    Gather { table: View, indices: View },
    Burn { operation: Box<OperationIr>, inputs: Vec<(TensorIr, View)> },
}

impl Kernel {
    /// Prepares work; `destination` is an operand in whose place it is done.
    pub fn new(work: Work, destination: Option<BufferId>, is_float: &impl Fn(BufferId) -> bool) -> Self {
        let code = |x: &Expression| Code::new(x, destination, is_float);
        match work {
            Work::Map(x) => Self::Map(code(&x)),
            Work::Concatenate(parts) => {
                Self::Concatenate(parts.iter().map(|(part, len)| (code(part), *len)).collect())
            }
            Work::Product { a, b, .. } => Self::Product { a, b },
            Work::FixedProduct { x, weight } => Self::FixedProduct { x, weight },
            Work::Convolution(work) => {
                let convolution =
                    FixedConv::new(work.extents, work.shape, work.weight, work.bias, &work.options);
                Self::Convolution { x: work.x, convolution }
            }
            Work::FreeConvolution(work) => {
                let convolution = FreeConv::new(work.extents, work.shape, &work.options);
                Self::FreeConvolution {
                    gives: work.gives,
                    operands: work.operands,
                    bias: work.bias,
                    convolution,
                }
            }
            Work::Pool { x, pooling } => Self::Pool { x, pool: pooling.fixed() },
            Work::Attention(attention) => Self::Attention(attention),
            Work::Rows { x, width, work } => Self::Rows { x: code(&x), width, work },
            Work::LayerNorm { x, weight, bias, epsilon } => {
                Self::LayerNorm { x: code(&x), weight, bias, epsilon }
            }
            Work::Reduce { x, width, reduction } => Self::Reduce { x: code(&x), width, reduction },
            Work::Gather { table, indices } => Self::Gather { table, indices },
            Work::Burn { operation, inputs } => Self::Burn { operation, inputs },
        }
    }

    /// Bytes of a weight that it keeps.
    pub fn weight_bytes(&self) -> usize {
        match self {
            Self::Convolution { convolution, .. } => convolution.weight_bytes(),
            Self::FixedProduct { weight, .. } => weight.bytes(),
            _ => 0,
        }
    }

    /// Fills `out`, and has every element pass through the epilogue.
    ///
    /// # Errors
    /// When an index is out of bounds.
    pub fn run(
        &self,
        memory: &Memory<'_>,
        epilogue: Option<&Code>,
        out: ElementsMut<'_>,
    ) -> Result<(), String> {
        let out = match (self, out) {
            (_, ElementsMut::Floats(out)) => out,
            (Self::Map(code), ElementsMut::Bools(out)) => {
                each_task(out, 1, |at, out| {
                    let mut values = vec![0.0; out.len()];
                    evaluate(code, memory, at, &mut values);
                    out.iter_mut().zip(values).for_each(|(out, value)| *out = u8::from(value != 0.0));
                });
                return Ok(());
            }
            (Self::Concatenate(parts), ElementsMut::Bools(out)) => {
                let mut values = vec![0.0; out.len()];
                concatenate(parts, memory, &mut values);
                out.iter_mut().zip(values).for_each(|(out, value)| *out = u8::from(value != 0.0));
                return Ok(());
            }
            _ => unreachable!("only element-wise steps have results other than floats"),
        };
        let finish = |at: usize, values: &mut [f32]| {
            if let Some(epilogue) = epilogue {
                evaluate(epilogue, memory, at, values);
            }
        };
        match self {
            Self::Map(code) => each_task(out, 1, |at, out| evaluate(code, memory, at, out)),
            Self::Concatenate(parts) => concatenate(parts, memory, out),
            Self::Product { a, b } => product(memory, a, b, out, epilogue.is_some(), &finish),
            Self::FixedProduct { x, weight } => {
                let rows = memory.floats(x.buffer).get(x.offset..).unwrap_or_default();
                let stride = if x.shape[1] == 1 { x.shape[2] } else { x.strides[1] as usize };
                weight.multiply(rows, stride, out, &finish);
            }
            Self::Convolution { x, convolution } => convolution.run(floats(memory, x), out, &finish),
            Self::FreeConvolution { gives, operands: [first, second], bias, convolution } => {
                let [first, second] = [first, second].map(|view| floats(memory, view));
                let gradient = match gives {
                    ConvResult::Output => {
                        let bias = bias.as_ref().map_or(&[][..], |bias| floats(memory, bias));
                        convolution.run(first, second, bias, out, &finish);
                        return Ok(());
                    }
                    ConvResult::InputGradient => convolution.input_gradient(first, second),
                    ConvResult::WeightGradient => convolution.weight_gradient(first, second),
                };
                out.copy_from_slice(&gradient);
                each_task(out, 1, finish);
            }
            Self::Pool { x, pool } => {
                pool.run(floats(memory, x), out);
                each_task(out, 1, finish);
            }
            Self::Attention(attention) => {
                attend_views(memory, attention, out);
                each_task(out, 1, finish);
            }
            Self::Rows { x, width, work } => each_task(out, *width, |at, rows| {
                evaluate(x, memory, at, rows);
                match work {
                    RowWork::Softmax => softmax_rows(rows, *width),
                    RowWork::LogSoftmax => log_softmax_rows(rows, *width),
                    RowWork::CumulativeSum => rows.chunks_exact_mut(*width).for_each(accumulate),
                }
                finish(at, rows);
            }),
            Self::LayerNorm { x, weight, bias, epsilon } => {
                let weight = floats(memory, weight);
                let bias = bias.as_ref().map_or(&[][..], |bias| floats(memory, bias));
                each_task(out, weight.len(), |at, rows| {
                    evaluate(x, memory, at, rows);
                    layer_norm_rows(rows, weight, bias, *epsilon);
                    finish(at, rows);
                });
            }
            Self::Reduce { x, width, reduction } => {
                let rows = (TASK / width).max(1);
                out.par_chunks_mut(rows).enumerate().for_each(|(task, out)| {
                    reduce(x, memory, *width, *reduction, task * rows, out);
                    finish(task * rows, out);
                });
            }
            Self::Gather { table, indices } => {
                gather(memory, table, indices, out)?;
                each_task(out, 1, finish);
            }
            Self::Burn { .. } => unreachable!("operations of Burn's are run by `run_burn`"),
        }
        Ok(())
    }
}

thread_local! {
    static REGISTERS: RefCell<Registers> = RefCell::default();
    static ROWS: RefCell<Vec<f32>> = RefCell::default();
}

fn evaluate(code: &Code, memory: &Memory<'_>, at: usize, out: &mut [f32]) {
    REGISTERS.with_borrow_mut(|registers| code.evaluate(memory, registers, at, out));
}

/// Divides elements among tasks, in multiples of `unit`, and hands each the place of its first.
fn each_task<T: Send>(out: &mut [T], unit: usize, work: impl Fn(usize, &mut [T]) + Sync) {
    if out.is_empty() || unit == 0 {
        return;
    }
    let len = (TASK / unit).max(1) * unit;
    if out.len() <= len {
        return work(0, out);
    }
    out.par_chunks_mut(len).enumerate().for_each(|(task, out)| work(task * len, out));
}

/// The elements of a tensor that lies in one piece.
fn floats<'a>(memory: &Memory<'a>, view: &View) -> &'a [f32] {
    &memory.floats(view.buffer)[view.offset..][..view.len()]
}

fn concatenate(parts: &[(Code, usize)], memory: &Memory<'_>, out: &mut [f32]) {
    let total: usize = parts.iter().map(|(_, len)| len).sum();
    each_task(out, total, |at, out| {
        for (block, out) in out.chunks_exact_mut(total).enumerate() {
            let block = at / total + block;
            let mut rest = out;
            for (code, len) in parts {
                let (own, others) = rest.split_at_mut(*len);
                evaluate(code, memory, block * len, own);
                rest = others;
            }
        }
    });
}

/// One matrix of `[batch, rows, columns]`.
fn matrix<'a>(memory: &Memory<'a>, view: &View, batch: usize) -> Mat<'a> {
    let [rows, columns] = [view.shape[1], view.shape[2]];
    let data = memory.floats(view.buffer);
    let data = data.get(view.offset + batch * view.strides[0] as usize..).unwrap_or_default();
    let stride =
        |stride: isize, extent: usize, across: usize| if across == 1 { extent } else { stride as usize };
    let by_rows =
        (view.strides[2] == 1 || columns == 1) && (view.strides[1] >= columns as isize || rows == 1);
    if by_rows {
        Mat::strided(data, rows, columns, stride(view.strides[1], columns, rows))
    } else {
        Mat::strided(data, columns, rows, stride(view.strides[2], rows, columns)).t()
    }
}

fn product(
    memory: &Memory<'_>,
    a: &View,
    b: &View,
    out: &mut [f32],
    finishes: bool,
    finish: &(impl Fn(usize, &mut [f32]) + Sync),
) {
    let [batches, rows, columns] = [a.shape[0], a.shape[1], b.shape[2]];
    if out.is_empty() {
        return;
    }
    if batches == 1 {
        let [a, b] = [matrix(memory, a, 0), matrix(memory, b, 0)];
        if finishes {
            gemm_finished(out, a, b, finish);
        } else {
            gemm_parallel(out, columns, Out::Set, a, b);
        }
        return;
    }
    let each = rows * columns;
    let work = each * a.shape[2];
    out.par_chunks_mut(each).with_min_len((TASK / work.max(1)).max(1)).enumerate().for_each(
        |(batch, out)| {
            gemm(out, columns, Out::Set, matrix(memory, a, batch), matrix(memory, b, batch));
            finish(batch * each, out);
        },
    );
}

fn heads<'a, T>(data: &'a [T], view: &View) -> Heads<'a, T> {
    let strides = [0, 1, 2].map(|axis| view.strides[axis] as usize);
    Heads { data: data.get(view.offset..).unwrap_or_default(), strides, columns: view.shape[3] }
}

fn attend_views(memory: &Memory<'_>, attention: &Attention, out: &mut [f32]) {
    let [q, k, v] =
        [&attention.q, &attention.k, &attention.v].map(|view| heads(memory.floats(view.buffer), view));
    let bias = attention.bias.as_ref().map(|view| heads(memory.floats(view.buffer), view));
    let mask = attention.mask.as_ref().map(|view| heads(memory.bools(view.buffer), view));
    let inputs = AttentionInputs { q, k, v, bias, mask };
    attend(attention.extents(), attention.causal, attention.scale, &inputs, out);
}

fn accumulate(row: &mut [f32]) {
    let mut sum = 0.0;
    for x in row {
        sum += *x;
        *x = sum;
    }
}

/// Reduces rows `first..`, as many as fit `out`.
fn reduce(x: &Code, memory: &Memory<'_>, width: usize, reduction: Reduction, first: usize, out: &mut [f32]) {
    /// Elements of rows that are evaluated together.
    const TOGETHER: usize = 1 << 11;
    let rows = (TOGETHER / width).max(1);
    ROWS.with_borrow_mut(|values| {
        for (part, out) in out.chunks_mut(rows).enumerate() {
            values.resize(out.len() * width, 0.0);
            evaluate(x, memory, (first + part * rows) * width, values);
            simd(
                #[inline(always)]
                || {
                    for (out, row) in out.iter_mut().zip(values.chunks_exact(width)) {
                        *out = reduced(row, reduction);
                    }
                },
            );
        }
    });
}

#[inline(always)]
fn reduced(row: &[f32], reduction: Reduction) -> f32 {
    /// A fold of all elements, in a fixed order.
    macro_rules! fold {
        ($start:expr, $a:ident, $b:ident => $joined:expr) => {
            vector::fold(
                row,
                $start,
                #[inline(always)]
                |x| x,
                #[inline(always)]
                |$a: f32, $b: f32| $joined,
            )
        };
    }
    match reduction {
        Reduction::Sum => fold!(0.0, a, b => a + b),
        Reduction::Mean => fold!(0.0, a, b => a + b) / row.len() as f32,
        Reduction::Product => fold!(1.0, a, b => a * b),
        Reduction::Max => fold!(f32::NEG_INFINITY, a, b => if b > a || b.is_nan() { b } else { a }),
        Reduction::Min => fold!(f32::INFINITY, a, b => if b < a || b.is_nan() { b } else { a }),
    }
}

fn gather(memory: &Memory<'_>, table: &View, indices: &View, out: &mut [f32]) -> Result<(), String> {
    let [rows, width] = [table.shape[0], table.shape[1]];
    let table = floats(memory, table);
    let indices = &memory.ints(indices.buffer)[indices.offset..][..indices.len()];
    if let Some((place, index)) =
        indices.iter().enumerate().find(|(_, index)| usize::try_from(**index).map_or(true, |i| i >= rows))
    {
        return Err(format!("index {place} is {index}, and the table it points into has {rows} rows"));
    }
    each_task(out, width, |at, out| {
        for (index, out) in indices[at / width.max(1)..].iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&table[*index as usize * width..][..width]);
        }
    });
    Ok(())
}

/// The results of an operation that has no kernel here.
pub(super) fn run_burn(
    operation: &OperationIr,
    inputs: &[(TensorIr, View)],
    memory: &Memory<'_>,
) -> Vec<TensorData> {
    let mut interpreter = TensorInterpreter::<Flex>::new(FlexDevice);
    for (tensor, view) in inputs {
        interpreter.register_tensor_data_id(tensor.id, memory.to_data(view, tensor.dtype));
    }
    interpreter.register_op(operation.clone());
    let read = |out: &TensorIr| {
        let out = TensorIr { status: TensorStatus::ReadOnly, ..out.clone() };
        match interpreter.get_tensor(&out) {
            HandleKind::Float(values) | HandleKind::Int(values) | HandleKind::Bool(values) => {
                values.into_data()
            }
            HandleKind::Quantized(_) => unreachable!("no captured graph is quantised"),
        }
    };
    operation.outputs().map(read).collect()
}
