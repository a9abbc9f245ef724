//! How long an evaluation takes in process.
//!
//! ```console
//! $ cargo run --release -p orchestra-flags --example evaluate
//! ```
//!
//! 1,000 flags, each with five rules (texts, lists, versions, nested attributes) and a split of three variants at the end;
//! a context of twenty attributes, another user each time. Each evaluation is timed alone, clock included. `body to body` is
//! the whole of a protocol request, JSON read and written; `bulk` is all 1,000 flags in one request.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use orchestra_flags::{
    Compiled, Context,
    ofrep::{Request, Served, Settings, answer},
};
use orchestra_model::flag::FlagSet;
use serde_json::{Value, json};

const FLAGS: usize = 1_000;
const EVALUATIONS: usize = 1_000_000;

fn main() {
    let set = set();
    let began = Instant::now();
    let flags = Compiled::new(&set);
    println!("compiling {FLAGS} flags: {:?}", began.elapsed());

    let contexts: Vec<Value> = (0..1_000).map(context).collect();
    let ready: Vec<Context> = contexts.iter().cloned().map(|c| Context::try_from(c).expect("an object")).collect();
    let names: Vec<String> = (0..FLAGS).map(name).collect();
    measure("evaluation", EVALUATIONS, |n| {
        black_box(flags.evaluate(&names[n * 7 % FLAGS], &ready[n % ready.len()]).expect("the flag exists"));
    });

    let served = Served { flags, changed_at: 0, settings: Settings::default() };
    let bodies: Vec<String> = contexts.iter().map(|context| json!({"context": context}).to_string()).collect();
    let ask = |path: &str, n: usize| {
        let request =
            Request { method: "POST", path, header: &|_| Vec::new(), body: bodies[n % bodies.len()].as_bytes() };
        let response = answer(&served, &request);
        assert_eq!(response.status, 200);
        black_box(response);
    };
    let paths: Vec<String> = names.iter().map(|name| format!("/ofrep/v1/evaluate/flags/{name}")).collect();
    measure("body to body", EVALUATIONS / 10, |n| ask(&paths[n * 7 % FLAGS], n));
    measure("bulk", EVALUATIONS / 1_000, |n| ask("/ofrep/v1/evaluate/flags", n));
}

/// Times `count` calls one by one, after a tenth as many to warm up.
fn measure(what: &str, count: usize, mut call: impl FnMut(usize)) {
    (0..count / 10).for_each(&mut call);
    let mut times: Vec<Duration> = (0..count)
        .map(|n| {
            let began = Instant::now();
            call(n);
            began.elapsed()
        })
        .collect();
    times.sort_unstable();
    let at = |per_mille: usize| times[count * per_mille / 1_000];
    println!(
        "{what}, {count} times: p50 {:?}, p99 {:?}, p99.9 {:?}, max {:?}",
        at(500),
        at(990),
        at(999),
        times[count - 1]
    );
}

fn name(n: usize) -> String {
    format!("feature-{n:04}")
}

fn set() -> FlagSet {
    let is = |attribute: &str, test: Value| json!({"is": {"attribute": attribute, "test": test}});
    let rule = |when: Value, variant: &str| json!({"name": "rule", "when": when, "serve": {"variant": variant}});
    let flags: Value = (0..FLAGS)
        .map(|n| {
            let countries: Vec<String> = (0..20).map(|c| format!("C{}", (n + c) % 100)).collect();
            let flag = json!({
                "kind": "string", "variants": {"a": "alpha", "b": "beta", "c": "gamma"},
                "default": "a", "enabled": true, "off": "a",
                "rules": [
                    rule(is("email", json!({"ends_with": ["@acme.example", "@acme.test"]})), "b"),
                    rule(json!({"all": [is("country", json!({"in": countries})), is("age", json!({"at_least": 65}))]}), "b"),
                    rule(is("app.version", json!({"version": ">=9.1, <9.2"})), "c"),
                    rule(json!({"any": [is("account.plan", json!({"equals": "gold"})), is("tags", json!({"contains": ["x"]}))]}), "c"),
                    {"name": "split", "when": {"all": []}, "serve": {"split": {"by": "targetingKey", "shares": [
                        {"variant": "b", "share": "10%"}, {"variant": "c", "share": "20%"}, {"variant": "a", "share": "70%"}]}}},
                ],
            });
            (name(n), flag)
        })
        .collect::<serde_json::Map<String, Value>>()
        .into();
    serde_json::from_value(json!({"flags": flags})).expect("a set of flags")
}

fn context(n: usize) -> Value {
    let mut context = json!({
        "targetingKey": format!("user-{n}"), "email": format!("user-{n}@example.com"), "country": format!("C{}", n % 100),
        "age": n % 80, "app": {"version": "2.14.3"}, "account": {"id": n / 3, "plan": "free"}, "tags": ["a", "b", "c"],
    });
    for extra in 0..13 {
        context[format!("attribute-{extra}")] = json!(format!("value {extra} of user {n}"));
    }
    context
}
