//! What expressions stand for, and what they add to the graph.

use orchestra_model::{
    Code, Name, Text,
    desired::{Condition, OnLoss},
    text::{Reference, Segment},
};

use crate::{errors, loaded};

fn env(service: &str, text: &str) -> Text {
    let file = format!(
        "version: 1\nname: demo\nvolumes: {{data: {{}}, mine: {{path: ../mine}}}}\nservices:\n  {service}\n    env: {{V: {text:?}}}\n  \
         web: {{command: [web], replicas: 2, ports: {{http: 8080, any: '0.0.0.0:9000', six: '[::]:9001', grpc: auto, h2c-x: 7000}}}}\n  \
         one: {{command: [one], ports: {{main: auto}}}}\n"
    );
    let loaded = loaded(&file);
    loaded.desired.service(&"a".parse().unwrap()).unwrap().program.env["V"].clone()
}

fn known(text: &str) -> String {
    env("a:\n    command: [a]\n    ports: {http: auto, p: 5000}", text).known().expect("known before apply")
}

#[test]
fn what_is_known_is_put_in() {
    for (text, expected) in [
        ("{{ stack.name }}/{{environment.name}}", "demo/dev"),
        ("{{ services.web.url }}", "http://127.0.0.1:8080"),
        ("{{ services.web.port }} {{ services.web.host }}", "8080 127.0.0.1"),
        ("{{ services.web.urls.any }} {{ services.web.ports.any }}", "http://127.0.0.1:9000 9000"),
        ("{{ services.web.urls.six }}", "http://[::1]:9001"),
        ("{{ services.web.urls.h2c-x }}", "http://127.0.0.1:7000"),
        ("{{ services.web.replicas }}", "2"),
        ("{{ self.name }} {{ self.ports.p }} {{ self.host }}", "a 5000 127.0.0.1"),
        ("{{ volumes.data.path }}", "/state/volumes/demo/dev/data"),
        ("{{ volumes.mine.path }}/x", "/srv/demo/../mine/x"),
        ("{{{{ x }} and }}", "{{ x }} and }}"),
        ("{{{{{{ stack.name }}", "{{demo"),
        ("no braces } {", "no braces } {"),
    ] {
        assert_eq!(known(text), expected, "{text}");
    }
}

#[test]
fn what_is_not_known_stays_a_typed_hole() {
    let name = |text: &str| text.parse::<Name>().unwrap();
    let text = env(
        "a:\n    command: [a]\n    ports: {http: auto}",
        "x{{ self.url }}y{{ instance.ports.http }}{{ services.one.port }} {{ instance.ordinal }}",
    );
    assert_eq!(
        text.0,
        [
            Segment::Literal("x".into()),
            Segment::Reference(Reference::ServiceUrl { service: name("a"), port: name("http") }),
            Segment::Literal("y".into()),
            Segment::Reference(Reference::InstancePort { port: name("http") }),
            Segment::Reference(Reference::ServicePort { service: name("one"), port: name("main") }),
            Segment::Literal(" ".into()),
            Segment::Reference(Reference::InstanceOrdinal),
        ]
    );
}

#[test]
fn a_volume_in_a_text_is_waited_for_and_a_service_is_not() {
    let loaded = loaded(
        "version: 1\nname: demo\nvolumes: {data: {}, other: {}}\nservices:\n  a:\n    command: [a, '{{ volumes.data.path }}', '{{ services.b.url }}']\n    \
         depends_on: {data: {on_loss: stop}}\n    health: {ready: {exec: [check, '{{ volumes.other.path }}']}}\n  b: {command: [b], ports: {http: 1}}\n",
    );
    let dependencies = &loaded.desired.service(&"a".parse().unwrap()).unwrap().depends_on;
    let found: Vec<_> = dependencies.iter().map(|(id, d)| (id.to_string(), d.until, d.on_loss)).collect();
    assert_eq!(
        found,
        [
            ("volume.data".to_owned(), Condition::Started, OnLoss::Stop),
            ("volume.other".to_owned(), Condition::Started, OnLoss::Ignore),
        ]
    );
}

#[test]
fn an_error_points_at_the_expression_whatever_the_quotes() {
    for (value, column, length) in [
        ("x {{ nope.a }}", 15, 12),
        ("'x {{ nope.a }}'", 16, 12),
        ("\"x {{ nope.a }}\"", 16, 12),
        ("'{{ stack.name }} é {{ nope.a }}'", 33, 12),
        // Behind an escape the text differs from what is written; the expression itself is found again.
        ("\"\\x41\\n{{ nope.a }}\"", 20, 12),
        // An expression that is written with escapes is not found: the whole value is underlined.
        ("\"{{ nope\\x2Ea }}\"", 13, 17),
    ] {
        let file =
            format!("version: 1\nname: demo\nservices:\n  a:\n    command: [a]\n    env:\n      NAMES: {value}\n");
        let errors = errors(file.as_bytes());
        let location = &errors[0].labels[0].location;
        assert_eq!((errors[0].code, location.line), (Code::INTERPOLATION, 7), "{value}");
        assert_eq!((location.column, location.length), (column + 1, length), "{value}");
    }
}
