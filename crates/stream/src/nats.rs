//! Subjects of NATS JetStream: records that a server keeps, for programs on many machines.

use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, PullConsumer, pull};
use async_nats::jetstream::{self, Context, Message, stream};
use async_nats::{Client, ConnectOptions};
use futures_util::StreamExt;
use kiln_core::{Error, Result};
use tokio::runtime::{Builder, Runtime};
use tokio::time::timeout;

use crate::segment::Record;

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A subject on a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The server, such as `nats://localhost:4222`; `tls://` for an encrypted connection.
    pub url: String,
    /// The subject.
    pub name: String,
    /// What tells the server who asks.
    pub token: Option<String>,
}

impl Subject {
    /// For messages to people: the server without what is secret in its address, and the subject.
    fn place(&self) -> String {
        let (scheme, rest) = self.url.split_once("://").unwrap_or(("nats", &self.url));
        let server = rest.rsplit_once('@').map_or(rest, |(_, server)| server);
        format!("{scheme}://{server}, subject {}", self.name)
    }

    fn connect(&self) -> Result<Connection> {
        let cannot = |what: &str| Error::work(format!("cannot {what} {}", self.place()));
        // One thread keeps the connection alive while records are worked on.
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.map_err(|e| cannot("start a thread for").caused_by(e))?;
        let mut options = ConnectOptions::new().name("kiln");
        if let Some(token) = &self.token {
            options = options.token(token.clone());
        }
        let client = runtime.block_on(options.connect(&self.url)).map_err(|e| {
            cannot("connect to").caused_by(e).hint("is the server running, and the address right?")
        })?;
        let context = {
            // It starts a task of its own.
            let _inside = runtime.enter();
            jetstream::new(client.clone())
        };
        Ok(Connection { context, client, runtime, place: self.place() })
    }
}

struct Connection {
    context: Context,
    client: Client,
    runtime: Runtime,
    place: String,
}

impl Connection {
    fn failed(&self, what: &str) -> Error {
        Error::work(format!("{}: {what}", self.place))
    }

    /// Does something within the server's time to answer; `None` when it did not answer.
    fn within<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async { timeout(PATIENCE, work).await.ok() })
    }
}

/// Takes records of a subject in order. The server remembers, under a name, which were acknowledged; one that was not within
/// a while comes again, so that each comes at least once whatever dies in between.
pub struct NatsReader {
    connection: Connection,
    consumer: PullConsumer,
}

/// Records that were taken and are to be acknowledged.
#[must_use = "records that are not acknowledged come again"]
pub struct Receipts(Vec<Message>);

impl NatsReader {
    /// Follows a subject as `name`, from where that name was, or from the first record. Records that are not acknowledged
    /// within `again` come again.
    ///
    /// # Errors
    /// When the server cannot be reached, no stream of it has the subject, or the name follows another one.
    pub fn open(subject: &Subject, name: &str, again: Duration) -> Result<Self> {
        let connection = subject.connect()?;
        let open = async {
            let stream = connection.context.stream_by_subject(&subject.name).await.map_err(|e| {
                connection
                    .failed("no stream of the server keeps this subject")
                    .caused_by(e)
                    .hint("JetStream must be on, and a stream be made, such as by `nats stream add`")
            })?;
            let stream = connection
                .context
                .get_stream(stream)
                .await
                .map_err(|e| connection.failed("the stream cannot be opened").caused_by(e))?;
            let config = pull::Config {
                durable_name: Some(name.into()),
                filter_subject: subject.name.clone(),
                ack_policy: AckPolicy::Explicit,
                ack_wait: again,
                ..pull::Config::default()
            };
            stream.get_or_create_consumer(name, config).await.map_err(|e| {
                connection.failed(&format!("cannot be followed under the name \"{name}\"")).caused_by(e)
            })
        };
        let consumer =
            connection.within(open).ok_or_else(|| connection.failed("the server does not answer"))??;
        let followed = &consumer.cached_info().config.filter_subject;
        if *followed != subject.name {
            return Err(connection
                .failed(&format!("the name \"{name}\" already follows the subject {followed}"))
                .hint("choose another name"));
        }
        Ok(Self { connection, consumer })
    }

    /// The server and the subject, for people.
    pub fn place(&self) -> &str {
        &self.connection.place
    }

    /// Whether there is a connection. One that is lost comes back by itself when the server does.
    pub fn is_connected(&self) -> bool {
        self.connection.client.connection_state() == async_nats::connection::State::Connected
    }

    /// Takes at most so many of the records that are there, none where the connection is lost. A record's number is that of
    /// the stream.
    ///
    /// # Errors
    /// When the server refuses them.
    pub fn take(&self, most: usize) -> Result<(Vec<Record>, Receipts)> {
        let (mut records, mut messages) = (Vec::new(), Vec::new());
        if !self.is_connected() {
            return Ok((records, Receipts(messages)));
        }
        let take = async {
            let mut batch = self.consumer.fetch().max_messages(most).messages().await?;
            while let Some(message) = batch.next().await {
                let mut message = message?;
                let offset = message.info()?.stream_sequence;
                records.push(Record { offset, payload: std::mem::take(&mut message.message.payload).into() });
                messages.push(message);
            }
            Ok::<_, async_nats::Error>(())
        };
        // What came before the connection was lost counts.
        match self.connection.within(take) {
            Some(Err(e)) if self.is_connected() => {
                Err(self.connection.failed("records cannot be taken").caused_by(e))
            }
            _ => Ok((records, Receipts(messages))),
        }
    }

    /// Tells the server that records need not come again. They do where the connection is lost meanwhile.
    pub fn acknowledge(&self, receipts: Receipts) {
        let acknowledge = async {
            for message in &receipts.0 {
                message.ack().await?;
            }
            self.connection.client.flush().await?;
            Ok::<_, async_nats::Error>(())
        };
        _ = self.connection.within(acknowledge);
    }
}

/// Appends records to a subject.
pub struct NatsWriter {
    connection: Connection,
    subject: String,
}

impl NatsWriter {
    /// Opens a subject; a server none of whose streams keeps it gets one, named as the subject with `-` for what names must
    /// not have.
    ///
    /// # Errors
    /// When the server cannot be reached or has no JetStream.
    pub fn open(subject: &Subject) -> Result<Self> {
        let connection = subject.connect()?;
        let name = subject.name.replace(|c: char| !c.is_ascii_alphanumeric() && c != '_', "-");
        let open = async {
            if connection.context.stream_by_subject(&subject.name).await.is_ok() {
                return Ok(());
            }
            let config =
                stream::Config { name, subjects: vec![subject.name.clone()], ..stream::Config::default() };
            connection.context.create_stream(config).await.map(drop)
        };
        let opened =
            connection.within(open).ok_or_else(|| connection.failed("the server does not answer"))?;
        opened.map_err(|e| {
            connection.failed("a stream cannot be made").caused_by(e).hint("is JetStream on?")
        })?;
        Ok(Self { connection, subject: subject.name.clone() })
    }

    /// Appends a record and returns its number, once the server has it.
    ///
    /// # Errors
    /// When it does not take it.
    pub fn append(&mut self, payload: Vec<u8>) -> Result<u64> {
        let append = async {
            let answer = self.connection.context.publish(self.subject.clone(), payload.into()).await?;
            Ok::<_, async_nats::Error>(answer.await?.sequence)
        };
        let appended = self.connection.within(append);
        let appended = appended.ok_or_else(|| self.connection.failed("the server does not answer"))?;
        appended.map_err(|e| self.connection.failed("a record was not taken").caused_by(e))
    }
}
