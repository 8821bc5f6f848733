//! Finished random starts on disk, so that a fit that was stopped goes on after them.

use std::path::{Path, PathBuf};

use kiln_core::{Error, HostTensor, Result, TensorFile, Values, write_atomic};
use kiln_data::Matrix;
use serde_json::Value;

use super::{Factors, Fit};

/// Where finished starts are kept; nowhere by default.
#[derive(Debug, Clone, Default)]
pub struct Starts {
    folder: Option<PathBuf>,
}

impl Starts {
    /// An empty folder for the starts of a fit that `about` describes.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn begin(folder: &Path, about: &Value) -> Result<Self> {
        let starts = Self { folder: Some(folder.into()) };
        starts.remove()?;
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        write_atomic(&folder.join("about.json"), about.to_string().as_bytes())?;
        Ok(starts)
    }

    /// The starts of a fit that was stopped, which must have been one that `about` describes.
    ///
    /// # Errors
    /// When there is none, or it was of other data or had other settings.
    pub fn resume(folder: &Path, about: &Value) -> Result<Self> {
        let path = folder.join("about.json");
        let text = std::fs::read_to_string(&path).map_err(|e| {
            Error::io("read", &path)(e).hint("only a fit that was stopped goes on; begin one with --out")
        })?;
        let expected = about.to_string();
        if text != expected {
            return Err(Error::input(
                path.display(),
                "the fit that was stopped had other traces or settings",
            )
            .hint("repeat its options, or begin anew with --out"));
        }
        Ok(Self { folder: Some(folder.into()) })
    }

    /// Forgets all starts.
    ///
    /// # Errors
    /// When they cannot be removed.
    pub fn remove(&self) -> Result<()> {
        match &self.folder {
            Some(folder) if folder.exists() => {
                std::fs::remove_dir_all(folder).map_err(Error::io("remove", folder))
            }
            _ => Ok(()),
        }
    }

    /// A finished start, if it is there.
    ///
    /// # Errors
    /// When its file is malformed.
    pub fn get(&self, rank: usize, start: usize) -> Result<Option<Fit>> {
        match self.path(rank, start) {
            Some(path) if path.exists() => read(&path).map(Some),
            _ => Ok(None),
        }
    }

    /// Keeps a finished start.
    ///
    /// # Errors
    /// When its file cannot be written.
    pub fn put(&self, rank: usize, start: usize, fit: &Fit) -> Result<()> {
        match self.path(rank, start) {
            Some(path) => write(fit, &path),
            None => Ok(()),
        }
    }

    fn path(&self, rank: usize, start: usize) -> Option<PathBuf> {
        self.folder.as_ref().map(|folder| folder.join(format!("rank-{rank}-start-{start}.safetensors")))
    }
}

/// Numbers as their 64 bits, as a fit that goes on must not differ from one that was never stopped.
fn exact(shape: impl Into<Vec<usize>>, values: &[f64]) -> HostTensor {
    HostTensor::int(shape.into(), values.iter().map(|v| v.to_bits() as i64).collect())
}

fn write(fit: &Fit, path: &Path) -> Result<()> {
    let mut file = TensorFile::new();
    for (name, matrix) in ["time", "animals", "pairs"].into_iter().zip(fit.factors.modes()) {
        file.insert(name, exact([matrix.rows, matrix.columns], &matrix.values));
    }
    file.insert("weights", exact([fit.factors.rank()], &fit.factors.weights));
    file.insert("errors", exact([fit.errors.len()], &fit.errors));
    file.insert("relative_error", exact([1], &[fit.relative_error]));
    file.insert("converged", HostTensor::int([1], vec![fit.converged.into()]));
    file.write(path)
}

fn read(path: &Path) -> Result<Fit> {
    let mut file = TensorFile::read(path)?;
    let wrong = |name: &str| Error::input(path.display(), format!("\"{name}\" is not what a fit writes"));
    let mut take = |name: &str| -> Result<(Vec<usize>, Vec<f64>)> {
        let tensor = file.take(name)?;
        let Values::Int(bits) = tensor.values else { return Err(wrong(name)) };
        Ok((tensor.shape, bits.iter().map(|&bits| f64::from_bits(bits as u64)).collect()))
    };
    let mut matrix = |name: &str| match take(name)? {
        (shape, values) if shape.len() == 2 => Ok(Matrix::new(shape[0], shape[1], values)),
        _ => Err(wrong(name)),
    };
    let (time, animals, pairs) = (matrix("time")?, matrix("animals")?, matrix("pairs")?);
    let (_, weights) = take("weights")?;
    let (_, errors) = take("errors")?;
    let (_, relative_error) = take("relative_error")?;
    let (_, converged) = take("converged")?;
    let relative_error = relative_error.first().copied().ok_or_else(|| wrong("relative_error"))?;
    let converged = converged.first().is_some_and(|flag| flag.to_bits() != 0);
    Ok(Fit { factors: Factors { time, animals, pairs, weights }, relative_error, errors, converged })
}

#[cfg(test)]
mod tests {
    use kiln_core::Context;
    use serde_json::json;

    use super::*;
    use crate::ntf::NtfConfig;
    use crate::tensor::AffinityTensor;

    #[test]
    fn starts_that_were_kept_are_not_made_again_and_are_the_same_bit_for_bit() {
        let folder = tempfile::tempdir().unwrap();
        let cx = Context::for_tests("");
        let values = (0..10 * 2 * 6).map(|at| ((at * 7919) % 101) as f64 / 101.0).collect();
        let tensor = AffinityTensor::new([10, 2, 6], values, None);
        let config = NtfConfig::new(2).with_inits(2).with_sweeps(5);
        let whole = config.fit_all(&tensor, &Starts::default(), &cx).unwrap();

        let about = json!({ "of": "a test" });
        let starts = Starts::begin(folder.path(), &about).unwrap();
        config.clone().with_inits(1).fit_all(&tensor, &starts, &cx).unwrap();
        let starts = Starts::resume(folder.path(), &about).unwrap();
        let first = starts.get(2, 0).unwrap().unwrap();
        assert!(starts.get(2, 1).unwrap().is_none());
        assert_eq!((&first.factors, &first.errors), (&whole[0].factors, &whole[0].errors));
        let resumed = config.fit_all(&tensor, &starts, &cx).unwrap();
        assert_eq!(resumed[1].factors, whole[1].factors);

        assert!(Starts::resume(folder.path(), &json!({ "of": "another" })).is_err());
        starts.remove().unwrap();
        assert!(!folder.path().exists());
    }
}
