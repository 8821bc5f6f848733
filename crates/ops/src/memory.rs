//! Memory for tensors: on whole vectors and large pages, and kept for the next one when it is freed.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};

/// The system's allocator, with large blocks laid out as tensors want them: from 4 KiB on they begin on a cache line, so that
/// no vector crosses two; from 4 MiB on the kernel is asked for pages of 2 MiB (Linux), so that the translation of addresses
/// does not hold up what reads at random places.
///
/// A program names it once, as the `kiln` binary does:
///
/// ```
/// #[global_allocator]
/// static ALLOCATOR: kiln_ops::TensorAllocator = kiln_ops::TensorAllocator;
/// # fn main() {
/// let tensor = vec![1.0f32; 1 << 20];
/// assert!(tensor.as_ptr().cast::<u8>().is_aligned_to_line());
/// # }
/// # trait Line { fn is_aligned_to_line(self) -> bool; }
/// # impl Line for *const u8 { fn is_aligned_to_line(self) -> bool { self as usize % 64 == 0 } }
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct TensorAllocator;

/// Bytes of a cache line, and of the widest vector.
const LINE: usize = 64;
/// Blocks of this many bytes begin on a line,
const LARGE: usize = 4 << 10;
/// and for those of this many, large pages are asked for.
const HUGE: usize = 4 << 20;
/// Bytes of a large page.
const PAGE: usize = 2 << 20;

// SAFETY: `System` keeps the trait's contract. Blocks below `LARGE` are its own; larger ones lie in a block of its own that is
// longer by a line, whose address stands in front of them (`lined_up`), and go back by that address.
unsafe impl GlobalAlloc for TensorAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match padded(layout) {
            // SAFETY: the caller's layout is not empty, and so the padded one is not; it has the size that `lined_up` asks for.
            Some(whole) => unsafe { lined_up(System.alloc(whole), layout.size()) },
            // SAFETY: the caller keeps the contract.
            None => unsafe { System.alloc(layout) },
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        match padded(layout) {
            // SAFETY: as in `alloc`; the address is written outside of the part that is handed out.
            Some(whole) => unsafe { lined_up(System.alloc_zeroed(whole), layout.size()) },
            // SAFETY: the caller keeps the contract.
            None => unsafe { System.alloc_zeroed(layout) },
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match padded(layout) {
            // SAFETY: `lined_up` has written the address of the system's block in front of this one, and that block was asked
            // for with the same padded layout.
            Some(whole) => unsafe { System.dealloc(block.cast::<*mut u8>().sub(1).read(), whole) },
            // SAFETY: the caller keeps the contract.
            None => unsafe { System.dealloc(block, layout) },
        }
    }
}

/// The layout of the system's block that holds a large one; `None` for small ones, for those that ask for more than a line,
/// and where there is no such layout.
fn padded(layout: Layout) -> Option<Layout> {
    if layout.size() < LARGE || layout.align() > LINE {
        return None;
    }
    Layout::from_size_align(layout.size() + LINE, align_of::<*mut u8>()).ok()
}

/// The place behind the first line's end in `whole`, with the address of `whole` in front of it; null where that is null.
///
/// # Safety
/// `whole` is null or a block of `size` bytes and a line, on an address that a pointer can be read from.
unsafe fn lined_up(whole: *mut u8, size: usize) -> *mut u8 {
    if whole.is_null() {
        return whole;
    }
    let skipped = LINE - whole.addr() % LINE;
    // SAFETY: `skipped` is at most a line and at least the size of a pointer, to which `whole` is aligned, so that the pointer
    // and `size` bytes behind it lie in `whole`.
    let block = unsafe {
        let block = whole.add(skipped);
        block.cast::<*mut u8>().sub(1).write(whole);
        block
    };
    if size >= HUGE {
        prefer_large_pages(block, size);
    }
    block
}

/// Asks the kernel to back the whole large pages of a block with such.
fn prefer_large_pages(block: *mut u8, size: usize) {
    #[cfg(target_os = "linux")]
    {
        let skipped = block.addr().next_multiple_of(PAGE) - block.addr();
        let length = (size - skipped) / PAGE * PAGE;
        // SAFETY: the range lies in the block; the advice changes how it is backed, not what it holds, and may be ignored.
        unsafe {
            libc::madvise(block.add(skipped).cast(), length, libc::MADV_HUGEPAGE);
        }
    }
}

/// Tells the C library's allocator to keep what is freed instead of handing it back to the operating system.
///
/// A training step allocates and frees tensors of the same sizes over and over. By default large ones are
/// mapped anew each time, and the system clears every page of them at first touch. Programs call this
/// once, at their start; the process then holds on to the most memory it ever needed. Does nothing where the
/// allocator is not glibc's.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` takes two integers by value and changes the allocator's own settings under the
    // allocator's lock; both settings and values are documented ones (no mappings, no trimming), and memory that
    // was handed out before stays valid.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
    }
}

/// Hands back to the operating system what was freed and kept, so that a measurement of memory starts afresh.
/// Does nothing where the allocator is not glibc's.
pub fn release_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `malloc_trim` takes an integer by value and gives back free pages under the allocator's lock; memory
    // in use is not touched.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_begin_on_lines_hold_what_is_written_and_go_back() {
        for size in [1, LARGE - 1, LARGE, LARGE + 1, 100_000, HUGE - 1, HUGE, 3 * HUGE + 7] {
            for align in [1, 8, LINE, 256] {
                let layout = Layout::from_size_align(size, align).unwrap();
                // SAFETY: the layout is not empty; the block is written and read within its size, and goes back once with its
                // last layout.
                unsafe {
                    let block = TensorAllocator.alloc_zeroed(layout);
                    assert!(
                        block.addr().is_multiple_of(align)
                            && (size < LARGE || block.addr().is_multiple_of(LINE))
                    );
                    assert!(std::slice::from_raw_parts(block, size).iter().all(|&byte| byte == 0));
                    block.write_bytes(7, size);
                    let longer = TensorAllocator.realloc(block, layout, 2 * size);
                    assert!(std::slice::from_raw_parts(longer, size).iter().all(|&byte| byte == 7));
                    TensorAllocator.dealloc(longer, Layout::from_size_align(2 * size, align).unwrap());
                    let plain = TensorAllocator.alloc(layout);
                    plain.write_bytes(1, size);
                    TensorAllocator.dealloc(plain, layout);
                }
            }
        }
    }

    #[test]
    fn a_block_that_could_not_hold_a_line_more_is_left_to_the_system() {
        let layout = |size: usize| Layout::from_size_align(size, 8).unwrap();
        assert!(padded(layout(isize::MAX as usize - 7)).is_none());
        assert_eq!(padded(layout(LARGE)).map(|whole| whole.size()), Some(LARGE + LINE));
    }

    #[test]
    fn memory_from_before_and_after_stays_valid() {
        let before = vec![1u8; 40 << 20];
        super::keep_freed_memory();
        let after = vec![2u8; 40 << 20];
        assert!(before.iter().all(|&x| x == 1) && after.iter().all(|&x| x == 2));
        drop(before);
        super::release_freed_memory();
        let reused = vec![3u8; 40 << 20];
        assert!(after.iter().all(|&x| x == 2) && reused.iter().all(|&x| x == 3));
    }
}
