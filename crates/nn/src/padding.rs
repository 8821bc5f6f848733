//! Burn's padding configurations in elements before and after each axis.

use burn::nn::{PaddingConfig1d, PaddingConfig2d, PaddingConfig3d};

/// A padding configuration over `N` axes.
pub(crate) trait Pairs<const N: usize> {
    /// Elements before and after each axis of an input with the given extents.
    fn pairs(&self, extents: [usize; N], kernel: [usize; N], stride: [usize; N]) -> [(usize, usize); N];
}

impl Pairs<1> for PaddingConfig1d {
    fn pairs(&self, extents: [usize; 1], kernel: [usize; 1], stride: [usize; 1]) -> [(usize, usize); 1] {
        match *self {
            Self::Same => same(extents, kernel, stride),
            Self::Valid => [(0, 0)],
            Self::Explicit(left, right) => [(left, right)],
        }
    }
}

impl Pairs<2> for PaddingConfig2d {
    fn pairs(&self, extents: [usize; 2], kernel: [usize; 2], stride: [usize; 2]) -> [(usize, usize); 2] {
        match *self {
            Self::Same => same(extents, kernel, stride),
            Self::Valid => [(0, 0); 2],
            Self::Explicit(top, left, bottom, right) => [(top, bottom), (left, right)],
        }
    }
}

impl Pairs<3> for PaddingConfig3d {
    fn pairs(&self, extents: [usize; 3], kernel: [usize; 3], stride: [usize; 3]) -> [(usize, usize); 3] {
        match *self {
            Self::Same => same(extents, kernel, stride),
            Self::Valid => [(0, 0); 3],
            Self::Explicit(depth, height, width) => [(depth, depth), (height, height), (width, width)],
        }
    }
}

/// As many as make `⌈extent / stride⌉` outputs; of an odd number one more after the axis, as in ONNX.
fn same<const N: usize>(extents: [usize; N], kernel: [usize; N], stride: [usize; N]) -> [(usize, usize); N] {
    std::array::from_fn(|axis| {
        let last = extents[axis].div_ceil(stride[axis]).saturating_sub(1) * stride[axis];
        let total = (last + kernel[axis]).saturating_sub(extents[axis]);
        (total / 2, total - total / 2)
    })
}
