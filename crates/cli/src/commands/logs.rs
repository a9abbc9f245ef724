//! `orchestra logs`

use std::{collections::BTreeMap, time::Duration};

use orchestra_api::{Client, ClientError, LogLine, LogStream, LogsQuery, NameList};
use orchestra_model::{
    Code, Diagnostic, EnvironmentId, InstanceId,
    time::{UnixMillis, timestamp},
};

use crate::{
    args::{LogsArgs, Stream},
    exit::Exit,
    failure::{Failure, Result},
    output::Output,
    screen::Palette,
    session::Session,
    text::log_line,
};

/// Pause before the server is looked for again.
const PAUSE: Duration = Duration::from_millis(50);

pub(crate) async fn logs(args: &LogsArgs, session: &Session, output: &mut Output) -> Result<Exit> {
    let Some(client) = session.server_if_state(output).await? else {
        output.note("nothing is up");
        return Ok(Exit::Success);
    };
    let environment = session.environment(&client).await?;
    let query = LogsQuery {
        workload: (!args.workloads.is_empty()).then(|| NameList(args.workloads.clone())),
        instance: args.instance.clone(),
        release: args.release,
        stream: args.stream.map(|stream| match stream {
            Stream::Stdout => LogStream::Stdout,
            Stream::Stderr => LogStream::Stderr,
        }),
        tail: args.tail,
        since: args.since.map(|since| {
            (session.now)().saturating_sub(u64::try_from(since.duration().as_millis()).unwrap_or(u64::MAX))
        }),
        follow: args.follow,
    };
    let mut client = client;
    let mut place = Place::default();
    let mut silent = true;
    let mut prefixes = Prefixes { palette: output.palette, width: 0, colors: BTreeMap::new() };
    loop {
        // What is followed goes on where it was once a server answers again; what is not has been read to its end.
        match read(&client, &environment, &place.resume(&query), |line| {
            if !place.is_new(&line) {
                return Ok(());
            }
            silent = false;
            if args.raw {
                output.bytes(&line.line.0)?;
                output.text("")?;
            } else if output.json {
                output.ndjson(&line)?;
            } else {
                let text = prefixes.line(&line, args.timestamps);
                output.line(&text)?;
            }
            Ok(())
        })
        .await
        {
            Ok(()) if !args.follow => break,
            Err(Stop::Client(error)) if !args.follow || !error.is_lost() => return Err(error.into()),
            Err(Stop::Failure(failure)) => return Err(failure),
            Ok(()) | Err(Stop::Client(_)) => {
                // A server that stops ends the answer before it goes.
                tokio::time::sleep(PAUSE).await;
                client = session.server_again(output).await?;
            }
        }
    }
    if silent && !args.workloads.is_empty() {
        // Output of what was deleted may still be there, so only now a name can turn out to be a mistake.
        let status = client.environment(&environment).await?;
        let known = status.services.iter().map(|it| &it.name).chain(status.jobs.iter().map(|it| &it.name));
        let known: Vec<_> = known.collect();
        if let Some(name) = args.workloads.iter().find(|name| !known.contains(name)) {
            let known: Vec<String> = known.into_iter().map(ToString::to_string).collect();
            return Err(Diagnostic::error(
                Code::NOT_FOUND,
                format!("there is no service or job `{name}` in {environment}"),
            )
            .help(format!("there are: {}", known.join(", ")))
            .into());
        }
    }
    Ok(Exit::Success)
}

/// Why reading ended before its end.
enum Stop {
    Client(ClientError),
    Failure(Failure),
}

async fn read(
    client: &Client,
    environment: &EnvironmentId,
    query: &LogsQuery,
    mut show: impl FnMut(LogLine) -> Result,
) -> Result<(), Stop> {
    let mut lines = client.logs(environment, query).await.map_err(Stop::Client)?;
    while let Some(line) = lines.next().await {
        show(line.map_err(Stop::Client)?).map_err(Stop::Failure)?;
    }
    Ok(())
}

/// How far the output of every instance was read, so that reading can go on after a lost connection without a gap or a
/// repetition.
#[derive(Default)]
struct Place(BTreeMap<(InstanceId, u32, LogStream), Seen>);

/// What was read of one stream.
struct Seen {
    /// Time of its last line, and how many lines of that very millisecond were read.
    at: UnixMillis,
    lines: u32,
    /// Lines of that millisecond that came again since the reconnection; `None` once it is caught up with.
    again: Option<u32>,
}

impl Place {
    /// Lines of different instances arrive in about the order of their times: by so much they may be apart.
    const APART: UnixMillis = 5_000;

    /// What to ask next.
    fn resume(&mut self, query: &LogsQuery) -> LogsQuery {
        let Some(newest) = self.0.values().map(|seen| seen.at).max() else { return query.clone() };
        self.0.values_mut().for_each(|seen| seen.again = Some(0));
        let since = newest.saturating_sub(Self::APART).max(query.since.unwrap_or(0));
        LogsQuery { since: Some(since), tail: None, ..query.clone() }
    }

    /// Whether a line was not read before.
    fn is_new(&mut self, line: &LogLine) -> bool {
        let key = (line.instance.clone(), line.attempt, line.stream);
        let seen = self.0.entry(key).or_insert(Seen { at: line.at, lines: 0, again: None });
        if let Some(again) = &mut seen.again {
            *again += u32::from(line.at == seen.at);
            if line.at < seen.at || (line.at == seen.at && *again <= seen.lines) {
                return false;
            }
            // From here on nothing is compared: a clock that is set back must not silence a program.
            seen.again = None;
        }
        seen.lines = if line.at == seen.at { seen.lines + 1 } else { 1 };
        seen.at = line.at;
        true
    }
}

/// Who wrote a line, in a colour of its own.
struct Prefixes {
    palette: Palette,
    width: usize,
    colors: BTreeMap<InstanceId, usize>,
}

impl Prefixes {
    fn line(&mut self, line: &LogLine, timestamps: bool) -> String {
        let name = line.instance.to_string();
        self.width = self.width.max(name.len());
        let next = self.colors.len();
        let color = *self.colors.entry(line.instance.clone()).or_insert(next);
        let mark = if line.stream == LogStream::Stderr { '!' } else { '|' };
        let prefix = self.palette.distinct(color, &format!("{name:width$} {mark}", width = self.width));
        let time = if timestamps { self.palette.dim(&timestamp(line.at)) + " " } else { String::new() };
        format!("{prefix} {time}{}", log_line(&line.line.0, self.palette.color))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(instance: &str, at: UnixMillis) -> LogLine {
        let instance = instance.parse().unwrap();
        LogLine { instance, attempt: 1, stream: LogStream::Stdout, at, line: b"x\n".to_vec().into() }
    }

    #[test]
    fn after_a_reconnection_nothing_comes_twice_and_nothing_is_missed() {
        let mut place = Place::default();
        let query = LogsQuery { tail: Some(5), follow: true, ..LogsQuery::default() };
        assert_eq!(place.resume(&query), query, "nothing was read yet");
        // The clock was set back once: every line is shown all the same.
        for (instance, at) in [("api-r1-1", 90_000), ("api-r1-1", 10_000), ("api-r1-2", 10_001), ("api-r1-1", 10_001)] {
            assert!(place.is_new(&line(instance, at)));
        }
        assert!(place.is_new(&line("api-r1-1", 10_001)));
        let resumed = place.resume(&query);
        assert_eq!((resumed.since, resumed.tail, resumed.follow), (Some(5_001), None, true));
        // Two lines of one millisecond were read, a third was not.
        for (at, expected) in [(10_000, false), (10_001, false), (10_001, false), (10_001, true), (10_001, true)] {
            assert_eq!(place.is_new(&line("api-r1-1", at)), expected, "{at}");
        }
        assert!(!place.is_new(&line("api-r1-2", 10_001)));
        assert!(place.is_new(&line("api-r1-2", 10_002)));
        assert!(place.is_new(&line("api-r2-1", 1)), "an instance that was not there before");
        // What was asked for by time stays the earliest.
        let query = LogsQuery { since: Some(10_000), ..query };
        assert_eq!(place.resume(&query).since, Some(10_000));
    }
}
