//! A dense matrix of numbers in main memory.

/// Numbers in rows, `values[row * columns + column]`; NaN where a value is missing.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Matrix {
    /// Number of rows.
    pub rows: usize,
    /// Number of columns.
    pub columns: usize,
    /// The numbers, row by row.
    pub values: Vec<f64>,
}

impl Matrix {
    /// A matrix of these numbers.
    ///
    /// # Panics
    /// When they do not fill the rows.
    pub fn new(rows: usize, columns: usize, values: Vec<f64>) -> Self {
        assert_eq!(values.len(), rows * columns, "values must fill {rows} rows of {columns}");
        Self { rows, columns, values }
    }

    /// A matrix whose columns are given one by one.
    ///
    /// # Panics
    /// When they differ in length.
    pub fn from_columns(rows: usize, columns: &[Vec<f64>]) -> Self {
        assert!(columns.iter().all(|column| column.len() == rows), "every column must have {rows} values");
        let values = (0..rows).flat_map(|row| columns.iter().map(move |column| column[row])).collect();
        Self::new(rows, columns.len(), values)
    }

    /// One number.
    pub fn at(&self, row: usize, column: usize) -> f64 {
        self.values[row * self.columns + column]
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// One column.
    pub fn column(&self, column: usize) -> Vec<f64> {
        (0..self.rows).map(|row| self.at(row, column)).collect()
    }

    /// These rows, in this order.
    pub fn select_rows(&self, rows: &[usize]) -> Self {
        let values = rows.iter().flat_map(|&row| self.row(row).iter().copied()).collect();
        Self::new(rows.len(), self.columns, values)
    }

    /// These columns, in this order.
    pub fn select_columns(&self, columns: &[usize]) -> Self {
        let values =
            (0..self.rows).flat_map(|row| columns.iter().map(move |&column| self.at(row, column))).collect();
        Self::new(self.rows, columns.len(), values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_and_columns_are_chosen_in_the_order_given() {
        let matrix = Matrix::from_columns(3, &[vec![1.0, 2.0, 3.0], vec![4.0, 5.0, 6.0]]);
        assert_eq!(matrix.values, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
        assert_eq!(matrix.select_rows(&[2, 0]).values, [3.0, 6.0, 1.0, 4.0]);
        assert_eq!(matrix.select_columns(&[1]).values, matrix.column(1));
    }
}
