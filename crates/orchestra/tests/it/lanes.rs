//! Points of kills, spread over lanes that run at the same time, each with its own home and seed: 200 in the normal run,
//! 2,000 with `ORCHESTRA_LONG=1`. `ORCHESTRA_SEED` repeats the choices of a run.

use std::{
    thread::{self, JoinHandle},
    time::Instant,
};

/// What came of all lanes.
pub(crate) struct Lanes<T> {
    /// Of those that did not fail.
    pub(crate) results: Vec<T>,
    points: u64,
    seed: u64,
    failed: usize,
    began: Instant,
}

impl<T: Send + 'static> Lanes<T> {
    /// Runs them to their end. A lane is told its seed and how many points it has.
    pub(crate) fn run(lanes: u64, lane: fn(u64, u64) -> T) -> Self {
        let points: u64 = if std::env::var_os("ORCHESTRA_LONG").is_some() { 2000 } else { 200 };
        let seed = std::env::var("ORCHESTRA_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(20_261_121);
        eprintln!("ORCHESTRA_SEED={seed}");
        let began = Instant::now();
        let running: Vec<_> =
            (0..lanes).map(|index| thread::spawn(move || lane(seed + index, points.div_ceil(lanes)))).collect();
        let ended = running.into_iter().map(JoinHandle::join);
        let results: Vec<T> = ended.filter_map(Result::ok).collect();
        let failed = usize::try_from(lanes).unwrap() - results.len();
        Self { results, points, seed, failed, began }
    }

    /// Says how long it took, and proves that no lane failed and that so many points were enough.
    #[track_caller]
    pub(crate) fn prove(&self, points: u64) {
        eprintln!("in {:?}", self.began.elapsed());
        assert_eq!(self.failed, 0, "lanes failed; ORCHESTRA_SEED={} repeats the choices", self.seed);
        assert!(points >= self.points, "{points} points of {}", self.points);
    }
}
