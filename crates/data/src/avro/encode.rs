//! Values into bytes.

use super::schema::Type;
use super::{AvroSchema, AvroValue, MAGIC};

/// What divides the blocks: any sixteen bytes will do.
const SYNC: [u8; 16] = *b"\x8bkiln\x01avro\xd3\x5a\x17\xc4\x66\x9e";

/// A container file of one block, not packed; `json` is the text of `schema`.
///
/// # Errors
/// When a value is not of its type, by the name of the field.
pub fn write_avro(json: &str, schema: &AvroSchema, data: &[AvroValue<'_>]) -> Result<Vec<u8>, String> {
    let mut file = MAGIC.to_vec();
    put_long(&mut file, 2);
    for (key, value) in [("avro.codec", "null"), ("avro.schema", json)] {
        put_bytes(&mut file, key.as_bytes());
        put_bytes(&mut file, value.as_bytes());
    }
    put_long(&mut file, 0);
    file.extend(SYNC);
    let mut block = Vec::new();
    for datum in data {
        put(&mut block, schema, schema.root, datum)?;
    }
    put_long(&mut file, data.len() as i64);
    put_bytes(&mut file, &block);
    file.extend(SYNC);
    Ok(file)
}

fn put_long(bytes: &mut Vec<u8>, value: i64) {
    let mut left = (value << 1 ^ value >> 63) as u64;
    while left >= 0x80 {
        bytes.push(left as u8 | 0x80);
        left >>= 7;
    }
    bytes.push(left as u8);
}

fn put_bytes(bytes: &mut Vec<u8>, value: &[u8]) {
    put_long(bytes, value.len() as i64);
    bytes.extend(value);
}

/// Whether a value can be written as a type, looked at from outside.
fn fits(kind: &Type, value: &AvroValue<'_>) -> bool {
    matches!(
        (kind, value),
        (Type::Null, AvroValue::Null)
            | (Type::Boolean, AvroValue::Bool(_))
            | (Type::Int | Type::Long, AvroValue::Int(_))
            | (Type::Float | Type::Double, AvroValue::Number(_))
            | (Type::Bytes | Type::Fixed(_), AvroValue::Bytes(_))
            | (Type::String | Type::Enum(_), AvroValue::Text(_))
            | (Type::Array(_), AvroValue::Array(_))
            | (Type::Map(_) | Type::Record { .. }, AvroValue::Record(_))
    )
}

fn put(bytes: &mut Vec<u8>, schema: &AvroSchema, kind: usize, value: &AvroValue<'_>) -> Result<(), String> {
    match (&schema.types[kind], value) {
        (Type::Union(branches), _) => {
            let place = branches.iter().position(|&branch| fits(&schema.types[branch], value));
            let place = place.ok_or_else(|| format!("{value:?} is none of the alternatives"))?;
            put_long(bytes, place as i64);
            put(bytes, schema, branches[place], value)?;
        }
        (Type::Null, AvroValue::Null) => {}
        (Type::Boolean, AvroValue::Bool(value)) => bytes.push(u8::from(*value)),
        (Type::Int | Type::Long, AvroValue::Int(value)) => put_long(bytes, *value),
        (Type::Float, AvroValue::Number(value)) => bytes.extend((*value as f32).to_le_bytes()),
        (Type::Double, AvroValue::Number(value)) => bytes.extend(value.to_le_bytes()),
        (Type::Bytes, AvroValue::Bytes(value)) => put_bytes(bytes, value),
        (Type::String, AvroValue::Text(value)) => put_bytes(bytes, value.as_bytes()),
        (Type::Fixed(size), AvroValue::Bytes(value)) if value.len() == *size => bytes.extend(*value),
        (Type::Enum(symbols), AvroValue::Text(value)) => {
            let place = symbols.iter().position(|symbol| symbol == value);
            put_long(bytes, place.ok_or_else(|| format!("{value} is no symbol of the enum"))? as i64);
        }
        (Type::Array(items), AvroValue::Array(values)) => {
            if !values.is_empty() {
                put_long(bytes, values.len() as i64);
                values.iter().try_for_each(|value| put(bytes, schema, *items, value))?;
            }
            put_long(bytes, 0);
        }
        (Type::Map(items), AvroValue::Record(values)) => {
            if !values.is_empty() {
                put_long(bytes, values.len() as i64);
                for (key, value) in values {
                    put_bytes(bytes, key.as_bytes());
                    put(bytes, schema, *items, value)?;
                }
            }
            put_long(bytes, 0);
        }
        (Type::Record { fields, .. }, AvroValue::Record(_)) => {
            for field in fields {
                let value = value.get(&field.name).unwrap_or(&AvroValue::Null);
                put(bytes, schema, field.kind, value).map_err(|e| format!("{}: {e}", field.name))?;
            }
        }
        (_, value) => return Err(format!("{value:?} is of another type")),
    }
    Ok(())
}
