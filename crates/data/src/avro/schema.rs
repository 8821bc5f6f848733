//! Schemas: JSON into a list of types that refer to one another by number.

use std::collections::HashMap;

use serde_json::Value;

/// A schema, and which fields of its records are wanted.
#[derive(Debug, Clone)]
pub struct AvroSchema {
    pub(super) types: Vec<Type>,
    pub(super) root: usize,
}

#[derive(Debug, Clone)]
pub(super) enum Type {
    Null,
    Boolean,
    Int,
    Long,
    Float,
    Double,
    Bytes,
    String,
    Fixed(usize),
    Enum(Vec<String>),
    Array(usize),
    Map(usize),
    Union(Vec<usize>),
    Record { name: String, fields: Vec<Field> },
}

#[derive(Debug, Clone)]
pub(super) struct Field {
    pub name: String,
    pub kind: usize,
    pub is_wanted: bool,
}

impl AvroSchema {
    /// Reads a schema in JSON.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(json: &str) -> Result<Self, String> {
        let json: Value =
            serde_json::from_str(json).map_err(|e| format!("has a schema that is no JSON: {e}"))?;
        let mut parser = Parser { types: Vec::new(), named: HashMap::new() };
        let root = parser.parse(&json, "")?;
        Ok(Self { types: parser.types, root })
    }

    /// Wants only the fields for which `wanted(record, field)` is true; a record goes by its name without its namespace.
    pub fn keep(&mut self, wanted: impl Fn(&str, &str) -> bool) {
        for kind in &mut self.types {
            if let Type::Record { name, fields } = kind {
                for field in fields {
                    field.is_wanted = wanted(name, &field.name);
                }
            }
        }
    }
}

struct Parser {
    types: Vec<Type>,
    named: HashMap<String, usize>,
}

impl Parser {
    fn add(&mut self, kind: Type) -> usize {
        self.types.push(kind);
        self.types.len() - 1
    }

    fn parse(&mut self, json: &Value, namespace: &str) -> Result<usize, String> {
        match json {
            Value::String(name) => self.named(name, namespace),
            Value::Array(branches) => {
                let branches =
                    branches.iter().map(|branch| self.parse(branch, namespace)).collect::<Result<_, _>>()?;
                Ok(self.add(Type::Union(branches)))
            }
            Value::Object(_) => self.object(json, namespace),
            _ => Err(format!("has a schema with {json} for a type")),
        }
    }

    fn named(&mut self, name: &str, namespace: &str) -> Result<usize, String> {
        let kind = match name {
            "null" => Type::Null,
            "boolean" => Type::Boolean,
            "int" => Type::Int,
            "long" => Type::Long,
            "float" => Type::Float,
            "double" => Type::Double,
            "bytes" => Type::Bytes,
            "string" => Type::String,
            other => {
                let known = self.named.get(&full_name(other, namespace)).or_else(|| self.named.get(other));
                return known.copied().ok_or_else(|| format!("has a schema with the unknown type {other}"));
            }
        };
        Ok(self.add(kind))
    }

    fn object(&mut self, json: &Value, namespace: &str) -> Result<usize, String> {
        let text = |key: &str| json.get(key).and_then(Value::as_str);
        let missing =
            |what: &str| format!("has a schema in which {} has no {what}", text("name").unwrap_or("a type"));
        let kind = json.get("type").ok_or_else(|| missing("type"))?;
        match kind.as_str() {
            Some("array") => {
                let items = self.parse(json.get("items").ok_or_else(|| missing("items"))?, namespace)?;
                Ok(self.add(Type::Array(items)))
            }
            Some("map") => {
                let values = self.parse(json.get("values").ok_or_else(|| missing("values"))?, namespace)?;
                Ok(self.add(Type::Map(values)))
            }
            Some(kind @ ("record" | "error" | "enum" | "fixed")) => {
                let name = text("name").ok_or_else(|| missing("name"))?;
                let full = full_name(name, text("namespace").unwrap_or(namespace));
                let (namespace, short) = full.rsplit_once('.').unwrap_or(("", &full));
                // Known before its fields are, which may refer to it.
                let at = self.add(Type::Null);
                self.named.insert(full.clone(), at);
                self.types[at] = match kind {
                    "enum" => {
                        let symbols = json.get("symbols").and_then(Value::as_array);
                        let symbols = symbols.ok_or_else(|| missing("symbols"))?;
                        Type::Enum(symbols.iter().filter_map(|s| Some(s.as_str()?.to_string())).collect())
                    }
                    "fixed" => {
                        let size = json.get("size").and_then(Value::as_u64);
                        let size = size.and_then(|size| usize::try_from(size).ok());
                        Type::Fixed(size.ok_or_else(|| missing("size"))?)
                    }
                    _ => {
                        let fields = json.get("fields").and_then(Value::as_array);
                        let fields = fields.ok_or_else(|| missing("fields"))?;
                        let field = |field: &Value| {
                            let name = field.get("name").and_then(Value::as_str);
                            let name = name.ok_or_else(|| missing("names of its fields"))?.to_string();
                            let kind =
                                field.get("type").ok_or_else(|| missing(&format!("type of {name}")))?;
                            Ok(Field { kind: self.parse(kind, namespace)?, name, is_wanted: true })
                        };
                        let fields = fields.iter().map(field).collect::<Result<_, String>>()?;
                        Type::Record { name: short.to_string(), fields }
                    }
                };
                Ok(at)
            }
            // {"type": "long", "logicalType": …} and {"type": {…}}
            _ => self.parse(kind, namespace),
        }
    }
}

fn full_name(name: &str, namespace: &str) -> String {
    if name.contains('.') || namespace.is_empty() { name.to_string() } else { format!("{namespace}.{name}") }
}
