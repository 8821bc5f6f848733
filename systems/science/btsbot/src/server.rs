//! Scores over HTTP.
//!
//! - `POST /score` takes a packet (Avro) and gives a list of its alerts, each with a score or the reason why it has none.
//!   The source's history is the packet's own.
//! - `GET /` names what is served.

use std::net::TcpListener;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use kiln_core::{Context, OutputMode, Result};
use serde_json::{Value, json};

use crate::checkpoint::Config;
use crate::dataset::{About, Dataset};
use crate::features::{Derived, FeatureOptions, features};
use crate::model::MmCnn;
use crate::packet::AlertReader;
use crate::packets::triplet;
use crate::train;

/// Largest packet, in bytes.
const MAX_BODY: usize = 8 << 20;

/// A network that scores packets.
pub struct Server {
    /// Its settings.
    pub config: Config,
    /// The network.
    pub model: MmCnn,
    /// Reads packets.
    pub reader: AlertReader,
    /// How features are made.
    pub features: FeatureOptions,
    /// The device.
    pub cx: Context,
}

/// Serves until Ctrl-C.
///
/// # Errors
/// When the operating system gives no threads, or the socket fails.
pub fn serve(server: Server, listener: TcpListener, cx: &Context) -> Result<()> {
    let about = json!({ "network": server.config.network, "post": "/score" });
    let router = Router::new()
        .route("/", get(move || async move { Json(about) }))
        .route("/score", post(score))
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .with_state(Arc::new(server));
    kiln_http::serve(listener, router, |address| format!("post packets to {address}/score"), cx)
}

async fn score(State(server): State<Arc<Server>>, body: Bytes) -> (StatusCode, Json<Value>) {
    let rows = server.rows(&body);
    // Bad only if nothing in it could be scored.
    let status = if rows.iter().any(|row| row["status"] == "scored") {
        StatusCode::OK
    } else {
        StatusCode::BAD_REQUEST
    };
    (status, Json(json!(rows)))
}

impl Server {
    fn rows(&self, packet: &[u8]) -> Vec<Value> {
        let quiet = Context { output: OutputMode::Quiet, ..self.cx.clone() };
        let row = |alert: std::result::Result<crate::Alert, crate::packet::Fault>| {
            let alert = match alert {
                Ok(alert) => alert,
                Err(fault) => {
                    return json!({ "objectId": fault.object_id, "candid": fault.candid, "status": "rejected", "reason": fault.reason });
                }
            };
            let derived = Derived::of(&alert, &alert.prior);
            let scored = features(&alert, &derived, self.features.drb_missing).and_then(|features| {
                let mut data = Dataset::empty(self.config.network.side);
                let (object_id, candid) = (alert.object_id.clone(), alert.candid.to_string());
                let about = About { object_id, candid, jd: alert.jd, magpsf: alert.magpsf, label: None };
                data.push(&triplet(&alert)?, features, about);
                let scores = train::predict(&self.model, &data, &[0], self.config.temperature, &quiet);
                scores.map(|scores| scores[0]).map_err(|e| e.to_string())
            });
            match scored {
                Ok(score) => json!({
                    "objectId": alert.object_id, "candid": alert.candid, "jd": alert.jd, "magpsf": alert.magpsf,
                    "score": score, "status": "scored",
                }),
                Err(reason) => json!({
                    "objectId": alert.object_id, "candid": alert.candid, "status": "rejected", "reason": reason,
                }),
            }
        };
        self.reader.read(packet).into_iter().map(row).collect()
    }
}
