//! Quantised networks on disk: `config.json`, the operations between units as a graph, and the units with their weights of
//! 16, 8 or 4 bits.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use burn::backend::ir::TensorId;
use kiln_compiler::Graph;
use kiln_core::{Error, HostTensor, ModelFolder, Result, TensorFile, Values, write_atomic};
use kiln_ops::quantised::Ends;
use safetensors::{Dtype, View};
use serde::{Deserialize, Serialize};

use crate::arch::Input;
use crate::checkpoint::KIND;
use crate::program::Program;
use crate::quantise::{Found, QuantConfig, Quantiser, SearchPlan};
use crate::quantiser::{Asymmetric, Symmetric};
use crate::ready::Ready;
use crate::search::Bits;
use crate::unit::{Numbers, Pair, Unit, Weights, Window, Work, half_precision};

const GRAPH: &str = "graph";
const UNITS: &str = "units.json";
const WEIGHTS: &str = "model.safetensors";

/// What `config.json` holds of a quantised network.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Config {
    /// What it reads, where Kiln trained it; a bare tensor otherwise.
    pub input: Option<Input>,
    /// What the classes are called.
    pub classes: Vec<String>,
    /// The value of white in tables of pixels.
    pub white: f64,
    /// Names of the units, or of their tensors, and their bits.
    pub bits: Vec<(String, u8)>,
    /// How it was quantised otherwise.
    pub rounding: QuantConfig,
    /// How the search was done.
    pub search: SearchPlan,
    /// The metric of the network as it was, on the validation set.
    pub baseline: f64,
    /// What had to be reached; nothing within a budget of bytes.
    pub target: Option<f64>,
    /// The quantised network's metric, computed in whole numbers.
    pub metric: f64,
}

/// A unit without its weights.
#[derive(Serialize, Deserialize)]
struct Kept {
    name: String,
    work: String,
    window: Option<[[usize; 2]; 5]>,
    groups: usize,
    input: u64,
    second: Option<u64>,
    output: u64,
    shape: Vec<usize>,
    least: Option<f32>,
    most: Option<f32>,
    tops: Vec<f32>,
    multiplications: usize,
    elements: usize,
    bits: Pair,
    /// Scales in each row of the weights.
    scales: usize,
    input_rounding: Option<Asymmetric>,
    second_rounding: Option<Symmetric>,
}

/// What `units.json` holds.
#[derive(Serialize, Deserialize)]
struct Document {
    units: Vec<Kept>,
    /// For every step the unit that runs, or nothing for the next operation of the graph.
    steps: Vec<Option<usize>>,
}

/// A tensor as it is written.
struct Stored {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl View for Stored {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

impl Stored {
    fn floats(values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        Self { dtype: Dtype::F32, shape: vec![values.len()], bytes }
    }

    fn halves(values: &[f32], shape: &[usize]) -> Self {
        // Of a number that sixteen bits hold exactly, these are the upper bits of the float, moved.
        let bytes =
            half_precision(values).iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
        Self { dtype: Dtype::F16, shape: shape.to_vec(), bytes }
    }
}

/// Writes a quantised network.
///
/// # Errors
/// When a file cannot be written.
pub fn save(folder: &ModelFolder, quantiser: &Quantiser, bits: &Bits, config: &Config) -> Result<()> {
    folder.create()?;
    let (graph, steps) = quantiser.program.skeleton();
    graph.save(&folder.file(GRAPH))?;
    let mut tensors: Vec<(String, Stored)> = Vec::new();
    let mut units = Vec::new();
    for (at, (unit, pair)) in quantiser.program.units.iter().zip(quantiser.pairs(bits)).enumerate() {
        let name = &unit.name;
        let numbers = quantiser.numbers(at, pair);
        if !unit.weight.is_empty() {
            match &numbers.weights {
                None => tensors.push((format!("{name}.weight"), Stored::halves(&unit.weight, &unit.shape))),
                Some(weights) => {
                    let (dtype, bytes) =
                        (if weights.bits == 4 { Dtype::U8 } else { Dtype::I8 }, weights.stored());
                    let shape = vec![unit.shape[0], bytes.len() / unit.shape[0].max(1)];
                    tensors.push((format!("{name}.q"), Stored { dtype, shape, bytes }));
                    tensors.push((format!("{name}.scale"), Stored::floats(&weights.scales)));
                }
            }
        }
        if !unit.bias.is_empty() && !unit.weight.is_empty() {
            tensors.push((format!("{name}.bias"), Stored::floats(&numbers.bias(unit))));
        }
        units.push(Kept::of(unit, pair, &numbers));
    }
    let bytes = safetensors::serialize(tensors, None)
        .map_err(|e| Error::work("cannot lay out the quantised weights").caused_by(e))?;
    write_atomic(&folder.file(WEIGHTS), &bytes)?;
    let json = serde_json::to_vec_pretty(&Document { units, steps })
        .map_err(|e| Error::work("cannot write the units as JSON").caused_by(e))?;
    write_atomic(&folder.file(UNITS), &json)?;
    folder.save_config(KIND, config)
}

/// Bytes of the weights' file.
pub fn weight_bytes(folder: &ModelFolder) -> u64 {
    [folder.file(WEIGHTS), folder.file(GRAPH).join("constants.safetensors")]
        .iter()
        .filter_map(|path| std::fs::metadata(path).ok())
        .map(|metadata| metadata.len())
        .sum()
}

/// A quantised network, ready to run.
#[derive(Debug, Clone)]
pub struct Quantised {
    /// What it is.
    pub config: Config,
    /// Its units and operations.
    pub program: Program,
    /// Bits of every unit's weights and input.
    pub pairs: Vec<Pair>,
    /// Its weights; bytes pass between units where they can.
    pub ready: Vec<Ready>,
    /// How every unit is rounded.
    pub numbers: Vec<Numbers>,
}

/// Whether a folder holds a quantised network.
pub fn is_quantised(path: &Path) -> bool {
    path.join(UNITS).exists()
}

impl Quantised {
    /// Its weights with floats between all units.
    pub fn apart(&self) -> Vec<Ready> {
        self.ready.iter().cloned().map(Ready::apart).collect()
    }

    /// Reads a folder that [`save`] wrote.
    ///
    /// # Errors
    /// When a file is missing or damaged; names what is wrong.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = ModelFolder::new(path);
        if folder.kind()? == KIND && !is_quantised(path) {
            return Err(Error::input(path.display(), "holds a network that is not quantised")
                .hint("`kiln ptq quantize` makes a quantised one of it"));
        }
        let config: Config = folder.config(KIND)?;
        let file = folder.file(UNITS);
        let text = std::fs::read(&file).map_err(Error::io("read", &file))?;
        let document: Document = serde_json::from_slice(&text).map_err(|e| {
            Error::input(file.display(), "does not describe the units of a network").caused_by(e)
        })?;
        let graph = Graph::load(&folder.file(GRAPH))?;
        let mut tensors = TensorFile::read(&folder.file(WEIGHTS))?;
        let wrong =
            |name: &str, found: &str| Error::input(file.display(), format!("unit \"{name}\" {found}"));
        let (mut units, mut ready, mut all, mut pairs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for kept in document.units {
            let (name, pair, scales) = (kept.name.clone(), kept.bits, kept.scales);
            if [pair.weight, pair.input].iter().any(|bits| !matches!(bits, 16 | 8 | 4)) {
                let found = format!("has {} and {} bits, must have 16, 8 or 4", pair.weight, pair.input);
                return Err(wrong(&name, &found));
            }
            let (input, second) = (kept.input_rounding, kept.second_rounding);
            let product = kept.work == "product";
            if kept.second.is_some() != product
                || second.is_some() != (product && pair.weight != 16)
                || input.is_some() != (kept.work != "table" && pair.input != 16)
            {
                return Err(wrong(&name, "does not say for each operand whether it is rounded, and how"));
            }
            let mut unit =
                kept.into_unit().ok_or_else(|| wrong(&name, "is of a kind that Kiln does not know"))?;
            let (rows, count) = (unit.shape[0], unit.shape.iter().product::<usize>());
            let mut numbers = Numbers { input, second, ..Numbers::default() };
            if unit.work != Work::Product {
                if pair.weight == 16 {
                    unit.weight = floats(&mut tensors, &format!("{name}.weight"), count)?;
                } else {
                    let width = count / rows;
                    let grouped =
                        scales > 1 && (unit.work != Work::Linear || pair.weight != 4 || pair.input != 16);
                    if scales == 0 || grouped || !width.is_multiple_of(scales) {
                        return Err(wrong(&name, &format!("cannot have {scales} scales a row")));
                    }
                    let values = floats(&mut tensors, &format!("{name}.scale"), rows * scales)?;
                    let q = tensors.take(&format!("{name}.q"))?;
                    let Values::Int(q) = q.values else {
                        return Err(wrong(&name, "has weights that are floats"));
                    };
                    let bytes: Vec<u8> = q.iter().map(|&q| q as u8).collect();
                    let weights = Weights::from_stored(pair.weight, &bytes, values, width / scales)
                        .ok_or_else(|| wrong(&name, "has another number of weights than its shape says"))?;
                    unit.weight = weights.values();
                    numbers.weights = Some(Arc::new(weights));
                }
                if unit.work != Work::Table {
                    unit.bias = floats(&mut tensors, &format!("{name}.bias"), rows)?;
                }
            }
            ready.push(match numbers.is_float() {
                true => Ready::float(&unit),
                false => Ready::whole(&unit, &numbers),
            });
            all.push(numbers);
            pairs.push(pair);
            units.push(unit);
        }
        let program = Program::assemble(graph, units, &document.steps)
            .ok_or_else(|| Error::input(file.display(), "its steps do not fit the units and the graph"))?;
        let ready = program.fused(ready);
        Ok(Self { config, program, pairs, ready, numbers: all })
    }

    /// As many examples at once as the network allows, up to `most`.
    pub fn batched(&self, most: usize) -> Program {
        self.program.with_batch(most.max(1), &self.ready).unwrap_or_else(|| self.program.clone())
    }
}

fn floats(tensors: &mut TensorFile, name: &str, count: usize) -> Result<Vec<f32>> {
    let source = tensors.source().display().to_string();
    let HostTensor { values, .. } = tensors.take(name)?;
    match values {
        Values::Float(values) if values.len() == count && values.iter().all(|x| x.is_finite()) => Ok(values),
        Values::Float(values) if values.len() == count => {
            Err(Error::input(source, format!("\"{name}\" has a number that is not finite")))
        }
        Values::Float(values) => {
            Err(Error::input(source, format!("\"{name}\" has {} numbers, must have {count}", values.len())))
        }
        Values::Int(_) => {
            Err(Error::input(source, format!("\"{name}\" holds whole numbers, must hold floats")))
        }
    }
}

impl Kept {
    fn of(unit: &Unit, bits: Pair, numbers: &Numbers) -> Self {
        let (work, window) = match unit.work {
            Work::Conv(window) => ("conv", Some(window)),
            Work::Linear => ("linear", None),
            Work::Product => ("product", None),
            Work::Table => ("table", None),
        };
        Self {
            name: unit.name.clone(),
            work: work.into(),
            groups: window.map_or(1, |window| window.groups),
            window: window.map(|w| [w.kernel, w.stride, w.padding, w.dilation, w.image]),
            input: unit.input.value(),
            second: unit.second.map(|id| id.value()),
            output: unit.output.value(),
            shape: unit.shape.clone(),
            least: Some(unit.ends.least).filter(|x| x.is_finite()),
            most: Some(unit.ends.most).filter(|x| x.is_finite()),
            tops: unit.tops.clone(),
            multiplications: unit.multiplications,
            elements: unit.elements,
            bits,
            scales: numbers.weights.as_ref().map_or(1, |w| w.scales.len() / unit.rows().max(1)),
            input_rounding: numbers.input,
            second_rounding: numbers.second,
        }
    }

    /// The unit, still without weights; `None` where the numbers make no sense.
    fn into_unit(self) -> Option<Unit> {
        const MOST: usize = 1 << 31;
        let numbers = self.shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m).filter(|&n| n <= MOST))?;
        if numbers == 0 {
            return None;
        }
        let scales = self.input_rounding.iter().map(|q| (q.scale, q.bits, self.bits.input));
        let scales = scales.chain(self.second_rounding.iter().map(|q| (q.scale, q.bits, self.bits.weight)));
        let sound = |(scale, bits, wanted): (f64, u32, u8)| {
            scale.is_finite() && scale as f32 > 0.0 && bits == u32::from(wanted)
        };
        let capped = self.tops.is_empty() || self.tops.len() == self.shape[0];
        if !scales.into_iter().all(sound) || !capped || self.tops.iter().any(|top| !top.is_finite()) {
            return None;
        }
        let work = match (&self.work[..], self.window, self.shape.len()) {
            ("linear", None, 2) => Work::Linear,
            ("product", None, 2) => Work::Product,
            ("table", None, 2) => Work::Table,
            ("conv", Some([kernel, stride, padding, dilation, image]), 4) => {
                let positive = [kernel, stride, dilation, image].concat().iter().all(|&n| n > 0 && n < MOST);
                let fits = kernel == [self.shape[2], self.shape[3]]
                    && padding.iter().all(|&side| side < 1 << 16)
                    && self.groups > 0
                    && self.shape[0].is_multiple_of(self.groups);
                if !positive || !fits {
                    return None;
                }
                Work::Conv(Window { kernel, stride, padding, dilation, groups: self.groups, image })
            }
            _ => return None,
        };
        Some(Unit {
            name: self.name,
            work,
            input: TensorId::new(self.input),
            second: self.second.map(TensorId::new),
            output: TensorId::new(self.output),
            shape: self.shape,
            weight: Vec::new(),
            bias: Vec::new(),
            ends: Ends {
                least: self.least.unwrap_or(f32::NEG_INFINITY),
                most: self.most.unwrap_or(f32::INFINITY),
            },
            tops: self.tops,
            multiplications: self.multiplications,
            elements: self.elements,
        })
    }
}

/// The configuration of a network that a search has quantised.
pub fn config(
    quantiser: &Quantiser,
    found: &Found,
    plan: &SearchPlan,
    metric: f64,
    (input, classes, white): (Option<Input>, Vec<String>, f64),
) -> Config {
    let names = quantiser.parts.iter().map(|part| part.name.clone());
    Config {
        input,
        classes,
        white,
        bits: names.zip(found.bits.iter().copied()).collect(),
        rounding: quantiser.config(),
        search: plan.clone(),
        baseline: found.baseline,
        target: found.target,
        metric,
    }
}
