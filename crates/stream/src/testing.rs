//! What tests of subjects stand on.

use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::nats::Subject;

/// A server of NATS with JetStream on this machine, killed when it is dropped.
pub struct NatsServer {
    process: Child,
    /// Where it listens.
    pub port: u16,
}

impl NatsServer {
    /// Starts a server that keeps its streams in `folder`, on a port or any that is free; `None` where `nats-server` is not
    /// installed, which is said.
    ///
    /// # Panics
    /// When it is there and does not come up.
    pub fn start(folder: &Path, port: Option<u16>) -> Option<Self> {
        let free = || TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = port.unwrap_or_else(|| free().expect("this machine has ports").port());
        let process = Command::new("nats-server")
            .args(["--jetstream", "--addr", "127.0.0.1", "--port", &port.to_string(), "--store_dir"])
            .arg(folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(process) = process else {
            println!("skipped: install nats-server");
            return None;
        };
        let server = Self { process, port };
        for _ in 0..1000 {
            if TcpStream::connect(("127.0.0.1", port)).is_ok() {
                return Some(server);
            }
            thread::sleep(Duration::from_millis(20));
        }
        panic!("nats-server does not come up on port {port}");
    }

    /// A subject of this server.
    pub fn subject(&self, name: &str) -> Subject {
        Subject { url: format!("nats://127.0.0.1:{}", self.port), name: name.into(), token: None }
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        // Gone already is as good.
        _ = self.process.kill();
        _ = self.process.wait();
    }
}
