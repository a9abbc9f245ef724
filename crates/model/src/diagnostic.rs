//! What a user reads when something is wrong: a code, the place, the message, and what to do next.
//!
//! A [`Diagnostic`] is a value; it is drawn as text or written as JSON only at the edge. Its [`Code`] has a page that
//! `orchestra explain CODE` prints.

use std::{borrow::Cow, fmt};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de};

/// A stable error code such as `ORC0101`, with a page in `docs/errors/`.
///
/// | range | about |
/// |---|---|
/// | 01xx | reading the stack file: encoding, YAML, size, duplicate keys |
/// | 02xx | meaning of the stack file: unknown keys, types, values, references, cycles |
/// | 03xx | planning and saved plans |
/// | 04xx | state directory, journal, locks, format versions |
/// | 05xx | instances: start, readiness, exit, stop |
/// | 06xx | addresses, routes, proxy |
/// | 07xx | runs: failed, cancelled, superseded, timed out |
/// | 08xx | server and API: connection, authorization, version |
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct Code(&'static str);

macro_rules! codes {
    ($($name:ident = $code:literal : $title:literal),* $(,)?) => {
        impl Code {
            $(#[doc = $title] pub const $name: Code = Code($code);)*

            /// Every code, in order.
            pub const ALL: &'static [Code] = &[$(Code($code)),*];

            /// One line that says what the code stands for.
            pub fn title(self) -> &'static str {
                match self.0 { $($code => $title,)* _ => "unknown" }
            }

            /// The page that explains it, in Markdown.
            pub fn page(self) -> &'static str {
                match self.0 {
                    $($code => include_str!(concat!("../../../docs/errors/", $code, ".md")),)*
                    _ => "",
                }
            }
        }
    };
}

codes! {
    NOT_READABLE = "ORC0101": "the stack file cannot be read",
    ENCODING = "ORC0102": "the stack file is not UTF-8 text",
    YAML_SYNTAX = "ORC0103": "the stack file is not valid YAML",
    DUPLICATE_KEY = "ORC0104": "a key appears twice in one mapping",
    TOO_LARGE = "ORC0105": "the stack file is larger than Orchestra reads",
    TOO_COMPLEX = "ORC0106": "the stack file nests or repeats more than Orchestra reads",
    UNKNOWN_KEY = "ORC0201": "a key is not known here",
    WRONG_TYPE = "ORC0202": "a value has the wrong type",
    MISSING_KEY = "ORC0203": "a required key is missing",
    INVALID_VALUE = "ORC0204": "a value is not allowed here",
    INVALID_NAME = "ORC0205": "a name is not allowed",
    UNSUPPORTED_VERSION = "ORC0206": "the version of the stack file is not supported",
    UNKNOWN_REFERENCE = "ORC0207": "a reference names something that does not exist",
    DEPENDENCY_CYCLE = "ORC0208": "dependencies form a cycle",
    PORT_CONFLICT = "ORC0209": "one port is published twice",
    INTERPOLATION = "ORC0210": "an expression in `{{ … }}` cannot be evaluated",
    UNKNOWN_ENVIRONMENT = "ORC0211": "the environment is not defined",
    CONFLICTING_KEYS = "ORC0212": "two keys exclude each other",
    NOT_YET_SUPPORTED = "ORC0213": "this version of Orchestra does not support that yet",
    PREVIEW = "ORC0214": "a preview cannot be made like this",
    SECRET = "ORC0215": "the value of a secret cannot be had",
    PLAN_STALE = "ORC0301": "a saved plan no longer fits what is there",
    PLAN_UNREADABLE = "ORC0302": "a saved plan cannot be read",
    NOTHING_TO_ROLL_BACK_TO = "ORC0303": "there is no earlier release to go back to",
    STATE_LOCKED = "ORC0401": "another server owns the state directory",
    STATE_FORMAT = "ORC0402": "the state was written by another version of Orchestra",
    STATE_DAMAGED = "ORC0403": "the state cannot be read",
    STATE_WRITE = "ORC0404": "the state cannot be written",
    NOT_FOUND = "ORC0405": "there is no such thing",
    START_FAILED = "ORC0501": "a program could not be started",
    NOT_READY = "ORC0502": "an instance did not become ready in time",
    CRASH_LOOP = "ORC0503": "an instance keeps exiting",
    JOB_FAILED = "ORC0504": "a job failed",
    STOP_FAILED = "ORC0505": "an instance could not be stopped",
    DEPENDENCY_FAILED = "ORC0506": "a dependency failed",
    EXITED = "ORC0507": "an instance exited and may not be restarted",
    ADDRESS_IN_USE = "ORC0601": "an address is already in use",
    PROXY_UNAVAILABLE = "ORC0602": "the proxy does not answer",
    TRUST = "ORC0603": "what the system trusts could not be changed",
    RUN_CANCELLED = "ORC0701": "the run was cancelled",
    RUN_IN_PROGRESS = "ORC0702": "another run is in progress",
    RUN_TIMED_OUT = "ORC0703": "the run passed its deadline",
    VERDICT = "ORC0704": "the verdict about a release was bad",
    HOOK = "ORC0705": "a hook of a rollout did not agree",
    NO_ROLLOUT = "ORC0706": "there is no rollout that could be moved",
    SUPERSEDED = "ORC0707": "something newer took the place of the run",
    SERVER_UNREACHABLE = "ORC0801": "the server cannot be reached",
    UNAUTHORIZED = "ORC0802": "the request is not authorized",
    INCOMPATIBLE = "ORC0803": "client and server do not fit together",
    BAD_REQUEST = "ORC0804": "the request is not one that the API takes",
    INTERNAL = "ORC0899": "a defect in Orchestra",
}

impl Code {
    /// The text, such as `ORC0101`.
    pub const fn as_str(self) -> &'static str {
        self.0
    }

    /// The code with this text, in any case.
    pub fn find(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|code| code.0.eq_ignore_ascii_case(text))
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.0)
    }
}

impl<'de> Deserialize<'de> for Code {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        Self::find(&text).ok_or_else(|| de::Error::custom(format!("unknown error code `{text}`")))
    }
}

impl JsonSchema for Code {
    fn schema_name() -> Cow<'static, str> {
        "Code".into()
    }
    fn inline_schema() -> bool {
        true
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^ORC[0-9]{4}$", "description": "An error code; see `orchestra explain CODE`."})
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is done.
    Error,
    /// It is done, but probably not what was wanted.
    Warning,
}

/// A place in a source file.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Location {
    /// Path as the user gave it.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// Characters to underline; at least 1.
    pub length: u32,
    /// The source line, without its end, cut to 400 characters.
    pub source: String,
}

/// A place with a remark.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Label {
    /// Where.
    pub location: Location,
    /// What about it; may be empty on the first label.
    pub message: String,
}

/// Something that a user must know, complete enough to act on.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub struct Diagnostic {
    /// Stable code with a page.
    pub code: Code,
    /// How bad.
    pub severity: Severity,
    /// One sentence without a full stop: what is wrong, naming the subject.
    pub message: String,
    /// Places, the main one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<Label>,
    /// Causes from the outside in, each one line; log lines of a culprit.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// What to do next, with the command if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub help: Option<String>,
}

impl Diagnostic {
    /// An error without place or help yet.
    pub fn error(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: Severity::Error,
            message: message.into(),
            labels: Vec::new(),
            notes: Vec::new(),
            help: None,
        }
    }

    /// A warning without place or help yet.
    pub fn warning(code: Code, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(code, message) }
    }

    /// Adds a place.
    #[must_use]
    pub fn at(mut self, location: Location, message: impl Into<String>) -> Self {
        self.labels.push(Label { location, message: message.into() });
        self
    }

    /// Adds a cause or other fact.
    #[must_use]
    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.notes.push(note.into());
        self
    }

    /// Says what to do next.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// Adds the chain of sources below `error` as notes.
    #[must_use]
    pub fn caused_by(mut self, error: &(dyn std::error::Error + 'static)) -> Self {
        let mut next = Some(error);
        while let Some(error) = next {
            self.notes.push(error.to_string());
            next = error.source();
        }
        self
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {}", self.code, self.message)
    }
}

impl std::error::Error for Diagnostic {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_has_a_page_of_its_own() {
        for code in Code::ALL {
            let page = code.page();
            assert!(
                page.starts_with(&format!("# {code}: {}", code.title())),
                "docs/errors/{code}.md must start with its title"
            );
            assert!(page.len() > 200, "docs/errors/{code}.md says too little");
            assert_eq!(Code::find(code.as_str()), Some(*code));
        }
    }
}
