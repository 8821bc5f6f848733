//! `checkpoint.safetensors`: everything needed to go on with a run, in one file that is replaced as a
//! whole, so that a run killed at any moment leaves a consistent one.

use std::fmt::Display;
use std::str::FromStr;

use burn::module::Module;
use kiln_core::{Error, ModelFolder, Result, TensorFile};
use serde_json::{Map, Value};

use crate::train::Optimiser;

/// The file in the folder of a run.
pub(crate) const FILE_NAME: &str = "checkpoint.safetensors";

const MODEL_PREFIX: &str = "model.";
const BEST_PREFIX: &str = "best.";

/// Settings that a resumed run may change, because they do not reach into the steps already done.
const FREE_SETTINGS: [&str; 3] = ["steps", "checkpoint_every", "patience"];

/// How far a run has come.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Position {
    /// Steps done.
    pub step: usize,
    /// Tokens or samples seen.
    pub tokens: usize,
    /// Seconds spent.
    pub seconds: f64,
    /// Lowest validation loss and the step after which it was measured.
    pub best: Option<(f64, usize)>,
    /// Evaluations since then.
    pub stale: usize,
}

impl Position {
    fn write(&self, file: &mut TensorFile) {
        let mut put = |key: &str, value: &dyn Display| file.metadata.insert(key.into(), value.to_string());
        put("step", &self.step);
        put("tokens", &self.tokens);
        put("seconds", &self.seconds);
        put("evaluations_since_best", &self.stale);
        if let Some((loss, step)) = &self.best {
            put("best_loss", loss);
            put("best_step", step);
        }
    }

    fn read(file: &TensorFile) -> Result<Self> {
        let has_best = file.metadata.contains_key("best_loss");
        Ok(Self {
            step: field(file, "step")?,
            tokens: field(file, "tokens")?,
            seconds: field(file, "seconds")?,
            stale: field(file, "evaluations_since_best")?,
            best: if has_best { Some((field(file, "best_loss")?, field(file, "best_step")?)) } else { None },
        })
    }
}

/// A number from the checkpoint's header. Numbers are kept as text of their own, not inside JSON, because
/// they must come back to the last bit.
fn field<T: FromStr>(file: &TensorFile, key: &str) -> Result<T> {
    file.metadata.get(key).and_then(|text| text.parse().ok()).ok_or_else(|| {
        Error::input(file.source().display(), format!("has no valid \"{key}\" in its header"))
            .hint("is it a checkpoint that Kiln wrote?")
    })
}

/// What a checkpoint restores: the modules are without autodiff.
pub(crate) struct Restored<M> {
    pub model: M,
    pub best: Option<M>,
    pub optimiser: Optimiser,
    pub position: Position,
}

/// Replaces the checkpoint in `folder`.
pub(crate) fn save<M: Module>(
    folder: &ModelFolder,
    model: &M,
    best: Option<&M>,
    optimiser: &Optimiser,
    position: &Position,
    settings: &Map<String, Value>,
) -> Result<()> {
    let mut file = TensorFile::new();
    file.insert_section(MODEL_PREFIX, TensorFile::from_module(model));
    if let Some(best) = best {
        file.insert_section(BEST_PREFIX, TensorFile::from_module(best));
    }
    optimiser.export(model, &mut file);
    position.write(&mut file);
    let settings = serde_json::to_string(settings)
        .map_err(|e| Error::work("cannot write the settings as JSON").caused_by(e))?;
    file.metadata.insert("settings".into(), settings);
    file.write(&folder.file(FILE_NAME))
}

/// Reads the checkpoint in `folder` into modules like `model`, after making sure that it was written
/// with the same `settings`.
pub(crate) fn load<M: Module>(
    folder: &ModelFolder,
    model: &M,
    mut optimiser: Optimiser,
    settings: &Map<String, Value>,
) -> Result<Restored<M>> {
    let path = folder.file(FILE_NAME);
    if !path.exists() {
        return Err(Error::input(folder.path().display(), "holds no run to resume")
            .hint(format!("{} is missing; train without --resume", FILE_NAME)));
    }
    let mut file = TensorFile::read(&path)?;
    let position = Position::read(&file)?;
    let written: Map<String, Value> = file
        .metadata
        .get("settings")
        .and_then(|text| serde_json::from_str(text).ok())
        .ok_or_else(|| Error::input(path.display(), "has no valid \"settings\" in its header"))?;
    check_settings(&written, settings, &position)?;
    optimiser.import(model, &mut file, position.step)?;
    let best =
        position.best.map(|_| file.take_section(BEST_PREFIX).into_module(model.valid())).transpose()?;
    let model = file.take_section(MODEL_PREFIX).into_module(model.valid())?;
    Ok(Restored { model, best, optimiser, position })
}

/// Names the first setting that differs and would change what the run computes.
fn check_settings(written: &Map<String, Value>, now: &Map<String, Value>, position: &Position) -> Result<()> {
    let absent = Value::Null;
    let keys = written.keys().chain(now.keys().filter(|key| !written.contains_key(*key)));
    for key in keys.filter(|key| !FREE_SETTINGS.contains(&key.as_str())) {
        let (then, now) = (written.get(key).unwrap_or(&absent), now.get(key).unwrap_or(&absent));
        // Both went through the same text, so that numbers are compared as they are kept.
        if serde_json::to_string(then).ok() != serde_json::to_string(now).ok() {
            return Err(Error::usage(format!("the run to resume has {key} = {then}, not {now}"))
                .hint("resume with the settings that the run began with, or start a new run"));
        }
    }
    let steps = now.get("steps").and_then(Value::as_u64).unwrap_or(0);
    if steps < position.step as u64 {
        return Err(Error::usage(format!(
            "the run to resume has done {} steps, more than {steps}",
            position.step
        ))
        .hint("ask for more steps, not fewer"));
    }
    Ok(())
}
