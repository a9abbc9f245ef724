//! Following a run to its end: news to the screen, Ctrl-C to the server, and through a server that is lost on the way.

use std::{io, pin::Pin, time::Duration};

use orchestra_api::{Client, ClientError, RunEvent};
use orchestra_model::{Code, EnvironmentId, EventKind, record::RunRecord};
use tokio::{
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval},
};

use crate::{
    commands::rollout::blocked,
    exit::Exit,
    failure::{Failure, Result},
    output::Output,
    progress::{Board, InPlace},
    session::Session,
};

/// How often the tree is drawn again though nothing happened: its times go on.
const FRAME: Duration = Duration::from_millis(100);
/// How often in a row a lost server is looked for before the command gives up.
pub(crate) const ATTEMPTS: u32 = 5;
/// Pause before it is looked for again, but for the first time.
pub(crate) const PAUSE: Duration = Duration::from_millis(500);
/// How long the second Ctrl-C waits for the answer to the first.
const CONFIRM: Duration = Duration::from_secs(2);
/// After so long without news it is asked whether anything goes on at all.
const SILENCE: Duration = Duration::from_secs(2);

/// Ctrl-C, as often as it is pressed.
pub(crate) struct Interrupts(pub(crate) mpsc::Receiver<()>);

impl Interrupts {
    /// Completes on the next Ctrl-C; never, if none can come. Cancel-safe.
    pub(crate) async fn pressed(&mut self) {
        if self.0.recv().await.is_none() {
            std::future::pending::<()>().await;
        }
    }

    /// The future's output, or that Ctrl-C came first.
    pub(crate) async fn guard<T>(&mut self, future: impl Future<Output = Result<T>>) -> Result<T> {
        // Dropping the future gives up a request; nothing that it began on the server depends on it.
        tokio::select! {
            biased;
            () = self.pressed() => Err(Failure::Silent(Exit::Interrupted)),
            result = future => result,
        }
    }
}

enum News {
    Event(Option<Result<RunEvent, ClientError>>),
    Interrupt,
    Frame,
    Silence,
    /// Whether anything goes on at all, and if not, why.
    Trouble(Option<String>),
}

/// Why nothing goes on in an environment. A server that is lost or does not answer is the stream's affair.
async fn trouble(client: Client, environment: EnvironmentId) -> Option<String> {
    let status = tokio::time::timeout(SILENCE, client.environment(&environment)).await.ok()?.ok()?;
    status.trouble
}

/// Shows a run until it ends.
pub(crate) async fn follow(
    session: &Session,
    output: &mut Output,
    interrupts: &mut Interrupts,
    mut client: Client,
    run: &RunRecord,
) -> Result<RunRecord> {
    let mut screen = Screen::new(output, run);
    let mut stream = client.run_events(run.id);
    let mut frames = interval(FRAME);
    frames.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut cancelled = false;
    let mut lost = 0;
    let mut heard = Instant::now();
    let mut said = None;
    let mut asking: Option<Pin<Box<dyn Future<Output = Option<String>> + Send>>> = None;
    loop {
        // Every arm is cancel-safe: the stream keeps what it read, the channel its items, the interval its place, and a
        // question goes on where it was.
        let news = tokio::select! {
            biased;
            () = interrupts.pressed() => News::Interrupt,
            event = stream.next() => News::Event(event),
            _ = frames.tick(), if screen.is_live => News::Frame,
            trouble = async { asking.as_mut().expect("something was asked").await }, if asking.is_some() => News::Trouble(trouble),
            () = tokio::time::sleep_until(heard + SILENCE), if asking.is_none() => News::Silence,
        };
        if !matches!(news, News::Frame) {
            heard = Instant::now();
        }
        match news {
            News::Frame => screen.draw(output)?,
            News::Silence => asking = Some(Box::pin(trouble(client.clone(), run.environment.clone()))),
            News::Trouble(trouble) => {
                asking = None;
                if let Some(trouble) = trouble.as_ref().filter(|_| trouble != said) {
                    screen.say(output, &blocked(trouble))?;
                }
                said = trouble;
            }
            News::Event(Some(Ok(RunEvent::Done(record)))) => {
                screen.end(output)?;
                if output.json {
                    output.ndjson(&RunEvent::Done(record.clone()))?;
                }
                return Ok(*record);
            }
            News::Event(Some(Ok(event))) => {
                lost = 0;
                screen.show(output, event)?;
            }
            News::Event(Some(Err(error))) if error.is_lost() && lost < ATTEMPTS && !session.is_remote() => {
                lost += 1;
                // Nothing is drawn while others may write.
                screen.clear(output)?;
                output.note("the connection to the server was lost; looking for it again");
                if lost > 1 {
                    tokio::time::sleep(PAUSE).await;
                }
                // If it is gone this starts it, and it goes on with the run or puts back what the run changed.
                client = interrupts.guard(session.server(output)).await?;
                stream.use_client(client.clone());
            }
            News::Event(Some(Err(error))) => {
                screen.end(output)?;
                return Err(error.into());
            }
            News::Event(None) => {
                // `Done` ends the loop above; a stream does not end without it.
                return client.run(run.id).await.map_err(Into::into);
            }
            News::Interrupt if cancelled => return Err(leave(&mut screen, output, run, true)),
            News::Interrupt => {
                cancelled = true;
                cancel(&mut screen, output, interrupts, &client, run).await?;
            }
        }
    }
}

/// Asks the server to cancel a run; the stream says what comes of it.
async fn cancel(
    screen: &mut Screen,
    output: &mut Output,
    interrupts: &mut Interrupts,
    client: &Client,
    run: &RunRecord,
) -> Result<()> {
    screen.say(
        output,
        &format!(
            "cancelling {}: it stops safely and puts back what it changed; Ctrl-C again leaves it to the server",
            run.id
        ),
    )?;
    let mut cancel = std::pin::pin!(client.cancel_run(run.id));
    // Both arms are cancel-safe: the request goes on below.
    let answer = tokio::select! {
        biased;
        () = interrupts.pressed() => None,
        answer = &mut cancel => Some(answer),
    };
    let Some(answer) = answer else {
        // The wish to cancel must not be lost because somebody was in a hurry.
        let confirmed = tokio::time::timeout(CONFIRM, cancel).await.is_ok_and(|answer| answer.is_ok());
        return Err(leave(screen, output, run, confirmed));
    };
    match answer.map_err(Failure::from) {
        Ok(_) => {}
        Err(failure @ Failure::Silent(_)) => return Err(failure),
        // It ended in this moment, or the server is being replaced: the stream says which.
        Err(Failure::Told(diagnostics)) => {
            // That a run has ended is what was asked for; the stream says how.
            for diagnostic in diagnostics.iter().filter(|it| it.code != Code::RUN_CANCELLED) {
                screen.say(output, &format!("the cancellation was not accepted: {}", diagnostic.message))?;
            }
        }
        Err(Failure::OutputClosed) => return Err(Failure::OutputClosed),
    }
    Ok(())
}

/// Says what becomes of a run that is not followed any more.
fn leave(screen: &mut Screen, output: &mut Output, run: &RunRecord, cancelling: bool) -> Failure {
    if let Err(error) = screen.end(output) {
        return error.into();
    }
    let what = if cancelling {
        "which goes on with putting back what it changed"
    } else {
        "which has not confirmed that it cancels it"
    };
    output.note(&format!("left {} to the server, {what}; see `orchestra status`", run.id));
    Failure::Silent(Exit::Interrupted)
}

/// Where the news goes: a tree in place on a terminal, lines elsewhere, JSON if asked for.
struct Screen {
    board: Board,
    in_place: InPlace,
    is_live: bool,
    /// Origin of the board's clock, shifted by how long the run has gone on already.
    origin: Instant,
    started: u64,
}

impl Screen {
    fn new(output: &Output, run: &RunRecord) -> Self {
        let is_live = output.terminal.stdout && !output.json && !output.quiet;
        Self { board: Board::new(run), in_place: InPlace::default(), is_live, origin: Instant::now(), started: 0 }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn draw(&mut self, output: &mut Output) -> io::Result<()> {
        let lines = self.board.draw(self.now(), self.started, output.size(), output.palette);
        let text = self.in_place.redraw(&lines);
        output.text(&text)
    }

    fn show(&mut self, output: &mut Output, event: RunEvent) -> io::Result<()> {
        if output.json {
            return output.ndjson(&event);
        }
        match event {
            RunEvent::Progress(progress) => {
                let line = self.board.update(progress, self.now(), output.palette);
                match line {
                    Some(line) if !self.is_live && !output.quiet => output.line(&line),
                    _ => Ok(()),
                }
            }
            RunEvent::Event(event) if event.kind == EventKind::RunReverting => {
                self.say(output, &format!("putting back what was changed: {}", event.cause))
            }
            // The rollout goes on without it, and nothing else would say so.
            RunEvent::Event(event) if event.kind == EventKind::FlagSwitched => self.say(output, &event.cause),
            RunEvent::Event(_) | RunEvent::Done(_) => Ok(()),
        }
    }

    /// Takes the tree off the screen until it is drawn again.
    fn clear(&mut self, output: &mut Output) -> io::Result<()> {
        let clear = self.in_place.clear();
        if clear.is_empty() { Ok(()) } else { output.text(&clear) }
    }

    /// Says something beside the tree.
    fn say(&mut self, output: &mut Output, text: &str) -> io::Result<()> {
        self.clear(output)?;
        output.note(text);
        if self.is_live { self.draw(output) } else { Ok(()) }
    }

    /// Draws the tree for the last time and leaves it.
    fn end(&mut self, output: &mut Output) -> io::Result<()> {
        if self.is_live {
            self.draw(output)?;
            self.in_place.leave();
        }
        Ok(())
    }
}
