//! Training runs of a command: begun in a folder, continued from what they left there.
//!
//! Beside the files of [`train()`], the folder keeps `train.json`: the seed, the number of steps and the *recipe*,
//! the command's own options that decide the outcome. A continued run takes all of them from there, and only the
//! number of steps may grow.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use kiln_core::{Context, Error, ModelFolder, Plot, Result, write_atomic};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{LogRow, Outcome, Task, TrainConfig, Trained, checkpoint, train};

const FILE_NAME: &str = "train.json";

/// What `train.json` holds.
#[derive(Serialize, Deserialize)]
struct Kept<R> {
    seed: u64,
    steps: usize,
    #[serde(flatten)]
    recipe: R,
}

/// A training run in a folder; `R` is the recipe.
#[derive(Debug, Clone)]
pub struct TrainRun<R> {
    /// Where its files are.
    pub folder: ModelFolder,
    /// Whether it goes on from a checkpoint.
    pub resumed: bool,
    /// The seed that it began with.
    pub seed: u64,
    /// Steps of the whole run.
    pub steps: usize,
    /// What decides the outcome besides data, seed and steps.
    pub recipe: R,
    /// The system, as `kiln` calls it.
    slug: &'static str,
}

/// What a run came to.
#[derive(Debug, Clone, Serialize)]
pub struct TrainSummary {
    /// The model folder.
    pub model: PathBuf,
    /// Steps done.
    pub steps: usize,
    /// The lowest validation loss.
    pub best_val_loss: f64,
    /// The step after which it was measured.
    pub best_step: usize,
    /// Whether the run ended before its last step, because the validation loss stopped falling.
    pub early_stopped: bool,
}

impl<R: Serialize + DeserializeOwned> TrainRun<R> {
    /// A new run of the system `slug` in `out`; nothing is written yet.
    pub fn begin(slug: &'static str, out: &Path, steps: usize, recipe: R, cx: &Context) -> Self {
        Self { folder: ModelFolder::new(out), resumed: false, seed: cx.seed, steps, recipe, slug }
    }

    /// The run that `folder` holds, as long as it was begun or for more `steps`.
    ///
    /// # Errors
    /// When the folder holds none, or the steps are fewer.
    pub fn resume(slug: &'static str, folder: &Path, steps: Option<usize>) -> Result<Self> {
        let folder = ModelFolder::new(folder);
        let path = folder.file(FILE_NAME);
        let text = fs::read_to_string(&path).map_err(|e| {
            Error::io("read", &path)(e)
                .hint(format!("only a folder that `kiln {slug} train` wrote can be resumed"))
        })?;
        let kept: Kept<R> = serde_json::from_str(&text)
            .map_err(|e| Error::input(path.display(), "does not describe a training run").caused_by(e))?;
        let steps = steps.unwrap_or(kept.steps);
        if steps < kept.steps {
            return Err(Error::usage(format!("the run was begun for {} steps, not {steps}", kept.steps))
                .hint("--steps may only grow when a run is resumed"));
        }
        Ok(Self { folder, resumed: true, seed: kept.seed, steps, recipe: kept.recipe, slug })
    }

    /// `cx` with the seed of the run.
    pub fn context(&self, cx: &Context) -> Context {
        Context { seed: self.seed, ..cx.clone() }
    }

    /// Writes what continuing needs; `save_model` puts a new run's configuration into the folder before.
    ///
    /// # Errors
    /// When a new run's folder already holds one, or a file cannot be written.
    pub fn save(&self, save_model: impl FnOnce(&ModelFolder) -> Result<()>) -> Result<()> {
        if !self.resumed {
            if self.folder.file(checkpoint::FILE_NAME).exists() {
                let message = format!("{} already holds a training run", self.folder.path().display());
                return Err(Error::usage(message).hint("continue it with --resume, or choose another --out"));
            }
            self.folder.create()?;
            save_model(&self.folder)?;
        }
        let kept = Kept { seed: self.seed, steps: self.steps, recipe: &self.recipe };
        let json = serde_json::to_vec_pretty(&kept)
            .map_err(|e| Error::work(format!("cannot write {FILE_NAME}")).caused_by(e))?;
        write_atomic(&self.folder.file(FILE_NAME), &json)
    }

    /// Trains to the end, as [`train()`] does. `data` is how the command was given its data, for the hint how to go
    /// on: `--text my.txt`.
    ///
    /// # Errors
    /// As [`train()`], and when the user stopped it.
    pub fn train<M: Module>(
        &self,
        model: M,
        task: &mut impl Task<M>,
        config: &TrainConfig,
        data: &str,
        cx: &Context,
    ) -> Result<Trained<M>> {
        let trained = train(model, task, config, Some(&self.folder), self.resumed, cx)?;
        if trained.outcome == Outcome::Interrupted {
            let (slug, folder) = (self.slug, self.folder.path().display());
            return Err(Error::interrupted(format!("stopped after step {}", trained.log.len()))
                .hint(format!("continue with `kiln {slug} train {data} --resume {folder}`")));
        }
        Ok(trained)
    }

    /// Draws `loss.svg`, with losses in `unit`, and sums the run up.
    ///
    /// # Errors
    /// When the plot cannot be written.
    pub fn finish<M>(&self, trained: &Trained<M>, unit: &str) -> Result<TrainSummary> {
        let losses = |value: fn(&LogRow) -> Option<f64>| {
            trained.log.iter().filter_map(|row| Some((row.step as f64, value(row)?))).collect()
        };
        Plot::lines("Loss", "step", unit)
            .series("training", losses(|row| Some(row.loss)))
            .series("validation", losses(|row| row.val_loss))
            .save(&self.folder.file("loss.svg"))?;
        Ok(TrainSummary {
            model: self.folder.path().into(),
            steps: trained.log.len(),
            best_val_loss: trained.best_loss,
            best_step: trained.best_step,
            early_stopped: trained.outcome == Outcome::EarlyStopped,
        })
    }
}

impl TrainSummary {
    /// One line for a person, with the loss in `unit`.
    pub fn to_text(&self, unit: &str) -> String {
        format!(
            "trained {} steps; best validation loss {:.4} {unit}, after step {}\n",
            self.steps, self.best_val_loss, self.best_step
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
    struct Recipe {
        batch: usize,
    }

    #[test]
    fn a_run_is_resumed_with_its_own_seed_and_recipe_and_may_only_grow() {
        let dir = tempfile::tempdir().unwrap();
        let cx = Context { seed: 7, ..Context::for_tests("unused") };
        let begun = TrainRun::begin("gla", dir.path(), 20, Recipe { batch: 3 }, &cx);
        begun.save(|folder| folder.save_config("gla", &Recipe { batch: 3 })).unwrap();
        assert_eq!(begun.folder.kind().unwrap(), "gla");

        let resumed = TrainRun::<Recipe>::resume("gla", dir.path(), None).unwrap();
        assert_eq!((resumed.seed, resumed.steps, &resumed.recipe), (7, 20, &begun.recipe));
        assert_eq!(resumed.context(&Context::for_tests("unused")).seed, 7);
        let longer = TrainRun::<Recipe>::resume("gla", dir.path(), Some(21)).unwrap();
        longer.save(|_| panic!("the configuration stays as it was")).unwrap();
        let error = TrainRun::<Recipe>::resume("gla", dir.path(), Some(20)).unwrap_err();
        assert!(error.to_string().contains("begun for 21 steps, not 20"), "{error}");
    }

    #[test]
    fn a_folder_without_a_run_is_not_resumed_and_one_with_a_run_not_begun_in() {
        let dir = tempfile::tempdir().unwrap();
        let error = TrainRun::<Recipe>::resume("gla", dir.path(), None).unwrap_err();
        assert!(error.hint_text().unwrap().contains("`kiln gla train`"));
        fs::write(dir.path().join(FILE_NAME), "{\"seed\": 1}").unwrap();
        let error = TrainRun::<Recipe>::resume("gla", dir.path(), None).unwrap_err().to_string();
        assert!(error.contains("does not describe a training run"), "{error}");

        fs::write(dir.path().join(checkpoint::FILE_NAME), "").unwrap();
        let run = TrainRun::begin("gla", dir.path(), 1, Recipe { batch: 1 }, &Context::for_tests("unused"));
        let error = run.save(|_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("already holds a training run"), "{error}");
    }
}
