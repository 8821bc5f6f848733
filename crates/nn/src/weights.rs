//! Modules that run with weights from outside, such as those that a hypernetwork makes.
//!
//! [`WeightSpec`] lists the trainable parameters of any module, [`Weights`] holds tensors for some or all of them and
//! puts them into a copy of the module. The tensors keep their place in the autodiff graph, so that a loss of the copy
//! has gradients for whatever made them:
//!
//! ```
//! # use burn::tensor::{Device, Distribution, Tensor};
//! # use kiln_nn::{LinearConfig, WeightSpec};
//! # let device = Device::flex();
//! # let net = LinearConfig::new(3, 2).init(&device);
//! # let x = Tensor::<2>::ones([4, 3], &device);
//! # let hyper = LinearConfig::new(5, 8).init(&device);
//! # let condition = Tensor::<1>::ones([5], &device);
//! let spec = WeightSpec::of(&net);
//! let y = spec.split(hyper.forward(condition))?.fill(&net)?.forward(x);
//! # assert_eq!(y.dims(), [4, 2]);
//! # Ok::<(), kiln_core::Error>(())
//! ```
//!
//! A parameter holds any tensor, but Burn lets only leaves of the graph *require* a gradient; a tensor that was
//! computed must therefore enter with `Param::initialized`, which leaves it as it is, not with `Param::from_tensor`.

use std::collections::{BTreeMap, BTreeSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::Tensor;
use kiln_core::{Error, ModulePath, Result};
use regex::Regex;
use serde::{Deserialize, Serialize};

/// Names that an error lists at most.
const LISTED: usize = 12;

/// One parameter of a module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParamSpec {
    /// Its name in model files, such as `layers.0.weight`.
    pub name: String,
    /// Its shape in the module: a linear weight is `[in, out]`, which files transpose.
    pub shape: Vec<usize>,
    /// The type of the module that holds it, such as `Linear`.
    pub holder: String,
}

impl ParamSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many inputs an output of the layer sums over; `None` for biases and norms.
    pub fn fan_in(&self) -> Option<usize> {
        match (self.shape.as_slice(), self.holder.as_str()) {
            ([] | [_], _) => None,
            // Each output of an embedding is one of its elements.
            (_, "Embedding") => Some(1),
            ([fan_in, _], "Linear") => Some(*fan_in),
            ([_, rest @ ..], _) => Some(rest.iter().product()),
        }
    }
}

/// The trainable parameters of a module, or some of them, in the order of its fields.
///
/// Laid one after another, row-major, they are one vector of [`numel`](Self::numel) numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct WeightSpec {
    params: Vec<ParamSpec>,
    /// Names of running statistics and frozen parameters, which are never replaced.
    fixed: Vec<String>,
}

impl WeightSpec {
    /// All trainable parameters of a module. Running statistics and frozen parameters are left out.
    pub fn of<M: Module>(module: &M) -> Self {
        let mut collector = Collector::default();
        module.visit(&mut collector);
        collector.spec
    }

    /// A list of one's own, for weights that belong to no module.
    ///
    /// # Errors
    /// When a name occurs twice, or a shape has an extent of 0.
    pub fn new(params: Vec<ParamSpec>) -> Result<Self> {
        let mut names = BTreeSet::new();
        for param in &params {
            if !names.insert(&param.name) {
                return Err(Error::usage(format!("two parameters are called \"{}\"", param.name)));
            }
            if param.is_empty() {
                let message = format!("parameter \"{}\" has the shape {:?}", param.name, param.shape);
                return Err(Error::usage(message).hint("every extent must be at least 1"));
            }
        }
        Ok(Self { params, fixed: Vec::new() })
    }

    /// Only the parameters that match one of the patterns:
    /// - `conv*.weight`: names, in which `*` stands for any characters
    /// - `re:^blocks\.[0-3]\.`: names that hold a match of a regular expression
    /// - `type:Conv2d`: parameters of layers of a type
    ///
    /// # Errors
    /// When a pattern matches none, or is no regular expression.
    pub fn select(&self, patterns: &[&str]) -> Result<Self> {
        let read = patterns.iter().map(|pattern| Pattern::read(pattern)).collect::<Result<Vec<_>>>()?;
        for (pattern, text) in read.iter().zip(patterns) {
            if self.params.iter().any(|param| pattern.matches(param)) {
                continue;
            }
            let fixed = self.fixed.iter().find(|name| pattern.matches_name(name));
            let there_are = match pattern {
                Pattern::Type(_) => {
                    let types: BTreeSet<&str> = self.params.iter().map(|p| p.holder.as_str()).collect();
                    listed(types.into_iter())
                }
                _ => listed(self.params.iter().map(|p| p.name.as_str())),
            };
            return Err(match fixed {
                Some(name) => fixed_error(name),
                None => Error::usage(format!("no parameter matches \"{text}\""))
                    .hint(format!("there are {there_are}")),
            });
        }
        let chosen = |param: &&ParamSpec| read.iter().any(|pattern| pattern.matches(param));
        Ok(Self { params: self.params.iter().filter(chosen).cloned().collect(), fixed: self.fixed.clone() })
    }

    /// The parameters in order.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// Number of elements of all parameters.
    pub fn numel(&self) -> usize {
        self.params.iter().map(ParamSpec::len).sum()
    }

    /// The parameters' present values, one after another, `[numel]`.
    ///
    /// # Errors
    /// When the module lacks one or has it in another shape.
    pub fn read<M: Module>(&self, module: &M) -> Result<Tensor<1>> {
        let mut reader = Reader::default();
        module.visit(&mut reader);
        let parts = self.params.iter().map(|param| match reader.values.remove(&param.name) {
            Some((shape, values)) if shape == param.shape => Ok(values),
            Some((shape, _)) => Err(shape_error(&param.name, &param.shape, &shape)),
            None => Err(unknown_error(&param.name, reader.values.keys())),
        });
        let parts = parts.collect::<Result<Vec<_>>>()?;
        if parts.is_empty() {
            return Err(Error::usage("there are no parameters to read"));
        }
        Ok(Tensor::cat(parts, 0))
    }

    /// Cuts a vector `[numel]` into the parameters.
    ///
    /// # Errors
    /// When it has another length.
    pub fn split(&self, theta: Tensor<1>) -> Result<Weights> {
        let found = theta.dims()[0];
        if found != self.numel() {
            let count = self.params.len();
            let message =
                format!("{found} weights cannot fill the {} elements of {count} parameters", self.numel());
            return Err(Error::usage(message));
        }
        let mut start = 0;
        let mut weights = Weights::default();
        for param in &self.params {
            let values = theta.clone().narrow(0, start, param.len());
            weights.tensors.insert(param.name.clone(), (param.shape.clone(), values));
            start += param.len();
        }
        Ok(weights)
    }
}

/// Tensors for parameters of a module, by name.
#[derive(Debug, Clone, Default)]
pub struct Weights {
    /// Shape and elements of each.
    tensors: BTreeMap<String, (Vec<usize>, Tensor<1>)>,
}

impl Weights {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces a tensor.
    pub fn insert<const D: usize>(&mut self, name: impl Into<String>, tensor: Tensor<D>) {
        let shape = tensor.dims().to_vec();
        let values = tensor.reshape([-1]);
        self.tensors.insert(name.into(), (shape, values));
    }

    /// A tensor.
    ///
    /// # Errors
    /// When there is none of that name and rank.
    pub fn get<const D: usize>(&self, name: &str) -> Result<Tensor<D>> {
        let (shape, values) =
            self.tensors.get(name).ok_or_else(|| unknown_error(name, self.tensors.keys()))?;
        let shape: [usize; D] = shape
            .as_slice()
            .try_into()
            .map_err(|_| Error::usage(format!("\"{name}\" has the shape {shape:?}, not {D} axes")))?;
        Ok(values.clone().reshape(shape))
    }

    /// A copy of the module with these tensors for its parameters; all others are the module's own, shared and not
    /// copied, so that they train as before. Running statistics are shared too: what a pass through the copy adds to
    /// them, the module has.
    ///
    /// # Errors
    /// Names the first tensor that the module has no parameter for, or one of another shape.
    pub fn fill<M: Module>(self, module: &M) -> Result<M> {
        let mut filler =
            Filler { path: ModulePath::default(), tensors: self.tensors, seen: Vec::new(), error: None };
        let filled = module.clone().map(&mut filler);
        if let Some(error) = filler.error {
            return Err(error);
        }
        match filler.tensors.keys().next() {
            Some(name) => Err(unknown_error(name, &filler.seen)),
            None => Ok(filled),
        }
    }
}

fn unknown_error<'a, S: AsRef<str> + 'a + ?Sized>(
    name: &str,
    known: impl IntoIterator<Item = &'a S>,
) -> Error {
    Error::usage(format!("there is no parameter \"{name}\""))
        .hint(format!("there are {}", listed(known.into_iter().map(AsRef::as_ref))))
}

fn shape_error(name: &str, expected: &[usize], found: &[usize]) -> Error {
    Error::usage(format!("\"{name}\" has the shape {found:?}, expected {expected:?}"))
}

fn fixed_error(name: &str) -> Error {
    Error::usage(format!("\"{name}\" is a running statistic or frozen, and cannot be replaced"))
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.collect();
    match names.len() {
        0 => "none".into(),
        n if n > LISTED => format!("{n}, among them {}", names[..LISTED].join(", ")),
        _ => names.join(", "),
    }
}

/// Which parameters are meant.
enum Pattern<'a> {
    /// Names, with `*` for any characters.
    Name(&'a str),
    /// Names that hold a match.
    Regex(Regex),
    /// Those of layers of this type.
    Type(&'a str),
}

impl<'a> Pattern<'a> {
    fn read(text: &'a str) -> Result<Self> {
        match text.split_once(':') {
            Some(("type", name)) => Ok(Self::Type(name)),
            Some(("re", expression)) => Regex::new(expression).map(Self::Regex).map_err(|e| {
                Error::usage(format!("\"{expression}\" is no regular expression")).caused_by(e.to_string())
            }),
            _ => Ok(Self::Name(text)),
        }
    }

    fn matches(&self, param: &ParamSpec) -> bool {
        matches!(self, Self::Type(name) if *name == param.holder) || self.matches_name(&param.name)
    }

    fn matches_name(&self, name: &str) -> bool {
        match self {
            Self::Name(pattern) => matches(pattern, name),
            Self::Regex(regex) => regex.is_match(name),
            Self::Type(_) => false,
        }
    }
}

/// Whether a name matches a pattern with `*` for any characters.
pub(crate) fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, rest)) => name.strip_prefix(start).is_some_and(|name| {
            // The shortest stretch for this star first; names are short.
            (0..=name.len()).filter(|&i| name.is_char_boundary(i)).any(|i| matches(rest, &name[i..]))
        }),
    }
}

/// Whether training would change a parameter. Burn keeps that apart from the tensor, and shows it to nobody; but in
/// training the tensor requires a gradient or not.
fn is_trainable<const D: usize>(param: &Param<Tensor<D>>) -> bool {
    param.valid().train().val().is_require_grad()
}

#[derive(Default)]
struct Collector {
    path: ModulePath,
    spec: WeightSpec,
}

impl ModuleVisitor for Collector {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.path.name();
        if !is_trainable(param) {
            return self.spec.fixed.push(name);
        }
        let (shape, holder) = (param.lazy_shape().to_vec(), self.path.holder().to_string());
        self.spec.params.push(ParamSpec { name, shape, holder });
    }
}

#[derive(Default)]
struct Reader {
    path: ModulePath,
    values: BTreeMap<String, (Vec<usize>, Tensor<1>)>,
}

impl ModuleVisitor for Reader {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        self.values.insert(self.path.name(), (value.dims().to_vec(), value.reshape([-1])));
    }
}

struct Filler {
    path: ModulePath,
    /// Those not yet put into their places.
    tensors: BTreeMap<String, (Vec<usize>, Tensor<1>)>,
    /// Names of all parameters passed.
    seen: Vec<String>,
    error: Option<Error>,
}

impl ModuleMapper for Filler {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.name();
        let Some((found, values)) = self.tensors.remove(&name) else {
            self.seen.push(name);
            return param;
        };
        let expected = param.lazy_shape();
        if found != expected.to_vec() {
            self.error.get_or_insert(shape_error(&name, &expected.to_vec(), &found));
            return param;
        }
        if !is_trainable(&param) {
            self.error.get_or_insert(fixed_error(&name));
            return param;
        }
        Param::initialized(param.id, values.reshape(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_chosen_by_expression_and_by_the_type_of_their_layer() {
        let param =
            |name: &str, holder: &str| ParamSpec { name: name.into(), shape: vec![1], holder: holder.into() };
        let spec = WeightSpec::new(vec![
            param("blocks.0.weight", "Conv2d"),
            param("blocks.4.weight", "Conv2d"),
            param("fc.weight", "Linear"),
        ]);
        let chosen = |pattern: &str| -> Result<Vec<String>> {
            let found = spec.as_ref().unwrap().select(&[pattern])?;
            Ok(found.params().iter().map(|param| param.name.clone()).collect())
        };
        assert_eq!(chosen("type:Linear").unwrap(), ["fc.weight"]);
        assert_eq!(chosen(r"re:^blocks\.[0-3]\.").unwrap(), ["blocks.0.weight"]);
        let hint = chosen("type:Conv1d").unwrap_err().hint_text().unwrap().to_string();
        assert_eq!(hint, "there are Conv2d, Linear");
        assert!(chosen("re:(").unwrap_err().to_string().contains("no regular expression"));
        assert!(chosen("re:^x").unwrap_err().to_string().contains("no parameter matches"));
    }

    #[test]
    fn stars_stand_for_any_characters() {
        for (pattern, name, expected) in [
            ("fc.weight", "fc.weight", true),
            ("fc.weight", "fc.weights", false),
            ("*", "anything", true),
            ("conv*.weight", "conv1.weight", true),
            ("conv*.weight", "conv1.bias", false),
            ("*.weight", "layers.0.weight", true),
            ("layers.*.w*t", "layers.10.weight", true),
            ("layers.*.w*t", "layers.10.bias", false),
            ("", "fc", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
