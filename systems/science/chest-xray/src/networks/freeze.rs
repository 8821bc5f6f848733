//! Networks of which only a part learns.

use std::fmt;
use std::str::FromStr;

use burn::module::{Flag, Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use kiln_core::{Error, ModulePath, Result};
use serde::{Deserialize, Serialize};

use super::names::{state, torchvision_name};

/// Which parameters stay as they are.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Freeze {
    /// None
    #[default]
    None,
    /// All but the classifier
    Backbone,
    /// All before the first whose name begins so
    Until(String),
}

impl fmt::Display for Freeze {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Backbone => f.write_str("backbone"),
            Self::Until(name) => write!(f, "until:{name}"),
        }
    }
}

impl FromStr for Freeze {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "backbone" => Ok(Self::Backbone),
            Some(("until", name)) if !name.is_empty() => Ok(Self::Until(name.into())),
            _ => Err(format!("\"{text}\" is none of none, backbone, until:NAME")),
        }
    }
}

impl TryFrom<String> for Freeze {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Freeze> for String {
    fn from(freeze: Freeze) -> Self {
        freeze.to_string()
    }
}

impl Freeze {
    /// Freezes a module whose classifier is at `head`.
    ///
    /// # Errors
    /// When no parameter has the name to freeze until.
    pub fn apply<M: Module>(&self, module: M, head: &[&str]) -> Result<M> {
        match self {
            Self::None => Ok(module),
            Self::Backbone => Ok(freeze(module, |name| !head.iter().any(|head| name.starts_with(head)))),
            Self::Until(until) => {
                let names: Vec<String> = state(&module).into_iter().map(|(name, _)| name).collect();
                let Some(first) = names.iter().position(|name| name.starts_with(until.as_str())) else {
                    let shown = names.first().cloned().unwrap_or_default();
                    return Err(Error::usage(format!("no parameter begins with \"{until}\""))
                        .hint(format!("names are those of torchvision, such as {shown}")));
                };
                let frozen = &names[..first];
                Ok(freeze(module, |name| frozen.iter().any(|frozen| frozen.starts_with(name))))
            }
        }
    }
}

/// The module with the parameters that `chosen` names frozen. A batch norm among them keeps its running statistics and a
/// dropout drops nothing.
pub fn freeze<M: Module>(module: M, chosen: impl Fn(&str) -> bool) -> M {
    module.map(&mut Freezer { path: ModulePath::default(), chosen })
}

struct Freezer<F> {
    path: ModulePath,
    chosen: F,
}

impl<F: Fn(&str) -> bool> ModuleMapper for Freezer<F> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match (self.chosen)(&torchvision_name(&self.path.name())) {
            true => param.set_require_grad(false),
            false => param,
        }
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        // A flag goes with the parameters of its layer.
        let name = torchvision_name(&self.path.name());
        let layer = name.rfind('.').map_or("", |dot| &name[..=dot]);
        match (self.chosen)(layer) {
            true => flag.with_value(false),
            false => flag,
        }
    }
}
