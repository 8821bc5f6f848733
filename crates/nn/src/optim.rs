//! Optimisers of modules: which tensors make the steps of [`kiln_ops`], and what is kept between them.

use std::collections::{BTreeMap, HashMap, HashSet};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::{Gradients, Shape, Tensor};
use kiln_core::{Error, HostTensor, ModulePath, Result, TensorFile};
use kiln_ops::{AdagradStep, AdamWStep, Parameter, SgdStep, gradient_norm};

const FIRST_PREFIX: &str = "exp_avg.";
const SECOND_PREFIX: &str = "exp_avg_sq.";
/// Steps of each parameter, in the order of the module's fields.
const STEPS: &str = "exp_avg_steps";
const MOMENTUM_PREFIX: &str = "momentum.";

/// AdamW (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", arXiv 1711.05101) with clipping of
/// the gradients' global norm.
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
    /// Each number of the gradients is first cut to this size; 0 leaves them as they are.
    pub clip_value: f64,
    /// Factors of the learning rate, each for the parameters whose names in a [`TensorFile`] begin so; the first that
    /// fits counts, and 1 where none does.
    pub rates: Vec<(String, f64)>,
    /// How many steps each parameter has made: one that has no gradient in a step makes none.
    steps: HashMap<ParamId, i32>,
    /// Running means of every parameter's gradient and squared gradient, flattened.
    moments: HashMap<ParamId, [Tensor<1>; 2]>,
}

impl AdamW {
    /// An optimiser before its first step, with betas 0.9 and 0.999 and epsilon 1e-8.
    pub fn new(weight_decay: f64, clip_norm: f64) -> Self {
        Self {
            betas: (0.9, 0.999),
            epsilon: 1e-8,
            weight_decay,
            clip_norm,
            clip_value: 0.0,
            rates: Vec::new(),
            steps: HashMap::new(),
            moments: HashMap::new(),
        }
    }

    /// One step against the gradients; returns the module and the gradients' norm before clipping.
    ///
    /// When that norm is not finite the module comes back as it was, for the caller to judge.
    /// Parameters without a gradient stay as they are.
    pub fn step<M: Module>(&mut self, module: M, gradients: Gradients, lr: f64) -> (M, f64) {
        let (gradients, norm) = collect(&module, gradients);
        if gradients.is_empty() || !norm.is_finite() {
            return (module, norm);
        }
        let (gradients, scale) = clipped(gradients, norm, self.clip_value, self.clip_norm);
        let rates = factors(&module, &self.rates);
        let turns: Vec<Turn> = gradients
            .iter()
            .map(|(id, _)| Turn { number: self.count(*id), lr: lr * rates.get(id).unwrap_or(&1.0) })
            .collect();
        let step = |Turn { number: step, lr }| AdamWStep {
            lr,
            betas: self.betas,
            epsilon: self.epsilon,
            step,
            scale,
        };
        let decay = |axes| if axes >= 2 { self.weight_decay } else { 0.0 };
        let module = update(module, gradients, &mut self.moments, decay, |parameters| {
            by_turn(parameters, &turns, |turn, group| step(turn).apply(group))
        });
        (module, norm)
    }

    /// The number of the step that a parameter is about to make.
    fn count(&mut self, id: ParamId) -> i32 {
        let steps = self.steps.entry(id).or_default();
        *steps += 1;
        *steps
    }

    /// Adds the running means to `file` as `exp_avg.<name>` and `exp_avg_sq.<name>`, named and laid out
    /// as [`TensorFile`] does the parameters of `module`, and the parameters' numbers of steps.
    pub fn export<M: Module>(&self, module: &M, file: &mut TensorFile) {
        for (which, prefix) in [FIRST_PREFIX, SECOND_PREFIX].into_iter().enumerate() {
            let moments = module.valid().map(&mut Export { moments: &self.moments, which });
            file.insert_section(prefix, TensorFile::from_module(&moments));
        }
        let steps: Vec<i64> =
            ids(module).iter().map(|id| self.steps.get(id).copied().unwrap_or(0).into()).collect();
        file.insert(STEPS, HostTensor::int([steps.len()], steps));
    }

    /// Takes the running means out of `file`. Where it does not say how many steps each parameter has made, all have
    /// made `steps`.
    ///
    /// # Errors
    /// When one is missing or does not fit the parameters of `module`.
    pub fn import<M: Module>(&mut self, module: &M, file: &mut TensorFile, steps: usize) -> Result<()> {
        let ids = ids(module);
        let counts = match file.get(STEPS) {
            Some(_) => file.take(STEPS)?,
            None => HostTensor::int([ids.len()], vec![steps as i64; ids.len()]),
        };
        let counts = counts.as_ints().filter(|counts| counts.len() == ids.len()).ok_or_else(|| {
            let found =
                format!("tensor \"{STEPS}\" does not hold a number for each of {} parameters", ids.len());
            Error::input(file.source().display(), found).hint("is it a checkpoint of this network?")
        })?;
        let counts = counts.iter().map(|&count| i32::try_from(count).unwrap_or(i32::MAX));
        self.steps = ids.into_iter().zip(counts).filter(|(_, count)| *count > 0).collect();
        let mut section =
            |prefix| Result::Ok(flattened(file.take_section(prefix).into_module(module.valid())?));
        let mut first = section(FIRST_PREFIX)?;
        self.moments = section(SECOND_PREFIX)?
            .into_iter()
            .filter_map(|(id, second)| Some((id, [first.remove(&id)?, second])))
            .collect();
        Ok(())
    }
}

/// What tells the steps of parameters apart.
#[derive(Debug, Clone, Copy)]
struct Turn {
    /// How many the parameter has made with this one.
    number: i32,
    /// The learning rate, at least 0.
    lr: f64,
}

/// Parameters whose steps are alike, and their places among all.
struct Group<const S: usize> {
    turn: Turn,
    places: Vec<usize>,
    parameters: Vec<Parameter<S>>,
}

/// Applies `step` to parameters whose steps are alike, one group after another.
fn by_turn<const S: usize>(
    parameters: Vec<Parameter<S>>,
    turns: &[Turn],
    step: impl Fn(Turn, Vec<Parameter<S>>) -> Vec<Parameter<S>>,
) -> Vec<Parameter<S>> {
    let mut groups: BTreeMap<(i32, u64), Group<S>> = BTreeMap::new();
    for (place, (parameter, &turn)) in parameters.into_iter().zip(turns).enumerate() {
        let group = groups.entry((turn.number, turn.lr.to_bits()));
        let group = group.or_insert_with(|| Group { turn, places: Vec::new(), parameters: Vec::new() });
        group.places.push(place);
        group.parameters.push(parameter);
    }
    let stepped = groups
        .into_values()
        .flat_map(|Group { turn, places, parameters }| places.into_iter().zip(step(turn, parameters)));
    let mut stepped: Vec<(usize, Parameter<S>)> = stepped.collect();
    stepped.sort_by_key(|(place, _)| *place);
    stepped.into_iter().map(|(_, parameter)| parameter).collect()
}

/// The factors of the learning rates of those parameters that have one.
fn factors<M: Module>(module: &M, rates: &[(String, f64)]) -> HashMap<ParamId, f64> {
    let mut rated = Rated { path: ModulePath::default(), rates, found: HashMap::new() };
    if !rates.is_empty() {
        module.visit(&mut rated);
    }
    rated.found
}

struct Rated<'a> {
    path: ModulePath,
    rates: &'a [(String, f64)],
    found: HashMap<ParamId, f64>,
}

impl ModuleVisitor for Rated<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.path.name();
        let rate = self.rates.iter().find(|(prefix, _)| name.starts_with(prefix.as_str()));
        self.found.extend(rate.map(|(_, rate)| (param.id, *rate)));
    }
}

/// Gradient descent with momentum.
#[derive(Debug, Clone)]
pub struct Sgd {
    /// How much of the earlier steps each step keeps; 0 is plain gradient descent.
    pub momentum: f64,
    /// Whether steps look ahead by one application of the momentum (Nesterov).
    pub nesterov: bool,
    /// This fraction of every parameter is added to its gradient.
    pub weight_decay: f64,
    /// Gradients are scaled down to this Euclidean norm over all parameters; 0 leaves them as they are.
    pub clip_norm: f64,
    /// Each number of the gradients is first cut to this size; 0 leaves them as they are.
    pub clip_value: f64,
    buffers: HashMap<ParamId, [Tensor<1>; 1]>,
}

impl Sgd {
    /// An optimiser before its first step, without Nesterov's momentum, weight decay and clipping.
    pub fn new(momentum: f64) -> Self {
        Self {
            momentum,
            nesterov: false,
            weight_decay: 0.0,
            clip_norm: 0.0,
            clip_value: 0.0,
            buffers: HashMap::new(),
        }
    }

    /// One step against the gradients. Parameters without a gradient stay as they are.
    pub fn step<M: Module>(&mut self, module: M, gradients: Gradients, lr: f64) -> M {
        self.step_and_norm(module, gradients, lr).0
    }

    /// As [`step`](Self::step), with the gradients' norm before clipping. When that is not finite the module comes back
    /// as it was, for the caller to judge.
    pub fn step_and_norm<M: Module>(&mut self, module: M, gradients: Gradients, lr: f64) -> (M, f64) {
        let (gradients, norm) = collect(&module, gradients);
        if gradients.is_empty() || !norm.is_finite() {
            return (module, norm);
        }
        let (gradients, scale) = clipped(gradients, norm, self.clip_value, self.clip_norm);
        let step = SgdStep { lr, momentum: self.momentum, nesterov: self.nesterov, scale };
        let module = update(module, gradients, &mut self.buffers, |_| self.weight_decay, |p| step.apply(p));
        (module, norm)
    }

    /// Adds what is kept of earlier steps to `file` as `momentum.<name>`, named as [`AdamW::export`] does.
    pub fn export<M: Module>(&self, module: &M, file: &mut TensorFile) {
        let buffers = module.valid().map(&mut Export { moments: &self.buffers, which: 0 });
        file.insert_section(MOMENTUM_PREFIX, TensorFile::from_module(&buffers));
    }

    /// Takes it out of `file`.
    ///
    /// # Errors
    /// When a part is missing or does not fit the parameters of `module`.
    pub fn import<M: Module>(&mut self, module: &M, file: &mut TensorFile) -> Result<()> {
        let buffers = flattened(file.take_section(MOMENTUM_PREFIX).into_module(module.valid())?);
        self.buffers = buffers.into_iter().map(|(id, buffer)| (id, [buffer])).collect();
        Ok(())
    }
}

/// Adagrad (Duchi, Hazan and Singer, "Adaptive Subgradient Methods", JMLR 12, 2011).
#[derive(Debug, Clone)]
pub struct Adagrad {
    /// Added to the root of the sum of squared gradients.
    pub epsilon: f64,
    /// This fraction of every parameter is added to its gradient.
    pub weight_decay: f64,
    squares: HashMap<ParamId, [Tensor<1>; 1]>,
}

impl Adagrad {
    /// An optimiser before its first step, with epsilon 1e-10 and without weight decay.
    pub fn new() -> Self {
        Self { epsilon: 1e-10, weight_decay: 0.0, squares: HashMap::new() }
    }

    /// One step against the gradients. Parameters without a gradient stay as they are.
    pub fn step<M: Module>(&mut self, module: M, gradients: Gradients, lr: f64) -> M {
        let step = AdagradStep { lr, epsilon: self.epsilon, scale: 1.0 };
        let (gradients, _) = collect(&module, gradients);
        update(module, gradients, &mut self.squares, |_| self.weight_decay, |p| step.apply(p))
    }
}

impl Default for Adagrad {
    fn default() -> Self {
        Self::new()
    }
}

/// Gradients of this norm with every number cut to `value`, and what then scales them down to the norm `largest`.
fn clipped(
    mut gradients: Vec<(ParamId, Tensor<1>)>,
    mut norm: f64,
    value: f64,
    largest: f64,
) -> (Vec<(ParamId, Tensor<1>)>, f64) {
    if value > 0.0 {
        gradients = gradients.into_iter().map(|(id, gradient)| (id, gradient.clamp(-value, value))).collect();
        let cut: Vec<Tensor<1>> = gradients.iter().map(|(_, gradient)| gradient.clone()).collect();
        norm = gradient_norm(&cut);
    }
    (gradients, if largest > 0.0 && norm > largest { largest / norm } else { 1.0 })
}

/// The gradients of the module's parameters, flattened and in the order of its fields, and their norm.
fn collect<M: Module>(module: &M, gradients: Gradients) -> (Vec<(ParamId, Tensor<1>)>, f64) {
    let mut collector = Collect { gradients, flat: Vec::new() };
    module.visit(&mut collector);
    let flat: Vec<Tensor<1>> = collector.flat.iter().map(|(_, gradient)| gradient.clone()).collect();
    (collector.flat, gradient_norm(&flat))
}

struct Collect {
    gradients: Gradients,
    flat: Vec<(ParamId, Tensor<1>)>,
}

impl ModuleVisitor for Collect {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = param.val().grad_remove(&mut self.gradients) {
            self.flat.push((param.id, gradient.reshape([-1])));
        }
    }
}

/// Applies one step to every parameter that has a gradient.
///
/// The parameters leave the module meanwhile, so that the step is their memory's only owner and can work in
/// place. `decay` gives the weight decay of a parameter with so many axes.
fn update<M: Module, const S: usize>(
    module: M,
    gradients: Vec<(ParamId, Tensor<1>)>,
    states: &mut HashMap<ParamId, [Tensor<1>; S]>,
    decay: impl Fn(usize) -> f64,
    step: impl FnOnce(Vec<Parameter<S>>) -> Vec<Parameter<S>>,
) -> M {
    let mut values = Take { wanted: gradients.iter().map(|(id, _)| *id).collect(), taken: HashMap::new() };
    let module = module.map(&mut values);
    let mut owners = Vec::new();
    let parameters = gradients.into_iter().map(|(id, gradient)| {
        let (value, shape) = values.taken.remove(&id).expect("every gradient is that of a parameter");
        let state = states.remove(&id).unwrap_or_else(|| [(); S].map(|()| gradient.zeros_like()));
        let weight_decay = decay(shape.num_dims());
        owners.push((id, shape));
        Parameter { value, gradient, state, weight_decay }
    });
    let after = step(parameters.collect());

    let mut values = HashMap::new();
    for ((id, shape), Parameter { value, state, .. }) in owners.into_iter().zip(after) {
        values.insert(id, (value, shape));
        states.insert(id, state);
    }
    module.map(&mut Put(values))
}

/// Takes the wanted parameters out of a module, flattened and with their shapes.
struct Take {
    wanted: HashSet<ParamId>,
    taken: HashMap<ParamId, (Tensor<1>, Shape)>,
}

impl ModuleMapper for Take {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if !self.wanted.remove(&param.id) {
            return param;
        }
        let id = param.id;
        param.map(|value| {
            let (shape, device) = (value.shape(), value.device());
            self.taken.insert(id, (value.inner().reshape([-1]), shape));
            Tensor::empty([0; D], &device)
        })
    }
}

/// Puts parameters back in their places, as leaves of the next step's graph.
struct Put(HashMap<ParamId, (Tensor<1>, Shape)>);

impl ModuleMapper for Put {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.remove(&param.id) {
            Some((value, shape)) => {
                param.map(|_| Tensor::from_inner(value.reshape::<D, _>(shape)).require_grad())
            }
            None => param,
        }
    }
}

/// Puts running means in the place of parameters; zeros where there are none yet.
struct Export<'a, const S: usize> {
    moments: &'a HashMap<ParamId, [Tensor<1>; S]>,
    which: usize,
}

impl<const S: usize> ModuleMapper for Export<'_, S> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let moments = self.moments.get(&param.id).map(|moments| &moments[self.which]);
        param.map(|value| match moments {
            Some(moment) => moment.clone().reshape(value.dims()),
            None => value.zeros_like(),
        })
    }
}

/// Every parameter, in the order of the module's fields.
fn ids<M: Module>(module: &M) -> Vec<ParamId> {
    let mut ids = Ids(Vec::new());
    module.visit(&mut ids);
    ids.0
}

struct Ids(Vec<ParamId>);

impl ModuleVisitor for Ids {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.push(param.id);
    }
}

/// Every parameter of a module, flattened.
fn flattened<M: Module>(module: M) -> HashMap<ParamId, Tensor<1>> {
    let mut flat = Flatten::default();
    module.visit(&mut flat);
    flat.0
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
    fn parameters_with_a_rate_of_their_own_move_by_it() {
        let mut optimiser = AdamW::new(0.0, 0.0);
        optimiser.rates = vec![("bias".into(), 0.1), ("".into(), 2.0), ("weight".into(), 9.0)];
        let mut module = layer();
        // Gradients that stay as they are move values by the learning rate in every step.
        for steps in [1.0, 2.0] {
            let grads = gradients(&module, 3.0, -4.0);
            module = optimiser.step(module, grads, 0.01).0;
            assert_close(values(&module), [1.0 - 0.02 * steps, 0.5 + 0.001 * steps]);
        }
    }

    #[test]
    fn momentum_and_adagrad_by_hand() {
        // Nesterov's momentum, twice the gradient 2: b = 2, then 0.5 * 2 + 2 = 3.
        let mut optimiser = Sgd { nesterov: true, ..Sgd::new(0.5) };
        let mut module = layer();
        for step in [2.0 + 0.5 * 2.0, 2.0 + 0.5 * 3.0] {
            let before = values(&module);
            let grads = gradients(&module, 2.0, 0.0);
            module = optimiser.step(module, grads, 0.1);
            assert_close(values(&module), [before[0] - 0.1 * step, 0.5]);
        }
        // Adagrad: each value moves by lr against the sign, then by lr g / √(2 g²).
        let (mut optimiser, mut module) = (Adagrad::new(), layer());
        for step in [1.0, 0.5f64.sqrt()] {
            let before = values(&module);
            let grads = gradients(&module, 3.0, -4.0);
            module = optimiser.step(module, grads, 0.1);
            assert_close(values(&module), [before[0] - 0.1 * step, before[1] + 0.1 * step]);
        }
    }

    #[test]
    fn a_module_that_is_kept_does_not_change_with_the_one_that_steps() {
        let kept = layer();
        let grads = gradients(&kept, 3.0, -4.0);
        let (stepped, _) = AdamW::new(0.1, 0.0).step(kept.clone(), grads, 0.01);
        assert_close(values(&kept), [1.0, 0.5]);
        assert_close(values(&stepped), [0.989, 0.51]);
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
    fn clipping_by_value_cuts_each_number_before_the_norm_is_clipped() {
        let mut optimiser = AdamW::new(0.0, 1.0);
        optimiser.clip_value = 3.0;
        let layer = layer();
        let grads = gradients(&layer, 4.0, -30.0);
        let (layer, norm) = optimiser.step(layer, grads, 0.01);
        assert!((norm - 916f64.sqrt()).abs() < 1e-4, "{norm}"); // before any clipping
        let mut file = TensorFile::new();
        optimiser.export(&layer, &mut file);
        let moment = |name| f64::from(file.get(name).unwrap().as_floats().unwrap()[0]);
        // (3, -3) / √18 in place of (4, -30) / √916
        assert_close([moment("exp_avg.weight"), moment("exp_avg.bias")], [0.070711, -0.070711]);
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
    fn a_parameter_counts_only_the_steps_that_it_makes_also_after_a_resume() {
        let mut optimiser = AdamW::new(0.1, 0.0);
        let mut module = layer();
        let weight_only = |layer: &Linear| (layer.weight.val() * 3.0).sum().backward();
        for _ in 0..3 {
            let gradients = weight_only(&module);
            module = optimiser.step(module, gradients, 0.01).0;
        }
        let mut file = TensorFile::new();
        optimiser.export(&module, &mut file);
        let mut resumed = AdamW::new(0.1, 0.0);
        resumed.import(&module, &mut file, 3).unwrap();
        // The bias makes its first step now, which is by the learning rate as every first step.
        for mut optimiser in [optimiser, resumed] {
            let gradients = gradients(&module, 3.0, -4.0);
            let after = values(&optimiser.step(module.clone(), gradients, 0.01).0);
            assert_close([after[1], after[1]], [0.51, 0.51]);
        }
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
