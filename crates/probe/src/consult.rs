//! Numbers from elsewhere: what instances export, and what a Prometheus server answers. Each question is asked once; that
//! it could not be asked is an answer of its own, with the reason.
//!
//! Instances are asked over plain HTTP at their own ports, Prometheus servers over HTTP or HTTPS.

pub mod exposition;
pub mod prometheus;

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use futures_util::{StreamExt, stream};
use orchestra_model::consult::{Answer, Question, ScrapeTarget, Scraped, Selector};

use crate::{
    check::{Fault, clean, no_answer, words},
    http::Request,
    target::HttpCheck,
};

/// Longest text of metrics that is read of an instance.
const EXPOSITION: usize = 8 * 1024 * 1024;
/// Instances that are asked at a time.
const AT_A_TIME: usize = 16;

/// Asks once. `timeout` is for each thing that is asked: an instance, or a server.
pub async fn ask(question: Question, timeout: Duration) -> Answer {
    match question {
        Question::Scrape { targets, path, series } => {
            let (path, series) = (path.as_str(), series.as_slice());
            let asked = targets.into_iter().map(|target| scrape(target, path, series, timeout));
            Answer::Scraped(stream::iter(asked).buffered(AT_A_TIME).collect().await)
        }
        Question::Query { address, query, token, ca } => {
            let mut stage = "while connecting";
            let asked = prometheus::query(&address, &query, token.as_ref(), ca.as_deref(), timeout, &mut stage);
            match tokio::time::timeout(timeout, asked).await {
                Ok(Ok(values)) => Answer::Values(values),
                Ok(Err(why)) => Answer::Error(clean(&why)),
                Err(_) => Answer::Error(no_answer(timeout, stage)),
            }
        }
    }
}

async fn scrape(target: ScrapeTarget, path: &str, series: &[Selector], timeout: Duration) -> Scraped {
    let headers = [("Accept", "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4")];
    let check = request("GET", target.address, path, &headers, None);
    let values = match fetch(&check, EXPOSITION, timeout).await {
        Ok((200, body)) => exposition::read(&body, series),
        Ok((status, _)) => Err(format!("HTTP {status}")),
        Err(why) => Err(why),
    };
    let values = values.map_err(|why| clean(&format!("{path}: {why}")));
    Scraped { instance: target.instance, attempt: target.attempt, values }
}

/// An answer whole: its status and its body, of at most `limit` bytes.
async fn fetch(check: &HttpCheck, limit: usize, timeout: Duration) -> Result<(u16, Vec<u8>), String> {
    let request = Request::new(check)?;
    let mut stage = "while connecting";
    match tokio::time::timeout(timeout, request.fetch(&mut stage, limit)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(Fault::Answer(answer))) => Err(answer),
        Ok(Err(Fault::Io(error))) => Err(format!("{} {stage}", words(&error))),
        Err(_) => Err(no_answer(timeout, stage)),
    }
}

fn request(method: &str, address: SocketAddr, path: &str, headers: &[(&str, &str)], body: Option<String>) -> HttpCheck {
    let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    HttpCheck {
        address,
        method: method.to_owned(),
        path: path.to_owned(),
        headers: headers.collect::<BTreeMap<_, _>>(),
        body,
        status: std::collections::BTreeSet::new(),
        contains: None,
    }
}
