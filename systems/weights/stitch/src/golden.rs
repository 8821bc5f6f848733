//! Anchors from prepared tensors: least squares and the logits of every network, for comparison with a reference.

use std::path::Path;

use burn::tensor::Tensor;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use serde::Deserialize;

use crate::anchor::Anchor;
use crate::family::{Vit, VitConfig};
use crate::snnet::SnNetConfig;
use crate::space::SpaceConfig;

/// The anchors that the tensors belong to.
#[derive(Debug, Clone, Deserialize)]
pub struct Arch {
    /// Width of each anchor.
    pub dims: Vec<usize>,
    /// Heads of each anchor.
    pub heads: Vec<usize>,
    /// Blocks of every anchor.
    pub depth: usize,
    /// Channels of an image.
    pub channels: usize,
    /// Height and width of an image.
    pub image: [usize; 2],
    /// Side of a patch.
    pub patch: usize,
    /// Number of classes.
    pub classes: usize,
    /// Blocks of the sliding window.
    pub kernel: usize,
    /// How far it moves.
    pub stride: usize,
    /// Width of hidden layers over that of tokens.
    pub mlp_ratio: usize,
    /// What layer norms add to the variance.
    pub ln_eps: f64,
}

impl Arch {
    /// Reads a description in JSON.
    ///
    /// # Errors
    /// When it cannot be read or describes other networks than these.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
        let arch: Self = serde_json::from_str(&text)
            .map_err(|e| Error::input(path.display(), "does not describe anchors").caused_by(e))?;
        if arch.mlp_ratio != 4 || arch.ln_eps != 1e-6 || arch.dims.len() != arch.heads.len() {
            return Err(Error::input(path.display(), "describes networks that Kiln does not have")
                .hint("mlp_ratio must be 4, ln_eps 1e-6, and each of dims needs one of heads"));
        }
        Ok(arch)
    }

    fn anchor(&self, index: usize) -> Result<VitConfig> {
        let config = VitConfig {
            image: [self.channels, self.image[0], self.image[1]],
            patch: self.patch,
            width: self.dims[index],
            depth: self.depth,
            heads: self.heads[index],
            classes: self.classes,
        };
        config.check()?;
        Ok(config)
    }
}

/// Fits the stitching layers to `images`, and returns them as `stitchF-R.L.weight` and `.bias` with `logits.anchorI` and
/// `logits.stitchF-R.l.m` of every network. The anchors' tensors are called `anchorI.patch_embed.weight`,
/// `anchorI.blocks.B.qkv.weight` and so on.
///
/// # Errors
/// When a tensor is missing or misshapen, or the anchors do not fit one another.
pub fn forward(arch: &Arch, mut weights: TensorFile, images_name: &str, cx: &Context) -> Result<TensorFile> {
    let images: Tensor<4> = weights.take_float(images_name, &cx.device)?;
    let expected = [arch.channels, arch.image[0], arch.image[1]];
    if images.dims()[1..] != expected {
        return Err(Error::input(
            weights.source().display(),
            format!("\"{images_name}\" is {:?}", images.dims()),
        )
        .hint(format!(
            "images of these anchors are [images, {}, {}, {}]",
            expected[0], expected[1], expected[2]
        )));
    }
    let anchors = (0..arch.dims.len()).map(|index| {
        let mut section = TensorFile::from_source(weights.source());
        section.insert_section("", weights.take_section(&format!("anchor{index}.")));
        timm_names(&mut section);
        section.into_module(arch.anchor(index)?.init(&cx.device))
    });
    let anchors: Vec<Vit> = anchors.collect::<Result<_>>()?;
    let costs: Vec<u64> = anchors.iter().map(|anchor| anchor.outline().total().flops).collect();
    if !costs.is_sorted() {
        return Err(Error::usage("the anchors do not stand in the order of their cost"));
    }
    let space = SpaceConfig { kernel: arch.kernel, stride: arch.stride, ..SpaceConfig::default() };
    let mut net = SnNetConfig::new(anchors).with_space(space).draw(&mut cx.rng("init", 0), &cx.device)?;
    net.fit(images.clone(), cx)?;

    let mut found = TensorFile::new();
    for (joint, layer) in net.space().layers().iter().zip(&net.stitches) {
        found.insert_section(
            &format!("stitch{}-{}.{}.", joint.front, joint.rear, joint.number),
            TensorFile::from_module(&layer.map),
        );
    }
    for (id, configuration) in net.space().configurations().iter().enumerate() {
        let name = match (&configuration.anchors[..], &configuration.cuts[..]) {
            ([front, rear], [cut]) => format!("logits.stitch{front}-{rear}.{}.{}", cut.after, cut.before),
            (anchors, _) => format!("logits.anchor{}", anchors[0]),
        };
        found.insert(name, HostTensor::from_tensor(net.forward_with(id, images.clone())?));
    }
    Ok(found)
}

/// Gives tensors with short names those that `timm` has.
fn timm_names(file: &mut TensorFile) {
    let names: Vec<String> = file.names().map(str::to_string).collect();
    for name in names {
        let parts: Vec<&str> = name.split('.').collect();
        match parts[..] {
            ["patch_embed", kind] => file.rename(&name, format!("patch_embed.proj.{kind}")),
            ["blocks", block, layer @ ("qkv" | "proj"), kind] => {
                file.rename(&name, format!("blocks.{block}.attn.{layer}.{kind}"));
            }
            ["blocks", block, layer @ ("fc1" | "fc2"), kind] => {
                file.rename(&name, format!("blocks.{block}.mlp.{layer}.{kind}"));
            }
            _ => {}
        }
    }
}
