//! A response body that somebody wants to know about: evidence, tokens, or comparison with a copy.
//!
//! Most bodies are not looked into; those that are carry one of these.

use std::sync::Arc;

use bytes::Bytes;
use http::{header, response::Parts};
use http_body::Frame;

use super::{
    headers,
    tokens::{Events, Messages, Tokens},
};
use crate::{
    load::{Meter, StreamTokens},
    mirror::Original,
    watch::Evidence,
};

/// What looks into a response body.
#[derive(Debug)]
pub(crate) struct Inspection {
    evidence: Evidence,
    sent: StreamTokens,
    original: Option<Original>,
    tokens: Tokens,
}

impl Inspection {
    /// `None` if nobody wants to know.
    pub(crate) fn new(
        mut evidence: Evidence,
        meter: Option<&Arc<Meter>>,
        original: Option<Original>,
        response: &Parts,
    ) -> Option<Box<Self>> {
        if evidence.is_none() && meter.is_none() && original.is_none() {
            // The common case, for which nothing more is looked at.
            return None;
        }
        let (events, grpc) = (headers::is_event_stream(&response.headers), headers::is_grpc(&response.headers));
        let stream = events || grpc;
        evidence.answered(response.status, &response.headers, grpc, stream);
        let coded = response.headers.contains_key(header::CONTENT_ENCODING);
        let tokens = match () {
            () if grpc => Tokens::Messages(Messages::default()),
            () if events && coded => Tokens::Opaque { begun: false },
            () if events => Tokens::Events(Events::default()),
            () => Tokens::None,
        };
        // Two streams of a model are never the same.
        let original = if stream { original.and_then(Original::only_status) } else { original };
        let needed = stream || !evidence.is_none() || original.is_some();
        needed.then(|| Box::new(Self { evidence, sent: StreamTokens::new(meter), original, tokens }))
    }

    /// A frame passes.
    pub(crate) fn pass(&mut self, frame: &Frame<Bytes>) {
        if let Some(data) = frame.data_ref() {
            let count = self.tokens.advance(data);
            if count > 0 {
                self.evidence.token();
                self.sent.send(u64::from(count));
            }
            if let Some(original) = &mut self.original {
                original.advance(data);
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            self.evidence.trailers(trailers);
        }
    }

    /// The body is whole.
    pub(crate) fn complete(self) {
        self.evidence.complete();
        if let Some(original) = self.original {
            original.complete();
        }
    }

    /// The instance broke it off.
    pub(crate) fn broken(self) {
        self.evidence.broken();
    }

    /// The instance was stopped.
    pub(crate) fn cut(self) {
        self.evidence.cut();
    }
}
