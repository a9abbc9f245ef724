//! The OpenAPI 3.1 document, drawn from [`ROUTES`](crate::ROUTES) and the schemas of the types.

use schemars::{Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};

use crate::{
    API_VERSION, EVENT_STREAM, NDJSON,
    routes::{BodyKind, EXTRA_SCHEMAS, ROUTES, RouteSpec},
    server::ErrorBody,
};

/// The document. Equal for equal sources: it names no version of the program, so that a release alone does not change it.
pub fn document() -> Value {
    let mut generator = SchemaSettings::draft2020_12()
        .with(|settings| {
            settings.definitions_path = "/components/schemas".into();
            settings.meta_schema = None;
        })
        .into_generator();
    let mut paths = Map::new();
    for route in ROUTES {
        let operation = operation(route, &mut generator);
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.as_str().to_ascii_lowercase()] = operation;
    }
    for extra in EXTRA_SCHEMAS {
        extra(&mut generator);
    }
    generator.subschema_for::<ErrorBody>();
    let mut schemas: Vec<(String, Value)> = generator.take_definitions(true).into_iter().collect();
    schemas.sort_by(|a, b| a.0.cmp(&b.0));
    let schemas: Map<String, Value> = schemas.into_iter().collect();
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Orchestra",
            "version": format!("v{API_VERSION}"),
            "description": "The control plane's API, over a Unix socket or TCP with a token. Every answer with a status of 400 or above is an `ErrorBody`.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "servers": [{"url": "/"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "Over TCP only; the Unix socket is guarded by its permissions."},
            },
            "responses": {
                "Error": {
                    "description": "What is wrong",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
                },
            },
        },
    })
}

fn operation(route: &RouteSpec, generator: &mut SchemaGenerator) -> Value {
    let mut parameters = path_parameters(route.path);
    parameters.extend(route.query.map(|query| query_parameters(query, generator)).unwrap_or_default());
    parameters.extend(
        route.header.map(
            |(name, what)| json!({"name": name, "in": "header", "description": what, "schema": {"type": "string"}}),
        ),
    );
    let mut responses = Map::new();
    let content = |media: &str, schema: Schema| json!({"schema": schema, "media": media});
    let bodies = match route.response {
        BodyKind::Json(schema) => vec![content("application/json", schema(generator))],
        BodyKind::EventStream(schema) => vec![content(EVENT_STREAM, schema(generator))],
        BodyKind::JsonOrEventStream(json, event) => {
            vec![content("application/json", json(generator)), content(EVENT_STREAM, event(generator))]
        }
        BodyKind::Ndjson(schema) => vec![content(NDJSON, schema(generator))],
        BodyKind::Text(media) => vec![json!({"media": media, "schema": {"type": "string"}})],
    };
    let mut content = Map::new();
    for body in bodies {
        let media = body["media"].as_str().unwrap_or_default();
        // OpenAPI 3.1 has no word for the items of a stream; 3.2's `itemSchema` is allowed as an extension.
        let streamed = [EVENT_STREAM, NDJSON].contains(&media);
        let key = if streamed { "x-itemSchema" } else { "schema" };
        let mut value = json!({key: body["schema"]});
        if streamed {
            value["schema"] = json!({"type": "string"});
        }
        content.insert(media.to_owned(), value);
    }
    responses.insert(route.status.to_string(), json!({"description": route.summary, "content": content}));
    let mut errors = [&[400, 401, 500], route.errors].concat();
    // Any body must be JSON.
    errors.extend(route.request.map(|_| 415));
    errors.sort_unstable();
    for status in errors {
        responses.insert(status.to_string(), json!({"$ref": "#/components/responses/Error"}));
    }
    let mut operation = json!({"operationId": route.operation, "summary": route.summary});
    if !parameters.is_empty() {
        operation["parameters"] = Value::Array(parameters);
    }
    if let Some(request) = route.request {
        let schema = request(generator);
        operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
    }
    operation["responses"] = Value::Object(responses);
    operation
}

fn path_parameters(path: &str) -> Vec<Value> {
    path.split('/')
        .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
        .map(|name| {
            let schema = match name {
                "run" => json!({"type": "string", "pattern": "^run_[0-9]+$"}),
                "release" => json!({"type": "integer", "minimum": 1}),
                _ => json!({"type": "string", "pattern": "^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$"}),
            };
            json!({"name": name, "in": "path", "required": true, "schema": schema})
        })
        .collect()
}

/// The fields of an object schema as parameters. Its definition is taken out of the document again.
fn query_parameters(query: crate::routes::SchemaOf, generator: &mut SchemaGenerator) -> Vec<Value> {
    let schema = query(generator);
    let name = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.rsplit('/').next()).map(str::to_owned);
    let definition = name.and_then(|name| generator.definitions_mut().shift_remove(&name));
    let definition = definition.unwrap_or_else(|| schema.to_value());
    let properties = definition.get("properties").and_then(Value::as_object).cloned().unwrap_or_default();
    properties
        .into_iter()
        .map(|(name, mut schema)| {
            let description = schema.as_object_mut().and_then(|object| object.shift_remove("description"));
            json!({"name": name, "in": "query", "description": description, "schema": schema})
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn references(value: &Value, found: &mut BTreeSet<String>) {
        match value {
            Value::Object(map) => {
                if let Some(Value::String(reference)) = map.get("$ref") {
                    found.insert(reference.clone());
                }
                map.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        let document = document();
        let mut found = BTreeSet::new();
        references(&document, &mut found);
        assert!(found.len() > 20, "{found:?}");
        for reference in found {
            let pointer = reference.strip_prefix('#').unwrap();
            assert!(document.pointer(pointer).is_some(), "{reference}");
        }
    }

    #[test]
    fn operations_are_unique() {
        let names: BTreeSet<_> = ROUTES.iter().map(|route| route.operation).collect();
        let places: BTreeSet<_> = ROUTES.iter().map(|route| (route.method, route.path)).collect();
        assert_eq!((names.len(), places.len()), (ROUTES.len(), ROUTES.len()));
    }

    #[test]
    fn the_checked_in_document_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../api/openapi.json");
        let checked_in = std::fs::read_to_string(path).unwrap();
        let checked_in: Value = serde_json::from_str(&checked_in).unwrap();
        assert!(checked_in == document(), "api/openapi.json is stale: run `cargo xtask openapi`");
    }
}
