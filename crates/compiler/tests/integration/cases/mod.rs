//! Small functions with every operation in one of them.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use burn::backend::DispatchTensor;
use burn::backend::ops::{
    AttentionModuleOptions, AvgPoolOptions, ConvOptions, ConvTransposeOptions, InterpolateMode,
    InterpolateOptions, MaxPoolOptions, PadMode,
};
use burn::nn::LayerNormConfig;
use burn::tensor::activation::{
    gelu, hard_sigmoid, leaky_relu, log_sigmoid, log_softmax, prelu, relu, sigmoid, silu, softmax, softmin,
};
use burn::tensor::module::{
    adaptive_avg_pool2d, attention, avg_pool1d, avg_pool2d, batch_norm, conv_transpose1d, conv_transpose2d,
    conv1d, conv2d, embedding, interpolate, linear, max_pool1d, max_pool2d,
};
use burn::tensor::{Bool, Device, IndexingUpdateOp, Int, Tensor, TensorData};
use kiln_core::{Network, Port, PortKind};

/// A function of two matrices `[4, 6]` and `[6, 4]`, whose elements lie between 0.2 and 0.9.
pub type Function = fn(Tensor<2>, Tensor<2>) -> Tensor<1>;

pub struct Case(pub Function);

impl Network for Case {
    fn kind(&self) -> &str {
        "case"
    }

    fn inputs(&self) -> Vec<Port> {
        let port = |name: &str, shape: [usize; 2]| Port {
            name: name.into(),
            kind: PortKind::Float,
            shape: shape.to_vec(),
        };
        vec![port("x", [4, 6]), port("y", [6, 4])]
    }

    fn outputs(&self) -> Vec<Port> {
        vec![Port { name: "loss".into(), kind: PortKind::Float, shape: vec![1] }]
    }

    fn move_to(&mut self, _: &Device) {}

    fn forward(&self, inputs: Vec<DispatchTensor>) -> Vec<DispatchTensor> {
        let mut inputs = inputs.into_iter().map(Tensor::from_dispatch);
        vec![self.0(inputs.next().unwrap(), inputs.next().unwrap()).into_dispatch()]
    }
}

/// Weighs all elements differently, so that no error cancels out.
pub fn weighed<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let count = x.shape().num_elements();
    let weights: Vec<f32> = (0..count).map(|at| ((at * 7 % 11) as f32 - 4.0) / 5.0).collect();
    let weights = Tensor::<1>::from_data(TensorData::new(weights, [count]), &x.device());
    (x.reshape([count]) * weights).sum()
}

/// A mask that holds here and there.
fn some(x: &Tensor<2>) -> Tensor<2, Bool> {
    x.clone().greater_elem(0.55)
}

fn ids<const D: usize>(values: [i64; 4], shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

/// `[4, 6]` as two images of three channels.
fn image(x: Tensor<2>) -> Tensor<4> {
    let more = Tensor::cat(vec![x.clone(), x.clone().powi_scalar(2), x.clone().sin(), x.neg()], 1);
    more.reshape([2, 3, 4, 4])
}

/// Weights of three channels, from `[6, 4]`.
fn kernels(y: Tensor<2>) -> Tensor<4> {
    let more = Tensor::cat(vec![y.clone(), y.clone().cos(), y.neg()], 0);
    more.reshape([2, 3, 3, 4])
}

/// Every operation that has a derivative, under names.
pub const FUNCTIONS: &[(&str, Function)] = &[
    ("add", |x, y| weighed(x + y.transpose())),
    ("subtract by a row", |x, y| weighed(x - y.transpose().narrow(0, 1, 1))),
    ("multiply by a column", |x, y| weighed(x * y.transpose().narrow(1, 2, 1))),
    ("divide", |x, y| weighed(x / y.transpose())),
    ("numbers", |x, _| weighed(((x + 1.0) * 3.0 - 0.5) / 7.0)),
    ("remainder of numbers", |x, _| weighed(x.remainder_scalar(0.3))),
    ("powers", |x, y| weighed(x.powf(y.transpose()))),
    ("powers of numbers", |x, y| weighed(x.powf_scalar(2.5)) + weighed(y.powi_scalar(3))),
    ("exp log", |x, y| weighed(x.exp()) + weighed(y.log())),
    ("log1p erf", |x, y| weighed(x.log1p()) + weighed(y.erf())),
    ("sqrt recip", |x, y| weighed(x.sqrt()) + weighed(y.recip())),
    ("sin cos", |x, y| weighed(x.sin()) + weighed(y.cos())),
    ("tan tanh", |x, y| weighed(x.tan()) + weighed(y.tanh())),
    ("sinh cosh", |x, y| weighed(x.sinh()) + weighed(y.cosh())),
    ("asin acos", |x, y| weighed(x.asin()) + weighed(y.acos())),
    ("asinh acosh", |x, y| weighed(x.asinh()) + weighed((y + 1.0).acosh())),
    ("atan atanh", |x, y| weighed(x.atan()) + weighed(y.atanh())),
    ("atan2", |x, y| weighed(x.atan2(y.transpose()))),
    ("abs neg sign", |x, y| weighed((x - 0.5).abs()) + weighed(-y.clone() * y.sign())),
    ("round floor ceil", |x, y| {
        weighed(x.clone().round() * x) + weighed(y.clone().floor() + y.clone().ceil() * y)
    }),
    ("clamps", |x, y| {
        weighed(x.clone().clamp(0.4, 0.6)) + weighed(x.clamp_min(0.5)) + weighed(y.clamp_max(0.5))
    }),
    ("matmul", |x, y| weighed(x.matmul(y))),
    ("matmul broadcast", |x, y| {
        weighed(x.reshape([2, 1, 2, 6]).matmul(y.reshape([1, 1, 6, 4]).expand([1, 3, 6, 4])))
    }),
    ("sums and means", |x, y| {
        let (sum, mean) = (x.clone().sum() * 2.0, x.clone().mean());
        sum + mean
            + weighed(x.clone().sum_dim(0))
            + weighed(x.mean_dim(1))
            + weighed(y.clone().sum_dim(1) * y)
    }),
    ("extremes", |x, y| {
        x.clone().max()
            + y.clone().min() * 2.0
            + weighed(x.clone().max_dim(1))
            + weighed(y.min_dim(0))
            + weighed(x.max_dim_with_indices(0).0)
    }),
    ("variance", |x, _| weighed(x.var(1))),
    ("cumulative sums", |x, y| weighed(x.cumsum(1)) + weighed(y.cumsum(0))),
    ("reshape swap permute flip", |x, y| {
        weighed(x.reshape([2, 2, 6]).permute([2, 0, 1])) + weighed(y.swap_dims(0, 1).flip([0, 1]))
    }),
    ("slices", |x, y| {
        weighed(x.clone().slice([1..3, 2..6])) + weighed(x.slice_assign([0..2, 1..3], y.slice([2..4, 0..2])))
    }),
    ("select", |x, y| {
        let rows = ids([3, 0, 3, 1], [4], &x.device());
        weighed(x.select(0, rows.clone())) + weighed(y.select(1, rows))
    }),
    ("select assign", |x, y| {
        let rows = ids([3, 0, 3, 1], [4], &x.device());
        weighed(x.select_assign(0, rows, y.transpose(), IndexingUpdateOp::Add))
    }),
    ("gather scatter", |x, y| {
        let places = ids([3, 0, 3, 1], [2, 2], &x.device());
        weighed(x.clone().narrow(0, 1, 2).gather(1, places.clone()))
            + weighed(x.narrow(0, 1, 2).scatter(1, places, y.slice([0..2, 0..2]), IndexingUpdateOp::Add))
    }),
    ("masks", |x, y| {
        let mask = some(&x);
        weighed(x.clone().mask_where(mask.clone(), y.transpose())) + weighed(x.mask_fill(mask, 3.0))
    }),
    ("repeat cat", |x, y| {
        weighed(x.clone().repeat_dim(1, 3)) + weighed(Tensor::cat(vec![x, y.transpose()], 0))
    }),
    ("pad", |x, _| weighed(x.pad([(1, 2), (0, 1)], PadMode::Constant(0.5)))),
    ("relu family", |x, y| {
        weighed(relu(x.clone() - 0.5))
            + weighed(leaky_relu(y - 0.5, 0.1))
            + weighed(hard_sigmoid(x * 4.0 - 2.0, 0.3, 0.4))
    }),
    ("prelu", |x, y| weighed(prelu(x.reshape([2, 3, 4]) - 0.5, y.slice([0..3, 0..1]).reshape([3])))),
    ("sigmoid family", |x, y| weighed(sigmoid(x.clone())) + weighed(log_sigmoid(y)) + weighed(silu(x))),
    ("gelu", |x, y| weighed(gelu(x - 0.5)) + weighed(gelu(y))),
    ("softmax family", |x, y| {
        weighed(softmax(x.clone(), 1))
            + weighed(log_softmax(y.clone(), 0))
            + weighed(softmin(x, 0))
            + weighed(softmax(y, 1))
    }),
    ("linear", |x, y| {
        let bias = x.clone().slice([0..1, 0..4]).reshape([4]);
        weighed(linear(x.clone().reshape([2, 2, 6]), y, Some(bias)))
    }),
    ("embedding", |x, _| weighed(embedding(x.clone(), ids([3, 0, 3, 1], [2, 2], &x.device())))),
    // Its scale is a parameter, which is no function of `y`; a test in double precision has its gradient.
    ("layer norm", |x, _| weighed(LayerNormConfig::new(6).init(&x.device()).forward(x))),
    ("batch norm", |x, y| {
        let channel = |at: usize| y.clone().slice([0..3, at..at + 1]).reshape([3]);
        weighed(batch_norm(image(x), channel(0), channel(1), channel(2), channel(3), 1e-5))
    }),
    ("conv1d", |x, y| {
        let bias = y.clone().slice([0..2, 0..1]).reshape([2]);
        let weight = y.reshape([2, 3, 4]);
        weighed(conv1d(x.reshape([2, 3, 4]), weight, Some(bias), ConvOptions::new([1], [2], [1], 1)))
    }),
    ("conv2d", |x, y| {
        let bias = x.clone().slice([0..2, 0..1]).reshape([2]);
        weighed(conv2d(image(x), kernels(y), Some(bias), ConvOptions::new([2, 1], [1, 2], [1, 1], 1)))
    }),
    ("transposed convolutions", |x, y| {
        let wide = ConvTransposeOptions::new([2, 2], [1, 1], [1, 0], [1, 1], 1);
        let flat = ConvTransposeOptions::new([2], [1], [0], [1], 1);
        let bias = y.clone().slice([0..2, 0..1]).reshape([2]);
        let thin =
            conv_transpose1d(x.clone().reshape([2, 3, 4]), y.clone().reshape([3, 2, 4]), Some(bias), flat);
        let kernels = kernels(y).reshape([3, 2, 3, 4]);
        weighed(thin) + weighed(conv_transpose2d(image(x), kernels, None, wide))
    }),
    ("average pools", |x, y| {
        let padded = AvgPoolOptions { padding: [(1, 1)], ..AvgPoolOptions::new([2]) };
        let flat = avg_pool1d(y.reshape([2, 3, 4]), padded);
        let uncounted =
            AvgPoolOptions { padding: [(1, 1); 2], count_include_pad: false, ..AvgPoolOptions::new([2, 3]) };
        let wide = avg_pool2d(image(x.clone()), uncounted);
        weighed(flat) + weighed(wide) + weighed(adaptive_avg_pool2d(image(x), [1, 2]))
    }),
    ("max pools", |x, y| {
        let flat = max_pool1d(
            y.reshape([2, 3, 4]),
            MaxPoolOptions { padding: [(1, 1)], ..MaxPoolOptions::new([2]) },
        );
        let padded = MaxPoolOptions { padding: [(1, 1); 2], ..MaxPoolOptions::new([2, 3]) };
        weighed(flat) + weighed(max_pool2d(image(x), padded))
    }),
    ("attention", |x, y| {
        let keys = y.clone().reshape([2, 1, 4, 3]);
        let values = y.sin().reshape([2, 1, 4, 3]);
        let options = AttentionModuleOptions { is_causal: true, ..AttentionModuleOptions::default() };
        weighed(attention(x.reshape([2, 1, 4, 3]) * 3.0, keys, values, None, None, options))
    }),
    ("bilinear interpolation", |x, _| {
        weighed(interpolate(
            image(x),
            InterpolateOptions::new(InterpolateMode::Bilinear).with_output_size([6, 7]),
        ))
    }),
    ("something constant", |x, y| weighed(x.clone().greater_elem(0.5).float() + x) + y.sum() * 0.0),
];

pub fn input(shape: [usize; 2]) -> Tensor<2> {
    // Distinct and far enough from one another that no maximum is doubtful.
    let count = shape[0] * shape[1];
    let values: Vec<f32> =
        (0..count).map(|at| 0.2 + 0.7 * ((at * 13 + 5 * shape[0]) % 29) as f32 / 29.0).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex())
}
