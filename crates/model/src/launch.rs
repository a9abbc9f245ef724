//! What a provider is told to run, and what it says of it.

use std::{collections::BTreeMap, fmt};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    desired::{Limit, Resources, Signal},
    id::{EnvironmentId, InstanceId, Name},
    quantity::{ByteSize, Timespan},
    text::Text,
    time::UnixMillis,
};

/// The idempotency key of one start of one instance: the same key never runs twice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub struct LaunchKey {
    /// Where.
    pub environment: EnvironmentId,
    /// Which.
    pub instance: InstanceId,
    /// Counts the starts of this instance, from 1.
    pub attempt: u32,
}

impl fmt::Display for LaunchKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}#{}", self.environment, self.instance, self.attempt)
    }
}

/// Everything a provider needs to start one instance: all texts filled, all ports chosen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Idempotency key.
    pub key: LaunchKey,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Absolute working directory.
    pub directory: String,
    /// The complete environment, documented minimum included, but for `secrets`.
    pub env: BTreeMap<String, String>,
    /// Variables that secrets are a part of; nothing else is left to be filled in them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub secrets: BTreeMap<String, Text>,
    /// User to run as; `None` is the user of the server.
    pub user: Option<String>,
    /// File mode creation mask.
    pub umask: u32,
    /// Resource limits.
    pub limits: BTreeMap<Limit, u64>,
    /// Limits of the control group.
    pub resources: Resources,
    /// The instance's ports by name (already in `env` as well).
    pub ports: BTreeMap<Name, u16>,
    /// Regular expression; the first line of output that matches is reported.
    pub ready_line: Option<String>,
    /// Whether the program gets a `NOTIFY_SOCKET`.
    pub notify: bool,
    /// Watchdog interval for the program.
    pub watchdog: Option<Timespan>,
    /// Longest log file before it is rotated, in bytes.
    pub log_max_bytes: u64,
    /// Rotated log files that are kept.
    pub log_keep: u32,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It returned this code.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
    /// It could not be started at all; the message is in [`Observed::message`].
    NotStarted,
    /// It is gone and nobody could see how: its supervisor and its kernel record were lost together.
    Unknown,
}

impl Exit {
    /// Whether it returned 0.
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Code(0))
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => {
                let name = match signal {
                    1 => " (SIGHUP)",
                    2 => " (SIGINT)",
                    3 => " (SIGQUIT)",
                    4 => " (SIGILL)",
                    6 => " (SIGABRT)",
                    7 => " (SIGBUS)",
                    8 => " (SIGFPE)",
                    9 => " (SIGKILL)",
                    11 => " (SIGSEGV)",
                    13 => " (SIGPIPE)",
                    15 => " (SIGTERM)",
                    _ => "",
                };
                write!(f, "signal {signal}{name}")
            }
            Self::NotStarted => f.write_str("not started"),
            Self::Unknown => f.write_str("unknown exit"),
        }
    }
}

/// What a provider sees of one launch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Observed {
    /// Which.
    pub key: LaunchKey,
    /// Main process, while it runs.
    pub pid: Option<u32>,
    /// When it was started.
    pub started_at: Option<UnixMillis>,
    /// `READY=1` was received.
    pub notified_ready: bool,
    /// A line matched `ready_line`.
    pub line_matched: bool,
    /// Last `STATUS=` text.
    pub status_text: Option<String>,
    /// How the main process ended, once it did.
    pub exit: Option<Exit>,
    /// Every process of its tree is proven gone and every byte of its logs is written.
    pub gone: bool,
    /// What went wrong, in words.
    pub message: Option<String>,
}

impl Observed {
    /// A launch of which nothing was seen yet.
    pub fn new(key: LaunchKey) -> Self {
        Self {
            key,
            pid: None,
            started_at: None,
            notified_ready: false,
            line_matched: false,
            status_text: None,
            exit: None,
            gone: false,
            message: None,
        }
    }
}

/// What the processes of one launch use, at the moment at which a provider looked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// CPU time that its whole tree has used since its start, user and system, ended processes included. It may fall
    /// where a world cannot count exactly; whoever computes a rate begins again then.
    pub cpu: std::time::Duration,
    /// Memory that its whole tree holds: what it is charged with less the file cache that can be given back at once
    /// (as Kubernetes' working set), or, where a world does not account for it, the resident pages, shared ones once.
    pub memory: ByteSize,
    /// Living processes of its tree.
    pub processes: u32,
}

/// Something that happened to a launch, as a provider reports it. Events of one launch come in order; after a
/// reconnect the provider reports the current state again, so each event may arrive more than once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProviderEvent {
    /// Its main process runs.
    Started {
        /// Main process.
        pid: u32,
    },
    /// It sent `READY=1`.
    NotifiedReady,
    /// It sent `RELOADING=1`; `READY=1` follows.
    NotifiedReloading,
    /// It sent `STOPPING=1`.
    NotifiedStopping,
    /// It sent `STATUS=…`.
    NotifiedStatus(String),
    /// It missed its watchdog interval.
    WatchdogMissed,
    /// A line of its output matched.
    LineMatched,
    /// Its main process ended; parts of its tree may still run.
    Exited {
        /// How.
        exit: Exit,
        /// What went wrong, in words.
        message: Option<String>,
    },
    /// Its tree is proven empty and its logs are complete. Always last, always after `Exited`.
    Gone,
}

/// A command that is run beside an instance, for an `exec` check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exec {
    /// The instance in whose environment, directory and user it runs.
    pub key: LaunchKey,
    /// Program and arguments.
    pub command: Vec<String>,
    /// After this it is killed.
    pub timeout: std::time::Duration,
}

/// What came of an [`Exec`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecOutcome {
    /// How it ended; `None` if it ran into its timeout and was killed.
    pub exit: Option<Exit>,
    /// First 4 KiB of what it printed.
    pub output: String,
}

/// A wish to end a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Termination {
    /// First signal, to the main process.
    pub signal: Signal,
    /// Then SIGKILL for the whole tree after this time.
    pub grace: Timespan,
}
