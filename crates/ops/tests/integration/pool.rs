//! Pooling equals Burn's, forward and backward, for shapes of every kind.

use burn::tensor::ops::{AvgPoolOptions, MaxPoolOptions};
use burn::tensor::{DType, Device, Tensor, module};
use kiln_ops::{adaptive_avg_pool1d, adaptive_avg_pool2d, avg_pool1d, avg_pool2d, max_pool1d, max_pool2d};
use rand::RngExt;

use crate::support::{assert_same, rng};

/// Compares two functions of one tensor; of a view that is not contiguous now and then.
fn compare<const D: usize>(
    what: &str,
    shape: [usize; D],
    case: usize,
    kernel: impl Fn(Tensor<D>) -> Tensor<D>,
    composed: impl Fn(Tensor<D>) -> Tensor<D>,
) {
    let run = |x: &[Tensor<1>], f: &dyn Fn(Tensor<D>) -> Tensor<D>| {
        let mut stored = shape;
        stored.swap(0, D - 1);
        let x = match case % 3 {
            0 => x[0].clone().reshape(stored).swap_dims(0, D - 1),
            _ => x[0].clone().reshape(shape),
        };
        f(x).reshape([-1])
    };
    let what = format!("{what} of {shape:?}");
    assert_same(&what, &[shape.iter().product()], 1e-5, |x| run(x, &kernel), |x| run(x, &composed));
}

#[test]
fn pooling_over_two_axes_equals_burns() {
    let mut rng = rng(1);
    for case in 0..80usize {
        let kernel = [(); 2].map(|()| rng.random_range(1..5));
        let stride = [(); 2].map(|()| rng.random_range(1..4));
        let padding = kernel.map(|kernel: usize| rng.random_range(0..=kernel / 2));
        let dilation = [(); 2].map(|()| rng.random_range(1..3));
        let ceil_mode = rng.random_bool(0.5);
        let [height, width] = [0, 1].map(|axis| {
            let reach = dilation[axis] * (kernel[axis] - 1) + 1;
            rng.random_range(1..20).max(reach)
        });
        let shape = [rng.random_range(1..4), rng.random_range(1..4), height, width];
        let options = || {
            MaxPoolOptions::new(kernel)
                .with_stride(stride)
                .with_padding(padding)
                .with_dilation(dilation)
                .with_ceil_mode(ceil_mode)
        };
        let what = format!("{:?}", options());
        compare(&what, shape, case, |x| max_pool2d(x, options()), |x| module::max_pool2d(x, options()));
        let options = || {
            AvgPoolOptions::new(kernel)
                .with_stride(stride)
                .with_padding(padding)
                .with_count_include_pad(case.is_multiple_of(2))
                .with_ceil_mode(ceil_mode)
        };
        let what = format!("{:?}", options());
        compare(&what, shape, case, |x| avg_pool2d(x, options()), |x| module::avg_pool2d(x, options()));
        let output = [(); 2].map(|()| rng.random_range(1..9));
        let what = format!("to {output:?}");
        compare(
            &what,
            shape,
            case,
            |x| adaptive_avg_pool2d(x, output),
            |x| module::adaptive_avg_pool2d(x, output),
        );
    }
}

#[test]
fn pooling_over_one_axis_equals_burns() {
    let mut rng = rng(2);
    for case in 0..60usize {
        let kernel = rng.random_range(1..6);
        let stride = rng.random_range(1..4);
        let padding = rng.random_range(0..=kernel / 2);
        // More on the right than on the left now and then.
        let padding = (padding, if case.is_multiple_of(2) { padding } else { kernel / 2 });
        let shape = [rng.random_range(1..4), rng.random_range(1..4), rng.random_range(1..30).max(kernel)];
        let options = || MaxPoolOptions::new([kernel]).with_stride([stride]).with_padding_pairs([padding]);
        let what = format!("{:?}", options());
        compare(&what, shape, case, |x| max_pool1d(x, options()), |x| module::max_pool1d(x, options()));
        let options = || {
            AvgPoolOptions::new([kernel])
                .with_stride([stride])
                .with_padding_pairs([padding])
                .with_count_include_pad(case.is_multiple_of(3))
        };
        let what = format!("{:?}", options());
        compare(&what, shape, case, |x| avg_pool1d(x, options()), |x| module::avg_pool1d(x, options()));
        let output = rng.random_range(1..9);
        let what = format!("to {output}");
        compare(
            &what,
            shape,
            case,
            |x| adaptive_avg_pool1d(x, output),
            |x| module::adaptive_avg_pool1d(x, output),
        );
    }
}

#[test]
fn of_equal_maxima_the_first_has_the_gradient() {
    let device = Device::flex().autodiff();
    let x = Tensor::<4>::zeros([1, 1, 2, 2], &device).require_grad();
    let gradients = max_pool2d(x.clone(), MaxPoolOptions::new([2, 2])).sum().backward();
    let gradient = x.grad(&gradients).unwrap().into_data().try_to_vec::<f32>().unwrap();
    assert_eq!(gradient, [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn nan_passes_through() {
    let x = || Tensor::<3>::from_floats([[[1.0, f32::NAN, 3.0, 4.0]]], &Device::flex());
    for y in [
        max_pool1d(x(), MaxPoolOptions::new([2])),
        avg_pool1d(x(), AvgPoolOptions::new([2])),
        adaptive_avg_pool1d(x(), 2),
    ] {
        let y = y.into_data().try_to_vec::<f32>().unwrap();
        assert!(y[0].is_nan() && y[1] >= 3.5, "{y:?}");
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = Device::flex();
    let x = || Tensor::<4>::zeros([0, 3, 4, 4], &device);
    assert_eq!(max_pool2d(x(), MaxPoolOptions::new([2, 2])).dims(), [0, 3, 2, 2]);
    assert_eq!(avg_pool2d(x(), AvgPoolOptions::new([2, 2])).dims(), [0, 3, 2, 2]);
    assert_eq!(adaptive_avg_pool2d(x(), [1, 1]).dims(), [0, 3, 1, 1]);
}

#[test]
fn double_precision_takes_burns_path() {
    let x = Tensor::<3>::ones([1, 1, 4], (&Device::flex(), DType::F64));
    assert_eq!(max_pool1d(x.clone(), MaxPoolOptions::new([2])).dtype(), DType::F64);
    assert_eq!(avg_pool1d(x, AvgPoolOptions::new([2])).dtype(), DType::F64);
}

#[test]
#[should_panic(expected = "exceeds an axis of 2")]
fn a_window_longer_than_the_input_is_refused() {
    max_pool1d(Tensor::<3>::zeros([1, 1, 2], &Device::flex()), MaxPoolOptions::new([3]));
}
