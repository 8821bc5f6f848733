//! The program: typed buffers, loops over them, and expressions; its JSON form is `kiln-loop-ir/1`.

use std::fmt;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A loop program.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// What it is called.
    pub name: String,
    /// The buffers that it shares with its caller.
    pub params: Vec<Param>,
    /// What it does.
    pub body: Vec<Stmt>,
}

/// A buffer that a program shares with its caller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Param {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: ScalarType,
    /// Extents, row-major.
    pub shape: Vec<usize>,
    /// Which way values go.
    pub io: Io,
}

/// Which way the values of a parameter go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// Read only.
    In,
    /// Zeros at the start, a result at the end.
    Out,
    /// Read and changed.
    Inout,
}

/// The type of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScalarType {
    /// Single precision.
    F32,
    /// Double precision.
    F64,
    /// Wraps at 32 bits.
    I32,
    /// Wraps at 64 bits; loop variables and indices.
    I64,
    /// True or false.
    Bool,
}

impl ScalarType {
    /// Whether it is a float.
    pub fn is_float(self) -> bool {
        matches!(self, Self::F32 | Self::F64)
    }

    /// Whether it is an integer.
    pub fn is_int(self) -> bool {
        matches!(self, Self::I32 | Self::I64)
    }
}

/// A statement.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Stmt {
    /// Runs its body for `extent` values of a variable from `min` on; not at all when the extent is not positive.
    For(For),
    /// Writes an element.
    Store {
        /// The buffer.
        buf: String,
        /// One index an axis.
        idx: Vec<Expr>,
        /// What is written.
        value: Expr,
    },
    /// Makes a buffer of zeros that lives as long as the body runs.
    Alloc {
        /// Its name.
        buf: String,
        /// Type of its elements.
        dtype: ScalarType,
        /// Extents, row-major.
        shape: Vec<usize>,
        /// Where it is put.
        scope: Memory,
        /// Where it is seen.
        body: Vec<Stmt>,
    },
    /// Runs one of two bodies.
    If {
        /// Which.
        cond: Expr,
        /// When it is true.
        then: Vec<Stmt>,
        /// When it is false.
        #[serde(default, rename = "else", skip_serializing_if = "Vec::is_empty")]
        otherwise: Vec<Stmt>,
    },
    /// Gives a value a name.
    Let {
        /// The name.
        var: String,
        /// The value.
        value: Expr,
        /// Where it is seen.
        body: Vec<Stmt>,
    },
    /// Traps unless a condition holds.
    Assert {
        /// What must hold.
        cond: Expr,
        /// What the trap says.
        msg: String,
    },
}

/// A loop.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct For {
    /// Its variable, an i64.
    pub var: String,
    /// The variable's first value.
    #[serde(default = "zero", serialize_with = "write_bound", deserialize_with = "read_bound")]
    pub min: Expr,
    /// How many values it takes.
    #[serde(serialize_with = "write_bound", deserialize_with = "read_bound")]
    pub extent: Expr,
    /// How it may be run.
    #[serde(default)]
    pub kind: LoopKind,
    /// What is repeated.
    pub body: Vec<Stmt>,
}

/// How a loop may be run; the result is that of running it serially.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoopKind {
    /// One after another.
    #[default]
    Serial,
    /// By several threads.
    Parallel,
    /// In the lanes of vector registers.
    Vectorized,
    /// As straight code.
    Unrolled,
}

/// Where a buffer is put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Memory {
    /// Small and near.
    Stack,
    /// Anywhere.
    Heap,
}

/// An expression.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Expr {
    /// A literal.
    I32(i32),
    /// A literal.
    I64(i64),
    /// A literal; JSON has those that are not finite as text.
    #[serde(serialize_with = "write_f32", deserialize_with = "read_f32")]
    F32(f32),
    /// A literal; JSON has those that are not finite as text.
    #[serde(serialize_with = "write_f64", deserialize_with = "read_f64")]
    F64(f64),
    /// A literal.
    Bool(bool),
    /// The value of a loop variable or a name.
    Var(String),
    /// An element of a buffer.
    Load {
        /// The buffer.
        buf: String,
        /// One index an axis.
        idx: Vec<Expr>,
    },
    /// An operation on two values of one type.
    Bin(BinOp, Box<Expr>, Box<Expr>),
    /// An operation on one value.
    Un(UnOp, Box<Expr>),
    /// The second value when the first is true, else the third; the other one is not computed.
    Select(Box<Expr>, Box<Expr>, Box<Expr>),
    /// A value as another type.
    Cast(ScalarType, Box<Expr>),
    /// A function of floats.
    Call(Function, Vec<Expr>),
}

/// Operations on two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "each is named after what it does; see `evaluate`")]
pub enum BinOp {
    Add,
    Sub,
    Mul,
    Div,
    Rem,
    FloorDiv,
    FloorMod,
    Min,
    Max,
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    And,
    Or,
    Xor,
    Shl,
    Shr,
}

impl BinOp {
    /// All of them.
    pub const ALL: [Self; 20] = [
        Self::Add,
        Self::Sub,
        Self::Mul,
        Self::Div,
        Self::Rem,
        Self::FloorDiv,
        Self::FloorMod,
        Self::Min,
        Self::Max,
        Self::Eq,
        Self::Ne,
        Self::Lt,
        Self::Le,
        Self::Gt,
        Self::Ge,
        Self::And,
        Self::Or,
        Self::Xor,
        Self::Shl,
        Self::Shr,
    ];

    /// Whether its result is a truth value whatever the operands are.
    pub fn compares(self) -> bool {
        matches!(self, Self::Eq | Self::Ne | Self::Lt | Self::Le | Self::Gt | Self::Ge)
    }

    /// Whether it takes operands of the type.
    pub fn takes(self, ty: ScalarType) -> bool {
        match self {
            Self::Add | Self::Sub | Self::Mul | Self::Div | Self::Rem | Self::Min | Self::Max => {
                ty != ScalarType::Bool
            }
            Self::Lt | Self::Le | Self::Gt | Self::Ge => ty != ScalarType::Bool,
            Self::Eq | Self::Ne => true,
            Self::FloorDiv | Self::FloorMod | Self::Shl | Self::Shr => ty.is_int(),
            Self::And | Self::Or | Self::Xor => !ty.is_float(),
        }
    }
}

/// Operations on one value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnOp {
    /// Of numbers.
    Neg,
    /// Of truth values, and of the bits of integers.
    Not,
    /// Of numbers.
    Abs,
}

impl UnOp {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Neg, Self::Not, Self::Abs];

    /// Whether it takes operands of the type.
    pub fn takes(self, ty: ScalarType) -> bool {
        match self {
            Self::Neg | Self::Abs => ty != ScalarType::Bool,
            Self::Not => !ty.is_float(),
        }
    }
}

/// Functions of floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Function {
    /// eˣ
    Exp,
    /// Natural logarithm.
    Log,
    /// Square root.
    Sqrt,
    /// Sine of radians.
    Sin,
    /// Cosine of radians.
    Cos,
    /// Hyperbolic tangent.
    Tanh,
    /// Error function.
    Erf,
    /// Next whole number below.
    Floor,
    /// Next whole number above.
    Ceil,
    /// `a b + c`, rounded once.
    Fma,
}

impl Function {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Exp,
        Self::Log,
        Self::Sqrt,
        Self::Sin,
        Self::Cos,
        Self::Tanh,
        Self::Erf,
        Self::Floor,
        Self::Ceil,
        Self::Fma,
    ];

    /// How many arguments it takes.
    pub fn arity(self) -> usize {
        if self == Self::Fma { 3 } else { 1 }
    }
}

/// How enumerations are written in JSON is how they are printed.
macro_rules! display_as_in_json {
    ($($name:ident),+) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.serialize(f)
            }
        }
    )+};
}
display_as_in_json!(ScalarType, Io, LoopKind, Memory, BinOp, UnOp, Function);

fn zero() -> Expr {
    Expr::I64(0)
}

/// A loop's bound: a number, or an expression.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Bound {
    Number(i64),
    Expr(Expr),
}

fn write_bound<S: Serializer>(bound: &Expr, to: S) -> Result<S::Ok, S::Error> {
    match bound {
        Expr::I64(number) => to.serialize_i64(*number),
        bound => bound.serialize(to),
    }
}

fn read_bound<'de, D: Deserializer<'de>>(from: D) -> Result<Expr, D::Error> {
    Ok(match Bound::deserialize(from)? {
        Bound::Number(number) => Expr::I64(number),
        Bound::Expr(expr) => expr,
    })
}

fn write_f32<S: Serializer>(value: &f32, to: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() { to.serialize_f32(*value) } else { to.serialize_str(not_finite(f64::from(*value))) }
}

fn write_f64<S: Serializer>(value: &f64, to: S) -> Result<S::Ok, S::Error> {
    if value.is_finite() { to.serialize_f64(*value) } else { to.serialize_str(not_finite(*value)) }
}

/// The name of a float that is not finite.
pub(super) fn not_finite(value: f64) -> &'static str {
    match value {
        f64::INFINITY => "inf",
        f64::NEG_INFINITY => "-inf",
        _ => "nan",
    }
}

fn read_f32<'de, D: Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
    from.deserialize_any(Float).map(|value| value as f32)
}

fn read_f64<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    from.deserialize_any(Float)
}

struct Float;

impl Visitor<'_> for Float {
    type Value = f64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a number, \"inf\", \"-inf\" or \"nan\"")
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<f64, E> {
        Ok(value)
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<f64, E> {
        Ok(value as f64)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<f64, E> {
        match text {
            "inf" => Ok(f64::INFINITY),
            "-inf" => Ok(f64::NEG_INFINITY),
            "nan" => Ok(f64::NAN),
            _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }
}
