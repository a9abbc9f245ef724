//! Feature flags, answered by the proxy itself over the OpenFeature Remote Evaluation Protocol.
//!
//! A route with flags in it has no instances behind it. Its set is compiled when a table brings another one, and every
//! request is answered from the last, whether a server steers this proxy or not. What the protocol says is in
//! `orchestra-flags`; here are only the socket's side and the streams on which changes are told.
//!
//! Streams end when the flags go or the proxy leaves: their clients connect again, and are told then what they missed.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use orchestra_flags::{
    Compiled,
    ofrep::{self, KEEP_ALIVE, KEEP_ALIVE_EVERY, MAX_BODY, Served, Settings},
};
use orchestra_model::{
    EnvironmentId,
    flag::ServedFlags,
    route::{RouteId, RouteTable},
};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;

use crate::{
    exchange::{
        body::{Active, ClientConnection, ResponseBody},
        source::Source,
    },
    metrics::{Registry, Series},
    state::{Arrival, Proxy},
    wire::SocketId,
};

/// Time for the body of a request to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// The flags of all environments, over versions of the table.
#[derive(Debug, Default)]
pub(crate) struct Flags {
    stations: Mutex<BTreeMap<EnvironmentId, Arc<Station>>>,
    leaving: CancellationToken,
}

/// The flags of one environment.
#[derive(Debug)]
pub(crate) struct Station {
    /// Subscribers hold the other end: without a station their streams end.
    current: watch::Sender<Arc<Current>>,
    series: Arc<Series>,
}

/// A version of them.
#[derive(Debug)]
struct Current {
    source: Arc<ServedFlags>,
    served: Served,
}

impl Current {
    fn new(environment: &EnvironmentId, source: &Arc<ServedFlags>) -> Arc<Self> {
        let settings = Settings { environment: Some(environment.clone()), ..Settings::default() };
        let served = Served { flags: Compiled::new(&source.set), changed_at: source.changed_at, settings };
        for (flag, problem) in served.flags.problems() {
            tracing::error!(%environment, %flag, %problem, "a flag cannot be served");
        }
        Arc::new(Self { source: Arc::clone(source), served })
    }
}

impl Flags {
    /// Takes the flags of a table over, and says on which socket each are asked for.
    pub(crate) fn apply(
        &self,
        table: &RouteTable,
        sockets: &HashMap<&RouteId, SocketId>,
        before: &HashMap<SocketId, Arc<Station>>,
        metrics: &Registry,
    ) -> HashMap<SocketId, Arc<Station>> {
        let mut stations = self.stations.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut kept, mut asked) = (BTreeMap::new(), HashMap::new());
        for (route, source) in table.routes.iter().filter_map(|route| Some((route, route.flags.as_ref()?))) {
            let environment = &route.id.environment;
            let station = stations.remove(environment).unwrap_or_else(|| {
                let (current, _) = watch::channel(Current::new(environment, source));
                Arc::new(Station { current, series: metrics.series(&route.id, None) })
            });
            // A set is compiled, and its change told, only if it is another one.
            station.current.send_if_modified(|current| {
                let other = current.source.set != source.set;
                if other {
                    *current = Current::new(environment, source);
                }
                other
            });
            // A leaving proxy gets no sockets, but keeps those that its connections came from.
            let previous = || before.iter().find(|(_, old)| Arc::ptr_eq(old, &station)).map(|(socket, _)| *socket);
            if let Some(socket) = sockets.get(&route.id).copied().or_else(previous) {
                asked.insert(socket, Arc::clone(&station));
            }
            kept.insert(environment.clone(), station);
        }
        *stations = kept;
        asked
    }

    /// Ends all streams: the successor has them.
    pub(crate) fn leave(&self) {
        self.leaving.cancel();
    }
}

/// Answers a request of a client on a socket of flags.
pub(crate) async fn answer(
    proxy: &Proxy,
    arrival: &Arrival,
    connection: &Arc<ClientConnection>,
    request: Request<Source>,
) -> Response<ResponseBody> {
    let mut active = Active::new(connection, &request);
    let since = Instant::now();
    let method = request.method().clone();
    let station = proxy.table.load().flags.get(&arrival.socket).cloned();
    let mut response = match &station {
        Some(station) => respond(proxy, station, request, &mut active).await,
        None => last(ofrep::Response::refusal(404, "flags are not served here any more")),
    };
    if let Some(station) = station {
        station.series.responded(&method, response.status(), since.elapsed());
    }
    response.body_mut().hold(active);
    response
}

async fn respond(
    proxy: &Proxy,
    station: &Station,
    request: Request<Source>,
    active: &mut Active,
) -> Response<ResponseBody> {
    let (parts, incoming) = request.into_parts();
    let read = tokio::time::timeout(BODY_TIMEOUT, Limited::new(incoming, MAX_BODY).collect());
    let (body, whole) = match read.await {
        Ok(Ok(body)) => {
            active.is_whole();
            (body.to_bytes(), true)
        }
        // One byte more than is read says that it is too long.
        Ok(Err(error)) if error.is::<LengthLimitError>() => (Bytes::from(vec![0; MAX_BODY + 1]), false),
        Ok(Err(_)) => return last(ofrep::Response::refusal(400, "the body ended early")),
        Err(_late) => return last(ofrep::Response::refusal(408, "the body did not arrive in time")),
    };
    // Subscribed before the answer is made: a change in between is told.
    let mut changes = station.current.subscribe();
    let current = Arc::clone(&changes.borrow_and_update());
    let header = |name: &str| parts.headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let asked = ofrep::Request { method: parts.method.as_str(), path, header: &header, body: &body };
    let answered = ofrep::answer(&current.served, &asked);
    if answered.follow {
        let first = Bytes::from(answered.body.clone());
        let events = Events::new(first, changes, proxy.flags.leaving.clone());
        return headed(&answered, ResponseBody::Events(Box::new(events), None));
    }
    if whole { plain(answered) } else { last(answered) }
}

fn headed(answered: &ofrep::Response, body: ResponseBody) -> Response<ResponseBody> {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::from_u16(answered.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    for (name, value) in &answered.headers {
        // What comes from a request was checked to be a list of tokens.
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().append(*name, value);
        }
    }
    response
}

fn plain(mut answered: ofrep::Response) -> Response<ResponseBody> {
    let body = std::mem::take(&mut answered.body);
    headed(&answered, ResponseBody::full(Bytes::from(body)))
}

/// An answer after which nobody knows where the next request begins.
fn last(answered: ofrep::Response) -> Response<ResponseBody> {
    let mut response = plain(answered);
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

type Changes = watch::Receiver<Arc<Current>>;
/// The next event, with what it takes to wait for the one after it.
type NextEvent = Pin<Box<dyn Future<Output = (Changes, Option<Bytes>)> + Send>>;

/// A stream on which changes are told, until the flags go or the proxy leaves.
pub(crate) struct Events {
    next: Option<NextEvent>,
    leaving: CancellationToken,
    first: Option<Bytes>,
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

impl Events {
    fn new(first: Bytes, changes: Changes, leaving: CancellationToken) -> Self {
        let next = Box::pin(next(changes, leaving.clone()));
        Self { next: Some(next), leaving, first: Some(first) }
    }

    /// The next piece; `None` at the end.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(first));
        }
        let Some(future) = &mut self.next else { return Poll::Ready(None) };
        let (changes, piece) = ready!(future.as_mut().poll(cx));
        self.next = piece.is_some().then(|| Box::pin(next(changes, self.leaving.clone())) as _);
        Poll::Ready(piece)
    }
}

async fn next(mut changes: Changes, leaving: CancellationToken) -> (Changes, Option<Bytes>) {
    // Cancel-safe: a change that is not seen here is seen by the next look.
    let piece = tokio::select! {
        biased;
        () = leaving.cancelled() => None,
        changed = changes.changed() => {
            let event = ofrep::change_event(&changes.borrow_and_update().served);
            changed.is_ok().then(|| Bytes::from(event))
        }
        () = tokio::time::sleep(KEEP_ALIVE_EVERY.duration()) => Some(Bytes::from_static(KEEP_ALIVE)),
    };
    (changes, piece)
}
