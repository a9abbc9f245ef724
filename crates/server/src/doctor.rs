//! What the server can tell of the place where it runs.

use orchestra_api::{DoctorCheck, DoctorReport};

use crate::backend::{App, Backend};

/// Bytes below which a disk counts as nearly full.
const LITTLE_SPACE: u64 = 512 << 20;
/// Open files below which a stack of some size runs into the limit.
const FEW_FILES: u64 = 4096;

/// Looks at everything once.
pub(crate) async fn report(app: &App) -> DoctorReport {
    let mut checks = vec![state(app).await, space(app), files()];
    if let Backend::Live(control) = &app.backend {
        checks.push(match control.data_plane_answers().await {
            Ok(()) => DoctorCheck::ok("proxy", "it answers"),
            Err(error) => DoctorCheck::failed(
                "proxy",
                error.to_string(),
                "it is started again by itself; its log is proxy/proxy.log in the state directory",
            ),
        });
        checks.extend(crate::tls::checks(control, orchestra_engine::Clock::wall()));
        for id in control.environment_ids() {
            let Ok(view) = control.view(&id).await else { continue };
            let name = format!("environment {id}");
            checks.push(match view.trouble {
                Some(trouble) => DoctorCheck::failed(name, trouble, "make room on the disk; work goes on by itself"),
                None => DoctorCheck::ok(name, format!("{} resources", view.status.resources.len())),
            });
        }
    }
    DoctorReport { checks }
}

async fn state(app: &App) -> DoctorCheck {
    match app.read(orchestra_store::Reader::environments).await {
        Ok(Some(environments)) => {
            DoctorCheck::ok("state", format!("{}: readable, {} environments", app.facts.home, environments.len()))
        }
        Ok(None) => DoctorCheck::ok("state", format!("{}: nothing recorded yet", app.facts.home)),
        Err(error) => DoctorCheck::failed("state", error.to_string(), "`orchestra explain ORC0403` says what to do"),
    }
}

fn space(app: &App) -> DoctorCheck {
    match rustix::fs::statvfs(app.facts.home.as_str()) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{} MiB free", free >> 20);
            if free < LITTLE_SPACE {
                DoctorCheck::warning("disk space", detail, "make room: a full disk stops every run until there is some")
            } else {
                DoctorCheck::ok("disk space", detail)
            }
        }
        Err(error) => {
            DoctorCheck::warning("disk space", format!("cannot be read: {error}"), "check the state directory")
        }
    }
}

fn files() -> DoctorCheck {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    match limit.current {
        Some(current) if current < FEW_FILES => DoctorCheck::warning(
            "open files",
            format!("at most {current}"),
            "raise the limit before the server starts: `ulimit -n 65536`",
        ),
        Some(current) => DoctorCheck::ok("open files", format!("at most {current}")),
        None => DoctorCheck::ok("open files", "no limit"),
    }
}
