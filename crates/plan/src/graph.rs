//! Order: topological, ties broken by rank and id, so that it depends on nothing but the graph.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
};

use orchestra_model::{Resource, ResourceId, desired::Dependency};

use crate::error::PlanError;

/// Edges of a resource without a copy.
pub(crate) fn edges(resource: &Resource) -> Option<&BTreeMap<ResourceId, Dependency>> {
    match resource {
        Resource::Volume(_) => None,
        Resource::Job(job) => Some(&job.depends_on),
        Resource::Service(service) => Some(&service.depends_on),
    }
}

/// Ids in an order in which each comes after all that it depends on; smaller ids first where that leaves a choice.
/// Fails on an edge that leads out of the map, and on the shortest cycle.
pub(crate) fn order(resources: &BTreeMap<ResourceId, Resource>) -> Result<Vec<&ResourceId>, PlanError> {
    // Positions in the sorted map stand for ids: comparing numbers is comparing ids.
    let ids: Vec<&ResourceId> = resources.keys().collect();
    let mut waits = vec![0_usize; ids.len()];
    let mut dependents = vec![Vec::new(); ids.len()];
    for (at, (id, resource)) in resources.iter().enumerate() {
        for to in edges(resource).into_iter().flat_map(BTreeMap::keys) {
            let Ok(target) = ids.binary_search(&to) else {
                return Err(PlanError::UnknownDependency { from: id.clone(), to: to.clone() });
            };
            waits[at] += 1;
            dependents[target].push(at);
        }
    }
    let mut free: BinaryHeap<Reverse<usize>> =
        waits.iter().enumerate().filter(|(_, n)| **n == 0).map(|(at, _)| Reverse(at)).collect();
    let mut order = Vec::with_capacity(ids.len());
    while let Some(Reverse(at)) = free.pop() {
        order.push(ids[at]);
        for dependent in &dependents[at] {
            waits[*dependent] -= 1;
            if waits[*dependent] == 0 {
                free.push(Reverse(*dependent));
            }
        }
    }
    if order.len() == ids.len() {
        return Ok(order);
    }
    let stuck = (0..ids.len()).filter(|at| waits[*at] > 0);
    let cycle = stuck.filter_map(|start| cycle_through(resources, ids[start])).min_by_key(Vec::len);
    Err(PlanError::Cycle { cycle: cycle.expect("what cannot be ordered lies on or behind a cycle") })
}

/// The shortest cycle through `start`, breadth first.
fn cycle_through(resources: &BTreeMap<ResourceId, Resource>, start: &ResourceId) -> Option<Vec<ResourceId>> {
    let mut from: BTreeMap<&ResourceId, &ResourceId> = BTreeMap::new();
    let mut queue = VecDeque::from([start]);
    while let Some(id) = queue.pop_front() {
        let Some((_, resource)) = resources.get_key_value(id) else { continue };
        for to in edges(resource).into_iter().flat_map(BTreeMap::keys) {
            if to == start {
                let mut path = vec![id.clone()];
                let mut at = id;
                while let Some(previous) = from.get(at) {
                    path.push((*previous).clone());
                    at = previous;
                }
                path.reverse();
                return Some(path);
            }
            if !from.contains_key(to) {
                from.insert(to, id);
                queue.push_back(to);
            }
        }
    }
    None
}

/// Ids of what is deleted, each after all that depends on it, smaller ids first where that leaves a choice.
///
/// The edges come from records of different releases, so that after a run that failed half-way they may form a cycle.
/// That must not keep anybody from taking things down: then the smallest id goes first, and the waits that it would have
/// are dropped. Returns ids with the dependents that each waits for.
pub(crate) fn deletion_order<'a>(
    doomed: &BTreeMap<&'a ResourceId, &'a BTreeMap<ResourceId, Dependency>>,
) -> Vec<(&'a ResourceId, BTreeSet<&'a ResourceId>)> {
    let mut waits: BTreeMap<&ResourceId, BTreeSet<&ResourceId>> =
        doomed.keys().map(|id| (*id, BTreeSet::new())).collect();
    for (dependent, edges) in doomed {
        for to in edges.keys().filter(|to| to != dependent) {
            if let Some(waits) = waits.get_mut(to) {
                waits.insert(dependent);
            }
        }
    }
    let mut left: BTreeMap<&ResourceId, usize> = waits.iter().map(|(id, waits)| (*id, waits.len())).collect();
    let mut free: BTreeSet<&ResourceId> = left.iter().filter(|(_, n)| **n == 0).map(|(id, _)| *id).collect();
    let mut order = Vec::with_capacity(doomed.len());
    let mut done = BTreeSet::new();
    while !left.is_empty() {
        // Without a free one there is a cycle among those left.
        let next = free.pop_first().unwrap_or_else(|| left.keys().next().copied().expect("it is not empty"));
        left.remove(next);
        let mut wait = waits.remove(next).unwrap_or_default();
        wait.retain(|dependent| done.contains(dependent));
        order.push((next, wait));
        done.insert(next);
        let (_, edges) = doomed.get_key_value(next).expect("it came from there");
        for to in edges.keys() {
            if let Some(n) = left.get_mut(to) {
                *n = n.saturating_sub(1);
                if *n == 0
                    && let Some((id, _)) = doomed.get_key_value(to)
                {
                    free.insert(id);
                }
            }
        }
    }
    order
}
