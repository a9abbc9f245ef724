//! One question asked once: connects, asks, reads, and says in a few words what came of it.
//!
//! Every check opens a connection of its own and closes it afterwards. A kept one would prove only that an old
//! connection still works: not that the peer accepts new ones, which is what its clients need. It would also cost memory
//! on both sides for every target, look like a failure whenever the peer closes it for being idle, and keep an instance
//! from ending that waits for its connections to close.
//!
//! What fails on this side (no file descriptor, no memory, no local port) is no answer of the target: it is reported as
//! not asked, so that a starved server does not restart everything that it looks after.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use orchestra_model::{
    launch::{Exec, Exit},
    quantity::Timespan,
};
use orchestra_provider::{Provider, Retry};
use orchestra_task::TaskTree;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    grpc, http,
    target::{Leaf, Target},
};

/// Characters of a detail.
const DETAIL: usize = 200;

/// Extra time that a provider gets to report a command that ran into its timeout.
const COMMAND_MARGIN: Duration = Duration::from_secs(1);

/// What checks need beside their target.
pub(crate) struct World {
    pub(crate) provider: Arc<dyn Provider>,
    pub(crate) tree: TaskTree,
}

/// A question that is ready to be asked.
pub(crate) struct Check {
    kind: Kind,
    timeout: Duration,
}

enum Kind {
    Http(http::Request),
    Tcp(SocketAddr),
    Grpc(grpc::Request),
    Command(Exec),
    /// It can never be asked; the reason.
    Invalid(String),
}

/// What came of asking, in words.
#[derive(Debug)]
pub(crate) enum Verdict {
    Passed(String),
    Failed(String),
    NotAsked(String),
}

/// Why a check did not pass.
#[derive(Debug)]
pub(crate) enum Fault {
    /// The peer's answer, or its absence.
    Answer(String),
    /// A socket operation.
    Io(io::Error),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

// === impl Check ===

impl Check {
    pub(crate) fn new(target: &Target) -> Self {
        let kind = match &target.leaf {
            Leaf::Http(check) => match http::Request::new(check) {
                Ok(request) => Kind::Http(request),
                Err(reason) => Kind::Invalid(reason),
            },
            Leaf::Tcp { address } => Kind::Tcp(*address),
            Leaf::Grpc { address, service } => Kind::Grpc(grpc::Request::new(*address, service, target.timeout)),
            Leaf::Exec(exec) => Kind::Command(Exec { timeout: target.timeout, ..exec.clone() }),
        };
        Self { kind, timeout: target.timeout }
    }

    pub(crate) fn is_command(&self) -> bool {
        matches!(self.kind, Kind::Command(_))
    }

    pub(crate) async fn run(&self, world: &World) -> Verdict {
        let mut stage = "while connecting";
        let answer = match &self.kind {
            Kind::Http(request) => timeout(self.timeout, request.ask(&mut stage)).await,
            Kind::Tcp(address) => timeout(self.timeout, ask_tcp(*address)).await,
            // Boxed: hyper's futures would triple the size of every check's task.
            Kind::Grpc(request) => timeout(self.timeout, Box::pin(request.ask(&world.tree, &mut stage))).await,
            Kind::Command(exec) => return run_command(exec, world).await,
            Kind::Invalid(reason) => return Verdict::Failed(clean(reason)),
        };
        match answer {
            Ok(Ok(detail)) => Verdict::Passed(clean(&detail)),
            Ok(Err(Fault::Answer(detail))) => Verdict::Failed(clean(&detail)),
            Ok(Err(Fault::Io(error))) if is_starved(&error) => Verdict::NotAsked(words(&error)),
            Ok(Err(Fault::Io(error))) => Verdict::Failed(clean(&words(&error))),
            Err(_) => Verdict::Failed(format!("{} {stage}", timed_out(self.timeout))),
        }
    }
}

async fn ask_tcp(address: SocketAddr) -> Result<String, Fault> {
    let mut socket = Socket::connect(address).await?;
    socket.answered();
    Ok("connected".to_owned())
}

async fn run_command(exec: &Exec, world: &World) -> Verdict {
    let Ok(result) = timeout(exec.timeout + COMMAND_MARGIN, world.provider.exec(exec.clone())).await else {
        return Verdict::Failed(timed_out(exec.timeout));
    };
    match result {
        Ok(outcome) => {
            let first_line = outcome.output.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim();
            let said = if first_line.is_empty() { String::new() } else { format!(": {first_line}") };
            match outcome.exit {
                None => Verdict::Failed(clean(&format!("{}{said}", timed_out(exec.timeout)))),
                Some(exit @ Exit::Code(0)) => Verdict::Passed(exit.to_string()),
                Some(exit) => Verdict::Failed(clean(&format!("{exit}{said}"))),
            }
        }
        // The provider says that trying again helps: the world was busy, the target was not asked.
        Err(error) if matches!(error.retry, Retry::After(_)) => Verdict::NotAsked(error.message),
        Err(error) => Verdict::Failed(clean(&error.message)),
    }
}

/// Opens a connection for one check.
pub(crate) async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    refuse_itself(TcpStream::connect(address).await?)
}

/// A port of this machine that nobody listens on can be chosen as the source port of the very connection to it, which
/// then connects to itself (RFC 9293, simultaneous open). That is no answer, and it holds the port.
fn refuse_itself(stream: TcpStream) -> io::Result<TcpStream> {
    if stream.local_addr()? == stream.peer_addr()? {
        stream.set_zero_linger()?;
        return Err(io::ErrorKind::ConnectionRefused.into());
    }
    Ok(stream)
}

// === impl Socket ===

/// A connection that is reset when it is dropped before its answer was complete, so that nothing of a broken-off check
/// lingers on either side, and closed in the ordinary way otherwise, so that no peer logs an error for a passing check.
pub(crate) struct Socket {
    stream: TcpStream,
    answered: bool,
}

impl Socket {
    pub(crate) async fn connect(address: SocketAddr) -> io::Result<Self> {
        Ok(Self::of(connect(address).await?))
    }

    /// A connection that is there.
    pub(crate) const fn of(stream: TcpStream) -> Self {
        Self { stream, answered: false }
    }

    /// The answer is complete.
    pub(crate) fn answered(&mut self) {
        self.answered = true;
    }

    pub(crate) fn stream(&mut self) -> &mut TcpStream {
        &mut self.stream
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if !self.answered {
            // Without it the kernel closes in the ordinary way, which is merely slower.
            let _ = self.stream.set_zero_linger();
        }
    }
}

// === words ===

fn timed_out(after: Duration) -> String {
    // Whole microseconds at least, so that the text is never empty.
    let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
    format!("timeout after {}", Timespan::millis(millis))
}

/// That nothing came in time, and at what `stage`: `no answer within 5s while connecting`.
pub(crate) fn no_answer(within: Duration, stage: &str) -> String {
    let millis = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
    format!("no answer within {} {stage}", Timespan::millis(millis)).trim_end().to_owned()
}

/// Whether this side lacks something that the connection needs.
fn is_starved(error: &io::Error) -> bool {
    const ENOMEM: i32 = 12;
    const ENFILE: i32 = 23;
    const EMFILE: i32 = 24;
    const EADDRNOTAVAIL: i32 = 99;
    const ENOBUFS: i32 = 105;
    matches!(error.raw_os_error(), Some(ENOMEM | ENFILE | EMFILE | EADDRNOTAVAIL | ENOBUFS))
}

pub(crate) fn words(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "connection refused".to_owned(),
        io::ErrorKind::ConnectionReset => "connection reset by the peer".to_owned(),
        io::ErrorKind::BrokenPipe => "connection closed by the peer".to_owned(),
        io::ErrorKind::HostUnreachable => "host unreachable".to_owned(),
        io::ErrorKind::NetworkUnreachable => "network unreachable".to_owned(),
        _ => {
            let text = error.to_string();
            text.split(" (os error").next().unwrap_or_default().to_lowercase()
        }
    }
}

/// One line of printable characters, whatever the peer sent: details end on terminals and in logs.
pub(crate) fn clean(text: &str) -> String {
    let unprintable = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let mut characters = text.chars().map(|c| if unprintable(c) { '?' } else { c });
    let mut cleaned: String = characters.by_ref().take(DETAIL - 1).collect();
    if let Some(last) = characters.next() {
        cleaned.push(if characters.next().is_some() { '…' } else { last });
    }
    cleaned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_one_short_printable_line() {
        assert_eq!(clean("a\r\nb\x1b[31m\u{202e}c"), "a??b?[31m?c");
        assert_eq!(clean(&"x".repeat(200)), "x".repeat(200));
        assert_eq!(clean(&"x".repeat(201)), format!("{}…", "x".repeat(199)));
        assert_eq!(timed_out(Duration::from_millis(3_500)), "timeout after 3s500ms");
    }

    #[tokio::test]
    async fn a_connection_to_itself_is_no_answer() {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = socket.local_addr().unwrap();
        let own = socket.connect(address).await.expect("the kernel connects a socket to itself");
        assert_eq!(refuse_itself(own).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let listener = tokio::net::TcpListener::bind(address).await.expect("the port is free at once");
        assert!(connect(address).await.is_ok());
        drop(listener);
    }

    #[test]
    fn a_lack_on_this_side_is_told_apart() {
        assert!(is_starved(&io::Error::from_raw_os_error(24)));
        assert!(!is_starved(&io::Error::from_raw_os_error(111)));
    }
}
