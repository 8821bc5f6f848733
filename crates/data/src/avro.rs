//! Avro object container files, read where they may be hostile and written where they are ours.
//!
//! The writer's schema inside a file decides how its bytes are read. [`AvroSchema::keep`] chooses the fields that are wanted:
//! the others are stepped over. Nothing is reserved for a length that a file only claims, nested values are followed to a
//! fixed depth, and a datum that unfolds into more values than [`MOST_VALUES`] is refused, which bounds time and memory.
//!
//! Source: Apache Avro 1.11 specification, "Binary encoding" and "Object container files".

mod decode;
mod encode;
mod schema;

use std::borrow::Cow;
use std::io::Read;

use decode::Bytes;
pub use encode::write_avro;
pub use schema::AvroSchema;

/// Values, kept or stepped over, that one datum may hold.
pub const MOST_VALUES: usize = 1 << 20;

const MAGIC: &[u8] = b"Obj\x01";
/// The marker between blocks.
const SYNC: usize = 16;

/// One value; text and bytes stay where they are in the file.
#[derive(Debug, Clone, PartialEq)]
pub enum AvroValue<'a> {
    /// `null`
    Null,
    /// `boolean`
    Bool(bool),
    /// `int` and `long`
    Int(i64),
    /// `float` and `double`
    Number(f64),
    /// `string`, and the symbol of an `enum`
    Text(&'a str),
    /// `bytes` and `fixed`
    Bytes(&'a [u8]),
    /// `array`
    Array(Vec<AvroValue<'a>>),
    /// `record`, with the fields that were kept, and `map`
    Record(Vec<(&'a str, AvroValue<'a>)>),
}

impl<'a> AvroValue<'a> {
    /// A field of a record.
    pub fn get(&self, name: &str) -> Option<&AvroValue<'a>> {
        match self {
            Self::Record(fields) => fields.iter().find(|(field, _)| *field == name).map(|(_, value)| value),
            _ => None,
        }
    }

    /// Whole numbers and others as `f64`.
    pub fn as_number(&self) -> Option<f64> {
        match *self {
            Self::Int(value) => Some(value as f64),
            Self::Number(value) => Some(value),
            _ => None,
        }
    }

    /// A whole number.
    pub fn as_int(&self) -> Option<i64> {
        match *self {
            Self::Int(value) => Some(value),
            _ => None,
        }
    }

    /// Text.
    pub fn as_text(&self) -> Option<&'a str> {
        match *self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// How many data a block holds, and their bytes.
pub type AvroBlock<'a> = (usize, Cow<'a, [u8]>);

/// A container file in memory: its schema as JSON, and what follows.
#[derive(Debug, Clone)]
pub struct AvroFile<'a> {
    schema: &'a str,
    is_deflated: bool,
    sync: &'a [u8],
    rest: &'a [u8],
}

impl<'a> AvroFile<'a> {
    /// Reads the header.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn new(bytes: &'a [u8]) -> Result<Self, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("is no Avro file: it does not begin with \"Obj\" and 1".into());
        }
        let mut bytes = Bytes::new(&bytes[MAGIC.len()..]);
        let (mut schema, mut codec) = (None, "null");
        loop {
            let count = bytes.block_count()?;
            if count == 0 {
                break;
            }
            for _ in 0..count {
                let (key, value) = (bytes.text()?, bytes.bytes()?);
                let text =
                    || std::str::from_utf8(value).map_err(|_| format!("has a header whose {key} is no text"));
                match key {
                    "avro.schema" => schema = Some(text()?),
                    "avro.codec" => codec = text()?,
                    _ => {}
                }
            }
        }
        let is_deflated = match codec {
            "null" | "" => false,
            "deflate" => true,
            other => return Err(format!("is packed with {other}; null and deflate are read")),
        };
        let schema = schema.ok_or("has no avro.schema in its header")?;
        Ok(Self { schema, is_deflated, sync: bytes.take(SYNC)?, rest: bytes.rest() })
    }

    /// The writer's schema.
    pub fn schema(&self) -> &'a str {
        self.schema
    }

    /// The next block: how many data it holds, and their bytes, unpacked to at most `limit`. `None` at the end.
    ///
    /// # Errors
    /// What is wrong with the block.
    pub fn next_block(&mut self, limit: usize) -> Result<Option<AvroBlock<'a>>, String> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let mut bytes = Bytes::new(self.rest);
        let count = usize::try_from(bytes.long()?).map_err(|_| "has a block of a negative number of data")?;
        let block = bytes.bytes()?;
        if bytes.take(SYNC)? != self.sync {
            return Err("is damaged: the marker after a block is not that of the header".into());
        }
        self.rest = bytes.rest();
        let block = match self.is_deflated {
            false => Cow::Borrowed(block),
            true => Cow::Owned(inflate(block, limit)?),
        };
        if count > block.len() {
            return Err(format!("claims {count} data in a block of {} bytes", block.len()));
        }
        Ok(Some((count, block)))
    }
}

fn inflate(block: &[u8], limit: usize) -> Result<Vec<u8>, String> {
    let mut unpacked = Vec::new();
    flate2::read::DeflateDecoder::new(block)
        .take(limit as u64 + 1)
        .read_to_end(&mut unpacked)
        .map_err(|e| format!("has a block that cannot be unpacked: {e}"))?;
    if unpacked.len() > limit {
        return Err(format!("has a block that unpacks to more than {limit} bytes"));
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEMA: &str = r#"{"type": "record", "name": "a", "namespace": "n", "fields": [
        {"name": "id", "type": "long"},
        {"name": "name", "type": ["null", "string"]},
        {"name": "skipped", "type": {"type": "array", "items": "double"}},
        {"name": "inner", "type": {"type": "record", "name": "inner", "fields": [
            {"name": "x", "type": "float"}, {"name": "flag", "type": "boolean"},
            {"name": "kind", "type": {"type": "enum", "name": "kind", "symbols": ["up", "down"]}}]}},
        {"name": "more", "type": {"type": "array", "items": "n.inner"}},
        {"name": "blob", "type": {"type": "fixed", "name": "two", "size": 2}},
        {"name": "map", "type": {"type": "map", "values": "int"}}]}"#;

    fn inner(x: f64) -> AvroValue<'static> {
        AvroValue::Record(vec![
            ("x", AvroValue::Number(x)),
            ("flag", AvroValue::Bool(true)),
            ("kind", AvroValue::Text("down")),
        ])
    }

    fn datum() -> AvroValue<'static> {
        AvroValue::Record(vec![
            ("id", AvroValue::Int(-(1 << 40))),
            ("name", AvroValue::Text("süd")),
            ("skipped", AvroValue::Array(vec![AvroValue::Number(1.0); 3])),
            ("inner", inner(1.5)),
            ("more", AvroValue::Array(vec![inner(-2.0), inner(3.0)])),
            ("blob", AvroValue::Bytes(b"ab")),
            ("map", AvroValue::Record(vec![("k", AvroValue::Int(7))])),
        ])
    }

    #[test]
    fn what_is_written_is_read_back_and_unwanted_fields_are_stepped_over() {
        let schema = AvroSchema::parse(SCHEMA).unwrap();
        let bytes = write_avro(SCHEMA, &schema, &[datum(), datum()]).unwrap();
        let mut file = AvroFile::new(&bytes).unwrap();
        assert_eq!(file.schema(), SCHEMA);
        let (count, block) = file.next_block(1000).unwrap().unwrap();
        assert_eq!(count, 2);
        let (first, rest) = schema.decode(&block).unwrap();
        assert_eq!((&first, schema.decode(rest).unwrap().0), (&datum(), datum()));
        assert!(file.next_block(1000).unwrap().is_none());

        let mut schema = schema;
        schema.keep(|record, field| matches!((record, field), ("a", "more") | ("inner", "x")));
        let (kept, rest) = schema.decode(&block).unwrap();
        let x = |x| AvroValue::Record(vec![("x", AvroValue::Number(x))]);
        assert_eq!(kept, AvroValue::Record(vec![("more", AvroValue::Array(vec![x(-2.0), x(3.0)]))]));
        assert_eq!(schema.decode(rest).unwrap().0, kept);
    }

    #[test]
    fn damaged_files_are_errors_and_never_panics() {
        let schema = AvroSchema::parse(SCHEMA).unwrap();
        let bytes = write_avro(SCHEMA, &schema, &[datum()]).unwrap();
        let read = |bytes: &[u8]| -> Result<(), String> {
            let mut file = AvroFile::new(bytes)?;
            let schema = AvroSchema::parse(file.schema())?;
            while let Some((count, block)) = file.next_block(1 << 20)? {
                let mut rest = &block[..];
                for _ in 0..count {
                    rest = schema.decode(rest)?.1;
                }
            }
            Ok(())
        };
        assert_eq!(read(&bytes), Ok(()));
        for cut in 0..bytes.len() {
            let _ = read(&bytes[..cut]);
        }
        for at in 0..bytes.len() {
            for flip in [1, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= flip;
                let _ = read(&bytes);
            }
        }
    }

    #[test]
    fn a_schema_of_itself_and_counts_without_end_are_refused() {
        // A list of null that claims a million million elements, and a list in a list without end.
        let nothing = r#"{"type": "array", "items": "null"}"#;
        let endless = r#"{"type": "record", "name": "a", "fields": [{"name": "b", "type": {"type": "array", "items": "a"}}]}"#;
        let mut many = vec![0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01];
        many.push(0);
        let error = AvroSchema::parse(nothing).unwrap().decode(&many).unwrap_err();
        assert!(error.contains("more than"), "{error}");
        let deep = vec![2; 100_000];
        let error = AvroSchema::parse(endless).unwrap().decode(&deep).unwrap_err();
        assert!(error.contains("nested"), "{error}");
    }
}
