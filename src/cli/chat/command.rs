//! Slash commands of `chat`.

use std::path::PathBuf;

/// A slash command.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ChatCommand {
    /// Activate these adapters and no others, with their own weights or the given ones.
    Activate(Vec<(String, Option<f64>)>),
    /// Load an adapter: a path, or a path and a weight.
    Load {
        name: String,
        path: String,
    },
    Drop(String),
    List,
    Reset,
    /// Set the system message, or remove it.
    System(Option<String>),
    Undo,
    Regenerate,
    /// Set a setting, or list all settings.
    Set(Option<(String, String)>),
    Save(PathBuf),
    Help,
    Quit,
}

/// The output of `/help`.
pub(super) const HELP: &str = "\
/adapter NAME        activate an adapter from the next reply on; NAME=0.7 sets its weight; several
                     names can be given; /adapter off deactivates all
/load NAME=PATH      load an adapter; NAME=PATH=WEIGHT sets its weight (default 1)
/drop NAME           unload an adapter
/adapters            list loaded adapters
/reset               start a new conversation; system message and adapters are kept
/system TEXT         set the system message; without TEXT, remove it
/undo                remove the last message and its reply
/regenerate          generate another reply to the last message
/set NAME VALUE      set temperature, top_k, top_p, min_p, repetition_penalty, seed or max_tokens;
                     /set alone lists them
/save FILE           append the conversation to a JSONL file, as a row of training data
/help                print this help
/quit                exit, like Ctrl-D
A backslash at the end of a line continues it on the next line. Ctrl-C stops a reply. Begin a message
that starts with a slash with two slashes.";

const NAMES: &str = "/adapter, /load, /drop, /adapters, /reset, /system, /undo, /regenerate, /set, \
                     /save, /help and /quit";

impl ChatCommand {
    /// Parses a line; `None` if it is a message.
    pub(super) fn parse(line: &str) -> Result<Option<Self>, String> {
        let Some(command) = line.strip_prefix('/').filter(|rest| !rest.starts_with('/')) else {
            return Ok(None);
        };
        let (name, rest) = command.split_once(char::is_whitespace).unwrap_or((command, ""));
        let rest = rest.trim();
        let needs = |what: &str| match rest {
            "" => Err(format!("/{name} needs an argument: {what}")),
            rest => Ok(rest.to_string()),
        };
        let alone = |command: Self| match rest {
            "" => Ok(command),
            rest => Err(format!("/{name} takes no argument, got {rest:?}")),
        };
        let command = match name {
            "adapter" => Self::Activate(active(&needs("a name of /adapters, or off")?)?),
            "load" => {
                let adapter = needs("NAME=PATH")?;
                match adapter.split_once('=') {
                    Some((name, path)) if !name.trim().is_empty() && !path.trim().is_empty() => {
                        Self::Load { name: name.trim().into(), path: path.trim().into() }
                    }
                    _ => return Err(format!("/load got {adapter:?}, needed NAME=PATH")),
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
                    "unknown command /{name}; commands are {NAMES}; begin a message that starts \
                     with a slash with two slashes"
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
            _ => Err(format!("weight {weight:?} of {name} is not a number, needed NAME=WEIGHT")),
        },
    };
    text.split_whitespace().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_messages_or_commands() {
        let check = |line: &str, needed: Result<Option<ChatCommand>, &str>| {
            assert_eq!(ChatCommand::parse(line), needed.map_err(String::from), "{line:?}");
        };
        let some = |command: ChatCommand| Ok(Some(command));
        let named = |name: &str, weight| (name.to_string(), weight);
        check("hello", Ok(None));
        check(" /help", Ok(None));
        check("//help", Ok(None));
        check("/help", some(ChatCommand::Help));
        check("/quit ", some(ChatCommand::Quit));
        check("/exit", some(ChatCommand::Quit));
        check("/adapter a", some(ChatCommand::Activate(vec![named("a", None)])));
        check("/adapter off", some(ChatCommand::Activate(vec![])));
        check(
            "/adapter a=0.7  b",
            some(ChatCommand::Activate(vec![named("a", Some(0.7)), named("b", None)])),
        );
        check("/adapter a=x", Err("weight \"x\" of a is not a number, needed NAME=WEIGHT"));
        check("/adapter", Err("/adapter needs an argument: a name of /adapters, or off"));
        let load =
            |name: &str, path: &str| ChatCommand::Load { name: name.into(), path: path.into() };
        check("/load a=runs/my adapter", some(load("a", "runs/my adapter")));
        check("/load a=b=0.5", some(load("a", "b=0.5")));
        check("/load a", Err("/load got \"a\", needed NAME=PATH"));
        check("/drop a", some(ChatCommand::Drop("a".into())));
        check("/system be brief", some(ChatCommand::System(Some("be brief".into()))));
        check("/system", some(ChatCommand::System(None)));
        check("/set top_k 3", some(ChatCommand::Set(Some(("top_k".into(), "3".into())))));
        check("/set", some(ChatCommand::Set(None)));
        check("/set top_k", Err("/set top_k has no value, needed /set top_k VALUE"));
        check("/save a.jsonl", some(ChatCommand::Save("a.jsonl".into())));
        check("/undo now", Err("/undo takes no argument, got \"now\""));
        let unknown = ChatCommand::parse("/adaptor x").unwrap_err();
        assert!(
            unknown.starts_with("unknown command /adaptor; commands are /adapter, "),
            "{unknown}"
        );
        for name in NAMES.split([',', ' ']).filter(|name| name.starts_with('/')) {
            assert!(HELP.contains(name), "{name}");
        }
    }
}
