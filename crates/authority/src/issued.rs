//! What was issued: two files for each route, with certificate and key each, put in their place in one step.
//!
//! One is for names and addresses, the other for names alone. Clients that are built with `BoringSSL` (gRPC for Python,
//! C++, Ruby and PHP) know no constraints on addresses, which the authority's certificate has: they accept it, and refuse
//! what it issued for an address (`X509_V_ERR_UNSUPPORTED_CONSTRAINT_TYPE`). So whoever asks for a name is shown a
//! certificate without addresses. Who connects to an address asks for no name and needs one with it.

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

/// Whom a certificate is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum For {
    /// Clients that ask for a name.
    Names,
    /// Clients that connect to an address.
    Addresses,
}

impl For {
    pub(crate) const ALL: [Self; 2] = [Self::Names, Self::Addresses];
}

/// Where a certificate of a route is. Names are DNS labels without dots, and stand for themselves in a path.
pub(crate) fn path(home: &Path, route: &RouteId, whom: For) -> PathBuf {
    let environment = format!("{}.{}", route.environment.stack, route.environment.environment);
    let ending = if whom == For::Names { "names.pem" } else { "pem" };
    home.join(ISSUED).join(environment).join(format!("{}.{}.{ending}", route.service, route.port))
}

fn facts(path: &Path) -> Option<Facts> {
    let text = fs::read(path).ok()?;
    // The key counts as well: a file with half of it is as good as none.
    Pair::read(&text, &text).ok().map(|pair| pair.facts)
}

/// Issues a certificate of a route if there is none that is for what it must be for and lasts.
/// Returns whether one was issued.
pub(crate) fn ensure(
    authority: &Authority,
    home: &Path,
    (route, whom): (&RouteId, For),
    names: &BTreeSet<String>,
    listen: IpAddr,
    now: SystemTime,
) -> Result<bool, AuthorityError> {
    let path = path(home, route, whom);
    let names = || names.iter().map(String::as_str);
    let addresses = if whom == For::Addresses { wanted_addresses(listen) } else { Vec::new() };
    let wanted = wanted_names(names()).into_iter().chain(addresses.iter().map(ToString::to_string));
    let wanted: Vec<String> = wanted.collect();
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
    let text = authority.issue(&subject, names(), &addresses, now)?;
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
            let ensure = |whom| ensure(authority, home, (&route("api"), whom), &names_of(names), listen, at).unwrap();
            let [named, addressed] = For::ALL.map(ensure);
            assert!(addressed || !named);
            addressed
        };
        let shown = || facts(&path(home, &route("api"), For::Addresses)).unwrap();
        assert!(ensure(&authority, &["app.localhost"], loopback, now));
        let first = shown();
        assert_eq!(first.names, ["localhost", "app.localhost", "127.0.0.1", "::1"]);
        assert!(!ensure(&authority, &["app.localhost"], loopback, now));
        assert!(!ensure(&authority, &["app.localhost"], loopback, day(44)), "more than half is left");
        assert!(ensure(&authority, &["app.localhost"], loopback, day(46)), "it is renewed long before its end");
        assert_ne!(shown().fingerprint, first.fingerprint);
        assert!(ensure(&authority, &["b.localhost"], loopback, day(46)), "another name");
        assert!(ensure(&authority, &["b.localhost"], [10, 0, 0, 9].into(), day(46)), "another address");
        fs::remove_dir_all(home.join("tls/authority")).unwrap();
        let other = Authority::open(home, now).unwrap();
        assert!(ensure(&other, &["b.localhost"], [10, 0, 0, 9].into(), day(46)), "another authority");
        assert!(!ensure(&other, &["b.localhost"], [10, 0, 0, 9].into(), day(46)));
        fs::write(path(home, &route("api"), For::Addresses), "half").unwrap();
        assert!(ensure(&other, &["b.localhost"], [10, 0, 0, 9].into(), day(46)), "a damaged file");
    }

    #[test]
    fn clients_that_ask_for_a_name_get_a_certificate_without_addresses() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let now = SystemTime::now();
        let authority = Authority::open(home, now).unwrap();
        let (route, names) = (route("api"), names_of(&["app.localhost"]));
        let ensure = |listen: [u8; 4]| {
            For::ALL.map(|whom| ensure(&authority, home, (&route, whom), &names, listen.into(), now).unwrap())
        };
        assert_eq!(ensure([127, 0, 0, 1]), [true, true]);
        let of = |whom| facts(&path(home, &route, whom)).unwrap().names;
        assert_eq!(of(For::Names), ["localhost", "app.localhost"]);
        assert_eq!(of(For::Addresses), ["localhost", "app.localhost", "127.0.0.1", "::1"]);
        assert_eq!(ensure([10, 0, 0, 9]), [false, true], "another address is nothing to those who ask for names");
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
            let (route, listen) = (route(service), [127, 0, 0, 1].into());
            ensure(&authority, home.path(), (&route, For::Addresses), &BTreeSet::new(), listen, now).unwrap();
        }
        let used = path(home.path(), &route("web"), For::Addresses);
        sweep(home.path(), &BTreeSet::from([used.clone()]));
        let left = Issued::all(home.path()).unwrap();
        assert_eq!(left.into_iter().map(|issued| issued.path).collect::<Vec<_>>(), [used]);
        sweep(home.path(), &BTreeSet::new());
        assert!(Issued::all(home.path()).unwrap().is_empty());
    }
}
