//! The steps of a graph as one loop program, for the targets that loop programs have.

use std::collections::BTreeMap;

use kiln_core::{Error, Result};

use super::expression::{Binary, Expression, Unary};
use super::lower::{
    Attention, Convolution, Draft, Origin, PoolKind, Pooling, Reduction, RowWork, Step, Work, lower,
};
use super::memory::{Kind, Values};
use super::plan::drop_unused;
use super::view::{BufferId, View};
use crate::graph::name_and_attributes;
use crate::loops::{
    BinOp, Buffer, Elements, Expr, For, Function, Io, LoopKind, Memory, Param, Program, ScalarType, Stmt,
    UnOp,
};
use crate::{Graph, GraphPass, quiet};

impl Graph {
    /// The graph as a loop program, and the values of the parameters that are constants.
    ///
    /// Inputs and outputs keep their names and shapes; all other buffers are flat.
    ///
    /// # Errors
    /// When an operation, or a function of elements, has no form as loops.
    pub fn to_loops(mut self) -> Result<(Program, BTreeMap<String, Buffer>)> {
        for pass in GraphPass::ALL {
            pass.apply(&mut self)?;
        }
        quiet::catch_panic(|| write_program(self)).unwrap_or_else(|found| {
            Err(Error::work(format!("an operation of the graph does not fit its operands: {found}"))
                .hint("the graph is damaged: export the model again"))
        })
    }
}

fn write_program(mut graph: Graph) -> Result<(Program, BTreeMap<String, Buffer>)> {
    let (lowering, outputs) = lower(&mut graph)?;
    let steps = drop_unused(lowering.steps, &outputs);
    let mut writer = Writer {
        drafts: &lowering.drafts,
        names: BTreeMap::new(),
        variables: 0,
        params: Vec::new(),
        constants: BTreeMap::new(),
    };
    for (id, draft) in lowering.drafts.iter().enumerate() {
        let read = steps.iter().any(|step| step.reads().contains(&id))
            || outputs.iter().any(|view| view.buffer == id);
        let name = match &draft.origin {
            Origin::Input(number) => graph.inputs[*number].port.name.clone(),
            Origin::Constant(_) => format!("constant{id}"),
            Origin::Step(_) => format!("result{id}"),
        };
        match &draft.origin {
            Origin::Input(number) => {
                let shape = graph.inputs[*number].port.shape.clone();
                writer.params.push(Param {
                    name: name.clone(),
                    dtype: scalar(draft.kind),
                    shape,
                    io: Io::In,
                });
            }
            Origin::Constant(values) if read => {
                writer.params.push(Param {
                    name: name.clone(),
                    dtype: scalar(draft.kind),
                    shape: vec![draft.len],
                    io: Io::In,
                });
                writer.constants.insert(name.clone(), flat(values));
            }
            _ => {}
        }
        writer.names.insert(id, name);
    }
    // Inputs have the shapes of their ports: they are copied into flat buffers, which views index.
    let mut body = Vec::new();
    let mut locals = Vec::new();
    for (id, draft) in lowering.drafts.iter().enumerate() {
        if let Origin::Input(number) = draft.origin {
            let shape = &graph.inputs[number].port.shape;
            let name = writer.names[&id].clone();
            let own = format!("flat{id}");
            body.extend(writer.nest(shape, |_, at| {
                let value = Expr::Load { buf: name, idx: at.to_vec() };
                vec![store(&own, row_major(shape, at), value)]
            }));
            locals.push((own.clone(), scalar(draft.kind), draft.len));
            writer.names.insert(id, own);
        }
    }
    for step in &steps {
        for &output in &step.outputs {
            let draft = &lowering.drafts[output];
            locals.push((writer.names[&output].clone(), scalar(draft.kind), draft.len));
        }
        body.extend(writer.step(step)?);
    }
    for (view, output) in outputs.iter().zip(&graph.outputs) {
        let (name, shape) = (&output.port.name, &output.port.shape);
        let dtype = scalar(lowering.drafts[view.buffer].kind);
        writer.params.push(Param { name: name.clone(), dtype, shape: shape.clone(), io: Io::Out });
        let read = writer.names[&view.buffer].clone();
        body.extend(writer.nest(shape, |_, at| {
            let value = Expr::Load { buf: read, idx: vec![place(view, at)] };
            vec![Stmt::Store { buf: name.clone(), idx: at.to_vec(), value }]
        }));
    }
    for (buf, dtype, len) in locals.into_iter().rev() {
        body = vec![Stmt::Alloc { buf, dtype, shape: vec![len], scope: Memory::Heap, body }];
    }
    Ok((Program { name: "graph".into(), params: writer.params, body }, writer.constants))
}

fn scalar(kind: Kind) -> ScalarType {
    match kind {
        Kind::Float => ScalarType::F32,
        Kind::Int => ScalarType::I64,
        Kind::Bool => ScalarType::Bool,
    }
}

fn flat(values: &Values) -> Buffer {
    let (len, elements) = match values {
        Values::Floats(values) => (values.len(), Elements::F32(values.clone())),
        Values::Ints(values) => (values.len(), Elements::I64(values.clone())),
        Values::Bools(values) => (values.len(), Elements::Bool(values.iter().map(|&x| x != 0).collect())),
    };
    Buffer { shape: vec![len], elements }
}

fn int(value: usize) -> Expr {
    Expr::I64(value as i64)
}

fn float(value: f32) -> Expr {
    Expr::F32(value)
}

fn bin(op: BinOp, a: Expr, b: Expr) -> Expr {
    Expr::Bin(op, Box::new(a), Box::new(b))
}

fn add(a: Expr, b: Expr) -> Expr {
    match (&a, &b) {
        (Expr::I64(0), _) => b,
        (_, Expr::I64(0)) => a,
        _ => bin(BinOp::Add, a, b),
    }
}

fn mul(a: Expr, b: Expr) -> Expr {
    match (&a, &b) {
        (Expr::I64(1), _) => b,
        (_, Expr::I64(1)) => a,
        (Expr::I64(0), _) | (_, Expr::I64(0)) => Expr::I64(0),
        _ => bin(BinOp::Mul, a, b),
    }
}

fn call(function: Function, x: Expr) -> Expr {
    Expr::Call(function, vec![x])
}

fn select(condition: Expr, a: Expr, b: Expr) -> Expr {
    Expr::Select(Box::new(condition), Box::new(a), Box::new(b))
}

fn truth(condition: Expr) -> Expr {
    select(condition, float(1.0), float(0.0))
}

/// Whether a number that stands for a truth value is one.
fn holds(x: Expr) -> Expr {
    bin(BinOp::Ne, x, float(0.0))
}

fn load(buf: &str, at: Expr) -> Expr {
    Expr::Load { buf: buf.into(), idx: vec![at] }
}

fn store(buf: &str, at: Expr, value: Expr) -> Stmt {
    Stmt::Store { buf: buf.into(), idx: vec![at], value }
}

/// Where an element of a tensor lies.
fn place(view: &View, at: &[Expr]) -> Expr {
    let along = |(index, &stride): (&Expr, &isize)| mul(index.clone(), Expr::I64(stride as i64));
    at.iter().zip(&view.strides).map(along).fold(int(view.offset), add)
}

fn row_major(shape: &[usize], at: &[Expr]) -> Expr {
    place(&View::whole(0, shape), at)
}

/// How many leading axes a shape has before those that together have `width` elements.
fn axes_before(shape: &[usize], width: usize) -> usize {
    let mut product = 1;
    let mut axis = shape.len();
    while product < width && axis > 0 {
        axis -= 1;
        product *= shape[axis];
    }
    axis
}

struct Writer<'a> {
    drafts: &'a [Draft],
    names: BTreeMap<BufferId, String>,
    variables: usize,
    params: Vec<Param>,
    constants: BTreeMap<String, Buffer>,
}

impl Writer<'_> {
    fn variable(&mut self) -> String {
        self.variables += 1;
        format!("i{}", self.variables)
    }

    /// A loop over `extent` turns.
    fn each(
        &mut self,
        extent: usize,
        kind: LoopKind,
        body: impl FnOnce(&mut Self, Expr) -> Vec<Stmt>,
    ) -> Vec<Stmt> {
        let var = self.variable();
        let body = body(self, Expr::Var(var.clone()));
        vec![Stmt::For(For { var, min: Expr::I64(0), extent: int(extent), kind, body })]
    }

    /// Loops over all elements of a shape, the innermost in lanes.
    fn nest(&mut self, shape: &[usize], body: impl FnOnce(&mut Self, &[Expr]) -> Vec<Stmt>) -> Vec<Stmt> {
        let variables: Vec<String> = shape.iter().map(|_| self.variable()).collect();
        let at: Vec<Expr> = variables.iter().map(|var| Expr::Var(var.clone())).collect();
        let mut stmts = body(self, &at);
        for (axis, (var, &extent)) in variables.into_iter().zip(shape).enumerate().rev() {
            let kind = if axis + 1 == shape.len() { LoopKind::Vectorized } else { LoopKind::Serial };
            stmts = vec![Stmt::For(For { var, min: Expr::I64(0), extent: int(extent), kind, body: stmts })];
        }
        stmts
    }

    fn read(&self, view: &View, at: &[Expr]) -> Expr {
        let element = load(&self.names[&view.buffer], place(view, at));
        match self.drafts[view.buffer].kind {
            Kind::Float => element,
            Kind::Int => Expr::Cast(ScalarType::F32, Box::new(element)),
            Kind::Bool => truth(element),
        }
    }

    fn shape_of(&self, x: &Expression, len: usize) -> Vec<usize> {
        x.loads().first().map_or_else(|| vec![len], |view| view.shape.clone())
    }

    fn value(&self, x: &Expression, at: &[Expr]) -> Result<Expr> {
        Ok(match x {
            Expression::Load(view) => self.read(view, at),
            Expression::Constant(value) => float(*value),
            Expression::Unary(operation, a) => unary(*operation, self.value(a, at)?)?,
            Expression::Binary(operation, a, b) => {
                binary(*operation, self.value(a, at)?, self.value(b, at)?)?
            }
            Expression::Select(a, b, c) => {
                select(holds(self.value(a, at)?), self.value(b, at)?, self.value(c, at)?)
            }
        })
    }

    /// Loops that write an expression's elements to a flat buffer, in order.
    fn fill(&mut self, x: &Expression, output: BufferId) -> Result<Vec<Stmt>> {
        let Draft { kind, len, .. } = self.drafts[output];
        let shape = self.shape_of(x, len);
        let name = self.names[&output].clone();
        let mut failed = None;
        let stmts = self.nest(&shape, |writer, at| match writer.value(x, at) {
            Ok(value) => {
                let value = if kind == Kind::Bool { holds(value) } else { value };
                vec![store(&name, row_major(&shape, at), value)]
            }
            Err(error) => {
                failed = Some(error);
                Vec::new()
            }
        });
        failed.map_or(Ok(stmts), Err)
    }

    fn step(&mut self, step: &Step) -> Result<Vec<Stmt>> {
        let output = step.outputs[0];
        let len = self.drafts[output].len;
        let out = self.names[&output].clone();
        let mut stmts = match &step.work {
            Work::Map(x) => self.fill(x, output)?,
            Work::Concatenate(parts) => self.concatenate(parts, output)?,
            Work::Product { a, b, .. } => self.product(a, b, &out),
            Work::FixedProduct { .. } => unreachable!("weights are packed for the CPU alone"),
            Work::Convolution(convolution) => self.convolution(convolution, &out),
            Work::FreeConvolution(work) => {
                return Err(no_form(&format!("{} of a free weight", work.gives.name())));
            }
            Work::Pool { x, pooling } => self.pool(x, pooling, len, &out),
            Work::Attention(attention) => self.attention(attention, &out),
            Work::Rows { x, width, work } => {
                let mut stmts = self.fill(x, output)?;
                stmts.extend(self.rows(*work, len, *width, &out));
                stmts
            }
            Work::LayerNorm { x, weight, bias, epsilon } => {
                let mut stmts = self.fill(x, output)?;
                stmts.extend(self.layer_norm(weight, bias.as_ref(), *epsilon, len, &out));
                stmts
            }
            Work::Reduce { x, width, reduction } => self.reduce(x, *width, *reduction, len, &out)?,
            Work::Gather { table, indices } => self.gather(table, indices, &out),
            Work::Burn { operation, .. } => {
                let name = name_and_attributes(operation).map_or_else(|_| "?".into(), |(name, _)| name);
                return Err(no_form(&name));
            }
        };
        if let Some(epilogue) = &step.epilogue {
            stmts.extend(self.fill(epilogue, output)?);
        }
        Ok(stmts)
    }

    fn concatenate(&mut self, parts: &[(Expression, usize)], output: BufferId) -> Result<Vec<Stmt>> {
        let total: usize = parts.iter().map(|(_, len)| len).sum();
        let Draft { kind, len, .. } = self.drafts[output];
        let (out, mut first, mut stmts) = (self.names[&output].clone(), 0, Vec::new());
        for (part, width) in parts {
            let shape = self.shape_of(part, len / total.max(1) * width);
            let split = axes_before(&shape, *width);
            let mut failed = None;
            stmts.extend(self.nest(&shape, |writer, at| {
                let block = row_major(&shape[..split], &at[..split]);
                let inner = row_major(&shape[split..], &at[split..]);
                let to = add(add(mul(block, int(total)), int(first)), inner);
                match writer.value(part, at) {
                    Ok(value) => {
                        vec![store(&out, to, if kind == Kind::Bool { holds(value) } else { value })]
                    }
                    Err(error) => {
                        failed = Some(error);
                        Vec::new()
                    }
                }
            }));
            if let Some(error) = failed {
                return Err(error);
            }
            first += width;
        }
        Ok(stmts)
    }

    fn product(&mut self, a: &View, b: &View, out: &str) -> Vec<Stmt> {
        let [batches, rows, inner, columns] = [a.shape[0], a.shape[1], a.shape[2], b.shape[2]];
        self.each(batches, LoopKind::Serial, |writer, batch| {
            writer.each(rows, LoopKind::Serial, |writer, row| {
                let first = mul(add(mul(batch.clone(), int(rows)), row.clone()), int(columns));
                writer.each(inner, LoopKind::Serial, |writer, k| {
                    let left = writer.read(a, &[batch.clone(), row, k.clone()]);
                    writer.each(columns, LoopKind::Vectorized, |writer, column| {
                        let right = writer.read(b, &[batch, k, column.clone()]);
                        let to = add(first, column);
                        let sum = bin(BinOp::Add, load(out, to.clone()), bin(BinOp::Mul, left, right));
                        vec![store(out, to, sum)]
                    })
                })
            })
        })
    }

    fn convolution(&mut self, work: &Convolution, out: &str) -> Vec<Stmt> {
        let Convolution { x, extents, shape, options, weight, bias } = work;
        let [batch, channels, ..] = *extents;
        let [outputs, group, ..] = *shape;
        let weight = self.constant(weight);
        let bias = (!bias.is_empty()).then(|| self.constant(bias));
        let input = self.names[&x.buffer].clone();
        let planes: Vec<usize> = [batch, outputs].into_iter().chain(work.output()).collect();
        self.nest(&planes, |writer, at| {
            let to = row_major(&planes, at);
            let start = bias.map_or(float(0.0), |bias| load(&bias, at[1].clone()));
            let taps = writer.nest(&shape[1..], |_, tap| {
                let places: Vec<Expr> = (0..3)
                    .map(|axis| {
                        let output = mul(at[2 + axis].clone(), int(options.stride[axis]));
                        let tap = mul(tap[1 + axis].clone(), int(options.dilation[axis]));
                        add(add(output, tap), Expr::I64(-(options.padding[axis].0 as i64)))
                    })
                    .collect();
                let own_group = bin(BinOp::FloorDiv, at[1].clone(), int(outputs / options.groups));
                let channel = add(mul(own_group, int(group)), tap[0].clone());
                let element = [vec![at[0].clone(), channel], places.clone()].concat();
                let from = row_major(&[[batch, channels].as_slice(), &extents[2..]].concat(), &element);
                let factor = load(&weight, row_major(shape, &[&[at[1].clone()], tap].concat()));
                let element = load(&input, add(int(x.offset), from));
                let sum = bin(BinOp::Add, load(out, to.clone()), bin(BinOp::Mul, factor, element));
                inside(&places, &extents[2..], vec![store(out, to.clone(), sum)])
            });
            std::iter::once(store(out, to.clone(), start)).chain(taps).collect()
        })
    }

    fn pool(&mut self, x: &View, pooling: &Pooling, len: usize, out: &str) -> Vec<Stmt> {
        let Pooling { kind, extents, windows } = pooling;
        let [height, width] = *extents;
        let outputs = pooling.outputs();
        let planes = [x.len() / (height * width).max(1), outputs[0], outputs[1]];
        assert_eq!(len, planes.iter().product::<usize>());
        let (input, count) = (self.names[&x.buffer].clone(), format!("count_{out}"));
        let element = |plane: &Expr, row: Expr, column: Expr| {
            load(
                &input,
                add(int(x.offset), row_major(&[planes[0], height, width], &[plane.clone(), row, column])),
            )
        };
        let add_to =
            |buf: &str, at: Expr, value: Expr| store(buf, at.clone(), bin(BinOp::Add, load(buf, at), value));
        let body = self.nest(&planes, |writer, at| {
            let to = row_major(&planes, at);
            let start = if matches!(kind, PoolKind::Max { .. }) { f32::NEG_INFINITY } else { 0.0 };
            let mut stmts = vec![store(out, to.clone(), float(start))];
            if matches!(kind, PoolKind::Even) {
                let bounds: Vec<[Expr; 2]> = (0..2)
                    .map(|axis| {
                        let scaled = |x: Expr| mul(x, int(extents[axis]));
                        let first = bin(BinOp::FloorDiv, scaled(at[1 + axis].clone()), int(outputs[axis]));
                        let next = scaled(add(at[1 + axis].clone(), int(1)));
                        let end = bin(BinOp::FloorDiv, add(next, int(outputs[axis] - 1)), int(outputs[axis]));
                        [first.clone(), bin(BinOp::Sub, end, first)]
                    })
                    .collect();
                let [row, column] = [0, 1].map(|_| writer.variable());
                let value = element(&at[0], Expr::Var(row.clone()), Expr::Var(column.clone()));
                let inner = vec![add_to(out, to.clone(), value)];
                let looped = |var, [min, extent]: [Expr; 2], body| {
                    vec![Stmt::For(For { var, min, extent, kind: LoopKind::Serial, body })]
                };
                stmts.extend(looped(row, bounds[0].clone(), looped(column, bounds[1].clone(), inner)));
                let size = mul(bounds[0][1].clone(), bounds[1][1].clone());
                let mean =
                    bin(BinOp::Div, load(out, to.clone()), Expr::Cast(ScalarType::F32, Box::new(size)));
                stmts.push(store(out, to, mean));
                return stmts;
            }
            if matches!(kind, PoolKind::Mean { .. }) {
                stmts.push(store(&count, Expr::I64(0), float(0.0)));
            }
            stmts.extend(writer.nest(&windows.kernel, |_, tap| {
                let dilation = if let PoolKind::Max { dilation } = kind { *dilation } else { [1; 2] };
                let places: Vec<Expr> = (0..2)
                    .map(|axis| {
                        let first = mul(at[1 + axis].clone(), int(windows.stride[axis]));
                        let tap = mul(tap[axis].clone(), int(dilation[axis]));
                        add(add(first, tap), Expr::I64(-(windows.padding[axis] as i64)))
                    })
                    .collect();
                let value = element(&at[0], places[0].clone(), places[1].clone());
                let one = add_to(&count, Expr::I64(0), float(1.0));
                match kind {
                    PoolKind::Max { .. } => {
                        let larger = bin(BinOp::Max, load(out, to.clone()), value);
                        inside(&places, extents, vec![store(out, to.clone(), larger)])
                    }
                    PoolKind::Mean { padding_counts: true } => {
                        // Rounded up, a window may reach beyond the padding, which does not count.
                        let before_end = |axis: usize| {
                            let end = extents[axis] + windows.padding[axis];
                            bin(BinOp::Lt, places[axis].clone(), int(end))
                        };
                        let cond = bin(BinOp::And, before_end(0), before_end(1));
                        let mut all = vec![Stmt::If { cond, then: vec![one], otherwise: Vec::new() }];
                        all.extend(inside(&places, extents, vec![add_to(out, to.clone(), value)]));
                        all
                    }
                    _ => inside(&places, extents, vec![add_to(out, to.clone(), value), one]),
                }
            }));
            if matches!(kind, PoolKind::Mean { .. }) {
                let size = bin(BinOp::Max, load(&count, Expr::I64(0)), float(1.0));
                let mean = bin(BinOp::Div, load(out, to.clone()), size);
                stmts.push(store(out, to, mean));
            }
            stmts
        });
        alloc(count, 1, body)
    }

    /// Query by query: its scores, their softmax, and the mean of the values that it weighs.
    fn attention(&mut self, attention: &Attention, out: &str) -> Vec<Stmt> {
        let Attention { q, k, v, bias, mask, causal, scale } = attention;
        let extents = attention.extents();
        let (scores, statistics) = (format!("scores_{out}"), format!("statistics_{out}"));
        let (largest, sum) = (Expr::I64(0), Expr::I64(1));
        let group = extents.heads / extents.kv_heads.max(1);
        let shape = [extents.batch, extents.heads, extents.time];
        let to_shape = [extents.batch, extents.time, extents.heads, extents.value_dim];
        let body = self.nest(&shape, |writer, at| {
            let [b, head, t] = [at[0].clone(), at[1].clone(), at[2].clone()];
            let kv_head = bin(BinOp::FloorDiv, head.clone(), int(group));
            let mut stmts = vec![
                store(&statistics, largest.clone(), float(f32::NEG_INFINITY)),
                store(&statistics, sum.clone(), float(0.0)),
            ];
            stmts.extend(writer.each(extents.source, LoopKind::Serial, |writer, key| {
                let mut stmts = vec![store(&scores, key.clone(), float(0.0))];
                stmts.extend(writer.each(extents.dim, LoopKind::Serial, |writer, i| {
                    let query = writer.read(q, &[b.clone(), head.clone(), t.clone(), i.clone()]);
                    let other = writer.read(k, &[b.clone(), kv_head.clone(), key.clone(), i]);
                    let product = bin(BinOp::Mul, query, other);
                    vec![store(&scores, key.clone(), bin(BinOp::Add, load(&scores, key.clone()), product))]
                }));
                let mut score = bin(BinOp::Mul, load(&scores, key.clone()), float(*scale));
                let place = [b.clone(), head.clone(), t.clone(), key.clone()];
                if let Some(bias) = bias {
                    score = bin(BinOp::Add, score, writer.read(bias, &place));
                }
                if let Some(mask) = mask {
                    score = select(holds(writer.read(mask, &place)), float(f32::NEG_INFINITY), score);
                }
                if *causal {
                    let last = add(t.clone(), Expr::I64(extents.source as i64 - extents.time as i64));
                    let hidden = bin(BinOp::Gt, key.clone(), last);
                    score = select(hidden, float(f32::NEG_INFINITY), score);
                }
                stmts.push(store(&scores, key.clone(), score));
                let greater = bin(BinOp::Max, load(&statistics, largest.clone()), load(&scores, key));
                stmts.push(store(&statistics, largest.clone(), greater));
                stmts
            }));
            stmts.extend(writer.each(extents.source, LoopKind::Serial, |_, key| {
                // A query that sees nothing has no largest score.
                let seen = bin(BinOp::Gt, load(&scores, key.clone()), float(f32::NEG_INFINITY));
                let shifted = bin(BinOp::Sub, load(&scores, key.clone()), load(&statistics, largest.clone()));
                let weight = select(seen, call(Function::Exp, shifted), float(0.0));
                let total = bin(BinOp::Add, load(&statistics, sum.clone()), load(&scores, key.clone()));
                vec![store(&scores, key, weight), store(&statistics, sum.clone(), total)]
            }));
            stmts.extend(writer.each(extents.value_dim, LoopKind::Serial, |writer, i| {
                let to = row_major(&to_shape, &[b.clone(), t.clone(), head.clone(), i.clone()]);
                let mut stmts = vec![store(out, to.clone(), float(0.0))];
                stmts.extend(writer.each(extents.source, LoopKind::Serial, |writer, key| {
                    let value = writer.read(v, &[b.clone(), kv_head.clone(), key.clone(), i]);
                    let weighed = bin(BinOp::Mul, load(&scores, key), value);
                    vec![store(out, to.clone(), bin(BinOp::Add, load(out, to.clone()), weighed))]
                }));
                let total = load(&statistics, sum.clone());
                let mean = bin(BinOp::Div, load(out, to.clone()), total.clone());
                stmts.push(store(out, to, select(bin(BinOp::Gt, total, float(0.0)), mean, float(0.0))));
                stmts
            }));
            stmts
        });
        alloc(scores, extents.source, alloc(statistics, 2, body))
    }

    /// Replaces rows that are already in the output.
    fn rows(&mut self, work: RowWork, len: usize, width: usize, out: &str) -> Vec<Stmt> {
        let statistics = format!("statistics_{out}");
        let (largest, sum) = (Expr::I64(0), Expr::I64(1));
        let body = self.each(len / width.max(1), LoopKind::Serial, |writer, row| {
            let element = |j: &Expr| add(mul(row.clone(), int(width)), j.clone());
            if work == RowWork::CumulativeSum {
                return writer.each(width.saturating_sub(1), LoopKind::Serial, |_, j| {
                    let next = element(&add(j.clone(), int(1)));
                    let total = bin(BinOp::Add, load(out, element(&j)), load(out, next.clone()));
                    vec![store(out, next, total)]
                });
            }
            let mut stmts = vec![
                store(&statistics, largest.clone(), float(f32::NEG_INFINITY)),
                store(&statistics, sum.clone(), float(0.0)),
            ];
            stmts.extend(writer.each(width, LoopKind::Serial, |_, j| {
                let greater = bin(BinOp::Max, load(&statistics, largest.clone()), load(out, element(&j)));
                vec![store(&statistics, largest.clone(), greater)]
            }));
            stmts.extend(writer.each(width, LoopKind::Serial, |_, j| {
                let shifted = bin(BinOp::Sub, load(out, element(&j)), load(&statistics, largest.clone()));
                let exponential = call(Function::Exp, shifted.clone());
                let kept = if work == RowWork::Softmax { exponential.clone() } else { shifted };
                let total = bin(BinOp::Add, load(&statistics, sum.clone()), exponential);
                vec![store(&statistics, sum.clone(), total), store(out, element(&j), kept)]
            }));
            let total = load(&statistics, sum.clone());
            stmts.extend(writer.each(width, LoopKind::Vectorized, |_, j| {
                let x = load(out, element(&j));
                let value = match work {
                    RowWork::Softmax => bin(BinOp::Div, x, total),
                    _ => bin(BinOp::Sub, x, call(Function::Log, total)),
                };
                vec![store(out, element(&j), value)]
            }));
            stmts
        });
        alloc(statistics, 2, body)
    }

    /// Replaces rows that are already in the output.
    fn layer_norm(
        &mut self,
        weight: &View,
        bias: Option<&View>,
        epsilon: f32,
        len: usize,
        out: &str,
    ) -> Vec<Stmt> {
        let width = weight.len();
        let statistics = format!("statistics_{out}");
        let (mean, variance) = (Expr::I64(0), Expr::I64(1));
        let body = self.each(len / width.max(1), LoopKind::Serial, |writer, row| {
            let element = |j: &Expr| add(mul(row.clone(), int(width)), j.clone());
            let centred = |j: &Expr| bin(BinOp::Sub, load(out, element(j)), load(&statistics, mean.clone()));
            let share = |x: Expr| bin(BinOp::Div, x, float(width as f32));
            let accumulate = |at: &Expr, x: Expr| {
                store(&statistics, at.clone(), bin(BinOp::Add, load(&statistics, at.clone()), x))
            };
            let mut stmts = vec![
                store(&statistics, mean.clone(), float(0.0)),
                store(&statistics, variance.clone(), float(0.0)),
            ];
            stmts.extend(
                writer.each(width, LoopKind::Serial, |_, j| vec![accumulate(&mean, load(out, element(&j)))]),
            );
            stmts.push(store(&statistics, mean.clone(), share(load(&statistics, mean.clone()))));
            stmts.extend(writer.each(width, LoopKind::Serial, |_, j| {
                vec![accumulate(&variance, bin(BinOp::Mul, centred(&j), centred(&j)))]
            }));
            let deviation = call(
                Function::Sqrt,
                bin(BinOp::Add, share(load(&statistics, variance.clone())), float(epsilon)),
            );
            stmts.push(store(&statistics, variance.clone(), deviation));
            stmts.extend(writer.each(width, LoopKind::Vectorized, |writer, j| {
                let normalised = bin(BinOp::Div, centred(&j), load(&statistics, variance.clone()));
                let scaled = bin(BinOp::Mul, normalised, writer.read(weight, std::slice::from_ref(&j)));
                let value = match bias {
                    Some(bias) => bin(BinOp::Add, scaled, writer.read(bias, std::slice::from_ref(&j))),
                    None => scaled,
                };
                vec![store(out, element(&j), value)]
            }));
            stmts
        });
        alloc(statistics, 2, body)
    }

    fn reduce(
        &mut self,
        x: &Expression,
        width: usize,
        reduction: Reduction,
        len: usize,
        out: &str,
    ) -> Result<Vec<Stmt>> {
        let (start, join) = match reduction {
            Reduction::Sum | Reduction::Mean => (0.0, BinOp::Add),
            Reduction::Product => (1.0, BinOp::Mul),
            Reduction::Max => (f32::NEG_INFINITY, BinOp::Max),
            Reduction::Min => (f32::INFINITY, BinOp::Min),
        };
        let shape = self.shape_of(x, len * width);
        let split = axes_before(&shape, width);
        let mut stmts = self.each(len, LoopKind::Vectorized, |_, row| vec![store(out, row, float(start))]);
        let mut failed = None;
        stmts.extend(self.nest(&shape, |writer, at| {
            let to = row_major(&shape[..split], &at[..split]);
            match writer.value(x, at) {
                Ok(value) => vec![store(out, to.clone(), bin(join, load(out, to), value))],
                Err(error) => {
                    failed = Some(error);
                    Vec::new()
                }
            }
        }));
        if reduction == Reduction::Mean {
            stmts.extend(self.each(len, LoopKind::Vectorized, |_, row| {
                vec![store(out, row.clone(), bin(BinOp::Div, load(out, row), float(width as f32)))]
            }));
        }
        failed.map_or(Ok(stmts), Err)
    }

    fn gather(&mut self, table: &View, indices: &View, out: &str) -> Vec<Stmt> {
        let [rows, width] = [table.shape[0], table.shape[1]];
        let ids = self.names[&indices.buffer].clone();
        self.each(indices.len(), LoopKind::Serial, |writer, i| {
            let id = load(&ids, add(int(indices.offset), i.clone()));
            let known = bin(
                BinOp::And,
                bin(BinOp::Ge, id.clone(), Expr::I64(0)),
                bin(BinOp::Lt, id.clone(), int(rows)),
            );
            let mut stmts =
                vec![Stmt::Assert { cond: known, msg: format!("an index points into {rows} rows") }];
            stmts.extend(writer.each(width, LoopKind::Vectorized, |writer, j| {
                let element = writer.read(table, &[id, j.clone()]);
                vec![store(out, add(mul(i, int(width)), j), element)]
            }));
            stmts
        })
    }

    /// A parameter for a weight that is no buffer of the graph's.
    fn constant(&mut self, values: &[f32]) -> String {
        let name = format!("weight{}", self.constants.len());
        let (shape, dtype) = (vec![values.len()], ScalarType::F32);
        self.params.push(Param { name: name.clone(), dtype, shape: shape.clone(), io: Io::In });
        self.constants.insert(name.clone(), Buffer { shape, elements: Elements::F32(values.to_vec()) });
        name
    }
}

/// Statements for places that lie inside of their extents.
fn inside(places: &[Expr], extents: &[usize], then: Vec<Stmt>) -> Vec<Stmt> {
    let within = |(place, &extent): (&Expr, &usize)| {
        bin(
            BinOp::And,
            bin(BinOp::Ge, place.clone(), Expr::I64(0)),
            bin(BinOp::Lt, place.clone(), int(extent)),
        )
    };
    let cond = places.iter().zip(extents).map(within).reduce(|a, b| bin(BinOp::And, a, b));
    vec![Stmt::If { cond: cond.unwrap_or(Expr::Bool(true)), then, otherwise: Vec::new() }]
}

/// A small buffer of floats around some statements.
fn alloc(buf: String, len: usize, body: Vec<Stmt>) -> Vec<Stmt> {
    vec![Stmt::Alloc { buf, dtype: ScalarType::F32, shape: vec![len], scope: Memory::Stack, body }]
}

fn no_form(name: &str) -> Error {
    Error::usage(format!("{name} has no form as loops"))
        .hint("`kiln graph run` computes the graph without them")
}

fn unary(operation: Unary, x: Expr) -> Result<Expr> {
    let negative = |x: Expr| Expr::Un(UnOp::Neg, Box::new(x));
    let size = |x: Expr| Expr::Un(UnOp::Abs, Box::new(x));
    let plus_one = |x: Expr| bin(BinOp::Add, float(1.0), x);
    Ok(match operation {
        Unary::Abs => size(x),
        Unary::Ceil => call(Function::Ceil, x),
        Unary::Erf => call(Function::Erf, x),
        Unary::Exp => call(Function::Exp, x),
        Unary::Floor => call(Function::Floor, x),
        Unary::Gelu => {
            let scaled = bin(BinOp::Mul, x.clone(), float(std::f32::consts::FRAC_1_SQRT_2));
            bin(BinOp::Mul, bin(BinOp::Mul, float(0.5), x), plus_one(call(Function::Erf, scaled)))
        }
        Unary::LeakyRelu(slope) => {
            let positive = bin(BinOp::Ge, x.clone(), float(0.0));
            select(positive, x.clone(), bin(BinOp::Mul, float(slope), x))
        }
        Unary::Log => call(Function::Log, x),
        Unary::LogSigmoid => {
            let rest = call(Function::Log, plus_one(call(Function::Exp, negative(size(x.clone())))));
            bin(BinOp::Sub, bin(BinOp::Min, x, float(0.0)), rest)
        }
        Unary::Negate => negative(x),
        Unary::Not => bin(BinOp::Sub, float(1.0), x),
        Unary::IsNan => truth(bin(BinOp::Ne, x.clone(), x)),
        Unary::IsInfinite => truth(bin(BinOp::Eq, size(x), float(f32::INFINITY))),
        Unary::Reciprocal => bin(BinOp::Div, float(1.0), x),
        Unary::Relu => bin(BinOp::Max, x, float(0.0)),
        Unary::Sigmoid => bin(BinOp::Div, float(1.0), plus_one(call(Function::Exp, negative(x)))),
        Unary::Sign => {
            let positive = bin(BinOp::Gt, x.clone(), float(0.0));
            select(positive, float(1.0), select(bin(BinOp::Lt, x, float(0.0)), float(-1.0), float(0.0)))
        }
        Unary::Sqrt => call(Function::Sqrt, x),
        Unary::Sin => call(Function::Sin, x),
        Unary::Cos => call(Function::Cos, x),
        Unary::Tanh => call(Function::Tanh, x),
        Unary::Truncate => {
            let down = bin(BinOp::Ge, x.clone(), float(0.0));
            select(down, call(Function::Floor, x.clone()), call(Function::Ceil, x))
        }
        other => return Err(no_form(&format!("{other:?}"))),
    })
}

fn binary(operation: Binary, a: Expr, b: Expr) -> Result<Expr> {
    Ok(match operation {
        Binary::Add => bin(BinOp::Add, a, b),
        Binary::Subtract => bin(BinOp::Sub, a, b),
        Binary::Multiply | Binary::And => bin(BinOp::Mul, a, b),
        Binary::Divide => bin(BinOp::Div, a, b),
        Binary::AtLeast => bin(BinOp::Max, a, b),
        Binary::AtMost => bin(BinOp::Min, a, b),
        Binary::Equal => truth(bin(BinOp::Eq, a, b)),
        Binary::NotEqual | Binary::Xor => truth(bin(BinOp::Ne, a, b)),
        Binary::Greater => truth(bin(BinOp::Gt, a, b)),
        Binary::GreaterEqual => truth(bin(BinOp::Ge, a, b)),
        Binary::Less => truth(bin(BinOp::Lt, a, b)),
        Binary::LessEqual => truth(bin(BinOp::Le, a, b)),
        Binary::Or => bin(BinOp::Max, a, b),
        other => return Err(no_form(&format!("{other:?}"))),
    })
}
