//! The fake provider against the suite that real ones have to pass.

use std::sync::{Arc, Mutex};

use orchestra_provider::{
    Provider,
    conformance::{self, Program, World},
    fake::{FakeProvider, FakeWorld},
};
use orchestra_task::TaskTree;

struct Fake {
    world: Arc<FakeWorld>,
    tree: Mutex<TaskTree>,
}

impl World for Fake {
    fn open(&self) -> Arc<dyn Provider> {
        let mut tree = self.tree.lock().unwrap();
        tree.cancel();
        *tree = TaskTree::new();
        Arc::new(FakeProvider::open(&self.world, tree.clone()))
    }

    fn command(&self, program: Program) -> Vec<String> {
        match program {
            Program::Run => FakeWorld::command(&["run"]),
            Program::Stubborn => FakeWorld::command(&["stubborn"]),
            Program::Exit(code) => FakeWorld::command(&["exit", &code.to_string()]),
            Program::Print(stdout, stderr, code) => FakeWorld::command(&["print", &stdout, &stderr, &code.to_string()]),
            Program::PrintAndRun(stdout) => FakeWorld::command(&["print-and-run", &stdout]),
            Program::Notify(status) => FakeWorld::command(&["notify", &status]),
            Program::Spin => FakeWorld::command(&["spin"]),
            Program::Missing => FakeWorld::command(&["missing"]),
        }
    }

    fn directory(&self) -> String {
        "/".into()
    }

    fn volume(&self, name: &str) -> String {
        FakeWorld::volume(name)
    }
}

#[tokio::test]
async fn the_fake_provider_conforms() {
    conformance::run(|| Fake { world: FakeWorld::new(), tree: Mutex::default() }).await;
}
