//! Rows: a JSON text beside the few columns that queries need, with a checksum over key and text.
//!
//! SQLite's write-ahead log carries checksums, its pages do not. A flipped bit in a page could turn one valid record
//! into another valid one; the checksum turns that into an error.

use rusqlite::{Connection, OptionalExtension, params};
use serde::{Serialize, de::DeserializeOwned};

use crate::{error::Damage, write::Failure};

/// A value in the form in which it is stored.
pub(crate) struct Encoded {
    pub(crate) json: String,
    pub(crate) sum: i64,
}

/// Brings a value into its stored form. `key` is the row's primary key in its textual form.
pub(crate) fn encode<T: Serialize + ?Sized>(key: &str, value: &T) -> Encoded {
    let json = serde_json::to_string(value).expect("our records serialize to JSON");
    let sum = checksum(key, &json);
    Encoded { json, sum }
}

/// Reads a stored value back.
pub(crate) fn decode<T: DeserializeOwned>(table: &'static str, key: &str, json: &str, sum: i64) -> Result<T, Damage> {
    if checksum(key, json) != sum {
        return Err(Damage { table, key: key.to_owned(), what: "its checksum does not fit".to_owned() });
    }
    serde_json::from_str(json).map_err(|error| Damage { table, key: key.to_owned(), what: error.to_string() })
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
    let row: Option<(String, i64)> = connection
        .prepare_cached("SELECT json, sum FROM settings WHERE key = ?1")?
        .query_row([key], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    Ok(row.map(|(json, sum)| decode("settings", key, &json, sum)).transpose()?)
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
