//! What `doctor` looks at by itself: the machine and the state directory. Nothing is created or changed, except for a
//! file that is made and removed again to see whether that is possible.

use std::{
    fs::{self, OpenOptions},
    path::{Path, PathBuf},
};

use orchestra_api::{CheckOutcome, DoctorCheck, socket_path};
use orchestra_model::{Code, Diagnostic, time::UnixMillis};

/// Bytes below which nothing can be relied on, and below which a warning is due.
const DISK_LEAST: u64 = 64 << 20;
const DISK_LITTLE: u64 = 1 << 30;
/// Open files that a small and a comfortable stack need: each connection through the proxy takes two.
const FILES_LEAST: u64 = 256;
const FILES_LITTLE: u64 = 4096;
/// 2026-01-01: no clock that is right shows less.
const CLOCK_LEAST: UnixMillis = 1_767_225_600_000;

/// Checks that need no server.
pub(crate) fn checks(home: &Path, now: UnixMillis) -> Vec<DoctorCheck> {
    vec![state_directory(home), socket(home), disk(home), control_groups(), open_files(), clock(now)]
}

/// The folder itself, or the nearest one above it that is there.
fn nearest(home: &Path) -> PathBuf {
    home.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// Why no server can keep its state here; `None` if it can.
pub(crate) fn unusable(home: &Path) -> Option<Diagnostic> {
    let DoctorCheck { outcome: CheckOutcome::Failed, detail, help, .. } = state_directory(home) else { return None };
    let diagnostic = Diagnostic::error(Code::STATE_WRITE, format!("no state can be kept: {detail}"));
    Some(Diagnostic { help, ..diagnostic })
}

fn state_directory(home: &Path) -> DoctorCheck {
    const NAME: &str = "state directory";
    let help = "choose another one with `--home` or ORCHESTRA_HOME, or change who owns it";
    let folder = nearest(home);
    if !folder.is_dir() {
        return DoctorCheck::failed(NAME, format!("{} is not a folder", folder.display()), help);
    }
    if folder != home {
        return match rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK) {
            Ok(()) => DoctorCheck::ok(NAME, format!("{} will be made", home.display())),
            Err(error) => DoctorCheck::failed(
                NAME,
                format!("{} cannot be made: {} is not writable ({error})", home.display(), folder.display()),
                help,
            ),
        };
    }
    let probe = home.join(format!(".doctor-{}", std::process::id()));
    let made = OpenOptions::new().write(true).create_new(true).open(&probe).and_then(|file| file.sync_all());
    let _ = fs::remove_file(&probe);
    match made {
        Ok(()) => DoctorCheck::ok(NAME, format!("{} is writable", home.display())),
        Err(error) => DoctorCheck::failed(NAME, format!("{} is not writable ({error})", home.display()), help),
    }
}

fn socket(home: &Path) -> DoctorCheck {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    const NAME: &str = "socket";
    let path = socket_path(home);
    match fs::symlink_metadata(&path) {
        Err(_) => DoctorCheck::ok(NAME, format!("{} will be made by the server", path.display())),
        Ok(found) if !found.file_type().is_socket() => DoctorCheck::failed(
            NAME,
            format!("{} is something else than a socket", path.display()),
            "remove it, or choose another state directory",
        ),
        Ok(found) if found.mode() & 0o077 != 0 => DoctorCheck::warning(
            NAME,
            format!("{} can be opened by others (mode {:o})", path.display(), found.mode() & 0o777),
            format!("chmod 600 {}", path.display()),
        ),
        Ok(_) => DoctorCheck::ok(NAME, format!("{} is yours alone", path.display())),
    }
}

fn disk(home: &Path) -> DoctorCheck {
    const NAME: &str = "disk space";
    let folder = nearest(home);
    match rustix::fs::statvfs(&folder) {
        Err(error) => DoctorCheck::warning(NAME, format!("cannot be read ({error})"), "see `df`"),
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let detail = format!("{} MiB free at {}", free >> 20, folder.display());
            match free {
                0..DISK_LEAST => {
                    DoctorCheck::failed(NAME, detail, "make room: the journal must be written before anything is done")
                }
                DISK_LEAST..DISK_LITTLE => {
                    DoctorCheck::warning(NAME, detail, "make room, or keep state elsewhere with `--home`")
                }
                _ => DoctorCheck::ok(NAME, detail),
            }
        }
    }
}

fn control_groups() -> DoctorCheck {
    const NAME: &str = "control groups";
    let without =
        "not needed: instances are then stopped by process group and ancestry; CPU and memory limits are not enforced";
    // cgroups(7): the unified hierarchy has id 0 and no controllers in its line.
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let Some(own) = own.lines().find_map(|line| line.strip_prefix("0::")) else {
        return DoctorCheck::warning(NAME, "this machine has no cgroup v2 hierarchy", without);
    };
    let folder = Path::new("/sys/fs/cgroup").join(own.trim_start_matches('/'));
    if !folder.join("cgroup.procs").exists() {
        return DoctorCheck::warning(NAME, format!("{} is not there", folder.display()), without);
    }
    // The root group has no cgroup.kill, but its children do: Linux 5.14 and later.
    let is_root = own.trim() == "/";
    if !is_root && !folder.join("cgroup.kill").exists() {
        return DoctorCheck::warning(NAME, "the kernel has no cgroup.kill (Linux 5.14 has)", without);
    }
    match rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK) {
        Ok(()) => DoctorCheck::ok(NAME, format!("{} is writable, with cgroup.kill", folder.display())),
        Err(error) => DoctorCheck::warning(NAME, format!("{} is not writable ({error})", folder.display()), without),
    }
}

fn open_files() -> DoctorCheck {
    const NAME: &str = "open files";
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let text = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), |limit| limit.to_string());
    let detail = format!("limit {} (hard limit {})", text(limit.current), text(limit.maximum));
    // The server raises its soft limit to the hard one; what counts is how far it can.
    match limit.maximum.unwrap_or(u64::MAX) {
        0..FILES_LEAST => {
            DoctorCheck::failed(NAME, detail, "raise the hard limit, such as with `ulimit -Hn 65536` as root")
        }
        FILES_LEAST..FILES_LITTLE => DoctorCheck::warning(NAME, detail, "raise the hard limit for many connections"),
        _ => DoctorCheck::ok(NAME, detail),
    }
}

fn clock(now: UnixMillis) -> DoctorCheck {
    const NAME: &str = "clock";
    let shown = orchestra_model::time::timestamp(now);
    if now < CLOCK_LEAST {
        let help = "set it: times of events and logs would be wrong; deadlines are not affected";
        DoctorCheck::warning(NAME, format!("it shows {shown}, which is in the past"), help)
    } else {
        DoctorCheck::ok(NAME, shown)
    }
}

/// Processes of a state directory whose server does not run: it finds them again when it is started.
pub(crate) fn leftovers(home: &Path) -> Option<DoctorCheck> {
    const NAME: &str = "processes";
    let mut found: Vec<(u32, &str)> = Vec::new();
    for entry in fs::read_dir("/proc").ok()?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        if let Some(role) = role(&line, home) {
            found.push((pid, role));
        }
    }
    found.sort_unstable();
    if found.is_empty() {
        return Some(DoctorCheck::ok(NAME, "none is left of this state directory"));
    }
    let list: Vec<String> = found.iter().take(8).map(|(pid, role)| format!("{role} {pid}")).collect();
    let more = if found.len() > 8 { format!(" and {} more", found.len() - 8) } else { String::new() };
    let detail = format!("{} run without a server: {}{more}", found.len(), list.join(", "));
    let help = "the server finds them again: `orchestra server start`, or `orchestra down` to end them";
    Some(DoctorCheck::warning(NAME, detail, help))
}

/// `shim` or `proxy`, if a command line is that of one of this state directory.
fn role(cmdline: &[u8], home: &Path) -> Option<&'static str> {
    let mut arguments = cmdline.split(|byte| *byte == 0);
    let _program = arguments.next()?;
    let role = match arguments.next()? {
        b"shim" => "shim",
        b"proxy" => "proxy",
        _ => return None,
    };
    let home = home.as_os_str().as_encoded_bytes();
    let inside = |argument: &[u8]| {
        argument
            .windows(home.len().max(1))
            .enumerate()
            .any(|(at, window)| window == home && matches!(argument.get(at + home.len()), None | Some(b'/')))
    };
    arguments.any(inside).then_some(role)
}

#[cfg(test)]
mod tests {
    use orchestra_api::CheckOutcome;

    use super::*;

    #[test]
    fn a_home_that_is_not_there_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().join("a/b");
        let checks = checks(&home, 1_800_000_000_000);
        assert_eq!(checks[0].outcome, CheckOutcome::Ok, "{:?}", checks[0]);
        assert!(!folder.path().join("a").exists());
        fs::create_dir_all(&home).unwrap();
        assert_eq!(state_directory(&home).outcome, CheckOutcome::Ok);
        assert_eq!(fs::read_dir(&home).unwrap().count(), 0, "nothing is left behind");
        fs::write(folder.path().join("file"), "").unwrap();
        assert_eq!(state_directory(&folder.path().join("file/x")).outcome, CheckOutcome::Failed);
    }

    #[test]
    fn sockets_are_for_the_user_alone() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = socket_path(folder.path());
        fs::write(&path, "").unwrap();
        assert_eq!(socket(folder.path()).outcome, CheckOutcome::Failed);
        fs::remove_file(&path).unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(socket(folder.path()).outcome, CheckOutcome::Warning);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(socket(folder.path()).outcome, CheckOutcome::Ok);
    }

    #[test]
    fn processes_are_told_by_their_command_line() {
        let home = Path::new("/var/lib/o");
        for (line, expected) in [
            ("/usr/bin/orchestra\0shim\0/var/lib/o/shims/x\0", Some("shim")),
            ("orchestra\0proxy\0--home\0/var/lib/o\0", Some("proxy")),
            ("orchestra\0shim\0/var/lib/other/x\0", None),
            ("orchestra\0server\0run\0--home\0/var/lib/o\0", None),
            ("", None),
        ] {
            assert_eq!(role(line.as_bytes(), home), expected, "{line:?}");
        }
    }

    #[test]
    fn clocks_far_in_the_past_are_noticed() {
        assert_eq!(clock(0).outcome, CheckOutcome::Warning);
        assert_eq!(clock(CLOCK_LEAST).outcome, CheckOutcome::Ok);
    }
}
