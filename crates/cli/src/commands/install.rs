//! `orchestra server install`: a systemd unit, so that the server and with it every environment is there again after
//! the machine was switched on.
//!
//! It writes one file and changes nothing else: enabling it is a decision, and the commands for that are printed.

use std::{
    fmt::Write as _,
    fs::{self, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use orchestra_model::{Code, Diagnostic};

use crate::{args::InstallArgs, exit::Exit, failure::Result, output::Output, session::Session};

/// First line of a unit that was written here: only such a one is replaced.
const MARK: &str = "# Written by `orchestra server install`.";

/// Whose systemd runs the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scope {
    /// That of the machine, which starts with it.
    System,
    /// That of a user, which starts when the user logs in, or with the machine if the user lingers.
    User,
}

pub(crate) fn install(args: &InstallArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let scope = match (args.system, args.user) {
        (true, _) => Scope::System,
        (_, true) => Scope::User,
        _ if rustix::process::geteuid().is_root() => Scope::System,
        _ => Scope::User,
    };
    let program = session.control.program().map_err(|error| {
        Diagnostic::error(Code::INTERNAL, "the path of this program cannot be found").caused_by(&error)
    })?;
    let unit = unit(&program, session, args, scope)?;
    if args.print {
        output.text(&unit)?;
        return Ok(Exit::Success);
    }
    let folder = match scope {
        Scope::System => PathBuf::from("/etc/systemd/system"),
        Scope::User => session.config.clone().map(|config| config.join("systemd/user")).ok_or_else(|| {
            Diagnostic::error(Code::INVALID_VALUE, "there is no home folder to write a user's unit into")
                .note("neither XDG_CONFIG_HOME nor HOME is set to an absolute path")
                .help("print the unit with `--print` and put it where it belongs")
        })?,
    };
    let path = folder.join(format!("{}.service", args.unit));
    write(&path, &unit)?;
    let (systemctl, linger) = match scope {
        Scope::System => ("systemctl", ""),
        Scope::User => ("systemctl --user", "loginctl enable-linger     # also without a login\n"),
    };
    if output.json {
        output
            .json(&serde_json::json!({"unit": path, "scope": if scope == Scope::User { "user" } else { "system" }}))?;
        return Ok(Exit::Success);
    }
    output.line(&format!("wrote {}; nothing was started or enabled. Next:", path.display()))?;
    let stop = if session.has_socket() { "orchestra server stop      # instances and proxy go on\n" } else { "" };
    let unit = &args.unit;
    output.text(&format!("{stop}{systemctl} daemon-reload\n{systemctl} enable --now {unit}\n{linger}"))?;
    Ok(Exit::Success)
}

/// The unit. `systemd.service(5)` and `systemd.kill(5)` say what its lines mean.
fn unit(program: &Path, session: &Session, args: &InstallArgs, scope: Scope) -> Result<String, Diagnostic> {
    let mut words = vec![text(program)?, "--home".to_owned(), text(&session.home)?];
    if let Some(address) = args.listen.listen {
        let Some(token) = &session.token_file else {
            return Err(Diagnostic::error(Code::MISSING_KEY, "--listen needs a token that is there after a restart")
                .help("keep it in a file of yours, and add `--token-file PATH`"));
        };
        words.extend(["--token-file".to_owned(), text(token)?]);
        words.extend(["server", "run", "--listen"].map(str::to_owned));
        words.push(address.to_string());
    } else {
        words.extend(["server", "run"].map(str::to_owned));
    }
    let command: Vec<String> = words.iter().map(|word| quoted(word)).collect();
    let mut unit = format!(
        "{MARK}\n\
         [Unit]\n\
         Description=Orchestra, which keeps stacks running\n\
         After=network.target local-fs.target\n\
         RequiresMountsFor={}\n\
         \n\
         [Service]\n\
         Type=exec\n\
         ExecStart={}\n",
        quoted(&text(&session.home)?),
        command.join(" ")
    );
    if let Some(home) = session.user_home.as_deref().filter(|_| scope == Scope::System) {
        // What instances get as HOME is the server's, and a unit of the machine has none.
        let _ = writeln!(unit, "Environment={}", quoted(&format!("HOME={}", text(home)?)));
    }
    let target = if scope == Scope::System { "multi-user.target" } else { "default.target" };
    let _ = write!(
        unit,
        "Restart=on-failure\n\
         RestartSec=1s\n\
         # Stopping the server leaves instances and proxy alone: they are not its to end.\n\
         KillMode=process\n\
         TimeoutStopSec=40s\n\
         # Instances get control groups of their own below it.\n\
         Delegate=yes\n\
         LimitNOFILE=1048576\n\
         \n\
         [Install]\n\
         WantedBy={target}\n"
    );
    Ok(unit)
}

/// Paths go into a text file.
fn text(path: &Path) -> Result<String, Diagnostic> {
    match path.to_str() {
        Some(text) if !text.contains(char::is_control) => Ok(text.to_owned()),
        _ => Err(Diagnostic::error(Code::INVALID_VALUE, format!("{} cannot stand in a unit", path.display()))
            .help("use a path of printable text")),
    }
}

/// A word of a command line as `systemd.syntax(7)` and `systemd.service(5)` want it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-:=+@,[]".contains(c);
    if word.chars().all(plain) {
        return word.to_owned();
    }
    // A percent sign begins a specifier, a dollar sign a variable, both also within quotation marks.
    let escaped = word.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%").replace('$', "$$");
    format!("\"{escaped}\"")
}

fn write(path: &Path, unit: &str) -> Result<(), Diagnostic> {
    let failed = |error: &io::Error| {
        Diagnostic::error(Code::NOT_READABLE, format!("{} cannot be written", path.display()))
            .caused_by(error)
            .help("print the unit with `--print` and put it where it belongs")
    };
    match fs::read_to_string(path) {
        Ok(found) if !found.starts_with(MARK) => {
            return Err(Diagnostic::error(Code::INVALID_VALUE, format!("{} is there already", path.display()))
                .note("it was not written by `orchestra server install`, so nothing was overwritten")
                .help("give the unit another name with `--unit`"));
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(&error)),
        Ok(_) | Err(_) => {}
    }
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder).map_err(|error| failed(&error))?;
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(path).map_err(|e| failed(&e))?;
    file.write_all(unit.as_bytes()).and_then(|()| file.sync_all()).map_err(|error| failed(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_as_systemd_wants_them() {
        for (word, expected) in [
            ("/usr/bin/orchestra", "/usr/bin/orchestra"),
            ("[::1]:7070", "[::1]:7070"),
            ("/home/a b", "\"/home/a b\""),
            ("/x%i$y\"z\\", "\"/x%%i$$y\\\"z\\\\\""),
        ] {
            assert_eq!(quoted(word), expected);
        }
        assert!(text(Path::new("/a\nb")).is_err());
    }
}
