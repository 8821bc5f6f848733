//! Which vector instructions a loop is compiled for, chosen when the program runs.

use std::sync::OnceLock;

use pulp::Arch;

/// The environment variable that chooses a lesser instruction set than the machine's best: `scalar` or,
/// on x86-64, `avx2`. Other values, and what the machine does not have, leave the best.
pub const LEVEL_VARIABLE: &str = "KILN_SIMD";

/// Runs `kernel` compiled for the widest instruction set of this machine (AVX-512, AVX2 with FMA, NEON,
/// WebAssembly's SIMD128, or the target's baseline).
///
/// Only what is inlined into the closure profits: mark it and the functions it calls `#[inline(always)]`.
#[inline]
pub fn simd<R>(kernel: impl FnOnce() -> R) -> R {
    /// A closure may be left out of line; this call may not.
    struct Inlined<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Inlined<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    arch().dispatch(Inlined(kernel))
}

fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| {
        let wanted = std::env::var(LEVEL_VARIABLE).unwrap_or_default();
        lesser(&wanted).unwrap_or_default()
    })
}

fn lesser(wanted: &str) -> Option<Arch> {
    match wanted {
        "scalar" => Some(Arch::Scalar),
        #[cfg(target_arch = "x86_64")]
        "avx2" => pulp::x86::V3::try_new().map(Arch::V3),
        _ => None,
    }
}
