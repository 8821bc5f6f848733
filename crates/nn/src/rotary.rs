//! Rotary position embedding (Su et al., "RoFormer", arXiv 2104.09864), in the half-split layout of
//! the published Llama checkpoints.

use burn::tensor::{Device, Tensor, TensorData};

/// Turns queries and keys by an angle that grows with their position.
///
/// Channel `i` of the first half and channel `i` of the second half form a plane that turns by
/// `position * base^(-2i/dim)` radians; so the product of a turned query and a turned key depends on the
/// distance between them alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rotary {
    /// Channels of a head; even.
    pub dim: usize,
    /// The slowest plane turns about once in `2 pi base` positions.
    pub base: f64,
}

/// Cosine and sine of the angles of some positions, `[1, 1, time, dim / 2]`.
#[derive(Debug, Clone)]
pub struct RotaryTable {
    cos: Tensor<4>,
    sin: Tensor<4>,
}

impl Rotary {
    /// The angles of positions `offset .. offset + time`.
    pub fn table(&self, offset: usize, time: usize, device: &Device) -> RotaryTable {
        let half = self.dim / 2;
        // In f64, because late positions have large angles.
        let angle = |position: usize, plane: usize| {
            position as f64 * self.base.powf(-2.0 * plane as f64 / self.dim as f64)
        };
        let fill = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (offset..offset + time)
                .flat_map(|position| (0..half).map(move |plane| f(angle(position, plane)) as f32))
                .collect();
            Tensor::from_data(TensorData::new(values, [1, 1, time, half]), device)
        };
        RotaryTable { cos: fill(f64::cos), sin: fill(f64::sin) }
    }
}

impl RotaryTable {
    /// Turns every position by its angle.
    ///
    /// # Shapes
    /// - x: `[batch, heads, time, dim]`
    /// - output: `[batch, heads, time, dim]`
    pub fn apply(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let first = x.clone().narrow(3, 0, half);
        let second = x.narrow(3, half, half);
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let turned_first = first.clone() * cos.clone() - second.clone() * sin.clone();
        let turned_second = second * cos + first * sin;
        Tensor::cat(vec![turned_first, turned_second], 3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROTARY: Rotary = Rotary { dim: 4, base: 10_000.0 };

    fn turned(values: [f32; 4], position: usize) -> Vec<f32> {
        let device = Device::flex();
        let x = Tensor::<4>::from_floats([[[values]]], &device);
        ROTARY.table(position, 1, &device).apply(x).into_data().try_to_vec().unwrap()
    }

    #[test]
    fn a_turn_by_hand() {
        // Planes (0, 2) and (1, 3) turn by 3 and 3/100 radians.
        let y = turned([1.0, 1.0, 0.0, 0.0], 3);
        let expected = [3f32.cos(), 0.03f32.cos(), 3f32.sin(), 0.03f32.sin()];
        assert!(y.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{y:?}");
    }

    #[test]
    fn products_depend_on_the_distance_alone() {
        let product = |at_q, at_k| -> f32 {
            let (q, k) = (turned([0.3, -1.2, 0.7, 2.0], at_q), turned([1.1, 0.4, -0.6, 0.9], at_k));
            q.iter().zip(&k).map(|(a, b)| a * b).sum()
        };
        assert!((product(7, 2) - product(1007, 1002)).abs() < 1e-4);
        assert!((product(7, 2) - product(7, 3)).abs() > 1e-2);
    }
}
