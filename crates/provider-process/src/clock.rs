//! The clocks of this machine.
//!
//! Deadlines that must survive a change of supervisor are kept in boot time: it never jumps, goes on during suspend,
//! and means the same to every process until the next boot, when there is nothing left to supervise.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use orchestra_model::time::UnixMillis;
use rustix::time::{ClockId, clock_gettime};

/// Wall-clock time, for people to read.
pub(crate) fn wall() -> UnixMillis {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Milliseconds since boot.
pub(crate) fn boot_millis() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let now = Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0));
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
}

/// A duration in whole milliseconds, saturating.
pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
