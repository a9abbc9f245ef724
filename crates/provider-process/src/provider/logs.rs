//! Reads logs: merges streams, instances and attempts in order of arrival, and follows what is being written.
//!
//! Files are opened for each step and closed again, so that a query over hundreds of launches holds none open. When
//! following, changes are learned from the kernel (inotify), first watched and then read, so that none falls between.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::{self, File},
    io,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use orchestra_model::{Code, InstanceId, time::UnixMillis};
use orchestra_provider::{Error, LogLine, LogQuery, LogStream, Retry};
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::mpsc;

use super::{blocking, inotify::Inotify};
use crate::{
    folder,
    log_format::{self, Kind, RECORD, Record, STREAMS, slot},
};

/// Longest line that is delivered in one piece.
const MAX_LINE: usize = 64 << 10;
/// Bytes that one step reads of one launch.
const STEP: usize = 256 << 10;
/// Lines that may wait for the reader.
const WAITING: usize = 256;

type Key = (InstanceId, u32);

/// Starts to read.
pub(super) fn read(logs: &Path, query: LogQuery, tree: &TaskTree) -> Result<mpsc::Receiver<LogLine>, Error> {
    let root = folder::environment_path(logs, &query.environment);
    let inotify = if query.follow {
        let watched = folder::create_private(&root).and_then(|()| {
            let inotify = Inotify::new()?;
            let watch = inotify.watch(&root)?;
            Ok((inotify, watch))
        });
        Some(watched.map_err(|source| {
            Error::new(Code::INTERNAL, Retry::After(Duration::from_secs(1)), "logs cannot be followed")
                .help("the machine limits how many files can be watched: fs.inotify.max_user_instances")
                .source(source)
        })?)
    } else {
        None
    };
    let (lines, receiver) = mpsc::channel(WAITING);
    tree.start(TaskKind::Connection, "read logs", async move {
        let result = if let Some((inotify, root_watch)) = inotify {
            let mut follower = Follower { query, root, inotify, root_watch, watches: BTreeMap::new() };
            // Dropping the receiver is how a reader ends following; nothing is lost but what nobody reads.
            tokio::select! {
                () = lines.closed() => Ok(()),
                result = follower.run(&lines) => result,
            }
        } else {
            let result = blocking(move || {
                let mut readers = find(&root, &query)?;
                history(&mut readers, &query, true, &mut |line| lines.blocking_send(line).is_ok())
            });
            result.await
        };
        if let Err(error) = result {
            tracing::warn!(%error, "reading logs broke off");
        }
    });
    Ok(receiver)
}

/// All launches that a query asks for, oldest attempts first.
fn find(root: &Path, query: &LogQuery) -> io::Result<BTreeMap<Key, Reader>> {
    let mut readers = BTreeMap::new();
    for instance in folder::entries::<InstanceId>(root)? {
        if wanted(query, &instance) {
            let path = root.join(instance.to_string());
            for attempt in folder::entries::<u32>(&path)? {
                let reader = Reader::new(instance.clone(), attempt, path.join(attempt.to_string()), query);
                readers.insert((instance.clone(), attempt), reader);
            }
        }
    }
    Ok(readers)
}

fn wanted(query: &LogQuery, instance: &InstanceId) -> bool {
    (query.workloads.is_empty() || query.workloads.contains(&instance.workload))
        && query.instance.as_ref().is_none_or(|only| only == instance)
}

/// Delivers what is there now, in order of arrival. Ends early when nobody takes it.
fn history(
    readers: &mut BTreeMap<Key, Reader>,
    query: &LogQuery,
    last: bool,
    deliver: &mut dyn FnMut(LogLine) -> bool,
) -> io::Result<()> {
    if let Some(tail) = query.tail {
        let mut lines = Vec::new();
        let mut left: BTreeMap<InstanceId, usize> = BTreeMap::new();
        // Newest attempts first: older ones fill up what is missing.
        for ((instance, _), reader) in readers.iter_mut().rev() {
            let left = left.entry(instance.clone()).or_insert(tail);
            let found = reader.tail(*left, last)?;
            *left -= found.len();
            lines.extend(found);
        }
        lines.sort_by(|a: &LogLine, b| (a.at, &a.instance, a.attempt).cmp(&(b.at, &b.instance, b.attempt)));
        for line in lines {
            if !deliver(line) {
                return Ok(());
            }
        }
        return Ok(());
    }
    for reader in readers.values_mut() {
        reader.fill(last)?;
    }
    loop {
        // A handful of launches have lines at a time; a heap would not pay.
        let next =
            readers.values_mut().filter(|reader| !reader.lines.is_empty()).min_by_key(|reader| reader.lines[0].at);
        let Some(reader) = next else { return Ok(()) };
        if let Some(line) = reader.lines.pop_front()
            && !deliver(line)
        {
            return Ok(());
        }
        if reader.lines.is_empty() {
            reader.fill(last)?;
        }
    }
}

struct Follower {
    query: LogQuery,
    root: PathBuf,
    inotify: Inotify,
    root_watch: i32,
    watches: BTreeMap<i32, Watched>,
}

#[derive(Clone)]
enum Watched {
    Instance,
    Launch(Key),
}

impl Follower {
    async fn run(&mut self, lines: &mpsc::Sender<LogLine>) -> io::Result<()> {
        let mut readers = BTreeMap::new();
        self.discover(&mut readers)?;
        let (query, sender) = (self.query.clone(), lines.clone());
        let mut readers = blocking(move || {
            history(&mut readers, &query, false, &mut |line| sender.blocking_send(line).is_ok())?;
            Ok(readers)
        })
        .await?;
        // From here on a launch that appears is read from its beginning.
        self.query.tail = None;
        loop {
            let mut touched = std::collections::BTreeSet::new();
            for change in self.inotify.changes().await? {
                let watched = change.watch.and_then(|watch| self.watches.get(&watch).cloned());
                match watched {
                    Some(Watched::Launch(key)) => _ = touched.insert(key),
                    Some(Watched::Instance) if change.folder.is_none() => {}
                    _ if change.watch == Some(self.root_watch) && change.folder.is_none() => {}
                    // A new folder, or missed changes.
                    _ => {
                        touched.extend(self.discover(&mut readers)?);
                        if change.watch.is_none() {
                            touched.extend(readers.keys().cloned());
                        }
                    }
                }
            }
            for key in touched {
                let Some(mut reader) = readers.remove(&key) else { continue };
                loop {
                    reader = blocking(move || {
                        reader.fill(false)?;
                        Ok(reader)
                    })
                    .await?;
                    if reader.lines.is_empty() {
                        break;
                    }
                    for line in std::mem::take(&mut reader.lines) {
                        if lines.send(line).await.is_err() {
                            return Ok(());
                        }
                    }
                }
                readers.insert(key, reader);
            }
        }
    }

    /// Watches what is not watched yet, and says which launches are new.
    fn discover(&mut self, readers: &mut BTreeMap<Key, Reader>) -> io::Result<Vec<Key>> {
        let mut new = Vec::new();
        for instance in folder::entries::<InstanceId>(&self.root)? {
            if !wanted(&self.query, &instance) {
                continue;
            }
            let path = self.root.join(instance.to_string());
            self.watch(&path, Watched::Instance)?;
            for attempt in folder::entries::<u32>(&path)? {
                let key = (instance.clone(), attempt);
                if !readers.contains_key(&key) {
                    let path = path.join(attempt.to_string());
                    self.watch(&path, Watched::Launch(key.clone()))?;
                    readers.insert(key.clone(), Reader::new(instance.clone(), attempt, path, &self.query));
                    new.push(key);
                }
            }
        }
        Ok(new)
    }

    fn watch(&mut self, path: &Path, watched: Watched) -> io::Result<()> {
        match self.inotify.watch(path) {
            Ok(watch) => {
                self.watches.insert(watch, watched);
                Ok(())
            }
            // Deleted by retention since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// Reads the logs of one launch.
struct Reader {
    instance: InstanceId,
    attempt: u32,
    folder: PathBuf,
    only: Option<LogStream>,
    since: Option<UnixMillis>,
    /// Segment that is being read; 0 before the first.
    segment: u64,
    /// Position in its index, and bytes of that record that were taken already.
    record: u64,
    taken: u32,
    /// Position in its files.
    offsets: [u64; 2],
    partial: [Partial; 2],
    /// Time of the last line.
    latest: UnixMillis,
    lines: VecDeque<LogLine>,
}

#[derive(Default)]
struct Partial {
    bytes: Vec<u8>,
    at: UnixMillis,
}

impl Reader {
    fn new(instance: InstanceId, attempt: u32, folder: PathBuf, query: &LogQuery) -> Self {
        Self {
            instance,
            attempt,
            folder,
            only: query.stream,
            since: query.since,
            segment: 0,
            record: 0,
            taken: 0,
            offsets: [0; 2],
            partial: Default::default(),
            latest: 0,
            lines: VecDeque::new(),
        }
    }

    /// The last `count` lines that are there now.
    fn tail(&mut self, count: usize, last: bool) -> io::Result<Vec<LogLine>> {
        self.start_near_end(count)?;
        let mut lines = VecDeque::new();
        loop {
            self.fill(last)?;
            if self.lines.is_empty() {
                return Ok(lines.into());
            }
            lines.append(&mut self.lines);
            lines.drain(..lines.len().saturating_sub(count));
        }
    }

    /// Skips segments that cannot hold one of the last `count` lines.
    fn start_near_end(&mut self, count: usize) -> io::Result<()> {
        let mut found = 0;
        for segment in log_format::segments(&self.folder)?.into_iter().rev() {
            if found > count {
                return Ok(());
            }
            self.segment = segment;
            for stream in STREAMS.into_iter().filter(|stream| self.only.is_none_or(|only| only == *stream)) {
                match fs::read(log_format::data_path(&self.folder, segment, stream)) {
                    Ok(bytes) => found += bytes.split(|byte| *byte == b'\n').count() - 1,
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// Reads on until there are lines to deliver or nothing more is there. `last` says that nothing will be waited
    /// for, so that an unfinished line is delivered as it is.
    fn fill(&mut self, last: bool) -> io::Result<()> {
        while self.lines.is_empty() {
            let segments = log_format::segments(&self.folder)?;
            if self.segment == 0 {
                let Some(first) = segments.first() else { return Ok(()) };
                self.segment = *first;
            }
            // Looked up before the index is read: if a later segment exists, this one is complete.
            let later = segments.into_iter().find(|segment| *segment > self.segment);
            let more = match self.read_segment() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => false,
                more => more?,
            };
            if more || !self.lines.is_empty() {
                continue;
            }
            let Some(later) = later else {
                if last {
                    self.finish();
                }
                return Ok(());
            };
            self.segment = later;
            (self.record, self.taken, self.offsets) = (0, 0, [0; 2]);
        }
        Ok(())
    }

    /// Reads at most a step of the current segment. `false` once it is used up.
    fn read_segment(&mut self) -> io::Result<bool> {
        let index = File::open(log_format::index_path(&self.folder, self.segment))?;
        // The last record may still grow, so it is left only when another follows; that must be known before it is
        // read.
        let len = index.metadata()?.len();
        let mut files: [Option<File>; 2] = [None, None];
        let mut budget = STEP;
        let mut bytes = [0; RECORD];
        loop {
            let position = self.record * RECORD as u64;
            if position + RECORD as u64 > len {
                return Ok(false);
            }
            if budget == 0 {
                return Ok(true);
            }
            index.read_exact_at(&mut bytes, position)?;
            if let Some(record) = Record::from_bytes(&bytes) {
                match record.kind {
                    Kind::Data(stream) => {
                        while self.taken < record.len && budget > 0 {
                            let left = usize::try_from(record.len - self.taken).unwrap_or(STEP);
                            let read = self.take(record.at, stream, left.min(budget), &mut files)?;
                            if read == 0 {
                                // Bytes are written before they are indexed; without them the file was cut by somebody.
                                self.taken = record.len;
                                break;
                            }
                            self.taken += u32::try_from(read).unwrap_or(0);
                            budget -= read;
                        }
                        if self.taken < record.len {
                            return Ok(true);
                        }
                    }
                    Kind::Lost(_) => {}
                    Kind::End => self.finish(),
                }
            }
            if position + 2 * RECORD as u64 > len {
                return Ok(false);
            }
            self.record += 1;
            self.taken = 0;
        }
    }

    /// Takes up to `count` bytes of a stream.
    fn take(
        &mut self,
        at: UnixMillis,
        stream: LogStream,
        count: usize,
        files: &mut [Option<File>; 2],
    ) -> io::Result<usize> {
        let slot = slot(stream);
        if self.only.is_some_and(|only| only != stream) {
            self.offsets[slot] += u64::try_from(count).unwrap_or(0);
            return Ok(count);
        }
        let file = match &mut files[slot] {
            Some(file) => file,
            none => none.insert(File::open(log_format::data_path(&self.folder, self.segment, stream))?),
        };
        let mut buffer = vec![0; count.min(MAX_LINE)];
        let read = file.read_at(&mut buffer, self.offsets[slot])?;
        self.offsets[slot] += u64::try_from(read).unwrap_or(0);
        for piece in buffer[..read].split_inclusive(|byte| *byte == b'\n') {
            let mut piece = piece;
            while !piece.is_empty() {
                let room = MAX_LINE - self.partial[slot].bytes.len();
                let (now, rest) = piece.split_at(piece.len().min(room));
                self.partial[slot].bytes.extend_from_slice(now);
                self.partial[slot].at = at;
                piece = rest;
                if now.ends_with(b"\n") || self.partial[slot].bytes.len() == MAX_LINE {
                    self.emit(stream);
                }
            }
        }
        Ok(read)
    }

    fn emit(&mut self, stream: LogStream) {
        let Partial { bytes, at } = std::mem::take(&mut self.partial[slot(stream)]);
        // An unfinished line comes out at the end, after others that arrived later; times never go back for that.
        let at = at.max(self.latest);
        self.latest = at;
        if !bytes.is_empty() && self.since.is_none_or(|since| at >= since) {
            self.lines.push_back(LogLine { instance: self.instance.clone(), attempt: self.attempt, stream, at, bytes });
        }
    }

    fn finish(&mut self) {
        for stream in STREAMS {
            self.emit(stream);
        }
    }
}
