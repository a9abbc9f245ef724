//! Environments that are made from another one.

use std::collections::BTreeMap;

use orchestra_model::{
    Code, Diagnostic, Name, Resource, ResourceId,
    desired::Volume,
    preview::{BaseResource, Prices},
    quantity::Timespan,
};
use orchestra_spec::{Context, IMPLICIT_ENVIRONMENT, Loaded, PreviewContext, Source, load, outline};

use crate::{context, fixtures};

/// What is in force in the environment that a text defines, with the ports that a machine chose.
fn in_force(text: &str, environment: &str) -> BTreeMap<ResourceId, BaseResource> {
    let source = Source { path: "orchestra.yaml", bytes: text.as_bytes() };
    let loaded = load(source, &context(Some(environment))).unwrap();
    let resources = loaded.desired.resources.into_iter().map(|(id, applied)| {
        let ports = applied.as_service().map(|service| service.ports.keys().cloned().zip(40_001..).collect());
        (id, BaseResource { applied, chosen_ports: ports.unwrap_or_default() })
    });
    resources.collect()
}

fn preview_of(
    text: &str,
    name: &str,
    from: &str,
    base: BTreeMap<ResourceId, BaseResource>,
) -> Result<Loaded, Vec<Diagnostic>> {
    let preview = PreviewContext { from: from.parse().unwrap(), ttl: None, owner: Some("ada".to_owned()), base };
    let context = Context { preview: Some(preview), ..context(Some(name)) };
    load(Source { path: "orchestra.yaml", bytes: text.as_bytes() }, &context)
}

fn fixture() -> String {
    fixtures("good").into_iter().find(|(name, _)| name == "previews").unwrap().1
}

fn preview() -> Loaded {
    let text = fixture();
    preview_of(&text, "preview-42", "production", in_force(&text, "production")).unwrap()
}

fn environment_of<'a>(loaded: &'a Loaded, service: &str) -> BTreeMap<&'a str, String> {
    let service = loaded.desired.service(&service.parse().unwrap()).unwrap();
    service.program.env.iter().map(|(key, value)| (key.as_str(), value.to_string())).collect()
}

#[test]
fn both_overlays_count_and_the_name_is_its_own() {
    let loaded = preview();
    assert_eq!(loaded.desired.environment.to_string(), "shop/preview-42");
    assert_eq!(loaded.preview_limit, 3);
    let preview = loaded.desired.preview.clone().unwrap();
    assert_eq!((preview.from.as_str(), preview.ttl), ("production", Timespan::seconds(8 * 3_600)));
    let prices = Prices { cpu_hour: 50_000, memory_hour: 6_000, currency: "EUR".to_owned() };
    assert_eq!((preview.owner.as_deref(), preview.prices), (Some("ada"), prices));
    // That of the previews lies over that of production.
    assert_eq!(loaded.desired.service(&"api".parse().unwrap()).unwrap().replicas, 2);
    let shared: Vec<String> = preview.shared.iter().map(ToString::to_string).collect();
    assert_eq!(shared, ["volume.models", "job.migrate", "service.db"]);
}

#[test]
fn what_is_shared_is_that_of_the_other_environment() {
    let loaded = preview();
    let resources: Vec<String> = loaded.desired.resources.keys().map(ToString::to_string).collect();
    assert_eq!(resources, ["volume.data", "volume.models", "service.api"]);
    let env = environment_of(&loaded, "api");
    assert_eq!(env["DB"], "tcp://127.0.0.1:5432");
    assert_eq!(env["MODELS"], "/srv/demo/models");
    let volume = |name: &str| match &loaded.desired.resources[&format!("volume.{name}").parse().unwrap()] {
        Resource::Volume(volume) => volume.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(volume("models"), Volume { path: "/srv/demo/models".to_owned(), managed: false });
    // A dependency on what is not its own is no edge: nobody here could satisfy it.
    let depends_on = &loaded.desired.service(&"api".parse().unwrap()).unwrap().depends_on;
    let on: Vec<String> = depends_on.keys().map(ToString::to_string).collect();
    assert_eq!(on, ["volume.data", "volume.models"]);
}

#[test]
fn what_is_its_own_collides_with_nothing() {
    let loaded = preview();
    let api = loaded.desired.service(&"api".parse().unwrap()).unwrap();
    assert_eq!(api.ports[&"http".parse::<Name>().unwrap()].port, None, "a number belongs to production");
    assert_eq!(environment_of(&loaded, "api")["DATA"], "/state/volumes/shop/preview-42/data");

    // Also a folder that the file names: two environments would write to it.
    let text = fixture().replace("data: {preview: own}", "data: {path: ./data}");
    let loaded = preview_of(&text, "preview-42", "production", in_force(&text, "production")).unwrap();
    assert_eq!(environment_of(&loaded, "api")["DATA"], "/state/volumes/shop/preview-42/data");
}

#[test]
fn a_port_that_the_machine_chose_is_known() {
    let text = fixture().replace("tcp: 5432", "tcp: auto");
    let mut base = in_force(&text, "production");
    let loaded = preview_of(&text, "preview-42", "production", base.clone()).unwrap();
    assert_eq!(environment_of(&loaded, "api")["DB"], "tcp://127.0.0.1:40001");
    for resource in base.values_mut() {
        resource.chosen_ports.clear();
    }
    let errors = preview_of(&text, "preview-42", "production", base).unwrap_err();
    assert_eq!((errors.len(), errors[0].code), (1, Code::PREVIEW));
}

#[test]
fn what_does_not_fit_is_refused_with_its_place() {
    let text = fixture();
    let base = || in_force(&text, "production");
    let refused = |name: &str, from: &str, base| {
        let errors = preview_of(&text, name, from, base).unwrap_err();
        errors.iter().map(|e| (e.code, e.labels[0].location.line)).collect::<Vec<_>>()
    };
    // All that it shares is missing, each where it says so.
    assert_eq!(
        refused("preview-42", "production", BTreeMap::new()),
        [(Code::PREVIEW, 6), (Code::PREVIEW, 8), (Code::PREVIEW, 13)]
    );
    assert_eq!(refused("production", "dev", base()), [(Code::PREVIEW, 29)]);
    assert_eq!(refused("dev", "production", base()), [(Code::PREVIEW, 1)]);
    assert_eq!(refused("preview-42", "produktion", base()), [(Code::UNKNOWN_ENVIRONMENT, 28)]);
    // Nothing of it runs, and that is not the trouble.
    assert_eq!(refused("preview-42", "produktion", BTreeMap::new()), [(Code::UNKNOWN_ENVIRONMENT, 28)]);

    let check = "preview: shared\n  api:\n    health: {ready: {dependency: db}}";
    let text = text.replace("preview: shared\n  api:", check);
    let errors = preview_of(&text, "preview-42", "production", base()).unwrap_err();
    assert_eq!(errors.iter().map(|error| error.code).collect::<Vec<_>>(), [Code::PREVIEW], "{errors:?}");
}

#[test]
fn a_preview_may_run_in_another_world_than_what_it_is_made_from() {
    let text = "version: 1\nname: shop\nservices:\n  api: {command: [./api]}\n\
                environments:\n  production: {target: kubernetes, namespace: shop, services: {api: {replicas: 6}}}\n";
    let errors = preview_of(text, "preview-42", "production", BTreeMap::new()).unwrap_err();
    assert_eq!(errors[0].code, Code::NOT_YET_SUPPORTED);
    let text = format!("{text}previews: {{target: process}}\n");
    let loaded = preview_of(&text, "preview-42", "production", BTreeMap::new()).unwrap();
    assert_eq!(loaded.desired.service(&"api".parse().unwrap()).unwrap().replicas, 6);
}

#[test]
fn a_file_speaks_of_previews_by_its_keys_and_not_by_its_words() {
    let speaks = |rest: &str| {
        let text = format!("version: 1\nname: shop\n{rest}\n");
        outline(Source { path: "orchestra.yaml", bytes: text.as_bytes() }).previews
    };
    assert!(speaks("previews: {ttl: 8h}"));
    assert!(speaks("volumes: {data: {preview: shared}}"));
    assert!(speaks("environments: {production: {services: {api: {preview: shared}}}}"));
    assert!(!speaks("services: {preview: {command: [preview], env: {preview: preview}}} # preview"));
    let dev: Name = IMPLICIT_ENVIRONMENT.parse().unwrap();
    let other = outline(Source { path: "orchestra.yaml", bytes: b"environments: {production: {}}" });
    assert!(other.defines(&dev) && other.defines(&"production".parse().unwrap()));
    assert!(!other.defines(&"preview-42".parse().unwrap()));
}
