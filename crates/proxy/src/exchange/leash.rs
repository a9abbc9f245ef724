//! The end of a response that its HTTP/1 client does not take. hyper asks a body for more only while there is room for it,
//! so a body cannot hear of its own end while nobody reads: whoever watches over the connection hears of it instead.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

/// A client that begins to read hears of the end in good order within this time.
const GRACE: Duration = Duration::from_secs(1);

/// What ends a response.
#[derive(Debug)]
pub(crate) struct Leash {
    cut: Pin<Box<WaitForCancellationFutureOwned>>,
    timer: Option<Pin<Box<Sleep>>>,
    grace: Option<Pin<Box<Sleep>>>,
}

impl Leash {
    /// The cut of its instance, or a deadline.
    pub(crate) fn new(cut: CancellationToken, deadline: Option<Instant>) -> Self {
        let timer = deadline.map(|deadline| Box::pin(tokio::time::sleep_until(deadline)));
        Self { cut: Box::pin(cut.cancelled_owned()), timer, grace: None }
    }

    /// Ready when the response is to end, and had the time to do so by itself.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.grace.is_none() {
            let late = self.timer.as_mut().is_some_and(|timer| timer.as_mut().poll(cx).is_ready());
            if !late {
                ready!(self.cut.as_mut().poll(cx));
            }
        }
        self.grace.get_or_insert_with(|| Box::pin(tokio::time::sleep(GRACE))).as_mut().poll(cx)
    }
}
