//! Recordings cut into windows.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};
use kiln_core::Result;

use crate::dataset::{Dataset, Recording};

/// Windows of equal length over some recordings of a data set.
#[derive(Debug, Clone)]
pub struct WindowSet {
    /// What is cut.
    recordings: Vec<Arc<Recording>>,
    /// Channels of every recording.
    channels: usize,
    /// Samples of a window.
    pub length: usize,
    /// Place in `recordings`, and first sample.
    windows: Vec<(usize, usize)>,
}

impl WindowSet {
    /// Windows for training: one at every `stride`-th sample. What is left at a recording's end is dropped, and so are
    /// recordings shorter than a window.
    pub fn for_training(data: &Dataset, chosen: &[usize], length: usize, stride: usize) -> Self {
        Self::cut(data, chosen, length, stride, false)
    }

    /// Windows for judging: as in training, and one more that ends with the recording where something would be left.
    pub fn for_evaluation(data: &Dataset, chosen: &[usize], length: usize, stride: usize) -> Self {
        Self::cut(data, chosen, length, stride, true)
    }

    fn cut(data: &Dataset, chosen: &[usize], length: usize, stride: usize, to_the_end: bool) -> Self {
        let recordings: Vec<Arc<Recording>> = chosen.iter().map(|&at| data.recordings[at].clone()).collect();
        let mut windows = Vec::new();
        for (place, recording) in recordings.iter().enumerate() {
            let Some(last) = recording.samples.checked_sub(length) else { continue };
            windows.extend((0..=last).step_by(stride).map(|start| (place, start)));
            if to_the_end && !last.is_multiple_of(stride) {
                windows.push((place, last));
            }
        }
        Self { recordings, channels: data.channels.len(), length, windows }
    }

    /// These and those.
    ///
    /// # Panics
    /// When their windows differ in length or channels.
    #[must_use]
    pub fn joined(mut self, other: &Self) -> Self {
        assert_eq!(
            (self.length, self.channels),
            (other.length, other.channels),
            "windows of different sizes"
        );
        let before = self.recordings.len();
        self.recordings.extend(other.recordings.iter().cloned());
        self.windows.extend(other.windows.iter().map(|&(place, start)| (place + before, start)));
        self
    }

    /// At most `count` of the windows, evenly over all.
    #[must_use]
    pub fn thinned(mut self, count: usize) -> Self {
        let all = self.windows.len();
        if all > count {
            self.windows = (0..count).map(|i| self.windows[i * all / count]).collect();
        }
        self
    }

    /// How many windows there are.
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// The recording that a window is of, and the window's number in it.
    pub fn origin(&self, window: usize) -> (&Recording, usize) {
        let (place, _) = self.windows[window];
        let before = self.windows[..window].iter().rev().take_while(|(other, _)| *other == place).count();
        (&self.recordings[place], before)
    }

    /// The class of a window: 1 where its recording is pathological.
    pub fn label(&self, window: usize) -> usize {
        usize::from(self.recordings[self.windows[window].0].label == Some(true))
    }

    /// How many windows are of each class.
    pub fn class_counts(&self) -> [usize; 2] {
        let pathological = (0..self.len()).map(|window| self.label(window)).sum();
        [self.len() - pathological, pathological]
    }

    /// Samples of windows, `[windows, channels, length]`.
    ///
    /// # Errors
    /// When a recording cannot be read.
    pub fn samples(&self, chosen: &[usize]) -> Result<Vec<f32>> {
        let mut values = Vec::with_capacity(chosen.len() * self.channels * self.length);
        let mut read: Option<(usize, Arc<Vec<f32>>)> = None;
        for &window in chosen {
            let (place, start) = self.windows[window];
            let eeg = match read.take() {
                Some((last, eeg)) if last == place => eeg,
                _ => self.recordings[place].eeg()?,
            };
            let samples = self.recordings[place].samples;
            for channel in 0..self.channels {
                values.extend(&eeg[channel * samples + start..][..self.length]);
            }
            read = Some((place, eeg));
        }
        Ok(values)
    }

    /// Windows as a tensor, `[windows, channels, length]`.
    ///
    /// # Errors
    /// When a recording cannot be read.
    pub fn tensor(&self, chosen: &[usize], device: &Device) -> Result<Tensor<3>> {
        Ok(self.to_tensor(self.samples(chosen)?, device))
    }

    /// Samples of windows, as [`samples`](Self::samples) gives them, as a tensor.
    pub fn to_tensor(&self, samples: Vec<f32>, device: &Device) -> Tensor<3> {
        let count = samples.len() / (self.channels * self.length);
        Tensor::from_data(TensorData::new(samples, [count, self.channels, self.length]), device)
    }

    /// Classes of windows, `[windows]`.
    pub fn labels(&self, chosen: &[usize], device: &Device) -> Tensor<1, Int> {
        let labels: Vec<i64> = chosen.iter().map(|&window| self.label(window) as i64).collect();
        Tensor::from_data(TensorData::new(labels, [chosen.len()]), device)
    }

    /// Channels of a window.
    pub fn channels(&self) -> usize {
        self.channels
    }
}
