use std::collections::{BTreeMap, BTreeSet};

use http::{Request, Version};
use orchestra_model::{
    desired::{Drain, Protocol},
    quantity::Timespan,
    traffic::{PortPolicy, Split, Watch},
};

use super::*;
use crate::{state::Arrival, table, wire::SocketId};

/// A route with a stable arm of two instances and a canary arm of one.
fn plan(split: Split, policy: PortPolicy) -> RoutePlan {
    with(&[(Arm::Stable, 2, 2), (Arm::Canary, 1, 1)], split, policy)
}

fn with(backends: &[(Arm, u32, u32)], split: Split, policy: PortPolicy) -> RoutePlan {
    let mut plan = table::tests::plan(backends);
    let seconds = Timespan::seconds(1);
    let route = Route {
        id: plan.id.clone(),
        listen: ([127, 0, 0, 1], 1).into(),
        protocol: Protocol::Http,
        hold: seconds,
        hold_limit: 1,
        drain: Drain { requests: seconds, streams: seconds },
        policy,
        split,
        metered: false,
        backends: vec![],
        flags: None,
    };
    plan.steering = Steering::of(&route);
    plan
}

fn head(peer: &str, uri: &str, headers: &[(&str, &str)]) -> Head {
    let mut builder = Request::builder().version(Version::HTTP_11).uri(uri).header("host", "shop.example");
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    let arrival = Arrival {
        socket: SocketId(0),
        peer: peer.parse().unwrap(),
        local: "127.0.0.1:80".parse().unwrap(),
        secure: false,
    };
    crate::exchange::headers::prepare(&mut builder.body(()).unwrap(), &arrival, |peer| {
        Rules::new(&trusting(), None).trusts(peer)
    })
    .unwrap()
}

/// A port behind proxies of these networks.
fn trusting() -> PortPolicy {
    let trusted_proxies = vec!["10.0.0.0/8".parse().unwrap(), "2001:db8:1::/48".parse().unwrap()];
    PortPolicy { trusted_proxies, ..PortPolicy::default() }
}

fn way(plan: &RoutePlan, headers: &[(&str, &str)]) -> Way {
    Asker::new(Some(&head("192.0.2.1:5", "/", headers)), "192.0.2.1:5".parse().unwrap()).way(plan)
}

fn share(thousandths: u16) -> Split {
    Split { canary: Some(Permille::new(thousandths)), salt: 4, ..Split::default() }
}

fn sticky(key: RequestKey) -> PortPolicy {
    PortPolicy { sticky: Some(key), ..PortPolicy::default() }
}

#[test]
fn nothing_is_looked_at_where_nothing_depends_on_it() {
    let plan = plan(Split::default(), PortPolicy::default());
    assert!(plan.steering.is_none());
    let way = way(&plan, &[("cookie", "a=b"), ("orchestra-release", "2")]);
    assert_eq!((way.release, way.arm, way.key, way.chance), (None, None, None, None));
}

/// The share of draws is within five standard deviations of what is stated, for every kind of share.
#[test]
fn chance_keeps_to_the_share() {
    for thousandths in [0_u16, 1, 7, 50, 250, 500, 999, 1000] {
        let plan = plan(share(thousandths), PortPolicy::default());
        let draws = 200_000_u32;
        let mut canary = 0_u32;
        let head = head("192.0.2.1:5", "/", &[]);
        let asker = Asker::new(Some(&head), "192.0.2.1:5".parse().unwrap());
        for _ in 0..draws {
            let way = asker.way(&plan);
            assert_eq!(way.chance, Some(Permille::new(thousandths)));
            canary += u32::from(way.arm == Some(Arm::Canary));
        }
        let p = f64::from(thousandths) / 1000.0;
        let deviation = (f64::from(draws) * p * (1.0 - p)).sqrt();
        assert!((f64::from(canary) - f64::from(draws) * p).abs() <= 5.0 * deviation, "{thousandths}: {canary}");
    }
}

#[test]
fn draws_differ_between_processes() {
    let (one, other) = (table::RouteShared::default(), table::RouteShared::default());
    assert_ne!((one.draw(), one.draw()), (other.draw(), other.draw()));
    let drawn: BTreeSet<u64> = (0..1000).map(|_| one.draw()).collect();
    assert_eq!(drawn.len(), 1000);
}

/// Law: whoever is on the canary at some share is on it at every larger one.
#[test]
fn sticky_clients_stay_on_the_canary_as_its_share_grows() {
    let policy = || sticky(RequestKey::Header("x-session".into()));
    let mut before: BTreeSet<u32> = BTreeSet::new();
    for thousandths in [0, 1, 50, 250, 500, 1000] {
        let plan = plan(share(thousandths), policy());
        let on: BTreeSet<u32> = (0..20_000)
            .filter(|session| way(&plan, &[("x-session", &format!("user-{session}"))]).arm == Some(Arm::Canary))
            .collect();
        assert!(before.is_subset(&on), "{thousandths}");
        let (expected, p) = (f64::from(thousandths) * 20.0, f64::from(thousandths) / 1000.0);
        let off = (f64::from(u32::try_from(on.len()).unwrap()) - expected).abs();
        assert!(off <= 5.0 * (20_000.0 * p * (1.0 - p)).sqrt(), "{thousandths}: {}", on.len());
        before = on;
    }
    // Another rollout draws others.
    let again = plan(Split { salt: 5, ..share(500) }, policy());
    let first = plan(share(500), policy());
    let same = |session: &u32| {
        let headers = [("x-session", &*format!("user-{session}"))];
        way(&again, &headers).arm == way(&first, &headers).arm
    };
    let same = (0..10_000).filter(same).count();
    assert!((4_750..5_250).contains(&same), "{same}");
}

#[test]
fn matches_lead_to_the_canary_and_are_no_evidence() {
    let condition = |headers: &[(&str, &str)], cookies: &[(&str, &str)]| {
        let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        RequestMatch { headers: map(headers), cookies: map(cookies) }
    };
    let matches = vec![
        condition(&[("x-test", "1"), ("x-team", "blue")], &[]),
        condition(&[], &[("beta", "yes")]),
        condition(&[("host", "beta.example")], &[]),
        // Says nothing, and so matches nothing; names what no request can have.
        condition(&[], &[]),
        condition(&[("no header", "1")], &[]),
    ];
    let plan = plan(Split { matches, ..share(0) }, PortPolicy::default());
    let arm = |headers: &[(&str, &str)]| {
        let way = way(&plan, headers);
        assert_eq!(way.chance.is_some(), way.arm == Some(Arm::Stable));
        way.arm.unwrap()
    };
    assert_eq!(arm(&[("x-test", "1"), ("x-team", "blue")]), Arm::Canary);
    assert_eq!(arm(&[("x-test", "1")]), Arm::Stable);
    assert_eq!(arm(&[("cookie", "a=1; beta=yes; c=2")]), Arm::Canary);
    assert_eq!(arm(&[("cookie", "beta=yes2; xbeta=yes")]), Arm::Stable);
    assert_eq!(arm(&[]), Arm::Stable);
}

#[test]
fn an_arm_that_cannot_be_had_makes_the_rest_no_evidence() {
    let (stable, canary) = ((Arm::Stable, 1, 1), (Arm::Canary, 1, 1));
    let chance = |backends: &[(Arm, u32, u32)], thousandths| {
        way(&with(backends, share(thousandths), PortPolicy::default()), &[]).chance
    };
    assert_eq!(chance(&[stable, canary], 200), Some(Permille::new(200)));
    assert_eq!(chance(&[stable], 200), None);
    assert_eq!(chance(&[canary], 200), None);
    assert_eq!(chance(&[stable, (Arm::Canary, 0, 1)], 200), None);
    // Nobody was to go to the arm that is not there.
    assert_eq!(chance(&[stable], 0), Some(Permille::ZERO));
    assert_eq!(chance(&[canary], 1000), Some(Permille::ALL));
}

#[test]
fn every_kind_of_key_is_recognised() {
    let keyed = |key: RequestKey, peer: &str, uri: &str, headers: &[(&str, &str)]| {
        let plan = plan(share(500), sticky(key));
        let head = head(peer, uri, headers);
        let way = Asker::new(Some(&head), peer.parse().unwrap()).way(&plan);
        assert!(way.key.is_none_or(|key| key.max(1) == way.client));
        way.key
    };
    let near = "127.0.0.1:1234";
    let header = || RequestKey::Header("x-session".into());
    let a = keyed(header(), near, "/", &[("x-session", "a")]);
    assert!(a.is_some() && a == keyed(header(), "192.0.2.1:9", "/?q=1", &[("x-session", "a"), ("x", "y")]));
    assert_ne!(a, keyed(header(), near, "/", &[("x-session", "b")]));
    assert_eq!(keyed(header(), near, "/", &[]), None);
    // The host is no header any more when a key is looked for.
    let host = || RequestKey::Header("host".into());
    assert!(keyed(host(), near, "/", &[]).is_some());
    assert_ne!(keyed(host(), near, "http://Shop.example/", &[]), keyed(host(), near, "http://other.example/", &[]));
    let query = || RequestKey::Query("user".into());
    assert_eq!(keyed(query(), near, "/x?a=1&user=a&b=2", &[]), a);
    assert_eq!(keyed(query(), near, "/x?xuser=a", &[]), None);
    let cookie = || RequestKey::Cookie("sid".into());
    assert_eq!(keyed(cookie(), near, "/", &[("cookie", "x=1; sid=a")]), a);
    assert!(keyed(cookie(), near, "/", &[]).is_some_and(|granted| Some(granted) != a));
    // Addresses: the port does not matter, what a proxy on this machine says does, what others say does not.
    let client = || RequestKey::Client;
    let far = keyed(client(), "192.0.2.1:1", "/", &[]);
    assert_eq!(far, keyed(client(), "192.0.2.1:2", "/", &[("x-forwarded-for", "198.51.100.7")]));
    assert_eq!(far, keyed(client(), near, "/", &[("x-forwarded-for", "10.0.0.1, 192.0.2.1")]));
    let told = |chain| keyed(client(), near, "/", &[("x-forwarded-for", chain)]);
    assert_eq!(told("198.51.100.7"), told("10.0.0.1, 198.51.100.7"));
    assert_ne!(told("198.51.100.7"), told("198.51.100.8"));
}

#[test]
fn a_client_without_a_cookie_gets_one_and_keeps_its_way() {
    let plan = plan(share(300), PortPolicy { pin: true, ..sticky(RequestKey::Cookie("sid".into())) });
    let release = |arm: Option<Arm>| ReleaseNumber(if arm == Some(Arm::Canary) { 2 } else { 1 });
    let name = HeaderValue::from_static("1");
    for _ in 0..200 {
        let head = head("192.0.2.1:5", "/", &[]);
        let asker = Asker::new(Some(&head), "192.0.2.1:5".parse().unwrap());
        let first = asker.way(&plan);
        // Drawn anew, as after a wait: the same.
        assert_eq!((asker.way(&plan).arm, asker.way(&plan).key), (first.arm, first.key));
        let mut headers = HeaderMap::new();
        first.mark(&plan, release(first.arm), &name, &mut headers);
        let set: Vec<&str> = headers.get_all("set-cookie").iter().map(|v| v.to_str().unwrap()).collect();
        assert_eq!(set.len(), 2, "{set:?}");
        assert!(set.iter().all(|cookie| cookie.ends_with("; Path=/; HttpOnly; SameSite=Lax")), "{set:?}");
        let line: Vec<&str> = set.iter().map(|cookie| cookie.split(';').next().unwrap()).collect();
        let next = way(&plan, &[("cookie", &line.join("; "))]);
        assert_eq!((next.arm, next.key, next.client), (first.arm, first.key, first.client));
        assert_eq!((next.release, next.chance), (Some(release(first.arm)), None));
        let mut headers = HeaderMap::new();
        next.mark(&plan, release(first.arm), &name, &mut headers);
        assert_eq!((headers.len(), &headers["orchestra-release"]), (1, &name));
    }
    // A cookie that the instance sets itself is left alone.
    let mut headers = HeaderMap::new();
    headers.insert("set-cookie", "sid=own; Path=/".parse().unwrap());
    way(&plan, &[("orchestra-release", "1")]).mark(&plan, ReleaseNumber(1), &name, &mut headers);
    assert_eq!(headers.get_all("set-cookie").iter().count(), 1);
}

#[test]
fn a_pin_holds_while_the_release_is_there() {
    let pinned = PortPolicy { pin: true, ..PortPolicy::default() };
    let name = pin_cookie(&plan(Split::default(), PortPolicy::default()).id);
    let cookie = |release: &str| format!("{name}={release}");
    // The old set is warm, without weight.
    let warm = with(&[(Arm::Canary, 1, 1), (Arm::Stable, 0, 1)], share(1000), pinned.clone());
    let to = |plan: &RoutePlan, headers: &[(&str, &str)]| {
        let way = way(plan, headers);
        plan.choose(&way, &[]).map(|choice| plan.backends[choice.backend].release.0)
    };
    assert_eq!(to(&warm, &[("cookie", &cookie("2"))]), Some(2));
    assert_eq!(to(&warm, &[("orchestra-release", "2")]), Some(2));
    assert_eq!(to(&warm, &[("cookie", &cookie("2")), ("orchestra-release", "1")]), Some(1));
    assert_eq!(to(&warm, &[]), Some(1));
    for nonsense in ["", "x", "-1", "99999999999999999999999", "7"] {
        assert_eq!(to(&warm, &[("cookie", &cookie(nonsense))]), Some(1), "{nonsense}");
        assert_eq!(to(&warm, &[("orchestra-release", nonsense)]), Some(1), "{nonsense}");
    }
    // Gone: a new choice, by chance again, and the cookie is replaced.
    let gone = with(&[(Arm::Canary, 1, 1)], share(1000), pinned);
    let way = way(&gone, &[("cookie", &cookie("2"))]);
    assert_eq!((way.release, way.chance), (None, Some(Permille::ALL)));
    let mut headers = HeaderMap::new();
    way.mark(&gone, ReleaseNumber(1), &HeaderValue::from_static("1"), &mut headers);
    assert!(headers["set-cookie"].to_str().unwrap().starts_with(&cookie("1")));
    // Without skew protection the header asks in vain.
    let free = with(&[(Arm::Canary, 1, 1), (Arm::Stable, 0, 1)], share(1000), PortPolicy::default());
    assert_eq!(to(&free, &[("orchestra-release", "2")]), Some(1));
}

#[test]
fn clients_are_told_apart() {
    let watch = Watch { id: 1, every: Timespan::seconds(1), slow: None, first_byte: None, first_token: None };
    let plan = plan(Split { watch: Some(watch), ..Split::default() }, PortPolicy::default());
    let client = |peer: &str, headers: &[(&str, &str)]| {
        Asker::new(Some(&head(peer, "/", headers)), peer.parse().unwrap()).way(&plan).client
    };
    assert_eq!(client("192.0.2.1:1", &[]), client("192.0.2.1:2", &[]));
    assert_ne!(client("192.0.2.1:1", &[]), client("192.0.2.2:1", &[]));
    // On this machine a connection is a client, unless somebody says better.
    assert_ne!(client("127.0.0.1:1", &[]), client("127.0.0.1:2", &[]));
    assert_eq!(client("127.0.0.1:1", &[]), client("127.0.0.1:1", &[]));
    let told = [("x-forwarded-for", "192.0.2.1")];
    assert_eq!(client("127.0.0.1:1", &told), client("127.0.0.1:2", &told));
}

#[test]
fn the_client_is_who_asked_the_first_trusted_proxy() {
    let policy = PortPolicy { sticky: Some(RequestKey::Client), ..trusting() };
    let mut plan = plan(share(500), policy.clone());
    plan.rules = Rules::new(&policy, None);
    let key = |chain: &str| {
        let head = head("10.0.0.1:5", "/", &[("x-forwarded-for", chain)]);
        let asker = Asker::new(Some(&head), "10.0.0.1:5".parse().unwrap());
        (asker.way(&plan).key.unwrap(), asker.client(&plan.rules))
    };
    let client = key("203.0.113.9");
    for chain in [
        "203.0.113.9, 10.9.9.9",
        "198.51.100.1, 203.0.113.9, 10.9.9.9, 127.0.0.1, 2001:db8:1::7",
        "203.0.113.9:4711, 10.9.9.9:80",
        "::ffff:203.0.113.9",
        "10.0.0.7, 203.0.113.9",
    ] {
        assert_eq!(key(chain), client, "{chain}");
    }
    assert_ne!(key("203.0.113.9, 198.51.100.1"), client, "whom nobody trusts is the client, whatever it says");
    assert_ne!(key("10.9.9.8, 10.9.9.9"), key("10.9.9.7, 10.9.9.9"), "a client among the proxies is still one");
    assert_eq!(key("2001:db8:2::1").1, key("2001:db8:2::2").1, "one site");
    assert_ne!(key("2001:db8:2::1").0, key("2001:db8:2::2").0, "and two clients");
    assert_ne!(key("unknown"), key("_hidden"));
    // A peer that is itself no proxy, of which nothing is believed.
    let head = head("10.0.0.1:5", "/", &[]);
    let direct = |peer: &str| Asker::new(Some(&head), peer.parse().unwrap()).way(&plan).key;
    assert_eq!(direct("203.0.113.9:5"), Some(client.0));
}
