//! The layer that joins the front of one network to the rear of another.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor, TensorData};
use kiln_core::Result;
use kiln_data::Matrix;
use kiln_nn::{Linear, LinearConfig};
use kiln_ops::{Activation, linear};

use crate::anchor::{Extent, Feature};
use crate::least_squares::{LeastSquares, Solution};

/// `S(x) = x Wᵀ + b` for every token, or every place of a map.
#[derive(Module, Debug)]
pub struct StitchLayer {
    /// W and b.
    pub map: Linear,
    /// What training adds to W, where only that is trained.
    pub low_rank: Option<LowRank>,
}

/// A product of two thin matrices (Hu et al., "LoRA", arXiv 2106.09685).
#[derive(Module, Debug)]
pub struct LowRank {
    /// `[inputs, rank]`
    pub down: Param<Tensor<2>>,
    /// `[rank, outputs]`, zeros before training
    pub up: Param<Tensor<2>>,
}

impl StitchLayer {
    /// A layer with random weights. With a `rank`, W and b stay as they are and a product of that rank is trained.
    pub fn init(inputs: usize, outputs: usize, rank: Option<usize>, device: &Device) -> Self {
        let uniform = Initializer::KaimingUniform { gain: 1.0 / 3.0f64.sqrt(), fan_out_only: false };
        Self {
            map: LinearConfig::new(inputs, outputs).init(device),
            low_rank: rank.map(|rank| LowRank {
                down: uniform.init_with([inputs, rank], Some(inputs), Some(rank), device),
                up: Initializer::Zeros.init([rank, outputs], device),
            }),
        }
    }

    /// The layer that maps rows `x`, `[rows, inputs]`, as close as possible to rows `y`, `[rows, outputs]`: the
    /// least-squares solution, of minimum norm where there are several.
    ///
    /// # Errors
    /// When the rows differ in number or a number is not finite.
    pub fn fit(x: &Matrix, y: &Matrix, device: &Device) -> Result<Self> {
        let solution = LeastSquares::new(x)?.solve(y)?;
        Ok(Self::init(x.columns, y.columns, None, device).with_solution(&solution))
    }

    /// The layer with these weights.
    pub fn with_solution(mut self, solution: &Solution) -> Self {
        let device = self.map.weight.device();
        let narrow = |values: &[f64]| values.iter().map(|&value| value as f32).collect::<Vec<_>>();
        let (rows, columns) = (solution.weight.rows, solution.weight.columns);
        let weight = TensorData::new(narrow(&solution.weight.values), [rows, columns]);
        self.map.weight = self.map.weight.map(|_| Tensor::from_data(weight, &device));
        let bias = TensorData::new(narrow(&solution.bias), [columns]);
        self.map.bias = self.map.bias.map(|param| param.map(|_| Tensor::from_data(bias, &device)));
        self
    }

    /// Applies the layer to what a block gave, for a place that takes `extent`.
    pub fn forward(&self, x: Feature, extent: &Extent) -> Feature {
        let x = x.into_tokens();
        let bias = self.map.bias.as_ref().map(Param::val);
        let mapped = match &self.low_rank {
            None => linear(x, self.map.weight.val(), bias, Activation::Identity),
            Some(low_rank) => {
                let weight = self.map.weight.val().detach() + low_rank.product();
                linear(x, weight, bias.map(Tensor::detach), Activation::Identity)
            }
        };
        Feature::from_tokens(mapped, extent)
    }

    /// The same map as one matrix.
    pub fn merged(mut self) -> Self {
        if let Some(low_rank) = self.low_rank.take() {
            self.map.weight = self.map.weight.map(|weight| weight + low_rank.product());
        }
        self
    }
}

impl LowRank {
    fn product(&self) -> Tensor<2> {
        self.down.val().matmul(self.up.val())
    }
}
