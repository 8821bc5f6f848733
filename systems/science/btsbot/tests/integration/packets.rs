//! Packets that are damaged, and histories that know no future.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_btsbot::features::{FeatureOptions, HistorySource};
use kiln_btsbot::fields::Names;
use kiln_btsbot::packets::triplet;
use kiln_btsbot::simulate::{Season, sources};
use kiln_btsbot::{Alert, AlertReader, FeatureHistory};
use kiln_core::{Context, random_stream};
use kiln_data::avro::{AvroSchema, AvroValue, write_avro};
use kiln_data::fits::gzip;
use rand::RngExt;
use rand::seq::SliceRandom;

fn alerts() -> Vec<Alert> {
    let cx = Context::for_tests("unused");
    let sources = sources(12, &Season::default(), "test", &cx);
    sources.iter().flat_map(|source| source.alerts.clone()).collect()
}

#[test]
fn what_is_written_as_a_packet_is_read_back() {
    let cx = Context::for_tests("unused");
    let reader = AlertReader::new();
    for source in sources(12, &Season::default(), "test", &cx) {
        let alert = source.with_stamps(0, &cx);
        let back = reader.read(&alert.to_avro()).remove(0).unwrap();
        assert_eq!(
            (&back.object_id, back.candid, back.jd, back.magpsf),
            (&alert.object_id, alert.candid, alert.jd, alert.magpsf)
        );
        assert_eq!(back.prior.len(), alert.prior.len());
        for (name, value) in &alert.candidate {
            assert_eq!(back.number(name).map(|x| x as f32), value.as_number().map(|x| x as f32), "{name}");
        }
        assert_eq!(triplet(&back).unwrap(), triplet(&alert).unwrap());
    }
}

#[test]
fn another_brokers_names_are_translated() {
    let cx = Context::for_tests("unused");
    let source = sources(1, &Season::default(), "test", &cx).remove(0);
    let alert = source.with_stamps(source.alerts.len() - 1, &cx);
    // Names of the same length, so that the file stays whole.
    let mut bytes = alert.to_avro();
    for (from, to) in [("candidate", "diaSource"), ("\"magpsf", "\"psfMag"), ("objectId", "diaObjId")] {
        assert_eq!(from.len(), to.len());
        while let Some(at) = bytes.windows(from.len()).position(|window| window == from.as_bytes()) {
            bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        }
    }
    let fault = AlertReader::new().read(&bytes).remove(0).unwrap_err();
    assert!(fault.reason.contains("has no objectId"), "{fault:?}");
    let names = r#"{"object_id": "diaObjId", "candidate": "diaSource", "prior": "prv_diaSources", "fields": {"psfMag": "magpsf"}}"#;
    let names: Names = serde_json::from_str(names).unwrap();
    let back = AlertReader::with_names(names).read(&bytes).remove(0).unwrap();
    assert_eq!((back.magpsf, &back.object_id), (alert.magpsf, &alert.object_id));
    let magnitudes = |alert: &Alert| alert.prior.iter().map(|d| d.magpsf as f32).collect::<Vec<_>>();
    assert_eq!(magnitudes(&back), magnitudes(&alert));
}

/// Packets of a survey that gives fluxes and letters, as the Rubin observatory's do.
const RUBIN: &str = r#"{"type": "record", "name": "alert", "namespace": "lsst.v9_0", "fields": [
  {"name": "diaSourceId", "type": "long"},
  {"name": "diaSource", "type": {"type": "record", "name": "diaSource", "fields": [
    {"name": "diaSourceId", "type": "long"}, {"name": "diaObjectId", "type": ["null", "long"]},
    {"name": "midpointMjdTai", "type": "double"}, {"name": "band", "type": ["null", "string"]},
    {"name": "psfFlux", "type": ["null", "float"]}, {"name": "psfFluxErr", "type": ["null", "float"]},
    {"name": "ra", "type": "double"}, {"name": "dec", "type": "double"}]}},
  {"name": "prvDiaSources", "type": ["null", {"type": "array", "items": "lsst.v9_0.diaSource"}]}]}"#;

#[test]
fn fluxes_dates_and_filters_of_another_survey_are_converted() {
    let schema = AvroSchema::parse(RUBIN).unwrap();
    let source = |mjd: f64, band: &'static str, flux: f64| {
        AvroValue::Record(vec![
            ("diaSourceId", AvroValue::Int(170)),
            ("diaObjectId", AvroValue::Int(42)),
            ("midpointMjdTai", AvroValue::Number(mjd)),
            ("band", AvroValue::Text(band)),
            ("psfFlux", AvroValue::Number(flux)),
            ("psfFluxErr", AvroValue::Number(200.0)),
            ("ra", AvroValue::Number(10.0)),
            ("dec", AvroValue::Number(-5.0)),
        ])
    };
    let packet = |flux: f64, prior| {
        let packet = AvroValue::Record(vec![
            ("diaSourceId", AvroValue::Int(171)),
            ("diaSource", source(61_000.25, "r", flux)),
            ("prvDiaSources", prior),
        ]);
        write_avro(RUBIN, &schema, &[packet])
    };
    let names = r#"{
      "object_id": "diaSource.diaObjectId", "candid": "diaSourceId", "candidate": "diaSource", "prior": "prvDiaSources",
      "fields": {"midpointMjdTai": "jd", "band": "fid", "psfFlux": "magpsf", "psfFluxErr": "sigmapsf"},
      "units": {"midpointMjdTai": "MJD", "band": "band", "psfFlux": "nJy", "psfFluxErr": {"error_of": "psfFlux"}},
      "absent": {"sgscore1": -999, "ra": 3.0}}"#;
    let reader = AlertReader::with_names(serde_json::from_str::<Names>(names).unwrap());
    // 36,307.8 nJy are magnitude 20 (Oke and Gunn 1983), ten times as much 17.5.
    let prior = AvroValue::Array(vec![
        source(60_998.0, "g", 36_307.805),
        source(60_999.0, "i", -500.0),
        source(60_999.5, "q", 500.0),
    ]);
    let alert = reader.read(&packet(363_078.05, prior).unwrap()).remove(0).unwrap();
    assert_eq!((alert.object_id.as_str(), alert.candid, alert.jd), ("42", 171, 2_461_000.75));
    assert!((alert.magpsf - 17.5).abs() < 1e-6 && alert.is_positive(), "{}", alert.magpsf);
    // Δm = 2.5 / ln 10 · Δf / f
    assert!((alert.number("sigmapsf").unwrap() - 1.085_736_2 * 200.0 / 363_078.05).abs() < 1e-9);
    assert_eq!(
        (alert.number("fid"), alert.number("sgscore1"), alert.number("ra")),
        (Some(2.0), Some(-999.0), Some(10.0))
    );
    // Earlier: a detection, one of a source that became fainter, and one through an unknown filter.
    assert_eq!(alert.prior.len(), 1);
    let first = alert.prior[0];
    assert!(first.jd == 2_460_998.5 && first.fid == 1 && (first.magpsf - 20.0).abs() < 1e-6, "{first:?}");

    let fainter = reader.read(&packet(-363_078.05, AvroValue::Null).unwrap()).remove(0).unwrap();
    assert!(!fainter.is_positive() && (fainter.magpsf - 17.5).abs() < 1e-6);
    let fault = reader.read(&packet(0.0, AvroValue::Null).unwrap()).remove(0).unwrap_err();
    assert!(fault.reason.contains("has no diaSource.magpsf"), "{fault:?}");
    assert!(serde_json::from_str::<Names>(r#"{"units": {"psfFlux": "furlong"}}"#).is_err());
}

#[test]
fn no_damage_to_a_packet_makes_it_crash() {
    let cx = Context::for_tests("unused");
    let alert = sources(1, &Season::default(), "test", &cx)[0].with_stamps(0, &cx);
    let whole = alert.to_avro();
    let reader = AlertReader::new();
    let look = |bytes: &[u8]| {
        for alert in reader.read(bytes).into_iter().flatten() {
            let _ = triplet(&alert);
        }
    };
    let mut rng = random_stream(0, "damage", 0);
    for cut in (0..whole.len()).step_by(97) {
        look(&whole[..cut]);
        assert!(reader.read(&whole[..cut]).iter().any(Result::is_err), "cut at {cut}");
    }
    for _ in 0..1500 {
        let mut bytes = whole.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] ^= rng.random_range(1..=255u8);
        }
        look(&bytes);
    }
    // A stamp of a few bytes that unpacks to very many.
    let bomb = gzip(&vec![b' '; 50 << 20]);
    let mut alert = alert;
    alert.stamps[0] = kiln_btsbot::packet::Stamp::Packed(bomb);
    let reason = triplet(&alert).unwrap_err();
    assert!(reason.contains("science stamp unpacks to more than"), "{reason}");
}

#[test]
fn features_know_no_future_and_no_order_of_files() {
    for history in [HistorySource::Alerts, HistorySource::Packet, HistorySource::Both] {
        let options = FeatureOptions { history, ..FeatureOptions::default() };
        let of = |alerts: &[Alert]| {
            let mut sorted = alerts.to_vec();
            sorted.sort_by(|a, b| a.jd.total_cmp(&b.jd).then(a.candid.cmp(&b.candid)));
            let mut known = FeatureHistory::new(options);
            sorted.iter().map(|alert| (alert.candid, known.push(alert).unwrap())).collect::<Vec<_>>()
        };
        let mut all = alerts();
        let features = of(&all);
        all.sort_by(|a, b| a.jd.total_cmp(&b.jd));
        for count in [1, 5, all.len() / 2] {
            let early: Vec<_> = of(&all[..count]);
            assert!(early.iter().all(|row| features.contains(row)), "{history:?}, first {count}");
        }
        all.shuffle(&mut random_stream(0, "order", 0));
        assert_eq!(of(&all), features);
    }
}
