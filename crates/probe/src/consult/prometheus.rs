//! Instant queries of a Prometheus server (<https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries>),
//! and of whatever speaks the same: Thanos, Mimir, `VictoriaMetrics`.

use std::time::Duration;

use orchestra_model::secret::SecretSource;
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use crate::{
    check::{Fault, words},
    http::Request,
    outside::Place,
};

/// Longest answer that is read.
const ANSWER: usize = 1024 * 1024;
/// Most numbers of one answer.
const MAX_VALUES: usize = 100;
/// Longest token.
const TOKEN: u64 = 16 * 1024;

/// Asks for the value of a query now; an empty list is no data.
///
/// # Errors
///
/// Why there is no value, in one clause: the server's own words if it has some.
pub(super) async fn query(
    address: &str,
    query: &str,
    token: Option<&SecretSource>,
    ca: Option<&str>,
    timeout: Duration,
    stage: &mut &'static str,
) -> Result<Vec<f64>, String> {
    let place = Place::of(address)?;
    let path = format!("{}/api/v1/query", place.path.trim_end_matches('/'));
    let mut headers = vec![
        ("Host", place.authority),
        ("Accept", "application/json"),
        ("Content-Type", "application/x-www-form-urlencoded"),
    ];
    let authorization = match token {
        Some(token) => Some(format!("Bearer {}", read_token(token).await?)),
        None => None,
    };
    headers.extend(authorization.as_deref().map(|value| ("Authorization", value)));
    let body = format!("query={}&timeout={}ms", encoded(query), timeout.as_millis());
    let (connection, peer) = place.connect(ca, stage).await?;
    let request = Request::new(&super::request("POST", peer, &path, &headers, Some(body)))?;
    match request.fetch_through(connection, stage, ANSWER).await {
        Ok((status, body)) => understand(status, &body),
        Err(Fault::Answer(answer)) => Err(answer),
        Err(Fault::Io(error)) => Err(format!("{} {stage}", words(&error))),
    }
}

/// The token, which must not get into any message.
async fn read_token(token: &SecretSource) -> Result<String, String> {
    let text = match token {
        SecretSource::Env(name) => {
            std::env::var(name).map_err(|_| format!("the server has no variable {name} for the token"))?
        }
        SecretSource::File(path) => {
            let file = tokio::fs::File::open(path).await.map_err(|error| format!("the token in {path}: {error}"))?;
            let mut text = String::new();
            let read = file.take(TOKEN).read_to_string(&mut text).await;
            read.map_err(|error| format!("the token in {path}: {error}"))?;
            text
        }
    };
    let line = text.lines().next().unwrap_or_default().trim();
    if line.is_empty() || !line.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the token is empty, or has characters that no header field can carry".to_owned());
    }
    Ok(line.to_owned())
}

/// Percent-encoding of a form (URL standard, "application/x-www-form-urlencoded percent-encode set").
fn encoded(text: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::new(), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"*-._".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[derive(Deserialize)]
struct Reply {
    status: String,
    data: Option<Data>,
    #[serde(rename = "errorType")]
    error_type: Option<String>,
    error: Option<String>,
    #[serde(default)]
    warnings: Vec<String>,
}

#[derive(Deserialize)]
struct Data {
    #[serde(rename = "resultType")]
    kind: String,
    result: serde_json::Value,
}

fn understand(status: u16, body: &[u8]) -> Result<Vec<f64>, String> {
    let Ok(reply) = serde_json::from_slice::<Reply>(body) else {
        return Err(if status == 200 {
            "its answer is not that of a Prometheus server".to_owned()
        } else {
            format!("HTTP {status}")
        });
    };
    let (Some(data), "success") = (reply.data, reply.status.as_str()) else {
        if status == 200 && reply.error.is_none() {
            return Err("its answer is not that of a Prometheus server".to_owned());
        }
        let kind = reply.error_type.map(|kind| format!("{kind}: ")).unwrap_or_default();
        return Err(format!("{kind}{}", reply.error.unwrap_or_else(|| format!("HTTP {status}"))));
    };
    let values = match (data.kind.as_str(), &data.result) {
        ("scalar", result) => vec![value(result)?],
        ("vector", serde_json::Value::Array(series)) if series.len() > MAX_VALUES => {
            return Err(format!("the query returns {} series: add up, or name the one that is meant", series.len()));
        }
        ("vector", serde_json::Value::Array(series)) => {
            series.iter().map(|one| value(&one["value"])).collect::<Result<Vec<f64>, String>>()?
        }
        (kind, _) => return Err(format!("the query returns a {kind}, not a number")),
    };
    match reply.warnings.into_iter().next() {
        // A part of what it asked did not answer, and that part may have had the data.
        Some(warning) if values.is_empty() => Err(warning),
        _ => Ok(values),
    }
}

/// `[1435781451.781, "1"]`
fn value(pair: &serde_json::Value) -> Result<f64, String> {
    let text = pair.get(1).and_then(serde_json::Value::as_str);
    let number = text.and_then(|text| text.parse().ok());
    number.ok_or_else(|| "the query returns something that is not a number".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &str) -> Result<Vec<f64>, String> {
        understand(200, body.as_bytes())
    }

    #[test]
    fn values_are_read() {
        let vector = r#"{"status":"success","data":{"resultType":"vector","result":[
            {"metric":{"__name__":"up"},"value":[1435781451.781,"1"]},{"metric":{},"value":[1435781451.781,"-0.25"]}]},"infos":["x"]}"#;
        assert_eq!(of(vector), Ok(vec![1.0, -0.25]));
        let scalar =
            r#"{"status":"success","data":{"resultType":"scalar","result":[1435781451.781,"+Inf"]},"warnings":["w"]}"#;
        assert_eq!(of(scalar), Ok(vec![f64::INFINITY]));
        let nan = r#"{"status":"success","data":{"resultType":"scalar","result":[1435781451.781,"NaN"]}}"#;
        assert!(of(nan).unwrap()[0].is_nan());
        assert_eq!(of(r#"{"status":"success","data":{"resultType":"vector","result":[]}}"#), Ok(vec![]));
    }

    #[test]
    fn what_is_no_value_is_an_error_with_the_servers_words() {
        let wrong =
            r#"{"status":"error","errorType":"bad_data","error":"invalid parameter \"query\": 1:2: parse error"}"#;
        assert_eq!(
            understand(400, wrong.as_bytes()),
            Err("bad_data: invalid parameter \"query\": 1:2: parse error".to_owned())
        );
        assert_eq!(understand(503, b"upstream gone"), Err("HTTP 503".to_owned()));
        assert_eq!(understand(401, b"{}"), Err("HTTP 401".to_owned()));
        for nothing in [r#"{"status":"success"}"#, r#"{"status":"success","data":null}"#] {
            assert!(of(nothing).unwrap_err().contains("not that of a Prometheus server"));
        }
        assert!(of("{}").unwrap_err().contains("not that of a Prometheus server"));
        let matrix = r#"{"status":"success","data":{"resultType":"matrix","result":[]}}"#;
        assert_eq!(of(matrix), Err("the query returns a matrix, not a number".to_owned()));
        let histogram =
            r#"{"status":"success","data":{"resultType":"vector","result":[{"metric":{},"histogram":[1,{}]}]}}"#;
        assert!(of(histogram).unwrap_err().contains("not a number"));
        let partial =
            r#"{"status":"success","data":{"resultType":"vector","result":[]},"warnings":["store x is gone"]}"#;
        assert_eq!(of(partial), Err("store x is gone".to_owned()));
        let one = r#"{"metric":{},"value":[1,"1"]}"#;
        let many = vec![one; 101].join(",");
        let many = format!(r#"{{"status":"success","data":{{"resultType":"vector","result":[{many}]}}}}"#);
        assert!(of(&many).unwrap_err().contains("101 series"));
    }

    #[test]
    fn queries_survive_their_encoding() {
        assert_eq!(
            encoded("rate(a{b=\"c\"}[5m]) > 1 + é"),
            "rate%28a%7Bb%3D%22c%22%7D%5B5m%5D%29%20%3E%201%20%2B%20%C3%A9"
        );
    }
}
