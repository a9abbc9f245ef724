//! Time as the pure parts of the proxy take it: since this process began to serve, so that it fits into one atomic.

use std::{sync::LazyLock, time::Duration};

use tokio::time::Instant;

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Now.
pub(crate) fn now() -> Duration {
    START.elapsed()
}

/// A moment; what was before the start is the start.
pub(crate) fn of(moment: Instant) -> Duration {
    moment.saturating_duration_since(*START)
}

/// Whole milliseconds, never 0: 0 stands for "never" in atomics.
pub(crate) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1)
}
