//! Simulated traffic: releases good and bad, with everything that misleads a comparison.
//!
//! Requests arrive as a Poisson process and each is assigned to the canary with the weight of the moment. By Poisson
//! thinning the four streams (arm, good or bad) are independent, so a tick draws four numbers, whatever the rate.

#![expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "simulated counts are small"
)]

use std::time::Duration;

use orchestra_stats::{Analysis, Arm, Bad, Cell, Counter, Outcome, Pair, Settings, Tick, Unit};

/// `splitmix64` (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014).
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub(crate) fn uniform(&mut self) -> f64 {
        ((self.next() >> 11) as f64 + 0.5) / (1_u64 << 53) as f64
    }

    pub(crate) fn chance(&mut self, p: f64) -> bool {
        self.uniform() < p
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub(crate) fn exponential(&mut self, mean: f64) -> f64 {
        -self.uniform().ln() * mean
    }

    /// Poisson: by products of uniforms, in pieces; above 400 by its normal limit.
    pub(crate) fn poisson(&mut self, mut mean: f64) -> u64 {
        if mean > 400.0 {
            let normal = (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos();
            return (mean + mean.sqrt() * normal).round().max(0.0) as u64;
        }
        let mut count = 0;
        while mean > 0.0 {
            let piece = mean.min(30.0);
            mean -= piece;
            let limit = (-piece).exp();
            let mut product = self.uniform();
            while product > limit {
                count += 1;
                product *= self.uniform();
            }
        }
        count
    }
}

/// A share or a factor at a time in seconds.
pub(crate) type Over = fn(f64) -> f64;

/// What may go wrong for one client, whoever answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Poison {
    None,
    /// Now and then (mean seconds between) some client sends so many requests in one second that fail wherever they go.
    Burst {
        every: f64,
        size: u64,
    },
    /// One client of so many per second retries, all the time, what fails only on the canary.
    OnCanary {
        per_second: f64,
    },
}

/// Instances that stall: for a while whatever they answer is late, or fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stalls {
    /// Mean seconds between stalls of one instance.
    pub(crate) every: f64,
    /// Mean seconds that one lasts.
    pub(crate) lasts: f64,
    /// Instances of the canary and of the stable release.
    pub(crate) instances: (u64, u64),
    /// What they answer meanwhile is an error, instead of late.
    pub(crate) fails: bool,
}

/// One kind of release under one kind of traffic.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) settings: Settings,
    /// Requests per second, on both arms, at a time.
    pub(crate) rate: Over,
    /// Factor on `rate`.
    pub(crate) scale: f64,
    /// Weights and the seconds that each lasts.
    pub(crate) steps: Vec<(f64, f64)>,
    /// Share of bad responses at a time, of the stable release and of the canary.
    pub(crate) bad: (Over, Over),
    pub(crate) clients: u64,
    pub(crate) poison: Poison,
    pub(crate) stalls: Option<Stalls>,
    /// Increments of every counter per request, on the stable release and on the canary; read every 10 s.
    pub(crate) counted: (f64, f64),
    /// Pairs of probes per second, and the share of bad answers on the stable release and on the canary.
    pub(crate) probes: (f64, f64, f64),
    /// Seconds that a tick covers.
    pub(crate) tick: f64,
    /// How bad the bad responses are: late instead of failed.
    pub(crate) late: bool,
    /// Until then no response of the stable release has ended: they take so many seconds.
    pub(crate) silent_until: f64,
    /// Part of the traffic meets instances admitted long ago; otherwise the warm-up begins with the release.
    pub(crate) warm: bool,
}

impl World {
    /// Steady traffic at one weight.
    pub(crate) fn steady(scale: f64, weight: f64, seconds: f64) -> Self {
        Self {
            settings: Settings::default(),
            rate: |_| 1.0,
            scale,
            steps: vec![(weight, seconds)],
            bad: (|_| 0.001, |_| 0.001),
            clients: 1000,
            poison: Poison::None,
            stalls: None,
            counted: (0.0, 0.0),
            probes: (0.0, 0.0, 0.0),
            tick: 0.2,
            late: false,
            silent_until: 0.0,
            warm: true,
        }
    }
}

/// What became of one release.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// Seconds until there was enough evidence for a pass.
    pub(crate) enough: Option<f64>,
    /// Seconds until it failed.
    pub(crate) failed: Option<f64>,
    /// Bad responses that the canary gave until then.
    pub(crate) canary_bad: u64,
    /// Outcomes of the steps.
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) analysis: Analysis,
}

struct Traffic<'a> {
    world: &'a World,
    rng: Rng,
    /// Of each instance, the canary's first: when its next stall begins, and when the present one ends.
    stalls: Vec<(f64, f64)>,
    next_burst: f64,
    next_reading: f64,
    /// Requests since the last reading: canary, stable.
    unread: (u64, u64),
}

/// Plays one release.
pub(crate) fn play(world: &World, seed: u64) -> Run {
    let mut rng = Rng::new(seed.wrapping_mul(0x2545_F491_4F6C_DD1D));
    let instances = world.stalls.map_or(0, |it| it.instances.0 + it.instances.1);
    let stalls = (0..instances).map(|_| (rng.exponential(world.stalls.map_or(1.0, |it| it.every)), 0.0)).collect();
    let next_burst = if let Poison::Burst { every, .. } = world.poison { rng.exponential(every) } else { f64::MAX };
    let mut traffic = Traffic { world, rng, stalls, next_burst, next_reading: 10.0, unread: (0, 0) };
    let mut analysis = Analysis::new(world.settings.clone());
    let mut run = Run { enough: None, failed: None, canary_bad: 0, outcomes: vec![], analysis: analysis.clone() };
    let (mut now, mut end) = (0.0, 0.0);
    if !world.warm {
        analysis.admitted();
    }
    for &(weight, seconds) in &world.steps {
        end += seconds;
        analysis.step(weight);
        while now < end {
            let tick = traffic.tick(now, weight);
            now += world.tick;
            run.canary_bad +=
                tick.cells.iter().filter(|it| it.arm == Arm::Canary).map(|it| it.bad.total()).sum::<u64>();
            analysis.observe(&tick);
            if run.enough.is_none() && analysis.enough() {
                run.enough = Some(now);
            }
            if analysis.verdict(false).is_some() {
                run.failed = Some(now);
                run.outcomes.push(Outcome::Fail);
                run.analysis = analysis;
                return run;
            }
        }
        run.outcomes.push(analysis.verdict(true).expect("the step is over").outcome);
    }
    run.analysis = analysis;
    run
}

impl Traffic<'_> {
    fn tick(&mut self, now: f64, weight: f64) -> Tick {
        let world = self.world;
        let mut tick = Tick { covers: Duration::from_secs_f64(world.tick), ..Tick::default() };
        let requests = (world.rate)(now) * world.scale * world.tick;
        for (arm, share, bad) in
            [(Arm::Canary, weight, (world.bad.1)(now)), (Arm::Stable, 1.0 - weight, (world.bad.0)(now))]
        {
            if arm == Arm::Stable && now < world.silent_until {
                continue;
            }
            let late = self.stalled(arm, now);
            let mean = requests * share;
            if world.settings.unit == Unit::Session {
                for _ in 0..self.rng.poisson(mean) {
                    // Sticky: the client's number decides its arm, by the share of the hash space.
                    let client = self.client_of(arm, weight);
                    let bad = self.rng.chance(bad);
                    let (failed, late) = self.kind(u64::from(bad));
                    tick.cells.push(cell(arm, client, weight, 1, failed, late));
                }
                continue;
            }
            let failed = self.rng.poisson(mean * bad);
            let rest = self.rng.poisson(mean * (1.0 - bad));
            for _ in 0..failed {
                let (failed, late) = self.kind(1);
                tick.cells.push(cell(arm, self.rng.below(world.clients), weight, 1, failed, late));
            }
            if late > 0.0 {
                let fails = world.stalls.is_some_and(|stalls| stalls.fails);
                for _ in 0..rest {
                    let bad = u64::from(self.rng.chance(late));
                    let (failed, late) = if fails { (bad, 0) } else { (0, bad) };
                    tick.cells.push(cell(arm, self.rng.below(world.clients), weight, 1, failed, late));
                }
            } else if rest > 0 {
                tick.cells.push(cell(arm, self.rng.below(world.clients), weight, rest, 0, 0));
            }
        }
        self.poison(now, weight, &mut tick);
        self.count(now, &mut tick);
        for _ in 0..self.rng.poisson(world.probes.0 * world.tick) {
            let (stable_bad, canary_bad) = (self.rng.chance(world.probes.1), self.rng.chance(world.probes.2));
            tick.pairs.push(Pair { canary_bad, stable_bad });
        }
        tick
    }

    fn count(&mut self, now: f64, tick: &mut Tick) {
        for cell in &tick.cells {
            match cell.arm {
                Arm::Canary => self.unread.0 += cell.requests,
                Arm::Stable => self.unread.1 += cell.requests,
            }
        }
        if now < self.next_reading {
            return;
        }
        self.next_reading = now + 10.0;
        let unread = std::mem::take(&mut self.unread);
        for name in &self.world.settings.counters {
            for (arm, requests, per_request) in
                [(Arm::Canary, unread.0, self.world.counted.1), (Arm::Stable, unread.1, self.world.counted.0)]
            {
                let increase = self.rng.poisson(requests as f64 * per_request);
                tick.counters.push(Counter { name: name.clone(), arm, increase, requests });
            }
        }
    }

    fn kind(&self, bad: u64) -> (u64, u64) {
        if self.world.late { (0, bad) } else { (bad, 0) }
    }

    /// A client that sticky routing sends to `arm`.
    fn client_of(&mut self, arm: Arm, weight: f64) -> u64 {
        loop {
            let client = self.rng.below(self.world.clients);
            let place = Rng::new(client ^ 0x5EED).uniform();
            if (place < weight) == (arm == Arm::Canary) {
                return client;
            }
        }
    }

    /// The share of an arm's requests that meet a stalled instance.
    fn stalled(&mut self, arm: Arm, now: f64) -> f64 {
        let Some(stalls) = self.world.stalls else { return 0.0 };
        let (from, to) = match arm {
            Arm::Canary => (0, stalls.instances.0),
            Arm::Stable => (stalls.instances.0, stalls.instances.0 + stalls.instances.1),
        };
        let mut stalled = 0;
        for at in from..to {
            let (next, end) = self.stalls[at as usize];
            if now >= next {
                let lasts = self.rng.exponential(stalls.lasts);
                self.stalls[at as usize] = (next + lasts + self.rng.exponential(stalls.every), next + lasts);
            }
            stalled += u64::from(now < self.stalls[at as usize].1.max(end));
        }
        stalled as f64 / (to - from).max(1) as f64
    }

    fn poison(&mut self, now: f64, weight: f64, tick: &mut Tick) {
        match self.world.poison {
            Poison::None => {}
            Poison::Burst { every, size } => {
                if now >= self.next_burst {
                    let client = self.rng.below(self.world.clients);
                    let sticky = Rng::new(client ^ 0x5EED).uniform() < weight;
                    for _ in 0..size {
                        let canary =
                            if self.world.settings.unit == Unit::Session { sticky } else { self.rng.chance(weight) };
                        let arm = if canary { Arm::Canary } else { Arm::Stable };
                        tick.cells.push(cell(arm, client, weight, 1, 1, 0));
                    }
                    self.next_burst = now + self.rng.exponential(every);
                }
            }
            Poison::OnCanary { per_second } => {
                for _ in 0..self.rng.poisson(per_second * self.world.tick) {
                    let canary = self.rng.chance(weight);
                    let arm = if canary { Arm::Canary } else { Arm::Stable };
                    tick.cells.push(cell(arm, u64::MAX, weight, 1, u64::from(canary), 0));
                }
            }
        }
    }
}

fn cell(arm: Arm, client: u64, weight: f64, requests: u64, failed: u64, late: u64) -> Cell {
    let bad = Bad { server_error: failed, slow: late, ..Bad::default() };
    Cell { arm, client, weight, requests, bad, client_failed: 0 }
}

/// Plays `releases` releases on seeds from `seed`, on two threads.
pub(crate) fn many(world: &World, seed: u64, releases: u64) -> Vec<Run> {
    let half = releases / 2;
    let range = |from: u64, to: u64| (from..to).map(|at| play(world, seed + at)).collect::<Vec<_>>();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| range(0, half));
        let mut runs = range(half, releases);
        runs.extend(first.join().expect("the other half ended"));
        runs
    })
}

/// The `quantile` of some numbers.
pub(crate) fn quantile(mut of: Vec<f64>, quantile: f64) -> f64 {
    of.sort_by(f64::total_cmp);
    let at = ((of.len() as f64 * quantile).ceil() as usize).clamp(1, of.len().max(1)) - 1;
    of.get(at).copied().unwrap_or(f64::NAN)
}
