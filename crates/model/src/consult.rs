//! Numbers that do not come from the data plane: metrics that instances export, and answers of a Prometheus server.
//!
//! A machine asks a [`Question`], whoever has sockets brings the [`Answer`]. That it could not be asked is an answer too:
//! nobody may take it for a zero.

use std::{collections::BTreeMap, fmt, net::SocketAddr, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    id::{InstanceId, Name},
    quantity::Timespan,
    secret::SecretSource,
};

/// Where the instances of a service export their metrics, in the text format of Prometheus.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Exporter {
    /// Port of the service; each instance is asked at its own.
    pub port: Name,
    /// Path, beginning with `/`.
    pub path: String,
    /// Pause between two looks.
    pub every: Timespan,
    /// Longest wait for one instance.
    pub timeout: Timespan,
}

/// Series of an exported metric: its name, and labels that a series must have.
///
/// Written as in a query: `http_errors_total`, `http_errors_total{code="500"}`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Selector {
    /// Name of the metric.
    pub name: String,
    /// Labels with the value that they must have. Other labels may have any.
    pub labels: BTreeMap<String, String>,
}

/// What is wrong with the text of a [`Selector`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SelectorError(String);

/// Longest text of a selector, in bytes.
const MAX_SELECTOR: usize = 512;

impl Selector {
    /// The series of this name, whatever their labels are.
    ///
    /// # Errors
    ///
    /// It is not the name of a metric.
    pub fn named(name: &str) -> Result<Self, SelectorError> {
        Self { name: name.to_owned(), labels: BTreeMap::new() }.checked()
    }

    /// Checks names and length.
    ///
    /// # Errors
    ///
    /// A name that cannot be one (<https://prometheus.io/docs/concepts/data_model/>), or too much text.
    pub fn checked(self) -> Result<Self, SelectorError> {
        if !is_name(&self.name, true) {
            return Err(SelectorError(format!("`{}` is not the name of a metric", cut(&self.name))));
        }
        if let Some(label) = self.labels.keys().find(|label| !is_name(label, false)) {
            return Err(SelectorError(format!("`{}` is not the name of a label", cut(label))));
        }
        if self.to_string().len() > MAX_SELECTOR {
            return Err(SelectorError(format!("longer than {MAX_SELECTOR} bytes")));
        }
        Ok(self)
    }
}

/// Letters, digits and `_`, and in names of metrics `:`, not beginning with a digit.
fn is_name(name: &str, colon: bool) -> bool {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || (colon && c == ':');
    !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()) && name.chars().all(fits)
}

fn cut(text: &str) -> String {
    text.chars().take(60).collect()
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        for (index, (label, value)) in self.labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            write!(f, "{}{label}=\"{value}\"", if index == 0 { '{' } else { ',' })?;
        }
        if self.labels.is_empty() { Ok(()) } else { f.write_str("}") }
    }
}

impl FromStr for Selector {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let text = text.trim();
        let (name, rest) = text.find('{').map_or((text, ""), |at| text.split_at(at));
        let mut labels = BTreeMap::new();
        if !rest.is_empty() {
            let problem = || SelectorError(format!("`{}`: expected labels such as {{code=\"500\"}}", cut(rest)));
            let mut inner =
                rest.strip_prefix('{').and_then(|it| it.trim_end().strip_suffix('}')).ok_or_else(problem)?;
            loop {
                inner = inner.trim_start();
                if inner.is_empty() {
                    break;
                }
                let (label, after) = inner.split_once('=').ok_or_else(problem)?;
                if after.starts_with('~') || label.ends_with('!') {
                    return Err(SelectorError("only `=` is known: name each series that is meant".to_owned()));
                }
                let (value, after) = quoted(after.trim_start()).ok_or_else(problem)?;
                if labels.insert(label.trim().to_owned(), value).is_some() {
                    return Err(SelectorError(format!("the label `{}` is given twice", cut(label.trim()))));
                }
                let after = after.trim_start();
                inner = match after.strip_prefix(',') {
                    Some(after) => after,
                    None if after.is_empty() => after,
                    None => return Err(problem()),
                };
            }
        }
        Self { name: name.trim().to_owned(), labels }.checked()
    }
}

/// A text in quotes at the beginning, without its escapes, and what follows.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.strip_prefix('"')?.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &text[at + 2..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                c @ ('\\' | '"') => value.push(c),
                _ => return None,
            },
            c => value.push(c),
        }
    }
    None
}

impl TryFrom<String> for Selector {
    type Error = SelectorError;
    fn try_from(text: String) -> Result<Self, SelectorError> {
        text.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.to_string()
    }
}

/// Something that is asked once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Question {
    /// What these instances export.
    Scrape {
        /// Instances.
        targets: Vec<ScrapeTarget>,
        /// Path of the metrics.
        path: String,
        /// What is wanted of them.
        series: Vec<Selector>,
    },
    /// A query of a Prometheus server.
    Query {
        /// `http://prometheus:9090` or `https://…`, perhaps with a path in front of `/api/v1`.
        address: String,
        /// `PromQL`.
        query: String,
        /// What opens it.
        token: Option<SecretSource>,
        /// File with the certificates (PEM) that are trusted; `None` trusts those of the machine.
        ca: Option<String>,
    },
}

/// One instance that exports metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScrapeTarget {
    /// Which.
    pub instance: InstanceId,
    /// Which start of it.
    pub attempt: u32,
    /// Where.
    pub address: SocketAddr,
}

/// What came of a [`Question`].
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// Of [`Question::Scrape`], in its order.
    Scraped(Vec<Scraped>),
    /// Of [`Question::Query`]: numbers, which may be NaN or infinite. Empty is no data.
    Values(Vec<f64>),
    /// It could not be asked, or did not answer: why, in one clause.
    Error(String),
}

/// What one instance exports.
#[derive(Clone, Debug, PartialEq)]
pub struct Scraped {
    /// Which.
    pub instance: InstanceId,
    /// Which start of it.
    pub attempt: u32,
    /// For each selector that was asked for, the sum of the series that fit; `None` if none does, or if a value is no
    /// number. Or why it could not be read.
    pub values: Result<Vec<Option<f64>>, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_read_as_they_are_written() {
        for text in ["up", "vllm:num_requests_waiting", "errors_total{code=\"500\"}", "e{a=\"x,}\\\"y\\\\\",b=\"\\n\"}"]
        {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.to_string(), text);
            let json = serde_json::to_string(&selector).unwrap();
            assert_eq!(serde_json::from_str::<Selector>(&json).unwrap(), selector);
        }
        let loose: Selector = " e { b = \"2\" , a=\"1\", } ".parse().unwrap();
        assert_eq!(loose.to_string(), "e{a=\"1\",b=\"2\"}");
        assert_eq!("e{}".parse::<Selector>().unwrap().to_string(), "e");
    }

    #[test]
    fn what_is_no_selector_is_refused() {
        for text in [
            "",
            "9a",
            "a-b",
            "a b",
            "{a=\"1\"}",
            "a{",
            "a{b}",
            "a{b=1}",
            "a{b=\"1}",
            "a{b=\"1\"",
            "a{b=\"1\"c=\"2\"}",
            "a{b=~\"x\"}",
            "a{b!=\"x\"}",
            "a{b=\"\\x\"}",
            "a{b=\"1\",b=\"2\"}",
            "a{b:c=\"1\"}",
            "a{b=\"1\"}}",
        ] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
        assert!(format!("a{{b=\"{}\"}}", "x".repeat(600)).parse::<Selector>().is_err());
    }
}
