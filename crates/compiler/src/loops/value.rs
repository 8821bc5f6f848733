//! Values and what operations do to them: the normative meaning of a program.

use super::interpret::Trap;
use super::program::{BinOp, Function, ScalarType, UnOp};

/// A value.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    /// Single precision.
    F32(f32),
    /// Double precision.
    F64(f64),
    /// 32 bits.
    I32(i32),
    /// 64 bits.
    I64(i64),
    /// True or false.
    Bool(bool),
}

impl Value {
    /// Its type.
    pub fn ty(self) -> ScalarType {
        match self {
            Self::F32(_) => ScalarType::F32,
            Self::F64(_) => ScalarType::F64,
            Self::I32(_) => ScalarType::I32,
            Self::I64(_) => ScalarType::I64,
            Self::Bool(_) => ScalarType::Bool,
        }
    }

    /// Whether both are the same bit for bit, where any NaN is as good as another.
    pub fn same(self, other: Self) -> bool {
        match (self, other) {
            (Self::F32(a), Self::F32(b)) => a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
            (Self::F64(a), Self::F64(b)) => a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(),
            (a, b) => a == b,
        }
    }

    /// As another type: floats become integers by truncation, saturating, and NaN becomes 0; integers wrap; what is not 0
    /// is true.
    pub fn cast(self, to: ScalarType) -> Self {
        /// A number as every type.
        macro_rules! number {
            ($x:expr, $zero:expr) => {
                match to {
                    ScalarType::F32 => Self::F32($x as f32),
                    ScalarType::F64 => Self::F64($x as f64),
                    ScalarType::I32 => Self::I32($x as i32),
                    ScalarType::I64 => Self::I64($x as i64),
                    ScalarType::Bool => Self::Bool($x != $zero),
                }
            };
        }
        match self {
            Self::F32(x) => number!(x, 0.0),
            Self::F64(x) => number!(x, 0.0),
            Self::I32(x) => number!(x, 0),
            Self::I64(x) => number!(x, 0),
            Self::Bool(x) => Self::I32(x.into()).cast(to),
        }
    }

    /// `op self`.
    pub fn unary(self, op: UnOp) -> Self {
        match (op, self) {
            (UnOp::Neg, Self::F32(x)) => Self::F32(-x),
            (UnOp::Neg, Self::F64(x)) => Self::F64(-x),
            (UnOp::Neg, Self::I32(x)) => Self::I32(x.wrapping_neg()),
            (UnOp::Neg, Self::I64(x)) => Self::I64(x.wrapping_neg()),
            (UnOp::Abs, Self::F32(x)) => Self::F32(x.abs()),
            (UnOp::Abs, Self::F64(x)) => Self::F64(x.abs()),
            (UnOp::Abs, Self::I32(x)) => Self::I32(x.wrapping_abs()),
            (UnOp::Abs, Self::I64(x)) => Self::I64(x.wrapping_abs()),
            (UnOp::Not, Self::I32(x)) => Self::I32(!x),
            (UnOp::Not, Self::I64(x)) => Self::I64(!x),
            (UnOp::Not, Self::Bool(x)) => Self::Bool(!x),
            (op, x) => unreachable!("{op} of {x:?} passes no check"),
        }
    }

    /// `self op other`, both computed.
    ///
    /// # Errors
    /// When an integer is divided by zero.
    pub fn binary(self, op: BinOp, other: Self) -> Result<Self, Trap> {
        match (self, other) {
            (Self::F32(a), Self::F32(b)) => Ok(float(op, a, b, Self::F32)),
            (Self::F64(a), Self::F64(b)) => Ok(float(op, a, b, Self::F64)),
            (Self::I32(a), Self::I32(b)) => integer(op, a, b, Self::I32),
            (Self::I64(a), Self::I64(b)) => integer(op, a, b, Self::I64),
            (Self::Bool(a), Self::Bool(b)) => Ok(Self::Bool(match op {
                BinOp::And => a & b,
                BinOp::Or => a | b,
                BinOp::Xor | BinOp::Ne => a != b,
                BinOp::Eq => a == b,
                op => unreachable!("{op} of truth values passes no check"),
            })),
            (a, b) => unreachable!("{op} of {a:?} and {b:?} passes no check"),
        }
    }

    /// A function of floats; in single precision it is computed in double precision and rounded once.
    pub fn call(function: Function, arguments: [Self; 3]) -> Self {
        match arguments {
            [Self::F32(a), Self::F32(b), Self::F32(c)] => Self::F32(match function {
                Function::Fma => a.mul_add(b, c),
                Function::Sqrt => a.sqrt(),
                function => call_f64(function, f64::from(a)) as f32,
            }),
            [Self::F64(a), Self::F64(b), Self::F64(c)] => Self::F64(match function {
                Function::Fma => a.mul_add(b, c),
                function => call_f64(function, a),
            }),
            arguments => unreachable!("{function} of {arguments:?} passes no check"),
        }
    }
}

fn call_f64(function: Function, x: f64) -> f64 {
    match function {
        Function::Exp => x.exp(),
        Function::Log => x.ln(),
        Function::Sqrt => x.sqrt(),
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
        Function::Tanh => x.tanh(),
        Function::Erf => libm::erf(x),
        Function::Floor => x.floor(),
        Function::Ceil => x.ceil(),
        Function::Fma => unreachable!("it has three arguments"),
    }
}

/// What both float types share.
trait Float:
    Copy
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::Rem<Output = Self>
{
    fn is_nan(self) -> bool;
    fn is_sign_negative(self) -> bool;
}

/// What both integer types share.
trait Integer:
    Copy
    + Ord
    + std::ops::BitAnd<Output = Self>
    + std::ops::BitOr<Output = Self>
    + std::ops::BitXor<Output = Self>
{
    const ZERO: Self;
    fn wrapping(self, op: BinOp, other: Self) -> Self;
}

macro_rules! floats {
    ($($float:ty),+) => {$(
        impl Float for $float {
            fn is_nan(self) -> bool {
                self.is_nan()
            }

            fn is_sign_negative(self) -> bool {
                self.is_sign_negative()
            }
        }
    )+};
}
floats!(f32, f64);

macro_rules! integers {
    ($($integer:ty),+) => {$(
        impl Integer for $integer {
            const ZERO: Self = 0;

            fn wrapping(self, op: BinOp, other: Self) -> Self {
                let negative_rest = |rest: Self| rest != 0 && (rest < 0) != (other < 0);
                match op {
                    BinOp::Add => self.wrapping_add(other),
                    BinOp::Sub => self.wrapping_sub(other),
                    BinOp::Mul => self.wrapping_mul(other),
                    BinOp::Div => self.wrapping_div(other),
                    BinOp::Rem => self.wrapping_rem(other),
                    BinOp::FloorDiv => {
                        let (quotient, rest) = (self.wrapping_div(other), self.wrapping_rem(other));
                        if negative_rest(rest) { quotient - 1 } else { quotient }
                    }
                    BinOp::FloorMod => {
                        let rest = self.wrapping_rem(other);
                        if negative_rest(rest) { rest + other } else { rest }
                    }
                    // The amount is masked to the width.
                    BinOp::Shl => self.wrapping_shl(other as u32),
                    BinOp::Shr => self.wrapping_shr(other as u32),
                    op => unreachable!("{op} does not wrap"),
                }
            }
        }
    )+};
}
integers!(i32, i64);

fn float<T: Float>(op: BinOp, a: T, b: T, value: fn(T) -> Value) -> Value {
    match op {
        BinOp::Add => value(a + b),
        BinOp::Sub => value(a - b),
        BinOp::Mul => value(a * b),
        BinOp::Div => value(a / b),
        BinOp::Rem => value(a % b),
        // NaN wins, and -0 is below +0.
        BinOp::Min | BinOp::Max if a.is_nan() => value(a),
        BinOp::Min | BinOp::Max if b.is_nan() => value(b),
        BinOp::Min => value(if a < b || a == b && a.is_sign_negative() { a } else { b }),
        BinOp::Max => value(if a > b || a == b && b.is_sign_negative() { a } else { b }),
        op => Value::Bool(compare(op, a, b)),
    }
}

fn integer<T: Integer>(op: BinOp, a: T, b: T, value: fn(T) -> Value) -> Result<Value, Trap> {
    let divides = matches!(op, BinOp::Div | BinOp::Rem | BinOp::FloorDiv | BinOp::FloorMod);
    if divides && b == T::ZERO {
        return Err(Trap::DivisionByZero);
    }
    Ok(match op {
        BinOp::Min => value(a.min(b)),
        BinOp::Max => value(a.max(b)),
        BinOp::And => value(a & b),
        BinOp::Or => value(a | b),
        BinOp::Xor => value(a ^ b),
        op if op.compares() => Value::Bool(compare(op, a, b)),
        op => value(a.wrapping(op, b)),
    })
}

fn compare<T: PartialOrd>(op: BinOp, a: T, b: T) -> bool {
    match op {
        BinOp::Eq => a == b,
        BinOp::Ne => a != b,
        BinOp::Lt => a < b,
        BinOp::Le => a <= b,
        BinOp::Gt => a > b,
        BinOp::Ge => a >= b,
        op => unreachable!("{op} compares nothing"),
    }
}
