//! What a person reads.

use orchestra_model::{Resource, Text};
use orchestra_plan::{Current, Observation, Options, Style, plan, render};

use crate::fixture::{applied, environment, job_of, rid, service, service_of, stack, text, url_of, volume};

fn draw(current: &Current, desired: &orchestra_model::Desired, style: Style) -> String {
    render(&plan(&environment(), current, Some(desired), Options::default()).unwrap(), style)
}

/// Every action at once.
fn everything() -> (Current, orchestra_model::Desired) {
    let mut from = stack();
    from.resources.insert(rid("service.old"), Resource::Service(service("./bin/old")));
    from.resources.insert(rid("service.worker"), Resource::Service(service("./bin/worker")));
    from.resources.insert(rid("volume.cache"), volume("/var/lib/demo/cache"));
    from.resources.insert(rid("volume.scratch"), volume("/var/lib/demo/scratch"));
    let mut current = applied(&from);
    current.observed.insert(rid("service.worker"), Observation::Degraded("1 of 2 instances are there".to_owned()));
    let mut to = from;
    to.resources.remove(&rid("service.old"));
    to.resources.remove(&rid("volume.scratch"));
    to.resources.insert(rid("volume.data"), volume("/mnt/data"));
    job_of(&mut to, "job.migrate").program.command.push(text("--all"));
    let api = service_of(&mut to, "service.api");
    api.program.env.insert("LOG_LEVEL".to_owned(), text("debug"));
    api.program.env.insert("WEB_URL".to_owned(), url_of("web"));
    api.replicas = 3;
    service_of(&mut to, "service.web").replicas = 2;
    let mut new = service("./bin/metrics --port");
    new.program.command.push(url_of("api"));
    to.resources.insert(rid("service.metrics"), Resource::Service(new));
    (current, to)
}

#[test]
fn a_first_plan() {
    insta::assert_snapshot!(draw(&Current::default(), &stack(), Style::default()));
}

#[test]
fn a_plan_with_every_action() {
    let (current, to) = everything();
    insta::assert_snapshot!(draw(&current, &to, Style::default()));
}

#[test]
fn a_plan_in_colour() {
    let (current, to) = everything();
    let drawn = draw(&current, &to, Style { color: true, ..Style::default() });
    insta::assert_snapshot!(drawn.replace('\u{1b}', "ESC"));
    // Colours are all that is added.
    let mut plain = String::new();
    for (at, part) in drawn.split('\u{1b}').enumerate() {
        plain.push_str(if at == 0 { part } else { part.split_once('m').unwrap().1 });
    }
    assert_eq!(plain, draw(&current, &to, Style::default()));
}

#[test]
fn a_verbose_plan_of_a_new_service() {
    let mut to = stack();
    to.resources.retain(|id, _| *id == rid("service.web"));
    service_of(&mut to, "service.web").depends_on.clear();
    insta::assert_snapshot!(draw(&Current::default(), &to, Style { verbose: true, ..Style::default() }));
}

#[test]
fn a_plan_that_takes_everything_down() {
    let current = applied(&stack());
    let draw = |delete_volumes| {
        render(&plan(&environment(), &current, None, Options { delete_volumes }).unwrap(), Style::default())
    };
    insta::assert_snapshot!(format!("{}\n=== with volumes ===\n\n{}", draw(false), draw(true)));
}

#[test]
fn an_empty_plan() {
    insta::assert_snapshot!(draw(&applied(&stack()), &stack(), Style::default()));
}

#[test]
fn hostile_strings_reach_the_terminal_escaped() {
    let mut to = stack();
    let evil = "a\u{1b}[2Jb\rc\u{7}d\u{9b}31me\u{202e}f\ng\"h\\i\u{200b}j\u{0}";
    let api = service_of(&mut to, "service.api");
    api.program.env.insert(format!("K{evil}"), Text::literal(evil));
    let mut current = applied(&stack());
    current.observed.insert(rid("service.web"), Observation::Degraded(evil.to_owned()));
    for style in [Style::default(), Style { verbose: true, ..Style::default() }, Style { width: 0, ..Style::default() }]
    {
        let drawn = draw(&current, &to, style);
        let raw: Vec<char> =
            drawn.chars().filter(|c| (c.is_control() && *c != '\n') || ['\u{202e}', '\u{200b}'].contains(c)).collect();
        assert!(raw.is_empty(), "{raw:?} in {drawn:?}");
    }
    insta::assert_snapshot!(draw(&current, &to, Style { verbose: true, ..Style::default() }));
}

#[test]
fn values_are_cut_to_the_width_unless_verbose() {
    let mut to = stack();
    let long = "x".repeat(500);
    service_of(&mut to, "service.api").program.env.insert("LONG".to_owned(), Text::literal(&*long));
    service_of(&mut to, "service.api").program.command = vec![text(&long)];
    let drawn = draw(&applied(&stack()), &to, Style { width: 80, ..Style::default() });
    assert!(drawn.contains('…'));
    assert!(drawn.lines().all(|line| line.chars().count() <= 80), "{drawn}");
    assert!(drawn.contains("\"./bin/api\"") && drawn.contains(" -> "), "the short side is whole: {drawn}");
    let drawn = draw(&applied(&stack()), &to, Style { width: 80, verbose: true, ..Style::default() });
    assert!(drawn.contains(&long));
}
