//! The engine's clock: monotonic time for decisions, wall-clock time for people.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use orchestra_model::{Now, time::UnixMillis};
use tokio::time::Instant;

/// Monotonic time since the control plane started, and the wall clock.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    origin: Instant,
}

impl Clock {
    /// A clock that starts now.
    pub fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// Now, for machines.
    pub fn now(&self) -> Now {
        Now::at(self.origin.elapsed())
    }

    /// The instant of a machine's deadline.
    pub fn instant(&self, at: Now) -> Instant {
        self.origin + at.since_origin()
    }

    /// Unix milliseconds, for people. 0 if the system clock is before 1970.
    pub fn wall() -> UnixMillis {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        UnixMillis::try_from(since.as_millis()).unwrap_or(UnixMillis::MAX)
    }
}
