//! TLS with clients: which certificate each route shows, and that it is the one that stands in its files.
//!
//! A [`Terminator`] belongs to a route and outlives versions of the table. Its files are looked at every two seconds, by
//! size, times and inode; what changed is read anew, checked and put into force as a whole for connections that begin
//! from then on. A pair that cannot be used never replaces one that can:
//!
//! ```text
//!   Loading ──(files are good)──> Ready ──(files changed, good)──> Ready, the new pair
//!      │                            └────(files changed, bad)───> Ready, the old pair; a problem is reported
//!      └──(files are bad)──> Absent: handshakes fail; a problem is reported ──(good again)──> Ready
//! ```
//!
//! Handshakes wait while a pair is loading, so that a table can be acknowledged without reading files first. A new pair
//! comes with new ticket keys: whoever resumes a session does so with the certificate that it was begun with.

use std::{
    collections::HashMap,
    fmt::Write as _,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use orchestra_certificate::Facts;
use orchestra_model::{
    desired::Protocol,
    route::{ProxyEvent, RouteId, RouteTable},
    traffic::{CertificateReport, Tls},
};
use rustls::ServerConfig;
use tokio::sync::{Notify, watch};

use crate::{state::Proxy, wire::Response};

mod files;
pub(crate) mod handshake;
mod slots;
pub(crate) mod stream;

use files::{Files, Loaded};
use slots::Slots;

/// Between two looks at files.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Between two looks while something is wrong: whoever copies two files does the second soon.
const LOOK_AGAIN: Duration = Duration::from_millis(300);
/// A pair that replaces a good one may be bad for so long before that is reported: certificate and key are two files.
const GRACE: Duration = Duration::from_secs(2);

/// The TLS of all routes.
#[derive(Debug, Default)]
pub(crate) struct Terminators {
    routes: Mutex<HashMap<RouteId, Arc<Terminator>>>,
    /// Told when there are new ones, and when everything is to be reported once more.
    changed: Notify,
    slots: Slots,
}

/// The TLS of a route.
#[derive(Debug)]
pub(crate) struct Terminator {
    route: RouteId,
    protocol: Protocol,
    source: Tls,
    state: watch::Sender<State>,
    loading: Mutex<Loading>,
    counts: Arc<Counts>,
}

/// What a handshake is made with.
#[derive(Clone, Debug)]
enum State {
    Loading,
    Ready(Arc<ServerConfig>),
    Absent,
}

/// What is known of the files.
#[derive(Debug, Default)]
struct Loading {
    /// In force.
    loaded: Option<Arc<Loaded>>,
    /// As the files were when they were last read.
    read: Option<files::Stamp>,
    /// Why the files cannot be used.
    problem: Option<String>,
    /// Since when there is one.
    since: Option<tokio::time::Instant>,
    /// What was reported last.
    reported: Option<CertificateReport>,
}

/// What became of handshakes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Done,
    /// HTTP without TLS, or something else that is no TLS.
    NotTls,
    /// It took too long, or others needed its place.
    Late,
    /// There is no certificate.
    NoCertificate,
    /// The client does not accept the certificate.
    Untrusted,
    /// Everything else: versions, ciphers, protocols, broken messages, clients that left.
    Failed,
}

impl Outcome {
    const ALL: [(Self, &'static str); 6] = [
        (Self::Done, "done"),
        (Self::NotTls, "not_tls"),
        (Self::Late, "late"),
        (Self::NoCertificate, "no_certificate"),
        (Self::Untrusted, "untrusted"),
        (Self::Failed, "failed"),
    ];
}

/// Handshakes of a route, over its terminators.
#[derive(Debug, Default)]
struct Counts {
    outcomes: [AtomicU64; Outcome::ALL.len()],
    /// Of those that were done: with a ticket of an earlier one.
    resumed: AtomicU64,
}

impl Terminators {
    fn routes(&self) -> std::sync::MutexGuard<'_, HashMap<RouteId, Arc<Terminator>>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the TLS of a table over; returns that of each route that has some.
    pub(crate) fn apply(&self, table: &RouteTable) -> HashMap<RouteId, Arc<Terminator>> {
        let mut routes = self.routes();
        let wanted = table.routes.iter().filter_map(|route| Some((route, route.policy.tls.as_ref()?)));
        let next: HashMap<RouteId, Arc<Terminator>> = wanted
            .map(|(route, source)| {
                let before = routes.get(&route.id);
                let same = before.filter(|old| old.source == *source && old.protocol == route.protocol);
                let terminator = same.cloned().unwrap_or_else(|| {
                    Arc::new(Terminator::new(&route.id, route.protocol, source, before.map(|old| &**old)))
                });
                (route.id.clone(), terminator)
            })
            .collect();
        routes.clone_from(&next);
        drop(routes);
        self.changed.notify_one();
        next
    }

    /// Reports everything once more: another server listens.
    pub(crate) fn repeat(&self) {
        for terminator in self.routes().values() {
            terminator.loading().reported = None;
        }
        self.changed.notify_one();
    }

    /// Handshakes and certificates in Prometheus text format.
    pub(crate) fn render(&self, page: &mut String) {
        let mut all: Vec<Arc<Terminator>> = self.routes().values().cloned().collect();
        if all.is_empty() {
            return;
        }
        all.sort_by(|a, b| a.route.cmp(&b.route));
        let mut family = |name: &str, kind: &str, help: &str, samples: &dyn Fn(&Terminator) -> Vec<(String, u64)>| {
            let _ = writeln!(page, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for terminator in &all {
                for (label, value) in samples(terminator) {
                    let _ = writeln!(page, "{name}{{{}{label}}} {value}", terminator.labels());
                }
            }
        };
        let outcomes = |terminator: &Terminator| {
            let count = |(outcome, name): (Outcome, &str)| {
                (format!(",outcome=\"{name}\""), terminator.counts.outcomes[outcome as usize].load(Ordering::Relaxed))
            };
            Outcome::ALL.map(count).to_vec()
        };
        family("orchestra_proxy_tls_handshakes_total", "counter", "TLS handshakes, by what became of them.", &outcomes);
        family(
            "orchestra_proxy_tls_resumed_total",
            "counter",
            "Handshakes that went on with an earlier session.",
            &|t| vec![(String::new(), t.counts.resumed.load(Ordering::Relaxed))],
        );
        let expiry = "End of the certificate that is shown, in Unix seconds; none without a certificate.";
        family("orchestra_proxy_tls_certificate_expiry_seconds", "gauge", expiry, &|t| {
            t.loading().loaded.iter().map(|loaded| (String::new(), loaded.facts.not_after)).collect()
        });
        let trouble = "Whether the files of the certificate cannot be used as they are (1).";
        family("orchestra_proxy_tls_certificate_problem", "gauge", trouble, &|t| {
            vec![(String::new(), u64::from(t.loading().problem.is_some()))]
        });
    }
}

/// Looks after the files of all routes; never ends.
pub(crate) async fn run(proxy: Arc<Proxy>) {
    let mut pause = None;
    loop {
        let timer = async {
            match pause {
                Some(pause) => tokio::time::sleep(pause).await,
                // Nothing to look after.
                None => std::future::pending().await,
            }
        };
        // Losing the race loses nothing: all files are looked at whatever came first.
        tokio::select! {
            () = proxy.tls.changed.notified() => {}
            () = timer => {}
        }
        let all: Vec<Arc<Terminator>> = proxy.tls.routes().values().cloned().collect();
        pause = None;
        for terminator in all {
            let looked = Arc::clone(&terminator);
            // A file system may hang, and requests must not. A panic would be a defect of ours; the next look goes on.
            let _ = tokio::task::spawn_blocking(move || looked.look()).await;
            let again = if terminator.loading().problem.is_some() { LOOK_AGAIN } else { LOOK_EVERY };
            pause = Some(pause.map_or(again, |pause: Duration| pause.min(again)));
            terminator.report(&proxy);
        }
    }
}

impl Terminator {
    /// Goes on with what an earlier one of the same route has until its own files are read.
    fn new(route: &RouteId, protocol: Protocol, source: &Tls, before: Option<&Self>) -> Self {
        let inherited = before.and_then(|before| before.loading().loaded.clone());
        let state = match inherited.as_ref().and_then(|loaded| files::config(loaded, protocol).ok()) {
            Some(config) => State::Ready(config),
            None => State::Loading,
        };
        Self {
            route: route.clone(),
            protocol,
            source: source.clone(),
            state: watch::Sender::new(state),
            loading: Mutex::new(Loading { loaded: inherited, ..Loading::default() }),
            counts: before.map(|before| Arc::clone(&before.counts)).unwrap_or_default(),
        }
    }

    fn loading(&self) -> std::sync::MutexGuard<'_, Loading> {
        self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What handshakes are made with; waits while it is loading. `None` if there is no certificate.
    async fn config(&self) -> Option<Arc<ServerConfig>> {
        let mut state = self.state.subscribe();
        let state = state.wait_for(|state| !matches!(state, State::Loading)).await.ok()?;
        if let State::Ready(config) = &*state { Some(Arc::clone(config)) } else { None }
    }

    fn count(&self, outcome: Outcome) {
        self.counts.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn labels(&self) -> String {
        let RouteId { environment, service, port } = &self.route;
        let (stack, environment) = (&environment.stack, &environment.environment);
        format!("stack=\"{stack}\",environment=\"{environment}\",service=\"{service}\",port=\"{port}\"")
    }

    /// Looks at the files, and reads them if they are not what they were. Blocks.
    fn look(&self) {
        let files = match &self.source {
            Tls::Files { certificate, key, named } => Files { certificate, key, named: named.as_deref() },
            Tls::Development { .. } => {
                let reason = "the development authority could not issue one; the server's log says why";
                return self.failed(reason, None);
            }
        };
        let stamp = files.stamp();
        {
            let loading = self.loading();
            if loading.problem.is_none() && loading.read.is_some() && loading.read == stamp {
                return;
            }
        }
        let outcome = files.load().and_then(|loaded| {
            // Read while somebody wrote: once more, when that is over.
            if files.stamp() == stamp { Ok(loaded) } else { Err("its files are being written".to_owned()) }
        });
        match outcome.and_then(|loaded| Ok((files::config(&loaded, self.protocol)?, loaded))) {
            Ok((config, loaded)) => self.loaded(config, loaded, stamp),
            Err(reason) => self.failed(&reason, stamp),
        }
    }

    fn loaded(&self, config: Arc<ServerConfig>, loaded: Loaded, stamp: Option<files::Stamp>) {
        let mut loading = self.loading();
        loading.read = stamp;
        loading.since = None;
        loading.problem = None;
        let same = loading.loaded.as_ref().is_some_and(|old| old.is_same(&loaded));
        if same && matches!(*self.state.borrow(), State::Ready(_)) {
            return;
        }
        let names = loaded.facts.names.join(", ");
        let until = date(loaded.facts.not_after);
        tracing::info!(route = %self.route, %names, %until, "a certificate is in force");
        loading.loaded = Some(Arc::new(loaded));
        self.state.send_replace(State::Ready(config));
    }

    fn failed(&self, reason: &str, stamp: Option<files::Stamp>) {
        let mut loading = self.loading();
        loading.read = stamp;
        loading.since.get_or_insert_with(tokio::time::Instant::now);
        let news = loading.problem.as_deref() != Some(reason);
        let kept = loading.loaded.is_some();
        loading.problem = Some(reason.to_owned());
        drop(loading);
        if !kept {
            self.state.send_replace(State::Absent);
        }
        if news {
            let outcome = if kept { "the certificate before stays in force" } else { "TLS handshakes fail" };
            tracing::warn!(route = %self.route, reason, "a certificate cannot be used: {outcome}");
        }
    }

    /// Tells the server, if there is one and something to tell.
    fn report(&self, proxy: &Proxy) {
        let Some((version, link)) = proxy.linked() else { return };
        let Some(report) = self.due() else { return };
        let body = Response::Event { version, event: ProxyEvent::Certificate(report) };
        let sent = link.try_send(body.into()).is_ok();
        // A server that came in between has not heard it, and one that does not read hears it at the next look.
        if !sent || proxy.linked().is_none_or(|(_, now)| !now.same_channel(&link)) {
            self.loading().reported = None;
        }
    }

    /// What is to be reported, if it is not what was reported last.
    fn due(&self) -> Option<CertificateReport> {
        let mut loading = self.loading();
        let serving = loading.loaded.is_some();
        let settled = !serving || loading.since.is_none_or(|since| since.elapsed() >= GRACE);
        // Shown all the same: it is what the user put there, and clients say what is wrong with it.
        let flaw = loading.loaded.as_ref().and_then(|loaded| flaw(&loaded.facts, unix_now()));
        let flaw = flaw.filter(|_| loading.problem.is_none());
        let report = CertificateReport {
            route: self.route.clone(),
            flawed: flaw.is_some(),
            problem: loading.problem.clone().filter(|_| settled).or(flaw),
            names: loading.loaded.as_ref().map(|loaded| loaded.facts.names.clone()).unwrap_or_default(),
            fingerprint: loading.loaded.as_ref().map(|loaded| loaded.facts.fingerprint.clone()),
            not_after: loading.loaded.as_ref().map(|loaded| loaded.facts.not_after),
        };
        let news = loading.reported.as_ref() != Some(&report);
        if news {
            loading.reported = Some(report.clone());
        }
        news.then_some(report)
    }
}

/// The day of an instant in seconds, however far away.
fn date(at: u64) -> String {
    orchestra_model::time::date(at.saturating_mul(1000))
}

/// What clients will not like about a certificate that can be used.
fn flaw(facts: &Facts, now: u64) -> Option<String> {
    if facts.not_after <= now {
        return Some(format!("the certificate expired on {}", date(facts.not_after)));
    }
    if facts.not_before > now {
        return Some(format!("the certificate is not valid before {}", date(facts.not_before)));
    }
    // Clients look at these alone, and at no common name (RFC 9525, section 2).
    facts.names.is_empty().then(|| "the certificate is for no name and no address (subjectAltName)".to_owned())
}

/// Of the wall clock: certificates end by it.
fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_not_the_first_to_notice_a_flaw() {
        let facts = |not_before, not_after, names: &[&str]| Facts {
            subject: String::new(),
            not_before,
            not_after,
            names: names.iter().map(ToString::to_string).collect(),
            fingerprint: String::new(),
        };
        let (now, day) = (1_790_000_000, 86_400);
        assert_eq!(flaw(&facts(now, now + day, &["localhost"]), now), None);
        let of = |facts: &Facts| flaw(facts, now).unwrap_or_default();
        assert_eq!(of(&facts(now - day, now, &["localhost"])), "the certificate expired on 2026-09-21");
        assert_eq!(of(&facts(now + day, now + 2 * day, &["a"])), "the certificate is not valid before 2026-09-22");
        assert!(of(&facts(now - day, now + day, &[])).contains("no name"));
        // A date far away is no reason to stumble.
        assert_eq!(flaw(&facts(0, u64::MAX, &["a"]), now), None);
    }
}
