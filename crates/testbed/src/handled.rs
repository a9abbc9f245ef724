//! What instances handled, as they recorded it: one line per begun and per finished request, appended to one file.

use std::{collections::BTreeMap, io, path::Path};

/// What was recorded of one request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Handled {
    /// Instances that began it, in order.
    pub begun: Vec<String>,
    /// Instances that finished it.
    pub finished: Vec<String>,
}

/// Reads the file that `HANDLED` names. Requests by their id.
pub fn read(path: &Path) -> io::Result<BTreeMap<String, Handled>> {
    let mut all: BTreeMap<String, Handled> = BTreeMap::new();
    for line in std::fs::read_to_string(path)?.lines() {
        let mut words = line.split(' ');
        let (Some(what), Some(id), Some(instance)) = (words.next(), words.next(), words.next()) else { continue };
        let handled = all.entry(id.to_owned()).or_default();
        match what {
            "begin" => handled.begun.push(instance.to_owned()),
            "end" => handled.finished.push(instance.to_owned()),
            _ => {}
        }
    }
    Ok(all)
}

/// Ids of requests that were begun more than once, whose id has this prefix.
pub fn twice(all: &BTreeMap<String, Handled>, prefix: &str) -> Vec<String> {
    all.iter()
        .filter(|(id, handled)| id.starts_with(prefix) && handled.begun.len() > 1)
        .map(|(id, handled)| format!("{id} by {}", handled.begun.join(", ")))
        .collect()
}
