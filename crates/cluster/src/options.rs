//! Quantities on the command line.

use std::time::Duration;

/// `500ms`, `30s`, `2m`, `0.1ms`, `20us`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let units = [("ms", 1e-3), ("us", 1e-6), ("µs", 1e-6), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    quantity(text, &units)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .ok_or_else(|| format!("`{text}` is not a time such as 30s, 500ms or 2m"))
}

/// Bits or bytes per second as bytes per second: `300Mbit`, `1Gbit`, `125MB`.
pub(crate) fn parse_bandwidth(text: &str) -> Result<f64, String> {
    let units = [
        ("Gbit", 1e9 / 8.0),
        ("Mbit", 1e6 / 8.0),
        ("kbit", 1e3 / 8.0),
        ("GB", 1e9),
        ("MB", 1e6),
        ("kB", 1e3),
    ];
    quantity(text, &units)
        .filter(|&bandwidth| bandwidth > 0.0)
        .ok_or_else(|| format!("`{text}` is not a bandwidth such as 300Mbit, 1Gbit or 100MB"))
}

/// Bytes: `8`, `4K`, `1M`, `1G`, in powers of 1024.
pub(crate) fn parse_bytes(text: &str) -> Result<usize, String> {
    let units = [("K", 1024.0), ("M", 1048576.0), ("G", 1073741824.0), ("", 1.0)];
    quantity(text, &units)
        .filter(|bytes| bytes.fract() == 0.0 && *bytes < (1u64 << 40) as f64)
        .map(|bytes| bytes as usize)
        .ok_or_else(|| format!("`{text}` is not a number of bytes such as 8, 4K or 64M"))
}

/// A finite number that is not negative, times its unit.
fn quantity(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    units.iter().find_map(|(unit, factor)| {
        let number: f64 = text.strip_suffix(unit)?.trim().parse().ok()?;
        (number.is_finite() && number >= 0.0).then_some(number * factor)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_need_a_unit_and_a_sensible_number() {
        assert_eq!(parse_duration("0.1ms"), Ok(Duration::from_micros(100)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        assert_eq!(parse_bandwidth("300Mbit"), Ok(37.5e6));
        assert_eq!(parse_bytes("4K"), Ok(4096));
        assert_eq!(parse_bytes("8"), Ok(8));
        for wrong in ["", "30", "s", "-1s", "nans", "infs", "1e300s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong}");
        }
        for wrong in ["0Mbit", "300", "-1GB"] {
            assert!(parse_bandwidth(wrong).is_err(), "{wrong}");
        }
        for wrong in ["1.5", "-8", "9999999G", "K"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }
}
