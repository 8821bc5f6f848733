//! `kiln megatron eval`, `generate` and `reshard`

use std::path::PathBuf;

use burn::tensor::{Int, Tensor, TensorData};
use clap::{Args, ValueEnum};
use kiln_core::{Context, Error, HostTensor, ModelFolder, Result, TensorFile};
use kiln_data::Tokenizer;
use kiln_nn::{ContinueText, LanguageModel, Score, score_windows, token_nll};
use serde_json::json;

use crate::checkpoint::{Trained, Whole, read_gpt2, write_gpt2};
use crate::data::{read_npy, read_text};
use crate::layout::ParallelLayout;

#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Model folder or checkpoint
    #[arg(long)]
    model: PathBuf,
    /// Text file, folder of text files, .jsonl file, or .npy array of token ids
    #[arg(long, required_unless_present = "tokens")]
    data: Option<PathBuf>,
    /// .npy array [.., seq + 1] of token ids, whose rows are scored apart
    #[arg(long, conflicts_with = "data")]
    tokens: Option<PathBuf>,
    /// Field of a .jsonl file that holds the text
    #[arg(long, default_value = "text")]
    text_field: String,
    /// Also write the logits [rows, seq, vocab] of --tokens, or of the first tokens of --data
    #[arg(long, value_name = "FILE")]
    logits: Option<PathBuf>,
}

impl EvalArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let trained = Trained::open(&self.model, cx)?;
        let score = match (&self.tokens, &self.data) {
            (Some(path), _) => {
                let (ids, shape) = read_npy(path)?;
                let Some(&len) = shape.last().filter(|&&len| len >= 2) else {
                    return Err(Error::input(
                        path.display(),
                        format!("has the shape {shape:?}, expected rows of at least two tokens"),
                    ));
                };
                self.score_rows(&trained, &ids, len, &path.display().to_string(), cx)?
            }
            (None, Some(path)) => {
                let ids = read_text(path, &self.text_field, &trained.tokenizer)?;
                let max_seq = trained.config.max_seq;
                if let Some(path) = &self.logits {
                    let first = &ids[..ids.len().min(max_seq)];
                    self.write_logits(path, logits(&trained, first, first.len(), cx))?;
                }
                let score = score_windows(&trained.model, &ids, max_seq)?;
                let bytes = trained.tokenizer.decode(&ids[1..]).len();
                if bytes > 0 { score.over_bytes(bytes) } else { score }
            }
            (None, None) => return Err(Error::usage("--data or --tokens is needed")),
        };
        cx.emit(&score, |score| {
            let bits = score.bits_per_byte.map_or(String::new(), |bits| format!(", {bits:.4} bits a byte"));
            format!(
                "{:.6} nats a token over {} tokens, perplexity {:.4}{bits}\n",
                score.nll_nats, score.tokens_scored, score.perplexity
            )
        })
    }

    /// Rows of `len` tokens, each scored on its own.
    fn score_rows(
        &self,
        trained: &Trained,
        ids: &[u32],
        len: usize,
        place: &str,
        cx: &Context,
    ) -> Result<Score> {
        let vocab = trained.config.vocab;
        if let Some(at) = ids.iter().position(|&id| id as usize >= vocab) {
            return Err(Error::input(
                place,
                format!("token id {} at {at} is outside the vocabulary of {vocab}", ids[at]),
            ));
        }
        if len - 1 > trained.config.max_seq {
            return Err(Error::input(
                place,
                format!("has rows of {len} tokens, but the model reads at most {}", trained.config.max_seq),
            ));
        }
        let inputs: Vec<u32> = ids.chunks_exact(len).flat_map(|row| &row[..len - 1]).copied().collect();
        let targets: Vec<u32> = ids.chunks_exact(len).flat_map(|row| &row[1..]).copied().collect();
        let logits = logits(trained, &inputs, len - 1, cx);
        let nats = token_nll(logits.clone(), rows(&targets, len - 1, cx));
        if let Some(path) = &self.logits {
            self.write_logits(path, logits)?;
        }
        let nats: Vec<f64> = nats.into_data().iter::<f64>().collect();
        let nll_nats = nats.iter().sum::<f64>() / nats.len() as f64;
        let score =
            Score { tokens_scored: nats.len(), nll_nats, perplexity: nll_nats.exp(), bits_per_byte: None };
        // Without a text there are bytes only where every token is one.
        Ok(match trained.tokenizer {
            Tokenizer::Byte if vocab == 256 => score.over_bytes(nats.len()),
            _ => score,
        })
    }

    fn write_logits(&self, path: &std::path::Path, logits: Tensor<3>) -> Result<()> {
        let mut file = TensorFile::new();
        file.insert("logits", HostTensor::from_tensor(logits));
        file.write(path)
    }
}

fn rows(ids: &[u32], len: usize, cx: &Context) -> Tensor<2, Int> {
    let values: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    Tensor::from_data(TensorData::new(values, [ids.len() / len, len]), &cx.device)
}

fn logits(trained: &Trained, ids: &[u32], len: usize, cx: &Context) -> Tensor<3> {
    trained.model.forward(rows(ids, len, cx))
}

#[derive(Debug, Args)]
pub struct GenerateArgs {
    /// Model folder or checkpoint
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    text: ContinueText,
}

impl GenerateArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        self.text.check()?;
        let trained = Trained::open(&self.model, cx)?;
        self.text.run(&trained.model, &trained.tokenizer, cx)
    }
}

/// Another system's names of the same network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Names {
    /// GPT-2 of Hugging Face
    #[value(name = "gpt2-hf")]
    Gpt2Hf,
}

#[derive(Debug, Args)]
pub struct ReshardArgs {
    /// Model folder, or checkpoint in parts
    #[arg(long)]
    model: PathBuf,
    /// Folder to write
    #[arg(long)]
    out: PathBuf,
    /// Ranks that share every layer
    #[arg(long, default_value_t = 1)]
    tensor: usize,
    /// Ranks that have layers one after another
    #[arg(long, default_value_t = 1)]
    pipeline: usize,
    /// Chunks of layers on each pipeline rank
    #[arg(long, default_value_t = 1)]
    chunks: usize,
    /// Layers of each stage, where they are not all alike
    #[arg(long, value_delimiter = ',')]
    stage_layers: Option<Vec<usize>>,
    /// Write parts and the optimiser's state even for one rank
    #[arg(long)]
    parts: bool,
    /// Names that --model has
    #[arg(long, value_enum)]
    from: Option<Names>,
    /// Names to write
    #[arg(long, value_enum)]
    to: Option<Names>,
}

impl ReshardArgs {
    pub fn run(&self, cx: &Context) -> Result<()> {
        let whole = match self.from {
            Some(Names::Gpt2Hf) => read_gpt2(&self.model)?,
            None => Whole::read(&self.model)?,
        };
        let layout = ParallelLayout {
            stage_layers: self.stage_layers.clone(),
            ..ParallelLayout::new(self.tensor, self.pipeline, 1).with_chunks(self.chunks)
        };
        layout.check(&whole.config)?;
        let folder = ModelFolder::new(&self.out);
        if folder.path().join("COMPLETE").exists() {
            return Err(Error::usage(format!("{} holds a checkpoint already", self.out.display()))
                .hint("give another --out, or remove it first"));
        }
        let one = layout.stages() * layout.tensor == 1 && !self.parts;
        match self.to {
            Some(Names::Gpt2Hf) if !one => {
                return Err(Error::usage("GPT-2's layout is one file")
                    .hint("leave out --tensor, --pipeline and --chunks"));
            }
            Some(Names::Gpt2Hf) => write_gpt2(&whole, &folder)?,
            None if one => whole.write_model(&folder)?,
            None => whole.write_parts(&folder, &layout)?,
        }
        let source = ModelFolder::new(&self.model);
        if source.file("tokenizer.json").exists() {
            Tokenizer::open(&source)?.save(&folder)?;
        }
        let files = if one { 1 } else { layout.pipeline * layout.tensor };
        let result = json!({ "out": self.out, "parameters": whole.config.parameters(), "files": files, "layout": layout,
            "optimiser": whole.moments.is_some() && !one });
        cx.emit(&result, |_| {
            format!(
                "{} parameters in {files} part{} in {}\n",
                whole.config.parameters(),
                if files == 1 { "" } else { "s" },
                self.out.display()
            )
        })
    }
}
