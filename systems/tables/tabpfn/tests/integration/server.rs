//! The page's requests over real HTTP.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use kiln_core::{Context, Result};
use kiln_tabpfn::server::{Server, serve_on};
use kiln_tabpfn::{ClassifierOptions, checkpoint, examples};
use serde_json::{Value, json};

/// A server of the reference's small network, which ends with the test.
struct Running {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Running {
    fn start() -> Self {
        let cx = Context::for_tests(".");
        let network = checkpoint::open("tests/data/model".as_ref(), &cx).unwrap();
        let options = ClassifierOptions { members: Some(2), ..ClassifierOptions::default() };
        let server = Server::new(network, &examples::table("iris").unwrap(), "target", options, &cx);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = cx.interrupt_flag();
        Self { address, stop, thread: Some(thread::spawn(move || serve_on(listener, server, &cx))) }
    }

    fn send(&self, method: &str, path: &str, host: &str, body: &str) -> (u16, String) {
        let mut connection = TcpStream::connect(self.address).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all(head.as_bytes()).unwrap();
        // A server that has refused a large body reads no more of it.
        connection.write_all(body.as_bytes()).ok();
        let mut bytes = Vec::new();
        connection.read_to_end(&mut bytes).ok();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.into())
    }

    fn post(&self, path: &str, body: &Value) -> (u16, String) {
        self.send("POST", path, "localhost", &body.to_string())
    }

    /// Checks that a request is refused with this status and these words.
    fn assert_refused(&self, path: &str, body: &Value, status: u16, words: &str) {
        let (found, text) = self.post(path, body);
        assert_eq!(found, status, "{text}");
        let message = serde_json::from_str::<Value>(&text).unwrap()["error"]["message"].to_string();
        assert!(message.contains(words), "{message}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

const TABLE: &str = "a,b,kind\n1,2,x\n2,1,x\n7,8,y\n8,7,y\n7.5,7,\n1,1,\n";

#[test]
fn the_page_its_table_and_its_columns_are_given() {
    let server = Running::start();
    let (status, page) = server.send("GET", "/", "localhost", "");
    assert!(status == 200 && page.contains("<title>TabPFN</title>"));
    for outside in ["http://", "https://", "src="] {
        assert!(!page.contains(outside), "the page must need no network: {outside}");
    }
    let (_, table) = server.send("GET", "/table", "127.0.0.1:8081", "");
    let table: Value = serde_json::from_str(&table).unwrap();
    assert_eq!(table["target"], "target");
    let (_, columns) = server.post("/columns", &json!({ "text": table["text"] }));
    let columns: Value = serde_json::from_str(&columns).unwrap();
    assert_eq!((&columns["rows"], &columns["columns"][4]["numeric"]), (&150.into(), &false.into()));
}

#[test]
fn rows_without_a_class_are_predicted_and_regions_drawn() {
    let server = Running::start();
    let (status, answer) = server.post("/predict", &json!({ "text": TABLE, "target": "kind" }));
    assert_eq!(status, 200, "{answer}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert_eq!((&answer["rows"][0]["row"], &answer["rows"][1]["row"]), (&5.into(), &6.into()));
    assert_eq!(answer["rows"].as_array().unwrap().len(), 2);
    let labelled = json!({ "text": TABLE, "target": "kind", "rows": "a,b,kind\n1,2,x\n9,9,y\n" });
    let (_, answer) = server.post("/predict", &labelled);
    let answer: Value = serde_json::from_str(&answer).unwrap();
    assert!(answer["scores"]["accuracy"].is_number());
    let (status, svg) =
        server.post("/boundary", &json!({ "text": TABLE, "target": "kind", "x": "a", "y": "b" }));
    assert!(status == 200 && svg.starts_with("<svg"), "{svg}");
}

#[test]
fn requests_that_make_no_sense_are_refused_in_words() {
    let server = Running::start();
    server.assert_refused("/predict", &json!({ "text": TABLE, "target": "c" }), 400, "has no column");
    server.assert_refused("/predict", &json!({ "text": "", "target": "c" }), 400, "the table: is empty");
    server.assert_refused("/predict", &json!({ "target": "c" }), 400, "missing field `text`");
    let full = TABLE.replace(",\n", ",x\n");
    server.assert_refused(
        "/predict",
        &json!({ "text": full, "target": "kind" }),
        400,
        "every row has a class",
    );
    let boundary = json!({ "text": TABLE, "target": "kind", "x": "a", "y": "a" });
    server.assert_refused("/boundary", &boundary, 400, "three different columns");
    server.assert_refused("/columns", &json!({ "text": "x".repeat(9 << 20) }), 413, "more than 8 MiB");
    assert_eq!(server.send("GET", "/other", "localhost", "").0, 404);
    assert_eq!(server.send("GET", "/predict", "localhost", "").0, 405);
    assert_eq!(server.send("GET", "/table", "evil.example", "").0, 403);
}
