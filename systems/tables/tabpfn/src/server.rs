//! The classifier in the browser: a page on which a table is pasted or uploaded and its target marked.
//!
//! - `GET /` the page
//! - `GET /table` the table that the page shows first, `{"text", "target"}`
//! - `POST /columns` `{"text"}` → the columns of a table, `{"columns": [{"name", "numeric"}], "rows"}`
//! - `POST /predict` `{"text", "target", "rows"?}` → classes of the rows without one, or of those in `rows`, as
//!   `{"columns", "rows", "notices", "seconds", "scores"}`
//! - `POST /boundary` `{"text", "target", "x", "y"}` → the decision regions over two columns, SVG
//!
//! Tables are text as in a CSV file. Refusals are `{"error": {"message": …, "hint": …}}` with a fitting status. Nothing is
//! kept between requests.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use kiln_core::{Context, Error, OutputMode, Result};
use kiln_data::{Cells, Column, Matrix, Table, TableOptions};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::boundary::Boundary;
use crate::classifier::{ClassifierOptions, TabPfnClassifier};
use crate::metrics::Scores;
use crate::network::TabPfn;

const PAGE: &str = include_str!("page.html");
/// Largest body of a request, in bytes.
const MAX_BODY: usize = 8 << 20;
/// The network and what its requests share.
pub struct Server {
    network: TabPfn,
    options: ClassifierOptions,
    /// The table that the page shows first, and its target.
    first: (String, String),
    cx: Context,
    /// One prediction at a time: each uses all threads.
    turn: Arc<Semaphore>,
}

impl Server {
    /// A server that shows `table` first.
    pub fn new(
        network: TabPfn,
        table: &Table,
        target: &str,
        options: ClassifierOptions,
        cx: &Context,
    ) -> Self {
        let text = String::from_utf8_lossy(&table.to_text(b',')).into_owned();
        let cx = Context { output: OutputMode::Quiet, ..cx.clone() };
        let turn = Arc::new(Semaphore::new(1));
        Self { network, options, first: (text, target.into()), cx, turn }
    }

    fn predict(&self, request: &PredictRequest) -> Result<Value> {
        let begun = Instant::now();
        let table = parse(&request.text)?;
        let column = table.column(&request.target).ok_or_else(|| table.no_column(&request.target))?;
        let rows_with = |labelled: bool| -> Vec<usize> {
            (0..table.rows()).filter(|&row| column.text(row).is_some() == labelled).collect()
        };
        let train = table.select(&rows_with(true));
        let (test, numbers) = match &request.rows {
            Some(text) => {
                let test = parse(text)?;
                let numbers = (0..test.rows()).collect();
                (test, numbers)
            }
            None => {
                let numbers = rows_with(false);
                (table.select(&numbers), numbers)
            }
        };
        if train.rows() == 0 || test.rows() == 0 {
            let found = match train.rows() {
                0 => "no row has a class",
                _ => "every row has a class, so that none is left to predict",
            };
            return Err(Error::input("the table", found)
                .hint("leave the class empty in the rows to predict, or paste them into the second box"));
        }
        let classifier =
            TabPfnClassifier::fit(&self.network, train, &request.target, self.options, &self.cx)?;
        let encoded = classifier.encoder().encode(&test)?;
        let (predicted, probabilities) = classifier.predict(&encoded.matrix, &self.cx)?;
        let notices: Vec<String> = classifier
            .notices
            .iter()
            .cloned()
            .chain(encoded.notices.into_iter().filter(|notice| !notice.contains("left out")))
            .collect();
        let rows = predicted.iter().enumerate().map(|(row, &class)| {
            json!({
                "row": numbers[row] + 1,
                "prediction": classifier.classes()[class],
                "probabilities": probabilities.row(row),
            })
        });
        Ok(json!({
            "classes": classifier.classes(),
            "rows": rows.collect::<Vec<_>>(),
            "scores": self.scores(&classifier, &test, &probabilities)?,
            "notices": notices,
            "seconds": begun.elapsed().as_secs_f64(),
        }))
    }

    /// Figures, if the predicted rows have classes.
    fn scores(
        &self,
        classifier: &TabPfnClassifier,
        test: &Table,
        probabilities: &Matrix,
    ) -> Result<Option<Scores>> {
        let Some(column) = test.column(classifier.target()) else { return Ok(None) };
        let known: Option<Vec<usize>> = classifier.labels(column, test.source())?.into_iter().collect();
        Ok(known.map(|labels| Scores::new(probabilities, &labels)))
    }

    fn boundary(&self, request: &BoundaryRequest) -> Result<String> {
        let table = parse(&request.text)?;
        let column = table.column(&request.target).ok_or_else(|| table.no_column(&request.target))?;
        let labelled: Vec<usize> = (0..table.rows()).filter(|&row| column.text(row).is_some()).collect();
        if labelled.is_empty() {
            return Err(Error::input("the table", "no row has a class"));
        }
        // A few members give the same regions as many.
        let members = Some(self.options.members.map_or(4, |members| members.min(4)));
        let options = ClassifierOptions { members, ..self.options };
        let columns = [request.x.as_str(), request.y.as_str()];
        let table = table.select(&labelled);
        Boundary::new(&self.network, &table, &request.target, columns, options, &self.cx)
            .map(|boundary| boundary.to_svg())
    }
}

/// A table that somebody has pasted.
fn parse(text: &str) -> Result<Table> {
    Table::from_text("the table", text.as_bytes(), TableOptions::default())
}

/// Serves on 127.0.0.1 and `port` (0: any that is free) until Ctrl-C.
///
/// # Errors
/// When the port is taken or the operating system gives no threads.
pub fn serve(server: Server, port: u16, cx: &Context) -> Result<()> {
    serve_on(kiln_http::listen("127.0.0.1", port)?, server, cx)
}

/// As [`serve`], on a socket that listens already.
///
/// # Errors
/// When the operating system gives no threads.
pub fn serve_on(listener: TcpListener, server: Server, cx: &Context) -> Result<()> {
    let announcement = |address: &str| format!("open {address} in a browser; Ctrl-C ends");
    kiln_http::serve(listener, router(server), announcement, cx)
}

fn router(server: Server) -> Router {
    let not_found = || async { Refusal::new(StatusCode::NOT_FOUND, "there is nothing at this address") };
    let not_allowed =
        || async { Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "this address does not take this method") };
    Router::new()
        .route("/", get(|| async { ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], PAGE) }))
        .route("/table", get(first_table))
        .route("/columns", post(columns))
        .route("/predict", post(predict))
        .route("/boundary", post(boundary))
        .fallback(not_found)
        .method_not_allowed_fallback(not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(only_local))
        .with_state(Arc::new(server))
}

/// Refuses requests for other hosts: a page elsewhere that has its name resolved to this machine must not read tables.
async fn only_local(request: Request, next: Next) -> Result<Response, Refusal> {
    let host = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    match name {
        "127.0.0.1" | "localhost" => Ok(next.run(request).await),
        _ => Err(Refusal::new(StatusCode::FORBIDDEN, "this server answers only as 127.0.0.1 or localhost")),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ColumnsRequest {
    text: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PredictRequest {
    text: String,
    target: String,
    rows: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BoundaryRequest {
    text: String,
    target: String,
    x: String,
    y: String,
}

type Body = Result<Bytes, BytesRejection>;

async fn first_table(State(server): State<Arc<Server>>) -> Json<Value> {
    let (text, target) = &server.first;
    Json(json!({ "text": text, "target": target }))
}

async fn columns(body: Body) -> Result<Json<Value>, Refusal> {
    let request: ColumnsRequest = read(body)?;
    let table = tokio::task::block_in_place(|| parse(&request.text))?;
    let column = |column: &Column| json!({ "name": column.name, "numeric": matches!(column.cells, Cells::Numbers(_)), "missing": column.missing() });
    let columns: Vec<Value> = table.columns().iter().map(column).collect();
    Ok(Json(json!({ "columns": columns, "rows": table.rows() })))
}

async fn predict(State(server): State<Arc<Server>>, body: Body) -> Result<Json<Value>, Refusal> {
    let request: PredictRequest = read(body)?;
    Ok(Json(in_turn(server, move |server| server.predict(&request)).await?))
}

async fn boundary(State(server): State<Arc<Server>>, body: Body) -> Result<Response, Refusal> {
    let request: BoundaryRequest = read(body)?;
    let svg = in_turn(server, move |server| server.boundary(&request)).await?;
    Ok(([(header::CONTENT_TYPE, "image/svg+xml")], svg).into_response())
}

/// Does the work of a request when no other is under way.
async fn in_turn<R: Send + 'static>(
    server: Arc<Server>,
    work: impl FnOnce(&Server) -> Result<R> + Send + 'static,
) -> Result<R, Refusal> {
    let turn = server.turn.clone().acquire_owned().await.expect("the semaphore is never closed");
    let work = tokio::task::spawn_blocking(move || {
        let result = work(&server);
        drop(turn);
        result
    });
    match work.await {
        Ok(result) => Ok(result?),
        Err(_) => Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "the prediction has failed")),
    }
}

fn read<T: DeserializeOwned>(body: Body) -> Result<T, Refusal> {
    let body = body.map_err(|e| match e.status() {
        status @ StatusCode::PAYLOAD_TOO_LARGE => {
            Refusal::new(status, format!("the request has more than {} MiB", MAX_BODY >> 20))
        }
        status => Refusal::new(status, e.body_text()),
    })?;
    serde_json::from_slice(&body)
        .map_err(|e| Refusal::new(StatusCode::BAD_REQUEST, format!("the request is not as expected: {e}")))
}

/// Why a request is not answered as it wishes.
struct Refusal {
    status: StatusCode,
    message: String,
    hint: Option<String>,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), hint: None }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let body = json!({ "error": { "message": self.message, "hint": self.hint } });
        (self.status, Json(body)).into_response()
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = kiln_http::status(&error);
        Self { status, message: error.to_string(), hint: error.hint_text().map(Into::into) }
    }
}
