//! Waiting for an answer, and saying why it does not come.
//!
//! While the state cannot be written, the server keeps what it is asked until it can: an answer may take as long as a disk
//! stays full. Whoever waits is told so.

use std::{pin::pin, time::Duration};

use orchestra_api::Client;

use crate::{commands::rollout::blocked, output::Output, session::Session};

/// An answer that takes longer wants a reason.
const SOON: Duration = Duration::from_secs(1);

/// The request's answer, however long it takes. Each new reason why it does not come is said once.
pub(crate) async fn patiently<T>(
    session: &Session,
    client: &Client,
    output: &mut Output,
    request: impl Future<Output = T>,
) -> T {
    let mut request = pin!(request);
    let mut said = None;
    loop {
        // Cancel-safe: the request goes on below, and a look that was given up is made anew.
        let trouble = tokio::select! {
            biased;
            answer = &mut request => return answer,
            trouble = reason(session, client) => trouble,
        };
        if trouble.is_some() && trouble != said {
            if let Some(trouble) = &trouble {
                output.note(&blocked(trouble));
            }
            said = trouble;
        }
    }
}

/// Why nothing goes on in the environment that is meant, after a while; `None` if it does, or cannot be asked.
async fn reason(session: &Session, client: &Client) -> Option<String> {
    tokio::time::sleep(SOON).await;
    let environment = session.environment(client).await.ok()?;
    client.environment(&environment).await.ok()?.trouble
}
