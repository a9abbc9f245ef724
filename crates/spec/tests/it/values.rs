//! Notations and their meaning, environments and their overlays.

use orchestra_model::{
    Code, Name, Resource,
    desired::{Check, Limit, Program, Protocol, Strategy},
    quantity::Amount,
};
use orchestra_spec::{Context, Source, load, render_text};

use crate::{context, errors, load_bytes, loaded};

fn program(keys: &str) -> Program {
    let loaded = loaded(&format!("version: 1\nname: demo\nservices:\n  a:\n    command: [./a]\n    {keys}\n"));
    loaded.desired.service(&"a".parse().unwrap()).unwrap().program.clone()
}

#[test]
fn masks_are_octal_however_they_are_written() {
    for (text, mask) in [("0022", 0o22), ("\"0022\"", 0o22), ("0o022", 0o22), ("'077'", 0o77), ("0", 0), ("00", 0)] {
        assert_eq!(program(&format!("umask: {text}")).umask, Some(mask), "{text}");
    }
    assert_eq!(program("x-nothing: 1").umask, None);
}

#[test]
fn scalars_in_env_are_the_text_that_stands_there() {
    let program = program("env: {A: 1.10, B: no, C: TRUE, D: 0x1F, E: ' a ', F: 007, G: 1e3, H: 2026-11-21}");
    for (key, text) in [
        ("A", "1.10"),
        ("B", "no"),
        ("C", "TRUE"),
        ("D", "0x1F"),
        ("E", " a "),
        ("F", "007"),
        ("G", "1e3"),
        ("H", "2026-11-21"),
    ] {
        assert_eq!(program.env[key].known().unwrap(), text, "{key}");
    }
}

#[test]
fn a_command_as_a_text_runs_in_the_shell() {
    let loaded = loaded("version: 1\nname: demo\nservices: {a: {command: \"cd x && exec ./a {{ self.name }}\"}}\n");
    let program = &loaded.desired.service(&"a".parse().unwrap()).unwrap().program;
    let command: Vec<String> = program.command.iter().map(|t| t.known().unwrap()).collect();
    assert_eq!(command, ["/bin/sh", "-c", "cd x && exec ./a a"]);
}

#[test]
fn limits_take_numbers_sizes_and_unlimited() {
    let limits = program("limits: {nofile: unlimited, nproc: 5, core: 1Mi, cpu: 0x10}").limits;
    assert_eq!(
        limits.into_iter().collect::<Vec<_>>(),
        [(Limit::Nofile, u64::MAX), (Limit::Nproc, 5), (Limit::Core, 1 << 20), (Limit::Cpu, 16)]
    );
}

#[test]
fn protocols_follow_the_name_of_the_port() {
    let loaded = loaded(
        "version: 1\nname: demo\nservices: {a: {command: [a], ports: {http: auto, grpc: auto, grpc-admin: auto, h2c: auto, tcp-db: auto, \
         tcpx: auto, web: {protocol: tcp}}}}\n",
    );
    let ports = &loaded.desired.service(&"a".parse().unwrap()).unwrap().ports;
    let found: Vec<(&str, Protocol)> = ports.iter().map(|(name, port)| (name.as_str(), port.protocol)).collect();
    assert_eq!(
        found,
        [
            ("grpc", Protocol::Grpc),
            ("grpc-admin", Protocol::Grpc),
            ("h2c", Protocol::H2c),
            ("http", Protocol::Http),
            ("tcp-db", Protocol::Tcp),
            ("tcpx", Protocol::Http),
            ("web", Protocol::Tcp),
        ]
    );
}

#[test]
fn a_service_with_ports_is_ready_once_they_accept_connections() {
    let ready = |service: &str| {
        let loaded = loaded(&format!("version: 1\nname: demo\nservices: {{a: {{command: [a], {service}}}}}\n"));
        loaded.desired.service(&"a".parse().unwrap()).unwrap().health.ready.clone()
    };
    let tcp = |port: &str| Check::Tcp { port: port.parse().unwrap() };
    let one = ready("ports: {main: auto}").unwrap();
    assert_eq!(one.check, tcp("main"));
    // With the timing of any readiness check.
    let written = ready("ports: {main: auto}, health: {ready: {tcp: true}}").unwrap();
    assert_eq!(one, written);
    let all = ready("ports: {http: auto, admin: auto}, health: {live: {http: /}}").unwrap();
    assert_eq!(all.check, Check::All(vec![tcp("admin"), tcp("http")]));
    assert_eq!(ready("ports: {main: auto}, health: {ready: none}"), None);
    assert_eq!(ready("health: {start_deadline: 5s}"), None);
    let errors = crate::errors(
        b"version: 1\nname: demo\nservices: {a: {command: [a], ports: {http: auto}, health: {ready: non}}}\n",
    );
    assert_eq!(
        errors.iter().map(|e| e.code).collect::<Vec<_>>(),
        [Code::WRONG_TYPE],
        "{}",
        render_text(&errors, false)
    );
}

#[test]
fn variables_that_no_shell_expands_are_worth_a_warning() {
    let warnings = |command: &str| {
        let ports = "ports: {http: auto, grpc-admin: auto}";
        loaded(&format!("version: 1\nname: demo\nservices: {{a: {{command: {command}, {ports}}}}}\n")).warnings
    };
    for (command, port) in [
        ("[serve, --port, $PORT]", "http"),
        ("[serve, '--listen=0.0.0.0:${PORT}']", "http"),
        ("[serve, --grpc, $PORT_GRPC_ADMIN]", "grpc-admin"),
        ("[serve, --grpc, $PORT_NONE]", "NAME"),
    ] {
        let found = warnings(command);
        let [warning] = &found[..] else { panic!("{command}: {found:?}") };
        assert!(warning.message.contains("stays as it is"), "{warning}");
        let help = warning.help.as_deref().unwrap_or_default();
        assert!(help.contains(&format!("{{{{ instance.ports.{port} }}}}")), "{command}: {help}");
        assert_eq!(warning.labels[0].location.line, 3);
    }
    for command in [
        "serve --port $PORT",
        "[sh, -c, 'serve --port $PORT']",
        "[/usr/bin/env, bash, -c, 'serve $PORT']",
        "[serve, $PORTAL, $HOME, PORT, $, $5]",
        "[serve, '{{ instance.ports.http }}']",
    ] {
        assert_eq!(warnings(command), [], "{command}");
    }
}

const LAYERED: &str = "\
version: 1
name: demo
services:
  api:
    command: [./api]
    replicas: 1
    env: {A: one, B: two}
    ports: {http: 8080, admin: 9000}
    rollout: {rolling: {max_surge: 2}}
jobs:
  seed: {command: [./seed]}
environments:
  prod:
    services:
      api: {replicas: 4, command: [./api, --prod], env: {B: null, C: three}, ports: {admin: null}, rollout: null}
      extra: {command: [./extra]}
    jobs: {seed: null}
    volumes: {data: {}}
  test: {target: kubernetes, what: ever, services: 5x}
  dev:
";

fn load_in(text: &str, environment: Option<&str>) -> Result<orchestra_spec::Loaded, Vec<orchestra_model::Diagnostic>> {
    load(Source { path: "orchestra.yaml", bytes: text.as_bytes() }, &context(environment))
}

#[test]
fn overlays_merge_mappings_replace_the_rest_and_delete_by_null() {
    let prod = load_in(&LAYERED.replace("services: 5x", "services: {}"), Some("prod")).unwrap();
    assert_eq!(prod.warnings, []);
    let ids: Vec<String> = prod.desired.resources.keys().map(ToString::to_string).collect();
    assert_eq!(ids, ["volume.data", "service.api", "service.extra"]);
    let api = prod.desired.service(&"api".parse().unwrap()).unwrap();
    assert_eq!(api.replicas, 4);
    assert_eq!(api.program.command.len(), 2);
    assert_eq!(api.program.env.keys().collect::<Vec<_>>(), ["A", "C"]);
    assert_eq!(api.ports.keys().map(Name::as_str).collect::<Vec<_>>(), ["http"]);
    let Strategy::Rolling { max_surge, .. } = api.rollout.strategy else { panic!("the default is rolling") };
    assert_eq!(max_surge, "25%".parse::<Amount>().unwrap());
    assert_eq!(prod.environments.iter().map(Name::as_str).collect::<Vec<_>>(), ["dev", "prod", "test"]);
    assert_eq!(prod.lines.values().copied().collect::<Vec<_>>(), [18, 4, 16]);
}

#[test]
fn the_default_environment_is_dev_then_the_only_one_then_an_implicit_dev() {
    let stack = "version: 1\nname: demo\nservices: {a: {command: [a]}}\n";
    for (environments, expected) in [
        ("", "dev"),
        ("environments:\n", "dev"),
        ("environments: {prod: {}}\n", "prod"),
        ("environments: {prod: {}, dev: {}}\n", "dev"),
        ("environments: {prod: {}, test: {}}\n", "dev"),
    ] {
        let loaded = load_in(&format!("{stack}{environments}"), None).unwrap();
        assert_eq!(loaded.desired.environment.to_string(), format!("demo/{expected}"), "{environments}");
    }
    let errors = load_in(&format!("{stack}environments: {{production: {{}}}}\n"), Some("prodution")).unwrap_err();
    assert_eq!(errors[0].code, Code::UNKNOWN_ENVIRONMENT);
    assert_eq!(errors[0].help.as_deref(), Some("did you mean `production`?"));
    assert_eq!(load_in(stack, Some("prod")).unwrap_err()[0].code, Code::UNKNOWN_ENVIRONMENT);
    assert!(load_in(stack, Some("dev")).is_ok());
}

#[test]
fn another_environment_may_belong_to_another_target() {
    let text = LAYERED.replace("services: 5x", "services: {}");
    assert!(load_in(&text, Some("dev")).is_ok());
    let errors = load_in(&text, Some("test")).unwrap_err();
    assert_eq!(
        errors.iter().map(|e| e.code).collect::<Vec<_>>(),
        [Code::NOT_YET_SUPPORTED],
        "{}",
        render_text(&errors, false)
    );
}

#[test]
fn deleting_nothing_and_empty_stacks_are_worth_a_warning() {
    let loaded = loaded(
        "version: 1\nname: demo\nservices: {a: {command: [a]}}\nenvironments: {dev: {services: {a: {env: null}}}}\n",
    );
    assert_eq!(loaded.warnings.len(), 1);
    assert!(loaded.warnings[0].message.contains("deletes nothing"), "{}", loaded.warnings[0]);
    let empty = crate::loaded("version: 1\nname: demo\n");
    assert!(empty.warnings[0].message.contains("no services"), "{}", empty.warnings[0]);
    let live = crate::loaded("version: 1\nname: demo\nservices: {a: {command: [a], health: {live: {notify: true}}}}\n");
    assert!(live.warnings[0].message.contains("passes once"), "{}", live.warnings[0]);
}

#[test]
fn relative_paths_start_at_the_stack_file_and_keep_their_parents() {
    for (path, expected) in [
        ("app", "/srv/demo/app"),
        ("./a//b/.", "/srv/demo/a/b"),
        ("/abs/./x", "/abs/x"),
        ("../up", "/srv/demo/../up"),
        (".", "/srv/demo"),
        ("/", "/"),
    ] {
        assert_eq!(program(&format!("directory: {path}")).directory, expected);
    }
    let root = Context { directory: "/".into(), ..context(None) };
    let text = "version: 1\nname: demo\nservices: {a: {command: [a], directory: x}}\n";
    let loaded = load(Source { path: "f", bytes: text.as_bytes() }, &root).unwrap();
    assert_eq!(loaded.desired.service(&"a".parse().unwrap()).unwrap().program.directory, "/x");
}

#[test]
fn a_waiting_check_is_no_deadlock_where_only_the_start_is_waited_for() {
    let fine = "version: 1\nname: demo\nservices:\n  a: {command: [a], health: {ready: {dependency: b}}}\n  b: {command: [b], depends_on: {a: started}}\n";
    assert!(load_bytes(fine.as_bytes()).is_ok());
    let optional = fine.replace("{dependency: b}", "{any: [{dependency: b}, {exec: [x]}]}").replace("started", "ready");
    assert!(load_bytes(optional.as_bytes()).is_ok());
    assert_eq!(errors(fine.replace("started", "ready").as_bytes())[0].code, Code::DEPENDENCY_CYCLE);
}

#[test]
fn a_volume_may_share_the_name_of_a_service() {
    let loaded =
        loaded("version: 1\nname: demo\nservices: {db: {command: ['{{ volumes.db.path }}']}}\nvolumes: {db: }\n");
    assert_eq!(loaded.desired.resources.len(), 2);
    assert!(
        loaded
            .desired
            .resources
            .values()
            .any(|resource| matches!(resource, Resource::Volume(volume) if volume.managed))
    );
}

#[test]
fn a_strategy_that_is_just_true_has_its_defaults() {
    for strategy in ["hold", "canary", "blue_green"] {
        let of = |value: &str| {
            let service = format!("{{command: [./a], ports: {{http: auto}}, rollout: {{{strategy}: {value}}}}}");
            loaded(&format!("version: 1\nname: demo\nservices: {{a: {service}}}\n")).desired
        };
        assert_eq!(of("true"), of("{}"), "{strategy}");
    }
}
