//! One binary: evaluation, laws, the protocol, and the official client against a real socket.

mod client;
mod evaluate;
mod laws;
mod protocol;

use orchestra_flags::{
    Compiled,
    ofrep::{Response, Served, Settings, answer},
};
use orchestra_model::flag::FlagSet;
use serde_json::{Value, json};

/// The flags of most tests.
pub(crate) fn flags() -> FlagSet {
    serde_json::from_value(json!({"flags": {
        "banner": {
            "kind": "string",
            "variants": {"plain": "Hello", "festive": "Happy holidays", "code": null},
            "default": "plain", "enabled": true, "off": "plain",
            "rules": [
                {"name": "staff", "when": {"is": {"attribute": "email", "test": {"ends_with": ["@acme.example"]}}},
                 "serve": {"variant": "festive"}},
                {"name": "unsure", "when": {"is": {"attribute": "plan", "test": {"equals": "trial"}}},
                 "serve": {"variant": "code"}}
            ],
            "metadata": {"owner": "web", "orchestra.rule": "forged", "ttl": 5, "beta": true}
        },
        "editor": {
            "kind": "boolean", "variants": {"on": true, "off": false},
            "default": "on", "enabled": true, "off": "off", "rules": []
        },
        "limits": {
            "kind": "object", "variants": {"small": {"tokens": 100, "tools": ["search"]}},
            "default": "small", "enabled": true, "off": "small", "rules": []
        },
        "old-search": {
            "kind": "boolean", "variants": {"on": true, "off": false},
            "default": "on", "enabled": false, "off": "off", "rules": []
        },
        "replies": {
            "kind": "integer", "variants": {"few": 3, "many": 10},
            "default": "few", "enabled": true, "off": "few",
            "rules": [{"name": "1", "when": {"all": []},
                       "serve": {"split": {"by": "targetingKey", "shares": [
                           {"variant": "many", "share": "30%"}, {"variant": "few", "share": "70%"}]}}}]
        },
        "tenants": {
            "kind": "float", "variants": {"low": 1.0, "high": 2.5},
            "default": "low", "enabled": true, "off": "low",
            "rules": [{"name": "1", "when": {"is": {"attribute": "tenant.id", "test": {"present": true}}},
                       "serve": {"split": {"by": "account", "shares": [
                           {"variant": "high", "share": "50%"}, {"variant": "low", "share": "50%"}]}}}]
        }
    }}))
    .unwrap()
}

/// A set as it is served, with all settings at their defaults.
pub(crate) fn served(set: &FlagSet) -> Served {
    Served { flags: Compiled::new(set), changed_at: 1_771_622_898_123, settings: Settings::default() }
}

/// Asks without a socket.
pub(crate) fn ask(served: &Served, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
    let header = |name: &str| headers.iter().filter(|(found, _)| *found == name).map(|(_, value)| *value).collect();
    answer(served, &orchestra_flags::ofrep::Request { method, path, header: &header, body })
}

/// Asks for one flag.
pub(crate) fn one(served: &Served, key: &str, context: &Value) -> Response {
    let body = json!({"context": context}).to_string();
    ask(served, "POST", &format!("/ofrep/v1/evaluate/flags/{key}"), &[], body.as_bytes())
}

/// Asks for all flags.
pub(crate) fn all(served: &Served, context: &Value, headers: &[(&str, &str)]) -> Response {
    let body = json!({"context": context}).to_string();
    ask(served, "POST", "/ofrep/v1/evaluate/flags", headers, body.as_bytes())
}

/// The body as JSON.
pub(crate) fn body(response: &Response) -> Value {
    serde_json::from_slice(&response.body).unwrap_or_else(|error| panic!("{error}: {response:?}"))
}
