//! The network against the reference implementation, and what must not change its results.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::{Device, Tensor};
use kiln_core::{ModelFolder, TensorFile};
use kiln_tabpfn::{TabPfn, TabPfnConfig};

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
