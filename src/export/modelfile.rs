//! Writes an Ollama Modelfile: the model, and its chat template in Go's template language.
//!
//! A chat template is a program; a Modelfile holds a few pieces of text around the messages. They are
//! found by rendering conversations; it is an error if they do not reproduce the rendered text.

use std::path::Path;

use serde_json::json;

use super::ExportError;
use crate::text::{ChatTemplate, Tokenizer};

/// The pieces of text around the messages of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pieces {
    before_system: String,
    after_system: String,
    /// The prefix of a conversation without a system message.
    begin: String,
    before_user: String,
    after_user: String,
    before_assistant: String,
    after_assistant: String,
    /// The prefix of the assistant's message.
    ask: String,
}

fn cannot(reason: impl Into<String>) -> ExportError {
    ExportError::Inexpressible { form: "a Modelfile", reason: reason.into() }
}

/// The text of a Modelfile for a model, optionally with an adapter.
///
/// # Errors
/// If the tokenizer has no chat template, or one that a Modelfile cannot hold.
pub(crate) fn modelfile(
    model: &Path,
    adapter: Option<&Path>,
    tokenizer: &Tokenizer,
) -> Result<String, ExportError> {
    let template = tokenizer.chat_template().ok_or_else(|| cannot("it has no chat template"))?;
    // Ollama adds BOS itself where the model requires it.
    let bos = tokenizer.bos().filter(|_| tokenizer.adds_bos());
    let bos = bos.and_then(|id| tokenizer.token(id)).unwrap_or_default();
    let (pieces, sample) = pieces(template, &bos)?;
    let mut text = format!("FROM {}\n", path(model)?);
    if let Some(adapter) = adapter {
        text += &format!("ADAPTER {}\n", path(adapter)?);
    }
    text += &format!("TEMPLATE \"\"\"{}\"\"\"\n", go(&pieces)?);
    // The end-of-turn tokens that the template writes, and the model's EOS.
    let ends = (0..tokenizer.vocab_size() as u32).filter(|id| tokenizer.is_end_of_generation(*id));
    for id in ends {
        if let Some(end) = tokenizer.token(id)
            && (tokenizer.eos() == Some(id) || sample.contains(&end))
        {
            text += &format!("PARAMETER stop {}\n", json!(end));
        }
    }
    Ok(text)
}

/// A path in a Modelfile: relative to the Modelfile, or absolute.
fn path(path: &Path) -> Result<String, ExportError> {
    let text = path.to_str().filter(|text| !text.contains(['\n', '"']));
    let text =
        text.ok_or_else(|| cannot(format!("{} is a path that it cannot contain", path.display())))?;
    if path.is_absolute() || text.starts_with('.') {
        Ok(text.into())
    } else {
        Ok(format!("./{text}"))
    }
}

const SYSTEM: &str = "Qsystem7Q";
const FIRST: &str = "Qfirst7Q";
const ANSWER: &str = "Qanswer7Q";
const SECOND: &str = "Qsecond7Q";

fn pieces(template: &ChatTemplate, bos: &str) -> Result<(Pieces, String), ExportError> {
    let render = |messages: &[(&str, &str)]| -> Result<String, ExportError> {
        let message = |(role, content): &(&str, &str)| json!({ "role": role, "content": content });
        let messages: Vec<_> = messages.iter().map(message).collect();
        let text = template.render(&messages, None, true)?;
        Ok(text.strip_prefix(bos).map(str::to_owned).unwrap_or(text))
    };
    let (system, first) = (("system", SYSTEM), ("user", FIRST));
    let (answer, second) = (("assistant", ANSWER), ("user", SECOND));
    let long = render(&[system, first, answer, second])?;
    let short = render(&[first])?;

    let around = |text: &str, marks: &[&str]| -> Result<Vec<String>, ExportError> {
        let (mut parts, mut left) = (Vec::new(), text);
        for mark in marks {
            let (part, rest) = left
                .split_once(mark)
                .ok_or_else(|| cannot("its chat template leaves messages out"))?;
            parts.push(part.to_owned());
            left = rest;
        }
        parts.push(left.to_owned());
        Ok(parts)
    };
    let of_long = around(&long, &[SYSTEM, FIRST, ANSWER, SECOND])?;
    let of_short = around(&short, &[FIRST])?;
    let [to_system, to_first, to_answer, to_second, to_end] = &of_long[..] else {
        unreachable!("four marks part five")
    };
    let before_user = common_end(&common_end(to_first, to_second), &of_short[0]);
    let after_user = common_start(to_answer, to_end);
    let without_end = |text: &str| text[..text.len() - before_user.len()].to_owned();
    let pieces = Pieces {
        before_system: to_system.clone(),
        after_system: without_end(to_first),
        begin: without_end(&of_short[0]),
        before_assistant: to_answer[after_user.len()..].to_owned(),
        after_assistant: without_end(to_second),
        ask: to_end[after_user.len()..].to_owned(),
        before_user,
        after_user,
    };
    for conversation in [
        &[first][..],
        &[system, first],
        &[first, answer, second],
        &[system, first, answer, second],
        &[system, first, answer, second, ("assistant", ANSWER), first],
    ] {
        if compose(&pieces, conversation) != render(conversation)? {
            return Err(cannot("its chat template does more than put text around messages"));
        }
    }
    Ok((pieces, long))
}

/// Renders a conversation with the pieces: the same as [`go`]'s template, in Rust.
fn compose(p: &Pieces, messages: &[(&str, &str)]) -> String {
    let mut text = match messages {
        [("system", system), ..] => format!("{}{system}{}", p.before_system, p.after_system),
        _ => p.begin.clone(),
    };
    for (role, content) in messages {
        match *role {
            "user" => text += &format!("{}{content}{}", p.before_user, p.after_user),
            "assistant" => {
                text += &format!("{}{content}{}", p.before_assistant, p.after_assistant);
            }
            _ => {}
        }
    }
    text + &p.ask
}

/// The pieces in Go's template language, on one line, as a newline would be text.
fn go(p: &Pieces) -> Result<String, ExportError> {
    let all = [
        &p.before_system,
        &p.after_system,
        &p.begin,
        &p.before_user,
        &p.after_user,
        &p.before_assistant,
        &p.after_assistant,
        &p.ask,
    ];
    if all.iter().any(|piece| piece.contains("{{") || piece.contains("\"\"\"")) {
        return Err(cannot("its chat template writes {{ or \"\"\""));
    }
    Ok(format!(
        "{{{{ if .System }}}}{}{{{{ .System }}}}{}{{{{ else }}}}{}{{{{ end }}}}\
         {{{{ range .Messages }}}}\
         {{{{ if eq .Role \"user\" }}}}{}{{{{ .Content }}}}{}\
         {{{{ else if eq .Role \"assistant\" }}}}{}{{{{ .Content }}}}{}{{{{ end }}}}\
         {{{{ end }}}}{}",
        p.before_system,
        p.after_system,
        p.begin,
        p.before_user,
        p.after_user,
        p.before_assistant,
        p.after_assistant,
        p.ask
    ))
}

fn common_start(one: &str, other: &str) -> String {
    one.chars().zip(other.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

fn common_end(one: &str, other: &str) -> String {
    let same = one.chars().rev().zip(other.chars().rev()).take_while(|(a, b)| a == b);
    let reversed: Vec<char> = same.map(|(a, _)| a).collect();
    reversed.into_iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] \
        + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|im_start|>assistant\n' }}{% endif %}";
    const WITH_DEFAULT: &str = "{% if messages[0]['role'] != 'system' %}\
        {{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}";
    const LLAMA3: &str = "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + \
        '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}\
        {% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}{% if add_generation_prompt %}\
        {{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}";
    const MISTRAL: &str = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}\
        {{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}\
        {{ m['content'] + '</s>' }}{% endif %}{% endfor %}";

    #[test]
    fn template_pieces_are_found_or_rejected() {
        let find = |text: &str| {
            let special = [("bos_token", Some("<s>"))];
            let template = ChatTemplate::new(text, None, &special).unwrap();
            pieces(&template, "<s>").map(|(pieces, _)| go(&pieces).unwrap())
        };
        let chatml = find(CHATML).unwrap();
        assert!(chatml.contains("<|im_start|>user\n{{ .Content }}"), "{chatml}");
        assert!(chatml.ends_with("{{ end }}{{ end }}"), "{chatml}");
        let with_default = find(&format!("{WITH_DEFAULT}{CHATML}")).unwrap();
        assert!(with_default.contains("{{ else }}<|im_start|>system\nYou help."), "{with_default}");
        let llama3 = find(LLAMA3).unwrap();
        assert!(!llama3.contains("<s>") && llama3.contains("<|eot_id|>"), "{llama3}");
        let refused = |text: &str| find(text).unwrap_err().to_string();
        assert!(refused(MISTRAL).contains("leaves messages out"));
        let counting = CHATML.replace("m['role'] +", "m['role'] + messages | length | string +");
        assert!(refused(&counting).contains("more than put text around"), "{}", refused(&counting));
    }
}
