//! Quantised numbers: the elementary operations that `QuantizeLinear` and `DequantizeLinear` are read as, found again.

use std::collections::{BTreeSet, HashMap};

use burn::backend::ir::{
    BinaryOpIr, FloatOperationIr as Float, IntOperationIr as Int, NumericOperationIr as Numeric, OperationIr,
    TensorId, TensorIr,
};
use burn::tensor::{DType, TensorData};

use crate::Graph;

/// Numbers that are rounded to 8-bit integers, or stored as such or as 32-bit ones: `(q - zero) · scale`.
pub struct Quantised<'a> {
    /// The integers, or the floats that are rounded to them.
    pub x: &'a TensorIr,
    /// Whether `x` are floats.
    pub rounds: bool,
    /// The type of the integers.
    pub dtype: DType,
    /// One number, or one for every place along the axis.
    pub scale: Vec<f32>,
    /// As many as scales.
    pub zero: Vec<i64>,
    pub axis: Option<usize>,
}

/// What is found, by the operation that ends it, and the operations that it takes the place of.
pub fn find(graph: &Graph) -> (HashMap<usize, Quantised<'_>>, BTreeSet<usize>) {
    let mut readers = HashMap::<TensorId, Vec<usize>>::new();
    for (at, operation) in graph.operations.iter().enumerate() {
        for tensor in operation.inputs() {
            readers.entry(tensor.id).or_default().push(at);
        }
    }
    // What is an output has a reader outside.
    graph.outputs.iter().for_each(|output| readers.entry(output.tensor).or_default().push(usize::MAX));
    let (mut found, mut replaced) = (HashMap::new(), BTreeSet::new());
    for at in (0..graph.operations.len()).filter(|&at| is_start(graph, at)) {
        let places = chain(graph, &readers, at);
        if let Some((quantised, length)) = matched(graph, &places) {
            replaced.extend(&places[..length - 1]);
            found.insert(places[length - 1], quantised);
        }
    }
    (found, replaced)
}

fn is_start(graph: &Graph, at: usize) -> bool {
    match &graph.operations[at] {
        OperationIr::Int(Int::IntoFloat(op)) => graph.constants.contains_key(&op.input.id),
        OperationIr::NumericFloat(_, Numeric::Div(op)) => graph.constants.contains_key(&op.rhs.id),
        _ => false,
    }
}

/// Operations of which each is the only reader of the one before.
fn chain(graph: &Graph, readers: &HashMap<TensorId, Vec<usize>>, start: usize) -> Vec<usize> {
    const LONGEST: usize = 8;
    let mut places = vec![start];
    while places.len() < LONGEST {
        let Some(out) = graph.operations[places[places.len() - 1]].outputs().next() else { break };
        match readers.get(&out.id).map(Vec::as_slice) {
            Some(&[next]) if next < graph.operations.len() => places.push(next),
            _ => break,
        }
    }
    places
}

/// The pattern at the beginning of a chain, and how many operations it has.
fn matched<'a>(graph: &'a Graph, places: &[usize]) -> Option<(Quantised<'a>, usize)> {
    let mut rest = places.iter().map(|&at| &graph.operations[at]).peekable();
    let mut length = 0;
    let mut next = |rest: &mut std::iter::Peekable<_>| -> Option<&'a OperationIr> {
        length += 1;
        rest.next()
    };
    let constant = |tensor: &TensorIr| graph.constants.get(&tensor.id);
    let first = next(&mut rest)?;
    let mut quantised = match first {
        OperationIr::Int(Int::IntoFloat(op)) => {
            let (x, dtype) = (&op.input, constant(&op.input)?.dtype());
            Quantised { x, rounds: false, dtype, scale: Vec::new(), zero: Vec::new(), axis: None }
        }
        OperationIr::NumericFloat(_, Numeric::Div(op)) => {
            let (scale, axis) = along_axis(constant(&op.rhs)?, op)?;
            let OperationIr::Float(_, Float::Round(_)) = next(&mut rest)? else { return None };
            let mut zero = Vec::new();
            if let Some(OperationIr::NumericFloat(_, Numeric::Add(op))) = rest.peek() {
                next(&mut rest);
                zero = whole(&along_axis(constant(&op.rhs)?, op)?.0)?;
            }
            let OperationIr::NumericFloat(_, Numeric::Clamp(clamp)) = next(&mut rest)? else { return None };
            let dtype = match (clamp.min.elem::<f64>(), clamp.max.elem::<f64>()) {
                (-128.0, 127.0) => DType::I8,
                (0.0, 255.0) => DType::U8,
                _ => return None,
            };
            let OperationIr::Float(_, Float::IntoInt(_)) = next(&mut rest)? else { return None };
            let OperationIr::Int(Int::IntoFloat(_)) = next(&mut rest)? else { return None };
            Quantised { x: &op.lhs, rounds: true, dtype, scale, zero, axis }
        }
        _ => return None,
    };
    // Biases are stored in 32 bits.
    let stored = !quantised.rounds && quantised.dtype == DType::I32;
    if !matches!(quantised.dtype, DType::I8 | DType::U8) && !stored {
        return None;
    }
    let mut zero = Vec::new();
    if let Some(OperationIr::NumericFloat(_, Numeric::Sub(op))) = rest.peek() {
        next(&mut rest);
        zero = whole(&along_axis(constant(&op.rhs)?, op)?.0)?;
    }
    let OperationIr::NumericFloat(_, Numeric::Mul(op)) = next(&mut rest)? else { return None };
    let (scale, axis) = along_axis(constant(&op.rhs)?, op)?;
    if quantised.rounds && (&scale, axis) != (&quantised.scale, quantised.axis) {
        return None;
    }
    // A zero point of 0 may have been left out.
    let filled = |zero: Vec<i64>| match zero.len() {
        0 => Some(vec![0; scale.len()]),
        1 => Some(vec![zero[0]; scale.len()]),
        length => (length == scale.len()).then_some(zero),
    };
    let zero = filled(zero)?;
    if quantised.rounds && filled(std::mem::take(&mut quantised.zero))? != zero {
        return None;
    }
    let range = match quantised.dtype {
        DType::I8 => -128..=127,
        DType::U8 => 0..=255,
        _ => 0..=0,
    };
    let within = zero.iter().all(|zero| range.contains(zero));
    within.then_some((Quantised { scale, zero, axis, ..quantised }, length))
}

/// The numbers of a constant that varies along one axis at most of what it is combined with, and that axis.
fn along_axis(data: &TensorData, op: &BinaryOpIr) -> Option<(Vec<f32>, Option<usize>)> {
    let shape = data.shape().to_vec();
    let mut varying = (0..shape.len()).filter(|&axis| shape[axis] != 1);
    let axis = varying.next();
    let fits = shape.len() == op.lhs.shape.rank() && varying.next().is_none() && op.out.shape == op.lhs.shape;
    (fits && data.dtype() == DType::F32).then(|| (data.iter::<f32>().collect(), axis))
}

fn whole(numbers: &[f32]) -> Option<Vec<i64>> {
    let is_whole = |x: &f32| x.fract() == 0.0;
    numbers.iter().all(is_whole).then(|| numbers.iter().map(|&x| x as i64).collect())
}
