//! A watch on a subject of NATS: every alert once, every target requested once.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::fs;

use kiln_btsbot::Btsbot;
use kiln_core::testing::Desk;
use kiln_stream::testing::NatsServer;
use kiln_stream::{NatsReader, NatsWriter};

#[test]
fn a_watch_takes_every_packet_of_a_subject_once() {
    let desk = Desk::new(&Btsbot);
    let Some(server) = NatsServer::start(&desk.path("server"), None) else { return };
    let at = format!("--nats nats://127.0.0.1:{} --subject ztf.alerts", server.port);
    desk.json("simulate --sources 12 --out @survey");
    desk.json("extract --packets @survey/packets --labels @survey/sources.csv --out @a");
    desk.write("small.json", r#"{"channels": [2, 2], "kernel": 3}"#);
    let data = "--triplets @a/triplets.npy --candidates @a/candidates.csv";
    desk.json(&format!("train {data} --config @small.json --crop 11 --epochs 1 --batch 8 --out @m"));
    let watch = format!("watch --model @m {at} --policy n=1,score=0,mag=20 --once");
    desk.assert_refused(&format!("{watch} --store @w.redb"), "no stream of the server keeps this subject");

    let fed = desk.json(&format!("feed --packets @survey/packets {at}"));
    let packets = fs::read_dir(desk.path("survey/packets")).unwrap().count() as u64;
    assert_eq!(fed["packets"], packets);
    // Something takes packets under the watch's name and dies before it has kept them.
    let subject = server.subject("ztf.alerts");
    let again = std::time::Duration::from_millis(300);
    drop(NatsReader::open(&subject, "kiln-btsbot", again).unwrap().take(5).unwrap().1);
    std::thread::sleep(2 * again);
    // What is no packet is told, and the rest goes on; a packet that comes twice counts once.
    let mut writer = NatsWriter::open(&subject).unwrap();
    writer.append(b"no packet".to_vec()).unwrap();
    let first = fs::read_dir(desk.path("survey/packets")).unwrap().next().unwrap().unwrap().path();
    writer.append(fs::read(first).unwrap()).unwrap();
    let seen = desk.json(&format!("{watch} --store @w.redb --out @w"));
    let count = |key: &str| seen["round"][key].as_u64().unwrap();
    assert_eq!((count("packets"), count("repeated")), (packets + 2, 1), "{seen}");
    assert_eq!(count("scored") + count("rejected"), packets + 1);
    assert!(count("triggered") > 0 && count("requested") == count("triggered"));
    let rejected = fs::read_to_string(desk.path("w/rejected.csv")).unwrap();
    assert!(rejected.contains("subject ztf.alerts, message "), "{rejected}");
    // Nothing is left for a second round; the same from a folder gives the same scores.
    let none = desk.json(&format!("{watch} --store @w.redb"));
    assert_eq!(none["round"]["packets"], 0, "{none}");
    desk.json("watch --model @m --packets @survey/packets --policy n=1,score=0,mag=20 --once --store @f.redb --out @f");
    let table =
        |folder: &str, name: &str| fs::read_to_string(desk.path(&format!("{folder}/{name}"))).unwrap();
    for name in ["scores.csv", "requests.csv"] {
        assert_eq!(table("w", name).lines().count(), table("f", name).lines().count(), "{name}");
    }
    assert_eq!(table("w", "scores.csv"), table("f", "scores.csv"));
    desk.assert_refused(&format!("{watch} --packets @survey/packets --store @w.redb"), "cannot be used with");
}
