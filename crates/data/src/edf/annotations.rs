//! Annotations of EDF+ and BDF+: lists of times and texts in the bytes of a signal of their own.

use serde::Serialize;

/// Ends a text, or the times before it.
const TEXT_END: u8 = 0x14;
/// Stands between onset and duration.
const DURATION: u8 = 0x15;

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Annotation {
    /// Seconds from the beginning of the recording.
    pub onset: f64,
    /// Seconds that it lasted, where that is known.
    pub duration: Option<f64>,
    /// What it was.
    pub text: String,
}

/// What the annotation signal of one record holds.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// When the record begins: the time of the first list, whose first text is empty.
    pub record_start: Option<f64>,
    pub annotations: Vec<Annotation>,
    /// Lists that could not be read.
    pub malformed: usize,
}

/// Reads lists `+onset[0x15 duration]0x14 text 0x14 … 0x14`, each ended by a zero.
pub(super) fn parse(bytes: &[u8]) -> Found {
    let mut found = Found::default();
    let lists = bytes.split(|&byte| byte == 0).filter(|list| !list.is_empty());
    for (number, list) in lists.enumerate() {
        let Some((onset, duration, texts)) = parse_list(list) else {
            found.malformed += 1;
            continue;
        };
        for (place, text) in texts.iter().enumerate() {
            match text.is_empty() {
                true if number == 0 && place == 0 => found.record_start = Some(onset),
                true => {}
                false => found.annotations.push(Annotation { onset, duration, text: text.clone() }),
            }
        }
    }
    found
}

fn parse_list(list: &[u8]) -> Option<(f64, Option<f64>, Vec<String>)> {
    let list = list.strip_suffix(&[TEXT_END])?;
    let mut parts = list.split(|&byte| byte == TEXT_END);
    let mut times = parts.next()?.split(|&byte| byte == DURATION);
    let onset = times.next()?;
    let seconds =
        |bytes: &[u8]| std::str::from_utf8(bytes).ok()?.parse::<f64>().ok().filter(|x| x.is_finite());
    if !matches!(onset.first()?, b'+' | b'-') {
        return None;
    }
    let (onset, duration) = (seconds(onset)?, times.next().map(seconds));
    if duration == Some(None) || times.next().is_some() {
        return None;
    }
    Some((onset, duration.flatten(), parts.map(|text| String::from_utf8_lossy(text).into()).collect()))
}

/// The bytes of one list.
pub(super) fn encode(onset: f64, duration: Option<f64>, text: &str) -> Vec<u8> {
    let sign = if onset < 0.0 { "" } else { "+" };
    let mut bytes = format!("{sign}{onset}").into_bytes();
    if let Some(duration) = duration {
        bytes.push(DURATION);
        bytes.extend(duration.to_string().bytes());
    }
    bytes.push(TEXT_END);
    bytes.extend(text.bytes().filter(|byte| !matches!(byte, 0 | 0x14 | 0x15)));
    bytes.extend([TEXT_END, 0]);
    bytes
}
