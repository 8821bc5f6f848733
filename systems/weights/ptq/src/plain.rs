//! Operations between units, which are not quantised.

use burn::backend::ir::{
    ActivationOperationIr, FloatOperationIr, HandleKind, ModuleOperationIr, OperationIr, TensorId, TensorIr,
    TensorStatus, UnaryOpIr,
};
use burn_flex::{Flex, FlexDevice, FlexTensor};
use burn_router::TensorInterpreter;
use kiln_ops::{Activation, activate, adaptive_avg_pool2d, layer_norm, softmax};

use crate::program::{Values, of_rank, primitive, tensor};

/// Runs an operation that is not quantised: with a kernel of Kiln's where there is one, else as Burn does.
pub(crate) fn run(operation: &OperationIr, values: &mut Values) {
    let read = |id: TensorId| values[id.value() as usize].clone().expect("a step's operands are there");
    if let Some((out, y)) = with_kernel(operation, &|id| tensor(read(id))) {
        values[out.value() as usize] = Some(HandleKind::Float(y));
        return;
    }
    let mut interpreter = TensorInterpreter::<Flex>::new(FlexDevice);
    for input in operation.inputs() {
        interpreter.register_tensor_to_device(input.id, read(input.id));
    }
    interpreter.register_op(operation.clone());
    for output in operation.outputs() {
        let output = TensorIr { status: TensorStatus::ReadOnly, ..output.clone() };
        values[output.id.value() as usize] = Some(interpreter.get_tensor(&output));
    }
}

/// One arm a rank.
macro_rules! by_rank {
    ($tensor:expr, $x:ident => $result:expr) => {{
        let tensor = $tensor;
        match tensor.layout().shape().num_dims() {
            1 => Some(primitive({
                let $x = of_rank::<1>(tensor);
                $result
            })),
            2 => Some(primitive({
                let $x = of_rank::<2>(tensor);
                $result
            })),
            3 => Some(primitive({
                let $x = of_rank::<3>(tensor);
                $result
            })),
            4 => Some(primitive({
                let $x = of_rank::<4>(tensor);
                $result
            })),
            _ => None,
        }
    }};
}

/// The costly ones of the operations between units.
fn with_kernel(
    operation: &OperationIr,
    read: &dyn Fn(TensorId) -> FlexTensor,
) -> Option<(TensorId, FlexTensor)> {
    let activation = |unary: &UnaryOpIr, activation: Activation| {
        let y = by_rank!(read(unary.input.id), x => activate(x, activation))?;
        Some((unary.out.id, y))
    };
    match operation {
        OperationIr::Activation(ActivationOperationIr::Relu(unary)) => activation(unary, Activation::Relu),
        OperationIr::Activation(ActivationOperationIr::Gelu(unary)) => activation(unary, Activation::Gelu),
        OperationIr::Activation(ActivationOperationIr::Softmax(softmaxed)) => {
            let y = by_rank!(read(softmaxed.input.id), x => softmax(x, softmaxed.axis))?;
            Some((softmaxed.out.id, y))
        }
        OperationIr::Float(_, FloatOperationIr::Tanh(unary)) => activation(unary, Activation::Tanh),
        OperationIr::Module(ModuleOperationIr::LayerNorm(norm)) => {
            let vector = |id| of_rank::<1>(read(id));
            let epsilon: f64 = norm.epsilon.elem();
            let (gamma, beta) = (vector(norm.gamma.id), norm.beta.as_ref().map(|beta| vector(beta.id)));
            let y = by_rank!(read(norm.input.id), x => layer_norm(x, gamma, beta, epsilon))?;
            Some((norm.out.id, y))
        }
        OperationIr::Module(ModuleOperationIr::AdaptiveAvgPool2d(pool)) => {
            let y = adaptive_avg_pool2d(of_rank::<4>(read(pool.x.id)), pool.output_size);
            Some((pool.out.id, primitive(y)))
        }
        _ => None,
    }
}
