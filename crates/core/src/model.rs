//! A trained model on disk: a folder with `config.json` and `model.safetensors`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result, TensorFile};

/// Writes a whole file or nothing: into a temporary name beside it, then renamed.
///
/// # Errors
/// When the folder is missing or not writable, or the disk is full; `path` is then as it was.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_by(path, |file| fs::write(file, bytes).map_err(Error::io("write", path)))
}

/// The same, where `write` fills the file that will be at `path`.
pub(crate) fn write_atomic_by(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let file = tempfile::Builder::new()
        .prefix(".kiln-")
        .tempfile_in(folder)
        .map_err(Error::io("write into", folder))?;
    write(file.path())?;
    file.as_file().sync_all().map_err(Error::io("write", path))?;
    set_default_permissions(file.as_file()).map_err(Error::io("write", path))?;
    file.persist(path).map_err(|e| Error::io("write", path)(e.error))?;
    Ok(())
}

/// Temporary files are private to their owner; what stays should look like any other file.
#[cfg(unix)]
fn set_default_permissions(file: &fs::File) -> std::io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    file.set_permissions(fs::Permissions::from_mode(0o644))
}

#[cfg(not(unix))]
fn set_default_permissions(_: &fs::File) -> std::io::Result<()> {
    Ok(())
}

/// The folder of a trained model.
///
/// `config.json` holds `"kind": "<slug>"` and everything needed to rebuild the network;
/// `model.safetensors` (or the shards that `model.safetensors.index.json` lists) holds its parameters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelFolder {
    path: PathBuf,
}

impl ModelFolder {
    /// The folder at `path`, which need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A file inside.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Makes the folder if it is not there.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn create(&self) -> Result<()> {
        fs::create_dir_all(&self.path).map_err(Error::io("create", &self.path))
    }

    /// Reads `config.json` as a JSON object.
    ///
    /// # Errors
    /// When it is missing or not a JSON object.
    pub fn config_value(&self) -> Result<Value> {
        let path = self.file("config.json");
        let text = fs::read_to_string(&path).map_err(|e| {
            Error::io("read", &path)(e).hint("a model folder holds config.json and model.safetensors")
        })?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| Error::input(path.display(), "is not valid JSON").caused_by(e))?;
        if !value.is_object() {
            return Err(Error::input(path.display(), "is not a JSON object"));
        }
        Ok(value)
    }

    /// The slug of the system that wrote the folder, from `"kind"`.
    ///
    /// # Errors
    /// When `config.json` cannot be read or names no kind.
    pub fn kind(&self) -> Result<String> {
        let config = self.config_value()?;
        config.get("kind").and_then(Value::as_str).map(str::to_string).ok_or_else(|| {
            Error::input(self.file("config.json").display(), "has no \"kind\"")
                .hint("was this folder written by Kiln?")
        })
    }

    /// Reads `config.json` into a typed configuration after checking its kind.
    ///
    /// # Errors
    /// When the file is missing, of another kind, or lacks a field.
    pub fn config<C: DeserializeOwned>(&self, kind: &str) -> Result<C> {
        let path = self.file("config.json");
        let found = self.kind()?;
        if found != kind {
            return Err(Error::input(
                path.display(),
                format!("is a model of kind \"{found}\", not \"{kind}\""),
            )
            .hint(format!("use it with `kiln {found}`")));
        }
        serde_json::from_value(self.config_value()?)
            .map_err(|e| Error::input(path.display(), "does not describe such a model").caused_by(e))
    }

    /// Writes `config.json` with `"kind"` first.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_config<C: Serialize>(&self, kind: &str, config: &C) -> Result<()> {
        let json = |e: serde_json::Error| Error::work("cannot write the configuration as JSON").caused_by(e);
        let mut object = serde_json::Map::new();
        object.insert("kind".into(), kind.into());
        if let Value::Object(fields) = serde_json::to_value(config).map_err(json)? {
            object.extend(fields);
        }
        write_atomic(&self.file("config.json"), &serde_json::to_vec_pretty(&object).map_err(json)?)
    }

    /// Reads all parameters, from one file or from shards.
    ///
    /// # Errors
    /// When a file is missing, truncated or not in the safetensors format.
    pub fn weights(&self) -> Result<TensorFile> {
        let index = self.file("model.safetensors.index.json");
        let single = self.file("model.safetensors");
        if single.exists() || !index.exists() {
            return TensorFile::read(&single);
        }
        TensorFile::read_shards(&index)
    }

    /// Writes `model.safetensors`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save_weights(&self, weights: &TensorFile) -> Result<()> {
        weights.write(&self.file("model.safetensors"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Serialize, Deserialize)]
    struct Config {
        width: usize,
    }

    #[test]
    fn config_round_trips_and_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = ModelFolder::new(dir.path());
        folder.save_config("gla", &Config { width: 3 }).unwrap();
        assert_eq!(folder.config::<Config>("gla").unwrap().width, 3);
        let error = folder.config::<Config>("tcnca").unwrap_err().to_string();
        assert!(error.contains("kind \"gla\""), "{error}");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("missing/config.json");
        assert!(write_atomic(&path, b"{}").is_err());
        assert!(!path.exists());
    }
}
