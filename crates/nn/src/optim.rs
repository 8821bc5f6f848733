//! AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101).

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Tensor};
use kiln_core::{Result, TensorFile};

const FIRST_PREFIX: &str = "exp_avg.";
const SECOND_PREFIX: &str = "exp_avg_sq.";

/// AdamW with clipping of the gradients' global norm.
///
/// Weights decay apart from the gradient, and only parameters with two or more axes: biases and the
/// scales of norms do not.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// How much of the running means of gradients and squared gradients each step keeps.
    pub betas: (f64, f64),
    /// Added to the root of the mean squared gradient.
    pub epsilon: f64,
    /// Fraction of a weight, times the learning rate, that a step takes away.
    pub weight_decay: f64,
    /// Gradients are scaled down to this Euclidean norm over all parameters; 0 leaves them as they are.
    pub clip_norm: f64,
    steps: i32,
    moments: HashMap<ParamId, Moments>,
}

/// Running means of a parameter's gradient and squared gradient, flattened.
#[derive(Debug, Clone)]
struct Moments {
    first: Tensor<1>,
    second: Tensor<1>,
}

impl AdamW {
    /// An optimiser before its first step, with betas 0.9 and 0.999 and epsilon 1e-8.
    pub fn new(weight_decay: f64, clip_norm: f64) -> Self {
        Self {
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay,
            clip_norm,
            steps: 0,
            moments: HashMap::new(),
        }
    }

    /// One step against the gradients; returns the module and the gradients' norm before clipping.
    ///
    /// When that norm is not finite the module comes back as it was, for the caller to judge.
    /// Parameters without a gradient stay as they are.
    pub fn step<M: Module>(&mut self, module: M, gradients: Gradients, lr: f64) -> (M, f64) {
        let mut collector = Collect { gradients, flat: HashMap::new(), squares: Vec::new() };
        module.visit(&mut collector);
        let Collect { flat, squares, .. } = collector;
        if squares.is_empty() {
            return (module, 0.0);
        }
        let norm = f64::from(Tensor::cat(squares, 0).sum().into_scalar::<f32>()).sqrt();
        if !norm.is_finite() {
            return (module, norm);
        }
        self.steps += 1;
        let scale = if self.clip_norm > 0.0 && norm > self.clip_norm { self.clip_norm / norm } else { 1.0 };
        let module = module.map(&mut Update { optimiser: self, flat, scale, lr });
        (module, norm)
    }

    /// Adds the running means to `file` as `exp_avg.<name>` and `exp_avg_sq.<name>`, named and laid out
    /// as [`TensorFile`] does the parameters of `module`.
    pub fn export<M: Module>(&self, module: &M, file: &mut TensorFile) {
        let mut section = |prefix, pick: fn(&Moments) -> &Tensor<1>| {
            let moments = module.valid().map(&mut Export { moments: &self.moments, pick });
            file.insert_section(prefix, TensorFile::from_module(&moments));
        };
        section(FIRST_PREFIX, |moments| &moments.first);
        section(SECOND_PREFIX, |moments| &moments.second);
    }

    /// Takes the running means after `steps` steps out of `file`.
    ///
    /// # Errors
    /// When one is missing or does not fit the parameters of `module`.
    pub fn import<M: Module>(&mut self, module: &M, file: &mut TensorFile, steps: usize) -> Result<()> {
        let mut section = |prefix| {
            let moments = file.take_section(prefix).into_module(module.valid())?;
            let mut flat = Flatten::default();
            moments.visit(&mut flat);
            Result::Ok(flat.0)
        };
        let mut first = section(FIRST_PREFIX)?;
        self.moments = section(SECOND_PREFIX)?
            .into_iter()
            .filter_map(|(id, second)| Some((id, Moments { first: first.remove(&id)?, second })))
            .collect();
        self.steps = i32::try_from(steps).unwrap_or(i32::MAX);
        Ok(())
    }
}

/// Gathers the gradients, flattened, and their sums of squares in the order of the parameters, so that
/// the norm is the same in every run.
struct Collect {
    gradients: Gradients,
    flat: HashMap<ParamId, Tensor<1>>,
    squares: Vec<Tensor<1>>,
}

impl ModuleVisitor for Collect {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad_remove(&mut self.gradients) {
            let gradient = gradient.reshape([-1]);
            self.squares.push(gradient.clone().square().sum());
            self.flat.insert(param.id, gradient);
        }
    }
}

/// Applies one step to every parameter that has a gradient.
struct Update<'a> {
    optimiser: &'a mut AdamW,
    flat: HashMap<ParamId, Tensor<1>>,
    scale: f64,
    lr: f64,
}

impl ModuleMapper for Update<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(gradient) = self.flat.remove(&param.id) else { return param };
        let optimiser = &mut *self.optimiser;
        let (beta1, beta2) = optimiser.betas;
        let gradient = gradient * self.scale;
        let (kept_first, kept_second) = match optimiser.moments.remove(&param.id) {
            Some(old) => (old.first * beta1, old.second * beta2),
            None => (gradient.zeros_like(), gradient.zeros_like()),
        };
        let first = kept_first + gradient.clone() * (1.0 - beta1);
        let second = kept_second + gradient.square() * (1.0 - beta2);

        let unbiased_first = first.clone() / (1.0 - beta1.powi(optimiser.steps));
        let unbiased_second = second.clone() / (1.0 - beta2.powi(optimiser.steps));
        let direction = unbiased_first / (unbiased_second.sqrt() + optimiser.epsilon);
        optimiser.moments.insert(param.id, Moments { first, second });

        let decay = if D >= 2 { self.lr * optimiser.weight_decay } else { 0.0 };
        param.map(|value| {
            let direction = direction.reshape(value.dims());
            // A new leaf of the next step's graph, off the device's autodiff meanwhile.
            let updated = value.inner() * (1.0 - decay) - direction * self.lr;
            Tensor::from_inner(updated).require_grad()
        })
    }
}

/// Puts running means in the place of parameters; zeros where there are none yet.
struct Export<'a> {
    moments: &'a HashMap<ParamId, Moments>,
    pick: fn(&Moments) -> &Tensor<1>,
}

impl ModuleMapper for Export<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let moments = self.moments.get(&param.id).map(self.pick);
        param.map(|value| match moments {
            Some(moment) => moment.clone().reshape(value.dims()),
            None => value.zeros_like(),
        })
    }
}

/// Every parameter, flattened.
#[derive(Default)]
struct Flatten(HashMap<ParamId, Tensor<1>>);

impl ModuleVisitor for Flatten {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.insert(param.id, param.val().reshape([-1]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::init::test_module;
    use burn::nn::{Linear, LinearConfig};

    /// A layer with weight 1 and bias 0.5 in training.
    fn layer() -> Linear {
        let mut layer = test_module(|device| LinearConfig::new(1, 1).init(device));
        layer.weight = layer.weight.map(|w| w.ones_like());
        layer.bias = layer.bias.map(|b| b.map(|b| b.ones_like() * 0.5));
        layer.train()
    }

    /// Gradients `weight` and `bias` for the two parameters.
    fn gradients(layer: &Linear, weight: f32, bias: f32) -> Gradients {
        let bias_term = layer.bias.as_ref().unwrap().val() * bias;
        ((layer.weight.val() * weight).sum() + bias_term.sum()).backward()
    }

    fn values(layer: &Linear) -> [f64; 2] {
        let bias = layer.bias.as_ref().unwrap().val();
        [layer.weight.val().into_scalar::<f32>().into(), bias.into_scalar::<f32>().into()]
    }

    fn assert_close(found: [f64; 2], expected: [f64; 2]) {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?} {expected:?}");
    }

    #[test]
    fn two_steps_by_hand() {
        let mut optimiser = AdamW::new(0.1, 0.0);
        let layer = layer();
        // First step: both unbiased means are the gradient and its square, so each value moves by lr
        // against the gradient's sign; only the weight decays, by 0.01 * 0.1 of itself.
        let grads = gradients(&layer, 3.0, -4.0);
        let (layer, norm) = optimiser.step(layer, grads, 0.01);
        assert!((norm - 5.0).abs() < 1e-6);
        assert_close(values(&layer), [0.999 - 0.01, 0.5 + 0.01]);
        // Second step with the weight's gradient 1:
        // first = (0.9 * 0.3 + 0.1) / (1 - 0.81) = 0.37 / 0.19
        // second = (0.999 * 0.009 + 0.001) / (1 - 0.998001) = 0.009991 / 0.001999
        let grads = gradients(&layer, 1.0, -4.0);
        let (layer, _) = optimiser.step(layer, grads, 0.01);
        let direction = (0.37 / 0.19) / (0.009991f64 / 0.001999).sqrt();
        assert_close(values(&layer), [0.989 * 0.999 - 0.01 * direction, 0.52]);
    }

    #[test]
    fn clipping_scales_all_gradients_by_the_global_norm() {
        // Step 1 hides the scale, because it only keeps the sign; the running means show it.
        let mut optimiser = AdamW::new(0.0, 1.0);
        let layer = layer();
        let grads = gradients(&layer, 3.0, -4.0);
        let (layer, norm) = optimiser.step(layer, grads, 0.01);
        assert!((norm - 5.0).abs() < 1e-6);
        let mut file = TensorFile::new();
        optimiser.export(&layer, &mut file);
        let moment = |name| f64::from(file.get(name).unwrap().as_floats().unwrap()[0]);
        assert_close([moment("exp_avg.weight"), moment("exp_avg.bias")], [0.06, -0.08]);
        assert_close([moment("exp_avg_sq.weight"), moment("exp_avg_sq.bias")], [0.36e-3, 0.64e-3]);
    }

    #[test]
    fn an_infinite_gradient_leaves_the_module_alone() {
        let layer = layer();
        let grads = gradients(&layer, f32::INFINITY, 1.0);
        let (layer, norm) = AdamW::new(0.1, 1.0).step(layer, grads, 0.01);
        assert!(!norm.is_finite());
        assert_close(values(&layer), [1.0, 0.5]);
    }

    #[test]
    fn parameters_without_gradients_stay() {
        let mut layer = layer();
        layer.bias = layer.bias.map(|bias| bias.set_require_grad(false));
        let grads = layer.weight.val().sum().backward();
        let (layer, _) = AdamW::new(0.1, 1.0).step(layer, grads, 0.01);
        assert_close(values(&layer), [0.989, 0.5]);
    }
}
