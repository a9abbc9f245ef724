//! Time as a parameter.
//!
//! Pure code never reads a clock. A driver passes [`Now`], a point on a monotonic line that starts wherever the driver
//! says; wall-clock time appears only in records, stamped by the driver as Unix milliseconds, so that a changed system
//! clock can neither fire nor delay a deadline while a server lives. Deadlines in records serve the next server.

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

/// Wall-clock time in Unix milliseconds: for people to read, and for deadlines that outlive a server.
pub type UnixMillis = u64;

/// The date of a moment in UTC: `2026-11-21`. Howard Hinnant, "chrono-compatible low-level date algorithms",
/// `civil_from_days`.
pub fn date(at: UnixMillis) -> String {
    let days = at / 86_400_000 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

/// A moment as RFC 3339 in UTC: `2026-11-21T03:49:40.123Z`.
pub fn timestamp(at: UnixMillis) -> String {
    let rest = at % 86_400_000;
    let (hours, minutes, seconds) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1000 % 60);
    format!("{}T{hours:02}:{minutes:02}:{seconds:02}.{:03}Z", date(at), rest % 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_in_rfc_3339() {
        assert_eq!(timestamp(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(timestamp(951_782_400_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(timestamp(1_795_232_980_123), "2026-11-21T03:49:40.123Z");
    }
}
