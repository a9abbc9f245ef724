//! Durable commits: alone, one after the other, and a thousand in flight.
//!
//! `cargo bench -p orchestra-store`. Each commit is what the launch of one instance writes: its record, a line of the
//! journal and an event. The figures are those of the disk's fsync as much as of the store.

#[path = "../tests/it/fixture.rs"]
#[expect(dead_code, reason = "the tests use all of it")]
mod fixture;

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use orchestra_model::record::Change;

fn commits(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let fresh = || {
        let home = tempfile::tempdir().expect("a folder");
        let store = fixture::open(home.path());
        store.commit_blocking(vec![Change::Environment(fixture::environment())]).expect("an environment");
        (home, store)
    };
    let mut group = criterion.benchmark_group("commit");
    group.sample_size(20);
    group.bench_function("1000 in flight", |bencher| {
        bencher.iter_batched(
            fresh,
            |(home, store)| {
                runtime.block_on(async {
                    let commits: Vec<_> = (1..=1000).map(|n| store.commit(fixture::launch(n))).collect();
                    for commit in commits {
                        commit.await.expect("committed");
                    }
                });
                (home, store)
            },
            BatchSize::PerIteration,
        );
    });
    let (_home, store) = fresh();
    let mut number = 0;
    group.bench_function("one at a time", |bencher| {
        bencher.iter(|| {
            number += 1;
            store.commit_blocking(fixture::launch(number)).expect("committed");
        });
    });
    group.finish();
}

fn open(criterion: &mut Criterion) {
    let home = tempfile::tempdir().expect("a folder");
    let store = fixture::open(home.path());
    store.commit_blocking(vec![Change::Environment(fixture::environment())]).expect("an environment");
    for number in 1..=1000 {
        store.commit_blocking(fixture::launch(number)).expect("committed");
    }
    drop(store);
    let mut group = criterion.benchmark_group("open");
    group.bench_function("with 1000 instances", |bencher| bencher.iter(|| fixture::open(home.path())));
    group.bench_function("read-only, and the whole state", |bencher| {
        bencher.iter(|| {
            let reader = orchestra_store::open_read_only(home.path()).expect("readable").expect("there");
            reader.state(&fixture::id()).expect("readable")
        });
    });
    group.finish();
}

criterion_group!(benches, commits, open);
criterion_main!(benches);
