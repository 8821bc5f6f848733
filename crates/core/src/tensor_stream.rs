//! Tensors larger than memory: one float tensor of a safetensors file, written and read piece by piece.

use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo, View};

use crate::model::write_atomic_by;
use crate::tensor_file::read_header;
use crate::{Error, Result, TensorFile};

/// Bytes of one number.
const F32: usize = 4;

/// A tensor of f32 in a safetensors file, of which any stretch can be read.
#[derive(Debug)]
pub struct StreamedTensor {
    path: PathBuf,
    shape: Vec<usize>,
    /// Where its first number lies in the file.
    start: u64,
    file: Mutex<File>,
}

impl StreamedTensor {
    /// Opens a file and finds the tensor in its header; none of its numbers is read.
    ///
    /// # Errors
    /// When the file is missing or malformed, lacks the tensor, or has it as another type than f32.
    pub fn open(path: &Path, name: &str) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io("read", path))?;
        let size = file.metadata().map_err(Error::io("read", path))?.len();
        let (metadata, header) = read_header(&mut file, size, path)?;
        let info = metadata.info(name).ok_or_else(|| {
            Error::input(path.display(), format!("tensor \"{name}\" is missing"))
                .hint(format!("the file holds {}", metadata.offset_keys().join(", ")))
        })?;
        if info.dtype != Dtype::F32 {
            return Err(Error::input(
                path.display(),
                format!("tensor \"{name}\" has type {:?}, and only F32 is read piece by piece", info.dtype),
            )
            .hint("write it again as f32"));
        }
        let (shape, start) = (info.shape.clone(), header + info.data_offsets.0 as u64);
        Ok(Self { path: path.into(), shape, start, file: Mutex::new(file) })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The extents.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// How many numbers it has.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The numbers from place `from` on, as many as `into` holds, in the order of the file.
    ///
    /// # Errors
    /// When the file cannot be read or has become shorter.
    ///
    /// # Panics
    /// When the stretch leaves the tensor.
    pub fn read(&self, from: usize, into: &mut [f32]) -> Result<()> {
        assert!(from + into.len() <= self.len(), "{} numbers from {from} of {}", into.len(), self.len());
        let mut bytes = vec![0u8; into.len() * F32];
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(self.start + (from * F32) as u64))
            .and_then(|_| file.read_exact(&mut bytes))
            .map_err(Error::io("read", &self.path))?;
        for (number, bytes) in into.iter_mut().zip(bytes.as_chunks::<F32>().0) {
            *number = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

/// Takes the next numbers of a tensor.
pub type Take<'a> = dyn FnMut(&[f32]) -> Result<()> + 'a;

impl TensorFile {
    /// Writes the tensors of this set and one more that is never whole in memory: `give` hands its numbers to the function
    /// that it gets, in order and in pieces of any length. The file appears when it is complete.
    ///
    /// # Errors
    /// Those of `give`, and when the file cannot be written.
    ///
    /// # Panics
    /// When `give` hands over more or fewer numbers than the shape has.
    pub fn write_with_stream(
        &self,
        path: &Path,
        name: &str,
        shape: &[usize],
        give: impl FnOnce(&mut Take<'_>) -> Result<()>,
    ) -> Result<()> {
        let length = shape.iter().product::<usize>() * F32;
        // The streamed tensor comes last, so that the others can be written at once.
        let mut end = 0;
        let mut place = |dtype, shape: Vec<usize>, bytes: usize| {
            let info = TensorInfo { dtype, shape, data_offsets: (end, end + bytes) };
            end += bytes;
            info
        };
        let mut layout: Vec<(String, TensorInfo)> = (self.iter())
            .map(|(name, tensor)| {
                (name.clone(), place(tensor.dtype(), tensor.shape.clone(), tensor.data_len()))
            })
            .collect();
        layout.push((name.into(), place(Dtype::F32, shape.to_vec(), length)));
        let unfit = || Error::work(format!("cannot lay out {}", path.display()));
        let texts = (!self.metadata.is_empty())
            .then(|| self.metadata.iter().map(|(key, text)| (key.clone(), text.clone())).collect());
        let metadata = Metadata::new(texts, layout).map_err(|e| unfit().caused_by(e))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| unfit().caused_by(e))?;
        header.resize(header.len().next_multiple_of(8), b' ');

        write_atomic_by(path, |place| {
            let mut file = BufWriter::new(File::create(place).map_err(Error::io("write", path))?);
            let mut put = |bytes: &[u8]| file.write_all(bytes).map_err(Error::io("write", path));
            put(&(header.len() as u64).to_le_bytes())?;
            put(&header)?;
            for (_, tensor) in self.iter() {
                put(&tensor.data())?;
            }
            let mut written = 0;
            give(&mut |numbers| {
                written += numbers.len() * F32;
                assert!(written <= length, "more numbers than {shape:?} has");
                put(&numbers.iter().flat_map(|number| number.to_le_bytes()).collect::<Vec<u8>>())
            })?;
            assert_eq!(written, length, "bytes of {shape:?}");
            file.flush().map_err(Error::io("write", path))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostTensor;

    fn written(folder: &Path) -> PathBuf {
        let path = folder.join("a.safetensors");
        let mut rest = TensorFile::new();
        rest.insert("mask", HostTensor::int([3], vec![1, 0, 1]));
        rest.metadata.insert("names".into(), "a,b".into());
        let give = |take: &mut Take<'_>| {
            take(&[0.0, 1.0])?;
            take(&[2.0, 3.0, 4.0])?;
            take(&[5.0])
        };
        rest.write_with_stream(&path, "tensor", &[2, 3], give).unwrap();
        path
    }

    #[test]
    fn what_is_streamed_is_a_file_like_any_other() {
        let folder = tempfile::tempdir().unwrap();
        let mut file = TensorFile::read(&written(folder.path())).unwrap();
        let numbers = (0..6).map(|n| n as f32).collect();
        assert_eq!(file.take("tensor").unwrap(), HostTensor::float([2, 3], numbers));
        assert_eq!(file.take("mask").unwrap(), HostTensor::int([3], vec![1, 0, 1]));
        assert_eq!(file.metadata["names"], "a,b");
    }

    #[test]
    fn any_stretch_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let tensor = StreamedTensor::open(&written(folder.path()), "tensor").unwrap();
        assert_eq!(tensor.shape(), [2, 3]);
        for (from, count) in [(0, 6), (2, 3), (5, 1), (6, 0)] {
            let mut numbers = vec![9.0; count];
            tensor.read(from, &mut numbers).unwrap();
            assert_eq!(numbers, (from..from + count).map(|n| n as f32).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_missing_tensor_and_one_of_integers_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let message = StreamedTensor::open(&path, "time").unwrap_err().to_string();
        assert!(message.contains("\"time\" is missing"), "{message}");
        let message = StreamedTensor::open(&path, "mask").unwrap_err().to_string();
        assert!(message.contains("I64"), "{message}");
    }

    #[test]
    fn a_file_that_became_shorter_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let tensor = StreamedTensor::open(&path, "tensor").unwrap();
        let size = std::fs::metadata(&path).unwrap().len();
        File::options().write(true).open(&path).unwrap().set_len(size - 4).unwrap();
        assert!(tensor.read(0, &mut [0.0; 6]).is_err());
    }

    #[test]
    fn what_fails_half_way_leaves_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let give = |take: &mut Take<'_>| {
            take(&[0.0])?;
            Err(Error::work("no more"))
        };
        assert!(TensorFile::new().write_with_stream(&path, "tensor", &[2], give).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
