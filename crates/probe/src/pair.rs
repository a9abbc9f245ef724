//! One half of a pair: the same safe request that both sets of a rollout are asked at the same time.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use crate::{
    check::{Fault, no_answer},
    http::Request,
    target::HttpCheck,
};

/// Asks `path` of an instance once with `GET`. A complete answer with a status from 200 to 399 within `timeout` is a
/// good one.
///
/// # Errors
///
/// Why it is a bad one, in one line for people.
pub async fn ask(address: SocketAddr, path: &str, timeout: Duration) -> Result<(), String> {
    let check = HttpCheck {
        address,
        method: "GET".to_owned(),
        path: path.to_owned(),
        headers: BTreeMap::new(),
        body: None,
        status: std::collections::BTreeSet::new(),
        contains: None,
    };
    let request = Request::new(&check)?;
    let mut stage = "while connecting";
    match tokio::time::timeout(timeout, request.ask(&mut stage)).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(Fault::Answer(answer))) => Err(answer),
        Ok(Err(Fault::Io(error))) => Err(format!("{error} {stage}")),
        Err(_) => Err(no_answer(timeout, stage)),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    async fn answered(answer: &'static str) -> (Result<(), String>, String) {
        let (address, server) = crate::once::server(answer).await;
        tokio::join!(ask(address, "/x?y=1", Duration::from_secs(5)), server)
    }

    #[tokio::test]
    async fn a_status_below_400_is_good_and_everything_else_is_bad() {
        let (answer, seen) = answered("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        assert_eq!(answer, Ok(()));
        assert!(seen.starts_with("GET /x?y=1 HTTP/1.1\r\n"), "{seen}");
        assert_eq!(answered("HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n").await.0, Err("HTTP 500".to_owned()));
        assert!(answered("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nok").await.0.is_err());
        assert!(ask(([127, 0, 0, 1], 1).into(), "/", Duration::from_secs(5)).await.is_err());
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let late = ask(silent.local_addr().unwrap(), "/", Duration::from_millis(50)).await;
        assert!(late.as_ref().is_err_and(|why| why.contains("no answer within 50ms")), "{late:?}");
    }
}
