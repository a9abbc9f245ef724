//! Validation of every environment of a stack file.
//!
//! An overlay that nobody deploys today is a mistake that waits for the day when somebody does. What is wrong in all
//! environments is said once.

use orchestra_api::{Source, ValidEnvironment};
use orchestra_engine::{EngineError, IMPLICIT_ENVIRONMENT, LoadedStack, Outline, PreviewContext, StackSource};
use orchestra_model::{Code, Diagnostic, Name, Severity, preview::BaseResource};

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
    let outline = outline(source.clone()).await?;
    for name in names(&outline) {
        let source = Source { environment: Some(name.clone()), ..source.clone() };
        match handlers::load(app, source.clone()).await {
            Ok(stack) => {
                add(&mut others.warnings, within(&name, stack.warnings.clone()));
                // Only a file that speaks of previews has anything to say of them.
                if outline.previews {
                    let errors = in_a_preview(app, &source, &name, &stack).await?;
                    let note = format!("in a preview of `{name}`");
                    add(&mut others.errors, errors.into_iter().map(|error| error.note(note.clone())).collect());
                }
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

/// What is wrong with a preview of an environment, as if all that it shares were up there.
async fn in_a_preview(
    app: &App,
    source: &Source,
    from: &Name,
    stack: &LoadedStack,
) -> Result<Vec<Diagnostic>, EngineError> {
    let free = |name: &Name| name != from && !stack.environments.contains(name);
    let Some(name) = ["preview", "preview-1", "preview-2"].iter().filter_map(|name| name.parse().ok()).find(free)
    else {
        return Ok(Vec::new());
    };
    let base = stack.desired.resources.iter().map(|(id, applied)| {
        let ports = applied.as_service().into_iter().flat_map(|service| service.ports.keys());
        let chosen_ports = ports.map(|port| (port.clone(), 1)).collect();
        (id.clone(), BaseResource { applied: applied.clone(), chosen_ports })
    });
    let preview = PreviewContext { from: from.clone(), ttl: None, owner: None, base: base.collect() };
    let source = StackSource {
        path: source.source_path.clone(),
        shown: source.shown_path().to_owned(),
        text: source.source_text.clone(),
        environment: Some(name),
        preview: Some(preview),
    };
    let volumes = app.facts.volumes.clone();
    let loaded = tokio::task::spawn_blocking(move || orchestra_engine::load(&source, &volumes)).await;
    match loaded.map_err(|_| EngineError::ShuttingDown)? {
        Ok(_) => Ok(Vec::new()),
        Err(EngineError::Refused(errors)) => Ok(errors),
        Err(error) => Err(error),
    }
}

async fn outline(source: Source) -> Result<Outline, EngineError> {
    let outline = tokio::task::spawn_blocking(move || {
        let shown = source.shown_path().to_owned();
        let source =
            StackSource { path: source.source_path, shown, text: source.source_text, environment: None, preview: None };
        orchestra_engine::outline(&source)
    });
    outline.await.map_err(|_| EngineError::ShuttingDown)
}

/// Environments to look at beside the default one.
fn names(outline: &Outline) -> Vec<Name> {
    // A file without environments is one all the same, and previews can be made of it.
    if outline.environments.is_empty() && outline.previews {
        return IMPLICIT_ENVIRONMENT.parse().into_iter().collect();
    }
    outline.environments.clone()
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
