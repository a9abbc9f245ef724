//! WebSocket sessions: everything sent comes back, every tick comes once and in order, and the end is a close handshake.

use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_tungstenite::{
    client_async,
    tungstenite::{
        self, Message,
        client::IntoClientRequest,
        http::HeaderValue,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use super::{
    Shared,
    http::{Problem, connect},
    report::{Kind, Success},
};

/// One session.
pub(super) async fn session(shared: &Shared, id: &str, length: Duration) -> Result<Success, Problem> {
    let plan = &shared.plan;
    let stream = connect(plan.address).await?;
    let mut request = format!("ws://{}/ws?ms={}", plan.address, plan.token.as_millis())
        .into_client_request()
        .map_err(|error| Problem::new("wrong", error))?;
    let value = HeaderValue::from_str(id).map_err(|error| Problem::new("wrong", error))?;
    request.headers_mut().insert("x-request-id", value);
    let (mut socket, _) = client_async(request, stream).await.map_err(|error| match error {
        tungstenite::Error::Http(response) => Problem::new(format!("status {}", response.status().as_u16()), ""),
        error => Problem::new("reset", error),
    })?;
    let end = Instant::now() + length;
    let mut pace = interval(plan.token);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut success = Success::default();
    let (mut sent, mut echoed, mut ticks) = (0_u64, 0_u64, 0_u64);
    let (mut last, mut last_tick) = (Instant::now(), None::<Instant>);
    let mut closing = false;
    loop {
        // Both arms are cancel-safe: the interval keeps its place, the stream what it has read.
        tokio::select! {
            _ = pace.tick(), if !closing => {
                if Instant::now() < end {
                    let text = format!("echo {sent}");
                    socket.send(Message::text(text)).await.map_err(|error| Problem::new("truncated", error))?;
                    sent += 1;
                } else {
                    socket.send(Message::Close(None)).await.map_err(|error| Problem::new("truncated", error))?;
                    closing = true;
                }
            }
            message = socket.next() => {
                success.gap = success.gap.max(last.elapsed());
                last = Instant::now();
                match message {
                    Some(Ok(Message::Text(text))) => {
                        let expected = if text.starts_with("echo") {
                            echoed += 1;
                            format!("echo {}", echoed - 1)
                        } else {
                            ticks += 1;
                            if let Some(before) = last_tick.replace(last) {
                                shared.timing.token(Kind::WebSocket, last.duration_since(before));
                            }
                            format!("tick {}", ticks - 1)
                        };
                        if text.as_str() != expected {
                            return Err(Problem::new("wrong", format!("`{text}` instead of `{expected}`")));
                        }
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Binary(_) | Message::Frame(_))) => {}
                    Some(Ok(Message::Close(Some(CloseFrame { code: CloseCode::Restart, .. })))) => {
                        return Err(Problem::new("announced", format!("after {echoed} of {sent}")));
                    }
                    // The answer to our close: everything sent before it has come back.
                    Some(Ok(Message::Close(_))) if closing => {
                        success.tokens = echoed + ticks;
                        return if echoed == sent {
                            Ok(success)
                        } else {
                            Err(Problem::new("truncated", format!("{echoed} of {sent} came back")))
                        };
                    }
                    Some(Ok(Message::Close(frame))) => return Err(Problem::new("truncated", format!("closed by the other side: {frame:?}"))),
                    Some(Err(error)) => return Err(Problem::new("truncated", format!("after {echoed} of {sent}: {error}"))),
                    None => return Err(Problem::new("truncated", format!("ended after {echoed} of {sent}"))),
                }
            }
        }
    }
}
