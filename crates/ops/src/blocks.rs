//! How work on many elements is divided among threads.

/// Elements that are worked on at once: few enough to stay in a core's cache.
pub const BLOCK: usize = 8192;

/// Blocks that are worth a task of their own; fewer stay on the calling thread.
pub const BLOCKS_PER_TASK: usize = 4;

/// Rows of `width` elements that make a block.
pub fn rows_at_once(width: usize) -> usize {
    (BLOCK / width.max(1)).max(1)
}
