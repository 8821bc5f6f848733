//! Packets that are damaged, and histories that know no future.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use kiln_btsbot::features::{FeatureOptions, HistorySource};
use kiln_btsbot::fields::Names;
use kiln_btsbot::packets::triplet;
use kiln_btsbot::simulate::{Season, sources};
use kiln_btsbot::{Alert, AlertReader, FeatureHistory};
use kiln_core::{Context, random_stream};
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
