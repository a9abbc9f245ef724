//! What was issued: one file for each route, with certificate and key, put in its place in one step.

use std::{
    collections::BTreeSet,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orchestra_certificate::{Facts, Pair};
use orchestra_model::route::RouteId;

use crate::{
    authority::{Authority, AuthorityError, wanted_addresses, wanted_names},
    folder::{self, ISSUED},
};

/// A certificate is renewed when less than this is left: a server that is away for a month finds it valid.
const RENEW_BEFORE: Duration = Duration::from_secs(45 * 86_400);

/// A certificate that was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    /// Where it is, with its key.
    pub path: PathBuf,
    /// What stands in it.
    pub facts: Facts,
}

impl Issued {
    /// Everything that was issued in a state directory, by path. What cannot be read is left out.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn all(home: &Path) -> io::Result<Vec<Self>> {
        let entries = match fs::read_dir(home.join(ISSUED)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut paths = Vec::new();
        for stack in entries {
            for file in fs::read_dir(stack?.path()).into_iter().flatten() {
                paths.push(file?.path());
            }
        }
        paths.sort();
        Ok(paths.into_iter().filter_map(|path| Some(Self { facts: facts(&path)?, path })).collect())
    }
}

/// Where the certificate of a route is. Names are DNS labels, and stand for themselves in a path.
pub(crate) fn path(home: &Path, route: &RouteId) -> PathBuf {
    let environment = format!("{}.{}", route.environment.stack, route.environment.environment);
    home.join(ISSUED).join(environment).join(format!("{}.{}.pem", route.service, route.port))
}

fn facts(path: &Path) -> Option<Facts> {
    let text = fs::read(path).ok()?;
    // The key counts as well: a file with half of it is as good as none.
    Pair::read(&text, &text).ok().map(|pair| pair.facts)
}

/// Issues the certificate of a route if there is none that is for what it must be for and lasts.
/// Returns whether one was issued.
pub(crate) fn ensure(
    authority: &Authority,
    home: &Path,
    route: &RouteId,
    names: &BTreeSet<String>,
    listen: IpAddr,
    now: SystemTime,
) -> Result<bool, AuthorityError> {
    let path = path(home, route);
    let names = || names.iter().map(String::as_str);
    let addresses = wanted_addresses(Some(listen)).into_iter().map(|ip| ip.to_string());
    let wanted: Vec<String> = wanted_names(names()).into_iter().chain(addresses).collect();
    let until = |facts: &Facts| UNIX_EPOCH + Duration::from_secs(facts.not_after);
    // An authority near its own end cannot give more than it has.
    let due = (now + RENEW_BEFORE).min(until(authority.facts()));
    let issuer = issuer_mark(authority);
    if let Some(found) = facts(&path)
        && found.names == wanted
        && until(&found) >= due
        && found.subject.ends_with(&issuer)
    {
        return Ok(false);
    }
    let subject = format!("Orchestra development certificate {issuer}");
    let text = authority.issue(&subject, names(), Some(listen), now)?;
    let failed = |source| AuthorityError::Files { path: path.clone(), source };
    folder::make(path.parent().expect("it is in a folder")).map_err(failed)?;
    folder::replace(&path, &text, 0o600).map_err(failed)?;
    Ok(true)
}

/// Says in a certificate which authority issued it: one that was made anew must issue everything anew.
fn issuer_mark(authority: &Authority) -> String {
    authority.facts().subject.rsplit(' ').next().unwrap_or_default().to_owned()
}

/// Removes certificates of routes that are not in use any more, and what is left of those that were being written.
pub(crate) fn sweep(home: &Path, used: &BTreeSet<PathBuf>) {
    for stack in fs::read_dir(home.join(ISSUED)).into_iter().flatten().flatten() {
        folder::tidy(&stack.path());
        for file in fs::read_dir(stack.path()).into_iter().flatten().flatten() {
            if !used.contains(&file.path()) {
                let _ = fs::remove_file(file.path());
            }
        }
        // Refused while something is in it.
        let _ = fs::remove_dir(stack.path());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(service: &str) -> RouteId {
        RouteId {
            environment: "demo/dev".parse().unwrap(),
            service: service.parse().unwrap(),
            port: "web".parse().unwrap(),
        }
    }

    #[test]
    fn issues_when_it_must_and_only_then() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let now = SystemTime::now();
        let day = |days: u64| now + Duration::from_secs(days * 86_400);
        let authority = Authority::open(home, now).unwrap();
        let loopback = IpAddr::from([127, 0, 0, 1]);
        let ensure = |authority, names: &[&str], listen, at| {
            ensure(authority, home, &route("api"), &names_of(names), listen, at).unwrap()
        };
        assert!(ensure(&authority, &["app.localhost"], loopback, now));
        let first = Issued::all(home).unwrap();
        assert_eq!(first[0].facts.names, ["localhost", "app.localhost", "127.0.0.1", "::1"]);
        assert!(!ensure(&authority, &["app.localhost"], loopback, now));
        assert!(!ensure(&authority, &["app.localhost"], loopback, day(44)), "more than half is left");
        assert!(ensure(&authority, &["app.localhost"], loopback, day(46)), "it is renewed long before its end");
        assert_ne!(Issued::all(home).unwrap()[0].facts.fingerprint, first[0].facts.fingerprint);
        assert!(ensure(&authority, &["b.localhost"], loopback, day(46)), "another name");
        assert!(ensure(&authority, &["b.localhost"], [10, 0, 0, 9].into(), day(46)), "another address");
        fs::remove_dir_all(home.join("tls/authority")).unwrap();
        let other = Authority::open(home, now).unwrap();
        assert!(ensure(&other, &["b.localhost"], [10, 0, 0, 9].into(), day(46)), "another authority");
        assert!(!ensure(&other, &["b.localhost"], [10, 0, 0, 9].into(), day(46)));
        fs::write(path(home, &route("api")), "half").unwrap();
        assert!(ensure(&other, &["b.localhost"], [10, 0, 0, 9].into(), day(46)), "a damaged file");
    }

    fn names_of(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn what_nobody_uses_is_removed() {
        let home = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        let authority = Authority::open(home.path(), now).unwrap();
        for service in ["api", "web"] {
            ensure(&authority, home.path(), &route(service), &BTreeSet::new(), [127, 0, 0, 1].into(), now).unwrap();
        }
        sweep(home.path(), &BTreeSet::from([path(home.path(), &route("web"))]));
        let left = Issued::all(home.path()).unwrap();
        assert_eq!(
            left.iter().map(|issued| issued.path.clone()).collect::<Vec<_>>(),
            [path(home.path(), &route("web"))]
        );
        sweep(home.path(), &BTreeSet::new());
        assert!(Issued::all(home.path()).unwrap().is_empty());
    }
}
