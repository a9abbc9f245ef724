//! The book is true: the README's tour and the examples of the API are executed as they stand, and every command that is
//! named anywhere exists.
//!
//! A tour line that begins with `$` is run by a shell, in a copy of the quickstart with other ports and a shorter deadline
//! for the release that never becomes ready. Every line shown below it must be found in what it really printed, as its
//! stable words in their order: not times, dates, process ids, free ports and numbers of instances within a release, which
//! differ from run to run. `…` stands for anything.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::environment::{TestEnvironment, binary};

/// The quickstart's published ports and that of the API, as the book has them.
const PORTS: [&str; 3] = ["8080", "8081", "7070"];

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// Says that a test proves nothing here. Not through the print macros, whose output test runners hide.
pub(crate) fn skipped(what: &str, why: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "\n*** SKIPPED: {what}: {why} ***\n");
}

/// Whether a program can be run.
pub(crate) fn has(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// Ports that nothing listens on, below those that the kernel and Orchestra hand out by themselves, and each only once.
///
/// They are free for whoever comes first until the stack listens, so processes must not look at the same ones: a test runner
/// starts its tests with neighbouring process ids, and each id has a block of its own.
fn free_ports(count: usize) -> Vec<u16> {
    const BLOCK: u32 = 20;
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id() * BLOCK;
    let mut ports = Vec::new();
    while ports.len() < count {
        let tried = TRIED.fetch_add(1, Ordering::Relaxed);
        assert!(tried < BLOCK, "no free ports among {BLOCK}");
        let port = 10_000 + u16::try_from((first + tried) % 10_000).expect("below 10,000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            ports.push(port);
        }
    }
    ports
}

/// One command with what the text shows below it.
#[derive(Debug)]
struct Shown {
    command: String,
    output: Vec<String>,
}

/// The commands of the ```` ```console ```` blocks of a text.
fn commands(text: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    let mut inside = false;
    for line in text.lines() {
        if let Some(language) = line.strip_prefix("```") {
            inside = language == "console";
        } else if let (true, Some(command)) = (inside, line.strip_prefix("$ ")) {
            all.push(Shown { command: command.to_owned(), output: Vec::new() });
        } else if inside && !line.trim().is_empty() {
            all.last_mut().expect("output follows a command").output.push(line.to_owned());
        }
    }
    all
}

/// Replaces the number after the last `-` of an instance's name: which instance of a release answers is chance.
fn without_ordinals(word: &str) -> String {
    let mut text = String::new();
    let mut rest = word;
    while let Some(at) = rest.find("-r") {
        let (before, after) = rest.split_at(at + 2);
        text.push_str(before);
        let release = after.len() - after.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        text.push_str(&after[..release]);
        rest = &after[release..];
        if let Some(number) = rest.strip_prefix('-').filter(|_| release > 0) {
            text.push_str("-N");
            rest = number.trim_start_matches(|c: char| c.is_ascii_digit());
        }
    }
    text + rest
}

/// Replaces the ports of addresses that the machine chose.
fn without_free_ports(word: &str) -> String {
    let mut parts = word.split("127.0.0.1:");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (port, rest) = part.split_at(part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len());
        text = format!("{text}127.0.0.1:{}{rest}", if PORTS.contains(&port) { port } else { "N" });
    }
    text
}

/// The words of a line that are the same in every run.
fn stable(line: &str) -> Vec<String> {
    let mut words = Vec::new();
    for word in line.split_whitespace() {
        let bare = word.trim_matches(|c: char| "(),:;".contains(c));
        let starts_with_digit = bare.starts_with(|c: char| c.is_ascii_digit());
        // 76ms, 2.0s, 1m01s
        let time = starts_with_digit && bare.ends_with('s') && bare.chars().all(|c| "0123456789.hms".contains(c));
        let date = starts_with_digit && bare.ends_with('Z') && bare.contains('T');
        let pid = starts_with_digit && words.last().is_some_and(|last: &String| last.ends_with("(pid"));
        if !(time || date || pid || bare.is_empty()) {
            words.push(without_free_ports(&without_ordinals(word)));
        }
    }
    words
}

/// Whether `shown` is in `real`, a line that may have more to say.
fn is_in(shown: &[String], real: &[String]) -> bool {
    let (text, whole) = (shown.join(" "), real.join(" "));
    let Some((start, rest)) = text.split_once('…') else {
        let mut real = real.iter();
        return shown.iter().all(|word| real.any(|other| other == word));
    };
    // With `…` for anything, everything else must be there as it stands.
    let Some(mut left) = whole.strip_prefix(start) else { return false };
    let mut parts: Vec<&str> = rest.split('…').collect();
    let end = parts.pop().unwrap_or_default();
    for part in parts {
        let Some((_, after)) = left.split_once(part) else { return false };
        left = after;
    }
    left.ends_with(end)
}

/// The quickstart's programs, beside the binary. Built once if they are not there.
fn programs() -> PathBuf {
    let folder = binary().parent().expect("a binary is in a folder");
    let target = folder.parent().expect("profiles are in a target folder");
    let lock = fs::File::create(target.join("quickstart.lock")).unwrap();
    lock.lock().unwrap();
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "-q", "-p", "orchestra-quickstart", "--bins"]).env("CARGO_TARGET_DIR", target);
    if folder.ends_with("release") {
        command.arg("--release");
    }
    let built = command.current_dir(repository()).status();
    assert!(folder.join("agent-api").exists(), "the quickstart could not be built: {built:?}");
    folder.to_owned()
}

/// A copy of the quickstart below `env`, as in a checkout.
fn copy_quickstart(env: &TestEnvironment, ports: &[u16]) {
    let (from, to) = (repository().join("examples/quickstart"), env.path("examples/quickstart"));
    fs::create_dir_all(to.join("bin")).unwrap();
    let programs = programs();
    for program in ["agent-api", "worker", "migrate", "web"] {
        symlink(programs.join(program), to.join("bin").join(program)).unwrap();
    }
    let mut stack = fs::read_to_string(from.join("orchestra.yaml")).unwrap();
    for (from, to) in PORTS.iter().zip(ports).take(2) {
        let numbered = stack.replace(&format!("{{http: {from}}}"), &format!("{{http: {to}}}"));
        assert_ne!(numbered, stack, "the quickstart does not publish {from}");
        stack = numbered;
    }
    let hurried = stack.replace("start_deadline: 20s", "start_deadline: 5s");
    assert_ne!(hurried, stack, "the quickstart has another start deadline");
    fs::write(to.join("orchestra.yaml"), hurried).unwrap();
}

/// Runs what `text` shows, in an empty home; returns how many commands failed, as shown.
#[track_caller]
fn execute(page: &str, tour: &[Shown], folder: &str) -> usize {
    let env = TestEnvironment::new();
    let home = env.root().join(".local/state/orchestra");
    let env = env.with_home(home);
    let ports = free_ports(PORTS.len());
    copy_quickstart(&env, &ports);
    let pairs = || PORTS.iter().zip(&ports);
    let there = |text: &str| pairs().fold(text.to_owned(), |text, (from, to)| text.replace(from, &to.to_string()));
    let back = |text: &str| pairs().fold(text.to_owned(), |text, (to, from)| text.replace(&from.to_string(), to));
    let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());

    let mut folder = env.path(folder);
    let mut variables = String::new();
    let mut failures = 0;
    for Shown { command, output } in tour {
        // What a shell remembers: where it is, and variables.
        if let Some(path) = command.strip_prefix("cd ") {
            folder.push(path);
            assert!(folder.is_dir(), "{command}");
            continue;
        }
        if command.split_once('=').is_some_and(|(name, _)| name.chars().all(|c| c.is_ascii_uppercase())) {
            variables = format!("{variables}{command}\n");
            continue;
        }
        // Both outputs in the order in which a terminal shows them, and never for ever.
        let ran = Command::new("timeout")
            .args(["60", "sh", "-c", &format!("exec 2>&1\n{variables}{}", there(command))])
            .current_dir(&folder)
            .env_clear()
            .envs([("PATH", path.as_str()), ("HOME", env.root().to_str().unwrap())])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let real = back(&String::from_utf8_lossy(&ran.stdout));
        let fails = output.iter().any(|line| line.starts_with("error["));
        assert_eq!(ran.status.code(), Some(i32::from(fails)), "$ {command}\n{real}");
        failures += usize::from(fails);
        let lines: Vec<Vec<String>> = real.lines().map(stable).collect();
        for line in output {
            let shown = stable(line);
            let found = lines.iter().any(|real| is_in(&shown, real));
            assert!(found, "{page} shows this below `{command}`:\n{line}\nand this is so:\n{real}");
        }
    }
    env.finish();
    failures
}

#[test]
fn the_tour_of_the_readme_is_true() {
    if !has("curl") {
        return skipped("the tour of the README", "there is no curl");
    }
    let readme = fs::read_to_string(repository().join("README.md")).unwrap();
    let tour =
        readme.split("\n## ").find(|section| section.starts_with("Sixty seconds")).expect("the README has a tour");
    let tour = commands(tour);
    assert!(tour.len() >= 12, "the tour is too short: {tour:#?}");
    assert_eq!(execute("the README", &tour, ""), 2, "the tour breaks two releases");
}

#[test]
fn the_examples_of_the_api_are_true() {
    if !has("curl") {
        return skipped("the examples of the API", "there is no curl");
    }
    let page = fs::read_to_string(repository().join("docs/reference/api.md")).unwrap();
    let examples = commands(&page);
    assert_eq!(execute("docs/reference/api.md", &examples, "examples/quickstart"), 0);
    // Each operation is there.
    let document: serde_json::Value = serde_json::from_str(include_str!("../../../../api/openapi.json")).unwrap();
    for path in document["paths"].as_object().unwrap().keys() {
        let matches = |text: &str| {
            let text = text.split(|c: char| c.is_whitespace() || "?'\"`".contains(c)).next().unwrap_or_default();
            let (parts, other): (Vec<_>, Vec<_>) = (path.split('/').collect(), text.split('/').collect());
            parts.len() == other.len()
                && parts.iter().zip(other).all(|(part, other)| part.starts_with('{') || *part == other)
        };
        let named = page.match_indices('/').any(|(at, _)| matches(&page[at..]));
        assert!(named, "{path} is not in docs/reference/api.md");
    }
}

#[test]
fn lines_are_compared_by_their_stable_words() {
    let real = stable("service.api  rolling      1/2    60ms  waits for api-r2-2: its check; 1 draining");
    assert!(is_in(&stable("service.api  rolling  1/2  1m01s  waits for api-r2-1: its check;"), &real));
    assert!(!is_in(&stable("service.api  ready  1/2"), &real));
    assert!(!is_in(&stable("service.api  rolling  2/2"), &real));
    let real = stable(r#"{"instance":"api-r2-2","address":1} /tmp/a/b.yaml (pid 12, x) http://127.0.0.1:40001"#);
    assert!(is_in(&stable(r#"{"instance":"api-r2-1","address":1} …/b.yaml (pid 7, x) http://127.0.0.1:3"#), &real));
    assert!(!is_in(&stable(r#"{"instance":"api-r3-2","address":1}"#), &real));
    assert!(!is_in(&stable("http://127.0.0.1:8080"), &real));
}

/// Every file of the book.
fn pages() -> Vec<PathBuf> {
    let mut pages = vec![repository().join("README.md")];
    let mut folders = vec![repository().join("docs"), repository().join("examples")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            match entry.file_type().unwrap() {
                // Environments of other languages bring pages of their own.
                kind if kind.is_dir() && !entry.file_name().as_encoded_bytes().starts_with(b".") => folders.push(path),
                kind if kind.is_file() && path.extension().is_some_and(|end| end == "md") => pages.push(path),
                _ => {}
            }
        }
    }
    pages
}

/// Command lines in a page: in `code`, and behind a `$`.
fn named_commands(page: &str) -> Vec<String> {
    let mut all: Vec<String> = commands(page).into_iter().map(|shown| shown.command).collect();
    let mut in_block = false;
    for line in page.lines() {
        if line.starts_with("```") {
            in_block = !in_block;
        } else if !in_block {
            all.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    // What a shell adds is not for Orchestra; `orchestra …` means any command.
    let end = |command: &str| command.split(['|', '#', '&', '>', ';']).next().unwrap_or_default().trim().to_owned();
    let ours = |command: &String| command.starts_with("orchestra ") && !command.contains('…');
    all.iter().map(|command| end(command)).filter(ours).collect()
}

/// A placeholder such as `SERVICE` as something that could stand there.
fn filled_in(word: &str) -> String {
    match word {
        "RELEASE" => "1".to_owned(),
        word if word.chars().all(|c| c.is_ascii_uppercase()) => word.to_lowercase(),
        word => word.to_owned(),
    }
}

/// Words as a shell makes them, as far as double quotes go.
fn shell_words(command: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in command.chars() {
        match character {
            '"' => quoted = !quoted,
            character if character.is_whitespace() && !quoted => words.push(String::new()),
            character => words.last_mut().expect("there is one").push(character),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn every_command_in_the_book_exists() {
    let env = TestEnvironment::new();
    let mut wrong = Vec::new();
    let mut seen = std::collections::BTreeSet::new();
    for path in pages() {
        for command in named_commands(&fs::read_to_string(&path).unwrap()) {
            // Roles of the binary that no user starts.
            let mut words: Vec<String> = shell_words(&command).iter().skip(1).map(|word| filled_in(word)).collect();
            if ["proxy", "shim"].contains(&words[0].as_str()) || !seen.insert(command.clone()) {
                continue;
            }
            // A wrong word is refused before the help is printed; one that is missing is not.
            words.push("--help".to_owned());
            let ran = env.run(&words.iter().map(String::as_str).collect::<Vec<_>>());
            if ran.code() != Some(0) {
                wrong.push(format!(
                    "{}: `{command}`: {}",
                    path.display(),
                    ran.stderr.lines().next().unwrap_or_default()
                ));
            }
        }
    }
    assert!(seen.len() > 20, "too few commands were found: {seen:#?}");
    assert!(wrong.is_empty(), "{wrong:#?}");
}
