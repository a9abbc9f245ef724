//! Finds the living proxy of a home, or starts one.

use std::{
    io,
    os::{fd::OwnedFd, unix::net::UnixStream as StdUnixStream},
    process::Stdio,
    sync::Arc,
    time::Duration,
};

use orchestra_task::{TaskKind, TaskTree};
use tokio::{net::UnixStream, process::Command, sync::mpsc, time::Instant};

use super::{
    OpenError, Options,
    connection::{Connection, Greeting, News},
    supervisor::Reports,
};
use crate::{
    files::{EXIT_LOCKED, Files},
    wire::Snapshot,
};

/// Between two looks at a proxy that is just ending or just starting under somebody else.
const AGAIN: Duration = Duration::from_millis(20);

/// A proxy that is ours.
pub(super) struct Found {
    pub(super) connection: Arc<Connection>,
    /// What it has; empty for a new one.
    pub(super) snapshot: Snapshot,
    pub(super) fds: Vec<OwnedFd>,
}

/// Starts and finds proxies.
#[derive(Debug)]
pub(super) struct Launcher {
    options: Options,
    files: Files,
    tree: TaskTree,
    news: mpsc::Sender<News>,
    reports: Reports,
    number: u64,
}

impl Launcher {
    pub(super) fn new(
        options: Options,
        tree: TaskTree,
        news: mpsc::Sender<News>,
        reports: Reports,
    ) -> Result<Self, OpenError> {
        let files = Files::open(&options.home)
            .map_err(|source| OpenError::Directory { path: options.home.join("proxy"), source })?;
        Ok(Self { options, files, tree, news, reports, number: 0 })
    }

    /// The living proxy, or a new one. Tries again as long as patience allows while another one is ending.
    pub(super) async fn find_or_start(&mut self) -> Result<Found, OpenError> {
        let deadline = Instant::now() + self.options.patience;
        loop {
            let busy = match UnixStream::connect(self.files.socket()).await {
                Ok(stream) => match self.greet(stream).await {
                    Ok(Greeting::Welcome { connection, snapshot, fds }) => {
                        return Ok(Found { connection, snapshot, fds });
                    }
                    Ok(Greeting::Busy { reason }) => reason,
                    Err(error) => error.to_string(),
                },
                // No socket, or one that nobody listens on: nobody serves this home.
                Err(_) => match self.start().await? {
                    Some(found) => return Ok(found),
                    None => "it does not listen on its control socket".to_owned(),
                },
            };
            if Instant::now() >= deadline {
                return Err(OpenError::Busy { reason: busy });
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// Starts a proxy. `None` if another one holds the lock.
    pub(super) async fn start(&mut self) -> Result<Option<Found>, OpenError> {
        let program = self.options.proxy_program.clone();
        let failed = |reason: String| OpenError::Start { program: program.clone(), reason };
        let (ours, theirs) = StdUnixStream::pair().map_err(|e| failed(e.to_string()))?;
        let log = self.files.log().map_err(|e| failed(format!("its log cannot be opened: {e}")))?;
        let errors = log.try_clone().map_err(|e| failed(e.to_string()))?;
        let home = self.files.path().parent().expect("the proxy's directory lies in its home").to_owned();
        let mut child = Command::new(&program)
            .args(&self.options.proxy_args)
            .arg("--home")
            .arg(home)
            .arg("--control-stdin")
            // It needs nothing of the server's environment, which may hold secrets.
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(log)
            .stderr(errors)
            .kill_on_drop(false)
            .spawn()
            .map_err(|e| failed(e.to_string()))?;
        let greeted = async {
            ours.set_nonblocking(true)?;
            self.greet(UnixStream::from_std(ours)?).await
        };
        match greeted.await {
            Ok(Greeting::Welcome { connection, snapshot, fds }) => {
                // Only to reap it; its end is noticed on the control connection.
                self.tree.start(TaskKind::Connection, "proxy reaper", async move {
                    let status = child.wait().await;
                    tracing::info!(?status, "the proxy process ended");
                });
                Ok(Some(Found { connection, snapshot, fds }))
            }
            Ok(Greeting::Busy { reason }) => Err(failed(reason)),
            Err(error) => {
                let status = match tokio::time::timeout(self.options.patience, child.wait()).await {
                    Ok(Ok(status)) if status.code() == Some(i32::from(EXIT_LOCKED)) => return Ok(None),
                    Ok(Ok(status)) => status.to_string(),
                    Ok(Err(error)) => error.to_string(),
                    Err(_alive) => {
                        // It is ours and never served anything.
                        let _ = child.kill().await;
                        format!("it did not answer ({error})")
                    }
                };
                let words = self.files.last_words().map(|w| format!("; its log ends with: {w}")).unwrap_or_default();
                Err(failed(format!("{status}{words}")))
            }
        }
    }

    async fn greet(&mut self, stream: UnixStream) -> io::Result<Greeting> {
        self.number += 1;
        let (news, reports) = (self.news.clone(), self.reports.clone());
        Connection::greet(stream, self.number, self.options.patience, news, reports, &self.tree).await
    }
}
