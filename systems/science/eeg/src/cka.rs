//! How alike two representations are: linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414).

use burn::tensor::Tensor;
use kiln_core::{Context, Result};

use crate::model::Model;
use crate::windows::WindowSet;

/// Parts of a window over which a block's output is averaged before it is compared.
const PARTS: usize = 8;
/// Windows that pass through a network at once.
const AT_ONCE: usize = 64;

/// `‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F)` of representations with centred columns, one row a sample: 1 where one is an orthogonal
/// map and a multiple of the other. 0 where a representation is constant.
///
/// # Shapes
/// - x: `rows` rows of any length; y: as many rows of any length
///
/// # Panics
/// When values do not fill rows.
pub fn linear_cka(x: &[f32], y: &[f32], rows: usize) -> f64 {
    // ‖YᵀX‖²_F = Σ_ij (XXᵀ)_ij (YYᵀ)_ij, which is smaller where there are more columns than rows.
    let (x, y) = (centred_gram(x, rows), centred_gram(y, rows));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms = (dot(&x, &x) * dot(&y, &y)).sqrt();
    if norms > 0.0 { dot(&x, &y) / norms } else { 0.0 }
}

/// The products of all pairs of rows after every column's mean is subtracted, `[rows, rows]`.
fn centred_gram(values: &[f32], rows: usize) -> Vec<f64> {
    assert!(rows > 0 && values.len().is_multiple_of(rows), "the values must fill {rows} rows");
    let columns = values.len() / rows;
    let mut centred: Vec<f64> = values.iter().map(|&x| f64::from(x)).collect();
    for column in 0..columns {
        let mean = (0..rows).map(|row| centred[row * columns + column]).sum::<f64>() / rows as f64;
        (0..rows).for_each(|row| centred[row * columns + column] -= mean);
    }
    let row = |at: usize| &centred[at * columns..(at + 1) * columns];
    let mut gram = vec![0.0; rows * rows];
    for a in 0..rows {
        for b in 0..=a {
            let product = row(a).iter().zip(row(b)).map(|(x, y)| x * y).sum();
            gram[a * rows + b] = product;
            gram[b * rows + a] = product;
        }
    }
    gram
}

/// What every block of a network puts out for these windows, averaged over eighths of the window: a matrix with a row for
/// each window, for each block.
///
/// # Errors
/// When a recording cannot be read, or the user stopped.
pub fn representations(model: &Model, windows: &WindowSet, cx: &Context) -> Result<Vec<Vec<f32>>> {
    let mut blocks: Vec<Vec<f32>> = Vec::new();
    let all: Vec<usize> = (0..windows.len()).collect();
    for chunk in all.chunks(AT_ONCE) {
        let x = windows.tensor(chunk, &cx.device)?;
        let mut place = 0;
        model.trace(x, &mut |output| {
            let values = averaged(output);
            match blocks.get_mut(place) {
                Some(block) => block.extend(values),
                None => blocks.push(values),
            }
            place += 1;
        });
    }
    Ok(blocks)
}

/// The means over parts of the last axis, row by row.
fn averaged(output: &Tensor<3>) -> Vec<f32> {
    let [batch, filters, steps] = output.dims();
    let parts = steps.min(PARTS);
    let means = (0..parts).map(|part| {
        let (from, to) = (part * steps / parts, (part + 1) * steps / parts);
        output.clone().narrow(2, from, to - from).mean_dim(2)
    });
    let means = Tensor::cat(means.collect(), 2).reshape([batch, filters * parts]);
    means.into_data().iter::<f32>().collect()
}

/// The alignment of every block of one network with every block of another, `[blocks of a][blocks of b]`.
pub fn alignments(a: &[Vec<f32>], b: &[Vec<f32>], rows: usize) -> Vec<Vec<f64>> {
    a.iter().map(|x| b.iter().map(|y| linear_cka(x, y, rows)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;
    use rand::RngExt;

    fn random(count: usize, index: u64) -> Vec<f32> {
        let mut rng = random_stream(0, "cka", index);
        (0..count).map(|_| rng.random_range(-1.0..1.0)).collect()
    }

    #[test]
    fn a_representation_is_wholly_alike_itself_turned_scaled_and_moved() {
        let x = random(40 * 3, 0);
        assert!((linear_cka(&x, &x, 40) - 1.0).abs() < 1e-12);
        // A rotation in a plane, twice the size, elsewhere.
        let (sin, cos) = 0.7f32.sin_cos();
        let turned: Vec<f32> = x
            .chunks(3)
            .flat_map(|r| {
                [2.0 * (cos * r[0] - sin * r[1]) + 5.0, 2.0 * (sin * r[0] + cos * r[1]), 2.0 * r[2]]
            })
            .collect();
        assert!((linear_cka(&x, &turned, 40) - 1.0).abs() < 1e-5);
        let other = linear_cka(&x, &random(40 * 5, 1), 40);
        assert!((0.0..0.5).contains(&other), "{other}");
        assert_eq!(linear_cka(&x, &[3.0; 40], 40), 0.0);
    }

    #[test]
    fn it_is_the_ratio_of_norms_by_hand() {
        // X = (1, -1), Y = (1, 0; -1, 0): ‖YᵀX‖² = 4, ‖XᵀX‖ = 2, ‖YᵀY‖ = 2.
        assert!((linear_cka(&[1.0, -1.0], &[1.0, 0.0, -1.0, 0.0], 2) - 1.0).abs() < 1e-12);
        // Three rows: X = (1, 0, -1), Y = (1, -2, 1): orthogonal.
        assert!(linear_cka(&[1.0, 0.0, -1.0], &[1.0, -2.0, 1.0], 3).abs() < 1e-12);
    }
}
