//! Gradients of graphs are those of Burn's autodiff.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::{Device, Distribution, Tensor, TensorData};
use kiln_compiler::{Graph, GraphPass, capture};

use crate::cases::{Case, FUNCTIONS, input, weighed};

fn assert_close(found: &TensorData, expected: &TensorData, tolerance: f32, what: &str) {
    assert_eq!(found.shape(), expected.shape(), "{what}");
    let largest = expected.iter::<f32>().fold(0f32, |most, x| most.max(x.abs()));
    for (a, b) in found.iter::<f32>().zip(expected.iter::<f32>()) {
        assert!((a - b).abs() <= tolerance * (largest + 1e-3), "{what}: {a}, should be {b}");
    }
}

#[test]
fn gradients_of_every_operation_are_those_of_autodiff() {
    let device = Device::flex().autodiff();
    let (x, y) = (input([4, 6]), input([6, 4]));
    for (name, function) in FUNCTIONS {
        let graph = capture(Box::new(Case(*function))).unwrap();
        let gradient = graph.gradient("loss", &["x", "y"]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let found = gradient.run(&[x.to_data(), y.to_data()]).unwrap_or_else(|e| panic!("{name}: {e}"));
        let [tracked_x, tracked_y] =
            [&x, &y].map(|t| Tensor::<2>::from_data(t.to_data(), &device).require_grad());
        let loss = function(tracked_x.clone(), tracked_y.clone());
        let gradients = loss.backward();
        assert_close(&found[0], &loss.into_data(), 1e-4, name);
        for (tracked, found) in [tracked_x, tracked_y].iter().zip(&found[1..]) {
            let expected =
                tracked.grad(&gradients).map_or_else(|| tracked.zeros_like().into_data(), |g| g.into_data());
            assert_close(found, &expected, 1e-4, name);
        }
    }
}

#[test]
fn a_gradient_survives_passes_a_file_and_being_differentiated_again() {
    let graph = capture(Box::new(Case(|x, y| weighed(x.matmul(y).tanh())))).unwrap();
    let inputs = [input([4, 6]).to_data(), input([6, 4]).to_data()];
    let mut gradient = graph.gradient("loss", &["x"]).unwrap();
    let whole = gradient.run(&inputs).unwrap();
    GraphPass::ALL.iter().for_each(|pass| pass.apply(&mut gradient).unwrap());
    let folder = tempfile::tempdir().unwrap();
    gradient.save(folder.path()).unwrap();
    let read = Graph::load(folder.path()).unwrap();
    assert_close(&read.run(&inputs).unwrap()[1], &whole[1], 1e-6, "read back");

    // The second derivative along v: d(d_x · v)/dx, by central differences of d_x.
    let second = gradient.gradient("d_x", &["x"]).unwrap();
    assert_eq!(second.inputs.last().unwrap().port.name, "d_d_x");
    let v = Tensor::<2>::random([4, 6], Distribution::Normal(0.0, 1.0), &Device::flex());
    let along = second.run(&[inputs[0].clone(), inputs[1].clone(), v.to_data()]).unwrap().remove(1);
    let step = 1e-2;
    let moved = |by: f32| {
        let x = Tensor::<2>::from_data(inputs[0].clone(), &Device::flex()) + v.clone() * by;
        Tensor::<2>::from_data(
            gradient.run(&[x.into_data(), inputs[1].clone()]).unwrap().remove(1),
            &Device::flex(),
        )
    };
    let expected = (moved(step) - moved(-step)) / (2.0 * step);
    assert_close(&along, &expected.into_data(), 2e-2, "second derivative");
}

#[test]
fn what_has_no_gradient_is_said() {
    let graph = capture(Box::new(Case(|x, y| x.clone().prod() + y.prod() + x.sort(0).sum()))).unwrap();
    let refusal = |of: &str, wrt: &[&str]| {
        let error = graph.gradient(of, wrt).unwrap_err();
        format!("{error} {}", error.hint_text().unwrap_or(""))
    };
    let said = refusal("loss", &["x", "y"]);
    assert!(said.contains("Prod (operations") && said.contains("Sort (operations"), "{said}");
    assert!(refusal("lost", &["x"]).contains("no output \"lost\" it has: loss"));
    assert!(refusal("loss", &["z"]).contains("no input \"z\" it has: x, y"));
    assert!(refusal("loss", &["%999"]).contains("no input \"%999\""));
}
