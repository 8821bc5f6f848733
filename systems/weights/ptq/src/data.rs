//! Examples as networks read them: images or texts with their labels, or bare tensors.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Error, PortKind, Result, Values};
use kiln_data::{ImageOptions, Images, Table, TableOptions, read_npz};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainerBuilder};
use tokenizers::normalizers::bert::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{AddedToken, Tokenizer};

use crate::arch::{Arch, Batch, ClassifierConfig, Input, PAD};

/// Word pieces that are learnt from texts.
pub const VOCABULARY: usize = 4000;

/// The token that a text begins with.
const START: i64 = 2;

/// Special tokens, in the order of their numbers: [`PAD`] and [`START`] among them.
const SPECIAL: [&str; 3] = ["[PAD]", "[UNK]", "[CLS]"];

/// Examples with their labels.
#[derive(Debug, Clone, PartialEq)]
pub struct Examples {
    /// Extents of one example.
    pub shape: Vec<usize>,
    /// What they consist of.
    pub values: Numbers,
    /// The class of each; empty where there are none.
    pub labels: Vec<usize>,
    /// What the classes are called.
    pub classes: Vec<String>,
}

/// Floats or whole numbers.
#[derive(Debug, Clone, PartialEq)]
pub enum Numbers {
    /// Of images.
    Floats(Vec<f32>),
    /// Of texts.
    Ints(Vec<i64>),
}

impl Examples {
    /// Images.
    pub fn of_images(images: Images) -> Self {
        let Images { shape, pixels, labels, classes, .. } = images;
        Self { shape: shape.to_vec(), values: Numbers::Floats(pixels), labels, classes }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        let numel = self.shape.iter().product::<usize>().max(1);
        match &self.values {
            Numbers::Floats(values) => values.len() / numel,
            Numbers::Ints(values) => values.len() / numel,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// These examples, in this order, as a tensor `[indices, ..shape]`.
    pub fn batch(&self, indices: &[usize]) -> TensorData {
        let numel: usize = self.shape.iter().product();
        let shape: Vec<usize> = std::iter::once(indices.len()).chain(self.shape.iter().copied()).collect();
        let at = |&i: &usize| i * numel..(i + 1) * numel;
        match &self.values {
            Numbers::Floats(values) => TensorData::new(
                indices.iter().flat_map(|i| values[at(i)].iter().copied()).collect::<Vec<_>>(),
                shape,
            ),
            Numbers::Ints(values) => TensorData::new(
                indices.iter().flat_map(|i| values[at(i)].iter().copied()).collect::<Vec<_>>(),
                shape,
            ),
        }
    }

    /// The same for a network in training.
    pub fn tensors(&self, indices: &[usize], device: &Device) -> Batch {
        match self.values {
            Numbers::Floats(_) => Batch::Images(Tensor::from_data(self.batch(indices), device)),
            Numbers::Ints(_) => Batch::Tokens(Tensor::<2, Int>::from_data(self.batch(indices), device)),
        }
    }

    /// These examples, in this order.
    pub fn select(&self, indices: &[usize]) -> Self {
        let data = self.batch(indices);
        let values = match self.values {
            Numbers::Floats(_) => Numbers::Floats(data.iter::<f32>().collect()),
            Numbers::Ints(_) => Numbers::Ints(data.iter::<i64>().collect()),
        };
        let labels = match self.labels.is_empty() {
            true => Vec::new(),
            false => indices.iter().map(|&i| self.labels[i]).collect(),
        };
        Self { shape: self.shape.clone(), values, labels, classes: self.classes.clone() }
    }
}

/// Texts and their labels.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Texts {
    /// One text a row.
    pub texts: Vec<String>,
    /// One label a text, or none at all.
    pub labels: Vec<String>,
}

/// Whether a file holds texts: a CSV table, packed or not, with a column `text`.
pub fn is_text(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    (name.ends_with(".csv") || name.ends_with(".csv.gz"))
        && Table::read(path, TableOptions::default()).is_ok_and(|table| table.column("text").is_some())
}

impl Texts {
    /// Reads a table with the columns `text` and `label`.
    ///
    /// # Errors
    /// When the file cannot be read, has no such columns or an empty cell.
    pub fn read(path: &Path, labelled: bool) -> Result<Self> {
        let malformed = |e: csv::Error| Error::input(path.display(), "is not a CSV table").caused_by(e);
        let file = File::open(path).map_err(Error::io("read", path))?;
        let packed = path.extension().is_some_and(|extension| extension == "gz");
        let reader: Box<dyn Read> =
            if packed { Box::new(flate2::read::GzDecoder::new(file)) } else { Box::new(file) };
        let mut reader = csv::Reader::from_reader(reader);
        let heads = reader.headers().map_err(malformed)?.clone();
        let column = |name: &str| heads.iter().position(|head| head.trim() == name);
        let missing = |name: &str| {
            let found = heads.iter().collect::<Vec<_>>().join(", ");
            Error::input(path.display(), format!("has no column \"{name}\"; its columns are {found}"))
                .hint("texts come as a table with the columns label and text")
        };
        let text = column("text").ok_or_else(|| missing("text"))?;
        let label = column("label");
        if labelled && label.is_none() {
            return Err(missing("label"));
        }
        let mut all = Self::default();
        for (row, record) in reader.records().enumerate() {
            let record = record.map_err(malformed)?;
            let cell = |at: usize, name: &str| match record.get(at).map(str::trim) {
                Some(cell) if !cell.is_empty() => Ok(cell.to_string()),
                _ => Err(Error::input(path.display(), format!("row {} has no {name}", row + 1))),
            };
            all.texts.push(cell(text, "text")?);
            if let Some(label) = label {
                all.labels.push(cell(label, "label")?);
            }
        }
        if all.texts.is_empty() {
            return Err(Error::input(path.display(), "holds no texts"));
        }
        Ok(all)
    }

    /// The labels that occur, numbers by their value.
    pub fn classes(&self) -> Vec<String> {
        let mut classes = self.labels.clone();
        classes.sort_by(|a, b| match (a.parse::<f64>(), b.parse::<f64>()) {
            (Ok(a), Ok(b)) => a.total_cmp(&b),
            _ => a.cmp(b),
        });
        classes.dedup();
        classes
    }

    /// Token numbers, `length` a text, and labels as numbers of `classes`.
    ///
    /// # Errors
    /// When a label is none of the classes.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        length: usize,
        classes: &[String],
        place: &Path,
    ) -> Result<Examples> {
        let mut ids = Vec::with_capacity(self.texts.len() * length);
        for text in &self.texts {
            let tokens = tokenizer
                .encode(text.as_str(), false)
                .map_err(|e| Error::work("the tokenizer failed on a text").caused_by(e))?;
            let tokens = std::iter::once(START).chain(tokens.get_ids().iter().map(|&id| i64::from(id)));
            ids.extend(tokens.chain(std::iter::repeat(PAD)).take(length));
        }
        let number = |(row, label): (usize, &String)| {
            classes.iter().position(|class| class == label).ok_or_else(|| {
                Error::input(place.display(), format!("row {} has the label \"{label}\"", row + 1))
                    .hint(format!("the model knows {}", classes.join(", ")))
            })
        };
        let labels = self.labels.iter().enumerate().map(number).collect::<Result<_>>()?;
        Ok(Examples { shape: vec![length], values: Numbers::Ints(ids), labels, classes: classes.to_vec() })
    }

    /// Learns a vocabulary of word pieces.
    ///
    /// # Errors
    /// When that fails.
    pub fn learn_vocabulary(&self, size: usize) -> Result<Tokenizer> {
        let failed = |e: tokenizers::Error| Error::work("cannot learn a vocabulary").caused_by(e);
        let model = WordPiece::builder().unk_token("[UNK]".into()).build().map_err(failed)?;
        let mut tokenizer = Tokenizer::new(model);
        tokenizer.with_normalizer(Some(BertNormalizer::default()));
        tokenizer.with_pre_tokenizer(Some(BertPreTokenizer));
        let special = SPECIAL.iter().map(|token| AddedToken::from(*token, true)).collect();
        let trainer = WordPieceTrainerBuilder::new()
            .vocab_size(size)
            .min_frequency(2)
            .special_tokens(special)
            .show_progress(false)
            .build();
        let mut trainer = TrainerWrapper::from(trainer);
        tokenizer.train(&mut trainer, self.texts.iter().map(String::as_str)).map_err(failed)?;
        Ok(tokenizer)
    }
}

/// A tokenizer as it is kept in a model folder.
///
/// # Errors
/// When it has no such form.
pub fn to_json(tokenizer: &Tokenizer) -> Result<String> {
    tokenizer.to_string(false).map_err(|e| Error::work("cannot write the vocabulary").caused_by(e))
}

/// Reads a tokenizer.
///
/// # Errors
/// When the file is missing or is none.
pub fn open_tokenizer(path: &Path) -> Result<Tokenizer> {
    Tokenizer::from_file(path).map_err(|e| Error::input(path.display(), "is not a tokenizer").caused_by(e))
}

/// Reads examples that a network with this input and these classes can classify.
///
/// # Errors
/// When they cannot be read, or do not fit.
pub fn read(
    path: &Path,
    input: Input,
    classes: &[String],
    white: f64,
    tokenizer: Option<&Tokenizer>,
    labelled: bool,
) -> Result<Examples> {
    match (input, tokenizer) {
        (Input::Text { length, .. }, Some(tokenizer)) => {
            Texts::read(path, labelled)?.encode(tokenizer, length, classes, path)
        }
        (Input::Text { .. }, None) => Err(Error::work("the model folder holds no tokenizer")),
        (Input::Image(shape), _) => {
            let options =
                ImageOptions { white: Some(white), unlabelled: !labelled, ..ImageOptions::default() };
            let images = Images::read(&images_file(path), &options)?;
            if images.shape != shape {
                return Err(Error::input(
                    path.display(),
                    format!("the images are {:?}, channels first", images.shape),
                )
                .hint(format!("the model was made for {shape:?}")));
            }
            Ok(Examples::of_images(images.with_classes(classes, path)?))
        }
    }
}

/// Reads tensors for a network of unknown origin: `x [n, ..shape]` and `y [n]` of an `.npz` file, or images.
///
/// # Errors
/// When they cannot be read, or do not fit.
pub fn read_for_port(path: &Path, shape: &[usize], kind: PortKind, labelled: bool) -> Result<Examples> {
    if path.extension().is_none_or(|extension| extension != "npz") {
        let options = ImageOptions { unlabelled: !labelled, ..ImageOptions::default() };
        let images = Images::read(&images_file(path), &options)?;
        if images.shape[..] != *shape {
            return Err(Error::input(
                path.display(),
                format!("the images are {:?}, channels first", images.shape),
            )
            .hint(format!("the network reads {shape:?}")));
        }
        return Ok(Examples::of_images(images));
    }
    let mut file = read_npz(path)?;
    let x = file.take("x")?;
    let rows = x.shape.first().copied().unwrap_or(0);
    if rows == 0 || x.shape[1..] != *shape {
        return Err(Error::input(path.display(), format!("\"x\" has the shape {:?}", x.shape))
            .hint(format!("the network reads {shape:?}, so that \"x\" is [n, ..] of them")));
    }
    let values = match (x.values, kind) {
        (Values::Float(values), PortKind::Float) => Numbers::Floats(values),
        (Values::Int(values), PortKind::Int) => Numbers::Ints(values),
        (Values::Int(values), PortKind::Float) => Numbers::Floats(values.iter().map(|&x| x as f32).collect()),
        (Values::Float(_), PortKind::Int) => {
            return Err(Error::input(path.display(), "\"x\" holds floats, the network reads whole numbers"));
        }
    };
    if let Numbers::Floats(values) = &values
        && let Some(at) = values.iter().position(|x| !x.is_finite())
    {
        let row = at / shape.iter().product::<usize>().max(1);
        return Err(Error::input(
            path.display(),
            format!("row {row} of \"x\" has a number that is not finite"),
        ));
    }
    let labels = match file.take("y") {
        Ok(y) if y.shape == [rows] => match y.values {
            Values::Int(labels) if labels.iter().all(|&label| label >= 0) => {
                labels.iter().map(|&label| label as usize).collect()
            }
            _ => {
                return Err(Error::input(
                    path.display(),
                    "\"y\" must hold the numbers of classes, from 0 on",
                ));
            }
        },
        Ok(y) => {
            return Err(Error::input(
                path.display(),
                format!("\"y\" has the shape {:?}, must have [{rows}]", y.shape),
            ));
        }
        Err(_) if labelled => {
            return Err(Error::input(path.display(), "has no labels \"y\"").hint("accuracy needs them"));
        }
        Err(_) => Vec::new(),
    };
    let classes = labels.iter().max().map_or(0, |most| most + 1);
    let classes = (0..classes).map(|class| class.to_string()).collect();
    Ok(Examples { shape: shape.to_vec(), values, labels, classes })
}

/// In a folder of IDX files the first whose name says that it holds images to train on; else the path itself.
pub fn images_file(path: &Path) -> std::path::PathBuf {
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut files: Vec<_> =
        entries.filter(|file| file.is_file() && file.to_string_lossy().contains("images-idx3")).collect();
    files.sort_by_key(|file| !file.to_string_lossy().contains("train"));
    files.into_iter().next().unwrap_or_else(|| path.into())
}

/// The input of a network for these images.
pub fn image_input(arch: Arch, images: &Images) -> Result<Input> {
    match arch {
        Arch::Bert => {
            Err(Error::usage("bert-s reads texts, not images").hint("--arch resnet-s or mobilenetv2-s"))
        }
        _ => Ok(Input::Image(images.shape)),
    }
}

/// The network for texts, texts to train it on and texts held out.
///
/// # Errors
/// When a file cannot be read, or the texts held out have other classes.
pub fn learnt_texts(
    train: &Path,
    test: &Path,
    length: usize,
) -> Result<(ClassifierConfig, Examples, Examples)> {
    let texts = Texts::read(train, true)?;
    let tokenizer = texts.learn_vocabulary(VOCABULARY)?;
    let classes = texts.classes();
    let input = Input::Text { vocabulary: tokenizer.get_vocab_size(true), length };
    let config = ClassifierConfig::new(Arch::Bert, input, classes.len());
    let test_examples = Texts::read(test, true)?.encode(&tokenizer, length, &classes, test)?;
    Ok((config, texts.encode(&tokenizer, length, &classes, train)?, test_examples))
}
