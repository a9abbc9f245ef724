//! The control plane's own metrics in Prometheus text format 0.0.4. Names and labels come from validated names, so
//! nothing needs escaping.

use std::{collections::BTreeMap, fmt::Write as _};

use orchestra_engine::View;
use orchestra_model::ResourceKind;

/// Appends the metrics.
pub(crate) fn write(text: &mut String, views: &[View]) {
    let mut phases: BTreeMap<(String, String, &str), u32> = BTreeMap::new();
    let mut ready = String::new();
    let mut desired = String::new();
    let mut restarts = String::new();
    for view in views {
        let environment = &view.record.id;
        for resource in view.status.resources.iter().filter(|r| r.id.kind == ResourceKind::Service) {
            let labels = format!("environment=\"{environment}\",service=\"{}\"", resource.id.name);
            let _ = writeln!(ready, "orchestra_service_instances_ready{{{labels}}} {}", resource.ready);
            let _ = writeln!(desired, "orchestra_service_instances_desired{{{labels}}} {}", resource.replicas);
            let count: u32 = resource.instances.iter().map(|i| i.restarts).sum();
            let _ = writeln!(restarts, "orchestra_service_instance_restarts{{{labels}}} {count}");
            for instance in &resource.instances {
                *phases.entry((environment.to_string(), resource.id.name.to_string(), instance.phase)).or_default() +=
                    1;
            }
        }
    }
    let mut family = |name: &str, help: &str, lines: &str| {
        if !lines.is_empty() {
            let _ = write!(text, "# HELP {name} {help}\n# TYPE {name} gauge\n{lines}");
        }
    };
    family("orchestra_service_instances_ready", "Instances that are ready.", &ready);
    family("orchestra_service_instances_desired", "Instances that are wanted.", &desired);
    family("orchestra_service_instance_restarts", "Restarts of the instances that exist.", &restarts);
    let mut lines = String::new();
    for ((environment, service, phase), count) in phases {
        let labels = format!("environment=\"{environment}\",service=\"{service}\",phase=\"{phase}\"");
        let _ = writeln!(lines, "orchestra_instances{{{labels}}} {count}");
    }
    family("orchestra_instances", "Instances by phase.", &lines);
}
