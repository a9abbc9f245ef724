//! Waiting until the data plane does what a person asked for.
//!
//! It is written down first and served then. A data plane that does not answer will serve it later, so nobody waits long
//! for that. What cannot be written down is not done later either: whoever asked waits as long as that lasts, and would
//! otherwise be told of a state in which nothing was changed.

use std::time::Duration;

use tokio::sync::{
    oneshot::{self, error::RecvError},
    watch,
};

/// How long what a person asked for may take until the data plane does it, before its person is told that it does not
/// yet.
const SERVED: Duration = Duration::from_secs(5);

/// The answer, or `None` if it is written down and the data plane does not serve it yet. `trouble` says why nothing can be
/// written.
pub(crate) async fn served<T>(
    trouble: &watch::Receiver<Option<String>>,
    mut answer: oneshot::Receiver<T>,
) -> Option<Result<T, RecvError>> {
    loop {
        match tokio::time::timeout(SERVED, &mut answer).await {
            Ok(answer) => return Some(answer),
            Err(_slow) if trouble.borrow().is_some() => {}
            Err(_slow) => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_slow_data_plane_is_not_waited_for_and_a_full_disk_is() {
        let (trouble, troubled) = watch::channel(None);
        let (_slow, answer) = oneshot::channel::<u32>();
        assert_eq!(served(&troubled, answer).await, None);

        trouble.send_replace(Some("the disk is full".to_owned()));
        let (reply, answer) = oneshot::channel();
        let room = async {
            tokio::time::sleep(60 * SERVED).await;
            trouble.send_replace(None);
            reply.send(7).unwrap();
        };
        let (answer, ()) = tokio::join!(served(&troubled, answer), room);
        assert_eq!(answer, Some(Ok(7)));
        // Written at last, and then the data plane is slow.
        trouble.send_replace(Some("the disk is full".to_owned()));
        let (_slow, answer) = oneshot::channel::<u32>();
        let room = async {
            tokio::time::sleep(3 * SERVED).await;
            trouble.send_replace(None);
        };
        let (answer, ()) = tokio::join!(served(&troubled, answer), room);
        assert_eq!(answer, None);
    }
}
