//! How two processes make sure of each other before anything else is said.
//!
//! Both sides send a greeting: a magic, the protocol version and a nonce. Each answers the other's nonce with its
//! HMAC-SHA256 under the shared token, and closes the connection when the answer is wrong. Without a token the key is
//! empty, and only loopback addresses are let in. Then short messages follow: a length of four bytes, and JSON.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use hmac::{Hmac, Mac};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Sha256;

/// Grows with every change of what is said on a connection.
pub const VERSION: u32 = 1;

/// How long a stranger may take for each part of its greeting.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest short message.
const LONGEST: usize = 1 << 20;

const MAGIC: [u8; 8] = *b"KILNRANK";

/// Which end of a connection; part of the proof, so that an answer cannot be sent back as one's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Caller,
    Listener,
}

/// Makes sure that the other side is one of ours, or says why it is not.
pub fn greet(stream: &mut TcpStream, own: End, token: &str) -> Result<(), String> {
    let io = |doing: &'static str| move |e: io::Error| format!("{doing}: {e}");
    stream.set_nodelay(true).map_err(io("cannot prepare the connection"))?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(io("cannot prepare the connection"))?;
    let mut nonce = [0u8; 32];
    getrandom::fill(&mut nonce).map_err(|e| format!("the system has no random numbers: {e}"))?;
    stream.write_all(&[&MAGIC[..], &VERSION.to_le_bytes(), &nonce].concat()).map_err(io("cannot greet"))?;

    let mut magic = [0u8; 8];
    stream.read_exact(&mut magic).map_err(io("it did not greet"))?;
    if magic != MAGIC {
        return Err(format!("not a rank of Kiln: it said {:?}", String::from_utf8_lossy(&magic)));
    }
    let (mut version, mut theirs) = ([0u8; 4], [0u8; 32]);
    stream.read_exact(&mut version).map_err(io("it did not greet"))?;
    stream.read_exact(&mut theirs).map_err(io("it did not greet"))?;
    let version = u32::from_le_bytes(version);
    if version != VERSION {
        return Err(format!(
            "protocol version {version} there, {VERSION} here; use the same Kiln on both sides"
        ));
    }
    let proof = |end: End, nonce: [u8; 32]| {
        let key = Hmac::<Sha256>::new_from_slice(token.as_bytes()).expect("HMAC takes keys of any length");
        key.chain_update([end as u8]).chain_update(nonce)
    };
    let other = if own == End::Caller { End::Listener } else { End::Caller };
    stream.write_all(&proof(own, theirs).finalize().into_bytes()).map_err(io("cannot answer"))?;
    let mut answer = [0u8; 32];
    stream.read_exact(&mut answer).map_err(|_| "it hung up; is the --cluster-token the same?".to_string())?;
    // Compared in constant time.
    proof(other, nonce).verify_slice(&answer).map_err(|_| "the --cluster-token differs".to_string())?;
    stream.set_read_timeout(None).map_err(io("cannot prepare the connection"))
}

/// Sends a short message.
pub fn say(stream: &mut TcpStream, message: &impl Serialize) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let mut bytes = (text.len() as u32).to_le_bytes().to_vec();
    bytes.extend(text);
    stream.write_all(&bytes)
}

/// Receives a short message.
pub fn hear<M: DeserializeOwned>(stream: &mut TcpStream) -> io::Result<M> {
    let mut length = [0u8; 4];
    stream.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if length > LONGEST {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a message of {length} bytes")));
    }
    let mut text = vec![0; length];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}
