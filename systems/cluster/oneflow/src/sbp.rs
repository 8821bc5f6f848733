//! Where the parts of a tensor lie: placements, split–broadcast–partial, and the regions that follow from them (§3).

use std::fmt;
use std::str::FromStr;

use kiln_core::{Error, Result};
use serde::{Serialize, Serializer};

/// How partial tensors become the value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reduction {
    /// Element-wise sum.
    Sum,
    /// Element-wise maximum.
    Max,
    /// Element-wise minimum.
    Min,
}

impl Reduction {
    /// What leaves every value as it is.
    pub fn neutral(self) -> f64 {
        match self {
            Self::Sum => 0.0,
            Self::Max => f64::NEG_INFINITY,
            Self::Min => f64::INFINITY,
        }
    }
}

/// What one axis of the mesh does to a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Sbp {
    /// Local tensors are balanced slices along an axis of the tensor; the first `len mod n` are one longer.
    S(usize),
    /// Every device has the whole.
    B,
    /// Every device has a tensor of the whole shape; the value is their reduction.
    P(Reduction),
}

impl Sbp {
    /// Partial sums.
    pub const SUM: Self = Self::P(Reduction::Sum);

    /// The axis of the tensor that is split.
    pub fn axis(self) -> Option<usize> {
        match self {
            Self::S(axis) => Some(axis),
            _ => None,
        }
    }

    /// The reduction of partial tensors.
    pub fn reduction(self) -> Option<Reduction> {
        match self {
            Self::P(reduction) => Some(reduction),
            _ => None,
        }
    }

    /// What carries the gradient of a tensor in this form: slices stay, and copies and sums change places.
    #[must_use]
    pub fn dual(self) -> Self {
        match self {
            Self::S(axis) => Self::S(axis),
            Self::B => Self::SUM,
            Self::P(_) => Self::B,
        }
    }
}

impl fmt::Display for Sbp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S(axis) => write!(f, "S{axis}"),
            Self::B => f.write_str("B"),
            Self::P(Reduction::Sum) => f.write_str("P"),
            Self::P(Reduction::Max) => f.write_str("Pmax"),
            Self::P(Reduction::Min) => f.write_str("Pmin"),
        }
    }
}

impl FromStr for Sbp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let text = text.trim();
        match text.to_ascii_lowercase().as_str() {
            "b" => return Ok(Self::B),
            "p" | "psum" => return Ok(Self::SUM),
            "pmax" => return Ok(Self::P(Reduction::Max)),
            "pmin" => return Ok(Self::P(Reduction::Min)),
            _ => {}
        }
        let axis = text.strip_prefix(['S', 's']).map(|axis| axis.trim_matches(['(', ')']));
        axis.and_then(|axis| axis.parse().ok()).map(Self::S).ok_or_else(|| {
            Error::usage(format!("\"{text}\" is no SBP"))
                .hint("S0 splits the first axis of the tensor, B copies, P, Pmax and Pmin are partial")
        })
    }
}

/// One [`Sbp`] an axis of the mesh, applied from the first axis on: `[S(0), S(0)]` splits each piece again.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NdSbp(pub Vec<Sbp>);

impl NdSbp {
    /// The same on every axis of a mesh of `axes` axes.
    pub fn uniform(sbp: Sbp, axes: usize) -> Self {
        Self(vec![sbp; axes])
    }

    /// Copies everywhere.
    pub fn broadcast(axes: usize) -> Self {
        Self::uniform(Sbp::B, axes)
    }

    /// What carries the gradient: see [`Sbp::dual`].
    #[must_use]
    pub fn dual(&self) -> Self {
        Self(self.0.iter().map(|sbp| sbp.dual()).collect())
    }

    /// Whether some axis of the mesh holds partial tensors.
    pub fn is_partial(&self) -> bool {
        self.0.iter().any(|sbp| sbp.reduction().is_some())
    }

    /// Makes sure that a tensor of a shape can lie so on a mesh.
    ///
    /// # Errors
    /// When the mesh has another number of axes, or an axis is split that the tensor lacks.
    pub fn check(&self, name: &str, shape: &[usize], mesh: &[usize]) -> Result<()> {
        if self.0.len() != mesh.len() {
            let found = format!(
                "{self} says what {} axes of a mesh do, the mesh {mesh:?} has {}",
                self.0.len(),
                mesh.len()
            );
            return Err(Error::usage(format!("{name}: {found}"))
                .hint("one of S0, S1, …, B, P an axis, joined by commas"));
        }
        match self.0.iter().filter_map(|sbp| sbp.axis()).find(|axis| *axis >= shape.len()) {
            Some(axis) => Err(Error::usage(format!(
                "{name}: {self} splits axis {axis} of a tensor of shape {shape:?}, which has {} axes",
                shape.len()
            ))),
            None => Ok(()),
        }
    }
}

impl fmt::Display for NdSbp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.0.iter().map(Sbp::to_string).collect();
        f.write_str(&parts.join(","))
    }
}

impl FromStr for NdSbp {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        text.trim_matches(['[', ']']).split(',').map(str::parse).collect::<Result<_>>().map(Self)
    }
}

impl Serialize for NdSbp {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Serialize for Sbp {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Ranks in the order of a mesh, row-major: the last axis is the fastest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Placement {
    /// The ranks.
    pub ranks: Vec<usize>,
    /// The extents of the mesh.
    pub mesh: Vec<usize>,
}

impl Placement {
    /// The ranks from 0 on in a mesh.
    ///
    /// # Errors
    /// When the mesh has no axis or an axis without devices.
    pub fn mesh(extents: &[usize]) -> Result<Self> {
        Self::starting_at(0, extents)
    }

    /// The ranks from `first` on in a mesh.
    ///
    /// # Errors
    /// As [`mesh`](Self::mesh).
    pub fn starting_at(first: usize, extents: &[usize]) -> Result<Self> {
        const MOST: usize = 1 << 20;
        let size = extents.iter().try_fold(1usize, |n, &m| n.checked_mul(m).filter(|n| *n <= MOST));
        match size {
            Some(size) if size > 0 && !extents.is_empty() => {
                Ok(Self { ranks: (first..first + size).collect(), mesh: extents.to_vec() })
            }
            _ => Err(Error::usage(format!("{extents:?} is no mesh of devices")).hint("write 4 or 2x2")),
        }
    }

    /// A mesh as it is written: `4`, `2x2`.
    ///
    /// # Errors
    /// When the text is something else.
    pub fn parse(text: &str) -> Result<Self> {
        let extents: Option<Vec<usize>> =
            text.split(['x', ',', '×']).map(|part| part.trim().parse().ok()).collect();
        match extents {
            Some(extents) => Self::mesh(&extents),
            None => Err(Error::usage(format!("\"{text}\" is no mesh of devices")).hint("write 4 or 2x2")),
        }
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// Where in the mesh the `index`-th of its ranks stands.
    pub fn coordinate(&self, index: usize) -> Vec<usize> {
        coordinate(&self.mesh, index)
    }
}

impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let extents: Vec<String> = self.mesh.iter().map(usize::to_string).collect();
        write!(f, "mesh {} of ranks {:?}", extents.join("x"), self.ranks)
    }
}

/// The coordinate of a place in a row-major mesh.
pub fn coordinate(mesh: &[usize], index: usize) -> Vec<usize> {
    let mut rest = index;
    let mut coordinate = vec![0; mesh.len()];
    for axis in (0..mesh.len()).rev() {
        coordinate[axis] = rest % mesh[axis];
        rest /= mesh[axis];
    }
    coordinate
}

/// Begin and length of part `index` of `parts` of an axis: balanced, the first ones one longer.
pub fn part(len: usize, parts: usize, index: usize) -> (usize, usize) {
    let (size, longer) = (len / parts, len % parts);
    (index * size + index.min(longer), size + usize::from(index < longer))
}

/// A box in a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Region {
    /// Its first element an axis.
    pub start: Vec<usize>,
    /// Its extents.
    pub size: Vec<usize>,
}

impl Region {
    /// All of a tensor.
    pub fn whole(shape: &[usize]) -> Self {
        Self { start: vec![0; shape.len()], size: shape.to_vec() }
    }

    /// What the device at a coordinate has of a tensor.
    pub fn local(shape: &[usize], mesh: &[usize], sbp: &NdSbp, coordinate: &[usize]) -> Self {
        let mut region = Self::whole(shape);
        for ((sbp, &extent), &index) in sbp.0.iter().zip(mesh).zip(coordinate) {
            if let Sbp::S(axis) = sbp {
                region = region.split(*axis, extent, index);
            }
        }
        region
    }

    /// Part `index` of `parts` along an axis.
    #[must_use]
    pub fn split(mut self, axis: usize, parts: usize, index: usize) -> Self {
        let (begin, len) = part(self.size[axis], parts, index);
        self.start[axis] += begin;
        self.size[axis] = len;
        self
    }

    /// How many elements it has.
    pub fn elements(&self) -> usize {
        self.size.iter().product()
    }

    /// What two regions share.
    pub fn intersect(&self, other: &Self) -> Self {
        let mut shared = self.clone();
        for axis in 0..self.start.len() {
            let begin = self.start[axis].max(other.start[axis]);
            let end = (self.start[axis] + self.size[axis]).min(other.start[axis] + other.size[axis]);
            shared.start[axis] = begin;
            shared.size[axis] = end.saturating_sub(begin);
        }
        shared
    }
}

/// Copies a box from an array that holds `from` into one that holds `to`.
pub fn copy_box<T: Copy>(values: &[T], from: &Region, into: &mut [T], to: &Region, what: &Region) {
    if what.elements() == 0 {
        return;
    }
    let rank = what.size.len();
    // Trailing axes that all three have in full are one run.
    let mut run = 1;
    let mut outer = rank;
    while outer > 0 {
        let axis = outer - 1;
        run *= what.size[axis];
        outer -= 1;
        if what.size[axis] != from.size[axis] || what.size[axis] != to.size[axis] {
            break;
        }
    }
    let offset = |region: &Region, index: &[usize]| {
        (0..rank).fold(0, |at, axis| {
            let inner = if axis < outer { index[axis] } else { 0 };
            at * region.size[axis] + what.start[axis] + inner - region.start[axis]
        })
    };
    let mut index = vec![0; outer];
    loop {
        let (source, target) = (offset(from, &index), offset(to, &index));
        into[target..target + run].copy_from_slice(&values[source..source + run]);
        let Some(axis) = (0..outer).rev().find(|&axis| index[axis] + 1 < what.size[axis]) else { break };
        index[axis] += 1;
        index[axis + 1..].fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_an_axis_in_order_and_differ_by_one_at_most() {
        for len in 0..12 {
            for parts in 1..6 {
                let mut next = 0;
                for index in 0..parts {
                    let (begin, size) = part(len, parts, index);
                    assert_eq!(begin, next);
                    assert!(size == len / parts || size == len / parts + 1);
                    next += size;
                }
                assert_eq!(next, len);
            }
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for text in ["S0", "B", "P", "Pmax", "S0,B", "P,S3"] {
            assert_eq!(text.parse::<NdSbp>().unwrap().to_string(), text);
        }
        assert_eq!("S(1)".parse::<Sbp>().unwrap(), Sbp::S(1));
        assert!("Q".parse::<Sbp>().is_err());
    }

    #[test]
    fn boxes_are_copied_between_arrays_of_different_regions() {
        let from = Region { start: vec![1, 0, 2], size: vec![3, 2, 4] };
        let to = Region { start: vec![0, 1, 0], size: vec![3, 1, 5] };
        let what = from.intersect(&to);
        assert_eq!(what, Region { start: vec![1, 1, 2], size: vec![2, 1, 3] });
        let value = |i: usize, j: usize, k: usize| i * 100 + j * 10 + k;
        let values: Vec<usize> = (0..24).map(|at| value(1 + at / 8, (at / 4) % 2, 2 + at % 4)).collect();
        let mut into = vec![usize::MAX; 15];
        copy_box(&values, &from, &mut into, &to, &what);
        for (at, found) in into.into_iter().enumerate() {
            let (i, k) = (at / 5, at % 5);
            let expected =
                if (1..3).contains(&i) && (2..5).contains(&k) { value(i, 1, k) } else { usize::MAX };
            assert_eq!(found, expected, "{i} {k}");
        }
    }
}
