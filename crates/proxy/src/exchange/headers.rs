//! What of a message's head goes on to the other side, and what does not.
//!
//! RFC 9110 7.6.1: a proxy takes out what concerns one connection only, which includes everything that `Connection`
//! names. What instances are told of the client (`X-Forwarded-*`) is put in after that, so that a client cannot have it
//! taken out. No `Via`: the proxy is part of the service that the client talks to.

use std::{cell::RefCell, net::IpAddr};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version,
    header::{self, Entry},
    uri::{Authority, PathAndQuery, Scheme},
};

use crate::state::Arrival;

mod forwarded;

pub(crate) const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");
/// Says to an instance that a request is a copy whose response nobody sees.
const MIRROR: HeaderName = HeaderName::from_static("orchestra-mirror");

/// Headers of which no other spelling passes, beside `X-Forwarded-*`.
const FORGED: [&str; 5] = ["x-real-ip", "content-length", "transfer-encoding", "orchestra-mirror", "orchestra-release"];

/// Headers that concern one connection only.
const HOP_BY_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    header::PROXY_AUTHENTICATE,
    header::PROXY_AUTHORIZATION,
    HTTP2_SETTINGS,
];

/// What else trailers must not have.
const NOT_IN_TRAILERS: [HeaderName; 10] = [
    header::CONTENT_LENGTH,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::FORWARDED,
    FORWARDED_FOR,
    FORWARDED_PROTO,
    FORWARDED_HOST,
    REAL_IP,
    MIRROR,
];

/// Longest path and query. Common servers take 8 to 32 KiB.
const MAX_TARGET: usize = 32 << 10;

/// Why a request is not acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unacceptable {
    /// HTTP/1.1 without `Host`, or HTTP/2 without `:authority`.
    NoHost,
    /// More than one host, or one that is no host.
    BadHost,
    /// A `CONNECT`, or a target in a form that only those have.
    Connect,
    /// A target in a form that the method cannot have.
    BadTarget,
    /// A transfer coding other than `chunked` alone.
    Coding,
    /// A target that is too long.
    TooLong,
}

impl Unacceptable {
    pub(crate) fn message(self) -> &'static str {
        match self {
            Self::NoHost => "the request names no host",
            Self::BadHost => "the request's host is ambiguous or malformed",
            Self::Connect => "CONNECT is not supported",
            Self::BadTarget => "the request's target has a form that its method cannot have",
            Self::Coding => "the request's transfer coding is not `chunked` alone",
            Self::TooLong => "the request's target is longer than 32 KiB",
        }
    }
}

/// The head that goes to an instance.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    pub(crate) method: Method,
    path: PathAndQuery,
    authority: Authority,
    headers: HeaderMap,
    /// The protocol that the client asks to upgrade to.
    pub(crate) upgrade: Option<HeaderValue>,
}

/// Checks a request and takes out of its head what goes on. `trusts` says whether a proxy is believed.
pub(crate) fn prepare<B>(
    request: &mut Request<B>,
    arrival: &Arrival,
    trusts: impl Fn(IpAddr) -> bool,
) -> Result<Head, Unacceptable> {
    let authority = authority(request, arrival)?;
    coding(request.headers())?;
    let path = target(request)?;
    let mut headers = std::mem::take(request.headers_mut());
    let upgrade = upgrade(&headers, request.version());
    let trailers = wants_trailers(&headers);
    strip(&mut headers);
    headers.remove(header::HOST);
    // The proxy answers it itself: hyper sends `100 Continue` as soon as the body is asked for.
    headers.remove(header::EXPECT);
    // A program may leave out effects of a copy: nobody else is to claim to be one.
    headers.remove(MIRROR);
    headers.remove(header::TE);
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
    join_cookies(&mut headers);
    forwarded(&mut headers, arrival, &authority, trusts);
    Ok(Head { method: request.method().clone(), path, authority, headers, upgrade })
}

impl Head {
    /// The request as an instance gets it over HTTP/2.
    pub(crate) fn request<B>(&self, body: B) -> Request<B> {
        let mut request = Request::new(body);
        *request.method_mut() = self.method.clone();
        *request.version_mut() = Version::HTTP_2;
        let mut uri = http::uri::Parts::default();
        uri.path_and_query = Some(self.path.clone());
        uri.scheme = Some(Scheme::HTTP);
        uri.authority = Some(self.authority.clone());
        *request.uri_mut() = Uri::from_parts(uri).expect("a path with scheme and authority");
        *request.headers_mut() = self.headers.clone();
        request
    }

    /// The headers as an instance gets them over HTTP/1.1.
    pub(crate) fn lines(&self) -> impl Iterator<Item = (&HeaderName, &[u8])> {
        // `TE` concerns one connection, and must be named as such (RFC 9110 10.1.4).
        let te = self.headers.contains_key(header::TE);
        let options: &[u8] = match (&self.upgrade, te) {
            (Some(_), true) => b"upgrade, te",
            (Some(_), false) => b"upgrade",
            (None, _) => b"te",
        };
        let host = std::iter::once((&header::HOST, self.authority.as_str().as_bytes()));
        let connection = (te || self.upgrade.is_some()).then_some((&header::CONNECTION, options));
        let upgrade = self.upgrade.as_ref().map(|upgrade| (&header::UPGRADE, upgrade.as_bytes()));
        let others = self.headers.iter().map(|(name, value)| (name, value.as_bytes()));
        host.chain(others).chain(upgrade).chain(connection)
    }

    /// The same for a copy of the request.
    pub(crate) fn mirrored(&self) -> Self {
        let mut copy = self.clone();
        copy.headers.insert(MIRROR, HeaderValue::from_static("1"));
        copy
    }

    /// Path and query.
    pub(crate) fn target(&self) -> &str {
        self.path.as_str()
    }

    /// Whether it may be sent again although an instance may have seen it (RFC 9110 9.2.2).
    pub(crate) fn is_idempotent(&self) -> bool {
        [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE, Method::PUT, Method::DELETE].contains(&self.method)
    }

    /// Whether it is meant to change nothing (RFC 9110 9.2.1).
    pub(crate) fn is_safe(&self) -> bool {
        [Method::GET, Method::HEAD, Method::OPTIONS, Method::TRACE].contains(&self.method)
    }

    /// Whether it is a gRPC call.
    pub(crate) fn is_grpc(&self) -> bool {
        is_grpc(&self.headers)
    }

    /// Whether the client asks for a stream.
    pub(crate) fn expects_stream(&self) -> bool {
        let events = |value: &HeaderValue| value.as_bytes().windows(17).any(|part| part == b"text/event-stream");
        self.is_grpc() || self.headers.get_all(header::ACCEPT).iter().any(events)
    }

    /// What goes on; without the host.
    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The host that it is for.
    pub(crate) fn authority(&self) -> &str {
        self.authority.as_str()
    }

    pub(crate) fn query(&self) -> Option<&str> {
        self.path.query()
    }
}

/// Whether a message is part of a gRPC call.
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    content_type_starts(headers, "application/grpc")
}

/// Whether a response is a stream of events.
pub(crate) fn is_event_stream(headers: &HeaderMap) -> bool {
    content_type_starts(headers, "text/event-stream")
}

fn content_type_starts(headers: &HeaderMap, prefix: &str) -> bool {
    let value = headers.get(header::CONTENT_TYPE).map(HeaderValue::as_bytes);
    value.and_then(|v| v.get(..prefix.len())).is_some_and(|v| v.eq_ignore_ascii_case(prefix.as_bytes()))
}

/// The coding of a body must leave no doubt where it ends. hyper finds the end where `chunked` comes last, but what comes
/// before it would be lost on the way: an instance would take compressed bytes for plain ones.
fn coding(headers: &HeaderMap) -> Result<(), Unacceptable> {
    let mut codings = headers.get_all(header::TRANSFER_ENCODING).iter();
    let chunked = codings.next().is_none_or(|v| v.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked"));
    if chunked && codings.next().is_none() { Ok(()) } else { Err(Unacceptable::Coding) }
}

/// Path and query, as an instance gets them (RFC 9112 3.2).
fn target<B>(request: &Request<B>) -> Result<PathAndQuery, Unacceptable> {
    let (method, uri) = (request.method(), request.uri());
    if *method == Method::CONNECT {
        return Err(Unacceptable::Connect);
    }
    // A host alone, as only `CONNECT` has it.
    if uri.authority().is_some() && uri.scheme().is_none() {
        return Err(Unacceptable::BadTarget);
    }
    let path = match uri.path_and_query() {
        Some(path) if path.as_str().starts_with('/') => path.clone(),
        Some(path) if path.as_str() == "*" && *method != Method::OPTIONS => return Err(Unacceptable::BadTarget),
        Some(path) if path.as_str() == "*" => path.clone(),
        // Of `http://host?query`.
        Some(path) if !path.as_str().is_empty() => {
            PathAndQuery::try_from(format!("/{}", path.as_str())).map_err(|_| Unacceptable::BadTarget)?
        }
        _ if *method == Method::OPTIONS && request.version() >= Version::HTTP_2 => PathAndQuery::from_static("*"),
        _ => PathAndQuery::from_static("/"),
    };
    if path.as_str().len() > MAX_TARGET { Err(Unacceptable::TooLong) } else { Ok(path) }
}

/// Whether what follows a host is a port, if anything follows it.
fn has_sound_port(authority: &Authority) -> bool {
    match authority.as_str().rsplit_once(':') {
        Some((host, port)) if !host.starts_with('[') || host.ends_with(']') => {
            port.is_empty() || port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
        }
        _ => true,
    }
}

/// The one host that a request is for. The target's comes before the header's (RFC 9112 3.2.2); in HTTP/2 they must not
/// differ (RFC 9113 8.3.1).
fn authority<B>(request: &Request<B>, arrival: &Arrival) -> Result<Authority, Unacceptable> {
    let mut hosts = request.headers().get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Unacceptable::BadHost);
    }
    let parse = |value: &HeaderValue| -> Result<Authority, Unacceptable> {
        let authority = Authority::try_from(value.as_bytes()).map_err(|_| Unacceptable::BadHost)?;
        let sound = !authority.as_str().contains('@') && has_sound_port(&authority);
        if sound { Ok(authority) } else { Err(Unacceptable::BadHost) }
    };
    match (request.uri().authority(), host) {
        (Some(target), host) => {
            if target.as_str().contains('@') || !has_sound_port(target) {
                return Err(Unacceptable::BadHost);
            }
            let differs = |host: &HeaderValue| !host.as_bytes().eq_ignore_ascii_case(target.as_str().as_bytes());
            if request.version() >= Version::HTTP_2 && host.is_some_and(differs) {
                return Err(Unacceptable::BadHost);
            }
            Ok(target.clone())
        }
        (None, Some(host)) if !host.is_empty() => parse(host),
        // Only HTTP/1.0 may do without: it means the address that was connected to.
        (None, None) if request.version() <= Version::HTTP_10 => {
            Ok(Authority::try_from(arrival.local.to_string()).expect("an address with a port is an authority"))
        }
        (None, Some(_)) => Err(Unacceptable::BadHost),
        (None, None) => Err(Unacceptable::NoHost),
    }
}

/// The protocol that is asked for, except the upgrade to HTTP/2: that is spoken by prior knowledge only, since an
/// upgrade through a proxy would be a tunnel around everything that it checks.
fn upgrade(headers: &HeaderMap, version: Version) -> Option<HeaderValue> {
    let asked = options(headers).any(|option| option.eq_ignore_ascii_case("upgrade"));
    if version != Version::HTTP_11 || !asked {
        return None;
    }
    let lines = headers.get_all(header::UPGRADE).iter().filter_map(|value| value.to_str().ok());
    let all = lines.flat_map(|line| line.split(',')).map(str::trim).filter(|protocol| !protocol.is_empty());
    let http2 = |protocol: &&str| protocol.get(..2).is_some_and(|name| name.eq_ignore_ascii_case("h2"));
    let kept: Vec<&str> = all.filter(|protocol| !http2(protocol)).collect();
    if kept.is_empty() { None } else { HeaderValue::try_from(kept.join(", ")).ok() }
}

/// Whether a switch to `protocol` is one that was asked for.
pub(crate) fn offers(asked: &HeaderValue, protocol: Option<&HeaderValue>) -> bool {
    let Some(protocol) = protocol else { return false };
    asked
        .as_bytes()
        .split(|b| *b == b',')
        .any(|a| a.trim_ascii().eq_ignore_ascii_case(protocol.as_bytes().trim_ascii()))
}

fn options(headers: &HeaderMap) -> impl Iterator<Item = &str> {
    headers.get_all(header::CONNECTION).iter().filter_map(|v| v.to_str().ok()).flat_map(|v| v.split(',')).map(str::trim)
}

fn wants_trailers(headers: &HeaderMap) -> bool {
    let values = headers.get_all(header::TE).iter().filter_map(|v| v.to_str().ok());
    values.flat_map(|v| v.split(',')).any(|v| v.trim().eq_ignore_ascii_case("trailers"))
}

/// Takes out what concerns one connection only, of a request or a response.
pub(crate) fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let named: Vec<HeaderName> = options(headers).filter_map(|o| HeaderName::try_from(o).ok()).collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in &HOP_BY_HOP {
        headers.remove(name);
    }
}

/// Takes out of trailers what they must not say (RFC 9110 6.5.1): where a message ends, for whom it is, who sent it. Some
/// programs take trailers for headers.
pub(crate) fn strip_trailers(trailers: &mut HeaderMap) {
    for name in HOP_BY_HOP.iter().chain(&NOT_IN_TRAILERS) {
        trailers.remove(name);
    }
}

/// HTTP/2 clients may send each cookie in a line of its own; HTTP/1.1 knows one line (RFC 9113 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(header::COOKIE).iter().nth(1).is_none() {
        return;
    }
    let lines: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(joined) = HeaderValue::from_bytes(&lines.join(&b"; "[..])) {
        headers.insert(header::COOKIE, joined);
    }
}

/// Tells the instance who the client is. What the client itself says of that is believed only if it is on this
/// machine, where a proxy that ends TLS may stand in front of this one, or if the stack names it as such.
fn forwarded(headers: &mut HeaderMap, arrival: &Arrival, authority: &Authority, trusts: impl Fn(IpAddr) -> bool) {
    let peer = arrival.peer.ip().to_canonical();
    let said = [FORWARDED_FOR, FORWARDED_PROTO, FORWARDED_HOST, REAL_IP, header::FORWARDED];
    let told = said.iter().any(|name| headers.contains_key(name));
    let believed = told && trusts(peer);
    if told && !believed {
        for name in said {
            headers.remove(name);
        }
    }
    // CGI and WSGI programs cannot tell `X_Forwarded_For` from `X-Forwarded-For`.
    if headers.keys().any(|name| name.as_str().contains('_')) {
        let forged: Vec<HeaderName> = headers
            .keys()
            .filter(|name| {
                let dashed = name.as_str().replace('_', "-");
                name.as_str().contains('_') && (dashed.starts_with("x-forwarded-") || FORGED.contains(&dashed.as_str()))
            })
            .cloned()
            .collect();
        for name in forged {
            headers.remove(name);
        }
    }
    headers.reserve(6);
    if believed {
        translate(headers, &trusts);
        tell(headers, peer, arrival.secure, authority);
    } else {
        TOLD.with_borrow_mut(|told| told.tell(headers, peer, arrival.secure, authority));
    }
}

thread_local! {
    static TOLD: RefCell<Told> = RefCell::default();
}

/// What instances were told of some clients that said nothing of themselves: it is the same for each request of a client
/// to a host, and takes a while to write.
#[derive(Default)]
struct Told([Option<(IpAddr, bool, Authority, HeaderMap)>; 32]);

impl Told {
    fn tell(&mut self, headers: &mut HeaderMap, peer: IpAddr, secure: bool, authority: &Authority) {
        let last = match peer {
            IpAddr::V4(ip) => ip.octets()[3],
            IpAddr::V6(ip) => ip.octets()[15],
        };
        let place = usize::from(last) % self.0.len();
        let known = &mut self.0[place];
        let same = |of: &(IpAddr, bool, Authority, HeaderMap)| {
            (of.0, of.1) == (peer, secure) && of.2.as_str() == authority.as_str()
        };
        if !known.as_ref().is_some_and(same) {
            let mut lines = HeaderMap::new();
            tell(&mut lines, peer, secure, authority);
            *known = Some((peer, secure, authority.clone(), lines));
        }
        let (.., lines) = known.as_ref().expect("it was made if it was not there");
        for (name, value) in lines {
            headers.insert(name, value.clone());
        }
    }
}

/// Says what `Forwarded` says of a client in the older headers, if it is all that the proxy in front sends: most programs,
/// and whatever tells clients apart here, look at those.
fn translate(headers: &mut HeaderMap, trusts: impl Fn(IpAddr) -> bool) {
    if headers.contains_key(FORWARDED_FOR) {
        return;
    }
    let Some(elements) = forwarded::read(headers) else { return };
    let nodes: Vec<&str> = elements.iter().map(|element| element.node.as_str()).collect();
    headers.insert(FORWARDED_FOR, HeaderValue::try_from(nodes.join(", ")).expect("nodes are visible ASCII"));
    let Some(client) = forwarded::of_client(&elements, trusts) else { return };
    if let (Some(proto), Entry::Vacant(entry)) = (client.proto, headers.entry(FORWARDED_PROTO)) {
        entry.insert(HeaderValue::from_static(proto));
    }
    if let (Some(host), Entry::Vacant(entry)) = (&client.host, headers.entry(FORWARDED_HOST)) {
        entry.insert(HeaderValue::from_str(host.as_str()).expect("an authority is visible ASCII"));
    }
}

/// Adds to what is said of a client.
fn tell(headers: &mut HeaderMap, peer: IpAddr, secure: bool, authority: &Authority) {
    let own = if secure { "https" } else { "http" };
    let client = ip_value(peer);
    let chain = headers.get_all(FORWARDED_FOR).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>().join(&b", "[..]);
    let chain = if chain.is_empty() { client } else { append(&chain, &client) };
    if let Entry::Vacant(entry) = headers.entry(FORWARDED_PROTO) {
        entry.insert(HeaderValue::from_static(own));
    }
    if let Entry::Vacant(entry) = headers.entry(FORWARDED_HOST) {
        entry.insert(HeaderValue::from_str(authority.as_str()).expect("an authority is visible ASCII"));
    }
    let before = headers.get_all(header::FORWARDED).iter().map(HeaderValue::as_bytes).collect::<Vec<_>>();
    let element = if before.is_empty() {
        // It says the same as the others, whichever of them a program looks at.
        let hops = chain.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii);
        let mut nodes = hops.map(|hop| node(std::str::from_utf8(hop).ok().and_then(|hop| hop.parse().ok())));
        let first = nodes.next().expect("the client is in it");
        let said = |name| headers.get(&name).and_then(|value| value.to_str().ok()).map(quoted);
        let host = said(FORWARDED_HOST).map(|host| format!(";host={host}")).unwrap_or_default();
        let proto = said(FORWARDED_PROTO).map(|proto| format!(";proto={proto}")).unwrap_or_default();
        nodes.fold(format!("{first}{host}{proto}"), |all, node| format!("{all}, {node}"))
    } else {
        format!("{};host={};proto={own}", node(Some(peer)), quoted(authority.as_str()))
    };
    let element = HeaderValue::try_from(element).expect("hosts and protocols are visible ASCII");
    let forwarded = if before.is_empty() { element } else { append(&before.join(&b", "[..]), &element) };
    headers.insert(header::FORWARDED, forwarded);
    headers.insert(FORWARDED_FOR, chain);
}

/// A node of `Forwarded` (RFC 7239 6).
fn node(ip: Option<IpAddr>) -> String {
    match ip {
        Some(IpAddr::V4(ip)) => format!("for={ip}"),
        Some(IpAddr::V6(ip)) => format!("for=\"[{ip}]\""),
        None => "for=unknown".to_owned(),
    }
}

/// A value of `Forwarded`: as it is, or in quotes where that is needed (RFC 9110 5.6.4).
fn quoted(value: &str) -> String {
    if !value.is_empty() && value.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
        return value.to_owned();
    }
    format!("\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
}

fn ip_value(ip: IpAddr) -> HeaderValue {
    HeaderValue::from_str(&ip.to_string()).expect("an address is visible ASCII")
}

fn append(chain: &[u8], client: &HeaderValue) -> HeaderValue {
    HeaderValue::from_bytes(&[chain, b", ", client.as_bytes()].concat()).unwrap_or_else(|_| client.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::SocketId;

    fn arrival(peer: &str) -> Arrival {
        Arrival {
            socket: SocketId(0),
            peer: peer.parse().unwrap(),
            local: "127.0.0.1:80".parse().unwrap(),
            secure: false,
        }
    }

    fn request(version: Version, uri: &str, headers: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().version(version).uri(uri);
        for (name, value) in headers {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    fn sent(version: Version, uri: &str, headers: &[(&str, &str)], peer: &str, h2: bool) -> Request<()> {
        let head = prepare(&mut request(version, uri, headers), &arrival(peer), |peer| peer.is_loopback()).unwrap();
        if h2 {
            return head.request(());
        }
        let mut sent = Request::builder().uri(head.target());
        for (name, value) in head.lines() {
            sent = sent.header(name, value);
        }
        sent.body(()).unwrap()
    }

    #[test]
    fn hop_by_hop_headers_do_not_pass_and_a_client_cannot_have_ours_removed() {
        let headers = [
            ("host", "shop.example"),
            ("connection", "keep-alive, x-secret, X-Forwarded-For, host, content-length"),
            ("keep-alive", "timeout=5"),
            ("x-secret", "1"),
            ("te", "gzip, trailers"),
            ("proxy-authorization", "Basic xyz"),
            ("expect", "100-continue"),
            ("x-kept", "yes"),
        ];
        let sent = sent(Version::HTTP_11, "/a?b=c", &headers, "203.0.113.9:1234", false);
        assert_eq!(sent.uri(), "/a?b=c");
        assert_eq!(sent.headers()["host"], "shop.example");
        assert_eq!(sent.headers()["x-forwarded-for"], "203.0.113.9");
        assert_eq!(sent.headers()["x-forwarded-proto"], "http");
        assert_eq!(sent.headers()["x-forwarded-host"], "shop.example");
        assert_eq!(sent.headers()["te"], "trailers");
        assert_eq!(sent.headers()["connection"], "te");
        assert_eq!(sent.headers()["x-kept"], "yes");
        for gone in ["keep-alive", "x-secret", "proxy-authorization", "expect", "via"] {
            assert!(!sent.headers().contains_key(gone), "{gone}");
        }
    }

    #[test]
    fn forwarded_headers_are_believed_from_this_machine_only() {
        let headers = [
            ("host", "a"),
            ("x-forwarded-for", "198.51.100.1"),
            ("x-forwarded-proto", "https"),
            ("x_forwarded_for", "10.0.0.1"),
            ("transfer_encoding", "chunked"),
            ("content_length", "9"),
            ("x-real-ip", "10.0.0.1"),
        ];
        let near = sent(Version::HTTP_11, "/", &headers, "127.0.0.1:5", false);
        assert_eq!(near.headers()["x-forwarded-for"], "198.51.100.1, 127.0.0.1");
        assert_eq!(near.headers()["x-forwarded-proto"], "https");
        assert!(near.headers().keys().all(|name| !name.as_str().contains('_')));
        let far = sent(Version::HTTP_11, "/", &headers, "[2001:db8::1]:5", false);
        assert_eq!(far.headers()["x-forwarded-for"], "2001:db8::1");
        assert_eq!(far.headers()["x-forwarded-proto"], "http");
        assert!(!far.headers().contains_key("x-real-ip"));
    }

    #[test]
    fn forwarded_headers_are_believed_from_proxies_that_the_stack_names() {
        let policy = orchestra_model::traffic::PortPolicy {
            trusted_proxies: vec!["198.51.100.0/24".parse().unwrap()],
            ..Default::default()
        };
        let rules = crate::rules::Rules::new(&policy, None);
        let headers = [("host", "a"), ("x-forwarded-for", "203.0.113.9"), ("x-forwarded-proto", "https")];
        let sent = |peer: &str| {
            let mut request = request(Version::HTTP_11, "/", &headers);
            let head = prepare(&mut request, &arrival(peer), |peer| rules.trusts(peer)).unwrap();
            ["x-forwarded-for", "x-forwarded-proto", "forwarded"]
                .map(|name| head.headers[name].to_str().unwrap().to_owned())
        };
        let believed = ["203.0.113.9, 198.51.100.7", "https", "for=203.0.113.9;host=a;proto=https, for=198.51.100.7"];
        assert_eq!(sent("198.51.100.7:5"), believed);
        assert_eq!(sent("[::ffff:198.51.100.7]:5"), believed, "on a socket of IPv6");
        assert_eq!(sent("127.0.0.1:5")[0], "203.0.113.9, 127.0.0.1");
        assert_eq!(sent("198.51.101.7:5"), ["198.51.101.7", "http", "for=198.51.101.7;host=a;proto=http"]);
    }

    #[test]
    fn the_host_is_one_and_comes_from_the_target_first() {
        let absolute = sent(Version::HTTP_11, "http://real/x", &[("host", "other")], "127.0.0.1:5", false);
        assert_eq!((absolute.headers()["host"].to_str().unwrap(), absolute.uri().to_string()), ("real", "/x".into()));
        let old = sent(Version::HTTP_10, "/", &[], "127.0.0.1:5", false);
        assert_eq!(old.headers()["host"], "127.0.0.1:80");
        let h2 = sent(Version::HTTP_2, "http://svc/pkg.Svc/Call", &[("te", "trailers")], "127.0.0.1:5", true);
        assert_eq!(h2.uri(), "http://svc/pkg.Svc/Call");
        assert!(!h2.headers().contains_key("host") && h2.headers()["te"] == "trailers");
        assert!(!h2.headers().contains_key("connection"));
        let refused = |version, uri, headers: &[(&str, &str)]| {
            prepare(&mut request(version, uri, headers), &arrival("127.0.0.1:5"), |_| true).unwrap_err()
        };
        assert_eq!(refused(Version::HTTP_11, "/", &[]), Unacceptable::NoHost);
        assert_eq!(refused(Version::HTTP_11, "/", &[("host", "a"), ("host", "a")]), Unacceptable::BadHost);
        assert_eq!(refused(Version::HTTP_11, "/", &[("host", "")]), Unacceptable::BadHost);
        assert_eq!(refused(Version::HTTP_11, "/", &[("host", "a b")]), Unacceptable::BadHost);
        assert_eq!(refused(Version::HTTP_11, "/", &[("host", "user@a")]), Unacceptable::BadHost);
        assert_eq!(refused(Version::HTTP_2, "http://a/", &[("host", "b")]), Unacceptable::BadHost);
        for host in ["a:99999", "a:-1", "a:x", "[::1]:x", "a:+1"] {
            assert_eq!(refused(Version::HTTP_11, "/", &[("host", host)]), Unacceptable::BadHost, "{host}");
        }
        for host in ["a:", "a:1", "[::1]", "[::1]:80"] {
            assert_eq!(
                self::sent(Version::HTTP_11, "/", &[("host", host)], "127.0.0.1:5", false).headers()["host"],
                host
            );
        }
    }

    #[test]
    fn a_target_has_the_form_that_its_method_allows() {
        let target = |method: Method, uri: &str| {
            let mut request = request(Version::HTTP_11, uri, &[("host", "a")]);
            *request.method_mut() = method;
            prepare(&mut request, &arrival("127.0.0.1:5"), |_| true).map(|head| head.path.as_str().to_owned())
        };
        assert_eq!(target(Method::GET, "http://x?q=1"), Ok("/?q=1".into()));
        assert_eq!(target(Method::GET, "/a?q=//1"), Ok("/a?q=//1".into()));
        assert_eq!(target(Method::GET, "//evil/x"), Ok("//evil/x".into()));
        assert_eq!(target(Method::OPTIONS, "*"), Ok("*".into()));
        assert_eq!(target(Method::GET, "*"), Err(Unacceptable::BadTarget));
        assert_eq!(target(Method::GET, "host"), Err(Unacceptable::BadTarget));
        assert_eq!(target(Method::GET, "host:80"), Err(Unacceptable::BadTarget));
        assert_eq!(target(Method::CONNECT, "host:80"), Err(Unacceptable::Connect));
    }

    #[test]
    fn a_body_is_coded_in_chunks_or_not_at_all() {
        let coded = |lines: &[&str]| {
            let headers: Vec<_> =
                lines.iter().map(|line| ("transfer-encoding", *line)).chain([("host", "a")]).collect();
            prepare(&mut request(Version::HTTP_11, "/", &headers), &arrival("127.0.0.1:5"), |_| true).map(|_| ())
        };
        assert_eq!(coded(&[]), Ok(()));
        assert_eq!(coded(&["Chunked "]), Ok(()));
        let odd: [&[&str]; 5] =
            [&["gzip, chunked"], &["identity, chunked"], &["chunked", "chunked"], &[", chunked"], &["gzip", "chunked"]];
        for lines in odd {
            assert_eq!(coded(lines), Err(Unacceptable::Coding), "{lines:?}");
        }
    }

    #[test]
    fn forwarded_says_what_the_others_say() {
        let forwarded = |headers: &[(&str, &str)], peer| {
            let headers: Vec<_> = headers.iter().copied().chain([("host", "shop.example:8080")]).collect();
            let sent = sent(Version::HTTP_11, "/", &headers, peer, false);
            assert_eq!(sent.headers().get_all("forwarded").iter().count(), 1);
            sent.headers()["forwarded"].to_str().unwrap().to_owned()
        };
        let lie = ("forwarded", "for=10.0.0.1;proto=https");
        assert_eq!(forwarded(&[lie], "203.0.113.9:1"), "for=203.0.113.9;host=\"shop.example:8080\";proto=http");
        assert_eq!(forwarded(&[lie], "[2001:db8::1]:1"), "for=\"[2001:db8::1]\";host=\"shop.example:8080\";proto=http");
        // A proxy on this machine, with the one header or the other.
        assert_eq!(
            forwarded(&[lie, ("forwarded", "for=\"_hidden\"")], "127.0.0.1:1"),
            "for=10.0.0.1;proto=https, for=\"_hidden\", for=127.0.0.1;host=\"shop.example:8080\";proto=http"
        );
        let older =
            [("x-forwarded-for", "2001:db8::7, what"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "a\"b")];
        assert_eq!(
            forwarded(&older, "127.0.0.1:1"),
            "for=\"[2001:db8::7]\";host=\"a\\\"b\";proto=https, for=unknown, for=127.0.0.1"
        );
    }

    #[test]
    fn a_proxy_that_sends_forwarded_alone_is_told_in_the_older_headers_too() {
        let told = |headers: &[(&str, &str)], peer| {
            let headers: Vec<_> = headers.iter().copied().chain([("host", "inner")]).collect();
            let sent = sent(Version::HTTP_11, "/", &headers, peer, false);
            ["x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"]
                .map(|name| sent.headers()[name].to_str().unwrap().to_owned())
        };
        let line =
            ("forwarded", "for=6.6.6.6;proto=http;host=lie, for=\"[2001:db8::7]:99\";proto=https;host=shop.example");
        assert_eq!(told(&[line], "127.0.0.1:1"), ["6.6.6.6, 2001:db8::7, 127.0.0.1", "https", "shop.example"]);
        // A second proxy on this machine: it is not the client that the first one tells of.
        let two = ("forwarded", "for=127.0.0.1;proto=http;host=middle");
        assert_eq!(told(&[line, two], "127.0.0.1:1")[1..], ["https", "shop.example"]);
        let both = [("x-forwarded-for", "203.0.113.9"), line];
        assert_eq!(
            told(&both, "127.0.0.1:1"),
            ["203.0.113.9, 127.0.0.1", "http", "inner"],
            "a client may have sent it"
        );
        assert_eq!(told(&[line], "203.0.113.9:1"), ["203.0.113.9", "http", "inner"]);
        assert_eq!(told(&[("forwarded", "for=\"oops")], "127.0.0.1:1"), ["127.0.0.1", "http", "inner"]);
    }

    #[test]
    fn upgrades_pass_only_when_meant_and_never_to_http2() {
        let upgraded = |headers: &[(&str, &str)], version| {
            prepare(&mut request(version, "/", headers), &arrival("127.0.0.1:5"), |_| true).unwrap().upgrade
        };
        let websocket = [("host", "a"), ("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")];
        assert_eq!(upgraded(&websocket, Version::HTTP_11).unwrap(), "websocket");
        assert_eq!(upgraded(&websocket, Version::HTTP_10), None);
        assert_eq!(upgraded(&[("host", "a"), ("upgrade", "websocket")], Version::HTTP_11), None);
        let h2c = [("host", "a"), ("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c")];
        assert_eq!(upgraded(&h2c, Version::HTTP_11), None);
        let hidden = [("host", "a"), ("connection", "upgrade"), ("upgrade", "x, H2C"), ("upgrade", "h2, websocket")];
        let asked = upgraded(&hidden, Version::HTTP_11).unwrap();
        assert_eq!(asked, "x, websocket");
        assert!(offers(&asked, Some(&HeaderValue::from_static("WebSocket"))));
        assert!(!offers(&asked, Some(&HeaderValue::from_static("h2c"))) && !offers(&asked, None));
        let sent = sent(Version::HTTP_11, "/", &websocket, "127.0.0.1:5", false);
        assert_eq!(
            (&sent.headers()["connection"], &sent.headers()["upgrade"]),
            (&HeaderValue::from_static("upgrade"), &HeaderValue::from_static("websocket"))
        );
    }

    #[test]
    fn cookies_become_one_line() {
        let headers = [("cookie", "a=1"), ("cookie", "b=2")];
        let sent = sent(Version::HTTP_2, "http://a/", &headers, "127.0.0.1:5", false);
        assert_eq!(sent.headers()["cookie"], "a=1; b=2");
        assert_eq!(sent.headers().get_all("cookie").iter().count(), 1);
    }
}
