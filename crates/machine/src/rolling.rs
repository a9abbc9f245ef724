//! The rolling strategy as arithmetic: given what there is, how many to start and which to retire now.
//!
//! It is level-triggered: it looks at what exists and takes the next allowed step, so it continues from any state,
//! including one that a crash left behind. With `max_surge` 0 an instance that is leaving still takes up room, so two
//! versions never overlap in what they occupy.

use orchestra_model::{
    InstanceId,
    desired::{Service, Strategy},
};

/// What matters of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Which.
    pub id: InstanceId,
    /// Launched with what the service wants now.
    pub current: bool,
    /// Ready as far as its own check goes.
    pub healthy: bool,
    /// Healthy, and the data plane has acknowledged that it sends requests there.
    pub ready: bool,
    /// Leaving, but not gone.
    pub leaving: bool,
    /// Given up.
    pub failed: bool,
}

/// The next allowed step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// Instances to add.
    pub start: u32,
    /// Instances to retire, in order.
    pub retire: Vec<InstanceId>,
}

/// Decides the next step towards `replicas` current instances.
pub fn decide(service: &Service, members: &[Member]) -> Decision {
    let replicas = service.replicas;
    let Strategy::Rolling { max_surge, max_unavailable } = service.rollout.strategy;
    let mut surge = max_surge.rounded_up(replicas);
    let unavailable = max_unavailable.rounded_down(replicas);
    if surge == 0 && unavailable == 0 {
        // Neither up nor down would never move (Kubernetes' rule is the same).
        surge = 1;
    }
    let staying = || members.iter().filter(|m| !m.leaving);
    let count = |it: &mut dyn Iterator<Item = &Member>| u32::try_from(it.count()).unwrap_or(u32::MAX);
    let current = count(&mut staying().filter(|m| m.current));
    let ready = count(&mut staying().filter(|m| m.ready));
    let occupied = if surge == 0 { count(&mut members.iter()) } else { count(&mut staying()) };
    let mut decision = Decision::default();

    // Too many of the current ones: those that are not ready leave first, then the youngest.
    if current > replicas {
        let mut surplus: Vec<&Member> = staying().filter(|m| m.current).collect();
        surplus.sort_by(|a, b| (a.healthy, a.ready).cmp(&(b.healthy, b.ready)).then_with(|| b.id.cmp(&a.id)));
        decision.retire.extend(surplus.iter().take((current - replicas) as usize).map(|m| m.id.clone()));
    }

    // Old ones that serve nobody leave at once; ready ones as far as enough others are ready. A healthy one that the data
    // plane has not acknowledged (after a recovery nothing is) may be serving: it counts for nobody and stays.
    let floor = replicas.saturating_sub(unavailable);
    let mut spare = ready.saturating_sub(floor);
    let mut old: Vec<&Member> = staying().filter(|m| !m.current).collect();
    old.sort_by(|a, b| a.id.cmp(&b.id));
    for member in old {
        if !member.healthy {
            decision.retire.push(member.id.clone());
        } else if member.ready && spare > 0 {
            spare -= 1;
            decision.retire.push(member.id.clone());
        }
    }

    let room = (replicas + surge).saturating_sub(occupied);
    decision.start = replicas.saturating_sub(current).min(room);
    decision
}
