//! Examples in `--help`, below the flags. A test parses each of them.

/// The pipeline of commands, for the top-level help.
pub(super) const PATH: &str = "\
The pipeline from text to a chat model; start at any step:
  quantune tokenizer train --data 'texts/*.txt' --vocab-size 8192 --out runs/tokenizer
  quantune pretrain --source texts=1:texts/*.txt --tokenizer runs/tokenizer --max-tokens 3000000 --out runs/base
  quantune data --base base.gguf --data chats.jsonl
  quantune sft --base base.gguf --data chats.jsonl --out runs/sft
  quantune reward --base base.gguf --data pairs.jsonl --out runs/reward
  quantune ppo --base base.gguf --data prompts.jsonl --adapter runs/sft/adapter --reward-adapter runs/reward/adapter --out runs/ppo
  quantune merge --base base.gguf --adapter runs/ppo/adapter --type Q8_0 --out tuned.gguf
  quantune chat --base tuned.gguf

Without a reward model, instead of reward and ppo:
  quantune dpo --base base.gguf --data pairs.jsonl --adapter runs/sft/adapter --out runs/dpo
  quantune grpo --base base.gguf --data sums.jsonl --reward numeric:answer --out runs/grpo

quantune COMMAND --help shows examples of each command.";

pub(super) const QUICKSTART: &str = "\
Examples:
  quantune quickstart
  quantune quickstart --out runs/first --threads 2";

pub(super) const PRETRAIN: &str = "\
Examples:
  quantune pretrain --source texts=1:texts/*.txt --tokenizer runs/tokenizer --max-tokens 3000000 --out runs/base
  quantune pretrain --config scripts/recipes/pretrain.toml --source texts=3:texts/*.txt --source chats=1:chats.jsonl --tokenizer runs/tokenizer --out runs/base
  quantune pretrain --out runs/base --resume";

pub(super) const SFT: &str = "\
Examples:
  quantune sft --base base.gguf --data chats.jsonl --out runs/sft --dry-run
  quantune sft --base base.gguf --data chats.jsonl --out runs/sft --eval-strategy epoch --num-train-epochs 3
  quantune sft --config scripts/recipes/sft-chat.toml --base base.gguf --data chats.jsonl --data more.jsonl=0.5 --out runs/sft
  quantune sft --base base.gguf --data chats.jsonl --out runs/tools --add-special-tokens '<|tool|>,<|/tool|>'
  quantune sft --out runs/sft --resume";

pub(super) const REWARD: &str = "\
Examples:
  quantune reward --base base.gguf --data pairs.jsonl --out runs/reward --eval-strategy epoch
  quantune reward --config scripts/recipes/reward.toml --base base.gguf --data pairs.jsonl --out runs/reward --dry-run";

pub(super) const DPO: &str = "\
Examples:
  quantune dpo --base base.gguf --data pairs.jsonl --adapter runs/sft/adapter --out runs/dpo
  quantune dpo --base base.gguf --data pairs.jsonl --loss-type simpo --beta 2 --out runs/simpo
  quantune dpo --base base.gguf --data labels.jsonl --loss-type kto --out runs/kto";

pub(super) const PPO: &str = "\
Examples:
  quantune ppo --base base.gguf --data prompts.jsonl --adapter runs/sft/adapter --reward-adapter runs/reward/adapter --out runs/ppo
  quantune ppo --config scripts/recipes/ppo.toml --base base.gguf --data prompts.jsonl --reward-adapter runs/reward/adapter --out runs/ppo --dry-run
  quantune ppo --out runs/ppo --resume";

pub(super) const GRPO: &str = "\
Examples:
  quantune grpo --base base.gguf --data sums.jsonl --reward numeric:answer --out runs/grpo
  quantune grpo --base base.gguf --data tasks.jsonl --reward-command 'python3 judge.py' --num-generations 4 --out runs/grpo
  quantune grpo --config scripts/recipes/grpo.toml --base base.gguf --data sums.jsonl --out runs/grpo --reward numeric:answer --reward length:1-200 --reward-weights 1,0.1";

pub(super) const EVAL: &str = "\
Examples:
  quantune eval --base base.gguf --adapter runs/sft/adapter --data held_out.jsonl
  quantune eval --base base.gguf --text text.txt
  quantune eval --base base.gguf --reward runs/reward/adapter --data pairs.jsonl --scores scores.jsonl
  quantune eval --base base.gguf --adapter runs/ppo/adapter --prompts prompts.jsonl --reward runs/reward/adapter --replies replies.jsonl";

pub(super) const GENERATE: &str = "\
Examples:
  quantune generate --base base.gguf --adapter runs/sft/adapter --prompt 'Why is the sky blue?'
  quantune generate --base base.gguf --prompt 'Once upon a time' --raw --max-tokens 100 --temperature 0";

pub(super) const CHAT: &str = "\
Examples:
  quantune chat --base base.gguf
  quantune chat --base base.gguf --adapter kind=runs/sft/adapter --adapter brief=runs/dpo/adapter --system 'Answer in one sentence.'
  quantune chat --base base.gguf --raw";

pub(super) const MERGE: &str = "\
Examples:
  quantune merge --base base.gguf --adapter runs/sft/adapter --type Q8_0 --out tuned.gguf
  quantune merge --base model --adapter runs/sft/adapter=0.7 --out tuned";

pub(super) const QUANTIZE: &str = "\
Examples:
  quantune quantize --base model --type Q4_K_M --out model-q4_k_m.gguf
  quantune quantize --base model --type Q8_0 --token-embedding-type F16 --out model-q8_0.gguf";

pub(super) const EXPORT: &str = "\
Examples:
  quantune export --base base.gguf --adapter runs/sft/adapter --out adapter.gguf --modelfile Modelfile
  quantune export --base base.gguf --adapter adapter.gguf --out adapter";

pub(super) const INSPECT: &str = "\
Examples:
  quantune inspect base.gguf
  quantune inspect runs/sft/adapter/adapter_model.safetensors --json";

pub(super) const DATA: &str = "\
Examples:
  quantune data --base base.gguf --data chats.jsonl --show-masks 2
  quantune data --base base.gguf --data chats.jsonl --eval-data held_out.jsonl --max-length 512
  quantune data --base base.gguf --data pairs.jsonl --allow duplicates
  quantune data --base base.gguf --data chats.jsonl --add-special-tokens '<|tool|>,<|/tool|>'";

pub(super) const ENCODE: &str = "\
Examples:
  quantune tokenizer encode --base base.gguf --text text.txt
  quantune tokenizer encode --base base.gguf --text chat.txt --parse-special --json";

pub(super) const TOKENIZER_TRAIN: &str = "\
Examples:
  quantune tokenizer train --data 'texts/*.txt' chats.jsonl --vocab-size 8192 --out runs/tokenizer
  quantune tokenizer train --data texts.parquet --vocab-size 4096 --pre-tokenizer gpt-2 --out runs/tokenizer";

pub(super) const COMPLETIONS: &str = "\
Examples:
  quantune completions bash > ~/.local/share/bash-completion/completions/quantune
  quantune completions zsh > ~/.zfunc/_quantune
  quantune completions fish > ~/.config/fish/completions/quantune.fish";
