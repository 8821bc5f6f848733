//! Where the entries of a tensor lie: in memory or, for tensors larger than it, in a file.

use std::sync::Arc;

use kiln_core::{Result, StreamedTensor};

use crate::tensor::Element;

/// Entries of a file that are in memory at a time: 64 MB.
pub const AT_ONCE: usize = 1 << 24;

/// Entries in the order of the tensor.
#[derive(Debug, Clone)]
pub enum Entries<E> {
    /// In memory.
    Memory(Vec<E>),
    /// In a file, read anew by every pass.
    File {
        /// All entries.
        tensor: Arc<StreamedTensor>,
        /// How many are in memory at a time, [`AT_ONCE`] for example.
        at_once: usize,
    },
}

impl<E: Element> Entries<E> {
    /// How many there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Memory(values) => values.len(),
            Self::File { tensor, .. } => tensor.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// One pass over all entries: `each` gets the place of the first entry of a stretch, and the stretch, which is a whole
    /// number of `unit` entries. In memory there is only one stretch.
    ///
    /// # Errors
    /// Those of `each`, and when the file cannot be read.
    pub fn pass(&self, unit: usize, mut each: impl FnMut(usize, &[E]) -> Result<()>) -> Result<()> {
        match self {
            Self::Memory(values) => each(0, values),
            Self::File { tensor, at_once } => {
                let stretch = (at_once / unit).max(1) * unit;
                let (mut read, mut values) = (Vec::new(), Vec::new());
                for start in (0..tensor.len()).step_by(stretch) {
                    read.resize(stretch.min(tensor.len() - start), 0.0);
                    tensor.read(start, &mut read)?;
                    values.clear();
                    values.extend(read.iter().map(|&x| E::from(x)));
                    each(start, &values)?;
                }
                Ok(())
            }
        }
    }
}
