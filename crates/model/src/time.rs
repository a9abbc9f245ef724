//! Time as a parameter.
//!
//! Pure code never reads a clock. A driver passes [`Now`], a point on a monotonic line that starts wherever the driver
//! says; wall-clock time appears only in records, stamped by the driver as Unix milliseconds, so that a changed system
//! clock can neither fire nor delay a deadline.

use std::{
    ops::{Add, Sub},
    time::Duration,
};

/// A point in monotonic time, as the driver counts it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Now(Duration);

impl Now {
    /// The origin of the driver's time line.
    pub const ZERO: Self = Self(Duration::ZERO);

    /// The point that lies `since_origin` after the driver's origin.
    pub const fn at(since_origin: Duration) -> Self {
        Self(since_origin)
    }

    /// Time since the driver's origin.
    pub const fn since_origin(self) -> Duration {
        self.0
    }

    /// Time since `earlier`; zero if `earlier` is later.
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for Now {
    type Output = Self;
    fn add(self, by: Duration) -> Self {
        Self(self.0.saturating_add(by))
    }
}

impl Sub<Now> for Now {
    type Output = Duration;
    fn sub(self, earlier: Now) -> Duration {
        self.since(earlier)
    }
}

/// Wall-clock time in Unix milliseconds, for people to read; never compared to decide anything.
pub type UnixMillis = u64;
