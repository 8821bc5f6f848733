//! Convolutions equal Burn's, forward and backward, for shapes of every kind.

use burn::tensor::ops::{ConvOptions, ConvTransposeOptions};
use burn::tensor::{Device, Tensor, TensorData, module};
use kiln_ops::{conv_transpose1d, conv_transpose2d, conv_transpose3d, conv1d, conv2d, conv3d};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::support::{assert_close, assert_same, random, rng};

/// A random convolution over `N` axes.
#[derive(Debug, Clone)]
struct Case<const N: usize> {
    batch: usize,
    inputs: usize,
    outputs: usize,
    extents: [usize; N],
    kernel: [usize; N],
    options: ConvOptions<N>,
}

impl<const N: usize> Case<N> {
    fn draw(extent: usize, rng: &mut ChaCha8Rng) -> Self {
        let groups = [1, 1, 1, 2, 5][rng.random_range(0..5)];
        // One channel in a group, which has kernels of its own, now and then.
        let width = [1, 3, 20][rng.random_range(0..3)];
        let kernel = [(); N].map(|()| rng.random_range(1..5));
        let dilation = [(); N].map(|()| rng.random_range(1..3));
        let stride = [(); N].map(|()| rng.random_range(1..4));
        let padding = [(); N].map(|()| (rng.random_range(0..4), rng.random_range(0..4)));
        let extents = std::array::from_fn(|axis| {
            let reach: usize = dilation[axis] * (kernel[axis] - 1) + 1;
            let (before, after): (usize, usize) = padding[axis];
            let extent = rng.random_range(1..extent).max(reach.saturating_sub(before + after));
            // Burn's gradient of a grouped weight is wrong where the stride leaves inputs over.
            let over = if groups == 1 { 0 } else { (extent + before + after - reach) % stride[axis] };
            extent + (stride[axis] - over) % stride[axis]
        });
        Self {
            batch: rng.random_range(1..5),
            inputs: groups * rng.random_range(1..=width),
            outputs: groups * rng.random_range(1..=width),
            extents,
            kernel,
            options: ConvOptions::new_with_padding(stride, padding, dilation, groups),
        }
    }

    fn symmetric(mut self) -> Self {
        self.options.padding =
            self.options.padding.map(|(before, after)| (before.max(after), before.max(after)));
        self
    }

    fn input(&self) -> Vec<usize> {
        [&[self.batch, self.inputs][..], &self.extents].concat()
    }

    fn weight(&self) -> Vec<usize> {
        [&[self.outputs, self.inputs / self.options.groups][..], &self.kernel].concat()
    }

    /// As a transposed convolution from `outputs` to `inputs` channels, if its padding leaves something.
    fn transposed(&self, rng: &mut ChaCha8Rng) -> Option<ConvTransposeOptions<N>> {
        let ConvOptions { stride, padding, dilation, groups } = self.options.clone();
        let padding = padding.map(|(before, _)| before);
        let padding_out = std::array::from_fn(|axis| rng.random_range(0..stride[axis].max(dilation[axis])));
        let leaves = (0..N).all(|axis| {
            let reach =
                (self.extents[axis] - 1) * stride[axis] + dilation[axis] * (self.kernel[axis] - 1) + 1;
            reach + padding_out[axis] > 2 * padding[axis]
        });
        leaves.then(|| ConvTransposeOptions::new(stride, padding, padding_out, dilation, groups))
    }
}

/// Compares two convolutions of the same input, weight and bias; with a view that is not contiguous as
/// input now and then.
fn compare<const D: usize>(
    what: &str,
    [input, weight, bias]: [&[usize]; 3],
    case: usize,
    kernel: impl Fn(Tensor<D>, Tensor<D>, Option<Tensor<1>>) -> Tensor<D>,
    composed: impl Fn(Tensor<D>, Tensor<D>, Option<Tensor<1>>) -> Tensor<D>,
) {
    let shape = |extents: &[usize]| -> [usize; D] { extents.try_into().expect("as many extents as axes") };
    let run = |x: &[Tensor<1>], f: &dyn Fn(Tensor<D>, Tensor<D>, Option<Tensor<1>>) -> Tensor<D>| {
        let mut extents = shape(input);
        let x_in = match case % 3 {
            0 => {
                extents.swap(0, D - 1);
                x[0].clone().reshape(extents).swap_dims(0, D - 1)
            }
            _ => x[0].clone().reshape(extents),
        };
        let bias = case.is_multiple_of(2).then(|| x[2].clone());
        f(x_in, x[1].clone().reshape(shape(weight)), bias).reshape([-1])
    };
    let lengths = [input, weight, bias].map(|extents| extents.iter().product());
    assert_same(what, &lengths, 3e-5, |x| run(x, &kernel), |x| run(x, &composed));
}

macro_rules! random_cases {
    ($name:ident, $transposed_name:ident, $axes:literal, $extent:literal, $seed:literal,
     $conv:ident, $conv_transpose:ident, $symmetric:literal) => {
        #[test]
        fn $name() {
            let mut rng = rng($seed);
            for number in 0..60 {
                let case = Case::<$axes>::draw($extent, &mut rng);
                let case = if $symmetric { case.symmetric() } else { case };
                let options = || case.options.clone();
                compare(
                    &format!("{case:?}"),
                    [&case.input(), &case.weight(), &[case.outputs]],
                    number,
                    |x, w, b| $conv(x, w, b, options()),
                    |x, w, b| module::$conv(x, w, b, options()),
                );
            }
        }

        #[test]
        fn $transposed_name() {
            let mut rng = rng($seed + 1);
            for number in 0..60 {
                let case = Case::<$axes>::draw($extent, &mut rng);
                let Some(options) = case.transposed(&mut rng) else { continue };
                let mut input = case.input();
                input[1] = case.outputs;
                compare(
                    &format!("{case:?} {options:?}"),
                    [&input, &case.weight(), &[case.inputs]],
                    number,
                    |x, w, b| $conv_transpose(x, w, b, options.clone()),
                    |x, w, b| module::$conv_transpose(x, w, b, options.clone()),
                );
            }
        }
    };
}

random_cases!(conv1d_equals_burns, conv_transpose1d_equals_burns, 1, 70, 10, conv1d, conv_transpose1d, false);
random_cases!(conv2d_equals_burns, conv_transpose2d_equals_burns, 2, 14, 20, conv2d, conv_transpose2d, false);
random_cases!(conv3d_equals_burns, conv_transpose3d_equals_burns, 3, 7, 30, conv3d, conv_transpose3d, true);

#[test]
fn three_by_three_kernels_equal_burns_for_many_channels() {
    let mut rng = rng(40);
    for number in 0..12 {
        let [height, width] = [(); 2].map(|()| rng.random_range(3..23));
        let [inputs, outputs] = [(); 2].map(|()| rng.random_range(14..40));
        let [before, after] = [(); 2].map(|()| rng.random_range(0..3));
        let batch = rng.random_range(1..12);
        let options = || ConvOptions::new_with_padding([1, 1], [(before, after), (after, before)], [1, 1], 1);
        compare(
            &format!("[{batch}, {inputs}, {height}, {width}] to {outputs}, padded by {before} and {after}"),
            [&[batch, inputs, height, width], &[outputs, inputs, 3, 3], &[outputs]],
            number,
            |x, w, b| conv2d(x, w, b, options()),
            |x, w, b| module::conv2d(x, w, b, options()),
        );
    }
}

#[test]
fn a_causal_convolution_of_a_long_sequence_equals_burns() {
    for (number, (inputs, outputs, groups)) in [(20, 30, 1), (8, 8, 8), (6, 6, 2)].into_iter().enumerate() {
        let options = || ConvOptions::new_with_padding([1], [(8, 0)], [4], groups);
        compare(
            &format!("{inputs} to {outputs} in {groups}"),
            [&[2, inputs, 3001], &[outputs, inputs / groups, 3], &[outputs]],
            number,
            |x, w, b| conv1d(x, w, b, options()),
            |x, w, b| module::conv1d(x, w, b, options()),
        );
    }
}

#[test]
fn nothing_in_gives_nothing_out() {
    let device = Device::flex();
    let empty_batch = Tensor::<3>::zeros([0, 2, 9], &device);
    let y = conv1d(empty_batch, Tensor::ones([3, 2, 3], &device), None, ConvOptions::new([1], [0], [1], 1));
    assert_eq!(y.dims(), [0, 3, 7]);
    let options = ConvOptions::new([1, 1], [1, 1], [1, 1], 1);
    let y = conv2d(Tensor::zeros([2, 4, 5, 5], &device), Tensor::ones([0, 4, 3, 3], &device), None, options);
    assert_eq!(y.dims(), [2, 0, 5, 5]);
}

#[test]
fn without_input_channels_the_output_is_the_bias() {
    let device = Device::flex();
    let bias = Tensor::from_floats([1.0, 2.0], &device);
    let options = ConvOptions::new([1], [0], [1], 1);
    let y = conv1d(Tensor::zeros([1, 0, 4], &device), Tensor::ones([2, 0, 3], &device), Some(bias), options);
    assert_eq!(y.into_data().try_to_vec::<f32>().unwrap(), [1.0, 1.0, 2.0, 2.0]);
}

#[test]
fn nan_reaches_exactly_the_outputs_that_see_it() {
    let device = Device::flex();
    let options = ConvOptions::new_with_padding([1], [(2, 0)], [1], 1);
    let x = Tensor::<3>::from_floats([[[1.0, f32::NAN, 1.0, 1.0, 1.0]]], &device);
    let y = conv1d(x, Tensor::zeros([1, 1, 3], &device), None, options);
    let y = y.into_data().try_to_vec::<f32>().unwrap();
    assert_eq!(y.iter().map(|y| y.is_nan()).collect::<Vec<_>>(), [false, true, true, true, false]);
}

#[test]
fn double_precision_takes_burns_path() {
    let mut rng = rng(50);
    let [x, w] = [2 * 3 * 10, 4 * 3 * 3].map(|len| random(len, &mut rng).into_data().convert::<f64>());
    let device = Device::flex();
    let double = |data: TensorData, shape: [usize; 3]| {
        Tensor::<1>::from_data(data, (&device, burn::tensor::DType::F64)).reshape(shape)
    };
    let options = || ConvOptions::new([1], [1], [1], 1);
    let (x, w) = (double(x, [2, 3, 10]), double(w, [4, 3, 3]));
    let y = conv1d(x.clone(), w.clone(), None, options());
    assert_eq!(y.dtype(), burn::tensor::DType::F64);
    let single = |x: Tensor<3>| x.into_data().convert::<f32>().try_to_vec::<f32>().unwrap();
    assert_close("f64", &single(y), &single(module::conv1d(x, w, None, options())), 1e-6);
}

#[test]
#[should_panic(expected = "does not fit the input [1, 4, 9]")]
fn a_weight_for_other_channels_is_refused() {
    let device = Device::flex();
    let options = ConvOptions::new([1], [0], [1], 1);
    conv1d(Tensor::zeros([1, 4, 9], &device), Tensor::zeros([3, 5, 3], &device), None, options);
}

#[test]
#[should_panic(expected = "exceeds the padded input [1, 2, 2]")]
fn a_kernel_longer_than_the_input_is_refused() {
    let device = Device::flex();
    let options = ConvOptions::new([1], [0], [1], 1);
    conv1d(Tensor::zeros([1, 2, 2], &device), Tensor::zeros([3, 2, 3], &device), None, options);
}
