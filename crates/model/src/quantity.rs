//! Quantities with the notations that people know from Compose and Kubernetes.
//!
//! Each type parses the text that a user writes, prints the shortest text that parses back to the same value, and
//! serializes as that text.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    str::FromStr,
    time::Duration,
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::id::text_serde;

/// Why a text is no quantity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a {kind}: write {form}")]
pub struct ParseQuantityError {
    text: String,
    kind: &'static str,
    form: &'static str,
}

impl ParseQuantityError {
    fn new(text: &str, kind: &'static str, form: &'static str) -> Self {
        Self { text: text.chars().take(40).collect(), kind, form }
    }
}

/// A length of time: `250ms`, `30s`, `1m30s`, `2h`, `7d`; at most 10 years.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timespan(Duration);

impl Timespan {
    const MAX: Duration = Duration::from_secs(10 * 366 * 86_400);

    /// From whole seconds.
    pub const fn seconds(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// From whole milliseconds.
    pub const fn millis(millis: u64) -> Self {
        Self(Duration::from_millis(millis))
    }

    /// As a standard duration.
    pub const fn duration(self) -> Duration {
        self.0
    }
}

impl From<Timespan> for Duration {
    fn from(span: Timespan) -> Duration {
        span.0
    }
}

impl FromStr for Timespan {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let error = || {
            ParseQuantityError::new(
                text,
                "duration",
                "a number with a unit, such as `250ms`, `30s`, `1m30s`, `2h` or `7d`",
            )
        };
        if text == "0" {
            return Ok(Self(Duration::ZERO));
        }
        let mut rest = text;
        let mut total = Duration::ZERO;
        let mut last_unit = u128::MAX;
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
            let (number, tail) = rest.split_at(digits);
            let letters = tail.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(tail.len());
            let (unit, tail) = tail.split_at(letters);
            let micros: u128 = match unit {
                "us" => 1,
                "ms" => 1_000,
                "s" => 1_000_000,
                "m" => 60_000_000,
                "h" => 3_600_000_000,
                "d" => 86_400_000_000,
                _ => return Err(error()),
            };
            // Units go from large to small, each once: `1s1m` is a typing error more often than a wish.
            if micros >= last_unit {
                return Err(error());
            }
            last_unit = micros;
            let micros = decimal(number, micros).ok_or_else(error)?;
            total = total
                .checked_add(Duration::from_micros(u64::try_from(micros).map_err(|_| error())?))
                .ok_or_else(error)?;
            rest = tail;
        }
        if total > Self::MAX {
            return Err(ParseQuantityError::new(text, "duration", "at most ten years, `3660d`"));
        }
        if text.is_empty() { Err(error()) } else { Ok(Self(total)) }
    }
}

/// `number * scale` for a plain decimal number, exactly; `None` if malformed, too large or not whole after scaling.
fn decimal(number: &str, scale: u128) -> Option<u128> {
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() || whole.len() > 20 || fraction.len() > 9 || (number.contains('.') && fraction.is_empty()) {
        return None;
    }
    let whole: u128 = whole.parse().ok()?;
    let mut value = whole.checked_mul(scale)?;
    if !fraction.is_empty() {
        let divisor = 10u128.pow(u32::try_from(fraction.len()).ok()?);
        let part = fraction.parse::<u128>().ok()?.checked_mul(scale)?;
        if part % divisor != 0 {
            return None;
        }
        value = value.checked_add(part / divisor)?;
    }
    Some(value)
}

impl fmt::Display for Timespan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut micros = self.0.as_micros();
        if micros == 0 {
            return f.pad("0s");
        }
        let mut text = String::new();
        for (unit, size) in
            [("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000), ("us", 1)]
        {
            if micros >= size {
                let _ = write!(text, "{}{unit}", micros / size);
                micros %= size;
            }
        }
        f.pad(&text)
    }
}

text_serde!(
    Timespan,
    "Timespan",
    r"^(0|([0-9]+(\.[0-9]+)?(us|ms|s|m|h|d))+)$",
    "A duration such as `250ms`, `30s`, `1m30s`, `2h` or `7d`."
);

/// An amount of memory or storage: `512Mi`, `1Gi`, `100M`, `64k`, or plain bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    const UNITS: [(&'static str, u64); 8] = [
        ("Ti", 1 << 40),
        ("T", 1_000_000_000_000),
        ("Gi", 1 << 30),
        ("G", 1_000_000_000),
        ("Mi", 1 << 20),
        ("M", 1_000_000),
        ("Ki", 1 << 10),
        ("k", 1_000),
    ];

    /// From bytes.
    pub const fn bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let error =
            || ParseQuantityError::new(text, "size", "bytes or a number with a unit, such as `512Mi`, `1Gi` or `100M`");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let scale = match unit {
            "" | "B" => 1,
            "K" | "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "TB" => 1_000_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => Self::UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?.1,
        };
        let bytes = decimal(number, u128::from(scale)).ok_or_else(error)?;
        u64::try_from(bytes).map(Self).map_err(|_| error())
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in Self::UNITS {
            if self.0 > 0 && self.0.is_multiple_of(size) {
                return f.pad(&format!("{}{unit}", self.0 / size));
            }
        }
        f.pad(&self.0.to_string())
    }
}

text_serde!(
    ByteSize,
    "ByteSize",
    r"^[0-9]+(\.[0-9]+)?((k|K|M|G|T)i?B?|B)?$",
    "A size such as `512Mi`, `1Gi`, `100M` or plain bytes."
);

/// An amount of CPU in thousandths of a core: `250m`, `1`, `1.5`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpu(u64);

impl Cpu {
    /// From thousandths of a core.
    pub const fn millis(millis: u64) -> Self {
        Self(millis)
    }

    /// In thousandths of a core.
    pub const fn as_millis(self) -> u64 {
        self.0
    }
}

impl FromStr for Cpu {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let error =
            || ParseQuantityError::new(text, "CPU quantity", "cores or thousandths, such as `2`, `0.5` or `250m`");
        let millis = match text.strip_suffix('m') {
            Some(millis) => decimal(millis, 1),
            None => decimal(text, 1000),
        };
        millis.and_then(|m| u64::try_from(m).ok()).filter(|m| *m <= 1_000_000_000).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_multiple_of(1000) { f.pad(&(self.0 / 1000).to_string()) } else { f.pad(&format!("{}m", self.0)) }
    }
}

text_serde!(Cpu, "Cpu", r"^[0-9]+(\.[0-9]+)?m?$", "CPU in cores or thousandths, such as `2`, `0.5` or `250m`.");

/// A share of something, in thousandths of a percent point: `25%`, `0.1%`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Percent(u32);

impl Percent {
    /// From whole percents.
    pub const fn whole(percent: u32) -> Self {
        Self(percent * 1000)
    }

    /// From thousandths of a percent point; more than 100 % become 100 %.
    pub const fn thousandths(thousandths: u32) -> Self {
        Self(if thousandths > 100_000 { 100_000 } else { thousandths })
    }

    /// In thousandths of a percent point.
    pub const fn as_thousandths(self) -> u32 {
        self.0
    }

    /// This share of `total`, rounded up.
    pub fn of_rounded_up(self, total: u32) -> u32 {
        u32::try_from((u64::from(total) * u64::from(self.0)).div_ceil(100_000)).unwrap_or(u32::MAX)
    }

    /// This share of `total`, rounded down.
    pub fn of_rounded_down(self, total: u32) -> u32 {
        u32::try_from(u64::from(total) * u64::from(self.0) / 100_000).unwrap_or(u32::MAX)
    }
}

impl FromStr for Percent {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let error =
            || ParseQuantityError::new(text, "percentage", "a number from 0 to 100 with `%`, such as `25%` or `0.1%`");
        let number = text.strip_suffix('%').ok_or_else(error)?;
        let value = decimal(number.trim_end(), 1000).ok_or_else(error)?;
        u32::try_from(value).ok().filter(|v| *v <= 100_000).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for Percent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        if rest == 0 {
            return f.pad(&format!("{whole}%"));
        }
        f.pad(&format!("{whole}.{}%", format!("{rest:03}").trim_end_matches('0')))
    }
}

text_serde!(Percent, "Percent", r"^[0-9]+(\.[0-9]+)? ?%$", "A share such as `25%`.");

/// A measured or wanted quantity without a unit of its own, in thousandths, as the quantities of Kubernetes' metrics are
/// kept: `100`, `0.5`, `1.25`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Measure(u64);

impl Measure {
    /// From a whole number; the largest measure if it is too large.
    pub const fn whole(number: u64) -> Self {
        Self(number.saturating_mul(1000))
    }

    /// From thousandths.
    pub const fn thousandths(thousandths: u64) -> Self {
        Self(thousandths)
    }

    /// In thousandths.
    pub const fn as_thousandths(self) -> u64 {
        self.0
    }

    /// The number without what follows the point.
    pub const fn floor(self) -> u64 {
        self.0 / 1000
    }
}

impl FromStr for Measure {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        let error =
            || ParseQuantityError::new(text, "number", "a number with at most three decimals, such as `100` or `0.5`");
        let thousandths = decimal(text, 1000).ok_or_else(error)?;
        u64::try_from(thousandths).map(Self).map_err(|_| error())
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, rest) = (self.0 / 1000, self.0 % 1000);
        if rest == 0 {
            return f.pad(&whole.to_string());
        }
        f.pad(&format!("{whole}.{}", format!("{rest:03}").trim_end_matches('0')))
    }
}

text_serde!(
    Measure,
    "Measure",
    r"^[0-9]+(\.[0-9]{1,9})?$",
    "A number with at most three decimals, such as `100` or `0.5`."
);

/// A number of instances, or a share of the replicas: `1` or `25%`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Amount {
    /// That many instances.
    Count(u32),
    /// That share of the replicas.
    Share(Percent),
}

impl Amount {
    /// Instances for `replicas`, a share rounded up (as Kubernetes does for `maxSurge`).
    pub fn rounded_up(self, replicas: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Share(share) => share.of_rounded_up(replicas),
        }
    }

    /// Instances for `replicas`, a share rounded down (as Kubernetes does for `maxUnavailable`).
    pub fn rounded_down(self, replicas: u32) -> u32 {
        match self {
            Self::Count(count) => count,
            Self::Share(share) => share.of_rounded_down(replicas),
        }
    }
}

impl FromStr for Amount {
    type Err = ParseQuantityError;
    fn from_str(text: &str) -> Result<Self, ParseQuantityError> {
        if text.ends_with('%') {
            return text.parse().map(Self::Share);
        }
        text.parse().map(Self::Count).map_err(|_| {
            ParseQuantityError::new(text, "number of instances", "a count such as `1`, or a share such as `25%`")
        })
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Count(count) => fmt::Display::fmt(count, f),
            Self::Share(share) => fmt::Display::fmt(share, f),
        }
    }
}

text_serde!(Amount, "Amount", r"^[0-9]+(\.[0-9]+)? ?%?$", "A count such as `1`, or a share such as `25%`.");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, millis) in [
            ("250ms", 250),
            ("30s", 30_000),
            ("1m30s", 90_000),
            ("2h", 7_200_000),
            ("1.5s", 1500),
            ("0", 0),
            ("7d", 604_800_000),
        ] {
            let span: Timespan = text.parse().unwrap();
            assert_eq!(span.duration(), Duration::from_millis(millis), "{text}");
            assert_eq!(span.to_string().parse::<Timespan>().unwrap(), span);
        }
        for bad in ["", "30", "s", "1s1m", "1s1s", "-1s", "1e3s", ".5s", "1.s", "99999999999d", "1 s"] {
            assert!(bad.parse::<Timespan>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        for (text, bytes) in
            [("512Mi", 512 << 20), ("1Gi", 1 << 30), ("100M", 100_000_000), ("0", 0), ("1.5Ki", 1536), ("7", 7)]
        {
            let size: ByteSize = text.parse().unwrap();
            assert_eq!(size.as_bytes(), bytes, "{text}");
            assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
        }
        for bad in ["", "Mi", "1.5", "-1", "99999999999Ti", "1mi"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn cpus_and_shares() {
        assert_eq!("250m".parse::<Cpu>().unwrap().as_millis(), 250);
        assert_eq!("1.5".parse::<Cpu>().unwrap().to_string(), "1500m");
        assert!("1.5m".parse::<Cpu>().is_err());
        assert_eq!("0.1%".parse::<Percent>().unwrap().to_string(), "0.1%");
        assert!("101%".parse::<Percent>().is_err());
        assert_eq!("25%".parse::<Amount>().unwrap().rounded_up(3), 1);
        assert_eq!("25%".parse::<Amount>().unwrap().rounded_down(3), 0);
        assert_eq!("2".parse::<Amount>().unwrap().rounded_down(3), 2);
        assert_eq!("0.1%".parse::<Percent>().unwrap().as_thousandths(), 100);
    }

    #[test]
    fn measures() {
        for (text, thousandths, printed) in [
            ("100", 100_000, "100"),
            ("0.5", 500, "0.5"),
            ("1.250", 1250, "1.25"),
            ("0", 0, "0"),
            ("0.001", 1, "0.001"),
        ] {
            let measure: Measure = text.parse().unwrap();
            assert_eq!((measure.as_thousandths(), measure.to_string().as_str()), (thousandths, printed), "{text}");
            assert_eq!(printed.parse::<Measure>().unwrap(), measure);
        }
        assert_eq!(Measure::thousandths(1999).floor(), 1);
        assert_eq!(Measure::whole(u64::MAX).as_thousandths(), u64::MAX);
        for bad in ["", "-1", "1e3", ".5", "1.", "0.0001", "99999999999999999999", "5%"] {
            assert!(bad.parse::<Measure>().is_err(), "{bad}");
        }
    }
}
