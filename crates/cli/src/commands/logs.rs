//! `orchestra logs`

use std::collections::BTreeMap;

use orchestra_api::{LogLine, LogStream, LogsQuery, NameList};
use orchestra_model::{Code, Diagnostic, InstanceId};

use crate::{
    args::{LogsArgs, Stream},
    exit::Exit,
    failure::Result,
    output::Output,
    screen::Palette,
    session::Session,
    text::{log_line, timestamp},
};

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
    let mut lines = client.logs(&environment, &query).await?;
    let mut silent = true;
    let mut prefixes = Prefixes { palette: output.palette, width: 0, colors: BTreeMap::new() };
    while let Some(line) = lines.next().await {
        let line = line?;
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
