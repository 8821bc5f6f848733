//! Records of a subject, through readers and servers that die.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeSet;
use std::thread;
use std::time::Duration;

use kiln_stream::testing::NatsServer;
use kiln_stream::{NatsReader, NatsWriter, Subject};

const LONG: Duration = Duration::from_secs(60);

#[test]
fn records_come_in_order_until_they_are_acknowledged() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = NatsServer::start(folder.path(), None) else { return };
    let subject = server.subject("alerts.test");
    let error = NatsReader::open(&subject, "one", LONG).err().unwrap();
    assert!(error.to_string().contains("no stream of the server keeps this subject"), "{error}");

    let mut writer = NatsWriter::open(&subject).unwrap();
    let numbers: Vec<u64> = (0..5u8).map(|number| writer.append(vec![number]).unwrap()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
    let soon = Duration::from_millis(500);
    let reader = NatsReader::open(&subject, "one", soon).unwrap();
    let payloads = |reader: &NatsReader, most| {
        let (records, receipts) = reader.take(most).unwrap();
        (records.into_iter().map(|record| record.payload[0]).collect::<Vec<u8>>(), receipts)
    };
    let (first, receipts) = payloads(&reader, 3);
    assert_eq!(first, [0, 1, 2]);
    reader.acknowledge(receipts);
    let (second, lost) = payloads(&reader, 3);
    assert_eq!(second, [3, 4]);
    // Nobody says that these were kept: they come again, to another reader of the same name too.
    drop((lost, reader));
    let reader = NatsReader::open(&subject, "one", soon).unwrap();
    let mut again = Vec::new();
    while again.len() < 2 {
        let (more, receipts) = payloads(&reader, 1);
        again.extend(more);
        reader.acknowledge(receipts);
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(again, [3, 4]);
    assert_eq!(payloads(&reader, 9).0, [0u8; 0]);
    // Another name begins anew, and one name follows one subject.
    assert_eq!(payloads(&NatsReader::open(&subject, "two", LONG).unwrap(), 9).0, [0, 1, 2, 3, 4]);
    NatsWriter::open(&server.subject("other")).unwrap();
    assert!(
        NatsReader::open(&Subject { name: "alerts.none".into(), ..subject.clone() }, "one", LONG).is_err()
    );
}

#[test]
fn a_server_that_dies_and_comes_back_has_lost_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let Some(server) = NatsServer::start(folder.path(), None) else { return };
    let subject = server.subject("alerts");
    let mut writer = NatsWriter::open(&subject).unwrap();
    (0..4u8).for_each(|number| _ = writer.append(vec![number]).unwrap());
    let reader = NatsReader::open(&subject, "watch", LONG).unwrap();
    let (records, receipts) = reader.take(2).unwrap();
    reader.acknowledge(receipts);
    let port = server.port;
    drop(server);
    // Nothing comes while it is gone, which is no error.
    while reader.is_connected() {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(reader.take(2).unwrap().0.is_empty());
    let _server = NatsServer::start(folder.path(), Some(port)).unwrap();
    // What it had not noted as acknowledged when it died comes again.
    let mut all: BTreeSet<u8> = records.into_iter().map(|record| record.payload[0]).collect();
    while all.len() < 4 {
        let (records, receipts) = reader.take(9).unwrap();
        all.extend(records.into_iter().map(|record| record.payload[0]));
        reader.acknowledge(receipts);
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(all, BTreeSet::from([0, 1, 2, 3]));
}

#[test]
fn a_server_that_is_not_there_is_named_without_its_secrets() {
    let subject = Subject { url: "nats://me:secret@127.0.0.1:9".into(), name: "a".into(), token: None };
    let error = NatsReader::open(&subject, "one", LONG).err().unwrap().to_string();
    assert!(error.contains("nats://127.0.0.1:9, subject a") && !error.contains("secret"), "{error}");
}
