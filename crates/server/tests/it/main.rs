//! The handlers without a control plane behind them: every operation of the table is served, and what needs no server
//! works without one.

use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::BodyExt;
use orchestra_api::{Client, Endpoint, Method, ROUTES, SocketTransport, Transport};
use orchestra_server::{Backend, Facts, InProcess, router, serve_tcp};
use orchestra_task::TaskTree;
use serde_json::{Value, json};

fn server() -> InProcess {
    InProcess::new(routes())
}

fn routes() -> axum::Router {
    let facts = Facts {
        version: "0.0.0".to_owned(),
        home: "/nowhere".to_owned(),
        volumes: "/nowhere/volumes".to_owned(),
        listen: None,
        started_at: 0,
    };
    router(Backend::Recorded(None), facts, TaskTree::new(), Arc::default())
}

async fn ask(method: &str, path: &str, body: &Value) -> (StatusCode, Value) {
    let body = if body.is_null() { Bytes::new() } else { Bytes::from(body.to_string()) };
    let request =
        Request::builder().method(method).uri(path).header("content-type", "application/json").body(body).unwrap();
    let response = server().send(request).await.unwrap();
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
}

fn stack(text: &str) -> Value {
    json!({"source_path": "/stack/orchestra.yaml", "source_text": text, "display_path": "orchestra.yaml"})
}

#[tokio::test]
async fn every_operation_of_the_table_is_served() {
    for route in ROUTES {
        let path = route
            .path
            .replace("{stack}", "demo")
            .replace("{environment}", "dev")
            .replace("{run}", "run_1")
            .replace("{release}", "1");
        let method = match route.method {
            Method::Get => "GET",
            Method::Post => "POST",
        };
        let (status, answer) = ask(method, &path, &Value::Null).await;
        let message = answer["errors"][0]["message"].as_str().unwrap_or_default();
        assert!(!message.contains("operation"), "{method} {path} is not served: {message}");
        assert_ne!(status, StatusCode::METHOD_NOT_ALLOWED, "{method} {path}");
        if status.is_client_error() || status.is_server_error() {
            assert!(answer["errors"][0]["code"].as_str().unwrap().starts_with("ORC"), "{method} {path}: {answer}");
        }
    }
    let (status, answer) = ask("GET", "/v1/nothing", &Value::Null).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(answer["errors"][0]["code"], "ORC0405");
    assert_eq!(ask("DELETE", "/v1/runs", &Value::Null).await.0, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn validate_and_plan_need_no_server() {
    let good = stack("{version: 1, name: demo, services: {api: {command: [run]}}}");
    let (status, answer) = ask("POST", "/v1/validate", &good).await;
    assert_eq!((status, &answer["environment"]), (StatusCode::OK, &json!("demo/dev")));
    let (status, answer) = ask("POST", "/v1/plan", &json!({"up": good})).await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer["plan"]["steps"][0]["action"], "create");
    let (status, answer) = ask("POST", "/v1/runs", &json!({"up": {"source": good}})).await;
    assert_eq!((status, &answer["errors"][0]["code"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("ORC0801")));
}

#[tokio::test]
async fn what_is_wrong_is_said_as_diagnostics() {
    let (status, answer) = ask("POST", "/v1/validate", &stack("{version: 1, name: demo, servises: {}}")).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let error = &answer["errors"][0];
    assert_eq!(
        (&error["code"], &error["labels"][0]["location"]["file"]),
        (&json!("ORC0201"), &json!("orchestra.yaml"))
    );
}

#[tokio::test]
async fn what_only_a_preview_would_get_wrong_is_found_without_environments() {
    let text = "\
version: 1
name: demo
services: {api: {command: [run]}}
previews: {services: {api: {replicaas: 1}}}
";
    let (status, answer) = ask("POST", "/v1/validate?all=true", &stack(text)).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let errors = answer["errors"].as_array().unwrap();
    assert_eq!((errors.len(), &errors[0]["code"]), (1, &json!("ORC0201")), "{answer}");
    assert_eq!(errors[0]["notes"], json!(["in a preview of `dev`"]));
    let good = text.replace("replicaas", "replicas");
    let (status, answer) = ask("POST", "/v1/validate?all=true", &stack(&good)).await;
    assert_eq!((status, answer["others"].as_array().map_or(0, Vec::len)), (StatusCode::OK, 0), "{answer}");
}

#[tokio::test]
async fn every_environment_is_validated_if_all_are_asked_for() {
    let text = "\
version: 1
name: demo
services: {api: {command: [run], replicas: 2}}
environments:
  dev: {}
  large: {services: {api: {replicas: 20}, extra: {command: [extra]}}}
  later: {target: kubernetes, namespace: x}
";
    let (status, answer) = ask("POST", "/v1/validate?all=true", &stack(text)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    assert_eq!(answer["environment"], "demo/dev");
    assert_eq!(answer["others"].as_array().unwrap().len(), 1, "{answer}");
    assert_eq!(answer["others"][0]["environment"], "demo/large");
    assert_eq!(answer["others"][0]["resources"][0]["names"], json!(["api", "extra"]));
    let warnings = answer["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 1, "{answer}");
    assert!(warnings[0]["message"].as_str().unwrap().contains("kubernetes"), "{answer}");
    // The one that is meant is in order; a mistake elsewhere is one all the same, and says where it is.
    let broken = text.replace("replicas: 20", "replicas: many");
    let (status, answer) = ask("POST", "/v1/validate?all=true", &stack(&broken)).await;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    let errors = answer["errors"].as_array().unwrap();
    assert_eq!((errors.len(), &errors[0]["labels"][0]["location"]["line"]), (1, &json!(6)), "{answer}");
    assert!(errors[0]["notes"].to_string().contains("in the environment `large`"), "{answer}");
    assert_eq!(ask("POST", "/v1/validate", &stack(&broken)).await.0, StatusCode::OK, "only the one that is meant");
    // What is wrong everywhere is said once.
    let broken = text.replace("replicas: 2}", "replicas: two}");
    let (_, answer) = ask("POST", "/v1/validate?all=true", &stack(&broken)).await;
    assert_eq!(answer["errors"].as_array().unwrap().len(), 1, "{answer}");
}

/// One request, exactly as it is sent.
async fn send(method: &str, path: &str, media: Option<&str>, body: &str) -> String {
    let request = Request::builder().method(method).uri(path);
    let request = media.into_iter().fold(request, |request, media| request.header("content-type", media));
    let response = server().send(request.body(Bytes::from(body.to_owned())).unwrap()).await.unwrap();
    let status = response.status();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let answer: orchestra_api::ErrorBody = serde_json::from_slice(&bytes)
        .unwrap_or_else(|error| panic!("{method} {path} {body:?}: {error}: {}", String::from_utf8_lossy(&bytes)));
    for error in &answer.errors {
        assert!(error.help.is_some(), "{error}");
    }
    format!("{}\n{}", status.as_u16(), orchestra_spec::render_text(&answer.errors, false))
}

#[tokio::test]
async fn requests_that_cannot_be_understood_are_answered_in_the_shape_of_every_error() {
    const JSON: Option<&str> = Some("application/json; charset=utf-8");
    let events = "/v1/environments/demo/dev/events";
    let mut page = String::new();
    for (method, path, media, body) in [
        ("POST", "/v1/plan", None, "{}"),
        ("POST", "/v1/plan", Some("application/x-www-form-urlencoded"), "{}"),
        ("POST", "/v1/plan", JSON, ""),
        ("POST", "/v1/plan", JSON, "{\"up\": {\n  \"source_path\": /srv}}"),
        ("POST", "/v1/plan", JSON, "{\"sideways\": {}}"),
        ("POST", "/v1/plan", JSON, "{\"up\": {\"source_path\": \"/srv/orchestra.yaml\"}}"),
        ("POST", "/v1/plan", JSON, "{\"down\": {\"environment\": \"Demo\"}}"),
        ("POST", "/v1/validate", JSON, "{\"source_path\": \"/a\", \"source_text\": \"\"} {}"),
        ("POST", "/v1/validate", JSON, "[1, 2, 3"),
        ("GET", &format!("{events}?follow=true&tail=many"), None, ""),
        ("GET", &format!("{events}?tial=3"), None, ""),
        ("GET", &format!("{events}?resource=api"), None, ""),
        ("GET", "/v1/environments/demo/dev/logs?workload=api,API", None, ""),
        ("GET", "/v1/environments/demo/dev/releases/newest", None, ""),
        ("GET", "/v1/runs/7", None, ""),
        ("GET", "/v2/version", None, ""),
        ("DELETE", "/v1/runs/run_7", None, ""),
    ] {
        let answer = send(method, path, media, body).await;
        let _ = write!(page, "{method} {path} {body}\n{}\n\n", answer.trim_end());
    }
    insta::assert_snapshot!(page);
    // Of a very long line only the part around the place is shown.
    let long = format!("{{\"source_text\": \"{}\", \"source_path\": 5}}", "x".repeat(100_000));
    let answer = send("POST", "/v1/validate", JSON, &long).await;
    assert!(answer.len() < 1000 && answer.contains("source_path"), "{answer}");
}

#[tokio::test]
async fn over_tcp_only_whoever_knows_the_token_is_answered() {
    const TOKEN: &str = "0123456789abcdef";
    let tree = TaskTree::new();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    serve_tcp(&tree, listener, routes(), TOKEN.into());
    let plain: Endpoint = format!("http://{address}").parse().unwrap();
    // As a client sends it.
    for (token, allowed) in [
        (Some(TOKEN), true),
        (None, false),
        (Some("0123456789abcdee"), false),
        (Some("0123456789abcde"), false),
        (Some("0123456789abcdef0"), false),
        (Some(""), false),
    ] {
        let endpoint = plain.clone().with_token(token.map(str::to_owned));
        match Client::connect(endpoint).await {
            Ok((_, version)) => assert!(allowed && version.api == orchestra_api::API_VERSION, "{token:?} was let in"),
            Err(error) => {
                assert!(!allowed, "{error}");
                assert_eq!(error.status(), Some(401));
                let shown = format!("{:?}", error.into_diagnostics());
                assert!(shown.contains("ORC0802") && !shown.contains(TOKEN), "{shown}");
            }
        }
    }
    // Every operation is guarded, also one that does not exist; and nothing is done before the token was looked at.
    let transport = SocketTransport::new(plain);
    let paths =
        ROUTES.iter().map(|route| (route.method.as_str(), route.path)).chain([("GET", "/nothing"), ("PUT", "/")]);
    for (method, path) in paths {
        let path = path.replace(['{', '}'], "");
        for authorization in
            [None, Some(format!("Basic {TOKEN}")), Some(TOKEN.to_owned()), Some(format!("Bearer  {TOKEN}"))]
        {
            let mut request = Request::builder().method(method).uri(&path);
            if let Some(authorization) = &authorization {
                request = request.header("authorization", authorization);
            }
            let response = transport.send(request.body(Bytes::new()).unwrap()).await.unwrap();
            assert_eq!(response.status(), StatusCode::UNAUTHORIZED, "{method} {path} {authorization:?}");
            assert_eq!(response.headers()["www-authenticate"], "Bearer");
        }
    }
    tree.shutdown(std::time::Duration::from_secs(5)).await;
}
