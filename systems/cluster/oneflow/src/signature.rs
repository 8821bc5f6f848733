//! Which SBP an operation may read, and what it writes then (§3.1, table 1): one row a kind of Burn's operations.
//!
//! Most rows are an index notation. In `"*mk *kn > *mn"` every letter is an axis, `*` stands for all others, aligned from
//! the right, and `_` for an axis that is never split. Splitting a letter splits it wherever it stands; operands without it
//! are copies; results without it are partial sums. An operand after `+` is added, so where the result is partial it is
//! partial too. Beside the notation stand forms of operands under which the operation is linear: `PB` says that partial
//! sums of the first operand and copies of the second give partial sums.

use std::collections::{BTreeMap, BTreeSet};

use burn::backend::ir::{
    BaseOperationIr as Base, FloatOperationIr as Float, ModuleOperationIr as Module,
    NumericOperationIr as Numeric, OperationIr, PadModeIr, ScalarIr, TensorIr,
};
use burn::tensor::{IndexingUpdateOp, Slice};
use kiln_core::Result;
use serde::Serialize;

use crate::sbp::{NdSbp, Reduction, Sbp};

/// A legal way to compute an operation on one axis of the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Signature {
    /// One an operand.
    pub inputs: Vec<Sbp>,
    /// One a result.
    pub outputs: Vec<Sbp>,
    /// Whether the axis that the operation normalises over is split: it is computed in parts with reductions between them.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub in_parts: bool,
}

impl Signature {
    /// Everything as copies, which any operation allows.
    pub fn broadcast(operation: &OperationIr) -> Self {
        Self::plain(vec![Sbp::B; operation.inputs().count()], vec![Sbp::B; operation.outputs().count()])
    }

    fn plain(inputs: Vec<Sbp>, outputs: Vec<Sbp>) -> Self {
        Self { inputs, outputs, in_parts: false }
    }

    /// Whether every device does a part of the work.
    pub fn divides(&self) -> bool {
        self.inputs.iter().chain(&self.outputs).any(|sbp| sbp.axis().is_some())
    }
}

impl std::fmt::Display for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let joined = |forms: &[Sbp]| forms.iter().map(Sbp::to_string).collect::<Vec<_>>().join(",");
        write!(f, "({}) -> {}", joined(&self.inputs), joined(&self.outputs))?;
        if self.in_parts { f.write_str(" in parts") } else { Ok(()) }
    }
}

/// What a kind of operation allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Law {
    /// Index notation, and forms under which the operation is linear.
    Index(&'static str, &'static [&'static str]),
    /// Works along one axis, which stays whole: all others may be split, in operands and results alike.
    Along(&'static [&'static str]),
    /// The same, and with the axis split the operation is computed in parts.
    Normalise,
    /// Reduces axes; splits of them become partial results.
    Reduce(Reduction),
    /// Moves elements without computing.
    Move,
    /// Picks rows or elements by whole numbers.
    Pick,
    /// Adds rows or elements into others by whole numbers.
    Put,
    /// Makes a tensor out of nothing.
    Make,
}

impl std::fmt::Display for Law {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let linear = |f: &mut std::fmt::Formatter<'_>, forms: &[&str]| {
            forms.iter().try_for_each(|forms| write!(f, "; linear in {forms}"))
        };
        match self {
            Self::Index(notation, forms) => {
                f.write_str(notation)?;
                linear(f, forms)
            }
            Self::Along(forms) => {
                f.write_str("works along an axis, others are split")?;
                linear(f, forms)
            }
            Self::Normalise => {
                f.write_str("works along an axis, others are split; a split of that one is computed in parts")
            }
            Self::Reduce(reduction) => {
                write!(f, "reduces: a split of a reduced axis gives {}", Sbp::P(*reduction))
            }
            Self::Move => f.write_str("moves elements: a split goes where its axis goes; P stays P"),
            Self::Pick => {
                f.write_str("picks by number: rows split give P, other axes and the numbers' split stay")
            }
            Self::Put => f.write_str("adds by number: rows and other axes split stay, split numbers give P"),
            Self::Make => f.write_str("made in place: any axis may be split"),
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// The operation's name in a graph.
    pub kind: &'static str,
    /// What it allows.
    pub law: Law,
}

const EACH: Law = Law::Index("* > *", &[]);
const EACH_LINEAR: Law = Law::Index("* > *", &["P"]);
const PAIR: Law = Law::Index("* * > *", &[]);
const SLOPE: Law = Law::Index("* * > *", &["BP"]);

const fn row(kind: &'static str, law: Law) -> Row {
    Row { kind, law }
}

/// Every kind of operation that may be split. What is not here is computed as copies.
pub const TABLE: &[Row] = &[
    // Element by element.
    row("Exp", EACH),
    row("Log", EACH),
    row("Log1p", EACH),
    row("Erf", EACH),
    row("PowfScalar", EACH),
    row("Sqrt", EACH),
    row("Cos", EACH),
    row("Cosh", EACH),
    row("Sin", EACH),
    row("Sinh", EACH),
    row("Tan", EACH),
    row("Tanh", EACH),
    row("ArcCos", EACH),
    row("ArcCosh", EACH),
    row("ArcSin", EACH),
    row("ArcSinh", EACH),
    row("ArcTan", EACH),
    row("ArcTanh", EACH),
    row("Round", EACH),
    row("Floor", EACH),
    row("Ceil", EACH),
    row("Trunc", EACH),
    row("IntoInt", EACH),
    row("Recip", EACH),
    row("IsNan", EACH),
    row("IsInf", EACH),
    row("Abs", EACH),
    row("Sign", EACH),
    row("AddScalar", EACH),
    row("SubScalar", EACH),
    row("RemScalar", EACH),
    row("PowiScalar", EACH),
    row("Clamp", EACH),
    row("ClampMin", EACH),
    row("ClampMax", EACH),
    row("GreaterElem", EACH),
    row("GreaterEqualElem", EACH),
    row("LowerElem", EACH),
    row("LowerEqualElem", EACH),
    row("EqualElem", EACH),
    row("NotEqualElem", EACH),
    row("Not", EACH),
    row("BitwiseNot", EACH),
    row("BitwiseAndScalar", EACH),
    row("BitwiseOrScalar", EACH),
    row("BitwiseXorScalar", EACH),
    row("BitwiseLeftShiftScalar", EACH),
    row("BitwiseRightShiftScalar", EACH),
    row("Relu", EACH),
    row("LeakyRelu", EACH),
    row("Gelu", EACH),
    row("Sigmoid", EACH),
    row("HardSigmoid", EACH),
    row("LogSigmoid", EACH),
    row("Neg", EACH_LINEAR),
    row("MulScalar", EACH_LINEAR),
    row("DivScalar", EACH_LINEAR),
    row("Cast", EACH_LINEAR),
    row("IntoFloat", EACH_LINEAR),
    row("Add", Law::Index("* * > *", &["PP"])),
    row("Sub", Law::Index("* * > *", &["PP"])),
    row("Mul", Law::Index("* * > *", &["PB", "BP"])),
    row("Div", Law::Index("* * > *", &["PB"])),
    row("Rem", PAIR),
    row("Powi", PAIR),
    row("Powf", PAIR),
    row("Hypot", PAIR),
    row("ArcTan2", PAIR),
    row("Greater", PAIR),
    row("GreaterEqual", PAIR),
    row("Lower", PAIR),
    row("LowerEqual", PAIR),
    row("Equal", PAIR),
    row("NotEqual", PAIR),
    row("And", PAIR),
    row("Or", PAIR),
    row("Xor", PAIR),
    row("BitwiseAnd", PAIR),
    row("BitwiseOr", PAIR),
    row("BitwiseXor", PAIR),
    row("BitwiseLeftShift", PAIR),
    row("BitwiseRightShift", PAIR),
    row("ReluBackward", SLOPE),
    row("GeluBackward", SLOPE),
    row("SigmoidBackward", SLOPE),
    row("LogSigmoidBackward", SLOPE),
    row("MaskWhere", Law::Index("* * * > *", &["PBP"])),
    row("MaskFill", Law::Index("* * > *", &["PB"])),
    // Reductions.
    row("Sum", Law::Reduce(Reduction::Sum)),
    row("SumDim", Law::Reduce(Reduction::Sum)),
    row("SumDims", Law::Reduce(Reduction::Sum)),
    row("Mean", Law::Reduce(Reduction::Sum)),
    row("MeanDim", Law::Reduce(Reduction::Sum)),
    row("Max", Law::Reduce(Reduction::Max)),
    row("MaxDim", Law::Reduce(Reduction::Max)),
    row("Min", Law::Reduce(Reduction::Min)),
    row("MinDim", Law::Reduce(Reduction::Min)),
    // Along an axis.
    row("Softmax", Law::Normalise),
    row("LogSoftmax", Law::Normalise),
    row("Softmin", Law::Along(&[])),
    row("CumSum", Law::Along(&["P"])),
    row("CumProd", Law::Along(&[])),
    row("CumMin", Law::Along(&[])),
    row("CumMax", Law::Along(&[])),
    row("ProdDim", Law::Along(&[])),
    row("MaxAbsDim", Law::Along(&[])),
    row("ArgMax", Law::Along(&[])),
    row("ArgMin", Law::Along(&[])),
    row("ArgTopK", Law::Along(&[])),
    row("TopK", Law::Along(&[])),
    row("TopKWithIndices", Law::Along(&[])),
    row("MaxDimWithIndices", Law::Along(&[])),
    row("MinDimWithIndices", Law::Along(&[])),
    row("Sort", Law::Along(&[])),
    row("SortWithIndices", Law::Along(&[])),
    row("ArgSort", Law::Along(&[])),
    row("AllDim", Law::Along(&[])),
    row("AnyDim", Law::Along(&[])),
    row("Cross", Law::Along(&["PB", "BP"])),
    // Moves.
    row("Reshape", Law::Move),
    row("SwapDims", Law::Move),
    row("Permute", Law::Move),
    row("Flip", Law::Move),
    row("Expand", Law::Move),
    row("Slice", Law::Move),
    row("SliceAssign", Law::Move),
    row("RepeatDim", Law::Move),
    row("Cat", Law::Move),
    row("Unfold", Law::Move),
    row("Pad", Law::Move),
    // Rows and elements by number.
    row("Select", Law::Pick),
    row("Gather", Law::Pick),
    row("SelectAssign", Law::Put),
    row("Scatter", Law::Put),
    row("Embedding", Law::Index("vd * > *d", &["PB"])),
    row("EmbeddingBackward", Law::Index("vd *d * > vd", &["BPB"])),
    // Out of nothing.
    row("Full", Law::Make),
    row("Zeros", Law::Make),
    row("Ones", Law::Make),
    row("Random", Law::Make),
    row("IntRandom", Law::Make),
    // Products.
    row("Matmul", Law::Index("*mk *kn > *mn", &["PB", "BP"])),
    row("Linear", Law::Index("*i io +o > *o", &["PBP"])),
    row("LinearXBackward", Law::Index("io *o > *i", &["BP", "PB"])),
    row("LinearWeightBackward", Law::Index("*i *o > io", &["BP", "PB"])),
    row("LinearBiasBackward", Law::Index("*o > o", &["P"])),
    row("Conv1d", Law::Index("bc_ oc_ +o > bo_", &["PBP"])),
    row("Conv1dXBackward", Law::Index("bc_ oc_ bo_ > bc_", &["BBP"])),
    row("Conv1dWeightBackward", Law::Index("bc_ oc_ bo_ > oc_", &["BBP"])),
    row("Conv1dBiasBackward", Law::Index("b__ o bo_ > o", &["BBP"])),
    row("Conv2d", Law::Index("bc__ oc__ +o > bo__", &["PBP"])),
    row("Conv2dXBackward", Law::Index("bc__ oc__ bo__ > bc__", &["BBP"])),
    row("Conv2dWeightBackward", Law::Index("bc__ oc__ bo__ > oc__", &["BBP"])),
    row("Conv2dBiasBackward", Law::Index("b___ o bo__ > o", &["BBP"])),
    row("ConvTranspose1d", Law::Index("bc_ co_ +o > bo_", &["PBP"])),
    row("ConvTranspose2d", Law::Index("bc__ co__ +o > bo__", &["PBP"])),
    row("Attention", Law::Index("bh__ bh__ bh__ bh__ bh__ > bh__", &["BBP"])),
    // Norms and pools.
    row("LayerNorm", Law::Index("*_ _ _ > *_", &[])),
    row("BatchNorm", Law::Index("bc* c c c c > bc*", &[])),
    row("PRelu", PAIR),
    row("AvgPool1d", Law::Index("bc_ > bc_", &["P"])),
    row("AvgPool2d", Law::Index("bc__ > bc__", &["P"])),
    row("AvgPool1dBackward", Law::Index("bc_ bc_ > bc_", &["BP"])),
    row("AvgPool2dBackward", Law::Index("bc__ bc__ > bc__", &["BP"])),
    row("AdaptiveAvgPool1d", Law::Index("bc_ > bc_", &["P"])),
    row("AdaptiveAvgPool2d", Law::Index("bc__ > bc__", &["P"])),
    row("AdaptiveAvgPool1dBackward", Law::Index("bc_ bc_ > bc_", &["BP"])),
    row("AdaptiveAvgPool2dBackward", Law::Index("bc__ bc__ > bc__", &["BP"])),
    row("MaxPool1d", Law::Index("bc_ > bc_", &[])),
    row("MaxPool2d", Law::Index("bc__ > bc__", &[])),
    row("MaxPool1dWithIndices", Law::Index("bc_ > bc_ bc_", &[])),
    row("MaxPool2dWithIndices", Law::Index("bc__ > bc__ bc__", &[])),
    row("MaxPool1dWithIndicesBackward", Law::Index("bc_ bc_ bc_ > bc_", &["BBP"])),
    row("MaxPool2dWithIndicesBackward", Law::Index("bc__ bc__ bc__ > bc__", &["BBP"])),
    row("Interpolate", Law::Index("bc__ > bc__", &[])),
];

/// The row of a kind.
pub fn law_of(kind: &str) -> Option<Law> {
    TABLE.iter().find(|row| row.kind == kind).map(|row| row.law)
}

/// All legal signatures of an operation on one axis of the mesh; copies last.
///
/// # Errors
/// When the operation has no name.
pub fn signatures(operation: &OperationIr) -> Result<Vec<Signature>> {
    let kind = kiln_compiler::operation_name(operation)?;
    let mut found = law_of(&kind).map_or_else(Vec::new, |law| by_law(operation, &kind, law));
    // Truth values and whole numbers of comparisons have no sums.
    let truth = |tensor: &TensorIr| tensor.dtype.is_bool();
    found.retain(|signature| {
        let inputs = operation.inputs().zip(&signature.inputs);
        inputs
            .chain(operation.outputs().zip(&signature.outputs))
            .all(|(tensor, sbp)| !(truth(tensor) && sbp.reduction().is_some()))
    });
    found.push(Signature::broadcast(operation));
    Ok(found)
}

fn by_law(operation: &OperationIr, kind: &str, law: Law) -> Vec<Signature> {
    match law {
        Law::Index(notation, linear) => {
            let mut found = by_notation(operation, notation);
            if is_linear(operation, kind) {
                found.extend(linear.iter().map(|forms| partial(operation, forms)));
            }
            found
        }
        Law::Along(linear) => {
            let mut found = along(operation);
            found.extend(linear.iter().map(|forms| partial(operation, forms)));
            found
        }
        Law::Normalise => {
            let mut found = along(operation);
            if let Some(axis) = worked_axis(operation) {
                let split = vec![Sbp::S(axis)];
                found.push(Signature { inputs: split.clone(), outputs: split, in_parts: true });
            }
            found
        }
        Law::Reduce(reduction) => reduce(operation, reduction),
        Law::Move => moves(operation),
        Law::Pick => pick(operation),
        Law::Put => put(operation),
        Law::Make => {
            let rank = operation.outputs().next().map_or(0, |out| out.shape.rank());
            (0..rank).map(|axis| Signature::plain(Vec::new(), vec![Sbp::S(axis)])).collect()
        }
    }
}

/// Whether the forms of the row hold for this operation too: whole numbers are rounded when they are divided, and what is
/// filled in must be zero.
fn is_linear(operation: &OperationIr, kind: &str) -> bool {
    match operation {
        OperationIr::NumericInt(..) => !matches!(kind, "Div" | "DivScalar"),
        OperationIr::BaseFloat(Base::MaskFill(op)) | OperationIr::BaseInt(Base::MaskFill(op)) => {
            is_zero(&op.value)
        }
        OperationIr::BaseFloat(Base::Cast(_)) => true,
        OperationIr::BaseInt(Base::Cast(_)) => false,
        _ => true,
    }
}

fn is_zero(value: &ScalarIr) -> bool {
    value.elem::<f64>() == 0.0
}

/// `PB`: partial sums of the first operand, copies of the second, partial sums of the result. Operands that are not there
/// fall away.
fn partial(operation: &OperationIr, forms: &str) -> Signature {
    let forms = forms.chars().chain(std::iter::repeat('B'));
    let inputs = operation.inputs().zip(forms).map(|(_, form)| if form == 'P' { Sbp::SUM } else { Sbp::B });
    Signature::plain(inputs.collect(), vec![Sbp::SUM; operation.outputs().count()])
}

/// An axis in the notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Letter {
    Named(char),
    /// Counted from the right.
    Other(usize),
    /// Never split.
    Whole,
}

/// The letters of a tensor's axes; `None` where the rank does not fit the notation.
fn letters(word: &str, rank: usize) -> Option<Vec<Letter>> {
    let named = word.chars().filter(|letter| *letter != '*').count();
    let others = rank.checked_sub(named)?;
    if others > 0 && !word.contains('*') {
        return None;
    }
    let mut letters = Vec::with_capacity(rank);
    for letter in word.chars() {
        match letter {
            '*' => letters.extend((0..others).rev().map(Letter::Other)),
            '_' => letters.push(Letter::Whole),
            letter => letters.push(Letter::Named(letter)),
        }
    }
    Some(letters)
}

fn by_notation(operation: &OperationIr, notation: &str) -> Vec<Signature> {
    let Some((operands, results)) = notation.split_once('>') else { return Vec::new() };
    let added: Vec<bool> = operands.split_whitespace().map(|word| word.starts_with('+')).collect();
    let read = |words: &str, tensors: &[&TensorIr]| -> Option<Vec<Vec<Letter>>> {
        let words = words.split_whitespace().map(|word| word.trim_start_matches('+'));
        words.zip(tensors).map(|(word, tensor)| letters(word, tensor.shape.rank())).collect()
    };
    let (inputs, outputs): (Vec<&TensorIr>, Vec<&TensorIr>) =
        (operation.inputs().collect(), operation.outputs().collect());
    let (Some(operand_letters), Some(result_letters)) = (read(operands, &inputs), read(results, &outputs))
    else {
        return Vec::new();
    };
    let mut extents: BTreeMap<Letter, usize> = BTreeMap::new();
    let all = operand_letters.iter().zip(&inputs).chain(result_letters.iter().zip(&outputs));
    for (letters, tensor) in all {
        for (letter, &size) in letters.iter().zip(tensor.shape.iter()) {
            let extent = extents.entry(*letter).or_insert(1);
            *extent = (*extent).max(size);
        }
    }
    extents.remove(&Letter::Whole);
    // Channels in groups: their order is not that of the axis.
    if groups(operation) > 1 {
        extents.remove(&Letter::Named('c'));
        extents.remove(&Letter::Named('o'));
    }
    let place = |letters: &[Letter], tensor: &TensorIr, letter: Letter, extent: usize| {
        letters.iter().position(|other| *other == letter).filter(|&axis| tensor.shape[axis] == extent)
    };
    let split = |(&letter, &extent): (&Letter, &usize)| {
        if extent < 2 {
            return None;
        }
        let outputs = result_letters.iter().zip(&outputs);
        let outputs: Vec<Sbp> = outputs
            .map(|(letters, tensor)| place(letters, tensor, letter, extent).map_or(Sbp::SUM, Sbp::S))
            .collect();
        let sums = outputs.contains(&Sbp::SUM);
        let inputs = operand_letters.iter().zip(&inputs).zip(&added).map(|((letters, tensor), &added)| {
            let absent = if added && sums { Sbp::SUM } else { Sbp::B };
            place(letters, tensor, letter, extent).map_or(absent, Sbp::S)
        });
        Some(Signature::plain(inputs.collect(), outputs))
    };
    extents.iter().filter_map(split).collect()
}

/// In how many groups a convolution's channels are.
fn groups(operation: &OperationIr) -> usize {
    let OperationIr::Module(module) = operation else { return 1 };
    match module {
        Module::Conv1d(op) => op.options.groups,
        Module::Conv1dXBackward(op) => op.options.groups,
        Module::Conv1dWeightBackward(op) => op.options.groups,
        Module::Conv2d(op) => op.options.groups,
        Module::Conv2dXBackward(op) => op.options.groups,
        Module::Conv2dWeightBackward(op) => op.options.groups,
        Module::ConvTranspose1d(op) => op.options.groups,
        Module::ConvTranspose2d(op) => op.options.groups,
        _ => 1,
    }
}

/// The axis along which an operation works.
pub(crate) fn worked_axis(operation: &OperationIr) -> Option<usize> {
    use burn::backend::ir::ActivationOperationIr as Activation;
    match operation {
        OperationIr::Activation(
            Activation::Softmax(op) | Activation::LogSoftmax(op) | Activation::Softmin(op),
        ) => Some(op.axis),
        OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric) => match numeric {
            Numeric::CumSum(op) | Numeric::CumProd(op) | Numeric::CumMin(op) | Numeric::CumMax(op) => {
                Some(op.axis)
            }
            Numeric::ProdDim(op)
            | Numeric::MaxAbsDim(op)
            | Numeric::ArgMax(op)
            | Numeric::ArgMin(op)
            | Numeric::ArgTopK(op)
            | Numeric::TopK(op) => Some(op.axis),
            Numeric::TopKWithIndices(op) => Some(op.dim),
            Numeric::MaxDimWithIndices(op) | Numeric::MinDimWithIndices(op) => Some(op.dim),
            Numeric::Sort(op) | Numeric::ArgSort(op) => Some(op.dim),
            Numeric::SortWithIndices(op) => Some(op.dim),
            _ => None,
        },
        OperationIr::BaseBool(Base::AllDim(op) | Base::AnyDim(op)) => Some(op.axis),
        OperationIr::BaseFloat(Base::AllDim(op) | Base::AnyDim(op)) => Some(op.axis),
        OperationIr::BaseInt(Base::AllDim(op) | Base::AnyDim(op)) => Some(op.axis),
        OperationIr::Float(_, Float::Cross(op)) => Some(op.dim),
        _ => None,
    }
}

/// Every axis but the one that is worked along.
fn along(operation: &OperationIr) -> Vec<Signature> {
    let (Some(worked), Some(input)) = (worked_axis(operation), operation.inputs().next()) else {
        return Vec::new();
    };
    let (operands, results) = (operation.inputs().count(), operation.outputs().count());
    let splittable = (0..input.shape.rank()).filter(|&axis| axis != worked && input.shape[axis] > 1);
    splittable
        .filter(|&axis| {
            operation
                .inputs()
                .chain(operation.outputs())
                .all(|tensor| tensor.shape[axis] == input.shape[axis])
        })
        .map(|axis| Signature::plain(vec![Sbp::S(axis); operands], vec![Sbp::S(axis); results]))
        .collect()
}

/// The axes that a reduction reduces; all where it leaves one element.
pub(crate) fn reduced_axes(operation: &OperationIr) -> Vec<usize> {
    let (OperationIr::NumericFloat(_, numeric) | OperationIr::NumericInt(_, numeric)) = operation else {
        return Vec::new();
    };
    match numeric {
        Numeric::SumDim(op) | Numeric::MeanDim(op) | Numeric::MaxDim(op) | Numeric::MinDim(op) => {
            vec![op.axis]
        }
        Numeric::SumDims(op) => op.axes.clone(),
        Numeric::Sum(op) | Numeric::Mean(op) | Numeric::Max(op) | Numeric::Min(op) => {
            (0..op.input.shape.rank()).collect()
        }
        _ => Vec::new(),
    }
}

fn reduce(operation: &OperationIr, reduction: Reduction) -> Vec<Signature> {
    let Some(input) = operation.inputs().next() else { return Vec::new() };
    let reduced = reduced_axes(operation);
    // Means of whole numbers are rounded, and the largest few are no single maximum.
    match operation {
        OperationIr::NumericInt(_, Numeric::Mean(_) | Numeric::MeanDim(_)) => return Vec::new(),
        OperationIr::NumericFloat(_, Numeric::MaxDim(op) | Numeric::MinDim(op))
            if op.accumulator_len != 1 =>
        {
            return Vec::new();
        }
        _ => {}
    }
    let splittable = (0..input.shape.rank()).filter(|&axis| input.shape[axis] > 1);
    let mut found: Vec<Signature> = splittable
        .map(|axis| {
            let output = if reduced.contains(&axis) { Sbp::P(reduction) } else { Sbp::S(axis) };
            Signature::plain(vec![Sbp::S(axis)], vec![output])
        })
        .collect();
    let form = Sbp::P(reduction);
    found.push(Signature::plain(vec![form], vec![form]));
    found
}

/// An axis of the result, and where every operand has it.
type Moved = (usize, Vec<Option<usize>>);

fn moves(operation: &OperationIr) -> Vec<Signature> {
    let (OperationIr::BaseFloat(_)
    | OperationIr::BaseInt(_)
    | OperationIr::BaseBool(_)
    | OperationIr::NumericFloat(..)
    | OperationIr::NumericInt(..)) = operation
    else {
        return Vec::new();
    };
    let (Some(output), operands) = (operation.outputs().next(), operation.inputs().count()) else {
        return Vec::new();
    };
    let splits = moved_axes(operation).into_iter().filter(|(axis, _)| output.shape[*axis] > 1);
    let mut found: Vec<Signature> = splits
        .map(|(axis, places)| {
            Signature::plain(
                places.into_iter().map(|place| place.map_or(Sbp::B, Sbp::S)).collect(),
                vec![Sbp::S(axis)],
            )
        })
        .collect();
    // What only moves does so before or after a reduction alike; a border of zeros adds nothing to sums.
    let kinds: &[Reduction] = match operation {
        OperationIr::NumericFloat(_, Numeric::Pad(op)) | OperationIr::NumericInt(_, Numeric::Pad(op)) => {
            match &op.mode {
                PadModeIr::Constant(value) if is_zero(value) => &[Reduction::Sum],
                _ => &[],
            }
        }
        _ => &[Reduction::Sum, Reduction::Max, Reduction::Min],
    };
    found
        .extend(kinds.iter().map(|&kind| Signature::plain(vec![Sbp::P(kind); operands], vec![Sbp::P(kind)])));
    found
}

fn moved_axes(operation: &OperationIr) -> Vec<Moved> {
    let same = |rank: usize, keep: &dyn Fn(usize) -> bool| -> Vec<Moved> {
        (0..rank).filter(|&axis| keep(axis)).map(|axis| (axis, vec![Some(axis)])).collect()
    };
    match operation {
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => match base
        {
            Base::Reshape(op) => reshaped_axes(&op.input.shape, &op.out.shape)
                .into_iter()
                .map(|(from, to)| (to, vec![Some(from)]))
                .collect(),
            Base::SwapDims(op) => {
                let swapped = |axis| match axis {
                    axis if axis == op.dim1 => op.dim2,
                    axis if axis == op.dim2 => op.dim1,
                    axis => axis,
                };
                (0..op.out.shape.rank()).map(|axis| (axis, vec![Some(swapped(axis))])).collect()
            }
            Base::Permute(op) => {
                op.axes.iter().enumerate().map(|(to, &from)| (to, vec![Some(from)])).collect()
            }
            Base::Flip(op) => same(op.out.shape.rank(), &|axis| !op.axes.contains(&axis)),
            Base::Expand(op) => {
                let extra = op.out.shape.rank() - op.input.shape.rank();
                let place = |axis: usize| {
                    axis.checked_sub(extra).filter(|&from| op.input.shape[from] == op.out.shape[axis])
                };
                (0..op.out.shape.rank()).map(|axis| (axis, vec![place(axis)])).collect()
            }
            Base::Slice(op) => {
                same(op.out.shape.rank(), &|axis| is_whole(&op.ranges, axis, op.tensor.shape[axis]))
            }
            Base::SliceAssign(op) => (0..op.out.shape.rank())
                .filter(|&axis| is_whole(&op.ranges, axis, op.tensor.shape[axis]))
                .map(|axis| (axis, vec![Some(axis); 2]))
                .collect(),
            Base::RepeatDim(op) => same(op.out.shape.rank(), &|axis| axis != op.dim),
            Base::Cat(op) => (0..op.out.shape.rank())
                .filter(|&axis| axis != op.dim)
                .map(|axis| (axis, vec![Some(axis); op.tensors.len()]))
                .collect(),
            Base::Unfold(op) => same(op.input.shape.rank(), &|axis| axis != op.dim),
            _ => Vec::new(),
        },
        OperationIr::NumericFloat(_, Numeric::Pad(op)) | OperationIr::NumericInt(_, Numeric::Pad(op)) => {
            same(op.out.shape.rank(), &|axis| op.padding.get(axis).is_none_or(|pad| *pad == (0, 0)))
        }
        _ => Vec::new(),
    }
}

/// Whether a slice takes an axis in full.
pub(crate) fn is_whole(ranges: &[Slice], axis: usize, size: usize) -> bool {
    ranges.get(axis).is_none_or(|range| {
        range.start == 0 && range.step == 1 && range.end.is_none_or(|end| end == size as isize)
    })
}

/// Axes that begin the same group of factors before and after a reshape.
fn reshaped_axes(from: &[usize], to: &[usize]) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let (mut i, mut j) = (0, 0);
    loop {
        while i < from.len() && from[i] == 1 {
            i += 1;
        }
        while j < to.len() && to[j] == 1 {
            j += 1;
        }
        if i == from.len() || j == to.len() {
            return found;
        }
        found.push((i, j));
        let (mut before, mut after) = (from[i], to[j]);
        (i, j) = (i + 1, j + 1);
        while before != after {
            if before < after {
                let Some(size) = from.get(i) else { return found };
                before *= size;
                i += 1;
            } else {
                let Some(size) = to.get(j) else { return found };
                after *= size;
                j += 1;
            }
        }
    }
}

/// The tensor that is picked from or put into, its indices and the axis.
pub(crate) fn indexed(operation: &OperationIr) -> Option<(&TensorIr, &TensorIr, usize)> {
    match operation {
        OperationIr::BaseFloat(base) | OperationIr::BaseInt(base) | OperationIr::BaseBool(base) => match base
        {
            Base::Select(op) => Some((&op.tensor, &op.indices, op.dim)),
            Base::Gather(op) => Some((&op.tensor, &op.indices, op.dim)),
            Base::SelectAssign(op) => Some((&op.tensor, &op.indices, op.dim)),
            Base::Scatter(op) => Some((&op.tensor, &op.indices, op.dim)),
            _ => None,
        },
        OperationIr::Module(Module::Embedding(op)) => Some((&op.weights, &op.indices, 0)),
        OperationIr::Module(Module::EmbeddingBackward(op)) => Some((&op.weights, &op.indices, 0)),
        _ => None,
    }
}

/// Axes other than the indexed one that indices of as many axes share with the tensor, or that they do not have.
fn beside(tensor: &TensorIr, indices: &TensorIr, dim: usize, rows: bool) -> Vec<(usize, Sbp)> {
    (0..tensor.shape.rank())
        .filter(|&axis| axis != dim && tensor.shape[axis] > 1)
        .filter(|&axis| rows || indices.shape[axis] == tensor.shape[axis])
        .map(|axis| (axis, if rows { Sbp::B } else { Sbp::S(axis) }))
        .collect()
}

fn is_rows(operation: &OperationIr) -> bool {
    matches!(
        operation,
        OperationIr::BaseFloat(Base::Select(_) | Base::SelectAssign(_))
            | OperationIr::BaseInt(Base::Select(_) | Base::SelectAssign(_))
            | OperationIr::BaseBool(Base::Select(_) | Base::SelectAssign(_))
    )
}

fn pick(operation: &OperationIr) -> Vec<Signature> {
    let Some((tensor, indices, dim)) = indexed(operation) else { return Vec::new() };
    let rows = is_rows(operation);
    let mut found: Vec<Signature> = beside(tensor, indices, dim, rows)
        .into_iter()
        .map(|(axis, of_indices)| Signature::plain(vec![Sbp::S(axis), of_indices], vec![Sbp::S(axis)]))
        .collect();
    if tensor.shape[dim] > 1 {
        found.push(Signature::plain(vec![Sbp::S(dim), Sbp::B], vec![Sbp::SUM]));
    }
    let of_indices = if rows { 0 } else { dim };
    if indices.shape[of_indices] > 1 {
        found.push(Signature::plain(vec![Sbp::B, Sbp::S(of_indices)], vec![Sbp::S(dim)]));
    }
    found.push(Signature::plain(vec![Sbp::SUM, Sbp::B], vec![Sbp::SUM]));
    found
}

fn put(operation: &OperationIr) -> Vec<Signature> {
    let Some((tensor, indices, dim)) = indexed(operation) else { return Vec::new() };
    let rows = is_rows(operation);
    let mut found: Vec<Signature> = beside(tensor, indices, dim, rows)
        .into_iter()
        .map(|(axis, of_indices)| {
            Signature::plain(vec![Sbp::S(axis), of_indices, Sbp::S(axis)], vec![Sbp::S(axis)])
        })
        .collect();
    let adds = match operation {
        OperationIr::BaseFloat(Base::SelectAssign(op)) | OperationIr::BaseInt(Base::SelectAssign(op)) => {
            op.update == IndexingUpdateOp::Add
        }
        OperationIr::BaseFloat(Base::Scatter(op)) | OperationIr::BaseInt(Base::Scatter(op)) => {
            op.update == IndexingUpdateOp::Add
        }
        _ => false,
    };
    if adds {
        if tensor.shape[dim] > 1 {
            found.push(Signature::plain(vec![Sbp::S(dim), Sbp::B, Sbp::B], vec![Sbp::S(dim)]));
        }
        let of_indices = if rows { 0 } else { dim };
        if indices.shape[of_indices] > 1 {
            found.push(Signature::plain(vec![Sbp::SUM, Sbp::S(of_indices), Sbp::S(dim)], vec![Sbp::SUM]));
        }
        found.push(Signature::plain(vec![Sbp::SUM, Sbp::B, Sbp::SUM], vec![Sbp::SUM]));
    }
    found
}

/// A signature on every axis of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NdSignature(pub Vec<Signature>);

impl NdSignature {
    /// What operand `index` must be.
    pub fn input(&self, index: usize) -> NdSbp {
        NdSbp(self.0.iter().map(|signature| signature.inputs[index]).collect())
    }

    /// What result `index` is.
    pub fn output(&self, index: usize) -> NdSbp {
        NdSbp(self.0.iter().map(|signature| signature.outputs[index]).collect())
    }
}

impl std::fmt::Display for NdSignature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let axes: Vec<String> = self.0.iter().map(Signature::to_string).collect();
        f.write_str(&axes.join(" | "))
    }
}

/// All legal signatures of an operation on a mesh: any combination of those of one axis, where a reshape's pieces still
/// begin where pieces of its result do.
///
/// # Errors
/// As [`signatures`].
pub fn on_mesh(operation: &OperationIr, mesh: &[usize]) -> Result<Vec<NdSignature>> {
    let single = signatures(operation)?;
    let mut found = vec![NdSignature(Vec::new())];
    for _ in mesh {
        let longer = found.iter().flat_map(|shorter| {
            single.iter().map(|signature| {
                let mut longer = shorter.clone();
                longer.0.push(signature.clone());
                longer
            })
        });
        found = longer.collect();
    }
    found.retain(|signature| is_sound(operation, mesh, signature));
    Ok(found)
}

/// Whether the pieces of an operation's operands fit those of its results. A reshape that splits an axis into factors or
/// joins some needs pieces whose number divides both axes; where something is added to partial results, no piece may be
/// empty, as then nothing would be computed that it could be added to.
fn is_sound(operation: &OperationIr, mesh: &[usize], signature: &NdSignature) -> bool {
    let pieces_of = |index: usize, axis: usize| -> usize {
        let splits = signature.0.iter().zip(mesh).filter(|(one, _)| one.inputs[index] == Sbp::S(axis));
        splits.map(|(_, n)| n).product()
    };
    let added =
        |one: &Signature| one.inputs.contains(&Sbp::SUM) && one.inputs.iter().any(|sbp| sbp.axis().is_some());
    let empty = |(index, tensor): (usize, &TensorIr)| {
        (0..tensor.shape.rank()).any(|axis| pieces_of(index, axis) > tensor.shape[axis])
    };
    if signature.0.iter().any(added) && operation.inputs().enumerate().any(empty) {
        return false;
    }
    let (OperationIr::BaseFloat(Base::Reshape(op))
    | OperationIr::BaseInt(Base::Reshape(op))
    | OperationIr::BaseBool(Base::Reshape(op))) = operation
    else {
        return true;
    };
    let splits = signature.0.iter().filter_map(|one| Some((one.inputs[0].axis()?, one.outputs[0].axis()?)));
    let axes: BTreeSet<(usize, usize)> = splits.collect();
    axes.into_iter().all(|(from, to)| {
        let (before, after) = (op.input.shape[from], op.out.shape[to]);
        let pieces = pieces_of(0, from);
        before == after || (before % pieces == 0 && after % pieces == 0)
    })
}
