//! Secrets: where they come from, and what a stack file makes of them.

use orchestra_model::{
    Name, Text,
    secret::SecretSource,
    text::{Reference, Segment},
};

use crate::{fixtures, loaded};

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

#[test]
fn a_stack_says_where_they_are_read_and_which_variables_get_them() {
    let (_, text) = fixtures("good").into_iter().find(|(name, _)| name == "secrets").unwrap();
    let desired = loaded(&text).desired;
    let sources: Vec<_> = desired.secrets.iter().map(|(name, source)| (name.as_str(), source.clone())).collect();
    let file = |path: &str| SecretSource::File(path.to_owned());
    assert_eq!(
        sources,
        [
            // The environment's own source, its path against the folder of the stack file.
            ("db", file("/srv/demo/dev.password")),
            ("openrouter", file("/srv/demo/keys/openrouter")),
            ("unused", file("/etc/demo/unused")),
        ]
    );
    let secret = |text: &str| Segment::Reference(Reference::Secret { secret: name(text), version: None });
    let api = &desired.service(&name("api")).unwrap().program.env;
    assert_eq!(api["KEY"], Text(vec![secret("openrouter")]));
    assert_eq!(api["DB"].0[..2], [Segment::Literal("postgres://demo:".to_owned()), secret("db")]);
    assert_eq!(api["DB"].to_string(), "postgres://demo:(secret db)@(known after apply: instance.ports.http)/demo");
    // What was written before there were secrets reads as it did.
    let json = serde_json::to_value(&desired).unwrap();
    assert_eq!(json["secrets"]["openrouter"]["file"], "/srv/demo/keys/openrouter");
    assert_eq!(serde_json::from_value::<orchestra_model::Desired>(json).unwrap(), desired);
}
