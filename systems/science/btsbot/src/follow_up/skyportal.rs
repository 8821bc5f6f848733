//! SkyPortal, the marshal of the survey: saving sources, annotating them, requesting follow-up.

use std::path::Path;
use std::thread;
use std::time::Duration;

use kiln_core::{Context, Error, Result};
use serde_json::{Value, json};
use ureq::Agent;

use super::{FollowUp, Outcome, Request, Target};

/// How often something is tried,
const ATTEMPTS: usize = 5;
/// and how long an answer may take.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes that are read of an answer.
const LONGEST_ANSWER: u64 = 1 << 20;
/// Who annotates.
const ORIGIN: &str = "kiln_btsbot";
/// How often a waiting thread looks whether to stop.
const POLL: Duration = Duration::from_millis(50);

/// A SkyPortal server.
pub struct SkyPortal {
    agent: Agent,
    base: String,
    token: String,
    target: Target,
    /// How long to wait before the second attempt; twice as long before each that follows.
    first_wait: Duration,
    cx: Context,
}

/// What came of one message.
enum Answer {
    /// Status 2xx.
    Good(Value),
    /// Another status that trying again does not mend.
    Bad(u16, String),
    /// 429, 5xx, or no answer.
    Later(String),
}

impl SkyPortal {
    /// A server at an address such as `https://fritz.science`; the token goes nowhere else.
    ///
    /// # Errors
    /// When the address is none, or would send the token over the network in the clear.
    pub fn new(
        base: &str,
        token: String,
        target: Target,
        first_wait: Duration,
        cx: &Context,
    ) -> Result<Self> {
        let refused =
            |found: &str, hint: &str| Err(Error::usage(format!("--base {base} {found}")).hint(hint));
        let base_url = base.trim_end_matches('/');
        let (scheme, rest) = base_url.split_once("://").unwrap_or(("", base_url));
        let authority = rest.split('/').next().unwrap_or_default();
        let host = if authority.starts_with('[') {
            authority.split(']').next().unwrap_or_default().trim_start_matches('[')
        } else {
            authority.split(':').next().unwrap_or_default()
        };
        if host.is_empty() || authority.contains('@') || !matches!(scheme, "http" | "https") {
            return refused("is no address", "such as https://fritz.science");
        }
        if scheme == "http" && !matches!(host, "localhost" | "127.0.0.1" | "::1") {
            return refused("would show the token to everyone on the way", "use https");
        }
        let config = Agent::config_builder()
            .timeout_global(Some(TIMEOUT))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .build();
        Ok(Self {
            agent: config.into(),
            base: base_url.into(),
            token: format!("token {token}"),
            target,
            first_wait,
            cx: cx.clone(),
        })
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        let request = self.agent.post(format!("{}{path}", self.base)).header("Authorization", &self.token);
        answer(request.send_json(body))
    }

    fn get(&self, path: &str, query: &[(&str, &str)]) -> Answer {
        let mut request = self.agent.get(format!("{}{path}", self.base)).header("Authorization", &self.token);
        for (key, value) in query {
            request = request.query(key, value);
        }
        answer(request.call())
    }

    /// Waits before the attempt of this number, from 1.
    fn wait(&self, attempt: usize) -> Result<()> {
        let mut left = self.first_wait * (1 << (attempt - 1));
        while !left.is_zero() {
            if self.cx.interrupted() {
                return Err(Error::interrupted("stopped while waiting for the server"));
            }
            let part = left.min(POLL);
            thread::sleep(part);
            left -= part;
        }
        Ok(())
    }

    /// A server that does not know the token will take no other request, either.
    fn require_trust(&self, status: u16) -> Result<()> {
        match status {
            401 | 403 => Err(Error::work(format!("{} does not accept the token ({status})", self.base))
                .hint("no request is lost: mend the token and start again")),
            _ => Ok(()),
        }
    }

    /// Sends what does no harm twice; what is within says why it did not work.
    fn post_repeatedly(&self, path: &str, body: &Value) -> Result<std::result::Result<(), Outcome>> {
        let mut reason = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.wait(attempt)?;
            }
            match self.post(path, body) {
                Answer::Good(_) => return Ok(Ok(())),
                Answer::Bad(status, text) => {
                    self.require_trust(status)?;
                    return Ok(Err(Outcome::Refused(format!("{path} answers {status}: {text}"))));
                }
                Answer::Later(why) => reason = format!("{path} {why}"),
            }
        }
        Ok(Err(Outcome::Unknown(reason)))
    }
}

/// Sorts what came back.
fn answer(result: std::result::Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
    let mut response = match result {
        Ok(response) => response,
        Err(e) => return Answer::Later(format!("gives no answer: {e}")),
    };
    let status = response.status().as_u16();
    let text = response.body_mut().with_config().limit(LONGEST_ANSWER).read_to_string();
    let text = match text {
        Ok(text) => text,
        Err(e) => return Answer::Later(format!("gives half an answer: {e}")),
    };
    match status {
        200..300 => Answer::Good(serde_json::from_str(&text).unwrap_or(Value::Null)),
        429 | 500.. => Answer::Later(format!("answers {status}")),
        _ => Answer::Bad(status, text.chars().take(200).collect()),
    }
}

impl FollowUp for SkyPortal {
    fn send(&self, request: &Request) -> Result<Outcome> {
        let groups = &self.target.source_groups;
        let source = json!({
            "id": request.object_id, "ra": request.ra, "dec": request.dec, "group_ids": groups,
        });
        // A source must be there before anything can be asked about it.
        if let Err(outcome) = self.post_repeatedly("/api/sources", &source)? {
            return Ok(outcome);
        }
        let annotation = json!({
            "obj_id": request.object_id,
            "origin": ORIGIN,
            "data": { "score": request.score, "policy": request.policy, "trigger_jd": request.jd },
            "group_ids": groups,
        });
        if let Err(Outcome::Refused(reason) | Outcome::Unknown(reason)) =
            self.post_repeatedly("/api/annotation", &annotation)?
        {
            // A spectrum is worth more than a note about it.
            self.cx.note(format!("{}: {reason}", request.object_id));
        }
        let body = request.body(&self.target);
        let mut reason = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                self.wait(attempt)?;
                // The server may have taken it although the answer did not say so.
                match self.stands(request)? {
                    Ok(true) => return Ok(Outcome::Acknowledged),
                    Ok(false) => {}
                    Err(why) => {
                        reason = why;
                        continue;
                    }
                }
            }
            match self.post("/api/followup_request", &body) {
                Answer::Good(_) => return Ok(Outcome::Acknowledged),
                Answer::Bad(status, text) => {
                    self.require_trust(status)?;
                    return Ok(Outcome::Refused(format!("{status}: {text}")));
                }
                Answer::Later(why) => reason = why,
            }
        }
        Ok(Outcome::Unknown(reason))
    }

    fn stands(&self, request: &Request) -> Result<std::result::Result<bool, String>> {
        let allocation = self.target.allocation.to_string();
        let query = [("sourceID", request.object_id.as_str()), ("allocationID", &allocation)];
        Ok(match self.get("/api/followup_request", &query) {
            Answer::Good(answer) => match answer["data"]["followup_requests"].as_array() {
                // The server's own search may find names that only begin so.
                Some(found) => Ok(found.iter().any(|one| {
                    one["obj_id"] == request.object_id.as_str()
                        && (one["allocation_id"] == self.target.allocation
                            || one["allocation"]["id"] == self.target.allocation)
                })),
                None => Err("lists no requests".into()),
            },
            Answer::Bad(status, text) => {
                self.require_trust(status)?;
                Err(format!("answers {status} when asked for requests: {text}"))
            }
            Answer::Later(why) => Err(why),
        })
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// The token: from a file, or from an environment variable.
///
/// # Errors
/// When there is none, or it cannot be one.
pub fn read_token(file: Option<&Path>, variable: &str) -> Result<String> {
    let text = match file {
        Some(path) => std::fs::read_to_string(path).map_err(Error::io("read", path))?,
        None => std::env::var(variable).map_err(|_| {
            Error::usage(format!("the environment has no {variable}"))
                .hint("requests need a token: set that variable, or give --token-file")
        })?,
    };
    let token = text.trim();
    if token.is_empty() || token.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(Error::usage("the token is empty, or has blanks in it"));
    }
    Ok(token.into())
}
