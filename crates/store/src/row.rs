//! Rows: a JSON text beside the few columns that queries need, with a checksum over key and text.
//!
//! SQLite's write-ahead log carries checksums, its pages do not. A flipped bit in a page could turn one valid record
//! into another valid one; the checksum turns that into an error.

use rusqlite::{Connection, Params, Row, params};
use serde::{Serialize, de::DeserializeOwned};

use crate::{error::Damage, write::Failure};

/// A value in the form in which it is stored.
pub(crate) struct Encoded {
    pub(crate) json: String,
    pub(crate) sum: i64,
}

/// Brings a value into its stored form. `key` is what [`Table::key`] makes of the row.
pub(crate) fn encode<T: Serialize + ?Sized>(key: &str, value: &T) -> Encoded {
    let json = serde_json::to_string(value).expect("our records serialize to JSON");
    let sum = checksum(key, &json);
    Encoded { json, sum }
}

/// Reads a stored value back.
pub(crate) fn decode<T: DeserializeOwned>(table: &'static str, key: &str, json: &str, sum: i64) -> Result<T, Damage> {
    fits(table, key, json, sum)?;
    serde_json::from_str(json).map_err(|error| Damage { table, key: key.to_owned(), what: error.to_string() })
}

/// A table whose rows carry checksums.
pub(crate) struct Table {
    pub(crate) name: &'static str,
    /// The key over which the checksum goes: every column that queries rely on.
    pub(crate) key: &'static str,
    /// The content over which it goes.
    pub(crate) json: &'static str,
}

macro_rules! tables {
    ($($name:ident: $table:literal, $key:literal, $json:literal;)*) => {
        $(pub(crate) const $name: Table = Table { name: $table, key: $key, json: $json };)*
        /// Every table.
        pub(crate) const TABLES: &[&Table] = &[$(&$name),*];
    };
}

tables! {
    SETTINGS: "settings", "key", "json";
    ENVIRONMENTS: "environments", "id || ' ' || generation", "json";
    ORDINALS: "ordinals", "environment || ' ' || workload || ' ' || release", "CAST(last AS TEXT)";
    DESIRED: "desired", "digest", "json";
    // Not `desired`: it is emptied when the release is old.
    RELEASES: "releases", "environment || ' ' || number || ' ' || state", "json";
    RUNS: "runs", "id || ' ' || environment || ' ' || generation || ' ' || state", "json";
    PLANS: "plans", "run || ' ' || coalesce(desired, '')", "json";
    RUN_STEPS: "run_steps", "run || ' ' || resource", "state";
    RESOURCES: "resources", "environment || ' ' || id", "json";
    INSTANCES: "instances", "environment || ' ' || id", "json";
    JOURNAL: "journal", "sequence || ' ' || at", "json";
    OPEN_INTENTS: "open_intents", "key", "CAST(sequence AS TEXT)";
    EVENTS: "events",
        "sequence || ' ' || environment || ' ' || coalesce(run, '') || ' ' || coalesce(resource, '') || ' ' || coalesce(instance, '')",
        "json";
}

impl Table {
    /// A query for key, content and checksum of the rows that fit `condition`.
    pub(crate) fn select(&self, condition: &str) -> String {
        format!("SELECT {}, {}, sum FROM {} {condition}", self.key, self.json, self.name)
    }

    /// The values of the rows that fit.
    pub(crate) fn all<T: DeserializeOwned>(
        &self,
        connection: &Connection,
        condition: &str,
        params: impl Params,
    ) -> Result<Vec<T>, Failure> {
        let mut statement = connection.prepare_cached(&self.select(condition))?;
        let mut rows = statement.query(params)?;
        let mut values = Vec::new();
        while let Some(row) = rows.next()? {
            values.push(decode(self.name, self.text(row, 0)?, self.text(row, 1)?, row.get(2)?)?);
        }
        Ok(values)
    }

    /// The value of the one row that fits.
    pub(crate) fn one<T: DeserializeOwned>(
        &self,
        connection: &Connection,
        condition: &str,
        params: impl Params,
    ) -> Result<Option<T>, Failure> {
        Ok(self.all(connection, condition, params)?.pop())
    }

    /// Checks every row's checksum.
    pub(crate) fn check(&self, connection: &Connection) -> Result<(), Failure> {
        let mut statement = connection.prepare(&self.select(""))?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            let (key, json) = (self.text(row, 0)?, self.text(row, 1)?);
            self.fits(key, json, row.get(2)?)?;
        }
        Ok(())
    }

    /// Whether a checksum is that of its row.
    pub(crate) fn fits(&self, key: &str, json: &str, sum: i64) -> Result<(), Damage> {
        fits(self.name, key, json, sum)
    }

    /// A text column without a copy.
    fn text<'a>(&self, row: &'a Row<'_>, column: usize) -> Result<&'a str, Failure> {
        let damage = |what: String| Damage { table: self.name, key: "?".to_owned(), what };
        Ok(row.get_ref(column)?.as_str().map_err(|error| damage(error.to_string()))?)
    }
}

fn fits(table: &'static str, key: &str, json: &str, sum: i64) -> Result<(), Damage> {
    if checksum(key, json) == sum {
        return Ok(());
    }
    Err(Damage { table, key: key.to_owned(), what: "its checksum does not fit".to_owned() })
}

/// CRC-32 over key, separator and text.
pub(crate) fn checksum(key: &str, json: &str) -> i64 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key.as_bytes());
    hasher.update(&[0]);
    hasher.update(json.as_bytes());
    i64::from(hasher.finalize())
}

/// The setting `key`.
pub(crate) fn setting(connection: &Connection, key: &str) -> Result<Option<serde_json::Value>, Failure> {
    SETTINGS.one(connection, "WHERE key = ?1", [key])
}

/// Inserts or replaces the setting `key`.
pub(crate) fn put_setting(connection: &Connection, key: &str, value: &serde_json::Value) -> Result<(), Failure> {
    let row = encode(key, value);
    connection
        .prepare_cached("INSERT OR REPLACE INTO settings (key, json, sum) VALUES (?1, ?2, ?3)")?
        .execute(params![key, row.json, row.sum])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_byte_or_key_is_noticed() {
        let row = encode("a", &vec![1, 2, 3]);
        assert_eq!(decode::<Vec<i32>>("t", "a", &row.json, row.sum).unwrap(), [1, 2, 3]);
        assert!(decode::<Vec<i32>>("t", "b", &row.json, row.sum).is_err());
        assert!(decode::<Vec<i32>>("t", "a", "[1,2,4]", row.sum).is_err());
        assert!(decode::<Vec<i32>>("t", "a", "[1,2,3", checksum("a", "[1,2,3")).is_err());
    }
}
