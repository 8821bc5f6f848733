//! Where a tensor's elements lie in a buffer. Operations that only move elements about change this description and cost nothing.

use burn::tensor::Slice;

/// Number of a buffer in a program.
pub(super) type BufferId = usize;

/// A tensor in a buffer: element `i` lies at `offset + Σ i_axis strides_axis`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct View {
    pub buffer: BufferId,
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<isize>,
}

/// Distances between neighbours along every axis of a tensor whose elements follow one another.
fn contiguous_strides(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis] as isize;
    }
    strides
}

impl View {
    /// A whole buffer.
    pub fn whole(buffer: BufferId, shape: &[usize]) -> Self {
        Self { buffer, offset: 0, shape: shape.to_vec(), strides: contiguous_strides(shape) }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the elements follow one another.
    pub fn is_contiguous(&self) -> bool {
        let expected = contiguous_strides(&self.shape);
        let mut axes = self.shape.iter().zip(self.strides.iter().zip(&expected));
        self.len() == 0 || axes.all(|(&extent, (stride, expected))| extent == 1 || stride == expected)
    }

    /// The same elements in the same order in another shape; `None` where their places cannot be described so.
    pub fn reshape(&self, shape: &[usize]) -> Option<Self> {
        if self.is_contiguous() {
            return Some(Self { offset: self.offset, ..Self::whole(self.buffer, shape) });
        }
        // Old and new axes in groups of equal numbers of elements; those of an old group must lie evenly.
        let mut strides = vec![0; shape.len()];
        let (mut old, mut new) = (0, 0);
        while old < self.shape.len() && new < shape.len() {
            let (first_old, first_new) = (old, new);
            let (mut old_len, mut new_len) = (self.shape[old], shape[new]);
            while old_len != new_len {
                if old_len < new_len {
                    old += 1;
                    old_len *= self.shape.get(old)?;
                } else {
                    new += 1;
                    new_len *= shape.get(new)?;
                }
            }
            let group = (first_old..=old).filter(|&axis| self.shape[axis] != 1);
            let group: Vec<(usize, isize)> =
                group.map(|axis| (self.shape[axis], self.strides[axis])).collect();
            let even = group.windows(2).all(|pair| pair[0].1 == pair[1].1 * pair[1].0 as isize);
            if !even {
                return None;
            }
            let mut stride = group.last().map_or(1, |(_, stride)| *stride);
            for axis in (first_new..=new).rev() {
                strides[axis] = stride;
                stride *= shape[axis] as isize;
            }
            old += 1;
            new += 1;
        }
        Some(Self { shape: shape.to_vec(), strides, ..*self })
    }

    /// With its axes in another order: axis `i` is the old `axes[i]`.
    pub fn permute(&self, axes: &[usize]) -> Self {
        let shape = axes.iter().map(|&axis| self.shape[axis]).collect();
        let strides = axes.iter().map(|&axis| self.strides[axis]).collect();
        Self { shape, strides, ..*self }
    }

    /// Repeated along new axes in front and along those of extent 1.
    pub fn expand(&self, shape: &[usize]) -> Self {
        let new = shape.len() - self.shape.len();
        let stride = |axis: usize| match axis.checked_sub(new) {
            Some(old) if self.shape[old] == shape[axis] => self.strides[old],
            _ => 0,
        };
        Self { strides: (0..shape.len()).map(stride).collect(), shape: shape.to_vec(), ..*self }
    }

    /// A part of every axis; axes beyond the slices are whole.
    pub fn slice(&self, slices: &[Slice]) -> Self {
        let mut part = self.clone();
        let mut offset = self.offset as isize;
        for (axis, slice) in slices.iter().enumerate() {
            let range = slice.to_range(self.shape[axis]);
            let (len, step) = (slice.output_size(self.shape[axis]), slice.step);
            let first = if step < 0 { range.end.saturating_sub(1) } else { range.start };
            offset += first as isize * self.strides[axis];
            part.shape[axis] = len;
            part.strides[axis] = self.strides[axis] * step;
        }
        part.offset = if part.len() == 0 { self.offset } else { offset as usize };
        part
    }

    /// Backwards along some axes.
    pub fn flip(&self, axes: &[usize]) -> Self {
        let mut flipped = self.clone();
        let mut offset = self.offset as isize;
        for &axis in axes {
            offset += (self.shape[axis].max(1) as isize - 1) * self.strides[axis];
            flipped.strides[axis] = -self.strides[axis];
        }
        flipped.offset = offset as usize;
        flipped
    }

    /// Windows of `size` along an axis, `step` apart: the places in a window become the last axis.
    pub fn unfold(&self, axis: usize, size: usize, step: usize) -> Self {
        let mut windows = self.clone();
        windows.shape[axis] = (self.shape[axis] - size) / step + 1;
        windows.strides[axis] = self.strides[axis] * step as isize;
        windows.shape.push(size);
        windows.strides.push(self.strides[axis]);
        windows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(view: &View) -> Vec<isize> {
        let mut places = vec![view.offset as isize];
        for (&extent, &stride) in view.shape.iter().zip(&view.strides) {
            places = places
                .iter()
                .flat_map(|place| (0..extent as isize).map(move |i| place + i * stride))
                .collect();
        }
        places
    }

    #[test]
    fn reshaping_keeps_the_order_or_says_that_it_cannot() {
        let turned = View::whole(0, &[2, 3, 4]).permute(&[1, 0, 2]);
        let split = turned.reshape(&[3, 2, 2, 2]).unwrap();
        assert_eq!(elements(&split), elements(&turned));
        assert_eq!(turned.reshape(&[6, 4]), None);
        let expanded = View::whole(0, &[1, 4]).expand(&[5, 4]);
        assert_eq!(elements(&expanded.reshape(&[5, 2, 2]).unwrap()), elements(&expanded));
        assert_eq!(expanded.reshape(&[20]), None);
    }

    #[test]
    fn slices_flips_and_windows_find_their_elements() {
        let whole = View::whole(0, &[6]);
        assert_eq!(elements(&whole.slice(&[Slice::new(1, Some(6), 2)])), [1, 3, 5]);
        assert_eq!(elements(&whole.slice(&[Slice::new(0, Some(6), -2)])), [5, 3, 1]);
        assert_eq!(elements(&whole.flip(&[0])), [5, 4, 3, 2, 1, 0]);
        assert_eq!(elements(&whole.unfold(0, 3, 2)), [0, 1, 2, 2, 3, 4]);
    }
}
