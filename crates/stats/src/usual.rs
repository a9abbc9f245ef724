//! How much is bad of what the stable release answers, so that nobody is asked to be better than that.
//!
//! Where all traffic goes to the new release there is nothing to compare it with, and it is held to a bound that was chosen
//! without knowing the service. A service of which 5 % are always bad would lose every release by a bound of 2 %. So, unless
//! the bound was written down, it gives way to the highest share of bad responses that the stable release may have, by what
//! was seen of it while it still had traffic: the upper limit of the score interval (Wilson, "Probable inference, the law of
//! succession, and statistical inference", 1927) at three standard errors, which a true share exceeds about once in 700 times.

/// Responses below which nothing is concluded.
const LEAST: f64 = 200.0;

/// Standard errors.
const Z: f64 = 3.0;

/// Share (0 to 1) that the true one hardly exceeds if `bad` of `number` were bad; 0 if that is too little to know.
pub(crate) fn limit(bad: f64, number: f64) -> f64 {
    if !(number >= LEAST && number.is_finite()) {
        return 0.0;
    }
    let share = (bad / number).clamp(0.0, 1.0);
    let middle = share + Z * Z / (2.0 * number);
    let half = Z * (share * (1.0 - share) / number + Z * Z / (4.0 * number * number)).sqrt();
    ((middle + half) / (1.0 + Z * Z / number)).min(0.999)
}

#[cfg(test)]
mod tests {
    use super::limit;

    #[test]
    fn the_limit_is_above_what_was_seen_and_comes_closer() {
        for (bad, number, expected) in [
            (199.0, 199.0, 0.0),
            (10.0, 200.0, 0.1186),
            (500.0, 10_000.0, 0.0570),
            (0.0, 10_000.0, 0.0009),
            (500.0, 500.0, 0.999),
            (f64::INFINITY, f64::INFINITY, 0.0),
        ] {
            assert!((limit(bad, number) - expected).abs() < 1e-4, "{bad} of {number}: {}", limit(bad, number));
        }
    }
}
