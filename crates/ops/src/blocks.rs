//! How work on many elements is divided among threads, and memory for its results.

use std::mem::MaybeUninit;

use rayon::prelude::*;

/// Elements that are worked on at once: few enough to stay in a core's cache.
pub const BLOCK: usize = 8192;

/// Blocks that are worth a task of their own; fewer stay on the calling thread.
pub const BLOCKS_PER_TASK: usize = 4;

/// Elements that are copied and changed at once: source, copy and two more operands stay in a core's first cache.
const COPIED: usize = 2048;

/// Rows of `width` elements that make a block.
pub fn rows_at_once(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}

/// The elements of as many whole rows as `elements` hold, and of one at least.
fn whole_rows(elements: usize, width: usize) -> usize {
    (elements / width.max(1)).max(1) * width.max(1)
}

/// Hands `work` blocks of whole rows of `width` elements, each with the place of its first element.
pub fn in_place(values: &mut [f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) {
    let elements = whole_rows(BLOCK, width);
    let blocks = values.par_chunks_mut(elements).enumerate().with_min_len(BLOCKS_PER_TASK);
    blocks.for_each(|(block, values)| work(block * elements, values));
}

/// A copy of `source` whose blocks of whole rows of `width` elements `work` has changed; it is given the place of each block's
/// first element.
pub fn changed(source: &[f32], width: usize, work: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    changed_with(source, width, || (), |(), first, block| work(first, block)).0
}

/// [`changed`], where `work` also has a state that `new` makes for every task; the states in the order of the tasks, which
/// depend on the sizes alone.
///
/// Memory that is new from the system is written once, while the block is in the cache, instead of being
/// cleared first.
pub fn changed_with<S: Send>(
    source: &[f32],
    width: usize,
    new: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, usize, &mut [f32]) + Sync,
) -> (Vec<f32>, Vec<S>) {
    let (task_size, block_size) = (whole_rows(BLOCKS_PER_TASK * BLOCK, width), whole_rows(COPIED, width));
    let mut values = Vec::with_capacity(source.len());
    let memory = &mut values.spare_capacity_mut()[..source.len()];
    let tasks = memory.par_chunks_mut(task_size).zip(source.par_chunks(task_size)).enumerate();
    let states = tasks.map(|(task, (memory, source))| {
        let mut state = new();
        let blocks = memory.chunks_mut(block_size).zip(source.chunks(block_size)).enumerate();
        for (block, (memory, source)) in blocks {
            work(&mut state, task * task_size + block * block_size, copied(memory, source));
        }
        state
    });
    let states = states.collect();
    #[allow(unsafe_code)]
    // SAFETY: the capacity is at least `source.len()`, and `copied` has initialised every element up to there: the
    // chunks of memory and source have the same lengths and together cover all of both.
    unsafe {
        values.set_len(source.len());
    }
    (values, states)
}

/// Writes a copy of `source` into `memory` of the same length.
///
/// In pieces, because the C library copies large ones with an instruction that is slow on some processors.
fn copied<'a>(memory: &'a mut [MaybeUninit<f32>], source: &[f32]) -> &'a mut [f32] {
    const PIECE: usize = 1024;
    assert_eq!(memory.len(), source.len());
    for (memory, source) in memory.chunks_mut(PIECE).zip(source.chunks(PIECE)) {
        memory.write_copy_of_slice(source);
    }
    #[allow(unsafe_code)]
    // SAFETY: the pieces of memory and source have the same lengths and cover all of both, so that every element has
    // been written.
    unsafe {
        memory.assume_init_mut()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_every_row_once_whatever_their_width() {
        for (rows, width) in [(0, 3), (1, 1), (5, 20_000), (9000, 3), (40_000, 2), (3, 8192), (70_001, 1)] {
            let source: Vec<f32> = (0..rows * width).map(|i| i as f32).collect();
            let (values, firsts) = changed_with(&source, width, Vec::new, |firsts, first, block| {
                assert!(first % width == 0 && block.len() % width == 0, "rows stay whole");
                block.iter_mut().enumerate().for_each(|(i, x)| *x += (first + i) as f32);
                firsts.push(first);
            });
            assert!(values.iter().enumerate().all(|(i, &x)| x == 2.0 * i as f32));
            let firsts = firsts.concat();
            assert!(firsts.is_sorted() && firsts.first().is_none_or(|&first| first == 0));
            let mut same = source;
            in_place(&mut same, width, |first, block| {
                block.iter_mut().enumerate().for_each(|(i, x)| *x += (first + i) as f32);
            });
            assert_eq!(same, values);
        }
    }
}
