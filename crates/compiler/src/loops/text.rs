//! The text form of a program, which parses back to the same program:
//!
//! ```text
//! program relu(in X: f32[4, 3], out Y: f32[4, 3]) {
//!   parallel for i in 0 count 4 {
//!     for j in 0 count 3 {
//!       Y[i, j] = max(X[i, j], 0.0f32)
//!     }
//!   }
//! }
//! ```
//!
//! Whole numbers are i64, others bear their type (`5i32`, `0.5f32`, `inf_f64`). Operators stand between their operands:
//! `* / %` before `+ -`, then `<< >>`, comparisons, `&`, `^` and `|` (what is printed has parentheses all the same); `min`, `max`, `floordiv`, `floormod`, `neg`, `abs`, `not`,
//! `select(c, a, b)`, `cast_f32(x)` and functions stand before them. `#` begins a comment.

use std::fmt::{self, Write};
use std::str::FromStr;

use kiln_core::{Error, Result};

use super::program::{
    BinOp, Expr, For, Function, Io, LoopKind, Memory, Param, Program, ScalarType, Stmt, UnOp, not_finite,
};

/// Deepest nesting that is parsed.
const MAX_DEPTH: usize = 100;

/// Operators between their operands.
const INFIX: [(&str, BinOp); 16] = [
    ("+", BinOp::Add),
    ("-", BinOp::Sub),
    ("*", BinOp::Mul),
    ("/", BinOp::Div),
    ("%", BinOp::Rem),
    ("==", BinOp::Eq),
    ("!=", BinOp::Ne),
    ("<<", BinOp::Shl),
    (">>", BinOp::Shr),
    ("<=", BinOp::Le),
    (">=", BinOp::Ge),
    ("<", BinOp::Lt),
    (">", BinOp::Gt),
    ("&", BinOp::And),
    ("|", BinOp::Or),
    ("^", BinOp::Xor),
];
const TYPES: [ScalarType; 5] =
    [ScalarType::F32, ScalarType::F64, ScalarType::I32, ScalarType::I64, ScalarType::Bool];

/// How strongly an operator binds its operands.
fn infix_strength(op: BinOp) -> u8 {
    match op {
        BinOp::Or => 1,
        BinOp::Xor => 2,
        BinOp::And => 3,
        op if op.compares() => 4,
        BinOp::Shl | BinOp::Shr => 5,
        BinOp::Add | BinOp::Sub => 6,
        _ => 7,
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let params = self
            .params
            .iter()
            .map(|Param { name, dtype, shape, io }| format!("{io} {name}: {dtype}{shape:?}"));
        writeln!(f, "program {}({}) {{", self.name, params.collect::<Vec<_>>().join(", "))?;
        write_block(f, &self.body, 1)?;
        writeln!(f, "}}")
    }
}

fn write_block(f: &mut fmt::Formatter<'_>, body: &[Stmt], depth: usize) -> fmt::Result {
    body.iter().try_for_each(|statement| write_statement(f, statement, depth))
}

fn write_statement(f: &mut fmt::Formatter<'_>, statement: &Stmt, depth: usize) -> fmt::Result {
    let margin = "  ".repeat(depth);
    let body = match statement {
        Stmt::For(For { var, min, extent, kind, body }) => {
            let kind = if *kind == LoopKind::Serial { String::new() } else { format!("{kind} ") };
            writeln!(f, "{margin}{kind}for {var} in {min} count {extent} {{")?;
            body
        }
        Stmt::Store { buf, idx, value } => return writeln!(f, "{margin}{buf}[{}] = {value}", list(idx)),
        Stmt::Alloc { buf, dtype, shape, scope, body } => {
            writeln!(f, "{margin}alloc {buf}: {dtype}{shape:?} on {scope} {{")?;
            body
        }
        Stmt::If { cond, then, otherwise } => {
            writeln!(f, "{margin}if {cond} {{")?;
            write_block(f, then, depth + 1)?;
            if otherwise.is_empty() {
                return writeln!(f, "{margin}}}");
            }
            writeln!(f, "{margin}}} else {{")?;
            otherwise
        }
        Stmt::Let { var, value, body } => {
            writeln!(f, "{margin}let {var} = {value} {{")?;
            body
        }
        Stmt::Assert { cond, msg } => return writeln!(f, "{margin}assert {cond}, {msg:?}"),
    };
    write_block(f, body, depth + 1)?;
    writeln!(f, "{margin}}}")
}

fn list(exprs: &[Expr]) -> String {
    exprs.iter().map(Expr::to_string).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for Expr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::I32(value) => write!(f, "{value}i32"),
            Self::I64(value) => write!(f, "{value}"),
            Self::F32(value) if value.is_finite() => write!(f, "{value:?}f32"),
            Self::F32(value) => write!(f, "{}_f32", not_finite(f64::from(*value))),
            Self::F64(value) if value.is_finite() => write!(f, "{value:?}f64"),
            Self::F64(value) => write!(f, "{}_f64", not_finite(*value)),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Var(name) => f.write_str(name),
            Self::Load { buf, idx } => write!(f, "{buf}[{}]", list(idx)),
            Self::Bin(op, a, b) => match INFIX.iter().find(|(_, infix)| infix == op) {
                Some((sign, _)) => {
                    let part = |x: &Self| match x {
                        Self::Bin(op, ..) if INFIX.iter().any(|(_, infix)| infix == op) => format!("({x})"),
                        x => x.to_string(),
                    };
                    write!(f, "{} {sign} {}", part(a), part(b))
                }
                None => write!(f, "{op}({a}, {b})"),
            },
            Self::Un(op, a) => write!(f, "{op}({a})"),
            Self::Select(condition, yes, no) => write!(f, "select({condition}, {yes}, {no})"),
            Self::Cast(to, a) => write!(f, "cast_{to}({a})"),
            Self::Call(function, arguments) => write!(f, "{function}({})", list(arguments)),
        }
    }
}

impl FromStr for Program {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut parser = Parser { text, at: 0, depth: 0 };
        let program = parser.program()?;
        parser.skip();
        if parser.at < text.len() { Err(parser.expected("the end of the text")) } else { Ok(program) }
    }
}

struct Parser<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Parser<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    /// Goes past blanks and comments.
    fn skip(&mut self) {
        loop {
            self.at = self.text.len() - self.rest().trim_start().len();
            if !self.rest().starts_with('#') {
                return;
            }
            self.at += self.rest().find('\n').unwrap_or(self.rest().len());
        }
    }

    fn expected(&self, what: &str) -> Error {
        let before = &self.text[..self.at];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().map_or(0, str::len) + 1;
        let mut found = String::new();
        for c in self.rest().chars().take_while(|c| !c.is_whitespace()).take(12) {
            let _ = write!(found, "{c}");
        }
        let found = if found.is_empty() { "the end of the line".into() } else { format!("\"{found}\"") };
        Error::input(
            format!("program text, line {line}, column {column}"),
            format!("{found} stands where {what} should"),
        )
    }

    /// Takes a sign if it is next.
    fn takes(&mut self, sign: &str) -> bool {
        self.skip();
        let there = self.rest().starts_with(sign);
        self.at += if there { sign.len() } else { 0 };
        there
    }

    fn take(&mut self, sign: &str) -> Result<()> {
        if self.takes(sign) { Ok(()) } else { Err(self.expected(&format!("\"{sign}\""))) }
    }

    /// The letters, digits, _ and . that are next, as a name may be made of.
    fn peek_word(&mut self) -> &'a str {
        self.skip();
        let part = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        let rest = self.rest();
        let word = &rest[..rest.find(|c| !part(c)).unwrap_or(rest.len())];
        if word.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') { word } else { "" }
    }

    fn takes_word(&mut self, word: &str) -> bool {
        let there = self.peek_word() == word;
        self.at += if there { word.len() } else { 0 };
        there
    }

    fn word(&mut self, what: &str) -> Result<&'a str> {
        let word = self.peek_word();
        if word.is_empty() {
            return Err(self.expected(what));
        }
        self.at += word.len();
        Ok(word)
    }

    fn name(&mut self) -> Result<String> {
        self.word("a name").map(str::to_string)
    }

    /// One of several words.
    fn one_of<T: Copy + fmt::Display>(&mut self, choices: &[T], what: &str) -> Result<T> {
        let word = self.peek_word();
        match choices.iter().find(|choice| choice.to_string() == word) {
            Some(&choice) => {
                self.at += word.len();
                Ok(choice)
            }
            None => Err(self.expected(what)),
        }
    }

    /// Things between two signs, separated by commas.
    fn list<T>(&mut self, close: &str, mut item: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut items = Vec::new();
        if self.takes(close) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if self.takes(close) {
                return Ok(items);
            }
            self.take(",")?;
        }
    }

    fn program(&mut self) -> Result<Program> {
        if !self.takes_word("program") {
            return Err(self.expected("\"program\""));
        }
        let name = self.name()?;
        self.take("(")?;
        let params = self.list(")", |parser| {
            let io = parser.one_of(&[Io::In, Io::Out, Io::Inout], "in, out or inout")?;
            let name = parser.name()?;
            let (dtype, shape) = parser.typed_shape()?;
            Ok(Param { name, dtype, shape, io })
        })?;
        Ok(Program { name, params, body: self.block()? })
    }

    fn typed_shape(&mut self) -> Result<(ScalarType, Vec<usize>)> {
        self.take(":")?;
        let dtype = self.one_of(&TYPES, "a type: f32, f64, i32, i64 or bool")?;
        self.take("[")?;
        let shape = self.list("]", |parser| {
            parser.skip();
            let digits = parser.digits(0);
            let extent = parser.rest()[..digits].parse().map_err(|_| parser.expected("an extent"))?;
            parser.at += digits;
            Ok(extent)
        })?;
        Ok((dtype, shape))
    }

    /// How many digits stand `from` places on.
    fn digits(&self, from: usize) -> usize {
        let rest = &self.rest()[from..];
        rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())
    }

    /// Does something one level deeper.
    fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth == MAX_DEPTH {
            return Err(self.expected(&format!("something nested less deeply than {MAX_DEPTH} levels")));
        }
        self.depth += 1;
        let result = work(self);
        self.depth -= 1;
        result
    }

    fn block(&mut self) -> Result<Vec<Stmt>> {
        self.take("{")?;
        let mut statements = Vec::new();
        while !self.takes("}") {
            statements.push(self.deeper(Self::statement)?);
        }
        Ok(statements)
    }

    fn statement(&mut self) -> Result<Stmt> {
        let word = self.word("a statement or \"}\"")?;
        match word {
            "for" => self.for_loop(LoopKind::Serial),
            "parallel" | "vectorized" | "unrolled" => {
                let kind = match word {
                    "parallel" => LoopKind::Parallel,
                    "vectorized" => LoopKind::Vectorized,
                    _ => LoopKind::Unrolled,
                };
                if self.takes_word("for") { self.for_loop(kind) } else { Err(self.expected("\"for\"")) }
            }
            "alloc" => {
                let buf = self.name()?;
                let (dtype, shape) = self.typed_shape()?;
                if !self.takes_word("on") {
                    return Err(self.expected("\"on\""));
                }
                let scope = self.one_of(&[Memory::Stack, Memory::Heap], "stack or heap")?;
                Ok(Stmt::Alloc { buf, dtype, shape, scope, body: self.block()? })
            }
            "if" => {
                let (cond, then) = (self.expr()?, self.block()?);
                let otherwise = if self.takes_word("else") { self.block()? } else { Vec::new() };
                Ok(Stmt::If { cond, then, otherwise })
            }
            "let" => {
                let var = self.name()?;
                self.take("=")?;
                Ok(Stmt::Let { var, value: self.expr()?, body: self.block()? })
            }
            "assert" => {
                let cond = self.expr()?;
                self.take(",")?;
                Ok(Stmt::Assert { cond, msg: self.string()? })
            }
            buf => {
                self.take("[")?;
                let idx = self.list("]", Self::expr)?;
                self.take("=")?;
                Ok(Stmt::Store { buf: buf.into(), idx, value: self.expr()? })
            }
        }
    }

    fn for_loop(&mut self, kind: LoopKind) -> Result<Stmt> {
        let var = self.name()?;
        if !self.takes_word("in") {
            return Err(self.expected("\"in\""));
        }
        let min = self.expr()?;
        if !self.takes_word("count") {
            return Err(self.expected("\"count\""));
        }
        Ok(Stmt::For(For { var, min, extent: self.expr()?, kind, body: self.block()? }))
    }

    /// Text in quotation marks, with Rust's escapes.
    fn string(&mut self) -> Result<String> {
        self.skip();
        let wrong = self.expected("text in quotation marks");
        let mut characters = self.rest().char_indices();
        if characters.next().is_none_or(|(_, first)| first != '"') {
            return Err(wrong);
        }
        let mut text = String::new();
        while let Some((at, c)) = characters.next() {
            match c {
                '"' => {
                    self.at += at + 1;
                    return Ok(text);
                }
                '\\' => match characters.next().map(|(_, escaped)| escaped) {
                    Some('n') => text.push('\n'),
                    Some('r') => text.push('\r'),
                    Some('t') => text.push('\t'),
                    Some('0') => text.push('\0'),
                    Some('u') => {
                        let code: String =
                            characters.by_ref().map(|(_, c)| c).skip(1).take_while(|c| *c != '}').collect();
                        let parsed = u32::from_str_radix(&code, 16).ok().and_then(char::from_u32);
                        text.push(parsed.ok_or_else(|| self.expected("a text without broken escapes"))?);
                    }
                    Some(other) => text.push(other),
                    None => return Err(wrong),
                },
                c => text.push(c),
            }
        }
        Err(wrong)
    }

    /// Operands with operators between them; those of one strength are taken from the left.
    fn expr(&mut self) -> Result<Expr> {
        self.deeper(|parser| parser.stronger_than(0))
    }

    fn stronger_than(&mut self, strength: u8) -> Result<Expr> {
        let mut a = self.operand()?;
        while let Some(&(sign, op)) = self.peek_infix().filter(|(_, op)| infix_strength(*op) > strength) {
            self.take(sign)?;
            let b = self.deeper(|parser| parser.stronger_than(infix_strength(op)))?;
            a = Expr::Bin(op, Box::new(a), Box::new(b));
        }
        Ok(a)
    }

    fn peek_infix(&mut self) -> Option<&'static (&'static str, BinOp)> {
        self.skip();
        INFIX.iter().find(|(sign, _)| self.rest().starts_with(sign))
    }

    fn operand(&mut self) -> Result<Expr> {
        if self.takes("(") {
            let inside = self.expr()?;
            self.take(")")?;
            return Ok(inside);
        }
        self.skip();
        if self.rest().starts_with(|c: char| c.is_ascii_digit() || c == '-') {
            return self.number();
        }
        let word = self.word("a value")?;
        let literal = match word {
            "true" => Some(Expr::Bool(true)),
            "false" => Some(Expr::Bool(false)),
            "inf_f32" => Some(Expr::F32(f32::INFINITY)),
            "nan_f32" => Some(Expr::F32(f32::NAN)),
            "inf_f64" => Some(Expr::F64(f64::INFINITY)),
            "nan_f64" => Some(Expr::F64(f64::NAN)),
            _ => None,
        };
        if let Some(literal) = literal {
            return Ok(literal);
        }
        if self.takes("[") {
            return Ok(Expr::Load { buf: word.into(), idx: self.list("]", Self::expr)? });
        }
        if self.takes("(") {
            return self.operation(word);
        }
        Ok(Expr::Var(word.into()))
    }

    /// What stands before its operands; the parenthesis is open.
    fn operation(&mut self, word: &str) -> Result<Expr> {
        let mut arguments = self.list(")", Self::expr)?;
        let prefix = BinOp::ALL.iter().filter(|op| INFIX.iter().all(|(_, infix)| infix != *op));
        let binary = prefix.copied().find(|op| op.to_string() == word);
        let unary = UnOp::ALL.into_iter().find(|op| op.to_string() == word);
        let function = Function::ALL.into_iter().find(|function| function.to_string() == word);
        let cast = TYPES.into_iter().find(|ty| word == format!("cast_{ty}"));
        let expected = match (binary, unary, function, cast) {
            (Some(_), ..) => 2,
            (_, Some(_), ..) | (.., Some(_)) => 1,
            (.., Some(function), _) => function.arity(),
            _ if word == "select" => 3,
            _ => return Err(self.expected(&format!("a known operation (not \"{word}\")"))),
        };
        if arguments.len() != expected {
            return Err(self.expected(&format!("{expected} operands of {word} (not {})", arguments.len())));
        }
        let mut next = || Box::new(arguments.remove(0));
        Ok(match (binary, unary, function, cast) {
            (Some(op), ..) => Expr::Bin(op, next(), next()),
            (_, Some(op), ..) => Expr::Un(op, next()),
            (.., Some(to)) => Expr::Cast(to, next()),
            (.., Some(function), _) => Expr::Call(function, arguments),
            _ => Expr::Select(next(), next(), next()),
        })
    }

    fn number(&mut self) -> Result<Expr> {
        let rest = self.rest();
        let part = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
        // A sign belongs to a number at its beginning and after the e of an exponent.
        let mut end = 0;
        for (at, c) in rest.char_indices() {
            let exponent =
                at > 1 && rest[..at].ends_with('e') && rest[..at].contains(|c: char| c.is_ascii_digit());
            if !(part(c) || (c == '-' && (at == 0 || exponent))) {
                break;
            }
            end = at + c.len_utf8();
        }
        let written = &rest[..end];
        let parsed = if let Some(digits) = written.strip_suffix("i32") {
            digits.parse().ok().map(Expr::I32)
        } else if written == "-inf_f32" {
            Some(Expr::F32(f32::NEG_INFINITY))
        } else if written == "-inf_f64" {
            Some(Expr::F64(f64::NEG_INFINITY))
        } else if let Some(digits) = written.strip_suffix("f32") {
            digits.parse().ok().map(Expr::F32)
        } else if let Some(digits) = written.strip_suffix("f64") {
            digits.parse().ok().map(Expr::F64)
        } else {
            written.parse().ok().map(Expr::I64)
        };
        let literal = parsed.ok_or_else(|| self.expected("a number such as 5, 5i32, 0.5f32 or 0.5f64"))?;
        self.at += end;
        Ok(literal)
    }
}
