//! Networks of any system, and graphs from elsewhere, as something to train: the graph, which of its constants are weights, a
//! loss behind one of its outputs, and where the trained weights go.

mod loss;
mod rows;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use burn::backend::ir::{OperationIr, TensorId};
use burn::tensor::{Device, DispatchTensor, TensorData};
use kiln_compiler::{Boundary, Graph, GraphPass, capture, catch_panic};
use kiln_core::{
    Context, Error, HostTensor, ModelFolder, Network, Port, PortKind, Result, TensorFile, random_stream,
};

use crate::graph::{Variable, read_tensors};

pub use loss::Loss;
pub use rows::Rows;
pub(crate) use weights::Weight;
use weights::{distinct, match_weights, merge};

/// What the optimiser keeps, and how many steps were made: beside the trained weights.
const STATE: &str = "oneflow.safetensors";

/// A network with its weights by name.
pub struct Trainee {
    /// What it computes, for a batch.
    pub graph: Graph,
    /// The constants that are trained.
    pub(crate) weights: Vec<Weight>,
    /// Where it was read from.
    home: Home,
}

enum Home {
    /// A module in memory, with its tensors.
    Module(TensorFile),
    /// A folder of `graph.json`.
    Graph,
    /// A model folder of any system, with the tensors of its weights' file.
    Model(PathBuf, TensorFile),
}

impl Trainee {
    /// A graph folder. Weights are its constants of more than one float, except statistics of batch norm and what masks
    /// attention; they are called by their numbers, `%7`.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn from_graph(folder: &Path) -> Result<Self> {
        let graph = Graph::load(folder)?;
        let weights = weights::of_graph(&graph);
        Ok(Self { graph, weights, home: Home::Graph })
    }

    /// A model folder of any system, captured for `batch` examples. Weights are those constants that the folder's file of
    /// weights holds, under the names that they have there.
    ///
    /// # Errors
    /// When the folder is of no known system or damaged, or its network takes no batch of this size.
    pub fn from_model(folder: &Path, batch: usize, cx: &Context) -> Result<Self> {
        let graph = captured(folder, batch, cx)?;
        let file = ModelFolder::new(folder).weights()?;
        let trace = |traced: TensorFile| {
            let copy = tempfile::tempdir().map_err(|e| Error::work("no temporary folder").caused_by(e))?;
            copy_model(folder, copy.path())?;
            ModelFolder::new(copy.path()).save_weights(&traced)?;
            captured(copy.path(), batch, cx)
        };
        let (graph, weights) = named_weights(graph, &file, trace)?;
        Ok(Self { graph, weights, home: Home::Model(folder.to_path_buf(), file) })
    }

    /// A graph in memory, with a file of its weights.
    pub(crate) fn from_module(graph: Graph, weights: Vec<Weight>, file: TensorFile) -> Self {
        Self { graph, weights, home: Home::Module(file) }
    }

    /// How many examples the graph takes at once.
    ///
    /// # Errors
    /// When its inputs have no first axis of one length.
    pub fn batch(&self) -> Result<usize> {
        let firsts: BTreeSet<Option<usize>> =
            self.graph.inputs.iter().map(|input| input.port.shape.first().copied()).collect();
        match (firsts.len(), firsts.first()) {
            (1, Some(Some(batch))) => Ok(*batch),
            _ => {
                Err(Error::usage("the graph's inputs do not have one number of examples as their first axis"))
            }
        }
    }

    /// The output of a name, or the first.
    ///
    /// # Errors
    /// When there is none of the name.
    pub fn output(&self, name: Option<&str>) -> Result<usize> {
        let Some(name) = name else { return Ok(0) };
        let names: Vec<&str> = self.graph.outputs.iter().map(|output| output.port.name.as_str()).collect();
        names.iter().position(|known| *known == name).ok_or_else(|| {
            Error::usage(format!("the network has no output \"{name}\""))
                .hint(format!("it has: {}", names.join(", ")))
        })
    }

    /// Leaves weights as they are whose names begin so.
    ///
    /// # Errors
    /// When no weight's name does, or none is left.
    pub fn freeze(&mut self, beginnings: &[String]) -> Result<()> {
        // Numbers are whole names: %1 is not %12.
        let is_meant = |weight: &Weight, beginning: &String| {
            weight.name == *beginning || (!beginning.starts_with('%') && weight.name.starts_with(beginning))
        };
        for beginning in beginnings {
            if !self.weights.iter().any(|weight| is_meant(weight, beginning)) {
                let names: Vec<&str> = self.weights.iter().map(|weight| weight.name.as_str()).collect();
                return Err(Error::usage(format!("no weight's name begins with \"{beginning}\""))
                    .hint(format!("there are: {}", names.join(", "))));
            }
        }
        self.weights.retain(|weight| !beginnings.iter().any(|beginning| is_meant(weight, beginning)));
        if self.weights.is_empty() {
            return Err(Error::usage("nothing is left to train").hint("leave out some --freeze"));
        }
        Ok(())
    }

    /// The graph of a loss behind an output, whose weights are inputs, and what these hold.
    ///
    /// # Errors
    /// When the loss does not fit the output, or depends on no weight.
    pub fn objective(&self, output: usize, loss: Loss) -> Result<(Graph, BTreeMap<String, TensorData>)> {
        let mut graph = loss.behind(&self.graph, output)?;
        graph.operations.retain(|operation| !matches!(operation, OperationIr::Drop(_)));
        let mut values = BTreeMap::new();
        for weight in &self.weights {
            let Some(value) = graph.constants.remove(&weight.constant) else { continue };
            let port =
                Port { name: weight.name.clone(), kind: PortKind::Float, shape: value.shape().to_vec() };
            graph.inputs.push(Boundary { port, tensor: weight.constant });
            values.insert(weight.name.clone(), value);
        }
        for pass in GraphPass::ALL {
            pass.apply(&mut graph)?;
        }
        // What the loss does not depend on is not trained.
        let read = read_tensors(&graph);
        let is_read =
            |input: &Boundary| read.contains(&input.tensor) || !values.contains_key(&input.port.name);
        graph.inputs.retain(is_read);
        values.retain(|name, _| graph.inputs.iter().any(|input| input.port.name == *name));
        if values.is_empty() {
            return Err(Error::usage("the loss depends on no weight that is trained"));
        }
        Ok((graph, values))
    }

    /// Takes over trained weights.
    pub fn set(&mut self, variables: &[Variable]) {
        let of_name: BTreeMap<&String, &Variable> =
            variables.iter().map(|variable| (&variable.name, variable)).collect();
        for weight in &self.weights {
            if let Some(variable) = of_name.get(&weight.name) {
                self.graph.constants.insert(weight.constant, variable.value.clone());
            }
        }
    }

    /// The weights under the names and in the layout of the file that they were read from; of a graph, by their numbers.
    pub fn file(&self) -> TensorFile {
        let mut file = match &self.home {
            Home::Module(file) | Home::Model(_, file) => file.clone(),
            Home::Graph => TensorFile::new(),
        };
        for weight in &self.weights {
            if let Some(value) = self.graph.constants.get(&weight.constant) {
                weight.write(value, &mut file);
            }
        }
        file
    }

    /// Writes the trained network as it was read: a graph as a graph folder, a model as a folder of its own system.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, out: &Path, steps: usize, variables: &[Variable]) -> Result<()> {
        fs::create_dir_all(out).map_err(Error::io("create", out))?;
        let mut state = TensorFile::new();
        for variable in variables {
            for (number, kept) in variable.kept.iter().enumerate() {
                state.insert(format!("{}.{number}", variable.name), host(kept));
            }
        }
        state.insert("steps", HostTensor::int([1], vec![steps as i64]));
        match &self.home {
            Home::Graph => self.graph.save(out)?,
            Home::Module(_) => ModelFolder::new(out).save_weights(&self.file())?,
            Home::Model(from, _) => {
                if from.canonicalize().ok() != out.canonicalize().ok() {
                    copy_model(from, out)?;
                }
                ModelFolder::new(out).save_weights(&self.file())?;
            }
        }
        state.write(&out.join(STATE))
    }

    /// Gives the variables of a folder that [`save`](Self::save) wrote what the optimiser kept of them; how many steps
    /// were made.
    ///
    /// # Errors
    /// When the file is missing, or has other tensors.
    pub fn restore(folder: &Path, variables: &mut [Variable]) -> Result<usize> {
        let path = folder.join(STATE);
        let mut state = TensorFile::read(&path)?;
        for variable in variables {
            let shape = variable.value.shape().to_vec();
            variable.kept.clear();
            for number in 0.. {
                let name = format!("{}.{number}", variable.name);
                if state.get(&name).is_none() {
                    break;
                }
                let kept = state.take(&name)?;
                let Some(values) = kept.as_floats().filter(|_| kept.shape == shape) else {
                    let found =
                        format!("\"{name}\" has the shape {:?}, expected floats {shape:?}", kept.shape);
                    return Err(Error::input(path.display(), found));
                };
                variable.kept.push(TensorData::new(values.to_vec(), shape.clone()));
            }
        }
        let steps = state.take("steps")?.as_ints().and_then(|steps| steps.first().copied());
        let steps = steps.and_then(|steps| usize::try_from(steps).ok());
        steps.ok_or_else(|| Error::input(path.display(), "does not say how many steps were made"))
    }
}

/// The weights of a graph by the names that they have in a file. Tensors that hold the same numbers, such as biases of zeros,
/// are told apart by other numbers in their places, for which `trace` captures the graph once more.
pub(crate) fn named_weights(
    mut graph: Graph,
    file: &TensorFile,
    trace: impl FnOnce(TensorFile) -> Result<Graph>,
) -> Result<(Graph, Vec<Weight>)> {
    let mut matched = match_weights(&graph, file);
    if !matched.alike.is_empty() {
        let traced = distinct(file, &matched.alike);
        let found = trace(traced.clone())?;
        if found.operations != graph.operations {
            return Err(Error::work("the network computes otherwise with other weights")
                .hint("export it with `kiln export`, and train the graph"));
        }
        matched = match_weights(&found, &traced);
    }
    if let Some(name) = matched.both_ways.first() {
        return Err(Error::work(format!(
            "the network reads \"{name}\" as it is and with rows and columns exchanged, which cannot be trained"
        )));
    }
    if matched.weights.is_empty() {
        return Err(Error::work("no weight of the network's file is a constant of its graph")
            .hint("export it with `kiln export`, and train the graph"));
    }
    merge(&mut graph, &matched.repeated);
    Ok((graph, matched.weights))
}

/// Whether [`Trainee::save`] wrote a folder.
pub fn is_trained(folder: &Path) -> bool {
    folder.join(STATE).exists()
}

fn host(data: &TensorData) -> HostTensor {
    HostTensor::float(data.shape().to_vec(), data.iter::<f32>().collect())
}

/// Copies the files of a model but for its weights and what this module writes.
fn copy_model(from: &Path, to: &Path) -> Result<()> {
    let entries = fs::read_dir(from).map_err(Error::io("read", from))?;
    for entry in entries {
        let entry = entry.map_err(Error::io("read", from))?;
        let (path, name) = (entry.path(), entry.file_name());
        let text = name.to_string_lossy();
        let is_weights = text == "model.safetensors"
            || text == "model.safetensors.index.json"
            || (text.starts_with("model-") && text.ends_with(".safetensors"));
        let is_ours = [STATE, "log.csv", "loss.svg", "trace.svg", "trace.json"].contains(&text.as_ref());
        if path.is_file() && !is_weights && !is_ours {
            fs::copy(&path, to.join(&name)).map_err(Error::io("copy", &path))?;
        }
    }
    Ok(())
}

/// The graph of a model's network for a batch of examples.
fn captured(folder: &Path, batch: usize, cx: &Context) -> Result<Graph> {
    for_batch(cx.network(folder)?, batch)
}

/// The graph of a network for a batch of examples, where its ports' first axis counts these.
pub(crate) fn for_batch(network: Box<dyn Network>, batch: usize) -> Result<Graph> {
    let kind = network.kind().to_string();
    let example = network.inputs().first().and_then(|port| port.shape.first().copied());
    let resized = |mut ports: Vec<Port>| {
        for port in &mut ports {
            if let Some(first) = port.shape.first_mut().filter(|first| Some(**first) == example) {
                *first = batch;
            }
        }
        ports
    };
    let (inputs, outputs) = (resized(network.inputs()), resized(network.outputs()));
    let refused = |found: String| {
        let takes = example.map_or_else(|| "no batch".into(), |example| format!("--batch {example}"));
        Error::usage(format!("the {kind} network does not take {batch} examples at once: {found}"))
            .hint(format!("it takes {takes}"))
    };
    let network = Box::new(Batched { network, inputs, outputs });
    let mut graph = catch_panic(std::panic::AssertUnwindSafe(|| capture(network))).map_err(&refused)??;
    // What the network declares is an example; what was recorded is so.
    let shapes: BTreeMap<TensorId, Vec<usize>> = graph
        .operations
        .iter()
        .flat_map(|operation| operation.outputs().map(|tensor| (tensor.id, tensor.shape.to_vec())))
        .collect();
    for output in &mut graph.outputs {
        let declared = output.port.shape.first().copied();
        if let Some(shape) = shapes.get(&output.tensor) {
            if declared == Some(batch) && shape.first().is_none_or(|rows| !rows.is_multiple_of(batch)) {
                let found = format!("its output \"{}\" has the shape {shape:?} then", output.port.name);
                return Err(refused(found));
            }
            output.port.shape.clone_from(shape);
        }
    }
    Ok(graph)
}

/// A network whose ports have another number of examples.
struct Batched {
    network: Box<dyn Network>,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
}

impl Network for Batched {
    fn kind(&self) -> &str {
        self.network.kind()
    }

    fn inputs(&self) -> Vec<Port> {
        self.inputs.clone()
    }

    fn outputs(&self) -> Vec<Port> {
        self.outputs.clone()
    }

    fn move_to(&mut self, device: &Device) {
        self.network.move_to(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        self.network.forward(inputs)
    }
}

/// Numbers that no other tensor holds.
fn fresh_values(count: usize, number: u64) -> Vec<f32> {
    use rand::RngExt;
    let mut rng = random_stream(0, "told apart", number);
    (0..count).map(|_| rng.random_range(0.5f32..1.5)).collect()
}
