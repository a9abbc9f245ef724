//! Numbers from elsewhere: exported metrics, and questions to Prometheus servers.

use orchestra_model::{
    Code,
    autoscale::{Level, MetricSource},
    desired::Service,
    quantity::{Measure, Timespan},
    rollout::Guard,
    secret::SecretSource,
};

use crate::{errors, loaded};

fn text(keys: &str) -> String {
    format!("version: 1\nname: demo\nservices:\n  a:\n    command: [./a]\n    {keys}\n")
}

fn service(keys: &str) -> Service {
    loaded(&text(keys)).desired.service(&"a".parse().unwrap()).unwrap().clone()
}

fn guard(keys: &str) -> (Service, Guard) {
    let service = service(&format!("ports: {{http: auto}}\n    rollout: {{canary: true, guard: {{{keys}}}}}"));
    let guard = service.rollout.strategy.stepped().unwrap().guard.clone().unwrap();
    (service, guard)
}

/// The errors of a service: code, message and help of each.
fn mistakes(keys: &str) -> Vec<(Code, String, String)> {
    let errors = errors(text(keys).as_bytes());
    errors.into_iter().map(|it| (it.code, it.message, it.help.unwrap_or_default())).collect()
}

fn assert_mistake(keys: &str, message: &str, remedy: &str) {
    let found = mistakes(keys);
    let fits = found.iter().any(|(_, said, help)| said.contains(message) && help.contains(remedy));
    assert!(fits, "{keys}: {found:#?}");
}

#[test]
fn counters_are_names_with_labels_and_say_where_they_are() {
    let (service, guard) = guard("counters: [errors_total, 'http_total{code=\"500\"}']");
    let names: Vec<String> = guard.counters.iter().map(ToString::to_string).collect();
    assert_eq!(names, ["errors_total", "http_total{code=\"500\"}"]);
    let metrics = service.metrics.unwrap();
    assert_eq!((metrics.port.as_str(), metrics.path.as_str()), ("http", "/metrics"));
    assert_eq!((metrics.every, metrics.timeout), (Timespan::seconds(5), Timespan::seconds(2)));
    for (counters, code) in [
        ("[9a]", Code::INVALID_NAME),
        ("['a{b=~\"x\"}']", Code::INVALID_NAME),
        ("[a, a]", Code::INVALID_VALUE),
        ("a", Code::WRONG_TYPE),
    ] {
        let keys = format!("ports: {{http: auto}}\n    rollout: {{canary: true, guard: {{counters: {counters}}}}}");
        assert_eq!(mistakes(&keys)[0].0, code, "{counters}");
    }
}

#[test]
fn metrics_are_where_they_are_said_to_be() {
    let of = |keys: &str| service(keys).metrics.map(|it| (it.port.to_string(), it.path, it.every.to_string()));
    let place = |port: &str, path: &str, every: &str| Some((port.to_owned(), path.to_owned(), every.to_owned()));
    assert_eq!(of("ports: {http: auto}"), None, "nobody asked");
    assert_eq!(of("ports: {http: auto}\n    metrics: /m"), place("http", "/m", "5s"));
    assert_eq!(of("ports: {http: auto, metrics: auto}\n    metrics: {every: 1s}"), place("metrics", "/metrics", "1s"));
    assert_eq!(of("ports: {a: auto, b: auto}\n    metrics: {port: b, path: /x}"), place("b", "/x", "5s"));
    assert_eq!(
        of("ports: {api: auto}\n    scale: {max: 2, on: [{exported: {name: q, average: 1}}]}"),
        place("api", "/metrics", "5s")
    );
    for (keys, message, remedy) in [
        ("scale: {max: 2, on: [{exported: {name: q, average: 1}}]}", "publishes none", "add `ports: {http: auto}`"),
        ("ports: {a: auto, b: auto}\n    metrics: {every: 1s}", "has several ports", "metrics: {port: NAME}"),
        ("ports: {http: auto}\n    metrics: {port: htp}", "no port `htp`", "did you mean `http`?"),
        ("ports: {http: auto}\n    metrics: metrics", "is not the path of a request", "begins with `/`"),
        ("ports: {http: auto}\n    metrics: {every: 1h}", "`every` must be from 1s to 5m", ""),
        ("ports: {http: auto}\n    metrics: {interval: 5s}", "unknown key `interval`", "write `every`"),
    ] {
        assert_mistake(keys, message, remedy);
    }
    // Where metrics are read replaces no instance, and a stack that was recorded before reads as one without.
    let (plain, with) = (service("ports: {http: auto}"), service("ports: {http: auto}\n    metrics: /m"));
    assert_eq!(plain.launch_digest(), with.launch_digest());
    assert!(serde_json::to_value(&plain).unwrap().get("metrics").is_none());
}

#[test]
fn a_prometheus_server_is_asked_with_the_limits_of_argo_rollouts() {
    let (service, guard) =
        guard("prometheus: {address: 'http://p:9090/prom/', query: 'up{a=\"b\"}', success: 'result[0] > 0.5'}");
    assert_eq!(service.metrics, None);
    let [metric] = guard.prometheus.as_slice() else { panic!("{guard:?}") };
    assert_eq!((metric.name.as_str(), metric.address.as_str()), ("prometheus", "http://p:9090/prom"));
    assert_eq!((metric.query.as_str(), metric.success.as_deref()), ("up{a=\"b\"}", Some("result[0] > 0.5")));
    assert_eq!((metric.every, metric.initial_delay), (Timespan::seconds(10), Timespan::default()));
    let limits = (metric.count, metric.failure_limit, metric.inconclusive_limit, metric.error_limit);
    assert_eq!((limits, metric.success_limit), ((None, Some(0), Some(0), Some(4)), None));
    assert!(!metric.dry_run && metric.token.is_none());

    let all = "[{address: 'http://p', query: a, failure: 'result > 1', every: 1m, initial_delay: 30s, timeout: 3s, count: 5, \
               failure_limit: unlimited, inconclusive_limit: 2, consecutive_error_limit: 1, consecutive_success_limit: 3, \
               token: {env: PROM_TOKEN}, dry_run: true}, {address: 'https://p/x/', ca: ./ca.pem, query: b, success: 'result < 1', token: {file: ./t}}]";
    let (_, guard) = self::guard(&format!("prometheus: {all}"));
    let [first, second] = guard.prometheus.as_slice() else { panic!("{guard:?}") };
    let limits = (first.count, first.failure_limit, first.inconclusive_limit, first.error_limit, first.success_limit);
    assert_eq!(limits, (Some(5), None, Some(2), Some(1), Some(3)));
    assert_eq!((first.token.clone(), first.dry_run), (Some(SecretSource::Env("PROM_TOKEN".to_owned())), true));
    assert_eq!(second.name, "prometheus-2");
    let Some(SecretSource::File(path)) = &second.token else { panic!("{second:?}") };
    assert!(path.starts_with('/') && path.ends_with("/t"), "{path}");
    assert_eq!((first.ca.as_deref(), second.address.as_str()), (None, "https://p/x"));
    assert!(second.ca.as_ref().is_some_and(|path| path.starts_with('/') && path.ends_with("/ca.pem")), "{second:?}");
    let written = serde_json::to_string(&guard).unwrap();
    assert_eq!(serde_json::from_str::<Guard>(&written).unwrap(), guard);
}

#[test]
fn mistakes_in_questions_are_told_with_a_remedy() {
    let base = "address: 'http://p', query: a";
    for (keys, message, remedy) in [
        ("query: a, success: 'result < 1'".to_owned(), "`address` is missing", "add `address"),
        (base.to_owned(), "neither what is good nor what is bad", "result < 0.01"),
        (format!("{base}, success: 'result < '"), "is not a condition: expected `result` or a number", "compare"),
        (format!("{base}, successCondition: 'result < 1'"), "unknown key `successCondition`", "write `success`"),
        (format!("{base}, success: 'result < 1', interval: 5s"), "unknown key `interval`", "write `every`"),
        (format!("{base}, success: 'result < 1', failure_limit: -1"), "out of range", ""),
        (format!("{base}, success: 'result < 1', every: 10ms"), "`every` must be from 1s to 1h", ""),
        (format!("{base}, success: 'result < 1', timeout: 2m"), "`timeout` must be at most 1m", ""),
        (format!("{base}, success: 'result < 1', token: {{value: x}}"), "unknown key `value`", "write `file` or `env`"),
        (format!("{base}, success: 'result < 1', token: {{env: A-B}}"), "not the name of a variable", ""),
        (format!("{base}, success: 'result < 1', ca: ./ca.pem"), "`ca` says nothing about", "write `https://`"),
        ("address: 'https:///p', query: a, success: 'result < 1'".to_owned(), "not an address", "https://HOST"),
        ("address: 'p:9090', query: a, success: 'result < 1'".to_owned(), "not an address", "http://HOST:PORT"),
        ("address: 'http://u@p', query: a, success: 'result < 1'".to_owned(), "not an address", ""),
        ("address: 'http://p', query: ' ', success: 'result < 1'".to_owned(), "`query` is empty", ""),
    ] {
        let stack = format!("ports: {{http: auto}}\n    rollout: {{canary: true, guard: {{prometheus: {{{keys}}}}}}}");
        assert_mistake(&stack, message, remedy);
    }
    let twice = format!("[{{{base}, name: x, success: 'result < 1'}}, {{{base}, name: x, success: 'result < 1'}}]");
    let stack = format!("ports: {{http: auto}}\n    rollout: {{canary: true, guard: {{prometheus: {twice}}}}}");
    assert_mistake(&stack, "two questions are called `x`", "a `name` of its own");
}

#[test]
fn queues_are_of_the_proxy_or_exported() {
    let on = |metric: &str| {
        let scale = service(&format!("ports: {{http: auto}}\n    scale: {{max: 2, on: [{metric}]}}")).scale.unwrap();
        (scale.on[0].source.clone(), scale.on[0].target)
    };
    let exported = |name: &str, labels: &[(&str, &str)]| MetricSource::Exported {
        name: name.to_owned(),
        labels: labels.iter().map(|(label, value)| ((*label).to_owned(), (*value).to_owned())).collect(),
    };
    let average = Level::Average(Measure::whole(5));
    assert_eq!(on("{queue_depth: 5}"), (MetricSource::QueueDepth, average));
    assert_eq!(on("{queue_depth: {value: 5}}"), (MetricSource::QueueDepth, Level::Value(Measure::whole(5))));
    assert_eq!(on("{tokens_in_flight: 5}"), (MetricSource::TokensInFlight, average));
    assert_eq!(
        on("{queue_depth: {metric: 'vllm:num_requests_waiting', labels: {model: a}, average: 5}}"),
        (exported("vllm:num_requests_waiting", &[("model", "a")]), average)
    );
    assert_eq!(
        on("{exported: {name: 'q{a=\"1\"}', labels: {b: '2'}, average: 5}}"),
        (exported("q", &[("a", "1"), ("b", "2")]), average)
    );
    for (metric, message) in [
        ("{queue_depth: {labels: {a: b}, average: 5}}", "`labels` belong to a metric"),
        ("{queue_depth: {metric: 9, average: 5}}", "`9` is not the name of a metric"),
        ("{exported: {name: q, labels: {a-b: c}, average: 5}}", "`a-b` is not the name of a label"),
    ] {
        assert_mistake(&format!("ports: {{http: auto}}\n    scale: {{max: 2, on: [{metric}]}}"), message, "");
    }
}

#[test]
fn an_analysis_that_nothing_is_measured_for_is_worth_a_warning() {
    let warnings = |rest: &str| {
        let text = format!("version: 1\nname: demo\nservices: {{worker: {{command: [./worker], {rest}}}}}\n");
        let loaded = loaded(&text);
        loaded.warnings.into_iter().map(|warning| warning.message).collect::<Vec<_>>()
    };
    let blind = warnings("rollout: {canary: true}");
    assert!(blind.len() == 1 && blind[0].contains("publishes no port"), "{blind:?}");
    let blind = warnings("ports: {tcp: auto}, rollout: {canary: true}");
    assert!(blind.len() == 1 && blind[0].contains("no port but `tcp`"), "{blind:?}");
    for untried in ["canary: {steps: [{analysis: 1m}, {weight: 5}]}", "blue_green: {before: [{analysis: 1m}]}"] {
        let found = warnings(&format!("ports: {{http: auto}}, rollout: {{{untried}}}"));
        assert!(found.len() == 1 && found[0].contains("before the new set of `worker` has any traffic"), "{found:?}");
    }
    for seen in [
        "ports: {http: auto}, rollout: {canary: true}",
        "ports: {http: auto, tcp: auto}, rollout: {canary: true}",
        "ports: {http: auto}, rollout: {blue_green: {after: [{analysis: 1m}]}}",
        "ports: {http: auto}, rollout: {canary: {steps: [{analysis: 1m}]}, guard: {probe: /ready}}",
        "rollout: {canary: {steps: [{weight: 50}, {pause: 1m}]}}",
        "rollout: {blue_green: true}",
        "rollout: {canary: true, guard: {prometheus: {address: 'http://p', query: up, success: result > 0}}}",
    ] {
        assert_eq!(warnings(seen), Vec::<String>::new(), "{seen}");
    }
}
