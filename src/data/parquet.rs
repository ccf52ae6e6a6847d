//! Parquet files: opened for the corpus, which reads one column, and read row by row as JSON lines.

use std::fs::File;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use parquet::errors::ParquetError;
use parquet::file::reader::SerializedFileReader;
use parquet::record::reader::RowIter;
use parquet::record::{Field, Row};
use serde_json::{Map, Number, Value};

use super::DataError;
use crate::weights::without_panic;

/// Opens a file and reads its schema.
pub(super) fn open(path: &Path) -> Result<SerializedFileReader<File>, DataError> {
    let file = File::open(path).map_err(|source| DataError::Io { path: path.into(), source })?;
    guarded(path, || SerializedFileReader::new(file))
}

/// Calls the parquet crate, which panics on some damaged files.
pub(super) fn guarded<T>(
    path: &Path,
    read: impl FnOnce() -> Result<T, ParquetError>,
) -> Result<T, DataError> {
    match without_panic(AssertUnwindSafe(read)) {
        Some(read) => read.map_err(|error| fault(path, error)),
        None => Err(fault(path, "is damaged, its pages cannot be decoded")),
    }
}

pub(super) fn fault(path: &Path, reason: impl ToString) -> DataError {
    DataError::Parquet { path: path.into(), reason: reason.to_string() }
}

/// The rows of a file, a page of each column at a time.
pub(super) struct ParquetRows {
    path: PathBuf,
    rows: RowIter<'static>,
    /// Number of rows read so far.
    read: u64,
}

impl ParquetRows {
    pub(crate) fn open(path: &Path) -> Result<Self, DataError> {
        let reader = open(path)?;
        let rows = guarded(path, || Ok(RowIter::from_file_into(Box::new(reader))))?;
        Ok(Self { path: path.into(), rows, read: 0 })
    }

    /// The next row as a line of JSON, with a newline.
    pub(crate) fn next(&mut self) -> Result<Option<Vec<u8>>, DataError> {
        let Some(row) = guarded(&self.path, || self.rows.next().transpose())? else {
            return Ok(None);
        };
        self.read += 1;
        let object = object(&row).map_err(|(column, found)| {
            let reason = format!("row {}, column {column:?}: {found}", self.read);
            fault(&self.path, reason)
        })?;
        Ok(Some(format!("{}\n", Value::Object(object)).into_bytes()))
    }
}

/// A row as a JSON object, without nulls: every row has all columns, but only keys with a value count.
fn object(row: &Row) -> Result<Map<String, Value>, (String, String)> {
    let mut object = Map::new();
    for (name, field) in row.get_column_iter() {
        match value(field).map_err(|found| (name.clone(), found))? {
            Value::Null => {}
            value => drop(object.insert(name.clone(), value)),
        }
    }
    Ok(object)
}

fn value(field: &Field) -> Result<Value, String> {
    let float = |value: f64| Number::from_f64(value).map_or(Value::Null, Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float16(value) => float(f64::from(*value)),
        Field::Float(value) => float(f64::from(*value)),
        Field::Double(value) => float(*value),
        Field::Str(value) => value.as_str().into(),
        // Strings without the UTF-8 annotation.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => text.into(),
            Err(error) => return Err(format!("byte {} is not UTF-8", error.valid_up_to())),
        },
        Field::Group(row) => {
            Value::Object(object(row).map_err(|(name, found)| format!("{name:?}: {found}"))?)
        }
        Field::ListInternal(list) => {
            Value::Array(list.elements().iter().map(value).collect::<Result<_, _>>()?)
        }
        Field::MapInternal(map) => {
            let entry = |(key, field): &(Field, Field)| match key {
                Field::Str(key) => Ok((key.clone(), value(field)?)),
                other => Err(format!("a map with key {other}, needed string keys")),
            };
            Value::Object(map.entries().iter().map(entry).collect::<Result<_, String>>()?)
        }
        // Dates and decimals, which only reward rules read.
        other => other.to_string().into(),
    })
}
