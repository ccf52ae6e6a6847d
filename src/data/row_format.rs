//! The formats of rows, recognized by their keys, as in TRL.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The format of a row, recognized by its keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `input_ids` (+ `labels`).
    Tokens,
    /// `messages` (+ `tools`), as in TRL and OpenAI's format.
    Messages,
    /// `conversations`, as in ShareGPT.
    ShareGpt,
    /// `instruction`, `input` and `output`, as in Alpaca.
    Alpaca,
    /// `prompt` and `completion`, strings.
    PromptCompletion,
    /// `prompt` and `completion`, lists of messages.
    PromptCompletionMessages,
    /// `text`.
    Text,
    /// `chosen` and `rejected`, usually with a `prompt`.
    Compared,
    /// Ranked `responses`.
    Ranked,
    /// `completion` and `label`, for KTO.
    Labelled,
    /// `prompt` alone.
    Prompt,
}

impl RowFormat {
    /// The format of a row; `None` if its keys match no format.
    pub(super) fn of(row: &Map<String, Value>) -> Option<Self> {
        let has = |key: &str| row.get(key).is_some_and(|value| !value.is_null());
        let format = match () {
            () if has("input_ids") => Self::Tokens,
            () if has("chosen") && has("rejected") => Self::Compared,
            () if has("responses") => Self::Ranked,
            () if has("completion") && has("label") => Self::Labelled,
            () if has("messages") => Self::Messages,
            () if has("conversations") => Self::ShareGpt,
            () if has("instruction") && has("output") => Self::Alpaca,
            () if has("prompt") && has("completion") => match row["prompt"].is_array() {
                true => Self::PromptCompletionMessages,
                false => Self::PromptCompletion,
            },
            () if has("text") => Self::Text,
            () if has("prompt") => Self::Prompt,
            () => return None,
        };
        Some(format)
    }

    /// Name for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tokens => "`input_ids`",
            Self::Messages => "`messages`",
            Self::ShareGpt => "`conversations` (ShareGPT)",
            Self::Alpaca => "`instruction`/`output` (Alpaca)",
            Self::PromptCompletion => "`prompt`/`completion` as strings",
            Self::PromptCompletionMessages => "`prompt`/`completion` as messages",
            Self::Text => "`text`",
            Self::Compared => "`chosen`/`rejected`",
            Self::Ranked => "ranked `responses`",
            Self::Labelled => "`completion`/`label` (KTO)",
            Self::Prompt => "`prompt`",
        }
    }

    /// The commands that train on such rows.
    pub(crate) fn learned_by(self) -> &'static str {
        match self {
            Self::Compared | Self::Ranked => "`reward` and `dpo`",
            Self::Labelled => "`dpo --loss-type kto`",
            Self::Prompt => "`ppo` and `grpo`",
            _ => "`sft`",
        }
    }

    /// Whether supervised fine-tuning trains on such rows.
    pub(crate) fn is_supervised(self) -> bool {
        self.learned_by() == Self::Text.learned_by()
    }
}
