//! Planning and drawing at scale.
//!
//! `cargo bench -p orchestra-plan`. Goals: 10,000 resources without a change far below 0.2 s of CPU, one change among
//! them at most 20 ms beyond reading the stack.

#[path = "../tests/it/fixture.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod fixture;

use std::{collections::BTreeMap, hint::black_box};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use orchestra_model::{Desired, Resource, desired::Target, flag::FlagSet};
use orchestra_plan::{Current, Options, Style, plan, plan_owned, render};

/// So many services, each with a dozen variables and two dependencies.
fn services(count: usize) -> Desired {
    let name = |at: usize| format!("service.s{at:05}");
    let resources = (0..count).map(|at| {
        let mut service = fixture::service("./bin/service --config /etc/service.yaml --verbose");
        for variable in 0..12 {
            service
                .program
                .env
                .insert(format!("VARIABLE_{variable}"), fixture::text(&format!("value {variable} of {at}")));
        }
        let mut resource = Resource::Service(service);
        if at > 0 {
            fixture::depend(&mut resource, &name(at / 2));
            fixture::depend(&mut resource, &name(at - 1));
        }
        (fixture::rid(&name(at)), resource)
    });
    let environment = fixture::environment();
    Desired {
        environment,
        target: Target::Process,
        resources: resources.collect(),
        flags: FlagSet::default(),
        preview: None,
        secrets: BTreeMap::new(),
    }
}

fn benchmark(criterion: &mut Criterion) {
    let planned = |current: &Current, desired: &Desired| {
        plan(&desired.environment, current, Some(desired), Options::default()).expect("a valid stack")
    };
    let mut group = criterion.benchmark_group("plan");
    for count in [100, 1_000, 10_000] {
        let desired = services(count);
        let current = fixture::applied(&desired);
        assert!(planned(&current, &desired).is_empty());
        group.bench_function(BenchmarkId::new("no-op", count), |bencher| {
            bencher.iter(|| planned(black_box(&current), black_box(&desired)));
        });
    }
    group.sample_size(20);
    let desired = services(10_000);
    let current = fixture::applied(&desired);
    let mut changed = desired.clone();
    fixture::service_of(&mut changed, "service.s05000").program.command.push(fixture::text("--more"));
    assert_eq!(planned(&current, &changed).steps.len(), 1);
    group.bench_function("one change in 10000", |bencher| {
        bencher.iter(|| planned(black_box(&current), black_box(&changed)));
    });
    group.bench_function("one change in 10000, given away", |bencher| {
        bencher.iter_batched_ref(
            || Some(changed.clone()),
            |desired| {
                let environment = fixture::environment();
                plan_owned(&environment, black_box(&current), desired.take(), Options::default()).expect("valid")
            },
            BatchSize::PerIteration,
        );
    });
    let nothing = Current::default();
    group.bench_function("create 10000", |bencher| bencher.iter(|| planned(&nothing, black_box(&desired))));
    let create = planned(&nothing, &desired);
    group.bench_function("draw 10000 creations", |bencher| {
        bencher.iter(|| render(black_box(&create), Style::default()));
    });
    group.finish();
}

criterion_group!(benches, benchmark);
criterion_main!(benches);
