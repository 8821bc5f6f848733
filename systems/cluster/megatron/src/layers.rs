//! Layers that the ranks of a tensor group compute together, each with its forward and its backward pass.
//!
//! With the conjugate operators f (forward nothing, backward all-reduce) and g (forward all-reduce, backward nothing), a
//! column-parallel layer ends its backward pass with f's all-reduce, and a row-parallel one its forward pass with g's
//! (Shoeybi et al., "Megatron-LM", arXiv 1909.08053, §3). Activations are `[tokens, width]`.

use burn::tensor::Tensor;
use kiln_cluster::Op;
use kiln_core::Result;
use kiln_ops::{Activation, layer_norm, linear, matmul};
use rayon::prelude::*;

use crate::parameters::Parameters;
use crate::ranks::Ranks;
use crate::real::{self, Real};
use crate::tape::{gradient, leaf, pull_back};

/// Added to the variance of layer norms.
const EPSILON: f64 = 1e-5;

/// Layer norm, the same on all ranks of the tensor group. Its input and upstream gradient are too, and so are its
/// gradients, without communication.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    weight: usize,
    bias: usize,
}

/// What a backward pass of a layer with one output needs: the leaves of its autodiff graph, and its end.
#[derive(Debug)]
pub struct NormSaved {
    x: Tensor<2>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    output: Tensor<2>,
}

impl Norm {
    /// The norm whose parameters are called `<name>.weight` and `<name>.bias`.
    pub fn new<T: Real>(name: &str, parameters: &Parameters<T>) -> Self {
        Self {
            weight: parameters.id(&format!("{name}.weight")),
            bias: parameters.id(&format!("{name}.bias")),
        }
    }

    /// # Shapes
    /// - x, output: `[tokens, width]`
    pub fn forward<T: Real>(&self, x: Tensor<2>, parameters: &Parameters<T>) -> (Tensor<2>, NormSaved) {
        let (x, weight, bias) =
            (leaf(x), leaf(parameters.vector(self.weight)), leaf(parameters.vector(self.bias)));
        let output = layer_norm(x.clone(), weight.clone(), Some(bias.clone()), EPSILON);
        (output.clone().inner(), NormSaved { x, weight, bias, output })
    }

    /// The gradient of the input, given that of the output.
    pub fn backward<T: Real>(
        &self,
        saved: NormSaved,
        upstream: Tensor<2>,
        parameters: &mut Parameters<T>,
    ) -> Tensor<2> {
        let mut gradients = pull_back(saved.output, upstream);
        parameters.add_gradient(self.weight, &gradient(&saved.weight, &mut gradients));
        parameters.add_gradient(self.bias, &gradient(&saved.bias, &mut gradients));
        gradient(&saved.x, &mut gradients)
    }
}

/// `f(X A + b)` with the columns of A, a share of the outputs, on each rank: X is whole on all of them, the output is
/// divided.
#[derive(Debug, Clone, Copy)]
pub struct ColumnParallelLinear {
    weight: usize,
    bias: usize,
    activation: Activation,
}

/// What the backward pass of a [`ColumnParallelLinear`] needs.
#[derive(Debug)]
pub struct ColumnSaved {
    x: Tensor<2>,
    weight: Tensor<2>,
    bias: Tensor<1>,
    output: Tensor<2>,
}

impl ColumnParallelLinear {
    /// The layer whose parameters are called `<name>.weight` and `<name>.bias`.
    pub fn new<T: Real>(name: &str, activation: Activation, parameters: &Parameters<T>) -> Self {
        let id = |part: &str| parameters.id(&format!("{name}.{part}"));
        Self { weight: id("weight"), bias: id("bias"), activation }
    }

    /// # Shapes
    /// - x: `[tokens, inputs]`
    /// - output: `[tokens, outputs / t]`
    pub fn forward<T: Real>(&self, x: Tensor<2>, parameters: &Parameters<T>) -> (Tensor<2>, ColumnSaved) {
        let (x, weight, bias) =
            (leaf(x), leaf(parameters.matrix(self.weight)), leaf(parameters.vector(self.bias)));
        let output = linear(x.clone(), weight.clone(), Some(bias.clone()), self.activation);
        (output.clone().inner(), ColumnSaved { x, weight, bias, output })
    }

    /// The whole output on every rank: an all-gather of what [`forward`](Self::forward) gives.
    ///
    /// # Shapes
    /// - part: `[tokens, outputs / t]`
    /// - output: `[tokens, outputs]`
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn gather_output<T: Real>(part: Tensor<2>, ranks: &Ranks) -> Result<Tensor<2>> {
        let ([tokens, width], device, t) = (part.dims(), part.device(), ranks.tensor.size());
        let part: Vec<T> = real::into_vec(part);
        let mut parts = vec![T::ZERO; part.len() * t];
        ranks.tensor.all_gather(&part, &mut parts)?;
        let row = |token: usize| {
            let parts = &parts;
            (0..t).flat_map(move |rank| {
                let at = (rank * tokens + token) * width;
                parts[at..at + width].iter().copied()
            })
        };
        Ok(real::tensor((0..tokens).flat_map(row).collect(), [tokens, t * width], &device))
    }

    /// The gradient of the input, given that of the divided output; ends with f's all-reduce.
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn backward<T: Real>(
        &self,
        saved: ColumnSaved,
        upstream: Tensor<2>,
        parameters: &mut Parameters<T>,
        ranks: &Ranks,
    ) -> Result<Tensor<2>> {
        let mut gradients = pull_back(saved.output, upstream);
        parameters.add_gradient(self.weight, &gradient(&saved.weight, &mut gradients));
        parameters.add_gradient(self.bias, &gradient(&saved.bias, &mut gradients));
        all_reduce::<T>(gradient(&saved.x, &mut gradients), ranks)
    }
}

/// `X A` with the rows of A, a share of the inputs, on each rank: X is divided, the output is whole on all of them. The
/// bias is added once, afterwards, together with the residual ([`add_residual`]).
#[derive(Debug, Clone, Copy)]
pub struct RowParallelLinear {
    weight: usize,
    /// The bias, which is whole on all ranks.
    pub bias: usize,
}

/// What the backward pass of a [`RowParallelLinear`] needs.
#[derive(Debug)]
pub struct RowSaved {
    x: Tensor<2>,
    weight: Tensor<2>,
}

impl RowParallelLinear {
    /// The layer whose parameters are called `<name>.weight` and `<name>.bias`.
    pub fn new<T: Real>(name: &str, parameters: &Parameters<T>) -> Self {
        Self {
            weight: parameters.id(&format!("{name}.weight")),
            bias: parameters.id(&format!("{name}.bias")),
        }
    }

    /// The product, without the bias; ends with g's all-reduce.
    ///
    /// # Shapes
    /// - x: `[tokens, inputs / t]`
    /// - output: `[tokens, outputs]`
    ///
    /// # Errors
    /// When a rank is lost.
    pub fn forward<T: Real>(
        &self,
        x: Tensor<2>,
        parameters: &Parameters<T>,
        ranks: &Ranks,
    ) -> Result<(Tensor<2>, RowSaved)> {
        let weight = parameters.matrix(self.weight);
        let partial = matmul(x.clone(), weight.clone());
        Ok((all_reduce::<T>(partial, ranks)?, RowSaved { x, weight }))
    }

    /// The gradient of the divided input, given that of the output.
    pub fn backward<T: Real>(
        &self,
        RowSaved { x, weight }: RowSaved,
        upstream: Tensor<2>,
        parameters: &mut Parameters<T>,
    ) -> Tensor<2> {
        parameters.add_gradient(self.weight, &matmul(x.transpose(), upstream.clone()));
        matmul(upstream, weight.transpose())
    }
}

/// Adds up a tensor over the tensor group.
fn all_reduce<T: Real>(x: Tensor<2>, ranks: &Ranks) -> Result<Tensor<2>> {
    if ranks.tensor.size() == 1 {
        return Ok(x);
    }
    let (dims, device) = (x.dims(), x.device());
    let mut values: Vec<T> = real::into_vec(x);
    ranks.tensor.all_reduce(&mut values, Op::Sum)?;
    Ok(real::tensor(values, dims, &device))
}

/// `x + (y + bias) factors`: bias, dropout and residual in one pass. No factors are ones.
///
/// # Shapes
/// - x, y, output: `[tokens, width]`
/// - bias: `[width]`
/// - factors: `[tokens, width]`
pub fn add_residual<T: Real>(x: &Tensor<2>, y: Tensor<2>, bias: &[T], factors: Option<&[T]>) -> Tensor<2> {
    let ([tokens, width], device) = (x.dims(), x.device());
    let mut y: Vec<T> = real::into_vec(y);
    real::read(x, |x: &[T]| {
        y.par_chunks_mut(width * ROWS).zip(x.par_chunks(width * ROWS)).enumerate().for_each(
            |(task, (y, x))| {
                for (row, (y, x)) in y.chunks_exact_mut(width).zip(x.chunks_exact(width)).enumerate() {
                    match factors {
                        None => {
                            for ((y, &x), &b) in y.iter_mut().zip(x).zip(bias) {
                                *y = x + (*y + b);
                            }
                        }
                        Some(factors) => {
                            let factors = &factors[(task * ROWS + row) * width..][..width];
                            for (((y, &x), &b), &f) in y.iter_mut().zip(x).zip(bias).zip(factors) {
                                *y = x + (*y + b) * f;
                            }
                        }
                    }
                }
            },
        );
    });
    real::tensor(y, [tokens, width], &device)
}

/// Rows that one task works on.
const ROWS: usize = 64;

/// The gradient of `y` in [`add_residual`], that of x being `upstream` itself; adds to that of the bias.
pub fn residual_gradient<T: Real>(
    upstream: &Tensor<2>,
    bias: usize,
    factors: Option<&[T]>,
    parameters: &mut Parameters<T>,
) -> Tensor<2> {
    let dims = upstream.dims();
    let y = match factors {
        None => upstream.clone(),
        Some(factors) => {
            let values = real::read(upstream, |upstream: &[T]| {
                upstream.iter().zip(factors).map(|(&u, &f)| u * f).collect::<Vec<T>>()
            });
            real::tensor(values, dims, &upstream.device())
        }
    };
    real::read(&y, |y: &[T]| {
        let sums = parameters.gradient_mut(bias);
        for row in y.chunks_exact(dims[1]) {
            for (sum, &x) in sums.iter_mut().zip(row) {
                *sum += x;
            }
        }
    });
    y
}

/// `x + y` in the memory of `y`.
pub(crate) fn add<T: Real>(x: &Tensor<2>, y: Tensor<2>) -> Tensor<2> {
    let (dims, device) = (y.dims(), y.device());
    let mut y: Vec<T> = real::into_vec(y);
    real::read(x, |x: &[T]| {
        for (y, &x) in y.iter_mut().zip(x) {
            *y += x;
        }
    });
    real::tensor(y, dims, &device)
}
