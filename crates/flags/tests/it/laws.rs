//! Laws, on random flags and contexts. `PROPTEST_CASES=100000` looks longer.

use orchestra_flags::{Compiled, Context, bucket::choose};
use orchestra_model::flag::FlagSet;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::{all, ask, body, flags, one, served};

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// Shares of up to five variants that add up to 100 %, in thousandths.
fn shares() -> impl Strategy<Value = Vec<u32>> {
    prop::collection::vec(0_u32..=100_000, 0..4).prop_map(|mut cuts| {
        cuts.sort_unstable();
        let ends = cuts.iter().copied().chain([100_000]);
        ends.scan(0, |start, end| Some(end - std::mem::replace(start, end))).collect()
    })
}

fn chosen(flag: &str, shares: &[u32], key: &str) -> usize {
    choose(flag, NAMES.into_iter().zip(shares.iter().copied()), key).unwrap()
}

proptest! {
    #[test]
    fn who_has_a_variant_keeps_it_while_only_its_share_grows(
        before in shares(),
        grows in any::<prop::sample::Index>(),
        takes in prop::collection::vec(0.0_f64..=1.0, 5),
        flag in "[a-z]{1,8}",
        keys in prop::collection::vec(".{1,12}", 1..50),
    ) {
        let grows = grows.index(before.len());
        let mut after = before.clone();
        for (variant, part) in takes.iter().enumerate().take(before.len()) {
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a part of a share is a share")]
            let taken = (f64::from(before[variant]) * part) as u32;
            if variant != grows {
                after[variant] -= taken;
                after[grows] += taken;
            }
        }
        for key in &keys {
            if chosen(&flag, &before, key) == grows {
                prop_assert_eq!(chosen(&flag, &after, key), grows, "{} of {:?}, then {:?}", key, before, after);
            }
        }
    }

    #[test]
    fn a_share_of_nothing_is_never_chosen_and_one_of_everything_always(shares in shares(), key in ".*") {
        let variant = chosen("flag", &shares, &key);
        prop_assert!(shares[variant] > 0);
    }

    #[test]
    fn bulk_answers_are_the_single_ones(key in prop::option::of(".{0,8}"), email in "[a-z]{0,3}(@acme.example)?",
                                        tenant in prop::option::of(0..9), account in prop::option::of(0..9)) {
        let served = served(&flags());
        let mut context = json!({"email": email});
        if let Some(key) = key { context["targetingKey"] = json!(key); }
        if let Some(tenant) = tenant { context["tenant"] = json!({"id": tenant}); }
        if let Some(account) = account { context["account"] = json!(account); }
        let bulk = body(&all(&served, &context, &[]));
        let answers = bulk["flags"].as_array().unwrap();
        prop_assert_eq!(answers.len(), flags().flags.len());
        for answer in answers {
            let single = body(&one(&served, answer["key"].as_str().unwrap(), &context));
            prop_assert_eq!(answer, &single);
        }
    }

    #[test]
    fn the_etag_changes_exactly_with_the_answer(first in 0..40_u32, second in 0..40_u32, share in 0..=100_u32, other in 0..=100_u32) {
        let set = |share: u32| {
            let mut set = serde_json::to_value(flags()).unwrap();
            let shares = &mut set["flags"]["replies"]["rules"][0]["serve"]["split"]["shares"];
            shares[0]["share"] = format!("{share}%").into();
            shares[1]["share"] = format!("{}%", 100 - share).into();
            served(&serde_json::from_value::<FlagSet>(set).unwrap())
        };
        let ask = |share, user: u32| all(&set(share), &json!({"targetingKey": format!("user-{user}")}), &[]);
        let (a, b) = (ask(share, first), ask(other, second));
        prop_assert_eq!(a.header("etag") == b.header("etag"), a.body == b.body);
        prop_assert_eq!(ask(share, first), a.clone(), "asked again, answered the same");
        let seen = [("if-none-match", b.header("etag").unwrap())];
        let again = all(&set(share), &json!({"targetingKey": format!("user-{first}")}), &seen);
        prop_assert_eq!(again.status == 304, a.body == b.body);
    }

    #[test]
    fn no_request_is_answered_by_a_panic_or_a_lie(method in "(GET|POST|OPTIONS|PUT|)", path in "(/ofrep/v1/(evaluate/flags|events))?[/%?#a-z0-9]{0,12}",
                                                  name in "(origin|if-none-match|authorization|last-event-id|access-control-request-headers)", value in ".{0,30}",
                                                  content in prop::collection::vec(any::<u8>(), 0..60)) {
        let response = ask(&served(&flags()), &method, &path, &[(&name, &value)], &content);
        prop_assert!([200, 204, 304, 400, 404, 405].contains(&response.status), "{:?}", response);
        for (_, value) in &response.headers {
            prop_assert!(!value.contains(['\r', '\n']), "{:?}", value);
        }
    }

    #[test]
    fn a_set_survives_its_own_notation(number in any::<f64>().prop_filter("JSON has no others", |n| n.is_finite()), text in ".*") {
        let mut value = serde_json::to_value(flags()).unwrap();
        value["flags"]["tenants"]["variants"]["low"] = json!(number);
        value["flags"]["banner"]["variants"]["plain"] = json!(text);
        let set: FlagSet = serde_json::from_value(value).unwrap();
        let again: FlagSet = serde_json::from_str(&serde_json::to_string(&set).unwrap()).unwrap();
        prop_assert_eq!(again.digest(), set.digest());
        prop_assert_eq!(again, set);
    }
}

/// Expected counts of 200,000 users, within four standard deviations of a binomial distribution.
#[test]
fn shares_are_kept_in_the_long_run() {
    const USERS: u32 = 200_000;
    for shares in [&[100, 99_900][..], &[10_000, 90_000], &[10_000, 20_000, 30_000, 40_000], &[33_333, 33_333, 33_334]]
    {
        let mut counts = vec![0_u32; shares.len()];
        for user in 0..USERS {
            counts[chosen("checkout", shares, &format!("user-{user}"))] += 1;
        }
        for (share, count) in shares.iter().zip(counts) {
            let probability = f64::from(*share) / 100_000.0;
            let (mean, variance) =
                (f64::from(USERS) * probability, f64::from(USERS) * probability * (1.0 - probability));
            assert!(
                (f64::from(count) - mean).abs() < 4.0 * variance.sqrt(),
                "{count} of {mean} for {share} of {shares:?}"
            );
        }
    }
}

/// Being in 10 % of one flag says nothing about another.
#[test]
fn flags_draw_independently() {
    let both = (0..100_000)
        .filter(|user| ["one", "two"].iter().all(|flag| chosen(flag, &[10_000, 90_000], &user.to_string()) == 0))
        .count();
    assert!((900..1100).contains(&both), "{both} of an expected 1000");
}

/// The digest of a set is part of nothing but its content: order in the file, and how often it is compiled, do not matter.
#[test]
fn digests_are_of_the_content() {
    let set = flags();
    let again: FlagSet = serde_json::from_value(serde_json::to_value(&set).unwrap()).unwrap();
    assert_eq!(Compiled::new(&set).digest(), Compiled::new(&again).digest());
    let mut changed = set.clone();
    changed.flags.get_mut("editor").unwrap().enabled = false;
    assert_ne!(Compiled::new(&set).digest(), Compiled::new(&changed).digest());
    let value: Value = serde_json::to_value(&set).unwrap();
    assert!(value["overrides"].is_null(), "nothing is written of what is not there");
    assert!(Compiled::new(&set).evaluate("editor", &Context::default()).is_ok());
}
