//! One stream of HTTP/2: a request and its response.

use std::{
    cell::RefCell,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{HeaderValue, Method, Request, Response, header};
use http_body::Body as _;

use crate::{
    exchange::{
        body::{ClientConnection, ResponseBody},
        source::Source,
    },
    listen::{Answer, Answers},
    outflow::Outflow,
};

/// A stream, until all of its response was handed over or nobody wants it any more.
pub(super) enum Exchange {
    Answering(Answering),
    Sending(Outflow<ResponseBody>),
}

pub(super) struct Answering {
    answer: Answer,
    respond: SendResponse<Bytes>,
    client: Arc<ClientConnection>,
    /// The response has no body, whatever it says of one (RFC 9110 9.3.2).
    headless: bool,
}

impl Exchange {
    pub(super) fn new(answers: &Answers, request: Request<RecvStream>, respond: SendResponse<Bytes>) -> Self {
        let headless = request.method() == Method::HEAD;
        let answer = answers.answer(Source::h2(request), respond.stream_id().as_u32());
        Self::Answering(Answering { answer, respond, client: Arc::clone(&answers.client), headless })
    }
}

impl Future for Exchange {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        if let Self::Answering(answering) = this {
            let Some(response) = ready!(answering.poll(cx)) else { return Poll::Ready(()) };
            let Some(sending) = answering.begin(response) else { return Poll::Ready(()) };
            *this = Self::Sending(sending);
        }
        let Self::Sending(sending) = this else { return Poll::Ready(()) };
        // Whoever is concerned by an error hears of it elsewhere.
        if sending.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        if let Some(body) = sending.stalled() {
            ready!(body.poll_end(cx));
            sending.reset();
            return Poll::Ready(());
        }
        Poll::Pending
    }
}

impl Answering {
    /// The response; nothing if the client gave up on it.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Response<ResponseBody>>> {
        let polled = self.answer.as_mut().poll(cx);
        for interim in self.client.interims(self.respond.stream_id().as_u32()) {
            // Fails only where the response itself will.
            let _ = self.respond.send_informational(interim);
        }
        match polled {
            Poll::Ready(Ok(response)) => Poll::Ready(Some(response)),
            Poll::Pending => self.respond.poll_reset(cx).map(|_| None),
        }
    }

    /// Sends the head; what is left to send, if anything.
    fn begin(&mut self, response: Response<ResponseBody>) -> Option<Outflow<ResponseBody>> {
        let (parts, body) = response.into_parts();
        let mut head = Response::from_parts(parts, ());
        let headers = head.headers_mut();
        // Of what the proxy adds by itself this concerns connections of HTTP/1.
        headers.remove(header::CONNECTION);
        headers.entry(header::DATE).or_insert_with(date);
        let ended = self.headless || body.is_end_stream();
        if !ended && let Some(length) = body.size_hint().exact() {
            headers.entry(header::CONTENT_LENGTH).or_insert_with(|| length.into());
        }
        match self.respond.send_response(head, ended) {
            Ok(send) => (!ended).then(|| Outflow::new(body, send)),
            Err(error) => {
                tracing::debug!(%error, "a response was not sent");
                self.respond.send_reset(Reason::INTERNAL_ERROR);
                None
            }
        }
    }
}

thread_local! {
    /// The time of the last response, in seconds and in words: it is the same for many.
    static DATE: RefCell<(u64, HeaderValue)> = const { RefCell::new((0, HeaderValue::from_static(""))) };
}

/// When a response comes that does not say so itself (RFC 9110 6.6.1).
fn date() -> HeaderValue {
    let now = SystemTime::now();
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    DATE.with_borrow_mut(|(last, text)| {
        if *last != seconds {
            (*last, *text) = (seconds, HeaderValue::from_str(&httpdate::fmt_http_date(now)).expect("a date is ASCII"));
        }
        text.clone()
    })
}
