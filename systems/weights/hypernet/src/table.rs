//! All 64 cells of the taxonomy for one target: what each costs, and whether it can be made.

use kiln_core::{Context, Result, Table};

use burn::module::Module;

use crate::conditioning::{Conditioning, NoiseLaw};
use crate::generator::Arch;
use crate::hypernet::{HyperNetConfig, OutputScheme};
use crate::target::Target;

/// Sizes that all cells share.
#[derive(Debug, Clone, Copy)]
pub struct Sizes {
    /// Width of the hidden layer.
    pub hidden: usize,
    /// Numbers in a chunk.
    pub chunk: usize,
    /// Width of embeddings and codes.
    pub emb_dim: usize,
    /// Tasks.
    pub tasks: usize,
}

/// The schemes of the taxonomy with their names.
pub fn schemes(sizes: Sizes) -> [(&'static str, OutputScheme); 4] {
    [
        ("once", OutputScheme::Once),
        ("heads", OutputScheme::Heads { by_layer: false }),
        ("component", OutputScheme::Component { emb_dim: sizes.emb_dim }),
        ("chunk", OutputScheme::Chunk { chunk: sizes.chunk, emb_dim: sizes.emb_dim }),
    ]
}

/// The architectures with their names.
pub fn archs(hidden: usize) -> [(&'static str, Arch); 4] {
    [
        ("mlp", Arch::Mlp(vec![hidden])),
        ("cnn", Arch::Cnn(hidden)),
        ("rnn", Arch::Rnn(hidden)),
        ("attention", Arch::Attention(hidden)),
    ]
}

/// The conditionings with their names.
pub fn conditionings(target: &Target, sizes: Sizes) -> [(&'static str, Conditioning); 4] {
    let dim = sizes.emb_dim;
    [
        ("task", Conditioning::Task { tasks: sizes.tasks, dim }),
        ("data", Conditioning::Data { inputs: target.inputs(), dim }),
        ("noise", Conditioning::Noise { dim, law: NoiseLaw::Normal }),
        ("given", Conditioning::Given { dim }),
    ]
}

/// Makes the hypernetwork of every cell and counts its parameters.
///
/// # Errors
/// When the target or the sizes make no sense.
pub fn table(target: &Target, sizes: Sizes, cx: &Context) -> Result<Table> {
    let spec = target.spec()?;
    let count = spec.numel();
    let mut table = Table::new(
        format!("Hypernetworks for a target of {count} weights"),
        &["conditioning", "scheme", "architecture", "inputs", "outputs", "parameters", "parameters / N"],
    );
    for (condition, conditioning) in conditionings(target, sizes) {
        for (scheme_name, scheme) in schemes(sizes) {
            for (arch_name, arch) in archs(sizes.hidden) {
                let hyper = HyperNetConfig::new(spec.clone())
                    .with_conditioning([conditioning.clone()])
                    .with_scheme(scheme)
                    .with_arch(arch)
                    .draw(cx, "table")?;
                let parameters = hyper.num_params();
                let kind = if conditioning.is_static() { "static" } else { "dynamic" };
                table.row([
                    condition.to_string(),
                    scheme_name.to_string(),
                    arch_name.to_string(),
                    kind.to_string(),
                    kind.to_string(),
                    parameters.to_string(),
                    format!("{:.3}", parameters as f64 / count as f64),
                ]);
            }
        }
    }
    Ok(table)
}
