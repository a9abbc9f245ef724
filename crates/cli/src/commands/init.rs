//! `orchestra init`: a stack file that works, with what else there is in comments, and the schema beside it so that
//! editors complete it without a network.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use orchestra_model::{Code, Diagnostic, Name};

use crate::{args::InitArgs, exit::Exit, failure::Result, output::Output, session::Session};

const STACK: &str = "orchestra.yaml";
/// From the stack file; the folder is Orchestra's own within a project.
const SCHEMA: &str = ".orchestra/schema.json";
const TEMPLATE: &str = include_str!("init/orchestra.yaml");

pub(crate) fn init(args: &InitArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    // `.` is the default, and nobody wants to read it in a path.
    let folder: PathBuf = session.cwd.join(&args.folder).components().collect();
    let name = match &args.name {
        Some(name) => name.clone(),
        None => name_of(&folder),
    };
    let stack = folder.join(STACK);
    let failed = |path: &Path, error: &io::Error| {
        Diagnostic::error(Code::NOT_READABLE, format!("{} cannot be written", path.display())).caused_by(error)
    };
    fs::create_dir_all(folder.join(".orchestra")).map_err(|error| failed(&folder.join(".orchestra"), &error))?;
    // Made only if it is not there, in one step, so that nothing is overwritten even if two do it at once.
    let text = TEMPLATE.replace("{name}", name.as_str()).replace("{schema}", SCHEMA);
    let written = OpenOptions::new().write(true).create_new(true).open(&stack);
    match written.and_then(|mut file| file.write_all(text.as_bytes())) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            return Err(Diagnostic::error(Code::INVALID_VALUE, format!("{} is there already", stack.display()))
                .note("nothing was overwritten")
                .help("look at it with `orchestra plan`, or write into another folder: `orchestra init FOLDER`")
                .into());
        }
        Err(error) => return Err(failed(&stack, &error).into()),
    }
    let schema = folder.join(SCHEMA);
    let json = format!("{:#}\n", orchestra_spec::json_schema());
    fs::write(&schema, json).map_err(|error| failed(&schema, &error))?;
    if output.json {
        output.json(&serde_json::json!({"stack": stack, "schema": schema, "name": name}))?;
    } else {
        let shown = stack.strip_prefix(&session.cwd).unwrap_or(&stack);
        let schema = schema.strip_prefix(&session.cwd).unwrap_or(&schema);
        output.line(&format!("wrote {} (stack `{name}`)", shown.display()))?;
        output.line(&format!("wrote {} (editors complete and check the stack file with it)", schema.display()))?;
        let file = if shown == Path::new(STACK) { String::new() } else { format!(" -f {}", shown.display()) };
        output.line(&format!("next: orchestra up{file}"))?;
    }
    Ok(Exit::Success)
}

/// A stack name out of a folder's name.
fn name_of(folder: &Path) -> Name {
    let folder = fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned());
    let text = folder.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let mut name = String::new();
    for c in text.chars() {
        match c {
            'a'..='z' | '0'..='9' => name.push(c),
            _ if !name.is_empty() && !name.ends_with('-') => name.push('-'),
            _ => {}
        }
    }
    let name = name.trim_start_matches(|c: char| !c.is_ascii_lowercase());
    let name: String = name.chars().take(Name::MAX).collect();
    name.trim_end_matches('-').parse().unwrap_or_else(|_| "my-stack".parse().expect("a valid name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_valid() {
        let text = TEMPLATE.replace("{name}", "shop").replace("{schema}", SCHEMA);
        let context =
            orchestra_spec::Context { directory: "/w".into(), volumes: "/v".into(), environment: None, preview: None };
        let load =
            |text: &str| orchestra_spec::load(orchestra_spec::Source { path: STACK, bytes: text.as_bytes() }, &context);
        let loaded = load(&text).unwrap_or_else(|errors| panic!("{}", orchestra_spec::render_text(&errors, false)));
        assert_eq!((loaded.desired.resources.len(), loaded.warnings.len()), (1, 0));
        // What is commented out is an offer, and must be right as well.
        let offers: String = text
            .lines()
            .skip_while(|line| !line.starts_with("version"))
            .map(|line| {
                let rest = line.trim_start();
                let indent = &line[..line.len() - rest.len()];
                let offer = rest.strip_prefix("# ").filter(|rest| rest.contains(": ") || rest.ends_with(':'));
                let prose = rest.starts_with("# One with") || rest.starts_with("# instance");
                let line = offer.filter(|_| !prose).map_or(line.to_owned(), |offer| format!("{indent}{offer}"));
                line + "\n"
            })
            .collect();
        let loaded =
            load(&offers).unwrap_or_else(|errors| panic!("{}\n{offers}", orchestra_spec::render_text(&errors, false)));
        assert_eq!(loaded.desired.resources.len(), 4);
    }

    #[test]
    fn folders_name_stacks() {
        for (folder, name) in [
            ("/x/Support Agents", "support-agents"),
            ("/x/2024_demo", "demo"),
            ("/", "my-stack"),
            ("/x/été", "t"),
            ("/x/a--", "a"),
        ] {
            assert_eq!(name_of(Path::new(folder)).as_str(), name);
        }
    }
}
