//! From a spec with holes to a launch without: ports, addresses, variables, and the leaves of checks.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
};

use orchestra_model::{
    InstanceId, Name, Now, ResourceId, Text,
    desired::{Check, Program},
    launch::{Launch, LaunchKey},
    record::{Change, JournalKind},
    text::Reference,
};

use super::{Environment, launch_intent, workload::Want};
use crate::{Effect, Leaf, ProbeKey, ProbeTarget, Which, instance::Phase};

impl Environment {
    /// What keeps an instance of `want` from being launched.
    pub(super) fn launch_obstacle(&self, id: &ResourceId, want: &Want) -> Option<String> {
        if want.resource.as_service().is_some_and(|s| !s.ports.is_empty()) && !self.routes.bound(&id.name) {
            return Some("the proxy to listen on its addresses".to_owned());
        }
        if let Some(obstacle) = self.flags_obstacle() {
            return Some(obstacle);
        }
        let program = want.resource.program()?;
        let texts = program.command.iter().chain(program.env.values());
        let missing = texts.flat_map(Text::references).find(|reference| self.stack_value(reference).is_none())?;
        match missing {
            Reference::ServicePort { service, port } | Reference::ServiceUrl { service, port } => {
                Some(format!("the address of port {port} of service {service}"))
            }
            Reference::InstanceId
            | Reference::InstanceOrdinal
            | Reference::InstancePort { .. }
            | Reference::Secret { .. } => None,
        }
    }

    /// The value of a reference that does not depend on the instance; an empty text stands for those that do, and for
    /// secrets, which whoever starts the program fills in.
    fn stack_value(&self, reference: &Reference) -> Option<String> {
        match reference {
            Reference::ServicePort { service, port } => {
                self.published(service, port).map(|(_, number)| number.to_string())
            }
            Reference::ServiceUrl { service, port } => self.published(service, port).map(|(url, _)| url),
            Reference::InstanceId
            | Reference::InstanceOrdinal
            | Reference::InstancePort { .. }
            | Reference::Secret { .. } => Some(String::new()),
        }
    }

    /// URL and number of a published port, once it is known.
    pub(super) fn published(&self, service: &Name, port: &Name) -> Option<(String, u16)> {
        let workload = self.workloads.get(&super::service_id(service))?;
        let resource = workload.want.as_ref().map(|w| &w.resource).or(workload.last.as_ref())?;
        let published = resource.as_service()?.ports.get(port)?;
        let chosen = || self.record.chosen_ports.get(service).and_then(|ports| ports.get(port)).copied();
        let number = published.port.or_else(chosen)?;
        Some((published.url(number), number))
    }

    fn text(&self, text: &Text, instance: &InstanceId, ports: &BTreeMap<Name, u16>) -> String {
        let filled = text.fill(|reference| self.value(reference, instance, ports));
        // `launch_obstacle` has seen to it that there is a value for each.
        filled.unwrap_or_default()
    }

    fn value(&self, reference: &Reference, instance: &InstanceId, ports: &BTreeMap<Name, u16>) -> Option<String> {
        match reference {
            Reference::InstanceId => Some(instance.to_string()),
            Reference::InstanceOrdinal => Some(instance.ordinal.to_string()),
            Reference::InstancePort { port } => ports.get(port).map(ToString::to_string),
            other => self.stack_value(other),
        }
    }

    /// For each port whether it is taken, as far as this environment knows.
    pub(super) fn used_ports(&self) -> Vec<bool> {
        let mut used = vec![false; usize::from(u16::MAX) + 1];
        let of_instances = self.instances.values().flat_map(|instance| instance.record().ports.values());
        for port in of_instances.chain(self.record.chosen_ports.values().flat_map(BTreeMap::values)) {
            used[usize::from(*port)] = true;
        }
        used
    }

    /// Chooses ports for the next attempt that are not `used`, and marks them. The driver verifies them; a taken one comes
    /// back as `PortsTaken`.
    pub(super) fn choose_ports(&mut self, want: &Want, used: &mut [bool]) -> BTreeMap<Name, u16> {
        let Some(program) = want.resource.program() else { return BTreeMap::new() };
        let (first, last) = self.settings.ports;
        let size = u64::from(last.saturating_sub(first)) + 1;
        let mut chosen = BTreeMap::new();
        for name in &program.ports {
            let start = self.rng.below(size);
            let port = (0..size)
                .map(|offset| first + u16::try_from((start + offset) % size).unwrap_or(0))
                .find(|port| !used[usize::from(*port)])
                .unwrap_or(first);
            used[usize::from(port)] = true;
            chosen.insert(name.clone(), port);
        }
        chosen
    }

    /// Emits the launch of an instance's current attempt, after its intent.
    pub(super) fn launch(&mut self, id: &InstanceId) {
        let Some(instance) = self.instances.get(id) else { return };
        let record = instance.record();
        let resource = ResourceId::new(record.kind, id.workload.clone());
        let Some(workload) = self.workloads.get(&resource) else { return };
        let Some(want) = workload.want_of(&record.launch_digest).or(workload.want.as_ref()).cloned() else { return };
        let Some(program) = want.resource.program() else { return };
        let key = self.launch_key(id, record.attempt);
        let launch = self.build_launch(key.clone(), program, &record.ports);
        self.journal(launch_intent(&key), JournalKind::Intent);
        self.out.effects.push(Effect::Launch(Box::new(launch)));
    }

    fn build_launch(&self, key: LaunchKey, program: &Program, ports: &BTreeMap<Name, u16>) -> Launch {
        let id = &key.instance;
        let mut env = self.settings.base_env.clone();
        env.insert("ORCHESTRA_STACK".to_owned(), key.environment.stack.to_string());
        env.insert("ORCHESTRA_ENVIRONMENT".to_owned(), key.environment.environment.to_string());
        env.insert("ORCHESTRA_SERVICE".to_owned(), id.workload.to_string());
        env.insert("ORCHESTRA_INSTANCE".to_owned(), id.to_string());
        env.insert("ORCHESTRA_RELEASE".to_owned(), id.release.to_string());
        if let Some(endpoint) = self.flags_endpoint() {
            // Not part of what an instance is made from: flags that come later restart nothing.
            env.insert("OFREP_ENDPOINT".to_owned(), endpoint);
        }
        for (name, port) in ports {
            let name = name.as_str().to_ascii_uppercase().replace('-', "_");
            env.insert(format!("PORT_{name}"), port.to_string());
        }
        // `$PORT` is the port named `http`, or the only one.
        let main = ports.iter().find(|(name, _)| name.as_str() == "http").or(if ports.len() == 1 {
            ports.iter().next()
        } else {
            None
        });
        if let Some((_, port)) = main {
            env.insert("PORT".to_owned(), port.to_string());
        }
        let mut secrets = BTreeMap::new();
        for (name, value) in &program.env {
            if value.is_secret() {
                env.remove(name);
                let filled = value.fill_but_secrets(|reference| self.value(reference, id, ports));
                secrets.insert(name.clone(), filled.unwrap_or_default());
            } else {
                env.insert(name.clone(), self.text(value, id, ports));
            }
        }
        Launch {
            command: program.command.iter().map(|text| self.text(text, id, ports)).collect(),
            directory: program.directory.clone(),
            env,
            secrets,
            user: program.user.clone(),
            umask: program.umask.unwrap_or(0o022),
            limits: program.limits.clone(),
            resources: program.resources.clone(),
            ports: ports.clone(),
            ready_line: program.ready_line.clone(),
            notify: program.notify,
            watchdog: program.watchdog,
            log_max_bytes: self.settings.log_max_bytes,
            log_keep: self.settings.log_keep,
            key,
        }
    }

    /// Somebody else took a port between choice and launch: choose again. Nothing was started.
    pub(super) fn ports_taken(&mut self, now: Now, key: &LaunchKey) {
        self.journal(launch_intent(key), JournalKind::Failed("a port was taken".to_owned()));
        let Some(instance) = self.instances.get(&key.instance) else { return };
        if instance.record().attempt != key.attempt || *instance.phase() != Phase::Launching {
            return;
        }
        let problem = orchestra_model::Diagnostic::error(
            orchestra_model::Code::ADDRESS_IN_USE,
            format!("a port chosen for {} was taken by another program", key.instance),
        );
        let retry = Some(std::time::Duration::ZERO);
        self.tell_attempt(now, key, crate::instance::Event::LaunchFailed { problem, retry });
    }

    /// Emits the questions of a check, at the rate that fits the instance's phase.
    pub(super) fn start_probes(&mut self, id: &InstanceId, which: Which) {
        let Some(instance) = self.instances.get(id) else { return };
        let Some(health) = instance.health(which) else { return };
        let record = instance.record();
        let probe = health.probe();
        let every = if instance.is_first_start() { probe.every_starting } else { probe.every };
        let timeout = probe.timeout;
        let launch = self.launch_key(id, record.attempt);
        let mut effects = Vec::new();
        for (leaf, check) in health.leaves() {
            let address = |port: &Name| {
                let number = record.ports.get(port).copied().unwrap_or(0);
                SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), number)
            };
            let target = match check {
                Check::Http { port, method, path, headers, body, status, contains } => Leaf::Http {
                    address: address(port),
                    method: method.clone(),
                    path: path.clone(),
                    headers: headers.clone(),
                    body: body.clone(),
                    status: status.iter().copied().collect(),
                    contains: contains.clone(),
                },
                Check::Tcp { port } => Leaf::Tcp { address: address(port) },
                Check::Grpc { port, service } => Leaf::Grpc { address: address(port), service: service.clone() },
                Check::Exec { command } => {
                    Leaf::Exec { command: command.iter().map(|text| self.text(text, id, &record.ports)).collect() }
                }
                // Facts, not questions; composites are not leaves.
                Check::Log
                | Check::Notify
                | Check::Dependency { .. }
                | Check::All(_)
                | Check::Any(_)
                | Check::AtLeast { .. } => continue,
            };
            let key = ProbeKey { instance: id.clone(), attempt: record.attempt, which, leaf };
            let target = ProbeTarget { launch: launch.clone(), leaf: target };
            effects.push(Effect::StartProbe { key, target, every, timeout });
        }
        self.out.effects.extend(effects);
    }

    /// Writes an instance's record down.
    pub(super) fn persist(&mut self, id: &InstanceId) {
        if let Some(instance) = self.instances.get(id) {
            self.out.changes.push(Change::Instance(Box::new(instance.record().clone())));
        }
    }
}
