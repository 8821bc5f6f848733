//! Trained cases on disk: `config.json`, `model.safetensors`, and `state.safetensors` to go on from.

use std::path::Path;

use burn::tensor::TensorData;
use kiln_core::{Error, HostTensor, ModelFolder, Result, TensorFile};
use serde::{Deserialize, Serialize};

use crate::case::{Case, Columns, KIND};
use crate::graph::Variable;

const STATE: &str = "state.safetensors";

/// A trained case.
pub struct Model {
    /// The network.
    pub case: Case,
    /// Columns of its table of clicks.
    pub columns: Columns,
    /// Its weights.
    pub weights: TensorFile,
}

#[derive(Serialize, Deserialize)]
struct Config {
    network: Case,
    columns: Columns,
    steps: usize,
}

impl Model {
    /// Reads a model folder.
    ///
    /// # Errors
    /// When a file is missing or malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let folder = ModelFolder::new(path);
        let Config { network, columns, .. } = folder.config(KIND)?;
        network.check().map_err(|found| Error::input(folder.file("config.json").display(), found))?;
        Ok(Self { case: network, columns, weights: folder.weights()? })
    }

    /// Writes the folder.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(
        path: &Path,
        case: &Case,
        columns: &Columns,
        steps: usize,
        variables: &[Variable],
    ) -> Result<()> {
        let folder = ModelFolder::new(path);
        folder.create()?;
        let host = |data: &TensorData| HostTensor::float(data.shape().to_vec(), data.iter::<f32>().collect());
        let (mut weights, mut state) = (TensorFile::new(), TensorFile::new());
        for variable in variables {
            weights.insert(&variable.name, host(&variable.value));
            for (number, kept) in variable.kept.iter().enumerate() {
                state.insert(format!("{}.{number}", variable.name), host(kept));
            }
        }
        state.insert("steps", HostTensor::int([1], vec![steps as i64]));
        folder.save_weights(&weights)?;
        state.write(&folder.file(STATE))?;
        folder.save_config(KIND, &Config { network: case.clone(), columns: columns.clone(), steps })
    }

    /// Gives variables the values and the optimiser's state that were saved.
    ///
    /// # Errors
    /// When a file is missing, or has other tensors.
    pub fn restore(path: &Path, variables: &mut [Variable]) -> Result<usize> {
        let folder = ModelFolder::new(path);
        let mut weights = folder.weights()?;
        let mut state = TensorFile::read(&folder.file(STATE))?;
        let source = folder.file(STATE);
        let steps = state.take("steps")?.as_ints().and_then(|steps| steps.first().copied());
        let steps = steps.and_then(|steps| usize::try_from(steps).ok());
        let steps =
            steps.ok_or_else(|| Error::input(source.display(), "does not say how many steps were made"))?;
        for variable in variables {
            let shape = variable.value.shape().to_vec();
            let read = |tensor: HostTensor, place: &Path, name: &str| match tensor.as_floats() {
                Some(values) if tensor.shape == shape => Ok(TensorData::new(values.to_vec(), shape.clone())),
                _ => Err(Error::input(
                    place.display(),
                    format!("\"{name}\" has the shape {:?}, expected floats {shape:?}", tensor.shape),
                )),
            };
            let name = &variable.name;
            variable.value = read(weights.take(name)?, &folder.file("model.safetensors"), name)?;
            variable.kept.clear();
            for number in 0.. {
                let name = format!("{name}.{number}");
                if state.get(&name).is_none() {
                    break;
                }
                variable.kept.push(read(state.take(&name)?, &source, &name)?);
            }
        }
        Ok(steps)
    }
}
