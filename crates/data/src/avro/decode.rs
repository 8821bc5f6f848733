//! Bytes into values.

use super::schema::Type;
use super::{AvroSchema, AvroValue, MOST_VALUES};

/// How deep values may be nested.
const DEEPEST: usize = 64;

/// What is left to read.
pub(super) struct Bytes<'a> {
    rest: &'a [u8],
}

impl<'a> Bytes<'a> {
    pub(super) fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    pub(super) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            return Err(format!("ends too early: {count} bytes are missing, {} are left", self.rest.len()));
        };
        self.rest = rest;
        Ok(taken)
    }

    /// A number in zigzag order, seven bits a byte.
    pub(super) fn long(&mut self) -> Result<i64, String> {
        let mut value = 0u64;
        for (place, &byte) in self.rest.iter().enumerate().take(10) {
            value |= u64::from(byte & 0x7f) << (7 * place);
            if byte < 0x80 {
                self.rest = &self.rest[place + 1..];
                return Ok((value >> 1) as i64 ^ -((value & 1) as i64));
            }
        }
        Err("ends within a number, or has one of more than ten bytes".into())
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], String> {
        let length = self.long()?;
        self.take(usize::try_from(length).map_err(|_| format!("claims a text or bytes of length {length}"))?)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, String> {
        std::str::from_utf8(self.bytes()?).map_err(|_| "has a text that is not UTF-8".into())
    }

    /// How many elements the next block of an array or map has; 0 at its end.
    pub(super) fn block_count(&mut self) -> Result<u64, String> {
        let count = self.long()?;
        if count < 0 {
            // The size in bytes, which a reader of every element needs not.
            self.long()?;
        }
        Ok(count.unsigned_abs())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }
}

impl AvroSchema {
    /// Reads one datum, and what follows it.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode<'a>(&'a self, bytes: &'a [u8]) -> Result<(AvroValue<'a>, &'a [u8]), String> {
        let mut decoder = Decoder { types: &self.types, bytes: Bytes::new(bytes), left: MOST_VALUES };
        let value = decoder.value(self.root, DEEPEST)?;
        Ok((value, decoder.bytes.rest))
    }
}

struct Decoder<'a> {
    types: &'a [Type],
    bytes: Bytes<'a>,
    /// Values that may still come.
    left: usize,
}

impl<'a> Decoder<'a> {
    fn count(&mut self, depth: usize) -> Result<usize, String> {
        self.left =
            self.left.checked_sub(1).ok_or_else(|| format!("unfolds into more than {MOST_VALUES} values"))?;
        depth.checked_sub(1).ok_or_else(|| format!("is nested more than {DEEPEST} deep"))
    }

    /// The type that a union's bytes choose.
    fn branch(&mut self, branches: &[usize]) -> Result<usize, String> {
        let number = self.bytes.long()?;
        let branch = usize::try_from(number).ok().and_then(|number| branches.get(number));
        branch
            .copied()
            .ok_or_else(|| format!("chooses alternative {number} of a field that has {}", branches.len()))
    }

    fn value(&mut self, kind: usize, depth: usize) -> Result<AvroValue<'a>, String> {
        let depth = self.count(depth)?;
        let types = self.types;
        Ok(match &types[kind] {
            Type::Null => AvroValue::Null,
            Type::Boolean => AvroValue::Bool(self.bytes.array::<1>()?[0] != 0),
            Type::Int | Type::Long => AvroValue::Int(self.bytes.long()?),
            Type::Float => AvroValue::Number(f32::from_le_bytes(self.bytes.array()?).into()),
            Type::Double => AvroValue::Number(f64::from_le_bytes(self.bytes.array()?)),
            Type::Bytes => AvroValue::Bytes(self.bytes.bytes()?),
            Type::String => AvroValue::Text(self.bytes.text()?),
            Type::Fixed(size) => AvroValue::Bytes(self.bytes.take(*size)?),
            Type::Enum(symbols) => {
                let number = self.bytes.long()?;
                let symbol = usize::try_from(number).ok().and_then(|number| symbols.get(number));
                AvroValue::Text(
                    symbol.ok_or_else(|| format!("has symbol {number} of an enum of {}", symbols.len()))?,
                )
            }
            Type::Array(items) => {
                let mut values = Vec::new();
                loop {
                    let count = self.bytes.block_count()?;
                    if count == 0 {
                        break;
                    }
                    for _ in 0..count {
                        values.push(self.value(*items, depth)?);
                    }
                }
                AvroValue::Array(values)
            }
            Type::Map(items) => {
                let mut values = Vec::new();
                loop {
                    let count = self.bytes.block_count()?;
                    if count == 0 {
                        break;
                    }
                    for _ in 0..count {
                        values.push((self.bytes.text()?, self.value(*items, depth)?));
                    }
                }
                AvroValue::Record(values)
            }
            Type::Union(branches) => {
                let branch = self.branch(branches)?;
                self.value(branch, depth)?
            }
            Type::Record { fields, .. } => {
                let mut values = Vec::new();
                for field in fields {
                    if field.is_wanted {
                        let value = self.value(field.kind, depth);
                        values.push((&field.name[..], value.map_err(|e| within(&field.name, &e))?));
                    } else {
                        self.skip(field.kind, depth).map_err(|e| within(&field.name, &e))?;
                    }
                }
                AvroValue::Record(values)
            }
        })
    }

    fn skip(&mut self, kind: usize, depth: usize) -> Result<(), String> {
        let depth = self.count(depth)?;
        let types = self.types;
        match &types[kind] {
            Type::Null => {}
            Type::Boolean => drop(self.bytes.take(1)?),
            Type::Int | Type::Long | Type::Enum(_) => drop(self.bytes.long()?),
            Type::Float => drop(self.bytes.take(4)?),
            Type::Double => drop(self.bytes.take(8)?),
            Type::Bytes | Type::String => drop(self.bytes.bytes()?),
            Type::Fixed(size) => drop(self.bytes.take(*size)?),
            Type::Array(items) | Type::Map(items) => {
                let has_keys = matches!(types[kind], Type::Map(_));
                loop {
                    let count = self.bytes.long()?;
                    if count == 0 {
                        break;
                    }
                    if count < 0 {
                        let size = self.bytes.long()?;
                        let size =
                            usize::try_from(size).map_err(|_| format!("claims a block of {size} bytes"))?;
                        self.bytes.take(size)?;
                        continue;
                    }
                    for _ in 0..count {
                        if has_keys {
                            self.bytes.bytes()?;
                        }
                        self.skip(*items, depth)?;
                    }
                }
            }
            Type::Union(branches) => {
                let branch = self.branch(branches)?;
                self.skip(branch, depth)?;
            }
            Type::Record { fields, .. } => {
                for field in fields {
                    self.skip(field.kind, depth)?;
                }
            }
        }
        Ok(())
    }
}

/// An error with the field in which it lies; the outermost comes first.
fn within(field: &str, error: &str) -> String {
    match error.strip_prefix("in ") {
        Some(inner) => format!("in {field}.{inner}"),
        None => format!("in {field}: {error}"),
    }
}
