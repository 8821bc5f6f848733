//! Attention in blocks equals the definition with all scores in memory, forward and backward.

use burn::tensor::{Bool, DType, Device, Tensor, TensorData, activation};
use kiln_ops::{AttentionOptions, attention};
use rand::RngExt;

use crate::support::{assert_close, assert_same, rng};

/// Extents of one case.
#[derive(Debug, Clone, Copy)]
struct Case {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    time: usize,
    source: usize,
    dim: usize,
    value_dim: usize,
    causal: bool,
    /// 0: none, 1: one for all scores, 2: one for each batch.
    bias: usize,
    /// The extents of the mask that are not 1, if there is one.
    mask: Option<[bool; 3]>,
}

/// Both functions of flat queries, keys, values and biases.
fn compare(case: Case) {
    let Case { batch, heads, kv_heads, time, source, dim, value_dim, .. } = case;
    let bias = match case.bias {
        0 => [0, 0, 0, 0],
        1 => [1, 1, time, source],
        _ => [batch, 1, time, source],
    };
    let mask = case.mask.map(|large| {
        let [b, h, t] =
            [(large[0], batch), (large[1], heads), (large[2], time)].map(|(l, n)| if l { n } else { 1 });
        let hidden: Vec<bool> = (0..b * h * t * source).map(|i| (i * 7 + i / 3) % 5 < 2).collect();
        Tensor::<4, Bool>::from_data(TensorData::new(hidden, [b, h, t, source]), &Device::flex())
    });
    let future = (0..time * source).map(|i| case.causal && i % source + time > i / source + source);
    let future = TensorData::new(future.collect::<Vec<bool>>(), [1, 1, time, source]);
    let future = Tensor::<4, Bool>::from_data(future, &Device::flex()).expand([batch, heads, time, source]);
    // Queries and keys come from a projection: heads lie between time and channels.
    let split = |x: &Tensor<1>, heads: usize, time: usize, width: usize| {
        x.clone().reshape([batch, time, heads, width]).swap_dims(1, 2)
    };
    let inputs = |x: &[Tensor<1>]| {
        let v = x[2].clone().reshape([batch, kv_heads, source, value_dim]);
        (split(&x[0], heads, time, dim), split(&x[1], kv_heads, source, dim), v)
    };
    let kernel = |x: &[Tensor<1>]| {
        let (q, k, v) = inputs(x);
        let bias = (case.bias > 0).then(|| x[3].clone().reshape(bias));
        let mask = mask.clone();
        attention(q, k, v, AttentionOptions { causal: case.causal, mask, bias, scale: None }).reshape([-1])
    };
    let composed = |x: &[Tensor<1>]| {
        let (q, k, v) = inputs(x);
        let scores = [batch, heads, time, source];
        let repeat = |x: Tensor<4>| {
            let width = x.dims()[3];
            let x = x.reshape([batch, kv_heads, 1, source, width]);
            x.repeat_dim(2, heads / kv_heads).reshape([batch, heads, source, width])
        };
        let mut products = q.matmul(repeat(k).transpose()).div_scalar((dim as f32).sqrt());
        if case.bias > 0 {
            products = products + x[3].clone().reshape(bias);
        }
        let hidden = match &mask {
            Some(mask) => mask.clone().expand(scores).bool_or(future.clone()),
            None => future.clone(),
        };
        // A row without keys would be NaN with -∞; with a finite number its weights are set to 0.
        let weights = activation::softmax(products.mask_fill(hidden.clone(), -1e9), 3);
        weights.mask_fill(hidden, 0).matmul(repeat(v)).reshape([-1])
    };
    let lengths = [
        batch * heads * time * dim,
        batch * kv_heads * source * dim,
        batch * kv_heads * source * value_dim,
        bias.iter().product(),
    ];
    assert_same(&format!("{case:?}"), &lengths, 2e-5, kernel, composed);
}

#[test]
fn results_and_gradients_equal_the_definition_for_random_shapes() {
    let mut rng = rng(0);
    for i in 0..80 {
        let kv_heads = rng.random_range(1..4);
        compare(Case {
            batch: rng.random_range(1..4),
            heads: kv_heads * rng.random_range(1..3),
            kv_heads,
            time: if i % 5 == 0 { 1 } else { rng.random_range(1..20) },
            source: rng.random_range(1..24),
            dim: rng.random_range(1..20),
            value_dim: rng.random_range(1..20),
            causal: i % 2 == 0,
            bias: i % 3,
            mask: (i % 4 > 0).then(|| [0; 3].map(|_| rng.random_range(0..2) == 0)),
        });
    }
}

#[test]
fn several_blocks_of_queries_and_keys_make_one_softmax() {
    let large = Case {
        batch: 1,
        heads: 2,
        kv_heads: 1,
        time: 150,
        source: 1100,
        dim: 8,
        value_dim: 5,
        causal: false,
        bias: 0,
        mask: None,
    };
    compare(large);
    compare(Case { causal: true, bias: 1, ..large });
    compare(Case { mask: Some([true, false, false]), time: 1, ..large });
    // More queries than keys: the first see none.
    compare(Case { causal: true, time: 700, source: 520, mask: Some([true, true, true]), ..large });
}

#[test]
fn a_query_that_sees_no_key_gives_zero_and_has_no_gradient() {
    let device = Device::flex().autodiff();
    let q = Tensor::<4>::ones([1, 1, 3, 2], &device).require_grad();
    let k = Tensor::<4>::ones([1, 1, 2, 2], &device).require_grad();
    let mask = Tensor::<4, Bool>::from_data([[[[false, false], [true, true], [false, true]]]], &device);
    let options = AttentionOptions { causal: true, mask: Some(mask), ..Default::default() };
    let y = attention(q.clone(), k.clone(), k.clone(), options);
    let gradients = y.clone().sum().backward();
    // The first sees nothing because of causality, the second because of the mask.
    assert_close("output", &values(y.inner()), &[0.0, 0.0, 0.0, 0.0, 1.0, 1.0], 1e-6);
    assert!(values(q.grad(&gradients).unwrap()).iter().all(|x| x.is_finite()));
    assert!(values(k.grad(&gradients).unwrap()).iter().all(|x| x.is_finite()));
}

fn values(x: Tensor<4>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("the tensor holds 32-bit floats")
}

#[test]
fn empty_extents_give_empty_or_zero_results() {
    let device = Device::flex();
    let run = |[batch, heads, time, source, dim]: [usize; 5]| {
        let q = Tensor::<4>::ones([batch, heads, time, dim], &device);
        let k = Tensor::<4>::ones([batch, heads, source, dim], &device);
        let y = attention(q, k.clone(), k, AttentionOptions { causal: true, ..Default::default() });
        assert_eq!(y.dims(), [batch, heads, time, dim]);
        values(y)
    };
    for shape in [[0, 2, 3, 3, 4], [2, 0, 3, 3, 4], [2, 0, 1, 3, 4], [2, 2, 0, 3, 4], [2, 2, 3, 3, 0]] {
        assert!(run(shape).is_empty());
    }
    assert!(run([1, 1, 3, 0, 4]).iter().all(|&x| x == 0.0));
}

#[test]
fn nan_reaches_the_queries_that_see_it_and_no_others() {
    let device = Device::flex();
    let k = Tensor::<4>::from_floats([[[[1.0], [f32::NAN], [1.0]]]], &device);
    let q = Tensor::<4>::ones([1, 1, 3, 1], &device);
    let v = Tensor::<4>::ones([1, 1, 3, 1], &device);
    let y = values(attention(q, k, v, AttentionOptions { causal: true, ..Default::default() }));
    let nan: Vec<bool> = y.iter().map(|y| y.is_nan()).collect();
    assert_eq!(nan, [false, true, true]);
}

#[test]
fn double_precision_gives_the_same() {
    let mut rng = rng(5);
    let q = crate::support::random(2 * 4 * 5 * 3, &mut rng).reshape([2, 4, 5, 3]);
    let k = crate::support::random(2 * 2 * 7 * 3, &mut rng).reshape([2, 2, 7, 3]);
    let options = AttentionOptions { causal: true, scale: Some(0.3), ..Default::default() };
    let single = values(attention(q.clone(), k.clone(), k.clone(), options.clone()));
    let (q, k) = (q.cast(DType::F64), k.cast(DType::F64));
    let double: Vec<f32> = attention(q, k.clone(), k, options).into_data().iter::<f32>().collect();
    assert_close("output", &double, &single, 1e-5);
}

#[test]
#[should_panic(expected = "do not fit queries [1, 3, 2, 4]")]
fn heads_that_do_not_divide_are_refused() {
    let device = Device::flex();
    let q = Tensor::<4>::ones([1, 3, 2, 4], &device);
    let k = Tensor::<4>::ones([1, 2, 2, 4], &device);
    attention(q, k.clone(), k, AttentionOptions::default());
}
