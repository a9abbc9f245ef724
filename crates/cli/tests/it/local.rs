//! Commands that ask nobody: `init`, `explain`, `completions`, help and mistakes.

use orchestra_cli::Exit;
use orchestra_model::Code;

use crate::environment::TestEnvironment;

#[tokio::test]
async fn init_writes_a_stack_file_that_is_valid_and_overwrites_nothing() {
    let mut test = TestEnvironment::new();
    let outcome = test.run("init").await;
    assert_eq!(outcome.exit, Exit::Invalid);
    assert!(outcome.stderr.contains("is there already"), "{}", outcome.stderr);
    let outcome = test.run("init new/My-Platform").await;
    assert_eq!(
        outcome.page(),
        "exit: 0\n--- stdout\nwrote new/My-Platform/orchestra.yaml (stack `my-platform`)\nwrote new/My-Platform/.orchestra/schema.json (editors complete and check the stack file with it)\nnext: orchestra up -f new/My-Platform/orchestra.yaml\n--- stderr\n"
    );
    let folder = test.cwd().join("new/My-Platform");
    let text = std::fs::read_to_string(folder.join("orchestra.yaml")).unwrap();
    assert_eq!(text.lines().next(), Some("# yaml-language-server: $schema=.orchestra/schema.json"));
    let schema: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join(".orchestra/schema.json")).unwrap()).unwrap();
    assert_eq!(schema, orchestra_spec::json_schema());
    assert_eq!(test.run("init new/My-Platform").await.exit, Exit::Invalid);
    assert_eq!(std::fs::read_to_string(folder.join("orchestra.yaml")).unwrap(), text);
    test.finish();
}

#[tokio::test]
async fn explain_has_a_page_for_every_code_and_lists_them() {
    let mut test = TestEnvironment::new();
    let outcome = test.run("explain").await;
    for code in Code::ALL {
        assert!(outcome.stdout.contains(code.as_str()), "{code}");
    }
    let outcome = test.run("explain orc0208").await;
    assert!(outcome.stdout.starts_with("ORC0208: dependencies form a cycle\n"), "{}", outcome.stdout);
    let outcome = test.run("explain ORC9999 --json").await;
    assert_eq!((outcome.exit, outcome.json()["errors"][0]["code"].clone()), (Exit::Failed, "ORC0405".into()));
    let outcome = test.run("explain services.api.no-such-key").await;
    assert_eq!(outcome.exit, Exit::Failed);
    test.finish();
}

#[tokio::test]
async fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let mut test = TestEnvironment::new();
        let outcome = test.run(&format!("completions {shell}")).await;
        assert_eq!(outcome.exit, Exit::Success);
        assert!(outcome.stdout.contains("rollback"), "{shell}");
    }
}

#[tokio::test]
async fn help_and_mistakes() {
    let mut test = TestEnvironment::new();
    let outcome = test.run("--help").await;
    insta::assert_snapshot!("help", outcome.page());
    let outcome = test.run("up --help").await;
    insta::assert_snapshot!("help_up", outcome.page());
    let outcome = test.run("upp").await;
    insta::assert_snapshot!("mistake", outcome.page());
    let outcome = test.run("--version").await;
    assert_eq!(outcome.stdout, "orchestra 0.0.0-test\n");
    let outcome = test.run("").await;
    assert_eq!(outcome.exit, Exit::Invalid);
    test.finish();
}

#[tokio::test]
async fn state_needs_a_home() {
    let mut test = TestEnvironment::new();
    test.variable("ORCHESTRA_HOME", "");
    let outcome = test.run("status").await;
    assert_eq!(outcome.exit, Exit::Invalid);
    assert!(outcome.stderr.contains("--home"), "{}", outcome.stderr);
    test.variable("HOME", &test.cwd().display().to_string());
    let outcome = test.run("server status").await;
    assert!(outcome.stdout.contains("TEST/work/.local/state/orchestra/server.sock"), "{}", outcome.stdout);
    test.finish();
}
