//! Metadata values of a GGUF file: borrowed from the map, or owned for writing.

use std::fmt;

/// The type of a metadata value, numbered as in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the format's own names
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::String,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.get(id as usize).copied()
    }

    /// Minimum bytes of a value of this type, which bounds the count of an array.
    fn min_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::String | Self::U64 | Self::I64 | Self::F64 => 8,
            Self::Array => 12,
        }
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// A metadata value, borrowed from the map. Strings are bytes: they may not be UTF-8.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum GgufValue<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(&'a [u8]),
    Array(GgufArray<'a>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl<'a> GgufValue<'a> {
    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(_) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }

    /// A string, if it is UTF-8.
    pub fn as_str(&self) -> Option<&'a str> {
        match *self {
            Self::String(bytes) => str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// An integer of any width.
    pub fn as_i64(&self) -> Option<i64> {
        match *self {
            Self::U8(v) => Some(v.into()),
            Self::I8(v) => Some(v.into()),
            Self::U16(v) => Some(v.into()),
            Self::I16(v) => Some(v.into()),
            Self::U32(v) => Some(v.into()),
            Self::I32(v) => Some(v.into()),
            Self::U64(v) => v.try_into().ok(),
            Self::I64(v) => Some(v),
            _ => None,
        }
    }

    /// An integer of any width that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Self::U64(v) => Some(v),
            _ => self.as_i64()?.try_into().ok(),
        }
    }

    /// A float of either width.
    pub fn as_f64(&self) -> Option<f64> {
        match *self {
            Self::F32(v) => Some(v.into()),
            Self::F64(v) => Some(v),
            _ => None,
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Self::Bool(v) => Some(v),
            _ => None,
        }
    }

    /// An array.
    pub fn as_array(&self) -> Option<GgufArray<'a>> {
        match *self {
            Self::Array(v) => Some(v),
            _ => None,
        }
    }

    /// A copy on the heap, for writing.
    pub fn to_owned(&self) -> OwnedValue {
        match *self {
            Self::U8(v) => OwnedValue::U8(v),
            Self::I8(v) => OwnedValue::I8(v),
            Self::U16(v) => OwnedValue::U16(v),
            Self::I16(v) => OwnedValue::I16(v),
            Self::U32(v) => OwnedValue::U32(v),
            Self::I32(v) => OwnedValue::I32(v),
            Self::F32(v) => OwnedValue::F32(v),
            Self::Bool(v) => OwnedValue::Bool(v),
            Self::String(v) => OwnedValue::String(v.into()),
            Self::Array(v) => {
                OwnedValue::Array(v.of, v.iter().map(|item| item.to_owned()).collect())
            }
            Self::U64(v) => OwnedValue::U64(v),
            Self::I64(v) => OwnedValue::I64(v),
            Self::F64(v) => OwnedValue::F64(v),
        }
    }
}

impl fmt::Display for GgufValue<'_> {
    /// A short text: long strings and arrays are truncated.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U8(v) => write!(f, "{v}"),
            Self::I8(v) => write!(f, "{v}"),
            Self::U16(v) => write!(f, "{v}"),
            Self::I16(v) => write!(f, "{v}"),
            Self::U32(v) => write!(f, "{v}"),
            Self::I32(v) => write!(f, "{v}"),
            Self::F32(v) => write!(f, "{v}"),
            Self::Bool(v) => write!(f, "{v}"),
            Self::String(v) => f.write_str(&short_text(v)),
            Self::Array(array) => {
                write!(f, "{} x {} [", array.len, array.of)?;
                for (i, item) in array.iter().take(4).enumerate() {
                    write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
                }
                f.write_str(if array.len > 4 { ", ...]" } else { "]" })
            }
            Self::U64(v) => write!(f, "{v}"),
            Self::I64(v) => write!(f, "{v}"),
            Self::F64(v) => write!(f, "{v}"),
        }
    }
}

/// A quoted line of at most 60 characters of a text.
pub(super) fn short_text(bytes: &[u8]) -> String {
    const CHARS: usize = 60;
    // A character has at most four bytes, so the beginning of a long text is enough.
    let head = &bytes[..bytes.len().min(4 * CHARS + 4)];
    let text = String::from_utf8_lossy(head);
    let shown: String = text.chars().take(CHARS).collect();
    let cut = if shown.len() < bytes.len() && shown.len() < text.len() { "..." } else { "" };
    format!("{shown:?}{cut}")
}

/// A metadata array, borrowed from the map.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GgufArray<'a> {
    of: ValueType,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> GgufArray<'a> {
    /// The type of its items.
    pub fn of(&self) -> ValueType {
        self.of
    }

    /// Number of items.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no items.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// An iterator that reads the items one by one.
    pub fn iter(&self) -> Items<'a> {
        Items { of: self.of, left: self.len, cursor: Cursor::new(self.bytes) }
    }
}

/// The items of a [`GgufArray`].
#[derive(Debug, Clone)]
pub struct Items<'a> {
    of: ValueType,
    left: usize,
    cursor: Cursor<'a>,
}

impl<'a> Iterator for Items<'a> {
    type Item = GgufValue<'a>;

    fn next(&mut self) -> Option<GgufValue<'a>> {
        self.left = self.left.checked_sub(1)?;
        // The array was validated when the file was opened: this cannot fail.
        self.cursor.value(self.of, 0).ok()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left, Some(self.left))
    }
}

impl ExactSizeIterator for Items<'_> {}

/// A metadata value on the heap, for writing.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum OwnedValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(Vec<u8>),
    /// Items of the type; an empty array has one too.
    Array(ValueType, Vec<OwnedValue>),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl From<&str> for OwnedValue {
    fn from(text: &str) -> Self {
        Self::String(text.into())
    }
}

impl OwnedValue {
    /// An array of strings.
    pub fn strings<S: AsRef<[u8]>>(items: impl IntoIterator<Item = S>) -> Self {
        let items = items.into_iter().map(|item| Self::String(item.as_ref().into())).collect();
        Self::Array(ValueType::String, items)
    }

    /// Its type.
    pub fn value_type(&self) -> ValueType {
        match self {
            Self::U8(_) => ValueType::U8,
            Self::I8(_) => ValueType::I8,
            Self::U16(_) => ValueType::U16,
            Self::I16(_) => ValueType::I16,
            Self::U32(_) => ValueType::U32,
            Self::I32(_) => ValueType::I32,
            Self::F32(_) => ValueType::F32,
            Self::Bool(_) => ValueType::Bool,
            Self::String(_) => ValueType::String,
            Self::Array(..) => ValueType::Array,
            Self::U64(_) => ValueType::U64,
            Self::I64(_) => ValueType::I64,
            Self::F64(_) => ValueType::F64,
        }
    }
}

/// Maximum nesting of arrays: more than files need, and safe for the stack.
const MAX_NESTING: usize = 4;

/// A bounds-checked forward reader of bytes. Errors name what was found and needed; the caller adds the
/// position.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], String> {
        if count > self.left() {
            let (at, left) = (self.at, self.left());
            return Err(format!("{count} bytes needed at byte {at}, the file has {left} more"));
        }
        let taken = &self.bytes[self.at..][..count];
        self.at += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub(super) fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    /// A count of items of at least `min_bytes` each, bounded by the remaining bytes.
    pub(super) fn count(&mut self, what: &str, min_bytes: usize) -> Result<usize, String> {
        let at = self.at;
        let count = self.u64()?;
        let most = self.left() / min_bytes;
        usize::try_from(count).ok().filter(|count| *count <= most).ok_or_else(|| {
            format!(
                "a count of {count} {what} at byte {at}, the rest of the file has room for {most}"
            )
        })
    }

    pub(super) fn string(&mut self) -> Result<&'a [u8], String> {
        let len = self.count("bytes of text", 1)?;
        self.take(len)
    }

    pub(super) fn value_type(&mut self) -> Result<ValueType, String> {
        let id = self.u32()?;
        ValueType::from_id(id).ok_or_else(|| format!("unknown value type {id}, needed 0 to 12"))
    }

    /// A value inside of `depth` arrays.
    pub(super) fn value(&mut self, of: ValueType, depth: usize) -> Result<GgufValue<'a>, String> {
        Ok(match of {
            ValueType::U8 => GgufValue::U8(self.array::<1>()?[0]),
            ValueType::I8 => GgufValue::I8(self.array::<1>()?[0] as i8),
            ValueType::U16 => GgufValue::U16(u16::from_le_bytes(self.array()?)),
            ValueType::I16 => GgufValue::I16(i16::from_le_bytes(self.array()?)),
            ValueType::U32 => GgufValue::U32(self.u32()?),
            ValueType::I32 => GgufValue::I32(i32::from_le_bytes(self.array()?)),
            ValueType::F32 => GgufValue::F32(f32::from_le_bytes(self.array()?)),
            ValueType::Bool => GgufValue::Bool(self.array::<1>()?[0] != 0),
            ValueType::String => GgufValue::String(self.string()?),
            ValueType::Array => GgufValue::Array(self.array_value(depth)?),
            ValueType::U64 => GgufValue::U64(self.u64()?),
            ValueType::I64 => GgufValue::I64(i64::from_le_bytes(self.array()?)),
            ValueType::F64 => GgufValue::F64(f64::from_le_bytes(self.array()?)),
        })
    }

    fn array_value(&mut self, depth: usize) -> Result<GgufArray<'a>, String> {
        if depth == MAX_NESTING {
            return Err(format!("arrays nested deeper than {MAX_NESTING}"));
        }
        let of = self.value_type()?;
        let len = self.count("array items", of.min_bytes())?;
        let start = self.at;
        match of {
            ValueType::String | ValueType::Array => {
                for _ in 0..len {
                    self.value(of, depth + 1)?;
                }
            }
            _ => {
                self.take(len * of.min_bytes())?;
            }
        }
        Ok(GgufArray { of, len, bytes: &self.bytes[start..self.at] })
    }
}
