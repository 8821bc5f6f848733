//! Least squares in double precision, with the solution of minimum norm where there are many.

use faer::linalg::solvers::Svd;
use faer::{Mat, MatRef};
use kiln_core::{Error, Result};
use kiln_data::Matrix;

/// Singular values below this share of the largest count as 0: activations are in single precision, whose rounding
/// must not pass for a direction that the data have.
const RANK_TOLERANCE: f64 = 1e-6;

/// The solution of `[X 1] [W b]ᵀ = Y`.
#[derive(Debug, Clone, PartialEq)]
pub struct Solution {
    /// `Wᵀ`, `[inputs, outputs]`
    pub weight: Matrix,
    /// `b`, `[outputs]`
    pub bias: Vec<f64>,
    /// `‖X Wᵀ + b - Y‖² / ‖Y - mean of Y‖²`: the share of the variance that no linear map explains.
    pub residual: f64,
}

/// `[X 1]` decomposed, for as many right-hand sides as one likes.
///
/// `[X 1] = Q R` and `R = U S Vᵀ`, so that `pinv([X 1]) Y = V S⁺ Uᵀ Qᵀ Y` costs little more than the QR
/// decomposition where there are many more rows than columns.
#[derive(Debug)]
pub struct LeastSquares {
    /// `[X 1]`, `[rows, inputs + 1]`
    design: Mat<f64>,
    /// `Q`
    basis: Mat<f64>,
    svd: Svd<f64>,
    /// Singular values that are not 0.
    rank: usize,
}

impl LeastSquares {
    /// Decomposes `[X 1]` with `x` as `[rows, inputs]`.
    ///
    /// # Errors
    /// When there are no rows or a number is not finite.
    pub fn new(x: &Matrix) -> Result<Self> {
        if x.rows == 0 || x.values.iter().any(|value| !value.is_finite()) {
            return Err(Error::work("least squares need finite numbers, at least one row of them"));
        }
        let inputs = x.columns;
        let design = Mat::from_fn(
            x.rows,
            inputs + 1,
            |row, column| {
                if column == inputs { 1.0 } else { x.at(row, column) }
            },
        );
        let qr = design.qr();
        let basis = qr.compute_thin_Q();
        let svd = qr
            .thin_R()
            .thin_svd()
            .map_err(|e| Error::work(format!("the singular values did not converge: {e:?}")))?;
        let values = svd.S().column_vector();
        let largest = values.iter().copied().fold(0.0, f64::max);
        let rank = values.iter().filter(|&&value| value > RANK_TOLERANCE * largest).count();
        Ok(Self { design, basis, svd, rank })
    }

    /// Directions in which the rows of `[X 1]` differ from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The solution for `y`, `[rows, outputs]`.
    ///
    /// # Errors
    /// When there are other rows or a number is not finite.
    pub fn solve(&self, y: &Matrix) -> Result<Solution> {
        if y.rows != self.design.nrows() || y.values.iter().any(|value| !value.is_finite()) {
            return Err(Error::work(format!(
                "the right-hand side of least squares must be {} rows of finite numbers",
                self.design.nrows()
            )));
        }
        let target = MatRef::from_row_major_slice(&y.values, y.rows, y.columns);
        let mut coordinates = self.svd.U().transpose() * (self.basis.transpose() * target);
        let values = self.svd.S().column_vector();
        for row in 0..coordinates.nrows() {
            let scale = if row < self.rank { 1.0 / values[row] } else { 0.0 };
            coordinates.row_mut(row).iter_mut().for_each(|value| *value *= scale);
        }
        let found = self.svd.V() * &coordinates;
        let inputs = self.design.ncols() - 1;
        let weight = (0..inputs).flat_map(|row| found.row(row).iter().copied().collect::<Vec<_>>()).collect();
        Ok(Solution {
            residual: unexplained(&(&self.design * &found), target),
            bias: found.row(inputs).iter().copied().collect(),
            weight: Matrix::new(inputs, y.columns, weight),
        })
    }
}

/// `‖fitted - target‖² / ‖target - its mean‖²`; 0 for what is constant and hit.
fn unexplained(fitted: &Mat<f64>, target: MatRef<'_, f64>) -> f64 {
    let (mut error, mut variance) = (0.0, 0.0);
    for column in 0..target.ncols() {
        let values = target.col(column);
        let mean = values.iter().sum::<f64>() / target.nrows() as f64;
        for (value, fit) in values.iter().zip(fitted.col(column).iter()) {
            error += (fit - value).powi(2);
            variance += (value - mean).powi(2);
        }
    }
    if variance > 0.0 { error / variance } else { error }
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

    /// `X Wᵀ + b`
    fn apply(x: &Matrix, weight: &Matrix, bias: &[f64]) -> Matrix {
        let value = |row: usize, output: usize| {
            bias[output] + (0..x.columns).map(|i| x.at(row, i) * weight.at(i, output)).sum::<f64>()
        };
        let values = (0..x.rows).flat_map(|row| (0..bias.len()).map(move |output| (row, output)));
        Matrix::new(x.rows, bias.len(), values.map(|(row, output)| value(row, output)).collect())
    }

    fn distance(a: &[f64], b: &[f64]) -> f64 {
        a.iter().zip(b).fold(0.0, |largest, (a, b)| f64::max(largest, (a - b).abs()))
    }

    #[test]
    fn an_affine_map_is_found_again() {
        let (x, weight, bias) = (random(40, 6, 0), random(6, 3, 1), vec![1.0, -2.0, 0.5]);
        let found = LeastSquares::new(&x).unwrap().solve(&apply(&x, &weight, &bias)).unwrap();
        assert!(distance(&found.weight.values, &weight.values) < 1e-8);
        assert!(distance(&found.bias, &bias) < 1e-8);
        assert!(found.residual < 1e-20);
    }

    #[test]
    fn what_is_left_over_is_orthogonal_to_the_inputs_and_to_one() {
        let (x, y) = (random(30, 4, 0), random(30, 2, 1));
        let found = LeastSquares::new(&x).unwrap().solve(&y).unwrap();
        let fitted = apply(&x, &found.weight, &found.bias);
        for output in 0..2 {
            let rest: Vec<f64> = (0..30).map(|row| y.at(row, output) - fitted.at(row, output)).collect();
            assert!(rest.iter().sum::<f64>().abs() < 1e-12);
            for input in 0..4 {
                assert!((0..30).map(|row| rest[row] * x.at(row, input)).sum::<f64>().abs() < 1e-12);
            }
        }
        assert!(found.residual > 0.1 && found.residual < 1.0, "{}", found.residual);
    }

    /// With fewer rows than unknowns the smallest solution is `Aᵀ (A Aᵀ)⁻¹ y`: it lies in the span of the rows of A, so
    /// that adding any vector orthogonal to them makes it longer.
    #[test]
    fn few_rows_give_the_solution_of_minimum_norm() {
        let (x, y) = (random(3, 5, 0), random(3, 1, 1));
        let least = LeastSquares::new(&x).unwrap();
        assert_eq!(least.rank(), 3);
        let found = least.solve(&y).unwrap();
        assert!(distance(&apply(&x, &found.weight, &found.bias).values, &y.values) < 1e-12);
        let solution: Vec<f64> = found.weight.values.iter().chain(&found.bias).copied().collect();
        let rows: Vec<Vec<f64>> = (0..3).map(|row| [x.row(row), &[1.0]].concat()).collect();
        // A direction in the null space: a random vector less its part along each row, by Gram and Schmidt.
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut span: Vec<Vec<f64>> = Vec::new();
        let reduce = |vector: &[f64], span: &[Vec<f64>]| {
            span.iter().fold(vector.to_vec(), |v, s| {
                let share = dot(&v, s) / dot(s, s);
                v.iter().zip(s).map(|(v, s)| v - share * s).collect()
            })
        };
        for row in &rows {
            span.push(reduce(row, &span));
        }
        let null = reduce(&random(1, 6, 2).values, &span);
        assert!(dot(&null, &null) > 1e-3);
        assert!(dot(&solution, &null).abs() < 1e-12, "the solution has a part that does nothing");
    }

    #[test]
    fn dead_and_doubled_channels_give_finite_weights_that_share_the_work() {
        let good = random(20, 1, 0);
        let columns = [good.column(0), vec![0.0; 20], good.column(0)];
        let x = Matrix::from_columns(20, &columns);
        let y = Matrix::new(20, 1, good.column(0).iter().map(|v| 2.0 * v).collect());
        let least = LeastSquares::new(&x).unwrap();
        assert_eq!(least.rank(), 2);
        let found = least.solve(&y).unwrap();
        assert!(distance(&found.weight.values, &[1.0, 0.0, 1.0]) < 1e-10, "{:?}", found.weight.values);
        assert!(LeastSquares::new(&Matrix::new(1, 1, vec![f64::NAN])).is_err());
    }
}
