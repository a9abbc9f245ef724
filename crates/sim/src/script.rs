//! Text scenarios.

use orchestra_model::Event;

/// An event as one line.
pub fn event_line(event: &Event) -> String {
    let subject = match (&event.instance, &event.resource) {
        (Some(instance), _) => instance.to_string(),
        (None, Some(resource)) => resource.to_string(),
        (None, None) => event.run.map(|run| run.to_string()).unwrap_or_default(),
    };
    format!("{:<20} {subject:<14} {}", event.kind.as_str(), event.cause)
}
