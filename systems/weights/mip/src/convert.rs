//! Any network as one whose weights depend on a condition (§4.2 of the paper: the additive formulation).

use std::path::Path;

use burn::module::{Module, ModuleDisplay, Param};
use burn::tensor::{Device, Tensor};
use kiln_core::{Result, TensorFile, Values};
use kiln_nn::{WeightSpec, Weights, initialise};
use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::encoding::Encoding;
use crate::hypernet::{HyperNet, HyperNetConfig, OutputInit};
use crate::weight_norm;

/// The four arms of the paper's comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Parametrisation {
    /// Constant-norm input and additive output
    Mip,
    /// Neither: the condition goes in as it is, and all of a weight comes out
    Default,
    /// Constant-norm input only
    Encode,
    /// Additive output only
    Residual,
}

impl Parametrisation {
    /// How the condition enters.
    pub fn encoding(self) -> Encoding {
        match self {
            Self::Mip | Self::Encode => Encoding::CosSin,
            Self::Default | Self::Residual => Encoding::None,
        }
    }

    /// Whether what comes out is added to weights of the network's own.
    pub fn is_additive(self) -> bool {
        matches!(self, Self::Mip | Self::Residual)
    }

    /// How the output layer is drawn: small beside a network's own weights, or as large as they would be.
    pub fn output_init(self) -> OutputInit {
        if self.is_additive() { OutputInit::FanOut } else { OutputInit::FanIn }
    }
}

/// How a network becomes a [`MipHyper`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MipConfig {
    /// Which parameters depend on the condition, as [`WeightSpec::select`] reads it: names with `*` for any characters,
    /// `re:` and a regular expression, `type:` and the type of a layer.
    pub select: Vec<String>,
    /// The hypernetwork.
    pub hypernet: HyperNetConfig,
    /// Whether what it makes is added to the network's own parameters; otherwise these begin at 0.
    pub additive: bool,
    /// Whether the network's own values of these parameters stay as they are in training.
    pub freeze_base: bool,
    /// Whether of the weights that are made only the direction counts (weight norm).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub weight_norm: bool,
}

impl MipConfig {
    /// All parameters, with the paper's hypernetwork, for conditions of `gamma_dim` numbers.
    pub fn new(gamma_dim: usize) -> Self {
        Self {
            select: vec!["*".into()],
            hypernet: HyperNetConfig::new(gamma_dim),
            additive: true,
            freeze_base: false,
            weight_norm: false,
        }
    }

    /// Only the parameters that match one of the patterns.
    pub fn with_select(mut self, patterns: &[&str]) -> Self {
        self.select = patterns.iter().map(ToString::to_string).collect();
        self
    }

    /// Other hidden widths.
    pub fn with_hidden(mut self, hidden: &[usize]) -> Self {
        self.hypernet.hidden = hidden.to_vec();
        self
    }

    /// One of the four arms.
    pub fn with_parametrisation(mut self, parametrisation: Parametrisation) -> Self {
        self.hypernet.encoding = parametrisation.encoding();
        self.hypernet.output_init = parametrisation.output_init();
        self.additive = parametrisation.is_additive();
        self
    }

    /// The parameters of a network that will depend on the condition.
    ///
    /// # Errors
    /// When the settings do not fit, or a pattern matches no parameter or one that is not trained.
    pub fn check<M: Module>(&self, module: &M) -> Result<WeightSpec> {
        self.hypernet.check()?;
        let patterns: Vec<&str> = self.select.iter().map(String::as_str).collect();
        WeightSpec::of(module).select(&patterns)
    }

    /// Draws a hypernetwork for a network. Those of its parameters that are selected become θ0.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn init<M: Module>(&self, module: M, device: &Device) -> Result<MipHyper<M>> {
        let spec = self.check(&module)?;
        let lengths = if self.weight_norm { weight_norm::own_lengths(&module, &spec)? } else { Vec::new() };
        let base = if self.additive { module } else { zeroed(module, &spec)? };
        let hyper = self.hypernet.init(&spec, device);
        Ok(MipHyper { hyper, base, lengths, spec, freeze_base: self.freeze_base })
    }

    /// Draws a hypernetwork for a network from a random stream, the same every time.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub fn draw<M: Module + ModuleDisplay>(
        &self,
        module: M,
        rng: &mut impl Rng,
        device: &Device,
    ) -> Result<MipHyper<M>> {
        self.check(&module)?;
        Ok(initialise(device, rng, |device| {
            self.init(module, device).expect("the settings were checked just above")
        }))
    }
}

/// The module with zeros for the parameters of `spec`.
fn zeroed<M: Module>(module: M, spec: &WeightSpec) -> Result<M> {
    let mut file = TensorFile::from_module(&module);
    for param in spec.params() {
        let mut tensor = file.take(&param.name)?;
        tensor.values = Values::Float(vec![0.0; param.len()]);
        file.insert(param.name.clone(), tensor);
    }
    file.into_module(module)
}

/// A network whose parameters, or some of them, depend on a condition `γ`: `θ = θ0 + h(E(γ))`.
///
/// θ0 are the network's own parameters, by their own names; training reaches them as it reaches `h`.
#[derive(Module, Debug)]
pub struct MipHyper<M: Module> {
    /// h
    pub hyper: HyperNet,
    /// The network; its selected parameters are θ0, the others do not depend on the condition.
    pub base: M,
    /// With weight norm, lengths of the weights of every output of a tensor.
    pub lengths: Vec<Param<Tensor<1>>>,
    #[module(skip)]
    spec: WeightSpec,
    freeze_base: bool,
}

impl<M: Module> MipHyper<M> {
    /// The parameters that depend on the condition.
    pub fn spec(&self) -> &WeightSpec {
        &self.spec
    }

    /// θ for conditions, one after another as [`spec`](Self::spec) lists them.
    ///
    /// # Shapes
    /// - gamma: `[batch, k]`
    /// - output: `[batch, weights]`
    ///
    /// # Errors
    /// When the network is no longer the one that was converted.
    pub fn generate(&self, gamma: Tensor<2>) -> Result<Tensor<2>> {
        let own = self.spec.read(&self.base)?;
        let own = if self.freeze_base { own.without_autodiff() } else { own };
        let theta = self.hyper.forward(gamma) + own.unsqueeze_dim::<2>(0);
        Ok(if self.lengths.is_empty() {
            theta
        } else {
            weight_norm::normalised(theta, &self.spec, &self.lengths)
        })
    }

    /// θ by name, for one condition `[k]`.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn weights(&self, gamma: Tensor<1>) -> Result<Weights> {
        self.spec.split(self.generate(gamma.unsqueeze_dim::<2>(0))?.squeeze_dim::<1>(0))
    }

    /// The network for one condition `[k]`. Its loss has gradients for `h`, θ0 and the other parameters; those that do not
    /// depend on the condition are shared with [`base`](Self::base), not copied.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn instantiate(&self, gamma: Tensor<1>) -> Result<M> {
        self.weights(gamma)?.fill(&self.base)
    }

    /// What `run` makes of the network for one condition `[k]`, such as a loss.
    ///
    /// # Errors
    /// As [`generate`](Self::generate).
    pub fn forward_with<R>(&self, gamma: Tensor<1>, run: impl FnOnce(&M) -> R) -> Result<R> {
        Ok(run(&self.instantiate(gamma)?))
    }

    /// Writes the network for one condition `[k]` into a `.safetensors` file of its own.
    ///
    /// # Errors
    /// As [`generate`](Self::generate), and when the file cannot be written.
    pub fn export(&self, gamma: Tensor<1>, path: &Path) -> Result<()> {
        TensorFile::from_module(&self.instantiate(gamma)?).write(path)
    }
}
