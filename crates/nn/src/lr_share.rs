//! Parameters that learn more slowly or faster than the others.

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::Tensor;
use kiln_core::ModulePath;
use serde::{Deserialize, Serialize};

use crate::weights::matches;

/// The learning rate of some parameters, beside that of the others.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LrShare {
    /// Names of parameters, with `*` for any characters.
    pub pattern: String,
    /// Their learning rate over that of the others.
    pub share: f64,
}

/// Values before a step, of those parameters whose steps are scaled, with the share of each.
pub(crate) struct Before(HashMap<ParamId, (Tensor<1>, f64)>);

impl Before {
    pub(crate) fn of<M: Module>(module: &M, shares: &[LrShare]) -> Self {
        let mut visitor = Visitor { path: ModulePath::default(), shares, found: HashMap::new() };
        if !shares.is_empty() {
            module.visit(&mut visitor);
        }
        Self(visitor.found)
    }

    /// The module after its step, the steps of these parameters scaled.
    pub(crate) fn scaled<M: Module>(self, module: M) -> M {
        if self.0.is_empty() { module } else { module.map(&mut Scale(self.0)) }
    }
}

struct Visitor<'a> {
    path: ModulePath,
    shares: &'a [LrShare],
    found: HashMap<ParamId, (Tensor<1>, f64)>,
}

impl ModuleVisitor for Visitor<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let name = self.path.name();
        if let Some(LrShare { share, .. }) = self.shares.iter().find(|share| matches(&share.pattern, &name)) {
            self.found.insert(param.id, (param.val().inner().reshape([-1]), *share));
        }
    }
}

struct Scale(HashMap<ParamId, (Tensor<1>, f64)>);

impl ModuleMapper for Scale {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match self.0.remove(&param.id) {
            Some((before, share)) if param.val().is_require_grad() => param.map(|after| {
                let shape = after.shape();
                let after = after.inner().reshape([-1]);
                let value = before.clone() + (after - before) * share;
                Tensor::from_inner(value.reshape::<D, _>(shape)).require_grad()
            }),
            _ => param,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::{Device, TensorData};

    #[test]
    fn a_share_of_the_learning_rate_is_a_share_of_the_step() {
        let device = Device::flex();
        let drawn: Linear = LinearConfig::new(2, 2).init(&device);
        let values = |linear: &Linear| -> (Vec<f32>, Vec<f32>) {
            let bias = linear.bias.as_ref().unwrap().val();
            (linear.weight.val().into_data().iter().collect(), bias.into_data().iter().collect())
        };
        let stepped = |share: Option<f64>| {
            let module = drawn.clone().train();
            let x = Tensor::<2>::from_data(TensorData::new(vec![1f32, -2.0], [1, 2]), &device);
            let gradients = module.forward(x).square().sum().backward();
            let shares: Vec<LrShare> =
                share.map(|share| LrShare { pattern: "w*".into(), share }).into_iter().collect();
            let before = Before::of(&module, &shares);
            let (after, _) = crate::AdamW::new(0.0, 0.0).step(module, gradients, 0.1);
            values(&before.scaled(after).valid())
        };
        let ((w0, _), (w1, b1), (w, b)) = (values(&drawn), stepped(None), stepped(Some(0.25)));
        assert_eq!(b, b1, "the bias keeps its learning rate");
        for ((w0, w1), w) in w0.iter().zip(w1).zip(w) {
            assert!((w - (w0 + 0.25 * (w1 - w0))).abs() < 1e-6 && (w1 - w0).abs() > 0.05, "{w0} {w1} {w}");
        }
    }
}
