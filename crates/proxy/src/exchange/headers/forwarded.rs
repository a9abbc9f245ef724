//! Reading `Forwarded` (RFC 7239), which a proxy in front may send instead of `X-Forwarded-*`.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, header, uri::Authority};

const PROTOCOLS: [&str; 2] = ["http", "https"];

/// What one proxy of the chain says of who asked it, and for what.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Element {
    /// As `X-Forwarded-For` has it: an address without a port, a name that hides one, or `unknown`.
    pub(super) node: String,
    pub(super) proto: Option<&'static str>,
    pub(super) host: Option<Authority>,
}

/// All elements in their order; `None` if there are none, or if they cannot be understood.
pub(super) fn read(headers: &HeaderMap) -> Option<Vec<Element>> {
    let mut elements = Vec::new();
    for line in headers.get_all(header::FORWARDED) {
        for element in split(line.to_str().ok()?, ',')? {
            // Lists may have empty elements (RFC 9110 5.6.1.2).
            if !element.is_empty() {
                elements.push(Element::read(element)?);
            }
        }
    }
    Some(elements).filter(|elements| !elements.is_empty())
}

/// Of a chain, the element that tells of the client: the last one whose node is no proxy that is trusted.
pub(super) fn of_client(elements: &[Element], trusts: impl Fn(IpAddr) -> bool) -> Option<&Element> {
    let trusted = |element: &&Element| element.node.parse().is_ok_and(&trusts);
    elements.iter().rev().find(|element| !trusted(element)).or(elements.first())
}

impl Element {
    fn read(text: &str) -> Option<Self> {
        let mut element = Self { node: "unknown".to_owned(), proto: None, host: None };
        for pair in split(text, ';')?.into_iter().filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=')?;
            let value = unquoted(value)?;
            match name.to_ascii_lowercase().as_str() {
                "for" => element.node = node(&value),
                "proto" => element.proto = PROTOCOLS.into_iter().find(|known| value.eq_ignore_ascii_case(known)),
                "host" => element.host = Authority::try_from(value).ok().filter(is_host),
                _ => {}
            }
        }
        Some(element)
    }
}

/// Whether it is one host, with a port or without.
fn is_host(authority: &Authority) -> bool {
    !authority.as_str().contains(['@', ',']) && super::has_sound_port(authority)
}

/// The parts between separators that stand in no quotes; `None` if a quote has no end.
fn split(text: &str, separator: char) -> Option<Vec<&str>> {
    let (mut parts, mut from, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            c if c == separator && !quoted => {
                parts.push(text[from..at].trim_ascii());
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(text[from..].trim_ascii());
    (!quoted).then_some(parts)
}

/// A token as it is, or what a quoted string says (RFC 9110 5.6.4).
fn unquoted(value: &str) -> Option<String> {
    let Some(inner) = value.strip_prefix('"') else {
        return value
            .bytes()
            .all(|b| b.is_ascii_graphic() && !b"\"\\(),/;<=>?@[]{}".contains(&b))
            .then(|| value.to_owned());
    };
    let mut said = String::new();
    let mut rest = inner.strip_suffix('"')?.chars();
    while let Some(c) = rest.next() {
        match c {
            '"' => return None,
            '\\' => said.push(rest.next()?),
            c => said.push(c),
        }
    }
    Some(said)
}

/// A node (RFC 7239 6) without its port.
fn node(value: &str) -> String {
    let bracketed = |text: &str| text.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let address = value.parse::<SocketAddr>().map(|socket| socket.ip()).ok();
    if let Some(address) = address.or_else(|| value.parse().ok()).or_else(|| bracketed(value)) {
        return address.to_string();
    }
    let name = value.split(':').next().unwrap_or_default();
    let hidden = name.starts_with('_') && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
    if hidden { name.to_owned() } else { "unknown".to_owned() }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn elements(lines: &[&str]) -> Option<Vec<Element>> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(header::FORWARDED, HeaderValue::from_str(line).unwrap());
        }
        read(&headers)
    }

    #[test]
    fn elements_are_read_as_the_rfc_has_them() {
        let read = |lines: &[&str]| {
            let all = elements(lines).unwrap();
            let text = |e: &Element| format!("{} {:?} {:?}", e.node, e.proto, e.host.as_ref().map(Authority::as_str));
            all.iter().map(text).collect::<Vec<_>>()
        };
        assert_eq!(read(&["for=192.0.2.60;proto=http;by=203.0.113.43"]), ["192.0.2.60 Some(\"http\") None"]);
        assert_eq!(
            read(&[r#"For="[2001:db8:cafe::17]:4711""#, "for=192.0.2.43:80, for=_hidden, for=\"_SEVKISEK:99\""]),
            ["2001:db8:cafe::17 None None", "192.0.2.43 None None", "_hidden None None", "_SEVKISEK None None"]
        );
        assert_eq!(
            read(&[r#"proto=HTTPS;host="a,b;c:1" , for=unknown;;host="shop.example:8080";x="q\"," ,"#]),
            [r#"unknown Some("https") None"#, r#"unknown None Some("shop.example:8080")"#]
        );
        assert_eq!(read(&[r#"for="a, b";proto=gopher;host="u@x""#]), ["unknown None None"]);
        for odd in ["", "for", "for=\"a", "for=a b", "for=\"a\"b", "for=a, =\"", "for=\"\\\""] {
            assert_eq!(elements(&[odd]), None, "{odd}");
        }
    }

    #[test]
    fn the_client_is_the_last_that_nobody_trusts() {
        let trusts = |ip: IpAddr| ip.is_loopback();
        let client = |line: &str| of_client(&elements(&[line]).unwrap(), trusts).unwrap().node.clone();
        assert_eq!(client("for=6.6.6.6, for=203.0.113.9, for=127.0.0.1"), "203.0.113.9");
        assert_eq!(client("for=6.6.6.6, for=_hidden"), "_hidden");
        assert_eq!(client("for=127.0.0.2, for=127.0.0.1"), "127.0.0.2");
    }

    proptest! {
        /// Whatever it says, a node is one element of a list, and nothing panics.
        #[test]
        fn a_node_says_nothing_but_itself(line in "[ -~]{0,60}") {
            for element in elements(&[&line, &format!("for=\"{}\"", line.replace(['"', '\\'], "")), "for=1.2.3.4"]).unwrap_or_default() {
                prop_assert!(element.node.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-:".contains(&b)), "{:?}", element);
            }
        }
    }
}
