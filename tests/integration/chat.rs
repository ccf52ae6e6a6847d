//! `quantune chat` line by line from a pipe: replies match those of `generate`, commands take effect, and the
//! first error ends the program with one sentence.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

use crate::binary::{Lab, adapter, base, error, quantune, strings};

/// Runs a chat with the given input lines.
fn chat(args: &[&str], lines: &[&str]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_quantune"))
        .arg("chat")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    for line in lines {
        let _ = writeln!(stdin, "{line}"); // a fault may have ended it
    }
    drop(stdin);
    child.wait_with_output().unwrap()
}

/// The output of a chat.
fn said(args: &[&str], lines: &[&str]) -> String {
    let output = chat(args, lines);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{lines:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

fn generated(args: &[&str], prompt: &str) -> String {
    let output = quantune(&strings(&[&["generate", "--prompt", prompt], args].concat()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn replies_match_generate_with_any_active_adapters() {
    let (base, adapter) = (base(), adapter());
    let common = ["--base", &base, "--max-tokens", "20", "--temperature", "0"];
    let named = format!("voice={adapter}");
    let with = [&common[..], &["--adapter", &named]].concat();
    let bare = generated(&common, "hello there");
    let active = generated(&[&common[..], &["--adapter", &adapter]].concat(), "hello there");
    let half = format!("{adapter}=0.5");
    let half = generated(&[&common[..], &["--adapter", &half]].concat(), "hello there");
    assert!(bare != active && active != half && bare != half, "{bare}{active}{half}");

    let check = |args: &[&str], lines: &[&str], needed: &[&str]| {
        assert_eq!(said(args, lines), needed.concat(), "{lines:?}");
    };
    check(&common, &["hello there"], &[&bare]);
    check(&with, &["hello there"], &[&active]);
    check(&with, &["", "/adapter off", "hello there"], &[&bare]);
    check(&with, &["/adapter voice=0.5", "hello there"], &[&half]);
    // Swapping adapters between two replies to the same message leaves nothing in the prompt cache.
    check(
        &with,
        &["hello there", "/adapter off", "/regenerate", "/adapter voice", "/regenerate"],
        &[&active, &bare, &active],
    );
    let load = format!("/load other={adapter}=0.5");
    check(
        &with,
        &[
            "hello there",
            &load,
            "/adapter other",
            "/reset",
            "hello there",
            "/undo",
            "/drop other",
            "hello there",
        ],
        &[&active, &half, &bare],
    );
    check(&with, &["/adapter voice=0.25 voice=0.25", "/adapters", "hello there"], &[&half]);
    check(&with, &["hello there", "/quit", "hello there"], &[&active]);
}

#[test]
fn a_conversation_is_saved_as_a_row() {
    let lab = Lab::new();
    let (base, path) = (base(), lab.path("saved.jsonl"));
    let args = ["--base", &base, "--max-tokens", "9", "--temperature", "0", "--system", "be brief"];
    let save = format!("/save {path}");
    let lines = ["one\\", "more", "//two", "/undo", "//two", &save, "/system", "three", &save];
    let stdout = said(&args, &lines);
    let rows: Vec<Value> = fs::read_to_string(&path)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |row: &Value, key: &str| -> Vec<String> {
        let messages = row["messages"].as_array().unwrap().iter();
        messages.map(|message| message[key].as_str().unwrap().to_string()).collect()
    };
    assert_eq!(of(&rows[0], "role"), ["system", "user", "assistant", "user", "assistant"]);
    let first = of(&rows[0], "content");
    assert_eq!((&*first[0], &*first[1], &*first[3]), ("be brief", "one\nmore", "/two"));
    let roles = ["user", "assistant", "user", "assistant", "user", "assistant"];
    assert_eq!(of(&rows[1], "role"), roles);
    let second = of(&rows[1], "content");
    assert_eq!(second[..4], first[1..]);
    // A message that is removed and sent again gets the same reply.
    let replies = [&first[2], &first[4], &first[4], &second[5]];
    assert_eq!(stdout, replies.map(|reply| format!("{reply}\n")).concat());
    assert_eq!(rows.len(), 2);
}

#[test]
fn raw_text_grows() {
    let lab = Lab::new();
    let (base, path) = (base(), lab.path("saved.jsonl"));
    let args = ["--base", &base, "--raw", "--max-tokens", "12", "--temperature", "0"];
    let free = said(&args, &["Q: one\\", "A:"]);
    let free = free.strip_suffix('\n').unwrap();
    let third = free.char_indices().nth(3).unwrap().0;
    let stop: String = free[third..].chars().take(2).collect();
    let at = free.find(&stop).unwrap();
    let save = format!("/save {path}");
    let stopped = [&args[..], &["--stop", &stop]].concat();
    let lines = ["Q: one\\", "A:", &save, " and", "", &save];
    let stdout = said(&stopped, &lines);
    assert!(stdout.starts_with(&format!("{}\n", &free[..at])), "{stdout:?} {free:?} {stop:?}");
    let rows = fs::read_to_string(&path).unwrap();
    let texts: Vec<String> = rows
        .lines()
        .map(|row| {
            let row: Value = serde_json::from_str(row).unwrap();
            row["text"].as_str().unwrap().to_string()
        })
        .collect();
    // The stop string is part of the text, though it is not printed.
    assert_eq!(texts[0], format!("Q: one\nA:{}{stop}", &free[..at]));
    assert!(texts[1].starts_with(&format!("{} and", texts[0])), "{texts:?}");
}

#[test]
fn every_flag_changes_something() {
    let lab = Lab::new();
    let (base, dated) = (base(), lab.dated_base());
    let named = format!("voice={}", adapter());
    let common = [
        ("--base", &*base),
        ("--max-tokens", "24"),
        ("--temperature", "1.5"),
        ("--seed", "1"),
        ("--top-k", "0"),
        ("--top-p", "1"),
        ("--min-p", "0"),
    ];
    let run = |row: &[(&str, &str)]| {
        let kept = common.iter().filter(|(flag, _)| !row.iter().any(|(f, _)| f == flag));
        let args: Vec<&str> = kept
            .chain(row)
            .flat_map(|(flag, value)| [*flag, *value])
            .filter(|word| !word.is_empty())
            .collect();
        said(&args, &["hello there", "and again"])
    };
    let plain = run(&[]);
    assert_eq!(run(&[]), plain);
    let stop: String = plain.chars().skip(4).take(2).collect();
    let rows: &[&[(&str, &str)]] = &[
        &[("--temperature", "0")],
        &[("--top-k", "1")],
        &[("--top-p", "0.1")],
        &[("--min-p", "0.9")],
        &[("--repetition-penalty", "9")],
        &[("--seed", "2")],
        &[("--max-tokens", "3")],
        &[("--stop", &stop)],
        &[("--system", "be brief")],
        &[("--adapter", &named)],
        &[("--raw", "")],
        &[("--compute", "int8")],
        &[("--backend", "reference")],
        &[("--cache-type", "q8")],
    ];
    // Rounding seldom changes a sample, so these flags only need to be accepted; `generate` tests them.
    let rounds = ["--compute", "--backend", "--cache-type"];
    for row in rows {
        let (flag, _) = row[0];
        assert!(run(row) != plain || rounds.contains(&flag), "{row:?} changes nothing");
    }
    let date = |date: &str| run(&[("--base", &dated), ("--template-date", date)]);
    assert_ne!(date("2020-01-01"), date("2021-02-03"));
    let dated = [("--base", &*dated), ("--max-tokens", "8"), ("--template-date", "2020-01-01")];
    let glad = ("--chat-template-kwargs", "mood=\"glad\"");
    assert_ne!(run(&[&dated[..], &[glad]].concat()), run(&dated));
    let shout = lab.path("shout.jinja");
    assert_ne!(run(&[&dated[..], &[("--chat-template", &*shout)]].concat()), run(&dated));
}

#[test]
fn errors_are_one_sentence() {
    let lab = Lab::new();
    // Another base, with one layer fewer than the adapter has.
    let (base, other) = (base(), lab.dated_base());
    let config = Path::new(&other).join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    value["num_hidden_layers"] = json!(1);
    fs::write(&config, value.to_string()).unwrap();
    let named = format!("voice={}", adapter());
    let nowhere = lab.path("nowhere");
    let load = format!("/load a={nowhere}");
    let long = "word ".repeat(200);
    let check = |args: &[&str], lines: &[&str], needed: &str| {
        let output = chat(args, lines);
        assert!(!output.status.success(), "{args:?} {lines:?}");
        let message = error(&output);
        assert!(message.contains(needed), "{args:?} {lines:?}: {message}");
    };
    let of = |lines: &[&str], needed: &str| check(&["--base", &base], lines, needed);
    of(&["/adapter nobody"], "no adapter is named \"nobody\": none is loaded");
    of(&["/foo"], "unknown command /foo; commands are /adapter");
    of(&["/undo"], "there is no message yet");
    of(&["/regenerate"], "there is no message yet");
    of(&["/save x.jsonl"], "there is no message yet");
    of(&["/load a"], "needed NAME=PATH");
    of(&[&load], "nowhere");
    of(&["/drop voice"], "no adapter is named \"voice\"");
    of(&["/set temperature hot"], "temperature is \"hot\", needed a number");
    of(&["/set temperature -1"], "temperature is -1, needed 0 or more");
    of(&["/set heat 1"], "unknown setting \"heat\"; settings are temperature");
    of(&[&long], "which leaves no room for a reply in the context");
    let active = |lines: &[&str], needed: &str| {
        check(&["--base", &base, "--adapter", &named], lines, needed);
    };
    active(&["/adapter other"], "no adapter is named \"other\", loaded are voice");
    let again = format!("/load {named}");
    active(&[&again], "an adapter is named \"voice\" already");
    check(&["--base", &other, "--adapter", &named], &[], "does not fit this base");
    check(&["--base", &base, "--adapter", &adapter()], &[], "NAME=PATH");
    check(&["--base", &base, "--raw"], &["/system a"], "/system is not supported with --raw");
    check(&["--base", &base, "--raw"], &[""], "no text to continue");
    check(
        &["--base", &base, "--history", &nowhere],
        &[],
        "--history requires a terminal, but stdin is not one",
    );
    check(&["--base", &base, "--top-p", "2"], &[], "top_p is 2");
    check(&["--base", &base, "--json"], &[], "/save FILE");

    let bare = lab.dated_base();
    fs::remove_file(Path::new(&bare).join("chat_template.jinja")).unwrap();
    let config = Path::new(&bare).join("tokenizer_config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    value.as_object_mut().unwrap().remove("chat_template");
    fs::write(&config, value.to_string()).unwrap();
    check(&["--base", &bare], &["hello"], "no chat template; use --raw");
    let raw = ["--base", &bare, "--raw", "--max-tokens", "4", "--temperature", "0"];
    assert!(said(&raw, &["hello"]).len() > 1);
}

/// Ctrl-C stops a reply, and the conversation continues.
#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_reply() {
    let lab = Lab::new();
    let base = lab.dated_base();
    let config = Path::new(&base).join("config.json");
    let mut value: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
    value["max_position_embeddings"] = json!(200_000);
    fs::write(&config, value.to_string()).unwrap();
    let path = lab.path("saved.jsonl");
    let talk = |date: &str| {
        let mut child = Command::new(env!("CARGO_BIN_EXE_quantune"))
            .args(["chat", "--base", &base, "--max-tokens", "150000", "--temperature", "0"])
            .args(["--template-date", date])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        writeln!(stdin, "hello there").unwrap();
        stdout.read_exact(&mut [0; 1]).unwrap(); // a reply has begun
        let pid = child.id().to_string();
        assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
        // The program may have exited already.
        let _ = writeln!(stdin, "/set max_tokens 3\nand again\n/save {path}");
        drop(stdin);
        std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
        child.wait_with_output().unwrap()
    };
    // A reply may end by itself before Ctrl-C, which then exits the program with 130.
    let dates = ["2020-01-01", "2021-02-02", "2022-03-03", "2023-04-04", "2024-05-05"];
    let talks = dates.iter().map(|date| talk(date));
    let ended = talks.into_iter().find(|ended| ended.status.code() != Some(130)).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let row: Value = serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap();
    let messages = row["messages"].as_array().unwrap();
    assert_eq!(messages.len(), 4, "{row}");
}
