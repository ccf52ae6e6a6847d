//! Lines that begin with a slash.

use std::path::PathBuf;

/// What a user wants done between messages.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Wear these and no others, at their own weights or at others.
    Wear(Vec<(String, Option<f64>)>),
    /// Read an adapter: a path, or a path and a weight.
    Load {
        name: String,
        path: String,
    },
    Drop(String),
    List,
    Reset,
    /// Another system message, or none.
    System(Option<String>),
    Undo,
    Regenerate,
    /// A setting and its value, or none to list them.
    Set(Option<(String, String)>),
    Save(PathBuf),
    Help,
    Quit,
}

/// What `/help` shows.
pub const HELP: &str = "\
/adapter NAME        wear an adapter from the next reply on; NAME=0.7 at another weight, several
                     names together; /adapter off wears none
/load NAME=PATH      read an adapter, NAME=PATH=WEIGHT for another weight than 1
/drop NAME           forget one
/adapters            list them
/reset               begin anew; the system message and adapters stay
/system TEXT         another system message; without a text, none
/undo                take the last message and its reply back
/regenerate          another reply to the last message
/set NAME VALUE      temperature, top_k, top_p, min_p, repetition_penalty, seed or max_tokens;
                     alone lists them
/save FILE           add the conversation to a JSONL file, as a row to train on
/help                this
/quit                leave, as Ctrl-D
A line that ends in a backslash goes on with the next. Ctrl-C ends a reply. A message that begins
with a slash is written with two.";

const NAMES: &str = "/adapter, /load, /drop, /adapters, /reset, /system, /undo, /regenerate, /set, \
                     /save, /help and /quit";

impl Command {
    /// The command in a line; none if the line is a message.
    pub fn parse(line: &str) -> Result<Option<Self>, String> {
        let Some(command) = line.strip_prefix('/').filter(|rest| !rest.starts_with('/')) else {
            return Ok(None);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let needs = |what: &str| match rest {
            "" => Err(format!("/{name} has nothing behind it, needed {what}")),
            rest => Ok(rest.to_string()),
        };
        let alone = |command: Self| match rest {
            "" => Ok(command),
            rest => Err(format!("/{name} is followed by {rest:?}, needed nothing")),
        };
        let command = match name {
            "adapter" => Self::Wear(active(&needs("a name of /adapters, or off")?)?),
            "load" => {
                let adapter = needs("NAME=PATH")?;
                match adapter.split_once('=') {
                    Some((name, path)) if !name.trim().is_empty() && !path.trim().is_empty() => {
                        Self::Load { name: name.trim().into(), path: path.trim().into() }
                    }
                    _ => return Err(format!("/load is given {adapter:?}, needed NAME=PATH")),
                }
            }
            "drop" => Self::Drop(needs("a name of /adapters")?),
            "adapters" => alone(Self::List)?,
            "reset" => alone(Self::Reset)?,
            "system" => Self::System((!rest.is_empty()).then(|| rest.to_string())),
            "undo" => alone(Self::Undo)?,
            "regenerate" => alone(Self::Regenerate)?,
            "set" => Self::Set(match rest.split_once(char::is_whitespace) {
                Some((key, value)) => Some((key.into(), value.trim().into())),
                None if rest.is_empty() => None,
                None => return Err(format!("/set {rest} has no value, needed /set {rest} VALUE")),
            }),
            "save" => Self::Save(needs("a file")?.into()),
            "help" => alone(Self::Help)?,
            "quit" | "exit" => alone(Self::Quit)?,
            _ => {
                return Err(format!(
                    "there is no /{name}, only {NAMES}; a message that begins with a slash is \
                     written with two"
                ));
            }
        };
        Ok(Some(command))
    }
}

/// `NAME`, `NAME=WEIGHT`, several of them, or `off`.
fn active(text: &str) -> Result<Vec<(String, Option<f64>)>, String> {
    if text == "off" {
        return Ok(Vec::new());
    }
    let one = |word: &str| match word.split_once('=') {
        None => Ok((word.to_string(), None)),
        Some((name, weight)) => match weight.parse::<f64>() {
            Ok(number) if number.is_finite() => Ok((name.to_string(), Some(number))),
            _ => Err(format!("weight {weight:?} of {name} is no number, needed NAME=WEIGHT")),
        },
    };
    text.split_whitespace().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let check = |line: &str, needed: Result<Option<Command>, &str>| {
            assert_eq!(Command::parse(line), needed.map_err(String::from), "{line:?}");
        };
        let some = |command: Command| Ok(Some(command));
        let named = |name: &str, weight| (name.to_string(), weight);
        check("hello", Ok(None));
        check(" /help", Ok(None));
        check("//help", Ok(None));
        check("/help", some(Command::Help));
        check("/quit ", some(Command::Quit));
        check("/exit", some(Command::Quit));
        check("/adapter a", some(Command::Wear(vec![named("a", None)])));
        check("/adapter off", some(Command::Wear(vec![])));
        check(
            "/adapter a=0.7  b",
            some(Command::Wear(vec![named("a", Some(0.7)), named("b", None)])),
        );
        check("/adapter a=x", Err("weight \"x\" of a is no number, needed NAME=WEIGHT"));
        check(
            "/adapter",
            Err("/adapter has nothing behind it, needed a name of /adapters, or off"),
        );
        let load = |name: &str, path: &str| Command::Load { name: name.into(), path: path.into() };
        check("/load a=runs/my adapter", some(load("a", "runs/my adapter")));
        check("/load a=b=0.5", some(load("a", "b=0.5")));
        check("/load a", Err("/load is given \"a\", needed NAME=PATH"));
        check("/drop a", some(Command::Drop("a".into())));
        check("/system be brief", some(Command::System(Some("be brief".into()))));
        check("/system", some(Command::System(None)));
        check("/set top_k 3", some(Command::Set(Some(("top_k".into(), "3".into())))));
        check("/set", some(Command::Set(None)));
        check("/set top_k", Err("/set top_k has no value, needed /set top_k VALUE"));
        check("/save a.jsonl", some(Command::Save("a.jsonl".into())));
        check("/undo now", Err("/undo is followed by \"now\", needed nothing"));
        let unknown = Command::parse("/adaptor x").unwrap_err();
        assert!(unknown.starts_with("there is no /adaptor, only /adapter, "), "{unknown}");
        for name in NAMES.split([',', ' ']).filter(|name| name.starts_with('/')) {
            assert!(HELP.contains(name), "{name}");
        }
    }
}
