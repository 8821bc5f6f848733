//! Burn modules on many devices.

use burn::module::Module;
use burn::tensor::{Device, DispatchTensor, Tensor, TensorData};
use kiln_cluster::Communicator;
use kiln_compiler::Graph;
use kiln_core::{Context, Error, Network, Port, PortKind, Result, TensorFile};

use crate::case::KIND;
use crate::compile::{Compiler, Parallel};
use crate::execute::{Feed, Rank, Run};
use crate::graph::{Logical, Variable};
use crate::network::{Loss, Trainee, for_batch, named_weights};
use crate::physical::Physical;
use crate::sbp::Placement;
use crate::train::{Trained, train};

/// A module that was written for one device, on the devices of a placement.
pub struct GlobalModule {
    trainee: Trainee,
    placement: Placement,
    parallel: Parallel,
}

impl GlobalModule {
    /// Captures what `forward` computes for an input of a shape, `[batch, …]`. The compiler chooses how tensors lie.
    ///
    /// # Errors
    /// When the module cannot be captured: it must not look at the elements of a tensor.
    pub fn wrap<M, const D: usize, const E: usize>(
        module: M,
        shape: [usize; D],
        forward: impl Fn(&M, Tensor<D>) -> Tensor<E> + Clone + Send + 'static,
        placement: &Placement,
    ) -> Result<Self>
    where
        M: Module + 'static,
    {
        let file = TensorFile::from_module(&module);
        let captured = |module: M| {
            let network = Wrapped { module, forward: forward.clone(), shape };
            for_batch(Box::new(network), shape.first().copied().unwrap_or(1))
        };
        let graph = captured(module.clone())?;
        let (graph, weights) =
            named_weights(graph, &file, |traced| captured(traced.into_module(module.clone())?))?;
        let trainee = Trainee::from_module(graph, weights, file);
        Ok(Self { trainee, placement: placement.clone(), parallel: Parallel::Auto })
    }

    /// With inputs split, or variables, in the place of the compiler's choice.
    #[must_use]
    pub fn parallel(mut self, parallel: Parallel) -> Self {
        self.parallel = parallel;
        self
    }

    /// What it computes.
    pub fn graph(&self) -> &Graph {
        &self.trainee.graph
    }

    /// How it lies on the devices.
    ///
    /// # Errors
    /// As [`Compiler::compile`].
    pub fn plan(&self) -> Result<Physical> {
        self.compiled(&Logical::of(self.trainee.graph.clone())?)
    }

    fn compiled(&self, logical: &Logical) -> Result<Physical> {
        Compiler::new(logical.clone()).parallel(self.parallel, &self.placement).compile(&self.placement)
    }

    /// The output for an input, whole, on every rank. All ranks of the placement call it.
    ///
    /// # Errors
    /// When the input has another shape, or as [`Rank::run`].
    pub fn forward(&self, world: &Communicator, x: &TensorData) -> Result<TensorData> {
        let logical = Logical::of(self.trainee.graph.clone())?;
        let physical = self.compiled(&logical)?;
        let rank = Rank::new(&physical, &logical, world)?;
        let mut done = rank.run(&Run::default(), &|_| Ok(vec![x.clone()]))?;
        let part = done.outputs.pop().and_then(|mut outputs| outputs.pop());
        rank.output(0, part.ok_or_else(|| Error::work("the module has no output"))?)
    }

    /// Trains for `run.pieces` steps; `feed` gives the input and what is to be predicted, `[batch, 1]` classes for
    /// [`Loss::CrossEntropy`], or numbers of the output's shape. All ranks of the placement call it.
    ///
    /// # Errors
    /// When an operation has no derivative, the loss is no number, or as [`Rank::run`].
    pub fn train(&self, world: &Communicator, loss: Loss, run: &Run, feed: &Feed<'_>) -> Result<Trained> {
        let (objective, values) = self.trainee.objective(0, loss)?;
        let logical = Logical::training(&objective, "loss", &values)?;
        train(&self.compiled(&logical)?, &logical, world, run, feed, &Context::new(), &|_| {})
    }

    /// Takes over what training gave.
    pub fn set(&mut self, variables: &[Variable]) {
        self.trainee.set(variables);
    }

    /// Its weights as a module's: `module.weights().into_module(burn_module)`.
    pub fn weights(&self) -> TensorFile {
        self.trainee.file()
    }
}

/// A module with what is computed by it, from a tensor of `D` axes to one of `E`.
struct Wrapped<M, F, const D: usize, const E: usize> {
    module: M,
    forward: F,
    shape: [usize; D],
}

impl<M, F, const D: usize, const E: usize> Network for Wrapped<M, F, D, E>
where
    M: Module,
    F: Fn(&M, Tensor<D>) -> Tensor<E> + Send,
{
    fn kind(&self) -> &str {
        KIND
    }

    fn inputs(&self) -> Vec<Port> {
        vec![Port { name: "x".into(), kind: PortKind::Float, shape: self.shape.to_vec() }]
    }

    /// The shape is that which is recorded.
    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "output".into(), kind: PortKind::Float, shape: Vec::new() }]
    }

    fn move_to(&mut self, device: &Device) {
        self.module = self.module.clone().to_device(device);
    }

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let outputs = inputs.into_iter().map(|x| (self.forward)(&self.module, Tensor::from_dispatch(x)));
        outputs.map(Tensor::into_dispatch).collect()
    }
}
