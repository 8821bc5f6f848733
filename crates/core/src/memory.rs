//! Peak memory of a piece of work, as the operating system counts it.

use std::fs;

/// Measures how far the process's resident memory rises above where it was when the gauge was made.
///
/// Make the gauge before the first piece of work that is to be compared, since an allocator keeps what was
/// freed. Only Linux counts what is needed.
#[derive(Debug, Clone, Copy)]
pub struct MemoryGauge {
    baseline: u64,
}

impl MemoryGauge {
    /// A gauge that calls the present 0; `None` where the system does not tell.
    pub fn start() -> Option<Self> {
        Some(Self { baseline: status("VmRSS:")? })
    }

    /// Runs `work` and returns with its result the highest point meanwhile, in bytes above the gauge's 0.
    pub fn peak<R>(&self, work: impl FnOnce() -> R) -> (R, Option<u64>) {
        // "5" makes the kernel forget the highest point so far.
        let reset = fs::write("/proc/self/clear_refs", "5").is_ok();
        let result = work();
        let peak = status("VmHWM:").filter(|_| reset).map(|peak| peak.saturating_sub(self.baseline));
        (result, peak)
    }
}

/// A field of `/proc/self/status`, which counts in KiB.
fn status(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| 1024 * kib)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_large_allocation_shows() {
        let gauge = MemoryGauge::start().unwrap();
        let (sum, peak) = gauge.peak(|| vec![1u8; 64 << 20].iter().map(|&x| u64::from(x)).sum::<u64>());
        assert_eq!(sum, 64 << 20);
        // A kernel that cannot forget the highest point gives none.
        if let Some(peak) = peak {
            assert!(peak >= 60 << 20, "{peak}");
        }
    }
}
