//! Services and jobs.

use std::collections::{BTreeMap, BTreeSet};

use orchestra_model::{
    Name, ResourceKind,
    desired::{Health, Job, Port, Restart, RestartPolicy, Service},
    quantity::Timespan,
};

use super::{Decoder, Fields, Scope, choice, integer, invalid, program::Workload, timespan};
use crate::{
    graph::Edge,
    report::Report,
    table::Table,
    tables,
    yaml::{Entry, Scalar, Value},
};

impl<'d, 'n, 'a> Decoder<'d, 'n, 'a> {
    /// A decoder without a workload yet.
    pub(crate) fn new(
        report: &'d mut Report<'a>,
        scope: &'d Scope<'n, 'a>,
        expanded: &'d mut usize,
        edges: &'d mut Vec<Edge>,
        kind: ResourceKind,
        name: Name,
    ) -> Self {
        let workload = Workload { kind, name };
        Self {
            report,
            scope,
            expanded,
            edges,
            workload,
            used_volumes: BTreeSet::new(),
            ready_line: None,
            notify: false,
        }
    }

    pub(crate) fn service(mut self, entry: &'n Entry<'a>) -> Option<Service> {
        let fields = Fields::read(self.report, &entry.value, &tables::SERVICE, entry.key_span)?;
        let outline = self.scope.services.get(&self.workload.name)?;
        let mut program = self.program(&fields);
        let health = self.health(&fields, &outline.ports, outline.broken);
        program.ports = outline.ports.keys().cloned().collect();
        program.ready_line = self.ready_line.take().map(|(pattern, _)| pattern);
        program.notify = self.notify;
        program.watchdog = fields.get("watchdog").and_then(|entry| self.watchdog(entry));
        let restart = self.restart(&fields);
        let rollout = self.rollout(&fields, outline.replicas);
        let scale = fields.get("scale").and_then(|entry| self.scale(&fields, entry, &program.resources));
        let metrics = self.exporter(&fields, outline, &rollout, scale.as_ref());
        let stop = self.stop(&fields);
        Some(Service {
            program,
            replicas: outline.replicas,
            scale,
            metrics,
            restarts: 0,
            ports: self.ports(&fields, outline),
            depends_on: self.depends_on(&fields),
            health,
            restart,
            stop,
            rollout,
        })
    }

    pub(crate) fn job(mut self, entry: &'n Entry<'a>) -> Option<Job> {
        let fields = Fields::read(self.report, &entry.value, &tables::JOB, entry.key_span)?;
        let program = self.program(&fields);
        let stop = self.stop(&fields);
        Some(Job {
            program,
            depends_on: self.depends_on(&fields),
            retries: fields.integer(self.report, "retries", 0..=1_000),
            timeout: fields.positive(self.report, "timeout"),
            backoff: fields.timespan(self.report, "backoff"),
            stop,
        })
    }

    fn health(&mut self, fields: &Fields<'n, 'a>, ports: &BTreeMap<Name, Port>, broken: bool) -> Health {
        let fields = self.section(fields, "health", &tables::HEALTH);
        let ready = match fields.get("ready") {
            Some(entry) if matches!(&entry.value.value, Value::Scalar(Scalar::Text, text) if text == tables::NO_CHECK) => {
                None
            }
            Some(entry) => self.probe(entry, &tables::READY, ports, broken),
            None => self.ports_accept(ports),
        };
        let live = fields.get("live").and_then(|entry| self.probe(entry, &tables::LIVE, ports, broken));
        Health { ready, live, start_deadline: fields.positive(self.report, "start_deadline") }
    }

    /// The mapping under a key, or one without keys.
    pub(super) fn section(&mut self, fields: &Fields<'n, 'a>, key: &str, table: &'static Table) -> Fields<'n, 'a> {
        let entry = fields.get(key);
        let section = entry.and_then(|entry| Fields::read(self.report, &entry.value, table, entry.key_span));
        section.unwrap_or_else(|| Fields::empty(table))
    }

    fn restart(&mut self, fields: &Fields<'n, 'a>) -> Restart {
        const POLICIES: &[(&str, RestartPolicy)] = &[
            ("always", RestartPolicy::Always),
            ("on_failure", RestartPolicy::OnFailure),
            ("never", RestartPolicy::Never),
        ];
        let mut short = None;
        let fields = match fields.get("restart") {
            Some(entry) if matches!(entry.value.value, Value::Scalar(..)) => {
                short = self.restart_word(entry, POLICIES);
                Fields::empty(&tables::RESTART)
            }
            _ => self.section(fields, "restart", &tables::RESTART),
        };
        let budget = fields.get("budget");
        let unlimited =
            budget.is_some_and(|b| matches!(&b.value.value, Value::Scalar(Scalar::Text, text) if text == "unlimited"));
        let restart = Restart {
            policy: short.unwrap_or_else(|| fields.choice(self.report, "policy", POLICIES)),
            backoff: fields.timespan(self.report, "backoff"),
            max_backoff: fields.timespan(self.report, "max_backoff"),
            reset_after: fields.timespan(self.report, "reset_after"),
            budget: (!unlimited).then(|| fields.integer(self.report, "budget", 0..=1_000_000)),
        };
        if restart.max_backoff < restart.backoff
            && let Some(entry) = fields.get("max_backoff").or_else(|| fields.get("backoff"))
        {
            let message =
                || format!("`max_backoff` ({}) is shorter than `backoff` ({})", restart.max_backoff, restart.backoff);
            invalid(self.report, entry.value.span, message, "make `max_backoff` at least as long as `backoff`");
        }
        restart
    }

    /// A policy as a single word, with hints for the words of Compose.
    fn restart_word(&mut self, entry: &Entry<'_>, policies: &[(&str, RestartPolicy)]) -> Option<RestartPolicy> {
        if let Value::Scalar(Scalar::Text | Scalar::Boolean, word) = &entry.value.value {
            let ours = match word.as_ref() {
                "no" | "false" => "never",
                "unless-stopped" | "unless_stopped" | "true" | "yes" => "always",
                _ => "",
            };
            if !ours.is_empty() {
                let message = || format!("`{word}` is not one of `always`, `on_failure`, `never`");
                invalid(self.report, entry.value.span, message, &format!("write `restart: {ours}`"));
                return None;
            }
        }
        choice(self.report, &entry.value, policies)
    }

    fn watchdog(&mut self, entry: &Entry<'_>) -> Option<Timespan> {
        let span = timespan(self.report, &entry.value)?;
        if span == Timespan::default() {
            invalid(
                self.report,
                entry.value.span,
                || "`watchdog` must be longer than 0".to_owned(),
                "delete the key for none",
            );
        }
        Some(span)
    }

    /// One or several numbers in a range.
    pub(super) fn numbers(&mut self, entry: &Entry<'_>, from: u64, to: u64) -> BTreeSet<u16> {
        let items = match &entry.value.value {
            Value::List(items) => items.as_slice(),
            _ => std::slice::from_ref(&entry.value),
        };
        let numbers = items.iter().filter_map(|item| integer(self.report, item, from..=to));
        numbers.filter_map(|number| u16::try_from(number).ok()).collect()
    }
}
