//! The form of logs on disk.
//!
//! `<logs>/<stack>/<environment>/<instance>/<attempt>/` holds numbered segments, oldest first:
//! `000001.stdout` and `000001.stderr` with the bytes exactly as they were written, and `000001.index` with one record
//! per piece that arrived: when, on which stream, how many bytes. Reading the index in order merges both streams in
//! order of arrival. A segment is closed when one of its streams has reached the longest allowed size; nothing is ever
//! renamed, so that a reader cannot lose its place, and the oldest segments are deleted as the launch says.
//!
//! A record is 16 bytes, little endian: Unix milliseconds (8), length (4), kind (1), zero (3).

use std::path::{Path, PathBuf};

use orchestra_model::{launch::LaunchKey, time::UnixMillis};
use orchestra_provider::LogStream;

use crate::folder::environment_path;

pub(crate) const RECORD: usize = 16;

/// What a record stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// That many bytes in the stream's file.
    Data(LogStream),
    /// That many bytes of the stream could not be written and are lost.
    Lost(LogStream),
    /// Every byte was written; nothing follows.
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) at: UnixMillis,
    pub(crate) len: u32,
    pub(crate) kind: Kind,
}

impl Record {
    pub(crate) fn to_bytes(self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[..8].copy_from_slice(&self.at.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12] = match self.kind {
            Kind::Data(LogStream::Stdout) => 0,
            Kind::Data(LogStream::Stderr) => 1,
            Kind::Lost(LogStream::Stdout) => 2,
            Kind::Lost(LogStream::Stderr) => 3,
            Kind::End => 4,
        };
        bytes
    }

    /// `None` for a kind that this version does not know.
    pub(crate) fn from_bytes(bytes: &[u8; RECORD]) -> Option<Self> {
        let (at, rest) = bytes.split_first_chunk()?;
        let (len, rest) = rest.split_first_chunk()?;
        let kind = match rest.first()? {
            0 => Kind::Data(LogStream::Stdout),
            1 => Kind::Data(LogStream::Stderr),
            2 => Kind::Lost(LogStream::Stdout),
            3 => Kind::Lost(LogStream::Stderr),
            4 => Kind::End,
            _ => return None,
        };
        Some(Self { at: u64::from_le_bytes(*at), len: u32::from_le_bytes(*len), kind })
    }
}

pub(crate) const fn slot(stream: LogStream) -> usize {
    match stream {
        LogStream::Stdout => 0,
        LogStream::Stderr => 1,
    }
}

pub(crate) const STREAMS: [LogStream; 2] = [LogStream::Stdout, LogStream::Stderr];

/// Folder of one launch's logs.
pub(crate) fn path_of(logs: &Path, key: &LaunchKey) -> PathBuf {
    environment_path(logs, &key.environment).join(key.instance.to_string()).join(key.attempt.to_string())
}

pub(crate) fn data_path(folder: &Path, segment: u64, stream: LogStream) -> PathBuf {
    let suffix = match stream {
        LogStream::Stdout => "stdout",
        LogStream::Stderr => "stderr",
    };
    folder.join(format!("{segment:06}.{suffix}"))
}

pub(crate) fn index_path(folder: &Path, segment: u64) -> PathBuf {
    folder.join(format!("{segment:06}.index"))
}

/// Numbers of the segments in a folder, oldest first.
pub(crate) fn segments(folder: &Path) -> std::io::Result<Vec<u64>> {
    let mut numbers: Vec<u64> = crate::folder::entries::<String>(folder)?
        .iter()
        .filter_map(|name| name.split_once('.').and_then(|(number, _)| number.parse().ok()))
        .collect();
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip() {
        for kind in [Kind::Data(LogStream::Stderr), Kind::Lost(LogStream::Stdout), Kind::End] {
            let record = Record { at: 1_790_000_000_123, len: 65_536, kind };
            assert_eq!(Record::from_bytes(&record.to_bytes()), Some(record));
        }
        assert_eq!(Record::from_bytes(&[9; RECORD]), None);
    }
}
