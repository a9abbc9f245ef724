//! From a launch to a child process, and from a child's failure to a message.

use std::{ffi::CString, fs::File, io::Read as _, os::fd::OwnedFd};

use orchestra_model::launch::Launch;

use super::{
    notify::NotifySocket,
    tree::{EXEC_MARKER, MARKER},
};
use crate::{
    folder::LaunchFile,
    sys::{self, Child, Step},
};

/// Where a program without `/` is looked for when the environment has no `PATH`: the default of the C library.
const DEFAULT_PATH: &str = "/bin:/usr/bin";

/// Whether the program gets a notify socket.
pub(crate) fn notifies(launch: &Launch) -> bool {
    launch.notify || launch.watchdog.is_some()
}

/// Prepares a child for the program of a launch, or for a command beside it.
pub(crate) fn prepare(file: &LaunchFile, command: &[String], exec: Option<(u64, bool)>) -> Result<Child, String> {
    let launch = &file.launch;
    let program = command.first().filter(|program| !program.is_empty()).ok_or("the command is empty")?;
    let text =
        |text: &str| CString::new(text).map_err(|_| format!("`{}` contains a NUL byte", text.replace('\0', "\\0")));
    let mut env: Vec<CString> = Vec::with_capacity(launch.env.len() + 4);
    let mut add = |name: &str, value: &str| text(&format!("{name}={value}")).map(|variable| env.push(variable));
    let ours = |name: &str| {
        name == MARKER
            || (notifies(launch) && name == "NOTIFY_SOCKET")
            || (launch.watchdog.is_some() && name == "WATCHDOG_USEC")
    };
    for (name, value) in launch.env.iter().filter(|(name, _)| !ours(name)) {
        add(name, value)?;
    }
    add(MARKER, &file.marker())?;
    if notifies(launch) {
        add("NOTIFY_SOCKET", &NotifySocket::name(&file.nonce))?;
    }
    if let Some(watchdog) = launch.watchdog {
        add("WATCHDOG_USEC", &watchdog.duration().as_micros().to_string())?;
    }
    if let Some((id, true)) = exec {
        add(EXEC_MARKER, &id.to_string())?;
    }
    let user = match &launch.user {
        None => None,
        Some(name) => {
            let user = sys::find_user(name).map_err(|error| format!("user `{name}` cannot be looked up: {error}"))?;
            let user = user.ok_or_else(|| format!("user `{name}` does not exist on this machine"))?;
            // Without privileges it is no change, and the calls that would make it are not allowed.
            (sys::effective_uid() == 0 || user.uid != sys::effective_uid()).then_some(user)
        }
    };
    Ok(Child {
        programs: candidates(program, launch).into_iter().map(|path| text(&path)).collect::<Result<_, _>>()?,
        args: command.iter().map(|arg| text(arg)).collect::<Result<_, _>>()?,
        env,
        directory: text(&launch.directory)?,
        user,
        umask: launch.umask & 0o777,
        limits: launch.limits.iter().map(|(limit, value)| (*limit, *value)).collect(),
        session: exec.is_some(),
    })
}

fn search_path(launch: &Launch) -> &str {
    launch.env.get("PATH").map_or(DEFAULT_PATH, String::as_str)
}

fn candidates(program: &str, launch: &Launch) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    search_path(launch)
        .split(':')
        // An empty entry means the working directory (POSIX).
        .map(|folder| if folder.is_empty() { program.to_owned() } else { format!("{folder}/{program}") })
        .collect()
}

/// What a child said before it ended without having executed; `None` if it executed.
pub(crate) fn read_failure(pipe: OwnedFd, child: &Child, launch: &Launch) -> Option<String> {
    let mut report = [0; 6];
    File::from(pipe).read_exact(&mut report).ok()?;
    let [step, argument, number @ ..] = report;
    let number = i32::from_le_bytes(number);
    let error = std::io::Error::from_raw_os_error(number);
    let program = child.args.first().map_or_else(String::new, |arg| arg.to_string_lossy().into_owned());
    let is = |wanted: Step| step == wanted as u8;
    Some(if is(Step::Limit) {
        child.limits.get(usize::from(argument)).map_or_else(
            || format!("a limit cannot be set: {error}"),
            |(limit, value)| {
                let name = format!("{limit:?}").to_lowercase();
                format!("limit `{name}` cannot be set to {value}: {error}")
            },
        )
    } else if is(Step::User) {
        let name = launch.user.as_deref().unwrap_or_default();
        format!("cannot become user `{name}`: {error}; only a server that runs as root can start other users' programs")
    } else if is(Step::Directory) {
        format!("working directory `{}` cannot be entered: {error}", launch.directory)
    } else if is(Step::Exec) {
        exec_failure(&program, number, &error, launch)
    } else {
        format!("`{program}` cannot be prepared: {error}")
    })
}

fn exec_failure(program: &str, number: i32, error: &std::io::Error, launch: &Launch) -> String {
    let as_user = launch.user.as_ref().map_or_else(String::new, |user| format!(" by user `{user}`"));
    if !program.contains('/') {
        return match number {
            libc::ENOENT => {
                format!("`{program}` was not found; PATH that was searched: {}", search_path(launch))
            }
            libc::EACCES => format!(
                "`{program}` was found in PATH but may not be executed{as_user}: {error}; PATH that was searched: {}",
                search_path(launch)
            ),
            _ => format!("`{program}` cannot be executed: {error}; PATH that was searched: {}", search_path(launch)),
        };
    }
    let path = std::path::Path::new(&launch.directory).join(program.strip_prefix("./").unwrap_or(program));
    let shown = path.display();
    match number {
        libc::ENOENT if path.exists() => {
            format!("`{shown}` cannot be executed: the interpreter or loader that it names does not exist")
        }
        libc::ENOENT => format!("`{shown}` does not exist"),
        libc::EACCES if path.is_dir() => format!("`{shown}` cannot be executed: it is a directory"),
        libc::EACCES => {
            format!("`{shown}` may not be executed{as_user}: {error}; it needs the permission to execute (chmod +x)")
        }
        libc::ENOEXEC => format!(
            "`{shown}` cannot be executed: it is neither a program of this machine nor a script with a first line \
             such as `#!/bin/sh`"
        ),
        _ => format!("`{shown}` cannot be executed: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_up_in_the_path_they_get() {
        let mut launch: Launch = serde_json::from_str(include_str!("launch/example.json")).unwrap();
        launch.env.insert("PATH".into(), "/a::/b".into());
        assert_eq!(candidates("x", &launch), ["/a/x", "x", "/b/x"]);
        assert_eq!(candidates("./x", &launch), ["./x"]);
        launch.env.clear();
        assert_eq!(candidates("x", &launch), ["/bin/x", "/usr/bin/x"]);
    }

    #[test]
    fn a_child_gets_what_the_launch_says_and_its_marker() {
        let launch: Launch = serde_json::from_str(include_str!("launch/example.json")).unwrap();
        let file = LaunchFile {
            version: 1,
            nonce: "0f".into(),
            boot: String::new(),
            logs: "/".into(),
            cgroup: None,
            shortfall: None,
            launch,
        };
        let child = prepare(&file, &file.launch.command, None).unwrap();
        let env: Vec<_> = child.env.iter().map(|variable| variable.to_str().unwrap()).collect();
        assert_eq!(
            env,
            ["A=1", "ORCHESTRA_LAUNCH=demo/dev/api-r1-1#1@0f", "NOTIFY_SOCKET=@orchestra/0f", "WATCHDOG_USEC=2000000"]
        );
        assert!(prepare(&file, &["a\0b".into()], None).unwrap_err().contains("NUL"));
        assert!(prepare(&file, &[], None).is_err());
    }
}
