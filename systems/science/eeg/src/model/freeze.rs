//! Networks of which only a part learns.

use burn::module::{Flag, Module, ModuleMapper, Param};
use burn::tensor::Tensor;
use kiln_core::ModulePath;

/// The module with the parameters that `chosen` names frozen. A batch norm among them keeps its running statistics and a
/// dropout drops nothing.
pub fn freeze<M: Module>(module: M, chosen: impl Fn(&str) -> bool) -> M {
    module.map(&mut Freezer { path: ModulePath::default(), chosen })
}

struct Freezer<F> {
    path: ModulePath,
    chosen: F,
}

impl<F: Fn(&str) -> bool> ModuleMapper for Freezer<F> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        match (self.chosen)(&self.path.name()) {
            true => param.set_require_grad(false),
            false => param,
        }
    }

    fn map_flag(&mut self, flag: Param<Flag>) -> Param<Flag> {
        match (self.chosen)(&self.path.name()) {
            true => flag.with_value(false),
            false => flag,
        }
    }
}
