//! What stands in an X.509 certificate (RFC 5280 section 4.1): from when until when, for which names, whose.

use std::{fmt::Write as _, net::IpAddr};

use sha2::{Digest as _, Sha256};

use crate::der::{BOOLEAN, GENERALIZED_TIME, INTEGER, OCTET_STRING, OID, Reader, SEQUENCE, SET, UTC_TIME};

/// `id-at-commonName` (2.5.4.3).
const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
/// `id-ce-subjectAltName` (2.5.29.17).
const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1D, 0x11];
/// Tags of the fields of a certificate that are told apart by tag alone.
const VERSION: u8 = 0xA0;
const EXTENSIONS: u8 = 0xA3;
/// Tags of a `GeneralName`.
const DNS_NAME: u8 = 0x82;
const IP_ADDRESS: u8 = 0x87;

/// What stands in a certificate. Times are Unix seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// Common name of the subject; empty if it has none.
    pub subject: String,
    /// Valid from.
    pub not_before: u64,
    /// Valid until.
    pub not_after: u64,
    /// DNS names and addresses that it is for, in its order.
    pub names: Vec<String>,
    /// SHA-256 of the certificate, in lower-case hexadecimal.
    pub fingerprint: String,
}

/// Not an X.509 certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is not an X.509 certificate")]
pub struct Malformed;

impl Facts {
    /// Reads a certificate in DER.
    ///
    /// # Errors
    /// [`Malformed`]
    pub fn read(der: &[u8]) -> Result<Self, Malformed> {
        read(der).ok_or(Malformed)
    }
}

fn read(der: &[u8]) -> Option<Facts> {
    let mut certificate = Reader::new(der).within(SEQUENCE)?;
    let mut fields = certificate.within(SEQUENCE)?;
    fields.optional(VERSION);
    fields.value(INTEGER)?;
    let (_signature, _issuer) = (fields.value(SEQUENCE)?, fields.value(SEQUENCE)?);
    let mut validity = fields.within(SEQUENCE)?;
    let (not_before, not_after) = (time(validity.any()?)?, time(validity.any()?)?);
    let subject = common_name(fields.within(SEQUENCE)?).unwrap_or_default();
    let _key = fields.value(SEQUENCE)?;
    let mut names = Vec::new();
    while !fields.is_empty() {
        let (tag, value) = fields.any()?;
        if tag == EXTENSIONS {
            names = alternative_names(Reader::new(value).within(SEQUENCE)?)?;
        }
    }
    let fingerprint = hex(&Sha256::digest(der));
    Some(Facts { subject, not_before, not_after, names, fingerprint })
}

fn common_name(mut name: Reader<'_>) -> Option<String> {
    let mut found = None;
    while !name.is_empty() {
        let mut part = name.within(SET)?;
        while !part.is_empty() {
            let mut attribute = part.within(SEQUENCE)?;
            if attribute.value(OID)? == COMMON_NAME {
                found = Some(String::from_utf8_lossy(attribute.any()?.1).into_owned());
            }
        }
    }
    found
}

fn alternative_names(mut extensions: Reader<'_>) -> Option<Vec<String>> {
    let mut names = Vec::new();
    while !extensions.is_empty() {
        let mut extension = extensions.within(SEQUENCE)?;
        let id = extension.value(OID)?;
        extension.optional(BOOLEAN);
        let value = extension.value(OCTET_STRING)?;
        if id != SUBJECT_ALT_NAME {
            continue;
        }
        let mut list = Reader::new(value).within(SEQUENCE)?;
        while !list.is_empty() {
            match list.any()? {
                (DNS_NAME, name) => names.push(String::from_utf8_lossy(name).into_owned()),
                (IP_ADDRESS, ip) => names.extend(address(ip).map(|ip| ip.to_string())),
                _ => {}
            }
        }
    }
    Some(names)
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    v4.or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

/// Unix seconds of a time; times before 1970 are 0. RFC 5280 4.1.2.5: always with seconds, always in UTC.
fn time((tag, text): (u8, &[u8])) -> Option<u64> {
    let text = text.strip_suffix(b"Z")?;
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = |range: std::ops::Range<usize>| {
        text.get(range).map(|digits| digits.iter().fold(0, |n, digit| n * 10 + i64::from(digit - b'0')))
    };
    let (year, rest) = match (tag, text.len()) {
        // Two digits mean 1950 to 2049.
        (UTC_TIME, 12) => (number(0..2).map(|year| if year < 50 { 2000 + year } else { 1900 + year })?, 2),
        (GENERALIZED_TIME, 14) => (number(0..4)?, 4),
        _ => return None,
    };
    let part = |index: usize| number(rest + 2 * index..rest + 2 * index + 2);
    let (month, day, hour, minute, second) = (part(0)?, part(1)?, part(2)?, part(3)?, part(4)?);
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let seconds = ((days(year, month, day) * 24 + hour) * 60 + minute) * 60 + second;
    Some(u64::try_from(seconds).unwrap_or(0))
}

/// Days since 1970-01-01 of a date (Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `days_from_civil`).
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year.rem_euclid(400);
    let of_year = (153 * (month + if month > 2 { -3 } else { 9 }) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

/// Bytes in lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, date_time_ymd};

    use super::*;

    fn date(seconds: u64) -> String {
        orchestra_model::time::date(seconds * 1000)
    }

    fn certificate(names: &[&str], until: i32) -> Vec<u8> {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.not_before = date_time_ymd(2026, 2, 28);
        params.not_after = date_time_ymd(until, 3, 1);
        params.distinguished_name.push(DnType::CommonName, "a certificate");
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn says_what_stands_in_a_certificate() {
        let facts = Facts::read(&certificate(&["app.localhost", "127.0.0.1", "::1"], 2028)).unwrap();
        assert_eq!(facts.names, ["app.localhost", "127.0.0.1", "::1"]);
        assert_eq!(facts.subject, "a certificate");
        assert_eq!((facts.not_before, facts.not_after), (1_772_236_800, 1_835_481_600));
        assert_eq!((date(facts.not_before), date(facts.not_after)), ("2026-02-28".into(), "2028-03-01".into()));
        assert_eq!(facts.fingerprint.len(), 64);
    }

    #[test]
    fn years_after_2049_are_written_in_another_way() {
        let facts = Facts::read(&certificate(&[], 2060)).unwrap();
        assert_eq!(date(facts.not_after), "2060-03-01");
        assert!(facts.names.is_empty());
    }

    #[test]
    fn a_certificate_that_ends_early_is_none() {
        let der = certificate(&["localhost"], 2028);
        for length in 0..der.len() {
            assert_eq!(Facts::read(&der[..length]), Err(Malformed), "{length}");
        }
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(bytes: Vec<u8>) {
            let _ = Facts::read(&bytes);
        }

        #[test]
        fn changed_certificates_never_panic(at in 0_usize..300, to: u8) {
            let mut der = certificate(&["localhost"], 2028);
            let at = at % der.len();
            der[at] = to;
            let _ = Facts::read(&der);
        }

        #[test]
        fn dates_follow_each_other(day in 0_u64..40_000) {
            let text = date(day * 86_400);
            let mut parts = text.split('-').map(|part| part.parse::<i64>().unwrap());
            let (year, month, of_month) = (parts.next().unwrap(), parts.next().unwrap(), parts.next().unwrap());
            prop_assert_eq!(days(year, month, of_month), i64::try_from(day).unwrap());
        }
    }
}
