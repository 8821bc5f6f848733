//! Serving over HTTP: what every command that answers requests does around its own router.

use std::net::TcpListener;
use std::thread;
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::StatusCode;
use kiln_core::{Context, Error, ErrorKind, Result};
use tokio::sync::oneshot;

/// How often the main thread looks whether to stop.
const POLL: Duration = Duration::from_millis(100);
/// How long requests under way may take after that.
const GRACE: Duration = Duration::from_secs(5);

/// Listens on `host` and `port` (0: any that is free).
///
/// # Errors
/// When the address is taken or not this machine's.
pub fn listen(host: &str, port: u16) -> Result<TcpListener> {
    TcpListener::bind((host, port)).map_err(|e| {
        Error::io("listen on", format!("{host}:{port}"))(e)
            .hint("choose another --port (0 takes any that is free) or --host")
    })
}

/// Answers requests until Ctrl-C; those under way then have five seconds. `announcement` makes of the address what the
/// person is told.
///
/// # Errors
/// When the operating system gives no threads, or the socket fails.
pub fn serve(
    listener: TcpListener,
    router: Router,
    announcement: impl FnOnce(&str) -> String,
    cx: &Context,
) -> Result<()> {
    let address = listener.local_addr().map_err(Error::io("find out", "the server's address"))?.to_string();
    listener.set_nonblocking(true).map_err(Error::io("listen on", &address))?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(Error::io("start", "the server's threads"))?;
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        // Dropping the sender ends the waiting, too.
        axum::serve(listener, router).with_graceful_shutdown(async { drop(stopped.await) }).await
    });
    cx.note(announcement(&format!("http://{address}")));
    while !cx.interrupted() && !serving.is_finished() {
        thread::sleep(POLL);
    }
    drop(stop);
    let asked = Instant::now();
    while !serving.is_finished() && asked.elapsed() < GRACE {
        thread::sleep(POLL / 10);
    }
    let served = if serving.is_finished() { runtime.block_on(serving) } else { Ok(Ok(())) };
    runtime.shutdown_timeout(GRACE);
    served
        .map_err(|e| Error::work("the server has failed").caused_by(e))?
        .map_err(Error::io("serve on", &address))
}

/// The status that tells a client whose fault an error is.
pub fn status(error: &Error) -> StatusCode {
    match error.kind() {
        ErrorKind::Usage | ErrorKind::Input => StatusCode::BAD_REQUEST,
        ErrorKind::Io | ErrorKind::Work | ErrorKind::Interrupted => StatusCode::INTERNAL_SERVER_ERROR,
    }
}
