use orchestra_api::Waiting;

use super::*;
use crate::commands::tests::run;

fn news(resource: &str, state: ProgressState, ready: u32, elapsed_ms: u64) -> Progress {
    let resource: ResourceId = resource.parse().unwrap();
    let action = if resource.kind == ResourceKind::Job { Action::Run } else { Action::Create };
    let desired = if resource.kind == ResourceKind::Service { 2 } else { 0 };
    Progress { resource, action, state, ready, desired, elapsed_ms, waits_for: Vec::new(), message: None }
}

fn waiting(mut progress: Progress, reason: &str) -> Progress {
    progress.waits_for.push(Waiting { on: None, until: None, reason: reason.into(), deadline: None, due: None });
    progress
}

#[test]
fn lines_say_what_is_new_and_nothing_twice() {
    use ProgressState::{Failed, Reverted, Reverting, Running, Succeeded, Waiting};
    let mut board = Board::new(&run());
    let mut text = String::new();
    for progress in [
        waiting(news("service.api", Waiting, 0, 0), "job.migrate to complete"),
        news("volume.data", Running, 0, 1),
        news("volume.data", Succeeded, 0, 2),
        news("job.migrate", Running, 0, 10),
        waiting(news("service.api", Waiting, 0, 0), "job.migrate to complete"),
        news("job.migrate", Succeeded, 0, 812),
        waiting(news("service.api", Running, 0, 400), "its ready check (connection refused)"),
        waiting(news("service.api", Running, 0, 900), "its ready check (HTTP 503)"),
        news("service.api", Running, 1, 1_000),
        news("service.api", Succeeded, 2, 1_300),
        news("service.other", Succeeded, 2, 1_300),
        Progress { message: Some("exit code 1\x1b[2J".into()), ..news("service.api", Failed, 1, 62_000) },
        news("service.api", Reverting, 1, 63_000),
        news("service.api", Reverted, 0, 64_000),
        Progress { action: Action::Delete, ..news("service.api", Running, 0, 1) },
        Progress { action: Action::Delete, ..news("service.api", Succeeded, 0, 1) },
    ] {
        if let Some(line) = board.update(progress, 0, Palette::PLAIN) {
            text.push_str(&line);
            text.push('\n');
        }
    }
    insta::assert_snapshot!(text);
}

#[test]
fn the_tree_fits_the_screen() {
    let mut board = Board::new(&run());
    board.update(news("volume.data", ProgressState::Succeeded, 0, 2), 0, Palette::PLAIN);
    board.update(news("job.migrate", ProgressState::Running, 0, 10), 1_000, Palette::PLAIN);
    let reason = "job.migrate to complete, and a very long reason that goes on and on and on";
    board.update(waiting(news("service.api", ProgressState::Waiting, 0, 0), reason), 0, Palette::PLAIN);
    insta::assert_snapshot!(board.draw(3_500, 0, (70, 24), Palette::PLAIN).join("\n"));
    for columns in 20..100 {
        for rows in 4..8 {
            let lines = board.draw(3_500, 0, (columns, rows), Palette::PLAIN);
            assert!(lines.len() < rows, "{columns}x{rows}");
            assert!(lines.iter().all(|line| width(line) <= columns), "{columns}x{rows}\n{}", lines.join("\n"));
        }
    }
    insta::assert_snapshot!("little_room", board.draw(3_500, 0, (70, 4), Palette::PLAIN).join("\n"));
}

#[test]
fn drawing_in_place_goes_back_as_far_as_was_drawn() {
    let mut place = InPlace::default();
    let lines = |count: usize| vec!["x".to_owned(); count];
    assert_eq!(place.redraw(&lines(2)), "x\nx\n");
    assert_eq!(place.redraw(&lines(1)), "\x1b[2F\x1b[Jx\n");
    assert_eq!(place.clear(), "\x1b[1F\x1b[J");
    assert_eq!(place.clear(), "");
    let _ = place.redraw(&lines(3));
    place.leave();
    assert_eq!(place.redraw(&lines(1)), "x\n");
}
