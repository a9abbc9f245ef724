//! Why there is no plan.

use orchestra_model::{Code, Diagnostic, EnvironmentId, ResourceId};

/// A desired state for which no plan can be made. Validation of the stack file finds the same faults earlier and with
/// their places; this is the second line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The desired state is one of another environment.
    #[error("the desired state is one of {found}, not of {expected}")]
    OtherEnvironment {
        /// Environment that is planned.
        expected: EnvironmentId,
        /// Environment that the desired state names.
        found: EnvironmentId,
    },
    /// An edge leads nowhere.
    #[error("{from} depends on {to}, which does not exist")]
    UnknownDependency {
        /// The dependent.
        from: ResourceId,
        /// What it depends on.
        to: ResourceId,
    },
    /// Edges form a cycle.
    #[error("dependencies form a cycle: {}", path(.cycle))]
    Cycle {
        /// Each depends on the next, the last on the first.
        cycle: Vec<ResourceId>,
    },
    /// A resource has the id of another kind than its own.
    #[error("{id} does not hold a {}", .id.kind)]
    KindMismatch {
        /// Its id.
        id: ResourceId,
    },
}

fn path(cycle: &[ResourceId]) -> String {
    cycle.iter().chain(cycle.first()).map(ToString::to_string).collect::<Vec<_>>().join(" -> ")
}

impl PlanError {
    /// The error as a user sees it.
    pub fn diagnostic(&self) -> Diagnostic {
        let (code, help) = match self {
            Self::OtherEnvironment { .. } => (Code::UNKNOWN_ENVIRONMENT, "name the environment that is meant"),
            Self::UnknownDependency { .. } => (Code::UNKNOWN_REFERENCE, "define it, or remove it from `depends_on`"),
            Self::Cycle { .. } => (Code::DEPENDENCY_CYCLE, "remove one of these edges from `depends_on`"),
            Self::KindMismatch { .. } => (Code::INTERNAL, "report this as a defect"),
        };
        Diagnostic::error(code, self.to_string()).help(help)
    }
}
