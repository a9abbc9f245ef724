//! Exit codes: one table, from which the reference is made.

use orchestra_model::{Code, Diagnostic, Severity};

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Exit {
    /// It did what was asked.
    Success,
    /// It did not: a run failed, or a thing that was asked for does not exist or is not in order.
    Failed,
    /// The command line or the stack file is not valid.
    Invalid,
    /// The server cannot be reached or started.
    NoServer,
    /// It was refused: a stale plan, a run in progress, a locked state directory.
    Refused,
    /// The run was cancelled.
    Cancelled,
    /// `plan --exit-code` only: there are changes.
    Changes,
    /// A Ctrl-C ended the command; a run that it started goes on without it.
    Interrupted,
}

impl Exit {
    /// Every one, in order.
    pub const ALL: [Self; 8] = [
        Self::Success,
        Self::Failed,
        Self::Invalid,
        Self::NoServer,
        Self::Refused,
        Self::Cancelled,
        Self::Changes,
        Self::Interrupted,
    ];

    /// The number.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Failed => 1,
            Self::Invalid => 2,
            Self::NoServer => 3,
            Self::Refused => 4,
            Self::Cancelled => 5,
            Self::Changes => 10,
            Self::Interrupted => 130,
        }
    }

    /// What it means, for the reference.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Success => {
                "The command did what was asked. Also when whoever reads the output (`| head`) stops reading."
            }
            Self::Failed => {
                "The command did not do what was asked: a run failed (what it had changed was put back, as the message says), a thing that was named does not exist, or `doctor` found something that stands in the way."
            }
            Self::Invalid => "The command line, the stack file or a saved plan is not valid. Nothing was changed.",
            Self::NoServer => "The server cannot be reached or started, or does not fit this client.",
            Self::Refused => {
                "The command was refused, and trying again later or with a new plan may help: a saved plan is stale, another run is in progress, another server owns the state directory, there is no release to go back to."
            }
            Self::Cancelled => {
                "The run was cancelled, or superseded by a newer one, and what it had changed was put back, as the message says."
            }
            Self::Changes => "Only `orchestra plan --exit-code`: there are changes.",
            Self::Interrupted => {
                "Ctrl-C ended the command. For a run that means the second Ctrl-C: the server goes on with it."
            }
        }
    }

    /// The exit code that errors lead to: that of the first error.
    pub fn of(diagnostics: &[Diagnostic]) -> Self {
        let error = diagnostics.iter().find(|diagnostic| diagnostic.severity == Severity::Error);
        error.map_or(Self::Failed, |error| Self::of_code(error.code))
    }

    fn of_code(code: Code) -> Self {
        match code {
            Code::PLAN_STALE | Code::RUN_IN_PROGRESS | Code::STATE_LOCKED | Code::NOTHING_TO_ROLL_BACK_TO => {
                Self::Refused
            }
            Code::PLAN_UNREADABLE => Self::Invalid,
            Code::RUN_CANCELLED | Code::SUPERSEDED => Self::Cancelled,
            Code::SERVER_UNREACHABLE | Code::UNAUTHORIZED | Code::INCOMPATIBLE | Code::BAD_REQUEST => Self::NoServer,
            code if code.as_str().starts_with("ORC01") || code.as_str().starts_with("ORC02") => Self::Invalid,
            _ => Self::Failed,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn codes_map_to_exits() {
        let mut table = String::new();
        for code in Code::ALL {
            let _ =
                writeln!(table, "{code} {:>3}  {}", Exit::of(&[Diagnostic::error(*code, "x")]).code(), code.title());
        }
        insta::assert_snapshot!(table);
    }

    #[test]
    fn the_first_error_decides_and_warnings_do_not() {
        let warning = Diagnostic::warning(Code::UNKNOWN_KEY, "x");
        assert_eq!(Exit::of(std::slice::from_ref(&warning)), Exit::Failed);
        assert_eq!(Exit::of(&[warning, Diagnostic::error(Code::PLAN_STALE, "x")]), Exit::Refused);
    }
}
