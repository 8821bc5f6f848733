//! The completion endpoint over real HTTP.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use kiln_core::{Context, ModelFolder, Result};
use kiln_data::Tokenizer;
use kiln_gla::{GlaLmConfig, LmConfig, checkpoint, server};
use serde_json::{Value, json};

/// A server of an untrained model, which ends with the test.
struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
    _folder: tempfile::TempDir,
}

struct Answer {
    status: u16,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    fn text(&self) -> String {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()["choices"][0]["text"].as_str().unwrap().to_string()
    }

    /// The status and the message of a refusal.
    fn refusal(&self) -> (u16, String) {
        let error = &self.json()["error"];
        assert_eq!(error["type"], "invalid_request_error");
        (self.status, error["message"].as_str().unwrap().to_string())
    }
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cx = Context::for_tests(folder.path());
        let model = folder.path().join("tiny");
        let config =
            LmConfig::Gla(GlaLmConfig { intermediate_size: Some(32), ..GlaLmConfig::new(256, 16, 1, 2) });
        let lm = config.init(&cx);
        checkpoint::save(&ModelFolder::new(&model), &config, &Tokenizer::Byte, Some(&lm)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = cx.interrupt_flag();
        let thread = Some(thread::spawn(move || server::serve_on(listener, &model, &cx)));
        Self { address, stop, thread, _folder: folder }
    }

    fn stop(&mut self) -> Option<Result<()>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(|thread| thread.join().unwrap())
    }

    /// Sends a request and leaves the connection open.
    fn send(&self, method: &str, path: &str, body: &[u8]) -> TcpStream {
        let mut connection = TcpStream::connect(self.address).unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        connection.write_all(head.as_bytes()).unwrap();
        // A server that has refused a large body reads no more of it.
        connection.write_all(body).ok();
        connection
    }

    fn request(&self, method: &str, path: &str, body: &[u8]) -> Answer {
        let mut bytes = Vec::new();
        // What came before a reset is the answer.
        self.send(method, path, body).read_to_end(&mut bytes).ok();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        Answer { status, body: if chunked { join_chunks(body) } else { body.to_string() } }
    }

    fn complete(&self, request: &Value) -> Answer {
        self.request("POST", "/v1/completions", request.to_string().as_bytes())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Undoes HTTP's chunked encoding: each chunk is its length in hexadecimal, a line break, itself, a line break.
fn join_chunks(mut body: &str) -> String {
    let mut joined = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).unwrap();
        joined += &rest[..length];
        body = &rest[(length + 2).min(rest.len())..];
    }
    joined
}

#[test]
fn a_completion_has_the_form_of_openais() {
    let server = Server::start();
    let answer = server.complete(&json!({ "prompt": "To be", "model": "tiny", "user": null }));
    assert_eq!(answer.status, 400, "an unknown field is not passed over: {}", answer.body);
    let answer = server.complete(&json!({ "prompt": "To be", "model": "tiny", "n": 1, "seed": null }));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let answer = answer.json();
    assert_eq!(answer["object"], "text_completion");
    assert_eq!(answer["model"], "tiny");
    assert!(answer["id"].is_string() && answer["created"].is_u64());
    assert_eq!(answer["choices"][0]["index"], 0);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let usage = json!({ "prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21 });
    assert_eq!(answer["usage"], usage);

    let empty = server.complete(&json!({ "max_tokens": 0 })).json();
    assert_eq!(empty["choices"][0]["text"], "");
    assert_eq!(empty["usage"]["prompt_tokens"], 1, "an empty prompt starts from a line break");

    let models = server.request("GET", "/v1/models", b"").json();
    assert_eq!((&models["object"], &models["data"][0]["id"]), (&json!("list"), &json!("tiny")));
}

#[test]
fn the_seed_decides_the_text_and_temperature_0_is_greedy() {
    let server = Server::start();
    let text = |extra: Value| {
        let mut request = json!({ "prompt": "To be", "max_tokens": 40, "temperature": 1 });
        request.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.complete(&request).text()
    };
    assert_eq!(text(json!({ "seed": 3 })), text(json!({ "seed": 3 })));
    assert_ne!(text(json!({ "seed": 3 })), text(json!({ "seed": 4 })));
    assert_ne!(text(json!({})), text(json!({})), "without a seed every text is another");
    let greedy = text(json!({ "temperature": 0 }));
    assert_eq!(greedy, text(json!({ "greedy": true })));
    assert_eq!(greedy, text(json!({ "top_k": 1 })));
}

#[test]
fn streamed_pieces_join_to_the_whole_text_and_end_before_the_stop_text() {
    let server = Server::start();
    let mut request = json!({ "prompt": "To be", "max_tokens": 60, "temperature": 1, "seed": 1 });
    let whole = server.complete(&request).text();
    // Some whole character that the text holds; 60 random bytes have one below 128.
    let stop = whole.chars().skip(10).find(char::is_ascii).unwrap().to_string();
    for (stop, expected, reason) in
        [("nowhere", whole.as_str(), "length"), (&stop, whole.split(&stop).next().unwrap(), "stop")]
    {
        request["stop"] = stop.into();
        request["stream"] = false.into();
        let answer = server.complete(&request);
        assert_eq!(
            (answer.text().as_str(), &answer.json()["choices"][0]["finish_reason"]),
            (expected, &json!(reason))
        );

        request["stream"] = true.into();
        let body = server.complete(&request).body;
        let mut events: Vec<&str> =
            body.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(events.pop(), Some("[DONE]"));
        let events: Vec<Value> =
            events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect();
        let joined: String =
            events.iter().map(|event| event["choices"][0]["text"].as_str().unwrap()).collect();
        assert_eq!(joined, expected);
        assert!(
            events.iter().all(|event| event["object"] == "text_completion" && event["id"] == events[0]["id"])
        );
        let (last, before) = events.split_last().unwrap();
        assert_eq!(last["choices"][0]["finish_reason"], reason);
        assert!(
            before.len() > 1 && before.iter().all(|event| event["choices"][0]["finish_reason"].is_null())
        );
    }
}

#[test]
fn bad_requests_are_refused_with_a_fitting_status() {
    let server = Server::start();
    let refusal = |status: u16, words: &str, answer: Answer| {
        let (found, message) = answer.refusal();
        assert!(found == status && message.contains(words), "{found} {message}");
    };
    let post = |body: &[u8]| server.request("POST", "/v1/completions", body);
    refusal(400, "EOF", post(br#"{"prompt": "a""#));
    refusal(400, "prompt: invalid type: integer `3`", post(br#"{"prompt": 3}"#));
    refusal(400, "max_tokens", post(br#"{"max_tokens": -1}"#));
    refusal(400, "unknown field `max_token`", post(br#"{"max_token": 1}"#));
    refusal(400, "the temperature is -1", post(br#"{"temperature": -1}"#));
    refusal(400, "number out of range", post(br#"{"temperature": 1e999}"#));
    refusal(400, "top-p is 2", post(br#"{"top_p": 2}"#));
    refusal(400, "the repetition penalty is 0", post(br#"{"repetition_penalty": 0}"#));
    refusal(400, "\"n\" is 2, only 1 is offered", post(br#"{"n": 2}"#));
    refusal(400, "more than 65536", post(br#"{"prompt": "a", "max_tokens": 65536}"#));
    refusal(404, "no model \"gpt\" here, only \"tiny\"", post(br#"{"model": "gpt"}"#));
    refusal(404, "nothing at this address", server.request("GET", "/v2", b""));
    refusal(405, "does not take this method", server.request("GET", "/v1/completions", b""));
    refusal(405, "does not take this method", server.request("POST", "/v1/models", b"{}"));
    let large = format!("{{\"prompt\": \"{}\"}}", "a".repeat(1 << 20));
    refusal(413, "more than 1048576 bytes", post(large.as_bytes()));
    server.complete(&json!({ "prompt": "still there" })).text();
}

#[test]
fn a_client_that_goes_away_stops_its_text_and_not_the_server() {
    let server = Server::start();
    let long = json!({ "prompt": "a", "max_tokens": 60000, "stream": true }).to_string();
    for _ in 0..4 {
        let mut connection = server.send("POST", "/v1/completions", long.as_bytes());
        connection.read_exact(&mut [0; 300]).unwrap();
    }
    server.complete(&json!({ "prompt": "a" })).text();
}

#[test]
fn ctrl_c_ends_the_server_and_what_it_is_writing() {
    let mut server = Server::start();
    let long = json!({ "prompt": "a", "max_tokens": 60000, "stream": true }).to_string();
    let mut connection = server.send("POST", "/v1/completions", long.as_bytes());
    connection.read_exact(&mut [0; 300]).unwrap();
    server.stop().unwrap().unwrap();
    let mut rest = String::new();
    connection.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("shutting down") && !rest.contains("[DONE]"), "{rest}");
}

#[test]
fn a_port_in_use_and_a_missing_model_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let cx = Context::for_tests(dir.path());
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = server::serve(dir.path(), "127.0.0.1", port, &cx).unwrap_err();
    assert!(error.to_string().contains(&format!("cannot listen on 127.0.0.1:{port}")), "{error}");
    assert!(error.hint_text().unwrap().contains("another --port"));
    let error = server::serve(&dir.path().join("nowhere"), "127.0.0.1", 0, &cx).unwrap_err().to_string();
    assert!(error.contains("nowhere/config.json"), "{error}");
}
