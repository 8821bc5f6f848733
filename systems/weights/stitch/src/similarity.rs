//! How alike two representations of the same images are.

use faer::Mat;
use kiln_data::Matrix;

/// Activations with the mean of every channel taken away.
#[derive(Debug)]
pub struct Centred {
    values: Mat<f64>,
    /// `‖XᵀX‖`
    norm: f64,
}

impl Centred {
    /// Centres `x`, `[rows, channels]`.
    pub fn new(x: &Matrix) -> Self {
        let count = x.rows.max(1) as f64;
        let means: Vec<f64> =
            (0..x.columns).map(|column| x.column(column).iter().sum::<f64>() / count).collect();
        let values = Mat::from_fn(x.rows, x.columns, |row, column| x.at(row, column) - means[column]);
        let norm = (values.transpose() * &values).norm_l2();
        Self { values, norm }
    }

    /// Linear centred kernel alignment (Kornblith et al., arXiv 1905.00414, Eq. 3 with linear kernels):
    /// `‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`, from 0 to 1, the same for rotated, scaled and shifted channels. What is constant is
    /// like nothing.
    ///
    /// # Panics
    /// When the rows differ in number.
    pub fn alignment(&self, other: &Self) -> f64 {
        let scale = self.norm * other.norm;
        match scale > 0.0 {
            true => (other.values.transpose() * &self.values).squared_norm_l2() / scale,
            false => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_core::random_stream;
    use rand::RngExt;

    fn random(rows: usize, columns: usize, stream: u64) -> Matrix {
        let mut rng = random_stream(1, "test", stream);
        Matrix::new(rows, columns, (0..rows * columns).map(|_| rng.random::<f64>() - 0.5).collect())
    }

    fn alignment(x: &Matrix, y: &Matrix) -> f64 {
        Centred::new(x).alignment(&Centred::new(y))
    }

    #[test]
    fn rotated_scaled_and_shifted_channels_are_the_same_channels() {
        let x = random(50, 2, 0);
        let (sin, cos) = 0.7f64.sin_cos();
        let turned = (0..50).flat_map(|row| {
            let (a, b) = (x.at(row, 0), x.at(row, 1));
            [3.0 * (cos * a - sin * b) + 5.0, 3.0 * (sin * a + cos * b) - 2.0]
        });
        assert!((alignment(&x, &Matrix::new(50, 2, turned.collect())) - 1.0).abs() < 1e-12);
        let other = alignment(&x, &random(50, 2, 1));
        assert!((0.0..0.5).contains(&other), "{other}");
    }

    /// X = (-1, 0, 1) and Y = (-1, 2, -1) (1, 0, -1) side by side: XᵀX = 2, YᵀX = (0, -2), YᵀY = diag(6, 2), so that
    /// the alignment is 4 / (2 √40).
    #[test]
    fn three_rows_by_hand() {
        let x = Matrix::new(3, 1, vec![-1.0, 0.0, 1.0]);
        let y = Matrix::from_columns(3, &[vec![-1.0, 2.0, -1.0], vec![1.0, 0.0, -1.0]]);
        assert!((alignment(&x, &y) - 4.0 / (2.0 * 40f64.sqrt())).abs() < 1e-12);
        assert_eq!(alignment(&x, &Matrix::new(3, 1, vec![1.0; 3])), 0.0, "a constant is like nothing");
    }
}
