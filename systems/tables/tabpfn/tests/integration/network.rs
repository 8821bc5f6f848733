//! The network against the reference implementation, and what must not change its results.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::{Context, ModelFolder, System, TensorFile};
use kiln_tabpfn::{TabPfn, TabPfnConfig, Tabpfn};

/// The reference's model with random weights: 12 columns, 10 classes.
fn model() -> TabPfn {
    let folder = ModelFolder::new("tests/data/model");
    let config: TabPfnConfig = serde_json::from_value(folder.config_value().unwrap()).unwrap();
    folder.weights().unwrap().into_module(config.init(&Device::flex())).unwrap()
}

/// Table `case` of the reference's vectors: columns, labels of the first rows, logits of the others.
fn case(case: &str) -> (Tensor<3>, Tensor<2>, Tensor<3>) {
    let mut file = TensorFile::read("tests/data/forward.safetensors".as_ref()).unwrap();
    let device = Device::flex();
    let mut take = |name: &str| file.take(&format!("{case}_{name}")).unwrap();
    let labelled = take("single_eval_pos").as_ints().unwrap()[0] as usize;
    let x = take("x").to_tensor::<3>(&device).unwrap().swap_dims(0, 1);
    let y = take("y").to_tensor::<2>(&device).unwrap().swap_dims(0, 1).narrow(1, 0, labelled);
    let logits = take("logits").to_tensor::<3>(&device).unwrap().swap_dims(0, 1);
    let missing = x.clone().equal_elem(-12345.0);
    (x.mask_fill(missing, f32::NAN), y, logits)
}

fn difference(a: Tensor<3>, b: Tensor<3>) -> f32 {
    (a - b).abs().max().into_scalar::<f32>()
}

#[test]
fn logits_are_those_of_the_reference() {
    for name in ["a", "b", "c"] {
        let (x, y, logits) = case(name);
        assert!(difference(model().forward(x, y), logits) < 1e-4, "case {name}");
    }
}

#[test]
fn labelled_rows_passed_once_serve_any_number_of_rows_after() {
    let (x, y, logits) = case("a");
    let (model, [_, labelled]) = (model(), y.dims());
    let context = model.context(x.clone().narrow(1, 0, labelled), y);
    let rows = x.narrow(1, labelled, logits.dims()[1]);
    assert!(difference(model.query(&context, rows.clone()), logits.clone()) < 1e-4);
    for row in 0..logits.dims()[1] {
        let alone = model.query(&context, rows.clone().narrow(1, row, 1));
        assert!(difference(alone, logits.clone().narrow(1, row, 1)) < 1e-4, "row {row}");
    }
}

#[test]
fn the_order_of_labelled_rows_means_nothing() {
    let (x, y, logits) = case("b");
    let [_, labelled] = y.dims();
    let turned = x.clone().narrow(1, 0, labelled).flip([1]);
    let x = Tensor::cat(vec![turned, x.narrow(1, labelled, logits.dims()[1])], 1);
    assert!(difference(model().forward(x, y.flip([1])), logits) < 1e-4);
}

/// Mean of the squared logits of a case, as a function of the parameters.
fn objective(model: &TabPfn) -> Tensor<1> {
    let (x, y, _) = case("b");
    model.forward(x, y).powi_scalar(2).mean()
}

#[test]
fn gradients_are_the_slopes_of_the_objective() {
    let trained = model().train();
    let gradients = objective(&trained).backward();
    let layer = &trained.transformer_encoder.layers[1];
    let slope = |weight: &Param<Tensor<2>>, place: fn(&mut TabPfn) -> &mut Param<Tensor<2>>| {
        let gradient = weight.val().grad(&gradients).unwrap();
        let norm = gradient.clone().powi_scalar(2).sum().sqrt().into_scalar::<f32>();
        let at = |step: f32| {
            let mut moved = model();
            let parameter = place(&mut moved);
            *parameter = Param::from_tensor(parameter.val() + gradient.clone() * (step / norm));
            f64::from(objective(&moved).into_scalar::<f32>())
        };
        let step = 0.02;
        ((at(step) - at(-step)) / f64::from(2.0 * step), f64::from(norm))
    };
    let pairs = [
        slope(&layer.self_attn.in_proj_weight, |m| {
            &mut m.transformer_encoder.layers[1].self_attn.in_proj_weight
        }),
        slope(&layer.self_attn.out_proj.weight, |m| {
            &mut m.transformer_encoder.layers[1].self_attn.out_proj.weight
        }),
        slope(&layer.linear2.weight, |m| &mut m.transformer_encoder.layers[1].linear2.weight),
        slope(&trained.encoder.weight, |m| &mut m.encoder.weight),
        slope(&trained.y_encoder.weight, |m| &mut m.y_encoder.weight),
    ];
    for (number, (measured, expected)) in pairs.into_iter().enumerate() {
        assert!(
            (measured - expected).abs() < 0.01 * expected + 1e-5,
            "{number}: {measured} against {expected}"
        );
    }
}

#[test]
fn a_model_as_a_network_gives_the_logits_of_the_model_on_inputs_of_its_ports() {
    let network = Tabpfn.network("tests/data/model".as_ref(), &Context::for_tests("unused")).unwrap();
    let shapes: Vec<Vec<usize>> = network.inputs().into_iter().map(|port| port.shape).collect();
    let fill =
        |shape: &[usize]| -> Vec<f32> { (0..shape.iter().product()).map(|i| (i % 7) as f32 / 7.0).collect() };
    let x = Tensor::<3>::from_data(TensorData::new(fill(&shapes[0]), shapes[0].clone()), &Device::flex());
    let y = Tensor::<2>::zeros([shapes[1][0], shapes[1][1]], &Device::flex());
    let output = network.forward(vec![x.clone().into_dispatch(), y.clone().into_dispatch()]).remove(0);
    let output = Tensor::<3>::from_dispatch(output);
    assert_eq!(output.dims().to_vec(), network.outputs()[0].shape);
    assert_eq!(difference(output, model().forward(x, y)), 0.0);
}
