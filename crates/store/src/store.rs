//! The store's handle: what the rest of the program holds.

use std::{
    future::Future,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
};

use orchestra_model::{Event, RunId, record::Change, time::UnixMillis};
use tokio::sync::{broadcast, oneshot};

use crate::{
    error::{CommitError, OpenError, ReadError},
    lock::Lock,
    reader::Reader,
    schema,
    writer::{Request, Work, Writer},
};

/// Events that a subscriber may lag behind before it must read them from the store instead.
const EVENTS_IN_FLIGHT: usize = 4096;

/// State and journal of one state directory. Clones are handles to the same; the lock is freed when the last is
/// dropped, after everything that was queued is on the disk.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// What a commit left behind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    /// Its events in order, with sequence numbers and times.
    pub events: Vec<Arc<Event>>,
    /// Wall-clock time that they carry.
    pub at: UnixMillis,
}

struct Inner {
    // `None` only while dropping. The mutex makes the sender shareable, and gives calls their order.
    queue: Mutex<Option<mpsc::Sender<Request>>>,
    thread: Mutex<Option<thread::JoinHandle<()>>>,
    events: broadcast::Sender<Arc<Event>>,
    reader: Reader,
    next_run: AtomicU64,
    next_route_version: AtomicU64,
}

impl Store {
    /// Takes the lock of the state directory `home` and opens its state; both are made if there are none. `clock` gives
    /// the wall-clock time with which events and journal lines are stamped.
    ///
    /// Blocks for some milliseconds, longer for a large state, whose structure is checked.
    pub fn open(home: &Path, clock: impl Fn() -> UnixMillis + Send + Sync + 'static) -> Result<Self, OpenError> {
        schema::private_directory(home)?;
        let lock = Lock::take(home)?;
        let connection = schema::open_writer(home)?;
        let (events, _) = broadcast::channel(EVENTS_IN_FLIGHT);
        let (writer, start) = Writer::new(home, connection, lock, Box::new(clock), events.clone())?;
        let reader = Reader::beside_writer(home);
        // Unbounded so that `commit` can queue without waiting. Every caller waits for the outcome of its commit before
        // it goes on, so the queue is as long as there are tasks at most.
        let (sender, queue) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("store-writer".to_owned())
            .spawn(move || writer.run(&queue))
            .map_err(|source| OpenError::Write { operation: "start the writer of", path: home.to_owned(), source })?;
        Ok(Self {
            inner: Arc::new(Inner {
                queue: Mutex::new(Some(sender)),
                thread: Mutex::new(Some(thread)),
                events,
                reader,
                next_run: AtomicU64::new(start.next_run),
                next_route_version: AtomicU64::new(start.next_route_version),
            }),
        })
    }

    /// Writes `changes` as a whole or not at all. Resolves once they are on the disk.
    ///
    /// They are queued before this returns: the order of calls is the order of commits, and dropping the future does
    /// not call them back. A refused commit does not hinder later ones.
    pub fn commit(
        &self,
        changes: Vec<Change>,
    ) -> impl Future<Output = Result<Committed, CommitError>> + Send + 'static + use<> {
        let (reply, outcome) = oneshot::channel();
        self.queue(Work::Commit(changes), move |result| {
            // The caller may have gone; the commit happened all the same.
            let _ = reply.send(result);
        });
        async move { outcome.await.unwrap_or(Err(CommitError::Closed)) }
    }

    /// [`Store::commit`] for callers outside of an async runtime; waits.
    pub fn commit_blocking(&self, changes: Vec<Change>) -> Result<Committed, CommitError> {
        self.wait(Work::Commit(changes))
    }

    /// Writes a setting: a value of the program itself that must outlive it. Waits until it is on the disk.
    pub fn set_setting_blocking(&self, key: &str, value: &serde_json::Value) -> Result<(), CommitError> {
        self.wait(Work::Setting(key.to_owned(), value.clone())).map(drop)
    }

    /// A run id that no run has. Counts up; ids that are not committed before the end of the process are given again.
    pub fn next_run_id(&self) -> RunId {
        RunId(self.inner.next_run.fetch_add(1, Ordering::Relaxed))
    }

    /// A number above all that it has given before, also before a restart or crash. Below 2^53 for the first million
    /// restarts, so that JSON readers everywhere keep it exact.
    pub fn next_route_version(&self) -> u64 {
        self.inner.next_route_version.fetch_add(1, Ordering::Relaxed)
    }

    /// Answers questions. Blocks the caller for as long as SQLite needs: in async code use [`Store::read`] unless the
    /// answer is a single row.
    pub fn reader(&self) -> &Reader {
        &self.inner.reader
    }

    /// Asks a question on a thread that may block.
    pub async fn read<T, F>(&self, question: F) -> Result<T, ReadError>
    where
        T: Send + 'static,
        F: FnOnce(&Reader) -> Result<T, ReadError> + Send + 'static,
    {
        let reader = self.inner.reader.clone();
        match tokio::task::spawn_blocking(move || question(&reader)).await {
            Ok(answer) => answer,
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            Err(_) => Err(ReadError::ShuttingDown),
        }
    }

    /// Events from now on, each once it is on the disk, in the order of their sequence numbers. A receiver that lags
    /// too far is told so, and reads what it missed with [`Reader::events`].
    pub fn subscribe_events(&self) -> broadcast::Receiver<Arc<Event>> {
        self.inner.events.subscribe()
    }

    fn wait(&self, work: Work) -> Result<Committed, CommitError> {
        let (reply, outcome) = mpsc::sync_channel(1);
        self.queue(work, move |result| {
            let _ = reply.send(result);
        });
        outcome.recv().unwrap_or(Err(CommitError::Closed))
    }

    fn queue(&self, work: Work, reply: impl FnOnce(Result<Committed, CommitError>) + Send + 'static) {
        let request = Request { work, reply: Box::new(reply) };
        let queue = self.inner.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = &*queue
            && let Err(mpsc::SendError(request)) = queue.send(request)
        {
            // The writer is gone: it panicked, which is a defect.
            (request.reply)(Err(CommitError::Closed));
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Without a sender the writer finishes its queue and ends; then nobody holds the lock.
        drop(self.queue.get_mut().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take()
            && thread.join().is_err()
        {
            tracing::error!("the writer of the state panicked");
        }
    }
}
