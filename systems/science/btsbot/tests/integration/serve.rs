//! Scores over HTTP.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::atomic::Ordering;
use std::thread;

use kiln_btsbot::checkpoint::{Config, new_model};
use kiln_btsbot::features::FeatureOptions;
use kiln_btsbot::server::{Server, serve};
use kiln_btsbot::simulate::{Season, sources};
use kiln_btsbot::{AlertReader, MmCnnConfig};
use kiln_core::Context;
use serde_json::Value;

#[test]
fn packets_are_answered_with_scores_and_nonsense_with_reasons() {
    let cx = Context::for_tests("unused");
    let network = MmCnnConfig::new().with_channels([2, 2]).with_side(15);
    let server = Server {
        model: new_model(&network, &cx),
        config: Config::new(network, FeatureOptions::default()),
        reader: AlertReader::new(),
        features: FeatureOptions::default(),
        cx: cx.clone(),
    };
    let listener = kiln_http::listen("127.0.0.1", 0).unwrap();
    let address = format!("http://{}/score", listener.local_addr().unwrap());
    let served = cx.clone();
    let thread = thread::spawn(move || serve(server, listener, &served));
    let config = ureq::Agent::config_builder().http_status_as_error(false).build();
    let agent = ureq::Agent::from(config);
    let post = |bytes: &[u8]| -> (u16, Value) {
        let mut response = agent.post(&address).send(bytes).unwrap();
        (response.status().as_u16(), response.body_mut().read_json().unwrap())
    };
    let alert = sources(1, &Season::default(), "test", &cx)[0].with_stamps(0, &cx);
    let packet = alert.to_avro();
    let (status, rows) = post(&packet);
    assert_eq!(
        (status, &rows[0]["status"], &rows[0]["candid"]),
        (200, &"scored".into(), &alert.candid.into())
    );
    assert!((0.0..=1.0).contains(&rows[0]["score"].as_f64().unwrap()));
    let (status, rows) = post(&packet[..packet.len() / 2]);
    assert_eq!((status, &rows[0]["status"]), (400, &"rejected".into()));
    assert!(rows[0]["reason"].as_str().unwrap().contains("ends too early"), "{rows}");
    cx.interrupt_flag().store(true, Ordering::Relaxed);
    thread.join().unwrap().unwrap();
}
