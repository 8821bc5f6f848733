//! Traces as NumPy arrays: `<animal>/traces` [T, N], `<animal>/neurons` [N], `<animal>/time_s` [T]; further series of T
//! numbers are behaviours.

use std::collections::BTreeMap;
use std::path::Path;

use kiln_core::{Error, Result};
use kiln_data::{read_npz_as, write_npz_as};
use npyz::{NpyFile, Order, WriterBuilder};

use super::{Recording, animal_name};

/// An array of such a file.
enum Array {
    Numbers(Vec<usize>, Vec<f64>),
    Words(Vec<String>),
}

pub fn read(path: &Path) -> Result<Vec<Recording>> {
    let mut animals: BTreeMap<String, BTreeMap<String, Array>> = BTreeMap::new();
    for (name, array) in read_npz_as(path, decode)? {
        let (animal, key) = match name.rsplit_once('/') {
            Some((animal, key)) => (animal.to_string(), key.to_string()),
            None => (animal_name(path), name), // a file of one animal
        };
        animals.entry(animal).or_default().insert(key, array);
    }
    animals.into_iter().map(|(animal, arrays)| recording(path, animal, arrays)).collect()
}

fn recording(path: &Path, animal: String, mut arrays: BTreeMap<String, Array>) -> Result<Recording> {
    let place = format!("{}: animal {animal}", path.display());
    let wrong = |found: String| {
        Error::input(&place, found)
            .hint("an animal has traces [T, N] of numbers, neurons [N] of words and time_s [T]")
    };
    let mut take =
        |key: &str| arrays.remove(key).ok_or_else(|| wrong(format!("there is no array \"{animal}/{key}\"")));
    let (Array::Numbers(shape, values), Array::Words(neurons), Array::Numbers(_, time_s)) =
        (take("traces")?, take("neurons")?, take("time_s")?)
    else {
        return Err(wrong("traces, neurons or time_s has another type".into()));
    };
    let [frames, count] = shape[..] else {
        return Err(wrong(format!("traces have the shape {shape:?}")));
    };
    if count != neurons.len() || frames != time_s.len() {
        let found =
            format!("traces are [{frames}, {count}] for {} times and {} names", time_s.len(), neurons.len());
        return Err(wrong(found));
    }
    let traces = (0..count).map(|i| (0..frames).map(|t| values[t * count + i]).collect()).collect();
    let behaviours = arrays.into_iter().filter_map(|(key, array)| match array {
        Array::Numbers(_, values) if values.len() == frames && values.iter().all(|v| v.is_finite()) => {
            Some((key, values))
        }
        _ => None,
    });
    let behaviours = behaviours.collect();
    Ok(Recording { animal, source: path.display().to_string(), neurons, time_s, traces, behaviours })
}

fn decode(bytes: &[u8]) -> Result<Array, String> {
    let file = NpyFile::new(bytes).map_err(|e| format!("has a malformed header: {e}"))?;
    let dtype = file.header().dtype();
    let shape: Option<Vec<usize>> = file.header().shape().iter().map(|&n| usize::try_from(n).ok()).collect();
    let elements = shape.as_ref().and_then(|shape| shape.iter().try_fold(1usize, |n, &m| n.checked_mul(m)));
    let (Some(shape), Some(elements)) = (shape, elements) else {
        return Err(format!("claims the shape {:?}", file.header().shape()));
    };
    if elements.checked_mul(dtype.num_bytes().unwrap_or(1).max(1)).is_none_or(|size| size > bytes.len()) {
        return Err(format!("claims the shape {shape:?}, more than its {} bytes hold", bytes.len()));
    }
    let by_column = file.header().order() == Order::Fortran;
    if by_column && shape.len() > 2 {
        return Err(format!("has the shape {shape:?}, column by column; at most two axes are read so"));
    }
    let early = |e: std::io::Error| format!("ends too early: {e}");
    let file = match file.try_data::<String>() {
        Ok(words) => return Ok(Array::Words(words.collect::<Result<_, _>>().map_err(early)?)),
        Err(file) => file,
    };
    /// Tries one type of number after another.
    macro_rules! numbers {
        ($file:expr, $($number:ty),+) => {{
            let file = $file;
            $(let file = match file.try_data::<$number>() {
                Ok(data) => {
                    let numbers: Vec<f64> = data.map(|x| x.map(|x| x as f64)).collect::<Result<_, _>>().map_err(early)?;
                    let numbers = if by_column { from_columns(&shape, &numbers) } else { numbers };
                    return Ok(Array::Numbers(shape, numbers));
                }
                Err(file) => file,
            };)+
            file
        }};
    }
    let file = numbers!(file, f64, f32, i64, i32, i16, i8, u8, u16, u32);
    match file.try_data::<bool>() {
        Ok(data) => {
            let numbers = data.map(|x| x.map(|x| f64::from(u8::from(x)))).collect::<Result<_, _>>();
            Ok(Array::Numbers(shape, numbers.map_err(early)?))
        }
        Err(_) => Err(format!("has the type {}; numbers and words are read", dtype.descr())),
    }
}

/// Row by row from column by column, for at most two axes.
fn from_columns(shape: &[usize], numbers: &[f64]) -> Vec<f64> {
    let &[rows, columns] = shape else { return numbers.to_vec() };
    (0..rows).flat_map(|row| (0..columns).map(move |column| numbers[column * rows + row])).collect()
}

/// Writes recordings as such a file.
///
/// # Errors
/// When the file cannot be written.
pub fn write_npz(path: &Path, recordings: &[Recording]) -> Result<()> {
    let mut arrays: Vec<(String, Array)> = Vec::new();
    for recording in recordings {
        let (frames, count) = (recording.time_s.len(), recording.neurons.len());
        let values = (0..frames).flat_map(|t| recording.traces.iter().map(move |trace| trace[t])).collect();
        let name = |key: &str| format!("{}/{key}", recording.animal);
        arrays.push((name("traces"), Array::Numbers(vec![frames, count], values)));
        arrays.push((name("neurons"), Array::Words(recording.neurons.clone())));
        arrays.push((name("time_s"), Array::Numbers(vec![frames], recording.time_s.clone())));
        for (key, values) in &recording.behaviours {
            arrays.push((name(key), Array::Numbers(vec![frames], values.clone())));
        }
    }
    write_npz_as(path, arrays.iter().map(|(name, array)| (name.as_str(), array)), encode)
}

fn encode(array: &Array) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match array {
        Array::Numbers(shape, values) => {
            let shape: Vec<u64> = shape.iter().map(|&n| n as u64).collect();
            let options = npyz::WriteOptions::new().default_dtype().shape(&shape);
            let mut writer = options.writer(&mut bytes).begin_nd()?;
            writer.extend(values.iter().copied())?;
            writer.finish()?;
        }
        Array::Words(words) => {
            let longest = words.iter().map(|word| word.chars().count()).max().unwrap_or(0).max(1);
            let dtype = npyz::DType::Plain(format!("<U{longest}").parse().map_err(std::io::Error::other)?);
            let shape = [words.len() as u64];
            let mut writer =
                npyz::WriteOptions::<str>::new().dtype(dtype).shape(&shape).writer(&mut bytes).begin_nd()?;
            words.iter().try_for_each(|word| writer.push(word.as_str()))?;
            writer.finish()?;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_turned_into_rows() {
        assert_eq!(from_columns(&[2, 3], &[1.0, 4.0, 2.0, 5.0, 3.0, 6.0]), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        assert_eq!(from_columns(&[3], &[1.0, 2.0, 3.0]), [1.0, 2.0, 3.0]);
    }
}
