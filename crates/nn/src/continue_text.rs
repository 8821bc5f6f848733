//! The options of every command that continues a text, and what it does.

use std::fs;
use std::io::Read;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use clap::Args;
use kiln_core::{Context, Error, HostTensor, OutputMode, Result, TensorFile};
use kiln_data::{StoppedText, Tokenizer};
use serde_json::json;

use crate::{LanguageModel, Sampling, generate};

/// The tensor of a state file that holds the token to go on from.
const LAST_TOKEN: &str = "last_token";

/// Prompt, sampling and output of `generate` commands.
#[derive(Debug, Args)]
pub struct ContinueText {
    /// Text to continue
    #[arg(long, conflicts_with = "prompt_file")]
    prompt: Option<String>,
    /// File with the text to continue; - is standard input
    #[arg(long)]
    prompt_file: Option<PathBuf>,
    /// Most tokens to write
    #[arg(long, visible_alias = "length", default_value_t = 200)]
    max_tokens: usize,
    /// Above 1 wilder, below 1 tamer
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among so many likeliest tokens; 0 is all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Choose among the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Always take the likeliest token
    #[arg(long)]
    greedy: bool,
    /// Above 1, tokens already there become less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Stop before this text appears
    #[arg(long)]
    stop: Option<String>,
    /// Go on from the state in this file
    #[arg(long, value_name = "FILE")]
    state_in: Option<PathBuf>,
    /// Save the state at the end to this file
    #[arg(long, value_name = "FILE")]
    state_out: Option<PathBuf>,
    /// Write tokens as they come
    #[arg(long)]
    stream: bool,
}

impl ContinueText {
    /// Makes sure that the options make sense, before a model is read for them.
    ///
    /// # Errors
    /// Names the first that does not.
    pub fn check(&self) -> Result<()> {
        self.sampling().check()
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            greedy: self.greedy,
            repetition_penalty: self.repetition_penalty,
        }
    }

    /// Continues the prompt and prints what comes.
    ///
    /// # Errors
    /// When the prompt or a state cannot be read, or the model gives no finite logits.
    pub fn run<M: LanguageModel>(&self, model: &M, tokenizer: &Tokenizer, cx: &Context) -> Result<()> {
        let mut prompt = tokenizer.encode(&self.prompt()?)?;
        let mut state = model.initial_state(1, &cx.device);
        if let Some(path) = &self.state_in {
            let last;
            (state, last) = load_state(model, path, cx)?;
            prompt.insert(0, last);
        }
        if prompt.is_empty() {
            let start = tokenizer.start_token();
            cx.note(format!("the prompt is empty; starting from token {start}"));
            prompt.push(start);
        }

        let streamed = self.stream && cx.output != OutputMode::Json;
        let mut output = StoppedText::new(tokenizer, self.stop.as_deref());
        let mut failure = None;
        let on_token = |id| {
            let piece = output.push(id);
            if streamed && let Err(error) = cx.print(&piece) {
                failure = Some(error);
                return ControlFlow::Break(());
            }
            if output.stopped() || cx.interrupted() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let mut rng = cx.rng("generate", 0);
        let (ids, state) =
            generate(model, &prompt, state, &self.sampling(), self.max_tokens, &mut rng, on_token)?;
        if let Some(error) = failure {
            return Err(error);
        }
        let rest = output.finish();
        if let Some(path) = &self.state_out {
            let last = ids.last().or(prompt.last()).copied().unwrap_or_else(|| tokenizer.start_token());
            save_state(model, state, last, path)?;
        }
        match streamed {
            true => cx.print(&format!("{rest}\n")),
            false => {
                cx.emit(&json!({ "ids": ids, "text": output.text() }), |_| format!("{}\n", output.text()))
            }
        }
    }

    fn prompt(&self) -> Result<Vec<u8>> {
        match (&self.prompt, &self.prompt_file) {
            (Some(prompt), _) => Ok(prompt.clone().into_bytes()),
            (None, Some(path)) if path == Path::new("-") => {
                let mut text = Vec::new();
                std::io::stdin().read_to_end(&mut text).map_err(Error::io("read", "standard input"))?;
                Ok(text)
            }
            (None, Some(path)) => fs::read(path).map_err(Error::io("read", path)),
            (None, None) => Ok(Vec::new()),
        }
    }
}

/// Saves a state, and the last token, which the state has not read yet.
fn save_state<M: LanguageModel>(model: &M, state: M::State, last: u32, path: &Path) -> Result<()> {
    let mut file = model.state_to_tensors(state)?;
    file.insert(LAST_TOKEN, HostTensor::int([1], vec![last.into()]));
    file.write(path)
}

/// Loads a state that [`save_state`] wrote, and the token to go on from.
fn load_state<M: LanguageModel>(model: &M, path: &Path, cx: &Context) -> Result<(M::State, u32)> {
    const OTHER_MODEL: &str = "the state was saved with another model";
    let mut file = TensorFile::read(path)?;
    let last = file.take(LAST_TOKEN)?;
    let last = match last.as_ints() {
        Some(&[id]) if (0..model.vocab_size() as i64).contains(&id) => id as u32,
        _ => return Err(Error::input(path.display(), "\"last_token\" is no token of this model")),
    };
    let state = model.state_from_tensors(&mut file, &cx.device).map_err(|error| error.hint(OTHER_MODEL))?;
    match file.names().next() {
        Some(name) => {
            Err(Error::input(path.display(), format!("tensor \"{name}\" has no place in this model"))
                .hint(OTHER_MODEL))
        }
        None => Ok((state, last)),
    }
}
