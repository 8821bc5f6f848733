//! Where tests and benchmarks find data that is too large for the repository.

use std::path::{Path, PathBuf};

/// The folder of shared data: `$KILN_SHARED`, or `shared` beside the workspace. `None` when there is no such
/// folder; a test that needs it then says `skipped: no shared data` and passes.
pub fn shared_dir() -> Option<PathBuf> {
    let folder = match std::env::var_os("KILN_SHARED") {
        Some(folder) => PathBuf::from(folder),
        // crates/data, crates, the workspace, the folder around it
        None => Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(3)?.join("shared"),
    };
    folder.is_dir().then_some(folder)
}
