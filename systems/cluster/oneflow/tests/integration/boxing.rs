//! Conversions between thread ranks: every pair of forms gives back the tensor and sends the bytes that were predicted.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::TensorData;
use burn_flex::FlexTensor;
use kiln_cluster::run_threads;
use kiln_core::random_stream;
use kiln_oneflow::boxing::Router;
use kiln_oneflow::exchange::Lines;
use kiln_oneflow::sbp::{NdSbp, Reduction, Sbp};
use kiln_oneflow::soundness::{gather, scatter};
use rand::RngExt;

/// Whole numbers, so that sums are exact in any order.
fn tensor(shape: &[usize]) -> TensorData {
    let mut rng = random_stream(5, "boxing", shape.len() as u64);
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| f32::from(rng.random_range(-9..9i8))).collect();
    TensorData::new(values, shape.to_vec())
}

fn forms(axes: usize, kinds: &[Sbp]) -> Vec<NdSbp> {
    let mut forms = vec![NdSbp(Vec::new())];
    for _ in 0..axes {
        forms = forms
            .iter()
            .flat_map(|form| kinds.iter().map(|&kind| NdSbp([&form.0[..], &[kind]].concat())))
            .collect();
    }
    forms
}

/// Converts a tensor and compares what all ranks have then, and the bytes they have sent.
fn check_all(shape: &[usize], mesh: &[usize], pairs: &[(NdSbp, NdSbp)]) {
    let whole = tensor(shape);
    let mut rng = random_stream(6, "parts", 0);
    let parts: Vec<Vec<TensorData>> = pairs
        .iter()
        .map(|(from, _)| {
            // Parts of sums are whole numbers too; no zero is negative, as bits are compared.
            let rounded = |part: TensorData| {
                let values: Vec<f32> = part.iter::<f32>().map(|x| x.round() + 0.0).collect();
                TensorData::new(values, part.shape().clone())
            };
            let is_sum = from.0.contains(&Sbp::SUM);
            let integers = whole.clone().convert_dtype(burn::tensor::DType::I64);
            let source = if is_sum { &integers } else { &whole };
            scatter(source, from, mesh, &mut rng).unwrap().into_iter().map(rounded).collect()
        })
        .collect();
    let mut router = Router::new(mesh);
    let paths: Vec<_> = pairs.iter().map(|(from, to)| router.path(shape, 4, from, to).unwrap()).collect();
    let ranks = run_threads(mesh.iter().product(), |world| {
        let lines = Lines::new(&world, mesh)?;
        let mut found = Vec::new();
        for (at, (from, _)) in pairs.iter().enumerate() {
            let before = lines.bytes_sent();
            let local = FlexTensor::from_data(parts[at][world.rank()].clone());
            let local = lines.convert(local, shape, from, &paths[at])?;
            found.push((local.into_data(), lines.bytes_sent() - before));
        }
        Ok(found)
    })
    .unwrap();
    for (at, (from, to)) in pairs.iter().enumerate() {
        let place = format!("{from} to {to} of {shape:?} on {mesh:?} by {:?}", paths[at]);
        let locals = ranks.iter().map(|rank| rank[at].0.clone()).collect();
        assert_eq!(gather(shape, mesh, to, locals).unwrap(), whole, "{place}");
        let sent: u64 = ranks.iter().map(|rank| rank[at].1).sum();
        assert_eq!(sent, paths[at].iter().map(|step| step.bytes).sum::<u64>(), "{place}");
    }
}

#[test]
fn every_pair_of_forms_round_trips_and_sends_what_was_predicted() {
    let kinds = [Sbp::S(0), Sbp::S(1), Sbp::B, Sbp::SUM];
    for mesh in [&[1][..], &[2], &[3], &[4], &[2, 2], &[2, 3]] {
        let forms = forms(mesh.len(), &kinds);
        let pairs: Vec<_> =
            forms.iter().flat_map(|a| forms.iter().map(move |b| (a.clone(), b.clone()))).collect();
        for shape in [[7, 5], [1, 3]] {
            check_all(&shape, mesh, &pairs);
        }
    }
}

#[test]
fn extremes_are_reduced() {
    for kind in [Reduction::Max, Reduction::Min] {
        let from = NdSbp(vec![Sbp::P(kind)]);
        let to = [Sbp::S(0), Sbp::S(1), Sbp::B];
        let pairs: Vec<_> = to.into_iter().map(|to| (from.clone(), NdSbp(vec![to]))).collect();
        check_all(&[5, 4], &[3], &pairs);
    }
}

/// ⟨L x, y⟩ = ⟨x, Lᵀ y⟩ over the local tensors of all ranks.
#[test]
fn the_gradient_of_a_conversion_is_the_conversion_between_the_dual_forms() {
    let (shape, mesh) = ([5, 4], [3]);
    let forms = forms(1, &[Sbp::S(0), Sbp::S(1), Sbp::B, Sbp::SUM]);
    for from in &forms {
        for to in &forms {
            let mut router = Router::new(&mesh);
            let path = router.path(&shape, 4, from, to).unwrap();
            let back = router.path(&shape, 4, &to.dual(), &from.dual()).unwrap();
            let products = run_threads(3, |world| {
                let lines = Lines::new(&world, &mesh)?;
                let random = |form: &NdSbp, number: u64| {
                    let region = kiln_oneflow::sbp::Region::local(&shape, &mesh, form, lines.coordinate());
                    let mut rng = random_stream(number, "local", world.rank() as u64);
                    let values: Vec<f32> =
                        (0..region.elements()).map(|_| f32::from(rng.random_range(-9..9i8))).collect();
                    TensorData::new(values, region.size)
                };
                let (x, y) = (random(from, 1), random(to, 2));
                let forth = lines.convert(FlexTensor::from_data(x.clone()), &shape, from, &path)?.into_data();
                let gradient =
                    lines.convert(FlexTensor::from_data(y.clone()), &shape, &to.dual(), &back)?.into_data();
                let dot = |a: &TensorData, b: &TensorData| {
                    a.iter::<f64>().zip(b.iter::<f64>()).map(|(a, b)| a * b).sum::<f64>()
                };
                Ok((dot(&forth, &y), dot(&x, &gradient)))
            })
            .unwrap();
            let sums = products.iter().fold((0.0, 0.0), |sums, one| (sums.0 + one.0, sums.1 + one.1));
            assert_eq!(sums.0, sums.1, "{from} to {to}");
        }
    }
}
