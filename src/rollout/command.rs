//! Rewards from an external program, over JSON lines.
//!
//! The program is started once, through the shell, and reads one line per sample:
//! `{"prompt": .., "completion": .., <all other fields of the row>}`. For each it writes, in order, one
//! line: `{"reward": x}`, a bare number, or `null` for no opinion. It must flush its output after each
//! answer or at least after each batch (Python: `print(.., flush=True)`), and exit at the end of its input.
//! A resumed run restarts the program, so its answers should depend only on the line.
//!
//! One thread writes and others read, so that full pipes cannot deadlock both sides. Whatever the program
//! does, a batch ends within the time limit; after an error the program and all processes it has started
//! are killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Map, Value};

use super::{RewardError, Sample};

/// Maximum number of bytes of an answer.
const LONGEST_LINE: u64 = 1 << 20;
/// Number of answers that are buffered before the program blocks.
const WAITING_LINES: usize = 1024;
/// Time that the program has to exit after its input or output was closed.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);
/// Valid answers, for error messages.
const NEEDED: &str = r#"needed {"reward": NUMBER}, a bare number or null"#;

/// A running reward program.
#[derive(Debug)]
pub struct RewardCommand {
    command: String,
    timeout: Duration,
    child: Child,
    /// Lines for the program's stdin; `None` once the program has exited or failed.
    input: Option<Sender<Vec<u8>>>,
    answers: Receiver<ProgramLine>,
    last_stderr_line: Arc<Mutex<String>>,
    /// Disconnected when the program's stderr is closed.
    stderr_closed: Receiver<()>,
}

/// A line that the program wrote, or why it is invalid.
type ProgramLine = Result<String, &'static str>;

impl RewardCommand {
    /// Starts a program through the shell. `timeout` is the time limit per batch.
    pub fn start(command: &str, timeout: Duration) -> Result<Self, RewardError> {
        let fault = |fault: String| RewardError::Command { command: command.into(), fault };
        let mut shell = shell(command);
        shell.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = shell.spawn().map_err(|e| fault(format!("cannot be started: {e}")))?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(fault("has no pipes".into()));
        };
        let (input, to_write) = mpsc::channel();
        let (found, answers) = mpsc::sync_channel(WAITING_LINES);
        let (stderr_open, stderr_closed) = mpsc::channel();
        let last_stderr_line = Arc::new(Mutex::new(String::new()));
        std::thread::spawn(move || write(stdin, &to_write));
        std::thread::spawn(move || read(stdout, &found));
        let words = last_stderr_line.clone();
        std::thread::spawn(move || {
            read_stderr(stderr, &words);
            drop(stderr_open);
        });
        let command = command.into();
        Ok(Self {
            command,
            timeout,
            child,
            input: Some(input),
            answers,
            last_stderr_line,
            stderr_closed,
        })
    }

    /// The command line of the program.
    pub fn command(&self) -> &str {
        &self.command
    }

    /// The rewards of a batch. After an error the program is killed.
    pub fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        self.exchange(samples).map_err(|mut fault| {
            self.input = None;
            end(&mut self.child);
            let _ = self.stderr_closed.recv_timeout(EXIT_TIMEOUT);
            let words = self.last_stderr_line.lock().unwrap_or_else(PoisonError::into_inner);
            if !words.is_empty() {
                fault = format!("{fault}; its stderr ends with {:?}", cut(&words));
            }
            RewardError::Command { command: self.command.clone(), fault }
        })
    }

    fn exchange(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, String> {
        let Some(input) = &self.input else { return Err("has already exited".into()) };
        // An extra line would shift all rewards that follow.
        if let Ok(line) = self.answers.try_recv() {
            let line = line.unwrap_or_else(Into::into);
            return Err(format!(
                "wrote an extra line {:?}, needed one line per sample",
                cut(line.trim())
            ));
        }
        let most = Duration::from_secs(1 << 30);
        let until = Instant::now() + self.timeout.min(most);
        // If sending fails, the program is gone; reading its answers gives the better error.
        let _ = input.send(lines(samples));
        let count = samples.len();
        let mut rewards = Vec::with_capacity(count);
        while rewards.len() < count {
            let (which, left) =
                (rewards.len() + 1, until.saturating_duration_since(Instant::now()));
            match self.answers.recv_timeout(left) {
                Ok(Ok(line)) => match reward(&line) {
                    Some(reward) => rewards.push(reward),
                    None => {
                        let found = cut(line.trim());
                        return Err(format!(
                            "answered sample {which} of {count} with {found:?}, {NEEDED}"
                        ));
                    }
                },
                Ok(Err(found)) => {
                    return Err(format!(
                        "answered sample {which} of {count} with {found}, {NEEDED}"
                    ));
                }
                Err(RecvTimeoutError::Timeout) => {
                    return Err(format!(
                        "has not answered sample {which} of {count} within {} s, needed one line per \
                         sample, flushed at once",
                        self.timeout.as_secs_f64()
                    ));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let how = match ending(&mut self.child) {
                        Some(status) => format!("exited ({status})"),
                        None => "closed its output".into(),
                    };
                    return Err(format!(
                        "{how} after {} of {count} answers, needed one per sample until the end of \
                         its input",
                        rewards.len()
                    ));
                }
            }
        }
        Ok(rewards)
    }
}

impl Drop for RewardCommand {
    /// Closes the program's input, and kills it if it does not exit.
    fn drop(&mut self) {
        self.input = None;
        if ending(&mut self.child).is_none() {
            end(&mut self.child);
        }
    }
}

/// Runs the program in its own process group, so that it can be killed with all its children, and so that
/// Ctrl-C in the terminal does not reach it: an interrupted run still scores its last batch.
#[cfg(unix)]
fn shell(command: &str) -> Command {
    use std::os::unix::process::CommandExt;
    let mut shell = Command::new("/bin/sh");
    shell.arg("-c").arg(command).process_group(0);
    shell
}

#[cfg(not(unix))]
fn shell(command: &str) -> Command {
    let mut shell = Command::new("cmd");
    shell.arg("/C").arg(command);
    shell
}

/// The exit status of the program, if it exits in time.
fn ending(child: &mut Child) -> Option<ExitStatus> {
    let until = Instant::now() + EXIT_TIMEOUT;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            _ => return None,
        }
    }
}

/// Kills the program and reaps the process.
fn end(child: &mut Child) {
    #[cfg(unix)]
    if let (Ok(None), Ok(group)) = (child.try_wait(), i32::try_from(child.id())) {
        // SAFETY: no memory is accessed. The process id belongs to the program until it is waited for.
        unsafe { libc::kill(-group, libc::SIGKILL) };
    }
    let _ = child.kill();
    let _ = child.wait();
}

fn write(mut stdin: ChildStdin, batches: &Receiver<Vec<u8>>) {
    for batch in batches {
        if stdin.write_all(&batch).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

fn read(stdout: ChildStdout, answers: &SyncSender<ProgramLine>) {
    let mut stdout = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let line = match stdout.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(bytes) if bytes as u64 == LONGEST_LINE => Err("more than a megabyte"),
            Ok(_) => String::from_utf8(line).map_err(|_| "bytes that are not UTF-8"),
        };
        if answers.send(line).is_err() {
            return;
        }
    }
}

/// Reads stderr and keeps its last line that is not empty.
fn read_stderr(stderr: ChildStderr, last_stderr_line: &Mutex<String>) {
    let mut stderr = BufReader::new(stderr);
    loop {
        let mut line = Vec::new();
        match stderr.by_ref().take(LONGEST_LINE).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let line = String::from_utf8_lossy(&line);
        if !line.trim().is_empty() {
            *last_stderr_line.lock().unwrap_or_else(PoisonError::into_inner) = line.trim().into();
        }
    }
}

fn lines(samples: &[Sample]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for sample in samples {
        let mut line = Map::new();
        let own = sample.row.get("prompt"); // as in the data: text or messages
        line.insert("prompt".into(), own.cloned().unwrap_or_else(|| sample.prompt.into()));
        line.insert("completion".into(), sample.completion.into());
        for (key, value) in sample.row {
            if !line.contains_key(key) {
                line.insert(key.clone(), value.clone());
            }
        }
        bytes.extend(Value::Object(line).to_string().into_bytes());
        bytes.push(b'\n');
    }
    bytes
}

/// Parses an answer: `Some(None)` is no opinion, `None` is an invalid answer.
fn reward(line: &str) -> Option<Option<f64>> {
    let answer: Value = serde_json::from_str(line).ok()?;
    let reward = match &answer {
        Value::Object(answer) => answer.get("reward")?,
        answer => answer,
    };
    match reward {
        Value::Null => Some(None),
        Value::Number(number) => number.as_f64().filter(|x| x.is_finite()).map(Some),
        _ => None,
    }
}

/// The beginning of a text, for error messages.
pub(super) fn cut(text: &str) -> String {
    const MOST: usize = 80;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use serde_json::json;

    const QUICK: Duration = Duration::from_secs(20);

    fn run(
        command: &str,
        timeout: Duration,
        batches: &[usize],
    ) -> Result<Vec<Option<f64>>, String> {
        let mut command = RewardCommand::start(command, timeout).unwrap();
        let mut all = Vec::new();
        for &samples in batches {
            let row =
                |i| Map::from_iter([("answer".into(), json!(i)), ("prompt".into(), json!(0))]);
            let rows: Vec<Map<String, Value>> = (0..samples).map(row).collect();
            let texts: Vec<String> = (0..samples).map(|i| format!("reply {i}\n\"{i}\"")).collect();
            let sample = |(row, completion)| {
                let completion: &String = completion;
                Sample { prompt: "a prompt", completion, tokens: 2, finished: true, row }
            };
            let samples: Vec<Sample> = rows.iter().zip(&texts).map(sample).collect();
            all.extend(command.score(&samples).map_err(|e| e.to_string())?);
        }
        Ok(all)
    }

    #[test]
    fn programs_give_rewards() {
        let check = |command: &str, batches: &[usize], rewards: &[Option<f64>]| {
            assert_eq!(run(command, QUICK, batches).unwrap(), rewards, "{command}");
        };
        // Each answer repeats a field of its line, which shows that rows arrive whole and in order.
        let echo = r#"while read -r line; do printf '%s\n' "$line" | sed 's/.*"answer":\([0-9]*\).*/{"reward": \1.5}/'; done"#;
        check(echo, &[2, 0, 3], &[0.5, 1.5, 0.5, 1.5, 2.5].map(Some));
        check("while read -r l; do echo ' -1e-2 '; done", &[1], &[Some(-0.01)]);
        check("while read -r l; do echo null; echo 7; read -r l; done", &[2], &[None, Some(7.0)]);
        check(r#"while read -r l; do echo '{"reward": null, "why": [1]}'; done"#, &[1], &[None]);
        // A program may answer a batch at a time.
        check(
            "read -r a; read -r b; echo 1; echo 2; read -r c; echo 3",
            &[2, 1],
            &[1.0, 2.0, 3.0].map(Some),
        );
        check("echo started >&2; while read -r l; do echo 1; done", &[1], &[Some(1.0)]);
    }

    /// Both pipes are full before either side reads.
    #[test]
    fn large_batches_do_not_deadlock() {
        let rewards = run(
            r#"while read -r l; do printf '{"reward": 1, "said": %s}\n' "$l"; done"#,
            QUICK,
            &[3000],
        );
        assert_eq!(rewards.unwrap(), vec![Some(1.0); 3000]);
        let late = "sleep 0.3; while read -r l; do echo 2; done";
        assert_eq!(run(late, QUICK, &[3000]).unwrap(), vec![Some(2.0); 3000]);
    }

    #[test]
    fn errors_of_programs_say_what_happened() {
        let check_within = |limit: u64, command: &str, batches: &[usize], sentence: &str| {
            let started = Instant::now();
            let error = run(command, Duration::from_millis(limit), batches).unwrap_err();
            assert_eq!(error, format!("reward command {command:?} {sentence}"));
            assert!(started.elapsed() < Duration::from_secs(10), "{command} took too long");
        };
        // A loaded machine may be slow to start a shell: only programs that never answer get a short
        // limit.
        let check = |command: &str, batches: &[usize], sentence: &str| {
            check_within(8000, command, batches, sentence);
        };
        let needed = "needed {\"reward\": NUMBER}, a bare number or null";
        let each = "needed one per sample until the end of its input";
        check(
            "read -r l; echo 1; exit 3",
            &[2],
            &format!("exited (exit status: 3) after 1 of 2 answers, {each}"),
        );
        check(
            "echo 'Traceback' >&2; echo 'KeyError: 7' >&2; echo >&2; exit 1",
            &[1],
            &format!(
                "exited (exit status: 1) after 0 of 1 answers, {each}; its stderr ends with \"KeyError: 7\""
            ),
        );
        check(
            "no-such-program-here 2>/dev/null",
            &[1],
            &format!("exited (exit status: 127) after 0 of 1 answers, {each}"),
        );
        check(
            "kill -9 $$",
            &[1],
            &format!("exited (signal: 9 (SIGKILL)) after 0 of 1 answers, {each}"),
        );
        check(
            "read -r l; echo 1; exec 1>&-; sleep 100",
            &[2],
            &format!("closed its output after 1 of 2 answers, {each}"),
        );
        let late = "s, needed one line per sample, flushed at once";
        let never = |of: usize| format!("has not answered sample 1 of {of} within 0.6 {late}");
        check_within(600, "sleep 100", &[4], &never(4));
        check_within(600, "sleep 100 & wait", &[4000], &never(4000));
        let second = format!("has not answered sample 2 of 2 within 4 {late}");
        check_within(4000, "read -r l; echo 1; cat > /dev/null", &[2], &second);
        let rubbish = |found: &str| format!("answered sample 1 of 1 with {found}, {needed}");
        check("read -r l; echo good", &[1], &rubbish("\"good\""));
        check("read -r l; echo NaN", &[1], &rubbish("\"NaN\""));
        check("read -r l; echo 1e999", &[1], &rubbish("\"1e999\""));
        check("read -r l; echo '[1]'", &[1], &rubbish("\"[1]\""));
        check("read -r l; echo", &[1], &rubbish("\"\""));
        check(
            "read -r l; echo '{\"reward\": {\"a\": 1}}'",
            &[1],
            &rubbish(r#""{\"reward\": {\"a\": 1}}""#),
        );
        check("read -r l; echo '{\"score\": 1}'", &[1], &rubbish(r#""{\"score\": 1}""#));
        check("read -r l; printf '\\377\\n'", &[1], &rubbish("bytes that are not UTF-8"));
        check("read -r l; head -c 3000000 /dev/zero", &[1], &rubbish("more than a megabyte"));
        check(
            "cat",
            &[1],
            &rubbish(&format!(
                "{:?}",
                cut(r#"{"prompt":0,"completion":"reply 0\n\"0\"","answer":0}"#)
            )),
        );
        // An extra line is detected once it has been read, which may be a batch later.
        check("yes 1", &[1; 1000], "wrote an extra line \"1\", needed one line per sample");
        check("read -r l; yes", &[1], &rubbish("\"y\""));
    }

    #[test]
    fn no_process_of_a_program_survives() {
        let gone = |command: &str, samples: usize| {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("pids");
            let noted =
                format!("echo $$ >> {0}; sleep 300 & echo $! >> {0}; {command}", file.display());
            let _ = run(&noted, Duration::from_secs(3), &[samples]);
            let pids = std::fs::read_to_string(&file).unwrap();
            let alive = |pid: &&str| {
                let status = std::fs::read_to_string(format!("/proc/{pid}/stat"));
                // A process that is not reaped may remain as a zombie.
                status.is_ok_and(|status| !status.contains(") Z"))
            };
            assert_eq!(pids.lines().count(), 2);
            for _ in 0..100 {
                if pids.lines().filter(alive).count() == 0 {
                    return;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            panic!("{command}: still there");
        };
        gone("wait", 1);
        gone("trap '' TERM INT HUP PIPE; while :; do sleep 1; done", 1);
        gone("wait", 0);
    }
}
