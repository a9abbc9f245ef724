//! Addresses of servers elsewhere that are asked over HTTP: webhooks and Prometheus servers.
//!
//! A rollout finds out late that an address cannot be asked: at its step, in the middle of the night, and then it turns
//! back. So whatever can be known of the text is said when the file is read.

use std::net::Ipv6Addr;

use crate::yaml::cut;

/// Why a URL cannot be asked, in one clause; `None` if it can. `query`: whether one may follow the path.
pub(super) fn cannot_be_asked(url: &str, query: bool) -> Option<String> {
    let Some(rest) = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://")) else {
        return Some("it does not begin with `http://` or `https://`".to_owned());
    };
    if let Some(strange) = url.chars().find(|c| !c.is_ascii_graphic()) {
        let encoded: Vec<String> = strange.to_string().bytes().map(|byte| format!("%{byte:02X}")).collect();
        let encoded = encoded.concat();
        let strange = strange.escape_debug();
        return Some(format!("`{strange}` cannot be in it; in a path write `{encoded}`"));
    }
    if rest.contains('#') {
        return Some("what follows `#` is never sent".to_owned());
    }
    if rest.contains('?') && !query {
        return Some("it has a query of its own".to_owned());
    }
    let authority = &rest[..rest.find(['/', '?']).unwrap_or(rest.len())];
    if authority.contains('@') {
        return Some("a user or password in it is never sent".to_owned());
    }
    let (host, port) = match authority.rfind(']') {
        // A colon inside of the brackets belongs to the address.
        Some(end) => authority.split_at(end + 1),
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    if host.is_empty() {
        return Some("it names no host".to_owned());
    }
    if !is_host(host) {
        return Some(format!("`{}` is no host", cut(host)));
    }
    let number = port.strip_prefix(':').map(|port| port.parse::<u16>().ok().filter(|port| *port > 0));
    match (port, number) {
        ("", _) | (_, Some(Some(_))) => None,
        _ => Some(format!("`{}` is no port", cut(port.trim_start_matches(':')))),
    }
}

/// A name as a resolver takes it, an IPv4 address, or an IPv6 address in brackets.
fn is_host(host: &str) -> bool {
    if let Some(address) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return address.parse::<Ipv6Addr>().is_ok();
    }
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    host.len() <= 253 && host.strip_suffix('.').unwrap_or(host).split('.').all(label)
}

#[cfg(test)]
mod tests {
    use super::cannot_be_asked;

    #[test]
    fn what_can_be_asked_is_let_through() {
        for url in [
            "http://a",
            "https://a.example:8443/gate?x=1&y=%20",
            "http://127.0.0.1:9000",
            "http://[::1]:9000/x",
            "https://[fe80::1]",
            "http://prom_etheus.monitoring.svc.:9090/prefix",
            "http://a?x=1",
        ] {
            assert_eq!(cannot_be_asked(url, true), None, "{url}");
        }
    }

    #[test]
    fn what_cannot_is_told_why() {
        for (url, why) in [
            ("ftp://a", "does not begin"),
            ("HTTP://a", "does not begin"),
            ("http://", "no host"),
            ("https:///x", "no host"),
            ("http://:9090", "no host"),
            ("http://?x", "no host"),
            ("http://a b/", "` ` cannot be in it; in a path write `%20`"),
            ("http://a/ü", "write `%C3%BC`"),
            ("http://a\r\nX: y/", "`\\r` cannot"),
            ("http://a/x#y", "`#`"),
            ("http://u:p@a/", "password"),
            ("http://a:99999/", "`99999` is no port"),
            ("http://a:0", "`0` is no port"),
            ("http://a:b", "`b` is no port"),
            ("http://a:", "`` is no port"),
            ("http://a:1:2", "`1:2` is no port"),
            ("http://[::1/x", "`[` is no host"),
            ("http://[::1]x", "`x` is no port"),
            ("http://[::g]", "is no host"),
            ("http://a]", "is no host"),
            ("http://.:1", "is no host"),
            ("http://a..b", "is no host"),
        ] {
            let said = cannot_be_asked(url, true).unwrap_or_default();
            assert!(said.contains(why), "{url}: {said:?}");
        }
        assert!(cannot_be_asked(&format!("http://{}.a", "x".repeat(64)), true).is_some());
        assert!(cannot_be_asked("http://a/?x", false).unwrap().contains("query"));
    }
}
