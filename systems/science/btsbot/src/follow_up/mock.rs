//! A server that behaves like SkyPortal as far as follow-up goes, on this machine alone: for tests, trials and the
//! reference experiment.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Json, Router};
use kiln_core::{Context, Error, OutputMode, Result};
use serde_json::{Value, json};

/// What the server was told.
#[derive(Debug, Default)]
struct Told {
    sources: Vec<Value>,
    annotations: Vec<Value>,
    requests: Vec<Value>,
    /// Statuses with which the next follow-up requests are answered, whether they were taken (true) or not.
    failures: VecDeque<(u16, bool)>,
    token: String,
}

type Shared = Arc<Mutex<Told>>;

/// The server; it ends when it is dropped.
pub struct MockSkyPortal {
    /// Its address.
    pub base: String,
    told: Shared,
    cx: Context,
    thread: Option<JoinHandle<Result<()>>>,
}

fn lock(told: &Shared) -> MutexGuard<'_, Told> {
    told.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MockSkyPortal {
    /// Starts on a free port of this machine; only messages with this token are taken.
    ///
    /// # Errors
    /// When no port is free.
    pub fn start(token: &str) -> Result<Self> {
        let listener = kiln_http::listen("127.0.0.1", 0)?;
        let address = listener.local_addr().map_err(Error::io("find out", "the server's address"))?;
        let told: Shared = Arc::new(Mutex::new(Told { token: token.into(), ..Told::default() }));
        let router = Router::new()
            .route("/api/sources", post(save))
            .route("/api/annotation", post(annotate))
            .route("/api/followup_request", get(list).post(request))
            .with_state(told.clone());
        // A context of its own, which only dropping the server stops.
        let cx = Context { output: OutputMode::Quiet, ..Context::new() };
        let served = cx.clone();
        let thread = thread::spawn(move || kiln_http::serve(listener, router, |_| String::new(), &served));
        Ok(Self { base: format!("http://{address}"), told, cx, thread: Some(thread) })
    }

    /// Answers the next follow-up requests with these statuses, whether they are taken all the same or not.
    pub fn fail(&self, failures: impl IntoIterator<Item = (u16, bool)>) {
        lock(&self.told).failures.extend(failures);
    }

    /// The sources for which follow-up was requested, in order; one that was requested twice is there twice.
    pub fn requested(&self) -> Vec<String> {
        let name = |request: &Value| request["obj_id"].as_str().unwrap_or_default().to_string();
        lock(&self.told).requests.iter().map(name).collect()
    }

    /// The bodies of the follow-up requests.
    pub fn requests(&self) -> Vec<Value> {
        lock(&self.told).requests.clone()
    }

    /// How many times sources were saved, and annotated.
    pub fn saved_and_annotated(&self) -> [usize; 2] {
        let told = lock(&self.told);
        [told.sources.len(), told.annotations.len()]
    }
}

impl Drop for MockSkyPortal {
    fn drop(&mut self) {
        self.cx.interrupt_flag().store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

type Reply = (StatusCode, Json<Value>);

fn reply(status: u16, data: Value) -> Reply {
    let word = if status < 300 { "success" } else { "error" };
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (status, Json(json!({ "status": word, "data": data })))
}

/// Refuses messages without the token.
fn check(told: &Told, headers: &HeaderMap) -> Result<(), Reply> {
    let found = headers.get("authorization").and_then(|value| value.to_str().ok());
    match found == Some(&format!("token {}", told.token)) {
        true => Ok(()),
        false => Err(reply(401, json!({ "message": "Credentials malformed" }))),
    }
}

async fn save(State(told): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Reply {
    let mut told = lock(&told);
    if let Err(refusal) = check(&told, &headers) {
        return refusal;
    }
    told.sources.push(body);
    reply(200, json!({}))
}

async fn annotate(State(told): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Reply {
    let mut told = lock(&told);
    if let Err(refusal) = check(&told, &headers) {
        return refusal;
    }
    told.annotations.push(body);
    reply(200, json!({}))
}

async fn request(State(told): State<Shared>, headers: HeaderMap, Json(body): Json<Value>) -> Reply {
    let mut told = lock(&told);
    if let Err(refusal) = check(&told, &headers) {
        return refusal;
    }
    if !told.sources.iter().any(|source| source["id"] == body["obj_id"]) {
        return reply(400, json!({ "message": "no such source" }));
    }
    let (status, is_taken) = told.failures.pop_front().unwrap_or((200, true));
    if is_taken {
        told.requests.push(body);
    }
    reply(status, json!({ "id": told.requests.len() }))
}

async fn list(State(told): State<Shared>, headers: HeaderMap, RawQuery(query): RawQuery) -> Reply {
    let query = query.unwrap_or_default();
    let wanted = query.split('&').find_map(|part| part.strip_prefix("sourceID=")).unwrap_or_default();
    let told = lock(&told);
    if let Err(refusal) = check(&told, &headers) {
        return refusal;
    }
    let found: Vec<&Value> = told.requests.iter().filter(|request| request["obj_id"] == wanted).collect();
    reply(200, json!({ "followup_requests": found, "totalMatches": found.len() }))
}
