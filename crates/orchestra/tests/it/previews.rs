//! Previews as users make them: beside what they are made from, with what they share of it and what is their own, and
//! gone when their time is over, whether a server runs at that moment or not.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    time::{Duration, Instant, SystemTime},
};

use rustix::process::Signal;
use serde_json::Value;

use crate::{
    environment::{PATIENCE, TestEnvironment, find},
    load::get,
    processes::{self, Role},
    readme::has,
};

const STACK: &str = r#"
version: 1
name: shop
volumes:
  data: {}
  models: {preview: shared}
jobs:
  migrate: {command: [APP, job], env: {JOB_FILE: HERE/jobs}, preview: shared}
services:
  db:
    command: [APP]
    ports: {http: auto}
    env: {MODELS: "{{ volumes.models.path }}"}
    preview: shared
    stop: {grace: 5s}
  api:
    command: [APP]
    replicas: 2
    ports: {http: PORT}
    depends_on: {migrate: completed, db: ready}
    env:
      VERSION: "{{ environment.name }} {{ services.db.url }} {{ volumes.data.path }} {{ volumes.models.path }}"
    health: {ready: {http: /ready, every: 500ms, every_starting: 20ms}}
    rollout: {drain: {requests: 5s, streams: 5s}}
    stop: {grace: 5s}
previews:
  ttl: 1h
  limit: 2
  services: {api: {replicas: 1}}
environments:
  production: {}
"#;

fn free_port() -> u16 {
    std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

fn write(env: &TestEnvironment) {
    env.write(&STACK.replace("PORT", &free_port().to_string()));
}

fn status(env: &TestEnvironment, name: &str) -> Value {
    env.ok(&["status", "--env", name, "--json"]).json()
}

/// The address of a service as it is shown.
fn url(env: &TestEnvironment, name: &str, service: &str) -> String {
    let status = status(env, name);
    find(&status, service)["addresses"][0]["url"].as_str().unwrap().to_owned()
}

fn loopback(url: &str) -> SocketAddr {
    let port = url.rsplit_once(':').unwrap().1.parse().unwrap();
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn pids(env: &TestEnvironment, name: &str) -> std::collections::BTreeMap<String, u64> {
    crate::environment::pids(&status(env, name))
}

/// Environments that are listed, by name.
fn listed(env: &TestEnvironment, all: bool) -> Vec<Value> {
    let arguments: &[&str] = if all { &["environments", "--all", "--json"] } else { &["ls", "--json"] };
    env.ok(arguments).json().as_array().unwrap().clone()
}

fn one(env: &TestEnvironment, id: &str) -> Option<Value> {
    listed(env, true).into_iter().find(|environment| environment["id"] == id)
}

/// Waits until a preview was removed.
fn until_removed(env: &TestEnvironment, id: &str) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found = one(env, id).unwrap_or_else(|| panic!("{id} is not known"));
        if found["preview"]["removed_at"].is_u64() {
            return found;
        }
        assert!(Instant::now() < deadline, "it was not removed: {found:#}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn kinds(env: &TestEnvironment, name: &str) -> Vec<String> {
    let events = env.ok(&["events", "--env", name, "--json"]).json_lines();
    events.iter().map(|event| event["kind"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_preview_stands_beside_what_it_was_made_from() {
    let env = TestEnvironment::new();
    write(&env);

    // What it shares must be there.
    let refused = env.run(&["up", "-e", "preview-42", "--from", "production"]).expect(2);
    assert!(
        refused.stderr.contains("ORC0214") && refused.stderr.contains("orchestra up --env production"),
        "{refused}"
    );

    env.ok(&["up", "-e", "production"]);
    let before = (pids(&env, "production"), status(&env, "production"));
    let data = |name: &str| {
        let status = status(&env, name);
        status["volumes"][0]["path"].as_str().unwrap().to_owned()
    };
    let models = before.1["volumes"][1]["path"].as_str().unwrap().to_owned();
    for volume in [&data("production"), &models] {
        fs::write(Path::new(volume).join("kept"), "of production").unwrap();
    }

    // Planning makes nothing.
    let plan = env.ok(&["plan", "-e", "preview-42", "--from", "production"]).text();
    assert!(plan.contains("service.api") && !plan.contains("service.db") && !plan.contains("job.migrate"), "{plan}");
    env.ok(&["validate", "-e", "preview-42", "--from", "production"]);
    assert_eq!(one(&env, "shop/preview-42"), None);

    let up = env.ok(&["up", "-e", "preview-42", "--from", "production", "--owner", "ada"]);
    assert!(up.text().contains("preview of production, taken down in 1h00m"), "{up}");
    let address = url(&env, "preview-42", "api");
    assert!(address.starts_with("http://preview-42.localhost:") && up.text().contains(&address), "{address} {up}");

    // Its own name and data; the other's database and models; its overlay.
    let seen = get(loopback(&address), "/version").unwrap();
    let seen: Vec<&str> = seen.split(' ').collect();
    let own = data("preview-42");
    assert_eq!(seen, ["preview-42", &url(&env, "production", "db"), &own, &models]);
    assert_ne!(own, data("production"));
    let now = status(&env, "preview-42");
    assert_eq!(now["services"].as_array().unwrap().len(), 1, "{now:#}");
    assert_eq!(find(&now, "api")["desired"], 1);
    assert_eq!(fs::read_to_string(env.path("jobs")).unwrap(), "migrate\n", "the shared job ran again");
    if has("curl") {
        let answer =
            Command::new("curl").args(["-sS", "--max-time", "10", &format!("{address}/version")]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&answer.stdout).split(' ').next(), Some("preview-42"), "{answer:?}");
    }

    // Once more: nothing but its time is new, and it is known what it was made from.
    let made = now["preview"].clone();
    let (address, running) = (url(&env, "preview-42", "api"), pids(&env, "preview-42"));
    let again = env.ok(&["up", "-e", "preview-42", "--ttl", "2h"]);
    assert!(again.text().contains("up to date") && again.text().contains("taken down in 2h00m"), "{again}");
    let renewed = status(&env, "preview-42")["preview"].clone();
    assert!(renewed["expires_at"].as_u64() > made["expires_at"].as_u64(), "{made} {renewed}");
    assert_eq!(
        (&renewed["created_at"], &renewed["owner"], &renewed["from"]),
        (&made["created_at"], &"ada".into(), &"production".into())
    );
    assert_eq!((url(&env, "preview-42", "api"), pids(&env, "preview-42")), (address, running));
    assert!(kinds(&env, "preview-42").contains(&"preview_renewed".to_owned()));

    // Another one beside it, and not a third.
    env.ok(&["up", "-e", "preview-43", "--from", "production"]);
    assert_ne!(url(&env, "preview-42", "api"), url(&env, "preview-43", "api"));
    let full = env.run(&["up", "-e", "preview-44", "--from", "production"]).expect(2);
    assert!(full.stderr.contains("previews.limit"), "{full}");

    let list = listed(&env, false);
    let ids: Vec<&str> = list.iter().map(|environment| environment["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["shop/preview-42", "shop/preview-43", "shop/production"]);
    assert_eq!(list[0]["usage"]["instances"], 1, "{list:#?}");
    assert!(list[0]["usage"]["memory"].is_string() && list[2]["preview"].is_null(), "{list:#?}");
    let table = env.ok(&["environments"]).text();
    for part in ["shop/preview-42", "production", "ada", "2h00m", "USD"] {
        assert!(table.contains(part), "no `{part}` in\n{table}");
    }

    let plan = env.ok(&["plan", "-e", "preview-42", "--down"]).text();
    assert!(plan.contains("volume.data") && !plan.contains("service.db"), "{plan}");

    // Gone with what is its own, and with nothing else.
    env.ok(&["down", "-e", "preview-42"]);
    assert!(!Path::new(&own).exists(), "its volume is left");
    assert_eq!(pids(&env, "production"), before.0, "production was touched");
    for volume in [&data("production"), &models] {
        assert_eq!(fs::read_to_string(Path::new(volume).join("kept")).unwrap(), "of production");
    }
    assert_eq!(url(&env, "preview-43", "api").split(':').nth(1), Some("//preview-43.localhost"));
    assert!(env.ok(&["status", "-e", "preview-42"]).text().contains("was removed"));
    let gone = env.run(&["up", "-e", "preview-42"]).expect(2);
    assert!(gone.stderr.contains("was removed") && gone.stderr.contains("--from production"), "{gone}");
    // Nor does the way back bring it to life: nothing would ever take it down.
    let gone = env.run(&["rollback", "-e", "preview-42", "--to", "1"]).expect(2);
    assert!(gone.stderr.contains("ORC0214") && gone.stderr.contains("--from production"), "{gone}");
    assert_eq!(listed(&env, false).len(), 2);
    // Whoever takes away what others use is told.
    let down = env.ok(&["down", "-e", "production"]);
    assert!(down.stderr.contains("previews use what is taken down of `production`: preview-43"), "{down}");
    env.ok(&["down", "-e", "preview-43"]);
    env.finish();
}

#[test]
fn names_that_do_not_fit_are_refused() {
    let env = TestEnvironment::new();
    write(&env);
    env.ok(&["up", "-e", "production"]);
    env.ok(&["up", "-e", "preview-1", "--from", "production"]);
    let refused = |arguments: &[&str], parts: &[&str]| {
        let ran = env.run(arguments).expect(2);
        for part in parts {
            assert!(ran.stderr.contains(part), "no `{part}`: {ran}");
        }
    };
    refused(&["up", "-e", "preview-2", "--from", "preview-1"], &["is a preview itself", "--from production"]);
    refused(&["up", "-e", "production", "--from", "production"], &["ORC0214", "is up and is not a preview"]);
    refused(&["up", "-e", "dev", "--from", "production"], &["ORC0214", "is an environment of the stack file"]);
    refused(&["up", "-e", "preview-2", "--from", "produktion"], &["ORC0211", "did you mean `production`?"]);
    refused(&["up", "-e", "preview-1", "--from", "dev"], &["was made from `production`"]);
    refused(&["up", "-e", "production", "--ttl", "1h"], &["is not a preview"]);
    refused(&["up", "--from", "production"], &["needs a name"]);
    refused(&["up", "-e", "preview-3"], &["ORC0211"]);
    // A mistake that only a preview would make is found before anybody makes one.
    env.ok(&["validate"]);
    let mistake = STACK.replace("services: {api: {replicas: 1}}", "services: {api: {depends_on: {nobody: ready}}}");
    env.write(&mistake.replace("PORT", "12345"));
    refused(&["validate"], &["there is no service, job or volume `nobody`", "in a preview of `production`"]);
    write(&env);
    refused(&["validate", "-e", "Preview", "--from", "production"], &["Preview"]);
    env.ok(&["down", "-e", "preview-1"]);
    env.ok(&["down", "-e", "production"]);
    env.finish();
}

#[test]
fn a_preview_goes_when_its_time_is_over() {
    let env = TestEnvironment::new();
    write(&env);
    env.ok(&["up", "-e", "production"]);
    let production = pids(&env, "production");

    // While a server runs.
    env.ok(&["up", "-e", "preview-1", "--from", "production", "--ttl", "2s"]);
    until_removed(&env, "shop/preview-1");
    let seen = kinds(&env, "preview-1");
    let at = |kind: &str| seen.iter().position(|seen| seen == kind).unwrap_or_else(|| panic!("no {kind} in {seen:?}"));
    assert!(at("preview_expiring") < at("preview_expired"), "{seen:?}");
    assert_eq!(seen.iter().filter(|kind| *kind == "run_succeeded").count(), 2, "{seen:?}");

    // While none does: the next one finds it.
    env.ok(&["up", "-e", "preview-2", "--from", "production", "--ttl", "2s"]);
    let own = status(&env, "preview-2")["volumes"][0]["path"].as_str().unwrap().to_owned();
    let over = one(&env, "shop/preview-2").unwrap()["preview"]["expires_at"].as_u64().unwrap();
    processes::kill(env.one(Role::Server).pid, Signal::KILL);
    // Nothing happens that could be waited for.
    let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis();
    while now() <= u128::from(over) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(Path::new(&own).exists(), "somebody else removed it");
    until_removed(&env, "shop/preview-2");
    assert!(!Path::new(&own).exists());

    assert_eq!(pids(&env, "production"), production, "production was touched");
    env.ok(&["down", "-e", "production"]);
    env.finish();
}

#[test]
fn a_run_that_goes_on_is_not_cut_short() {
    let env = TestEnvironment::new();
    env.write(
        &STACK
            .replace("PORT", &free_port().to_string())
            .replace("VERSION:", "START_DELAY_MS: \"2500\"\n      VERSION:"),
    );
    env.ok(&["up", "-e", "production"]);
    let up = env.ok(&["up", "-e", "preview-1", "--from", "production", "--ttl", "1s"]);
    assert!(up.text().contains("is ready"), "{up}");
    until_removed(&env, "shop/preview-1");
    let seen = kinds(&env, "preview-1");
    let first = |kind: &str| seen.iter().position(|seen| seen == kind);
    assert!(first("run_succeeded") < first("preview_expired"), "{seen:?}");
    env.ok(&["down", "-e", "production"]);
    env.finish();
}

#[test]
fn what_a_preview_that_failed_had_made_is_removed() {
    let env = TestEnvironment::new();
    let stack = STACK.replace("PORT", &free_port().to_string());
    let never = "services: {api: {replicas: 1, env: {NEVER_READY: \"1\"}, health: {start_deadline: 300ms}}}";
    env.write(&stack.replace("services: {api: {replicas: 1}}", never));
    env.ok(&["up", "-e", "production"]);
    let failed = env.run(&["up", "-e", "preview-1", "--from", "production"]).expect(1);
    assert!(failed.stderr.contains("nothing runs, as before"), "{failed}");
    let volumes = env.home().join("volumes/shop/preview-1/data");
    assert!(!volumes.exists(), "{} is left", volumes.display());
    // Nothing of it is there; taking it down only forgets it.
    env.ok(&["down", "-e", "preview-1"]);
    until_removed(&env, "shop/preview-1");
    env.ok(&["down", "-e", "production"]);
    env.finish();
}
