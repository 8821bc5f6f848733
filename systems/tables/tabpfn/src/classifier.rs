//! A classifier for tables that needs no training: labelled rows go in, and probabilities for other rows come out of the
//! network's forward pass, averaged over an ensemble of views.
//!
//! Tables beyond what the network takes are seen in several views: samples of rows, parts of the columns, and for more
//! classes than the network has outputs, code words that merge classes into groups.

use std::ops::Range;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Context, Error, ModelFolder, OutputMode, Result, write_atomic};
use kiln_data::{Cells, Column, Encoder, Matrix, Table, TableOptions};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use crate::calibration::{Calibrate, Calibration, FOLDS, folds};
use crate::checkpoint;
use crate::ensemble::{Member, members, softmax};
use crate::metrics::most_probable;
use crate::network::{LabelledRows, TabPfn};
use crate::preprocess::{Mode, Preprocessor, is_constant};

/// Labelled rows that are taken without a word; the network has learned from tables of about this size.
pub const USUAL_ROWS: usize = 1000;
/// Members that calibrate, at most: the average over more is hardly any flatter.
const CALIBRATING_MEMBERS: usize = 8;
/// Samples of rows at most.
const MAX_SAMPLES: usize = 8;
/// Members times rows that pass through the network at once.
const ROWS_AT_ONCE: usize = 4096;
/// Bytes of keys and values that are kept between predictions.
const CACHE_BYTES: usize = 1 << 30;
/// Larger numbers have squares that are not finite.
const LARGEST: f64 = 1e150;
/// Files of a saved classifier.
const SETTINGS: &str = "classifier.json";
const ROWS: &str = "train.csv";
const MODEL: &str = "model";
/// Steps towards the probabilities that code words agree on.
const AGREEMENT_STEPS: usize = 100;

/// How predictions are made.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ClassifierOptions {
    /// Members of the ensemble; all that there are if `None`.
    pub members: Option<usize>,
    /// Half of the members see power-transformed columns.
    pub power: bool,
    /// Divides the logits.
    pub temperature: f64,
    /// Rows of a sample: where there are more labelled rows, several samples are seen.
    pub sample_rows: Option<usize>,
    /// More rows, and more columns than the network takes, are not refused.
    pub allow_large: bool,
    /// More classes than the network has outputs are not refused.
    pub many_class: bool,
    /// Most classes that one pass tells apart, as many as the network has outputs if `None`. More classes are told apart
    /// by code words that merge them into so many groups: slower, but a small network is better at few classes.
    pub groups: Option<usize>,
    /// How probabilities are calibrated on the labelled rows.
    #[serde(default = "Calibrate::off")]
    pub calibrate: Calibrate,
    /// Keys and values of the labelled rows are kept between predictions.
    pub cache: bool,
}

impl Default for ClassifierOptions {
    /// The paper's ensemble, calibrated where there are many classes.
    fn default() -> Self {
        Self {
            members: Some(32),
            power: true,
            temperature: 0.8,
            sample_rows: None,
            allow_large: false,
            many_class: false,
            groups: None,
            calibrate: Calibrate::Auto,
            cache: true,
        }
    }
}

impl ClassifierOptions {
    /// Checks that the numbers make sense.
    ///
    /// # Errors
    /// Names the option that does not.
    pub fn check(&self) -> Result<()> {
        if self.members == Some(0) {
            return Err(Error::usage("--members must be at least 1, or `all`"));
        }
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            return Err(Error::usage(format!("--temperature {} must be above 0", self.temperature)));
        }
        if self.groups.is_some_and(|groups| groups < 2) {
            return Err(Error::usage("--groups must be at least 2"));
        }
        if self.sample_rows.is_some_and(|rows| rows < 2) {
            return Err(Error::usage("--sample-rows must be at least 2"));
        }
        Ok(())
    }
}

/// A network with the labelled rows of a table.
pub struct TabPfnClassifier {
    network: TabPfn,
    options: ClassifierOptions,
    seed: u64,
    encoder: Encoder,
    target: String,
    classes: Vec<String>,
    rows: Matrix,
    labels: Vec<usize>,
    /// For each code word, the group of every class. With few classes, one word in which each is its own group.
    words: Vec<Vec<usize>>,
    views: Vec<View>,
    calibration: Option<Calibration>,
    /// What the person should know about how the table was taken.
    pub notices: Vec<String>,
}

/// One sample of rows, one part of the columns and one code word, as all its members see them.
struct View {
    word: usize,
    groups: usize,
    columns: Vec<usize>,
    preprocessors: Vec<(Mode, Preprocessor)>,
    batches: Vec<Batch>,
}

/// Members that pass through the network together.
struct Batch {
    members: Vec<Member>,
    labelled: BatchRows,
}

/// The labelled rows of a batch.
enum BatchRows {
    /// As they have passed through the network.
    Kept(LabelledRows),
    /// As they are put in: `[members, rows, max_features]` and `[members, rows]`.
    Anew { x: TensorData, y: TensorData },
}

impl TabPfnClassifier {
    /// Takes the rows of a table whose column `target` holds the classes.
    ///
    /// # Errors
    /// When the table or the target is not fit; see [`fit_matrix`](Self::fit_matrix).
    pub fn fit(
        network: &TabPfn,
        mut table: Table,
        target: &str,
        options: ClassifierOptions,
        cx: &Context,
    ) -> Result<Self> {
        let (classes, labels) = classes(&table.take(target)?, table.source())?;
        if table.columns().is_empty() {
            return Err(Error::input(table.source(), format!("has no columns besides \"{target}\"")));
        }
        let encoder = Encoder::fit(&table);
        let encoded = encoder.encode(&table)?;
        let mut fitted = Self::fit_matrix(network, encoded.matrix, labels, classes, options, cx)
            .map_err(|e| named(e, table.source()))?;
        fitted.notices.splice(0..0, table_notices(&table, encoded.notices));
        fitted.encoder = encoder;
        fitted.target = target.into();
        Ok(fitted)
    }

    /// Takes labelled rows `[rows, columns]`, NaN where a value is missing. `labels` are places in `classes`.
    ///
    /// # Errors
    /// When a class has no row, there is one class or more than the network has outputs, rows or columns are too many and
    /// the options do not say what to do, no column varies, or a number is too large.
    pub fn fit_matrix(
        network: &TabPfn,
        rows: Matrix,
        labels: Vec<usize>,
        classes: Vec<String>,
        options: ClassifierOptions,
        cx: &Context,
    ) -> Result<Self> {
        let mut fitted = Self::uncalibrated(network, rows, labels, classes, options, cx)?;
        fitted.calibrate(cx)?;
        Ok(fitted)
    }

    /// As [`fit_matrix`](Self::fit_matrix), whatever the options say of calibration.
    fn uncalibrated(
        network: &TabPfn,
        rows: Matrix,
        labels: Vec<usize>,
        classes: Vec<String>,
        options: ClassifierOptions,
        cx: &Context,
    ) -> Result<Self> {
        options.check()?;
        let config = network.config();
        let varying = check(&rows, &labels, &classes, &options, config.max_features, config.max_classes)?;
        Self::seeing(network, rows, &varying, labels, classes, options, cx)
    }

    /// Sees labelled rows that were checked, in their columns `varying`.
    fn seeing(
        network: &TabPfn,
        rows: Matrix,
        varying: &[usize],
        labels: Vec<usize>,
        classes: Vec<String>,
        options: ClassifierOptions,
        cx: &Context,
    ) -> Result<Self> {
        let config = network.config();
        let samples = match options.sample_rows {
            Some(most) if most < rows.rows => {
                sample_rows(&labels, classes.len(), most, &mut cx.rng("samples", 0))
            }
            _ => vec![(0..rows.rows).collect()],
        };
        let parts = divide(varying.to_vec(), config.max_features, &mut cx.rng("columns", 0));
        let groups = options.groups.map_or(config.max_classes, |groups| groups.min(config.max_classes));
        let words = code_words(classes.len(), groups, &mut cx.rng("code words", 0));
        let mut fitted = Self {
            network: network.clone(),
            options,
            seed: cx.seed,
            encoder: Encoder::numeric((1..=rows.columns).map(|column| format!("column {column}"))),
            target: "class".into(),
            classes,
            rows,
            labels,
            words,
            views: Vec::new(),
            calibration: None,
            notices: Vec::new(),
        };
        fitted.note_views(samples.len(), parts.len());
        let views = samples.len() * parts.len() * fitted.words.len();
        // The work of the ensemble is shared among the views, but each is seen from a few sides.
        let shared = options.members.map(|members| members.div_ceil(views).max(members.min(4)));
        for rows in &samples {
            for columns in &parts {
                for word in 0..fitted.words.len() {
                    let mut rng = cx.rng("members", fitted.views.len() as u64);
                    let view = fitted.view(rows, columns, word, shared, &mut rng);
                    fitted.views.push(view);
                }
            }
        }
        fitted.keep_labelled(cx)?;
        Ok(fitted)
    }

    fn note_views(&mut self, samples: usize, parts: usize) {
        let (rows, columns, classes) = (self.rows.rows, self.rows.columns, self.classes.len());
        let constant = (0..columns).filter(|&column| is_constant(&self.rows.column(column))).count();
        if constant > 0 {
            self.notices.push(format!("{constant} of {columns} columns do not vary and are not used"));
        }
        if samples > 1 {
            self.notices.push(format!("{rows} labelled rows are seen in {samples} samples"));
        }
        if parts > 1 {
            self.notices.push(format!("{columns} columns are seen in {parts} parts"));
        }
        if self.words.len() > 1 {
            let words = self.words.len();
            self.notices.push(format!("{classes} classes are told apart by {words} code words"));
        }
    }

    /// Sees these rows and columns with the classes merged as a code word says.
    fn view(
        &self,
        rows: &[usize],
        columns: &[usize],
        word: usize,
        count: Option<usize>,
        rng: &mut impl Rng,
    ) -> View {
        let config = self.network.config();
        let table = self.rows.select_rows(rows).select_columns(columns);
        let code = &self.words[word];
        let groups = code.iter().max().map_or(0, |largest| largest + 1);
        let modes: &[Mode] = if self.options.power { &[Mode::None, Mode::Power] } else { &[Mode::None] };
        let preprocessors: Vec<(Mode, Preprocessor)> =
            modes.iter().map(|&mode| (mode, Preprocessor::fit(&table, mode, config.max_features))).collect();
        let seen: Vec<(Mode, Matrix)> =
            preprocessors.iter().map(|(mode, steps)| (*mode, steps.apply(&table))).collect();
        // A sample of rows may be constant in columns that vary elsewhere.
        let used = seen[0].1.columns.max(1);
        let members = members(groups, used, modes, count, rng);
        let at_once = (ROWS_AT_ONCE / rows.len()).clamp(1, 32);
        let batch = |members: &[Member]| {
            let (mut x, mut y) = (Vec::new(), Vec::new());
            for member in members {
                x.extend(member.rotate(of(&seen, member.mode), config.max_features, 0..rows.len()));
                y.extend(rows.iter().map(|&row| member.shown(code[self.labels[row]], groups)));
            }
            let labelled = BatchRows::Anew {
                x: TensorData::new(x, [members.len(), rows.len(), config.max_features]),
                y: TensorData::new(y, [members.len(), rows.len()]),
            };
            Batch { members: members.to_vec(), labelled }
        };
        View {
            word,
            groups,
            columns: columns.to_vec(),
            preprocessors,
            batches: members.chunks(at_once).map(batch).collect(),
        }
    }

    /// Lets the labelled rows predict each other in folds, and learns from that how far to trust what the network says.
    fn calibrate(&mut self, cx: &Context) -> Result<()> {
        let classes = self.classes.len();
        let Some(form) = self.options.calibrate.form(&self.labels, classes) else { return Ok(()) };
        let folds = folds(&self.labels, classes, &mut cx.rng("folds", 0));
        if folds.iter().all(Option::is_none) {
            self.notices.push("no class has two rows, on which probabilities could be calibrated".into());
            return Ok(());
        }
        let options = ClassifierOptions {
            members: Some(self.options.members.map_or(CALIBRATING_MEMBERS, |m| m.min(CALIBRATING_MEMBERS))),
            cache: false,
            ..self.options
        };
        let columns: Vec<usize> =
            (0..self.rows.columns).filter(|&column| !is_constant(&self.rows.column(column))).collect();
        let progress = cx.progress(FOLDS as u64, "calibrating");
        let quiet = &Context { output: OutputMode::Quiet, ..cx.clone() };
        let (mut values, mut truth) = (Vec::new(), Vec::new());
        for fold in 0..FOLDS {
            let (held, rest): (Vec<usize>, Vec<usize>) =
                (0..self.labels.len()).partition(|&row| folds[row] == Some(fold));
            let labels_of = |rows: &[usize]| rows.iter().map(|&row| self.labels[row]).collect::<Vec<_>>();
            let (rows, labels) = (self.rows.select_rows(&rest), labels_of(&rest));
            let names = self.classes.clone();
            let seen = Self::seeing(&self.network, rows, &columns, labels, names, options, quiet)?;
            values.extend(seen.predict_proba(&self.rows.select_rows(&held), quiet)?.values);
            truth.extend(labels_of(&held));
            progress.inc(1);
        }
        let probabilities = Matrix::new(truth.len(), classes, values);
        self.calibration = Some(Calibration::fit(form, &probabilities, &truth));
        Ok(())
    }

    /// How probabilities are calibrated; `None` where they are those of the ensemble.
    pub fn calibration(&self) -> Option<&Calibration> {
        self.calibration.as_ref()
    }

    /// Passes the labelled rows through the network, where there is room to keep what comes out.
    fn keep_labelled(&mut self, cx: &Context) -> Result<()> {
        let config = self.network.config();
        let batches = || self.views.iter().flat_map(|view| &view.batches);
        let rows: usize = batches().map(|batch| batch.labelled.rows()).sum();
        let bytes = rows * config.layers * 2 * config.emsize * size_of::<f32>();
        if !self.options.cache || bytes > CACHE_BYTES {
            return Ok(());
        }
        let progress = cx.progress(rows as u64, "reading labelled rows");
        for batch in self.views.iter_mut().flat_map(|view| &mut view.batches) {
            stop_if_asked(cx)?;
            progress.inc(batch.labelled.rows() as u64);
            batch.labelled = BatchRows::Kept(batch.labelled.pass(&self.network, &cx.device));
        }
        Ok(())
    }

    /// The names of the classes, in the order of the columns of probabilities.
    pub fn classes(&self) -> &[String] {
        &self.classes
    }

    /// The columns that predictions need.
    pub fn encoder(&self) -> &Encoder {
        &self.encoder
    }

    /// The name of the target column.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// How many forward passes are averaged for a row.
    pub fn members(&self) -> usize {
        self.views.iter().flat_map(|view| &view.batches).map(|batch| batch.members.len()).sum()
    }

    /// Probabilities `[rows, classes]` of rows `[rows, columns]`.
    ///
    /// # Errors
    /// When the columns are not as many as those of the labelled rows, a number is too large, the network's answer is not a
    /// number, or the user asks to stop.
    pub fn predict_proba(&self, rows: &Matrix, cx: &Context) -> Result<Matrix> {
        if rows.columns != self.rows.columns {
            let found =
                format!("have {} columns, the labelled rows have {}", rows.columns, self.rows.columns);
            return Err(Error::input("rows to predict", found));
        }
        check_size(rows)?;
        let classes = self.classes.len();
        let work: usize = self.views.iter().map(|view| view.batches.len() * rows.rows).sum();
        let progress = cx.progress(work as u64, "predicting");
        // Probabilities of groups, averaged over the views of a word.
        let mut of_words: Vec<Vec<f64>> = Vec::new();
        for (word, code) in self.words.iter().enumerate() {
            let groups = code.iter().max().map_or(0, |largest| largest + 1);
            let views: Vec<&View> = self.views.iter().filter(|view| view.word == word).collect();
            let mut mean = vec![0.0; rows.rows * groups];
            for view in &views {
                let probabilities = self.see(view, rows, &|rows| progress.inc(rows), cx)?;
                for (mean, p) in mean.iter_mut().zip(probabilities) {
                    *mean += p / views.len() as f64;
                }
            }
            of_words.push(mean);
        }
        let values = match &mut of_words[..] {
            [only] => std::mem::take(only),
            several => {
                let of_row = |row: usize| {
                    let groups = several.iter().map(|p| {
                        let groups = p.len() / rows.rows;
                        &p[row * groups..(row + 1) * groups]
                    });
                    agreement(&self.words, &groups.collect::<Vec<_>>())
                };
                (0..rows.rows).flat_map(of_row).collect()
            }
        };
        let mut probabilities = Matrix::new(rows.rows, classes, values);
        if let Some(calibration) = &self.calibration {
            calibration.apply(&mut probabilities);
        }
        Ok(probabilities)
    }

    /// Probabilities of a view's groups, `[rows, groups]`.
    fn see(&self, view: &View, rows: &Matrix, passed: &dyn Fn(u64), cx: &Context) -> Result<Vec<f64>> {
        let width = self.network.config().max_features;
        let groups = view.groups;
        let rows = rows.select_columns(&view.columns);
        let seen: Vec<(Mode, Matrix)> =
            view.preprocessors.iter().map(|(mode, steps)| (*mode, steps.apply(&rows))).collect();
        let count: usize = view.batches.iter().map(|batch| batch.members.len()).sum();
        let mut logits = vec![0.0; rows.rows * groups];
        for batch in &view.batches {
            let anew;
            let labelled = match &batch.labelled {
                BatchRows::Kept(kept) => kept,
                BatchRows::Anew { .. } => {
                    anew = batch.labelled.pass(&self.network, &cx.device);
                    &anew
                }
            };
            let at_once = (ROWS_AT_ONCE / batch.members.len()).max(1);
            for begin in (0..rows.rows).step_by(at_once) {
                stop_if_asked(cx)?;
                let part = begin..rows.rows.min(begin + at_once);
                let answer = self.ask(batch, labelled, &seen, part.clone(), width, &cx.device);
                let outputs = answer.len() / (batch.members.len() * part.len());
                for (member, answer) in batch.members.iter().zip(answer.chunks(part.len() * outputs)) {
                    for (row, answer) in part.clone().zip(answer.chunks(outputs)) {
                        for group in 0..groups {
                            let logit = f64::from(answer[member.place_of(group, groups)]);
                            logits[row * groups + group] += logit / (self.options.temperature * count as f64);
                        }
                    }
                }
                passed(part.len() as u64);
            }
        }
        if logits.iter().any(|logit| !logit.is_finite()) {
            return Err(Error::work("the network's answer is not a number").hint("is the model damaged?"));
        }
        logits.chunks_exact_mut(groups).for_each(softmax);
        Ok(logits)
    }

    /// Logits of some rows for all members of a batch, `[members, rows, outputs]`.
    fn ask(
        &self,
        batch: &Batch,
        labelled: &LabelledRows,
        seen: &[(Mode, Matrix)],
        rows: Range<usize>,
        width: usize,
        device: &Device,
    ) -> Vec<f32> {
        let mut x = Vec::with_capacity(batch.members.len() * rows.len() * width);
        for member in &batch.members {
            x.extend(member.rotate(of(seen, member.mode), width, rows.clone()));
        }
        let x = Tensor::from_data(TensorData::new(x, [batch.members.len(), rows.len(), width]), device);
        self.network.query(labelled, x).into_data().try_to_vec().expect("logits are single-precision numbers")
    }

    /// Predicted classes, as places in [`classes`](Self::classes), and their probabilities.
    ///
    /// # Errors
    /// As [`predict_proba`](Self::predict_proba).
    pub fn predict(&self, rows: &Matrix, cx: &Context) -> Result<(Vec<usize>, Matrix)> {
        let probabilities = self.predict_proba(rows, cx)?;
        Ok((most_probable(&probabilities), probabilities))
    }

    /// The labels of another table in the terms of this classifier; `None` for rows without one.
    ///
    /// # Errors
    /// When a class is not known.
    pub fn labels(&self, column: &Column, source: &str) -> Result<Vec<Option<usize>>> {
        let label = |row: usize| match column.text(row) {
            None => Ok(None),
            Some(text) => match self.classes.iter().position(|class| *class == text) {
                Some(class) => Ok(Some(class)),
                None => {
                    let place = format!("{source}, row {}", row + 1);
                    Err(Error::input(place, format!("has the class \"{text}\", which no training row has"))
                        .hint(format!("the classes are {}", self.classes.join(", "))))
                }
            },
        };
        (0..column.len()).map(label).collect()
    }

    /// Writes the network, the labelled rows and the settings into a folder.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        checkpoint::save(&self.network, &ModelFolder::new(folder.join(MODEL)))?;
        let names = self.encoder.columns.iter().map(|column| column.name.clone());
        let columns = names.enumerate().map(|(i, name)| Column::numbers(name, self.rows.column(i)));
        let labels = Column::words(&self.target, self.labels.iter().map(|&label| Some(&self.classes[label])));
        Table::from_columns("labelled rows", columns.chain([labels]).collect())?.write(&folder.join(ROWS))?;
        let settings = Saved {
            options: self.options,
            seed: self.seed,
            target: self.target.clone(),
            classes: self.classes.clone(),
            encoder: self.encoder.clone(),
            calibration: self.calibration.clone(),
        };
        let text = serde_json::to_vec_pretty(&settings)
            .map_err(|e| Error::work("cannot write the classifier as JSON").caused_by(e))?;
        write_atomic(&folder.join(SETTINGS), &text)
    }

    /// Reads what [`save`](Self::save) has written.
    ///
    /// # Errors
    /// When a file is missing or they do not fit each other.
    pub fn load(folder: &Path, cx: &Context) -> Result<Self> {
        let path = folder.join(SETTINGS);
        let text = std::fs::read(&path).map_err(Error::io("read", &path))?;
        let saved: Saved = serde_json::from_slice(&text)
            .map_err(|e| Error::input(path.display(), "does not describe a classifier").caused_by(e))?;
        let network = checkpoint::open(&folder.join(MODEL), cx)?;
        let mut table = Table::read(&folder.join(ROWS), TableOptions::default())?;
        let target = table.take(&saved.target)?;
        let names: Vec<String> = saved.encoder.columns.iter().map(|column| column.name.clone()).collect();
        let rows = Encoder::numeric(names).encode(&table)?.matrix;
        let label = |row: usize| {
            let text = target.text(row)?;
            saved.classes.iter().position(|class| *class == text)
        };
        let labels: Option<Vec<usize>> = (0..target.len()).map(label).collect();
        let labels = labels.ok_or_else(|| {
            Error::input(folder.join(ROWS).display(), format!("holds classes that {SETTINGS} does not list"))
        })?;
        let cx = Context { seed: saved.seed, ..cx.clone() };
        let mut fitted = Self::uncalibrated(&network, rows, labels, saved.classes, saved.options, &cx)?;
        if saved.calibration.as_ref().is_some_and(|calibration| !calibration.fits(fitted.classes.len())) {
            return Err(Error::input(path.display(), "holds a calibration that does not fit its classes"));
        }
        fitted.calibration = saved.calibration;
        fitted.encoder = saved.encoder;
        fitted.target = saved.target;
        Ok(fitted)
    }
}

/// The settings of a saved classifier.
#[derive(Serialize, Deserialize)]
struct Saved {
    options: ClassifierOptions,
    seed: u64,
    target: String,
    classes: Vec<String>,
    encoder: Encoder,
    #[serde(default)]
    calibration: Option<Calibration>,
}

impl BatchRows {
    /// Members times rows; 0 once they are kept.
    fn rows(&self) -> usize {
        match self {
            Self::Kept(_) => 0,
            Self::Anew { y, .. } => y.shape().num_elements(),
        }
    }

    fn pass(&self, network: &TabPfn, device: &Device) -> LabelledRows {
        match self {
            Self::Kept(kept) => kept.clone(),
            Self::Anew { x, y } => {
                network.context(Tensor::from_data(x.clone(), device), Tensor::from_data(y.clone(), device))
            }
        }
    }
}

fn of(seen: &[(Mode, Matrix)], mode: Mode) -> &Matrix {
    &seen.iter().find(|(other, _)| *other == mode).expect("every member's mode is prepared").1
}

fn stop_if_asked(cx: &Context) -> Result<()> {
    if cx.interrupted() { Err(Error::interrupted("the prediction was stopped")) } else { Ok(()) }
}

/// Puts the table's name before a message about its rows.
fn named(error: Error, source: &str) -> Error {
    let found = Error::input(source, &error);
    match error.hint_text() {
        Some(hint) => found.hint(hint),
        None => found,
    }
}

/// What was made of the columns, for the person.
fn table_notices(table: &Table, mut notices: Vec<String>) -> Vec<String> {
    let is_words = |column: &&Column| matches!(column.cells, Cells::Words { .. });
    let words: Vec<&str> =
        table.columns().iter().filter(is_words).map(|column| column.name.as_str()).collect();
    let source = table.source();
    if !words.is_empty() {
        let columns = words.join(", ");
        notices.push(format!("{source}: columns of words, numbered in the order of appearance: {columns}"));
    }
    for column in table.columns() {
        if let Some(word) = column.stray_word() {
            let name = &column.name;
            notices.push(format!("{source}: column \"{name}\" would hold numbers but for \"{word}\""));
        }
    }
    notices
}

/// The classes of a column in sorted order, numbers by size, and each row's class.
///
/// # Errors
/// When a cell is missing.
pub fn classes(column: &Column, source: &str) -> Result<(Vec<String>, Vec<usize>)> {
    let mut texts = Vec::with_capacity(column.len());
    for row in 0..column.len() {
        texts.push(column.text(row).ok_or_else(|| {
            Error::input(format!("{source}, row {}", row + 1), format!("has no class in \"{}\"", column.name))
                .hint("leave such rows out of the training table; rows to predict go into the test table")
        })?);
    }
    let mut classes = texts.clone();
    match &column.cells {
        Cells::Words { .. } => classes.sort(),
        Cells::Numbers(numbers) => {
            let mut order: Vec<usize> = (0..numbers.len()).collect();
            order.sort_by(|&a, &b| numbers[a].total_cmp(&numbers[b]));
            classes = order.into_iter().map(|row| texts[row].clone()).collect();
        }
    }
    classes.dedup();
    let places: std::collections::HashMap<&str, usize> =
        classes.iter().enumerate().map(|(place, class)| (class.as_str(), place)).collect();
    let labels = texts.iter().map(|text| places[text.as_str()]).collect();
    Ok((classes, labels))
}

/// Checks labelled rows; returns the columns that vary.
fn check(
    rows: &Matrix,
    labels: &[usize],
    classes: &[String],
    options: &ClassifierOptions,
    max_features: usize,
    max_classes: usize,
) -> Result<Vec<usize>> {
    const PLACE: &str = "labelled rows";
    assert_eq!(rows.rows, labels.len(), "every row needs a label");
    for (class, name) in classes.iter().enumerate() {
        if !labels.contains(&class) {
            return Err(Error::input(PLACE, format!("class \"{name}\" has no row")));
        }
    }
    match classes.len() {
        0 => return Err(Error::input(PLACE, "there are none")),
        1 => {
            let found = format!("all are of one class, \"{}\"", classes[0]);
            return Err(Error::input(PLACE, found).hint("is this the right target column?"));
        }
        many if many > max_classes && !options.many_class => {
            let found = format!("there are {many} classes, the model tells {max_classes} apart");
            return Err(Error::input(PLACE, found).hint(
                "--many-class tells more apart; for a column of measurements, make classes of ranges first",
            ));
        }
        _ => {}
    }
    check_size(rows)?;
    if rows.rows > USUAL_ROWS && !options.allow_large && options.sample_rows.is_none() {
        let found = format!("there are {}, more than {USUAL_ROWS}", rows.rows);
        return Err(Error::input(PLACE, found).hint(
            "--sample-rows 1000 averages over samples; --allow-large takes all at once, in time that grows with the square",
        ));
    }
    let varying: Vec<usize> =
        (0..rows.columns).filter(|&column| !is_constant(&rows.column(column))).collect();
    if varying.is_empty() {
        return Err(Error::input(PLACE, "no column varies").hint("at least one needs two different values"));
    }
    if varying.len() > max_features && !options.allow_large {
        let found = format!("{} columns vary, the model takes {max_features}", varying.len());
        return Err(Error::input(PLACE, found)
            .hint("--allow-large averages over parts of the columns; --drop leaves columns out"));
    }
    Ok(varying)
}

fn check_size(rows: &Matrix) -> Result<()> {
    match rows.values.iter().position(|x| x.abs() > LARGEST) {
        None => Ok(()),
        Some(place) => {
            let (row, column) = (place / rows.columns + 1, place % rows.columns + 1);
            let found = format!("is {:e}, must be within ±{LARGEST:e}", rows.values[place]);
            Err(Error::input(format!("row {row}, column {column}"), found))
        }
    }
}

/// Samples of at most `most` rows in which every class has its share and at least one row; together they hold all rows,
/// unless those fill more than the largest number of samples.
fn sample_rows(labels: &[usize], classes: usize, most: usize, rng: &mut impl Rng) -> Vec<Vec<usize>> {
    let count = labels.len().div_ceil(most).min(MAX_SAMPLES);
    let mut samples = vec![Vec::new(); count];
    for class in 0..classes {
        let mut rows: Vec<usize> = (0..labels.len()).filter(|&row| labels[row] == class).collect();
        rows.shuffle(rng);
        let share = (most * rows.len()).div_ceil(labels.len());
        for (number, sample) in samples.iter_mut().enumerate() {
            let part = number * rows.len() / count..(number + 1) * rows.len() / count;
            match part.is_empty() {
                true => sample.push(rows[number % rows.len()]),
                false => sample.extend(rows[part].iter().take(share)),
            }
        }
    }
    samples
}

/// Columns in parts of about one size, each at most `most`.
fn divide(mut columns: Vec<usize>, most: usize, rng: &mut impl Rng) -> Vec<Vec<usize>> {
    let count = columns.len().div_ceil(most);
    if count == 1 {
        return vec![columns];
    }
    columns.shuffle(rng);
    let part = |number: usize| {
        let part = number * columns.len() / count..(number + 1) * columns.len() / count;
        let mut part = columns[part].to_vec();
        part.sort_unstable();
        part
    };
    (0..count).map(part).collect()
}

/// Code words that tell classes apart (Dietterich and Bakiri 1995): for each, the group of every class. Few classes are their
/// own groups.
fn code_words(classes: usize, groups: usize, rng: &mut impl Rng) -> Vec<Vec<usize>> {
    if classes <= groups {
        return vec![(0..classes).collect()];
    }
    // Twice what numbers need, so that one wrong answer does not confuse two classes.
    let digits = (classes as f64).ln() / (groups as f64).ln();
    let count = 2 * digits.ceil() as usize + 2;
    loop {
        let mut order: Vec<usize> = (0..classes).collect();
        let words: Vec<Vec<usize>> = (0..count)
            .map(|_| {
                order.shuffle(rng);
                let mut word = vec![0; classes];
                order.iter().enumerate().for_each(|(place, &class)| word[class] = place % groups);
                word
            })
            .collect();
        let apart = |a: usize, b: usize| words.iter().filter(|word| word[a] != word[b]).count();
        if (0..classes).all(|a| (0..a).all(|b| apart(a, b) >= 2)) {
            return words;
        }
    }
}

/// The probabilities of classes whose sums over groups agree best with what each code word says of the groups: those of the
/// greatest likelihood, by expectation maximisation from equal ones.
fn agreement(words: &[Vec<usize>], groups: &[&[f64]]) -> Vec<f64> {
    let classes = words[0].len();
    let mut probabilities = vec![1.0 / classes as f64; classes];
    for _ in 0..AGREEMENT_STEPS {
        let mut factors = vec![0.0; classes];
        for (word, said) in words.iter().zip(groups) {
            let mut sums = vec![0.0; said.len()];
            word.iter().zip(&probabilities).for_each(|(&group, p)| sums[group] += p);
            for (factor, &group) in factors.iter_mut().zip(word) {
                *factor += said[group] / sums[group].max(f64::MIN_POSITIVE) / words.len() as f64;
            }
        }
        probabilities.iter_mut().zip(&factors).for_each(|(p, factor)| *p *= factor);
        let sum: f64 = probabilities.iter().sum();
        probabilities.iter_mut().for_each(|p| *p /= sum);
    }
    probabilities
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;

    #[test]
    fn what_code_words_say_of_groups_gives_back_the_probabilities_of_classes() {
        let words = code_words(15, 5, &mut random_stream(0, "words", 0));
        let mut truth: Vec<f64> = (0..15).map(|class| 1.0 / (1.0 + f64::from(class)).powi(2)).collect();
        let sum: f64 = truth.iter().sum();
        truth.iter_mut().for_each(|p| *p /= sum);
        let groups: Vec<Vec<f64>> = words
            .iter()
            .map(|word| (0..5).map(|g| (0..15).filter(|&c| word[c] == g).map(|c| truth[c]).sum()).collect())
            .collect();
        let found = agreement(&words, &groups.iter().map(Vec::as_slice).collect::<Vec<_>>());
        for (found, truth) in found.iter().zip(&truth) {
            assert!((found - truth).abs() < 0.02, "{found}, should be {truth}");
        }
    }

    #[test]
    fn samples_cover_all_rows_and_hold_every_class() {
        let labels: Vec<usize> = (0..100).map(|row| if row < 3 { 2 } else { row % 2 }).collect();
        let samples = sample_rows(&labels, 3, 20, &mut random_stream(0, "samples", 0));
        assert_eq!(samples.len(), 5);
        let mut seen: Vec<usize> = samples.concat();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen.len(), 100);
        for sample in &samples {
            assert!((0..3).all(|class| sample.iter().any(|&row| labels[row] == class)), "{sample:?}");
            assert!(sample.len() <= 22, "{}", sample.len());
        }
    }

    #[test]
    fn columns_are_divided_evenly_and_completely() {
        let parts = divide((0..25).collect(), 10, &mut random_stream(0, "columns", 0));
        assert!(parts.iter().all(|part| (8..=9).contains(&part.len())));
        let mut all = parts.concat();
        all.sort_unstable();
        assert_eq!(all, (0..25).collect::<Vec<_>>());
    }

    #[test]
    fn code_words_differ_in_two_places_for_every_pair_of_classes() {
        let words = code_words(26, 10, &mut random_stream(0, "words", 0));
        for a in 0..26 {
            for b in 0..a {
                assert!(words.iter().filter(|word| word[a] != word[b]).count() >= 2);
            }
        }
        assert!(words.iter().flatten().all(|&group| group < 10));
        assert_eq!(code_words(3, 10, &mut random_stream(0, "words", 0)), [[0, 1, 2]]);
    }

    #[test]
    fn classes_are_sorted_as_numbers_or_as_words() {
        let numbers = Column::numbers("y", vec![10.0, 9.0, 10.0, -1.0]);
        let (names, labels) = classes(&numbers, "t").unwrap();
        assert_eq!((names, labels), (vec!["-1".into(), "9".into(), "10".into()], vec![2, 1, 2, 0]));
        let words = Column::words("y", [Some("b"), Some("a")]);
        assert_eq!(classes(&words, "t").unwrap().0, ["a", "b"]);
        let missing = Column::words("y", [Some("b"), None]);
        assert_eq!(classes(&missing, "t").unwrap_err().to_string(), "t, row 2: has no class in \"y\"");
    }
}
