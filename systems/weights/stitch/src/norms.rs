//! Running statistics of batch norms, recomputed for each network of a space.
//!
//! The networks share their weights but not what flows through them: behind a stitch a batch norm sees other means and
//! variances than in its anchor, and running statistics that all networks share are right for none (Yu et al.,
//! "Slimmable Neural Networks", arXiv 1812.08928, §3.2; recomputed after training as in Yu and Huang, arXiv 1903.05134,
//! §3.3). The numbers are few, so that every network has its own, and everything else stays shared.

use std::collections::BTreeSet;
use std::ops::Range;

use burn::module::{Module, ModuleDisplay, RunningState};
use burn::tensor::Tensor;
use kiln_core::{Context, Error, HostTensor, Result, TensorFile};
use kiln_data::Images;
use kiln_nn::BatchNorm;

use crate::anchor::Anchor;
use crate::data::{Scaling, sample};
use crate::snnet::{SnNet, Stitched};

/// The name of the file of statistics in a model folder.
pub const NORMS_FILE: &str = "norms.safetensors";

/// Images that statistics are computed on, at most.
const IMAGES: usize = 1024;
/// Images of a batch at least, whose mean and variance are averaged with those of the other batches.
const BATCH: usize = 128;

/// What the parts of statistics are called.
const NAMES: [&str; 2] = ["running_mean", "running_var"];

/// Running means and variances of the batch norms of a network, in the order in which they run.
#[derive(Debug, Clone)]
pub struct Statistics(Vec<[Tensor<1>; 2]>);

impl Statistics {
    /// The averages over batches of these images of what the batch norms of the network see.
    ///
    /// # Errors
    /// When one is not finite.
    pub fn compute<A: Anchor + ModuleDisplay>(
        net: Stitched<A>,
        images: &Images,
        scaling: &Scaling,
        cx: &Context,
    ) -> Result<Self> {
        // What comes from training is a snapshot for validation, whose batch norms would not look.
        let mut net = net.unfreeze();
        // Clones of a running state are one and the same: what is written to must not be an anchor's.
        Self::of(&mut net).write_to(&mut net);
        // On an autodiff device batch norms take the statistics of the batch.
        let device = cx.device.clone().autodiff();
        let all: Vec<usize> = (0..images.len()).collect();
        for (number, batch) in batches(&all).enumerate() {
            net.batch_norms().into_iter().for_each(|norm| norm.momentum = 1.0 / (number + 1) as f64);
            net.forward(scaling.tensor(images, batch, &device));
        }
        let found = Self::of(&mut net);
        // 0 unless a number is infinite or none.
        let finite = |x: &Tensor<1>| x.clone().mul_scalar(0.0).sum().into_scalar::<f32>().is_finite();
        if !found.0.iter().flatten().all(finite) {
            return Err(Error::work("a batch norm sees numbers that are not finite")
                .hint("the training went wrong: train again with a lower learning rate"));
        }
        Ok(found)
    }

    /// Those that a network has.
    fn of<A: Anchor>(net: &mut Stitched<A>) -> Self {
        let values = |norm: &mut BatchNorm| {
            [&norm.running_mean, &norm.running_var].map(|running| running.value_sync().without_autodiff())
        };
        Self(net.batch_norms().into_iter().map(values).collect())
    }

    fn write_to<A: Anchor>(&self, net: &mut Stitched<A>) {
        for (norm, [mean, variance]) in net.batch_norms().into_iter().zip(&self.0) {
            norm.running_mean = RunningState::new(mean.clone());
            norm.running_var = RunningState::new(variance.clone());
        }
    }

    /// The network with these.
    pub(crate) fn put_into<A: Anchor>(&self, mut net: Stitched<A>) -> Stitched<A> {
        self.write_to(&mut net);
        net
    }
}

/// Batches of the same size, which is at least [`BATCH`] where there are as many images.
fn batches(indices: &[usize]) -> impl Iterator<Item = &[usize]> {
    let count = (indices.len() / BATCH).max(1);
    indices.chunks_exact((indices.len() / count).max(1))
}

impl<A: Anchor + ModuleDisplay> SnNet<A> {
    /// Gives the networks with these ids batch norms' running statistics of their own, computed on at most 1024 of the
    /// images, chosen at random. Call it after training: it does nothing for networks without batch norms, and
    /// training goes on from [`share_norms`](Self::share_norms).
    ///
    /// # Errors
    /// As [`Statistics::compute`], when there are fewer than two images, and when the user stopped it.
    pub fn calibrate(
        &mut self,
        ids: Range<usize>,
        images: &Images,
        scaling: &Scaling,
        cx: &Context,
    ) -> Result<()> {
        if !self.has_batch_norms() {
            return Ok(());
        }
        if images.len() < 2 {
            return Err(Error::usage(format!("{} image has no variance", images.len()))
                .hint("batch norms are calibrated on two images or more, better on hundreds"));
        }
        let images = sample(images, IMAGES, &mut cx.rng("calibration", 0));
        let bar = cx.progress(ids.len() as u64, "batch norms");
        for id in ids {
            if cx.interrupted() {
                return Err(Error::interrupted("stopped while batch norms were calibrated"));
            }
            let net = self.take_out(self.space().configuration(id)?);
            self.set_statistics(id, Statistics::compute(net, &images, scaling, cx)?);
            bar.inc(1);
        }
        Ok(())
    }

    /// Whether networks of this space have running statistics at all.
    pub(crate) fn has_batch_norms(&self) -> bool {
        self.anchors.iter().any(|anchor| !anchor.clone().batch_norms().is_empty())
    }

    /// How many networks have statistics of their own.
    pub fn calibrated(&self) -> usize {
        (0..self.space().len()).filter(|&id| self.statistics_of(id).is_some()).count()
    }

    /// The statistics that networks have for themselves, for [`load_statistics`](Self::load_statistics):
    /// `ID.N.running_mean` and `ID.N.running_var` of the batch norm that the network with this id runs as its N-th.
    pub fn save_statistics(&self) -> TensorFile {
        let mut file = TensorFile::new();
        for id in 0..self.space().len() {
            let norms = self.statistics_of(id).map_or(&[][..], |statistics| &statistics.0);
            for (number, norm) in norms.iter().enumerate() {
                for (name, value) in NAMES.iter().zip(norm) {
                    file.insert(format!("{id}.{number}.{name}"), HostTensor::from_tensor(value.clone()));
                }
            }
        }
        file
    }

    /// Gives networks the statistics that [`save_statistics`](Self::save_statistics) wrote.
    ///
    /// # Errors
    /// When a tensor is missing, has another shape, holds what is no mean or variance, or belongs to no batch norm.
    pub fn load_statistics(&mut self, mut file: TensorFile, cx: &Context) -> Result<()> {
        let ids: BTreeSet<usize> =
            file.names().filter_map(|name| name.split('.').next()?.parse().ok()).collect();
        let count = self.space().len();
        for id in ids.into_iter().filter(|&id| id < count) {
            let mut expected = Statistics::of(&mut self.take_out(self.space().configuration(id)?));
            for (number, norm) in expected.0.iter_mut().enumerate() {
                for ((name, least), value) in NAMES.iter().zip([f32::MIN, 0.0]).zip(norm) {
                    let name = format!("{id}.{number}.{name}");
                    *value = file.take_shaped::<1>(&name, value.dims(), &cx.device)?;
                    let fits = |x: f32| x.is_finite() && x >= least;
                    if !value.clone().into_data().iter::<f32>().all(fits) {
                        return Err(damaged(&file, &name, "holds numbers that are no means or variances"));
                    }
                }
            }
            self.set_statistics(id, expected);
        }
        match file.names().next() {
            Some(name) => Err(damaged(&file, name, "belongs to no batch norm of the model")),
            None => Ok(()),
        }
    }
}

fn damaged(file: &TensorFile, name: &str, what: &str) -> Error {
    Error::input(file.source().display(), format!("tensor \"{name}\" {what}"))
}

impl<A: Anchor> Stitched<A> {
    /// The batch norms in the order in which they run.
    pub fn batch_norms(&mut self) -> Vec<&mut BatchNorm> {
        self.parts.iter_mut().flat_map(A::batch_norms).collect()
    }
}
