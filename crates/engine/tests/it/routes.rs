//! One table for all environments, and one environment's trouble kept to itself.

use orchestra_model::{Code, record::RunState};

use crate::support::{Place, environment};

fn stack(name: &str, port: &str) -> String {
    // Nothing of the fake world listens.
    let service = format!("{{command: [run], ports: {{http: {port}}}, health: {{ready: none}}}}");
    format!("{{version: 1, name: {name}, services: {{web: {service}}}}}")
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_in_use_fails_the_run_and_nobody_else() {
    let place = Place::new();
    place.network.take_address("127.0.0.1:8080".parse().unwrap());
    let running = place.open().await;
    let good = running.run(&environment("good/dev"), running.stack(&stack("good", "8081"))).await;
    assert_eq!(good.state, RunState::Succeeded, "{:?}", good.problems);
    let bad = running.run(&environment("bad/dev"), running.stack(&stack("bad", "8080"))).await;
    assert_eq!(bad.state, RunState::Failed);
    assert_eq!(bad.problems[0].code, Code::ADDRESS_IN_USE);
    assert!(place.network.refused() >= 1);
    let routes = place.network.table().routes;
    assert_eq!(routes.iter().map(|r| r.id.environment.to_string()).collect::<Vec<_>>(), ["good/dev"]);
    let later = running.run(&environment("later/dev"), running.stack(&stack("later", "8082"))).await;
    assert_eq!(later.state, RunState::Succeeded, "{:?}", later.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_environments_cannot_publish_one_address() {
    let place = Place::new();
    let running = place.open().await;
    let first = running.run(&environment("first/dev"), running.stack(&stack("first", "8080"))).await;
    assert_eq!(first.state, RunState::Succeeded);
    let second = running.run(&environment("second/dev"), running.stack(&stack("second", "8080"))).await;
    assert_eq!(second.state, RunState::Failed);
    assert!(second.problems[0].message.contains("first/dev/web"), "{}", second.problems[0].message);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chosen_port_stays() {
    let place = Place::new();
    let id = environment("auto/dev");
    let running = place.open().await;
    assert_eq!(running.run(&id, running.stack(&stack("auto", "auto"))).await.state, RunState::Succeeded);
    let chosen = running.control.view(&id).await.unwrap().record.chosen_ports.clone();
    assert_eq!(chosen.len(), 1);
    running.kill().await;
    let running = place.open().await;
    assert_eq!(running.control.view(&id).await.unwrap().record.chosen_ports, chosen);
    let port = chosen.values().next().unwrap().values().next().unwrap();
    assert_eq!(place.network.table().routes[0].listen.port(), *port);
}
