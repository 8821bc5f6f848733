//! Bilinear interpolation of planes, with pixels as areas (`align_corners = false` in PyTorch).

use burn::tensor::{Device, Tensor, TensorData};
use kiln_ops::matmul;

/// Rows of weights that make `output` values of `input` ones. With `antialias`, kernels widen when an axis shrinks, so that
/// every input counts.
///
/// Row-major, `[output, input]`.
pub fn weights(input: usize, output: usize, antialias: bool) -> Vec<f32> {
    let scale = input as f64 / output as f64;
    let reach = if antialias { scale.max(1.0) } else { 1.0 };
    let mut weights = vec![0.0; input * output];
    for (at, row) in weights.chunks_mut(input.max(1)).enumerate() {
        let centre = (at as f64 + 0.5) * scale - 0.5;
        // Beyond the edges the outermost pixels go on; a widened kernel is cut there instead.
        let centre = if antialias { centre } else { centre.clamp(0.0, input as f64 - 1.0) };
        let first = (centre - reach).ceil().max(0.0) as usize;
        let last = ((centre + reach).floor() as usize).min(input - 1);
        let triangle = |pixel: usize| (1.0 - (pixel as f64 - centre).abs() / reach).max(0.0);
        let sum: f64 = (first..=last).map(triangle).sum();
        for (pixel, weight) in row.iter_mut().enumerate().take(last + 1).skip(first) {
            *weight = (triangle(pixel) / sum) as f32;
        }
    }
    weights
}

fn matrix(input: usize, output: usize, device: &Device) -> Tensor<2> {
    Tensor::from_data(TensorData::new(weights(input, output, false), [output, input]), device)
}

/// Planes in another size; differentiable.
///
/// # Shapes
/// - x: `[batch, channels, height, width]`
/// - output: `[batch, channels, size[0], size[1]]`
pub fn resize(x: Tensor<4>, size: [usize; 2]) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    if [height, width] == size {
        return x;
    }
    let device = x.device();
    let rows = matrix(height, size[0], &device).unsqueeze::<3>();
    let columns = matrix(width, size[1], &device).transpose();
    // Columns first, as one product; then rows, plane by plane.
    let x = matmul(x.reshape([batch * channels * height, width]), columns);
    let x = matmul(rows, x.reshape([batch * channels, height, size[1]]));
    x.reshape([batch, channels, size[0], size[1]])
}

/// One plane in another size; a shrinking one is smoothed.
pub fn resize_plane(pixels: &[f32], from: [usize; 2], to: [usize; 2]) -> Vec<f32> {
    if from == to {
        return pixels.to_vec();
    }
    let [height, width] = from;
    let columns = weights(width, to[1], true);
    let mut narrow = vec![0.0f32; height * to[1]];
    for (x, y) in pixels.chunks(width).zip(narrow.chunks_mut(to[1])) {
        for (y, weights) in y.iter_mut().zip(columns.chunks(width)) {
            *y = weights.iter().zip(x).map(|(w, x)| w * x).sum();
        }
    }
    let rows = weights(height, to[0], true);
    let mut out = vec![0.0f32; to[0] * to[1]];
    for (y, weights) in out.chunks_mut(to[1]).zip(rows.chunks(height)) {
        for (&weight, x) in weights.iter().zip(narrow.chunks(to[1])).filter(|(weight, _)| **weight != 0.0) {
            y.iter_mut().zip(x).for_each(|(y, x)| *y += weight * x);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_those_of_pytorch() {
        // interpolate([0, 1], size 4, bilinear, align_corners = False)
        assert_eq!(weights(2, 4, false), [1.0, 0.0, 0.75, 0.25, 0.25, 0.75, 0.0, 1.0]);
        assert_eq!(weights(2, 1, true), [0.5, 0.5]);
        for (input, output) in [(7, 3), (3, 7), (1, 4), (5, 5), (100, 1)] {
            for antialias in [false, true] {
                for row in weights(input, output, antialias).chunks(input) {
                    assert!((row.iter().sum::<f32>() - 1.0).abs() < 1e-6);
                }
            }
        }
    }

    #[test]
    fn a_plane_and_a_tensor_grow_alike() {
        let device = Device::flex();
        let pixels: Vec<f32> = (0..12).map(|i| (i * i) as f32).collect();
        let x = Tensor::<4>::from_data(TensorData::new(pixels.clone(), [1, 1, 3, 4]), &device);
        let grown: Vec<f32> = resize(x, [7, 9]).into_data().iter().collect();
        let plane = resize_plane(&pixels, [3, 4], [7, 9]);
        assert!(grown.iter().zip(&plane).all(|(a, b)| (a - b).abs() < 1e-4), "{grown:?} {plane:?}");
    }
}
