//! What every network over token ids has in common.

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::{Error, Result, TensorFile};

/// An autoregressive network over token ids.
///
/// Feeding a text in pieces, each with the state that the piece before returned, gives the same logits
/// as feeding it whole.
pub trait LanguageModel: Module {
    /// What the network remembers of the tokens it has read.
    type State: Clone + Send;

    /// The number of token ids.
    fn vocab_size(&self) -> usize;

    /// Logits of the next token at every position.
    ///
    /// # Shapes
    /// - ids: `[batch, time]`
    /// - output: `[batch, time, vocab]`
    fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3>;

    /// The state before the first token.
    fn initial_state(&self, batch: usize, device: &Device) -> Self::State;

    /// As [`forward`](Self::forward), continuing from `state`; any `time` of at least one token.
    fn forward_with_state(&self, ids: Tensor<2, Int>, state: Self::State) -> (Tensor<3>, Self::State);

    /// The state of one text as tensors to be kept in a file.
    ///
    /// # Errors
    /// When this network's states are not kept: those that grow with the text are as large as the text is long.
    fn state_to_tensors(&self, _state: Self::State) -> Result<TensorFile> {
        Err(unkept())
    }

    /// Takes a state out of a file that holds what [`state_to_tensors`](Self::state_to_tensors) made.
    ///
    /// # Errors
    /// When this network's states are not kept, or a tensor is missing or of another shape.
    fn state_from_tensors(&self, _file: &mut TensorFile, _device: &Device) -> Result<Self::State> {
        Err(unkept())
    }
}

fn unkept() -> Error {
    Error::usage("the state of this kind of model grows with the text and is not kept in files")
        .hint("give the whole text as the prompt")
}

/// Token ids as one row `[1, time]` on `device`.
pub fn ids_to_tensor(ids: &[u32], device: &Device) -> Tensor<2, Int> {
    let values: Vec<i64> = ids.iter().map(|&id| id.into()).collect();
    Tensor::from_data(TensorData::new(values, [1, ids.len()]), device)
}

/// Where the model's parameters live.
pub(crate) fn model_device<M: LanguageModel>(model: &M) -> Device {
    model.devices().into_iter().next().expect("a language model has parameters")
}

/// Makes sure that every id is in the vocabulary; `place` says where the ids come from.
pub(crate) fn check_ids(ids: &[u32], vocab_size: usize, place: &str) -> Result<()> {
    match ids.iter().position(|&id| id as usize >= vocab_size) {
        Some(at) => {
            let found = format!("token id {} at {at} is outside the vocabulary of {vocab_size}", ids[at]);
            Err(Error::input(place, found).hint("was the text cut by another tokenizer than the model's?"))
        }
        None => Ok(()),
    }
}
