//! Python's formatting of values, which chat templates rely on.

use std::fmt::Write;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// The arguments of `json.dumps` that templates use.
#[derive(Debug, Default)]
pub(super) struct Dumps {
    pub ensure_ascii: bool,
    pub sort_keys: bool,
    /// Indentation of a level; `None` for output on one line.
    pub indent: Option<String>,
    /// Separators between items, and between a key and its value.
    pub separators: Option<(String, String)>,
}

/// `json.dumps(value)`.
pub(super) fn dumps(value: &Value, options: &Dumps) -> Result<String, Error> {
    let (item, key) = match (&options.separators, &options.indent) {
        (Some((item, key)), _) => (&**item, &**key),
        (None, Some(_)) => (",", ": "),
        (None, None) => (", ", ": "),
    };
    let mut out = String::new();
    write_json(&mut out, value, options, (item, key), 0)?;
    Ok(out)
}

fn write_json(
    out: &mut String,
    value: &Value,
    options: &Dumps,
    separators: (&str, &str),
    depth: usize,
) -> Result<(), Error> {
    let line = |out: &mut String, depth: usize| {
        if let Some(indent) = &options.indent {
            out.push('\n');
            (0..depth).for_each(|_| out.push_str(indent));
        }
    };
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => {
            json_string(out, value.as_str().unwrap_or_default(), options.ensure_ascii);
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if options.sort_keys {
                keys.sort();
            }
            out.push('{');
            for (i, key) in keys.iter().enumerate() {
                if i > 0 {
                    out.push_str(separators.0);
                }
                line(out, depth + 1);
                let name = match key.kind() {
                    ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
                    _ => dumps(key, &Dumps::default())?,
                };
                json_string(out, &name, options.ensure_ascii);
                out.push_str(separators.1);
                write_json(out, &value.get_item(key)?, options, separators, depth + 1)?;
            }
            if !keys.is_empty() {
                line(out, depth);
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            let mut empty = true;
            for item in value.try_iter()? {
                if !empty {
                    out.push_str(separators.0);
                }
                empty = false;
                line(out, depth + 1);
                write_json(out, &item, options, separators, depth + 1)?;
            }
            if !empty {
                line(out, depth);
            }
            out.push(']');
        }
        kind => {
            let words = format!("{kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::InvalidOperation, words));
        }
    }
    Ok(())
}

fn json_string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' || ensure_ascii && c > '~' => {
                for unit in c.encode_utf16(&mut [0; 2]) {
                    let _ = write!(out, "\\u{unit:04x}");
                }
            }
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `str(value)`.
pub(super) fn str(value: &Value) -> Result<String, Error> {
    match value.kind() {
        ValueKind::String => Ok(value.as_str().unwrap_or_default().into()),
        ValueKind::Undefined => Ok(String::new()),
        _ => {
            let mut out = String::new();
            repr(&mut out, value)?;
            Ok(out)
        }
    }
}

/// `repr(value)`.
fn repr(out: &mut String, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => repr_string(out, value.as_str().unwrap_or_default()),
        ValueKind::Map if !value.is_kwargs() => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(out, &key)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?)?;
            }
            out.push('}');
        }
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (i, item) in value.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(", ");
                }
                repr(out, &item)?;
            }
            out.push(close);
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// In single quotes, unless only those occur.
fn repr_string(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => {
                out.push('\\');
                out.push(c);
            }
            c if c < ' ' || ('\u{7f}'..'\u{a0}').contains(&c) => {
                let _ = write!(out, "\\x{:02x}", c as u32);
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// Integers plainly; floats with the fewest digits that read back, as an exponent when they are
/// below 1e-4 or from 1e16.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(float) = f64::try_from(value.clone()) else { return value.to_string() };
    if float.is_nan() {
        return "NaN".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "Infinity" } else { "-Infinity" }.into();
    }
    if float == 0.0 || (1e-4..1e16).contains(&float.abs()) {
        return format!("{float:?}");
    }
    let text = format!("{float:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = match exponent.strip_prefix('-') {
        Some(exponent) => ('-', exponent),
        None => ('+', exponent),
    };
    format!("{digits}e{sign}{exponent:0>2}")
}

/// `strftime` of seconds since 1970, in UTC: the local time zone is not looked up.
pub(super) fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    const DAYS: [&str; 7] =
        ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let days = seconds / 86_400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let leap = |year: u64| {
        year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
    };
    let (mut year, mut day) = (1970, days);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = day + 1;
    let mut month = 0;
    let february = 28 + u64::from(leap(year));
    let lengths = [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    let (day, month_number) = (day + 1, month + 1);
    let (weekday, month_name) = (DAYS[(days % 7) as usize], MONTHS[month]);
    let hour12 = (hour + 11) % 12 + 1;

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut code = chars.next();
        let padded = code != Some('-');
        if !padded {
            code = chars.next();
        }
        let two = |n: u64| if padded { format!("{n:02}") } else { n.to_string() };
        out += &match code {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month_number as u64),
            Some('d') => two(day),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('j') if padded => format!("{day_of_year:03}"),
            Some('j') => day_of_year.to_string(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => weekday.into(),
            Some('a') => weekday[..3].into(),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year}-{month_number:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('%') => "%".into(),
            other => {
                let code: String = other.into_iter().collect();
                let words = format!("strftime_now does not support %{code}");
                return Err(Error::new(ErrorKind::InvalidOperation, words));
            }
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_formatted_as_in_python() {
        let check = |value: Value, needed: &str| assert_eq!(number(&value), needed);
        check(Value::from(-7), "-7");
        check(Value::from(1.0), "1.0");
        check(Value::from(-0.0), "-0.0");
        check(Value::from(0.1 + 0.2), "0.30000000000000004");
        check(Value::from(0.0001), "0.0001");
        check(Value::from(0.00001), "1e-05");
        check(Value::from(1e15), "1000000000000000.0");
        check(Value::from(1.5e16), "1.5e+16");
        check(Value::from(1e-300), "1e-300");
        check(Value::from(i128::from(u64::MAX) + 1), "18446744073709551616");
    }

    #[test]
    fn dates_are_formatted_as_in_python() {
        let check = |seconds, format: &str, needed: &str| {
            assert_eq!(strftime(format, seconds).unwrap(), needed);
        };
        check(0, "%d %B %Y, %A %H:%M:%S %p", "01 January 1970, Thursday 00:00:00 AM");
        check(1_709_210_096, "%-d %b %y %a %j %I:%M %p %%", "29 Feb 24 Thu 060 12:34 PM %");
        check(1_735_689_599, "%Y-%m-%d", "2024-12-31");
        assert!(strftime("%Q", 0).is_err());
    }
}
