//! The head of a response, and what it says of the body (RFC 9112 sections 4 to 6, 9.3).

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Version, header};
use httparse::{ParserConfig, Status};

/// Headers of a response.
const MAX_HEADERS: usize = 128;

/// How a body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Framing {
    /// So many bytes.
    Length(u64),
    Chunked,
    /// Everything until the connection ends.
    ToEnd,
}

/// A head.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) response: Response<()>,
    pub(super) framing: Framing,
    /// The connection may be used again after the body.
    pub(super) kept: bool,
    /// Bytes that it took.
    pub(super) length: usize,
}

/// What cannot be understood, in words.
pub(super) type Malformed = &'static str;

/// Reads a head; `None` if it is not whole yet. Values share the memory of `bytes`.
pub(super) fn parse(bytes: &Bytes, method: &Method) -> Result<Option<Parsed>, Malformed> {
    let mut headers = [MaybeUninit::uninit(); MAX_HEADERS];
    let mut head = httparse::Response::new(&mut []);
    let parsed = ParserConfig::default().parse_response_with_uninit_headers(&mut head, bytes, &mut headers);
    let length = match parsed {
        Ok(Status::Complete(length)) => length,
        Ok(Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err("its response has too many headers"),
        Err(_) => return Err("its response is not HTTP/1.1"),
    };
    let (code, reason) = (head.code.unwrap_or_default(), head.reason.unwrap_or_default());
    let status = StatusCode::from_u16(code).map_err(|_| "its response has no valid status")?;
    let mut response = Response::new(());
    *response.status_mut() = status;
    *response.version_mut() = if head.version == Some(1) { Version::HTTP_11 } else { Version::HTTP_10 };
    if Some(reason) != status.canonical_reason()
        && let Ok(reason) = hyper::ext::ReasonPhrase::try_from(reason.as_bytes())
    {
        response.extensions_mut().insert(reason);
    }
    let map = response.headers_mut();
    map.reserve(head.headers.len());
    for line in &*head.headers {
        let name = HeaderName::from_bytes(line.name.as_bytes()).map_err(|_| "its response has an invalid header")?;
        let value = HeaderValue::from_maybe_shared(bytes.slice_ref(line.value));
        map.append(name, value.map_err(|_| "its response has an invalid header")?);
    }
    let (framing, kept) = frame(&mut response, method)?;
    Ok(Some(Parsed { response, framing, kept, length }))
}

/// RFC 9112 section 6.3, in its order.
fn frame(response: &mut Response<()>, method: &Method) -> Result<(Framing, bool), Malformed> {
    let (status, version) = (response.status(), response.version());
    let headers = response.headers_mut();
    let kept = is_kept(headers, version);
    let bodiless = *method == Method::HEAD
        || status.is_informational()
        || status == StatusCode::NO_CONTENT
        || status == StatusCode::NOT_MODIFIED;
    if bodiless {
        // RFC 9110 section 8.6: these have none, and clients of HTTP/2 take one for an error.
        let never = status.is_informational() || status == StatusCode::NO_CONTENT;
        if headers.remove(header::TRANSFER_ENCODING).is_some() || never {
            headers.remove(header::CONTENT_LENGTH);
        }
        // That of a body that does not come goes on to the client.
        length(headers)?;
        return Ok((Framing::Length(0), kept));
    }
    let mut encodings = headers.get_all(header::TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next() {
        let chunked = encoding.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked");
        if !chunked || encodings.next().is_some() || version != Version::HTTP_11 {
            return Err("its response has a transfer encoding other than chunked");
        }
        // Whoever says both cannot be trusted with the boundary of the next response.
        let both = headers.remove(header::CONTENT_LENGTH).is_some();
        return Ok((Framing::Chunked, kept && !both));
    }
    match length(headers)? {
        Some(length) => Ok((Framing::Length(length), kept)),
        None => Ok((Framing::ToEnd, false)),
    }
}

/// The length that is announced. The same one several times becomes one.
fn length(headers: &mut HeaderMap) -> Result<Option<u64>, Malformed> {
    let (mut length, mut times) = (None, 0);
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for part in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
            let digits = !part.is_empty() && part.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(part).ok().filter(|_| digits).and_then(|part| part.parse::<u64>().ok());
            let number = number.ok_or("its response has an invalid length")?;
            if *length.get_or_insert(number) != number {
                return Err("its response has two lengths");
            }
            times += 1;
        }
    }
    if let Some(length) = length
        && times > 1
    {
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    }
    Ok(length)
}

/// RFC 9112 section 9.3.
fn is_kept(headers: &HeaderMap, version: Version) -> bool {
    let says = |word: &[u8]| {
        let values = headers.get_all(header::CONNECTION).iter();
        values.flat_map(|v| v.as_bytes().split(|b| *b == b',')).any(|v| v.trim_ascii().eq_ignore_ascii_case(word))
    };
    !says(b"close") && (version == Version::HTTP_11 || says(b"keep-alive"))
}

#[cfg(test)]
mod tests {
    use proptest::{collection, prelude::*, sample::select};

    use super::*;

    fn framed(method: &Method, head: &str) -> Result<(Framing, bool), Malformed> {
        let bytes = Bytes::from(head.replace('\n', "\r\n"));
        parse(&bytes, method).map(|parsed| {
            let parsed = parsed.expect("whole");
            assert_eq!(parsed.length, bytes.len());
            (parsed.framing, parsed.kept)
        })
    }

    #[test]
    fn the_body_is_framed_as_the_head_says() {
        let get = Method::GET;
        for (head, framing, kept) in [
            ("HTTP/1.1 200 OK\ncontent-length: 3\n\n", Framing::Length(3), true),
            ("HTTP/1.1 200 OK\nContent-Length: 3, 3\n\n", Framing::Length(3), true),
            ("HTTP/1.1 200 OK\ncontent-length: 3\ncontent-length: 3\n\n", Framing::Length(3), true),
            ("HTTP/1.1 200 OK\ncontent-length: 3\nconnection: x, Close\n\n", Framing::Length(3), false),
            ("HTTP/1.0 200 OK\ncontent-length: 3\n\n", Framing::Length(3), false),
            ("HTTP/1.0 200 OK\ncontent-length: 3\nconnection: keep-alive\n\n", Framing::Length(3), true),
            ("HTTP/1.1 200 OK\ntransfer-encoding: Chunked\n\n", Framing::Chunked, true),
            ("HTTP/1.1 200 OK\ntransfer-encoding: chunked\ncontent-length: 3\n\n", Framing::Chunked, false),
            ("HTTP/1.1 200 OK\n\n", Framing::ToEnd, false),
            ("HTTP/1.1 204 No Content\n\n", Framing::Length(0), true),
            ("HTTP/1.1 304 Not Modified\ncontent-length: 3\n\n", Framing::Length(0), true),
        ] {
            assert_eq!(framed(&get, head), Ok((framing, kept)), "{head}");
        }
        let head = "HTTP/1.1 200 OK\ncontent-length: 3\n\n";
        assert_eq!(framed(&Method::HEAD, head), Ok((Framing::Length(0), true)));
    }

    #[test]
    fn a_length_without_a_body_is_one_or_is_left_out() {
        let announced = |method: &Method, head: &str| {
            let bytes = Bytes::from(head.replace('\n', "\r\n"));
            let parsed = parse(&bytes, method)?.expect("whole");
            assert_eq!(parsed.framing, Framing::Length(0));
            let values = parsed.response.headers().get_all(header::CONTENT_LENGTH).iter();
            Ok::<_, Malformed>(values.map(|value| value.to_str().unwrap().to_owned()).collect::<Vec<_>>())
        };
        let (get, head) = (Method::GET, Method::HEAD);
        let none: [&str; 0] = [];
        assert_eq!(announced(&get, "HTTP/1.1 204 No Content\ncontent-length: 2\n\n").unwrap(), none);
        assert_eq!(announced(&head, "HTTP/1.1 204 No Content\ncontent-length: 0\n\n").unwrap(), none);
        assert_eq!(announced(&get, "HTTP/1.1 304 Not Modified\ncontent-length: 7\n\n").unwrap(), ["7"]);
        assert_eq!(announced(&head, "HTTP/1.1 200 OK\ncontent-length: 7\ncontent-length: 7\n\n").unwrap(), ["7"]);
        assert_eq!(announced(&head, "HTTP/1.1 200 OK\ncontent-length: 7, 7\n\n").unwrap(), ["7"]);
        let both = "HTTP/1.1 200 OK\ncontent-length: 7\ntransfer-encoding: chunked\n\n";
        assert_eq!(announced(&head, both).unwrap(), none);
        for odd in ["-2", "7\ncontent-length: 8", "x"] {
            let response = format!("HTTP/1.1 200 OK\ncontent-length: {odd}\n\n");
            assert!(announced(&head, &response).is_err(), "{odd}");
        }
    }

    #[test]
    fn what_could_mean_two_things_is_refused() {
        for head in [
            "HTTP/1.1 200 OK\ncontent-length: 3\ncontent-length: 4\n\n",
            "HTTP/1.1 200 OK\ncontent-length: 3, 4\n\n",
            "HTTP/1.1 200 OK\ncontent-length: +3\n\n",
            "HTTP/1.1 200 OK\ncontent-length: \n\n",
            "HTTP/1.1 200 OK\ncontent-length: 99999999999999999999\n\n",
            "HTTP/1.1 200 OK\ntransfer-encoding: gzip, chunked\n\n",
            "HTTP/1.1 200 OK\ntransfer-encoding: chunked\ntransfer-encoding: chunked\n\n",
            "HTTP/1.0 200 OK\ntransfer-encoding: chunked\n\n",
            "HTTP/1.1 200 OK\nx : 1\n\n",
            "HTTP/1.1 200 OK\nx: 1\n y\n\n",
            "HTTP/2 200 OK\n\n",
            "ICY 200 OK\n\n",
        ] {
            assert!(framed(&Method::GET, head).is_err(), "{head}");
        }
        let many = format!("HTTP/1.1 200 OK\n{}\n", "a: b\n".repeat(MAX_HEADERS + 1));
        assert_eq!(framed(&Method::GET, &many), Err("its response has too many headers"));
    }

    #[test]
    fn half_a_head_is_waited_for_and_an_odd_reason_is_kept() {
        let whole = Bytes::from_static(b"HTTP/1.1 200 Fine\r\na: 1\r\na: 2\r\n\r\nbody");
        for length in 0..whole.len() - 4 {
            assert!(parse(&whole.slice(..length), &Method::GET).unwrap().is_none(), "{length}");
        }
        let parsed = parse(&whole, &Method::GET).unwrap().unwrap();
        assert_eq!(parsed.length, whole.len() - 4);
        assert_eq!(parsed.response.headers().get_all("a").iter().count(), 2);
        let reason = parsed.response.extensions().get::<hyper::ext::ReasonPhrase>().unwrap();
        assert_eq!(reason.as_bytes(), b"Fine");
    }

    const PARTS: &[&str] = &[
        "HTTP/1.1 200 OK\r\n",
        "HTTP/1.0 404 \r\n",
        "HTTP/1.1 103 Early Hints\r\n",
        "HTTP/1.1 204\r\n",
        "\r\n",
        "\n",
        "\r",
        ":",
        " ",
        ",",
        "3",
        "content-length: 3\r\n",
        "Content-Length:",
        "transfer-encoding: chunked\r\n",
        "Transfer-Encoding:",
        "chunked",
        "connection: close\r\n",
        "x: y\r\n",
        "x",
        "\t",
        "\u{e9}",
    ];

    proptest! {
        /// More bytes never change what was understood, and never mend what was refused.
        #[test]
        fn a_head_is_understood_once(parts in collection::vec(select(PARTS), 0..16), get in any::<bool>()) {
            let bytes = Bytes::from(format!("HTTP/1.1 200 OK\r\n{}", parts.concat()));
            let method = if get { Method::GET } else { Method::HEAD };
            let mut known = None;
            for end in 0..=bytes.len() {
                let now = match parse(&bytes.slice(..end), &method) {
                    Ok(None) => None,
                    Ok(Some(parsed)) => {
                        prop_assert!(parsed.length <= end);
                        Some(Ok((parsed.framing, parsed.kept, parsed.length)))
                    }
                    Err(what) => Some(Err(what)),
                };
                prop_assert!(known.is_none() || now == known, "{known:?}, then {now:?}");
                known = now;
            }
        }
    }
}
