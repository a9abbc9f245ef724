//! Plans in files: the form is that of `orchestra_plan::save`, with the path of the stack file added.

use std::{
    fs::{self, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use orchestra_model::{Code, Diagnostic, Plan};
use serde_json::Value;

const SOURCE: &str = "source_path";

/// Writes a plan so that only the user can read it, and so that a crash leaves the old file or the new one.
pub(crate) fn write(path: &Path, plan: &Plan, source_path: Option<&str>) -> Result<(), Diagnostic> {
    let mut saved: Value = serde_json::from_str(&orchestra_plan::save(plan)).expect("a saved plan is JSON");
    if let Some(source_path) = source_path {
        saved[SOURCE] = Value::String(source_path.to_owned());
    }
    let text = format!("{saved:#}\n");
    replace(path, text.as_bytes()).map_err(|error| {
        Diagnostic::error(Code::PLAN_UNREADABLE, format!("the plan cannot be written to {}", path.display()))
            .caused_by(&error)
    })
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut temporary = name.to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(temporary);
    let written = (|| {
        // A leftover of a process with the same id; `create_new` below refuses to follow a link in its place.
        match fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Reads what [`write`] wrote.
pub(crate) fn read(path: &Path) -> Result<(Plan, Option<String>), Diagnostic> {
    let text = fs::read_to_string(path).map_err(|error| {
        Diagnostic::error(Code::PLAN_UNREADABLE, format!("the saved plan {} cannot be read", path.display()))
            .caused_by(&error)
            .help("make one with `orchestra plan --out FILE`")
    })?;
    let plan = orchestra_plan::load(&text).map_err(|diagnostic| *diagnostic)?;
    let saved: Value = serde_json::from_str(&text).unwrap_or_default();
    let source_path = saved.get(SOURCE).and_then(Value::as_str).map(str::to_owned);
    Ok((plan, source_path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn plans_survive_a_file_that_only_the_user_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("next.plan");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let plan = crate::commands::tests::plan();
        write(&path, &plan, Some("/srv/orchestra.yaml")).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read(&path).unwrap(), (plan, Some("/srv/orchestra.yaml".to_owned())));
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "no temporary file is left");
        let edited = fs::read_to_string(&path).unwrap().replace("shop", "shoq");
        fs::write(&path, edited).unwrap();
        assert_eq!(read(&path).unwrap_err().code, Code::PLAN_UNREADABLE);
        assert_eq!(read(&folder.path().join("none")).unwrap_err().code, Code::PLAN_UNREADABLE);
        assert!(write(&folder.path().join("none/x"), &crate::commands::tests::plan(), None).is_err());
    }
}
