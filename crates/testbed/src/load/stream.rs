//! Token streams as server-sent events: complete only if every token came once, in order, and the last event said so.

use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, client::conn};
use hyper_util::rt::TokioIo;
use tokio::time::Instant;

use super::{
    Shared,
    http::{Problem, connect, describe},
    report::{Kind, Success},
    timing::Timing,
};

/// Opens one stream and reads it to its end.
pub(super) async fn session(shared: &Shared, id: &str, length: Duration) -> Result<Success, Problem> {
    let plan = &shared.plan;
    let every = plan.token.as_millis().max(1);
    let count = (length.as_millis() / every).max(1);
    let io = TokioIo::new(connect(plan.address).await?);
    let (mut sender, connection) =
        conn::http1::handshake::<_, Empty<Bytes>>(io).await.map_err(|error| Problem::new("reset", describe(&error)))?;
    let request = Request::builder()
        .uri(format!("/stream?n={count}&ms={every}"))
        .header("host", plan.address.to_string())
        .header("accept", "text/event-stream")
        .header("x-request-id", id)
        .body(Empty::new())
        .map_err(|error| Problem::new("wrong", error))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(|error| Problem::new("reset", describe(&error)))?;
        let status = response.status();
        if status != StatusCode::OK {
            return Err(Problem::new(format!("status {}", status.as_u16()), ""));
        }
        let result = read(response.into_body(), count, &shared.timing).await;
        drop(sender);
        result
    };
    // The connection's own end says nothing beyond what the exchange saw.
    let (result, _) = tokio::join!(exchange, connection);
    result
}

async fn read(mut body: Incoming, count: u128, timing: &Timing) -> Result<Success, Problem> {
    let mut text = Vec::new();
    let mut success = Success::default();
    let mut last = Instant::now();
    let mut done = false;
    let mut announced = false;
    loop {
        match body.frame().await {
            Some(Ok(frame)) => text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data)),
            Some(Err(error)) => {
                return Err(Problem::new(
                    "truncated",
                    format!("after {} of {count}: {}", success.tokens, describe(&error)),
                ));
            }
            None if done => return Ok(success),
            None if announced => return Err(Problem::new("announced", format!("after {} of {count}", success.tokens))),
            None => return Err(Problem::new("truncated", format!("ended after {} of {count}", success.tokens))),
        }
        while let Some(end) = text.windows(2).position(|pair| pair == b"\n\n") {
            let event = String::from_utf8_lossy(&text[..end]).into_owned();
            text.drain(..end + 2);
            let gap = last.elapsed();
            success.gap = success.gap.max(gap);
            last = Instant::now();
            if success.tokens > 0 {
                timing.token(Kind::Stream, gap);
            }
            if event == format!("event: done\ndata: {count}") && u128::from(success.tokens) == count {
                done = true;
            } else if event == format!("id: {0}\ndata: token {0}", success.tokens) {
                success.tokens += 1;
            } else if event.starts_with("event: orchestra-drain\n") && !done && !announced {
                announced = true;
            } else {
                return Err(Problem::new("wrong", format!("`{event}` after {} of {count}", success.tokens)));
            }
        }
    }
}
