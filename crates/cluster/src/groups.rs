//! Groups of ranks, and grids of them.

use std::sync::Arc;

use kiln_core::{Error, Result};

use crate::ElementKind;
use crate::call::{Call, Operation};
use crate::communicator::Communicator;
use crate::error::ClusterError;

impl Communicator {
    /// Makes a group of all ranks that gave the same color, ordered by key and then by rank. No color, no group.
    /// All ranks of this group call it.
    ///
    /// # Errors
    /// When a rank is lost or late, or the ranks' calls differ.
    pub fn split(&self, color: Option<usize>, key: i64) -> Result<Option<Self>> {
        let own = [i64::from(color.is_some()), color.unwrap_or(0) as i64, key];
        let mut all = vec![0i64; 3 * self.size()];
        self.all_gather(&own, &mut all)?;
        let Some(color) = color else { return Ok(None) };
        let same = all.chunks_exact(3).enumerate().filter(|(_, entry)| entry[..2] == own[..2]);
        let mut ranks: Vec<(i64, usize)> = same.map(|(rank, entry)| (entry[2], rank)).collect();
        ranks.sort_unstable();
        let ranks: Vec<usize> = ranks.into_iter().map(|(_, rank)| rank).collect();
        Ok(self.of_ranks(&ranks, color as u64))
    }

    /// Makes a group of these ranks, numbered in this order. All ranks of this group call it, with the same list;
    /// those outside get nothing.
    ///
    /// # Errors
    /// When the list has a rank twice or one that there is not, a rank is lost or late, or the ranks' lists differ.
    pub fn group(&self, ranks: &[usize]) -> Result<Option<Self>> {
        self.require_distinct(ranks)?;
        let own: Vec<i64> = ranks.iter().map(|&rank| rank as i64).collect();
        let mut lists = vec![0i64; own.len() * self.size()];
        self.all_gather(&own, &mut lists)?;
        if let Some(other) = lists.chunks(own.len().max(1)).position(|list| list != own) {
            let listed = |rank: usize, list: &[i64]| (self.members()[rank], format!("group of {list:?}"));
            let theirs = &lists[other * own.len()..(other + 1) * own.len()];
            let calls = vec![listed(self.rank(), &own), listed(other, theirs)];
            return self.collective(self.making(), |_| Err(ClusterError::Mismatch { calls }));
        }
        Ok(self.of_ranks(ranks, ranks.first().map_or(0, |&first| first as u64)))
    }

    /// The group of these ranks without asking the others, who make it from the same numbers.
    fn of_ranks(&self, ranks: &[usize], salt: u64) -> Option<Self> {
        let place = ranks.iter().position(|&rank| rank == self.rank())?;
        let members: Arc<[usize]> = ranks.iter().map(|&rank| self.members()[rank]).collect();
        Some(self.subgroup(members, place, salt))
    }

    fn require_distinct(&self, ranks: &[usize]) -> Result<()> {
        let mut seen = vec![false; self.size()];
        for &rank in ranks {
            let wrong = match seen.get_mut(rank) {
                None => format!("group: there is no rank {rank} in a group of {}", self.size()),
                Some(true) => format!("group: rank {rank} is listed twice"),
                Some(seen) => {
                    *seen = true;
                    continue;
                }
            };
            return self.collective(self.making(), |_| Err(ClusterError::Invalid(wrong)));
        }
        Ok(())
    }

    fn making(&self) -> Call {
        Call::new(Operation::Split, ElementKind::I64, 0)
    }
}

/// A grid of ranks with named axes, row-major: the last axis is the fastest.
///
/// For tensor, data and pipeline parallelism, `Mesh::new(&[("pipe", p), ("data", d), ("tensor", t)])` gives
/// `rank = (pipe · d + data) · t + tensor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mesh {
    axes: Vec<(String, usize)>,
}

impl Mesh {
    /// A grid with those extents.
    ///
    /// # Errors
    /// When an extent is zero, a name comes twice, or the grid has more places than can be counted.
    pub fn new(axes: &[(&str, usize)]) -> Result<Self> {
        let mut size = 1usize;
        for (index, &(name, extent)) in axes.iter().enumerate() {
            if axes[..index].iter().any(|(other, _)| *other == name) {
                return Err(Error::usage(format!("the axis `{name}` of a mesh comes twice")));
            }
            size = match size.checked_mul(extent) {
                Some(size) if size > 0 => size,
                _ => return Err(Error::usage(format!("a mesh cannot have extent {extent} along `{name}`"))),
            };
        }
        Ok(Self { axes: axes.iter().map(|&(name, extent)| (name.to_string(), extent)).collect() })
    }

    /// Ranks in the grid.
    pub fn size(&self) -> usize {
        self.axes.iter().map(|(_, extent)| extent).product()
    }

    /// Names and extents of the axes.
    pub fn axes(&self) -> &[(String, usize)] {
        &self.axes
    }

    /// Ranks along an axis.
    ///
    /// # Panics
    /// When there is no such axis.
    pub fn extent(&self, axis: &str) -> usize {
        self.axes[self.index(axis)].1
    }

    /// Where a rank lies along an axis.
    ///
    /// # Panics
    /// When there is no such axis.
    pub fn coordinate(&self, rank: usize, axis: &str) -> usize {
        self.coordinates(rank)[self.index(axis)]
    }

    /// Where a rank lies along all axes.
    pub fn coordinates(&self, rank: usize) -> Vec<usize> {
        let mut rest = rank;
        let mut coordinates: Vec<usize> =
            self.axes.iter().rev().map(|(_, extent)| (rest % extent, rest /= extent).0).collect();
        coordinates.reverse();
        coordinates
    }

    /// The rank at these coordinates, in the order of the axes.
    ///
    /// # Panics
    /// When there is not one coordinate an axis, or one lies outside.
    pub fn rank(&self, coordinates: &[usize]) -> usize {
        assert_eq!(coordinates.len(), self.axes.len(), "one coordinate for each axis");
        self.axes.iter().zip(coordinates).fold(0, |rank, ((name, extent), &coordinate)| {
            assert!(coordinate < *extent, "{coordinate} lies outside of `{name}`, which has {extent}");
            rank * extent + coordinate
        })
    }

    /// Ranks that differ from this one along an axis only, in its order.
    ///
    /// # Panics
    /// When there is no such axis.
    pub fn line(&self, rank: usize, axis: &str) -> Vec<usize> {
        let index = self.index(axis);
        let mut place = self.coordinates(rank);
        (0..self.axes[index].1)
            .map(|coordinate| {
                place[index] = coordinate;
                self.rank(&place)
            })
            .collect()
    }

    /// The group of the ranks that differ from this one along an axis only. All ranks of `comm` call it.
    ///
    /// # Errors
    /// When the grid has not as many ranks as `comm`, or a rank is lost or late.
    ///
    /// # Panics
    /// When there is no such axis.
    pub fn along(&self, comm: &Communicator, axis: &str) -> Result<Communicator> {
        if self.size() != comm.size() {
            let axes: Vec<String> =
                self.axes.iter().map(|(name, extent)| format!("{name} {extent}")).collect();
            let (found, expected) = (comm.size(), self.size());
            return Err(Error::usage(format!(
                "a mesh of {} needs {expected} ranks, there are {found}",
                axes.join(" × ")
            )));
        }
        let line = self.line(comm.rank(), axis);
        let group = comm.split(Some(line[0]), comm.rank() as i64)?;
        Ok(group.expect("a rank lies on its own line"))
    }

    fn index(&self, axis: &str) -> usize {
        let found = self.axes.iter().position(|(name, _)| name == axis);
        found.unwrap_or_else(|| panic!("the mesh has no axis `{axis}`"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_axis_is_the_fastest() {
        let mesh = Mesh::new(&[("pipe", 2), ("data", 3), ("tensor", 4)]).unwrap();
        assert_eq!(mesh.size(), 24);
        for rank in 0..24 {
            let (pipe, data, tensor) = (
                mesh.coordinate(rank, "pipe"),
                mesh.coordinate(rank, "data"),
                mesh.coordinate(rank, "tensor"),
            );
            assert_eq!(rank, (pipe * 3 + data) * 4 + tensor);
            assert_eq!(mesh.rank(&[pipe, data, tensor]), rank);
        }
        assert_eq!(mesh.line(13, "data"), [13, 17, 21]);
    }

    #[test]
    fn a_mesh_without_places_or_with_an_axis_twice_is_refused() {
        assert!(Mesh::new(&[("a", 0)]).is_err());
        assert!(Mesh::new(&[("a", usize::MAX), ("b", 2)]).is_err());
        assert!(Mesh::new(&[("a", 2), ("a", 2)]).is_err());
    }
}
