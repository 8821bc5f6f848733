//! From recordings with clocks of their own to traces on a common one.

use std::collections::BTreeSet;

use kiln_core::{Error, Result};

use super::{Animal, Events, Recording, Span, Traces};

/// Gaps up to so many seconds are filled with a straight line.
const LONGEST_GAP: f64 = 1.0;

/// How recordings are brought together.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct AlignConfig {
    /// Samples a second; by default those of the slowest recording.
    pub rate: Option<f64>,
}

/// Recordings on a common clock. An animal's time starts at its first stimulus, where the events name one, or
/// with its first sample; all are cut to the time that every animal has.
///
/// # Errors
/// When the rate is not positive, an animal has no neuron left, or there is no common time.
pub fn align(recordings: &[Recording], events: &Events, config: AlignConfig) -> Result<Traces> {
    let mut warnings = Vec::new();
    let rate = match config.rate {
        Some(rate) if !(rate.is_finite() && rate > 0.0) => {
            return Err(Error::usage(format!("--rate {rate} is no rate")).hint("give samples a second"));
        }
        Some(rate) => rate,
        None => recordings.iter().map(|r| median_step(&r.time_s).recip()).fold(f64::INFINITY, f64::min),
    };
    let onset = |recording: &Recording| events.onset(&recording.animal);
    let by_onset = recordings.iter().all(|recording| onset(recording).is_some());
    if !by_onset && recordings.iter().any(|recording| onset(recording).is_some()) {
        let without = recordings.iter().find(|recording| onset(recording).is_none());
        let name = without.map_or("", |recording| recording.animal.as_str());
        return Err(Error::input("events", format!("name stimuli of some animals, but none of {name}"))
            .hint("give every animal an onset, or leave the column \"animal\" out"));
    }
    let origin = |recording: &Recording| match by_onset {
        true => onset(recording).unwrap_or(recording.time_s[0]),
        false => recording.time_s[0],
    };
    let edge = |recording: &Recording, last: bool| {
        let time = if last { recording.time_s.last() } else { recording.time_s.first() };
        time.map_or(0.0, |time| time - origin(recording))
    };
    let start = recordings.iter().map(|r| edge(r, false)).fold(f64::NEG_INFINITY, f64::max);
    let end = recordings.iter().map(|r| edge(r, true)).fold(f64::INFINITY, f64::min);
    let frames = ((end - start) * rate + 1e-6).floor() as usize + 1;
    if end <= start || frames < 2 {
        return Err(Error::work("the recordings have no time in common after alignment")
            .hint("check the onsets and that all files count in seconds"));
    }
    // One jitter of the clock is no difference in length.
    for recording in recordings {
        let length = edge(recording, true) - edge(recording, false);
        if length > (end - start) * 1.01 + 2.0 / rate {
            warnings.push(format!(
                "{}: cut from {length:.1} to {:.1} s, which all animals have",
                recording.place(),
                end - start
            ));
        }
    }

    let mut cleaned = Vec::new();
    for recording in recordings {
        let clock: Vec<f64> = (0..frames).map(|t| origin(recording) + start + t as f64 / rate).collect();
        cleaned.push(clean(recording, &clock, events, &mut warnings)?);
    }
    let names: BTreeSet<&String> =
        cleaned.iter().flat_map(|c| c.traces.iter().map(|(name, _)| name)).collect();
    let neurons: Vec<String> = names.into_iter().cloned().collect();
    let animals = recordings.iter().zip(cleaned).map(|(recording, cleaned)| {
        let mut traces = cleaned.traces;
        traces.sort_by(|a, b| a.0.cmp(&b.0));
        let places = traces.iter().map(|(name, _)| neurons.binary_search(name).unwrap_or_default()).collect();
        Animal {
            name: recording.animal.clone(),
            neurons: places,
            traces: traces.into_iter().map(|(_, trace)| trace).collect(),
            behaviours: cleaned.behaviours,
        }
    });
    let animals = animals.collect();
    let mut spans: Vec<Span> = Vec::new();
    for event in &events.spans {
        for recording in
            recordings.iter().filter(|r| event.animal.as_ref().is_none_or(|name| *name == r.animal))
        {
            let zero = origin(recording) + start;
            let span = Span { label: event.label.clone(), start: event.start - zero, end: event.end - zero };
            let inside = span.end >= 0.0 && span.start <= frames as f64 / rate;
            let same =
                |other: &Span| other.label == span.label && (other.start - span.start).abs() < 0.5 / rate;
            if inside && !spans.iter().any(same) {
                spans.push(span);
            }
        }
    }
    spans.sort_by(|a, b| a.start.total_cmp(&b.start));
    Ok(Traces { rate, frames, neurons, animals, spans, warnings })
}

/// What is left of a recording on the common clock.
struct Cleaned {
    traces: Vec<(String, Vec<f64>)>,
    behaviours: Vec<(String, Vec<f64>)>,
}

fn clean(
    recording: &Recording,
    clock: &[f64],
    events: &Events,
    warnings: &mut Vec<String>,
) -> Result<Cleaned> {
    let place = recording.place();
    let mut traces = Vec::new();
    for (name, trace) in recording.neurons.iter().zip(&recording.traces) {
        let Some(filled) = fill(&recording.time_s, trace) else {
            warnings.push(format!(
                "{place}: neuron {name} left out: samples are missing for more than {LONGEST_GAP} s"
            ));
            continue;
        };
        let sampled = sample(&recording.time_s, &filled, clock);
        let first = sampled[0];
        if sampled.iter().all(|&x| (x - first).abs() <= 1e-12 * first.abs()) {
            warnings.push(format!("{place}: neuron {name} left out: it is constant at {first}"));
            continue;
        }
        traces.push((name.clone(), sampled));
    }
    if traces.is_empty() {
        return Err(Error::input(place, "no neuron is left").hint("every trace is constant or has long gaps"));
    }
    let within = |times: &[f64]| match (times.first(), times.last()) {
        (Some(first), Some(last)) => *first <= clock[0] + 1.0 && *last >= clock[clock.len() - 1] - 1.0,
        _ => false,
    };
    let own = recording.behaviours.iter().map(|(name, values)| (name, &recording.time_s, values));
    let given = events.series.iter().map(|series| (&series.name, &series.time_s, &series.values));
    let behaviours = own.chain(given).filter(|(_, times, _)| within(times));
    let behaviours = behaviours.map(|(name, times, values)| (name.clone(), sample(times, values, clock)));
    Ok(Cleaned { traces, behaviours: behaviours.collect() })
}

fn median_step(time_s: &[f64]) -> f64 {
    let mut steps: Vec<f64> = time_s.windows(2).map(|pair| pair[1] - pair[0]).collect();
    steps.sort_by(f64::total_cmp);
    steps[steps.len() / 2]
}

/// The trace with short gaps filled; `None` where a gap is too long or nothing is there.
fn fill(time_s: &[f64], trace: &[f64]) -> Option<Vec<f64>> {
    let there: Vec<usize> = (0..trace.len()).filter(|&t| !trace[t].is_nan()).collect();
    let (&first, &last) = (there.first()?, there.last()?);
    if there.len() == trace.len() {
        return Some(trace.to_vec());
    }
    let ends = [time_s[first] - time_s[0], time_s[trace.len() - 1] - time_s[last]];
    let gaps =
        there.windows(2).filter(|pair| pair[1] > pair[0] + 1).map(|pair| time_s[pair[1]] - time_s[pair[0]]);
    if gaps.chain(ends).any(|gap| gap > LONGEST_GAP) {
        return None;
    }
    let times: Vec<f64> = there.iter().map(|&t| time_s[t]).collect();
    let values: Vec<f64> = there.iter().map(|&t| trace[t]).collect();
    Some(sample(&times, &values, time_s))
}

/// The series at other times, along straight lines; constant beyond its ends.
fn sample(times: &[f64], values: &[f64], clock: &[f64]) -> Vec<f64> {
    let mut after = 0;
    let at = |&t: &f64| {
        while after < times.len() && times[after] < t {
            after += 1;
        }
        match after {
            0 => values[0],
            _ if after == times.len() => values[after - 1],
            _ => {
                let part = (t - times[after - 1]) / (times[after] - times[after - 1]);
                values[after - 1] + part * (values[after] - values[after - 1])
            }
        }
    };
    clock.iter().map(at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_sampled_along_straight_lines() {
        assert_eq!(
            sample(&[0.0, 2.0, 3.0], &[0.0, 4.0, 1.0], &[-1.0, 0.0, 1.0, 2.5, 9.0]),
            [0.0, 0.0, 2.0, 2.5, 1.0]
        );
    }

    #[test]
    fn short_gaps_are_filled_and_long_ones_are_not() {
        let time: Vec<f64> = (0..6).map(|t| f64::from(t) * 0.4).collect();
        assert_eq!(
            fill(&time, &[0.0, f64::NAN, 2.0, 3.0, 4.0, f64::NAN]),
            Some(vec![0.0, 1.0, 2.0, 3.0, 4.0, 4.0])
        );
        assert_eq!(fill(&time, &[0.0, f64::NAN, f64::NAN, 3.0, 4.0, 5.0]), None);
        assert_eq!(fill(&time, &[f64::NAN; 6]), None);
    }
}
