//! How the task of a connection hears that there is something to do.
//!
//! h2 wakes the task of a connection for everything that a stream says on it. Where the stream is polled by that very
//! task, just before it writes what was said, being woken means one look more at all of it that finds nothing: for each
//! batch of responses.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// Wakes a task only while it is not at work.
#[derive(Debug, Default)]
pub(super) struct Bell {
    line: Arc<Line>,
    waker: Option<Waker>,
}

#[derive(Debug, Default)]
struct Line {
    task: AtomicWaker,
    at_work: AtomicBool,
    rung: AtomicBool,
}

impl Wake for Line {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // In this order, with `leave` in the opposite one: either the task finds that it rang, or it is woken.
        self.rung.store(true, Ordering::SeqCst);
        if !self.at_work.load(Ordering::SeqCst) {
            self.task.wake();
        }
    }
}

impl Bell {
    /// The task begins to work; what it works on is given this waker.
    pub(super) fn enter(&mut self, cx: &Context<'_>) -> Waker {
        self.line.at_work.store(true, Ordering::SeqCst);
        self.line.task.register(cx.waker());
        self.waker.get_or_insert_with(|| Waker::from(Arc::clone(&self.line))).clone()
    }

    /// What rang until now is about to be looked at.
    pub(super) fn hush(&self) {
        self.line.rung.store(false, Ordering::SeqCst);
    }

    /// Whether it rang since then.
    pub(super) fn has_rung(&self) -> bool {
        self.line.rung.load(Ordering::SeqCst)
    }

    /// The task is to look again.
    pub(super) fn ring(&self) {
        self.line.wake_by_ref();
    }

    /// The task has done what it found; if it rang since, it looks again.
    pub(super) fn leave(&self, cx: &Context<'_>) {
        self.line.at_work.store(false, Ordering::SeqCst);
        if self.has_rung() {
            cx.waker().wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn it_wakes_for_what_was_not_looked_at_and_for_nothing_else() {
        let count = Arc::new(Count::default());
        let (task, woken) = (Waker::from(Arc::clone(&count)), || count.0.swap(0, Ordering::SeqCst));
        let (cx, mut bell) = (Context::from_waker(&task), Bell::default());
        let waker = bell.enter(&cx);
        waker.wake_by_ref();
        assert!(bell.has_rung());
        bell.hush();
        bell.leave(&cx);
        assert_eq!(woken(), 0, "it was looked at");
        waker.wake_by_ref();
        assert_eq!(woken(), 1, "the task was not at work");
        let waker = bell.enter(&cx);
        bell.hush();
        waker.wake_by_ref();
        assert_eq!(woken(), 0);
        bell.leave(&cx);
        assert_eq!(woken(), 1, "it rang behind the last look");
    }

    /// Law: whatever is left to do when the task leaves its work, it is woken for.
    #[test]
    fn no_ring_is_lost_between_threads() {
        let count = Arc::new(Count::default());
        let task = Waker::from(Arc::clone(&count));
        let (cx, mut bell) = (Context::from_waker(&task), Bell::default());
        let (left, waker) = (Arc::new(AtomicU32::new(0)), bell.enter(&cx));
        let ringer = std::thread::spawn({
            let left = Arc::clone(&left);
            move || {
                for _ in 0..100_000 {
                    left.fetch_add(1, Ordering::SeqCst);
                    waker.wake_by_ref();
                }
            }
        });
        let mut done = 0;
        while done < 100_000 {
            bell.enter(&cx);
            bell.hush();
            done += left.swap(0, Ordering::SeqCst);
            bell.leave(&cx);
            let mut spins = 0_u64;
            while done < 100_000 && count.0.swap(0, Ordering::SeqCst) == 0 {
                std::thread::yield_now();
                spins += 1;
                assert!(spins < 100_000_000, "asleep with {} left to do", left.load(Ordering::SeqCst));
            }
        }
        ringer.join().unwrap();
    }
}
