//! When tokens came, and how long sessions lasted: apart from the counts, because there are many.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use super::report::Kind;

/// One token stream or WebSocket session that ended.
#[derive(Clone, Copy, Debug)]
pub struct Session {
    /// What it was.
    pub kind: Kind,
    /// When it was opened, since the start of the load.
    pub begun: Duration,
    /// When it ended.
    pub ended: Duration,
    /// Whether it ended as it should.
    pub whole: bool,
}

/// Times between two tokens of one stream, or two ticks of one WebSocket, by the phase in which the second one came.
#[derive(Clone, Debug, Default)]
pub struct Timing(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    phase: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// In microseconds.
    gaps: BTreeMap<(Kind, usize), Vec<u32>>,
    sessions: Vec<Session>,
}

impl Timing {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on tokens belong to this phase. The first one is 0.
    pub fn enter(&self, phase: usize) {
        self.0.phase.store(phase, Ordering::Relaxed);
    }

    /// All times between two tokens in a phase, the shortest first.
    pub fn gaps(&self, kind: Kind, phase: usize) -> Vec<Duration> {
        let mut gaps = self.state().gaps.get(&(kind, phase)).cloned().unwrap_or_default();
        gaps.sort_unstable();
        gaps.into_iter().map(|micros| Duration::from_micros(u64::from(micros))).collect()
    }

    /// All sessions that ended.
    pub fn sessions(&self) -> Vec<Session> {
        self.state().sessions.clone()
    }

    pub(super) fn token(&self, kind: Kind, gap: Duration) {
        let phase = self.0.phase.load(Ordering::Relaxed);
        let micros = u32::try_from(gap.as_micros()).unwrap_or(u32::MAX);
        self.state().gaps.entry((kind, phase)).or_default().push(micros);
    }

    pub(super) fn ended(&self, session: Session) {
        self.state().sessions.push(session);
    }
}
