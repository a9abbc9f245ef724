//! Which release a request is meant for: by what it asks for, by whom it comes from, or by chance.
//!
//! ```text
//!   a match of the split ──> canary arm                      │ not by chance: no evidence
//!   header or cookie names a release that is there ──> it    │
//!   sticky key ──> arm by hash of key and salt < share       │ by chance: evidence, as long as
//!   everything else ──> arm by a draw < share                │ both arms could have been chosen
//! ```
//!
//! An arm by hash is monotone: the hash of a client stays, the share grows, so whoever was on the canary stays there.
//! Within an arm a sticky client keeps its instance by rendezvous hashing (Thaler and Ravishankar 1998): of two tables
//! that differ in one instance, only the clients of that instance move.

use std::{
    cell::Cell,
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, SocketAddr},
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
};

use http::{HeaderMap, HeaderName, HeaderValue, header};
use orchestra_model::{
    id::ReleaseNumber,
    route::{Route, RouteId},
    traffic::{Arm, Permille, RELEASE_HEADER, RequestKey, RequestMatch},
};

use crate::{
    exchange::headers::{FORWARDED_FOR, Head},
    rules::Rules,
    table::RoutePlan,
};

/// The header that asks for a release and names the one that answered.
pub(crate) const RELEASE: HeaderName = HeaderName::from_static(RELEASE_HEADER);

/// How a route tells requests apart; routes on which nothing depends on the request have none.
#[derive(Debug)]
pub(crate) struct Steering {
    /// Share of the canary arm. `None`: by weights, whatever the arm.
    canary: Option<Permille>,
    salt: u64,
    matches: Vec<Match>,
    sticky: Option<RequestKey>,
    /// Cookie that carries the release, if clients are pinned.
    pin: Option<String>,
}

/// A condition on a request.
#[derive(Debug)]
struct Match {
    headers: Vec<(HeaderName, Vec<u8>)>,
    cookies: Vec<(String, String)>,
}

impl Match {
    /// `None` for one that no request can fulfil: without parts, or with a name that is none.
    fn new(wanted: &RequestMatch) -> Option<Self> {
        if wanted.headers.is_empty() && wanted.cookies.is_empty() {
            return None;
        }
        let header = |(name, value): (&String, &String)| {
            HeaderName::try_from(name.as_str()).ok().map(|name| (name, value.clone().into_bytes()))
        };
        let headers = wanted.headers.iter().map(header).collect::<Option<_>>()?;
        let cookies = wanted.cookies.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        Some(Self { headers, cookies })
    }

    fn holds(&self, head: &Head) -> bool {
        let header = |(name, wanted): &(HeaderName, Vec<u8>)| {
            if *name == header::HOST {
                return head.authority().as_bytes().eq_ignore_ascii_case(wanted);
            }
            head.headers().get_all(name).iter().any(|value| value.as_bytes() == wanted)
        };
        self.headers.iter().all(header)
            && self.cookies.iter().all(|(name, wanted)| cookie(head.headers(), name) == Some(wanted.as_bytes()))
    }
}

impl Steering {
    /// Of a route; `None` if nothing depends on the request.
    pub(crate) fn of(route: &Route) -> Option<Box<Self>> {
        let (split, policy) = (&route.split, &route.policy);
        let needed = split.canary.is_some()
            || split.watch.is_some()
            || !split.matches.is_empty()
            || policy.sticky.is_some()
            || policy.pin;
        needed.then(|| {
            Box::new(Self {
                canary: split.canary,
                salt: split.salt,
                matches: split.matches.iter().filter_map(Match::new).collect(),
                sticky: policy.sticky.clone(),
                pin: policy.pin.then(|| pin_cookie(&route.id)),
            })
        })
    }
}

/// Cookie that carries the release of a route. Cookies know no ports, and a machine has many: each route has its own.
pub(crate) fn pin_cookie(route: &RouteId) -> String {
    format!("orchestra-release-{:08x}", hash(route.to_string().as_bytes()) >> 32)
}

/// Where a request is meant to go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Way {
    /// Comes first, whatever its weight.
    pub(crate) release: Option<ReleaseNumber>,
    /// Comes next; the other arm is the last resort. `None`: all by weight.
    pub(crate) arm: Option<Arm>,
    /// Keeps to one instance.
    pub(crate) key: Option<u64>,
    /// Share of the canary arm with which chance decided; `None` if it did not.
    pub(crate) chance: Option<Permille>,
    /// Hash of what the client is recognised by; never 0.
    pub(crate) client: u64,
    /// Random bits, for what is still to be chosen.
    pub(crate) bits: u64,
    grant: Grant,
}

/// Cookies that the client is to get.
#[derive(Clone, Copy, Debug, Default)]
struct Grant {
    /// A new value of the sticky cookie.
    session: Option<u64>,
    pin: Pin,
}

/// Whether the client is told to keep to the release that answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Pin {
    #[default]
    No,
    Yes,
    /// Unless it does already.
    From(ReleaseNumber),
}

/// A request as far as its way depends on it. What is drawn for it once stays the same over all its attempts.
#[derive(Debug)]
pub(crate) struct Asker<'a> {
    /// `None` for a TCP connection.
    head: Option<&'a Head>,
    peer: SocketAddr,
    /// Value of a sticky cookie for a client that has none.
    session: Cell<Option<u64>>,
}

impl<'a> Asker<'a> {
    pub(crate) fn new(head: Option<&'a Head>, peer: SocketAddr) -> Self {
        Self { head, peer, session: Cell::new(None) }
    }

    /// Where this request is meant to go by this plan. Draws anew each time.
    pub(crate) fn way(&self, plan: &RoutePlan) -> Way {
        let mut way = Way {
            release: None,
            arm: None,
            key: None,
            chance: None,
            client: 1,
            bits: plan.shared.draw(),
            grant: Grant::default(),
        };
        let Some(steering) = plan.steering.as_deref() else { return way };
        let sticky = steering.sticky.as_ref().and_then(|key| self.sticky(key, &plan.rules, &mut way.grant));
        way.client = sticky.unwrap_or_else(|| self.connection(&plan.rules)).max(1);
        way.key = sticky;
        if self.head.is_some_and(|head| steering.matches.iter().any(|m| m.holds(head))) {
            way.arm = Some(Arm::Canary);
            return way;
        }
        if let Some(cookie_name) = &steering.pin
            && let Some(head) = self.head
        {
            let there = |release: &ReleaseNumber| plan.serves(*release);
            let asked = head.headers().get(RELEASE).and_then(|value| release(value.as_bytes()));
            if let Some(asked) = asked {
                way.release = Some(asked).filter(there);
            } else {
                let pinned = cookie(head.headers(), cookie_name).and_then(release);
                way.grant.pin = pinned.map_or(Pin::Yes, Pin::From);
                way.release = pinned.filter(there);
            }
        }
        let share = steering.canary;
        way.arm = share.map(|share| {
            let canary = match sticky {
                Some(key) => below_million(mix(key ^ mix(steering.salt))) < u32::from(share.get()) * 1000,
                None => below_million(plan.shared.draw()) < u32::from(share.get()) * 1000,
            };
            if canary { Arm::Canary } else { Arm::Stable }
        });
        if way.release.is_none() {
            let share = share.unwrap_or(plan.canary_weight);
            let possible = |arm, impossible| share == impossible || plan.is_usable(arm);
            let fair = possible(Arm::Canary, Permille::ZERO) && possible(Arm::Stable, Permille::ALL);
            way.chance = fair.then_some(share);
        }
        way
    }

    /// Hash of the sticky key; what a client lacks is granted.
    fn sticky(&self, key: &RequestKey, rules: &Rules, grant: &mut Grant) -> Option<u64> {
        match key {
            RequestKey::Cookie(name) => {
                let head = self.head?;
                if let Some(value) = cookie(head.headers(), name) {
                    return Some(hash(value));
                }
                let session = self.session.get().unwrap_or_else(random);
                self.session.set(Some(session));
                grant.session = Some(session);
                Some(hash(format!("{session:016x}").as_bytes()))
            }
            RequestKey::Header(name) if name == "host" => {
                self.head.map(|head| hash(head.authority().to_ascii_lowercase().as_bytes()))
            }
            RequestKey::Header(name) => self.head?.headers().get(name.as_str()).map(|value| hash(value.as_bytes())),
            RequestKey::Query(name) => parameter(self.head?.query()?, name).map(|value| hash(value.as_bytes())),
            RequestKey::Client => Some(self.forwarded(rules).map_or_else(|| address(self.peer.ip()), Told::key)),
        }
    }

    /// Hash of the client's address. On this machine all clients have the same one, so there each connection counts as
    /// a client, unless a proxy in front says whose request it is.
    fn connection(&self, rules: &Rules) -> u64 {
        self.forwarded(rules).map_or_else(
            || {
                let port = if self.peer.ip().to_canonical().is_loopback() { u64::from(self.peer.port()) } else { 0 };
                mix(address(self.peer.ip()) ^ port)
            },
            Told::key,
        )
    }

    /// Hash of the client whose requests are counted together: its address, of IPv6 the network (RFC 6177: a site has a
    /// /64 or more of them), or what a trusted proxy says.
    pub(crate) fn client(&self, rules: &Rules) -> u64 {
        match self.forwarded(rules).unwrap_or(Told::Address(self.peer.ip())) {
            Told::Address(ip) => match ip.to_canonical() {
                IpAddr::V6(ip) if !ip.is_loopback() => hash(&ip.octets()[..8]),
                ip => address(ip),
            },
            told @ Told::Name(_) => told.key(),
        }
    }

    /// What proxies in front say of the client: the last of the chain that is not one of them. The chain ends with the
    /// connection's own peer, and has more than that only if the peer is believed.
    fn forwarded(&self, rules: &Rules) -> Option<Told<'_>> {
        let chain = self.head?.headers().get(FORWARDED_FOR)?.as_bytes();
        let mut before = chain.rsplit(|byte| *byte == b',').skip(1).map(Told::read).peekable();
        loop {
            match before.next()? {
                Told::Address(ip) if before.peek().is_some() && rules.trusts(ip) => {}
                told => return Some(told),
            }
        }
    }
}

/// What a proxy says of who asked it.
#[derive(Clone, Copy, Debug)]
enum Told<'a> {
    Address(IpAddr),
    /// What is no address: `unknown`, a name of its own.
    Name(&'a [u8]),
}

impl<'a> Told<'a> {
    /// Of an element of `X-Forwarded-For`. Some proxies add the port.
    fn read(element: &'a [u8]) -> Self {
        let element = element.trim_ascii();
        let text = std::str::from_utf8(element).unwrap_or_default();
        let address = text.parse().ok().or_else(|| text.parse().ok().map(|socket: SocketAddr| socket.ip()));
        address.map_or(Self::Name(element), Self::Address)
    }

    fn key(self) -> u64 {
        match self {
            Self::Address(ip) => address(ip),
            Self::Name(name) => hash(name),
        }
    }
}

fn address(ip: IpAddr) -> u64 {
    match ip.to_canonical() {
        IpAddr::V4(ip) => hash(&ip.octets()),
        IpAddr::V6(ip) => hash(&ip.octets()),
    }
}

impl Way {
    /// Puts cookies and the release into the head of a response.
    pub(crate) fn mark(&self, plan: &RoutePlan, release: ReleaseNumber, name: &HeaderValue, headers: &mut HeaderMap) {
        headers.insert(RELEASE, name.clone());
        let Some(steering) = plan.steering.as_deref() else { return };
        if let (Some(session), Some(RequestKey::Cookie(name))) = (self.grant.session, &steering.sticky)
            && !sets(headers, name)
        {
            give(headers, &format!("{name}={session:016x}"));
        }
        if let Some(name) = &steering.pin
            && self.grant.pin != Pin::No
            && self.grant.pin != Pin::From(release)
        {
            give(headers, &format!("{name}={release}"));
        }
    }
}

/// Whether the instance sets a cookie of this name by itself.
fn sets(headers: &HeaderMap, name: &str) -> bool {
    let of_it = |value: &HeaderValue| value.as_bytes().split(|b| *b == b'=').next() == Some(name.as_bytes());
    headers.get_all(header::SET_COOKIE).iter().any(of_it)
}

fn give(headers: &mut HeaderMap, cookie: &str) {
    // A name that cannot be sent cannot be recognised either: such clients stay without.
    if let Ok(value) = HeaderValue::from_str(&format!("{cookie}; Path=/; HttpOnly; SameSite=Lax")) {
        headers.append(header::SET_COOKIE, value);
    }
}

fn release(text: &[u8]) -> Option<ReleaseNumber> {
    std::str::from_utf8(text).ok()?.trim().parse().ok().map(ReleaseNumber)
}

/// Value of a cookie (RFC 6265 4.2). Cookies were joined into one line before.
fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h [u8]> {
    let line = headers.get(header::COOKIE)?.as_bytes();
    line.split(|byte| *byte == b';')
        .find_map(|pair| pair.trim_ascii().strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

/// Value of a parameter of a query, as it was sent: the same client encodes it the same way.
fn parameter<'q>(query: &'q str, name: &str) -> Option<&'q str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

/// Spreads what is close together over all 64 bits (the finaliser of `SplitMix64`, Steele et al. 2014).
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// The same in every process and version: a client must find its instance again after the proxy was replaced
/// (FNV-1a, with a finaliser).
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    let fold = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3);
    mix(bytes.iter().fold(0xCBF2_9CE4_8422_2325, fold))
}

/// A number below a million; the bias is below one in ten million million.
pub(crate) fn below_million(bits: u64) -> u32 {
    u32::try_from((u128::from(bits) * 1_000_000) >> 64).expect("below a million")
}

/// Random bits that differ between processes and cannot be foretold from those before.
pub(crate) fn random() -> u64 {
    static STATE: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    static COUNT: AtomicU64 = AtomicU64::new(0);
    STATE.hash_one(COUNT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests;
