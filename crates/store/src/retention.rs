//! What may be forgotten, and when.
//!
//! Runs in the writer's thread after a batch was answered, in a transaction of its own, a bounded number of rows at a
//! time: history must neither grow without end nor hold up a commit.

use std::collections::BTreeSet;

use orchestra_model::EnvironmentId;
use rusqlite::{Connection, params};

use crate::write::Counters;

/// Events that are kept.
pub(crate) const EVENTS: u64 = 100_000;
/// Journal lines that are kept; an intent without outcome is kept for as long as it is open.
pub(crate) const JOURNAL: u64 = 100_000;
/// Releases per environment of which the desired state is kept, beside the stable one.
pub(crate) const RELEASES: u32 = 50;
/// Runs per environment of which the plan is kept.
pub(crate) const PLANS: u32 = 50;
/// Runs, and releases, per environment of which anything is kept.
pub(crate) const HISTORY: u32 = 1_000;

/// Rows that may pile up above a limit before they are removed together.
const SLACK: u64 = 1_000;

/// What has grown since it was last cut.
#[derive(Debug)]
pub(crate) struct Retention {
    grown: BTreeSet<EnvironmentId>,
    /// Sequence numbers at which events and journal lines are cut next.
    next: Counters,
}

impl Retention {
    pub(crate) fn new(counters: &Counters) -> Self {
        Self { grown: BTreeSet::new(), next: *counters }
    }

    pub(crate) fn note(&mut self, grown: BTreeSet<EnvironmentId>) {
        self.grown.extend(grown);
    }

    /// Cuts what is due. A failure is harmless: it is tried again later, and a disk that is really broken shows at the
    /// next commit.
    pub(crate) fn keep_up(&mut self, connection: &Connection, counters: &Counters) {
        let due = counters.event >= self.next.event || counters.journal >= self.next.journal;
        if self.grown.is_empty() && !due {
            return;
        }
        if let Err(error) = self.cut(connection, counters) {
            tracing::warn!(%error, "old history could not be removed");
            if !connection.is_autocommit()
                && let Err(error) = connection.execute_batch("ROLLBACK")
            {
                tracing::warn!(%error, "the removal of old history could not be rolled back");
            }
        }
        self.grown.clear();
        self.next = Counters { event: counters.event + SLACK, journal: counters.journal + SLACK };
    }

    fn cut(&self, connection: &Connection, counters: &Counters) -> rusqlite::Result<()> {
        connection.execute_batch("BEGIN IMMEDIATE")?;
        // Each call removes what one call adds and twice the slack at most, also after a limit was lowered.
        let bound = (4 * SLACK).cast_signed();
        let oldest = |last: u64, keep: u64| last.saturating_sub(keep).cast_signed();
        connection
            .prepare_cached(
                "DELETE FROM events WHERE sequence IN
                 (SELECT sequence FROM events WHERE sequence <= ?1 ORDER BY sequence LIMIT ?2)",
            )?
            .execute(params![oldest(counters.event, EVENTS), bound])?;
        connection
            .prepare_cached(
                "DELETE FROM journal WHERE sequence IN
                 (SELECT sequence FROM journal WHERE sequence <= ?1 ORDER BY sequence LIMIT ?2)
                 AND sequence NOT IN (SELECT sequence FROM open_intents)",
            )?
            .execute(params![oldest(counters.journal, JOURNAL), bound])?;
        for environment in &self.grown {
            cut_environment(connection, &environment.to_string())?;
        }
        if !self.grown.is_empty() {
            connection
                .prepare_cached(
                    "DELETE FROM desired WHERE digest NOT IN
                     (SELECT desired FROM releases WHERE desired IS NOT NULL
                      UNION SELECT desired FROM plans WHERE desired IS NOT NULL)",
                )?
                .execute([])?;
        }
        connection.execute_batch("COMMIT")
    }
}

fn cut_environment(connection: &Connection, environment: &str) -> rusqlite::Result<()> {
    // The number of the newest row that is old: the one after the newest `keep`.
    let bounds = |table, column| {
        format!("(SELECT {column} FROM {table} WHERE environment = ?1 ORDER BY {column} DESC LIMIT 1 OFFSET ?2)")
    };
    let old_release = bounds("releases", "number");
    let old_run = bounds("runs", "id");
    let settled = "state IN ('retired', 'failed', 'superseded')";
    let ended = "state NOT IN ('running', 'reverting')";
    let execute = |sql: String, keep: u32| connection.prepare_cached(&sql)?.execute(params![environment, keep]);
    execute(
        format!(
            "UPDATE releases SET desired = NULL
             WHERE environment = ?1 AND number <= {old_release} AND {settled} AND desired IS NOT NULL"
        ),
        RELEASES,
    )?;
    execute(format!("DELETE FROM releases WHERE environment = ?1 AND number <= {old_release} AND {settled}"), HISTORY)?;
    let old_runs = format!("SELECT id FROM runs WHERE environment = ?1 AND id <= {old_run} AND {ended}");
    execute(format!("DELETE FROM plans WHERE run IN ({old_runs})"), PLANS)?;
    execute(format!("DELETE FROM run_steps WHERE run IN ({old_runs})"), HISTORY)?;
    execute(format!("DELETE FROM runs WHERE id IN ({old_runs})"), HISTORY)?;
    Ok(())
}
