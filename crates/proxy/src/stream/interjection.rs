//! What is said to a client between two responses of HTTP/1.1.
//!
//! hyper has no way to send an interim response. It flushes a connection whenever everything that it has to say was
//! taken; then, and only then, something can be said in between without cutting a response in two.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker},
};

use bytes::{Buf as _, Bytes};

#[derive(Debug, Default)]
pub(crate) struct Interjection {
    /// There is something: a shorter look.
    there: AtomicBool,
    text: Mutex<Text>,
}

#[derive(Debug, Default)]
struct Text {
    bytes: Bytes,
    /// A part of it is on its way: the rest must follow.
    begun: bool,
    /// Of whom to tell when all of it is.
    waker: Option<Waker>,
}

impl Interjection {
    fn text(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It is to be said as soon as possible.
    pub(crate) fn put(&self, bytes: Bytes) {
        self.text().bytes = bytes;
        self.there.store(true, Ordering::Release);
    }

    /// What is to be written now; `between` two responses, or in the middle of one.
    pub(crate) fn next(&self, between: bool) -> Option<Bytes> {
        if !self.there.load(Ordering::Acquire) {
            return None;
        }
        let mut text = self.text();
        text.begun |= between && !text.bytes.is_empty();
        text.begun.then(|| text.bytes.clone())
    }

    /// So much of it was written.
    pub(crate) fn advance(&self, count: usize) {
        let mut text = self.text();
        text.bytes.advance(count);
        if text.bytes.is_empty() {
            self.there.store(false, Ordering::Release);
            text.begun = false;
            if let Some(waker) = text.waker.take() {
                waker.wake();
            }
        }
    }

    /// Ready when nothing is left to be said.
    pub(crate) fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        if !self.there.load(Ordering::Acquire) {
            return Poll::Ready(());
        }
        let mut text = self.text();
        if text.bytes.is_empty() {
            return Poll::Ready(());
        }
        text.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// It is not to be said any more, unless that has begun.
    pub(crate) fn withdraw(&self) {
        let mut text = self.text();
        text.waker = None;
        if !text.begun {
            text.bytes = Bytes::new();
            self.there.store(false, Ordering::Release);
        }
    }
}
