//! Names of parameters in `torchvision`, and weights from there.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::Tensor;
use kiln_core::{Error, HostTensor, ModulePath, Result, TensorFile};
use serde::Serialize;

/// What `torchvision` calls one of our parameters. Only the layers of dense blocks differ: `denselayer.0` is
/// `denselayer1` there.
pub fn torchvision_name(name: &str) -> String {
    let Some((before, rest)) = name.split_once(".denselayer.") else { return name.into() };
    match rest.split_once('.').and_then(|(number, rest)| Some((number.parse::<usize>().ok()?, rest))) {
        Some((number, rest)) => format!("{before}.denselayer{}.{rest}", number + 1),
        None => name.into(),
    }
}

/// Our name for a parameter of `torchvision`, whichever of its namings it has: `module.` of parallel training and the
/// first naming of DenseNet (`norm.1`) are known.
fn our_name(name: &str) -> String {
    let mut name = name;
    for prefix in ["module.", "densenet121.", "model."] {
        name = name.strip_prefix(prefix).unwrap_or(name);
    }
    let Some((before, rest)) = name.split_once(".denselayer") else { return name.into() };
    let Some((number, rest)) = rest.split_once('.') else { return name.into() };
    let Ok(number) = number.parse::<usize>() else { return name.into() };
    let rest = ["norm", "conv"].into_iter().fold(rest.to_string(), |rest, kind| {
        [1, 2].into_iter().fold(rest, |rest, place| {
            rest.replacen(&format!("{kind}.{place}."), &format!("{kind}{place}."), 1)
        })
    });
    format!("{before}.denselayer.{}.{rest}", number.saturating_sub(1))
}

/// Every parameter and running statistic, named as `torchvision` names it, with its shape there, in its order.
pub fn state<M: Module>(module: &M) -> Vec<(String, Vec<usize>)> {
    own_state(module).into_iter().map(|(name, shape)| (torchvision_name(&name), shape)).collect()
}

/// The same under our own names.
fn own_state<M: Module>(module: &M) -> Vec<(String, Vec<usize>)> {
    let mut lister = Lister::default();
    module.visit(&mut lister);
    lister.found
}

#[derive(Default)]
struct Lister {
    path: ModulePath,
    found: Vec<(String, Vec<usize>)>,
}

impl ModuleVisitor for Lister {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let mut shape = param.lazy_shape().to_vec();
        // Files have affine weights as `[out, in]`.
        if self.path.holder() == "Linear" {
            shape.reverse();
        }
        self.found.push((self.path.name(), shape));
    }
}

/// What became of the tensors of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transfer {
    /// Tensors that are in the network now.
    pub loaded: usize,
    /// Tensors of the classifier that have another shape, and were drawn anew.
    pub redrawn: Vec<String>,
    /// Tensors of the file without a place, all of its classifier.
    pub skipped: Vec<String>,
}

/// Puts the tensors of a `torchvision` state dictionary into a network whose classifier, at `head`, may have other classes.
///
/// # Errors
/// Names the first tensor that is missing, misshapen or left over anywhere but in the classifier.
pub fn transfer<M: Module>(module: M, mut file: TensorFile, head: &[&str]) -> Result<(M, Transfer)> {
    let is_head = |name: &str| head.iter().any(|head| name.starts_with(head));
    let names: Vec<String> = file.names().map(str::to_string).collect();
    for name in names {
        if name.ends_with("num_batches_tracked") {
            let _ = file.take(&name);
            continue;
        }
        let renamed = our_name(&name);
        if renamed != name {
            file.rename(&name, renamed);
        }
    }
    let own = TensorFile::from_module(&module);
    // CheXNet puts its sigmoid behind `classifier.0`; VGG has layers of that name.
    for (from, to) in [("classifier.0.weight", "classifier.weight"), ("classifier.0.bias", "classifier.bias")]
    {
        if own.get(to).is_some() && file.get(to).is_none() {
            file.rename(from, to);
        }
    }
    let (mut redrawn, mut skipped) = (Vec::new(), Vec::new());
    for name in own.names().map(str::to_string).collect::<Vec<_>>() {
        let fits = |found: &TensorFile| {
            found.get(&name).map(|found| found.shape == own.get(&name).map_or(vec![], |t| t.shape.clone()))
        };
        if is_head(&name) && fits(&file) != Some(true) {
            if let Some(tensor) = own.get(&name) {
                file.insert(name.clone(), tensor.clone());
            }
            redrawn.push(torchvision_name(&name));
        }
    }
    let unknown: Vec<String> =
        file.names().filter(|name| own.get(name).is_none()).map(str::to_string).collect();
    for name in unknown {
        if !is_head(&name) {
            return Err(Error::input(
                file.source().display(),
                format!("tensor \"{}\" has no place in this network", torchvision_name(&name)),
            )
            .hint("are these weights of another network? --net chooses it"));
        }
        let _ = file.take(&name);
        skipped.push(torchvision_name(&name));
    }
    let loaded = file.names().count() - redrawn.len();
    let module = file.into_module(module)?;
    Ok((module, Transfer { loaded, redrawn, skipped }))
}

/// Puts tensors of a formula into a module, in `torchvision`'s order: how reference outputs are made without files of
/// weights.
///
/// The `j`-th tensor has at flat index `i` the number `s = 2 ((i 2654435761 + j 40503 + 12345) mod 2³²) / 2³² - 1`; running
/// variances are `1 + 0.2 s`, running means `0.05 s`, scales of norms `1 + 0.1 s`, other vectors `0.05 s` and all else
/// `s √(6 / fan_in)`.
///
/// # Errors
/// None for a network of this crate.
pub fn fill<M: Module>(module: M) -> Result<M> {
    let mut file = TensorFile::from_source("the formula");
    for ((name, shape), j) in own_state(&module).into_iter().zip(0..) {
        let len: usize = shape.iter().product();
        let fan_in = (len / shape[0].max(1)) as f64;
        let of = |s: f64| match name.rsplit('.').next() {
            Some("running_var") => 1.0 + 0.2 * s,
            Some("running_mean") => 0.05 * s,
            Some("weight") if shape.len() == 1 => 1.0 + 0.1 * s,
            _ if shape.len() == 1 => 0.05 * s,
            _ => s * 3.0f64.sqrt() * (2.0 / fan_in).sqrt(),
        };
        let values = formula(len, j).map(|s| of(s) as f32).collect();
        file.insert(name.clone(), HostTensor::float(shape.clone(), values));
    }
    file.into_module(module)
}

/// The formula's numbers for tensor `j`, between -1 and 1.
pub fn formula(len: usize, j: u64) -> impl Iterator<Item = f64> {
    (0..len as u64).map(move |i| {
        let mixed = i.wrapping_mul(2_654_435_761).wrapping_add(j * 40_503 + 12_345) % (1 << 32);
        2.0 * (mixed as f64 / (1u64 << 32) as f64) - 1.0
    })
}
