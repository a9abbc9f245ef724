//! What OFREP 0.3.0 asks of a server, request by request.

use orchestra_flags::{
    Compiled,
    ofrep::{MAX_BODY, Origins, Response, Served, Settings, change_event, is_ours},
};
use orchestra_model::{
    ReleaseNumber,
    flag::{Override, OverrideBy, OverrideServe},
    quantity::Timespan,
};
use serde_json::{Value, json};

use crate::{all, ask, body, flags, one, served};

/// Checks what the protocol's schema asks of a successful evaluation.
fn is_success(answer: &Value) {
    let fields = answer.as_object().unwrap();
    assert!(fields["key"].is_string() && fields["variant"].is_string(), "{answer}");
    let reason = fields["reason"].as_str().unwrap();
    assert!(["STATIC", "TARGETING_MATCH", "SPLIT", "DISABLED", "UNKNOWN"].contains(&reason), "{answer}");
    assert!(!fields.get("value").is_some_and(|value| value.is_null() || value.is_array()), "{answer}");
    for value in fields.get("metadata").and_then(Value::as_object).into_iter().flat_map(|metadata| metadata.values()) {
        assert!(value.is_boolean() || value.is_string() || value.is_number(), "{answer}");
    }
    assert!(
        fields.keys().all(|key| ["key", "value", "reason", "variant", "metadata"].contains(&key.as_str())),
        "{answer}"
    );
}

#[test]
fn one_flag() {
    let served = served(&flags());
    let response = one(&served, "banner", &json!({"targetingKey": "u", "email": "x@acme.example"}));
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    assert_eq!(
        body(&response),
        json!({"key": "banner", "value": "Happy holidays", "reason": "TARGETING_MATCH", "variant": "festive",
               "metadata": {"owner": "web", "ttl": 5, "beta": true, "orchestra.rule": "staff"}}),
        "what a flag says of itself cannot pass for what Orchestra says of it"
    );
    let values = [
        ("editor", json!({"key": "editor", "value": true, "reason": "STATIC", "variant": "on"})),
        ("old-search", json!({"key": "old-search", "value": false, "reason": "DISABLED", "variant": "off"})),
        (
            "limits",
            json!({"key": "limits", "value": {"tokens": 100, "tools": ["search"]}, "reason": "STATIC", "variant": "small"}),
        ),
        (
            "tenants",
            json!({"key": "tenants", "value": 1.0, "reason": "UNKNOWN", "variant": "low", "metadata": {"orchestra.reason": "DEFAULT"}}),
        ),
    ];
    for (key, expected) in values {
        let response = one(&served, key, &json!({}));
        assert_eq!((response.status, body(&response)), (200, expected.clone()));
        is_success(&expected);
    }
    // A number with a fraction stays one: typed clients look at how it is written.
    assert!(String::from_utf8(one(&served, "tenants", &json!({})).body).unwrap().contains("\"value\":1.0"));
    // The program's own default: no value.
    let code = body(&one(&served, "banner", &json!({"plan": "trial"})));
    assert!(code.get("value").is_none() && code["variant"] == "code", "{code}");
    is_success(&code);
    // The key may be escaped, and a query does not matter.
    assert_eq!(one(&served, "old%2Dsearch?x=1", &json!({})).status, 200);
}

#[test]
fn failures_of_one_flag() {
    let served = served(&flags());
    let failed = |response: Response| {
        let body = body(&response);
        assert!(body["errorDetails"].as_str().is_some_and(|details| !details.is_empty()), "{body}");
        assert_eq!(response.header("content-type"), Some("application/json"));
        (response.status, body["key"].as_str().unwrap().to_owned(), body["errorCode"].as_str().unwrap().to_owned())
    };
    let expect = |status: u16, key: &str, code: &str| (status, key.to_owned(), code.to_owned());
    assert_eq!(failed(one(&served, "nothing", &json!({}))), expect(404, "nothing", "FLAG_NOT_FOUND"));
    assert_eq!(failed(one(&served, "a%2Fb", &json!({}))), expect(404, "a/b", "FLAG_NOT_FOUND"));
    assert_eq!(failed(one(&served, "%ff", &json!({}))), expect(404, "", "FLAG_NOT_FOUND"));
    assert_eq!(failed(one(&served, "%4", &json!({}))), expect(404, "", "FLAG_NOT_FOUND"));
    assert_eq!(failed(one(&served, "replies", &json!({}))), expect(400, "replies", "TARGETING_KEY_MISSING"));
    assert_eq!(
        failed(one(&served, "tenants", &json!({"tenant": {"id": 1}}))),
        expect(400, "tenants", "INVALID_CONTEXT")
    );
    let raw = |body: &[u8]| failed(ask(&served, "POST", "/ofrep/v1/evaluate/flags/editor", &[], body));
    let deep = format!("{{\"context\":{}{}}}", "[".repeat(20_000), "]".repeat(20_000));
    for wrong in [&b""[..], b"{", b"\xff\xfe", b"{\"context\":{}} x", deep.as_bytes()] {
        assert_eq!(raw(wrong), expect(400, "editor", "PARSE_ERROR"), "{:?}", &wrong[..wrong.len().min(20)]);
    }
    for wrong in ["[]", "1", "{}", r#"{"context": null}"#, r#"{"context": []}"#, r#"{"context": {"targetingKey": 1}}"#]
    {
        assert_eq!(raw(wrong.as_bytes()), expect(400, "editor", "INVALID_CONTEXT"), "{wrong}");
    }
    let long = format!("{{\"context\":{{\"x\":\"{}\"}}}}", "x".repeat(MAX_BODY));
    let response = ask(&served, "POST", "/ofrep/v1/evaluate/flags/editor", &[], long.as_bytes());
    assert_eq!(response.status, 413);
    assert_eq!(ask(&served, "POST", "/ofrep/v1/evaluate/flags", &[], long.as_bytes()).status, 413);
}

#[test]
fn all_flags() {
    let served = served(&flags());
    let response = all(&served, &json!({"targetingKey": "u", "tenant": {"id": 1}}), &[]);
    assert_eq!(response.status, 200);
    let answers = body(&response);
    let keys: Vec<&str> = answers["flags"].as_array().unwrap().iter().map(|a| a["key"].as_str().unwrap()).collect();
    assert_eq!(keys, ["banner", "editor", "limits", "old-search", "replies", "tenants"]);
    for answer in answers["flags"].as_array().unwrap() {
        match answer.get("errorCode") {
            None => is_success(answer),
            Some(code) => {
                assert_eq!((code.as_str(), answer["key"].as_str()), (Some("INVALID_CONTEXT"), Some("tenants")));
            }
        }
    }
    assert_eq!(
        answers["eventStreams"],
        json!([{"type": "sse", "endpoint": {"requestUri": "/ofrep/v1/events"}}]),
        "exactly one of `url` and `endpoint`"
    );
    let failed = ask(&served, "POST", "/ofrep/v1/evaluate/flags", &[], b"{}");
    assert_eq!((failed.status, body(&failed)["errorCode"].as_str()), (400, Some("INVALID_CONTEXT")));
    assert!(body(&failed).get("key").is_none());
    assert_eq!(all(&served, &json!({"targetingKey": "u"}), &[]).status, 200);
    assert_eq!(ask(&served, "POST", "/ofrep/v1/evaluate/flags/", &[], b"{\"context\":{}}").status, 200);
    let none = crate::served(&orchestra_model::flag::FlagSet::default());
    assert_eq!(body(&all(&none, &json!({}), &[]))["flags"], json!([]));
}

#[test]
fn unchanged_answers_are_not_sent_again() {
    let context = json!({"targetingKey": "u"});
    let first = served(&flags());
    let etag = all(&first, &context, &[]).header("etag").unwrap().to_owned();
    assert!(etag.starts_with('"') && etag.ends_with('"'), "{etag}");
    let bare = etag.trim_matches('"').to_owned();
    for seen in [etag.clone(), format!("\"x\", {etag}"), format!("W/{etag}"), bare, "*".to_owned()] {
        let response = all(&first, &context, &[("if-none-match", &seen)]);
        assert_eq!(
            (response.status, response.body.len(), response.header("etag")),
            (304, 0, Some(etag.as_str())),
            "{seen}"
        );
    }
    assert_eq!(all(&first, &context, &[("if-none-match", "\"x\"")]).status, 200);
    // A list may come in several lines (RFC 9110, section 5.3).
    let lines = |last| [("if-none-match", "\"x\""), ("if-none-match", last)];
    assert_eq!(all(&first, &context, &lines(&etag)).status, 304);
    assert_eq!(all(&first, &context, &lines("\"y\"")).status, 200);
    // Another context is another answer, though the flags are the same.
    let other = json!({"targetingKey": "u", "email": "x@acme.example"});
    let staff = all(&first, &other, &[("if-none-match", &etag)]);
    assert_eq!(staff.status, 200);
    let staff = staff.header("etag").unwrap();
    // A change that concerns the context is one; a change that does not is none.
    let mut set = flags();
    set.flags.get_mut("editor").unwrap().enabled = false;
    assert_eq!(all(&served(&set), &context, &[("if-none-match", &etag)]).status, 200);
    let mut set = flags();
    set.flags.get_mut("banner").unwrap().rules.remove(0);
    assert_eq!(all(&served(&set), &context, &[("if-none-match", &etag)]).status, 304);
    assert_eq!(all(&served(&set), &other, &[("if-none-match", staff)]).status, 200);
}

#[test]
fn changes_are_announced() {
    let set = flags();
    let now = served(&set);
    let id = now.flags.digest().as_str()[..32].to_owned();
    let event = String::from_utf8(change_event(&now)).unwrap();
    let lines: Vec<&str> = event.lines().collect();
    assert_eq!(lines[..2], [&format!("id: {id}"), "event: message"]);
    let data: Value = serde_json::from_str(lines[2].strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(data, json!({"type": "refetchEvaluation", "etag": id, "lastModified": 1_771_622_898}));
    assert!(event.ends_with("\n\n") && lines[3].is_empty() && lines.len() == 4);

    let subscribe = |headers: &[(&str, &str)]| ask(&now, "GET", "/ofrep/v1/events", headers, b"");
    let first = subscribe(&[]);
    assert_eq!((first.status, first.follow, first.header("content-type")), (200, true, Some("text/event-stream")));
    let told = |response: &Response| String::from_utf8(response.body.clone()).unwrap().contains("refetchEvaluation");
    assert!(told(&first), "something may have changed before the subscription");
    assert!(!told(&subscribe(&[("last-event-id", &id)])), "it has seen this version");
    assert!(told(&subscribe(&[("last-event-id", "older")])), "it has missed a change");
    // The re-fetch names what it was told; that is not a condition.
    let query = format!("/ofrep/v1/evaluate/flags?flagConfigEtag={id}&flagConfigLastModified=1771622898");
    assert_eq!(ask(&now, "POST", &query, &[], b"{\"context\":{}}").status, 200);
}

#[test]
fn overrides_are_in_the_metadata() {
    let mut set = flags();
    let by = OverrideBy::Verdict { release: ReleaseNumber(7) };
    let over = Override { serve: OverrideServe::Off, by, reason: "5xx".to_owned(), since: 1_771_622_898_123 };
    set.overrides.insert("editor".parse().unwrap(), over.clone());
    set.overrides.insert("banner".parse().unwrap(), Override { by: OverrideBy::Person, ..over });
    let served = served(&set);
    let answer = body(&one(&served, "editor", &json!({})));
    is_success(&answer);
    assert_eq!(
        answer,
        json!({"key": "editor", "value": false, "reason": "DISABLED", "variant": "off", "metadata": {
            "orchestra.override": "verdict", "orchestra.override.release": 7, "orchestra.override.reason": "5xx",
            "orchestra.override.since": 1_771_622_898_123_u64}})
    );
    assert_eq!(body(&one(&served, "banner", &json!({})))["metadata"]["orchestra.override"], "person");
}

#[test]
fn a_key_is_asked_for_where_keys_are_set() {
    let keys = vec![Settings::digest_of_key("one"), Settings::digest_of_key("two")];
    let served = Served { settings: Settings { keys, ..Settings::default() }, ..served(&flags()) };
    let status = |headers: &[(&str, &str)]| all(&served, &json!({}), headers).status;
    assert_eq!(status(&[]), 401);
    assert_eq!(status(&[("authorization", "Bearer three")]), 401);
    assert_eq!(status(&[("authorization", "Basic one")]), 401);
    assert_eq!(status(&[("authorization", "Bearer one")]), 200);
    assert_eq!(status(&[("authorization", "bearer two")]), 200);
    assert_eq!(status(&[("x-api-key", "two")]), 200);
    assert_eq!(status(&[("x-api-key", "")]), 401);
    assert_eq!(ask(&served, "GET", "/ofrep/v1/events", &[], b"").status, 401);
    assert!(!format!("{served:?}").contains("two"), "keys are kept as digests");
}

#[test]
fn browsers_may_ask() {
    let page = ("origin", "http://localhost:8080");
    let preflight = [
        page,
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", "content-type, x-api-key"),
    ];
    let open = served(&flags());
    let response = ask(&open, "OPTIONS", "/ofrep/v1/evaluate/flags", &preflight, b"");
    assert_eq!(response.status, 204);
    assert_eq!(response.header("access-control-allow-origin"), Some("*"));
    assert_eq!(response.header("access-control-allow-headers"), Some("content-type, x-api-key"));
    assert!(response.header("access-control-allow-methods").unwrap().contains("POST"));
    let answer = all(&open, &json!({}), &[page]);
    assert_eq!(answer.header("access-control-allow-origin"), Some("*"));
    assert_eq!(answer.header("access-control-expose-headers"), Some("etag, retry-after"));
    assert_eq!(all(&open, &json!({}), &[]).header("access-control-allow-origin"), None);
    let forged = [page, preflight[1], ("access-control-request-headers", "x\r\nset-cookie: a")];
    let refused = ask(&open, "OPTIONS", "/ofrep/v1/evaluate/flags", &forged, b"");
    assert_eq!(refused.header("access-control-allow-headers"), None);

    let origins = Origins::Only(vec!["https://app.example.com".to_owned()]);
    let some = Served { settings: Settings { origins, ..Settings::default() }, ..open };
    let other = all(&some, &json!({}), &[page]);
    assert_eq!((other.header("access-control-allow-origin"), other.header("vary")), (None, Some("origin")));
    let app = all(&some, &json!({}), &[("origin", "https://app.example.com")]);
    assert_eq!(app.header("access-control-allow-origin"), Some("https://app.example.com"));
}

#[test]
fn other_requests_are_refused() {
    let served = served(&flags());
    for (method, path, status) in [
        ("GET", "/ofrep/v1/evaluate/flags", 405),
        ("PUT", "/ofrep/v1/evaluate/flags/editor", 405),
        ("POST", "/ofrep/v1/events", 405),
        ("POST", "/ofrep/v1/evaluate/flagsx", 404),
        ("POST", "/ofrep/v1/evaluate", 404),
        ("POST", "/", 404),
        ("GET", "", 404),
    ] {
        let response = ask(&served, method, path, &[], b"{\"context\":{}}");
        assert_eq!(response.status, status, "{method} {path}");
        assert!(body(&response)["errorDetails"].is_string());
        assert_eq!(response.header("allow").is_some(), status == 405, "{method} {path}");
    }
    assert!(is_ours("/ofrep/v1/evaluate/flags") && !is_ours("/ofrepx"));
}

#[test]
fn the_host_has_its_own_refusals() {
    let busy = Response::too_many_requests(Timespan::millis(1500));
    assert_eq!((busy.status, busy.header("retry-after")), (429, Some("2")));
    assert_eq!(Response::too_many_requests(Timespan::millis(0)).header("retry-after"), Some("1"));
    let broken = Response::internal_error();
    assert_eq!(broken.status, 500);
    assert!(body(&broken)["errorDetails"].is_string());
}

#[test]
fn the_prefix_is_in_the_address_of_events() {
    let settings = Settings {
        prefix: "/flags/demo/dev".to_owned(),
        environment: Some("demo/dev".parse().unwrap()),
        ..Settings::default()
    };
    let served = Served { flags: Compiled::new(&flags()), changed_at: 0, settings };
    let answer = body(&all(&served, &json!({}), &[]));
    assert_eq!(answer["eventStreams"][0]["endpoint"]["requestUri"], "/flags/demo/dev/ofrep/v1/events");
    assert_eq!(answer["metadata"], json!({"orchestra.environment": "demo/dev"}));
}
