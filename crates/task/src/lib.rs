//! The task tree: the only place where tasks are started.
//!
//! A task that nobody owns is a task that nobody stops. Every task belongs to a [`TaskTree`] and declares by its
//! [`TaskKind`] what cancelling the tree and ending by itself mean for it. `tokio::spawn` is banned everywhere else.

use std::{future::Future, time::Duration};

use tokio::task::JoinHandle;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// What cancel and end mean for a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaskKind {
    /// Runs until the tree is cancelled, then is dropped at its next await. If it ends or panics before, the tree is
    /// cancelled too: a control loop that is gone must not look like one that has nothing to do.
    Loop,
    /// Serves one peer or one request. Dropped when the tree is cancelled; a panic ends it alone.
    Connection,
    /// Has begun something in the world and must see it through: never dropped, and shutdown waits for it.
    Effect,
}

/// Owner of tasks. Clones are handles to the same tree.
#[derive(Clone, Debug, Default)]
pub struct TaskTree {
    tracker: TaskTracker,
    token: CancellationToken,
}

impl TaskTree {
    /// An empty tree.
    pub fn new() -> Self {
        Self::default()
    }

    /// A tree whose tasks end with this one's, but which can be cancelled alone. Shutdown of the parent waits for
    /// the child's tasks as well.
    #[must_use]
    pub fn child(&self) -> Self {
        Self { tracker: self.tracker.clone(), token: self.token.child_token() }
    }

    /// Starts a task.
    pub fn start<F>(&self, kind: TaskKind, name: &'static str, future: F) -> JoinHandle<Option<F::Output>>
    where
        F: Future + Send + 'static,
        F::Output: Send + 'static,
    {
        let token = self.token.clone();
        self.tracker.spawn(async move {
            // Cancels a `Loop`'s tree when the task ends by itself or unwinds; disarmed when the tree was cancelled.
            let guard = (kind == TaskKind::Loop).then(|| token.clone().drop_guard());
            let output = if kind == TaskKind::Effect {
                Some(future.await)
            } else {
                // Dropping `future` is what cancel means for these kinds; the other arm has no effect to lose.
                tokio::select! {
                    biased;
                    () = token.cancelled() => None,
                    output = future => Some(output),
                }
            };
            if guard.is_some() && output.is_some() {
                tracing::error!(task = name, "a control loop ended by itself; shutting down");
            }
            output
        })
    }

    /// Asks every task to end.
    pub fn cancel(&self) {
        self.token.cancel();
    }

    /// Whether the tree was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Completes once the tree is cancelled.
    pub async fn cancelled(&self) {
        self.token.cancelled().await;
    }

    /// Cancels, then waits for every task, at most for `patience`. Returns whether all ended.
    pub async fn shutdown(&self, patience: Duration) -> bool {
        self.token.cancel();
        self.tracker.close();
        tokio::time::timeout(patience, self.tracker.wait()).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn effects_outlive_cancel_and_connections_do_not() {
        let tree = TaskTree::new();
        let (release, released) = oneshot::channel::<()>();
        let effect = tree.start(TaskKind::Effect, "effect", async move { released.await.is_ok() });
        let connection = tree.start(TaskKind::Connection, "connection", std::future::pending::<()>());
        tree.cancel();
        assert_eq!(connection.await.unwrap(), None);
        assert!(!tree.shutdown(Duration::from_millis(1)).await, "shutdown waits for the effect");
        release.send(()).unwrap();
        assert_eq!(effect.await.unwrap(), Some(true));
        assert!(tree.shutdown(Duration::from_secs(1)).await);
    }

    #[tokio::test]
    async fn a_loop_that_ends_takes_its_tree_along() {
        let tree = TaskTree::new();
        let child = tree.child();
        child.start(TaskKind::Loop, "loop", async {});
        child.cancelled().await;
        assert!(!tree.is_cancelled());
    }
}
