//! A stream of server-sent events that is written like a function: the future sends, the stream yields.
//!
//! The future runs only while the stream is read, in the task of its connection: when the client goes away, both are
//! dropped, and nothing is left running that nobody listens to.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};

use axum::response::sse::Event;
use futures_util::Stream;
use serde_json::Value;
use tokio::sync::mpsc;

/// The sending half.
pub struct Events(mpsc::Sender<Event>);

impl Events {
    /// Sends one event; waits until the client keeps up.
    pub async fn send(&self, name: &str, data: &Value) {
        // An error means that the stream is gone, and this future with it.
        let _ = self.0.send(Event::default().event(name).data(data.to_string())).await;
    }
}

/// The stream of what `write` sends.
pub fn events<F>(write: impl FnOnce(Events) -> F) -> impl Stream<Item = Result<Event, Infallible>> + Send
where
    F: Future<Output = ()> + Send + 'static,
{
    let (sender, receiver) = mpsc::channel(16);
    Written { writer: Some(Box::pin(write(Events(sender)))), receiver }
}

struct Written {
    writer: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    receiver: mpsc::Receiver<Event>,
}

impl Stream for Written {
    type Item = Result<Event, Infallible>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if let Some(writer) = &mut self.writer
            && writer.as_mut().poll(context).is_ready()
        {
            self.writer = None;
        }
        self.receiver.poll_recv(context).map(|event| event.map(Ok))
    }
}
