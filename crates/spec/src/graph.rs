//! Waits that can never end.
//!
//! A resource passes two points: it is started, and it is done (ready or completed). `depends_on` lets a start wait for
//! a point of another resource; a `dependency` check lets readiness wait for another one's readiness. Any cycle of
//! `depends_on` alone is refused, because order and reverse order come from it; a cycle that needs a check to close is
//! refused only if the points themselves form one, since then nobody would ever get ready.

use std::collections::{BTreeMap, VecDeque};

use orchestra_model::{ResourceId, ResourceKind, desired::Condition, diagnostic::Code};

use crate::{report::Report, source::Span};

/// One resource waits for another.
#[derive(Clone, Debug)]
pub(crate) struct Edge {
    from: ResourceId,
    to: ResourceId,
    until: Condition,
    /// It is a check of readiness, not a dependency of the start.
    health: bool,
    span: Span,
}

impl Edge {
    /// From `depends_on`.
    pub(crate) fn new(from: ResourceId, to: &ResourceId, until: Condition, span: Span) -> Self {
        Self { from, to: to.clone(), until, health: false, span }
    }

    /// From a `dependency` check.
    pub(crate) fn health(from: ResourceId, to: &ResourceId, span: Span) -> Self {
        Self { from, to: to.clone(), until: Condition::Ready, health: true, span }
    }
}

/// Arcs looked at when shortest cycles are searched: enough for any stack a person wrote, and a bound for the rest.
const SEARCH: usize = 4_000_000;

/// Lines of a cycle that are drawn.
const MAX_LABELS: usize = 40;

/// Reports one shortest cycle per knot of resources that wait for each other.
pub(crate) fn check(report: &mut Report<'_>, edges: &[Edge]) {
    let mut numbers: BTreeMap<&ResourceId, usize> = BTreeMap::new();
    for edge in edges.iter().filter(|edge| edge.to.kind != ResourceKind::Volume) {
        for id in [&edge.from, &edge.to] {
            let next = numbers.len();
            numbers.entry(id).or_insert(next);
        }
    }
    let waits = |edge: &&Edge| edge.to.kind != ResourceKind::Volume;

    let starts: Vec<(usize, usize, Option<usize>)> = (edges.iter().enumerate().filter(|(_, e)| !e.health && waits(e)))
        .map(|(index, edge)| (numbers[&edge.from], numbers[&edge.to], Some(index)))
        .collect();
    let cycles = shortest_cycles(numbers.len(), &starts);
    if cycles.is_empty() {
        // Point 2n: started; 2n + 1: ready or completed.
        let own = (0..numbers.len()).map(|n| (2 * n + 1, 2 * n, None));
        let points: Vec<_> = (edges.iter().enumerate().filter(|(_, e)| waits(e)))
            .map(|(index, edge)| {
                let done = usize::from(edge.until != Condition::Started);
                (2 * numbers[&edge.from] + usize::from(edge.health), 2 * numbers[&edge.to] + done, Some(index))
            })
            .chain(own)
            .collect();
        for cycle in shortest_cycles(2 * numbers.len(), &points) {
            explain(report, edges, &cycle);
        }
    }
    for cycle in cycles {
        explain(report, edges, &cycle);
    }
}

fn explain(report: &mut Report<'_>, edges: &[Edge], cycle: &[usize]) {
    let Some(first) = cycle.first().map(|index| &edges[*index]) else { return };
    let word = |edge: &Edge| if edge.health { "is ready only when" } else { "waits for" };
    let end = |edge: &Edge| if edge.health { " is" } else { "" };
    let label = |edge: &Edge| format!("`{}` {} `{}`{}", edge.from.name, word(edge), edge.to.name, end(edge));
    let message = || {
        if cycle.len() == 1 {
            return format!("`{}` waits for itself", first.from.name);
        }
        let shown = 12;
        let mut names: Vec<String> =
            cycle.iter().take(shown).map(|index| format!("`{}`", edges[*index].from.name)).collect();
        if cycle.len() > shown {
            names.push(format!("{} more", cycle.len() - shown));
        }
        names.push(format!("`{}`", first.from.name));
        format!("{} wait for each other", names.join(" → "))
    };
    report.error(Code::DEPENDENCY_CYCLE, first.span, message, |mut diagnostic, sources| {
        diagnostic.labels[0].message = label(first);
        for edge in cycle.iter().take(MAX_LABELS).skip(1).map(|index| &edges[*index]) {
            diagnostic = diagnostic.at(sources.location(edge.span), label(edge));
        }
        if cycle.len() > MAX_LABELS {
            diagnostic = diagnostic.note(format!("{} more lines are not shown", cycle.len() - MAX_LABELS));
        }
        diagnostic.help("remove one of these dependencies")
    });
}

/// Where an arc leads, and its tag.
type Arc = (usize, Option<usize>);

/// For each strongly connected component with a cycle, the tags of the arcs of a shortest one, beginning at its
/// smallest node.
fn shortest_cycles(nodes: usize, arcs: &[(usize, usize, Option<usize>)]) -> Vec<Vec<usize>> {
    let mut out: Vec<Vec<Arc>> = vec![Vec::new(); nodes];
    for (from, to, tag) in arcs {
        out[*from].push((*to, *tag));
    }
    let component = components(&out);
    let mut members: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (node, component) in component.iter().enumerate() {
        members.entry(*component).or_default().push(node);
    }
    let mut budget = SEARCH;
    let mut came = vec![(usize::MAX, 0, None); nodes];
    let mut cycles = Vec::new();
    for members in members.values() {
        let mut best: Option<Vec<Arc>> = None;
        for start in members {
            if budget == 0 && best.is_some() {
                break;
            }
            let limit = best.as_ref().map_or(usize::MAX, Vec::len);
            if let Some(cycle) = cycle_through(*start, &out, &component, limit, &mut came, &mut budget) {
                best = Some(cycle);
            }
        }
        cycles.extend(best.map(|cycle| cycle.into_iter().filter_map(|(_, tag)| tag).collect::<Vec<_>>()));
    }
    cycles.sort();
    cycles
}

/// A shortest cycle through `start` with fewer than `limit` arcs, by breadth-first search within its component.
/// `came` holds for each node the start of the search that saw it last, and from where.
fn cycle_through(
    start: usize,
    out: &[Vec<Arc>],
    component: &[usize],
    limit: usize,
    came: &mut [(usize, usize, Option<usize>)],
    budget: &mut usize,
) -> Option<Vec<Arc>> {
    let mut queue = VecDeque::from([(start, 0)]);
    while let Some((node, distance)) = queue.pop_front() {
        if distance + 1 >= limit {
            return None;
        }
        for (next, tag) in &out[node] {
            *budget = budget.saturating_sub(1);
            if *next == start {
                let mut cycle = vec![(node, *tag)];
                let mut at = node;
                while at != start {
                    let (_, previous, tag) = came[at];
                    cycle.push((previous, tag));
                    at = previous;
                }
                cycle.reverse();
                return Some(cycle);
            }
            if component[*next] == component[start] && came[*next].0 != start {
                came[*next] = (start, node, *tag);
                queue.push_back((*next, distance + 1));
            }
        }
    }
    None
}

/// Strongly connected components (Tarjan's algorithm, without recursion): the number of each node's component.
fn components(out: &[Vec<Arc>]) -> Vec<usize> {
    const NONE: usize = usize::MAX;
    let mut index = vec![NONE; out.len()];
    let mut low = vec![0; out.len()];
    let mut component = vec![NONE; out.len()];
    let (mut next, mut found) = (0, 0);
    let mut open = Vec::new();
    let mut work: Vec<(usize, usize)> = Vec::new();
    for root in 0..out.len() {
        if index[root] != NONE {
            continue;
        }
        work.push((root, 0));
        while let Some((node, arc)) = work.pop() {
            if arc == 0 {
                index[node] = next;
                low[node] = next;
                next += 1;
                open.push(node);
            }
            if let Some((child, _)) = out[node].get(arc) {
                work.push((node, arc + 1));
                if index[*child] == NONE {
                    work.push((*child, 0));
                } else if component[*child] == NONE {
                    low[node] = low[node].min(index[*child]);
                }
                continue;
            }
            if low[node] == index[node] {
                while let Some(member) = open.pop() {
                    component[member] = found;
                    if member == node {
                        break;
                    }
                }
                found += 1;
            }
            if let Some((parent, _)) = work.last() {
                low[*parent] = low[*parent].min(low[node]);
            }
        }
    }
    component
}
