//! Completions over HTTP, in the form of OpenAI's completion endpoint.
//!
//! - `GET /v1/models` names the model that is served.
//! - `POST /v1/completions` continues a prompt; with `"stream": true` as server-sent events, one for every
//!   piece of text.
//!
//! Refusals are `{"error": {"message": …, "type": …}}` with a fitting status.

use std::convert::Infallible;
use std::fmt;
use std::net::TcpListener;
use std::ops::ControlFlow;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{self, Poll};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body::Frame;
use kiln_core::{Context, Error, Result, random_stream};
use kiln_data::StoppedText;
use kiln_nn::{LanguageModel, Sampling, generate};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::checkpoint::{self, Trained};

/// Largest body of a request, in bytes.
const MAX_BODY: usize = 1 << 20;
/// Most tokens of a prompt and its completion together.
const MAX_TOKENS: usize = 65_536;
/// Tokens of a completion when the request does not say, as in OpenAI's interface.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Serves the model of a folder on `host` and `port` (0: any that is free) until Ctrl-C.
///
/// # Errors
/// When the address is taken or the model cannot be opened.
pub fn serve(model: &Path, host: &str, port: u16, cx: &Context) -> Result<()> {
    serve_on(kiln_http::listen(host, port)?, model, cx)
}

/// As [`serve`], on a socket that listens already.
///
/// # Errors
/// When the model cannot be opened or the operating system gives no threads.
pub fn serve_on(listener: TcpListener, model: &Path, cx: &Context) -> Result<()> {
    let router = router(Server::open(model, cx)?);
    kiln_http::serve(listener, router, |address| format!("listening on {address}"), cx)
}

fn router(server: Server) -> Router {
    let not_found = || async { Refusal::new(StatusCode::NOT_FOUND, "there is nothing at this address") };
    let not_allowed =
        || async { Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this address does not take this method") };
    Router::new()
        .route("/v1/models", get(list_models))
        .route("/v1/completions", post(complete))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Arc::new(server))
}

/// The model and what its requests share.
struct Server {
    /// What clients call the model: the name of its folder.
    id: String,
    trained: Trained,
    cx: Context,
    /// Completions so far.
    count: AtomicU64,
    /// As many texts are generated at once as there are threads; further requests wait for their turn.
    turns: Arc<Semaphore>,
}

impl Server {
    fn open(model: &Path, cx: &Context) -> Result<Self> {
        let trained = checkpoint::open(model, cx)?;
        // A folder such as `.` has its name only in full.
        let full = model.canonicalize().map_err(Error::io("read", model))?;
        let id =
            full.file_name().map_or_else(|| checkpoint::KIND.into(), |name| name.to_string_lossy().into());
        let turns = Arc::new(Semaphore::new(cx.threads.max(1)));
        Ok(Self { id, trained, cx: cx.clone(), count: AtomicU64::new(0), turns })
    }

    /// Checks a request and cuts its prompt into tokens.
    fn prepare(&self, request: Request) -> Result<Job, Refusal> {
        if let Some(model) = request.model.filter(|model| *model != self.id) {
            let found = format!("there is no model \"{model}\" here, only \"{}\"", self.id);
            return Err(Refusal::new(StatusCode::NOT_FOUND, found));
        }
        let only_offered = [
            ("n", request.n, 1.0),
            ("best_of", request.best_of, 1.0),
            ("presence_penalty", request.presence_penalty, 0.0),
            ("frequency_penalty", request.frequency_penalty, 0.0),
        ];
        for (name, found, only) in only_offered {
            if let Some(found) = found.filter(|found| *found != only) {
                return Err(Refusal::bad_request(format!("\"{name}\" is {found}, only {only} is offered")));
            }
        }
        let Trained { tokenizer, .. } = &self.trained;
        let mut prompt = tokenizer.encode(request.prompt.unwrap_or_default().as_bytes())?;
        if prompt.is_empty() {
            prompt.push(tokenizer.start_token());
        }
        let max_tokens = request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        if prompt.len().saturating_add(max_tokens) > MAX_TOKENS {
            return Err(Refusal::bad_request(format!(
                "{} tokens of prompt and {max_tokens} of completion are more than {MAX_TOKENS}",
                prompt.len()
            )));
        }
        let default = Sampling::default();
        let greedy = request.greedy.unwrap_or(request.temperature == Some(0.0));
        let sampling = Sampling {
            temperature: request
                .temperature
                .filter(|&t| !(greedy && t == 0.0))
                .unwrap_or(default.temperature),
            top_k: request.top_k.unwrap_or(default.top_k),
            top_p: request.top_p.unwrap_or(default.top_p),
            greedy,
            repetition_penalty: request.repetition_penalty.unwrap_or(default.repetition_penalty),
        };
        sampling.check()?;
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        Ok(Job {
            heading: Heading { id: format!("cmpl-{number}"), created: unix_time(), model: self.id.clone() },
            prompt,
            max_tokens,
            sampling,
            stop: request.stop,
            seed: request.seed.map_or((self.cx.seed, number), |seed| (seed, 0)),
        })
    }

    /// Generates the text of a job piece by piece, until it ends or nobody listens any more.
    fn generate(&self, job: &Job, events: &UnboundedSender<Event>) -> Result<End, Refusal> {
        let Trained { model, tokenizer, .. } = &self.trained;
        let mut output = StoppedText::new(tokenizer, job.stop.as_deref());
        // That nobody listens is found by `is_closed`.
        let send = |piece: String| {
            if !piece.is_empty() {
                events.send(Event::Piece(piece)).ok();
            }
        };
        let on_token = |id| {
            send(output.push(id));
            if output.stopped() || events.is_closed() || self.cx.interrupted() {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        let state = model.initial_state(1, &self.cx.device);
        let mut rng = random_stream(job.seed.0, "completion", job.seed.1);
        let (ids, _) =
            generate(model, &job.prompt, state, &job.sampling, job.max_tokens, &mut rng, on_token)?;
        send(output.finish());
        let finish_reason = match (output.stopped(), ids.len() < job.max_tokens) {
            (true, _) => "stop",
            (false, false) => "length",
            (false, true) => {
                return Err(Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down"));
            }
        };
        Ok(End { finish_reason, prompt_tokens: job.prompt.len(), completion_tokens: ids.len() })
    }
}

async fn list_models(State(server): State<Arc<Server>>) -> Json<Value> {
    let model = json!({ "id": server.id, "object": "model", "created": unix_time(), "owned_by": "kiln" });
    Json(json!({ "object": "list", "data": [model] }))
}

async fn complete(
    State(server): State<Arc<Server>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, Refusal> {
    let request = Request::parse(body)?;
    let stream = request.stream.unwrap_or(false);
    // Cutting a long prompt takes its time.
    let job = tokio::task::block_in_place(|| server.prepare(request))?;
    let heading = job.heading.clone();
    let turn = server.turns.clone().acquire_owned().await.expect("the semaphore is never closed");
    let (sender, receiver) = unbounded_channel();
    tokio::task::spawn_blocking(move || {
        let end = server.generate(&job, &sender).map_or_else(Event::Failed, Event::End);
        sender.send(end).ok();
        drop(turn);
    });
    if stream {
        let body = Body::new(EventStream { heading, receiver });
        return Ok(([(header::CONTENT_TYPE, "text/event-stream")], body).into_response());
    }
    heading.collect(receiver).await.map(IntoResponse::into_response)
}

/// The body of a request; whatever is left out or `null` has its default.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Request {
    model: Option<String>,
    prompt: Option<String>,
    max_tokens: Option<usize>,
    temperature: Option<f64>,
    top_k: Option<usize>,
    top_p: Option<f64>,
    greedy: Option<bool>,
    repetition_penalty: Option<f64>,
    stop: Option<String>,
    seed: Option<u64>,
    stream: Option<bool>,
    /// Clients send these with the values that do nothing.
    n: Option<f64>,
    best_of: Option<f64>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
}

impl Request {
    fn parse(body: Result<Bytes, BytesRejection>) -> Result<Self, Refusal> {
        let body = body.map_err(|e| match e.status() {
            status @ StatusCode::PAYLOAD_TOO_LARGE => {
                Refusal::new(status, format!("the request has more than {MAX_BODY} bytes"))
            }
            status => Refusal::new(status, e.body_text()),
        })?;
        let Json(request) = Json::from_bytes(&body).map_err(|e| Refusal::bad_request(e.body_text()))?;
        Ok(request)
    }
}

/// A request that has been found good.
struct Job {
    heading: Heading,
    /// At least one token.
    prompt: Vec<u32>,
    max_tokens: usize,
    sampling: Sampling,
    stop: Option<String>,
    /// Seed and number of the random stream.
    seed: (u64, u64),
}

/// What happens while a text is generated; the last is an end or a failure.
enum Event {
    Piece(String),
    End(End),
    Failed(Refusal),
}

struct End {
    finish_reason: &'static str,
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// What all answers to one request have in common.
#[derive(Clone)]
struct Heading {
    id: String,
    created: u64,
    model: String,
}

impl Heading {
    /// A completion, or a piece of one, as OpenAI's interface writes it.
    fn completion(&self, text: &str, finish_reason: Option<&str>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": [{ "text": text, "index": 0, "logprobs": null, "finish_reason": finish_reason }],
        })
    }

    /// Waits for the whole text. When the client goes away before, this is dropped and the text ends.
    async fn collect(self, mut events: UnboundedReceiver<Event>) -> Result<Json<Value>, Refusal> {
        let mut text = String::new();
        while let Some(event) = events.recv().await {
            match event {
                Event::Piece(piece) => text += &piece,
                Event::End(end) => {
                    let mut answer = self.completion(&text, Some(end.finish_reason));
                    answer["usage"] = json!({
                        "prompt_tokens": end.prompt_tokens,
                        "completion_tokens": end.completion_tokens,
                        "total_tokens": end.prompt_tokens + end.completion_tokens,
                    });
                    return Ok(Json(answer));
                }
                Event::Failed(refusal) => return Err(refusal),
            }
        }
        Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the generation has failed"))
    }

    /// An event as the stream shows it.
    fn server_sent(&self, event: Event) -> String {
        let data = |value: Value| format!("data: {value}\n\n");
        match event {
            Event::Piece(piece) => data(self.completion(&piece, None)),
            Event::End(end) => data(self.completion("", Some(end.finish_reason))) + "data: [DONE]\n\n",
            Event::Failed(refusal) => data(refusal.json()),
        }
    }
}

/// The body of a streamed answer. When the client goes away it is dropped, and the text ends.
struct EventStream {
    heading: Heading,
    receiver: UnboundedReceiver<Event>,
}

impl http_body::Body for EventStream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        task: &mut task::Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let event = self.receiver.poll_recv(task);
        event.map(|event| Some(Ok(Frame::data(self.heading.server_sent(event?).into()))))
    }
}

/// Why a request is not answered as it wishes.
struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl fmt::Display) -> Self {
        Self { status, message: message.to_string() }
    }

    fn bad_request(message: String) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    fn json(&self) -> Value {
        let kind = if self.status.is_server_error() { "server_error" } else { "invalid_request_error" };
        json!({ "error": { "message": self.message, "type": kind } })
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.json())).into_response()
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::new(kiln_http::status(&error), error)
    }
}

fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
