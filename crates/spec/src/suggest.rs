//! "Did you mean …?": the known word that is nearest to a misspelt one.

/// Longer words are not compared: nobody mistypes them, and comparing costs their product.
const MAX_WORD: usize = 64;

/// The candidate with the smallest edit distance to `word`, if that is small for a word of this length. Ties go to the
/// candidate that comes first.
pub(crate) fn nearest<'c>(word: &str, candidates: impl IntoIterator<Item = &'c str>) -> Option<&'c str> {
    let letters: Vec<char> = word.to_lowercase().replace(['_', ' ', '.'], "-").chars().take(MAX_WORD + 1).collect();
    if letters.len() > MAX_WORD || letters.len() < 2 {
        return None;
    }
    let mut limit = (letters.len() / 3).clamp(1, 3) + 1;
    let mut best = None;
    for candidate in candidates {
        if candidate.len().abs_diff(letters.len()) >= limit.max(4) {
            continue;
        }
        let other: Vec<char> = candidate.to_lowercase().replace(['_', ' ', '.'], "-").chars().collect();
        if let Some(distance) = distance_below(&letters, &other, limit) {
            limit = distance;
            best = Some(candidate);
        }
    }
    best
}

/// Optimal string alignment distance (insertions, deletions, substitutions, swaps of neighbours), if below `limit`.
fn distance_below(a: &[char], b: &[char], limit: usize) -> Option<usize> {
    if a.len().abs_diff(b.len()) >= limit {
        return None;
    }
    let mut before: Vec<usize> = Vec::new();
    let mut previous: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut row = Vec::with_capacity(b.len() + 1);
        row.push(i + 1);
        for (j, y) in b.iter().enumerate() {
            let mut cost = (previous[j] + usize::from(x != y)).min(previous[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i - 1] == *y && b[j - 1] == *x {
                cost = cost.min(before[j - 1] + 1);
            }
            row.push(cost);
        }
        if row.iter().all(|cost| *cost >= limit) {
            return None;
        }
        before = std::mem::replace(&mut previous, row);
    }
    previous.last().copied().filter(|distance| *distance < limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_nearest_word_or_none() {
        let keys = ["command", "replicas", "ports", "restart", "depends_on", "env"];
        for (word, expected) in [
            ("replcas", Some("replicas")),
            ("comand", Some("command")),
            ("prots", Some("ports")),
            ("dependsOn", Some("depends_on")),
            ("depends-on", Some("depends_on")),
            ("evn", Some("env")),
            ("Restart", Some("restart")),
            ("colour", None),
            ("", None),
            ("x", None),
        ] {
            assert_eq!(nearest(word, keys), expected, "{word}");
        }
        assert_eq!(nearest(&"a".repeat(1_000_000), keys), None);
    }
}
