//! What tensor attention must satisfy, whatever the matrices.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use kiln_core::random_stream;
use kiln_kronecker_attention::attention::{AttentionOptions, tensor_attention, tensor_attention_direct};
use kiln_kronecker_attention::match3::{Convention, Instance, MatchConstruction};
use kiln_kronecker_attention::polynomial::{Basis, ExpPolynomial, tensor_attention_poly};
use rand::{Rng, RngExt};

fn draw(dims: [usize; 4], largest: f32, rng: &mut impl Rng) -> Tensor<4> {
    let values: Vec<f32> = (0..dims.iter().product()).map(|_| rng.random_range(-largest..=largest)).collect();
    Tensor::from_data(TensorData::new(values, dims), &Device::flex())
}

/// Queries, keys and values of an order, each key matrix with its own number of rows.
fn inputs(
    [batch, heads, queries, width, value_width]: [usize; 5],
    rows: &[usize],
    rng: &mut impl Rng,
) -> (Tensor<4>, Vec<Tensor<4>>, Vec<Tensor<4>>) {
    let q = draw([batch, heads, queries, width], 1.5, rng);
    let keys = rows.iter().map(|&n| draw([batch, heads, n, width], 1.5, rng)).collect();
    let values = rows.iter().map(|&n| draw([batch, heads, n, value_width], 1.5, rng)).collect();
    (q, keys, values)
}

fn values(x: Tensor<4>) -> Vec<f32> {
    x.into_data().try_to_vec().unwrap()
}

fn assert_close(found: Tensor<4>, expected: Tensor<4>, tolerance: f32) {
    let (found, expected) = (values(found), values(expected));
    assert_eq!(found.len(), expected.len());
    for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
        assert!((a - b).abs() <= tolerance * b.abs().max(1.0), "element {i}: {a}, should be {b}");
    }
}

#[test]
fn blockwise_equals_direct_for_every_order_length_and_mask() {
    let mut rng = random_stream(1, "test", 0);
    let shapes = [
        &[37][..],
        &[1],
        &[19, 19],
        &[33, 18],
        &[17, 1],
        &[5, 9, 7],
        &[3, 4, 2, 5],
        &[3, 2, 2, 1, 4],
        &[2, 3, 1, 2, 2, 2],
        &[2, 1, 2, 2, 2, 1, 3],
        &[2, 2, 1, 2, 2, 1, 2, 2],
    ];
    for (case, rows) in shapes.iter().enumerate() {
        for causal in [false, true] {
            let (q, keys, v) = inputs([2, 2, 19 + case, 5, 3], rows, &mut rng);
            let masks = rows.iter().map(|&n| {
                let seen: Vec<bool> = (0..2 * n).map(|i| i % n == 0 || rng.random_bool(0.7)).collect();
                Some(Tensor::<2, Bool>::from_data(TensorData::new(seen, [2, n]), &Device::flex()))
            });
            let options =
                AttentionOptions { key_masks: masks.collect(), ..AttentionOptions::new(0.3).causal(causal) };
            for options in [options, AttentionOptions::new(0.3).causal(causal)] {
                let blockwise = tensor_attention(q.clone(), &keys, &v, &options);
                assert_close(blockwise, tensor_attention_direct(q.clone(), &keys, &v, &options), 2e-5);
            }
        }
    }
}

#[test]
fn gradients_equal_those_of_the_definition() {
    let mut rng = random_stream(2, "test", 0);
    for rows in [&[21][..], &[19, 18], &[5, 3, 7]] {
        for causal in [false, true] {
            let (q, keys, v) = inputs([1, 2, 20, 4, 3], rows, &mut rng);
            let upstream = draw([1, 2, 20, 3], 1.0, &mut rng);
            let options = AttentionOptions::new(0.4).causal(causal);
            type Attention = fn(Tensor<4>, &[Tensor<4>], &[Tensor<4>], &AttentionOptions) -> Tensor<4>;
            let gradients = |attention: Attention| {
                let track = |x: &Tensor<4>| Tensor::from_inner(x.clone()).require_grad();
                let (q, keys, v) = (
                    track(&q),
                    keys.iter().map(track).collect::<Vec<_>>(),
                    v.iter().map(track).collect::<Vec<_>>(),
                );
                let o = attention(q.clone(), &keys, &v, &options);
                let grads = (o * Tensor::from_inner(upstream.clone())).sum().backward();
                let inputs = std::iter::once(&q).chain(&keys).chain(&v);
                inputs.map(|x| x.grad(&grads).unwrap()).collect::<Vec<_>>()
            };
            let blockwise = gradients(tensor_attention);
            for (found, expected) in blockwise.into_iter().zip(gradients(tensor_attention_direct)) {
                assert_close(found, expected, 5e-5);
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let mut rng = random_stream(3, "test", 0);
    let (q, keys, v) = inputs([1, 1, 3, 2, 2], &[4, 3], &mut rng);
    let all: Vec<Tensor<4>> = [&[q], &keys[..], &v[..]].concat();
    let options = AttentionOptions::new(0.5);
    let loss = |x: &[Tensor<4>]| {
        let o = tensor_attention(x[0].clone(), &x[1..3], &x[3..5], &options);
        (o.clone() * o.sin()).sum()
    };
    let leaves: Vec<Tensor<4>> = all.iter().map(|x| Tensor::from_inner(x.clone()).require_grad()).collect();
    let grads = loss(&leaves).backward();
    for (which, leaf) in leaves.iter().enumerate() {
        let gradient = values(leaf.grad(&grads).unwrap());
        for (i, gradient) in gradient.iter().enumerate() {
            let moved = |by: f32| {
                let mut moved = all.clone();
                let mut x = values(all[which].clone());
                x[i] += by;
                moved[which] = Tensor::from_data(TensorData::new(x, all[which].dims()), &Device::flex());
                loss(&moved).into_scalar::<f32>()
            };
            let numeric = (moved(1e-2) - moved(-1e-2)) / 2e-2;
            assert!((gradient - numeric).abs() < 2e-3, "input {which}, element {i}: {gradient} {numeric}");
        }
    }
}

#[test]
fn ones_as_second_matrices_reduce_pairs_to_ordinary_attention() {
    let mut rng = random_stream(4, "test", 0);
    let (q, keys, v) = inputs([1, 2, 9, 4, 3], &[11], &mut rng);
    let options = AttentionOptions::new(0.5);
    let ordinary = tensor_attention(q.clone(), &keys, &v, &options);
    let pairs = [keys[0].clone(), keys[0].ones_like()];
    assert_close(tensor_attention(q, &pairs, &[v[0].clone(), v[0].ones_like()], &options), ordinary, 1e-5);
}

#[test]
fn order_of_tokens_and_of_factors_does_not_matter_and_columns_may_be_rescaled() {
    let mut rng = random_stream(5, "test", 0);
    let (q, keys, v) = inputs([1, 1, 8, 4, 3], &[8, 8], &mut rng);
    let options = AttentionOptions::new(0.5);
    let o = tensor_attention(q.clone(), &keys, &v, &options);

    let swapped = |x: &[Tensor<4>]| vec![x[1].clone(), x[0].clone()];
    assert_close(tensor_attention(q.clone(), &swapped(&keys), &swapped(&v), &options), o.clone(), 1e-5);

    let order = Tensor::<1, Int>::from_ints([3, 1, 7, 0, 2, 6, 5, 4], &Device::flex());
    let permuted = |x: &Tensor<4>| x.clone().select(2, order.clone());
    let all = |x: &[Tensor<4>]| x.iter().map(permuted).collect::<Vec<_>>();
    assert_close(tensor_attention(permuted(&q), &all(&keys), &all(&v), &options), permuted(&o), 1e-5);

    let factor = Tensor::<1>::from_floats([2.0, 0.5, 4.0, 1.0], &Device::flex()).unsqueeze::<4>();
    let rescaled = [keys[0].clone() / factor.clone(), keys[1].clone()];
    assert_close(tensor_attention(q * factor, &rescaled, &v, &options), o, 1e-5);
}

#[test]
fn values_of_ones_give_one_and_huge_scores_stay_finite() {
    let mut rng = random_stream(6, "test", 0);
    let (q, keys, v) = inputs([1, 1, 20, 4, 3], &[18, 5], &mut rng);
    let ones: Vec<_> = v.iter().map(Tensor::ones_like).collect();
    let o = values(tensor_attention(q.clone(), &keys, &ones, &AttentionOptions::new(0.5)));
    assert!(o.iter().all(|x| (x - 1.0).abs() < 1e-6), "{o:?}");
    for scale in [1e4, -1e4] {
        let o = values(tensor_attention(q.clone(), &keys, &v, &AttentionOptions::new(scale)));
        assert!(o.iter().all(|x| x.is_finite()));
    }
}

#[test]
fn a_query_that_may_see_nothing_gets_zero_and_gives_no_gradient() {
    let mut rng = random_stream(7, "test", 0);
    let (q, keys, v) = inputs([1, 1, 4, 3, 2], &[5, 5], &mut rng);
    let nothing = Tensor::<2, Bool>::from_data(TensorData::new(vec![false; 5], [1, 5]), &Device::flex());
    let options = AttentionOptions::new(1.0).masked(nothing, 2);
    let q = Tensor::from_inner(q).require_grad();
    let o = tensor_attention(q.clone(), &keys, &v, &options);
    assert!(values(o.clone().inner()).iter().all(|&x| x == 0.0));
    let gradient = values(q.grad(&o.sum().backward()).unwrap());
    assert!(gradient.iter().all(|&x| x == 0.0));
}

#[test]
fn not_a_number_reaches_the_output() {
    let mut rng = random_stream(8, "test", 0);
    let (_, keys, v) = inputs([1, 1, 2, 3, 2], &[5, 5], &mut rng);
    let q = Tensor::<4>::from_floats([[[[f32::NAN, 0.0, 0.0], [1.0, 0.0, 0.0]]]], &Device::flex());
    let o = values(tensor_attention(q, &keys, &v, &AttentionOptions::new(1.0)));
    assert!(o[0].is_nan() && o[1].is_nan() && o[2].is_finite() && o[3].is_finite());
}

#[test]
fn the_certificate_bounds_the_error_in_a_hundred_random_cases() {
    let mut rng = random_stream(9, "test", 0);
    for case in 0..100 {
        let order = 1 + case % 3;
        let rows = vec![2 + case % 7; order];
        let width = 2 + case % 4;
        let (q, keys, v) = inputs([1, 1, 5, width, 2], &rows, &mut rng);
        let scale = rng.random_range(0.05..0.4) / width as f64;
        let options = AttentionOptions::new(scale);
        let range = scale * width as f64 * 1.5f64.powi(order as i32 + 1);
        let degree = rng.random_range(1..=8);
        let basis = if case % 2 == 0 { Basis::Taylor } else { Basis::Chebyshev };
        let polynomial = ExpPolynomial::new(basis, degree, range).unwrap();
        let exact = values(tensor_attention(q.clone(), &keys, &v, &options));
        let poly = values(tensor_attention_poly(q, &keys, &v, &options, &polynomial));
        let largest: f64 = v.iter().map(|v| f64::from(v.clone().abs().max().into_scalar::<f32>())).product();
        let bound = polynomial.certificate() * largest + 1e-5; // and rounding
        for (exact, poly) in exact.iter().zip(&poly) {
            let error = f64::from((exact - poly).abs());
            assert!(error <= bound, "case {case}: error {error} above the certificate {bound}");
        }
    }
}

#[test]
fn a_high_degree_gives_the_exact_output() {
    let mut rng = random_stream(10, "test", 0);
    let (q, keys, v) = inputs([2, 1, 7, 3, 2], &[9, 6], &mut rng);
    let polynomial = ExpPolynomial::new(Basis::Chebyshev, 12, 1.5f64.powi(3)).unwrap();
    let seen = (0..9).map(|j| j % 4 != 1).collect::<Vec<_>>();
    let mask =
        Tensor::<2, Bool>::from_data(TensorData::new([seen.clone(), seen].concat(), [2, 9]), &Device::flex());
    for key_masks in [vec![], vec![Some(mask), None]] {
        let options = AttentionOptions { key_masks, ..AttentionOptions::new(1.0 / 3.0) };
        let poly = tensor_attention_poly(q.clone(), &keys, &v, &options, &polynomial);
        assert_close(poly, tensor_attention(q.clone(), &keys, &v, &options), 1e-3);
    }
}

#[test]
fn the_construction_solves_random_instances() {
    let mut rng = random_stream(11, "test", 0);
    for _ in 0..200 {
        let instance = Instance::draw(rng.random_range(3..=12), rng.random_range(5..=39), &mut rng);
        let found = MatchConstruction { modulus: instance.modulus }.solve(&instance.x, &Device::flex());
        let labels = instance.labels(Convention::Any);
        assert!(found.iter().zip(labels).all(|(&o, label)| (o > 0.5) == label), "{instance:?}: {found:?}");
    }
}
