//! Selecting, pooling and adding rows by number equal Burn's operations, forward and backward.

use burn::tensor::{DType, Device, IndexingUpdateOp, Int, Tensor, TensorData, module};
use kiln_ops::{
    Pooling, embedding, embedding_bag, index_add, index_select, segment_max, segment_mean, segment_sum,
};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::support::{assert_close, assert_same, random, rng};

fn ids(values: Vec<i64>) -> Tensor<1, Int> {
    let len = values.len();
    Tensor::from_data(TensorData::new(values, [len]), &Device::flex())
}

fn random_ids(len: usize, below: usize, rng: &mut ChaCha8Rng) -> Vec<i64> {
    (0..len).map(|_| rng.random_range(0..below) as i64).collect()
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.into_data().try_to_vec().expect("the tensor holds 32-bit floats")
}

#[test]
fn an_embedding_equals_burns() {
    let mut rng = rng(0);
    for (table, width, batch, time) in [(1, 1, 1, 1), (7, 3, 4, 5), (100, 40, 30, 20), (5, 4, 0, 3)] {
        let ids = ids(random_ids(batch * time, table, &mut rng)).reshape([batch, time]);
        // A transposed table: kernels must not rely on the order in memory.
        let weight = |x: &Tensor<1>| x.clone().reshape([width, table]).transpose();
        assert_same(
            &format!("{batch} x {time} rows of a table {table} x {width}"),
            &[table * width],
            1e-5,
            |x| embedding(weight(&x[0]), ids.clone()).reshape([-1]),
            |x| module::embedding(weight(&x[0]), ids.clone()).reshape([-1]),
        );
    }
}

#[test]
fn selection_and_addition_equal_burns_for_random_shapes() {
    let mut rng = rng(1);
    for case in 0..30 {
        let [rows, n, a, b] =
            [60, if case % 6 == 0 { 4000 } else { 50 }, 5, 9].map(|m| rng.random_range(1..m));
        let ids = ids(random_ids(n, rows, &mut rng));
        let table = |x: &Tensor<1>| x.clone().reshape([a, rows, b]).swap_dims(0, 1);
        let source = |x: &Tensor<1>| x.clone().reshape([n, a, b]);
        let what = format!("{n} of [{rows}, {a}, {b}]");
        assert_same(
            &what,
            &[rows * a * b],
            1e-5,
            |x| index_select(table(&x[0]), ids.clone()).reshape([-1]),
            |x| table(&x[0]).select(0, ids.clone()).reshape([-1]),
        );
        assert_same(
            &what,
            &[rows * a * b, n * a * b],
            1e-5,
            |x| index_add(table(&x[0]), ids.clone(), source(&x[1])).reshape([-1]),
            |x| {
                let (table, source) = (table(&x[0]), source(&x[1]));
                table.select_assign(0, ids.clone(), source, IndexingUpdateOp::Add).reshape([-1])
            },
        );
    }
}

/// The definition: a matrix with a 1 where a row belongs to a segment.
fn membership(segments: &[i64], count: usize, device: &Device) -> Tensor<2> {
    let mut member = vec![0.0f32; count * segments.len()];
    for (row, &segment) in segments.iter().enumerate() {
        member[segment as usize * segments.len() + row] = 1.0;
    }
    Tensor::from_data(TensorData::new(member, [count, segments.len()]), device)
}

#[test]
fn sums_and_means_of_segments_equal_the_definition() {
    let mut rng = rng(2);
    for case in 0..30 {
        let [n, width] = [if case % 6 == 0 { 900 } else { 40 }, 20].map(|most| rng.random_range(1..most));
        let count = rng.random_range(1..90);
        let of_each = random_ids(n, count, &mut rng);
        let x = |x: &Tensor<1>| x.clone().reshape([width, n]).transpose();
        let what = format!("{n} rows of {width} in {count} segments");
        assert_same(
            &what,
            &[n * width],
            1e-5,
            |t| segment_sum(x(&t[0]), ids(of_each.clone()), count).reshape([-1]),
            |t| membership(&of_each, count, &t[0].device()).matmul(x(&t[0])).reshape([-1]),
        );
        assert_same(
            &what,
            &[n * width],
            1e-5,
            |t| segment_mean(x(&t[0]), ids(of_each.clone()), count).reshape([-1]),
            |t| {
                let member = membership(&of_each, count, &t[0].device());
                let sizes = member.clone().sum_dim(1).clamp_min(1.0);
                (member.matmul(x(&t[0])) / sizes).reshape([-1])
            },
        );
    }
}

#[test]
fn the_largest_of_each_segment_takes_the_whole_gradient() {
    let mut rng = rng(3);
    for _ in 0..20 {
        let [n, width, count] = [40, 20, 9].map(|most| rng.random_range(1..most));
        let of_each = random_ids(n, count, &mut rng);
        let x = |x: &Tensor<1>| x.clone().reshape([n, width]);
        assert_same(
            &format!("{n} rows of {width} in {count} segments"),
            &[n * width],
            1e-6,
            |t| segment_max(x(&t[0]), ids(of_each.clone()), count).reshape([-1]),
            |t| {
                let segments = (0..count as i64).map(|segment| {
                    let rows: Vec<i64> =
                        (0..n as i64).filter(|&row| of_each[row as usize] == segment).collect();
                    match rows.is_empty() {
                        true => Tensor::zeros([1, width], &t[0].device()),
                        false => x(&t[0]).select(0, ids(rows)).max_dim(0),
                    }
                });
                Tensor::cat(segments.collect(), 0).reshape([-1])
            },
        );
    }
}

#[test]
fn the_largest_may_be_infinite_or_nan_and_the_first_of_equals_wins() {
    let device = Device::flex().autodiff();
    let x = [f32::NEG_INFINITY, 1.0, f32::NAN, f32::NAN, 5.0, 5.0];
    let x = Tensor::<1>::from_floats(x, &device).reshape([6, 1]).require_grad();
    let y = segment_max(x.clone(), ids(vec![0, 1, 1, 1, 3, 3]), 4);
    let gradient = x.grad(&y.clone().sum().backward()).unwrap();
    let y = values(y.inner());
    assert!(y[1].is_nan());
    assert_eq!([y[0], y[2], y[3]], [f32::NEG_INFINITY, 0.0, 5.0]);
    assert_eq!(values(gradient), [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]);
}

#[test]
fn bags_equal_selected_rows_summed_up() {
    let mut rng = rng(4);
    for (table, width, sizes) in [
        (9, 3, vec![2, 0, 5, 1]),
        (500, 70, (0..200).map(|i| i % 7).collect()),
        (3, 2, vec![]),
        (4, 4, vec![0]),
    ] {
        let bags = sizes.len();
        let n: usize = sizes.iter().sum();
        let numbers = random_ids(n, table, &mut rng);
        let offsets: Vec<i64> =
            sizes.iter().scan(0, |end, &size| Some(std::mem::replace(end, *end + size) as i64)).collect();
        let bag_of_each: Vec<i64> = (0..bags).flat_map(|bag| vec![bag as i64; sizes[bag]]).collect();
        let weight = |x: &Tensor<1>| x.clone().reshape([table, width]);
        for pooling in [Pooling::Sum, Pooling::Mean] {
            assert_same(
                &format!("{pooling:?} of {bags} bags with {n} rows of a table {table} x {width}"),
                &[table * width],
                1e-5,
                |x| {
                    embedding_bag(weight(&x[0]), ids(numbers.clone()), ids(offsets.clone()), pooling)
                        .reshape([-1])
                },
                |x| {
                    let rows = index_select(weight(&x[0]), ids(numbers.clone()));
                    let bag_of_each = ids(bag_of_each.clone());
                    match pooling {
                        Pooling::Sum => segment_sum(rows, bag_of_each, bags).reshape([-1]),
                        Pooling::Mean => segment_mean(rows, bag_of_each, bags).reshape([-1]),
                    }
                },
            );
        }
    }
}

#[test]
fn double_precision_gives_the_same() {
    let mut rng = rng(5);
    let x = random(12, &mut rng).reshape([6, 2]);
    let double = x.clone().cast(DType::F64);
    let numbers = || ids(vec![3, 0, 3, 1, 1, 3]);
    let offsets = || ids(vec![0, 2]);
    let same = |single: Tensor<2>, double: Tensor<2>| {
        let double: Vec<f32> = double.into_data().iter::<f32>().collect();
        assert_close("rows", &double, &values(single), 1e-6);
    };
    same(index_select(x.clone(), numbers()), index_select(double.clone(), numbers()));
    same(index_add(x.clone(), numbers(), x.clone()), index_add(double.clone(), numbers(), double.clone()));
    same(segment_sum(x.clone(), numbers(), 5), segment_sum(double.clone(), numbers(), 5));
    same(segment_mean(x.clone(), numbers(), 5), segment_mean(double.clone(), numbers(), 5));
    same(segment_max(x.clone(), numbers(), 5), segment_max(double.clone(), numbers(), 5));
    for pooling in [Pooling::Sum, Pooling::Mean] {
        same(
            embedding_bag(x.clone(), numbers(), offsets(), pooling),
            embedding_bag(double.clone(), numbers(), offsets(), pooling),
        );
    }
}

#[test]
#[should_panic(expected = "the id 4 is none of the table's 4 rows")]
fn an_id_beyond_the_table_is_named() {
    embedding(Tensor::zeros([4, 2], &Device::flex()), ids(vec![0, 4]).reshape([1, 2]));
}

#[test]
#[should_panic(expected = "the segment -1 is none of the 2 segments")]
fn a_segment_that_is_not_counted_is_named() {
    segment_sum(Tensor::<2>::zeros([1, 2], &Device::flex()), ids(vec![-1]), 2);
}

#[test]
#[should_panic(expected = "the offsets of bags must rise from 0 to at most 3")]
fn offsets_that_fall_are_refused() {
    let weight = Tensor::zeros([4, 2], &Device::flex());
    embedding_bag(weight, ids(vec![0, 1, 2]), ids(vec![0, 2, 1]), Pooling::Sum);
}
