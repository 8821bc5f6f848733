//! What a back end is: a way to bring a message into another rank's mailbox.

use std::any::Any;
use std::sync::Arc;

use crate::call::Call;
use crate::error::ClusterError;
use crate::mailbox::Mailbox;
use crate::threads::Meetings;

/// One rank's link to the others; all a back end implements.
pub(crate) trait Transport: Send + Sync {
    /// This rank in the world.
    fn rank(&self) -> usize;

    /// Ranks in the world.
    fn size(&self) -> usize;

    /// Brings a message to a rank's mailbox, messages of one pair in their order; returns when the payload may be
    /// used again. Errors are of the link: the caller adds what it was doing.
    fn send(&self, to: usize, header: Header, payload: Payload<'_>) -> Result<(), ClusterError>;

    /// Where messages for this rank arrive.
    fn mailbox(&self) -> &Mailbox;

    /// Looks for arrived messages, where nothing else does so; called while a rank waits.
    fn progress(&self) -> Progress {
        Progress::ByItself
    }

    /// Tells everyone else what this rank is doing, for their error messages.
    fn announce(&self, _call: Option<Call>) {}

    /// What ranks were last seen to do, where that is known.
    fn calls(&self) -> Vec<(usize, String)> {
        Vec::new()
    }

    /// Ends the work of all ranks with this error. The first error stays.
    fn fail(&self, error: ClusterError);

    /// Where ranks that share memory meet.
    fn meetings(&self) -> Option<&Arc<Meetings>> {
        None
    }

    /// Latency in seconds and bandwidth in bytes per second, as assumed before it is measured.
    fn assumed_link(&self) -> (f64, f64);
}

/// Who looks for arrived messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Threads of the transport; a rank that waits may sleep.
    ByItself,
}

/// What goes before a message's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    /// The group in which it is sent.
    pub group: u64,
    /// The number of the collective call in the group; zero for point to point.
    pub sequence: u64,
    /// What the sender called.
    pub call: Call,
    /// Bytes of payload.
    pub length: u64,
    /// On an emulated link: when the message arrives, in nanoseconds of the system clock; otherwise zero.
    pub due: u64,
}

impl Header {
    /// The stream within the group in which messages keep their order.
    pub fn channel(&self) -> Channel {
        match (self.call.operation, self.call.root) {
            (crate::Operation::Send, Some(tag)) => Channel::Tag(tag),
            _ => Channel::Collective,
        }
    }
}

/// Streams of messages between two ranks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Channel {
    Collective,
    Tag(u32),
}

/// What is sent.
pub(crate) enum Payload<'a> {
    /// Bytes that stay the caller's.
    Borrowed(&'a [u8]),
    /// A vector given away.
    Owned(Box<dyn Owned>),
}

impl Payload<'_> {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Borrowed(bytes) => bytes,
            Self::Owned(vector) => vector.bytes(),
        }
    }

    /// The payload as something that outlives the call.
    pub fn into_owned(self) -> Box<dyn Owned> {
        match self {
            Self::Borrowed(bytes) => Box::new(bytes.to_vec()),
            Self::Owned(vector) => vector,
        }
    }
}

/// A vector of any element type.
pub(crate) trait Owned: Send {
    fn bytes(&self) -> &[u8];
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<T: bytemuck::Pod + Send> Owned for Vec<T> {
    fn bytes(&self) -> &[u8] {
        bytemuck::cast_slice(self)
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// An arrived message.
pub(crate) struct Message {
    pub header: Header,
    pub payload: Box<dyn Owned>,
}
