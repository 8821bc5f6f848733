//! A graph in a folder: `graph.json` and `constants.safetensors`.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::backend::ir::{IrVisitorMut, OperationIr, ScalarIr, TensorId};
use burn::tensor::{BoolStore, DType, TensorData};
use kiln_core::{Error, Result, write_atomic};
use safetensors::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use crate::{Boundary, Graph};

const GRAPH: &str = "graph.json";
const CONSTANTS: &str = "constants.safetensors";
const FORMAT: &str = "kiln-graph";
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Document {
    format: String,
    version: u32,
    kind: String,
    inputs: Vec<Boundary>,
    outputs: Vec<Boundary>,
    /// JSON has no infinities and rounds some numbers: such scalars stand here as text, by their number
    /// in visiting order, and as 0 in the operations.
    scalars: BTreeMap<usize, String>,
    operations: Vec<OperationIr>,
}

impl Graph {
    /// Writes the graph into `folder`, which is created. `graph.json` comes last: a folder that has it
    /// is complete.
    ///
    /// # Errors
    /// When a constant has a type that the safetensors format lacks, or a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let json = |e: serde_json::Error| Error::work("cannot write the graph as JSON").caused_by(e);

        let constants = self.constants.iter().map(|(id, data)| Ok((name(*id), Constant::new(data)?)));
        let bytes = safetensors::serialize(constants.collect::<Result<Vec<_>>>()?, None)
            .map_err(|e| Error::work("cannot lay out the graph's constants").caused_by(e))?;

        let mut operations = self.operations.clone();
        let mut out = TakeInexact::default();
        operations.iter_mut().for_each(|operation| operation.visit_mut(&mut out));
        let written = serde_json::to_vec(&operations).map_err(json)?;
        let read: Vec<OperationIr> = serde_json::from_slice(&written).map_err(json)?;
        if read != operations {
            return Err(Error::work("an operation of the graph does not survive being written as JSON"));
        }
        let document = Document {
            format: FORMAT.into(),
            version: VERSION,
            kind: self.kind.clone(),
            inputs: self.inputs.clone(),
            outputs: self.outputs.clone(),
            scalars: out.found,
            operations,
        };
        write_atomic(&folder.join(CONSTANTS), &bytes)?;
        write_atomic(&folder.join(GRAPH), &serde_json::to_vec(&document).map_err(json)?)
    }

    /// Reads a graph that [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// When a file is missing or malformed, or an operation reads a tensor that nothing provides.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(GRAPH);
        let text = fs::read(&path)
            .map_err(|e| Error::io("read", &path)(e).hint("`kiln export` writes such a folder"))?;
        let mut document: Document = serde_json::from_slice(&text)
            .map_err(|e| Error::input(path.display(), "is not a graph written by Kiln").caused_by(e))?;
        if document.format != FORMAT || document.version != VERSION {
            let found = format!("is {} version {}", document.format, document.version);
            return Err(Error::input(path.display(), found)
                .hint(format!("this program reads {FORMAT} version {VERSION}; export the model again")));
        }
        let mut put_back = PutBack { values: &document.scalars, visited: 0 };
        document.operations.iter_mut().for_each(|operation| operation.visit_mut(&mut put_back));

        let graph = Self {
            kind: document.kind,
            inputs: document.inputs,
            outputs: document.outputs,
            operations: document.operations,
            constants: read_constants(&folder.join(CONSTANTS))?,
        };
        graph.sound().map(|()| graph).map_err(|found| {
            Error::input(path.display(), found).hint(format!("do {GRAPH} and {CONSTANTS} belong together?"))
        })
    }
}

fn name(id: TensorId) -> String {
    format!("t{}", id.value())
}

fn read_constants(path: &Path) -> Result<BTreeMap<TensorId, TensorData>> {
    let bytes = fs::read(path).map_err(Error::io("read", path))?;
    let file = SafeTensors::deserialize(&bytes)
        .map_err(|e| Error::input(path.display(), "is not a complete safetensors file").caused_by(e))?;
    file.iter()
        .map(|(name, view)| {
            let id = name.strip_prefix('t').and_then(|number| number.parse().ok()).ok_or_else(|| {
                Error::input(path.display(), format!("\"{name}\" is not a tensor of a graph"))
            })?;
            let dtype = BOTH_TYPES.iter().find(|(_, file)| *file == view.dtype()).ok_or_else(|| {
                Error::input(path.display(), format!("tensor \"{name}\" has type {:?}", view.dtype()))
            })?;
            let data = TensorData::try_from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype.0)
                .map_err(|e| {
                Error::input(path.display(), format!("tensor \"{name}\" is malformed: {e:?}"))
            })?;
            Ok((TensorId::new(id), data))
        })
        .collect()
}

/// Element types of Burn beside those of the file format.
const BOTH_TYPES: [(DType, Dtype); 14] = [
    (DType::F64, Dtype::F64),
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::BF16, Dtype::BF16),
    (DType::I64, Dtype::I64),
    (DType::I32, Dtype::I32),
    (DType::I16, Dtype::I16),
    (DType::I8, Dtype::I8),
    (DType::U64, Dtype::U64),
    (DType::U32, Dtype::U32),
    (DType::U16, Dtype::U16),
    (DType::U8, Dtype::U8),
    (DType::Bool(BoolStore::Native), Dtype::BOOL),
    (DType::Bool(BoolStore::U8), Dtype::BOOL),
];

/// A constant as the file format sees it.
struct Constant<'a> {
    data: &'a TensorData,
    dtype: Dtype,
}

impl<'a> Constant<'a> {
    fn new(data: &'a TensorData) -> Result<Self> {
        match BOTH_TYPES.iter().find(|(burn, _)| *burn == data.dtype()) {
            Some(&(_, dtype)) => Ok(Self { data, dtype }),
            None => Err(Error::work(format!("constants of type {:?} cannot be saved", data.dtype()))),
        }
    }
}

impl View for Constant<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        self.data.shape()
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.data.as_bytes().into()
    }

    fn data_len(&self) -> usize {
        self.data.as_bytes().len()
    }
}

/// Replaces scalars that JSON does not carry exactly by 0 and remembers them.
#[derive(Default)]
struct TakeInexact {
    found: BTreeMap<usize, String>,
    visited: usize,
}

impl IrVisitorMut for TakeInexact {
    fn visit_scalar_mut(&mut self, scalar: &mut ScalarIr) {
        if let ScalarIr::Float(value) = scalar
            && !survives_json(*value)
        {
            self.found.insert(self.visited, value.to_string());
            *value = 0.0;
        }
        self.visited += 1;
    }
}

fn survives_json(value: f64) -> bool {
    serde_json::to_string(&value)
        .is_ok_and(|text| serde_json::from_str(&text).is_ok_and(|read: f64| read == value))
}

struct PutBack<'a> {
    values: &'a BTreeMap<usize, String>,
    visited: usize,
}

impl IrVisitorMut for PutBack<'_> {
    fn visit_scalar_mut(&mut self, scalar: &mut ScalarIr) {
        let value = self.values.get(&self.visited).and_then(|text| text.parse().ok());
        if let (ScalarIr::Float(scalar), Some(value)) = (scalar, value) {
            *scalar = value;
        }
        self.visited += 1;
    }
}
