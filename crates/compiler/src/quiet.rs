//! Burn answers operands that do not fit with a panic; here it becomes an error, without a message on the terminal.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// Whether this thread's panics are caught and told as errors.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

/// What `work` returns, or what it says in panic.
///
/// The panic hook belongs to the whole process. It is wrapped once, and lets everything through but the panics of
/// threads that are in this function, so other threads' faults are told as ever.
///
/// # Errors
/// What the panic said.
pub fn catch_panic<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static WRAPPED: Once = Once::new();
    WRAPPED.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !QUIET.get() {
                usual(info);
            }
        }));
    });
    let before = QUIET.replace(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    QUIET.set(before);
    outcome.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("unknown cause");
        text.trim().to_string()
    })
}
