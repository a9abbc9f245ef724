//! Keys of published ports.

use super::{OURS, PROTOCOLS};
use crate::table::{Key, Shape, Table};

pub(crate) static PORT: Table = Table {
    id: "port",
    noun: "a port",
    doc: "A stable address in front of the instances. What is said of requests holds for `http`, `h2c` and `grpc`; on `tcp` only `tls`, `timeouts: {idle: …}`, `outlier` and `breaker` have a meaning.",
    keys: &[&[
        Key::new(
            "port",
            Shape::Any(&[Shape::Integer(1, 65_535), Shape::Choice(&["auto"])]),
            "Number to listen on; `auto` lets the machine choose once.",
        )
        .default("auto"),
        Key::new("host", Shape::Host, "IP address to listen on.").default("127.0.0.1").from(OURS),
        Key::new("protocol", Shape::Choice(PROTOCOLS), "What is spoken on it.")
            .default("by the port's name")
            .from("as Istio: a name that is, or begins with, `grpc`, `h2c` or `tcp` and a `-`; else `http`"),
        Key::new(
            "tls",
            Shape::Any(&[Shape::Choice(&[DEVELOPMENT]), Shape::Table(&TLS)]),
            "TLS is spoken with clients. `development`: with a certificate of this machine's authority for `localhost`.",
        )
        .default("none"),
        Key::new(
            "sticky",
            Shape::Any(&[Shape::Choice(&[CLIENT]), Shape::Table(&STICKY)]),
            "What a client is recognised by, so that its requests stay with one instance and one release. `client`: its address.",
        )
        .default("none"),
        Key::new(
            "pin",
            Shape::Boolean,
            "A client stays with the release that it first met for as long as that one lives.",
        )
        .default("false"),
        Key::new("limits", Shape::Table(&REQUEST_LIMITS), "Bounds of requests."),
        Key::new("timeouts", Shape::Table(&TIMEOUTS), "Bounds of time."),
        Key::new(
            "buffer",
            Shape::Size,
            "Request bodies up to this size are read before an instance is chosen, so that slow uploads bind none; larger ones are passed on as they come.",
        )
        .default("none"),
        Key::new(
            "retry",
            Shape::Any(&[Shape::Choice(&[NONE]), Shape::Table(&RETRY)]),
            "When a request is sent again: never after a byte of the response, and only where nothing was sent or the method is idempotent.",
        ),
        Key::new(
            "outlier",
            Shape::Any(&[Shape::Choice(&[NONE]), Shape::Table(&OUTLIER)]),
            "When an instance that fails real requests is left out for a while.",
        ),
        Key::new("breaker", Shape::Table(&BREAKER), "Bounds on what may be under way at a time."),
        Key::new(
            "fallback",
            Shape::Any(&[Shape::Name, Shape::Table(&FALLBACK)]),
            "A service whose port answers while this one has no instance that could.",
        )
        .default("none"),
        Key::new(
            "trusted_proxies",
            Shape::Items(&Shape::Network),
            "Proxies in front, whose `X-Forwarded-*` and `Forwarded` are believed. Those on this machine always are.",
        )
        .default("none"),
    ]],
    habits: &[
        ("published", "write `port`"),
        ("target", "each instance gets a free port in its environment; delete this key"),
        ("ip", "write `host`"),
        ("address", "write `host`"),
        ("ssl", "write `tls`"),
        ("session", "write `sticky: {cookie: …}`"),
        ("retries", "write `retry: {attempts: …}`"),
        ("timeout", "write `timeouts: {response: …}`"),
        ("rate_limit", "write `limits: {requests_per_second: …}`"),
        ("circuit_breaker", "write `breaker`"),
        ("forwarded_headers", "write `trusted_proxies: [10.0.0.0/8]`"),
        ("trusted_ips", "write `trusted_proxies: [10.0.0.0/8]`"),
        ("real_ip", "write `trusted_proxies: [10.0.0.0/8]`"),
    ],
    later: &[],
    one_of: &[],
};

/// Word for a certificate of the development authority.
pub(crate) const DEVELOPMENT: &str = "development";
/// Word for the address of the client.
pub(crate) const CLIENT: &str = "client";
/// Word that turns something off.
pub(crate) const NONE: &str = "none";

pub(crate) static TLS: Table = Table {
    id: "tls",
    noun: "`tls`",
    doc: "Where the certificate comes from: two files, or the development authority of this machine.",
    keys: &[&[
        Key::new(
            "certificate",
            Shape::Template,
            "PEM file with the certificate and its chain. Read again when it changes.",
        ),
        Key::new("key", Shape::Template, "PEM file with the key."),
        Key::new(
            "names",
            Shape::List(&Shape::Text),
            "Names beside `localhost` for which the development authority issues a certificate.",
        ),
    ]],
    habits: &[("cert", "write `certificate`"), ("private_key", "write `key`"), ("hosts", "write `names`")],
    later: &[],
    one_of: &[],
};

pub(crate) static STICKY: Table = Table {
    id: "sticky",
    noun: "`sticky`",
    doc: "What a client is recognised by.",
    keys: &[&[
        Key::new("cookie", Shape::Text, "Value of this cookie; the proxy sets it where a client has none."),
        Key::new("header", Shape::Text, "Value of this header: a conversation, a session, a tenant."),
        Key::new("query", Shape::Text, "Value of this parameter of the query."),
    ]],
    habits: &[("ip", "write `sticky: client`")],
    later: &[],
    one_of: &["cookie", "header", "query"],
};

pub(crate) static REQUEST_LIMITS: Table = Table {
    id: "request-limits",
    noun: "`limits`",
    doc: "Bounds of requests.",
    keys: &[&[
        Key::new("body", Shape::Size, "Longest body of a request; a longer one is answered 413.").default("none"),
        Key::new(
            "requests_per_second",
            Shape::Integer(1, 10_000_000),
            "Requests of one client address per second; more are answered 429 with `Retry-After`.",
        )
        .default("none"),
    ]],
    habits: &[("rps", "write `requests_per_second`"), ("max_body_size", "write `body`")],
    later: &[],
    one_of: &[],
};

pub(crate) static TIMEOUTS: Table = Table {
    id: "timeouts",
    noun: "`timeouts`",
    doc: "Bounds of time of a request. `0` is no bound.",
    keys: &[&[
        Key::new(
            "first_byte",
            Shape::Duration,
            "From the choice of an instance to the head of its response; then 504.",
        )
        .default("0"),
        Key::new(
            "response",
            Shape::Duration,
            "From the choice of an instance to the end of the response, streams apart; then the response is cut.",
        )
        .default("0"),
        Key::new("idle", Shape::Duration, "Silence of a stream in both directions; then it is ended.")
            .default("1h")
            .from("our choice: slow first tokens are the rule where models answer"),
    ]],
    habits: &[
        ("request", "write `response`"),
        ("read", "write `first_byte` or `idle`"),
        ("connect", "an instance that does not accept is not ready; delete this key"),
    ],
    later: &[],
    one_of: &[],
};

pub(crate) static RETRY: Table = Table {
    id: "retry",
    noun: "`retry`",
    doc: "When a request is sent again.",
    keys: &[&[
        Key::new("attempts", Shape::Integer(0, 10), "Further tries of one request.").default("2").from(OURS),
        Key::new(
            "budget",
            Shape::Percentage,
            "Retries over ten seconds as a share of the requests, with at least ten; beyond that nothing is sent again.",
        )
        .default("20%")
        .from("as Finagle and Linkerd"),
    ]],
    habits: &[("max", "write `attempts`"), ("count", "write `attempts`")],
    later: &[],
    one_of: &[],
};

pub(crate) static OUTLIER: Table = Table {
    id: "outlier",
    noun: "`outlier`",
    doc: "An instance that fails real requests gets none for a while.",
    keys: &[&[
        Key::new("failures", Shape::Integer(1, 1_000), "Failures in a row: 5xx of the instance, broken connections.")
            .default("5")
            .from("as Envoy"),
        Key::new(
            "eject_for",
            Shape::Duration,
            "First time without requests; it grows by as much with every further one, up to ten times.",
        )
        .default("10s")
        .from(OURS),
        Key::new("max", Shape::Percentage, "Most instances that are left out at a time.").default("50%").from(OURS),
        Key::new("panic", Shape::Percentage, "With fewer instances than this in rotation nobody is left out.")
            .default("50%")
            .from("as Envoy"),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};

pub(crate) static BREAKER: Table = Table {
    id: "breaker",
    noun: "`breaker`",
    doc: "Bounds on what may be under way at a time.",
    keys: &[&[
        Key::new(
            "per_instance",
            Shape::Integer(1, 1_000_000),
            "Requests in flight to one instance; with all of them full, requests wait as they do without an instance.",
        )
        .default("none"),
        Key::new(
            "total",
            Shape::Integer(1, 1_000_000),
            "Requests in flight over this port; more are answered 503 with `Retry-After`.",
        )
        .default("none"),
    ]],
    habits: &[("max_requests", "write `total`"), ("max_connections", "write `per_instance`")],
    later: &[],
    one_of: &[],
};

pub(crate) static FALLBACK: Table = Table {
    id: "fallback",
    noun: "`fallback`",
    doc: "A published port of another service.",
    keys: &[&[
        Key::new("service", Shape::Name, "Service of this stack.").required(),
        Key::new("port", Shape::Name, "Its port.").default("the port of the same name, `http`, or the only port"),
    ]],
    habits: &[],
    later: &[],
    one_of: &[],
};
