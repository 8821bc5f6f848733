//! Named tensors in the safetensors format, and the way between them and Burn modules.
//!
//! Files hold parameters as PyTorch does: a linear weight is `[out, in]` and a norm's scale is called
//! `weight`. Burn keeps linear weights as `[in, out]` and calls the scale `gamma`; the two directions
//! below translate.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Int, Tensor, TensorData};
use half::{bf16, f16};
use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, View};

use crate::model::write_atomic_by;
use crate::{Error, Result};

/// The safetensors format allows no larger header.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Bytes of a tensor that are read at once, whole elements of every type.
const PIECE: usize = 1 << 20;

/// The elements of a [`HostTensor`]. Half precision is widened to `f32`, small integers to `i64`.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// Floating point.
    Float(Vec<f32>),
    /// Integers and booleans.
    Int(Vec<i64>),
}

/// A tensor in main memory, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct HostTensor {
    /// Extent of every axis.
    pub shape: Vec<usize>,
    /// Elements.
    pub values: Values,
}

impl HostTensor {
    /// A float tensor.
    ///
    /// # Panics
    /// When `values` does not fill `shape`.
    pub fn float(shape: impl Into<Vec<usize>>, values: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values must fill shape {shape:?}");
        Self { shape, values: Values::Float(values) }
    }

    /// An integer tensor.
    ///
    /// # Panics
    /// When `values` does not fill `shape`.
    pub fn int(shape: impl Into<Vec<usize>>, values: Vec<i64>) -> Self {
        let shape = shape.into();
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values must fill shape {shape:?}");
        Self { shape, values: Values::Int(values) }
    }

    /// Copies a Burn tensor from its device.
    pub fn from_tensor<const D: usize>(tensor: Tensor<D>) -> Self {
        let shape = tensor.dims().to_vec();
        let values = tensor.into_data().convert::<f32>().try_to_vec().expect("converted to f32 just above");
        Self { shape, values: Values::Float(values) }
    }

    /// As a Burn tensor of rank `D` on `device`; `None` for another rank or for integers.
    pub fn to_tensor<const D: usize>(&self, device: &burn::tensor::Device) -> Option<Tensor<D>> {
        self.clone().into_tensor(device)
    }

    /// The same without a copy of the elements.
    fn into_tensor<const D: usize>(self, device: &burn::tensor::Device) -> Option<Tensor<D>> {
        match self.values {
            Values::Float(values) if self.shape.len() == D => {
                Some(Tensor::from_data(TensorData::new(values, self.shape), device))
            }
            _ => None,
        }
    }

    /// As a Burn integer tensor of rank `D`; `None` for another rank or for floats.
    pub fn to_int_tensor<const D: usize>(&self, device: &burn::tensor::Device) -> Option<Tensor<D, Int>> {
        match &self.values {
            Values::Int(values) if self.shape.len() == D => {
                Some(Tensor::from_data(TensorData::new(values.clone(), self.shape.clone()), device))
            }
            _ => None,
        }
    }

    /// The elements, if they are floats.
    pub fn as_floats(&self) -> Option<&[f32]> {
        match &self.values {
            Values::Float(values) => Some(values),
            Values::Int(_) => None,
        }
    }

    /// The elements, if they are integers.
    pub fn as_ints(&self) -> Option<&[i64]> {
        match &self.values {
            Values::Int(values) => Some(values),
            Values::Float(_) => None,
        }
    }

    /// The matrix transposed.
    ///
    /// # Panics
    /// When it is not a float matrix.
    fn transposed(self) -> Self {
        let (&[rows, columns], Values::Float(values)) = (&self.shape[..], &self.values) else {
            panic!("only float matrices are transposed");
        };
        let turned = (0..columns).flat_map(|c| (0..rows).map(move |r| values[r * columns + c])).collect();
        Self::float([columns, rows], turned)
    }

    /// A tensor of a safetensors file before its elements are decoded; none for a type that is not read. The file has
    /// room for as many elements as its header says, which was compared.
    fn empty(info: &TensorInfo) -> Option<Self> {
        let count = info.shape.iter().product();
        let values = match info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => Values::Float(Vec::with_capacity(count)),
            Dtype::I64 | Dtype::I32 | Dtype::I16 | Dtype::I8 => Values::Int(Vec::with_capacity(count)),
            Dtype::U8 | Dtype::BOOL | Dtype::U16 | Dtype::U32 => Values::Int(Vec::with_capacity(count)),
            _ => return None,
        };
        Some(Self { shape: info.shape.clone(), values })
    }

    /// Appends elements of that type from whole bytes of a safetensors file.
    fn decode(&mut self, kind: Dtype, bytes: &[u8]) {
        fn each<const N: usize, T>(values: &mut Vec<T>, bytes: &[u8], from: impl Fn([u8; N]) -> T) {
            values.extend(bytes.as_chunks::<N>().0.iter().map(|&chunk| from(chunk)));
        }
        match (&mut self.values, kind) {
            (Values::Float(values), Dtype::F32) => each(values, bytes, f32::from_le_bytes),
            (Values::Float(values), Dtype::F16) => each(values, bytes, |b| f16::from_le_bytes(b).to_f32()),
            (Values::Float(values), Dtype::BF16) => each(values, bytes, |b| bf16::from_le_bytes(b).to_f32()),
            (Values::Float(values), _) => each(values, bytes, |b| f64::from_le_bytes(b) as f32),
            (Values::Int(values), Dtype::I64) => each(values, bytes, i64::from_le_bytes),
            (Values::Int(values), Dtype::I32) => each(values, bytes, |b| i32::from_le_bytes(b).into()),
            (Values::Int(values), Dtype::I16) => each(values, bytes, |b| i16::from_le_bytes(b).into()),
            (Values::Int(values), Dtype::I8) => each(values, bytes, |b| i8::from_le_bytes(b).into()),
            (Values::Int(values), Dtype::U16) => each(values, bytes, |b| u16::from_le_bytes(b).into()),
            (Values::Int(values), Dtype::U32) => each(values, bytes, |b| u32::from_le_bytes(b).into()),
            (Values::Int(values), _) => each(values, bytes, |[b]: [u8; 1]| b.into()),
        }
    }
}

impl View for &HostTensor {
    fn dtype(&self) -> Dtype {
        match self.values {
            Values::Float(_) => Dtype::F32,
            Values::Int(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.values {
            Values::Float(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Values::Int(values) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    fn data_len(&self) -> usize {
        match &self.values {
            Values::Float(values) => 4 * values.len(),
            Values::Int(values) => 8 * values.len(),
        }
    }
}

/// A tensor whose floats are written as f16.
struct Half<'a>(&'a HostTensor);

impl View for Half<'_> {
    fn dtype(&self) -> Dtype {
        match self.0.values {
            Values::Float(_) => Dtype::F16,
            Values::Int(_) => Dtype::I64,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match &self.0.values {
            Values::Float(values) => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Values::Int(_) => self.0.data(),
        }
    }

    fn data_len(&self) -> usize {
        match &self.0.values {
            Values::Float(values) => 2 * values.len(),
            Values::Int(_) => self.0.data_len(),
        }
    }
}

/// Reads the header of a file of `size` bytes, and where its tensors begin; they fill the rest of the file.
pub(crate) fn read_header(mut reader: impl Read, size: u64, path: &Path) -> Result<(Metadata, u64)> {
    let malformed = |found: String| {
        Error::input(path.display(), found).hint("is it a complete file in the safetensors format?")
    };
    if size < 8 {
        return Err(malformed(format!("has {size} bytes, too few for a header")));
    }
    let mut length = [0u8; 8];
    reader.read_exact(&mut length).map_err(Error::io("read", path))?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES || length > size - 8 {
        return Err(malformed(format!("claims a header of {length} bytes in a file of {size}")));
    }
    let mut header = vec![0u8; length as usize];
    reader.read_exact(&mut header).map_err(Error::io("read", path))?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|e| malformed("has a malformed header".into()).caused_by(e))?;
    let (expected, found) = (metadata.data_len() as u64, size - 8 - length);
    if expected != found {
        return Err(malformed(format!("should hold {expected} bytes of tensors but holds {found}")));
    }
    Ok((metadata, 8 + length))
}

/// Tensors by name, as read from or written to safetensors.
#[derive(Debug, Clone, Default)]
pub struct TensorFile {
    tensors: BTreeMap<String, HostTensor>,
    /// Free text by name, kept in the header of the file.
    pub metadata: BTreeMap<String, String>,
    /// Where they came from, for messages.
    source: PathBuf,
}

impl TensorFile {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty set whose messages name `source`, for what is read from other formats.
    pub fn from_source(source: impl Into<PathBuf>) -> Self {
        Self { source: source.into(), ..Self::default() }
    }

    /// Reads every tensor of one file. Memory stays within the size of the file, whatever its header claims.
    ///
    /// # Errors
    /// When the file is missing, truncated, malformed, or holds a type that Kiln does not read.
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_some(path, |_| true)
    }

    /// Reads the tensors of one file whose names `wanted` accepts, and passes over the others.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn read_some(path: &Path, wanted: impl Fn(&str) -> bool) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("read", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        Self::parse(BufReader::new(file), size, path, wanted)
    }

    /// Reads every tensor of a file that is in memory; messages call it `source`.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn from_bytes(bytes: &[u8], source: impl AsRef<Path>) -> Result<Self> {
        Self::parse(Cursor::new(bytes), bytes.len() as u64, source.as_ref(), |_| true)
    }

    fn parse(
        mut reader: impl Read + Seek,
        size: u64,
        path: &Path,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let (metadata, _) = read_header(&mut reader, size, path)?;
        let (mut tensors, mut buffer) = (BTreeMap::new(), Vec::new());
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let (start, end) = info.data_offsets;
            if !wanted(&name) {
                reader.seek_relative((end - start) as i64).map_err(Error::io("read", path))?;
                continue;
            }
            let unknown = || {
                Error::input(path.display(), format!("tensor \"{name}\" has type {:?}", info.dtype))
                    .hint("Kiln reads f64, f32, f16, bf16, integers and bool")
            };
            // Piece by piece, so that a tensor is never in memory both as bytes and as numbers.
            let mut tensor = HostTensor::empty(info).ok_or_else(unknown)?;
            let mut left = end - start;
            while left > 0 {
                buffer.resize(left.min(PIECE), 0);
                reader.read_exact(&mut buffer).map_err(Error::io("read", path))?;
                tensor.decode(info.dtype, &buffer);
                left -= buffer.len();
            }
            tensors.insert(name, tensor);
        }
        let metadata = metadata.metadata().iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect();
        Ok(Self { tensors, metadata, source: path.into() })
    }

    /// Reads the shards listed in a `model.safetensors.index.json`.
    ///
    /// # Errors
    /// As [`read`](Self::read), and when the index is malformed or names a tensor that its shard lacks.
    pub fn read_shards(index: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(index).map_err(Error::io("read", index))?;
        let json: serde_json::Value = serde_json::from_str(&text)
            .map_err(|e| Error::input(index.display(), "is not valid JSON").caused_by(e))?;
        let map = json
            .get("weight_map")
            .and_then(serde_json::Value::as_object)
            .ok_or_else(|| Error::input(index.display(), "has no \"weight_map\""))?;
        let mut all = Self { source: index.into(), ..Self::new() };
        let mut by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, shard) in map {
            let shard = shard.as_str().filter(|s| is_plain_file_name(s)).ok_or_else(|| {
                Error::input(index.display(), format!("\"{name}\" is not mapped to a file in this folder"))
            })?;
            by_shard.entry(shard).or_default().push(name);
        }
        for (shard, names) in by_shard {
            let mut file = Self::read(&index.with_file_name(shard))?;
            for name in names {
                all.tensors.insert(name.into(), file.take(name)?);
            }
        }
        Ok(all)
    }

    /// Writes all tensors atomically; floats as f32, integers as i64.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.write_views(self.tensors.iter(), path)
    }

    /// Writes all tensors atomically with floats as f16, half the size: a number keeps eleven binary digits, and
    /// one beyond 65504 becomes infinite.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write_half(&self, path: &Path) -> Result<()> {
        self.write_views(self.tensors.iter().map(|(name, tensor)| (name, Half(tensor))), path)
    }

    fn write_views<'a>(
        &self,
        tensors: impl Iterator<Item = (&'a String, impl View)>,
        path: &Path,
    ) -> Result<()> {
        let metadata = (!self.metadata.is_empty())
            .then(|| self.metadata.iter().map(|(k, v)| (k.clone(), v.clone())).collect());
        // Tensor by tensor, so that the file is never in memory as a whole.
        write_atomic_by(path, |file| {
            safetensors::serialize_to_file(tensors, metadata, file)
                .map_err(|e| Error::work(format!("cannot write {}", path.display())).caused_by(e))
        })
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: impl Into<String>, tensor: HostTensor) {
        self.tensors.insert(name.into(), tensor);
    }

    /// A tensor, if it is there.
    pub fn get(&self, name: &str) -> Option<&HostTensor> {
        self.tensors.get(name)
    }

    /// Removes a tensor that must be there.
    ///
    /// # Errors
    /// When it is missing.
    pub fn take(&mut self, name: &str) -> Result<HostTensor> {
        self.tensors.remove(name).ok_or_else(|| {
            let near = self.tensors.keys().take(4).cloned().collect::<Vec<_>>().join(", ");
            Error::input(self.source.display(), format!("tensor \"{name}\" is missing"))
                .hint(format!("the file holds {} others, among them: {near}", self.tensors.len()))
        })
    }

    /// Removes a tensor that must be there with floats of the given rank.
    ///
    /// # Errors
    /// When it is missing, holds integers or has another rank.
    pub fn take_float<const D: usize>(
        &mut self,
        name: &str,
        device: &burn::tensor::Device,
    ) -> Result<Tensor<D>> {
        let tensor = self.take(name)?;
        tensor.to_tensor(device).ok_or_else(|| self.wrong(name, &tensor, &format!("floats with {D} axes")))
    }

    /// Removes a tensor that must be there with floats of the given shape.
    ///
    /// # Errors
    /// When it is missing, holds integers or has another shape.
    pub fn take_shaped<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
        device: &burn::tensor::Device,
    ) -> Result<Tensor<D>> {
        let tensor = self.take(name)?;
        let fits = tensor.shape == shape;
        let wrong = || self.wrong(name, &tensor, &format!("floats of the shape {shape:?}"));
        tensor.to_tensor(device).filter(|_| fits).ok_or_else(wrong)
    }

    /// Removes a tensor that must be there with integers of the given rank.
    ///
    /// # Errors
    /// When it is missing, holds floats or has another rank.
    pub fn take_int<const D: usize>(
        &mut self,
        name: &str,
        device: &burn::tensor::Device,
    ) -> Result<Tensor<D, Int>> {
        let tensor = self.take(name)?;
        tensor
            .to_int_tensor(device)
            .ok_or_else(|| self.wrong(name, &tensor, &format!("integers with {D} axes")))
    }

    /// Moves a tensor to another name; does nothing when it is not there.
    pub fn rename(&mut self, from: &str, to: impl Into<String>) {
        if let Some(tensor) = self.tensors.remove(from) {
            self.tensors.insert(to.into(), tensor);
        }
    }

    /// Adds every tensor of `section` with `prefix` before its name.
    pub fn insert_section(&mut self, prefix: &str, section: Self) {
        self.tensors
            .extend(section.tensors.into_iter().map(|(name, tensor)| (format!("{prefix}{name}"), tensor)));
    }

    /// Removes the tensors whose names begin with `prefix`, and returns them without it.
    pub fn take_section(&mut self, prefix: &str) -> Self {
        let mut section = Self { source: self.source.clone(), ..Self::new() };
        for (name, tensor) in std::mem::take(&mut self.tensors) {
            match name.strip_prefix(prefix) {
                Some(rest) => section.tensors.insert(rest.into(), tensor),
                None => self.tensors.insert(name, tensor),
            };
        }
        section
    }

    /// All names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensors with their names, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &HostTensor)> {
        self.tensors.iter()
    }

    /// Where the tensors came from.
    pub fn source(&self) -> &Path {
        &self.source
    }

    fn wrong(&self, name: &str, found: &HostTensor, expected: &str) -> Error {
        let kind = match found.values {
            Values::Float(_) => "floats",
            Values::Int(_) => "integers",
        };
        let place = format!("{}: tensor \"{name}\"", self.source.display());
        Error::input(place, format!("has {kind} of shape {:?}, expected {expected}", found.shape))
    }

    /// Copies the parameters of a module, named by their path and laid out as PyTorch does.
    pub fn from_module<M: Module>(module: &M) -> Self {
        let mut collector = Collector { path: ModulePath::default(), file: Self::new() };
        module.visit(&mut collector);
        collector.file
    }

    /// Puts the tensors into a module whose every parameter they must name, with the right shape.
    ///
    /// # Errors
    /// Names the first parameter that is missing, misshapen or not finite, or the first tensor left over.
    pub fn into_module<M: Module>(self, module: M) -> Result<M> {
        let mut loader = Loader { path: ModulePath::default(), file: self, error: None };
        let module = module.map(&mut loader);
        if let Some(error) = loader.error {
            return Err(error);
        }
        if let Some(name) = loader.file.tensors.keys().next() {
            return Err(Error::input(
                loader.file.source.display(),
                format!("tensor \"{name}\" has no place in this network"),
            )
            .hint("does config.json belong to these weights?"));
        }
        Ok(module)
    }
}

/// Shard names come from outside: only files in the same folder are opened.
fn is_plain_file_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|file| file == name)
}

/// The path of the parameter that a visitor or mapper of modules is at, and the type of the module that holds it.
///
/// It gives parameters the names that files have: a norm's scale is `weight`, its shift `bias`.
#[derive(Debug, Clone, Default)]
pub struct ModulePath {
    names: Vec<String>,
    containers: Vec<String>,
}

impl ModulePath {
    /// To be called in `enter_module`, with the same arguments.
    pub fn enter(&mut self, name: &str, container: &str) {
        // Which variant of an enum a network is says its configuration, not the names of its parameters.
        let name = if container.starts_with("Enum:") { "" } else { name };
        self.names.push(name.into());
        self.containers.push(container.into());
    }

    /// To be called in `exit_module`.
    pub fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    /// The type of the module that holds the parameter, such as `Linear`.
    pub fn holder(&self) -> &str {
        self.containers.last().map_or("", |c| c.trim_start_matches("Struct:"))
    }

    /// The parameter's name in a file, such as `layers.0.weight`.
    pub fn name(&self) -> String {
        let mut names = self.names.clone();
        if self.holder().ends_with("Norm")
            && let Some(last) = names.last_mut()
        {
            match last.as_str() {
                "gamma" => *last = "weight".into(),
                "beta" => *last = "bias".into(),
                _ => {}
            }
        }
        names.retain(|name| !name.is_empty());
        names.join(".")
    }

    /// Whether the file holds the transposed matrix.
    fn is_transposed(&self) -> bool {
        self.holder() == "Linear" && self.names.last().is_some_and(|name| name == "weight")
    }
}

struct Collector {
    path: ModulePath,
    file: TensorFile,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = HostTensor::from_tensor(param.val());
        let tensor = if self.path.is_transposed() { tensor.transposed() } else { tensor };
        self.file.insert(self.path.name(), tensor);
    }
}

struct Loader {
    path: ModulePath,
    file: TensorFile,
    error: Option<Error>,
}

impl Loader {
    fn load<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Result<Tensor<D>> {
        let name = self.path.name();
        let mut expected = param.lazy_shape().to_vec();
        if self.path.is_transposed() {
            expected.reverse();
        }
        let tensor = self.file.take(&name)?;
        if tensor.shape != expected || tensor.as_floats().is_none() {
            return Err(self.file.wrong(&name, &tensor, &format!("floats of shape {expected:?}")));
        }
        if let Some(at) = tensor.as_floats().and_then(|v| v.iter().position(|x| !x.is_finite())) {
            let place = format!("{}: tensor \"{name}\"", self.file.source.display());
            return Err(Error::input(place, format!("element {at} is not a finite number"))
                .hint("the training that wrote it went wrong; use an earlier checkpoint"));
        }
        let tensor = if self.path.is_transposed() { tensor.transposed() } else { tensor };
        Ok(tensor.into_tensor(&param.lazy_device()).expect("floats of the parameter's shape, as seen above"))
    }
}

impl ModuleMapper for Loader {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.error.is_some() {
            return param;
        }
        match self.load(&param) {
            Ok(tensor) => {
                // Of a parameter not drawn yet this spares the drawing.
                let id = param.id;
                param.transform_for_load(tensor, id)
            }
            Err(error) => {
                self.error = Some(error);
                param
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{LayerNormConfig, Linear, LinearConfig, RmsNorm, RmsNormConfig};
    use burn::tensor::Device;

    #[derive(Module, Debug)]
    struct Net {
        layers: Vec<Linear>,
        norm: RmsNorm,
        last: burn::nn::LayerNorm,
    }

    fn net() -> Net {
        let device = Device::flex();
        Net {
            layers: vec![LinearConfig::new(2, 3).init(&device), LinearConfig::new(3, 2).init(&device)],
            norm: RmsNormConfig::new(2).init(&device),
            last: LayerNormConfig::new(2).init(&device),
        }
    }

    #[test]
    fn a_module_survives_the_way_to_disk_and_back_under_pytorch_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let first = net();
        TensorFile::from_module(&first).write(&path).unwrap();
        let file = TensorFile::read(&path).unwrap();
        assert_eq!(file.get("layers.0.weight").unwrap().shape, [3, 2]);
        assert!(file.get("norm.weight").is_some() && file.get("last.bias").is_some());
        assert!(file.metadata.is_empty());
        let second = file.into_module(net()).unwrap();
        let data = |n: &Net| n.layers[0].weight.val().into_data();
        assert_eq!(data(&first), data(&second));
    }

    #[test]
    fn metadata_survives_the_way_to_disk_and_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("checkpoint.safetensors");
        let mut file = TensorFile::from_module(&net());
        file.metadata.insert("step".into(), "12".into());
        file.write(&path).unwrap();
        assert_eq!(TensorFile::read(&path).unwrap().metadata, file.metadata);
    }

    #[test]
    fn half_precision_keeps_what_it_can_and_reads_from_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("half.safetensors");
        let mut file = TensorFile::new();
        file.insert("x", HostTensor::float([2], vec![1.0 / 3.0, -2.5]));
        file.insert("n", HostTensor::int([1], vec![7]));
        file.write_half(&path).unwrap();
        let read = TensorFile::from_bytes(&std::fs::read(&path).unwrap(), "memory").unwrap();
        let x = read.get("x").unwrap().as_floats().unwrap();
        assert!((x[0] - 1.0 / 3.0).abs() < 2e-4 && x[1] == -2.5);
        assert_eq!(read.get("n").unwrap().as_ints().unwrap(), [7]);
    }

    #[test]
    fn a_section_comes_out_as_it_went_in() {
        let mut file = TensorFile::from_module(&net());
        let before: Vec<String> = file.names().map(str::to_string).collect();
        file.insert_section("best.", TensorFile::from_module(&net()));
        assert_eq!(file.names().count(), 2 * before.len());
        let section = file.take_section("best.");
        assert!(section.names().eq(&before) && file.names().eq(&before));
    }

    #[test]
    fn the_first_difference_is_named() {
        let mut file = TensorFile::from_module(&net());
        file.rename("layers.1.bias", "layers.1.bios");
        let error = file.into_module(net()).unwrap_err().to_string();
        assert!(error.contains("layers.1.bias"), "{error}");

        let mut file = TensorFile::from_module(&net());
        file.insert("norm.weight", HostTensor::float([3], vec![0.0; 3]));
        let error = file.into_module(net()).unwrap_err().to_string();
        assert!(error.contains("norm.weight") && error.contains("[3]") && error.contains("[2]"), "{error}");

        let mut file = TensorFile::from_module(&net());
        file.insert("extra", HostTensor::float([1], vec![0.0]));
        assert!(file.into_module(net()).unwrap_err().to_string().contains("\"extra\""));

        let mut file = TensorFile::from_module(&net());
        file.insert("norm.weight", HostTensor::float([2], vec![0.0, f32::NAN]));
        assert!(file.into_module(net()).unwrap_err().to_string().contains("norm.weight"));
    }

    #[test]
    fn broken_files_are_refused_without_allocating_what_they_claim() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        TensorFile::from_module(&net()).write(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 7, 8, 40, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(TensorFile::read(&path).is_err(), "cut at {cut}");
        }
        let mut lying = whole.clone();
        lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(&path, &lying).unwrap();
        assert!(TensorFile::read(&path).is_err());
    }
}
