//! A trained language model as a [`Network`], for capture.

use std::path::Path;

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Int, Tensor};
use kiln_core::{Context, Network, Port, PortKind, Result};
use kiln_nn::LanguageModel;

use crate::checkpoint::{self, KIND};
use crate::lm::Lm;

/// Length of the example input; a captured graph has it fixed.
const EXAMPLE_TIME: usize = 64;

/// From token ids to logits.
pub(crate) struct LmNetwork {
    model: Lm,
}

impl LmNetwork {
    pub fn open(path: &Path, cx: &Context) -> Result<Self> {
        Ok(Self { model: checkpoint::open(path, cx)?.model })
    }
}

impl Network for LmNetwork {
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        vec![Port { name: "ids".into(), kind: PortKind::Int, shape: vec![1, EXAMPLE_TIME] }]
    }

    fn outputs(&self) -> Vec<Port> {
        let shape = vec![1, EXAMPLE_TIME, self.model.vocab_size()];
        vec![Port { name: "logits".into(), kind: PortKind::Float, shape }]
    }

    fn move_to(&mut self, device: &Device) {
        self.model = self.model.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        inputs
            .into_iter()
            .map(|ids| self.model.forward(Tensor::<2, Int>::from_dispatch(ids)).into_dispatch())
            .collect()
    }
}
