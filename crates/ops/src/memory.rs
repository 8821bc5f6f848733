//! Keeping freed memory for the next tensor.

/// Tells the C library's allocator to keep what is freed instead of handing it back to the operating system.
///
/// A training step allocates and frees tensors of the same sizes over and over. By default large ones are
/// mapped anew each time, and the system clears every page of them at first touch. Programs call this
/// once, at their start; the process then holds on to the most memory it ever needed. Does nothing where the
/// allocator is not glibc's.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    #[allow(unsafe_code)]
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
    #[allow(unsafe_code)]
    // SAFETY: `malloc_trim` takes an integer by value and gives back free pages under the allocator's lock; memory
    // in use is not touched.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
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
