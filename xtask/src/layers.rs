//! The layer check: every package is in the table, every edge leads downward, and no file is too long.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Longest source file, in lines. Longer ones hold more than one concept.
const MAX_LINES: usize = 1_500;
const PREFIX: &str = "orchestra-";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    layers: BTreeMap<String, u32>,
    #[serde(default)]
    apart: Apart,
    #[serde(default)]
    within: Vec<Edge>,
    #[serde(default)]
    dev_upward: Vec<Edge>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Apart {
    packages: BTreeSet<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Edge {
    from: String,
    to: String,
    reason: String,
}

/// A member of the workspace, by its name without prefix.
struct Package {
    name: String,
    folder: PathBuf,
    normal: BTreeSet<String>,
    build: BTreeSet<String>,
    dev: BTreeSet<String>,
}

/// Everything that is wrong with the workspace at `root`.
pub(crate) fn check(root: &Path) -> Vec<String> {
    match (table(root), packages(root)) {
        (Ok(table), Ok(packages)) => {
            let mut problems = edges(&table, &packages);
            for package in &packages {
                problems.extend(long_files(root, &package.folder));
            }
            problems
        }
        (table, packages) => [table.err(), packages.err()].into_iter().flatten().collect(),
    }
}

fn table(root: &Path) -> Result<Table, String> {
    let text = fs::read_to_string(root.join("xtask/layers.toml"))
        .map_err(|error| format!("xtask/layers.toml cannot be read: {error}"))?;
    toml::from_str(&text).map_err(|error| format!("xtask/layers.toml: {error}"))
}

fn packages(root: &Path) -> Result<Vec<Package>, String> {
    let manifest = manifest(&root.join("Cargo.toml"))?;
    let members = manifest.get("workspace").and_then(|workspace| workspace.get("members")?.as_array());
    let mut folders = BTreeSet::new();
    for member in members.into_iter().flatten().filter_map(toml::Value::as_str) {
        match member.strip_suffix("/*") {
            None => {
                folders.insert(root.join(member));
            }
            Some(parent) => {
                let entries = fs::read_dir(root.join(parent)).map_err(|error| format!("{parent}: {error}"))?;
                let found = entries.flatten().map(|entry| entry.path());
                folders.extend(found.filter(|folder| folder.join("Cargo.toml").is_file()));
            }
        }
    }
    folders.into_iter().map(package).collect()
}

fn manifest(path: &Path) -> Result<toml::Table, String> {
    let text = fs::read_to_string(path).map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    toml::from_str(&text).map_err(|error| format!("{}: {error}", path.display()))
}

fn package(folder: PathBuf) -> Result<Package, String> {
    let path = folder.join("Cargo.toml");
    let manifest = manifest(&path)?;
    let name = manifest.get("package").and_then(|package| package.get("name")?.as_str());
    let name = name.ok_or_else(|| format!("{}: it has no package.name", path.display()))?;
    // Dependencies of one platform count like all others.
    let targets = manifest.get("target").and_then(toml::Value::as_table);
    let tables: Vec<&toml::Table> = std::iter::once(&manifest)
        .chain(targets.into_iter().flatten().filter_map(|(_, target)| target.as_table()))
        .collect();
    let named = |kind: &str| {
        let dependencies = tables.iter().filter_map(|table| table.get(kind)?.as_table()).flatten();
        dependencies
            .map(|(key, value)| short(value.get("package").and_then(toml::Value::as_str).unwrap_or(key)))
            .collect()
    };
    Ok(Package {
        name: short(name),
        normal: named("dependencies"),
        build: named("build-dependencies"),
        dev: named("dev-dependencies"),
        folder,
    })
}

fn short(name: &str) -> String {
    name.strip_prefix(PREFIX).unwrap_or(name).to_owned()
}

fn edges(table: &Table, packages: &[Package]) -> Vec<String> {
    let mut problems = Vec::new();
    let ours: BTreeSet<&str> = packages.iter().map(|package| &package.name[..]).collect();
    let allowed = |edges: &[Edge], from: &str, to: &str| edges.iter().any(|edge| edge.from == from && edge.to == to);
    for package in packages {
        let from = &package.name;
        let dependencies: [(&str, &BTreeSet<String>); 3] =
            [("", &package.normal), ("build-", &package.build), ("dev-", &package.dev)];
        if table.apart.packages.contains(from) {
            for (kind, names) in dependencies {
                for to in names.iter().filter(|to| ours.contains(&to[..])) {
                    problems.push(format!("{from} stands apart, and has {to} as a {kind}dependency"));
                }
            }
            continue;
        }
        let Some(layer) = table.layers.get(from) else {
            problems.push(format!("{from} is not in xtask/layers.toml"));
            continue;
        };
        for (kind, names) in dependencies {
            for to in names.iter().filter(|to| ours.contains(&to[..])) {
                if table.apart.packages.contains(to) {
                    if kind != "dev-" {
                        problems.push(format!("{from} has {to} as a {kind}dependency, which is for tests only"));
                    }
                    continue;
                }
                let Some(below) = table.layers.get(to) else {
                    problems.push(format!("{from} has {to} as a {kind}dependency, which is in no layer"));
                    continue;
                };
                // A package may test itself with more of its features on.
                let is_allowed = below < layer
                    || (kind == "dev-" && from == to)
                    || (below == layer && allowed(&table.within, from, to))
                    || (kind == "dev-" && allowed(&table.dev_upward, from, to));
                if !is_allowed {
                    problems.push(format!(
                        "{from} (layer {layer}) has {to} (layer {below}) as a {kind}dependency: dependencies lead to lower layers"
                    ));
                }
            }
        }
    }
    problems.extend(table_problems(table, packages));
    problems
}

/// What is wrong with the table itself: entries for nothing, exceptions without use or reason, cycles.
fn table_problems(table: &Table, packages: &[Package]) -> Vec<String> {
    let mut problems = Vec::new();
    let find = |name: &str| packages.iter().find(|package| package.name == name);
    for name in table.layers.keys().chain(&table.apart.packages).filter(|name| find(name).is_none()) {
        problems.push(format!("xtask/layers.toml names {name}, which is no package"));
    }
    for (list, edges) in [("within", &table.within), ("dev_upward", &table.dev_upward)] {
        for edge in edges {
            let Edge { from, to, reason } = edge;
            if reason.trim().len() < 10 {
                problems.push(format!("xtask/layers.toml: {list} {from} -> {to} needs a reason"));
            }
            let used = find(from).is_some_and(|package| match list {
                "within" => package.normal.contains(to) || package.build.contains(to) || package.dev.contains(to),
                _ => package.dev.contains(to),
            });
            if !used {
                problems.push(format!("xtask/layers.toml: {list} {from} -> {to} is not used"));
            }
            let (a, b) = (table.layers.get(from), table.layers.get(to));
            if (list == "within" && a != b) || (list == "dev_upward" && a > b) {
                problems.push(format!("xtask/layers.toml: {list} {from} -> {to} does not fit the layers of the two"));
            }
        }
    }
    let mut left: Vec<(&str, &str)> = table.within.iter().map(|edge| (&edge.from[..], &edge.to[..])).collect();
    // Edges to packages without edges of their own are taken out until none is left, or only cycles are.
    loop {
        let sources: BTreeSet<&str> = left.iter().map(|(from, _)| *from).collect();
        let before = left.len();
        left.retain(|(_, to)| sources.contains(to));
        if left.len() == before {
            break;
        }
    }
    problems
        .extend(left.iter().map(|(from, to)| format!("xtask/layers.toml: within {from} -> {to} is part of a cycle")));
    problems
}

fn long_files(root: &Path, folder: &Path) -> Vec<String> {
    let mut problems = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.flatten().map(|entry| entry.path()) {
            let is_link = path.symlink_metadata().is_ok_and(|found| found.is_symlink());
            if path.is_dir() && !is_link {
                let is_ours = !path.file_name().is_some_and(|name| name == "target" || name == "node_modules");
                if is_ours {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let lines = fs::read_to_string(&path).map_or(0, |text| text.lines().count());
                if lines > MAX_LINES {
                    let shown = path.strip_prefix(root).unwrap_or(&path).display();
                    problems.push(format!("{shown} has {lines} lines; {MAX_LINES} is the most"));
                }
            }
        }
    }
    problems.sort();
    problems
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A workspace with these layers and manifests (name, dependencies section).
    fn workspace(layers: &str, packages: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("Cargo.toml", "[workspace]\nmembers = [\"crates/*\"]\n");
        write("xtask/layers.toml", layers);
        for (name, dependencies) in packages {
            let text = format!("[package]\nname = \"orchestra-{name}\"\n{dependencies}\n");
            write(&format!("crates/{name}/Cargo.toml"), &text);
            write(&format!("crates/{name}/src/lib.rs"), "");
        }
        folder
    }

    const LAYERS: &str = "[layers]\nmodel = 0\nplan = 1\nengine = 2\n";

    #[test]
    fn downward_edges_are_fine() {
        let folder = workspace(
            LAYERS,
            &[
                ("model", "[dependencies]\nserde = \"1\""),
                ("plan", "[dependencies]\norchestra-model.workspace = true"),
                (
                    "engine",
                    "[dependencies]\norchestra-plan = {path = \"../plan\"}\n[build-dependencies]\norchestra-model.workspace = true",
                ),
            ],
        );
        assert_eq!(check(folder.path()), [""; 0]);
    }

    #[test]
    fn upward_edges_of_every_kind_are_found() {
        let folder = workspace(
            LAYERS,
            &[
                ("model", "[dependencies]\np = {package = \"orchestra-plan\", path = \"../plan\"}"),
                (
                    "plan",
                    "[build-dependencies]\norchestra-engine = \"1\"\n[dev-dependencies]\norchestra-engine = \"1\"",
                ),
                (
                    "engine",
                    "[target.'cfg(unix)'.dependencies]\norchestra-engine = \"1\"\n[dev-dependencies]\norchestra-engine = \"1\"",
                ),
            ],
        );
        assert_eq!(
            check(folder.path()),
            [
                "engine (layer 2) has engine (layer 2) as a dependency: dependencies lead to lower layers",
                "model (layer 0) has plan (layer 1) as a dependency: dependencies lead to lower layers",
                "plan (layer 1) has engine (layer 2) as a build-dependency: dependencies lead to lower layers",
                "plan (layer 1) has engine (layer 2) as a dev-dependency: dependencies lead to lower layers",
            ]
        );
    }

    #[test]
    fn exceptions_need_a_reason_and_a_use() {
        let upward = "[[dev_upward]]\nfrom = \"plan\"\nto = \"engine\"\nreason = \"tests apply what they planned\"\n";
        let plan = "[dev-dependencies]\norchestra-engine = \"1\"";
        let packages = [("model", ""), ("plan", plan), ("engine", "")];
        assert_eq!(check(workspace(&format!("{LAYERS}{upward}"), &packages).path()), [""; 0]);
        let problems = check(
            workspace(&format!("{LAYERS}{}", upward.replace("tests apply what they planned", "x")), &packages).path(),
        );
        assert_eq!(problems, ["xtask/layers.toml: dev_upward plan -> engine needs a reason"]);
        let packages = [("model", ""), ("plan", ""), ("engine", "")];
        let problems = check(workspace(&format!("{LAYERS}{upward}"), &packages).path());
        assert_eq!(problems, ["xtask/layers.toml: dev_upward plan -> engine is not used"]);
    }

    #[test]
    fn edges_within_a_layer_are_listed_and_acyclic() {
        let layers = "[layers]\na = 1\nb = 1\n";
        let edge = |from: &str, to: &str| {
            format!("[[within]]\nfrom = \"{from}\"\nto = \"{to}\"\nreason = \"a good reason\"\n")
        };
        let a = ("a", "[dependencies]\norchestra-b = \"1\"");
        assert_eq!(check(workspace(layers, &[a, ("b", "")]).path()).len(), 1);
        assert_eq!(check(workspace(&format!("{layers}{}", edge("a", "b")), &[a, ("b", "")]).path()), [""; 0]);
        let b = ("b", "[dependencies]\norchestra-a = \"1\"");
        let problems = check(workspace(&format!("{layers}{}{}", edge("a", "b"), edge("b", "a")), &[a, b]).path());
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].ends_with("is part of a cycle"));
    }

    #[test]
    fn every_package_is_in_the_table_and_every_entry_is_a_package() {
        let folder = workspace(
            "[layers]\nmodel = 0\nghost = 1\n[apart]\npackages = [\"demo\"]\n",
            &[
                ("model", "[dependencies]\norchestra-demo = \"1\"\n[dev-dependencies]\norchestra-demo = \"1\""),
                ("extra", ""),
                ("demo", "[dependencies]\norchestra-model = \"1\""),
            ],
        );
        assert_eq!(
            check(folder.path()),
            [
                "demo stands apart, and has model as a dependency",
                "extra is not in xtask/layers.toml",
                "model has demo as a dependency, which is for tests only",
                "xtask/layers.toml names ghost, which is no package",
            ]
        );
    }

    #[test]
    fn long_files_are_found() {
        let folder = workspace("[layers]\nmodel = 0\n", &[("model", "")]);
        fs::write(folder.path().join("crates/model/src/big.rs"), "\n".repeat(MAX_LINES)).unwrap();
        assert_eq!(check(folder.path()), [""; 0]);
        fs::write(folder.path().join("crates/model/src/big.rs"), "\n".repeat(MAX_LINES + 1)).unwrap();
        assert_eq!(check(folder.path()), ["crates/model/src/big.rs has 1501 lines; 1500 is the most"]);
    }

    #[test]
    fn this_repository_keeps_its_layers() {
        assert_eq!(check(&crate::root()), [""; 0]);
    }
}
