//! Completions over HTTP.
use std::path::Path;

use kiln_core::{Context, Result};

pub fn serve(_model: &Path, _host: &str, _port: u16, _cx: &Context) -> Result<()> {
    Ok(())
}
