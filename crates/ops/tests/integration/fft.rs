//! Transforms equal their definition, invert each other, and their gradients are their adjoints.

use std::f64::consts::TAU;

use burn::tensor::{DType, Device, Tensor};
use kiln_ops::{fft, ifft, irfft, irfft2, rfft, rfft2};

use crate::support::{assert_close, assert_same, evaluate, random, rng};

fn floats<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.cast(DType::F32).into_data().try_to_vec().expect("the values are f32")
}

/// The definition: `Σ_t z_t e^(sign 2πi kt/n)` for `k` from 0 to `n`.
fn dft(re: &[f32], im: &[f32], sign: f64) -> [Vec<f64>; 2] {
    let n = re.len();
    let sums = (0..n).map(|k| {
        let mut sum = [0.0, 0.0];
        for t in 0..n {
            let (sin, cos) = (sign * TAU * (k * t % n) as f64 / n as f64).sin_cos();
            let (re, im) = (f64::from(re[t]), f64::from(im[t]));
            sum[0] += re * cos - im * sin;
            sum[1] += re * sin + im * cos;
        }
        sum
    });
    let sums: Vec<[f64; 2]> = sums.collect();
    [0, 1].map(|part| sums.iter().map(|sum| sum[part]).collect())
}

/// All small lengths, and larger ones: prime, odd, a power of two.
fn lengths() -> impl Iterator<Item = usize> {
    (1..=33).chain([97, 100, 105, 128, 243, 509, 1024])
}

fn rounded(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&x| x as f32).collect()
}

#[test]
fn spectra_follow_the_definition_for_every_length_and_precision() {
    for n in lengths() {
        let mut rng = rng(n as u64);
        let (x, y) = (random(n, &mut rng), random(n, &mut rng));
        let (x_values, y_values) = (floats(x.clone()), floats(y.clone()));
        for dtype in [DType::F32, DType::F64] {
            let (x, y) = (x.clone().cast(dtype), y.clone().cast(dtype));
            let tolerance = if dtype == DType::F32 { 2e-6 } else { 1e-7 };
            let check =
                |what: &str, (re, im): (Tensor<1>, Tensor<1>), expected: [Vec<f64>; 2], factor: f64| {
                    assert_eq!(re.dtype(), dtype);
                    let bins = re.dims()[0];
                    for (part, expected) in [re, im].into_iter().zip(expected) {
                        let expected: Vec<f64> = expected[..bins].iter().map(|x| x * factor).collect();
                        let what = format!("{what} of {n} in {dtype:?}");
                        assert_close(&what, &floats(part), &rounded(&expected), tolerance);
                    }
                };
            check("rfft", rfft(x.clone(), 0), dft(&x_values, &vec![0.0; n], -1.0), 1.0);
            check("fft", fft(x.clone(), y.clone(), 0), dft(&x_values, &y_values, -1.0), 1.0);
            check("ifft", ifft(x.clone(), y, 0), dft(&x_values, &y_values, 1.0), 1.0 / n as f64);
            let (re, im) = rfft(x, 0);
            assert_eq!(re.dims()[0], n / 2 + 1);
            assert_close(&format!("irfft of {n}"), &floats(irfft(re, im, n, 0)), &x_values, tolerance);
        }
    }
}

/// In single precision the kernels and their gradients, in double the products with matrices and theirs.
fn equals_the_matrix_form<const D: usize>(
    what: &str,
    shapes: &[[usize; D]],
    transform: impl Fn(Vec<Tensor<D>>) -> Vec<Tensor<D>>,
) {
    let lengths: Vec<usize> = shapes.iter().map(|shape| shape.iter().product()).collect();
    let run = |x: &[Tensor<1>], dtype| {
        let inputs = x.iter().zip(shapes).map(|(x, shape)| x.clone().cast(dtype).reshape(*shape));
        let outputs = transform(inputs.collect()).into_iter();
        Tensor::cat(outputs.map(|y| y.cast(DType::F32).reshape([-1])).collect(), 0)
    };
    assert_same(what, &lengths, 1e-5, |x| run(x, DType::F32), |x| run(x, DType::F64));
}

#[test]
fn gradients_are_those_of_the_matrix_form_along_every_axis() {
    for n in [1, 2, 3, 7, 12, 29, 64] {
        for (dim, shape) in [[n, 2, 3], [3, n, 2], [2, 3, n]].into_iter().enumerate() {
            let mut half = shape;
            half[dim] = n / 2 + 1;
            let what = |name: &str| format!("{name} of {n} along axis {dim}");
            equals_the_matrix_form(&what("rfft"), &[shape], |x| {
                <[_; 2]>::from(rfft(x[0].clone(), dim)).into()
            });
            equals_the_matrix_form(&what("fft"), &[shape, shape], |x| {
                <[_; 2]>::from(fft(x[0].clone(), x[1].clone(), dim)).into()
            });
            equals_the_matrix_form(&what("ifft"), &[shape, shape], |x| {
                <[_; 2]>::from(ifft(x[0].clone(), x[1].clone(), dim)).into()
            });
            equals_the_matrix_form(&what("irfft"), &[half, half], |x| {
                vec![irfft(x[0].clone(), x[1].clone(), n, dim)]
            });
        }
    }
}

#[test]
fn two_dimensional_transforms_and_their_gradients_are_those_of_the_matrix_form() {
    for [rows, columns] in [[1, 1], [4, 6], [5, 3], [16, 9]] {
        let (shape, half) = ([2, rows, columns], [2, rows, columns / 2 + 1]);
        let what = format!("{rows} by {columns}");
        equals_the_matrix_form(&what, &[shape], |x| <[_; 2]>::from(rfft2(x[0].clone())).into());
        equals_the_matrix_form(&what, &[half, half], |x| vec![irfft2(x[0].clone(), x[1].clone(), columns)]);
        let x = random(2 * rows * columns, &mut rng(1)).reshape(shape);
        let (re, im) = rfft2(x.clone());
        assert_close(&what, &floats(irfft2(re, im, columns)), &floats(x), 1e-6);
    }
}

#[test]
fn a_part_that_the_loss_does_not_depend_on_has_no_gradient_to_give() {
    let x = [random(30, &mut rng(2))];
    for part in [0, 1] {
        let pick = |x: &Tensor<1>| <[_; 2]>::from(rfft(x.clone(), 0))[part].clone();
        let (_, found) = evaluate(&x, 4, |x| pick(&x[0]));
        let (_, exact) = evaluate(&x, 4, |x| pick(&x[0].clone().cast(DType::F64)).cast(DType::F32));
        assert_close("gradient", &found[0], &exact[0], 1e-5);
    }
}

#[test]
fn large_batches_are_those_of_their_rows() {
    let x = random(40 * 1000, &mut rng(6)).reshape([40, 1000]);
    let (re, im) = rfft(x.clone(), 1);
    for row in [0, 17, 39] {
        let (row_re, row_im) = rfft(x.clone().narrow(0, row, 1), 1);
        assert_eq!(floats(re.clone().narrow(0, row, 1)), floats(row_re));
        assert_eq!(floats(im.clone().narrow(0, row, 1)), floats(row_im));
    }
    assert_close("round trip", &floats(irfft(re, im, 1000, 1)), &floats(x), 1e-6);
}

#[test]
fn no_rows_give_no_rows_and_nan_stays() {
    let device = Device::flex();
    let (re, im) = rfft(Tensor::<2>::zeros([0, 6], &device), 1);
    assert_eq!((re.dims(), im.dims()), ([0, 4], [0, 4]));
    assert_eq!(irfft(re, im, 6, 1).dims(), [0, 6]);
    let (re, _) = rfft(Tensor::<1>::from_floats([f32::NAN, 1.0, 2.0], &device), 0);
    assert!(floats(re).iter().all(|x| x.is_nan()));
}

#[test]
#[should_panic(expected = "nothing to transform along axis 1 of [2, 0]")]
fn empty_axes_are_refused() {
    rfft(Tensor::<2>::zeros([2, 0], &Device::flex()), 1);
}

#[test]
#[should_panic(expected = "a spectrum of 7 real numbers has 4 bins, not 5 as in [5]")]
fn spectra_of_another_length_are_refused() {
    let part = Tensor::<1>::zeros([5], &Device::flex());
    irfft(part.clone(), part, 7, 0);
}
