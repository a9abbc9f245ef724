//! The provider port: start, find, stop and observe instances, and keep volumes and logs.

use std::{future::Future, pin::Pin};

use orchestra_model::{
    EnvironmentId, InstanceId, Name,
    launch::{Exec, ExecOutcome, Launch, LaunchKey, Observed, ProviderEvent, Termination, Usage},
    time::UnixMillis,
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::Error;

/// A boxed future: ports are boxed at layer boundaries so that no layer is generic over the one below.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A world that runs instances.
///
/// Every call is idempotent: asking again for what is already so is a success. Calls for different keys run in
/// parallel. Dropping a returned future does not undo or lose what it began.
pub trait Provider: Send + Sync + 'static {
    /// Starts one instance. Returns once the launch is recorded in the world, so that [`find_by_intent`] finds it after
    /// a crash of anybody; `Started` or `Exited` follow as events. A key that was started before is not started again.
    ///
    /// [`find_by_intent`]: Provider::find_by_intent
    fn start(&self, launch: Launch) -> BoxFuture<'_, Result<(), Error>>;

    /// Begins to end a launch: signal, grace, kill of the whole tree. `Exited` and `Gone` follow as events. Asking
    /// again can only shorten the grace. A launch that does not exist is a success and reported `Gone`.
    fn terminate(&self, key: LaunchKey, how: Termination) -> BoxFuture<'_, Result<(), Error>>;

    /// What became of an intent to start: `None` if nothing was ever started under this key, and then nothing will be.
    /// A launch that still runs is adopted: its events are delivered from now on, starting with its current state.
    fn find_by_intent(&self, key: LaunchKey) -> BoxFuture<'_, Result<Option<Observed>, Error>>;

    /// Every launch of an environment that the world knows, also ones that nobody asked for any more.
    fn observe(&self, environment: EnvironmentId) -> BoxFuture<'_, Result<Vec<Observed>, Error>>;

    /// Drops the world's record of a launch that is gone. Logs are kept as long as the retention says.
    fn forget(&self, key: LaunchKey) -> BoxFuture<'_, Result<(), Error>>;

    /// Runs a command beside an instance: same environment, directory, user and control group.
    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecOutcome, Error>>;

    /// What launches use now, for those of `keys` whose main process runs, in the same order. Only launches that this
    /// provider started or adopted ([`find_by_intent`]) are looked at. Nothing waits for it and it changes nothing: what
    /// cannot be sampled at once is left out, and a world that cannot measure leaves out all.
    ///
    /// [`find_by_intent`]: Provider::find_by_intent
    fn usage(&self, keys: Vec<LaunchKey>) -> BoxFuture<'_, Vec<(LaunchKey, Usage)>> {
        drop(keys);
        Box::pin(std::future::ready(Vec::new()))
    }

    /// Makes sure that a volume's directory exists.
    fn create_volume(&self, path: String) -> BoxFuture<'_, Result<(), Error>>;

    /// Whether a volume's directory exists.
    fn volume_exists(&self, path: String) -> BoxFuture<'_, Result<bool, Error>>;

    /// Deletes a volume with all that is in it. Refuses a path outside the provider's own volume folder.
    fn delete_volume(&self, path: String) -> BoxFuture<'_, Result<(), Error>>;

    /// Reads logs. The receiver ends when all was delivered, or, when following, when the reader drops it.
    fn logs(&self, query: LogQuery) -> BoxFuture<'_, Result<mpsc::Receiver<LogLine>, Error>>;

    /// Takes the receiver of all events of all launches. `None` after the first call.
    fn take_events(&self) -> Option<mpsc::Receiver<(LaunchKey, ProviderEvent)>>;
}

/// Which logs to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogQuery {
    /// Where.
    pub environment: EnvironmentId,
    /// Only these workloads; empty means all.
    pub workloads: Vec<Name>,
    /// Only this instance.
    pub instance: Option<InstanceId>,
    /// Only this stream.
    pub stream: Option<LogStream>,
    /// Only the last so many lines of each instance; `None` means all.
    pub tail: Option<usize>,
    /// Only what was written since.
    pub since: Option<UnixMillis>,
    /// Go on with what will be written, by instances that exist and ones that will.
    pub follow: bool,
}

/// Where a line was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogStream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A line of output, exactly as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogLine {
    /// Who wrote it.
    pub instance: InstanceId,
    /// In which of its starts.
    pub attempt: u32,
    /// Where to.
    pub stream: LogStream,
    /// When it arrived.
    pub at: UnixMillis,
    /// Its bytes, with the line feed if there was one. Lines over 64 KiB come in pieces.
    pub bytes: Vec<u8>,
}
