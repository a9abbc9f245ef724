//! Loading stacks of 100, 1,000 and 10,000 services with health checks, variables and ports.
//!
//! `cargo bench -p orchestra-spec`. Goal: 10,000 services (2 MB of text) well under 0.4 s.

use std::{fmt::Write as _, hint::black_box};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use orchestra_spec::{Context, Source, load};

fn stack(services: u32) -> String {
    let mut text = String::from("version: 1\nname: large\nservices:\n");
    for n in 0..services {
        let _ = write!(
            text,
            "  service-{n}:\n    command: [./bin/service, --number, \"{n}\"]\n    env: {{LEVEL: info, URL: \"{{{{ self.url }}}}\"}}\n    \
             ports: {{http: auto}}\n    health: {{ready: {{http: /ready, every: 5s}}}}\n"
        );
        if n > 0 {
            let _ = writeln!(text, "    depends_on: [service-{}]", n / 2);
        }
    }
    text
}

fn loading(criterion: &mut Criterion) {
    let context = Context { directory: "/srv".into(), volumes: "/state".into(), environment: None, preview: None };
    let mut group = criterion.benchmark_group("load");
    group.sample_size(20);
    for services in [100, 1_000, 10_000] {
        let text = stack(services);
        group.throughput(Throughput::Bytes(text.len() as u64));
        group.bench_with_input(BenchmarkId::from_parameter(services), &text, |bencher, text| {
            bencher.iter(|| {
                load(black_box(Source { path: "orchestra.yaml", bytes: text.as_bytes() }), &context)
                    .expect("the stack is valid")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, loading);
criterion_main!(benches);
