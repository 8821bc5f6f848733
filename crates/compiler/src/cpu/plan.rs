//! A place in memory for every intermediate result: two that are never needed at the same time may share one.

use std::collections::{BTreeMap, HashMap};

use kiln_ops::kernels::RightFactor;

use super::lower::{Draft, Origin, Step, Work};
use super::memory::{Buffer, Kind, Place, Values};
use super::view::{BufferId, View};

/// Elements to whose multiples places are rounded: a cache line of floats.
const ALIGNMENT: usize = 16;

/// Where everything lies.
pub(super) struct MemoryPlan {
    pub buffers: Vec<Buffer>,
    /// Elements of each arena.
    pub arenas: BTreeMap<Kind, usize>,
    /// For steps that compute in the place of one of their operands, which.
    pub in_place: HashMap<usize, BufferId>,
}

/// Drops steps that nothing needs.
pub(super) fn drop_unused(steps: Vec<Step>, outputs: &[View]) -> Vec<Step> {
    let mut needed: Vec<BufferId> = outputs.iter().map(|view| view.buffer).collect();
    let mut kept: Vec<Step> = Vec::new();
    for step in steps.into_iter().rev() {
        if step.outputs.iter().any(|output| needed.contains(output)) {
            needed.extend(step.reads());
            kept.push(step);
        }
    }
    kept.reverse();
    kept
}

/// Packs the constants that products multiply their rows with, and lets go of those that nothing else reads.
pub(super) fn pack_weights(steps: &mut [Step], buffers: &mut [Buffer], outputs: &[View]) {
    let mut readers: HashMap<BufferId, usize> = HashMap::new();
    let reads = steps.iter().flat_map(Step::reads).chain(outputs.iter().map(|view| view.buffer));
    reads.for_each(|buffer| *readers.entry(buffer).or_default() += 1);
    for step in steps {
        let Work::Product { a, b, .. } = &step.work else { continue };
        let Place::Constant(values) = &buffers[b.buffer].place else { continue };
        let Values::Floats(values) = &**values else { continue };
        let by_rows = a.shape[0] == 1 && (a.strides[2] == 1 || a.shape[2] == 1);
        let Some(values) = values.get(b.offset..).filter(|_| by_rows) else { continue };
        let [inner, columns] = [b.shape[1], b.shape[2]];
        let weight = RightFactor::new(values, [inner, columns], [1, 2].map(|axis| b.strides[axis] as usize));
        let (x, packed) = (a.clone(), b.buffer);
        step.work = Work::FixedProduct { x, weight };
        if !step.reads().contains(&packed) {
            readers.entry(packed).and_modify(|readers| *readers -= 1);
        }
        if readers.get(&packed) == Some(&0) {
            buffers[packed].place = Place::Arena(0);
        }
    }
}

/// Places the results of all steps.
pub(super) fn place(drafts: &[Draft], steps: &[Step], outputs: &[View]) -> MemoryPlan {
    let mut last_read: HashMap<BufferId, usize> = HashMap::new();
    for (number, step) in steps.iter().enumerate() {
        last_read.extend(step.reads().into_iter().map(|buffer| (buffer, number)));
    }
    last_read.extend(outputs.iter().map(|view| (view.buffer, steps.len())));
    let mut buffers: Vec<Buffer> = drafts.iter().map(unplaced).collect();
    let mut arenas: BTreeMap<Kind, Arena> = BTreeMap::new();
    let mut in_place = HashMap::new();
    for (number, step) in steps.iter().enumerate() {
        let overwritten = overwritable(step, drafts, |buffer| last_read.get(&buffer) == Some(&number));
        if let Some(operand) = overwritten {
            buffers[step.outputs[0]].place = buffers[operand].place.clone();
            in_place.insert(number, operand);
        } else {
            for &output in &step.outputs {
                let arena = arenas.entry(drafts[output].kind).or_default();
                buffers[output].place = Place::Arena(arena.take(drafts[output].len));
            }
        }
        let mut over = step.reads();
        over.extend(step.outputs.iter().filter(|output| !last_read.contains_key(output)));
        over.retain(|buffer| {
            last_read.get(buffer).is_none_or(|&last| last == number) && overwritten != Some(*buffer)
        });
        for buffer in over {
            if let (Origin::Step(_), Place::Arena(start)) = (&drafts[buffer].origin, &buffers[buffer].place) {
                arenas.entry(drafts[buffer].kind).or_default().give_back(*start, drafts[buffer].len);
            }
        }
    }
    let arenas = arenas.into_iter().map(|(kind, arena)| (kind, arena.extent)).collect();
    MemoryPlan { buffers, arenas, in_place }
}

fn unplaced(draft: &Draft) -> Buffer {
    let place = match &draft.origin {
        Origin::Input(number) => Place::Input(*number),
        Origin::Constant(values) => Place::Constant(values.clone()),
        Origin::Step(_) => Place::Arena(0),
    };
    Buffer { kind: draft.kind, len: draft.len, place }
}

/// An operand that an element-wise step may overwrite as it goes: of the same size, read in order and for the last time.
fn overwritable(
    step: &Step,
    drafts: &[Draft],
    last_read_here: impl Fn(BufferId) -> bool,
) -> Option<BufferId> {
    let Work::Map(expression) = &step.work else { return None };
    let output = &drafts[step.outputs[0]];
    let loads = expression.loads();
    let fits = |view: &&&View| {
        let draft = &drafts[view.buffer];
        matches!(draft.origin, Origin::Step(_))
            && draft.kind == Kind::Float
            && output.kind == Kind::Float
            && draft.len == output.len
            && view.is_contiguous()
            && view.len() == output.len
            && last_read_here(view.buffer)
            && loads.iter().filter(|other| other.buffer == view.buffer).count() == 1
    };
    loads.iter().find(fits).map(|view| view.buffer)
}

/// A stretch of memory with gaps.
#[derive(Default)]
struct Arena {
    extent: usize,
    /// Start and length, in order.
    gaps: Vec<(usize, usize)>,
}

impl Arena {
    fn rounded(len: usize) -> usize {
        len.next_multiple_of(ALIGNMENT)
    }

    /// The tightest gap that is large enough, or new room at the end.
    fn take(&mut self, len: usize) -> usize {
        let len = Self::rounded(len);
        let fitting = self.gaps.iter().enumerate().filter(|(_, gap)| gap.1 >= len);
        if let Some((number, &(start, room))) = fitting.min_by_key(|(_, gap)| gap.1) {
            if room == len {
                self.gaps.remove(number);
            } else {
                self.gaps[number] = (start + len, room - len);
            }
            return start;
        }
        let start = match self.gaps.last() {
            Some(&(start, room)) if start + room == self.extent => {
                self.gaps.pop();
                start
            }
            _ => self.extent,
        };
        self.extent = start + len;
        start
    }

    fn give_back(&mut self, start: usize, len: usize) {
        let len = Self::rounded(len);
        if len == 0 {
            return;
        }
        let at = self.gaps.partition_point(|gap| gap.0 < start);
        self.gaps.insert(at, (start, len));
        if at + 1 < self.gaps.len() && start + len == self.gaps[at + 1].0 {
            self.gaps[at].1 += self.gaps.remove(at + 1).1;
        }
        if at > 0 && self.gaps[at - 1].0 + self.gaps[at - 1].1 == start {
            self.gaps[at - 1].1 += self.gaps.remove(at).1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_used_again_and_grow_together() {
        let mut arena = Arena::default();
        let [a, b, c] = [16, 32, 16].map(|len| arena.take(len));
        assert_eq!([a, b, c, arena.extent], [0, 16, 48, 64]);
        arena.give_back(a, 16);
        arena.give_back(b, 32);
        assert_eq!(arena.take(40), 0);
        arena.give_back(c, 16);
        assert_eq!([arena.take(30), arena.extent], [48, 80]);
    }
}
