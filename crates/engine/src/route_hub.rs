//! One route table from the routes of all environments.
//!
//! The data plane has one table with one version; environments have revisions of their own part. The hub merges the
//! parts, offers the table, and tells each environment which of its revisions is in force. A part that cannot be
//! listened on is refused alone: the others must not wait for it. After a restart nothing is offered until every
//! environment has said its part, so that no route disappears for a moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use orchestra_machine::Event;
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, EventKind, ResourceId, ResourceKind,
    record::Change,
    route::{ApplyError, EndpointKey, ProxyEvent, Route, RouteId, RouteTable},
    traffic::{CertificateReport, Tls},
};
use orchestra_provider::{Applied, DataPlane, DataPlaneError, DataPlaneEvent};
use orchestra_store::Store;
use orchestra_task::{TaskKind, TaskTree};
use tokio::sync::mpsc;

/// Pause before a data plane that does not answer is asked again; it also says when it serves.
const RETRY: Duration = Duration::from_secs(1);

/// What the hub is told.
pub(crate) enum Message {
    /// An environment that may send routes; its inbox gets the answers.
    Register(EnvironmentId, mpsc::Sender<Event>),
    /// A part of the table.
    Set(EnvironmentId, u64, Vec<Route>),
    /// All environments of a recovery have been registered and have sent their part.
    Begin,
    /// End what is in flight to an endpoint.
    Cut(EndpointKey),
}

#[derive(Default)]
struct Part {
    inbox: Option<mpsc::Sender<Event>>,
    /// In force.
    accepted: Vec<Route>,
    /// Offered, and not yet in force.
    offered: Option<(u64, Vec<Route>)>,
}

impl Part {
    /// What it wants now.
    fn routes(&self) -> &[Route] {
        self.offered.as_ref().map_or(&self.accepted, |(_, routes)| routes)
    }
}

/// The one who talks to the data plane.
pub(crate) struct RouteHub {
    data_plane: Arc<dyn DataPlane>,
    store: Store,
    tree: TaskTree,
    parts: BTreeMap<EnvironmentId, Part>,
    begun: bool,
    /// The data plane did not answer: offer again.
    retry: bool,
    certificates: Certificates,
}

/// What the routes in force show that speak TLS.
#[derive(Clone, Debug, Default)]
pub(crate) struct Certificates(Arc<Mutex<Shown>>);

#[derive(Debug, Default)]
struct Shown {
    in_force: BTreeMap<RouteId, Tls>,
    /// Also of routes of which a server that has just started does not know yet that they are in force.
    reported: BTreeMap<RouteId, CertificateReport>,
}

/// The TLS of a route in force.
#[derive(Clone, Debug)]
pub struct ShownCertificate {
    /// What the stack says.
    pub tls: Tls,
    /// What the proxy reported last; `None` if it did not yet.
    pub report: Option<CertificateReport>,
}

impl Certificates {
    fn shown(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// By route.
    pub(crate) fn list(&self) -> BTreeMap<RouteId, ShownCertificate> {
        let shown = self.shown();
        let one = |(route, tls): (&RouteId, &Tls)| {
            (route.clone(), ShownCertificate { tls: tls.clone(), report: shown.reported.get(route).cloned() })
        };
        shown.in_force.iter().map(one).collect()
    }

    /// Other routes are in force.
    fn in_force<'a>(&self, routes: impl Iterator<Item = &'a Route>) {
        let mut shown = self.shown();
        let Shown { in_force, reported } = &mut *shown;
        *in_force = routes.filter_map(|route| Some((route.id.clone(), route.policy.tls.clone()?))).collect();
        reported.retain(|route, _| in_force.contains_key(route));
    }

    /// Returns what was reported before.
    fn reported(&self, report: &CertificateReport) -> Option<CertificateReport> {
        self.shown().reported.insert(report.route.clone(), report.clone())
    }
}

impl RouteHub {
    pub(crate) fn new(
        data_plane: Arc<dyn DataPlane>,
        store: Store,
        tree: TaskTree,
        certificates: Certificates,
    ) -> Self {
        Self { data_plane, store, tree, parts: BTreeMap::new(), begun: false, retry: false, certificates }
    }

    pub(crate) async fn run(
        mut self,
        mut messages: mpsc::Receiver<Message>,
        mut reports: mpsc::Receiver<DataPlaneEvent>,
    ) {
        loop {
            // Every arm is cancel-safe: receiving loses nothing, and the timer starts anew.
            tokio::select! {
                message = messages.recv() => {
                    let Some(message) = message else { return };
                    self.take(message);
                    while let Ok(message) = messages.try_recv() {
                        self.take(message);
                    }
                }
                report = reports.recv() => {
                    let Some(report) = report else { return };
                    self.report(report);
                }
                () = tokio::time::sleep(RETRY), if self.retry => {}
            }
            while self.begun && (self.retry || self.parts.values().any(|part| part.offered.is_some())) {
                if !self.offer().await {
                    break;
                }
            }
        }
    }

    fn take(&mut self, message: Message) {
        match message {
            Message::Register(environment, inbox) => self.parts.entry(environment).or_default().inbox = Some(inbox),
            Message::Set(environment, revision, routes) => {
                self.parts.entry(environment).or_default().offered = Some((revision, routes));
            }
            Message::Begin => self.begun = true,
            Message::Cut(endpoint) => {
                let data_plane = self.data_plane.clone();
                self.tree.start(TaskKind::Effect, "cut", async move {
                    // A data plane that does not answer has nothing in flight that could be cut.
                    if let Err(error) = data_plane.cut(endpoint.clone()).await {
                        tracing::warn!(instance = %endpoint.instance, %error, "could not cut what is in flight");
                    }
                });
            }
        }
    }

    /// Offers the merged table. Returns whether it is worth looking again at once.
    async fn offer(&mut self) -> bool {
        if self.refuse_doubles() {
            return true;
        }
        self.retry = false;
        let routes: Vec<Route> = self.parts.values().flat_map(|part| part.routes().to_vec()).collect();
        let version = self.store.next_route_version();
        match self.data_plane.apply(RouteTable { version, routes }).await {
            Ok(applied) => {
                self.accept(&applied);
                false
            }
            Err(DataPlaneError::Refused(ApplyError::Bind { addresses })) => self.refuse_unbound(&addresses),
            Err(DataPlaneError::Refused(ApplyError::Stale { offered, current })) => {
                tracing::warn!(offered, current, "a newer route table is in force; numbering on from it");
                while self.store.next_route_version() <= current {}
                self.retry = true;
                true
            }
            Err(DataPlaneError::Unavailable(error)) => {
                tracing::warn!(%error, "the proxy does not answer; offering the routes again when it does");
                self.retry = true;
                false
            }
        }
    }

    fn accept(&mut self, applied: &Applied) {
        let environments: Vec<EnvironmentId> = self.parts.keys().cloned().collect();
        for environment in environments {
            let part = self.parts.get_mut(&environment).expect("listed above");
            let Some((revision, routes)) = part.offered.take() else { continue };
            let addresses = routes
                .iter()
                .filter_map(|route| Some((route.id.clone(), applied.address(&route.id)?)))
                .collect::<BTreeMap<RouteId, SocketAddr>>();
            part.accepted = routes;
            self.tell(&environment, Event::RoutesApplied { revision, addresses });
        }
        self.certificates.in_force(self.parts.values().flat_map(|part| &part.accepted));
    }

    /// Refuses parts that want an address which another environment has. Returns whether there were any.
    fn refuse_doubles(&mut self) -> bool {
        let mut owners: BTreeMap<SocketAddr, RouteId> = BTreeMap::new();
        // Parts in force come first: who is there stays.
        let ordered = {
            let (old, new): (Vec<_>, Vec<_>) = self.parts.values().partition(|part| part.offered.is_none());
            old.into_iter().chain(new)
        };
        let mut problems: BTreeMap<EnvironmentId, BTreeMap<RouteId, Diagnostic>> = BTreeMap::new();
        for route in ordered.flat_map(Part::routes).filter(|route| route.listen.port() != 0) {
            match owners.get(&route.listen) {
                Some(owner) if owner.environment != route.id.environment => {
                    let message = format!("{} is already published by {owner}", route.listen);
                    let problem = Diagnostic::error(Code::ADDRESS_IN_USE, message)
                        .help("publish another port, or take the other environment down");
                    problems.entry(route.id.environment.clone()).or_default().insert(route.id.clone(), problem);
                }
                _ => {
                    owners.insert(route.listen, route.id.clone());
                }
            }
        }
        self.refuse(problems)
    }

    fn refuse_unbound(&mut self, addresses: &[(SocketAddr, String)]) -> bool {
        let mut problems: BTreeMap<EnvironmentId, BTreeMap<RouteId, Diagnostic>> = BTreeMap::new();
        for part in self.parts.values() {
            for route in part.routes() {
                let Some((address, reason)) = addresses.iter().find(|(address, _)| *address == route.listen) else {
                    continue;
                };
                let problem = Diagnostic::error(
                    Code::ADDRESS_IN_USE,
                    format!(
                        "cannot listen on {address} for {}",
                        if route.id.is_flags() { "the flags" } else { route.id.service.as_str() }
                    ),
                )
                .note(reason.clone())
                .help("stop the program that listens there, or publish another port");
                problems.entry(route.id.environment.clone()).or_default().insert(route.id.clone(), problem);
            }
        }
        if self.refuse(problems) {
            return true;
        }
        // Addresses that nobody asks for any more, or routes that were in force and cannot be bound again.
        tracing::error!(?addresses, "the proxy cannot listen on addresses that were in force");
        self.retry = true;
        false
    }

    /// Puts refused parts back to what is in force. Returns whether an offered one was among them.
    fn refuse(&mut self, problems: BTreeMap<EnvironmentId, BTreeMap<RouteId, Diagnostic>>) -> bool {
        let mut any = false;
        for (environment, problems) in problems {
            let Some(part) = self.parts.get_mut(&environment) else { continue };
            if let Some((revision, _)) = part.offered.take() {
                any = true;
                self.tell(&environment, Event::RoutesRefused { revision, problems });
            }
        }
        any
    }

    fn report(&mut self, report: DataPlaneEvent) {
        match report {
            DataPlaneEvent::Proxy(ProxyEvent::Drained { endpoint }) => {
                self.tell(&endpoint.environment.clone(), Event::Drained(endpoint));
            }
            DataPlaneEvent::Proxy(ProxyEvent::Draining { endpoint, requests, streams }) => {
                self.tell(&endpoint.environment.clone(), Event::InFlight { endpoint, requests, streams });
            }
            DataPlaneEvent::Proxy(ProxyEvent::Traffic(report)) => {
                self.tell(&report.route.environment.clone(), Event::Traffic(Box::new(report)));
            }
            DataPlaneEvent::Proxy(ProxyEvent::Load(report)) => {
                self.tell(&report.route.environment.clone(), Event::Load(report));
            }
            DataPlaneEvent::Proxy(ProxyEvent::Certificate(report)) => self.certificate(&report),
            DataPlaneEvent::Lost { cause } => self.note(EventKind::ProxyLost, &cause),
            DataPlaneEvent::Serving { pid } => self.note(EventKind::ProxyServing, &format!("process {pid} serves")),
        }
    }

    /// Notes what a port with TLS shows, if that is news: a server that starts is told everything once more.
    fn certificate(&self, report: &CertificateReport) {
        let before = self.certificates.reported(report);
        let port = format!("port `{}`", report.route.port);
        let (kind, cause) = match (&report.problem, before) {
            (problem, Some(before)) if *problem == before.problem && report.fingerprint == before.fingerprint => return,
            (Some(problem), _) => {
                let shown = match &report.fingerprint {
                    Some(_) if report.flawed => "it is shown all the same",
                    Some(_) => "the certificate before stays in force",
                    None => "TLS handshakes fail",
                };
                (EventKind::CertificateProblem, format!("{port}: {problem}; {shown}"))
            }
            (None, Some(_)) => {
                (EventKind::CertificateServed, format!("{port}: a certificate for {}", report.names.join(", ")))
            }
            (None, None) => return,
        };
        let resource = ResourceId::new(ResourceKind::Service, report.route.service.clone());
        drop(self.store.commit(vec![event(&report.route.environment, kind, Some(resource), &cause)]));
    }

    /// Tells everybody who has routes what became of the proxy.
    fn note(&self, kind: EventKind, cause: &str) {
        let concerned: BTreeSet<&EnvironmentId> =
            self.parts.iter().filter(|(_, part)| !part.routes().is_empty()).map(|(id, _)| id).collect();
        let changes: Vec<Change> =
            concerned.into_iter().map(|environment| event(environment, kind, None, cause)).collect();
        if !changes.is_empty() {
            // Committed though the future is dropped; nothing waits for it.
            drop(self.store.commit(changes));
        }
    }

    /// Delivers without waiting: an environment that is busy writing must not stop the others' routes.
    fn tell(&self, environment: &EnvironmentId, event: Event) {
        let Some(inbox) = self.parts.get(environment).and_then(|part| part.inbox.clone()) else { return };
        if let Err(mpsc::error::TrySendError::Full(event)) = inbox.try_send(event) {
            self.tree.start(TaskKind::Connection, "late route answer", async move {
                let _ = inbox.send(event).await;
            });
        }
    }
}

fn event(environment: &EnvironmentId, kind: EventKind, resource: Option<ResourceId>, cause: &str) -> Change {
    Change::Event(Box::new(orchestra_model::Event {
        sequence: 0,
        at: 0,
        environment: environment.clone(),
        kind,
        resource,
        instance: None,
        release: None,
        run: None,
        cause: cause.to_owned(),
    }))
}
