//! Text scenarios with golden output: `scenarios/NAME.txt` plays to `scenarios/NAME.snap`.

use std::path::Path;

use orchestra_sim::script;

#[test]
fn every_scenario_plays_as_it_did() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/scenarios");
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.strip_suffix(".txt").map(str::to_owned))
        .collect();
    names.sort();
    assert!(names.len() >= 10, "the scenarios are not there");
    for name in names {
        let scenario = std::fs::read_to_string(folder.join(format!("{name}.txt"))).unwrap();
        let output = script::play(&scenario).unwrap_or_else(|why| panic!("{name}:\n{why}"));
        let mut settings = insta::Settings::clone_current();
        settings.set_snapshot_path("scenarios");
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.set_description(scenario.split("\n=== ").next().unwrap_or_default().trim().replace('\n', " "));
        settings.bind(|| insta::assert_snapshot!(name.as_str(), output));
    }
}

/// A mistake in a scenario must not pass as a scenario.
#[test]
fn mistakes_in_scenarios_are_refused() {
    for (script, why) in [
        ("up v2", "there is no such stack"),
        ("jump", "this command is not known"),
        ("until instance_glad", "there is no event"),
        ("kill api-r1-1", "it does not run"),
    ] {
        let scenario = format!("=== v1\nversion: 1\nname: demo\n=== script\n{script}\n");
        let error = script::play(&scenario).unwrap_err();
        assert!(error.contains(why), "{script}: {error}");
    }
    assert!(
        script::play("=== v1\nversion: 1\nname: demo\nservicse: {}\n=== script\n").unwrap_err().contains("servicse")
    );
}
