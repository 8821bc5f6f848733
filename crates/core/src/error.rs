//! Errors written for the person at the keyboard: what was found, where, and how to mend it.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// The result of everything in Kiln that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure an [`Error`] is; it decides the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The command line asks for something impossible (exit code 2).
    Usage,
    /// A file or value from outside is not what it should be (exit code 1).
    Input,
    /// The operating system refused a read or a write (exit code 1).
    Io,
    /// The computation itself failed, for example a loss that is not a number (exit code 1).
    Work,
    /// The user pressed Ctrl-C; what could be saved has been saved (exit code 130).
    Interrupted,
}

/// A failure with a message, an optional hint and an optional cause.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    hint: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None }
    }

    /// The command line asks for something impossible.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Usage, message)
    }

    /// A value from outside is wrong; `place` names the file, and the row or tensor where known.
    pub fn input(place: impl fmt::Display, found: impl fmt::Display) -> Self {
        Self::new(ErrorKind::Input, format!("{place}: {found}"))
    }

    /// The computation failed.
    pub fn work(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Work, message)
    }

    /// The user asked to stop.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Interrupted, message)
    }

    /// Wraps an I/O error: `fs::read(p).map_err(Error::io("read", p))`.
    pub fn io<'a>(action: &'a str, path: impl AsRef<Path> + 'a) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| {
            let path: PathBuf = path.as_ref().into();
            Self::new(ErrorKind::Io, format!("cannot {action} {}", path.display())).caused_by(source)
        }
    }

    /// Says how to mend it.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Attaches the error underneath.
    pub fn caused_by(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// How to mend it, where that is known.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// The process exit code: 1 the work failed, 2 usage, 130 interrupted.
    pub fn exit_code(&self) -> u8 {
        match self.kind {
            ErrorKind::Usage => 2,
            ErrorKind::Interrupted => 130,
            ErrorKind::Input | ErrorKind::Io | ErrorKind::Work => 1,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(source) = &self.source {
            write!(f, ": {source}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}
