//! The logarithms of which description lengths are made.

use libm::lgamma;

/// Logarithms of factorials, looked up where they are small.
#[derive(Debug, Clone)]
pub struct Terms {
    ln_factorials: Vec<f64>,
    ln_beta: f64,
    beta: f64,
}

impl Terms {
    /// For numbers up to `most`, and weights with mean `beta`.
    pub fn new(most: usize, beta: f64) -> Self {
        let ln_factorials = (0..=most).map(|n| lgamma(n as f64 + 1.0)).collect();
        Self { ln_factorials, beta, ln_beta: beta.ln() }
    }

    /// ln n!
    #[inline]
    pub fn ln_factorial(&self, n: usize) -> f64 {
        self.ln_factorials.get(n).copied().unwrap_or_else(|| lgamma(n as f64 + 1.0))
    }

    /// `ln ((n m)) = ln C(n + m − 1, m)`: in how many ways m things go into n boxes.
    #[inline]
    pub fn ln_multiset(&self, n: usize, m: usize) -> f64 {
        match (n, m) {
            (_, 0) => 0.0,
            (0, _) => f64::INFINITY,
            _ => self.ln_factorial(n + m - 1) - self.ln_factorial(m) - self.ln_factorial(n - 1),
        }
    }

    /// ln C(n, k)
    pub fn ln_binomial(&self, n: usize, k: usize) -> f64 {
        self.ln_factorial(n) - self.ln_factorial(k) - self.ln_factorial(n - k)
    }

    /// A pair of groups with m edges of total weight x: which edges there are, and how heavy.
    #[inline]
    pub fn pair(&self, inner: bool, m: u32, x: f64) -> f64 {
        if m == 0 {
            return 0.0;
        }
        let twos = if inner { f64::from(m) * std::f64::consts::LN_2 } else { 0.0 };
        let ln_factorial = self.ln_factorial(m as usize);
        -twos - 2.0 * ln_factorial - self.ln_beta + f64::from(m + 1) * (self.beta + x).ln()
    }

    /// A group of n nodes with e half-edges.
    #[inline]
    pub fn group(&self, degree_corrected: bool, n: usize, e: usize) -> f64 {
        match (n, degree_corrected) {
            (0, _) => 0.0,
            (_, true) => self.ln_factorial(e) + self.ln_multiset(n, e),
            (_, false) => e as f64 * (n as f64).ln(),
        }
    }

    /// How `count` groups are chosen among `nodes` nodes, but for the sizes.
    pub fn partition(&self, nodes: usize, count: usize) -> f64 {
        (nodes as f64).ln() + self.ln_binomial(nodes - 1, count - 1) + self.ln_factorial(nodes)
    }

    /// How `edges` edges are spread over the pairs of `count` groups.
    pub fn edge_counts(&self, count: usize, edges: usize) -> f64 {
        self.ln_multiset(count * (count + 1) / 2, edges)
    }
}
