//! The text in which programs export metrics: Prometheus' format 0.0.4 and `OpenMetrics` 1.0.
//!
//! Sources: <https://prometheus.io/docs/instrumenting/exposition_formats/> and
//! <https://prometheus.io/docs/specs/om/open_metrics_spec/>. What is read is what both have in common: a name, labels in
//! braces, a number, and after it a timestamp and an exemplar that are of no interest here. Lines that cannot be read are
//! passed over unless they begin like one that is wanted; a text without any line that can be read is an error, and so is
//! one of more than [`MAX_SERIES`] series.

use orchestra_model::consult::Selector;

/// More series are not read.
pub const MAX_SERIES: usize = 100_000;

/// The sum of the series that fit each selector: `None` if none does, or if it is no finite number.
///
/// # Errors
///
/// What is wrong with the text, in one clause.
pub fn read(text: &[u8], series: &[Selector]) -> Result<Vec<Option<f64>>, String> {
    let mut sums: Vec<Option<f64>> = vec![None; series.len()];
    let (mut read, mut strange) = (0_usize, None);
    for (index, line) in text.split(|byte| *byte == b'\n').enumerate() {
        let line = String::from_utf8_lossy(line);
        let line = line.trim_matches(|c: char| c == ' ' || c == '\t' || c == '\r');
        if line == "# EOF" {
            break;
        }
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some(sample) = sample(line) else {
            let wanted = series.iter().any(|it| begins_with(line, &it.name));
            if wanted {
                return Err(format!("line {} cannot be read", index + 1));
            }
            strange.get_or_insert(index + 1);
            continue;
        };
        read += 1;
        if read > MAX_SERIES {
            return Err(format!("more than {MAX_SERIES} series"));
        }
        for (selector, sum) in series.iter().zip(&mut sums) {
            if sample.fits(selector) {
                *sum = Some(sum.unwrap_or(0.0) + sample.value);
            }
        }
    }
    if let (0, Some(line)) = (read, strange) {
        return Err(format!("these are no metrics in the text format of Prometheus: line {line} cannot be read"));
    }
    Ok(sums.into_iter().map(|sum| sum.filter(|sum| sum.is_finite())).collect())
}

fn begins_with(line: &str, name: &str) -> bool {
    line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ', '\t']))
}

/// One line.
struct Sample<'a> {
    name: std::borrow::Cow<'a, str>,
    labels: Vec<(std::borrow::Cow<'a, str>, String)>,
    value: f64,
}

impl Sample<'_> {
    fn fits(&self, selector: &Selector) -> bool {
        // An empty label is the same as none.
        let of = |label: &str| self.labels.iter().find(|(name, _)| name == label).map_or("", |(_, value)| value);
        self.name == selector.name && selector.labels.iter().all(|(label, value)| of(label) == value)
    }
}

fn sample(line: &str) -> Option<Sample<'_>> {
    let end = line.find(['{', ' ', '\t'])?;
    let (name, rest) = line.split_at(end);
    let mut sample = Sample { name: name.into(), labels: Vec::new(), value: 0.0 };
    let rest = rest.trim_start();
    let rest = match rest.strip_prefix('{') {
        Some(rest) => labels(rest, &mut sample)?,
        None => rest,
    };
    if sample.name.is_empty() {
        return None;
    }
    let mut words = rest.split_ascii_whitespace();
    sample.value = words.next()?.parse().ok()?;
    match words.next() {
        None | Some("#") => return Some(sample),
        Some(timestamp) => timestamp.parse::<f64>().ok()?,
    };
    matches!(words.next(), None | Some("#")).then_some(sample)
}

/// What is in the braces, and the rest of the line. A name in quotes without a value is the metric's own
/// (<https://prometheus.io/docs/guides/utf8/>).
fn labels<'a>(mut rest: &'a str, sample: &mut Sample<'a>) -> Option<&'a str> {
    loop {
        rest = rest.trim_start();
        if let Some(after) = rest.strip_prefix('}') {
            return Some(after);
        }
        let label = if let Some(text) = rest.strip_prefix('"') {
            let (label, after) = quoted(text)?;
            rest = after.trim_start();
            std::borrow::Cow::from(label)
        } else {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || matches!(c, '_' | ':' | '.')))?;
            let (label, after) = rest.split_at(end);
            rest = after.trim_start();
            label.into()
        };
        if label.is_empty() {
            return None;
        }
        if let Some(after) = rest.strip_prefix('=') {
            let (value, after) = quoted(after.trim_start().strip_prefix('"')?)?;
            sample.labels.push((label, value));
            rest = after.trim_start();
        } else if sample.name.is_empty() {
            sample.name = label;
        } else {
            return None;
        }
        match rest.strip_prefix(',') {
            Some(after) => rest = after,
            None if rest.starts_with('}') => {}
            None => return None,
        }
    }
}

/// A text up to its closing quote, without its escapes, and what follows. A backslash before anything else than `\`, `"`
/// and `n` stands for itself.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => match characters.next()?.1 {
                'n' => value.push('\n'),
                c @ ('\\' | '"') => value.push(c),
                c => value.extend(['\\', c]),
            },
            c => value.push(c),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(text: &str, selector: &str) -> Result<Option<f64>, String> {
        read(text.as_bytes(), &[selector.parse().unwrap()]).map(|values| values[0])
    }

    /// The example of the format's own page.
    const PUBLISHED: &str = r#"
# HELP http_requests_total The total number of HTTP requests.
# TYPE http_requests_total counter
http_requests_total{method="post",code="200"} 1027 1395066363000
http_requests_total{method="post",code="400"}    3 1395066363000

# Escaping in label values:
msdos_file_access_time_seconds{path="C:\\DIR\\FILE.TXT",error="Cannot find file:\n\"FILE.TXT\""} 1.458255915e9

# Minimalistic line:
metric_without_timestamp_and_labels 12.47

# A weird metric from before the epoch:
something_weird{problem="division by zero"} +Inf -3982045

# A histogram, which has a pretty complex representation in the text format:
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{le="0.05"} 24054
http_request_duration_seconds_bucket{le="+Inf"} 144320
http_request_duration_seconds_sum 53423
http_request_duration_seconds_count 144320
"#;

    #[test]
    fn the_published_example_is_read() {
        assert_eq!(of(PUBLISHED, "http_requests_total"), Ok(Some(1030.0)));
        assert_eq!(of(PUBLISHED, "http_requests_total{code=\"400\"}"), Ok(Some(3.0)));
        assert_eq!(of(PUBLISHED, "http_requests_total{code=\"404\"}"), Ok(None));
        assert_eq!(of(PUBLISHED, "metric_without_timestamp_and_labels"), Ok(Some(12.47)));
        assert_eq!(of(PUBLISHED, "something_weird"), Ok(None), "infinite is no number to decide by");
        assert_eq!(of(PUBLISHED, "http_request_duration_seconds_bucket{le=\"0.05\"}"), Ok(Some(24054.0)));
        assert_eq!(of(PUBLISHED, "http_requests"), Ok(None));
        let path =
            r#"msdos_file_access_time_seconds{path="C:\\DIR\\FILE.TXT",error="Cannot find file:\n\"FILE.TXT\""}"#;
        assert_eq!(of(PUBLISHED, path), Ok(Some(1.458_255_915e9)));
    }

    #[test]
    fn openmetrics_is_read() {
        let text = "# TYPE foo counter\r\nfoo_total{a=\"x # {} y\"} 17.0 1520879607.789 # {trace_id=\"K # p\"} 0.67 1520879607.0\r\n\
                    foo_total{a=\"}\"} 1 # {} 1\nfoo_created{a=\"}\"} 1520872607.123\n# EOF\nfoo_total 99\n";
        assert_eq!(of(text, "foo_total"), Ok(Some(18.0)));
        assert_eq!(of(text, "foo_total{a=\"}\"}"), Ok(Some(1.0)));
        assert_eq!(of("{\"foo_total\",a=\"1\"} 3\n{\"my.name\", b=\"2\"} 4", "foo_total{a=\"1\"}"), Ok(Some(3.0)));
    }

    #[test]
    fn odd_lines_are_passed_over_unless_they_are_meant() {
        assert_eq!(of("a 1\nthis is prose, really\nb{x=\"1} 3\n", "a"), Ok(Some(1.0)));
        assert_eq!(of("a 1\na{x=\"1} 3\n", "a"), Err("line 2 cannot be read".to_owned()));
        assert_eq!(of("a one\n", "a"), Err("line 1 cannot be read".to_owned()));
        assert_eq!(of("a 1 2 3\n", "a"), Err("line 1 cannot be read".to_owned()));
        assert!(of("<!DOCTYPE html>\n<html></html>", "a").unwrap_err().contains("no metrics"));
        assert_eq!(of("", "a"), Ok(None));
        assert_eq!(of("a NaN\n", "a"), Ok(None));
        assert_eq!(of("a 1e308\na{x=\"1\"} 1e308\n", "a"), Ok(None));
        assert_eq!(of(" \ta{x = \"1\" , } 2 \n", "a{x=\"1\",y=\"\"}"), Ok(Some(2.0)));
        assert_eq!(of("a{x=\"\\q\"} 2", "a{x=\"\\\\q\"}"), Ok(Some(2.0)));
    }

    #[test]
    fn what_is_too_much_is_not_read() {
        let text = "a{n=\"1\"} 1\n".repeat(MAX_SERIES + 1);
        assert_eq!(of(&text, "a"), Err("more than 100000 series".to_owned()));
        let long = format!("a{{x=\"{}\"}} 1\n", "y".repeat(1 << 20));
        assert_eq!(of(&long, "a"), Ok(Some(1.0)));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_fail_otherwise(text in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&text, &["a".parse().unwrap()]);
        }

        #[test]
        fn lines_that_look_alike_are_read_or_refused(text in "(a|b|\\{|\"a\"|\"|,|=|\\}| |\\\\|n|1|\\.5|#|\n){0,40}") {
            let _ = of(&text, "a{b=\"1\"}");
        }

        #[test]
        fn any_label_value_survives_its_escapes(value in any::<String>(), number in -1e9..1e9_f64) {
            let selector = Selector { name: "a".to_owned(), labels: [("b".to_owned(), value)].into() };
            let line = format!("x 1\n{selector} {number}\n");
            prop_assert_eq!(read(line.as_bytes(), &[selector]).unwrap(), vec![Some(number)]);
        }
    }
}
