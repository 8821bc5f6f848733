//! Hypernetworks from weights under the names of the reference files, for comparison with other implementations.
//!
//! Layers are `layer0`, `layer1`, … (`trunk` and `head0`, … for heads), with the last one as the output; embeddings are
//! `task_emb`, `comp.emb` and `chunk_emb`.

use burn::tensor::Tensor;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};

use crate::conditioning::{Condition, Conditioning};
use crate::generator::Arch;
use crate::hypernet::{HyperNet, HyperNetConfig, Init, OutputRegularizer, OutputScheme};
use crate::target::Target;

/// What the schemes of a file make of its tasks: `once.theta`, `heads.theta`, `comp.theta` and `chunk.theta`, as far as
/// their weights are there; with `x` also `chunk.y`, with `reg.old_theta` also `reg.value`.
///
/// # Errors
/// When a tensor is missing or does not fit.
pub fn forward(file: TensorFile, target: &Target, cx: &Context) -> Result<TensorFile> {
    let place = file.source().display().to_string();
    let Some(tasks) = file.get("task_emb").map(|tensor| tensor.shape.clone()) else {
        return Err(
            Error::input(place, "has no tensor \"task_emb\"").hint("it holds the embeddings of the tasks")
        );
    };
    let mut result = TensorFile::new();
    for scheme in ["once", "heads", "comp", "chunk"] {
        let prefix = format!("{scheme}.");
        if !file.names().any(|name| name.starts_with(&prefix) && name.ends_with(".weight")) {
            continue;
        }
        let hyper = load(&file, scheme, target, cx)?;
        let theta = hyper.generate(&Condition::tasks((0..tasks[0]).collect::<Vec<_>>()))?.flat;
        result.insert(format!("{scheme}.theta"), HostTensor::from_tensor(theta.clone()));
        if scheme != "chunk" {
            continue;
        }
        if file.get("x").is_some() {
            let x: Tensor<2> = file.clone().take_float("x", &cx.device)?;
            let [rows, width] = x.dims();
            if width != target.inputs() {
                return Err(Error::input(
                    place,
                    format!("\"x\" has rows of {width}, the target takes {}", target.inputs()),
                ));
            }
            let y = target.forward(theta, x.unsqueeze::<3>().expand([tasks[0], rows, width]));
            result.insert("chunk.y", HostTensor::from_tensor(y));
        }
        if file.get("reg.old_theta").is_some() {
            let old: Tensor<2> = file.clone().take_float("reg.old_theta", &cx.device)?;
            if old.dims()[0] > tasks[0] || old.dims()[1] != hyper.target_len() {
                let expected = [tasks[0], hyper.target_len()];
                return Err(Error::input(
                    place,
                    format!("\"reg.old_theta\" is {:?}, at most {expected:?}", old.dims()),
                ));
            }
            result.insert("reg.value", HostTensor::from_tensor(OutputRegularizer { old }.value(&hyper)?));
        }
    }
    if result.names().next().is_none() {
        return Err(Error::input(place, "holds the weights of no scheme")
            .hint("their names begin with once., heads., comp. or chunk."));
    }
    Ok(result)
}

/// The hypernetwork of one scheme.
fn load(file: &TensorFile, scheme: &str, target: &Target, cx: &Context) -> Result<HyperNet> {
    let shape = |name: &str| -> Result<Vec<usize>> {
        match file.get(name) {
            Some(tensor) if tensor.shape.len() == 2 => Ok(tensor.shape.clone()),
            Some(tensor) => Err(Error::input(
                file.source().display(),
                format!("\"{name}\" has the shape {:?}, not two axes", tensor.shape),
            )),
            None => Err(Error::input(file.source().display(), format!("has no tensor \"{name}\""))),
        }
    };
    let layers: Vec<String> = (0..)
        .map(|layer| format!("{scheme}.layer{layer}"))
        .take_while(|layer| file.get(&format!("{layer}.weight")).is_some())
        .collect();
    let spec = target.spec()?;
    // Pairs of names: in the file, in the module.
    let mut names: Vec<(String, String)> = Vec::new();
    let mut linear = |from: &str, to: String| {
        names.extend(["weight", "bias"].map(|part| (format!("{from}.{part}"), format!("{to}.{part}"))));
    };
    let hidden: Vec<String> = if scheme == "heads" {
        for head in 0..spec.params().len() {
            linear(&format!("heads.head{head}"), format!("makers.0.heads.{head}"));
        }
        vec!["heads.trunk".into()]
    } else {
        let Some((output, hidden)) = layers.split_last().filter(|(_, hidden)| !hidden.is_empty()) else {
            return Err(Error::input(
                file.source().display(),
                format!("\"{scheme}\" needs a hidden and an output layer"),
            ));
        };
        linear(output, "makers.0.heads.0".into());
        hidden.to_vec()
    };
    for (number, layer) in hidden.iter().enumerate() {
        linear(layer, format!("makers.0.generator.layers.{number}"));
    }
    let widths =
        hidden.iter().map(|layer| Ok(shape(&format!("{layer}.weight"))?[0])).collect::<Result<Vec<_>>>()?;
    names.push(("task_emb".into(), "conditioner.tables.0".into()));
    let mut embedded = |name: &str| -> Result<usize> {
        names.push((name.into(), "makers.0.embeddings".into()));
        Ok(shape(name)?[1])
    };
    let scheme = match scheme {
        "once" => OutputScheme::Once,
        "heads" => OutputScheme::Heads { by_layer: false },
        "comp" => OutputScheme::Component { emb_dim: embedded("comp.emb")? },
        _ => {
            let emb_dim = embedded("chunk_emb")?;
            let last = layers.last().map_or(String::new(), |layer| format!("{layer}.weight"));
            OutputScheme::Chunk { chunk: shape(&last)?[0], emb_dim }
        }
    };
    let tasks = shape("task_emb")?;
    let config = HyperNetConfig::new(spec)
        .with_conditioning([Conditioning::Task { tasks: tasks[0], dim: tasks[1] }])
        .with_scheme(scheme)
        .with_arch(Arch::Mlp(widths))
        .with_init(Init::Kaiming);
    let mut source = file.clone();
    let mut weights = TensorFile::from_source(file.source());
    for (from, to) in names {
        weights.insert(to, source.take(&from)?);
    }
    weights.into_module(config.draw(cx, "replaced")?)
}
