//! `orchestra validate` and `orchestra plan`: they read, and change nothing.

use orchestra_api::{Down, PlanRequest, ResourceCount};
use orchestra_model::{EnvironmentId, ResourceKind};
use orchestra_plan::Style;

use crate::{
    args::{PlanArgs, ValidateArgs},
    exit::Exit,
    failure::Result,
    output::Output,
    saved_plan,
    session::Session,
};

pub(crate) async fn validate(args: &ValidateArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let file = session.stack_file()?;
    let environment = session.environment_name();
    let is_one = environment.is_some();
    let source = session.source(&args.preview)?;
    let client = session.reader(output).await?;
    let valid = if is_one { client.validate(&source).await? } else { client.validate_all(&source).await? };
    if output.json {
        output.json(&valid)?;
    } else {
        output.diagnostics(&valid.warnings);
        let others = valid.others.iter().map(|other| summary(&other.environment, &other.resources));
        let all: Vec<String> = [summary(&valid.environment, &valid.resources)].into_iter().chain(others).collect();
        output.line(&format!("{} is valid: {}", file.shown, all.join("; ")))?;
    }
    Ok(Exit::Success)
}

fn summary(environment: &EnvironmentId, resources: &[ResourceCount]) -> String {
    let counts: Vec<String> = resources
        .iter()
        .filter(|count| !count.names.is_empty())
        .map(|count| {
            let (one, many) = match count.kind {
                ResourceKind::Service => ("service", "services"),
                ResourceKind::Job => ("job", "jobs"),
                ResourceKind::Volume => ("volume", "volumes"),
            };
            format!("{} {}", count.names.len(), if count.names.len() == 1 { one } else { many })
        })
        .collect();
    let counts = if counts.is_empty() { "nothing".to_owned() } else { counts.join(", ") };
    format!("{environment} with {counts}")
}

pub(crate) async fn plan(args: &PlanArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let client = session.reader(output).await?;
    let (request, source_path) = if args.down {
        let environment = session.environment(&client).await?;
        (PlanRequest::Down(Down { environment, volumes: args.volumes }), None)
    } else {
        let source = session.source(&args.preview)?;
        let path = source.source_path.clone();
        (PlanRequest::Up(source), Some(path))
    };
    let response = client.plan(&request).await?;
    let plan = &response.plan;
    if let Some(out) = &args.out {
        saved_plan::write(&session.cwd.join(out), plan, source_path.as_deref())?;
    }
    if output.json {
        output.json(&response)?;
    } else {
        output.diagnostics(&response.warnings);
        let width = output.columns().unwrap_or(Style::default().width);
        let style = Style { color: output.palette.color, width, verbose: output.verbose };
        let text = orchestra_plan::render(plan, style);
        output.text(&text)?;
        if let Some(out) = &args.out {
            output.note(&format!("saved; apply it with: orchestra up --plan {}", out.display()));
        }
    }
    Ok(if args.exit_code && !plan.is_empty() { Exit::Changes } else { Exit::Success })
}
