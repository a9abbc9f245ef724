//! Moves output from the FIFOs to the log files.
//!
//! Bytes go from pipe to file by `splice(2)`: the kernel takes them out of the pipe only once they are in the file, in
//! one call that a kill cannot cut in two, so that a killed shim loses none and its successor writes none twice. The
//! program is held back by its pipe when the disk is slower than it; nothing is buffered here.
//!
//! When the disk is full (or the files cannot be written for another reason) the program must not hang or die for it:
//! what cannot be written is then taken out of the pipe, counted, and dropped. The count goes into the index as soon as
//! that can be written, and into the launch's message once.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::{FileExt as _, OpenOptionsExt as _},
    },
    path::PathBuf,
};

use orchestra_provider::LogStream;
use regex_lite::Regex;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pipe::{SpliceFlags, splice},
};

use crate::{
    clock,
    log_format::{self, Kind, RECORD, Record, STREAMS, slot},
};

/// Longest line that is matched against the ready expression; the rest of a longer one is not looked at.
const MAX_LINE: usize = 64 << 10;
/// Most bytes that one call moves; a pipe holds 64 KiB unless the program made it larger.
const CHUNK: usize = 1 << 20;
/// Index records that are kept in memory while the index cannot be written.
const MAX_UNWRITTEN: usize = 1024;

/// What one turn of [`LogWriter::pump`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pumped {
    /// Something was moved; there may be more.
    Some,
    /// Nothing is there now.
    Empty,
    /// Nothing will come any more.
    Eof,
}

/// Writes the logs of one launch.
#[derive(Debug)]
pub(crate) struct LogWriter {
    folder: PathBuf,
    max: u64,
    keep: u64,
    segment: u64,
    streams: [Stream; 2],
    index: Option<File>,
    index_len: u64,
    last: Option<Record>,
    unwritten: Vec<Record>,
    ready: Option<Regex>,
    matched: bool,
    lost: u64,
    loss: Option<String>,
    /// The pipes were opened after their writers, so that their end shows only by reading.
    resumed: bool,
}

#[derive(Debug, Default)]
struct Stream {
    fifo: Option<OwnedFd>,
    file: Option<File>,
    len: u64,
    line: Vec<u8>,
}

impl LogWriter {
    /// Begins, or goes on where a killed writer left off. `ready` is looked for in what was written already as well.
    pub(crate) fn new(folder: PathBuf, max: u64, keep: u32, fifos: [OwnedFd; 2], ready: Option<Regex>) -> Self {
        let streams = fifos.map(|fifo| Stream { fifo: Some(fifo), ..Stream::default() });
        Self {
            folder,
            max: if max == 0 { u64::MAX } else { max },
            keep: u64::from(keep),
            segment: 1,
            streams,
            index: None,
            index_len: 0,
            last: None,
            unwritten: Vec::new(),
            ready,
            matched: false,
            lost: 0,
            loss: None,
            resumed: false,
        }
    }

    /// Goes on where a killed writer left off: what it had written but not yet indexed is indexed now, and what it may
    /// not have looked at is looked at again.
    pub(crate) fn resume(&mut self) -> io::Result<()> {
        self.resumed = true;
        let Some(segment) = log_format::segments(&self.folder)?.pop() else { return Ok(()) };
        self.segment = segment;
        let index = match fs::read(log_format::index_path(&self.folder, segment)) {
            Ok(index) => index,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let (records, _) = index.as_chunks::<RECORD>();
        self.index_len = u64::try_from(records.len() * RECORD).unwrap_or(0);
        let mut indexed = [0_u64; 2];
        for record in records.iter().filter_map(Record::from_bytes) {
            if let Kind::Data(stream) = record.kind {
                indexed[slot(stream)] += u64::from(record.len);
            }
        }
        for stream in STREAMS {
            let path = log_format::data_path(&self.folder, segment, stream);
            let len = fs::metadata(&path).map_or(0, |meta| meta.len());
            self.streams[slot(stream)].len = len;
            let mut missing = len.saturating_sub(indexed[slot(stream)]);
            while missing > 0 {
                let part = u32::try_from(missing).unwrap_or(u32::MAX);
                self.record(Kind::Data(stream), part);
                missing -= u64::from(part);
            }
            if self.ready.is_some() && len > 0 {
                let file = File::open(path)?;
                let mut buffer = vec![0; MAX_LINE];
                let mut offset = 0;
                loop {
                    let read = file.read_at(&mut buffer, offset)?;
                    if read == 0 {
                        break;
                    }
                    self.scan(slot(stream), &buffer[..read]);
                    offset += u64::try_from(read).unwrap_or(0);
                }
            }
        }
        Ok(())
    }

    /// FIFOs that may still bring something.
    pub(crate) fn fifo(&self, stream: LogStream) -> Option<BorrowedFd<'_>> {
        self.streams[slot(stream)].fifo.as_ref().map(|fifo| fifo.as_fd())
    }

    /// Whether both streams came to their end.
    pub(crate) fn is_eof(&self) -> bool {
        self.streams.iter().all(|stream| stream.fifo.is_none())
    }

    /// Whether the ready line was seen since the last call.
    pub(crate) fn take_match(&mut self) -> bool {
        std::mem::take(&mut self.matched)
    }

    /// Bytes that were dropped because they could not be written.
    pub(crate) const fn lost(&self) -> u64 {
        self.lost
    }

    /// Why bytes were dropped, the first time they were.
    pub(crate) fn take_loss(&mut self) -> Option<String> {
        self.loss.take()
    }

    /// Moves all that is in the pipes now, at most `rounds` times per stream. A process that goes on writing cannot
    /// keep the caller here for ever.
    pub(crate) fn pump_all(&mut self, rounds: usize) {
        for stream in STREAMS {
            for _ in 0..rounds {
                if self.pump(stream) != Pumped::Some {
                    break;
                }
            }
        }
    }

    /// Moves what is in one pipe now.
    pub(crate) fn pump(&mut self, stream: LogStream) -> Pumped {
        let slot = slot(stream);
        if self.streams[slot].fifo.is_none() {
            return Pumped::Eof;
        }
        if self.streams[slot].len >= self.max {
            self.rotate();
        }
        // A stream that says nothing gets no file.
        if self.streams[slot].file.is_none() && !self.resumed {
            match self.peek(slot) {
                Pumped::Some => {}
                nothing => return nothing,
            }
        }
        if let Err(error) = self.open(stream) {
            return self.discard(stream, &error);
        }
        let Stream { fifo: Some(fifo), file: Some(file), len, .. } = &mut self.streams[slot] else {
            return Pumped::Eof;
        };
        let room = usize::try_from(self.max - *len).unwrap_or(CHUNK).min(CHUNK);
        let start = *len;
        let moved = match splice(fifo.as_fd(), None, file.as_fd(), Some(len), room, SpliceFlags::NONBLOCK) {
            Err(Errno::INVAL) => copy(fifo, file, len, room),
            moved => moved,
        };
        match moved {
            Ok(0) => {
                self.streams[slot].fifo = None;
                Pumped::Eof
            }
            Ok(moved) => {
                // The kernel advances the offset that it was given; a file system that does not must not confuse us.
                self.streams[slot].len = start + u64::try_from(moved).unwrap_or(0);
                self.record(Kind::Data(stream), u32::try_from(moved).unwrap_or(u32::MAX));
                if self.ready.is_some() {
                    self.look(slot, start, moved);
                }
                Pumped::Some
            }
            Err(Errno::AGAIN) => Pumped::Empty,
            Err(Errno::INTR) => Pumped::Some,
            Err(error) => self.discard(stream, &error.into()),
        }
    }

    /// Writes the mark that nothing follows.
    pub(crate) fn finish(&mut self) {
        for stream in &mut self.streams {
            stream.fifo = None;
        }
        if self.index_len > 0 || !self.unwritten.is_empty() {
            self.record(Kind::End, 0);
        }
        // On a full disk, somebody who deletes logs must get the space at once.
        for stream in &mut self.streams {
            stream.file = None;
        }
        self.index = None;
    }

    /// What there is in a pipe, without taking it out.
    fn peek(&mut self, slot: usize) -> Pumped {
        let Some(fifo) = &self.streams[slot].fifo else { return Pumped::Eof };
        let mut wanted = [PollFd::new(fifo, PollFlags::IN)];
        let ready = poll(&mut wanted, Some(&Timespec::default())).unwrap_or(0) > 0;
        let flags = wanted[0].revents();
        match (ready, flags.contains(PollFlags::IN), flags.contains(PollFlags::HUP)) {
            (true, false, true) => {
                self.streams[slot].fifo = None;
                Pumped::Eof
            }
            (true, true, _) => Pumped::Some,
            _ => Pumped::Empty,
        }
    }

    fn open(&mut self, stream: LogStream) -> io::Result<()> {
        if self.streams[slot(stream)].file.is_none() {
            let path = log_format::data_path(&self.folder, self.segment, stream);
            self.streams[slot(stream)].file = Some(open_file(&self.folder, &path)?);
        }
        Ok(())
    }

    fn rotate(&mut self) {
        self.flush_index();
        self.segment += 1;
        for stream in &mut self.streams {
            stream.file = None;
            stream.len = 0;
        }
        self.index = None;
        self.index_len = 0;
        self.last = None;
        // All but one of the segments that exist are rotated ones.
        for segment in log_format::segments(&self.folder).unwrap_or_default() {
            if segment + self.keep < self.segment {
                for stream in STREAMS {
                    let _ = fs::remove_file(log_format::data_path(&self.folder, segment, stream));
                }
                let _ = fs::remove_file(log_format::index_path(&self.folder, segment));
            }
        }
    }

    /// Takes bytes out of the pipe that cannot be written.
    fn discard(&mut self, stream: LogStream, error: &io::Error) -> Pumped {
        let slot = slot(stream);
        let mut buffer = vec![0; MAX_LINE];
        let Some(fifo) = &self.streams[slot].fifo else { return Pumped::Eof };
        match rustix::io::read(fifo, &mut buffer) {
            Ok(0) => {
                self.streams[slot].fifo = None;
                Pumped::Eof
            }
            Ok(read) => {
                if self.lost == 0 {
                    self.loss = Some(format!("output was lost because the log could not be written: {error}"));
                }
                self.lost += u64::try_from(read).unwrap_or(0);
                self.record(Kind::Lost(stream), u32::try_from(read).unwrap_or(u32::MAX));
                self.scan(slot, &buffer[..read]);
                Pumped::Some
            }
            Err(Errno::INTR) => Pumped::Some,
            Err(_) => Pumped::Empty,
        }
    }

    fn record(&mut self, kind: Kind, len: u32) {
        let record = Record { at: clock::wall(), len, kind };
        // A program that writes byte by byte must not cost 16 bytes of index for each.
        let extend = |last: &mut Record| {
            let same = kind != Kind::End && last.kind == kind && last.at == record.at;
            match last.len.checked_add(len) {
                Some(sum) if same => {
                    last.len = sum;
                    true
                }
                _ => false,
            }
        };
        if self.unwritten.is_empty()
            && let Some(mut last) = self.last
            && extend(&mut last)
        {
            self.last = None;
            self.index_len -= RECORD as u64;
            self.unwritten.push(last);
        } else if !self.unwritten.last_mut().is_some_and(extend) {
            if self.unwritten.len() >= MAX_UNWRITTEN
                && let Some(same) = self.unwritten.iter_mut().rev().find(|other| other.kind == kind)
            {
                // Order and times are given up before bytes and memory are.
                same.len = same.len.saturating_add(len);
            } else {
                self.unwritten.push(record);
            }
        }
        self.flush_index();
    }

    fn flush_index(&mut self) {
        if self.unwritten.is_empty() {
            return;
        }
        if self.index.is_none() {
            let path = log_format::index_path(&self.folder, self.segment);
            let Ok(file) = open_file(&self.folder, &path) else { return };
            self.index = Some(file);
        }
        let Some(index) = &self.index else { return };
        let bytes: Vec<u8> = self.unwritten.iter().flat_map(|record| record.to_bytes()).collect();
        if index.write_all_at(&bytes, self.index_len).is_ok() {
            self.index_len += bytes.len() as u64;
            self.last = self.unwritten.pop();
            self.unwritten.clear();
        }
    }

    /// Reads back what was just written, to look for the ready line.
    fn look(&mut self, slot: usize, mut offset: u64, mut len: usize) {
        let mut buffer = vec![0; len.min(MAX_LINE)];
        while len > 0 {
            let want = len.min(buffer.len());
            let Some(Ok(read)) = self.streams[slot].file.as_ref().map(|file| file.read_at(&mut buffer[..want], offset))
            else {
                return;
            };
            if read == 0 {
                return;
            }
            self.scan(slot, &buffer[..read]);
            offset += u64::try_from(read).unwrap_or(0);
            len -= read;
        }
    }

    fn scan(&mut self, slot: usize, bytes: &[u8]) {
        let Some(ready) = &self.ready else { return };
        let line = &mut self.streams[slot].line;
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let room = MAX_LINE.saturating_sub(line.len());
            line.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                let text = line.strip_suffix(b"\n").unwrap_or(line);
                let text = text.strip_suffix(b"\r").unwrap_or(text);
                if ready.is_match(&String::from_utf8_lossy(text)) {
                    self.matched = true;
                    self.ready = None;
                    for stream in &mut self.streams {
                        stream.line = Vec::new();
                    }
                    return;
                }
                line.clear();
            }
        }
    }
}

fn open_file(folder: &std::path::Path, path: &std::path::Path) -> io::Result<File> {
    let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            crate::folder::create_private(folder)?;
            open()
        }
        file => file,
    }
}

/// For file systems that cannot splice. Between read and write a kill loses what was read; nothing better exists there.
fn copy(fifo: &OwnedFd, file: &File, len: &mut u64, room: usize) -> rustix::io::Result<usize> {
    let mut buffer = vec![0; room.min(MAX_LINE)];
    let read = rustix::io::read(fifo, &mut buffer)?;
    file.write_all_at(&buffer[..read], *len).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(read)
}
