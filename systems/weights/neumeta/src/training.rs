//! What is minimised: by a plain network, by the implicit function on its own, and by the family (§3.5).

use burn::tensor::Tensor;
use kiln_core::{Context, Error, Result};
use kiln_nn::{Outcome, Task, TrainConfig};
use rand::seq::IndexedRandom;
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::arch::{Built, NetConfig, Size};
use crate::data::Samples;
use crate::family::{Family, Source, norms, reconstruction};
use crate::inr::Inr;
use crate::network::{Plain, Trainable};
use crate::objective::{Run, distillation};

/// Draws a batch.
fn batch(samples: &Samples, size: usize, rng: &mut impl Rng) -> Samples {
    let chosen: Vec<usize> = (0..size).map(|_| rng.random_range(0..samples.len())).collect();
    samples.select(&chosen)
}

/// Training of a plain network on samples.
pub struct PlainTask<'a> {
    /// The family that it belongs to.
    pub config: &'a NetConfig,
    /// The network.
    pub built: &'a Built,
    /// What is learned from.
    pub train: &'a Samples,
    /// What is held out.
    pub valid: &'a Samples,
    /// Samples of a step.
    pub batch: usize,
    /// Device and random streams.
    pub cx: &'a Context,
}

impl Task<Trainable> for PlainTask<'_> {
    fn loss(&mut self, model: &Trainable, step: usize) -> Result<(Tensor<1>, usize)> {
        let mut rng = self.cx.rng("batch", step as u64);
        let batch = batch(self.train, self.batch, &mut rng);
        let parameters = model.parameters();
        let run = model.run(self.config, self.built, &parameters);
        Ok((run.loss(&batch, &self.cx.device, &mut rng)?.task, batch.len()))
    }

    fn validate(&mut self, model: &Trainable) -> Result<f64> {
        let parameters = model.parameters();
        mean_loss(&model.run(self.config, self.built, &parameters), self.valid, self.cx)
    }

    fn settings(&self) -> Map<String, Value> {
        Map::from_iter([("batch".into(), json!(self.batch)), ("samples".into(), json!(self.train.len()))])
    }
}

/// The loss of all samples.
fn mean_loss(run: &Run, samples: &Samples, cx: &Context) -> Result<f64> {
    const AT_ONCE: usize = 256;
    let order: Vec<usize> = (0..samples.len()).collect();
    let mut sum = 0.0;
    for chunk in order.chunks(AT_ONCE) {
        let loss = run.loss(&samples.select(chunk), &cx.device, &mut cx.rng("validation", 0))?.task;
        sum += f64::from(loss.into_scalar::<f32>()) * chunk.len() as f64;
    }
    Ok(sum / samples.len() as f64)
}

/// Training of the implicit function to give back the full network's weights: the warm start.
pub struct WarmTask<'a> {
    /// The family.
    pub family: &'a Family,
    /// Device and random streams.
    pub cx: &'a Context,
}

impl Task<Inr> for WarmTask<'_> {
    fn loss(&mut self, inr: &Inr, step: usize) -> Result<(Tensor<1>, usize)> {
        let (family, device) = (self.family, &self.cx.device);
        let mut rng = self.cx.rng("warm noise", step as u64);
        let noise = (family.config.noise > 0.0).then_some(&mut rng as &mut dyn Rng);
        let written = family.write(inr, family.full(), noise, |_| Source::Learned, device)?;
        Ok((scaled_reconstruction(family, &written, self.cx), 1))
    }

    fn validate(&mut self, inr: &Inr) -> Result<f64> {
        let (family, device) = (self.family, &self.cx.device);
        let written = family.write(inr, family.full(), None, |_| Source::Written, device)?;
        Ok(f64::from(scaled_reconstruction(family, &written, self.cx).into_scalar::<f32>()))
    }
}

/// [`reconstruction`] of each tensor relative to how large its weights are, so that small tensors count as large ones
/// do.
fn scaled_reconstruction(family: &Family, written: &[Tensor<1>], cx: &Context) -> Tensor<1> {
    let scale = |values: &Vec<f32>| {
        let squares: f32 = values.iter().map(|w| w * w).sum();
        (squares / values.len() as f32).sqrt().max(1e-6)
    };
    let scales: Vec<f32> = family.base.tensors.iter().map(scale).collect();
    let written: Vec<Tensor<1>> = written.iter().zip(&scales).map(|(w, scale)| w.clone() / *scale).collect();
    let given: Vec<Vec<f32>> = family
        .base
        .tensors
        .iter()
        .zip(&scales)
        .map(|(values, scale)| values.iter().map(|w| w / scale).collect())
        .collect();
    reconstruction(&written, &given, &cx.device)
}

/// What the loss of a family consists of, and how sizes are drawn.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// What the reconstruction of the full network counts.
    pub recon: f64,
    /// What the norms of the weights count.
    pub reg: f64,
    /// What the distance from the full network's classes counts.
    pub kd: f64,
    /// Share of the average that each step keeps.
    pub ema: f64,
    /// Share of the steps that train the full network.
    pub full_share: f64,
    /// Share of the tensors that learn in each step.
    pub ratio: f64,
    /// Whether layers are handed to the implicit function one after another, the last first; before that they are the
    /// base's.
    pub blockwise: bool,
    /// Samples of a step.
    pub batch: usize,
}

impl Default for Objective {
    fn default() -> Self {
        Self {
            recon: 1.0,
            reg: 1e-4,
            kd: 0.0,
            ema: 0.995,
            full_share: 0.25,
            ratio: 1.0,
            blockwise: false,
            batch: 64,
        }
    }
}

/// Training of a family.
pub struct FamilyTask<'a> {
    /// The family.
    pub family: &'a Family,
    /// What is minimised.
    pub objective: &'a Objective,
    /// Steps of the whole run.
    pub steps: usize,
    /// What is learned from.
    pub train: &'a Samples,
    /// What is held out.
    pub valid: &'a Samples,
    /// Device and random streams.
    pub cx: &'a Context,
}

impl FamilyTask<'_> {
    /// The size that a step trains.
    fn size(&self, rng: &mut impl Rng) -> Size {
        let config = &self.family.config;
        if rng.random::<f64>() < self.objective.full_share {
            return self.family.full();
        }
        let width = config.widths.choose(rng).copied().unwrap_or(config.full);
        let (depth, kernel) = (config.depths.choose(rng).copied(), config.kernels.choose(rng).copied());
        config.net.plainly(Size { width, depth, kernel })
    }

    /// Where each tensor of a step comes from.
    fn sources(&self, step: usize, rng: &mut impl Rng) -> Vec<Source> {
        let count = self.family.config.inr.tensors;
        // A weight and its bias are handed over together.
        let handed = match self.objective.blockwise {
            true => 2 * ((count / 2) * (step + 1)).div_ceil(self.steps.max(1)),
            false => count,
        };
        let mut sources: Vec<Source> = (0..count)
            .map(|tensor| match tensor + handed >= count {
                false => Source::Base,
                true if rng.random::<f64>() < self.objective.ratio => Source::Learned,
                true => Source::Written,
            })
            .collect();
        if !sources.contains(&Source::Learned) {
            sources[count - 1] = Source::Learned;
        }
        sources
    }
}

impl Task<Inr> for FamilyTask<'_> {
    fn loss(&mut self, inr: &Inr, step: usize) -> Result<(Tensor<1>, usize)> {
        // Early on, the average of few steps must not hold on to where they began.
        inr.update_average(self.objective.ema.min((step + 1) as f64 / (step + 10) as f64));
        let (family, objective, device) = (self.family, self.objective, &self.cx.device);
        let mut rng = self.cx.rng("family", step as u64);
        let size = self.size(&mut rng);
        let sources = self.sources(step, &mut rng);
        let batch = batch(self.train, objective.batch, &mut rng);
        let noise = (family.config.noise > 0.0).then_some(&mut rng as &mut dyn Rng);
        let written = family.write(inr, size, noise, |tensor| sources[tensor], device)?;

        let net = &family.config.net;
        let built = net.build(size)?;
        let run = Run { goal: net.goal, built: &built, parameters: &written, norms: &[] };
        let found = run.loss(&batch, device, &mut rng)?;
        let mut loss = found.task;
        if objective.reg > 0.0 {
            loss = loss + norms(&written) * objective.reg;
        }
        if objective.recon > 0.0 && size == family.full() {
            loss = loss + reconstruction(&written, &family.base.tensors, device) * objective.recon;
        }
        if objective.kd > 0.0 {
            let built = net.build(family.full())?;
            let parameters = family.base.parameters(device);
            let teacher = Run { goal: net.goal, built: &built, parameters: &parameters, norms: &[] };
            let output = teacher.output(crate::objective::pictures(&batch, device))?;
            loss = loss + distillation(net.goal, found.output, output) * objective.kd;
        }
        Ok((loss, batch.len()))
    }

    /// The mean loss over the sizes that are [judged](Family::judged), with averaged parameters.
    fn validate(&mut self, inr: &Inr) -> Result<f64> {
        let (family, device) = (self.family, &self.cx.device);
        let inr = inr.averaged()?;
        let chosen = family.judged();
        let mut sum = 0.0;
        for &size in &chosen {
            let written = family.write(&inr, size, None, |_| Source::Written, device)?;
            let built = family.config.net.build(size)?;
            let run = Run { goal: family.config.net.goal, built: &built, parameters: &written, norms: &[] };
            sum += mean_loss(&run, self.valid, self.cx)?;
        }
        Ok(sum / chosen.len() as f64)
    }

    fn settings(&self) -> Map<String, Value> {
        Map::from_iter([
            ("objective".into(), json!(self.objective)),
            ("samples".into(), json!(self.train.len())),
        ])
    }
}

/// How a plain network is trained when it is to be compared with.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// Steps.
    pub steps: usize,
    /// The highest learning rate, which falls as half a cosine.
    pub lr: f64,
    /// Samples of a step.
    pub batch: usize,
}

impl Recipe {
    /// Trains a network from scratch.
    ///
    /// # Errors
    /// When there is no such network, or training fails.
    pub fn train(
        &self,
        net: &NetConfig,
        size: Size,
        (train, valid): (&Samples, &Samples),
        cx: &Context,
    ) -> Result<Plain> {
        let graph = net.build(size)?.graph;
        let model = Trainable::draw(&graph, &cx.device, &mut cx.rng("draw", size.width as u64));
        self.continue_from(model, net, size, (train, valid), cx)
    }

    /// Trains a network on.
    ///
    /// # Errors
    /// When training fails.
    pub fn continue_from(
        &self,
        model: Trainable,
        net: &NetConfig,
        size: Size,
        (train, valid): (&Samples, &Samples),
        cx: &Context,
    ) -> Result<Plain> {
        let built = net.build(size)?;
        let mut task = PlainTask { config: net, built: &built, train, valid, batch: self.batch, cx };
        let trained = kiln_nn::train(model, &mut task, &self.config(), None, false, cx)?;
        if trained.outcome == Outcome::Interrupted {
            return Err(Error::interrupted("stopped while a network was trained"));
        }
        trained.last.to_plain(net, size)
    }

    fn config(&self) -> TrainConfig {
        TrainConfig {
            steps: self.steps,
            lr: self.lr,
            warmup: self.steps / 20,
            min_lr_ratio: 0.01,
            weight_decay: 0.0,
            eval_every: 0,
            checkpoint_every: 0,
            ..TrainConfig::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Arch;
    use crate::coords::NoiseOn;
    use crate::family::{BaseTerm, FamilyConfig, KernelCrop};
    use crate::objective::Goal;

    #[test]
    fn every_width_depth_and_kernel_is_drawn_and_the_whole_network_is_full_however_it_is_drawn() {
        let cx = Context::for_tests("unused");
        let arch: Arch = "resnet14".parse().expect("a network");
        let net = NetConfig { goal: Goal::Classify, arch, image: [1, 8, 8], classes: 2 };
        let graph = net.build(Size::new(8)).expect("a network").graph;
        let plain = Trainable::draw(&graph, &cx.device, &mut cx.rng("draw", 0)).to_plain(&net, Size::new(8));
        let config = FamilyConfig {
            inr: Family::inr_config(&net, 8).expect("a network"),
            net,
            full: 8,
            widths: vec![4, 8],
            depths: vec![1, 2],
            kernels: vec![1, 3],
            kernel_crop: KernelCrop::Middle,
            base: BaseTerm::Interp,
            output_scale: true,
            noise: 0.0,
            noise_on: NoiseOn::Channels,
        };
        let family = Family::new(config, plain.expect("it fits")).expect("it fits");
        let none = Samples {
            images: kiln_data::Images {
                shape: [1, 8, 8],
                pixels: vec![],
                labels: vec![],
                classes: vec![],
                white: 1.0,
            },
            masks: vec![],
        };
        let objective = Objective { full_share: 0.0, ..Objective::default() };
        let task = FamilyTask {
            family: &family,
            objective: &objective,
            steps: 1,
            train: &none,
            valid: &none,
            cx: &cx,
        };
        let mut drawn = Vec::new();
        for step in 0..200 {
            let size = task.size(&mut cx.rng("family", step));
            if !drawn.contains(&size) {
                drawn.push(size);
            }
        }
        assert_eq!(drawn.len(), 8);
        assert!(drawn.contains(&family.full()));
        let small = Size { kernel: Some(1), ..family.full() };
        let shallow = Size { depth: Some(1), ..family.full() };
        assert_eq!(family.judged(), [Size::new(4), Size::new(8), family.full(), shallow, small]);
    }
}
