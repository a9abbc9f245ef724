//! Validation of every environment of a stack file.
//!
//! An overlay that nobody deploys today is a mistake that waits for the day when somebody does. What is wrong in all
//! environments is said once.

use orchestra_api::{Source, ValidEnvironment};
use orchestra_engine::{EngineError, StackSource};
use orchestra_model::{Code, Diagnostic, Name, Severity};

use crate::{backend::App, handlers};

/// What there is to say of all environments that a stack file names.
#[derive(Default)]
pub(crate) struct Others {
    pub(crate) valid: Vec<ValidEnvironment>,
    pub(crate) errors: Vec<Diagnostic>,
    pub(crate) warnings: Vec<Diagnostic>,
}

/// Validates every environment that the file names.
pub(crate) async fn others(app: &App, source: &Source) -> Result<Others, EngineError> {
    let mut others = Others::default();
    for name in names(source.clone()).await? {
        let source = Source { environment: Some(name.clone()), ..source.clone() };
        match handlers::load(app, source).await {
            Ok(stack) => {
                add(&mut others.warnings, within(&name, stack.warnings.clone()));
                let (environment, resources) = (stack.desired.environment.clone(), handlers::counts(&stack));
                others.valid.push(ValidEnvironment { environment, resources });
            }
            Err(EngineError::Refused(errors)) => {
                // What is written for a later version, or for another target, is no mistake until it is deployed.
                let (later, errors) = errors.into_iter().partition(|error| error.code == Code::NOT_YET_SUPPORTED);
                let later: Vec<Diagnostic> = later;
                let warnings = later.into_iter().map(|error| Diagnostic { severity: Severity::Warning, ..error });
                let warnings = warnings.map(|warning| warning.note("this environment cannot be deployed yet"));
                add(&mut others.warnings, within(&name, warnings.collect()));
                add(&mut others.errors, within(&name, errors));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(others)
}

async fn names(source: Source) -> Result<Vec<Name>, EngineError> {
    let names = tokio::task::spawn_blocking(move || {
        let shown = source.shown_path().to_owned();
        let source = StackSource { path: source.source_path, shown, text: source.source_text, environment: None };
        orchestra_engine::environments(&source)
    });
    names.await.map_err(|_| EngineError::ShuttingDown)
}

fn within(name: &Name, diagnostics: Vec<Diagnostic>) -> Vec<Diagnostic> {
    let note = format!("in the environment `{name}`");
    diagnostics.into_iter().map(|diagnostic| diagnostic.note(note.clone())).collect()
}

/// Adds what is not said already: the same of the same place, whatever environment it was found in.
pub(crate) fn add(all: &mut Vec<Diagnostic>, more: Vec<Diagnostic>) {
    for diagnostic in more {
        let same = |other: &Diagnostic| {
            (other.code, &other.message, &other.labels) == (diagnostic.code, &diagnostic.message, &diagnostic.labels)
        };
        if !all.iter().any(same) {
            all.push(diagnostic);
        }
    }
}
